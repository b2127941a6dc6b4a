"""Oracles of the papers' cards that no other file asks, on a tiny BERT and real training."""

import pytest
import torch
from peft import get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, default_data_collator
from transformers.integrations import integration_utils

from hf_cl.methods import exssnet, lora, ssnet, supsup
from hf_cl.training.evaluation import evaluate
from hf_cl.training.kkt_start import KKT
from hf_cl.training.ownership_callback import OwnershipCallback
from hf_cl.training.train_task import report_last, train_task
from hf_cl.tuner import MaskConfig

LABELS = ("a", "b", "c")
OPTIONS = {"density": 0.1, "scores_learning_rate": 0.05, "values_learning_rate": 0.02}


def learn(method, index, rows, args, **more):
    return train_task(method, index, LABELS, rows, default_data_collator, args, **more)


def bits(packed):
    return {name: tensor.tolist() for name, tensor in {**packed.task, **packed.head}.items()}


def test_on_a_first_task_training_what_is_free_is_training_the_whole_mask(tiny_base, token_task, arguments):
    packs = []
    for module, more in ((exssnet, {"start": "fresh"}), (ssnet, {})):
        method = module.build(tiny_base(), module.Options(**OPTIONS, **more), seed=0)
        learn(method, 0, token_task(seed=1, classes=3), arguments())
        packs.append(bits(method.pack(0)))
    assert packs[0] == packs[1]


def test_after_a_copy_by_kkt_nothing_is_free_to_train_until_scores_move(tiny_model, token_task, arguments):
    config = {"density": 0.1, "trains": "claimed", "num_labels": 3}
    model = get_peft_model(tiny_model(), MaskConfig(**config), adapter_name="first")
    rows = token_task(seed=1, classes=3)["train"]

    def train(adapter, callback, **more):
        model.set_adapter(adapter)
        trainer = Trainer(model=model, args=arguments(**more), train_dataset=rows, callbacks=[callback])
        trainer.train()

    train("first", OwnershipCallback("first", mask_share=0.5))
    model.add_adapter("second", MaskConfig(**config))
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            layers = model.base_model.mask_layers()
            if state.global_step == 0:
                seen.extend(layer.trainable("second", layer.mask("second")).numel() for layer in layers)

    start = KKT(k=3, sample=32, margin=5.0, means={})
    callback = OwnershipCallback("second", mask_share=0.5, start=start)
    force_choice(callback, model)
    model.set_adapter("second")
    trainer = Trainer(model=model, args=arguments(), train_dataset=rows, callbacks=[callback, Look()])
    trainer.train()
    assert callback.choice.source == 0
    assert seen and set(seen) == {0}


def force_choice(callback, model):
    """Let KKT choose the first task whatever it measures: what follows a choice is asked here."""
    from hf_cl.training import kkt_start

    real = kkt_start.choose

    def choose(*args, **kwargs):
        found = real(*args, **kwargs)
        kkt_start.choose = real
        return type(found)(0, found.accuracies, found.base, found.chance)

    kkt_start.choose = choose


def test_unwrapping_gives_the_base_its_keys_and_bits_back(tiny_model):
    base = tiny_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, MaskConfig(density=0.1, num_labels=4), adapter_name="news")
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_budget_from_free_entries_trains_and_commits_free_entries_alone(tiny_base, token_task, arguments):
    method = exssnet.build(tiny_base(), exssnet.Options(**OPTIONS | {"density": 0.4}, claim="free_topk"), seed=0)
    for index in range(3):
        learn(method, index, token_task(seed=index, classes=3), arguments())
        assert method.facts(index)["overlap"] == 0.0
    cells = [method.facts(index)["trainable"] for index in range(3)]
    assert cells[0] == cells[1] > cells[2] > 0  # .4, .4, and the last .2
    assert method.tuner.capacity_used() == 1.0


@pytest.mark.parametrize(("module", "options"), [(supsup, {"density": 0.1}), (exssnet, OPTIONS)])
def test_the_best_state_is_kept_and_later_tasks_are_learned_with_evaluation_on(
    module, options, tiny_base, token_task, arguments
):
    method = module.build(tiny_base(), module.Options(**options), seed=0)
    args = arguments(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="accuracy", greater_is_better=True,
    )  # fmt: skip
    for index in range(2):
        rows = token_task(seed=index, classes=3)
        learn(method, index, rows, args, callbacks=(EarlyStoppingCallback(50),))
        assert 0 <= evaluate(method.model, rows["validation"], default_data_collator, args).metrics["accuracy"] <= 1


def test_a_best_model_that_nobody_could_restore_is_refused(tiny_base, token_task, arguments):
    method = lora.build(tiny_base(), lora.Options(r=2), seed=0)
    args = arguments(eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        learn(method, 0, token_task(seed=0, classes=3), args)


class Recorder(TrainerCallback):
    logs: list = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        Recorder.logs.append(dict(logs))


def test_what_the_masks_do_is_reported_through_report_to(tiny_base, token_task, arguments, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    Recorder.logs = []
    method = supsup.build(tiny_base(), supsup.Options(density=0.1), seed=0)
    learn(method, 0, token_task(seed=0, classes=3), arguments(report_to=["recorder"], logging_steps=1))
    steps = [log for log in Recorder.logs if "loss" in log]
    wanted = {"mask_density", "mask_overlap", "mask_trainable_share", "mask_capacity_left"}
    assert steps and all(wanted <= set(log) for log in steps)


def test_report_last_leaves_every_other_callback_where_it_was(tiny_model, arguments, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    trainer = Trainer(model=tiny_model(), args=arguments(report_to=["recorder"]), callbacks=[TrainerCallback()])
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    report_last(trainer)
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [
        *(kind for kind in kinds if kind is not Recorder),
        Recorder,
    ]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
def test_every_forward_of_the_weight_phase_uses_the_values_as_the_optimizer_left_them(
    optim, tiny_base, token_task, arguments
):
    method = exssnet.build(tiny_base(), exssnet.Options(**OPTIONS, mask_share=0.4, start="fresh"), seed=0)
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            layer = method.tuner.mask_layers()[0]
            if layer._where is not None:
                values = layer.hfcl_values["task0"].detach()[: layer._where.numel()].clone()
                composed = layer.store.weight.view(-1)[layer._where]
                assert torch.equal(composed, layer._start + values)
                seen.append(values)

    learn(method, 0, token_task(seed=1, classes=3), arguments(max_steps=6, optim=optim), callbacks=(Look(),))
    assert len(seen) >= 3 and not torch.equal(seen[0], seen[-1])
