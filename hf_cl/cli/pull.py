"""`hf-cl pull`: a bank from the Hub into a folder, every file checked against its manifest."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hf_cl.cli import show
from hf_cl.cli.arguments import Json, Revision, Token
from hf_cl.cli.banks import HUB_ID, on_hub, require_token
from hf_cl.errors import ConfigError


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="On the Hub: owner/name.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New, empty, or of that bank.", show_default=False)],
    revision: Revision = None,
    token: Token = None,
    expected_digest: Annotated[
        str | None,
        typer.Option(metavar="SHA256", help="Refuse any other bank than the one of this digest.", show_default=False),
    ] = None,
    force_download: Annotated[bool, typer.Option("--force-download", help="Do not use the cache.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch a bank from the Hub into a folder. A digest pins its content, whoever serves it."""
    require_token(token)
    if HUB_ID.fullmatch(repo_id) is None:
        raise ConfigError(f"{repo_id!r}: is no Hub id. Give owner/name.")
    if not on_hub(repo_id):
        raise ConfigError(f"{repo_id}: a folder of that name is here, so it would not come from the Hub. Copy it.")
    from hf_cl import MaskBank
    from hf_cl.cli.quiet import libraries

    with libraries():
        fetched = MaskBank.from_pretrained(
            repo_id, revision=revision, token=token, expected_digest=expected_digest, force_download=force_download
        )
        fetched.save_pretrained(folder)
    content = {"repo_id": repo_id, "folder": str(folder), "tasks": fetched.tasks, "digest": fetched.digest}
    if as_json:
        show.echo_json(content)
        return
    out = show.console()
    out.print(show.plain(f"{folder}: {', '.join(fetched.tasks)}"), soft_wrap=True)
    out.print(f"digest {fetched.digest}", soft_wrap=True)
    out.print(f"Next: hf-cl verify {shlex.quote(str(folder))}", soft_wrap=True)
