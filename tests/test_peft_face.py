"""The masked adapter behind PEFT's verbs: one adapter after the other, merged ones, mixed batches, what PEFT tells."""

import copy

import pytest
import torch
from masked import LABELS, NAMES, WEIGHTS, changed, config, finish, load, logits, mixed, move, rows, state
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification, Trainer

from hf_cl import OwnershipCallback
from hf_cl.errors import ConfigError, OwnershipError

pytest_plugins = ["masked"]


# --- one adapter after the other ------------------------------------------------------------------------------


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
    assert unloaded.config.id2label == base.config.id2label


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
    logits(bank, "news", adapter_names=["news", "pets"] * 2 + ["news"])  # what it keeps for mixed batches is not copied
    copied = copy.deepcopy(bank)
    before = logits(bank, "news")
    assert torch.equal(logits(copied, "news"), before)
    copied.base_model.mask_layers()[0].store.values.zero_()
    copied.base_model.mask_layers()[0].compose()
    assert not torch.equal(logits(copied), before)
    assert torch.equal(logits(bank), before)


def test_two_active_adapters_are_refused_and_nothing_changes(bank):
    logits(bank, "pets")
    before = state(bank)
    with pytest.raises(OwnershipError, match="news, pets cannot be active together"):
        bank.base_model.set_adapter(["news", "pets"])
    assert changed(before, state(bank)) == []


def test_two_active_adapters_are_refused_before_a_norm_that_comes_first_takes_them():
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "pad_token_id": 0}
    base = GPT2ForSequenceClassification(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    model = get_peft_model(base, config(train_norms=True), adapter_name="news")
    model.add_adapter("pets", config(train_norms=True))
    with pytest.raises(OwnershipError, match="news, pets cannot be active together"):
        model.base_model.set_adapter(["news", "pets"])
    assert {tuple(layer.active_adapters) for layer in model.base_model._tuner_layers()} == {("news",)}


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


@pytest.mark.parametrize("fails", [False, True], ids=["well", "with an error"])
def test_the_bases_own_labels_show_while_adapters_are_off_and_the_tasks_return(tiny_model, fails):
    base = tiny_model()
    base.config.id2label, base.config.problem_type = {0: "no", 1: "yes"}, "multi_label_classification"
    model = get_peft_model(base, config(id2label={0: "good", 1: "bad", 2: "ugly"}), adapter_name="news")
    try:
        with model.disable_adapter():
            assert model.config.id2label == {0: "no", 1: "yes"}
            assert model.config.label2id == {"no": 0, "yes": 1}
            assert model.config.problem_type == "multi_label_classification"
            assert model.config.num_labels == model.base_model.model.num_labels == 2
            assert not fails or 1 // 0
    except ZeroDivisionError:
        pass
    assert model.config.id2label == {0: "good", 1: "bad", 2: "ugly"}
    assert model.config.problem_type == "single_label_classification"
    assert model.unload().config.id2label == {0: "no", 1: "yes"}


def test_each_task_has_a_head_of_its_own_width_and_weights(bank):
    heads = [bank.base_model.own_tensors(name)["classifier.weight"] for name in NAMES]
    assert [tuple(head.shape) for head in heads] == [(3, 16), (2, 16), (4, 16)]
    assert not torch.equal(heads[0][:2], heads[1])


def test_an_adapter_of_another_peft_method_is_refused_beside_tasks(bank):
    before = state(bank)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        bank.add_adapter("other", LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert changed(before, state(bank)) == []


def test_peft_tells_what_is_active_merged_and_trains(bank):
    bank.add_adapter("next", config(train_norms=True))
    bank.set_adapter("next")
    status = bank.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("BertForSequenceClassification", "MaskModel")
    assert status.peft_types == dict.fromkeys([*NAMES, "next"], "HFCL")
    assert status.requires_grad == dict.fromkeys(NAMES, False) | {"next": True}
    # Scores, each layer's kept count, head and norms of the one task that trains.
    assert status.trainable_params == 4096 + (8 * 51 + 4 * 102) + 51 + 4 * 32
    assert (status.num_adapter_layers, status.enabled) == (12 + 1 + 4, True)
    assert (status.active_adapters, status.merged_adapters) == (["next"], [])
    assert status.available_adapters == sorted([*NAMES, "next"])
    layers = bank.get_layer_status()
    assert [layer.module_type for layer in layers].count("MaskLinear") == 12
    assert all(layer.active_adapters == ["next"] for layer in layers)
    with bank.disable_adapter():
        assert bank.get_model_status().enabled is False
    bank.merge_adapter(["shop"])
    assert bank.get_model_status().merged_adapters == ["shop"]


# --- merging --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_and_unloaded_task_is_a_plain_model_with_its_labels(tiny_model, bank, name, tmp_path):
    before = logits(bank, name)
    bank.set_adapter(next(other for other in NAMES if other != name))
    plain = bank.merge_and_unload(adapter_names=[name], safe_merge=True)
    assert type(plain) is type(tiny_model())
    assert plain.state_dict().keys() == tiny_model().state_dict().keys()
    assert not hasattr(plain, "peft_config")
    assert plain.num_labels == plain.config.num_labels == LABELS[name]
    assert torch.equal(logits(plain), before)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), before)


