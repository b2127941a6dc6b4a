"""Merging three checkpoints of BERT-base size on disk: seconds and peak memory, beside mergekit in the same run.

Weights are random, saved in shards of 150 MB. Each merge runs in a process of its own; the clock starts after the
imports, and memory is the most anonymous memory from then on, above what was held then. mergekit is no dependency: give
the Python of an environment that has it.
run: python scripts/bench_merge.py --mergekit-python VENV/bin/python [--out docs/benchmarks/merge.jsonl]
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RULES = {"average": {}, "task_arithmetic": {"scale": 0.3}, "ties": {"density": 0.2}}
"""Our rules and their options; mergekit's own names stand in `CONFIGS`. Its TIES trims each tensor by itself."""
CONFIGS = {
    "average": ("linear", {}, {}),
    "task_arithmetic": ("task_arithmetic", {"normalize": False, "lambda": 0.3}, {}),
    "ties": ("ties", {"normalize": True}, {"density": 0.2}),
}
MODELS = 3


def make(folder: Path) -> None:
    """Write a base and models a little way from it."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=30522))
    base.save_pretrained(folder / "base", max_shard_size="150MB")
    for number in range(MODELS):
        model = BertForSequenceClassification(base.config)
        model.load_state_dict({name: value + 0.01 * torch.randn_like(value) for name, value in base.state_dict().items()
                               if value.is_floating_point()}, strict=False)  # fmt: skip
        model.save_pretrained(folder / f"model-{number}", max_shard_size="150MB")


def ours(rule: str, folder: Path, out: Path) -> None:
    """Merge by this package; heads too, as mergekit does."""
    from transformers import MODEL_MAPPING, BertConfig

    from hf_cl import merge_checkpoints

    assert MODEL_MAPPING[BertConfig]  # what is imported late is imported now
    models = [folder / f"model-{number}" for number in range(MODELS)]
    timed(lambda: merge_checkpoints(rule, folder / "base", models, out, options=RULES[rule], heads="merge"))


def theirs(rule: str, folder: Path, out: Path) -> None:
    """Merge by mergekit."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    method, parameters, each = CONFIGS[rule]
    models = [{"model": str(folder / f"model-{n}"), "parameters": {"weight": 1.0, **each}} for n in range(MODELS)]
    config: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "float32"}
    if method != "linear":
        config["base_model"] = str(folder / "base")
    made = MergeConfiguration.model_validate(config)
    timed(lambda: run_merge(made, str(out), MergeOptions(quiet=True, copy_tokenizer=False)))


def timed(work: Any) -> None:
    """Say when the imports are done, and how long the work took."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.readline() != "go\n":
        return
    began, spent = time.perf_counter(), time.process_time()
    work()
    found = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - spent}
    sys.stdout.write(json.dumps(found) + "\n")


def anonymous(pid: int) -> int:
    """Return a process's anonymous memory in bytes; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def measure(python: str, tool: str, rule: str, folder: Path) -> dict[str, Any]:
    """Return the figures of one merge in a process of its own."""
    out = folder / f"{tool}-{rule}"
    shutil.rmtree(out, ignore_errors=True)
    command = [python, __file__, "--child", tool, "--rule", rule, "--folder", str(folder), "--to", str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        while (line := child.stdout.readline()) not in ("ready\n", ""):
            pass
        held, peak, done = anonymous(child.pid), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                peak[0] = max(peak[0], anonymous(child.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        rest, _ = child.communicate("go\n")
        done.set()
        watcher.join()
    if child.returncode or not line:
        raise SystemExit(f"{tool} {rule} failed")
    figures = json.loads(rest.strip().splitlines()[-1])
    return {"tool": tool, "rule": rule, **{name: round(value, 2) for name, value in figures.items()},
            "peak_mb_above_imports": round(max(0, peak[0] - held) / 1e6, 1)}  # fmt: skip


def main() -> int:
    """Run every merge, in turns, and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit-python")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--child", choices=("ours", "mergekit"))
    parser.add_argument("--rule", choices=tuple(RULES))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    if args.child:
        (ours if args.child == "ours" else theirs)(args.rule, args.folder, args.to)
        return 0
    tools = {"ours": sys.executable, **({"mergekit": args.mergekit_python} if args.mergekit_python else {})}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder)
        rows = []
        for rule, turn, tool in itertools.product(RULES, range(args.turns), tools):
            load = round(os.getloadavg()[0], 1)
            found = measure(tools[tool], tool, rule, folder)
            here = {"threads": os.environ.get("OMP_NUM_THREADS"), "load": load, "cores": os.cpu_count()}
            rows.append(json.dumps({**found, "turn": turn, **here, "machine": platform.machine()}))
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    if args.out:
        args.out.write_text("".join(f"{row}\n" for row in rows), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
