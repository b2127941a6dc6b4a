"""`hf-cl eval BANK --no-task-id`: how often the task is found, the label with it, and what that costs."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from typer.testing import CliRunner

from hf_cl import ContinualLearner, MaskBank, TaskSpec, load_task, plugins
from hf_cl.cli import app
from hf_cl.data import read_texts
from hf_cl.errors import BankError, ConfigError, DataError
from hf_cl.evaluate_bank import evaluate_bank, load_rows, specs_of
from hf_cl.from_recipe import build_learner
from hf_cl.metrics import auroc
from hf_cl.recipe import load
from hf_cl.training.collect import TEXTS

pytest_plugins = ["tiny"]
NAMES = ("pets", "weather")
KEYS = {"routing_accuracy", "class_incremental_accuracy", "task_given_accuracy", "ms_per_text"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as HF_CL_DATA is: a folder a task, and streams.json."""
    place = tmp_path_factory.mktemp("data")
    for name in NAMES:
        tiny.write_task(place, name)
    streams = {"both": [{"name": name, "task": name} for name in NAMES], "half": [{"name": "pets", "task": "pets"}]}
    (place / "streams.json").write_text(json.dumps(streams))
    (place / "strange.jsonl").write_text('{"text": "zzz qqq xxx"}\n{"text": "12 34 56"}\n')
    return place


@pytest.fixture(scope="module")
def bank(data, base_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("bank")
    learner = tiny.learner(base_folder, tiny.options("supsup"), place / "out")
    for name in NAMES:
        learner.learn(load_task(TaskSpec(name, dataset=str(data / name))))
    return MaskBank.from_learner(learner, base_id="someone/tiny").save_pretrained(place / "bank")


@pytest.fixture
def here(data, monkeypatch):
    monkeypatch.setenv("HF_CL_DATA", str(data))


def call(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments), "--no-task-id"])


