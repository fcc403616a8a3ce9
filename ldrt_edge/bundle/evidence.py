"""What a report measured of a model, as far as a bundle repeats it, and whether that releases the model.

The whole report travels in the bundle; here are the figures that its statement, card and bill of materials show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldrt_edge import artifact
from ldrt_edge.artifact import Manifest
from ldrt_edge.bundle.statement import Metric
from ldrt_edge.errors import ArtifactError
from ldrt_edge.front_config import read_json
from ldrt_edge.release import Verdict, read_verdict

REPORT = "report.json"
_SCHEMA = "ldrt-edge/report/1"


@dataclass(frozen=True)
class Origin:
    """A model or a dataset by its folder's name and its manifest's sha256."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Evidence:
    """Read from a report.

    reference: the model that the loss was measured against. questions, images: how much was asked. sources, licences:
    of the data. processor: where it was measured. released, verdict: see `_judge`.
    """

    report_sha256: str
    metrics: tuple[Metric, ...]
    dataset: Origin
    reference: Origin | None
    questions: int
    images: int
    sources: tuple[str, ...]
    licences: tuple[str, ...]
    processor: str
    released: bool
    verdict: str


def read_evidence(report: Path, model: Manifest, max_loss: float) -> Evidence:
    """Read the report about a model, by its manifest; it is released if it lost at most `max_loss` points.

    Raises:
        ArtifactError: no report, not this version's, or one about another model.
    """
    manifest = artifact.verify(report, "report")
    data = read_json(report / REPORT)
    try:
        if data["schema"] != _SCHEMA:
            raise ArtifactError(f"{report}: schema {data['schema']}, this version reads {_SCHEMA}")
        subject, dataset, vqa = data["subject"], data["dataset"], data["vqa"]
        if subject["manifest_sha256"] != model.sha256:
            raise ArtifactError(
                f"{report} is about {subject['name']} ({subject['manifest_sha256'][:12]}…), not about this model "
                f"({model.sha256[:12]}…): bench it, and pass that report"
            )
        released, verdict = _judge(read_verdict(model.metrics), vqa["loss"], max_loss)
        return Evidence(
            report_sha256=manifest.sha256,
            metrics=tuple(_metrics(vqa, data["fidelity"])),
            dataset=Origin(dataset["name"], dataset["manifest_sha256"]),
            reference=_origin(data["reference"]),
            questions=int(dataset["questions"]),
            images=int(dataset["images"]),
            sources=tuple(dataset["sources"]),
            licences=tuple(dataset["licences"]),
            processor=str(data["environment"]["processor"]),
            released=released,
            verdict=verdict,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{report / REPORT}: not a report that this version reads ({error!r})") from error


def _judge(own: Verdict | None, loss: Mapping[str, float] | None, max_loss: float) -> tuple[bool, str]:
    """Released when even the upper bound of the loss's 95% interval lies within the budget, in percentage points.

    And not against the verdict that `quantize --max-loss` left in the model's manifest, which is told beside.
    """
    if own is not None and not own.released:
        return False, f"not released: when it was quantised: {own.reason}"
    if loss is None:
        return False, "not released: its loss was not measured, for the report has no reference model"
    value, low, high = (100 * loss[name] for name in ("value", "ci_low", "ci_high"))
    measured = f"loss {value:+.1f} points (95% interval {low:+.1f} to {high:+.1f}), allowed {max_loss:g}"
    measured += f"; its gate, when it was quantised: {own.reason}" if own else ""
    return (True, f"released: {measured}") if high <= max_loss else (False, f"not released: {measured}")


def _metrics(vqa: Mapping[str, Any], fidelity: Mapping[str, Any] | None) -> list[Metric]:
    found = [
        _interval("accuracy", vqa["overall"]["accuracy"]),
        _interval("accuracy with a wrong picture of the same kind", vqa["blind"]["accuracy"]),
        _interval("accuracy with any wrong picture", vqa["blind_any"]["accuracy"]),
        _interval("worth of the picture", vqa["image_gain"]),
    ]
    if vqa["overall"]["token_f1"]:
        found.append(_interval("token F1 of open answers", vqa["overall"]["token_f1"]))
    if vqa["loss"]:
        found.append(_interval("loss against the reference", vqa["loss"]))
    if vqa["flips"]:
        rate = vqa["flips"]
        found.append(Metric("answers changed", rate["rate"], rate["ci_low"], rate["ci_high"]))
    if fidelity:
        found.append(Metric("mean KLD to the reference, nats", fidelity["mean_kld"]))
        found.append(Metric("same top token as the reference", fidelity["top1_agreement"]))
    return found


def _interval(name: str, found: Mapping[str, float]) -> Metric:
    return Metric(name, found["value"], found["ci_low"], found["ci_high"])


def _origin(model: Mapping[str, str] | None) -> Origin | None:
    return Origin(model["name"], model["manifest_sha256"]) if model else None
