"""A bank is what was learned: whole, alone loadable, refused where a byte differs."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hf_cl import MaskBank, MaskConfig
from hf_cl.errors import BankConflictError, BankCorruptError, BankError, BaseMismatchError, ConfigError, HfClError
from hf_cl.storage import bank_folder, disk
from hf_cl.storage.manifest import MANIFEST, BaseEntry, FileEntry, Manifest, StoreEntry, Tombstone

pytest_plugins = ["tiny"]
NAMES = ("pets", "weather", "food")
SUBSETS = [("pets",), ("weather",), ("food",), ("food", "pets"), ("weather", "food"), NAMES]


@pytest.fixture(scope="module", params=[pytest.param("supsup", marks=pytest.mark.slow), "exssnet"])
def learned(request, base_folder, tmp_path_factory):
    """A learner of three tasks, its bank in a folder, and each task's logits."""
    place = tmp_path_factory.mktemp(request.param)
    learner = tiny.learner(base_folder, tiny.options(request.param), place / "out")
    for name in NAMES:
        learner.learn(tiny.task(name))
    logits = {}
    for name in NAMES:
        learner.activate(name)
        logits[name] = tiny.logits(learner.model)
    made = MaskBank.from_learner(learner, base_id="someone/tiny")
    return learner, made, made.save_pretrained(place / "bank"), logits


@pytest.fixture
def copy(learned, tmp_path):
    """A copy of the bank's folder to spoil."""
    return shutil.copytree(learned[2], tmp_path / "bank")


def base(base_folder):
    return tiny.fresh(base_folder).model


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_any_tasks_attach_alone_and_answer_with_the_same_bits(learned, base_folder, names):
    _, _, folder, logits = learned
    opened = MaskBank.from_pretrained(folder)
    model = opened.attach(base(base_folder), names)
    assert len(model.peft_config) == len(names)
    for name in (*names, names[0]):
        opened.activate(model, name)
        assert torch.equal(tiny.logits(model), logits[name])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_fresh_process_verifies_it_from_its_files(learned, base_folder):
    code = (
        "import sys, json; from hf_cl import MaskBank; from hf_cl.layers.base import load_base\n"
        "print(json.dumps(MaskBank.from_pretrained(sys.argv[1]).verify(load_base(sys.argv[2]).model)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(learned[2]), str(base_folder)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(task["name"], task["moved"], task["same_logits"], task["difference"]) for task in found] == [
        (name, [], True, 0.0) for name in NAMES
    ]


def test_opening_reads_the_manifest_only_and_attaching_what_a_task_inherits(learned, base_folder, monkeypatch):
    _, _, folder, _ = learned
    read = []
    plain = bank_folder.read_file
    monkeypatch.setattr(bank_folder, "read_file", lambda path, size: read.append(path.name) or plain(path, size))
    opened = MaskBank.from_pretrained(folder)
    assert read == [MANIFEST]
    files = {task.name: {opened.manifest.tasks[i].file.name for i in {task.index, *task.inherits}}
             for task in opened.manifest.tasks}  # fmt: skip
    model = opened.attach(base(base_folder), ["weather"])
    assert set(read[1:]) == files["weather"]
    opened.activate(model, "food")
    assert set(read[1:]) == files["weather"] | files["food"]


def test_values_are_stored_once_by_their_owner_and_none_for_a_mask_alone(learned):
    learner, made, folder, _ = learned
    kept = sum(layer.count("task0") for layer in learner.method.tuner.mask_layers())
    stored = [load_file(folder / task.file.name).get("values") for task in made.manifest.tasks]
    if learner.method_name == "supsup":
        assert stored == [None] * 3
        return
    assert len(stored[0]) == kept
    owned = sum(int((layer.store.owner >= 0).sum()) for layer in learner.method.tuner.mask_layers())
    assert sum(map(len, stored)) == owned < 3 * kept


def test_the_same_learner_gives_the_same_bytes(learned):
    learner, made, folder, _ = learned
    again = MaskBank.from_learner(learner, base_id="someone/tiny")
    assert again.digest == made.digest
    assert (folder / MANIFEST).read_bytes() == again.manifest.to_bytes()


