"""What a safetensors file says it holds, read and held against its length before anything loads it.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldrt_edge.errors import ArtifactError

_HEADER_LIMIT_BYTES = 100_000_000
_DIMENSIONS = 8
_METADATA = "__metadata__"
_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape and safetensors dtype ("F32", "BF16", …)."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; they fill the file behind the header, in order and without a gap.

    Raises:
        ArtifactError: truncated or corrupt, named by the file's name alone.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT_BYTES):
                raise ArtifactError(f"{path.name} is truncated or no safetensors file ({size} bytes)")
            raw = stream.read(length)
    except OSError as error:
        raise ArtifactError(f"{path.name} cannot be read ({error.strerror})") from error
    try:
        header = json.loads(raw, object_pairs_hook=_once)
        header.pop(_METADATA, None)
        tensors, places = {}, []
        for name, entry in header.items():
            tensors[name], first, last = _tensor(name, entry)
            places.append((first, last, name))
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path.name} is corrupt: its header cannot be read ({str(error)[:80]!r})") from error
    end = 0
    for first, last, name in sorted(places):
        if first != end:
            raise ArtifactError(f"{path.name} is corrupt: {name} begins at {first}, its place is {end}")
        end = last
    if size != 8 + length + end:
        raise ArtifactError(f"{path.name} is truncated or corrupt: {size} bytes, its header says {8 + length + end}")
    return tensors


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose names differ: of two of the same name, one reader takes the first and another the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor(name: str, entry: Mapping[str, Any]) -> tuple[StoredTensor, int, int]:
    """One entry, with the first byte of its data and the one behind the last."""
    shape, dtype, (first, last) = entry["shape"], entry["dtype"], entry["data_offsets"]
    numbers = [first, last, *shape]
    if len(shape) > _DIMENSIONS or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{name} has a shape or a place that is none")
    if not name.isprintable() or set(entry) != {"shape", "dtype", "data_offsets"}:
        raise ValueError(f"{name} is described as no tensor is")
    if dtype not in _SIZES or last - first != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"{name} is not of the size that its shape and type say")
    return StoredTensor(tuple(shape), dtype), first, last
