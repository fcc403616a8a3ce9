"""Coverage-guided inputs to the doors: libFuzzer, through atheris, keeps what reaches new code and goes on from it.

    python tests/fuzz_guided.py DOOR RUNS CORPUS        e.g. gguf 100000 corpus/gguf

New inputs are made as the door makes them, or from kept ones by our changes or libFuzzer's. CORPUS is a folder with
what was kept, for the next run. What is neither opened nor refused as it should be, or takes a second, ends the run and
is written beside CORPUS.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import atheris
from fuzz_doors import DOORS
from fuzzing import MEMORY_BYTES, SECONDS, Random, changed, changed_json, door_open

OURS = ["ldrt_edge"]
"""Whose code counts as reached: a library's would drown it."""
_SEEDS, _LONGEST = 200, 1 << 17


class Found(Exception):
    """An input that was neither opened nor refused as it should be."""


def fuzz(name: str, runs: int, corpus: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    with atheris.instrument_imports(include=OURS, enable_loader_override=False):
        door = DOORS[name]()
        for number in range(_SEEDS):  # what is imported late is imported here
            data = door.make(Random(f"{name} {number}"))
            door_open(door.open, data)
            corpus.mkdir(parents=True, exist_ok=True)
            (corpus / f"seed-{number}").write_bytes(data)

    def one(data: bytes) -> None:
        before = sum(os.times()[:2])
        what = door_open(door.open, data)
        took = sum(os.times()[:2]) - before
        if what not in ("", "refused"):
            raise Found(what)
        if took > SECONDS:
            raise Found(f"took {took:.1f} s")

    def mutated(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        match rng.randrange(5):
            case 0:
                made = door.make(rng)
            case 1:
                made = changed(rng, data, 600)
            case 2 if data[:1] in (b"{", b"["):
                made = json_changed(rng, data)
            case _:
                made = atheris.Mutate(data, longest)
        return made[:longest]

    options = [f"-runs={runs}", f"-max_len={_LONGEST}", f"-malloc_limit_mb={MEMORY_BYTES >> 20}", "-rss_limit_mb=4096"]
    options += ["-timeout=60", "-print_final_stats=1", "-len_control=0", f"-artifact_prefix={corpus}-"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutated)
    atheris.Fuzz()


def json_changed(rng: random.Random, data: bytes) -> bytes:
    """One line of JSON otherwise, the others as they are."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        lines[at] = changed_json(rng, json.loads(lines[at]))
    except (ValueError, RecursionError):
        lines[at] = changed(rng, lines[at])
    return b"\n".join(lines)


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
