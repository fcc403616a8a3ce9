"""Pictures from the disk into a conversation on the terminal: who shows one is asked about text burned into it.

A name may stand there, so it is settled before the model sees anything: the picture is shown as it is, or with the text
under black boxes, or not at all. Where nobody can be asked, an option decides; without one the picture is shown, since
whoever named it in a script wants it shown, and a line says what was found.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ldrt_edge.burned_in import black_out, text_in
from ldrt_edge.chat.typed import choice
from ldrt_edge.console import say, stderr
from ldrt_edge.dicom import declares_text
from ldrt_edge.errors import DataError
from ldrt_edge.image import Picture, Window, read_file, read_frame

BurnedIn = Literal["show", "black", "refuse"]
_ANSWERS: dict[str, BurnedIn] = {"y": "show", "b": "black", "n": "refuse"}


def take_in(path: Path, window: Window | None = None, frame: int = 0, burned_in: BurnedIn | None = None) -> Picture:
    """Read a picture file; where text is burned into it, do what `burned_in` says, or ask on the terminal.

    Raises:
        DataError: it cannot be read, or has text and is left out.
    """
    data = read_file(path)
    look = read_frame(data, frame, str(path))
    picture, lines = look(window), text_in(look, window)
    if not lines and not (picture.origin.format == "DICOM" and declares_text(data)):
        return picture
    found = "text seems to be burned into it" if lines else "its header says that text is burned into it"
    wanted = burned_in or _asked(f"{found}, where a name may stand", bool(lines))
    if wanted == "show":
        return picture
    if wanted == "refuse":
        raise DataError(f"{path}: left out: {found}")
    if not lines:
        raise DataError(f"{path}: {found}, and none was found to black out: show another picture, or this as it is")
    covered = replace(picture.origin, blacked_out=len(lines))
    return replace(picture, rgb=black_out(picture.rgb, lines), origin=covered)


def _asked(found: str, can_black_out: bool) -> BurnedIn:
    if not (sys.stdin.isatty() and stderr.is_terminal):
        say(f"{found}: it is shown as it is; --burned-in black or refuse would not")
        return "show"
    black = "b: with black boxes over it, " if can_black_out else ""
    question = f"{found}.\nShow it to the model? y: as it is, {black}n: not at all"
    stderr.print(question, markup=False, soft_wrap=True)
    return _ANSWERS[choice("ybn" if can_black_out else "yn", default="n")]