def test_no_path_and_no_name_of_a_task_is_in_a_file_name_or_the_manifest(learned, base_folder):
    _, _, folder, _ = learned
    assert str(base_folder) not in (folder / MANIFEST).read_text()
    assert not any(name in file.name for name in NAMES for file in folder.iterdir())


def test_a_digest_pins_a_bank(learned):
    _, made, folder, _ = learned
    assert MaskBank.from_pretrained(folder, expected_digest=made.digest).digest == made.digest
    with pytest.raises(BankError, match="Do not use it"):
        MaskBank.from_pretrained(folder, expected_digest="0" * 64)


@pytest.mark.parametrize("method", ["ssnet", "finetune"])
def test_methods_that_overwrite_or_have_no_masks_give_no_bank(base_folder, tmp_path, method):
    learner = tiny.learner(base_folder, tiny.options(method), tmp_path)
    learner.learn(tiny.task("pets"))
    with pytest.raises(BankError, match="keep their run folder"):
        MaskBank.from_learner(learner)


def test_a_bank_with_linears_left_out_loads_again(base_folder, tmp_path):
    config = MaskConfig(density=0.3, exclude_modules=["attention.self.key"])
    learner = tiny.learner(base_folder, config, tmp_path / "out")
    learner.learn(tiny.task("pets"))
    logits = tiny.logits(learner.model)
    folder = MaskBank.from_learner(learner).save_pretrained(tmp_path / "bank")
    assert torch.equal(tiny.logits(MaskBank.from_pretrained(folder).attach(base(base_folder))), logits)


# --- use ------------------------------------------------------------------------------------------------------


def test_two_pipelines_share_a_model_and_take_turns(learned, base_folder):
    learner, _, folder, _ = learned
    opened, loaded = MaskBank.from_pretrained(folder), tiny.fresh(base_folder)
    model = opened.attach(loaded.model)
    pets = opened.pipeline("pets", model, loaded.tokenizer)
    weather = opened.pipeline("weather", model, loaded.tokenizer)
    texts = ["cat milk", "snow wind", "red dog"]
    expected = {}
    for name, pipe in (("pets", pets), ("weather", weather)):
        expected[name] = [pipe(text)[0] for text in texts]
        assert {answer["label"] for answer in expected[name]} <= set(tiny.LABELS[name])
    turns = zip(pets(text for text in texts), weather(text for text in texts), strict=True)
    for place, (one, other) in enumerate(turns):
        assert (one["label"], other["label"]) == tuple(expected[name][place]["label"] for name in ("pets", "weather"))
    learner.activate("pets")
    encoded = loaded.tokenizer(texts[0], return_tensors="pt")
    with torch.no_grad():
        scores = learner.model.eval()(**encoded).logits.softmax(-1)
    # The pipeline's softmax is numpy's, in another order of rounding.
    assert expected["pets"][0]["score"] == pytest.approx(scores.max().item(), abs=1e-6)


def test_a_pipeline_takes_the_bases_name_and_two_of_them_share_its_model(learned, base_folder):
    opened, loaded = MaskBank.from_pretrained(learned[2]), tiny.fresh(base_folder)
    pets, weather = (opened.pipeline(name, str(base_folder)) for name in ("pets", "weather"))
    assert pets.model is weather.model
    model = MaskBank.from_pretrained(learned[2]).attach(loaded.model)
    assert pets("cat milk") == MaskBank.from_pretrained(learned[2]).pipeline("pets", model, loaded.tokenizer)(
        "cat milk"
    )
    assert weather("snow")[0]["label"] in tiny.LABELS["weather"]
    with pytest.raises(ConfigError, match="needs the base's tokenizer"):
        opened.pipeline("pets", model)


def test_a_second_bank_on_the_same_base_is_refused(learned, base_folder):
    opened, plain = MaskBank.from_pretrained(learned[2]), base(base_folder)
    opened.attach(plain)
    with pytest.raises(BankError, match="cannot be joined"):
        MaskBank.from_pretrained(learned[2]).attach(plain)


