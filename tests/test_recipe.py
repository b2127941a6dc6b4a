"""Recipes: every key is read, an unknown one proposes what was meant, and those that ship run as they stand."""

import dataclasses
import re

import pytest
import yaml

from hf_cl import plugins
from hf_cl import recipe as recipes
from hf_cl.errors import ConfigError
from hf_cl.recipe import SHIPPED, check, find, load, override
from hf_cl.tuning import apply

pytest_plugins = ["tiny"]

RECIPE = {
    "model": "org/model",
    "stream": [{"name": "pets", "dataset": "data/pets"}],
    "method": {"name": "exssnet", "density": 0.02},
    "training": {"num_train_epochs": 2, "learning_rate": 0.001, "max_length": 16},
}
SHIPPED_RECIPES = sorted({file for folder in SHIPPED for file in folder.glob("*.yaml")})


@pytest.fixture
def file(tmp_path):
    """Write a recipe's blocks, some replaced; return its path."""

    def write(**blocks):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, **blocks}))
        return str(path)

    return write


# --- load ----------------------------------------------------------------------------------------------------


def test_a_recipe_is_read_into_checked_options(file, tmp_path):
    checked = load(file())
    assert (checked.model.name, checked.model.dtype) == ("org/model", "float32")
    assert (checked.method, checked.options.density) == ("exssnet", 0.02)
    assert checked.training == {"num_train_epochs": 2, "learning_rate": 0.001}
    assert (checked.max_length, checked.root, checked.tuning) == (16, tmp_path, {})


def test_names_stand_for_blocks(file):
    checked = load(file(method="lora", model={"name": "org/other", "dtype": "bfloat16"}, stream="clinc10"))
    assert checked.options == plugins.load("methods", "lora").Options()
    assert (checked.model.dtype, checked.stream) == ("bfloat16", "clinc10")


def test_reading_a_recipe_changes_nothing_it_is_given(tmp_path):
    values = yaml.safe_load(yaml.safe_dump(RECIPE))
    check(values, tmp_path)
    override(values, "training.seed", 3)
    assert values == RECIPE


def test_without_max_length_a_text_has_128_tokens(file):
    assert load(file(training={})).max_length == 128


def test_the_defaults_of_a_recipe_are_those_of_the_code_that_it_names(file):
    from hf_cl.training.agreement import CHECK_STEPS
    from hf_cl.training.collect import TEXTS

    checked = load(file())
    assert (checked.check_steps, checked.routing) == (CHECK_STEPS, TEXTS)


def test_a_missing_recipe_proposes_a_shipped_one():
    with pytest.raises(ConfigError, match=r"recipe 'quikstart': no such file.* Did you mean 'quickstart'\?"):
        find("quikstart")


@pytest.mark.parametrize("text", ["model: [", "just words", "- a\n- b\n", "", "a: b: c"])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load(str(path))


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"broken\.yaml: is no YAML"):
        load(str(path))


def test_a_recipe_cannot_make_python_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("model: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="is no YAML"):
        load(str(path))


# --- unknown and bad values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"modle": "x"}, r"recipe: unknown key 'modle'\. Did you mean 'model'\?"),
        ({"model": {"nmae": "x"}}, r"recipe\.model: unknown key 'nmae'\. Did you mean 'name'\?"),
        ({"model": {"dtype": "float32"}}, r"recipe\.model: key 'name' is missing"),
        ({"model": {"name": "x", "dtype": "float16"}}, r"recipe\.model\.dtype: 'float16' is not one of float32"),
        ({"model": 3}, r"recipe\.model: expected str or dict, found 3"),
        ({"method": {"name": "exssnet", "densty": 0.1}}, r"recipe\.method.*'densty'\. Did you mean 'density'\?"),
        ({"method": {"name": "exsnet"}}, r"there is no 'exsnet'\. Did you mean 'exssnet'\?"),
        ({"method": {"density": 0.1}}, r"recipe\.method: key 'name' is missing\. Known: .*exssnet"),
        ({"method": {"name": "exssnet", "density": "thin"}}, r"density: expected float, found 'thin'"),
        ({"method": {"name": "exssnet", "start": "ktt"}}, r"start: 'ktt' is not one of kkt, fresh"),
        ({"method": {"name": "lora", "r": True}}, r"\.r: expected int, found True"),
        ({"method": "../../evil"}, r"there is no '\.\./\.\./evil'"),
        ({"training": {"learning_rat": 1}}, r"training: unknown key 'learning_rat'\. Did you mean 'learning_rate'"),
        ({"training": {"maxlength": 8}}, r"recipe\.training: unknown key 'maxlength'\. Did you mean 'max_length'"),
        ({"training": {"max_length": 0}}, r"recipe\.training\.max_length: expected a number of tokens, found 0"),
        ({"training": {"max_length": "long"}}, r"max_length: expected a number of tokens, found 'long'"),
        ({"training": {"learning_rate": "fast"}}, r"training\.learning_rate: expected float, found 'fast'"),
        ({"training": {"num_train_epochs": 0}}, r"training\.num_train_epochs: expected a number above 0"),
        ({"training": {"output_dir": "x"}}, r"training\.output_dir: .*--output-dir"),
        ({"training": [1]}, r"recipe\.training: expected dict"),
        ({"tuning": {"density": [1]}}, r"tuning\.density: expected method\.<option> or training\.<option>"),
        ({"tuning": {"method.density": 0.1}}, r"tuning\.method\.density: expected .* and a list of values"),
        ({"tuning": {"method.density": []}}, r"tuning\.method\.density: expected .* and a list of values"),
        ({"tuning": {"method.densty": [0.1]}}, r"tuning.*'?densty'?.*Did you mean 'density'"),
        ({"tuning": {"training.learning_rat": [0.1]}}, r"learning_rat'?.*Did you mean 'learning_rate'"),
        ({"tuning": {"method.density": [0.1, "thin"]}}, r"density: expected float, found 'thin'"),
    ],
)  # fmt: skip
def test_a_slip_is_named_where_it_stands(file, blocks, message):
    with pytest.raises(ConfigError, match=message):
        load(file(**blocks))


