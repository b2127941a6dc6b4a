"""A sweep: all combinations are checked first, none is run twice, and no test row is looked at to choose by."""

import json

import pytest
import tiny
import yaml
from typer.testing import CliRunner

import hf_cl.learner
import hf_cl.sweep
import hf_cl.train_stream
from hf_cl import recipe as recipes
from hf_cl import run_stream, verify
from hf_cl.cli import app
from hf_cl.errors import ConfigError, DataError, RunError, TrainingError
from hf_cl.evaluate_run import evaluate_run
from hf_cl.sweep import require_finished, sweep
from hf_cl.sweep_plan import plan

pytest_plugins = ["tiny"]

BASE = ["method=supsup", "training.num_train_epochs=1"]
DENSITIES = "method.density=0.2,0.4"


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """Verify in this process; that a fresh one is asked, test_stream_run shows."""

    def verdict(path):
        found = verify(path)
        return {"exact": found.exact, "same_logits": found.same_logits, "files": [], "tasks": found.tasks}

    monkeypatch.setattr(hf_cl.train_stream, "verify_in_fresh_process", verdict)
    monkeypatch.setattr(hf_cl.train_stream, "_plot", lambda *_: None)


def planned(recipe, *texts, **more):
    return plan(str(recipe), [*BASE, *texts], **more)


def fake(outcomes=None, seen=None):
    """Return a `run_stream` that trains nothing; `outcomes` maps a density to an accuracy or an error."""

    def run_stream(recipe, place, *, resume, split, progress):
        assert resume
        if seen is not None:
            seen.append((recipe.options.density, recipe.training["seed"], split))
        outcome = (outcomes or {}).get(recipe.options.density, 0.5)
        if isinstance(outcome, Exception):
            raise outcome
        place.mkdir(parents=True, exist_ok=True)
        (place / "results.json").write_text("{}")
        return {
            "average_accuracy": outcome + 0.01 * recipe.training["seed"],
            "learning_accuracy": 0.9,
            "forgetting": 0.0,
            "exact": True,
            "bytes_shared": 0,
            "capacity_used": None,
            "method": {"name": "supsup"},
            "bytes_per_task": {"pets": 100, "weather": 200},
            "head_bytes_per_task": {"pets": 10, "weather": 10},
            "seconds": {"by_task": {"pets": 1.0, "weather": 2.0}},
        }

    return run_stream


# --- the plan ----------------------------------------------------------------------------------------------


def test_every_combination_and_seed_is_a_run_of_its_own(tiny_recipe):
    found = planned(tiny_recipe, DENSITIES, "method.scale=1.0,2.0", seeds=(0, 1))
    assert (found.split, found.seeds, found.recipe) == ("validation", (0, 1), "tiny")
    assert found.values == {"method.density": [0.2, 0.4], "method.scale": [1.0, 2.0]}
    assert found.fixed == {"method": "supsup", "training.num_train_epochs": 1}
    assert [(t.recipe.options.density, t.recipe.options.scale, t.seed) for t in found.trials] == [
        (density, scale, seed) for density in (0.2, 0.4) for scale in (1.0, 2.0) for seed in (0, 1)
    ]
    assert len({trial.name for trial in found.trials}) == 8
    assert all(trial.recipe.training["seed"] == trial.seed for trial in found.trials)


def test_a_block_is_replaced_before_what_is_inside_it_in_whatever_order_they_are_given(tiny_recipe):
    (trial,) = plan(str(tiny_recipe), ["method.density=0.25", "method=supsup"]).trials
    assert (trial.recipe.method, trial.recipe.options.density) == ("supsup", 0.25)


def test_values_are_yaml_and_may_hold_commas_of_their_own(tiny_recipe):
    found = planned(tiny_recipe, "training.optim_args=null,'a=1,b=2'", "method.density=2e-1,0.4")
    assert found.values == {"training.optim_args": [None, "a=1,b=2"], "method.density": [0.2, 0.4]}


def test_a_runs_name_is_safe_and_its_digest_is_of_all_that_decides(tiny_recipe):
    def digest(*texts, **more):
        (trial,) = planned(tiny_recipe, "method.density=0.2", *texts, **more).trials
        return trial.digest

    assert len({digest(), digest(split="test"), digest(seeds=[5]), digest("training.max_length=9")}) == 4
    stream = (
        "stream=[{name: 'a', dataset: data/pets}],[{name: 'b', dataset: data/pets}, {name: ../c, dataset: data/pets}]"
    )
    with pytest.raises(ConfigError, match="a name starts with"):
        planned(tiny_recipe, stream)
    name = planned(tiny_recipe, stream.replace("../c", "c d"), "method.density=0.2").trials[1].name
    assert name.replace("-", "").replace("_", "").replace("=", "").isalnum() and len(name) < 100


