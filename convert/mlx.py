"""`ldrt-edge convert --to mlx` and `ldrt-edge quantize --to mlx`: a merged LLaVA folder to one that MLX loads.

Tensors stream from the checkpoint through MLX's own quantiser into files of at most a gigabyte, one file in memory at a
time. The folder is read by our runtime and by mlx-vlm, whose processor files it carries. It is held against the merged
model's logits before it gets its final name.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldrt_edge import artifact, console
from ldrt_edge.convert.fallbacks import report
from ldrt_edge.convert.gguf import check_choice, check_room, finish, identity
from ldrt_edge.convert.mlx_plan import SCHEMES, MlxPlan, MlxTensor, mlx_plan
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.source import Source, open_source
from ldrt_edge.errors import ConfigError, require
from ldrt_edge.train.base import INDEX

TYPES = ("f32", "f16", "bf16")
GROUP_SIZES = (32, 64, 128)
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
    if type_ in TYPES:
        raise ConfigError(f"--type {type_} is not quantised: use ldrt-edge convert --to mlx --type {type_}")
    check_choice("--type", type_, tuple(SCHEMES))
    scheme = SCHEMES[type_]
    if group_size is not None and (scheme.mode != "affine" or group_size not in GROUP_SIZES):
        choices = GROUP_SIZES if scheme.mode == "affine" else (scheme.group_size,)
        raise ConfigError(f"--group-size {group_size}: {type_} has groups of {' or '.join(map(str, choices))}")
    return _export(merged, out, type_, group_size or scheme.group_size)


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


def _export(merged: Path, out: Path, type_: str, group_size: int | None) -> Path:
    config = {"to": "mlx", "type": type_, "group_size": group_size}
    with artifact.create(out, "mlx", config, [identity(merged)]) as draft:
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


def _write_weights(plan: MlxPlan, folder: Path, shard_bytes: int) -> None:
    mx = require("mlx.core", "mlx")
    shards = list(_shards(plan.tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    with console.bar("MLX", plan.nbytes / 1e6) as bar:
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            arrays: dict[str, Any] = {}
            for tensor in shard:
                arrays |= plan.arrays(tensor)
                bar.advance(tensor.nbytes / 1e6, "(MB)")
            try:
                mx.save_safetensors(str(folder / name), arrays, metadata={"format": "mlx"})
            except RuntimeError as error:  # all that MLX says of a failed write
                raise OSError(errno.ENOSPC, "disk full", str(folder / name)) from error
            weight_map |= dict.fromkeys(arrays, name)
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
