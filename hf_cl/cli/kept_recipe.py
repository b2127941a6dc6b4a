"""`RUN/recipe.yaml`: the recipe a run was started with, resolved, so that `eval` finds the rows again.

Overrides are applied, every option of the method is written out, and a stream is a list of tasks with
absolute local paths. So it runs as it stands, from any folder. It is written once, with the first change
of the run's manifest, and never over another run's.
"""

from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from hf_cl.data import TaskSpec
    from hf_cl.recipe import Checked

NAME = "recipe.yaml"


class KeptRecipe:
    """Writes a run's recipe as soon as the run is there, and leaves what was there before."""

    def __init__(self, recipe: "Checked", run: Path) -> None:
        """Remember how the folder looks before the run."""
        self.recipe, self.run = recipe, run
        self._before = self._manifest()

    def keep(self) -> None:
        """Write the recipe, if the manifest is this run's and no recipe stands beside it."""
        from hf_cl.storage.run_folder import write_atomic

        file = self.run / NAME
        if self._manifest() != self._before and not file.exists():
            write_atomic(file, as_yaml(self.recipe).encode())

    def _manifest(self) -> tuple[int, int] | None:
        from hf_cl.storage.run_folder import MANIFEST

        file = self.run / MANIFEST
        if not file.is_file():
            return None
        found = file.stat()
        return found.st_ino, found.st_mtime_ns


def as_yaml(recipe: "Checked") -> str:
    """Return a checked recipe as YAML that stands for itself."""
    from hf_cl.data import read_stream
    from hf_cl.recipe import data_dir

    specs = read_stream(recipe.stream, data_dir=data_dir(), root=recipe.root)
    values = {
        "model": asdict(recipe.model),
        "stream": {"tasks": [_task(spec) for spec in specs]},
        "method": {"name": recipe.method, **_plain(asdict(recipe.options))},
        "training": {**_plain(recipe.training), "max_length": recipe.max_length},
    }
    if recipe.tuning:
        values["tuning"] = _plain(recipe.tuning)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def _task(spec: "TaskSpec") -> dict[str, Any]:
    """Return what of a task differs from the defaults."""
    given = {field.name: getattr(spec, field.name) for field in fields(spec)}
    defaults = {field.name: field.default for field in fields(spec) if field.default is not MISSING}
    return {name: _plain(value) for name, value in given.items() if name not in defaults or value != defaults[name]}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
