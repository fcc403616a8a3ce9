"""`report.html`: one file to read, print and sign off, without a network.

The verdict comes first, then one picture (what the right image is worth over a wrong one, task by task), then all
models of the run, what is made up, the answers that changed, the tables, and where all of it came from. The page draws
what `report.json` says and computes nothing of its own but places on the paper.
"""

from __future__ import annotations

import base64
import io
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from ldrt_edge.bench.figures import (
    change_of_exports,
    confidence_against_accuracy,
    draw,
    size_against_accuracy,
    time_of_a_question,
    whole,
)
from ldrt_edge.bench.formats import (
    byte_size,
    ends,
    interval,
    number,
    number_interval,
    p_value,
    percent,
    points,
    points_interval,
    short_p,
    signed,
)
from ldrt_edge.bench.hallucination import Hallucination, Hedging, Presence
from ldrt_edge.bench.schema import Report
from ldrt_edge.bench.significance import McNemar, NonInferiority, Power
from ldrt_edge.bench.statistics import Difference
from ldrt_edge.bench.vqa import Sample
from ldrt_edge.dataset import Dataset, Row
from ldrt_edge.image import read_image

_SHOWN = {"worse": 24, "better": 16, "other": 12, "wrong": 24, "right": 12}
"""How many samples of each state the page holds; all are in samples.jsonl."""
_CHANCE = 0.5  # of yes and no
JUDGES = "<!-- judges -->"
"""Where `bench judge` writes what judges say into the page."""
_THUMBNAIL_PIXELS, _THUMBNAIL_QUALITY = 144, 70


def render(report: Report, samples: Sequence[Sample], dataset: Dataset, rows: Sequence[Row]) -> str:
    """The page as HTML text; of samples it shows those it is given."""
    files = {row.image_sha256: dataset.image_path(row) for row in rows}
    by_state: dict[str, list[Sample]] = {name: [] for name in _SHOWN}
    for sample in samples:
        by_state[sample.flip or ("right" if sample.subject.correct else "wrong")].append(sample)
    return template("report.html.jinja").render(
        report=report,
        vqa=report.vqa,
        whole=whole(report.vqa),
        verdicts=verdicts(report),
        certainty=certainty(report),
        picture=draw(report.vqa),
        change_plot=change_of_exports(report.ladder),
        size_plot=size_against_accuracy(report.ladder),
        time_plot=time_of_a_question(report.ladder),
        held=next((rung.against for rung in report.ladder if rung.against), None),
        clocked=next((rung.latency for rung in report.ladder if rung.latency), None),
        calibration_plot=confidence_against_accuracy(report.calibration) if report.calibration else None,
        browser={state: _evenly(found, _SHOWN[state]) for state, found in by_state.items() if found},
        counts={state: len(found) for state, found in by_state.items()},
        hedging_rows=_hedging_rows,
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
        p=p_value, minus=operator.neg, ends=ends, number_interval=number_interval,
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
        found.append(
            Verdict(
                points(-loss),
                f"points against {report.reference.name if report.reference else ''}: "
                f"{_loss_claim(loss, vqa.non_inferiority)}",
                f"interval {points_interval(-loss)}; {flips.worse + flips.better + flips.other} answers changed, "
                f"{flips.worse} for the worse and {flips.better} for the better",
                vqa.non_inferiority.verdict == "non-inferior",
            )
        )
    if report.hallucination and report.hallucination.presence:
        found.append(_made_up(report, report.hallucination, report.hallucination.presence))
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


def _made_up(report: Report, found: Hallucination, presence: Mapping[str, Presence]) -> Verdict:
    """Good only if as many structures that are there as absent ones are told apart, and by looking.

    Who always says no makes up nothing and finds nothing; over all questions, most of which are about absent
    structures, that would look well.
    """
    asked, balanced = presence["all"], [part for name, part in presence.items() if name != "all"]
    hardest = min((part.accuracy for part in balanced), key=lambda accuracy: accuracy.value, default=None)
    change = next((rung.invented for rung in report.ladder if rung.role == "subject"), None)
    told = [f"interval {interval(asked.invented)}, {asked.invented.n} questions"]
    found_ci = asked.recall_ci or (0.0, 0.0)
    if asked.recall is not None:
        told.append(f"{percent(asked.recall)} of those that are there are found ({ends(found_ci)})")
    if hardest:
        told.append(f"with as many there as absent {percent(hardest)} are answered right ({interval(hardest)})")
    if change and report.reference:
        told.append(f"{points(change)} points against {report.reference.name} ({points_interval(change)})")
    return Verdict(
        percent(asked.invented),
        "of structures that are not in the picture are said to be there",
        "; ".join(told),
        asked.invented.ci_high < _CHANCE < found_ci[0]
        and hardest is not None
        and hardest.ci_low > _CHANCE
        and found.seen is not None
        and found.seen.ci_low > 0,
    )


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
            f"interval, {signed(loss.ci_high)}, is within that margin."
        )
    if held.verdict == "inferior":
        return (
            f"{subject} is worse than {reference} by more than {margin}: even the lower end of the loss's 95% "
            f"interval, {signed(loss.ci_low)}, is beyond that margin."
        )
    return (
        f"It is not shown that {subject} loses at most {margin} against {reference}: the 95% interval of the loss "
        f"reaches from {signed(loss.ci_low)} to {signed(loss.ci_high)}."
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
    by_cluster, alone = short_p(test.p_clustered), short_p(test.p_exact)
    return f"McNemar's test, p by clusters of pictures {by_cluster} (over single questions {alone})"


def thumbnail(path: Path) -> str:
    """A small JPEG of a picture as a data URI; it carries pixels and nothing else of the file."""
    picture = Image.fromarray(read_image(path).rgb)
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _hedging_rows(report: Report) -> list[tuple[str, str, Hedging]]:
    """Who hedges, in which language, and how."""
    names = {"key": "the keys", "subject": report.subject.name}
    names |= {"reference": report.reference.name} if report.reference else {}
    return [
        (names.get(who, who), language, found)
        for language, speakers in report.hedging.items()
        for who, found in speakers.items()
        if found.words
    ]


def _evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count`, evenly picked."""
    return [samples[place * len(samples) // min(count, len(samples))] for place in range(min(count, len(samples)))]


def _loss_claim(loss: Difference, held: NonInferiority) -> str:
    if held.verdict == "non-inferior":
        return f"at most {_margin(held.margin)} lost"
    return "something was lost" if loss.ci_low > 0 else "no loss shown, none ruled out"


def _margin(share: float) -> str:
    return f"{share * 100:g} point{'s' * (round(share * 100, 9) != 1)}"


def _rounded(count: int) -> str:
    """Two significant digits: it is an estimate."""
    return f"{round(count, 2 - len(str(count))):,}"
