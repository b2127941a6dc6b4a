"""Penalties are what their formulas say, and pull where they should; the Fisher is that of single rows."""

import dataclasses
import os
import socket
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.multiprocessing
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import init_process_group
from transformers import Trainer, TrainingArguments

from hf_cl import recipe as recipes
from hf_cl import run_stream
from hf_cl.data import collator
from hf_cl.errors import TrainingError
from hf_cl.merging.fisher import fisher as merge_by_fisher
from hf_cl.methods import ewc
from hf_cl.training.fisher import fisher
from hf_cl.training.penalty import Quadratic, together, with_penalty

pytest_plugins = ["tiny"]


def point(*values):
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.tensor(values, dtype=torch.float32)))
    return model


def numbers(seed, shape=(6,)):
    return {"weight": torch.rand(shape, generator=torch.Generator().manual_seed(seed))}


# --- one quadratic --------------------------------------------------------------------------------------------


def test_the_penalty_and_its_gradient_are_zero_at_the_centre():
    model = point(1.0, -2.0, 3.0)
    held = Quadratic({"weight": model.weight.detach().clone()}, {"weight": torch.tensor([1.0, 5.0, 0.0])})
    value = held.times(7.0)(model)
    value.backward()
    assert value.item() == 0.0
    assert model.weight.grad.tolist() == [0.0, 0.0, 0.0]


def test_the_penalty_is_half_its_strength_times_the_weighted_squares():
    model = point(1.0, 2.0, 3.0)
    zero = {"weight": torch.zeros(3)}
    assert Quadratic(zero).times(3.0)(model).item() == 3 / 2 * (1 + 4 + 9)
    value = Quadratic(zero, {"weight": torch.tensor([2.0, 0.5, 0.0])}).times(3.0)(model)
    assert value.item() == 3 / 2 * (2 * 1 + 0.5 * 4)
    value.backward()
    assert model.weight.grad.tolist() == [3 * 2 * 1.0, 3 * 0.5 * 2.0, 0.0]


def test_parameters_that_it_does_not_name_are_free():
    model = point(1.0)
    model.register_parameter("head", nn.Parameter(torch.ones(2)))
    Quadratic({"weight": torch.zeros(1)}).value(model).backward()
    assert model.head.grad is None


def test_several_tasks_penalties_together_have_the_gradient_of_their_sum():
    parts = [Quadratic(numbers(seed), numbers(seed + 10)) for seed in range(4)]
    parts[1].weight["weight"][:2] = 0
    one = parts[0]
    for part in parts[1:]:
        one = together(one, part)
    differences = []
    for seed in (20, 21):
        model = point(*numbers(seed)["weight"].tolist())
        (apart,) = torch.autograd.grad(sum(part.value(model) for part in parts), [model.weight])
        (merged,) = torch.autograd.grad(one.value(model), [model.weight])
        # The sums are taken in another order.
        torch.testing.assert_close(merged, apart, rtol=1e-5, atol=1e-6)
        differences.append((sum(part.value(model) for part in parts) - one.value(model)).item())
    assert differences[0] == pytest.approx(differences[1], rel=1e-5), "they differ by a constant"


def test_where_no_task_needs_a_weight_it_stays_free():
    none = {"weight": torch.zeros(3)}
    one = together(Quadratic(numbers(1, (3,)), none), Quadratic(numbers(2, (3,)), none))
    assert one.weight["weight"].tolist() == [0.0, 0.0, 0.0]
    assert bool(one.centre["weight"].isfinite().all())


class Parabola(nn.Module):
    """Loss h/2 (theta - c)^2: a task with a closed form."""

    accepts_loss_kwargs = False

    def __init__(self, theta, h, c):
        super().__init__()
        self.weight, self.h, self.c = nn.Parameter(torch.tensor([theta])), h, c
        self.config = SimpleNamespace(to_json_string=lambda: "{}")

    def forward(self, input_ids=None, labels=None):
        return {
            "loss": (self.h / 2 * (self.weight - self.c) ** 2).sum(),
            "logits": self.weight.expand(len(input_ids), 1),
        }


