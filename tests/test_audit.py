"""The audit log: whole after any number of answers, and broken by any edit."""

from __future__ import annotations

import getpass
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ldrt_edge.chat.audit import START, AuditLog, verify
from ldrt_edge.errors import DataError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.log"
    for first in (0, 2):  # written in two sessions
        opened = AuditLog(path)
        for i in range(first, first + 2):
            opened.record("m" * 64, [f"{i:064}"], f"question {i} about Jane Doe", f"answer {i}")
        opened.close()
    return path


def test_a_log_holds_together_and_holds_no_text(log: Path) -> None:
    chain = verify(log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert chain.lines == 4 and chain.head == lines[-1]["sha256"] and lines[0]["previous"] == START
    assert verify(log, chain.head) == chain
    assert "Jane" not in log.read_text() and "answer 1" not in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


def _forged(lines: list[bytes]) -> bytes:
    return lines[1].replace(b'"number":2', b'"number":1')


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda lines: [lines[0].replace(b"mmm", b"nnn", 1), *lines[1:]], "line 1 was changed"),
        (lambda lines: [lines[0], *lines[2:]], "before line 2"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "before line 2"),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], "before line 3"),
        (lambda lines: lines[1:], "before line 1"),
        (lambda lines: [_forged(lines), *lines[1:]], "line 1 was changed"),
        (lambda lines: [*lines[:3], lines[3][:-1]], "line 4 is not a line"),
        (lambda lines: [*lines[:3], lines[3][:40]], "line 4 is not a line"),
        (lambda lines: [lines[0].replace(b'"who"', b'"who" '), *lines[1:]], "line 1 is not a line"),
        (lambda lines: [b"[]\n", *lines[1:]], "line 1 is not a line"),
    ],
)
def test_any_edit_is_found_and_stops_the_writing(log: Path, edit, said: str) -> None:  # type: ignore[no-untyped-def]
    log.write_bytes(b"".join(edit(log.read_bytes().splitlines(keepends=True))))
    with pytest.raises(DataError, match=said):
        verify(log)
    with pytest.raises(DataError, match=said):
        AuditLog(log)


def test_every_single_byte_counts(log: Path) -> None:
    data = log.read_bytes()
    for place in range(0, len(data), 7):
        log.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(DataError):
            verify(log)


def test_lines_cut_off_at_the_end_are_found_with_the_last_hash(log: Path) -> None:
    head = verify(log).head
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert verify(log).lines == 3
    with pytest.raises(DataError, match="not with"):
        verify(log, head)


def test_two_processes_never_write_one_log(log: Path) -> None:
    opened = AuditLog(log)
    with pytest.raises(DataError, match="another process"):
        AuditLog(log)
    opened.close()


@pytest.mark.parametrize("room", [0, 40])
def test_a_full_disk_is_said_and_leaves_the_log_whole(log: Path, room: int) -> None:
    """A limit on the size of files stands for it; with some room, a part of the line is written."""
    opened, content = AuditLog(log), log.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + room, before[1]))
    try:
        with pytest.raises(DataError, match="not in it"):
            opened.record("m", [], "?", "!")
        assert log.read_bytes() == content, "no half line stays"
        with pytest.raises(DataError, match="not in it"):
            opened.record("m", [], "?", "!")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    opened.record("m", [], "?", "!")
    opened.close()
    assert verify(log) == opened.chain and opened.chain.lines == 5
    AuditLog(log).close()


def test_what_cannot_be_cut_off_at_once_is_before_the_next_line(log: Path) -> None:
    opened, room = AuditLog(log), log.stat().st_size + 40
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writable = opened._stream

    class Gone:
        """A disk that goes in the middle of a line: what is written stays, and nothing else can be done."""

        write, fileno = writable.write, writable.fileno

        def truncate(self, _: int) -> None:
            raise OSError(5, "Input/output error")

    opened._stream = Gone()  # type: ignore[assignment]
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(DataError, match="not in it"):
            opened.record("m", [], "?", "!")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.stat().st_size == room
    with pytest.raises(DataError, match="Input/output error"):
        opened.record("m", [], "?", "!")
    opened._stream = writable
    opened.record("m", [], "?", "!")
    opened.close()
    assert verify(log).lines == 5


def test_a_user_without_a_name_is_a_number(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that was started with a number: getpass finds no name, and raises."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    opened = AuditLog(log)
    opened.record("m", [], "?", "!")
    opened.close()
    assert verify(log).lines == 5 and json.loads(log.read_text().splitlines()[-1])["who"] == "987654"


def test_the_command(log: Path) -> None:
    command = [sys.executable, "-m", "ldrt_edge.cli", "audit", "verify", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[:4] == ["4", "lines", "hold", "together"] and verify(log).head in done.stdout
    log.write_bytes(log.read_bytes()[:-1])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "line 4" in done.stderr and "Traceback" not in done.stderr
