"""Putting masked layers and own heads into a base: checked before anything is replaced, whole or not at all."""

from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule
from torch import nn

from hf_cl.errors import ConfigError
from hf_cl.layers.families import family_of
from hf_cl.layers.targets import find_head, find_norms, find_targets, matches, refuse_unmaskable
from hf_cl.masks.compose import fitting_scale
from hf_cl.tuner.config import MaskConfig
from hf_cl.tuner.known import KnownTasks
from hf_cl.tuner.layer import MaskLinear
from hf_cl.tuner.names import require_name
from hf_cl.tuner.own_layer import OwnLayer

FIXED = ("seed", "scale", "compose", "target_modules", "exclude_modules", "head_modules", "train_norms")
"""What the first adapter fixes for all: the store and the layers around it."""


class Injection(KnownTasks):
    """Adds adapters. The first one settles targets, head and store for all."""

    _next_index = 0
    """The number of the next task; a dropped task's number is not used again."""
    _base_labels: tuple[tuple[str, ...], str | None] = ((), None)
    """Labels and kind of loss of the base's own head, for when no task answers."""
    _was_trainable: Sequence[nn.Parameter] = ()
    """What of the base required gradients before it was wrapped."""
    _before: tuple[str | None, int] = (None, 0)
    """The adapter that was added last, and the next number before it."""

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
        if config.scale is None:
            config.scale = fitting_scale(config.compose, config.density)
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
