"""A run that was interrupted anywhere ends with the bits of one that was not; what it keeps is JSON and safetensors."""

import contextlib
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from test_stream_run import PowerCut, load, task_files, verify_here
from typer.testing import CliRunner

import hf_cl.train_stream
import hf_cl.training.keeping
import hf_cl.training.kkt_start
from hf_cl import plugins, run_stream
from hf_cl import recipe as recipes
from hf_cl.cli.app import app
from hf_cl.errors import ConfigError, RunError, StoppedError
from hf_cl.learner import ContinualLearner
from hf_cl.storage.state_folder import StateFolder
from hf_cl.training.keeping import Keeper, random_state, set_random_state
from hf_cl.training.plain import from_plain, to_plain
from hf_cl.training.stop import listening
from hf_cl.tuner.layer_tasks import LayerTasks

pytest_plugins = ["tiny"]

EVERY = ["training.save_strategy=steps", "training.save_steps=1"]
"""Two tasks of 3 steps: `mask_share` .67 claims after the second, and the third trains values."""


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(hf_cl.train_stream, "verify_in_fresh_process", verify_here)


@pytest.fixture(scope="module")
def whole(tiny_recipe, tmp_path_factory):
    """The files of an uninterrupted run, by method and changes of the recipe; made once."""
    made = {}

    def get(method, *changes):
        if (method, *changes) not in made:
            place = tmp_path_factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(hf_cl.train_stream, "verify_in_fresh_process", verify_here)
                run_stream(load(tiny_recipe, method, *changes), place / "run")
            made[method, *changes] = task_files(place / "run")
        return made[method, *changes]

    return get


def cut(patch, owner, name, at, *, before):
    """Let the power go at the `at`-th call of a function, before or after it."""
    real, calls = getattr(owner, name), Counter()

    def call(*args, **named):
        calls["all"] += 1
        if calls["all"] == at and before:
            raise PowerCut
        found = real(*args, **named)
        if calls["all"] == at and not before:
            raise PowerCut
        return found

    patch.setattr(owner, name, call)


def interrupt(recipe, run, monkeypatch, owner, name, at, *, before=True):
    with monkeypatch.context() as patch:
        cut(patch, owner, name, at, before=before)
        with pytest.raises(PowerCut):
            run_stream(recipe, run)


def resume(recipe, run):
    """Go on with a run; return what it said."""
    lines = []
    run_stream(recipe, run, resume=True, progress=lines.append)
    return lines


def states(run):
    return sorted(place.name for place in (run / "state").glob("*"))


# --- anywhere ---------------------------------------------------------------------------------------------------

POINTS = {
    "the mask phase of the first task": (Keeper, "on_step_end", 2, True),
    "the mask phase of a later task": (Keeper, "on_step_end", 5, True),
    "the claim": (LayerTasks, "begin_weight_phase", 7, False),
    "the weight phase": (Keeper, "on_step_end", 6, True),
    "while it saves": (hf_cl.storage.state_folder, "write_new", 5, False),
    "before the bank is saved": (ContinualLearner, "add_to", 2, True),
    "between the bank and the run's record": (ContinualLearner, "_add_record", 2, True),
    "between the first bank and its record": (ContinualLearner, "_add_record", 1, True),
    "before the run's first record": (hf_cl.storage.run_folder, "write_atomic", 1, True),
    "before the states are removed": (StateFolder, "clear", 1, True),
    "between commit and next task": (StateFolder, "clear", 1, False),
}


SLOW = ("the mask phase of a later task", "before the bank is saved", "before the states are removed")


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=pytest.mark.slow if point in SLOW else ()) for point in POINTS]
)
def test_a_run_cut_anywhere_ends_with_the_bits_of_one_that_was_not(whole, tiny_recipe, tmp_path, monkeypatch, point):
    recipe, run = load(tiny_recipe, "exssnet", *EVERY), tmp_path / "run"
    owner, name, at, before = POINTS[point]
    interrupt(recipe, run, monkeypatch, owner, name, at, before=before)
    resume(recipe, run)
    assert task_files(run) == whole("exssnet")
    assert states(run) == []


OFTEN = ("supsup", "sfa", "eidetic")
ANEW = ("eidetic", "hypermask")


@pytest.mark.parametrize("at", [5, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in plugins.available("methods")],
)
def test_every_method_goes_on_in_the_middle_of_a_task(whole, tiny_recipe, tmp_path, monkeypatch, method, at):
    recipe, run = load(tiny_recipe, method, *EVERY), tmp_path / "run"
    interrupt(recipe, run, monkeypatch, Keeper, "on_step_end", at)
    lines = resume(recipe, run)
    assert any("goes on after step" in line for line in lines) is (method not in ANEW)
    assert task_files(run) == whole(method)


