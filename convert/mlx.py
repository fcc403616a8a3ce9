"""`ldrt-edge convert --to mlx` and `ldrt-edge quantize --to mlx`: a merged LLaVA folder to one that MLX loads.

Tensors stream from the checkpoint through MLX's own quantiser into files of at most a gigabyte, one file in memory at a
time. The folder is read by our runtime and by mlx-vlm, whose processor files it carries. It is held against the merged
model's logits before it gets its final name. `Mlx` is what this format brings to plans.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ldrt_edge import artifact, console
from ldrt_edge.convert.calibration import Calibration
from ldrt_edge.convert.fallbacks import Quantized, report
from ldrt_edge.convert.gguf import check_choice, check_room, finish, identity
from ldrt_edge.convert.mlx_plan import AFFINE, GROUP_SIZES, LANGUAGE, SCHEMES, MlxPlan, MlxTensor, mlx_plan
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.rounding import round_half, round_mlx
from ldrt_edge.convert.source import Source, open_source
from ldrt_edge.convert.type_plan import PLAN_TYPES, FormatName, PlannedMatrix, TypePlan, assign
from ldrt_edge.errors import ConfigError, require
from ldrt_edge.runtimes.base import FloatArray
from ldrt_edge.train.base import INDEX

TYPES = ("f32", "f16", "bf16")
SHARD_BYTES = 1_000_000_000
_FOR_OTHERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "processor_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


def convert(merged: Path, out: Path, type_: str = "f16") -> Path:
    """Convert a merged or base folder; returns `out`, an artefact of kind "mlx".

    type_: `f32`, `f16` or `bf16`; vision tower and projector are f32 for f32 and f16 otherwise.

    Raises:
        ConfigError: an unknown type.
        ArtifactError: the folder cannot become MLX, or what was written does not compute what the folder does.
    """
    if type_ in SCHEMES:
        raise ConfigError(f"--type {type_} is quantised: use ldrt-edge quantize --to mlx --type {type_}")
    check_choice("--type", type_, TYPES)
    return _export(merged, out, type_, None)


def quantize(merged: Path, out: Path, type_: str = "q4", group_size: int | None = None) -> Path:
    """Quantise the language model of a merged or base folder; returns `out`, an artefact of kind "mlx".

    type_: one of `SCHEMES`. group_size: weights that share a scale, one of `GROUP_SIZES`; None takes 64, and the
    floating-point types have their own.

    Raises:
        ConfigError: an unknown type or group size, or one that the type does not take.
        ArtifactError: the folder cannot become MLX, or the disk is too small.
    """
    return _export(merged, out, type_, _group_size(type_, group_size))


@dataclass(frozen=True)
class Mlx:
    """MLX as a format that plans are made for: see `ldrt_edge.convert.format.Format`. It rounds without importance."""

    calibration: Calibration | None = None
    name: ClassVar[FormatName] = "mlx"
    probes: ClassVar[tuple[str, ...]] = ("affine-4-g64", "affine-4-g32", "affine-8-g64", "affine-8-g32")
    files: ClassVar[str] = "*.safetensors"

    def config(self) -> dict[str, str]:
        """What weights are fitted by."""
        return self.calibration.config() if self.calibration else {}

    def inputs(self) -> list[artifact.Input]:
        """What weights are fitted to."""
        return self.calibration.inputs() if self.calibration else []

    def pictures(self) -> dict[Path, frozenset[str] | None]:
        """Those that weights are fitted to."""
        return self.calibration.pictures() if self.calibration else {}

    def matrices(self, source: Source) -> dict[str, list[PlannedMatrix]]:
        """The matrices that MLX packs, of the language model, and of tower and projector."""
        return _matrices(mlx_plan(source, "f16"))

    def fixed_bytes(self, source: Source) -> int:
        """Bytes of norms, biases and what else stays in half precision."""
        plan = mlx_plan(source, "f16")
        return sum(tensor.nbytes for tensor in plan.tensors if tensor.name not in plan.matrices)

    def types(self, part: str, name: str) -> tuple[str, ...]:
        """All of the part's."""
        return PLAN_TYPES["mlx"][part]

    def rounded(self, name: str, rows: FloatArray, type_: str, columns: slice = slice(None)) -> FloatArray:
        """Rows as MLX's quantiser rounds them."""
        values = rows[:, columns]
        return round_half(values) if type_ == "f16" else round_mlx(values, AFFINE[type_])

    def fitted_by(self, calibration: Calibration | None) -> Mlx:
        """The same with another calibration."""
        return replace(self, calibration=calibration)

    def rescaled(self, columns: Mapping[str, FloatArray]) -> Mlx:
        """The same."""
        return self

    def preset(self, source: Source, type_: str, group_size: int | None = None) -> TypePlan:
        """The plan of one of `SCHEMES`.

        Raises:
            ConfigError: an unknown type or group size, or a type without bits and groups of its own choice.
        """
        planned = mlx_plan(source, type_, _group_size(type_, group_size))
        types = {t.name: t.quantization.label if t.quantization else "f16" for t in planned.tensors}
        if unknown := set(types.values()) - {*AFFINE, "f16"}:
            raise ConfigError(f"--type {type_}: plans have no {', '.join(sorted(unknown))}: take q4, q8 or mixed_4_6")
        model = {matrix.name: types[matrix.name] for matrix in _matrices(planned)["model"]}
        return TypePlan("mlx", {"model": model, "vision": {"*": "f16"}})

    def write(self, source: Source, plan: TypePlan, folder: Path, work: Path) -> Quantized:
        """Write a folder; MLX packs in memory, so that `work` keeps only what a calibration needs."""
        whole = mlx_plan(source, "f16")
        matrices = _matrices(whole)
        types = assign(plan, matrices)
        if self.calibration:
            fitted = self.calibration.fitted(source, self, matrices["model"], types, work, folder)
            whole = replace(whole, weights=fitted.exported(matrices["model"], types).weights)
        planned = whole.packed({name: AFFINE[type_] for name, type_ in types.items() if type_ in AFFINE})
        check_room(folder, planned.nbytes)
        write(source, planned, folder)
        return planned.holds()


