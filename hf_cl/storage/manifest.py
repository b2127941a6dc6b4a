"""`bank.json`: what a bank says of itself, as strict JSON in one canonical form.

The manifest names every other file by content and carries the sha256 of its own bytes, so one digest pins a whole
bank. Reading trusts nothing: the bytes must be the canonical form, every key and type is checked, names are data
and never become paths. The format is written down in docs/bank-format.md.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hf_cl.errors import BankCorruptError
from hf_cl.layers.heads import PROBLEMS
from hf_cl.masks.compose import COMPOSES
from hf_cl.ownership.owner import MOST_TASKS

FORMAT, VERSION = "hf_cl-bank", 1
MANIFEST = "bank.json"
MOST_BYTES = 4 * 1024 * 1024
"""Of a manifest; a bank of a thousand tasks takes about half of it."""
MOST_MARKS = 1_000_000
"""Its brackets, braces and commas: each may become an object of a hundred bytes."""
FILE = re.compile(r"(task-\d{5}|left-\d{5}|shared)-([0-9a-f]{16})\.safetensors")
"""A task's file, what a dropped task left behind, what all tasks share; each named by its content."""
VALUES = ("float32", "bfloat16", "int8")
MOST_ENTRIES = 2**30
"""Of one layer; what is checked without a base is no larger than the largest layers that exist."""
_HEX = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(rb'^\{"digest":"([0-9a-f]{64})",')


