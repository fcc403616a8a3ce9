"""What a GGUF pair of a LLaVA model holds: its metadata, and every tensor with its source, shape and type.

A plan is made before anything is written, so that unknown, missing and misshapen tensors are all reported at once; the
same plan is written to disk by `gguf.py` and held against a finished file by `parity.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, quantize
from numpy.typing import NDArray

from ldrt_edge.convert.source import (
    NAMES,
    Source,
    check_tensors,
    check_values,
    context_length,
    feature_layers,
    head_dim,
    is_tied,
    kv_heads,
    yarn_attention_factor,
)
from ldrt_edge.convert.vocabulary import read_vocabulary
from ldrt_edge.convert.weights import Weights
from ldrt_edge.errors import require

TextType = Literal["f32", "f16", "bf16"]
MmprojType = Literal["f32", "f16", "q8_0"]

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip
_BLOCK_WEIGHTS = 1 << 22
_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00}
"""Exponent bits; all of them are set in what is not a number or infinite."""
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
    rearrange: Callable[[NDArray[Any]], NDArray[Any]] | None = None

    def arranged(self, values: NDArray[Any]) -> NDArray[Any]:
        """The checkpoint's values in llama.cpp's order."""
        return np.ascontiguousarray(values if self.rearrange is None else self.rearrange(values))

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
        return tensor.arranged(self.weights.read(tensor.source)) if isinstance(tensor.source, str) else tensor.source

    def blocks(self, tensor: TensorPlan) -> Iterator[NDArray[Any]]:
        """A tensor as the file stores it, in blocks of whole rows: the memory it takes does not grow with the tensor.

        What the checkpoint holds in the wanted type is copied bit by bit.

        Raises:
            ArtifactError: a value is beyond the range of half precision, or not a number.
        """
        if not isinstance(tensor.source, str):
            yield self._encode(tensor, tensor.source)
            return
        stored = self.weights.entries[tensor.source].dtype
        exponent = _EXPONENTS.get(stored) if stored == tensor.type.name else None
        count = tensor.shape[0]
        step = max(1, _BLOCK_WEIGHTS * count // math.prod(tensor.shape)) if tensor.rearrange is None else count
        for start in range(0, count, step):
            rows = slice(start, start + step)
            if exponent is not None:
                bits = tensor.arranged(self.weights.bits(tensor.source, rows))
                if not ((bits & exponent) == exponent).any():
                    yield bits
                    continue
            yield self._encode(tensor, tensor.arranged(self.weights.read(tensor.source, rows)))

    def _encode(self, tensor: TensorPlan, values: NDArray[np.float32]) -> NDArray[Any]:
        name = tensor.source if isinstance(tensor.source, str) else tensor.name
        check_values(values, name, self.weights.folder, half=tensor.type == GGMLQuantizationType.F16)
        return np.asarray(quantize(values, tensor.type))


def text_plan(source: Source, type_: TextType) -> FilePlan:
    """The language model as GGUF's `llama` architecture.

    Raises:
        ArtifactError: tensors are missing, unknown or of another shape; or the RoPE scaling or tokenizer is another.
    """
    text, weights = source.config.text_config, source.weights
    writer = GGUFWriter(None, "llama")
    writer.add_type("model")
    writer.add_name(NAMES[source.config.model_type])
    writer.add_file_type(_FILE_TYPES[type_])
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(context_length(text))
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(kv_heads(text))
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(head_dim(text))
    tied = is_tied(source)
    tensors = [*_text_tensors(text, type_, tied), *_rope_scaling(text, writer)]
    check_tensors(weights, _shapes(tensors), lambda name: name.startswith(("language_model.", "lm_head.")), tied)
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
    writer.add_name(NAMES[source.config.model_type])
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
    others = ("language_model.", "lm_head.", *later)
    check_tensors(source.weights, _shapes(tensors), lambda name: not name.startswith(others), False)
    return FilePlan(writer, tuple(tensors), source.weights)


def _text_tensors(text: Any, type_: str, tied: bool) -> Iterator[TensorPlan]:
    width, hidden, heads, key_heads = text.hidden_size, text.intermediate_size, text.num_attention_heads, kv_heads(text)
    queries, keys = heads * head_dim(text), key_heads * head_dim(text)
    linears = [
        ("self_attn.q_proj", "attn_q", (queries, width), heads),
        ("self_attn.k_proj", "attn_k", (keys, width), key_heads),
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


def _interleave(heads: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Rows of each head from halves (transformers' rotary order) to pairs (llama.cpp's).

    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """

    def rearrange(values: NDArray[Any]) -> NDArray[Any]:
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    return rearrange


def _rope_scaling(text: Any, writer: GGUFWriter) -> Iterator[TensorPlan]:
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
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(yarn_attention_factor(text) / (0.1 * math.log(rope["factor"]) + 1.0))
    elif kind == "llama3":
        factors = require("transformers.modeling_rope_utils", "train").ROPE_INIT_FUNCTIONS
        scaled, _ = factors["llama3"](text, "cpu")
        plain = rope["rope_theta"] ** -(np.arange(0, head_dim(text), 2, dtype=np.float64) / head_dim(text))
        values = (plain / scaled.double().numpy()).astype(np.float32)
        yield TensorPlan("rope_freqs.weight", values, values.shape)


def _shapes(tensors: list[TensorPlan]) -> dict[str, tuple[int, ...]]:
    """What the checkpoint must hold, by its names."""
    return {tensor.source: tensor.shape for tensor in tensors if isinstance(tensor.source, str)}
