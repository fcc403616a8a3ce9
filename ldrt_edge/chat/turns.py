"""One model, one answer at a time: clients take turns, and what is taken can be stopped.

However much one client asks, another waits for the answer that is being written, and for one of each client before it.
All have the same token, so this keeps programs from starving people; it is no defence against a program that pretends
to be many.

The model runs in a thread of its own, so that the server stays awake while it thinks; what it makes comes back event
by event. Stopping is the Ctrl-C of the terminal: what was written so far stays. Work that has nothing to tell yields
None where it may be stopped.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Generic, TypeVar

from ldrt_edge.runtimes.base import Runtime

T = TypeVar("T")
MOST_WAITING, MOST_WAITING_OF_ONE = 32, 8
"""Of all clients, and of one."""


class Busy(Exception):
    """More work waits than will be taken."""


class Turns:
    """The queues before one model, one for each client."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._thread = ThreadPoolExecutor(1, "model")
        self._lock = threading.Lock()
        self._running: Turn[Any] | None = None
        self._waiting: OrderedDict[str, deque[Turn[Any]]] = OrderedDict()  # by client, whose turn is next first
        self._served = ""

    def take(self, client: str, work: Callable[[], Generator[T | None, None, None]]) -> Turn[T]:
        """Put work at the end of a client's queue; it starts when its turn comes. Called on the event loop.

        Raises:
            Busy: too much waits already, of this client or of all.
        """
        turn = Turn(self, client, work)
        with self._lock:
            own = self._waiting.get(client, ())
            if len(own) >= MOST_WAITING_OF_ONE or sum(map(len, self._waiting.values())) >= MOST_WAITING:
                raise Busy
            self._waiting.setdefault(client, deque()).append(turn)
        self._thread.submit(self._run_next)
        return turn

    def tidy(self, work: Callable[[], None]) -> None:
        """Run in the model's thread, when it comes to that, what takes no time."""
        self._thread.submit(work)

    @property
    def idle(self) -> bool:
        """Whether all work is done, or about to end."""
        with self._lock:
            return not self._waiting and (self._running is None or self._running.stopped)

    def stop(self) -> None:
        """Stop all work that runs or waits."""
        with self._lock:
            taken = [turn for queue in self._waiting.values() for turn in queue]
            taken += [self._running] if self._running else []
        for turn in taken:
            turn.stop()

    def close(self) -> None:
        """Stop all work, and wait until the model is free."""
        self.stop()
        self._thread.shutdown()

    def _run_next(self) -> None:
        """In the model's thread."""
        with self._lock:
            if not self._waiting:  # it was stopped while it waited
                return
            if self._served in self._waiting:
                self._waiting.move_to_end(self._served)
            client = self._served = next(iter(self._waiting))
            turn = self._running = self._waiting[client][0]
            self._drop(turn)
        error = turn.run()
        with self._lock:
            self._running = None
        turn.end(error)

    def _stop(self, turn: Turn[Any]) -> None:
        """Interrupt a turn, or take it out of its queue."""
        with self._lock:
            if self._running is turn:
                self._runtime.interrupt()
            waits = turn in self._waiting.get(turn.client, ())
            if waits:
                self._drop(turn)
        if waits:
            turn.end()

    def _drop(self, turn: Turn[Any]) -> None:
        self._waiting[turn.client].remove(turn)
        if not self._waiting[turn.client]:
            del self._waiting[turn.client]


class Turn(Generic[T]):
    """Work for the model, of a client. Its events are read once; leaving them stops it."""

    def __init__(self, turns: Turns, client: str, work: Callable[[], Generator[T | None, None, None]]) -> None:
        self.client = client
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
        self._turns._stop(self)

    async def events(self) -> AsyncIterator[T]:
        """What the work yields, as it comes; what it raises is raised here."""
        try:
            while (made := await self._made.get()) is not None:
                if isinstance(made, BaseException):
                    raise made
                yield made[0]
        finally:
            self.stop()

    def run(self) -> BaseException | None:
        """In the model's thread; what it raised."""
        if self.stopped:
            return None
        try:
            with closing(self._work()) as events:
                for event in events:
                    if event is not None:
                        self._pass_on((event,))
                    if self._stopped.is_set():
                        break
        except KeyboardInterrupt:  # a runtime's way of stopping half-way
            pass
        except BaseException as error:
            return error
        return None

    def end(self, error: BaseException | None = None) -> None:
        """Let its reader know that nothing more comes, and why."""
        self.ended = True
        self._pass_on(error)

    def _pass_on(self, made: tuple[T] | BaseException | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._made.put_nowait, made)
