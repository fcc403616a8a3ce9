"""`ldrt-edge quantize`: a merged LLaVA folder to a GGUF pair whose language model has 8 bits a weight or fewer.

The weights stream into a full-precision GGUF inside the draft folder, llama.cpp's own quantiser reads that in a child
process, and what it wrote is read back: which types it holds, and which tensors could not have the wanted type because
their rows are no multiple of its block. How far the result is from the merged model is measured and recorded.

An importance artefact tells the quantiser which weights matter, and unlocks types of less than 3 bits. `Gguf` is what
this format brings to plans, which give every matrix its own type, the vision tower's and the projector's too.
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
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar, get_args

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, LlamaFileType

from ldrt_edge import artifact, console
from ldrt_edge.convert.fallbacks import Fallback, Quantized, report
from ldrt_edge.convert.feedback import Feedback, with_feedback
from ldrt_edge.convert.gguf import check_choice, check_room, finish, identity, write
from ldrt_edge.convert.importance import MeanSquares, imatrix_path, read_imatrix
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.plan import FilePlan, MmprojType, TensorPlan, TextType, mmproj_plan, text_plan
from ldrt_edge.convert.quantize_worker import Job
from ldrt_edge.convert.rounding import round_ggml, round_half
from ldrt_edge.convert.source import Source, open_source
from ldrt_edge.convert.type_plan import PLAN_TYPES, FormatName, PlannedMatrix, TypePlan, assign, nbytes
from ldrt_edge.errors import ArtifactError, ConfigError
from ldrt_edge.runtimes.base import FloatArray
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
_BIG_BLOCK = 256
_FULL = ".full-precision.gguf"
_PLANNED = {"model": "model-PLANNED.gguf", "mmproj": "mmproj-PLANNED.gguf"}
"""Files of a planned pair."""
_NEED_IMPORTANCE = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
_FILE_TYPES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "IQ2_S": "IQ2_M"}
_PROGRESS = re.compile(r"^\[ *\d+/ *\d+\] +\S+ +- \[ *(\d+), *(\d+), *(\d+), *(\d+)\]")


@dataclass(frozen=True)
class Importance:
    """An importance artefact, and how its kinds of token are weighed: pooled, balanced or answer."""

    folder: Path
    weighting: str = "balanced"


@dataclass(frozen=True)
class Wanted:
    """How llama.cpp is to quantise one file: its file type; types by tensor, which go first; an importance matrix."""

    type: str
    types: Mapping[str, str] = field(default_factory=dict)
    imatrix: Path | None = None


def quantize(
    merged: Path,
    out: Path,
    type_: str = "q4",
    mmproj_type: str | None = None,
    importance: Importance | None = None,
) -> Path:
    """Quantise a merged or base folder; returns `out`, an artefact of kind "gguf".

    type_: one of llama.cpp's `TYPES`, or with an importance artefact of `IMPORTANCE_TYPES`, or a preset (`q4`, `q8`).
    mmproj_type: None takes f16. A killed run goes on from its full-precision file.

    Raises:
        ConfigError: an unknown type, or one that needs an importance artefact.
        ArtifactError: the folder cannot become GGUF, the disk is too small, or llama.cpp failed.
    """
    type_ = _resolve(type_, importance)
    vision_type: MmprojType = check_choice("--mmproj", mmproj_type or "f16", get_args(MmprojType))
    given = Gguf(importance)
    config = {"to": "gguf", "type": type_, "mmproj_type": vision_type, **given.config()}
    with artifact.create(out, "gguf", config, [identity(merged), *given.inputs()], resumable=True) as draft:
        if not draft.complete:
            source = open_source(merged)
            text, vision = text_plan(source, lossless(source)), mmproj_plan(source, vision_type)
            model = draft.path / f"model-{type_}.gguf"
            check_room(draft.path, text.nbytes + _estimate(text, type_) + vision.nbytes)
            if not model.exists():
                full = write_full(text, draft.path)
                quantize_file(full, model, Wanted(type_, imatrix=given.imatrix), text)
                full.unlink()
            write(vision, draft.path / f"mmproj-{vision_type.upper()}.gguf", "vision")
            finish(source, draft.path)
            result = read_back(model, type_)
            report(result, type_)
            draft.metrics["quantized"] = asdict(result)
            draft.metrics["fidelity"] = asdict(check(merged, draft.path))
    return out


@dataclass(frozen=True)
class Gguf:
    """GGUF as a format that plans are made for: see `ldrt_edge.convert.planned.Format`."""

    importance: Importance | None = None
    feedback: Feedback | None = None
    name: ClassVar[FormatName] = "gguf"
    probes: ClassVar[tuple[str, ...]] = ("Q4_K", "Q4_0", "Q8_0")
    files: ClassVar[str] = "*.gguf"

    def config(self) -> dict[str, str]:
        """How the importance is weighed, and whether errors are fed back."""
        weighting = {"weighting": self.importance.weighting} if self.importance else {}
        return weighting | ({"feedback": str(self.feedback.limit)} if self.feedback else {})

    def inputs(self) -> list[artifact.Input]:
        """The importance, and what errors are fed back by."""
        folders = [given.folder for given in [self.importance] if given] + [f.data for f in [self.feedback] if f]
        return [artifact.identity(folder) for folder in folders]

    def matrices(self, source: Source) -> dict[str, list[PlannedMatrix]]:
        """The tensors of both files that llama.cpp quantises."""
        return {part: _matrices(file) for part, file in _files(source).items()}

    def fixed_bytes(self, source: Source) -> int:
        """Bytes of both files' other tensors."""
        return sum(t.nbytes for file in _files(source).values() for t in file.tensors if not _is_quantizable(t))

    def types(self, part: str, name: str) -> list[str]:
        """All of the part's, but for those that llama.cpp does not make without an importance."""
        return [t for t in PLAN_TYPES["gguf"][part] if t not in _NEED_IMPORTANCE or name in self._mean_squares]

    def rounded(self, name: str, values: FloatArray, type_: str, start: int = 0) -> FloatArray:
        """Rows as llama.cpp's quantiser rounds them."""
        if type_ == "F16":
            return round_half(values)
        importance = self._mean_squares.get(name)
        return round_ggml(values, type_, None if importance is None else importance[start : start + values.shape[1]])

    def write(self, source: Source, plan: TypePlan, folder: Path, work: Path) -> Quantized:
        """Write a pair; `work` keeps the full-precision files, unless feedback changes them for this plan."""
        files = _files(source)
        matrices = {part: _matrices(file) for part, file in files.items()}
        types = assign(plan, matrices)
        if self.feedback:
            files = _files(with_feedback(source, self.feedback, self, matrices["model"], types, work))
        wanted = sum(
            nbytes(types[tensor.name], math.prod(tensor.shape)) if tensor.name in types else tensor.nbytes
            for file in files.values() for tensor in file.tensors
        )  # fmt: skip
        missing = sum(file.nbytes for part, file in files.items() if not (work / _PLANNED[part]).exists())
        check_room(folder, wanted + missing)
        work.mkdir(exist_ok=True)
        for part, file in files.items():
            target, own = folder / _PLANNED[part], {t.name: types[t.name] for t in file.tensors if t.name in types}
            if type_ := _file_type(own):
                full = write_full(file, work, target.name)
                quantize_file(full, target, Wanted(type_, own, self.imatrix), file)
                if self.feedback:
                    full.unlink()
            else:
                write(file, target, part)
        finish(source, folder)
        return read_back(folder / _PLANNED["model"])

    @cached_property
    def imatrix(self) -> Path | None:
        """The importance-matrix file."""
        return imatrix_path(self.importance.folder, self.importance.weighting) if self.importance else None

    @cached_property
    def _mean_squares(self) -> MeanSquares:
        return read_imatrix(self.imatrix) if self.imatrix else {}


