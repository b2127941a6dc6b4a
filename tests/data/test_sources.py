import json
import os
import socket

import pytest
from datasets import Dataset, DatasetDict

from hf_cl.data import TaskSpec, load_task
from hf_cl.data import sources as module
from hf_cl.errors import ConfigError, DataError

ROWS = [{"text": f"t{row}", "label": "ab"[row % 2]} for row in range(4)]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".csv":
        data.to_csv(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spec(**options):
    return TaskSpec(**{"name": "pets", "dataset": "pets", **options})


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_folder_of_files_is_a_task(tmp_path, ending):
    for split in ("train", "validation", "test"):
        write(tmp_path / "pets" / f"{split}.{ending}")
    task = load_task(spec(), tmp_path)
    assert task.test[:] == {"text": ["t0", "t1", "t2", "t3"], "label": [0, 1, 0, 1]}
    assert task.labels == ("a", "b")
    assert task.source == "local:pets"


@pytest.mark.parametrize("content", [["no", "yes"], {"label_names": ["no", "yes"], "groups": None}])
def test_labels_json_names_integers(folder, content):
    path = folder()
    (path / "labels.json").write_text(json.dumps(content))
    task = load_task(spec(dataset=str(path)))
    assert task.labels == ("no", "yes")
    assert task.test["label"][:] == [0, 1, 0, 1]


def test_labels_json_gives_strings_their_order(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / "pets" / f"{split}.jsonl")
    (tmp_path / "pets" / "labels.json").write_text('["b", "unused", "a"]')
    task = load_task(spec(), tmp_path)
    assert task.labels == ("b", "unused", "a")
    assert task.test["label"][:] == [2, 0, 2, 0]


def test_texts_that_pandas_takes_for_missing_stay_texts(tmp_path):
    rows = [{"text": text, "label": label} for text, label in (("null", "NA"), ("None", "x"))]
    for split in ("train", "validation", "test"):
        write(tmp_path / "pets" / f"{split}.csv", rows)
    task = load_task(spec(), tmp_path)
    assert (task.labels, task.test["text"][:]) == (("NA", "x"), ["null", "None"])


def test_an_empty_csv_cell_is_no_text(tmp_path):
    write(tmp_path / "pets" / "train.csv")
    (tmp_path / "pets" / "test.csv").write_text("text,label\nx,a\n,b\n")
    with pytest.raises(DataError, match=r"split 'test': row 1 \(from 0\) of column 'text' is None"):
        load_task(spec(), tmp_path)


def test_splits_go_by_the_names_the_task_gives(folder):
    path = folder(dev=6)
    task = load_task(spec(dataset=str(path), train_split="train", validation_split="test", test_split="dev"))
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 4, 6)


def test_a_validation_split_that_is_measured_on_is_not_chosen_by_too(folder):
    path = folder(validation=6)
    task = load_task(spec(dataset=str(path), test_split="validation"))
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 6)
    assert task.validation[0]["text"].startswith("train")


def test_null_carves_although_there_is_a_validation_split(folder):
    task = load_task(spec(dataset=str(folder(validation=6)), validation_split=None))
    assert (len(task.train), len(task.validation)) == (18, 2)


def test_data_files_name_a_file_for_each_split(tmp_path):
    files = {"train": "one/a.csv", "test": str(write(tmp_path / "two" / "b.jsonl"))}
    write(tmp_path / "one" / "a.csv")
    task = load_task(TaskSpec(name="pets", data_files=files), tmp_path)
    assert (len(task.train), len(task.validation), len(task.test)) == (3, 1, 4)
    assert task.source == "local:a"


def test_data_files_start_from_a_local_folder(tmp_path):
    write(tmp_path / "pets" / "a.csv")
    task = load_task(spec(data_files={"train": "a.csv", "test": "a.csv"}), tmp_path)
    assert (len(task.test), task.source) == (4, "local:pets")


def test_a_file_alone_is_cut_into_three_parts(tmp_path):
    path = write(tmp_path / "all.csv", ROWS * 10)
    task = load_task(spec(dataset="all.csv"), path.parent)
    assert (len(task.train), len(task.validation), len(task.test)) == (32, 4, 4)
    assert task.source == "local:all"


def test_a_folder_name_that_looks_like_a_pattern_is_found(folder):
    assert len(load_task(spec(dataset=str(folder("odd [1]* name")))).test) == 4


def test_the_source_holds_no_path_however_the_folder_is_written(folder, monkeypatch):
    path = folder()
    monkeypatch.chdir(path)
    for dataset in (".", "./", "../pets", str(path), f"{path}/../pets/"):
        assert load_task(spec(dataset=dataset)).source == "local:pets"


def test_a_changed_file_is_read_anew(folder):
    path = folder()
    first = load_task(spec(dataset=str(path)))
    rows = Dataset.from_dict({"text": ["new", "new", "old"], "label": [0, 1, 1]})
    rows.to_parquet(path / "test.parquet")
    os.utime(path / "test.parquet", (1, 1))
    second = load_task(spec(dataset=str(path)))
    assert second.test["text"][:] == ["new", "new", "old"]
    assert first.test._fingerprint != second.test._fingerprint


def test_local_data_never_touch_the_network(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **more: asked.append(names) or [])
    load_task(spec(dataset=str(folder())))
    assert asked == []


