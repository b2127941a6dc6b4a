"""From raw splits to a `Task`: check all of them, number the labels, carve, cut, and name columns.

Texts stay where they are (memory-mapped on disk, for files and the Hub); a task adds one integer
column and a list of row numbers. So ten tasks cut from one data set do not cost ten copies.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
from datasets import ClassLabel, Dataset

from hf_cl.data.columns import check_columns, check_texts, choose_labels, label_codes, label_names
from hf_cl.data.rows import Integers, carve, stratified
from hf_cl.data.task import SPLITS, Task, TaskSpec
from hf_cl.errors import DataError


def build(spec: TaskSpec, splits: Mapping[str, Dataset], listed: tuple[str, ...] | None, source: str) -> Task:
    """Make the task of its raw splits.

    Args:
        spec: What to take.
        splits: Rows by part: `train`, and where they exist `validation` and `test`.
        listed: The label names in `labels.json`, if there are any.
        source: Where the rows come from; goes into the task as it is.

    Raises:
        DataError: The rows are not what the task says; no split has been changed or written.
    """
    where = _where(spec)
    splits = {part: splits[part] for part in SPLITS if part in splits}
    columns = _columns(spec, splits["train"])
    for part, dataset in splits.items():
        check_columns(dataset, columns, where[part])
        for key, column in columns.items():
            if key != "label":
                check_texts(dataset, column, where[part])
    task = f"Task {spec.name!r}"
    names = label_names(splits, spec.label, listed, task)
    labels, recode = choose_labels(names, spec.labels, task)
    codes = {part: recode[label_codes(dataset, spec.label, names, where[part])] for part, dataset in splits.items()}
    rows = _rows(spec, codes)
    made = {}
    for part in SPLITS:
        origin = part if part in splits else "train"
        made[part] = _finish(splits[origin], columns, codes[origin], rows[part], labels)
    return Task(spec.name, labels, made["train"], made["validation"], made["test"], source)


def _where(spec: TaskSpec) -> dict[str, str]:
    names = (spec.train_split, spec.validation_split, spec.test_split)
    return {part: f"Task {spec.name!r}, split {name!r}" for part, name in zip(SPLITS, names, strict=True)}


def _columns(spec: TaskSpec, train: Dataset) -> dict[str, str]:
    pair = spec.text_pair
    if pair is None and "text_pair" in set(train.column_names) - {spec.text, spec.label}:
        pair = "text_pair"
    columns = {"text": spec.text} if pair is None else {"text": spec.text, "text_pair": pair}
    return {**columns, "label": spec.label}


def _rows(spec: TaskSpec, codes: Mapping[str, Integers]) -> dict[str, Integers]:
    """Choose the rows of each part as numbers of its origin; a part that is carved has train's."""
    rows, where = {}, _where(spec)
    for part, labels in codes.items():
        rows[part] = np.flatnonzero(labels >= 0)
        if len(rows[part]) == 0:
            raise DataError(
                f"{where[part]}: none of its {len(labels)} rows has one of the labels in `labels`. "
                "Choose other labels, or another split."
            )
    # Test first: its rows must not depend on whether a validation split exists.
    for number, part in ((2, "test"), (1, "validation")):
        if part not in rows:
            large, small = carve(codes["train"][rows["train"]], (spec.seed, number))
            if len(small) == 0:
                raise DataError(
                    f"{where['train']}: its {len(rows['train'])} rows are too few to carve a {part} split "
                    f"out of. Give more rows, or name a split by `{part}_split`."
                )
            rows["train"], rows[part] = rows["train"][large], rows["train"][small]
    for number, (part, cap) in enumerate(
        zip(SPLITS, (spec.max_train, spec.max_validation, spec.max_test), strict=True)
    ):
        labels = codes[part if part in codes else "train"][rows[part]]
        rows[part] = rows[part][stratified(labels, cap, (spec.seed, number))]
    return rows


def _finish(
    dataset: Dataset, columns: Mapping[str, str], codes: Integers, rows: Integers, labels: tuple[str, ...]
) -> Dataset:
    """Return the chosen rows with the columns of a task.

    Fingerprints are of content alone (the rows' origin, labels and numbers), so that whatever is
    computed from the task is found again in the cache of `datasets`, in this process and the next.
    """
    numbered = _digest(dataset._fingerprint, *columns.values(), *labels, _content(codes))
    texts = {column: key for key, column in columns.items() if key != "label"}
    made = dataset.with_format(None).select_columns(list(texts)).rename_columns(texts)
    made = made.add_column("label", codes, feature=ClassLabel(names=list(labels)), new_fingerprint=numbered)
    if len(rows) == len(codes):
        return made
    return made.select(rows, new_fingerprint=_digest(numbered, _content(rows)))


def _content(numbers: Integers) -> str:
    return hashlib.sha256(numbers.tobytes()).hexdigest()


def _digest(*parts: str) -> str:
    """Hash strings so that no two lists of them run into each other."""
    return hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()