def test_a_checkpoint_answers_without_this_package(learned, base_folder, tmp_path):
    _, _, folder, _ = learned
    loaded = tiny.fresh(base_folder)
    out = MaskBank.from_pretrained(folder).export("weather", loaded.model, tmp_path / "out", tokenizer=loaded.tokenizer)
    code = (
        "import sys, torch; from safetensors.torch import save_file\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()\n"
        "AutoTokenizer.from_pretrained(sys.argv[1]); assert 'hf_cl' not in sys.modules\n"
        "ids = torch.arange(12).view(2, 6) + 4\n"
        "with torch.no_grad():\n    logits = model(input_ids=ids).logits\n"
        "save_file({'logits': logits}, sys.argv[2]); print(model.config.id2label)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out), str(tmp_path / "logits")], capture_output=True, text=True, check=True
    )
    assert str(dict(enumerate(tiny.LABELS["weather"]))) in done.stdout
    opened = MaskBank.from_pretrained(folder)
    model = opened.attach(base(base_folder), ["weather"])
    with torch.no_grad():
        logits = model(input_ids=torch.arange(12).view(2, 6) + 4).logits
    assert torch.equal(load_file(tmp_path / "logits")["logits"], logits)


def test_a_peft_folder_loads_by_itself_and_leaves_the_base_unwrapped(learned, base_folder, tmp_path):
    _, _, folder, logits = learned
    plain = base(base_folder)
    names = [name for name, _ in plain.named_modules()]
    out = MaskBank.from_pretrained(folder).export("food", plain, tmp_path / "out", to="peft")
    assert [name for name, _ in plain.named_modules()] == names
    model = PeftModel.from_pretrained(plain, out / "task2", adapter_name="food")
    assert torch.equal(tiny.logits(model), logits["food"])


@pytest.mark.parametrize("to", ["peft", "checkpoint"])
@pytest.mark.parametrize("base_id", [None, "someone/tiny"])
def test_an_export_writes_no_path_of_this_machine(learned, base_folder, tmp_path, to, base_id):
    opened, loaded = MaskBank.from_learner(learned[0], base_id=base_id), base(base_folder)
    folder = opened.export("pets", loaded, tmp_path / "out", to=to, tokenizer=tiny.tokenizer())
    written = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    assert not any(str(base_folder).encode() in data for data in written)
    if to == "peft":
        assert loaded.name_or_path == str(base_folder)
        named = json.loads(next(folder.rglob("adapter_config.json")).read_text())["base_model_name_or_path"]
        assert named == (base_id or "the-base")


def test_an_export_to_something_else_or_into_a_full_folder_is_refused(learned, base_folder, tmp_path):
    opened, plain = MaskBank.from_pretrained(learned[2]), base(base_folder)
    with pytest.raises(ConfigError, match="checkpoint, peft"):
        opened.export("pets", plain, tmp_path, to="onnx")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        opened.export("pets", plain, tmp_path)
    assert not hasattr(plain, "peft_config")


# --- what is refused ------------------------------------------------------------------------------------------


def test_another_base_is_refused_and_left_unwrapped(learned, tmp_path):
    other = base(tiny.save_base(tmp_path / "other", seed=1))
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(BaseMismatchError, match="with fingerprint"):
        MaskBank.from_pretrained(learned[2]).attach(other)
    assert [name for name, _ in other.named_modules()] == names


def test_unknown_tasks_are_refused_by_name(learned, base_folder):
    opened = MaskBank.from_pretrained(learned[2])
    with pytest.raises(ConfigError, match="holds pets, weather, food"):
        opened.attach(base(base_folder), ["cars"])
    model = opened.attach(base(base_folder), ["pets"])
    with pytest.raises(ConfigError, match="holds pets, weather, food"):
        opened.activate(model, "cars")


def test_a_task_is_detached_and_read_again_and_the_others_answer_as_before(learned, base_folder):
    _, _, folder, logits = learned
    opened = MaskBank.from_pretrained(folder)
    model = opened.attach(base(base_folder))
    with pytest.raises(ConfigError, match="is active"):
        opened.detach(model, "pets")
    for name in ("weather", "food"):
        opened.detach(model, name)
    assert list(model.peft_config) == ["task0"]
    for name in ("food", "pets", "weather"):
        opened.activate(model, name)
        assert torch.equal(tiny.logits(model), logits[name])