BEST = ["training.eval_strategy=epoch", "training.save_strategy=epoch", "training.load_best_model_at_end=true"]
OPTIONS = {
    "accumulation": ["training.gradient_accumulation_steps=2", "training.num_train_epochs=3"],
    "adafactor": ["training.optim=adafactor"],
    "momentum": ["training.optim=sgd", "training.optim_args=momentum=0.9"],
    "cosine": ["training.lr_scheduler_type=cosine", "training.warmup_steps=1"],
    "bf16": ["training.bf16=true"],
    "max_steps": ["training.max_steps=4"],
}


@pytest.mark.parametrize(
    "option", [pytest.param(name, marks=() if name == "accumulation" else pytest.mark.slow) for name in OPTIONS]
)
def test_it_goes_on_exactly_under_each_option(whole, tiny_recipe, tmp_path, monkeypatch, option):
    recipe, run = load(tiny_recipe, "exssnet", *OPTIONS[option], *EVERY), tmp_path / "run"
    interrupt(recipe, run, monkeypatch, Keeper, "on_step_end", 2)
    assert states(run) == ["0000-00000001"]
    resume(recipe, run)
    assert task_files(run) == whole("exssnet", *OPTIONS[option])


@pytest.mark.parametrize("method", ["exssnet", pytest.param("finetune", marks=pytest.mark.slow)])
def test_the_best_state_so_far_is_kept_too(whole, tiny_recipe, tmp_path, monkeypatch, method):
    changes = [*BEST, "training.num_train_epochs=3"]
    recipe, run = load(tiny_recipe, method, *changes), tmp_path / "run"
    # Ends in the third epoch of the second task; what was best is in the state after the second.
    interrupt(recipe, run, monkeypatch, Keeper, "on_step_end", 17)
    assert states(run)[-1] == "0001-00000006"
    resume(recipe, run)
    assert task_files(run) == whole(method, *changes)


def test_a_start_by_kkt_and_the_growth_of_its_mask_go_on(tmp_path, base_folder, monkeypatch):
    """The second task's texts are the first one's, so KKT starts from its mask, which is whole at once."""
    sizes = {"train": 48, "validation": 6, "test": 10}
    for name in ("pets", "weather"):
        tiny.write_task(tmp_path / "recipe" / "data", name, labels=tiny.LABELS["pets"], sizes=sizes)
    kkt = {"name": "exssnet", "density": 0.3, "start": "kkt", "density_warmup": 1.0}
    file = tiny.write_recipe(tmp_path / "recipe", base_folder, method=kkt)
    recipe = recipes.load(str(file), ["training.num_train_epochs=2", *EVERY])
    monkeypatch.setattr("hf_cl.starts.kkt.MARGIN_OF_NOISE", -9.0)  # a tiny base tells little: take the best
    run_stream(recipe, tmp_path / "whole")
    facts = json.loads((tmp_path / "whole" / "run.json").read_text())["tasks"][1]["facts"]
    assert facts["kkt"]["source"] == 0
    interrupt(recipe, tmp_path / "run", monkeypatch, Keeper, "on_step_end", 12 + 3)
    resume(recipe, tmp_path / "run")
    assert task_files(tmp_path / "run") == task_files(tmp_path / "whole")
    resumed = json.loads((tmp_path / "run" / "run.json").read_text())["tasks"][1]["facts"]
    assert resumed == facts


def test_kkt_asks_the_newest_task_itself_whether_it_was_loaded_or_not(tmp_path, base_folder, monkeypatch):
    """Of three tasks the third has two candidates: in one process the newest is loaded, after a cut it is on disk."""
    asked, real, real_base = [], hf_cl.training.kkt_start._features, hf_cl.training.kkt_start.ask_base

    def features(tuner, adapter, *rest):
        found = real(tuner, adapter, *rest)
        asked.append((adapter, found))
        return found

    def ask_base(*rest):
        seen = real_base(*rest)
        asked.append((None, seen.head))
        return seen

    monkeypatch.setattr(hf_cl.training.kkt_start, "_features", features)
    monkeypatch.setattr(hf_cl.training.kkt_start, "ask_base", ask_base)
    names = ("pets", "weather", "food")
    file = tiny.write_recipe(tmp_path / "recipe", base_folder, names, method={"name": "exssnet", "density": 0.3})
    recipe = recipes.load(str(file), ["training.num_train_epochs=1"])
    run_stream(recipe, tmp_path / "whole")
    assert [adapter for adapter, _ in asked[-3:]] == [None, "task0", "task1"]
    assert not any(torch.equal(asked[-3][1], found) for _, found in asked[-2:]), "no candidate answers as the bare base"
    interrupt(recipe, tmp_path / "run", monkeypatch, StateFolder, "clear", 2, before=False)
    resume(recipe, tmp_path / "run")
    assert task_files(tmp_path / "run") == task_files(tmp_path / "whole")


