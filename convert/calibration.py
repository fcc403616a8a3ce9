"""What the language model's weights are fitted to before they are rounded, and how: rescaled, then with feedback.

Both change weights and nothing else: an export has the same tensors of the same types in as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from ldrt_edge import artifact
from ldrt_edge.convert.awq import search
from ldrt_edge.convert.feedback import Compensated, Rounding, compensated, gains
from ldrt_edge.convert.moments import Moments, measure
from ldrt_edge.convert.rescale import SCALES, Rescaled, Scales, read_scales, write_scales
from ldrt_edge.convert.source import Source
from ldrt_edge.convert.type_plan import PlannedMatrix, block_weights
from ldrt_edge.dataset import Dataset, Row, choose_rows
from ldrt_edge.errors import DataError
from ldrt_edge.runtimes.base import FloatArray

if TYPE_CHECKING:
    from ldrt_edge.convert.format import Format

F = TypeVar("F", bound="Format")


@dataclass(frozen=True)
class Calibration:
    """Training rows, and what is done with what they show.

    limit: about how many. undecided: whether that is still to be tried (`fit`).
    """

    data: Path
    rescale: bool = False
    feedback: bool = False
    limit: int = 96
    seed: int = 0
    threads: int | None = None
    undecided: bool = False

    def config(self) -> dict[str, str]:
        """For the manifest: about how many rows each was told by."""
        if self.undecided:
            return {"fit": str(self.limit)}
        return {name: str(self.limit) for name in ("rescale", "feedback") if getattr(self, name)}

    def inputs(self) -> list[artifact.Input]:
        """For the manifest."""
        return [artifact.identity(self.data)]

    def pictures(self) -> dict[Path, frozenset[str] | None]:
        """The pictures that weights are fitted to, by sha256."""
        return {self.data: frozenset(row.image_sha256 for row in self.rows())}

    def rows(self) -> list[Row]:
        """The rows that weights are fitted to.

        Raises:
            DataError: no training rows.
        """
        rows = Dataset(self.data).rows("train")
        if not rows:
            raise DataError(f"{self.data}: no rows in split 'train': weights are not fitted to test rows")
        return choose_rows(rows, self.limit, self.seed)

    def for_plans(self) -> Calibration:
        """The same with half of the training rows at most, so that a plan can be tried on others."""
        return replace(self, limit=min(self.limit, len(Dataset(self.data).rows("train")) // 2))

    def fitted(
        self, source: Source, to: F, matrices: Sequence[PlannedMatrix], types: Mapping[str, str], work: Path,
        folder: Path | None = None,
    ) -> Fitted[F]:
        """Measure, and choose scales for types.

        matrices: of the language model. types: by their names. work: keeps what was measured. folder: of the export,
        which gets the scales, or has them from a killed run.

        Raises:
            ArtifactError: the disk is too small.
            DataError: no training rows, or one that cannot be asked.
        """
        moments = measure(source, self.data, self.rows(), work / f"moments-{self.limit}", self.seed, self.threads)
        if self.rescale:
            scales: Scales
            if folder is not None and (folder / SCALES).exists():
                scales = read_scales(source, folder / SCALES)
            else:
                scales = search(source, to, matrices, types, moments)
                if folder is not None:
                    write_scales(scales, folder / SCALES)
            weights = Rescaled(source, scales)
            source, moments = replace(source, weights=weights), moments.rescaled(weights.columns)
            to = to.rescaled({m.name: weights.columns[m.source] for m in matrices if m.source in weights.columns})
        return Fitted(source, to, moments, self.feedback)


@dataclass(frozen=True)
class Fitted(Generic[F]):
    """What a calibration has made: the source, rescaled or as it was, and what goes with it.

    to: the format that rounds it. moments: of its inputs, if any were measured. feedback: whether rounding is fed back.
    """

    source: Source
    to: F
    moments: Moments = field(default_factory=Moments)
    feedback: bool = False

    def exported(self, matrices: Sequence[PlannedMatrix], types: Mapping[str, str]) -> Source:
        """The source with the weights that an export of these types gets."""
        if not self.feedback:
            return self.source
        given: dict[str, set[str]] = {}
        for matrix in matrices:
            given.setdefault(matrix.source, set()).add(types[matrix.name])
        planned = {
            matrix.source: self._rounding(matrix.name, types[matrix.name]) for matrix in matrices
            if types[matrix.name].lower() != "f16" and len(given[matrix.source]) == 1  # a tied one may be stored twice
        }  # fmt: skip
        return replace(self.source, weights=Compensated(self.source.weights, self.moments, planned))

    def rounded(self, matrix: PlannedMatrix) -> Callable[[FloatArray, str], FloatArray]:
        """How rows of a matrix of the source, (rows, row length), come back from an export in which it has a type."""
        behind: dict[int, list[FloatArray]] = {}

        def rounded(rows: FloatArray, type_: str) -> FloatArray:
            rounding = self._rounding(matrix.name, type_)
            if self.feedback and matrix.source in self.moments and type_.lower() != "f16":
                if rounding.block not in behind:
                    behind[rounding.block] = gains(self.moments[matrix.source], rounding.block)
                rows = compensated(rows, behind[rounding.block], rounding)
            return rounding.rounded(rows, slice(None))

        return rounded

    def unscaled(self, matrix: PlannedMatrix, values: FloatArray, rows: slice) -> FloatArray:
        """Rows of a matrix of the source, or what was added to them, as they belong to the checkpoint's own."""
        weights = self.source.weights
        return weights.unscaled(matrix.source, values, rows) if isinstance(weights, Rescaled) else values

    def _rounding(self, name: str, type_: str) -> Rounding:
        return Rounding(block_weights(type_), lambda rows, columns: self.to.rounded(name, rows, type_, columns))
