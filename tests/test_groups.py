import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from hf_cl.errors import ConfigError, TrainingError
from hf_cl.training.groups import parameter_groups, role_of, schedule, set_groups, set_schedule
from hf_cl.training.guards import FiniteGradients, refuse_sharding, require_finite

RATES = {"scores": 1e-1, "values": 1e-2, "head": 1e-3}
SPANS = ((0, 10), (10, 16))


def parameter(*shape: int, trains: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=trains)


def masked_parameters() -> dict[str, nn.Parameter]:
    """The kinds of parameters a masked model has."""
    return {
        "bert.layer.0.dense.hfcl_scores.task0": parameter(4, 3, trains=False),
        "bert.layer.0.dense.hfcl_scores.task1": parameter(4, 3),
        "bert.layer.0.dense.hfcl_values.task1": parameter(5),
        "bert.layer.0.norm.hfcl_copy.task1.weight": parameter(4),
        "classifier.hfcl_copy.task1.weight": parameter(2, 4),
        "classifier.hfcl_copy.task1.bias": parameter(2),
        "bert.layer.0.dense.base_layer.weight": parameter(4, 3, trains=False),
    }


# --- groups -------------------------------------------------------------------------------------


def test_a_role_is_read_off_the_name():
    assert [role_of(name) for name in masked_parameters()] == [
        "scores", "scores", "values", "head", "head", "head", "head"
    ]  # fmt: skip


def test_scores_biases_and_norms_never_decay_and_the_head_comes_first():
    named = masked_parameters()
    groups = parameter_groups(named.items(), RATES, weight_decay=0.1)
    names = {id(tensor): name for name, tensor in named.items()}
    found = [
        (group["role"], group["lr"], group["weight_decay"], [names[id(p)] for p in group["params"]]) for group in groups
    ]
    assert found == [
        ("head", 1e-3, 0.0, ["bert.layer.0.norm.hfcl_copy.task1.weight", "classifier.hfcl_copy.task1.bias"]),
        ("head", 1e-3, 0.1, ["classifier.hfcl_copy.task1.weight"]),
        ("scores", 1e-1, 0.0, ["bert.layer.0.dense.hfcl_scores.task1"]),
        ("values", 1e-2, 0.1, ["bert.layer.0.dense.hfcl_values.task1"]),
    ]


def test_every_trainable_parameter_is_in_one_group_and_no_group_is_empty():
    named = masked_parameters()
    for decay in (0.0, 0.1):
        groups = parameter_groups(named.items(), RATES, decay)
        assert all(group["params"] for group in groups)
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in named.values() if p.requires_grad)
    assert parameter_groups({}.items(), RATES, 0.1) == []


def test_a_method_without_masks_gives_its_own_roles():
    named = {"encoder.weight": parameter(2, 2), "classifier.weight": parameter(2, 2)}
    groups = parameter_groups(
        named.items(), {"encoder": 1.0, "head": 2.0}, 0.1, lambda name: "head" if "class" in name else "encoder"
    )
    assert [(group["role"], group["lr"]) for group in groups] == [("head", 2.0), ("encoder", 1.0)]


# --- schedules ----------------------------------------------------------------------------------


def by_hand(kind: str, step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return step / warmup
    rest = (step - warmup) / (steps - warmup)
    return {"linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2, "constant_with_warmup": 1.0}[kind]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_each_phase_warms_up_and_decays_by_itself(kind, arguments):
    factor = schedule(arguments(lr_scheduler_type=kind, warmup_steps=0.2), SPANS)
    expected = [by_hand(kind, step, 2, 10) for step in range(10)]
    expected += [by_hand(kind, step, 2, 6) for step in range(6)]  # a fifth of six steps, rounded up
    # The formulas differ in the order of their operations, by units in the last place.
    assert [factor(step) for step in range(16)] == pytest.approx(expected, abs=1e-12)
    assert factor(10) == 0.0


def test_a_constant_rate_is_constant_in_its_phases(arguments):
    factor = schedule(arguments(lr_scheduler_type="constant"), SPANS)
    assert [factor(step) for step in (-1, 0, 9, 10, 15, 16)] == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_outside_its_phases_a_rate_is_zero(kind, arguments):
    factor = schedule(arguments(lr_scheduler_type=kind), [(3, 5), (8, 9)])
    assert [step for step in range(-2, 12) if factor(step) > 0] == [3, 4, 8]
    assert schedule(arguments(lr_scheduler_type=kind), [])(0) == 0.0
    assert schedule(arguments(lr_scheduler_type=kind), [(4, 4)])(4) == 0.0


@pytest.mark.parametrize("warmup", [0, 3, 0.25])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("polynomial", {"power": 2.0}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("inverse_sqrt", {}),
    ],
)
def test_one_phase_has_the_schedule_of_transformers(kind, options, warmup, arguments):
    args = arguments(lr_scheduler_type=kind, warmup_steps=warmup, lr_scheduler_kwargs=options)
    factor = schedule(args, [(0, 20)])
    optimizer = torch.optim.SGD([parameter(1)], lr=1.0)
    theirs = get_scheduler(kind, optimizer, args.get_warmup_steps(20), 20, scheduler_specific_kwargs=options)
    for step in range(20):
        assert factor(step) == theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


def test_a_warm_up_longer_than_its_phase_ends_with_it(arguments):
    factor = schedule(arguments(warmup_steps=100), SPANS)
    assert [factor(step) for step in (0, 5, 9, 10, 15)] == [0.0, 0.5, 0.9, 0.0, 5 / 6]


def test_a_schedule_that_looks_at_losses_is_refused_and_named_as_the_user_wrote_it(arguments):
    # Without an evaluation the arguments refuse it before we do.
    args = arguments(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=5)
    with pytest.raises(ConfigError, match=r"reduce_lr_on_plateau depends on more than the step.*Use linear, cosine"):
        schedule(args, SPANS)


# --- optimizer and scheduler that exist already -----------------------------------------------------


def test_groups_take_the_place_of_an_optimizers_and_keep_its_other_options():
    optimizer = torch.optim.AdamW([parameter(2)], lr=1.0, betas=(0.8, 0.9), eps=1e-6)
    groups = parameter_groups(masked_parameters().items(), RATES, 0.1)
    set_groups(optimizer, groups)
    assert [group["role"] for group in optimizer.param_groups] == ["head", "head", "scores", "values"]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 1e-1, 1e-2]
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in optimizer.param_groups)
    assert set(groups[0]) == {"params", "lr", "weight_decay", "role"}


