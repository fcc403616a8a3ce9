"""The steps of a long measurement: each done once, in a process of its own, and what it took.

A step's result is written to a journal with all that it depends on; a run that was killed, or one that asks for more,
finds it there. A fresh process shows a step's own peak of memory, which a process that did others before cannot.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import psutil

from ldrt_edge.artifact import Json
from ldrt_edge.bench.latency import peak_rss_bytes
from ldrt_edge.errors import ArtifactError, DataError

_JOURNAL_LIMIT_BYTES = 1 << 30

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What a step took in a process of its own; its children's memory counts where it is more.

    peak_bytes: of resident memory. idle_bytes: what was held before the work began, Python and its libraries.
    """

    seconds: float
    peak_bytes: int
    idle_bytes: int

    def scaled(self, factor: float) -> Cost:
        """What it would take for a model `factor` times as large, as both grow with it, but for the idle memory."""
        peak = self.idle_bytes + (self.peak_bytes - self.idle_bytes) * factor
        return replace(self, seconds=self.seconds * factor, peak_bytes=round(peak))


class Journal:
    """A file with a JSON line for each step that was done: what it depends on, and what it gave.

    Raises:
        DataError: the file is not such a journal.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._done: dict[str, Json] = {}
        if not path.is_file():
            return
        if path.stat().st_size > _JOURNAL_LIMIT_BYTES:
            raise DataError(f"{path}: larger than {_JOURNAL_LIMIT_BYTES >> 20} MiB, refused")
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]  # a killed run may have left half a line
        try:
            for line in whole.splitlines():
                entry = json.loads(line)
                self._done[digest(entry["key"])] = entry["gave"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: no journal of steps ({error!r}): remove it to measure again") from error
        os.truncate(path, len(whole))

    def once(self, key: Mapping[str, Json], work: Callable[[], Json], kept: Path | None = None) -> Json:
        """What `work` gave for this key, now or before. kept: what it wrote; where that is gone, it works again.

        May be called from several threads, for different keys.
        """
        name = digest(key)
        if name not in self._done or (kept is not None and not kept.exists()):
            gave = work()
            with self._lock, self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": key, "gave": gave}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
                self._done[name] = gave
        return self._done[name]


def made(folder: Path) -> Path:
    """Make the folder of a measurement, if it is not there.

    Raises:
        DataError: something else goes by that name, or by one on the way to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{folder}: no folder can be made there, a file is in its place") from error
    return folder


def digest(key: Mapping[str, Json]) -> str:
    """A short name for what a step depends on."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def apart(packages: Sequence[str], function: Callable[..., T], *arguments: Any) -> tuple[T, Cost]:
    """Call a function in a fresh process, in which `packages` are loaded before its cost is counted.

    The process ends when this one does, however that ends.

    Raises:
        ArtifactError: the process was killed.
    """
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent) as pool:
            return pool.submit(_costed, tuple(packages), function, arguments).result()
    except BrokenProcessPool as error:
        raise ArtifactError("a step was killed, perhaps for lack of memory: a second run goes on") from error


def _end_with_parent() -> None:
    """Once the parent is gone, end this process too, wherever it is: a pool's worker would wait for work for ever.

    It would hold its memory, a GPU's too, beside the steps of the next start.
    """
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _costed(packages: tuple[str, ...], function: Callable[..., T], arguments: tuple[Any, ...]) -> tuple[T, Cost]:
    import resource

    for name in packages:
        importlib.import_module(name)
    idle_bytes, started = psutil.Process().memory_info().rss, time.perf_counter()
    gave = function(*arguments)
    seconds = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024
    children_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return gave, Cost(round(seconds, 2), max(peak_rss_bytes(), children_bytes), idle_bytes)
