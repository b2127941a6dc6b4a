"""What a benchmark is asked, and what it answers: rows, each with the mark it is held against."""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Tell = Callable[[str], None]
"""Told a line where something takes long."""
HOLDS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}
MODELS = ("minilm", "bert-base")
QUICK_MODEL = "tiny"


@dataclass(frozen=True)
class Settings:
    """What a run of benchmarks is asked for.

    Attributes:
        quick: Shrink all sizes: a check that everything works, which meets and misses no mark.
        device: `cpu` or `cuda`.
        asked: The model that was named; None leaves the choice to each benchmark.
        mergekit_python: The Python of an environment with mergekit; None is this one.
    """

    quick: bool = False
    device: str = "cpu"
    asked: str | None = None
    mergekit_python: str | None = None

    def models(self, usual: tuple[str, ...] = MODELS) -> tuple[str, ...]:
        """Return the named sizes to measure; `usual` where none was asked for."""
        if self.asked is not None:
            return (self.asked,)
        return (QUICK_MODEL,) if self.quick else usual


@dataclass(frozen=True)
class Mark:
    """What a figure is held against.

    Attributes:
        limit: The figure itself is on the good side.
        direction: `<=`, `<` or `>=`: how a figure that is good enough stands to the limit.
        of: Which figure of the row: `ratio` or `value`.
    """

    limit: float
    direction: str = "<="
    of: str = "ratio"

    def met(self, figure: float | None) -> bool | None:
        """Return whether a figure meets the mark; None where there is no figure."""
        if figure is None or math.isnan(figure):
            return None
        return bool(HOLDS[self.direction](figure, self.limit))


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark.

    Attributes:
        benchmark: Its file's name.
        what: What is measured.
        settings: Under what: model, length, density, tasks and so on; JSON values.
        value: Our figure, a median.
        unit: Its unit.
        floor: The least it could be, in words and numbers.
        rival: What it is measured against; None where there is none.
        theirs: The rival's figure in the same unit; None where the rival is not installed.
        ratio: Ours by theirs, the median over turns.
        quartiles: Of the ratio; of the value where there is no rival; None for what does not vary.
        mark: What it is held against.
    """

    benchmark: str
    what: str
    settings: Mapping[str, Any]
    value: float
    unit: str
    floor: str
    rival: str | None = None
    theirs: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    mark: Mark | None = field(default=None, kw_only=True)

    def record(self, machine: Mapping[str, Any], *, quick: bool) -> dict[str, Any]:
        """Return the row as JSON values, with the machine it was measured on, and whether it met its mark.

        Args:
            machine: From `hf_cl.bench._measure.machine`.
            quick: Sizes were shrunk, so no mark is met or missed.
        """
        mark = self.mark
        figure = None if mark is None else self.ratio if mark.of == "ratio" else self.value
        unit = f" {self.unit}" if mark is not None and mark.of == "value" else ""
        return {
            "benchmark": self.benchmark,
            "what": self.what,
            "settings": dict(self.settings),
            "value": self.value,
            "unit": self.unit,
            "rival": self.rival,
            "theirs": self.theirs,
            "ratio": self.ratio,
            "quartiles": None if self.quartiles is None else list(self.quartiles),
            "mark": None if mark is None else {
                "text": f"{mark.of} {mark.direction} {mark.limit:g}{unit}",
                "limit": mark.limit, "direction": mark.direction, "of": mark.of,
            },
            "met": None if mark is None or quick else mark.met(figure),
            "floor": self.floor,
            "quick": quick,
            "machine": dict(machine),
        }  # fmt: skip
