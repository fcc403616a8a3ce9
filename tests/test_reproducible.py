"""The same base, data, settings, seed and versions: the same bundle, byte by byte, but for when and how long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bundling import Made, make
from test_train import colour_dataset

from ldrt_edge import artifact
from ldrt_edge.bench.report import bench
from ldrt_edge.bundle.container import open_bundle
from ldrt_edge.bundle.pack import pack
from ldrt_edge.errors import ConfigError

Tiny = Callable[..., Path]
LINE = ("adapter", "merged", "gguf", "report")
PROGRAM = Path(__file__).with_name("whole_line.py")


def members(bundle: Path) -> dict[str, bytes]:
    with tarfile.open(bundle, "r:") as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def test_the_line_twice_gives_one_digest(tiny: Tiny, tmp_path: Path) -> None:
    """In two processes, whose sets and dictionaries are in another order, at two times of which neither is told."""
    data = colour_dataset(tmp_path / "colours", images=26)
    bundles = []
    for seed in ("1", "2"):
        command = [sys.executable, PROGRAM, tiny("llava15", "smollm2"), data, tmp_path / seed]
        told = {"PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=os.environ | told, capture_output=True, text=True, timeout=560)
        assert done.returncode == 0, done.stderr[-3000:]
        bundles.append(Path(done.stdout.splitlines()[-1]))
    for name in LINE:
        one, two = (artifact.verify(bundle.with_name(name)) for bundle in bundles)
        assert one.files == two.files
        assert one.sha256 == two.sha256, name
    assert bundles[0].read_bytes() == bundles[1].read_bytes()
    report = json.loads((bundles[0].with_name("report") / "report.json").read_text())
    assert report["environment"]["created"] == "2023-11-14T22:13:20Z"
    assert (bundles[0].with_name("adapter") / artifact.TIMES).is_file(), "how long it took is told, beside"


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("reproducible"))


def test_what_is_timed_differs_where_times_are_told_and_nowhere_else(made: Made, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        merged, data = made.edge.with_name("merged"), made.edge.with_name("data")
        report = bench(made.edge, data, tmp_path / name / "report", merged, runs=1, threads=1)
        found.append(members(pack(made.edge, report, tmp_path / name / "knee.ldrt", max_loss=100)))
        time.sleep(1)  # its date is told in seconds
    one, two = found
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} == {
        "bundle.json", "report/manifest.json", "report/report.html", "report/report.json",
    }  # fmt: skip
    first, second = (json.loads(files["report/report.json"]) for files in found)
    for report in (first, second):
        del report["latency"], report["environment"]["created"], report["environment"]["load_average"]
        for rung in report["ladder"]:
            del rung["latency"]
    assert first == second
    assert open_bundle(tmp_path / "one" / "knee.ldrt").digest != open_bundle(tmp_path / "two" / "knee.ldrt").digest


@pytest.mark.parametrize("told", ["", "yesterday", "-1", "1.5", "٣", "9" * 20])
def test_a_date_that_is_none_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", told)
    with pytest.raises(ConfigError, match=r"SOURCE_DATE_EPOCH=.*wants seconds since 1970"):
        bench(made.edge, made.edge.with_name("data"), tmp_path / "report", runs=0, threads=1)
    assert not (tmp_path / "report").exists()
