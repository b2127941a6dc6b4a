"""WSN: scores and values in one step, owned entries read and never written, masks that made the stored values."""

import itertools

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, default_data_collator

from hf_cl.errors import ConfigError, OwnershipError
from hf_cl.masks.compose import JointWeight
from hf_cl.masks.select import topk_mask
from hf_cl.masks.values import round_values
from hf_cl.methods import wsn
from hf_cl.ownership.owner import FREE
from hf_cl.training.train_task import train_task
from hf_cl.tuner import MaskConfig

OPTIONS = {"density": 0.2, "scores_learning_rate": 0.05, "values_learning_rate": 0.05}
LABELS = ("a", "b", "c")


@pytest.fixture
def method(tiny_base):
    def make(**changes):
        return wsn.build(tiny_base(), wsn.Options(**OPTIONS | changes), seed=0)

    return make


@pytest.fixture
def learn(token_task, arguments):
    def run(method, index, *callbacks, **changes):
        rows = token_task(seed=index, classes=3)
        return train_task(method, index, LABELS, rows, default_data_collator, arguments(**changes), callbacks=callbacks)

    return run


class At(TrainerCallback):
    """Calls a function of the tuner at each event of a name; it comes after the method's own callback."""

    def __init__(self, event, act):
        self.act = act
        setattr(self, event, self.run)

    def run(self, args, state, control, **kwargs):
        self.act(kwargs["model"].base_model)


@pytest.mark.parametrize("magnitude", [False, True])
def test_both_gradients_are_those_of_the_formula_by_hand(magnitude):
    generator = torch.Generator().manual_seed(0)
    scores, values, base, x = (torch.randn(4, 3, generator=generator) for _ in range(4))
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
    free = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.bool)
    store = torch.randn(4, 3, generator=generator)
    read = values.where(free, store)
    ours = [scores.clone().requires_grad_(), values.clone().requires_grad_()]
    weight = JointWeight.apply(*ours, base + mask * read, read, mask & free, magnitude)
    (x * weight).pow(2).sum().backward()
    # By autograd, with the mask as a number that passes its gradient straight through to the scores.
    theirs = [scores.clone().requires_grad_(), values.clone().requires_grad_()]
    ranked = theirs[0].abs() if magnitude else theirs[0]
    straight = mask.float() + (ranked - ranked.detach())
    through = base + straight * theirs[1].where(free, store)
    (x * through).pow(2).sum().backward()
    assert torch.allclose(ours[0].grad, theirs[0].grad, rtol=1e-5)  # one product in another order
    assert torch.equal(ours[1].grad, theirs[1].grad)
    assert not ours[1].grad[~(mask & free)].any()


def test_scores_and_values_move_in_the_same_step_and_masks_follow_the_scores(method, learn):
    seen = []

    def look(tuner):
        layer = tuner.mask_layers()[0]
        adapter = tuner.active_adapters[0]
        seen.append([t.detach().clone() for t in (layer.hfcl_scores[adapter], layer.hfcl_values[adapter])])
        live = layer.ranked(adapter) > layer.hfcl_threshold[adapter]
        assert torch.equal(layer.live_mask, live)
        expected = torch.where(live, layer.base_layer.weight + layer.read_values(adapter), layer.base_layer.weight)
        assert torch.equal(layer.store.weight, expected), "the composed weight is that of this step's values"

    learn(method(), 0, At("on_step_begin", look))
    for kind in range(2):
        assert all(not torch.equal(a[kind], b[kind]) for a, b in itertools.pairwise(seen))


def test_the_committed_values_are_those_at_the_committed_mask_of_the_same_step(method, learn):
    last = {}

    def look(tuner):
        for layer in tuner.mask_layers():
            last[layer.path] = [
                layer.hfcl_scores["task0"].detach().clone(),
                layer.hfcl_values["task0"].detach().clone(),
            ]

    learned = method()
    learn(learned, 0, At("on_step_end", look))
    for layer in learned.tuner.mask_layers():
        scores, values = last[layer.path]
        mask = topk_mask(scores, layer.count("task0"))
        assert torch.equal(layer.mask("task0"), mask)
        where = mask.view(-1).nonzero().squeeze(1)
        rounded = round_values(values.view(-1)[where], where, mask.shape[1], "bfloat16")
        assert torch.equal(layer.store.values[mask], rounded)


