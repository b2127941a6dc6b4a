"""`ContinualLearner`: learn, evaluate, activate, save; and what comes of the user's own parts."""

import json

import numpy as np
import pytest
import tiny
import torch
from transformers import Trainer, TrainerCallback

from hf_cl import ContinualLearner, MaskConfig, open_run, plugins, verify
from hf_cl.errors import ConfigError, DataError, HfClError, RunError
from hf_cl.metrics import accuracy, macro_f1
from hf_cl.storage.run_folder import RunFolder

pytest_plugins = ["tiny"]


@pytest.fixture(scope="module")
def learned(base_folder, tmp_path_factory):
    """A learner that knows two tasks; tests may look at it and change nothing."""
    learner = tiny.learner(base_folder, tiny.options("supsup"), tmp_path_factory.mktemp("learner"))
    for name in ("pets", "weather"):
        learner.learn(tiny.task(name))
    return learner


@pytest.fixture
def learner(base_folder, tmp_path):
    return tiny.learner(base_folder, tiny.options("supsup"), tmp_path / "trainer")


def predicted(learner, name):
    """Return predictions and labels of a task's test rows without the Trainer."""
    learner.activate(name)
    task = tiny.task(name)
    found = []
    learner.model.eval()
    for text in task.test["text"]:
        encoded = learner.base.tokenizer(text, truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            found.append(int(learner.model(**encoded).logits.argmax()))
    return np.array(found), np.array(task.test["label"])


@pytest.fixture
def measured(monkeypatch):
    """Names of the tasks that were measured, in order."""
    from hf_cl import learner as module

    seen, real = [], module.measure
    monkeypatch.setattr(module, "measure", lambda model, rows, *rest: seen.append(rows) or real(model, rows, *rest))
    return seen


# --- learn and evaluate --------------------------------------------------------------------------------------


def test_a_record_holds_facts_digests_and_the_metrics_of_all_tasks(learned):
    assert learned.tasks == ["pets", "weather"]
    record = learned.records[1]
    assert record["labels"] == list(tiny.LABELS["weather"])
    assert set(record["metrics"]) == {"pets", "weather"}
    assert set(record["parts"]) == {"base", "masks", "values", "owners", "head"}
    assert (record["source"], record["steps"]) == ("memory", 6)
    assert json.loads(json.dumps(learned.records, allow_nan=False)) == learned.records


@pytest.mark.parametrize("name", ["pets", "weather"])
def test_accuracy_and_macro_f1_are_those_of_the_tasks_test_rows(learned, name):
    metrics = learned.records[1]["metrics"][name]
    guesses, labels = predicted(learned, name)
    assert metrics["accuracy"] == accuracy(guesses, labels)
    assert metrics["macro_f1"] == macro_f1(guesses, labels, len(tiny.LABELS[name]))


def test_evaluating_twice_gives_equal_numbers(learned):
    first = learned.evaluate()
    assert learned.evaluate() == first
    assert first == learned.records[1]["metrics"]


CHANGES = ("ssnet", "hypermask", "finetune")
AGAIN = [
    (kind, int(kind in CHANGES)) for kind in ("supsup", "exssnet", "wsn", "piggyback", "eidetic", "lora", *CHANGES)
]


@pytest.mark.parametrize(("kind", "again"), AGAIN)
def test_a_task_whose_digests_are_those_of_its_commit_need_not_be_measured_again(
    kind, again, base_folder, tmp_path, measured
):
    found = {}
    for way in ("all", "changed"):
        learner = tiny.learner(base_folder, tiny.options(kind), tmp_path / way, evaluate=way)
        for name in ("pets", "weather"):
            learner.learn(tiny.task(name))
        found[way], count = [record["metrics"] for record in learner.records], len(measured)
        measured.clear()
        assert count == 2 + (1 if way == "all" else again)
    assert found["changed"] == found["all"]


def test_another_way_to_evaluate_is_refused(base_folder, tmp_path):
    with pytest.raises(ConfigError, match="evaluate: expected all or changed, found 'some'"):
        tiny.learner(base_folder, tiny.options("supsup"), tmp_path, evaluate="some")


def test_the_accuracy_matrix_is_read_from_the_records(learned):
    matrix = learned.matrix
    assert matrix.names == ("pets", "weather")
    first, second = (record["metrics"] for record in learned.records)
    assert matrix.to_list() == [
        [first["pets"]["accuracy"], None],
        [second["pets"]["accuracy"], second["weather"]["accuracy"]],
    ]


def test_activating_a_task_brings_its_labels(learned):
    for name in ("pets", "weather", "pets"):
        learned.activate(name)
        assert tuple(learned.model.config.id2label.values()) == tiny.LABELS[name]
        assert tiny.logits(learned.model).shape[-1] == len(tiny.LABELS[name])


def test_after_learning_the_new_task_is_the_one_that_answers(learner):
    for name in ("weather", "pets"):
        learner.learn(tiny.task(name))
        assert tiny.logits(learner.model).shape[-1] == len(tiny.LABELS[name])


def test_an_unknown_task_is_not_activated(learned):
    with pytest.raises(ConfigError, match=r"task 'cats' was not learned; learned are pets, weather"):
        learned.activate("cats")


def test_a_task_is_learned_once(learned):
    with pytest.raises(DataError, match=r"task 'pets' was learned already, as number 0\. Rename it"):
        learned.learn(tiny.task("pets"))
    assert learned.tasks == ["pets", "weather"]


def test_learning_leaves_the_callers_arguments_and_task_as_they_were(learner, tmp_path):
    task = tiny.task()
    before = learner.args.to_dict(), task.train[:], task.train.column_names
    learner.learn(task)
    assert (learner.args.to_dict(), task.train[:], task.train.column_names) == before


# --- the user's own parts ----------------------------------------------------------------------------------------


def share_of_first(prediction):
    return {"share_of_first": float(np.mean(prediction.predictions.argmax(-1) == 0))}


def test_the_users_metrics_stand_beside_ours(base_folder, tmp_path):
    learner = tiny.learner(base_folder, tiny.options("supsup"), tmp_path, compute_metrics=share_of_first)
    metrics = learner.learn(tiny.task())["metrics"]["pets"]
    assert set(metrics) == {"accuracy", "macro_f1", "loss", "share_of_first"}
    guesses, _ = predicted(learner, "pets")
    assert metrics["share_of_first"] == np.mean(guesses == 0)


def test_a_metric_that_is_no_number_on_these_rows_does_not_lose_the_task(base_folder, tmp_path):
    learner = tiny.learner(
        base_folder, tiny.options("supsup"), tmp_path / "t", compute_metrics=lambda _: {"mcc": float("nan")}
    )
    learner.learn(tiny.task())
    run = learner.save_pretrained(tmp_path / "run")
    assert [task["name"] for task in RunFolder.open(run).tasks] == ["pets"]


def test_a_metric_that_fails_leaves_the_learner_usable(base_folder, tmp_path):
    def fails(prediction):
        raise LookupError("a bug of the user's")

    learner = tiny.learner(base_folder, tiny.options("supsup"), tmp_path, compute_metrics=fails)
    with pytest.raises(LookupError, match="a bug of the user's"):
        learner.learn(tiny.task())
    learner.compute_metrics = None
    if not learner.tasks:
        learner.learn(tiny.task())
    record = learner.records[0]
    assert {"labels", "facts", "parts", "metrics"} <= set(record)
    assert learner.matrix.average_accuracy == record["metrics"]["pets"]["accuracy"]


class Watches(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_the_users_callbacks_see_every_task(base_folder, tmp_path):
    watches = Watches()
    learner = tiny.learner(base_folder, tiny.options("supsup"), tmp_path, callbacks=(watches,))
    for name in ("pets", "weather"):
        learner.learn(tiny.task(name))
    assert watches.steps == sum(record["steps"] for record in learner.records) == 12


def test_the_users_training_arguments_hold_for_each_task(base_folder, tmp_path, monkeypatch):
    seen = []

    def stop(trainer):
        seen.append(trainer.args)
        raise InterruptedError

    monkeypatch.setattr(Trainer, "train", stop)
    learner = tiny.learner(base_folder, tiny.options("supsup"), tmp_path, training={"weight_decay": 0.25})
    with pytest.raises(InterruptedError):
        learner.learn(tiny.task())
    assert (seen[0].weight_decay, seen[0].num_train_epochs) == (0.25, 2)
    assert seen[0].output_dir.startswith(str(tmp_path))


# --- what it is made of ------------------------------------------------------------------------------------------


def test_a_base_is_a_folder_or_a_loaded_model_with_its_tokenizer(base_folder, tmp_path):
    args = tiny.arguments(tmp_path)
    options = tiny.options("supsup")
    records = []
    for given in ((str(base_folder), None), (tiny.fresh(base_folder).model, tiny.tokenizer())):
        learner = ContinualLearner(*given, options, args, max_length=8)
        learner.learn(tiny.task())
        records.append((learner.method.fingerprint, learner.records[0]["parts"], learner.records[0]["metrics"]))
    assert records[0] == records[1]


def test_a_loaded_model_without_its_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"tokenizer: a loaded BertForSequenceClassification needs its tokenizer"):
        ContinualLearner(tiny.bert())


@pytest.mark.parametrize("config", ["supsup", {"density": 0.1}, object(), MaskConfig, plugins])
def test_a_config_of_no_method_is_refused(config, base_folder):
    with pytest.raises(ConfigError, match="config: expected a MaskConfig or a method's Options, found"):
        ContinualLearner(str(base_folder), config=config)


METHODS = plugins.available("methods")
CONFIGS = {
    "none": None,
    "MaskConfig": MaskConfig(density=0.3, scale=2.0),
    "MaskConfig that trains what it claims": MaskConfig(density=0.3, trains="claimed", train_norms=True),
    "MaskConfig that trains its mask": MaskConfig(density=0.3, trains="mask"),
    "some layers": MaskConfig(density=0.3, target_modules=["attention.self.query"], head_modules=["classifier"]),
    **{name: tiny.options(name) for name in METHODS},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_saved_is_what_was_learned(kind, base_folder, tmp_path):
    learner = tiny.learner(base_folder, CONFIGS[kind], tmp_path / "trainer", training={"num_train_epochs": 1})
    for name in ("pets", "weather"):
        learner.learn(tiny.task(name))
    run = learner.save_pretrained(tmp_path / "run")
    folder, _, method = open_run(run, tiny.fresh(base_folder))
    assert [task["name"] for task in folder.tasks] == ["pets", "weather"]
    for index, name in enumerate(learner.tasks):
        learner.activate(name)
        method.activate(index)
        assert torch.equal(tiny.logits(method.model), tiny.logits(learner.model))
        assert method.parts(index) == learner.method.parts(index)
    kept = {"eidetic", "exssnet", "independent", "lora", "piggyback", "supsup", "wsn"}
    exact = {*(kind for kind in CONFIGS if kind not in METHODS), *kept}
    assert verify(run, tiny.fresh(base_folder)).exact is (kind in exact - {"MaskConfig that trains its mask"})


def test_a_mask_config_whose_values_train_with_the_mask_has_one_phase(base_folder, tmp_path):
    config = MaskConfig(density=0.3, trains="claimed", joint=True)
    learner = tiny.learner(base_folder, config, tmp_path / "trainer", training={"num_train_epochs": 1})
    assert learner.learn(tiny.task("pets"))["facts"]["trainable"] > 0


def test_a_mask_config_that_names_the_missing_parameters_gets_its_head_from_them(base_folder, tmp_path):
    config = MaskConfig(density=0.3, missing_modules=["bert.pooler.dense.weight", "classifier.weight"])
    learner = tiny.learner(base_folder, config, tmp_path / "trainer", training={"num_train_epochs": 1})
    learner.learn(tiny.task())
    head = {name.rpartition(".")[0] for name in learner.method.pack(0).head}
    assert head == {"bert.pooler.dense", "classifier"}
    run = learner.save_pretrained(tmp_path / "run")
    base = tiny.load_base(str(base_folder), head=["bert.pooler.dense", "classifier"])
    assert verify(run, base).exact


# --- saving ----------------------------------------------------------------------------------------------------------


def test_nothing_learned_is_not_saved(learner, tmp_path):
    with pytest.raises(RunError, match=r"nothing was learned yet\. Call `learn\(task\)` first"):
        learner.save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_saving_replaces_only_a_run_and_only_when_asked(learned, tmp_path):
    run = learned.save_pretrained(tmp_path / "run")
    with pytest.raises(RunError, match="holds a run already"):
        learned.save_pretrained(run)
    assert learned.save_pretrained(str(run), overwrite=True) == run
    assert len(RunFolder.open(run).tasks) == 2


def test_a_learner_goes_on_from_a_saved_run(learned, base_folder, tmp_path):
    run = learned.save_pretrained(tmp_path / "run")
    again = tiny.learner(base_folder, tiny.options("supsup"), tmp_path / "trainer")
    again.restore(RunFolder.open(run))
    assert again.tasks == ["pets", "weather"]
    with pytest.raises(DataError, match=r"task 'pets' was restored without its rows\. Give them with `remember`"):
        again.evaluate()
    for name in again.tasks:
        again.remember(tiny.task(name))
    assert again.evaluate() == learned.records[1]["metrics"]
    again.learn(tiny.task("food"))
    assert again.method.parts(0) == learned.records[0]["parts"]


def test_rows_of_a_task_that_was_not_learned_are_refused(learned):
    with pytest.raises(HfClError, match="food"):
        learned.remember(tiny.task("food"))
