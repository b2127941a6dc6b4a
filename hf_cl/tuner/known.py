"""What a masked model knows of its tasks: layers, capacity, overlap, tensors, digests. Changes nothing."""

from collections.abc import Iterator, Mapping

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from hf_cl.errors import OwnershipError
from hf_cl.masks.bits import pack
from hf_cl.masks.overlap import overlap_share
from hf_cl.ownership.digest import digest
from hf_cl.ownership.owner import FREE
from hf_cl.tuner.config import MaskConfig
from hf_cl.tuner.layer import MaskLinear
from hf_cl.tuner.names import is_ours
from hf_cl.tuner.own_layer import OwnLayer


class KnownTasks(BaseTuner):
    """The masked layers of a model, added up. A task is named by its adapter."""

    prefix = "hfcl_"
    tuner_layer_cls = (MaskLinear, OwnLayer)
    target_module_mapping: Mapping[str, list[str]] = {}

    _layers: list[MaskLinear] | None = None
    """The masked linears, found once: walking all modules at each step costs more than its arithmetic."""
    _owns: list[OwnLayer] | None = None
    _fingerprint: str | None = None

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

    def phase(self, adapter: str) -> str:
        """Return the adapter's phase: mask, weight or committed."""
        return self.mask_layers()[0].phase(adapter)

    def fingerprint(self) -> str:
        """Return the base's digest, computed once: nothing here ever writes to the base."""
        if self._fingerprint is None:
            self._fingerprint = self.base_digest()
        return self._fingerprint

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

    def trained_numbers(self) -> set[int]:
        """Return the numbers of the finished tasks that own trained values, loaded or not."""
        numbers = {int(config.task_index or 0): name for name, config in self.peft_config.items()}
        found = {
            index
            for index, name in numbers.items()
            if any(layer.hfcl_owned[name].numel() for layer in self.mask_layers() if name in layer.hfcl_owned)
        }
        return found | {index for layer in self.mask_layers() for index, own in layer.elsewhere.items() if own}

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
            plain = ".".join(part for part in name.split(".") if part != "base_layer")
            if not is_ours(name) and not plain.startswith(head):
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
