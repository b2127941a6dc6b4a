import json
import math

import numpy as np
import pytest

from hf_cl.errors import DataError
from hf_cl.metrics import AccuracyMatrix, accuracy, exssnet_forgetting, macro_f1, mammoth_forgetting

NAMES = ["news", "reviews", "topics"]
ORACLE = [[0.9, 0.1, 0.2], [0.8, 0.7, 0.3], [0.6, 0.75, 0.5]]
CLOSE = 1e-12  # the accuracies are no binary fractions: a few roundings of 1e-16 each


def oracle() -> AccuracyMatrix:
    return AccuracyMatrix.from_list(NAMES, ORACLE)


def test_the_hand_computed_matrix_gives_the_hand_computed_figures():
    matrix = oracle()
    assert matrix.average_accuracy == pytest.approx(1.85 / 3, abs=CLOSE)
    assert matrix.backward_transfer == pytest.approx(-0.125, abs=CLOSE)
    assert matrix.forgetting == pytest.approx(0.125, abs=CLOSE)
    assert exssnet_forgetting(matrix) == pytest.approx(-0.125, abs=CLOSE)
    assert mammoth_forgetting(matrix) == pytest.approx(0.15, abs=CLOSE)
    assert matrix.forward_transfer(dict.fromkeys(NAMES, 0.1)) == pytest.approx(0.1, abs=CLOSE)
    assert matrix.learning_accuracy == pytest.approx(0.7, abs=CLOSE)
    assert matrix.average_incremental_accuracy == pytest.approx((0.9 + 0.75 + 1.85 / 3) / 3, abs=CLOSE)


def test_a_row_from_before_a_task_was_learned_counts_in_exssnets_figure_but_not_in_forgetting():
    matrix = AccuracyMatrix.from_list(NAMES, [[0.5, 1.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.5]])
    assert matrix.forgetting == 0.0
    assert exssnet_forgetting(matrix) == -0.25
    assert mammoth_forgetting(matrix) == 0.25


def test_a_task_that_improves_at_the_end_is_negative_forgetting_and_zero_to_mammoth():
    matrix = AccuracyMatrix.from_list(["a", "b"], [[0.5, None], [0.75, 0.5]])
    assert (matrix.forgetting, matrix.backward_transfer) == (-0.25, 0.25)
    assert (exssnet_forgetting(matrix), mammoth_forgetting(matrix)) == (0.25, 0.0)


def test_after_one_task_nothing_can_be_forgotten_so_the_figures_are_none():
    matrix = AccuracyMatrix(["only"])
    matrix.add_row({"only": 0.9})
    assert matrix.backward_transfer is None and matrix.forgetting is None
    assert exssnet_forgetting(matrix) is None and mammoth_forgetting(matrix) is None
    assert matrix.forward_transfer({}) is None
    assert matrix.average_accuracy == matrix.learning_accuracy == matrix.average_incremental_accuracy == 0.9


def test_before_the_first_task_every_figure_is_none():
    matrix = AccuracyMatrix(NAMES)
    assert matrix.learned == ()
    assert matrix.average_accuracy is None and matrix.learning_accuracy is None
    assert matrix.backward_transfer is None and matrix.average_incremental_accuracy is None


def test_unchanged_accuracies_give_exactly_zero():
    values = {"news": 0.1 + 0.2, "reviews": 1 / 3, "topics": 0.7}
    matrix = AccuracyMatrix(NAMES)
    for _ in NAMES:
        matrix.add_row(values)
    for figure in (matrix.backward_transfer, matrix.forgetting, exssnet_forgetting(matrix)):
        assert figure == 0.0 and math.copysign(1.0, figure) == 1.0
    assert mammoth_forgetting(matrix) == 0.0


def test_figures_cover_the_tasks_learned_so_far():
    matrix = AccuracyMatrix.from_list(NAMES, ORACLE[:2])
    assert matrix.learned == ("news", "reviews")
    assert matrix.average_accuracy == 0.75
    assert matrix.backward_transfer == pytest.approx(-0.1, abs=CLOSE)


def test_a_figure_is_none_when_a_value_it_needs_was_not_evaluated():
    matrix = AccuracyMatrix.from_list(NAMES, [[0.9, None, None], [None, 0.7, None], [0.6, 0.7, 0.5]])
    assert matrix.backward_transfer == pytest.approx(-0.15, abs=CLOSE)
    assert matrix.forgetting is None and matrix.average_incremental_accuracy is None
    assert exssnet_forgetting(matrix) is None and mammoth_forgetting(matrix) is None
    assert matrix.forward_transfer(dict.fromkeys(NAMES, 0.1)) is None


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_tasks_without_distinct_names_are_refused(names):
    with pytest.raises(DataError, match="distinct"):
        AccuracyMatrix(names)


