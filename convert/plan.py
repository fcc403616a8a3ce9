"""What a GGUF pair of a LLaVA model holds: its metadata, and every tensor with its source, shape and type.

A plan is made before anything is written, so that unknown, missing and misshapen tensors are all reported at once; the
same plan is written to disk by `gguf.py` and held against a finished file by `parity.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, quantize
from numpy.typing import NDArray

from ldrt_edge.console import say
from ldrt_edge.convert.vocabulary import read_vocabulary
from ldrt_edge.convert.weights import Weights
from ldrt_edge.errors import ArtifactError, all_problems, require
from ldrt_edge.front import Front

TextType = Literal["f32", "f16", "bf16"]
MmprojType = Literal["f32", "f16", "q8_0"]

_F16_MAX = 65504.0
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip
_NAMES = {"llava": "LLaVA-1.5", "llava_next": "LLaVA-NeXT"}  # not the folder's: equal models give equal files
_TEXT_MODELS = ("llama", "mistral")
_TOWER_ACTIVATIONS = ("quick_gelu", "gelu")
_IGNORED = ("rotary_emb.inv_freq", "position_ids", "vision_tower.post_layernorm", "vision_tower.head")
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_VISION_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of a GGUF file. `source` is its canonical checkpoint name, or the values themselves.

    shape: as in the checkpoint, rows last but one; GGUF stores it reversed.
    """

    name: str
    source: str | NDArray[np.float32]
    shape: tuple[int, ...]
    type: GGMLQuantizationType = GGMLQuantizationType.F32
    rearrange: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class FilePlan:
    """One GGUF file: `metadata` is a writer that has no file yet."""

    metadata: GGUFWriter
    tensors: tuple[TensorPlan, ...]
    weights: Weights

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def values(self, tensor: TensorPlan) -> NDArray[np.float32]:
        """A tensor's values in llama.cpp's order."""
        values = self.weights.read(tensor.source) if isinstance(tensor.source, str) else tensor.source
        return np.ascontiguousarray(values if tensor.rearrange is None else tensor.rearrange(values))

    def encoded(self, tensor: TensorPlan) -> NDArray[Any]:
        """A tensor as the file stores it.

        Raises:
            ArtifactError: a value is beyond the range of half precision, or not a number.
        """
        values = self.values(tensor)
        largest = float(np.abs(values).max(initial=0.0))
        if not math.isfinite(largest):
            raise ArtifactError(f"{self.weights.folder}: {tensor.source} holds values that are not numbers")
        if tensor.type == GGMLQuantizationType.F16 and largest > _F16_MAX:
            raise ArtifactError(f"{self.weights.folder}: {tensor.source} holds {largest:.3g}, beyond f16: take f32")
        return np.asarray(quantize(values, tensor.type))


@dataclass(frozen=True)
class Source:
    """A Hugging Face LLaVA folder, opened and checked."""

    folder: Path
    config: Any  # transformers' LlavaConfig or LlavaNextConfig, defaults filled in
    weights: Weights
    front: Front


