"""How closely a converted model follows the model it was made from, over the answer tokens of a dataset.

Tokens of one picture stand and fall together, so each figure has an interval clustered by picture and group. That of
the 99th percentile is Woodruff's: the interval of the share of tokens below it, read off the tokens' own distribution.
It cannot reach beyond the largest divergence that was seen.

Source: Woodruff, "Confidence intervals for medians and other position measures", JASA 47 (1952).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np

from ldrt_edge.bench.statistics import Rate, Ratio, paired_ratio, rate
from ldrt_edge.bench.vqa import Sample, cluster_labels

_TAIL = 0.99


@dataclass(frozen=True)
class Fidelity:
    """Over `tokens` answer tokens: Kullback-Leibler divergence in nats, its 99th percentile, and top-1 agreement.

    mean, p99, top1: the same three with their 95% intervals; None in reports that know none.
    """

    mean_kld: float
    p99_kld: float
    top1_agreement: float
    tokens: int
    mean: Ratio | None = None
    p99: Ratio | None = None
    top1: Rate | None = None


def fidelity(samples: Sequence[Sample], seed: int = 0) -> Fidelity | None:
    """Fidelity over all samples that carry divergences; None where there are none (no reference model)."""
    told = [
        (sample.kld, sample.top1, label)
        for sample, label in zip(samples, cluster_labels(samples), strict=True)
        if sample.kld and sample.top1
    ]
    if not told:
        return None
    kld = np.array(list(chain.from_iterable(kld for kld, _, _ in told)))
    same = list(chain.from_iterable(top1 for _, top1, _ in told))
    labels = list(chain.from_iterable(repeat(label, len(kld)) for kld, _, label in told))
    top1 = rate(same, labels, seed)
    return Fidelity(
        mean_kld=float(kld.mean()),
        p99_kld=float(np.quantile(kld, _TAIL)),
        top1_agreement=top1.value,
        tokens=len(kld),
        mean=paired_ratio(kld.tolist(), [1.0] * len(kld), labels, seed),
        p99=_quantile(kld.tolist(), labels, seed),
        top1=top1,
    )


def _quantile(values: Sequence[float], labels: Sequence[Hashable], seed: int) -> Ratio:
    value = float(np.quantile(values, _TAIL))
    below = rate([one <= value for one in values], labels, seed)
    low, high = np.quantile(values, [below.ci_low, below.ci_high]).tolist()
    return Ratio(value, min(low, value), max(high, value), below.n, below.clusters)
