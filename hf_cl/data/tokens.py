"""A task's texts as token ids: truncated, not padded, and found again in the cache.

`datasets` names a cache file by a hash of the function that made it. A fast tokenizer changes its own
state when it is first used, so that hash would differ at each call; the name here is of what decides
the tokens, and of nothing else.

Source: the cache of `datasets`, https://huggingface.co/docs/datasets/about_cache
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict

from hf_cl.data.task import SPLITS, Task
from hf_cl.errors import ConfigError

# transformers costs seconds to import; reading a stream or a task must not wait for it.
if TYPE_CHECKING:
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

COLUMNS = ("input_ids", "token_type_ids", "attention_mask")


def tokenise(task: Task, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> DatasetDict:
    """Turn a task's texts into token ids.

    Pad at batch time, by `collator`: a batch then is as long as its longest row, not as `max_length`.

    Args:
        task: The task.
        tokenizer: The base model's tokenizer. As always in transformers, calling it sets its truncation.
        max_length: Most tokens of a row, special ones included; of a pair, the longer text is cut first.

    Returns:
        `train`, `validation` and `test` with the columns `input_ids`, `attention_mask`, `token_type_ids`
        if the tokenizer makes them, and `labels`.

    Raises:
        ConfigError: `max_length` leaves no room for a text, or is more than the model can take.
    """
    _check_length(tokenizer, max_length, task.pair)
    key = f"{_identity(tokenizer)}/{max_length}/{task.pair}"
    splits = dict(zip(SPLITS, (task.train, task.validation, task.test), strict=True))
    return DatasetDict(
        {
            split: _tokenise(dataset, tokenizer, max_length, key, f"Tokenising {task.name}/{split}")
            for split, dataset in splits.items()
        }
    )


def collator(tokenizer: "PreTrainedTokenizerBase") -> "DataCollatorWithPadding":
    """Return what pads rows to the longest of their batch.

    Raises:
        ConfigError: The tokenizer has no padding token.
    """
    from transformers import DataCollatorWithPadding

    if tokenizer.pad_token is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no padding token, so rows of a batch cannot be made equally "
            "long. Set `tokenizer.pad_token = tokenizer.eos_token`, and the model's `pad_token_id` too."
        )
    return DataCollatorWithPadding(tokenizer)


def _tokenise(dataset: Dataset, tokenizer: "PreTrainedTokenizerBase", max_length: int, key: str, desc: str) -> Dataset:
    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(
            batch["text"],
            batch.get("text_pair"),
            truncation=True,
            max_length=max_length,
            return_attention_mask=True,
        )
        return {**{name: encoded[name] for name in COLUMNS if name in encoded}, "labels": batch["label"]}

    fingerprint = hashlib.sha256(f"hf_cl.tokenise/1/{dataset._fingerprint}/{key}".encode()).hexdigest()
    return dataset.map(
        encode, batched=True, remove_columns=dataset.column_names, new_fingerprint=fingerprint, desc=desc
    )


def _check_length(tokenizer: "PreTrainedTokenizerBase", max_length: int, pair: bool) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    least = special + (2 if pair else 1)
    if max_length < least:
        raise ConfigError(
            f"`max_length` is {max_length}, but {special} special tokens and a token of each text need "
            f"{least}. Raise it."
        )
    if max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"`max_length` is {max_length}, but the tokenizer says that its model takes "
            f"{tokenizer.model_max_length} tokens. Lower it."
        )


def _identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash all that decides which tokens a text gives, except truncation and padding."""
    from transformers import PreTrainedTokenizerFast

    parts = [
        type(tokenizer).__name__.encode(),
        json.dumps([tokenizer.model_input_names, tokenizer.truncation_side]).encode(),
        json.dumps(tokenizer.split_special_tokens).encode(),
    ]
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append(json.dumps({**backend, "truncation": None, "padding": None}, sort_keys=True).encode())
    else:
        parts += _files(tokenizer)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _files(tokenizer: "PreTrainedTokenizerBase") -> list[bytes]:
    """Return a slow tokenizer's saved files: it has no other complete description of itself."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return [file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()]
