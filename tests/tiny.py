"""A tiny base, its tokenizer, and tiny tasks, for tests of whole runs. PYTEST_DONT_REWRITE: it asserts nothing.

A test module says `pytest_plugins = ["tiny"]` to have the fixtures, and `import tiny` to have the functions.
"""

import gc
import json
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, TrainingArguments

from hf_cl import ContinualLearner, plugins, task_from_datasets
from hf_cl.data import tokenise
from hf_cl.layers.base import Base, load_base

TEXT = """
red green blue warm cold wet dry cat dog bird fish tree leaf root stone sand rain snow wind sun moon star sea lake
hill road car train boat plane bread milk salt sugar tea egg fork spoon plate cup door wall roof floor
"""
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LABELS = {"pets": ("tame", "wild"), "weather": ("mild", "odd", "rough"), "food": ("sweet", "sour")}
"""Two tasks with different label counts, and a third for later; sorted, as names found in data are."""


@pytest.fixture(scope="session", autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Each Trainer collects garbage; walking all that the imports made took more than half of a tiny training.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _no_hub():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        yield


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A saved tiny base with its tokenizer."""
    return save_base(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory, base_folder):
    """A recipe file with two local tasks; test rows are far more than validation rows, so they can be told apart."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), base_folder)


def vocabulary():
    return {word: index for index, word in enumerate([*SPECIAL, *WORDS])}


def tokenizer():
    backend = Tokenizer(models.WordPiece(vocabulary(), unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special)


def bert(seed=0):
    """Return a tiny classifier; its generator is its own, so nothing global is re-seeded."""
    config = BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,  # wide: a tiny base then answers differently to different texts
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def save_base(folder: Path, seed=0):
    bert(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def fresh(folder: Path) -> Base:
    return load_base(str(folder))


def rows(labels, count, seed=0, words=WORDS):
    """Return rows whose first word tells the label."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(words), (count, 2), generator=generator).tolist()
    texts = [f"{words[i % len(labels)]} {words[a]} {words[b]}" for i, (a, b) in enumerate(picks)]
    return {"text": texts, "label": [labels[i % len(labels)] for i in range(count)]}


SIZES = {"train": 24, "validation": 6, "test": 10}


def task(name="pets", labels=None, sizes=SIZES):
    labels = labels or LABELS[name]
    splits = {split: Dataset.from_dict(rows(labels, n, seed=len(name) + n)) for split, n in sizes.items()}
    return task_from_datasets(name, splits)


def write_task(folder: Path, name="pets", labels=None, sizes=SIZES):
    """Write a task as jsonl files with string labels; return its folder."""
    place = folder / name
    place.mkdir(parents=True)
    for split, count in sizes.items():
        made = rows(labels or LABELS[name], count, seed=len(name) + count)
        lines = [json.dumps({"text": text, "label": label}) for text, label in zip(*made.values(), strict=True)]
        (place / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return place


TRAINING = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.01,
    "use_cpu": True,
    "disable_tqdm": True,
    "max_length": 8,
    "seed": 0,
}


def write_recipe(folder: Path, base: Path, names=("pets", "weather"), **blocks):
    """Write a recipe and its tasks; return the recipe's file."""
    for name in names:
        if not (folder / "data" / name).exists():
            write_task(folder / "data", name)
    recipe = {
        "model": str(base),
        "stream": [{"name": name, "dataset": f"data/{name}"} for name in names],
        "method": {"name": "exssnet", "density": 0.1},
        "training": dict(TRAINING),
        **blocks,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def arguments(folder: Path, **changes):
    defaults = {name: value for name, value in TRAINING.items() if name != "max_length"}
    more = {"save_strategy": "no", "report_to": [], "logging_steps": 100}
    return TrainingArguments(output_dir=str(folder), **{**defaults, **more, **changes})


TINY = {"density": 0.3, "start": "fresh", "learning_rate": 0.01, "share": 0.25}
"""Masks large enough to overlap, no KKT (it may reuse a whole mask), a rate at which a tiny encoder moves, and rows
to replay."""


def options(method, **changes):
    """Return a method's options, those of `TINY` where it has such."""
    module = plugins.load("methods", method)
    ours = {name: value for name, value in TINY.items() if name in module.Options.__dataclass_fields__}
    return module.Options(**{**ours, **changes})


def learner(base, config, folder: Path, **changes):
    """Return a learner on a tiny base (a folder or a Base)."""
    loaded = fresh(base) if isinstance(base, Path) else base
    arguments_ = arguments(folder, **changes.pop("training", {}))
    return ContinualLearner(loaded, None, config, arguments_, max_length=8, **changes)


def tokenised(learner, name, split="train"):
    """Return a tiny task's rows as a learner trains on them."""
    return tokenise(task(name), learner.base.tokenizer, learner.max_length)[split]


def logits(model, seed=1):
    """Return the active task's logits on fixed ids, in evaluation mode."""
    ids = torch.randint(len(vocabulary()), (5, 7), generator=torch.Generator().manual_seed(seed))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.clone()
    finally:
        model.train(was_training)
