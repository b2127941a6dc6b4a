"""`hf-cl predict`: texts in, one JSON object a text out."""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_cl.cli.arguments import Bank, Base, Revision
from hf_cl.cli.banks import base_of, open_bank, require_task
from hf_cl.errors import ConfigError

if TYPE_CHECKING:
    from hf_cl import MaskBank
    from hf_cl.routed_pipeline import RoutedPipeline
    from hf_cl.task_pipeline import TaskPipeline

UNKNOWN, USUAL = 1_000_000, 512
"""A tokenizer that does not know its model's longest text gives a number beyond the first; then this many tokens."""


def predict(
    bank: Bank,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT",
            help="Texts; without any, the lines of standard input. Put -- before one that begins with -.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK", help="The task that answers; by default each text is routed to one, if there are several."
        ),
    ] = None,
    router: Annotated[
        str | None, typer.Option(metavar="ROUTER", help="How a text's task is found; nearest_mean by default.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Confidence from 0 to 1 below which a text belongs to none of the tasks."),
    ] = None,
    base: Base = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Also list so many labels, the best first.")] = 1,
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Texts a forward. With 1 an answer does not depend on the texts beside it."),
    ] = 1,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens a text is cut to; by default what its tokenizer says the base takes."),
    ] = None,
    revision: Revision = None,
) -> None:
    """Answer texts with a bank: one line of JSON a text, in the order of the texts. Without a task, each is routed."""
    opened = open_bank(bank, revision)
    name = _task(opened, task, routed=router is not None or threshold is not None)
    from hf_cl.bank import ROUTER
    from hf_cl.cli.quiet import libraries

    out = sys.stdout
    with libraries():
        loaded = base_of(opened, base)
        model = opened.attach(loaded.model, None if name is None else [name])
        way: dict[str, Any] = {} if name is not None else {"router": router or ROUTER, "threshold": threshold}
        pipeline = opened.pipeline(name, model, loaded.tokenizer, **way)
        length = max_length or longest(loaded.tokenizer)
        for batch in _batches(_checked(texts or _lines()), batch_size):
            for text, answers in zip(batch, _answers(pipeline, batch, top_k, length), strict=True):
                typer.echo(json.dumps(_line(text, name, answers, top_k)), file=out)
            out.flush()


def _task(bank: "MaskBank", named: str | None, *, routed: bool) -> str | None:
    """Return the task that answers, None where each text is routed."""
    if named is None:
        return bank.tasks[0] if len(bank.tasks) == 1 and not routed else None
    require_task(bank, named)
    if routed:
        raise ConfigError("--task: names the task, so nothing is routed. Leave it out, or --router and --threshold.")
    return named


def _lines() -> Iterator[str]:
    if sys.stdin.isatty():
        typer.echo("One text a line; end with Ctrl-D.", err=True)
    try:
        lines = typer.get_text_stream("stdin", encoding="utf-8", errors="strict")
        yield from (line.removesuffix("\n") for line in lines)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input: is not UTF-8 ({error.reason}). Convert it, as with iconv -t utf-8."
        ) from None


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts, 1):
        # What the shell hands over may be no text at all; a tokenizer would fail without saying where.
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            raise ConfigError(f"text {number}: holds bytes that are no UTF-8. Convert it, as with iconv -t utf-8.")
        yield text


def _batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, size)):
        yield batch


def longest(tokenizer: Any) -> int:
    """Return how many tokens a text is cut to where nobody says."""
    length = int(tokenizer.model_max_length)
    return length if length < UNKNOWN else USUAL


def _answers(pipeline: "TaskPipeline | RoutedPipeline", batch: list[str], top_k: int, length: int) -> Any:
    return pipeline(batch, top_k=top_k, batch_size=len(batch), truncation=True, max_length=length)


def _line(text: str, task: str | None, answers: list[Mapping[str, Any]], top_k: int) -> dict[str, Any]:
    """Return what one line says; of a routed text also how sure the router is."""
    best = {"text": text, "task": task, **answers[0]}
    top = [{"label": answer["label"], "score": answer["score"]} for answer in answers]
    return best | ({"top": top} if top_k > 1 else {})
