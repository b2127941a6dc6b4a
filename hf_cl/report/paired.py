"""How much one series beats another on the same test rows, by a paired bootstrap over these rows.

Rows of a task are drawn anew with replacement, the same ones for both sides; tasks weigh alike, as in the average
accuracy; a row counts with its mean over the seeds that both sides have. What the interval leaves out is the spread of
the seeds, which `groups.Estimate` has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_cl.errors import RunError
from hf_cl.report.groups import Group, Series
from hf_cl.report.read import Result

DRAWS = 10_000
RIVAL = "lora"


@dataclass(frozen=True)
class Difference:
    """One series' average accuracy less another's.

    Attributes:
        mean: On all rows.
        low: 2.5 % quantile over the draws.
        high: 97.5 % quantile.
        seeds: Number of seeds that both sides have.
    """

    mean: float
    low: float
    high: float
    seeds: int


def rival(group: Group) -> Series:
    """Return what the others of a group are held against: its most accurate LoRA, else its first series."""
    found = [series for series in group.series if series.method == RIVAL] or list(group.series[:1])
    return max(found, key=lambda series: series.matrix().average_accuracy or 0.0)


def difference(one: Series, other: Series) -> Difference | None:
    """Return how much `one` beats `other`; None where they have no seed in common whose answers are known."""
    ours, theirs = _answers(one), _answers(other)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    generator = np.random.default_rng(0)
    total, drawn, tasks = 0.0, np.zeros(DRAWS), one.runs[0].tasks
    for task in tasks:
        gains = np.mean([_less(ours[seed][task], theirs[seed][task], task) for seed in seeds], axis=0)
        # Rows with one gain are alike, so a draw of rows is a draw of how often each gain comes.
        values, counts = np.unique(gains, return_counts=True)
        drawn += generator.multinomial(len(gains), counts / len(gains), DRAWS) @ values / len(gains)
        total += float(gains.mean())
    low, high = np.quantile(drawn / len(tasks), [0.025, 0.975])
    return Difference(total / len(tasks), float(low), float(high), len(seeds))


def _less(ours: np.ndarray, theirs: np.ndarray, task: str) -> np.ndarray:
    if len(ours) != len(theirs):
        raise RunError(f"task {task!r}: was measured on {len(ours)} rows in one run and on {len(theirs)} in another.")
    return ours.astype(np.int8) - theirs.astype(np.int8)


def _answers(series: Series) -> dict[int, dict[str, np.ndarray]]:
    """Return by seed, of runs that say so, which rows of each task were answered rightly."""
    return {
        run.content["seed"]: {task: _bits(run, task, entry) for task, entry in run.content["correct"].items()}
        for run in series.runs
        if run.content.get("correct")
    }


def _bits(run: Result, task: str, entry: Mapping[str, Any]) -> np.ndarray:
    """Return a task's answers as `results.bits_of` wrote them."""
    try:
        rows, packed = int(entry["rows"]), np.frombuffer(bytes.fromhex(entry["bits"]), dtype=np.uint8)
        if rows < 1 or len(packed) != -(-rows // 8) or set(run.tasks) != set(run.content["correct"]):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{run.source}: `correct` of task {task!r:.80} is not a number of rows and a bit each."
        ) from error
    return np.unpackbits(packed, count=rows).astype(bool)
