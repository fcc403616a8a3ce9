"""A small view of a picture on the terminal: by its graphics protocol where it has one, else in coloured half blocks.

What is shown is what the model sees, its first tile. Which protocol a terminal has is known from its environment; it is
never asked, since one that does not understand would print the question.

Source: https://sw.kovidgoyal.net/kitty/graphics-protocol/, https://iterm2.com/documentation-images.html.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.segment import Segment
from rich.style import Style

from ldrt_edge.chat.pictures import png

ROWS = 16
"""Of the terminal's lines; a character is about twice as high as wide."""
_CHUNK = 4096  # of base64 in one of kitty's commands
_KITTY, _ITERM = ("kitty", "ghostty", "WezTerm"), ("iTerm", "WezTerm", "mintty")
_COLOURS = ("256", "truecolor", "windows")


def show(tile: NDArray[np.uint8], console: Console) -> None:
    """Draw a tile, (size, size, 3) uint8 RGB, if the console is a terminal with colours enough for it."""
    if not console.is_terminal or console.color_system not in _COLOURS:
        return
    if drawn := graphics(tile, os.environ):
        console.file.write(drawn + "\n")
        console.file.flush()
        return
    console.print(_HalfBlocks(tile), end="")


def graphics(tile: NDArray[np.uint8], environment: Mapping[str, str]) -> str | None:
    """What draws a tile on the terminal of this environment; None where it has no protocol that we know."""
    if environment.get("TMUX") or environment.get("STY"):
        return None  # tmux and screen do not let it through
    names = " ".join(environment.get(name, "") for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL"))
    data = base64.b64encode(png(tile)).decode()
    if "KITTY_WINDOW_ID" in environment or any(name in names for name in _KITTY):
        parts = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
        first = f"a=T,f=100,q=2,r={ROWS},"
        return "".join(
            f"\x1b_G{'' if i else first}m={int(i < len(parts) - 1)};{part}\x1b\\" for i, part in enumerate(parts)
        )
    if any(name in names for name in _ITERM):
        return f"\x1b]1337;File=inline=1;height={ROWS};preserveAspectRatio=1:{data}\a"
    return None


class _HalfBlocks:
    """A tile as lines of ▀: the upper half in the letter's colour, the lower one in the ground's."""

    def __init__(self, tile: NDArray[np.uint8]) -> None:
        self._pixels = np.asarray(Image.fromarray(tile).resize((2 * ROWS, 2 * ROWS), Image.Resampling.BOX))

    def __rich_console__(self, *_: object) -> list[Segment]:
        made = []
        for upper, lower in zip(self._pixels[::2], self._pixels[1::2], strict=True):
            for over, under in zip(upper, lower, strict=True):
                made.append(Segment("▀", Style(color=Color.from_rgb(*over), bgcolor=Color.from_rgb(*under))))
            made.append(Segment.line())
        return made
