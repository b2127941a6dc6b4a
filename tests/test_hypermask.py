"""HyperMask: what the network gives, how much of it stays, what the regulariser holds, what a snapshot freezes."""

import family_models
import pytest
import tiny
import torch
from transformers import default_data_collator

from hf_cl.errors import ConfigError, RunError
from hf_cl.layers.base import Base
from hf_cl.layers.hypernetwork import Hypernetwork, exact_kept, semi_binary, straight_through
from hf_cl.layers.targets import find_head
from hf_cl.methods import hypermask
from hf_cl.proof import probe_digest
from hf_cl.training.method import Packed
from hf_cl.training.train_task import train_task

pytest_plugins = ["tiny"]

OPTIONS = {"density": 0.5, "hidden": 12, "embedding": 6, "learning_rate": 0.02}
LABELS = ("a", "b", "c")


def network(shapes=((6, 4), (4, 6), (6, 4)), compose="delta", seed=0):
    net = Hypernetwork(shapes, task_size=5, hidden=7, rank=2, compose=compose, seed=seed)
    net.add("task0", 0)
    net.add("task1", 1)
    return net


@pytest.fixture
def method(tiny_base):
    def make(seed=0, **changes):
        return hypermask.build(tiny_base(), hypermask.Options(**OPTIONS | changes), seed)

    return make


@pytest.fixture
def learn(token_task, arguments):
    def run(method, index, **changes):
        rows = token_task(seed=index, classes=3)
        args = arguments(**{"learning_rate": 0.02, "num_train_epochs": 3} | changes)
        return train_task(method, index, LABELS, rows, default_data_collator, args)

    return run


def logits(method, index):
    method.activate(index)
    return tiny.logits(method.model)


# --- the network ------------------------------------------------------------------------------------------


def test_its_size_grows_with_neither_tasks_nor_depth_but_by_a_layers_embedding():
    def size(net):
        return sum(tensor.numel() for tensor in net.shared().values())

    two, four = network(((6, 4), (4, 6))), network(((6, 4), (4, 6)) * 2)
    assert size(four) - size(two) == 2 * two.layers.shape[1]
    before = size(two)
    two.add("task2", 2)
    assert size(two) == before


def test_the_mask_is_the_papers_formula_and_keeps_exactly_its_share():
    net = network()
    a, b = net.factors("task0", 1)
    product = torch.stack([torch.stack([(a[i] * b[j]).sum() for j in range(6)]) for i in range(4)])
    kept = exact_kept(a, b, 0.25)
    assert int(kept.count_nonzero()) == 6
    mask = semi_binary(a, b, product.abs()[~kept].max())
    assert torch.equal(mask != 0, kept)
    assert torch.allclose(mask[kept], product.tanh().abs()[kept], rtol=1e-6)  # sums in another order
    assert bool((mask >= 0).all() and (mask < 1).all())


def test_with_a_density_of_one_nothing_is_zero():
    net = network()
    a, b = net.factors("task0", 0)
    assert bool((semi_binary(a, b, net.threshold("task0", 0, 1.0)) > 0).all())


def test_a_sampled_threshold_is_near_the_exact_one():
    net = network(((300, 200),))
    a, b = net.factors("task0", 0)
    for density in (0.05, 0.5):
        share = float((semi_binary(a, b, net.threshold("task0", 0, density)) != 0).float().mean())
        # A sample of 4,096 of 60,000: three standard errors of its quantile.
        assert share == pytest.approx(density, abs=3 * (density * (1 - density) / 4096) ** 0.5)


def test_a_straight_through_mask_has_one_level_and_the_masks_gradient():
    net = network()
    mask = semi_binary(*net.factors("task0", 0), net.threshold("task0", 0, 0.5))
    hard = straight_through(mask)
    kept = mask != 0
    assert torch.allclose(hard[kept], mask[kept].mean().expand(int(kept.sum())))
    assert not hard[~kept].any()
    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((m * weights).sum(), net.layers, retain_graph=True)[0] for m in (mask, hard)]
    assert torch.equal(*grads)


def test_it_begins_near_the_base_in_both_forms_and_by_its_seed_alone():
    delta, prune = (network(((64, 64),), compose) for compose in ("delta", "prune"))
    with torch.no_grad():
        means = [float(semi_binary(*n.factors("task0", 0), torch.tensor(-1.0)).mean()) for n in (delta, prune)]
    assert means[0] < 0.2 < 0.85 < means[1]
    state = torch.get_rng_state()
    again = network(((64, 64),))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(delta.parameters(), again.parameters(), strict=True))
    assert not torch.equal(network(((64, 64),), seed=1).layers, again.layers)
    assert not torch.equal(*(again.tasks[key] for key in ("task0", "task1")))


# --- the regulariser ----------------------------------------------------------------------------------------


def test_right_after_a_task_begins_the_regulariser_is_zero_and_pulls_at_no_new_embedding(method, learn):
    learned = method()
    learn(learned, 0)
    learned.begin(1, LABELS)
    assert learned.drift().detach() == 0
    with torch.no_grad():
        learned.net.layers.add_(0.1)
    drift = learned.drift()
    assert drift.detach() > 0
    drift.backward()
    assert learned.net.layers.grad.any()
    assert learned.net.tasks["task1"].grad is None
    assert learned.net.tasks["task0"].grad is None, "a finished task's embedding is frozen"


