"""`ContinualLearner`: learn one task after another on one base, and keep every earlier one as it was."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_cl import plugins, ranks
from hf_cl.data import Task, collator, tokenise
from hf_cl.errors import BankError, BaseMismatchError, ConfigError, DataError, RunError
from hf_cl.layers.base import Base, lasting, load_base
from hf_cl.layers.heads import PROBLEMS
from hf_cl.layers.targets import find_head
from hf_cl.metrics import AccuracyMatrix
from hf_cl.packing.entries import gives_bank
from hf_cl.packing.grow import cut, digests_before, grow
from hf_cl.packing.shared import open_shared
from hf_cl.packing.shelf import BankShelf, fixed_by
from hf_cl.proof import probe_digest
from hf_cl.recipe import EVALUATE
from hf_cl.storage.bank_folder import FolderReader, Reader, read_manifest, write_bank
from hf_cl.storage.manifest import MANIFEST, FileEntry, Manifest, TaskEntry
from hf_cl.storage.run_folder import BANK, RunFolder
from hf_cl.training.agreement import CHECK_STEPS
from hf_cl.training.collect import TEXTS, RouterState
from hf_cl.training.evaluation import ComputeMetrics
from hf_cl.training.evaluation import evaluate as measure
from hf_cl.training.keeping import Keeping
from hf_cl.training.masked import MaskedMethod
from hf_cl.training.method import Method, Packed
from hf_cl.training.train_task import Training, train_task
from hf_cl.tuner import MaskConfig

MASK_SHARE = 0.67
"""Share of a task's steps that train its mask, where a bare `MaskConfig` trains values too."""