def run_quantizer(source: Path, target: Path, wanted: Wanted, weights: int) -> None:
    """Let llama.cpp quantise one GGUF file to another, in a child process, showing progress.

    weights: their number, for the progress.

    Raises:
        OSError: the disk is full (`errno.ENOSPC`).
        ArtifactError: llama.cpp refused or crashed.
    """
    job = Job(
        str(source), str(target), LlamaFileType[f"MOSTLY_{wanted.type}"].value, physical_cores(),
        str(wanted.imatrix) if wanted.imatrix else None, wanted.types,
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
                _show_progress(child.stdout, wanted.type, weights)
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
        fallbacks=tuple(_fallbacks(tensors, _base_type(type_))) if type_ else (),
    )


def lossless(source: Source) -> TextType:
    """The smallest type that holds the checkpoint's values exactly."""
    types: dict[str, TextType] = {"F16": "f16", "BF16": "bf16"}
    found = source.weights.dtypes()
    return types.get(found.pop(), "f32") if len(found) == 1 else "f32"


def write_full(plan: FilePlan, folder: Path, name: str = _FULL) -> Path:
    """Write a full-precision file into a draft folder, or take the one a killed run left. It appears when whole."""
    full = folder / name
    if not full.exists():
        part = full.with_suffix(".part")
        write(plan, part, "full precision")
        part.rename(full)
    return full


def quantize_file(full: Path, target: Path, wanted: Wanted, plan: FilePlan) -> None:
    """Quantise a full-precision file; the result appears when whole."""
    part = target.with_suffix(".part")
    part.unlink(missing_ok=True)  # the child of a killed run may still write into it
    run_quantizer(full, part, wanted, sum(math.prod(tensor.shape) for tensor in plan.tensors))
    read_back(part)
    part.replace(target)


def _resolve(type_: str, importance: Importance | None) -> str:
    name = PRESETS.get(type_.lower(), type_.upper())
    if name in IMPORTANCE_TYPES and importance is None:
        raise ConfigError(f"--type {name} needs --importance: run ldrt-edge importance first, or take Q2_K")
    if name in ("F32", "F16", "BF16"):
        raise ConfigError(f"--type {name} is not quantised: use ldrt-edge convert --to gguf --type {name.lower()}")
    check_choice("--type", name, TYPES + IMPORTANCE_TYPES if importance else TYPES)
    return name


def _files(source: Source) -> dict[str, FilePlan]:
    """The files of a pair by part, as they are before they are quantised."""
    return {"model": text_plan(source, lossless(source)), "mmproj": mmproj_plan(source, "f16")}


def _matrices(file: FilePlan) -> list[PlannedMatrix]:
    return [PlannedMatrix(t.name, str(t.source), t.shape) for t in file.tensors if _is_quantizable(t)]


def _is_quantizable(tensor: TensorPlan) -> bool:
    """Whether llama.cpp quantises it. Source: `tensor_allows_quantization` in src/llama-quant.cpp."""
    return len(tensor.shape) == 2 and tensor.name.endswith("weight") and tensor.name != "v.position_embd.weight"


def _file_type(types: Mapping[str, str]) -> str | None:
    """llama.cpp's name of a file that holds these: after its commonest quantised type; None if there is none."""
    counts = Counter(type_ for type_ in types.values() if type_ != "F16")
    if not counts:
        return None
    commonest = min(counts, key=lambda type_: (-counts[type_], type_))
    return _FILE_TYPES.get(commonest, commonest)


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
    return _BASES.get(type_, re.sub(r"(_K)_[SML]$", r"\1", type_))


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
