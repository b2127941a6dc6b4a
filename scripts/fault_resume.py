"""Interrupt jobs at random moments, break one rank, repeat: docs/benchmarks/processes.jsonl, one row a trial.

    python scripts/fault_resume.py --out docs/benchmarks/processes.jsonl      about 20 minutes on two busy cores

Tiny models, real training: three tasks of 18 steps (12 on two ranks), ExSSNeT with KKT. Jobs are forked as
tests/jobs.py says. Every trial is drawn from --seed; a row holds what was done, each rank's exit code, and whether the
bank's bytes are those of the run that nobody interrupted.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny
from jobs import Jobs

STEP = "hf_cl.training.keeping:Keeper.on_step_end"
BASE = ("training.num_train_epochs=6", "training.ddp_timeout=30")
SAVED = ("training.save_strategy=steps", "training.save_steps=2")
CHECKED = ("check_steps=2",)
PARTS = ("hfcl_bits", "owner", "hfcl_scores", "hfcl_values")
Row = dict[str, Any]


class Trials:
    """The recipe, the jobs, and what an uninterrupted run of each number of ranks has left."""

    def __init__(self, place: Path, seed: int) -> None:
        names = ("pets", "weather", "food")
        self.recipe = tiny.write_recipe(place / "recipe", tiny.save_base(place / "base"), names)
        self.jobs, self.place, self.draw = Jobs(), place, random.Random(seed)
        self.whole: dict[int, dict[str, bytes]] = {}
        self.seconds: dict[int, float] = {}
        for world in (1, 2):
            done = self.jobs.run(self.recipe, place / f"whole{world}", world, *BASE)
            assert set(done["codes"]) == {0}, done["said"]
            self.whole[world], self.seconds[world] = bank(place / f"whole{world}"), done["trained"]

    def interrupted(self, kind: str, number: int, world: int) -> Row:
        """Send a signal at a random moment to all ranks, or after a random step to one; resume until it is finished."""
        run, saved = self.place / "run", SAVED if kind == "SIGKILL" else ()
        codes, when = [0], {}
        while set(codes) == {0}:  # it was through before the signal came
            self.clear()
            when = self._moment(kind, number, world)
            codes = self.jobs.run(self.recipe, run, world, *BASE, *saved, **when)["codes"]
        states = sorted(place.name for place in (run / "state").glob("0*"))
        again = self.jobs.run(self.recipe, run, world, *BASE, *saved, resume=True)
        went_on = "goes on after step" in again["said"][0]
        found = {"codes": codes, "states": states, "resumed": again["codes"], "went_on_in_a_task": went_on}
        return {"trial": kind, "world": world, **when, **found, "good": bank(run) == self.whole[world]}

    def _moment(self, kind: str, number: int, world: int) -> Row:
        if number % 2:
            what, step = {"SIGKILL": "die", "SIGTERM": "term"}[kind], self.draw.randrange(1, 54 // world + 1)
            return {"where": STEP, "what": what, "at": step, "on": self.draw.randrange(world)}
        after = round(self.draw.uniform(0.0, 0.8) * self.seconds[world], 2)
        return {"after" if kind == "SIGKILL" else "signal_after": after}

    def torn(self, number: int, world: int) -> Row:
        """Kill a job, damage its newest state, resume."""
        run, step = self.place / "run", self.draw.randrange(5, 17)
        first = self.jobs.run(self.recipe, run, 1, *BASE, *SAVED, where=STEP, what="die", at=step)
        newest = max((run / "state").glob("0*"))
        file = newest / self.draw.choice(["tensors.safetensors", "trainer_state.json"])
        data = bytearray(file.read_bytes())
        data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(data[: self.draw.choice([len(data), len(data) // 2])])
        again = self.jobs.run(self.recipe, run, 1, *BASE, *SAVED, resume=True)
        named = "passed over" in again["said"][0] and newest.name in again["said"][0]
        good = named and f"from {newest}" not in again["said"][0] and bank(run) == self.whole[1]
        return {
            "trial": "torn",
            "world": 1,
            "state": newest.name,
            "file": file.name,
            "codes": first["codes"],
            "good": good,
        }

    def flipped(self, number: int, world: int) -> Row:
        """Change one bit on rank 1; every rank must say so at the next comparison, two steps on at most."""
        part, step = self.draw.choice(PARTS), self.draw.randrange(3, 26)
        what = f"bit:{part}:{number}"
        done = self.jobs.run(
            self.recipe, self.place / "run", world, *BASE, *CHECKED, where=STEP, what=what, at=step, on=1
        )
        lines = [line for text in done["said"] for line in text.splitlines() if line.startswith("error: RankError")]
        good = len(lines) == world and all("rank 1 differs from rank 0" in line for line in lines)
        said = lines[0].split(". All ranks")[0].removeprefix("error: RankError: ") if lines else ""
        return {
            "trial": "bit",
            "world": world,
            "part": part,
            "step": step,
            "codes": done["codes"],
            "said": said,
            "good": good,
        }

    def killed(self, number: int, world: int) -> Row:
        """Kill one rank at a random step; the others must end by themselves."""
        step, on = self.draw.randrange(2, 26), self.draw.randrange(world)
        done = self.jobs.run(self.recipe, self.place / "run", world, *BASE, where=STEP, what="die", at=step, on=on)
        late = max(done["ended"]) - done["ended"][on]
        good = late < 60 and all(code not in (0, None) for code in done["codes"])
        return {
            "trial": "dead rank",
            "world": world,
            "rank": on,
            "codes": done["codes"],
            "others_s": round(late, 2),
            "good": good,
        }

    def repeated(self, number: int, world: int) -> Row:
        """Run twice from the start."""
        banks = []
        for _ in range(2):
            self.clear()
            done = self.jobs.run(self.recipe, self.place / "run", world, *BASE)
            banks.append(bank(self.place / "run"))
        return {"trial": "repeat", "world": world, "codes": done["codes"], "good": banks[0] == banks[1]}

    def clear(self) -> None:
        """Remove the last trial's run."""
        shutil.rmtree(self.place / "run", ignore_errors=True)


