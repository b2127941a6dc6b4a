"""What is known of each model family: which linears are masked, which layers are the head, where it reads.

The one table of families; every entry is a starting point that `target_modules` and `head_modules` override.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_cl.errors import BaseModelError
from hf_cl.layers.linear import is_maskable

Pooling = Literal["first", "last", "eos"]


@dataclass(frozen=True)
class Family:
    """What is known of one model family.

    Attributes:
        targets: Suffixes of the names of the linears to mask: all of attention and feed-forward.
        head: Names of the output layers, the classifier last; the layers a task has to itself.
        pooling: The position a text is read at: `first`, `last` (the last one that is no padding) or `eos`.
    """

    targets: tuple[str, ...]
    head: tuple[str, ...]
    pooling: Pooling = "first"


_BERT_BLOCK = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_LLAMA_BLOCK = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_T5_ATTENTION = tuple(f"{kind}.{part}" for kind in ("SelfAttention", "EncDecAttention") for part in "qkvo")

FAMILIES: dict[str, Family] = {
    "albert": Family(
        targets=("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output"),
        head=("classifier",),
    ),
    "bert": Family(targets=_BERT_BLOCK, head=("classifier",)),
    "deberta-v2": Family(
        targets=(
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.value_proj",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ),
        # Its checkpoints bring no pooler: whoever leaves it out reloads a random one (peft issue 2171).
        head=("pooler.dense", "classifier"),
    ),
    "distilbert": Family(
        targets=(
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "ffn.lin1",
            "ffn.lin2",
        ),
        head=("pre_classifier", "classifier"),
    ),
    "electra": Family(targets=_BERT_BLOCK, head=("classifier.dense", "classifier.out_proj")),
    "gpt2": Family(targets=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), head=("score",), pooling="last"),
    "llama": Family(targets=_LLAMA_BLOCK, head=("score",), pooling="last"),
    "modernbert": Family(targets=("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"), head=("classifier",)),
    "qwen2": Family(targets=_LLAMA_BLOCK, head=("score",), pooling="last"),
    "roberta": Family(targets=_BERT_BLOCK, head=("classifier.dense", "classifier.out_proj")),
    "t5": Family(
        targets=(
            *_T5_ATTENTION,
            "DenseReluDense.wi",
            "DenseReluDense.wi_0",
            "DenseReluDense.wi_1",
            "DenseReluDense.wo",
        ),
        head=("classification_head.dense", "classification_head.out_proj"),
        pooling="eos",
    ),
}


def family_of(model: Any) -> Family:
    """Return the family of a Hugging Face model by its config's `model_type`.

    Raises:
        BaseModelError: The family is not in the table; names its linears and the way out.
    """
    kind = model.config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    linears = [name for name, module in model.named_modules() if is_maskable(module)]
    raise BaseModelError(
        f"{type(model).__name__}: the family {kind!r} is not in the table ({', '.join(sorted(FAMILIES))}). "
        f"Name the linears to mask as `target_modules` and the classifier as `head_modules`. "
        f"Linears found: {', '.join(sorted(linears)[:40])}."
    )


def head_features(head: nn.Module, forward: Callable[[], object], attention_mask: Tensor | None) -> Tensor:
    """Return what the head's first layer reads during a forward, one row a text: (n, d), float32, on the CPU.

    Args:
        head: The first layer of a sequence classifier's head.
        forward: Runs the model once on the texts.
        attention_mask: (n, length), 1 at real tokens; None where there is no padding.
    """
    found: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    try:
        forward()
    finally:
        handle.remove()
    features = found[0]
    if features.ndim == 3:  # the head reads every position, and the model then takes that of the last real token
        place = torch.arange(features.shape[1], device=features.device)
        last = torch.full_like(features[:, 0, 0], features.shape[1] - 1, dtype=torch.long)
        last = last if attention_mask is None else (place * attention_mask.long()).argmax(-1)
        features = features[torch.arange(features.shape[0], device=features.device), last]
    return features.float().cpu()
