"""What this machine is: processor, memory, and how fast memory can be read. No model is needed to know it."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from ldrt_edge.runtimes.processor import has_amx, physical_cores

_FEATURES = ("AVX2", "AVX512F", "AVX512VNNI", "AVX512BF16", "NEON", "ASIMDDP", "SVE")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of control groups 2 and 1: limit, usage, statistics, and what those call a cache that is dropped where memory lacks.
Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst."""
_READ_BYTES = 256 << 20  # several times what a laptop processor's caches hold


@dataclass(frozen=True)
class Processor:
    """usable_cores: physical ones that this process may use. features: of those that speed up or endanger inference."""

    name: str
    usable_cores: int
    physical_cores: int
    logical_cores: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """Of the machine, or of the container that this process runs in.

    load_average: runnable processes over the last minute, while `read_gb_per_s` was measured.
    """

    total_bytes: int
    available_bytes: int
    read_gb_per_s: float
    load_average: float


def processor() -> Processor:
    """Read what the system tells about the processor; its features as numpy.show_runtime() knows them."""
    from numpy._core._multiarray_umath import __cpu_features__ as known  # type: ignore[import-not-found]

    features = [name for name in _FEATURES if known.get(name)] + ["AMX"] * has_amx()
    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    return Processor(processor_name(), physical_cores(), physical, logical, tuple(features))


def memory() -> Memory:
    """Read sizes and measure the speed, which takes about a second."""
    total = min([psutil.virtual_memory().total, *(limit for limit, _ in _containers())])
    return Memory(total, available_bytes(), read_gb_per_s(physical_cores()), psutil.getloadavg()[0])


def available_bytes() -> int:
    """Memory that a program could still take, of the machine or of the container."""
    return min([psutil.virtual_memory().available, *(free for _, free in _containers())])


def read_gb_per_s(threads: int, repeats: int = 15) -> float:
    """Memory bandwidth in GB/s for reading alone, as decoding does: the best of `repeats` sums over a large array.

    A copy would tell too little: it also waits for its writes, and came out at a third of this on the machine where
    both were tried, below what llama.cpp then read.
    """
    parts = [np.ones(_READ_BYTES // threads // 8) for _ in range(threads)]
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.sum, parts))
            seconds.append(time.perf_counter() - started)
    return sum(part.nbytes for part in parts) / min(seconds) / 1e9


def processor_name() -> str:
    """As far as the system tells."""
    if sys.platform == "darwin":
        try:
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _containers() -> list[tuple[int, int]]:
    """(limit, what of it is not in use) in bytes of each control group that has one; a cache of files is not in use."""
    found = []
    for limit, usage, statistics, cache in _MEMORY_FILES:
        try:
            most = int(_text(limit))
        except ValueError:  # no control group, or "max"
            continue
        counts = dict(line.split() for line in _text(statistics).splitlines())
        used = int(_text(usage) or 0) - int(counts.get(cache, 0))
        found.append((most, min(most, max(0, most - used))))
    return found


def _text(name: str) -> str:
    try:
        return (_CGROUPS / name).read_text().strip()
    except OSError:
        return ""
