"""Merge rules in memory: closed forms, end points, other libraries, and what is refused."""

import math
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import merge_utils
from torch import nn

from hf_cl import plugins
from hf_cl.errors import ConfigError, MergeError
from hf_cl.merging.average import average
from hf_cl.merging.dare import dare
from hf_cl.merging.fisher import fisher
from hf_cl.merging.greedy import greedy
from hf_cl.merging.lora_arithmetic import lora_arithmetic
from hf_cl.merging.sfa import sfa
from hf_cl.merging.task_arithmetic import TaskSum, task_arithmetic
from hf_cl.merging.ties import ties
from hf_cl.merging.wise_ft import wise_ft

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def model(seed, dtype=torch.float32, shapes=((7, 5), (11,), (3, 2, 4)), spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    made = {f"t{n}": spread * torch.randn(shape, generator=generator) for n, shape in enumerate(shapes)}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def near(base, seed, dtype=torch.float32):
    moved = model(seed, spread=0.1)
    return {name: (tensor.float() + moved[name]).to(dtype) for name, tensor in base.items()}


def one(*values):
    return {"w": torch.tensor(values)}


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same(found, expected):
    """Whether two mappings are equal bit for bit, signs of zero included."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(bits(found[name]), bits(expected[name]))
        for name in found
    )


def close(found, expected, **how):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **how)


# One call of each rule on a base and two models.
CALLS = {
    "average": lambda base, models: average(models),
    "dare": lambda base, models: dare(base, models[0], density=0.5, seed=3),
    "fisher": lambda base, models: fisher(models, [{n: t.float() ** 2 for n, t in base.items()}] * len(models)),
    "greedy": lambda base, models: greedy(models, lambda tensors: float(tensors["t0"].float().sum())),
    "sfa": lambda base, models: sfa(models[0], base, beta=0.3),
    "task_arithmetic": lambda base, models: task_arithmetic(base, models, scale=0.4),
    "ties": lambda base, models: ties(base, models, density=0.4),
    "wise_ft": lambda base, models: wise_ft(base, models[0], alpha=0.3),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def test_every_rule_is_a_file_of_its_name_and_tested_here():
    assert {*CALLS, "lora_arithmetic"} == set(plugins.available("merging"))


# --- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_soup_of_identical_models_is_that_model_bit_for_bit(dtype, count):
    found = average([model(0, dtype)] * count, weights=range(1, count + 1))
    assert same(found, model(0, dtype))


def test_the_mean_is_weighted_by_ratios_and_a_weight_of_zero_leaves_out_exactly():
    assert average([one(1.0), one(4.0), one(7.0)])["w"].item() == 4.0
    assert average([one(1.0), one(4.0)], [1, 2])["w"].item() == 3.0
    assert same(average([model(0), model(1), model(2)], [0, 3, 0]), model(1))
    assert same(average([model(0), model(1)], [1, 3]), average([model(0), model(1)], [2, 6]))


@pytest.mark.parametrize("rule", ["average", "fisher", "greedy", "task_arithmetic", "ties"])
def test_the_order_of_models_changes_nothing_but_the_last_bits(rule):
    base = model(0)
    models = [near(base, seed) for seed in (1, 2, 3)]
    # A few roundings of numbers below 4 in float32.
    close(CALLS[rule](base, models), CALLS[rule](base, models[::-1]), rtol=0, atol=2e-6)


def test_greedy_keeps_what_does_not_hurt_and_is_no_worse_than_the_best():
    target = model(0)
    models = [near(target, seed) for seed in range(1, 6)] + [model(99)]

    def score(tensors):
        return -sum(float(((tensors[name] - target[name]) ** 2).sum()) for name in tensors)

    found = greedy(models, score)
    assert score(found) > max(map(score, models))
    assert score(average(models)) < max(map(score, models)), "the control: a uniform soup is spoilt by the stranger"


def test_greedy_lets_in_an_equal_score_and_tries_the_better_first():
    assert same(greedy([one(0.0), one(2.0)], lambda tensors: 1.0), one(1.0))
    seen = []

    def score(tensors):
        seen.append(tensors["w"].item())
        return seen[-1]

    assert same(greedy([one(1.0), one(5.0), one(3.0)], score), one(5.0))
    assert seen == [1.0, 5.0, 3.0, 4.0, 3.0], "each alone, then the best with each other, the better one first"
    with pytest.raises(MergeError, match="NaN"):
        greedy([one(1.0)], lambda tensors: math.nan)


@pytest.mark.parametrize("dtype", (*FLOATS, torch.float64))
def test_both_ends_of_the_line_are_exact(dtype):
    base, end = model(0, dtype), model(1, dtype)
    base["t1"][0], end["t1"][0] = -0.0, 1.0
    assert same(wise_ft(base, end, 0.0), base) and same(wise_ft(base, end, 1.0), end)
    assert same(sfa(end, base, 0.0), end) and same(sfa(end, base, 1.0), base)
    assert same(task_arithmetic(base, [end], scale=0.0), base) and same(ties(base, [end], 0.5, scale=0.0), base)
    assert same(dare(base, end, density=1.0), end)


def test_wise_ft_is_the_straight_line_and_sfa_once_at_the_end_is_wise_ft():
    base, end = model(0), model(1)
    line = wise_ft(base, end, 0.25)
    close(line, {name: 0.75 * base[name] + 0.25 * end[name] for name in base})
    assert same(sfa(end, base, 0.75), line)


def test_sfa_on_a_quadratic_goes_to_its_fixed_point():
    # Loss h (theta - c)^2 / 2, gradient descent at rate eta, n steps between averagings.
    h, eta, n, beta, c = 0.5, 0.2, 3, 0.25, 2.0
    shrink, anchor = (1 - eta * h) ** n, torch.tensor([5.0], dtype=torch.float64)
    theta, expected = anchor.clone(), 5.0 - c
    for _ in range(60):
        for _ in range(n):
            theta = theta - eta * h * (theta - c)
        theta = sfa({"w": theta}, {"w": anchor}, beta)["w"]
        expected = (1 - beta) * shrink * expected + beta * (5.0 - c)
        assert theta.item() - c == pytest.approx(expected, rel=1e-12)
    assert theta.item() - c == pytest.approx(beta * 3.0 / (1 - (1 - beta) * shrink), rel=1e-9)


def test_averaging_in_bfloat16_would_swallow_what_float32_keeps():
    """A small pull a step: the rule rounds once, so it moves wherever the exact result does."""
    current, anchor = {"w": torch.tensor([1.0, 3.0]).bfloat16()}, {"w": torch.tensor([1.0234375, 3.09375]).bfloat16()}
    exact = 0.6 * current["w"].double() + 0.4 * anchor["w"].double()
    assert torch.equal(sfa(current, anchor, 0.4)["w"], exact.bfloat16())
    narrow = current["w"] * 0.6 + anchor["w"] * 0.4
    assert not torch.equal(narrow, exact.bfloat16()), "the control: the same in bfloat16 is another number"


def test_task_arithmetic_moves_along_the_sum_of_directions():
    base, models = model(0), [near(model(0), seed) for seed in (1, 2, 3)]
    close(task_arithmetic(base, models, scale=1 / 3), average(models))
    # base + (model - base) rounds twice: a few units in the last place of numbers below 4.
    close(task_arithmetic(base, models[:1], scale=1.0), models[0], rtol=0, atol=1e-6)
    away = task_arithmetic(base, models[:1], scale=-0.5)
    close(away, {name: 1.5 * base[name] - 0.5 * models[0][name] for name in base})
    close(away, task_arithmetic(base, models[:1], scale=0.5, weights=[-1]), rtol=0, atol=0)
    a, b, c = (near(base, seed) for seed in (4, 5, 6))
    analogy = task_arithmetic(base, [a, b, c], scale=1.0, weights=[-1, 1, 1])
    close(analogy, {name: c[name] + b[name] - a[name] for name in base}, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_adding_one_model_at_a_time_gives_the_bits_of_all_at_once(dtype):
    base = model(0, dtype)
    models = [near(base, seed, dtype) for seed in (1, 2, 3)]
    total = TaskSum(base)
    for part, weight in zip(models, (1.0, 0.5, -2.0), strict=True):
        total.add(part, weight)
    assert same(total.merged(0.3), task_arithmetic(base, models, 0.3, [1.0, 0.5, -2.0]))
    assert same(total.merged(0.3), total.merged(0.3)), "asking twice changes nothing"
    assert same(TaskSum(base).merged(1.0), base)


# --- TIES ---------------------------------------------------------------------------------------

TOY = [one(4.0, -1.0, 0.0, 2.0), one(-3.0, -2.0, 5.0, 2.0), one(1.0, 6.0, 0.0, -5.0)]
ZERO = one(0.0, 0.0, 0.0, 0.0)


def test_ties_on_the_toy_by_hand():
    assert ties(ZERO, TOY, density=1.0)["w"].tolist() == [2.5, 6.0, 5.0, -5.0]
    assert ties(ZERO, TOY, density=1.0, merge="sum")["w"].tolist() == [5.0, 6.0, 5.0, -5.0]
    # Two entries each: [4, 0, 0, 2], [-3, 0, 5, 0], [0, 6, 0, -5].
    assert ties(ZERO, TOY, density=0.5)["w"].tolist() == [4.0, 6.0, 5.0, -5.0]
    assert ties(ZERO, TOY, density=0.5, scale=-2.0)["w"].tolist() == [-8.0, -12.0, -10.0, 10.0]


def test_ties_counts_weights_in_the_election_and_in_the_mean():
    # Weighted sums: 4 - 6 + 1 < 0, -1 - 4 + 6 > 0, 10 > 0, 2 + 4 - 5 > 0.
    assert ties(ZERO, TOY, density=1.0, weights=[1, 2, 1])["w"].tolist() == [-3.0, 6.0, 5.0, 2.0]
    assert ties(ZERO, TOY, density=1.0, weights=[1, 0, 0])["w"].tolist() == TOY[0]["w"].tolist()


def test_ties_of_identical_directions_is_the_trimmed_direction():
    assert ties(ZERO, [TOY[2]] * 3, density=0.5)["w"].tolist() == [0.0, 6.0, 0.0, -5.0]


@pytest.mark.parametrize(("last", "expected"), [(3.0, [1.0, 2.0, 3.0]), (-3.0, [-1.0, -2.0, -3.0])])
def test_a_draw_goes_to_the_sign_that_most_weights_elected(last, expected):
    models = [one(1.0, -2.0, last), one(-1.0, 2.0, last)]
    assert ties(one(0.0, 0.0, 0.0), models, density=1.0)["w"].tolist() == expected


def test_a_draw_on_every_side_is_negative():
    assert ties(one(0.0), [one(4.0), one(-4.0)], density=1.0)["w"].tolist() == [-4.0]


def test_the_draws_of_one_tensor_are_decided_by_its_own_weights_where_the_scope_is_a_tensor():
    base = {"a": torch.zeros(2), "b": torch.zeros(3)}
    models = [{"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([5.0, 5.0, 5.0])},
              {"a": torch.tensor([-1.0, -2.0]), "b": torch.tensor([5.0, 5.0, 5.0])}]  # fmt: skip
    assert ties(base, models, density=1.0)["a"].tolist() == [1.0, -2.0]
    assert ties(base, models, density=1.0, scope="tensor")["a"].tolist() == [-1.0, -2.0]


def kept(base, found):
    return sum(int((found[name] != base[name]).sum()) for name in base)


def test_the_global_scope_ranks_over_all_tensors_and_the_other_within_each():
    base = {"large": torch.zeros(10), "small": torch.zeros(10)}
    far = {"large": torch.arange(11.0, 21.0), "small": torch.arange(1.0, 11.0)}
    whole, each = ties(base, [far], density=0.3), ties(base, [far], density=0.3, scope="tensor")
    assert whole["large"].tolist() == [0.0] * 4 + far["large"].tolist()[4:] and not whole["small"].any()
    assert each["small"].tolist() == [0.0] * 7 + [8.0, 9.0, 10.0] and int((each["large"] != 0).sum()) == 3


@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_share_is_kept_and_equals_go_by_name_and_place(density, dtype):
    """Coarse directions have many equal magnitudes: a sort that is stable says which ones stay."""
    generator = torch.Generator().manual_seed(7)
    names = ("b", "a", "c")  # sorted names decide, not the order of the mapping
    far = {name: (torch.randint(1, 9, (40, 10), generator=generator) * torch.tensor(0.25)).to(dtype) for name in names}
    base = {name: torch.zeros_like(tensor) for name, tensor in far.items()}
    found = ties(base, [far], density=density)
    row = torch.cat([far[name].flatten() for name in sorted(names)]).float()
    count = max(1, math.floor(density * len(row) + 0.5))
    order = torch.sort(row.abs(), descending=True, stable=True).indices[:count]
    expected = torch.zeros_like(row).index_put((order,), row[order])
    assert torch.equal(torch.cat([found[name].flatten() for name in sorted(names)]).float(), expected)
    assert kept(base, found) == count


def brute_ties(base, models, density):
    """The paper's algorithm on one flat vector, by a sort."""
    flat = [torch.cat([(m[n] - base[n]).flatten() for n in sorted(base)]) for m in models]
    count = math.floor(density * len(flat[0]) + 0.5)
    trimmed = []
    for row in flat:
        keep = torch.sort(row.abs(), descending=True, stable=True).indices[:count]
        trimmed.append(torch.zeros_like(row).index_put((keep,), row[keep]))
    stacked = torch.stack(trimmed)
    sign = torch.sign(stacked.sum(0))
    sign[sign == 0] = 1 if sign.sum() > 0 else -1
    agrees = torch.sign(stacked) == sign
    merged = (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return torch.cat([base[n].flatten() for n in sorted(base)]) + merged


@pytest.mark.parametrize("density", [0.1, 0.2, 0.7])
def test_global_ties_is_the_papers_algorithm_on_one_vector(density):
    shapes = ((40, 30), (17,), (8, 9, 10))
    base = model(0, shapes=shapes)
    moves = [model(seed, shapes=shapes, spread=0.1) for seed in (1, 2, 3)]
    models = [{name: base[name] + move[name] for name in base} for move in moves]
    found = ties(base, models, density)
    flat = torch.cat([found[name].flatten() for name in sorted(found)])
    torch.testing.assert_close(flat, brute_ties(base, models, density), rtol=0, atol=1e-6)


@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_ties_within_tensors_is_pefts(merge):
    """Equal weights of 1 and no draws: elsewhere PEFT elects without weights, and a draw goes to plus."""
    parts = [model(seed, shapes=((50, 20),))["t0"] for seed in (1, 2, 3)]
    base = {"t0": torch.zeros(50, 20)}
    found = ties(base, [{"t0": part} for part in parts], density=0.3, scope="tensor", merge=merge)["t0"]
    expected = merge_utils.ties(parts, torch.ones(3), density=0.3)
    if merge == "sum":
        stacked = torch.stack([merge_utils.prune(part, 0.3, "magnitude") for part in parts])
        expected = (stacked * merge_utils.calculate_majority_sign_mask(stacked)).sum(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# --- DARE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_is_unbiased_and_keeps_exactly_the_rescaled_entries(density):
    delta = torch.tensor([0.5, -1.0, 2.0, 3.5]).expand(10_000, 4).contiguous()
    found = dare({"w": torch.zeros_like(delta)}, {"w": delta}, density, seed=5)["w"]
    held = found != 0
    assert torch.equal(found[held], (delta / density)[held])
    # 10,000 draws: four standard errors of their mean.
    error = 4 * delta[0].double().abs() * math.sqrt((1 - density) / density / 10_000)
    assert bool(((found.double().mean(0) - delta[0].double()).abs() < error).all())
    assert abs(held.double().mean().item() - density) < 4 * math.sqrt(density * (1 - density) / 40_000)


def test_darees_choice_is_its_seeds_and_its_tensors_alone():
    base, far = model(0), model(1)
    found = dare(base, far, 0.5, seed=1)
    assert same(found, dare(base, far, 0.5, seed=1)) and not same(found, dare(base, far, 0.5, seed=2))
    alone = dare({"t1": base["t1"]}, {"t1": far["t1"]}, 0.5, seed=1)
    assert torch.equal(alone["t1"], found["t1"]), "other tensors have no say"
    reordered = dare(dict(reversed(base.items())), far, 0.5, seed=1)
    assert all(torch.equal(reordered[name], found[name]) for name in found)


def test_dare_keeps_and_rescales_like_peft():
    """The draws differ, so the promise is compared: what is kept, PEFT multiplies by the same number."""
    delta = model(3, shapes=((30, 30),))["t0"]
    torch.manual_seed(0)
    theirs = merge_utils.dare_linear([delta], torch.ones(1), density=0.25)
    ours = dare({"t0": torch.zeros_like(delta)}, {"t0": delta}, 0.25)["t0"]
    both = (theirs != 0) & (ours != 0)
    assert int(both.sum()) > 20 and torch.equal(theirs[both], ours[both])


# --- Fisher -------------------------------------------------------------------------------------


def test_the_fisher_mean_is_the_minimum_of_the_summed_quadratics():
    a, b, at, bt = 2.0, 6.0, 1.0, 5.0  # curvatures and minima of two tasks
    found = fisher([one(at), one(bt)], [one(a), one(b)])["w"].item()
    assert found == (a * at + b * bt) / (a + b) == 4.0
    weighed = fisher([one(at), one(bt)], [one(a), one(b)], weights=[3, 1])["w"].item()
    assert weighed == pytest.approx((3 * a * at + b * bt) / (3 * a + b), rel=1e-6)


def test_equal_fishers_give_the_mean_and_so_do_weights_that_nobody_cares_about():
    models = [model(0), model(1)]
    flat = [{name: torch.full_like(tensor, 3.0) for name, tensor in m.items()} for m in models]
    close(fisher(models, flat), average(models), rtol=0, atol=1e-6)
    zero = [{name: torch.zeros_like(tensor) for name, tensor in m.items()} for m in models]
    close(fisher(models, zero), average(models), rtol=0, atol=1e-6)
    lone = [flat[0], zero[1]]
    assert (fisher(models, lone, floor=1e-12)["t0"] - models[0]["t0"]).abs().max() < 1e-5
    assert same(fisher([models[0]] * 3, [model(n, spread=0.0) for n in range(3)]), models[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("t1"), "Fisher of model 1: lacks t1"),
        (lambda f: f.update(t1=torch.ones(2)), "Fisher of model 1: t1 has shape .2., its weight has .11."),
        (lambda f: f.update(t1=-torch.ones(11)), "Fisher of model 1: t1 holds negative"),
        (lambda f: f.update(t1=torch.full((11,), math.nan)), "Fisher of model 1: t1 holds NaN"),
    ],
)
def test_a_fisher_that_is_none_is_refused_by_name(change, message):
    fishers = [{name: torch.ones_like(tensor) for name, tensor in model(0).items()} for _ in range(2)]
    change(fishers[1])
    with pytest.raises(MergeError, match=message):
        fisher([model(0), model(1)], fishers)


# --- LoRA ---------------------------------------------------------------------------------------


def lora(seed, rank, alpha):
    """Return a PEFT model of two layers with a LoRA that is not zero, and the LoRA's tensors."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    wrapped = get_peft_model(net, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "1"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return wrapped, get_peft_model_state_dict(wrapped)


def update(tensors, layer, scaling=1.0):
    names = [f"base_model.model.{layer}.lora_{part}.weight" for part in "BA"]
    return scaling * tensors[names[0]].double() @ tensors[names[1]].double()


def test_merged_loras_update_by_the_sum_of_their_updates():
    (_, first), (_, second) = lora(1, 2, 8), lora(2, 3, 3)
    merged = lora_arithmetic([first, second], [4.0, 1.0], scale=0.5, weights=[1.0, -2.0])
    for layer in "01":
        expected = 0.5 * (update(first, layer, 4.0) - 2 * update(second, layer, 1.0))
        torch.testing.assert_close(update(merged, layer), expected, rtol=0, atol=1e-5)
        assert merged[f"base_model.model.{layer}.lora_A.weight"].shape[0] == 5


def test_merged_loras_are_pefts_cat_and_not_its_linear():
    wrapped, first = lora(1, 2, 8)
    _, second = lora(2, 2, 8)
    wrapped.add_adapter("second", LoraConfig(r=2, lora_alpha=8, target_modules=["0", "1"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".second." in name:
                parameter.copy_(second[name.replace(".second.", ".")])
    merged, x = lora_arithmetic([first, second], [4.0, 4.0]), torch.randn(3, 6)
    outputs = {}
    for kind in ("cat", "linear"):
        wrapped.add_weighted_adapter(["default", "second"], [1.0, 1.0], kind, combination_type=kind)
        wrapped.set_adapter(kind)
        outputs[kind] = wrapped(x)
    plain = wrapped.get_base_model()
    weights = {layer: plain[int(layer)].base_layer.weight + update(merged, layer).float() for layer in "01"}
    hidden = x @ weights["0"].T + plain[0].base_layer.bias
    ours = hidden @ weights["1"].T + plain[1].base_layer.bias
    torch.testing.assert_close(ours, outputs["cat"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, outputs["linear"], rtol=1e-2, atol=1e-2), "the control: cross terms are no rounding"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.0.lora_A.weight"), "adapter 1: .*lora_A.weight is in only one of it and"),
        (lambda t: t.update({"classifier.weight": torch.ones(2)}), "classifier.weight is not one of LoRA's A and B"),
        (lambda t: t.update({"base_model.model.0.lora_A.weight": torch.ones(2, 9)}), "of another base"),
        (lambda t: t.update({"base_model.model.0.lora_A.weight": torch.ones(4, 6)}), "different ranks"),
        (lambda t: t["base_model.model.0.lora_A.weight"].fill_(math.inf), "holds NaN or infinity"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(change, message):
    first, second = lora(1, 2, 8)[1], {name: tensor.clone() for name, tensor in lora(2, 2, 8)[1].items()}
    change(second)
    with pytest.raises(MergeError, match=message):
        lora_arithmetic([first, second], [1.0, 1.0])


# --- what every rule holds to -------------------------------------------------------------------


@calls
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_rule_computes_in_float32_rounds_once_and_changes_no_source(call, dtype):
    base = model(0, dtype)
    models = [near(base, seed, dtype) for seed in (1, 2)]
    before = [{name: tensor.clone() for name, tensor in part.items()} for part in (base, *models)]
    found = call(base, models)
    assert all(map(same, (base, *models), before))
    wide = [{name: tensor.float() for name, tensor in part.items()} for part in (base, *models)]
    expected = {name: tensor.to(dtype) for name, tensor in call(wide[0], wide[1:]).items()}
    if call is not CALLS["greedy"]:  # which scores rounded models
        assert same(found, expected)
    assert all(tensor.data_ptr() != part[name].data_ptr() for name, tensor in found.items() for part in (base, *models))


@calls
def test_integers_stay_and_others_are_refused(call):
    base = {**model(0), "ids": torch.arange(4)}
    models = [{**near(model(0), seed), "ids": torch.arange(4)} for seed in (1, 2)]
    found = call(base, models)
    assert found["ids"].tolist() == [0, 1, 2, 3] and found["ids"].dtype == torch.int64
    models[0]["ids"] = torch.arange(1, 5)
    with pytest.raises(MergeError, match="ids holds other integers"):
        call(base, models)


def test_tied_tensors_are_merged_once_and_stay_tied():
    def tied(seed):
        made = model(seed)
        return {**made, "head": made["t0"]}

    base, models = tied(0), [tied(1), tied(2)]
    found = ties(base, models, density=0.3)
    assert found["head"].data_ptr() == found["t0"].data_ptr()
    alone = ties(model(0), [model(1), model(2)], density=0.3)
    assert same({name: found[name] for name in alone}, alone), "counted twice, other entries would be the largest"
    models[1]["head"] = models[1]["head"] + 1
    with pytest.raises(MergeError, match="model 1: t0 is not head, to which base ties it"):
        ties(base, models, density=0.3)


@calls
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("t1"), "(lacks|has) t1"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.update(t1=torch.zeros(12)), r"t1 has shape"),
        (lambda t: t.update(t1=torch.zeros(11, dtype=torch.int64)), "t1 is of torch"),
        (lambda t: t.update(t1=torch.zeros(11, dtype=torch.float8_e4m3fn)), "quantised"),
        (lambda t: t.update(t1=torch.zeros(11, dtype=torch.complex64)), "complex"),
        (lambda t: t["t1"].__setitem__(3, math.nan), "t1 holds NaN or infinity"),
        (lambda t: t["t1"].__setitem__(3, -math.inf), "t1 holds NaN or infinity"),
    ],
    ids=["missing", "extra", "shape", "integers", "quantised", "complex", "nan", "infinity"],
)
def test_a_model_that_does_not_fit_is_refused_by_name(call, change, message):
    base, models = model(0), [near(model(0), seed) for seed in (1, 2)]
    change(models[0])
    with pytest.raises(MergeError, match=message):
        call(base, models)


def test_a_result_that_the_dtype_cannot_hold_is_refused():
    base, far = {"w": torch.zeros(50).half()}, {"w": torch.full((50,), 6e4).half()}
    with pytest.raises(MergeError, match=r"w: the merged values exceed what torch.float16 can hold"):
        task_arithmetic(base, [far], scale=2.0)
    with pytest.raises(MergeError, match="exceed"):
        dare(base, far, density=0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda b, m: average([]), lambda b, m: average(m, [1]), lambda b, m: average(m, [1, -1]),
        lambda b, m: average(m, [0, 0]), lambda b, m: average(m, [1, math.nan]), lambda b, m: average(m, [1, math.inf]),
        lambda b, m: wise_ft(b, m[0], 1.5), lambda b, m: wise_ft(b, m[0], -0.1),
        lambda b, m: wise_ft(b, m[0], math.nan),
        lambda b, m: sfa(b, m[0], 1.1), lambda b, m: task_arithmetic(b, m, math.inf),
        lambda b, m: task_arithmetic(b, [], 1.0), lambda b, m: task_arithmetic(b, m, 1.0, [1, math.nan]),
        lambda b, m: ties(b, m, 0.0), lambda b, m: ties(b, m, 1.01), lambda b, m: ties(b, m, 0.5, weights=[1, -1]),
        lambda b, m: ties(b, m, 0.5, scope="layer"), lambda b, m: ties(b, m, 0.5, merge="max"),
        lambda b, m: dare(b, m[0], 0.0), lambda b, m: dare(b, m[0], 2.0), lambda b, m: fisher(m, m[:1]),
        lambda b, m: fisher(m, m, floor=0.0), lambda b, m: greedy([], len), lambda b, m: lora_arithmetic([], []),
        lambda b, m: lora_arithmetic([{}], [1.0, 1.0]), lambda b, m: lora_arithmetic([{}], [math.inf]),
    ],
)  # fmt: skip
def test_a_coefficient_out_of_range_is_refused_before_any_work(wrong):
    with pytest.raises(ConfigError):
        wrong(model(0), [model(1), model(2)])


def test_rules_import_with_torch_alone():
    names = plugins.available("merging")
    code = "import sys\n" + "\n".join(f"import hf_cl.merging.{name}" for name in names)
    code += "\nprint(sorted({'transformers', 'peft', 'datasets', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
