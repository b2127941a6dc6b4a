"""A bank's folder: `bank.json` and safetensors files, each named by its number and content.

Writing adds files that no manifest names yet, syncs them, and then renames the new manifest into place: whenever a
process ends, the folder holds the old bank or the new one, whole. What no manifest names goes with the next save.
Reading opens each file once, refuses what is no regular file or not of the declared size, and parses the very bytes
whose sha256 it has checked.

Several savers wait for each other where the file system locks, and lose none of each other's banks where it does not
(`disk.swap`). What remains there is sweeping, since a file is removed by its name whoever wrote it last: a saver that
is stopped between its last look and a removal may, when it goes on, remove a leftover that another saver has meanwhile
made its own. That bank is then refused as incomplete, never read wrong.
"""

import errno
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from hf_cl.errors import BankConflictError, BankCorruptError, BankError
from hf_cl.storage.disk import lock, make_folder, rename, require_room, stands_for, swap, sync, temporary_of, write_new
from hf_cl.storage.manifest import FILE, MANIFEST, MOST_BYTES, FileEntry, Manifest, unique_keys

DTYPES = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "F32": torch.float32, "BF16": torch.bfloat16}
"""What a bank's file may hold, by the names that safetensors gives them."""
MOST_HEADER = 256 * 1024
"""Of a file's safetensors header: room for two thousand tensors, where a head with all norms of a base has hundreds."""
LOCK = ".lock"
TURNS = 40
"""How often savers that removed each other's staged manifest try again: far beyond what any race took."""
Reader = Callable[[FileEntry], bytes]
logger = logging.getLogger(__name__)


# --- a file's bytes and tensors -----------------------------------------------------------------------


