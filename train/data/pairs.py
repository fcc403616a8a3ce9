"""The pairs artefact: a picture and what its article says of it, a row a pair, with licence and origin.

`data curate` writes it and `data instruct` reads it: `pairs.jsonl`, `images/` (named by content), `dropped.jsonl` (a
row and a reason for whatever was left out), `funnel.csv` and `funnel.png`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ldrt_edge import artifact
from ldrt_edge.errors import DataError

PAIRS = "pairs.jsonl"
DROPPED = "dropped.jsonl"
IMAGES = "images"
_LINE_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Pair:
    """One picture and its caption in one language.

    figure, label: as the article names them. picture: the file name that the XML gives. part: "A" for a panel, "2/3"
    for one of several pictures under one caption, else "". compound: the caption speaks of panels that could not be
    told apart in the picture. language: BCP 47, by the article's own word ("declared") or by its letters
    ("identified"). relevance: the article's score by the term list. cluster: what a split must not divide: the
    article, with all that share a picture or a caption with it.
    """

    id: str
    article: str
    doi: str
    title: str
    journal: str
    date: str
    licence: str
    keywords: tuple[str, ...]
    language: str
    language_source: str
    figure: str
    label: str
    caption: str
    mentions: tuple[str, ...]
    picture: str
    part: str
    compound: bool
    image: str
    image_sha256: str
    width: int
    height: int
    relevance: float
    cluster: str


@dataclass(frozen=True)
class Dropped:
    """Something that did not become a pair: at which step, where it was, and why."""

    step: str
    where: str
    article: str
    figure: str
    reason: str


class Pairs:
    """A pairs artefact on disk, read line by line.

    Raises:
        ArtifactError: not a complete pairs artefact.
        DataError: a row cannot be read (on iteration).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = artifact.verify(self.folder, "pairs", quick=True)
        self.path = self.folder / PAIRS
        if not self.path.is_file():
            raise DataError(f"{self.folder}: no {PAIRS}")

    def __iter__(self) -> Iterator[Pair]:
        with self.path.open("rb") as stream:
            number = 0
            while line := stream.readline(_LINE_LIMIT_BYTES):
                number += 1
                yield parse_pair(line, f"{self.path}: line {number}")

    def image_path(self, pair: Pair) -> Path:
        """Where the pair's picture lies.

        Raises:
            DataError: the row names a file outside the folder, or none.
        """
        path = self.folder / pair.image
        if not path.resolve().is_relative_to(self.folder.resolve()) or not path.is_file():
            raise DataError(f"{self.folder}: pair {pair.id} names a picture that is not there: {pair.image}")
        return path


def pair_line(row: Pair | Dropped) -> str:
    """A row as its line of JSON."""
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def parse_pair(line: bytes | str, where: str) -> Pair:
    """A line of `pairs.jsonl`.

    Raises:
        DataError: it is none.
    """
    try:
        data = json.loads(line)
        return Pair(**data | {"keywords": tuple(data["keywords"]), "mentions": tuple(data["mentions"])})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where} is not a pair ({error})") from error
