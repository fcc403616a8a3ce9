"""What the processor offers a runtime: cores worth a thread each, and instructions to be careful with."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CPUINFO = Path("/proc/cpuinfo")
_LOOK_S = 0.1


def physical_cores() -> int:
    """Cores this process may use, counting hyper-threads once and honouring affinity and a container's quota.

    Matrix products saturate a core: a second thread on it, or one that the quota stops, only adds waiting.
    On Apple silicon only the performance cores count.
    """
    if sys.platform == "darwin":
        return _apple_performance_cores() or _psutil_cores()
    if not hasattr(os, "sched_getaffinity"):
        return _psutil_cores()
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota()))


def free_cores() -> int:
    """Physical cores that nothing else keeps busy just now, at least one; it takes a tenth of a second to see.

    llama.cpp's threads wait for each other at every step, so one that shares its core with another program holds up
    all: fewer threads are faster then.
    """
    import psutil

    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    load = psutil.cpu_percent(interval=_LOOK_S, percpu=True)
    busy = sum(percent for cpu, percent in enumerate(load) if cpu in ours) / 100
    return max(1, physical_cores() - round(busy))


def has_amx() -> bool:
    """Whether the processor has Intel's matrix extensions, on which llama.cpp's weight repacking crashes.

    Source: upstream issue ggml-org/llama.cpp #20824.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        flags = next(line for line in _CPUINFO.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return "amx_tile" in flags.split()


def _siblings(cpu: int) -> str:
    """Names the physical core of a logical one: the list of its hyper-threads."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """Whole cores that the control group allows; a fraction counts as one."""
    try:
        limit, period = _QUOTA.read_text().split()
        return math.ceil(int(limit) / int(period))
    except (OSError, ValueError):  # no control group, or "max"
        return 1 << 16


def _apple_performance_cores() -> int | None:
    try:
        asked = subprocess.run(
            ["sysctl", "-n", "hw.perflevel0.physicalcpu"], capture_output=True, text=True, timeout=5, check=True
        )
        return int(asked.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _psutil_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1
