"""A bank of 1, 10 and 100 tasks: open it, verify it, load and activate a task from disk, push and pull it.

Measured in a fresh process for each bank: masks of density .01 of every masked layer, drawn from a seed, so their codes
are as long as codes get. Memory is anonymous. Pushing and pulling go to the stand-in for the Hub that the tests have,
over real HTTP on this machine: these rows are there in a checkout with pytest, and left out elsewhere.

Against: parsing the same manifest as JSON; sha256 of the same files; the same load without its digests compared; PEFT's
`load_adapter` of a LoRA r8; `upload_folder` and `snapshot_download` of huggingface_hub for the same folder.

Floor:

- Open: reading and parsing the manifest, whose bytes grow with the tasks (1.3 kB each). Parsing runs in C; each field
  is checked once besides, in Python.
- Verify on load: what a task computes with, N mask entries as a byte each and its head, goes through sha256 once. At
  this machine's rate of sha256, measured in the same run, the floor is 1 + that time by the time of a plain load.
- Verify: the same for each task, with its file read, its masks decoded and its owners worked out.
- Push and pull: the requests that the bare client makes, besides those that look at the head before and after.
"""

import hashlib
import importlib.util
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from hf_cl.bank import MaskBank
from hf_cl.bench._banks import make_bank
from hf_cl.bench._child import in_child
from hf_cl.bench._measure import anonymous, in_ms, timed, turns
from hf_cl.bench._models import DENSITY, masked_entries, plain, with_lora
from hf_cl.bench._row import Mark, Row, Settings, Tell
from hf_cl.errors import HfClError
from hf_cl.packing.shelf import config_of, open_entry
from hf_cl.storage.bank_folder import FolderReader
from hf_cl.storage.manifest import MANIFEST
from hf_cl.training.masked import adapter_of

TASKS, TURNS, HUB_TURNS = (1, 10, 100), 9, 5
Taken = dict[str, list[float]]
Step = tuple[Callable[[], object], Callable[[], object]]
"""What is timed, and what takes it back."""
LOAD = "load a task, verified"
RIVALS = {
    "open": "parsing its manifest",
    "verify a task": "sha256 of its file",
    LOAD: "the same load, digests not compared",
    "activate a task from disk": "PEFT's load_adapter, LoRA r8",
    "push": "upload_folder",
    "pull": "snapshot_download",
}


def run(settings: Settings, tell: Tell) -> Iterator[Row]:
    """Yield every figure by model and number of tasks."""
    stand_in = find_stand_in()
    if stand_in is None:
        tell("push and pull are left out: the stand-in for the Hub is in a checkout's tests, and needs pytest")
    for size in settings.models():
        for tasks in (1, 3) if settings.quick else TASKS:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) / "bank"
                tell(f"{size}, {tasks} tasks: making the bank")
                make_bank(size, tasks, folder)
                tell(f"{size}, {tasks} tasks: open, verify, load, activate")
                asked = {"folder": str(folder), "size": size, "tasks": tasks, "device": settings.device}
                asked["count"] = 2 if settings.quick else TURNS
                under = {"model": size, "tasks": tasks, "density": DENSITY, "device": settings.device}
                yield from _rows(in_child("bank", {"do": "measure", **asked}).answer, under)
                if stand_in is not None:
                    tell(f"{size}, {tasks} tasks: push and pull")
                    count = 2 if settings.quick else HUB_TURNS
                    yield from _rows(over_http(stand_in, folder, Path(place) / "hub", count), under)


