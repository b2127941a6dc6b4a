"""Bad input gives exactly one error of ours: it says where, what was found and the way out, and nothing is harmed."""

import json
import re

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import Trainer

from hf_cl import MaskConfig, open_run, plugins, run_stream, task_from_datasets
from hf_cl import recipe as recipes
from hf_cl.errors import BaseModelError, ConfigError, DataError, HfClError, OwnershipError, RunError, TrainingError
from hf_cl.methods import exssnet
from hf_cl.ownership.digest import tensor_bytes

pytest_plugins = ["tiny"]


class Spy:
    """Counts trainings begun and steps taken."""

    def __init__(self, patch):
        self.trainings = self.steps = 0
        train, step = Trainer.train, Trainer.training_step

        def counted_train(trainer, *args, **kwargs):
            self.trainings += 1
            return train(trainer, *args, **kwargs)

        def counted_step(trainer, *args, **kwargs):
            self.steps += 1
            return step(trainer, *args, **kwargs)

        patch.setattr(Trainer, "train", counted_train)
        patch.setattr(Trainer, "training_step", counted_step)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def says(caught, *parts):
    """The message holds every part, is one sentence or more, and no error of a library hides behind it unnamed."""
    message = str(caught.value)
    for part in parts:
        assert re.search(part, message), f"{part!r} not in {message!r}"
    assert message.endswith((".", "?")), message
    assert isinstance(caught.value, HfClError)


# --- a stream whose data are wrong: refused before any training ------------------------------------------------


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def drop_column(folder):
    write(folder / "test.jsonl", [{"body": "red", "label": "mild"}])


def unknown_label(folder):
    write(folder / "validation.jsonl", [{"text": "red", "label": "midl"}])


def number_out_of_range(folder):
    (folder / "labels.json").write_text(json.dumps(["mild", "odd", "rough"]))
    for split in ("train", "validation", "test"):
        write(folder / f"{split}.jsonl", [{"text": "red", "label": label} for label in (0, 1, 7)])


def empty_split(folder):
    (folder / "test.jsonl").write_text("")


def unreadable(folder):
    (folder / "train.jsonl").write_text('{"text": "red", "label"\n')


def missing_split(folder):
    (folder / "test.jsonl").unlink()


def text_is_missing(folder):
    write(folder / "train.jsonl", [{"text": "red", "label": "mild"}, {"text": None, "label": "odd"}])


def one_label(folder):
    for split in ("train", "validation", "test"):
        write(folder / f"{split}.jsonl", [{"text": "red", "label": "mild"}] * 4)


DATA = {
    drop_column: ["Task 'weather', split 'test'", "no column 'text'", "found: body, label", "`text`"],
    unknown_label: ["Task 'weather', split 'validation'", "row 0", "'midl'", "Did you mean 'mild'"],
    number_out_of_range: ["Task 'weather', split 'train'", "row 2", "label 7", "from 0 to 2"],
    empty_split: ["Task 'weather', test file", r"test\.jsonl", "no rows", "name another"],
    unreadable: ["Task 'weather', train file", r"train\.jsonl", "cannot be read as jsonl", "Write it anew"],
    missing_split: ["Task 'weather'", "no split 'test'", "found: train, validation", "`test_split`"],
    text_is_missing: ["Task 'weather', split 'train'", "row 1", "None", "drop such rows"],
    one_label: ["Task 'weather'", "1 label", "give 2 or more"],
}


@pytest.mark.parametrize("harm", DATA, ids=lambda harm: harm.__name__)
def test_bad_data_of_the_last_task_are_refused_before_the_first_is_trained(harm, base_folder, tmp_path, spy):
    file = tiny.write_recipe(tmp_path / "recipe", base_folder)
    harm(file.parent / "data" / "weather")
    with pytest.raises(DataError) as caught:
        run_stream(recipes.load(str(file)), tmp_path / "run")
    says(caught, *DATA[harm])
    assert (spy.trainings, (tmp_path / "run").exists()) == (0, False)


STREAMS = {
    "a name twice": (
        [{"name": "pets", "dataset": "data/pets"}, {"name": "pets", "dataset": "data/weather"}],
        ["two tasks are called 'pets'", "a name of its own"],
    ),
    "no task": ([], ["no tasks", "List one or more"]),
    "no data": ([{"name": "pets"}], [r"tasks\[0\]", "'pets' has no data", "Give `dataset`"]),
    "a missing folder": ([{"name": "pets", "dataset": "data/no where"}], ["data/no where"]),
    "an unknown key": ([{"name": "pets", "dataste": "data/pets"}], [r"tasks\[0\]", "'dataste'", "mean 'dataset'"]),
    "an unknown label": (
        [{"name": "pets", "dataset": "data/pets", "labels": ["tame", "wilt"]}],
        ["'wilt', which is no label", "Did you mean 'wild'"],
    ),
    "a name that leaves the folder": ([{"name": "../x", "dataset": "data/pets"}], [r"'\.\./x'", "Choose another"]),
}


