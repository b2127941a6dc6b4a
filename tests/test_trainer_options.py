"""Options of transformers' Trainer that people use: each trains, commits, and leaves what was learned before alone.

Everything goes through `learn`, which holds the promise: in the mask phase every step moves scores and head and no
value, in the weight phase values and head and no score; the task is committed; no bit of an earlier task moves.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch._dynamo
import transformers.trainer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.nn import functional
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, default_data_collator

from hf_cl import MaskConfig, OwnershipCallback, open_run, verify
from hf_cl.errors import ConfigError, HfClError, OwnershipError
from hf_cl.masks.select import topk_mask
from hf_cl.proof import probe_digest
from hf_cl.starts.kkt import Choice
from hf_cl.training import kkt_start
from hf_cl.training.groups import parameter_groups, role_of
from hf_cl.tuner.adapter_file import adapter_of_key

pytest_plugins = ["tiny"]


CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""No dropout: what is left of a difference is the option's."""
RATES = {"scores": 0.05, "values": 0.05, "head": 0.02}
SHARE = {"claimed": 0.5, "mask": 0.5, "nothing": 1.0}


def config(**options):
    return MaskConfig(**({"task_type": "SEQ_CLS", "density": 0.2, "num_labels": 3, "trains": "claimed"} | options))


def by_role(model, adapter):
    found = {"scores": [], "values": [], "head": []}
    for name, parameter in model.named_parameters():
        key = adapter_of_key(name)
        if key is not None and key[1] == adapter:
            found[role_of(name)].append(parameter)
    return found


class Moves(TrainerCallback):
    """Notes which roles each optimizer step moved, be it by one bit."""

    def __init__(self, adapter):
        self.adapter, self.steps = adapter, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        found = by_role(kwargs["model"], self.adapter)
        self.before = {role: [tensor.detach().clone() for tensor in held] for role, held in found.items()}

    def on_optimizer_step(self, args, state, control, **kwargs):
        after = by_role(kwargs["model"], self.adapter)
        self.steps.append({role for role, held in after.items() if not equal(held, self.before[role])})


class Told(Trainer):
    """A user's own Trainer, which keeps each step's loss as it comes from the model."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.is_in_train and model.training:
            self.told = [*getattr(self, "told", []), loss.detach().clone()]
        return loss


class Spy(TrainerCallback):
    """Calls `on_<event>(model, state, kwargs)` functions given by name."""

    def __init__(self, **acts):
        for event, act in acts.items():
            setattr(self, event, self._call(act))

    def _call(self, act):
        return lambda args, state, control, **kwargs: act(kwargs["model"], state, kwargs)


def equal(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def state_of(model, adapter="news"):
    """All that a committed task is, as tensors."""
    return [tensor.clone() for _, tensor in model.base_model.task_tensors(adapter)]


def logits(model, adapter=None):
    """What a task answers; below `PeftModel.forward`, which accelerate replaces under autocast."""
    if adapter is not None:
        model.set_adapter(adapter)
    was_training = model.training
    model.eval()
    ids = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.clone()
    model.train(was_training)
    return found


def seen(model, adapter):
    return [*state_of(model, adapter), logits(model, adapter)]


def finish(model, adapter, seed=3):
    """Take an adapter to its commit without a Trainer."""
    generator = torch.Generator().manual_seed(seed)
    tuner = model.base_model
    model.set_adapter(adapter)
    with torch.no_grad():
        for role in ("scores", "values", "head"):
            if role == "values" and model.peft_config[adapter].trains != "nothing":
                tuner.begin_weight_phase(adapter)
            for tensor in by_role(model, adapter)[role]:
                if tensor.requires_grad:
                    tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    tuner.commit(adapter)


@pytest.fixture
def bank(tiny_model):
    """Make a model that knows a task of two classes, `old`, and is about to learn another, `news`."""

    def make(adapter="news", *, old="old", layers=2, **options):
        base = tiny_model(num_hidden_layers=layers, **CALM)
        model = get_peft_model(base, config(num_labels=2), adapter_name=old)
        finish(model, old)
        model.add_adapter(adapter, config(**options))
        model.set_adapter(adapter)
        return model

    return make


@pytest.fixture
def learn(token_rows, arguments):
    """Train the adapter with a plain Trainer, hold the promise, and return the Trainer."""

    def run(model, adapter="news", *callbacks, trainer_class=Trainer, rows=None, rates=RATES, start=None, **changes):
        own = {name: changes.pop(name) for name in OWN if name in changes}
        trains = model.peft_config[adapter].trains
        known = [name for name in model.peft_config if model.base_model.phase(name) == "committed"]
        before = {name: seen(model, name) for name in known}
        model.set_adapter(adapter)
        moves = Moves(adapter)
        ours = OwnershipCallback(adapter, mask_share=SHARE[trains], learning_rates=rates, start=start, density_warmup=0)
        trainer = trainer_class(
            model=model,
            args=arguments(**({"max_steps": 6, "optim": "adamw_torch", "log_level": "error"} | changes)),
            train_dataset=rows or token_rows(0, 3),
            callbacks=[ours, moves, *callbacks],
            **own,
        )
        heads = set() if model.peft_config[adapter].head == "shared" else {"head"}
        trainer.train()
        steps = trainer.state.global_step
        claim = steps if trains == "nothing" else steps // 2
        assert moves.steps == [{"scores"} | heads] * claim + [{"values"} | heads] * (steps - claim)
        assert model.base_model.phase(adapter) == "committed"
        assert all(equal(seen(model, name), before[name]) for name in known)
        model.set_adapter(adapter)
        return trainer

    return run


OWN = ("optimizers", "data_collator", "compute_metrics", "eval_dataset", "compute_loss_func")


@pytest.fixture
def plain(bank, learn):
    """The same task without any option: the model, and each step's loss."""
    model = bank()
    return model, learn(model, trainer_class=Told).told


# --- what `learn` holds can be broken -----------------------------------------------------------------------------


def test_a_score_that_does_not_move_is_noticed(bank, learn):
    with pytest.raises(AssertionError):
        learn(bank(), rates=RATES | {"scores": 0.0})


def test_a_bit_of_an_earlier_task_that_moves_is_noticed(bank, learn):
    model = bank()
    before = seen(model, "old")

    def nudge(model, state, kwargs):
        store = model.base_model.mask_layers()[3].store
        store.values[store.owner == 0] += 1e-6

    with pytest.raises(OwnershipError, match="what earlier tasks own has moved"):
        learn(model, "news", Spy(on_step_begin=nudge))
    assert not equal(seen(model, "old"), before)


