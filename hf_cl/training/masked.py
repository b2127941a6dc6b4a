"""The masked methods' common body: one `PeftModel`, one masked adapter a task.

`supsup`, `exssnet` and `ssnet` differ in what trains and for how long; their files say so, this does it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_cl.errors import RunError
from hf_cl.layers.base import Base
from hf_cl.layers.task_heads import load_exactly
from hf_cl.masks.coding import decode, encode
from hf_cl.ownership.digest import digest
from hf_cl.training.collect import CollectCallback, RouterState
from hf_cl.training.groups import parameter_groups
from hf_cl.training.kkt_start import KKT, start_from
from hf_cl.training.method import Method, Packed, Settled, Tensors
from hf_cl.training.ownership_callback import DENSITY_WARMUP, OwnershipCallback
from hf_cl.tuner import MaskConfig, MaskModel

KKT_MEAN = "kkt.mean"
BEST = "best_of_phase."


def adapter_of(index: int) -> str:
    """Return the adapter that holds task number `index`; no task's name is ever part of a module's name."""
    return f"task{index}"


def join_codes(codes: Sequence[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes as one uint8 tensor, and the bytes of each, int32."""
    joined = torch.frombuffer(bytearray(b"".join(codes)), dtype=torch.uint8)
    return joined, torch.tensor([len(code) for code in codes], dtype=torch.int32)


def digests(tuner: MaskModel, adapter: str) -> dict[str, str]:
    """Return the digests of what a finished task's forward reads: base, masks, values, owners, and head with norms."""
    return {"base": tuner.base_digest()} | task_digests(tuner, adapter)


