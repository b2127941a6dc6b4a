"""The masked adapter itself: options, names, what stays frozen, bases it goes on, gradients, its registration."""

import copy
import dataclasses
import importlib
import itertools
import json
import pickle

import pytest
import torch
from masked import HARD, NAMES, WEIGHTS, changed, config, finish, full, load_hard, logits, move, place, state
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.pytorch_utils import Conv1D

import hf_cl.tuner
import hf_cl.tuner.peft_type
from hf_cl import MaskConfig, OwnershipCallback
from hf_cl.errors import BaseModelError, ConfigError
from hf_cl.layers.linear import apply_weight
from hf_cl.ownership.owner import FREE
from hf_cl.tuner.adapter_file import adapter_of_key
from hf_cl.tuner.layer import MaskLinear
from hf_cl.tuner.names import require_name

pytest_plugins = ["masked"]


# --- options --------------------------------------------------------------------------------------------------


def test_a_listed_family_needs_no_targets_and_the_base_says_how_many_labels(tiny_model):
    model = get_peft_model(tiny_model(), MaskConfig())
    assert len(model.base_model.mask_layers()) == 12
    assert model.peft_config["default"].num_labels == 2
    assert model.peft_config["default"].head_modules == ["classifier"]


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ({"modules_to_save": ["classifier"]}, "head_modules"),
        ({"target_parameters": ["weight"]}, "target_modules"),
        ({"rank_pattern": {"query": 4}}, "density"),
        ({"alpha_pattern": {"query": 4}}, "scale"),
        ({"r": 8}, "density"),
        ({"lora_alpha": 16}, "scale"),
        ({"bias": "none"}, "train_norms"),
    ],
)
def test_options_of_other_methods_are_refused_with_what_to_use(option, instead):
    with pytest.raises(ConfigError, match=f"^{next(iter(option))}: makes no sense for a mask: .*`{instead}`"):
        MaskConfig(**option)


def test_an_unknown_option_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"^densty: is no option of MaskConfig\. Did you mean 'density'"):
        MaskConfig(densty=0.1)


def test_a_config_survives_being_copied_pickled_replaced_and_saved(tmp_path):
    made = full()
    made.save_pretrained(tmp_path)
    assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == dataclasses.replace(made) == made  # noqa: S301
    assert PeftConfig.from_pretrained(tmp_path) == made
    assert type(PeftConfig.from_pretrained(tmp_path)) is MaskConfig
    assert dataclasses.replace(made, density=0.5).density == 0.5
    with pytest.raises(ConfigError, match="density"):
        dataclasses.replace(made, density=2)


def test_sets_are_written_in_order(tmp_path):
    # Twenty strings come out of a set in order once in 20! hash seeds.
    names = [f"layer.{number:02}" for number in range(20)]
    first = MaskConfig(target_modules=set(names), exclude_modules=set(names), head_modules=names)
    later = MaskConfig(head_modules=names)
    later.target_modules, later.exclude_modules = set(names), set(names)
    for made, folder in ((first, tmp_path / "first"), (later, tmp_path / "later")):
        made.save_pretrained(folder)
        stored = json.loads((folder / "adapter_config.json").read_text())
        assert stored["target_modules"] == stored["exclude_modules"] == names
    assert (tmp_path / "first" / "adapter_config.json").read_bytes() == (
        tmp_path / "later" / "adapter_config.json"
    ).read_bytes()


@pytest.mark.parametrize(
    "targets",
    [("query", "query"), (["query", "key"], ["key", "query"]), "all"],
    ids=["a string", "another order", "twenty or more, which PEFT shortens"],
)
def test_the_same_targets_are_accepted_again_however_they_are_written(tiny_model, targets):
    base = tiny_model(num_hidden_layers=4)
    if targets == "all":
        names = [name for name, module in base.bert.encoder.named_modules() if isinstance(module, torch.nn.Linear)]
        targets = (names, names)
    model = get_peft_model(base, config(target_modules=targets[0]), adapter_name="news")
    model.add_adapter("pets", config(target_modules=targets[1]))
    assert list(model.peft_config) == ["news", "pets"]


