"""The plan file: which type each weight matrix of an export gets, as YAML that a person can read, edit and pass back.

    format: ldrt-edge/plan/1
    to: gguf                          # the default
    model:
      blk.0.attn_q.weight: Q4_K
      blk.*.ffn_down: Q6_K            # shell patterns are allowed; the first line that matches counts
      "*": Q5_K
    mmproj:
      "*": Q8_0
    expected: {kld: 0.012, bytes: 1234567}     # what the allocation foresaw; not read back

For MLX the parts are `model` and `vision`, and a type says bits a weight and weights to a scale:

    to: mlx
    model:
      language_model.model.layers.*.mlp.down_proj: affine-5-g64
      "*": affine-4-g64
    vision:
      multi_modal_projector.*: affine-8-g64
      "*": f16
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ldrt_edge import artifact
from ldrt_edge.convert.mlx_plan import AFFINE
from ldrt_edge.errors import ConfigError, all_problems

FormatName = Literal["gguf", "mlx"]
PLAN_TYPES: dict[FormatName, dict[str, tuple[str, ...]]] = {
    "gguf": {
        "model": (
            "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1",
            "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "F16",
        ),
        "mmproj": ("Q6_K", "Q8_0", "F16"),
    },
    "mlx": {
        "model": (*AFFINE, "f16"),
        "vision": (*(name for name, scheme in AFFINE.items() if scheme.bits >= 6), "f16"),
    },
}  # fmt: skip
"""The types that each part of an export can have. In the vision tower, fewer bits move the image embeddings further
than an export's check allows."""
_SCHEMA = "ldrt-edge/plan/1"
_LIMIT_BYTES = 4 << 20


@dataclass(frozen=True)
class TypePlan:
    """Types by tensor name or shell pattern, for each part of an export; `expected` is for the reader."""

    to: FormatName
    parts: Mapping[str, Mapping[str, str]]
    expected: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedMatrix:
    """A weight matrix that a plan gives a type: its names in the export and in the checkpoint, (rows, row length)."""

    name: str
    source: str
    shape: tuple[int, ...]


class _Once(yaml.SafeLoader):
    """Refuses a key that stands twice, of which only the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
        if twice := [f"'{key}' stands {count} times" for key, count in keys.items() if count > 1]:
            raise ValueError(f"{', '.join(twice)}: of each key keep one line")
        return super().construct_mapping(node, deep)


def read_type_plan(path: Path, to: FormatName) -> TypePlan:
    """Read a plan file for one format.

    Raises:
        ConfigError: not a plan, or one for the other format, or parts or types that are wrong; all of them at once.
    """
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise ConfigError(f"--plan {path}: larger than {_LIMIT_BYTES >> 20} MiB, refused")
        data = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--plan {path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict) or data.get("format") != _SCHEMA:
        raise ConfigError(f"--plan {path}: not a plan: its first line should be 'format: {_SCHEMA}'")
    if (told := data.get("to", "gguf")) != to:
        raise ConfigError(f"--plan {path}: a plan for {told}, and this is --to {to}")
    parts: dict[str, dict[str, str]] = {}
    known_keys = ("format", "to", "expected", *PLAN_TYPES[to])
    problems = [f"'{key}' is no part of a plan for {to}" for key in data if key not in known_keys]
    for part, types in PLAN_TYPES[to].items():
        given = data.get(part)
        if not isinstance(given, dict) or not given:
            problems.append(f"wants a list of types under '{part}'")
            continue
        known = {type_.lower(): type_ for type_ in types}
        parts[part] = {str(name): known.get(_lower(value), "") for name, value in given.items()}
        problems += [
            f"{name}: {value if isinstance(value, str) else type(value).__name__} is none of {', '.join(types)}"
            for name, value in given.items() if _lower(value) not in known
        ]  # fmt: skip
    if problems:
        raise ConfigError(all_problems(problems, f"--plan {path}"))
    return TypePlan(to, parts)


def _lower(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""


def write_type_plan(plan: TypePlan, path: Path) -> None:
    """Write a plan file; it appears when whole, and never in the place of one that somebody may have edited.

    Raises:
        ConfigError: there is a file of that name already.
        ArtifactError: the disk is full, or nothing may be written there.
    """
    refuse_existing(path)
    parts = {part: dict(types) for part, types in plan.parts.items()}
    data = {"format": _SCHEMA, "to": plan.to, **parts, "expected": dict(plan.expected)}
    part = path.with_name(f".{path.name}.part")
    try:
        with artifact.writing(path):
            part.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
            part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Refuse to write over a plan or where nothing can be written, before minutes are spent on one.

    Raises:
        ConfigError: there is a file of that name, or no folder for it that may be written to.
    """
    if path.exists():
        raise ConfigError(f"--out {path}: there is such a file already, perhaps edited: choose another name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: no such folder: {path.parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"--out {path}: nothing may be written into {path.parent}")


def assign(plan: TypePlan, matrices: Mapping[str, Sequence[PlannedMatrix]]) -> dict[str, str]:
    """The type of every matrix, by name: that of the first pattern in its part that fits its name.

    A name may be written with or without its `.weight`.

    Raises:
        ConfigError: a matrix has none or one that its rows do not divide into, or a pattern fits nothing.
    """
    found: dict[str, str] = {}
    problems: list[str] = []
    for part, members in matrices.items():
        types = plan.parts[part]
        used = set()
        for matrix in members:
            pattern = next((pattern for pattern in types if _names(pattern, matrix)), None)
            if pattern is None:
                problems.append(f"{matrix.name} has no type")
                continue
            used.add(pattern)
            found[matrix.name] = types[pattern]
            if not fits(types[pattern], matrix.shape[-1]):
                problems.append(f"{matrix.name}: its rows of {matrix.shape[-1]} do not divide into {types[pattern]}")
        problems += [f"{pattern} fits no matrix of '{part}'" for pattern in types if pattern not in used]
    if problems:
        raise ConfigError(all_problems(problems, "plan"))
    return found


def fits(type_: str, row_length: int) -> bool:
    """Whether rows of that length divide into whole blocks of a type."""
    return row_length % block_weights(type_) == 0


def block_weights(type_: str) -> int:
    """How many weights of a row a type packs at once."""
    return _block(type_)[0]


def nbytes(type_: str, weights: int) -> int:
    """Bytes of so many weights."""
    block, size = _block(type_)
    return weights // block * size


def _block(type_: str) -> tuple[int, int]:
    """Weights and bytes of what a type packs at once."""
    if scheme := AFFINE.get(type_):
        return scheme.group_size, scheme.nbytes(scheme.group_size, half_bytes=2)
    return GGML_QUANT_SIZES[GGMLQuantizationType[type_.upper()]]


def _names(pattern: str, matrix: PlannedMatrix) -> bool:
    return fnmatchcase(matrix.name, pattern) or fnmatchcase(matrix.name.removesuffix(".weight"), pattern)
