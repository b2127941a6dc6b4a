"""A plug-in's name is its file's name: adding a method is adding one file.

Only files in the package's own folders are importable by name, so a name that comes from a recipe
or a run folder can never import anything else.
"""

import importlib
from pathlib import Path
from types import ModuleType

from hf_cl.config import did_you_mean
from hf_cl.errors import ConfigError

ROOT = Path(__file__).parent


def available(folder: str) -> tuple[str, ...]:
    """Return the names of the plug-ins in `hf_cl/<folder>`, sorted."""
    files = (ROOT / folder).glob("*.py")
    return tuple(sorted(file.stem for file in files if not file.stem.startswith("_")))


def load(folder: str, name: str) -> ModuleType:
    """Import the plug-in `hf_cl/<folder>/<name>.py`.

    Raises:
        ConfigError: No such file; the message proposes the nearest name.
    """
    known = available(folder)
    if name not in known:
        raise ConfigError(f"{folder}: there is no {name!r}.{did_you_mean(str(name), known)}")
    return importlib.import_module(f"hf_cl.{folder}.{name}")
