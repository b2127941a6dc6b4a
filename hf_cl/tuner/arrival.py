"""What arrives at a masked layer from a file: room for it, its checks, and store and owners derived from it.

A file is checked whole before anything of it is loaded (`check_arriving`, which the tuner calls for every
layer first), so a refused adapter leaves the store as it was.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_cl.errors import OwnershipError
from hf_cl.masks.bits import unpack
from hf_cl.ownership.owner import FOREIGN, FREE


def make_room(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading: give each adapter's tensors the sizes that arrive (a finished task has no scores)."""
    layer: Any = module
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        for adapter in list(getattr(layer, name).keys()):
            arriving = state.get(f"{prefix}{name}.{adapter}")
            if arriving is not None:
                layer.arrived.add(adapter)
                _fit(layer, name, adapter, arriving)


def _fit(layer: Any, name: str, adapter: str, arriving: Tensor) -> None:
    held = getattr(layer, name)
    if arriving.shape == held[adapter].shape and not held[adapter].is_meta:
        return
    room = torch.empty(arriving.shape, dtype=held[adapter].dtype, device=layer.base_layer.weight.device)
    is_parameter = name in layer.adapter_layer_names
    held[adapter] = nn.Parameter(room, requires_grad=arriving.numel() > 0) if is_parameter else room


def install_arrived(module: nn.Module, _: Any) -> None:
    """After loading: derive store and owners from what arrived, and compose the active adapter anew."""
    layer: Any = module
    arrived, layer.arrived = sorted(layer.arrived), set()
    finished = [adapter for adapter in arrived if layer.phase(adapter) == "committed"]
    with layer.owners_change() if finished else nullcontext():
        for adapter in finished:
            names = ("hfcl_bits", "hfcl_where", "hfcl_owned", "hfcl_inherited")
            _install(layer, adapter, {name: getattr(layer, name)[adapter] for name in names})
    if arrived:
        layer.compose()


def _install(layer: Any, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    mine, arriving, others, inherited = _derived(layer, adapter, tensors)
    owner, values = layer.store.owner.view(-1), layer.store.values.view(-1)
    values[mine], owner[mine] = arriving, int(layer.configs[adapter].task_index or 0)
    unknown = owner[others] == FREE
    values[others[unknown]] = inherited[unknown]
    owner[others[unknown]] = FOREIGN


def check_arriving(layer: Any, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter's tensors that are not such a task's, or that disagree with the tasks that are loaded.

    Args:
        layer: The masked layer; the adapter is added to it.
        adapter: Its name.
        tensors: Every tensor of `adapter_layer_names` and `other_param_names` by that name.

    Raises:
        OwnershipError: A size is wrong, or the store holds other values: a file of another bank, or a stale one.
    """
    weight = layer.base_layer.weight
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    count, size = layer.count(adapter), weight.numel()
    committed = not tensors["hfcl_scores"].numel()
    expected: dict[str, tuple[int, ...]] = {"hfcl_bits": (-(-size // 8),), "hfcl_threshold": (1,)}
    if committed:
        kept, own = _bits(tensors["hfcl_bits"]), _bits(tensors["hfcl_where"])
        trained = tensors["hfcl_owned"].numel() > 0
        expected |= {"hfcl_values": (0,), "hfcl_where": (-(-kept // 8),), "hfcl_inherited": (kept - own,)}
        expected |= {"hfcl_owned": (own if trained else 0,)}
    else:
        values = tuple(weight.shape) if layer.configs[adapter].joint else (count,)
        expected |= {"hfcl_scores": tuple(weight.shape), "hfcl_values": values, "hfcl_where": (32,)}
    wrong = [f"{name} {sizes[name]} instead of {shape}" for name, shape in expected.items() if sizes[name] != shape]
    if wrong:
        raise OwnershipError(
            f"{layer.path}: adapter {adapter!r} brings {', '.join(wrong)}. It was learned on another base, or its file "
            f"is damaged: load it on the model it was learned on."
        )
    if committed:
        _derived(layer, adapter, {name: tensor.to(weight.device) for name, tensor in tensors.items()})


def _bits(packed: Tensor) -> int:
    return int(unpack(packed, (8 * packed.numel(),)).count_nonzero())


def _derived(layer: Any, adapter: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a finished adapter's own positions and values, and the others it reads with theirs.

    Raises:
        OwnershipError: A value disagrees with the store: the files are of different banks or states.
    """
    index = int(layer.configs[adapter].task_index or 0)
    mask = unpack(tensors["hfcl_bits"], tuple(layer.base_layer.weight.shape))
    where = mask.view(-1).nonzero().squeeze(1)
    own = unpack(tensors["hfcl_where"], (where.shape[0],))
    owner, values = layer.store.owner.view(-1), layer.store.values.view(-1)
    mine, others = where[own], where[~own]
    owned, inherited = tensors["hfcl_owned"], tensors["hfcl_inherited"]
    theirs = ~((owner[mine] == FREE) | (owner[mine] == FOREIGN) | (owner[mine] == index))
    arriving = owned if owned.numel() else layer.store.start(layer.base_weight).view(-1)[mine]
    stale = (owner[mine] != FREE) & (values[mine] != arriving)
    wrong = (owner[others] != FREE) & (values[others] != inherited)
    if bool(theirs.any()) or bool(stale.any()) or bool(wrong.any()):
        raise OwnershipError(
            f"{layer.path}: adapter {adapter!r} (task {index}) disagrees with loaded tasks on "
            f"{int(theirs.sum()) + int(stale.sum()) + int(wrong.sum())} entries. Its file is stale or of another "
            f"bank: load adapters saved together."
        )
    return mine, arriving, others, inherited
