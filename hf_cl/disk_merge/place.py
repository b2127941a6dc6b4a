"""Where a merged model goes: a new folder, or the place of an earlier merge if the caller says so."""

from collections.abc import Iterable
from pathlib import Path

from hf_cl.disk_merge.card import RECORD
from hf_cl.disk_merge.fetch import Source
from hf_cl.errors import MergeError


def require_place(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that is taken, before any work is done.

    Raises:
        MergeError: Something is there, and it is no merge that may be replaced.
    """
    if not (out.is_symlink() or out.exists()) or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / RECORD).is_file() or out.is_symlink():
        raise MergeError(f"{out}: exists, and no merge has written it. Choose another folder.")
    if not overwrite:
        raise MergeError(f"{out}: holds a merged model already. Choose another folder, or add --overwrite.")


def require_apart(out: Path, sources: Iterable[Source]) -> None:
    """Refuse to replace what is read.

    Raises:
        MergeError: A source is, or lies in, the folder that is written.
    """
    place = out.resolve()
    for source in sources:
        if place in (found := source.folder.resolve(), *found.parents):
            raise MergeError(f"{out}: {source.name} lies there, which is to be merged. Choose another folder.")
