"""`run_stream`: a recipe becomes a run folder with a proof; interrupted, it goes on as if nothing had happened."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from transformers import Trainer

import hf_cl.learner
import hf_cl.train_stream
from hf_cl import MaskBank, plugins, run_stream, verify
from hf_cl import recipe as recipes
from hf_cl.errors import ConfigError, HfClError, RunError
from hf_cl.metrics import AccuracyMatrix
from hf_cl.tuning import tune

pytest_plugins = ["tiny"]

KEYS = [
    "stream", "method", "model", "seed", "tasks", "accuracy_matrix", "average_accuracy", "backward_transfer",
    "forgetting", "learning_accuracy", "bytes_per_task", "head_bytes_per_task", "bytes_shared", "bytes_carried",
    "trainable_per_task", "capacity_used", "owned_digest_before", "owned_digest_after", "exact", "seconds",
    "tuning", "versions",
]  # fmt: skip
EXACT = ("supsup", "exssnet", "lora", "independent")
FORGET = (
    "average", "ewc", "finetune", "joint", "l2", "replay", "sfa", "ssnet", "task_arithmetic", "ties", "wise_ft",
)  # fmt: skip
MERGED_ALIKE = ("average", "task_arithmetic", "wise_ft")
"""What differs from `ties` is the rule alone, and tests/test_merging.py and tests/test_rivals.py hold that."""
STATE = ("average", "ewc", "replay", "task_arithmetic", "ties", "wise_ft")
"""Methods whose next task needs more of the earlier ones than answers them."""
SETTINGS = {"exssnet": ["method.start=fresh"], "replay": ["method.share=0.25"]}
QUICK = ["training.num_train_epochs=1"]


def each(*methods):
    """Return methods as parameters of a test; one of those that merge is enough for the default run."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in MERGED_ALIKE else name for name in methods]


def overrides(method):
    known = plugins.load("methods", method).Options.__dataclass_fields__
    density = ["method.density=0.3"] if "density" in known else []
    rate = ["method.learning_rate=0.01"] if "learning_rate" in known and method != "lora" else []
    return [f"method={method}", *density, *rate, *SETTINGS.get(method, []), *QUICK]


def load(recipe, method="supsup", *more):
    return recipes.load(str(recipe), [*overrides(method), *more])


def verify_here(path):
    """Return what the fresh process would say, without the seconds of its imports."""
    verdict = verify(path)
    return {"exact": verdict.exact, "same_logits": verdict.same_logits, "files": [], "tasks": verdict.tasks}


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(hf_cl.train_stream, "verify_in_fresh_process", verify_here)


@pytest.fixture
def untrained(monkeypatch):
    """Fails the test if anything trains."""

    def train(*_):
        raise AssertionError("it trains")

    monkeypatch.setattr(Trainer, "train", train)


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory):
    """A finished run of every method, by name: its folder, and what `run_stream` returned."""
    place, made = tmp_path_factory.mktemp("finished"), {}

    def get(method):
        if method not in made:
            with pytest.MonkeyPatch.context() as patch:
                if method != "exssnet":
                    patch.setattr(hf_cl.train_stream, "verify_in_fresh_process", verify_here)
                made[method] = place / method, run_stream(load(tiny_recipe, method), place / method)
        return made[method]

    return get


def manifest_of(run):
    return json.loads((run / "run.json").read_text())


def task_files(run):
    """Return the files that hold what was learned, by name."""
    files = [*(run / "tasks").iterdir(), *(run / "bank").glob("*.safetensors"), *(run / "bank").glob("bank.json")]
    return {file.name: file.read_bytes() for file in files}


