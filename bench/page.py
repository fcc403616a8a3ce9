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

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from ldrt_edge.bench.schema import Report, Slice, Vqa
from ldrt_edge.bench.significance import McNemar, NonInferiority, Power
from ldrt_edge.bench.statistics import Difference, Rate
from ldrt_edge.bench.vqa import Sample
from ldrt_edge.dataset import Dataset, Row
from ldrt_edge.image import read_image

_FLIPS_SHOWN, _WRONG_SHOWN, _TASKS_SHOWN = 30, 12, 24
_THUMBNAIL_PIXELS, _THUMBNAIL_QUALITY = 144, 70
_LEFT, _RIGHT, _TOP, _ROW = 215, 80, 30, 34  # margins and row height of the picture, in its own units
_WIDTH, _LABEL = 780, 25


def render(report: Report, samples: Sequence[Sample], dataset: Dataset, rows: Sequence[Row]) -> str:
    """The page as HTML text."""
    files = {row.image_sha256: dataset.image_path(row) for row in rows}
    flips = [sample for flip in ("worse", "better", "other") for sample in samples if sample.flip == flip]
    wrong = [s for s in samples if not s.subject.correct and not s.flip]
    return template("report.html.jinja").render(
        report=report,
        vqa=report.vqa,
        whole=whole(report.vqa),
        verdicts=verdicts(report),
        certainty=certainty(report),
        picture=draw(report.vqa),
        flips=flips[:_FLIPS_SHOWN],
        flips_total=len(flips),
        wrong=wrong[:: max(1, len(wrong) // _WRONG_SHOWN)][:_WRONG_SHOWN],
        wrong_total=len(wrong),
        thumbnail=cache(lambda sha256: thumbnail(files[sha256])),
    )


def template(name: str) -> Template:
    """A page of this folder, with the filters that write figures."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        percent=percent, interval=interval, points=points, span=points_interval, size=byte_size, number=number,
        p=p_value,
    )  # fmt: skip
    return environment.get_template(name)


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
    if vqa.loss and vqa.non_inferiority and vqa.flips:
        loss, flips = vqa.loss, vqa.flips
        change = Difference(-loss.value, -loss.ci_high, -loss.ci_low, loss.n, loss.clusters)
        found.append(
            Verdict(
                points(change),
                f"points against {report.reference.name if report.reference else ''}: "
                f"{_loss_claim(loss, vqa.non_inferiority)}",
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


def certainty(report: Report) -> list[str]:
    """What may be concluded and what would take more questions, in plain sentences."""
    vqa = report.vqa
    gain = vqa.image_gain_test
    found = [
        f"What the picture is worth: {gain.first_only} questions were right with the right picture only, "
        f"{gain.second_only} with the wrong one only; {_test(gain)}."
    ]
    if not (report.reference and vqa.loss and vqa.loss_test and vqa.non_inferiority):
        return [*found, _power("what the picture is worth", vqa.image_gain_power)]
    subject, reference, test = report.subject.name, report.reference.name, vqa.loss_test
    return [
        *found,
        f"The loss: {test.first_only} questions only {reference} got right and {test.second_only} only {subject}; "
        f"{_test(test)}.",
        _non_inferiority(subject, reference, vqa.loss, vqa.non_inferiority),
        _power("the loss", vqa.loss_power),
    ]


def _non_inferiority(subject: str, reference: str, loss: Difference, held: NonInferiority) -> str:
    margin = _margin(held.margin)
    if held.verdict == "non-inferior":
        return (
            f"{subject} is not worse than {reference} by more than {margin}: even the upper end of the loss's 95% "
            f"interval, {_signed(loss.ci_high)}, is within that margin."
        )
    if held.verdict == "inferior":
        return (
            f"{subject} is worse than {reference} by more than {margin}: even the lower end of the loss's 95% "
            f"interval, {_signed(loss.ci_low)}, is beyond that margin."
        )
    return (
        f"It is not shown that {subject} loses at most {margin} against {reference}: the 95% interval of the loss "
        f"reaches from {_signed(loss.ci_low)} to {_signed(loss.ci_high)}."
    )


def _power(what: str, power: Power | None) -> str:
    if power is None:
        return f"How many questions it would take to see a point of {what} cannot be told: nothing varies here."
    return (
        f"To see {_margin(power.difference)} of {what} takes about {_rounded(power.questions_needed)} questions in "
        f"{_rounded(power.clusters_needed)} clusters of pictures; here are {power.questions} in {power.clusters}, "
        f"which show a difference of {power.detectable * 100:.1f} points ({power.power:.0%} power, two-sided 5%, "
        f"measured design effect {power.design_effect:.1f})."
    )


def _test(test: McNemar) -> str:
    by_cluster, alone = _p(test.p_clustered), _p(test.p_exact)
    return f"McNemar's test, p by clusters of pictures {by_cluster} (over single questions {alone})"


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


def whole(vqa: Vqa) -> Slice:
    """All questions as one slice."""
    return Slice(
        **vars(vqa.overall), blind=vqa.blind, prior=vqa.prior, image_gain=vqa.image_gain,
        image_gain_test=vqa.image_gain_test, reference=vqa.reference, loss=vqa.loss, loss_test=vqa.loss_test,
    )  # fmt: skip


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


def p_value(test: McNemar) -> str:
    """A test's p by clusters as "0.034" or "<0.001"; Holm's where it is one of several."""
    return _p(test.p_clustered if test.p_holm is None else test.p_holm)


def byte_size(count: int) -> str:
    """Bytes as "105 MB" or "4.1 GB" (powers of ten)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _loss_claim(loss: Difference, held: NonInferiority) -> str:
    if loss.ci_low > 0:
        return "something was lost"
    if held.verdict == "non-inferior":
        return f"at most {_margin(held.margin)} lost"
    return "no loss shown, none ruled out"


def _margin(share: float) -> str:
    return f"{share * 100:g} point{'s' * (round(share * 100, 9) != 1)}"


def _rounded(count: int) -> str:
    """Two significant digits: it is an estimate."""
    return f"{round(count, 2 - len(str(count))):,}"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _mark(rate: Rate) -> Mark:
    return Mark(_x(rate.value), _x(rate.ci_low), _x(rate.ci_high))


def _x(share: float) -> float:
    return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)


def _signed(share: float) -> str:
    shown = f"{share * 100:+.1f}".replace("-", "−")
    return "0.0" if shown in ("+0.0", "−0.0") else shown
