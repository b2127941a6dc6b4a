"""A bank's folder: `bank.json` and one safetensors file a task, each named by its number and content.

Writing adds files that no manifest names yet, syncs them, and then renames the new manifest into place: whenever a
process ends, the folder holds the old bank or the new one, whole. What no manifest names goes with the next save.
Reading opens each file once, refuses what is no regular file or not of the declared size, and parses the very bytes
whose sha256 it has checked.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hf_cl.errors import BankConflictError, BankCorruptError, BankError
from hf_cl.storage.disk import write_atomic
from hf_cl.storage.manifest import FILE, MANIFEST, MOST_BYTES, FileEntry, Manifest

DTYPES = (torch.uint8, torch.int32, torch.float32, torch.bfloat16)
MOST_HEADER = 1024 * 1024
"""Of a task's safetensors header; a head of several layers takes a few hundred bytes."""
Reader = Callable[[FileEntry], bytes]


def task_blob(index: int, tensors: Mapping[str, Tensor]) -> tuple[FileEntry, bytes]:
    """Return a task's file: its entry and its bytes, the same for the same tensors."""
    data = save_tensors({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    sha = hashlib.sha256(data).hexdigest()
    return FileEntry(f"task-{index:05d}-{sha[:16]}.safetensors", sha, len(data)), data


def tensors_of(entry: FileEntry, data: bytes, where: str) -> dict[str, Tensor]:
    """Return a task file's tensors, after checking that its bytes are the manifest's.

    Raises:
        BankCorruptError: They are not, or hold what no task holds.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise BankCorruptError(
            f"{where}: its sha256 is {found[:16]}..., the manifest says {entry.sha256[:16]}.... Fetch it again."
        )
    if len(data) < 8 or int.from_bytes(data[:8], "little") > MOST_HEADER:
        raise BankCorruptError(f"{where}: its header is larger than any task's. It is no task's file.")
    try:
        # Cloned: the reader's views are not aligned, and kernels then round differently.
        tensors = {name: tensor.clone() for name, tensor in load_tensors(data).items()}
    except (SafetensorError, ValueError) as error:
        raise BankCorruptError(f"{where}: is no safetensors file ({error}). Fetch it again.") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise BankCorruptError(f"{where}: tensor {name!r} is {tensor.dtype}, which no bank holds.")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BankCorruptError(f"{where}: tensor {name!r} holds numbers that are not finite.")
    return tensors


def read_file(path: Path, size: int) -> bytes:
    """Return a regular file's bytes, of exactly the given size.

    Raises:
        BankCorruptError: It is missing, a link, a device or of another size.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        kind = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be opened ({error.strerror})"
        raise BankCorruptError(f"{path}: {kind}. Fetch the bank again, or restore a copy.") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        os.close(descriptor)
        raise BankCorruptError(
            f"{path}: found {status.st_size:,} bytes, the manifest says {size:,} of a regular file. Fetch it again."
        )
    with os.fdopen(descriptor, "rb") as file:
        return file.read(size)


def read_manifest(folder: Path) -> Manifest:
    """Return a folder's manifest.

    Raises:
        BankCorruptError: There is none, or it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise BankCorruptError(f"{folder}: no {MANIFEST} here, so this is no bank. Give the folder of a bank.")
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise BankCorruptError(f"{file}: {size:,} bytes are more than any manifest has.")
    return Manifest.from_bytes(read_file(file, size), str(file))


def write_bank(folder: Path, manifest: Manifest, read: Reader, *, expected: str | None) -> None:
    """Make a folder hold a bank, whole or not at all.

    Args:
        folder: A bank's folder, an empty one, or one that is not there yet.
        manifest: The new bank.
        read: Gives the bytes of its files that are not in the folder yet.
        expected: Digest of the bank that the folder must hold now; None where it must hold none.

    Raises:
        BankConflictError: It holds another: somebody saved in between.
        BankError: It holds something else, or the disk has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        _require(folder, expected)
        new = [task.file for task in manifest.tasks if not _holds(folder, task.file)]
        need, free = 2 * sum(entry.bytes for entry in new), shutil.disk_usage(folder).free
        if need > free:
            raise BankError(f"{folder}: saving needs {need:,} bytes, {free:,} are free. Make room and save again.")
        for entry in new:
            write_atomic(folder / entry.name, read(entry))
        _require(folder, expected)
        write_atomic(folder / MANIFEST, manifest.to_bytes())
        # From here on the new bank is there: what is left behind is no reason to say that saving failed.
        with contextlib.suppress(OSError):
            _sweep(folder, {task.file.name for task in manifest.tasks})


def _require(folder: Path, expected: str | None) -> None:
    held = read_manifest(folder).digest if (folder / MANIFEST).exists() else None
    if held == expected:
        others = [file.name for file in folder.iterdir() if not _is_ours(file.name)] if held is None else []
        if others:
            raise BankError(f"{folder}: holds {', '.join(sorted(others)[:3])} and no bank. Choose an empty folder.")
        return
    raise BankConflictError(
        f"{folder}: holds the bank {(held or 'none')[:12]}, expected {(expected or 'none')[:12]}: another was saved "
        f"there. Open that one and extend it, or choose another folder."
    )


def _holds(folder: Path, entry: FileEntry) -> bool:
    try:
        return hashlib.sha256(read_file(folder / entry.name, entry.bytes)).hexdigest() == entry.sha256
    except BankCorruptError:
        return False


def _is_ours(name: str) -> bool:
    return bool(FILE.fullmatch(name.removeprefix(".").removesuffix(".tmp"))) or name in (
        ".lock",
        "README.md",
        f".{MANIFEST}.tmp",
    )


def _sweep(folder: Path, named: set[str]) -> None:
    for file in folder.iterdir():
        ours = FILE.fullmatch(file.name) or (file.name.startswith(".") and file.name.endswith(".tmp"))
        if ours and file.name not in named and file.is_file():
            file.unlink()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder against other savers, as far as its file system locks; `_require` compares on top of that."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
