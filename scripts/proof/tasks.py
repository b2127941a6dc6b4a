"""Many small tasks out of a few data sets: each a group of labels, and rows that no other task has.

Groups of labels take turns: a first task of each, then a second one of each, both in a seeded order. Written as files,
the tasks are a stream that any recipe can name.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf_cl.data import Task, TaskSpec, load_task
from hf_cl.data.rows import Integers, stratified
from hf_cl.data.task import SPLITS
from hf_cl.errors import DataError

ROWS = {"train": 64, "validation": 8, "test": 32}
MOST_LABELS = 5
"""Labels of a task; a data set with more of them is cut by labels, too."""

Rows = dict[str, list[dict[str, str]]]


def cut(data: Path, count: int, out: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Write tasks as folders of JSON lines; return name, folder and the sha256 of the content of each.

    Args:
        data: Folder of data sets, each a folder with a train file; `$HF_CL_DATA`.
        count: How many tasks.
        out: Where their folders go, numbered from 0.
        seed: Of the order, and of the rows that are drawn.

    Raises:
        DataError: A data set cannot be read, or there is not enough for so many tasks.
    """
    folders = sorted(folder for folder in data.iterdir() if folder.is_dir() and any(folder.glob("train.*")))
    lines = [line for folder in folders for line in _lines(folder, seed)]
    order, made = np.random.default_rng(seed), []
    while lines and len(made) < count:
        lines = [lines[place] for place in order.permutation(len(lines))]
        drawn = [next(line, None) for line in lines]
        lines = [line for line, piece in zip(lines, drawn, strict=True) if piece is not None]
        made += [piece for piece in drawn if piece is not None]
    if len(made) < count:
        raise DataError(
            f"{data}: its {len(folders)} data sets give {len(made)} tasks of {sum(ROWS.values())} rows each, {count} "
            f"were asked for. Ask for fewer, or add data sets."
        )
    return [_write(out / f"{number:03d}", *piece) for number, piece in enumerate(made[:count])]


def _lines(folder: Path, seed: int) -> list[Iterator[tuple[str, list[str], Rows]]]:
    """Return a data set's groups of labels, each as an iterator over its tasks."""
    task = load_task(TaskSpec(folder.name, dataset=str(folder.resolve())))
    groups = np.array_split(np.arange(task.num_labels), -(-task.num_labels // MOST_LABELS))
    names = [f" labels {group[0] + 1}-{group[-1] + 1}" if len(groups) > 1 else "" for group in groups]
    return [_pieces(task, f"{task.name}{name}", group, seed) for name, group in zip(names, groups, strict=True)]


def _pieces(task: Task, name: str, group: Integers, seed: int) -> Iterator[tuple[str, list[str], Rows]]:
    """Yield name, labels and rows of one task after another, until a split has too few rows left."""
    held = {split: np.array(getattr(task, split)["label"]) for split in SPLITS}
    left = {split: np.flatnonzero(np.isin(held[split], group)) for split in SPLITS}
    labels = [task.labels[label] for label in group]
    for part in itertools.count(1):
        short = any(len(left[split]) < ROWS[split] for split in SPLITS)
        if short or len(np.unique(held["train"][left["train"]])) < len(group):
            return
        taken = {}
        for number, split in enumerate(SPLITS):
            chosen = stratified(held[split][left[split]], ROWS[split], (seed, number))
            rows = getattr(task, split).select(left[split][chosen])
            taken[split] = [{**row, "label": task.labels[row["label"]]} for row in rows]
            left[split] = np.delete(left[split], chosen)
        yield f"{name} part {part}", labels, taken


def _write(place: Path, name: str, labels: list[str], splits: Rows) -> dict[str, Any]:
    place.mkdir(parents=True, exist_ok=True)
    files = {"labels.json": json.dumps(labels)}
    files |= {f"{split}.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows) for split, rows in splits.items()}
    seen = hashlib.sha256()
    for file, content in files.items():
        (place / file).write_text(content, "utf-8")
        seen.update(content.encode())
    return {"name": name, "dataset": str(place.resolve()), "sha256": seen.hexdigest()}
