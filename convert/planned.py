"""`ldrt-edge quantize --plan`: a merged LLaVA folder to an export in which every matrix has the type of a plan.

Planning, searching and quantising by plan are the same for every format; what a format brings to them is `Format`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from ldrt_edge import artifact, console
from ldrt_edge.convert.fallbacks import Quantized, report
from ldrt_edge.convert.gguf import identity
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.source import Source, open_source
from ldrt_edge.convert.type_plan import FormatName, PlannedMatrix, TypePlan
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import DataError
from ldrt_edge.runtimes.base import FloatArray
from ldrt_edge.train.data.split import check_leakage

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

    def rescaled(self, columns: Mapping[str, FloatArray]) -> Self:
        """The same for weights whose columns were multiplied by these, by the matrices' names."""

    def write(self, source: Source, plan: TypePlan, folder: Path, work: Path) -> Quantized:
        """Write a plan's export with its front end into a folder, going on from what a killed run left there.

        work: keeps what several plans can be written from.

        Raises:
            ConfigError: the plan does not fit the model.
            ArtifactError: the disk is too small, or the format's own quantiser failed.
        """


def check_held_out(data: Path, to: Format) -> None:
    """Refuse to plan for held-out questions by their own pictures.

    data: a dataset artefact, whose training rows plan and whose test rows judge. What does not say which pictures it
    is of is named in one line.

    Raises:
        DataError: training rows, or what the format was given, have pictures of test rows.
    """
    dataset = Dataset(data)
    check_leakage(dataset)
    held_out = {row.image_sha256 for row in dataset.rows("test")}
    for folder, shown in to.pictures().items():
        if shown is None:
            console.say(f"note: {folder} does not say which pictures it is of: those that judge must not be among them")
        elif shared := len(held_out & shown):
            raise DataError(f"{folder} is of {shared} pictures that {data} holds out to judge by: measure it on others")


def quantize_planned(merged: Path, out: Path, plan: TypePlan, to: Format) -> Path:
    """Quantise a merged or base folder by a plan; returns `out`, an artefact of the format's kind.

    Raises:
        ConfigError: the plan does not fit the model.
        ArtifactError: the folder cannot become an export, the disk is too small, or the quantiser failed.
    """
    config = {"to": to.name, "plan": plan.parts, **to.config()}
    with artifact.create(out, to.name, config, [identity(merged), *to.inputs()], resumable=True) as draft:
        if not draft.complete:
            work = draft.path / WORK
            result = to.write(open_source(merged), plan, draft.path, work)
            shutil.rmtree(work, ignore_errors=True)
            report(result, "plan")
            draft.metrics["quantized"] = asdict(result)
            draft.metrics["fidelity"] = asdict(check(merged, draft.path, fed_back="feedback" in config))
    return out
