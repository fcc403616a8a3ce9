"""What an MLX folder of a LLaVA model holds: its config.json, and every tensor with its source, type and quantisation.

The network that will load the folder is asked which parameters it wants, so no list of names stands here. Behind the
feature layer, tensors that only other programs ask for are carried along. A plan is made before anything is written;
`mlx.py` writes it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.convert.fallbacks import Fallback, Quantized
from ldrt_edge.convert.source import (
    EMBEDDINGS,
    HEAD,
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
from ldrt_edge.convert.weights import Weights, canonical
from ldrt_edge.errors import require
from ldrt_edge.front_config import read_json

_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
LANGUAGE = "language_model."
_LEFT_OUT = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config", "image_token_id")
_SMALL_GROUP = 32


@dataclass(frozen=True)
class Quantization:
    """How MLX packs a matrix: `bits` a weight, with a scale for each group of a row's weights (affine: and a bias)."""

    group_size: int
    bits: int
    mode: str = "affine"

    @property
    def label(self) -> str:
        """Its name in plans, log and manifest: "affine-4-g64", "mxfp4"."""
        return f"affine-{self.bits}-g{self.group_size}" if self.mode == "affine" else self.mode

    def nbytes(self, weights: int, half_bytes: int) -> int:
        """Bytes of so many weights with their scales."""
        group = 2 * half_bytes if self.mode == "affine" else 1
        return weights * self.bits // 8 + weights // self.group_size * group


SCHEMES = {
    "q4": Quantization(64, 4), "q8": Quantization(64, 8), "mixed_4_6": Quantization(64, 4),
    "mixed_3_6": Quantization(64, 3), "mixed_3_4": Quantization(64, 3), "mxfp4": Quantization(32, 4, "mxfp4"),
    "nvfp4": Quantization(16, 4, "nvfp4"),
}  # fmt: skip
"""Quantised types: what most layers have; `mixed_…` gives some of them more bits, as mlx-lm's recipe of that name."""
GROUP_SIZES = (32, 64, 128)
AFFINE = {
    scheme.label: scheme for bits in (2, 3, 4, 5, 6, 8) for size in GROUP_SIZES for scheme in [Quantization(size, bits)]
}
"""What a plan can give a matrix, by name. Source: `mx.quantize`, mode "affine"."""


@dataclass(frozen=True)
class MlxTensor:
    """One tensor of the checkpoint, and the one or, if quantised, two or three that MLX's folder has for it.

    source, shape: in the checkpoint. type: f32, f16 or bf16; of the scales too.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: str
    quantization: Quantization | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        """Names in the file: the weight's and, if it is packed, those of its scales and biases."""
        if self.quantization is None:
            return (self.name,)
        parts = ("weight", "scales", "biases") if self.quantization.mode == "affine" else ("weight", "scales")
        return tuple(self.name.removesuffix("weight") + part for part in parts)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        count = math.prod(self.shape)
        if self.quantization is None:
            return count * _BYTES[self.type]
        return self.quantization.nbytes(count, _BYTES[self.type])


