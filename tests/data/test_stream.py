import json
import os
from pathlib import Path

import pytest

from hf_cl.data import TaskSpec, load_task, read_stream
from hf_cl.errors import ConfigError, DataError

READY = {
    "two": [{"name": "one", "task": "pets"}, {"name": "other", "task": "pets", "labels": ["b", "a"]}],
    "empty": [],
    "lost": [{"name": "one", "task": "gone"}],
    "odd": [{"name": "one", "tsak": "pets"}],
    "object": {},
}


@pytest.fixture
def ready(folder, tmp_path):
    folder()
    (tmp_path / "streams.json").write_text(json.dumps(READY))
    return tmp_path


def read(value, data_dir=None, root=None, **more):
    return read_stream(value, data_dir=data_dir, root=root, **more)


def test_a_name_is_a_ready_stream(ready):
    pets = str((ready / "pets").resolve())
    assert read("two", ready) == (
        TaskSpec(name="one", dataset=pets),
        TaskSpec(name="other", dataset=pets, labels=("b", "a")),
    )


def test_the_tasks_of_a_ready_stream_load(ready):
    one, other = (load_task(spec) for spec in read("two", ready))
    assert (one.name, one.labels, one.source) == ("one", ("a", "b"), "local:pets")
    assert (other.name, other.labels, other.source) == ("other", ("b", "a"), "local:pets")


def test_options_of_a_named_stream_hold_for_all_its_tasks(ready):
    specs = read({"name": "two", "max_train": 8, "seed": 3}, ready, defaults={"max_test": 2, "seed": 1})
    assert [(spec.max_train, spec.max_test, spec.seed) for spec in specs] == [(8, 2, 3), (8, 2, 3)]


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ({"reverse": True}, ["other", "one"]),
        ({"reverse": False}, ["one", "other"]),
        ({"first": 1}, ["one"]),
        ({"first": 1, "reverse": True}, ["other"]),
    ],
)
def test_a_ready_stream_runs_backwards_or_in_part(ready, order, names):
    assert [spec.name for spec in read({"name": "two", **order}, ready)] == names


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ({"reverse": "yes"}, "stream.reverse: expected true or false, found 'yes'"),
        ({"first": 0}, "stream.first: expected a number of tasks from 1 to 2, found 0"),
        ({"first": 3}, "found 3"),
        ({"first": True}, "found True"),
    ],
)
def test_an_order_that_is_none_is_refused(ready, order, said):
    with pytest.raises(ConfigError, match=said):
        read({"name": "two", **order}, ready)


def test_a_tasks_own_option_wins_over_the_streams_and_that_over_the_default():
    specs = read(
        {"tasks": [{"name": "a", "max_train": 1}, {"name": "b"}], "dataset": "org/x", "max_train": 2},
        defaults={"max_train": 3, "max_test": 3},
    )
    assert [(spec.max_train, spec.max_test, spec.dataset) for spec in specs] == [
        (1, 3, "org/x"),
        (2, 3, "org/x"),
    ]


def test_a_list_of_tasks_is_a_stream():
    assert read([{"name": "a", "dataset": "org/a"}]) == (TaskSpec(name="a", dataset="org/a"),)


def test_local_paths_become_absolute_and_hub_ids_stay(ready):
    files = {"train": "x/a.csv", "test": "b.csv"}
    specs = read([{"name": "a", "dataset": "pets"}, {"name": "b", "dataset": "org/b"}, {"name": "c", "data_files": files}], root=ready)  # fmt: skip  # noqa: E501
    assert [spec.dataset for spec in specs] == [str((ready / "pets").resolve()), "org/b", None]
    assert specs[2].data_files == {name: str((ready / file).resolve()) for name, file in files.items()}


TASK = {"name": "a", "dataset": "org/a"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tow", r"there is no 'tow' in .*streams.json. Did you mean 'two'\?"),
        ("empty", "it has no tasks"),
        ([], "it has no tasks"),
        ({"tasks": []}, "it has no tasks"),
        ("odd", r"odd\[0\]: unknown key 'tsak'. Did you mean 'task'\?"),
        ({"name": "two", "max_trian": 3}, r"stream: unknown key 'max_trian'. Did you mean 'max_train'\?"),
        ({"name": "two", "max_train": "3"}, "stream.max_train: expected int or NoneType, found '3'"),
        ({"name": "two", "labels": ["a", "b"]}, "stream: 'labels' belongs to a single task"),
        ({"name": 3}, r"stream.name: expected str, found 3 \(int\)"),
        ({"name": "two", "tasks": []}, r"either `name`.*or `tasks`.*found: name, tasks"),
        ({"max_train": 3}, r"either `name`.*found: max_train"),
        ({"tasks": [TASK], "max_trian": 3}, "stream: unknown key 'max_trian'"),
        ({"tasks": "two"}, "expected a name, a mapping or a list of tasks, found 'two'"),
        (7, "expected a name, a mapping or a list of tasks, found 7"),
        ([TASK, "b"], r"stream.tasks\[1\]: expected a mapping of options, found 'b'"),
        (
            [TASK, {"name": "b", "datset": "x"}],
            r"stream.tasks\[1\]: unknown key 'datset'. Did you mean 'dataset'\?",
        ),
        ([TASK, {"dataset": "x"}], r"stream.tasks\[1\]: key 'name' is missing"),
        ([{"name": "b"}], r"stream.tasks\[0\]: task 'b' has no data"),
        ([TASK, TASK], "two tasks are called 'a'. Give each task a name of its own"),
    ],
)
def test_a_wrong_stream_is_refused_with_the_place(ready, value, message):
    with pytest.raises(ConfigError, match=message):
        read(value, ready)


def test_a_wrong_default_is_refused_with_the_place():
    with pytest.raises(ConfigError, match=r"stream defaults: unknown key 'sed'. Did you mean 'seed'"):
        read([TASK], defaults={"sed": 1})


def test_a_name_without_the_folder_of_streams_says_what_to_set():
    with pytest.raises(ConfigError, match=r"'two' is the name of a ready stream, but HF_CL_DATA is not set. Set it"):
        read("two")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "two", "There is no .*streams.json. Set HF_CL_DATA"),
        ("{", "two", "streams.json cannot be read as JSON"),
        ("[]", "two", "streams.json: expected an object of streams"),
        (json.dumps(READY), "object", "'object' is no list of steps"),
        (json.dumps(READY), "lost", "lost: there is no folder 'gone' for task 'one'"),
    ],
)
def test_a_wrong_folder_of_streams_is_refused(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / "streams.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(name, tmp_path)


@pytest.fixture(scope="module")
def shared():
    path = os.environ.get("HF_CL_DATA")
    if not path:
        pytest.skip("HF_CL_DATA is not set: no folder of real tasks")
    return Path(path)


def test_every_task_of_the_real_streams_loads(shared):
    for stream in json.loads((shared / "streams.json").read_text()):
        for task in map(load_task, read(stream, shared)):
            assert set(task.train.column_names) == {"text", "label"} | ({"text_pair"} if task.pair else set())
            assert min(len(task.train), len(task.validation), len(task.test)) > 0
            assert 0 <= min(task.train["label"]) <= max(task.train["label"]) < task.num_labels


def test_ten_cuts_of_one_real_data_set_share_no_label_and_keep_their_rows(shared):
    tasks = [load_task(spec) for spec in read("clinc10", shared)]
    assert [len(task.train) for task in tasks] == [1500] * 10
    assert len({label for task in tasks for label in task.labels}) == 150
