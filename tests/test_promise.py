"""The promise: what a finished task computes never changes by one bit, whatever is learned after it."""

import itertools

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save
from transformers import Trainer, TrainerCallback, default_data_collator

from hf_cl import MaskConfig, OwnershipCallback
from hf_cl.errors import OwnershipError, TrainingError
from hf_cl.methods import exssnet, piggyback, ssnet, supsup, wsn
from hf_cl.ownership.owner import FREE
from hf_cl.training.train_task import train_task

LABELS = ("abc", "de", "fghi")
DENSITY = {"delta": 0.1, "prune": 0.4, "random": 0.2}
OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9,weight_decay=0.1", "learning_rate": 0.5},
    "adafactor": {"optim": "adafactor", "weight_decay": 0.1},
}
SETTINGS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.1},
    "autocast": {"bf16": True},
}
BANKS, FORMS = ("supsup", "exssnet", "mixed"), tuple(DENSITY)
PRODUCT = list(itertools.product(range(3), repeat=4))
# The orthogonal array L9: of any two columns, every pair of levels occurs.
PAIRWISE = [(a, b, (a + b) % 3, (a + 2 * b) % 3) for a in range(3) for b in range(3)]
OTHERS = [("wsn", *names) for names in zip(DENSITY, OPTIMIZERS, SETTINGS, strict=True)]
OTHERS += [("piggyback", "prune", *names) for names in zip(OPTIMIZERS, SETTINGS, strict=True)]
MODULES = {"supsup": supsup, "exssnet": exssnet, "wsn": wsn, "piggyback": piggyback}


def trained_count(tuner, adapter):
    return sum(layer.hfcl_owned[adapter].numel() for layer in tuner.mask_layers())


def cases():
    for levels in PRODUCT:
        names = [
            kind[level] for kind, level in zip(map(tuple, (BANKS, FORMS, OPTIMIZERS, SETTINGS)), levels, strict=True)
        ]
        yield pytest.param(*names, marks=() if levels in PAIRWISE else pytest.mark.slow, id="-".join(names))
    yield from (pytest.param(*names, id="-".join(names)) for names in OTHERS)


