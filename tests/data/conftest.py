import json

import datasets
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    """A local task of 20 training and 4 test rows, labels a and b in turn, numbered."""

    def write(name="pets", names=("a", "b"), pair=False, **rows):
        path = tmp_path / name
        path.mkdir()
        for split, count in {"train": 20, "test": 4, **rows}.items():
            columns = {"text": [f"{split} {row}" for row in range(count)]}
            if pair:
                columns["text_pair"] = [f"other {row}" for row in range(count)]
            columns["label"] = [row % 2 for row in range(count)]
            Dataset.from_dict(columns).to_parquet(path / f"{split}.parquet")
        if names is not None:
            (path / "labels.json").write_text(json.dumps({"label_names": list(names)}))
        return path

    return write


def word_tokenizer(words="train test validation other one two three four five"):
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def tokenizer():
    return word_tokenizer()
