"""`MaskModel`: the base with masked linears and own heads, as a PEFT tuner, and what can be done to a task.

Everything here names a task by its adapter. The model adds up what its layers know: refreshing masks,
the claim, the commit, capacity, digests.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from torch import Tensor, nn

from hf_cl.errors import ConfigError, OwnershipError
from hf_cl.layers.heads import follow_labels
from hf_cl.layers.targets import family_of, find_head, find_norms, find_targets, matches, refuse_unmaskable
from hf_cl.masks.overlap import overlap_share
from hf_cl.masks.select import refresh_masks
from hf_cl.ownership.digest import digest
from hf_cl.ownership.owner import FREE
from hf_cl.tuner.config import MaskConfig
from hf_cl.tuner.layer import MaskLinear, pack
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

    # --- injection --------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: MaskConfig, model_config: dict[str, Any]) -> MaskConfig:
        return peft_config

    def _check_new_adapter_config(self, config: MaskConfig) -> None:
        super()._check_new_adapter_config(config)
        others = [other for other in self.peft_config.values() if other is not config]
        for name in FIXED if others else ():
            given, fixed = getattr(config, name), getattr(others[0], name)
            if given is not None and given != fixed:
                raise ConfigError(f"{name}: this model's first adapter fixed {fixed!r}, found {given!r}. Use that.")
        for other in others:
            if config.task_index is not None and config.task_index == other.task_index:
                raise ConfigError(f"task_index: {config.task_index} is taken by another adapter of this model.")

    def _prepare_model(self, peft_config: MaskConfig, model: Any) -> None:
        """Settle targets, head and number before anything is replaced; the first adapter settles them for all."""
        others = [other for other in self.peft_config.values() if other is not peft_config]
        if others:
            for name in (*FIXED, "scales"):
                setattr(peft_config, name, getattr(others[0], name))
        else:
            refuse_unmaskable(model)
            self._settle(peft_config, model)
        if peft_config.task_index is None:
            peft_config.task_index = self._next_index
        self._next_index = max(self._next_index, peft_config.task_index + 1)
        if peft_config.num_labels is None:
            peft_config.num_labels = model.config.num_labels
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
            layer.add(adapter_name, peft_config, std, is_output=current_key == head[-1])
        else:
            layer = (
                target if isinstance(target, MaskLinear) else MaskLinear(target, self._path(current_key), peft_config)
            )
            layer.add(adapter_name, peft_config)
            peft_config.scales = {**(peft_config.scales or {}), layer.path: layer.store.scale}
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
            self._layers = self._owns = None

    def _path(self, key: str) -> str:
        """Return a module's name below `base_model_prefix`, the same for every class of one family."""
        return key.removeprefix(f"{self.model.base_model_prefix}.")

    # --- the active task --------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active: its weights, its head, its labels."""
        for name in self.peft_config:
            # Also those that were loaded: whether a task is finished is read off its masks.
            if self.mask_layers() and name in self.mask_layers()[0].configs and self.phase(name) == "committed":
                self.finish(name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if names and names[0] in self.peft_config:
            follow_labels(self.model, self.peft_config[names[0]].labels)

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskModel":
        """Refuse a cast before anything of the model is cast."""
        for layer in self.mask_layers():
            layer.store.refuse_cast(fn)
        return super()._apply(fn, recurse)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop a task; the one that is active then shows its own labels."""
        super().delete_adapter(adapter_name)
        names = self.active_adapters
        if names and names[0] in self.peft_config:
            follow_labels(self.model, self.peft_config[names[0]].labels)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse a batch of mixed tasks: silently, every row would get the active task.

        Raises:
            ConfigError: `adapter_names` is given to a forward.
        """
        if kwargs.get("adapter_names") is not None:
            raise ConfigError("adapter_names: mixed batches are not supported. Call set_adapter and one task's rows.")
        yield

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
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            parts = name.split(".")
            plain = ".".join(part for part in parts if part != "base_layer")
            ours = any(part.startswith("hfcl_") or part in ("store", "live_mask") for part in parts)
            if not ours and not plain.startswith(head):
                found[plain] = tensor
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
