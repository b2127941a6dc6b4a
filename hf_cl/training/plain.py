"""Nested values as JSON and tensors, and back: what optimizers and schedules hold, without a pickle.

JSON has neither tuples nor keys that are numbers, so those are written as `{"tuple": [...]}` and `{"dict": [[k, v]]}`;
a tensor lies elsewhere under the name that stands in its place.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_cl.errors import ConfigError


def to_plain(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return a JSON value; tensors go into `tensors` under names that begin with `name`.

    Raises:
        ConfigError: Something in it is no plain value, so it cannot be kept.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, to_plain(held, tensors, f"{name}.{key}")] for key, held in value.items()]}
    if isinstance(value, list | tuple):
        found = [to_plain(held, tensors, f"{name}.{place}") for place, held in enumerate(value)]
        return {"tuple": found} if isinstance(value, tuple) else found
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{name}: a {type(value).__name__} cannot be kept in the middle of a task. Use an optimizer and a schedule "
        f"whose state is numbers and tensors, as those of torch."
    )


def from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `to_plain` was given."""
    if isinstance(value, list):
        return [from_plain(held, tensors) for held in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "float":
        return float(held)
    if kind == "tuple":
        return tuple(from_plain(entry, tensors) for entry in held)
    return {key: from_plain(entry, tensors) for key, entry in held}
