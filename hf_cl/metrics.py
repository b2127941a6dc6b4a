"""What a stream of tasks was worth: one matrix of accuracies, and the figures read from it.

Row i, column j: the accuracy on task j after task i was learned. All figures cover the tasks learned
so far. A figure is None where it is not defined (nothing can be forgotten after one task) or where a
value it needs was not evaluated: it is never guessed from the values that happen to be there.

Sources: backward and forward transfer, GEM, arXiv 1706.08840; forgetting, Chaudhry et al., arXiv 1801.10112.
"""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_cl.errors import DataError

Row = tuple[float | None, ...]


class AccuracyMatrix:
    """Accuracies, in [0, 1], of every task after every task.

    Args:
        names: The tasks of the stream, in the order in which they are learned.

    Raises:
        DataError: There is no task, or two have one name.

    Example:
        >>> matrix = AccuracyMatrix(["news", "reviews"])
        >>> matrix.add_row({"news": 0.9})
        >>> matrix.add_row({"news": 0.6, "reviews": 0.8})
        >>> round(matrix.backward_transfer, 6)
        -0.3
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        if not self.names or len(set(self.names)) != len(self.names):
            raise DataError(f"Accuracy matrix: task names must be present and distinct, found {list(names)}.")
        self._rows: list[Row] = []

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AccuracyMatrix):
            return NotImplemented
        return self.names == other.names and self._rows == other._rows

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"AccuracyMatrix({len(self._rows)} of {len(self.names)} tasks learned)\n{self.to_text()}"

    @property
    def learned(self) -> tuple[str, ...]:
        """The tasks learned so far, in order: one for each row."""
        return self.names[: len(self._rows)]

    def add_row(self, values: Mapping[str, float | None], *, after: str | None = None) -> None:
        """Add the accuracies measured after the next task of the stream was learned.

        Args:
            values: Task name -> accuracy, None where not evaluated. Every task learned so far, the new
                one included, must have an entry; later tasks may (forward transfer reads them).
            after: The task that was just learned; refused if another one is next.

        Raises:
            DataError: The row is out of order, a task is missing or unknown, or a value is no share.
        """
        if len(self._rows) == len(self.names):
            raise DataError(f"Accuracy matrix: all {len(self.names)} rows are there; this is one too many.")
        row, new = len(self._rows), self.names[len(self._rows)]
        if after is not None and after != new:
            raise DataError(f"Accuracy matrix, row {row}: it comes after task {after!r}; {new!r} is next.")
        unknown = [name for name in values if name not in self.names]
        missing = [name for name in self.names[: row + 1] if name not in values]
        if unknown or missing:
            raise DataError(
                f"Accuracy matrix, row {row} (after {new!r}): unknown tasks {unknown}, no entry for "
                f"{missing}. Give every learned task an accuracy, or None where it was not evaluated."
            )
        where = f"Accuracy matrix, row {row} (after {new!r})"
        self._rows.append(tuple(_share(values.get(name), f"{where}, task {name!r}") for name in self.names))

    @property
    def average_accuracy(self) -> float | None:
        """Mean accuracy over the learned tasks after the last one: the usual final figure."""
        return _mean(self._rows[-1][: len(self._rows)]) if self._rows else None

    @property
    def learning_accuracy(self) -> float | None:
        """Mean of the diagonal: how well each task was learned when its turn came."""
        return _mean(row[task] for task, row in enumerate(self._rows))

    @property
    def average_incremental_accuracy(self) -> float | None:
        """Mean over rows of the mean accuracy on the tasks learned until then (iCaRL's figure)."""
        return _mean(_mean(row[: task + 1]) for task, row in enumerate(self._rows))

    @property
    def backward_transfer(self) -> float | None:
        """Mean of (last row - diagonal) over all tasks but the last. Negative means forgetting."""
        return _mean(_less(self._rows[-1][task], self._rows[task][task]) for task in self._earlier())

    @property
    def forgetting(self) -> float | None:
        """Mean of (best so far - last row) over all tasks but the last. Positive means forgetting.

        The best is taken from when the task was learned up to, without, the last row: rows before a
        task was learned do not count, and a task that improved at the end counts as negative.
        """
        drops = []
        for task in self._earlier():
            since = [row[task] for row in self._rows[task:]]
            known = [value for value in since[:-1] if value is not None]
            drops.append(_less(max(known), since[-1]) if None not in since else None)
        return _mean(drops)

    def forward_transfer(self, baseline: Mapping[str, float]) -> float | None:
        """Mean of (accuracy just before a task was learned - baseline), over all tasks but the first.

        Positive means that earlier tasks helped. It needs accuracies on tasks not yet learned, which a
        task with a head of its own does not have: then the figure is None.

        Args:
            baseline: Task name -> accuracy of the model before any task was learned.

        Raises:
            DataError: The baseline lacks a learned task, or holds a value that is no share.
        """
        later = range(1, len(self._rows))
        missing = [self.names[task] for task in later if self.names[task] not in baseline]
        if missing:
            raise DataError(f"Forward transfer: the baseline has no accuracy for {missing}.")
        gains = []
        for task in later:
            name = self.names[task]
            start = _share(baseline[name], f"Forward transfer, baseline of task {name!r}")
            gains.append(_less(self._rows[task - 1][task], start))
        return _mean(gains)

    def to_list(self) -> list[list[float | None]]:
        """Return the rows as plain lists, None where not evaluated: ready for JSON."""
        return [list(row) for row in self._rows]

    @classmethod
    def from_list(cls, names: Sequence[str], rows: Sequence[Sequence[float | None]]) -> "AccuracyMatrix":
        """Build the matrix from what `to_list` gave.

        Raises:
            DataError: A row has not one value a task, or holds a value that is no share.
        """
        matrix = cls(names)
        for number, row in enumerate(rows):
            if len(row) != len(matrix.names):
                raise DataError(
                    f"Accuracy matrix, row {number}: {len(row)} values for {len(matrix.names)} tasks. "
                    f"Write None where a task was not evaluated."
                )
            matrix.add_row(dict(zip(matrix.names, row, strict=True)))
        return matrix

    def to_text(self) -> str:
        """Return the matrix as a plain table: a row a learned task, a column a task, '-' for no value."""
        cells = [[f"{value:.4f}" if value is not None else "-" for value in row] for row in self._rows]
        labels = [f"{number} {name}" for number, name in enumerate(self.learned, start=1)]
        first = max(len(label) for label in ["after task", *labels])
        widths = [max(len(name), 6) for name in self.names]
        lines = []
        for label, row in zip(["after task", *labels], [list(self.names), *cells], strict=True):
            columns = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join([label.ljust(first), *columns]))
        return "\n".join(lines)

    def _earlier(self) -> range:
        """The learned tasks but the last: those that there was time to forget."""
        return range(len(self._rows) - 1)