# --- names ----------------------------------------------------------------------------------------------------


def test_files_of_tasks_named_like_parts_of_paths_hold_all_keys(hard):
    _, folder, _ = hard
    keys = {name: set(load_file(place(folder, name) / WEIGHTS)) for name in HARD}
    assert len(keys["0"]) == 12 * 7 + 2 + 4 * 2
    assert all(found == keys["0"] for found in keys.values())


@pytest.mark.parametrize("order", list(itertools.permutations(HARD[:3])), ids="-".join)
def test_tasks_named_like_parts_of_paths_load_in_every_order(tiny_model, hard, order):
    _, folder, before = hard
    model = load_hard(tiny_model(), folder, order)
    for name in order:
        assert torch.equal(logits(model, name), before[name])


def test_many_tasks_named_like_parts_of_paths_load_and_are_deleted_one_by_one(tiny_model, hard):
    _, folder, before = hard
    model = load_hard(tiny_model(), folder, HARD[::-1])
    model.set_adapter(HARD[-1])
    for gone, name in enumerate(HARD[:-1]):
        model.delete_adapter(name)
        left = {found[1] for found in map(adapter_of_key, model.state_dict()) if found is not None}
        assert left == set(HARD[gone + 1 :])
        for other in HARD[gone + 1 :]:
            assert torch.equal(logits(model, other), before[other])
        model.set_adapter(HARD[-1])


@pytest.mark.parametrize("name", ["0", "query", "dense", "layer", "hfcl_scores"])
def test_loading_a_task_named_like_part_of_a_path_leaves_gradients_on(one, hard, name):
    model = one(train_norms=True, task_index=90)
    before = state(model)
    model.load_adapter(place(hard[1], name), adapter_name=name)
    assert [each for each in changed(before, state(model)) if each.endswith("news requires grad")] == []


BAD = ["a.b", "..", "a/b", "a\\b", "a:b", "a\nb", "a\x00b", "", " ", " a", "a\t", "__base__", "keys", "values", "items"]
BAD += ["pop", "copy", "update", "train", "eval", "forward", "training", "_modules", "_buffers", "__class__"]
WORSE = ["values ", " __base__", ".modules", "/parameters"]


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
@pytest.mark.parametrize("name", [*BAD, *WORSE])
def test_a_name_that_cannot_be_is_refused_with_one_that_can(one, name):
    model = one()
    before = state(model)
    with pytest.raises(ConfigError, match=r"^adapter name ") as raised:
        model.add_adapter(name, config())
    assert changed(before, state(model)) == []
    suggested = str(raised.value).rpartition("Use '")[2].removesuffix("'.")
    require_name(suggested)


@pytest.mark.parametrize("name", ["a.b", "values"])
def test_a_base_is_not_touched_for_a_name_that_cannot_be(tiny_model, name):
    base = tiny_model()
    with pytest.raises(ConfigError, match=r"^adapter name "):
        get_peft_model(base, config(), adapter_name=name)
    assert [type(module) for module in base.modules()] == [type(module) for module in tiny_model().modules()]


# --- what is finished stays frozen ---------------------------------------------------------------------------


def test_a_finished_task_requires_no_gradient_whatever_is_set_active(bank):
    def trainable():
        return [name for name, parameter in bank.named_parameters() if parameter.requires_grad]

    for name in NAMES:
        bank.set_adapter(name)
        assert trainable() == []
        with bank.disable_adapter():
            pass
        assert trainable() == []


def test_only_the_new_task_requires_gradients(bank):
    bank.add_adapter("next", config(train_norms=True))
    bank.set_adapter("news")
    bank.set_adapter("next")
    with bank.disable_adapter():
        pass
    names = [name for name, parameter in bank.named_parameters() if parameter.requires_grad]
    assert len(names) == 12 + 12 + 2 + 2 * 4
    assert all(".next" in name for name in names)