@pytest.mark.parametrize(
    ("texts", "more", "message"),
    [
        (["method.densty=0.1,0.2"], {}, r"combination method\.densty=0\.1: .*Did you mean 'density'"),
        (["method.density=0.1,high"], {}, r"combination method\.density=high: .*expected float"),
        (["method=supsup,lora", "method.density=0.1"], {}, r"combination method=lora: .*unknown key 'density'"),
        (["method.density=0.1,0.1"], {}, "is the same run as"),
        (["method.density=0.1,1e-1"], {}, "is the same run as"),
        (["method.density=0.1", "method.density=0.2"], {}, "is given twice"),
        (["method.density="], {}, "names no value"),
        (["method.density=[0.1"], {}, "no list of YAML values"),
        (["density"], {}, "expected key=value"),
        (["training.seed=1,2"], {}, "Give them as --seeds alone"),
        (["training.seed=1"], {"seeds": (1, 2)}, "Give them as --seeds alone"),
        (["method.density=0.1"], {"seeds": (1, 1)}, "names a seed twice"),
        (["training.lr_scheduler_type=linear,bent"], {}, r"combination training\.lr_scheduler_type=bent"),
        (["stream=nowhere"], {}, "HF_CL_DATA"),
    ],
)
def test_a_slip_is_found_before_the_first_run(tiny_recipe, texts, more, message):
    with pytest.raises((ConfigError, DataError), match=message):
        plan(str(tiny_recipe), texts, **more)


def test_a_swept_key_leaves_the_recipes_grid_and_the_rest_of_it_stays(tmp_path, base_folder):
    grid = {"method.density": [0.1, 0.3], "method.scale": [1.0, 2.0]}
    file = tiny.write_recipe(tmp_path, base_folder, method={"name": "supsup"}, tuning=grid)
    assert [t.recipe.tuning for t in plan(str(file), [DENSITIES]).trials] == [{"method.scale": [1.0, 2.0]}] * 2


# --- the sweep ---------------------------------------------------------------------------------------------


def test_combinations_are_ranked_by_the_mean_over_seeds(tiny_recipe, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(hf_cl.sweep, "run_stream", fake({0.4: 0.7}, seen))
    found = sweep(planned(tiny_recipe, DENSITIES, seeds=(0, 1, 2)), tmp_path / "s")
    assert seen == [(density, seed, "validation") for density in (0.2, 0.4) for seed in (0, 1, 2)]
    best, other = found["combinations"]
    assert (best["settings"], other["settings"]) == ({"method.density": 0.4}, {"method.density": 0.2})
    assert best["average_accuracy"] == pytest.approx(0.71) and best["spread"] == pytest.approx(0.01)
    assert (best["bytes_per_task"], best["seeds"], best["finished"], best["exact"]) == (150, 3, 3, True)
    assert json.loads((tmp_path / "s" / "sweep.json").read_text()) == found


def test_what_diverges_or_is_refused_is_recorded_and_the_sweep_goes_on(tiny_recipe, tmp_path, monkeypatch):
    outcomes, seen = {0.2: TrainingError("loss is nan"), 0.3: DataError("no rows")}, []
    monkeypatch.setattr(hf_cl.sweep, "run_stream", fake(outcomes, seen))
    asked = planned(tiny_recipe, "method.density=0.2,0.3,0.4")
    found = sweep(asked, tmp_path / "s")
    assert [row["states"] for row in found["combinations"]] == [["finished"], ["diverged"], ["refused"]]
    assert [row["errors"] for row in found["combinations"]] == [[], ["loss is nan"], ["no rows"]]
    seen.clear()
    outcomes.clear()
    found = sweep(asked, tmp_path / "s")
    assert [density for density, *_ in seen] == [0.3, 0.4], "what diverged would diverge again"
    assert [row["finished"] for row in found["combinations"]] == [1, 1, 0]


def test_a_failing_seed_puts_a_combination_behind_the_whole_ones(tiny_recipe, tmp_path, monkeypatch):
    real = fake({0.2: 0.9})

    def run(recipe, *arguments, **more):
        if (recipe.options.density, recipe.training["seed"]) == (0.2, 1):
            raise TrainingError("loss is nan")
        return real(recipe, *arguments, **more)

    monkeypatch.setattr(hf_cl.sweep, "run_stream", run)
    found = sweep(planned(tiny_recipe, DENSITIES, seeds=(0, 1)), tmp_path / "s")["combinations"]
    assert [(row["settings"]["method.density"], row["finished"]) for row in found] == [(0.4, 2), (0.2, 1)]


def test_a_stopped_sweep_has_recorded_what_is_finished_and_goes_on(tiny_recipe, tmp_path, monkeypatch):
    stopped = fake()

    def stop(recipe, *arguments, **more):
        if recipe.options.density == 0.4:
            raise KeyboardInterrupt
        return stopped(recipe, *arguments, **more)

    monkeypatch.setattr(hf_cl.sweep, "run_stream", stop)
    asked = planned(tiny_recipe, DENSITIES)
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, tmp_path / "s")
    states = [run["state"] for run in json.loads((tmp_path / "s" / "sweep.json").read_text())["runs"]]
    assert states == ["finished", "waiting"]
    monkeypatch.setattr(hf_cl.sweep, "run_stream", fake())
    assert all(row["finished"] for row in sweep(asked, tmp_path / "s")["combinations"])


