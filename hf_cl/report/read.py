"""Finding result files and checking what they hold, before anything is drawn.

Figures are computed from the matrix anew; of what a file declares, only what was measured otherwise (digests, bytes,
seconds) is taken.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cl.errors import DataError, RunError
from hf_cl.metrics import AccuracyMatrix
from hf_cl.storage.run_folder import RESULTS

KINDS: dict[str, tuple[type, ...]] = {
    "stream": (str,),
    "method": (dict,),
    "model": (str,),
    "seed": (int,),
    "tasks": (list,),
    "training": (dict,),
    "max_length": (int,),
    "accuracy_matrix": (list,),
    "bytes_per_task": (dict,),
    "head_bytes_per_task": (dict,),
    "bytes_shared": (int,),
    "exact": (bool,),
    "seconds": (dict,),
    "versions": (dict,),
}
"""What a result must hold; what came later (`split`, `facts`, `tuning`) may be absent."""


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        source: Where it was found, below the path that was asked for.
        content: Its `results.json`, checked.
        matrix: Accuracy of every task after every task.
    """

    source: str
    content: dict[str, Any]
    matrix: AccuracyMatrix

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.content["method"]["name"])

    @property
    def tasks(self) -> list[str]:
        """The tasks in their order."""
        return list(self.content["tasks"])

    @property
    def split(self) -> str:
        """The rows that were measured; files of before there was a choice are of test rows."""
        return str(self.content.get("split", "test"))

    @property
    def tuning(self) -> dict[str, Any]:
        """The grid and its outcome; empty where nothing was tuned."""
        return self.content.get("tuning") or {}

    @property
    def tuned(self) -> frozenset[str]:
        """Dotted keys that tuning chose."""
        return frozenset(self.tuning.get("chosen", {}))

    def mean_bytes(self, part: str) -> float:
        """Return the mean over tasks of `bytes_per_task` or `head_bytes_per_task`."""
        return sum(self.content[part].values()) / len(self.tasks)

    @property
    def carried(self) -> int:
        """The bytes that only learning the next task needs, of all tasks; files of before they were counted have 0."""
        return int(self.content.get("bytes_carried", 0))

    def capacity(self) -> list[float | None]:
        """Return the share of the store that has an owner after each task, None where a method has no store."""
        facts = self.content.get("facts") or {}
        return [facts.get(name, {}).get("capacity_used") for name in self.tasks]

    def seconds(self) -> list[float]:
        """Return the seconds of each task's training; empty where they were not taken."""
        taken = self.content["seconds"].get("by_task") or {}
        return [float(taken[name]) for name in self.tasks if name in taken]


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Return the results that lie at paths: run folders, result files, or folders of such.

    A file that is named twice, or that is a copy of another, counts once.

    Raises:
        RunError: A path holds no result, or a file is none.
    """
    found: dict[bytes, Result] = {}
    for path in paths:
        before = len(found)
        files = list(_files(path))
        for file, asked in files:
            data = file.read_bytes()
            content = _parse(data, file)
            if asked or _is_result(content):
                source = file.relative_to(path.parent) if file != path else Path(file.name)
                found.setdefault(data, _check(content, file, source.as_posix()))
        if len(found) == before and not any(file.read_bytes() in found for file, _ in files):
            raise RunError(
                f"{path}: holds no finished run. Give a run folder, its {RESULTS}, or a folder that holds some; a run "
                f"that is not finished goes on with hf-cl train ... --resume."
            )
    return list(found.values())


def _files(path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield candidate files, and whether each was asked for by name or by its run's folder."""
    if path.is_file():
        yield path, True
    elif (path / RESULTS).is_file():
        yield path / RESULTS, True
    elif path.is_dir():
        for file in sorted(path.rglob("*.json")):
            if file.is_file():
                yield file, file.name == RESULTS
    else:
        raise RunError(f"{path}: no such file or folder. Give a run folder, its {RESULTS}, or a folder of such.")


def _parse(data: bytes, file: Path) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        if file.name != RESULTS and b"accuracy_matrix" not in data:
            return None  # another program's file, in a folder of many
        raise RunError(f"{file}: is no JSON ({error}). Restore it from a copy, or run again.") from error


def _is_result(content: Any) -> bool:
    return isinstance(content, Mapping) and "accuracy_matrix" in content


def _check(content: Any, file: Path, source: str) -> Result:
    if not isinstance(content, Mapping):
        raise RunError(f"{file}: is no {RESULTS}: expected a mapping, found {type(content).__name__}.")
    for key, kinds in KINDS.items():
        if key not in content:
            raise RunError(f"{file}: is no {RESULTS}: it has no {key!r}. Give a file that `hf-cl train` wrote.")
        if not isinstance(content[key], kinds):
            raise RunError(f"{file}: {key!r} is {type(content[key]).__name__}, expected {kinds[0].__name__}.")
    tasks = content["tasks"]
    try:
        matrix = AccuracyMatrix.from_list(tasks, content["accuracy_matrix"])
    except (DataError, TypeError) as error:
        raise RunError(f"{file}: its accuracies cannot be read: {error}") from error
    if len(matrix.learned) != len(tasks):
        raise RunError(f"{file}: {len(matrix.learned)} of {len(tasks)} tasks are measured. Finish the run first.")
    _check_parts(content, file)
    return Result(source, dict(content), matrix)


def _check_parts(content: Mapping[str, Any], file: Path) -> None:
    tasks, method = content["tasks"], content["method"]
    seconds = content["seconds"].get("by_task") or {}
    facts, most = content.get("facts") or {}, content.get("most_rows") or {}
    holds = {
        "tasks": all(isinstance(name, str) for name in tasks),
        "method": isinstance(method.get("name"), str) and isinstance(method.get("options"), dict),
        "bytes_per_task": _has_numbers(content["bytes_per_task"], tasks),
        "head_bytes_per_task": _has_numbers(content["head_bytes_per_task"], tasks),
        "bytes_carried": _is_number(content.get("bytes_carried", 0)),
        "seconds": isinstance(seconds, dict) and all(map(_is_number, seconds.values())),
        "facts": _maps_to_mappings(facts)
        and all(_is_number(fact.get("capacity_used", 0) or 0) for fact in facts.values()),
        "most_rows": _maps_to_mappings(most),
        "tuning": _is_tuning(content.get("tuning") or {}),
    }
    wrong = [key for key, held in holds.items() if not held]
    if wrong:
        raise RunError(f"{file}: {wrong[0]!r} is not what `hf-cl train` writes there. Restore it, or run again.")


def _has_numbers(sizes: Mapping[str, Any], tasks: Sequence[str]) -> bool:
    return set(sizes) == set(tasks) and all(map(_is_number, sizes.values()))


def _maps_to_mappings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def _is_tuning(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("chosen", {}), dict):
        return False
    trials, names = value.get("trials", []), value.get("tasks", [])
    if not isinstance(trials, list) or not isinstance(names, list):
        return False
    return all(
        isinstance(trial, dict)
        and isinstance(trial.get("options"), dict)
        and _is_number(trial.get("validation_accuracy") or 0)
        for trial in trials
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
