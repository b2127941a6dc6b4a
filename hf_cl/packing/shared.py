"""What all tasks of a bank share, in one file of its own."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from hf_cl.errors import BankCorruptError, BankError, BaseMismatchError, shown
from hf_cl.packing.opened import OpenedTask
from hf_cl.packing.stores import stores_of
from hf_cl.routing import Gaussians
from hf_cl.routing.nearest_mean import SHARED_TENSORS, Spread
from hf_cl.storage.bank_folder import Reader, tensors_of
from hf_cl.storage.manifest import Manifest


def open_shared(manifest: Manifest, read: Reader, width: int | None = None) -> dict[str, Tensor]:
    """Return the shared tensors, checked; none where there is no such file.

    Args:
        manifest: The bank's.
        read: Gives the bytes of its files.
        width: Numbers that a feature of the base has, where it is known.

    Raises:
        BankCorruptError: The file is not what the manifest says, or holds what no task's method declares.
        BaseMismatchError: What routers know in it is of another width.
    """
    if manifest.shared is None:
        return {}
    tensors = tensors_of(manifest.shared, read(manifest.shared), manifest.shared.name)
    declared = {name for task in manifest.tasks for name in stores_of(task).shared}
    unknown, routing = sorted(set(tensors) - declared), set(SHARED_TENSORS) & set(tensors)
    if unknown:
        raise _corrupt(manifest, f"brings {shown(', '.join(unknown[:3]))}, which no method here shares")
    if routing and len(routing) < len(SHARED_TENSORS):
        raise _corrupt(manifest, f"has {', '.join(sorted(routing))} alone of what routers know")
    if routing:
        try:
            held = Spread.read(tensors).width
        except ValueError as error:
            raise _corrupt(manifest, str(error)) from error
        if width not in (None, held):
            raise BaseMismatchError(
                f"router: what was collected has {held:,} numbers a text, this base gives {width:,}. Load the base "
                f"that the bank was learned on."
            )
    return tensors


def gaussians_of(manifest: Manifest, tasks: Sequence[OpenedTask], shared: Mapping[str, Tensor]) -> Gaussians:
    """Return what was collected of a bank's tasks for routers.

    Args:
        manifest: The bank's.
        tasks: Its tasks, in their order.
        shared: From `open_shared`, with the base's width.

    Raises:
        BankError: It was not collected of some task.
        BankCorruptError: Its parts do not fit each other.
    """
    lacking = [task.entry.name for task in tasks if task.routing is None]
    if lacking or not set(SHARED_TENSORS) <= set(shared):
        raise BankError(
            f"router: nothing was collected for it of {shown(', '.join(lacking) or 'this bank')}. Learn with "
            f"routing above 0, or take the router entropy or superposition, which need nothing."
        )
    spread = Spread.read(shared)
    means, counts = zip(*(task.routing.seen() for task in tasks if task.routing is not None), strict=True)
    for task, part in zip(tasks, means, strict=True):
        if part.shape[1] != spread.width:
            raise task.corrupt(f"its class means have {part.shape[1]:,} numbers, the covariance {spread.width:,}")
    try:
        covariance, typical = spread.covariance()  # d^3: of a width that the base has, and no other
    except ValueError as error:
        raise _corrupt(manifest, str(error)) from error
    return Gaussians(means, counts, covariance, typical)


def _corrupt(manifest: Manifest, what: str) -> BankCorruptError:
    assert manifest.shared is not None
    return BankCorruptError(f"{manifest.shared.name}: {what}. Fetch the bank again.")
