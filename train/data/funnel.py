"""The funnel of a curation: what came in, what each step dropped, what stayed; as a table and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

TABLE, PICTURE = "funnel.csv", "funnel.png"

Step = tuple[str, str, int]
"""What is counted ("articles", "pairs"), the step, the count."""


def write_funnel(steps: Sequence[Step], folder: Path) -> None:
    """Write `funnel.csv` and `funnel.png` into `folder`."""
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(("what", "step", "count", "left"))
        for (what, step, count), left in zip(steps, _left(steps), strict=True):
            table.writerow((what, step, count, left))
    _draw(steps, folder / PICTURE)


def funnel_text(steps: Sequence[Step]) -> str:
    """The funnel for a terminal; steps that dropped nothing are left out."""
    lines = []
    for (what, step, count), left in zip(steps, _left(steps), strict=True):
        if step == "found":
            lines.append(f"{what:<8} {'':<26} {'':>9} {left:>9}")
        elif count and step != "kept":
            lines.append(f"{'':<8} {step:<26} {-count:>9} {left:>9}")
    return "\n".join(lines)


def _left(steps: Sequence[Step]) -> list[int]:
    left, lefts = 0, []
    for _, step, count in steps:
        left = count if step in ("found", "kept") else left - count
        lefts.append(left)
    return lefts


def _draw(steps: Sequence[Step], path: Path) -> None:
    from ldrt_edge.errors import require

    require("matplotlib", "train")
    from matplotlib.figure import Figure

    groups = [
        [(step, count, left) for (what, step, count), left in zip(steps, _left(steps), strict=True)
         if what == group and (count or step == "found")]
        for group in ("articles", "pairs")
    ]
    figure = Figure(figsize=(8, 1.6 + 0.32 * sum(map(len, groups))), layout="constrained")
    axes = figure.subplots(2, 1, height_ratios=[max(1, len(group)) for group in groups])
    for what, group, axis in zip(("articles", "pairs"), groups, axes, strict=True):
        rows = range(len(group))
        dropped = [0 if step in ("found", "kept") else count for step, count, _ in group]
        left = [left for _, _, left in group]
        axis.barh(rows, left, color="#2a6f97", label="left")
        axis.barh(rows, dropped, left=left, color="#e0a458", label="dropped here")
        for row, (step, count, remaining) in enumerate(group):
            told = f"{remaining:,}" if step in ("found", "kept") else f"{remaining:,}  (−{count:,})"
            axis.text(remaining + dropped[row], row, f" {told}", va="center", fontsize=8)
        axis.set_yticks(rows, [step for step, _, _ in group], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(what, loc="left", fontsize=10)
        axis.set_xlim(0, max([*left, 1]) * 1.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(_whole_numbers())
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _whole_numbers() -> object:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=6)
