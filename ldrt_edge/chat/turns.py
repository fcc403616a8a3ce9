"""One model, one answer at a time: work waits in the order in which it came, and can be stopped.

The model runs in a thread of its own, so that the server stays awake while it thinks; what it makes comes back event
by event. Stopping is the Ctrl-C of the terminal: what was written so far stays.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Generic, TypeVar

from ldrt_edge.runtimes.base import Runtime

T = TypeVar("T")
MOST_WAITING = 8


class Busy(Exception):
    """More work waits than will be taken."""


class Turns:
    """The queue before one model."""

    def __init__(self, runtime: Runtime, most_waiting: int = MOST_WAITING) -> None:
        self._runtime, self._most_waiting = runtime, most_waiting
        self._thread = ThreadPoolExecutor(1, "model")
        self._lock = threading.Lock()
        self._running: Turn[Any] | None = None
        self._taken: set[Turn[Any]] = set()

    def take(self, work: Callable[[], Generator[T, None, None]]) -> Turn[T]:
        """Put work at the end of the queue; it starts when its turn comes. Called on the event loop.

        Raises:
            Busy: too much waits already.
        """
        with self._lock:
            if len(self._taken) > self._most_waiting:
                raise Busy
            turn = Turn(self, work)
            self._taken.add(turn)
        self._thread.submit(turn.run)
        return turn

    @property
    def idle(self) -> bool:
        """Whether all work is done, or about to end."""
        with self._lock:
            return all(turn.stopped for turn in self._taken)

    def stop(self) -> None:
        """Stop all work that runs or waits."""
        with self._lock:
            taken = list(self._taken)
        for turn in taken:
            turn.stop()

    def close(self) -> None:
        """Stop all work, and wait until the model is free."""
        self.stop()
        self._thread.shutdown()

    def _begin(self, turn: Turn[T]) -> None:
        with self._lock:
            self._running = turn

    def _end(self, turn: Turn[T]) -> None:
        with self._lock:
            self._running = None
            self._taken.discard(turn)

    def _interrupt(self, turn: Turn[T]) -> None:
        with self._lock:
            if self._running is turn:
                self._runtime.interrupt()


class Turn(Generic[T]):
    """Work for the model. Its events are read once; leaving them stops it."""

    def __init__(self, turns: Turns, work: Callable[[], Generator[T, None, None]]) -> None:
        self._turns, self._work = turns, work
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue()
        self._stopped = threading.Event()
        self.ended = False

    @property
    def stopped(self) -> bool:
        """Whether it was told to end."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """End it as Ctrl-C would; the events end when it has ended."""
        self._stopped.set()
        self._turns._interrupt(self)

    async def events(self) -> AsyncIterator[T]:
        """What the work yields, as it comes; what it raises is raised here."""
        try:
            while (made := await self._made.get()) is not None:
                if isinstance(made, BaseException):
                    raise made
                yield made[0]
        finally:
            self.stop()

    def run(self) -> None:
        """In the model's thread."""
        try:
            if not self._stopped.is_set():
                self._turns._begin(self)
                with closing(self._work()) as events:
                    for event in events:
                        self._pass_on((event,))
                        if self._stopped.is_set():
                            break
        except KeyboardInterrupt:  # a runtime's way of stopping half-way
            pass
        except BaseException as error:
            self._pass_on(error)
        finally:
            self.ended = True
            self._turns._end(self)
            self._pass_on(None)

    def _pass_on(self, made: tuple[T] | BaseException | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._made.put_nowait, made)
