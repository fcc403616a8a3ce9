"""`data instruct`: pairs to a dataset of conversations, descriptions, reasoning and closed questions.

A generator writes from caption and mentions, by the prompts in `prompts.yaml`; what it writes is held to a shape and
to its source (`grounding.py`), and dropped with a count where it does not hold. Without a generator the captions
themselves are the answers. Splits go by cluster.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldrt_edge import artifact, console
from ldrt_edge.artifact import Json
from ldrt_edge.dataset import ROWS, AnswerType, DatasetWriter, Row, Turn, read_rows
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.train.data.generators import Answers, Budget, Generator, Request, first_valid
from ldrt_edge.train.data.grounding import ungrounded
from ldrt_edge.train.data.pairs import Pair, Pairs
from ldrt_edge.train.data.split import Groups, check_leakage
from ldrt_edge.train.data.summary import summary

TASKS = ("conversation", "detailed description", "complex reasoning", "closed")
CAPTION_TASK = "caption"
_ATTEMPTS = 3
_KEPT, _UNSPLIT = "answers.sqlite", ".unsplit.jsonl"
_PROMPTS = Path(__file__).with_name("prompts.yaml")

M = TypeVar("M", bound=BaseModel)
Said = Annotated[str, Field(min_length=2, max_length=6000)]


class _Exchange(BaseModel):
    model_config = ConfigDict(strict=True, str_strip_whitespace=True)
    question: Said
    answer: Said


class _Conversation(BaseModel):
    exchanges: Annotated[list[_Exchange], Field(min_length=1, max_length=8)]


class _ClosedQuestion(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)
    question: Said
    answer: Literal["yes", "no"]


class _Closed(BaseModel):
    questions: Annotated[list[_ClosedQuestion], Field(min_length=1, max_length=6)]


@dataclass(frozen=True)
class Prompts:
    """`prompts.yaml`, and the hash of its file."""

    version: int
    sha256: str
    system: str
    source: str
    tasks: dict[str, str]
    languages: dict[str, str]
    caption_questions: dict[str, list[str]]
    yes_no: dict[str, list[str]]


@dataclass(frozen=True)
class _Exchanges:
    """What a pair became for one task: each item one row's turns; and what was dropped, by reason."""

    task: str
    answer_type: AnswerType
    rows: tuple[tuple[Turn, ...], ...]
    dropped: tuple[str, ...]


