"""The application: its verbs, its version, and how an error looks."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import hf_cl
from hf_cl.cli import show
from hf_cl.cli.bench import bench
from hf_cl.cli.drop import drop
from hf_cl.cli.eval import evaluate
from hf_cl.cli.export import export
from hf_cl.cli.inspect import inspect
from hf_cl.cli.merge import merge
from hf_cl.cli.methods import methods
from hf_cl.cli.plan import plan
from hf_cl.cli.predict import predict
from hf_cl.cli.pull import pull
from hf_cl.cli.push import push
from hf_cl.cli.report import report
from hf_cl.cli.sweep import sweep
from hf_cl.cli.train import train
from hf_cl.cli.verify import verify
from hf_cl.errors import HfClError, StoppedError

BAD_INPUT, INTERRUPTED = 2, 130
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: what was asked to stop is saved, and the same command with --resume goes on."""


class Verbs(TyperGroup):
    """The verbs. An error that this package raises on purpose becomes one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen verb."""
        try:
            return super().invoke(ctx)
        except StoppedError as error:
            _fail(str(error), STOPPED)
        except HfClError as error:
            _fail(str(error), BAD_INPUT)
        except OSError as error:
            # A file of the user's; anything else is a bug, and keeps its traceback.
            if error.filename is None or error.strerror is None:
                raise
            _fail(f"{error.filename}: {error.strerror}.", BAD_INPUT)
        except KeyboardInterrupt:
            _fail("stopped by Ctrl-C.", INTERRUPTED)


def _fail(message: str, code: int) -> None:
    kind = "stopped" if code == STOPPED else "error"
    typer.echo(f"hf-cl: {kind}: {show.plain(' '.join(message.split()))}", err=True)
    raise typer.Exit(code) from None


app = typer.Typer(
    name="hf-cl",
    cls=Verbs,
    help="Continual learning for Hugging Face text classifiers, with a proof that nothing was forgotten.",
    epilog="Begin with: hf-cl train quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train)
app.command("sweep")(sweep)
app.command("report")(report)
app.command("eval")(evaluate)
app.command("inspect")(inspect)
app.command("verify")(verify)
app.command("predict")(predict)
app.command("export")(export)
app.command("drop")(drop)
app.command("push")(push)
app.command("pull")(pull)
app.command("merge")(merge)
app.command("plan")(plan)
app.command("methods")(methods)
app.command("bench")(bench)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-cl {hf_cl.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Carry the options that belong to no verb."""


def main() -> None:
    """Run the command line; the entry point of `hf-cl`."""
    try:
        app(prog_name="hf-cl")
    except SystemExit as ended:
        if "torch" in sys.modules:
            from hf_cl import ranks

            ranks.leave(int(ended.code or 0))
        raise