def task_blob(stem: str, tensors: Mapping[str, Tensor]) -> tuple[FileEntry, bytes]:
    """Return a file named `<stem>-<digest>`: its entry and its bytes, the same for the same tensors."""
    data = save_tensors({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    sha = hashlib.sha256(data).hexdigest()
    return FileEntry(f"{stem}-{sha[:16]}.safetensors", sha, len(data)), data


def tensors_of(entry: FileEntry, data: bytes, where: str) -> dict[str, Tensor]:
    """Return a file's tensors, after checking that its bytes are the manifest's.

    Raises:
        BankCorruptError: They are not, or hold what no bank holds.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise BankCorruptError(
            f"{where}: its sha256 is {found[:16]}..., the manifest says {entry.sha256[:16]}.... Fetch it again."
        )
    _check_header(data, where)
    try:
        # Cloned: the reader's views are not aligned, and kernels then round differently.
        tensors = {name: tensor.clone() for name, tensor in load_tensors(data).items()}
    except Exception as error:  # whatever a parser makes of bytes that somebody chose
        raise BankCorruptError(f"{where}: is no safetensors file ({error}). Fetch it again.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BankCorruptError(f"{where}: tensor {name!r} holds numbers that are not finite. Do not use this bank.")
    return tensors


def _check_header(data: bytes, where: str) -> None:
    """Refuse, before anything is made of it, a safetensors header that no bank's file has."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MOST_HEADER, len(data) - 8):
        raise BankCorruptError(f"{where}: its header would be {size:,} bytes. It is no bank's file; fetch it again.")
    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise BankCorruptError(f"{where}: its header is no strict JSON ({error}). Fetch it again.") from error
    for name, entry in header.items() if isinstance(header, dict) else [("", None)]:
        dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            held = f"{str(dtype)[:20]!r}; a bank holds {', '.join(DTYPES)}"
            raise BankCorruptError(f"{where}: tensor {name[:80]!r} is {held}. Do not use this bank.")
        if not isinstance(shape, list) or len(shape) > 4 or any(axis not in range(len(data)) for axis in shape):
            raise BankCorruptError(f"{where}: tensor {name[:80]!r} has a shape that no file of its size holds.")


# --- reading a folder ---------------------------------------------------------------------------------


def read_file(path: Path, size: int | None) -> bytes:
    """Return a regular file's bytes, of exactly the given size; None is any that a manifest may have.

    Raises:
        BankCorruptError: It is missing, a link, a device or of another size.
        BankError: It does not fit into memory.
    """
    with os.fdopen(_open_regular(path), "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if size is None and found > MOST_BYTES:
            raise BankCorruptError(f"{path}: {found:,} bytes are more than any manifest has. Fetch it again.")
        if size is not None and found != size:
            raise BankCorruptError(f"{path}: found {found:,} bytes, the manifest says {size:,}. Fetch it again.")
        try:
            return file.read(found)
        except MemoryError as error:
            raise BankError(f"{path}: {found:,} bytes do not fit into memory. Free some and try again.") from error
        except OSError as error:
            raise BankCorruptError(f"{path}: cannot be read ({error.strerror}). Restore a copy.") from error


def _open_regular(path: Path) -> int:
    """Open a file that is nothing else, and has no other name under which it could be changed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        kind = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be opened ({error.strerror})"
        way_out = "Open the bank anew if another was saved here, else fetch it again or restore a copy"
        raise BankCorruptError(f"{path}: {kind}. {way_out}.") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink < 2:  # 0 where a saver has replaced it just now
        return descriptor
    os.close(descriptor)
    kind = "has another name too (a hard link)" if stat.S_ISREG(status.st_mode) else "is no regular file"
    raise BankCorruptError(f"{path}: {kind}. Copy the bank's files into a folder of their own.")


@dataclass(frozen=True)
class FolderReader:
    """Reads a bank's files out of its folder."""

    folder: Path

    def __call__(self, entry: FileEntry) -> bytes:
        """Return a file's bytes, of the declared size."""
        return read_file(self.folder / entry.name, entry.bytes)


def read_manifest(folder: Path) -> Manifest:
    """Return a folder's manifest.

    Raises:
        BankCorruptError: There is none, or it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise BankCorruptError(f"{folder}: no {MANIFEST} here, so this is no bank. Give the folder of a bank.")
    # Opened once: between a look at its size and the reading, a saver may put another in its place.
    return Manifest.from_bytes(read_file(file, None), str(file))


# --- writing a folder ---------------------------------------------------------------------------------


def write_bank(folder: Path, manifest: Manifest, read: Reader, *, expected: str | None) -> None:
    """Make a folder hold a bank, whole or not at all.

    Args:
        folder: A bank's folder, an empty one, or one that is not there yet.
        manifest: The new bank.
        read: Gives the bytes of its files that are not in the folder yet.
        expected: Digest of the bank that the folder must hold now, if it does not hold the new one already; None
            where it must hold none.

    Raises:
        BankConflictError: It holds another: somebody saved in between.
        BankError: It holds something else, or the disk has no room.
        OSError: Writing failed; it names the file and how many bytes it has. The folder holds what it held.
    """
    make_folder(folder)
    with lock(folder / LOCK):
        held = _require(folder, expected, manifest)
        leftovers = {file.name for file in folder.iterdir()} - {MANIFEST, *(file.name for file in manifest.files)}

        def look() -> None:
            _require(folder, expected, manifest)
            for entry in manifest.files:
                (folder / entry.name).lstat()

        for turn in range(TURNS):
            try:
                _add_files(folder, manifest, read, held)
            except (OSError, BankCorruptError):
                _require(folder, expected, manifest)  # a rival's sweep is told as the rival that it is
                raise
            if swap(folder / MANIFEST, manifest.to_bytes(), look):
                return _settle(folder, manifest, leftovers)
            # Not from `random`: processes forked from one would all wait equally long.
            time.sleep(int.from_bytes(os.urandom(2), "little") / 65536 * min(0.005 * 2**turn, 0.5))
    raise BankConflictError(f"{folder}: others keep saving here. Open the bank that is there then and extend it.")


def _require(folder: Path, expected: str | None, manifest: Manifest) -> Manifest | None:
    """Return what the folder holds, which is what is expected, or the new bank already.

    Raises:
        BankConflictError: It holds another bank.
        BankError: It holds no bank, and files that are none of a bank's.
    """
    names = {file.name for file in folder.iterdir()}  # one look: a rival may be saving the first bank just now
    held = read_manifest(folder) if MANIFEST in names else None
    if held is not None and held.digest in (expected, manifest.digest):
        return held
    if held is None and expected is None:
        others = sorted(name for name in names if not _is_ours(name))
        if others:
            raise BankError(f"{folder}: holds {', '.join(others[:3])} and no bank. Choose an empty folder.")
        return None
    raise BankConflictError(
        f"{folder}: holds the bank {(held.digest if held else 'none')[:12]}, expected {(expected or 'none')[:12]}: "
        f"another was saved there. Open that one and extend it, or choose another folder."
    )


def _add_files(folder: Path, manifest: Manifest, read: Reader, held: Manifest | None) -> None:
    """Write the bank's files that are not there yet, and have all of them, with their names, on the disk."""
    safe = {file.name for file in held.files} if held is not None else set()
    new = [file for file in manifest.files if not _holds(folder, file, durable=file.name in safe)]
    require_room(folder, 2 * sum(entry.bytes for entry in new), BankError)
    for entry in new:
        data, path = read(entry), folder / entry.name
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BankCorruptError(f"{entry.name}: is not what its bank says. It is not saved again; restore a copy.")
        temporary = temporary_of(path)
        write_new(temporary, data, path)
        rename(temporary, path)
    sync(folder)


def _settle(folder: Path, manifest: Manifest, leftovers: Collection[str]) -> None:
    """Sync the switch, then remove leftovers. The new bank is there: nothing here may say that saving failed."""
    try:
        sync(folder)
    except OSError as error:
        # Nothing is removed: after a power cut the old bank may be there again.
        logger.warning("%s: saved, but a power cut now may bring the bank before it back (%s)", folder, error)
        return
    try:
        for name in sorted(leftovers):
            file = folder / name
            if _is_swept(name) and not (file.is_dir() and not file.is_symlink()):
                if not _is_current(folder, manifest):
                    return
                file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: saved, but leftovers are still there (%s); the next save removes them", folder, error)


def _is_current(folder: Path, manifest: Manifest) -> bool:
    """Return whether the folder still holds this very manifest; its first bytes are its digest."""
    head = manifest.to_bytes()[:80]
    with (folder / MANIFEST).open("rb") as file:
        return file.read(len(head)) == head


def _holds(folder: Path, entry: FileEntry, *, durable: bool) -> bool:
    """Return whether a file is there already; it is on the disk then, whoever wrote it, unless it is `durable`."""
    path = folder / entry.name
    try:
        if hashlib.sha256(read_file(path, entry.bytes)).hexdigest() != entry.sha256:
            return False
    except BankCorruptError:
        return False
    if not durable:
        sync(path)
    return True


def _is_swept(name: str) -> bool:
    """Return whether a name is a bank's file, or a temporary one of a saver; `bank.json` itself is none."""
    return name != MANIFEST and bool(FILE.fullmatch(stands_for(name)) or stands_for(name) == MANIFEST)


def _is_ours(name: str) -> bool:
    return _is_swept(name) or name in (LOCK, "README.md")
