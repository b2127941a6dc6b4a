"""The rivals do what their names say: who sees which rows, which head a row trains, and what answers in the end."""

import dataclasses
import os
import socket

import pytest
import tiny
import torch
import torch.multiprocessing
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import Trainer

from hf_cl import open_run, verify
from hf_cl.cli.inspect import contents
from hf_cl.errors import ConfigError, DataError, RunError
from hf_cl.layers.mixed_rows import MixedRows
from hf_cl.layers.task_heads import TaskHeads
from hf_cl.merging.average import average
from hf_cl.merging.task_arithmetic import task_arithmetic
from hf_cl.merging.ties import ties
from hf_cl.merging.wise_ft import wise_ft
from hf_cl.methods import independent, joint, replay
from hf_cl.storage.run_folder import RunFolder

pytest_plugins = ["tiny"]

TASKS = ("pets", "weather", "food")
MERGES = ("average", "task_arithmetic", "ties", "wise_ft")
ALIKE, SLOW = ("task_arithmetic", "wise_ft"), pytest.mark.slow


class Watched(Trainer):
    """Notes what each training was given."""

    rows: list[Dataset] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Watched.rows.append(kwargs["train_dataset"])


@pytest.fixture
def watched():
    Watched.rows.clear()
    return Watched.rows


def learn(base_folder, folder, options, tasks=TASKS, **changes):
    learner = tiny.learner(base_folder, options, folder, **changes)
    for name in tasks:
        learner.learn(tiny.task(name))
    return learner


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- rows of several tasks in one batch -----------------------------------------------------------------------


def mixed(base_folder):
    base = tiny.fresh(base_folder)
    heads = TaskHeads(base, 0)
    for index, name in enumerate(TASKS):
        heads.add(index, tiny.LABELS[name])
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 40, (5,), generator=generator).tolist() for _ in range(7)]
    tasks, labels = [0, 1, 1, 2, 0, 1, 2], [1, 2, 0, 1, 0, 1, 0]
    return base, heads, ids, tasks, labels


def test_each_row_of_a_batch_is_answered_by_its_own_tasks_head(base_folder):
    base, heads, ids, tasks, labels = mixed(base_folder)
    both = MixedRows(heads, range(3))
    starts = [0, 2, 5]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(7, 5, dtype=torch.int64)}
    model = base.model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    together = model(
        **batch, labels=torch.tensor([starts[task] + label for task, label in zip(tasks, labels, strict=True)])
    )
    together.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    both.close()
    model.zero_grad()
    total = 0.0
    for row, (task, label) in enumerate(zip(tasks, labels, strict=True)):
        heads.show(task)
        alone = model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}, labels=torch.tensor([label]))
        width = len(tiny.LABELS[TASKS[task]])
        torch.testing.assert_close(together.logits[row, :width], alone.logits[0])
        assert bool((together.logits[row, width:] == float("-inf")).all())
        (alone.loss / 7).backward()
        total += alone.loss.item() / 7
    assert together.loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # One batch or seven: sums in another order.
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_rows_are_joined_with_labels_numbered_across_the_tasks(base_folder):
    _, heads, *_ = mixed(base_folder)
    both = MixedRows(heads, range(3))
    parts = [Dataset.from_dict({"input_ids": [[task]] * 2, "labels": [0, 1]}) for task in range(3)]
    joined = both.join(parts)
    assert joined["labels"] == [0, 1, 2, 3, 5, 6]
    assert joined["input_ids"] == [[0], [0], [1], [1], [2], [2]]
    both.close()


def test_while_it_is_evaluated_the_last_task_answers(base_folder):
    base, heads, ids, *_ = mixed(base_folder)
    both = MixedRows(heads, range(3))
    base.model.train()
    base.model(input_ids=torch.tensor(ids), labels=torch.tensor([0, 2, 5, 6, 1, 3, 4]))
    base.model.eval()
    output = base.model(input_ids=torch.tensor(ids), labels=torch.tensor([0, 1, 0, 1, 0, 1, 0]))
    assert output.logits.shape == (7, 2)
    assert base.model.config.id2label == dict(enumerate(tiny.LABELS["food"]))
    both.close()


# --- replay ---------------------------------------------------------------------------------------------------


