"""How many questions a minute: alone, one after the other, and side by side, with the same answers.

    alone           each question with an empty cache, as a first question in a chat
    one by one      questions about a picture after each other: its embeddings and prefix are kept
    side by side    the same in parallel sequences

The three are interleaved picture by picture on the same questions, greedy, with the same limit of tokens, so that what
else the machine does falls on all of them. With a journal, a picture's timings are on disk before the next one is
asked, and a killed run goes on there; only time in which questions are asked is counted, of whichever run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from ldrt_edge import __version__, artifact, console
from ldrt_edge.artifact import Json
from ldrt_edge.bench.steps import Journal
from ldrt_edge.dataset import Dataset, Row, Split, choose_rows, group_by_image
from ldrt_edge.errors import DataError
from ldrt_edge.front import Front, conversation
from ldrt_edge.image import read_image
from ldrt_edge.machine import processor_name
from ldrt_edge.runtimes.base import Prompt, Runtime, Sampling, Token, load
from ldrt_edge.runtimes.processor import physical_cores

_TOKENS = 24

Answers = list[list[Token]]


@dataclass(frozen=True)
class Throughput:
    """Questions a minute, and how many answers are token for token those that were given alone.

    load_average: of one minute, the least and the most that was found before a picture.
    """

    questions: int
    pictures: int
    alone_per_min: float
    one_by_one_per_min: float
    side_by_side_per_min: float
    one_by_one_identical: int
    side_by_side_identical: int
    branches: int
    threads: int
    load_average: tuple[float, float]
    model: str
    manifest_sha256: str

    @property
    def gain(self) -> float:
        """Side by side over alone."""
        return self.side_by_side_per_min / self.alone_per_min


def throughput(
    edge: Path, data: Path, split: Split = "test", limit: int | None = 100, threads: int | None = None,
    branches: int = 16, seed: int = 0, journal: Path | None = None,
) -> Throughput:
    """Ask about `limit` questions of a dataset in the three ways; a file `journal` keeps each picture's timings.

    Raises:
        ArtifactError: a folder is of another kind.
        DataError: no rows, an unreadable picture, or the journal is none.
    """
    manifest, dataset = artifact.read(edge, "gguf", "mlx", "merged", "base"), Dataset(data)
    rows = choose_rows(dataset.rows(split), limit, seed)
    if not rows:
        raise DataError(f"{data}: no rows in split {split!r}: choose another --split")
    cores, by_image = threads or physical_cores(), group_by_image(rows)
    if journal:
        journal.absolute().parent.mkdir(parents=True, exist_ok=True)
    kept = Journal(journal) if journal else None
    setup = {
        "model": manifest.sha256, "dataset": dataset.manifest.sha256, "branches": branches, "threads": cores,
        "processor": processor_name(), "version": __version__,
    }  # fmt: skip
    runtime, front = load(edge, threads=cores, branches=branches), Front.load(edge)
    ways = _ways(runtime)
    found: list[dict[str, Json]] = []
    try:
        ways["alone"](_prompts(front, dataset, rows[:1]))  # who comes first waits for the disk
        with console.bar("asking", len(rows)) as shown:
            for members in by_image.values():
                work = partial(_time, ways, _prompts(front, dataset, members))
                found.append(kept.once(setup | {"questions": [row.id for row in members]}, work) if kept else work())
                shown.advance(len(members))
    finally:
        runtime.close()
    a_minute = {name: 60 * len(rows) / sum(one["seconds"][name] for one in found) for name in ways}
    same = {name: sum(one["identical"][name] for one in found) for name in ways}
    loads = [one["load_average"] for one in found]
    return Throughput(
        questions=len(rows), pictures=len(by_image), alone_per_min=a_minute["alone"],
        one_by_one_per_min=a_minute["one_by_one"], side_by_side_per_min=a_minute["side_by_side"],
        one_by_one_identical=same["one_by_one"], side_by_side_identical=same["side_by_side"], branches=branches,
        threads=cores, load_average=(min(loads), max(loads)), model=edge.resolve().name,
        manifest_sha256=manifest.sha256,
    )  # fmt: skip


def _ways(runtime: Runtime) -> dict[str, Callable[[Sequence[Prompt]], Answers]]:
    """The three ways to ask, `alone` first."""
    greedy = Sampling(max_tokens=_TOKENS)

    def alone(prompts: Sequence[Prompt]) -> Answers:
        given = []
        for prompt in prompts:
            runtime.forget()
            given.append(list(runtime.generate(prompt, greedy)))
        return given

    def one_by_one(prompts: Sequence[Prompt]) -> Answers:
        runtime.forget()
        return [list(runtime.generate(prompt, greedy)) for prompt in prompts]

    def side_by_side(prompts: Sequence[Prompt]) -> Answers:
        runtime.forget()
        return runtime.generate_all(prompts, greedy)

    return {"alone": alone, "one_by_one": one_by_one, "side_by_side": side_by_side}


def _prompts(front: Front, dataset: Dataset, members: Sequence[Row]) -> list[Prompt]:
    """The questions about one picture."""
    image = front.image(read_image(dataset.image_path(members[0])).rgb)
    return [front.prompt(conversation(row.turns[:-1], image)) for row in members]


def _time(ways: Mapping[str, Callable[[Sequence[Prompt]], Answers]], prompts: Sequence[Prompt]) -> dict[str, Json]:
    """Seconds and identical answers of one picture's questions, by way."""
    load_average, seconds, same = psutil.getloadavg()[0], {}, {}
    expected: Answers = []
    for name, way in ways.items():
        started = time.perf_counter()
        given = way(prompts)
        seconds[name] = time.perf_counter() - started
        expected = expected or given
        same[name] = sum(_ids(a) == _ids(b) for a, b in zip(expected, given, strict=True))
    return {"seconds": seconds, "identical": same, "load_average": load_average}


def _ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]
