"""The ownership callback under the user's own plain Trainer: phases, groups, schedules, claim, commit, refusals."""

import itertools
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_cl import MaskConfig, OwnershipCallback
from hf_cl.errors import ConfigError, OwnershipError, TrainingError
from hf_cl.masks.select import topk_mask
from hf_cl.training.groups import parameter_groups, role_of
from hf_cl.training.kkt_start import KKT

ROLES = ("scores", "values", "head")


def trained_count(tuner, adapter):
    return sum(layer.hfcl_owned[adapter].numel() for layer in tuner.mask_layers())


class Spy(TrainerCallback):
    """Calls `on_<event>(tuner, state, kwargs)` functions given by name."""

    def __init__(self, **acts):
        for event, act in acts.items():
            setattr(self, event, self._call(act))

    def _call(self, act):
        return lambda args, state, control, **kwargs: act(kwargs["model"].base_model, state, kwargs)


class StopAt(TrainerCallback):
    """Asks for the end of training after one optimizer step, as early stopping does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def config(**options):
    return MaskConfig(**({"task_type": "SEQ_CLS", "density": 0.2, "num_labels": 3, "trains": "claimed"} | options))


@pytest.fixture
def model(tiny_model):
    """A model whose only adapter, `news`, is to train a mask and then values."""
    return get_peft_model(tiny_model(), config(), adapter_name="news")


@pytest.fixture
def mask_model(tiny_model):
    """A model whose only adapter, `news`, is to train a mask alone."""
    return get_peft_model(tiny_model(), config(trains="nothing"), adapter_name="news")


@pytest.fixture
def train(token_rows, arguments):
    """Train an adapter; spies named `first` see each event before the ownership callback, the others after it."""

    def run(
        model, adapter="news", *spies, first=(), share=None, rates=None, start=None, rows=None, warmup=0.25, **changes
    ):
        trainer_options = {name: changes.pop(name) for name in ("optimizers", "compute_metrics") if name in changes}
        trains = model.peft_config[adapter].trains if adapter in getattr(model, "peft_config", {}) else "claimed"
        share = share or (1.0 if trains == "nothing" else 0.5)
        callback = OwnershipCallback(
            adapter, mask_share=share, density_warmup=warmup, learning_rates=rates, start=start
        )
        trainer = Trainer(
            model=model,
            args=arguments(**({"max_steps": 6, "optim": "adamw_torch"} | changes)),
            train_dataset=rows or token_rows(0, 3),
            eval_dataset=token_rows(1000, 3, 8),
            callbacks=[*first, callback, *spies],
            **trainer_options,
        )
        trainer.train()
        return trainer, callback

    return run


def by_role(model, adapter="news"):
    found = {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name:
            found[role_of(name)].append(parameter)
    return found


def state_of(model, adapter="news"):
    """All that a committed task is, as tensors."""
    return [tensor.clone() for _, tensor in model.base_model.task_tensors(adapter)]


def equal(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- phases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "claim"), [(0.5, 3), (0.67, 4), (0.01, 1), (0.99, 5)])
def test_the_claim_comes_at_its_share_of_the_steps(model, train, share, claim):
    phases = []
    train(model, "news", Spy(on_step_begin=lambda tuner, *_: phases.append(tuner.phase("news"))), share=share)
    assert phases == ["mask"] * claim + ["weight"] * (6 - claim)
    assert model.base_model.phase("news") == "committed"


def test_a_mask_alone_trains_its_scores_to_the_last_step(mask_model, train):
    phases = []
    train(mask_model, "news", Spy(on_step_begin=lambda tuner, *_: phases.append(tuner.phase("news"))))
    assert phases == ["mask"] * 6
    assert mask_model.base_model.phase("news") == "committed"


@pytest.mark.parametrize("rank", ["signed", "magnitude"])
def test_counts_keep_within_five_percent_of_budget_and_the_commit_is_exact(tiny_model, train, rank):
    model = get_peft_model(tiny_model(), config(rank=rank), adapter_name="news")
    far, masks = [], []

    def watch(tuner, state, kwargs):
        for layer in tuner.mask_layers():
            count, budget = int(layer.mask("news").count_nonzero()), layer.count("news")
            grown = min(1.0, state.global_step / (0.25 * 13))  # 13 of 16 steps train the mask
            far.append(abs(count - max(1, round(grown * budget))) / budget)
            assert tuner.phase("news") == "mask" or count == budget
        masks.append(tuner.mask_layers()[0].mask("news").clone())

    spy = Spy(on_train_begin=watch, on_step_end=watch)
    train(model, "news", spy, max_steps=16, share=0.8, rates={"scores": 0.05})
    assert len(masks) == 17
    assert max(far) <= 0.05
    assert any(not torch.equal(before, after) for before, after in itertools.pairwise(masks))
    for layer in model.base_model.mask_layers():
        assert int(layer.mask("news").count_nonzero()) == layer.count("news")
        assert torch.equal(layer.mask("news"), layer.store.owner == 0)


@pytest.mark.parametrize(
    ("warmup", "grown"), [(0, [1, 1, 1, 1, 1]), (0.5, [0, 0.5, 1, 1, 1]), (1, [0, 0.25, 0.5, 0.75, 1])]
)
def test_a_fresh_mask_grows_to_its_density_over_the_warmup(tiny_model, train, warmup, grown):
    model = get_peft_model(tiny_model(), config(trains="nothing", density=0.5), adapter_name="news")
    seen = []

    def watch(tuner, state, kwargs):
        layer = tuner.mask_layers()[0]
        seen.append(int(layer.mask("news").count_nonzero()) / layer.count("news"))

    spy = Spy(on_train_begin=watch, on_step_end=watch)
    train(model, "news", spy, max_steps=4, share=1.0, warmup=warmup)
    assert seen == pytest.approx(grown, abs=0.05)  # a kept threshold may be 5 % off; no growth begins with one entry


def test_a_warmup_outside_of_the_phase_is_refused():
    with pytest.raises(ConfigError, match="density_warmup"):
        OwnershipCallback("news", density_warmup=1.5)


def test_the_phase_that_is_off_has_no_gradient_when_the_optimizer_steps(model, train):
    seen = []

    def watch(tuner, state, kwargs):
        found = {role: [p.grad is not None for p in found] for role, found in by_role(kwargs["model"]).items()}
        assert all(len(set(grads)) == 1 for grads in found.values())
        seen.append({role for role, grads in found.items() if grads[0]})

    # Once before the callback, as autograd left them, and once after it.
    train(model, "news", Spy(on_pre_optimizer_step=watch), first=[Spy(on_pre_optimizer_step=watch)])
    assert seen == [{"scores", "head"}] * 6 + [{"values", "head"}] * 6


def test_a_gradient_that_ddp_filled_in_for_the_off_phase_is_dropped(model, train):
    def fill(tuner, state, kwargs):
        for parameter in by_role(kwargs["model"])["values" if state.global_step < 3 else "scores"]:
            parameter.grad = torch.zeros_like(parameter)

    def watch(tuner, state, kwargs):
        off = by_role(kwargs["model"])["values" if state.global_step < 3 else "scores"]
        assert all(parameter.grad is None for parameter in off)

    train(model, "news", Spy(on_pre_optimizer_step=watch), first=[Spy(on_pre_optimizer_step=fill)])


def test_clipping_sees_the_active_phase_and_the_head_alone(model, train):
    norms = []

    def watch(tuner, state, kwargs):
        on = by_role(kwargs["model"])
        on = [*on["scores" if state.global_step < 3 else "values"], *on["head"]]
        norms.append(torch.stack([parameter.grad.norm() for parameter in on]).norm())

    train(model, "news", first=[Spy(on_pre_optimizer_step=watch)], max_grad_norm=0.1)
    # The clip divides by norm + 1e-6.
    torch.testing.assert_close(torch.stack(norms), torch.full((6,), 0.1), rtol=1e-4, atol=0)


# --- what the optimizer holds and does ----------------------------------------------------------------------------


def test_the_optimizer_holds_this_tasks_scores_vector_and_head_alone(model, train, token_rows):
    train(model)
    model.add_adapter("pets", config(num_labels=2, density=0.1))
    model.set_adapter("pets")
    sizes, held = {}, {}

    def watch(tuner, state, kwargs):
        for group in kwargs["optimizer"].param_groups:
            sizes[group["role"]] = sizes.get(group["role"], 0) + sum(parameter.numel() for parameter in group["params"])
            held.update({id(parameter): group["role"] for parameter in group["params"]})
        names = {name: held.get(id(parameter)) for name, parameter in kwargs["model"].named_parameters()}
        assert all((role is None) == (".pets" not in name) for name, role in names.items())
        assert all(role in (None, role_of(name)) for name, role in names.items())

    trainer, _ = train(model, "pets", Spy(on_train_begin=watch), rows=token_rows(1, 2))
    kept = 8 * 26 + 4 * 51
    assert sizes == {"scores": 4096, "values": kept, "head": 2 * 17}
    moments = sum(state["exp_avg"].numel() for state in trainer.optimizer.state.values())
    assert moments == kept + 2 * 17  # those of the scores are gone since the claim


def test_cells_of_the_vector_beyond_what_the_task_owns_never_move(model, train):
    train(model)
    model.add_adapter("pets", config())
    model.set_adapter("pets")
    unused = []

    def watch(tuner, state, kwargs):
        if tuner.phase("pets") == "weight":
            for layer in tuner.mask_layers():
                where = layer.trainable("pets", layer.mask("pets"))
                unused.append(layer.hfcl_values["pets"][where.shape[0] :])

    train(model, "pets", Spy(on_step_end=watch), weight_decay=0.1)
    assert sum(cells.numel() for cells in unused) > 0
    assert not torch.cat(unused).any()


def test_the_first_updates_of_the_values_are_a_fresh_optimizers(model, train):
    start, grads, rates, after = [], [], [], []

    def values():
        return [parameter.detach().clone() for parameter in by_role(model)["values"]]

    def claimed(tuner, state, kwargs):
        if state.global_step == 3:
            start.extend(values())
        elif state.global_step > 3:
            after.append(values())

    def before(tuner, state, kwargs):
        if state.global_step >= 3:
            grads.append([parameter.grad.clone() for parameter in by_role(model)["values"]])
            groups = kwargs["optimizer"].param_groups
            rates.append(next(group["lr"] for group in groups if group["role"] == "values"))

    spy = Spy(on_step_end=claimed, on_pre_optimizer_step=before)
    train(model, "news", spy, weight_decay=0.1, rates={"values": 0.03})
    copies = [torch.nn.Parameter(tensor) for tensor in start]
    fresh = torch.optim.AdamW(copies, lr=0.03, weight_decay=0.1)
    for step, (given, rate) in enumerate(zip(grads, rates, strict=True)):
        fresh.param_groups[0]["lr"] = rate
        for parameter, grad in zip(copies, given, strict=True):
            parameter.grad = grad
        fresh.step()
        assert equal(copies, after[step])
    assert rates[0] == 0.03


def test_each_phase_warms_up_and_decays_by_itself_at_each_roles_own_rate(model, train):
    rates = {role: [] for role in ROLES}

    def watch(tuner, state, kwargs):
        for role in ROLES:
            found = {group["lr"] for group in kwargs["optimizer"].param_groups if group["role"] == role}
            assert len(found) == 1
            rates[role].append(found.pop())

    spy = Spy(on_pre_optimizer_step=watch)
    train(model, "news", spy, max_steps=8, warmup_steps=2, learning_rate=0.1, rates={"scores": 1.0, "values": 10.0})
    phase, off = [0.0, 0.5, 1.0, 0.5], [0.0] * 4
    assert rates["scores"] == pytest.approx(phase + off)
    assert rates["values"] == pytest.approx([10 * factor for factor in off + phase])
    assert rates["head"] == pytest.approx([0.1 * factor for factor in phase + phase])


def test_decay_spares_scores_biases_and_norms(tiny_model, train):
    model = get_peft_model(tiny_model(), config(train_norms=True), adapter_name="news")
    decays = {}

    def watch(tuner, state, kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in kwargs["optimizer"].param_groups:
            decays.update({names[id(parameter)]: group["weight_decay"] for parameter in group["params"]})

    train(model, "news", Spy(on_train_begin=watch), weight_decay=0.1)
    for name, decay in decays.items():
        plain = ".hfcl_scores." in name or "LayerNorm" in name or name.endswith(".bias")
        assert decay == (0.0 if plain else 0.1)


def test_a_plain_trainer_and_a_given_optimizer_learn_the_same_bits(tiny_model, train):
    def learn(made):
        model = get_peft_model(tiny_model(), config(), adapter_name="news")
        rates = {"scores": 0.05, "values": 0.03, "head": 0.02}
        options = {}
        if made:
            optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), rates, 0.1))
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if made == "both" else None
            options["optimizers"] = (optimizer, scheduler)
        trainer, _ = train(model, rates=rates, weight_decay=0.1, **options)
        assert not made or getattr(trainer.optimizer, "optimizer", trainer.optimizer) is optimizer
        return state_of(model)

    plain = learn(None)
    assert equal(learn("optimizer"), plain)
    assert equal(learn("both"), plain)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_scheduler_that_is_no_function_of_the_step_is_refused(model, train):
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), dict.fromkeys(ROLES, 0.1), 0.0))
    stepped = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ConfigError, match="expected a LambdaLR, found StepLR"):
        train(model, optimizers=(optimizer, stepped))
    with pytest.raises(ConfigError, match="lr_scheduler_type: "):
        train(model, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1)
    assert model.base_model.phase("news") == "mask"


def test_an_optimizer_that_has_stepped_is_refused(model, train):
    head = by_role(model)["head"]
    optimizer = torch.optim.AdamW(head)
    head[0].grad = torch.ones_like(head[0])
    optimizer.step()
    with pytest.raises(ConfigError, match="it has stepped before"):
        train(model, optimizers=(optimizer, None))


def test_an_optimizer_over_another_adapters_parameters_is_refused(model, train):
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), dict.fromkeys(ROLES, 0.1), 0.0))
    model.add_adapter("pets", config())
    model.set_adapter("pets")
    with pytest.raises(ConfigError, match="optimizer"):
        train(model, "pets", optimizers=(optimizer, None))


def test_from_the_claim_on_the_optimizer_keeps_nothing_for_scores(model, train):
    held = []

    def look(tuner, state, kwargs):
        scores = [layer.hfcl_scores["news"] for layer in tuner.mask_layers()]
        values = [layer.hfcl_values["news"] for layer in tuner.mask_layers()]
        states = kwargs["optimizer"].state
        held.append([sum(parameter in states for parameter in part) for part in (scores, values)])

    train(model, "news", Spy(on_optimizer_step=look), share=0.5)
    layers = len(model.base_model.mask_layers())
    assert held == [[layers, 0]] * 3 + [[0, layers]] * 3


def test_stopping_before_the_claim_commits_nothing(model, train):
    with pytest.raises(TrainingError, match=r"stopped at step 2, before its claim at step 3\. Nothing is committed"):
        train(model, "news", StopAt(2))
    assert model.base_model.phase("news") == "mask"
    assert model.base_model.capacity_used() == 0


def test_a_mask_alone_that_stops_early_is_committed(mask_model, train):
    scores = []
    keep = Spy(on_step_end=lambda *_: scores.append(by_role(mask_model)["scores"][0].detach().clone()))
    trainer, _ = train(mask_model, "news", StopAt(2), keep)
    assert trainer.state.global_step == 2
    layer = mask_model.base_model.mask_layers()[0]
    assert torch.equal(layer.mask("news"), topk_mask(scores[1], layer.count("news")))


def test_values_that_stop_early_after_the_claim_are_committed(model, train):
    train(model, "news", StopAt(4))
    assert model.base_model.phase("news") == "committed"


def test_the_wrong_adapter_is_refused(model, tiny_model, train):
    with pytest.raises(ConfigError, match=r"adapter 'pets': the model has news\. Add it first"):
        train(model, "pets")
    model.add_adapter("pets", config())
    with pytest.raises(ConfigError, match=r"adapter 'pets': active is news\. Call model.set_adapter"):
        train(model, "pets")
    assert model.base_model.phase("news") == model.base_model.phase("pets") == "mask"


def test_a_model_without_masks_is_refused(tiny_model, train):
    with pytest.raises(ConfigError, match=r"expected get_peft_model\(model, MaskConfig\(\.\.\.\)\), found Bert"):
        train(tiny_model(num_labels=3))
    with pytest.raises(ConfigError, match="expected get_peft_model"):
        train(get_peft_model(tiny_model(num_labels=3), LoraConfig(task_type="SEQ_CLS")))


def test_a_share_that_does_not_fit_what_trains_is_refused(model, mask_model, train):
    with pytest.raises(ConfigError, match="values need a mask_share below 1"):
        train(model, share=1.0)
    with pytest.raises(ConfigError, match="A mask alone has mask_share 1"):
        train(mask_model, share=0.5)
    for share in (0, -0.5, 1.5):
        with pytest.raises(ConfigError, match="mask_share: expected a share in"):
            OwnershipCallback("news", mask_share=share)


def test_a_committed_adapter_is_never_trained_again(model, train):
    trainer, _ = train(model)
    before = state_of(model)
    with pytest.raises(ConfigError, match=r"'news' is committed and never changes again. Add a new adapter"):
        trainer.train()
    with pytest.raises(ConfigError, match=r"'news' is committed and never changes again"):
        train(model)
    assert equal(state_of(model), before)


def test_a_second_trainer_learns_a_second_adapter(model, train):
    train(model)
    before = state_of(model)
    model.add_adapter("pets", config())
    model.set_adapter("pets")
    train(model, "pets")
    assert model.base_model.phase("pets") == "committed"
    assert equal(state_of(model), before)


def test_a_full_store_refuses_values_before_training_and_still_takes_a_mask(tiny_model, train):
    model = get_peft_model(tiny_model(), config(density=1.0), adapter_name="news")
    train(model)
    before, steps = state_of(model), []
    model.add_adapter("pets", config())
    model.set_adapter("pets")
    with pytest.raises(OwnershipError, match=r"adapter 'pets': its method trains values, and no layer has a free"):
        train(model, "pets", Spy(on_step_begin=lambda *_: steps.append(1)))
    assert not steps
    model.add_adapter("shop", config(trains="nothing"))
    model.set_adapter("shop")
    train(model, "shop")
    assert model.base_model.phase("shop") == "committed"
    assert equal(state_of(model), before)


def test_a_mask_without_a_free_entry_is_pure_reuse_and_says_so(model, train, caplog):
    train(model)
    before = state_of(model)
    model.add_adapter("pets", config())
    model.set_adapter("pets")
    with torch.no_grad():
        for layer in model.base_model.mask_layers():
            layer.hfcl_scores["pets"].copy_(layer.mask("news"))
    with caplog.at_level(logging.WARNING, logger="hf_cl"):
        _, callback = train(model, "pets", rates={"scores": 0.0})
    assert "pets: its mask holds no free entry, so nothing is left to train but its head" in caplog.text
    assert model.base_model.phase("pets") == "committed"
    assert trained_count(model.base_model, "pets") == 0
    assert callback.facts["overlap"] == 1.0
    assert callback.facts["trainable_share"] == 0.0
    assert equal(state_of(model), before)


def test_little_left_to_train_is_said_and_how_much(model, train, caplog):
    train(model)
    model.add_adapter("pets", config())
    model.set_adapter("pets")
    with torch.no_grad():
        for layer in model.base_model.mask_layers():
            layer.hfcl_scores["pets"].copy_(layer.mask("news"))
            free = (~layer.mask("news")).view(-1).nonzero()[0]
            layer.hfcl_scores["pets"].view(-1)[free] = 2.0
    with caplog.at_level(logging.WARNING, logger="hf_cl"):
        train(model, "pets", rates={"scores": 0.0})
    assert "pets: only 1.5 % of its budget is free to train, 80.1 % of the store is left" in caplog.text
    assert trained_count(model.base_model, "pets") == 12


# --- what it says, and the best state ---------------------------------------------------------------------------------


def test_facts_stand_in_the_log_history(model, train):
    train(model)
    model.add_adapter("pets", config())
    model.set_adapter("pets")
    trainer, callback = train(model, "pets")
    losses = [log for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 6
    for log in losses:
        assert {"mask_density", "mask_overlap", "mask_trainable_share", "mask_capacity_left"} <= log.keys()
        assert log["mask_density"] == pytest.approx(0.2, rel=0.06)
        assert log["mask_overlap"] + log["mask_trainable_share"] == pytest.approx(1, abs=1e-5)
    assert callback.facts["trainable_share"] == pytest.approx(losses[-1]["mask_trainable_share"], abs=1e-6)


def scripted(values):
    """Metrics that come as written: what is best is then known."""
    left = iter(values)
    return lambda prediction: {"worth": next(left)}


BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "load_best_model_at_end": True, "metric_for_best_model": "worth", "greater_is_better": True,
}  # fmt: skip


def test_the_best_state_of_the_last_phase_is_restored_for_an_adapter_of_any_name(model, train):
    kept, best = {}, {}

    def after_step(tuner, state, kwargs):
        best[state.global_step] = state.best_metric

    def evaluated(tuner, state, kwargs):
        moving = by_role(model)
        kept[state.global_step] = [p.detach().clone() for p in [*moving["values"], *moving["head"]]]

    spy = Spy(on_step_end=after_step, on_evaluate=evaluated)
    worth = scripted([0.9, 0.95, 0.1, 0.2, 0.8, 0.3])
    trainer, _ = train(model, "news", spy, compute_metrics=worth, weight_decay=0.1, **BEST)
    assert best == {1: None, 2: 0.9, 3: None, 4: 0.1, 5: 0.2, 6: 0.8}
    assert trainer.state.best_metric == 0.8
    assert not equal(kept[5], kept[6])
    layers = model.base_model.mask_layers()
    for layer, values in zip(layers, kept[5], strict=False):
        assert torch.equal(layer.hfcl_owned["news"], values.to(torch.bfloat16).float())
    assert equal(by_role(model)["head"], kept[5][len(layers) :])


def test_the_best_state_of_a_mask_alone_is_restored(mask_model, train):
    kept = {}

    def evaluated(tuner, state, kwargs):
        moving = by_role(mask_model)
        kept[state.global_step] = [p.detach().clone() for p in [*moving["scores"], *moving["head"]]]

    worth = scripted([0.1, 0.7, 0.3, 0.2, 0.5, 0.6])
    train(mask_model, "news", Spy(on_evaluate=evaluated), compute_metrics=worth, rates={"scores": 0.05}, **BEST)
    layers = mask_model.base_model.mask_layers()
    for layer, scores in zip(layers, kept[2], strict=False):
        assert torch.equal(layer.mask("news"), topk_mask(scores, layer.count("news")))
    assert equal(by_role(mask_model)["head"], kept[2][len(layers) :])
    assert not equal(kept[2][:12], kept[6][:12])


def test_early_stopping_counts_anew_from_the_claim(model, train):
    worth = scripted([0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.1, 0.1, 0.1, 0.1])
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer, _ = train(model, "news", stop, compute_metrics=worth, max_steps=10, share=0.3, **BEST)
    assert trainer.state.global_step == 8
    assert trainer.state.best_metric == 0.4
    assert model.base_model.phase("news") == "committed"


def test_a_best_metric_that_is_not_there_is_named(mask_model, train):
    with pytest.raises(ConfigError, match="metric_for_best_model: 'worth' is not among eval_loss"):
        train(mask_model, "news", **BEST)
    assert mask_model.base_model.phase("news") == "mask"


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_training_resumed_around_its_claim_learns_the_same_bits(tiny_model, token_rows, arguments, step):
    rates = {"scores": 0.05, "values": 0.03, "head": 0.02}

    def learn(folder, **options):
        model = get_peft_model(tiny_model(), config(), adapter_name="news")
        args = arguments(max_steps=6, optim="adamw_torch", save_strategy="steps", save_steps=1)
        args.output_dir = folder or args.output_dir
        # Groups as ours from the start: a checkpoint's optimizer is loaded before `on_train_begin`.
        optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), rates, 0.0))
        callback = OwnershipCallback("news", mask_share=0.5, learning_rates=rates)
        trainer = Trainer(
            model, args, train_dataset=token_rows(0, 3), callbacks=[callback], optimizers=(optimizer, None)
        )
        trainer.train(**options)
        return args.output_dir, state_of(model)

    folder, straight = learn(None)
    _, resumed = learn(folder, resume_from_checkpoint=f"{folder}/checkpoint-{step}")
    assert equal(resumed, straight)


# --- KKT ------------------------------------------------------------------------------------------------------------


def test_kkt_starts_a_task_on_known_data_from_the_mask_that_learned_it(tiny_model, token_rows, train):
    model = get_peft_model(tiny_model(), config(trains="nothing"), adapter_name="news")
    kkt, rows = KKT(k=5, sample=96, margin=5.0, means={}), token_rows(0, 3, 96)
    options = {"rates": {"scores": 0.05}, "start": kkt, "rows": rows, "per_device_train_batch_size": 16}
    _, first = train(model, "news", max_steps=40, **options)
    assert first.choice.source is None
    assert first.choice.accuracies == {}
    before = state_of(model)
    model.add_adapter("pets", config(trains="nothing"))
    model.set_adapter("pets")
    begun = []

    def watch(tuner, state, kwargs):
        begun.extend(torch.equal(layer.mask("pets"), layer.mask("news")) for layer in tuner.mask_layers())
        own = [tuner.own_tensors(name)["classifier.weight"] for name in ("news", "pets")]
        begun.append(torch.equal(*own))

    _, second = train(model, "pets", Spy(on_train_begin=watch), max_steps=2, **options)
    assert second.choice.source == 0
    assert second.choice.accuracies[0] > max(second.choice.base, second.choice.chance)
    assert begun == [True] * 13
    assert sorted(kkt.means) == [0, 1]
    assert equal(state_of(model), before)
    assert all(layer.hfcl_scores["news"].numel() == 0 for layer in model.base_model.mask_layers())


def test_kkt_leaves_the_model_as_it_found_it(model, train):
    train(model)
    model.add_adapter("pets", config())
    model.set_adapter("pets")
    seen = []

    def watch(tuner, state, kwargs):
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        seen.append((model.active_adapter, tuner.training, model.config.num_labels, len(trainable)))

    kkt = KKT(k=3, sample=16, margin=5.0, means={})
    train(model, "pets", Spy(on_train_begin=watch), first=[Spy(on_train_begin=watch)], start=kkt)
    assert seen[0] == seen[1]
    assert seen[1][2:] == (3, 12 + 12 + 2)
