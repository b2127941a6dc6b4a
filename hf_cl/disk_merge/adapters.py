"""Merge LoRA adapters on disk into one, exactly; heads saved beside them are dropped or kept a task.

Source: the adapter format of PEFT 0.21.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_cl.checkpoints.reader import Checkpoint, open_checkpoint
from hf_cl.checkpoints.writer import ShardWriter, size
from hf_cl.disk_merge.card import record, write_card
from hf_cl.disk_merge.fetch import fetch
from hf_cl.disk_merge.place import require_apart
from hf_cl.disk_merge.sources import copied
from hf_cl.errors import MergeError, shown
from hf_cl.merging._check import Spec, require_finite
from hf_cl.merging.lora_arithmetic import Options, coefficients, concatenated, is_lora, merged_specs
from hf_cl.storage.disk import json_bytes, require_room
from hf_cl.storage.new_folder import new_folder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda")
"""Ways of starting a LoRA that also change the weights of the base under it."""
_NOT_ONE_FACTOR = (
    "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "alora_invocation_tokens"
)  # fmt: skip


def merge_adapters(
    base: str | Path | None, adapters: Sequence[str | Path], out: Path, *, options: Options, heads: str
) -> Path:
    """Merge adapter folders into a new one; see `hf_cl.disk_merge.merge.merge_checkpoints`.

    Raises:
        ConfigError: A coefficient is not finite, or there is no adapter.
        MergeError: An adapter is no plain LoRA, or they are not of one base.
        OSError: The disk is full or refuses; nothing is left.
    """
    sources = [fetch(adapter) for adapter in adapters]
    require_apart(out, sources)
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(open_checkpoint(source.name, source.folder, weights=WEIGHTS, config=CONFIG))
            for source in sources
        ]
        scalings = [_scaling(adapter) for adapter in opened]
        factors = coefficients(options, scalings, len(opened))
        _require_one_base(opened, base)
        specs = merged_specs([(adapter.label, _lora(adapter)) for adapter in opened])
        require_room(out, sum(map(size, specs.values())) * (len(opened) if heads == "each" else 1), MergeError)
        found = record("lora_arithmetic", vars(options), None, sources, heads)
        with new_folder(out) as scratch:
            if heads == "base":
                _write(scratch, opened, specs, factors, None)
                write_card(scratch, found, library="peft", base=_base_name(opened[0]))
                return out
            folders = [f"task-{number}" for number in range(len(opened))]
            for adapter, name in zip(opened, folders, strict=True):
                (scratch / name).mkdir()
                _write(scratch / name, opened, specs, factors, adapter)
                write_card(scratch / name, found, library="peft", folders=folders, base=_base_name(adapter))
            write_card(scratch, found, library="peft", folders=folders, base=_base_name(opened[0]))
    return out


def _lora(adapter: Checkpoint) -> dict[str, Spec]:
    return {name: spec for name, spec in adapter.specs.items() if name not in _heads(adapter)}


def _heads(adapter: Checkpoint) -> list[str]:
    """Return the tensors of modules that were saved whole beside the LoRA: heads."""
    saved = adapter.config.get("modules_to_save") or ()
    return [name for name in adapter.specs if not is_lora(name) and set(name.split(".")) & set(saved)]


def _scaling(adapter: Checkpoint) -> float:
    """Return what an adapter's B A is multiplied by.

    Raises:
        MergeError: It is no LoRA that one factor describes.
    """
    config, label = adapter.config, adapter.label
    if config.get("peft_type") != "LORA":
        raise MergeError(
            f"{label}: is a PEFT adapter of type {shown(str(config.get('peft_type')))}. Only LORA can be concatenated."
        )
    odd = [name for name in _NOT_ONE_FACTOR if config.get(name)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE) else []
    if odd:
        raise MergeError(
            f"{label}: {CONFIG} has {odd[0]}={config[odd[0]]!r}, with which its update is not one factor times B A on "
            f"the plain base. Merge it into its base first, and merge the checkpoints."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise MergeError(f"{label}: {CONFIG} has r={rank!r} and lora_alpha={alpha!r}. Fetch or save it again.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _require_one_base(adapters: Sequence[Checkpoint], base: str | Path | None) -> None:
    first, *others = adapters
    for adapter in others:
        if _base_name(adapter) != _base_name(first):
            raise MergeError(
                f"{adapter.label}: is an adapter of {shown(str(_base_name(adapter)))}, {first.label} of "
                f"{shown(str(_base_name(first)))}. Merge adapters of one base."
            )
    held = _base_name(first)
    # A folder may hold what an id names; two ids are two bases.
    if base is not None and held not in (None, str(base)) and not any(Path(name).is_dir() for name in (base, held)):
        raise MergeError(f"{first.label}: is an adapter of {shown(held)}, not of {base}. Give that as the base.")


def _base_name(adapter: Checkpoint) -> str | None:
    found = adapter.config.get("base_model_name_or_path")
    return None if found is None else str(found)


def _write(
    folder: Path,
    adapters: Sequence[Checkpoint],
    specs: Mapping[str, Spec],
    factors: Sequence[float],
    head_of: Checkpoint | None,
) -> None:
    """Write an adapter folder, with the head of one adapter or none."""
    heads = {} if head_of is None else {name: head_of.specs[name] for name in _heads(head_of)}
    # PEFT reads one file.
    with ShardWriter(folder, {**specs, **heads}, name="adapter_model", most=1 << 62) as writer:
        for name in specs:
            parts = [adapter.read(name) for adapter in adapters]
            for adapter, part in zip(adapters, parts, strict=True):
                require_finite(adapter.label, name, part)
            writer.write(name, 0, concatenated(name, parts, factors))
        for name, start, values in copied(head_of, list(heads)) if head_of is not None else ():
            writer.write(name, start, values)
    (folder / CONFIG).write_bytes(json_bytes(_config(head_of or adapters[0], adapters, keep_head=head_of is not None)))


def _config(like: Checkpoint, adapters: Sequence[Checkpoint], *, keep_head: bool) -> dict[str, Any]:
    rank = sum(adapter.config["r"] for adapter in adapters)
    changed = {"r": rank, "lora_alpha": rank, "use_rslora": False, "inference_mode": True, "init_lora_weights": True}
    # PEFT takes an adapter of a task for one that brings the task's head.
    return {**like.config, **changed, **({} if keep_head else {"modules_to_save": None, "task_type": None})}
