"""Tables of how fast tasks are learned and what a start from an earlier task brings, for `make_results.py`.

The rows are those of `bench_learning.py` and `bench_choice.py`, put together in docs/benchmarks/learning.jsonl.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hf_cl import plugins

Row = Mapping[str, Any]
SHARES = (1 / 8, 1 / 4, 5 / 8, 1.0)
FINE = 10
"""Evaluations a task from which on a tenth of its steps can be told."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def label(row: Row) -> str:
    """Return the method with the options that are not its defaults, and what an experiment changed."""
    usual = asdict(plugins.load("methods", row["method"]).Options())
    own = [f"{key} {value}" for key, value in row["options"].items() if value is not None and value != usual.get(key)]
    changed = [row["variant"]] if "variant" in row else []
    said = ", ".join([*own, *changed])
    return f"{row['method']} ({said})" if said else str(row["method"])


def at(row: Row, share: float) -> float:
    """Return the validation accuracy after a share of the steps: the one measured nearest to it."""
    nearest = min(range(len(row["steps"])), key=lambda place: abs(row["steps"][place] - share * row["steps"][-1]))
    return float(row["accuracy"][nearest])


def speeds(rows: Sequence[Row]) -> str:
    """Return how soon each way has learned."""
    fine = [row for row in rows if len(row["steps"]) >= FINE]
    lines = []
    for name in dict.fromkeys(map(label, fine)):
        own = [row for row in fine if label(row) == name]
        figures = [statistics.fmean(at(row, share) for row in own) for share in (0.1, 0.5, 1.0)]
        test = statistics.fmean(row["test_accuracy"] for row in own)
        way = statistics.fmean(row["steps_to_goal"] / row["steps"][-1] for row in own)
        lines.append([name, *(f"{value:.4f}" for value in (*figures, test)), f"{way:.2f}"])
    tasks = sorted({row["task"] for row in fine})
    said = (
        f"Means over {len(tasks)} tasks of `clinc10` ({', '.join(tasks)}), one seed, bf16 autocast, 141 steps a task; "
        "accuracy on validation rows nearest to a share of the steps, and the share of the steps after which 99 % of "
        "the last of them is reached first. What an experiment changes (`scripts/bench_choice.py`) stands last."
    )
    head = ("way", "after a tenth", "after half", "at the end", "on test rows", "share of steps to 99 %")
    return f"## Speed of learning\n\n{said}\n\n{table(head, lines)}\n"


def starts(rows: Sequence[Row]) -> str:
    """Return what KKT's start brings, task by task, on every stream that was learned with and without it."""
    made, coarse = [], [row for row in rows if len(row["steps"]) < FINE]
    for stream in dict.fromkeys(row["stream"] for row in coarse):
        by_start = {
            start: {row["task"]: row for row in coarse if (row["stream"], row["options"]["start"]) == (stream, start)}
            for start in ("kkt", "fresh")
        }
        made.append(_starts_of(stream, list(by_start["kkt"]), by_start))
    return "\n".join(made)


def _starts_of(stream: str, tasks: Sequence[str], by_start: Mapping[str, Mapping[str, Row]]) -> str:
    lines, gains = [], []
    for task in tasks:
        kkt, fresh = by_start["kkt"][task], by_start["fresh"][task]
        source = (kkt["kkt"] or {}).get("source")
        pairs = [(at(kkt, share), at(fresh, share)) for share in SHARES] + [
            (kkt["test_accuracy"], fresh["test_accuracy"])
        ]
        gains.append((source is not None, [100 * (a - b) for a, b in pairs]))
        name = "fresh" if source is None else tasks[source] if source < len(tasks) else str(source)
        lines.append([task, name, *(f"{a:.3f} / {b:.3f}" for a, b in pairs)])
    for said, chosen in (("mean gain, all later tasks", gains[1:]), ("mean gain, where a source was chosen", gains)):
        own = [values for started, values in chosen if started or "later" in said]
        if own:
            means = [statistics.fmean(column) for column in zip(*own, strict=True)]
            lines.append([f"**{said}**", str(len(own)), *(f"{value:+.1f} points" for value in means)])
    head = ("task", "started from", "after 1/8", "after 1/4", "after 5/8", "at the end", "on test rows")
    said = (
        "ExSSNeT, one seed, bf16 autocast; accuracy with KKT / fresh, on validation rows after shares of all steps "
        "(the mask phase is the first two thirds)."
    )
    return f"## KKT's start on {stream}\n\n{said}\n\n{table(head, lines)}\n"