def task_digests(tuner: MaskModel, adapter: str) -> dict[str, str]:
    """Return the digests of what is the task's own of that: masks, values, owners, and head with norms."""
    found: dict[str, list[tuple[str, torch.Tensor]]] = {"masks": [], "values": [], "owners": [], "head": []}
    for name, tensor in tuner.task_tensors(adapter):
        kind = {"mask": "masks"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
        found[kind if kind in ("masks", "values", "owners") else "head"].append((name, tensor))
    return {part: digest(tensors) for part, tensors in found.items()}


def drop_adapter(model: PeftModel | None, adapter: str) -> PeftModel | None:
    """Return the model without an unfinished adapter, also one that was only half added; None where none is left."""
    if model is None:
        return None
    others = [name for name in model.peft_config if name != adapter]
    if not others:
        model.unload()
        return None
    model.set_adapter(others[0])
    # PEFT forgets the config of an adapter that failed to be added, and leaves LoRA's tensors in the layers.
    model.peft_config.setdefault(adapter, model.peft_config[others[0]])
    model.delete_adapter(adapter)
    return model


class Shelf(Protocol):
    """Finished tasks that lie on disk, and go into the model only while they answer."""

    @property
    def numbers(self) -> Collection[int]:
        """The tasks' numbers."""

    def config(self, index: int) -> MaskConfig:
        """Return a task's config."""

    def occupy(self, tuner: MaskModel) -> None:
        """Make all of them, loaded or not, the owners of their entries."""

    def place(self, tuner: MaskModel, index: int) -> None:
        """Put a task into its added adapter."""


class MaskedMethod(Method):
    """Learns every task as a masked adapter of one model."""

    keeps_best = True
    shelf: Shelf | None = None
    """Where finished tasks are that are not loaded; see `keep_on`."""
    routing: RouterState | None = None
    """What routers know of the tasks, collected while they train; None collects nothing."""

    def __init__(
        self,
        base: Base,
        config: MaskConfig,
        *,
        settled: Settled | None = None,
        mask_share: float = 1.0,
        density_warmup: float = DENSITY_WARMUP,
        rates: Mapping[str, float | None] | None = None,
        kkt: KKT | None = None,
        last_margin: float | None = None,
    ) -> None:
        """Wrap a base.

        Args:
            base: The loaded base.
            config: Every adapter's options; labels and number are filled in a task.
            settled: What an earlier process computed once: targets, head and scales.
            mask_share: Share of a task's steps that train its mask.
            density_warmup: Share of those in which the mask grows to its density.
            rates: Learning rates of `scores`, `values`, `head`; None is the training arguments' own.
            kkt: The start; None begins fresh.
            last_margin: Begin at the mask of the task before, whose scores then stand so far above fresh ones.
        """
        super().__init__(base)
        once = {name: value for name, value in (settled or {}).items() if name in ("target_modules", "scales")}
        self.config = replace(config, head_modules=list(base.head), **once)
        self.config.task_type = "SEQ_CLS"
        self.rates = {role: rate for role, rate in (rates or {}).items() if rate is not None}
        self.mask_share, self.density_warmup, self.kkt = mask_share, density_warmup, kkt
        self.last_margin = last_margin
        if kkt is not None:
            kkt.finished = self
        self._model: PeftModel | None = None
        self._callback: OwnershipCallback | None = None

    @property
    def model(self) -> nn.Module:
        """The `PeftModel`."""
        if self._model is None:
            raise RunError("no task was begun, so there is no masked model yet. Learn or restore a task first.")
        return self._model

    @property
    def tuner(self) -> MaskModel:
        """The masked base below the `PeftModel`."""
        model: Any = self.model
        tuner: MaskModel = model.base_model
        return tuner

    def settled(self) -> Settled:
        """Return targets, head and scales."""
        config = self.tuner.mask_config
        return {
            "target_modules": list(config.target_modules or ()),
            "head_modules": list(config.head_modules or ()),
            "scales": dict(config.scales or {}),
        }

    def begin(self, index: int, labels: tuple[str, ...]) -> None:
        """Add task number `index` as a new adapter."""
        config = replace(self.config, id2label=dict(enumerate(labels)), num_labels=len(labels), task_index=index)
        self._add(index, config)
        source = self.bring(max(self.numbers())) if self._goes_on() else None
        if source is not None:
            start_from(self.tuner, adapter_of(index), source, self.last_margin or 0.0)
        self._model.set_adapter(adapter_of(index))  # type: ignore[union-attr]
        if source is not None:
            self.put_away()

    def _goes_on(self) -> bool:
        """Return whether a new task's mask begins as the last one's: whole at once, so it need not grow."""
        return self.last_margin is not None and bool(self.numbers())

    def _add(self, index: int, config: MaskConfig) -> None:
        adapter = adapter_of(index)
        if self._model is not None:
            self._model.add_adapter(adapter, config)
            return
        self._model = get_peft_model(self.base.model, config, adapter_name=adapter)
        if self.shelf is not None:
            self.shelf.occupy(self.tuner)

    def keep_on(self, shelf: Shelf) -> None:
        """Leave finished tasks on disk from now on: one is loaded at a time, while it answers.

        Args:
            shelf: Has the tasks; those it has are unloaded, all but the active one.
        """
        self.shelf = shelf
        self.put_away()

    def numbers(self) -> set[int]:
        """Return the numbers of all finished tasks, loaded or on disk."""
        loaded = self._model.peft_config if self._model is not None else {}
        done = {int(config.task_index) for name, config in loaded.items() if self.tuner.phase(name) == "committed"}
        return done | set(self.shelf.numbers if self.shelf is not None else ())

    def bring(self, index: int) -> str:
        """Load a finished task that lies on disk, if it does; return its adapter."""
        adapter, loaded = adapter_of(index), self._model is not None and adapter_of(index) in self._model.peft_config
        if not loaded and self.shelf is not None and index in self.shelf.numbers:
            self._add(index, self.shelf.config(index))
            self.shelf.place(self.tuner, index)
        return adapter

    def put_away(self) -> None:
        """Unload all finished tasks that lie on disk but the active one."""
        if self._model is None or self.shelf is None:
            return
        loaded = {adapter_of(index) for index in self.shelf.numbers} & set(self.tuner.peft_config)
        for adapter in loaded - set(self.tuner.active_adapters):
            self.tuner.leave(adapter)

    def abandon(self, index: int) -> None:
        """Delete the unfinished adapter; the model of a first task is unwrapped."""
        if self.routing is not None:
            self.routing.leave_out(index)
        self._model = drop_adapter(self._model, adapter_of(index))

    def groups(self, args: TrainingArguments) -> list[dict[str, Any]]:
        """Return groups of scores, values and head."""
        rates = {role: self.rates.get(role, args.learning_rate) for role in ("scores", "values", "head")}
        return parameter_groups(self.model.named_parameters(), rates, args.weight_decay)

    def callbacks(self) -> list[TrainerCallback]:
        """Return the ownership callback, and the one that collects what routers know where that is wanted."""
        self._callback = OwnershipCallback(
            str(self.tuner.active_adapters[0]),
            mask_share=self.mask_share,
            density_warmup=0.0 if self._goes_on() else self.density_warmup,
            learning_rates=self.rates,
            start=self.kkt,
        )
        return [self._callback, *([CollectCallback(self.routing, self.kkt)] if self.routing is not None else [])]

    def moving(self, index: int) -> Tensors:
        """Return scores, values, head, threshold and bits, the best state so far, and KKT's mean feature."""
        suffix = f".{adapter_of(index)}"
        buffers = {name: tensor for name, tensor in self.model.named_buffers() if name.endswith(suffix)}
        best = self._callback.best if self._callback is not None else {}
        kept = {f"{BEST}{name}": tensor for name, tensor in best.items()}
        return super().moving(index) | buffers | kept | self._start(index)

    def set_moving(self, index: int, tensors: Tensors) -> None:
        """Put them back, and compose the task's weights anew."""
        best = {name: tensor for name, tensor in tensors.items() if name.startswith(BEST)}
        rest = {name: tensor for name, tensor in tensors.items() if name not in best and name != KKT_MEAN}
        self.restore_extra(index, tensors)
        if self._callback is not None:
            self._callback.best = {name.removeprefix(BEST): tensor for name, tensor in best.items()}
        held = {name: tensor for name, tensor in self.moving(index).items() if name not in best and name != KKT_MEAN}
        load_exactly(held, rest, f"task {index}: what was kept of its training")
        for layer in self.tuner.mask_layers():
            layer.compose()

    def resting(self) -> Collection[nn.Parameter]:
        """Return the values in the mask phase, the scores after it; nothing where both train together."""
        if self.config.joint:
            return ()
        adapter, layers = str(self.tuner.active_adapters[0]), self.tuner.mask_layers()
        in_mask_phase = layers[0].live_mask is not None  # asking the threshold would wait for an accelerator
        return [(layer.hfcl_values if in_mask_phase else layer.hfcl_scores)[adapter] for layer in layers]

    def commit(self, index: int) -> None:
        """Do nothing: the callback committed at the end of training."""

    def activate(self, index: int) -> None:
        """Make a finished task's adapter active."""
        adapter = self.bring(index)
        model: Any = self.model
        model.set_adapter(adapter, inference_mode=True)
        self.put_away()

    def parts(self, index: int) -> dict[str, str]:
        """Return digests of base, masks, values, owners, and head with norms."""
        self.bring(index)
        return digests(self.tuner, adapter_of(index))

    def facts(self, index: int) -> dict[str, Any]:
        """Return density, overlap, trainable share, cells claimed (SSNet: trained), capacity, and KKT's choice."""
        adapter = adapter_of(index)
        layers = self.tuner.mask_layers()
        if self.config.trains == "mask":
            cells = sum(int(layer.mask(adapter).count_nonzero()) for layer in layers)
        else:
            cells = sum(int(layer.own(adapter).count_nonzero()) for layer in layers)
        facts: dict[str, Any] = {"trainable": cells, "capacity_used": self.tuner.capacity_used()}
        if self._callback is not None and self._callback.adapter == adapter:
            facts |= {name: self._callback.facts[name] for name in ("density", "overlap", "trainable_share")}
            choice = self._callback.choice
            if choice is not None:
                accuracies = {str(task): round(value, 4) for task, value in choice.accuracies.items()}
                facts["kkt"] = {
                    "source": choice.source, "accuracies": accuracies,
                    "base": round(choice.base, 4), "chance": round(choice.chance, 4),
                }  # fmt: skip
        return facts

    def pack(self, index: int) -> Packed:
        """Return the coded masks with the trained values the task owns, and its head."""
        adapter, layers = adapter_of(index), self.tuner.mask_layers()
        masks = [layer.mask(adapter).cpu().numpy() for layer in layers]
        codes, lengths = join_codes([encode(mask, mask.shape[1]) for mask in masks])
        task = {"masks": codes, "lengths": lengths}
        if self.config.trains != "nothing":
            values = torch.cat([layer.hfcl_owned[adapter] for layer in layers])
            task["values"] = values.to(getattr(torch, self.config.values_dtype)).cpu()
        head = {name: tensor.detach().cpu() for name, tensor in self.tuner.own_tensors(adapter).items()}
        return Packed(task, head | self._start(index))

    def extra(self, index: int) -> dict[str, torch.Tensor]:
        """Return the mean base feature of the task's texts, where KKT has it, and its class means for routers."""
        known = self.routing.means.get(index) if self.routing is not None else None
        return self._start(index) | (known.tensors() if known is not None else {})

    def _start(self, index: int) -> dict[str, torch.Tensor]:
        """Return what a KKT start found; what routers know is found anew, and the same, when a task goes on."""
        return {KKT_MEAN: self.kkt.means[index]} if self.kkt is not None and index in self.kkt.means else {}

    def shared(self) -> dict[str, torch.Tensor]:
        """Return what routers know of all tasks together."""
        return self.routing.tensors() if self.routing is not None else {}

    def restore_shared(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take it back, to be grown."""
        if self.routing is not None:
            self.routing.restore(tensors)

    def restore_extra(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the mean base feature back."""
        if self.kkt is not None and KKT_MEAN in tensors:
            self.kkt.means[index] = tensors[KKT_MEAN]

    def restore(self, index: int, labels: tuple[str, ...], packed: Packed) -> None:
        """Add a finished task from its coded masks, own values and head.

        Raises:
            RunError: The tensors are not those of such a task.
        """
        self.begin(index, labels)
        adapter, layers = adapter_of(index), self.tuner.mask_layers()
        missing = {"masks", "lengths"} - set(packed.task)
        if missing:
            raise RunError(f"task {index}: its file lacks {', '.join(sorted(missing))}. Restore it from a copy.")
        lengths = packed.task["lengths"].tolist()
        if len(lengths) != len(layers) or sum(lengths) != packed.task["masks"].numel() or min(lengths) < 0:
            raise RunError(
                f"task {index}: {len(lengths)} coded masks of {sum(lengths)} bytes for {len(layers)} layers."
            )
        codes, values = packed.task["masks"].numpy().tobytes(), packed.task.get("values")
        at = used = 0
        for layer, length in zip(layers, lengths, strict=True):
            shape = layer.base_layer.weight.shape
            mask = torch.from_numpy(decode(codes[at : at + length], shape.numel(), shape[1])).view(shape)
            at += length
            mine = None
            if values is not None:
                own = int((mask.to(layer.store.owner.device) & (layer.store.owner == -1)).count_nonzero())
                mine = values[used : used + own].float()
                used += own
            layer.install(adapter, mask.to(layer.store.owner.device), mine)
        if values is not None and used != values.numel():
            raise RunError(f"task {index}: {values.numel()} stored values for {used} claimed entries.")
        self._restore_head(adapter, index, packed)

    def _restore_head(self, adapter: str, index: int, packed: Packed) -> None:
        tensors = dict(packed.head)
        self.restore_extra(index, {KKT_MEAN: tensors.pop(KKT_MEAN)} if KKT_MEAN in tensors else {})
        load_exactly(self.tuner.own_tensors(adapter), tensors, f"task {index}: its head")
        self.tuner.finish(adapter)

    def rewritten(self, index: int) -> Sequence[int]:
        """Return all tasks where values are overwritten whoever owns them (SSNet)."""
        return range(index + 1) if self.config.trains == "mask" else (index,)
