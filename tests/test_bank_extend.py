"""A bank learns on and forgets on purpose: other tasks stay bit-identical, on disk or loaded."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from hf_cl import MaskBank, MaskConfig, run_stream, verify
from hf_cl.errors import BankConflictError, BankError, BaseMismatchError, ConfigError, DataError, RunError
from hf_cl.masks.compose import fitting_scale
from hf_cl.masks.values import from_int8, round_values, to_int8
from hf_cl.ownership.owner import FREE
from hf_cl.recipe import load

pytest_plugins = ["tiny"]
FIRST, LATER = ("pets", "weather"), ("food",)
WAYS = ["exssnet", *(pytest.param(way, marks=pytest.mark.slow) for way in ("supsup", "mask_config"))]


def config_of(way):
    if way == "mask_config":
        return MaskConfig(density=0.3, trains="claimed")
    return tiny.options(way)


def logits_of(bank, base_folder):
    model, found = bank.attach(tiny.fresh(base_folder).model), {}
    for name in bank.tasks:
        bank.activate(model, name)
        found[name] = tiny.logits(model)
    return found


@pytest.fixture(scope="module", params=WAYS)
def begun(request, base_folder, tmp_path_factory):
    """A bank of two tasks in a folder, what it answers, and the way it was learned."""
    place = tmp_path_factory.mktemp(request.param)
    learner = tiny.learner(base_folder, config_of(request.param), place / "out")
    for name in FIRST:
        learner.learn(tiny.task(name))
    folder = MaskBank.from_learner(learner, base_id="someone/tiny").save_pretrained(place / "bank")
    return folder, logits_of(MaskBank.from_pretrained(folder), base_folder), request.param


@pytest.fixture
def bank(begun, tmp_path):
    """The bank in a folder of its own."""
    MaskBank.from_pretrained(begun[0]).save_pretrained(tmp_path / "bank")
    return MaskBank.from_pretrained(tmp_path / "bank")


def extended(bank, base_folder, place, *, config=None, **training):
    args = tiny.arguments(place, **training)
    return bank.extend(tiny.fresh(base_folder), None, config, args, max_length=8)


def test_a_bank_learns_on_and_its_tasks_stay_bit_identical(bank, begun, base_folder, tmp_path):
    learner = extended(bank, base_folder, tmp_path / "out")
    assert learner.tasks == list(FIRST)
    record = learner.learn(tiny.task("food"))
    assert (record["index"], list(record["metrics"])) == (2, ["food"])
    grown = MaskBank.from_learner(learner)
    assert grown.tasks == [*FIRST, "food"]
    assert grown.manifest.generation == bank.manifest.generation + 1
    assert grown.manifest.tasks[:2] == bank.manifest.tasks  # the very files, digests and records
    folder = grown.save_pretrained(bank.folder)
    found = logits_of(MaskBank.from_pretrained(folder), base_folder)
    assert all(torch.equal(found[name], begun[1][name]) for name in FIRST)
    learner.activate("food")
    assert torch.equal(found["food"], tiny.logits(learner.model))
    assert all(not task["moved"] and task["same_logits"] for task in grown.verify(tiny.fresh(base_folder).model))


def test_learning_on_is_what_learning_at_one_go_is(begun, bank, base_folder, tmp_path):
    at_one_go = tiny.learner(base_folder, config_of(begun[2]), tmp_path / "whole")
    for name in (*FIRST, *LATER):
        at_one_go.learn(tiny.task(name))
    whole = MaskBank.from_learner(at_one_go, base_id="someone/tiny")
    learner = extended(bank, base_folder, tmp_path / "out", config=config_of(begun[2]))
    learner.learn(tiny.task("food"))
    grown = MaskBank.from_learner(learner)
    if begun[2] == "mask_config":  # its options say once what was computed, and once what was asked for
        assert grown.manifest.tasks[2].file == whole.manifest.tasks[2].file
    else:
        assert replace(grown.manifest, grown_from=[]) == whole.manifest
        assert grown.manifest.grown_from == [bank.digest]


def test_finished_tasks_stay_on_disk_and_answer_when_asked(bank, begun, base_folder, tmp_path):
    learner = extended(bank, base_folder, tmp_path / "out")
    learner.learn(tiny.task("food"))
    assert list(learner.model.peft_config) == ["task2"]
    owned = learner.method.tuner.mask_layers()[0].store.owner.clone()
    for name in (*FIRST, "food", *FIRST):
        learner.activate(name)
        if name in FIRST:
            assert torch.equal(tiny.logits(learner.model), begun[1][name])
        assert len(learner.model.peft_config) <= 2
    assert torch.equal(learner.method.tuner.mask_layers()[0].store.owner, owned)


def test_earlier_tasks_are_evaluated_where_their_rows_are_given(bank, base_folder, tmp_path):
    learner = extended(bank, base_folder, tmp_path / "out")
    learner.remember(tiny.task("pets"))
    assert list(learner.learn(tiny.task("food"))["metrics"]) == ["pets", "food"]
    with pytest.raises(DataError, match="learned already, as number 0"):
        learner.learn(tiny.task("pets"))


def test_kkt_starts_from_a_task_that_lies_on_disk(base_folder, tmp_path):
    options = tiny.options("exssnet", start="kkt", kkt_sample=20)
    at_one_go = tiny.learner(base_folder, options, tmp_path / "whole")
    for name in (*FIRST, *LATER):
        at_one_go.learn(tiny.task(name))
    first = tiny.learner(base_folder, options, tmp_path / "first")
    for name in FIRST:
        first.learn(tiny.task(name))
    folder = MaskBank.from_learner(first, base_id="someone/tiny").save_pretrained(tmp_path / "bank")
    learner = extended(MaskBank.from_pretrained(folder), base_folder, tmp_path / "out")
    record = learner.learn(tiny.task("food"))
    assert set(record["facts"]["kkt"]["accuracies"]) == {"0", "1"}
    assert record["facts"] == at_one_go.records[2]["facts"]
    assert record["parts"] == at_one_go.records[2]["parts"]


def test_a_task_whose_training_fails_leaves_the_bank_and_the_learner_as_they_were(
    bank, begun, base_folder, tmp_path, monkeypatch
):
    learner = extended(bank, base_folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("hf_cl.learner.train_task", lambda *_: learner.method.begin(2, ("a", "b")) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.learn(tiny.task("food"))
    learner.method.abandon(2)
    assert learner.learn(tiny.task("food"))["index"] == 2
    learner.activate("pets")
    assert torch.equal(tiny.logits(learner.model), begun[1]["pets"])


OTHER = {
    "seed": {"training": {"seed": 5}},
    "compose": {"config": {"compose": "prune"}},
    "scale": {"config": {"scale": 9.0}},
    "train_norms": {"config": {"train_norms": True}},
}


@pytest.mark.parametrize("what", OTHER)
def test_another_seed_scale_or_form_is_refused_before_any_work(begun, bank, base_folder, tmp_path, what):
    if begun[2] == "mask_config":
        changes = {"seed": 5} if what == "seed" else OTHER[what]["config"]
        config, training = MaskConfig(density=0.3, **changes), {}
    else:
        config, training = tiny.options(begun[2], **OTHER[what].get("config", {})), OTHER[what].get("training", {})
    with pytest.raises(ConfigError, match=f"{what}: .* for its whole life"):
        extended(bank, base_folder, tmp_path / "out", config=config, **training)


def test_another_density_takes_the_banks_scale_where_none_is_asked_for(begun, bank, base_folder, tmp_path):
    if begun[2] == "mask_config":
        config = MaskConfig(density=0.2, scale=None)
    else:
        config = tiny.options(begun[2], density=0.2)
        assert config.scale is None
    learner = extended(bank, base_folder, tmp_path / "out", config=config)
    assert learner.method.config.scale == bank.manifest.store.scale != fitting_scale("delta", 0.2)


def test_other_targets_are_refused(bank, base_folder, tmp_path):
    config = MaskConfig(density=0.3, scale=bank.manifest.store.scale, target_modules=["query"])
    with pytest.raises(ConfigError, match=r"target_modules: .* for its whole life"):
        extended(bank, base_folder, tmp_path / "out", config=config)


@pytest.mark.parametrize("method", ["ssnet", "finetune", "lora"])
def test_a_method_that_gives_no_bank_cannot_go_on_from_one(bank, base_folder, tmp_path, method):
    with pytest.raises(BankError, match="cannot go on from a bank"):
        extended(bank, base_folder, tmp_path / "out", config=tiny.options(method))


def test_another_base_or_tokenizer_is_refused(bank, base_folder, tmp_path):
    other = tiny.fresh(tiny.save_base(tmp_path / "other", seed=3))
    with pytest.raises(BaseMismatchError, match="fingerprint"):
        bank.extend(other, None, None, tiny.arguments(tmp_path / "out"))
    cased = tiny.tokenizer()
    cased.add_tokens(["zebra"])
    with pytest.raises(BaseMismatchError, match="tokenizer"):
        bank.extend(tiny.fresh(base_folder).model, cased, None, tiny.arguments(tmp_path / "out"))
    model = bank.attach(tiny.fresh(base_folder).model)
    with pytest.raises(BaseMismatchError, match="tokenizer"):
        bank.pipeline("pets", model, cased)


def test_two_that_extend_one_bank_conflict_and_the_first_wins(bank, base_folder, tmp_path):
    grown = []
    for name in ("food", "cars"):
        learner = extended(MaskBank.from_pretrained(bank.folder), base_folder, tmp_path / name)
        learner.learn(tiny.task(name, labels=["a", "b"]))
        grown.append(MaskBank.from_learner(learner))
    grown[0].save_pretrained(bank.folder)
    with pytest.raises(BankConflictError, match="extend"):
        grown[1].save_pretrained(bank.folder)
    assert MaskBank.from_pretrained(bank.folder).tasks == [*FIRST, "food"]


# --- dropping -------------------------------------------------------------------------------------------------


@pytest.fixture
def three(begun, bank, base_folder, tmp_path):
    """A bank of three tasks in a folder."""
    learner = extended(bank, base_folder, tmp_path / "three")
    learner.learn(tiny.task("food"))
    return MaskBank.from_pretrained(MaskBank.from_learner(learner).save_pretrained(bank.folder))


@pytest.mark.parametrize("name", [*FIRST, "food"])
def test_a_dropped_task_is_gone_and_the_others_answer_as_before(three, base_folder, name):
    before = logits_of(three, base_folder)
    left = three.drop(name)
    left.save_pretrained(three.folder)
    opened = MaskBank.from_pretrained(three.folder)
    assert opened.tasks == [task for task in three.tasks if task != name]
    after = logits_of(opened, base_folder)
    assert all(torch.equal(after[task], before[task]) for task in opened.tasks)
    assert all(not task["moved"] and task["same_logits"] for task in opened.verify(tiny.fresh(base_folder).model))
    assert all(not task["moved"] for task in opened.verify())
    files = {file.name for file in three.folder.iterdir() if file.suffix == ".safetensors"}
    assert files == {file.name for file in opened.manifest.files}
    assert not [file for file in files if file.startswith(f"task-{three.tasks.index(name):05d}")]


def test_what_nobody_reads_is_free_again_and_numbers_are_not_used_twice(three, base_folder, tmp_path):
    left = three.drop("weather")
    assert [tombstone.index for tombstone in left.manifest.tombstones] == [1]
    left.save_pretrained(tmp_path / "left")
    learner = extended(MaskBank.from_pretrained(tmp_path / "left"), base_folder, tmp_path / "out")
    learner.learn(tiny.task("weather"))
    assert learner.records[-1]["index"] == 3
    layer = learner.method.tuner.mask_layers()[0]
    whole = extended(three, base_folder, tmp_path / "whole")
    whole.activate("food")
    before = whole.method.tuner.mask_layers()[0].store.owner
    stays = (layer.store.owner == 1) & (before == 1)
    assert torch.equal(stays, layer.store.owner == 1)
    assert 0 < int(stays.sum()) < int((before == 1).sum())
    food = learner.method
    food.bring(2)
    assert bool(food.tuner.mask_layers()[0].mask("task2")[layer.store.owner == 1].all())
    grown = MaskBank.from_learner(learner)
    assert all(not task["moved"] for task in grown.verify())


def test_a_tombstone_that_is_needed_no_more_goes(three):
    once = three.drop("pets")
    assert [tombstone.index for tombstone in once.manifest.tombstones] == [0]
    twice = once.drop("weather")
    assert all(tombstone.index < 2 for tombstone in twice.manifest.tombstones)
    last = three.drop("food")
    assert last.manifest.tombstones == []
    assert last.manifest.next_index == 3
    one = last.drop("weather")
    assert one.manifest.tombstones == []
    with pytest.raises(ConfigError, match="Delete the folder"):
        one.drop("pets")
    with pytest.raises(ConfigError, match="holds pets"):
        one.drop("weather")


def test_a_task_whose_head_others_share_is_not_dropped(base_folder, tmp_path):
    learner = tiny.learner(base_folder, tiny.options("supsup", head="shared"), tmp_path / "out")
    for name in ("one", "two"):
        learner.learn(tiny.task(name, labels=["a", "b"]))
    bank = MaskBank.from_learner(learner)
    with pytest.raises(ConfigError, match="two share its head"):
        bank.drop("one")
    assert bank.drop("two").tasks == ["one"]


# --- proof without a base -------------------------------------------------------------------------------------


def test_a_bank_is_proved_from_its_files_alone(three):
    found = three.verify()
    assert [(task["moved"], task["same_logits"]) for task in found] == [([], None)] * 3
    assert all(task["before"] == task["after"] for task in found)


def test_the_form_that_takes_the_bases_values_is_proved_with_the_base(base_folder, tmp_path):
    learner = tiny.learner(base_folder, tiny.options("supsup", compose="prune"), tmp_path / "out")
    for name in FIRST:
        learner.learn(tiny.task(name))
    bank = MaskBank.from_learner(learner)
    assert all(not task["moved"] for task in bank.verify())
    assert all(not task["moved"] and task["same_logits"] for task in bank.verify(tiny.fresh(base_folder).model))


def test_logits_of_another_environment_are_compared_within_a_tolerance(three, base_folder, monkeypatch):
    monkeypatch.setattr("hf_cl.bank.probe_logits", lambda model: probe(model) * (1 + 1e-6))
    from hf_cl.proof import probe_logits as probe

    found = three.verify(tiny.fresh(base_folder).model)
    assert all(not task["same_logits"] and task["close"] and 0 < task["difference"] < 1e-5 for task in found)
    monkeypatch.setattr("hf_cl.bank.probe_logits", lambda model: probe(model) * 1.01)
    assert not any(task["close"] for task in three.verify(tiny.fresh(base_folder).model))


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_values_are_stored_in_the_chosen_dtype_and_the_bank_answers_as_the_model_did(base_folder, tmp_path, dtype):
    learner = tiny.learner(base_folder, tiny.options("exssnet", values_dtype=dtype), tmp_path / "out")
    logits = {}
    for name in FIRST:
        learner.learn(tiny.task(name))
        logits[name] = tiny.logits(learner.model)
    bank = MaskBank.from_learner(learner)
    folder = bank.save_pretrained(tmp_path / "bank")
    stored = load_file(folder / bank.manifest.tasks[0].file.name)
    assert stored["values"].dtype == getattr(torch, dtype)
    assert ("value_scales" in stored) == (dtype == "int8")
    found = logits_of(MaskBank.from_pretrained(folder), base_folder)
    assert all(torch.equal(found[name], logits[name]) for name in FIRST)
    left = MaskBank.from_pretrained(folder).drop("pets")
    assert torch.equal(logits_of(left, base_folder)["weather"], logits["weather"])


def test_whole_numbers_with_a_scale_a_row_are_exact_after_the_first_rounding():
    generator = torch.Generator().manual_seed(0)
    for width in (1, 3, 64):
        where = (torch.rand(5000, generator=generator) < 0.2).nonzero().squeeze(1)
        values = torch.randn(len(where), generator=generator) * 10 ** torch.randint(
            -6, 3, (len(where),), generator=generator
        )
        values[::17] = 0
        once = round_values(values, where, width, "int8")
        assert torch.equal(round_values(once, where, width, "int8"), once)
        whole, scales = to_int8(once, where, width)
        assert (whole.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
        assert torch.equal(from_int8(whole, scales, where, width), once)
        most = torch.zeros(5000 // width + 1).scatter_reduce_(0, where // width, values.abs(), "amax")[where // width]
        assert bool(((once - values).abs() <= most / 127 * 0.51 + most * 2**-9 + 1e-38).all())
    with pytest.raises(ValueError, match="scales for"):
        from_int8(whole, scales[:-1], where, width)


# --- streams ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supsup", "exssnet"])
def test_a_stream_goes_on_from_a_bank_and_its_run_holds_both(base_folder, tmp_path, method):
    first = tiny.write_recipe(tmp_path, base_folder)
    tiny.write_task(tmp_path / "data", "food")
    run_stream(load(str(first), [f"method={method}"]), tmp_path / "first")
    later = tmp_path / "later.yaml"
    later.write_text(
        first.read_text().replace(
            "- name: pets\n  dataset: data/pets\n- name: weather\n  dataset: data/weather",
            "- name: food\n  dataset: data/food",
        )
    )
    found = run_stream(
        load(str(later), [f"method={method}"]), tmp_path / "later", from_bank=tmp_path / "first" / "bank"
    )
    assert (found["tasks"], found["exact"]) == (["food"], True)
    held = MaskBank.from_pretrained(tmp_path / "later" / "bank")
    assert held.tasks == ["pets", "weather", "food"]
    before = MaskBank.from_pretrained(tmp_path / "first" / "bank")
    assert held.manifest.tasks[:2] == before.manifest.tasks
    assert json.loads((tmp_path / "later" / "run.json").read_text())["from_bank"] == before.digest
    assert verify(tmp_path / "later", tiny.fresh(base_folder)).exact


@pytest.mark.slow
def test_a_stream_from_a_bank_is_resumed_wherever_it_stopped_and_from_that_bank_alone(
    base_folder, tmp_path, monkeypatch
):
    first = tiny.write_recipe(tmp_path, base_folder, ("pets",), method={"name": "supsup", "density": 0.3})
    tiny.write_task(tmp_path / "data", "food")
    place = tmp_path / "first" / "bank"
    run_stream(load(str(first)), tmp_path / "first")
    later = tmp_path / "later.yaml"
    later.write_text(
        first.read_text().replace("- name: pets\n  dataset: data/pets", "- name: food\n  dataset: data/food")
    )
    whole = run_stream(load(str(later)), tmp_path / "whole", from_bank=place)

    def stop(*_):
        raise KeyboardInterrupt

    for number, name in enumerate(("save_bank", "learn", "add_to")):
        run = tmp_path / f"run{number}"
        with monkeypatch.context() as patch:
            patch.setattr(f"hf_cl.train_stream.ContinualLearner.{name}", stop)
            with pytest.raises(KeyboardInterrupt):
                run_stream(load(str(later)), run, from_bank=place)
        if name == "save_bank":  # run.json is there, and the bank's copy is not
            with pytest.raises(RunError, match="Give --from-bank again"):
                run_stream(load(str(later)), run, resume=True)
        with pytest.raises(RunError, match="the same --from-bank"):
            run_stream(load(str(later)), run, resume=True, from_bank=tmp_path / "whole" / "bank")
        found = run_stream(load(str(later)), run, resume=True, from_bank=place)
        assert found["owned_digest_after"] == whole["owned_digest_after"]
        files = {file.name: file.read_bytes() for file in (tmp_path / "whole" / "bank").iterdir() if file.suffix}
        assert {file.name: file.read_bytes() for file in (run / "bank").iterdir() if file.suffix} == files


def test_a_bank_keeps_the_base_id_it_has(begun, bank, base_folder, tmp_path):
    learner = extended(bank, base_folder, tmp_path / "out")
    with pytest.raises(BankError, match="base_id: 'someone/else'"):
        MaskBank.from_learner(learner, base_id="someone/else")
    assert MaskBank.from_learner(learner, base_id="someone/tiny").digest == bank.digest


def test_a_fresh_process_extends_and_a_second_one_verifies(begun, bank, base_folder, tmp_path):
    code = """
