"""Duplicates within and across articles, found on disk so that memory does not grow with the corpus.

Candidates come from an SQLite index over bands of hashes: of pictures by Zauner's pHash (a picture within
`PICTURE_BITS` of another shares at least one of `PICTURE_BITS + 1` bands with it), of captions by MinHash. Charts of
one kind hash alike, and captions of one series read alike: whether a candidate is a copy, a thumbnail says, laid over
the other's with room for a small crop. Captions alone drop nothing; they keep articles on one side.

Source: Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010); Broder, "On the
resemblance and containment of documents" (1997).
"""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge.train.data.language import letters

PICTURE_BITS = 4
UNLIKE = 0.5
"""From which `difference` on two pictures are two. Recompressed and rescaled copies measured up to 0.1, such that lost
1% at each edge up to 0.46; Kaplan-Meier plots of other data, drawn alike, from 0.71 on."""
THUMBNAIL_SIDE = 32
CAPTION_JACCARD = 0.9
_PERMUTATIONS, _CAPTION_BANDS = 64, 16
_CAPTION_LETTERS = 60  # shorter captions are alike by nature
_SHINGLE_WORDS = 3
_HASH_BITS = 64
_PLACES = 4  # a side
_GREYS = 16
_CROPS = (-0.03, -0.02, -0.01, 0.0, 0.01, 0.02, 0.03)


@dataclass(frozen=True)
class Marks:
    """What a pair is compared by: of its picture and of its caption ("" when too short), all in hex.

    look: 64 bits. thumbnail: `THUMBNAIL_SIDE` squared pixels of 16 greys, two a byte. caption: the MinHash signature.
    """

    look: str
    thumbnail: str
    caption: str


@dataclass(frozen=True)
class Seen:
    """What is asked of the index: `id` names the pair, `article` and `figure` where it stands."""

    id: str
    article: str
    figure: str
    language: str
    image_sha256: str
    marks: Marks


@dataclass(frozen=True)
class Hit:
    """An earlier pair that is the same or nearly so. `step` is why a pair is dropped for it, None if it only links."""

    step: str | None
    id: str
    article: str


def marks_of(rgb: NDArray[np.uint8], caption: str) -> Marks:
    """Hash a picture (height, width, 3) and a caption."""
    import imagehash

    image = Image.fromarray(rgb)
    image.thumbnail((512, 512))
    return Marks(str(imagehash.phash(image)), _thumbnail(image), _signature(caption))


def _thumbnail(image: Image.Image) -> str:
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    pixels = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float64).ravel()
    low, high = pixels.min(), pixels.max()
    greys = np.rint((pixels - low) * (_GREYS - 1) / max(high - low, 1.0)).astype(np.uint8)
    return bytes(greys[::2] * _GREYS + greys[1::2]).hex()


def _signature(caption: str) -> str:
    if letters(caption) < _CAPTION_LETTERS:
        return ""
    from datasketch import MinHash

    plain = caption.casefold()
    words = re.findall(r"\w+", plain)
    if len(words) * 12 < len(plain):  # a script without spaces
        words = [letter for letter in plain if letter.isalnum()]
    shingles = {" ".join(words[at : at + _SHINGLE_WORDS]) for at in range(max(1, len(words) - _SHINGLE_WORDS + 1))}
    sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
    sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
    return np.asarray(sketch.hashvalues, dtype="<u4").tobytes().hex()


