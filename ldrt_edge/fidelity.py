"""How far one model's next-token distributions are from another's, token by token.

Accuracy hides change: a model may lose as many answers as it wins. The divergence between the two models' next-token
distributions does not, and neither does the share of places where both rank the same token first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.runtimes.base import FloatArray, log_softmax

KERNELS_APART = 0.25
"""Logits of one quantised model that differ by less may come from kernels: of other processors, or for one token and
for many (0.16 measured at a 7B's depth). So close together, either of two tokens is right."""


@dataclass(frozen=True, eq=False)
class TokenFidelity:
    """One entry a token.

    kld: Kullback-Leibler divergence of the subject's distribution from the reference's, nats.
    top1: whether both find the same token likeliest.
    undecided: whether they do not, but the reference's own two candidates lie closer together than half-precision
        numbers do at the size of its logits.
    max_abs_logit_diff: over all tokens and the whole vocabulary.
    """

    kld: NDArray[np.float64]
    top1: NDArray[np.bool_]
    undecided: NDArray[np.bool_]
    max_abs_logit_diff: float


def compare_logits(reference: FloatArray, subject: FloatArray) -> TokenFidelity:
    """Hold a subject's logits (tokens, vocab) against a reference's.

    Where one vocabulary is padded, the extra entries of the other are left out.
    """
    width = min(reference.shape[1], subject.shape[1])
    reference, subject = reference[:, :width], subject[:, :width]
    log_p, log_q = log_softmax(reference), log_softmax(subject)
    chosen = np.take_along_axis(reference, subject.argmax(axis=1)[:, None], axis=1)[:, 0]
    margin = reference.max(axis=1) - chosen
    return TokenFidelity(
        kld=(np.exp(log_p) * (log_p - log_q)).sum(axis=1).clip(min=0),
        top1=margin == 0,
        undecided=(margin > 0) & (margin < half_precision(reference)),
        max_abs_logit_diff=float(np.abs(reference - subject).max(initial=0.0)),
    )


def half_precision(logits: FloatArray) -> NDArray[np.float16]:
    """The distance between neighbouring half-precision numbers at the size of each row's logits: (tokens,)."""
    spacing: NDArray[np.float16] = np.spacing(np.abs(logits).max(axis=1).astype(np.float16))
    return spacing
