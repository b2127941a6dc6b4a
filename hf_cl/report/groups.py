"""Which runs may stand beside each other, and what several seeds of one say together.

A group is one stream under one set of conditions; a series is one method with one set of options, over its seeds. An
option that tuning chose is no condition: the procedure is the same, and may well choose differently with another seed.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_cl.metrics import AccuracyMatrix
from hf_cl.report.read import Result

ORDER = (
    "supsup", "exssnet", "ssnet", "lora", "independent", "joint", "finetune", "replay", "sfa", "l2", "ewc",
    "task_arithmetic", "ties", "wise_ft", "average",
)  # fmt: skip
"""Methods are shown in this order, others after them."""
UNIMPORTANT = ("seed", "disable_tqdm", "report_to", "logging_steps", "logging_strategy", "save_strategy", "run_name")
"""Arguments of training that change no figure, but for the seed, which is what a series is over."""
TUNED = "tuned"
UNSPOKEN = {"tasks": "other tasks", "most_rows": "other numbers of rows"}
"""Conditions that are too long to be told in a heading."""
SEEDS_FOR_AN_INTERVAL = 3
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t for 1 to 15 degrees of freedom; after these, `_student` is right to .002."""


@dataclass(frozen=True)
class Estimate:
    """What seeds say together.

    Attributes:
        values: One figure a seed, in the order of the seeds.
        mean: Their mean.
        spread: The sample's standard deviation; None for a single seed.
        half: Half of the mean's 95 % interval (Student's t); None for fewer than three seeds.
    """

    values: tuple[float, ...]
    mean: float
    spread: float | None
    half: float | None


