"""What a model would feel like on this machine: one of real shape is drawn, timed and thrown away.

Nothing is downloaded. What cannot fit is refused before anything is written, with what would.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from ldrt_edge.bench.latency import Latency, measure
from ldrt_edge.bench.shapes import SHAPES, Type, draw
from ldrt_edge.doctor import models_on
from ldrt_edge.errors import ConfigError
from ldrt_edge.machine import Memory, memory


def feel(
    arch: str, type_: Type, runs: int = 3, threads: int | None = None, sweep: tuple[int, ...] = (),
    keep: Path | None = None,
) -> Latency:
    """Draw a model of the architecture `arch` in this type and time it; `keep` its folder, or delete it.

    Raises:
        ConfigError: an unknown architecture, or one that does not fit into this machine's memory.
        MissingExtraError: torch or transformers is not installed.
        ArtifactError: there is no room on the disk.
    """
    if arch not in SHAPES:
        raise ConfigError(f"--arch {arch}: choose from {', '.join(SHAPES)}")
    refuse(arch, type_, memory())
    with tempfile.TemporaryDirectory(prefix="ldrt-edge-") as folder:
        drawn = draw(SHAPES[arch], type_, keep or Path(folder) / f"{arch}-{type_}")
        return measure(drawn, None, runs=runs, threads=threads, sweep=sweep)


def refuse(arch: str, type_: Type, room: Memory) -> None:
    """Stop where a model would not fit into memory as it is now.

    Raises:
        ConfigError: it would not, with what would.
    """
    fits = models_on(room)
    wanted = next(fit for fit in fits if fit.model.lower() == arch and fit.type == type_)
    if wanted.memory_bytes <= room.available_bytes:
        return
    others = [f"{fit.model.lower()} in {fit.type}" for fit in fits if fit.fit == "fits" and fit.model.lower() in SHAPES]
    closed = "; with other programs closed it would fit" if wanted.fit == "tight" else ""
    raise ConfigError(
        f"{arch} in {type_} wants about {wanted.memory_bytes / 1e9:.1f} GB of memory, and "
        f"{room.available_bytes / 1e9:.1f} GB are free here{closed}. "
        + (f"What fits: {', '.join(others)}" if others else "None of the known models fits now")
    )
