"""`ldrt-edge quantize --plan`: a merged LLaVA folder to an export in which every matrix has the type of a plan."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from ldrt_edge import artifact, console
from ldrt_edge.convert.fallbacks import report
from ldrt_edge.convert.fit import decided
from ldrt_edge.convert.format import WORK, Format, feeds_back
from ldrt_edge.convert.gguf import identity
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import TypePlan
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import DataError
from ldrt_edge.train.data.split import check_leakage


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
        DataError: a calibration has too few pictures, or a row that cannot be asked.
    """
    config = {"to": to.name, "plan": plan.parts, **to.config()}
    with artifact.create(out, to.name, config, [identity(merged), *to.inputs()], resumable=True) as draft:
        if not draft.complete:
            source, work = open_source(merged), draft.path / WORK
            to, fit = decided(to, source, draft.path, plan)
            result = to.write(source, plan, draft.path, work)
            shutil.rmtree(work, ignore_errors=True)
            report(result, "plan")
            draft.metrics["quantized"] = asdict(result)
            draft.metrics |= fit
            draft.metrics["fidelity"] = asdict(check(merged, draft.path, fed_back=feeds_back(to)))
    return out