# --- gradient checkpointing ---------------------------------------------------------------------------------------


def forwards(model, counted):
    """Count calls of one masked layer."""
    layer = model.base_model.mask_layers()[0]
    layer.register_forward_pre_hook(lambda *_: counted.append(1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_learns_the_same_bits(bank, learn, plain, reentrant):
    model, counted = bank(), []
    forwards(model, counted)
    trainer = learn(
        model,
        trainer_class=Told,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert len(counted) >= 12, "each of six steps computes the layer twice"
    assert equal(state_of(model), state_of(plain[0]))
    assert equal(trainer.told, plain[1])


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    """Dynamo's counters, of this test alone."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.fixture
def not_compiled(bank, learn):
    model = bank(layers=1)
    return model, learn(model, trainer_class=Told).told


@pytest.fixture
def compiled(bank, learn, dynamo):
    """Train as `not_compiled` does, compiled; return the model and each step's loss."""

    def run(backend):
        model = bank(layers=1)
        trainer = learn(model, trainer_class=Told, torch_compile=True, torch_compile_backend=backend)
        assert isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
        # One graph a phase: masks and values change inside tensors that a graph reads, never a graph.
        assert dynamo["stats"]["unique_graphs"] == 2
        assert not dynamo["graph_break"]
        assert not dynamo["unimplemented"]
        return model, trainer.told

    return run


def nearly(found, plain):
    """Compare with what was learned uncompiled.

    A backend may fuse and reorder sums, so gradients differ in the last bits; scores whose gradient cancels to
    nearly nothing then take another AdamW step, and a mask entry at the threshold may go either way.
    """
    torch.testing.assert_close(torch.stack(found[1]), torch.stack(plain[1]), rtol=1e-3, atol=1e-4)
    same = total = 0
    for one, two in zip(found[0].base_model.mask_layers(), plain[0].base_model.mask_layers(), strict=True):
        both = one.mask("news") & two.mask("news")
        same, total = same + int(both.count_nonzero()), total + int(two.mask("news").count_nonzero())
        # One unit of bfloat16, to which committed values are rounded.
        torch.testing.assert_close(one.store.values[both], two.store.values[both], rtol=2**-7, atol=1e-3)
    assert same >= 0.98 * total


def test_compiled_by_dynamo_alone_learns_the_same_bits(compiled, not_compiled):
    model, told = compiled("eager")
    assert equal(told, not_compiled[1])
    assert equal(state_of(model), state_of(not_compiled[0]))


@pytest.mark.slow
def test_compiled_with_autograd_learns_the_same_mask_and_values(compiled, not_compiled):
    nearly(compiled("aot_eager"), not_compiled)


@pytest.mark.slow
def test_compiled_by_inductor_learns_the_same_mask_and_values(compiled, not_compiled):
    nearly(compiled("inductor"), not_compiled)


@pytest.mark.slow
def test_a_compiled_forward_sees_the_values_after_each_step(dynamo, bank, learn, token_rows, monkeypatch):
    four = token_rows(0, 2, 4)

    def losses(**changes):
        # Its head is frozen, so in the weight phase the values alone can move the loss of the same four rows.
        model = bank(layers=1, num_labels=2, head="shared")
        return learn(model, trainer_class=Told, rows=four, **changes).told[3:]

    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain, found = losses(), losses(**options)
    assert equal(found, plain)
    assert found[0] > found[1] + 1e-3 > found[2] + 2e-3
    monkeypatch.setattr(OwnershipCallback, "on_optimizer_step", lambda *_, **__: None)
    stale = losses(**options)
    # The mean over the four rows, in another order each step, is all that may differ.
    torch.testing.assert_close(torch.stack(stale), stale[0].expand(3), rtol=1e-6, atol=0.0)
    assert equal(losses(), plain), "a forward that is not compiled does"


@pytest.mark.slow
def test_a_second_task_is_compiled_too(dynamo, bank, learn, token_rows):
    model = bank(layers=1)
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    learn(model, **options)
    model.add_adapter("pets", config(num_labels=2))
    model.set_adapter("pets")
    trainer = learn(model, "pets", rows=token_rows(1, 2), **options)
    assert isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert dynamo["stats"]["unique_graphs"] == 4


@pytest.mark.slow
def test_a_stream_of_compiled_tasks_stays_compiled(dynamo, bank, learn):
    """Two graphs a task, and Dynamo gives a function eight before it gives up."""
    model = bank(layers=1)
    for adapter in ("news", "one", "two", "three", "four", "five"):
        if adapter != "news":
            model.add_adapter(adapter, config(density=0.05))
            model.set_adapter(adapter)
        trainer = learn(model, adapter, torch_compile=True, torch_compile_backend="eager", max_steps=2)
        assert isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
        assert not dynamo["unimplemented"]
    assert dynamo["stats"]["unique_graphs"] == 12


# --- precision ----------------------------------------------------------------------------------------------------


def dtypes(model, found):
    layer = model.base_model.mask_layers()[0]
    layer.register_forward_hook(lambda module, given, out: found.add(out.dtype) if module.training else None)


def test_autocast_trains_float32_values_under_a_bfloat16_forward(bank, learn, plain):
    model, found, kept = bank(values_dtype="float32"), set(), []
    dtypes(model, found)

    def keep(model, state, kwargs):
        kept.append({tensor.dtype for held in by_role(model, "news").values() for tensor in held})

    told = learn(model, "news", Spy(on_step_end=keep), trainer_class=Told, bf16=True).told
    assert found == {torch.bfloat16}
    assert kept == [{torch.float32}] * 6
    # Eight bits of mantissa: losses near 1 agree to a few hundredths, and not to the last bit.
    torch.testing.assert_close(torch.stack(told), torch.stack(plain[1]), rtol=0.05, atol=0.0)
    assert not equal(told, plain[1])


@pytest.mark.parametrize("first", [True, False])
def test_a_second_trainer_computes_in_its_own_precision(bank, learn, first):
    model, found = bank(), set()
    learn(model, bf16=first)
    model.add_adapter("pets", config())
    dtypes(model, found)
    learn(model, "pets", bf16=not first)
    assert found == {torch.float32 if first else torch.bfloat16}


def test_what_autocast_learned_is_what_is_saved(bank, learn, tiny_model, tmp_path):
    model = bank()
    learn(model, bf16=True)
    answers = {name: logits(model, name) for name in ("old", "news")}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(**CALM), tmp_path / "old", adapter_name="old")
    again.load_adapter(tmp_path / "news", adapter_name="news")
    assert all(torch.equal(logits(again, name), given) for name, given in answers.items())


def test_a_run_under_autocast_is_verified_to_the_last_logit(base_folder, tmp_path):
    learner = tiny.learner(base_folder, tiny.options("exssnet"), tmp_path / "t", training={"bf16": True})
    for name in ("pets", "weather"):
        learner.learn(tiny.task(name))
    verdict = verify(learner.save_pretrained(tmp_path / "run"), tiny.fresh(base_folder))
    assert [task["same_logits"] for task in verdict.tasks] == [True, True]


# --- accumulation, smoothing, clipping ----------------------------------------------------------------------------


class Norms(TrainerCallback):
    """Notes the norm of all gradients as the optimizer gets them."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        grads = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(grads))


def test_accumulating_two_batches_is_one_of_double_size_in_both_phases(bank, learn, token_rows):
    found = {}
    for batch, steps in ((8, 1), (4, 2), (4, 1)):
        norms = Norms()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
        # SGD: a step is as near as its gradient. AdamW would blow up the last bits of a gradient near zero.
        learn(bank(), "news", norms, rows=token_rows(0, 3, 8), max_steps=2, optim="sgd", rates=None, **options)
        found[batch, steps] = torch.stack(norms.norms)
    # Sums of the same eight rows in another order: float32 rounding and no more.
    torch.testing.assert_close(found[4, 2], found[8, 1], rtol=1e-4, atol=0.0)
    assert not torch.allclose(found[4, 1], found[8, 1], rtol=1e-2)


def smoothed(logits, labels, factor):
    logs = functional.log_softmax(logits, dim=-1)
    return (1 - factor) * functional.nll_loss(logs, labels) - factor * logs.mean()


def test_smoothing_goes_by_each_tasks_own_label_count(bank, learn, token_rows):
    model = bank()
    for adapter, labels in (("news", 3), ("pets", 2)):
        if adapter not in model.peft_config:
            model.add_adapter(adapter, config(num_labels=labels))
            model.set_adapter(adapter)
        rows = token_rows(0, labels, 4)
        batch = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            given = model(**batch).logits
        assert given.shape == (4, labels)
        told = learn(model, adapter, trainer_class=Told, rows=rows, label_smoothing_factor=0.1).told
        # The same four rows in another order: rounding of a mean.
        torch.testing.assert_close(told[0], smoothed(given, torch.tensor(rows["labels"]), 0.1), rtol=1e-5, atol=0.0)
        assert abs(told[0] - functional.cross_entropy(given, torch.tensor(rows["labels"]))) > 1e-4


def test_a_clip_of_zero_leaves_gradients_as_they_are(bank, learn):
    found = {}
    for clip in (0.0, 1e9, 0.1):
        norms = Norms()
        learn(bank(), "news", norms, max_grad_norm=clip)
        found[clip] = norms.norms
    assert equal(found[0.0], found[1e9])
    assert max(found[0.1]) < 0.1001 < min(found[0.0])


# --- optimizers ---------------------------------------------------------------------------------------------------

OPTIMS = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": torch.optim.AdamW,
    "adafactor": transformers.Adafactor,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}

EACH_OPTIM = list(OPTIMS)


def inner(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


@pytest.mark.parametrize("optim", EACH_OPTIM)
def test_each_optimizer_moves_what_is_on_and_nothing_else(bank, learn, optim):
    model = bank()
    optimizer = inner(learn(model, optim=optim, weight_decay=0.1))
    assert type(optimizer) is OPTIMS[optim]
    assert [group["role"] for group in optimizer.param_groups] == ["head", "head", "scores", "values"]


@pytest.mark.parametrize("optim", EACH_OPTIM)
def test_a_learner_takes_each_optimizer_too(learn_two, learned_plain, optim):
    found = learn_two({"optim": optim, "weight_decay": 0.1, "num_train_epochs": 1})
    assert all(one != two for one, two in zip(found, learned_plain, strict=True))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_users_optimizer_over_groups_of_its_own_is_taken_over(bank, learn, make):
    model = bank()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make([{"params": trainable[:5]}, {"params": trainable[5:], "weight_decay": 0.3}], lr=0.5)
    trainer = learn(model, optimizers=(optimizer, None), rates=RATES, weight_decay=0.1)
    assert inner(trainer) is optimizer
    groups = optimizer.param_groups
    assert [(group["role"], group["weight_decay"]) for group in groups] == [
        ("head", 0.1), ("head", 0.0), ("scores", 0.0), ("values", 0.1),
    ]  # fmt: skip
    assert [group["initial_lr"] for group in groups] == [RATES[group["role"]] for group in groups]


def test_a_users_optimizer_keeps_its_other_options(bank, learn):
    model = bank()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, betas=(0.5, 0.6))
    learn(model, optimizers=(optimizer, None))
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.6)}


def test_a_users_optimizer_over_some_of_it_is_refused_with_how_much_it_lacks(bank, learn):
    model = bank()
    optimizer = torch.optim.AdamW([*by_role(model, "news")["head"], torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ConfigError, match=r"optimizer: it holds 1 tensors that do not train and lacks 24 that do"):
        learn(model, optimizers=(optimizer, None))
    assert model.base_model.phase("news") == "mask"
    learn(model)


LAYERWISE = {
    "galore_adamw_layerwise": {"params": [], "optimizer_dict": {}},
    "galore_adamw": {"params": []},
    "lomo": {"model": None},
}


@pytest.mark.parametrize("optim", LAYERWISE)
def test_an_optimizer_with_groups_of_its_own_is_refused_by_a_learner_that_goes_on(
    base_folder, tmp_path, monkeypatch, optim
):
    # What transformers gives once the optional package is there; without it, it raises ImportError before us.
    given = staticmethod(lambda args, model=None: (torch.optim.AdamW, dict(LAYERWISE[optim])))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", given)
    learner = tiny.learner(base_folder, tiny.options("exssnet"), tmp_path, training={"optim": optim})
    with pytest.raises(ConfigError, match=f"optim: {optim} makes parameter groups of its own.*Use adamw_torch"):
        learner.learn(tiny.task("pets"))
    assert learner.tasks == []
    monkeypatch.undo()
    learner.args.optim = "adamw_torch"
    learner.learn(tiny.task("pets"))
    assert learner.tasks == ["pets"]


def test_an_optimizer_that_steps_inside_the_backward_is_refused_by_the_callback(bank, learn, monkeypatch):
    layerwise = transformers.trainer_pt_utils.LayerWiseDummyOptimizer
    given = staticmethod(lambda args, model=None: (layerwise, {"optimizer_dict": {}}))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", given)
    model = bank()
    with pytest.raises(ConfigError, match=r"optimizer: it holds 1 tensors that do not train and lacks 26 that do"):
        learn(model)
    assert model.base_model.phase("news") == "mask"


# --- reporting and the Hub ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("report_to", ["none", []])
def test_reporting_to_nobody_keeps_the_facts_in_the_log(bank, learn, report_to):
    trainer = learn(bank(), report_to=report_to)
    losses = [log for log in trainer.state.log_history if "loss" in log]
    facts = {"mask_density", "mask_overlap", "mask_trainable_share", "mask_capacity_left"}
    assert len(losses) == 6
    assert all(facts <= log.keys() for log in losses)
    assert 0 < losses[-1]["mask_overlap"] < 1, "some of its mask is the earlier task's"


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the Hub: what is uploaded, by commit."""
    pushed = []

    def upload(folder_path, **options):
        files = [str(file.relative_to(folder_path)) for file in sorted(Path(folder_path).rglob("*")) if file.is_file()]
        pushed.append([name for name in files if "checkpoint-" not in name])
        return SimpleNamespace(done=lambda: True, is_done=lambda: True)

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, *_, **__: setattr(self, "push_in_progress", None))
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload))
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    return pushed


