"""llama.cpp's own quantiser in a child process: which file types it knows, and what it made of a file.

What it wrote is read back: which types it holds, and which tensors could not have the wanted type because their rows
are no multiple of its block.
"""

from __future__ import annotations

import errno
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFReader, LlamaFileType

from ldrt_edge import console
from ldrt_edge.convert.fallbacks import Fallback, Quantized
from ldrt_edge.convert.gguf import check_choice
from ldrt_edge.convert.quantize_worker import Job
from ldrt_edge.errors import ArtifactError, ConfigError
from ldrt_edge.runtimes.processor import physical_cores

PRESETS = {"q4": "Q4_K_M", "q8": "Q8_0"}
TYPES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "Q2_K",
)  # fmt: skip
"""llama.cpp's names of what it quantises to without an importance matrix."""
IMPORTANCE_TYPES = ("IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_K_S")
"""What it quantises to only with one."""
_FALLBACKS = {
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0",
    "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ2_XS": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ1_S": "IQ4_NL",
}  # fmt: skip
_BASES = {"IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S", "IQ2_M": "IQ2_S", "IQ2_S": "IQ2_XS"}
BIG_BLOCK = 256
_PROGRESS = re.compile(r"^\[ *\d+/ *\d+\] +\S+ +- \[ *(\d+), *(\d+), *(\d+), *(\d+)\]")
_CHOSEN = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- .*MiB -> .*\((\w+)\)$")


@dataclass(frozen=True)
class Wanted:
    """How llama.cpp is to quantise one file: its file type; types by tensor, which go first; an importance matrix."""

    type: str
    types: Mapping[str, str] = field(default_factory=dict)
    imatrix: Path | None = None


def run_quantizer(source: Path, target: Path, wanted: Wanted, weights: int) -> None:
    """Let llama.cpp quantise one GGUF file to another, showing progress.

    weights: their number, for the progress.

    Raises:
        OSError: the disk is full (`errno.ENOSPC`).
        ArtifactError: llama.cpp refused or crashed.
    """
    with console.bar(f"quantise to {wanted.type}", weights / 1e6) as bar:
        for line in _log(source, target, wanted):
            if tensor := _PROGRESS.match(line):
                bar.advance(math.prod(int(n) for n in tensor.groups()) / 1e6, "(million weights)")


def preset_types(source: Path, wanted: Wanted) -> dict[str, str]:
    """The types that llama.cpp gives the matrices of a GGUF file, by tensor name; of the file only its header is read.

    Raises:
        ArtifactError: llama.cpp refused.
    """
    told = (_CHOSEN.match(line) for line in _log(source, source.with_suffix(".none"), wanted, dry_run=True))
    return {match[1]: match[2].upper() for match in told if match}


def _log(source: Path, target: Path, wanted: Wanted, dry_run: bool = False) -> Iterator[str]:
    """What llama.cpp's quantiser says in a child process, line by line."""
    job = Job(
        str(source), str(target), LlamaFileType[f"MOSTLY_{wanted.type}"].value, physical_cores(),
        str(wanted.imatrix) if wanted.imatrix else None, wanted.types, dry_run,
    )  # fmt: skip
    command = [sys.executable, "-m", "ldrt_edge.convert.quantize_worker"]
    with tempfile.TemporaryFile("w+") as order, tempfile.TemporaryFile("w+", errors="replace") as errors:
        json.dump(asdict(job), order)
        order.seek(0)
        with subprocess.Popen(
            command, stdin=order, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        ) as child:
            try:
                assert child.stdout is not None
                yield from child.stdout
            except BaseException:
                child.kill()
                raise
            if child.wait() == 0:
                return
        errors.seek(0)
        reason = errors.read().strip().splitlines()
    target.unlink(missing_ok=True)
    last = reason[-1] if reason else f"ended by signal {-child.returncode}"
    if "iostream error" in last:  # what the C++ library calls a write that fails
        raise OSError(errno.ENOSPC, "disk full", str(target))
    raise ArtifactError(f"llama.cpp could not quantise to {wanted.type}: {last}")


def resolve(type_: str, with_importance: bool) -> str:
    """llama.cpp's name of a file type or of a preset of ours.

    Raises:
        ConfigError: an unknown type, or one that needs an importance matrix.
    """
    name = PRESETS.get(type_.lower(), type_.upper())
    if name in IMPORTANCE_TYPES and not with_importance:
        raise ConfigError(f"--type {name} needs --importance: run ldrt-edge importance first, or take Q2_K")
    if name in ("F32", "F16", "BF16"):
        raise ConfigError(f"--type {name} is not quantised: use ldrt-edge convert --to gguf --type {name.lower()}")
    check_choice("--type", name, TYPES + IMPORTANCE_TYPES if with_importance else TYPES)
    return name


def read_back(path: Path, type_: str | None = None) -> Quantized:
    """What a quantised file really holds.

    type_: the preset that it was made by; None for a plan, which has no fall-backs.

    Raises:
        ArtifactError: the file is truncated.
    """
    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{path}: truncated by a failed write ({error}): run the same command again") from error
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    stored = sum(int(tensor.n_bytes) for tensor in tensors)
    return Quantized(
        bytes=path.stat().st_size,
        bits_per_weight=round(8 * stored / weights, 3),
        types=dict(Counter(tensor.tensor_type.name for tensor in tensors).most_common()),
        fallbacks=tuple(_fallbacks(tensors, base_type(type_))) if type_ else (),
    )


def base_type(type_: str) -> str:
    """The tensor type that a file type is named after: Q4_K for Q4_K_M. Source: llama_ftype_get_default_type."""
    return _BASES.get(type_, re.sub(r"(_K)_[SML]$", r"\1", type_))


def _fallbacks(tensors: list[Any], base: str) -> Iterator[Fallback]:
    """Tensors with llama.cpp's replacement for a 256-wide type. Source: tensor_type_fallback in llama-quant.cpp."""
    for tensor in tensors:
        row, got = int(tensor.shape[0]), tensor.tensor_type.name
        if len(tensor.shape) == 1 or row % BIG_BLOCK == 0 or got == base:
            continue
        wanted = base if _FALLBACKS.get(base) == got else next((w for w, g in _FALLBACKS.items() if g == got), base)
        yield Fallback(tensor.name, row, BIG_BLOCK, wanted, got)
