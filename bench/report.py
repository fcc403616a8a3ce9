"""The bench stage: what a converted model can do, and what the conversion cost.

    edge/ (+ reference/, others/) + dataset/  →  report/ (report.json, report.html, samples.jsonl, …)

It asks every model every question (`vqa`), probes what each makes up (`probes`), times the exports alone (`latency`),
sums up (`schema`, `ladder`) and draws the page (`page`). The answers are journalled, so a killed run goes on where it
stopped.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from ldrt_edge import __version__, artifact, console
from ldrt_edge.bench.course import follow, parts
from ldrt_edge.bench.hallucination import hedging
from ldrt_edge.bench.ladder import EXPORTS, climb
from ldrt_edge.bench.latency import Latency, further_threads, measure, weights
from ldrt_edge.bench.metrics import overlap_installed
from ldrt_edge.bench.page import render
from ldrt_edge.bench.probes import Probe, probe
from ldrt_edge.bench.schema import SCHEMA, DatasetIdentity, Environment, ModelIdentity, Report, summarise
from ldrt_edge.bench.similarity import similarity_installed
from ldrt_edge.bench.vqa import ANSWER_TOKENS, Controls, Model, Sample, answer_rows, draw_controls, write_samples
from ldrt_edge.dataset import Dataset, Row, Split, choose_rows
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.front import Front
from ldrt_edge.golden import GOLDEN
from ldrt_edge.machine import processor_name
from ldrt_edge.runtimes.base import load
from ldrt_edge.runtimes.processor import physical_cores

BRANCHES = 16
"""Questions about one picture that run side by side, where the runtime can; more gain little on a laptop's cores."""
REPORT, PAGE, SAMPLES, PROBES = "report.json", "report.html", "samples.jsonl", "probes.jsonl"
OTHERS = "others"
"""Folder of the further models' own samples and probes, numbered as they were given, and of the reference's probes."""
_LAST_SECOND = 253402300799  # of the year 9999


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
    probes: int = 0,
    beside: Sequence[Path] = (),
    samples: bool = True,
    answer_tokens: int = ANSWER_TOKENS,
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
        probes: pictures with which each model is also probed for what it makes up.
        beside: further models to ask the same: the base, other quantisations.
        samples: whether the page shows pictures, questions and answers; without them it may be given away where they
            may not. They are in samples.jsonl in any case.
        answer_tokens: of an answer to an open question, at most.

    Raises:
        ConfigError: an option is out of range, or two models have one name.
        ArtifactError: a folder is of another kind, or incomplete.
        DataError: no rows, one picture only, an unreadable picture, a question longer than the context.
    """
    if answer_tokens < 1:
        raise ConfigError("--answer-tokens wants at least 1")
    if min(runs, probes) < 0 or (limit is not None and limit < 1) or (threads is not None and threads < 1):
        raise ConfigError("bench wants --runs and --probes of at least 0, --limit and --threads of at least 1")
    if not 0 < margin <= 100:
        raise ConfigError("--margin wants more than 0 points, and at most 100")
    for folder in (edge, *beside):
        artifact.read(folder, "gguf", "mlx", "merged", "base")
    if reference:
        artifact.read(reference, "merged", "base")
    others = _named(beside, [edge, *([reference] if reference else [])])
    models = {"subject": edge} | ({"reference": reference} if reference else {}) | others
    dataset = Dataset(data)
    rows = _questions(dataset, split, limit, seed)
    settings = _Settings(split, limit, threads or physical_cores(), runs, seed, margin, probes, samples, answer_tokens)
    inputs = [edge, data, *([reference] if reference else []), *beside]
    config = asdict(settings) | {"overlap": overlap_installed(), "similarity": similarity_installed()}
    with artifact.create(out, "report", config, inputs, seed, resumable=True) as draft:
        if draft.complete:
            return out
        if not config["overlap"]:
            console.say("ROUGE-L and chrF are left out; for them: pip install 'ldrt-edge[bench]', and another --out")
        environment = _environment(
            settings, _command(edge, data, out, reference, others, settings), _replay(models, data, settings)
        )
        found = _measure(models, dataset, rows, draft.path, settings)
        asked = _joined(found.samples.pop("subject"), found.samples)
        write_samples(draft.path / SAMPLES, asked)
        vqa = summarise(asked, (row for row in dataset if row.split != split), seed, margin / 100)
        described = {name: _model(folder) for name, folder in models.items()}
        ladder = climb(asked, found.samples, found.probes, described, found.latencies, seed, margin / 100)
        subject = next(rung for rung in ladder if rung.role == "subject")
        report = Report(
            schema=SCHEMA,
            subject=subject.model,
            reference=described.get("reference"),
            dataset=_dataset(dataset, split, rows),
            environment=environment,
            vqa=vqa,
            fidelity=subject.fidelity,
            latency=subject.latency,
            calibration=subject.calibration,
            hallucination=subject.hallucination,
            hedging=hedging(asked, seed),
            ladder=ladder,
        )
        text = json.dumps(asdict(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (draft.path / REPORT).write_text(text, encoding="utf-8")
        (draft.path / PAGE).write_text(render(report, asked if samples else (), dataset, rows), encoding="utf-8")
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
    probes: int = 0
    samples: bool = True
    answer_tokens: int = ANSWER_TOKENS


@dataclass(frozen=True)
class _Found:
    """What a run finds, by the models' names."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    latencies: dict[str, Latency] = field(default_factory=dict)


