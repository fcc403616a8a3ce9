"""Reports side by side: several models, or several machines, on the same questions.

Only what is comparable shares a table: the same dataset (by its manifest), split and questions with the same wrong
pictures, graded by the same rules, and, where a loss was measured, against the same reference model. Anything else is
refused, with all reasons. Rates are computed again from the samples, so every report after the first is also held
against the first, question by question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ldrt_edge import artifact
from ldrt_edge.bench.formats import byte_size, interval, number, p_value, percent, points, points_interval
from ldrt_edge.bench.opened import Opened, open_report
from ldrt_edge.bench.page import template
from ldrt_edge.bench.schema import FIELDS, Score, score
from ldrt_edge.bench.significance import McNemar, holm, mcnemar
from ldrt_edge.bench.statistics import Difference, Rate, paired_difference, rate
from ldrt_edge.bench.vqa import Sample, cluster_labels
from ldrt_edge.errors import ArtifactError, ConfigError, all_problems

COMPARISON, PAGE = "comparison.json", "comparison.html"
_SEED = 0


@dataclass(frozen=True)
class Column:
    """One report.

    gain, gain_test: accuracy minus that of the first report, paired; positive is better. None for the first.
    loss: the reference model's accuracy minus this one's, as the report has it. by: accuracy by slice.
    machine: processor and threads. load_average: of one minute, before the timings. Timings are medians; None where
        they were not taken.
    """

    report: str
    model: str
    kind: str
    manifest_sha256: str
    model_bytes: int
    machine: str
    load_average: float | None
    score: Score
    blind: Rate
    image_gain: Difference
    gain: Difference | None
    gain_test: McNemar | None
    loss: Difference | None
    mean_kld: float | None
    ttft_ms: float | None
    decode_tok_per_s: float | None
    peak_rss_bytes: int | None
    by: Mapping[str, Mapping[str, Rate]]


@dataclass(frozen=True)
class Comparison:
    """Reports about the same questions; `reference` is the model that losses are measured against."""

    dataset: str
    dataset_sha256: str
    split: str
    questions: int
    reference: str | None
    columns: tuple[Column, ...]


def compare(reports: Sequence[Path]) -> Comparison:
    """Put report artefacts side by side; the first is what the others are held against.

    Raises:
        ConfigError: fewer than two.
        ArtifactError: a folder is no report of `bench`, or they cannot be compared: all reasons.
    """
    if len(reports) < 2:
        raise ConfigError("which reports? ldrt-edge bench compare A B...")
    opened = [open_report(folder, name) for folder, name in zip(reports, _names(reports), strict=True)]
    _refuse(opened)
    first = opened[0]
    clusters = dict(zip(first.samples, cluster_labels(list(first.samples.values())), strict=True))
    columns = [_column(report, clusters, None if report is first else first) for report in opened]
    tested = iter(holm([column.gain_test for column in columns if column.gain_test]))
    columns = [replace(column, gain_test=next(tested)) if column.gain_test else column for column in columns]
    held = next((report.reference for report in opened if report.reference), None)
    return Comparison(
        dataset=first.dataset[0],
        dataset_sha256=first.dataset[1],
        split=first.split,
        questions=len(first.samples),
        reference=held[0] if held else None,
        columns=tuple(columns),
    )


def markdown(comparison: Comparison) -> str:
    """The table for the terminal: a column a report."""
    head = ("", *(column.report for column in comparison.columns))
    rows = [head, tuple("---" for _ in head), *((name, *cells) for name, cells in lines(comparison))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def save(reports: Sequence[Path], comparison: Comparison, out: Path) -> Path:
    """Write the table as an artefact of kind "report", with a page; returns `out`.

    Raises:
        ArtifactError: `out` holds something else, or the disk is full.
    """
    found = asdict(comparison)
    with artifact.create(out, "report", {"stage": "compare"}, reports) as draft:
        if not draft.complete:
            text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
            (draft.path / COMPARISON).write_text(text + "\n", encoding="utf-8")
            page = template("comparison.html.jinja").render(
                comparison=comparison, lines=lines(comparison), slices=slices(comparison)
            )
            (draft.path / PAGE).write_text(page, encoding="utf-8")
    return out


def lines(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """The table's rows as text: a name and a cell a report; rows that say nothing are left out."""
    first, reference = comparison.columns[0].report, comparison.reference
    cells: dict[str, Callable[[Column], str]] = {
        "model": lambda column: f"{column.model} ({column.kind})",
        "machine": lambda column: column.machine,
        "weights": lambda column: byte_size(column.model_bytes),
        "right": lambda column: _rate(column.score.accuracy),
        "closed questions, right": lambda column: _rate(column.score.closed_accuracy),
        "open questions, right": lambda column: _rate(column.score.exact_match),
        "token F1": lambda column: _rate(column.score.token_f1),
        "ROUGE-L": lambda column: _rate(column.score.rouge_l),
        "chrF": lambda column: _rate(column.score.chrf),
        "wrong picture": lambda column: _rate(column.blind),
        "worth of the picture, points": lambda column: _difference(column.image_gain),
        f"against {first}, points": lambda column: _difference(column.gain),
        "p (McNemar by clusters, Holm)": lambda column: p_value(column.gain_test) if column.gain_test else "",
        f"loss against {reference}, points": lambda column: _difference(column.loss),
        "mean KLD, nats a token": lambda column: _number(column.mean_kld),
        "load average before the timings": lambda column: _load(column.load_average),
        "time to the first token, ms": lambda column: _number(column.ttft_ms),
        "decoding, tokens a second": lambda column: _number(column.decode_tok_per_s),
        "peak memory": lambda column: byte_size(column.peak_rss_bytes) if column.peak_rss_bytes else "",
    }
    rows = [(name, [cell(column) for column in comparison.columns]) for name, cell in cells.items()]
    return [(name, shown) for name, shown in rows if any(shown)]