def _rows(found: dict[str, Any], under: dict[str, Any]) -> Iterator[Row]:
    taken, floors = found["taken"], found.get("floors", {})
    marks = {LOAD: Mark(1.15), "open": Mark(20.0, of="value") if under["tasks"] == 100 else None}
    for what, rival in RIVALS.items():
        if what in taken:
            floor = floors.get(what, "the rival's time")
            row = in_ms(taken[what], taken[rival])
            yield Row("bank", what, under, rival=rival, mark=marks.get(what), floor=floor, **row)
    if "attach" in taken:
        yield Row(
            "bank", "attach the first task to a loaded base", under, 1000 * taken["attach"][0], "ms", "none derived"
        )
    for what, value in found.get("memory", {}).items():
        least = f"{4e-6 * masked_entries(under['model']):.0f} MB: a composed copy of the masked weights"
        yield Row("bank", f"memory above the base, {what}", under, value, "MB", least)


# --- one bank in a process of its own -------------------------------------------------------------------


def child(do: str, **arguments: Any) -> Callable[[], dict[str, Any]]:
    """Return what measures in a process of its own: `do` is `measure` or `hub`."""
    return partial(measure if do == "measure" else talk, **arguments)


def measure(folder: str, size: str, tasks: int, device: str, count: int) -> dict[str, Any]:
    """Return seconds by what was done, floors in words, and megabytes."""
    place = Path(folder)
    manifest, files = place / MANIFEST, [place / file.name for file in MaskBank.from_pretrained(place).manifest.files]
    opening: dict[str, Callable[[], object]] = {
        "open": lambda: MaskBank.from_pretrained(place),
        RIVALS["open"]: lambda: json.loads(manifest.read_bytes()),
    }
    taken = turns(opening, count)
    bank = MaskBank.from_pretrained(place)
    proving: dict[str, Callable[[], object]] = {
        "verify a task": bank.verify,
        RIVALS["verify a task"]: lambda: [hashlib.sha256(file.read_bytes()).digest() for file in files],
    }
    proved = turns(proving, max(2, count // tasks))
    taken |= {name: [second / tasks for second in seconds] for name, seconds in proved.items()}
    base = plain(size, device)
    held = anonymous()
    made: list[Any] = []
    taken["attach"] = [timed(lambda: made.append(bank.attach(base, [bank.tasks[0]])), device=device)]
    model = made[0]
    memory = {"one task attached": anonymous() - held}
    if tasks > 1:  # the first task is the active one, which cannot be taken out
        memory["after every task was activated and left"] = visited(bank, model) - held
        taken |= in_steps({**loading(bank, model), **activating(bank, model, size, device)}, count)
    floors = _floors(taken, masked_entries(size), manifest.stat().st_size, files[0].stat().st_size)
    return {"taken": taken, "floors": floors, "memory": {name: used / 1e6 for name, used in memory.items()}}


def _floors(taken: Taken, entries: int, manifest: int, file: int) -> dict[str, str]:
    hashing = bytes(entries)
    sha = timed(lambda: hashlib.sha256(hashing).digest())
    floors = {"open": f"the manifest's {manifest:,} bytes, read and parsed"}
    floors["activate a task from disk"] = f"its file's {file:,} bytes, read, decoded and verified"
    said = f"sha256 of {entries / 1e6:.1f} M mask entries takes {1000 * sha:.1f} ms"
    load = taken.get(RIVALS[LOAD])
    floors[LOAD] = f"{1 + sha / median(load):.3f}: {said}" if load else said
    floors["verify a task"] = f"the rival's time, and besides {said}"
    return floors


def in_steps(steps: dict[str, Step], count: int) -> Taken:
    """Return the seconds of each step, in turns; what takes it back is not counted, nor the first turn."""
    taken: Taken = {name: [] for name in steps}
    for turn in range(count + 1):
        for name, (work, back) in steps.items():
            second = timed(work)
            back()
            if turn:
                taken[name].append(second)
    return taken


def loading(bank: MaskBank, model: Any) -> dict[str, Step]:
    """Return the steps that load the bank's last task beside the others, verified and plainly."""
    entry, tuner = bank.manifest.tasks[-1], model.base_model
    adapter = adapter_of(entry.index)
    assert bank.folder is not None
    read = FolderReader(bank.folder)

    def load(prove: bool) -> None:
        model.add_adapter(adapter, config_of(bank.manifest, entry))
        open_entry(entry, read).place(tuner, bank.manifest.store, whole=False, prove=prove)

    def leave() -> None:
        tuner.leave(adapter)

    return {LOAD: (lambda: load(True), leave), RIVALS[LOAD]: (lambda: load(False), leave)}


def activating(bank: MaskBank, model: Any, size: str, device: str) -> dict[str, Step]:
    """Return the steps that activate a task that is not loaded, ours and PEFT's."""
    first, last = bank.tasks[0], bank.tasks[-1]
    assert bank.folder is not None
    place = tempfile.mkdtemp(dir=bank.folder.parent)
    lora = with_lora(size, 1, device)
    lora.save_pretrained(place)

    def back() -> None:
        bank.activate(model, first)
        bank.detach(model, last)

    def load_adapter() -> None:
        lora.load_adapter(str(Path(place) / "task0"), "other")  # PEFT saves a named adapter in a folder of its name
        lora.set_adapter("other")

    def delete_adapter() -> None:
        lora.set_adapter("task0")
        lora.delete_adapter("other")

    return {
        "activate a task from disk": (lambda: bank.activate(model, last), back),
        RIVALS["activate a task from disk"]: (load_adapter, delete_adapter),
    }


def visited(bank: MaskBank, model: Any) -> int:
    """Return this process's anonymous bytes after each task was activated and left again."""
    for name in bank.tasks[1:]:
        bank.activate(model, name)
        bank.activate(model, bank.tasks[0])
        bank.detach(model, name)
    return anonymous()


# --- over HTTP --------------------------------------------------------------------------------------------


def find_stand_in() -> Any:
    """Return the tests' module that stands in for the Hub; None outside a checkout, or without pytest."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / "tests" / "hub_server.py").is_file():
        return None
    if importlib.util.find_spec("pytest") is None:
        return None
    sys.path.insert(0, str(root / "tests"))
    try:
        import hub_server
    finally:
        sys.path.remove(str(root / "tests"))
    return hub_server


def over_http(stand_in: Any, folder: Path, home: Path, count: int) -> dict[str, Any]:
    """Return the seconds of pushing and pulling a bank and its bare folder.

    Raises:
        HfClError: The stand-in failed.
    """
    server = stand_in.Hub(home)
    try:
        asked = {"do": "hub", "folder": str(folder), "place": str(home), "count": count}
        found: dict[str, Any] = in_child("bank", asked, server.environment()).answer
    finally:
        server.close()
    if server.bugs:
        raise HfClError(f"bank: the stand-in for the Hub failed: {server.bugs[0].splitlines()[-1]}")
    return found


def talk(folder: str, place: str, count: int) -> dict[str, Any]:
    """Return the seconds of each way in this process, whose environment names the server."""
    bank, numbers = MaskBank.from_pretrained(folder), itertools.count()

    def fresh(kind: str) -> str:
        return f"{kind}{next(numbers)}"

    def push(name: str) -> None:
        bank.push_to_hub(name)

    def upload_folder(name: str) -> None:
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=folder)

    def pull() -> None:
        cache, out = (Path(place) / fresh(kind) for kind in ("cache", "bank"))
        MaskBank.from_pretrained("alice/ours", cache_dir=cache).save_pretrained(out)

    pushing: dict[str, Callable[[], object]] = {
        "push": lambda: push(fresh("alice/bank")),
        RIVALS["push"]: lambda: upload_folder(fresh("alice/plain")),
    }
    pulling: dict[str, Callable[[], object]] = {
        "pull": pull,
        RIVALS["pull"]: lambda: snapshot_download("alice/theirs", cache_dir=Path(place) / fresh("cache")),
    }
    taken = turns(pushing, count)
    push("alice/ours")
    upload_folder("alice/theirs")
    return {"taken": {**taken, **turns(pulling, count)}}
