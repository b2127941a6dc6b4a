"""HyperMask: one hypernetwork turns a task's embedding into semi-binary masks; a task costs embedding and head.

Masks are |tanh(a b^T)| with all but the largest share set to 0, over values that never train: with `delta` they sit on
the pretrained weight, with `prune` they weigh it. All tasks share the hypernetwork: a later task moves earlier masks;
the paper's regulariser holds its outputs for earlier embeddings where they were, and how well that holds is measured
like any forgetting. `snapshot: true` trains masks of one level a layer and freezes each at commit: exact from then on,
at the price of its bits; there is nothing to hold then, and the hypernetwork is a start for the next task.

Source: HyperMask, arXiv 2310.00113. Ours: factors instead of whole masks (layers/hypernetwork.py), and values that do
not train, where the paper trains its target network too and holds it by an L1 penalty.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_cl.config import option
from hf_cl.errors import ConfigError, RunError
from hf_cl.layers.base import Base
from hf_cl.layers.families import family_of
from hf_cl.layers.hypernetwork import (
    HyperLinear,
    Hypernetwork,
    exact_kept,
    level_of,
    semi_binary,
    straight_through,
)
from hf_cl.layers.linear import fan_in
from hf_cl.layers.targets import find_targets
from hf_cl.layers.task_heads import TaskHeads, load_exactly
from hf_cl.masks.bits import pack, unpack
from hf_cl.masks.coding import decode, encode
from hf_cl.masks.compose import layer_scale, start_store
from hf_cl.ownership.digest import digest
from hf_cl.training.groups import parameter_groups
from hf_cl.training.guards import FiniteGradients
from hf_cl.training.masked import join_codes
from hf_cl.training.method import Method, Packed, Settled, Tensors


@dataclass(frozen=True)
class Options:
    """Options of `hypermask`."""

    density: float = option(0.1, help="Share of each layer's entries that a mask keeps above 0.", above=0, most=1)
    compose: str = option("delta", help="Form of the store: delta or prune.", choices=("delta", "prune"))
    scale: float = option(
        1.0, help="Magnitude of the values of `delta`, in standard deviations of the layer's weight.", above=0
    )
    rank: int = option(4, help="Rank of what a mask is made from.", least=1)
    embedding: int = option(48, help="Numbers of a task's embedding.", least=1)
    hidden: int = option(100, help="Units of each of the hypernetwork's two hidden layers.", least=1)
    regulariser: float = option(
        1e-3, help="Weight of the squared change of the outputs for earlier tasks, summed, meant over tasks.", least=0
    )
    snapshot: bool = option(False, help="Freeze each task's mask at its commit, with one level a layer: exact.")
    learning_rate: float = option(1e-3, help="Peak learning rate of hypernetwork and embedding.", above=0)
    head_learning_rate: float | None = option(
        None, help="Peak learning rate of the head; none: the training's.", above=0
    )


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> "HyperMask":
    """Wrap a base to learn a stream with HyperMask."""
    return HyperMask(base, options, seed, settled or {})


class HyperMask(Method):
    """A frozen encoder, one hypernetwork for all tasks, an embedding and a head a task."""

    kept_midway = False  # thresholds and the regulariser's targets are not among the parameters

    def __init__(self, base: Base, options: Options, seed: int, settled: Settled) -> None:
        super().__init__(base)
        self.options, model = options, base.model
        self.targets = settled.get("target_modules") or find_targets(model, family_of(model).targets, base.head)
        self.scales: dict[str, float] = dict(settled.get("scales") or {})
        model.requires_grad_(False)
        self.heads = TaskHeads(base, seed)
        self.layers = [self._put_in(place, name, seed) for place, name in enumerate(self.targets)]
        shapes: list[Any] = [tuple(layer.original.weight.shape) for layer in self.layers]
        self.net = Hypernetwork(
            shapes,
            task_size=options.embedding,
            hidden=options.hidden,
            rank=options.rank,
            compose=options.compose,
            seed=seed,
        ).to(next(model.parameters()).device)
        model.hypernetwork = self.net
        model.accepts_loss_kwargs = False
        model.register_forward_hook(self._add_regulariser)
        self._training: int | None = None
        self._thresholds: list[Tensor] = []
        self._held: tuple[list[str], Tensor] | None = None
        self._frozen: dict[int, tuple[list[Tensor], Tensor]] = {}
        self._drift: dict[int, float] = {}

    def _put_in(self, place: int, name: str, seed: int) -> HyperLinear:
        """Put a masked linear in a target's place."""
        model, compose = self.base.model, self.options.compose
        original = model.get_submodule(name)
        path = name.removeprefix(f"{model.base_model_prefix}.")
        if name not in self.scales:
            self.scales[name] = layer_scale(compose, original.weight, self.options.scale, fan_in(original))
        values = start_store(compose, original.weight, seed, path, self.scales[name])
        layer = HyperLinear(original, values, delta=compose == "delta")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layer.live = partial(self._live_mask, place)
        return layer

    @property
    def model(self) -> nn.Module:
        """The base with masked linears."""
        model: nn.Module = self.base.model
        return model

    def settled(self) -> Settled:
        """Return the masked linears, their scales and the head's layers."""
        return {"target_modules": list(self.targets), "scales": self.scales, "head_modules": list(self.base.head)}

    # --- masks --------------------------------------------------------------------------------------------

    def _live_mask(self, place: int) -> Tensor:
        if self._training is None:
            raise RunError("no task is active. Begin or activate one first.")
        a, b = self.net.factors(_key(self._training), place)
        mask = semi_binary(a, b, self._thresholds[place])
        return straight_through(mask) if self.options.snapshot else mask

    def refresh(self) -> None:
        """Bring the thresholds of the task that trains up to date; between steps, never inside a forward."""
        if self._training is not None:
            key, density = _key(self._training), self.options.density
            self._thresholds = [self.net.threshold(key, place, density) for place in range(len(self.layers))]

    def final_mask(self, index: int, place: int) -> Tensor:
        """Return a finished task's mask of one layer, (n, m) float32: the snapshot, or what the network gives now."""
        if index in self._frozen:
            bits, levels = self._frozen[index]
            shape = self.net.shapes[place]
            return unpack(bits[place], shape) * levels[place]
        with torch.no_grad():
            a, b = self.net.factors(_key(index), place)
            return semi_binary(a, b, torch.tensor(-1.0, device=a.device)) * exact_kept(a, b, self.options.density)

    # --- learning -----------------------------------------------------------------------------------------

    def begin(self, index: int, labels: tuple[str, ...]) -> None:
        """Add a fresh embedding and head; remember what the hypernetwork gives for earlier tasks."""
        self._before = {name: tensor.detach().clone() for name, tensor in self.net.shared().items()}
        earlier = [] if self.options.snapshot else list(self.net.tasks)
        with torch.no_grad():
            held = self.net.outputs(torch.stack([self.net.tasks[key] for key in earlier])) if earlier else None
        self._held = (earlier, held) if held is not None else None
        self._add(index, labels)
        self.net.requires_grad_(True)
        for key in self.net.tasks:
            self.net.tasks[key].requires_grad_(key == _key(index))
        self._answer(index, finished=False)

    def _add(self, index: int, labels: tuple[str, ...]) -> None:
        self.net.add(_key(index), index)
        self.heads.add(index, labels)

    def _answer(self, index: int, *, finished: bool) -> None:
        """Let a task answer: with composed weights if it is finished, else with what its embedding gives now."""
        self._training = None if finished else index
        for place, layer in enumerate(self.layers):
            layer.hyper_weight = layer.compose(self.final_mask(index, place)) if finished else None
        self.refresh()
        self.heads.show(index)

    def drift(self) -> Tensor:
        """Return the squared change of the outputs since the task began: summed, meant over earlier tasks."""
        if self._held is None:
            return torch.zeros((), device=self.net.layers.device)
        keys, held = self._held
        now = self.net.outputs(torch.stack([self.net.tasks[key] for key in keys]))
        return (now - held.to(now.device)).pow(2).sum(1).mean()

    def _add_regulariser(self, model: nn.Module, inputs: Any, output: Any) -> Any:
        """Add the regulariser to the loss of a training step, so that clipping and scaling see it too."""
        weight = 0.0 if self._held is None else self.options.regulariser
        if weight and model.training and torch.is_grad_enabled() and output.loss is not None:
            output.loss = output.loss + weight * self.drift()
        return output

    def abandon(self, index: int) -> None:
        """Forget the embedding and the head, and put the hypernetwork back."""
        self.heads.remove(index)
        if _key(index) in self.net.tasks:
            del self.net.tasks[_key(index)]
        self._frozen.pop(index, None)
        load_exactly(self.net.shared(), self._before, "the hypernetwork")
        self._training = self._held = None

    def groups(self, args: TrainingArguments) -> list[dict[str, Any]]:
        """Return the hypernetwork's and the head's groups.

        Raises:
            ConfigError: `load_best_model_at_end`: the Trainer knows nothing of tasks.
        """
        if args.load_best_model_at_end:
            raise ConfigError("load_best_model_at_end: masks of the best step would be lost. Train without it.")
        head = self.options.head_learning_rate
        rates = {"hyper": self.options.learning_rate, "head": args.learning_rate if head is None else head}
        return parameter_groups(
            self.model.named_parameters(),
            rates,
            args.weight_decay,
            lambda name: "hyper" if name.startswith("hypernetwork.") else "head",
        )

    def callbacks(self) -> list[TrainerCallback]:
        """Return the guard against non-finite gradients, and what renews thresholds."""
        return [FiniteGradients(), _Refresh(self)]

    def commit(self, index: int) -> None:
        """Freeze embedding and head; with `snapshot` the mask, too."""
        with torch.no_grad():
            self._drift[index] = float(self.drift())
        self._held = None
        self.net.requires_grad_(False)
        self.heads.freeze(index)
        if self.options.snapshot:
            masks = [self.final_mask(index, place) for place in range(len(self.layers))]
            levels = torch.stack([level_of(mask) for mask in masks])
            self._frozen[index] = ([pack(mask != 0) for mask in masks], levels)
        self._answer(index, finished=True)

    def activate(self, index: int) -> None:
        """Make a task's masks and head active."""
        self._answer(index, finished=True)

    # --- what is known and stored ---------------------------------------------------------------------------

    def parts(self, index: int) -> dict[str, str]:
        """Return digests of the base, the head, and the frozen masks or hypernetwork with embedding."""
        found = {"base": digest(self._base_tensors()), "head": digest(sorted(self.heads.tensors(index).items()))}
        if index in self._frozen:
            bits, levels = self._frozen[index]
            return {**found, "masks": digest([("levels", levels), *((str(i), b) for i, b in enumerate(bits))])}
        net = digest(sorted(self.net.shared().items()))
        return {**found, "hypernetwork": net, "embedding": digest([("embedding", self.net.tasks[_key(index)])])}

    def _base_tensors(self) -> list[tuple[str, Tensor]]:
        ours = ("hypernetwork.", *(f"{name}." for name in self.base.head))
        named = [*self.base.model.named_parameters(), *self.base.model.named_buffers()]
        plain = {name.replace(".original.", "."): tensor for name, tensor in named if not name.startswith(ours)}
        return [(name, plain[name]) for name in sorted(plain) if ".hyper_" not in name]

    def facts(self, index: int) -> dict[str, Any]:
        """Return what trains, the hypernetwork's size beside what it masks, and how far its outputs drifted."""
        size = sum(tensor.numel() for tensor in self.net.shared().values())
        facts: dict[str, Any] = {
            "trainable": size + self.options.embedding,
            "hypernetwork": size,
            "masked_weights": sum(n * m for n, m in self.net.shapes),
        }
        if index in self._drift:
            facts["drift"] = round(self._drift[index], 6)
        return facts

    def pack(self, index: int) -> Packed:
        """Return the embedding, or the frozen mask's code and levels; and the head."""
        head = {name: tensor.cpu() for name, tensor in self.heads.tensors(index).items()}
        if index not in self._frozen:
            return Packed({"embedding": self.net.tasks[_key(index)].detach().cpu()}, head)
        bits, levels = self._frozen[index]
        masks = [unpack(bit, shape).cpu().numpy() for bit, shape in zip(bits, self.net.shapes, strict=True)]
        codes, lengths = join_codes([encode(mask, mask.shape[1]) for mask in masks])
        return Packed({"masks": codes, "lengths": lengths, "levels": levels.cpu()}, head)

    def restore(self, index: int, labels: tuple[str, ...], packed: Packed) -> None:
        """Add a finished task's embedding or frozen mask, and its head.

        Raises:
            RunError: The tensors are not those of such a task.
        """
        expected = {"masks", "lengths", "levels"} if self.options.snapshot else {"embedding"}
        if set(packed.task) != expected:
            raise RunError(f"task {index}: its file holds {', '.join(sorted(packed.task))}. Restore it from a copy.")
        self._add(index, labels)
        self.heads.load(index, packed.head)
        self.net.tasks[_key(index)].requires_grad_(False)
        if self.options.snapshot:
            self._frozen[index] = self._unpacked(index, packed.task)
        else:
            load_exactly({"embedding": self.net.tasks[_key(index)]}, packed.task, f"task {index}: its embedding")

    def _unpacked(self, index: int, task: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        lengths, codes = task["lengths"].tolist(), task["masks"].numpy().tobytes()
        shapes = self.net.shapes
        if len(lengths) != len(shapes) or sum(lengths) != len(codes) or min(lengths) < 0:
            raise RunError(f"task {index}: {len(lengths)} coded masks for {len(shapes)} layers. Restore a copy.")
        bits, at = [], 0
        for (n, m), length in zip(shapes, lengths, strict=True):
            mask = torch.from_numpy(decode(codes[at : at + length], n * m, m))
            bits.append(pack(mask).to(self.net.layers.device))
            at += length
        return bits, task["levels"].to(self.net.layers.device)

    def shared(self) -> Tensors:
        """Return the hypernetwork, which all tasks share."""
        return {name: tensor.detach().cpu() for name, tensor in self.net.shared().items()}

    def restore_shared(self, tensors: Tensors) -> None:
        """Take back the hypernetwork."""
        load_exactly(self.net.shared(), tensors, "the hypernetwork")
        self.net.requires_grad_(False)


class _Refresh(TrainerCallback):
    """Renews the thresholds of the masks before the first step and after each."""

    def __init__(self, method: HyperMask) -> None:
        self.method = method

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow what a checkpoint may have brought."""
        self.method.refresh()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Follow the step."""
        self.method.refresh()


def _key(index: int) -> str:
    return f"task{index}"