def test_replay_mixes_in_its_share_of_each_earlier_task(base_folder, tmp_path, watched):
    learner = learn(base_folder, tmp_path, replay.Options(share=0.25, learning_rate=0.01), trainer_class=Watched)
    assert [len(rows) for rows in watched] == [24, 24 + 6, 24 + 12]
    assert [record["facts"]["kept_rows"] for record in learner.records] == [6, 6, 6]
    assert [record["facts"]["replayed_rows"] for record in learner.records] == [0, 6, 12]
    for index, name in enumerate(TASKS[:2]):
        task = tiny.tokenised(learner, name)
        known = {(tuple(ids), label) for ids, label in zip(task["input_ids"], task["labels"], strict=True)}
        kept = watched[2].select(range(6 * index, 6 * index + 6))
        start = sum(len(tiny.LABELS[other]) for other in TASKS[:index])
        found = [(tuple(ids), label - start) for ids, label in zip(kept["input_ids"], kept["labels"], strict=True)]
        assert set(found) <= known
        assert {label for _, label in found} == set(range(len(tiny.LABELS[name]))), "drawn from all labels"


def test_replay_trains_the_earlier_heads_unless_they_are_closed(base_folder, tmp_path):
    closed = replay.Options(share=0.25, learning_rate=0.01, open_heads=False)
    opened = dataclasses.replace(closed, open_heads=True)
    for options, moves in ((opened, True), (closed, False), (tiny.options("finetune"), False)):
        learner = tiny.learner(base_folder, options, tmp_path / f"{type(options).__module__}{moves}")
        learner.learn(tiny.task("pets"))
        before = {name: tensor.clone() for name, tensor in learner.method.pack(0).head.items()}
        learner.learn(tiny.task("weather"))
        assert equal(before, learner.method.pack(0).head) is not moves


def test_a_share_that_keeps_no_row_is_refused_before_any_training(base_folder, tmp_path, watched):
    learner = tiny.learner(base_folder, replay.Options(share=0.02), tmp_path, trainer_class=Watched)
    with pytest.raises(ConfigError, match=r"replay\.share: 0\.02 of 24 training rows is none\. Raise it to 0\.021"):
        learner.learn(tiny.task("pets"))
    assert not watched
    assert learner.tasks == []


@pytest.mark.parametrize("method", ["replay", "joint"])
def test_label_smoothing_over_several_tasks_is_refused(base_folder, tmp_path, watched, method):
    training = {"label_smoothing_factor": 0.1}
    learner = tiny.learner(base_folder, tiny.options(method), tmp_path, training=training, trainer_class=Watched)
    with pytest.raises(ConfigError, match=r"label_smoothing_factor: 0\.1 would be spread over other tasks' labels"):
        learner.learn(tiny.task("pets"))
    assert not watched


@pytest.mark.parametrize("method", ["replay", "joint"])
def test_mixed_rows_train_while_the_task_is_evaluated(base_folder, tmp_path, method):
    training = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    learner = tiny.learner(base_folder, tiny.options(method), tmp_path, training=training)
    for name in TASKS:
        learner.learn(tiny.task(name))
        assert learner.records[-1]["metrics"][name]["accuracy"] >= 0


# --- joint ----------------------------------------------------------------------------------------------------


def test_joint_trains_on_all_rows_from_the_base_whatever_came_between(base_folder, tmp_path, watched):
    learner = learn(base_folder, tmp_path / "three", joint.Options(learning_rate=0.01), trainer_class=Watched)
    assert [len(rows) for rows in watched] == [24, 48, 72]
    assert [record["facts"]["joint_rows"] for record in learner.records] == [24, 48, 72]
    assert [record["steps"] for record in learner.records] == [6, 12, 18]
    assert watched[2]["labels"] == [
        label + start
        for name, start in zip(TASKS, (0, 2, 5), strict=True)
        for label in tiny.tokenised(learner, name)["labels"]
    ]
    # What the intermediate trainings left does not matter: told all at once, it is the same model.
    other = tiny.learner(base_folder, joint.Options(learning_rate=0.01), tmp_path / "other")
    for index, name in enumerate(TASKS[:2]):
        other.method.begin(index, tiny.LABELS[name])
        other.method.way.keep(index, tiny.tokenised(learner, name))
        other.method.commit(index)
        other.records.append({"index": index, "name": name, "metrics": {}, "parts": {}})
        other._tests.append(None)
    other._before = 2
    other.learn(tiny.task("food"))
    assert equal(other.method.shared(), learner.method.shared())
    for index in range(3):
        assert equal(other.method.pack(index).head, learner.method.pack(index).head)


def test_joint_needs_the_rows_of_a_restored_run(base_folder, tmp_path):
    learner = learn(base_folder, tmp_path / "a", joint.Options(learning_rate=0.01), TASKS[:2])
    run = learner.save_pretrained(tmp_path / "run")
    again = tiny.learner(base_folder, joint.Options(learning_rate=0.01), tmp_path / "b")
    again.restore(RunFolder.open(run))
    with pytest.raises(DataError, match=r"joint: the rows of the tasks number 0, 1 are not here.*`remember`"):
        again.learn(tiny.task("food"))
    for name in TASKS[:2]:
        again.remember(tiny.task(name))
    again.learn(tiny.task("food"))
    learner.learn(tiny.task("food"))
    assert equal(again.method.shared(), learner.method.shared())