def test_initial_scores_and_heads_differ_by_task_and_by_layer(one):
    model = one()
    model.add_adapter("pets", config())
    first, second = model.base_model.mask_layers()[:2]
    assert not torch.equal(first.hfcl_scores["news"], first.hfcl_scores["pets"])
    assert not torch.equal(first.hfcl_scores["news"], second.hfcl_scores["news"])
    own = model.base_model.own_layers()[-1].hfcl_copy
    assert not torch.equal(own["news"].weight, own["pets"].weight)


def test_initial_scores_do_not_come_from_the_global_generator(one):
    first, second = one(), one()
    for a, b in zip(first.base_model.mask_layers(), second.base_model.mask_layers(), strict=True):
        torch.manual_seed(torch.seed() % 7)
        assert torch.equal(a.hfcl_scores["news"], b.hfcl_scores["news"])


# --- what the first adapter fixes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("seed", 1),
        ("scale", 2.0),
        ("compose", "prune"),
        ("target_modules", ["intermediate.dense"]),
        ("head_modules", ["bert.pooler.dense", "classifier"]),
        ("train_norms", True),
    ],
)
def test_what_the_first_adapter_fixed_is_refused_by_name(one, name, other):
    model = one()
    before = logits(model)
    with pytest.raises(ConfigError, match=f"^{name}: this model's first adapter fixed"):
        model.add_adapter("pets", config(**{name: other}))
    assert list(model.peft_config) == ["news"]
    assert torch.equal(logits(model), before)
    model.add_adapter("pets", config())


def test_a_number_that_is_taken_is_refused(one):
    model = one()
    with pytest.raises(ConfigError, match="task_index: 0 is taken"):
        model.add_adapter("pets", config(task_index=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": -0.1}, "density"),
        ({"compose": "sum"}, "compose: 'sum' is not one of delta, prune, random"),
        ({"rank": "size"}, "rank"),
        ({"trains": "all"}, "trains"),
        ({"values_dtype": "float16"}, "values_dtype"),
        ({"scale": 0.0}, "scale"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels: 3, but id2label names 1"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message):
    with pytest.raises(ConfigError, match=message):
        MaskConfig(**options)


def test_targets_that_match_nothing_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="match no module"):
        get_peft_model(tiny_model(), config(target_modules=["attn.qkv"]))


def test_excluded_linears_stay_the_bases_own(tiny_model):
    left_out = "bert.encoder.layer.0.output.dense"
    model = get_peft_model(tiny_model(), config(exclude_modules=[left_out]), adapter_name="news")
    assert len(model.base_model.mask_layers()) == 11
    assert type(model.get_submodule(f"base_model.model.{left_out}")) is torch.nn.Linear


def test_a_head_missing_from_the_checkpoint_is_the_tasks_own(tiny_model, tmp_path):
    from transformers import BertForSequenceClassification

    tiny_model().bert.save_pretrained(tmp_path)
    base, info = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    model = get_peft_model(base, MaskConfig.from_loading_info(info, num_labels=3), adapter_name="news")
    assert model.peft_config["news"].head_modules == ["classifier"]


# --- bases ----------------------------------------------------------------------------------------------------


def test_a_bf16_base_keeps_a_float32_store_and_its_tasks_exact(tiny_model, token_rows, arguments):
    base = tiny_model().to(torch.bfloat16)
    model = get_peft_model(base, config(trains="claimed", train_norms=True), adapter_name="news")
    before = []
    for name, labels in (("news", 3), ("pets", 2)):
        if name != "news":
            model.add_adapter(name, config(num_labels=labels, trains="claimed", train_norms=True))
            model.set_adapter(name)
        callback = OwnershipCallback(name, mask_share=0.5)
        Trainer(model, arguments(), train_dataset=token_rows(labels, labels), callbacks=[callback]).train()
        before.append(logits(model, name))
    for name, old in zip(("news", "pets"), before, strict=True):
        assert torch.equal(logits(model, name), old)
    layer = model.base_model.mask_layers()[0]
    assert (layer.store.values.dtype, layer.store.weight.dtype) == (torch.float32, torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in model.base_model.own_tensors("news").values())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model().to(torch.bfloat16)))


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.bfloat16), lambda model: model.half()])
def test_a_cast_of_the_whole_model_is_refused(bank, cast):
    logits(bank, "news")
    before = state(bank)
    with pytest.raises(BaseModelError, match="a cast would change finished tasks"):
        cast(bank)
    assert changed(before, state(bank)) == []


