"""Answers in equal shares, so that a guess that never looks is worth as little as it can be."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def deal(values: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """`count` values in random order, each of `values` equally often (to within one), so that priors are balanced."""
    whole, rest = divmod(count, len(values))
    dealt = [*values] * whole + rng.sample(list(values), rest)
    rng.shuffle(dealt)
    return dealt


class Balance:
    """Chooses what to ask so that every answer to the same question comes up equally often."""

    def __init__(self, rng: random.Random) -> None:
        self._counts, self._rng = Counter[tuple[str, str, str]](), rng

    def pick(self, task: str, candidates: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """Of (subject, answer) pairs, the one whose answer lags furthest behind this subject's other answers."""
        def lead(candidate: tuple[str, str]) -> tuple[int, int, float]:
            subject, answer = candidate
            others = [n for (t, s, a), n in self._counts.items() if (t, s) == (task, subject) and a != answer]
            own = self._counts[task, subject, answer]
            return own - max(others, default=0), own, self._rng.random()

        chosen = min(candidates, key=lead)
        self._counts[task, *chosen] += 1
        return chosen
