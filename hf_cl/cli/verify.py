"""`hf-cl verify`: has anything a finished task reads moved since its commit?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_cl.cli import show, verify_bank
from hf_cl.cli.arguments import BankOrRun, Json, Revision
from hf_cl.cli.banks import is_run

if TYPE_CHECKING:
    from hf_cl.runs import Verdict

MOVED = 1
ROUNDS = "Logits may differ on another machine, whose kernels round differently; the digests are what counts there."


def verify(
    where: BankOrRun,
    as_json: Json = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            "--model",
            metavar="ID_OR_FOLDER",
            help="The base to load. Of a run: where it lies now, if not where the run says. Of a bank: without it, "
            "none is loaded, and the probe logits are not compared.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
) -> None:
    """Recompute every task's digest from the saved files. Exit code 1 if anything has moved."""
    from hf_cl.cli.quiet import libraries

    run = is_run(where, revision)
    with libraries():
        content = _run(Path(where), base) if run else verify_bank.check(where, revision, base)
    if as_json:
        show.echo_json(content)
    elif run:
        _show(show.console(), content)
    else:
        verify_bank.show_verdict(show.console(), content)
    if not content["exact"]:
        raise typer.Exit(MOVED)


def _run(run: Path, base: str | None) -> dict[str, Any]:
    from hf_cl import runs

    return _plain(runs.verify(run, base))


def _plain(verdict: "Verdict") -> dict[str, Any]:
    return {
        "exact": verdict.exact,
        "same_logits": verdict.same_logits,
        "files": verdict.files,
        "tasks": verdict.tasks,
    }


def _show(out: Console, content: dict[str, Any]) -> None:
    from hf_cl.cli.after_run import proof_table

    tasks = content["tasks"]
    out.print(proof_table([(task["name"], task["before"], task["after"], bool(task["moved"])) for task in tasks]))
    for task in tasks:
        if task["moved"]:
            out.print(show.plain(f"MOVED  task {task['name']}: {', '.join(task['moved'])}"), soft_wrap=True)
    for file in content["files"]:
        out.print(show.plain(f"MOVED  file {file}: its content is not what the manifest says"), soft_wrap=True)
    out.print(f"exact: {'yes' if content['exact'] else 'no'}   ({len(tasks)} tasks)")
    out.print(f"same probe logits, bit for bit: {'yes' if content['same_logits'] else 'no'}")
    if content["exact"] and not content["same_logits"]:
        out.print(ROUNDS, soft_wrap=True)
