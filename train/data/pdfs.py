"""PDF articles: embedded pictures with the caption that the layout puts under (or over) them.

A caption is a paragraph that begins like one ("Figure 3", "Abb. 3", "图3"); its pictures are those that lie nearest to
it in the same column, rendered as the page shows them (strips, masks and colour spaces included). Drawings that are
no embedded picture are not seen. A page that is one picture without text is a scan: it is reported and left.

PDFium (BSD and Apache-2.0, through pypdfium2) reads and draws; it fetches nothing and runs no script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pypdfium2

from ldrt_edge.errors import DataError
from ldrt_edge.image import MAX_PIXELS
from ldrt_edge.train.data.articles import Article, Figure
from ldrt_edge.train.data.licences import spdx
from ldrt_edge.train.data.packages import FILE_LIMIT_BYTES
from ldrt_edge.train.data.pictures import png_bytes

_PAGES_LIMIT, _PICTURES_LIMIT, _TEXT_LIMIT = 300, 400, 200_000
_DPI, _MAX_SIDE = 200, 2400
_CAPTION = re.compile(
    r"^(?:supplementary\s+)?((?:fig(?:ure|ura|\.)?|abb(?:ildung|\.)?|gráfico|рис(?:унок|\.)?|ryc(?:ina|\.)?|obr(?:ázek|\.)?)\s*"
    r"\d+[a-z]?|[图圖図]\s*\d+|그림\s*\d+)\s*[.:|)–-]*\s*(?=\S)", re.I,
)
_DOI = re.compile(r"\b10\.\d{4,9}/[^\s\"<>]+[^\s\"<>.,;)]")
_LICENCE = re.compile(r"creative\s*commons|\bCC[ -](?:BY|0)\b", re.I)
"""Only what is said around these words: "public domain" in a text may be its subject."""
_NEAR_PT, _LINE_GAP, _MIN_SIDE_PT = 60.0, 1.7, 40.0
_SCAN_SHARE, _SCAN_LETTERS = 0.7, 60

Box = tuple[float, float, float, float]
"""left, bottom, right, top, in points from the page's lower left corner."""


@dataclass(frozen=True)
class Paper:
    """A PDF as an article, the pictures that its figures name, and the pages that are scans (from 1)."""

    article: Article
    files: Mapping[str, bytes]
    scanned: tuple[int, ...]

    def named(self, name: str) -> list[str]:
        """As `packages.Files`."""
        return [name] if name in self.files else []

    def read(self, handle: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        """As `packages.Files`."""
        if not self.files[handle]:
            raise DataError(f"more pixels than the limit of {MAX_PIXELS // 10**6} megapixels")
        return self.files[handle]


@dataclass(frozen=True)
class _Line:
    text: str
    box: Box


def read_pdf(data: bytes) -> Paper:
    """Read a PDF's figures.

    Raises:
        DataError: not a readable PDF, locked, or too long.
    """
    try:
        document: Any = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise DataError(f"not a readable PDF ({str(error)[:100]})") from None
    try:
        if len(document) > _PAGES_LIMIT:
            raise DataError(f"{len(document)} pages, the limit is {_PAGES_LIMIT}")
        return _read(document, data)
    except pypdfium2.PdfiumError as error:
        raise DataError(f"a damaged PDF ({str(error)[:100]})") from None
    finally:
        document.close()


def _read(document: Any, data: bytes) -> Paper:
    figures: list[Figure] = []
    files: dict[str, bytes] = {}
    scanned, texts = [], []
    for number in range(len(document)):
        page = document[number]
        lines, pictures = _lines(page), _pictures(page)
        texts.append(" ".join(line.text for line in lines))
        width, height = page.get_size()
        covered = max((_area(box) for box, _ in pictures), default=0.0) / max(width * height, 1.0)
        if covered > _SCAN_SHARE and sum(map(str.isalpha, texts[-1])) < _SCAN_LETTERS:
            scanned.append(number + 1)
            continue
        for label, caption, box in _captions(lines):
            own = _near(box, pictures)
            names: tuple[tuple[str, ...], ...] = ()
            if own:
                name = f"p{number + 1}-{len(files) + 1}.png"
                too_large = any(pixels > MAX_PIXELS for _, pixels in own)
                files[name] = b"" if too_large else _draw(page, _union([one for one, _ in own]))
                names = ((name,),)
            figures.append(Figure(f"p{number + 1}-{label}", label, caption, "", names, (), None))
            if len(files) > _PICTURES_LIMIT:
                raise DataError(f"more than {_PICTURES_LIMIT} figures")
        page.close()
    said = " ".join(texts)[:_TEXT_LIMIT]
    return Paper(_article(document, said, data, figures), files, tuple(scanned))


def _article(document: Any, said: str, data: bytes, figures: list[Figure]) -> Article:
    about = document.get_metadata_dict()
    found = [one.lower() for one in _DOI.findall(said)]
    doi = max((one for one in found if one.startswith(found[0])), key=len, default="")  # a line's end may cut one short
    title = " ".join(str(about.get("Title") or "").split())[:1000]
    day = re.match(r"D:(\d{4})(\d\d)?(\d\d)?", str(about.get("CreationDate") or ""))
    return Article(
        id=f"sha256:{sha256(data).hexdigest()[:24]}", doi=doi, title=title,
        titles={"": title}, abstract=said[:8000], journal="", date="-".join(filter(None, day.groups())) if day else "",
        licence=spdx(said[max(0, at.start() - 60) : at.end() + 200] for at in _LICENCE.finditer(said)),
        keywords=tuple(filter(None, map(str.strip, re.split("[,;]", str(about.get("Keywords") or "")))))[:50],
        language="", figures=tuple(figures), aside={},
    )


def _lines(page: Any) -> list[_Line]:
    """The page's text as lines, from the top; pieces on one baseline that touch are one line."""
    text = page.get_textpage()
    pieces: list[_Line] = []
    for index in range(min(text.count_rects(), 5000)):
        box = text.get_rect(index)
        words = " ".join(text.get_text_bounded(*box).split())
        if words:
            pieces.append(_Line(words, box))
    text.close()
    lines: list[_Line] = []
    for piece in sorted(pieces, key=lambda piece: piece.box[0]):
        for number, line in enumerate(lines):
            if _goes_on(line.box, piece.box):
                lines[number] = _Line(f"{line.text} {piece.text}", _union([line.box, piece.box]))
                break
        else:
            lines.append(piece)
    return sorted(lines, key=lambda line: (-line.box[3], line.box[0]))


def _goes_on(line: Box, piece: Box) -> bool:
    """Whether a piece stands right after a line, at its height; another column is further away."""
    lower, higher = sorted((line[3] - line[1], piece[3] - piece[1]))
    overlap = min(line[3], piece[3]) - max(line[1], piece[1])
    return lower > 0.4 * higher and overlap > 0.4 * lower and -3 < piece[0] - line[2] < 1.2 * higher


def _pictures(page: Any) -> list[tuple[Box, int]]:
    """The page's embedded pictures that are large enough to show something: box, and pixels in the file."""
    found = []
    for one in page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE], max_depth=4):
        box = tuple(map(float, one.get_bounds()))
        width, height = one.get_px_size()
        found.append(((box[0], box[1], box[2], box[3]), int(width) * int(height)))
    return [(box, pixels) for box, pixels in found if box[2] - box[0] > 2 and box[3] - box[1] > 2]


