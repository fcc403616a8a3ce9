"""Judges on the answers of a report: a score from 0 to 10 for each, and which of two is better, in both orders.

    report/ + judges  →  report/ (judgement.json, judgements.jsonl, report.html with what they say)

Only words go out: question, key and answers; no picture, no name of a model. Each reply that is of use is kept in a
journal by all that it depends on (judge, words, schema), so that nothing is asked, or paid for, twice: a run that was
killed, found its endpoint gone or its budget spent goes on from there. A reply that is not of use is asked for again, a
few times, and by a later run too, for its server may have mended; what stays without one is counted.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel

from ldrt_edge import artifact, console
from ldrt_edge.bench.judgement import SCHEMA, Better, Compared, Graded, Judgement, agree, report_judge
from ldrt_edge.bench.judges import Budget, BudgetSpent, Judge, check_names, open_judge
from ldrt_edge.bench.metrics import normalise, words
from ldrt_edge.bench.opened import Opened, open_report
from ldrt_edge.bench.page import JUDGES, template
from ldrt_edge.bench.report import PAGE
from ldrt_edge.bench.rubric import Preference, Rubric, Score, parse, read_rubric
from ldrt_edge.bench.steps import Journal
from ldrt_edge.bench.vqa import Sample, answers, cluster_labels
from ldrt_edge.errors import ArtifactError, ConfigError, DataError, LdrtError

JUDGEMENT, JUDGEMENTS = "judgement.json", "judgements.jsonl"
ATTEMPTS = 3

Asked = Literal["open", "closed", "all"]
Reply = TypeVar("Reply", bound=BaseModel)


def judge(
    report: Path,
    out: Path,
    judges: Sequence[str],
    *,
    answer_type: Asked = "open",
    limit: int | None = None,
    max_calls: int | None = None,
    parallel: int = 4,
    timeout_s: float = 60.0,
    retries: int = 4,
    key_variable: str = "OPENAI_API_KEY",
    cache: Path | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> Path:
    """Have the answers of a report judged; write a report artefact beside it.

    Args:
        report: what `bench` wrote.
        out: the artefact to write.
        judges: MODEL@URL or a folder, each; two of different families tell how far they agree.
        answer_type: which questions are judged. Closed ones are graded exactly by `bench` already.
        limit: how many questions, drawn by the seed; None for all.
        max_calls: requests that this run may make in all, retries included.
        parallel: questions that wait for endpoints at a time.
        timeout_s, retries: of each request.
        key_variable: the environment variable with the endpoints' API key.
        cache: the journal of replies; None takes `judge-calls.jsonl` beside `out`.
        threads: of local judges.
        seed: of the choice of questions and the intervals.

    Raises:
        ConfigError: no judge, two of one name, a number out of range.
        ArtifactError: `report` is no report of `bench`, or an earlier version's.
        DataError: nothing to judge, or the budget ended before the last question: what was said until then is kept.
        Unreachable: an endpoint does not answer.
    """
    if not judges:
        raise ConfigError("who judges? --judge MODEL@URL, or --judge FOLDER; twice for two families")
    if not all(n > 0 for n in (parallel, timeout_s, limit, max_calls) if n is not None) or min(retries, seed) < 0:
        raise ConfigError(
            "judge wants --limit, --max-calls, --parallel and --timeout above 0, --retries and --seed of at least 0"
        )
    opened, page = open_report(report), _page(report)
    samples = _choose(opened, answer_type, limit, seed)
    rubrics = read_rubric("absolute"), read_rubric("pairwise")
    panel: list[Judge] = []
    try:
        panel += [open_judge(spec, key_variable, timeout_s, retries, threads) for spec in judges]
        check_names(panel)
        config = {
            "stage": "judge", "judges": [judge.identity for judge in panel], "answer_type": answer_type, "limit": limit,
            "rubrics": {rubric.name: rubric.sha256 for rubric in rubrics},
        }  # fmt: skip
        replies = cache or out.absolute().with_name("judge-calls.jsonl")
        for path in (out, replies):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with artifact.create(out, "report", config, [report], seed) as draft:
            if draft.complete:
                return out
            bench = _Bench(panel, rubrics, Journal(replies), Budget(max_calls))
            graded, compared = bench.sit(samples, parallel)
            found = _sum_up(opened, panel, rubrics, samples, graded, compared, bench, answer_type, seed)
            _write(draft.path, found, graded, compared, page)
            draft.metrics.update(
                questions=found.questions, calls=found.calls,
                scores={j.name: {g.contender: g.score.value * 10 for g in j.grades} for j in found.judges},
                preferred={j.name: {p.other: p.preferred.value for p in j.preferences} for j in found.judges},
            )  # fmt: skip
    finally:
        for member in panel:
            member.close()
    return out


class _NoUse(Exception):
    """No reply to a text is of use; `said` is the last one."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


