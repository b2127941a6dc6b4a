"""The masked adapter as a PEFT method: every verb of PEFT's, on a bank of three tasks."""

import copy
import importlib
import itertools
import json
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import hf_cl.tuner
import hf_cl.tuner.peft_type
from hf_cl import MaskConfig, OwnershipCallback
from hf_cl.errors import BaseModelError, ConfigError, OwnershipError
from hf_cl.masks.select import kept_count
from hf_cl.ownership.owner import FREE

NAMES = ("news", "pets", "shop")
ORDERS = list(itertools.permutations(NAMES))


def config(**options):
    return MaskConfig(**({"task_type": "SEQ_CLS", "density": 0.2, "num_labels": 3} | options))


def logits(model, adapter=None):
    if adapter is not None:
        model.set_adapter(adapter)
    ids = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(9))
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def move(model, adapter, seed=3):
    """Stand in for training: move the head and the scores, and in the weight phase the values."""
    generator = torch.Generator().manual_seed(seed)
    tuner = model.base_model
    moving = [layer.hfcl_scores[adapter] for layer in tuner.mask_layers()]
    moving += [layer.hfcl_values[adapter] for layer in tuner.mask_layers()] if tuner.phase(adapter) == "weight" else []
    with torch.no_grad():
        for tensor in [*moving, *tuner.own_tensors(adapter).values()]:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    if tuner.phase(adapter) == "mask":
        tuner.refresh_masks(adapter)


def finish(model, adapter, seed=3):
    """Take an adapter to its commit without a Trainer."""
    model.set_adapter(adapter)
    move(model, adapter, seed)
    if model.peft_config[adapter].trains != "nothing":
        model.base_model.begin_weight_phase(adapter)
        move(model, adapter, seed)
    model.base_model.commit(adapter)


@pytest.fixture
def one(tiny_model):
    """Make a model with one adapter, `news`."""
    return lambda **options: get_peft_model(tiny_model(), config(**options), adapter_name="news")


def make_bank(tiny_model):
    model = get_peft_model(tiny_model(), config(trains="claimed", train_norms=True), adapter_name="news")
    finish(model, "news")
    for seed, name, labels, trains in ((1, "pets", 2, "nothing"), (2, "shop", 4, "claimed")):
        model.add_adapter(name, config(num_labels=labels, trains=trains, train_norms=True))
        finish(model, name, seed)
    return model


@pytest.fixture
def bank(tiny_model):
    """Three committed tasks of unequal label counts: values, a mask alone, values again."""
    return make_bank(tiny_model)


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """The folder of such a bank, and each task's logits when it was saved."""
    model, folder = make_bank(tiny_model), tmp_path_factory.mktemp("bank")
    model.save_pretrained(folder)
    return folder, {name: logits(model, name) for name in NAMES}


