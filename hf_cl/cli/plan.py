"""`hf-cl plan`: how many tasks a bank has room for, and what they cost, before anything is trained."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_cl.cli import show
from hf_cl.cli.arguments import Json
from hf_cl.cli.banks import local_copy
from hf_cl.errors import ConfigError

OVERLAP = (
    "Expected if masks were independent. Learned masks overlap more, so after so many tasks no less of the store is "
    "free than shown; of its own mask a task may find less free."
)
FULL = (
    "When a bank is full: masks alone still learn (method=supsup needs no free entry); a lower --density leaves more "
    "room; hf-cl drop BANK TASK frees what no other task reads; or begin a new bank."
)


def plan(
    tasks: Annotated[int, typer.Option("--tasks", metavar="N", help="How many tasks.", show_default=False)],
    density: Annotated[
        float, typer.Option("--density", metavar="D", help="Share of entries that a mask keeps.")
    ] = 0.005,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_FOLDER",
            help="The base, for its masked layers: a folder, or an id this machine holds. Only its config is read.",
            show_default=False,
        ),
    ] = None,
    params: Annotated[
        int | None,
        typer.Option(metavar="N", help="Entries of all masked layers, in place of --model.", show_default=False),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Of the LoRA to compare with.")] = 8,
    as_json: Json = False,
) -> None:
    """Work out how much room so many tasks leave in a bank, and how many bytes they take."""
    if model is not None and params is not None:
        raise ConfigError("--model and --params: both say how many entries are masked. Give one of them.")
    from hf_cl import capacity

    shapes = _shapes(model) if model is not None else []
    found = capacity.plan(tasks, density, entries=params, shapes=shapes, rank=rank)
    content = {"model": model, "layers": len(shapes) or None, "rank": rank if shapes else None, **asdict(found)}
    if as_json:
        show.echo_json(content)
    else:
        _show(show.console(), content)


def _shapes(model: str) -> list[tuple[int, int]]:
    from hf_cl.capacity import masked_shapes
    from hf_cl.cli.quiet import libraries

    folder = Path(model) if Path(model).is_dir() else local_copy(model)
    if folder is None:
        raise ConfigError(
            f"model {model!r}: is no folder, and this machine does not hold it. Download it first, or give --params."
        )
    with libraries():
        return masked_shapes(folder)


def _show(out: Console, content: Mapping[str, Any]) -> None:
    if content["entries"] is not None:
        of = f"{content['model']}: {content['layers']} masked layers, " if content["layers"] else ""
        out.print(show.plain(f"{of}{content['entries']:,} masked entries, density {content['density']:g}"))
    columns = ["task number", "free of its mask", "free of the store then", "supsup", "exssnet"]
    known = content["entries"] is not None
    rows = [_row(task, known) for task in content["milestones"]]
    out.print(show.table("What a task finds and stores", columns if known else columns[:3], rows))
    out.print(OVERLAP, soft_wrap=True)
    out.print(f"half of a mask is taken from task {content['half']:,} on, nine tenths from {content['scarce']:,} on")
    out.print(f"with claim=free_topk no entry is free after {content['full']:,} tasks")
    if known:
        totals = {"supsup": content["supsup_bytes"], "exssnet": content["exssnet_bytes"]}
        if content["lora_bytes"] is not None:
            totals[f"LoRA of rank {content['rank']} in bf16"] = content["lora_bytes"]
        sizes = ", ".join(f"{name} {show.size(size)}" for name, size in totals.items())
        out.print(f"{content['tasks']:,} tasks without their heads: {sizes}", soft_wrap=True)
    else:
        out.print("Give --model or --params for the bytes.")
    out.print(FULL, soft_wrap=True)


def _row(task: Mapping[str, Any], known: bool) -> list[object]:
    row: list[object] = [f"{task['task']:,}", show.share(task["free_of_mask"]), show.share(task["free_of_store"])]
    return [*row, show.size(task["mask_bytes"]), show.size(task["mask_bytes"] + task["value_bytes"])] if known else row