@pytest.mark.parametrize("by", ["peft", "transformers"])
def test_a_model_that_another_peft_method_wraps_is_refused_with_the_way_out(tiny_model, by):
    base, lora = tiny_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    wrapped = get_peft_model(base, lora) if by == "peft" else base
    if by == "transformers":
        base.add_adapter(lora)
    before = [(name, type(module)) for name, module in wrapped.named_modules()]
    with (
        pytest.warns(UserWarning),
        pytest.raises(ConfigError, match=r"merge_and_unload\(\) or unload\(\) on that first"),
    ):
        get_peft_model(wrapped, config())
    assert [(name, type(module)) for name, module in wrapped.named_modules()] == before


def test_a_quantised_base_is_refused(tiny_model):
    base = tiny_model()
    base.is_quantized = True
    with pytest.raises(BaseModelError, match="quantised"):
        get_peft_model(base, config())


def test_a_base_without_values_is_refused(tiny_model):
    with pytest.raises(BaseModelError, match="meta device"):
        get_peft_model(tiny_model().to("meta"), config())


def test_train_norms_gives_each_task_copies_that_begin_as_the_bases(one, tiny_model):
    model, base = one(train_norms=True), tiny_model()
    own = model.base_model.own_tensors("news")
    norms = [name for name in own if "LayerNorm" in name]
    assert len(norms) == 8
    assert not [name for name in norms if "embeddings" in name]
    for name in norms:
        assert torch.equal(own[name], base.state_dict()[name])
    finish(model, "news")
    assert not torch.equal(own[norms[0]], base.state_dict()[norms[0]])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


# --- gradients ------------------------------------------------------------------------------------------------


