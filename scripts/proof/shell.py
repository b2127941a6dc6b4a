"""Commands in processes of their own: written down, listened to, and ended by a signal."""

import contextlib
import fcntl
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_cl.cli.app import STOPPED
from hf_cl.errors import ConfigError

LOCK, COMMANDS = ".lock", "commands.txt"
HERE = Path(__file__).parent


class Stopped(Exception):
    """A signal asked for it."""


class Failed(Exception):
    """A command ended with an error: no promise that is false, but nothing that shows it to be true."""


class Shell:
    """Runs commands, one process each."""

    def __init__(self, out: Path, threads: int) -> None:
        """Take the folder to work in, and the threads that each process computes with.

        Raises:
            ConfigError: Another proof is at work in the folder.
        """
        self._out = out
        self._env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        # Inherited by the commands, so one that outlives a killed proof still holds it.
        self._held = os.open(out / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._held)
            raise ConfigError(f"{out}: another proof is at work here. Wait for its end, or choose another.") from None

    def close(self) -> None:
        """Let others work in the folder."""
        os.close(self._held)

    def stop(self, *_: Any) -> None:
        """End what runs and begin nothing more; `hf-cl train` saves its task first."""
        self._stopped = True
        for child in list(self._running):
            child.terminate()

    def run(
        self, command: Sequence[str], *, given: str = "", tell: Callable[[str], None] | None = None, fine: int = 0
    ) -> tuple[int, str]:
        """Return a command's exit code and standard output.

        Args:
            command: Words; the first is `hf-cl`, or a script beside this file.
            given: Its standard input.
            tell: Told each line of its standard error.
            fine: An exit code that is no failure, besides 0.

        Raises:
            Stopped: A signal asked for it.
            Failed: It ended with another code.
        """
        if self._stopped:
            raise Stopped
        way = ["-m", "hf_cl"] if command[0] == "hf-cl" else [str(HERE / command[0])]
        with (self._out / COMMANDS).open("a", encoding="utf-8") as file:
            file.write(shlex.join(command) + "\n")
        child = subprocess.Popen(
            [sys.executable, *way, *command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=self._env,
            pass_fds=[self._held],
        )
        self._running.add(child)
        said: list[str] = []

        def listen() -> None:
            for line in child.stderr or ():
                said.append(line.rstrip())
                if tell is not None:
                    tell(said[-1])

        listener = threading.Thread(target=listen)
        listener.start()
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(given)
            child.stdin.close()
        output = child.stdout.read()
        code = child.wait()
        listener.join()
        self._running.discard(child)
        if self._stopped or code == STOPPED:
            raise Stopped
        if code not in (0, fine):
            raise Failed("\n".join([f"{shlex.join(command)}: ended with {code}", *said[-12:]]))
        return code, output
