"""`ldrt-edge quantize`: a merged LLaVA folder to a GGUF pair whose language model has 8 bits a weight or fewer.

The weights stream into a full-precision GGUF inside the draft folder, llama.cpp's own quantiser reads that in a child
process, and what it wrote is read back: which types it holds, and which tensors could not have the wanted type because
their rows are no multiple of its block. How far the result is from the merged model is measured and recorded.
"""

from __future__ import annotations

import errno
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, get_args

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, LlamaFileType

from ldrt_edge import artifact, console
from ldrt_edge.convert.fallbacks import Fallback, Quantized, report
from ldrt_edge.convert.gguf import check_choice, check_room, finish, identity, write
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.plan import FilePlan, MmprojType, TextType, mmproj_plan, text_plan
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.weights import Weights
from ldrt_edge.errors import ArtifactError, ConfigError
from ldrt_edge.runtimes.processor import physical_cores

PRESETS = {"q4": "Q4_K_M", "q8": "Q8_0"}
TYPES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "Q2_K",
)  # fmt: skip
"""llama.cpp's names of what it quantises to without an importance matrix."""
_NEED_IMPORTANCE = ("IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_K_S")
_FALLBACKS = {
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0",
    "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL",
}  # fmt: skip
_BIG_BLOCK = 256
_FULL = ".full-precision.gguf"
_PROGRESS = re.compile(r"^\[ *\d+/ *\d+\] +\S+ +- \[ *(\d+), *(\d+), *(\d+), *(\d+)\]")


def quantize(merged: Path, out: Path, type_: str = "q4", mmproj_type: str | None = None) -> Path:
    """Quantise a merged or base folder; returns `out`, an artefact of kind "gguf".

    type_: one of llama.cpp's `TYPES`, or a preset (`q4`, `q8`). mmproj_type: None takes f16. A killed run goes on from
    its full-precision file.

    Raises:
        ConfigError: an unknown type, or one that needs an importance matrix.
        ArtifactError: the folder cannot become GGUF, the disk is too small, or llama.cpp failed.
    """
    type_ = _resolve(type_)
    vision_type: MmprojType = check_choice("--mmproj", mmproj_type or "f16", get_args(MmprojType))
    config = {"to": "gguf", "type": type_, "mmproj_type": vision_type}
    with artifact.create(out, "gguf", config, [identity(merged)], resumable=True) as draft:
        if not draft.complete:
            source = open_source(merged)
            text, vision = text_plan(source, _lossless(source.weights)), mmproj_plan(source, vision_type)
            model = draft.path / f"model-{type_}.gguf"
            check_room(draft.path, text.nbytes + _estimate(text, type_) + vision.nbytes)
            if not model.exists():
                _quantize_text(text, model, type_)
            write(vision, draft.path / f"mmproj-{vision_type.upper()}.gguf", "vision")
            finish(source, draft.path)
            result = read_back(model, type_)
            report(result, type_)
            draft.metrics["quantized"] = asdict(result)
            draft.metrics["fidelity"] = asdict(check(merged, draft.path))
    return out


def run_quantizer(source: Path, target: Path, type_: str, weights: int) -> None:
    """Let llama.cpp quantise one GGUF file to another, in a child process, showing progress.

    weights: their number, for the progress.

    Raises:
        OSError: the disk is full (`errno.ENOSPC`).
        ArtifactError: llama.cpp refused or crashed.
    """
    file_type = LlamaFileType[f"MOSTLY_{type_}"].value
    command = [sys.executable, "-m", "ldrt_edge.convert.quantize_worker", source, target, file_type, physical_cores()]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        ) as child,
    ):
        try:
            assert child.stdout is not None
            _show_progress(child.stdout, type_, weights)
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
    raise ArtifactError(f"llama.cpp could not quantise to {type_}: {last}")


def read_back(path: Path, type_: str) -> Quantized:
    """What a quantised file really holds.

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
        fallbacks=tuple(_fallbacks(tensors, _base_type(type_))),
    )


def _resolve(type_: str) -> str:
    name = PRESETS.get(type_.lower(), type_.upper())
    if name in _NEED_IMPORTANCE:
        raise ConfigError(f"--type {name} needs an importance matrix, which this command does not make: take Q2_K")
    if name in ("F32", "F16", "BF16"):
        raise ConfigError(f"--type {name} is not quantised: use ldrt-edge convert --to gguf --type {name.lower()}")
    check_choice("--type", name, TYPES)
    return name


def _lossless(weights: Weights) -> TextType:
    """The smallest type that holds the checkpoint's values exactly."""
    types: dict[str, TextType] = {"F16": "f16", "BF16": "bf16"}
    found = weights.dtypes()
    return types.get(found.pop(), "f32") if len(found) == 1 else "f32"


def _quantize_text(plan: FilePlan, model: Path, type_: str) -> None:
    """Write the full-precision file, or take the one a killed run left, and quantise it. Each appears when whole."""
    full, part = model.with_name(_FULL), model.with_suffix(".part")
    if not full.exists():
        write(plan, part, "full precision")
        part.rename(full)
    run_quantizer(full, part, type_, sum(math.prod(tensor.shape) for tensor in plan.tensors))
    read_back(part, type_)
    part.rename(model)
    full.unlink()


def _estimate(plan: FilePlan, type_: str) -> int:
    """Bytes of the quantised file, from above: a mix raises some tensors to 6 bits, fall-backs to 8."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[_base_type(type_)]]
    mixed = max(8 * size / block, 6.5625)  # Q6_K
    bits = 0.0
    for tensor in plan.tensors:
        each = 32.0 if len(tensor.shape) == 1 else mixed if tensor.shape[-1] % _BIG_BLOCK == 0 else max(mixed, 8.5)
        bits += each * math.prod(tensor.shape)
    return int(bits / 8)


def _base_type(type_: str) -> str:
    """The tensor type that a file type is named after: Q4_K for Q4_K_M. Source: llama_ftype_get_default_type."""
    return "IQ3_S" if type_ == "IQ3_M" else re.sub(r"(_K)_[SML]$", r"\1", type_)


def _fallbacks(tensors: list[Any], base: str) -> Iterator[Fallback]:
    """Tensors with llama.cpp's replacement for a 256-wide type. Source: tensor_type_fallback in llama-quant.cpp."""
    for tensor in tensors:
        row, got = int(tensor.shape[0]), tensor.tensor_type.name
        if len(tensor.shape) == 1 or row % _BIG_BLOCK == 0 or got == base:
            continue
        wanted = base if _FALLBACKS.get(base) == got else next((w for w, g in _FALLBACKS.items() if g == got), base)
        yield Fallback(tensor.name, row, _BIG_BLOCK, wanted, got)


def _show_progress(log: IO[str], type_: str, weights: int) -> None:
    with console.bar(f"quantise to {type_}", weights / 1e6) as bar:
        for line in log:
            if tensor := _PROGRESS.match(line):
                bar.advance(math.prod(int(n) for n in tensor.groups()) / 1e6, "(million weights)")