def _measure(
    models: Mapping[str, Path], dataset: Dataset, rows: Sequence[Row], draft: Path, settings: _Settings
) -> _Found:
    """Ask, probe and time the models, one after the other; the reference is asked beside the subject and exports."""
    found, controls = _Found(), draw_controls(rows, settings.seed)
    exports, pictures = {name: _is_export(path) for name, path in models.items()}, len({row.image for row in rows})
    names = _called(models)
    journals = _journals(draft, models)
    for part in follow(parts(exports, pictures, settings.probes, settings.runs), names):
        name, folder, (answered, probed) = part.model, models[part.model], journals[part.model]
        answered.parent.mkdir(exist_ok=True)
        if part.what == "asking":
            held = models.get("reference") if name == "subject" or exports[name] else None
            found.samples[name] = _ask(folder, held, dataset, rows, controls, answered, settings)
        elif part.what == "probing":
            found.probes[name] = _probe(folder, dataset, rows, controls, probed, settings)
        else:
            sweep = _sweep(folder, settings) if name == "subject" else ()
            found.latencies[name] = measure(
                folder, dataset.folder, settings.split, settings.runs, settings.threads, settings.seed, sweep
            )
    return found


def _named(folders: Sequence[Path], measured: Sequence[Path]) -> dict[str, Path]:
    """Further models by their folders' names, with their parents' where these would not tell all models apart.

    measured: the subject and its reference, which go by their folders' names.

    Raises:
        ConfigError: even these do not.
    """
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    taken = {"subject", "reference", *(folder.resolve().name for folder in measured)}
    if len(set(names)) < len(names) or set(names) & taken:
        names = [f"{path.parent.name}/{path.name}" for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError(f"--beside: {', '.join(names)}: each model once")
    return dict(zip(names, folders, strict=True))


def _called(models: Mapping[str, Path]) -> dict[str, str]:
    """What each model is called: subject and reference by their folders' names."""
    return {name: path.resolve().name if name in ("subject", "reference") else name for name, path in models.items()}


def _is_export(folder: Path) -> bool:
    return artifact.read(folder).kind in EXPORTS


def _journals(draft: Path, models: Iterable[str]) -> dict[str, tuple[Path, Path]]:
    """Where each model's samples and probes are kept, by its name."""
    others = [name for name in models if name not in ("subject", "reference")]
    stems = {"reference": "reference"} | {name: str(number) for number, name in enumerate(others)}
    further = {name: (f"{OTHERS}/{stem}.jsonl", f"{OTHERS}/{stem}-{PROBES}") for name, stem in stems.items()}
    kept = {"subject": (SAMPLES, PROBES)} | further
    return {name: (draft / samples, draft / probes) for name, (samples, probes) in kept.items()}


def _sweep(folder: Path, settings: _Settings) -> tuple[int, ...]:
    """Further numbers of threads to time the subject with; MLX takes as many as it likes."""
    return () if artifact.read(folder).kind == "mlx" else further_threads(settings.threads, physical_cores())


def _questions(dataset: Dataset, split: Split, limit: int | None, seed: int) -> list[Row]:
    asked = dataset.rows(split)
    if not asked:
        raise DataError(f"{dataset.folder}: no rows in split {split!r}: choose another --split")
    if len({row.id for row in asked}) < len(asked):
        raise DataError(f"{dataset.folder}: some row ids occur twice: make the dataset anew")
    return choose_rows(asked, limit, seed)


def _ask(
    edge: Path, reference: Path | None, dataset: Dataset, rows: Sequence[Row], controls: Controls, journal: Path,
    settings: _Settings,
) -> list[Sample]:
    subject = _load(edge, settings.threads)
    expected = _load(reference, settings.threads) if reference else None
    try:
        return answer_rows(subject, dataset, rows, controls, expected, journal, settings.answer_tokens)
    finally:
        subject.runtime.close()
        if expected:
            expected.runtime.close()


def _probe(
    edge: Path, dataset: Dataset, rows: Sequence[Row], controls: Controls, journal: Path, settings: _Settings
) -> list[Probe]:
    subject = _load(edge, settings.threads)
    try:
        return probe(subject, dataset, rows, controls, settings.probes, settings.seed, journal)
    finally:
        subject.runtime.close()


def _joined(samples: Sequence[Sample], rungs: Mapping[str, Sequence[Sample]]) -> list[Sample]:
    """The subject's samples with what the further models answered."""
    given = {name: {sample.id: sample.subject for sample in asked} for name, asked in rungs.items()}
    return [replace(s, others={name: answers[s.id] for name, answers in given.items()}) for s in samples]


def _load(folder: Path, threads: int) -> Model:
    return Model(load(folder, threads=threads, branches=BRANCHES), Front.load(folder))


def _model(folder: Path) -> ModelIdentity:
    manifest = artifact.read(folder)
    return ModelIdentity(
        folder.resolve().name, manifest.kind, manifest.sha256, manifest.version, manifest.git_commit, weights(folder),
        manifest.inputs,
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


def _command(
    edge: Path, data: Path, out: Path, reference: Path | None, others: Iterable[str], settings: _Settings
) -> str:
    """What to type for this report again. Folders go by their names alone: a path may name a person."""
    words = ["ldrt-edge", "bench", edge.resolve().name, "--data", data.resolve().name, "--out", out.resolve().name]
    words += ["--reference", reference.resolve().name] if reference else []
    for name in others:
        words += ["--beside", name]
    standard = _Settings(threads=0)
    for name, value in asdict(settings).items():
        if value != getattr(standard, name):
            option = name.replace("_", "-")
            words += [f"--no-{option}"] if value is False else [f"--{option}", str(value)]
    return shlex.join(words)


def _replay(models: Mapping[str, Path], data: Path, settings: _Settings) -> dict[str, str]:
    """What to type to repeat a part of the report, or what stands behind it, by what that is; folders as above."""
    names, found = _called(models), {}
    for role, path in models.items():
        name, export = names[role], _is_export(path)
        if settings.runs and (export or role == "subject"):
            timing = ["ldrt-edge", "bench", "latency", name, "--data", data.resolve().name]
            timing += ["--runs", str(settings.runs), "--threads", str(settings.threads)]
            sweep = _sweep(path, settings) if role == "subject" else ()
            timing += ["--sweep", ",".join(map(str, sweep))] if sweep else []
            found[f"the timings of {name}"] = shlex.join(timing)
        if export and "reference" in models:
            held = ["ldrt-edge", "parity", names["reference"], name]
            found[f"{name} against {names['reference']}, stage by stage"] = shlex.join(held)
        if (path / GOLDEN).is_dir():
            found[f"the golden answers of {name}"] = shlex.join(["ldrt-edge", "parity", "--golden", name])
    return found


def _environment(settings: _Settings, command: str, replay: Mapping[str, str]) -> Environment:
    return Environment(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_now())),
        platform=platform.platform(),
        processor=processor_name(),
        cores_physical=psutil.cpu_count(logical=False) or 0,
        cores_logical=psutil.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        load_average=psutil.getloadavg() if settings.runs else None,
        threads=settings.threads,
        seed=settings.seed,
        limit=settings.limit,
        version=__version__,
        git_commit=artifact.git_commit(),
        libraries=artifact.library_versions(),
        command=command,
        replay=replay,
    )


def _now() -> float:
    """Seconds since 1970, or what SOURCE_DATE_EPOCH says instead, so that a report can be made again byte by byte.

    Raises:
        ConfigError: it says no number of seconds.
    Source: https://reproducible-builds.org/specs/source-date-epoch/
    """
    told = os.environ.get("SOURCE_DATE_EPOCH")
    if told is None:
        return time.time()
    if not told.isascii() or not told.isdigit() or int(told) > _LAST_SECOND:
        raise ConfigError(f"SOURCE_DATE_EPOCH={told[:30]!r}: wants seconds since 1970, or nothing")
    return int(told)
