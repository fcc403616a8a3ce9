"""A report of `bench`, read back: what others compare, judge or export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldrt_edge import artifact
from ldrt_edge.artifact import Json
from ldrt_edge.bench.report import REPORT, SAMPLES
from ldrt_edge.bench.schema import SCHEMA
from ldrt_edge.bench.vqa import Sample, read_samples
from ldrt_edge.errors import ArtifactError
from ldrt_edge.front_config import read_json


@dataclass(frozen=True, eq=False)
class Opened:
    """dataset, reference: name and manifest's sha256; samples by id; data: the whole of report.json.

    answer_tokens: of an answer at most, None in reports of before it was told.
    """

    name: str
    manifest_sha256: str
    data: Json
    dataset: tuple[str, str]
    split: str
    rules: int
    answer_tokens: int | None
    reference: tuple[str, str] | None
    samples: Mapping[str, Sample]

    def model_names(self) -> dict[str, str]:
        """The models behind the roles of `vqa.answers`: subject, reference, and others by their own names."""
        names = {role: self.data[role]["name"] for role in ("subject", "reference") if self.data[role]}
        first = next(iter(self.samples.values()), None)
        return names | {name: name for name in (first.others if first else ())}


def open_report(folder: Path, name: str | None = None) -> Opened:
    """Read a report artefact that `bench` wrote; `name` it otherwise than by its folder.

    Raises:
        ArtifactError: it is none, was changed, or is of another version.
    """
    manifest = artifact.verify(folder, "report")
    if not (folder / REPORT).is_file() or not (folder / SAMPLES).is_file():
        raise ArtifactError(f"{folder}: no report of `ldrt-edge bench`: it has no {REPORT} with {SAMPLES}")
    data = read_json(folder / REPORT)
    try:
        if data["schema"] != SCHEMA:
            raise ArtifactError(f"{folder}: schema {data['schema']}, this version reads {SCHEMA}")
        dataset, reference = data["dataset"], data["reference"]
        return Opened(
            name=name or folder.resolve().name,
            manifest_sha256=manifest.sha256,
            data=data,
            dataset=(dataset["name"], dataset["manifest_sha256"]),
            split=dataset["split"],
            rules=data["vqa"].get("rules", 1),
            answer_tokens=manifest.config.get("answer_tokens"),
            reference=(reference["name"], reference["manifest_sha256"]) if reference else None,
            samples={sample.id: sample for sample in read_samples(folder / SAMPLES)},
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{folder}: not a report that this version reads ({error!r})") from error
