"""How closely a converted model follows the model it was made from, over the answer tokens of a dataset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ldrt_edge.bench.vqa import Sample


@dataclass(frozen=True)
class Fidelity:
    """Over `tokens` answer tokens: Kullback-Leibler divergence in nats, its 99th percentile, and top-1 agreement."""

    mean_kld: float
    p99_kld: float
    top1_agreement: float
    tokens: int


def fidelity(samples: Iterable[Sample]) -> Fidelity | None:
    """Fidelity over all samples that carry divergences; None where there are none (no reference model)."""
    pairs = [(sample.kld, sample.top1) for sample in samples if sample.kld and sample.top1]
    if not pairs:
        return None
    kld = np.array(list(chain.from_iterable(kld for kld, _ in pairs)))
    top1 = list(chain.from_iterable(top1 for _, top1 in pairs))
    return Fidelity(float(kld.mean()), float(np.quantile(kld, 0.99)), float(np.mean(top1)), len(kld))