def open_source(folder: Path) -> Source:
    """Read a folder's configuration, weight index and front end.

    Raises:
        ArtifactError: not a LLaVA that llama.cpp's graphs can compute; all reasons at once.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: no config.json, so not a Hugging Face model folder")
    transformers = require("transformers", "train")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder}: config.json is not readable: {str(error).splitlines()[0]}") from error
    problems = list(_unsupported(config))
    if problems:
        raise ArtifactError(all_problems(problems, f"{folder}: cannot become GGUF"))
    return Source(folder, config, Weights(folder), Front.load(folder))


def text_plan(source: Source, type_: TextType) -> FilePlan:
    """The language model as GGUF's `llama` architecture.

    Raises:
        ArtifactError: tensors are missing, unknown or of another shape; or the RoPE scaling or tokenizer is another.
    """
    text, weights = source.config.text_config, source.weights
    writer = GGUFWriter(None, "llama")
    writer.add_type("model")
    writer.add_name(_NAMES[source.config.model_type])
    writer.add_file_type(_FILE_TYPES[type_])
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(_context_length(text))
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(_kv_heads(text))
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(_head_dim(text))
    tied = _tied(source)
    tensors = [*_text_tensors(text, type_, tied), *_rope_scaling(text, writer, source.folder)]
    _check(weights, tensors, lambda name: name.startswith(("language_model.", "lm_head.")), tied)
    read_vocabulary(source.folder, source.front, text.vocab_size).write(writer)
    writer.add_chat_template(source.front.config.chat_template)
    return FilePlan(writer, tuple(tensors), weights)


def mmproj_plan(source: Source, type_: MmprojType) -> FilePlan:
    """Vision tower and projector as llama.cpp's CLIP file.

    The tower ends at LLaVA's feature layer: later layers and the final norm are left out, so that no reader can
    use them. LLaVA-NeXT's newline embedding is carried for our runtime; its tiling grid is not, since mtmd would
    tile by it without unpadding and newlines.

    Raises:
        ArtifactError: tensors are missing, unknown or of another shape.
    """
    vision, front = source.config.vision_config, source.front.config
    layers = feature_layers(source.config)
    writer = GGUFWriter(None, "clip")
    writer.add_type("mmproj")
    writer.add_name(_NAMES[source.config.model_type])
    writer.add_file_type(_FILE_TYPES[type_])
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", vision.hidden_act == "gelu")
    for key, number in (
        ("image_size", vision.image_size), ("patch_size", vision.patch_size), ("embedding_length", vision.hidden_size),
        ("feed_forward_length", vision.intermediate_size), ("block_count", layers),
        ("projection_dim", source.config.text_config.hidden_size),
        ("attention.head_count", vision.num_attention_heads),
    ):  # fmt: skip
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_array("clip.vision.image_mean", list(front.image_mean))
    writer.add_array("clip.vision.image_std", list(front.image_std))
    tensors = list(_vision_tensors(source, type_, layers))
    later = tuple(f"vision_tower.encoder.layers.{i}." for i in range(layers, vision.num_hidden_layers))
    _check(source.weights, tensors, lambda name: not name.startswith(("language_model.", "lm_head.", *later)), False)
    return FilePlan(writer, tuple(tensors), source.weights)


def feature_layers(config: Any) -> int:
    """How many layers of the tower run before LLaVA takes its features."""
    layer, layers = int(config.vision_feature_layer), int(config.vision_config.num_hidden_layers)
    return layer if layer >= 0 else layers + 1 + layer


def _unsupported(config: Any) -> Iterator[str]:
    if config.model_type not in _NAMES:
        yield f"model type {config.model_type!r} is no LLaVA: supported are {', '.join(_NAMES)}"
        return
    text, vision = config.text_config, config.vision_config
    if getattr(config, "quantization_config", None):
        yield "the weights are quantised already: convert the full-precision model"
    if text.model_type not in _TEXT_MODELS:
        yield f"text model {text.model_type!r}, supported are {', '.join(_TEXT_MODELS)}"
    elif text.hidden_act != "silu":
        yield f"text activation {text.hidden_act!r}, supported is silu"
    if vision.model_type != "clip_vision_model":
        yield f"vision model {vision.model_type!r}, supported is clip_vision_model"
    elif vision.hidden_act not in _TOWER_ACTIVATIONS:
        yield f"vision activation {vision.hidden_act!r}, supported are {', '.join(_TOWER_ACTIVATIONS)}"
    if config.projector_hidden_act != "gelu" or not getattr(config, "multimodal_projector_bias", True):
        yield "the projector is not linear, gelu, linear with biases"
    if not isinstance(config.vision_feature_layer, int):
        yield f"vision_feature_layer {config.vision_feature_layer}, supported is a single layer"
    elif not 1 <= feature_layers(config) <= vision.num_hidden_layers:
        yield f"vision_feature_layer {config.vision_feature_layer} of {vision.num_hidden_layers} layers"
    if config.vision_feature_select_strategy != "default":
        yield f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}, supported is 'default'"


def _text_tensors(text: Any, type_: str, tied: bool) -> Iterator[TensorPlan]:
    width, hidden, heads, kv_heads = text.hidden_size, text.intermediate_size, text.num_attention_heads, _kv_heads(text)
    queries, keys = heads * _head_dim(text), kv_heads * _head_dim(text)
    linears = [
        ("self_attn.q_proj", "attn_q", (queries, width), heads),
        ("self_attn.k_proj", "attn_k", (keys, width), kv_heads),
        ("self_attn.v_proj", "attn_v", (keys, width), None),
        ("self_attn.o_proj", "attn_output", (width, queries), None),
        ("mlp.gate_proj", "ffn_gate", (hidden, width), None),
        ("mlp.up_proj", "ffn_up", (hidden, width), None),
        ("mlp.down_proj", "ffn_down", (width, hidden), None),
    ]
    biased = {"self_attn": getattr(text, "attention_bias", False), "mlp": getattr(text, "mlp_bias", False)}

    def plan(name: str, key: str, shape: tuple[int, ...], rotated_heads: int | None = None) -> TensorPlan:
        rearrange = None if rotated_heads is None else _interleave(rotated_heads)
        return TensorPlan(name, key, shape, _type(name, shape, type_), rearrange)

    yield plan("token_embd.weight", "language_model.embed_tokens.weight", (text.vocab_size, width))
    for i in range(text.num_hidden_layers):
        layer = f"language_model.layers.{i}"
        yield plan(f"blk.{i}.attn_norm.weight", f"{layer}.input_layernorm.weight", (width,))
        yield plan(f"blk.{i}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", (width,))
        for key, name, shape, rotated in linears:
            yield plan(f"blk.{i}.{name}.weight", f"{layer}.{key}.weight", shape, rotated)
            if biased[key.partition(".")[0]]:
                yield plan(f"blk.{i}.{name}.bias", f"{layer}.{key}.bias", shape[:1], rotated)
    yield plan("output_norm.weight", "language_model.norm.weight", (width,))
    if not tied:
        yield plan("output.weight", "lm_head.weight", (text.vocab_size, width))


def _vision_tensors(source: Source, type_: str, layers: int) -> Iterator[TensorPlan]:
    vision, out = source.config.vision_config, source.config.text_config.hidden_size
    width, hidden, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    positions = (vision.image_size // patch) ** 2 + 1
    shapes = {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden), "layer_norm1": (width,), "layer_norm2": (width,)}
    projector, tower = "multi_modal_projector", "vision_tower"

    def plan(name: str, key: str, shape: tuple[int, ...]) -> TensorPlan:
        return TensorPlan(name, key, shape, _type(name, shape, type_))

    yield plan("v.class_embd", f"{tower}.embeddings.class_embedding", (width,))
    yield plan("v.patch_embd.weight", f"{tower}.embeddings.patch_embedding.weight", (width, 3, patch, patch))
    yield plan("v.position_embd.weight", f"{tower}.embeddings.position_embedding.weight", (positions, width))
    for part, dimensions in (("weight", 2), ("bias", 1)):
        yield plan(f"v.pre_ln.{part}", f"{tower}.pre_layrnorm.{part}", (width,))
        for i in range(layers):
            for key, name in _VISION_LAYER.items():
                shape = shapes.get(key, (width, width))[:dimensions]
                yield plan(f"v.blk.{i}.{name}.{part}", f"{tower}.encoder.layers.{i}.{key}.{part}", shape)
        yield plan(f"mm.0.{part}", f"{projector}.linear_1.{part}", (out, width)[:dimensions])
        yield plan(f"mm.2.{part}", f"{projector}.linear_2.{part}", (out, out)[:dimensions])
    if source.config.model_type == "llava_next":
        yield plan("model.image_newline", "image_newline", (out,))


def _type(name: str, shape: tuple[int, ...], wanted: str) -> GGMLQuantizationType:
    """Vectors and position tables stay float32; what 8 bits cannot hold in whole blocks becomes f16."""
    if len(shape) == 1 or wanted == "f32" or name == "v.position_embd.weight":
        return GGMLQuantizationType.F32
    if wanted == "q8_0":
        whole = len(shape) == 2 and shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0][0] == 0
        return GGMLQuantizationType.Q8_0 if whole else GGMLQuantizationType.F16
    return GGMLQuantizationType[wanted.upper()]


def _interleave(heads: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Rows of each head from halves (transformers' rotary order) to pairs (llama.cpp's).

    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """

    def rearrange(values: NDArray[np.float32]) -> NDArray[np.float32]:
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    return rearrange


