"""The finished tasks of a bank as a method sees them that goes on learning: on disk, loaded while they answer."""

from dataclasses import replace
from typing import Any

from hf_cl.errors import BankCorruptError, ConfigError
from hf_cl.packing.opened import OpenedTask
from hf_cl.storage.bank_folder import Reader, tensors_of
from hf_cl.storage.manifest import Manifest, StoreEntry, TaskEntry, Tombstone
from hf_cl.tuner import MaskConfig, MaskModel


def open_entry(entry: TaskEntry | Tombstone, read: Reader) -> OpenedTask:
    """Return a task or tombstone out of its file.

    Raises:
        BankCorruptError: The file is not what the manifest says.
    """
    data = tensors_of(entry.file, read(entry.file), f"task {entry.name!r} ({entry.file.name})")
    return OpenedTask(entry, data)


class BankShelf:
    """A bank's tasks by number; see `hf_cl.training.masked.Shelf`."""

    def __init__(self, manifest: Manifest, read: Reader, *, prove: bool = True) -> None:
        """Take a manifest, what reads one of its files, and whether a task is compared with its digests when loaded."""
        self._manifest, self._read = manifest, read
        self._prove = prove
        self._entries = {task.index: task for task in manifest.tasks}

    @property
    def numbers(self) -> frozenset[int]:
        """The tasks' numbers."""
        return frozenset(self._entries)

    def open(self, entry: TaskEntry | Tombstone) -> OpenedTask:
        """Read one of its tasks or tombstones."""
        return open_entry(entry, self._read)

    def config(self, index: int) -> MaskConfig:
        """Return the config of a task's adapter."""
        return config_of(self._manifest, self._entries[index])

    def occupy(self, tuner: MaskModel) -> None:
        """Make every task and tombstone the owner of its entries, in the order of their claims."""
        for entry in self._manifest.entries:
            self.open(entry).occupy(tuner, self._manifest.store, whole=True)

    def place(self, tuner: MaskModel, index: int) -> None:
        """Put a task into its added adapter."""
        self.open(self._entries[index]).place(tuner, self._manifest.store, whole=True, prove=self._prove)


def config_of(manifest: Manifest, entry: TaskEntry) -> MaskConfig:
    """Return the config of a task's adapter: what is the bank's, and what is the task's own."""
    store = manifest.store
    config = MaskConfig(
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
    config.__dict__["arrives"] = True
    return config


def entry_of(manifest: Manifest, index: int) -> TaskEntry | Tombstone:
    """Return a task or tombstone by its number.

    Raises:
        BankCorruptError: There is none.
    """
    for entry in manifest.entries:
        if entry.index == index:
            return entry
    raise BankCorruptError(f"task {index}: is inherited from, and not in the bank. Restore a whole copy.")


def fixed_by(store: StoreEntry, config: MaskConfig) -> MaskConfig:
    """Return a config for further tasks of a bank: what the bank fixed for its life is filled in.

    Raises:
        ConfigError: The config asks for something else there.
    """
    fixed: dict[str, Any] = {
        "seed": store.seed,
        "compose": store.compose,
        "scale": store.scale,
        "train_norms": store.train_norms,
        "scales": dict(store.scales),
        "target_modules": list(store.targets),
        "exclude_modules": list(store.exclude) or None,
        "head_modules": list(store.head),
    }
    for name, held in fixed.items():
        given = getattr(config, name)
        names = name in ("target_modules", "exclude_modules")
        same = given is None or given == held or (names and isinstance(given, list) and set(given) == set(held or ()))
        if not same:
            raise ConfigError(
                f"{name}: {given!r:.120} was asked for, the bank was made with {held!r:.120} for its whole life. Leave "
                f"it as it is, or start a new bank."
            )
    return replace(config, **fixed)
