"""A folder that is there whole or not at all: it is filled under a temporary name beside, synced, and renamed.

Whatever ends the work, an error or Ctrl-C, removes what was written; what a killed process left is removed by the next
one that writes the same folder, which tells it by its lock. Where a folder is replaced, the old one goes last.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hf_cl.storage.disk import make_folder, stands_for, sync, temporary_of


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `path` at the end, in place of a folder that is there.

    Args:
        path: The folder to make. Whether one that is there may go is the caller's to decide, before.

    Raises:
        OSError: It names `path`; nothing is left, and a folder that was there is as it was.
    """
    make_folder(path.parent)
    _sweep(path)
    scratch = temporary_of(path)
    scratch.mkdir()
    lock = os.open(scratch, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield scratch
        for place in (*scratch.rglob("*"), scratch):
            sync(place)
        _put(scratch, path)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and _concerns(error, scratch):
            what = f"{error.strerror or error}. Nothing was written"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what += "; make room there, or choose another place"
            raise OSError(error.errno, what, str(path)) from error
        raise
    finally:
        os.close(lock)


def _concerns(error: OSError, scratch: Path) -> bool:
    """Return whether an error is one of writing here: writing to an open file names no file."""
    return error.filename is None or str(scratch) in (str(error.filename), *map(str, Path(error.filename).parents))


def _put(scratch: Path, path: Path) -> None:
    old = temporary_of(path)
    held = path.is_symlink() or path.exists()
    if held:
        path.rename(old)
    try:
        scratch.rename(path)
    except BaseException:
        if held:
            old.rename(path)
        raise
    sync(path.parent)
    if held:
        shutil.rmtree(old, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what writers of this folder left that are no more: nobody holds its lock."""
    for place in path.parent.iterdir():
        if (
            place.name != path.name
            and stands_for(place.name) == path.name
            and place.is_dir()
            and not place.is_symlink()
        ):
            held = os.open(place, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place, ignore_errors=True)
            except OSError:
                continue  # somebody is at work there
            finally:
                os.close(held)
