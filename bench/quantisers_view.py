"""What a reader sees of a comparison of quantisers: a table, and loss against size as a picture.

In the picture every way to quantise has a line, with a marker and a shade of its own, to be readable printed in grey.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ldrt_edge.errors import require

if TYPE_CHECKING:
    from ldrt_edge.bench.quantisers_results import Comparison, Result, Step
    from ldrt_edge.bench.statistics import Ratio
    from ldrt_edge.bench.steps import Cost

EQUAL_BYTES = 0.01
"""By how much models may differ and still count as equally large."""

_NAMES = {
    "none": "preset", "text": "preset, text importance",
    "pooled": "preset, image+text importance, pooled",
    "balanced": "preset, image+text importance, balanced", "answer": "preset, image+text importance, answer",
    "rescale": "preset, rescaled", "feedback": "preset, feedback", "both": "preset, rescaled, feedback",
    "plan": "our plan", "plan+feedback": "our plan, feedback", "plan+both": "our plan, rescaled, feedback",
}  # fmt: skip
_FORMATS = {"gguf": "GGUF", "mlx": "MLX"}
_STYLES = {
    "none": ("s", "#000000"), "text": ("^", "#0072b2"),
    "pooled": ("v", "#56b4e9"), "balanced": ("D", "#e69f00"),
    "answer": ("P", "#999999"),
    "rescale": ("<", "#f0e442"), "feedback": (">", "#f0e442"), "both": ("h", "#f0e442"),
    "plan": ("o", "#d55e00"), "plan+feedback": ("*", "#cc79a7"), "plan+both": ("p", "#cc79a7"),
}  # fmt: skip
"""Marker and colour; the colours are Okabe and Ito's, told apart by colour-blind readers too."""
_OTHERS, _OTHER = ("X", "d", "8"), "#009e73"
"""Other tools' markers, and their colour."""
_LINES = ("-", "--", ":", "-.")
"""Of the first, second, … calibration set."""
_APART_POINTS = 4
"""Markers of models of one size stand side by side, this far apart."""


def label(result: Result) -> str:
    """A result's name."""
    return " ".join(part for part in (result.base, result.family, result.calibration) if part)


def table(found: Comparison) -> list[str]:
    """The results and the slowest step of each kind as lines of text."""
    exact = found.exact
    lines = [
        f"{found.questions} questions about {found.images} pictures, {found.tokens} answer tokens; "
        f"the merged model has {exact.value:.1%} right ({exact.ci_low:.1%} to {exact.ci_high:.1%})",
        f"{'':30} {'MB':>7} {'bits':>5}  {'KLD':26} {'top-1':>6}  {'loss, points':20} {'flips':>6}  "
        f"{'KLD / preset':22} KLD / text importance",
    ]
    for one in found.results:
        loss = f"{100 * one.loss.value:+.1f} ({100 * one.loss.ci_low:+.1f} to {100 * one.loss.ci_high:+.1f})"
        unequal = "" if abs(one.bytes_ratio - 1) <= EQUAL_BYTES else f"  {one.bytes_ratio:.3f} of the preset's bytes"
        lines.append(
            f"{label(one):30} {one.bytes / 1e6:7.1f} {one.bits_per_weight:5.2f}  {_interval(one.kld, '.3g'):26} "
            f"{one.top1.value:6.1%}  {loss:20} {one.flips.value:6.1%}  {_interval(one.kld_to_none, '.2f'):22} "
            f"{_interval(one.kld_to_text, '.2f') if one.kld_to_text else ''}{unequal}".rstrip()
        )
    slowest: dict[str, Step] = {}
    for step in sorted(found.steps, key=lambda step: step.cost.seconds):
        slowest[step.name] = step
    grown = "; at other sizes, if time and memory grow with the parameters" if found.steps[0].at else ""
    size = f"{found.parameters / 1e6:.1f} million parameters, {found.image_tokens} tokens a picture"
    lines.append(f"costs with {size}{grown}")
    for step in slowest.values():
        costs = [_cost(step.cost), *(f"{size} {_cost(cost)}" for size, cost in step.at.items())]
        lines.append(f"{step.name:18} {step.what:24} {'; '.join(costs)}")
    return lines