def value(*arguments):
    result = call(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def refused(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


# --- what it says -----------------------------------------------------------------------------------------------


def test_every_router_has_a_row_with_the_promised_figures(bank, base_folder, here):
    found = value(bank, "--base", base_folder)
    assert set(found["routers"]) == set(plugins.available("routing"))
    for row in found["routers"].values():
        assert set(row) == KEYS
        assert 0 <= row["class_incremental_accuracy"] <= row["routing_accuracy"] <= 1
        assert row["task_given_accuracy"] == found["task_given"]["accuracy"]
        assert row["ms_per_text"] > 0
    assert found["texts"] == 2 * tiny.SIZES["test"] and found["tasks"] == list(NAMES)


def test_the_figures_are_those_of_the_pipelines(bank, base_folder, data, here):
    found = value(bank, "--base", base_folder, "--router", "nearest_mean")["routers"]["nearest_mean"]
    opened, base = MaskBank.from_pretrained(bank), tiny.fresh(base_folder)
    model = opened.attach(base.model)
    routed = opened.pipeline(model=model, tokenizer=base.tokenizer)
    hits = both = given = count = 0
    for name in NAMES:
        test = load_task(TaskSpec(name, dataset=str(data / name))).test
        own = opened.pipeline(name, model, base.tokenizer)
        for text, label in zip(test["text"], test["label"], strict=True):
            answer, label = routed(text)[0], tiny.LABELS[name][label]
            hits += answer["task"] == name
            both += answer["task"] == name and answer["label"] == label
            given += own(text)[0]["label"] == label
            count += 1
    keys = ("routing_accuracy", "class_incremental_accuracy", "task_given_accuracy")
    assert [found[key] for key in keys] == [hits / count, both / count, given / count]


def test_a_label_that_two_tasks_have_is_two_labels(base_folder, tmp_path):
    """The same texts and labels under two names: only the task can be wrong, and half of all are."""
    learner = tiny.learner(base_folder, tiny.options("supsup"), tmp_path)
    rows = {}
    for name in ("one", "two"):
        rows[name] = replace(tiny.task("pets"), name=name)
        learner.learn(rows[name])
    found = evaluate_bank(MaskBank.from_learner(learner), tiny.fresh(base_folder), rows, ["nearest_mean"], max_length=8)
    assert found["routers"]["nearest_mean"]["routing_accuracy"] == 0.5
    assert found["routers"]["nearest_mean"]["class_incremental_accuracy"] <= 0.5


def test_a_table_is_printed_for_people(bank, base_folder, here):
    result = call(bank, "--base", base_folder, "--router", "entropy", "--router", "learned")
    assert result.exit_code == 0, result.output
    assert "20 test texts of 2 tasks, without the tasks' names" in result.stdout
    assert "entropy" in result.stdout and "learned" in result.stdout and "nearest_mean" not in result.stdout


def test_batches_of_any_size_say_the_same(bank, base_folder, here):
    sizes = [value(bank, "--base", base_folder, "--router", "nearest_mean", "--batch-size", n) for n in (1, 7, 64)]
    rows = [{key: found["routers"]["nearest_mean"][key] for key in KEYS - {"ms_per_text"}} for found in sizes]
    assert rows[0] == rows[1] == rows[2]


def test_texts_of_no_task_are_told_from_those_of_a_task(bank, base_folder, data, here):
    arguments = (bank, "--base", base_folder, "--router", "nearest_mean", "--out-of-scope", data / "strange.jsonl")
    found = value(*arguments)["routers"]["nearest_mean"]["out_of_scope_auroc"]
    opened, base = MaskBank.from_pretrained(bank), tiny.fresh(base_folder)
    pipe = opened.pipeline(model=opened.attach(base.model), tokenizer=base.tokenizer)
    inside = [text for name in NAMES for text in load_task(TaskSpec(name, dataset=str(data / name))).test["text"]]
    sure = {kind: [answer["confidence"] for answer in pipe(texts)]
            for kind, texts in (("in", inside), ("out", ["zzz qqq xxx", "12 34 56"]))}  # fmt: skip
    assert found == pytest.approx(auroc(sure["in"], sure["out"]))
    assert "AUROC" in call(*arguments).stdout


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    high, low = (torch.randint(6, (n,), generator=generator).tolist() for n in (9, 13))
    pairs = [(a > b) + (a == b) / 2 for a in high for b in low]
    assert auroc(high, low) == pytest.approx(sum(pairs) / len(pairs))
    assert (auroc([2], [1]), auroc([1], [2]), auroc([1], [1])) == (1.0, 0.0, 0.5)
    for bad in ([], [float("nan")]):
        with pytest.raises(DataError, match="AUROC"):
            auroc(bad, [1.0])


# --- where the rows are -----------------------------------------------------------------------------------------


def test_rows_are_found_by_the_sources_of_the_manifest_by_a_stream_or_by_a_recipe(bank, base_folder, here, tmp_path):
    by_source = value(bank, "--base", base_folder, "--router", "entropy")
    by_stream = value(bank, "--base", base_folder, "--router", "entropy", "--stream", "both")
    del by_source["routers"]["entropy"]["ms_per_text"], by_stream["routers"]["entropy"]["ms_per_text"]
    assert by_source["routers"] == by_stream["routers"]
    recipe = tiny.write_recipe(tmp_path, base_folder)
    assert value(bank, "--base", base_folder, "--recipe", recipe, "--router", "entropy")["texts"] == by_source["texts"]


@pytest.mark.slow
def test_of_a_run_its_own_base_rows_and_length_are_taken(base_folder, monkeypatch, tmp_path):
    recipe = tiny.write_recipe(tmp_path, base_folder, method="supsup")
    trained = CliRunner().invoke(app, ["train", str(recipe), "--output-dir", str(tmp_path / "run")])
    assert trained.exit_code == 0, trained.output
    monkeypatch.delenv("HF_CL_DATA", raising=False)
    assert value(tmp_path / "run", "--router", "entropy")["texts"] == 2 * tiny.SIZES["test"]


def test_rows_that_are_not_there_are_asked_for(bank, base_folder, here, monkeypatch, tmp_path):
    assert "no rows are named for weather" in refused(bank, "--base", base_folder, "--stream", "half")
    assert "there is no 'bth'" in refused(bank, "--base", base_folder, "--stream", "bth")
    assert "Leave one out" in refused(bank, "--stream", "both", "--recipe", "quickstart")
    monkeypatch.setenv("HF_CL_DATA", str(tmp_path))
    assert "'local:pets', which is no folder in" in refused(bank, "--base", base_folder)
    monkeypatch.delenv("HF_CL_DATA")
    assert "HF_CL_DATA (not set)" in refused(bank, "--base", base_folder)


@pytest.mark.parametrize("source", ["local:../secret", "local:/etc", "local:.", "local:", "memory", "someone/data"])
def test_a_source_is_never_a_path_and_never_fetched(bank, data, source):
    manifest = MaskBank.from_pretrained(bank).manifest
    forged = replace(manifest, tasks=[replace(manifest.tasks[0], source=source)])
    with pytest.raises(DataError, match="nothing is fetched on a bank's word"):
        specs_of(forged, data)


# --- bad input --------------------------------------------------------------------------------------------------


def test_bad_input_is_named_before_a_base_is_loaded(bank, base_folder, data, here, tmp_path):
    assert "Did you mean 'entropy'?" in refused(bank, "--base", base_folder, "--router", "entropi")
    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "bad.jsonl").write_text('{"words": "x"}\n')
    assert "there is no column 'text'; it has words" in refused(bank, "--out-of-scope", tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    assert "holds no texts" in refused(bank, "--out-of-scope", tmp_path / "bad.jsonl")
    assert "there is no such file" in refused(bank, "--out-of-scope", tmp_path / "none.jsonl")


def test_of_a_file_with_splits_the_test_rows_are_taken(tmp_path, data):
    (tmp_path / "oos.jsonl").write_text('{"text": "a", "split": "train"}\n{"text": "b", "split": "test"}\n')
    assert read_texts(tmp_path / "oos.jsonl") == ["b"]
    assert read_texts(data / "strange.jsonl") == ["zzz qqq xxx", "12 34 56"]


def test_rows_with_other_labels_and_missing_rows_are_refused(bank, base_folder, data):
    opened = MaskBank.from_pretrained(bank)
    rows = load_rows(opened.manifest, specs_of(opened.manifest, data))
    with pytest.raises(DataError, match="task 'weather': no rows are given"):
        evaluate_bank(opened, tiny.fresh(base_folder), {"pets": rows["pets"]}, max_length=8)
    other = {**rows, "pets": replace(rows["pets"], labels=("wild", "tame"))}
    with pytest.raises(DataError, match="task 'pets' learned the labels tame, wild, these rows have wild, tame"):
        evaluate_bank(opened, tiny.fresh(base_folder), other, max_length=8)
    with pytest.raises(ConfigError, match="batch_size: expected 1 or more, found 0"):
        evaluate_bank(opened, tiny.fresh(base_folder), rows, max_length=8, batch_size=0)


def test_a_bank_without_state_is_measured_by_what_needs_none(base_folder, tmp_path):
    learner = tiny.learner(base_folder, tiny.options("supsup"), tmp_path, routing=0)
    learner.learn(tiny.task("pets"))
    bank, rows = MaskBank.from_learner(learner), {"pets": tiny.task("pets")}
    found = evaluate_bank(bank, tiny.fresh(base_folder), rows, ["entropy"], max_length=8)
    assert found["routers"]["entropy"]["routing_accuracy"] == 1.0  # its only task
    with pytest.raises(BankError, match="nothing was collected"):
        evaluate_bank(bank, tiny.fresh(base_folder), rows, max_length=8)


def test_a_recipe_turns_the_collection_off(base_folder, tmp_path):
    recipe = tiny.write_recipe(tmp_path, base_folder, names=("pets",), method="supsup")
    assert (
        build_learner(load(recipe), tmp_path).method.routing.texts
        == TEXTS
        == ContinualLearner(tiny.fresh(base_folder)).method.routing.texts
    )
    assert build_learner(load(recipe, ["routing=0"]), tmp_path).method.routing is None
    with pytest.raises(ConfigError, match="routing: expected a number at least 0"):
        load(recipe, ["routing=-1"])
