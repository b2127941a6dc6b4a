"""Each task fine-tuned from the base, and after each one encoder merged of all so far: merging as a way to learn.

Every task keeps its head. The tasks' own encoders are kept to merge again when the next task comes (`bytes_carried` in
the results); to answer, the merged one is enough. The coefficient is chosen after each task on the validation rows of
all tasks so far, unless it is given. Rows of earlier tasks are more than sequential methods look at; but a coefficient
that was chosen once, on two tasks, would do merging wrong, as the best one falls with the number of tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict

from hf_cl.errors import DataError
from hf_cl.layers.task_heads import require_same_shapes
from hf_cl.merging.task_arithmetic import task_arithmetic
from hf_cl.training.evaluation import evaluate
from hf_cl.training.method import Tensors
from hf_cl.training.whole_encoder import Lesson, SharedEncoder, Way

Merge = Callable[[Tensors, Sequence[Tensors], float], Tensors]
"""Takes the base, the tasks' encoders and the coefficient."""


@dataclass(frozen=True)
class Choice:
    """How the coefficient was come by.

    Attributes:
        coefficient: What was taken.
        accuracies: Mean validation accuracy of the tasks so far at each that was tried; empty where it was given.
    """

    coefficient: float
    accuracies: Mapping[float, float]


class MergedWay(Way):
    """Merges what each task learned from the base."""

    from_base = True

    def __init__(self, merge: Merge, grid: Sequence[float]) -> None:
        """Choose the rule.

        Args:
            merge: The rule. What it gives lies on the line from the base through what it gives for 1.
            grid: The coefficients to choose among on validation rows; a single one is taken as it is.
        """
        self.merge, self.grid = merge, tuple(grid)
        self.models: dict[int, Tensors] = {}
        self.choices: dict[int, Choice] = {}
        self.validation: dict[int, Dataset] = {}
        self._lesson: Lesson | None = None

    def rows(self, method: SharedEncoder, index: int, lesson: Lesson) -> Dataset:
        """Keep the validation rows; require those of the earlier tasks.

        Raises:
            DataError: They are not here.
        """
        missing = [str(task) for task in range(index) if task not in self.validation]
        if missing and len(self.grid) > 1:
            raise DataError(
                f"the validation rows of the tasks number {', '.join(missing)} are not here, and the coefficient is "
                f"chosen on those of all tasks. Give them with `remember`, or give the coefficient."
            )
        self._lesson, self.validation[index] = lesson, lesson.rows["validation"]
        return super().rows(method, index, lesson)

    def finish(self, method: SharedEncoder, index: int) -> None:
        """Keep the task's own encoder, and put the merged one in its place."""
        self.models[index] = method.on_cpu()
        models = [self.models[task] for task in range(index + 1)]
        self.choices[index] = self._choose(method, models)
        method.put(self.merge(method.start, models, self.choices[index].coefficient))
        self._lesson = None

    def _choose(self, method: SharedEncoder, models: Sequence[Tensors]) -> Choice:
        if len(self.grid) == 1:
            return Choice(self.grid[0], {})
        whole, found = self.merge(method.start, models, 1.0), {}
        for coefficient in self.grid:
            method.put(task_arithmetic(method.start, [whole], coefficient))
            found[coefficient] = self._accuracy(method, len(models))
        return Choice(max(found, key=lambda coefficient: found[coefficient]), found)

    def _accuracy(self, method: SharedEncoder, tasks: int) -> float:
        assert self._lesson is not None
        total = 0.0
        for task in range(tasks):
            method.heads.show(task)
            measured = evaluate(method.model, self.validation[task], self._lesson.collator, self._lesson.args)
            total += float(measured.correct.mean())
        return total / tasks

    def abandon(self, method: SharedEncoder, index: int) -> None:
        """Forget the task's encoder."""
        for kept in (self.models, self.choices, self.validation):
            kept.pop(index, None)
        self._lesson = None

    def facts(self, index: int) -> dict[str, Any]:
        """Return the coefficient, and what was tried."""
        choice = self.choices.get(index)
        if choice is None:
            return {}
        tried = {f"{coefficient:g}": round(value, 6) for coefficient, value in choice.accuracies.items()}
        return {"coefficient": choice.coefficient, "validation_accuracy": tried}

    def carried(self, index: int) -> dict[str, Tensors]:
        """Return the task's own encoder."""
        return {"encoder": self.models[index]}

    def restore_carried(self, method: SharedEncoder, index: int, carried: Mapping[str, Tensors]) -> None:
        """Take back the task's own encoder."""
        model = carried.get("encoder", {})
        require_same_shapes(method.encoder(), model, f"task {index}: its own encoder")
        self.models[index] = model

    def remember(self, index: int, rows: DatasetDict) -> None:
        """Take back a restored task's validation rows."""
        self.validation[index] = rows["validation"]