def _rope_scaling(text: Any, writer: GGUFWriter, folder: Path) -> Iterator[TensorPlan]:
    """Rotary base and scaling into the metadata; the factors that only llama3's scaling needs as a tensor.

    Source: `modeling_rope_utils` in transformers; `llama_context` in llama.cpp for the meaning of attn_factor.
    """
    rope = text.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        if any(rope.get(key) not in (None, value) for key, value in _YARN.items()):
            raise ArtifactError(f"{folder}: RoPE scaling yarn is supported with {_YARN} only, as llama.cpp has it")
        factors = require("transformers.modeling_rope_utils", "train").ROPE_INIT_FUNCTIONS
        _, attention = factors["yarn"](text, "cpu")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(attention / (0.1 * math.log(rope["factor"]) + 1.0))
    elif kind == "llama3":
        factors = require("transformers.modeling_rope_utils", "train").ROPE_INIT_FUNCTIONS
        scaled, _ = factors["llama3"](text, "cpu")
        plain = rope["rope_theta"] ** -(np.arange(0, _head_dim(text), 2, dtype=np.float64) / _head_dim(text))
        values = (plain / scaled.double().numpy()).astype(np.float32)
        yield TensorPlan("rope_freqs.weight", values, values.shape)
    elif kind != "default":
        raise ArtifactError(f"{folder}: RoPE scaling {kind!r} is not supported: only linear, llama3 and yarn are")


