"""Jobs of one or several ranks, forked from a process that has imported everything: a rank then costs no 15 seconds.

    PYTHONPATH=. python tests/jobs.py      reads orders and writes answers, one JSON value a line

A job is `hf-cl train` without the fresh process at its end, or any function that gives a JSON value. Each rank gets
the variables that a launcher sets. What goes wrong is ordered as "the n-th call of a function, on one rank": the
process dies, hangs, is asked to stop, has no room on its disk, or has one bit changed.
"""

import contextlib
import errno
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAILED = 1


class Jobs:
    """The parent's side: one process that starts jobs."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, recipe: Path, out: Path, world: int = 1, *overrides: str, resume: bool = False, **wrong):
        """Run a job; return each rank's exit code, how long it took, and what each rank said.

        Args:
            recipe: Its file.
            out: The run folder.
            world: How many ranks.
            overrides: Of the recipe.
            resume: Go on with what is there.
            wrong: What goes wrong, see `Wrong`; or `after`, seconds from the run folder's first file until SIGKILL, or
                `signal_after`, until SIGTERM.
        """
        call = ["jobs:train", [str(recipe), str(out), overrides, resume]]
        return self.call(out, world, *call, **wrong)

    def call(self, out: Path, world: int, function: str, args=(), **wrong):
        """Let every rank call `module:name`, and return what each gave besides; see `run`.

        Args:
            out: What the ranks say goes beside it.
            world: How many ranks.
            function: Its result is a JSON value.
            args: JSON values.
            wrong: As for `run`.
        """
        order = {"out": str(out), "world": world, "call": [function, args]}
        self._process.stdin.write(json.dumps({**order, "wrong": wrong}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that starts jobs has died"
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def jobs():
    """What starts jobs; a test module that wants it says `pytest_plugins = ["jobs"]`."""
    made = Jobs()
    yield made
    made.close()


class Wrong:
    """What goes wrong at the n-th call of `where` (module:function or module:Class.method) on rank `on`.

    `what` is die, hang, term, usr1, full (no room on the disk), nan (of what it returns), or a bit that changes, see
    `flip`. With `before` it happens before the call, else after it.
    """

    def __init__(self, where: str, what: str, at: int = 1, on: int = 0, before: bool = True) -> None:
        self.what, self.left, self.before = what, at, before
        module, _, path = where.partition(":")
        *owner, name = path.split(".")
        target = importlib.import_module(module)
        for part in owner:
            target = getattr(target, part)
        if int(os.environ.get("RANK", 0)) == on:
            real = target.__dict__[name]
            setattr(target, name, self._wrapped(real))

    def _wrapped(self, real):
        def call(*args, **named):
            self.left -= 1
            if self.left == 0 and self.before and self.what != "nan":
                self._happen()
            found = real(*args, **named)
            if self.left == 0 and self.what == "nan":
                return found * float("nan")
            if self.left == 0 and not self.before:
                self._happen()
            return found

        return call

    def _happen(self) -> None:
        if self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "hang":
            time.sleep(10_000)
        elif self.what in ("term", "usr1"):
            os.kill(os.getpid(), {"term": signal.SIGTERM, "usr1": signal.SIGUSR1}[self.what])
        elif self.what == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "a file")
        else:
            flip(self.what)


def flip(what: str) -> None:
    """Change one bit, chosen by a seed, in a tensor of the model with a part of that name: `bit:owner:3`."""
    import torch

    _, end, seed = what.split(":")
    named = [*LEARNERS[0].method.model.named_parameters(), *LEARNERS[0].method.model.named_buffers()]
    draw = random.Random(int(seed))
    held = [tensor for name, tensor in named if end in name.split(".") and tensor.numel()]
    raw = draw.choice(held).detach().view(-1).view(torch.uint8)
    place = draw.randrange(raw.numel())
    raw[place] ^= 1 if raw.dtype == torch.bool else 1 << draw.randrange(8)


LEARNERS: list = []


def rank_of(order, number: int, port: int, said: Path) -> int:
    """Be one rank of a job."""
    if order["world"] > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(order["world"])}
        os.environ |= {"LOCAL_WORLD_SIZE": str(order["world"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    file = said.open("w")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)

    from hf_cl import ranks
    from hf_cl.errors import HfClError, StoppedError

    if "where" in order["wrong"]:
        Wrong(**{key: value for key, value in order["wrong"].items() if key != "limit"})
    (module, _, name), args = order["call"][0].partition(":"), order["call"][1]
    code = 0
    try:
        found = getattr(importlib.import_module(module), name)(*args)
        said.with_suffix(".json").write_text(json.dumps(found))
    except StoppedError as error:
        sys.stdout.write(f"stopped: {error}\n")
        code = 75
    except HfClError as error:
        sys.stdout.write(f"error: {type(error).__name__}: {error}\n")
        code = 2
    except BaseException:
        traceback.print_exc()
        code = FAILED
    ranks.leave(code)
    return code


def train(recipe: str, out: str, overrides, resume: bool):
    """Run a recipe's stream; the last learner is in `LEARNERS`."""
    import hf_cl.train_stream
    import hf_cl.training.train_task
    from hf_cl import recipe as recipes
    from hf_cl import verify
    from hf_cl.learner import ContinualLearner

    def verify_here(path):
        verdict = verify(path)
        return {"exact": verdict.exact, "same_logits": verdict.same_logits, "files": [], "tasks": verdict.tasks}

    hf_cl.train_stream.verify_in_fresh_process = verify_here
    made = ContinualLearner.__init__

    def remember(self, *args, **named):
        made(self, *args, **named)
        LEARNERS[:] = [self]

    ContinualLearner.__init__ = remember
    reductions, begun = [], hf_cl.training.train_task.Reduction.__init__

    def note(self, method):
        begun(self, method)
        reductions.append(self)

    hf_cl.training.train_task.Reduction.__init__ = note
    checked = recipes.load(recipe, overrides)
    found = hf_cl.train_stream.run_stream(
        checked, Path(out), resume=resume, progress=lambda line: sys.stdout.write(f"{line}\n")
    )
    correct = {name: right.tolist() for name, right in LEARNERS[0].correct.items()} if LEARNERS else {}
    sent = [reduction.sent for reduction in reductions]
    return {"accuracy_matrix": found["accuracy_matrix"], "exact": found["exact"], "correct": correct, "sent": sent}


