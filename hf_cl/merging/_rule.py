"""A merge rule, seen from the inside: the same piece of every source goes in, that piece of the result comes out.

A piece is a whole tensor in memory, and a slice of one where checkpoints are larger than memory. A rule does the same
arithmetic on every entry whatever the piece, so both ways give the same bits. A rule that must know the whole vector
first (TIES: its largest entries) surveys all pieces, as often as it says, before it merges the first one.

Arithmetic is in float32 (float64 for a base in float64); a result is rounded once, to the dtype of the base.
"""

import abc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_cl.errors import MergeError
from hf_cl.merging._check import Tensors, listed, require_alike, require_finite, specs


@dataclass(frozen=True)
class Piece:
    """The same entries of every source, in float32 (float64 where the base is), on the base's device.

    Attributes:
        name: The tensor.
        start: Flat index, in storage order, of the first entry.
        base: The base's entries; the first model's for rules that have none.
        models: Each model's.
        fishers: Each model's Fisher information, where the rule weighs by it.
    """

    name: str
    start: int
    base: Tensor
    models: Sequence[Tensor]
    fishers: Sequence[Tensor] = ()


class Rule(abc.ABC):
    """How a piece of the result is made; use one object for one merge.

    Attributes:
        takes_base: Whether it reads `piece.base`.
    """

    takes_base: bool = True

    @abc.abstractmethod
    def merge(self, piece: Piece) -> Tensor:
        """Return the merged piece, a new tensor of the base's shape and dtype as they stand in `piece`."""


class SurveyRule(Rule):
    """A rule that looks at a whole vector before it merges the first piece of it.

    Attributes:
        surveys: How often all pieces of the vector are shown.
        across: Whether the vector is all tensors at once, or each tensor by itself.
    """

    surveys: int
    across: bool

    @abc.abstractmethod
    def begin(self) -> None:
        """Start with a vector."""

    @abc.abstractmethod
    def survey(self, turn: int, piece: Piece) -> None:
        """Look at a piece; pieces come in storage order."""

    @abc.abstractmethod
    def settle(self, turn: int) -> None:
        """End a survey: every piece of the vector was shown."""


class Sources(Protocol):
    """What is merged: names of floating-point tensors in a fixed order, and the pieces of each."""

    @property
    def names(self) -> Sequence[str]:
        """The tensors."""
        ...

    def pieces(self, name: str) -> Iterable[Piece]:
        """Yield a tensor's pieces in storage order, anew at each call."""
        ...


def run(rule: Rule, sources: Sources) -> Iterator[tuple[Piece, Tensor]]:
    """Yield each piece and what it is merged to, tensor by tensor, in the order of `sources.names`."""
    whole = not isinstance(rule, SurveyRule) or rule.across
    for vector in [list(sources.names)] if whole else [[name] for name in sources.names]:
        if isinstance(rule, SurveyRule):
            _survey(rule, sources, vector)
        for name in vector:
            for piece in sources.pieces(name):
                yield piece, rule.merge(piece)


