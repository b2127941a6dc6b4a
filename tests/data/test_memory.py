import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_cl.data import task_from_datasets
from hf_cl.errors import ConfigError, DataError


def split(rows, names=("a", "b", "c"), **columns):
    """Rows with the labels in turn, as strings."""
    labels = [names[row % len(names)] for row in range(rows)]
    return Dataset.from_dict({"text": [f"t{row}" for row in range(rows)], "label": labels, **columns})


def splits(**changed):
    return {"train": split(30), "validation": split(3), "test": split(6), **changed}


def test_a_task_has_exactly_its_columns_and_named_integer_labels():
    task = task_from_datasets("pets", splits(train=split(6, extra=list(range(6)))))
    assert task.train.column_names == ["text", "label"]
    assert task.train.features["label"] == ClassLabel(names=["a", "b", "c"])
    assert task.train[:] == {"text": ["t0", "t1", "t2", "t3", "t4", "t5"], "label": [0, 1, 2, 0, 1, 2]}
    assert (task.name, task.labels, task.num_labels, task.pair) == ("pets", ("a", "b", "c"), 3, False)
    assert task.source == "memory"


def test_labels_are_kept_and_numbered_in_the_order_given():
    task = task_from_datasets("pets", splits(), labels=("c", "a"))
    assert task.labels == ("c", "a")
    assert task.test[:] == {"text": ["t0", "t2", "t3", "t5"], "label": [1, 0, 1, 0]}
    assert task.test.features["label"] == ClassLabel(names=["c", "a"])


def test_a_column_called_text_pair_is_taken_and_another_only_by_name():
    seconds = {
        name: split(rows, text_pair=["p"] * rows, other=["o"] * rows) for name, rows in (("train", 6), ("test", 3))
    }
    assert task_from_datasets("pets", {**seconds, "validation": seconds["test"]}).test["text_pair"][:] == ["p"] * 3
    named = task_from_datasets("pets", {**seconds, "validation": seconds["test"]}, text_pair="other")
    assert named.pair
    assert named.test.column_names == ["text", "text_pair", "label"]
    assert named.test["text_pair"][:] == ["o"] * 3


def test_columns_may_be_swapped_without_mixing_them_up():
    rows = Dataset.from_dict({"text": ["label"] * 3, "text_pair": ["first"] * 3, "label": ["x", "y", "x"]})
    task = task_from_datasets(
        "pets", {"train": rows, "validation": rows, "test": rows}, text="text_pair", text_pair="text"
    )
    assert task.train[0] == {"text": "first", "text_pair": "label", "label": 0}


def test_a_missing_validation_split_is_carved_out_of_train():
    both = splits()
    del both["validation"]
    task = task_from_datasets("pets", both)
    assert sorted([*task.train["text"], *task.validation["text"]]) == sorted(both["train"]["text"])
    assert sorted(task.validation["label"]) == [0, 1, 2]
    assert len(task.test) == 6
    again = task_from_datasets("pets", both)
    assert again.validation["text"][:] == task.validation["text"][:]
    assert task_from_datasets("pets", both, seed=1).validation["text"][:] != task.validation["text"][:]


def test_one_data_set_alone_is_cut_into_three_parts_without_overlap():
    rows = split(100, names=("a", "b"))
    task = task_from_datasets("pets", rows)
    parts = [task.train["text"][:], task.validation["text"][:], task.test["text"][:]]
    assert [len(part) for part in parts] == [81, 9, 10]
    assert sorted(text for part in parts for text in part) == sorted(rows["text"])


def test_a_cap_keeps_the_order_of_the_rows_and_a_row_of_each_label():
    task = task_from_datasets("pets", splits(), max_train=3, max_validation=1, max_test=100)
    assert sorted(task.train["label"]) == [0, 1, 2]
    texts = task.train["text"][:]
    assert texts == sorted(texts, key=lambda text: int(text[1:]))
    assert (len(task.validation), len(task.test)) == (1, 6)


def test_a_task_leaves_the_data_it_was_made_of_as_they_were():
    data = DatasetDict({"train": split(9), "test": split(3)})
    before = {name: (rows.column_names, rows._fingerprint, rows[:]) for name, rows in data.items()}
    task_from_datasets("pets", data, labels=("b", "a"))
    assert {name: (rows.column_names, rows._fingerprint, rows[:]) for name, rows in data.items()} == before


def test_a_selection_of_rows_and_a_set_format_are_respected():
    data = splits(test=split(9).select([8, 1, 3]).with_format("numpy"))
    assert task_from_datasets("pets", data).test[:] == {"text": ["t8", "t1", "t3"], "label": [2, 1, 0]}


def test_equal_data_give_equal_fingerprints_and_other_labels_give_others():
    first, same = (task_from_datasets("pets", splits(), labels=("a", "b")) for _ in range(2))
    other = task_from_datasets("pets", splits(), labels=("b", "a"))
    assert first.train._fingerprint == same.train._fingerprint != other.train._fingerprint


