"""`ldrt-edge quantize --feedback`: what rounding takes from a block of weights, the blocks behind it give back.

Inputs go together (`moments`); so the error of one block of a row can be made good by its other weights, before those
are rounded themselves: W_rest += E_block H_block,rest H_rest,rest⁻¹.

The blocks are a type's own, and the format's own quantiser rounds each. Given the changed weights, it rounds them just
so again: nothing about the files or their making is special. (With an importance, ggml's Q4_0, Q4_1, Q5_0 and Q5_1 also
ask how large a row's weights are on the whole, and those behind are still to change: a few of their blocks come out
otherwise.)

Source: Frantar et al., "GPTQ", ICLR 2023 (column by column; here whole blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.convert.moments import Moments
from ldrt_edge.convert.weights import Weights
from ldrt_edge.runtimes.base import FloatArray

_DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: GPTQ's."""

Rounded = Callable[[FloatArray, slice], FloatArray]
"""Rows of a matrix, (rows, row length) float32, and a block's columns: these as they come back from the export."""


class Rounding(NamedTuple):
    """How a matrix will be rounded: its type's block, and the format's quantiser."""

    block: int
    rounded: Rounded


class Compensated(Weights):
    """A checkpoint's weights, changed so that what rounding takes from a block is given back behind it.

    roundings: by the checkpoint's names; other tensors, and those without moments, are as they were.
    """

    def __init__(self, weights: Weights, moments: Moments, roundings: Mapping[str, Rounding]) -> None:
        self.folder, self.entries = weights.folder, weights.entries
        self._weights, self._moments, self._roundings = weights, moments, roundings
        self.changed = weights.changed | roundings.keys()
        self._last: tuple[str, list[FloatArray]] = ("", [])

    def dtypes(self) -> set[str]:
        """What changed is float32."""
        return {"F32"}

    def read(self, name: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        """One tensor, or some of its rows, as float32."""
        values = self._weights.read(name, rows)
        rounding = self._roundings.get(name)
        if rounding is None or name not in self._moments:
            return values
        if self._last[0] != name:
            self._last = name, gains(self._moments[name], rounding.block)
        return compensated(values, self._last[1], rounding)


def compensated(values: FloatArray, behind: list[FloatArray], rounding: Rounding) -> FloatArray:
    """Rows (rows, row length) whose blocks, rounded one after the other, make good for each other's errors.

    behind: see `gains`.
    """
    changed, block = values.copy(), rounding.block
    for i, gain in enumerate(behind):
        columns = slice(i * block, (i + 1) * block)
        error = changed[:, columns] - rounding.rounded(changed, columns)
        changed[:, columns.stop :] += error @ gain
    return changed


def gains(moments: FloatArray, block: int) -> list[FloatArray]:
    """For each block but the last, what its error asks of the weights behind: (block, columns behind)."""
    from scipy.linalg import solve_triangular

    width = len(moments)
    damped = moments.astype(np.float64) + np.eye(width) * max(_DAMPING * np.trace(moments) / width, 1e-30)
    # moments = R Rᵀ with R upper triangular, so that H_block,rest H_rest,rest⁻¹ = R_block,rest R_rest,rest⁻¹
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return [
        solve_triangular(upper[end:, end:], upper[start:end, end:].T, trans="T").T.astype(np.float32)
        for start, end in pairwise(range(0, width, block))
    ]