@pytest.mark.parametrize("key", ["model", "stream", "method"])
def test_a_missing_block_is_named(tmp_path, key):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in RECIPE.items() if name != key}))
    with pytest.raises(ConfigError, match=f"recipe: key '{key}' is missing"):
        load(str(path))


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_a_rate_may_be_written_with_an_exponent(tmp_path, text):
    path = tmp_path / "mine.yaml"
    blocks = {"method": {"name": "finetune"}, "training": {}}
    path.write_text(
        yaml.safe_dump({**RECIPE, **blocks}).replace("training: {}", f"training: {{learning_rate: {text}}}")
    )
    assert load(str(path)).training["learning_rate"] == 0.001
    assert load(str(path), [f"method.learning_rate={text}"]).options.learning_rate == 0.001
    assert load(str(path), [f"training.weight_decay={text}"]).training["weight_decay"] == 0.001


def test_a_grids_values_are_read_as_the_options_they_are(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(RECIPE) + "tuning: {training.learning_rate: [1e-3, 3e-3], method.scale: [1, 2.0]}\n")
    tuning = load(str(path)).tuning
    assert tuning == {"training.learning_rate": [0.001, 0.003], "method.scale": [1.0, 2.0]}


# --- overrides ------------------------------------------------------------------------------------------


def test_dotted_keys_override_single_values(file):
    checked = load(file(), ["training.seed=3", "method.density=0.3", "model.dtype=bfloat16", "training.max_length=9"])
    assert (checked.training["seed"], checked.options.density, checked.max_length) == (3, 0.3, 9)
    assert (checked.model.name, checked.model.dtype) == ("org/model", "bfloat16")
    assert checked.training["num_train_epochs"] == 2


def test_a_block_that_is_not_there_yet_is_begun():
    assert override({"model": "m"}, "training.seed", 1) == {"model": "m", "training": {"seed": 1}}
    assert override({"method": "lora"}, "method.r", 4) == {"method": {"name": "lora", "r": 4}}


def test_another_stream_replaces_the_whole_block(file):
    assert load(file(stream={"name": "text5", "seed": 3}), ["stream=clinc10"]).stream == "clinc10"


@pytest.mark.parametrize("name", plugins.available("methods"))
def test_another_method_brings_its_own_defaults(file, name):
    checked = load(file(), [f"method={name}"])
    module = plugins.load("methods", name)
    assert (checked.method, checked.options) == (name, module.Options())
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(module.Options))


def test_overrides_hold_in_their_order(file):
    assert load(file(), ["method=lora", "method.r=2", "method.r=3"]).options.r == 3
    with pytest.raises(ConfigError, match="unknown key 'r'"):
        load(file(), ["method.r=2"])
    assert load(file(), ["method.r=2", "method=lora"]).options.r == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.seed", r"override 'training\.seed': expected key=value"),
        ("trianing.seed=1", r"recipe: unknown key 'trianing'\. Did you mean 'training'"),
        ("training.learning_rat=1", r"unknown key 'learning_rat'"),
        ("training.seed.deep=1", r"override .*: `seed` is int, it has no keys|unknown key 'seed'|seed: expected int"),
        ("stream.tasks.0=1", r"`?stream`? is list, it has no keys"),
        ("training.seed=[1", r"override 'training\.seed=\[1': '\[1' is no YAML value"),
        ("=1", "unknown key ''"),
    ],
)
def test_an_override_that_cannot_be_meant_is_refused(file, text, message):
    with pytest.raises(ConfigError, match=message):
        load(file(), [text])


# --- the recipes that ship --------------------------------------------------------------------------------------------


def test_there_are_shipped_recipes():
    assert "quickstart" in {file.stem for file in SHIPPED_RECIPES}


@pytest.mark.parametrize("file", SHIPPED_RECIPES, ids=lambda file: file.stem)
def test_a_shipped_recipe_loads_is_short_and_says_how_to_run_it(file):
    checked = load(file.stem)
    assert checked.method in plugins.available("methods")
    lines = file.read_text().splitlines()
    assert len(lines) <= 25
    header = [line for line in lines if line.startswith("#")]
    assert [line for line in header if re.fullmatch(rf"# run: .*hf-cl train {file.stem}( .*)?", line)]


@pytest.mark.parametrize("file", SHIPPED_RECIPES, ids=lambda file: file.stem)
def test_a_shipped_recipes_grid_holds_options_of_its_method(file):
    checked = load(file.stem)
    for key, values in checked.tuning.items():
        for value in values:
            apply(checked, {key: value})


def test_every_method_is_a_recipes_method():
    assert all(recipes.check({**RECIPE, "method": name}, None).method == name for name in plugins.available("methods"))
