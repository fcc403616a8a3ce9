"""The plan file: which type each weight matrix of a GGUF pair gets, as YAML that a person can read, edit and pass back.

    format: ldrt-edge/plan/1
    model:
      blk.0.attn_q.weight: Q4_K
      blk.*.ffn_down.weight: Q6_K     # shell patterns are allowed; the first line that matches counts
    mmproj:
      "*": Q8_0
    expected: {kld: 0.012, bytes: 1234567}     # what the allocation foresaw; not read back
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ldrt_edge.convert.plan import FilePlan, TensorPlan
from ldrt_edge.errors import ConfigError, all_problems

FORMAT = "ldrt-edge/plan/1"
MODEL_TYPES = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K",
    "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "F16",
)  # fmt: skip
MMPROJ_TYPES = ("Q6_K", "Q8_0", "F16")
"""Fewer bits move the image embeddings further than an export's check allows."""
NEED_IMPORTANCE = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
_LIMIT_BYTES = 4 << 20
_FILE_TYPES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "IQ2_S": "IQ2_M"}


@dataclass(frozen=True)
class TypePlan:
    """Types by tensor name or shell pattern, for the language model and the mmproj; `expected` is for the reader."""

    model: Mapping[str, str]
    mmproj: Mapping[str, str]
    expected: Mapping[str, float] = field(default_factory=dict)


def read_type_plan(path: Path) -> TypePlan:
    """Read a plan file.

    Raises:
        ConfigError: not a plan, or unknown types; all problems at once.
    """
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise ConfigError(f"--plan {path}: larger than {_LIMIT_BYTES >> 20} MiB, refused")
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--plan {path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"--plan {path}: not a plan: its first line should be 'format: {FORMAT}'")
    parts = [data.get(name) for name in ("model", "mmproj")]
    if not all(isinstance(part, dict) and part for part in parts):
        raise ConfigError(f"--plan {path}: wants a list of types under 'model' and one under 'mmproj'")
    model, mmproj = ({str(key): str(value).upper() for key, value in part.items()} for part in parts if part)
    problems = [
        f"{name}: {type_} is none of {', '.join(known)}"
        for part, known in ((model, MODEL_TYPES), (mmproj, MMPROJ_TYPES))
        for name, type_ in part.items() if type_ not in known
    ]  # fmt: skip
    if problems:
        raise ConfigError(all_problems(problems, f"--plan {path}"))
    return TypePlan(model, mmproj)


def write_type_plan(plan: TypePlan, path: Path) -> None:
    """Write a plan file; it appears when whole, and never in the place of one that somebody may have edited.

    Raises:
        ConfigError: there is a file of that name already.
    """
    refuse_existing(path)
    data = {
        "format": FORMAT, "model": dict(plan.model), "mmproj": dict(plan.mmproj), "expected": dict(plan.expected),
    }  # fmt: skip
    part = path.with_name(f".{path.name}.partial")
    part.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    part.rename(path)


def refuse_existing(path: Path) -> None:
    """Refuse to write over a plan, before minutes are spent on another.

    Raises:
        ConfigError: there is a file of that name.
    """
    if path.exists():
        raise ConfigError(f"--out {path}: there is such a file already, perhaps edited: choose another name")


def assign(types: Mapping[str, str], tensors: Iterable[TensorPlan]) -> dict[str, str]:
    """The type of every matrix, by name: that of the first pattern that matches.

    Raises:
        ConfigError: a matrix has none or one that its rows do not divide into, or a pattern fits nothing.
    """
    found: dict[str, str] = {}
    used, problems = set(), []
    for tensor in tensors:
        pattern = next((pattern for pattern in types if fnmatchcase(tensor.name, pattern)), None)
        if pattern is None:
            problems.append(f"{tensor.name} has no type")
            continue
        used.add(pattern)
        found[tensor.name] = types[pattern]
        if not fits(types[pattern], tensor.shape[-1]):
            problems.append(f"{tensor.name}: its rows of {tensor.shape[-1]} do not divide into {types[pattern]}")
    problems += [f"{pattern} fits no matrix" for pattern in types if pattern not in used]
    if problems:
        raise ConfigError(all_problems(problems, "plan"))
    return found


def quantizable(plan: FilePlan) -> list[TensorPlan]:
    """The tensors of a file that llama.cpp quantises. Source: `tensor_allows_quantization` in src/llama-quant.cpp."""
    kept = "v.position_embd.weight"
    return [t for t in plan.tensors if len(t.shape) == 2 and t.name.endswith("weight") and t.name != kept]


def fits(type_: str, row_length: int) -> bool:
    """Whether rows of that length divide into whole blocks of a type."""
    return row_length % GGML_QUANT_SIZES[GGMLQuantizationType[type_]][0] == 0


def nbytes(type_: str, weights: int) -> int:
    """Bytes of so many weights."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_]]
    return weights // block * size


def file_type(types: Mapping[str, str]) -> str | None:
    """llama.cpp's name of a file that holds these: after its commonest quantised type; None if there is none."""
    counts = Counter(type_ for type_ in types.values() if type_ != "F16")
    if not counts:
        return None
    commonest = min(counts, key=lambda type_: (-counts[type_], type_))
    return _FILE_TYPES.get(commonest, commonest)
