"""How much the answers suffer when a matrix is rounded to a type: estimated for every pair, then held against measure.

Rounding a matrix W by E moves its output by E·x. To second order that moves the next-token distribution by

    KLD ≈ ½ Σ_t gₜᵀ (E xₜ) (E xₜ)ᵀ gₜ ≈ ½ Σ_t ‖gₜ‖² mean_i (eᵢ·xₜ)² ≈ Σ_j c_j · mean_i e²_ij, over answer tokens

with eᵢ the rows of E, gₜ the gradient, at the matrix's output for token t, of the log-likelihood of answers drawn from
the model itself (whose mean square is the Fisher information), and c_j = ½ Σ_t ‖gₜ‖² x²_tj where errors are taken as
independent. One backward pass over a few training rows gives c for every matrix at once, the tower's and the
projector's too, and weighs each token by what it does to an answer: what MBQ does with two weights, for picture and
text, is done here token by token.

Weights that are fitted before they are rounded (`calibration`) are so here too. Their errors are not independent, which
is what they are fitted for: some rows of each are rounded first, and meet the inputs in that pass. The questions are
others than those they were fitted to, of which little is lost.

What one matrix does to another's damage is made good by measuring: each kind of matrix is rounded as a whole, the
divergence of the answers is measured, and the kind's estimates are scaled to it.

Source: Kunstner et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019, section 2 (Fisher and KLD);
Li et al., "MBQ: Modality-balanced quantization", CVPR 2025.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldrt_edge import artifact, console
from ldrt_edge.convert.calibration import Calibration, Fitted
from ldrt_edge.convert.format import Format
from ldrt_edge.convert.gradients import Asked, answers, gradients, linears, questions
from ldrt_edge.convert.source import EMBEDDINGS, HEAD, Source, check_values, is_tied
from ldrt_edge.convert.type_plan import PlannedMatrix, fits, nbytes
from ldrt_edge.convert.weights import canonical
from ldrt_edge.errors import ArtifactError, require
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.runtimes.base import FloatArray
from ldrt_edge.runtimes.hf import HfRuntime

if TYPE_CHECKING:
    from torch import Tensor

_ROWS_ROUNDED, _ROWS_FITTED = 32, 128
"""Of each matrix, evenly spread: rows of one matrix hardly differ in how well they round, but as to single tokens."""


@dataclass(frozen=True)
class Option:
    """A type that a matrix can have: its bytes, and the damage, in nats of mean KLD an answer token."""

    type: str
    nbytes: int
    damage: float


@dataclass(frozen=True)
class Matrix:
    """A weight matrix with its options, smallest first. part: of the export, as its plan names it."""

    name: str
    part: str
    weights: int
    options: tuple[Option, ...]

    def scaled(self, factor: float) -> Matrix:
        """The same options with their damage multiplied."""
        return replace(self, options=tuple(replace(o, damage=o.damage * factor) for o in self.options))


def sensitivities(
    source: Source, data: Path, to: Format, limit: int = 16, seed: int = 0, threads: int | None = None,
    work: Path | None = None,
) -> list[Matrix]:
    """Every matrix of an export with its options.

    limit: about how many training rows are asked. work: keeps what a calibration measured.

    Raises:
        ArtifactError: a weight is no number, or beyond half precision.
        DataError: no training rows, or one that cannot be asked.
    """
    parts = to.matrices(source)
    planned = [(part, matrix) for part, members in parts.items() for matrix in members]
    calibration = to.calibration and to.calibration.for_plans()
    fitted = _fitted(source, to, calibration, parts["model"], work)
    runtime = HfRuntime(source.folder, threads=threads)
    try:
        asked = questions(runtime, data, limit, seed, but=calibration.rows() if calibration else ())
        errors = {m.name: _errors(fitted, part, m) for part, m in console.track(planned, "rounding")}
        met = {m.name: errors[m.name] for _, m in planned if m.source in fitted.moments}
        sums = _sums(runtime, source, {m.name: m.source for _, m in planned}, met, asked, seed)
        found = [_options(part, m, errors[m.name], sums[m.name], m.name in met) for part, m in planned]
        scales = _measure(runtime, fitted, [(m, given) for (_, m), given in zip(planned, found, strict=True)], asked)
    finally:
        runtime.close()
    return [given.scaled(scales[kind(matrix.source)]) for (_, matrix), given in zip(planned, found, strict=True)]


def kept(path: Path, measure: Callable[[], list[Matrix]]) -> list[Matrix]:
    """What a file holds of an earlier measurement; where there is none, it is measured, and written there when whole.

    Raises:
        ArtifactError: the file holds something else.
    """
    if not path.exists():
        found = measure()
        artifact.replace_text(path, json.dumps([asdict(matrix) for matrix in found]))
        return found
    try:
        return [
            Matrix(**matrix | {"options": tuple(Option(**option) for option in matrix["options"])})
            for matrix in json.loads(path.read_text())
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path}: no sensitivities ({str(error)[:80]!r}): remove it to measure again") from error


def admitted(to: Format, part: str, matrix: PlannedMatrix) -> list[str]:
    """The types that a matrix can have."""
    return [type_ for type_ in to.types(part, matrix.name) if fits(type_, matrix.shape[-1])]


def kind(source: str) -> str:
    """What sort of matrix a checkpoint's tensor is: q_proj, down_proj, …, embed_tokens, lm_head; tower; projector."""
    path = source.split(".")
    return path[-2] if path[0] == "language_model" else path[0]


