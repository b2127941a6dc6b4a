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
        str | None, typer.Option(metavar="TASK", help="The task that answers; a bank's only one by default.")
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
    """Answer texts with a task of a bank: one line of JSON a text, in the order of the texts."""
    opened = open_bank(bank, revision)
    name = _task(opened, task)
    from hf_cl.cli.quiet import libraries

    out = sys.stdout
    with libraries():
        loaded = base_of(opened, base)
        pipeline = opened.pipeline(name, opened.attach(loaded.model, [name]), loaded.tokenizer)
        length = max_length or _longest(loaded.tokenizer)
        for batch in _batches(_checked(texts or _lines()), batch_size):
            for text, answers in zip(batch, _answers(pipeline, batch, top_k, length), strict=True):
                typer.echo(json.dumps(_line(text, name, answers, top_k)), file=out)
            out.flush()


def _task(bank: "MaskBank", named: str | None) -> str:
    if named is None:
        if len(bank.tasks) != 1:
            raise ConfigError(f"--task: name the task that answers: {', '.join(bank.tasks)}.")
        return bank.tasks[0]
    require_task(bank, named)
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


def _longest(tokenizer: Any) -> int:
    length = int(tokenizer.model_max_length)
    return length if length < UNKNOWN else USUAL


def _answers(pipeline: "TaskPipeline", batch: list[str], top_k: int, length: int) -> Any:
    return pipeline(batch, top_k=top_k, batch_size=len(batch), truncation=True, max_length=length)


def _line(text: str, task: str, answers: list[Mapping[str, Any]], top_k: int) -> dict[str, Any]:
    best = {"text": text, "task": task, "label": answers[0]["label"], "score": answers[0]["score"]}
    return best | ({"top": [dict(answer) for answer in answers]} if top_k > 1 else {})