def test_a_batch_whose_rows_belong_to_several_tasks_is_answered_in_one_call(learned, base_folder):
    _, _, folder, logits = learned
    opened = MaskBank.from_pretrained(folder)
    model = opened.attach(base(base_folder))
    ids = torch.randint(len(tiny.vocabulary()), (5, 7), generator=torch.Generator().manual_seed(1))
    tasks = ["food", "pets", "food", "weather", "pets"]
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=opened.adapter_names(tasks))
    for row, name in enumerate(tasks):
        width = logits[name].shape[1]
        assert torch.allclose(
            mixed.logits[row, :width], logits[name][row], atol=1e-6
        )  # other batch sizes, other kernels


def test_a_folder_that_is_no_bank_is_refused(tmp_path):
    with pytest.raises(BankCorruptError, match="no bank"):
        MaskBank.from_pretrained(tmp_path)


def opens(folder, base_folder):
    """Open and attach a bank; return its logits by task."""
    opened = MaskBank.from_pretrained(folder)
    model = opened.attach(base(base_folder))
    found = {}
    for name in opened.tasks:
        opened.activate(model, name)
        found[name] = tiny.logits(model)
    return found


def rewrite(folder, change):
    """Change a manifest's values and sign it anew, as an attacker would."""
    body = json.loads((folder / MANIFEST).read_bytes())
    body.pop("digest")
    change(body)
    data = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest()
    (folder / MANIFEST).write_bytes(b'{"digest":"' + digest.encode() + b'",' + data[1:])


HOSTILE = {
    "a path as file name": lambda body: body["tasks"][0]["file"].update(name="../../etc/passwd"),
    "an absolute file name": lambda body: body["tasks"][0]["file"].update(name="/etc/passwd"),
    "a file of another task": lambda body: body["tasks"][0].update(file=body["tasks"][1]["file"]),
    "two tasks of one name": lambda body: body["tasks"][0].update(name=body["tasks"][1]["name"].upper()),
    "no name": lambda body: body["tasks"][0].update(name=" "),
    "numbers that fall": lambda body: body["tasks"].reverse(),
    "a number too large": lambda body: body["tasks"][2].update(index=99999),
    "inheriting from itself": lambda body: body["tasks"][1].update(inherits=[1]),
    "sharing a later head": lambda body: body["tasks"][1].update(head_of=2),
    "density 0": lambda body: body["tasks"][0].update(density=0),
    "density 2": lambda body: body["tasks"][0].update(density=2.0),
    "fewer labels": lambda body: body["tasks"][1]["labels"].pop(),
    "double labels": lambda body: body["tasks"][1].update(labels=["a", "a", "b"]),
    "no labels": lambda body: body["tasks"][1].update(labels=[]),
    "a list for a number": lambda body: body["tasks"][1].update(index=[1]),
    "true for a number": lambda body: body["tasks"][1].update(index=True),
    "an unknown key": lambda body: body["tasks"][1].update(trust_remote_code=True),
    "a key too few": lambda body: body["tasks"][1].pop("parts"),
    "another format": lambda body: body.update(format="zip"),
    "a later version": lambda body: body.update(version=2),
    "another form": lambda body: body["store"].update(compose="pickle"),
    "other scales": lambda body: body["store"]["scales"].popitem(),
    "another target": lambda body: body["store"].update(targets=["attention.self.query"]),
    "another head": lambda body: body["store"].update(head=["bert.pooler.dense"]),
    "a huge file": lambda body: body["tasks"][0]["file"].update(bytes=10**15),
    "other shapes": lambda body: body["store"]["shapes"].update({body["store"]["layers"][0]: [1, 256]}),
    "shapes too large": lambda body: body["store"]["shapes"].update({body["store"]["layers"][0]: [10**9, 10**9]}),
    "another order of layers": lambda body: body["store"]["layers"].reverse(),
    "a tombstone of a task that is there": lambda body: body["tombstones"].append(
        {"index": 0, "density": 1.0, "values_dtype": "bfloat16", "trains": "nothing", "file": body["tasks"][0]["file"]}
    ),
    "a method that is not known": lambda body: body["tasks"][0]["method"].update(name="os"),
    "a method that is no name": lambda body: body["tasks"][0]["method"].update(name=["os"]),
    "another tokenizer": lambda body: body["base"].update(tokenizer="none"),
    "another base": lambda body: body["base"].update(fingerprint="0" * 64),
    "another training": lambda body: body["tasks"][0].update(trains="mask"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused(copy, base_folder, case):
    rewrite(copy, HOSTILE[case])
    with pytest.raises(HfClError):
        opens(copy, base_folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("mask_lengths"),
        lambda tensors: tensors.update(mask_lengths=tensors["mask_lengths"] * 2),
        lambda tensors: tensors.update(mask_lengths=-tensors["mask_lengths"]),
        lambda tensors: tensors.update(masks=tensors["masks"].flip(0)),
        lambda tensors: tensors.update(masks=tensors["masks"].float()),
        lambda tensors: tensors["head.classifier.weight"].fill_(float("nan")),
        lambda tensors: tensors.update({"head.classifier.weight": torch.zeros(1000, 16)}),
        lambda tensors: tensors.update({"head.classifier.weight": tensors["head.classifier.weight"].double()}),
        lambda tensors: tensors.pop("head.classifier.bias"),
        lambda tensors: tensors.update(extra=torch.zeros(1)),
    ],
)
def test_a_hostile_task_file_with_the_right_digests_is_refused(copy, base_folder, change):
    body = json.loads((copy / MANIFEST).read_bytes())
    file = copy / body["tasks"][0]["file"]["name"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    data = file.read_bytes()
    sha = hashlib.sha256(data).hexdigest()
    entry = {"name": f"task-00000-{sha[:16]}.safetensors", "sha256": sha, "bytes": len(data)}
    file.rename(copy / entry["name"])
    rewrite(copy, lambda body: body["tasks"][0].update(file=entry))
    with pytest.raises(BankCorruptError, match="pets"):
        opens(copy, base_folder)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "gone"])
