"""Stages that are killed: whole under their name, or not there; run again, the same.

Two hundred kills take some eight minutes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stages import STAGES, Line, check_whole, finished, forked, make_line, name_of, result

KILLS = 30  # of each of seven stages: 210


@pytest.fixture(scope="module")
def line(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Line:
    return make_line(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_in_the_same_when_it_is_run_again(line: Line, tmp_path: Path, stage: str) -> None:
    """Killed at moments spread over the whole stage; what the last kill left is there when the next run begins."""
    wanted = tmp_path / "wanted" / name_of(stage)
    out = tmp_path / "killed" / name_of(stage)
    wanted.parent.mkdir()
    out.parent.mkdir()
    started = time.monotonic()
    assert finished(forked(lambda: line.run(stage, wanted))) == 0
    took_s, chosen, kills, ends = time.monotonic() - started, random.Random(stage), 0, 0
    while kills < KILLS:
        child = forked(lambda: line.run(stage, out))
        time.sleep(chosen.uniform(0, took_s))
        os.kill(child, signal.SIGKILL)
        kills += finished(child) == -signal.SIGKILL
        check_whole(out)
        if kills % 8 == 0 or out.exists():
            assert finished(forked(lambda: line.run(stage, out))) == 0
            assert result(out) == result(wanted)
            ends += 1
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            assert [path.name for path in out.parent.iterdir()] == [], "what killed runs left is gone"
    assert ends > 3