class _Bench:
    """The judges at work on one question after another."""

    def __init__(
        self, panel: Sequence[Judge], rubrics: tuple[Rubric, Rubric], journal: Journal, budget: Budget
    ) -> None:
        self._panel, self._rubrics, self._journal, self.budget = panel, rubrics, journal, budget
        self._one_at_a_time = {judge.name: threading.Lock() for judge in panel if not judge.parallel}

    def sit(self, samples: Sequence[Sample], parallel: int) -> tuple[list[Graded], list[Compared]]:
        """Judge all questions.

        Raises:
            DataError: the budget ended first; the journal has what was said.
        """
        graded: dict[int, list[Graded]] = {}
        compared: dict[int, list[Compared]] = {}
        pool = ThreadPoolExecutor(parallel)
        try:
            waiting = {pool.submit(self._question, sample): place for place, sample in enumerate(samples)}
            with console.bar("judging", len(samples)) as shown:
                for done in as_completed(waiting):
                    place = waiting[done]
                    try:
                        graded[place], compared[place] = done.result()
                    except BudgetSpent:
                        continue
                    shown.advance()
        finally:
            self.budget.close()  # after Ctrl-C nothing more is sent
            pool.shutdown(cancel_futures=True)
        if len(graded) < len(samples):
            whole = next(place for place in range(len(samples)) if place not in graded)
            known = f"; --limit {whole} reports on the first {whole}" if whole else ""
            raise DataError(
                f"--max-calls ended after {len(graded)} of {len(samples)} questions: the same command goes on{known}"
            )
        return [g for place in sorted(graded) for g in graded[place]], [
            c for place in sorted(compared) for c in compared[place]
        ]

    def _question(self, sample: Sample) -> tuple[list[Graded], list[Compared]]:
        given = answers(sample)
        subject = given["subject"]
        absolute, pairwise = self._rubrics
        graded, compared = [], []
        for judge in self._panel:
            for contender, answer in given.items():
                score, reply = self._reply(judge, absolute.ask(sample, answer=answer.text), Score)
                graded.append(Graded(
                    judge.name, sample.id, contender, score.score if score else None, _length(answer.text, sample),
                    answer.correct, reply,
                ))  # fmt: skip
            for other, answer in given.items():
                if other == "subject":
                    continue
                first, reply = self._reply(judge, pairwise.ask(sample, a=subject.text, b=answer.text), Preference)
                second, again = self._reply(judge, pairwise.ask(sample, a=answer.text, b=subject.text), Preference)
                compared.append(Compared(
                    judge.name, sample.id, other, _better(first, "A"), _better(second, "B"),
                    _longer(subject.text, answer.text, sample), subject.correct == answer.correct, (reply, again),
                ))  # fmt: skip
        return graded, compared

    def _reply(self, judge: Judge, text: str, schema: type[Reply]) -> tuple[Reply | None, str]:
        """A reply that fits the schema, and as it came; None with the last one where none did."""
        key = judge.identity | {"text": text, "schema": schema.__name__}
        try:
            said = self._journal.once(key, partial(self._ask, judge, text, schema))
        except _NoUse as last:
            return None, last.said
        return parse(said, schema), said

    def _ask(self, judge: Judge, text: str, schema: type[BaseModel]) -> str:
        """The first reply that fits the schema.

        Raises:
            _NoUse: none does.
        """
        said = ""
        for attempt in range(ATTEMPTS):
            try:
                with self._one_at_a_time.get(judge.name, nullcontext()):
                    said = judge.reply(text, schema, attempt, self.budget)
            except LdrtError:
                self.budget.close()  # at once: other questions wait for their turn
                raise
            if parse(said, schema) is not None:
                return said
        raise _NoUse(said)


