"""Choosing options as the protocol says: on validation rows of the first two tasks, the same for every method."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_cl import plugins
from hf_cl.config import read
from hf_cl.data import Task, measured_on
from hf_cl.errors import TrainingError
from hf_cl.from_recipe import build_learner
from hf_cl.recipe import Checked

TUNING_TASKS = 2
Progress = Callable[[str], None]


def tune(recipe: Checked, tasks: Sequence[Task], progress: Progress) -> tuple[Checked, dict[str, Any]]:
    """Choose options on the validation rows of the stream's first two tasks, one key after another.

    Args:
        recipe: Its `tuning` block gives the keys and values; a key keeps its best value for the next.
        tasks: The stream's tasks; only the first two are looked at, and never their test rows.
        progress: Told each trial.

    Returns:
        The recipe with the chosen values, and the grid with its outcome.
    """
    trials: list[dict[str, Any]] = []
    seen: dict[str, float] = {}
    chosen: dict[str, Any] = {}
    for key, values in recipe.tuning.items():
        scores = []
        for value in values:
            trial = {**chosen, key: value}
            name = json.dumps(trial, sort_keys=True)
            if name not in seen:
                found = _score(apply(recipe, trial), tasks[:TUNING_TASKS])
                trials.append({"options": trial, "validation_accuracy": found})
                progress(
                    f"tuning {name}: validation accuracy {'none, it diverged' if found is None else f'{found:.4f}'}"
                )
                seen[name] = -1.0 if found is None else found
            scores.append(seen[name])
        chosen[key] = values[scores.index(max(scores))]
    names = [task.name for task in tasks[:TUNING_TASKS]]
    return apply(recipe, chosen), {"tasks": names, "split": "validation", "trials": trials, "chosen": chosen}


def apply(recipe: Checked, values: Mapping[str, Any]) -> Checked:
    """Return a recipe with dotted `method.` and `training.` keys set."""
    module = plugins.load("methods", recipe.method)
    options, training = asdict(recipe.options), dict(recipe.training)
    for key, value in values.items():
        block, _, name = key.partition(".")
        if block == "training":
            training[name] = value
        else:
            options[name] = value
    return replace(recipe, options=read(module.Options, options, "recipe.tuning"), training=training)


def _score(recipe: Checked, tasks: Sequence[Task]) -> float | None:
    """Return the mean validation accuracy of the tasks after the last of them is learned; None where it diverged."""
    with tempfile.TemporaryDirectory() as scratch:
        learner = build_learner(recipe, Path(scratch))
        try:
            for task in tasks:
                learner.learn(measured_on(task, "validation"))
        except TrainingError:
            return None
    return float(learner.matrix.average_accuracy or 0.0)
