"""The gate before a release: held-out questions, asked of the merged model once and of every candidate.

A candidate passes when the upper end of the 95% interval of its paired accuracy loss, clustered by picture, is within
the budget. Too few questions make a wide interval, which does not pass: then the verdict says how many it would take.
It is over the budget only where the lower end is.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import cached_property
from pathlib import Path

from ldrt_edge.bench.metrics import normalise
from ldrt_edge.bench.significance import power
from ldrt_edge.bench.statistics import Difference, Rate, clusters_for, paired_difference, rate
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

    def __call__(self, edge: Path) -> Verdict:
        """Ask the export in a folder, which need not be a finished artefact."""
        given = self._ask(LlamaCppRuntime(edge) if any(edge.glob("*.gguf")) else MlxRuntime(edge), edge)
        return judge(self._expected, given, self._max_loss, self._max_flips, self._seed)

    @cached_property
    def _expected(self) -> list[Sample]:
        return self._ask(HfRuntime(self._merged), self._merged)

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
    loss, flips = paired_difference(before, after, clusters, seed), rate(changed, clusters, seed)
    held: list[tuple[Difference | Rate, float, list[float], list[float]]] = [(loss, max_loss / 100, before, after)]
    told = f"loss {100 * loss.value:+.1f} points (at most {100 * loss.ci_high:+.1f}; budget {max_loss:g})"
    if max_flips is not None:
        held.append((flips, max_flips / 100, changed, [0.0] * len(changed)))
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
        verdict = f"{loss.n} questions are too few to tell: about {enough} would be needed"
    return Verdict(
        released=released, reason=f"{verdict}: {told}", max_loss=max_loss, loss=100 * loss.value,
        loss_low=100 * loss.ci_low, loss_high=100 * loss.ci_high, max_flips=max_flips, flips=100 * flips.value,
        flips_high=100 * flips.ci_high, questions=loss.n, clusters=loss.clusters, needed=enough,
    )  # fmt: skip


def _needed(
    found: Difference | Rate, most: float, first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]
) -> int | None:
    """About how many questions bring the upper end within `most`, with a probability of 80%, if nothing else changes.

    Where nothing varies yet, as many as the bound of that case asks for. None where the value itself is beyond.
    """
    if found.ci_high <= most:
        return found.n
    if found.value >= most:
        return None
    told = power(first, second, clusters, most - found.value)
    needed = told.questions_needed if told else clusters_for(most - found.value) * found.n / found.clusters
    return max(found.n + 1, math.ceil(needed))
