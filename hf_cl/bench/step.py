"""One training step: mask phase, weight phase, LoRA r8, full fine-tuning with and without its embeddings.

Measured: forward, backward, clipping at 1, the Trainer's default AdamW, and what masks need between steps: refreshing
them, or writing values; 32 texts of 32 and of 128 tokens. All ways are built in one process and take turns, a block
of steps each. Peak memory is each way's alone: anonymous memory of a fresh process during its steps, above what it
held after its imports; on CUDA what torch allocated at most.

Against: full fine-tuning with frozen embeddings, PEFT's LoRA r8, and for memory full fine-tuning.

Floor, with N masked weights and T tokens a batch:

- Mask phase: a score a masked weight needs the dense gradient of that weight and an optimizer state for it, as full
  fine-tuning does: three products of 2 N T operations each, and the 28 N bytes that AdamW reads and writes. On top it
  reads the gradient and V and writes their product (12 N bytes) and reads the scores to compare and writes marks (5
  N). So the floor is 1 + the time of 17 N bytes by the time of a step. What is fixed a layer is not in it.
- Weight phase: only claimed entries move, so AdamW's 28 N bytes fall away. Forward and the gradient of the inputs
  stay, two products of three. Of the third 1 % of the entries is needed: inner products over the tokens, made one by
  one in float32 on a CPU, where the floor is 1 - the time of 28 N bytes and of a product by a step's. An accelerator
  makes the dense product, and saves the 28 N bytes alone.
- LoRA reads the weights in two products, and its own in six small ones; it saves the third product and AdamW. So the
  floor of mask phase by LoRA is 3/2 where products are all that takes time.
- Memory is most where the backward pass begins: all activations are there, and no gradient yet. The weight phase then
  holds the weights, a composed copy of the masked ones, the store of values, owners (int16) and masks: 4 P + 11 N bytes
  with P parameters. Fine-tuning with frozen embeddings holds 4 P + 8 N, its moments; the rest of its peak are the
  activations, which the weight phase needs as well.
"""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from hf_cl import MaskConfig
from hf_cl.bench._child import in_child
from hf_cl.bench._measure import BLOCK, Peak, copy_rate, in_ms, in_use, product_rate, turns
from hf_cl.bench._models import DENSITY, LABELS, batch, lora_config, masked_entries, plain
from hf_cl.bench._row import Mark, Row, Settings, Tell

FULL, FROZEN, LORA, MASKS, VALUES = "full", "full, embeddings frozen", "LoRA r8", "mask phase", "weight phase"
WAYS = (FULL, FROZEN, LORA, MASKS, VALUES)
BATCH, LENGTHS, TURNS, STEPS = 32, (32, 128), 9, 3
LORA_LIMITS = {32: 1.17, 128: 1.10}
MEMORY_LENGTH = 32
"""The length at which memory has a mark."""


class Way:
    """One way to train: its model, its optimizer, and what it does between steps."""

    def __init__(self, name: str, size: str, length: int, device: str) -> None:
        base = plain(size, device)
        self.between: Callable[[], object] = lambda: None
        self.model: nn.Module = base
        if name == FROZEN:
            base.bert.embeddings.requires_grad_(False)
        elif name == LORA:
            self.model = get_peft_model(base, lora_config())
        elif name != FULL:
            self.model = self._masked(base, name)
        self.model.train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)
        self.inputs = {**batch(size, BATCH, length, device), "labels": torch.arange(BATCH, device=device) % LABELS}

    def _masked(self, base: Any, name: str) -> Any:
        trains = "claimed" if name == VALUES else "nothing"
        config = MaskConfig(task_type="SEQ_CLS", density=DENSITY, scale=1.5, trains=trains, num_labels=LABELS)
        model: Any = get_peft_model(base, config, adapter_name="task")
        tuner = model.base_model
        tuner.refresh_masks("task")
        self.between = lambda: tuner.refresh_masks("task")
        if name == VALUES:
            tuner.begin_weight_phase("task")
            self.between = lambda: [layer.write_values() for layer in tuner.mask_layers()]
        return model

    def step(self) -> None:
        """Take one training step."""
        self.model(**self.inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 1.0)
        self.optimizer.step()
        self.between()
        self.optimizer.zero_grad(set_to_none=True)


