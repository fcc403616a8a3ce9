"""PDF articles: embedded pictures with the caption that the layout puts under (or over) them.

A caption is a paragraph that begins like one ("Figure 3.", "Abb. 3 –", "图3"); a sentence about a figure is none. Each
picture belongs to one caption at most, the nearest on that side where most captions of the document have theirs, and is
rendered as the page shows it (strips, masks and colour spaces included). Drawings that are no embedded picture are not
seen. A page that is one picture without text is a scan: it is reported and left.

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
from ldrt_edge.train.data.licences import UNKNOWN, licence_said, spdx
from ldrt_edge.train.data.packages import FILE_LIMIT_BYTES
from ldrt_edge.train.data.pictures import png_bytes

_PAGES_LIMIT, _PICTURES_LIMIT, _TEXT_LIMIT = 300, 400, 200_000
_DPI, _MAX_SIDE = 200, 2400
_CAPTION = re.compile(
    r"^(?P<label>(?:supplementary\s+)?(?:fig(?:ure|ura|\.)?|abb(?:ildung|\.)?|gráfico|рис(?:унок|\.)?|ryc(?:ina|\.)?"
    r"|obr(?:ázek|\.)?)\s*(?:[SA]?\d{1,3}(?:\.\d{1,3})*[a-z]?|(?-i:[IVX]{1,4}\b))|[图圖図]\s*\d{1,3}|그림\s*\d{1,3})"
    r"(?:\s*(?P<mark>[.:|)–—-]+)(?!\d)|(?=\s|$))\s*", re.I,
)
_PANELS = re.compile(r"^[a-h](?:\s?[–,-]\s?[a-h])*\s")
_ENDED = re.compile(r"[.!?:;。！？]\W*$")
_DOI = re.compile(r"\b10\.\d{4,9}/[^\s\"<>]{1,200}[^\s\"<>.,;)]")
_REFERENCES = re.compile(
    r"\b(?:References|REFERENCES|Bibliography|Literaturverzeichnis|Literatur:? \[?1\b|Bibliograf[ií]a|Bibliographie"
    r"|Refer[eê]ncias|REFER[EÊ]NCIAS|Riferimenti|参考文献)(?!\w)"
)
_LICENCE = re.compile(r"creative\s*commons|\bCC[ -]*(?:BY|0)\b", re.I)
"""Only what is said around these words: "public domain" in a text may be its subject."""
_OF_ARTICLE = re.compile(
    r"\b(?:article|paper|work|open access|publication|journal|distributed|published|licen[sc]ed|art[ií]culo|artigo"
    r"|obra|trabalho|œuvre|artikel|beitrag|werk|articolo|opera)\b", re.I,
)
_OF_SOMETHING = re.compile(
    r"\b(?:images?|pictures?|data(?:sets?|bases?)?|figures?|fig|tables?|software|code|materials?|collections?|atlas"
    r"|im[aá]gen?e?s|daten|bilde?r?|dados|datos|dati)\b", re.I,
)
_RESERVED = re.compile(
    r"all rights reserved|alle rechte vorbehalten|todos l?os d[ei]re(?:itos|chos) reservados|tous droits réservés"
    r"|tutti i diritti riservati", re.I,
)
_NEAR_PT, _PANEL_GAP_PT, _LINE_GAP, _MIN_SIDE_PT = 60.0, 10.0, 1.7, 40.0
_SCAN_SHARE, _SCAN_LETTERS = 0.7, 60
_SIDES = (True, False)
"""Whether the pictures stand over their captions, or under them."""

Box = tuple[float, float, float, float]
"""left, bottom, right, top, in points from the page's lower left corner."""
Picture = tuple[Box, int]
"""Where an embedded picture lies, and its pixels in the file."""


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


Caption = tuple[str, str, Box]
"""Label, text and where they stand."""


@dataclass(frozen=True)
class _Page:
    number: int
    captions: list[Caption]
    pictures: list[Picture]


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
    scanned: list[int] = []
    texts: list[str] = []
    pages: list[_Page] = []
    for number in range(len(document)):
        page = document[number]
        lines, pictures = _lines(page), _pictures(page)
        texts.append(" ".join(line.text for line in lines))
        width, height = page.get_size()
        covered = max((_area(box) for box, _ in pictures), default=0.0) / max(width * height, 1.0)
        if covered > _SCAN_SHARE and sum(map(str.isalpha, texts[-1])) < _SCAN_LETTERS:
            scanned.append(number + 1)
        elif captions := _captions(lines):
            pages.append(_Page(number, captions, pictures))
        page.close()
    figures, files = _draw_figures(document, pages)
    return Paper(_article(document, texts, data, figures), files, tuple(scanned))


