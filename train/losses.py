"""The losses of a stage's steps: their mean for the log, and what stops a run; a checkpoint holds both.

transformers sums up anew from a checkpoint: the next line of a resumed run would tell another mean than that of a run
which was never killed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from ldrt_edge.errors import DataError, all_problems
from ldrt_edge.train import devices

LOSSES = "losses.json"
_WINDOW, _LEAST = 50, 10


class Losses:
    """Those of a stage. A batch stops it that is no number, or leaps: beyond the first ones and `factor` times the
    recent median.
    """

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._total = self._logged = 0.0
        self._logged_step = 0
        self._first: list[float] = []
        self._recent: list[float] = []

    def check(self, loss: float, rows: Sequence[str], where: str) -> None:
        """Take note of a batch's mean loss per answer token.

        Raises:
            DataError: it is no number, or a leap.
        """
        named = all_problems(list(rows), "rows of this batch")
        if not math.isfinite(loss):
            raise DataError(f"{where}: the loss is {loss}: lower the learning rate, or look at the data; {named}")
        if len(self._first) < _LEAST:
            self._first.append(loss)
        elif self._factor is not None and loss > self._factor * median(self._recent) and loss > max(self._first):
            raise DataError(
                f"{where}: the loss leapt from {median(self._recent):.3g} to {loss:.3g}: lower the learning rate, look "
                f"at the data, or raise spike_factor ({self._factor:g}); {named}"
            )
        self._recent = [*self._recent, loss][-_WINDOW:]

    def add(self, share: float) -> None:
        """Add what a forward gives to its step's loss."""
        self._total += share

    def since_log(self, step: int) -> float:
        """The mean loss of the steps since this was last asked, up to `step`; all processes must ask."""
        mean = devices.mean(self._total - self._logged) / (step - self._logged_step)
        self._logged, self._logged_step = self._total, step
        return mean

    def mean(self, step: int) -> float:
        """The mean loss of all steps up to `step`; all processes must ask."""
        return devices.mean(self._total) / max(step, 1)

    def save(self, folder: Path) -> None:
        """Write into a checkpoint; all processes take part."""
        kept = {
            "total": devices.mean(self._total), "logged": devices.mean(self._logged), "logged_step": self._logged_step,
            "first": self._first, "recent": self._recent,
        }  # fmt: skip
        if devices.state().is_main_process:
            (folder / LOSSES).write_text(json.dumps(kept))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            OSError, ValueError, KeyError: it has none.
        """
        kept = json.loads((folder / LOSSES).read_text())
        self._total, self._logged, self._logged_step = kept["total"], kept["logged"], kept["logged_step"]
        self._first, self._recent = kept["first"], kept["recent"]
