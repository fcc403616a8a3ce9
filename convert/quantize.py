"""`ldrt-edge quantize`: a merged LLaVA folder to a GGUF pair whose language model has 8 bits a weight or fewer.

The weights stream into a full-precision GGUF inside the draft folder, llama.cpp's own quantiser reads that in a child
process, and what it wrote is read back: which types it holds, and which tensors could not have the wanted type because
their rows are no multiple of its block. How far the result is from the merged model is measured and recorded.

An importance artefact tells the quantiser which weights matter, and unlocks types of less than 3 bits. `Gguf` is what
this format brings to plans, which give every matrix its own type, the vision tower's and the projector's too.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ldrt_edge import artifact
from ldrt_edge.convert.calibration import Calibration
from ldrt_edge.convert.fallbacks import Quantized, report
from ldrt_edge.convert.gguf import check_choice, check_room, finish, header_bytes, identity, write, write_outline
from ldrt_edge.convert.importance import MeanSquares, imatrix_path, pictures_of, read_imatrix, write_imatrix
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.plan import FilePlan, MmprojType, TensorPlan, TextType, mmproj_plan, text_plan
from ldrt_edge.convert.quantizer import BIG_BLOCK, Wanted, base_type, preset_types, read_back, resolve, run_quantizer
from ldrt_edge.convert.rounding import round_ggml, round_half
from ldrt_edge.convert.source import Source, open_source
from ldrt_edge.convert.type_plan import PLAN_TYPES, FormatName, PlannedMatrix, TypePlan, assign, nbytes
from ldrt_edge.errors import ArtifactError, ConfigError, all_problems
from ldrt_edge.runtimes.base import FloatArray

_FULL = ".full-precision.gguf"
_PLANNED = {"model": "model-PLANNED.gguf", "mmproj": "mmproj-PLANNED.gguf"}
"""Files of a planned pair."""
_NEED_IMPORTANCE = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
_FILE_TYPES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "IQ2_S": "IQ2_M"}


@dataclass(frozen=True)
class Importance:
    """An importance artefact, and how its kinds of token are weighed: pooled, balanced or answer."""

    folder: Path
    weighting: str = "balanced"

    @cached_property
    def imatrix(self) -> Path:
        """The importance-matrix file."""
        return imatrix_path(self.folder, self.weighting)

    @cached_property
    def mean_squares(self) -> MeanSquares:
        """What it holds."""
        return read_imatrix(self.imatrix)


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
    type_ = resolve(type_, importance is not None)
    vision_type: MmprojType = check_choice("--mmproj", mmproj_type or "f16", get_args(MmprojType))
    given = Gguf(importance)
    config = {"to": "gguf", "type": type_, "mmproj_type": vision_type, **given.config()}
    with artifact.create(out, "gguf", config, [identity(merged), *given.inputs()], resumable=True) as draft:
        if not draft.complete:
            source = open_source(merged)
            text, vision = text_plan(source, lossless(source)), mmproj_plan(source, vision_type)
            if importance:
                check_widths(importance, _matrices(text))
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
    """GGUF as a format that plans are made for: see `ldrt_edge.convert.format.Format`.

    columns: what those of matrices were multiplied by, so that the importance of their inputs is another.
    """

    importance: Importance | None = None
    calibration: Calibration | None = None
    columns: Mapping[str, FloatArray] = field(default_factory=dict)
    name: ClassVar[FormatName] = "gguf"
    probes: ClassVar[tuple[str, ...]] = ("Q4_K", "Q4_0", "Q8_0")
    files: ClassVar[str] = "*.gguf"

    def config(self) -> dict[str, str]:
        """How the importance is weighed, and what weights are fitted by."""
        weighting = {"weighting": self.importance.weighting} if self.importance else {}
        return weighting | (self.calibration.config() if self.calibration else {})

    def inputs(self) -> list[artifact.Input]:
        """The importance, and what weights are fitted to."""
        importance = [artifact.identity(self.importance.folder)] if self.importance else []
        return importance + (self.calibration.inputs() if self.calibration else [])

    def pictures(self) -> dict[Path, frozenset[str] | None]:
        """Those that the importance is of, and that weights are fitted to."""
        importance = {self.importance.folder: pictures_of(self.importance.folder)} if self.importance else {}
        return importance | (self.calibration.pictures() if self.calibration else {})

    def matrices(self, source: Source) -> dict[str, list[PlannedMatrix]]:
        """The tensors of both files that llama.cpp quantises.

        Raises:
            ArtifactError: the importance is of a model of another size.
        """
        found = {part: _matrices(file) for part, file in _files(source).items()}
        if self.importance:
            check_widths(self.importance, [matrix for members in found.values() for matrix in members])
        return found

    def fixed_bytes(self, source: Source) -> int:
        """Bytes of both files' other tensors, and of what stands before the tensors: settings and vocabulary."""
        files = _files(source).values()
        return sum(header_bytes(f) + sum(t.nbytes for t in f.tensors if not _is_quantizable(t)) for f in files)

    def types(self, part: str, name: str) -> list[str]:
        """All of the part's, but for those that llama.cpp does not make without an importance."""
        return [t for t in PLAN_TYPES["gguf"][part] if t not in _NEED_IMPORTANCE or name in self._mean_squares]

    def rounded(self, name: str, rows: FloatArray, type_: str, columns: slice = slice(None)) -> FloatArray:
        """Rows as llama.cpp's quantiser rounds them."""
        if type_.upper() == "F16":
            return round_half(rows[:, columns])
        return round_ggml(rows, type_, self._mean_squares.get(name), columns)

    def fitted_by(self, calibration: Calibration | None) -> Gguf:
        """The same with another calibration."""
        return replace(self, calibration=calibration)

    def rescaled(self, columns: Mapping[str, FloatArray]) -> Gguf:
        """The same with the importance of inputs that were divided."""
        return replace(self, columns=columns)

    def preset(self, source: Source, type_: str, mmproj_type: str | None = None) -> TypePlan:
        """The plan that llama.cpp has for one of its types, or for a preset of ours.

        Raises:
            ConfigError: an unknown type, or one that needs an importance matrix.
        """
        wanted = Wanted(resolve(type_, self.importance is not None), imatrix=self.imatrix)
        check_choice("--mmproj", vision := (mmproj_type or "f16").upper(), ("F16", "Q8_0"))
        with tempfile.TemporaryDirectory() as folder:
            outline = Path(folder) / "outline.gguf"
            write_outline(text_plan(source, "f32"), outline)
            return TypePlan("gguf", {"model": preset_types(outline, wanted), "mmproj": {"*": vision}})

    def write(self, source: Source, plan: TypePlan, folder: Path, work: Path) -> Quantized:
        """Write a pair; `work` keeps the full-precision files, unless a calibration changes them for this plan."""
        files, matrices = _files(source), self.matrices(source)
        types = assign(plan, matrices)
        self._refuse_unknown(types)
        exported, imatrix, fitted_for = source, self.imatrix, ""
        if self.calibration:
            told = repr((self.calibration.config(), sorted(types.items())))
            fitted_for = sha256(told.encode()).hexdigest()[:8] + "-"
            fitted = self.calibration.fitted(source, self, matrices["model"], types, work, folder)
            exported, imatrix = fitted.exported(matrices["model"], types), fitted.to._imatrix_in(work)
            files = _files(exported)
        wanted = sum(
            nbytes(types[tensor.name], math.prod(tensor.shape)) if tensor.name in types else tensor.nbytes
            for file in files.values() for tensor in file.tensors
        )  # fmt: skip
        full_names = {part: f"{fitted_for}{_PLANNED[part]}" for part in files}
        missing = sum(file.nbytes for part, file in files.items() if not (work / full_names[part]).exists())
        check_room(folder, wanted + missing)
        work.mkdir(exist_ok=True)
        for part, file in files.items():
            target, own = folder / _PLANNED[part], {t.name: types[t.name] for t in file.tensors if t.name in types}
            if type_ := _file_type(own):
                full = write_full(file, work, full_names[part])
                quantize_file(full, target, Wanted(type_, own, imatrix), file)
                if self.calibration:
                    full.unlink()
            else:
                write(text_plan(exported, "f16") if part == "model" else file, target, part)
        finish(source, folder)
        return read_back(folder / _PLANNED["model"])

    def _refuse_unknown(self, types: Mapping[str, str]) -> None:
        """Types that llama.cpp makes only by an importance matrix, for matrices of which none is given."""
        wanting = {name: t for name, t in types.items() if t in _NEED_IMPORTANCE and name not in self._mean_squares}
        if wanting and not self.importance:
            told = [f"{name}: {type_} wants --importance: run ldrt-edge importance" for name, type_ in wanting.items()]
        else:
            told = [f"{name}: {type_}, and the importance does not know it" for name, type_ in wanting.items()]
        if told:
            raise ConfigError(all_problems(told, "plan"))

    @property
    def imatrix(self) -> Path | None:
        """The importance-matrix file."""
        return self.importance.imatrix if self.importance else None

    def _imatrix_in(self, work: Path) -> Path | None:
        """The importance-matrix file of the multiplied columns' inputs, written into a folder if there are such."""
        if self.imatrix is None or not self.columns:
            return self.imatrix
        path = work / "imatrix-rescaled.gguf"
        means = {name: (values.astype(np.float64), 1) for name, values in self._mean_squares.items()}
        write_imatrix(path, means, ["rescaled"], 1)
        return path

    @cached_property
    def _mean_squares(self) -> MeanSquares:
        given = self.importance.mean_squares if self.importance else {}
        return given | {name: given[name] / self.columns[name] ** 2 for name in self.columns if name in given}


def check_widths(importance: Importance, matrices: Sequence[PlannedMatrix]) -> None:
    """Refuse the importance of a model of another size.

    Raises:
        ArtifactError: it is.
    """
    given = importance.mean_squares
    for matrix in matrices:
        if matrix.name in given and given[matrix.name].shape != matrix.shape[-1:]:
            raise ArtifactError(
                f"{importance.folder} is of another model: {matrix.name} has {matrix.shape[-1]} inputs, not "
                f"{len(given[matrix.name])}"
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
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[base_type(type_)]]
    mixed = max(8 * size / block, 6.5625)  # Q6_K
    bits = 0.0
    for tensor in plan.tensors:
        each = 32.0 if len(tensor.shape) == 1 else mixed if tensor.shape[-1] % BIG_BLOCK == 0 else max(mixed, 8.5)
        bits += each * math.prod(tensor.shape)
    return int(bits / 8)


