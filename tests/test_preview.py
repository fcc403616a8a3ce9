"""The picture on the terminal: what each protocol gets, and the half blocks where there is none."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ldrt_edge.chat.preview import ROWS, graphics, show

TILE = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def console(**options: object) -> Console:
    settings = {"file": io.StringIO(), "force_terminal": True, "color_system": "truecolor", "width": 80}
    return Console(**(settings | options))  # type: ignore[arg-type]


def shown(**options: object) -> str:
    made = console(**options)
    show(TILE, made)
    assert isinstance(made.file, io.StringIO)
    return made.file.getvalue()


@pytest.fixture(autouse=True)
def _no_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID", "TMUX", "STY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("known", [{"TERM": "xterm-kitty"}, {"KITTY_WINDOW_ID": "1"}, {"TERM_PROGRAM": "ghostty"}])
def test_kittys_protocol_carries_exactly_the_tile(known: dict[str, str]) -> None:
    drawn = graphics(TILE, known)
    assert drawn is not None
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", drawn)
    assert drawn == "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in commands), "and nothing else"
    assert commands[0][0] == f"a=T,f=100,q=2,r={ROWS},m=1" and commands[-1][0] == "m=0" and len(commands) > 1
    assert all(len(data) <= 4096 for _, data in commands)
    sent = base64.b64decode("".join(data for _, data in commands))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sent))), TILE)


@pytest.mark.parametrize("known", [{"TERM_PROGRAM": "iTerm.app"}, {"LC_TERMINAL": "iTerm2"}])
def test_iterms_protocol_carries_exactly_the_tile(known: dict[str, str]) -> None:
    drawn = graphics(TILE, known)
    assert drawn is not None
    (data,) = re.findall(rf"^\x1b\]1337;File=inline=1;height={ROWS};preserveAspectRatio=1:([^\a]*)\a$", drawn)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), TILE)


@pytest.mark.parametrize("known", [{}, {"TERM": "xterm-256color"}, {"TERM": "xterm-kitty", "TMUX": "/tmp/0"}])
def test_elsewhere_there_is_no_protocol(known: dict[str, str]) -> None:
    assert graphics(TILE, known) is None


def test_half_blocks_have_the_colours_of_the_tile() -> None:
    lines = shown().splitlines()
    assert len(lines) == ROWS
    small = np.asarray(Image.fromarray(TILE).resize((2 * ROWS, 2 * ROWS), Image.Resampling.BOX))
    for row, line in enumerate(lines):
        cells = re.findall(r"38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", line)
        expected = np.concatenate([small[2 * row], small[2 * row + 1]], axis=1)
        assert np.array_equal(np.array(cells, int), expected)


@pytest.mark.parametrize("without", [{"force_terminal": False}, {"color_system": None}, {"color_system": "standard"}])
def test_where_nothing_could_be_seen_nothing_is_drawn(without: dict[str, object]) -> None:
    assert shown(**without) == ""


def test_a_terminal_with_a_protocol_gets_it_and_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-kitty")
    drawn = shown()
    assert drawn.startswith("\x1b_G") and "▀" not in drawn
