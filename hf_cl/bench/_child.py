"""Work in a process of its own, and the most anonymous memory that it takes.

The child says `ready` when its imports are done, waits, works, and says what it found as JSON in its last line. Memory
is looked at from outside every two milliseconds, above what was held at `ready`.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_cl import plugins, ranks
from hf_cl.bench._measure import EVERY, anonymous
from hf_cl.errors import HfClError


class Found(NamedTuple):
    """What a child answered, and its peak in MB (10^6 bytes) above what it held after its imports."""

    answer: Any
    peak_mb: float


def in_child(benchmark: str, arguments: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Found:
    """Call a benchmark's `child(**arguments)` in a fresh process; what it returns is the work, called after `ready`.

    Args:
        benchmark: The benchmark's name.
        arguments: JSON values.
        environment: The child's; None is this process's.

    Raises:
        HfClError: The child failed; the message has the last line of what it said, a note all of it.
    """
    command = [sys.executable, "-m", "hf_cl.bench._child", benchmark, json.dumps(dict(arguments))]
    return watched(command, environment=environment)


def watched(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, place: Path | None = None
) -> Found:
    """Run a command that keeps to this file's protocol.

    Args:
        command: The command.
        environment: Its environment; None is this process's.
        place: Its working folder; None is this process's.

    Raises:
        HfClError: It failed.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=place,
            env=dict(environment) if environment is not None else ranks.environment(),
        ) as child,
    ):  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        try:
            while (line := child.stdout.readline()) not in ("ready\n", ""):
                pass
            held, peak, done = anonymous(child.pid), [0], threading.Event()

            def watch() -> None:
                while not done.wait(EVERY):
                    peak[0] = max(peak[0], anonymous(child.pid))

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                rest, _ = child.communicate("go\n")
            finally:
                done.set()
                watcher.join()
        except BaseException:
            child.kill()
            raise
        if child.returncode or not line:
            errors.seek(0)
            said = errors.read().strip()
            failed = HfClError(f"a process of its own failed: {said.splitlines()[-1] if said else 'it said nothing'}")
            failed.add_note(said)
            raise failed
    return Found(json.loads(rest.strip().splitlines()[-1]), max(0, peak[0] - held) / 1e6)


def main() -> None:
    """Be the child."""
    benchmark, arguments = sys.argv[1:]
    work = plugins.load("bench", benchmark).child(**json.loads(arguments))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.readline() == "go\n":
        sys.stdout.write(f"\n{json.dumps(work())}\n")


if __name__ == "__main__":
    main()
