"""Probe logits: a task's answer to fixed pseudo-texts, as one digest.

Digests of tensors say that nothing a forward reads has moved; the probe says that the forward, too, gives
the same bits. The texts are seeded token ids, so no user's text is ever stored. Bit equality of logits is
promised on one machine alone: kernels of another round differently.
"""

from typing import Any

import torch
from torch import Tensor

from hf_cl.layers.families import FAMILIES
from hf_cl.ownership.digest import digest

TEXTS, TOKENS = 8, 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far probe logits may be from those at the commit in another environment, as a share of the largest logit."""


def probe_digest(model: Any) -> str:
    """Return the sha256 of the active task's probe logits."""
    return digest([("logits", probe_logits(model))])


def probe_logits(model: Any) -> Tensor:
    """Return the active task's float32 logits on 8 pseudo-texts of 16 tokens, in evaluation mode, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (TEXTS, TOKENS), generator=generator)
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.pooling == "eos":  # such a model refuses texts with no or several end tokens
        end = int(model.config.eos_token_id)
        ids = ids.where(ids != end, (end + 1) % model.config.vocab_size)
        ids[:, -1] = end
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
            logits = model(**inputs).logits.float()
    finally:
        model.train(was_training)
    return logits.cpu()


def probe_difference(held: Tensor, given: Tensor) -> float:
    """Return the largest difference of probe logits, as a share of the largest logit held."""
    if held.shape != given.shape:
        return float("inf")
    return float((held - given).abs().max() / held.abs().max().clamp_min(1e-30))