def _draw_figures(document: Any, pages: list[_Page]) -> tuple[list[Figure], dict[str, bytes]]:
    """Each caption as a figure, with what lies on the document's side of it; over it where both sides have as many."""
    sides = [[_on_side([box for *_, box in page.captions], page.pictures, over) for page in pages] for over in _SIDES]
    shown = max(sides, key=lambda side: sum(bool(own) for page in side for own in page))
    figures: list[Figure] = []
    files: dict[str, bytes] = {}
    for page, of_captions in zip(pages, shown, strict=True):
        drawn = document[page.number]
        for (label, caption, _), own in zip(page.captions, of_captions, strict=True):
            names: tuple[tuple[str, ...], ...] = ()
            if own:
                name = f"p{page.number + 1}-{len(files) + 1}.png"
                too_large = any(pixels > MAX_PIXELS for _, pixels in own)
                files[name] = b"" if too_large else _draw(drawn, _union([box for box, _ in own]))
                names = ((name,),)
            figures.append(
                Figure(f"p{page.number + 1}-{label}", label, caption, "", names, (), licence_said(caption))
            )
            if len(files) > _PICTURES_LIMIT:
                raise DataError(f"more than {_PICTURES_LIMIT} figures")
        drawn.close()
    return figures, files


def _article(document: Any, texts: list[str], data: bytes, figures: list[Figure]) -> Article:
    about = document.get_metadata_dict()
    said = " ".join(texts)[:_TEXT_LIMIT]
    title = " ".join(str(about.get("Title") or "").split())[:1000]
    day = re.match(r"D:(\d{4})(\d\d)?(\d\d)?", str(about.get("CreationDate") or ""))
    return Article(
        id=f"sha256:{sha256(data).hexdigest()[:24]}", doi=_doi(about, texts), title=title,
        titles={"": title}, abstract=said[:8000], journal="", date="-".join(filter(None, day.groups())) if day else "",
        licence=_licence(said),
        keywords=tuple(
            word[:300] for word in map(str.strip, re.split("[,;]", str(about.get("Keywords") or ""))) if word
        )[:50],
        language="", figures=tuple(figures), aside={},
    )


def _doi(about: Mapping[str, Any], texts: list[str]) -> str:
    """The article's own DOI: of the metadata, else the only one before the references of the first page with text."""
    first = next((text for text in texts if text), "")
    for said in (" ".join(map(str, about.values())), _REFERENCES.split(first)[0]):
        found = [one.lower() for one in _DOI.findall(said)]
        longest = max(found, key=len, default="")
        if found and all(longest.startswith(one) for one in found):  # a line's end may cut one short
            return longest
    return ""


def _licence(said: str) -> str:
    """What the article says of itself, not of the pictures or data of others; none where all rights are reserved."""
    if _RESERVED.search(said):
        return UNKNOWN
    sentences = []
    for at in _LICENCE.finditer(said):
        before = re.split(r"[.;]\s", said[max(0, at.start() - 200) : at.start()])[-1]
        after = said[at.start() : at.end() + 200]
        if _OF_ARTICLE.search(before + re.split(r"[.;]\s", after)[0]) and not _OF_SOMETHING.search(before):
            sentences.append(before + after)
    return spdx(sentences)


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
            if _goes_on(line, piece):
                lines[number] = _Line(f"{line.text} {piece.text}", _union([line.box, piece.box]))
                break
        else:
            lines.append(piece)
    return sorted(lines, key=lambda line: (-line.box[3], line.box[0]))


def _goes_on(line: _Line, piece: _Line) -> bool:
    """Whether a piece stands right after a line, at its height; another column is further away."""
    lower, higher = sorted((line.box[3] - line.box[1], piece.box[3] - piece.box[1]))
    overlap = min(line.box[3], piece.box[3]) - max(line.box[1], piece.box[1])
    alike = lower > 0.4 * higher or re.search(r"\w", piece.text) is None  # a dash is low by nature
    return alike and overlap > 0.4 * lower and -3 < piece.box[0] - line.box[2] < 1.2 * higher


def _pictures(page: Any) -> list[Picture]:
    """The page's embedded pictures that are large enough to show something."""
    found = []
    for one in page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE], max_depth=4):
        box = tuple(map(float, one.get_bounds()))
        width, height = one.get_px_size()
        found.append(((box[0], box[1], box[2], box[3]), int(width) * int(height)))
    return [(box, pixels) for box, pixels in found if box[2] - box[0] > 2 and box[3] - box[1] > 2]


