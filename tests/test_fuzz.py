"""No input crashes a door, hangs it or fills the memory; what once did is kept in `regressions`, named DOOR-WHAT."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_doors import DOORS
from fuzzing import REGRESSIONS, Door, door_open, fuzz

SHARES = {
    "gguf": 250_000, "safetensors": 150_000, "manifest": 150_000, "statement": 100_000, "rows": 100_000,
    "bundle": 70_000, "pictures": 70_000, "golden": 50_000, "dicom": 38_000, "front": 20_000, "compressed": 2_000,
    "jats": 50_000, "overlay": 30_000,
}  # fmt: skip
"""More than a million in all; a picture costs a hundred times what a manifest does. Half an hour on one core."""

GUIDED = 15_000
"""Of each door; a compressed picture is decoded in a process of its own, so its door gets few."""


def test_every_door_has_its_share_of_a_million() -> None:
    assert SHARES.keys() == DOORS.keys() and sum(SHARES.values()) >= 1_000_000


@pytest.mark.parametrize("door", [name for name in DOORS if name != "compressed"])
def test_a_few_inputs_of_each_door(door: str) -> None:
    """Beyond those of the slow test, so that each run with another million of them finds what that one does not."""
    finds, refused = fuzz(door, SHARES[door], 150)
    assert finds == []
    assert refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_a_million_inputs(door: str) -> None:
    finds, _ = fuzz(door, 0, SHARES[door])
    assert finds == []


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_inputs_that_coverage_guides(door: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    runs = GUIDED // 30 if door == "compressed" else GUIDED
    command = [sys.executable, Path(__file__).with_name("fuzz_guided.py"), door, str(runs), tmp_path / door]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"new_units_added:\s+[1-9]", done.stderr), "nothing was found to go on from"


@pytest.fixture(scope="module")
def opened() -> dict[str, Door]:
    return {}


@pytest.mark.parametrize("path", sorted(REGRESSIONS.iterdir()), ids=lambda path: path.name)
def test_what_was_found_stays_mended(path: Path, opened: dict[str, Door]) -> None:
    name = path.name.partition("-")[0]
    door = opened.setdefault(name, DOORS[name]())
    assert door_open(door.open, path.read_bytes()) in ("", "refused")
