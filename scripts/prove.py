"""The proof in the open: 100 small tasks in sequence, verified bit for bit after every tenth; export, reload, route.

    HF_CL_DATA=FOLDER python scripts/prove.py                     # `make prove`
    HF_CL_DATA=FOLDER python scripts/prove.py --tasks 6 --methods exssnet

Nothing is learned, verified, exported or routed in this process. Each step is a command in a process of its own that
knows nothing but the files of the step before; `commands.txt` lists them, to be repeated by hand:

    hf-cl train        ten tasks, on top of the bank of the tens before
    hf-cl verify       every digest of every task so far, and its probe logits, from the bank's files
    answers.py         every task measured anew from the last bank; logits of the first, the middle and the last task
    hf-cl export       these as plain checkpoints, which answer without hf_cl
    hf-cl eval         all test texts without a task id: reported, not promised
    hf-cl verify       on copies of the bank with one bit changed, which must be found

The methods are proved side by side. The same command again goes on where it stopped, and verifies first what is there.
`prove.json` holds what was found. Exit codes: 0 all promises held, 1 not, 2 bad input, 75 stopped by a signal.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from proof.ledger import Ledger, Settings, judge
from proof.shell import Failed, Shell, Stopped
from proof.steps import Proof
from proof.tasks import cut

from hf_cl.cli.app import BAD_INPUT, STOPPED
from hf_cl.cli.quiet import libraries
from hf_cl.errors import ConfigError, HfClError
from hf_cl.recipe import data_dir

METHODS = ("exssnet", "supsup")
TASKS = 100
WORDS = {True: "held", False: "NOT HELD", None: "measured"}


def prove(settings: Settings, out: Path, make_shell: Any = Shell) -> int:
    """Prove, or go on with it; return the exit code.

    Args:
        settings: What to prove.
        out: The folder that holds it.
        make_shell: Makes what runs the commands.

    Raises:
        HfClError: Bad input.
    """
    data = data_dir()
    if data is None or not data.is_dir():
        found = "is not set" if data is None else f"{data} is no folder"
        raise ConfigError(
            f"HF_CL_DATA: {found}. Set it to the folder of data sets that the tasks are cut from: a folder each, with "
            f"train, validation and test as parquet, csv or jsonl."
        )
    out.mkdir(parents=True, exist_ok=True)
    began, shell = time.monotonic(), make_shell(out, settings.threads)
    handlers = {number: signal.signal(number, shell.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ledger = Ledger(out / "prove.json", settings)
        with libraries():
            tasks = cut(data, settings.tasks, out / "tasks", settings.seed)
        if ledger.content.setdefault("tasks", tasks) != tasks:
            raise ConfigError(f"{out}: its tasks were cut from other data than {data} holds now. Remove the folder.")
        stream = [{"name": task["name"], "dataset": task["dataset"]} for task in tasks]
        proofs = {name: Proof(name, settings, stream, out / name, shell, ledger) for name in settings.methods}
        failures = _side_by_side(proofs)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        shell.close()
    seconds = round(ledger.content["seconds"] + time.monotonic() - began, 1)
    if None in failures.values():
        ledger.put(seconds=seconds)
        print("stopped; the same command goes on")
        return STOPPED
    promises = {name: judge(ledger.of(name), settings) for name in settings.methods}
    held = not failures and all(one["held"] is not False for found in promises.values() for one in found)
    ledger.put(seconds=seconds, held=held, promises=promises, failures=failures)
    show(ledger.content)
    print(f"{out / 'prove.json'}; {seconds / 60:.1f} min in all")
    return 0 if held else 1


def _side_by_side(proofs: Mapping[str, Proof]) -> dict[str, str | None]:
    """Prove all methods at once; return why one could not be finished, None where it was stopped."""
    failures: dict[str, str | None] = {}
    with ThreadPoolExecutor(len(proofs)) as pool:
        for name, run in [(name, pool.submit(proof.prove)) for name, proof in proofs.items()]:
            try:
                run.result()
            except Stopped:
                failures[name] = None
            except Failed as error:
                failures[name] = str(error)
    return failures


def show(found: Mapping[str, Any]) -> None:
    """Print what was found."""
    for method, promises in found["promises"].items():
        print(f"\n{method}")
        for one in promises:
            print(f"  {WORDS[one['held']]:<9} {one['promise']}")
            print("            " + ", ".join(f"{name} {_short(value)}" for name, value in one["figures"].items()))
    for method, failure in found["failures"].items():
        print(f"\n{method} could not be finished: {failure}")
    print(f"\n{'All promises held.' if found['held'] else 'NOT ALL PROMISES HELD.'}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def main() -> int:
    """Read the command line and prove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=TASKS, help=f"how many ({TASKS})")
    parser.add_argument("--every", type=int, default=10, help="verify after so many (10)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="which (both)")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="the base")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks and their training (0)")
    parser.add_argument("--output-dir", type=Path, help=f"by default runs/prove, runs/prove-N for other than {TASKS}")
    given = parser.parse_args()
    if given.tasks < 1 or given.every < 1:
        parser.error("--tasks and --every: give 1 or more")
    methods = tuple(dict.fromkeys(given.methods))
    threads = max(1, (os.cpu_count() or 1) // len(methods))
    settings = Settings(given.tasks, given.every, methods, given.model, given.seed, threads)
    few = f"-{given.tasks}" if given.tasks != TASKS else ""
    try:
        return prove(settings, given.output_dir or Path("runs") / f"prove{few}")
    except HfClError as error:
        print(f"prove: error: {error}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
