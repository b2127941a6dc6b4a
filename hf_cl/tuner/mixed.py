"""A batch whose rows belong to several tasks, answered in one call.

A mask multiplies the weight, so tasks share no product of a layer, as LoRA's do: each task's rows go through the
model together, and their logits go back to their places. Whatever a model does with a layer's weight between its
rows (DeBERTa's relative positions) therefore needs no case of its own.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_cl.errors import ConfigError
from hf_cl.tuner.names import BASE


def run_mixed(tuner: Any, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelOutput:
    """Return the output of a batch with one adapter a row.

    Args:
        tuner: The `MaskModel`, in evaluation mode.
        names: An adapter, or `__base__`, for each row.
        args: Positional inputs; a tensor with that many rows is divided, all else is given to each task.
        kwargs: Inputs by name.

    Returns:
        Logits of the widest task's width, (rows, labels); a narrower task's row ends in -inf. Other outputs with
        one row a text are put together too; a cache is left out.

    Raises:
        ConfigError: Labels are given, the number of names is not that of the rows, or the output is a tuple.
    """
    if kwargs.get("labels") is not None:
        raise ConfigError("adapter_names: tasks have different losses. Leave `labels` out, or give one task's rows.")
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if first is None or first.shape[0] != len(names):
        found = "none" if first is None else first.shape[0]
        raise ConfigError(f"adapter_names: {len(names)} names for {found} rows. Name one adapter a row.")
    places: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        places.setdefault(name, []).append(row)
    parts: list[tuple[Tensor, Any]] = []
    for name, where in places.items():
        with tuner.answering(None if name == BASE else name):
            picked = torch.tensor(where)
            inputs = {key: _rows(value, picked, len(names)) for key, value in kwargs.items()}
            output = tuner.model(*(_rows(value, picked, len(names)) for value in args), **inputs)
        if not isinstance(output, ModelOutput):
            raise ConfigError("adapter_names: a mixed batch returns a ModelOutput. Leave return_dict=False out.")
        parts.append((picked, output))
    kind = parts[0][1]
    return type(kind)(**{key: _together([(where, out[key]) for where, out in parts], len(names)) for key in kind})


def _rows(value: Any, where: Tensor, rows: int) -> Any:
    has_rows = isinstance(value, Tensor) and value.ndim and value.shape[0] == rows
    return value[where.to(value.device)] if has_rows else value


def _together(parts: list[tuple[Tensor, Any]], rows: int) -> Any:
    """Put the tasks' parts of one output back into the order of the rows; None for what has no rows (a cache)."""
    first = parts[0][1]
    if isinstance(first, tuple):
        return tuple(_together([(where, value[i]) for where, value in parts], rows) for i in range(len(first)))
    if not isinstance(first, Tensor):
        return None
    widest = max(value.shape[-1] for _, value in parts)
    whole = first.new_full((rows, *first.shape[1:-1], widest), -torch.inf)
    for where, value in parts:
        whole[where.to(whole.device), ..., : value.shape[-1]] = value.to(whole.dtype)
    return whole
