"""The bench stage: what a converted model can do, and what the conversion cost.

    edge/ (+ reference/) + dataset/  →  report/ (report.json, report.html, samples.jsonl)

It asks every question (`vqa`), sums up (`schema`), times the model alone (`latency`) and draws the page (`page`). The
answers are journalled, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ldrt_edge import __version__, artifact, console
from ldrt_edge.bench.fidelity import fidelity
from ldrt_edge.bench.latency import measure, weights
from ldrt_edge.bench.metrics import overlap_installed
from ldrt_edge.bench.page import render
from ldrt_edge.bench.schema import SCHEMA, DatasetIdentity, Environment, ModelIdentity, Report, summarise
from ldrt_edge.bench.vqa import Model, Sample, answer_rows, draw_controls
from ldrt_edge.dataset import Dataset, Row, Split, choose_rows
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.front import Front
from ldrt_edge.machine import processor_name
from ldrt_edge.runtimes.base import load
from ldrt_edge.runtimes.processor import physical_cores

REPORT, PAGE, SAMPLES = "report.json", "report.html", "samples.jsonl"


def bench(
    edge: Path,
    data: Path,
    out: Path,
    reference: Path | None = None,
    *,
    split: Split = "test",
    limit: int | None = None,
    threads: int | None = None,
    runs: int = 5,
    seed: int = 0,
    margin: float = 1.0,
) -> Path:
    """Measure the model in `edge` on a dataset, beside the model it was made from, and write a report artefact.

    Args:
        edge: the subject: a gguf, mlx, merged or base artefact.
        data: a dataset artefact.
        out: the report artefact to write.
        reference: the merged (or base) model for loss, flips and fidelity; without it these are null.
        split: which rows to ask.
        limit: about how many questions, as whole pictures; None for all.
        threads: CPU threads; None for one a physical core.
        runs: timings that count; 0 leaves latency out (null).
        seed: of the wrong pictures, the choice of pictures and the intervals.
        margin: points of accuracy; a loss within it counts as none (non-inferiority).

    Raises:
        ConfigError: an option is out of range.
        ArtifactError: a folder is of another kind, or incomplete.
        DataError: no rows, one picture only, an unreadable picture, a question longer than the context.
    """
    if runs < 0 or (limit is not None and limit < 1) or (threads is not None and threads < 1):
        raise ConfigError("bench wants --runs of at least 0, --limit and --threads of at least 1")
    if not 0 < margin <= 100:
        raise ConfigError("--margin wants more than 0 points, and at most 100")
    artifact.read(edge, "gguf", "mlx", "merged", "base")
    if reference:
        artifact.read(reference, "merged", "base")
    dataset = Dataset(data)
    rows = _questions(dataset, split, limit, seed)
    settings = _Settings(split, limit, threads or physical_cores(), runs, seed, margin)
    inputs = [edge, data, *([reference] if reference else [])]
    config = asdict(settings) | {"overlap": overlap_installed()}
    with artifact.create(out, "report", config, inputs, seed, resumable=True) as draft:
        if draft.complete:
            return out
        if not config["overlap"]:
            console.say("ROUGE-L and chrF are left out; for them: pip install 'ldrt-edge[bench]', and another --out")
        environment = _environment(settings, _command(edge, data, out, reference, settings))
        samples = _ask(edge, reference, dataset, rows, draft.path / SAMPLES, settings)
        vqa = summarise(samples, (row for row in dataset if row.split != split), seed, margin / 100)
        report = Report(
            schema=SCHEMA,
            subject=_model(edge),
            reference=_model(reference) if reference else None,
            dataset=_dataset(dataset, split, rows),
            environment=environment,
            vqa=vqa,
            fidelity=fidelity(samples),
            latency=measure(edge, data, split, runs, settings.threads, seed) if runs else None,
        )
        text = json.dumps(asdict(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (draft.path / REPORT).write_text(text, encoding="utf-8")
        (draft.path / PAGE).write_text(render(report, samples, dataset, rows), encoding="utf-8")
        draft.metrics.update(
            accuracy=vqa.overall.accuracy.value,
            blind=vqa.blind.accuracy.value,
            loss=vqa.loss.value if vqa.loss else None,
            mean_kld=report.fidelity.mean_kld if report.fidelity else None,
        )
    return out


@dataclass(frozen=True)
class _Settings:
    """The resolved options."""

    split: Split = "test"
    limit: int | None = None
    threads: int = 1
    runs: int = 5
    seed: int = 0
    margin: float = 1.0


def _questions(dataset: Dataset, split: Split, limit: int | None, seed: int) -> list[Row]:
    asked = dataset.rows(split)
    if not asked:
        raise DataError(f"{dataset.folder}: no rows in split {split!r}: choose another --split")
    if len({row.id for row in asked}) < len(asked):
        raise DataError(f"{dataset.folder}: some row ids occur twice: make the dataset anew")
    return choose_rows(asked, limit, seed)


def _ask(
    edge: Path, reference: Path | None, dataset: Dataset, rows: Sequence[Row], journal: Path, settings: _Settings
) -> list[Sample]:
    controls = draw_controls(rows, settings.seed)
    subject = _load(edge, settings.threads)
    expected = _load(reference, settings.threads) if reference else None
    try:
        return answer_rows(subject, dataset, rows, controls, expected, journal)
    finally:
        subject.runtime.close()
        if expected:
            expected.runtime.close()


def _load(folder: Path, threads: int) -> Model:
    return Model(load(folder, threads=threads), Front.load(folder))


def _model(folder: Path) -> ModelIdentity:
    manifest = artifact.read(folder)
    return ModelIdentity(
        folder.resolve().name, manifest.kind, manifest.sha256, manifest.version, manifest.git_commit, weights(folder)
    )


def _dataset(dataset: Dataset, split: str, rows: Sequence[Row]) -> DatasetIdentity:
    return DatasetIdentity(
        name=dataset.folder.resolve().name,
        manifest_sha256=dataset.manifest.sha256,
        split=split,
        questions=len(rows),
        images=len({row.image for row in rows}),
        groups=len({row.group for row in rows}),
        sources=tuple(sorted({row.source for row in rows})),
        licences=tuple(sorted({row.licence for row in rows})),
    )


def _command(edge: Path, data: Path, out: Path, reference: Path | None, settings: _Settings) -> str:
    """What to type for this report again. Folders go by their names alone: a path may name a person."""
    words = ["ldrt-edge", "bench", edge.resolve().name, "--data", data.resolve().name, "--out", out.resolve().name]
    words += ["--reference", reference.resolve().name] if reference else []
    standard = _Settings(threads=0)
    for name, value in asdict(settings).items():
        if value != getattr(standard, name):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _environment(settings: _Settings, command: str) -> Environment:
    return Environment(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        platform=platform.platform(),
        processor=processor_name(),
        cores_physical=psutil.cpu_count(logical=False) or 0,
        cores_logical=psutil.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        load_average=psutil.getloadavg(),
        threads=settings.threads,
        seed=settings.seed,
        limit=settings.limit,
        version=__version__,
        git_commit=artifact.git_commit(),
        libraries=artifact.library_versions(),
        command=command,
    )
