"""`hf-cl report`: runs beside each other on one page, with pictures."""

from pathlib import Path
from typing import Annotated

import typer

from hf_cl.cli import show
from hf_cl.cli.arguments import Json


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run folders, results.json files, or folders that hold such.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Compare runs on one page: accuracy, forgetting, bytes, capacity and time, with their settings."""
    from hf_cl.report import write_report

    groups = write_report(runs, out)
    content = {
        "report": str(out),
        "pictures": str(out.with_name(f"{out.stem}_pictures")),
        "groups": [
            {"stream": group.stream, "differs": group.differs, "series": {s.label: len(s.runs) for s in group.series}}
            for group in groups
        ],
    }
    if as_json:
        show.echo_json(content)
        return
    console = show.console()
    for group in groups:
        apart = f", with {group.differs}" if group.differs else ""
        counts = ", ".join(f"{series.label} ({len(series.runs)})" for series in group.series)
        console.print(show.plain(f"{group.stream}{apart}: {counts}"), soft_wrap=True)
    console.print(show.plain(f"{'report':<9} {out}"), soft_wrap=True)
    console.print(show.plain(f"{'pictures':<9} {content['pictures']}"), soft_wrap=True)
