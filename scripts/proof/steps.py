"""One method's proof: learn ten, verify all, again and again; then reload, export, route, and spoil a copy."""

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from proof.ledger import Ledger, Settings
from proof.shell import Shell
from proof.spoil import WAYS

from hf_cl.ownership.digest import task_digest
from hf_cl.storage.bank_folder import read_manifest
from hf_cl.storage.disk import write_atomic
from hf_cl.storage.run_folder import BANK, RESULTS, RunFolder

DENSITY = 0.005
"""100 masks of this density leave about six tenths of the store free; of .01 they would leave about a third."""
TRAINING = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "max_length": 32,
    "use_cpu": True,  # so that bits are compared where they were taken
    "disable_tqdm": True,
}
ROUTER = "nearest_mean"
TEXTS = 8
"""Test rows on which an exported task and the bank's must give the same logits."""
LEARNED = re.compile(r"^\[(\d+)/\d+\] (.*)$")

TaskPlace = Mapping[str, str]
"""A task as a recipe lists it: its name, and the folder of its rows."""


class Proof:
    """The steps in their order; each is left out where the ledger has it."""

    def __init__(
        self,
        method: str,
        settings: Settings,
        stream: Sequence[TaskPlace],
        out: Path,
        shell: Shell,
        ledger: Ledger,
    ) -> None:
        """Take what to prove, on which tasks, the method's folder, what runs commands and what holds their outcome."""
        self.method, self.settings, self.stream, self.out = method, settings, list(stream), out
        self.shell, self.ledger = shell, ledger
        self.tens = [self.stream[at : at + settings.every] for at in range(0, len(stream), settings.every)]
        self.training = {**TRAINING, "seed": settings.seed}
        spread = sorted({0, len(stream) // 2, len(stream) - 1})
        self.rows = {stream[place]["name"]: _texts(Path(stream[place]["dataset"])) for place in spread}
        self._began, self._learned = time.monotonic(), 0

    def prove(self) -> None:
        """Do what is still to be done; end where something has moved.

        Raises:
            Stopped: A signal asked for it.
            Failed: A command ended with an error.
        """
        for number in range(len(self.tens)):
            if (self.run(number) / RESULTS).is_file():
                continue
            if number and not self.verify(number - 1):
                return
            self.learn(number)
        if not self.verify(len(self.tens) - 1):
            return
        steps = {"measured": self.measure, "exported": self.export, "routed": self.route, "controls": self.control}
        for name, step in steps.items():
            if name not in self.ledger.of(self.method):
                began = time.monotonic()
                self.ledger.note(self.method, **{name: step()})
                self.say(f"{name}, {time.monotonic() - began:.0f} s")

    def say(self, line: str) -> None:
        """Print a line of this method's."""
        print(f"{self.method}: {line}", flush=True)

    def run(self, number: int) -> Path:
        """Return the run folder of the `number`-th ten tasks, from 0."""
        return self.out / f"{number:02d}"

    @property
    def bank(self) -> Path:
        """The last bank, of all tasks."""
        return self.run(len(self.tens) - 1) / BANK

    # --- learn and verify ----------------------------------------------------------------------------

    def learn(self, number: int) -> None:
        """Learn ten tasks on top of the bank of those before."""
        recipe = self.recipe(f"{number:02d}", self.tens[number])
        command = ["hf-cl", "train", str(recipe), "--output-dir", str(self.run(number)), "--resume", "--json"]
        if number:
            command += ["--from-bank", str(self.run(number - 1) / BANK)]
        self.shell.run(command, tell=lambda line: self._tell(number, line))

    def recipe(self, name: str, tasks: Sequence[TaskPlace]) -> Path:
        """Write a recipe of some of the tasks; return its file."""
        content = {
            "model": self.settings.model,
            "stream": {"tasks": [dict(task) for task in tasks]},
            "method": {"name": self.method, "density": DENSITY},
            "training": self.training,
            "evaluate": "changed",
        }
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / f"{name}.yaml"
        write_atomic(file, yaml.safe_dump(content, sort_keys=False).encode())
        return file

    def _tell(self, number: int, line: str) -> None:
        """Say that a task is learned, the most that one of its ten has lost, and how long the rest will take."""
        found = LEARNED.match(line)
        if found is None:
            return
        self._learned += 1
        done, of = number * self.settings.every + int(found[1]), len(self.stream)
        records = RunFolder.open(self.run(number)).tasks
        last = records[-1]["metrics"]
        lost = max(accuracy(record) - last[record["name"]]["accuracy"] for record in records)
        left = (time.monotonic() - self._began) / self._learned * (of - done) / 60
        self.say(f"task {done} of {of}: {found[2]}; forgetting so far {lost:g}; {left:.0f} min to the last task")

    def records(self, upto: int) -> list[dict[str, Any]]:
        """Return the tasks' records as they were written at their commits, of the tens up to a number."""
        return [task for number in range(upto + 1) for task in RunFolder.open(self.run(number)).tasks]

    def verify(self, number: int) -> bool:
        """Verify the bank of the first tens in a process of its own; return whether nothing has moved.

        The ledger keeps the digests that a task had when they were first read, so no later file can change its mind.
        """
        held, began = self.ledger.of(self.method), time.monotonic()
        commits = {record["name"]: task_digest(record["parts"]) for record in self.records(number)} | held["commits"]
        bank = str(self.run(number) / BANK)
        code, output = self.shell.run(["hf-cl", "verify", bank, "--base", self.settings.model, "--json"], fine=1)
        found = json.loads(output)
        after = {task["name"]: task["after"] for task in found["tasks"]}
        moved = [name for name, digest in commits.items() if after.get(name) != digest]
        check = {
            "tasks": len(commits),
            "exact": code == 0 and not moved,
            "same_logits": bool(found["same_logits"]),
            "moved": moved,
            "files": found["files"],
            "seconds": round(time.monotonic() - began, 1),
        }
        others = [other for other in held["checks"] if other["tasks"] != check["tasks"]]
        self.ledger.note(self.method, commits=commits, checks=[*others, check])
        good = check["exact"] and check["same_logits"]
        what = "as at their commit, probe logits too" if good else f"MOVED: {', '.join(moved) or 'probe logits'}"
        self.say(f"{len(commits)} tasks verified in a fresh process, {check['seconds']:.0f} s: {what}")
        return bool(good)

    # --- reload, export, route -----------------------------------------------------------------------

    def measure(self) -> dict[str, Any]:
        """Measure every task anew from the last bank, and compare with what was measured at its commit."""
        request = {
            "bank": str(self.bank),
            "model": self.settings.model,
            "tasks": self.stream,
            "rows": self.rows,
            "training": self.training,
        }
        _, output = self.shell.run(["answers.py", "bank"], given=json.dumps(request))
        answers, records = json.loads(output), self.records(len(self.tens) - 1)
        now, then = answers["metrics"], {record["name"]: record["metrics"][record["name"]] for record in records}
        return {
            "tasks": len(now),
            "differ": [name for name, metrics in then.items() if now.get(name) != metrics],
            "forgetting": max(accuracy(record) - now[record["name"]]["accuracy"] for record in records),
            "average_accuracy": sum(map(accuracy, records)) / len(records),
            "store_used": records[-1]["facts"]["capacity_used"],
            "bytes": sum(file.stat().st_size for file in self.bank.iterdir()),
            "seconds_a_task": round(sum(record["seconds"] for record in records) / len(records), 1),
            "environment": read_manifest(self.bank).tasks[-1].environment,
            "logits": answers["logits"],
        }

    def export(self) -> dict[str, Any]:
        """Export some tasks as plain checkpoints, and compare their logits with those of the bank."""
        found, logits = {}, self.ledger.of(self.method)["measured"]["logits"]
        for place, (name, rows) in enumerate(self.rows.items()):
            folder = self.out / f"exported-{place}"
            shutil.rmtree(folder, ignore_errors=True)
            base = ["--base", self.settings.model]
            self.shell.run(["hf-cl", "export", str(self.bank), name, "--out", str(folder), *base])
            request = {"checkpoint": str(folder), "rows": rows, "max_length": self.training["max_length"]}
            _, output = self.shell.run(["answers.py", "checkpoint"], given=json.dumps(request))
            answer = json.loads(output)
            found[name] = {"same_logits": answer["logits"] == logits[name], "without_hf_cl": answer["without_hf_cl"]}
            shutil.rmtree(folder)  # a whole encoder each
        return found

    def route(self) -> dict[str, Any]:
        """Answer all test texts without a task id."""
        rows = ["--recipe", str(self.recipe("all", self.stream)), "--max-length", str(self.training["max_length"])]
        way = ["--router", ROUTER, "--base", self.settings.model, "--json"]
        _, output = self.shell.run(["hf-cl", "eval", str(self.bank), "--no-task-id", *rows, *way])
        found = json.loads(output)
        return {"texts": found["texts"], "router": ROUTER, **found["routers"][ROUTER]}

    # --- what must fail ------------------------------------------------------------------------------

    def control(self) -> dict[str, Any]:
        """Verify copies of the bank in which one bit of the first task's mask is another."""
        first, found = read_manifest(self.bank).tasks[0], {}
        for name, spoil in WAYS.items():
            copy = self.out / "control"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.bank, copy)
            spoil(copy)
            verify = ["hf-cl", "verify", str(copy), "--base", self.settings.model, "--json"]
            code, output = self.shell.run(verify, fine=1)
            said = json.loads(output)
            named = [task["name"] for task in said["tasks"] if task["moved"]]
            named += [
                first.name for problem in said["files"] if repr(first.name) in problem or first.file.name in problem
            ]
            found[name] = {"exit_code": code, "names_it": first.name in named}
            shutil.rmtree(copy)
        return found


def accuracy(record: Mapping[str, Any]) -> float:
    """Return the accuracy that a task had at its commit."""
    return float(record["metrics"][record["name"]]["accuracy"])


def _texts(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "test.jsonl").read_text("utf-8").split("\n")[:TEXTS]
    return [{key: text for key, text in json.loads(line).items() if key != "label"} for line in lines]