def _asked(opened: Opened, answer_type: Asked) -> list[Sample]:
    return [sample for sample in opened.samples.values() if answer_type in ("all", sample.answer_type)]


def _choose(opened: Opened, answer_type: Asked, limit: int | None, seed: int) -> list[Sample]:
    samples = _asked(opened, answer_type)
    if not samples:
        raise DataError(f"{opened.name}: no {answer_type} questions to judge: choose another --questions")
    order = np.random.default_rng(seed).permutation(len(samples))
    return [samples[place] for place in order[:limit]]


def _sum_up(
    opened: Opened, panel: Sequence[Judge], rubrics: Sequence[Rubric], samples: Sequence[Sample],
    graded: Sequence[Graded], compared: Sequence[Compared], bench: _Bench, answer_type: Asked, seed: int,
) -> Judgement:
    clusters = dict(zip(opened.samples, cluster_labels(list(opened.samples.values())), strict=True))
    return Judgement(
        schema=SCHEMA,
        report_sha256=opened.manifest_sha256,
        dataset=opened.dataset[0],
        names=opened.model_names(),
        questions=len(samples),
        questions_of=len(_asked(opened, answer_type)),
        answer_type=answer_type,
        calls=bench.budget.used,
        rubrics={rubric.name: (rubric.version, rubric.sha256) for rubric in rubrics},
        judges=tuple(
            report_judge(
                member.name, member.identity, [g for g in graded if g.judge == member.name],
                [c for c in compared if c.judge == member.name], clusters, seed,
            )
            for member in panel
        ),
        agreement=agree(graded, compared, clusters, seed),
    )  # fmt: skip


def _page(report: Path) -> str:
    """The report's page, which has a place for what judges say."""
    page = (report / PAGE).read_text(encoding="utf-8")
    if JUDGES not in page:
        raise ArtifactError(f"{report}: its {PAGE} was made by an earlier version: bench the model again")
    return page


def _write(
    folder: Path, found: Judgement, graded: Sequence[Graded], compared: Sequence[Compared], page: str
) -> None:
    text = json.dumps(asdict(found), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / JUDGEMENT).write_text(text + "\n", encoding="utf-8")
    with (folder / JUDGEMENTS).open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(graded, compared))
    section = template("judgement.html.jinja").render(found=found)
    (folder / PAGE).write_text(page.replace(JUDGES, section, 1), encoding="utf-8")


def _lines(graded: Sequence[Graded], compared: Sequence[Compared]) -> Iterator[dict[str, object]]:
    yield from (asdict(grade) for grade in graded)
    yield from (asdict(pair) | {"verdict": pair.verdict} for pair in compared)


def _better(reply: Preference | None, subject: Literal["A", "B"]) -> Better | None:
    if reply is None:
        return None
    return "tie" if reply.better == "tie" else "subject" if reply.better == subject else "other"


def _longer(subject: str, other: str, sample: Sample) -> Better:
    ours, theirs = _length(subject, sample), _length(other, sample)
    return "tie" if ours == theirs else "subject" if ours > theirs else "other"


def _length(text: str, sample: Sample) -> int:
    return len(words(normalise(text, sample.language)))