def test_the_best_state_brings_back_mask_and_values_of_one_step(method, learn):
    steps, metrics = [], []

    def look(tuner):
        steps.append([layer.hfcl_scores["task0"].detach().clone() for layer in tuner.mask_layers()])
        steps[-1] += [layer.hfcl_values["task0"].detach().clone() for layer in tuner.mask_layers()]

    class Metric(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            found.append(metrics["eval_loss"])

    found = metrics
    learned = method(density_warmup=0.0)
    learn(
        learned, 0, At("on_step_end", look), Metric(), EarlyStoppingCallback(50), num_train_epochs=3, learning_rate=0.2,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    best = steps[min(range(len(found)), key=found.__getitem__)]
    layers = learned.tuner.mask_layers()
    for layer, scores, values in zip(layers, best[: len(layers)], best[len(layers) :], strict=True):
        mask = topk_mask(scores, layer.count("task0"))
        assert torch.equal(layer.mask("task0"), mask)
        assert torch.equal(layer.store.values[mask], values[mask].bfloat16().float())


def test_owned_entries_are_read_and_whatever_stands_in_the_private_tensor_there_is_not(method, learn):
    learned = method()
    learn(learned, 0)
    layers = learned.tuner.mask_layers()
    owned = [layer.store.owner == 0 for layer in layers]
    before = [layer.store.values[own].clone() for layer, own in zip(layers, owned, strict=True)]

    def spoil(tuner):
        with torch.no_grad():
            for layer, own in zip(layers, owned, strict=True):
                layer.hfcl_values["task1"][own] = 1e6

    learn(learned, 1, At("on_step_begin", spoil))
    assert learned.facts(1)["overlap"] > 0
    for layer, own, values in zip(layers, owned, before, strict=True):
        assert torch.equal(layer.store.values[own], values)
        assert float(layer.store.values.abs().max()) < 1e3


def test_the_union_grows_and_what_a_task_owns_is_what_was_free_of_its_mask(method, learn):
    learned, used = method(start="fresh"), [0.0]
    for index in range(3):
        learn(learned, index)
        used.append(learned.tuner.capacity_used())
        for layer in learned.tuner.mask_layers():
            assert int(layer.mask(f"task{index}").count_nonzero()) == layer.count(f"task{index}")
        size = sum(layer.store.owner.numel() for layer in learned.tuner.mask_layers())
        assert learned.facts(index)["trainable"] == round((used[-1] - used[-2]) * size)
    assert used == sorted(used)
    assert used[-1] > used[1]


@pytest.mark.parametrize(("start", "equal"), [("last", True), ("fresh", False)])
def test_a_mask_begins_as_the_last_tasks_or_fresh(method, learn, start, equal):
    learned, first = method(start=start), []

    def look(tuner):
        adapter = tuner.active_adapters[0]
        first.append([layer.mask(adapter) for layer in tuner.mask_layers()])

    for index in range(3):
        learn(learned, index, At("on_train_begin", look))
    for index in (1, 2):
        last = [layer.mask(f"task{index - 1}") for layer in learned.tuner.mask_layers()]
        assert all(map(torch.equal, first[index], last)) is equal


def test_where_nothing_is_free_a_task_is_refused_before_it_trains(method, learn):
    learned = method(density=1.0)
    learn(learned, 0)
    assert not any(bool((layer.store.owner == FREE).any()) for layer in learned.tuner.mask_layers())
    with pytest.raises(OwnershipError, match="no layer has a free entry left"):
        learn(learned, 1)


def test_values_that_train_with_the_mask_are_claimed_ones():
    with pytest.raises(ConfigError, match="joint: trains values with the mask, but trains is 'nothing'"):
        MaskConfig(joint=True)
