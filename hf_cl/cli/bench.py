"""`hf-cl bench`: what hf_cl costs on this machine, each figure beside its rival's."""

from pathlib import Path
from typing import Annotated

import typer

from hf_cl.cli import show
from hf_cl.cli.arguments import Json


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="As in step or switch; by default all. docs/benchmarks.md has them.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="For benchmarks.json and index.html.")] = Path(
        "benchmarks"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Shrink all sizes: a check that it works; no mark is judged.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where models run.")] = "cpu",
    model: Annotated[
        str | None,
        typer.Option(metavar="minilm|bert-base", help="Of this size only; by default both.", show_default=False),
    ] = None,
    mergekit_python: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="merge: the Python of an environment with mergekit.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what hf_cl costs, beside its rivals, with the machine recorded. Earlier rows of others are kept."""
    from hf_cl.bench._gather import bench as run_bench
    from hf_cl.bench._gather import require_done
    from hf_cl.bench._row import Settings
    from hf_cl.cli.quiet import libraries

    progress = show.console(err=True)

    def tell(text: str) -> None:
        for line in text.splitlines():
            progress.print(show.plain(line), soft_wrap=True)

    with libraries():
        content, failed = run_bench(names or (), Settings(quick, device, model, mergekit_python), out, tell)
    if as_json:
        show.echo_json(content)
    elif content["rows"]:
        judged = [row["met"] for row in content["rows"] if row["met"] is not None]
        console = show.console()
        said = f"{len(content['rows'])} rows, {sum(judged)} of {len(judged)} marks met"
        console.print(show.plain(f"{'rows':<9} {out / 'benchmarks.json'}: {said}"), soft_wrap=True)
        console.print(show.plain(f"{'page':<9} {out / 'index.html'}"), soft_wrap=True)
    require_done(failed)