ROWS = Dataset.from_dict({"input_ids": [[1]] * 8, "labels": [0] * 8})


def descend(model, penalty, folder, steps=200, **changes):
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=0.2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **changes,
    )
    trainer = with_penalty(Trainer, penalty)(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_optimum_between_two_parabolas_is_the_one_in_closed_form(tmp_path, accumulation):
    """A: a/2 (theta - theta_A)^2, whose Fisher is a. B: (b theta_B + lambda a theta_A) / (b + lambda a)."""
    a, theta_a, b, theta_b, strength = 0.7, 1.0, 0.4, -2.0, 1.5
    model = Parabola(theta_a, b, theta_b)
    held = Quadratic({"weight": torch.tensor([theta_a])}, {"weight": torch.tensor([a])})
    descend(model, held.times(strength), tmp_path, gradient_accumulation_steps=accumulation)
    expected = (b * theta_b + strength * a * theta_a) / (b + strength * a)
    assert model.weight.item() == pytest.approx(expected, abs=1e-6)


def test_l2_has_the_optimum_of_a_fisher_of_one(tmp_path):
    b, theta_b, strength, previous = 0.4, -2.0, 0.5, 1.0
    model = Parabola(previous, b, theta_b)
    descend(model, Quadratic({"weight": torch.tensor([previous])}).times(strength), tmp_path)
    assert model.weight.item() == pytest.approx((b * theta_b + strength * previous) / (b + strength), abs=1e-6)


def test_the_loss_of_an_evaluation_is_the_tasks_own(tmp_path):
    model = Parabola(3.0, 1.0, 0.0)
    trainer = descend(model, lambda _: torch.tensor(100.0), tmp_path, steps=1)
    own = float(0.5 * model.weight.detach() ** 2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own)
    assert trainer.state.log_history[0]["train_loss"] == pytest.approx(100 + 0.5 * 9)


# --- the Fisher -----------------------------------------------------------------------------------------------


class Logistic(nn.Module):
    """Two classes, logits (0, w x)."""

    def __init__(self, size=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, **_):
        z = self.dropout(x) @ self.weight
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(z), z], dim=-1))


def logistic_rows(count=50, size=4):
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(1))
    return x, [{"x": row, "labels": number % 2} for number, row in enumerate(x)]


def stack(rows):
    return {"x": torch.stack([row["x"] for row in rows]), "labels": torch.tensor([row["labels"] for row in rows])}


def test_the_fisher_of_a_logistic_regression_is_its_formula():
    model, (x, rows) = Logistic(), logistic_rows()
    p = torch.sigmoid(x.double() @ model.weight.detach().double())
    labels = torch.tensor([row["labels"] for row in rows])
    by_model = ((p * (1 - p))[:, None] * x.double() ** 2).mean(0)
    by_data = (((labels - p) ** 2)[:, None] * x.double() ** 2).mean(0)
    for kind, expected in (("model", by_model), ("data", by_data)):
        found = fisher(model, ["weight"], rows, stack, labels=kind)["weight"]
        # Fifty float32 terms against float64.
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    batch = (((labels - p)[:, None] * x.double()).mean(0)) ** 2
    assert bool((by_data > 3 * batch).all()), "the square of the batch's gradient is another thing"


def test_the_fisher_leaves_the_model_as_it_was():
    model, (_, rows) = Logistic(), logistic_rows(3)
    model.train()
    before = model.weight.detach().clone()
    first = fisher(model, ["weight"], rows, stack)["weight"]
    assert model.training
    assert model.weight.grad is None
    assert torch.equal(model.weight, before)
    assert torch.equal(first, fisher(model, ["weight"], rows, stack)["weight"]), "without dropout's noise"


