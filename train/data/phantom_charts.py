"""Phantom charts: dose-volume histograms and fractionation tables in the range of low-dose radiotherapy.

Curves cross the half-volume line exactly at a whole dose, so that "which dose does half the volume receive" has one
answer that can be read off the grid.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ldrt_edge.train.data.balance import deal
from ldrt_edge.train.data.phantom_plate import CANVAS, Colour, Fact, Plate, font, yes

COLOURS: dict[str, Colour] = {
    "red": (225, 35, 35), "blue": (40, 110, 255), "green": (30, 175, 60), "orange": (255, 150, 10),
    "purple": (170, 60, 225),
}
_MEDIANS_GY = (1, 2, 3, 4, 5)
_AXIS_GY = 6

SCHEDULES: tuple[tuple[int, str, str], ...] = (
    (3, "1", "3"), (4, "1", "4"), (5, "1", "5"), (6, "1", "6"), (6, "0.5", "3"), (8, "0.5", "4"), (10, "0.5", "5"),
    (12, "0.5", "6"), (4, "0.75", "3"), (6, "0.75", "4.5"), (8, "0.75", "6"),
)
"""Fractions, Gy a fraction, Gy in all. Source: DEGRO guidelines for benign diseases: 0.5-1.0 Gy, 3-6 Gy in all."""
_TOTALS = tuple(sorted({total for _, _, total in SCHEDULES}))
_LISTED_AT_MOST = 6  # fractions that still make a readable list; longer schedules are summarised


@dataclass(frozen=True)
class DvhSpec:
    """What one DVH shows: `order` holds the curves' colours from the lowest dose to the highest."""

    order: tuple[str, ...]
    medians_gy: tuple[int, ...]
    asked: int
    shown_asked: bool
    greater: bool
    dark: bool


@dataclass(frozen=True)
class TableSpec:
    """What one fractionation table shows; `weekly` is None where the table does not say."""

    fractions: int
    dose_gy: str
    total_gy: str
    weekly: int | None
    check: bool
    listed: bool


def dvh_specs(count: int, rng: random.Random) -> list[DvhSpec]:
    """Deal `count` DVHs: curve count, highest, lowest, and the median asked for are each near-uniform."""
    curves, highest = deal((2, 3, 4), count, rng), deal(tuple(COLOURS), count, rng)
    steps, medians = deal((1, 2, 3, 4), count, rng), deal(_MEDIANS_GY, count, rng)
    shown, greater, dark = (deal((True, False), count, rng) for _ in range(3))
    names = tuple(COLOURS)
    specs = []
    for i in range(count):
        top = highest[i]
        low = names[(names.index(top) + steps[i]) % len(names)]
        between = rng.sample([name for name in names if name not in (top, low)], curves[i] - 2)
        others = rng.sample([m for m in _MEDIANS_GY if m != medians[i]], curves[i] - 1)
        placed = tuple(sorted([medians[i], *others]))
        asked = placed.index(medians[i])
        specs.append(DvhSpec((low, *between, top), placed, asked, shown[i], greater[i], dark[i]))
    return specs


def draw_dvh(spec: DvhSpec, rng: random.Random) -> Plate:
    """Draw cumulative dose-volume curves over a grid of whole grays."""
    paper, ink, rule = ("black", "white", (95, 95, 95)) if spec.dark else ("white", "black", (185, 185, 185))
    image = Image.new("RGB", (CANVAS, CANVAS), paper)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 62, 20, 428, 372
    step = (right - left) / _AXIS_GY
    for gy in range(_AXIS_GY + 1):
        draw.line((left + step * gy, top, left + step * gy, bottom), fill=rule, width=3)
        draw.text((left + step * gy, 404), str(gy), fill=ink, font=font(46), anchor="mm")
    middle = (top + bottom) / 2
    draw.line((left, middle, right, middle), fill=ink, width=3)
    draw.text((29, middle), "50", fill=ink, font=font(42), anchor="mm")
    draw.text((29, top + 16), "%", fill=ink, font=font(42), anchor="mm")
    draw.text((22, 406), "Gy", fill=ink, font=font(32), anchor="mm")
    draw.rectangle((left, top, right, bottom), outline=ink, width=4)
    doses = np.linspace(0, _AXIS_GY, 90)
    for name, median in zip(spec.order, spec.medians_gy, strict=True):
        volume = 1 / (1 + np.exp((doses - median) / rng.uniform(0.12, 0.24)))
        points = [(left + step * d, bottom - (bottom - top) * v) for d, v in zip(doses, volume, strict=True)]
        draw.line(points, fill=COLOURS[name], width=9, joint="curve")
    return Plate(image, _dvh_facts(spec, rng), tuple(f"{name} curve" for name in spec.order))


