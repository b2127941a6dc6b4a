"""What holds for the house as a whole: the front door, the floors, plug-ins, options, errors."""

import ast
import dataclasses
import importlib
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_cl
from hf_cl import errors
from hf_cl.config import did_you_mean, option, read
from hf_cl.errors import ConfigError
from hf_cl.plugins import available, load

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_cl"
CHECK = ROOT / "scripts" / "check_floors.py"
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "evaluate", "numpy", "pandas", "sklearn")

# --- the front door -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["hf_cl", "hf_cl.errors", "hf_cl.config", "hf_cl.plugins"])
def test_importing_the_package_brings_nothing_heavy(module):
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves_to_what_its_home_holds():
    for name, home in hf_cl._HOME.items():
        assert getattr(hf_cl, name) is getattr(importlib.import_module(home), name)


def test_public_names_are_the_ones_that_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)
    assert seen == hf_cl._HOME


def test_all_and_dir_name_the_same():
    assert hf_cl.__all__ == sorted(hf_cl._HOME)
    assert sorted(dir(hf_cl)) == sorted([*hf_cl.__all__, "__version__"])


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_cl' has no attribute 'MaskBanks'"):
        hf_cl.MaskBanks  # noqa: B018


# --- errors -------------------------------------------------------------------------------------


def test_every_error_stands_in_the_tree_and_below_one_base():
    made = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, errors.HfClError) for kind in made)
    assert all(kind.__name__ in errors.__doc__ for kind in made)
    assert [kind.__name__ for kind in made if issubclass(kind, ValueError)] == [
        "ConfigError", "DataError", "BaseModelError", "MergeError", "BaseMismatchError"
    ]  # fmt: skip


# --- floors -------------------------------------------------------------------------------------


