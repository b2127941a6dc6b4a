"""One training step: mask phase, weight phase, LoRA r8, full fine-tuning with and without its embeddings.

Every way is built once in one process and all take turns, a block of steps each, so that a drifting machine touches
all alike; a ratio is the median over turns of the ratio to full fine-tuning with frozen embeddings in the same turn.
A step is forward, backward, clipping at 1, the Trainer's default AdamW, and what masks need between steps: refreshing
them, or writing values. Peak memory is measured alone, in a fresh process a way, above what it holds after imports.
run: python scripts/bench_step.py [--model minilm|bert-base] [--length 32 128] [--device cpu|cuda] [--dtype float32]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_cl import MaskConfig

MODELS = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
WAYS = ("full", "full_frozen_embeddings", "lora_r8", "mask_phase", "weight_phase")
RIVAL = "full_frozen_embeddings"
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
BATCH, LABELS = 32, 15


class Way:
    """One way to train: its model, its optimizer, and what it does between steps."""

    def __init__(self, name: str, model: str, length: int, device: str, dtype: str) -> None:
        torch.manual_seed(0)
        config = BertConfig(vocab_size=30522, num_labels=LABELS, **MODELS[model])
        base = BertForSequenceClassification(config).to(device)
        self.between: Callable[[], object] = lambda: None
        self.model: nn.Module = base
        if name == RIVAL:
            base.bert.embeddings.requires_grad_(False)
        elif name == "lora_r8":
            lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="SEQ_CLS")
            self.model = get_peft_model(base, lora)
        elif name != "full":
            self.model = self._masked(base, name)
        self.model.train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        self.parameters, self.autocast = parameters, dtype == "bfloat16"
        ids = torch.randint(1000, 30000, (BATCH, length), device=device)
        labels = torch.randint(LABELS, (BATCH,), device=device)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def _masked(self, base: Any, name: str) -> nn.Module:
        trains = "claimed" if name == "weight_phase" else "nothing"
        config = MaskConfig(task_type="SEQ_CLS", density=0.01, scale=1.5, trains=trains, num_labels=LABELS)
        model: Any = get_peft_model(base, config, adapter_name="task")
        tuner = model.base_model
        tuner.refresh_masks("task")
        self.between = lambda: tuner.refresh_masks("task")
        if name == "weight_phase":
            tuner.begin_weight_phase("task")
            self.between = lambda: [layer.write_values() for layer in tuner.mask_layers()]
        return model  # type: ignore[no-any-return]

    def step(self) -> None:
        """Take one training step."""
        device = self.inputs["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            loss = self.model(**self.inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 1.0)
        self.optimizer.step()
        self.between()
        self.optimizer.zero_grad(set_to_none=True)


def timed(way: Way, steps: int) -> float:
    """Return seconds a step."""
    on_gpu = way.inputs["input_ids"].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        way.step()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def speeds(args: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """Return a row a way: milliseconds a step with spread, and the ratio to the rival in the same turns."""
    ways = {name: Way(name, args.model, length, args.device, args.dtype) for name in WAYS}
    for way in ways.values():
        timed(way, 3)
    turns: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(args.turns):
        order = WAYS if turn % 2 else tuple(reversed(WAYS))
        for name in order:
            turns[name].append(timed(ways[name], args.steps))
    rows = []
    for name in WAYS:
        ratios = [own / rival for own, rival in zip(turns[name], turns[RIVAL], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "way": name,
                "model": args.model,
                "batch": BATCH,
                "length": length,
                "device": args.device,
                "dtype": args.dtype,
                "ms": round(1000 * statistics.median(turns[name]), 1),
                "ratio": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "peak_mb": peak_alone(name, args, length),
            }
        )
    return rows


def peak_alone(name: str, args: argparse.Namespace, length: int) -> float:
    """Return the peak memory of a few steps in a process of its own, in MB (10^6 bytes)."""
    command = [sys.executable, __file__, "--peak-of", name, "--model", args.model, "--length", str(length)]
    command += ["--device", args.device, "--dtype", args.dtype]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak(name: str, args: argparse.Namespace) -> float:
    """Return this process's peak in MB: on a CPU resident above what imports took, on CUDA allocated."""
    before = resident("VmRSS")
    way = Way(name, args.model, args.length[0], args.device, args.dtype)
    for _ in range(3):
        way.step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Return a field of this process's memory, in MB; the kernel's own account, since `ru_maxrss` survives an exec."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def main() -> None:
    """Print the machine, then a row a way and length, as JSON lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=tuple(MODELS), default="minilm")
    parser.add_argument("--length", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--peak-of", choices=WAYS)
    args = parser.parse_args()
    if args.peak_of:
        print(peak(args.peak_of, args))
        return
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    print(
        json.dumps(
            {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()} | versions
        )
    )
    for length in args.length:
        for row in speeds(args, length):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
