"""`hf-cl verify`: has anything a finished task reads moved since its commit?"""

from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from hf_cl.cli import show
from hf_cl.cli.arguments import Json, Model, Run

if TYPE_CHECKING:
    from hf_cl.runs import Verdict

MOVED = 1
ROUNDS = "Logits may differ on another machine, whose kernels round differently; the digests are what counts there."


def verify(run: Run, as_json: Json = False, model: Model = None) -> None:
    """Recompute every task's digest from the saved files. Exit code 1 if anything has moved."""
    from hf_cl import runs
    from hf_cl.cli.quiet import libraries

    with libraries():
        verdict = runs.verify(run, model)
    if as_json:
        show.echo_json(_plain(verdict))
    else:
        _show(show.console(), verdict)
    if not verdict.exact:
        raise typer.Exit(MOVED)


def _plain(verdict: "Verdict") -> dict[str, Any]:
    return {
        "exact": verdict.exact,
        "same_logits": verdict.same_logits,
        "files": verdict.files,
        "tasks": verdict.tasks,
    }


def _show(out: Console, verdict: "Verdict") -> None:
    from hf_cl.cli.report import proof_table

    rows = [(task["name"], task["before"], task["after"], bool(task["moved"])) for task in verdict.tasks]
    out.print(proof_table(rows))
    for task in verdict.tasks:
        if task["moved"]:
            out.print(show.plain(f"MOVED  task {task['name']}: {', '.join(task['moved'])}"), soft_wrap=True)
    for file in verdict.files:
        out.print(show.plain(f"MOVED  file {file}: its content is not what run.json says"), soft_wrap=True)
    out.print(f"exact: {'yes' if verdict.exact else 'no'}   ({len(verdict.tasks)} tasks)")
    out.print(f"same probe logits, bit for bit: {'yes' if verdict.same_logits else 'no'}")
    if verdict.exact and not verdict.same_logits:
        out.print(ROUNDS, soft_wrap=True)