@pytest.mark.parametrize("value", [1.01, -0.01, math.nan, math.inf, True, "0.5"])
def test_what_is_no_share_is_refused_and_adds_no_row(value):
    matrix = AccuracyMatrix(["a", "b"])
    with pytest.raises(DataError, match=r"row 0 \(after 'a'\), task 'a'.*not an accuracy"):
        matrix.add_row({"a": value})
    assert matrix.learned == ()


def test_a_row_out_of_order_is_refused():
    matrix = AccuracyMatrix(NAMES)
    with pytest.raises(DataError, match=r"no entry for \['news'\]"):
        matrix.add_row({"reviews": 0.5})
    with pytest.raises(DataError, match="'news' is next"):
        matrix.add_row({"news": 0.5, "reviews": 0.5}, after="reviews")
    matrix.add_row({"news": 0.5}, after="news")
    with pytest.raises(DataError, match=r"no entry for \['reviews'\]"):
        matrix.add_row({"news": 0.5})


def test_an_unknown_task_and_a_row_too_many_are_refused():
    matrix = AccuracyMatrix(["a"])
    with pytest.raises(DataError, match=r"unknown tasks \['z'\]"):
        matrix.add_row({"a": 0.5, "z": 0.5})
    matrix.add_row({"a": 0.5})
    with pytest.raises(DataError, match="one too many"):
        matrix.add_row({"a": 0.5})


def test_a_baseline_must_cover_the_later_tasks_with_shares():
    with pytest.raises(DataError, match=r"no accuracy for \['topics'\]"):
        oracle().forward_transfer({"reviews": 0.1})
    with pytest.raises(DataError, match="baseline of task 'topics': 7 is not"):
        oracle().forward_transfer({"reviews": 0.1, "topics": 7})


def test_lists_survive_json_and_the_callers_rows_stay_as_they_are():
    rows = [[0.9, None, None], [0.8, np.float32(0.5), 0.3]]
    matrix = AccuracyMatrix.from_list(NAMES, rows)
    again = AccuracyMatrix.from_list(NAMES, json.loads(json.dumps(matrix.to_list())))
    assert again == matrix and again.to_list() == rows
    again.to_list()[0][0] = 0.0
    assert again == matrix
    assert matrix != AccuracyMatrix(NAMES) and matrix != rows


def test_a_ragged_row_is_refused_not_padded():
    with pytest.raises(DataError, match="row 0: 1 values for 2 tasks"):
        AccuracyMatrix.from_list(["a", "b"], [[0.5]])


def test_the_table_reads_without_colour():
    matrix = AccuracyMatrix.from_list(["ag_news", "yelp"], [[0.9, None], [0.85, 1.0]])
    assert matrix.to_text().splitlines() == [
        "after task  ag_news    yelp",
        "1 ag_news    0.9000       -",
        "2 yelp       0.8500  1.0000",
    ]
    assert repr(matrix).startswith("AccuracyMatrix(2 of 2 tasks learned)\nafter task")


def test_accuracy_is_the_share_of_hits():
    assert accuracy([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75


def test_macro_f1_is_the_mean_over_labelled_classes():
    # class 0: 1 hit, 2 labelled, 2 guessed -> 1/2; class 1: 2 hits of 2, 3 guessed -> 4/5;
    # class 2: labelled once, never guessed -> 0; class 3: never labelled, left out.
    predictions, labels = [0, 1, 1, 1, 0], [0, 0, 1, 1, 2]
    assert macro_f1(predictions, labels, num_labels=4) == pytest.approx((0.5 + 0.8 + 0.0) / 3, abs=CLOSE)


def test_a_guess_of_a_class_without_labels_costs_recall_only():
    assert macro_f1([0, 3], [0, 0], num_labels=4) == pytest.approx(2 / 3, abs=CLOSE)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "at least one text"),
        ([0, 1], [0], "one class a text"),
        ([[0.2, 0.8]], [1], "argmax"),
        ([0.5], [1], "whole numbers"),
        ([5], [1], "allowed are 0 to 3"),
        ([0], [-1], "run from -1"),
    ],
)
def test_predictions_that_are_no_classes_are_refused(predictions, labels, message):
    with pytest.raises(DataError, match=message):
        macro_f1(predictions, labels, num_labels=4)
