"""What is in a pairs or a dataset artefact: counts as text and as plots."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from ldrt_edge import artifact
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import DataError, require
from ldrt_edge.train.data.pairs import Pairs

_SHOWN = 12
_LENGTHS = (0, 50, 100, 200, 400, 800, 1600)
"""Edges of the classes of text length, in letters and spaces."""


def count(folder: Path) -> dict[str, dict[str, int]]:
    """Counts of an artefact's rows by what they have: language, licence, task, year, length of text, and so on.

    Raises:
        ArtifactError: neither pairs nor a dataset.
        DataError: there are no rows.
    """
    counts: dict[str, Counter[str]] = {}
    total = 0
    for row in _rows(folder):
        total += 1
        for name, value in row.items():
            counts.setdefault(name, Counter())[value] += 1
    if not total:
        raise DataError(f"{folder}: no rows")
    return {"rows": {"all": total}, **{name: dict(values.most_common()) for name, values in counts.items()}}


def _rows(folder: Path) -> Iterator[dict[str, str]]:
    if artifact.read(folder, "pairs", "dataset").kind == "pairs":
        for pair in Pairs(folder):
            yield {
                "language": pair.language, "language known by": pair.language_source, "licence": pair.licence,
                "journal": pair.journal or "unknown", "year": pair.date[:4] or "unknown",
                "kind": "panel" if pair.part.isalpha() else "compound" if pair.compound else "whole",
                "caption length": _length(pair.caption), "mentions": str(min(len(pair.mentions), 9)),
                "longer side": f"{max(pair.width, pair.height) // 256 * 256:04d} px",
            }
    else:
        for row in Dataset(folder):
            yield {
                "split": row.split, "language": row.language, "task": row.task, "answer": row.answer_type,
                "licence": row.licence, "kind": row.kind or "unknown", "turns": str(len(row.turns)),
                "answer length": _length(row.answer),
            }


def _length(text: str) -> str:
    return f"from {max(edge for edge in _LENGTHS if edge <= len(text)):4d}"


def stats_text(counts: Mapping[str, Mapping[str, int]]) -> str:
    """The counts for a terminal, the commonest first."""
    lines = []
    for name, values in counts.items():
        shown = list(values.items())[:_SHOWN]
        rest = sum(values.values()) - sum(number for _, number in shown)
        told = ", ".join(f"{value} {number}" for value, number in shown)
        lines.append(f"{name}: {told}" + (f", {len(values) - len(shown)} others {rest}" if rest else ""))
    return "\n".join(lines)


def draw(counts: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """A plot of every count, as PNG."""
    require("matplotlib", "train")
    from matplotlib.figure import Figure

    named = {name: values for name, values in counts.items() if name != "rows"}
    columns = 3
    rows = -(-len(named) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(named) :]:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, named.items(), strict=False):
        shown = list(values.items())[:_SHOWN]
        if name.endswith(("length", "side", "year", "mentions", "turns")):
            shown.sort()
        axis.barh(range(len(shown)), [number for _, number in shown], color="#2a6f97")
        axis.set_yticks(range(len(shown)), [value[:32] for value, _ in shown], fontsize=8)
        axis.set_ylim(max(len(shown), 5) - 0.4, -0.6)
        axis.set_title(name, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        spread = [number for _, number in shown]
        if max(spread) > 1000 * max(1, statistics.median(spread)):
            axis.set_xscale("log")
    figure.savefig(path, dpi=110, metadata={"Software": None})
