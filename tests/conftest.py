"""Tiny bases, rows of token ids and arguments: everything trains for real, in a fraction of a second."""

import os
import time

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from hf_cl.layers.base import Base

VOCAB, TOKENS = 50, 6
os.environ["COLUMNS"] = "120"  # tables are as wide as the terminal, and there may be none


BEGAN = time.monotonic()
SLOW_SECONDS = float(os.environ.get("HF_CL_SLOW_SECONDS", "inf"))
"""No slow test begins later than this: what a job has left when it comes to them."""


def pytest_runtest_setup(item):
    """Leave out the slow tests that there is no time for."""
    if item.get_closest_marker("slow") and time.monotonic() - BEGAN > SLOW_SECONDS:
        pytest.skip(f"no slow test begins after {SLOW_SECONDS:.0f} seconds")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Tiny matrices: threads that wait for each other cost ten times the arithmetic on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model():
    """Make a random BERT of 4,096 masked weights; equal seeds give equal weights."""

    def make(seed=0, **changes):
        set_seed(seed)
        sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 32, "max_position_embeddings": 16, "initializer_range": 0.2}
        return BertForSequenceClassification(BertConfig(**(sizes | changes))).eval()

    return make


@pytest.fixture(scope="session")
def tiny_base(tiny_model):
    """Make a `Base` around a tiny BERT, without a tokenizer: rows are token ids already."""

    def make(seed=0, **changes):
        return Base(tiny_model(seed, **changes), None, "tiny", ("classifier",))

    return make


@pytest.fixture(scope="session")
def token_rows():
    """Make rows whose class is told by one token at a random place, the rest being random tokens."""

    def make(seed, classes, count=16):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % classes
        ids = torch.randint(10, VOCAB, (count, TOKENS), generator=generator)
        places = torch.randint(TOKENS, (count,), generator=generator)
        ids[torch.arange(count), places] = labels
        mask = torch.ones_like(ids)
        return Dataset.from_dict(
            {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}
        )

    return make


@pytest.fixture(scope="session")
def token_task(token_rows):
    """Make the train and validation rows of a task."""

    def make(seed, classes, count=16):
        return DatasetDict(train=token_rows(seed, classes, count), validation=token_rows(seed + 1000, classes, 8))

    return make


@pytest.fixture(scope="session")
def arguments(tmp_path_factory):
    """Make arguments for a handful of optimizer steps on the CPU that write nothing."""

    def make(**changes):
        options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02, "use_cpu": True}
        options |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1}
        return TrainingArguments(output_dir=str(tmp_path_factory.mktemp("out")), **(options | changes))

    return make
