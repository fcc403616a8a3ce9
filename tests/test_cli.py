"""The command line as a stranger meets it: help, one-line errors, JSON, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMANDS = [
    "starter", "data", "train", "merge", "convert", "quantize", "bench", "compare", "chat", "doctor", "demo",
]  # fmt: skip


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ldrt_edge.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


def test_help_names_every_command_and_every_command_has_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert sorted(name for name in listed if name in COMMANDS) == sorted(COMMANDS)


@pytest.mark.parametrize(
    "command", [*COMMANDS, "data phantom", "data import", "data volumes", "data curate", "data instruct"]
)
def test_help(command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout or command == "data"  # a group has commands, not results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--base", "no/such/base", "--data", "x", "--out", "y"], "no/such/base"),
        (["train", "--base", "starter", "--data", "x", "--out", "y", "--recipe", "nope"], "no recipe 'nope'"),
        (["merge", "--base", "nowhere", "--adapter", "a", "--out", "b"], "nowhere"),
        (["quantize", "nowhere"], "--q4, --q8 or --type"),
        (["quantize", "nowhere", "--q4"], "nowhere"),
        (["convert", "nowhere"], "nowhere"),
        (["bench", "nowhere", "--data", "d"], "nowhere"),
        (["compare", "nowhere"], "which reports?"),
        (["compare", "nowhere", "here"], "nowhere"),
        (["chat", "nowhere", "--ask", "hello"], "nowhere"),
        (["chat", "nowhere", "--ask", "hello", "--window", "40"], "--window 40"),
        (["chat", "nowhere", "--ask", "hello", "--web"], "--web opens a page"),
        (["serve", "nowhere", "--audit", "log"], "nowhere"),
        (["audit", "verify", "nowhere"], "nowhere"),
        (["data", "import", "vqa-rad", "nowhere", "out"], "nowhere"),
        (["data", "curate", "nowhere", "--out", "out"], "nowhere"),
        (["data", "instruct", "nowhere", "--out", "out"], "nowhere"),
        (["data", "export", "nowhere", "out", "--to", "hf"], "nowhere"),
        (["data", "stats", "nowhere"], "nowhere"),
        (["data", "view", "nowhere", "--strikes", "s"], "nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_1(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ldrt_edge.cli", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert lines[-1].startswith("ldrt-edge: ") and message in lines[-1]
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_one_sentence_with_the_command(tmp_path: Path) -> None:
    """Block torch as if it were not installed."""
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    done = run("train", "--base", "starter", "--data", "x", "--out", "y", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "pip install 'ldrt-edge[train]'" in done.stderr and "Traceback" not in done.stderr


def test_json_is_one_object(tmp_path: Path) -> None:
    done = run("data", "phantom", tmp_path / "data", "--images", "6", "--seed", "1", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["kind"] == "dataset" and summary["path"] == str(tmp_path / "data")
    assert run("data", "phantom", tmp_path / "data", "--images", "6", "--seed", "1").stdout == f"{tmp_path / 'data'}\n"


def test_ctrl_c_says_how_to_go_on_and_leaves_no_artefact(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ldrt_edge.cli", "data", "phantom", str(tmp_path / "data"), "--images", "5000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".data.partial" / "images").is_dir() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert "same command again" in err and "Traceback" not in err
    assert not (tmp_path / "data").exists()