def test_what_is_merged_and_unloaded_without_a_name_is_the_active_task_with_its_label_names(one):
    model = one(num_labels=None, id2label={0: "good", 1: "bad", 2: "ugly"})
    model.add_adapter("pets", config(num_labels=2))
    finish(model, "pets")
    finish(model, "news")
    before = logits(model)
    plain = model.merge_and_unload()
    assert torch.equal(logits(plain), before)
    assert plain.config.id2label == {0: "good", 1: "bad", 2: "ugly"}
    assert plain.config.label2id == {"good": 0, "bad": 1, "ugly": 2}


@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_exactly_one_task_can_be_merged(bank, verb, safe):
    before = state(bank)
    for names in ([], ["news", "pets"], ["nobody"]):
        with pytest.raises(ConfigError, match=f"one task can be merged, found {', '.join(names) or 'none'}"):
            getattr(bank, verb)(adapter_names=names, safe_merge=safe)
        assert changed(before, state(bank)) == []


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_refuses_what_is_not_finite(bank, verb, number):
    layer = bank.base_model.mask_layers()[0]
    layer.store.values[layer.mask("shop")] = float(number)
    bank.set_adapter("shop")
    before = state(bank)
    with pytest.raises(ConfigError, match=f"{layer.path}: adapter 'shop' has values that are not finite"):
        getattr(bank, verb)(safe_merge=True, adapter_names=["shop"])
    assert changed(before, state(bank)) == []


@pytest.mark.parametrize("where", ["a late layer", "the head"])
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_checks_every_layer_before_it_merges_one(bank, verb, where):
    layer = bank.base_model.mask_layers()[7]
    if where == "a late layer":
        layer.store.values[layer.mask("shop")] = float("nan")
    else:
        bank.base_model.own_tensors("shop")["classifier.weight"][0, 0] = float("nan")
    bank.set_adapter("shop")
    before = state(bank)
    with pytest.raises(ConfigError, match="not finite"):
        getattr(bank, verb)(safe_merge=True, adapter_names=["shop"])
    assert changed(before, state(bank)) == []


def test_merging_and_unmerging_leaves_every_bit_as_it_was(tiny_model, bank):
    shop, news = logits(bank, "shop"), logits(bank, "news")
    before, base = state(bank), tiny_model()
    bank.merge_adapter(["shop"])
    assert torch.equal(logits(bank), shop)
    assert bank.config.num_labels == bank.base_model.model.num_labels == LABELS["shop"]
    merged = bank.base_model.mask_layers()[0].base_layer.weight
    assert not torch.equal(merged, base.bert.encoder.layer[0].attention.self.query.weight)
    bank.unmerge_adapter()
    assert changed(before, state(bank)) == []
    assert torch.equal(logits(bank), news)
    assert torch.equal(logits(bank.unload()), logits(base))


