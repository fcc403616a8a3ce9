"""What one worker does: read documents, keep or drop their figures, store pictures, write one part file.

A part file appears whole or not at all, so a killed run neither loses nor repeats an article. Whatever is wrong with
a document is a line of the part; a document that takes too long ends its process, and the run goes on without it. What
is wrong with the machine leaves no part, so that the next run reads the document again.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType

import numpy as np

from ldrt_edge.errors import DataError
from ldrt_edge.train.data.articles import Article, Figure, read_articles
from ldrt_edge.train.data.duplicates import Marks, marks_of
from ldrt_edge.train.data.figures import Pixels, encoded, find_file, read_pixels, shrunk
from ldrt_edge.train.data.filters import Drop, Settings, judge_article, judge_figure, judge_name, judge_pixels
from ldrt_edge.train.data.language import Source, language_of
from ldrt_edge.train.data.packages import Files, Found, Refused, Unit, check_machine, open_unit
from ldrt_edge.train.data.pairs import IMAGES, Dropped, Pair
from ldrt_edge.train.data.panels import caption_parts, panel_boxes, panels_named

WORK = "work"
DOCUMENT_SECONDS = 300


@dataclass(frozen=True)
class Chunk:
    """A worker's task: some units (or what was refused in their place), and the draft folder that it writes into.

    given_up: units (by `where`) whose reading ended a process before; they are not opened again.
    """

    number: int
    units: tuple[Unit | Refused, ...]
    settings: Settings
    folder: Path
    given_up: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Told:
    """One line of a part: an article that was kept (and where it was), a pair with its marks, or something dropped."""

    article: str | None = None
    where: str | None = None
    pair: Pair | None = None
    marks: Marks | None = None
    dropped: Dropped | None = None

    @staticmethod
    def parse(line: str) -> Told:
        """Read a line back."""
        data = json.loads(line)
        pair, marks, dropped = data.get("pair"), data.get("marks"), data.get("dropped")
        return Told(
            data.get("article"), data.get("where"),
            Pair(**pair | {"keywords": tuple(pair["keywords"]), "mentions": tuple(pair["mentions"])}) if pair else None,
            Marks(**marks) if marks else None, Dropped(**dropped) if dropped else None,
        )

    def line(self) -> str:
        """As JSON, without what is not there."""
        parts = {name: value for name, value in vars(self).items() if value is not None}
        told = json.dumps(parts, ensure_ascii=False, default=vars) + "\n"
        return told.encode("utf-8", "replace").decode()  # file names may be no text at all


def part_path(folder: Path, number: int) -> Path:
    """Where a chunk's part lies in the draft: a thousand to a folder."""
    return folder / WORK / f"{number // 1000:05d}" / f"{number:08d}.jsonl"


def read_chunk(chunk: Chunk) -> int:
    """Read a chunk and write its part; how many documents it had.

    Raises:
        Halted: the machine failed (no room, no memory, a broken disk); there is no part.
    """
    part = part_path(chunk.folder, chunk.number)
    part.parent.mkdir(parents=True, exist_ok=True)
    scratch = part.with_suffix(f".{os.getpid()}")
    documents = 0
    with scratch.open("w", encoding="utf-8") as stream, _Watchdog() as watchdog:
        for unit in chunk.units:
            for told in _read_unit(unit, chunk, watchdog):
                documents += told.article is not None or (told.dropped is not None and not told.dropped.figure)
                stream.write(told.line())
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(part)
    return documents


class _Watchdog:
    """Ends the process when a document takes too long, also where a library holds the interpreter's lock.

    Setting the alarm costs milliseconds, so it is set again only after a while.
    """

    def __enter__(self) -> _Watchdog:
        self._nowhere = Path(os.devnull).open("w")  # for the traceback that comes with the alarm
        self._set_at = -math.inf
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._nowhere.close()

    def rearm(self) -> None:
        """A new document begins."""
        now = time.monotonic()
        if now - self._set_at > DOCUMENT_SECONDS / 10:
            faulthandler.dump_traceback_later(DOCUMENT_SECONDS, exit=True, file=self._nowhere)
            self._set_at = now


def _read_unit(unit: Unit | Refused, chunk: Chunk, watchdog: _Watchdog) -> Iterator[Told]:
    if isinstance(unit, Refused):
        yield _dropped(Drop("refused", unit.reason), unit.where)
        return
    if unit.where in chunk.given_up:
        yield _dropped(Drop("unreadable", "reading it ended the process, or took too long"), unit.where)
        return
    documents = open_unit(unit)
    while True:
        watchdog.rearm()
        try:
            found = next(documents, None)
        except Exception as error:  # a poison package ends here, its line says what it met
            yield _poison(error, unit.where)
            return
        if found is None:
            return
        try:
            told = [*_read_document(found, chunk.settings, chunk.folder)]
        except Exception as error:  # a poison document costs itself only
            told = [_poison(error, found.where)]
        yield from told


