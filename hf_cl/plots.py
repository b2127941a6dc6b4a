"""An accuracy matrix as a picture.

Figures are drawn on a canvas of their own: the caller's matplotlib backend, settings and open figures
stay as they are, and one matrix always gives the same bytes (within one matplotlib version).
"""

import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from hf_cl.errors import ConfigError
from hf_cl.metrics import AccuracyMatrix

INK, QUIET, PAPER = "#1f2933", "#7b8794", "#ffffff"
LONGEST_NAME = 22


def accuracy_heatmap(matrix: AccuracyMatrix, path: Path, title: str) -> Path:
    """Draw the matrix as a PNG: a row after each learned task, a column for each task.

    Cells carry their accuracy, in bold where the task was just learned; a cell without a value stays
    blank. The colours always run from 0 to 1, so that pictures of two methods can be laid side by side.
    It reads well for 2 to 20 tasks.

    Args:
        matrix: At least one task must have been learned.
        path: The file to write; its folder must exist.
        title: What stands above the picture.

    Returns:
        `path`.

    Raises:
        ConfigError: matplotlib is missing, or no task has been learned.
    """
    rows, columns = len(matrix.learned), len(matrix.names)
    cell = 0.62 if columns > 6 else 0.86
    figure = new_figure(cell * columns + 3.2, cell * 0.8 * rows + 2.0)
    if not matrix.learned:
        raise ConfigError("A picture needs at least one learned task; this matrix has no row yet.")
    _draw(figure, matrix, title)
    return save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure on a canvas of its own, `width` by `height` inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError('A picture needs matplotlib: pip install "hf-cl[plots]".') from error
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as a PNG and return its path; equal figures give equal bytes."""
    with warnings.catch_warnings():
        # A name may be in any script; signs that the font has not are boxes, and nobody here can act on it.
        warnings.filterwarnings("ignore", message=r".*[Gg]lyph .* missing from", category=UserWarning)
        figure.savefig(path, format="png", facecolor=PAPER, metadata={"Software": None})
    return path


def _draw(figure: Any, matrix: AccuracyMatrix, title: str) -> None:
    values = np.array(matrix.to_list(), dtype=np.float64)
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="YlGnBu", vmin=0.0, vmax=1.0, aspect="auto")
    _write_cells(axes, values)
    _label(axes, matrix, title)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label("accuracy", color=QUIET)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=QUIET, labelsize=8)


def _write_cells(axes: Any, values: Any) -> None:
    size = 9 if values.shape[1] <= 6 else 7.5
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                f"{value:.3f}",
                ha="center",
                va="center",
                fontsize=size,
                fontweight="bold" if row == column else "normal",
                color=PAPER if value > 0.55 else INK,
            )


def _label(axes: Any, matrix: AccuracyMatrix, title: str) -> None:
    names = [shortened(name) for name in matrix.names]
    rows, columns = len(matrix.learned), len(names)
    turned = columns > 6 or max(map(len, names)) > 10
    axes.set_xticks(range(columns), names, parse_math=False)
    if turned:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(rows), names[:rows], parse_math=False)
    axes.set_xlabel("accuracy on", color=QUIET)
    axes.set_ylabel("after learning", color=QUIET)
    lines = "\n".join(textwrap.wrap(title, width=int(axes.figure.get_figwidth() * 8)))
    axes.set_title(lines, loc="left", color=INK, fontsize=12, fontweight="bold", pad=12, parse_math=False)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)
    axes.spines[:].set_visible(False)
    # White lines between the cells, on the half positions that the minor ticks mark.
    axes.set_xticks(np.arange(0.5, columns - 1), minor=True)
    axes.set_yticks(np.arange(0.5, rows - 1), minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=2)
    axes.tick_params(which="minor", length=0)


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """Cut from the middle: the ends of names tell tasks apart."""
    if len(name) <= longest:
        return name
    return f"{name[: longest // 2]}…{name[1 - longest // 2 :]}"