def instruct(
    pairs: Path, out: Path, generator: Generator | None = None, tasks: Sequence[str] = TASKS,
    test_fraction: float = 0.05, seed: int = 0, budget: Budget | None = None, parallel: int = 4,
    cache: Path | None = None,
) -> Path:
    """Make a dataset artefact from a pairs artefact.

    Args:
        pairs: from `data curate`.
        out: the dataset artefact.
        generator: who writes; None makes the caption-grounded rows alone.
        tasks: which of `TASKS` a generator is asked for.
        test_fraction: of the clusters of each language.
        seed: of the split and of the choice of caption questions.
        budget: how much may be asked; when it is spent the run stops, and goes on with a larger one.
        parallel: requests at once.
        cache: a file that keeps answers beyond this run; without it they live as long as the draft.

    Raises:
        ConfigError: an unknown task, or a fraction out of range.
        DataError: no pairs, nothing left, or the budget is spent.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ConfigError(f"--tasks {', '.join(unknown) or 'none'}: there are {', '.join(TASKS)}")
    if not 0 <= test_fraction <= 1:
        raise ConfigError(f"--test-fraction {test_fraction}: from 0 to 1")
    source, prompts = Pairs(pairs), load_prompts()
    config: dict[str, Json] = {
        "stage": "instruct", "generator": generator.name if generator else "none", "tasks": list(tasks),
        "prompts_version": prompts.version, "prompts_sha256": prompts.sha256, "test_fraction": test_fraction,
    }
    with artifact.create(out, "dataset", config, inputs=[pairs], seed=seed, resumable=True) as draft:
        if draft.complete:
            return out
        counts, tasks_met, groups = Counter[str](), Counter[str](), Groups()
        with DatasetWriter(draft.path, _UNSPLIT) as writer:
            made = (
                _from_captions(source, prompts, seed) if generator is None
                else _generated(source, prompts, generator, tasks, cache or draft.path / _KEPT, budget, parallel)
            )
            for pair, exchanges in made:
                for row in _rows(pair, exchanges, source, writer):
                    writer.add(row)
                    groups.see(row)
                    tasks_met[row.task] += 1
                counts.update(f"dropped: {reason}" for reason in exchanges.dropped)
        if not groups:
            told = ", ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))
            raise DataError(f"{pairs}: no rows to write; {told or 'there are no pairs'}")
        splits = groups.splits(test_fraction, seed)
        if 0 < test_fraction < 1 and len(splits) == 1:
            console.say(f"{pairs}: all of it is one cluster, which trains: nothing is left to test on")
        with DatasetWriter(draft.path) as writer:
            for row in read_rows(draft.path / _UNSPLIT):
                writer.add(replace(row, split=splits[row.group]))
        check_leakage(read_rows(draft.path / ROWS))
        for name in (_KEPT, _UNSPLIT):
            (draft.path / name).unlink(missing_ok=True)
        draft.metrics.update(summary(read_rows(draft.path / ROWS)))
        draft.metrics.update(rows_by_task=dict(sorted(tasks_met.items())), **counts)
    return out


@functools.cache
def load_prompts() -> Prompts:
    """The prompts that ship with ldrt-edge."""
    raw = _PROMPTS.read_bytes()
    data = yaml.safe_load(raw)
    return Prompts(sha256=hashlib.sha256(raw).hexdigest(), **data)


def _from_captions(source: Pairs, prompts: Prompts, seed: int) -> Iterator[tuple[Pair, _Exchanges]]:
    for pair in source:
        questions = prompts.caption_questions.get(pair.language)
        if questions is None:
            yield pair, _Exchanges(CAPTION_TASK, "open", (), (f"no caption question in {pair.language}",))
            continue
        chosen = int(hashlib.sha256(f"{seed}\0{pair.id}".encode()).hexdigest(), 16) % len(questions)
        turns = (Turn("user", questions[chosen]), Turn("assistant", pair.caption))
        yield pair, _Exchanges(CAPTION_TASK, "open", (turns,), ())


def _generated(
    source: Pairs, prompts: Prompts, generator: Generator, tasks: Sequence[str], kept: Path, budget: Budget | None,
    parallel: int,
) -> Iterator[tuple[Pair, _Exchanges]]:
    """Pairs with what was written for each task, in the order of the pairs, whoever answers first."""
    total = sum(1 for _ in source) * len(tasks)
    with (
        Answers(kept, generator, budget or Budget()) as answers, ThreadPoolExecutor(parallel) as pool,
        console.bar("asking", total) as bar,
    ):
        work = ((pair, task) for pair in source for task in tasks)
        while batch := [*islice(work, 4 * parallel)]:
            running = [pool.submit(_write, pair, task, prompts, answers) for pair, task in batch]
            try:
                for (pair, _), future in zip(batch, running, strict=True):
                    yield pair, future.result()
                    bar.advance()
            finally:
                for future in running:
                    future.cancel()


def _write(pair: Pair, task: str, prompts: Prompts, answers: Answers) -> _Exchanges:
    system = prompts.system.format(language=prompts.languages.get(pair.language, pair.language))
    told = prompts.source.format(title=pair.title, caption=pair.caption, mentions=" ".join(pair.mentions) or "(none)")
    user = f"{told}\n{prompts.tasks[task].format()}"
    requests = [Request(system, user, attempt) for attempt in range(_ATTEMPTS)]
    closed = task == "closed"
    if closed:
        asked = first_valid(requests, answers, lambda text: _parse(_Closed, text))
        said = [(one.question, one.answer) for one in asked.questions] if asked else []
    elif task == "conversation":
        talk = first_valid(requests, answers, lambda text: _parse(_Conversation, text))
        said = [(one.question, one.answer) for one in talk.exchanges] if talk else []
    else:
        one = first_valid(requests, answers, lambda text: _parse(_Exchange, text))
        said = [(one.question, one.answer)] if one else []
    if not said:
        return _Exchanges(task, "closed" if closed else "open", (), ("not the wanted JSON",))
    ground = " ".join((pair.title, pair.caption, *pair.mentions, *pair.keywords))
    kept, dropped = [], []
    for question, answer in said:
        # a closed question may ask for what is not there, and then the answer is no
        checked = question if closed and answer == "yes" else "" if closed else f"{question} {answer}"
        if ungrounded(checked, ground, pair.language):
            dropped.append("not grounded")
        elif _speaks_of_source(f"{question} {answer}"):
            dropped.append("speaks of a caption or an article")
        else:
            words = prompts.yes_no.get(pair.language, prompts.yes_no["en"])
            told_answer = words[0 if answer == "yes" else 1] if closed else answer
            kept.append((Turn("user", question), Turn("assistant", told_answer)))
    rows = tuple(kept) if task != "conversation" else (tuple(turn for turns in kept for turn in turns),) * bool(kept)
    return _Exchanges(task, "closed" if closed else "open", rows, tuple(dropped))


def _parse(model: type[M], text: str) -> M | None:
    """The JSON object in an answer, if it has the shape; models like to wrap it in a fence."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start or len(text) > 50_000:
        return None
    try:
        return model.model_validate(json.loads(text[start : end + 1]))
    except (ValidationError, ValueError, RecursionError):
        return None


_SOURCE_WORDS = re.compile(
    r"\b(?:caption|article|the text|paper states|bildunterschrift|im artikel|légende|l'article|leyenda|pie de figura|"
    r"el artículo|legenda|o artigo|didascalia|articolo)\b|标题说明|文章|キャプション|論文", re.I,
)


def _speaks_of_source(text: str) -> bool:
    return _SOURCE_WORDS.search(text) is not None


def _rows(pair: Pair, exchanges: _Exchanges, source: Pairs, writer: DatasetWriter) -> Iterator[Row]:
    if not exchanges.rows:
        return
    path = source.image_path(pair)
    image, digest = writer.add_image(path.read_bytes(), path.suffix)
    for number, turns in enumerate(exchanges.rows, start=1):
        row = Row(
            id=f"{pair.id}/{exchanges.task}/{number}", image=image, image_sha256=digest, turns=turns,
            language=pair.language, task=exchanges.task, answer_type=exchanges.answer_type,
            source=f"{pair.journal}, {pair.doi or pair.article}, {pair.label}".strip(", "), licence=pair.licence,
            group=pair.cluster, kind="panel" if pair.part.isalpha() else "figure",
        )
        yield replace(row, source=row.source[:500])
