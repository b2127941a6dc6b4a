"""`MaskBank`: what a finished stream knows, as one thing to keep, verify, share and serve.

Opening a bank reads its manifest only; attaching a task reads that task's file and those of the tasks whose trained
values it uses. A bank is never changed in place: learning on, or dropping a task, gives a new one.
"""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor

from hf_cl.bank_task import OpenedTask
from hf_cl.errors import BankCorruptError, BankError, BaseMismatchError, ConfigError
from hf_cl.learner import ContinualLearner
from hf_cl.masks.coding import encode
from hf_cl.proof import probe_digest
from hf_cl.storage.bank_folder import read_file, read_manifest, task_blob, tensors_of, write_bank
from hf_cl.storage.manifest import MANIFEST, BaseEntry, FileEntry, Manifest, StoreEntry, TaskEntry
from hf_cl.task_pipeline import TaskPipeline
from hf_cl.training.masked import KKT_MEAN, MaskedMethod, adapter_of, digests, join_codes
from hf_cl.tuner import MaskConfig, MaskLinear, MaskModel


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
        blobs: Mapping[str, bytes] | None = None,
        grown_from: str | None = None,
    ) -> None:
        """Hold a manifest and where its files are; use `from_pretrained` or `from_learner`.

        Args:
            manifest: What the bank says of itself.
            folder: Where files lie that are not in `blobs`.
            blobs: Files by name that are in no folder yet.
            grown_from: Digest of the bank that this one replaces in `folder`; None is its own.
        """
        self.manifest, self.folder, self._blobs = manifest, folder, dict(blobs or {})
        self._replaces = grown_from or manifest.digest

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
        """Return the bank of what a learner has learned.

        Args:
            learner: Has learned at least one task by a masked method that never overwrites (`supsup`, `exssnet`).
            base_id: Hub id of the base, where the learner knows only a local folder; no path is ever written.

        Raises:
            BankError: The learner's method writes no bank, or nothing was learned.
        """
        method = learner.method
        if not isinstance(method, MaskedMethod) or method.config.trains == "mask" or not learner.records:
            raise BankError(
                f"{learner.method_name}: gives no bank. A bank holds tasks of a masked method that never overwrites "
                f"(supsup, exssnet, a MaskConfig), at least one; other methods keep their run folder."
            )
        blobs: dict[str, bytes] = {}
        tasks = []
        for index, record in enumerate(learner.records):
            tensors, sizes = _stored(method, index)
            entry, data = task_blob(index, tensors)
            blobs[entry.name] = data
            tasks.append(_task_entry(method, index, record, learner, entry, sizes))
        manifest = Manifest(
            generation=0,
            base=_base_entry(learner, base_id),
            store=_store_entry(method.tuner),
            tasks=tasks,
            next_index=len(tasks),
            environment=_environment(),
        )
        return cls(manifest, blobs=blobs)

    @classmethod
    def from_pretrained(cls, path: "str | Path", *, expected_digest: str | None = None) -> "MaskBank":
        """Open a bank's folder; only its manifest is read.

        Args:
            path: The folder.
            expected_digest: What its `digest` must be: pins the content, whoever wrote it.

        Raises:
            BankCorruptError: It is no bank, or its manifest is damaged.
            BankError: Its digest is not the expected one.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if expected_digest is not None and manifest.digest != expected_digest:
            raise BankError(f"{folder}: its digest is {manifest.digest}, expected {expected_digest}. Do not use it.")
        return cls(manifest, folder=folder)

    def save_pretrained(self, path: "str | Path") -> Path:
        """Write the bank into a folder, whole or not at all; saving into its own folder again is fine.

        Raises:
            BankConflictError: The folder holds another bank than this one, or the one it has grown from.
        """
        folder = Path(path)
        held = read_manifest(folder).digest if (folder / MANIFEST).exists() else None
        here = self.folder is not None and folder.resolve() == self.folder.resolve()
        known = {self.digest, self._replaces} if here else {self.digest}
        write_bank(folder, self.manifest, self._bytes, expected=held if held in known else None)
        self.folder, self._replaces = folder, self.digest
        return folder

    def _bytes(self, entry: FileEntry) -> bytes:
        if entry.name in self._blobs:
            return self._blobs[entry.name]
        if self.folder is None:
            raise BankError(f"{entry.name}: this bank has neither the file nor a folder to read it from.")
        return read_file(self.folder / entry.name, entry.bytes)

    def _open(self, task: TaskEntry) -> OpenedTask:
        return OpenedTask(task, tensors_of(task.file, self._bytes(task.file), f"task {task.name!r} ({task.file.name})"))

    # --- onto a base -------------------------------------------------------------------------------

    def attach(self, base: Any, tasks: Sequence[str] | None = None) -> PeftModel:
        """Wrap a base with tasks of this bank; the first one is active.

        Args:
            base: The plain sequence classifier the bank was learned on; it is wrapped in place.
            tasks: Their names; None is all. With fewer than all the model answers, and is not for learning on.

        Raises:
            BaseMismatchError: It is another base.
            BankCorruptError: A file is not what the manifest says, or does not fit the base.
            ConfigError: The bank has no such task.
        """
        entries = [self._entry(name) for name in (self.tasks if tasks is None else tasks)]
        if not entries:
            raise ConfigError("tasks: none named. Name at least one of " + ", ".join(self.tasks) + ".")
        entries.sort(key=lambda entry: entry.index)
        attached = {entry.index for entry in entries}
        needed = sorted({other for entry in entries for other in entry.inherits} - attached)
        foreign = [self._open(self._by_index(index)) for index in needed]
        model: PeftModel | None = None
        try:
            for entry in entries:
                adapter = adapter_of(entry.index)
                if model is None:
                    model = get_peft_model(base, self._config(entry), adapter_name=adapter)
                    self._require_base(_tuner(model))
                    for opened in foreign:
                        opened.lend(_tuner(model))
                else:
                    model.add_adapter(adapter, self._config(entry))
                self._open(entry).place(_tuner(model), whole=tasks is None)
        except BaseException:
            if model is not None:
                model.unload()
            raise
        assert model is not None
        model.eval()
        self.activate(model, entries[0].name)
        return model

    def activate(self, model: PeftModel, task: str) -> None:
        """Make a task the one that an attached model answers.

        Raises:
            ConfigError: The bank has no such task, or it is not attached.
        """
        adapter = adapter_of(self._entry(task).index)
        if adapter not in model.peft_config:
            raise ConfigError(f"task {task!r} is not attached to this model. Name it in attach(base, tasks=[...]).")
        _tuner(model).set_adapter(adapter, inference_mode=True)

    def pipeline(self, task: str, model: PeftModel, tokenizer: Any, **options: Any) -> TaskPipeline:
        """Return a text-classification pipeline that answers with one task's labels.

        Args:
            task: Its name; it is attached to the model.
            model: From `attach`; several pipelines can share it.
            tokenizer: The base's.
            options: As for `transformers.pipeline`: `device`, `batch_size`, `top_k` and so on.
        """
        self.activate(model, task)
        tuner = _tuner(model)
        adapter = adapter_of(self._entry(task).index)
        return TaskPipeline(model=tuner.model, tokenizer=tokenizer, tuner=tuner, adapter=adapter, **options)

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
            model.save_pretrained(folder)
            model.unload()
            return folder
        plain = model.merge_and_unload()
        plain.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    def verify(self, base: Any) -> list[dict[str, Any]]:
        """Return, for each task, the digests at its commit and now, what moved, and whether its probe agrees.

        Args:
            base: The plain base; it is wrapped meanwhile, and unwrapped again.
        """
        model = self.attach(base)
        tuner, found = _tuner(model), []
        try:
            for entry in self.manifest.tasks:
                self.activate(model, entry.name)
                parts = digests(tuner, adapter_of(entry.index))
                moved = sorted(part for part in {*parts, *entry.parts} if parts.get(part) != entry.parts.get(part))
                same = probe_digest(model) == entry.probe
                found.append({"name": entry.name, "moved": moved, "same_logits": same})
        finally:
            model.unload()
        return found

    def _entry(self, name: str) -> TaskEntry:
        if name not in self.tasks:
            raise ConfigError(f"task {name!r}: this bank holds {', '.join(self.tasks)}.")
        return self.manifest.task(name)

    def _by_index(self, index: int) -> TaskEntry:
        for entry in self.manifest.tasks:
            if entry.index == index:
                return entry
        raise BankCorruptError(f"task {index}: is inherited from, and not in the bank. Restore a whole copy.")

    def _config(self, entry: TaskEntry) -> MaskConfig:
        store = self.manifest.store
        return MaskConfig(
            task_type="SEQ_CLS",
            density=entry.density,
            trains=entry.trains,
            values_dtype=entry.values_dtype,
            id2label=dict(enumerate(entry.labels)),
            problem_type=entry.problem_type,
            head="own" if entry.head_of is None else "shared",
            head_of=entry.head_of,
            task_index=entry.index,
            compose=store.compose,
            seed=store.seed,
            scale=store.scale,
            scales=dict(store.scales),
            target_modules=list(store.targets),
            exclude_modules=list(store.exclude) or None,
            head_modules=list(store.head),
            train_norms=store.train_norms,
        )

    def _require_base(self, tuner: MaskModel) -> None:
        held, given = self.manifest.base, tuner.fingerprint()
        if held.fingerprint != given:
            raise BaseMismatchError(
                f"this bank was learned on {held.id or 'a base'} in {held.dtype} with fingerprint "
                f"{held.fingerprint[:16]}, the base given has {given[:16]} ({next(tuner.model.parameters()).dtype}). "
                f"Load that model, in the same revision and dtype."
            )
        paths = {layer.path for layer in tuner.mask_layers()}
        if paths != set(self.manifest.store.scales):
            raise BaseMismatchError("this bank masks other layers than the base has. Load the model it was learned on.")


def _tuner(model: PeftModel) -> MaskModel:
    tuner: Any = model.base_model
    return tuner


# --- what is stored of a task -------------------------------------------------------------------------


def _stored(method: MaskedMethod, index: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return a task's tensors, and the bytes of its masks, values and head."""
    packed, tensors = method.pack(index), {}
    tensors["masks"], tensors["mask_lengths"] = packed.task["masks"], packed.task["lengths"]
    if "values" in packed.task:
        owned = [layer.own(adapter_of(index)).cpu().numpy() for layer in method.tuner.mask_layers()]
        tensors["owned"], tensors["owned_lengths"] = join_codes([encode(own) for own in owned])
    masks = _bytes_of(tensors)
    values = {"values": packed.task["values"]} if "values" in packed.task else {}
    head = {name if name == KKT_MEAN else f"head.{name}": tensor for name, tensor in packed.head.items()}
    sizes = {"masks": masks, "values": _bytes_of(values), "head": _bytes_of(head)}
    return tensors | values | head, sizes


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _inherits(method: MaskedMethod, index: int) -> list[int]:
    """Return the numbers of the tasks whose trained values a task reads."""
    adapter, found = adapter_of(index), set()
    for layer in method.tuner.mask_layers():
        found |= set(layer.store.owner[layer.mask(adapter)].unique().tolist())
    others = {int(owner) for owner in found} - {index}
    layers = method.tuner.mask_layers()
    return sorted(other for other in others if any(_trained(layer, adapter_of(other)) for layer in layers))


