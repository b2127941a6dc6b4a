"""Switching between tasks that are loaded already, with their heads and labels.

Measured: `MaskBank.activate` among ten attached tasks of random masks, density .01, float32.

Against: one copy of the masked weights, the least that a switch between dense models costs, and PEFT's `set_adapter`
among ten LoRA r8 adapters, which moves no weight and whose forward pays for that.

Floor: of the composed weight the old task's kept entries go back to the base's, the new one's are written. With N
masked weights at density p that is 2 p N entries; each lies in a cache line of its own, 64 bytes read and written, so
256 p N bytes against the copy's 8 N: at density .01 a share of .32. What is fixed a layer (a few calls in Python) is
not in it.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_cl.bank import MaskBank
from hf_cl.bench._banks import make_bank
from hf_cl.bench._measure import copy_rate, in_ms, turns
from hf_cl.bench._models import DENSITY, masked_entries, plain, with_lora
from hf_cl.bench._row import Mark, Row, Settings, Tell

TASKS, TURNS, BLOCK = 10, 25, 0.05
SWITCH, COPY, LORA = "switch", "one copy of the masked weights", "PEFT's set_adapter, LoRA r8"


def run(settings: Settings, tell: Tell) -> Iterator[Row]:
    """Yield the milliseconds a switch, by model, against both rivals."""
    tasks = 3 if settings.quick else TASKS
    for size in settings.models():
        with tempfile.TemporaryDirectory() as place:
            tell(f"{size}: making a bank of {tasks} tasks")
            make_bank(size, tasks, Path(place) / "bank")
            bank = MaskBank.from_pretrained(Path(place) / "bank")
            model = bank.attach(plain(size, settings.device))
        tell(f"{size}: switching in turns")
        ways = {SWITCH: switching(bank, model), COPY: copying(model), LORA: adapters(size, tasks, settings.device)}
        quick = settings.quick
        taken = turns(ways, 3 if quick else TURNS, device=settings.device, block=0.0 if quick else BLOCK)
        entries, rate = masked_entries(size), copy_rate(settings.device)
        least = 256 * DENSITY * entries / rate
        floor = f"{1000 * least:.2f} ms, {256 * DENSITY / 8:.2f} of the copy: two cache lines a kept entry, read and "
        floor += f"written, {entries / 1e6:.1f} M masked weights"
        under = {"model": size, "tasks": tasks, "density": DENSITY, "device": settings.device}
        for rival, mark in ((COPY, Mark(2.0)), (LORA, None)):
            row = in_ms(taken[SWITCH], taken[rival])
            yield Row("switch", "switch between loaded tasks", under, rival=rival, mark=mark, floor=floor, **row)


def switching(bank: MaskBank, model: Any) -> Callable[[], None]:
    """Return what activates the next task of an attached bank."""
    turn = [0]

    def switch() -> None:
        turn[0] += 1
        bank.activate(model, bank.tasks[turn[0] % len(bank.tasks)])

    return switch


def copying(model: Any) -> Callable[[], None]:
    """Return what copies all masked weights once."""
    weights = [layer.base_layer.weight.detach() for layer in model.base_model.mask_layers()]
    targets = [weight.clone() for weight in weights]

    def copy() -> None:
        for target, weight in zip(targets, weights, strict=True):
            target.copy_(weight)

    return copy


def adapters(size: str, count: int, device: str) -> Callable[[], None]:
    """Return what sets the next of as many LoRA adapters."""
    model, turn = with_lora(size, count, device), [0]
    names = [*model.peft_config]

    def set_adapter() -> None:
        turn[0] += 1
        model.set_adapter(names[turn[0] % len(names)])

    return set_adapter
