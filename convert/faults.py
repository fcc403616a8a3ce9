"""What an export's files say that its source does not: settings first, then tensors, each by name.

Settings must be right in every export, and reading them is cheap. Tensors are read when a gate fails, or where there is
none; one that holds another tensor's values, or its own with the colours or the halves of its heads out of order, is
told so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.convert.exports import Export
from ldrt_edge.convert.mlx_plan import MlxPlan, mlx_plan
from ldrt_edge.convert.plan import FilePlan, mmproj_plan, text_plan
from ldrt_edge.convert.rescale import as_exported
from ldrt_edge.convert.source import Source
from ldrt_edge.errors import require
from ldrt_edge.front_config import read_json
from ldrt_edge.runtimes.llamacpp import gguf_pair

_COMPUTING = ("llama.", "clip.", "tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges")
"""Settings that decide what is computed; of somebody else's file only these are held against the plan."""
_NOT_OTHERS = (
    "clip.has_", "clip.projector_type", "clip.vision.projection_dim", "llama.context_length", "llama.vocab_size",
)  # fmt: skip
_MLX_NOT_COMPUTING = {"model_type", "max_position_embeddings", "layer_types", "sliding_window", "tie_word_embeddings"}
_BITS = {"float32": 32, "float16": 11, "bfloat16": 8}
"""Digits that a float type keeps, in bits: bfloat16 has 8."""
_COLOURS = 3
_TOKENS = "tokenizer.ggml.tokens"
_STEP, _STEP_FED_BACK, _COARSEST = 4.0, 16.0, 0.8
"""Rounding to b bits moves a tensor by about 1.5 * 2^-b of its norm, with outliers more; 2 bits by less than 0.6.
Feedback moves it farther where inputs are few: 4 times at 8 bits in a first layer, 1.4 times at 2. Another tensor is
1.4 of the norm away."""


def setting_differences(source: Source, export: Export) -> Iterator[str]:
    """Settings of an export's files that differ from what its source asks for."""
    if export.runtime == "llamacpp":
        yield from _gguf_settings(source, export)
    elif export.runtime == "mlx":
        yield from _mlx_settings(source, export)


def tensor_differences(source: Source, export: Export) -> Iterator[str]:
    """Tensors of an export's files that are not their source's, as far as their type can tell."""
    source = as_exported(source, export.folder)
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
            if export.own or key != _TOKENS:
                same = _same(planned.value, value)
            else:  # others leave out the rows that only fill up the embedding matrix
                same = isinstance(value, list) and _same(planned.value[: len(value)], value)
            if not same:
                yield f"{path.name}: {key} {_told(planned.value, value)}"


def _gguf_tensors(source: Source, export: Export) -> Iterator[str]:
    from gguf import GGUFReader, dequantize

    for plan, path in zip(_plans(source), gguf_pair(export.folder), strict=True):
        stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        for tensor in plan.tensors:
            if tensor.name not in stored:
                yield f"{path.name}: {tensor.name} is missing"
                continue
            found = stored[tensor.name]
            wanted, shape = plan.values(tensor), tuple(int(n) for n in reversed(found.shape))
            rows = shape[0]
            if shape[1:] != tensor.shape[1:] or rows > tensor.shape[0] or (export.own and rows != tensor.shape[0]):
                yield f"{path.name}: {tensor.name} is {shape}, the model's is {tensor.shape}"
                continue
            values = np.asarray(dequantize(found.data, found.tensor_type), np.float32).reshape(shape)
            fault = _tensor_fault(wanted[:rows], values, _digits(found.tensor_type), export.fed_back)
            if fault:
                yield f"{path.name}: {tensor.name} {fault}{_instead(plan, tensor.name, values)}"
        planned = {tensor.name for tensor in plan.tensors}
        yield from (f"{path.name}: {name} should not be there" for name in stored if export.own and name not in planned)


