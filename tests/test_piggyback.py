"""Piggyback: dense at the start and then the base bit for bit, strict at the threshold, exact whatever the order."""

import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback, default_data_collator

from hf_cl.capacity import entropy
from hf_cl.errors import ConfigError
from hf_cl.masks.coding import decode, encode
from hf_cl.methods import piggyback
from hf_cl.training.train_task import train_task
from hf_cl.tuner import MaskConfig

CONFIG = {"density": 1.0, "compose": "prune", "threshold": 0.005, "first_score": 0.01, "num_labels": 3}
LABELS = ("a", "b", "c")


@pytest.fixture
def method(tiny_base):
    def make(**changes):
        return piggyback.build(tiny_base(), piggyback.Options(**{"scores_learning_rate": 0.01} | changes), seed=0)

    return make


@pytest.fixture
def learn(token_task, arguments):
    def run(method, index, *callbacks, seed=None, **changes):
        rows = token_task(seed=index if seed is None else seed, classes=3)
        return train_task(method, index, LABELS, rows, default_data_collator, arguments(**changes), callbacks=callbacks)

    return run


def hidden(model, **more):
    ids = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(9))
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_first_step_the_logits_are_the_bases_bit_for_bit(tiny_model, dtype):
    base = tiny_model().to(dtype)
    before = hidden(base)
    model = get_peft_model(base, MaskConfig(**CONFIG), adapter_name="news")
    after = hidden(model)
    assert all(map(torch.equal, before.hidden_states, after.hidden_states))
    # The head is the task's own, so the base's logits are those of the base's states under that head.
    pooled = base.bert.pooler(before.hidden_states[-1])
    head = model.base_model.own_layers()[-1].hfcl_copy["news"]
    assert torch.equal(after.logits, head(pooled.float()))
    masks = [layer.mask("news") for layer in model.base_model.mask_layers()]
    assert all(bool(mask.all()) for mask in masks)


def test_a_score_on_the_threshold_is_out_and_the_next_float_above_it_is_in(tiny_model):
    model = get_peft_model(tiny_model(), MaskConfig(**CONFIG), adapter_name="news")
    layer = model.base_model.mask_layers()[0]
    on = np.float32(CONFIG["threshold"])
    with torch.no_grad():
        layer.hfcl_scores["news"][0, :3] = torch.tensor([on, np.nextafter(on, np.float32(1)), -1.0])
    model.base_model.refresh_masks("news")
    expected = layer.base_layer.weight.clone()
    expected[0, 0] = expected[0, 2] = 0
    assert layer.mask("news")[0, :3].tolist() == [False, True, False]
    assert torch.equal(layer.store.weight, expected)
    model.base_model.commit("news")
    assert layer.mask("news")[0, :3].tolist() == [False, True, False]


def test_scores_get_the_gradient_of_the_weight_times_the_weight(tiny_model):
    model = get_peft_model(tiny_model(), MaskConfig(**CONFIG), adapter_name="news")
    layer = model.base_model.mask_layers()[3]
    inputs, grads = [], []
    layer.register_forward_hook(lambda _, x, out: (inputs.append(x[0]), out.register_hook(grads.append))[0])
    ids = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(9))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    weight = torch.einsum("bto,bti->oi", grads[0], inputs[0])
    ours = layer.hfcl_scores["news"].grad
    assert torch.allclose(ours, weight * layer.base_layer.weight, rtol=1e-4, atol=1e-9)  # sums in another order
    assert ours.any()


def test_the_base_stays_as_it_was_under_decay_and_masks_hold_zeros_of_the_tasks_own_number(method, learn):
    learned = method()
    before = {name: tensor.clone() for name, tensor in learned.base.model.state_dict().items()}
    learn(learned, 0, weight_decay=0.5)
    layers = learned.tuner.mask_layers()
    densities = [float(layer.mask("task0").float().mean()) for layer in layers]
    assert all(0.5 < density < 1 for density in densities)
    assert len(set(densities)) > 1, "no count is imposed"
    for layer in layers:
        assert torch.equal(layer.base_layer.weight, before[f"bert.{layer.path}.weight"])
        assert torch.equal(layer.store.values, layer.base_layer.weight)
        shown = torch.where(layer.mask("task0"), layer.base_layer.weight, torch.zeros(()))
        assert torch.equal(layer.store.weight, shown)


def test_masks_follow_the_scores_in_every_step(method, learn):
    counts = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            layer = kwargs["model"].base_model.mask_layers()[0]
            live = layer.hfcl_scores["task0"] > 0.005
            assert torch.equal(layer.live_mask, live)
            assert torch.equal(layer.store.weight, layer.base_layer.weight * live)
            counts.append(int(live.count_nonzero()))

    learn(method(), 0, Look())
    assert counts[0] > counts[-1]


def test_a_tasks_mask_is_the_same_whatever_was_learned_before_it(method, learn):
    after, alone = method(), method()
    learn(after, 0)
    learn(after, 1)
    learn(alone, 1)
    masks = [[layer.mask("task1") for layer in learned.tuner.mask_layers()] for learned in (after, alone)]
    assert all(map(torch.equal, *masks))
    assert after.facts(1)["overlap"] > 0 == alone.facts(1)["overlap"]


def test_the_first_task_claims_all_it_keeps_and_a_method_that_trains_values_finds_no_room(method, learn):
    learned = method()
    learn(learned, 0)
    kept = sum(int(layer.mask("task0").count_nonzero()) for layer in learned.tuner.mask_layers())
    assert learned.facts(0)["trainable"] == kept
    learn(learned, 1)
    facts = learned.facts(1)
    assert facts["overlap"] > 0.5
    assert facts["trainable"] < kept / 2
    union = [layer.mask("task0") | layer.mask("task1") for layer in learned.tuner.mask_layers()]
    share = sum(int(mask.count_nonzero()) for mask in union) / sum(mask.numel() for mask in union)
    assert learned.tuner.capacity_used() == pytest.approx(share, abs=1e-12)  # one division


@pytest.mark.parametrize("density", [0.5, 0.9, 0.99, 1.0])
def test_a_dense_masks_code_costs_what_its_zeros_do(density):
    mask = torch.rand(384, 384, generator=torch.Generator().manual_seed(0)).numpy() < density
    code = encode(mask, 384)
    assert np.array_equal(decode(code, mask.size, 384), mask.reshape(-1))
    bound = mask.size * entropy(float(mask.mean())) / 8
    assert len(code) <= math.ceil(1.02 * bound) + 3  # the head byte, the count


@pytest.mark.parametrize("changes", [{"density": 0.5}, {"rank": "magnitude"}, {"trains": "claimed"}])
def test_a_threshold_is_refused_beside_what_it_takes_the_place_of(changes):
    with pytest.raises(ConfigError, match="threshold: keeps any number of signed scores"):
        MaskConfig(**CONFIG | changes)
