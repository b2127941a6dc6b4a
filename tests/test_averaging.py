"""SFA's averages: at the right steps, of the right tensors, and as the arithmetic says."""

import json

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_cl import AveragingCallback
from hf_cl.errors import ConfigError
from hf_cl.methods import sfa

pytest_plugins = ["tiny"]

ROWS = Dataset.from_dict({"input_ids": [[2, 4 + i, 5 + i, 3] for i in range(20)], "labels": [0, 1] * 10})


class Recorder(TrainerCallback):
    """Notes the model's weights at the end of each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(copies(kwargs["model"]))


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def arguments(folder, **changes):
    given = {"max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 0.01, "save_strategy": "no"}
    more = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, "logging_steps": 1}
    return TrainingArguments(str(folder), **{**given, **more, **changes})


def train(folder, callbacks=(), model=None, resume=None, trainer_class=Trainer, **changes):
    model = model or tiny.bert()
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def encoder(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}


# --- when ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "period", "expected"),
    [
        (10, 0.25, [3, 6, 9, 10]),
        (10, 0.5, [5, 10]),  # once, where a periodic step is the last
        (10, 1.0, [10]),
        (10, 0.01, list(range(1, 11))),
        (9, 0.4, [4, 8, 9]),
        (30, 0.1, list(range(3, 31, 3))),  # .1 * 30 is a little more than 3
        (1, 0.25, [1]),
    ],
)
def test_averages_are_taken_every_ceiling_of_the_period_and_at_the_last_step(steps, period, expected, tmp_path):
    callback = AveragingCallback(tiny.bert(), period=period)
    train(tmp_path, [callback], max_steps=steps)
    assert callback.steps == expected


def test_accumulated_batches_are_one_step(tmp_path):
    callback = AveragingCallback(tiny.bert())
    train(tmp_path, [callback], gradient_accumulation_steps=2)
    assert callback.steps == [3, 6, 9, 10]


def test_a_training_that_another_callback_stops_is_averaged_at_its_end(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 7

    callback, anchor = AveragingCallback(tiny.bert(), beta=1.0), copies(tiny.bert())
    trainer = train(tmp_path, [callback, Stop()])
    assert callback.steps == [3, 6, 7]
    assert equal(encoder(copies(trainer.model)), encoder(anchor))


def test_a_callback_can_serve_a_second_training(tmp_path):
    callback = AveragingCallback(tiny.bert())
    for _ in range(2):
        train(tmp_path, [callback])
        assert callback.steps == [3, 6, 9, 10]


# --- what ---------------------------------------------------------------------------------------------------


def test_beta_zero_changes_not_a_bit(tmp_path):
    plain = train(tmp_path)
    averaged = train(tmp_path, [AveragingCallback(tiny.bert(), beta=0.0)])
    assert equal(copies(plain.model), copies(averaged.model))
    assert [entry.get("loss") for entry in plain.state.log_history] == [
        entry.get("loss") for entry in averaged.state.log_history
    ]


def test_beta_one_gives_the_anchor_and_leaves_the_head(tmp_path):
    model = tiny.bert()
    anchor = copies(model)
    trained = copies(train(tmp_path, [AveragingCallback(model, beta=1.0)], model).model)
    assert equal(encoder(trained), encoder(anchor))
    assert not torch.equal(trained["classifier.weight"], anchor["classifier.weight"])
    # The head's own way: what it learned from the anchor's features is not pulled back.
    assert not torch.equal(trained["classifier.bias"], anchor["classifier.bias"])


def test_an_average_is_the_weighted_mean_and_comes_before_what_is_evaluated_and_saved(tmp_path):
    model = tiny.bert()
    anchor, before, after = copies(model), Recorder(), Recorder()
    train(tmp_path, [before, AveragingCallback(model, beta=0.25), after], model, save_strategy="steps", save_steps=3)
    for step, (free, averaged) in enumerate(zip(before.seen, after.seen, strict=True), start=1):
        if step not in (3, 6, 9, 10):
            assert equal(free, averaged)
            continue
        assert torch.equal(free["classifier.weight"], averaged["classifier.weight"])
        for name, tensor in encoder(free).items():
            expected = (0.75 * tensor.double() + 0.25 * anchor[name].double()).float()
            # Rounded once or twice: half a unit in the last place of either term.
            torch.testing.assert_close(averaged[name], expected, rtol=2e-7, atol=1e-8)
    saved = tiny.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert equal(copies(saved), after.seen[2])


def test_the_average_of_a_bfloat16_model_is_taken_in_float32(tmp_path):
    model = tiny.bert().to(torch.bfloat16)
    callback = AveragingCallback(model, beta=0.5)
    assert {tensor.dtype for tensor in callback.anchor.values()} == {torch.float32}
    start = copies(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0625)
    moved = copies(model)
    callback._average(model, 1)
    for name, tensor in encoder(copies(model)).items():
        expected = ((moved[name].float() + start[name].float()) / 2).to(torch.bfloat16)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected)


def test_averaging_gradient_descent_on_a_parabola_follows_its_recursion(tmp_path):
    """Loss h/2 (theta - c)^2, plain SGD, n steps between averages: delta <- (1 - beta) r delta + beta delta_0."""
    h, rate, beta, every = 0.5, 0.1, 0.25, 3
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(7, generator=generator, dtype=torch.float64)
    target = torch.randn(7, generator=generator, dtype=torch.float64)
    model = torch.nn.Module()
    model.register_parameter("weight", torch.nn.Parameter(theta.clone()))
    callback = AveragingCallback({"weight": theta.clone()}, beta=beta)
    shrink, delta = (1 - rate * h) ** every, theta - target
    for step in range(1, 4):
        for _ in range(every):
            with torch.no_grad():
                model.weight.sub_(rate * h * (model.weight - target))
        callback._average(model, step * every)
        delta = (1 - beta) * shrink * delta + beta * (theta - target)
        # The anchor is held in float32.
        torch.testing.assert_close(model.weight.detach() - target, delta, rtol=1e-6, atol=1e-7)
    fixed = beta * (theta - target) / (1 - (1 - beta) * shrink)
    for _ in range(200):
        delta = (1 - beta) * shrink * delta + beta * (theta - target)
    torch.testing.assert_close(delta, fixed)


def test_the_anchor_is_a_copy_and_stays_on_its_device(tmp_path):
    model = tiny.bert()
    callback = AveragingCallback(model)
    start = copies(model)
    train(tmp_path, [callback], model)
    parameters = {name: tensor for name, tensor in callback.anchor.items() if name in start}
    assert equal(parameters, encoder(start))
    assert not [name for name in callback.anchor if name.startswith("classifier")]
    assert {tensor.device.type for tensor in callback.anchor.values()} == {"cpu"}


# --- with the Trainer's other features ------------------------------------------------------------------------------


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = train(tmp_path / "whole", [AveragingCallback(tiny.bert(), beta=0.5)], **saving)
    callback = AveragingCallback(tiny.bert(), beta=0.5)
    again = train(tmp_path / "again", [callback], resume=str(tmp_path / "whole" / "checkpoint-4"), **saving)
    assert callback.steps == [3, 6, 9, 10]
    assert equal(copies(whole.model), copies(again.model))
    state = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["AveragingCallback"]["attributes"]["steps"] == [3]


def test_resuming_from_another_anchor_or_with_other_options_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, [AveragingCallback(tiny.bert())], **saving)
    checkpoint = tmp_path / "checkpoint-4"
    loaded = tiny.BertForSequenceClassification.from_pretrained(checkpoint)
    with pytest.raises(ConfigError, match="anchor: the checkpoint's training began from another model"):
        train(tmp_path / "again", [AveragingCallback(loaded)], resume=str(checkpoint), **saving)
    with pytest.raises(ConfigError, match=r"checkpoint: was made with .*0\.25.*, not with .*0\.5"):
        train(tmp_path / "again", [AveragingCallback(tiny.bert(), beta=0.5)], resume=str(checkpoint), **saving)
    train(tmp_path / "plain", **saving)
    with pytest.raises(ConfigError, match="checkpoint: was made with no averaging"):
        train(tmp_path / "again", [AveragingCallback(tiny.bert())], resume=str(tmp_path / "plain" / "checkpoint-4"))


def test_the_best_model_is_its_checkpoint_and_not_averaged_once_more(tmp_path):
    class Falling(Trainer):
        """Says that the model was best at step 4, which is no step of an average."""

        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": abs(self.state.global_step - 4.0)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    trainer = train(
        tmp_path,
        [AveragingCallback(tiny.bert(), beta=0.5)],
        trainer_class=Falling,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    saved = tiny.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert equal(copies(trainer.model), copies(saved))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 0}, r"period: expected a share of the steps in \(0, 1\], found 0"),
        ({"period": 1.5}, r"period: .* found 1\.5"),
        ({"period": float("nan")}, "period: .* found nan"),
        ({"beta": -0.1}, r"beta: expected a share of the anchor in \[0, 1\], found -0\.1"),
        ({"beta": 2}, "beta: .* found 2"),
        ({"head": ["nowhere"]}, "head_modules: 'nowhere' is no module"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        AveragingCallback(tiny.bert(), **options)


def test_an_anchor_that_cannot_be_averaged_with_is_refused_before_the_first_step(tmp_path):
    good = copies(tiny.bert())
    name = "bert.pooler.dense.weight"
    for bad, message in (
        ({**good, "elsewhere": torch.zeros(2)}, "anchor: elsewhere is no tensor of this BertForSequenceClassification"),
        ({**good, name: torch.zeros(2)}, f"anchor: {name} is no tensor .* or has another shape"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(tmp_path, [AveragingCallback(bad, head=["classifier"])])
    with pytest.raises(ConfigError, match=f"anchor: {name} holds NaN or infinity"):
        AveragingCallback({**good, name: good[name] * float("nan")})


def test_a_model_with_adapters_is_refused(tmp_path):
    model = get_peft_model(tiny.bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ConfigError, match="average of two factors is not that of their product"):
        AveragingCallback(model)
    with pytest.raises(ConfigError, match="model: it has adapters"):
        train(tmp_path, [AveragingCallback(tiny.bert())], model)


# --- the method -----------------------------------------------------------------------------------------------------


def learn(base_folder, folder, **options):
    learner = tiny.learner(base_folder, sfa.Options(learning_rate=0.01, **options), folder)
    encoders = []
    for name in ("pets", "weather"):
        learner.learn(tiny.task(name))
        encoders.append(learner.method.encoder_copy())
    return learner, encoders


def test_the_first_task_is_not_averaged_and_the_second_is_with_the_first(base_folder, tmp_path):
    _, (first, second) = learn(base_folder, tmp_path / "one", beta=1.0)
    _, (free, _) = learn(base_folder, tmp_path / "zero", beta=0.0)
    assert equal(first, free), "the first task trains as if nothing averaged"
    assert equal(first, second), "beta 1 gives the first task's encoder back"
    base = {name: tensor for name, tensor in tiny.fresh(base_folder).model.state_dict().items() if name in first}
    assert not all(torch.equal(first[name], tensor) for name, tensor in base.items())


def test_beta_zero_is_finetune(base_folder, tmp_path):
    learner, encoders = learn(base_folder, tmp_path / "sfa", beta=0.0)
    plain = tiny.learner(base_folder, tiny.options("finetune"), tmp_path / "plain")
    for name, expected in zip(("pets", "weather"), encoders, strict=True):
        plain.learn(tiny.task(name))
        assert equal(plain.method.encoder_copy(), expected)
    assert [record["parts"] for record in plain.records] == [record["parts"] for record in learner.records]
