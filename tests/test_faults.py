"""Stages that are killed, or that find the disk full or closed to them: whole under their name, or not there.

Each stage of the line runs on a tiny model in a process forked from this one, which has imported everything, so that
a kill lands in the stage and not in an import. Two hundred kills take a quarter of an hour.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bundling import Made, make
from test_train import colour_dataset

from ldrt_edge import artifact
from ldrt_edge.bench.report import bench
from ldrt_edge.bundle.container import open_bundle
from ldrt_edge.bundle.pack import pack
from ldrt_edge.convert.gguf import convert
from ldrt_edge.convert.quantize import quantize
from ldrt_edge.errors import LdrtError
from ldrt_edge.train.base import resolve_base
from ldrt_edge.train.lora import train
from ldrt_edge.train.merge import merge
from ldrt_edge.train.recipe import load_recipe

KILLS = 34  # of each of six stages: 204
STAGES = ("train", "merge", "convert", "quantize", "bench", "bundle")
SMALL = (
    "lora.rank=2", "lora.alpha=4", "lora.dropout=0", "precision=fp32", "validation_images=0", "rows_per_step=4",
    "vision_tokens=null", "align.epochs=1", "instruct.epochs=1", "save_steps=1",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """What the stages read."""

    base: Path
    data: Path
    adapter: Path
    made: Made

    def run(self, stage: str, out: Path) -> None:
        """A stage into `out`."""
        torch.set_num_threads(1)
        merged = self.made.edge.with_name("merged")
        match stage:
            case "train":
                train(resolve_base(str(self.base)), [self.data], out, load_recipe("starter", SMALL))
            case "merge":
                merge(resolve_base(str(self.base)), self.adapter, out)
            case "convert":
                convert(merged, out, "f32")
            case "quantize":
                quantize(merged, out, "q8")
            case "bench":
                bench(self.made.edge, self.data, out, merged, runs=0, threads=1)
            case "bundle":
                pack(self.made.edge, self.made.report, out, max_loss=100)


@pytest.fixture(scope="module")
def line(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("faults")
    base = tiny("llava15", "smollm2")
    data = colour_dataset(folder / "colours", 12)
    adapter = train(resolve_base(str(base)), [data], folder / "adapter", load_recipe("starter", SMALL))
    return Line(base, data, adapter, make(base, folder))


def forked(work: Callable[[], None], told: Path = Path(os.devnull)) -> int:
    """Do `work` in a process of its own; its id. It exits with 0, or 3 after an error that a user would read.

    That error, or the traceback of another, goes into the file `told`.
    """
    child = os.fork()
    if child:
        return child
    status, reason = 9, ""
    try:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        work()
        status = 0
    except LdrtError as error:
        status, reason = 3 if "\n" not in str(error) else 4, str(error)
    except BaseException:
        reason = traceback.format_exc()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
        told.write_text(reason)
        os._exit(status)


def finished(child: int) -> int:
    """The exit status of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def name_of(stage: str) -> str:
    return "made.ldrt" if stage == "bundle" else "made"


def check_whole(out: Path) -> None:
    """What has its name is whole."""
    if out.is_file():
        open_bundle(out).check()
    elif out.exists():
        artifact.verify(out)


def result(out: Path) -> Any:
    """What must come out the same: all bytes, but for a report those of its times."""
    if out.is_file():
        return hashlib.sha256(out.read_bytes()).hexdigest()
    manifest = artifact.read(out)
    if manifest.kind == "report":
        report = json.loads((out / "report.json").read_text())
        samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        return report["vqa"], rounded(report["fidelity"]), rounded(samples)
    return [(entry.path, entry.sha256) for entry in manifest.files], manifest.metrics


def rounded(value: Any) -> Any:
    """JSON with its numbers to four digits: a bench that goes on adds up in another order."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


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


def limits(total: int) -> Iterator[int]:
    """Sizes at which a file may no longer grow: small ones, and some between nothing and all."""
    yield from (0, 1, 100, 4096)
    yield from (total * part // 7 for part in range(1, 7))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_leaves_nothing_under_the_name(line: Line, tmp_path: Path, stage: str) -> None:
    """A limit on the size of files fails at each write that passes it, as a full disk does, at ten sizes."""
    wanted = tmp_path / "wanted" / name_of(stage)
    wanted.parent.mkdir()
    assert finished(forked(lambda: line.run(stage, wanted))) == 0
    sizes = [path.stat().st_size for path in ([wanted] if wanted.is_file() else wanted.rglob("*")) if path.is_file()]
    refused = 0
    for number, limit in enumerate(limits(max(sizes))):
        out = tmp_path / f"n{number}" / name_of(stage)
        out.parent.mkdir()

        def limited(out: Path = out, limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            line.run(stage, out)

        told = tmp_path / "told"
        status = finished(forked(limited, told))
        assert status in (0, 3), f"{stage} at {limit} bytes: {told.read_text()}"
        refused += status == 3
        check_whole(out)
        assert out.exists() == (status == 0)
        assert finished(forked(lambda out=out: line.run(stage, out))) == 0
        assert result(out) == result(wanted)
    assert refused > 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_may_not_be_written_is_one_line(line: Line, tmp_path: Path, stage: str) -> None:
    """As a user without rights: root may write everywhere, so the process gives its rights up first."""
    if os.geteuid() != 0:
        pytest.skip("wants to become another user")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    shut = {tmp_path, *tmp_path.parents, *line.data.parents, *line.base.parents} - {Path("/tmp"), Path("/")}
    for path in {*shut, *line.data.parent.rglob("*"), *line.base.rglob("*")}:
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))

    told = tmp_path / "told"
    told.touch()
    told.chmod(0o666)

    def as_nobody() -> None:
        os.seteuid(65534)
        line.run(stage, closed / name_of(stage))

    assert finished(forked(as_nobody, told)) == 3, told.read_text()
    assert str(closed / name_of(stage)) in told.read_text() and "Permission denied" in told.read_text()
    assert list(closed.iterdir()) == []
