"""Opening and verifying a run: any bit that moved is seen, and the task and the part are named."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load, save

from hf_cl import open_run, verify
from hf_cl.errors import BankCorruptError, BaseModelError, ConfigError, HfClError
from hf_cl.layers.base import base_fingerprint
from hf_cl.methods import exssnet

pytest_plugins = ["tiny"]


@pytest.fixture
def base(base_folder):
    """Loads the tiny base: a run names a local base by its folder's name alone, so it must be given."""
    return lambda: tiny.fresh(base_folder)


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    """A saved run of two tasks with heads, values, masks and norms of their own, and its live learner."""
    place = tmp_path_factory.mktemp("runs")
    options = tiny.options("exssnet", train_norms=True)
    learner = tiny.learner(base_folder, options, place / "trainer")
    for name in ("pets", "weather"):
        learner.learn(tiny.task(name))
    learner.save_pretrained(place / "run")
    return place / "run", learner


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the saved run, to be spoilt."""
    return shutil.copytree(saved[0], tmp_path / "run")


def manifest_of(run):
    return json.loads((run / "run.json").read_text())


def spoil(run, index, change, *, cover=False):
    """Change a task's tensors in its file; `cover` also names it anew and signs the manifest, as a forger would."""
    body = json.loads((run / "bank" / "bank.json").read_text())
    entry = body["tasks"][index]["file"]
    file = run / "bank" / entry["name"]
    tensors = load(file.read_bytes())
    change(tensors)
    data = save(tensors)
    if not cover:
        file.write_bytes(data)
        return f"bank/{file.name}"
    file.unlink()
    sha = hashlib.sha256(data).hexdigest()
    entry.update(name=f"task-{index:05d}-{sha[:16]}.safetensors", sha256=sha, bytes=len(data))
    (run / "bank" / entry["name"]).write_bytes(data)
    sign(run, body)
    return f"bank/{entry['name']}"


def sign(run, body):
    """Write a bank's manifest with a right digest."""
    body.pop("digest", None)
    data = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest().encode()
    (run / "bank" / "bank.json").write_bytes(b'{"digest":"' + digest + b'",' + data[1:])


def flip(name, at=0):
    """Return a change of one element's lowest bit."""

    def change(tensors):
        found = next(tensor for key, tensor in tensors.items() if key == name or key.endswith(name))
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        found.view(-1).view(kinds[found.element_size()])[at] ^= 1

    return change


def flip_in_bitmap(tensors):
    """Move one kept entry of the first layer's mask: its code stays a code of as many entries."""
    from hf_cl.masks.coding import decode, encode

    codes, lengths = tensors["masks"].numpy().tobytes(), tensors["mask_lengths"].tolist()
    mask = decode(codes[: lengths[0]], 256, 16).copy()
    one, zero = mask.nonzero()[0][0], (~mask).nonzero()[0][0]
    mask[one], mask[zero] = False, True
    changed = encode(mask, 16)
    tensors["masks"] = torch.frombuffer(bytearray(changed + codes[lengths[0] :]), dtype=torch.uint8)
    tensors["mask_lengths"][0] = len(changed)


# --- opening -------------------------------------------------------------------------------------------------


def test_an_opened_run_answers_as_the_learner_that_saved_it(saved, base):
    run, learner = saved
    folder, _, method = open_run(run, base())
    assert [task["name"] for task in folder.tasks] == ["pets", "weather"]
    for index, name in enumerate(learner.tasks):
        learner.activate(name)
        method.activate(index)
        assert torch.equal(tiny.logits(method.model), tiny.logits(learner.model))
        assert method.parts(index) == learner.records[index]["parts"]


def test_a_run_is_opened_on_a_base_that_is_given(saved, base_folder):
    given = tiny.fresh(base_folder)
    _, opened, _ = open_run(saved[0], given)
    assert opened is given


