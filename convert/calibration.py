"""What the language model's weights are fitted to before they are rounded, and how: rescaled, then with feedback.

Both change weights and nothing else: an export has the same tensors of the same types in as many bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ldrt_edge import artifact
from ldrt_edge.convert.awq import search
from ldrt_edge.convert.feedback import Compensated, Rounding
from ldrt_edge.convert.moments import measure
from ldrt_edge.convert.rescale import SCALES, Rescaled, read_scales, write_scales
from ldrt_edge.convert.source import Source
from ldrt_edge.convert.type_plan import PlannedMatrix, block_weights

if TYPE_CHECKING:
    from ldrt_edge.convert.planned import Format

F = TypeVar("F", bound="Format")


@dataclass(frozen=True)
class Calibration:
    """Training rows, and what is done with what they show. limit: about how many."""

    data: Path
    rescale: bool = False
    feedback: bool = False
    limit: int = 32
    seed: int = 0
    threads: int | None = None

    def config(self) -> dict[str, str]:
        """For the manifest: about how many rows each was told by."""
        return {name: str(self.limit) for name in ("rescale", "feedback") if getattr(self, name)}

    def inputs(self) -> list[artifact.Input]:
        """For the manifest."""
        return [artifact.identity(self.data)]

    def fitted(
        self, source: Source, to: F, matrices: Sequence[PlannedMatrix], types: Mapping[str, str], folder: Path,
        work: Path,
    ) -> tuple[Source, F]:
        """The source with changed weights, and the format that rounds them.

        matrices: of the language model. types: by their names. folder: of the export, which gets the scales, or has
        them from a killed run. work: keeps what was measured.

        Raises:
            ArtifactError: the disk is too small.
            DataError: no training rows, or one that cannot be asked.
        """
        moments = measure(source, self.data, work / "moments", self.limit, self.seed, self.threads)
        if self.rescale:
            if not (folder / SCALES).exists():
                write_scales(search(source, to, matrices, types, moments), folder / SCALES)
            weights = Rescaled(source, read_scales(source, folder / SCALES))
            source, moments = replace(source, weights=weights), moments.rescaled(weights.columns)
            to = to.rescaled({m.name: weights.columns[m.source] for m in matrices if m.source in weights.columns})
        if self.feedback:
            rounded = [matrix for matrix in matrices if types[matrix.name].lower() != "f16"]
            planned = {matrix.source: _rounding(to, matrix.name, types[matrix.name]) for matrix in rounded}
            source = replace(source, weights=Compensated(source.weights, moments, planned))
        return source, to


def _rounding(to: Format, name: str, type_: str) -> Rounding:
    return Rounding(block_weights(type_), lambda values, start: to.rounded(name, values, type_, start))
