"""Compound figures: one picture of several panels under one caption, cut into panels with their part of the caption.

A caption names its panels ("(A) ... (B) ..."), a picture shows them by straight empty gutters. Only where both agree
on the number is a figure cut, and only where each name begins what is said of its panel; "axial CT (A) and MRI (B) of
the heel" names them behind it. Else it stays whole and is marked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LETTERS = tuple("ABCDEFGHIJKLMNOP")
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII")
_DIGITS = tuple("123456789")
_BEGIN = r"(?:^|(?<=[.;:。；：]))\s*"
_CUTS = (
    re.compile(_BEGIN + r"[(（]([A-Pa-p])[)）]\s*"),  # (A) text
    re.compile(_BEGIN + r"([A-P]) ?[,:.)]\s+(?=\S)"),  # A, text or A) text
    re.compile(_BEGIN + r"([a-p])[:)]\s+(?=\S)"),
)
_BRACKETS = re.compile(r"[(（]([^()（）]{1,24})[)）]")
_NAME = re.compile(r"(\w+)(?:\s*[-–—~]\s*(\w+))?")
_JOINING = {"AND", "UND", "ET", "Y", "E", "I", "EN", "A", "И", "和", "と"}
_BARE = re.compile(_BEGIN + r"(?:[Pp]an\w+\s+)?([A-Pa-p])(?: ?[:.,)]\s|\s+(?=[^\W\d_a-z]))")  # Panel A: one; a One
_NUMBERED = re.compile(_BEGIN + r"[(（]([1-9])[)）]")
_SIDES = tuple(
    re.compile(rf"(?:{_BEGIN}|[(（]\s*)(?:{words})(?:[ ,]\w+){{0,2}}\s*[:：)）]", re.I)
    for words in (
        "left|top|upper|links|oben|gauche|haut|izquierd[ao]|arriba|esquerd[ao]|acima|sinistra|alto|左|上",
        "right|bottom|lower|rechts|unten|droite|bas|derech[ao]|abajo|direit[ao]|abaixo|destra|basso|右|下",
    )
)
_MIN_PANEL_SIDE = 96
_MIN_GUTTER = 5
_FLAT = 6
"""How far, of 255, a gutter's pixels may lie from its background: JPEG leaves no area quite even."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class CaptionPart:
    """One panel's letter and what the caption says of it, with the caption's common beginning."""

    letter: str
    text: str


def caption_parts(caption: str) -> list[CaptionPart]:
    """The parts of a caption that names panels A, B, … in order, each before its text; none where it does not.

    What stands before the first letter is said of all panels.
    """
    named = panels_named(caption)
    for pattern in _CUTS:
        wanted, marks = 0, []
        for mark in pattern.finditer(caption):
            if wanted < len(_LETTERS) and mark[1].upper() == _LETTERS[wanted]:
                marks.append(mark)
                wanted += 1
        if len(marks) < max(2, named):
            continue
        common = caption[: marks[0].start()].strip()
        ends = [mark.start() for mark in marks[1:]] + [len(caption)]
        said = [caption[mark.end() : end].strip(" ;,") for mark, end in zip(marks, ends, strict=True)]
        if all(len(text) >= 3 for text in said):
            return [
                CaptionPart(_LETTERS[number], f"{common} {text}".strip()) for number, text in enumerate(said)
            ]
    return []


def panels_named(caption: str) -> int:
    """How many panels a caption names: by letters or numerals, alone, in lists or in ranges, or by sides; else 0."""
    brackets = [names for mark in _BRACKETS.finditer(caption) if (names := _names(mark[1]))]
    bare = [[(mark[1].upper(), mark[1].upper())] for mark in _BARE.finditer(caption)]
    numbered = [[(mark[1], mark[1])] for mark in _NUMBERED.finditer(caption)]
    counts = (
        *(_in_order(sequence, brackets) for sequence in (_LETTERS, _ROMAN)), _in_order(_LETTERS, bare),
        _in_order(_DIGITS, numbered), 2 * all(side.search(caption) for side in _SIDES),
    )
    return max(count if count > 1 else 0 for count in counts)


