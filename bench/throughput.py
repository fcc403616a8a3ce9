"""How many questions a minute: alone, one after the other, and side by side, with the same answers.

    alone           each question with an empty cache, as a first question in a chat
    one by one      questions about a picture after each other: its embeddings and prefix are kept
    side by side    the same in parallel sequences

The three are interleaved picture by picture on the same questions, greedy, with the same limit of tokens, so that what
else the machine does falls on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ldrt_edge import artifact, console
from ldrt_edge.dataset import Dataset, Split, choose_rows, group_by_image
from ldrt_edge.errors import DataError
from ldrt_edge.front import Front, conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import Prompt, Sampling, Token, load
from ldrt_edge.runtimes.processor import physical_cores

_TOKENS = 24

Answers = list[list[Token]]


@dataclass(frozen=True)
class Throughput:
    """Questions a minute, and how many answers are token for token those that were given alone."""

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
    branches: int = 16, seed: int = 0,
) -> Throughput:
    """Ask about `limit` questions of a dataset in the three ways.

    Raises:
        ArtifactError: a folder is of another kind.
        DataError: no rows, or an unreadable picture.
    """
    manifest, dataset = artifact.read(edge, "gguf", "mlx", "merged", "base"), Dataset(data)
    rows = choose_rows(dataset.rows(split), limit, seed)
    if not rows:
        raise DataError(f"{data}: no rows in split {split!r}: choose another --split")
    cores = threads or physical_cores()
    runtime, front = load(edge, threads=cores, branches=branches), Front.load(edge)
    greedy, before = Sampling(max_tokens=_TOKENS), psutil.getloadavg()[0]

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

    ways: dict[str, Callable[[Sequence[Prompt]], Answers]] = {
        "alone": alone, "one_by_one": one_by_one, "side_by_side": side_by_side
    }  # fmt: skip
    seconds, same = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    by_image = group_by_image(rows)
    try:
        with console.bar("asking", len(rows)) as shown:
            for members in by_image.values():
                image = front.image(read_image(dataset.image_path(members[0])).rgb)
                prompts = [front.prompt(conversation(row.turns[:-1], image)) for row in members]
                expected: Answers = []
                for name, way in ways.items():
                    started = time.perf_counter()
                    given = way(prompts)
                    seconds[name] += time.perf_counter() - started
                    expected = expected or given
                    same[name] += sum(_ids(a) == _ids(b) for a, b in zip(expected, given, strict=True))
                shown.advance(len(members))
    finally:
        runtime.close()
    a_minute = {name: 60 * len(rows) / taken for name, taken in seconds.items()}
    return Throughput(
        questions=len(rows), pictures=len(by_image), alone_per_min=a_minute["alone"],
        one_by_one_per_min=a_minute["one_by_one"], side_by_side_per_min=a_minute["side_by_side"],
        one_by_one_identical=same["one_by_one"], side_by_side_identical=same["side_by_side"], branches=branches,
        threads=cores, load_average=(before, psutil.getloadavg()[0]), model=edge.resolve().name,
        manifest_sha256=manifest.sha256,
    )  # fmt: skip


def _ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]