@pytest.mark.parametrize("what", STREAMS)
def test_a_bad_stream_is_refused_before_any_training(what, base_folder, tmp_path, spy):
    stream, parts = STREAMS[what]
    file = tiny.write_recipe(tmp_path / "recipe", base_folder, stream=stream)
    with pytest.raises(HfClError) as caught:
        run_stream(recipes.load(str(file)), tmp_path / "run")
    says(caught, *parts)
    assert (spy.trainings, (tmp_path / "run").exists()) == (0, False)


def test_a_ready_stream_without_its_folder_names_the_variable(base_folder, tmp_path, spy, monkeypatch):
    monkeypatch.delenv("HF_CL_DATA", raising=False)
    file = tiny.write_recipe(tmp_path / "recipe", base_folder, stream="clinc10")
    with pytest.raises(ConfigError) as caught:
        run_stream(recipes.load(str(file)), tmp_path / "run")
    says(caught, "'clinc10'", "HF_CL_DATA is not set", "list the tasks")
    assert spy.trainings == 0


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
@pytest.mark.parametrize("method", ["supsup", "exssnet", "ssnet"])
def test_a_density_outside_its_range_is_refused_before_any_training(method, density, tiny_recipe, tmp_path, spy):
    with pytest.raises(ConfigError) as caught:
        run_stream(recipes.load(str(tiny_recipe), [f"method={method}", f"method.density={density}"]), tmp_path / "run")
    says(caught, "density", re.escape(str(density)), "above 0 and at most 1")
    assert (spy.trainings, (tmp_path / "run").exists()) == (0, False)


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_an_option_that_is_no_number_is_refused(value, tiny_recipe):
    with pytest.raises(ConfigError) as caught:
        recipes.load(str(tiny_recipe), [f"method.density={value}"])
    says(caught, "density", "finite number", value[1:])


OPTIONS = {
    "a negative scale": (["method.scale=-1"], ["scale", "-1"]),
    "a mask share above one": (["method.mask_share=1.5"], ["mask_share", "1.5"]),
    "a mask share of nothing": (["method.mask_share=0"], ["mask_share", "0"]),
    "no weight phase": (["method.mask_share=1.0"], ["mask_share", "below 1"]),
    "no neighbours": (["method.kkt_k=0", "method.start=kkt"], ["kkt_k", "0"]),
    "no sample": (["method.kkt_sample=0", "method.start=kkt"], ["kkt_sample", "0"]),
    "a rank of nothing": (["method=lora", "method.r=0"], ["r", "0"]),
    "texts longer than the model": (["training.max_length=99"], ["max_length", "99", "Lower it"]),
    "texts shorter than a word": (["training.max_length=2"], ["max_length", "2", "Raise it"]),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_an_option_out_of_its_range_is_refused_before_a_step(what, tiny_recipe, tmp_path, spy):
    overrides, parts = OPTIONS[what]
    with pytest.raises(ConfigError) as caught:
        run_stream(recipes.load(str(tiny_recipe), overrides), tmp_path / "run")
    says(caught, *parts)
    assert spy.steps == 0


# --- bases ----------------------------------------------------------------------------------------------------


def learner(base, config, tmp_path, **changes):
    return tiny.learner(base, config, tmp_path / "trainer", **changes)


def test_a_base_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(BaseModelError) as caught:
        tiny.load_base(str(tmp_path))
    says(caught, re.escape(str(tmp_path)), "cannot be loaded", "config.json")


@pytest.mark.parametrize("config", [MaskConfig(density=0.3), tiny.options("lora")], ids=["masks", "lora"])
def test_tied_weights_are_refused_before_any_training(config, base_folder, tmp_path, spy):
    base = tiny.fresh(base_folder)
    layers = base.model.bert.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    with pytest.raises(ConfigError) as caught:
        learner(base, config, tmp_path).learn(tiny.task())
    says(caught, r"target_modules: .*query\.weight is tied", r"layer\.1\.attention", "untie it")
    assert spy.trainings == 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"target_modules": ["nope"]}, ["target_modules: nope match no module", "Linears found: "]),
        ({"target_modules": ["LayerNorm"]}, ["target_modules: .*LayerNorm is a LayerNorm", "Leave it out"]),
        ({"head_modules": ["clasifier"]}, ["head_modules: 'clasifier' is no module", "classifier"]),
        ({"exclude_modules": ["nope"]}, ["exclude_modules: nope", "Targets are"]),
    ],
)  # fmt: skip
def test_layers_that_are_not_there_are_refused_before_any_training(options, parts, base_folder, tmp_path, spy):
    with pytest.raises(ConfigError) as caught:
        learner(base_folder, MaskConfig(density=0.3, **options), tmp_path).learn(tiny.task())
    says(caught, *parts)
    assert spy.trainings == 0


