"""The command line as a stranger meets it: help, one-line errors, JSON, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ldrt_edge.cli import cli


def commands(group: click.Group = cli, prefix: str = "") -> Iterator[str]:
    """Every command that does something, as it is typed."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ldrt_edge.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert set(listed) >= {command.split()[0] for command in commands()}


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_has_help_and_speaks_json(command: str) -> None:
    done = CliRunner().invoke(cli, [*command.split(), "--help"])
    assert done.exit_code == 0
    assert "--json" in done.output


def test_the_readme_names_every_command() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for command in commands():
        if not command.startswith("bundle "):  # whose line names them by their last word
            assert f"ldrt-edge {command}" in readme or f"make {command}" in readme


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--base", "no/such/base", "--data", "x", "--out", "y"], "no/such/base"),
        (["train", "--base", "starter", "--data", "x", "--out", "y", "--recipe", "nope"], "no recipe 'nope'"),
        (["merge", "--base", "nowhere", "--adapter", "a", "--out", "b"], "nowhere"),
        (["quantize", "nowhere"], "--q4, --q8 or --type"),
        (["quantize", "nowhere", "--q4"], "nowhere"),
        (["quantize", "nowhere", "--q4", "--type", "Q8_0"], "--q4, --q8 or --type"),
        (["quantize", "nowhere", "--q4", "--q8"], "--q4, --q8 or --type"),
        (["convert", "nowhere", "--for", "ollama", "--type", "f32"], "--type f32 does not go with --for ollama"),
        (["convert", "nowhere"], "nowhere"),
        (["bench", "nowhere", "--data", "d"], "nowhere"),
        (["bench", "compare", "nowhere"], "which reports?"),
        (["bench", "compare", "nowhere", "here"], "nowhere"),
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


@pytest.mark.parametrize(
    "arguments", ["train --base starter --data x --out y", "merge --base b --adapter a --out c", "starter x", "demo x"]
)
def test_a_missing_extra_is_one_sentence_with_the_command(arguments: str, tmp_path: Path) -> None:
    """Block torch as if it were not installed."""
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    done = run(*arguments.split(), PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
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
