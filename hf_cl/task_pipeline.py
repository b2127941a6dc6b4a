"""A transformers text-classification pipeline bound to one task of a model that holds several."""

from typing import Any

from transformers import TextClassificationPipeline

from hf_cl.tuner import MaskModel


class TaskPipeline(TextClassificationPipeline):
    """Answers with one task, whichever was active before: two of these can share one model, and take turns.

    The task is made active before each batch and before each answer is put into words, since a pipeline over a
    generator is worked off piece by piece.
    """

    def __init__(self, *args: Any, tuner: MaskModel, adapter: str, **kwargs: Any) -> None:
        """Take what `TextClassificationPipeline` takes, and the task.

        Args:
            args: Passed on.
            tuner: The masked model around the pipeline's.
            adapter: The task's adapter.
            kwargs: Passed on.
        """
        self._tuner, self._adapter = tuner, adapter
        super().__init__(*args, **kwargs)

    def _activate(self) -> None:
        if self._tuner.active_adapters != [self._adapter]:
            self._tuner.set_adapter(self._adapter, inference_mode=True)

    def _forward(self, model_inputs: Any) -> Any:
        self._activate()
        return super()._forward(model_inputs)

    def postprocess(self, *args: Any, **kwargs: Any) -> Any:
        """Name the task's own labels."""
        self._activate()
        return super().postprocess(*args, **kwargs)
