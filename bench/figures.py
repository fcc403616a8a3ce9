"""The drawings of a report, placed: what a picture is worth, what each export lost, size against accuracy, what a
question's time goes into, confidence against accuracy.

Places on the paper are computed here and written by the template; nothing else is. Units are those of the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ldrt_edge.bench.calibration import Calibration
from ldrt_edge.bench.formats import points, signed
from ldrt_edge.bench.ladder import EXPORTS, Rung
from ldrt_edge.bench.schema import Slice, Vqa
from ldrt_edge.bench.statistics import Rate

_TASKS_SHOWN = 24
_LEFT, _RIGHT, _TOP, _ROW = 215, 80, 30, 34  # margins and row height of the first drawing
_WIDTH, _LABEL = 780, 25
_PLOT_WIDTH, _PLOT_HEIGHT, _MARGIN = 380.0, 260.0, 44.0
_NAME_WIDTH = 48.0
"""About that of a short name beside a point."""


@dataclass(frozen=True)
class Mark:
    """A rate on the picture: the middle and the ends of its interval, in the picture's units."""

    x: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One row of the picture."""

    label: str
    count: int
    y: float
    right: Mark
    wrong: Mark
    reference: float | None
    prior: float
    gain: str
    proven: bool
    total: bool


@dataclass(frozen=True)
class Picture:
    """The picture's size, its grid (x, label) and its rows, the total first and then by gain."""

    width: int
    height: int
    left: int
    bottom: float
    grid: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]
    left_out: int


def draw(vqa: Vqa) -> Picture:
    """Place the rates of all tasks, with the right and with a wrong picture."""
    tasks = sorted(vqa.by["task"].items(), key=lambda item: -item[1].image_gain.value)
    shown = [("all questions", whole(vqa)), *tasks[:_TASKS_SHOWN]]
    lines = tuple(
        Line(
            label=_short(label),
            count=part.accuracy.n,
            y=_TOP + _ROW * (place + 0.5) + (8 if place else 0),
            right=_mark(part.accuracy),
            wrong=_mark(part.blind.accuracy),
            reference=_x(part.reference.accuracy.value) if part.reference else None,
            prior=_x(part.prior.accuracy.value),
            gain=points(part.image_gain),
            proven=part.image_gain.ci_low > 0,
            total=place == 0,
        )
        for place, (label, part) in enumerate(shown)
    )
    bottom = _TOP + _ROW * len(lines) + 12
    grid = tuple((_x(share / 100), f"{share}%") for share in range(0, 101, 20))
    return Picture(_WIDTH, int(bottom + 30), _LEFT, bottom, grid, lines, len(tasks) - len(tasks[:_TASKS_SHOWN]))


def whole(vqa: Vqa) -> Slice:
    """All questions as one slice."""
    return Slice(
        **vars(vqa.overall), blind=vqa.blind, prior=vqa.prior, image_gain=vqa.image_gain,
        image_gain_test=vqa.image_gain_test, reference=vqa.reference, loss=vqa.loss, loss_test=vqa.loss_test,
    )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A model by its size and accuracy: where it stands, the ends of the interval, and how to call it."""

    x: float
    y: float
    low: float
    high: float
    label: str
    anchor: str
    subject: bool


@dataclass(frozen=True)
class Plot:
    """A drawing with two axes: its size, marks (place, label) of each, and what stands in it."""

    width: float
    height: float
    left: float
    bottom: float
    right: float
    top: float
    x_marks: tuple[tuple[float, str], ...]
    y_marks: tuple[tuple[float, str], ...]
    points: tuple[Point, ...]


def size_against_accuracy(rungs: Sequence[Rung]) -> Plot | None:
    """Models by bytes of weights and share of right answers; None for fewer than two."""
    if len(rungs) < 2:
        return None
    sizes = [sum(rung.model.weights.values()) for rung in rungs]
    rates = [rung.score.accuracy for rung in rungs]
    most = max(sizes) * 1.1
    floor = max(0.0, min(rate.ci_low for rate in rates) - 0.05)
    ceiling = min(1.0, max(rate.ci_high for rate in rates) + 0.05)
    left, right, bottom, top = _MARGIN, _PLOT_WIDTH - 24, _PLOT_HEIGHT - _MARGIN, 12.0

    def x(size: float) -> float:
        return round(left + size / most * (right - left), 1)

    def y(share: float) -> float:
        return round(bottom - (share - floor) / (ceiling - floor) * (bottom - top), 1)

    def side(size: float) -> str:  # of the point, on which its name stands: where no other point is
        near = any(0 < x(other) - x(size) < _NAME_WIDTH for other in sizes)
        return "end" if near or size > most / 2 else "start"

    unit, name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    return Plot(
        _PLOT_WIDTH, _PLOT_HEIGHT, left, bottom, right, top,
        tuple((x(most * part), f"{most * part / unit:.3g} {name}") for part in (0.25, 0.5, 0.75)),
        tuple((y(share), f"{share:.0%}") for share in (floor + (ceiling - floor) * part for part in (0, 0.5, 1))),
        tuple(
            Point(x(size), y(rate.value), y(rate.ci_low), y(rate.ci_high), rung.name,
                  side(size), rung.role == "subject")
            for rung, size, rate in zip(rungs, sizes, rates, strict=True)
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One row of a drawing: `parts` (x, width) beside each other, and an interval with its middle, where there is one.

    figure: what stands at its end. warn: the interval is not where it should be.
    """

    label: str
    y: float
    parts: tuple[tuple[float, float], ...]
    interval: Mark | None
    figure: str
    warn: bool = False


