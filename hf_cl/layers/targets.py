"""Which layers of a base are masked, and which a task has to itself.

Masked are the linears of the encoder's attention and feed-forward blocks. A task's own are its head,
which is the first of these that is known: what the user names; what the base did not bring along (the
loading info calls it missing or mismatched); the family's output layers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_cl.errors import BaseModelError, ConfigError
from hf_cl.layers.families import family_of
from hf_cl.layers.linear import is_maskable


def matches(name: str, suffixes: Iterable[str]) -> bool:
    """Return whether a module's name is, or ends at a dot with, one of `suffixes`."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def find_targets(model: nn.Module, suffixes: Iterable[str], head: Iterable[str]) -> list[str]:
    """Return the full names of the linears to mask, in the model's order.

    Raises:
        ConfigError: Nothing matches, a match is no plain linear, or a weight would be masked twice.
    """
    suffixes, head = tuple(suffixes), set(head)
    found = [name for name, _ in model.named_modules() if name not in head and matches(name, suffixes)]
    if not found:
        linears = [name for name, module in model.named_modules() if is_maskable(module)]
        raise ConfigError(
            f"target_modules: {', '.join(suffixes)} match no module of {type(model).__name__}. "
            f"Linears found: {', '.join(linears[:12]) or 'none'}{' ...' if len(linears) > 12 else ''}."
        )
    for name in found:
        module: Any = model.get_submodule(name)
        if not is_maskable(module):
            raise ConfigError(
                f"target_modules: {name} is a {type(module).__name__}; torch.nn.Linear and Conv1D can be masked. "
                f"Leave it out of `target_modules`."
            )
        if not module.weight.is_contiguous():
            raise ConfigError(f"target_modules: {name}.weight is not contiguous. Call .contiguous() on it first.")
    _refuse_tied(model, found)
    return found


def _refuse_tied(model: nn.Module, targets: list[str]) -> None:
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for target in targets:
        names = holders[id(model.get_submodule(target).weight)]
        if len(names) > 1:
            raise ConfigError(
                f"target_modules: {target}.weight is tied, it is also {', '.join(sorted(names))}. A tied "
                f"weight would be counted and claimed twice. Leave it out of `target_modules`, or untie it."
            )


def find_head(model: nn.Module, named: Iterable[str] | None, missing: Iterable[str]) -> list[str]:
    """Return the full names of the layers that are a task's own, the classifier last.

    Args:
        model: A sequence classifier.
        named: What the user names, or None.
        missing: Parameter names that the base's checkpoint did not bring along (loading info).

    Raises:
        ConfigError: A named layer does not exist, or the last one is no linear.
    """
    if named is not None:
        head = list(named)
    elif missing:
        owners = {name.rpartition(".")[0] for name in missing}
        head = [name for name, _ in model.named_modules() if name in owners]
        _require_head_layers(model, head)
    else:
        head = list(family_of(model).head)
    modules = dict(model.named_modules())
    for name in head:
        if name not in modules:
            children = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"head_modules: {name!r} is no module of {type(model).__name__} (it has {children}).")
    if not head or not isinstance(modules[head[-1]], nn.Linear):
        raise ConfigError(
            f"head_modules: {', '.join(head) or 'nothing'} does not end in a linear classifier. "
            f"Name the layers that each task has to itself, the output layer last."
        )
    return head


def _require_head_layers(model: nn.Module, missing: list[str]) -> None:
    others = [name for name in missing if not _fits_head(model.get_submodule(name))]
    if others:
        raise BaseModelError(
            f"{type(model).__name__}: its checkpoint lacks the weights of {', '.join(others)}, which are no linears "
            f"and so no head. Use a checkpoint of this architecture, or name `head_modules` yourself."
        )


def _fits_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_norm(module)


def missing_parameters(info: Mapping[str, Iterable[object]]) -> list[str]:
    """Return the parameter names that `from_pretrained(..., output_loading_info=True)` calls missing or mismatched."""
    mismatched = [key[0] if isinstance(key, tuple | list) else key for key in info.get("mismatched_keys", ())]
    return sorted({str(key) for key in [*info.get("missing_keys", ()), *mismatched]})


def find_norms(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Return the names of the normalisation layers in the blocks that hold masked linears, in the model's order."""
    blocks = {_block(name) for name in targets}
    return [name for name, module in model.named_modules() if is_norm(module) and _block(name) in blocks]


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a layer or root-mean-square norm, torch's or a model's own (`LlamaRMSNorm`)."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def _block(name: str) -> str:
    """Return a name up to its layer number: `bert.encoder.layer.3.output.dense` -> `bert.encoder.layer.3`."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return ""


def refuse_unmaskable(model: nn.Module) -> None:
    """Raise where weights are not plain local tensors.

    Raises:
        BaseModelError: The base is quantised, sharded over devices or processes, or on the meta device.
    """
    name = type(model).__name__
    if getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False):
        raise BaseModelError(
            f"{name} is quantised; masks need its real weights. Load it without `quantization_config`."
        )
    placed = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(placed) > 1:
        raise BaseModelError(f"{name} is spread over {', '.join(sorted(placed))}. Load it without `device_map`.")
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise BaseModelError(f"{name}: {parameter_name} is on the meta device, it has no values. Load the weights.")
        if type(parameter.data).__name__ == "DTensor":
            raise BaseModelError(f"{name}: {parameter_name} is sharded (DTensor). Load it whole on each process.")