def write(source: Source, plan: MlxPlan, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a planned folder: settings, weights in files of at most `shard_bytes` (or one tensor), and the front end.

    Tokenizer, processor and template go along as mlx-vlm reads them; our own front end needs none of it.
    """
    text = json.dumps(plan.config, indent=1, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    for name in _FOR_OTHERS:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    _write_weights(plan, folder, shard_bytes)
    finish(source, folder)


def _group_size(type_: str, group_size: int | None) -> int:
    """That of a quantised type."""
    if type_ in TYPES:
        raise ConfigError(f"--type {type_} is not quantised: use ldrt-edge convert --to mlx --type {type_}")
    check_choice("--type", type_, tuple(SCHEMES))
    scheme = SCHEMES[type_]
    if group_size is not None and (scheme.mode != "affine" or group_size not in GROUP_SIZES):
        choices = GROUP_SIZES if scheme.mode == "affine" else (scheme.group_size,)
        raise ConfigError(f"--group-size {group_size}: {type_} has groups of {' or '.join(map(str, choices))}")
    return group_size or scheme.group_size


def _export(merged: Path, out: Path, type_: str, group_size: int | None) -> Path:
    config = {"to": "mlx", "type": type_, "group_size": group_size}
    with artifact.create(out, "mlx", config, [identity(merged)], resumable=True) as draft:
        if not draft.complete:
            source = open_source(merged)
            plan = mlx_plan(source, type_, group_size)
            check_room(draft.path, plan.nbytes)
            write(source, plan, draft.path)
            if type_ in SCHEMES:
                report(plan.holds(), type_)
                draft.metrics["quantized"] = asdict(plan.holds())
            draft.metrics["fidelity"] = asdict(check(merged, draft.path))
    return out


def _matrices(plan: MlxPlan) -> dict[str, list[PlannedMatrix]]:
    parts: dict[str, list[PlannedMatrix]] = {part: [] for part in PLAN_TYPES["mlx"]}
    for tensor in plan.tensors:
        if tensor.name in plan.matrices:
            part = "model" if tensor.name.startswith(LANGUAGE) else "vision"
            parts[part].append(PlannedMatrix(tensor.name, tensor.source, tensor.shape))
    return parts


def _write_weights(plan: MlxPlan, folder: Path, shard_bytes: int) -> None:
    """Write the files that a killed run has not; each appears when whole."""
    mx = require("mlx.core", "mlx")
    shards = list(_shards(plan.tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    with console.bar("MLX", plan.nbytes / 1e6) as bar:
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys([stored for tensor in shard for stored in tensor.stored], name)
            if (folder / name).exists():
                bar.advance(sum(tensor.nbytes for tensor in shard) / 1e6, "(MB)")
                continue
            arrays: dict[str, Any] = {}
            for tensor in shard:
                arrays |= plan.arrays(tensor)
                bar.advance(tensor.nbytes / 1e6, "(MB)")
            part = folder / f".{name}"
            mx.save_safetensors(str(part), arrays, metadata={"format": "mlx"})
            part.rename(folder / name)
            del arrays
            mx.clear_cache()
    if len(shards) > 1:
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _shards(tensors: Sequence[MlxTensor], limit: int) -> Iterator[list[MlxTensor]]:
    shard: list[MlxTensor] = []
    for tensor in tensors:
        if shard and sum(held.nbytes for held in shard) + tensor.nbytes > limit:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard
