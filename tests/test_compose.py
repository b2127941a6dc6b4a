import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_cl.errors import BaseModelError
from hf_cl.layers import store as store_module
from hf_cl.layers.families import family_of
from hf_cl.layers.store import MaskStore
from hf_cl.layers.targets import find_targets
from hf_cl.masks.compose import COMPOSES, TrainedWeight, fitting_scale, layer_scale, start_store
from hf_cl.masks.signs import sign_tensor

PATH, SEED = "encoder.layer.0.output.dense", 7
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def pretrained(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (6, 8)) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)


def random_mask(density: float, seed: int = 1, shape: tuple[int, int] = (6, 8)) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def store_of(compose: str, weight: Tensor, scale: float = 1.5) -> MaskStore:
    return MaskStore(weight, compose=compose, seed=SEED, path=PATH, scale=layer_scale(compose, weight, scale))


def moved_store(compose: str, weight: Tensor) -> MaskStore:
    """A store whose values tasks have trained: no longer of one magnitude."""
    store = store_of(compose, weight)
    store.values.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)) * 0.03)
    return store


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(BITS[one.dtype]), other.view(BITS[other.dtype]))


# --- scale and start values ---------------------------------------------------------------------


def test_the_scale_of_delta_is_a_share_of_the_weights_deviation():
    weight = torch.tensor([[1.0, -1.0], [3.0, -3.0]])  # mean 0, mean square 5
    assert layer_scale("delta", weight, 2.0) == float(torch.tensor(2 * math.sqrt(5)))


def test_the_scale_of_random_is_a_share_of_he_initialisation():
    assert layer_scale("random", torch.zeros(3, 8), 3.0) == 1.5  # sqrt(2 / 8) is one half


def test_prune_has_no_scale():
    assert layer_scale("prune", pretrained(), 3.0) == 1.0
    assert fitting_scale("prune", 0.01) == 1.0


def test_what_a_mask_can_move_is_the_same_at_every_density():
    assert [fitting_scale("delta", density) * density for density in (0.001, 0.01, 0.5)] == [0.01] * 3


def test_random_masks_keep_the_variance_of_a_sum():
    generator, inputs = (
        torch.Generator().manual_seed(0),
        torch.randn(4000, 512, generator=torch.Generator().manual_seed(1)),
    )
    for density in (0.05, 0.5):
        scale = layer_scale("random", torch.zeros(64, 512), fitting_scale("random", density))
        weight = start_store("random", torch.zeros(64, 512), SEED, PATH, scale)
        kept = torch.where(torch.rand(64, 512, generator=generator) < density, weight, 0.0)
        # He: twice the mean square of the inputs; 64 x 4,000 sums over few random rows are within a tenth of it.
        assert (inputs @ kept.T).square().mean() == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compose", COMPOSES)
def test_a_scale_is_a_float32_number_and_comes_back_from_json(compose, dtype):
    scale = layer_scale(compose, pretrained(dtype), 0.7)
    assert isinstance(scale, float) and scale == torch.tensor(scale, dtype=torch.float32).item()
    assert json.loads(json.dumps(scale)) == scale


@pytest.mark.parametrize("compose", ["delta", "random"])
def test_start_values_are_signs_times_one_magnitude(compose):
    weight = pretrained()
    scale = layer_scale(compose, weight, 1.5)
    values = start_store(compose, weight, SEED, PATH, scale)
    assert values.dtype == torch.float32
    assert torch.equal(values, sign_tensor(SEED, PATH, (6, 8)) * scale)
    assert set(values.abs().unique().tolist()) == {scale}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prune_starts_at_the_pretrained_weight(dtype):
    weight = pretrained(dtype)
    values = start_store("prune", weight, SEED, PATH, 1.0)
    assert values.dtype == torch.float32 and torch.equal(values, weight.float())
    values.zero_()
    assert bool(weight.any())


# --- the composed weight ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("compose", COMPOSES)
def test_the_composed_weight_is_a_plus_mask_times_v(compose, density, dtype):
    weight, mask = pretrained(dtype), random_mask(density)
    store = moved_store(compose, weight)
    before = weight.clone()
    store.show(weight, mask)
    base = weight.float() if compose == "delta" else torch.zeros(6, 8)
    for row in range(6):
        for column in range(8):
            value = base[row, column] + (store.values[row, column] if mask[row, column] else 0.0)
            assert store.weight[row, column] == value.to(dtype)
    assert store.weight.dtype == dtype and same_bits(weight, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.125, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("compose", COMPOSES)
def test_one_pass_and_entry_by_entry_give_the_same_bits(compose, density, dtype, monkeypatch):
    weight, mask = pretrained(dtype), random_mask(density)
    shown = {}
    for dense_from in (-1.0, 1.0):  # always one pass; never
        monkeypatch.setattr(store_module, "DENSE_FROM", dense_from)
        store = moved_store(compose, weight)
        store.show(weight, mask)
        shown[dense_from] = store.weight
    assert same_bits(shown[-1.0], shown[1.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0.05, 0.9])
@pytest.mark.parametrize("compose", COMPOSES)
def test_showing_and_clearing_gives_a_back(compose, first, dtype):
    weight = pretrained(dtype)
    store = moved_store(compose, weight)
    untouched = weight if compose == "delta" else torch.zeros(6, 8, dtype=dtype)
    assert same_bits(store.weight, untouched)
    store.show(weight, random_mask(first))
    assert not same_bits(store.weight, untouched)
    store.clear(weight)
    assert same_bits(store.weight, untouched)
    store.clear(weight)
    assert same_bits(store.weight, untouched)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("a", "b"), [(0.05, 0.1), (0.05, 0.9), (0.9, 0.05), (0.9, 0.5), (0.1, 0.0)])
@pytest.mark.parametrize("compose", COMPOSES)
def test_there_and_back_again_gives_the_same_bits(compose, a, b, dtype):
    weight = pretrained(dtype)
    store = moved_store(compose, weight)
    store.show(weight, random_mask(a))
    before = store.weight.clone()
    store.show(weight, random_mask(b, seed=2))
    between = store.weight.clone()
    store.show(weight, random_mask(a))
    assert same_bits(store.weight, before) and not same_bits(between, before)


def test_what_was_written_follows_the_weight_to_another_device():
    store = moved_store("delta", pretrained())
    store.show(pretrained(), random_mask(0.05))
    store.to("meta")
    assert {tensor.device.type for tensor in (store.weight, *store._written)} == {"meta"}


@pytest.mark.parametrize("density", [0.05, 0.9])
@pytest.mark.parametrize("compose", COMPOSES)
def test_values_in_training_leave_no_trace_once_another_task_is_shown(compose, density):
    weight, mask = pretrained(), random_mask(density)
    store = moved_store(compose, weight)
    values, where = store.values.clone(), mask.view(-1).nonzero().squeeze(1)
    store.show(weight, mask)
    store.write(store.base_at(weight, where), where, torch.full((where.shape[0],), 0.5))
    base = weight if compose == "delta" else torch.zeros(6, 8)
    assert torch.equal(store.weight[mask], (base + 0.5)[mask]) and torch.equal(store.weight[~mask], base[~mask])
    assert torch.equal(store.values, values)
    store.show(weight, random_mask(0.05, seed=3))
    fresh = moved_store(compose, weight)
    fresh.show(weight, random_mask(0.05, seed=3))
    assert same_bits(store.weight, fresh.weight)


