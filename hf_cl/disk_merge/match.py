"""Which tensor of one checkpoint is which of another, and which are heads.

The encoder is what lies under the architecture's own prefix (`bert.`, `model.`); a checkpoint without that prefix is a
bare encoder. All else is a head. So a base saved as `AutoModel` or for masked words goes with classifiers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_cl.checkpoints.reader import Box, Checkpoint
from hf_cl.errors import MergeError, shown
from hf_cl.merging._check import Spec, require_alike

_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Ends of names in checkpoints of 2018, still served for BERT; transformers reads them as these."""


@dataclass(frozen=True)
class Names:
    """A checkpoint's tensors told apart.

    Attributes:
        shared: The name in the files of each tensor that is merged or kept, by its name in the base's files.
        head: Names in the files of the head's tensors.
        bare: Whether the checkpoint is an encoder alone.
    """

    shared: Mapping[str, str]
    head: Sequence[str]
    bare: bool


@dataclass(frozen=True)
class Opened:
    """An open checkpoint, what its tensors are called, and the prefix of its architecture."""

    checkpoint: Checkpoint
    names: Names
    prefix: str

    def read(self, name: str, box: Box) -> Tensor:
        """Return a slice of a tensor by its shared name, as one row."""
        return self.checkpoint.read(self.names.shared[name], box).reshape(-1)

    def specs(self) -> dict[str, Spec]:
        """Return what each shared tensor is."""
        return {shared: self.checkpoint.specs[name] for shared, name in self.names.shared.items()}


def prefix_of(config: Mapping[str, Any]) -> str:
    """Return the prefix of an architecture's encoder, with its dot; nothing where transformers does not know it."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        return ""
    found = MODEL_MAPPING[CONFIG_MAPPING[kind]]
    prefix = (found[0] if isinstance(found, tuple) else found).base_model_prefix
    return f"{prefix}." if prefix else ""


def opened_as(
    checkpoint: Checkpoint, prefix: str, own: Sequence[str], *, merge_heads: bool, base: "Opened | None" = None
) -> "Opened":
    """Tell a checkpoint's tensors apart.

    Args:
        checkpoint: Any of those to be merged.
        prefix: Of the architecture.
        own: Further layers that are each task's own, as in `bert.pooler`.
        merge_heads: Whether heads are merged like all else.
        base: The base, by whose names its tensors are known; none for the base itself.
    """
    bare = not any(name.startswith(prefix) for name in checkpoint.specs)
    owned = tuple(f"{name}." for name in own)
    known = {} if base is None else {canonical(name, prefix): name for name in base.names.shared}
    shared, head = {}, []
    for name in checkpoint.specs:
        full = prefix + name if bare else name
        if full.startswith(owned):
            head.append(name)
        elif merge_heads or full.startswith(prefix):
            shared[known.get(canonical(name, prefix), name)] = name
        else:
            head.append(name)
    return Opened(checkpoint, Names(shared, head, bare), prefix)


def canonical(name: str, prefix: str) -> str:
    """Return the name that a tensor has in a bare encoder of today."""
    name = name.removeprefix(prefix)
    for old, new in _RENAMED.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def require_one_kind(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse models of different architectures.

    Raises:
        MergeError: Two configurations name different ones.
    """
    first, *others = [checkpoint for checkpoint in checkpoints if "model_type" in checkpoint.config] or checkpoints[:1]
    for checkpoint in others:
        kinds = checkpoint.config["model_type"], first.config["model_type"]
        if kinds[0] != kinds[1]:
            raise MergeError(
                f"{checkpoint.label}: is of type {shown(str(kinds[0]))}, {first.label} of {shown(str(kinds[1]))}. "
                f"Merge models of one base."
            )


def require_one_base(base: Opened, models: Sequence[Opened]) -> None:
    """Require that the merged tensors of all models are those of the base.

    An integer tensor that only one side has is no difference: libraries ceased to save position numbers.

    Raises:
        MergeError: They are not.
    """
    expected = base.specs()
    for model in models:
        found = model.specs()
        mine = {name: spec for name, spec in expected.items() if spec.merges or name in found}
        theirs = {name: spec for name, spec in found.items() if spec.merges or name in expected}
        require_alike((base.checkpoint.label, mine), [(model.checkpoint.label, theirs)])


def labels_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a classifier's labels by their numbers, as transformers reads a configuration: two where it is silent."""
    found = config.get("id2label")
    if isinstance(found, dict):
        return {str(number): str(label) for number, label in found.items()}
    count = config.get("num_labels", 2)
    return {str(number): f"LABEL_{number}" for number in range(count if isinstance(count, int) else 2)}


def require_heads(models: Sequence[Opened]) -> None:
    """Require that each model has a head, whose rows are the labels that its configuration names.

    Raises:
        MergeError: It has none, or another number of labels.
    """
    for model in models:
        checkpoint, names = model.checkpoint, model.names
        if not names.head or names.bare:
            raise MergeError(f"{checkpoint.label}: has no head to keep. Leave --heads each out, or give a classifier.")
        count = len(labels_of(checkpoint.config))
        rows = {checkpoint.specs[name].shape[0] for name in names.head if checkpoint.specs[name].shape}
        if count not in rows:
            raise MergeError(
                f"{checkpoint.label}: its configuration names {count} labels, and no tensor of its head "
                f"({', '.join(map(shown, names.head[:3]))}) has as many rows. Correct its config.json."
            )


def require_one_labelling(checkpoints: Sequence[Checkpoint]) -> None:
    """Require that models whose heads are merged mean the same by each row.

    Raises:
        MergeError: They do not.
    """
    first, *others = checkpoints
    for checkpoint in others:
        mine, theirs = labels_of(checkpoint.config), labels_of(first.config)
        if mine != theirs:
            raise MergeError(
                f"{checkpoint.label}: has {len(mine)} labels ({shown(', '.join(mine.values()))}), {first.label} has "
                f"{len(theirs)} ({shown(', '.join(theirs.values()))}). Heads of different labels cannot be merged: use "
                f"--heads base or --heads each."
            )