def _survey(rule: SurveyRule, sources: Sources, vector: Sequence[str]) -> None:
    rule.begin()
    for turn in range(rule.surveys):
        for name in vector:
            for piece in sources.pieces(name):
                rule.survey(turn, piece)
        rule.settle(turn)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a tensor of this one is merged in."""
    return torch.promote_types(dtype, torch.float32)


class InMemory:
    """Mappings of tensors as sources; a piece is a whole tensor, and tied tensors are one."""

    def __init__(
        self, base: tuple[str, Tensors], models: Sequence[tuple[str, Tensors]], fishers: Sequence[Tensors]
    ) -> None:
        """Check the sources; see `merge_tensors`."""
        require_alike((base[0], specs(base[1])), [(label, specs(model)) for label, model in models])
        self.base, self.models, self.fishers = base[1], [model for _, model in models], fishers
        self.owner = _owners(self.base)
        self._check([base, *models])
        self.names = sorted({owner for owner in self.owner.values() if self.base[owner].is_floating_point()})
        for number, fisher in enumerate(fishers):
            self._check_fisher(f"Fisher of model {number}", fisher)

    def _check(self, sources: Sequence[tuple[str, Tensors]]) -> None:
        for label, tensors in sources:
            for name, owner in self.owner.items():
                if owner != name and not torch.equal(tensors[name], tensors[owner]):
                    raise MergeError(
                        f"{label}: {name} is not {owner}, to which {sources[0][0]} ties it. Merge models that tie the "
                        f"same tensors, or give the base untied (clone one of the two)."
                    )
                if tensors[name].is_floating_point():
                    require_finite(label, name, tensors[name].detach())
                elif not torch.equal(tensors[name].to(self.base[name].device), self.base[name]):
                    raise MergeError(
                        f"{label}: {name} holds other integers than {sources[0][0]}. Integers are never merged: it is "
                        f"quantised, or no model of this base."
                    )

    def _check_fisher(self, label: str, fisher: Tensors) -> None:
        if missing := [name for name in self.names if name not in fisher]:
            raise MergeError(f"{label}: lacks {listed(missing)}. Give the Fisher of every tensor that is merged.")
        for name in self.names:
            if fisher[name].shape != self.base[name].shape:
                raise MergeError(
                    f"{label}: {name} has shape {list(fisher[name].shape)}, its weight has "
                    f"{list(self.base[name].shape)}. It is the Fisher of another model."
                )
            require_fisher(label, name, fisher[name])

    def pieces(self, name: str) -> Iterator[Piece]:
        """Yield the one piece of a tensor."""
        like = self.base[name]
        device, dtype = like.device, wide(like.dtype)

        def read(tensors: Tensors) -> Tensor:
            return tensors[name].detach().to(device=device, dtype=dtype)

        yield Piece(name, 0, read(self.base), list(map(read, self.models)), list(map(read, self.fishers)))


def require_fisher(label: str, name: str, tensor: Tensor) -> None:
    """Require that Fisher information is what a mean of squares can be.

    Raises:
        MergeError: It is negative, NaN or infinite.
    """
    require_finite(label, name, tensor)
    if tensor.numel() and bool(tensor.min() < 0):
        raise MergeError(f"{label}: {name} holds negative numbers; a Fisher is a mean of squares. Compute it anew.")


def _owners(tensors: Tensors) -> dict[str, str]:
    """Return, for each name in order, the first name that holds the same storage: its own, unless they are tied."""
    seen: dict[object, str] = {}
    owners = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owners[name] = seen.setdefault(place, name) if tensor.numel() else name
    return owners


def merge_tensors(
    rule: Rule, base: Tensors, models: Sequence[Tensors], *, fishers: Sequence[Tensors] = (), label: str = "base"
) -> dict[str, Tensor]:
    """Merge tensors in memory.

    Args:
        rule: How; it is used up.
        base: Gives names, shapes, dtypes, devices, integers and ties of the result. No source is changed.
        models: The others, each with the tensors of the base.
        fishers: Each model's Fisher information, where the rule takes one.
        label: What to call the base in an error.

    Returns:
        New tensors, in the order of the base; names tied in the base share one.

    Raises:
        MergeError: The sources do not fit, hold NaN or infinity, or the result does not fit the base's dtype.
    """
    sources = InMemory((label, base), [(f"model {n}", model) for n, model in enumerate(models)], fishers)
    made = {}
    for piece, merged in run(rule, sources):
        made[piece.name] = merged.to(base[piece.name].dtype)
        require_fits(piece.name, made[piece.name])
    for name, owner in sources.owner.items():
        if owner not in made:
            made[owner] = base[owner].detach().clone()
        made[name] = made[owner]
    return {name: made[name] for name in base}


def require_fits(name: str, tensor: Tensor) -> None:
    """Require that a result did not overflow.

    Raises:
        MergeError: It did.
    """
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        raise MergeError(
            f"{name}: the merged values exceed what {tensor.dtype} can hold. Lower `scale` or `weights`, or start from "
            f"a base in float32."
        )
