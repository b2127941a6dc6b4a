"""`MaskBank`: what a finished stream knows, as one thing to keep, verify, share and serve.

Opening a bank reads its manifest only; activating a task reads that task's file and those of the tasks whose trained
values it uses. A bank is never changed in place: learning on, or dropping a task, gives a new one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_cl import plugins
from hf_cl.config import read
from hf_cl.errors import BankError, BaseMismatchError, ConfigError, shown
from hf_cl.layers.base import Base, lasting, load_base, tokenizer_fingerprint
from hf_cl.layers.heads import PROBLEMS
from hf_cl.learner import ContinualLearner
from hf_cl.ownership.digest import digest, task_digest
from hf_cl.packing.drop import drop_task
from hf_cl.packing.opened import OpenedTask
from hf_cl.packing.proof import digests_of
from hf_cl.packing.shared import gaussians_of, open_shared
from hf_cl.packing.shelf import config_of, entry_of, open_entry
from hf_cl.proof import TOLERANCE, probe_difference, probe_logits
from hf_cl.routed_pipeline import RoutedPipeline, Served, require_threshold
from hf_cl.routing import Gaussians, Router
from hf_cl.storage.bank_folder import FolderReader, Reader, read_manifest, write_bank
from hf_cl.storage.hub import HubPlace, is_repo, open_repo
from hf_cl.storage.hub_push import push_bank
from hf_cl.storage.manifest import MANIFEST, FileEntry, Manifest, TaskEntry, Tombstone
from hf_cl.task_pipeline import TaskPipeline
from hf_cl.training.masked import adapter_of, digests
from hf_cl.tuner import MaskModel
from hf_cl.tuner.view import TaskView

ROUTER = "nearest_mean"


class MaskBank:
    """The tasks of one stream: masks, owned values, heads, labels, proof.

    Example:
        >>> # bank = MaskBank.from_learner(learner); bank.save_pretrained("bank")
        >>> # model = MaskBank.from_pretrained("bank").attach(base_model)
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        folder: Path | None = None,
        read: Reader | None = None,
        blobs: Mapping[str, bytes] | None = None,
    ) -> None:
        """Hold a manifest and where its files are; use `from_pretrained` or `from_learner`.

        Args:
            manifest: What the bank says of itself.
            folder: The folder it was read from or saved to.
            read: Gives the bytes of files that are not in `blobs`.
            blobs: Files by name that are nowhere else yet.
        """
        self.manifest, self.folder, self._blobs = manifest, folder, dict(blobs or {})
        self._read = read
        self._bases: dict[str, tuple[PeftModel, Any]] = {}

    @property
    def digest(self) -> str:
        """The sha256 that pins this bank."""
        return self.manifest.digest

    @property
    def tasks(self) -> list[str]:
        """Names of its tasks, in the order they were learned."""
        return [task.name for task in self.manifest.tasks]

    # --- out of a learner, to and from a folder ----------------------------------------------------

    @classmethod
    def from_learner(cls, learner: ContinualLearner, *, base_id: str | None = None) -> "MaskBank":
        """Return the bank of what a learner has learned; one that went on from a bank gives that one, grown.

        Args:
            learner: Has learned at least one task by a masked method that never overwrites (`supsup`, `exssnet`).
            base_id: Hub id of the base, where the learner knows only a local folder; no path is ever written.

        Raises:
            BankError: The learner's method writes no bank, or nothing was learned.
        """
        manifest, blobs = learner.grown(base_id)
        return cls(manifest, folder=learner.bank_folder, read=learner.read, blobs=blobs)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: "str | Path",
        *,
        revision: str | None = None,
        expected_digest: str | None = None,
        token: "str | bool | None" = None,
        cache_dir: "str | Path | None" = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "MaskBank":
        """Open a bank in a folder, or in a repository of the Hub; only its manifest is read.

        A repository is read at one commit, whatever is pushed meanwhile; its other files are downloaded when a task
        needs them. The options but `expected_digest` are those of any `from_pretrained`, and for a repository.

        Args:
            path_or_repo_id: The folder; where there is none, the repository.
            revision: Branch, tag or commit; None is the main branch. A commit pins the content.
            expected_digest: What its `digest` must be: pins the content, whoever wrote it.
            token: Sent to the Hub; None is the one that is logged in, False none.
            cache_dir: Where downloads are kept; None is the Hub's own cache.
            local_files_only: Ask the Hub for nothing.
            force_download: Download again what is in the cache.

        Raises:
            BankCorruptError: It is no bank, or its manifest is damaged.
            BankError: Its digest is not the expected one, or the Hub does not give it.
            ConfigError: It can be neither a folder nor a repository.
        """
        folder, read = None, None
        if is_repo(path_or_repo_id, revision):
            place = HubPlace(str(path_or_repo_id), token, cache_dir, local_files_only)
            read = open_repo(place, revision, force_download=force_download)
            manifest = read.manifest
        else:
            folder = Path(path_or_repo_id)
            manifest = read_manifest(folder)
        if expected_digest is not None and manifest.digest != expected_digest:
            raise BankError(
                f"{path_or_repo_id}: its digest is {manifest.digest}, expected {expected_digest}. Do not use it."
            )
        return cls(manifest, folder=folder, read=FolderReader(folder) if folder is not None else read)

    def save_pretrained(self, path: "str | Path") -> Path:
        """Write the bank into a folder, whole or not at all, in the place of itself or of what it has grown from.

        Raises:
            BankConflictError: The folder holds another bank.
        """
        folder = Path(path)
        held = read_manifest(folder).digest if (folder / MANIFEST).exists() else None
        replaced = held is not None and self.manifest.may_replace(held)
        write_bank(folder, self.manifest, self._bytes, expected=held if replaced else None)
        self.folder, self._read, self._blobs = folder, FolderReader(folder), {}
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: "str | bool | None" = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        base_id: str | None = None,
    ) -> CommitInfo:
        """Make a repository of the Hub hold this bank, by one commit or none, with a card that says how to load it.

        Args:
            repo_id: The repository, as `name/bank`; it is made if it is not there.
            token: Sent to the Hub; None is the one that is logged in.
            private: Whether a repository that is made is private.
            revision: The branch; it is made if it is not there. None is the main one.
            create_pr: Open a pull request instead.
            commit_message: Of the commit; None says how many tasks.
            base_id: Hub id of the base, for the card, where the bank was learned on a local folder.

        Returns:
            The commit that holds the bank; the head where the repository holds this very bank already.

        Raises:
            BankConflictError: The repository holds a bank that this one has not grown from. Pull that one, extend it,
                and push.
            BankCorruptError: A file of this bank is not what its manifest says; nothing is pushed.
            BankError: The Hub refuses it, or cannot be reached; the message says whether the commit is there.
            ConfigError: `repo_id`, `revision` or `base_id` is none.
        """
        return push_bank(
            repo_id,
            self.manifest,
            self._bytes,
            base_id=base_id,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )

    def _bytes(self, entry: FileEntry) -> bytes:
        if entry.name in self._blobs:
            return self._blobs[entry.name]
        if self._read is None:
            raise BankError(f"{entry.name}: this bank has neither the file nor a place to read it from.")
        return self._read(entry)

    def _open(self, entry: TaskEntry | Tombstone) -> OpenedTask:
        return open_entry(entry, self._bytes)

    # --- onto a base -------------------------------------------------------------------------------

    def attach(self, base: Any, tasks: Sequence[str] | None = None) -> PeftModel:
        """Wrap a base with tasks of this bank; the first one is active.

        Args:
            base: The plain sequence classifier the bank was learned on; it is wrapped in place.
            tasks: Their names; None is all. One that is left out is read when it is activated.

        Raises:
            BaseMismatchError: It is another base.
            BankCorruptError: A file is not what the manifest says, or does not fit the base.
            BankError: The base is wrapped already.
            ConfigError: The bank has no such task.
        """
        return self._attach(base, tasks, prove=True)

    def _attach(self, base: Any, tasks: Sequence[str] | None, *, prove: bool) -> PeftModel:
        entries = [self._entry(name) for name in (self.tasks if tasks is None else tasks)]
        if not entries:
            raise ConfigError(f"tasks: none named. Name at least one of {shown(', '.join(self.tasks))}.")
        entries.sort(key=lambda entry: entry.index)
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            raise BankError(
                "this base is wrapped already, by a bank or an adapter. Two banks cannot be joined: their tasks claim "
                "the same entries. Take a fresh base, or `extend` one bank by the other's tasks."
            )
        model: PeftModel | None = None
        try:
            for entry in entries:
                if model is None:
                    model = get_peft_model(base, config_of(self.manifest, entry), adapter_name=adapter_of(entry.index))
                    self._require_base(_tuner(model))
                    if tasks is None:
                        for left in self.manifest.tombstones:
                            self._open(left).occupy(_tuner(model), self.manifest.store, whole=True)
                else:
                    model.add_adapter(adapter_of(entry.index), config_of(self.manifest, entry))
                self._place(model, entry, whole=tasks is None, prove=prove)
        except BaseException:
            if model is not None:
                model.unload()
            raise
        assert model is not None
        model.eval()
        self.activate(model, entries[0].name)
        return model

    def _place(self, model: PeftModel, entry: TaskEntry, *, whole: bool, prove: bool = True) -> None:
        """Put a task into its added adapter, and what it reads of tasks that are not attached into the store."""
        if not whole:
            for index in entry.inherits:
                if adapter_of(index) not in model.peft_config:
                    self._open(entry_of(self.manifest, index)).occupy(_tuner(model), self.manifest.store, whole=False)
        self._open(entry).place(_tuner(model), self.manifest.store, whole=whole, prove=prove)

    def activate(self, model: PeftModel, task: str) -> None:
        """Make a task the one that an attached model answers; it is read first if it was left out.

        Raises:
            ConfigError: The bank has no such task.
            BankCorruptError: Its file is not what the manifest says.
        """
        model.set_adapter(self._bring(model, self._entry(task)), inference_mode=True)

    def _bring(self, model: PeftModel, entry: TaskEntry) -> str:
        """Read a task that was left out of an attached model; return its adapter."""
        adapter = adapter_of(entry.index)
        if adapter not in model.peft_config:
            model.add_adapter(adapter, config_of(self.manifest, entry))
            try:
                self._place(model, entry, whole=False)
            except BaseException:
                model.delete_adapter(adapter)
                raise
            model.eval()
        return adapter

    def detach(self, model: PeftModel, task: str) -> None:
        """Take a task that is not the active one out of an attached model; `activate` reads it again.

        Raises:
            ConfigError: The bank has no such task, or it is active.
        """
        adapter = adapter_of(self._entry(task).index)
        if adapter in _tuner(model).active_adapters:
            raise ConfigError(f"task {task!r}: is active. Activate another one first.")
        if adapter in model.peft_config:
            _tuner(model).leave(adapter)

    def adapter_names(self, tasks: Sequence[str]) -> list[str]:
        """Return the adapters of tasks, one a row of a mixed batch: `model(**inputs, adapter_names=...)`.

        Raises:
            ConfigError: The bank has no such task.
        """
        return [adapter_of(self._entry(task).index) for task in tasks]

    def router(self, name: str, model: PeftModel) -> Router:
        """Return a router over the bank's tasks on an attached model: `hf_cl.routing.Router`, and its `confidences`.

        Args:
            name: A file in `hf_cl/routing`.
            model: From `attach`; tasks that were left out are read.

        Raises:
            BankError: It needs what was not collected of some task.
            ConfigError: There is no such router, or a task has no classes.
        """
        module = plugins.load("routing", name)
        other = [task.name for task in self.manifest.tasks if task.problem_type != PROBLEMS[0]]
        if other:
            raise ConfigError(f"router: {shown(', '.join(other))} has no classes to choose one of. Name the task.")
        tuner = _tuner(model)
        adapters = [self._bring(model, entry) for entry in self.manifest.tasks]
        made: Router = module.build(TaskView(tuner, adapters, lambda: self._gaussians(tuner)))
        return made

    def served(self) -> list[Served]:
        """Return its tasks as routed answers need them, in the routers' order."""
        return [Served(entry.name, entry.labels, adapter_of(entry.index)) for entry in self.manifest.tasks]

    def _gaussians(self, tuner: MaskModel) -> Gaussians:
        shared = open_shared(self.manifest, self._bytes, int(tuner.model.config.hidden_size))
        return gaussians_of(self.manifest, [self._open(entry) for entry in self.manifest.tasks], shared)

    def pipeline(
        self,
        task: str | None = None,
        model: "PeftModel | Base | str | None" = None,
        tokenizer: Any = None,
        *,
        router: str = ROUTER,
        threshold: float | None = None,
        **options: Any,
    ) -> "TaskPipeline | RoutedPipeline":
        """Return a text-classification pipeline that answers with one task's labels, or finds each text's task itself.

        Args:
            task: Its name; None routes each text, and answers with `task`, `label`, `score` and `confidence`.
            model: From `attach`; or the base: its Hub id or folder, or a `Base`. It is attached once for all pipelines.
            tokenizer: The base's, where an attached model is given.
            router: How a text's task is found: a file in `hf_cl/routing`, see docs/routing.md.
            threshold: Confidence from 0 to 1 below which a text belongs to none of the tasks: its task and label are
                None then. None answers every text.
            options: As for `transformers.pipeline`: `device`, `batch_size`, `top_k` and so on.

        Raises:
            BaseMismatchError: The base or the tokenizer is not the one the bank was learned with.
            BankError: The router needs what was not collected of some task.
            ConfigError: An attached model without a tokenizer, no model, no such router, or a threshold that is none.

        Example:
            >>> # answer = bank.pipeline("helpdesk", "sentence-transformers/all-MiniLM-L6-v2")("I lost my password")
            >>> # answer = bank.pipeline(model="sentence-transformers/all-MiniLM-L6-v2")("I lost my password")
        """
        require_threshold(threshold)
        if task is not None and threshold is not None:
            raise ConfigError(
                "threshold: the router's confidence is asked for it, and a task was named. Leave one out."
            )
        if model is None:
            raise ConfigError("model: none is given. Give the base's Hub id or folder, or an attached model.")
        if isinstance(model, str | Base):
            model, tokenizer = self._attached(model, self.tasks[0] if task is None else task)
        if tokenizer is None:
            raise ConfigError("tokenizer: an attached model needs the base's tokenizer. Pass it.")
        self._require_tokenizer(tokenizer)
        tuner = _tuner(model)
        if task is None:
            way: dict[str, Any] = {"tasks": self.served(), "router": self.router(router, model), "threshold": threshold}
            return RoutedPipeline(model=tuner.model, tokenizer=tokenizer, tuner=tuner, **way, **options)
        self.activate(model, task)
        adapter = adapter_of(self._entry(task).index)
        return TaskPipeline(model=tuner.model, tokenizer=tokenizer, tuner=tuner, adapter=adapter, **options)

    def _attached(self, base: "Base | str", task: str) -> tuple[PeftModel, Any]:
        """Return a base with this bank on it and its tokenizer, the same for all pipelines on that base."""
        name = base.name if isinstance(base, Base) else lasting(base)
        if name not in self._bases:
            loaded = base if isinstance(base, Base) else load_base(base, dtype=self.manifest.base.dtype)
            self._bases[name] = (self.attach(loaded.model, [task]), loaded.tokenizer)
        return self._bases[name]

    def export(
        self, task: str, base: Any, path: "str | Path", *, to: str = "checkpoint", tokenizer: Any = None
    ) -> Path:
        """Write one task as something that loads without this package, or as a PEFT adapter.

        Args:
            task: Its name.
            base: The plain base; a checkpoint takes its weights over, an adapter leaves it unwrapped.
            path: The folder to write.
            to: `checkpoint`, a plain transformers classifier with the task's head and labels, or `peft`, an adapter
                folder with its own and its inherited values.
            tokenizer: Written beside a checkpoint where given.

        Raises:
            ConfigError: `to` is neither, the folder is taken, or the bank has no such task.
        """
        folder = Path(path)
        if to not in ("checkpoint", "peft"):
            raise ConfigError(f"to: {to!r} is not one of checkpoint, peft.")
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: is not empty. Choose another folder.")
        model: Any = self.attach(base, [task])
        if to == "peft":
            # PEFT writes where the base was loaded from: the Hub id if the bank has it, and never a path.
            with _named(base, self.manifest.base.id or "the-base") as name:
                for config in model.peft_config.values():
                    config.base_model_name_or_path = name
                model.save_pretrained(folder, save_embedding_layers=False)  # nor is the Hub asked about it
            model.unload()
            return folder
        plain = model.merge_and_unload()
        plain.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    # --- proof ---------------------------------------------------------------------------------------

    def verify(self, base: Any = None) -> list[dict[str, Any]]:
        """Return, for each task, its digest at its commit and now, what moved, and whether its probe agrees.

        Without a base, digests come from the files alone: every file is read, owners are worked out anew. With one,
        the base's own digest is compared too, and the stored probe is run: `same_logits` says whether its logits are
        those at the commit bit for bit, as in the recorded environment they are; `difference` how far they are off as
        a share of the largest, and `close` whether that is within `hf_cl.proof.TOLERANCE`.

        Args:
            base: The plain base; it is wrapped meanwhile, and unwrapped again.

        Raises:
            BankCorruptError: A file is not what the manifest says, or two tasks own one entry.
            BaseMismatchError: It is another base.
        """
        logits: dict[int, dict[str, Any]] = {}
        open_shared(self.manifest, self._bytes)
        if base is None:
            proved = digests_of(self.manifest, [self._open(entry) for entry in self.manifest.entries])
        else:
            proved = {}
            model = self._attach(base, None, prove=False)
            try:
                for entry in self.manifest.tasks:
                    self.activate(model, entry.name)
                    proved[entry.index] = digests(_tuner(model), adapter_of(entry.index))
                    logits[entry.index] = _compared(probe_logits(model), self._open(entry).probe, entry, model.dtype)
            finally:
                model.unload()
        found = []
        for entry in self.manifest.tasks:
            now = proved[entry.index]
            compared = {*now, *(entry.parts if base is not None else ())}
            moved = sorted(part for part in compared if now.get(part) != entry.parts.get(part))
            record = {"name": entry.name, "before": task_digest(entry.parts), "after": task_digest(entry.parts | now)}
            found.append({**record, "moved": moved, "same_logits": None, **logits.get(entry.index, {})})
        return found

    # --- learning on, and forgetting on purpose --------------------------------------------------------

    def extend(
        self,
        base: "str | nn.Module | Base",
        tokenizer: Any = None,
        config: Any = None,
        training_args: TrainingArguments | None = None,
        **options: Any,
    ) -> ContinualLearner:
        """Return a learner that goes on from this bank: new tasks append, the ones here stay bit-identical.

        The bank's tasks stay where its files are; one is loaded at a time, while it answers.

        Args:
            base: As for `ContinualLearner`; it must be the bank's.
            tokenizer: The tokenizer of a loaded model.
            config: As for `ContinualLearner`; None learns as the newest task was learned.
            training_args: As for `ContinualLearner`; a method's `Options` take the bank's seed from its `seed`.
            options: Further arguments of `ContinualLearner`.

        Raises:
            ConfigError: Another seed, scale, compose, targets or head than the bank's.
            BaseMismatchError: Another base or tokenizer.
            BankError: The method gives no bank.
        """
        config = self._way() if config is None else config
        seed = self.manifest.store.seed
        args = training_args or TrainingArguments("trainer_output", save_strategy="no", report_to=[], seed=seed)
        learner = ContinualLearner(base, tokenizer, config, args, **options)
        self.hand_to(learner)
        return learner

    def hand_to(self, learner: ContinualLearner) -> None:
        """Make a learner that has learned nothing yet go on from this bank; see `extend`."""
        self._require_tokenizer(learner.base.tokenizer)
        learner.go_on(self.manifest, self._bytes, self.folder)

    def _way(self) -> Any:
        """Return the options that the newest task was learned with."""
        newest = self.manifest.tasks[-1]
        if newest.method["name"] == "mask_config":
            config = config_of(self.manifest, newest)
            return replace(config, id2label=None, num_labels=None, problem_type=None, task_index=None, head_of=None)
        module = plugins.load("methods", newest.method["name"])
        return read(module.Options, newest.method["options"], f"task {newest.name!r}: method.options")

    def drop(self, task: str) -> "MaskBank":
        """Return the bank without a task. What other tasks read of it stays, the rest is free again.

        Raises:
            ConfigError: The bank has no such task, it is its only one, or another task has its head.
        """
        opened = [self._open(entry) for entry in self.manifest.entries]
        manifest, files = drop_task(self.manifest, opened, self._entry(task).index)
        blobs = {**self._blobs, **files}
        return MaskBank(manifest, folder=self.folder, read=self._read, blobs=blobs)

    # --- what it was learned on --------------------------------------------------------------------------

    def _entry(self, name: str) -> TaskEntry:
        for task in self.manifest.tasks:
            if task.name == name:
                return task
        raise ConfigError(f"task {name!r}: this bank holds {shown(', '.join(self.tasks))}.")

    def _require_base(self, tuner: MaskModel) -> None:
        held, given = self.manifest.base, tuner.fingerprint()
        if held.fingerprint != given:
            raise BaseMismatchError(
                f"this bank was learned on {held.id or 'a base'} in {held.dtype} with fingerprint "
                f"{held.fingerprint[:16]}, the base given has {given[:16]} ({next(tuner.model.parameters()).dtype}). "
                f"Load that model, in the same revision and dtype."
            )

    def _require_tokenizer(self, tokenizer: Any) -> None:
        held, given = self.manifest.base.tokenizer, tokenizer_fingerprint(tokenizer)
        if held != given:
            raise BaseMismatchError(
                f"tokenizer: this bank was learned with one of fingerprint {held[:16]}, the one given has "
                f"{given[:16]}. Load the tokenizer of {self.manifest.base.id or 'its base'}."
            )


@contextmanager
def _named(base: Any, name: str) -> Iterator[str]:
    """Give a base another name meanwhile: what is written of it says this one."""
    held = base.name_or_path, base.config._name_or_path
    base.name_or_path = base.config._name_or_path = name
    try:
        yield name
    finally:
        base.name_or_path, base.config._name_or_path = held


def _compared(logits: Tensor, held: Tensor, entry: TaskEntry, dtype: torch.dtype) -> dict[str, Any]:
    difference = probe_difference(held, logits)
    same = digest([("logits", logits)]) == entry.probe
    return {"same_logits": same, "difference": difference, "close": difference <= TOLERANCE[dtype]}


def _tuner(model: PeftModel) -> MaskModel:
    tuner: Any = model.base_model
    return tuner