def _names(text: str) -> list[tuple[str, str]]:
    """What stands between brackets as first and last of ranges; none where it is no list of names."""
    found = [(first, last or first) for first, last in _NAME.findall(text.upper())]
    plain = all(name in (*_LETTERS, *_ROMAN, *_JOINING) for names in found for name in names)
    return found if plain else []


def _in_order(sequence: Sequence[str], marks: Sequence[Sequence[tuple[str, str]]]) -> int:
    """How many names of a sequence are met, each after the one before."""
    count = 0
    for first, last in (names for mark in marks for names in mark):
        if first in sequence and last in sequence and sequence.index(first) <= count <= sequence.index(last):
            count = sequence.index(last) + 1
    return count


def panel_boxes(rgb: NDArray[np.uint8], count: int) -> list[Box]:
    """`count` panels in reading order as (left, top, right, bottom), cut at the widest gutters; none if they misfit.

    Args:
        rgb: (height, width, 3).
        count: how many the caption names.
    """
    if count < 2:
        return []
    grey = rgb.min(axis=2).astype(np.int16)
    edges = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = int(np.median(edges))
    ink = np.abs(grey - background) > _FLAT
    if background < 128:
        ink = np.abs(rgb.max(axis=2).astype(np.int16) - background) > _FLAT
    height, width = ink.shape
    whole = _trim(ink, (0, 0, width, height))
    if whole is None:
        return []
    boxes = [whole]
    while len(boxes) < count:
        cuts = [(gutter, number, parts) for number, box in enumerate(boxes) for gutter, parts in _cuts(ink, box)]
        if not cuts:
            return []
        _, number, parts = max(cuts, key=lambda cut: (cut[0], -cut[1]))
        boxes[number : number + 1] = parts
    return _reading_order(boxes) if _alike(boxes) else []


def _cuts(ink: NDArray[np.bool_], box: Box) -> list[tuple[int, list[Box]]]:
    """The widest straight gutter of a box in either direction: its width, and the two parts."""
    left, top, right, bottom = box
    found = []
    for axis, start in ((0, left), (1, top)):
        empty = np.asarray(~ink[top:bottom, left:right].any(axis=axis))
        for begin, end in sorted(_runs(empty), key=lambda run: run[0] - run[1])[:4]:
            middle = start + (begin + end) // 2
            halves = (
                [(left, top, middle, bottom), (middle, top, right, bottom)] if axis == 0
                else [(left, top, right, middle), (left, middle, right, bottom)]
            )
            parts = [_trim(ink, half) for half in halves]
            whole = [part for part in parts if part is not None]
            large = all(min(b[2] - b[0], b[3] - b[1]) >= _MIN_PANEL_SIDE for b in whole)
            if end - begin >= _MIN_GUTTER and len(whole) == 2 and large:
                found.append((end - begin, whole))
                break
    return found


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in changes.reshape(-1, 2)]


def _trim(ink: NDArray[np.bool_], box: Box) -> Box | None:
    left, top, right, bottom = box
    part = ink[top:bottom, left:right]
    columns, rows = np.flatnonzero(part.any(axis=0)), np.flatnonzero(part.any(axis=1))
    if not columns.size:
        return None
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def _alike(boxes: Sequence[Box]) -> bool:
    """Panels of one figure are of one order of size; a legend beside a plot is no panel."""
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    return max(areas) <= 6 * min(areas)


def _reading_order(boxes: Sequence[Box]) -> list[Box]:
    """Rows from the top, each from the left; boxes that overlap in height by half are one row."""
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: (box[1], box[0])):
        for row in rows:
            overlap = min(row[0][3], box[3]) - max(row[0][1], box[1])
            if overlap > 0.5 * min(row[0][3] - row[0][1], box[3] - box[1]):
                row.append(box)
                break
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row)]
