"""What a person sees while a stage runs: log lines and progress with time left, on stderr, never on stdout.

Quiet when stderr is not a terminal: there a long stage prints one line every 15 seconds instead of a moving bar.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
stderr = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
"""Of several training processes (torchrun numbers them), the first one speaks."""
_LINE_EVERY_S = 15.0


def say(message: str) -> None:
    """Print one line for the person who watches."""
    stderr.print(message, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as people say them: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Bar:
    """A running progress display; `advance` it as work is done."""

    def __init__(self, label: str, total: float, progress: Progress | None) -> None:
        self._label, self._total, self._progress = label, total, progress
        self._task = progress.add_task(label, total=total) if progress else None
        self._started = self._last = time.monotonic()
        self._done = 0.0

    def advance(self, step: float = 1.0, note: str = "") -> None:
        """Count `step` more units as done and show `note` behind the label."""
        self._done += step
        label = f"{self._label} {note}".rstrip()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=step, description=label)
            return
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_S:
            self._last = now
            left_s = (now - self._started) / max(self._done, 1e-9) * max(self._total - self._done, 0)
            say(f"{label}: {self._done:.0f} of {self._total:.0f}, {left_s:.0f} s left")


@contextmanager
def bar(label: str, total: float) -> Iterator[Bar]:
    """Show progress towards `total` units, with time left, while the block runs."""
    if not sys.stderr.isatty():
        yield Bar(label, total, None)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        yield Bar(label, total, progress)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, showing progress with time left."""
    count = total if total is not None else len(items) if isinstance(items, Sized) else 0
    with bar(label, count) as shown:
        for item in items:
            yield item
            shown.advance()
