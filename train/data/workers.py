"""Work spread over processes, or over a Ray cluster, by which a crash costs one task and not the run.

Tasks are taken lazily and few are in flight, so memory does not grow with their number. Results come as they are
ready. A task whose process died (a decoder's crash, no memory, the watchdog) comes back as `None`, with all others
in flight repeated. Nothing distributed is written by hand: processes are `concurrent.futures`', clusters are Ray's.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from ldrt_edge.errors import RuntimeLoadError, require

_OBJECT_STORE_BYTES = 100 << 20  # results are numbers: what was read goes to files

T = TypeVar("T")
R = TypeVar("R")


def run_all(
    tasks: Iterable[T], function: Callable[[T], R], workers: int, ray_address: str | None = None
) -> Iterator[tuple[T, R | None]]:
    """Run `function` on each task; yields (task, result), None where its process died.

    Args:
        tasks: pickled to the workers.
        function: at a module's top level.
        workers: how many processes, or with Ray how many tasks at once.
        ray_address: of a Ray cluster; "local" starts one here.

    Raises:
        RuntimeLoadError: no Ray cluster there.
    """
    if ray_address is not None:
        return _on_ray(tasks, function, workers, ray_address)
    return _in_processes(tasks, function, workers)


def _in_processes(tasks: Iterable[T], function: Callable[[T], R], workers: int) -> Iterator[tuple[T, R | None]]:
    context = multiprocessing.get_context("spawn")
    waiting = iter(tasks)
    suspects: list[T] = []
    more = True
    while more:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_with_parent)
        running: dict[Future[R], T] = {}
        try:
            while True:
                for task in islice(waiting, 2 * workers - len(running)):
                    running[pool.submit(function, task)] = task
                if not running:
                    more = False
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()  # raises what the function raised, or BrokenProcessPool
                    yield running.pop(future), result
        except BrokenProcessPool:
            suspects = [*running.values()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for task in suspects:
            yield task, _alone(task, function)
        suspects = []


def _alone(task: T, function: Callable[[T], R]) -> R | None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_leave_with_parent) as pool:
        try:
            return pool.submit(function, task).result()
        except BrokenProcessPool:
            return None


def _leave_with_parent() -> None:
    """End this worker when the run is killed: it would wait for ever for the next task."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # only workers come here

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _on_ray(
    tasks: Iterable[T], function: Callable[[T], R], workers: int, address: str
) -> Iterator[tuple[T, R | None]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers
    ray: Any = require("ray", "ray")
    here: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    inner = bool(ray.is_initialized())  # a chunk is read again while the others wait
    try:
        if not inner:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **here if address == "local" else {})
    except Exception as error:  # Ray raises anything when it does not start, or does not answer
        raise RuntimeLoadError(f"--ray {address}: no Ray cluster ({' '.join(str(error).split())[:160]})") from error
    try:
        remote = ray.remote(max_retries=0)(function)
        waiting = iter(tasks)
        running: dict[Any, T] = {}
        while True:
            for task in islice(waiting, 2 * workers - len(running)):
                running[remote.remote(task)] = task
            if not running:
                return
            ready, _ = ray.wait([*running], num_returns=1)
            for reference in ready:
                task = running.pop(reference)
                try:
                    yield task, ray.get(reference)
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                    yield task, None
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error  # what the function raised, as the other ways raise it
    finally:
        if not inner:
            ray.shutdown()
