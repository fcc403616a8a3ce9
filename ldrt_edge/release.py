"""The verdict on an export: whether what it lost is within the budget, and the evidence; kept in its manifest.

`quantize --max-loss` writes it (the bench measures it), `chat` and bundles show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldrt_edge.errors import ArtifactError

RELEASE = "release"
"""The manifest's metric that holds a verdict."""


@dataclass(frozen=True)
class Verdict:
    """What held-out questions said about an export.

    released: whether the upper ends of both intervals are within their budgets.
    reason: one sentence for a person.
    max_loss, loss, loss_low, loss_high: points of accuracy lost against the merged model, paired, with the 95%
        interval clustered by picture; below 0, something was won.
    max_flips, flips, flips_high: percent of answers that changed, for better or worse; max_flips may be None.
    questions, clusters: how many were asked, on how many groups of pictures.
    needed: about how many questions would tell, if the loss stays what it is; None where it is beyond the budget.
    reference: what the merged model computed in ("float32 on cpu"), where that is known.
    """

    released: bool
    reason: str
    max_loss: float
    loss: float
    loss_low: float
    loss_high: float
    max_flips: float | None
    flips: float
    flips_high: float
    questions: int
    clusters: int
    needed: int | None
    reference: str | None = None

    @property
    def told(self) -> str:
        """The verdict and its reason."""
        return f"{'released' if self.released else 'not released'}: {self.reason}"


def read_verdict(metrics: Mapping[str, Any]) -> Verdict | None:
    """The verdict in a manifest's metrics; None for an export that was not judged.

    Raises:
        ArtifactError: one that this version does not read.
    """
    if RELEASE not in metrics:
        return None
    try:
        return Verdict(**metrics[RELEASE])
    except TypeError as error:
        raise ArtifactError(f"the manifest's verdict is not one that this version reads ({error})") from error