def coded(labels, names=("no", "yes")):
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"text": ["t"] * len(labels), "label": labels}, features=features)


def test_names_of_a_class_label_are_taken():
    task = task_from_datasets("pets", {"train": coded([1, 0]), "validation": coded([1]), "test": coded([0, 1])})
    assert task.labels == ("no", "yes")
    assert task.test["label"][:] == [0, 1]


EMPTY = split(3).select([])
NUMBERS = Dataset.from_dict({"text": ["t"] * 3, "label": [0, 1, 2]})


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({}, {"text": "txt"}, r"'pets', split 'train': .*no column 'txt' \(found: text, label\).*by `text`"),
        ({}, {"text_pair": "b"}, r"no column 'b' \(found: text, label\).*by `text_pair`"),
        ({"test": split(3).select_columns("text")}, {}, r"split 'test': .*no column 'label' \(found: text\)"),
        ({"train": split(3, text_pair=["p"] * 3)}, {}, r"split 'validation': .*no column 'text_pair'"),
        ({"test": EMPTY}, {}, "Task 'pets', split 'test': it has no rows"),
        (
            {"test": Dataset.from_dict({"text": ["t", None], "label": ["a", "b"]})},
            {},
            r"split 'test': row 1 \(from 0\) of column 'text' is None \(NoneType\), not a string",
        ),
        (
            {"test": Dataset.from_dict({"text": [7, 8], "label": ["a", "b"]})},
            {},
            r"split 'test': row 0 \(from 0\) of column 'text' is 7 \(int\), not a string",
        ),
        (
            {"test": Dataset.from_dict({"text": ["t", "u"], "label": ["a", "bb"]})},
            {},
            r"split 'test': row 1 \(from 0\) has label 'bb', which is none of the 3 names.*labels.json",
        ),
        (
            {"test": Dataset.from_dict({"text": ["t", "u"], "label": ["a", None]})},
            {},
            r"split 'test': row 1 \(from 0\) has no label",
        ),
        (
            {"test": Dataset.from_dict({"text": ["t"], "label": [0.5]})},
            {},
            "split 'test': column 'label' holds float64, not labels",
        ),
        ({}, {"labels": ("b", "aa")}, r"'pets': `labels` holds 'aa', which is no label. Did you mean 'a'\?"),
        (
            {"test": split(3, names=("a",))},
            {"labels": ("b", "c")},
            "split 'test': none of its 3 rows has one of the labels",
        ),
        ({"train": NUMBERS}, {}, "'label' holds int64 without names.*labels.json.*ClassLabel"),
        ({"train": split(3, names=("a",))}, {}, r"no task in 1 label \(a\)"),
        ({"test": [1]}, {}, "split 'test': expected a Dataset, found list"),
    ],
)  # fmt: skip
def test_wrong_data_are_refused_with_the_place_and_a_way_out(changed, options, message):
    with pytest.raises(DataError, match=message):
        task_from_datasets("pets", splits(**changed), **options)


def test_rows_without_a_label_are_refused_with_their_number():
    data = {"train": coded([0, 1]), "validation": coded([0]), "test": coded([0, 1, -1])}
    with pytest.raises(
        DataError,
        match=r"split 'test': row 2 \(from 0\) has label -1, which is none of the 2 names. -1 marks",
    ):
        task_from_datasets("pets", data)


def test_a_number_above_the_names_is_refused():
    test = Dataset.from_dict({"text": ["t", "t"], "label": [0, 2]})
    with pytest.raises(DataError, match=r"row 1 \(from 0\) has label 2, .* the 2 names. Labels count from 0 to 1"):
        task_from_datasets("pets", {"train": coded([0, 1]), "validation": coded([0]), "test": test})


def test_splits_that_name_their_labels_differently_are_refused():
    data = {"train": coded([0, 1]), "validation": coded([0]), "test": coded([0], names=("yes", "no"))}
    with pytest.raises(DataError, match=r"split 'train' and .*split 'test' name the labels differently"):
        task_from_datasets("pets", data)


def test_a_missing_test_split_is_refused():
    with pytest.raises(DataError, match=r"no split 'test' \(found: train, validation\)"):
        task_from_datasets("pets", {"train": split(3), "validation": split(3)})


def test_too_few_rows_to_carve_are_refused():
    with pytest.raises(DataError, match=r"its 3 rows are too few to carve a validation split"):
        task_from_datasets("pets", {"train": split(3), "test": split(3)})


def test_something_else_than_data_is_refused():
    with pytest.raises(DataError, match=r"expected a Dataset or a mapping of them, found list"):
        task_from_datasets("pets", [1, 2])


def test_an_argument_that_fits_no_task_is_refused_before_the_data_are_looked_at():
    with pytest.raises(ConfigError, match=r"`labels` holds 'a' twice"):
        task_from_datasets("pets", {}, labels=("a", "a"))
