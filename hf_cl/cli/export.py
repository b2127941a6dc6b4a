"""`hf-cl export`: one task of a bank as something that loads without this package, or as a PEFT adapter."""

from pathlib import Path
from typing import Annotated

import typer

from hf_cl.cli import show
from hf_cl.cli.arguments import Bank, Base, Json, Revision, TaskName
from hf_cl.cli.banks import base_of, open_bank, require_task
from hf_cl.config import did_you_mean
from hf_cl.errors import ConfigError

KINDS = {
    "checkpoint": "a plain classifier and its tokenizer: AutoModelForSequenceClassification.from_pretrained({place!r})",
    "peft": "an adapter for the bank's base: import hf_cl; PeftModel.from_pretrained(base, {place!r})",
}
"""What `--to` takes, and what is said of it."""


def export(
    bank: Bank,
    task: TaskName,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write; new or empty.")],
    to: Annotated[str, typer.Option("--to", metavar="|".join(KINDS), help="What to write.")] = "checkpoint",
    base: Base = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write one task of a bank as a plain checkpoint, or as a PEFT adapter."""
    if to not in KINDS:
        raise ConfigError(f"--to: {to!r} is not one of {', '.join(KINDS)}.{did_you_mean(to, KINDS)}")
    opened = open_bank(bank, revision)
    require_task(opened, task)
    from hf_cl.cli.quiet import libraries

    with libraries():
        loaded = base_of(opened, base)
        # An adapter goes onto the base, which has the tokenizer; a checkpoint stands alone.
        tokenizer = loaded.tokenizer if to == "checkpoint" else None
        opened.export(task, loaded.model, out, to=to, tokenizer=tokenizer)
        from hf_cl.training.masked import adapter_of

        # PEFT puts an adapter into a folder of its name.
        number = {entry.name: entry.index for entry in opened.manifest.tasks}[task]
        place = str(out / adapter_of(number) if to == "peft" else out)
    if as_json:
        show.echo_json({"bank": bank, "task": task, "to": to, "out": place})
    else:
        show.console().print(show.plain(KINDS[to].format(place=place)), soft_wrap=True)
