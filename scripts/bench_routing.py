"""Texts without a task id: a run's bank by each router, and nearest mean with one LoRA a task, the honest opponent.

run: python scripts/bench_routing.py OUT.jsonl RUN [--lora RUN] [--out-of-scope FILE] [--router NAME ...]

A row a router. The opponent's tasks are found by the same features and means as `nearest_mean` finds ours, and what its
adapters answered rightly with the task given stands in the `results.json` of its run, one bit a test row.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_cl.bank import MaskBank
from hf_cl.cli.banks import base_of
from hf_cl.config import read
from hf_cl.data import Task, TaskSpec, collator, read_texts, tokenise
from hf_cl.evaluate_bank import evaluate_bank, load_rows
from hf_cl.layers.base import Base

OPPONENT = "nearest_mean"
BATCH = 64


def found_by(router: Any, base: Base, task: Task, max_length: int) -> np.ndarray:
    """Return the place of the task that each test row is sent to, in the order of the rows."""
    rows, collate, places = tokenise(task, base.tokenizer, max_length)["test"], collator(base.tokenizer), []
    for at in range(0, len(rows), BATCH):
        inputs = dict(collate([rows[row] for row in range(at, min(at + BATCH, len(rows)))]))
        del inputs["labels"]
        places.append(router.confidences(inputs).argmax(1))
    return torch.cat(places).numpy()


def right_of(results: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return by task which test rows a run answered rightly."""
    held = results["correct"]
    bits = {name: np.frombuffer(bytes.fromhex(found["bits"]), np.uint8) for name, found in held.items()}
    return {name: np.unpackbits(bits[name], count=found["rows"]).astype(bool) for name, found in held.items()}


def measure(run: Path, lora: Path | None, texts: list[str] | None, routers: list[str]) -> list[dict[str, Any]]:
    """Return a row a router, and the opponent's."""
    told = json.loads((run / "results.json").read_text("utf-8"))
    bank = MaskBank.from_pretrained(run / "bank")
    named = json.loads((run / "run.json").read_text("utf-8"))["stream_tasks"]
    tasks = load_rows(bank.manifest, [read(TaskSpec, spec, "run.stream_tasks") for spec in named])
    base, length = base_of(bank, told["model"]), told["max_length"]
    shared = {"stream": told["stream"], "method": told["method"]["name"], "seed": told["seed"]}
    found = evaluate_bank(bank, base, tasks, routers, max_length=length, out_of_scope=texts, progress=print)
    rows = [{**shared, "router": name, **row} for name, row in found["routers"].items()]
    if lora is None:
        return rows
    base = base_of(bank, told["model"])
    router = bank.router(OPPONENT, bank.attach(base.model))
    theirs = json.loads((lora / "results.json").read_text("utf-8"))
    right = right_of(theirs)
    hits = {name: found_by(router, base, tasks[name], length) == place for place, name in enumerate(bank.tasks)}
    both = np.concatenate([hits[name] & right[name] for name in bank.tasks])
    opponent = {
        "router": OPPONENT,
        "method": f"lora r{theirs['method']['options']['r']}",
        "seed": theirs["seed"],
        "routing_accuracy": float(np.concatenate([hits[name] for name in bank.tasks]).mean()),
        "class_incremental_accuracy": float(both.mean()),
        "task_given_accuracy": float(np.concatenate([right[name] for name in bank.tasks]).mean()),
    }
    return [*rows, {**shared, **opponent}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--out-of-scope", type=Path)
    parser.add_argument("--router", action="append", default=[])
    asked = parser.parse_args()
    strangers = list(read_texts(asked.out_of_scope)) if asked.out_of_scope else None
    with asked.out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in measure(asked.run, asked.lora, strangers, asked.router))
