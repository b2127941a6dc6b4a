"""Arguments that more than one verb takes, with one description each."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hf_cl.layers.base import Base

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `hf-cl train` wrote.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value to stdout, and nothing else.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_FOLDER", help="Where the run's base lies now, if not where the run says.", show_default=False
    ),
]


def base_at(run: Path, model: str | None) -> "Base | None":
    """Load the base a run was learned on from another place; None where the run's own place is meant."""
    if model is None:
        return None
    from hf_cl.layers.base import load_base
    from hf_cl.storage.run_folder import RunFolder

    manifest = RunFolder.open(run).manifest
    head = (manifest.get("settled") or {}).get("head_modules")
    return load_base(model, dtype=manifest.get("dtype", "float32"), head=head)
