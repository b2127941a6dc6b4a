"""Checkpoints as the sources of a rule: every tensor in slices, so that memory does not grow with the checkpoint."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_cl.checkpoints.reader import Checkpoint, boxes
from hf_cl.disk_merge.match import Names, Opened, canonical
from hf_cl.errors import MergeError, shown
from hf_cl.merging._check import listed, require_alike, require_finite
from hf_cl.merging._rule import Piece, require_fisher, wide
from hf_cl.merging.dare import Drop

ENTRIES = 1 << 20
"""Entries of all sources together that are in memory at a time: 4 MB in float32, which caches hold."""


class OnDisk:
    """The slices of all checkpoints. The first time a slice is read, it is checked."""

    def __init__(
        self,
        base: Opened,
        models: Sequence[Opened],
        fishers: Sequence[Opened] = (),
        drops: Sequence[Drop] = (),
        *,
        takes_base: bool = True,
        tell: Callable[[int], object] = lambda entries: None,
    ) -> None:
        """Take sources that fit each other.

        Args:
            base: Gives shapes, dtypes and integers.
            models: The others.
            fishers: Fisher information of each model, where the rule takes it.
            drops: One a model, where each is to be made sparse first.
            takes_base: Whether the rule reads the base; if not, neither does this, but to drop entries.
            tell: Called with the number of entries of each slice that was read.
        """
        self.base, self.models, self.fishers, self.drops, self.tell = base, models, fishers, drops, tell
        self.reads_base = takes_base or bool(drops)
        self.specs = base.specs()
        self.names = sorted(name for name, spec in self.specs.items() if spec.merges)
        self.entries = max(1, ENTRIES // (1 + len(models) + len(fishers)))
        self._checked: set[str] = set()

    def counts(self) -> dict[str, int]:
        """Return the entries of each tensor that is merged."""
        return {name: math.prod(self.specs[name].shape) for name in self.names}

    def pieces(self, name: str) -> Iterator[Piece]:
        """Yield a tensor's slices in storage order."""
        spec = self.specs[name]
        for start, box in boxes(spec.shape, self.entries):
            models = [model.read(name, box) for model in self.models]
            base = self.base.read(name, box) if self.reads_base else models[0]
            fishers = [fisher.read(name, box) for fisher in self.fishers]
            if name not in self._checked:
                self._check(name, base, models, fishers)
            dtype = wide(spec.dtype)
            piece = Piece(name, start, base.to(dtype), [m.to(dtype) for m in models], [f.to(dtype) for f in fishers])
            yield self._sparse(piece, spec.dtype) if self.drops else piece
            self.tell(base.numel())
        self._checked.add(name)

    def _check(self, name: str, base: Tensor, models: Sequence[Tensor], fishers: Sequence[Tensor]) -> None:
        if self.reads_base:
            require_finite(self.base.checkpoint.label, name, base)
        for opened, tensor in zip(self.models, models, strict=True):
            require_finite(opened.checkpoint.label, name, tensor)
        for opened, tensor in zip(self.fishers, fishers, strict=True):
            require_fisher(opened.checkpoint.label, name, tensor)

    def _sparse(self, piece: Piece, dtype: torch.dtype) -> Piece:
        """Drop entries of each model, and round as a model in memory is rounded between two rules."""
        kept = [
            drop.merge(Piece(piece.name, piece.start, piece.base, [model])).to(dtype).to(piece.base.dtype)
            for drop, model in zip(self.drops, piece.models, strict=True)
        ]
        return Piece(piece.name, piece.start, piece.base, kept, piece.fishers)

    def integers(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield slices of the base's integer tensors, which are kept as they are.

        Raises:
            MergeError: A model holds other integers.
        """
        for name, spec in sorted(self.specs.items()):
            for start, box in () if spec.merges else boxes(spec.shape, self.entries):
                held = self.base.read(name, box)
                for model in self.models:
                    if name in model.names.shared and not torch.equal(model.read(name, box), held):
                        raise MergeError(
                            f"{model.checkpoint.label}: {shown(name)} holds other integers than the base. Integers are "
                            f"never merged: it is quantised, or no model of this base."
                        )
                yield name, start, held


def copied(checkpoint: Checkpoint, names: Sequence[str], entries: int = ENTRIES) -> Iterator[tuple[str, int, Tensor]]:
    """Yield slices of tensors by their names in the files, checked.

    Raises:
        MergeError: One holds NaN or infinity.
    """
    for name in names:
        spec = checkpoint.specs[name]
        for start, box in boxes(spec.shape, entries):
            values = checkpoint.read(name, box)
            if spec.merges:
                require_finite(checkpoint.label, name, values)
            yield name, start, values


def fisher_names(checkpoint: Checkpoint, base: Opened) -> Names:
    """Return what the tensors of a Fisher file are called: as the model's, with or without the prefix.

    Raises:
        MergeError: One that is merged has no Fisher, or one of another shape.
    """
    held = {canonical(name, base.prefix): name for name in checkpoint.specs}
    wanted = {name: spec for name, spec in base.specs().items() if spec.merges}
    found = {name: held[short] for name in wanted if (short := canonical(name, base.prefix)) in held}
    if missing := sorted(set(wanted) - set(found)):
        raise MergeError(
            f"{checkpoint.label}: lacks {listed(missing)}. Give the Fisher of every tensor that is merged."
        )
    mine = {name: checkpoint.specs[found[name]] for name in wanted}
    require_alike((base.checkpoint.label, wanted), [(checkpoint.label, mine)])
    return Names({name: found[name] for name in wanted}, (), False)