HUB = {"push_to_hub": True, "hub_model_id": "x/y", "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushing_checkpoints_of_a_named_adapter_is_refused_with_the_way_out(bank, learn, hub, strategy):
    model, steps = bank(), []
    counting = Spy(on_step_begin=lambda *_: steps.append(1))
    message = f"hub_strategy: '{strategy}' would push no weights of adapter 'news'.*hub_strategy='end'"
    with pytest.raises(ConfigError, match=message):
        learn(model, "news", counting, hub_strategy=strategy, **HUB)
    assert (steps, hub, model.base_model.phase("news")) == ([], [], "mask")
    learn(model)


def test_pushing_at_the_end_pushes_the_weights_of_every_adapter(bank, learn, hub):
    trainer = learn(bank(), hub_strategy="end", **HUB)
    assert hub == []
    trainer.push_to_hub()
    assert {"news/adapter_model.safetensors", "old/adapter_model.safetensors"} <= set(hub[0])


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_pushing_checkpoints_of_the_adapter_called_default_pushes_its_weights(bank, learn, hub, strategy):
    learn(bank("default"), "default", hub_strategy=strategy, **HUB)
    assert hub
    assert all("adapter_model.safetensors" in files for files in hub)


def test_a_learner_refuses_to_push_before_any_work(base_folder, tmp_path, hub):
    place = tmp_path / "trainer"
    learner = tiny.learner(base_folder, tiny.options("exssnet"), place, training={"push_to_hub": True})
    with pytest.raises(ConfigError, match=r"push_to_hub: .*Save the whole with save_pretrained and push that"):
        learner.learn(tiny.task("pets"))
    assert not place.exists()
    with pytest.raises(HfClError, match="no task was begun"):
        learner.model  # noqa: B018
    learner.args.push_to_hub = False
    learner.learn(tiny.task("pets"))
    assert (learner.tasks, hub) == (["pets"], [])


# --- the user's own Trainer, collator and metrics -----------------------------------------------------------------

WEIGHTS = torch.tensor([5.0, 0.2, 1.0])


class Weighted(Told):
    """A user's Trainer with weights of the classes in its loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        labels = inputs["labels"]
        outputs = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
        loss = functional.cross_entropy(outputs.logits, labels, weight=WEIGHTS[: outputs.logits.shape[-1]])
        self.told = [*getattr(self, "told", []), loss.detach().clone()]
        return (loss, outputs) if return_outputs else loss


def test_a_users_loss_is_the_one_that_trains(bank, learn, token_rows, plain):
    model, four = bank(), token_rows(0, 3, 4)
    with torch.no_grad():
        given = model(input_ids=torch.tensor(four["input_ids"])).logits
    told = learn(model, trainer_class=Weighted, rows=four).told
    expected = functional.cross_entropy(given, torch.tensor(four["labels"]), weight=WEIGHTS)
    # The same four rows in another order: rounding of a mean.
    torch.testing.assert_close(told[0], expected, rtol=1e-5, atol=0.0)
    assert not equal(state_of(model), state_of(plain[0]))


def test_a_users_loss_function_is_the_one_that_trains(bank, learn, plain):
    def half(outputs, labels, num_items_in_batch=None):
        return functional.cross_entropy(outputs["logits"], labels) / 2

    told = learn(bank(), trainer_class=Told, compute_loss_func=half).told
    torch.testing.assert_close(told[0], plain[1][0] / 2, rtol=1e-6, atol=0.0)


def test_a_learner_trains_with_the_users_trainer_for_every_task(base_folder, tmp_path):
    found = {}
    for kind in (Trainer, Weighted):
        learner = tiny.learner(base_folder, tiny.options("exssnet"), tmp_path / kind.__name__, trainer_class=kind)
        for name in ("pets", "weather"):
            learner.learn(tiny.task(name))
        assert learner.method.parts(0) == learner.records[0]["parts"]
        found[kind] = [record["parts"]["values"] for record in learner.records]
    assert all(one != two for one, two in zip(*found.values(), strict=True))


class Cuts:
    """A user's collator: the tokenizer's, with every row cut to so many tokens."""

    def __init__(self, collate, tokens):
        self.collate, self.tokens, self.calls = collate, tokens, 0

    def __call__(self, rows):
        self.calls += 1
        names = ("input_ids", "attention_mask", "token_type_ids")
        cut = [{n: value[: self.tokens] if n in names else value for n, value in row.items()} for row in rows]
        return self.collate(cut)


def test_a_users_collator_makes_the_batches(bank, learn, plain):
    model, widths = bank(), set()
    layer = model.base_model.mask_layers()[0]
    layer.register_forward_hook(lambda module, given, out: widths.add(given[0].shape[1]) if module.training else None)
    cuts = Cuts(default_data_collator, 4)
    learn(model, data_collator=cuts)
    assert widths == {4}
    assert cuts.calls >= 6
    assert not equal(state_of(model), state_of(plain[0]))


def test_a_learners_collator_makes_the_batches_of_training_and_evaluation(base_folder, tmp_path):
    cuts = Cuts(DataCollatorWithPadding(tiny.tokenizer()), 3)
    learner = tiny.learner(base_folder, tiny.options("exssnet"), tmp_path, data_collator=cuts)
    first = learner.learn(tiny.task("pets"))
    assert cuts.calls >= first["steps"] + 2
    calls = cuts.calls
    assert learner.evaluate() == first["metrics"]
    assert cuts.calls > calls
    learner.learn(tiny.task("weather"))
    assert learner.method.parts(0) == first["parts"]


def test_a_users_metrics_stand_in_the_log_of_both_phases(bank, learn, token_rows):
    def share_of_first(prediction):
        return {"first": float(np.mean(prediction.predictions.argmax(-1) == 0))}

    options = {"eval_strategy": "steps", "eval_steps": 2, "compute_metrics": share_of_first}
    trainer = learn(bank(), eval_dataset=token_rows(1000, 3, 8), **options)
    found = [(log["step"], log["eval_first"]) for log in trainer.state.log_history if "eval_first" in log]
    assert [step for step, _ in found] == [2, 4, 6]
    assert all(0 <= value <= 1 for _, value in found)
    # After the commit, values rounded: what a fresh evaluation gives.
    assert {"eval_first", "eval_loss"} <= trainer.evaluate().keys()


# --- kinds of loss ------------------------------------------------------------------------------------------------


@pytest.fixture
def typed_rows(token_rows):
    """Make rows whose labels fit a kind of loss."""

    def make(problem, seed=0, count=16):
        rows = token_rows(seed, 3, count)
        classes = torch.tensor(rows["labels"])
        labels = {
            "single_label_classification": classes,
            "multi_label_classification": torch.stack([classes == 0, classes != 1, classes == 2], dim=1).float(),
            "regression": classes / 2.0 - 0.3,
        }[problem]
        return Dataset.from_dict(
            {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "labels": labels.tolist()}
        )

    return make


def by_hand(problem, given, labels):
    if problem == "regression":
        return ((given.squeeze(1) - labels) ** 2).mean()
    if problem == "multi_label_classification":
        share = torch.sigmoid(given)
        return -(labels * share.log() + (1 - labels) * (1 - share).log()).mean()
    return -torch.log_softmax(given, dim=1)[range(len(labels)), labels].mean()


KINDS = {
    "multi_label_classification": {"problem_type": "multi_label_classification", "num_labels": 3},
    "regression": {"problem_type": "regression", "num_labels": 1},
    "single_label_classification": {"num_labels": 3},
}


def test_tasks_of_every_kind_of_loss_stand_beside_one_another(bank, learn, typed_rows):
    model = bank("multi_label_classification", **KINDS["multi_label_classification"])
    for adapter, options in KINDS.items():
        if adapter not in model.peft_config:
            model.add_adapter(adapter, config(**options))
            model.set_adapter(adapter)
        four = typed_rows(adapter, count=4)
        assert model.config.problem_type == adapter
        with torch.no_grad():
            given = model(input_ids=torch.tensor(four["input_ids"])).logits
        told = learn(model, adapter, trainer_class=Told, rows=four).told
        # The same four rows in another order, and logarithms taken in another way: float32 rounding.
        torch.testing.assert_close(told[0], by_hand(adapter, given, torch.tensor(four["labels"])), rtol=1e-5, atol=1e-7)
        assert told[-1] < told[0]
    for adapter in (*KINDS, *reversed(KINDS)):
        model.set_adapter(adapter)
        assert model.config.problem_type == adapter
        assert model.config.num_labels == KINDS[adapter]["num_labels"] == logits(model).shape[1]
    model.set_adapter("old")
    assert model.config.problem_type == "single_label_classification"


def test_a_loss_follows_the_task_that_is_active(bank, learn, typed_rows):
    model = bank("regression", **KINDS["regression"])
    learn(model, "regression", rows=typed_rows("regression"))
    model.add_adapter("multi", config(**KINDS["multi_label_classification"]))
    learn(model, "multi", rows=typed_rows("multi_label_classification"))
    model.eval()
    for adapter, kind in (("regression", "regression"), ("multi", "multi_label_classification")) * 2:
        rows = typed_rows(kind, count=8)
        model.set_adapter(adapter)
        inputs = {"input_ids": torch.tensor(rows["input_ids"]), "labels": torch.tensor(rows["labels"])}
        with torch.no_grad():
            out = model(**inputs)
        torch.testing.assert_close(out.loss, by_hand(kind, out.logits, inputs["labels"]), rtol=1e-5, atol=1e-7)


def test_what_kind_of_loss_is_told_by_the_labels_where_nothing_is_said():
    assert config(num_labels=1).problem == "regression"
    assert config(num_labels=2).problem == config(num_labels=7).problem == "single_label_classification"
    assert config(num_labels=1, problem_type="multi_label_classification").problem == "multi_label_classification"


def test_a_task_of_one_label_is_a_regression(bank, learn, typed_rows):
    model = bank(num_labels=1)
    assert model.config.problem_type == "regression"
    four = typed_rows("regression", count=4)
    with torch.no_grad():
        given = model(input_ids=torch.tensor(four["input_ids"])).logits
    told = learn(model, trainer_class=Told, rows=four).told
    expected = by_hand("regression", given, torch.tensor(four["labels"]))
    torch.testing.assert_close(told[0], expected, rtol=1e-5, atol=0.0)


def test_a_kind_of_loss_is_saved_with_its_task(bank, learn, typed_rows, tiny_model, tmp_path):
    model = bank("score", **KINDS["regression"])
    learn(model, "score", rows=typed_rows("regression"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(**CALM), tmp_path / "score", adapter_name="score")
    assert (again.config.problem_type, again.config.num_labels) == ("regression", 1)
    assert torch.equal(logits(again), logits(model, "score"))
    again.load_adapter(tmp_path / "old", adapter_name="old")
    again.set_adapter("old")
    assert (again.config.problem_type, again.config.num_labels) == ("single_label_classification", 2)


def test_an_unknown_kind_of_loss_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="problem_type: 'multilabel' is not one of single_label_classification, mu"):
        config(problem_type="multilabel")


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_kkt_is_refused_where_neighbours_have_no_one_class(bank, learn, typed_rows, kind):
    model, steps = bank(**KINDS[kind]), []
    start = kkt_start.KKT(k=3, sample=8, margin=5.0, means={})
    counting = Spy(on_step_begin=lambda *_: steps.append(1))
    with pytest.raises(ConfigError, match=rf"start: KKT .*'news' is a {kind} task. Start it fresh"):
        learn(model, "news", counting, rows=typed_rows(kind), start=start)
    assert not steps
    assert not start.means
    learn(model, rows=typed_rows(kind))


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_a_learner_of_classes_refuses_another_kind_of_loss_before_any_work(base_folder, tmp_path, kind):
    with pytest.raises(ConfigError, match="problem_type"):
        tiny.learner(base_folder, MaskConfig(density=0.3, problem_type=kind), tmp_path).learn(tiny.task("pets"))


# --- one head for all ---------------------------------------------------------------------------------------------


@pytest.fixture
def shared(bank):
    """Make a model that knows `old` and is about to learn `news` under the same head."""
    return lambda **options: bank(**({"num_labels": 2, "head": "shared"} | options))


def heads(model, adapter):
    return list(model.base_model.own_tensors(adapter).values())


def test_a_shared_head_is_the_first_tasks_bit_for_bit_and_stays_so(shared, learn, token_rows):
    model, held = shared(), []
    first = [tensor.clone() for tensor in heads(model, "old")]
    assert len(first) == 2
    assert equal(heads(model, "news"), first)
    assert not any(parameter.requires_grad for parameter in by_role(model, "news")["head"])

    def holds(model, state, kwargs):
        held.extend(parameter for group in kwargs["optimizer"].param_groups for parameter in group["params"])

    learn(model, "news", Spy(on_train_begin=holds), rows=token_rows(0, 2), weight_decay=0.1)
    assert len(held) == 24
    assert not {id(parameter) for parameter in by_role(model, "news")["head"]} & {id(one) for one in held}
    assert equal(heads(model, "news"), first)
    assert equal(heads(model, "old"), first)


def test_a_head_of_its_own_is_another_and_trains(bank):
    model = bank(num_labels=2)
    assert not equal(heads(model, "news"), heads(model, "old"))
    assert all(parameter.requires_grad for parameter in by_role(model, "news")["head"])


def test_a_shared_head_stays_frozen_whatever_is_set_active(shared):
    model = shared()
    for act in ("old", "news", "disable", "news", "delete"):
        if act == "disable":
            with model.disable_adapter():
                assert not any(parameter.requires_grad for parameter in by_role(model, "news")["head"])
        elif act == "delete":
            model.add_adapter("pets", config(num_labels=2, head="shared"))
            model.delete_adapter("pets")
        else:
            model.set_adapter(act)
        assert not any(parameter.requires_grad for parameter in by_role(model, "news")["head"])
    assert all(parameter.requires_grad for parameter in by_role(model, "news")["scores"])
    for head in model.base_model.own_layers():
        head.set_requires_grad("news")
    assert not any(parameter.requires_grad for parameter in by_role(model, "news")["head"])


def test_a_task_with_a_shared_head_loads_alone_with_equal_logits(shared, learn, token_rows, tiny_model, tmp_path):
    model = shared()
    learn(model, rows=token_rows(0, 2))
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(tiny_model(**CALM), tmp_path / "news", adapter_name="news")
    assert torch.equal(logits(alone), logits(model, "news"))
    alone.set_adapter("news")
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    alone.load_adapter(tmp_path / "old", adapter_name="old")
    assert torch.equal(logits(alone, "old"), logits(model, "old"))


def test_an_unfinished_task_with_a_shared_head_loads_with_it_frozen(shared, learn, token_rows, tiny_model, tmp_path):
    model = shared()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(**CALM), tmp_path / "old", adapter_name="old")
    again.load_adapter(tmp_path / "news", adapter_name="news", is_trainable=True)
    again.set_adapter("news")
    assert not any(parameter.requires_grad for parameter in by_role(again, "news")["head"])
    learn(again, rows=token_rows(0, 2))
    learn(model, rows=token_rows(0, 2))
    assert equal(state_of(again), state_of(model))


@pytest.mark.parametrize(
    "options",
    [
        {"num_labels": 3},
        {"id2label": {0: "LABEL_1", 1: "LABEL_0"}},
        {"problem_type": "multi_label_classification"},
    ],
)
def test_a_shared_head_for_other_labels_or_another_loss_is_refused(bank, learn, options):
    model = bank()
    before = seen(model, "old")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match=r"head: shared, but task 0 has the labels LABEL_0, LABEL_1 .*of its own"):
        model.add_adapter("pets", config(**({"num_labels": 2, "head": "shared"} | options)))
    assert list(model.peft_config) == ["old", "news"]
    assert [name for name, _ in model.named_parameters()] == names
    assert equal(seen(model, "old"), before)
    learn(model)


def test_a_head_that_still_trains_is_not_shared(tiny_model, learn, token_rows):
    model = get_peft_model(tiny_model(**CALM), config(num_labels=2), adapter_name="news")
    with pytest.raises(ConfigError, match=r"head: shared, but the head of task 0 still trains.*Finish that task first"):
        model.add_adapter("pets", config(num_labels=2, head="shared"))
    learn(model, rows=token_rows(0, 2))
    model.add_adapter("pets", config(num_labels=2, head="shared"))
    assert equal(heads(model, "pets"), heads(model, "news"))


def test_the_first_task_of_a_shared_head_trains_it(tiny_model, token_rows, arguments):
    model = get_peft_model(tiny_model(**CALM), config(num_labels=2, head="shared"), adapter_name="news")
    assert all(parameter.requires_grad for parameter in by_role(model, "news")["head"])
    before = [tensor.clone() for tensor in heads(model, "news")]
    callback = OwnershipCallback("news", mask_share=0.5)
    Trainer(model, arguments(max_steps=2), train_dataset=token_rows(0, 2), callbacks=[callback]).train()
    assert not equal(heads(model, "news"), before)


def test_deleting_the_first_task_leaves_its_head_to_the_others(shared, learn, token_rows):
    model = shared()
    learn(model, rows=token_rows(0, 2))
    head, given = heads(model, "news"), logits(model, "news")
    model.delete_adapter("old")
    assert torch.equal(logits(model, "news"), given)
    model.add_adapter("pets", config(num_labels=2, head="shared"))
    assert equal(heads(model, "pets"), head)


def test_kkt_leaves_a_shared_head_the_first_tasks(bank, learn, token_rows, monkeypatch):
    model = bank(num_labels=2)
    learn(model, rows=token_rows(0, 2))
    assert not equal(heads(model, "news"), heads(model, "old"))
    model.add_adapter("pets", config(num_labels=2, head="shared"))
    monkeypatch.setattr(kkt_start, "choose", lambda *_, **__: Choice(1, {1: 1.0}, 0.5, 0.5))
    masks, start = [], kkt_start.KKT(k=3, sample=8, margin=0.1, means={})

    def begun(model, state, kwargs):
        masks.extend(layer.mask("pets") for layer in model.base_model.mask_layers())

    learn(model, "pets", Spy(on_train_begin=begun), rows=token_rows(0, 2), start=start)
    assert equal(masks, [layer.mask("news") for layer in model.base_model.mask_layers()])
    assert equal(heads(model, "pets"), heads(model, "old"))


@pytest.mark.parametrize("method", ["exssnet", "ssnet", "supsup"])
def test_a_learner_shares_its_first_head(base_folder, tmp_path, method):
    labels = ("tame", "wild")
    learner = tiny.learner(base_folder, tiny.options(method, head="shared"), tmp_path / "t")
    learner.learn(tiny.task("pets"))
    first = learner.method.parts(0)["head"]
    learner.learn(tiny.task("weather", labels=labels))
    assert learner.method.parts(1)["head"] == learner.method.parts(0)["head"] == first
    assert learner.method.parts(1)["masks"] != learner.method.parts(0)["masks"]
    run = learner.save_pretrained(tmp_path / "run")
    _, _, opened = open_run(run, tiny.fresh(base_folder))
    for index, name in enumerate(learner.tasks):
        learner.activate(name)
        opened.activate(index)
        assert torch.equal(tiny.logits(opened.model), tiny.logits(learner.model))


def test_a_learner_refuses_other_labels_under_a_shared_head_and_goes_on(base_folder, tmp_path):
    learner = tiny.learner(base_folder, tiny.options("exssnet", head="shared"), tmp_path)
    learner.learn(tiny.task("pets"))
    parts, given = learner.method.parts(0), tiny.logits(learner.model)
    with pytest.raises(ConfigError, match=r"head: shared, but task 0 has the labels tame, wild and this one mild, odd"):
        learner.learn(tiny.task("weather"))
    assert learner.tasks == ["pets"]
    assert learner.method.parts(0) == parts
    learner.activate("pets")
    assert torch.equal(tiny.logits(learner.model), given)
    learner.learn(tiny.task("weather", labels=("tame", "wild")))
    assert learner.tasks == ["pets", "weather"]
    assert learner.method.parts(0) == parts


# --- the best state -----------------------------------------------------------------------------------------------

BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "load_best_model_at_end": True, "metric_for_best_model": "worth", "greater_is_better": True,
}  # fmt: skip


def scripted(values):
    """Metrics that come as written: what is best is then known."""
    left = iter(values)
    return lambda prediction: {"worth": next(left)}


@pytest.fixture
def learn_best(learn, token_rows):
    """Learn with metrics as written; return values and head as they stood at each evaluation."""

    def run(model, adapter, values, *, rows=None, **changes):
        kept = {}

        def keep(model, state, kwargs):
            moving = by_role(model, adapter)
            kept[state.global_step] = [t.detach().clone() for t in [*moving["values"], *moving["head"]]]

        options = {"compute_metrics": scripted(values), "eval_dataset": rows or token_rows(1000, 3, 8)} | BEST
        learn(model, adapter, Spy(on_evaluate=keep), rows=rows, **(options | changes))
        return kept

    return run


def committed(model, adapter):
    """The values a task brought, and its head."""
    return [layer.hfcl_owned[adapter] for layer in model.base_model.mask_layers()], by_role(model, adapter)["head"]


def is_rounded(model, adapter, kept):
    """Whether the task is the state kept in its weight phase, its values rounded."""
    values, head = committed(model, adapter)
    rounded = [held[: own.numel()].to(torch.bfloat16).float() for held, own in zip(kept, values, strict=False)]
    return equal(values, rounded) and equal(head, kept[len(values) :])


NAMES = [("news", "old"), ("default", "old"), ("query", "0"), ("news", "default")]


@pytest.mark.parametrize(("adapter", "old"), NAMES)
@pytest.mark.parametrize("best", [4, 6])
def test_the_best_state_of_the_weight_phase_is_kept_under_any_name(bank, learn_best, adapter, old, best):
    # The mask phase scores higher: its states have no values, so they are not what is best. At step 3 it is over.
    worth = [0.9, 0.95, 0.1, *(0.8 if step == best else 0.1 for step in (4, 5, 6))]
    model = bank(adapter, old=old)
    kept = learn_best(model, adapter, worth)
    assert is_rounded(model, adapter, kept[best])
    assert not any(is_rounded(model, adapter, kept[other]) for other in {4, 5, 6} - {best})


@pytest.mark.parametrize(("adapter", "old"), NAMES)
def test_the_best_state_of_a_mask_alone_is_kept_under_any_name(bank, learn, token_rows, adapter, old):
    model, kept = bank(adapter, old=old, trains="nothing"), {}

    def keep(model, state, kwargs):
        moving = by_role(model, adapter)
        kept[state.global_step] = [t.detach().clone() for t in [*moving["scores"], *moving["head"]]]

    own = {"compute_metrics": scripted([0.1, 0.7, 0.3, 0.2, 0.5, 0.6]), "eval_dataset": token_rows(1000, 3, 8)}
    learn(model, adapter, Spy(on_evaluate=keep), **own, **BEST)
    layers = model.base_model.mask_layers()
    wanted, last = ([topk_mask(held, layer.count(adapter)) for held, layer in zip(kept[step], layers, strict=False)]
                    for step in (2, 6))  # fmt: skip
    found = [layer.mask(adapter) for layer in layers]
    assert equal(found, wanted)
    assert not equal(found, last)
    assert equal(heads(model, adapter), kept[2][len(layers) :])


def test_the_trainers_own_best_never_brings_the_weights_of_default(bank, learn_best, token_rows):
    """`default` is committed, and has the shape of the task that trains: nothing but care tells them apart."""
    model = bank(num_labels=2, old="default")
    before = seen(model, "default")
    kept = learn_best(model, "news", [0.1, 0.1, 0.1, 0.8, 0.1, 0.1], rows=token_rows(0, 2))
    assert is_rounded(model, "news", kept[4])
    assert equal(seen(model, "default"), before)
    assert not equal(heads(model, "news"), heads(model, "default"))


def test_an_unfinished_default_does_not_take_the_place_of_the_task_that_trains(bank, learn_best):
    model = bank()
    model.add_adapter("default", config())
    model.set_adapter("news")
    kept = learn_best(model, "news", [0.1, 0.1, 0.1, 0.8, 0.1, 0.1])
    assert is_rounded(model, "news", kept[4])


# --- training again -----------------------------------------------------------------------------------------------


def test_a_finished_trainer_does_not_train_its_task_again(bank, learn):
    model = bank()
    trainer = learn(model)
    before = {name: seen(model, name) for name in ("old", "news")}
    model.set_adapter("news")
    with pytest.raises(ConfigError, match=r"'news' is committed and never changes again\. Add a new adapter"):
        trainer.train()
    assert all(equal(seen(model, name), given) for name, given in before.items())


@pytest.fixture
def again(bank, learn):
    """A Trainer that has finished `news` and is to go on with `pets`."""

    def make(*, given):
        model, options = bank(), {}
        if given:
            groups = parameter_groups(model.named_parameters(), RATES, 0.0)
            options = {"optimizers": (torch.optim.AdamW(groups), None)}
        trainer = learn(model, **options)
        model.add_adapter("pets", config())
        model.set_adapter("pets")
        for callback in list(trainer.callback_handler.callbacks):
            if isinstance(callback, OwnershipCallback | Moves):
                trainer.remove_callback(callback)
        trainer.add_callback(OwnershipCallback("pets", mask_share=0.5, learning_rates=RATES))
        before = {name: seen(model, name) for name in ("old", "news")}
        model.set_adapter("pets")
        return model, trainer, before

    return make


@pytest.mark.parametrize("given", [True, False])
def test_a_finished_trainer_refuses_the_next_task_for_its_optimizer(again, learn, given):
    model, trainer, before = again(given=given)
    with pytest.raises(ConfigError, match=r"optimizer: it (holds 26 tensors that do not|has stepped before)"):
        trainer.train()
    assert model.base_model.phase("pets") == "mask"
    assert all(equal(seen(model, name), given) for name, given in before.items())
    learn(model, "pets")


def test_a_finished_trainer_that_refuses_names_the_way_out(again):
    _, trainer, _ = again(given=False)
    with pytest.raises(ConfigError, match="new Trainer"):
        trainer.train()


def test_a_finished_trainer_without_its_optimizer_learns_the_next_task(again):
    model, trainer, before = again(given=False)
    trainer.optimizer = trainer.lr_scheduler = None
    moves = Moves("pets")
    trainer.add_callback(moves)
    trainer.train()
    assert moves.steps == [{"scores", "head"}] * 3 + [{"values", "head"}] * 3
    assert model.base_model.phase("pets") == "committed"
    assert all(equal(seen(model, name), given) for name, given in before.items())


def test_the_callback_of_a_finished_task_says_so_in_another_tasks_training(bank, learn):
    model = bank()
    trainer = learn(model)
    model.add_adapter("pets", config())
    model.set_adapter("pets")
    trainer.add_callback(OwnershipCallback("pets", mask_share=0.5))
    with pytest.raises(ConfigError, match=r"'news' is committed and never changes again"):
        trainer.train()
    assert model.base_model.phase("pets") == "mask"


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adapter", "step"), [("query", 2), ("query", 4), ("0", 4), ("default", 2)])
def test_a_resumed_training_under_any_name_learns_the_same_bits(bank, token_rows, arguments, adapter, step):
    def run(folder, **options):
        model = bank(adapter, old="dense")
        before = seen(model, "dense")
        model.set_adapter(adapter)
        args = arguments(max_steps=6, save_strategy="steps", save_steps=1, weight_decay=0.1)
        args.output_dir = folder or args.output_dir
        # Groups as ours from the start, as a learner makes them: a checkpoint's optimizer is loaded first.
        optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), RATES, 0.1))
        callback = OwnershipCallback(adapter, mask_share=0.5, learning_rates=RATES)
        trainer = Trainer(
            model, args, train_dataset=token_rows(0, 3), callbacks=[callback], optimizers=(optimizer, None)
        )
        trainer.train(**options)
        assert equal(seen(model, "dense"), before)
        return args.output_dir, seen(model, adapter), trainer.state.global_step

    folder, straight, _ = run(None)
    _, resumed, steps = run(folder, resume_from_checkpoint=f"{folder}/checkpoint-{step}")
    assert steps == 6
    assert equal(resumed, straight)


# --- a learner with the same options ------------------------------------------------------------------------------

OPTIONS = {
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
    "smoothing": {"label_smoothing_factor": 0.1},
    "autocast": {"bf16": True},
    "best": {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}
SAME = ("checkpointing", "compiled")
"""These change how it is computed and nothing else."""


@pytest.fixture(scope="module")
def learn_two(base_folder, tmp_path_factory):
    """Learn two tasks with a learner, hold its promise, and return both tasks' digests."""

    def run(changes):
        folder = tmp_path_factory.mktemp("learner")
        learner = tiny.learner(base_folder, tiny.options("exssnet"), folder, training=changes)
        learner.learn(tiny.task("pets"))
        first, probe = learner.method.parts(0), learner.records[0]["probe"]
        learner.learn(tiny.task("weather"))
        learner.activate("pets")
        assert (learner.method.parts(0), probe_digest(learner.model)) == (first, probe)
        second = learner.records[1]["parts"]
        assert all(second[part] != first[part] for part in ("masks", "values", "head"))
        assert learner.records[1]["facts"]["trainable"] > 0
        return first, second

    return run


@pytest.fixture(scope="module")
def learned_plain(learn_two):
    return learn_two({})


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "compiled" else ()) for kind in OPTIONS]
)
def test_a_learner_keeps_its_promise_under_each_option(learn_two, learned_plain, dynamo, kind):
    assert (learn_two(OPTIONS[kind]) == learned_plain) == (kind in SAME)