def run(settings: Settings, tell: Tell) -> Iterator[Row]:
    """Yield time and peak memory of each way, by model and length."""
    for size in settings.models():
        for length in (8,) if settings.quick else LENGTHS:
            under = {"model": size, "batch": BATCH, "length": length, "device": settings.device, "dtype": "float32"}
            tell(f"{size}, length {length}: steps in turns")
            yield from _times(size, length, settings, under)
            tell(f"{size}, length {length}: peak memory")
            yield from _peaks(size, length, settings, under)


def _times(size: str, length: int, settings: Settings, under: dict[str, Any]) -> Iterator[Row]:
    device = settings.device
    ways = {name: Way(name, size, length, device).step for name in WAYS}
    block = 0.0 if settings.quick else BLOCK
    taken = turns(ways, 2 if settings.quick else TURNS, device=device, block=block)
    against_lora = Mark(LORA_LIMITS[length]) if length in LORA_LIMITS else None
    floors = _floors(size, length, median(taken[FROZEN]), device)
    for name, rival, mark in (
        (MASKS, FROZEN, Mark(1.06)), (MASKS, LORA, against_lora), (VALUES, FROZEN, Mark(0.95)),
        (FULL, FROZEN, None), (LORA, FROZEN, None),
    ):  # fmt: skip
        floor = floors.get((name, rival), "none derived: it is a rival here")
        compared = in_ms(taken[name], taken[rival])
        yield Row("step", name, under, rival=rival, mark=mark, floor=floor, **compared)


def _floors(size: str, length: int, step: float, device: str) -> dict[tuple[str, str], str]:
    entries, tokens = masked_entries(size), BATCH * length
    copy, product = copy_rate(device), product_rate(device)
    more, less = 17 * entries / copy, 28 * entries / copy
    products = 3 * 2 * entries * tokens / product
    said = f"{entries / 1e6:.1f} M masked weights, {tokens:,} tokens: products {1000 * products:.1f} ms"
    return {
        (MASKS, FROZEN): f"{1 + more / step:.3f}: {said}, 17 bytes a weight on top {1000 * more:.2f} ms",
        (MASKS, LORA): f"1.5 of what products take: {said}, LoRA needs two of the three",
        (VALUES, FROZEN): f"{max(0.0, 1 - (less + products / 3) / step):.3f}: AdamW's 28 bytes a weight are "
        f"{1000 * less:.2f} ms of a step, a product {1000 * products / 3:.2f}; {1 - less / step:.3f} with all three",
    }


def _peaks(size: str, length: int, settings: Settings, under: dict[str, Any]) -> Iterator[Row]:
    peaks = {}
    for name in WAYS:
        asked = {"way": name, "size": size, "length": length, "device": settings.device}
        peaks[name] = float(in_child("step", asked).answer)
    entries, parameters = masked_entries(size), sum(weight.numel() for weight in plain(size).parameters())
    activations = max(0.0, peaks[FROZEN] - 1e-6 * (4 * parameters + 8 * entries))
    least = 1e-6 * (4 * parameters + 11 * entries) + activations
    said = f"4 bytes for each of {parameters / 1e6:.1f} M parameters, 11 a masked weight, {activations:.0f} MB of "
    said += "activations as with frozen embeddings"
    marks = {(VALUES, FULL): Mark(0.70) if length == MEMORY_LENGTH else None}
    for name, rival in ((VALUES, FULL), (VALUES, FROZEN), (MASKS, FULL), (LORA, FULL), (FROZEN, FULL)):
        yield Row(
            "step", f"peak memory, {name}", under, peaks[name], "MB", rival=rival, theirs=peaks[rival],
            floor=f"{least / peaks[rival]:.3f}: {said}" if name == VALUES else "none derived: it is a rival here",
            ratio=peaks[name] / peaks[rival], mark=marks.get((name, rival)),
        )  # fmt: skip


def child(way: str, size: str, length: int, device: str) -> Callable[[], float]:
    """Return what measures, in a process of its own, the megabytes that a way's steps take at most."""
    imported = in_use(device)

    def work() -> float:
        made = Way(way, size, length, device)
        with Peak(device) as peak:
            for _ in range(STEPS):
                made.step()
        return (peak.most - imported) / 1e6

    return work
