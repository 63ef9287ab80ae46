"""Sizes, times and promises as people read them, on the page and on terminals."""

from __future__ import annotations

import time

__all__ = ["ago", "clock", "days", "figure", "relation_words", "size", "span"]

_RELATIONS = {
    "add-or-remove-one": "add or remove one",
    "replace-special": "one counts as zero",
}


def size(count: float | None) -> str:
    """Return bytes in a unit that fits.

    Examples
    --------
    >>> size(0), size(999), size(1_234_567), size(2.5e9), size(None)
    ('0 B', '999 B', '1.23 MB', '2.50 GB', '-')
    """
    if count is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # 999 999 bytes are 1.00 MB, not 1000.00 kB.
        if count >= scale * 0.99995:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def span(seconds: float | None) -> str:
    """Return how long something takes.

    Examples
    --------
    >>> span(0.34), span(42), span(240), span(5400), span(200_000), span(None)
    ('0.3 s', '42 s', '4 min', '1 h 30 min', '2 d 7 h', '-')
    """
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        hours, rest = divmod(minutes, 60)
        return f"{hours} h {rest} min" if rest else f"{hours} h"
    whole, rest = divmod(minutes // 60, 24)
    return f"{whole} d {rest} h" if rest and whole < 10 else f"{whole:,} d"


def ago(then: float | None, now: float) -> str:
    """Return how long ago something was.

    Examples
    --------
    >>> ago(100.0, 103.0), ago(100.0, 340.0), ago(None, 0.0), ago(104.0, 103.0)
    ('3 s ago', '4 min ago', 'never', 'now')
    """
    if then is None:
        return "never"
    past = now - then
    return "now" if past < 1 else f"{span(max(10.0, past)) if past >= 10 else f'{past:.0f} s'} ago"


def clock(then: float | None, now: float) -> str:
    """Return a local time of day, with the date where it is another day's."""
    if then is None:
        return "-"
    there, here = time.localtime(then), time.localtime(now)
    form = "%H:%M:%S" if there[:3] == here[:3] else "%Y-%m-%d %H:%M"
    return time.strftime(form, there)


def days(count: int) -> str:
    """Return so many days.

    Examples
    --------
    >>> days(1), days(200)
    ('1 day', '200 days')
    """
    return "1 day" if count == 1 else f"{count:,} days"


def figure(value: float | None) -> str:
    """Return a loss or a share with four significant places.

    Examples
    --------
    >>> figure(4.56789), figure(3.19), figure(0.00123), figure(None), figure(3.2e9), figure(0)
    ('4.568', '3.190', '0.001230', '-', '3.200e+09', '0')
    """
    return "-" if value is None else f"{value:#.4g}" if value else "0"


def relation_words(relation: str) -> str:
    """Return what two data sets that must look alike differ in."""
    return _RELATIONS.get(relation, relation.replace("-", " "))