def test_a_run_is_not_opened_on_another_base(saved, tmp_path):
    other = tiny.fresh(tiny.save_base(tmp_path / "other", seed=7))
    ours, theirs = manifest_of(saved[0])["fingerprint"], base_fingerprint(other.model, other.head)
    for what in (open_run, verify):
        with pytest.raises(BaseModelError) as caught:
            what(saved[0], other)
        assert ours[:16] in str(caught.value)
        assert theirs[:16] in str(caught.value)
        assert "Give that model" in str(caught.value)


def test_a_changed_file_is_not_opened(run, base):
    name = spoil(run, 1, flip("classifier.weight"))
    _, _, method = open_run(run, base())
    with pytest.raises(BankCorruptError, match=name.removeprefix("bank/")):
        method.activate(1)


# --- verifying -----------------------------------------------------------------------------------------------


def test_an_untouched_run_is_exact(saved, base):
    verdict = verify(saved[0], base())
    assert (verdict.exact, verdict.same_logits, verdict.files) == (True, True, [])
    assert [(task["name"], task["moved"]) for task in verdict.tasks] == [("pets", []), ("weather", [])]
    assert all(task["before"] == task["after"] for task in verdict.tasks)


SPOILT = {
    "a head's weight": (flip("classifier.weight"), "head"),
    "a norm's weight": (flip("LayerNorm.weight"), "head"),
    "an owned value": (flip("values"), "values"),
    "a mask's entry": (flip_in_bitmap, "masks|claims entries"),
}


@pytest.mark.parametrize("cover", [False, True], ids=["sha-as-it-was", "sha-corrected"])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("what", SPOILT)
def test_one_changed_element_is_seen_and_named(run, what, index, cover, base):
    change, moved = SPOILT[what]
    file = spoil(run, index, change, cover=cover)
    verdict = verify(run, base())
    assert not verdict.exact
    assert verdict.files == ([] if cover else [file])
    found = {task["name"]: task for task in verdict.tasks}
    name = ("pets", "weather")[index]
    assert re.search(moved if cover else "sha256", " ".join(found[name]["moved"])), found
    assert found[name]["before"] != found[name]["after"]
    if index == 1:
        assert found["pets"]["moved"] == []


@pytest.mark.parametrize("at", [0, 1, 20, -1])
def test_a_changed_mask_byte_is_a_verdict_and_no_crash(run, at, base):
    spoil(run, 0, flip("masks", at), cover=True)
    verdict = verify(run, base())
    assert not verdict.exact
    assert verdict.tasks[0]["moved"]


