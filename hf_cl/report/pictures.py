"""A group of runs as pictures, each with a text that tells the same to who cannot see it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_cl.plots import INK, PAPER, QUIET, new_figure, save_figure, shortened
from hf_cl.report import axes as look
from hf_cl.report.axes import Style
from hf_cl.report.groups import Estimate, Group, Series, along_the_stream
from hf_cl.report.read import Result
from hf_cl.report.words import number, plain, size

WHOLE, HALF = 10.4, 5.7
"""Widths in inches of a picture that fills the page, and of one of two beside each other."""
HEIGHT = 4.1
ON_EACH_OTHER = 0.005
"""Share of the range by which lines may differ and still lie on each other."""
WIDER = " Accuracy is drawn wider towards 1 (logarithm of the error)."
MOST_CELLS = 12
"""Tasks up to which a cell's figure can be read in half a page."""


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Attributes:
        path: The PNG.
        title: What it shows.
        caption: How to read it; may be empty.
        alt: What is to be seen in it.
        kind: `whole` fills the page's width, `half` half of it, `matrix` stands with the other matrices.
    """

    path: Path
    title: str
    caption: str
    alt: str
    kind: str = "half"


def draw(group: Group, folder: Path, stem: str, style: dict[str, Style]) -> list[Picture]:
    """Draw all pictures of a group; one that would show nothing is left out.

    Args:
        group: The runs.
        folder: Where the PNGs go; it must exist.
        stem: How their names begin.
        style: Colour and marker of each label.

    Raises:
        ConfigError: matplotlib is missing.
    """
    drawn = [
        _accuracy(group, folder / f"{stem}-accuracy.png", style),
        _frontier(group, folder / f"{stem}-frontier.png", style),
        _stream(group, folder / f"{stem}-stream.png", style),
        _capacity(group, folder / f"{stem}-capacity.png", style),
        _time(group, folder / f"{stem}-time.png", style),
    ]
    matrices = [
        _matrix(series, folder / f"{stem}-matrix-{place}.png") for place, series in enumerate(group.series, start=1)
    ]
    return [*(picture for picture in drawn if picture is not None), *matrices]


def _accuracy(group: Group, path: Path, style: dict[str, Style]) -> Picture:
    """Draw accuracy and forgetting, a row a series."""
    figure = new_figure(WHOLE, 1.15 + 0.36 * len(group.series))
    left, right = figure.subplots(1, 2, sharey=True)
    words, drawn = [], []
    for row, series in enumerate(group.series):
        accuracy = series.estimate(lambda run: run.matrix.average_accuracy)
        forgetting = series.estimate(lambda run: run.matrix.forgetting)
        _row(left, row, accuracy, style[series.label])
        drawn += _extent(accuracy)
        _row(right, row, forgetting, style[series.label], exact=series.exact == "yes")
        words.append(f"{series.label}: accuracy {_mean(accuracy)}, forgetting {_mean(forgetting)}")
    for axes, name in ((left, "average accuracy after the last task"), (right, "forgetting (0 is none)")):
        look.frame(axes, name)
        look.rows(axes, group)
    wider = look.accuracy_axis(left, drawn, "x", room=0.24) if drawn else False
    look.forgetting_axis(right)
    most = max(len(series.seeds) for series in group.series)
    caption = (
        "One seed a row: no claim that one is better." if most == 1 else "Small points are seeds, large ones means."
    )
    if most > 2:
        caption += " A line is the mean's 95 % interval (Student's t over seeds)."
    caption += WIDER if wider else ""
    return Picture(save_figure(figure, path), "Accuracy and forgetting", caption, _sentence(words), "whole")


def _row(axes: Any, row: int, found: Estimate | None, style: Style, *, exact: bool = False) -> None:
    text = {"fontsize": 8.5, "color": INK, "va": "center"}
    if found is None:
        axes.annotate("not defined", (0.5, row), xycoords=("axes fraction", "data"), **{**text, "color": QUIET})
        return
    (colour, marker), count = style, len(found.values)
    if found.half is not None:
        axes.plot([found.mean - found.half, found.mean + found.half], [row, row], color=colour, linewidth=2, alpha=0.55)
    if count > 1:
        axes.plot(found.values, [row] * count, "o", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)
    axes.plot([found.mean], [row], marker, color=colour, markersize=8, markeredgecolor=PAPER)
    furthest = max(_extent(found))
    place = {"xytext": (9, 0), "textcoords": "offset points"}
    axes.annotate(number(found.mean, exact=exact), (furthest, row), **place, **text)


def _extent(found: Estimate | None) -> list[float]:
    """Return all that is drawn of a figure."""
    half = found.half or 0.0 if found else 0.0
    return [*found.values, found.mean - half, found.mean + half] if found else []


def _frontier(group: Group, path: Path, style: dict[str, Style]) -> Picture | None:
    """Draw accuracy against bytes: all of them a task (filled), and what one more task adds (open)."""
    points: list[tuple[Series, float, float, float]] = []
    for series in group.series:
        accuracy = series.estimate(lambda run: run.matrix.average_accuracy)
        more, whole = (statistics.fmean(map(count, series.runs)) for count in (_more_bytes, _all_bytes))
        if accuracy is not None and whole > 0:
            points.append((series, accuracy.mean, more, whole))
    if not points:
        return None
    figure = new_figure(HALF, HEIGHT)
    axes = figure.subplots()
    for series, accuracy_, more, whole in points:
        colour, marker = style[series.label]
        if more > 0 and whole > 1.02 * more:
            axes.plot([more, whole], [accuracy_] * 2, color=colour, linewidth=1, alpha=0.6)
            axes.plot([more], [accuracy_], marker, color=PAPER, markeredgecolor=colour, markersize=7)
        axes.plot([whole], [accuracy_], marker, color=colour, markersize=8, markeredgecolor=PAPER, label=series.label)
    look.bytes_axis(axes, [count for *_, more, whole in points for count in (more, whole) if count > 0])
    wider = look.accuracy_axis(axes, [accuracy_ for _, accuracy_, *_ in points])
    look.staircase(axes, [(whole, accuracy_) for _, accuracy_, _, whole in points])
    look.frame(axes, "bytes on disk a task, head included (log)", "average accuracy", both=True)
    look.legend(figure, axes)
    caption = (
        "Filled: all bytes by the number of tasks. Open, where it differs: what one more task adds, without what tasks "
        f"share. Heads take {_heads(group)}. Dashed: the most accuracy for the bytes." + (WIDER if wider else "")
    )
    words = [f"{series.label}: {size(whole)} a task, accuracy {number(a)}" for series, a, _, whole in points]
    return Picture(save_figure(figure, path), "What accuracy costs", caption, _sentence(words))


def _heads(group: Group) -> str:
    sizes = [run.mean_bytes("head_bytes_per_task") for run in group.runs]
    low, high = size(min(sizes)), size(max(sizes))
    return f"{low} a task" if low == high else f"{low} to {high} a task"


def _more_bytes(run: Result) -> float:
    return run.mean_bytes("bytes_per_task") + run.mean_bytes("head_bytes_per_task")


def _all_bytes(run: Result) -> float:
    return _more_bytes(run) + run.content["bytes_shared"] / len(run.tasks)


def _stream(group: Group, path: Path, style: dict[str, Style]) -> Picture:
    """Draw the mean accuracy over the tasks seen, as the stream goes on."""
    figure = new_figure(HALF, HEIGHT)
    axes = figure.subplots()
    means = [series.along(along_the_stream) for series in group.series]
    words = []
    for place, (series, mean) in enumerate(zip(group.series, means, strict=True)):
        lines = [along_the_stream(run) for run in series.runs]
        look.line(axes, lines, mean, style[series.label], series.label, _above(place, means))
        words.append(f"{series.label}: from {number(mean[0])} to {number(mean[-1])}")
    known = [
        value for series in group.series for run in series.runs for value in along_the_stream(run) if value is not None
    ]
    wider = look.accuracy_axis(axes, known) if known else False
    look.over_tasks(axes, len(group.tasks))
    look.frame(axes, "tasks learned", "accuracy, mean over tasks seen", both=True)
    look.legend(figure, axes)
    caption = f"A line that falls may be forgetting, or harder tasks.{_shade(group.series)}{WIDER if wider else ''}"
    return Picture(save_figure(figure, path), "As the stream goes on", caption, _sentence(words))


def _capacity(group: Group, path: Path, style: dict[str, Style]) -> Picture | None:
    """Draw the share of the store that has an owner."""
    stores = [series for series in group.series if None not in series.along(Result.capacity)]
    if not stores:
        return None
    figure = new_figure(HALF, HEIGHT)
    axes = figure.subplots()
    means = [series.along(Result.capacity) for series in stores]
    words = []
    for place, (series, mean) in enumerate(zip(stores, means, strict=True)):
        lines = [run.capacity() for run in series.runs]
        look.line(axes, lines, mean, style[series.label], series.label, _above(place, means))
        words.append(f"{series.label}: {number(mean[-1])} after the last task")
    axes.set_ylim(bottom=0.0)
    look.over_tasks(axes, len(group.tasks))
    look.frame(axes, "tasks learned", "share of the store with an owner", both=True)
    look.legend(figure, axes)
    caption = "" if len(stores) == len(group.series) else "Methods without a store have no line."
    return Picture(save_figure(figure, path), "Capacity used", caption + _shade(stores), _sentence(words))


def _above(place: int, means: Sequence[Sequence[float | None]]) -> int:
    """Return how many later lines, up to three, lie on this one."""
    heights = np.array(means, dtype=np.float64)  # None becomes NaN, which lies on nothing
    if np.isnan(heights).all():
        return 0
    near = ON_EACH_OTHER * max(float(np.nanmax(heights) - np.nanmin(heights)), look.LEAST_SPAN)
    apart = np.abs(heights[place + 1 :] - heights[place]).max(axis=1, initial=0.0)
    return min(3, int((apart < near).sum()))


def _shade(series: Sequence[Series]) -> str:
    return " Shaded: from the lowest seed to the highest." if any(len(one.runs) > 1 for one in series) else ""


def _time(group: Group, path: Path, style: dict[str, Style]) -> Picture | None:
    """Draw the seconds that each task took, a row a series."""
    taken = [[second for run in series.runs for second in run.seconds()] for series in group.series]
    if not any(taken):
        return None
    figure = new_figure(HALF, max(HEIGHT, 1.0 + 0.3 * len(group.series)))
    axes = figure.subplots()
    words = []
    for row, (series, seconds) in enumerate(zip(group.series, taken, strict=True)):
        if seconds:
            colour, middle = style[series.label][0], statistics.median(seconds)
            axes.plot(seconds, [row] * len(seconds), "o", color=colour, markersize=5, alpha=0.45, markeredgewidth=0)
            axes.plot([middle] * 2, [row - 0.25, row + 0.25], color=colour, linewidth=2.5)
            words.append(f"{series.label}: median {middle:.0f} seconds")
    longest = max(max(seconds, default=0.0) for seconds in taken)
    axes.set_xlim(left=0.0, right=1.06 * longest or 1.0)
    look.frame(axes, "seconds a task")
    look.rows(axes, group, least=5)
    caption = "A point a task; the bar is the median. Of whatever machine ran it, so no benchmark."
    return Picture(save_figure(figure, path), "Time", caption, _sentence(words))


def _matrix(series: Series, path: Path) -> Picture:
    """Draw the accuracy matrix: a row after each task, a column a task, colours from 0 to 1 in every picture."""
    matrix = series.matrix()
    values = np.array(matrix.to_list(), dtype=np.float64)
    count = len(matrix.names)
    figure = new_figure(HALF, 1.0 + min(0.34, 3.6 / count) * count)
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="YlGnBu", vmin=0.0, vmax=1.0, aspect="auto")
    if count <= MOST_CELLS:
        _cells(axes, values)
    else:
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelcolor=QUIET, labelsize=7.5)
    axes.set_xticks(range(count), [str(place) for place in range(1, count + 1)])
    names = [f"{shortened(plain(name))}  {place}" for place, name in enumerate(matrix.names, start=1)]
    axes.set_yticks(range(count), names, parse_math=False)
    axes.set_xlabel("accuracy on task", color=QUIET, fontsize=8.5)
    axes.set_ylabel("after learning", color=QUIET, fontsize=8.5)
    axes.tick_params(length=0, labelcolor=INK, labelsize=8 if count <= 2 * MOST_CELLS else 5)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(0.5, count - 1), minor=True)
    axes.set_yticks(np.arange(0.5, count - 1), minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    words = [f"{name} {number(value)}" for name, value in zip(matrix.names, matrix.to_list()[-1], strict=True)]
    caption = f"Mean over {len(series.seeds)} seeds." if len(series.seeds) > 1 else ""
    alt = f"Accuracy after the last task: {', '.join(words)}."
    return Picture(save_figure(figure, path), series.label, caption, alt, "matrix")


def _cells(axes: Any, values: Any) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.2f}".removeprefix("0")
            colour = PAPER if value > 0.55 else INK
            weight = "bold" if row == column else "normal"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour, fontweight=weight)


def _mean(found: Estimate | None) -> str:
    return number(found.mean if found else None)


def _sentence(words: Sequence[str]) -> str:
    return "; ".join(words) + "."
