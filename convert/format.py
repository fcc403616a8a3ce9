"""What a format brings to plans: planning, searching, fitting and quantising by plan are the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from ldrt_edge import artifact
from ldrt_edge.convert.fallbacks import Quantized
from ldrt_edge.convert.source import Source
from ldrt_edge.convert.type_plan import FormatName, PlannedMatrix, TypePlan
from ldrt_edge.runtimes.base import FloatArray

if TYPE_CHECKING:
    from ldrt_edge.convert.calibration import Calibration

WORK = ".work"


class Format(Protocol):
    """A format that plans are made for.

    probes: types to which a kind of matrix is rounded when its damage is measured, the first that all rows admit.
    files: shell pattern of the files that hold the weights.
    calibration: what the language model's weights are fitted to before they are rounded.
    """

    name: ClassVar[FormatName]
    probes: ClassVar[tuple[str, ...]]
    files: ClassVar[str]

    @property
    def calibration(self) -> Calibration | None:
        """See above."""

    def config(self) -> dict[str, str]:
        """What the manifest is to say beside the plan."""

    def inputs(self) -> list[artifact.Input]:
        """What an export is made from beside the model."""

    def pictures(self) -> dict[Path, frozenset[str] | None]:
        """The pictures that each of these showed the model, by sha256; None where it does not say."""

    def matrices(self, source: Source) -> dict[str, list[PlannedMatrix]]:
        """The matrices that a plan gives types, by part."""

    def fixed_bytes(self, source: Source) -> int:
        """Bytes of all other tensors."""

    def types(self, part: str, name: str) -> Sequence[str]:
        """The types that a matrix could have if its rows divided into them."""

    def rounded(self, name: str, rows: FloatArray, type_: str, columns: slice = slice(None)) -> FloatArray:
        """Rows of a matrix, (rows, row length) float32, as they would come back from the export.

        columns: those that are wanted, whole blocks.
        """

    def fitted_by(self, calibration: Calibration | None) -> Self:
        """The same with another calibration."""

    def preset(self, source: Source, type_: str) -> TypePlan:
        """The plan of one of its own tools' presets.

        Raises:
            ConfigError: an unknown one.
        """

    def rescaled(self, columns: Mapping[str, FloatArray]) -> Self:
        """The same for weights whose columns were multiplied by these, by the matrices' names."""

    def write(self, source: Source, plan: TypePlan, folder: Path, work: Path) -> Quantized:
        """Write a plan's export with its front end into a folder, going on from what a killed run left there.

        work: keeps what several plans can be written from.

        Raises:
            ConfigError: the plan does not fit the model.
            ArtifactError: the disk is too small, or the format's own quantiser failed.
        """


def feeds_back(to: Format) -> bool:
    """Whether weights make good for each other's rounding."""
    return to.calibration is not None and to.calibration.feedback