def test_an_optimizer_below_a_wrapper_is_reached():
    inner = torch.optim.AdamW([parameter(2)], lr=1.0)
    set_groups(SimpleNamespace(optimizer=inner), parameter_groups(masked_parameters().items(), RATES, 0.1))
    assert len(inner.param_groups) == 4


def test_an_optimizer_that_has_stepped_is_refused_and_stays_as_it_is():
    weight = parameter(2)
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    optimizer.step()
    with pytest.raises(ConfigError, match=r"it has stepped before\. Give each task a new Trainer"):
        set_groups(optimizer, parameter_groups(masked_parameters().items(), RATES, 0.1))
    assert optimizer.param_groups[0]["params"] == [weight]


def phases() -> dict:
    return {
        "scores": lambda step: 1.0 if step < 2 else 0.0,
        "values": lambda step: 0.0 if step < 2 else 1.0,
        "head": lambda step: 0.5**step,
    }


def test_a_schedule_holds_one_curve_a_group_from_the_first_step():
    optimizer = torch.optim.SGD([parameter(2)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    set_groups(optimizer, parameter_groups(masked_parameters().items(), RATES, 0.0))
    set_schedule(optimizer, scheduler, phases())
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        assert scheduler.get_last_lr() == rates[-1]
        optimizer.step()
        scheduler.step()
    assert rates == [[1e-3, 1e-1, 0.0], [5e-4, 1e-1, 0.0], [2.5e-4, 0.0, 1e-2], [1.25e-4, 0.0, 1e-2]]


def test_setting_a_schedule_twice_does_not_shrink_the_rates():
    optimizer = torch.optim.SGD(parameter_groups(masked_parameters().items(), RATES, 0.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.0] * 3)
    for _ in range(2):
        set_schedule(optimizer, scheduler, phases())
    assert scheduler.base_lrs == [1e-3, 1e-1, 1e-2]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-1, 0.0]


def test_another_kind_of_scheduler_is_refused():
    optimizer = torch.optim.SGD(parameter_groups(masked_parameters().items(), RATES, 0.0))
    with pytest.raises(ConfigError, match=r"expected a LambdaLR, found StepLR\. Let the Trainer make it"):
        set_schedule(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1), phases())


# --- guards -------------------------------------------------------------------------------------


def with_gradient(*values: float) -> nn.Parameter:
    tensor = parameter(len(values))
    tensor.grad = torch.tensor(values)
    return tensor


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stops_at_its_step(value):
    with pytest.raises(TrainingError, match=r"^step 42: the loss or its gradient is not finite"):
        require_finite([with_gradient(1.0, 2.0), parameter(3), with_gradient(0.0, value)], step=41)


def test_finite_gradients_and_none_pass():
    require_finite([], 0)
    require_finite([parameter(3)], 0)
    require_finite([with_gradient(1e38, -1e38), parameter(3), with_gradient(0.0)], 0)


def test_the_callback_watches_every_gradient_of_the_model(arguments):
    state = SimpleNamespace(global_step=6)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    FiniteGradients().on_pre_optimizer_step(arguments(), state, None, model=model)
    model[0].weight.grad[0, 0] = math.inf  # not in the last layer: clipping would hide it there
    with pytest.raises(TrainingError, match="step 7"):
        FiniteGradients().on_pre_optimizer_step(arguments(), state, None, model=model)


@pytest.mark.parametrize(
    ("name", "value"),
    [("deepspeed", {"zero_optimization": {"stage": 3}}), ("fsdp", True), ("parallelism_config", object())],
)
def test_what_shards_parameters_is_refused_by_name(name, value):
    args = SimpleNamespace(**{"deepspeed": None, "fsdp": None, "parallelism_config": None, "n_gpu": 0, name: value})
    with pytest.raises(ConfigError, match=f"^{name}.*: it shards parameters"):
        refuse_sharding(args)


def test_plain_training_arguments_shard_nothing(arguments):
    refuse_sharding(arguments())
