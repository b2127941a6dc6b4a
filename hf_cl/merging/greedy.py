"""A greedy model soup: the best model, then every other that does not make the mean worse.

Models are tried from the best to the worst. As in the paper, one stays in when the score of the mean does not drop; the
released script wants it to rise. The result scores at least as high as the best single model on the rows that `score`
looks at, so these must not be the test rows. It takes a function, so it is no rule of `hf-cl merge`.

Source: model soups, arXiv 2203.05482, recipe 1.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from hf_cl.errors import MergeError
from hf_cl.merging._check import Tensors, require_models
from hf_cl.merging.average import average


def greedy(models: Sequence[Tensors], score: Callable[[Tensors], float]) -> dict[str, Tensor]:
    """Return the mean of the models that a greedy search keeps.

    Args:
        models: At least one; all have the same tensors. Of equally good ones the earlier is tried first.
        score: Measures tensors, higher is better; called at most 2 n - 1 times.

    Raises:
        MergeError: The models do not fit each other, or a score is NaN.
        ConfigError: There is no model.
    """
    require_models(len(models), "greedy")
    average(models)  # refuses, before anything is measured, models that do not fit
    scores = [_number(score(model)) for model in models]
    first, *others = sorted(range(len(models)), key=lambda number: -scores[number])
    kept, best, result = [models[first]], scores[first], average([models[first]])
    for number in others:
        candidate = average([*kept, models[number]])
        found = _number(score(candidate))
        if found >= best:
            kept, best, result = [*kept, models[number]], found, candidate
    return result


def _number(score: float) -> float:
    if math.isnan(score):
        raise MergeError("greedy: `score` gave NaN, which no order has. Give a number for every model.")
    return score
