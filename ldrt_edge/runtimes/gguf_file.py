"""A GGUF file held against its own structure before llama.cpp parses it.

llama.cpp's parser is C++ that trusts much of what it reads: sums of sizes that wrap around, a size that wraps to zero
when it is padded (upstream CVE-2025-53630, pull requests #14595 and #24759, issue #26978), settings of another type,
counts of zero that it divides by. Nothing wraps around here, each number is held against the file's length, and only
what one of llama.cpp's own writers could have written passes. Weights are not looked at.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from ldrt_edge.chat_template import check_template
from ldrt_edge.errors import ArtifactError, RuntimeLoadError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_KEY_LIMIT_BYTES = 256
_STRING_LIMIT_BYTES = 1 << 20  # the longest is a chat template
_NAME_LIMIT_BYTES = 63  # GGML_MAX_NAME with its closing zero
_SETTINGS_LIMIT, _TENSORS_LIMIT, _ARRAY_LIMIT = 4096, 1 << 16, 1 << 22
_DIMENSIONS = 4
_F32 = 0
_NOT_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
_TOWER = (
    "v.class_embd", "v.patch_embd.weight", "v.position_embd.weight", "v.pre_ln.weight", "v.pre_ln.bias",
    "mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias",
)  # fmt: skip
_LAYER = re.compile(r"(.*blk)\.([0-9]{1,4})\.(.+)")
_ALIGNMENT = "general.alignment"
_TEMPLATE = "tokenizer.chat_template"
_COUNTS = (
    ".block_count", ".embedding_length", ".feed_forward_length", ".attention.head_count", ".attention.head_count_kv",
    ".context_length", ".image_size", ".patch_size", ".projection_dim", ".vocab_size", ".rope.dimension_count",
)  # fmt: skip
"""Settings that llama.cpp allocates by or divides by."""
_COUNT_LIMIT = 1 << 24


def check_gguf(path: Path) -> None:
    """Refuse a file that is not whole, or that a writer of GGUF would not have written.

    Raises:
        RuntimeLoadError: says what is wrong, with the file's path.
    """
    try:
        with path.open("rb") as stream:
            _check(_Reader(stream))
    except OSError as error:
        raise RuntimeLoadError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, ArtifactError) as error:
        raise RuntimeLoadError(f"{path}: {error}") from error


def _check(reader: _Reader) -> None:
    if reader.take(min(4, reader.left)) != _MAGIC:
        raise ValueError("not a GGUF file")
    if (version := reader.integer("I")) not in _VERSIONS:
        raise ValueError(f"GGUF version {version}; 2 and 3 are read (a file of the other byte order reads so too)")
    tensors, settings = reader.integer("Q"), reader.integer("Q")
    if tensors > _TENSORS_LIMIT or settings > _SETTINGS_LIMIT:
        raise ValueError(f"damaged: {tensors} tensors and {settings} settings")
    alignment = _settings(reader, settings)
    sizes = _tensors(reader, tensors, alignment)
    start = _aligned(reader.position, alignment)
    end = start + sum(_aligned(size, alignment) for size in sizes[:-1]) + (sizes[-1] if sizes else 0)
    if not end <= reader.size <= _aligned(end, alignment):
        raise ValueError(f"truncated or damaged: {reader.size} bytes, its tensors end at {end}")


def _settings(reader: _Reader, count: int) -> int:
    """Walk over the key-value pairs; returns the alignment of tensors."""
    alignment, seen = 32, set()
    for _ in range(count):
        key = reader.name(_KEY_LIMIT_BYTES)
        if key in seen:
            raise ValueError(f"damaged: the setting {key!r} twice")
        seen.add(key)
        kind = reader.integer("I")
        value = _value(reader, kind, key)
        if key.startswith(_TEMPLATE) and isinstance(value, str):
            check_template(value)
        if key == _ALIGNMENT:
            if kind != _UINT32 or value not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
                raise ValueError(f"damaged: tensors aligned to {value}")
            alignment = int(value)
        if key.endswith(_COUNTS) and kind != _ARRAY and not _is_count(value):
            raise ValueError(f"damaged: {key} is {value}")
    return alignment


def _value(reader: _Reader, kind: int, key: str) -> float | str | None:
    if kind == _STRING:
        return reader.text(_STRING_LIMIT_BYTES)
    if kind != _ARRAY:
        return _scalar(reader, kind, key)
    item, length = reader.integer("I"), reader.integer("Q")
    if length > _ARRAY_LIMIT:
        raise ValueError(f"damaged: {key} holds {length} values")
    if item == _STRING:
        for _ in range(length):
            reader.text(_STRING_LIMIT_BYTES)
    elif item in _SCALARS:
        values = struct.iter_unpack(f"<{_SCALARS[item]}", reader.take(length * struct.calcsize(_SCALARS[item])))
        if key.endswith(_COUNTS) and not all(_is_count(value) for (value,) in values):
            raise ValueError(f"damaged: {key} holds what is no count")
    else:
        raise ValueError(f"damaged: {key} holds values of type {item}")
    return None


def _scalar(reader: _Reader, kind: int, key: str) -> float:
    if kind not in _SCALARS:
        raise ValueError(f"damaged: {key} is of type {kind}")
    value = reader.number(_SCALARS[kind])
    if not math.isfinite(value) or (kind == _BOOL and value not in (0, 1)):
        raise ValueError(f"damaged: {key} is {value}")
    return value


def _tensors(reader: _Reader, count: int, alignment: int) -> list[int]:
    """Walk over the tensors' descriptions; returns their sizes in bytes."""
    from gguf import GGML_QUANT_SIZES

    blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items() if kind.name not in _NOT_WEIGHTS}
    expected = 0
    sizes: dict[str, int] = {}
    for _ in range(count):
        name = reader.name(_NAME_LIMIT_BYTES)
        if name in sizes:
            raise ValueError(f"damaged: the tensor {name!r} twice")
        dimensions = reader.integer("I")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise ValueError(f"damaged: {name} has {dimensions} dimensions")
        shape = [reader.integer("Q") for _ in range(dimensions)]
        kind, offset = reader.integer("I"), reader.integer("Q")
        if kind not in blocks or (dimensions == 1 and kind != _F32):
            raise ValueError(f"damaged: {name} is of type {kind}, which such a tensor cannot have")
        block, block_bytes = blocks[kind]
        size = math.prod(shape) // block * block_bytes
        if min(shape) < 1 or shape[0] % block or size > reader.size:
            raise ValueError(f"damaged: {name} has the shape {shape}, which the file cannot hold")
        if offset != expected:
            raise ValueError(f"damaged: {name} begins at {offset}, its place is {expected}")
        expected += _aligned(size, alignment)
        sizes[name] = size
    _check_layers(sizes)
    return list(sizes.values())


