"""What the report's pictures have in common: colours, frames, legends, and the scales of accuracy and of bytes.

Colours are Okabe and Ito's, and some of Tol's after them, told apart by every kind of sight; a marker says the same
again, for print without colour.

Source: Okabe and Ito, Color Universal Design, 2008; Tol, Colour Schemes, SRON/EPS/TN/09-002, 2021.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_cl.plots import INK, QUIET, shortened
from hf_cl.report.groups import Group
from hf_cl.report.words import plain, size

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#332288", "#999933", "#882255")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">")
RULE, FAINT = "#e4e7eb", "#cbd2d9"
LONGEST_LABEL = 44
LEAST_SPAN = 0.04
"""The least range of an axis: differences far below it are noise, and shall not look like more."""
WIDE = 4.0
"""Ratio of errors from which the axis of accuracy is drawn wider towards 1."""
SMALLEST = 0.002
"""Added to an error, so that none is 0 on a logarithmic axis."""
APART = {"x": 0.11, "y": 0.05}
"""Share of that axis that ticks leave between them."""
HIGHEST = 3.6
"""The end of that axis; an error of 0 is drawn at 2.7."""
TICKS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0)
Style = tuple[str, str]


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    """Return a colour and a marker for each label, the same in every picture of the page."""
    methods = list(dict.fromkeys(series.method for group in groups for series in group.series))
    labels = list(dict.fromkeys(series.label for group in groups for series in group.series))
    # Plain methods first: their colours then do not depend on what else is on the page.
    ordered = [*[label for label in labels if label in methods], *[label for label in labels if label not in methods]]
    return {
        label: (COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)])
        for place, label in enumerate(ordered)
    }


def frame(axes: Any, below: str, beside: str = "", *, both: bool = False) -> None:
    """Name the axes, and leave of the frame what helps to read."""
    axes.set_xlabel(below, color=QUIET, fontsize=9)
    axes.set_ylabel(beside, color=QUIET, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=FAINT)
    axes.grid(axis="both" if both else "x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK, labelsize=8.5)


def rows(axes: Any, group: Group, least: int = 1) -> None:
    """Give each series a row, the first one on top.

    Args:
        axes: Where.
        group: Its series are the rows.
        least: Rows that there is room for, so that one alone is not stretched.
    """
    labels = [shortened(plain(series.label), LONGEST_LABEL) for series in group.series]
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    spare = max(0, least - len(labels)) / 2
    axes.set_ylim(len(labels) - 0.4 + spare, -0.6 - spare)


def forgetting_axis(axes: Any) -> None:
    """Show 0, which is what is aimed at, and leave room on the right for the figures beside the points."""
    low, high = axes.dataLim.intervalx if math.isfinite(axes.dataLim.x0) else (0.0, 0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    span = max(high - low, LEAST_SPAN)
    axes.axvline(0.0, color=FAINT, linewidth=1.2, zorder=0)
    axes.set_xlim(low - 0.08 * span, low + 1.26 * span)


def legend(figure: Any, axes: Any) -> None:
    """Name the series above the picture; a single one is named by the section already."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) < 2:
        return
    columns = max(1, min(len(labels), 72 // (max(map(len, labels)) + 6)))
    shown = [shortened(plain(label), LONGEST_LABEL) for label in labels]
    look = {"frameon": False, "fontsize": 8.5, "labelcolor": INK, "handlelength": 1.2, "columnspacing": 1.2}
    made = figure.legend(handles, shown, loc="outside upper left", ncols=columns, **look)
    for text in made.get_texts():
        text.set_parse_math(False)


def over_tasks(axes: Any, count: int) -> None:
    """Number the tasks below."""
    axes.set_xticks(range(1, count + 1, max(1, math.ceil(count / 12))))
    axes.set_xlim(0.7, count + 0.3)


def line(axes: Any, lines: Sequence[Any], mean: Sequence[Any], style: Style, label: str, below: int) -> None:
    """Draw a mean over the tasks, and shade what the seeds span.

    Args:
        axes: Where.
        lines: One a seed, None where there is no value.
        mean: The line that is drawn.
        style: Colour and marker.
        label: For the legend.
        below: How many later lines may lie on this one: it is drawn so much wider, and all are seen.
    """
    colour, marker = style
    values = np.array([[math.nan if value is None else value for value in one] for one in lines], dtype=np.float64)
    steps = range(1, values.shape[1] + 1)
    if len(lines) > 1:
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    heights = [math.nan if value is None else value for value in mean]
    look = {"linewidth": 1.4 + 0.9 * below, "markersize": 4.0 + 1.5 * below, "markeredgewidth": 0}
    axes.plot(steps, heights, marker=marker, color=colour, label=label, **look)


def bytes_axis(axes: Any, values: Sequence[float]) -> None:
    """Make the lower axis logarithmic, with bytes as a person writes them."""
    axes.set_xscale("log")
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.12 * (high - low), (1.0 - (high - low)) / 2)  # a decade at least, so that there are ticks
    low, high = low - room, high + room
    steps = (1,) if high - low > 2.5 else (1, 3) if high - low > 1.2 else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    axes.set_xticks(ticks, [size(tick, digits=0) for tick in ticks], parse_math=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(10**low, 10**high)


def accuracy_axis(axes: Any, values: Sequence[float], side: str = "y", room: float = 0.12) -> bool:
    """Draw accuracy wider towards 1 where good methods would else lie on each other; return whether it is.

    Args:
        axes: Where.
        values: All that is drawn.
        side: `x` or `y`.
        room: Share of the range that is left free above the highest.
    """
    low, high = max(min(values), 0.0), min(max(values), 1.0)
    wider = 1.0 - low + SMALLEST > WIDE * (1.0 - high + SMALLEST)
    to, back = (_to_height, _to_accuracy) if wider else (_same, _same)
    bottom, top = float(to(low)), float(to(high))
    if not wider:
        middle, half = (bottom + top) / 2, max(top - bottom, LEAST_SPAN) / 2
        bottom, top = middle - half, middle + half
    span = top - bottom
    ends = (
        float(back(bottom - 0.12 * span)),
        float(back(min(top + room * span, HIGHEST) if wider else top + room * span)),
    )
    if wider:
        getattr(axes, f"set_{side}scale")("function", functions=(to, back))
        places: list[float] = []
        for tick in TICKS:
            if ends[0] <= tick <= ends[1] and (not places or to(tick) - to(places[-1]) > APART[side] * span):
                places.append(tick)
        getattr(axes, f"set_{side}ticks")(places, [f"{tick:g}" for tick in places])
    getattr(axes, f"set_{side}lim")(*ends)
    if not wider:
        ticks = getattr(axes, f"get_{side}ticks")()
        getattr(axes, f"set_{side}ticks")([tick for tick in ticks if ends[0] <= tick <= min(ends[1], 1.0)])
    return wider


def _same(value: Any) -> Any:
    return value


def _to_height(accuracy: Any) -> Any:
    return -np.log10(np.maximum(1.0 - np.asarray(accuracy, dtype=np.float64) + SMALLEST, SMALLEST / 10))


def _to_accuracy(height: Any) -> Any:
    return 1.0 + SMALLEST - 10.0 ** -np.asarray(height, dtype=np.float64)


def staircase(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Draw the most accuracy that was reached for so many bytes, from the bottom to the right edge."""
    best = undominated(points)
    costs, worths = [cost for cost, _ in best], [worth for _, worth in best]
    costs, worths = [costs[0], *costs, axes.get_xlim()[1]], [axes.get_ylim()[0], *worths, worths[-1]]
    axes.step(costs, worths, where="post", color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=0)


def undominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, worth) points that no other point equals or beats in both, cheapest first."""
    found: list[tuple[float, float]] = []
    for cost, worth in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or worth > found[-1][1]:
            found.append((cost, worth))
    return found
