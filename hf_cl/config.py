"""Strict reading of options: mapping -> frozen dataclass, and nothing is silently ignored.

An option is a dataclass field; its one description stands in `option(..., help=...)` and is what
`hf-cl methods` prints. A key that no field has is an error that proposes the nearest name.
"""

import contextlib
import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from hf_cl.errors import ConfigError

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple[Any, ...] = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    """Declare one option of a frozen dataclass: its description and, where known, its values or its range.

    Args:
        default: The default; none makes the key required.
        help: One line that says what it is.
        choices: The allowed values, where they are few.
        least: The smallest allowed number.
        above: A number that it must exceed.
        below: A number that it must stay under.
        most: The largest allowed number.
    """
    metadata = {"help": help, "choices": choices, "least": least, "above": above, "below": below, "most": most}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, else the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known) or 'none'}."


def read(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the frozen dataclass `cls` from a mapping.

    Args:
        cls: A dataclass whose fields are the allowed keys.
        values: Keys and plain values, as YAML gives them.
        where: What to call this mapping in an error, as in `recipe.method`.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type or is no allowed choice.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of options, found {values!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}.{did_you_mean(str(key), fields)}")
    hints = typing.get_type_hints(cls)
    read_values = {}
    for name, field in fields.items():
        if name in values:
            read_values[name] = read_option(values[name], hints[name], field, f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: key {name!r} is missing. {field.metadata.get('help', '')}")
    return cls(**read_values)


def read_option(value: Any, hint: Any, field: dataclasses.Field[Any], where: str) -> Any:
    """Return one option's value, as its field's type hint and choices allow.

    Raises:
        ConfigError: The value has the wrong type or is no allowed choice.
    """
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if float in plain and int not in plain:
        value = _as_float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, found {value!r}.")
    if tuple in plain and isinstance(value, list):
        value = tuple(value)
    if typing.Any not in plain and not any(_is_a(value, kind) for kind in plain):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in plain)
        raise ConfigError(f"{where}: expected {names}, found {value!r} ({type(value).__name__}).")
    choices = field.metadata.get("choices", ())
    if choices and value not in choices:
        hint_text = did_you_mean(str(value), map(str, choices))
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, choices))}.{hint_text}")
    _check_range(value, field.metadata, where)
    return value


def _check_range(value: Any, metadata: Mapping[str, Any], where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    rules = {
        "at least": ("least", operator.ge),
        "above": ("above", operator.gt),
        "below": ("below", operator.lt),
        "at most": ("most", operator.le),
    }
    asked = {words: (metadata.get(key), holds) for words, (key, holds) in rules.items()}
    stated = {words: (bound, holds) for words, (bound, holds) in asked.items() if bound is not None}
    if not all(holds(value, bound) for bound, holds in stated.values()):
        wanted = " and ".join(f"{words} {bound:g}" for words, (bound, _) in stated.items())
        raise ConfigError(f"{where}: expected a number {wanted}, found {value!r}.")


def _as_float(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; people write it as a number."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return float(value)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    return value


def _is_a(value: Any, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)
