"""The run folder: a finished task is in it whole or not at all, and nothing of it is taken on trust."""

import contextlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from hf_cl.errors import RunError
from hf_cl.storage.disk import json_bytes, write_atomic
from hf_cl.storage.run_folder import RunFolder

HEADER = {"model": "tiny", "fingerprint": "f", "method": {"name": "supsup"}, "seed": 0, "max_length": 8}
Usage = namedtuple("Usage", "total used free")


def tensors(number):
    return {"task": {"masks": torch.full((9,), number, dtype=torch.uint8)}, "head": {"w": torch.full((2,), 0.5)}}


def record(name):
    return {"name": name, "labels": ["a", "b"], "parts": {}, "probe": ""}


def add(folder, name="pets", **more):
    index = len(folder.tasks)
    folder.add_task(record(name), {index: tensors(index)}, **more)


@pytest.fixture
def folder(tmp_path):
    """A run folder that holds one task."""
    folder = RunFolder.create(tmp_path / "run", HEADER)
    add(folder)
    return folder


def files(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def names(path):
    return [task["name"] for task in RunFolder.open(path).tasks]


def require_whole(path):
    """Every task that is named is there with all its tensors, and nothing else is."""
    opened = RunFolder.open(path)
    assert opened.changed_files() == []
    for index in range(len(opened.tasks)):
        parts = opened.parts(index)
        assert torch.equal(parts["task"]["masks"], tensors(index)["task"]["masks"])
        assert torch.equal(parts["head"]["w"], tensors(index)["head"]["w"])


# --- create, add, read -------------------------------------------------------------------------------------


def test_what_is_added_is_read_back_by_who_opens_the_folder(folder):
    add(folder, "weather", shared={"encoder": torch.arange(3.0)})
    again = RunFolder.open(folder.path)
    assert again.manifest == folder.manifest
    assert (again.manifest["model"], names(folder.path)) == ("tiny", ["pets", "weather"])
    assert torch.equal(again.read(again.manifest["shared"])["encoder"], torch.arange(3.0))
    require_whole(folder.path)


def test_a_part_without_tensors_has_no_file(tmp_path):
    folder = RunFolder.create(tmp_path / "run", HEADER)
    folder.add_task(record("pets"), {0: {"task": {}, "head": tensors(0)["head"]}})
    assert list(folder.tasks[0]["files"]) == ["head"]
    assert RunFolder.open(folder.path).parts(0)["task"] == {}


def test_a_files_entry_says_its_size_and_its_content(folder):
    for entry in folder.tasks[0]["files"].values():
        assert (folder.path / entry["file"]).stat().st_size == entry["bytes"]
        assert entry["sha256"][:12] in entry["file"]


def test_one_content_gives_one_folder_byte_for_byte(tmp_path):
    for name in ("one", "two"):
        add(RunFolder.create(tmp_path / name, HEADER))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for file in files(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_rewritten_task_has_its_new_tensors_and_its_old_file_is_gone(folder):
    before = folder.tasks[0]["files"]["task"]["file"]
    changed = {0: {"task": {"masks": torch.zeros(9)}, "head": tensors(0)["head"]}, 1: tensors(1)}
    folder.add_task(record("weather"), changed)
    assert torch.equal(RunFolder.open(folder.path).parts(0)["task"]["masks"], torch.zeros(9))
    assert before not in files(folder.path)


def test_leftovers_are_swept_with_the_next_task(folder):
    for leftover in ("tasks/0001.task-000000000000.safetensors", "tasks/.0001.tmp", "shared/x.safetensors"):
        (folder.path / leftover).write_bytes(b"left over")
    add(folder, "weather")
    named = [entry["file"] for task in folder.tasks for entry in task["files"].values()]
    assert files(folder.path) == sorted(["run.json", *named])


def test_a_folder_that_lost_its_empty_subfolder_takes_the_next_task(folder):
    # Archives and object stores keep no empty folders.
    shutil.rmtree(folder.path / "shared")
    add(RunFolder.open(folder.path), "weather")
    assert names(folder.path) == ["pets", "weather"]


# --- a failure at any moment ----------------------------------------------------------------------------------


class Breaks:
    """Lets the first `allowed` calls through and refuses the next one, whichever operation it is."""

    def __init__(self, patch, allowed):
        self.left, self.broken = allowed, False
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "open"), (Path, "unlink")):
            patch.setattr(owner, name, self.around(getattr(owner, name)))

    def around(self, real):
        def call(*args, **kwargs):
            if self.left == 0 and not self.broken:
                self.broken = True
                raise OSError("the disk has gone")
            self.left -= 1
            return real(*args, **kwargs)

        return call


