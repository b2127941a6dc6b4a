"""`MaskModel`: the base with masked linears and own heads, as a PEFT tuner.

Everything here names a task by its adapter: its file, which task answers, merging, mixed batches, its phases.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_cl.errors import ConfigError, HfClError, OwnershipError
from hf_cl.layers.heads import follow_labels
from hf_cl.masks.select import refresh_masks
from hf_cl.tuner.adapter_file import adapter_of_key, check_file, file_digest, is_untouched, keys_for
from hf_cl.tuner.arrival import make_room
from hf_cl.tuner.config import MaskConfig
from hf_cl.tuner.injection import Injection
from hf_cl.tuner.layer import MaskLinear
from hf_cl.tuner.mixed import run_mixed
from hf_cl.tuner.names import BASE
from hf_cl.tuner.rows import Plan


class MaskModel(Injection):
    """A base wrapped by masked adapters; made by `get_peft_model(base, MaskConfig(...))`."""

    # Adapters of one bank read one store: transformers' own adapter loading would drop it without a word.
    uses_shared_state = True

    share_products = True
    """Whether the tasks of a mixed batch share the products with the base's weight; False answers each task apart, with
    the bits of a batch of its rows alone."""

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
        state = model.state_dict()
        keys = keys_for(state, adapter_name)
        config.base_fingerprint = tuner.fingerprint()
        config.tensors_digest = file_digest({name: state[key] for name, key in keys.items()})
        config.__dict__.update(saved_as=adapter_name)
        return {key: state[key] for key in keys.values()}

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
        # Before PEFT compares sizes: with `ignore_mismatched_sizes` it would drop what does not fit yet.
        for path, layer in model.named_modules():
            if isinstance(layer, MaskLinear):
                make_room(layer, arriving, f"{path}.")
        return arriving

    # --- the active task --------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active: its weights, its head, its labels."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise OwnershipError(f"adapters {', '.join(adapter_name)} cannot be active together. Name one.")
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        training = []
        for name in self.peft_config:
            # Also those that were loaded: whether a task is finished is read off its masks.
            if self.mask_layers() and name in self.mask_layers()[0].configs:
                if self.phase(name) == "committed":
                    self.finish(name)
                else:
                    training.append(name)
        # PEFT would walk all modules of the model and all adapters of each; a switch writes masks in less time.
        layers: list[Any] = [*self.mask_layers(), *self.own_layers()]
        for layer in layers:
            if layer.merged:
                warnings.warn("A task is merged into the base. Unmerging the model first.", stacklevel=2)
                layer.unmerge()
        for masked in self.mask_layers():
            masked.make_active(names, inference_mode, training)
        for own in self.own_layers():
            own.set_adapter(names, inference_mode)
        self.active_adapter = adapter_name
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
            self._require_finite(names[0])
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        self._follow_labels()

    def _require_finite(self, adapter: str) -> None:
        """Refuse to merge a task whose weights are not finite, before any layer is merged.

        Raises:
            ConfigError: Names the layer.
        """
        with self.answering(adapter):
            tensors = {layer.path: layer.store.weight for layer in self.mask_layers()} | self.own_tensors(adapter)
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
            self._require_finite(names[0])
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

    def leave(self, adapter: str) -> None:
        """Unload a finished task that can be loaded again: its entries stay its own, with their values."""
        index = int(self.peft_config[adapter].task_index or 0)
        for layer in self.mask_layers():
            layer.elsewhere[index] = bool(layer.hfcl_owned[adapter].numel())
        super().delete_adapter(adapter)
        self._follow_labels()

    @contextmanager
    def answering(self, adapter: str | None) -> Iterator[None]:
        """Let another task, or the bare base, answer inside the context; what trains and who is active stays."""
        with ExitStack() as stack:
            for layer in self._tuner_layers():
                stack.enter_context(layer.answering(adapter))
            yield

    @contextmanager
    def planned(self, plan: Plan) -> Iterator[None]:
        """Let a plan say inside the context which task each row belongs to; what trains and who is active stays."""
        layers = self._tuner_layers()
        held = [layer.plan for layer in layers]
        for layer in layers:
            layer.plan = plan
        try:
            yield
        finally:
            for layer, before in zip(layers, held, strict=True):
                layer.plan = before

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

    def refresh_masks(self, adapter: str, share: float = 1.0) -> int:
        """Bring the active adapter's masks up to date with its scores; return how many thresholds were renewed.

        Call it between steps, never inside a forward: gradient checkpointing computes a forward twice.

        Args:
            adapter: The active adapter, in its mask phase.
            share: Of its budget that the mask keeps now; at least one entry a layer.
        """
        layers = self.mask_layers()
        if self.peft_config[adapter].threshold is not None:
            for layer in layers:
                layer.compose()
            return 0
        budgets = [layer.budget(adapter) for layer in layers]
        thresholds = torch.cat([layer.hfcl_threshold[adapter] for layer in layers])
        masks = [layer.live_mask for layer in layers if layer.live_mask is not None]
        renewed = refresh_masks(
            [layer.ranked(adapter) for layer in layers],
            masks,
            thresholds,
            [min(budget, max(1, round(share * budget))) for budget in budgets],
        )
        for layer, mask, threshold in zip(layers, masks, thresholds, strict=True):
            layer.hfcl_threshold[adapter].copy_(threshold)
            layer.store.show(layer.base_layer.weight, mask, layer.read_values(adapter))
        return renewed

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
