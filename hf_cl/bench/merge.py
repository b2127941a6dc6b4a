"""Merging three checkpoints of one base on disk: seconds, processor seconds and peak memory, beside mergekit.

Measured: `merge_checkpoints` with heads, on random float32 weights in shards of 150 MB, each merge in a process of
its own; the clock starts after the imports, and memory is the most anonymous memory from then on.

Against: mergekit, of this environment or of the one whose Python is given; the same merges under its names. Its TIES
trims each tensor by itself, ours all of them at once.

Floor: every model and the base is read once and the result written once: for P parameters and k models 4 (k + 2) P
bytes through the file system, or 4 (k + 1) P where the rule needs no base, at the rate of a copy at best. TIES over
all tensors reads the models twice, since it must know a threshold before it can trim. Memory: a piece of each model
and the result.
"""

import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import MODEL_MAPPING, BertConfig, BertForSequenceClassification

from hf_cl.bench._child import in_child, watched
from hf_cl.bench._measure import against, copy_rate, quartiles
from hf_cl.bench._models import plain
from hf_cl.bench._row import Row, Settings, Tell
from hf_cl.disk_merge.merge import merge_checkpoints
from hf_cl.errors import ConfigError

MODELS, TURNS = 3, 3
RULES: dict[str, dict[str, float]] = {"average": {}, "task_arithmetic": {"scale": 0.3}, "ties": {"density": 0.2}}
THEIRS: dict[str, dict[str, Any]] = {
    "average": {"method": "linear", "parameters": {}, "each": {}},
    "task_arithmetic": {"method": "task_arithmetic", "parameters": {"normalize": False, "lambda": 0.3}, "each": {}},
    "ties": {"method": "ties", "parameters": {"normalize": True}, "each": {"density": 0.2}},
}
READS = {"average": MODELS, "task_arithmetic": MODELS + 1, "ties": 2 * (MODELS + 1)}
"""Checkpoints that a rule reads at least."""
MERGEKIT, NONE = "mergekit", "mergekit (not installed: nothing was compared)"
FIGURES = {"seconds": "s", "cpu_seconds": "s", "peak_mb": "MB"}


def run(settings: Settings, tell: Tell) -> Iterator[Row]:
    """Yield seconds, processor seconds and peak memory of each rule."""
    python = rival(settings.mergekit_python)
    if python is None:
        tell("mergekit is not installed here: give its Python as --mergekit-python, or rows have no rival")
    for size in settings.models(("bert-base",)):
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            tell(f"{size}: writing a base and {MODELS} models")
            parameters = make(size, place)
            for rule in RULES:
                tell(f"{size}: {rule}")
                yield from _rows(size, rule, measure(rule, place, python, 1 if settings.quick else TURNS), parameters)


def rival(python: str | None) -> str | None:
    """Return the Python that has mergekit; None where there is none.

    Raises:
        ConfigError: The one that was given is no program.
    """
    if python is not None:
        if shutil.which(python) is None:
            raise ConfigError(f"--mergekit-python {python}: is no program. Give VENV/bin/python of one with mergekit.")
        return python
    return sys.executable if importlib.util.find_spec("mergekit") is not None else None


def _rows(size: str, rule: str, found: dict[str, list[dict[str, float]]], parameters: int) -> Iterator[Row]:
    under = {"model": size, "rule": rule, "models": MODELS, "device": "cpu"}
    moved = 4 * parameters * (READS[rule] + 1)
    floor = f"{moved / copy_rate('cpu'):.2f} s: {moved / 1e6:,.0f} MB read and written, at a copy's rate"
    for figure, unit in FIGURES.items():
        ours = [row[figure] for row in found["ours"]]
        theirs = [row[figure] for row in found.get(MERGEKIT, [])]
        compared = against(ours, theirs) if theirs else {"quartiles": quartiles(ours)}
        least = floor if unit == "s" else "a piece of each model and of the result"
        yield Row(
            "merge", f"{rule}, {figure.replace('_', ' ').replace('mb', 'memory')}", under, median(ours), unit, least,
            MERGEKIT if theirs else NONE, median(theirs) if theirs else None, **compared,
        )  # fmt: skip


def make(size: str, place: Path) -> int:
    """Write a base and models a little way from it; return the number of their parameters."""
    base: Any = plain(size)
    base.save_pretrained(place / "base", max_shard_size="150MB")
    generator = torch.Generator().manual_seed(0)
    for number in range(MODELS):
        model = BertForSequenceClassification(base.config)
        for name, weight in model.state_dict().items():
            held = base.state_dict()[name]
            if weight.is_floating_point():
                weight.copy_(held + 0.01 * torch.randn(held.shape, generator=generator))
        model.save_pretrained(place / f"model-{number}", max_shard_size="150MB")
    return sum(weight.numel() for weight in base.parameters())


def measure(rule: str, place: Path, python: str | None, count: int) -> dict[str, list[dict[str, float]]]:
    """Return the figures of each turn, by tool."""
    found: dict[str, list[dict[str, float]]] = {tool: [] for tool in ("ours", MERGEKIT)[: 2 if python else 1]}
    code = Path(__file__).with_name("_mergekit.py").read_text("utf-8")
    for _ in range(count):
        for tool, rows in found.items():
            out = place / tool
            if tool == "ours":
                done = in_child("merge", {"rule": rule, "place": str(place), "out": str(out)})
            else:
                asked = json.dumps({**THEIRS[rule], "models": MODELS})
                done = watched([str(python), "-c", code, str(place), str(out), asked], place=place)
            rows.append({**done.answer, "peak_mb": done.peak_mb})
            shutil.rmtree(out)
    return found


def child(rule: str, place: str, out: str) -> Callable[[], dict[str, float]]:
    """Return our merge, for a process of its own."""
    assert MODEL_MAPPING[BertConfig]  # what is imported late is imported now
    models = [Path(place) / f"model-{number}" for number in range(MODELS)]

    def work() -> dict[str, float]:
        began, spent = time.perf_counter(), time.process_time()
        merge_checkpoints(rule, Path(place) / "base", models, Path(out), options=RULES[rule], heads="merge")
        return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent}

    return work
