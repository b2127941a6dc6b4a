"""Which adapter names are possible, and which tensor names are ours.

An adapter's name becomes a key in torch's containers and a folder on disk.
"""

from peft.tuners._buffer_dict import BufferDict
from torch import nn

from hf_cl.errors import ConfigError

BASE = "__base__"
"""In `adapter_names`, PEFT's name for the bare base."""
_SEPARATORS = "./\\:"
_TAKEN = {BASE, *dir(nn.ModuleDict()), *dir(nn.ParameterDict()), *dir(BufferDict())}
"""Names of the containers' own methods; torch cannot keep a tensor under them."""


def is_ours(name: str) -> bool:
    """Return whether a tensor of a masked model is not the base's: a task's, the store's, or a weight kept aside."""
    return any(part.startswith("hfcl_") or part in ("store", "live_mask", "pretrained") for part in name.split("."))


def require_name(adapter: str) -> None:
    """Refuse an adapter's name that cannot be a key or a folder. Names like `0`, `query` or `dense` are fine.

    Raises:
        ConfigError: Says what is wrong with it.
    """
    found = [character for character in adapter if character in _SEPARATORS or not character.isprintable()]
    if found or adapter != adapter.strip() or not adapter:
        raise ConfigError(
            f"adapter name {adapter!r}: it is part of tensor names and of a folder's, so it has no dots, slashes, "
            f"colons, control characters or outer spaces, and is not empty. Use {_tame(adapter)!r}."
        )
    if adapter in _TAKEN:
        raise ConfigError(f"adapter name {adapter!r}: torch's containers use it themselves. Use {adapter + '_task'!r}.")


def _tame(adapter: str) -> str:
    kept = "".join("_" if c in _SEPARATORS or not c.isprintable() else c for c in adapter).strip() or "task"
    return f"{kept}_task" if kept in _TAKEN else kept
