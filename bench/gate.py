"""The gate before a release: held-out questions, asked of the merged model once and of every candidate.

A candidate passes when the upper end of the 95% interval of its paired accuracy loss, clustered by picture, is within
the budget. Too few questions make a wide interval, which does not pass: then the verdict says how many it would take.
It is over the budget only where the lower end is.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ldrt_edge import console
from ldrt_edge.bench.metrics import normalise
from ldrt_edge.bench.significance import power
from ldrt_edge.bench.statistics import (
    Difference,
    by_cluster,
    clusters_for,
    joined,
    paired_loss,
    pairs,
    unseen_share,
)
from ldrt_edge.bench.vqa import Model, Sample, answer_rows, cluster_labels
from ldrt_edge.dataset import Dataset, choose_rows
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.front import Front
from ldrt_edge.release import Verdict
from ldrt_edge.runtimes.base import Runtime
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime
from ldrt_edge.runtimes.mlx import MlxRuntime


class Gate:
    """Judges GGUF pairs and MLX folders against the merged model that they were made from.

    Says at once where its questions are too few to show the budget even if no answer changes.

    Args:
        merged: the reference.
        data: a dataset artefact; its test rows are asked.
        max_loss: points of accuracy. max_flips: percent of answers that may change; None for any.
        limit: about how many questions, as whole pictures.
        seed: of the choice of pictures and of the intervals.

    Raises:
        ConfigError: a budget that nothing can keep.
        DataError: no test rows.
    """

    def __init__(
        self, merged: Path, data: Path, max_loss: float, max_flips: float | None = None, limit: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < max_loss <= 100 or (max_flips is not None and not 0 < max_flips <= 100):
            raise ConfigError("--max-loss wants more than 0 points, --max-flips more than 0 percent, both at most 100")
        self._merged, self._dataset, self._seed = merged, Dataset(data), seed
        self._rows = choose_rows(self._dataset.rows("test"), limit, seed)
        if not self._rows:
            raise DataError(f"{data}: no rows in split 'test': a loss is measured on held-out rows only")
        self._max_loss, self._max_flips = max_loss, max_flips
        labels = joined([row.image_sha256 for row in self._rows], [row.group for row in self._rows])
        least, most = _least(labels), min(max_loss, max_flips or max_loss) / 100
        if least > most:
            console.say(
                f"note: too few for this budget: {len(set(labels))} pictures leave room for {100 * least:.1f} points "
                f"even if no answer changes; it takes questions about {clusters_for(most)} pictures or more"
            )

    def __call__(self, edge: Path) -> Verdict:
        """Ask the export in a folder, which need not be a finished artefact."""
        expected, place = self._expected
        given = self._ask(LlamaCppRuntime(edge) if any(edge.glob("*.gguf")) else MlxRuntime(edge), edge)
        return replace(judge(expected, given, self._max_loss, self._max_flips, self._seed), reference=place)

    @cached_property
    def _expected(self) -> tuple[list[Sample], str]:
        """The merged model's answers, and what it computed in."""
        runtime = HfRuntime(self._merged)
        return self._ask(runtime, self._merged), str(runtime.place)

    def _ask(self, runtime: Runtime, folder: Path) -> list[Sample]:
        try:
            return answer_rows(Model(runtime, Front.load(folder)), self._dataset, self._rows)
        finally:
            runtime.close()


def judge(
    reference: Sequence[Sample], subject: Sequence[Sample], max_loss: float, max_flips: float | None, seed: int = 0
) -> Verdict:
    """Hold the same questions' answers of two models against each other."""
    clusters = cluster_labels(reference)
    before, after = ([float(sample.subject.correct) for sample in samples] for samples in (reference, subject))
    changed = [
        float(normalise(a.subject.text, a.language) != normalise(b.subject.text, b.language))
        for a, b in zip(reference, subject, strict=True)
    ]
    none = [0.0] * len(changed)
    loss, flips = paired_loss(before, after, clusters, seed), paired_loss(changed, none, clusters, seed)
    held = [(loss, max_loss / 100, before, after)]
    told = f"loss {100 * loss.value:+.1f} points (at most {100 * loss.ci_high:+.1f}; budget {max_loss:g})"
    if max_flips is not None:
        held.append((flips, max_flips / 100, changed, none))
        told += f", {100 * flips.value:.1f}% of answers changed (at most {100 * flips.ci_high:.1f}; {max_flips:g})"
    needed = [_needed(found, most, first, second, clusters) for found, most, first, second in held]
    enough = None if None in needed else max(number for number in needed if number is not None)
    released = all(found.ci_high <= most for found, most, *_ in held)
    if released:
        verdict = "within budget"
    elif any(found.ci_low > most for found, most, *_ in held):
        verdict = "over budget"
    elif enough is None:
        verdict = f"{loss.n} questions are too few to tell, and so far they speak against it"
    else:
        though = ", though no answer turned right or wrong" if before == after else ""
        needed_on = f"on about {math.ceil(enough * loss.clusters / loss.n)} pictures"
        verdict = f"{loss.n} questions are too few to tell{though}: about {enough} would be needed, {needed_on}"
    return Verdict(
        released=released, reason=f"{verdict}: {told}", max_loss=max_loss, loss=100 * loss.value,
        loss_low=100 * loss.ci_low, loss_high=100 * loss.ci_high, max_flips=max_flips, flips=100 * flips.value,
        flips_high=100 * flips.ci_high, questions=loss.n, clusters=loss.clusters, needed=enough,
    )  # fmt: skip


def _least(clusters: Sequence[Hashable]) -> float:
    """The upper end where nothing differs, as a share."""
    return paired_loss(none := [0.0] * len(clusters), none, clusters).ci_high


def _needed(
    found: Difference, most: float, first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]
) -> int | None:
    """About how many questions bring the upper end within `most`, with a probability of 80%, if nothing else changes.

    None where the value itself is beyond.
    """
    if found.ci_high <= most:
        return found.n
    if found.value >= most:
        return None
    margin, size = most - found.value, found.n / found.clusters
    told = power(first, second, clusters, margin)
    spread = margin * math.sqrt(told.questions_needed / size) if told else 0.0
    needed = clusters_for(margin, spread, unseen_share(*by_cluster(pairs(first, second), clusters))) * size
    return max(found.n + 1, math.ceil(needed))