def test_a_widened_sweep_finds_its_runs_by_their_digest_and_keeps_the_rest(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_cl.sweep, "run_stream", fake())
    sweep(planned(tiny_recipe, "method.density=0.2"), tmp_path / "s")
    found = sweep(planned(tiny_recipe, DENSITIES), tmp_path / "s")
    assert len(list((tmp_path / "s").glob("*-seed0-*"))) == 2
    (tmp_path / "s" / "sweep.json").unlink()
    assert sweep(planned(tiny_recipe, DENSITIES), tmp_path / "s") == found
    found = sweep(planned(tiny_recipe, "method.density=0.6"), tmp_path / "s")
    assert (len(found["combinations"]), len(found["runs"])) == (1, 3)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 2}', '{"format": 1, "runs": [{"digest": "a", "folder": ".."}]}']
)
def test_a_folder_that_is_no_sweep_is_refused_before_any_run(tiny_recipe, tmp_path, monkeypatch, content):
    monkeypatch.setattr(hf_cl.sweep, "run_stream", None)
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RunError, match=r"sweep\.json"):
        sweep(planned(tiny_recipe, DENSITIES), tmp_path)
    assert (tmp_path / "sweep.json").read_text() == content
    (tmp_path / "sweep.json").rename(tmp_path / "thesis.tex")
    with pytest.raises(RunError, match="exists and is no sweep"):
        sweep(planned(tiny_recipe, DENSITIES), tmp_path)


def test_a_sweep_of_which_nothing_finished_is_an_error(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_cl.sweep, "run_stream", fake({0.2: DataError("no rows here")}))
    with pytest.raises(RunError, match=r"no combination finished\. The first: no rows here"):
        require_finished(sweep(planned(tiny_recipe, "method.density=0.2"), tmp_path / "s"))


def test_a_full_disk_is_no_fault_of_a_combination(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_cl.sweep, "run_stream", fake({0.2: RunError("make room")}))
    with pytest.raises(RunError, match="make room"):
        sweep(planned(tiny_recipe, DENSITIES), tmp_path / "s")


# --- real runs ---------------------------------------------------------------------------------------------


def test_a_sweep_trains_on_validation_rows_and_the_runs_go_on(tiny_recipe, tmp_path, monkeypatch):
    """By the command line: 6 validation rows are measured, not 10 test rows; the second call trains nothing."""
    looked, real = [], hf_cl.learner.tokenise

    def tokenise(task, *rest):
        looked.append((task.name, len(task.test)))
        return real(task, *rest)

    monkeypatch.setattr(hf_cl.learner, "tokenise", tokenise)
    command = ["sweep", str(tiny_recipe), *BASE, DENSITIES, "--output-dir", str(tmp_path / "s")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert looked == [("pets", 6), ("weather", 6)] * 2
    for text in ("[2/2] method.density=0.4, seed 0", "average validation accuracy, best first", "hf-cl report"):
        assert text in done.stdout
    looked.clear()
    again = CliRunner().invoke(app, [*command, "--json"])
    found = json.loads(again.stdout)  # nothing but JSON
    assert (looked, again.stderr.count("Nothing to do")) == ([], 2)
    assert all(row["exact"] and row["finished"] for row in found["combinations"])
    run = tmp_path / "s" / found["runs"][0]["folder"]
    results, manifest = (json.loads((run / name).read_text()) for name in ("results.json", "run.json"))
    assert results["split"] == manifest["split"] == "validation"
    assert {name: row["accuracy"] for name, row in evaluate_run(run).items()} == dict(
        zip(results["tasks"], results["accuracy_matrix"][-1], strict=True)
    )
    assert "Validation rows, measured again" in CliRunner().invoke(app, ["eval", str(run)]).stdout


def test_a_run_is_not_resumed_on_another_split(tiny_recipe, tmp_path):
    checked = recipes.load(str(tiny_recipe), [*BASE, "method.density=0.2"])
    found = run_stream(checked, tmp_path / "run", split="validation")
    assert found["split"] == "validation"
    with pytest.raises(RunError, match=r"is a run with another split\."):
        run_stream(checked, tmp_path / "run", resume=True)
    # A run of before there was a choice says nothing, and was measured on test rows.
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    del manifest["split"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    assert run_stream(checked, tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="Choose test or validation"):
        run_stream(checked, tmp_path / "other", split="train")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--seeds", "0,x"], "expected whole numbers"),
        (["--seeds", "-1"], "a seed is 0 or more"),
        (["method.densty=0.1,0.2"], "Did you mean 'density'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny_recipe, arguments, hint):
    done = CliRunner().invoke(app, ["sweep", str(tiny_recipe), "method=supsup", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert hint in done.stderr and done.stderr.count("\n") == 1


def test_the_shipped_recipe_is_swept_by_name():
    found = plan("quickstart", ["method=supsup,exssnet", "method.density=0.01"])
    assert [trial.recipe.method for trial in found.trials] == ["supsup", "exssnet"]
    assert yaml.safe_load(json.dumps(found.fixed)) == {"method.density": 0.01}