@dataclass(frozen=True)
class MlxPlan:
    """An MLX folder: what config.json says, and the tensors in the order of the files.

    matrices: names of the tensors that MLX can pack; the table of positions, and layers that our network has not, stay.
    """

    config: Mapping[str, Any]
    tensors: tuple[MlxTensor, ...]
    matrices: frozenset[str]
    weights: Weights
    fallbacks: tuple[Fallback, ...] = ()

    def packed(self, schemes: Mapping[str, Quantization]) -> MlxPlan:
        """The same folder with some of its matrices packed, by tensor name."""
        tensors = tuple(replace(tensor, quantization=schemes.get(tensor.name)) for tensor in self.tensors)
        return replace(self, config={**self.config, **_quantization(schemes)}, tensors=tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def values(self, tensor: MlxTensor) -> NDArray[np.float32]:
        """A tensor's values in MLX's order: a convolution with its channels last."""
        values = self.weights.read(tensor.source)
        return values if values.ndim < 4 else np.ascontiguousarray(values.transpose(0, 2, 3, 1))

    def arrays(self, tensor: MlxTensor) -> dict[str, Any]:
        """A tensor as the folder stores it, by name: mlx arrays, computed.

        Raises:
            ArtifactError: a value is beyond the range of half precision, or not a number.
        """
        mx = require("mlx.core", "mlx")
        array = self._typed(tensor, mx)
        packed = mx.quantize(array, **asdict(tensor.quantization)) if tensor.quantization else [array]
        arrays = dict(zip(tensor.stored, packed, strict=True))
        mx.eval(arrays)
        return arrays

    def _typed(self, tensor: MlxTensor, mx: Any) -> Any:
        """A function of its own, so that the float32 values are gone before anything is quantised."""
        values = self.values(tensor)
        check_values(values, tensor.source, self.weights.folder, half=tensor.type == "f16")
        return mx.array(values).astype(getattr(mx, _DTYPES[tensor.type]))

    def holds(self) -> Quantized:
        """What the language model comes to."""
        language = [tensor for tensor in self.tensors if tensor.name.startswith(LANGUAGE)]
        stored = sum(tensor.nbytes for tensor in language)
        return Quantized(
            bytes=stored,
            bits_per_weight=round(8 * stored / sum(math.prod(tensor.shape) for tensor in language), 3),
            types=dict(Counter(_label(tensor) for tensor in language).most_common()),
            fallbacks=self.fallbacks,
        )


def mlx_plan(source: Source, type_: str, group_size: int | None = None) -> MlxPlan:
    """The folder for `type_`: f32, f16 or bf16, or one of `SCHEMES`, whose affine ones `group_size` changes.

    Only the language model's matrices are quantised. All else is f16, or f32 where that is the type; bf16 has the
    vision tower in f16, which holds more digits in as many bytes.

    Raises:
        ArtifactError: tensors are missing, unknown or of another shape.
    """
    require("mlx.core", "mlx")
    require("mlx_lm", "mlx")
    from mlx.utils import tree_flatten

    from ldrt_edge.runtimes.mlx_model import Architecture, Network

    tied = is_tied(source)
    config = _config(source, tied and source.config.model_type == "llava")  # mlx-vlm's LLaVA-NeXT wants a head
    network = Network(Architecture.read(config))
    wanted = {name: tuple(parameter.shape) for name, parameter in tree_flatten(network.parameters())}
    sources, carried = {name: _source(name, tied) for name in wanted}, _carried(source)
    shapes = {sources[name]: _channels_second(shape) for name, shape in wanted.items()}
    check_tensors(source.weights, shapes, lambda name: name not in carried.values(), tied)
    tensors = tuple(
        MlxTensor(name, key, source.weights.entries[key].shape, _type(name, type_))
        for name, key in (sources | carried).items()
    )
    plan = MlxPlan(config, tensors, _matrices(network), source.weights)
    return _preset(plan, _wishes(network, type_, _scheme(type_, group_size))) if type_ in SCHEMES else plan


def _matrices(network: Any) -> frozenset[str]:
    paths = [path for path, module in network.named_modules() if hasattr(module, "to_quantized")]
    return frozenset(f"{path}.weight" for path in paths if not path.endswith("position_embedding"))


def _preset(plan: MlxPlan, wishes: Mapping[str, Quantization]) -> MlxPlan:
    """The folder with each matrix packed as it should be, or as comes nearest."""
    schemes, fallbacks = {}, []
    for tensor in plan.tensors:
        if wish := wishes.get(tensor.name):
            row, got = tensor.shape[-1], _fitting(wish, tensor.shape[-1])
            if got:
                schemes[tensor.name] = got
            if got != wish:
                label = got.label if got else tensor.type
                fallbacks.append(Fallback(tensor.name, row, wish.group_size, wish.label, label))
    return replace(plan.packed(schemes), fallbacks=tuple(fallbacks))


def _wishes(network: Any, type_: str, scheme: Quantization) -> dict[str, Quantization]:
    """The quantisation that each matrix of the language model should have, by tensor name."""
    language = network.language_model
    paths = [path for path, module in language.named_modules() if hasattr(module, "to_quantized")]
    wishes = dict.fromkeys(paths, scheme)
    if type_.startswith("mixed"):
        from mlx_lm.convert import mixed_quant_predicate_builder

        recipe = mixed_quant_predicate_builder(type_, language, scheme.group_size)
        wishes = {path: Quantization(**recipe(path, None)) for path in paths}
        if language.args.tie_word_embeddings:  # then the embedding matrix is the head, and gets the head's bits
            wishes["model.embed_tokens"] = Quantization(**recipe("lm_head", None))
    return {f"{LANGUAGE}{path}.weight": wish for path, wish in wishes.items()}


def _source(name: str, tied: bool) -> str:
    """The checkpoint's tensor for one of the network's; a tied head is the embedding matrix."""
    return EMBEDDINGS if tied and name == f"{LANGUAGE}{HEAD}" else canonical(name)


def _scheme(type_: str, group_size: int | None) -> Quantization:
    scheme = SCHEMES[type_]
    return Quantization(group_size or scheme.group_size, scheme.bits, scheme.mode)


def _fitting(wanted: Quantization, row: int) -> Quantization | None:
    """What comes nearest to the wanted quantisation and divides a row; None where nothing does."""
    if row % wanted.group_size == 0:
        return wanted
    if wanted.mode == "affine" and row % _SMALL_GROUP == 0:
        return Quantization(_SMALL_GROUP, wanted.bits)
    return None


def _type(name: str, type_: str) -> str:
    if type_ == "f32" or (type_ == "bf16" and name.startswith(LANGUAGE)):
        return type_
    return "f16"


def _label(tensor: MlxTensor) -> str:
    return tensor.quantization.label if tensor.quantization else tensor.type


def _channels_second(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A convolution's shape as checkpoints have it."""
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape


def _carried(source: Source) -> dict[str, str]:
    """Tower tensors behind the feature layer, by MLX name: unused here, wanted by mlx-vlm."""
    vision, first = source.config.vision_config, feature_layers(source.config)
    later = tuple(f"vision_tower.encoder.layers.{i}." for i in range(first, vision.num_hidden_layers))
    found = [name for name in source.weights.entries if name.startswith((*later, "vision_tower.post_layernorm."))]
    return {name.replace("vision_tower.", "vision_tower.vision_model.", 1): name for name in found}


def _config(source: Source, tied: bool) -> dict[str, Any]:
    """The checkpoint's settings in the form of its older checkpoints, which mlx-vlm reads: nothing left to defaults."""
    whole, text, vision = source.config, source.config.text_config, source.config.vision_config
    given = {key: value for key, value in read_json(source.folder / "config.json").items() if key not in _LEFT_OUT}
    return given | {
        "image_token_index": source.front.config.image_token_id,
        "vision_feature_layer": whole.vision_feature_layer,
        "vision_feature_select_strategy": whole.vision_feature_select_strategy,
        "projector_hidden_act": whole.projector_hidden_act,
        "multimodal_projector_bias": True,
        "vocab_size": text.vocab_size,
        "eos_token_id": list(source.front.config.stop_ids),
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "llama",  # Mistral's arithmetic is the same, and mlx-vlm's LLaVA-1.5 knows no other name
            "hidden_act": text.hidden_act,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": kv_heads(text),
            "head_dim": head_dim(text),
            "attention_bias": bool(getattr(text, "attention_bias", False)),
            "mlp_bias": bool(getattr(text, "mlp_bias", False)),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": context_length(text),
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_parameters["rope_theta"],
            "rope_scaling": _rope_scaling(text),
            "rope_traditional": False,
            "tie_word_embeddings": tied,
        },
        "vision_config": {
            "model_type": vision.model_type,
            "hidden_act": vision.hidden_act,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "projection_dim": vision.projection_dim,
            "layer_norm_eps": vision.layer_norm_eps,
        },
    }


def _rope_scaling(text: Any) -> dict[str, Any] | None:
    """RoPE scaling in the older form. mlx-lm knows YaRN's attention factor only as the `mscale` that gives it."""
    rope = dict(text.rope_parameters)
    kind = rope.pop("rope_type", "default")
    if kind == "default":
        return None
    scaling = {"type": kind} | {key: value for key, value in rope.items() if key != "rope_theta" and value is not None}
    if kind == "yarn":
        for key in ("mscale", "mscale_all_dim"):
            scaling.pop(key, None)
        scaling["mscale"] = (yarn_attention_factor(text) - 1) / (0.1 * math.log(rope["factor"]))
    return scaling


def _quantization(schemes: Mapping[str, Quantization]) -> dict[str, Any]:
    """The settings that mlx-lm and mlx-vlm read: the commonest for all, and layers that have their own."""
    if not schemes:
        return {}
    [(commonest, _)] = Counter(schemes.values()).most_common(1)
    settings: dict[str, Any] = asdict(commonest)
    for name, own in schemes.items():
        if own != commonest:
            settings[name.removesuffix(".weight")] = asdict(own)
    return {"quantization": settings, "quantization_config": settings}
