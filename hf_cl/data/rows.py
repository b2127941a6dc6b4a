"""Which rows to take: stratified, seeded, and in the order of the data.

The same labels, size and seed always give the same rows, and a larger size keeps a class's rows of a
smaller one unless that class's share shrinks.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Integers: TypeAlias = npt.NDArray[np.int64]


def share_out(counts: Integers, size: int) -> Integers:
    """Share `size` rows out among classes in proportion to their counts.

    Fractions go to the largest remainders, equal ones to the lower class. Each class that has rows
    gets at least one if `size` allows one for all.

    Args:
        counts: Rows of each class.
        size: Rows to take in all, at most the sum of `counts`.

    Returns:
        Rows to take of each class; they sum to `size`, and none is above its count.
    """
    total = int(counts.sum())
    shares, remainders = np.divmod(counts * size, max(total, 1))
    if size >= np.count_nonzero(counts):
        raised = (shares == 0) & (counts > 0)
        shares[raised], remainders[raised] = 1, 0
    missing = size - int(shares.sum())
    if missing > 0:
        shares[np.argsort(-remainders, kind="stable")[:missing]] += 1
    for _ in range(-missing):
        shares[np.argmax(shares)] -= 1
    return shares


def stratified(labels: Integers, size: int | None, seed: tuple[int, int]) -> Integers:
    """Return `size` rows, or all if there are no more, as ascending row numbers.

    Args:
        labels: Each row's class.
        size: Most rows to take; None takes all.
        seed: Seed of the draw: the task's, and the split's number.
    """
    if size is None or size >= len(labels):
        return np.arange(len(labels))
    return _draw(labels, share_out(np.bincount(labels), size), seed)


def carve(labels: Integers, seed: tuple[int, int]) -> tuple[Integers, Integers]:
    """Part the rows into 90 % and 10 %, leaving each class at least one row in the first part.

    Returns:
        Row numbers of the large and of the small part, each ascending; the small one is empty where
        no class has two rows.
    """
    spare = np.maximum(np.bincount(labels) - 1, 0)
    size = min(max(1, (len(labels) + 5) // 10), int(spare.sum()))
    small = _draw(labels, share_out(spare, size), seed)
    return np.setdiff1d(np.arange(len(labels)), small), small


def _draw(labels: Integers, shares: Integers, seed: tuple[int, int]) -> Integers:
    random = np.random.default_rng(seed)
    drawn = [random.permutation(np.flatnonzero(labels == label))[:share] for label, share in enumerate(shares)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)