def every_failure(action):
    """Run `action` failing at its 1st, 2nd, 3rd ... file operation, until it passes; yield after each failure."""
    for allowed in range(100):
        with pytest.MonkeyPatch.context() as patch:
            breaks = Breaks(patch, allowed)
            with contextlib.suppress(OSError):
                action()
        if not breaks.broken:
            assert allowed > 5, "too few operations: the test no longer sees them"
            return
        yield allowed
    raise AssertionError("it never passes")


def test_a_task_is_in_the_folder_whole_or_not_at_all_whenever_saving_fails(folder, tmp_path):
    pristine = shutil.copytree(folder.path, tmp_path / "pristine")
    path, seen = folder.path, set()

    def action():
        add(RunFolder.open(path), "weather")

    for _ in every_failure(action):
        seen.add(len(names(path)))
        assert names(path) in (["pets"], ["pets", "weather"])
        require_whole(path)
        if names(path) == ["pets"]:
            action()
        assert names(path) == ["pets", "weather"]
        require_whole(path)
        shutil.rmtree(path)
        shutil.copytree(pristine, path)
    assert 1 in seen


def test_the_same_open_folder_takes_the_task_again_after_any_failure(folder, tmp_path):
    pristine = shutil.copytree(folder.path, tmp_path / "pristine")
    path, held = folder.path, [RunFolder.open(folder.path)]
    for allowed in every_failure(lambda: add(held[0], "weather")):
        if [task["name"] for task in held[0].tasks] == ["pets"]:
            add(held[0], "weather")
        assert names(path) == ["pets", "weather"], f"failed after {allowed} operations"
        require_whole(path)
        shutil.rmtree(path)
        shutil.copytree(pristine, path)
        held[0] = RunFolder.open(path)


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    file = tmp_path / "file"

    def action():
        write_atomic(file, b"new")
        write_atomic(file, b"new")

    for _ in every_failure(action):
        assert not file.exists() or file.read_bytes() in (b"old", b"new")
        assert not [name for name in files(tmp_path) if name != "file"]
        file.write_bytes(b"old")


def test_a_record_that_is_no_json_leaves_the_folder_as_it_was(folder):
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.add_task({"name": "weather", "loss": float("nan")}, {1: tensors(1)})
    assert names(folder.path) == ["pets"]
    assert [task["name"] for task in folder.tasks] == ["pets"]


def test_saving_on_a_full_disk_is_refused_before_a_byte_is_written(folder, monkeypatch):
    before = files(folder.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, 10))
    with pytest.raises(RunError, match=r"run: saving needs [\d,]+ bytes, 10 are free. Make room"):
        add(folder, "weather")
    assert (files(folder.path), names(folder.path)) == (before, ["pets"])
    monkeypatch.undo()
    add(folder, "weather")
    assert names(folder.path) == ["pets", "weather"]


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "a/b",
        "/etc/passwd",
        "CON",
        "nul.txt",
        "..",
        ".",
        "",
        "a\x00b",
        "a\nb",
        "\N{SNAKE} task",
        "x" * 10_240,
    ],
    ids=["up", "slash", "absolute", "con", "nul", "parent", "here", "empty", "zero", "newline", "emoji", "long"],
)
def test_no_file_is_named_after_a_task(tmp_path, name):
    folder = RunFolder.create(tmp_path / "run", HEADER)
    add(folder, name)
    assert [file for file in files(tmp_path) if not file.startswith("run/")] == []
    stems = sorted(file.partition("-")[0] for file in files(tmp_path / "run"))
    assert stems == ["run.json", "tasks/0000.head", "tasks/0000.task"]
    assert names(tmp_path / "run") == [name]


