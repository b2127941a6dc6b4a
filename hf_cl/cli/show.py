"""What a person reads: plain text, tables, and numbers in units a person thinks in.

Names and labels come from data, so nothing of them is ever taken for markup or for a terminal's command:
consoles here interpret no markup, and `plain` removes what a terminal would obey.
"""

import json
import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)|\x9b[0-?]*[ -/]*[@-~]")
# Characters that turn the direction of what follows.
TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
PIPE_WIDTH = 120
DIGITS = 16
"""Characters of a digest that are shown."""
HEADING = 16
"""Characters of a heading that stand on one line over narrower cells."""


def console(*, err: bool = False) -> Console:
    """Return a console that takes every string literally; `NO_COLOR` and `COLUMNS` hold as in rich."""
    file = sys.stderr if err else sys.stdout
    width = None if file.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def echo_json(value: Any) -> None:
    """Write one JSON value to stdout, in ASCII, so that no terminal and no encoding can misread it."""
    typer.echo(json.dumps(value, indent=1))


def plain(text: object) -> str:
    """Return a text on one line, without control characters, escape sequences and direction marks."""
    bare = ESCAPE.sub("", str(text))
    return "".join(
        " " if sign in "\t\n\r" else sign
        for sign in bare
        if sign in "\t\n\r" or (unicodedata.category(sign) not in UNPRINTABLE and sign not in TURNS)
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table; the first column is text and stands left, the others stand right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    cells = [[plain(cell) for cell in row] for row in rows]
    for number, column in enumerate(columns):
        longest = max((len(row[number]) for row in cells), default=0)
        # Numbers and digests are never broken, however narrow the terminal; longer texts are.
        whole = longest <= DIGITS
        heading = textwrap.fill(column, max(longest, HEADING)) if whole else column
        made.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=whole)
    for row in cells:
        made.add_row(*row)
    return made


def size(count: int | None) -> str:
    """Return bytes in a unit that leaves three or four digits, powers of 1000."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def count(number: int | None) -> str:
    """Return a whole number with its thousands apart."""
    return "-" if number is None else f"{number:,}"


def share(value: float | None) -> str:
    """Return a share in [0, 1], never a percentage."""
    return "-" if value is None else f"{value:.4g}"


def figure(value: float | None, *, exact: bool) -> str:
    """Return a measured figure; a missing one is a dash, and zero is called exact only where the run is."""
    if value is None:
        return "-"
    return "0 (exactly)" if value == 0 and exact else f"{value:.4f}"


def accuracy(value: float | None) -> str:
    """Return an accuracy."""
    return "-" if value is None else f"{value:.4f}"


def seconds(value: float | None) -> str:
    """Return a duration."""
    if value is None:
        return "-"
    return f"{value:.1f} s" if value < 120 else f"{int(value) // 60} min {int(value) % 60} s"


def short(digest: str | None) -> str:
    """Return the beginning of a digest."""
    return "-" if digest is None else digest[:DIGITS]
