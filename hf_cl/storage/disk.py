"""Writing files so that they are there whole or not at all, also after a crash: fsync, then one rename.

What is written under a temporary name is always a new file: a link that somebody left under that name is never
followed.

`swap` is for a file with several writers, and depends on no lock. A writer stages its bytes under a name of its own,
removes every other staged file it finds, takes a last look at the file, and renames. So no rename falls between
another's last look and its rename: of two that are staged at one time, the one that lists the folder later sees the
other and removes it, whose rename then fails. A writer that died leaves nothing to wait for; its staged file is removed
like any. This needs a file system that lists a file which is there all the while, and renames one file once: stale
listings of a network file system are not covered.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_cl.errors import HfClError

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a file system answers that cannot sync a folder; there is nothing more to do about it there."""


def json_bytes(value: Any) -> bytes:
    """Return a JSON value as indented UTF-8 with a last newline; NaN is refused."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def require_room(path: Path, need: int, error: type[HfClError]) -> None:
    """Refuse to begin what cannot end: the disk of a path, which need not be there yet, has too few bytes free.

    Raises:
        HfClError: Of the type that is given, with both numbers.
    """
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise error(f"{path}: saving needs {need:,} bytes, {free:,} are free. Make room there and try again.")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash; for a file with one writer.

    Raises:
        OSError: It names the file and how much could not be written; the file is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a writer that died
    write_new(temporary, data, path)
    rename(temporary, path)
    sync(path.parent)


def temporary_of(path: Path) -> Path:
    """Return a name beside a file that no other writer has: `.<name>.<16 hex>.tmp`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def stands_for(name: str) -> str:
    """Return the name that a file has or, where it is a temporary one, would get."""
    found = _TEMPORARY.fullmatch(name)
    return name if found is None else found[1]


def write_new(temporary: Path, data: bytes, path: Path) -> None:
    """Write and sync a file under a temporary name; where that fails, nothing is left there.

    Args:
        temporary: The name; nothing has it.
        data: All of its bytes.
        path: What the file is to become, for the error.

    Raises:
        OSError: It names `path` and how much could not be written.
    """
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        what = f"{error.strerror or error}: {len(data):,} bytes could not be written. Make room there and save again"
        raise OSError(error.errno, what, str(path)) from error


def rename(temporary: Path, path: Path) -> None:
    """Give a file its name in one step; where that fails, the temporary one is gone.

    Raises:
        OSError: The system's; FileNotFoundError where somebody has removed the temporary file.
    """
    try:
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names and what they stand for, on the disk before anything that follows.

    Raises:
        OSError: It names the path.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise OSError(error.errno, f"{error.strerror or error}: it could not be synced", str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # nothing was written through it
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and its parents, so that it is there after a crash too; one that is there already is fine."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in made:
        with contextlib.suppress(PermissionError):  # a parent may be writable and not readable
            sync(place.parent)


def swap(path: Path, data: bytes, look: Callable[[], object]) -> bool:
    """Replace a file after a last look at it; no other `swap` of it falls between the look and the rename.

    Args:
        path: The file.
        data: All of its new bytes.
        look: Raises what `swap` is to raise where the file must not be replaced; FileNotFoundError is to try again.

    Returns:
        Whether it was replaced. If not, another writer was in the way: wait a random while and try again.
    """
    staged = temporary_of(path)
    write_new(staged, data, path)
    try:
        for file in path.parent.iterdir():
            if file != staged and stands_for(file.name) == path.name != file.name:
                file.unlink(missing_ok=True)
        look()
        rename(staged, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            staged.unlink()
        if not isinstance(error, FileNotFoundError):
            raise
        return False
    return True


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Wait for others that hold this file, as far as the file system has locks.

    Raises:
        OSError: The file cannot be made, or is a link.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        way_out = "Remove it" if error.errno == errno.ELOOP else "Choose a folder that can be written"
        raise OSError(error.errno, f"{error.strerror or error}: nothing is saved. {way_out}", str(path)) from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # nothing was written through it, and what it guarded may be done
            os.close(descriptor)
