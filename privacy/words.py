"""Numbers and names as a report prints them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

__all__ = ["above", "below", "joined", "markdown", "percent", "plural", "power", "shown", "tidy"]

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def above(value: float, digits: int = 2) -> str:
    """Return a bound, rounded up to one digit and ``digits`` more.

    What is printed is never smaller than what holds.

    Examples
    --------
    >>> above(1.8211), above(0.07123), above(96.64), above(float("inf")), above(2.0)
    ('1.83', '0.0713', '96.7', 'no bound', '2.00')
    """
    if not math.isfinite(value):
        return "no bound"
    if value <= 0:
        return "0"
    places = max(0, digits - math.floor(math.log10(value)))
    scale = 10**places
    # The last bits of a float are no reason to print 2.01 for 2.
    return f"{math.ceil(value * scale * (1 - 1e-12)) / scale:,.{places}f}"


def below(value: float, digits: int = 2) -> str:
    """Return what is left, rounded down.

    Examples
    --------
    >>> below(1.239), below(0.0)
    ('1.23', '0')
    """
    if not math.isfinite(value) or value <= 0:
        return "0"
    scale = 10**digits
    return f"{math.floor(value * scale * (1 + 1e-12)) / scale:,.{digits}f}"


def power(value: float) -> str:
    """Return a small number with a power of ten.

    Examples
    --------
    >>> power(1e-5), power(2.5e-6), power(0.02)
    ('10⁻⁵', '2.5·10⁻⁶', '0.02')
    """
    if value >= 1e-3:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    raised = f"10{str(int(exponent)).translate(_RAISED)}"
    front = f"{float(mantissa):g}"
    return raised if front == "1" else f"{front}·{raised}"


def tidy(value: float, digits: int = 4) -> str:
    """Return a number without noise in its last digits.

    Examples
    --------
    >>> tidy(0.1 + 0.2), tidy(12345.0), tidy(1e-4)
    ('0.3', '12,345', '0.0001')
    """
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def markdown(text: str) -> str:
    r"""Return text in which Markdown and HTML see nothing but text.

    Examples
    --------
    >>> print(markdown("a_b [x](y) <b>"))
    a\_b \[x\](y) \<b\>
    """
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~$&" else c for c in shown(text))


def percent(share: float) -> str:
    """Return a share in percent, rounded up, with as many digits as it takes to stay below 100.

    Examples
    --------
    >>> percent(0.5), percent(0.9808), percent(0.99991), percent(1.0)
    ('50%', '99%', '99.991%', '100%')
    """
    places = 0
    while places < 6 and share < 1 and math.ceil(share * 10 ** (places + 2)) >= 10 ** (places + 2):
        places += 1
    grown = math.ceil(share * 10 ** (places + 2) * (1 - 1e-12)) / 10**places
    return f"{grown:.{places}f}%"


def plural(count: float, noun: str) -> str:
    """Return a count with its noun.

    Examples
    --------
    >>> plural(1, "round"), plural(1200, "client"), plural(2, "copy"), plural(5, "day")
    ('1 round', '1,200 clients', '2 copies', '5 days')
    """
    if count == 1:
        return f"1 {noun}"
    many = f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2:-1] not in "aeo" else f"{noun}s"
    return f"{tidy(count)} {many}"


def joined(parts: Sequence[str], last: str = "and") -> str:
    """Return a list in words.

    Examples
    --------
    >>> joined(["a"]), joined(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def shown(text: str, most: int = 0) -> str:
    r"""Return text that cannot move a cursor or turn a line around; cut to ``most`` if given.

    Names of clients, jobs and models are chosen by others.

    Examples
    --------
    >>> shown("a\x1b[2Jb\u202ec"), shown("x" * 1000, 5)
    ('a\ufffd[2Jb\ufffdc', 'xxxx…')
    """
    plain = "".join("\ufffd" if unicodedata.category(c) in _HIDDEN else c for c in text)
    return plain if not most or len(plain) <= most else f"{plain[: most - 1]}…"