# --- independent and merged -------------------------------------------------------------------------------------


def encoders(base_folder, folder, **training):
    """Return the base's encoder, and what each task makes of it alone."""
    learner = learn(base_folder, folder, independent.Options(learning_rate=0.01), training=training)
    return learner.method.start, [learner.method.encoders[index] for index in range(3)]


def test_independent_models_do_not_depend_on_the_order(base_folder, tmp_path):
    _, alone = encoders(base_folder, tmp_path / "three")
    learner = tiny.learner(base_folder, independent.Options(learning_rate=0.01), tmp_path / "reversed")
    for name in TASKS[::-1]:
        learner.learn(tiny.task(name))
    learner.activate("pets")
    # Heads begin by the task's number, and so does what flows back: equal in kind, not in bits.
    assert set(learner.method.encoders[2]) == set(alone[0])
    first = tiny.learner(base_folder, tiny.options("finetune"), tmp_path / "one")
    first.learn(tiny.task("pets"))
    assert equal(first.method.shared(), alone[0]), "the first task's is that of plain fine-tuning"


RULES = {
    "average": ({}, lambda base, models: average(models)),
    "task_arithmetic": ({"scale": 0.5}, lambda base, models: task_arithmetic(base, models, 0.5)),
    "ties": ({"density": 0.4, "scale": 0.75}, lambda base, models: ties(base, models, 0.4, 0.75)),
    "wise_ft": ({"alpha": 0.5}, lambda base, models: wise_ft(base, average(models), 0.5)),
}


@pytest.mark.parametrize("method", [pytest.param(name, marks=SLOW if name in ALIKE else ()) for name in MERGES])
def test_what_answers_is_the_merge_of_what_each_task_learned_from_the_base(base_folder, tmp_path, method):
    options, rule = RULES[method]
    base, models = encoders(base_folder, tmp_path / "alone")
    learner = tiny.learner(base_folder, tiny.options(method, **options), tmp_path / method)
    for count, name in enumerate(TASKS, start=1):
        learner.learn(tiny.task(name))
        assert equal(learner.method.shared(), rule(base, models[:count]))
        assert equal(learner.method.carried(count - 1)["encoder"], models[count - 1])


@pytest.mark.slow
def test_the_coefficient_is_the_best_on_the_validation_rows_of_all_tasks_so_far(base_folder, tmp_path):
    learner = learn(base_folder, tmp_path / "merged", tiny.options("task_arithmetic"))
    base, models = encoders(base_folder, tmp_path / "alone")
    for count, record in enumerate(learner.records, start=1):
        tried = record["facts"]["validation_accuracy"]
        assert tried[f"{record['facts']['coefficient']:g}"] == max(tried.values())
        for coefficient in (0.1, 0.5, 1.0):
            learner.method.put(task_arithmetic(base, models[:count], coefficient))
            found = []
            for index, name in enumerate(TASKS[:count]):
                learner.method.heads.show(index)
                found.append(accuracy(learner, name))
            assert tried[f"{coefficient:g}"] == pytest.approx(sum(found) / count, abs=1e-6)


def accuracy(learner, name):
    rows = tiny.tokenised(learner, name, "validation")
    right = 0
    for ids, label in zip(rows["input_ids"], rows["labels"], strict=True):
        with torch.no_grad():
            right += int(learner.model.eval()(input_ids=torch.tensor([ids])).logits.argmax()) == label
    return right / len(rows)


def test_a_restored_merge_goes_on_and_says_which_rows_it_lacks(base_folder, tmp_path):
    learner = learn(base_folder, tmp_path / "a", tiny.options("wise_ft"), TASKS[:2])
    run = learner.save_pretrained(tmp_path / "run")
    again = tiny.learner(base_folder, tiny.options("wise_ft"), tmp_path / "b")
    again.restore(RunFolder.open(run))
    with pytest.raises(DataError, match=r"validation rows of the tasks number 0, 1 are not here.*give the coefficient"):
        again.learn(tiny.task("food"))
    for name in TASKS[:2]:
        again.remember(tiny.task(name))
    again.learn(tiny.task("food"))
    learner.learn(tiny.task("food"))
    assert equal(again.method.shared(), learner.method.shared())


