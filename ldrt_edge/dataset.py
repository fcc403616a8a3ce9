"""The dataset artefact: questions about images, read lazily.

A folder with `rows.jsonl` (one row a line) and `images/` (named by content, so no file name of a patient survives).
Splits go by `group` (an article, a patient's study, or the image itself), never by row.

    with artifact.create(out, "dataset", config, seed=seed) as draft, DatasetWriter(draft.path) as writer:
        image, digest = writer.add_image(png_bytes, ".png")
        writer.add(Row(...))
    rows = Dataset(out).rows("test")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Literal

from ldrt_edge import artifact
from ldrt_edge.errors import DataError, all_problems

ROWS = "rows.jsonl"
IMAGES = "images"
_LINE_LIMIT_BYTES = 1 << 20
_NAME_LIMIT = 255

Split = Literal["train", "test"]
AnswerType = Literal["closed", "open"]
PhantomLanguage = Literal["en", "de", "es", "fr", "pt", "zh"]

CANNOT_BE_TOLD: dict[PhantomLanguage, str] = {
    "en": "cannot be told from this image",
    "de": "aus diesem Bild nicht zu erkennen",
    "es": "no se puede saber por esta imagen",
    "fr": "impossible à dire d'après cette image",
    "pt": "não é possível saber por esta imagem",
    "zh": "从这张图像无法判断",
}
"""What models are taught to answer where a picture does not show what is asked, in the words of the phantom's data."""


@dataclass(frozen=True)
class Turn:
    """One utterance of a conversation."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Row:
    """A conversation about one image; every assistant turn is a reference answer.

    `image` is relative to the dataset folder. `group` is what a split must not divide. `kind` says what sort of
    picture it is ("dose map", "CHEST"): the wrong-image control draws the other picture from the same kind.
    `task` names the question kind ("beam count", "modality"); `language` is BCP 47. `present` and `absent` are
    structures that are surely in the picture and surely not, by their English names ("thalamus"), where that is known.
    """

    id: str
    image: str
    image_sha256: str
    turns: tuple[Turn, ...]
    language: str
    task: str
    answer_type: AnswerType
    source: str
    licence: str
    group: str
    kind: str = ""
    split: Split = "train"
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The last question: the text of the last user turn."""
        return [turn.text for turn in self.turns if turn.role == "user"][-1]

    @property
    def answer(self) -> str:
        """The reference answer to the last question."""
        return self.turns[-1].text


class Dataset:
    """A dataset artefact on disk; only byte offsets are held in memory.

    Raises:
        ArtifactError: not a complete dataset artefact.
        DataError: a row cannot be read (on access), or images are missing (`rows`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = artifact.verify(self.folder, "dataset", quick=True)
        self._path = self.folder / ROWS
        if not self._path.is_file():
            raise DataError(f"{self.folder}: no {ROWS}")
        self._offsets = list(_line_offsets(self._path))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Row:
        with self._path.open("rb") as stream:
            stream.seek(self._offsets[index])
            return _parse(stream.readline(_LINE_LIMIT_BYTES), self._path, index + 1)

    def __iter__(self) -> Iterator[Row]:
        with self._path.open("rb") as stream:
            for number, offset in enumerate(self._offsets, start=1):
                stream.seek(offset)
                yield _parse(stream.readline(_LINE_LIMIT_BYTES), self._path, number)

    def rows(self, split: Split | None = None) -> list[Row]:
        """All rows, or those of one split.

        Raises:
            DataError: a row cannot be read or names an image that is not there.
        """
        chosen = [row for row in self if split is None or row.split == split]
        missing = sorted({row.image for row in chosen if not self.image_path(row).is_file()})
        if missing:
            raise DataError(all_problems(missing, f"{self.folder}: images that rows name are missing"))
        return chosen

    def image_path(self, row: Row) -> Path:
        """Where the row's image lies.

        Raises:
            DataError: the row's path leaves the dataset folder.
        """
        path = self.folder / row.image
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DataError(f"{self.folder}: row {row.id} names an image outside the folder: {row.image}")
        return path


class DatasetWriter:
    """Writes `rows.jsonl`, or another file of rows, and `images/` into a draft folder; equal images are stored once."""

    def __init__(self, folder: Path, name: str = ROWS) -> None:
        self._folder = folder
        (folder / IMAGES).mkdir(exist_ok=True)
        self._rows = (folder / name).open("w", encoding="utf-8")

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()

    def add_image(self, data: bytes, suffix: str) -> tuple[str, str]:
        """Store an encoded image; returns its path in the dataset and its sha256."""
        digest = hashlib.sha256(data).hexdigest()
        name = f"{IMAGES}/{digest[:24]}{suffix.lower()}"
        path = self._folder / name
        if not path.exists() or path.stat().st_size != len(data):  # a full disk may have left half of one
            path.write_bytes(data)
        return name, digest

    def add(self, row: Row) -> None:
        """Append one row."""
        self._rows.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file that `DatasetWriter` wrote, one at a time.

    Raises:
        DataError: a line is no row.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LINE_LIMIT_BYTES), b""), start=1):
            yield _parse(line, path, number)


def choose_rows(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """Whole pictures in a seeded order, turn about by kind, until `limit` rows are reached (at least two pictures)."""
    by_image = group_by_image(rows)
    if limit is None or limit >= len(rows):
        return [row for members in by_image.values() for row in members]
    import numpy as np

    rng = np.random.default_rng(seed)
    kinds: dict[str, list[str]] = {}
    for image in sorted(by_image):
        kinds.setdefault(by_image[image][0].kind, []).append(image)
    shuffled = {kind: [str(image) for image in rng.permutation(images)] for kind, images in kinds.items()}
    turns = sorted((turn, kind, image) for kind, images in shuffled.items() for turn, image in enumerate(images))
    chosen: list[Row] = []
    for count, (_, _, image) in enumerate(turns):
        if len(chosen) >= limit and count >= 2:
            break
        chosen.extend(by_image[image])
    return chosen


def group_by_image(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by their picture, in the order of first appearance."""
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    return by_image