def load(tiny_model, folder, *names):
    model = PeftModel.from_pretrained(tiny_model(), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        loaded = model.load_adapter(folder / name, adapter_name=name)
        assert not loaded.missing_keys
        assert not loaded.unexpected_keys
    return model


# --- PEFT's verbs -----------------------------------------------------------------------------------------


def test_the_first_adapter_is_active_and_trains_its_scores_vector_and_head(one):
    model = one(density=0.1)
    tuner = model.base_model
    assert model.active_adapter == "news"
    assert [layer.phase("news") for layer in tuner.mask_layers()] == ["mask"] * 12
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(size for name, size in trained.items() if ".hfcl_scores." in name) == 4096
    assert sum(size for name, size in trained.items() if ".hfcl_values." in name) == 8 * 26 + 4 * 51
    assert sum(size for name, size in trained.items() if ".hfcl_copy." in name) == 3 * 16 + 3
    assert len(trained) == 12 + 12 + 2


def test_a_second_adapter_leaves_the_first_one_active(one):
    model = one()
    before = logits(model)
    model.add_adapter("pets", config(num_labels=2))
    assert model.active_adapter == "news"
    assert torch.equal(logits(model), before)
    assert logits(model, "pets").shape == (5, 2)
    assert torch.equal(logits(model, "news"), before)


def test_disabled_adapters_are_the_base_bit_for_bit(tiny_model, bank):
    base = logits(tiny_model())
    for name in NAMES:
        before = logits(bank, name)
        with bank.disable_adapter():
            assert torch.equal(logits(bank), base)
        assert torch.equal(logits(bank), before)


def test_unloading_gives_the_base_back(tiny_model, bank):
    base = tiny_model()
    unloaded = bank.unload()
    assert torch.equal(logits(unloaded), logits(base))
    assert unloaded.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("name", NAMES)
def test_deleting_a_task_leaves_the_others_as_they_were(bank, name):
    rest = [other for other in NAMES if other != name]
    before = {other: logits(bank, other) for other in rest}
    bank.delete_adapter(name)
    for other in rest:
        assert torch.equal(logits(bank, other), before[other])
    assert not [key for key in bank.state_dict() if f".{name}" in key]


def test_deleting_the_active_task_shows_the_next_one_with_its_labels(bank):
    bank.set_adapter("shop")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        bank.delete_adapter("shop")
    assert bank.base_model.active_adapters == ["news"]
    assert bank.config.num_labels == logits(bank).shape[1] == 3


def test_a_number_is_not_used_twice_after_a_deletion(bank):
    bank.set_adapter("news")
    bank.delete_adapter("shop")
    bank.add_adapter("next", config(train_norms=True))
    assert bank.peft_config["next"].task_index == 3


def test_a_copied_bank_answers_alike_and_on_its_own(bank):
    copied = copy.deepcopy(bank)
    before = logits(bank, "news")
    assert torch.equal(logits(copied, "news"), before)
    copied.base_model.mask_layers()[0].store.values.zero_()
    copied.base_model.mask_layers()[0].compose()
    assert not torch.equal(logits(copied), before)
    assert torch.equal(logits(bank), before)


def test_two_active_adapters_are_refused_and_nothing_changes(bank):
    before = logits(bank, "pets")
    with pytest.raises(OwnershipError, match="news, pets cannot be active together"):
        bank.base_model.set_adapter(["news", "pets"])
    assert bank.base_model.active_adapters == ["pets"]
    assert torch.equal(logits(bank), before)


def test_labels_follow_the_active_task(tiny_model):
    base = tiny_model()
    base.config.problem_type = "regression"
    names = {0: "good", 1: "bad", 2: "ugly"}
    model = get_peft_model(base, config(num_labels=None, id2label=names), adapter_name="news")
    model.add_adapter("pets", config(num_labels=2))
    for name, labels in (("news", names), ("pets", {0: "LABEL_0", 1: "LABEL_1"}), ("news", names)):
        model.set_adapter(name)
        assert model.config.num_labels == model.base_model.model.num_labels == len(labels)
        assert model.config.id2label == labels
        assert model.config.label2id == {label: index for index, label in labels.items()}
        assert model.config.problem_type == "single_label_classification"
        ids = torch.zeros((len(labels), 3), dtype=torch.long)
        assert model(input_ids=ids, labels=torch.arange(len(labels))).loss.isfinite()


def test_each_task_has_a_head_of_its_own_width_and_weights(bank):
    heads = [bank.base_model.own_tensors(name)["classifier.weight"] for name in NAMES]
    assert [tuple(head.shape) for head in heads] == [(3, 16), (2, 16), (4, 16)]
    assert not torch.equal(heads[0][:2], heads[1])


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


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_finished_task_that_was_loaded_requires_no_gradient_either(tiny_model, saved, is_trainable):
    folder, _ = saved
    model = PeftModel.from_pretrained(tiny_model(), folder / "news", adapter_name="news", is_trainable=is_trainable)
    model.load_adapter(folder / "pets", adapter_name="pets", is_trainable=is_trainable)
    for name in ("pets", "news"):
        model.set_adapter(name)
        with model.disable_adapter():
            pass
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == []


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


# --- saving and loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS, ids=["-".join(order) for order in ORDERS])
def test_tasks_load_in_every_order_and_alone_with_the_same_logits(tiny_model, saved, order):
    folder, before = saved
    for count in range(1, 4):
        model = load(tiny_model, folder, *order[:count])
        for name in order[:count]:
            assert torch.equal(logits(model, name), before[name])


def test_the_shared_store_is_in_no_file_and_a_committed_task_has_no_scores(saved):
    folder, _ = saved
    kept = sum(kept_count(size, 0.2) for size in [256] * 8 + [512] * 4)
    for name, trains in zip(NAMES, (True, False, True), strict=True):
        tensors = load_file(folder / name / "adapter_model.safetensors")
        sizes = {kind: 0 for kind in ("scores", "values", "bits", "owned", "inherited", "where", "threshold", "copy")}
        for key, tensor in tensors.items():
            sizes[key.partition(".hfcl_")[2].partition(".")[0]] += tensor.numel()
        labels = {"news": 3, "pets": 2, "shop": 4}[name]
        assert (sizes["scores"], sizes["values"]) == (0, 0)
        assert sizes["bits"] == 4096 // 8
        assert (sizes["owned"] > 0) == trains
        assert sizes["owned"] + sizes["inherited"] <= kept
        assert sizes["copy"] == labels * 17 + 4 * 32


def test_a_reloaded_bank_owns_what_it_owned(tiny_model, saved, bank):
    folder, _ = saved
    model = load(tiny_model, folder, *reversed(NAMES))
    for held, loaded in zip(bank.base_model.mask_layers(), model.base_model.mask_layers(), strict=True):
        assert torch.equal(held.store.owner, loaded.store.owner)
        assert torch.equal(held.store.values, loaded.store.values)
    assert [model.peft_config[name].task_index for name in NAMES] == [0, 1, 2]


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], ("shop",)], ids="-".join)
def test_a_reloaded_bank_learns_on_and_keeps_what_it_has(tiny_model, saved, names):
    folder, before = saved
    model = load(tiny_model, folder, *names)
    model.add_adapter("next", config(num_labels=5, trains="claimed", train_norms=True))
    assert model.peft_config["next"].task_index == 3
    finish(model, "next")
    for name in names:
        assert torch.equal(logits(model, name), before[name])