@pytest.mark.parametrize("method", ["replay", "ewc", "average"])
def test_what_only_the_next_task_needs_is_not_read_to_answer(base_folder, tmp_path, method):
    learner = learn(base_folder, tmp_path / "a", tiny.options(method), TASKS[:2])
    run = learner.save_pretrained(tmp_path / "run")
    folder = RunFolder.open(run)
    state = [entry for task in folder.tasks for part, entry in task["files"].items() if part not in ("task", "head")]
    assert state
    assert sum(task["bytes"]["carried"] for task in folder.tasks) == sum(entry["bytes"] for entry in state)
    assert contents(folder)["bytes_carried"] == sum(entry["bytes"] for entry in state)
    for entry in state:
        (run / entry["file"]).unlink()
    _, _, method_again = open_run(run, tiny.fresh(base_folder))
    for index in range(2):
        method_again.activate(index)
        learner.method.activate(index)
        assert torch.equal(tiny.logits(method_again.model), tiny.logits(learner.model))
    assert verify(run, tiny.fresh(base_folder)).files == [entry["file"] for entry in state]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("replay", "task 0: the rows kept of it are not there"),
        ("ewc", "ewc: the Fisher of the 1 earlier tasks is not there"),
        ("average", "task 0: its own encoder holds"),
    ],
)
def test_a_run_that_lost_what_the_next_task_needs_does_not_go_on(base_folder, tmp_path, method, message):
    run = learn(base_folder, tmp_path / "a", tiny.options(method), TASKS[:1]).save_pretrained(tmp_path / "run")
    folder = RunFolder.open(run)
    files = folder.tasks[0]["files"]
    for part in set(files) - {"head", "task"}:
        del files[part]
    again = tiny.learner(base_folder, tiny.options(method), tmp_path / "b")
    with pytest.raises(RunError, match=message):
        again.restore(folder)
        again.remember(tiny.task("pets"))
        again.learn(tiny.task("food"))


def test_a_fisher_of_another_encoder_is_refused(base_folder, tmp_path):
    learner = learn(base_folder, tmp_path / "a", tiny.options("ewc"), TASKS[:1])
    carried = learner.method.carried(0)
    name = next(iter(carried["centre"]))
    again = tiny.learner(base_folder, tiny.options("ewc"), tmp_path / "b")
    for wrong in (torch.zeros(3), None):
        centre = {**carried["centre"], name: wrong}
        centre = centre if wrong is not None else {key: t for key, t in centre.items() if key != name}
        with pytest.raises(RunError, match="task 0: its centre holds"):
            again.method.restore_carried(0, {**carried, "centre": centre})


# --- learning happens -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_with_the_earlier_rows_an_earlier_task_is_remembered_better(base_folder, tmp_path):
    """Seen on training rows: a tiny base has no more to generalise from than the words."""
    kept = {}
    for method, options in (
        ("finetune", tiny.options("finetune")),
        ("replay", replay.Options(share=0.5, learning_rate=0.01)),
        ("joint", tiny.options("joint")),
    ):
        learner = learn(base_folder, tmp_path / method, options, training={"num_train_epochs": 8})
        losses = []
        for name in TASKS[:2]:
            learner.activate(name)
            losses.append(loss(learner, name))
        kept[method] = sum(losses) / 2
    assert kept["finetune"] > 1.2 * kept["replay"]
    assert kept["finetune"] > 1.2 * kept["joint"]


def loss(learner, name):
    rows = tiny.tokenised(learner, name)
    total = 0.0
    for ids, label in zip(rows["input_ids"], rows["labels"], strict=True):
        with torch.no_grad():
            logits = learner.model.eval()(input_ids=torch.tensor([ids])).logits
        total += torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item()
    return total / len(rows)


# --- several processes --------------------------------------------------------------------------------------------


def _learn_in_one_of_two(rank, port, base_folder, folder, method):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    options = tiny.options(method, **({"beta": 0.5} if method == "sfa" else {}))
    training = {"ddp_backend": "gloo", "per_device_train_batch_size": 4}
    learner = learn(base_folder, folder / f"{rank}", options, TASKS[:2], training=training)
    heads = {f"{index}.{name}": t for index in range(2) for name, t in learner.method.pack(index).head.items()}
    save_file({**learner.method.encoder_copy(), **heads}, folder / f"{rank}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sfa", "l2", "ewc", "replay", "joint", "ties"])
def test_two_processes_learn_the_same(base_folder, tmp_path, method):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_learn_in_one_of_two, (port, base_folder, tmp_path, method), nprocs=2)
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert equal(one, other)
    base = tiny.fresh(base_folder).model.state_dict()
    assert not all(torch.equal(base[name], tensor) for name, tensor in one.items() if name in base)
