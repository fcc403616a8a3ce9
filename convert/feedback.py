"""`ldrt-edge quantize --feedback`: what rounding takes from a block of weights, the blocks behind it give back.

Rounding a matrix by E costs the answers about Σ e H eᵀ over the rows e of E, with

    H = Σ_t c_t xₜ xₜᵀ,    c_t = ½ ‖gₜ‖² / answer tokens

of whose diagonal `sensitivity` makes its estimates. Inputs go together; so the error of one block of a row can be made
good by its other weights, before those are rounded themselves: W_rest += E_block H_block,rest H_rest,rest⁻¹.

The blocks are a type's own, and the format's own quantiser rounds each. Given the changed weights, it rounds them just
so again: nothing about the files or their making is special.

Source: Frantar et al., "GPTQ", ICLR 2023 (column by column; here whole blocks); Kim et al., "GuidedQuant", ICML 2025
(the weights c_t, which here come from answers that the model draws itself).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from ldrt_edge.convert.gguf import check_room
from ldrt_edge.convert.planned import Format
from ldrt_edge.convert.sensitivity import Asked, gradients, linears, questions
from ldrt_edge.convert.source import EMBEDDINGS, HEAD, Source, is_tied
from ldrt_edge.convert.type_plan import PlannedMatrix, block_weights
from ldrt_edge.convert.weights import Weights
from ldrt_edge.runtimes.base import FloatArray
from ldrt_edge.runtimes.hf import HfRuntime

_LANGUAGE = ("language_model.", HEAD)
_DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: GPTQ's."""
_MEMORY_SHARE = 0.5

Rounded = Callable[[FloatArray, int], FloatArray]
"""Columns of a matrix, (rows, block) float32, and the number of the first: as they come back from the export."""


@dataclass(frozen=True)
class Feedback:
    """Which training rows tell what goes together. limit: about how many."""

    data: Path
    limit: int = 32
    seed: int = 0
    threads: int | None = None

    def measure(self, source: Source, folder: Path) -> None:
        """Write H of every matrix of the language model into `folder`, float32; what is there is not done again.

        The rows are read again for as many matrices as memory holds.

        Raises:
            ArtifactError: the disk is too small.
            DataError: no training rows, or one that cannot be asked.
        """
        folder.mkdir(parents=True, exist_ok=True)
        missing = {n: width for n, width in _widths(source).items() if not moments_path(folder, n).exists()}
        if not missing:
            return
        check_room(folder, 4 * sum(width**2 for width in missing.values()))
        runtime = HfRuntime(source.folder, threads=self.threads)
        try:
            asked = questions(runtime, self.data, self.limit, self.seed)
            for names in _batches(missing, int(_MEMORY_SHARE * _free_bytes(runtime))):
                for name, moments in _moments(runtime, source, names, asked, self.seed).items():
                    part = moments_path(folder, name).with_suffix(".part")
                    with part.open("wb") as stream:
                        np.save(stream, moments)
                    part.rename(moments_path(folder, name))
        finally:
            runtime.close()


class Rounding(NamedTuple):
    """How a matrix will be rounded: its type's block, and the format's quantiser."""

    block: int
    rounded: Rounded


