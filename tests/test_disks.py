"""Stages whose disk is full, read-only or closed to them: one line, nothing under the name, and it goes on later."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from articles import figure, folder, jats, picture, tarred, zipped
from stages import STAGES, Line, check_whole, finished, forked, make_line, name_of, result

from ldrt_edge.convert.type_plan import TypePlan, read_type_plan, write_type_plan
from ldrt_edge.train.data.curate import curate
from ldrt_edge.train.data.pairs import Pairs
from ldrt_edge.train.data.pictures import png_bytes


@pytest.fixture(scope="module")
def line(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Line:
    return make_line(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("faults"))


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


@pytest.mark.parametrize("limit", [0, 40])
def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path: Path, limit: int) -> None:
    out, told = tmp_path / "out" / "plan.yaml", tmp_path / "told"
    out.parent.mkdir()
    plan = TypePlan("gguf", {"model": {"*": "Q8_0"}, "mmproj": {"*": "F16"}})

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        write_type_plan(plan, out)

    assert finished(forked(limited, told)) == 3, told.read_text()
    assert str(out) in told.read_text() and list(out.parent.iterdir()) == []
    write_type_plan(plan, out)
    assert list(out.parent.iterdir()) == [out] and read_type_plan(out, "gguf") == plan


class Disk:
    """A tmpfs that gets full, runs out of inodes or becomes read-only, at a moment of a stage's writing.

    Source: mount(2), tmpfs(5).
    """

    REMOUNT, READ_ONLY, DETACH = 32, 1, 2
    ROOM = "size=256m,nr_inodes=4096"

    def __init__(self, folder: Path) -> None:
        self._folder, self._libc = folder, ctypes.CDLL(None, use_errno=True)
        folder.mkdir()
        self._mount(0, self.ROOM)

    def _mount(self, flags: int, options: str) -> None:
        if self._libc.mount(b"tmpfs", os.fsencode(self._folder), b"tmpfs", flags, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")

    def used_bytes(self) -> int:
        room = os.statvfs(self._folder)
        return (room.f_blocks - room.f_bfree) * room.f_frsize

    def spoil(self, how: str) -> bool:
        """Whether it could be: not while more is being written, nor read-only while a file is open."""
        room, flags = os.statvfs(self._folder), self.REMOUNT
        options = {"full": f"size={max(self.used_bytes(), 4096)}", "inodes": f"nr_inodes={room.f_files - room.f_ffree}"}
        try:
            self._mount(flags | (self.READ_ONLY if how == "read-only" else 0), options.get(how, ""))
        except OSError:
            return False
        return True

    def mend(self) -> None:
        self._mount(self.REMOUNT, self.ROOM)

    def close(self) -> None:
        self._libc.umount2(os.fsencode(self._folder), self.DETACH)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        made = Disk(tmp_path / "disk")
    except OSError as error:
        pytest.skip(f"this user may not mount a disk ({error.strerror})")
    yield made
    made.close()


MOMENTS = 8
REASONS = {"full": ("disk full", "GB free"), "inodes": ("disk full",), "read-only": ("Read-only file system",)}


@pytest.mark.slow
@pytest.mark.parametrize("how", REASONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fails_while_it_is_written_costs_one_line(
    line: Line, tmp_path: Path, disk: Disk, stage: str, how: str
) -> None:
    """At moments spread over what the stage writes; mended, the same command ends in the same."""
    out, told = tmp_path / "disk" / name_of(stage), tmp_path / "told"

    def run(above: float, until: Callable[[], bool] = lambda: False) -> tuple[int, int]:
        """Its exit status, and the most bytes that it held; `until` is called, until it is true, above so many."""
        done = above <= 0 and until()
        child, most = forked(lambda: line.run(stage, out), told), 0
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            most = max(most, disk.used_bytes())
            done = done or (most >= above and until())
            time.sleep(0.0005)
        return os.waitstatus_to_exitcode(ended[1]), most

    status, most = run(1e18)
    assert status == 0
    wanted, refused = result(out), 0
    for moment in range(MOMENTS):
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        status, _ = run(most * moment / MOMENTS, lambda: disk.spoil(how))
        assert status in (0, 3), f"{moment}: {told.read_text()}"
        if status == 3:
            assert any(reason in told.read_text() for reason in REASONS[how]), told.read_text()
        refused += status == 3
        check_whole(out)
        assert out.exists() == (status == 0)
        disk.mend()
        assert run(1e18)[0] == 0, told.read_text()
        assert result(out) == wanted
        assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert refused


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


@pytest.mark.parametrize("how", ["folder", "zip", "tar.gz"])
def test_a_full_disk_costs_no_article(tmp_path: Path, how: str) -> None:
    """A picture that cannot be stored, or unpacked, is not dropped: the same command has it when there is room."""
    files: dict[str, bytes] = {}
    for number in range(20):
        caption = f"Dose distribution of plan {number} over the heel of patient {number * 7}, series {number + 90}"
        files[f"{number:02d}/a.xml"] = jats(f"10.1/{number}", figure(1, caption))
        files[f"{number:02d}/x-g001.png"] = picture(number)
    for number in (18, 19):
        noise = np.random.default_rng(number).integers(0, 256, (400, 600, 3), np.uint8)
        files[f"{number}/x-g001.png"] = png_bytes(noise)
    source = {"folder": folder, "zip": zipped, "tar.gz": tarred}[how](tmp_path / f"in.{how}", files)
    out, told = tmp_path / "out", tmp_path / "told"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        curate([source], out)

    assert finished(forked(limited, told)) == 3, told.read_text()
    assert "File too large while it was read" in told.read_text() and not out.exists()
    assert finished(forked(lambda: curate([source], out) and None, told)) == 0, told.read_text()
    assert len([*Pairs(out)]) == 20 and (out / "dropped.jsonl").read_text() == ""
