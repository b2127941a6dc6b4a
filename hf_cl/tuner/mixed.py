"""A batch whose rows belong to several tasks, answered in one call.

Shared: with `delta` a task's weight is the base's plus few entries, so all rows go through the model together, share
the product with the base's weight, and each task adds its own entries' for its rows. Equal to one task at a time
within `TOLERANCE`, since sums are taken in another order.

Apart: each task's rows go through the model together, one task after another, and their logits go back to their
places; bit-equal to such a batch of the task alone. So it is where the tasks' forms share no product (`prune`,
`random`), while one of them trains, where a model does something with a layer's weight between its rows (DeBERTa's
relative positions), and where `tuner.share_products` is False.
"""

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_cl.errors import ConfigError
from hf_cl.tuner.names import BASE
from hf_cl.tuner.rows import NoRowsError, Rows

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""How far logits of a shared batch may be from those of one task at a time, as a share of the largest of the batch."""


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
    picked = {name: torch.tensor(where) for name, where in places.items()}
    if len(picked) > 1 and _shareable(tuner, picked):
        try:
            return _shared(tuner, picked, len(names), args, kwargs)
        except NoRowsError:
            tuner.share_products = False  # so is this model: no batch of it can share
    return _apart(tuner, picked, len(names), args, kwargs)


def _shareable(tuner: Any, names: Iterable[str]) -> bool:
    """Return whether tasks can share the products with the base's weight, as far as one knows without a forward."""
    finished = all(name == BASE or tuner.phase(name) == "committed" for name in names)
    return bool(tuner.share_products and finished and tuner.mask_config.compose == "delta")


def _shared(
    tuner: Any, places: Mapping[str, Tensor], count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelOutput:
    order, ends = torch.cat(list(places.values())), accumulate(len(where) for where in places.values())
    rows = {name: slice(end - len(where), end) for (name, where), end in zip(places.items(), ends, strict=True)}
    inputs = {key: _rows(value, order, count) for key, value in kwargs.items()}
    with tuner.planned(Rows(rows, count)):
        output = tuner.model(*(_rows(value, order, count) for value in args), **inputs)
    _require_output(output)
    return type(output)(**{key: _together([(order, output[key])], count) for key in output})


def _apart(
    tuner: Any, places: Mapping[str, Tensor], count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelOutput:
    parts: list[tuple[Tensor, Any]] = []
    for name, where in places.items():
        with tuner.answering(None if name == BASE else name):
            inputs = {key: _rows(value, where, count) for key, value in kwargs.items()}
            output = tuner.model(*(_rows(value, where, count) for value in args), **inputs)
        _require_output(output)
        parts.append((where, output))
    kind = parts[0][1]
    return type(kind)(**{key: _together([(where, out[key]) for where, out in parts], count) for key in kind})


def _require_output(output: Any) -> None:
    if not isinstance(output, ModelOutput):
        raise ConfigError("adapter_names: a mixed batch returns a ModelOutput. Leave return_dict=False out.")


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
