"""Banks of masked adapters on a tiny BERT, and what there is to compare. PYTEST_DONT_REWRITE: it is imported early.

A test module says `pytest_plugins = ["masked"]` to have the fixtures, and imports the functions.
"""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from hf_cl import MaskConfig
from hf_cl.errors import HfClError

NAMES = ("news", "pets", "shop")
LABELS = {"news": 3, "pets": 2, "shop": 4}
ORDERS = list(itertools.permutations(NAMES))
WEIGHTS = "adapter_model.safetensors"
in_every_way = pytest.mark.parametrize(
    "way",
    [{}, {"low_cpu_mem_usage": True}, {"ignore_mismatched_sizes": True}],
    ids=["plainly", "low_cpu_mem_usage", "ignore_mismatched_sizes"],
)
HARD = ("0", "query", "dense", "1", "weight", "bias", "base_layer", "hfcl_scores", "hfcl_copy", "classifier", "layer")
HARD = (*HARD, "default", "copies", "bert", "model", "base_model", "two words")
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query."
HEAD = {"base_model.model.classifier.hfcl_copy.weight": (5, 16), "base_model.model.classifier.hfcl_copy.bias": (5,)}
DAMAGES = {
    "a tensor is missing": lambda tensors: tensors.pop(QUERY + "hfcl_inherited"),
    "a tensor too many": lambda tensors: tensors.update({QUERY + "hfcl_extra": torch.zeros(1)}),
    "a tensor of the base": lambda tensors: tensors.update({QUERY + "base_layer.weight": torch.zeros(16, 16)}),
    "values are cut short": lambda tensors: tensors.update({QUERY + "hfcl_owned": tensors[QUERY + "hfcl_owned"][:-1]}),
    "bits are cut short": lambda tensors: tensors.update({QUERY + "hfcl_bits": tensors[QUERY + "hfcl_bits"][:-1]}),
    "scores came back": lambda tensors: tensors.update({QUERY + "hfcl_scores": torch.zeros(16, 16)}),
    "another head": lambda tensors: tensors.update({key: torch.zeros(shape) for key, shape in HEAD.items()}),
    "another bank": lambda tensors: tensors.update({QUERY + "hfcl_owned": tensors[QUERY + "hfcl_owned"] + 1}),
}
CHILD = """
import json, re, sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

assert "hf_cl" not in sys.modules
base, folder, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
found = []
try:
    PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), folder + "/pets")
except KeyError as error:
    found.append(str(error))
for card, place in (("README.md", folder), ("pets/README.md", folder + "/pets")):
    for block in re.findall(r"^```python\\n(.*?)^```$", open(f"{folder}/{card}").read(), re.M | re.S):
        names = {}
        exec(block.replace("THIS_REPOSITORY", place), names)
        with torch.no_grad():
            found.append(names["model"].eval()(input_ids=ids).logits.tolist())
print(json.dumps(found))
"""


def config(**options):
    return MaskConfig(**({"task_type": "SEQ_CLS", "density": 0.2, "num_labels": 3} | options))


def rows(count=5):
    return torch.randint(50, (count, 7), generator=torch.Generator().manual_seed(9))


def logits(model, adapter=None, **more):
    if adapter is not None:
        model.set_adapter(adapter)
    ids = rows()
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits


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


def mixed(model, names, **inputs):
    """The logits of a batch whose rows belong to these adapters."""
    ids = rows(len(names))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **inputs).logits


def full():
    """A config with no option left as it is by default, where another value is allowed."""
    return config(
        density=0.3, num_labels=None, id2label={0: "a", 1: "b", 2: "c"}, compose="prune", scale=2.0, rank="magnitude",
        trains="claimed", free_topk=True, joint=True, values_dtype="float32", train_norms=True, seed=4, task_index=5,
        problem_type="multi_label_classification", head="shared", head_of=0, scales={"query": 0.5},
        target_modules=["query"], exclude_modules=["key"], head_modules=["classifier"], missing_modules=["x.weight"],
        base_fingerprint="abc", base_model_name_or_path="someone/base", revision="main",
    )  # fmt: skip


def refuse(model, folder, name="shop", error=HfClError, **way):
    before = state(model)
    with pytest.raises(error) as raised:
        model.load_adapter(folder, adapter_name=name, **way)
    assert changed(before, state(model)) == []
    return str(raised.value)


def place(folder, name):
    return folder if name == "default" else folder / name


def load_hard(base, folder, order):
    model = PeftModel.from_pretrained(base, place(folder, order[0]), adapter_name=order[0])
    for name in order[1:]:
        model.load_adapter(place(folder, name), adapter_name=name)
    return model


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


@pytest.fixture
def damaged(saved, tmp_path):
    """Make a copy of a saved task with one of the damages; its folder."""
    return lambda name, damage: rewritten(saved[0] / name, tmp_path / name, DAMAGES[damage])


@pytest.fixture
def learning(tiny_model, saved):
    """A model with a finished task, `pets`, which reads values of others, and one that trains, `next`."""
    model = load(tiny_model(), saved[0], "pets")
    model.add_adapter("next", config(num_labels=5, trains="claimed", train_norms=True, task_index=7))
    model.set_adapter("next")
    move(model, "next")
    return model.train()


@pytest.fixture
def named(tiny_model, tmp_path):
    """Make a bank on a saved base, its labels hard on Markdown."""

    def make(name="pets", base=None):
        tiny_model().save_pretrained(tmp_path / "base")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        loaded.name_or_path = loaded.config._name_or_path = base or str(tmp_path / "base")
        model = get_peft_model(loaded, config(num_labels=None, id2label={0: "a\n\n---\nb", 1: "`c", 2: "```"}), "news")
        finish(model, "news")
        model.add_adapter(name, config(num_labels=2))
        finish(model, name)
        return model

    return make


@pytest.fixture(scope="session")
def hard(tiny_model, tmp_path_factory):
    """A bank of tasks named like parts of paths, its folder, and each one's logits."""
    folder, model = tmp_path_factory.mktemp("hard"), None
    for place, name in enumerate(HARD):
        made = config(
            num_labels=2 + place % 3, density=0.05, trains=("claimed", "nothing")[place % 2], train_norms=True
        )
        if model is None:
            model = get_peft_model(tiny_model(), made, adapter_name=name)
        else:
            model.add_adapter(name, made)
        finish(model, name, place)
    model.save_pretrained(folder)
    return model, folder, {name: logits(model, name) for name in HARD}


@pytest.fixture
def pushed(monkeypatch):
    """What a push to the Hub would upload, by its place in the repository."""
    files = {}

    def create_commit(operations, **_):
        files.update({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})

    api = SimpleNamespace(create_repo=lambda repo, **_: SimpleNamespace(repo_id=repo), create_commit=create_commit)
    new = ModelCard("---\nlibrary_name: transformers\n---\n\n[More Information Needed]\n")
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: api)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: new)
    return files