DAMAGE = {
    "no lengths": lambda tensors: tensors.pop("mask_lengths"),
    "no masks": lambda tensors: tensors.pop("masks"),
    "a length too few": lambda tensors: tensors.update(mask_lengths=tensors["mask_lengths"][:-1]),
    "no length at all": lambda tensors: tensors.update(mask_lengths=tensors["mask_lengths"][:0]),
    "a value too few": lambda tensors: tensors.update(values=tensors["values"][:-1]),
    "a value too many": lambda tensors: tensors.update(values=torch.cat([tensors["values"], tensors["values"][:1]])),
    "no values": lambda tensors: tensors.pop("values"),
    "a shifted length": lambda tensors: tensors["mask_lengths"].add_(torch.tensor([1, -1] + [0] * 10)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_tensors_that_do_not_fit_are_a_verdict_and_refused_by_open(run, what, base):
    spoil(run, 0, DAMAGE[what], cover=True)
    verdict = verify(run, base())
    assert not verdict.exact
    assert verdict.tasks[0]["moved"]
    with pytest.raises(HfClError):
        open_run(run, base())[2].activate(0)


def test_a_missing_file_is_a_verdict(run, base):
    file = next((run / "bank").glob("task-00000-*"))
    file.unlink()
    verdict = verify(run, base())
    assert (verdict.exact, verdict.files) == (False, [f"bank/{file.name}"])
    assert file.name in verdict.tasks[0]["moved"][0]
    assert verdict.tasks[1]["moved"] == ["an earlier task cannot be read"]


def test_a_moved_encoder_of_finetune_is_a_verdict(base_folder, tmp_path, base):
    learner = tiny.learner(base_folder, tiny.options("finetune"), tmp_path / "trainer")
    learner.learn(tiny.task())
    run = learner.save_pretrained(tmp_path / "run")
    file = run / manifest_of(run)["shared"]["file"]
    content = file.read_bytes()
    assert verify(run, base()).exact
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    verdict = verify(run, base())
    assert (verdict.exact, verdict.tasks[0]["moved"]) == (False, ["encoder"])


def test_a_missing_encoder_is_a_verdict_as_a_missing_mask_is(base_folder, tmp_path, base):
    learner = tiny.learner(base_folder, tiny.options("finetune"), tmp_path / "trainer")
    learner.learn(tiny.task())
    run = learner.save_pretrained(tmp_path / "run")
    file = run / manifest_of(run)["shared"]["file"]
    file.unlink()
    verdict = verify(run, base())
    assert not verdict.exact
    assert verdict.files == [manifest_of(run)["shared"]["file"]]


@pytest.mark.parametrize("key", ["density", "scale", "compose", "rank"])
def test_options_that_were_altered_do_not_pass_unseen(run, key, base):
    manifest = manifest_of(run)
    other = {"density": 0.2, "scale": 3.0, "compose": "prune", "rank": "magnitude"}[key]
    manifest["method"]["options"][key] = other
    (run / "run.json").write_text(json.dumps(manifest))
    if key in ("density", "rank"):
        assert verify(run, base()).same_logits  # nothing a forward reads depends on these: masks are stored
    else:
        with pytest.raises(ConfigError, match=f"{key}: .* for its whole life"):
            verify(run, base())


def test_an_altered_scale_of_a_layer_is_seen(base_folder, tmp_path, base):
    learner = tiny.learner(base_folder, tiny.options("supsup"), tmp_path / "trainer")
    learner.learn(tiny.task())
    run = learner.save_pretrained(tmp_path / "run")
    manifest = manifest_of(run)
    layer = next(iter(manifest["settled"]["scales"]))
    manifest["settled"]["scales"][layer] *= 2
    (run / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"scales: .* for its whole life"):
        verify(run, base())
    bank = json.loads((run / "bank" / "bank.json").read_text())
    for scales in (manifest["settled"]["scales"], bank["store"]["scales"]):
        scales[layer] *= 1 if scales is manifest["settled"]["scales"] else 2
    sign(run, bank)
    (run / "run.json").write_text(json.dumps(manifest))
    verdict = verify(run, base())
    assert (verdict.exact, verdict.tasks[0]["moved"]) == (False, ["values"])


def test_a_record_that_differs_from_the_banks_is_a_verdict(run, base):
    manifest = manifest_of(run)
    manifest["tasks"][1]["parts"]["masks"] = "0" * 64
    (run / "run.json").write_text(json.dumps(manifest))
    verdict = verify(run, base())
    assert (verdict.exact, verdict.files) == (False, ["bank/bank.json"])
    assert "say different things of task 'weather'" in verdict.tasks[0]["moved"][0]


def test_an_unknown_method_of_a_run_is_refused(run, base):
    manifest = manifest_of(run)
    manifest["method"]["name"] = "os"
    (run / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(HfClError, match="there is no 'os'"):
        open_run(run, base())


def test_the_options_of_a_run_are_those_of_its_method(saved):
    assert exssnet.Options(**manifest_of(saved[0])["method"]["options"]) == tiny.options("exssnet", train_norms=True)


def call_verify(run, model):
    command = [sys.executable, "-m", "hf_cl", "verify", str(run), "--model", str(model), "--json"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_fresh_process_says_so_by_its_exit_code(saved, run, base_folder):
    done = call_verify(saved[0], base_folder)
    assert (done.returncode, json.loads(done.stdout)["exact"]) == (0, True), done.stderr
    spoil(run, 0, flip("classifier.weight"), cover=True)
    done = call_verify(run, base_folder)
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["exact"]) == (1, False), done.stderr
    assert verdict["tasks"][0]["moved"] == ["head"]
