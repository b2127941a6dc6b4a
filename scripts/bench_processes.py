"""Learn three tasks on one, two and four ranks of a CPU: docs/benchmarks/ranks.jsonl, one row a job.

    python scripts/bench_processes.py docs/benchmarks/ranks.jsonl [--only NUMBER ...]     (HF_CL_DATA as for the recipe)

ExSSNeT with KKT on the first three domains of CLINC150, the same global batch of 32 whatever the number of ranks, each
rank with one thread. A row holds accuracy, the digest of the bank's files, milliseconds a step of each phase and the
bytes a rank gave to be reduced in it. About 20 minutes on two cores; nothing else may run, or times say nothing.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = "clinc10__exssnet"
OVERRIDES = ["stream={name: clinc10, first: 3}", "tuning=null", "training.use_cpu=true", "training.disable_tqdm=true"]
BATCH = 32
JOBS: list[dict[str, Any]] = [
    *({"ranks": 1, "seed": seed} for seed in (0, 1, 2)),
    *({"ranks": ranks, "repeat": repeat} for ranks in (2, 4) for repeat in (0, 1)),
    {"ranks": 2, "accumulation": 2},
    *({"ranks": ranks, "bf16": True} for ranks in (1, 2)),
]
SETTINGS = {"seed": 0, "repeat": 0, "accumulation": 1, "bf16": False}


def rank(out: Path, overrides: list[str]) -> None:
    """Be one rank of a job: learn, and on rank 0 write what was seen."""
    from transformers import TrainerCallback

    from hf_cl import ranks
    from hf_cl.data import load_task, read_stream
    from hf_cl.from_recipe import build_learner
    from hf_cl.recipe import data_dir, load
    from hf_cl.training import train_task

    class Steps(TrainerCallback):
        """Keeps the seconds of each optimizer step, its accumulated forwards included, by phase."""

        def __init__(self) -> None:
            self.seconds: dict[str, list[float]] = {"mask": [], "weight": []}

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began, self.now = time.perf_counter(), phase()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds[self.now].append(time.perf_counter() - self.began)

    class Noted(train_task.Reduction):
        """A reduction that this job still knows when the task is over."""

        made: "list[Noted]" = []

        def __init__(self, method: Any) -> None:
            super().__init__(method)
            self.made.append(self)

    train_task.Reduction = Noted  # type: ignore[misc]
    recipe = load(RECIPE, overrides)
    ranks.join(cpu=True)
    tasks = [load_task(spec, recipe.root) for spec in read_stream(recipe.stream, data_dir=data_dir(), root=recipe.root)]
    with tempfile.TemporaryDirectory() as scratch:
        learner = build_learner(recipe, Path(scratch))

        def phase() -> str:
            return learner.method.tuner.phase(learner.method.tuner.active_adapter)

        steps = Steps()
        learner.callbacks = (steps,)
        accuracy = [learner.learn(task)["metrics"][task.name]["accuracy"] for task in tasks]
        kkt = [record["facts"]["kkt"]["source"] for record in learner.records]
        bank = Path(scratch) / "bank"
        learner.save_bank(bank)
        if ranks.rank() == 0:
            sent = Noted.made[0].sent if Noted.made else []  # of the first task: every step of a phase sends the same
            found = {
                "accuracy": accuracy,
                "kkt": kkt,
                "bank": digest(bank),
                "step_ms": {name: round(1e3 * statistics.median(spent), 1) for name, spent in steps.seconds.items()},
                "sent": {"mask": sent[1], "weight": sent[-1]} if sent else None,
            }
            out.write_text(json.dumps(found), "utf-8")
    ranks.leave(0)


def digest(folder: Path) -> str:
    """Return the sha256 of all files below a folder, with their names."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            found.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def job(settings: dict[str, Any]) -> dict[str, Any]:
    """Launch one job with torchrun and return its row."""
    world, parts = settings["ranks"], settings["accumulation"]
    overrides = [
        *OVERRIDES,
        f"training.per_device_train_batch_size={BATCH // world // parts}",
        f"training.gradient_accumulation_steps={parts}",
        f"training.bf16={str(settings['bf16']).lower()}",
        f"training.seed={settings['seed']}",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        began = time.perf_counter()
        subprocess.run([*launcher, __file__, "--rank", str(out), *overrides], env=one_thread(), check=True)
        return {**settings, **json.loads(out.read_text("utf-8")), "seconds": round(time.perf_counter() - began, 1)}


def one_thread() -> dict[str, str]:
    """Return the environment of a rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def main(arguments: list[str]) -> None:
    """Run the jobs one after another; each row is written as soon as it is there."""
    if arguments[0] == "--rank":
        return rank(Path(arguments[1]), arguments[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", type=int, nargs="*", default=range(len(JOBS)), help="numbers of jobs")
    chosen = parser.parse_args(arguments)
    for number in chosen.only:
        row = job(SETTINGS | JOBS[number])
        with chosen.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number + 1}/{len(JOBS)} {row}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
