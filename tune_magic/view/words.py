"""Numbers in words: durations, sizes, counts, losses, times."""

from __future__ import annotations

import math
import time


def duration(seconds: float) -> str:
    """Return seconds as people say them.

    Example:
        >>> duration(309), duration(7.25), duration(7400), duration(0.042)
        ('5 min 09 s', '7.2 s', '2 h 03 min', '42 ms')
    """
    if not math.isfinite(seconds):
        return "–"
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def chance(p: float) -> str:
    """Return a p value.

    Example:
        >>> chance(0.00004), chance(0.0312), chance(0.5)
        ('< 0.001', '0.031', '0.50')
    """
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def size(num_bytes: float) -> str:
    """Return bytes in decimal units.

    Example:
        >>> size(4_600_000_000), size(9_800_000)
        ('4.6 GB', '9.8 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if round(num_bytes / factor, 1) >= 1 and num_bytes >= 0.99995 * factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def count(number: float) -> str:
    """Return a count with its unit letter.

    Example:
        >>> count(4_880_000), count(61_234), count(480)
        ('4.9 M', '61 k', '480')
    """
    for unit, factor in (("B", 1e9), ("M", 1e6)):
        if number >= 0.9995 * factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number / 1e3:.0f} k" if number >= 1e4 else f"{number:.0f}"


def ordinal(number: int) -> str:
    """Return a place in a line.

    Example:
        >>> ordinal(2), ordinal(11), ordinal(23)
        ('2nd', '11th', '23rd')
    """
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def value(number: float) -> str:
    """Return a loss or a score to three digits.

    Example:
        >>> value(0.2412), value(1.9376), value(123.4), value(float("nan"))
        ('0.241', '1.94', '123', 'not a number')
    """
    if math.isnan(number):
        return "not a number"
    if math.isinf(number):
        return "infinite"
    size_of = abs(number)
    for limit, digits in ((0.9995, 3), (99.995, 2), (9999.5, 0)):
        if size_of < limit:
            return f"{number:.{digits}f}"
    return f"{number:.2e}"


def signed(number: float) -> str:
    """Return a difference with its sign, the minus as a minus."""
    return value(number) if math.isnan(number) else ("+" if number >= 0 else "−") + value(abs(number))


def rate(number: float) -> str:
    """Return a learning rate."""
    return f"{number:.1e}".replace("e-0", "e-")


def clock(seconds: float, *, day: bool = False) -> str:
    """Return a time of the day, here, with the date when asked."""
    return time.strftime("%d %b %Y %H:%M" if day else "%H:%M", time.localtime(seconds))


def ago(seconds: float) -> str:
    """Return how long ago something was."""
    if seconds < 90:
        return "just now"
    return (
        f"{seconds / 60:.0f} min ago"
        if seconds < 5400
        else f"{seconds / 3600:.0f} h ago"
        if seconds < 129_600
        else f"{seconds / 86_400:.0f} d ago"
    )


def tail(path: str) -> str:
    """Return the last part of a path or of an id.

    Example:
        >>> tail("data/tickets.jsonl")
        'tickets.jsonl'
    """
    return path.rstrip("/").rsplit("/", 1)[-1]
