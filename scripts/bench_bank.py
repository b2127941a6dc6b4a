"""A bank of 1, 10 and 100 tasks: open, verify, activate from disk, switch, and the memory that serving takes.

Masks are random (density .01 of every masked layer of MiniLM or BERT-base), so their codes are as long as codes get.
Two rivals stand in the same run: one copy of the masked weights (the least that any dense switch costs), and PEFT's
`set_adapter` between as many LoRA r8 adapters. Switching between loaded tasks is timed apart from reading one.
run: python scripts/bench_bank.py [--model minilm|bert-base] [--tasks 1 10 100]
"""

import argparse
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from bench_step import MODELS, TARGETS
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_cl import MaskBank, MaskConfig
from hf_cl.layers.base import Base
from hf_cl.packing.grow import grow
from hf_cl.packing.shelf import BankShelf
from hf_cl.proof import probe_digest
from hf_cl.storage.bank_folder import FolderReader, write_bank
from hf_cl.training.masked import MaskedMethod, adapter_of

LABELS, DENSITY, TURNS = 15, 0.01, 15


def base_of(model: str) -> Any:
    """Return a randomly initialised classifier of a named size."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=30522, num_labels=LABELS, **MODELS[model])).eval()


def make_bank(model: str, count: int, folder: Path) -> None:
    """Write a bank of random masks; finished tasks are left on disk, so memory stays flat while it grows."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    base = Base(base_of(model), tokenizer, "random", ("classifier",))
    method = MaskedMethod(base, MaskConfig(density=DENSITY, scale=1.5, target_modules=TARGETS))
    records: list[dict[str, Any]] = []
    manifest = None
    for index in range(count):
        labels = [f"label {number}" for number in range(LABELS)]
        method.begin(index, tuple(labels))
        generator = torch.Generator().manual_seed(index)
        for layer in method.tuner.mask_layers():
            layer.hfcl_scores[adapter_of(index)].data.normal_(generator=generator)
        method.tuner.commit(adapter_of(index))
        method.activate(index)
        parts, probe = method.parts(index), probe_digest(method.model)
        records.append({
            "index": index, "name": f"task {index}", "labels": labels, "source": "memory:random", "facts": {},
            "parts": parts, "probe": probe, "metrics": {},
        })  # fmt: skip
        way = {"name": "supsup", "options": {}}
        held = manifest.digest if manifest is not None else None
        manifest, files = grow(method, records, way, base, before=manifest)
        read = FolderReader(folder)
        write_bank(
            folder, manifest, lambda entry, new=files, old=read: new.get(entry.name) or old(entry), expected=held
        )
        method.keep_on(BankShelf(manifest, read))


def timed(work: Callable[[], object], turns: int = TURNS) -> float:
    """Return the median milliseconds of a call."""
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def anonymous_mb() -> float:
    """Return this process's anonymous memory in MB."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1000
    return float("nan")


def measure(folder: Path, model: str, count: int) -> dict[str, Any]:
    """Return every figure of one bank."""
    found: dict[str, Any] = {"open_ms": timed(lambda: MaskBank.from_pretrained(folder))}
    bank = MaskBank.from_pretrained(folder)
    began = time.perf_counter()
    bank.verify()
    found["verify_ms_a_task"] = (time.perf_counter() - began) * 1000 / count
    base = base_of(model)
    before = anonymous_mb()
    began = time.perf_counter()
    attached: Any = bank.attach(base, [bank.tasks[0]])
    found["attach_first_ms"] = (time.perf_counter() - began) * 1000
    first = anonymous_mb()
    names = bank.tasks[: min(count, 10)]
    times = []
    for number in range(1, count):
        began = time.perf_counter()
        bank.activate(attached, bank.tasks[number])
        times.append((time.perf_counter() - began) * 1000)
        bank.activate(attached, bank.tasks[0])
        bank.detach(attached, bank.tasks[number])
    found["activate_from_disk_ms"] = statistics.median(times) if times else None
    found["attached_mb"], found["after_all_mb"] = first - before, anonymous_mb() - before
    for name in names:
        bank.activate(attached, name)
    found["loaded"] = len(names)
    weights = [layer.base_layer.weight.detach() for layer in attached.base_model.mask_layers()]
    targets = [weight.clone() for weight in weights]

    def copy() -> None:
        for target, weight in zip(targets, weights, strict=True):
            target.copy_(weight)

    lora: Any = get_peft_model(base_of(model), LoraConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS"))
    for number in range(1, len(names)):
        lora.add_adapter(f"a{number}", LoraConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS"))
    adapters, turn = [*lora.peft_config], [0]

    def switch() -> None:
        turn[0] += 1
        bank.activate(attached, names[turn[0] % len(names)])

    def set_adapter() -> None:
        turn[0] += 1
        lora.set_adapter(adapters[turn[0] % len(adapters)])

    # A single task is made active again: what a switch costs besides another mask.
    rounds = [(timed(switch, 5), timed(copy, 5), timed(set_adapter, 5)) for _ in range(TURNS)]
    for name, values in zip(("switch_ms", "copy_ms", "set_adapter_ms"), zip(*rounds, strict=True), strict=True):
        found[name] = statistics.median(values)
    ratios = sorted(a / b for a, b, _ in rounds)
    found["switch_to_copy"] = statistics.median(ratios)
    found["switch_to_copy_quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
    found["bytes_a_task"] = sum(task.file.bytes for task in bank.manifest.tasks) / count
    found["manifest_bytes"] = (folder / "bank.json").stat().st_size
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return found


def main() -> None:
    """Measure each size in a fresh process, and print a row of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is not None:
        print(json.dumps(measure(given.folder, given.model, given.tasks[0])))
        return
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    where = {**versions, "machine": platform.machine(), "threads": torch.get_num_threads()}
    for count in given.tasks:
        scratch = Path(tempfile.mkdtemp())
        try:
            began = time.perf_counter()
            make_bank(given.model, count, scratch / "bank")
            made = (time.perf_counter() - began) / count
            command = [sys.executable, __file__, "--model", given.model, "--tasks", str(count), "--folder"]
            done = subprocess.run([*command, str(scratch / "bank")], capture_output=True, text=True, check=True)
        finally:
            shutil.rmtree(scratch)
        row = {"model": given.model, "tasks": count, "density": DENSITY, "seconds_to_add_a_task": made}
        print(json.dumps({**row, **json.loads(done.stdout.splitlines()[-1]), **where}), flush=True)


if __name__ == "__main__":
    main()