@pytest.mark.parametrize(
    "file",
    ["../x", "tasks/../../x.safetensors", "/etc/passwd", "tasks/a b.safetensors", "run.json", "tasks/x.pkl", ""],
)
def test_a_manifest_that_names_another_kind_of_file_is_refused(folder, tmp_path, file):
    (tmp_path / "x").write_bytes(b"outside")
    manifest = json.loads((folder.path / "run.json").read_text())
    manifest["tasks"][0]["files"]["task"]["file"] = file
    (folder.path / "run.json").write_bytes(json_bytes(manifest))
    with pytest.raises(RunError, match=r"run\.json: .* is no file name of a run folder"):
        RunFolder.open(folder.path).parts(0, trust=True)


# --- what is damaged ----------------------------------------------------------------------------------------------


def test_a_folder_without_a_manifest_is_no_run(tmp_path):
    with pytest.raises(RunError, match=r"no run\.json here, so this is no run folder"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"run\.json: is no JSON"),
        (b"", r"run\.json: is no JSON"),
        (b"\xff\xfe", r"run\.json: is no JSON"),
        (b"[]", r"run\.json: format 'list', this version reads 1"),
        (b"{}", r"run\.json: format None"),
        (b'{"format": 2}', r"run\.json: format 2, this version reads 1"),
        (b'{"format": 1}', r"run\.json"),
        (json_bytes({"format": 1, **HEADER, "tasks": {}, "shared": None}), r"run\.json"),
        (json_bytes({"format": 1, **HEADER, "tasks": [7], "shared": None}), r"run\.json"),
        (json_bytes({"format": 1, **HEADER, "tasks": [{"name": "pets"}], "shared": None}), r"run\.json"),
    ],
    ids=[
        "cut",
        "empty",
        "no-text",
        "list",
        "no-format",
        "newer",
        "no-tasks",
        "tasks-no-list",
        "task-no-record",
        "task-without-files",
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(folder, content, message):
    (folder.path / "run.json").write_bytes(content)
    with pytest.raises(RunError, match=message):
        RunFolder.open(folder.path)


def test_a_missing_file_is_named(folder):
    name = folder.tasks[0]["files"]["head"]["file"]
    (folder.path / name).unlink()
    with pytest.raises(RunError, match=rf"{name}: cannot be read"):
        folder.parts(0)
    assert folder.changed_files() == [name]


def test_a_file_cut_short_is_named(folder):
    name = folder.tasks[0]["files"]["task"]["file"]
    file = folder.path / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(RunError, match=rf"{name}: its content is not what run\.json says"):
        folder.parts(0)
    with pytest.raises(RunError, match=rf"{name}: is no safetensors file"):
        folder.parts(0, trust=True)
    assert folder.changed_files() == [name]


def test_a_file_with_another_content_is_named(folder):
    name = folder.tasks[0]["files"]["task"]["file"]
    file = folder.path / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match=rf"{name}: its content is not what run\.json says"):
        folder.parts(0)
    assert folder.changed_files() == [name]
    assert folder.parts(0, trust=True)["task"]["masks"][-1] == 1


# --- a place that is taken --------------------------------------------------------------------------------------------


def test_an_empty_folder_is_a_place_for_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    assert RunFolder.create(tmp_path / "run", HEADER).tasks == []


def test_a_run_is_replaced_only_when_asked(folder):
    with pytest.raises(RunError, match=r"run: holds a run already\. Add --resume .*--overwrite"):
        RunFolder.create(folder.path, HEADER)
    assert names(folder.path) == ["pets"]
    assert RunFolder.create(folder.path, HEADER, overwrite=True).tasks == []
    assert files(folder.path) == ["run.json"]


def test_a_run_that_learned_nothing_yet_may_be_begun_again(tmp_path):
    RunFolder.create(tmp_path / "run", HEADER)
    assert RunFolder.create(tmp_path / "run", HEADER).tasks == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_run_is_never_removed(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="exists and is no run folder"):
        RunFolder.create(tmp_path, HEADER, overwrite=overwrite)
    with pytest.raises(RunError, match="exists and is no run folder"):
        RunFolder.create(tmp_path / "thesis.tex", HEADER, overwrite=overwrite)
    assert files(tmp_path) == ["thesis.tex"]
