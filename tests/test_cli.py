import json
import re
import runpy
import shutil
import subprocess
import sys

import datasets
import pytest
import typer
import yaml
from transformers import BertTokenizerFast
from typer.testing import CliRunner

from hf_cl.cli import app, main, show
from hf_cl.errors import RunError
from hf_cl.plugins import available
from hf_cl.storage.run_folder import RunFolder

WORDS = ["red", "green", "blue", "warm", "cold", "wet", "dry", "cat"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def one_line(result):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("hf-cl: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


OVERRIDES = ("method=supsup", "method.density=0.2")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A folder with a tiny base, two tiny tasks, and a recipe for them."""
    root = tmp_path_factory.mktemp("cli")
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizerFast(vocab=vocab, model_max_length=16).save_pretrained(root / "base")
    tiny_model().save_pretrained(root / "base")
    for number, name in enumerate(("pets", "weather")):
        (root / "data" / name).mkdir(parents=True)
        for split, rows in (("train", 16), ("validation", 4), ("test", 6)):
            texts = [f"{WORDS[row % 5]} {WORDS[row % 2 + 3 * number]}" for row in range(rows)]
            lines = [json.dumps({"text": text, "label": "ab"[row % 2]}) for row, text in enumerate(texts)]
            (root / "data" / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "model": str(root / "base"),
        "stream": [{"name": name, "dataset": f"data/{name}"} for name in ("pets", "weather")],
        "method": {"name": "exssnet", "density": 0.1},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True, "max_length": 8},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def trained(place):
    """A finished run, made by the command line, and what it said."""
    run = place / "run"
    return run, call("train", place / "tiny.yaml", *OVERRIDES, "--output-dir", run)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run, to be spoilt."""
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture
def quick(monkeypatch):
    """Verify in this process; that a fresh one is asked, the first run shows."""
    monkeypatch.setattr(
        "hf_cl.train_stream.verify_in_fresh_process", lambda path: json.loads(call("verify", path, "--json").stdout)
    )


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from typer.testing import CliRunner; from hf_cl.cli import app;"
        "[CliRunner().invoke(app, a) for a in (['--help'], ['train', '--help'], ['methods'], ['--version'])];"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_verb_and_every_method_is_listed():
    said = call("--help").stdout
    assert all(verb in said for verb in ("train", "eval", "inspect", "verify", "methods", "--version"))
    assert call("lern").exit_code == 2
    assert re.search(r"^exssnet +ExSSNeT: find a mask", call("methods").stdout, re.MULTILINE)
    assert {entry["name"] for entry in json.loads(call("methods", "--json").stdout)} == set(available("methods"))
    assert runpy.run_module("hf_cl")["main"] is main


def test_every_verb_takes_json_but_predict():
    verbs = typer.main.get_command(app).commands
    without = [name for name, verb in verbs.items() if not any("--json" in option.opts for option in verb.params)]
    assert without == ["predict"]


def test_a_methods_options_are_its_dataclass():
    options = {option["name"]: option for option in json.loads(call("methods", "exssnet", "--json").stdout)["options"]}
    assert (options["density"]["type"], options["density"]["default"]) == ("float", 0.005)
    assert options["head_learning_rate"]["type"] == "float | None"
    assert all(option["help"] for option in options.values())
    assert "delta | prune | random" in call("methods", "exssnet").stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["methods", "exsnet"], "Did you mean 'exssnet'?"),
        (["train", "quickstrat"], "Did you mean 'quickstart'?"),
        (["train", "TINY", "trainin.seed=1"], "unknown key 'trainin'. Did you mean 'training'?"),
        (["train", "TINY", "training.learning_rat=1"], "Did you mean 'learning_rate'?"),
        (["train", "TINY", "method.densty=1"], "Did you mean 'density'?"),
        (["train", "TINY", "method=supsub"], "Did you mean 'supsup'?"),
        (["train", "TINY", "density"], "expected key=value"),
        (["train", "TINY", "--resume", "--overwrite"], "Give one of them"),
        (["train", "TINY", "--output-dir", "PLACE"], "is no run folder"),
        (["verify", "PLACE"], "no run.json here"),
        (["inspect", "PLACE/nowhere"], "no run.json here"),
        (["eval", "PLACE"], "no run.json here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place, arguments, hint):
    known = {"TINY": str(place / "tiny.yaml")}
    arguments = [known.get(text, text.replace("PLACE", str(place))) for text in arguments]
    assert hint in one_line(call(*arguments))


def test_an_error_with_several_lines_and_colours_is_one_plain_line(run, monkeypatch):
    def fail(path):
        raise RunError("first\nsecond \x1b[31mred\x1b[0m [bold]kept[/bold]")

    monkeypatch.setattr(RunFolder, "open", fail)
    assert one_line(call("inspect", run)) == "hf-cl: error: first second red [bold]kept[/bold]\n"


def test_train_says_what_it_learned_and_proves_it(trained):
    run, result = trained
    assert result.exit_code == 0, result.output
    said = result.stdout
    found = json.loads((run / "results.json").read_text())
    assert found["exact"]
    for line in (
        "[2/2] weather: accuracy",
        "forgetting         0 (exactly)",
        "exact: yes (digests and probe logits recomputed from the saved files in a fresh process)",
        f"Next: hf-cl verify {run}",
        found["owned_digest_before"]["pets"][:16],
    ):
        assert line in said
    assert (said.count("unchanged"), said.count("MOVED")) == (2, 0)
    assert "{'" not in said  # the Trainer's logs belong to stderr


def test_overrides_reach_the_run(trained, place):
    manifest = RunFolder.open(trained[0]).manifest
    method = manifest["method"]
    assert (method["name"], method["options"]["density"], manifest["max_length"]) == ("supsup", 0.2, 8)
    assert manifest["stream_tasks"][1] == {"name": "weather", "dataset": str(place / "data" / "weather")}


def test_a_finished_run_is_verified(trained):
    found = json.loads(done("verify", trained[0], "--json").stdout)
    assert (found["exact"], found["same_logits"], found["files"]) == (True, True, [])
    assert [task["name"] for task in found["tasks"]] == ["pets", "weather"]
    assert all(task["before"] == task["after"] and task["moved"] == [] for task in found["tasks"])
    assert set(found["tasks"][0]) == {"name", "before", "after", "moved", "same_logits"}


def test_a_changed_byte_is_found_and_its_task_named(run):
    file = next((run / "bank").glob("task-00000-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = call("verify", run)
    assert result.exit_code == 1, result.output
    assert f"MOVED  task pets: task 'pets' ({file.name}): its sha256" in result.stdout
    assert f"MOVED  file bank/{file.name}" in result.stdout


def test_a_base_that_has_moved_house_is_given_by_model(run, place, tmp_path):
    there = shutil.copytree(place / "base", tmp_path / "elsewhere")
    RunFolder.open(run).update(model=str(tmp_path / "gone"))
    assert "cannot be loaded" in one_line(call("verify", run))
    assert call("verify", run, "--model", there).exit_code == 0


def test_inspect_lists_what_a_run_holds(trained):
    found = json.loads(call("inspect", trained[0], "--json").stdout)
    task = found["tasks"][0]
    assert (task["name"], task["labels"], task["source"]) == ("pets", 2, "local:pets")
    assert all(task[key] > 0 for key in ("bytes", "head_bytes", "density"))
    said = call("inspect", trained[0]).stdout
    assert all(text in said for text in (task["digest"][:16], "local:weather", "2 of 2 tasks"))


def test_names_from_a_run_cannot_command_a_terminal(run):
    folder = RunFolder.open(run)
    folder.update(tasks=[{**task, "source": "\x1b]0;owned\x07[red]src\x9b2J\u202e"} for task in folder.tasks])
    said = call("inspect", run).stdout
    assert "[red]src" in said
    assert not any(sign in said for sign in ("\x1b", "\x07", "\x9b", "\u202e", "owned"))


def test_eval_measures_from_the_files_what_the_run_recorded(trained):
    found = json.loads(done("eval", trained[0], "--json").stdout)
    assert found["equal"]
    assert [task["name"] for task in found["tasks"]] == ["pets", "weather"]
    assert all(task["metrics"] == task["recorded"] for task in found["tasks"])


def test_eval_needs_a_recipe_with_the_runs_tasks(run, place, tmp_path):
    RunFolder.open(run).update(stream_tasks=[])
    assert "Give the recipe" in one_line(call("eval", run))
    recipe = yaml.safe_load((place / "tiny.yaml").read_text())
    half = {**recipe, "stream": [{"name": "pets", "dataset": str(place / "data" / "pets")}]}
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(half))
    assert "no rows are named for task 'weather'" in one_line(call("eval", run, "--recipe", tmp_path / "half.yaml"))


def test_resuming_a_finished_run_says_so(run, place):
    said = done("train", place / "tiny.yaml", *OVERRIDES, "--output-dir", run, "--resume").stdout
    assert "is finished: 2 tasks. Nothing to do." in said


def test_an_unfinished_run_says_how_to_go_on_and_resuming_finishes_it(run, place, quick):
    folder = RunFolder.open(run)
    folder.update(tasks=folder.tasks[:1])
    assert f"--output-dir {run} --resume" in call("inspect", run).stdout
    wanted = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    result = done("train", place / "tiny.yaml", *OVERRIDES, "--output-dir", run, "--resume", "--json")
    found = json.loads(result.stdout)  # nothing but JSON
    assert "[2/2] weather" in result.stderr
    assert found["accuracy_matrix"] == wanted["accuracy_matrix"]
    assert found["owned_digest_after"] == wanted["owned_digest_after"]


def test_a_run_is_not_replaced_unless_asked(run, place, tmp_path, quick):
    recipe = yaml.safe_load((place / "tiny.yaml").read_text())
    recipe["stream"] = [{"name": "pets", "dataset": str(place / "data" / "pets")}]
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    arguments = ["train", tmp_path / "one.yaml", "method=lora", "--output-dir", run]
    assert "holds a run already" in one_line(call(*arguments))
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    done(*arguments, "--overwrite")
    assert RunFolder.open(run).manifest["method"]["name"] == "lora"


def test_numbers_are_in_units_a_person_thinks_in():
    assert [show.size(number) for number in (0, 999, 107_264, 5_300_000)] == ["0 B", "999 B", "107.3 kB", "5.3 MB"]
    assert [show.figure(number, exact=True) for number in (0.0, -0.0, 0.0000001, None)] == ["0 (exactly)"] * 2 + [
        "0.0000",
        "-",
    ]
    assert show.figure(0.0, exact=False) == "0.0000"
    assert [show.seconds(number) for number in (3.21, 125.0)] == ["3.2 s", "2 min 5 s"]


def test_a_narrow_terminal_breaks_long_texts_but_no_number_or_digest(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [["a task with a long name", "local:somewhere far away indeed", "0.5000", "0123456789abcdef"]]
    show.console().print(show.table("title", ["task", "source", "accuracy", "digest"], rows))
    said = capsys.readouterr().out
    assert all(text in said for text in ("indeed", "0.5000", "0123456789abcdef"))


def test_ctrl_c_while_training_keeps_what_is_finished_and_says_how_to_go_on(place, tmp_path, monkeypatch):
    from hf_cl.learner import ContinualLearner

    learn = ContinualLearner.learn

    def stop_at_the_second(learner, task, keeping):
        if learner.tasks:
            raise KeyboardInterrupt
        return learn(learner, task, keeping)

    monkeypatch.setattr(ContinualLearner, "learn", stop_at_the_second)
    result = call("train", place / "tiny.yaml", "--output-dir", tmp_path / "run")
    assert result.exit_code == 130
    assert "--resume" in result.stdout
    assert [task["name"] for task in RunFolder.open(tmp_path / "run").tasks] == ["pets"]


def test_a_method_that_forgets_is_reported_as_moved(place, tmp_path, quick):
    run = tmp_path / "run"
    said = done("train", place / "tiny.yaml", "method=finetune", "--output-dir", run).stdout
    assert all(text in said for text in ("MOVED", "exact: no"))
    assert [call(verb, run).exit_code for verb in ("verify", "eval")] == [1, 0]
