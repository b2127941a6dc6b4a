"""`hf-cl methods`: the ways to learn, and the options of one; read from the files that implement them."""

import ast
import dataclasses
import typing
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_cl import plugins
from hf_cl.cli import show
from hf_cl.cli.arguments import Json

FOLDER = "methods"


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="List this method's options.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or the options of one."""
    if name is None:
        found = [{"name": method, "summary": _summary(method)} for method in plugins.available(FOLDER)]
        if as_json:
            show.echo_json(found)
        else:
            _show_all(show.console(), found)
        return
    content = describe(name)
    if as_json:
        show.echo_json(content)
    else:
        _show_one(show.console(), content)


def describe(name: str) -> dict[str, Any]:
    """Return a method's summary and options, as plain values.

    Raises:
        ConfigError: There is no such method.
    """
    cls = plugins.load(FOLDER, name).Options
    hints = typing.get_type_hints(cls)
    options = [
        {
            "name": field.name,
            "type": _type(hints[field.name]),
            "default": _default(field),
            "choices": list(field.metadata.get("choices", ())),
            "help": field.metadata.get("help", ""),
        }
        for field in dataclasses.fields(cls)
        if field.init
    ]
    return {"name": name, "summary": _summary(name), "options": options}


def _summary(name: str) -> str:
    """Return the first line of a method's docstring, without importing it: a list must not wait for torch."""
    source = (plugins.ROOT / FOLDER / f"{name}.py").read_text("utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _type(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _show_all(out: Console, found: list[dict[str, str]]) -> None:
    width = max(len(method["name"]) for method in found)
    for method in found:
        out.print(f"{method['name']:<{width}}  {method['summary']}", soft_wrap=True)
    out.print("Next: hf-cl methods NAME   lists a method's options", soft_wrap=True)


def _show_one(out: Console, content: dict[str, Any]) -> None:
    out.print(content["summary"], soft_wrap=True)
    rows = []
    for option in content["options"]:
        choices = " | ".join(map(str, option["choices"]))
        rows.append([option["name"], choices or option["type"], option["default"], option["help"]])
    table = show.table("Options", ["option", "type or choices", "default", "meaning"], rows)
    for column in table.columns:
        column.justify = "left"
    out.print(table)
    out.print(f"Use one as: hf-cl train RECIPE method={content['name']} method.OPTION=VALUE", soft_wrap=True)
