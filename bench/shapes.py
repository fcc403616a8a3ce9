"""Models of real shape with random weights: what one would feel like here, before anybody downloads it.

Speed does not ask what the weights are worth, only how many there are and in which types. So a GGUF pair is written in
seconds: metadata and tensors by the plan that real conversions use, types as llama.cpp chooses them, and blocks drawn
once and repeated. It answers nonsense.

Source: the models' config.json on the Hugging Face hub; `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp for
Q4_K_M; ggml-common.h for the blocks.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from ldrt_edge import artifact
from ldrt_edge.convert.gguf import check_room, write
from ldrt_edge.convert.plan import FilePlan, TensorPlan, mmproj_plan, text_plan
from ldrt_edge.convert.source import Source
from ldrt_edge.convert.weights import Entry, Weights, canonical
from ldrt_edge.errors import require
from ldrt_edge.front import Front

QUESTION = "How many beams are used?"
"""The one text that the drawn tokenizer knows, unless it is given others; the rest it writes byte by byte."""
DEVIATION = 0.02
Type = Literal["Q4_K_M", "Q8_0", "F16"]

_VICUNA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
_VICUNA_13B = _VICUNA | {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
_MISTRAL = _VICUNA | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_GRID = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Shape:
    """text: the language model's configuration. tiled: LLaVA-NeXT, which cuts a picture into up to five tiles.

    vision: the tower's configuration, CLIP ViT-L/14 at 336 pixels.
    """

    text: dict[str, Any]
    tiled: bool = False
    vision: dict[str, Any] = field(default_factory=lambda: _VISION)

    @property
    def grid(self) -> dict[str, Any]:
        """The sizes that pictures are tiled to, as configurations name them; nothing for LLaVA-1.5."""
        side = self.vision["image_size"]
        return {"image_grid_pinpoints": [[side * h, side * w] for h, w in _GRID]} if self.tiled else {}


SHAPES = {
    "llava-1.5-7b": Shape(_VICUNA),
    "llava-1.5-13b": Shape(_VICUNA_13B),
    "llava-1.6-vicuna-7b": Shape(_VICUNA, tiled=True),
    "llava-1.6-vicuna-13b": Shape(_VICUNA_13B, tiled=True),
    "llava-1.6-mistral-7b": Shape(_MISTRAL, tiled=True),
}


def draw(shape: Shape, type_: Type, out: Path) -> Path:
    """Write a gguf artefact of this shape; returns `out`.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        ArtifactError: there is no room on the disk.
    """
    config = {"drawn": True, **asdict(shape), "type": type_}
    with artifact.create(out, "gguf", config, seed=0) as draft:
        if not draft.complete:
            with tempfile.TemporaryDirectory() as folder:
                source = _source(Path(folder), shape)
                text, vision = _typed(text_plan(source, "f16"), type_), _Drawn(**vars(mmproj_plan(source, "f16")))
                check_room(draft.path, text.nbytes + vision.nbytes)
                write(text, draft.path / f"model-{type_}.gguf", "language model, drawn")
                write(vision, draft.path / "mmproj-F16.gguf", "vision, drawn")
                source.front.save(draft.path)
    return out


def write_config(folder: Path, shape: Shape, texts: Sequence[str] = (QUESTION,), vocabulary: int = 300) -> Any:
    """Write a model's configuration, tokenizer and processor into `folder`; transformers' configuration object.

    texts: what the tokenizer knows, in at most `vocabulary` tokens.
    """
    transformers = require("transformers", "train")
    tokenizer = _tokenizer(folder, shape, texts, vocabulary)
    kind, name = (transformers.LlavaNextConfig, "LlavaNext") if shape.tiled else (transformers.LlavaConfig, "Llava")
    config = kind(
        text_config={"model_type": "llama", **shape.text},
        vision_config={"model_type": "clip_vision_model", **shape.vision},
        architectures=[f"{name}ForConditionalGeneration"],
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
        **shape.grid,
    )
    config.save_pretrained(folder)
    return config


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, as transformers builds the model; nothing is allocated."""
    torch, transformers = require("torch", "train"), require("transformers", "train")
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class _NoWeights(Weights):
    """The names and shapes of a checkpoint that is nowhere."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.folder = folder
        self.entries = {canonical(name): Entry(folder, name, shape, "F16") for name, shape in shapes.items()}


@dataclass(frozen=True)
class _Drawn(FilePlan):
    """A file whose tensors are drawn as they are written."""

    def blocks(self, tensor: TensorPlan) -> Iterator[NDArray[Any]]:
        """A tensor as the file stores it: ones for norms, nothing for biases, else the same random blocks again."""
        if len(tensor.shape) == 1:
            yield np.full(tensor.shape, 0.0 if tensor.name.endswith("bias") else 1.0, np.float32)
            return
        pool = _pool(tensor.type)
        for start in range(0, tensor.nbytes, len(pool)):
            yield pool[: tensor.nbytes - start]


def _source(folder: Path, shape: Shape) -> Source:
    config = write_config(folder, shape)
    return Source(folder, config, _NoWeights(folder, tensor_shapes(config)), Front.load(folder))


def _typed(plan: FilePlan, type_: Type) -> _Drawn:
    """The language model's matrices in the types that llama.cpp gives them."""
    layers = sum(tensor.name.endswith("attn_v.weight") for tensor in plan.tensors)
    tensors = tuple(
        tensor if len(tensor.shape) == 1 else replace(tensor, type=_type(tensor.name, type_, layers))
        for tensor in plan.tensors
    )
    plan.metadata.kv_data[0]["general.file_type"].value = int(LlamaFileType[f"MOSTLY_{type_}"])
    return _Drawn(plan.metadata, tensors, plan.weights)


