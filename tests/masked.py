"""Banks of masked adapters on a tiny BERT, and what there is to compare. PYTEST_DONT_REWRITE: it is imported early.

A test module says `pytest_plugins = ["masked"]` to have the fixtures, and imports the functions.
"""

import itertools
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_cl import MaskConfig

NAMES = ("news", "pets", "shop")
LABELS = {"news": 3, "pets": 2, "shop": 4}
ORDERS = list(itertools.permutations(NAMES))
WEIGHTS = "adapter_model.safetensors"


def config(**options):
    return MaskConfig(**({"task_type": "SEQ_CLS", "density": 0.2, "num_labels": 3} | options))


def rows(count=5):
    return torch.randint(50, (count, 7), generator=torch.Generator().manual_seed(9))


def logits(model, adapter=None):
    if adapter is not None:
        model.set_adapter(adapter)
    ids = rows()
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


def make_bank(base, **options):
    """Three committed tasks of unequal label counts on a base: values, a mask alone, values again."""
    options = {"train_norms": True} | options
    model = get_peft_model(base, config(trains="claimed", **options), adapter_name="news")
    finish(model, "news")
    for seed, name, trains in ((1, "pets", "nothing"), (2, "shop", "claimed")):
        model.add_adapter(name, config(num_labels=LABELS[name], trains=trains, **options))
        finish(model, name, seed)
    return model


def load(base, folder, *names, **options):
    """Load adapters of a saved bank by their names, in that order."""
    model = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0], **options)
    for name in names[1:]:
        loaded = model.load_adapter(folder / name, adapter_name=name, **options)
        assert not loaded.missing_keys
        assert not loaded.unexpected_keys
    return model


def rewritten(source, target, change):
    """Copy a saved adapter, its tensors changed in place by `change`."""
    shutil.copytree(source, target)
    tensors = load_file(target / WEIGHTS)
    change(tensors)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target


def state(model):
    """All that a refused verb must leave alone, by name: modules, tensors bit for bit, gradients, who is active."""
    tensors = [*model.named_parameters(), *model.named_buffers()]  # the store is in no state dict
    bits = {name: bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()) for name, tensor in tensors}
    grads = {f"{name} requires grad": parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = {f"{name} is a": type(module).__name__ for name, module in model.named_modules()}
    trains = {f"{name} trains": module.training for name, module in model.named_modules()}
    tuner = model.base_model
    layers = {
        f"{name} layer": (tuple(layer.active_adapters), tuple(layer.merged_adapters), layer.disable_adapters)
        for name, layer in tuner.named_modules()
        if hasattr(layer, "merged_adapters")
    }
    told = {"labels": tuner.model.config.id2label, "active": (model.active_adapter, tuner.active_adapters)}
    told |= {"problem": tuner.model.config.problem_type, "count": tuner.model.num_labels}
    configs = {f"config of {name}": config.to_dict() for name, config in model.peft_config.items()}
    return bits | grads | modules | trains | layers | told | configs


def changed(before, after):
    """Return the names under which two states differ."""
    return sorted(name for name in before | after if before.get(name, "none") != after.get(name, "none"))


@pytest.fixture
def one(tiny_model):
    """Make a model with one adapter, `news`."""
    return lambda **options: get_peft_model(tiny_model(), config(**options), adapter_name="news")


@pytest.fixture
def bank(tiny_model):
    """Three committed tasks; the last one is active."""
    return make_bank(tiny_model())


@pytest.fixture(scope="session")
def saved(tiny_model, tmp_path_factory):
    """The folder of such a bank, to be read only, and each task's logits when it was saved."""
    model, folder = make_bank(tiny_model()), tmp_path_factory.mktemp("bank")
    model.save_pretrained(folder)
    return folder, {name: logits(model, name) for name in NAMES}