def slices(comparison: Comparison) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Accuracy by language, answer type, kind, source and task: for each a list of rows like those of `lines`."""
    first = comparison.columns[0]
    return [
        (field.replace("_", " "), [(value, [_rate(column.by[field][value]) for column in comparison.columns])
                                   for value in values])
        for field, values in first.by.items()
    ]  # fmt: skip


def _names(reports: Sequence[Path]) -> list[str]:
    """The folders' names, with their parents' where they would not tell them apart."""
    folders = [folder.resolve() for folder in reports]
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [f"{folder.parent.name}/{folder.name}" for folder in folders]


def _refuse(opened: Sequence[Opened]) -> None:
    """Stop where reports are about different things."""
    first, *others = opened
    held = next((report for report in opened if report.reference), first)
    problems = []
    for report in others:
        if unlike := _other_questions(report, first):
            problems.append(unlike)
        if report.rules != first.rules:
            problems.append(
                f"{report.name} was graded by rules {report.rules}, {first.name} by rules {first.rules}: bench again"
            )
        if report.answer_tokens != first.answer_tokens:
            limits = f"{report.answer_tokens} tokens, {first.name}'s after {first.answer_tokens}"
            problems.append(f"{report.name}'s answers were cut after {limits}: bench with the same --answer-tokens")
        if report.reference and held.reference and report.reference[1] != held.reference[1]:
            problems.append(
                f"{report.name} has another reference than {held.name} ({_two(report.reference, held.reference)})"
            )
    if problems:
        raise ArtifactError(all_problems(problems, "these reports cannot be compared"))


def _other_questions(report: Opened, first: Opened) -> str | None:
    """How what was asked differs; None where it does not."""
    if report.dataset[1] != first.dataset[1]:
        return f"{report.name} asks another dataset than {first.name} ({_two(report.dataset, first.dataset)})"
    if report.split != first.split:
        return f"{report.name} asks the {report.split} split, {first.name} the {first.split} split"
    lacking = sum(_asked(report.samples.get(id)) != _asked(sample) for id, sample in first.samples.items())
    more = sum(id not in first.samples for id in report.samples)
    if lacking or more:
        asked = f"{lacking} of the {len(first.samples)} questions of {first.name}, and asks {more} others"
        return f"{report.name} lacks {asked}: the same --limit and --seed ask the same"
    other = sum(_controls(report.samples[id]) != _controls(sample) for id, sample in first.samples.items())
    if other:
        return (
            f"{report.name} shows other wrong pictures than {first.name} with {other} of the {len(first.samples)} "
            "questions: the same --limit and --seed show the same"
        )
    return None


def _asked(sample: Sample | None) -> tuple[str, ...] | None:
    return (sample.image_sha256, sample.question, sample.answer) if sample else None


def _controls(sample: Sample) -> tuple[str | None, ...]:
    """The wrong pictures that a question was asked with."""
    return tuple(answer.image_sha256 if answer else None for answer in (sample.blind, sample.blind_any))


def _two(one: tuple[str, str], other: tuple[str, str]) -> str:
    return f"{one[0]} {one[1][:12]} against {other[0]} {other[1][:12]}"


def _column(report: Opened, clusters: Mapping[str, Hashable], first: Opened | None) -> Column:
    try:
        return _read_column(report, clusters, first)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{report.name}: not a report that this version reads ({error!r})") from error


def _read_column(report: Opened, clusters: Mapping[str, Hashable], first: Opened | None) -> Column:
    samples = [report.samples[id] for id in clusters]
    labels = list(clusters.values())
    right = [sample.subject.correct for sample in samples]
    data, vqa = report.data, report.data["vqa"]
    latency = data["latency"] or {}
    base = [first.samples[id].subject.correct for id in clusters] if first else None
    environment, subject = data["environment"], data["subject"]
    threads = environment["threads"]
    return Column(
        report=report.name,
        model=subject["name"],
        kind=subject["kind"],
        manifest_sha256=subject["manifest_sha256"],
        model_bytes=sum(subject["weights"].values()),
        machine=f"{environment['processor']}, {threads} thread{'s' * (threads != 1)}",
        load_average=latency["load_average"][0] if latency else None,
        score=score(samples, lambda sample: sample.subject, clusters, _SEED),
        blind=Rate(**vqa["blind"]["accuracy"]),
        image_gain=Difference(**vqa["image_gain"]),
        gain=paired_difference(right, base, labels, _SEED) if base else None,
        gain_test=mcnemar(right, base, labels) if base else None,
        loss=Difference(**vqa["loss"]) if vqa["loss"] else None,
        mean_kld=data["fidelity"]["mean_kld"] if data["fidelity"] else None,
        ttft_ms=latency["ttft_ms"]["median"] if latency else None,
        decode_tok_per_s=latency["decode_tok_per_s"]["median"] if latency else None,
        peak_rss_bytes=latency["peak_rss_bytes"] if latency else None,
        by={
            name: {
                value: rate(
                    [sample.subject.correct for sample in samples if of(sample) == value],
                    [clusters[sample.id] for sample in samples if of(sample) == value],
                    _SEED,
                )
                for value in sorted({of(sample) for sample in samples})
            }
            for name, of in FIELDS.items()
        },
    )


def _rate(found: Rate | None) -> str:
    return f"{percent(found)} ({interval(found)})" if found else ""


def _difference(found: Difference | None) -> str:
    return f"{points(found)} ({points_interval(found)})" if found else ""


def _load(average: float | None) -> str:
    return "" if average is None else f"{average:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else number(value)
