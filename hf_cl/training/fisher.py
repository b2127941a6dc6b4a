"""The diagonal of the Fisher information: how much a model's answers depend on each weight.

    F_i = mean over rows of (d log p(y | x) / d theta_i)^2

The square is of one row's gradient, never of a batch's mean, which would be smaller by up to the batch's size. With
`labels="data"`, y is the row's label (the empirical Fisher, what most people use); with `labels="model"`, the square
is the mean over all labels by the model's own probabilities, the Fisher itself, at a backward pass for each label.

Source: EWC, arXiv 1612.00796; the difference between the two: Kunstner et al., arXiv 1905.12558.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from hf_cl import ranks
from hf_cl.errors import TrainingError

LABELS = ("data", "model")


def fisher(
    model: nn.Module, names: Iterable[str], rows: Dataset, collator: Any, *, labels: str = "data"
) -> dict[str, Tensor]:
    """Return the diagonal Fisher of a classifier, in evaluation mode, one row at a time.

    Several processes share the rows among them, and all get the same result.

    Args:
        model: Gives `logits`; left as it was found.
        names: The parameters to look at.
        rows: Tokenised rows with `labels`.
        collator: Makes a batch of one row.
        labels: `data` or `model`.

    Returns:
        By name, float32, of the parameter's shape and on its device; at least 0.

    Raises:
        TrainingError: A gradient is not finite.
    """
    named = dict(model.named_parameters())
    parameters = {name: named[name] for name in names}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    rank, processes = ranks.rank(), ranks.world()
    was_training = model.training
    model.eval()
    try:
        for number in range(rank, len(rows), processes):
            for probability, log_probability in _answers(model, collator([rows[number]]), labels):
                grads = torch.autograd.grad(
                    log_probability, list(parameters.values()), retain_graph=True, allow_unused=True
                )
                for total, grad in zip(sums.values(), grads, strict=True):
                    if grad is not None:
                        total.addcmul_(grad.float(), grad.float(), value=probability)
    finally:
        model.train(was_training)
    for total in sums.values():
        if processes > 1:
            torch.distributed.all_reduce(total)
        total /= len(rows)
    bad = [name for name, total in sums.items() if not bool(total.isfinite().all())]
    if bad:
        raise TrainingError(
            f"fisher: that of {bad[0]} is not finite. Nothing of this task is kept. Lower the learning rates, or look "
            f"for texts that give infinite logits."
        )
    return sums


def _answers(model: nn.Module, batch: Any, labels: str) -> Sequence[tuple[float, Tensor]]:
    """Return, for one row, the labels' weights and their log-probabilities."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    label = int(inputs.pop("labels"))
    logs = model(**inputs).logits.float().log_softmax(-1)[0]
    if labels == "data":
        return [(1.0, logs[label])]
    return list(zip(logs.detach().exp().tolist(), logs, strict=True))
