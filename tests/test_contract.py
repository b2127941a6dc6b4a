"""What every method in `hf_cl/methods` promises; a new file there is tested the moment it exists."""

import dataclasses
import inspect
import json

import pytest
import tiny
import torch
from safetensors.torch import load, save
from transformers import TrainerCallback

from hf_cl import plugins
from hf_cl.config import read
from hf_cl.proof import probe_digest
from hf_cl.training.method import Method, Packed

pytest_plugins = ["tiny"]

METHODS = plugins.available("methods")
EXACT = ("eidetic", "exssnet", "independent", "lora", "piggyback", "supsup", "wsn")
FORGET = (
    "average", "ewc", "finetune", "hypermask", "joint", "l2", "replay", "sfa", "ssnet", "task_arithmetic", "ties",
    "wise_ft",
)  # fmt: skip
OPEN_HEADS = ("joint", "replay")
"""Methods that train earlier heads on, by earlier rows."""
LABELS = [tiny.LABELS["pets"], tiny.LABELS["weather"]]


def stored(method, index):
    """Return a task as it is on disk: bytes a part."""
    packed = method.pack(index)
    return {part: save({n: t.contiguous() for n, t in sorted(getattr(packed, part).items())}) for part in PARTS}


PARTS = ("task", "head")


@dataclasses.dataclass
class Learned:
    name: str
    learner: object
    first: dict
    second: dict
    first_bytes: dict
    first_logits: torch.Tensor

    @property
    def method(self):
        return self.learner.method


def learn(name, base_folder, folder, **changes):
    learner = tiny.learner(base_folder, tiny.options(name, **changes), folder)
    first = learner.learn(tiny.task("pets"))
    first_bytes, first_logits = stored(learner.method, 0), tiny.logits(learner.model)
    second = learner.learn(tiny.task("weather"))
    return Learned(name, learner, first, second, first_bytes, first_logits)


@pytest.fixture(scope="module", params=METHODS)
def learned(request, base_folder, tmp_path_factory):
    return learn(request.param, base_folder, tmp_path_factory.mktemp(request.param))


def rebuilt(learned, base_folder):
    """Return the method of a fresh process: built on a freshly loaded base from what is stored alone."""
    module = plugins.load("methods", learned.name)
    settled = json.loads(json.dumps(learned.method.settled()))
    method = module.build(tiny.fresh(base_folder), tiny.options(learned.name), 0, settled)
    for index, labels in enumerate(LABELS):
        method.restore(index, labels, Packed(**{part: load(d) for part, d in stored(learned.method, index).items()}))
    if learned.method.shared():
        method.restore_shared(load(save(learned.method.shared())))
    return method


# --- what a file declares ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_docstring_begins_with_what_it_is(name):
    first = (plugins.load("methods", name).__doc__ or "").splitlines()[0]
    assert 20 <= len(first) <= 120
    assert first[0].isupper()
    assert first[-1] in ".:,"


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_options_are_frozen_and_each_is_described(name):
    cls = plugins.load("methods", name).Options
    assert cls.__dataclass_params__.frozen
    assert cls.__module__ == f"hf_cl.methods.{name}"
    fields = dataclasses.fields(cls)
    assert fields
    assert all(field.metadata["help"].endswith(".") for field in fields)
    assert read(cls, {}, "options") == cls(), "every option has a default"
    assert read(cls, dataclasses.asdict(cls()), "options") == cls(), "the defaults are of the declared types"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_built_of_base_options_and_seed(name):
    parameters = inspect.signature(plugins.load("methods", name).build).parameters
    assert list(parameters) == ["base", "options", "seed", "settled"]
    assert parameters["settled"].default is None


# --- two tasks ----------------------------------------------------------------------------------------------


def test_the_logits_of_a_task_have_one_column_a_label(learned):
    assert isinstance(learned.method, Method)
    for index, labels in enumerate(LABELS):
        learned.method.activate(index)
        assert tiny.logits(learned.method.model).shape == (5, len(labels))


def test_a_finished_tasks_facts_are_plain_and_count_what_trained(learned):
    for index in range(2):
        facts = learned.method.facts(index)
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts
        assert type(facts["trainable"]) is int
        assert facts["trainable"] >= 0


def test_what_is_settled_is_plain(learned):
    settled = learned.method.settled()
    assert json.loads(json.dumps(settled, allow_nan=False)) == settled


def test_a_packed_task_is_plain_cpu_tensors(learned):
    kinds = {torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32}
    for index in range(2):
        packed = learned.method.pack(index)
        assert packed.head, "every task has a head of its own"
        for tensors in (packed.task, packed.head, learned.method.shared()):
            for tensor in tensors.values():
                assert tensor.device.type == "cpu"
                assert tensor.dtype in kinds
                assert not tensor.requires_grad


def test_a_head_is_stored_with_the_head_and_nowhere_else(learned):
    for index in range(2):
        task = learned.method.pack(index).task
        assert not [name for name in task if "classifier" in name]


def test_a_restored_method_is_the_live_one(learned, base_folder):
    again, live = rebuilt(learned, base_folder), learned.method
    for index in range(2):
        live.activate(index)
        again.activate(index)
        assert again.parts(index) == live.parts(index)
        assert probe_digest(again.model) == probe_digest(live.model)
        assert torch.equal(tiny.logits(again.model), tiny.logits(live.model))
        assert stored(again, index) == stored(live, index)


def test_activating_a_task_twice_gives_the_same_logits(learned):
    for index in (0, 1, 0, 1):
        learned.method.activate(index)
        one = tiny.logits(learned.method.model)
        learned.method.activate(1 - index)
        learned.method.activate(index)
        assert torch.equal(one, tiny.logits(learned.method.model))