def exssnet_forgetting(matrix: AccuracyMatrix) -> float | None:
    """ExSSNeT's figure: mean of (last row - best earlier row). Negative means forgetting.

    Unlike `forgetting` it has the opposite sign, and evaluated rows from before a task was learned count.

    Source: ExSSNeT, arXiv 2210.10209, as its published code computes it.
    """
    return _variant(matrix, sign=-1.0, with_last=False)


def mammoth_forgetting(matrix: AccuracyMatrix) -> float | None:
    """Mammoth's figure: mean of (best row - last row). Positive means forgetting; never negative.

    Unlike `forgetting` the last row counts among the best, so a gain at the end shows as zero, and
    so do evaluated rows from before a task was learned.

    Source: the mammoth library, github.com/aimagelab/mammoth.
    """
    return _variant(matrix, sign=1.0, with_last=True)


def _variant(matrix: AccuracyMatrix, sign: float, with_last: bool) -> float | None:
    rows = matrix.to_list()
    drops = []
    for task in range(len(rows) - 1):
        column = [row[task] for row in rows]
        known = [value for value in (column if with_last else column[:-1]) if value is not None]
        drops.append(_less(max(known), column[-1]) if None not in column[task:] else None)
    mean = _mean(drops)
    return None if mean is None else sign * mean + 0.0  # adding zero turns -0.0 into 0.0


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of texts whose predicted class is the labelled one.

    Raises:
        DataError: The two are not whole numbers of one length, or there is none.
    """
    predicted, wanted = _classes(predictions, labels)
    return float(np.mean(predicted == wanted))


def macro_f1(predictions: ArrayLike, labels: ArrayLike, num_labels: int) -> float:
    """Return the mean F1 over the classes that occur among the labels.

    A class that is labelled but never predicted has F1 = 0. A class without a label has no F1; texts
    wrongly given to it cost recall of their own class.

    Args:
        predictions: Predicted classes, whole numbers in [0, num_labels).
        labels: True classes, as many.
        num_labels: How many classes the task has.

    Raises:
        DataError: The two are not whole numbers of one length, there is none, or one is out of range.
    """
    predicted, wanted = _classes(predictions, labels)
    low, high = min(predicted.min(), wanted.min()), max(predicted.max(), wanted.max())
    if low < 0 or high >= num_labels:
        raise DataError(f"Macro F1: classes run from {low} to {high}; allowed are 0 to {num_labels - 1}.")
    hits = np.bincount(wanted[predicted == wanted], minlength=num_labels)
    labelled = np.bincount(wanted, minlength=num_labels)
    guessed = np.bincount(predicted, minlength=num_labels)
    present = labelled > 0
    return float(np.mean(2.0 * hits[present] / (labelled[present] + guessed[present])))


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """Return how often a number of `inside` is above one of `outside`, a tie counting half: the area under the curve.

    Args:
        inside: (n,) scores of what should score high.
        outside: (m,) scores of what should score low.

    Raises:
        DataError: One of them is empty, or holds what is no number.
    """
    high, low = np.asarray(inside, dtype=np.float64).ravel(), np.sort(np.asarray(outside, dtype=np.float64).ravel())
    if not high.size or not low.size or np.isnan(high).any() or np.isnan(low).any():
        raise DataError(f"AUROC: expected numbers on both sides, found {high.size} and {low.size}, or NaN among them.")
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.sum() / (2 * high.size * low.size))


def _classes(predictions: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    predicted, wanted = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != wanted.shape or not predicted.size:
        raise DataError(
            f"Predictions have shape {predicted.shape}, labels {wanted.shape}: expected one class a text "
            f"and at least one text. Take the argmax of logits first."
        )
    if predicted.dtype.kind not in "iu" or wanted.dtype.kind not in "iu":
        raise DataError(f"Classes must be whole numbers, found {predicted.dtype} and {wanted.dtype}.")
    return predicted.astype(np.int64), wanted.astype(np.int64)


def _share(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0.0 <= float(value) <= 1.0:
        raise DataError(f"{where}: {value!r} is not an accuracy in [0, 1].")
    return float(value)


def _less(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean with one rounding; None where there is no value or one is missing."""
    found = list(values)
    present = [value for value in found if value is not None]
    return math.fsum(present) / len(present) if present and len(present) == len(found) else None