def bank(run: Path) -> dict[str, bytes]:
    """Return a run's bank, file by file."""
    files = [file for file in (run / "bank").glob("*") if file.suffix in (".json", ".safetensors")]
    return {file.name: file.read_bytes() for file in files}


def plan(trials: Trials) -> Iterator[tuple[Callable[[int, int], Row], int]]:
    """Yield each trial and its number of ranks."""
    for world in (1, 2):
        yield from ((lambda number, ranks: trials.interrupted("SIGKILL", number, ranks), world) for _ in range(10))
        yield from ((lambda number, ranks: trials.interrupted("SIGTERM", number, ranks), world) for _ in range(5))
    yield from ((trials.torn, 1) for _ in range(10))
    yield from ((trials.flipped, 2) for _ in range(20))
    yield from ((trials.killed, 2) for _ in range(10))
    yield from ((trials.repeated, world) for world in (2, 4))


def main() -> int:
    """Run all trials; return 1 if one was not good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="File of JSON lines; replaced.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    good: Counter[str] = Counter()
    every: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch, args.out.open("w") as out:
        trials = Trials(Path(scratch), args.seed)
        for number, (trial, world) in enumerate(plan(trials)):
            trials.clear()
            began = time.monotonic()
            row = {"number": number, **trial(number, world), "seconds": round(time.monotonic() - began, 1)}
            every[row["trial"]] += 1
            good[row["trial"]] += row["good"]
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(row, flush=True)
        trials.jobs.close()
    for name, count in every.items():
        print(f"{name}: {good[name]} of {count}")
    return int(good != every)


if __name__ == "__main__":
    sys.exit(main())
