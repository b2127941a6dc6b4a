"""`MaskModel`: the base with masked linears and own heads, as a PEFT tuner, and what can be done to a task.

Everything here names a task by its adapter. The model adds up what its layers know: refreshing masks,
the claim, the commit, capacity, digests.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from torch import Tensor, nn

from hf_cl.errors import ConfigError, HfClError, OwnershipError
from hf_cl.layers.families import family_of
from hf_cl.layers.heads import follow_labels
from hf_cl.layers.targets import find_head, find_norms, find_targets, matches, refuse_unmaskable
from hf_cl.masks.bits import pack
from hf_cl.masks.overlap import overlap_share
from hf_cl.masks.select import refresh_masks
from hf_cl.ownership.digest import digest
from hf_cl.ownership.owner import FREE
from hf_cl.tuner.adapter_file import adapter_of_key, check_file, file_digest, is_untouched, tensors_of
from hf_cl.tuner.arrival import make_room
from hf_cl.tuner.config import MaskConfig
from hf_cl.tuner.layer import MaskLinear
from hf_cl.tuner.mixed import run_mixed
from hf_cl.tuner.names import BASE, require_name
from hf_cl.tuner.own_layer import OwnLayer

FIXED = ("seed", "scale", "compose", "target_modules", "exclude_modules", "head_modules", "train_norms")
"""What the first adapter fixes for all: the store and the layers around it."""


class MaskModel(BaseTuner):
    """A base wrapped by masked adapters; made by `get_peft_model(base, MaskConfig(...))`."""

    prefix = "hfcl_"
    tuner_layer_cls = (MaskLinear, OwnLayer)
    target_module_mapping: Mapping[str, list[str]] = {}
    # Adapters of one bank read one store: transformers' own adapter loading would drop it without a word.
    uses_shared_state = True

    _next_index = 0
    """The number of the next task; a dropped task's number is not used again."""
    _layers: list[MaskLinear] | None = None
    """The masked linears, found once: walking all modules at each step costs more than its arithmetic."""
    _owns: list[OwnLayer] | None = None
    _base_labels: tuple[tuple[str, ...], str | None] = ((), None)
    """Labels and kind of loss of the base's own head, for when no task answers."""
    _fingerprint: str | None = None
    _was_trainable: Sequence[nn.Parameter] = ()
    """What of the base required gradients before it was wrapped."""
    _before: tuple[str | None, int] = (None, 0)
    """The adapter that was added last, and the next number before it."""

    # --- injection --------------------------------------------------------------------------------

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the layers, whole or not at all.

        Raises:
            ConfigError: The name cannot be one, or another PEFT method has wrapped the model.
        """
        require_name(adapter_name)
        tuned = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
        others = {type(module).__name__ for module in tuned if not isinstance(module, self.tuner_layer_cls)}
        if others:
            raise ConfigError(
                f"{type(model).__name__} is wrapped by another PEFT method already ({', '.join(sorted(others))}). Call "
                f"merge_and_unload() or unload() on that first, and wrap what it returns."
            )
        if not self._tuner_layers():
            self._was_trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._before = (adapter_name, self._next_index)
        kept = [(p, p.requires_grad) for layer in self._tuner_layers() for p in layer.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self._take_back(adapter_name)
            raise
        # PEFT keeps gradients as they were by searching names for the adapter's, and finds it in paths too.
        for parameter, requires_grad in kept:
            parameter.requires_grad_(requires_grad)

    def _take_back(self, adapter: str) -> None:
        """Remove what a failed addition left in the layers; unwrap the base where it was the first."""
        self._layers = self._owns = None
        self.peft_config.pop(adapter, None)
        for layer in self._tuner_layers():
            layer.delete_adapter(adapter)
        if self._before[0] == adapter:
            self._next_index = self._before[1]
        if not self.peft_config and self._tuner_layers():
            self.unload()
            for parameter in self._was_trainable:
                parameter.requires_grad_(True)

    def _prepare_adapter_config(self, peft_config: MaskConfig, model_config: dict[str, Any]) -> MaskConfig:
        return peft_config

    def _check_new_adapter_config(self, config: MaskConfig) -> None:
        super()._check_new_adapter_config(config)
        others = [other for other in self.peft_config.values() if other is not config]
        for name in FIXED if others else ():
            given, fixed = getattr(config, name), getattr(others[0], name)
            if name == "target_modules" and given is not None and self._same_targets(given):
                continue
            if given is not None and given != fixed:
                raise ConfigError(f"{name}: this model's first adapter fixed {fixed!r}, found {given!r}. Use that.")
        self._check_head(config, others)
        for other in others:
            if config.task_index is not None and config.task_index == other.task_index:
                raise ConfigError(f"task_index: {config.task_index} is taken by another adapter of this model.")

    def _same_targets(self, given: list[str] | str) -> bool:
        """Return whether suffixes name the very linears that are masked, however they are written."""
        suffixes = [given] if isinstance(given, str) else list(given)
        names = {*self._targets, *self._excluded}
        named = {name for name in names if matches(name, suffixes)}
        return named == names and all(any(matches(name, [suffix]) for name in names) for suffix in suffixes)

    def _check_head(self, config: MaskConfig, others: list[MaskConfig]) -> None:
        """Refuse a shared head that is not there to be shared.

        Raises:
            ConfigError: No finished task has these labels and this kind of loss.
        """
        if config.head != "shared" or config.head_of is not None or not others:
            return
        source = min(others, key=lambda other: int(other.task_index or 0))
        if (source.labels, source.problem) != (config.labels, config.problem):
            raise ConfigError(
                f"head: shared, but task {source.task_index} has the labels {', '.join(source.labels):.120} and this "
                f"one {', '.join(config.labels):.120}. Give it the same labels in the same order, or a head of its own."
            )
        if self.phase(self._named(source)) != "committed":
            raise ConfigError(
                f"head: shared, but the head of task {source.task_index} still trains, so this task would change with "
                f"it. Finish that task first."
            )

    def _named(self, config: MaskConfig) -> str:
        return next(name for name, other in self.peft_config.items() if other is config)

    def _prepare_model(self, peft_config: MaskConfig, model: Any) -> None:
        """Settle targets, head and number before anything is replaced; the first adapter settles them for all."""
        others = [other for other in self.peft_config.values() if other is not peft_config]
        if others:
            for name in (*FIXED, "scales"):
                setattr(peft_config, name, getattr(others[0], name))
        else:
            refuse_unmaskable(model)
            self._settle(peft_config, model)
            self._base_labels = (tuple(model.config.id2label.values()), model.config.problem_type)
        if peft_config.task_index is None:
            peft_config.task_index = self._next_index
        self._next_index = max(self._next_index, peft_config.task_index + 1)
        if peft_config.num_labels is None:
            peft_config.num_labels = len(self._base_labels[0])
        if peft_config.head == "shared" and others and peft_config.head_of is None:
            peft_config.head_of = min(int(other.task_index or 0) for other in others)
        # BERT-shaped models take **kwargs and ignore num_items_in_batch, so the Trainer would scale gradients
        # by processes x accumulation (measured: 2x and 4x). Our loss is a mean over the batch.
        model.accepts_loss_kwargs = False

    def _settle(self, config: MaskConfig, model: nn.Module) -> None:
        config.head_modules = find_head(model, config.head_modules, config.missing_modules or ())
        wanted = config.target_modules
        suffixes = list(family_of(model).targets) if wanted is None else [wanted] if isinstance(wanted, str) else wanted
        # Kept as suffixes: PEFT rewrites a list of twenty or more names. What they match is settled here.
        config.target_modules = list(suffixes)
        left_out = set(config.exclude_modules or ())
        targets = find_targets(model, suffixes, config.head_modules)
        self._excluded = {name for name in targets if matches(name, left_out)}
        self._targets = [name for name in targets if name not in self._excluded]
        unknown = [name for name in left_out if not any(matches(target, [name]) for target in targets)]
        if unknown or not self._targets:
            raise ConfigError(
                f"exclude_modules: {', '.join(unknown) or 'it'} leaves out {'nothing' if unknown else 'all targets'}. "
                f"Targets are {', '.join(targets[:12])}{' ...' if len(targets) > 12 else ''}."
            )
        self._norms = find_norms(model, self._targets) if config.train_norms else []

    def _check_target_module_exists(self, peft_config: MaskConfig, key: str) -> Any:
        if key in self._excluded:
            return _ExcludedModule()
        return key in self._targets or key in (peft_config.head_modules or ()) or key in self._norms

    def _create_and_replace(
        self,
        peft_config: MaskConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        head = list(peft_config.head_modules or ())
        if current_key in head or current_key in self._norms:
            is_norm = current_key in self._norms
            layer = target if isinstance(target, OwnLayer) else OwnLayer(target, current_key, is_norm=is_norm)
            std = float(getattr(self.model.config, "initializer_range", 0.02))
            layer.add(
                adapter_name, peft_config, std, is_output=current_key == head[-1], head_of=self._head_of(peft_config)
            )
        else:
            layer = (
                target if isinstance(target, MaskLinear) else MaskLinear(target, self._path(current_key), peft_config)
            )
            layer.add(adapter_name, peft_config)
            peft_config.scales = {**(peft_config.scales or {}), layer.path: layer.store.scale}
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
            self._layers = self._owns = None

    def _head_of(self, config: MaskConfig) -> str | None:
        """Return the loaded adapter whose head a task shares."""
        indexes = {other.task_index: name for name, other in self.peft_config.items() if other is not config}
        return None if config.head_of is None else indexes.get(config.head_of)

    def _path(self, key: str) -> str:
        """Return a module's name below `base_model_prefix`, the same for every class of one family."""
        return key.removeprefix(f"{self.model.base_model_prefix}.")

    # --- one adapter's file -----------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: MaskConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return the adapter's tensors; PEFT's own choice by name is not used, it drops keys of other names."""
        tuner: MaskModel = getattr(model, "base_model", model)
        tensors = tensors_of(model.state_dict(), adapter_name)
        config.base_fingerprint = tuner.fingerprint()
        config.tensors_digest = file_digest(
            {cls._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in tensors.items()}
        )
        config.__dict__.update(saved_as=adapter_name)
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        found = adapter_of_key(key)
        return key if found is None else found[0]

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: MaskConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return a file's tensors under the model's keys, checked; a refused adapter is taken out again."""
        tuner: MaskModel = getattr(model, "base_model", model)
        try:
            arriving = check_file(model, tuner, adapter_name, state_dict)
        except HfClError:
            read = config.from_file or config.base_fingerprint is not None
            if config.from_load or (read and is_untouched(tuner, adapter_name)):
                tuner._take_back(adapter_name)
            raise
        config.tensors_digest = None
        config.__dict__.update(from_load=False, from_file=False)
        for path, layer in model.named_modules():
            if isinstance(layer, MaskLinear):
                make_room(layer, arriving, f"{path}.")
        return arriving

    def fingerprint(self) -> str:
        """Return the base's digest, computed once: nothing here ever writes to the base."""
        if self._fingerprint is None:
            self._fingerprint = self.base_digest()
        return self._fingerprint

    # --- the active task --------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active: its weights, its head, its labels."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise OwnershipError(f"adapters {', '.join(adapter_name)} cannot be active together. Name one.")
        for name in self.peft_config:
            # Also those that were loaded: whether a task is finished is read off its masks.
            if self.mask_layers() and name in self.mask_layers()[0].configs and self.phase(name) == "committed":
                self.finish(name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._follow_labels()

    def _follow_labels(self, *, enabled: bool = True) -> None:
        """Show the labels of the task that answers: the merged one, the active one, or the base's own."""
        merged = self.mask_layers()[0].merged_adapters if self.mask_layers() else []
        names = [name for name in (merged or self.active_adapters) if name in self.peft_config] if enabled else []
        if names:
            config = self.peft_config[names[0]]
            follow_labels(self.model, config.labels, config.problem)
        else:
            follow_labels(self.model, *self._base_labels)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """Turn all tasks on or off; the labels are then the active task's or the base's."""
        super()._enable_adapter_layers(enabled)
        self._follow_labels(enabled=enabled)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put one task's weights in the base's place; `unmerge_adapter` gives the base's very bits back."""
        self.fingerprint()  # of the base as it is now
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        if safe_merge and len(names) == 1 and names[0] in self.peft_config:
            self._require_finite(names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        self._follow_labels()

    def _require_finite(self, adapters: list[str]) -> None:
        """Refuse to merge a task whose weights are not finite, before any layer is merged.

        Raises:
            ConfigError: Names the layer.
        """
        for adapter in adapters:
            for layer in self.mask_layers():
                with layer.answering(adapter):
                    weights: dict[str, Tensor] = {layer.path: layer.store.weight.clone()}
                self._refuse_infinite(adapter, weights)
            self._refuse_infinite(adapter, self.own_tensors(adapter))

    @staticmethod
    def _refuse_infinite(adapter: str, tensors: Mapping[str, Tensor]) -> None:
        bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if bad:
            raise ConfigError(f"{bad[0]}: adapter {adapter!r} has values that are not finite. It is not merged.")

    def unmerge_adapter(self) -> None:
        """Take a merged task out of the base again."""
        super().unmerge_adapter()
        self._follow_labels()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """Return the plain model: the base as it was, or with one task's weights, head and labels.

        Raises:
            ConfigError: None or several tasks are to be merged.
        """
        for layer in self._tuner_layers():
            layer.unmerge()
        names = self.active_adapters if adapter_names is None else adapter_names
        if merge and (len(names) != 1 or names[0] not in self.peft_config):
            raise ConfigError(
                f"merge_and_unload: one task can be merged, found {', '.join(names) or 'none'}; there are "
                f"{', '.join(self.peft_config)}. Name one as adapter_names=[...]."
            )
        if merge and safe_merge:
            self._require_finite(names)
        labels = (self.peft_config[names[0]].labels, self.peft_config[names[0]].problem) if merge else self._base_labels
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=list(names) if merge else None
        )
        follow_labels(model, *labels)
        return model

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskModel":
        """Refuse a cast before anything of the model is cast."""
        for layer in self.mask_layers():
            layer.store.refuse_cast(fn)
        return super()._apply(fn, recurse)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop a task; the one that is active then shows its own labels."""
        super().delete_adapter(adapter_name)
        self._follow_labels()

    @contextmanager
    def answering(self, adapter: str | None) -> Iterator[None]:
        """Let another task, or the bare base, answer inside the context; what trains and who is active stays."""
        with ExitStack() as stack:
            for layer in self._tuner_layers():
                stack.enter_context(layer.answering(adapter))
            yield

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Answer a batch whose rows belong to several tasks: `adapter_names`, one a row, or `__base__`.

        Raises:
            ConfigError: The model trains or is merged, or a name is unknown.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        unknown = sorted(set(names) - {BASE, *self.peft_config})
        if unknown:
            raise ConfigError(f"adapter_names: {', '.join(unknown)} is none of {BASE}, {', '.join(self.peft_config)}.")
        if self.training or self.mask_layers()[0].merged:
            raise ConfigError("adapter_names: a mixed batch is for inference, unmerged. Call model.eval() first.")
        # On the base itself: a PeftModel without a task type calls it past this tuner.
        own: dict[str, Any] = self.model.__dict__
        held = own.get("forward")

        def restore() -> None:
            own.pop("forward", None)
            if held is not None:
                self.model.forward = held

        def mixed(*inputs: Any, **named: Any) -> Any:
            restore()
            return run_mixed(self, list(names), inputs, named)

        self.model.forward = mixed
        try:
            yield
        finally:
            restore()

    def _tuner_layers(self) -> list[MaskLinear | OwnLayer]:
        return [*self.mask_layers(), *self.own_layers()]

    def mask_layers(self) -> list[MaskLinear]:
        """Return the masked linears in the model's order."""
        if self._layers is None:
            self._layers = [module for module in self.model.modules() if isinstance(module, MaskLinear)]
        return self._layers

    def own_layers(self) -> list[OwnLayer]:
        """Return the layers that tasks have to themselves, in the model's order."""
        if self._owns is None:
            self._owns = [module for module in self.model.modules() if isinstance(module, OwnLayer)]
        return self._owns

    def refresh_masks(self, adapter: str) -> int:
        """Bring the active adapter's masks up to date with its scores; return how many thresholds were renewed.

        Call it between steps, never inside a forward: gradient checkpointing computes a forward twice.
        """
        layers = self.mask_layers()
        thresholds = torch.cat([layer.hfcl_threshold[adapter] for layer in layers])
        masks = [layer.live_mask for layer in layers if layer.live_mask is not None]
        renewed = refresh_masks(
            [layer.ranked(adapter) for layer in layers],
            masks,
            thresholds,
            [layer.budget(adapter) for layer in layers],
        )
        for layer, mask, threshold in zip(layers, masks, thresholds, strict=True):
            layer.hfcl_threshold[adapter].copy_(threshold)
            layer.store.show(layer.base_layer.weight, mask)
        return renewed

    def phase(self, adapter: str) -> str:
        """Return the adapter's phase: mask, weight or committed."""
        return self.mask_layers()[0].phase(adapter)

    def begin_weight_phase(self, adapter: str) -> int:
        """Fix the adapter's masks and open the values they may train; return how many those are."""
        return sum(layer.begin_weight_phase(adapter) for layer in self.mask_layers())

    def commit(self, adapter: str) -> None:
        """Finish a task: claim, round, freeze. With `trains="mask"` earlier tasks' values follow the store."""
        for layer in self.mask_layers():
            layer.commit(adapter)
            if self.peft_config[adapter].trains == "mask":
                layer.save_all()
        self.finish(adapter)

    def finish(self, adapter: str) -> None:
        """Freeze a finished task's own layers for good."""
        for layer in self.own_layers():
            layer.finish(adapter)

    # --- what is known of a task --------------------------------------------------------------------

    def require_free(self, adapter: str) -> None:
        """Refuse a task whose method trains values where no layer has a free entry.

        Raises:
            OwnershipError: Every entry of every layer is owned.
        """
        if self.peft_config[adapter].trains == "claimed" and not any(
            bool((layer.store.owner == FREE).any()) for layer in self.mask_layers()
        ):
            owners = {int(owner) for layer in self.mask_layers() for owner in layer.store.owner.unique()}
            raise OwnershipError(
                f"adapter {adapter!r}: its method trains values, and no layer has a free entry left; they are owned by "
                f"tasks {', '.join(map(str, sorted(owners)))}. Use `supsup`, which only reuses, or start a new bank "
                f"with a lower `density`."
            )

    def capacity_used(self) -> float:
        """Return the share of all masked entries that some task owns."""
        layers = self.mask_layers()
        owned = sum(int((layer.store.owner != FREE).count_nonzero()) for layer in layers)
        return owned / sum(layer.store.owner.numel() for layer in layers)

    def facts(self, adapter: str) -> dict[str, float]:
        """Return density, overlap with earlier tasks, trainable share and capacity left, as shares."""
        kept = size = shared = free = trains = 0
        trains_mask = self.peft_config[adapter].trains == "mask"
        index = self.peft_config[adapter].task_index
        for layer in self.mask_layers():
            mask, owner = layer.mask(adapter), layer.store.owner
            count = int(mask.count_nonzero())
            earlier = (owner != FREE) & (owner != index)
            overlap = round(overlap_share(mask, earlier) * count)
            kept, size, shared = kept + count, size + owner.numel(), shared + overlap
            free += int((owner == FREE).count_nonzero())
            trains += count if trains_mask else count - overlap
        return {
            "density": kept / size,
            "overlap": shared / max(1, kept),
            "trainable_share": trains / max(1, kept),
            "capacity_left": free / size,
        }

    def own_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return the task's head and norms by layer and parameter name."""
        return {
            f"{layer.name}.{name}": tensor
            for layer in self.own_layers()
            for name, tensor in layer.hfcl_copy[adapter].state_dict().items()
        }

    def base_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield, by their names in the plain base and sorted, all base tensors a forward reads but the head's."""
        head = tuple(f"{name}." for name in self.mask_config.head_modules or ())
        found = {}
        # While a task is merged, the base's own weights stand beside it.
        kept = {id(layer.base_layer.weight): layer.base_weight for layer in self.mask_layers()}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            parts = name.split(".")
            plain = ".".join(part for part in parts if part != "base_layer")
            ours = any(part.startswith("hfcl_") or part in ("store", "live_mask", "pretrained") for part in parts)
            if not ours and not plain.startswith(head):
                found[plain] = kept.get(id(tensor), tensor)
        yield from ((name, found[name]) for name in sorted(found))

    @property
    def mask_config(self) -> MaskConfig:
        """The config of the first adapter: what is fixed for all."""
        return next(iter(self.peft_config.values()))

    def task_tensors(self, adapter: str) -> Iterator[tuple[str, Tensor]]:
        """Yield all a finished task's forward reads besides the base: masks, values with owners, head, norms."""
        for layer in self.mask_layers():
            mask = layer.mask(adapter)
            yield f"{layer.path}.mask", pack(mask)
            yield f"{layer.path}.values", layer.store.values[mask]
            yield f"{layer.path}.owners", layer.store.owner[mask]
        yield from sorted(self.own_tensors(adapter).items())

    def base_digest(self) -> str:
        """Return the base's fingerprint, computed from the wrapped model's own tensors."""
        return digest(self.base_tensors())

    def owned_digest(self, before: int) -> str:
        """Return the sha256 over what tasks numbered below `before` own, their heads and norms, and the base."""
        return digest(self._owned(before))

    def _owned(self, before: int) -> Iterator[tuple[str, Tensor]]:
        yield from self.base_tensors()
        for layer in self.mask_layers():
            owner = layer.store.owner
            earlier = (owner != FREE) & (owner < before)
            yield f"{layer.path}.values", layer.store.values[earlier]
            yield f"{layer.path}.owners", owner[earlier]
        for adapter in sorted(self.peft_config):
            if int(self.peft_config[adapter].task_index or 0) < before:
                yield from ((f"{adapter}.{name}", tensor) for name, tensor in self.own_tensors(adapter).items())
                for layer in self.mask_layers():
                    yield f"{adapter}.{layer.path}", layer.hfcl_bits[adapter]
