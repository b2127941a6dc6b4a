"""What PEFT writes into one adapter's file and reads back: keys without the adapter's name.

A key is `<module path>.<container>.<adapter>[.<parameter>]`; the container begins with `hfcl_`, and what follows
it is the adapter's name, whatever it is. PEFT finds adapters by searching keys for their names, which loses
tensors where a task is called like a part of a path (`query`, `0`): so keys are taken apart here, by place.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_cl.errors import BaseModelError, OwnershipError
from hf_cl.ownership.digest import digest
from hf_cl.tuner.arrival import check_arriving
from hf_cl.tuner.config import MaskConfig
from hf_cl.tuner.layer import MaskLinear
from hf_cl.tuner.own_layer import OwnLayer

PREFIX = "hfcl_"


def adapter_of_key(key: str) -> tuple[str, str] | None:
    """Return a state dict key without its adapter's name, and that name; None for a key of the base."""
    parts = key.split(".")
    places = [place for place, part in enumerate(parts[:-1]) if part.startswith(PREFIX)]
    if not places:
        return None
    place = places[0] + 1
    return ".".join(parts[:place] + parts[place + 1 :]), parts[place]


def keys_for(state: Mapping[str, Tensor], adapter: str) -> dict[str, str]:
    """Return, for each key of the adapter's file, the model's own key."""
    split = {key: adapter_of_key(key) for key in state}
    return {found[0]: key for key, found in split.items() if found is not None and found[1] == adapter}


def check_file(root: nn.Module, tuner: Any, adapter: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's file under the model's own keys, or refuse it before anything of it is loaded.

    Args:
        root: The `PeftModel`, whose keys they are.
        tuner: The `MaskModel` below it, with the adapter added.
        adapter: Its name.
        stored: The file's tensors.

    Raises:
        BaseModelError: The file was learned on another base.
        OwnershipError: A tensor is missing, unexpected, of the wrong size, or disagrees with loaded tasks.
    """
    config: MaskConfig = tuner.peft_config[adapter]
    held = root.state_dict()
    keys = keys_for(held, adapter)
    missing, unexpected = sorted(set(keys) - set(stored)), sorted(set(stored) - set(keys))
    if missing or unexpected:
        raise OwnershipError(
            f"adapter {adapter!r}: its file lacks {len(missing)} tensors ({', '.join(missing[:3]) or 'none'}) and "
            f"brings {len(unexpected)} that have no place ({', '.join(unexpected[:3]) or 'none'}). It was learned on "
            f"another model, with other `target_modules`, or is damaged: load it on the model it was learned on."
        )
    arriving = {keys[name]: tensor for name, tensor in stored.items()}
    cast = [name for name, key in keys.items() if arriving[key].dtype != held[key].dtype]
    if cast:
        raise OwnershipError(
            f"adapter {adapter!r}: {cast[0]} is {arriving[keys[cast[0]]].dtype} in its file and "
            f"{held[keys[cast[0]]].dtype} here. A cast changes what a task has learned: load the file as it was saved."
        )
    for path, layer in root.named_modules():
        if isinstance(layer, MaskLinear):
            names = (*layer.adapter_layer_names, *layer.other_param_names)
            check_arriving(layer, adapter, {name: arriving[f"{path}.{name}.{adapter}"] for name in names})
        elif isinstance(layer, OwnLayer):
            _check_own(layer, adapter, arriving, f"{path}.hfcl_copy.{adapter}.")
    if config.tensors_digest not in (None, file_digest(stored)):
        raise OwnershipError(
            f"adapter {adapter!r}: its tensors are not those its config was saved with. The file is damaged, or of "
            f"another task: load the folder as it was saved."
        )
    if config.base_fingerprint is not None and config.base_fingerprint != tuner.fingerprint():
        raise BaseModelError(
            f"adapter {adapter!r}: was learned on a base with fingerprint {config.base_fingerprint[:12]}, this "
            f"{type(tuner.model).__name__} has {tuner.fingerprint()[:12]}: other weights, another revision or another "
            f"dtype ({next(tuner.model.parameters()).dtype} here). Load the base {config.base_model_name_or_path!r} "
            f"as it was."
        )
    return arriving


def _check_own(layer: OwnLayer, adapter: str, arriving: Mapping[str, Tensor], prefix: str) -> None:
    for name, held in layer.hfcl_copy[adapter].state_dict().items():
        found = arriving[prefix + name]
        if found.shape != held.shape:
            raise OwnershipError(
                f"adapter {adapter!r}: {layer.name}.{name} is {tuple(found.shape)} in its file and "
                f"{tuple(held.shape)} here. Its config and its tensors are of different tasks."
            )


def file_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of an adapter's tensors, by the names they have in its file."""
    return digest(sorted(tensors.items()))


def is_untouched(tuner: Any, adapter: str) -> bool:
    """Return whether an adapter is as it was added, head and norms included: removing it loses nothing."""
    masks = all(_is_first(layer, adapter) for layer in tuner.mask_layers())
    return masks and all(own.is_untouched(adapter) for own in tuner.own_layers())


def _is_first(layer: MaskLinear, adapter: str) -> bool:
    scores = layer.hfcl_scores[adapter]
    return scores.is_meta or (layer.phase(adapter) == "mask" and torch.equal(scores, layer.first_scores(adapter)))
