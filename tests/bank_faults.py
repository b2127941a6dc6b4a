"""Faults for a bank's folder: a process that dies at a call, a call that fails, a power cut, a rival in between.

Banks here are small variants of one that was learned: the same tasks, each file with content of its own.

Run as a program it is the process that savers are forked from: small, so that a fork takes a millisecond or two.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from hf_cl.errors import BankConflictError
from hf_cl.storage.bank_folder import read_file, read_manifest, task_blob, tensors_of, write_bank
from hf_cl.storage.disk import stands_for
from hf_cl.storage.manifest import Manifest

WON, LOST, DIED, FAILED = 0, 3, 4, 5
"""How a forked saver ends: it has saved, was told that a rival was first, died where it was to, or anything else."""
MEMORY = 50 * 10**6
"""Bytes that reading a bank may take before it is refused."""


@dataclasses.dataclass(frozen=True)
class Small:
    """A bank whose files are a few bytes."""

    manifest: Manifest
    blobs: dict[str, bytes]

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def names(self) -> set[str]:
        """All that its folder holds after a save."""
        return {"bank.json", ".lock", *self.blobs}

    def save(self, folder: Path, expected: str | None) -> None:
        write_bank(folder, self.manifest, lambda entry: self.blobs[entry.name], expected=expected)


def small(manifest: Manifest, tag: int, tasks: int = 3) -> Small:
    """Return a bank of its own for each tag: no file of it is another's."""
    made, blobs = [], {}
    for task in manifest.tasks[:tasks]:
        file, blobs_of = task_blob(f"task-{task.index:05d}", {"masks": torch.full((99,), tag, dtype=torch.uint8)})
        blobs[file.name] = blobs_of
        made.append(dataclasses.replace(task, file=file))
    return Small(dataclasses.replace(manifest, tasks=made, shared=None, generation=tag), blobs)


def read_whole(folder: Path) -> str:
    """Return the digest of the bank in a folder, after reading all of it."""
    manifest = read_manifest(folder)
    for entry in manifest.files:
        tensors_of(entry, read_file(folder / entry.name, entry.bytes), entry.name)
    return manifest.digest


def held(folder: Path) -> str | None:
    """Return the digest of the bank in a folder; None where there is none."""
    return read_manifest(folder).digest if (folder / "bank.json").exists() else None


def staged(folder: Path) -> list[str]:
    """Return what savers left under temporary names."""
    return sorted(file.name for file in folder.iterdir() if stands_for(file.name) != file.name)


# --- banks of an attacker -------------------------------------------------------------------------------------