# --- results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", each(*EXACT, *FORGET))
def test_the_results_say_what_was_measured(finished, method):
    run, found = finished(method)
    assert set(KEYS) <= set(found)
    assert json.loads((run / "results.json").read_text()) == found
    assert found["tasks"] == ["pets", "weather"]
    assert (found["method"]["name"], found["seed"]) == (method, 0)
    matrix = AccuracyMatrix.from_list(found["tasks"], found["accuracy_matrix"])
    for name in ("average_accuracy", "backward_transfer", "forgetting", "learning_accuracy"):
        assert found[name] == getattr(matrix, name)
    assert found["accuracy_matrix"][0][1] is None
    assert set(found["seconds"]["by_task"]) == {"pets", "weather"}
    assert found["versions"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.parametrize("method", EXACT)
def test_an_exact_method_is_exact_and_forgets_nothing(finished, method):
    _, found = finished(method)
    assert found["exact"] is True
    assert found["forgetting"] == 0.0
    assert found["backward_transfer"] == 0.0
    assert found["owned_digest_before"] == found["owned_digest_after"]


@pytest.mark.parametrize("method", each(*FORGET))
def test_a_method_without_protection_is_not_called_exact(finished, method):
    _, found = finished(method)
    assert found["exact"] is False
    before, after = found["owned_digest_before"], found["owned_digest_after"]
    assert before["pets"] != after["pets"]
    assert before["weather"] == after["weather"]


@pytest.mark.parametrize("moved", ["exact", "same_logits"])
def test_exact_is_what_verifying_said(tiny_recipe, tmp_path, monkeypatch, moved):
    """Of a method that is exact by construction, too."""
    monkeypatch.setattr(hf_cl.train_stream, "verify_in_fresh_process", lambda run: {**verify_here(run), moved: False})
    assert run_stream(load(tiny_recipe), tmp_path / "run")["exact"] is False


@pytest.mark.parametrize("method", each(*EXACT, *FORGET))
def test_the_bytes_are_those_on_the_disk(finished, method):
    run, found = finished(method)
    named = manifest_of(run)["tasks"]
    if (run / "bank").exists():
        bank = MaskBank.from_pretrained(run / "bank").manifest
        routing = {task.name: task.sizes["routing"] for task in bank.tasks}  # shared: no task computes with it
        for task in bank.tasks:
            whole = found["bytes_per_task"][task.name] + found["head_bytes_per_task"][task.name]
            assert whole + routing[task.name] == (run / "bank" / task.file.name).stat().st_size
        common = [run / "bank" / name for name in ("bank.json", bank.shared.name)]
        assert found["bytes_shared"] == sum(file.stat().st_size for file in common) + sum(routing.values())
        assert not [*(run / "tasks").iterdir()]
        return
    for part, key in (("task", "bytes_per_task"), ("head", "head_bytes_per_task")):
        for task in named:
            entry = task["files"].get(part)
            assert found[key][task["name"]] == ((run / entry["file"]).stat().st_size if entry else 0)
    state = [entry for task in named for part, entry in task["files"].items() if part not in ("task", "head")]
    assert found["bytes_carried"] == sum((run / entry["file"]).stat().st_size for entry in state)
    assert bool(state) is (method in STATE)
    assert found["bytes_shared"] == sum(file.stat().st_size for file in (run / "shared").iterdir())
    assert sorted(task_files(run)) == sorted(Path(e["file"]).name for t in named for e in t["files"].values())


def test_the_folder_holds_the_run_and_no_rubbish(finished):
    run, _ = finished("supsup")
    left = {file.name for file in run.iterdir()} - {"accuracy.png"}
    assert left <= {"run.json", "results.json", "bank", "tasks", "shared", "trainer"}
    assert not [file for file in (run / "trainer").rglob("*") if file.is_file()]


@pytest.mark.parametrize("method", ["exssnet", "lora"])
def test_one_seed_gives_the_same_files_twice(finished, tiny_recipe, tmp_path, here, method):
    run_stream(load(tiny_recipe, method), tmp_path / "again")
    assert task_files(tmp_path / "again") == task_files(finished(method)[0])


def test_another_seed_gives_other_files(finished, tiny_recipe, tmp_path, here):
    found = run_stream(load(tiny_recipe, "supsup", "training.seed=1"), tmp_path / "again")
    assert found["seed"] == 1
    both = set(task_files(tmp_path / "again")) & set(task_files(finished("supsup")[0]))
    # The same texts have the same covariance, whatever is trained on them.
    assert {name.partition("-")[0] for name in both} == {"bank.json", "shared"}


def test_the_users_metrics_are_recorded(tiny_recipe, tmp_path, here):
    run_stream(load(tiny_recipe), tmp_path / "run", compute_metrics=lambda _: {"mine": 0.25})
    assert all(task["metrics"]["pets"]["mine"] == 0.25 for task in manifest_of(tmp_path / "run")["tasks"])


# --- resuming ------------------------------------------------------------------------------------------------


class PowerCut(Exception):
    pass


def interrupt(recipe, run, monkeypatch, at=1):
    """Run until task number `at` would train."""
    real = hf_cl.learner.train_task

    def train_task(method, index, *rest):
        if index == at:
            raise PowerCut
        return real(method, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(hf_cl.learner, "train_task", train_task)
        with pytest.raises(PowerCut):
            run_stream(recipe, run)


@pytest.mark.parametrize("method", each(*EXACT, *(method for method in FORGET if method != "ssnet")))
def test_a_resumed_run_is_the_uninterrupted_one(finished, tiny_recipe, tmp_path, monkeypatch, here, method):
    recipe, run = load(tiny_recipe, method), tmp_path / "run"
    interrupt(recipe, run, monkeypatch)
    assert [task["name"] for task in manifest_of(run)["tasks"]] == ["pets"]
    assert not (run / "results.json").exists()
    lines = []
    found = run_stream(recipe, run, resume=True, progress=lines.append)
    whole, expected = finished(method)
    assert len([line for line in lines if line.startswith("[")]) == 1, "the first task is not learned again"
    for ours, theirs in zip(manifest_of(run)["tasks"], manifest_of(whole)["tasks"], strict=True):
        assert ours["parts"] == theirs["parts"]
        assert ours["metrics"] == theirs["metrics"]
        assert ours["files"] == theirs["files"]
    assert task_files(run) == task_files(whole)
    assert found["accuracy_matrix"] == expected["accuracy_matrix"]
    assert found["exact"] == expected["exact"]


def test_a_start_by_kkt_is_resumed_too(tiny_recipe, tmp_path, monkeypatch, here):
    recipe = load(tiny_recipe, "exssnet", "method.start=kkt")
    run_stream(recipe, tmp_path / "whole")
    interrupt(recipe, tmp_path / "run", monkeypatch)
    run_stream(recipe, tmp_path / "run", resume=True)
    assert task_files(tmp_path / "run") == task_files(tmp_path / "whole")


def test_a_run_interrupted_before_its_first_task_is_resumed(finished, tiny_recipe, tmp_path, monkeypatch, here):
    recipe = load(tiny_recipe)
    interrupt(recipe, tmp_path / "run", monkeypatch, at=0)
    run_stream(recipe, tmp_path / "run", resume=True)
    assert task_files(tmp_path / "run") == task_files(finished("supsup")[0])


def test_a_run_interrupted_before_its_results_only_writes_them(finished, tiny_recipe, tmp_path, here, untrained):
    whole, expected = finished("supsup")
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "results.json").unlink()
    found = run_stream(load(tiny_recipe), run, resume=True)
    same = set(KEYS) - {"seconds"}
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}