def _mlx_settings(source: Source, export: Export) -> Iterator[str]:
    require("mlx.core", "mlx")
    require("mlx_lm", "mlx")
    from ldrt_edge.runtimes.mlx_model import Architecture

    try:
        told = Architecture.read(read_json(export.folder / "config.json"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"config.json: {error}"
        return
    right = Architecture.read(mlx_plan(source, "f32").config)
    for part in ("tower", "text"):
        found, planned = (_plain(asdict(getattr(architecture, part))) for architecture in (told, right))
        for key in planned.keys() - _MLX_NOT_COMPUTING:
            if not _same(planned[key], found[key]):
                yield f"config.json: {part} {key} is {_brief(found[key])}, the model's is {_brief(planned[key])}"


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """RoPE scaling in one form: checkpoints say `type` or `rope_type`, and repeat the base in it."""
    scaling = {k.removeprefix("rope_"): v for k, v in (settings.get("rope_scaling") or {}).items() if v is not None}
    scaling.pop("theta", None)
    return settings | {"rope_scaling": scaling} if "rope_scaling" in settings else settings


def _mlx_tensors(source: Source, export: Export) -> Iterator[str]:
    mx = require("mlx.core", "mlx")
    from ldrt_edge.runtimes.mlx_model import scheme_of

    plan = mlx_plan(source, "f32")
    stored: dict[str, Any] = {}
    for path in sorted(export.folder.glob("*.safetensors")):
        stored |= mx.load(str(path))
    config = read_json(export.folder / "config.json")
    for tensor in plan.tensors:
        base = tensor.name.removesuffix("weight")
        array, scales = stored.pop(tensor.name, None), stored.pop(f"{base}scales", None)
        if array is None:
            yield f"{tensor.name} is missing"
            continue
        bits = _BITS[str(array.dtype).removeprefix("mlx.core.")] if scales is None else 0
        if scales is not None:
            scheme = scheme_of(config, base.removesuffix("."))
            array = mx.dequantize(array, scales, stored.pop(f"{base}biases", None), **scheme)
            bits = scheme["bits"]
        values = np.array(array.astype(mx.float32))
        fault = _tensor_fault(plan.values(tensor), values, bits, export.fed_back)
        if fault:
            yield f"{tensor.name} {fault}{_instead(plan, tensor.name, values)}"


def _plans(source: Source) -> tuple[FilePlan, FilePlan]:
    return text_plan(source, "f32"), mmproj_plan(source, "f32")


def _tensor_fault(
    wanted: NDArray[np.float32], found: NDArray[np.float32], bits: float, fed_back: bool
) -> str | None:
    """What is wrong with a tensor, if rounding to so many bits a weight cannot explain it."""
    size = float(np.linalg.norm(wanted))
    distance = float(np.linalg.norm(found - wanted)) / size if size else float(np.abs(found).max(initial=0))
    allowed = 0.0 if bits >= 32 else min(_COARSEST, (_STEP_FED_BACK if fed_back else _STEP) * 2.0**-bits)
    if distance <= allowed:
        return None
    return f"is {distance:.0%} off its source" if math.isfinite(distance) else "holds values that are not numbers"


def _digits(type_: Any) -> float:
    """Bits a weight that carry its value: half precision has 11, bfloat16 8, a block type all it stores."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[type_]
    return {"F16": 11.0, "BF16": 8.0}.get(type_.name, 8 * size / block)


def _told(planned: Any, value: Any) -> str:
    """Two values side by side; of long lists, the first place where they differ."""
    if isinstance(planned, list) and isinstance(value, list) and len(planned) > 4:
        place = next((i for i, (a, b) in enumerate(zip(planned, value, strict=False)) if not _same(a, b)), None)
        if place is not None:
            return f"has {_brief(value[place])} at {place}, the model's has {_brief(planned[place])}"
        return f"has {len(value)} entries, the model's has {len(planned)}"
    return f"is {_brief(value)}, the model's is {_brief(planned)}"


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
