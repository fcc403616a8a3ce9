"""The gate before a release: held-out questions, asked of the merged model once and of every candidate.

A candidate passes when the upper end of the 95% interval of its paired accuracy loss, clustered by picture, is within
the budget. Too few questions make a wide interval, which does not pass: then the verdict says how many it would take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from ldrt_edge.bench.metrics import normalise
from ldrt_edge.bench.statistics import paired_difference, rate
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
    loss = paired_difference(
        [sample.subject.correct for sample in reference], [sample.subject.correct for sample in subject], clusters, seed
    )
    changed = [
        normalise(a.subject.text, a.language) != normalise(b.subject.text, b.language)
        for a, b in zip(reference, subject, strict=True)
    ]
    flips = rate(changed, clusters, seed)
    needed = max(
        _needed(100 * loss.value, 100 * loss.ci_high, max_loss, loss.n),
        _needed(100 * flips.value, 100 * flips.ci_high, max_flips, flips.n) if max_flips is not None else 0,
    )
    told = f"loss {100 * loss.value:+.1f} points (at most {100 * loss.ci_high:+.1f}; budget {max_loss:g})"
    if max_flips is not None:
        told += f", {100 * flips.value:.1f}% of answers changed (at most {100 * flips.ci_high:.1f}; {max_flips:g})"
    released = needed <= loss.n
    if released:
        verdict = "within budget"
    elif math.isinf(needed):
        verdict = "over budget, and more questions would not change that"
    else:
        verdict = f"{loss.n} questions are too few to tell: about {needed:.0f} would be needed"
    return Verdict(
        released=released, reason=f"{verdict}: {told}", max_loss=max_loss, loss=100 * loss.value,
        loss_low=100 * loss.ci_low, loss_high=100 * loss.ci_high, max_flips=max_flips, flips=100 * flips.value,
        flips_high=100 * flips.ci_high, questions=loss.n, clusters=loss.clusters,
        needed=None if math.isinf(needed) else int(needed),
    )  # fmt: skip


def _needed(value: float, high: float, most: float, asked: int) -> float:
    """How many questions bring the upper end within `most`: an interval narrows with the root of their number."""
    if high <= most:
        return asked
    return math.inf if value >= most else math.ceil(asked * ((high - value) / (most - value)) ** 2)
