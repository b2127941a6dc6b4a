"""What may be merged with what: the same names, shapes and kinds of numbers, or an error that says where not.

The checks read names, shapes and dtypes alone, so they serve tensors in memory and files alike, before any work.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from hf_cl.errors import ConfigError, MergeError, shown

Tensors = Mapping[str, torch.Tensor]
_MOST = 3
"""Names that an error lists; the rest are counted."""


class Spec(NamedTuple):
    """What a tensor is, apart from its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def merges(self) -> bool:
        """Whether the tensor is merged: floating point is; integers and booleans stay as the base has them."""
        return self.dtype.is_floating_point


def specs(tensors: Tensors) -> dict[str, Spec]:
    """Return what each tensor is."""
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def require_alike(first: tuple[str, Mapping[str, Spec]], others: Sequence[tuple[str, Mapping[str, Spec]]]) -> None:
    """Require that every source has the tensors of the first one, and no others.

    Args:
        first: What to call the first source, and its tensors.
        others: The same of each other source.

    Raises:
        MergeError: Names are missing or extra, a shape differs, integers meet floats, or numbers are quantised.
    """
    where, reference = first
    for label, tensors in (first, *others):
        _require_plain(label, tensors)
    for label, tensors in others:
        missing, extra = sorted(set(reference) - set(tensors)), sorted(set(tensors) - set(reference))
        if missing or extra:
            found = [f"lacks {listed(missing)}, which {where} has"] * bool(missing)
            found += [f"has {listed(extra)}, which {where} lacks"] * bool(extra)
            raise MergeError(
                f"{label}: {' and '.join(found)}. Merge models of one base only, without what is each task's own "
                f"(its head)."
            )
        for name, spec in reference.items():
            _require_same(name, (where, spec), (label, tensors[name]))


def _require_plain(label: str, tensors: Mapping[str, Spec]) -> None:
    for name, spec in tensors.items():
        if spec.dtype.is_complex or (spec.merges and spec.dtype.itemsize < 2):
            raise MergeError(
                f"{label}: {shown(name)} is of {spec.dtype}, a quantised or complex type. Merge the model as it was "
                f"before that, in float32, bfloat16 or float16."
            )


def _require_same(name: str, first: tuple[str, Spec], other: tuple[str, Spec]) -> None:
    (where, expected), (label, found) = first, other
    if expected.shape != found.shape:
        raise MergeError(
            f"{label}: {shown(name)} has shape {list(found.shape)}, in {where} it has {list(expected.shape)}. Models "
            f"of one base have equal shapes; if this is a head (its rows are labels), leave it out."
        )
    if expected.merges != found.merges:
        raise MergeError(
            f"{label}: {shown(name)} is of {found.dtype}, in {where} of {expected.dtype}. One of them is quantised, or "
            f"no model of this base."
        )


def require_finite(label: str, name: str, tensor: torch.Tensor) -> None:
    """Require that a tensor holds neither NaN nor infinity.

    Raises:
        MergeError: It does.
    """
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        raise MergeError(
            f"{label}: {shown(name)} holds NaN or infinity. It would spread into every weight that is merged with it; "
            f"take a checkpoint from before training diverged."
        )


def require_weights(weights: Sequence[float], count: int, where: str, *, signed: bool = False) -> list[float]:
    """Return one weight a model; all ones where none is given.

    Args:
        weights: As given; may be empty.
        count: How many models there are.
        where: The rule, for the error.
        signed: Whether weights may be negative, as a negated task's is.

    Raises:
        ConfigError: There are too few or too many, one is not finite or may not be negative, or all are 0.
    """
    if not weights:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"{where}.weights: {len(weights)} for {count} models. Give one a model, in their order.")
    for weight in weights:
        if not abs(weight) < float("inf") or (weight < 0 and not signed):
            wanted = "finite" if signed else "finite and at least 0"
            raise ConfigError(f"{where}.weights: expected numbers that are {wanted}, found {weight!r}.")
    if not signed and not any(weights):
        raise ConfigError(f"{where}.weights: all are 0. Give at least one model a weight.")
    return [float(weight) for weight in weights]


def require_models(count: int, where: str, *, one: bool = False) -> None:
    """Require that a rule has models, or exactly one.

    Raises:
        ConfigError: It has not.
    """
    if count < 1 or (one and count != 1):
        raise ConfigError(f"{where}: takes {'one model' if one else 'at least one model'}, found {count}.")


def listed(names: Sequence[str]) -> str:
    """Return the first few names of a list, and how many more there are."""
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(map(shown, names[:_MOST])) + more
