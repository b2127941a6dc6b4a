"""The feature a text is routed by: the mean of the bare base's last hidden states over the text's tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def mean_features(model: Any, forward: Callable[[], object], attention_mask: Tensor | None) -> Tensor:
    """Return the masked mean of an encoder's last hidden states, one row a text: (n, d), float32, on the CPU.

    Args:
        model: A sequence classifier; of an encoder-decoder, the encoder is read.
        forward: Runs it once on the texts.
        attention_mask: (n, length), 1 at real tokens; None where there is no padding.
    """
    found: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda _, __, output: found.append(output))
    try:
        forward()
    finally:
        handle.remove()
    output = found[0]
    hidden = getattr(output, "encoder_last_hidden_state", None)
    hidden = (output[0] if hidden is None else hidden).detach().float()
    if attention_mask is None:
        return hidden.mean(1).cpu()
    weight = attention_mask.to(hidden.device, torch.float32).unsqueeze(-1)
    return ((hidden * weight).sum(1) / weight.sum(1).clamp_min(1)).cpu()