def test_it_is_added_to_the_training_loss_alone(method, learn):
    learned = method(regulariser=2.0)
    learn(learned, 0)
    learned.begin(1, LABELS)
    with torch.no_grad():
        learned.net.layers.add_(0.1)
    learned.refresh()
    inputs = {"input_ids": torch.arange(10).view(2, 5), "labels": torch.tensor([0, 1])}

    def loss():
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the dropout
            return learned.model(**inputs).loss

    learned.model.train()
    found, drift = loss(), learned.drift().detach()
    held, learned._held = learned._held, None
    plain = loss()
    learned._held = held
    assert torch.equal(found, plain + 2.0 * drift)
    assert drift > 0
    with torch.no_grad():
        assert torch.equal(loss(), plain)
    learned.model.eval()
    assert learned.model(**inputs).loss < found, "nor to that of an evaluation"


def test_without_it_outputs_for_earlier_tasks_drift_further_and_with_it_they_still_move(method, learn):
    found = {}
    for weight in (0.0, 0.01, 10.0):
        learned = method(regulariser=weight)
        learn(learned, 0)
        first = learned.net.outputs(learned.net.tasks["task0"][None]).clone()
        before = logits(learned, 0)
        learn(learned, 1)
        now = learned.net.outputs(learned.net.tasks["task0"][None])
        found[weight] = float((now - first).pow(2).sum())
        assert not torch.equal(logits(learned, 0), before), "it is held, not exact"
        assert learned.facts(1)["drift"] == pytest.approx(found[weight], rel=1e-4)
    assert found[0.0] > 2 * found[0.01] > 2 * found[10.0] > 0


# --- snapshots ----------------------------------------------------------------------------------------------


def test_a_snapshot_keeps_earlier_tasks_bit_identical_and_stores_bits(method, learn):
    learned = method(snapshot=True, density=0.25)
    before = []
    for index in range(3):
        learn(learned, index)
        before.append((logits(learned, index), learned.parts(index), probe_digest(learned.model)))
        for earlier, (held, parts, probe) in enumerate(before):
            assert torch.equal(logits(learned, earlier), held)
            assert (learned.parts(earlier), probe_digest(learned.model)) == (parts, probe)
    packed = learned.pack(0)
    assert set(packed.task) == {"masks", "lengths", "levels"}
    for place, (n, m) in enumerate(learned.net.shapes):
        mask = learned.final_mask(0, place)
        assert int(mask.count_nonzero()) == round(n * m * 0.25)
        assert len(mask.unique()) == 2
    again = method(snapshot=True, density=0.25)
    for index in range(3):
        again.restore(index, LABELS, learned.pack(index))
    assert torch.equal(logits(again, 2), before[2][0]), "it needs the hypernetwork no more"


def test_the_same_check_sees_a_task_without_a_snapshot_change(method, learn):
    learned = method(density=0.25)
    learn(learned, 0)
    before, parts = logits(learned, 0), learned.parts(0)
    learn(learned, 1)
    assert not torch.equal(logits(learned, 0), before)
    assert learned.parts(0) != parts
    assert learned.parts(0)["base"] == parts["base"]
    assert learned.parts(0)["embedding"] == parts["embedding"]


@pytest.mark.parametrize("family", family_models.CONFIGS)
def test_every_family_of_the_table_begins_and_its_weight_is_that_of_the_formula(family):
    model = family_models.make(family)
    base = Base(model, None, family, tuple(find_head(model, None, ())))
    method, inputs = hypermask.build(base, hypermask.Options(**OPTIONS), 0), family_models.batch()
    method.begin(0, LABELS)
    method.model(**inputs, labels=torch.zeros(len(inputs["input_ids"]), dtype=torch.long)).loss.backward()
    assert all(bool(block.weight.grad.any()) for block in method.net.blocks.values())
    method.commit(0)
    layer = method.layers[-1]
    expected = layer.original.weight + method.final_mask(0, len(method.layers) - 1) * layer.hyper_values
    assert torch.equal(layer.hyper_weight, expected)


# --- what a task costs, and bad input -------------------------------------------------------------------------


def test_a_task_costs_its_embedding_and_its_head_and_sizes_are_stated(method, learn):
    learned = method()
    learn(learned, 0)
    packed = learned.pack(0)
    assert {name: tuple(tensor.shape) for name, tensor in packed.task.items()} == {"embedding": (6,)}
    facts = learned.facts(0)
    assert facts["hypernetwork"] == sum(tensor.numel() for tensor in learned.shared().values())
    assert facts["masked_weights"] == sum(layer.original.weight.numel() for layer in learned.layers)


@pytest.mark.parametrize("compose", ["delta", "prune"])
def test_masks_learn_in_both_forms_below_a_head_that_does_not(base_folder, tmp_path, compose):
    options = hypermask.Options(
        **OPTIONS | {"compose": compose, "density": 1.0, "scale": 2.0, "head_learning_rate": 1e-9}
    )
    learner = tiny.learner(base_folder, options, tmp_path, training={"num_train_epochs": 12})
    assert learner.learn(tiny.task("pets"))["metrics"]["pets"]["accuracy"] >= 0.9


def test_a_file_of_the_other_kind_is_refused(method, learn):
    learned = method()
    learn(learned, 0)
    with pytest.raises(RunError, match="task 0: its file holds embedding"):
        method(snapshot=True).restore(0, LABELS, learned.pack(0))
    with pytest.raises(RunError, match="task 0: its file holds nothing_known"):
        method().restore(0, LABELS, Packed({"nothing_known": torch.zeros(1)}, learned.pack(0).head))


def test_a_best_model_that_nobody_could_restore_is_refused(method, learn):
    with pytest.raises(ConfigError, match="load_best_model_at_end: masks of the best step"):
        learn(method(), 0, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