def sign(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest's values and sign it anew, as an attacker would."""
    body = json.loads((folder / "bank.json").read_bytes())
    body.pop("digest")
    change(body)
    write_signed(folder, json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def write_signed(folder: Path, body: bytes) -> None:
    """Write a manifest with a digest that is right, whatever else it is."""
    digest = hashlib.sha256(body).hexdigest().encode()
    (folder / "bank.json").write_bytes(b'{"digest":"' + digest + b'",' + body[1:])


def forge(folder: Path, change: Callable[[dict, list[dict[str, torch.Tensor]]], object]) -> None:
    """Change a manifest's values and the tensors of its tasks' files, and sign all anew."""

    def forged(body):
        tensors = [load(read_file(folder / task["file"]["name"], None)) for task in body["tasks"]]
        change(body, tensors)
        for task, made in zip(body["tasks"], tensors, strict=True):
            set_file(folder, task, save(made))

    sign(folder, forged)


def set_file(folder: Path, task: dict, data: bytes) -> None:
    """Make some bytes a task's file."""
    sha = hashlib.sha256(data).hexdigest()
    task["file"] = {"name": f"task-{task['index']:05d}-{sha[:16]}.safetensors", "sha256": sha, "bytes": len(data)}
    (folder / task["file"]["name"]).write_bytes(data)


# --- processes ------------------------------------------------------------------------------------------------


def fork(action: Callable[[], int | None]) -> int:
    """Run something in a process that has all of this one's modules; return its number.

    Its exit status is what the action returns; it never comes back here, whatever happens.
    """
    child = os.fork()
    if child:
        return child
    status = FAILED
    try:
        status = action() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end(child: int) -> int:
    """Wait for a process; return its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Nursery:
    """Starts processes that save: `save`, at one of their calls if wanted to die; `loop`, for ever; `race`, several."""

    def __init__(self, banks: list[Small], place: Path) -> None:
        for number, bank in enumerate(banks):
            bank.save(place / str(number), None)
        self.banks = banks
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, *args):
        """Give an order; return what it answers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([do, *args]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def save(self, folder: Path, bank: int, expected: str | None, dies_at: int, done: bool) -> int:
        """Return how a saver ended."""
        return self.ask("end", self.ask("save", str(folder), bank, expected, dies_at, done))

    def race(self, folder: Path, racers: list[int], expected: str | None, *, locks: bool) -> list[int]:
        """Return how savers that began at one moment ended."""
        return self.ask("race", str(folder), racers, expected, locks)

    def loop(self, folder: Path, turns: list[int]) -> int:
        """Return the number of a process that saves one bank after another."""
        return self.ask("loop", str(folder), turns)

    def kill(self, child: int, after: float) -> None:
        """Kill a process a while later."""
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        assert self.ask("end", child) == -signal.SIGKILL

    def swap(self, file: Path, others: list[Path]) -> int:
        """Return the number of a process that puts one file after another in the place of a file."""
        return self.ask("swap", str(file), [str(other) for other in others])

    def limited(self, folder: Path) -> tuple[str, str, float]:
        """Read a folder's manifest and files with 50 MB of memory: the kind of error, what it says, and seconds."""
        return tuple(self.ask("limited", str(folder)))

    def close(self) -> None:
        self._process.communicate()


def _save(banks: list[Small], folder: str, bank: int, expected: str | None, at: int, done: bool) -> int:
    def save():
        with dies_at(at, done=done):
            banks[bank].save(Path(folder), expected)

    return fork(save)


def _loop(banks: list[Small], folder: str, turns: list[int]) -> int:
    def save():
        while True:
            for turn in turns:
                banks[turn].save(Path(folder), held(Path(folder)))
                _end_with(nursery)

    nursery = os.getpid()

    return _begun(save)


def _end_with(nursery: int) -> None:
    """Leave no process behind where the tests were killed."""
    if os.getppid() != nursery:
        os._exit(DIED)


def _begun(action: Callable[[], None]) -> int:
    """Fork, and come back when the process has begun."""
    ends = os.pipe()
    child = fork(lambda: os.write(ends[1], b"b") and action())
    os.read(ends[0], 1)
    for descriptor in ends:
        os.close(descriptor)
    return child


def _race(banks: list[Small], folder: str, racers: list[int], expected: str | None, locks: bool) -> list[int]:
    ready, go = os.pipe(), os.pipe()

    def save(bank):
        if not locks:
            fcntl.flock = lambda *_: None
        os.write(ready[1], b"r")
        os.read(go[0], 1)
        try:
            banks[bank].save(Path(folder), expected)
        except BankConflictError as error:
            return LOST if "extend" in str(error) else FAILED
        return WON

    children = [fork(lambda bank=bank: save(bank)) for bank in racers]
    for _ in racers:
        os.read(ready[0], 1)
    os.write(go[1], b"g" * len(racers))
    ends = [end(child) for child in children]
    for descriptor in (*ready, *go):
        os.close(descriptor)
    return ends


def _swap(_: list[Small], file: str, others: list[str]) -> int:
    contents = [Path(other).read_bytes() for other in others]

    def swap():
        while True:
            for data in contents:
                Path(f"{file}.new").write_bytes(data)
                Path(f"{file}.new").replace(file)
                _end_with(nursery)

    nursery = os.getpid()

    return _begun(swap)


def _limited(_: list[Small], folder: str) -> tuple[str, str, float]:
    ends = os.pipe()

    def read():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        begin = time.perf_counter()
        kind = what = ""
        try:
            read_whole(Path(folder))
        except BaseException as error:
            kind, what = type(error).__name__, str(error)[:400]
        os.write(ends[1], json.dumps([kind, what, time.perf_counter() - begin]).encode())

    status = end(fork(read))
    os.write(ends[1], json.dumps(["died", str(status), 0.0]).encode() if status else b" ")
    found, _ = json.JSONDecoder().raw_decode(os.read(ends[0], 65536).decode())
    for descriptor in ends:
        os.close(descriptor)
    return found


def main(place: Path) -> None:
    """Serve a `Nursery`."""
    banks = []
    for folder in sorted(place.iterdir()):
        manifest = read_manifest(folder)
        banks.append(Small(manifest, {file.name: (folder / file.name).read_bytes() for file in manifest.files}))
    orders = {"save": _save, "loop": _loop, "race": _race, "swap": _swap, "limited": _limited}
    orders["end"] = lambda _, child: end(child)
    for line in sys.stdin:
        do, *args = json.loads(line)
        sys.stdout.write(json.dumps(orders[do](banks, *args)) + "\n")
        sys.stdout.flush()


# --- calls ----------------------------------------------------------------------------------------------------


class Calls:
    """Numbers the calls that change a disk, from 1, and tells of each: before it is made, and after."""

    def __init__(self, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None) -> None:
        self.before, self.after, self.count = before, after, 0

    def __enter__(self) -> "Calls":
        self._patch = pytest.MonkeyPatch()
        for name in ("open", "fsync", "replace", "unlink", "mkdir", "listdir", "close"):
            self._patch.setattr(os, name, self._around(name, getattr(os, name)))
        plain = Path.open

        def opened(path, mode="r", *args, **kwargs):
            if not set(mode) & set("xwa+"):
                return plain(path, mode, *args, **kwargs)
            return _File(self.run("create", plain, path, mode, *args, **kwargs), path, self)

        self._patch.setattr(Path, "open", opened)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _around(self, name, real):
        return lambda *args, **kwargs: self.run(name, real, *args, **kwargs)

    def run(self, name, real, *args, **kwargs):
        self.count += 1
        number = self.count
        if self.before is not None:
            self.before(number, name, args)
        try:
            return real(*args, **kwargs)
        finally:
            if self.after is not None:
                self.after(number, name, args)


class _File:
    """A file that is written in two calls, each on its way to the system at once."""

    def __init__(self, real, path, calls):
        self._real, self._path, self._calls = real, path, calls

    def write(self, data):
        def put(path, part):
            self._real.write(part)
            self._real.flush()

        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._calls.run("write", put, self._path, part)

    def __getattr__(self, name):
        return getattr(self._real, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._real.close()


def path_of(descriptor: int) -> Path:
    """Return the path of an open file as it is called now."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def fails_at(number: int, code: int) -> Calls:
    """Let one call fail with an error number of the system."""

    def before(now, name, args):
        if now == number:
            path = [str(args[0])] if name in ("open", "create", "unlink", "mkdir", "listdir", "replace") else []
            raise OSError(code, os.strerror(code), *path)

    return Calls(before)


def dies_at(number: int, *, done: bool) -> Calls:
    """Let the process die at one call, before or right after it is made."""

    def die(now, name, args):
        if now == number:
            os._exit(DIED)

    return Calls(after=die) if done else Calls(before=die)


# --- power cuts -----------------------------------------------------------------------------------------------


def record(folder: Path, action: Callable[[], object]) -> list[tuple]:
    """Return what an action did to a folder: events of `power_cuts`."""
    events: list[tuple] = []

    def name_of(path) -> str:
        return str(Path(path).relative_to(folder))

    def before(number, name, args):
        if name == "fsync":
            events.append(("sync", name_of(path_of(args[0]))))

    def after(number, name, args):
        if name == "create" or (name == "open" and args[1] & os.O_CREAT):
            events.append(("create", name_of(args[0])))
        elif name == "write":
            events.append(("write", name_of(args[0]), args[1]))
        elif name == "replace":
            events.append(("rename", name_of(args[0]), name_of(args[1])))
        elif name == "unlink":
            events.append(("remove", name_of(args[0])))

    with Calls(before, after):
        action()
    return events


LOSSES: dict[str, Callable[[bytes], bytes]] = {
    "kept": lambda data: data,
    "gone": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
    "half": lambda data: data[: len(data) // 2],
}
"""What may become of bytes that were written and not synced."""


class _Disk:
    """Files by number: what was written, what was synced; names: those synced, and changes since."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.written = list(files.values())
        self.synced: list[bytes | None] = list(files.values())
        self.names = {name: place for place, name in enumerate(files)}
        self.changes: list[dict[str, int | None]] = []

    def now(self, changes: list[dict[str, int | None]]) -> dict[str, int]:
        """Return the names after some of the changes."""
        names: dict[str, int | None] = dict(self.names)
        for change in changes:
            names.update(change)
        return {name: place for name, place in names.items() if place is not None}

    def do(self, kind: str, name: str, *more) -> None:
        names = self.now(self.changes)
        if kind == "create" and name not in names:
            self.written.append(b"")
            self.synced.append(None)
            self.changes.append({name: len(self.written) - 1})
        elif kind == "write":
            self.written[names[name]] += more[0]
        elif kind == "rename":
            self.changes.append({more[0]: names[name], name: None})
        elif kind == "remove" and name in names:
            self.changes.append({name: None})
        elif kind == "sync" and name == ".":
            self.names, self.changes = names, []
        elif kind == "sync":
            self.synced[names[name]] = self.written[names[name]]

    def cuts(self) -> Iterator[dict[str, bytes]]:
        """Yield what may be left: changes of names may be lost from the end, one alone, or all but one."""
        count = len(self.changes)
        kept = {frozenset(range(end)) for end in range(count + 1)}
        kept |= {frozenset({one}) for one in range(count)} | {frozenset(range(count)) - {one} for one in range(count)}
        for places in kept:
            names = self.now([self.changes[place] for place in sorted(places)])
            for loss in LOSSES.values():
                yield {
                    name: self.written[place]
                    if self.synced[place] == self.written[place]
                    else loss(self.written[place])
                    for name, place in names.items()
                }


def power_cuts(files: dict[str, bytes], events: list[tuple]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Yield (events that had happened, files that are left), for a cut at any moment."""
    disk = _Disk(files)
    for number in range(len(events) + 1):
        for left in disk.cuts():
            yield number, left
        if number < len(events):
            disk.do(*events[number])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
