"""Which tensors a task's file, and the one that all share, hold: a method declares them, in its own file, as `STORES`.

A reader refuses a tensor that the task's method does not declare, and a later method brings its own without a new
version of the format. What routers know is collected whatever the method, and so declared here.
"""

from dataclasses import replace

from hf_cl import plugins
from hf_cl.errors import BankError, ConfigError
from hf_cl.routing.nearest_mean import SHARED_TENSORS, TASK_TENSORS
from hf_cl.storage.manifest import TaskEntry
from hf_cl.training.method import Stores

MASKS = ("masks", "mask_lengths")
OWNED = ("owned", "owned_lengths")
HEAD = "head."
PROBE = "probe"


def stores_of(entry: TaskEntry) -> Stores:
    """Return what a task's method stores besides masks, values and head.

    Raises:
        BankError: This version knows no such method, or the method gives no bank.
    """
    name = entry.method["name"]
    if name == "mask_config":
        return _with_routing(Stores())
    try:
        found: Stores | None = getattr(plugins.load("methods", name), "STORES", None)
    except ConfigError as error:
        raise BankError(f"task {entry.name!r}: its method {name!r} is not known here. Upgrade hf_cl.") from error
    if found is None:
        raise BankError(f"task {entry.name!r}: {name} writes no banks. Do not use this one.")
    return _with_routing(found)


def _with_routing(stores: Stores) -> Stores:
    return replace(stores, task=(*stores.task, *TASK_TENSORS), shared=(*stores.shared, *SHARED_TENSORS))