class Compensated(Weights):
    """A checkpoint's weights, changed so that what rounding takes from a block is given back behind it.

    roundings: by the checkpoint's names; other tensors, and those without moments in `folder`, are as they were.
    """

    def __init__(self, weights: Weights, folder: Path, roundings: Mapping[str, Rounding]) -> None:
        self.folder, self.entries = weights.folder, weights.entries
        self._moments, self._roundings = folder, roundings
        self._last: tuple[str, list[FloatArray]] = ("", [])

    def dtypes(self) -> set[str]:
        """What changed is float32."""
        return {"F32"}

    def read(self, name: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        """One tensor, or some of its rows, as float32."""
        values = super().read(name, rows)
        rounding = self._roundings.get(name)
        if rounding is None or not moments_path(self._moments, name).exists():
            return values
        if self._last[0] != name:
            self._last = name, gains(np.load(moments_path(self._moments, name)), rounding.block)
        return compensated(values, self._last[1], rounding)


def with_feedback(
    source: Source, feedback: Feedback, to: Format, matrices: Sequence[PlannedMatrix], types: Mapping[str, str],
    work: Path,
) -> Source:
    """A source whose weights are `Compensated` for the types that an export's matrices will have.

    work: keeps what was measured.

    Raises:
        ArtifactError, DataError: see `Feedback.measure`.
    """
    feedback.measure(source, work / "moments")

    def rounding(matrix: PlannedMatrix) -> Rounding:
        type_ = types[matrix.name]
        return Rounding(block_weights(type_), lambda values, start: to.rounded(matrix.name, values, type_, start))

    planned = {matrix.source: rounding(matrix) for matrix in matrices if types[matrix.name].lower() != "f16"}
    return replace(source, weights=Compensated(source.weights, work / "moments", planned))


def compensated(values: FloatArray, behind: list[FloatArray], rounding: Rounding) -> FloatArray:
    """Rows (rows, row length) whose blocks, rounded one after the other, make good for each other's errors.

    behind: see `gains`.
    """
    changed, block = values.copy(), rounding.block
    for i, gain in enumerate(behind):
        start, end = i * block, (i + 1) * block
        error = changed[:, start:end] - rounding.rounded(np.ascontiguousarray(changed[:, start:end]), start)
        changed[:, end:] += error @ gain
    return changed


def gains(moments: FloatArray, block: int) -> list[FloatArray]:
    """For each block but the last, what its error asks of the weights behind: (block, columns behind)."""
    from scipy.linalg import solve_triangular

    width = len(moments)
    damped = moments.astype(np.float64) + np.eye(width) * max(_DAMPING * np.trace(moments) / width, 1e-30)
    # moments = R Rᵀ with R upper triangular, so that H_block,rest H_rest,rest⁻¹ = R_block,rest R_rest,rest⁻¹
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return [
        solve_triangular(upper[end:, end:], upper[start:end, end:].T, trans="T").T.astype(np.float32)
        for start, end in pairwise(range(0, width, block))
    ]


def moments_path(folder: Path, name: str) -> Path:
    """Where H of a matrix is, by its name in the checkpoint."""
    return folder / f"{name}.npy"


def _widths(source: Source) -> dict[str, int]:
    """Row lengths of the language model's matrices; an embedding table that is no head has one input at a time."""
    entries = source.weights.entries
    left_out = HEAD if is_tied(source) else EMBEDDINGS
    names = [name for name in entries if name.startswith(_LANGUAGE) and name != left_out]
    return {name: entries[name].shape[1] for name in names if len(entries[name].shape) == 2}


def _batches(widths: Mapping[str, int], room_bytes: int) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for name, width in widths.items():
        if batch and held + 4 * width**2 > room_bytes:
            yield batch
            batch, held = [], 0
        batch.append(name)
        held += 4 * width**2
    yield batch


def _moments(
    runtime: HfRuntime, source: Source, wanted: Sequence[str], asked: Sequence[Asked], seed: int
) -> dict[str, NDArray[np.float32]]:
    """H of each wanted matrix, (row length, row length)."""
    tokens, tied = sum(len(answer) for _, answer in asked), is_tied(source)
    sums: dict[str, Any] = {}

    def see(name: str, inputs: Any, gradient: Any) -> None:
        weighted = inputs * (gradient.square().sum(-1, keepdim=True) / (2 * tokens))
        sums[name] = sums[name].addmm_(weighted.T, inputs) if name in sums else weighted.T @ inputs

    names = {HEAD if tied and name == EMBEDDINGS else name: name for name in wanted}
    with linears(runtime, names, see):
        for words in gradients(runtime, asked, seed, "feedback"):
            if tied and EMBEDDINGS in sums:  # as a table, its rows are read one at a time
                sums[EMBEDDINGS].diagonal().add_(words.square().sum(0) / (2 * tokens))
    return {name: value.cpu().numpy() for name, value in sums.items()}


def _free_bytes(runtime: HfRuntime) -> int:
    device = runtime.model.device
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