def test_a_hub_data_set_is_loaded_by_its_id_and_configuration(monkeypatch):
    calls = []

    def load(*arguments):
        calls.append(arguments)
        return DatasetDict(train=Dataset.from_list(ROWS * 3), test=Dataset.from_list(ROWS))

    monkeypatch.setattr(module, "load_dataset", load)
    assert load_task(spec(dataset="org/pets", config="big")).source == "org/pets/big"
    assert load_task(spec(dataset="pets")).source == "pets"
    assert calls == [("org/pets", "big"), ("pets", None)]


def test_a_hub_data_set_out_of_reach_is_an_error_with_its_name(monkeypatch):
    def load(*arguments):
        raise ConnectionError("Couldn't reach 'org/pets' on the Hub.\nmore")

    monkeypatch.setattr(module, "load_dataset", load)
    with pytest.raises(
        DataError, match=r"Hub data set 'org/pets' cannot be loaded: Couldn't reach .* Hub. more. Check"
    ):
        load_task(spec(dataset="org/pets"))


@pytest.mark.parametrize("name", ["csv", "pandas", "parquet"])
def test_a_file_format_is_no_hub_data_set(name):
    with pytest.raises(ConfigError, match=f"'{name}' is a file format.*`data_files`"):
        load_task(spec(dataset=name))


@pytest.mark.parametrize("dataset", ["https://example.org/pets", "./pets", "/pets", "a/b/c", "pets.csv", "../x"])
def test_what_is_neither_local_nor_a_hub_id_is_refused(tmp_path, dataset):
    with pytest.raises(DataError, match=r"is no Hub id, and there is no file or folder"):
        load_task(spec(dataset=dataset), tmp_path)


def test_a_folder_beside_the_wrong_root_is_not_taken_for_a_hub_id(folder, tmp_path, monkeypatch):
    folder()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'pets' is in the working directory, not in .*Give its full path"):
        load_task(spec(), tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": None}, "Task 'pets': it has no data"),
        ({"config": "big"}, "`config` is 'big', but only a Hub data set has one"),
        ({"dataset": "org/none", "data_files": {"train": "a.csv"}}, "'org/none' is no local folder"),
        ({"dataset": "pets/train.parquet", "data_files": {"test": "b.csv"}}, r"is a file \(train.parquet\)"),
    ],
)
def test_options_that_do_not_go_together_are_refused(folder, tmp_path, options, message):
    folder()
    with pytest.raises(ConfigError, match=message):
        load_task(spec(**options), tmp_path)


def test_a_missing_split_is_refused_with_those_found(folder):
    path = folder(dev=4)
    with pytest.raises(DataError, match=r"no split 'tset' \(found: dev, test, train\).*`test_split`"):
        load_task(spec(dataset=str(path), test_split="tset"))
    with pytest.raises(DataError, match=r"no split 'dve' .*`validation_split`"):
        load_task(spec(dataset=str(path), validation_split="dve"))


def test_two_files_of_one_split_are_refused(folder):
    path = folder()
    write(path / "test.csv")
    with pytest.raises(DataError, match=r"split 'test': there are test.csv and test.parquet. Keep one"):
        load_task(spec(dataset=str(path)))


def test_integers_without_names_are_refused(folder):
    with pytest.raises(DataError, match=r"'label' holds int64 without names. Put a labels.json"):
        load_task(spec(dataset=str(folder(names=None))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "labels.json: it is no JSON"),
        ('{"names": []}', "labels.json: expected a list of label names, bare or as `label_names`, found"),
        ("[0, 1]", "labels.json: expected a list of label names"),
        ('["a", "b", "a"]', "labels.json: it holds the label 'a' twice"),
        ('["a"]', "no task in 1 label"),
    ],
)
def test_a_wrong_labels_json_is_refused(folder, content, message):
    path = folder()
    (path / "labels.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_task(spec(dataset=str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.parquet", b"PAR1 and nothing more", "cannot be read as parquet"),
        ("test.parquet", b"", "it has no rows"),
        ("test.csv", b"", "it has no rows"),
        ("test.csv", b"text,label\n", "it has no rows"),
        ("test.csv", b"\xff\xfe\xff", "cannot be read as csv"),
        ("test.jsonl", b"\n", "it has no rows"),
        ("test.jsonl", b'{"text": "a", "label"', "cannot be read as json"),
        (
            "test.jsonl",
            b'{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n',
            r"row 1 \(from 0\).*is 3 \(int\)",
        ),
    ],
)
def test_an_unreadable_file_is_refused_by_name(folder, name, content, message):
    path = folder()
    (path / "test.parquet").unlink()
    (path / name).write_bytes(content)
    place = "split 'test'" if "row 1" in message else f"test file .*{name}"
    with pytest.raises(DataError, match=f"Task 'pets', {place}: .*{message}"):
        load_task(spec(dataset=str(path)))


@pytest.mark.parametrize(("file", "message"), [("no.csv", "there is no such file"), ("a.txt", "unknown ending '.txt'")])
def test_a_file_that_cannot_be_taken_is_refused_by_name(tmp_path, file, message):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=f"train file .*{file}: {message}"):
        load_task(TaskSpec(name="pets", data_files={"train": file, "test": file}), tmp_path)
