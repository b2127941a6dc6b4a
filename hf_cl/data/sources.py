"""Where rows come from: the Hub, local files, or memory. All three end in `build`.

Nothing here runs code that comes with data: no loading scripts, no pickles. `datasets` does all the
reading, so `HF_HOME` and `HF_HUB_OFFLINE` hold as everywhere.
"""

import glob
import json
import pkgutil
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict, NamedSplit, load_dataset, packaged_modules
from datasets.exceptions import DatasetsError

from hf_cl.config import did_you_mean
from hf_cl.data.build import build
from hf_cl.data.task import Task, TaskSpec
from hf_cl.errors import ConfigError, DataError

# File ending -> reader, and its options. Not `load_dataset`, which even for local files tells the Hub that
# it was called, and without a network waits for the name server. Only an empty csv cell is a missing value:
# by default pandas also takes the texts "null", "NA" and "None" for one.
FORMATS: dict[str, tuple[Callable[..., Dataset], dict[str, object]]] = {
    ".parquet": (Dataset.from_parquet, {}),
    ".csv": (Dataset.from_csv, {"keep_default_na": False, "na_values": [""]}),
    ".jsonl": (Dataset.from_json, {}),
}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# What `datasets` raises for missing, unreachable, corrupt or inconsistent data. StopIteration is its
# answer to a jsonl file without a row.
UNREADABLE = (DatasetsError, OSError, ValueError, TypeError, RuntimeError, StopIteration)


def load_task(spec: TaskSpec, root: Path | None = None) -> Task:
    """Read a task from the Hub or from local files.

    A `dataset` that exists under `root` is local, anything else is a Hub id. A local folder holds
    `<split>.parquet`, `.csv` or `.jsonl`, and may hold a `labels.json`: a list of label names, or an
    object with that list as `label_names`.

    Args:
        spec: What to read.
        root: What relative local paths start from, the recipe's folder; by default the working directory.

    Raises:
        ConfigError: `dataset`, `config` and `data_files` do not go together.
        DataError: The data cannot be read, or are not what the task says.
    """
    if spec.dataset is None and spec.data_files is None:
        raise ConfigError(f"Task {spec.name!r}: it has no data. Give `dataset`, or `data_files`.")
    path = None if spec.dataset is None else local_path(spec.dataset, root)
    if path is None and spec.data_files is None:
        return _load_hub(spec, spec.dataset or "")
    if path is None and spec.dataset is not None:
        raise ConfigError(
            f"Task {spec.name!r}: `data_files` are local files, but {spec.dataset!r} is no local folder. "
            "Leave out one of the two."
        )
    if spec.config is not None:
        raise ConfigError(
            f"Task {spec.name!r}: `config` is {spec.config!r}, but only a Hub data set has one, and this is "
            "local data. Leave it out."
        )
    return _load_local(spec, path, (root or Path()).expanduser())


def task_from_datasets(
    name: str,
    datasets: Dataset | DatasetDict | Mapping[str, Dataset],
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str = "label",
    labels: tuple[str, ...] | None = None,
    max_train: int | None = None,
    max_validation: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
) -> Task:
    """Make a task of data in memory.

    Args:
        name: The task's name.
        datasets: The splits `train`, `test` and, if there is one, `validation`; without it, 10 % of train are
            carved out. One `Dataset` alone has no splits: of it, 10 % become the test split first.
        text: Column of the text.
        text_pair: Column of a pair's second text; by default `text_pair` if there is such a column.
        label: Column of the label: a `ClassLabel`, or strings.
        labels: Names of the labels to keep, numbered in this order; all by default.
        max_train: Most training rows to take, stratified by class.
        max_validation: Most validation rows to take, stratified by class.
        max_test: Most test rows to take, stratified by class.
        seed: Seed of the rows taken and carved.

    Raises:
        ConfigError: An argument can belong to no task.
        DataError: The data are not what the arguments say.
    """
    spec = TaskSpec(
        name=name,
        text=text,
        text_pair=text_pair,
        label=label,
        labels=None if labels is None else tuple(labels),
        max_train=max_train,
        max_validation=max_validation,
        max_test=max_test,
        seed=seed,
    )
    return build(spec, _splits_in_memory(spec, datasets), None, "memory")


def local_path(dataset: str, root: Path | None) -> Path | None:
    """Return the path of a local data set, or None if the name is a Hub id.

    Raises:
        DataError: It is neither, or it could be both.
    """
    path = (root or Path()).expanduser() / Path(dataset).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(dataset) or Path(dataset).suffix in FORMATS:
        raise DataError(f"`dataset` {dataset!r} is no Hub id, and there is no file or folder {path}.")
    if Path(dataset).exists():
        raise DataError(f"`dataset` {dataset!r} is in the working directory, not in {path.parent}. Give its full path.")
    return None


def _choose_splits(spec: TaskSpec, known: Collection[str]) -> dict[str, str]:
    """Return which split of the data is train, validation (if there is one) and test."""
    chosen = {"train": spec.train_split, "test": spec.test_split}
    validation = spec.validation_split
    # Only the default name may be absent: whoever names a split means it.
    absent = validation == "validation" and validation not in known
    if validation is not None and validation != spec.test_split and not absent:
        chosen["validation"] = validation
    found = ", ".join(map(str, known)) or "none"
    for part, split in chosen.items():
        if split not in known:
            raise DataError(
                f"Task {spec.name!r}: there is no split {split!r} (found: {found}). "
                f"Name the right one by `{part}_split`."
            )
    return chosen