def test_the_fisher_of_a_transformer_is_the_mean_of_squared_gradients_of_single_rows():
    model = tiny.bert()
    rows = Dataset.from_dict({"input_ids": [[2, 4 + i, 3] for i in range(5)], "labels": [0, 1, 0, 1, 1]})

    def collate(batch):
        return {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels")}

    names = [name for name, _ in model.named_parameters() if not name.startswith("classifier")]
    found = fisher(model, names, rows, collate)
    assert list(found) == names
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    model.eval()
    for row in rows:
        model.zero_grad()
        model(**collate([row])).loss.backward()
        for name in names:
            expected[name] += model.get_parameter(name).grad ** 2 / 5
    for name in names:
        assert found[name].dtype == torch.float32
        assert bool((found[name] >= 0).all())
        # Division before or after the sum.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-10)


def test_a_fisher_that_is_no_number_is_refused():
    model, (_, rows) = Logistic(), logistic_rows(3)
    rows[1]["x"] = rows[1]["x"] * float("nan")
    with pytest.raises(TrainingError, match="fisher: that of weight is not finite"):
        fisher(model, ["weight"], rows, stack)


def _share_rows(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    init_process_group("gloo", rank=rank, world_size=2)
    _, rows = logistic_rows(7)
    save_file(fisher(Logistic(), ["weight"], rows, stack), folder / f"{rank}.safetensors")


@pytest.mark.slow
def test_two_processes_share_the_rows_and_get_the_same(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_share_rows, (port, tmp_path), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors")["weight"] for rank in (0, 1))
    assert torch.equal(first, second)
    _, rows = logistic_rows(7)
    # Two partial sums against one.
    torch.testing.assert_close(first, fisher(Logistic(), ["weight"], rows, stack)["weight"], rtol=1e-6, atol=0)


# --- the methods ------------------------------------------------------------------------------------------------


def learn(base_folder, folder, options):
    learner = tiny.learner(base_folder, options, folder)
    encoders = []
    for name in ("pets", "weather"):
        learner.learn(tiny.task(name))
        encoders.append({name: tensor.clone() for name, tensor in learner.method.encoder_parameters().items()})
    return learner, encoders


def far(one, other):
    return sum((one[name] - other[name]).square().sum().item() for name in one)


@pytest.mark.parametrize(("method", "strengths"), [("l2", (0.0, 1.0, 1e3)), ("ewc", (0.0, 1e2, 1e3))])
def test_without_strength_it_is_finetune_and_with_it_goes_less_far(base_folder, tmp_path, method, strengths):
    _, (first, plain) = learn(base_folder, tmp_path / "plain", tiny.options("finetune"))
    held = Quadratic(first)
    if method == "ewc":  # as far as the first task's Fisher sees: Adam steps in all directions alike
        one = tiny.learner(base_folder, ewc.Options(learning_rate=0.01), tmp_path / "one")
        one.learn(tiny.task("pets"))
        held = one.method.way.quadratic
    gone = []
    for strength in strengths:
        learner, (same, then) = learn(base_folder, tmp_path / str(strength), tiny.options(method, strength=strength))
        assert far(first, same) == 0, "the first task has no penalty"
        gone.append(held.value(learner.method.model).item())
        if not strength:
            assert all(torch.equal(plain[name], then[name]) for name in plain)
    assert gone[0] > 1.5 * gone[1]
    assert gone[1] > 1.5 * gone[2]


def test_ewc_takes_the_fisher_of_the_finished_task_at_its_end(base_folder, tmp_path):
    learner = tiny.learner(base_folder, ewc.Options(learning_rate=0.01, rows=24), tmp_path)
    collate = collator(learner.base.tokenizer)
    total = {}
    for name in ("pets", "weather"):
        learner.learn(tiny.task(name))
        names = list(learner.method.encoder_parameters())
        alone = fisher(learner.model, names, tiny.tokenised(learner, name), collate)
        total = {key: tensor + total.get(key, 0.0) for key, tensor in alone.items()}
        assert far(learner.method.way.quadratic.weight, total) == 0
    assert not [name for name in total if name.startswith("classifier")], "heads have no penalty"
    learner.activate("pets")
    other = fisher(learner.model, names, tiny.tokenised(learner, "pets"), collate)
    assert far(alone, other) > 0, "another task's would be another"


def test_online_the_centre_is_the_last_tasks_encoder(base_folder, tmp_path):
    options = ewc.Options(learning_rate=0.01, rows=10, online=True, strength=0)
    online, (first, last) = learn(base_folder, tmp_path, options)
    assert far(last, online.method.way.quadratic.centre) == 0
    apart, _ = learn(base_folder, tmp_path, dataclasses.replace(options, online=False))
    centre = apart.method.way.quadratic.centre
    assert 0 < far(first, centre) < far(first, last)


def test_a_decay_of_older_fishers_lets_them_fade(base_folder, tmp_path):
    traces = {}
    for decay in (0.0, 0.5, 1.0):
        options = ewc.Options(learning_rate=0.01, rows=5, online=True, decay=decay, strength=0)
        learner, _ = learn(base_folder, tmp_path / str(decay), options)
        traces[decay] = [record["facts"]["fisher_trace"] for record in learner.records]
    first, second = traces[0.0]
    assert traces[0.5] == [first, pytest.approx(second + first / 2, rel=1e-4)]
    assert traces[1.0] == [first, pytest.approx(second + first, rel=1e-4)]


def test_the_rows_of_a_fisher_are_seeded(base_folder, tmp_path):
    found = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        learner = tiny.learner(base_folder, ewc.Options(learning_rate=0.01, rows=4), tmp_path / place)
        learner.method.way.seed = seed  # of the draw alone: the training's seed stays
        learner.learn(tiny.task("pets"))
        found.append(learner.method.way.quadratic.weight)
    assert far(found[0], found[1]) == 0
    assert far(found[0], found[2]) > 0


def stop(_):
    raise KeyboardInterrupt


def test_the_run_folder_has_one_fisher_that_merging_reads(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hf_cl.train_stream.verify_in_fresh_process", lambda path: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    settings = ["method=ewc", "method.rows=6", "training.num_train_epochs=1"]
    with pytest.raises(KeyboardInterrupt):
        run_stream(recipes.load(str(tiny_recipe), settings), tmp_path / "run")
    (file,) = (tmp_path / "run" / "tasks").glob("0001.fisher-*.safetensors")
    assert not [*(tmp_path / "run" / "tasks").glob("0000.fisher-*")]
    weights = load_file(file)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    model = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    other = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
    merged = merge_by_fisher([model, other], [weights, weights])
    needed = {name: merged[name][weights[name] > 1e-6] for name in merged}
    assert all(torch.allclose(tensor, torch.tensor(0.5)) for tensor in needed.values())


def test_a_fisher_that_fails_leaves_nothing_of_its_task(base_folder, tmp_path, monkeypatch):
    learner = tiny.learner(base_folder, ewc.Options(learning_rate=0.01), tmp_path)
    learner.learn(tiny.task("pets"))
    held, encoder = learner.method.way.quadratic, learner.method.encoder_copy()

    def broken(*_, **__):
        raise TrainingError("fisher: that of x is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(ewc, "fisher", broken)
        with pytest.raises(TrainingError):
            learner.learn(tiny.task("weather"))
    assert learner.method.way.quadratic is held
    assert all(torch.equal(encoder[name], tensor) for name, tensor in learner.method.encoder().items())


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("l2", "strength", -1.0),
        ("ewc", "strength", -1.0),
        ("ewc", "rows", 0),
        ("ewc", "decay", 1.5),
        ("ewc", "labels", "both"),
        ("sfa", "period", 0.0),
        ("sfa", "beta", 1.1),
        ("replay", "share", 0.0),
        ("replay", "share", 1.5),
        ("ties", "density", 0.0),
        ("wise_ft", "alpha", 1.2),
        ("task_arithmetic", "scale", 0.0),
    ],
)
def test_options_out_of_range_are_refused_with_the_recipe(tiny_recipe, method, key, value):
    with pytest.raises(recipes.ConfigError, match=rf"recipe\.method \({method}\)\.{key}: "):
        recipes.load(str(tiny_recipe), [f"method={method}", f"method.{key}={value}"])
