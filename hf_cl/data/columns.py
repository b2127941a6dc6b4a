"""Checks of the columns of one split, and its labels as numbers.

Checks read whole Arrow columns, never row by row, so a large data set costs no more than a scan.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from hf_cl.config import did_you_mean
from hf_cl.data.rows import Integers
from hf_cl.errors import DataError


def check_columns(dataset: Dataset, columns: Mapping[str, str], where: str) -> None:
    """Refuse a split without rows, or without one of the columns.

    Args:
        dataset: The split.
        columns: Option of the task -> column it names.
        where: What to call the split in an error.
    """
    for key, column in columns.items():
        if column not in dataset.column_names:
            found = ", ".join(dataset.column_names) or "none"
            raise DataError(f"{where}: there is no column {column!r} (found: {found}). Name the right one by `{key}`.")
    if len(dataset) == 0:
        raise DataError(f"{where}: it has no rows. Name another split, or give it rows.")


def check_texts(dataset: Dataset, column: str, where: str) -> None:
    """Refuse a row whose text is missing or is no string."""
    if not is_text(dataset, column):
        row, value = next((row, value) for row, value in enumerate(dataset[column]) if not isinstance(value, str))
    else:
        nulls = arrow(dataset, column)
        if nulls.null_count == 0:
            return
        row, value = int(np.argmax(nulls.is_null().to_numpy())), None
    raise DataError(
        f"{where}: row {row} (from 0) of column {column!r} is {reprlib.repr(value)} "
        f"({type(value).__name__}), not a string. Correct or drop such rows, or name another column."
    )


def label_names(
    splits: Mapping[str, Dataset], column: str, listed: tuple[str, ...] | None, where: str
) -> tuple[str, ...]:
    """Find the names of the labels.

    They stand in a `ClassLabel`, or in the list that came with the data; failing both, they are the
    sorted distinct strings of the train split.

    Args:
        splits: Split -> rows, among them `train`.
        column: Column of the label.
        listed: The names in `labels.json`, if there are any.
        where: What to call the task in an error.

    Raises:
        DataError: Two of these places disagree, labels have no names, or there are fewer than two.
    """
    named = {} if listed is None else {listed: "labels.json"}
    for split, dataset in splits.items():
        feature = dataset.features[column]
        if isinstance(feature, ClassLabel) and feature.names is not None:
            named.setdefault(tuple(feature.names), f"the ClassLabel of split {split!r}")
    if len(named) > 1:
        (first, one), (second, other) = list(named.items())[:2]
        raise DataError(
            f"{where}: {one} and {other} name the labels differently ({reprlib.repr(first)} and "
            f"{reprlib.repr(second)}). Correct one of them."
        )
    if named:
        names = next(iter(named))
    elif is_text(splits["train"], column):
        names = tuple(sorted(set(arrow(splits["train"], column).drop_null().to_pylist())))
    else:
        raise DataError(
            f"{where}: column {column!r} holds {_kind(splits['train'], column)} without names. Put a "
            'labels.json ({"label_names": [...]}) beside local files, make the column a '
            "ClassLabel, or name a column of strings by `label`."
        )
    if len(names) < 2:
        raise DataError(f"{where}: there is no task in {len(names)} label ({', '.join(names)}); give 2 or more.")
    return names


def label_codes(dataset: Dataset, column: str, names: tuple[str, ...], where: str) -> Integers:
    """Return each row's label as an index into `names`.

    Raises:
        DataError: A row has no label, or one without a name.
    """
    labels = arrow(dataset, column)
    if labels.null_count:
        row = int(np.argmax(labels.is_null().to_numpy()))
        raise DataError(f"{where}: row {row} (from 0) has no label (None). Drop the rows without one.")
    if is_text(dataset, column):
        codes = _codes_of_strings(labels, names)
    elif _is_integer(dataset.features[column]):
        codes = labels.to_numpy().astype(np.int64)
    else:
        raise DataError(
            f"{where}: column {column!r} holds {_kind(dataset, column)}, not labels. "
            "Name a column of integers or strings by `label`."
        )
    wrong = (codes < 0) | (codes >= len(names))
    if wrong.any():
        raise _unnamed(int(np.argmax(wrong)), labels, names, where)
    return codes


def choose_labels(
    names: tuple[str, ...], wanted: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], Integers]:
    """Return the labels of the task, and each old label's new index, -1 where it is left out.

    Raises:
        DataError: A wanted label does not exist.
    """
    chosen = names if wanted is None else wanted
    recode = np.full(len(names), -1, dtype=np.int64)
    for index, label in enumerate(chosen):
        if label not in names:
            raise DataError(f"{where}: `labels` holds {label!r}, which is no label.{did_you_mean(label, names)}")
        recode[names.index(label)] = index
    return chosen, recode


def is_text(dataset: Dataset, column: str) -> bool:
    """Whether Arrow holds the column as strings."""
    feature = dataset.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def arrow(dataset: Dataset, column: str) -> Any:
    """Return a column as a `pyarrow.ChunkedArray`."""
    return dataset.select_columns(column).with_format("arrow")[:].column(column)


def _is_integer(feature: Any) -> bool:
    if isinstance(feature, Value):
        return feature.dtype == "bool" or feature.dtype.startswith(("int", "uint"))
    return isinstance(feature, ClassLabel)


def _kind(dataset: Dataset, column: str) -> str:
    feature = dataset.features[column]
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__


def _codes_of_strings(labels: Any, names: tuple[str, ...]) -> Integers:
    values, inverse = np.unique(np.array(labels.to_pylist(), dtype=object), return_inverse=True)
    index = {name: code for code, name in enumerate(names)}
    return np.array([index.get(value, -1) for value in values], dtype=np.int64)[inverse]


def _unnamed(row: int, labels: Any, names: tuple[str, ...], where: str) -> DataError:
    value = labels[row].as_py()
    if isinstance(value, str):
        way_out = f"Correct it, or add it to labels.json or to train.{did_you_mean(value, names)}"
    elif value == -1:
        way_out = "-1 marks rows without a label: drop them, or name a labelled split (`test_split: validation`)."
    else:
        way_out = f"Labels count from 0 to {len(names) - 1}: correct the row, or complete the names."
    return DataError(
        f"{where}: row {row} (from 0) has label {value!r}, which is none of the {len(names)} names. {way_out}"
    )
