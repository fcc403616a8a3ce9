"""The scales of `quantize --rescale`: those powers of the inputs' size with which rounding costs the answers least.

For every group (`rescale`), scales s = size^α are tried for α from 0, which changes nothing, to below 1. The loss is
Σ e H eᵀ over the group's matrices (`moments`), with e = round(W · s) / s − W as the format's own quantiser rounds.

Source: Lin et al., "AWQ", MLSys 2024, section 3.2 (the grid; the loss there is that of the block's outputs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldrt_edge import console
from ldrt_edge.convert.moments import Moments
from ldrt_edge.convert.rescale import Group, Scales, groups
from ldrt_edge.convert.source import Source
from ldrt_edge.convert.type_plan import PlannedMatrix
from ldrt_edge.runtimes.base import FloatArray

if TYPE_CHECKING:
    from ldrt_edge.convert.format import Format

_GRID = 20
_ROWS = 128
"""Of each matrix, evenly spread: rows of one matrix hardly differ in what they ask of the scales."""
_LEAST = 1e-4
"""Of the largest input's size: none is taken for smaller."""


def search(
    source: Source, to: Format, matrices: Sequence[PlannedMatrix], types: Mapping[str, str], moments: Moments
) -> Scales:
    """The best scales of each group, by its maker's name; a group that is best left as it is has none.

    matrices: of the language model. types: by their names.
    """
    planned = {matrix.source: matrix for matrix in matrices}
    found: dict[str, FloatArray] = {}
    for group in console.track(list(groups(source)), "rescaling"):
        readers = [_reader(source, planned[name], types, moments) for name in group.readers]
        candidates = [_scales(_size(group, readers), power / _GRID) for power in range(_GRID)]
        losses = [loss(group, readers, to, scales) for scales in candidates]
        if best := int(np.argmin(losses)):
            found[group.maker] = candidates[best]
    return found


class Reader(NamedTuple):
    """One of a group's matrices: some of its rows (rows, row length), and its moments."""

    name: str
    type: str
    rows: FloatArray
    moments: FloatArray


def loss(group: Group, readers: Sequence[Reader], to: Format, scales: FloatArray) -> float:
    """What rounding a group's matrices costs the answers, in nats of mean KLD an answer token."""
    columns, total = group.columns(scales), 0.0
    scaled = to.rescaled({reader.name: columns for reader in readers})
    for name, type_, rows, moments in readers:
        error = scaled.rounded(name, rows * columns, type_) / columns - rows
        total += float(np.einsum("ij,ij", error @ moments, error, dtype=np.float64)) / len(rows)
    return total


def _reader(source: Source, matrix: PlannedMatrix, types: Mapping[str, str], moments: Moments) -> Reader:
    values = source.weights.read(matrix.source)
    return Reader(
        matrix.name, types[matrix.name], values[:: math.ceil(len(values) / _ROWS)], moments[matrix.source]
    )


def _size(group: Group, readers: Sequence[Reader]) -> NDArray[np.float64]:
    """Root of the mean square of what each of the maker's rows makes, as far as answers depend on it."""
    squares: NDArray[np.float64] = np.sum([np.diagonal(r.moments) for r in readers], axis=0, dtype=np.float64)
    if group.places is not None:
        squares = np.bincount(group.places, squares).astype(np.float64)
    least = _LEAST**2 * squares.max()
    return np.sqrt(np.maximum(squares, least)) if least > 0 else np.ones_like(squares)


def _scales(size: NDArray[np.float64], power: float) -> FloatArray:
    scales = size**power
    return np.asarray(scales / np.sqrt(scales.max() * scales.min()), np.float32)