@dataclass(frozen=True)
class FileEntry:
    """One file: its name (derived from index and digest), its sha256 and its size in bytes."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class BaseEntry:
    """The base: Hub id (or None), revision (or None), dtype, sha256 of its tensors and of its tokenizer."""

    id: str | None
    revision: str | None
    dtype: str
    fingerprint: str
    tokenizer: str


@dataclass(frozen=True)
class StoreEntry:
    """What is fixed for a bank's life: the form, the seed, each layer's magnitude and shape, which layers, head, norms.

    `scales` and `shapes` have one entry a masked layer, by its path; a task's codes follow the order of `layers`.
    """

    compose: str
    seed: int
    scale: float
    layers: list[str]
    scales: dict[str, float]
    shapes: dict[str, list[int]]
    targets: list[str]
    exclude: list[str]
    head: list[str]
    train_norms: bool


@dataclass(frozen=True)
class TaskEntry:
    """One finished task.

    `parts` are the digests taken at its commit, `probe` that of its probe logits, taken with the
    versions and on the machine of `environment`; `inherits` are the numbers of the
    tasks whose trained values it reads; `sizes` are bytes of masks, values and head. `source` (a Hub id, `local:` or
    `memory:` with a name, never a path), `method`, `start` and `metrics` are provenance.
    """

    index: int
    name: str
    labels: list[str]
    problem_type: str
    density: float
    values_dtype: str
    trains: str
    head_of: int | None
    inherits: list[int]
    parts: dict[str, str]
    probe: str
    environment: dict[str, str]
    source: str
    method: dict[str, Any]
    start: dict[str, Any] | None
    metrics: dict[str, Any]
    sizes: dict[str, int]
    file: FileEntry


@dataclass(frozen=True)
class Tombstone:
    """What is left of a dropped task: the entries it owned that other tasks read."""

    index: int
    density: float
    values_dtype: str
    trains: str
    file: FileEntry

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"(dropped) {self.index}"


@dataclass(frozen=True)
class Manifest:
    """The whole of `bank.json` but format, version and digest.

    `grown_from` are the digests of the banks it has grown from, oldest first: those it may take the place of.
    """

    generation: int
    base: BaseEntry
    store: StoreEntry
    tasks: list[TaskEntry]
    tombstones: list[Tombstone]
    shared: FileEntry | None
    next_index: int
    grown_from: list[str]

    def to_bytes(self) -> bytes:
        """Return the canonical form: sorted keys, no spaces, ASCII, the digest first."""
        return self._canonical_bytes

    @cached_property
    def _canonical_bytes(self) -> bytes:
        body = _canonical({"format": FORMAT, "version": VERSION, **asdict(self)})
        return b'{"digest":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body[1:]

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST) -> "Manifest":
        """Read a manifest.

        Raises:
            BankCorruptError: The bytes are not a manifest's, or not in canonical form.
        """
        marks = sum(data.count(mark) for mark in (b"[", b"{", b",")) if len(data) <= MOST_BYTES else MOST_MARKS + 1
        if marks > MOST_MARKS:
            raise BankCorruptError(f"{where}: is larger than any manifest ({len(data):,} bytes). Do not use this bank.")
        found = _DIGEST.match(data)
        if found is None:
            raise _corrupt(where, f"{len(data):,} bytes that do not begin as a manifest does")
        body = b"{" + data[found.end() :]
        if hashlib.sha256(body).hexdigest().encode() != found[1]:
            raise _corrupt(where, "a digest that is not that of its bytes")
        try:
            value = json.loads(body, object_pairs_hook=unique_keys, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise _corrupt(where, f"no strict JSON ({error})") from error
        if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
            raise _corrupt(where, "no bank's manifest")
        version = value.pop("version", None)
        if version != VERSION:
            raise BankCorruptError(f"{where}: format version {version!r}, this hf_cl reads {VERSION}. Upgrade hf_cl.")
        manifest: Manifest = _read(cls, value, where)
        if manifest.to_bytes() != data:
            raise _corrupt(where, "JSON that is not in the canonical form")
        _check(manifest, where)
        return manifest

    @property
    def digest(self) -> str:
        """The sha256 that pins the bank."""
        return self.to_bytes()[11:75].decode()

    def may_replace(self, digest: str) -> bool:
        """Return whether the bank of a digest is this one, or one that this one has grown from."""
        return digest in (self.digest, *self.grown_from)

    @property
    def files(self) -> list[FileEntry]:
        """Every file it names."""
        held = [entry.file for entry in self.entries]
        return held + ([self.shared] if self.shared is not None else [])

    @property
    def entries(self) -> list[TaskEntry | Tombstone]:
        """Tasks and tombstones in the order of their numbers: the order in which entries were claimed."""
        found: list[TaskEntry | Tombstone] = [*self.tasks, *self.tombstones]
        return sorted(found, key=lambda entry: entry.index)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _corrupt(where: str, found: str) -> BankCorruptError:
    return BankCorruptError(f"{where}: expected a bank's manifest, found {found}. Fetch it again, or restore a copy.")


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dict.

    Raises:
        ValueError: A key stands twice.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _read(cls: type[Any], value: Any, where: str) -> Any:
    """Build a dataclass from a JSON object: all of its keys, no others, each of its type."""
    hints = get_type_hints(cls)
    if not isinstance(value, Mapping) or set(value) != set(hints):
        extra = sorted(set(value) ^ set(hints))[:5] if isinstance(value, Mapping) else type(value).__name__
        raise _corrupt(where, f"other keys than expected ({extra})")
    made = {field.name: _as(hints[field.name], value[field.name], f"{where}: {field.name}") for field in fields(cls)}
    return cls(**made)


def _as(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, UnionType):
        return None if value is None else _as(get_args(kind)[0], value, where)
    if get_origin(kind) is list and isinstance(value, list):
        return [_as(get_args(kind)[0], item, where) for item in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: _as(get_args(kind)[1], item, where) for key, item in value.items()}
    if kind is Any:
        return value
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return _read(kind, value, where)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return value
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise _corrupt(where, f"{type(value).__name__} where another type is expected")


def _check(manifest: Manifest, where: str) -> None:
    """Refuse values that no bank has."""
    problems: list[str] = []

    def must(holds: bool, what: str) -> None:
        if not holds:
            problems.append(what)

    tasks, store = manifest.tasks, manifest.store
    numbers = [entry.index for entry in manifest.entries]
    must(store.compose in COMPOSES, f"compose {store.compose!r}")
    must(0 <= len(set(manifest.grown_from)) == len(manifest.grown_from) <= manifest.generation, "a bad generation")
    must(all(_HEX.fullmatch(digest) for digest in manifest.grown_from), "an ancestor that is no sha256")
    must([task.index for task in tasks] == sorted(task.index for task in tasks), "task numbers that do not rise")
    must(len(set(numbers)) == len(numbers), "a task number twice")
    must(all(0 <= index < manifest.next_index <= MOST_TASKS + 1 for index in numbers), "task numbers out of range")
    must(len({_folded(task.name) for task in tasks}) == len(tasks), "two tasks of one name")
    must(_HEX.fullmatch(manifest.base.fingerprint) is not None, "a base fingerprint that is no sha256")
    must(_HEX.fullmatch(manifest.base.tokenizer) is not None, "a tokenizer's fingerprint that is no sha256")
    must(len(set(store.targets)) == len(store.targets) > 0, "targets that are none, or double")
    must(set(store.scales) == set(store.shapes) == set(store.layers), "scales and shapes of different layers")
    must(len(set(store.layers)) == len(store.layers) > 0, "layers that are none, or double")
    must(store.scale > 0 and all(scale > 0 for scale in store.scales.values()), "scales below 0")
    must(bool(store.head), "no head")
    must(all(_is_shape(shape) for shape in store.shapes.values()), "shapes that no layer has")
    for task in tasks:
        name = f"task {task.index}"
        must(bool(task.name.strip()), f"{name} without a name")
        must(task.problem_type in PROBLEMS, f"{name} with problem_type {task.problem_type!r}")
        must(0 < len(task.labels) == len(set(task.labels)), f"{name} with no labels, or double ones")
        must(set(task.inherits) <= set(numbers), f"{name} inheriting from a task that is not there")
        must(all(0 <= other < task.index for other in task.inherits), f"{name} inheriting from a later task")
        must(task.head_of is None or 0 <= task.head_of < task.index, f"{name} sharing a later task's head")
        must(set(task.method) == {"name", "options"}, f"{name} with a method that is none")
    for entry in manifest.entries:
        name = f"task {entry.index}"
        must(0 < entry.density <= 1, f"{name} with density {entry.density}")
        must(entry.trains in ("nothing", "claimed"), f"{name} that trains {entry.trains!r}")
        must(entry.values_dtype in VALUES, f"{name} with values in {entry.values_dtype!r}")
        kind = "task" if isinstance(entry, TaskEntry) else "left"
        must(entry.file.name.startswith(f"{kind}-{entry.index:05d}-"), f"{name} in a file of another name")
    must(manifest.shared is None or manifest.shared.name.startswith("shared-"), "a shared file of another name")
    for file in manifest.files:
        found = FILE.fullmatch(file.name)
        must(found is not None and found[2] == file.sha256[:16], "a file not named by its content")
        must(_HEX.fullmatch(file.sha256) is not None and file.bytes > 0, "a bad file entry")
    if problems:
        raise _corrupt(where, ", ".join(problems[:5]))


def _is_shape(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and all(size > 0 for size in shape) and shape[0] * shape[1] <= MOST_ENTRIES


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