@dataclass(frozen=True)
class Series:
    """One method with one set of options, over its seeds.

    Attributes:
        label: What tells it from the other series of its group.
        method: The method's name.
        runs: Its runs, by seed.
    """

    label: str
    method: str
    runs: tuple[Result, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds, each once."""
        return sorted({run.content["seed"] for run in self.runs})

    @property
    def exact(self) -> str:
        """Whether the runs were found exact, in words."""
        held = sum(run.content["exact"] for run in self.runs)
        return "yes" if held == len(self.runs) else "no" if not held else f"{held} of {len(self.runs)}"

    def estimate(self, figure: Callable[[Result], float | None]) -> Estimate | None:
        """Return a figure over seeds, None where a run has none; two runs with one seed are one seed's mean."""
        found = [(run.content["seed"], figure(run)) for run in self.runs]
        known = [(seed, value) for seed, value in found if value is not None]
        if len(known) < len(found):
            return None
        return estimate([statistics.fmean(v for s, v in known if s == seed) for seed in self.seeds])

    def matrix(self) -> AccuracyMatrix:
        """Return the accuracies, meant over the runs; None where one of them has none."""
        rows = [run.matrix.to_list() for run in self.runs]
        tasks = range(len(rows[0]))
        means = [[_mean([matrix[i][j] for matrix in rows]) for j in tasks] for i in tasks]
        return AccuracyMatrix.from_list(self.runs[0].tasks, means)

    def along(self, values: Callable[[Result], Sequence[float | None]]) -> list[float | None]:
        """Return values after each task, meant over the runs."""
        return [_mean(list(column)) for column in zip(*map(values, self.runs), strict=True)]


@dataclass(frozen=True)
class Group:
    """Runs that may be compared.

    Attributes:
        stream: The stream's name.
        conditions: What all of them share, by name.
        series: Its methods.
        differs: What tells it from the stream's first group; empty for that one.
    """

    stream: str
    conditions: dict[str, Any]
    series: tuple[Series, ...]
    differs: str

    @property
    def tasks(self) -> list[str]:
        """The tasks in their order."""
        return self.series[0].runs[0].tasks

    @property
    def runs(self) -> list[Result]:
        """All runs."""
        return [run for series in self.series for run in series.runs]


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, spread and interval of one figure a seed."""
    count = len(values)
    spread = statistics.stdev(values) if count > 1 else None
    half = None
    if spread is not None and count >= SEEDS_FOR_AN_INTERVAL:
        half = _student(count - 1) * spread / math.sqrt(count)
    return Estimate(tuple(values), statistics.fmean(values), spread, half)


def along_the_stream(run: Result) -> list[float | None]:
    """Return the mean accuracy over the tasks seen, after each task."""
    return [_mean(row[: number + 1]) for number, row in enumerate(run.matrix.to_list())]


def group(results: Iterable[Result]) -> list[Group]:
    """Return results in groups, by stream; within a stream the largest group stands first."""
    piles: dict[str, list[Result]] = {}
    for result in results:
        piles.setdefault(_canonical([result.content["stream"], conditions(result)]), []).append(result)
    ordered = sorted(piles.items(), key=lambda item: (item[1][0].content["stream"], -len(item[1]), item[0]))
    found: list[Group] = []
    for _, pile in ordered:
        stream, shared = pile[0].content["stream"], conditions(pile[0])
        first = next((other for other in found if other.stream == stream), None)
        differs = _difference(first.conditions, shared) if first else ""
        found.append(Group(stream, shared, tuple(_series(pile)), differs))
    return found


def conditions(run: Result) -> dict[str, Any]:
    """Return all that must be equal for two runs' figures to be compared."""
    training = {key: value for key, value in run.content["training"].items() if key not in UNIMPORTANT}
    for key in run.tuned:
        block, _, name = key.partition(".")
        if block == "training":
            training[name] = TUNED
    return {
        "model": run.content["model"],
        "tasks": run.tasks,
        "split": run.split,
        "max_length": run.content["max_length"],
        "most_rows": run.content.get("most_rows") or {},
        **{f"training.{key}": value for key, value in sorted(training.items())},
    }


def _series(pile: Sequence[Result]) -> list[Series]:
    kinds: dict[str, list[Result]] = {}
    for run in pile:
        kinds.setdefault(_canonical([run.method, _options(run)]), []).append(run)
    place = {name: number for number, name in enumerate(ORDER)}
    runs = [sorted(kind, key=lambda run: (run.content["seed"], run.source)) for kind in kinds.values()]
    runs.sort(key=lambda kind: (place.get(kind[0].method, len(ORDER)), kind[0].method, _sortable(kind[0])))
    return [Series(_label(kind[0], [other[0] for other in runs]), kind[0].method, tuple(kind)) for kind in runs]


def _options(run: Result) -> dict[str, Any]:
    """Return a method's options; of one that was tuned, only that it was."""
    options = dict(run.content["method"]["options"])
    return options | {key.partition(".")[2]: TUNED for key in run.tuned if key.startswith("method.")}


def _label(run: Result, all_runs: Sequence[Result]) -> str:
    """Return the method's name, with the options that tell it from others of that name."""
    others = [_options(other) for other in all_runs if other.method == run.method]
    own = _options(run)
    telling = [key for key in own if any(_canonical(other.get(key)) != _canonical(own[key]) for other in others)]
    words = ", ".join(f"{key} {_short(own[key])}" for key in telling)
    return f"{run.method} ({words})" if words else run.method


def _difference(first: dict[str, Any], other: dict[str, Any]) -> str:
    """Return what another group has that the first has not."""
    words = []
    for key in sorted({*first, *other}):
        if _canonical(first.get(key)) != _canonical(other.get(key)):
            name = key.removeprefix("training.")
            said = f"{name} {_short(other[key])}" if key in other else f"no {name}"
            words.append(f"{other['split']} rows" if key == "split" else UNSPOKEN.get(key, said))
    return ", ".join(words)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _sortable(run: Result) -> list[tuple[str, float, str]]:
    """Order series by their options, numbers as numbers."""
    found = []
    for key, value in sorted(_options(run).items()):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        found.append((key, float(value) if number else math.inf, str(value)))
    return found


def _canonical(value: Any) -> str:
    """Return equal text for equal values, whether a number was written 3 or 3.0."""
    return json.dumps(_numbers(value), sort_keys=True)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _student(degrees: int) -> float:
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
