"""What a safetensors file says it holds, read and held against its length before anything loads it.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ldrt_edge.errors import ArtifactError

_HEADER_LIMIT_BYTES = 100_000_000
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
    """The tensors of a safetensors file by name; the file must be just as long as its header says.

    Raises:
        ArtifactError: truncated or corrupt, named by the file's name alone.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT_BYTES):
            raise ArtifactError(f"{path.name} is truncated or no safetensors file ({size} bytes)")
        raw = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        tensors = {name: StoredTensor(tuple(map(int, e["shape"])), str(e["dtype"])) for name, e in entries.items()}
        spans = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
        end = max((last for _, last in spans.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path.name} is corrupt: its header cannot be read") from error
    if size != 8 + length + end:
        raise ArtifactError(f"{path.name} is truncated or corrupt: {size} bytes, its header says {8 + length + end}")
    for name, (first, last) in spans.items():
        tensor = tensors[name]
        if min(first, *tensor.shape, 0) < 0 or last - first != math.prod(tensor.shape) * _SIZES.get(tensor.dtype, -1):
            raise ArtifactError(f"{path.name} is corrupt: {name} is not of the size that its shape and type say")
    return tensors
