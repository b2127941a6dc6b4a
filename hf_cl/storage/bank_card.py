"""The README of a bank in a repository of the Hub: what it is, how it is loaded, what its tasks are, what is promised.

Everything is taken from the manifest. Names in it are data that somebody chose: in Markdown each character that could
mean something there is written as an entity, in YAML and in code as a quoted string of printable characters.

What the repository's owner has written is kept: our section stands between two marks, and of the metadata only what
the bank determines is set.
"""

import math
import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_cl.errors import BankError, ConfigError
from hf_cl.errors import shown as escaped
from hf_cl.storage.manifest import Manifest, TaskEntry

README = "README.md"
START, END = "<!-- hf_cl bank: begin -->", "<!-- hf_cl bank: end -->"
TYPE = "text-classification"
METRICS = {"accuracy": ("accuracy", "Accuracy"), "macro_f1": ("f1", "Macro F1"), "loss": ("loss", "Loss")}
"""Type and name, in the Hub's words, of what each task is measured by; the user's own keep their names."""
MOST_LABELS, MOST_NAME = 12, 80
"""Shown of a task's labels, and characters of a name: a card is for reading, the manifest holds all."""
_OURS = re.compile(f"{START}.*{END}", re.DOTALL)
_METRIC = re.compile(r"[A-Za-z]\w{0,40}", re.ASCII)
_PLAIN = re.compile(r"[^\w ,/()'%+-]|_")
"""Characters that Markdown, HTML or GitHub's tables and links give a meaning to: all but these."""


def base_of(manifest: Manifest, base_id: str | None) -> str:
    """Return the Hub id of a bank's base.

    Args:
        manifest: Has it, unless the base was a local folder.
        base_id: The id, where the manifest has none.

    Raises:
        BankError: Neither knows it, or they contradict each other.
        ConfigError: It is no id of a repository.
    """
    held = manifest.base.id
    if held is not None and base_id not in (None, held):
        raise BankError(f"base_id: the bank was learned on {held!r}, not on {base_id!r}. Leave base_id out.")
    name = held or base_id
    if name is None:
        raise BankError(
            f"base_id: this bank was learned on a local folder, and knows of it only the fingerprint "
            f"{manifest.base.fingerprint[:16]}.... Whoever loads it needs the base: give its Hub id as "
            f"push_to_hub(..., base_id='name/model'), or keep it in the bank by "
            f"MaskBank.from_learner(learner, base_id='name/model')."
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"base_id: {name!r} is no repository of the Hub ({error}). Give one, as 'name/model'."
        ) from error
    return name


def bank_card(manifest: Manifest, repo_id: str, base: str, held: bytes | None = None) -> str:
    """Return the README of a bank.

    Args:
        manifest: The bank.
        repo_id: Its repository.
        base: Hub id of its base.
        held: The README that the repository has; what is not ours in it is kept.

    Raises:
        BankError: The held one has metadata that cannot be read, or this one could not be written.
    """
    section = f"{START}\n{_section(manifest, repo_id, base)}\n{END}"
    try:
        card = _held(held) if held is not None and held.strip() else None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise BankError(
            f"{repo_id}: the metadata of its {README} cannot be read ({_printable(str(error))}). Correct or delete it "
            f"there, and push again."
        ) from error
    if card is None:
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n# {shown(repo_id.split('/')[-1])}\n\n{section}\n")
    elif ours := _OURS.search(card.text):
        card.text = card.text[: ours.start()] + section + card.text[ours.end() :]
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    _describe(card.data, manifest, repo_id, base)
    content = str(card)
    try:
        content.encode()
        same = ModelCard(content).data.to_dict() == card.data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise BankError(f"{repo_id}: its {README} cannot be written ({_printable(str(error))}).") from error
    if not same:
        raise BankError(f"{repo_id}: its {README} would not be read as it is written. Simplify the metadata there.")
    return content


def _held(held: bytes) -> Any:
    text = held.decode("utf-8-sig")
    # A card without metadata is given empty ones: the client would warn of it.
    return ModelCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n\n{text}")


def shown(text: str) -> str:
    """Return a text as Markdown shows it letter by letter, in a table too; control characters by their escapes."""
    return _PLAIN.sub(lambda found: f"&#{ord(found[0])};", _printable(text))


def _printable(text: str) -> str:
    """Return a text of printable characters, on one line, not too long; others by their escapes."""
    cut = text if len(text) <= MOST_NAME else text[: MOST_NAME - 1] + "…"
    return escaped(cut)


# --- the metadata -------------------------------------------------------------------------------------


def _describe(data: Any, manifest: Manifest, repo_id: str, base: str) -> None:
    """Set in a card's metadata what the bank determines; the rest is its owner's."""
    results = [result for task in manifest.tasks for result in _results(task, _twice(manifest))]
    found = [_dataset(task)[0] for task in manifest.tasks if _is_id(_dataset(task)[0])]
    data.library_name, data.pipeline_tag = "hf_cl", TYPE
    data.base_model, data.base_model_relation = base, "adapter"
    tags = data.tags if isinstance(data.tags, list) else []
    data.tags = [*tags, *(tag for tag in ("hf_cl", "continual-learning") if tag not in tags)]
    data.datasets = sorted(set(found)) or None
    data.metrics = sorted({result.metric_type for result in results} - {"loss"}) or None
    data.model_name, data.eval_results = (repo_id.split("/")[-1], results) if results else (None, None)


