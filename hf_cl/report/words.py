"""Figures and names as a reader of the page sees them."""

import html
from typing import Any

SPACE = "\u00a0"
NONE = "\u2013"
LONGEST = 80
"""Signs of a text of data that are shown."""


def number(value: float | None, *, exact: bool = False) -> str:
    """Return a share with four decimals and a true minus sign; zero says so where it was measured to be exact."""
    if value is None:
        return NONE
    if exact and value == 0:
        return "0 (exactly)"
    text = f"{value:.4f}"
    return "0.0000" if float(text) == 0 else text.replace("-", "\u2212")


def size(count: float | None, digits: int = 1) -> str:
    """Return bytes in a unit that leaves three or four digits, powers of 1000."""
    if count is None:
        return NONE
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}{SPACE}{unit}" if unit == "B" else f"{value:.{digits}f}{SPACE}{unit}"


def duration(value: float | None) -> str:
    """Return seconds, as minutes and hours where they are many."""
    if value is None:
        return NONE
    whole = round(value)
    if whole < 120:
        return f"{value:.1f}{SPACE}s"
    return f"{whole // 60}{SPACE}min" if whole < 7200 else f"{whole / 3600:.1f}{SPACE}h"


def plain(value: Any) -> str:
    """Return a value of data as text of one line, without signs that steer a terminal or turn the reading direction."""
    text = f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
    return "".join(sign if sign.isprintable() else " " for sign in text)


def escaped(value: Any) -> str:
    """Return a text, our own or made of one name, as HTML text, whatever its length."""
    return html.escape(plain(value))


def safe(value: Any) -> str:
    """Return a value of data as HTML text; what is very long is cut, and whole in its title."""
    text = plain(value)
    if len(text) <= LONGEST:
        return escaped(text)
    return f'<span title="{html.escape(text)}">{html.escape(text[: LONGEST - 1])}…</span>'