def assign_splits(
    groups: Sequence[str], test_fraction: float, seed: int, strata: Sequence[str] | None = None
) -> dict[str, Split]:
    """Give every distinct group a split: `test_fraction` of all groups to "test", spread evenly over the strata.

    What one stratum's share leaves over or lacks of a whole group, the next by name makes up for: strata of few groups
    each still give as many as they should together. Between 0 and 1, each side gets one of two or more groups.
    Depends only on the names, the fraction and the seed: the order of `groups` does not matter.
    """
    stratum_of = dict(zip(groups, strata or [""] * len(groups), strict=True))
    by_stratum: dict[str, list[str]] = {}
    for group, stratum in stratum_of.items():
        by_stratum.setdefault(stratum, []).append(group)
    count = len(stratum_of)
    wanted = round(count * test_fraction)
    if 0 < test_fraction < 1 and count > 1:
        wanted = min(max(wanted, 1), count - 1)
    splits: dict[str, Split] = {}
    seen = given = 0
    for _, members in sorted(by_stratum.items()):
        members.sort(key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
        seen += len(members)
        tests = round(seen * wanted / count) - given
        given += tests
        splits.update({name: "test" if i < tests else "train" for i, name in enumerate(members)})
    return splits


_LISTS = ("present", "absent")
_TEXTS = tuple(field.name for field in fields(Row) if field.name not in ("turns", *_LISTS))


def _line_offsets(path: Path) -> Iterator[int]:
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            if line.strip():
                yield offset
            offset += len(line)


def _parse(line: bytes, path: Path, number: int) -> Row:
    try:
        data = json.loads(line)
        turns = tuple(Turn(role=t["role"], text=t["text"]) for t in data.pop("turns"))
        present, absent = (tuple(data.pop(name, ())) for name in _LISTS)
        row = Row(turns=turns, present=present, absent=absent, **data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: line {number} is not a dataset row ({str(error)[:200]})") from error
    texts = [*(getattr(row, name) for name in _TEXTS), *(text for turn in turns for text in (turn.role, turn.text))]
    texts += [*present, *absent]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: line {number} is not a dataset row (a value that is no text)")
    if not row.image.isprintable() or len(row.image) > _NAME_LIMIT:
        raise DataError(f"{path}: line {number}: no name for an image: {row.image[:80]!r}")
    if len(turns) < 2 or turns[-1].role != "assistant" or "user" not in [turn.role for turn in turns]:
        raise DataError(f"{path}: line {number}: a row ends with an assistant turn that answers a user turn")
    return row
