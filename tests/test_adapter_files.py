"""A saved adapter: what its folder holds, every way back into a model, and what is refused with nothing left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import masked
import pytest
import torch
from huggingface_hub import ModelCard
from masked import NAMES, WEIGHTS, changed, config, finish, in_every_way, load, logits, move, refuse, rewritten, state
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_cl import MaskConfig
from hf_cl.errors import BaseModelError, HfClError, OwnershipError
from hf_cl.masks.select import kept_count
from hf_cl.tuner.card import END, START

pytest_plugins = ["masked"]
ROOT = Path(__file__).parents[1]


# --- what is in the files -------------------------------------------------------------------------------------


def test_the_shared_store_is_in_no_file_and_a_committed_task_has_no_scores(saved):
    folder, _ = saved
    kept = sum(kept_count(size, 0.2) for size in [256] * 8 + [512] * 4)
    for name, trains in zip(NAMES, (True, False, True), strict=True):
        tensors = load_file(folder / name / WEIGHTS)
        sizes = {kind: 0 for kind in ("scores", "values", "bits", "owned", "inherited", "where", "threshold", "copy")}
        for key, tensor in tensors.items():
            sizes[key.partition(".hfcl_")[2].partition(".")[0]] += tensor.numel()
        assert (sizes["scores"], sizes["values"]) == (0, 0)
        assert sizes["bits"] == 4096 // 8
        assert (sizes["owned"] > 0) == trains
        assert sizes["owned"] + sizes["inherited"] <= kept
        assert sizes["copy"] == masked.LABELS[name] * 17 + 4 * 32


def test_the_saved_config_reads_back_as_ours_and_holds_the_scales(saved):
    folder, _ = saved
    read = PeftConfig.from_pretrained(folder / "pets")
    assert type(read) is MaskConfig
    assert (read.task_index, read.num_labels, read.trains) == (1, 2, "nothing")
    assert len(read.scales) == 12
    assert read.scales == PeftConfig.from_pretrained(folder / "shop").scales


# --- back into a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", masked.ORDERS, ids=["-".join(order) for order in masked.ORDERS])
def test_tasks_load_in_every_order_and_alone_with_the_same_logits(tiny_model, saved, order):
    folder, before = saved
    for count in range(1, 4):
        model = load(tiny_model(), folder, *order[:count])
        for name in order[:count]:
            assert torch.equal(logits(model, name), before[name])


@in_every_way
def test_a_bank_loads_whole_in_every_way_and_owns_what_it_owned(tiny_model, saved, bank, way):
    folder, before = saved
    model = load(tiny_model(), folder, *reversed(NAMES), **way)
    for name in NAMES:
        assert torch.equal(logits(model, name), before[name])
    for held, loaded in zip(bank.base_model.mask_layers(), model.base_model.mask_layers(), strict=True):
        assert torch.equal(held.store.owner, loaded.store.owner)
        assert torch.equal(held.store.values, loaded.store.values)
    assert [model.peft_config[name].task_index for name in NAMES] == [0, 1, 2]


@in_every_way
def test_float32_values_and_heads_are_not_rounded_on_a_bf16_base(tiny_model, tmp_path, way):
    def base():
        return tiny_model().to(torch.bfloat16)

    model = get_peft_model(base(), config(trains="claimed", values_dtype="float32", train_norms=True), "news")
    finish(model, "news")
    model.add_adapter("pets", config(num_labels=2, trains="claimed", values_dtype="float32", train_norms=True))
    model.set_adapter("pets")
    move(model, "pets")
    model.save_pretrained(tmp_path)
    loaded = load(base(), tmp_path, "pets", "news", **way)
    first, second = model.state_dict(), loaded.state_dict()
    ours = [key for key in first if ".hfcl_" in key]
    assert sum(first[key].dtype == torch.float32 for key in ours) == len(ours) - 2 * 2 * 12  # bits are bytes
    assert [key for key in ours if first[key].dtype != second[key].dtype] == []
    # As bytes, since a threshold that is not yet known is a NaN.
    assert [key for key in ours if first[key].numpy().tobytes() != second[key].numpy().tobytes()] == []
    values = torch.cat([layer.hfcl_owned["news"] for layer in loaded.base_model.mask_layers()])
    assert not torch.equal(values, values.bfloat16().float()), "nothing here would show a rounding"
    for name in ("news", "pets"):
        assert torch.equal(logits(loaded, name), logits(model, name))


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], ("shop",)], ids="-".join)
def test_a_reloaded_bank_learns_on_and_keeps_what_it_has(tiny_model, saved, names):
    folder, before = saved
    model = load(tiny_model(), folder, *names)
    model.add_adapter("next", config(num_labels=5, trains="claimed", train_norms=True))
    assert model.peft_config["next"].task_index == 3
    finish(model, "next")
    for name in names:
        assert torch.equal(logits(model, name), before[name])


def test_a_bank_saved_again_after_loading_has_the_same_bytes(tiny_model, saved, tmp_path):
    folder, _ = saved
    load(tiny_model(), folder, *NAMES[::-1]).save_pretrained(tmp_path)
    for name in NAMES:
        assert (tmp_path / name / WEIGHTS).read_bytes() == (folder / name / WEIGHTS).read_bytes()
        assert (tmp_path / name / "adapter_config.json").read_text() == (
            folder / name / "adapter_config.json"
        ).read_text()


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
    tensors = load_file(tmp_path / "pets" / WEIGHTS)
    assert sum(tensor.numel() for key, tensor in tensors.items() if ".hfcl_scores" in key) == 4096
    loaded = load(tiny_model(), tmp_path, *(("pets", "news") if backwards else ("news", "pets")))
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
        found = logits(load(tiny_model(), tmp_path, "pets"), "pets")
    except OwnershipError:
        return
    assert torch.equal(found, logits(model, "pets"))


def test_a_task_in_its_mask_phase_goes_on_beside_a_finished_one_that_is_loaded(learning, saved):
    learning.load_adapter(saved[0] / "shop", adapter_name="shop")
    learning(input_ids=masked.rows(), labels=torch.arange(5)).loss.backward()
    assert all(layer.hfcl_scores["next"].grad.any() for layer in learning.base_model.mask_layers())


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_finished_task_that_was_loaded_requires_no_gradient_either(tiny_model, saved, is_trainable):
    model = load(tiny_model(), saved[0], "news", "pets", is_trainable=is_trainable)
    for name in ("pets", "news"):
        model.set_adapter(name)
        with model.disable_adapter():
            pass
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == []


# --- refused, and nothing stays behind ------------------------------------------------------------------------


@in_every_way
@pytest.mark.parametrize("damage", masked.DAMAGES)
def test_a_damaged_file_is_refused_and_the_other_tasks_do_not_notice(learning, saved, damaged, damage, way):
    folder, before = saved
    # The store knows of shop's own values through pets alone, so that another bank's are seen.
    source = "news" if damage == "another bank" else "shop"
    message = refuse(learning, damaged(source, damage), source, **way)
    assert source in message
    learning.load_adapter(folder / source, adapter_name=source, **way)
    assert torch.equal(logits(learning, source), before[source])


@in_every_way
@pytest.mark.parametrize("damage", [name for name in masked.DAMAGES if name != "another bank"])
def test_a_damaged_file_on_a_base_leaves_the_base_unwrapped(tiny_model, saved, damaged, damage, way):
    base = tiny_model()
    before = {"names": [name for name, _ in base.named_modules()], "config": base.config.to_dict()}
    with pytest.raises(OwnershipError, match="'news'"):
        PeftModel.from_pretrained(base, damaged("news", damage), adapter_name="news", **way)
    assert {"names": [name for name, _ in base.named_modules()], "config": base.config.to_dict()} == before
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base), logits(tiny_model()))
    assert torch.equal(logits(load(base, saved[0], "news")), saved[1]["news"])


def test_a_damaged_file_on_a_base_leaves_the_base_trainable(tiny_model, damaged):
    base = tiny_model()
    with pytest.raises(OwnershipError):
        load(base, damaged("news", "another head").parent, "news")
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_refused_file_uses_up_no_number(tiny_model, saved, damaged):
    model = load(tiny_model(), saved[0], "news")
    refuse(model, damaged("shop", "another head"))
    model.add_adapter("next", config(train_norms=True))
    assert model.peft_config["next"].task_index == 1


@pytest.mark.parametrize("damage", ["cut short", "not there"])
@pytest.mark.parametrize("onto", ["a model", "a base"])
def test_weights_that_cannot_be_read_leave_nothing_behind(tiny_model, learning, saved, tmp_path, damage, onto):
    shutil.copytree(saved[0] / "shop", tmp_path / "shop")
    file = tmp_path / "shop" / WEIGHTS
    data = file.read_bytes()
    file.unlink()
    if damage == "cut short":
        file.write_bytes(data[: len(data) // 2])
    if onto == "a model":
        before = state(learning)
        with pytest.raises(Exception, match=r".") as raised:
            learning.load_adapter(str(tmp_path / "shop"), adapter_name="shop")
        assert changed(before, state(learning)) == []
    else:
        base = tiny_model()
        names = [name for name, _ in base.named_modules()]
        with pytest.raises(Exception, match=r".") as raised:
            PeftModel.from_pretrained(base, str(tmp_path / "shop"), adapter_name="shop")
        assert [name for name, _ in base.named_modules()] == names
    assert isinstance(raised.value, HfClError | OSError)


@pytest.mark.parametrize("source", ["news", "pets"])
def test_the_file_of_another_task_under_a_config_is_refused(learning, saved, tmp_path, source):
    shutil.copytree(saved[0] / "shop", tmp_path / "shop")
    shutil.copy(saved[0] / source / WEIGHTS, tmp_path / "shop")
    refuse(learning, tmp_path / "shop", "shop", OwnershipError)


def test_the_file_of_another_task_with_as_many_labels_is_refused_too(tiny_model, one, tmp_path):
    model = one(trains="claimed")
    finish(model, "news")
    model.add_adapter("other", config(trains="claimed"))
    finish(model, "other", seed=1)
    model.save_pretrained(tmp_path)
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / "news")
    with pytest.raises(OwnershipError):
        load(tiny_model(), tmp_path, "news")


@in_every_way
def test_a_file_whose_values_were_cast_is_refused(tiny_model, saved, tmp_path, way):
    def halve(tensors):
        tensors.update({key: tensor.half() for key, tensor in tensors.items() if tensor.is_floating_point()})

    rewritten(saved[0] / "news", tmp_path / "news", halve)
    with pytest.raises(OwnershipError):
        load(tiny_model(), tmp_path, "news", **way)


@pytest.mark.parametrize("phase", ["mask", "weight", "committed"])
def test_a_failed_load_into_a_task_that_has_been_trained_does_not_remove_it(one, damaged, phase):
    model = one(trains="claimed", train_norms=True)
    move(model, "news")
    if phase != "mask":
        model.base_model.begin_weight_phase("news")
        move(model, "news")
    if phase == "committed":
        model.base_model.commit("news")
    refuse(model, damaged("news", "another head"), "news", OwnershipError)


def test_a_failed_load_into_a_task_whose_head_alone_was_trained_does_not_remove_it(learning, damaged):
    learning.add_adapter("news", config(train_norms=True, task_index=0))
    with torch.no_grad():
        learning.base_model.own_tensors("news")["classifier.weight"].add_(1)
    refuse(learning, damaged("news", "another head"), "news", OwnershipError)


def test_a_failed_load_into_an_adapter_that_the_user_added_does_not_remove_it(one, damaged):
    model = one(train_norms=True)
    refuse(model, damaged("news", "another head"), "news", OwnershipError)


def test_a_failed_load_into_a_task_trained_from_a_config_that_was_read_does_not_remove_it(learning, saved, damaged):
    learning.add_adapter("shop", MaskConfig.from_pretrained(saved[0] / "shop"))
    learning.set_adapter("shop")
    move(learning, "shop")
    refuse(learning, damaged("shop", "another head"), "shop", OwnershipError)


def test_a_damaged_file_whose_config_has_no_digest_leaves_nothing_behind(learning, damaged):
    file = damaged("shop", "another head") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tensors_digest": None}))
    refuse(learning, file.parent)


@pytest.mark.parametrize("order", [("news", "shop"), ("shop", "news")], ids="-".join)
@pytest.mark.parametrize("trains", ["claimed", "nothing"])
@pytest.mark.parametrize("seed", [3, 4], ids=["same mask", "another mask"])
def test_a_stale_file_of_a_retrained_task_is_refused(tiny_model, saved, one, tmp_path, trains, order, seed):
    folder, _ = saved
    retrained = one(trains=trains, train_norms=True)
    finish(retrained, "news", seed=seed)
    if (trains, seed) == ("claimed", 3):
        for layer in retrained.base_model.mask_layers():
            layer.hfcl_owned["news"][0] += 1  # as it was, but for one value a layer
    retrained.save_pretrained(tmp_path)
    where = {"news": tmp_path / "news", "shop": folder / "shop"}
    model = PeftModel.from_pretrained(tiny_model(), where[order[0]], adapter_name=order[0])
    assert "stale or of another bank" in refuse(model, where[order[1]], order[1], OwnershipError)


# --- another base ---------------------------------------------------------------------------------------------


@in_every_way
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "learned on another base"),
        ({"intermediate_size": 64}, "learned on another base"),
        ({"num_hidden_layers": 1}, "learned on another model"),
        ({"num_hidden_layers": 3}, "learned on another model"),
        ({"seed": 5}, "fingerprint .*another revision or another dtype"),
        ({"dtype": torch.bfloat16}, r"fingerprint .*another dtype \(torch.bfloat16 here\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_base_is_refused_and_left_unwrapped(tiny_model, saved, changes, message, way):
    def other():
        sizes = {name: value for name, value in changes.items() if name != "dtype"}
        return tiny_model(**sizes).to(changes.get("dtype", torch.float32))

    base = other()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(HfClError, match=message) as raised:
        PeftModel.from_pretrained(base, saved[0] / "news", adapter_name="news", **way)
    assert isinstance(raised.value, BaseModelError) or "fingerprint" not in message
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(logits(base), logits(other()))


def test_a_bank_without_a_fingerprint_loads_on_another_base_with_its_own_scales(tiny_model, saved, tmp_path):
    shutil.copytree(saved[0] / "news", tmp_path / "news")
    file = tmp_path / "news" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_fingerprint": None}))
    model = load(tiny_model(seed=5), tmp_path, "news")
    stored = model.peft_config["news"].scales
    assert {layer.path: layer.store.scale for layer in model.base_model.mask_layers()} == stored


def test_transformers_own_loading_of_adapters_is_a_clear_error(tiny_model, saved):
    base = tiny_model()
    with pytest.raises(ValueError, match="shared state stored on the tuner"):
        base.load_adapter(str(saved[0] / "news"), adapter_name="news")
    assert torch.equal(logits(base), logits(tiny_model()))


# --- the card -------------------------------------------------------------------------------------------------


def blocks(card):
    return card.read_text("utf-8").count("```python\n")


@pytest.mark.slow
def test_without_the_import_loading_is_a_bare_key_error_and_the_cards_own_code_gives_equal_logits(named, tmp_path):
    model = named()
    model.save_pretrained(tmp_path / "bank")
    ids = masked.rows(2).tolist()
    arguments = [sys.executable, "-c", masked.CHILD, tmp_path / "base", tmp_path / "bank", json.dumps(ids)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    error, *found = json.loads(done.stdout)
    assert error == "'HFCL'"
    expected = []
    for name in ("news", "pets", "pets"):
        model.set_adapter(name)
        with torch.no_grad():
            expected.append(model.eval()(input_ids=torch.tensor(ids)).logits.tolist())
    assert found == expected


def test_a_card_tells_library_tags_and_task_on_one_line_whatever_the_labels(named, tmp_path):
    named().save_pretrained(tmp_path / "bank")
    for card in (tmp_path / "bank" / "README.md", tmp_path / "bank" / "news" / "README.md"):
        data = ModelCard.load(card).data
        assert (data.library_name, data.pipeline_tag) == ("hf_cl", "text-classification")
        assert data.tags == ["continual-learning", "hf_cl"]
    lines = (tmp_path / "bank" / "news" / "README.md").read_text("utf-8").splitlines()
    (about,) = [line for line in lines if "task number" in line]
    assert about.endswith("task number 0, with the labels a --- b, `c, ```.")
    assert lines.count("---") == 2
    assert sum(line.startswith("```") for line in lines) == 2


@pytest.mark.filterwarnings("ignore:Could not find a config file in someone/base")
def test_a_base_on_the_hub_is_named_as_such_and_a_folder_is_not(named, tmp_path):
    named().save_pretrained(tmp_path / "one")
    assert ModelCard.load(tmp_path / "one" / "news" / "README.md").data.base_model is None
    assert ModelCard.load(tmp_path / "one" / "README.md").data.base_model is None
    named(base="someone/base").save_pretrained(tmp_path / "two")
    data = ModelCard.load(tmp_path / "two" / "news" / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("someone/base", "adapter")


def test_a_folder_is_not_named_as_base_on_the_second_save_either(named, tmp_path):
    model = named()
    for _ in range(2):
        model.save_pretrained(tmp_path / "bank")
    assert str(tmp_path) not in ModelCard.load(tmp_path / "bank" / "README.md").data.to_yaml()


def test_a_users_own_card_is_kept_and_our_section_replaced(named, tmp_path):
    model, card = named(), tmp_path / "bank" / "README.md"
    card.parent.mkdir()
    card.write_text("---\nlicense: mit\n---\n\n# Mine\n\nBefore.\n", "utf-8")
    model.save_pretrained(card.parent)
    assert blocks(card) == 2
    card.write_text(card.read_text("utf-8") + "\nAfter.\n", "utf-8")
    model.set_adapter("news")
    model.delete_adapter("pets")
    shutil.rmtree(card.parent / "pets")
    model.save_pretrained(card.parent)
    text = card.read_text("utf-8")
    assert (text.count(START), text.count(END), blocks(card)) == (1, 1, 1)
    assert 'subfolder="news"' in text
    assert "pets" not in text
    assert text.index("# Mine") < text.index("Before.") < text.index(START) < text.index(END) < text.index("After.")
    assert ModelCard.load(card).data.license == "mit"


def test_the_card_at_the_root_tells_how_to_load_default_beside_others(named, tmp_path):
    named(name="default").save_pretrained(tmp_path / "bank")
    assert blocks(tmp_path / "bank" / "README.md") == 2


def test_the_cards_code_can_be_read_whatever_the_adapters_name(named, tmp_path):
    named(name='say "hi"').save_pretrained(tmp_path / "bank")
    compile(
        (tmp_path / "bank" / 'say "hi"' / "README.md").read_text().split("```python\n")[1].split("```")[0], "", "exec"
    )