def test_what_is_no_regular_file_is_refused_at_once(copy, base_folder, kind):
    file = copy / Manifest.from_bytes((copy / MANIFEST).read_bytes()).tasks[0].file.name
    aside = file.rename(copy.parent / "aside")
    if kind == "symlink":
        file.symlink_to(aside)
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    with pytest.raises(BankCorruptError, match=file.name):
        opens(copy, base_folder)


# --- saving ---------------------------------------------------------------------------------------------------


def longer(learned):
    """Return the bank of the learner's first two tasks, and the whole one."""
    _, made, _, _ = learned
    manifest = made.manifest
    blobs = {file.name: made._bytes(file) for file in manifest.files}
    tasks = manifest.tasks[:2]
    first = replace(manifest, generation=0, tasks=tasks, next_index=2)
    grown = replace(manifest, grown_from=[first.digest])
    return MaskBank(first, blobs=blobs), MaskBank(grown, blobs=blobs)


def test_a_save_that_dies_at_any_call_leaves_the_old_bank_or_the_new_one(learned, tmp_path, base_folder, monkeypatch):
    old, new = longer(learned)
    calls = {"count": 0, "die_at": None}

    def counted(plain):
        def call(*args, **kwargs):
            calls["count"] += 1
            if calls["count"] == calls["die_at"]:
                raise OSError(28, "No space left on device")
            return plain(*args, **kwargs)

        return call

    monkeypatch.setattr(disk.os, "fsync", counted(os.fsync))
    monkeypatch.setattr(disk.Path, "replace", counted(disk.Path.replace))
    monkeypatch.setattr(disk.Path, "open", counted(disk.Path.open))
    seen = set()
    for die_at in range(1, 40):
        folder = tmp_path / str(die_at)
        calls["die_at"] = None
        MaskBank(old.manifest, blobs=old._blobs).save_pretrained(folder)
        held = MaskBank(new.manifest, folder=folder, blobs=new._blobs)
        calls.update(count=0, die_at=die_at)
        with contextlib.suppress(OSError):
            held.save_pretrained(folder)
        finished, calls["die_at"] = calls["count"] < die_at, None
        opened = MaskBank.from_pretrained(folder)
        for task in opened.manifest.tasks:
            opened._open(task)
        seen.add(opened.digest)
        assert opened.digest in (old.digest, new.digest)
        if finished:
            break
    assert finished
    assert seen == {old.digest, new.digest}


