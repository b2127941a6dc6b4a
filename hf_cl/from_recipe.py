"""From a checked recipe to a learner with a loaded base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_cl import ranks
from hf_cl.errors import ConfigError
from hf_cl.layers.base import load_base
from hf_cl.learner import ContinualLearner
from hf_cl.recipe import Checked
from hf_cl.training.evaluation import ComputeMetrics


def build_learner(recipe: Checked, output_dir: Path, compute_metrics: ComputeMetrics | None = None) -> ContinualLearner:
    """Return a learner that has learned nothing yet.

    Args:
        recipe: A checked recipe.
        output_dir: Below it the Trainer keeps its files, in `trainer/`.
        compute_metrics: The user's own metrics.
    """
    base = load_base(recipe.model.name, dtype=recipe.model.dtype, head=recipe.model.head)
    args = training_arguments(recipe.training, output_dir / "trainer")
    return ContinualLearner(
        base,
        None,
        recipe.options,
        args,
        max_length=recipe.max_length,
        compute_metrics=compute_metrics,
        evaluate=recipe.evaluate,
        check_steps=recipe.check_steps,
        routing=recipe.routing,
    )


def training_arguments(training: Mapping[str, Any], output_dir: Path) -> TrainingArguments:
    """Return TrainingArguments of a recipe: nothing is saved or reported unless it asks for it.

    Raises:
        ConfigError: transformers refuses a value.
    """
    defaults = {"save_strategy": "no", "report_to": [], "logging_steps": 20, "per_device_eval_batch_size": 64}
    defaults["ddp_timeout"] = ranks.TIMEOUT
    try:
        return TrainingArguments(output_dir=str(output_dir), **{**defaults, **training})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"recipe.training: {error}") from error