def _results(task: TaskEntry, twice: set[tuple[str, str | None]]) -> list[EvalResult]:
    dataset, config = _dataset(task)
    # The Hub tells results apart by data set and configuration alone: where two tasks share both, by their number.
    shared = (dataset, config) in twice or not _is_id(dataset)
    return [
        EvalResult(
            task_type=TYPE,
            task_name="Text Classification",
            dataset_type=dataset if _is_id(dataset) else "unknown",
            dataset_name=_word(task.name),
            dataset_config=f"task {task.index}" if shared else config,
            dataset_split="test",
            metric_type=METRICS.get(metric, (metric, metric))[0],
            metric_name=METRICS.get(metric, (metric, metric))[1],
            metric_value=value,
        )
        for metric, value in sorted(task.metrics.items())
        if _METRIC.fullmatch(metric) and isinstance(value, int | float) and math.isfinite(value)
    ]


def _twice(manifest: Manifest) -> set[tuple[str, str | None]]:
    sources = [_dataset(task) for task in manifest.tasks]
    return {source for source in sources if sources.count(source) > 1}


def _dataset(task: TaskEntry) -> tuple[str, str | None]:
    """Return the data set that a task names as its source, and the configuration, where it names one."""
    owner, *rest = task.source.split("/")
    return ("/".join([owner, *rest[:1]]), "/".join(rest[1:]) or None)


def _is_id(dataset: str) -> bool:
    """Return whether this is a data set's id on the Hub; rows of a folder or out of memory have none."""
    if dataset == "memory":
        return False
    try:
        validate_repo_id(dataset)
    except HFValidationError:
        return False
    return True


def _word(name: str) -> str:
    """Return a name that every reader of YAML takes for a text: what looks like a number is none by this."""
    text = _printable(name)
    return text if text[:1].isalpha() else f"task {text}"


# --- the text -----------------------------------------------------------------------------------------


def _section(manifest: Manifest, repo_id: str, base: str) -> str:
    total = sum(file.bytes for file in manifest.files)
    count = len(manifest.tasks)
    first = manifest.tasks[0].name if manifest.tasks else "a task"
    dtype = "" if manifest.base.dtype == "float32" else f", dtype={_quoted(manifest.base.dtype)}"
    name = _quoted(first)
    return f"""A bank of {count} text-classification task{"" if count == 1 else "s"} on `{base}`, learned one after
another by masks over its weights: no task changes what an earlier one reads. Whoever asks says which task. All files
together have {total:,} bytes.

```python
from hf_cl import MaskBank
from hf_cl.layers.base import load_base

bank = MaskBank.from_pretrained({_quoted(repo_id)})
base = load_base({_quoted(base)}{dtype})
model = bank.attach(base.model, tasks=[{name}])
classify = bank.pipeline({name}, model, base.tokenizer)
print(classify("a text of yours"))
```

## Tasks

| task | labels | data | accuracy | density | values | bytes |
|---|---|---|---|---|---|---|
{chr(10).join(_row(task) for task in manifest.tasks)}

Accuracy is that on the task's test rows, when it was learned. Density is the share of the masked weights that the
task's mask holds. Values are the seed's alone, or trained where nobody owned them.

## What is promised, and what is not

- Each file is compared with the sha256 in `bank.json` before a byte of it is parsed. The files are JSON and
  safetensors: nothing in them is run.
- `bank.verify()` recomputes every task's digests from the files; `bank.verify(base)` also runs each task's probe.
- Another base than the one with the fingerprint `{manifest.base.fingerprint[:16]}...` is refused.
- A digest says that nothing was damaged, not who wrote it. To have this very bank and no later one, pass
  `expected_digest="{manifest.digest}"` or a commit as `revision`.
- Not promised: the same last bits of the logits on another device, in another data type or in other batches."""


def _quoted(text: str) -> str:
    """Return a text as Python writes it; where nothing in it needs care, in this package's style."""
    return f'"{text}"' if re.fullmatch(r"[\w ./-]*", text, re.ASCII) else repr(text)


def _row(task: TaskEntry) -> str:
    labels = [shown(label) for label in task.labels[:MOST_LABELS]]
    more = f" … ({len(task.labels)} in all)" if len(task.labels) > MOST_LABELS else ""
    found = task.metrics.get("accuracy")
    accuracy = f"{found:.4f}" if isinstance(found, int | float) and math.isfinite(found) else "-"
    values = "seeded" if task.trains == "nothing" else shown(task.values_dtype)
    cells = [shown(task.name), ", ".join(labels) + more, shown(task.source), accuracy, f"{task.density:g}", values]
    return "| " + " | ".join([*cells, f"{task.file.bytes:,}"]) + " |"
