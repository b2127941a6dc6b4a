"""What a task costs as a stream grows to 100 small tasks: seconds and memory to learn one.

Measured: `ContinualLearner` learns tasks of seeded texts, 64 training texts of 16 words each, 8 steps of 8, with
`supsup` and `exssnet`, and writes each finished one into a run folder as `hf-cl train` does, so finished tasks are on
the shelf. Seconds go from before `learn` to after its files are written. Earlier tasks are not evaluated again: that
is work of the evaluation, one task's for each earlier task, and counted with no task's learning here. Memory is the
most anonymous memory while a task is learned, above what the process held after its imports. The model has MiniLM's
shape by default, so what grows is held against a task of ordinary size; BERT-base has eight times its masked weights.

Against: itself. The medians of tasks 2 to 6 and of 95 to 100, and besides task 2 and task 100 alone.

Floor: 1. Learning a task needs the base, what owns each entry, and the one task that is loaded. What must grow is the
bank's manifest, 1.3 kB a task, written whole after each one; and for KKT, which asks every earlier task where its
texts lie, one comparison of 512 features each.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_cl import plugins
from hf_cl.bench._child import in_child
from hf_cl.bench._measure import Peak, in_use, quartiles
from hf_cl.bench._models import VOCABULARY, plain, tokenizer
from hf_cl.bench._row import Mark, Row, Settings, Tell
from hf_cl.data import Task, task_from_datasets
from hf_cl.layers.base import Base
from hf_cl.learner import ContinualLearner
from hf_cl.storage.run_folder import RunFolder

METHODS = ("supsup", "exssnet")
TASKS, QUICK_TASKS = 100, 4
EARLY, LATE = slice(1, 6), slice(94, 100)
WORDS, LENGTH, CLASSES = 400, 16, 2
ROWS = {"train": 64, "validation": 4, "test": 4}
FLOOR = "1, and the manifest's 1.3 kB a task"


class Learner(ContinualLearner):
    """Learns as any; after a task only that task is evaluated."""

    def _unchanged(self) -> dict[str, dict[str, Any]]:
        return dict(self.records[-2]["metrics"]) if len(self.records) > 1 else {}


def run(settings: Settings, tell: Tell) -> Iterator[Row]:
    """Yield the growth of seconds and of memory, by method."""
    tasks = QUICK_TASKS if settings.quick else TASKS
    for size in settings.models(("minilm",)):
        for method in METHODS:
            tell(f"{size}, {method}: {tasks} tasks")
            found = in_child("stream", {"size": size, "method": method, "tasks": tasks, "device": settings.device})
            under = {"model": size, "method": method, "tasks": tasks, "device": settings.device}
            yield from _rows(under, found.answer)


def _rows(under: dict[str, Any], found: dict[str, list[float]]) -> Iterator[Row]:
    early, late = (EARLY, LATE) if under["tasks"] == TASKS else (slice(1, 2), slice(-1, None))
    for what, unit in (("seconds", "s"), ("memory", "MB")):
        first, last = found[what][early], found[what][late]
        ends = [found[what][1], found[what][-1]]
        yield Row(
            "stream", f"{what} to learn a task, late", under, median(last), unit, FLOOR, "early (medians)",
            median(first), median(last) / median(first),
            quartiles([value / median(first) for value in last]), mark=Mark(1.10),
        )  # fmt: skip
        yield Row(
            "stream", f"{what} to learn task {under['tasks']}", under, ends[1], unit, FLOOR, "task 2", ends[0],
            ends[1] / ends[0],
        )  # fmt: skip


def child(size: str, method: str, tasks: int, device: str) -> Callable[[], dict[str, list[float]]]:
    """Return what learns a stream in a process of its own."""
    words = WORDS if VOCABULARY[size] > WORDS + 5 else VOCABULARY[size] - 5
    imported = in_use(device)
    base = Base(plain(size, labels=CLASSES), tokenizer(words), "random", ("classifier",))
    streamed = [task(number, words) for number in range(tasks)]
    options = plugins.load("methods", method).Options()

    def work() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"seconds": [], "memory": []}
        with tempfile.TemporaryDirectory() as place:
            args = TrainingArguments(
                place, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-3, save_strategy="no",
                report_to=[], disable_tqdm=True, logging_strategy="no", use_cpu=device == "cpu",
            )  # fmt: skip
            learner = Learner(base, None, options, args, max_length=LENGTH, evaluate="changed")
            folder = RunFolder.create(Path(place) / "run", learner.header())
            for one in streamed:
                with Peak(device) as peak:
                    began = time.perf_counter()
                    learner.learn(one)
                    learner.add_to(folder)
                    found["seconds"].append(time.perf_counter() - began)
                found["memory"].append((peak.most - imported) / 1e6)
        return found

    return work


def task(number: int, words: int) -> Task:
    """Return a task whose class is told by one of two words among random ones; always the same for a number."""
    generator = torch.Generator().manual_seed(number)
    splits = {}
    for split, count in ROWS.items():
        drawn = torch.randint(words, (count, LENGTH - 1), generator=generator).tolist()
        labels = [row % CLASSES for row in range(count)]
        texts = [
            " ".join(f"w{word}" for word in ((number + label) % words, *row))
            for label, row in zip(labels, drawn, strict=True)
        ]
        splits[split] = Dataset.from_dict({"text": texts, "label": [f"class {label}" for label in labels]})
    return task_from_datasets(f"task {number}", splits)
