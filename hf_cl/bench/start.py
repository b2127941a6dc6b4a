"""How long the package keeps one waiting: `import hf_cl`, and `hf-cl --help`.

Measured: a fresh process from its start to its end, in turns. Against: a bare interpreter that does nothing.

Floor: the bare interpreter's time, which is in both. On top `hf-cl --help` imports typer, click and rich, which draw
the help, and no torch; `import hf_cl` reads one file.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from statistics import median

from hf_cl.bench._measure import against, turns
from hf_cl.bench._row import Mark, Row, Settings, Tell

BARE = "a bare interpreter"
COMMANDS = {
    BARE: ["-c", "pass"],
    "import hf_cl": ["-c", "import hf_cl"],
    "hf-cl --help": ["-m", "hf_cl", "--help"],
}
MARKS = {"import hf_cl": Mark(0.2, "<", "value"), "hf-cl --help": Mark(0.5, "<", "value")}
TURNS = 15


def run(settings: Settings, tell: Tell) -> Iterator[Row]:
    """Yield the seconds of both."""
    tell("fresh processes in turns")
    taken = turns({name: _starting(rest) for name, rest in COMMANDS.items()}, 2 if settings.quick else TURNS)
    middle = {name: median(seconds) for name, seconds in taken.items()}
    for name, mark in MARKS.items():
        floor = f"{middle[BARE]:.3f} s: the interpreter itself"
        row = against(taken[name], taken[BARE])
        yield Row("start", name, {}, middle[name], "s", floor, BARE, middle[BARE], mark=mark, **row)


def _starting(rest: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *rest], stdout=subprocess.DEVNULL, check=True)