def check(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run the check of floors on a tree that holds scripts/ and hf_cl/."""
    return subprocess.run([sys.executable, tree / "scripts" / CHECK.name], capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the floors: the check and the package's own files."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(CHECK, tmp_path / "scripts")
    shutil.copytree(PACKAGE, tmp_path / "hf_cl", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_imports_point_down():
    done = check(ROOT)
    assert (done.stdout, done.returncode) == ("imports point down\n", 0)


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from hf_cl.training.groups import schedule", "hf_cl.training.groups"),
        ("import hf_cl.training.groups", "hf_cl.training.groups"),
        ("from hf_cl import training", "hf_cl.training"),
        ("from hf_cl.ownership.owner import FREE", "hf_cl.ownership.owner"),  # a neighbour on the same floor
        ("def f():\n    from hf_cl.tuner import MaskConfig", "hf_cl.tuner"),
        ("from hf_cl import MaskConfig", "hf_cl.tuner"),  # the lazy name brings its home
    ],
)
def test_an_import_that_points_up_is_named_with_its_line(tree, line, module):
    file = tree / "hf_cl" / "masks" / "overlap.py"
    lines = file.read_text("utf-8").count("\n")
    file.write_text(file.read_text("utf-8") + line + "\n", "utf-8")
    done = check(tree)
    assert done.returncode == 1, f"{line!r} went unseen"
    assert f"hf_cl/masks/overlap.py:{lines + 1 + line.count(chr(10))}: imports {module}" in done.stdout


def test_relative_imports_to_a_parent_are_banned_since_the_floors_do_not_read_them():
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    assert '"TID252"' in pyproject


def test_a_file_on_no_floor_is_named(tree):
    (tree / "hf_cl" / "utils.py").write_text("", "utf-8")
    done = check(tree)
    assert done.returncode == 1 and "'utils' stands on no floor" in done.stdout


def test_a_name_stands_on_one_floor():
    names = [name for floor in runpy.run_path(str(CHECK))["FLOORS"] for name in floor]
    assert len(names) == len(set(names))


# --- plug-ins -----------------------------------------------------------------------------------


def test_plugins_are_the_files_of_their_folder():
    files = sorted(file.stem for file in (PACKAGE / "methods").glob("*.py") if file.stem != "__init__")
    assert list(available("methods")) == files and "exssnet" in files
    assert available("no_such_folder") == ()


@pytest.mark.parametrize("name", available("methods"))
def test_a_plugin_is_loaded_by_its_files_name(name):
    module = load("methods", name)
    assert module.__name__ == f"hf_cl.methods.{name}" and Path(module.__file__) == PACKAGE / "methods" / f"{name}.py"


def test_a_misspelt_plugin_proposes_the_nearest():
    with pytest.raises(ConfigError, match=r"^methods: there is no 'exsnet'\. Did you mean 'exssnet'\?$"):
        load("methods", "exsnet")
    with pytest.raises(ConfigError, match=r"there is no 'zzz'\. Known: .*exssnet.*supsup"):
        load("methods", "zzz")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../config", "exssnet.py", "methods/exssnet", "/etc/passwd", "os", "exssnet:Method", "__init__",
     "_private", "hf_cl.methods.exssnet", "exssnet\x00", "EXSSNET", None, 3],
)  # fmt: skip
def test_what_is_no_files_name_is_refused(name):
    with pytest.raises(ConfigError, match=r"^methods: there is no "):
        load("methods", name)


# --- options ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """One option of each kind."""

    name: str = option(help="What to call it.")
    rate: float = option(0.1, help="How fast.")
    count: int = option(3, help="How many.")
    loud: bool = option(False, help="Whether to speak.")
    kind: str = option("a", help="Which.", choices=("alpha", "beta", "a"))
    limit: float | None = option(None, help="How far.")
    layers: tuple[str, ...] = option((), help="Which layers.")
    extra: dict[str, Any] = option({}, help="Anything.")
    derived: int = dataclasses.field(default=0, init=False)


def read_options(**values: Any) -> Options:
    return read(Options, {"name": "x", **values}, "recipe.method")


def test_options_are_read_and_the_rest_are_defaults():
    found = read(Options, {"name": "x", "rate": 0.5, "layers": ["q", "k"], "limit": None, "extra": {"a": 1}}, "r")
    assert found == Options(name="x", rate=0.5, layers=("q", "k"), extra={"a": 1})


def test_a_mutable_default_is_never_shared():
    one, other = read_options(), read_options()
    one.extra["a"] = 1
    assert other.extra == {}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("ratte", "recipe.method: unknown key 'ratte'. Did you mean 'rate'?"),
        ("Rate", "recipe.method: unknown key 'Rate'. Did you mean 'rate'?"),
        ("zzz", "recipe.method: unknown key 'zzz'. Known: count, extra, kind, layers, limit, loud, name, rate."),
        ("derived", "recipe.method: unknown key 'derived'."),
        (7, "recipe.method: unknown key 7."),
        (None, "recipe.method: unknown key None."),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_proposed(key, message):
    with pytest.raises(ConfigError) as error:
        read(Options, {"name": "x", key: 1}, "recipe.method")
    assert str(error.value).startswith(message)


def test_a_missing_key_is_refused_with_its_help():
    with pytest.raises(ConfigError, match=r"^recipe\.method: key 'name' is missing\. What to call it\.$"):
        read(Options, {"rate": 1.0}, "recipe.method")


@pytest.mark.parametrize("values", [None, [], "name", 3, ["name"]])
def test_what_is_no_mapping_is_refused(values):
    with pytest.raises(ConfigError, match=r"^recipe\.method: expected a mapping of options, found"):
        read(Options, values, "recipe.method")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": 3}, "recipe.method.name: expected str, found 3 (int)."),
        ({"name": None}, "recipe.method.name: expected str, found None (NoneType)."),
        ({"rate": "fast"}, "recipe.method.rate: expected float, found 'fast' (str)."),
        ({"rate": True}, "recipe.method.rate: expected float, found True (bool)."),
        ({"rate": None}, "recipe.method.rate: expected float, found None (NoneType)."),
        ({"rate": [0.1]}, "recipe.method.rate: expected float, found [0.1] (list)."),
        ({"count": True}, "recipe.method.count: expected int, found True (bool)."),
        ({"count": 3.0}, "recipe.method.count: expected int, found 3.0 (float)."),
        ({"count": "3"}, "recipe.method.count: expected int, found '3' (str)."),
        ({"loud": 1}, "recipe.method.loud: expected bool, found 1 (int)."),
        ({"loud": "yes"}, "recipe.method.loud: expected bool, found 'yes' (str)."),
        ({"limit": "none"}, "recipe.method.limit: expected float or NoneType, found 'none' (str)."),
        ({"layers": "query"}, "recipe.method.layers: expected tuple, found 'query' (str)."),
        ({"extra": [1]}, "recipe.method.extra: expected dict, found [1] (list)."),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_place(values, message):
    with pytest.raises(ConfigError) as error:
        read_options(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(("written", "number"), [("1e-3", 1e-3), (1, 1.0), (0, 0.0), ("2.5", 2.5), (1e-3, 1e-3)])
@pytest.mark.parametrize("field", ["rate", "limit"])
def test_a_number_is_read_however_yaml_writes_it(field, written, number):
    value = getattr(read_options(**{field: written}), field)
    assert type(value) is float and value == number


def test_a_value_that_is_no_choice_is_refused_and_the_nearest_proposed():
    with pytest.raises(ConfigError) as error:
        read_options(kind="alhpa")
    assert str(error.value) == "recipe.method.kind: 'alhpa' is not one of alpha, beta, a. Did you mean 'alpha'?"
    assert read_options(kind="beta").kind == "beta"


def test_the_nearest_name_or_all_known_ones():
    assert did_you_mean("densty", ["density", "scale"]) == " Did you mean 'density'?"
    assert did_you_mean("zzz", ["scale", "density"]) == " Known: density, scale."
    assert did_you_mean("zzz", []) == " Known: none."
