"""A text without a task id is sent to a task, by what was collected while the tasks trained or by asking them."""

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_cl import MaskBank, plugins, task_from_datasets, verify
from hf_cl.errors import BankCorruptError, BankError, BaseMismatchError, ConfigError
from hf_cl.routing import Gaussians
from hf_cl.routing.entropy import normalised_entropy
from hf_cl.routing.learned import Learned
from hf_cl.routing.nearest_mean import (
    COUNTS,
    FREEDOM,
    MEANS,
    SCATTER,
    NearestMean,
    Spread,
    TaskMeans,
    added,
    measure,
    unit,
)
from hf_cl.routing.superposition import Superposition, better_half
from hf_cl.storage.bank_folder import task_blob
from hf_cl.storage.run_folder import RunFolder
from hf_cl.training.collect import RouterState
from hf_cl.training.masked import adapter_of
from hf_cl.tuner.rows import Shares

pytest_plugins = ["tiny"]
NAMES = ("pets", "weather", "food")
ROUTERS = plugins.available("routing")
TOPIC = {"pets": ["cat", "dog", "bird", "fish"], "weather": ["rain", "snow", "wind", "sun"], "food": ["bread", "milk"]}


def topic_task(name):
    """A task whose texts have words of their own, so that the base's features tell it from others."""
    splits = {split: tiny.rows(tiny.LABELS[name], n, seed=n, words=TOPIC[name]) for split, n in tiny.SIZES.items()}
    return task_from_datasets(name, {split: Dataset.from_dict(made) for split, made in splits.items()})


def learn(base_folder, place, method="supsup", names=NAMES, **changes):
    learner = tiny.learner(base_folder, tiny.options(method), place / "out", **changes)
    for name in names:
        learner.learn(topic_task(name))
    return learner


@pytest.fixture(scope="module")
def learner(base_folder, tmp_path_factory):
    return learn(base_folder, tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="module")
def folder(learner, tmp_path_factory):
    return MaskBank.from_learner(learner).save_pretrained(tmp_path_factory.mktemp("bank") / "bank")


@pytest.fixture(scope="module")
def served(folder, base_folder):
    """A bank and a model with all its tasks."""
    bank, base = MaskBank.from_pretrained(folder), tiny.fresh(base_folder)
    return bank, bank.attach(base.model), base.tokenizer


def inputs_of(tokenizer, texts):
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


# --- what is collected ------------------------------------------------------------------------------------------


def test_means_and_covariance_are_those_of_the_features():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator)
    means, scatter, freedom = measure(features, labels, 4)
    x = unit(features)
    for label in range(3):
        assert torch.allclose(means.means[label].double(), x[labels == label].mean(0), rtol=1e-2, atol=1e-3)
    assert means.counts.tolist() == [*torch.bincount(labels, minlength=3).tolist(), 0]
    assert [len(part) for part in means.seen()] == [3, 3]
    assert freedom == 57
    about = torch.cat([x[labels == label] - x[labels == label].mean(0) for label in range(3)])
    plain = about.T @ about / 57
    found, typical = Spread(scatter, torch.tensor([[0, 57]])).covariance()
    share = float((found - plain)[0, 1] / -plain[0, 1])
    trace, squares = float(plain.trace()), float((plain @ plain).trace())
    # Eq. 23 of arXiv 0907.4698.
    oas = ((1 - 2 / 5) * squares + trace**2) / ((57 + 1 - 2 / 5) * (squares - trace**2 / 5))
    assert share == pytest.approx(min(1, oas), rel=1e-4)
    assert torch.allclose(found, (1 - share) * plain + share * trace / 5 * torch.eye(5).double(), atol=1e-6)
    assert typical == pytest.approx(float((about @ found.inverse() * about).sum() / 57), rel=1e-4)


def test_a_state_grown_task_by_task_is_that_of_all_texts_and_a_task_counts_once():
    generator = torch.Generator().manual_seed(0)
    texts = [(torch.randn(20, 4, generator=generator), torch.arange(20) % 2) for _ in range(3)]
    parts = [measure(x, y, 2)[1:] for x, y in texts]
    grown = None
    for index, part in enumerate(parts):
        grown = added(grown, index, *part)
    assert torch.allclose(grown.scatter, torch.stack([scatter for scatter, _ in parts]).sum(0), rtol=1e-6)
    assert grown.freedom.tolist() == [[0, 18], [1, 18], [2, 18]]
    assert added(grown, 1, *parts[1]) is grown


