"""The figures of `hf_cl.metrics` as `evaluate` modules, made without `evaluate.load`: no network.

A module is a plain object: `Accuracy(keep_in_memory=True).compute(predictions=..., references=...)`.
It collects over `add` and `add_batch` like every other. Each value is the one that `hf_cl.metrics`
gives for the same numbers; nothing is computed here.

The stream figures take the rows of an accuracy matrix as `predictions`, and no references:

    BackwardTransfer(keep_in_memory=True).compute(predictions=[[0.9, nan], [0.8, 0.7]])

Without `keep_in_memory`, `evaluate` keeps what it collects in files of its cache folder until `compute`;
with it, only an empty folder is made there.
"""

import math
from collections.abc import Sequence

import evaluate
from datasets import Features, Value
from datasets import Sequence as SequenceOf

from hf_cl import metrics
from hf_cl.errors import DataError
from hf_cl.metrics import AccuracyMatrix

Figures = dict[str, float | None]
Rows = Sequence[Sequence[float | None]]

CLASS_FEATURES = Features({"predictions": Value("int64"), "references": Value("int64")})
ROW_FEATURES = Features({"predictions": SequenceOf(Value("float64"))})

GEM = """@inproceedings{lopezpaz2017gem,
  title={Gradient Episodic Memory for Continual Learning},
  author={Lopez-Paz, David and Ranzato, Marc'Aurelio},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}"""
CHAUDHRY = """@inproceedings{chaudhry2018riemannian,
  title={Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence},
  author={Chaudhry, Arslan and Dokania, Puneet K. and Ajanthan, Thalaiyasingam and Torr, Philip H. S.},
  booktitle={European Conference on Computer Vision},
  year={2018}
}"""
RIEMER = """@inproceedings{riemer2019learning,
  title={Learning to Learn without Forgetting by Maximizing Transfer and Minimizing Interference},
  author={Riemer, Matthew and Cases, Ignacio and Ajemian, Robert and Liu, Miao and Rish, Irina
          and Tu, Yuhai and Tesauro, Gerald},
  booktitle={International Conference on Learning Representations},
  year={2019}
}"""
SOKOLOVA = """@article{sokolova2009systematic,
  title={A systematic analysis of performance measures for classification tasks},
  author={Sokolova, Marina and Lapalme, Guy},
  journal={Information Processing and Management},
  volume={45},
  number={4},
  year={2009}
}"""
OPITZ = """@article{opitz2019macro,
  title={Macro F1 and Macro F1},
  author={Opitz, Juri and Burst, Sebastian},
  journal={arXiv preprint arXiv:1911.03347},
  year={2019}
}"""
ROWS = """
Args:
    predictions (list of list of float): The rows of an accuracy matrix. Row i holds, after task i was
        learned, the accuracy in [0, 1] on every task of the stream, NaN where not evaluated.
Returns:
    dict: The figure over the tasks learned so far; None where it is not defined or a value is missing.
"""
CLASSES = """
Args:
    predictions (list of int): The predicted class of each text.
    references (list of int): The true class of each text.
"""
NUM_LABELS = "    num_labels (int): How many classes the task has.\n"


class Accuracy(evaluate.Metric):
    """Share of texts whose predicted class is the true one."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__, SOKOLOVA, CLASSES, CLASS_FEATURES)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> Figures:
        return {"accuracy": metrics.accuracy(predictions, references)}


class MacroF1(evaluate.Metric):
    """Mean F1 over the classes that occur among the references; 0 for one never predicted."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__, OPITZ, CLASSES + NUM_LABELS, CLASS_FEATURES)

    def _compute(self, predictions: Sequence[int], references: Sequence[int], num_labels: int) -> Figures:
        return {"macro_f1": metrics.macro_f1(predictions, references, num_labels)}


class AverageAccuracy(evaluate.Metric):
    """Mean accuracy over the learned tasks after the last one."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__, GEM, ROWS, ROW_FEATURES)

    def _compute(self, predictions: Rows) -> Figures:
        return {"average_accuracy": _matrix(predictions).average_accuracy}


class BackwardTransfer(evaluate.Metric):
    """Mean of (last row - diagonal) over all tasks but the last. Negative means forgetting."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__, GEM, ROWS, ROW_FEATURES)

    def _compute(self, predictions: Rows) -> Figures:
        return {"backward_transfer": _matrix(predictions).backward_transfer}


class Forgetting(evaluate.Metric):
    """Mean of (best earlier row since learned - last row), all tasks but the last. Positive: forgetting."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__, CHAUDHRY, ROWS, ROW_FEATURES)

    def _compute(self, predictions: Rows) -> Figures:
        return {"forgetting": _matrix(predictions).forgetting}


class LearningAccuracy(evaluate.Metric):
    """Mean of the diagonal: how well each task was learned when its turn came."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__, RIEMER, ROWS, ROW_FEATURES)

    def _compute(self, predictions: Rows) -> Figures:
        return {"learning_accuracy": _matrix(predictions).learning_accuracy}


def _info(description: str | None, citation: str, inputs: str, features: Features) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(description=description, citation=citation, inputs_description=inputs, features=features)


def _matrix(rows: Rows) -> AccuracyMatrix:
    """The matrix of these rows; NaN, which Arrow can hold, stands for a value not evaluated."""
    if not len(rows):
        raise DataError("Accuracy matrix: no row was given.")
    names = [f"task {number}" for number in range(1, len(rows[0]) + 1)]
    plain = [[None if value is None or math.isnan(value) else value for value in row] for row in rows]
    return AccuracyMatrix.from_list(names, plain)
