"""The tables of a section: figures, accuracies, options and tuning, where the runs come from."""

import statistics
from collections.abc import Callable, Sequence

from hf_cl.report.groups import Estimate, Group, Series
from hf_cl.report.paired import difference, rival
from hf_cl.report.read import Result
from hf_cl.report.words import NONE, duration, escaped, number, safe, size

Figure = Callable[[Result], float | None]


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """Return an HTML table whose first column names its rows; the cells are HTML already.

    Args:
        caption: What stands above it.
        columns: Heads, plain text.
        rows: Cells.
        text: Whether cells are texts, which stand left, or figures, which stand right.
    """
    head = "".join(f'<th scope="col">{safe(column)}</th>' for column in columns)
    kind = "" if text else ' class="num"'
    lines = [
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td{kind}>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    ]
    mark = ' class="text"' if text else ""
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table{mark}><caption>{escaped(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def conditions(group: Group) -> str:
    """Return what all runs of a group share, as a paragraph."""
    shared = dict(group.conditions)
    words = [
        f"<b>{safe(shared.pop('model'))}</b>",
        f"{len(shared.pop('tasks'))} tasks",
        f"{safe(shared.pop('split'))} rows",
    ]
    words.append(f"at most {safe(shared.pop('max_length'))} tokens")
    most = shared.pop("most_rows")
    if most:
        words.append(_most(most))
    words += [f"{safe(key.removeprefix('training.').replace('_', ' '))} {safe(value)}" for key, value in shared.items()]
    return f'<p class="conditions">{" · ".join(words)}</p>'


def _most(most: dict[str, dict[str, int]]) -> str:
    kinds = {str(sorted(caps.items())): caps for caps in most.values()}
    if len(kinds) > 1:
        return "rows capped by task"
    (caps,) = kinds.values()
    return "at most " + ", ".join(f"{safe(value)} {safe(key.removeprefix('max_'))} rows" for key, value in caps.items())


def figures(group: Group) -> str:
    """Return a group's main figures, a row a series."""
    several = any(len(series.seeds) > 1 for series in group.series)
    intervals = any(len(series.seeds) > 2 for series in group.series)
    capacity = any(None not in run.capacity() for run in group.runs)
    carried = any(run.carried for run in group.runs)
    columns = ["", "seeds", "average accuracy", *(["95 % interval"] if intervals else []), "learning accuracy"]
    columns += ["forgetting", "exact", "bytes a task", "head", "shared", *(["carried"] if carried else [])]
    columns += ["capacity used"] if capacity else []
    rows = []
    for series in group.series:
        accuracy = series.estimate(lambda run: run.matrix.average_accuracy)
        row = [safe(series.label), ", ".join(map(str, series.seeds)), _estimate(accuracy, several)]
        row += [_interval(accuracy)] if intervals else []
        row += [_estimate(series.estimate(lambda run: run.matrix.learning_accuracy), several=False)]
        row += [_forgetting(series), series.exact]
        row += [size(_mean(series, lambda run: run.mean_bytes("bytes_per_task")))]
        row += [size(_mean(series, lambda run: run.mean_bytes("head_bytes_per_task")))]
        row += [size(_mean(series, lambda run: float(run.content["bytes_shared"])))]
        row += [size(_mean(series, lambda run: float(run.carried)))] if carried else []
        rows.append([*row, *([_capacity(series)] if capacity else [])])
    return table("Figures", columns, rows)


def _estimate(found: Estimate | None, several: bool) -> str:
    if found is None:
        return NONE
    spread = f' <span class="spread">± {number(found.spread)}</span>' if found.spread is not None and several else ""
    return number(found.mean) + spread


def _interval(found: Estimate | None) -> str:
    if found is None or found.half is None:
        return NONE
    return f"{number(found.mean - found.half)} to {number(found.mean + found.half)}"


def _forgetting(series: Series) -> str:
    found = series.estimate(lambda run: run.matrix.forgetting)
    if found is not None and series.exact == "yes" and not any(found.values):
        return number(0.0, exact=True)
    return _estimate(found, several=True)


def _capacity(series: Series) -> str:
    used = series.along(Result.capacity)[-1]
    return number(used)


def _mean(series: Series, figure: Figure) -> float | None:
    found = series.estimate(figure)
    return None if found is None else found.mean


def differences(group: Group) -> str:
    """Return how each series stands against the group's rival on the same rows; empty where no answers are known."""
    against = rival(group)
    rows = []
    for series in group.series:
        found = difference(series, against) if series is not against else None
        if found is not None:
            points, low, high = (f"{100 * value:+.2f}" for value in (found.mean, found.low, found.high))
            rows.append([safe(series.label), points, f"{low} to {high}", str(found.seeds)])
    if not rows:
        return ""
    caption = f"Points of average accuracy against {against.label}, paired by test row"
    return table(caption, ["", "difference", "95 % interval", "seeds"], rows)


def accuracies(group: Group) -> str:
    """Return the accuracy on each task after the last one, a row a task, a column a series."""
    rows_of = {series.label: series.matrix().to_list()[-1] for series in group.series}
    rows = [
        [f"{place + 1} {safe(task)}", *(number(rows_of[series.label][place]) for series in group.series)]
        for place, task in enumerate(group.tasks)
    ]
    rows.append(["mean", *(number(series.matrix().average_accuracy) for series in group.series)])
    return table("Accuracy on each task after the last one", ["", *(s.label for s in group.series)], rows)


def methods(group: Group) -> str:
    """Return each series' options, and what tuning tried and chose."""
    rows = []
    for series in group.series:
        options = series.runs[0].content["method"]["options"]
        tuned = {key.partition(".")[2] for key in series.runs[0].tuned if key.startswith("method.")}
        kept = [f"{safe(key)} {safe(value)}" for key, value in options.items() if key not in tuned]
        outcomes = list(dict.fromkeys(_tuning(run) for run in series.runs))
        rows.append([safe(series.label), ", ".join(kept) or NONE, "<br>".join(outcomes)])
    return table("Options and tuning", ["", "options", "tuned: value, validation accuracy"], rows, text=True)


def _tuning(run: Result) -> str:
    if not run.tuning:
        return "not tuned"
    chosen, words = run.tuning.get("chosen", {}), []
    for trial in run.tuning.get("trials", []):
        options = trial["options"]
        found = trial.get("validation_accuracy")
        value = ", ".join(f"{safe(key.partition('.')[2])} {safe(option)}" for key, option in options.items())
        what = f"{value}: {'diverged' if found is None else number(found)}"
        words.append(f"<b>{what}</b>" if options == chosen else what)
    names = ", ".join(safe(name) for name in run.tuning.get("tasks", []))
    on = f" <span class='spread'>(on {safe(run.tuning.get('split', 'validation'))} rows of {names})</span>"
    return "; ".join(words) + on


def sources(group: Group) -> str:
    """Return where the runs come from, and the versions behind them."""
    shared = {
        key: value
        for key, value in group.runs[0].content["versions"].items()
        if all(run.content["versions"].get(key) == value for run in group.runs)
    }
    differ = any(run.content["versions"] != shared for run in group.runs)
    rows = []
    for series in group.series:
        for run in series.runs:
            spent = run.content["seconds"]
            median = statistics.median(run.seconds()) if run.seconds() else None
            row = [
                safe(run.source),
                safe(series.label),
                str(run.content["seed"]),
                "yes" if run.content["exact"] else "no",
            ]
            row += [
                duration(median),
                duration(_seconds(spent.get("training"))),
                duration(_seconds(spent.get("tuning"))),
            ]
            own = {key: value for key, value in run.content["versions"].items() if shared.get(key) != value}
            rows.append([*row, *([_versions(own)] if differ else [])])
    columns = [
        "file",
        "method",
        "seed",
        "exact",
        "median task",
        "training",
        "tuning",
        *(["versions"] if differ else []),
    ]
    note = f'<p class="conditions">{"All: " if differ else ""}{_versions(shared)}</p>' if shared else ""
    return table("Runs", columns, rows, text=True) + note


def _versions(versions: dict[str, str]) -> str:
    return " · ".join(f"{safe(key)} {safe(value)}" for key, value in versions.items())


def _seconds(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
