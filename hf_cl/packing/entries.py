"""What a bank stores of learned tasks: a file's tensors, and the manifest's records."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from hf_cl.errors import BankError
from hf_cl.layers.base import Base, tokenizer_fingerprint
from hf_cl.masks.coding import encode
from hf_cl.masks.values import to_int8
from hf_cl.packing.opened import shapes_of
from hf_cl.packing.stores import HEAD, PROBE, stores_of
from hf_cl.proof import probe_logits
from hf_cl.routing.nearest_mean import TASK_TENSORS
from hf_cl.storage.bank_folder import task_blob
from hf_cl.storage.manifest import BaseEntry, StoreEntry, TaskEntry
from hf_cl.training.masked import MaskedMethod, adapter_of, join_codes
from hf_cl.tuner import MaskLinear, MaskModel


def gives_bank(method: object) -> bool:
    """Return whether a method's tasks can be in a bank: masks, and nothing of an earlier task overwritten."""
    return isinstance(method, MaskedMethod) and method.config.trains != "mask"


def task_entry(method: MaskedMethod, record: Mapping[str, Any], way: Mapping[str, Any]) -> tuple[TaskEntry, bytes]:
    """Return a learned task's record and its file's bytes.

    Args:
        method: Has learned and committed it.
        record: Of the learner: number, name, labels, digests, metrics.
        way: Name and options of the method, plain JSON values.

    Raises:
        BankError: The method stores a tensor that it does not declare.
    """
    index = int(record["index"])
    config = method.tuner.peft_config[adapter_of(index)]
    groups = _tensors(method, index)
    file, data = task_blob(f"task-{index:05d}", {name: t for group in groups.values() for name, t in group.items()})
    metrics = record["metrics"].get(record["name"], {})
    entry = TaskEntry(
        index=index,
        name=record["name"],
        labels=list(record["labels"]),
        problem_type=config.problem,
        density=float(config.density),
        values_dtype=config.values_dtype,
        trains=config.trains,
        head_of=config.head_of,
        inherits=_inherits(method, index),
        parts=dict(record["parts"]),
        probe=record["probe"],
        environment=environment(),
        source=record["source"],
        method=dict(way),
        start=record["facts"].get("kkt"),
        metrics={name: value for name, value in metrics.items() if isinstance(value, int | float)},
        sizes={name: sum(tensor.nbytes for tensor in group.values()) for name, group in groups.items()},
        file=file,
    )
    undeclared = {*groups["extra"], *groups["routing"]} - set(stores_of(entry).task)
    if undeclared:
        raise BankError(f"{way['name']}: stores {', '.join(sorted(undeclared))}, which its STORES does not declare.")
    return entry, data


def _tensors(method: MaskedMethod, index: int) -> dict[str, dict[str, Tensor]]:
    """Return a task's tensors: masks (with what it owns of them), values, head, probe, routing, its method's own."""
    adapter, layers = adapter_of(index), method.tuner.mask_layers()
    masks, values = {}, {}
    coded = [encode(mask, mask.shape[1]) for mask in (layer.mask(adapter).cpu().numpy() for layer in layers)]
    masks["masks"], masks["mask_lengths"] = join_codes(coded)
    config = method.tuner.peft_config[adapter]
    if config.trains != "nothing":
        owned = [encode(layer.own(adapter).cpu().numpy()) for layer in layers]
        masks["owned"], masks["owned_lengths"] = join_codes(owned)
        values = coded_values([_values(layer, adapter) for layer in layers], config.values_dtype)
    head = {f"{HEAD}{name}": tensor for name, tensor in method.tuner.own_tensors(adapter).items()}
    method.activate(index)
    probe = {PROBE: probe_logits(method.model)}
    extra = method.extra(index)
    routing = {name: extra.pop(name) for name in TASK_TENSORS if name in extra}
    return {"masks": masks, "values": values, "head": head, "probe": probe, "routing": routing, "extra": extra}


def coded_values(layers: list[tuple[Tensor, Tensor, int]], dtype: str) -> dict[str, Tensor]:
    """Return values as stored: (values, their flat positions, entries a row) a layer, joined."""
    if dtype != "int8":
        return {"values": torch.cat([values for values, _, _ in layers]).to(getattr(torch, dtype))}
    coded = [to_int8(*layer) for layer in layers]
    return {
        "values": torch.cat([whole for whole, _ in coded]),
        "value_scales": torch.cat([scales for _, scales in coded]),
    }


def _values(layer: MaskLinear, adapter: str) -> tuple[Tensor, Tensor, int]:
    mask = layer.mask(adapter).cpu()
    where = mask.view(-1).nonzero().squeeze(1)[layer.own(adapter).cpu()]
    values = layer.hfcl_owned[adapter].cpu()
    return values, where[: values.shape[0]], mask.shape[1]


def _inherits(method: MaskedMethod, index: int) -> list[int]:
    """Return the numbers of the tasks whose trained values a task reads."""
    adapter, found = adapter_of(index), set()
    for layer in method.tuner.mask_layers():
        found |= set(layer.store.owner[layer.mask(adapter)].unique().tolist())
    return sorted((found - {index}) & method.tuner.trained_numbers())


def store_entry(tuner: MaskModel) -> StoreEntry:
    """Return what is fixed for the bank's life."""
    config, layers = tuner.mask_config, tuner.mask_layers()
    assert config.scale is not None  # settled with the first adapter
    return StoreEntry(
        compose=config.compose,
        seed=config.seed,
        scale=float(config.scale),
        layers=[layer.path for layer in layers],
        scales=dict(config.scales or {}),
        shapes=shapes_of(layers),
        targets=sorted(config.target_modules or ()),
        exclude=sorted(config.exclude_modules or ()),
        head=list(config.head_modules or ()),
        train_norms=config.train_norms,
    )


def base_entry(base: Base, fingerprint: str, base_id: str | None) -> BaseEntry:
    """Return what a bank says of its base; of a local folder, nothing that is a path."""
    name = base_id or base.name
    return BaseEntry(
        id=None if Path(name).is_absolute() else name,
        revision=getattr(base.model.config, "_commit_hash", None),
        dtype=str(next(base.model.parameters()).dtype).removeprefix("torch."),
        fingerprint=fingerprint,
        tokenizer=tokenizer_fingerprint(base.tokenizer),
    )


def environment() -> dict[str, str]:
    """Return the versions and the machine that probe logits were taken with."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return {**versions, "python": platform.python_version(), "machine": platform.machine()}