def test_activating_another_task_unmerges_and_peft_says_so(bank):
    pets = logits(bank, "pets")
    bank.merge_adapter(["shop"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        bank.set_adapter("news")
    assert not any(layer.merged for layer in bank.base_model._tuner_layers())
    assert bank.config.num_labels == LABELS["news"]
    assert torch.equal(logits(bank, "pets"), pets)


@pytest.mark.parametrize("answers", [True, False], ids=["that answers", "that does not"])
def test_a_disabled_model_is_the_base_also_when_a_task_is_merged(tiny_model, bank, answers):
    shop, base = logits(bank, "shop"), tiny_model()
    bank.set_adapter("news")
    bank.merge_adapter(["shop"])
    with bank.disable_adapter():
        assert bank.config.num_labels == base.config.num_labels
        assert not answers or torch.equal(logits(bank), logits(base))
    # PEFT's layers unmerge where they answer disabled; whichever task is seen afterwards, its labels are seen.
    assert bank.config.num_labels == logits(bank).shape[1] == (LABELS["news"] if answers else LABELS["shop"])
    assert torch.equal(logits(bank, "shop"), shop) if answers else torch.equal(logits(bank), shop)


def test_a_merged_model_is_not_trained(one, token_rows, arguments):
    model = one()
    model.merge_adapter()
    trainer = Trainer(model, arguments(), train_dataset=token_rows(0, 3), callbacks=[OwnershipCallback("news")])
    with pytest.raises(ConfigError, match=r"'news': a task is merged into the base\. Call unmerge_adapter\(\) first"):
        trainer.train()


def test_a_merged_task_is_neither_merged_again_nor_deleted(bank):
    bank.merge_adapter(["shop"])
    before = state(bank)
    with pytest.raises(ConfigError, match="found news; merged are shop"):
        bank.merge_adapter(["news"])
    with pytest.raises(ValueError, match="while they are merged"):
        bank.delete_adapter("shop")
    assert changed(before, state(bank)) == []


def test_a_bank_saved_while_a_task_is_merged_is_the_same_bank(bank, saved, tmp_path):
    bank.merge_adapter(["shop"])
    bank.save_pretrained(tmp_path)
    for file in [f"{name}/{kind}" for name in NAMES for kind in (WEIGHTS, "adapter_config.json")]:
        assert (tmp_path / file).read_bytes() == (saved[0] / file).read_bytes()


# --- mixed batches ----------------------------------------------------------------------------------------------


ROWS = ["news", "__base__", "shop", "news", "pets"]


def test_each_row_of_a_mixed_batch_is_answered_by_its_own_task(tiny_model, bank):
    answers = {name: logits(bank, name) for name in NAMES} | {"__base__": logits(tiny_model())}
    bank.set_adapter("pets")
    found = mixed(bank, ROWS)
    assert found.shape == (5, 4)
    for row, name in enumerate(ROWS):
        width = answers[name].shape[1]
        # The same row in a batch of another size: torch's matrix products then add up in another order.
        torch.testing.assert_close(found[row, :width], answers[name][row], rtol=0, atol=1e-6)
        assert torch.equal(found[row, width:], torch.full((4 - width,), -torch.inf))
    for row in (0, 3):
        assert not torch.allclose(found[row, :3], answers["shop"][row, :3], atol=1e-3)


def test_apart_rows_of_one_task_are_answered_as_a_batch_of_theirs_bit_for_bit(bank):
    bank.base_model.share_products = False
    found = mixed(bank.eval(), ROWS)
    ids = rows(5)[[0, 3]]
    bank.set_adapter("news")
    with torch.no_grad():
        assert torch.equal(found[[0, 3], :3], bank(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


def test_other_outputs_of_a_mixed_batch_are_in_the_order_of_the_rows(bank):
    bank.eval()
    ids = rows(3)
    with torch.no_grad():
        found = bank(input_ids=ids, adapter_names=["shop", "news", "shop"], output_hidden_states=True).hidden_states
        for row, name in enumerate(["shop", "news", "shop"]):
            bank.set_adapter(name)
            alone = bank(input_ids=ids[row : row + 1], output_hidden_states=True).hidden_states
            for one, other in zip(found, alone, strict=True):
                # Another batch size, as above.
                torch.testing.assert_close(one[row], other[0], rtol=0, atol=1e-5)


def test_a_mixed_batch_is_answered_without_a_task_type_too(one):
    model = one(task_type=None)
    model.add_adapter("pets", config(task_type=None, num_labels=2))
    assert mixed(model.eval(), ["news", "pets"])[1, 2] == -torch.inf


def test_a_mixed_batch_is_answered_in_a_plain_wrapper_too(tiny_model):
    model = PeftModel(tiny_model(), config(), adapter_name="news")
    model.add_adapter("pets", config(num_labels=2))
    assert mixed(model.eval(), ["news", "pets"])[1, 2] == -torch.inf


@pytest.mark.parametrize("fails", [False, True], ids=["answered", "failed"])
@pytest.mark.parametrize("phase", ["mask", "weight"])
def test_a_mixed_batch_leaves_a_task_that_trains_as_it_was(bank, phase, fails):
    bank.add_adapter("next", config(trains="claimed", train_norms=True))
    bank.set_adapter("next")
    if phase == "weight":
        bank.base_model.begin_weight_phase("next")
    move(bank, "next")
    alone = logits(bank)
    before = state(bank)
    if fails:
        with pytest.raises(IndexError):
            bank(input_ids=torch.tensor([[1, 2], [3, 99]]), adapter_names=["news", "pets"])
    else:
        assert mixed(bank, ["next", *ROWS]).shape == (6, 4)
    assert changed(before, state(bank)) == []
    assert torch.equal(logits(bank), alone)
    bank.train()
    bank(input_ids=rows(), labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    trained = "hfcl_scores" if phase == "mask" else "hfcl_values"
    assert all(getattr(layer, trained)["next"].grad.any() for layer in bank.base_model.mask_layers())


def refused(bank, names=ROWS, **inputs):
    with pytest.raises(ConfigError) as raised:
        mixed(bank, names, **inputs)
    return str(raised.value)


def test_a_mixed_batch_that_cannot_be_is_refused_and_nothing_changes(bank):
    logits(bank, "pets")
    before = state(bank)
    assert "adapter_names: dogs is none of __base__, news, pets, shop" in refused(bank, ["news", "dogs"])
    assert "tasks have different losses" in refused(bank, labels=torch.zeros(5, dtype=torch.long))
    assert "return_dict=False" in refused(bank, return_dict=False)
    with pytest.raises(ConfigError, match="2 names for 5 rows"):
        bank(input_ids=rows(), adapter_names=["news", "pets"])
    assert changed(before, state(bank)) == []
    assert "Call model.eval() first" in refused(bank.train())
    bank.eval().merge_adapter(["news"])
    assert "unmerged" in refused(bank)
    bank.unmerge_adapter()
    assert changed(before, state(bank)) == []


# --- from a base to the Hub -----------------------------------------------------------------------------------


@pytest.fixture
def from_folder(tiny_model, tmp_path):
    """A bank of two tasks on a base that was saved and loaded; the folder of the adapters."""
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(trains="claimed"), adapter_name="default")
    finish(model, "default")
    model.add_adapter("pets", config(id2label={0: "cat", 1: "dog"}, num_labels=None, trains="claimed"))
    finish(model, "pets")
    model.save_pretrained(tmp_path / "adapters")
    return model, tmp_path


def test_peft_finds_the_base_of_a_saved_adapter_by_itself(from_folder):
    model, folder = from_folder
    assert model.peft_config["pets"].base_model_name_or_path == str(folder / "base")
    again = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapters" / "pets", adapter_name="pets")
    assert torch.equal(logits(again), logits(model, "pets"))
    assert again.config.id2label == {0: "cat", 1: "dog"}
    whole = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapters")
    whole.load_adapter(folder / "adapters" / "pets", adapter_name="pets")
    for name in ("default", "pets"):
        assert torch.equal(logits(whole, name), logits(model, name))


def test_selected_adapters_are_saved_alone(tiny_model, bank, tmp_path):
    bank.save_pretrained(tmp_path, selected_adapters=["pets"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "pets"]
    assert torch.equal(logits(load(tiny_model(), tmp_path, "pets")), logits(bank, "pets"))


def test_a_pushed_bank_is_cards_configs_and_safetensors_and_no_more(bank, pushed):
    bank.push_to_hub("someone/bank")
    kinds = ("README.md", "adapter_config.json", WEIGHTS)
    assert sorted(pushed) == sorted(["README.md", *(f"{name}/{kind}" for name in NAMES for kind in kinds)])
    for name in NAMES:
        assert "import hf_cl.tuner" in pushed[f"{name}/README.md"].decode()


@pytest.mark.xfail(strict=True, reason="transformers' push_to_hub writes its own template over the root card")
def test_the_card_at_the_root_of_a_pushed_bank_says_the_import(bank, pushed):
    bank.push_to_hub("someone/bank")
    assert "import hf_cl.tuner" in pushed["README.md"].decode()
