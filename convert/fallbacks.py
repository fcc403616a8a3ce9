"""What a quantised language model holds, and which of its tensors could not have the type that was wanted.

A tensor falls back where its rows are no multiple of the wanted type's block (GGUF) or group (MLX). The log says so in
groups, the manifest tensor by tensor.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from ldrt_edge import console

_LAYER = re.compile(r"^(blk|language_model\.model\.layers)\.\d+\.|^language_model\.(model\.)?")


@dataclass(frozen=True)
class Fallback:
    """A tensor that has not the type it should have, since its rows are no multiple of `block`."""

    tensor: str
    row_length: int
    block: int
    wanted: str
    got: str


@dataclass(frozen=True)
class Quantized:
    """What a quantised language model holds. types: number of tensors by type."""

    bytes: int
    bits_per_weight: float
    types: dict[str, int]
    fallbacks: tuple[Fallback, ...]


def report(result: Quantized, type_: str) -> None:
    """Say what came out, fall-backs of one kind on one line."""
    types = ", ".join(f"{count} {name}" for name, count in result.types.items())
    console.say(f"{type_}: {result.bytes / 1e6:.1f} MB, {result.bits_per_weight:.2f} bits a weight; tensors: {types}")
    groups = Counter((f.wanted, f.got, f.row_length, f.block, _role(f.tensor)) for f in result.fallbacks)
    for (wanted, got, row, block, role), count in sorted(groups.items()):
        console.say(f"  {role} ({count}): {wanted} → {got}, rows of {row} are no multiple of {block}")


def _role(tensor: str) -> str:
    return _LAYER.sub("", tensor).removesuffix(".weight")