def test_a_rival_that_saved_first_wins_and_the_other_is_told(learned, tmp_path):
    old, new = longer(learned)
    old.save_pretrained(tmp_path / "bank")
    rival = MaskBank(replace(new.manifest, grown_from=[]), blobs=new._blobs)
    with pytest.raises(BankConflictError, match="extend"):
        rival.save_pretrained(tmp_path / "bank")
    assert MaskBank.from_pretrained(tmp_path / "bank").digest == old.digest


def test_a_bank_that_was_replaced_since_it_was_opened_is_not_overwritten(learned, tmp_path):
    old, new = longer(learned)
    folder = old.save_pretrained(tmp_path / "bank")
    opened = MaskBank.from_pretrained(folder)
    MaskBank(new.manifest, folder=folder, blobs=new._blobs).save_pretrained(folder)
    with pytest.raises(BankConflictError, match="extend"):
        opened.save_pretrained(folder)
    assert MaskBank.from_pretrained(folder).digest == new.digest


def test_saving_sweeps_what_no_manifest_names_and_nothing_else(learned, copy):
    (copy / "task-00009-0123456789abcdef.safetensors").write_bytes(b"old")
    (copy / "notes.txt").write_text("mine")
    MaskBank.from_pretrained(copy).save_pretrained(copy)
    assert not (copy / "task-00009-0123456789abcdef.safetensors").exists()
    assert (copy / "notes.txt").read_text() == "mine"


def test_a_folder_that_holds_other_things_is_not_taken(learned, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BankError, match=r"notes\.txt"):
        learned[1].save_pretrained(tmp_path)


# --- the format, pinned ---------------------------------------------------------------------------------------


def test_the_manifest_has_these_very_bytes():
    left = FileEntry(f"left-00001-{'a' * 16}.safetensors", "a" * 64, 9)
    manifest = Manifest(
        generation=3,
        base=BaseEntry("a/b", None, "float32", "f" * 64, "e" * 64),
        store=StoreEntry("delta", 7, 1.5, ["x.y"], {"x.y": 0.25}, {"x.y": [2, 3]}, ["y"], ["z"], ["classifier"], False),
        tasks=[],
        tombstones=[Tombstone(1, 0.5, "bfloat16", "claimed", left)],
        shared=None,
        next_index=2,
        grown_from=["c" * 64],
    )
    body = (
        b'"base":{"dtype":"float32","fingerprint":"' + b"f" * 64 + b'","id":"a/b","revision":null,'
        b'"tokenizer":"'
        + b"e" * 64
        + b'"},"format":"hf_cl-bank","generation":3,"grown_from":["'
        + b"c" * 64
        + b'"],"next_index":2,"shared":null,'
        b'"store":{"compose":"delta","exclude":["z"],"head":["classifier"],"layers":["x.y"],"scale":1.5,'
        b'"scales":{"x.y":0.25},"seed":7,"shapes":{"x.y":[2,3]},"targets":["y"],"train_norms":false},"tasks":[],'
        b'"tombstones":[{"density":0.5,"file":{"bytes":9,"name":"left-00001-aaaaaaaaaaaaaaaa.safetensors",'
        b'"sha256":"' + b"a" * 64 + b'"},"index":1,"trains":"claimed","values_dtype":"bfloat16"}],"version":1}'
    )
    digest = hashlib.sha256(b"{" + body).hexdigest().encode()
    assert manifest.to_bytes() == b'{"digest":"' + digest + b'",' + body
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
