"""What was found so far, as one JSON file that is whole after each step, and what it says of each promise."""

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_cl.errors import ConfigError
from hf_cl.storage.disk import json_bytes, write_atomic


@dataclass(frozen=True)
class Settings:
    """What decides the bits of a proof; it goes on with the same alone."""

    tasks: int
    every: int
    methods: tuple[str, ...]
    model: str
    seed: int
    threads: int


class Ledger:
    """The file, and its content as plain values."""

    def __init__(self, file: Path, settings: Settings) -> None:
        """Open the ledger of these settings, or begin one.

        Raises:
            ConfigError: It is one of other settings.
        """
        self._file, self._lock = file, threading.Lock()
        ours = json.loads(json.dumps(asdict(settings)))
        nothing: dict[str, Any] = {method: {"commits": {}, "checks": []} for method in settings.methods}
        self.content: dict[str, Any] = {"settings": ours, "seconds": 0, "methods": nothing}
        if file.is_file():
            self.content = json.loads(file.read_text("utf-8"))
            if self.content["settings"] != ours:
                raise ConfigError(
                    f"{file}: holds a proof with {self.content['settings']}, this one is with {ours}. Choose another "
                    f"--output-dir, or remove the folder."
                )

    def of(self, method: str) -> dict[str, Any]:
        """Return what is known of a method, to read."""
        held: dict[str, Any] = self.content["methods"][method]
        return held

    def put(self, **values: Any) -> None:
        """Set keys of the ledger, and write it."""
        with self._lock:
            self.content |= values
            write_atomic(self._file, json_bytes(self.content))

    def note(self, method: str, **values: Any) -> None:
        """Set keys of a method, and write it."""
        with self._lock:
            self.of(method).update(values)
            write_atomic(self._file, json_bytes(self.content))


def judge(held: Mapping[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Return each promise, whether it held (None: reported, not promised), and the figures that say so.

    Args:
        held: What the ledger has of a method.
        settings: The proof's.
    """
    checks, measured = held["checks"], held.get("measured", {})
    exported, controls, routed = held.get("exported", {}), held.get("controls", {}), held.get("routed", {})
    due = {*range(settings.every, settings.tasks, settings.every), settings.tasks}
    verified = {check["tasks"] for check in checks}
    same = measured.get("tasks") == settings.tasks and not measured["differ"] and measured["forgetting"] == 0
    spoken = ("routing_accuracy", "class_incremental_accuracy", "task_given_accuracy")
    known = ("tasks", "differ", "forgetting", "average_accuracy", "store_used", "bytes", "seconds_a_task")
    return [
        _promise(
            f"after every {settings.every} tasks, each digest of each task is the one of its commit",
            verified >= due and all(check["exact"] for check in checks),
            verified_after=sorted(verified),
            moved=sorted({name for check in checks for name in check["moved"]}),
        ),
        _promise(
            "and so are its probe logits, bit for bit",
            verified >= due and all(check["same_logits"] for check in checks),
            comparisons=sum(check["tasks"] for check in checks),
        ),
        _promise(
            "reloaded from the last bank, each task measures as at its commit",
            same,
            **{key: measured.get(key) for key in known},
        ),
        _promise(
            "exported, a task answers with the same bits without hf_cl",
            bool(exported) and all(one["same_logits"] and one["without_hf_cl"] for one in exported.values()),
            tasks=list(exported),
        ),
        _promise(
            "one changed bit of a copy is found, and its task named",
            bool(controls) and all(one["exit_code"] == 1 and one["names_it"] for one in controls.values()),
            ways=list(controls),
        ),
        _promise(
            "texts without a task id are answered: measured, not promised",
            None if routed else False,
            **{key: routed.get(key) for key in spoken},
        ),
    ]


def _promise(promise: str, held: bool | None, **figures: Any) -> dict[str, Any]:
    return {"promise": promise, "held": held, "figures": figures}
