"""`results.json`: what a run measured, computed from its records; and what a person reads of it."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_cl.metrics import AccuracyMatrix

PACKAGES = ("hf-cl", "torch", "transformers", "peft", "datasets", "accelerate", "evaluate", "numpy")
CAPS = ("max_train", "max_validation", "max_test")


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def results(
    manifest: Mapping[str, Any],
    matrix: AccuracyMatrix,
    correct: Mapping[str, np.ndarray],
    verdict: Mapping[str, Any],
    seconds: Mapping[str, Any],
    tuning: Mapping[str, Any] | None,
    bank_bytes: int = 0,
) -> dict[str, Any]:
    """Return the content of `results.json`.

    Args:
        manifest: The run's manifest, all tasks finished.
        matrix: Accuracy of every task after every task.
        correct: By task, whether each row was answered rightly at the end of the stream; bool.
        verdict: What `hf-cl verify --json` said in a fresh process.
        seconds: Wall-clock seconds by what they were spent on.
        tuning: The grid and its outcome, or None.
        bank_bytes: Size of what the bank's tasks share, where there is a bank: manifest, and what routers know.
    """
    tasks: Sequence[Mapping[str, Any]] = manifest["tasks"]
    names = [task["name"] for task in tasks]

    def sizes(part: str) -> dict[str, int]:
        return {task["name"]: int(task["bytes"][part]) for task in tasks}

    return {
        "stream": manifest["stream"],
        "method": manifest["method"],
        "model": manifest["model"],
        "seed": manifest["seed"],
        "tasks": names,
        "most_rows": _most_rows(manifest.get("stream_tasks") or []),
        "training": manifest["training"],
        "max_length": manifest["max_length"],
        "split": manifest.get("split", "test"),
        "accuracy_matrix": matrix.to_list(),
        "correct": {name: bits_of(correct[name]) for name in names},
        "macro_f1": {name: tasks[-1]["metrics"][name]["macro_f1"] for name in names},
        "average_accuracy": matrix.average_accuracy,
        "backward_transfer": matrix.backward_transfer,
        "forgetting": matrix.forgetting,
        "learning_accuracy": matrix.learning_accuracy,
        "bytes_per_task": sizes("task"),
        "head_bytes_per_task": sizes("head"),
        "bytes_shared": int((manifest["shared"] or {}).get("bytes", 0)) + bank_bytes,
        "bytes_carried": sum(int(task["bytes"].get("carried", 0)) for task in tasks),
        "trainable_per_task": {task["name"]: task["facts"]["trainable"] for task in tasks},
        "capacity_used": tasks[-1]["facts"].get("capacity_used"),
        "facts": {task["name"]: task["facts"] for task in tasks},
        "owned_digest_before": {task["name"]: task["before"] for task in verdict["tasks"]},
        "owned_digest_after": {task["name"]: task["after"] for task in verdict["tasks"]},
        "exact": bool(verdict["exact"] and verdict["same_logits"]),
        "seconds": dict(seconds),
        "tuning": tuning,
        "versions": versions(),
    }


def bits_of(correct: np.ndarray) -> dict[str, Any]:
    """Return rows' answers for a file: their number, and a bit each as hexadecimal text, the first row's highest."""
    return {"rows": len(correct), "bits": np.packbits(correct).tobytes().hex()}


def _most_rows(specs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the caps on rows by task: two runs of one stream with other caps are not comparable."""
    caps = {spec["name"]: {key: spec[key] for key in CAPS if spec.get(key) is not None} for spec in specs}
    return {name: found for name, found in caps.items() if found}