def test_resuming_a_finished_run_returns_its_results_and_says_so(finished, tiny_recipe, untrained):
    run, expected = finished("supsup")
    lines = []
    assert run_stream(load(tiny_recipe), run, resume=True, progress=lines.append) == expected
    assert lines == [f"{run} is finished: 2 tasks. Nothing to do."]


def test_resuming_where_nothing_is_begins(finished, tiny_recipe, tmp_path, here):
    run_stream(load(tiny_recipe), tmp_path / "run", resume=True)
    assert task_files(tmp_path / "run") == task_files(finished("supsup")[0])


OTHERS = {
    "method": ["method=lora"],
    r"method\.density": ["method.density=0.2"],
    "training": ["training.learning_rate=0.5"],
    "max_length": ["training.max_length=9"],
    "stream": ["stream=[{name: pets, dataset: data/pets}]"],
    "model": ["model=elsewhere"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_is_not_resumed_with_another_recipe(finished, tiny_recipe, untrained, what):
    run, _ = finished("supsup")
    before = (run / "run.json").read_bytes()
    with pytest.raises(RunError, match=rf"is a run with another .*{what}.*choose another --output-dir"):
        run_stream(load(tiny_recipe, "supsup", *OTHERS[what]), run, resume=True)
    assert (run / "run.json").read_bytes() == before


def test_a_run_is_not_resumed_on_data_with_other_labels(tmp_path, base_folder, monkeypatch, here):
    file = tiny.write_recipe(tmp_path / "recipe", base_folder)
    interrupt(load(file), tmp_path / "run", monkeypatch)
    shutil.rmtree(file.parent / "data" / "pets")
    tiny.write_task(file.parent / "data", "pets", labels=("a", "b", "c"))
    with pytest.raises(HfClError, match="pets"):
        run_stream(load(file), tmp_path / "run", resume=True)


def test_a_run_is_not_resumed_on_another_base(tmp_path, monkeypatch, here, untrained):
    base = tiny.save_base(tmp_path / "models" / "tiny-bert")
    file = tiny.write_recipe(tmp_path / "recipe", base)
    interrupt(load(file), tmp_path / "run", monkeypatch, at=0)
    tiny.save_base(base, seed=5)
    with pytest.raises(RunError, match="was learned on another"):
        run_stream(load(file), tmp_path / "run", resume=True)


# --- a place that is taken ------------------------------------------------------------------------------------


def test_a_run_that_is_there_is_refused_before_any_work(finished, tiny_recipe, untrained):
    run, _ = finished("supsup")
    before = task_files(run)
    with pytest.raises(RunError, match=r"holds a run already\. Add --resume .* --overwrite"):
        run_stream(load(tiny_recipe), run)
    assert task_files(run) == before


def test_a_folder_that_is_no_run_is_refused_before_any_work(tiny_recipe, tmp_path, untrained):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="exists and is no run folder"):
            run_stream(load(tiny_recipe), tmp_path, overwrite=overwrite)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_overwritten_when_asked(finished, tiny_recipe, tmp_path, here):
    run = shutil.copytree(finished("lora")[0], tmp_path / "run")
    found = run_stream(load(tiny_recipe), run, overwrite=True)
    assert found["method"]["name"] == "supsup"
    assert task_files(run) == task_files(finished("supsup")[0])


# --- tuning -----------------------------------------------------------------------------------------------------


TUNING = {"method.density": [0.2, 0.4], "training.learning_rate": [0.001, 0.01]}


@pytest.fixture
def tuned_recipe(tmp_path, base_folder):
    """Three tasks, so that the third must be left alone; a grid of two keys."""
    return tiny.write_recipe(
        tmp_path / "recipe", base_folder, ("pets", "weather", "food"), method={"name": "supsup"}, tuning=TUNING
    )


def test_options_are_tuned_on_validation_rows_of_the_first_two_tasks(tuned_recipe, tmp_path, monkeypatch, here):
    looked, real = [], hf_cl.learner.tokenise

    def tokenise(task, *rest):
        looked.append((task.name, len(task.test), task.test["text"][:] == task.validation["text"][:]))
        return real(task, *rest)

    monkeypatch.setattr(hf_cl.learner, "tokenise", tokenise)
    checked = recipes.load(str(tuned_recipe), QUICK)
    found = run_stream(checked, tmp_path / "run")
    grid, run = looked[:-3], looked[-3:]
    assert grid == [("pets", 6, True), ("weather", 6, True)] * 4
    assert run == [("pets", 10, False), ("weather", 10, False), ("food", 10, False)]
    tuning = found["tuning"]
    assert (tuning["tasks"], tuning["split"]) == (["pets", "weather"], "validation")
    tried = [trial["options"] for trial in tuning["trials"]]
    density = tuning["chosen"]["method.density"]
    assert tried[:2] == [{"method.density": 0.2}, {"method.density": 0.4}]
    assert tried[2:] == [{"method.density": density, "training.learning_rate": rate} for rate in (0.001, 0.01)]
    assert all(0 <= trial["validation_accuracy"] <= 1 for trial in tuning["trials"])
    assert found["method"]["options"]["density"] == density
    assert found["training"]["learning_rate"] == tuning["chosen"]["training.learning_rate"]


def test_a_key_keeps_its_best_value_and_the_first_of_equals(tuned_recipe, monkeypatch):
    scores = {0.2: 0.5, 0.4: 0.7}
    tried = []

    def score(recipe, tasks):
        tried.append((recipe.options.density, recipe.training["learning_rate"]))
        return scores[recipe.options.density]

    monkeypatch.setattr("hf_cl.tuning._score", score)
    chosen, outcome = tune(recipes.load(str(tuned_recipe)), [tiny.task()], lambda _: None)
    assert outcome["chosen"] == {"method.density": 0.4, "training.learning_rate": 0.001}
    assert (chosen.options.density, chosen.training["learning_rate"]) == (0.4, 0.001)
    assert tried == [(0.2, 0.01), (0.4, 0.01), (0.4, 0.001), (0.4, 0.01)]


def test_a_tuned_run_is_resumed_with_what_was_chosen(tuned_recipe, tmp_path, monkeypatch, here):
    checked = recipes.load(str(tuned_recipe), QUICK)
    monkeypatch.setattr("hf_cl.tuning._score", lambda recipe, *_: recipe.options.density)
    run_stream(checked, tmp_path / "whole")
    interrupt(checked, tmp_path / "run", monkeypatch, at=1)
    found = run_stream(checked, tmp_path / "run", resume=True)
    assert found["tuning"]["chosen"]["method.density"] == 0.4
    assert task_files(tmp_path / "run") == task_files(tmp_path / "whole")


@pytest.mark.parametrize("change", [["stream=[{name: food, dataset: data/food}]"], ["training.max_length=9"]])
def test_a_tuned_run_is_not_resumed_with_another_recipe(tuned_recipe, tmp_path, monkeypatch, here, change):
    monkeypatch.setattr("hf_cl.tuning._score", lambda *_: 0.5)
    interrupt(recipes.load(str(tuned_recipe), QUICK), tmp_path / "run", monkeypatch, at=1)
    with pytest.raises(RunError, match="is a run with another"):
        run_stream(recipes.load(str(tuned_recipe), [*QUICK, *change]), tmp_path / "run", resume=True)


def test_a_run_stopped_while_tuning_can_be_begun_again(tuned_recipe, tmp_path, monkeypatch, here):
    checked = recipes.load(str(tuned_recipe), QUICK)
    interrupt(checked, tmp_path / "run", monkeypatch, at=1)
    assert not (tmp_path / "run" / "run.json").exists(), "it was stopped in the first trial"
    with monkeypatch.context() as patch:
        patch.setattr("hf_cl.tuning._score", lambda *_: 0.5)
        found = run_stream(checked, tmp_path / "run", resume=True)
    assert found["tasks"] == ["pets", "weather", "food"]


@pytest.mark.parametrize(
    "tuning",
    [{"training.learning_rat": [0.1]}, {"method.density": [0.2], "method.densty": [0.3]}],
    ids=["first-key", "second-key"],
)
def test_a_grid_that_cannot_be_tried_is_refused_before_any_trial(tuned_recipe, tmp_path, untrained, tuning):
    values = yaml.safe_load(tuned_recipe.read_text())
    tuned_recipe.write_text(yaml.safe_dump({**values, "tuning": tuning}))
    with pytest.raises(ConfigError):
        run_stream(recipes.load(str(tuned_recipe)), tmp_path / "run")
