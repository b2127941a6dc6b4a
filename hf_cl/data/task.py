"""What a task is: its description (`TaskSpec`), and its checked rows (`Task`).

A `Task` is only ever made of checked data: every text is a string, every label has a name, and
no split is empty. What reads it needs no check of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from datasets import Dataset

from hf_cl.config import option
from hf_cl.errors import ConfigError

SPLITS = ("train", "validation", "test")
MEASURED = ("test", "validation")
# No path is ever made of a task's name; this keeps it one line in a table, a log and a terminal.
NAME = re.compile(r"\w[\w .-]*")


@dataclass(frozen=True)
class TaskSpec:
    """Where one task's rows are, which of them to take, and what their columns are called.

    Without a validation split, 10 % of train are carved out for it, stratified by class and seeded;
    the same happens where `test_split` names the split that `validation_split` would have been. A
    missing test split is an error, except for a single file, which has no splits: of it, 10 % become
    the test split first.

    Raises:
        ConfigError: A value can belong to no task, whatever its data are.
    """

    name: str = option(help="The task's name, unique in its stream.")
    dataset: str | None = option(None, help="Hub id, or local folder or file, relative to the recipe.")
    config: str | None = option(None, help="Name of the Hub data set's configuration.")
    data_files: Mapping[str, str] | None = option(
        None, help="Split -> local parquet, csv or jsonl file, relative to `dataset`, else to the recipe."
    )
    text: str = option("text", help="Column of the text.")
    text_pair: str | None = option(
        None, help="Column of a pair's second text; by default `text_pair` if there is such a column."
    )
    label: str = option("label", help="Column of the label.")
    labels: tuple[str, ...] | None = option(
        None, help="Names of the labels to keep, numbered in this order; all by default."
    )
    train_split: str = option("train", help="Split to learn from.")
    validation_split: str | None = option(
        "validation", help="Split to choose by; null carves 10 % out of train, as does its absence."
    )
    test_split: str = option("test", help="Split to measure on.")
    max_train: int | None = option(None, help="Most training rows to take, stratified by class.")
    max_validation: int | None = option(None, help="Most validation rows to take, stratified by class.")
    max_test: int | None = option(None, help="Most test rows to take, stratified by class.")
    seed: int = option(0, help="Seed of the rows taken and carved, not of the training.")

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(
                f"Task {self.name!r}: a name starts with a letter, digit or underscore, and goes on with "
                "these, blanks, dots and hyphens. Choose another."
            )
        _check_numbers(self)
        _check_splits(self)
        _check_columns(self)
        if self.labels is not None:
            _check_labels(self.name, self.labels)


def spec_values(spec: TaskSpec) -> dict[str, Any]:
    """Return what of a spec differs from the defaults, as plain JSON values that `read` takes back."""
    given = {field.name: getattr(spec, field.name) for field in fields(spec)}
    defaults = {field.name: field.default for field in fields(spec) if field.default is not MISSING}
    changed = {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()}


@dataclass(frozen=True, eq=False)
class Task:
    """One task's checked rows, ready to be tokenised.

    Attributes:
        name: The task's name.
        labels: Label names; a row's `label` is an index into them.
        train: Rows to learn from, with the columns `text`, `text_pair` for pairs, and `label`, a
            `ClassLabel` of `labels`.
        validation: Rows to choose by, with the same columns.
        test: Rows to measure on, with the same columns.
        source: Where the rows come from: a Hub id with its configuration, `local:<name>` or
            `memory`. It never holds a path, so it may be published.
    """

    name: str
    labels: tuple[str, ...]
    train: Dataset
    validation: Dataset
    test: Dataset
    source: str

    @property
    def pair(self) -> bool:
        """Whether a row is a pair of texts."""
        return "text_pair" in self.train.column_names

    @property
    def num_labels(self) -> int:
        """How many labels the task has."""
        return len(self.labels)


def measured_on(task: Task, split: str) -> Task:
    """Return a task that is measured on `split`: its test rows, or its validation rows in their place.

    What is chosen by looking at figures must not see test rows, and every part that measures reads `test`.

    Raises:
        ConfigError: `split` is neither.
    """
    if split not in MEASURED:
        raise ConfigError(f"split: {split!r} is not measured on. Choose {' or '.join(MEASURED)}.")
    return task if split == "test" else replace(task, test=task.validation)


def _check_numbers(spec: TaskSpec) -> None:
    for key, cap in zip(SPLITS, (spec.max_train, spec.max_validation, spec.max_test), strict=True):
        if cap is not None and cap < 1:
            raise ConfigError(
                f"Task {spec.name!r}: `max_{key}` is {cap}; give 1 or more, or leave it out for all rows."
            )
    if spec.seed < 0:
        raise ConfigError(f"Task {spec.name!r}: `seed` is {spec.seed}; give 0 or more.")


def _check_splits(spec: TaskSpec) -> None:
    for key, split in (("validation_split", spec.validation_split), ("test_split", spec.test_split)):
        if split == spec.train_split:
            raise ConfigError(
                f"Task {spec.name!r}: `train_split` and `{key}` are both {split!r}, so what is learned "
                "would be measured on itself. Name two splits."
            )


def _check_columns(spec: TaskSpec) -> None:
    columns = [spec.text, spec.label] if spec.text_pair is None else [spec.text, spec.text_pair, spec.label]
    if len(set(columns)) < len(columns):
        raise ConfigError(
            f"Task {spec.name!r}: `text`, `text_pair` and `label` name one column twice "
            f"({', '.join(columns)}). Name a column for each."
        )


def _check_labels(name: str, labels: tuple[str, ...]) -> None:
    for label in labels:
        if not isinstance(label, str):
            raise ConfigError(
                f"Task {name!r}: `labels` holds {label!r} ({type(label).__name__}), not a name. Put it in quotes."
            )
        if labels.count(label) > 1:
            raise ConfigError(f"Task {name!r}: `labels` holds {label!r} twice. List each label once.")
    if len(labels) < 2:
        raise ConfigError(f"Task {name!r}: `labels` holds {len(labels)} of the 2 or more that a task needs.")