@pytest.mark.parametrize("compose", COMPOSES)
def test_a_reset_store_composes_a_whatever_was_written(compose):
    weight = pretrained()
    store = moved_store(compose, weight)
    store.show(weight, random_mask(0.05))
    store.weight.fill_(3.0)
    store.reset(weight)
    assert same_bits(store.weight, weight if compose == "delta" else torch.zeros(6, 8))
    assert same_bits(store.start(weight), store_of(compose, weight).values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_full_mask_in_prune_is_the_base_bit_for_bit(dtype, tiny_model):
    model = tiny_model().to(dtype)
    tokens = torch.arange(10).view(2, 5)
    targets = find_targets(model, family_of(model).targets, ["classifier"])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        for name in targets:
            linear = model.get_submodule(name)
            store = store_of("prune", linear.weight)
            store.show(linear.weight, torch.ones_like(linear.weight, dtype=torch.bool))
            assert same_bits(store.weight, linear.weight.detach())
            linear.weight = nn.Parameter(store.weight)
        assert torch.equal(model(input_ids=tokens).logits, expected)


def test_negative_zeros_of_the_base_stay_negative():
    weight = torch.tensor([[-0.0, 1.0]])
    for density in (0.0, 1.0):
        store = store_of("prune" if density else "delta", weight)
        store.show(weight, torch.full((1, 2), bool(density)))
        assert same_bits(store.weight, weight)


def test_a_bfloat16_base_keeps_its_store_in_float32():
    weight = pretrained(torch.bfloat16)
    store = store_of("delta", weight)
    assert store.values.dtype == torch.float32 and store.weight.dtype == torch.bfloat16
    assert store.owner.dtype == torch.int16
    full = torch.ones(6, 8, dtype=torch.bool)
    store.show(weight, full)
    # Rounded once, from the float32 sum.
    assert same_bits(store.weight, (weight.float() + store.values).bfloat16())
    # A value below half a unit in bfloat16's last place is kept, though the weight cannot show it.
    store.values.copy_(torch.full((6, 8), 1e-7))
    store.show(weight, full)
    assert same_bits(store.weight, weight) and bool((store.values == 1e-7).all())


def test_a_store_is_never_saved_with_a_model():
    assert store_of("delta", pretrained()).state_dict() == {}


# --- casts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_store_refuses_a_cast_and_stays_as_it_is(dtype):
    store = moved_store("delta", pretrained())
    before = store.values.clone()
    with pytest.raises(BaseModelError, match=r"output\.dense: the values that tasks own are float32"):
        nn.ModuleDict({"store": store}).to(dtype)
    assert store.values.dtype == torch.float32 and torch.equal(store.values, before)
    assert store.weight.dtype == torch.float32


@pytest.mark.parametrize("target", ["cpu", torch.float32])
def test_a_move_without_a_cast_changes_no_bit(target):
    weight = pretrained()
    store = moved_store("delta", weight)
    store.show(weight, random_mask(0.3))
    values, composed = store.values.clone(), store.weight.clone()
    store.to(target)
    assert torch.equal(store.values, values) and torch.equal(store.weight, composed)


def test_a_cast_of_a_bfloat16_base_to_float32_is_refused_or_composes_anew():
    # The invariant: the composed weight equals A + M * V bit for bit however it was reached.
    weight, mask = pretrained(torch.bfloat16), random_mask(0.5)
    store = moved_store("delta", weight)
    store.show(weight, mask)
    try:
        store.float()
    except BaseModelError:
        assert store.weight.dtype == torch.bfloat16
        return
    after_the_cast = store.weight.clone()
    store.show(weight.float(), mask)
    assert torch.equal(after_the_cast, store.weight)


# --- gradients ----------------------------------------------------------------------------------


def loss_of(weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(3, 4, 8, generator=generator), torch.randn(3, 4, 6, generator=generator)
    return (F.linear(x.to(weight.dtype), weight).tanh().float() - y).pow(2).sum()


def dense_gradient(weight: Tensor) -> Tensor:
    """dL/dW of a plain leaf."""
    leaf = weight.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
    return gradient


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("compose", COMPOSES)
def test_a_scores_gradient_is_that_of_a_real_mask_in_the_formula(compose, density):
    weight, mask = pretrained(), random_mask(density)
    store = moved_store(compose, weight)
    store.show(weight, mask)
    scores, values = torch.randn(6, 8).requires_grad_(), torch.zeros(5, requires_grad=True)
    loss_of(TrainedWeight.apply(scores, values, store.weight, store.values, None, False)).backward()

    real_mask = mask.float().requires_grad_()
    base = weight if compose == "delta" else torch.zeros(6, 8)
    loss_of(base + real_mask * store.values).backward()
    # Exactly: both multiply the same dL/dW by V, entry by entry.
    assert torch.equal(scores.grad, real_mask.grad)
    # Unmasked entries learn too, and the phase that is off gets nothing.
    assert bool((scores.grad[~mask] != 0).all()) and values.grad is None


def test_where_magnitudes_rank_the_gradient_has_the_scores_sign():
    weight = pretrained()
    store = store_of("delta", weight)
    store.show(weight, random_mask(0.2))
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(6, 8, generator=generator)
    scores[0, 0], scores[0, 1] = 0.0, -0.0  # never move: |score| has no slope at 0 here
    scores.requires_grad_()
    loss_of(TrainedWeight.apply(scores, torch.zeros(2), store.weight, store.values, None, True)).backward()
    assert torch.equal(scores.grad, dense_gradient(store.weight) * store.values * scores.detach().sign())
    assert scores.grad[0, :2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("magnitude", [False, True])
def test_a_bfloat16_base_gives_float32_gradients(magnitude):
    weight = pretrained(torch.bfloat16)
    store = store_of("delta", weight)
    store.show(weight, random_mask(0.2))
    scores = torch.randn(6, 8, generator=torch.Generator().manual_seed(6)).requires_grad_()
    loss_of(TrainedWeight.apply(scores, torch.zeros(2), store.weight, store.values, None, magnitude)).backward()
    sign = scores.detach().sign() if magnitude else 1.0
    assert scores.grad.dtype == torch.float32
    assert torch.equal(scores.grad, dense_gradient(store.weight).float() * store.values * sign)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_values_gradient_is_the_dense_one_gathered(dtype):
    weight, mask = pretrained(dtype), random_mask(0.4)
    store = store_of("delta", weight)
    store.show(weight, mask)
    where = mask.view(-1).nonzero().squeeze(1)[::2]
    scores = torch.randn(6, 8, requires_grad=True)
    values = torch.zeros(where.shape[0] + 3, requires_grad=True)
    loss_of(TrainedWeight.apply(scores, values, store.weight, store.values, where, False)).backward()
    used, unused = values.grad[:-3], values.grad[-3:]
    assert values.grad.dtype == torch.float32
    assert torch.equal(used, dense_gradient(store.weight).view(-1)[where].float())
    assert unused.tolist() == [0.0, 0.0, 0.0] and scores.grad is None


def test_a_task_with_nothing_to_train_gets_zeros():
    weight = pretrained()
    store = store_of("delta", weight)
    scores, values = torch.randn(6, 8, requires_grad=True), torch.zeros(4, requires_grad=True)
    nowhere = torch.empty(0, dtype=torch.int64)
    loss_of(TrainedWeight.apply(scores, values, store.weight, store.values, nowhere, False)).backward()
    assert values.grad.tolist() == [0.0] * 4 and scores.grad is None


def test_two_backward_passes_add_up():
    weight = pretrained()
    store = store_of("delta", weight)
    scores = torch.randn(6, 8, requires_grad=True)
    for _ in range(2):
        loss_of(TrainedWeight.apply(scores, torch.zeros(2), store.weight, store.values, None, False)).backward()
    assert torch.equal(scores.grad, 2 * dense_gradient(store.weight) * store.values)


def test_a_weight_that_is_read_twice_in_one_forward_gets_both_gradients():
    weight = pretrained()
    store = store_of("delta", weight)
    scores = torch.randn(6, 8, requires_grad=True)
    once = TrainedWeight.apply(scores, torch.zeros(2), store.weight, store.values, None, False)
    (loss_of(once) + loss_of(once)).backward()
    assert torch.equal(scores.grad, 2 * dense_gradient(store.weight) * store.values)


@pytest.mark.parametrize("where", [None, torch.arange(4)], ids=["mask phase", "weight phase"])
def test_a_weight_that_changes_between_forward_and_backward_is_an_error(where):
    weight = pretrained()
    store = store_of("delta", weight)
    scores = torch.randn(6, 8, requires_grad=True)
    x = torch.randn(3, 8, requires_grad=True)
    values = torch.zeros(4, requires_grad=True)
    loss = F.linear(x, TrainedWeight.apply(scores, values, store.weight, store.values, where, False)).sum()
    store.show(weight, random_mask(0.5))
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()