import sys; sys.path.insert(0, "tests"); import tiny
from pathlib import Path
from hf_cl import MaskBank
bank = MaskBank.from_pretrained(sys.argv[1])
learner = bank.extend(tiny.fresh(Path(sys.argv[2])), None, None, tiny.arguments(Path(sys.argv[3])), max_length=8)
learner.learn(tiny.task("food"))
MaskBank.from_learner(learner).save_pretrained(sys.argv[1])
"""
    subprocess.run(
        [sys.executable, "-c", code, str(bank.folder), str(base_folder), str(tmp_path / "out")],
        check=True,
        capture_output=True,
    )
    opened = MaskBank.from_pretrained(bank.folder)
    assert opened.tasks == [*FIRST, "food"]
    found = logits_of(opened, base_folder)
    assert all(torch.equal(found[name], begun[1][name]) for name in FIRST)
    owner = opened.attach(tiny.fresh(base_folder).model).base_model.mask_layers()[0].store.owner
    assert {0, 1, FREE} <= set(owner.unique().tolist())


@pytest.mark.slow
def test_a_run_of_three_tasks_leaves_finished_ones_on_disk_and_may_start_from_them(base_folder, tmp_path):
    recipe = tiny.write_recipe(
        tmp_path, base_folder, ("pets", "weather", "food"), method={"name": "exssnet", "density": 0.1, "start": "kkt"}
    )
    found = run_stream(load(str(recipe)), tmp_path / "run")
    assert (found["exact"], found["forgetting"]) == (True, 0)
    assert set(found["facts"]["food"]["kkt"]["accuracies"]) == {"0", "1"}
