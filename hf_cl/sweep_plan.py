"""What a sweep will run: every combination of the values, each checked before the first one trains.

A run is known by the digest of its settings, the split and the seed among them; the slug beside it is for people.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from hf_cl import recipe as recipes
from hf_cl.data import read_stream
from hf_cl.errors import ConfigError
from hf_cl.from_recipe import training_arguments
from hf_cl.layers.base import lasting

SEED = "training.seed"
UNSAID = 42
"""The seed of a recipe that names none: TrainingArguments' own."""
SLUG = 60
"""Characters of a folder's name that are for people."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        settings: The swept keys and this combination's values, as plain values.
        seed: The seed of its training.
        recipe: The recipe with all of that applied.
        digest: Of everything that decides the outcome.
    """

    settings: dict[str, Any]
    seed: int
    recipe: recipes.Checked
    digest: str

    @property
    def name(self) -> str:
        """Return a safe folder name that a person can read and the digest tells apart."""
        words = [f"{key.rpartition('.')[2]}={value}" for key, value in self.settings.items()]
        slug = re.sub(r"[^A-Za-z0-9=._-]+", "-", "_".join(words))[:SLUG].strip("-._")
        return f"{slug or 'run'}-seed{self.seed}-{self.digest}"

    @property
    def title(self) -> str:
        """Return what a person calls this run."""
        return ", ".join([*(f"{key}={value}" for key, value in self.settings.items()), f"seed {self.seed}"])


@dataclass(frozen=True)
class Plan:
    """A sweep whose every combination was checked.

    Attributes:
        recipe: The recipe's name.
        values: Dotted keys and the values to try, two or more each.
        fixed: Dotted keys with one value.
        seeds: Seeds of every combination.
        split: The rows that are measured.
        trials: All runs, combination after combination.
    """

    recipe: str
    values: dict[str, list[Any]]
    fixed: dict[str, Any]
    seeds: tuple[int, ...]
    split: str
    trials: tuple[Trial, ...]


def plan(recipe: str, texts: Sequence[str], *, seeds: Sequence[int] = (), split: str = "validation") -> Plan:
    """Read and check a whole sweep, so that a slip in its last combination shows before the first run.

    A key that replaces a block (`method`) is applied before those inside it, in whatever order they are given. A swept
    key leaves the recipe's `tuning` grid, which would choose its value again.

    Args:
        recipe: A path or a shipped recipe's name.
        texts: `key=value` or `key=v1,v2`, as in `method.density=0.01,0.02`.
        seeds: Seeds of every combination; none means the recipe's own.
        split: The rows that are measured.

    Raises:
        ConfigError: A key, a value or a combination is refused, is given twice, or there is nothing to run.
        DataError: The stream is not there.
    """
    given = _given(texts)
    if SEED in given and (seeds or len(given[SEED]) > 1):
        raise ConfigError(f"{SEED}: seeds repeat a combination, they are no setting of it. Give them as --seeds alone.")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds: {', '.join(map(str, seeds))} names a seed twice. Give each once.")
    swept = {key: values for key, values in given.items() if len(values) > 1}
    fixed = {key: values[0] for key, values in given.items() if len(values) == 1}
    trials: dict[str, Trial] = {}
    for picked in itertools.product(*swept.values()):
        combination = dict(zip(swept, picked, strict=True))
        checked = _checked(recipe, {**fixed, **combination}, combination)
        settings = {key: _plain(_as_read(checked, key, value)) for key, value in combination.items()}
        for seed in seeds or (checked.training.get("seed", UNSAID),):
            trial = _trial(checked, settings, seed, split)
            if trial.digest in trials:
                raise ConfigError(
                    f"{trial.title}: is the same run as {trials[trial.digest].title}. Give each value once."
                )
            trials[trial.digest] = trial
    found = tuple(trials.values())
    _require_streams(found)
    return Plan(
        recipe=recipes.find(recipe).stem,
        values={key: _distinct(trial.settings[key] for trial in found) for key in swept},
        fixed={key: _plain(value) for key, value in fixed.items()},
        seeds=tuple(_distinct(trial.seed for trial in found)),
        split=split,
        trials=found,
    )


def _given(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each key."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, written = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r}: expected key=value or key=v1,v2, as in method.density=0.01,0.02.")
        if key in found:
            raise ConfigError(f"{key}: is given twice. Give its values once, separated by commas.")
        try:
            values = yaml.safe_load(f"[{written}]")
        except yaml.YAMLError as error:
            raise ConfigError(f"{text!r}: {written!r} is no list of YAML values ({error}).") from error
        if not values:
            raise ConfigError(f"{text!r}: names no value. Give one or more, as in method.density=0.01,0.02.")
        found[key] = values
    return found


def _checked(recipe: str, values: Mapping[str, Any], combination: Mapping[str, Any]) -> recipes.Checked:
    """Return a recipe with dotted keys set, whole blocks first, and all read that can be without training."""
    path = recipes.find(recipe)
    plain = recipes.read_file(path)
    for key in sorted(values, key=lambda key: key.count(".")):
        plain = recipes.override(plain, key, values[key])
    if isinstance(plain.get("tuning"), dict):
        plain["tuning"] = {key: tried for key, tried in plain["tuning"].items() if key not in values}
    try:
        checked = recipes.check(plain, path.parent)
        training_arguments(checked.training, Path("trainer"))  # it writes nothing
    except ConfigError as error:
        if not combination:
            raise
        what = ", ".join(f"{key}={value}" for key, value in combination.items())
        raise ConfigError(f"combination {what}: {error}") from error
    return checked


def _as_read(checked: recipes.Checked, key: str, value: Any) -> Any:
    """Return a value as its option was read, so that 1e-3 and 0.001 are one setting."""
    block, _, name = key.partition(".")
    if block == "training":
        return checked.max_length if name == "max_length" else checked.training.get(name, value)
    return getattr(checked.options, name, value) if block == "method" and name else value


def _trial(checked: recipes.Checked, settings: dict[str, Any], seed: int, split: str) -> Trial:
    given = replace(checked, training={**checked.training, "seed": seed})
    decides = {
        "model": {**asdict(given.model), "name": lasting(given.model.name)},
        "stream": given.stream,
        "method": {"name": given.method, "options": asdict(given.options)},
        "training": given.training,
        "max_length": given.max_length,
        "tuning": given.tuning,
        "split": split,
    }
    canonical = json.dumps(decides, sort_keys=True, default=str)
    return Trial(settings, seed, given, hashlib.sha256(canonical.encode()).hexdigest()[:12])


def _require_streams(trials: Sequence[Trial]) -> None:
    for stream in _distinct(trial.recipe.stream for trial in trials):
        read_stream(stream, data_dir=recipes.data_dir(), root=trials[0].recipe.root)


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Return values once each, in their order; they may be lists or mappings."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
