"""Has anything in a bank moved? Part of `hf-cl verify`.

The base is loaded only if the caller names it: without one, every file, owner and digest is checked all the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hf_cl.cli import show
from hf_cl.cli.banks import bank_folder, base_of, on_hub, open_bank
from hf_cl.errors import BankCorruptError

if TYPE_CHECKING:
    from hf_cl import MaskBank

WITHOUT_BASE = "Not checked without the base: that it is the bank's, and the probe logits. Add --base ID_OR_FOLDER."
ROUNDS = "Kernels round differently on another machine or version; the digests are what counts there."


def check(where: str, revision: str | None = None, base: str | None = None) -> dict[str, Any]:
    """Return what was found in a bank, as plain values.

    Args:
        where: A bank's folder, a run that holds one, or a Hub id.
        revision: Of a Hub id.
        base: The base to load, or None.

    Raises:
        BankError: There is no bank.
        BaseModelError: The base cannot be loaded, or is another than the bank's.
    """
    found: dict[str, Any] = {"bank": where, "digest": None, "base": base, "exact": False, "same_logits": None}
    found |= {"files": [], "tasks": []}
    folder = None if on_hub(where) else bank_folder(where)
    try:
        bank = open_bank(where, revision)
    except BankCorruptError as error:
        if folder is None:
            raise  # a repository may well hold no bank at all
        return found | {"files": [str(error)]}
    try:
        found["digest"] = bank.digest
        found["files"] = [] if folder is None else _damaged(bank, folder)
        if not found["files"]:
            found["tasks"] = bank.verify(None if base is None else base_of(bank, base).model)
    except BankCorruptError as error:
        found["files"] = [str(error)]
    for task in found["tasks"]:
        # Equal digests, and yet another answer than rounding explains: something does not compute what it stores.
        if not task.get("close", True):
            task["moved"] = [*task["moved"], f"probe logits (by {task['difference']:.2g} of the largest)"]
    found["exact"] = not found["files"] and not any(task["moved"] for task in found["tasks"])
    if base is not None and found["tasks"]:
        found["same_logits"] = all(task["same_logits"] for task in found["tasks"])
    return found


def _damaged(bank: "MaskBank", folder: Path) -> list[str]:
    """Return what is wrong with each file, so that one damaged file does not hide another."""
    from hf_cl.storage.bank_folder import read_file, tensors_of

    found = []
    for entry in bank.manifest.files:
        try:
            tensors_of(entry, read_file(folder / entry.name, entry.bytes), entry.name)
        except BankCorruptError as error:
            found.append(str(error))
    return found


def show_verdict(out: Console, found: Mapping[str, Any]) -> None:
    """Print what `check` gave."""
    from hf_cl.cli.after_run import proof_table

    tasks = found["tasks"]
    if tasks:
        out.print(proof_table([(task["name"], task["before"], task["after"], bool(task["moved"])) for task in tasks]))
    show_moved(out, found)
    out.print(f"exact: {'yes' if found['exact'] else 'no'}   (bank {show.short(found['digest'])}, {len(tasks)} tasks)")
    if found["same_logits"] is not None:
        out.print(f"same probe logits, bit for bit: {'yes' if found['same_logits'] else 'no'}")
    if found["exact"] and found["base"] is None:
        out.print(WITHOUT_BASE, soft_wrap=True)
    elif found["exact"] and not found["same_logits"]:
        most = max(task["difference"] for task in tasks)
        out.print(f"They differ by at most {most:.1g} of the largest. {ROUNDS}", soft_wrap=True)


def show_moved(out: Console, found: Mapping[str, Any]) -> None:
    """Print what has moved, and where."""
    for task in found["tasks"]:
        if task["moved"]:
            out.print(show.plain(f"MOVED  task {task['name']}: {', '.join(task['moved'])}"), soft_wrap=True)
    for problem in found["files"]:
        out.print(show.plain(f"MOVED  file {problem}"), soft_wrap=True)