class FirstNorm(TrainerCallback):
    """Keeps the norm of the first step's gradients."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            grads = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
            self.norm = torch.stack([grad.norm() for grad in grads]).norm()


def test_accumulation_does_not_scale_gradients(tiny_model, token_rows, arguments):
    found = []
    for batch, accumulation in ((8, 1), (4, 2)):
        base = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = get_peft_model(base, config(), adapter_name="news")
        assert model.base_model.model.accepts_loss_kwargs is False
        watch = FirstNorm()
        args = arguments(
            max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_grad_norm=0.0
        )
        Trainer(model, args, train_dataset=token_rows(0, 3, 8), callbacks=[watch, OwnershipCallback("news")]).train()
        found.append(watch.norm)
    # Sums of the same eight rows in another order: float32 rounding and no more.
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("phase", ["mask", "weight"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, phase, reentrant):
    def gradients(checkpointing):
        base = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = get_peft_model(base, config(trains="claimed"), adapter_name="news")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        if phase == "weight":
            model.base_model.begin_weight_phase("news")
        move(model, "news")
        model.train()
        ids = torch.arange(24).view(4, 6)
        model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {name: grad for name, grad in grads.items() if grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) == 12 + 2
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("rank", ["signed", "magnitude"])
@pytest.mark.parametrize("form", ["delta", "prune", "random"])
def test_gradients_of_scores_and_values_are_those_of_the_formula(tiny_model, form, rank):
    base = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = get_peft_model(base, config(trains="claimed", compose=form, rank=rank), adapter_name="news")
    layer = model.base_model.mask_layers()[4]
    seen = {}

    def watch(module, inputs, output):
        seen["x"] = inputs[0].detach()
        output.register_hook(lambda grad: seen.update(grad=grad))

    layer.register_forward_hook(watch)

    def weight_gradient():
        model.zero_grad()
        ids = torch.arange(24).view(4, 6)
        model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        return torch.einsum("bto,bti->oi", seen["grad"], seen["x"])

    model.base_model.refresh_masks("news")
    expected = weight_gradient() * layer.store.values
    if rank == "magnitude":
        expected = expected * layer.hfcl_scores["news"].sign()
    # Another order of summation than the linear's own.
    torch.testing.assert_close(layer.hfcl_scores["news"].grad, expected, rtol=1e-4, atol=1e-7)
    assert layer.hfcl_values["news"].grad is None
    model.base_model.begin_weight_phase("news")
    expected = weight_gradient().view(-1)[(layer.mask("news") & (layer.store.owner == FREE)).view(-1)]
    torch.testing.assert_close(layer.hfcl_values["news"].grad, expected, rtol=1e-4, atol=1e-7)
    assert layer.hfcl_scores["news"].grad is None


# --- registration ---------------------------------------------------------------------------------------------


def test_registration_is_idempotent():
    members = len(PeftType)
    importlib.reload(hf_cl.tuner.peft_type)
    importlib.reload(hf_cl.tuner)
    assert len(PeftType) == members
    assert hf_cl.tuner.peft_type.extend_peft_type("HFCL") is PeftType("HFCL") is PeftType["HFCL"] is PeftType.HFCL
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.HFCL] is MaskConfig
    assert copy.deepcopy(PeftType.HFCL) is PeftType.HFCL


@pytest.mark.parametrize("density", [0.03, 0.4])  # few entries, and so many that the dense product is made
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients_at_few_entries_are_those_of_the_dense_product(kind, density):
    torch.manual_seed(0)
    layer = nn.Linear(20, 30) if kind == "linear" else Conv1D(30, 20)
    options = config(scale=1.0, density=density, trains="claimed")
    masked = MaskLinear(layer, "layer", options)
    masked.add("news", options)
    masked.set_adapter("news")
    masked.begin_weight_phase("news")
    x = torch.randn(4, 5, 20, requires_grad=True)
    out = masked(x)
    assert (type(out.grad_fn).__name__ == "SampledLinearBackward") is (density < 0.1)
    back = torch.randn(out.shape)
    out.backward(back)
    dense = masked.store.weight.detach().clone().requires_grad_()
    again = x.detach().clone().requires_grad_()
    given = apply_weight(layer, again, dense)
    given.backward(back)
    assert copy.deepcopy(masked)(x.detach()).requires_grad
    # The product is the same one; sums over rows and outputs go in another order.
    assert torch.equal(out, given)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-5, atol=1e-5)
    values = masked.hfcl_values["news"].grad
    torch.testing.assert_close(values, dense.grad.view(-1)[masked._where], rtol=1e-5, atol=1e-5)
    assert values.count_nonzero() == values.numel()


# --- switching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.02, 0.2])  # positions of the sparse ones are kept
def test_a_finished_task_is_shown_by_its_bits_whatever_was_kept_of_them(one, density):
    model = one(density=density)
    tuner = model.base_model
    model.add_adapter("other", config(density=density))
    for seed, name in enumerate(("news", "other")):
        for layer in tuner.mask_layers():
            drawn = torch.rand(layer.base_layer.weight.shape, generator=torch.Generator().manual_seed(seed))
            layer.install(name, drawn < density, None)
    before = {name: logits(model, name) for name in ("news", "other", "news", "other")}
    assert {layer.patch("news") is not None for layer in tuner.mask_layers()} == {density == 0.02}
    mixed = {"adapter_names": ["news", "other"] * 2 + ["news"]}
    together = logits(model, **mixed)
    layer = tuner.mask_layers()[0]
    layer.hfcl_bits["news"].bitwise_not_()
    moved = logits(model, "news")
    assert not torch.equal(moved, before["news"])
    assert not torch.equal(logits(model, **mixed), together)
    layer.hfcl_bits["news"] = layer.hfcl_bits["news"].bitwise_not()
    assert torch.equal(logits(model, "news"), before["news"])
    layer.store.values.neg_()
    assert not torch.equal(logits(model, **mixed), together)
    layer.store.values.neg_()
    assert torch.equal(logits(model, **mixed), together)
    model.set_adapter("other")
    model.delete_adapter("news")
    assert not any("news" in layer._derived for layer in tuner.mask_layers())
    assert torch.equal(logits(model, "other"), before["other"])