def _check(weights: Weights, tensors: list[TensorPlan], ours: Callable[[str], bool], tied: bool) -> None:
    expected = {t.source: t.shape for t in tensors if isinstance(t.source, str)}
    ignored = (*_IGNORED, "lm_head.weight") if tied else _IGNORED
    found = {name: entry.shape for name, entry in weights.entries.items() if ours(name)}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} is unknown" for name in found if name not in expected and not any(part in name for part in ignored)
    ]
    problems += [
        f"{name} is {found[name]}, the configuration says {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ArtifactError(all_problems(problems, f"{weights.folder}: tensors"))


def _tied(source: Source) -> bool:
    """Whether the output is the embedding matrix: as transformers does it, not if both are stored and differ."""
    head, embeddings = "lm_head.weight", "language_model.embed_tokens.weight"
    if not source.config.tie_word_embeddings:
        return False
    stored = source.weights.entries
    if head not in stored or embeddings not in stored:
        return True
    return np.array_equal(source.weights.read(head), source.weights.read(embeddings))


def _head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _kv_heads(text: Any) -> int:
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def _context_length(text: Any) -> int:
    """The trained context; cut to a sliding window, which llama.cpp's `llama` graph does not know."""
    length, window = int(text.max_position_embeddings), getattr(text, "sliding_window", None)
    if window and window < length:
        say(f"note: llama.cpp attends to everything here, so the context is cut to the sliding window, {window} tokens")
        return int(window)
    return length
