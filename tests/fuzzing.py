"""Inputs made to break the doors: files as an attacker would write them, each of a door, a number and nothing else.

    python tests/fuzzing.py gguf 0 100000        opens inputs 0 to 99,999 of the door "gguf"; prints what was found

An input is one or two seeds, changed where it hurts: numbers at the edges of their types, lengths, offsets, types and
places of fields, texts that are none, spans cut, doubled and moved. Each door knows its format: checksums of PNG chunks
are mended, DICOM elements keep their frame, JSON stays JSON. A door may refuse with an `LdrtError` or open; anything
else, a second of computing, or memory beyond the limit is a find. The worker runs apart, for what ends a process.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldrt_edge.errors import LdrtError

SECONDS = 1.0
MEMORY_BYTES = 1 << 30
REGRESSIONS = Path(__file__).with_name("regressions")
_STALLED_S = 60
EDGES = (0, 1, 2, 3, 7, 8, 31, 32, 127, 128, 255, 256, 4096, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
          1 << 32, 1 << 61, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 16, (1 << 64) - 1)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, 1e308, float("inf"), float("nan"), 1 << 62, -(1 << 63), 10**400, "", "x", "\0",
    "..", "../../x", "/etc/passwd", "a\\b", "C:x", "con", "\x1b[2J", "\ud800", "٣", "x" * 5000, [], {}, [[]], [None],
    {"": 0}, [1, 2], "{{ x }}", "{% for a in b %}{% endfor %}",
)  # fmt: skip
Random = random.Random


@dataclass(frozen=True)
class Door:
    """What takes an input's bytes and opens or refuses them, and what makes the inputs."""

    open: Callable[[bytes], object]
    make: Callable[[Random], bytes]


@dataclass(frozen=True)
class Find:
    """An input that was neither opened nor refused as it should be."""

    door: str
    number: int
    what: str


def fuzz(door: str, start: int, count: int) -> tuple[list[Find], int]:
    """Open `count` inputs of a door in a process apart, again behind each that ends it; returns finds and refusals."""
    finds: list[Find] = []
    refused, end = 0, start + count
    while start < end:
        with tempfile.TemporaryDirectory() as scratch:
            at = Path(scratch) / "at"
            at.touch()  # empty until all is imported, which may take long
            command = [sys.executable, __file__, "--worker", door, str(start), str(end - start), str(at)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            last, since = "", time.monotonic()
            while process.poll() is None:
                time.sleep(0.05)
                if (now := at.read_text()) != last:
                    last, since = now, time.monotonic()
                elif last and time.monotonic() - since > _STALLED_S:
                    process.kill()
            told = process.stdout.read() if process.stdout else ""
            reached = int(at.read_text() or start)
        for line in told.splitlines():
            number, _, what = line.partition(" ")
            if number == "refused":
                refused += int(what)
            else:
                finds.append(Find(door, int(number), what))
        if process.returncode:
            finds.append(Find(door, reached, f"ended the process ({process.returncode}), or stalled"))
        start = reached + 1
    return finds, refused


def work(name: str, start: int, count: int, at: Path) -> None:
    """Open inputs one after another; tell finds on stdout, and in the file `at` which input is being opened."""
    from fuzz_doors import DOORS

    door = DOORS[name]()
    door_open(door.open, door.make(Random("warm")))
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + 2 * MEMORY_BYTES, resource.RLIM_INFINITY))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    with at.open("r+") as stream:
        for number in range(start, start + count):
            stream.seek(0)
            stream.write(f"{number}")
            stream.flush()
            data = door.make(Random(f"{name} {number}"))
            before = sum(os.times()[:4])
            what = door_open(door.open, data)
            refused += what == "refused"
            took = sum(os.times()[:4]) - before
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            if what not in ("", "refused"):
                print(number, what, flush=True)
            if took > SECONDS:
                print(number, f"took {took:.1f} s", flush=True)
            if grown > MEMORY_BYTES >> 10:
                print(number, f"grew by {grown >> 10} MiB", flush=True)
                peak += grown
    print("refused", refused, flush=True)


def door_open(opened: Callable[[bytes], object], data: bytes) -> str:
    """Empty if it opens, "refused", or what else happened."""
    try:
        opened(data)
        return ""
    except LdrtError as error:
        return "refused" if "\n" not in str(error) else f"refused in several lines: {str(error)[:80]!r}"
    except Exception as error:  # everything else is a find
        return f"{type(error).__name__}: {str(error)[:120]!r}"


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# --- changes --------------------------------------------------------------------------------------------------------


def changed(rng: Random, data: bytes, reach: int | None = None) -> bytes:
    """Some bytes of `data` otherwise, most of them among the first `reach`."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not found:
            break
        at = rng.randrange(min(len(found), reach) if reach and rng.random() < 0.8 else len(found))
        span = min(rng.choice((1, 2, 4, 8, 16, 100, 1000)), len(found))
        match rng.randrange(8):
            case 0:
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                found[at] = rng.randrange(256)
            case 2 | 3 | 4:
                size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                value = rng.choice(EDGES) + rng.choice((-1, 0, 0, 1))
                found[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, order)  # type: ignore[arg-type]
            case 5:
                del found[at : at + span]
            case 6:
                found[at:at] = found[at : at + span]
            case 7:
                del found[at : len(found) if rng.random() < 0.3 else at + 1]
    return bytes(found)


def spliced(rng: Random, one: bytes, other: bytes) -> bytes:
    """The beginning of one and the end of the other."""
    return one[: rng.randrange(len(one) + 1)] + other[rng.randrange(len(other) + 1) :]


def changed_json(rng: Random, value: Any) -> bytes:
    """The same JSON with other values, or keys, here and there; one in five no longer quite JSON."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("x", "", "path", "bytes", "__class__", str(key).upper()))] = holder.pop(key)
            case 2 if isinstance(holder, list):
                holder.append(holder[key])
            case 3 if isinstance(holder[key], int):
                holder[key] = rng.choice(EDGES) * rng.choice((1, -1))
            case 4 if isinstance(holder[key], str) and holder[key]:
                text = changed(rng, holder[key].encode("utf-8", "surrogatepass"))
                holder[key] = text.decode("utf-8", rng.choice(("replace", "surrogateescape")))
            case _:
                holder[key] = copy.deepcopy(rng.choice(_VALUES))
    raw = json.dumps(value).encode()
    return changed(rng, raw) if rng.random() < 0.2 else raw


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder and key below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    else:
        started = time.monotonic()
        finds, refused = fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        for find in finds:
            print(find.number, find.what)
        took = f"{time.monotonic() - started:.0f} s"
        print(f"{sys.argv[1]}: {sys.argv[3]} inputs, {refused} refused, {len(finds)} finds, {took}")
