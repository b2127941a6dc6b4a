"""`hf-cl drop`: take a task out of a bank; what other tasks read of it stays."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_cl.cli import show
from hf_cl.cli.arguments import BankFolder, Json, TaskName
from hf_cl.cli.banks import bank_folder, open_bank, require_task
from hf_cl.errors import BankError, ConfigError

if TYPE_CHECKING:
    from hf_cl import MaskBank


def drop(
    bank: BankFolder,
    task: TaskName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Write the new bank there, and leave this one as it is.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Take a task out of a bank for good. Every other task answers as before."""
    folder = bank_folder(bank)
    if out is not None and out.resolve() == folder.resolve():
        out = None  # that is no other place
    if out is None:
        _refuse_of_run(folder)
    opened = open_bank(str(folder))
    require_task(opened, task)
    if out is None and not yes:
        _ask(opened, task)
    from hf_cl.cli.quiet import libraries

    with libraries():
        made = opened.drop(task)
        place = made.save_pretrained(folder if out is None else out)
    content = {"bank": str(place), "dropped": task, "tasks": made.tasks, "digest": made.digest}
    if as_json:
        show.echo_json(content)
        return
    console = show.console()
    console.print(show.plain(f"dropped {task}; {place} holds {', '.join(made.tasks)}"), soft_wrap=True)
    console.print(f"digest {made.digest}", soft_wrap=True)
    console.print(show.plain(f"Next: hf-cl verify {shlex.quote(str(place))}"), soft_wrap=True)


def _refuse_of_run(folder: Path) -> None:
    from hf_cl.storage import run_folder

    run = folder.resolve().parent
    if folder.resolve().name == run_folder.BANK and (run / run_folder.MANIFEST).exists():
        raise BankError(
            f"{folder}: is the bank of a run, which could not be opened again without its task. Write the new bank "
            f"elsewhere: --out DIR."
        )


def _ask(bank: "MaskBank", task: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError(
            "drop: there is no terminal to ask at, and a dropped task does not come back. Give --yes, or --out DIR."
        )
    left = len(bank.tasks) - 1
    question = f"Drop task {task!r} of {bank.folder} for good? {left} of {left + 1} tasks stay."
    if not typer.confirm(show.plain(question), err=True):
        raise ConfigError("drop: not confirmed; nothing was changed.")
