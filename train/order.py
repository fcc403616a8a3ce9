"""The order in which packed rows are trained on: shuffled anew each epoch, and known from seed and epoch alone.

So a resumed run, a run on more devices and a benchmark all see the same order. With `group_by_length`, rows of like
length share a step: little is padded, and kernels that are compiled for a shape meet few shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

_POOL_STEPS = 50
"""Steps among which rows are sorted by length: few enough that the order stays a shuffle."""


class RowOrder(torch.utils.data.Sampler[int]):
    """Indices of rows for one epoch after another; the data loader calls `set_epoch`.

    group: rows of one optimizer step over all devices, which get like lengths; None shuffles freely.
    """

    def __init__(self, lengths: Sequence[int], seed: int, group: int | None) -> None:
        self._lengths, self._seed, self._group, self._epoch = list(lengths), seed, group, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is asked for next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=generator).tolist()
        yield from shuffled if self._group is None else self._grouped(shuffled, self._group, generator)

    def _grouped(self, order: Sequence[int], group: int, generator: torch.Generator) -> Iterator[int]:
        """Steps of like rows, sorted out within pools of the shuffled order; the largest first, to fail early."""
        pool = group * _POOL_STEPS
        steps: list[list[int]] = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=lambda i: self._lengths[i])
            steps += [rows[i : i + group] for i in range(0, len(rows), group)]
        rest = [step for step in steps if len(step) < group]
        whole = [step for step in steps if len(step) == group]
        whole = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        if whole:
            whole.insert(0, whole.pop(max(range(len(whole)), key=lambda i: self._longest(whole[i]))))
        for step in (*whole, *rest):
            yield from step

    def _longest(self, step: Sequence[int]) -> int:
        return max(self._lengths[i] for i in step)