def _read_document(found: Found, settings: Settings, folder: Path) -> Iterator[Told]:
    if isinstance(found.data, Refused):
        yield _dropped(Drop("refused", found.data.reason), found.where)
        return
    files = found.files
    try:
        if found.kind == "pdf":
            from ldrt_edge.train.data.pdfs import read_pdf  # PDFium is loaded for PDFs only

            files = paper = read_pdf(found.data)
            articles = [paper.article]
            if paper.scanned and not paper.article.figures:
                raise DataError(f"a scan without text: {len(paper.scanned)} pages")
        else:
            articles = read_articles(found.data)
    except DataError as error:
        yield _dropped(Drop("unreadable", str(error)), found.where)
        return
    for article in articles:
        drop, relevance = judge_article(article, settings)
        if drop is not None:
            yield _dropped(drop, found.where, article.id)
            continue
        yield Told(article=article.id, where=found.where)
        for page in paper.scanned if found.kind == "pdf" else ():
            yield _dropped(Drop("scanned page", "a picture without text"), found.where, article.id, f"p{page}")
        used: set[tuple[str, str]] = set()
        for number, figure in enumerate(article.figures, start=1):
            around = " ".join((article.title, *figure.mentions, article.abstract))
            language = language_of(figure.language, figure.caption, around)
            name = _unused(figure.id or str(number), language[0] if language else "", used)
            yield from _read_figure(article, figure, name, language, relevance, found.where, files, settings, folder)


def _unused(name: str, language: str, used: set[tuple[str, str]]) -> str:
    """A figure's name, numbered where another of its article has it in the same language: a pair's id is its own."""
    names = (f"{name}-{number}" if number > 1 else name for number in count(1))
    free = next(one for one in names if (one, language) not in used)
    used.add((free, language))
    return free


def _read_figure(
    article: Article, figure: Figure, name: str, language: tuple[str, Source] | None, relevance: float, where: str,
    files: Files, settings: Settings, folder: Path,
) -> Iterator[Told]:
    drop = judge_figure(figure, settings)
    if drop is None and language is None:
        drop = Drop("language", "too few letters to tell")
    elif drop is None and language and settings.languages and language[0] not in settings.languages:
        drop = Drop("language", language[0])
    if drop is not None or language is None:
        assert drop is not None
        yield _dropped(drop, where, article.id, name)
        return
    for index, names in enumerate(figure.pictures, start=1):
        part = f"{index}/{len(figure.pictures)}" if len(figure.pictures) > 1 else ""
        looked_at = _look(figure, names, part, files, settings)
        for seen in looked_at:
            if isinstance(seen, Drop):
                yield _dropped(seen, where, article.id, f"{name} {part}".strip())
                continue
            image, digest = _store(seen.pixels, folder)
            pair = Pair(
                id="/".join(filter(None, (f"{article.id}#{name}", seen.part, language[0]))), article=article.id,
                doi=article.doi, title=article.titles.get(figure.language, article.title), journal=article.journal,
                date=article.date, licence=figure.licence or article.licence, keywords=article.keywords,
                language=language[0], language_source=language[1], figure=name, label=figure.label,
                caption=seen.caption, mentions=figure.mentions, picture=names[0], part=seen.part,
                compound=seen.compound, image=image, image_sha256=digest, width=seen.pixels.rgb.shape[1],
                height=seen.pixels.rgb.shape[0], relevance=relevance, cluster=article.id,
            )
            yield Told(pair=pair, marks=marks_of(seen.pixels.rgb, seen.caption))


@dataclass(frozen=True, eq=False)
class _Seen:
    pixels: Pixels
    caption: str
    part: str
    compound: bool


def _look(
    figure: Figure, names: tuple[str, ...], part: str, files: Files, settings: Settings
) -> list[_Seen | Drop]:
    """A picture, or its panels, or why it is dropped."""
    if drop := judge_name(names[0]):
        return [drop]
    try:
        handle = find_file(names, files)
    except DataError as error:
        return [Drop("picture not found", f"{names[0]}: {error}")]
    try:
        pixels = read_pixels(handle, files)
    except DataError as error:
        return [Drop("picture unreadable", f"{names[0]}: {error}")]
    if drop := judge_pixels(pixels.rgb, settings):
        return [drop]
    parts = caption_parts(figure.caption) if not part else []
    boxes = panel_boxes(pixels.rgb, len(parts)) if parts and settings.panels else []
    if not boxes:
        compound = not part and panels_named(figure.caption) > 1
        return [_Seen(_fit(pixels, settings.max_side), figure.caption, part, compound)]
    seen: list[_Seen | Drop] = []
    for (left, top, right, bottom), said in zip(boxes, parts, strict=True):
        panel = np.ascontiguousarray(pixels.rgb[top:bottom, left:right])
        drop = judge_pixels(panel, settings)
        cut = encoded(shrunk(panel, settings.max_side), lossy=pixels.suffix == ".jpg")
        seen.append(drop or _Seen(cut, said.text, said.letter, False))
    return seen


def _fit(pixels: Pixels, max_side: int) -> Pixels:
    if max(pixels.rgb.shape[:2]) <= max_side:
        return pixels
    return encoded(shrunk(pixels.rgb, max_side), lossy=pixels.suffix == ".jpg")


def _store(pixels: Pixels, folder: Path) -> tuple[str, str]:
    """Write a picture under its content's name; two workers may do so at once."""
    digest = hashlib.sha256(pixels.data).hexdigest()
    name = f"{IMAGES}/{digest[:24]}{pixels.suffix}"
    path = folder / name
    if not path.exists():
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_bytes(pixels.data)
        scratch.replace(path)
    return name, digest


def _dropped(drop: Drop, where: str, article: str = "", figure: str = "") -> Told:
    return Told(dropped=Dropped(drop.step, where, article, figure, drop.reason))


def _poison(error: Exception, where: str) -> Told:
    """What a document met, as its line.

    Raises:
        Halted: it was not the document's fault.
    """
    check_machine(error, where)
    said = " ".join(str(error).split())[:200]
    return _dropped(Drop("unreadable", f"{type(error).__name__}: {said}"), where)