def test_texts_that_are_all_alike_leave_a_covariance_that_can_be_used():
    means, scatter, freedom = measure(torch.ones(4, 3), torch.zeros(4, dtype=torch.long), 2)
    covariance, typical = Spread(scatter, torch.tensor([[0, freedom]])).covariance()
    assert torch.linalg.cholesky(covariance).isfinite().all() and typical >= 0
    assert means.counts.tolist() == [4, 0]


@pytest.mark.parametrize("method", ["supsup", "exssnet"])
def test_collecting_changes_nothing_that_is_learned(base_folder, tmp_path, method):
    options = tiny.options(method, **({"start": "kkt"} if method == "exssnet" else {}))
    banks = []
    for routing in (0, 24):
        learner = tiny.learner(base_folder, options, tmp_path / str(routing), routing=routing)
        for name in NAMES[:2]:
            learner.learn(tiny.task(name))
        banks.append(MaskBank.from_learner(learner))
    off, on = banks
    for one, other in zip(off.manifest.tasks, on.manifest.tasks, strict=True):
        assert (one.parts, one.probe, one.start) == (other.parts, other.probe, other.start)
    assert off.manifest.shared is None and on.manifest.shared is not None
    assert not set(off._open(off.manifest.tasks[0]).extra) & {MEANS, COUNTS}


def test_a_kkt_start_and_the_collection_read_the_base_once(base_folder, tmp_path):
    learner = tiny.learner(base_folder, tiny.options("exssnet", start="kkt", kkt_sample=10), tmp_path, routing=16)
    calls = []
    learner.base.model.base_model.register_forward_hook(lambda _, __, output: calls.append(len(output[0])))
    learner.method.begin(0, tiny.LABELS["pets"])
    learner.method.abandon(0)
    learner.learn(tiny.task("pets"))
    # 10 texts for both, 6 more for the collection alone, then the training's own batches of 8.
    assert calls[:3] == [10, 6, 8]
    assert learner.method.routing.means[0].counts.sum() == 16


