import dataclasses

import pytest

from hf_cl.config import read
from hf_cl.data import TaskSpec
from hf_cl.errors import ConfigError


def test_every_option_of_a_task_is_described():
    assert all(field.metadata["help"] for field in dataclasses.fields(TaskSpec))


def test_a_task_is_read_from_plain_values():
    spec = read(TaskSpec, {"name": "pets", "dataset": "org/pets", "labels": ["cat", "dog"]}, "task")
    assert spec.labels == ("cat", "dog")
    assert (spec.text, spec.label, spec.test_split, spec.seed) == ("text", "label", "test", 0)


def test_a_misspelt_option_proposes_the_right_one():
    with pytest.raises(ConfigError, match=r"task: unknown key 'max_trian'. Did you mean 'max_train'\?"):
        read(TaskSpec, {"name": "pets", "max_trian": 3}, "task")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../up"}, r"'\.\./up'.*Choose another"),
        ({"name": ""}, "Choose another"),
        ({"max_train": 0}, "`max_train` is 0; give 1 or more"),
        ({"max_test": -1}, "`max_test` is -1"),
        ({"seed": -1}, "`seed` is -1; give 0 or more"),
        ({"labels": ("a", "b", "a")}, "`labels` holds 'a' twice"),
        ({"labels": ("a",)}, "holds 1 of the 2 or more"),
        ({"labels": ("a", True)}, r"`labels` holds True \(bool\), not a name. Put it in quotes"),
        ({"test_split": "train"}, "`train_split` and `test_split` are both 'train'.*Name two"),
        ({"validation_split": "train"}, "`train_split` and `validation_split` are both 'train'"),
        ({"text": "label"}, r"name one column twice \(label, label\)"),
    ],
)
def test_a_value_that_fits_no_task_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TaskSpec(**{"name": "pets", "dataset": "org/pets", **options})
