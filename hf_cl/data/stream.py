"""A stream: the tasks in the order in which they are learned.

It is written as a name (a ready stream of the folder `HF_CL_DATA`), as that name with options, or as
its tasks. All of it is read before any data are, so a slip in the last task shows at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_cl.config import did_you_mean, option, read
from hf_cl.data.sources import local_path
from hf_cl.data.task import TaskSpec
from hf_cl.errors import ConfigError, DataError

WHERE = "stream"
ORDER = ("reverse", "first")
# What a ready stream says itself, so that no option may say it for all tasks.
OF_THE_STREAM = ("name", "dataset", "config", "data_files", "labels")


@dataclass(frozen=True)
class Step:
    """One step of a stream in `streams.json`."""

    name: str = option(help="Name of the task.")
    task: str = option(help="Folder of its data, beside `streams.json`.")
    labels: tuple[str, ...] | None = option(None, help="Labels to keep; all by default.")


def read_stream(
    value: str | Mapping[str, Any] | list[Any],
    *,
    data_dir: Path | None,
    root: Path | None,
    defaults: Mapping[str, Any] = {},
) -> tuple[TaskSpec, ...]:
    """Read a stream as a recipe writes it.

    A task's own option wins over the stream's, and that over `defaults`. Local paths in the result are
    absolute, so it can be loaded from anywhere.

    Args:
        value: A name in `<data_dir>/streams.json`; or `{name: NAME, <option>: ...}`, a named stream
            with options for all its tasks, and `reverse: true` or `first: N` for its order and length;
            or `{tasks: [...], <option>: ...}`; or a list of tasks.
        data_dir: Folder of ready streams, which is `$HF_CL_DATA`, or None if that is not set.
        root: What relative local paths start from, the recipe's folder; by default the working directory.
        defaults: Options for all tasks that do not say otherwise.

    Raises:
        ConfigError: There is no such stream, an option is unknown, a name occurs twice, or no task is left.
        DataError: `streams.json` cannot be read, or names a folder that is not there.
    """
    shared = {**_shared(defaults, ("name",), f"{WHERE} defaults")}
    if isinstance(value, str):
        tasks = _named(value, data_dir)
    elif isinstance(value, Mapping) and "name" in value and "tasks" not in value:
        tasks = _named(value["name"], data_dir)
        options = {key: entry for key, entry in value.items() if key not in ("name", *ORDER)}
        tasks = _ordered(tasks, {key: value[key] for key in ORDER if key in value})
        shared |= _shared(options, OF_THE_STREAM, WHERE)
    elif isinstance(value, Mapping):
        tasks, options = _written(value)
        shared |= _shared(options, ("name",), WHERE)
    else:
        tasks, _ = _written({"tasks": value})
    specs = tuple(_spec(task, shared, index, root) for index, task in enumerate(tasks))
    _check_names(specs)
    return specs


def _written(value: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    if "tasks" not in value or "name" in value:
        found = ", ".join(map(str, value)) or "nothing"
        raise ConfigError(f"{WHERE}: give either `name`, a ready stream, or `tasks`, a list (found: {found}).")
    tasks = value["tasks"]
    if not isinstance(tasks, list | tuple):
        raise ConfigError(f"{WHERE}: expected a name, a mapping or a list of tasks, found {tasks!r:.80}.")
    return list(tasks), {key: entry for key, entry in value.items() if key != "tasks"}


def _shared(options: Mapping[str, Any], refused: tuple[str, ...], where: str) -> Mapping[str, Any]:
    """Check options that hold for all tasks, where they stand and not once for each task."""
    for key in refused:
        if key in options:
            raise ConfigError(f"{where}: {key!r} belongs to a single task, not to all. Leave it out here.")
    read(TaskSpec, {**options, "name": WHERE}, where)
    return options


def _spec(task: Any, shared: Mapping[str, Any], index: int, root: Path | None) -> TaskSpec:
    where = f"{WHERE}.tasks[{index}]"
    if not isinstance(task, Mapping):
        raise ConfigError(f"{where}: expected a mapping of options, found {task!r:.80}.")
    spec = read(TaskSpec, {**shared, **task}, where)
    if spec.dataset is None and spec.data_files is None:
        raise ConfigError(f"{where}: task {spec.name!r} has no data. Give `dataset`, or `data_files`.")
    return _absolute(spec, root)


def _absolute(spec: TaskSpec, root: Path | None) -> TaskSpec:
    """Return the task with absolute local paths; a Hub id stays as it is."""
    base = (root or Path()).expanduser()
    path = None if spec.dataset is None else local_path(spec.dataset, root)
    if path is not None:
        spec = replace(spec, dataset=str(path.resolve()))
    elif spec.dataset is None and spec.data_files is not None:
        files = {split: str((base / Path(file).expanduser()).resolve()) for split, file in spec.data_files.items()}
        spec = replace(spec, data_files=files)
    return spec


def _named(name: Any, data_dir: Path | None) -> list[dict[str, Any]]:
    if not isinstance(name, str):
        raise ConfigError(f"{WHERE}.name: expected str, found {name!r} ({type(name).__name__}).")
    if data_dir is None:
        raise ConfigError(
            f"{WHERE}: {name!r} is the name of a ready stream, but HF_CL_DATA is not set. Set it to the "
            "folder that holds streams.json, or list the tasks."
        )
    file = data_dir.expanduser() / "streams.json"
    streams = _streams(file)
    if name not in streams:
        raise ConfigError(f"{WHERE}: there is no {name!r} in {file}.{did_you_mean(name, streams)}")
    if not isinstance(streams[name], list):
        raise DataError(f"{file}: {name!r} is no list of steps, but {streams[name]!r:.80}.")
    steps = [read(Step, step, f"{file}, {name}[{index}]") for index, step in enumerate(streams[name])]
    return [_task(step, data_dir, f"{file}, {name}") for step in steps]


def _ordered(tasks: list[dict[str, Any]], order: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a ready stream's tasks from the last to the first, or the first few of them; both in this order."""
    reverse, first = order.get("reverse", False), order.get("first", len(tasks))
    if not isinstance(reverse, bool):
        raise ConfigError(f"{WHERE}.reverse: expected true or false, found {reverse!r}.")
    if isinstance(first, bool) or not isinstance(first, int) or not 1 <= first <= len(tasks):
        raise ConfigError(f"{WHERE}.first: expected a number of tasks from 1 to {len(tasks)}, found {first!r}.")
    return (tasks[::-1] if reverse else tasks)[:first]


def _streams(file: Path) -> dict[str, Any]:
    try:
        streams = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"There is no {file}. Set HF_CL_DATA to the folder that holds it.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}. Correct it.") from error
    if not isinstance(streams, dict):
        raise DataError(f"{file}: expected an object of streams, found {streams!r:.80}.")
    return streams


def _task(step: Step, data_dir: Path, where: str) -> dict[str, Any]:
    folder = data_dir.expanduser() / step.task
    if not folder.is_dir():
        raise DataError(f"{where}: there is no folder {step.task!r} for task {step.name!r} in {data_dir}.")
    task: dict[str, Any] = {"name": step.name, "dataset": str(folder.resolve())}
    if step.labels is not None:
        task["labels"] = step.labels
    return task


def _check_names(specs: tuple[TaskSpec, ...]) -> None:
    if not specs:
        raise ConfigError(f"{WHERE}: it has no tasks. List one or more.")
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{WHERE}: two tasks are called {name!r}. Give each task a name of its own.")