def test_a_bank_saved_again_after_loading_is_the_same_bank(tiny_model, saved, tmp_path):
    folder, before = saved
    load(tiny_model, folder, *NAMES).save_pretrained(tmp_path)
    model = load(tiny_model, tmp_path, *NAMES[::-1])
    for name in NAMES:
        assert torch.equal(logits(model, name), before[name])


def test_the_saved_config_reads_back_as_ours_and_holds_the_scales(saved):
    folder, _ = saved
    read = PeftConfig.from_pretrained(folder / "pets")
    assert type(read) is MaskConfig
    assert (read.task_index, read.num_labels, read.trains) == (1, 2, "nothing")
    assert len(read.scales) == 12
    assert read.scales == PeftConfig.from_pretrained(folder / "shop").scales


@pytest.mark.parametrize("phase", ["mask", "weight"])
@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
def test_an_unfinished_task_saves_its_scores_and_goes_on_where_it_was(tiny_model, tmp_path, phase, backwards):
    model = get_peft_model(tiny_model(), config(trains="claimed"), adapter_name="news")
    finish(model, "news")
    model.add_adapter("pets", config(num_labels=2, trains="claimed"))
    model.set_adapter("pets")
    move(model, "pets")
    if phase == "weight":
        model.base_model.begin_weight_phase("pets")
        move(model, "pets")
    before = {name: logits(model, name) for name in ("news", "pets")}
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "pets" / "adapter_model.safetensors")
    assert sum(tensor.numel() for key, tensor in tensors.items() if ".hfcl_scores" in key) == 4096
    loaded = load(tiny_model, tmp_path, *(("pets", "news") if backwards else ("news", "pets")))
    assert loaded.base_model.phase("pets") == phase
    for name in ("news", "pets", "news"):
        assert torch.equal(logits(loaded, name), before[name])
    for each in (model, loaded):
        each.set_adapter("pets")
        move(each, "pets")
        each.base_model.commit("pets")
    assert torch.equal(logits(loaded, "pets"), logits(model, "pets"))