def draw(found: Comparison, path: Path) -> None:
    """Draw KLD with its intervals over the language model's size, as PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "bench").Figure(figsize=(9, 6), layout="constrained")
    transforms = require("matplotlib.transforms", "bench")
    axes = figure.subplots(subplot_kw={"yscale": "log"})
    series = list(dict.fromkeys(map(_series, found.results)))
    calibrations = list(dict.fromkeys(name for family, name in series if name and family != "other"))
    others = [name for family, name in series if family == "other"]
    for place, (family, name) in enumerate(series):
        points = sorted(
            (result for result in found.results if _series(result) == (family, name)),
            key=lambda result: result.bytes,
        )
        kld = [point.kld.value for point in points]
        marker, colour = (_OTHERS[others.index(name) % len(_OTHERS)], _OTHER) if family == "other" else _STYLES[family]
        told = f" ({name})" if name and len(calibrations) > 1 else ""
        shift = _APART_POINTS * (place - (len(series) - 1) / 2) / 72
        axes.errorbar(
            [point.bytes / 1e6 for point in points], kld,
            yerr=[
                [point.kld.value - point.kld.ci_low for point in points],
                [point.kld.ci_high - point.kld.value for point in points],
            ],
            label=name if family == "other" else _NAMES[family] + told,
            marker=marker, color=colour, markeredgecolor="black", markersize=7, capsize=2.5, elinewidth=1,
            linewidth=2 if family.startswith("plan") else 1,
            linestyle=_LINES[calibrations.index(name) % len(_LINES)] if name in calibrations else "-",
            transform=axes.transData + transforms.ScaledTranslation(shift, 0, figure.dpi_scale_trans),
        )  # fmt: skip
    edges = [(result.bytes / 1e6, end) for result in found.results for end in (result.kld.ci_low, result.kld.ci_high)]
    axes.update_datalim(edges)  # matplotlib leaves what is moved aside out
    sized = sorted(found.results, key=lambda result: result.family == "none")  # a preset names its size
    bases = {result.bytes: result.base for result in sized if result.family in ("none", "other")}
    near = 0.08 * (max(bases) - min(bases))
    row, before = 0, -near
    for size, base in sorted(bases.items()):
        row = 1 - row if size - before < near else 0  # names of like sizes stand above each other
        axes.annotate(
            base, (size / 1e6, 1), xycoords=("data", "axes fraction"), xytext=(0, 4 + 11 * row),
            textcoords="offset points", ha="center", fontsize=9, annotation_clip=False,
        )  # fmt: skip
        before = size
        axes.axvline(size / 1e6, color="#dddddd", linewidth=1, zorder=0)
    axes.set_xlabel("language model, MB")
    axes.set_ylabel("mean KLD from the merged model, nats an answer token")
    axes.grid(axis="y", which="both", color="#eeeeee")
    axes.set_title(
        f"{_FORMATS[found.to]}, loss against size: {found.tokens} answer tokens of {found.questions} held-out "
        f"questions about {found.images} pictures\n(95% intervals by picture; those of one size side by side)",
        fontsize=10, pad=32,
    )  # fmt: skip
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=150)


def _series(result: Result) -> tuple[str, str]:
    """What is drawn as one line: a family with its calibration, or another tool."""
    return result.family, result.base if result.family == "other" else result.calibration


def _interval(one: Ratio, form: str) -> str:
    return f"{one.value:{form}} ({one.ci_low:{form}} to {one.ci_high:{form}})"


def _cost(cost: Cost) -> str:
    return f"{cost.seconds:.0f} s, {cost.peak_bytes / 1e9:.1f} GB"