def _dvh_facts(spec: DvhSpec, rng: random.Random) -> tuple[Fact, ...]:
    absent = [name for name in COLOURS if name not in spec.order]
    shown = rng.choice(spec.order if spec.shown_asked else absent)
    lower, upper = sorted(rng.sample(range(len(spec.order)), 2))
    a, b = (upper, lower) if spec.greater else (lower, upper)
    return (
        Fact("picture kind", "DVH"),
        Fact("curve count", str(len(spec.order))),
        Fact("highest curve", spec.order[-1]),
        Fact("lowest curve", spec.order[0]),
        Fact("curve shown", yes(spec.shown_asked), {"a": shown}),
        Fact("curve comparison", yes(spec.greater), {"a": spec.order[a], "b": spec.order[b]}),
        Fact("median dose", str(spec.medians_gy[spec.asked]), {"a": spec.order[spec.asked]}),
    )


def table_specs(count: int, rng: random.Random) -> list[TableSpec]:
    """Deal `count` tables over all schedules, with sessions a week that are sometimes not given."""
    schedules, weekly = deal(SCHEDULES, count, rng), deal((2, 3, 5, None), count, rng)
    check, listed = (deal((True, False), count, rng) for _ in range(2))
    return [
        TableSpec(*schedule, week, true, wanted and schedule[0] <= _LISTED_AT_MOST)
        for schedule, week, true, wanted in zip(schedules, weekly, check, listed, strict=True)
    ]


def draw_table(spec: TableSpec, rng: random.Random) -> Plate:
    """Draw the schedule: a row for each fraction with the running sum, or one row for each quantity."""
    paper = (rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255))
    image = Image.new("RGB", (CANVAS, CANVAS), paper)
    draw = ImageDraw.Draw(image)
    head = (rng.randint(20, 130), rng.randint(20, 110), rng.randint(20, 130))
    top = rng.randint(6, 16)
    rows: list[tuple[str, ...]]
    if spec.listed:
        rows = [("Fx", "Gy", "Sum")]
        rows += [(str(k), spec.dose_gy, f"{float(spec.dose_gy) * k:g}") for k in range(1, spec.fractions + 1)]
        _cells(draw, rows, head, (12, 120, 280, 436), top, height=52, size=44)
        if spec.weekly is not None:
            draw.text((CANVAS / 2, 416), f"{spec.weekly} / week", fill="black", font=font(52), anchor="mm")
    else:
        rows = [("LDRT", "plan"), ("Fractions", str(spec.fractions))]
        rows += [("Gy / Fx", spec.dose_gy), ("Total Gy", spec.total_gy)]
        if spec.weekly is not None:
            rows.append(("Per week", str(spec.weekly)))
        _cells(draw, rows, head, (12, 274, 436), top, height=84, size=56)
    other = rng.choice([total for total in _TOTALS if total != spec.total_gy])
    return Plate(image, (
        Fact("picture kind", "table"),
        Fact("fraction count", str(spec.fractions)),
        Fact("dose per fraction", spec.dose_gy),
        Fact("total dose", spec.total_gy),
        Fact("sessions per week", str(spec.weekly) if spec.weekly is not None else "unknown"),
        Fact("total dose check", yes(spec.check), {"a": spec.total_gy if spec.check else other}),
    ))


def _cells(
    draw: ImageDraw.ImageDraw, rows: Sequence[tuple[str, ...]], head: Colour, columns: Sequence[int], top: int,
    height: int, size: int,
) -> None:
    for number, row in enumerate(rows):
        y = top + number * height
        ink = "white" if number == 0 else "black"
        if number == 0:
            draw.rectangle((columns[0], y, columns[-1], y + height), fill=head)
        for text, left, right in zip(row, columns, columns[1:], strict=False):
            if number:
                draw.rectangle((left, y, right, y + height), outline="black", width=3)
            draw.text(((left + right) / 2, y + height / 2), text, fill=ink, font=font(size), anchor="mm")