def seen(model, adapter):
    """All that a task's forward uses and gives: composed weights, head, norms, logits."""
    model.base_model.set_adapter(adapter, inference_mode=True)
    model.eval()
    ids = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found = {"logits": model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits}
    found |= {f"weight of {layer.path}": layer.store.weight for layer in model.base_model.mask_layers()}
    found |= {f"own {name}": tensor for name, tensor in model.base_model.own_tensors(adapter).items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def moved(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def packed_bytes(method, index):
    packed = method.pack(index)
    return save(packed.task), save(packed.head)


class Each(TrainerCallback):
    """Calls a function of the model at one optimizer step's begin."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(kwargs["model"])


@pytest.fixture(scope="module")
def build(tiny_base):
    def make(module, *, seed=0, **options):
        options = {"density": 0.2, "scores_learning_rate": 0.05} | options
        if module in (exssnet, ssnet):
            options = {"mask_share": 0.5, "values_learning_rate": 0.05} | options
        if module is wsn:  # from the last mask, so few steps cannot leave it
            options = {"values_learning_rate": 0.05, "start": "fresh"} | options
        if module is exssnet:
            # KKT may start from a mask that so few steps cannot leave: then nothing of a task is its own.
            options = {"start": "fresh"} | options
        known = {name: value for name, value in options.items() if name in module.Options.__dataclass_fields__}
        return module.build(tiny_base(), module.Options(**known), seed)

    return make


@pytest.fixture(scope="module")
def learn(token_task, arguments):
    """Learn task number `index` of the stream by the one function that trains a task."""

    def run(method, index, *callbacks, **changes):
        rows = token_task(index, len(LABELS[index]))
        args = arguments(**changes)
        return train_task(method, index, tuple(LABELS[index]), rows, default_data_collator, args, callbacks=callbacks)

    return run


@pytest.fixture(scope="module")
def learn_mixed(tiny_model, token_rows, arguments):
    """Learn a bank whose tasks alternate: a mask alone, then values too; with the user's own Trainer."""

    def stream(form, changes):
        model = None
        for index, labels in enumerate(LABELS):
            trains, share = (("nothing", 1.0), ("claimed", 0.5))[index % 2]
            config = MaskConfig(
                task_type="SEQ_CLS", num_labels=len(labels), density=DENSITY[form], compose=form, trains=trains,
                train_norms=True,
            )  # fmt: skip
            if model is None:
                model = get_peft_model(tiny_model(), config, adapter_name=f"task{index}")
            else:
                model.add_adapter(f"task{index}", config)
                model.set_adapter(f"task{index}")
            callback = OwnershipCallback(f"task{index}", mask_share=share, learning_rates={"scores": 0.05})
            args = arguments(**changes)
            Trainer(model, args, train_dataset=token_rows(index, len(labels)), callbacks=[callback]).train()
            yield model

    return stream


@pytest.fixture(scope="module")
def learn_stream(build, learn, learn_mixed):
    """Yield the model after each of the three tasks."""

    def stream(bank, form, changes):
        if bank == "mixed":
            yield from learn_mixed(form, changes)
            return
        method = build(MODULES[bank], density=DENSITY[form], compose=form, train_norms=True)
        for index in range(len(LABELS)):
            learn(method, index, **changes)
            yield method.model

    return stream


# --- the promise ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bank", "form", "optimizer", "setting"), cases())
def test_every_earlier_task_stays_bit_identical_after_each_later_one(learn_stream, bank, form, optimizer, setting):
    kept = []
    for count, model in enumerate(learn_stream(bank, form, OPTIMIZERS[optimizer] | SETTINGS[setting]), start=1):
        for index, before in enumerate(kept):
            assert moved(before, seen(model, f"task{index}")) == set()
        kept.append(seen(model, f"task{count - 1}"))
    assert [len(before["logits"][0]) for before in kept] == [3, 2, 4]
    tuner = model.base_model
    assert any("LayerNorm" in name for name in tuner.own_tensors("task0"))
    # Not for want of trying: later tasks read what earlier ones own, and each trained something.
    assert tuner.facts("task2")["overlap"] > 0
    assert [trained_count(tuner, f"task{index}") > 0 for index in range(3)] == [
        {"supsup": False, "exssnet": True, "mixed": index == 1}.get(bank, bank == "wsn") for index in range(3)
    ]


def test_ssnet_forgets_where_masks_overlap_and_the_same_check_sees_it(build, learn):
    method = build(ssnet)
    learn(method, 0, **OPTIMIZERS["adamw"])
    before, parts = seen(method.model, "task0"), method.parts(0)
    learn(method, 1, **OPTIMIZERS["adamw"])
    assert method.facts(1)["overlap"] > 0
    changed = moved(before, seen(method.model, "task0"))
    assert "logits" in changed
    assert any(name.startswith("weight of") for name in changed)
    assert method.parts(0)["values"] != parts["values"]


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_digests_of_earlier_tasks_stay_as_they_were_at_commit(build, learn, module):
    method, parts = build(module), []
    for index in range(3):
        learn(method, index)
        parts.append(method.parts(index))
        assert [method.parts(earlier) for earlier in range(index + 1)] == parts
    assert len({digest for part in parts for digest in part.values()}) == 3 * 4 + 1


@pytest.mark.parametrize("density", [0.05, 0.4])
def test_switching_tasks_back_and_forth_gives_the_same_bits(build, learn, density):
    method = build(exssnet, density=density)
    for index in range(3):
        learn(method, index)
    first = [seen(method.model, f"task{index}") for index in range(3)]
    for index in (0, 1, 0, 2, 1, 0):
        assert moved(first[index], seen(method.model, f"task{index}")) == set()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_the_composed_weight_is_the_one_formula_bit_for_bit(build, learn, form, density):
    method = build(exssnet, density=density, compose=form)
    for index in range(2):
        learn(method, index)
    for adapter in ("task0", "task1", "task0"):
        method.model.set_adapter(adapter)
        for layer in method.tuner.mask_layers():
            base = layer.base_layer.weight if form == "delta" else torch.zeros_like(layer.base_layer.weight)
            expected = torch.where(layer.mask(adapter), base + layer.store.values, base)
            assert torch.equal(layer.store.weight, expected)


def test_bf16_arguments_train_under_autocast_on_the_cpu_too(build, learn):
    # Otherwise the setting above would prove nothing.
    found = []

    def watch(model):
        own = model.base_model.own_layers()[-1]
        own.register_forward_pre_hook(lambda *_: found.append(torch.is_autocast_enabled("cpu")))

    learn(build(supsup), 0, Each(0, watch), bf16=True)
    assert found
    assert all(found)


# --- what writes past the optimizer is noticed --------------------------------------------------------


def _flip(tensor, place=0):
    with torch.no_grad():
        tensor.view(torch.uint8 if tensor.dtype == torch.uint8 else torch.int32).view(-1)[place] ^= 1


def _flip_value(tuner):
    layer = tuner.mask_layers()[3]
    _flip(layer.store.values, int((layer.store.owner == 0).view(-1).nonzero()[0]))


FLIPS = {
    "an owned value": _flip_value,
    "a head": lambda tuner: _flip(tuner.own_layers()[-1].hfcl_copy["task0"].weight),
    "a norm": lambda tuner: _flip(tuner.own_layers()[0].hfcl_copy["task0"].weight),
    "a mask": lambda tuner: _flip(tuner.mask_layers()[3].hfcl_bits["task0"]),
    "a base weight": lambda tuner: _flip(tuner.mask_layers()[3].base_layer.weight),
    "a base bias": lambda tuner: _flip(tuner.mask_layers()[3].base_layer.bias),
    "an embedding": lambda tuner: _flip(tuner.model.bert.embeddings.word_embeddings.weight, 99),
}


@pytest.mark.parametrize("what", FLIPS)
def test_one_bit_written_into_what_a_task_reads_is_noticed(build, learn, what):
    method = build(exssnet, train_norms=True)
    learn(method, 0)
    parts = method.parts(0)
    flip = Each(2, lambda model: FLIPS[what](model.base_model))
    with pytest.raises(OwnershipError, match="has moved while it trained"):
        learn(method, 1, flip)
    assert method.parts(0) != parts


# --- a task that does not finish -----------------------------------------------------------------------


class Stop(Exception):
    """Something of the user's goes wrong."""


def _raise(error):
    def act(model):
        raise error

    return act


def _spoil(model):
    # An infinite logit: the loss becomes NaN, which the Trainer itself would not even log.
    with torch.no_grad():
        model.base_model.own_layers()[-1].hfcl_copy[model.active_adapter].bias.fill_(float("inf"))


class StopAfterCommit(TrainerCallback):
    """Fails in `on_train_end`, after the ownership callback has committed."""

    def on_train_end(self, args, state, control, **kwargs):
        raise Stop


FAILURES = {
    "in the mask phase": (Stop, lambda: Each(1, _raise(Stop()))),
    "in the weight phase": (Stop, lambda: Each(3, _raise(Stop()))),
    "by the keyboard": (KeyboardInterrupt, lambda: Each(2, _raise(KeyboardInterrupt()))),
    "by a NaN loss": (TrainingError, lambda: Each(2, _spoil)),
    "after its commit": (Stop, StopAfterCommit),
}


@pytest.fixture(scope="module", params=[supsup, exssnet], ids=["supsup", "exssnet"])
def undisturbed(request, build, learn):
    """A way to learn, and the bank of two tasks that it leaves when nothing goes wrong."""
    method = build(request.param)
    for index in range(2):
        learn(method, index)
    return request.param, method


@pytest.mark.parametrize("failure", FAILURES)
def test_a_task_that_fails_leaves_no_trace(build, learn, undisturbed, failure):
    error, callback = FAILURES[failure]
    module, undisturbed = undisturbed
    method = build(module)
    with pytest.raises(error):
        learn(method, 0, callback())
    learn(method, 0)
    before, parts = seen(method.model, "task0"), method.parts(0)
    with pytest.raises(error):
        learn(method, 1, callback())
    assert list(method.model.peft_config) == ["task0"]
    assert moved(before, seen(method.model, "task0")) == set()
    assert method.parts(0) == parts
    learn(method, 1)
    assert moved(before, seen(method.model, "task0")) == set()
    for index in range(2):
        assert packed_bytes(method, index) == packed_bytes(undisturbed, index)
        assert method.parts(index) == undisturbed.parts(index)


def test_a_nan_loss_stops_at_its_step_and_says_which(build, learn):
    method = build(exssnet)
    learn(method, 0)
    used = method.tuner.capacity_used()
    with pytest.raises(TrainingError, match=r"^step 3: the loss or its gradient is not finite"):
        learn(method, 1, Each(2, _spoil))
    assert method.tuner.capacity_used() == used
    with pytest.raises(TrainingError, match=r"^step 2: "):
        learn(method, 1, Each(1, _spoil), gradient_accumulation_steps=2)


def test_deleting_an_unfinished_adapter_leaves_earlier_tasks_alone(build, learn):
    method = build(exssnet)
    learn(method, 0)
    before, parts = seen(method.model, "task0"), method.parts(0)
    for opened in (False, True):
        method.begin(1, ("a", "b"))
        if opened:
            method.tuner.begin_weight_phase("task1")
        method.abandon(1)
        assert moved(before, seen(method.model, "task0")) == set()
        assert method.parts(0) == parts


# --- seeds ---------------------------------------------------------------------------------------------


def test_one_seed_gives_one_bank_and_another_seed_another(build, learn, undisturbed):
    module, method = undisturbed

    def run(seed):
        method = build(module, seed=seed)
        for index in range(2):
            learn(method, index)
        return [packed_bytes(method, index) for index in range(2)]

    first = [packed_bytes(method, index) for index in range(2)]
    assert run(0) == first
    assert all(task != other for (task, _), (other, _) in zip(first, run(1), strict=True))


def test_a_task_restored_from_its_packed_tensors_computes_the_same_bits(build, learn):
    method, copied = build(exssnet, train_norms=True), build(exssnet, train_norms=True)
    for index in range(3):
        learn(method, index)
        copied.restore(index, tuple(LABELS[index]), method.pack(index))
    for index in range(3):
        assert moved(seen(method.model, f"task{index}"), seen(copied.model, f"task{index}")) == set()
        assert copied.parts(index) == method.parts(index)


def test_free_entries_are_all_that_a_commit_writes(build, learn):
    method = build(exssnet)
    learn(method, 0)
    layers = method.tuner.mask_layers()
    stores = [(layer.store.owner.clone(), layer.store.values.clone()) for layer in layers]
    learn(method, 1)
    for layer, (owner, values) in zip(layers, stores, strict=True):
        written = (layer.store.owner != owner) | (layer.store.values != values)
        assert not (written & (owner != FREE)).any()
        assert torch.equal(written, layer.mask("task1") & (owner == FREE))
