"""`report.html`: one file to read, print and sign off, without a network.

The verdict comes first, then one picture (what the right image is worth over a wrong one, task by task), then the
answers that changed, the tables, and where all of it came from. The page draws what `report.json` says and computes
nothing of its own but places on the paper.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from PIL import Image

from ldrt_edge.bench.schema import Report, Slice, Vqa
from ldrt_edge.bench.statistics import Difference, Rate
from ldrt_edge.bench.vqa import Sample
from ldrt_edge.dataset import Dataset, Row
from ldrt_edge.image import read_image

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_FLIPS_SHOWN, _WRONG_SHOWN, _TASKS_SHOWN = 30, 12, 24
_THUMBNAIL_PIXELS, _THUMBNAIL_QUALITY = 144, 70
_LEFT, _RIGHT, _TOP, _ROW = 215, 80, 30, 34  # margins and row height of the picture, in its own units
_WIDTH, _LABEL = 780, 25
_ONE_POINT = 0.01


def render(report: Report, samples: Sequence[Sample], dataset: Dataset, rows: Sequence[Row]) -> str:
    """The page as HTML text."""
    files = {row.image_sha256: dataset.image_path(row) for row in rows}
    flips = [sample for flip in ("worse", "better", "other") for sample in samples if sample.flip == flip]
    wrong = [s for s in samples if not s.subject.correct and not s.flip]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=percent, interval=interval, points=points, span=points_interval, size=byte_size, number=number
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        vqa=report.vqa,
        verdicts=verdicts(report),
        picture=draw(report.vqa),
        flips=flips[:_FLIPS_SHOWN],
        flips_total=len(flips),
        wrong=wrong[:: max(1, len(wrong) // _WRONG_SHOWN)][:_WRONG_SHOWN],
        wrong_total=len(wrong),
        thumbnail=cache(lambda sha256: thumbnail(files[sha256])),
    )


@dataclass(frozen=True)
class Verdict:
    """One finding: the figure, a short claim that the interval allows, and the evidence."""

    figure: str
    claim: str
    evidence: str
    good: bool


def verdicts(report: Report) -> list[Verdict]:
    """What may be said of the model, in the order in which a reader asks."""
    vqa = report.vqa
    accuracy, gain = vqa.overall.accuracy, vqa.image_gain
    found = [
        Verdict(
            percent(accuracy),
            f"of {accuracy.n} questions answered right",
            f"95% interval {interval(accuracy)}, {accuracy.clusters} clusters of questions about one picture or study",
            accuracy.ci_low > vqa.prior.accuracy.value,
        ),
        Verdict(
            points(gain),
            f"points{' come from looking' if gain.ci_low > 0 else ', no proof that it looks'} at the picture",
            f"interval {points_interval(gain)}; with a wrong picture of the same kind it gets "
            f"{percent(vqa.blind.accuracy)}, and guessing the commonest answer {percent(vqa.prior.accuracy)}",
            gain.ci_low > 0,
        ),
    ]
    if vqa.loss and vqa.flips:
        loss, flips = vqa.loss, vqa.flips
        change = Difference(-loss.value, -loss.ci_high, -loss.ci_low, loss.n, loss.clusters)
        found.append(
            Verdict(
                points(change),
                f"points against {report.reference.name if report.reference else ''}: {_loss_claim(loss)}",
                f"interval {points_interval(change)}; {flips.worse + flips.better + flips.other} answers changed, "
                f"{flips.worse} for the worse and {flips.better} for the better",
                loss.ci_low <= 0,
            )
        )
    if report.latency:
        latency = report.latency
        found.append(
            Verdict(
                f"{number(latency.ttft_ms.median)} ms",
                f"to the first word, then {number(latency.decode_tok_per_s.median)} tokens a second",
                f"{latency.runtime}, {latency.threads} thread{'s' * (latency.threads > 1)}, "
                f"{byte_size(latency.peak_rss_bytes)} of memory at most",
                True,
            )
        )
    return found


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
    whole = Slice(
        vqa.overall.accuracy, vqa.overall.token_f1, vqa.blind, vqa.prior, vqa.image_gain, vqa.reference, vqa.loss
    )
    shown = [("all questions", whole), *tasks[:_TASKS_SHOWN]]
    lines = tuple(
        Line(
            label=label if len(label) <= _LABEL else label[: _LABEL - 1] + "…",
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


def thumbnail(path: Path) -> str:
    """A small JPEG of a picture as a data URI; it carries pixels and nothing else of the file."""
    picture = Image.fromarray(read_image(path).rgb)
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def percent(rate: Rate | float) -> str:
    """A share as "73.3%"."""
    return f"{(rate if isinstance(rate, (int, float)) else rate.value) * 100:.1f}%"


def interval(rate: Rate) -> str:
    """A rate's interval as "70.1–76.4"."""
    return f"{rate.ci_low * 100:.1f}–{rate.ci_high * 100:.1f}"


def points(difference: Difference) -> str:
    """A difference in percentage points, with its sign: "+24.5", "−0.3"."""
    return _signed(difference.value)


def points_interval(difference: Difference) -> str:
    """A difference's interval in percentage points: "−0.8 to +1.9"."""
    return f"{_signed(difference.ci_low)} to {_signed(difference.ci_high)}"


def number(value: float) -> str:
    """Three significant digits, without an exponent above a thousandth."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def byte_size(count: int) -> str:
    """Bytes as "105 MB" or "4.1 GB" (powers of ten)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _loss_claim(loss: Difference) -> str:
    if loss.ci_low > 0:
        return "something was lost"
    if loss.ci_high <= _ONE_POINT:
        return "at most one point lost"
    return "no loss shown, none ruled out"


def _mark(rate: Rate) -> Mark:
    return Mark(_x(rate.value), _x(rate.ci_low), _x(rate.ci_high))


def _x(share: float) -> float:
    return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)


def _signed(share: float) -> str:
    shown = f"{share * 100:+.1f}".replace("-", "−")
    return "0.0" if shown in ("+0.0", "−0.0") else shown