@dataclass(frozen=True)
class Bars:
    """Rows over one scale: the grid (x, label), and a line to be on the right side of, where there is one."""

    width: int
    height: int
    left: int
    bottom: float
    grid: tuple[tuple[float, str], ...]
    bars: tuple[Bar, ...]
    limit: float | None = None


def change_of_exports(rungs: Sequence[Rung]) -> Bars | None:
    """How accuracy changed, in points, of the subject and each export that is held against another; None for none."""
    shown = [rung for rung in rungs if rung.loss and (rung.role == "subject" or rung.model.kind in EXPORTS)]
    margins = [rung.non_inferiority.margin for rung in shown if rung.non_inferiority]
    if not shown:
        return None
    changes = [-rung.loss for rung in shown if rung.loss]
    least = min(-max(margins, default=0.0), *(change.ci_low for change in changes)) * 1.05
    most = max(0.0, *(change.ci_high for change in changes)) * 1.05
    step = _step(100 * (most - least))
    marks = range(math.ceil(100 * least / step), math.floor(100 * most / step) + 1)

    def x(share: float) -> float:
        return _x((share - least) / (most - least))

    return _bars(
        [(x(mark * step / 100), signed(mark * step / 100)) for mark in marks],
        [
            Bar(rung.name, 0.0, (), Mark(x(change.value), x(change.ci_low), x(change.ci_high)), points(change),
                rung.non_inferiority is not None and rung.non_inferiority.verdict != "non-inferior")
            for rung, change in zip(shown, changes, strict=True)
        ],
        x(-margins[0]) if margins else None,
    )  # fmt: skip


def time_of_a_question(rungs: Sequence[Rung]) -> Bars | None:
    """Milliseconds for the picture, for the rest of the prompt and for an answer's tokens; None where none was timed.

    A row for each model that was timed, with the 10th to 90th percentile of the whole, and one for the subject at each
    other number of threads.
    """
    rows: list[tuple[str, tuple[float, float, float], tuple[float, float] | None]] = []
    for rung in rungs:
        found = rung.latency
        if not found or not found.end_to_end_ms:
            continue
        whole = found.end_to_end_ms
        ends = (found.image_encode_ms.median, found.ttft_ms.median, whole.median)
        rows.append((rung.name, ends, (whole.p10, whole.p90)))
        for at in found.by_threads:
            answered = at.ttft_ms + 1e3 * found.decode_tokens / at.decode_tok_per_s
            label = f"the same, {at.threads} thread{'s' * (at.threads != 1)}"
            rows.append((label, (at.image_encode_ms, at.ttft_ms, answered), None))
    if not rows:
        return None
    most = max(max((ends[-1], *(spread or ()))) for _, ends, spread in rows) * 1.05
    step = _step(most)

    def x(ms: float) -> float:
        return _x(ms / most)

    return _bars(
        [(x(mark * step), f"{mark * step:,.0f} ms") for mark in range(math.floor(most / step) + 1)],
        [
            Bar(label, 0.0, tuple((x(a), round(x(b) - x(a), 1)) for a, b in pairwise((0.0, *ends))),
                Mark(x(ends[-1]), x(spread[0]), x(spread[1])) if spread else None, f"{ends[-1]:,.0f} ms")
            for label, ends, spread in rows
        ],
    )  # fmt: skip


def confidence_against_accuracy(found: Calibration) -> Plot:
    """The reliability diagram: a dot for each bin, larger for more answers; on the diagonal a model knows itself."""
    left, right, bottom, top = _MARGIN, _PLOT_WIDTH - 24, _PLOT_HEIGHT - _MARGIN, 12.0

    def x(share: float) -> float:
        return round(left + share * (right - left), 1)

    def y(share: float) -> float:
        return round(bottom - share * (bottom - top), 1)

    total = sum(part.n for part in found.bins)
    marks = (0.0, 0.25, 0.5, 0.75, 1.0)
    return Plot(
        _PLOT_WIDTH, _PLOT_HEIGHT, left, bottom, right, top,
        tuple((x(share), f"{share:.0%}") for share in marks), tuple((y(share), f"{share:.0%}") for share in marks),
        tuple(
            Point(x(part.confidence), y(part.accuracy), y(part.confidence), round(3 + 9 * (part.n / total) ** 0.5, 1),
                  f"{part.n} answers: {part.confidence:.0%} sure, {part.accuracy:.0%} right", "middle", False)
            for part in found.bins
        ),
    )  # fmt: skip


def _bars(grid: Sequence[tuple[float, str]], bars: Sequence[Bar], limit: float | None = None) -> Bars:
    """The rows placed one below the other, their labels cut to what there is room for."""
    placed = tuple(
        replace(bar, label=_short(bar.label), y=_TOP + _ROW * (place + 0.5)) for place, bar in enumerate(bars)
    )
    bottom = _TOP + _ROW * len(placed) + 6
    return Bars(_WIDTH, int(bottom + 26), _LEFT, bottom, tuple(grid), placed, limit)


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten, of which some five fit into `span`."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= span / 5)


def _short(label: str) -> str:
    return label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"


def _mark(rate: Rate) -> Mark:
    return Mark(_x(rate.value), _x(rate.ci_low), _x(rate.ci_high))


def _x(share: float) -> float:
    return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)