def _trained(layer: MaskLinear, adapter: str) -> bool:
    return bool(layer.hfcl_owned[adapter].numel())


def _task_entry(
    method: MaskedMethod,
    index: int,
    record: Mapping[str, Any],
    learner: ContinualLearner,
    file: FileEntry,
    sizes: dict[str, int],
) -> TaskEntry:
    config = method.tuner.peft_config[adapter_of(index)]
    metrics = record["metrics"].get(record["name"], {})
    return TaskEntry(
        index=index,
        name=record["name"],
        labels=list(record["labels"]),
        problem_type=config.problem,
        density=float(config.density),
        values_dtype=config.values_dtype,
        trains=config.trains,
        head_of=config.head_of,
        inherits=_inherits(method, index),
        parts=dict(record["parts"]),
        probe=record["probe"],
        source=record["source"],
        method={"name": learner.method_name, "options": learner.options},
        start=record["facts"].get("kkt"),
        metrics={name: value for name, value in metrics.items() if isinstance(value, int | float)},
        sizes=sizes,
        file=file,
    )


def _store_entry(tuner: MaskModel) -> StoreEntry:
    config = tuner.mask_config
    return StoreEntry(
        compose=config.compose,
        seed=config.seed,
        scale=float(config.scale),
        scales=dict(config.scales or {}),
        targets=sorted(config.target_modules or ()),
        exclude=sorted(config.exclude_modules or ()),
        head=list(config.head_modules or ()),
        train_norms=config.train_norms,
    )


def _base_entry(learner: ContinualLearner, base_id: str | None) -> BaseEntry:
    name = base_id or learner.base.name
    config = learner.base.model.config
    return BaseEntry(
        id=None if Path(name).is_absolute() else name,
        revision=getattr(config, "_commit_hash", None),
        dtype=str(next(learner.base.model.parameters()).dtype).removeprefix("torch."),
        fingerprint=learner.method.fingerprint,
        tokenizer=None,
    )


def _environment() -> dict[str, str]:
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return {**versions, "python": platform.python_version(), "machine": platform.machine()}