@pytest.mark.parametrize("phase", ["mask", "weight"])
def test_an_unfinished_task_without_the_tasks_it_reads_is_right_or_refused(tiny_model, tmp_path, phase):
    model = get_peft_model(tiny_model(), config(trains="claimed"), adapter_name="news")
    finish(model, "news")
    model.add_adapter("pets", config(num_labels=2, trains="claimed"))
    model.set_adapter("pets")
    if phase == "weight":
        model.base_model.begin_weight_phase("pets")
    move(model, "pets")
    assert model.base_model.facts("pets")["overlap"] > 0
    model.save_pretrained(tmp_path)
    try:
        found = logits(load(tiny_model, tmp_path, "pets"), "pets")
    except OwnershipError:
        return
    assert torch.equal(found, logits(model, "pets"))


@pytest.mark.parametrize("order", [("news", "shop"), ("shop", "news")], ids="-".join)
@pytest.mark.parametrize("trains", ["claimed", "nothing"])
def test_a_stale_file_of_a_retrained_task_is_refused(tiny_model, saved, tmp_path, trains, order):
    folder, _ = saved
    retrained = get_peft_model(tiny_model(), config(trains=trains, train_norms=True), adapter_name="news")
    finish(retrained, "news", seed=4)
    retrained.save_pretrained(tmp_path)
    where = {"news": tmp_path / "news", "shop": folder / "shop"}
    model = PeftModel.from_pretrained(tiny_model(), where[order[0]], adapter_name=order[0])
    before = logits(model, order[0])
    with pytest.raises(OwnershipError, match=r"stale or of another bank"):
        model.load_adapter(where[order[1]], adapter_name=order[1])
    assert torch.equal(logits(model, order[0]), before)


@pytest.mark.parametrize("order", [("news", "shop"), ("shop", "news")], ids="-".join)
def test_a_stale_file_with_the_same_mask_and_untrained_values_is_refused(tiny_model, saved, tmp_path, order):
    folder, _ = saved
    untrained = get_peft_model(tiny_model(), config(train_norms=True), adapter_name="news")
    finish(untrained, "news")
    untrained.save_pretrained(tmp_path)
    where = {"news": tmp_path / "news", "shop": folder / "shop"}
    model = PeftModel.from_pretrained(tiny_model(), where[order[0]], adapter_name=order[0])
    with pytest.raises(OwnershipError, match=r"stale or of another bank"):
        model.load_adapter(where[order[1]], adapter_name=order[1])


def test_a_bank_loads_with_low_cpu_memory_usage_too(tiny_model, saved):
    folder, before = saved
    options = {"low_cpu_mem_usage": True}
    model = PeftModel.from_pretrained(tiny_model(), folder / "pets", adapter_name="pets", **options)
    model.load_adapter(folder / "news", adapter_name="news", **options)
    for name in ("news", "pets"):
        assert torch.equal(logits(model, name), before[name])


def test_a_bank_on_another_base_is_refused_and_the_base_is_left_unwrapped(tiny_model, saved):
    folder, _ = saved
    base = tiny_model(seed=5)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(BaseModelError, match="another revision or another dtype"):
        PeftModel.from_pretrained(base, folder / "news", adapter_name="news")
    assert [name for name, _ in base.named_modules()] == names


def test_a_bank_without_a_fingerprint_loads_on_another_base_with_its_own_scales(tiny_model, saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder / "news", tmp_path / "news")
    file = tmp_path / "news" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_fingerprint": None}))
    model = PeftModel.from_pretrained(tiny_model(seed=5), tmp_path / "news", adapter_name="news")
    stored = model.peft_config["news"].scales
    assert {layer.path: layer.store.scale for layer in model.base_model.mask_layers()} == stored


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
    before = logits(bank, "news")
    with pytest.raises(BaseModelError, match="a cast would change finished tasks"):
        cast(bank)
    del before


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
