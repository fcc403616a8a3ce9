"""How figures are written in reports: shares, intervals, differences in points, p values, sizes."""

from __future__ import annotations

from ldrt_edge.bench.significance import McNemar
from ldrt_edge.bench.statistics import Difference, Rate, Ratio


def percent(rate: Rate | float) -> str:
    """A share as "73.3%"."""
    return f"{(rate if isinstance(rate, (int, float)) else rate.value) * 100:.1f}%"


def interval(rate: Rate) -> str:
    """A rate's interval as "70.1–76.4"."""
    return ends((rate.ci_low, rate.ci_high))


def ends(interval: tuple[float, float]) -> str:
    """The ends of an interval of shares as "70.1–76.4"."""
    return f"{interval[0] * 100:.1f}–{interval[1] * 100:.1f}"


def points(difference: Difference) -> str:
    """A difference in percentage points, with its sign: "+24.5", "−0.3"."""
    return signed(difference.value)


def points_interval(difference: Difference) -> str:
    """A difference's interval in percentage points: "−0.8 to +1.9"."""
    return f"{signed(difference.ci_low)} to {signed(difference.ci_high)}"


def number(value: float) -> str:
    """Three significant digits, without an exponent above a thousandth."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def number_interval(found: Ratio) -> str:
    """A ratio's interval as "0.0041–0.0073", with two significant digits."""
    return f"{found.ci_low:.2g}–{found.ci_high:.2g}"


def p_value(test: McNemar) -> str:
    """A test's p by clusters as "0.034" or "<0.001"; Holm's where it is one of several."""
    return short_p(test.p_clustered if test.p_holm is None else test.p_holm)


def byte_size(count: int) -> str:
    """Bytes as "105 MB" or "4.1 GB" (powers of ten)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def short_p(p: float) -> str:
    """A p value as "0.034" or "<0.001"."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def signed(share: float) -> str:
    """A share in percentage points with its sign."""
    shown = f"{share * 100:+.1f}".replace("-", "−")
    return "0.0" if shown in ("+0.0", "−0.0") else shown