def fork(action) -> int:
    child = os.fork()
    if child:
        return child
    code = FAILED
    try:
        code = action()
    finally:
        sys.stdout.flush()
        os._exit(code)


def job(order):
    """Run a job to its end; as a launcher does, end the others a while after one has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = Path(order["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    said = [out.parent / f"{out.name}.rank{number}.txt" for number in range(order["world"])]
    began = time.monotonic()
    left = {fork(lambda n=number: rank_of(order, n, port, said[n])): number for number in range(order["world"])}
    codes, ended = [None] * order["world"], [0.0] * order["world"]
    at, number = (
        (order["wrong"]["after"], signal.SIGKILL) if "after" in order["wrong"]
        else (order["wrong"].get("signal_after", 1e9), signal.SIGTERM)
    )  # fmt: skip
    first = None
    while left:
        if first is None and (out / "run.json").exists():
            first = time.monotonic()
        for child, which in list(left.items()):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[which], ended[which] = os.waitstatus_to_exitcode(status), time.monotonic() - began
                del left[child]
        if first is not None and time.monotonic() - first > at:
            at = 1e9
            for child in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
        hung = order["wrong"].get("what") == "hang" and any(code is not None for code in codes)
        if hung or time.monotonic() - began > order["wrong"].get("limit", 300):
            for child in left:  # what hangs ends by its launcher
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    texts = [file.read_text() for file in said]
    found = [json.loads(file.with_suffix(".json").read_text()) if code == 0 else None
             for code, file in zip(codes, said, strict=True)]  # fmt: skip
    took = {"seconds": time.monotonic() - began, "trained": time.monotonic() - (first or began)}
    return {"codes": codes, **took, "ended": ended, "said": texts, "found": found}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for module in ("accelerate", "evaluate", "datasets", "transformers.trainer", "hf_cl.train_stream", "hf_cl.runs"):
        importlib.import_module(module)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(job(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    import jobs as module  # its one copy: orders name functions of it

    module.main()
