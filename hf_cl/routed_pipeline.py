"""A transformers text-classification pipeline for texts whose task nobody names: it finds each text's own.

A batch of texts of many tasks is routed by one call of the router, and answered by one mixed batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TextClassificationPipeline

from hf_cl.errors import ConfigError
from hf_cl.routing import Inputs, Router
from hf_cl.tuner import MaskModel
from hf_cl.tuner.mixed import run_mixed


@dataclass(frozen=True)
class Served:
    """A task as a routed answer needs it: its name, its labels, and the adapter that answers."""

    name: str
    labels: Sequence[str]
    adapter: str


def answer(tuner: MaskModel, tasks: Sequence[Served], chosen: Tensor, inputs: Inputs) -> Tensor:
    """Return each text's logits by the task chosen for it; a narrower task's row ends in -inf.

    Args:
        tuner: The masked model with all tasks attached, in evaluation mode.
        tasks: The tasks.
        chosen: (n,) int64, a position in `tasks` a text.
        inputs: The texts, on the model's device.
    """
    output: Any = run_mixed(tuner, [tasks[place].adapter for place in chosen.tolist()], (), dict(inputs))
    logits: Tensor = output.logits.float()
    return logits


def require_threshold(threshold: float | None) -> None:
    """Refuse a threshold that no confidence can be compared with.

    Raises:
        ConfigError: It is no number in [0, 1].
    """
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is not None and not (number and math.isfinite(threshold) and 0 <= threshold <= 1):
        raise ConfigError(
            f"threshold: {threshold!r} is no share from 0 to 1. Confidences are; None answers every text."
        )


class RoutedPipeline(TextClassificationPipeline):
    """Answers with `task`, `label`, `score` and the router's `confidence`; all but the last None for none of these."""

    def __init__(
        self, *args: Any, tuner: MaskModel, tasks: Sequence[Served], router: Router, threshold: float | None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Take what `TextClassificationPipeline` takes, and the way to the task.

        Args:
            args: Passed on.
            tuner: The masked model around the pipeline's, with all tasks attached.
            tasks: The tasks, in the router's order.
            router: Chooses.
            threshold: Confidence below which a text belongs to none of the tasks; None answers every text.
            kwargs: Passed on.

        Raises:
            ConfigError: The threshold is no share.
        """
        require_threshold(threshold)
        self._tuner, self._tasks, self._router, self._threshold = tuner, list(tasks), router, threshold
        super().__init__(*args, **kwargs)

    def _sanitize_parameters(self, function_to_apply: Any = None, **kwargs: Any) -> Any:
        if function_to_apply is not None:
            raise ConfigError("function_to_apply: a routed score is the softmax over its task's labels. Leave it out.")
        return super()._sanitize_parameters(**kwargs)

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:
        """Tokenise a text.

        Raises:
            ConfigError: It gives no token at all.
        """
        encoded = super().preprocess(inputs, **tokenizer_kwargs)
        if not encoded["input_ids"].shape[-1]:
            raise ConfigError("text: is empty, and this tokenizer puts no token of its own around it. Leave it out.")
        return encoded

    def _forward(self, model_inputs: Any) -> Any:
        inputs = {name: value for name, value in model_inputs.items() if isinstance(value, Tensor)}
        confidence, chosen = self._router.confidences(inputs).max(1)
        return {"logits": answer(self._tuner, self._tasks, chosen, inputs), "chosen": chosen, "confidence": confidence}

    def postprocess(self, model_outputs: Any, top_k: int | None = 1, _legacy: bool = True, **kwargs: Any) -> Any:
        """Put one text's answer into words."""
        confidence, task = model_outputs["confidence"][0].item(), self._tasks[int(model_outputs["chosen"][0])]
        if self._threshold is not None and confidence < self._threshold:
            found = [{"task": None, "label": None, "score": None, "confidence": confidence}]
        else:
            scores, order = (
                model_outputs["logits"][0, : len(task.labels)].softmax(-1).sort(descending=True, stable=True)
            )
            found = [
                {"task": task.name, "label": task.labels[place], "score": score, "confidence": confidence}
                for score, place in zip(scores.tolist(), order.tolist(), strict=True)
            ]
        return found[0] if top_k == 1 and _legacy else found[:top_k]
