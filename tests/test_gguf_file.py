"""GGUF files are held against their own structure before llama.cpp sees them."""

from __future__ import annotations

import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldrt_edge.convert.gguf import write_mmproj, write_text
from ldrt_edge.errors import RuntimeLoadError
from ldrt_edge.runtimes.gguf_file import check_gguf

Tiny = Callable[..., Path]
U32, U64, STRING, ARRAY, FLOAT, BOOL = 4, 10, 8, 9, 6, 7
F32, Q8_0 = 0, 8
WRAPS = (1 << 64) - 16
"""Bytes that wrap to nothing when they are padded to 32."""


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def setting(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name: str, shape: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(
    path: Path, settings: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: int = 0, **counts: Any
) -> Path:
    head = struct.pack(
        "<4sIQQ", counts.get("magic", b"GGUF"), counts.get("version", 3), counts.get("n_tensors", len(tensors)),
        counts.get("n_settings", len(settings)),
    ) + b"".join(settings + tensors)  # fmt: skip
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(data))
    return path


COUNT = struct.pack("<I", 7)
HOSTILE: dict[str, dict[str, Any]] = {
    "another magic": {"magic": b"GGML"},
    "version of the future": {"version": 4},
    "other byte order": {"version": 3 << 24},
    "more tensors than memory": {"n_tensors": (1 << 64) - 1},
    "more tensors than the file": {"n_tensors": 1000},
    "more settings than memory": {"n_settings": 1 << 61},
    "key longer than the file": {"n_settings": 1, "tensors": (struct.pack("<Q", (1 << 64) - 1),)},
    "key of nothing": {"settings": (setting("", U32, COUNT),)},
    "key that rewrites the screen": {"settings": (setting("a\x1b[2J", U32, COUNT),)},
    "key that is no text": {"settings": (setting(b"\xff\xfe", U32, COUNT),)},
    "key twice": {"settings": (setting("a", U32, COUNT), setting("a", U32, COUNT))},
    "type that is none": {"settings": (setting("a", 99, COUNT),)},
    "array in an array": {"settings": (setting("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)},
    "array without end": {"settings": (setting("a", ARRAY, struct.pack("<IQ", U64, 1 << 61)),)},
    "array of strings without end": {"settings": (setting("a", ARRAY, struct.pack("<IQ", STRING, 1 << 40)),)},
    "truth of two": {"settings": (setting("a", BOOL, b"\2"),)},
    "number that is none": {"settings": (setting("a", FLOAT, struct.pack("<f", float("nan"))),)},
    "alignment of nothing": {"settings": (setting("general.alignment", U32, struct.pack("<I", 0)),)},
    "alignment of another type": {"settings": (setting("general.alignment", U64, struct.pack("<Q", 32)),)},
    "alignment beyond memory": {"settings": (setting("general.alignment", U32, struct.pack("<I", 1 << 31)),)},
    "no heads to divide by": {"settings": (setting("llama.attention.head_count", U32, struct.pack("<I", 0)),)},
    "layers beyond memory": {"settings": (setting("llama.block_count", U32, struct.pack("<I", 0xFFFFFFFF)),)},
    "heads in words": {"settings": (setting("llama.attention.head_count", STRING, text("8")),)},
    "an array of no heads": {
        "settings": (setting("llama.attention.head_count_kv", ARRAY, struct.pack("<IQI", U32, 1, 0)),)
    },
    "no dimensions": {"tensors": (tensor("a", ()),)},
    "five dimensions": {"tensors": (tensor("a", (1,) * 5),), "data": 32},
    "tensor of nothing": {"tensors": (tensor("a", (0,)),)},
    "tensor beyond the file": {"tensors": (tensor("a", (1024,)),), "data": 32},
    "weights of integers": {"tensors": (tensor("a", (8, 2), 26),), "data": 64},
    "a bias that is quantised": {"tensors": (tensor("a", (32,), Q8_0),), "data": 34},
    "a layer that lacks a tensor": {
        "tensors": (tensor("blk.0.q", (8,)), tensor("blk.0.k", (8,), 0, 32), tensor("blk.1.q", (8,), 0, 64)),
        "data": 96,
    },
    "half a tower": {"tensors": (tensor("v.class_embd", (8,)),), "data": 32},
    "a layer left out": {"tensors": (tensor("blk.0.q", (8,)), tensor("blk.2.q", (8,), 0, 32)), "data": 64},
    "tensor of an unknown type": {"tensors": (tensor("a", (8,), 4),), "data": 32},
    "half a block": {"tensors": (tensor("a", (33, 1), Q8_0),), "data": 64},
    "tensor twice": {"tensors": (tensor("a", (8,)), tensor("a", (8,), F32, 32)), "data": 64},
    "name too long": {"tensors": (tensor("a" * 64, (8,)),), "data": 32},
    "two in one place": {"tensors": (tensor("a", (8,)), tensor("b", (8,))), "data": 64},
    "place outside": {"tensors": (tensor("a", (8,), F32, 1 << 40),), "data": 32},
    "place out of line": {"tensors": (tensor("a", (8,), F32, 1),), "data": 64},
    "size that wraps to zero": {"tensors": (tensor("a", (WRAPS // 4,)),), "data": 32},
    "padding that wraps to zero": {
        "tensors": (tensor("a", (64,)), tensor("b", (4, (1 << 30) - 1, (1 << 30) + 1), F32, 256)), "data": 256,
    },
    "sum that wraps around": {
        "tensors": (tensor("a", (1 << 61,)), tensor("b", (1 << 61,), F32, 1 << 63), tensor("c", (8,))), "data": 32,
    },
    "product that wraps around": {"tensors": (tensor("a", (1 << 32, 1 << 32)),), "data": 32},
    "more than it says": {"tensors": (tensor("a", (8,)),), "data": 96},
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    source = tiny("llavanext", "mistral")
    write_text(source, folder / "model-F32.gguf", "f32")
    write_mmproj(source, folder / "mmproj-F16.gguf", "f16")
    return folder / "model-F32.gguf", folder / "mmproj-F16.gguf"


def test_what_our_writer_and_this_test_write_passes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for path in pair:
        check_gguf(path)
    settings = (setting("general.alignment", U32, struct.pack("<I", 64)), setting("llama.block_count", U32, COUNT))
    path = file(tmp_path / "x.gguf", settings, (tensor("a", (8,)), tensor("b", (32, 2), Q8_0, 64)), 0)
    path.write_bytes(path.read_bytes() + bytes(-path.stat().st_size % 64 + 64 + 68))
    check_gguf(path)


@pytest.mark.parametrize("made_up", HOSTILE.values(), ids=HOSTILE)
def test_made_up_files_are_refused_in_one_line_at_once(tmp_path: Path, made_up: dict[str, Any]) -> None:
    path = file(tmp_path / "x.gguf", **made_up)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RuntimeLoadError) as caught:
        check_gguf(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()
    assert time.monotonic() - started < 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_a_file_cut_anywhere_in_its_header_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole, path = pair[1].read_bytes(), tmp_path / "x.gguf"
    for length in (*range(0, 3000, 7), len(whole) // 2, len(whole) - 33):
        path.write_bytes(whole[:length])
        with pytest.raises(RuntimeLoadError):
            check_gguf(path)


def mutate(data: bytearray, header: int, chosen: random.Random) -> None:
    """Change a few numbers of a header as an attacker would: to the edges of their types, or by a bit."""
    for _ in range(chosen.randint(1, 3)):
        at = chosen.randrange(header)
        if chosen.random() < 0.5:
            data[at] ^= 1 << chosen.randrange(8)
        else:
            size = chosen.choice((1, 2, 4, 8))
            value = chosen.choice((0, 1, 2, 3, 31, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 62, WRAPS, (1 << 64) - 1))
            data[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def test_mutated_headers_are_refused_or_pass_and_nothing_else(pair: tuple[Path, Path], tmp_path: Path) -> None:
    chosen, path = random.Random(1), tmp_path / "x.gguf"
    shutil.copy(pair[1], path)
    whole = path.read_bytes()[:4096]
    refused = 0
    for _ in range(1000):
        data = bytearray(whole)
        mutate(data, 3000, chosen)
        with path.open("r+b") as stream:
            stream.write(data[: len(whole)])
        try:
            check_gguf(path)
        except RuntimeLoadError:
            refused += 1
    assert 500 < refused < 1000