def _type(name: str, type_: Type, layers: int) -> GGMLQuantizationType:
    if type_ != "Q4_K_M":
        return GGMLQuantizationType[type_]
    if name == "output.weight":
        return GGMLQuantizationType.Q6_K
    if name.endswith(("attn_v.weight", "ffn_down.weight")):
        layer, eighth = int(name.split(".")[1]), layers // 8
        more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        return GGMLQuantizationType.Q6_K if more else GGMLQuantizationType.Q4_K
    return GGMLQuantizationType.Q4_K


def _pool(type_: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Some megabytes of blocks: random codes, with scales that give weights of a usual size around 0."""
    rng = np.random.default_rng(0)
    size = GGML_QUANT_SIZES[type_][1]
    count = _CHUNK_BYTES // math.lcm(size, 256) * (math.lcm(size, 256) // size)
    if type_ in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
        kind = np.float16 if type_ == GGMLQuantizationType.F16 else np.float32
        return rng.normal(0, DEVIATION, count).astype(kind).view(np.uint8)
    blocks = rng.integers(256, size=(count, size), dtype=np.uint8)
    scale = {"Q4_K": DEVIATION / (32 * 4.6), "Q6_K": DEVIATION / (15.5 * 18.5), "Q8_0": DEVIATION / 74}[type_.name]

    def put(place: int, value: float) -> None:
        blocks[:, place : place + 2] = np.array([value], np.float16).view(np.uint8)

    if type_ == GGMLQuantizationType.Q4_K:  # d, dmin, scales, codes
        put(0, scale)
        put(2, 7.5 * scale)
    elif type_ == GGMLQuantizationType.Q6_K:  # low bits, high bits, signed scales, d
        blocks[:, 192:208] &= 31
        put(208, scale)
    else:
        put(0, scale)
    return blocks.reshape(-1)


def _tokenizer(folder: Path, shape: Shape, texts: Sequence[str], vocabulary: int) -> Any:
    """Llama's kind of tokenizer (SentencePiece, bytes as fallback), a processor and Vicuna's chat form."""
    transformers, sentencepiece = require("transformers", "train"), require("sentencepiece", "train")
    trained, side = io.BytesIO(), shape.vision["image_size"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=trained, model_type="bpe", vocab_size=vocabulary,
        hard_vocab_limit=False, byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    described = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, **words}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "LlavaNextImageProcessor" if shape.tiled else "CLIPImageProcessor",
        "do_center_crop": True, "resample": 3, **shape.grid,
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }))  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps({
        "processor_class": "LlavaNextProcessor" if shape.tiled else "LlavaProcessor", "image_token": "<image>",
        "patch_size": shape.vision["patch_size"], "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }))  # fmt: skip
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
        "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    return tokenizer
