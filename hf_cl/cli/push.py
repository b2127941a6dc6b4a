"""`hf-cl push`: a bank to the Hub, as one commit."""

from typing import Annotated

import typer

from hf_cl.cli import show
from hf_cl.cli.arguments import BankFolder, Json, Token
from hf_cl.cli.banks import bank_folder, open_bank, require_token


def push(
    bank: BankFolder,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="On the Hub: owner/name.", show_default=False)],
    token: Token = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a repository that is made now.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch; by default main.", show_default=False)
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")] = False,
    commit_message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Of the commit.", show_default=False)
    ] = None,
    base_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The base's Hub id, where the bank does not know it.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Push a bank to the Hub. Either the whole bank is there afterwards, or what was there before."""
    require_token(token)
    opened = open_bank(str(bank_folder(bank)))
    from hf_cl.cli.quiet import libraries

    with libraries():
        done = opened.push_to_hub(
            repo_id,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            base_id=base_id,
        )
    content = {"repo_id": repo_id, "commit": done.oid, "url": done.commit_url, "pull_request": done.pr_url}
    content["digest"] = opened.digest
    if as_json:
        show.echo_json(content)
        return
    out = show.console()
    out.print(show.plain(done.pr_url or done.commit_url), soft_wrap=True)
    out.print(f"digest {opened.digest}", soft_wrap=True)
    out.print(
        show.plain(f"Next: hf-cl pull {repo_id} DIR --revision {done.oid} --expected-digest {opened.digest}"),
        soft_wrap=True,
    )