def test_a_refused_first_task_leaves_the_base_as_it_was(base_folder, tmp_path):
    base = tiny.fresh(base_folder)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with pytest.raises(ConfigError):
        learner(base, MaskConfig(density=0.3, target_modules=["nope"]), tmp_path).learn(tiny.task())
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_another_base_than_the_runs_is_refused(base_folder, tmp_path):
    first = learner(base_folder, tiny.options("supsup"), tmp_path)
    first.learn(tiny.task())
    run = first.save_pretrained(tmp_path / "run")
    other = tiny.fresh(tiny.save_base(tmp_path / "other", seed=3))
    with pytest.raises(BaseModelError) as caught:
        open_run(run, other)
    says(caught, "base '.*other'", "fingerprint", "tiny-bert'", "same revision")


# --- a later task that cannot be learned leaves what was learned before bit-identical ---------------------------


def state(learner):
    """Return all that is known of the first task: its digests, its stored tensors, its logits."""
    learner.activate("pets")
    packed = learner.method.pack(0)
    tensors = {**packed.task, **packed.head, "logits": tiny.logits(learner.model)}
    return learner.method.parts(0), {name: tensor.clone() for name, tensor in tensors.items()}


def require_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    # As bytes: a logit may be no number, and that is then a bit pattern to keep, too.
    assert all(bytes(tensor_bytes(before[1][name])) == bytes(tensor_bytes(after[1][name])) for name in before[1])


def test_values_do_not_train_where_no_entry_is_free(base_folder, tmp_path, spy):
    full = learner(base_folder, exssnet.Options(density=1.0, start="fresh"), tmp_path)
    full.learn(tiny.task("pets"))
    before, steps = state(full), spy.steps
    with pytest.raises(OwnershipError) as caught:
        full.learn(tiny.task("weather"))
    says(caught, "no layer has a free entry", "owned by tasks 0", "`supsup`", "lower `density`")
    assert spy.steps == steps
    require_same(before, state(full))
    assert full.tasks == ["pets"]


class Poisoned:
    """A base for which one word is not a number."""

    word = "floor"

    @classmethod
    def base(cls, folder):
        base = tiny.fresh(folder)
        with torch.no_grad():
            base.model.bert.embeddings.word_embeddings.weight[tiny.vocabulary()[cls.word]] = float("nan")
        return base

    @classmethod
    def task(cls, name, words):
        rows = {split: tiny.rows(tiny.LABELS[name], count, words=words) for split, count in tiny.SIZES.items()}
        return task_from_datasets(name, {split: Dataset.from_dict(columns) for split, columns in rows.items()})


LOOK_AT_ALL = {"average", "ewc", "l2", "sfa", "task_arithmetic", "ties", "wise_ft"}
"""Averages and penalties read every weight: one that is no number stops them, be it of a word that no text has."""


@pytest.mark.parametrize("method", sorted({*plugins.available("methods")} - LOOK_AT_ALL))
def test_a_loss_that_is_no_number_stops_the_task_and_no_other(method, base_folder, tmp_path, spy):
    clean = [word for word in tiny.WORDS if word != Poisoned.word]
    one = learner(Poisoned.base(base_folder), tiny.options(method), tmp_path)
    one.learn(Poisoned.task("pets", clean))
    before, steps = state(one), spy.steps
    with pytest.raises(TrainingError) as caught:
        one.learn(Poisoned.task("weather", [*clean[:3], Poisoned.word]))
    says(caught, r"step \d", "not finite", "earlier tasks are untouched", "Lower the learning rates")
    assert spy.steps <= steps + 2
    require_same(before, state(one))
    one.learn(Poisoned.task("weather", clean))
    assert one.tasks == ["pets", "weather"]


def test_a_name_used_twice_is_refused_before_any_training(base_folder, tmp_path, spy):
    one = learner(base_folder, tiny.options("supsup"), tmp_path)
    one.learn(tiny.task("pets"))
    before = state(one)
    with pytest.raises(DataError) as caught:
        one.learn(tiny.task("pets"))
    says(caught, "task 'pets' was learned already", "Rename it")
    assert spy.trainings == 1
    require_same(before, state(one))


def test_bad_rows_in_memory_are_refused_before_a_learner_sees_them():
    rows = Dataset.from_dict({"text": ["red", "blue"], "label": ["a", "b"]})
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    unlabelled = Dataset.from_dict({"text": ["red"], "label": [-1]}, features=features)
    for splits, parts in (
        ({"train": rows.remove_columns("label"), "test": rows}, ["split 'train'", "no column 'label'", "`label`"]),
        ({"train": rows}, ["no split 'test'", "`test_split`"]),
        ({"train": rows, "test": rows.select([])}, ["split 'test'", "no rows"]),
        ({"train": rows.cast(features), "test": unlabelled}, ["split 'test'", "row 0", "-1", "drop them"]),
    ):
        with pytest.raises(DataError) as caught:
            task_from_datasets("pets", splits)
        says(caught, "Task 'pets'", *parts)


def test_a_place_that_is_taken_is_refused_before_any_training(tiny_recipe, tmp_path, spy):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError) as caught:
        run_stream(recipes.load(str(tiny_recipe)), tmp_path)
    says(caught, re.escape(str(tmp_path)), "no run folder", "another --output-dir")
    assert spy.trainings == 0