def test_nothing_of_a_finished_task_is_trainable(learned):
    for index in (0, 1):
        learned.method.activate(index)
        trainable = [name for name, p in learned.method.model.named_parameters() if p.requires_grad]
        assert not [name for name in trainable if "task0" in name.split(".") or "task1" in name.split(".")]


def test_nothing_of_an_earlier_task_is_trainable_while_the_next_trains(base_folder, tmp_path, learned):
    module = plugins.load("methods", learned.name)
    method = module.build(tiny.fresh(base_folder), tiny.options(learned.name), 0, learned.method.settled())
    for index, labels in enumerate(LABELS):
        method.restore(index, labels, learned.method.pack(index))
    if learned.method.shared():
        method.restore_shared(learned.method.shared())
    method.begin(2, tiny.LABELS["food"])
    names = [name.split(".") for name, p in method.model.named_parameters() if p.requires_grad]
    earlier = [name for name in names if {"task0", "task1"} & set(name)]
    assert bool(earlier) is (learned.name in OPEN_HEADS)
    assert [name for name in names if "task2" in name]
    in_groups = {id(p) for group in method.groups(tiny.arguments(tmp_path)) for p in group["params"]}
    assert in_groups == {id(p) for p in method.model.parameters() if p.requires_grad}


# --- what is promised of earlier tasks ------------------------------------------------------------------------


def test_an_exact_method_leaves_the_first_task_as_it_was(learned):
    if learned.name not in EXACT:
        pytest.skip("not exact")
    learned.method.activate(0)
    assert learned.method.parts(0) == learned.first["parts"]
    assert probe_digest(learned.method.model) == learned.first["probe"]
    assert torch.equal(tiny.logits(learned.method.model), learned.first_logits)
    assert stored(learned.method, 0) == learned.first_bytes
    assert learned.second["metrics"]["pets"] == learned.first["metrics"]["pets"]


def test_a_method_without_protection_is_seen_to_forget(learned):
    if learned.name not in FORGET:
        pytest.skip("exact")
    if learned.name == "ssnet":
        assert learned.second["facts"]["overlap"] > 0
    learned.method.activate(0)
    assert learned.method.parts(0) != learned.first["parts"]
    assert not torch.equal(tiny.logits(learned.method.model), learned.first_logits)


def test_every_method_is_known_to_be_exact_or_not():
    assert set(METHODS) == {*EXACT, *FORGET}, "say here what a new method promises"


def test_one_seed_gives_the_same_bytes_twice(learned, base_folder, tmp_path):
    again = learn(learned.name, base_folder, tmp_path)
    assert again.first_bytes == learned.first_bytes
    for index in range(2):
        assert stored(again.method, index) == stored(learned.method, index)
    assert again.second["parts"] == learned.second["parts"]


# --- a task that fails ------------------------------------------------------------------------------------------


class Fails(TrainerCallback):
    """Raises at one event; it comes after the method's own callbacks."""

    def __init__(self, event):
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        raise OSError("the disk of a callback is full")


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_end", "on_train_end"])
def test_a_task_that_fails_leaves_no_trace(learned, event, base_folder, tmp_path):
    learner = tiny.learner(base_folder, tiny.options(learned.name), tmp_path)
    for index, (task, record) in enumerate((("pets", learned.first), ("weather", learned.second))):
        learner.callbacks = (Fails(event),)
        with pytest.raises(OSError, match="disk of a callback"):
            learner.learn(tiny.task(task))
        assert learner.tasks == ["pets"][:index]
        if index:
            learner.activate("pets")
            assert learner.method.parts(0) == learned.first["parts"]
            assert torch.equal(tiny.logits(learner.model), learned.first_logits)
        learner.callbacks = ()
        again = learner.learn(tiny.task(task))
        if not index:
            assert stored(learner.method, 0) == learned.first_bytes
        assert {key: again[key] for key in ("facts", "parts", "probe")} == {
            key: record[key] for key in ("facts", "parts", "probe")
        }
    assert stored(learner.method, 1) == stored(learned.method, 1)


# --- lora ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(base_folder, tmp_path_factory):
    return learn("lora", base_folder, tmp_path_factory.mktemp("lora_alone"))


def test_loras_stored_adapter_is_the_live_one_in_bfloat16(lora):
    for index in range(2):
        live = {
            name.replace(f".task{index}.weight", ""): tensor
            for name, tensor in lora.method.model.named_parameters()
            if ".lora_" in name and f".task{index}." in name
        }
        packed = lora.method.pack(index).task
        assert set(packed) == set(live)
        assert {tensor.dtype for tensor in packed.values()} == {torch.bfloat16}
        assert all(torch.equal(packed[name].float(), live[name]) for name in live)


def test_loras_adapter_is_rounded_before_it_is_evaluated(lora, base_folder):
    again = rebuilt(lora, base_folder)
    again.activate(1)
    assert probe_digest(again.model) == lora.second["probe"]


def test_loras_trainable_count_is_that_of_its_two_factors(lora):
    targets = lora.method.settled()["target_modules"]
    shapes = [tiny.bert().get_submodule(name).weight.shape for name in targets]
    r = lora.method.options.r
    assert lora.method.facts(0)["trainable"] == sum(r * (rows + columns) for rows, columns in shapes)


def test_loras_head_keeps_its_full_precision(lora):
    head = lora.method.pack(0).head["classifier.weight"]
    assert not torch.equal(head, head.to(torch.bfloat16).float())