def _captions(lines: list[_Line]) -> list[Caption]:
    """Each caption: its first line and those that follow without a gap."""
    captions = []
    for start, first in enumerate(lines):
        mark = _CAPTION.match(first.text)
        if mark is None or not _begins(mark) or any(_leads_to(line, first) for line in lines[:start]):
            continue
        said, box = [first.text[mark.end() :]], first.box
        for line in lines[start + 1 :]:
            height = max(line.box[3] - line.box[1], 4.0)
            if min(box[2], line.box[2]) <= max(box[0], line.box[0]) or line.box[3] > box[1] + 0.5 * height:
                continue
            if box[1] - line.box[3] > (_LINE_GAP - 1) * height or _CAPTION.match(line.text):
                break
            said.append(line.text)
            box = _union([box, line.box])
        joined = re.sub(r"(?<=[^\W\d_])[-\xad\x02￾] (?=[a-zà-ÿ])", "", " ".join(said))
        captions.append((mark["label"], joined.strip()[:8000], box))
    return captions


def _begins(mark: re.Match[str]) -> bool:
    """Whether a caption begins here, and no sentence ("Fig. 1 and Fig. 2 show", "(see Fig. 1) shows")."""
    rest = mark.string[mark.end() :]
    if mark["mark"] is None:
        rest = _PANELS.sub("", rest)
    elif ")" not in mark["mark"]:
        return True
    return not rest or (not rest[0].islower() and (rest[0].isalnum() or rest[0] in "([\"'“‘«„"))


def _leads_to(line: _Line, first: _Line) -> bool:
    """Whether a paragraph goes on from one line to the next: close, of its size, in the midst of a sentence."""
    height = first.box[3] - first.box[1]
    return (
        -0.5 * height < line.box[1] - first.box[3] < 0.8 * height and abs(line.box[0] - first.box[0]) < 2 * height
        and 0.7 * height < line.box[3] - line.box[1] < 1.4 * height and _ENDED.search(line.text) is None
    )


def _on_side(captions: list[Box], pictures: list[Picture], over: bool) -> list[list[Picture]]:
    """Each caption's pictures over (or under) it. A picture goes to the nearest caption, and to no other behind it."""
    nearest: dict[Picture, int] = {}
    for one in pictures:
        reached = [
            (gap, number) for number, box in enumerate(captions)
            if min(box[2], one[0][2]) > max(box[0], one[0][0]) and (gap := _gap(box, one[0], over)) > -_NEAR_PT / 3
        ]
        if reached:
            nearest[one] = min(reached)[1]
    free = [one for one in pictures if one not in nearest]
    shown = []
    for number, box in enumerate(captions):
        own = _joined(box, [one for one in nearest if nearest[one] == number], free, over)
        free = [one for one in free if one not in own]
        shown.append(own)
    return shown


def _joined(caption: Box, own: list[Picture], free: list[Picture], over: bool) -> list[Picture]:
    """Of a caption's own pictures those that reach it one by one, and free ones that touch those in their row."""
    chosen: list[Picture] = []
    edge = caption
    while more := [
        one for one in (*own, *free) if one not in chosen and (
            (one in own and -_NEAR_PT / 3 < _gap(edge, one[0], over) < _NEAR_PT)
            or any(_beside(one[0], other[0], _NEAR_PT / 2 if one in own else _PANEL_GAP_PT) for other in chosen)
        )
    ]:
        chosen += more
        edge = _union([caption, *(box for box, _ in chosen)])
    whole = _union([box for box, _ in chosen]) if chosen else (0.0, 0.0, 0.0, 0.0)
    return chosen if min(whole[2] - whole[0], whole[3] - whole[1]) >= _MIN_SIDE_PT else []


def _gap(caption: Box, picture: Box, over: bool) -> float:
    """How far a picture lies over (or under) a caption, in points; negative where they overlap or it lies behind."""
    return picture[1] - caption[3] if over else caption[1] - picture[3]


def _beside(one: Box, other: Box, within: float) -> bool:
    """Whether two pictures stand in one row, close to each other."""
    overlap = min(one[3], other[3]) - max(one[1], other[1])
    gap = max(one[0], other[0]) - min(one[2], other[2])
    return overlap > 0.5 * min(one[3] - one[1], other[3] - other[1]) and gap < within



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