def test_the_state_is_small_and_lies_where_the_format_says(folder):
    bank = MaskBank.from_pretrained(folder)
    for task in bank.manifest.tasks:
        held = load_file(folder / task.file.name)
        assert held[MEANS].shape == (len(task.labels), 16) and held[MEANS].dtype == torch.bfloat16
        assert held[COUNTS].sum() == tiny.SIZES["train"]
        assert task.sizes["routing"] == held[MEANS].nbytes + held[COUNTS].nbytes
    shared = load_file(folder / bank.manifest.shared.name)
    assert shared[SCATTER].shape == (16 * 17 // 2,)
    assert shared[FREEDOM].tolist() == [[index, 24 - len(tiny.LABELS[name])] for index, name in enumerate(NAMES)]


@pytest.mark.parametrize(("width", "task", "shared"), [(384, "11.6 kB", "296 kB"), (768, "23.1 kB", "1.2 MB")])
def test_the_pages_bytes_are_those_of_the_format(width, task, shared):
    state = RouterState(texts=1024)
    state.add(0, torch.randn(64, width, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 15, 15)
    held = sum(tensor.nbytes for tensor in state.means[0].tensors().values())
    scatter = state.tensors()[SCATTER].nbytes
    assert f"{held / 1e3:.1f} kB" == task
    assert (f"{scatter / 1e3:.0f} kB" if scatter < 1e6 else f"{scatter / 1e6:.1f} MB") == shared
    page = (Path(__file__).parents[1] / "docs" / "routing.md").read_text("utf-8")
    assert task in page and shared in page


def test_extending_needs_no_earlier_text_and_gives_the_same_bytes(base_folder, tmp_path, folder):
    first = MaskBank.from_learner(learn(base_folder, tmp_path / "a", names=NAMES[:2]))
    bank = MaskBank.from_pretrained(first.save_pretrained(tmp_path / "bank"))
    base = tiny.fresh(base_folder)
    longer = bank.extend(base, training_args=tiny.arguments(tmp_path / "b"), max_length=8)
    longer.learn(topic_task("food"))
    whole, grown = MaskBank.from_pretrained(folder).manifest, MaskBank.from_learner(longer).manifest
    assert grown.shared == whole.shared
    assert [task.file for task in grown.tasks] == [task.file for task in whole.tasks]


def test_a_dropped_task_is_never_chosen_again(folder, base_folder):
    bank, base = MaskBank.from_pretrained(folder).drop("weather"), tiny.fresh(base_folder)
    assert bank.manifest.shared == MaskBank.from_pretrained(folder).manifest.shared
    pipe = bank.pipeline(model=bank.attach(base.model), tokenizer=base.tokenizer)
    assert {answer["task"] for answer in pipe(["rain snow wind", "cat dog", "milk"])} <= {"pets", "food"}


def test_a_failed_task_leaves_no_state(base_folder, tmp_path):
    learner = learn(base_folder, tmp_path, names=NAMES[:1])
    before = {name: tensor.clone() for name, tensor in learner.method.shared().items()}
    with pytest.raises(RuntimeError, match="on purpose"):
        learner.callbacks = (Fails(),)
        learner.learn(topic_task("weather"))
    assert list(learner.method.routing.means) == [0]
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.method.shared().items())


class Fails(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise RuntimeError("on purpose")


# --- the routers, on tasks made by hand -------------------------------------------------------------------------


class Made:
    """Tasks whose features and logits are given: three linear tasks on one input of size 6."""

    def __init__(self, masks, weight, heads=None):
        self.masks, self.weight = masks, weight
        self.heads = heads or [torch.eye(weight.shape[0])] * len(masks)

    @property
    def classes(self):
        return [head.shape[0] for head in self.heads]

    def logits(self, inputs):
        x = inputs["input_ids"]
        return [x @ (mask * self.weight).T @ head.T for mask, head in zip(self.masks, self.heads, strict=True)]

    def slopes(self, inputs, shares):
        free = shares.clone().requires_grad_()
        mixed = torch.einsum(
            "nk,koi,oi,ni->no", free, torch.stack(self.masks).float(), self.weight, inputs["input_ids"]
        )
        entropy = -(mixed.log_softmax(1).exp() * mixed.log_softmax(1)).sum()
        return torch.autograd.grad(entropy, free)[0]


def made(count=4, outputs=5, inputs=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(outputs, inputs, generator=generator) < 0.5 for _ in range(count)]
    return Made(masks, torch.randn(outputs, inputs, generator=generator)), torch.randn(7, inputs, generator=generator)


def closed_form(tasks, x):
    """The slopes of truth: dH/dz_k = -p_k (log p_k + H), g_i = <dH/dz, (M_i * W) x>."""
    mixed = x @ (torch.stack(tasks.masks).float().mean(0) * tasks.weight).T
    p = mixed.softmax(1)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    dz = -p * (p.log() + entropy)
    return torch.stack([(dz * (x @ (mask * tasks.weight).T)).sum(1) for mask in tasks.masks], 1)


def test_one_shot_superposition_follows_the_closed_form_of_a_linear_layer():
    tasks, x = made()
    slopes = closed_form(tasks, x)
    found = Superposition(tasks).confidences({"input_ids": x})
    assert torch.allclose(found, (-slopes).softmax(1), atol=1e-5)
    # Euler's identity: the shares' mean slope is -Var_p(z), never above 0.
    assert (slopes.mean(1) <= 0).all()


def test_slopes_follow_their_masks_whatever_the_order_and_doubles_are_equal():
    tasks, x = made()
    found = Superposition(tasks).confidences({"input_ids": x})
    order = [2, 0, 3, 1]
    turned = Made([tasks.masks[place] for place in order], tasks.weight)
    assert torch.allclose(Superposition(turned).confidences({"input_ids": x}), found[:, order], atol=1e-6)
    twice = Superposition(Made([tasks.masks[0], tasks.masks[1], tasks.masks[0]], tasks.weight))
    doubled = twice.confidences({"input_ids": x})
    assert torch.equal(doubled[:, 0], doubled[:, 2])


@pytest.mark.parametrize("binary", [False, True])
def test_a_single_task_is_always_chosen(binary):
    tasks, x = made(count=1)
    assert Superposition(tasks, binary=binary).confidences({"input_ids": x}).tolist() == [[1.0]] * 7


def separable():
    """Four masks, of which each reads two inputs of its own and is sure of an answer only there."""
    weight = torch.zeros(4, 8)
    weight[0, ::2], weight[1, 1::2] = 6.0, 6.0
    masks = [
        torch.zeros(4, 8, dtype=torch.bool).index_fill_(1, torch.tensor([2 * i, 2 * i + 1]), True) for i in range(4)
    ]
    return Made(masks, weight), torch.eye(8)


@pytest.mark.parametrize("name", ["entropy", "superposition", "superposition_binary"])
def test_on_separable_masks_every_way_to_ask_finds_the_task_whose_inputs_are_there(name):
    tasks, x = separable()
    router = plugins.load("routing", name).build(tasks)
    found = router.confidences({"input_ids": x})
    assert found.argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.isfinite().all() and (found >= 0).all() and (found <= 1).all()


@pytest.mark.parametrize(("count", "passes"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (10, 4)])
def test_halving_takes_log2_k_passes_and_only_tasks_that_are_left_compete(count, passes):
    tasks, x = made(count=count)
    asked, plain = [], tasks.slopes
    tasks.slopes = lambda inputs, shares: asked.append(shares) or plain(inputs, shares)
    found = Superposition(tasks, binary=True).confidences({"input_ids": x})
    assert len(asked) == passes
    for shares, later in itertools.pairwise(asked):
        assert ((later > 0) <= (shares > 0)).all()
        assert torch.allclose(later.sum(1), torch.ones(7))
    assert (found[asked[-1] == 0] == 0).all()


def test_the_better_half_is_of_those_that_are_left():
    slopes = torch.tensor([[3.0, 1.0, 2.0, 0.0, 4.0]])
    left = torch.tensor([[True, True, True, False, True]])
    assert better_half(slopes, left).tolist() == [[False, True, True, False, False]]


def test_saturated_logits_give_no_nan_and_one_label_says_nothing():
    logits = torch.tensor([[2000.0, -2000.0, 0.0], [0.0, 0.0, 0.0]])
    assert normalised_entropy(logits).tolist() == [0.0, pytest.approx(1.0)]
    assert normalised_entropy(torch.tensor([[7.0]])).tolist() == [1.0]
    tasks, x = made()
    tasks.weight *= 1e4
    for name in ("entropy", "superposition", "superposition_binary"):
        assert plugins.load("routing", name).build(tasks).confidences({"input_ids": x}).isfinite().all()


def test_entropy_is_a_share_so_that_few_labels_do_not_win_by_being_few():
    even = Made([torch.ones(6, 6).bool()] * 2, torch.zeros(6, 6), [torch.eye(2, 6), torch.eye(6)])
    confidence = plugins.load("routing", "entropy").build(even).confidences({"input_ids": torch.randn(3, 6)})
    assert torch.allclose(confidence, torch.zeros(3, 2), atol=1e-6)


class Clouds:
    """Tasks that are two Gaussian classes each, and features that are the inputs."""

    def __init__(self, spread=0.05, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.centers = torch.nn.functional.normalize(torch.randn(3, 2, 6, generator=generator), dim=-1)
        self.x = self.centers.repeat_interleave(40, 0).view(3, 40, 2, 6).transpose(1, 2)
        self.x = self.x + spread * torch.randn(self.x.shape, generator=generator)
        grown, parts = None, []
        for task in range(3):
            means, scatter, freedom = measure(self.x[task].reshape(80, 6), torch.arange(2).repeat_interleave(40), 2)
            parts.append(means.seen())
            grown = added(grown, task, scatter, freedom)
        self.state = Gaussians([means for means, _ in parts], [counts for _, counts in parts], *grown.covariance())
        self.classes = [2, 2, 2]

    def gaussians(self):
        return self.state

    def features(self, inputs):
        return inputs["x"]


@pytest.mark.parametrize("kind", [NearestMean, Learned])
def test_clouds_are_told_apart(kind):
    clouds = Clouds()
    found = kind(clouds).confidences({"x": clouds.x.reshape(240, 6)})
    assert (found.argmax(1) == torch.arange(3).repeat_interleave(80)).float().mean() > 0.97
    assert (found >= 0).all() and (found <= 1).all()


def test_a_text_of_none_is_not_believed_by_nearest_mean():
    clouds = Clouds()
    router = NearestMean(clouds)
    inside = router.confidences({"x": clouds.x.reshape(240, 6)}).amax(1)
    away = router.confidences({"x": -clouds.centers.view(6, 6)}).amax(1)
    assert away.max() < inside.quantile(0.02)
    assert inside.median() == pytest.approx(0.5, abs=0.1)


def test_nearest_mean_is_the_mahalanobis_distance_to_the_nearest_class():
    clouds = Clouds()
    x = clouds.x.reshape(240, 6)[:10]
    found = NearestMean(clouds).confidences({"x": x})
    inverse = clouds.state.covariance.inverse()
    for row in range(10):
        for task, means in enumerate(clouds.state.means):
            away = unit(x[row : row + 1]) - means.double()
            nearest = (away @ inverse * away).sum(1).min()
            assert found[row, task].item() == pytest.approx(1 / (1 + float(nearest) / clouds.state.typical), rel=1e-5)


def test_the_learned_classifier_is_the_ridge_fit_on_all_texts_at_once():
    clouds = Clouds(spread=0.3)
    x = torch.cat([unit(clouds.x.reshape(240, 6)), torch.ones(240, 1)], 1)
    targets = torch.eye(6).double().repeat_interleave(40, 0)
    # The shrinkage is the ridge: take what it adds to the scatter.
    labels = torch.arange(6).repeat_interleave(40)
    about = x[:, :6] - torch.stack([x[labels == c, :6].mean(0) for c in range(6)])[labels]
    ridge = clouds.state.covariance * 240 - about.T @ about
    gram = x.T @ x + torch.nn.functional.pad(ridge, (0, 1, 0, 1))
    fits = x @ torch.linalg.solve(gram, x.T @ targets)
    expected = fits.view(240, 3, 2).amax(2).clamp(0, 1).float()
    found = Learned(clouds).confidences({"x": clouds.x.reshape(240, 6)})
    assert torch.allclose(found, expected, atol=3e-3)  # the stored means are bfloat16
    assert torch.allclose(fits.sum(1), torch.ones(240).double(), atol=1e-6)


# --- on a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_answers_a_mixed_batch_in_one_call_as_it_answers_texts_alone(served, name):
    bank, model, tokenizer = served
    texts = ["cat dog bird", "rain snow", "bread milk", "fish cat", "wind sun rain"]
    pipe = bank.pipeline(model=model, tokenizer=tokenizer, router=name, batch_size=5)
    answers = pipe(texts)
    for text, answer in zip(texts, answers, strict=True):
        assert set(answer) == {"task", "label", "score", "confidence"}
        assert answer["label"] in tiny.LABELS[answer["task"]]
        assert 0 <= answer["confidence"] <= 1
        (alone,) = pipe(text)
        assert (alone["task"], alone["label"]) == (answer["task"], answer["label"])
        # Padded beside longer texts, sums are taken in another order.
        assert alone["score"] == pytest.approx(answer["score"], abs=1e-5)
        assert alone["confidence"] == pytest.approx(answer["confidence"], abs=1e-4)


def test_the_default_router_finds_the_tasks_by_their_words(served):
    bank, model, tokenizer = served
    pipe = bank.pipeline(model=model, tokenizer=tokenizer)
    texts = {"pets": "cat dog bird", "weather": "rain snow wind", "food": "bread milk bread"}
    assert [pipe(text)[0]["task"] for text in texts.values()] == list(texts)


def test_a_routed_answer_is_that_of_the_tasks_own_pipeline(served):
    bank, model, tokenizer = served
    routed = bank.pipeline(model=model, tokenizer=tokenizer)
    for text in ("cat dog", "snow wind", "milk"):
        answer = routed(text)[0]
        own = bank.pipeline(answer["task"], model, tokenizer)(text)[0]
        assert own["label"] == answer["label"] and own["score"] == pytest.approx(answer["score"], abs=1e-5)
    both = routed("cat dog", top_k=None)
    assert [entry["label"] for entry in both] != [] and sum(entry["score"] for entry in both) == pytest.approx(1)
    assert both[0] == routed("cat dog", top_k=1)[0]


def test_entropy_asks_every_task(served):
    bank, model, tokenizer = served
    inputs = inputs_of(tokenizer, ["cat dog", "rain"])
    found = bank.router("entropy", model).confidences(inputs)
    for place, name in enumerate(NAMES):
        bank.activate(model, name)
        with torch.no_grad():
            expected = 1 - normalised_entropy(model(**inputs).logits)
        assert torch.allclose(found[:, place], expected, atol=1e-5)


def test_slopes_on_a_transformer_are_its_derivatives(served):
    bank, model, tokenizer = served
    inputs = inputs_of(tokenizer, ["cat dog bird", "rain"])
    view = bank.router("superposition", model)._tasks
    shares = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    found = view.slopes(inputs, shares)

    def entropy(shares):
        plan = Shares([adapter_of(i) for i in range(3)], shares)
        with torch.no_grad(), model.base_model.planned(plan):
            each = torch.stack([normalised_entropy(logits) for logits in view._heads(plan, inputs)], 1)
        return (shares * each).sum(1).double()

    step = 1e-2
    for task in range(3):
        move = torch.zeros_like(shares)
        move[:, task] = step
        slope = (entropy(shares + move) - entropy(shares - move)) / (2 * step)
        assert torch.allclose(found[:, task].double(), slope, atol=2e-3)
    assert found.abs().max() > 0.05


def test_a_share_of_one_is_the_task_itself(served):
    bank, model, tokenizer = served
    inputs = inputs_of(tokenizer, ["cat dog bird", "rain"])
    view = bank.router("entropy", model)._tasks
    plan = Shares([adapter_of(i) for i in range(3)], torch.eye(3)[[1, 1]])
    with torch.no_grad(), model.base_model.planned(plan):
        mixed = list(view._heads(plan, inputs))[1]
    bank.activate(model, "weather")
    with torch.no_grad():
        assert torch.allclose(mixed, model(**inputs).logits, atol=1e-5)


def test_routing_leaves_the_model_as_it_was(served):
    bank, model, tokenizer = served
    bank.activate(model, "weather")
    before = tiny.logits(model)
    for name in ROUTERS:
        bank.router(name, model).confidences(inputs_of(tokenizer, ["cat dog", "rain"]))
        assert torch.equal(tiny.logits(model), before)
        assert not any(parameter.grad is not None for parameter in model.parameters())


def test_tasks_that_were_left_out_are_read_for_routing(folder, base_folder):
    bank, base = MaskBank.from_pretrained(folder), tiny.fresh(base_folder)
    model = bank.attach(base.model, ["food"])
    pipe = bank.pipeline(model=model, tokenizer=base.tokenizer)
    assert pipe("cat dog bird")[0]["task"] == "pets"
    assert bank.pipeline(model=str(base_folder))("rain snow wind")[0]["task"] == "weather"


# --- bad input --------------------------------------------------------------------------------------------------


def test_a_threshold_answers_none_of_these(served):
    bank, model, tokenizer = served
    texts = ["cat dog bird", "zzz qqq"]
    sure = bank.pipeline(model=model, tokenizer=tokenizer)(texts)
    between = sorted(answer["confidence"] for answer in sure)
    split = bank.pipeline(model=model, tokenizer=tokenizer, threshold=sum(between) / 2)(texts)
    for answer, plain in zip(split, sure, strict=True):
        rejected = plain["confidence"] < sum(between) / 2
        expected = {"task": None, "label": None, "score": None, "confidence": plain["confidence"]}
        assert answer == (expected if rejected else plain)
    assert [answer["task"] is None for answer in split].count(True) == 1
    everything = bank.pipeline(model=model, tokenizer=tokenizer, threshold=0.0)(texts)
    assert everything == sure


@pytest.mark.parametrize("threshold", [-0.1, 1.5, math.nan, math.inf, "half", True])
def test_a_threshold_out_of_range_is_refused(served, threshold):
    bank, model, tokenizer = served
    with pytest.raises(ConfigError, match=r"threshold: .* is no share from 0 to 1"):
        bank.pipeline(model=model, tokenizer=tokenizer, threshold=threshold)


def test_a_threshold_beside_a_task_a_missing_model_and_a_router_nobody_knows_are_refused(served):
    bank, model, tokenizer = served
    with pytest.raises(ConfigError, match="a task was named"):
        bank.pipeline("pets", model, tokenizer, threshold=0.5)
    with pytest.raises(ConfigError, match="model: none is given"):
        bank.pipeline()
    with pytest.raises(ConfigError, match=r"there is no 'nearest'.*Did you mean 'nearest_mean'"):
        bank.pipeline(model=model, tokenizer=tokenizer, router="nearest")
    with pytest.raises(ConfigError, match="function_to_apply"):
        bank.pipeline(model=model, tokenizer=tokenizer)("cat", function_to_apply="none")


@pytest.mark.parametrize("text", ["", " ", "猫と犬", "قطة", "\u200b", "cat " * 40], ids=repr)
def test_an_empty_text_and_one_in_another_script_are_answered(served, text):
    bank, model, tokenizer = served
    for name in ROUTERS:
        pipe = bank.pipeline(model=model, tokenizer=tokenizer, router=name, batch_size=2)
        answers = pipe([text, "cat dog"], truncation=True, max_length=16)
        assert answers[0]["label"] in tiny.LABELS[answers[0]["task"]]
        assert all(0 <= answer["confidence"] <= 1 for answer in answers)


def test_a_text_without_any_token_is_refused(served):
    bank, model, tokenizer = served
    pipe = bank.pipeline(model=model, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="text: is empty"):
        pipe("", add_special_tokens=False)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_bank_with_one_task_routes_to_it(base_folder, tmp_path, name):
    bank, base = MaskBank.from_learner(learn(base_folder, tmp_path, names=("pets",))), tiny.fresh(base_folder)
    pipe = bank.pipeline(model=bank.attach(base.model), tokenizer=base.tokenizer, router=name)
    assert [answer["task"] for answer in pipe(["cat", "rain snow"])] == ["pets", "pets"]


def test_tasks_with_equal_labels_are_told_apart_by_their_texts(base_folder, tmp_path):
    learner = tiny.learner(base_folder, tiny.options("supsup"), tmp_path)
    for name in ("pets", "food"):
        rows = {n: Dataset.from_dict(tiny.rows(("good", "bad"), 24, words=TOPIC[name])) for n in tiny.SIZES}
        learner.learn(task_from_datasets(name, rows))
    bank, base = MaskBank.from_learner(learner), tiny.fresh(base_folder)
    answers = bank.pipeline(model=bank.attach(base.model), tokenizer=base.tokenizer)(["cat dog fish", "bread milk"])
    assert [answer["task"] for answer in answers] == ["pets", "food"]
    assert {answer["label"] for answer in answers} <= {"good", "bad"}


def test_a_bank_without_state_says_so_and_routers_that_need_none_still_work(base_folder, tmp_path):
    learner = learn(base_folder, tmp_path, names=NAMES[:1], routing=0)
    bank, base = MaskBank.from_learner(learner), tiny.fresh(base_folder)
    assert bank.manifest.shared is None
    model = bank.attach(base.model)
    for name in ("nearest_mean", "learned"):
        with pytest.raises(BankError, match=r"nothing was collected for it of pets.*take the router entropy"):
            bank.pipeline(model=model, tokenizer=base.tokenizer, router=name)
    assert bank.pipeline(model=model, tokenizer=base.tokenizer, router="entropy")("cat")[0]["task"] == "pets"
    longer = bank.extend(tiny.fresh(base_folder), training_args=tiny.arguments(tmp_path / "b"), max_length=8)
    longer.learn(topic_task("weather"))
    mixed = MaskBank.from_learner(longer)
    with pytest.raises(BankError, match="of pets"):
        mixed.router("nearest_mean", mixed.attach(tiny.fresh(base_folder).model))


@pytest.mark.parametrize("routing", [-1, 1.5, True, "all"])
def test_a_number_of_texts_that_is_none_is_refused(base_folder, tmp_path, routing):
    with pytest.raises(ConfigError, match="routing: expected a number of texts"):
        tiny.learner(base_folder, tiny.options("supsup"), tmp_path, routing=routing)


# --- a bank is hostile data -------------------------------------------------------------------------------------


def spoilt(folder, tmp_path, change, *, shared):
    """Return a bank whose shared file, or whose first task's, was changed by someone who signs what they forge."""
    copy = shutil.copytree(folder, tmp_path / "spoilt")
    manifest = MaskBank.from_pretrained(copy).manifest
    held = manifest.shared if shared else manifest.tasks[0].file
    tensors = load_file(copy / held.name)
    change(tensors)
    file, data = task_blob("shared" if shared else "task-00000", tensors)
    (copy / file.name).write_bytes(data)
    if shared:
        forged = replace(manifest, shared=file)
    else:
        forged = replace(manifest, tasks=[replace(manifest.tasks[0], file=file), *manifest.tasks[1:]])
    (copy / "bank.json").write_bytes(forged.to_bytes())
    return MaskBank.from_pretrained(copy)


def wide(tensors):
    tensors[SCATTER] = torch.eye(17)[tuple(torch.triu_indices(17, 17))].contiguous()


SHARED = {
    "no triangle": lambda t: t.update({SCATTER: t[SCATTER][1:].clone()}),
    "another dtype": lambda t: t.update({SCATTER: t[SCATTER].bfloat16()}),
    "a negative variance": lambda t: t.update({SCATTER: t[SCATTER] - 100 * torch.arange(len(t[SCATTER]))}),
    "not finite": lambda t: t[SCATTER].__setitem__(3, math.nan),
    "no sum": lambda t: t.pop(SCATTER),
    "no numbers of tasks": lambda t: t.pop(FREEDOM),
    "a task twice": lambda t: t.update({FREEDOM: t[FREEDOM][[0, 0]].clone()}),
    "below 0": lambda t: t[FREEDOM].__setitem__((0, 1), -5),
    "a stranger": lambda t: t.update({"extra": torch.zeros(3)}),
}
TASK = {
    "of another number of classes": lambda t: t.update({MEANS: t[MEANS][:1].clone()}),
    "in float32": lambda t: t.update({MEANS: t[MEANS].float()}),
    "without counts": lambda t: t.pop(COUNTS),
    "without means": lambda t: t.pop(MEANS),
    "counts below 0": lambda t: t[COUNTS].__setitem__(0, -1),
    "no texts": lambda t: t[COUNTS].zero_(),
    "of no width": lambda t: t.update({MEANS: t[MEANS][:, :0].clone()}),
    "not finite": lambda t: t[MEANS].__setitem__((0, 0), math.inf),
}


@pytest.mark.parametrize("kind", SHARED)
def test_a_forged_shared_file_is_refused(folder, base_folder, tmp_path, kind):
    bank = spoilt(folder, tmp_path, SHARED[kind], shared=True)
    with pytest.raises(BankCorruptError, match="shared-"):
        bank.router("nearest_mean", bank.attach(tiny.fresh(base_folder).model))
    if kind != "a negative variance":  # seen where it is used: factoring a matrix that nobody has asked for costs d^3
        with pytest.raises(BankCorruptError, match="shared-"):
            bank.verify()


@pytest.mark.parametrize("kind", TASK)
def test_forged_means_are_refused(folder, base_folder, tmp_path, kind):
    bank = spoilt(folder, tmp_path, TASK[kind], shared=False)
    with pytest.raises(BankCorruptError, match="task 'pets'"):
        bank.attach(tiny.fresh(base_folder).model)


def test_a_state_of_another_width_is_refused(folder, base_folder, tmp_path):
    bank = spoilt(folder, tmp_path / "wide", wide, shared=True)
    base = tiny.fresh(base_folder)
    with pytest.raises(BaseMismatchError, match="has 17 numbers a text, this base gives 16"):
        bank.extend(base, training_args=tiny.arguments(tmp_path / "out"))
    with pytest.raises(BaseMismatchError, match="has 17 numbers a text, this base gives 16"):
        bank.router("nearest_mean", bank.attach(base.model))
    bank = spoilt(folder, tmp_path / "narrow", lambda t: t.update({MEANS: t[MEANS][:, 1:].clone()}), shared=False)
    with pytest.raises(BankCorruptError, match="its class means have 15 numbers, the covariance 16"):
        bank.router("nearest_mean", bank.attach(tiny.fresh(base_folder).model))


def test_state_that_was_read_is_the_state_that_was_written():
    means, scatter, freedom = measure(torch.randn(12, 5), torch.arange(12) % 3, 3)
    again = TaskMeans.read(means.tensors(), 3)
    assert torch.equal(again.means, means.means) and torch.equal(again.counts, means.counts)
    spread = added(None, 4, scatter, freedom)
    assert torch.equal(Spread.read(spread.tensors()).scatter, scatter)
    assert spread.width == 5


# --- in a run ---------------------------------------------------------------------------------------------------


def test_a_run_that_stopped_between_bank_and_record_ends_as_one_that_did_not(base_folder, tmp_path):
    """The bank then holds a task more than the run, and its common sum that task's part already."""
    whole = learn(base_folder, tmp_path / "a", names=())
    stopped = learn(base_folder, tmp_path / "b", names=())
    runs = [RunFolder.create(tmp_path / name / "run", made.header()) for name, made in (("a", whole), ("b", stopped))]
    for name in NAMES:
        whole.learn(topic_task(name))
        whole.add_to(runs[0])
    for name in NAMES[:2]:
        stopped.learn(topic_task(name))
        if name == "pets":
            stopped.add_to(runs[1])
        else:
            stopped.save_bank(runs[1].path / "bank")
    again = learn(base_folder, tmp_path / "c", names=())
    again.restore(RunFolder.open(runs[1].path))
    assert again.tasks == ["pets"]
    again.remember(topic_task("pets"))
    for name in NAMES[1:]:
        again.learn(topic_task(name))
        again.add_to(runs[1])
    ends = [MaskBank.from_pretrained(run.path / "bank") for run in runs]
    assert ends[0].manifest == ends[1].manifest


def test_verify_names_a_shared_file_that_was_damaged(base_folder, tmp_path):
    learner = learn(base_folder, tmp_path, names=NAMES[:1])
    run = learner.save_pretrained(tmp_path / "run")
    shared = MaskBank.from_pretrained(run / "bank").manifest.shared.name
    assert verify(run, tiny.fresh(base_folder)).exact
    data = bytearray((run / "bank" / shared).read_bytes())
    data[-1] ^= 1
    (run / "bank" / shared).write_bytes(data)
    verdict = verify(run, tiny.fresh(base_folder))
    assert verdict.files == [f"bank/{shared}"] and not verdict.exact
    assert not any(task["moved"] for task in verdict.tasks)