def _captions(lines: list[_Line]) -> list[tuple[str, str, Box]]:
    """Label, text and box of each caption: its first line and those that follow without a gap."""
    captions = []
    for start, first in enumerate(lines):
        mark = _CAPTION.match(first.text)
        if mark is None:
            continue
        said, box = [first.text[mark.end() :]], first.box
        for line in lines[start + 1 :]:
            height = max(line.box[3] - line.box[1], 4.0)
            overlaps = min(box[2], line.box[2]) - max(box[0], line.box[0]) > 0
            if not overlaps or line.box[3] > box[1] + 0.5 * height:
                continue
            if box[1] - line.box[3] > (_LINE_GAP - 1) * height or _CAPTION.match(line.text):
                break
            said.append(line.text)
            box = _union([box, line.box])
        joined = re.sub(r"(?<=[^\W\d_])[-\xad\x02￾] (?=[a-zà-ÿ])", "", " ".join(said))
        captions.append((mark[1], joined.strip()[:8000], box))
    return captions


def _near(caption: Box, pictures: list[tuple[Box, int]]) -> list[tuple[Box, int]]:
    """The pictures over a caption, else under it, with those that touch them."""
    for above in (True, False):
        chosen: list[tuple[Box, int]] = []
        edge = caption
        while True:
            more = [
                one for one in pictures
                if one not in chosen and min(one[0][2], edge[2]) - max(one[0][0], edge[0]) > 0
                and -_NEAR_PT / 3 < (one[0][1] - edge[3] if above else edge[1] - one[0][3]) < _NEAR_PT
            ]
            beside = [
                one for one in pictures
                if one not in chosen and one not in more and any(_beside(one[0], other[0]) for other in chosen + more)
            ]
            if not more and not beside:
                break
            chosen += more + beside
            edge = _union([caption, *(box for box, _ in chosen)])
        whole = _union([box for box, _ in chosen]) if chosen else (0.0, 0.0, 0.0, 0.0)
        if min(whole[2] - whole[0], whole[3] - whole[1]) >= _MIN_SIDE_PT:
            return chosen
    return []


def _beside(one: Box, other: Box) -> bool:
    """Whether two pictures stand in one row, close to each other."""
    overlap = min(one[3], other[3]) - max(one[1], other[1])
    gap = max(one[0], other[0]) - min(one[2], other[2])
    return overlap > 0.5 * min(one[3] - one[1], other[3] - other[1]) and gap < _NEAR_PT / 2


def _draw(page: Any, box: Box) -> bytes:
    """A part of the page as PNG, at 200 dots an inch or what fits."""
    width, height = page.get_size()
    left, bottom, right, top = max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height)
    scale = min(_DPI / 72, _MAX_SIDE / max(right - left, top - bottom, 1.0))
    drawn = page.render(scale=scale, crop=(left, bottom, width - right, height - top), draw_annots=False)
    return png_bytes(drawn.to_numpy()[..., 2::-1].copy())


def _union(boxes: list[Box]) -> Box:
    lefts, bottoms, rights, tops = zip(*boxes, strict=True)
    return min(lefts), min(bottoms), max(rights), max(tops)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
