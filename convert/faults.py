"""What an export's files say that its source does not: settings first, then tensors, each by name.

Settings must be right in every export, and reading them is cheap. Tensors are read only when something is wrong; one
that holds another tensor's values, or its own with the colours or the halves of its heads out of order, is told so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.convert.exports import Export
from ldrt_edge.convert.mlx_plan import MlxPlan, mlx_plan
from ldrt_edge.convert.plan import FilePlan, mmproj_plan, text_plan
from ldrt_edge.convert.source import Source
from ldrt_edge.errors import require
from ldrt_edge.front_config import read_json
from ldrt_edge.runtimes.llamacpp import gguf_pair

_COMPUTING = ("llama.", "clip.", "tokenizer.ggml.tokens", "tokenizer.ggml.merges")
"""Settings that decide what is computed; of somebody else's file only these are held against the plan."""
_NOT_OTHERS = ("clip.has_", "clip.projector_type", "clip.vision.projection_dim", "llama.context_length")
_MLX_COMPUTING = {
    "": ("image_token_index", "vision_feature_layer", "vision_feature_select_strategy"),
    "text_config": (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "attention_bias", "mlp_bias", "vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling",
    ),
    "vision_config": (
        "hidden_act", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
        "patch_size", "layer_norm_eps",
    ),
}  # fmt: skip
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_COLOURS = 3
_FAR = 0.5
"""Relative distance at which a rounded tensor cannot be its source any more: 2 bits a weight keep it below."""


def setting_differences(source: Source, export: Export) -> Iterator[str]:
    """Settings of an export's files that differ from what its source asks for."""
    if export.runtime == "llamacpp":
        yield from _gguf_settings(source, export)
    elif export.runtime == "mlx":
        yield from _mlx_settings(source, export)


def tensor_differences(source: Source, export: Export) -> Iterator[str]:
    """Tensors of an export's files that are not their source's, as far as their type can tell."""
    if export.runtime == "llamacpp":
        yield from _gguf_tensors(source, export)
    elif export.runtime == "mlx":
        yield from _mlx_tensors(source, export)


def _gguf_settings(source: Source, export: Export) -> Iterator[str]:
    from gguf import GGUFReader

    for plan, path in zip(_plans(source), gguf_pair(export.folder), strict=True):
        found = GGUFReader(path).fields
        for key, planned in plan.metadata.kv_data[0].items():
            if key.startswith("general."):
                continue
            if not export.own and (key not in found or not key.startswith(_COMPUTING) or key.startswith(_NOT_OTHERS)):
                continue
            value = found[key].contents() if key in found else None
            if not _same(planned.value, value):
                yield f"{path.name}: {key} is {_brief(value)}, the model's is {_brief(planned.value)}"


def _gguf_tensors(source: Source, export: Export) -> Iterator[str]:
    from gguf import GGUFReader, dequantize

    for plan, path in zip(_plans(source), gguf_pair(export.folder), strict=True):
        stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        for tensor in plan.tensors:
            if tensor.name not in stored:
                yield f"{path.name}: {tensor.name} is missing"
                continue
            found = stored[tensor.name]
            values = dequantize(found.data, found.tensor_type).reshape(tensor.shape)
            fault = _tensor_fault(plan.values(tensor), values, found.tensor_type.name)
            if fault:
                yield f"{path.name}: {tensor.name} {fault}{_instead(plan, tensor.name, values)}"
        planned = {tensor.name for tensor in plan.tensors}
        yield from (f"{path.name}: {name} should not be there" for name in stored if export.own and name not in planned)


def _mlx_settings(source: Source, export: Export) -> Iterator[str]:
    found, planned = read_json(export.folder / "config.json"), mlx_plan(source, "f32").config
    depth = source.config.vision_config.num_hidden_layers + 1
    for group, keys in _MLX_COMPUTING.items():
        told, right = (config.get(group) or {} if group else config for config in (found, planned))
        for key in keys:
            value, wanted = told.get(key), right[key]
            if key == "vision_feature_layer" and isinstance(value, int):
                value, wanted = value % depth, wanted % depth
            if not _same(wanted, value) and (export.own or key in told):
                yield f"config.json: {f'{group}.' if group else ''}{key} is {_brief(value)}, the model's is {wanted}"


def _mlx_tensors(source: Source, export: Export) -> Iterator[str]:
    mx = require("mlx.core", "mlx")
    plan = mlx_plan(source, "f32")
    stored: dict[str, Any] = {}
    for path in sorted(export.folder.glob("*.safetensors")):
        stored |= mx.load(str(path))
    settings = read_json(export.folder / "config.json").get("quantization") or {}
    for tensor in plan.tensors:
        base = tensor.name.removesuffix("weight")
        array, scales = stored.get(tensor.name), stored.get(f"{base}scales")
        if array is None:
            yield f"{tensor.name} is missing"
            continue
        type_ = _SAFETENSORS.get(str(array.dtype).removeprefix("mlx.core."), "")
        if scales is not None:
            own = settings.get(base.removesuffix(".")) or settings
            scheme = {key: own[key] for key in ("group_size", "bits", "mode") if key in own}
            array = mx.dequantize(array, scales, stored.get(f"{base}biases"), **scheme)
        values = np.array(array.astype(mx.float32))
        fault = _tensor_fault(plan.values(tensor), values, type_)
        if fault:
            yield f"{tensor.name} {fault}{_instead(plan, tensor.name, values)}"


def _plans(source: Source) -> tuple[FilePlan, FilePlan]:
    return text_plan(source, "f32"), mmproj_plan(source, "f32")


def _tensor_fault(wanted: NDArray[np.float32], found: NDArray[np.float32], type_: str) -> str | None:
    """What is wrong with a tensor, as rounding to `type_` cannot explain it."""
    size = float(np.linalg.norm(wanted))
    distance = float(np.linalg.norm(found - wanted)) / size if size else float(np.abs(found).max(initial=0))
    if distance <= {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 5e-2}.get(type_, _FAR):
        return None
    return f"is {distance:.0%} off its source" if math.isfinite(distance) else "holds values that are not numbers"


def _instead(plan: FilePlan | MlxPlan, name: str, found: NDArray[np.float32]) -> str:
    """Where the values come from, if they are the model's own in a wrong place or order."""
    for other in plan.tensors:
        if math.prod(other.shape) != found.size:
            continue
        values = plan.values(other)  # type: ignore[arg-type]
        if other.name != name:
            if values.shape == found.shape and _close(values, found):
                return f": it holds {other.name}"
        elif found.ndim == 4 and _close(np.flip(values, values.shape.index(_COLOURS)), found):
            return ": its colour channels are reversed (BGR)"
        elif getattr(other, "rearrange", None) and _close(plan.weights.read(str(other.source)), found):
            return ": the halves of its heads are not interleaved"
    return ""


def _close(values: NDArray[np.float32], found: NDArray[np.float32]) -> bool:
    return float(np.linalg.norm(values - found)) < 0.1 * float(np.linalg.norm(values))


def _same(planned: Any, found: Any) -> bool:
    if isinstance(planned, list | tuple):
        return isinstance(found, list | tuple) and len(planned) == len(found) and all(map(_same, planned, found))
    if isinstance(planned, float) and isinstance(found, float | int):
        return math.isclose(planned, found, rel_tol=1e-6)
    return bool((planned.decode("utf-8", "replace") if isinstance(planned, bytes) else planned) == found)


def _brief(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