class Index:
    """The pairs seen so far, in a scratch file of SQLite."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._path = path
        self._base = sqlite3.connect(path, isolation_level=None)
        self._base.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-32000; BEGIN;"
            "CREATE TABLE pairs (number INTEGER PRIMARY KEY, id TEXT, article TEXT, figure TEXT, language TEXT,"
            " sha TEXT, look TEXT, thumbnail TEXT, caption TEXT);"
            "CREATE INDEX by_sha ON pairs (sha);"
            "CREATE TABLE articles (id TEXT PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE images (name TEXT PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE bands (key TEXT, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID;"
        )

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()
        self._path.unlink(missing_ok=True)

    def is_new(self, article: str) -> bool:
        """Whether an article comes for the first time; it is remembered."""
        return self._base.execute("INSERT OR IGNORE INTO articles VALUES (?)", (article,)).rowcount > 0

    def keep_image(self, name: str) -> None:
        """Remember that a picture is used."""
        self._base.execute("INSERT OR IGNORE INTO images VALUES (?)", (name,))

    def is_kept(self, name: str) -> bool:
        """Whether a picture is used."""
        return self._base.execute("SELECT 1 FROM images WHERE name = ?", (name,)).fetchone() is not None

    def add(self, pair: Seen) -> list[Hit]:
        """Hits among earlier pairs, the strongest first; the pair is remembered unless it is dropped for one."""
        hits = sorted(self._hits(pair), key=lambda hit: (hit.step is None, hit.step != "repeated picture"))
        if not hits or hits[0].step is None:
            marks = pair.marks
            cursor = self._base.execute(
                "INSERT INTO pairs VALUES (NULL,?,?,?,?,?,?,?,?)",
                (pair.id, pair.article, pair.figure, pair.language, pair.image_sha256, marks.look, marks.thumbnail,
                 marks.caption),
            )
            number = cursor.lastrowid
            self._base.executemany("INSERT OR IGNORE INTO bands VALUES (?,?)", [(k, number) for k in _bands(marks)])
        return hits

    def _hits(self, pair: Seen) -> Iterator[Hit]:
        told = set()
        columns = "number, id, article, figure, language, look, thumbnail, caption"
        for number, identity, article, _, language, *_ in self._base.execute(
            f"SELECT {columns} FROM pairs WHERE sha = ? ORDER BY number", (pair.image_sha256,)
        ):
            told.add(number)
            yield Hit("repeated picture" if language == pair.language else None, identity, article)
        marks = "(" + ",".join("?" * len(keys := [*_bands(pair.marks)])) + ")"
        for number, identity, article, figure, language, look, thumbnail, caption in self._base.execute(
            f"SELECT {columns} FROM pairs WHERE number IN (SELECT number FROM bands WHERE key IN {marks})"
            " ORDER BY number", keys,
        ):
            if number in told or (article, figure) == (pair.article, pair.figure):
                continue
            looks = _distance(look, pair.marks.look) <= PICTURE_BITS
            reads = _jaccard(caption, pair.marks.caption) >= CAPTION_JACCARD
            copy = (looks or reads) and difference(thumbnail, pair.marks.thumbnail) < UNLIKE
            if copy or reads:
                step = f"near {'picture' if looks else 'caption'}"
                yield Hit(step if copy and language == pair.language else None, identity, article)


class Clusters:
    """Articles that share something, as sets; only those with a link are held in memory."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def link(self, one: str, other: str) -> None:
        """Two articles belong together."""
        first, second = sorted((self.of(one), self.of(other)))
        if first != second:
            self._parent[second] = first

    def of(self, article: str) -> str:
        """The cluster's name: its first article by name."""
        while article in self._parent:
            article = self._parent[article]
        return article


def _bands(marks: Marks) -> Iterator[str]:
    bits = f"{int(marks.look, 16):0{_HASH_BITS}b}"
    edges = [round(number * _HASH_BITS / (PICTURE_BITS + 1)) for number in range(PICTURE_BITS + 2)]
    for number, (start, end) in enumerate(pairwise(edges)):
        yield f"p{number}:{bits[start:end]}"
    width = len(marks.caption) // _CAPTION_BANDS
    for number in range(_CAPTION_BANDS if marks.caption else 0):
        yield f"c{number}:{marks.caption[number * width : (number + 1) * width]}"


def _distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def difference(one: str, other: str) -> float:
    """How much two thumbnails differ where they differ most: mean square in that place, of the pictures' variance.

    One is laid over the other with its edges moved by up to 3% each, as its rows' and columns' means fit best.
    """
    left, right = _pixels(one), _pixels(other)
    return min(_residue(left, _fitted(right, left)), _residue(right, _fitted(left, right)))


def _pixels(thumbnail: str) -> NDArray[np.float64]:
    pairs = np.frombuffer(bytes.fromhex(thumbnail), dtype=np.uint8)
    return np.stack([pairs // _GREYS, pairs % _GREYS], axis=1).reshape(THUMBNAIL_SIDE, -1).astype(np.float64)


def _residue(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    place = THUMBNAIL_SIDE // _PLACES
    worst = ((one - other) ** 2).reshape(_PLACES, place, _PLACES, place).mean(axis=(1, 3)).max()
    return float(worst / max(min(one.var(), other.var()), 1e-3))


def _fitted(moved: NDArray[np.float64], fixed: NDArray[np.float64]) -> NDArray[np.float64]:
    """A thumbnail with its edges where the other has them."""
    crops = _crops()
    rows, columns = (
        crops[int(np.argmin(((crops @ moved.mean(axis=axis) - fixed.mean(axis=axis)) ** 2).sum(axis=1)))]
        for axis in (1, 0)
    )
    return np.asarray(rows @ moved @ columns.T)


@functools.cache
def _crops() -> NDArray[np.float64]:
    """For each way to move two opposite edges, the matrix that takes a line of pixels to such a crop of it."""
    lines = np.eye(THUMBNAIL_SIDE)
    at = np.arange(THUMBNAIL_SIDE)
    return np.stack([
        np.stack([np.interp((at + 0.5) * (1 - start - end) + start * THUMBNAIL_SIDE - 0.5, at, line) for line in lines],
                 axis=1)
        for start in _CROPS for end in _CROPS
    ])


def _jaccard(one: str, other: str) -> float:
    if not one or not other:
        return 0.0
    left, right = (np.frombuffer(bytes.fromhex(signature), dtype="<u4") for signature in (one, other))
    return float((left == right).mean())