def _fitted(
    source: Source, to: Format, calibration: Calibration | None, language: Sequence[PlannedMatrix], work: Path | None
) -> Fitted[Format]:
    """The weights that will be rounded, with scales for the types of the probes."""
    if calibration is None:
        return Fitted(source, to)
    assert work is not None
    types = {m.name: next((t for t in to.probes if fits(t, m.shape[-1])), "f16") for m in language}
    return calibration.fitted(source, to, language, types, work)


def _errors(fitted: Fitted[Format], part: str, matrix: PlannedMatrix) -> dict[str, FloatArray]:
    """What rounding to each type does to some rows of a matrix of the checkpoint: (rows, row length) by type."""
    values = fitted.source.weights.read(matrix.source)
    check_values(values, matrix.source, fitted.source.folder, half=True)
    wanted = _ROWS_FITTED if matrix.source in fitted.moments else _ROWS_ROUNDED
    chosen = slice(None, None, math.ceil(len(values) / wanted))
    rows, rounded = values[chosen], fitted.rounded(matrix)
    types = admitted(fitted.to, part, matrix)
    return {type_: fitted.unscaled(matrix, rounded(rows, type_) - rows, chosen) for type_ in types}


def _options(
    part: str, matrix: PlannedMatrix, errors: Mapping[str, FloatArray], sums: FloatArray, met: bool
) -> Matrix:
    """A matrix's types with their estimates. met: whether `sums` are of each error, or c."""
    weights, options = math.prod(matrix.shape), []
    for type_, moved in errors.items():
        damage = sums[: len(moved)] if met else np.square(moved, dtype=np.float64) @ sums
        sums = sums[len(moved) :] if met else sums
        options.append(Option(type_, nbytes(type_, weights), float(damage.mean())))
    return Matrix(matrix.name, part, weights, tuple(sorted(options, key=lambda o: (o.nbytes, o.damage))))


def _sums(
    runtime: HfRuntime, source: Source, sources: Mapping[str, str], met: Mapping[str, Mapping[str, FloatArray]],
    asked: Sequence[Asked], seed: int,
) -> dict[str, FloatArray]:
    """½ Σ_t ‖gₜ‖² (e·xₜ)² of all errors one after the other, where they are given, else c: float64, by matrix.

    sources: the matrices' names in the checkpoint; an export may store a tied one twice.
    """
    torch = require("torch", "train")
    device, tokens = runtime.model.device, sum(len(answer) for _, answer in asked)
    stacked = {name: torch.from_numpy(np.concatenate(list(each.values()))).to(device) for name, each in met.items()}
    matrices: dict[str, list[str]] = {}
    for name, key in sources.items():
        matrices.setdefault(key, []).append(name)
    sums: dict[str, Any] = {}

    def add(key: str, inputs: Tensor, weights: Tensor) -> None:
        for name in matrices.get(key, ()):
            moved = inputs @ stacked[name].T if name in stacked else inputs
            sums[name] = sums.get(name, 0) + (weights @ moved.square()).double().cpu().numpy() / (2 * tokens)

    names = {key: key for key in matrices}
    if is_tied(source):  # then the head's damage is the embedding matrix's
        names[HEAD] = EMBEDDINGS
    with linears(runtime, names, lambda key, inputs, gradient: add(key, inputs, gradient.square().sum(-1))):
        for words in gradients(runtime, asked, seed, "sensitivity"):
            add(EMBEDDINGS, words, torch.ones(len(words), device=device))
    return sums


def _measure(
    runtime: HfRuntime, fitted: Fitted[Format], found: Sequence[tuple[PlannedMatrix, Matrix]], asked: Sequence[Asked]
) -> dict[str, float]:
    """By how much the measured divergence exceeds the estimate, for each kind of matrix."""
    torch = require("torch", "train")
    parameters = {canonical(name): value for name, value in runtime.model.named_parameters()}
    kinds: dict[str, list[tuple[PlannedMatrix, Matrix]]] = {}
    for matrix, given in found:
        kinds.setdefault(kind(matrix.source), []).append((matrix, given))

    expected, scales = answers(runtime, asked), {}
    for name in fitted.source.weights.changed & parameters.keys():  # another form of the same function
        parameters[name].data.copy_(torch.from_numpy(fitted.source.weights.read(name)))
    for label, members in console.track(sorted(kinds.items()), "measuring"):
        given_types = [{option.type for option in given.options} for _, given in members]
        probe = next((type_ for type_ in fitted.to.probes if all(type_ in types for types in given_types)), None)
        estimate = sum(o.damage for _, m in members for o in m.options if o.type == probe)
        kept: dict[Any, Any] = {}
        for matrix, _ in members if probe else ():
            parameter = parameters[matrix.source]
            if parameter in kept:  # a tied matrix that an export stores twice
                continue
            kept[parameter] = parameter.data.clone()
            rounded = fitted.rounded(matrix)(parameter.data.float().cpu().numpy(), str(probe))
            parameter.data.copy_(torch.from_numpy(rounded))
        moved = map(compare_logits, expected, answers(runtime, asked))
        measured = np.concatenate([tokens.kld for tokens in moved]).mean()
        for parameter, values in kept.items():
            parameter.data.copy_(values)
        scales[label] = float(measured / estimate) if probe and estimate > 0 else 1.0
    return scales
