"""`hf-cl merge`: one model out of several that were trained from one base, on disk."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_cl.cli import show
from hf_cl.cli.arguments import Json
from hf_cl.errors import ConfigError

Number = float | None


def number(name: str, text: str) -> Any:
    """Declare an option that belongs to some rules only."""
    return typer.Option(name, metavar="X", help=text, show_default=False)


def merge(
    rule: Annotated[str, typer.Argument(metavar="RULE", help="As in ties; docs/merging.md has all.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write; new or empty.")],
    models: Annotated[
        list[str],
        typer.Option("--model", metavar="ID_OR_FOLDER", help="A model, or an adapter; give one after another."),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="ID_OR_FOLDER",
            help="What all models were trained from; adapters name it themselves.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="X,X,...", help="One a model, in their order.", show_default=False),
    ] = None,
    scale: Annotated[Number, number("--scale", "Factor of the merged directions; negative to unlearn.")] = None,
    density: Annotated[Number, number("--density", "Share of each direction that ties or dare keeps.")] = None,
    alpha: Annotated[Number, number("--alpha", "wise_ft: weight of the model, the rest is the base's.")] = None,
    beta: Annotated[Number, number("--beta", "sfa: weight of the base, the anchor.")] = None,
    floor: Annotated[Number, number("--floor", "fisher: what a smaller Fisher counts as.")] = None,
    scope: Annotated[
        str | None, typer.Option(metavar="global|tensor", help="ties: trim all at once, or each.", show_default=False)
    ] = None,
    agreed: Annotated[
        str | None,
        typer.Option(
            "--merge", metavar="mean|sum", help="ties: what becomes of entries that agree.", show_default=False
        ),
    ] = None,
    fishers: Annotated[
        list[str] | None,
        typer.Option("--fisher", metavar="FILE", help="fisher: a safetensors file a model.", show_default=False),
    ] = None,
    dare: Annotated[Number, number("--dare", "Before any rule: keep this share of each direction, at random.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Of the choice of dare.", show_default=False)
    ] = None,
    heads: Annotated[
        str, typer.Option(metavar="base|each|merge", help="The base's, each model's in a folder of its own, or merged.")
    ] = "base",
    head_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--head-module", metavar="NAME", help="A further layer that is each task's own.", show_default=False
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of a file, as in 500MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge there.")] = False,
    as_json: Json = False,
) -> None:
    """Merge models, or LoRA adapters, of one base into a new folder; memory does not grow with their size."""
    given = {
        "weights": None if weights is None else _numbers(weights), "scale": scale, "density": density, "alpha": alpha,
        "beta": beta, "floor": floor, "scope": scope, "merge": agreed, "seed": seed if dare is None else None,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    from hf_cl.cli.quiet import libraries
    from hf_cl.disk_merge.merge import merge_checkpoints

    with libraries():
        merge_checkpoints(
            rule, base, models, out, options=options, fishers=fishers or (), heads=heads,
            dare=None if dare is None else {"density": dare, "seed": seed or 0},
            head_modules=head_modules or (), max_shard_size=max_shard_size, overwrite=overwrite,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    folders = [str(out / f"task-{place}") for place in range(len(models))] if heads == "each" else []
    if as_json:
        show.echo_json({"rule": rule, "out": str(out), "folders": folders})
        return
    print_ = show.console().print
    print_(show.plain(f"{out}: {len(models)} models merged by {rule}"), soft_wrap=True)
    for model, folder in zip(models if folders else (), folders, strict=True):
        print_(show.plain(f"{folder}: with the head of {model}"), soft_wrap=True)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights: {text!r} is no list of numbers. Give one a model, as in 0.5,1,1.") from error
