"""Recipes: a YAML file that says model, stream, method and training, and nothing that is not read.

    model: sentence-transformers/all-MiniLM-L6-v2
    stream: clinc10
    method: {name: exssnet, density: 0.01}
    training: {num_train_epochs: 3, per_device_train_batch_size: 32, max_length: 32}
    tuning: {method.scale: [1.0, 1.5, 3.0]}          # optional

Dotted keys override (`training.learning_rate=1e-3`), `stream=NAME` replaces the stream, `method=NAME` the
whole method block by that method's defaults, and its grid by none.
"""

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_cl import plugins
from hf_cl.config import did_you_mean, option, read, read_option
from hf_cl.errors import ConfigError

SHIPPED = (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes")
"""Where recipes lie: in a wheel, and in a checkout."""
EVALUATE = ("all", "changed")
"""Which earlier tasks are measured anew after each task: all, or those of which a digest has changed."""
POSITIVE = ("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole run. Blocks are kept as plain values; `check` reads them strictly."""

    model: str | dict[str, Any] = option(help="Hub id or folder; or a mapping with `name`, `dtype`, `head`.")
    stream: str | dict[str, Any] | list[Any] = option(help="Name in $HF_CL_DATA/streams.json, or tasks.")
    method: str | dict[str, Any] = option(help="A method's name, or a mapping with `name` and its options.")
    training: dict[str, Any] = option({}, help="Arguments of transformers' TrainingArguments, and `max_length`.")
    tuning: dict[str, Any] | None = option(None, help="Dotted keys and the values to try, one key after another.")
    evaluate: str = option(
        "all",
        help="Earlier tasks measured anew after each task: all, or those of which a digest has changed.",
        choices=EVALUATE,
    )
    check_steps: int = option(100, help="Optimizer steps between two comparisons of what the ranks hold.", least=1)
    routing: int = option(
        1024, help="Training texts of a task that what routers know of it is made from; 0 collects nothing.", least=0
    )


@dataclasses.dataclass(frozen=True)
class ModelBlock:
    """The `model` block."""

    name: str = option(help="Hub id or folder.")
    dtype: str = option("float32", help="Precision of the base.", choices=("float32", "bfloat16"))
    head: tuple[str, ...] | None = option(None, help="Layers that are each task's own, the classifier last.")


@dataclasses.dataclass(frozen=True)
class Checked:
    """A recipe whose every key was read.

    Attributes:
        model: The base to load.
        stream: The stream's value as it stands in the recipe.
        root: Folder that relative paths in the stream start from.
        method: The method's name.
        options: An instance of the method's `Options`.
        training: Arguments for TrainingArguments.
        max_length: Tokens a text is cut to.
        tuning: Dotted keys and values to try.
        evaluate: Which earlier tasks are measured anew after each task.
        check_steps: Optimizer steps between two comparisons of what the ranks hold.
        routing: Training texts of a task that what routers know of it is made from.
    """

    model: ModelBlock
    stream: Any
    root: Path
    method: str
    options: Any
    training: dict[str, Any]
    max_length: int
    tuning: dict[str, list[Any]]
    evaluate: str
    check_steps: int
    routing: int


def find(recipe: str) -> Path:
    """Return the file of a recipe: a path, or the name of one that ships with the package.

    Raises:
        ConfigError: There is none; proposes the nearest shipped name.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = {file.stem: file for folder in reversed(SHIPPED) for file in folder.glob("*.yaml")}
    if recipe in shipped:
        return shipped[recipe]
    raise ConfigError(f"recipe {recipe!r}: no such file, and no such shipped recipe.{did_you_mean(recipe, shipped)}")


def load(recipe: str, overrides: Sequence[str] = ()) -> Checked:
    """Read a recipe file, apply overrides, and check every key.

    Args:
        recipe: A path or a shipped recipe's name.
        overrides: `key=value` with a dotted key; the value is read as YAML.

    Raises:
        ConfigError: Unreadable file, unknown key, bad value.
    """
    path = find(recipe)
    values = read_file(path)
    for text in overrides:
        key, found, value = text.partition("=")
        if not found:
            raise ConfigError(f"override {text!r}: expected key=value, as in training.learning_rate=1e-3.")
        try:
            read_value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {text!r}: {value!r} is no YAML value ({error}).") from error
        values = override(values, key, read_value)
    return check(values, path.parent)


def read_file(path: Path) -> dict[str, Any]:
    """Return a recipe file's plain values; `check` reads them strictly.

    Raises:
        ConfigError: It is no YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no YAML ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping with model, stream, method and training.")
    return values


def override(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return recipe values with one dotted key replaced.

    Raises:
        ConfigError: The key's block is no mapping.
    """
    head, dot, rest = key.partition(".")
    block = values.get(head)
    if not dot:
        return {**_without_grid(values, head), head: value}
    if head == "tuning":
        return {**values, head: {**(block or {}), rest: value}}
    if head in ("method", "model", "stream") and isinstance(block, str):
        block = {"name": block}
    if block is None:
        block = {}
    if not isinstance(block, Mapping):
        raise ConfigError(f"override {key!r}: `{head}` is {type(block).__name__}, it has no keys.")
    return {**values, head: override(block, rest, value)}


def _without_grid(values: Mapping[str, Any], block: str) -> dict[str, Any]:
    """Return recipe values without the grid of a block that is about to be replaced: its keys mean nothing then."""
    grid = values.get("tuning")
    if block != "method" or not isinstance(grid, Mapping):
        return dict(values)
    return {**values, "tuning": {key: tried for key, tried in grid.items() if not str(key).startswith("method.")}}


def check(values: Mapping[str, Any], root: Path) -> Checked:
    """Read recipe values strictly.

    Args:
        values: The recipe as plain values.
        root: Folder of the recipe.

    Raises:
        ConfigError: An unknown key or a bad value, with what was meant.
    """
    recipe = read(Recipe, values, "recipe")
    model = {"name": recipe.model} if isinstance(recipe.model, str) else recipe.model
    method = {"name": recipe.method} if isinstance(recipe.method, str) else dict(recipe.method)
    name = str(method.pop("name", ""))
    if not name:
        raise ConfigError(f"recipe.method: key 'name' is missing.{did_you_mean('', plugins.available('methods'))}")
    module = plugins.load("methods", name)
    training = dict(recipe.training)
    max_length = training.pop("max_length", 128)
    if not isinstance(max_length, int) or max_length < 1:
        raise ConfigError(f"recipe.training.max_length: expected a number of tokens, found {max_length!r}.")
    return Checked(
        model=read(ModelBlock, model, "recipe.model"),
        stream=recipe.stream,
        root=root,
        method=name,
        options=read(module.Options, method, f"recipe.method ({name})"),
        training=_check_training(training),
        max_length=max_length,
        tuning=_check_tuning(recipe.tuning or {}, module.Options),
        evaluate=recipe.evaluate,
        check_steps=recipe.check_steps,
        routing=recipe.routing,
    )


def _check_training(training: dict[str, Any]) -> dict[str, Any]:
    """Read the training block by the types of TrainingArguments' own fields, before a base is loaded."""
    from transformers import TrainingArguments

    where = "recipe.training"
    known = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    hints = typing.get_type_hints(TrainingArguments)
    for key, value in training.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}.{did_you_mean(key, [*known, 'max_length'])}")
        if key == "output_dir":
            raise ConfigError(f"{where}.output_dir: a run's files lie in its own folder. Use --output-dir.")
        training[key] = read_option(value, hints[key], known[key], f"{where}.{key}")
        if key in POSITIVE and training[key] is not None and not training[key] > 0:
            raise ConfigError(f"{where}.{key}: expected a number above 0, found {value!r}.")
    return training


def _check_tuning(tuning: Mapping[str, Any], options: type) -> dict[str, list[Any]]:
    """Read every value of the grid as its option would be read, before the first trial."""
    grid: dict[str, list[Any]] = {}
    for key, values in tuning.items():
        block, _, name = key.partition(".")
        where = f"recipe.tuning.{key}"
        if block not in ("method", "training") or not name or not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: expected method.<option> or training.<option> and a list of values.")
        if key == "training.max_length":
            raise ConfigError(
                f"{where}: the length decides what is measured, so it is no option to choose. Set it once."
            )
        if block == "training":
            grid[key] = [_check_training({name: value})[name] for value in values]
        else:
            grid[key] = [getattr(read(options, {name: value}, where), name) for value in values]
    return grid


def data_dir() -> Path | None:
    """Return $HF_CL_DATA as a path, or None."""
    value = os.environ.get("HF_CL_DATA")
    return Path(value) if value else None
