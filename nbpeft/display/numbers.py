"""Numbers as text."""

from __future__ import annotations

import math

NONE = "–"
_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(byte_count: int | None) -> str:
    """Returns a number of bytes in decimal units: ``18.6 MB``."""
    if byte_count is None:
        return NONE
    value, unit = float(byte_count), 0
    while value >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{int(value)} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def count(number: int) -> str:
    """Returns an integer with thousands separators: ``4,884,480``."""
    return f"{number:,}"


def short_count(number: int) -> str:
    """Returns an abbreviated integer for a heading: ``134.5 M``."""
    for least, divisor, unit in ((999_950_000, 10**9, "B"), (999_950, 10**6, "M"), (10_000, 1000, "k")):
        if number >= least:
            return f"{number / divisor:.1f} {unit}"
    return f"{number:,}"


def share(part: int, whole: int) -> str:
    """Returns the ratio of ``part`` to ``whole`` in percent: ``3.48 %``."""
    return f"{100 * part / whole:.2f} %" if whole else "0 %"


def percent(value: float) -> str:
    """Returns a share from 0 to 1 in percent: ``93.8 %``, without decimals for exactly 0 and 1."""
    return f"{100 * value:.0f} %" if value in (0, 1) else f"{100 * value:.1f} %"


def plural(number: int, noun: str, many: str | None = None) -> str:
    """Returns a number with its noun: ``1 module``, ``2 modules``.

    Args:
        number: the number.
        noun: the noun in singular.
        many: its plural; by default with an ``s``.
    """
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def loss(value: float | None) -> str:
    """Returns a loss with three decimals, or with an exponent if it is very small or large."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.2e}"


def metric(value: float) -> str:
    """Returns a metric: ``0.913``, ``12.5``."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}"


def rate(value: float | None) -> str:
    """Returns a number of tokens per second."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def learning_rate(value: float | None) -> str:
    """Returns a learning rate: ``7.1e-4``."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    return _scientific(value, 1)


def setting(value: float) -> str:
    """Returns the value of a setting, to four digits: ``0.05``, ``1e-4``, ``2.5e-6``."""
    plain = not math.isfinite(value) or value == 0 or 0.01 <= abs(value) < 1e6
    return f"{value:.4g}" if plain else _scientific(value, 3)


def _scientific(value: float, digits: int) -> str:
    """Returns a number with at most some digits after the point, and an exponent without zeros."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def clock(seconds: float | None) -> str:
    """Returns a duration in seconds as ``0:31`` or ``1:02:03``."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
