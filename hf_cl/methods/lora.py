"""One PEFT LoRA a task, its own head: what a user would pick instead, exact, and the rival in bytes.

It adapts the same linears that the masks adapt. Adapter and head are stored apart; the adapter is rounded
to bf16 at commit, before its last evaluation, so what is stored is what was measured.

Source: LoRA, arXiv 2106.09685; the implementation is PEFT's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_cl.config import option
from hf_cl.errors import ConfigError, RunError
from hf_cl.layers.base import Base
from hf_cl.layers.families import family_of
from hf_cl.layers.heads import task_generator
from hf_cl.layers.targets import find_targets
from hf_cl.layers.task_heads import TaskHeads, load_exactly
from hf_cl.ownership.digest import digest
from hf_cl.training.groups import parameter_groups
from hf_cl.training.guards import FiniteGradients
from hf_cl.training.masked import drop_adapter
from hf_cl.training.method import Method, Packed, Settled


@dataclass(frozen=True)
class Options:
    """Options of `lora`."""

    r: int = option(8, help="Rank of each update.", least=1)
    alpha: float | None = option(None, help="LoRA's alpha; none: twice the rank.", above=0)
    dropout: float = option(0.0, help="Dropout before the update.", least=0, below=1)
    target_modules: tuple[str, ...] | None = option(
        None, help="Ends of the names of the linears to adapt; none: those that masks adapt."
    )
    learning_rate: float = option(3e-3, help="Peak learning rate of the adapter.", above=0)
    head_learning_rate: float | None = option(
        None, help="Peak learning rate of the head; none: the training's.", above=0
    )


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> "Lora":
    """Wrap a base to learn a stream with one LoRA a task."""
    return Lora(base, options, seed, settled)


class Lora(Method):
    """A frozen encoder with one LoRA and one head a task."""

    def __init__(self, base: Base, options: Options, seed: int, settled: Settled | None) -> None:
        super().__init__(base)
        self.options, self.seed = options, seed
        stored = (settled or {}).get("target_modules")
        named = options.target_modules or family_of(base.model).targets
        self.targets = stored or find_targets(base.model, named, base.head)
        # GPT-2's linears store their weight transposed, and PEFT has to be told.
        self._transposed = any(isinstance(base.model.get_submodule(name), Conv1D) for name in self.targets)
        self.heads = TaskHeads(base, seed)
        base.model.accepts_loss_kwargs = False
        base.model.requires_grad_(False)
        self._model: PeftModel | None = None

    @property
    def model(self) -> nn.Module:
        """The `PeftModel`."""
        if self._model is None:
            raise RunError("no task was begun, so there is no LoRA model yet. Learn or restore a task first.")
        return self._model

    def settled(self) -> Settled:
        """Return the adapted linears and the head's layers."""
        return {"target_modules": list(self.targets), "head_modules": list(self.base.head)}

    def begin(self, index: int, labels: tuple[str, ...]) -> None:
        """Add task number `index` as a new LoRA and a fresh head."""
        adapter = _adapter(index)
        alpha = 2 * self.options.r if self.options.alpha is None else self.options.alpha
        config = LoraConfig(
            r=self.options.r,
            lora_alpha=alpha,
            lora_dropout=self.options.dropout,
            target_modules=list(self.targets),
            fan_in_fan_out=self._transposed,
        )
        if self._model is None:
            self._model = get_peft_model(self.base.model, config, adapter_name=adapter)
        else:
            self._model.add_adapter(adapter, config)
        self._seed_adapter(index)
        self._model.set_adapter(adapter)
        self.heads.add(index, labels)
        self.heads.thaw(index)

    def _seed_adapter(self, index: int) -> None:
        """Draw A anew from the task's own generator; PEFT draws it from the global one."""
        for name, tensor in self._adapter_tensors(index).items():
            if ".lora_A." in name:
                generator = task_generator(self.seed, index, name)
                bound = tensor.shape[1] ** -0.5
                with torch.no_grad():
                    tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))

    def _adapter_tensors(self, index: int) -> dict[str, Tensor]:
        suffix = f".{_adapter(index)}.weight"
        named = self.model.named_parameters()
        return {name: tensor for name, tensor in named if ".lora_" in name and name.endswith(suffix)}

    def abandon(self, index: int) -> None:
        """Forget the adapter and the head."""
        self.heads.remove(index)
        self._model = drop_adapter(self._model, _adapter(index))

    def groups(self, args: TrainingArguments) -> list[dict[str, Any]]:
        """Return the adapter's and the head's groups.

        Raises:
            ConfigError: `load_best_model_at_end`: the Trainer restores nothing for an adapter with a name.
        """
        if args.load_best_model_at_end:
            raise ConfigError("load_best_model_at_end: the Trainer cannot restore a named LoRA (transformers #36201).")
        head = self.options.head_learning_rate
        rates = {"lora": self.options.learning_rate, "head": args.learning_rate if head is None else head}
        return parameter_groups(
            self.model.named_parameters(),
            rates,
            args.weight_decay,
            lambda name: "lora" if ".lora_" in name else "head",
        )

    def callbacks(self) -> list[TrainerCallback]:
        """Return the guard against non-finite gradients."""
        return [FiniteGradients()]

    def commit(self, index: int) -> None:
        """Round the adapter to bf16, and freeze it with its head."""
        with torch.no_grad():
            for tensor in self._adapter_tensors(index).values():
                tensor.copy_(tensor.to(torch.bfloat16).float())
        self.heads.freeze(index)

    def activate(self, index: int) -> None:
        """Make a task's adapter and head active."""
        model: Any = self.model
        model.base_model.set_adapter(_adapter(index), inference_mode=True)
        self.heads.show(index)

    def parts(self, index: int) -> dict[str, str]:
        """Return digests of the base, the adapter and the head."""
        return {
            "base": digest(self._base_tensors()),
            "adapter": digest(sorted(self._adapter_tensors(index).items())),
            "head": digest(sorted(self.heads.tensors(index).items())),
        }

    def _base_tensors(self) -> list[tuple[str, Tensor]]:
        head = tuple(f"{name}." for name in self.base.head)
        named = [*self.base.model.named_parameters(), *self.base.model.named_buffers()]
        found = {name.replace(".base_layer.", "."): tensor for name, tensor in named if ".lora_" not in name}
        return [(name, found[name]) for name in sorted(found) if not name.startswith(head)]

    def facts(self, index: int) -> dict[str, Any]:
        """Return the number of weights of the adapter."""
        return {"trainable": sum(tensor.numel() for tensor in self._adapter_tensors(index).values())}

    def pack(self, index: int) -> Packed:
        """Return the adapter in bf16, and the head."""
        suffix = f".{_adapter(index)}.weight"
        task = {
            name.removesuffix(suffix): tensor.detach().to(torch.bfloat16).cpu()
            for name, tensor in self._adapter_tensors(index).items()
        }
        return Packed(task, {name: tensor.cpu() for name, tensor in self.heads.tensors(index).items()})

    def restore(self, index: int, labels: tuple[str, ...], packed: Packed) -> None:
        """Add a finished task's adapter and head."""
        self.begin(index, labels)
        suffix = f".{_adapter(index)}.weight"
        stored = {name + suffix: tensor.float() for name, tensor in packed.task.items()}
        load_exactly(self._adapter_tensors(index), stored, f"task {index}: its adapter")
        self.heads.load(index, packed.head)


def _adapter(index: int) -> str:
    return f"task{index}"