class ContinualLearner:
    """Learns a stream of text-classification tasks on one pretrained encoder.

    Example:
        >>> from hf_cl import ContinualLearner, MaskConfig
        >>> # learner = ContinualLearner("sentence-transformers/all-MiniLM-L6-v2")
        >>> # learner.learn(task); learner.evaluate(); learner.save_pretrained("my-run")
    """

    def __init__(
        self,
        base: "str | nn.Module | Base",
        tokenizer: Any = None,
        config: Any = None,
        training_args: TrainingArguments | None = None,
        *,
        max_length: int = 128,
        compute_metrics: ComputeMetrics | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
        data_collator: Any = None,
        trainer_class: type[Trainer] = Trainer,
        evaluate: str = "all",
        check_steps: int = CHECK_STEPS,
        routing: int = TEXTS,
    ) -> None:
        """Choose base, way to learn, and training arguments.

        Args:
            base: Hub id or folder, a loaded sequence classifier (with its `tokenizer`), or a `Base`.
            tokenizer: The tokenizer of a loaded model.
            config: A `MaskConfig`, or the `Options` of any method, as in `exssnet.Options(density=.02)`.
                None is `MaskConfig()`: SupSup with the defaults.
            training_args: As for any Trainer; each task trains with these.
            max_length: Tokens a text (or a pair) is cut to.
            compute_metrics: Your own metrics; accuracy and macro-F1 are always there.
            callbacks: Your own callbacks, added to every task's Trainer.
            data_collator: Makes a batch of tokenised rows; None pads them to the longest.
            trainer_class: Your own Trainer, for training; evaluation is the plain one's.
            evaluate: Which earlier tasks `learn` measures anew: `all`, or those that `changed`. A task whose digests
                are those of its commit keeps its metrics then: all that its forward reads is what it was. This
                makes the work for a stream of exact tasks linear in its length instead of quadratic.
            check_steps: Optimizer steps between two comparisons of what the ranks hold, where there are several.
            routing: Training texts of each task that what routers know of it is made from, where the method gives a
                bank; they go through the bare base once. 0 collects nothing: docs/routing.md says what that costs.

        Raises:
            ConfigError: A loaded model without a tokenizer, a config of no method, another `evaluate`, or `routing`
                below 0.
            BaseModelError: The base cannot be loaded.
        """
        if evaluate not in EVALUATE:
            raise ConfigError(f"evaluate: expected {' or '.join(EVALUATE)}, found {evaluate!r}.")
        if isinstance(routing, bool) or not isinstance(routing, int) or routing < 0:
            raise ConfigError(f"routing: expected a number of texts, 0 for none, found {routing!r}.")
        named = config.head_modules if isinstance(config, MaskConfig) else None
        self.base = _as_base(base, tokenizer, named)
        self.args = training_args or TrainingArguments(output_dir="trainer_output", save_strategy="no", report_to=[])
        self.method_name, self.options, self.method = _as_method(self.base, config, int(self.args.seed))
        self.base = self.method.base
        if routing and isinstance(self.method, MaskedMethod) and gives_bank(self.method):
            self.method.routing = RouterState(routing)
        self.max_length, self.compute_metrics, self.callbacks = max_length, compute_metrics, callbacks
        self.data_collator, self.trainer_class = data_collator, trainer_class
        self._measure, self._check_steps = evaluate, check_steps
        self.correct: dict[str, np.ndarray] = {}
        """Which test rows of each task were answered rightly when it was last measured; bool, by name."""
        self.records: list[dict[str, Any]] = []
        self.bank: Manifest | None = None
        """What is in a bank already: the one it goes on from, or has saved last."""
        self.bank_folder: Path | None = None
        self.read: Reader | None = None
        self._tests: list[Any] = []
        self._since: list[str] | None = None  # digests before what it goes on from, where that was cut
        self._before = 0  # tasks of the bank it goes on from

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks learned, in order."""
        return [record["name"] for record in self.records]

    @property
    def learned(self) -> list[dict[str, Any]]:
        """The records of the tasks this learner learned itself, without those of a bank that it goes on from."""
        return self.records[self._before :]

    @property
    def matrix(self) -> AccuracyMatrix:
        """Test accuracy of every task it learned after every one of them, from the records."""
        names = [record["name"] for record in self.learned]
        rows = [[record["metrics"].get(name, {}).get("accuracy") for name in names] for record in self.learned]
        return AccuracyMatrix.from_list(names, rows)

    @property
    def model(self) -> nn.Module:
        """The model; `activate(name)` chooses the task it answers."""
        return self.method.model

    def learn(self, task: Task, keeping: Keeping | None = None) -> dict[str, Any]:
        """Learn a task, commit it, and evaluate every task seen so far.

        Args:
            task: From `load_task` or `task_from_datasets`.
            keeping: Where its training is kept in its middle, as `run_stream` does; None keeps nothing.

        Returns:
            The task's record: facts, digests by part, metrics of all tasks seen.

        Raises:
            DataError: A task of that name was learned already.
            TrainingError: The task's training failed; earlier tasks are untouched.
            RankError: The ranks of a job hold different bits.
        """
        if task.name in self.tasks:
            raise DataError(f"task {task.name!r} was learned already, as number {self.number(task.name)}. Rename it.")
        rows = tokenise(task, self.base.tokenizer, self.max_length)
        index = self._next
        training = train_task(
            self.method,
            index,
            task.labels,
            rows,
            self._collator(),
            self.args,
            self.compute_metrics,
            self.callbacks,
            self.trainer_class,
            self._check_steps,
            keeping,
        )
        try:
            return self._record(index, task, rows["test"], training)
        except BaseException:
            # A metric of the user's failed, or Ctrl-C: a task is learned whole or not at all.
            held = [record["index"] for record in self.records if record["index"] < index]
            del self.records[len(held) :], self._tests[len(held) :]
            self.method.abandon(index)
            raise

    def _record(self, index: int, task: Task, test: Dataset, training: Training) -> dict[str, Any]:
        """Record a committed task and evaluate every task seen so far."""
        self.method.activate(index)
        record: dict[str, Any] = {
            "index": index,
            "name": task.name,
            "labels": list(task.labels),
            "source": task.source,
            "facts": self.method.facts(index),
            "parts": self.method.parts(index),
            "probe": probe_digest(self.method.model),
            "device": next(self.method.model.parameters()).device.type,
            "metrics": {},
            "seconds": round(training.seconds, 3),
            "steps": training.steps,
        }
        held = {f"its {part}": digest for part, digest in record["parts"].items()}
        ranks.require_equal(held, f"after task {task.name!r}")
        self.records.append(record)
        self._tests.append(test)
        record["metrics"] = self._evaluate(self._unchanged() if self._measure == "changed" else {})
        return record

    def _unchanged(self) -> dict[str, dict[str, Any]]:
        """Return the last metrics of the earlier tasks whose digests are what they were at their commit."""
        last = self.records[-2]["metrics"] if len(self.records) > 1 else {}
        known = {name: metrics for name, metrics in last.items() if name in self.correct}
        return {
            record["name"]: known[record["name"]]
            for record in self.records[:-1]
            if record["name"] in known and self.method.parts(record["index"]) == record["parts"]
        }

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """Return fresh test metrics, by name, of every task learned whose rows are known: see `remember`."""
        return self._evaluate({})

    def _evaluate(self, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return metrics by name: those that are known, and fresh ones."""
        found = {}
        for index, name in enumerate(self.tasks):
            if name in known:
                found[name] = known[name]
                continue
            if index < self._before and self._tests[index] is None:
                continue
            self.activate(name)
            rows = self._test_rows(index)
            measured = measure(self.method.model, rows, self._collator(), self.args, self.compute_metrics)
            found[name], self.correct[name] = measured.metrics, measured.correct
        return found

    def _collator(self) -> Any:
        return self.data_collator or collator(self.base.tokenizer)

    def _test_rows(self, index: int) -> Any:
        rows = self._tests[index]
        if rows is None:
            raise DataError(f"task {self.tasks[index]!r} was restored without its rows. Give them with `remember`.")
        return rows

    def activate(self, name: str) -> None:
        """Make a learned task the one that `model` answers.

        Raises:
            ConfigError: No such task.
        """
        if name not in self.tasks:
            raise ConfigError(f"task {name!r} was not learned; learned are {', '.join(self.tasks) or 'none'}.")
        self.method.activate(self.number(name))

    def number(self, name: str) -> int:
        """Return a learned task's number; numbers of dropped tasks are not used again.

        Raises:
            ValueError: No such task.
        """
        return int(self.records[self.tasks.index(name)]["index"])

    @property
    def _next(self) -> int:
        held = self.bank.next_index if self.bank is not None else 0
        return max(held, *(record["index"] + 1 for record in self.records), 0)

    def remember(self, task: Task) -> None:
        """Give a restored task's rows back, so that it can be evaluated.

        Raises:
            DataError: No such task was learned, or its labels are others now.
        """
        if task.name not in self.tasks:
            raise DataError(f"task {task.name!r} was not learned; learned are {', '.join(self.tasks) or 'none'}.")
        labels = self.records[self.tasks.index(task.name)]["labels"]
        if list(task.labels) != list(labels):
            raise DataError(
                f"task {task.name!r} learned the labels {', '.join(labels):.200}, these rows have "
                f"{', '.join(task.labels):.200}. Give the rows it was learned on."
            )
        rows: DatasetDict = tokenise(task, self.base.tokenizer, self.max_length)
        self._tests[self.tasks.index(task.name)] = rows["test"]
        self.method.remember(self.number(task.name), rows)

    def restore(self, folder: RunFolder) -> None:
        """Take over the finished tasks of a run folder.

        Raises:
            RunError: A file is missing or not what the manifest says.
            BankCorruptError: The same of a bank's file.
        """
        bank = folder.path / BANK
        if gives_bank(self.method):
            count = len(folder.tasks) + int(folder.manifest.get("from_tasks", 0))
            # A bank may be there all the same: of the first task, which the run did not come to record.
            if not folder.tasks and (count == 0 or not (bank / MANIFEST).exists()):
                return
            whole = read_manifest(bank)
            manifest = cut(whole, count)
            self.go_on(manifest, FolderReader(bank), bank)
            self._since = digests_before(whole, manifest) if manifest != whole else None
            self.records[len(self.records) - len(folder.tasks) :] = [dict(record) for record in folder.tasks]
            self._before = len(self.records) - len(folder.tasks)
            return
        for index, record in enumerate(folder.tasks):
            self.method.restore(index, tuple(record["labels"]), Packed(**folder.parts(index)))
            self.method.restore_carried(index, folder.carried(index))
            self.records.append({key: value for key, value in record.items() if key != "files"})
            self._tests.append(None)
        if folder.manifest["shared"]:
            self.method.restore_shared(folder.read(folder.manifest["shared"]))

    # --- banks ---------------------------------------------------------------------------------------

    def go_on(self, manifest: Manifest, read: Reader, folder: Path | None = None) -> None:
        """Take over a bank's tasks, which stay where they lie; `MaskBank.extend` does this.

        Args:
            manifest: The bank's.
            read: Gives the bytes of its files.
            folder: Where it lies, if it does; grown, it can be saved there again.

        Raises:
            BankError: The method gives no bank, or this learner has learned already.
            BaseMismatchError: The bank was learned on another base.
            ConfigError: Seed, scale, compose, targets, head or norms are not the bank's.
        """
        method = self.method
        if not isinstance(method, MaskedMethod) or not gives_bank(method) or self.records:
            raise BankError(f"{self.method_name}: cannot go on from a bank. Take a new learner of supsup or exssnet.")
        if manifest.base.fingerprint != method.fingerprint:
            raise BaseMismatchError(
                f"base {self.base.name!r}: its fingerprint is {method.fingerprint[:16]}, the bank was learned on "
                f"{manifest.base.id or 'a base'} in {manifest.base.dtype} with {manifest.base.fingerprint[:16]}. Load "
                f"that model, in the same revision and dtype."
            )
        method.config = fixed_by(manifest.store, method.config)
        shelf = BankShelf(manifest, read)
        if method.routing is not None:
            method.restore_shared(open_shared(manifest, read, int(self.base.model.config.hidden_size)))
        for entry in manifest.tasks:
            if method.kkt is not None:
                method.restore_extra(entry.index, shelf.open(entry).extra)
            self.records.append(_record(entry))
            self._tests.append(None)
        self._before, self.bank, self.read, self.bank_folder = len(self.records), manifest, read, folder
        method.keep_on(shelf)

    def grown(self, base_id: str | None = None) -> tuple[Manifest, dict[str, bytes]]:
        """Return the bank's manifest with all that was learned, and the bytes of its new files; see `packing.grow`."""
        way = {"name": self.method_name, "options": self.options}
        return grow(self.method, self.records, way, self.base, base_id=base_id, before=self.bank, since=self._since)

    def save_bank(self, folder: Path) -> Manifest:
        """Write what was learned into a bank's folder, keep finished tasks there from now on; return its manifest."""
        manifest = ranks.on_first(lambda: self._write_bank(folder))
        self.bank, self.bank_folder, self.read, self._since = manifest, folder, FolderReader(folder), None
        self.method.keep_on(BankShelf(manifest, self.read))  # type: ignore[attr-defined]
        return manifest

    def _write_bank(self, folder: Path) -> Manifest:
        manifest, files = self.grown()
        held = read_manifest(folder).digest if (folder / MANIFEST).exists() else None
        write_bank(folder, manifest, lambda entry: self._file(entry, files), expected=held)
        return manifest

    def _file(self, entry: FileEntry, new: Mapping[str, bytes]) -> bytes:
        if entry.name in new:
            return new[entry.name]
        assert self.read is not None
        return self.read(entry)

    def _add_record(self, folder: RunFolder, bank: Manifest) -> None:
        record = self.learned[len(folder.tasks)]
        entry = next(task for task in bank.tasks if task.index == record["index"])
        # What routers know is no part of what the task computes with: it counts as shared, as the matrix beside it.
        head, routing = entry.sizes["head"], entry.sizes.get("routing", 0)
        size = {"task": entry.file.bytes - head - routing, "head": head, "routing": routing}
        folder.add_task({**record, "bytes": size}, {})

    def header(self) -> dict[str, Any]:
        """Return what a run folder says of this learner besides its tasks."""
        return {
            "model": self.base.name,
            "dtype": str(next(self.base.model.parameters()).dtype).removeprefix("torch."),
            "fingerprint": self.method.fingerprint,
            "method": {"name": self.method_name, "options": self.options},
            "seed": int(self.args.seed),
            "max_length": self.max_length,
        }

    def add_to(self, folder: RunFolder) -> None:
        """Write the next task into a run folder, whole or not at all: its record, and its tensors or the bank."""
        index, files = len(folder.tasks), {}
        if index == 0:
            folder.update(settled=dict(self.method.settled()))
        if gives_bank(self.method):
            self._add_record(folder, self.save_bank(folder.path / BANK))
            return
        for changed in self.method.rewritten(index):
            packed = self.method.pack(changed)
            files[changed] = {"task": packed.task, "head": packed.head, **self.method.carried(changed)}
        is_newest = index == len(self.records) - 1
        folder.add_task(self.records[index], files, self.method.shared() if is_newest else None)

    def save_pretrained(self, path: "str | Path", *, overwrite: bool = False) -> Path:
        """Write all that was learned as a run folder that `hf-cl verify`, `eval` and `inspect` read.

        Args:
            path: A folder that does not exist or is empty.
            overwrite: Replace a run folder that is there.

        Raises:
            RunError: Nothing was learned yet, or something is there already.
        """
        if not self.learned:
            raise RunError("nothing was learned yet. Call `learn(task)` first.")
        path = Path(path)
        ranks.on_first(lambda: self._save(path, overwrite))
        return path

    def _save(self, path: Path, overwrite: bool) -> None:
        RunFolder.require_place(path, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside it first: an older save stays whole until this one is.
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            folder = RunFolder.create(scratch / "run", self.header())
            if gives_bank(self.method):
                manifest, files = self.grown()
                write_bank(folder.path / BANK, manifest, lambda entry: self._file(entry, files), expected=None)
                folder.update(settled=dict(self.method.settled()))
            for _ in self.learned:
                if gives_bank(self.method):
                    self._add_record(folder, manifest)
                else:
                    self.add_to(folder)
            if path.exists():
                path.rename(scratch / "old")
            (scratch / "run").rename(path)
        finally:
            shutil.rmtree(scratch)


def _record(entry: TaskEntry) -> dict[str, Any]:
    """Return a learner's record of a task that a bank brought."""
    return {
        "index": entry.index,
        "name": entry.name,
        "labels": list(entry.labels),
        "source": entry.source,
        "facts": {},
        "parts": dict(entry.parts),
        "probe": entry.probe,
        "metrics": {},
    }


def _as_base(base: "str | nn.Module | Base", tokenizer: Any, head: Sequence[str] | None) -> Base:
    if isinstance(base, Base):
        return base
    if isinstance(base, str):
        return load_base(base, head=head)
    if tokenizer is None:
        raise ConfigError(f"tokenizer: a loaded {type(base).__name__} needs its tokenizer. Pass it, or pass a Hub id.")
    name = str(getattr(base.config, "_name_or_path", "") or type(base).__name__)
    return Base(base, tokenizer, lasting(name), tuple(find_head(base, head, ())))


def _as_method(base: Base, config: Any, seed: int) -> tuple[str, dict[str, Any], Method]:
    """Return the method's name, its options as plain values, and the method itself."""
    config = MaskConfig(seed=seed) if config is None else config
    if isinstance(config, MaskConfig):
        if config.problem_type not in (None, PROBLEMS[0]):
            raise ConfigError(
                f"problem_type: a learner's tasks have classes, found {config.problem_type!r}. Use get_peft_model and "
                f"your own Trainer with OwnershipCallback, as in docs/peft.md."
            )
        if config.head_modules or config.missing_modules:
            named = config.head_modules
            head = tuple(find_head(base.model, named, config.missing_modules or ()))
            base = Base(base.model, base.tokenizer, base.name, head)
        share = 1.0 if config.one_phase else MASK_SHARE
        plain = {key: value for key, value in config.to_dict().items() if value is not None}
        return "mask_config", plain, MaskedMethod(base, config, mask_share=share, rates={"scores": 0.01})
    module = type(config).__module__
    name = module.rpartition(".")[2]
    if not is_dataclass(config) or isinstance(config, type) or module != f"hf_cl.methods.{name}":
        raise ConfigError(f"config: expected a MaskConfig or a method's Options, found {type(config).__name__}.")
    method: Method = plugins.load("methods", name).build(base, config, seed)
    return name, asdict(config), method
