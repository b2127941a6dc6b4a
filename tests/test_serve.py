"""A batch of many tasks shares the products with the base's weight, and answers as one task at a time does."""

import pytest
import tiny
import torch
from datasets import Dataset
from transformers.pytorch_utils import Conv1D

from hf_cl import MaskBank, MaskConfig
from hf_cl.layers.base import load_base
from hf_cl.layers.sparse import compressed, sparse_product
from hf_cl.tuner import mixed
from hf_cl.tuner.mixed import TOLERANCE

pytest_plugins = ["tiny"]
NAMES = ("pets", "weather", "food")
ROWS = ["food", "pets", "food", "weather", "pets", "weather", "food"]


def learn(base_folder, place, config):
    learner = tiny.learner(base_folder, config, place)
    for name in NAMES:
        learner.learn(tiny.task(name))
    return MaskBank.from_learner(learner)


@pytest.fixture(scope="module", params=["supsup", "exssnet", "norms", "prune"])
def served(request, base_folder, tmp_path_factory):
    """A bank and a model with all its tasks: masks alone, values, own norms, and a form that shares no product."""
    config = {
        "supsup": lambda: tiny.options("supsup", density=0.05),
        "exssnet": lambda: tiny.options("exssnet"),
        "norms": lambda: tiny.options("exssnet", train_norms=True),
        "prune": lambda: MaskConfig(density=0.5, compose="prune"),
    }[request.param]()
    bank = learn(base_folder, tmp_path_factory.mktemp(request.param), config)
    return request.param, bank, bank.attach(tiny.fresh(base_folder).model)


def batch(rows=7, length=6, seed=3):
    ids = torch.randint(4, len(tiny.vocabulary()), (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask.long()}


def answers(bank, model, inputs, tasks, *, shared):
    model.base_model.share_products = shared
    with torch.no_grad():
        return model(**inputs, adapter_names=bank.adapter_names(tasks)).logits


def alone(bank, model, inputs, task):
    bank.activate(model, task)
    with torch.no_grad():
        return model(**inputs).logits


def passes(monkeypatch):
    """Count how a mixed batch is answered."""
    seen = []
    for name in ("_shared", "_apart"):
        plain = getattr(mixed, name)
        monkeypatch.setattr(mixed, name, lambda *a, name=name, plain=plain: seen.append(name) or plain(*a))
    return seen


def test_shared_products_answer_as_one_task_at_a_time_within_the_tolerance(served, monkeypatch):
    form, bank, model = served
    inputs, seen = batch(), passes(monkeypatch)
    found = answers(bank, model, inputs, ROWS, shared=True)
    assert seen == (["_apart"] if form == "prune" else ["_shared"])
    largest = found[found.isfinite()].abs().max()
    for row, task in enumerate(ROWS):
        expected = alone(bank, model, inputs, task)[row]
        labels = len(tiny.LABELS[task])
        assert (found[row, :labels] - expected).abs().max() <= TOLERANCE[torch.float32] * largest
        assert (found[row, labels:] == -torch.inf).all()


def test_apart_the_bits_are_those_of_each_tasks_rows_alone(served):
    _, bank, model = served
    inputs = batch()
    found = answers(bank, model, inputs, ROWS, shared=False)
    for task in NAMES:
        rows = [place for place, name in enumerate(ROWS) if name == task]
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        assert torch.equal(found[rows, : len(tiny.LABELS[task])], alone(bank, model, part, task))


def test_a_row_of_another_task_is_another_answer(served):
    """The negative control: a test that compares rows with the wrong task must fail."""
    _, bank, model = served
    inputs = batch()
    found = answers(bank, model, inputs, ROWS, shared=True)
    other = {"food": "pets", "pets": "food"}
    for row, task in enumerate(ROWS):
        if task in other:
            expected = alone(bank, model, inputs, other[task])[row]
            largest = found[found.isfinite()].abs().max()
            assert (found[row, :2] - expected).abs().max() > 100 * TOLERANCE[torch.float32] * largest


def test_the_bare_base_answers_among_tasks_and_nothing_stays_behind(served):
    _, bank, model = served
    inputs = batch(3)
    bank.activate(model, "weather")
    before = tiny.logits(model)
    names = ["__base__", *bank.adapter_names(["pets", "food"])]
    model.base_model.share_products = True
    with torch.no_grad():
        found = model(**inputs, adapter_names=names).logits
        with model.disable_adapter():
            plain = model(**inputs).logits
            disabled = model(**inputs, adapter_names=names).logits
    assert torch.allclose(found[0, : plain.shape[1]], plain[0], atol=1e-5)
    assert torch.allclose(disabled[:, : plain.shape[1]], plain, atol=1e-5)
    assert torch.equal(tiny.logits(model), before)
    assert all(layer.plan is None for layer in model.base_model._tuner_layers())


def test_an_error_in_a_shared_batch_leaves_the_model_as_it_was(served):
    _, bank, model = served
    bank.activate(model, "weather")
    before = tiny.logits(model)
    model.base_model.share_products = True
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[1, 2], [3, 999]]), adapter_names=bank.adapter_names(["pets", "food"]))
    assert torch.equal(tiny.logits(model), before)