def _splits_in_memory(spec: TaskSpec, data: Dataset | Mapping[str, Dataset]) -> dict[str, Dataset]:
    if isinstance(data, Dataset):
        return {"train": data}
    if not isinstance(data, Mapping):
        raise DataError(
            f"Task {spec.name!r}: expected a Dataset or a mapping of them, found {type(data).__name__}. "
            "Turn it into a `datasets.Dataset`."
        )
    for split, dataset in data.items():
        if not isinstance(dataset, Dataset):
            raise DataError(
                f"Task {spec.name!r}, split {split!r}: expected a Dataset, found {type(dataset).__name__}. "
                "Turn it into a `datasets.Dataset`."
            )
    return {part: data[split] for part, split in _choose_splits(spec, data).items()}


def _load_hub(spec: TaskSpec, dataset: str) -> Task:
    # `datasets` takes such a name for a file format, and would read whatever is in the working directory.
    if dataset in {module.name for module in pkgutil.iter_modules(packaged_modules.__path__)}:
        raise ConfigError(
            f"Task {spec.name!r}: {dataset!r} is a file format, not a data set. Leave out `dataset`, and "
            "name the files by `data_files`."
        )
    source = dataset if spec.config is None else f"{dataset}/{spec.config}"
    try:
        splits = load_dataset(dataset, spec.config)
    except UNREADABLE as error:
        raise DataError(
            f"Task {spec.name!r}: the Hub data set {source!r} cannot be loaded: {_reason(error)}. Check "
            "its name and `config`; without a network, it must be in the cache of `datasets`."
        ) from error
    chosen = _choose_splits(spec, splits)
    return build(spec, {part: splits[split] for part, split in chosen.items()}, None, source)


def _load_local(spec: TaskSpec, path: Path | None, root: Path) -> Task:
    if path is not None and path.is_file():
        if spec.data_files is not None:
            raise ConfigError(
                f"Task {spec.name!r}: `dataset` is a file ({path.name}), and there are `data_files` too. "
                "List it in `data_files`, and leave out `dataset`."
            )
        files = {"train": path}
    else:
        files = _choose_files(spec, path, root)
    folder = path if path is not None and path.is_dir() else files["train"].parent
    listed = _read_names(spec, folder / "labels.json")
    splits = {part: _read_file(spec, part, file) for part, file in files.items()}
    name = (path or files["train"]).resolve()
    return build(spec, splits, listed, f"local:{name.name if name.is_dir() else name.stem}")


def _choose_files(spec: TaskSpec, folder: Path | None, root: Path) -> dict[str, Path]:
    if spec.data_files is not None:
        base = folder or root
        known = {split: [base / Path(file).expanduser()] for split, file in spec.data_files.items()}
    else:
        known = {}
        for file in sorted((folder or root).iterdir()):
            if file.suffix in FORMATS:
                known.setdefault(file.stem, []).append(file)
    files = {}
    for part, split in _choose_splits(spec, known).items():
        if len(known[split]) > 1:
            found = " and ".join(file.name for file in known[split])
            raise DataError(
                f"Task {spec.name!r}, split {split!r}: there are {found}. Keep one, or choose by `data_files`."
            )
        files[part] = known[split][0]
    return files


def _read_file(spec: TaskSpec, part: str, file: Path) -> Dataset:
    where = f"Task {spec.name!r}, {part} file {file}"
    if not file.is_file():
        raise DataError(f"{where}: there is no such file. Correct `dataset` or `data_files`.")
    if file.suffix not in FORMATS:
        raise DataError(f"{where}: unknown ending {file.suffix!r}.{did_you_mean(file.suffix, FORMATS)}")
    reader, options = FORMATS[file.suffix]
    if file.stat().st_size == 0:
        raise DataError(f"{where}: it has no rows. Give it rows, or name another.")
    # `datasets` takes a name for a pattern: unescaped, a folder `a[1]` would not be found.
    pattern = glob.escape(str(file.resolve()))
    try:
        return reader(pattern, split=NamedSplit(part), **options)
    except UNREADABLE as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{where}: it has no rows. Give it rows, or name another.") from error
        raise DataError(
            f"{where}: it cannot be read as {file.suffix[1:]}: {_reason(error)}. Write it anew, or correct its ending."
        ) from error


def read_texts(file: Path, column: str = "text") -> list[str]:
    """Return one column of a parquet, csv or jsonl file; of a file with a column `split`, its rows of `test` alone.

    Args:
        file: The file.
        column: Name of the column.

    Raises:
        DataError: It cannot be read, has no such column, or something else than texts in it.
    """
    spec = TaskSpec("texts", dataset=str(file), text=column)
    rows = _read_file(spec, "texts", file)
    if column not in rows.column_names:
        raise DataError(f"{file}: there is no column {column!r}; it has {', '.join(rows.column_names)}.")
    texts, splits = rows[column], rows["split"] if "split" in rows.column_names else None
    chosen = [text for place, text in enumerate(texts) if splits is None or splits[place] == "test"]
    if not chosen or not all(isinstance(text, str) for text in chosen):
        raise DataError(f"{file}: column {column!r} holds no texts, or something else among them. Correct it.")
    return chosen


def _read_names(spec: TaskSpec, file: Path) -> tuple[str, ...] | None:
    if not file.is_file():
        return None
    where = f"Task {spec.name!r}, {file}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{where}: it is no JSON: {error}. Correct it, or remove it.") from error
    names = content.get("label_names") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: expected a list of label names, bare or as `label_names`, found {content!r:.80}.")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where}: it holds the label {name!r} twice. Give each label a name of its own.")
    return tuple(names)


def _reason(error: BaseException) -> str:
    """Return what went wrong, which `datasets` often hides in the cause, on one line."""
    text = str(error.__cause__ or error) or type(error).__name__
    return textwrap.shorten(text, 400).rstrip(".")
