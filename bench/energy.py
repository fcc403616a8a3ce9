"""What a computation took in energy, where the system tells: the counters of Intel's and AMD's RAPL, through powercap.

They count for whole processor packages, so whatever else runs is in them. Since 2020 they are readable for root only on
most systems; where they are not, there is no figure.

Source: Linux kernel, Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

from pathlib import Path

_ZONES = Path("/sys/class/powercap")


class Meter:
    """Counts joules from its making; `joules` is None where the system does not tell."""

    def __init__(self, zones: Path = _ZONES) -> None:
        self._packages = [zone for zone in sorted(zones.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._before = [_read(zone / "energy_uj") for zone in self._packages]

    def joules(self) -> float | None:
        """Energy since the making, a wrapped counter taken into account (once)."""
        total = 0
        for zone, before in zip(self._packages, self._before, strict=True):
            now, span = _read(zone / "energy_uj"), _read(zone / "max_energy_range_uj")
            if before is None or now is None or (now < before and span is None):
                return None
            total += now - before + (span or 0) * (now < before)
        return total / 1e6 if self._packages else None


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