def test_what_a_task_keeps_for_it_is_sparse_and_goes_with_it(base_folder, tmp_path):
    bank = learn(base_folder, tmp_path, tiny.options("supsup", density=0.05))
    model = bank.attach(tiny.fresh(base_folder).model)
    answers(bank, model, batch(), ROWS, shared=True)
    layers = model.base_model.mask_layers()
    for layer in layers:
        assert sorted(layer._derived) == [f"task{index}" for index in range(3)]
        for adapter, (_, derived) in layer._derived.items():
            kept, part = layer.count(adapter), derived["part"]
            assert part.values().shape == (kept,)
            held = sum(tensor.nbytes for tensor in (part.values(), part.col_indices(), part.crow_indices()))
            assert held == 8 * kept + 4 * (part.shape[0] + 1)
    bank.activate(model, "food")
    bank.detach(model, "pets")
    assert all("task0" not in layer._derived for layer in layers)


def test_a_task_that_is_read_again_is_the_same_task(base_folder, tmp_path):
    bank = learn(base_folder, tmp_path, tiny.options("exssnet"))
    model = bank.attach(tiny.fresh(base_folder).model)
    before = answers(bank, model, batch(), ROWS, shared=True)
    bank.activate(model, "food")
    bank.detach(model, "pets")
    bank.activate(model, "pets")
    assert torch.equal(answers(bank, model, batch(), ROWS, shared=True), before)


def test_a_base_in_bfloat16_is_served_within_its_tolerance(base_folder, tmp_path):
    learner = tiny.learner(load_base(str(base_folder), dtype="bfloat16"), tiny.options("supsup"), tmp_path)
    for name in NAMES:
        learner.learn(tiny.task(name))
    bank = MaskBank.from_learner(learner)
    model = bank.attach(load_base(str(base_folder), dtype="bfloat16").model)
    inputs = batch()
    found = answers(bank, model, inputs, ROWS, shared=True)
    largest = found[found.isfinite()].abs().max()
    for row, task in enumerate(ROWS):
        expected = alone(bank, model, inputs, task)[row]
        assert (found[row, : len(expected)] - expected).abs().max() <= TOLERANCE[torch.bfloat16] * largest


def test_a_task_that_still_trains_is_answered_apart(base_folder, tmp_path, monkeypatch):
    bank = learn(base_folder, tmp_path, tiny.options("supsup"))
    model = bank.attach(tiny.fresh(base_folder).model)
    model.add_adapter("next", MaskConfig(num_labels=2, density=0.3, scale=None))
    model.eval()
    seen = passes(monkeypatch)
    with torch.no_grad():
        model(**batch(2), adapter_names=["next", "task0"])
    assert seen == ["_apart"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3])
def test_a_sparse_product_is_the_dense_one_and_so_is_its_gradient(density, transposed):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 11, generator=generator) < density
    dense = torch.randn(7, 11, generator=generator) * mask
    where = mask.view(-1).nonzero().squeeze(1)
    part = compressed(where, dense.view(-1)[where], (7, 11), transposed=transposed)
    weight = dense.T if transposed else dense
    assert torch.equal(part.to_dense(), weight)
    x = torch.randn(6, weight.shape[1], generator=generator, requires_grad=True)
    found = sparse_product(x, part)
    assert torch.equal(found, sparse_product(x.detach(), part))
    assert torch.allclose(found, x @ weight.T, atol=1e-6)
    out = torch.randn(found.shape, generator=generator)
    (gradient,) = torch.autograd.grad(found, x, out)
    assert torch.allclose(gradient, out @ weight, atol=1e-6)


def test_a_layer_that_stores_its_weight_transposed_is_told_by_its_kind():
    assert Conv1D(4, 3).weight.shape == (3, 4)  # (in, out): what `part` transposes


def test_a_mixed_batch_of_one_task_shares_nothing(served, monkeypatch):
    _, bank, model = served
    inputs, seen = batch(), passes(monkeypatch)
    found = answers(bank, model, inputs, ["pets"] * len(ROWS), shared=True)
    assert seen == ["_apart"]
    assert torch.equal(found, alone(bank, model, inputs, "pets"))


def test_many_tasks_in_a_batch_of_a_pipeline_are_answered_in_one_call(base_folder, tmp_path, monkeypatch):
    bank = learn(base_folder, tmp_path, tiny.options("supsup"))
    base = tiny.fresh(base_folder)
    pipe = bank.pipeline(model=bank.attach(base.model), tokenizer=base.tokenizer, batch_size=16)
    seen, calls = passes(monkeypatch), []
    base.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    texts = Dataset.from_dict(tiny.rows(("a", "b"), 16))["text"]
    tasks = {answer["task"] for answer in pipe(list(texts))}
    assert len(tasks) > 1 and seen == ["_shared"]
    assert len(calls) == 2  # one forward routes, one answers
