"""How fast each task of a stream is learned: accuracy on validation rows along the steps, and the way to 99 % of it.

run: python scripts/bench_learning.py OUT.jsonl RECIPE [key=value ...]     (a row a task; HF_CL_DATA as for the recipe)
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_cl.data import load_task, read_stream
from hf_cl.from_recipe import build_learner
from hf_cl.recipe import data_dir, load
from hf_cl.train_stream import stream_name

POINTS = 24
"""Evaluations a task, at equal distances: an eighth, a quarter and a half are among them."""
GOAL = 0.99


class Curve(TrainerCallback):
    """Keeps accuracy and seconds of training, without the evaluations', at each evaluation."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the task before, and start the clock."""
        self.points: list[tuple[int, float, float]] = []
        self.evaluating = 0.0
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when training paused."""
        self.paused = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Take a point."""
        self.points.append((state.global_step, metrics["eval_accuracy"], self.paused - self.began - self.evaluating))
        self.evaluating += time.perf_counter() - self.paused


def measure(recipe_name: str, overrides: list[str], also: tuple[TrainerCallback, ...] = ()) -> list[dict[str, Any]]:
    """Learn the recipe's stream, with more callbacks if need be, and return a row a task."""
    evaluations = ["training.eval_strategy=steps", f"training.eval_steps={1 / POINTS}", "evaluate=changed"]
    recipe = load(recipe_name, [*evaluations, *overrides])
    tasks = [load_task(spec, recipe.root) for spec in read_stream(recipe.stream, data_dir=data_dir(), root=recipe.root)]
    curve, rows = Curve(), []
    with tempfile.TemporaryDirectory() as scratch:
        learner = build_learner(recipe, Path(scratch))
        learner.callbacks = (*also, curve)
        for task in tasks:
            record = learner.learn(task)
            steps, accuracies, seconds = (list(column) for column in zip(*curve.points, strict=True))
            goal = GOAL * accuracies[-1]
            reached = next(place for place, value in enumerate(accuracies) if value >= goal)
            rows.append(
                {
                    "recipe": recipe_name,
                    "stream": stream_name(recipe.stream),
                    "method": recipe.method,
                    "options": asdict(recipe.options),
                    "seed": learner.args.seed,
                    "bf16": learner.args.bf16,
                    "task": task.name,
                    "number": len(rows),
                    "steps": steps,
                    "accuracy": accuracies,
                    "seconds": [round(value, 2) for value in seconds],
                    "steps_to_goal": steps[reached],
                    "seconds_to_goal": round(seconds[reached], 2),
                    "test_accuracy": record["metrics"][task.name]["accuracy"],
                    "kkt": record["facts"].get("kkt"),
                }
            )
            print(f"{task.name}: {accuracies[-1]:.4f}, {GOAL:.0%} of it after {steps[reached]} of {steps[-1]} steps")
    return rows


if __name__ == "__main__":
    out, recipe_, *rest = sys.argv[1:]
    found = measure(recipe_, rest)
    with Path(out).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)
