"""What a merged checkpoint takes over as it is: the configuration and the tokenizer."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_cl.checkpoints.reader import CONFIG, Checkpoint
from hf_cl.errors import MergeError
from hf_cl.storage.disk import json_bytes

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model",
    "chat_template.jinja",
)  # fmt: skip
"""Files by which transformers loads a tokenizer."""


def write_config(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write a configuration; where it names a dtype, that is the merged tensors'."""
    named = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if config.get(key)}
    if config:
        (folder / CONFIG).write_bytes(json_bytes({**config, **named}))


def copy_tokenizer(folder: Path, sources: Sequence[Path]) -> None:
    """Copy the tokenizer of the first source that has one."""
    for source in sources:
        if found := [source / name for name in TOKENIZER if (source / name).is_file()]:
            for file in found:
                shutil.copyfile(file, folder / file.name)
            return


def require_one_tokenizer(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse models whose tokens have other numbers: their embeddings are those of different words.

    Raises:
        MergeError: Two vocabularies differ.
    """
    known = [(checkpoint, words) for checkpoint in checkpoints if (words := _vocabulary(checkpoint.folder)) is not None]
    for checkpoint, words in known[1:]:
        if words != known[0][1]:
            raise MergeError(
                f"{checkpoint.label}: has another vocabulary than {known[0][0].label}, so it was trained from another "
                f"base. Merge models of one base."
            )


def _vocabulary(folder: Path) -> int | None:
    """Return a hash of the words and their numbers; None where the folder does not say."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        words = json.loads(file.read_text("utf-8"))["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{file}: is no tokenizer ({error!r}). Fetch or save it again.") from error
    return hash(json.dumps(words, sort_keys=True))