def test_without_the_random_state_it_would_not_be_the_same(whole, tiny_recipe, tmp_path, monkeypatch):
    recipe, run = load(tiny_recipe, "exssnet", *EVERY), tmp_path / "run"
    interrupt(recipe, run, monkeypatch, Keeper, "on_step_end", 2)
    monkeypatch.setattr(Keeper, "load_random", lambda self: None)
    resume(recipe, run)
    assert task_files(run) != whole("exssnet")


# --- what is kept -----------------------------------------------------------------------------------------------


def test_the_newest_two_states_are_kept_and_are_json_and_safetensors(tiny_recipe, tmp_path, monkeypatch):
    recipe, run = load(tiny_recipe, "exssnet", *EVERY, "training.num_train_epochs=2"), tmp_path / "run"
    interrupt(recipe, run, monkeypatch, Keeper, "on_step_end", 5)
    assert states(run) == ["0000-00000003", "0000-00000004"]
    files = [file for file in (run / "state").rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"tensors.safetensors", "trainer_state.json", "state.json"}
    for file in files:
        if file.suffix == ".json":
            json.loads(file.read_text())
    assert not [file for file in (run / "trainer").rglob("*") if file.is_file()], "the Trainer's own would be pickles"


def test_nothing_is_kept_of_a_short_task_that_nobody_asked_to_keep(tiny_recipe, tmp_path, monkeypatch):
    recipe, run = load(tiny_recipe, "supsup"), tmp_path / "run"
    interrupt(recipe, run, monkeypatch, Keeper, "on_step_end", 3)
    assert states(run) == []


def test_a_state_is_kept_when_its_time_has_come(whole, tiny_recipe, tmp_path, monkeypatch):
    recipe, run = load(tiny_recipe, "supsup"), tmp_path / "run"
    real = hf_cl.train_stream.Keeping
    monkeypatch.setattr(hf_cl.train_stream, "Keeping", lambda *args, **named: real(*args, **named, minutes=0.0))
    interrupt(recipe, run, monkeypatch, Keeper, "on_step_end", 3)
    assert states(run) == ["0000-00000001", "0000-00000002"]
    resume(recipe, run)
    assert task_files(run) == whole("supsup")


DAMAGES = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one bit": lambda file: file.write_bytes(bytes([*file.read_bytes()[:-1], file.read_bytes()[-1] ^ 1])),
    "gone": Path.unlink,
}


# JSON with another white space at its end is the same JSON.
KINDS = [(name, damage) for name in ("tensors.safetensors", "trainer_state.json", "state.json") for damage in DAMAGES
         if (name, damage) != ("state.json", "one bit")]  # fmt: skip
QUICK = [("tensors.safetensors", "one bit"), ("state.json", "cut short")]


