"""What a computation took in energy, where the system tells: RAPL's counters on Linux, powermetrics on a Mac.

Both are for whole packages, so whatever else runs is in them, and both tell root only on most systems; where they tell
nothing, there is no figure. Of RAPL's zones only packages count: a laptop's `psys` is the whole platform, packages too.
powermetrics estimates, and has not been run by us: what is read of it is its printed text.

Source: Linux kernel, Documentation/power/powercap/powercap.rst; macOS, powermetrics(1).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_ZONES = Path("/sys/class/powercap")
_SAMPLE_MS, _MOST_SAMPLES = 200, 18_000  # an hour: should nobody end it, it ends itself
_SAMPLE = re.compile(r"\(([\d.]+)ms elapsed\)(?:(?!ms elapsed).)*?^Combined Power[^:\n]*: (\d+) mW", re.S | re.M)


class Meter:
    """Counts joules from its making.

    Args:
        zones: where the counters lie.
        powermetrics: the command that prints samples where there are no counters; None for the system's own.
    """

    def __init__(self, zones: Path = _ZONES, powermetrics: Sequence[str] | None = None) -> None:
        self._packages = [zone for zone in sorted(zones.glob("intel-rapl:*")) if _name(zone).startswith("package")]
        self._before = [_read(zone / "energy_uj") for zone in self._packages]
        command = powermetrics or _powermetrics()
        self._sampler = _Sampler(command) if command and not self._packages else None

    def joules(self) -> float | None:
        """Energy since the making; None where the system does not tell. To be asked once."""
        if self._sampler:
            return self._sampler.joules()
        total = 0
        for zone, before in zip(self._packages, self._before, strict=True):
            now, span = _read(zone / "energy_uj"), _read(zone / "max_energy_range_uj")
            if before is None or now is None or (now < before and span is None):
                return None
            total += now - before + (span or 0) * (now < before)  # a counter may have wrapped, once
        return total / 1e6 if self._packages else None


class _Sampler:
    """powermetrics, which prints the mean power of one interval after the other until it is ended."""

    def __init__(self, command: Sequence[str]) -> None:
        self._printed: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the sampler
        process = subprocess.Popen(command, stdout=self._printed, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        self._end = weakref.finalize(self, _ended, process)
        self._since = time.monotonic()

    def joules(self) -> float | None:
        """Mean power over all whole intervals, times all of the time; None when there was none."""
        seconds = time.monotonic() - self._since
        self._end()
        self._printed.seek(0)
        samples = _SAMPLE.findall(self._printed.read().decode(errors="replace"))
        told_ms = sum(float(elapsed) for elapsed, _ in samples)
        watts_ms = sum(float(elapsed) * int(milliwatts) / 1e3 for elapsed, milliwatts in samples)
        return seconds * watts_ms / told_ms if told_ms else None


def _powermetrics() -> tuple[str, ...] | None:
    found = shutil.which("powermetrics") if hasattr(os, "geteuid") and os.geteuid() == 0 else None
    options = ("--samplers", "cpu_power", "--sample-rate", str(_SAMPLE_MS), "--sample-count", str(_MOST_SAMPLES))
    return (found, *options, "--buffer-size", "0") if found else None


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()


def _name(zone: Path) -> str:
    """What a zone counts: package-0, core, uncore, dram, psys."""
    try:
        return (zone / "name").read_text()
    except OSError:
        return ""


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
