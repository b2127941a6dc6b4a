import json
import shutil
import subprocess
import sys

import datasets
import pytest
import yaml
from typer.testing import CliRunner

from hf_cl.cli import app, show
from hf_cl.errors import RunError
from hf_cl.storage.run_folder import RunFolder

WORDS = ["red", "green", "blue", "warm", "cold", "wet", "dry", "cat", "dog", "bird", "fish", "tree"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("hf-cl: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a tiny base, two tiny tasks, and a recipe for them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

    root = tmp_path_factory.mktemp("cli")
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special).save_pretrained(root / "base")
    set_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(root / "base")
    for number, name in enumerate(("pets", "weather")):
        (root / "data" / name).mkdir(parents=True)
        for split, rows in (("train", 16), ("validation", 4), ("test", 6)):
            lines = [
                json.dumps({"text": f"{WORDS[row % 5]} {WORDS[row % 2 + 3 * number]}", "label": "ab"[row % 2]})
                for row in range(rows)
            ]
            (root / "data" / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "model": str(root / "base"),
        "stream": [{"name": name, "dataset": f"data/{name}"} for name in ("pets", "weather")],
        "method": {"name": "exssnet", "density": 0.1},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "use_cpu": True, "max_length": 8},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def trained(place):
    """A finished run, made by the command line, and what it said."""
    run = place / "run"
    return run, call("train", place / "tiny.yaml", "method=supsup", "method.density=0.2", "--output-dir", run)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run, to be spoilt."""
    return shutil.copytree(trained[0], tmp_path / "run")


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from typer.testing import CliRunner; from hf_cl.cli import app;"
        "[CliRunner().invoke(app, a) for a in (['--help'], ['train', '--help'], ['methods'], ['--version'])];"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_python_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "hf_cl", "--version"], capture_output=True, text=True)
    assert done.stdout == "hf-cl 0.1.0\n"


def test_every_verb_is_in_the_help():
    help_text = call("--help").stdout
    assert all(verb in help_text for verb in ("train", "eval", "inspect", "verify", "methods", "--version"))
    assert call("lern").exit_code == 2


def test_methods_are_listed_with_what_they_are():
    found = {entry["name"]: entry["summary"] for entry in json.loads(call("methods", "--json").stdout)}
    assert {"exssnet", "finetune", "lora", "ssnet", "supsup"} <= set(found)
    assert found["exssnet"].startswith("ExSSNeT: find a mask")
    assert "exssnet   ExSSNeT: find a mask" in call("methods").stdout


def test_a_methods_options_are_its_dataclass():
    options = {option["name"]: option for option in json.loads(call("methods", "exssnet", "--json").stdout)["options"]}
    assert options["density"]["type"] == "float"
    assert options["density"]["default"] == 0.01
    assert options["start"]["choices"] == ["kkt", "fresh"]
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


def test_ctrl_c_is_exit_code_130(run, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "open", stop)
    assert call("inspect", run).exit_code == 130


def test_an_error_with_several_lines_and_colours_is_one_plain_line(run, monkeypatch):
    def fail(path):
        raise RunError("first\nsecond \x1b[31mred\x1b[0m [bold]kept[/bold]")

    monkeypatch.setattr(RunFolder, "open", fail)
    assert one_line(call("inspect", run)) == "hf-cl: error: first second red [bold]kept[/bold]\n"


def test_train_says_what_it_learned_and_proves_it(trained):
    run, result = trained
    assert result.exit_code == 0, result.output
    said = result.stdout
    assert "[1/2] pets: accuracy" in said
    assert "[2/2] weather: accuracy" in said
    assert "after task  " in said
    assert "forgetting         0 (exactly)" in said
    assert "backward transfer  0 (exactly)" in said
    assert said.count("unchanged") == 2
    assert "MOVED" not in said
    assert "exact: yes (digests and probe logits recomputed from the saved files in a fresh process)" in said
    assert f"Next: hf-cl verify {run}" in said
    found = json.loads((run / "results.json").read_text())
    assert found["exact"]
    assert found["owned_digest_before"]["pets"][:16] in said
    assert "{'" not in said  # the Trainer's logs belong to stderr


def test_overrides_reach_the_run(trained):
    method = RunFolder.open(trained[0]).manifest["method"]
    assert method["name"] == "supsup"
    assert method["options"]["density"] == 0.2


def test_the_kept_recipe_stands_for_itself(trained, place):
    kept = yaml.safe_load((trained[0] / "recipe.yaml").read_text())
    assert kept["method"]["name"] == "supsup"
    assert kept["method"]["density"] == 0.2
    assert kept["training"]["max_length"] == 8
    assert kept["stream"]["tasks"][1] == {"name": "weather", "dataset": str(place / "data" / "weather")}


def test_a_finished_run_is_verified(trained):
    result = call("verify", trained[0], "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["exact"]
    assert found["same_logits"]
    assert found["files"] == []
    assert [task["name"] for task in found["tasks"]] == ["pets", "weather"]
    assert all(task["before"] == task["after"] and task["moved"] == [] for task in found["tasks"])
    assert set(found["tasks"][0]) == {"name", "before", "after", "moved", "same_logits"}


def test_a_changed_byte_is_found_and_its_task_named(run):
    file = run / RunFolder.open(run).tasks[0]["files"]["head"]["file"]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = call("verify", run)
    assert result.exit_code == 1, result.output
    assert "MOVED  task pets: head" in result.stdout
    assert f"MOVED  file tasks/{file.name}" in result.stdout
    assert "MOVED  task weather" not in result.stdout
    assert "exact: no" in result.stdout


def test_a_base_that_has_moved_house_is_given_by_model(run, place, tmp_path):
    there = shutil.copytree(place / "base", tmp_path / "elsewhere")
    RunFolder.open(run).update(model=str(tmp_path / "gone"))
    assert "cannot be loaded" in one_line(call("verify", run))
    assert call("verify", run, "--model", there).exit_code == 0


def test_inspect_lists_what_a_run_holds(trained):
    found = json.loads(call("inspect", trained[0], "--json").stdout)
    task = found["tasks"][0]
    assert (task["name"], task["labels"], task["source"]) == ("pets", 2, "local:pets")
    assert task["bytes"] > 0
    assert task["head_bytes"] > 0
    assert 0 < task["density"] <= 1
    said = call("inspect", trained[0]).stdout
    assert task["digest"][:16] in said
    assert "local:weather" in said
    assert "2 of 2 tasks" in said


def test_inspect_says_how_to_finish_an_unfinished_run(run):
    folder = RunFolder.open(run)
    folder.update(tasks=folder.tasks[:1])
    said = call("inspect", run).stdout
    assert "Not finished: weather to learn." in said
    assert "--resume" in said


def test_names_from_a_run_cannot_command_a_terminal(run):
    folder = RunFolder.open(run)
    folder.update(tasks=[{**task, "source": "\x1b]0;owned\x07[red]src\x9b2J\u202e"} for task in folder.tasks])
    said = call("inspect", run).stdout
    assert "[red]src" in said
    assert not any(sign in said for sign in "\x1b\x07\x9b\u202e")
    assert "owned" not in said


def test_eval_measures_from_the_files_what_the_run_recorded(trained):
    result = call("eval", trained[0], "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["equal"]
    assert [task["name"] for task in found["tasks"]] == ["pets", "weather"]
    assert all(task["metrics"] == task["recorded"] for task in found["tasks"])


def test_eval_needs_a_recipe_with_the_runs_tasks(run, place, tmp_path):
    (run / "recipe.yaml").unlink()
    assert "Give the run's --recipe" in one_line(call("eval", run))
    recipe = yaml.safe_load((place / "tiny.yaml").read_text())
    recipe["stream"] = [{"name": "pets", "dataset": str(place / "data" / "pets")}]
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(recipe))
    assert "no task 'weather'" in one_line(call("eval", run, "--recipe", tmp_path / "half.yaml"))


def test_resuming_a_finished_run_says_so(run):
    result = call("train", run / "recipe.yaml", "--output-dir", run, "--resume")
    assert result.exit_code == 0, result.output
    assert "is finished: 2 tasks. Nothing to do." in result.stdout
    assert "exact: yes" in result.stdout


def test_resuming_an_unfinished_run_finishes_it(run):
    folder = RunFolder.open(run)
    folder.update(tasks=folder.tasks[:1])
    wanted = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    result = call("train", run / "recipe.yaml", "--output-dir", run, "--resume", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)  # nothing but JSON
    assert "[2/2] weather" in result.stderr
    assert found["accuracy_matrix"] == wanted["accuracy_matrix"]
    assert found["owned_digest_after"] == wanted["owned_digest_after"]


def test_a_run_is_not_replaced_unless_asked(run, place, tmp_path):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stream"]["tasks"] = recipe["stream"]["tasks"][:1]
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    arguments = ["train", tmp_path / "one.yaml", "method=lora", "--output-dir", run]
    assert "holds a run already" in one_line(call(*arguments))
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    result = call(*arguments, "--overwrite")
    assert result.exit_code == 0, result.output
    assert RunFolder.open(run).manifest["method"]["name"] == "lora"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["method"]["name"] == "lora"


def test_numbers_are_in_units_a_person_thinks_in():
    assert [show.size(number) for number in (0, 999, 107_264, 5_300_000)] == ["0 B", "999 B", "107.3 kB", "5.3 MB"]
    assert [show.figure(number) for number in (0.0, -0.0, 0.0000001, None)] == ["0 (exactly)"] * 2 + ["0.0000", "-"]
    assert [show.seconds(number) for number in (3.21, 125.0)] == ["3.2 s", "2 min 5 s"]


def test_a_narrow_terminal_breaks_long_texts_but_no_number_or_digest(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [["a task with a long name", "local:somewhere far away indeed", "0.5000", "0123456789abcdef"]]
    show.console().print(show.table("title", ["task", "source", "accuracy", "digest"], rows))
    said = capsys.readouterr().out
    assert "0.5000" in said
    assert "0123456789abcdef" in said
    assert "indeed" in said


def test_ctrl_c_while_training_keeps_what_is_finished_and_says_how_to_go_on(place, tmp_path, monkeypatch):
    from hf_cl.learner import ContinualLearner

    learn = ContinualLearner.learn

    def stop_at_the_second(learner, task):
        if learner.tasks:
            raise KeyboardInterrupt
        return learn(learner, task)

    monkeypatch.setattr(ContinualLearner, "learn", stop_at_the_second)
    result = call("train", place / "tiny.yaml", "--output-dir", tmp_path / "run")
    assert result.exit_code == 130
    assert "--resume" in result.stdout
    assert [task["name"] for task in RunFolder.open(tmp_path / "run").tasks] == ["pets"]
    assert (tmp_path / "run" / "recipe.yaml").is_file()


def test_a_method_that_forgets_is_reported_as_moved(place, tmp_path):
    run = tmp_path / "run"
    said = call("train", place / "tiny.yaml", "method=finetune", "--output-dir", run)
    assert said.exit_code == 0, said.output
    assert "MOVED" in said.stdout
    assert "exact: no" in said.stdout
    assert call("verify", run).exit_code == 1
    assert call("eval", run).exit_code == 0