@pytest.mark.parametrize(
    ("name", "damage"), [pytest.param(*kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_a_torn_state_is_passed_over_and_named(whole, tiny_recipe, cut_run, tmp_path, name, damage):
    run = shutil.copytree(cut_run, tmp_path / "run")
    DAMAGES[damage](run / "state" / "0000-00000002" / name)
    lines = resume(load(tiny_recipe, "exssnet", *EVERY), run)
    assert [line for line in lines if line.startswith("passed over") and "0000-00000002" in line]
    assert [line for line in lines if "goes on after step 1" in line]
    assert task_files(run) == whole("exssnet")


@pytest.fixture(scope="module")
def cut_run(tiny_recipe, tmp_path_factory):
    """A run cut in the first task, with states after steps 1 and 2."""
    run = tmp_path_factory.mktemp("cut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(load(tiny_recipe, "exssnet", *EVERY), run, patch, Keeper, "on_step_end", 3)
    assert states(run) == ["0000-00000001", "0000-00000002"]
    return run


def test_where_every_state_is_torn_the_task_begins_anew(whole, tiny_recipe, cut_run, tmp_path):
    run = shutil.copytree(cut_run, tmp_path / "run")
    for file in (run / "state").rglob("tensors.safetensors"):
        file.write_bytes(b"")
    lines = resume(load(tiny_recipe, "exssnet", *EVERY), run)
    assert len([line for line in lines if line.startswith("passed over")]) == 2
    assert task_files(run) == whole("exssnet")


def test_another_number_of_processes_is_refused_by_both_numbers(cut_run):
    with pytest.raises(RunError, match=r"was saved by 1 processes, and 2 would go on\. Resume with as many, or remove"):
        StateFolder(cut_run / "state").newest(0, world=2)


def test_a_run_with_a_task_in_its_middle_is_not_replaced_unasked(tiny_recipe, cut_run, tmp_path):
    run = shutil.copytree(cut_run, tmp_path / "run")
    recipe = load(tiny_recipe, "exssnet", *EVERY)
    with pytest.raises(RunError, match="holds a run already"):
        run_stream(recipe, run)
    run_stream(recipe, run, overwrite=True)
    assert states(run) == []


def test_a_failed_write_leaves_the_states_before_it(whole, tiny_recipe, tmp_path, monkeypatch):
    recipe, run = load(tiny_recipe, "exssnet", *EVERY), tmp_path / "run"
    with monkeypatch.context() as patch:
        calls = Counter()

        def full(temporary, data, path):
            calls["all"] += 1
            if calls["all"] == 5:
                raise OSError(28, "No space left on device", str(path))
            return real(temporary, data, path)

        real = hf_cl.storage.state_folder.write_new
        patch.setattr(hf_cl.storage.state_folder, "write_new", full)
        with pytest.raises(OSError, match="No space left"):
            run_stream(recipe, run)
    assert states(run) == ["0000-00000001"]
    resume(recipe, run)
    assert task_files(run) == whole("exssnet")


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    folder = StateFolder(tmp_path / "state")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(RunError, match=r"saving needs \d+ bytes, 0 are free"):
        folder.write(0, 1, {}, b"{}", {"a": torch.zeros(3)})
    assert states(tmp_path) == []


def test_nested_values_come_back_as_they_were():
    value = {"state": {0: {"step": torch.tensor(3.0), "RMS": 0.1}}, "betas": (0.9, 0.999), "inf": float("inf"),
             "none": None, "list": [1, [2, (True, "x")]], 7: {}}  # fmt: skip
    tensors = {}
    written = json.loads(json.dumps(to_plain(value, tensors, "optimizer"), allow_nan=False))
    assert list(tensors) == ["optimizer.state.0.step"]
    assert from_plain(written, tensors) == value
    with pytest.raises(ConfigError, match=r"schedule\.by: a function cannot be kept"):
        to_plain({"by": lambda: 1}, {}, "schedule")


def test_the_random_state_comes_back_through_json():
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()

    draw()
    held = json.loads(json.dumps(random_state()))
    first = draw()
    assert draw() != first
    set_random_state(held)
    assert draw() == first


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops_and_the_run_goes_on(whole, tiny_recipe, tmp_path, monkeypatch, sent):
    recipe, run = load(tiny_recipe, "exssnet"), tmp_path / "run"
    with monkeypatch.context() as patch:
        real, calls = Keeper.on_step_end, Counter()

        def send(self, *args, **named):
            calls["all"] += 1
            if calls["all"] == 5:
                os.kill(os.getpid(), sent)
            return real(self, *args, **named)

        patch.setattr(Keeper, "on_step_end", send)
        with pytest.raises(StoppedError, match=rf"stopped by {sent.name} after step 2 of 3, which is saved\. Go on"):
            run_stream(recipe, run)
    assert states(run) == ["0001-00000002"]
    assert signal.getsignal(sent) == signal.SIG_DFL
    resume(recipe, run)
    assert task_files(run) == whole("exssnet")


def test_a_signal_after_a_tasks_last_step_stops_before_the_next(whole, tiny_recipe, tmp_path, monkeypatch):
    recipe, run = load(tiny_recipe, "supsup"), tmp_path / "run"
    with monkeypatch.context() as patch:
        real = ContinualLearner.add_to

        def send(self, folder):
            os.kill(os.getpid(), signal.SIGTERM)
            real(self, folder)

        patch.setattr(ContinualLearner, "add_to", send)
        with pytest.raises(StoppedError, match=r"stopped before task 'weather'"):
            run_stream(recipe, run)
    assert states(run) == []
    resume(recipe, run)
    assert task_files(run) == whole("supsup")


def test_a_stopped_command_exits_with_a_code_that_means_try_again(tiny_recipe, tmp_path, monkeypatch):
    def stop(*args, **named):
        raise StoppedError("stopped by SIGTERM after step 2 of 3, which is saved.")

    monkeypatch.setattr(hf_cl.train_stream, "run_stream", stop)
    done = CliRunner().invoke(app, ["train", str(tiny_recipe), "--output-dir", str(tmp_path / "run")])
    assert done.exit_code == 75
    assert "hf-cl: stopped: stopped by SIGTERM" in done.output


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGUSR1)
    with contextlib.suppress(PowerCut), listening() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.signal == "SIGUSR1"
        raise PowerCut
    assert signal.getsignal(signal.SIGUSR1) == before