def _check_layers(names: Collection[str]) -> None:
    """Layers count from 0 and all hold the same tensors: where one lacks one, llama.cpp may follow a null pointer."""
    if any(name.startswith("v.") for name in names) and (missing := [name for name in _TOWER if name not in names]):
        raise ValueError(f"not LLaVA's vision tower and projector: {missing[0]} is missing")
    layers: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if found := _LAYER.fullmatch(name):
            layers.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(found[3])
    for stack, held in layers.items():
        if sorted(held) != list(range(len(held))) or any(tensors != held[0] for tensors in held.values()):
            raise ValueError(f"damaged: the layers {stack}.* do not all hold the same tensors")


def _is_count(value: float | str | None) -> bool:
    return isinstance(value, int) and 0 < value <= _COUNT_LIMIT


def _aligned(position: int, alignment: int) -> int:
    return position + -position % alignment


class _Reader:
    """Takes what a file begins with, and never more than is left of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = os.fstat(stream.fileno()).st_size
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes behind the position."""
        return self.size - self.position

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            ValueError: there are fewer.
        """
        data = self._stream.read(count) if count <= self.left else b""
        if len(data) < count:
            raise ValueError(f"truncated or damaged: {count} bytes are wanted at {self.position} of {self.size}")
        self.position += count
        return data

    def number(self, form: str) -> float:
        """The next number, in one of struct's formats."""
        value: float = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]
        return value

    def integer(self, form: str) -> int:
        """The next integer."""
        return int(self.number(form))

    def text(self, limit: int) -> str:
        """The next string, of at most `limit` bytes."""
        if (length := self.integer("Q")) > limit:
            raise ValueError(f"damaged: a string of {length} bytes at {self.position}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"damaged: a string that is no text before {self.position}") from error

    def name(self, limit: int) -> str:
        """The next string, if it can be shown on one line."""
        text = self.text(limit)
        if not text or not text.isprintable():
            raise ValueError(f"damaged: {text!r} is no name")
        return text
