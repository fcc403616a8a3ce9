"""The parts of a bench run, in their order: which model is asked, probed or timed next, and how much time is left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ldrt_edge import console

_FOUND_DONE_S = 1.0  # a part of less was found in its journal and tells nothing of the pace


@dataclass(frozen=True)
class Part:
    """One part: `pictures` are shown in it, which is what the time left goes by."""

    what: Literal["asking", "probing", "timing"]
    model: str
    pictures: int


def parts(exports: Mapping[str, bool], pictures: int, probes: int, runs: int) -> list[Part]:
    """The parts of a run: all models are asked, then probed, and the exports are timed.

    exports: of each model by name, "subject" and perhaps "reference" among them, whether it is an export.
    pictures, probes, runs: how many are asked about, probed with, and timed with; 0 leaves the part out.
    """
    timed = [name for name, export in exports.items() if export or name == "subject"]
    held = [name for name in timed if "reference" in exports]  # the reference is asked beside these
    shown = 3  # the right picture and two wrong ones
    asking = [Part("asking", name, pictures * (shown + (name in held))) for name in exports if name != "reference"]
    probing = [Part("probing", name, min(probes, pictures) * shown) for name in exports if probes]
    return asking + probing + [Part("timing", name, runs) for name in timed if runs]


def follow(run: Sequence[Part], names: Mapping[str, str]) -> Iterator[Part]:
    """Each part in turn; behind it, one line says how far the run is and how much time is left.

    names: what to call each model.
    """
    left, seconds, shown = sum(part.pictures for part in run), 0.0, 0
    for number, part in enumerate(run, 1):
        started = time.monotonic()
        yield part
        took, left = time.monotonic() - started, left - part.pictures
        if took > _FOUND_DONE_S:
            seconds, shown = seconds + took, shown + part.pictures
        if number < len(run):
            ahead = f", about {console.duration(seconds / shown * left)} left" if shown else ""
            console.say(f"{number} of {len(run)} parts done, {part.what} {names[part.model]}{ahead}")
