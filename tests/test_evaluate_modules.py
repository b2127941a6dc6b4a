import math

import evaluate
import numpy as np
import pytest

from hf_cl import metrics
from hf_cl.errors import DataError
from hf_cl.metrics import AccuracyMatrix
from hf_cl.training import evaluate_modules as modules

NAN = math.nan
ORACLE = [[0.9, 0.1, 0.2], [0.8, 0.7, 0.3], [0.6, 0.75, 0.5]]
STREAM_FIGURES = {
    "average_accuracy": modules.AverageAccuracy,
    "backward_transfer": modules.BackwardTransfer,
    "forgetting": modules.Forgetting,
    "learning_accuracy": modules.LearningAccuracy,
}
ALL = [modules.Accuracy, modules.MacroF1, *STREAM_FIGURES.values()]


@pytest.fixture
def make(tmp_path):
    return lambda cls: cls(keep_in_memory=True, cache_dir=str(tmp_path))


@pytest.mark.parametrize(("name", "cls"), STREAM_FIGURES.items())
@pytest.mark.parametrize(
    "rows",
    [
        ORACLE,
        ORACLE[:2],
        [[1 / 3, NAN], [1 / 3, 0.7]],
        [[0.9, NAN]],
        [[0.9, NAN, NAN], [NAN, 0.7, NAN], [0.6, 0.7, 0.5]],
    ],
)
def test_a_stream_figure_is_exactly_the_matrixs(make, name, cls, rows):
    plain = [[None if math.isnan(value) else value for value in row] for row in rows]
    expected = getattr(AccuracyMatrix.from_list("abc"[: len(rows[0])], plain), name)
    assert make(cls).compute(predictions=rows) == {name: expected}


def test_rows_may_come_one_by_one_and_with_none(make):
    module = make(modules.BackwardTransfer)
    module.add(prediction=[0.9, None])
    module.add(prediction=[0.9, 0.5])
    assert module.compute() == {"backward_transfer": 0.0}


def test_class_figures_are_exactly_those_of_the_metrics(make):
    predictions, labels = np.array([0, 1, 1, 1, 0]), np.array([0, 0, 1, 1, 2])
    assert make(modules.Accuracy).compute(predictions=predictions, references=labels) == {
        "accuracy": metrics.accuracy(predictions, labels)
    }
    assert make(modules.MacroF1).compute(predictions=predictions, references=labels, num_labels=4) == {
        "macro_f1": metrics.macro_f1(predictions, labels, num_labels=4)
    }


def test_modules_combine_like_every_other(make):
    both = evaluate.combine([make(modules.Accuracy), make(modules.Accuracy)], force_prefix=True)
    figures = both.compute(predictions=[0, 1], references=[1, 1])
    assert figures == {"accuracy_0_accuracy": 0.5, "accuracy_1_accuracy": 0.5}


def test_a_matrix_with_a_value_that_is_no_share_is_refused(make):
    with pytest.raises(DataError, match="not an accuracy"):
        make(modules.Forgetting).compute(predictions=[[1.5]])


def test_a_ragged_matrix_is_refused(make):
    with pytest.raises(DataError, match="row 1: 1 values for 2 tasks"):
        make(modules.Forgetting).compute(predictions=[[0.5, NAN], [0.5]])


@pytest.mark.parametrize("cls", ALL)
def test_a_module_says_what_it_is(make, cls):
    module = make(cls)
    assert "predictions" in module.inputs_description
    assert module.description == cls.__doc__ and "title={" in module.citation


def test_nothing_is_left_on_disk(make, tmp_path):
    make(modules.Accuracy).compute(predictions=[0], references=[0])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_on_disk_gives_the_same_figure(tmp_path):
    module = modules.Forgetting(cache_dir=str(tmp_path))
    assert module.compute(predictions=[[0.5, NAN], [0.5, 0.5]]) == {"forgetting": 0.0}
    assert list(tmp_path.rglob("*.arrow")) == []
