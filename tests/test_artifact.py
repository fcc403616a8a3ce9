"""Artefact folders: whole under their name, or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ldrt_edge import artifact
from ldrt_edge.chat import audit
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import ArtifactError, LdrtError
from ldrt_edge.front_config import read_json
from ldrt_edge.tensor_file import read_header
from ldrt_edge.train.data.imports import import_llava


def write(out: Path, text: str = "hello", config: dict[str, object] | None = None) -> artifact.Manifest:
    with artifact.create(out, "report", config or {"a": 1}, seed=3) as draft:
        if not draft.complete:
            (draft.path / "file.txt").write_text(text)
            draft.metrics["length"] = len(text)
    return artifact.read(out)


def test_a_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    manifest = write(tmp_path / "out")
    assert [entry.path for entry in manifest.files] == ["file.txt"]
    assert manifest.files[0].sha256 == artifact.file_sha256(tmp_path / "out" / "file.txt")
    assert manifest.metrics == {"length": 5} and manifest.seed == 3 and manifest.kind == "report"
    assert manifest.libraries["numpy"] and not (tmp_path / ".out.partial").exists()
    artifact.verify(tmp_path / "out", "report")


def test_the_same_stage_again_does_nothing_and_another_one_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "out")
    assert write(tmp_path / "out", text="other").sha256 == first.sha256
    with pytest.raises(ArtifactError, match="other settings"):
        write(tmp_path / "out", config={"a": 2})


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not an artefact"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_failing_stage_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError), artifact.create(tmp_path / "out", "report", {}) as draft:
        (draft.path / "half").write_text("half")
        raise ValueError
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out")
    assert [f.path for f in artifact.read(tmp_path / "out").files] == ["file.txt"]


@pytest.mark.parametrize("resumable", [True, False])
def test_kill_9_then_the_same_command(tmp_path: Path, resumable: bool) -> None:
    script = f"""
from pathlib import Path
from ldrt_edge import artifact
with artifact.create(Path({str(tmp_path)!r}) / "out", "report", {{}}, resumable={resumable}) as draft:
    count = len(list(draft.path.glob("part-*")))
    (draft.path / f"part-{{count}}").write_text("x")
    (draft.path / f".tmp{{count}}").write_text("what a library had not renamed yet")
    if count == 0:
        print("ready", flush=True)
        time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    if resumable:
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
        assert [f.path for f in artifact.read(tmp_path / "out").files] == ["part-0", "part-1"]
    else:
        again = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert again.stdout is not None and again.stdout.readline() == b"ready\n"  # began from nothing
        again.kill()
        again.wait()


@pytest.mark.parametrize("change", ["flip", "truncate", "remove", "escape"])
def test_changed_files_are_refused(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    write(out)
    path = out / "file.txt"
    if change == "flip":
        path.write_text("hellO")
    elif change == "truncate":
        path.write_text("hell")
    elif change == "remove":
        path.unlink()
    else:
        (tmp_path / "secret").write_text("hello")
        data = json.loads((out / "manifest.json").read_text())
        data["files"][0]["path"] = "../secret"
        (out / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError):
        artifact.verify(out)


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        artifact.read(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="not a finished artefact"):
        artifact.read(tmp_path)
    write(tmp_path / "out")
    with pytest.raises(ArtifactError, match="holds a report artefact, wanted: gguf"):
        artifact.read(tmp_path / "out", "gguf")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="not a manifest"):
        artifact.read(tmp_path / "out")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _plainly(path: Path) -> None:
    path.write_bytes(b"0" * (1 << 20))


def _by_safetensors(path: Path) -> None:
    save_file({"weight": np.zeros(1 << 20, np.uint8)}, path)


def _by_torch(path: Path) -> None:
    torch.save(torch.zeros(1 << 20, dtype=torch.uint8), path)


def _by_mlx(path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    mx.save_safetensors(f"{path}.safetensors", {"weight": mx.zeros(1 << 20, mx.uint8)})


@pytest.mark.parametrize("fill", [_plainly, _by_safetensors, _by_torch, _by_mlx])
def test_a_full_disk_is_one_line_and_leaves_nothing(disk: Path, fill: Callable[[Path], None]) -> None:
    with pytest.raises(ArtifactError, match="disk full"), artifact.create(disk / "out", "report", {}) as draft:
        fill(draft.path / "big")
    assert list(disk.iterdir()) == []


def test_a_full_disk_costs_a_resumable_stage_nothing_that_it_had(disk: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="disk full"),
        artifact.create(disk / "out", "adapter", {}, resumable=True) as draft,
    ):
        (draft.path / "checkpoint").write_text("an hour's work")
        _plainly(draft.path / "big")
    (disk / ".out.partial" / "big").unlink()
    with artifact.create(disk / "out", "adapter", {}, resumable=True) as draft:
        assert (draft.path / "checkpoint").read_text() == "an hour's work"


def test_a_place_that_cannot_be_written_is_one_line(disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    (tmp_path / "file").write_text("")
    for out in (disk / "out", tmp_path / "file" / "out", tmp_path / ("long" * 100)):
        with pytest.raises(ArtifactError, match=r"cannot write .*choose another") as refusal, artifact.create(
            out, "report", {}
        ):
            pass
        assert "\n" not in str(refusal.value)


def test_an_error_elsewhere_is_no_matter_of_the_artefact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError), artifact.create(tmp_path / "out", "report", {}):
        (tmp_path / "file" / "input").read_bytes()


def test_two_processes_do_not_write_the_same_artefact(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from ldrt_edge import artifact\n"
        "with artifact.create(Path(sys.argv[1]), 'report', {}, resumable=True) as draft:\n"
        "    (draft.path / 'file.txt').write_text('first'); print('writing', flush=True); time.sleep(60)\n"
    )
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout and first.stdout.readline() == "writing\n"
        for config in ({}, {"other": 1}):
            with (
                pytest.raises(ArtifactError, match="another process is writing it now"),
                artifact.create(out, "report", config, resumable=True),
            ):
                pass
        first.kill()
    with artifact.create(out, "report", {}, resumable=True) as draft:
        assert (draft.path / "file.txt").read_text() == "first", "what a killed run left is taken up"


DEEP = b"[" * 200_000
"""Deeper than Python's JSON reader goes."""


def _deep_row(path: Path) -> None:
    with artifact.create(path.parent / "data", "dataset", {}) as draft:
        (draft.path / "rows.jsonl").write_bytes(DEEP + b"\n")
    Dataset(path.parent / "data").rows("train")


def _deep_header(path: Path) -> None:
    path.write_bytes(len(DEEP).to_bytes(8, "little") + DEEP)
    read_header(path)


DOORS: dict[str, Callable[[Path], object]] = {
    "manifest.json": lambda path: artifact.read(path.parent),
    "config.json": read_json,
    "model.safetensors": _deep_header,
    "rows.jsonl": _deep_row,
    "llava.json": lambda path: import_llava(path.parent, path.parent / "out"),
    "audit.jsonl": audit.verify,
}


@pytest.mark.parametrize("name", DOORS)
def test_json_nested_absurdly_deep_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(DEEP)
    with pytest.raises(LdrtError) as refusal:
        DOORS[name](path)
    assert "\n" not in str(refusal.value)
