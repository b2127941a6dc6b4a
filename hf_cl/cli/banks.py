"""What verbs do alike: find the bank that is named, and load a base for it.

A bank is data that anyone may have written, its base's name included. So a base is loaded if the caller names it, or if
the bank names one that this machine holds already; nothing is ever downloaded on a bank's word.
"""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hf_cl.cli import show
from hf_cl.config import did_you_mean
from hf_cl.errors import BankError, ConfigError, RunError

if TYPE_CHECKING:
    from hf_cl import MaskBank
    from hf_cl.layers.base import Base
    from hf_cl.storage.manifest import Manifest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOKEN = re.compile(r"[\x21-\x7e]+")


def is_run(where: str, revision: str | None) -> bool:
    """Return whether a path is a run's folder; if not, it is a bank's, or a Hub id.

    Raises:
        RunError: It is none of them.
        ConfigError: A revision of a run.
    """
    from hf_cl.storage import manifest, run_folder

    folder = Path(where)
    if on_hub(where) or (folder / manifest.MANIFEST).exists():
        return False
    if (folder / run_folder.MANIFEST).exists():
        if revision is not None:
            raise ConfigError(f"revision: {where} is a run's folder here, which has none. Leave it out.")
        return True
    if (folder / run_folder.BANK / manifest.MANIFEST).exists():
        return False
    raise RunError(
        f"{where}: no {run_folder.MANIFEST} here and no {manifest.MANIFEST}, so this is no run and no bank. Give a "
        f"folder that `hf-cl train` or `hf-cl pull` wrote."
    )


def bank_folder(where: str) -> Path:
    """Return the folder of the bank that a path names: a bank's own, or that of a run that holds one.

    Raises:
        BankError: There is none.
    """
    from hf_cl.storage import manifest, run_folder

    for folder in (Path(where), Path(where, run_folder.BANK)):
        if (folder / manifest.MANIFEST).exists():
            return folder
    if Path(where, run_folder.MANIFEST).exists():
        raise BankError(
            f"{where}: is a run without a bank. Methods that never overwrite (supsup, exssnet) give one; of another "
            f"run, hf-cl inspect, verify and eval tell what it holds."
        )
    found = f"no {manifest.MANIFEST} here" if Path(where).exists() else "no such folder"
    raise BankError(f"{where}: {found}, so this is no bank. Give a bank's folder, or a run that holds one.")


def on_hub(where: str) -> bool:
    """Return whether a name is a Hub id: it looks like one, and nothing of that name is here."""
    return not Path(where).exists() and HUB_ID.fullmatch(where) is not None


def bank_source(where: str) -> str | Path:
    """Return what a bank is opened by: its folder, or its Hub id.

    Raises:
        BankError: There is no such folder, and the name is no Hub id.
    """
    return where if on_hub(where) else bank_folder(where)


def open_bank(where: str, revision: str | None = None) -> "MaskBank":
    """Open a bank; only its manifest is read.

    Raises:
        BankError: There is none, or its manifest is damaged.
        ConfigError: A revision of a folder.
    """
    from hf_cl import MaskBank

    source = bank_source(where)
    try:
        return MaskBank.from_pretrained(source, revision=revision)
    except BankError as error:
        if isinstance(source, Path):
            raise
        raise type(error)(f"{error} (There is no folder {where}, so it was taken for a Hub id.)") from error


def manifest_of(where: str, revision: str | None = None) -> "Manifest":
    """Return a bank's manifest, of a folder without importing what only models need."""
    from hf_cl.storage.bank_folder import read_manifest

    if revision is None and not on_hub(where):
        return read_manifest(bank_folder(where))
    return open_bank(where, revision).manifest


def require_task(bank: "MaskBank", task: str) -> None:
    """Refuse a task that the bank does not hold, before anything heavy is loaded.

    Raises:
        ConfigError: It holds none of that name.
    """
    if task not in bank.tasks:
        raise ConfigError(f"task {task!r}: this bank holds no such task.{did_you_mean(task, bank.tasks)}")


def base_of(bank: "MaskBank", named: str | None) -> "Base":
    """Load a bank's base, in the dtype and with the head that the bank says.

    Args:
        bank: The bank.
        named: What the caller names; None takes the bank's word for what this machine holds.

    Raises:
        ConfigError: None is named, and the bank names none or one that is not here.
        BaseModelError: It cannot be loaded.
    """
    from hf_cl.layers.base import load_base

    held = bank.manifest.base
    if named is None:
        if held.id is None:
            raise ConfigError("this bank does not name its base. Name it: --base ID_OR_FOLDER.")
        folder = local_copy(held.id, held.revision)
        if folder is None:
            raise ConfigError(
                f"base {held.id}: the bank names it, and this machine does not hold it. A bank may come from anyone, "
                f"so nothing is downloaded on its word. If you want that model: --base {shlex.quote(held.id)}"
            )
        typer.echo(show.plain(f"base: {held.id}, named by the bank; --base names another."), err=True)
        named = str(folder)
    return load_base(named, dtype=held.dtype, head=bank.manifest.store.head)


def local_copy(name: str, revision: str | None = None) -> Path | None:
    """Return the folder in which a model of the Hub lies on this machine, None where it does not.

    Args:
        name: Its Hub id; never a path, and never used as one.
        revision: A commit to prefer to what `main` was when it was downloaded; anything else is no reason to look.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from hf_cl.layers.base import packaged
    from hf_cl.storage.hub import COMMIT

    carried = packaged(name)
    if carried is not None:
        return Path(carried)
    for wanted in (revision, "main"):
        if wanted != "main" and not (wanted and COMMIT.fullmatch(wanted)):
            continue
        try:
            config = try_to_load_from_cache(name, "config.json", revision=wanted)
        except HFValidationError:
            return None
        if isinstance(config, str):
            return Path(config).parent
    return None


def require_token(token: str | None) -> None:
    """Refuse a token that would end in an error that quotes it.

    Raises:
        ConfigError: It holds a space, a line's end or something else that no token has.
    """
    if token is not None and not TOKEN.fullmatch(token):
        raise ConfigError("--token: holds characters that no token has (a space, a line's end?). Give the bare token.")
