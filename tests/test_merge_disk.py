"""Merging on disk: the bits of the rules in memory, whole or not at all, in little memory, and what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)
from typer.testing import CliRunner

from hf_cl import merge_checkpoints
from hf_cl.checkpoints import writer as writing
from hf_cl.checkpoints.reader import boxes, open_checkpoint
from hf_cl.checkpoints.writer import ShardWriter
from hf_cl.cli.app import app
from hf_cl.disk_merge import fetch as fetching
from hf_cl.disk_merge import sources as slicing
from hf_cl.errors import ConfigError, MergeError
from hf_cl.merging._check import specs
from hf_cl.merging.average import average
from hf_cl.merging.dare import dare
from hf_cl.merging.fisher import fisher
from hf_cl.merging.sfa import sfa
from hf_cl.merging.task_arithmetic import task_arithmetic
from hf_cl.merging.ties import ties
from hf_cl.merging.wise_ft import wise_ft
from hf_cl.storage import new_folder as placing

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 16}  # fmt: skip
PREFIX, POSITIONS = "bert.", "bert.embeddings.position_ids"


def save(folder, seed, labels=2, kind=BertForSequenceClassification, dtype=torch.float32, near=None, shard="5GB"):
    """Save a tiny model; `near` another one, its encoder is a little off that one's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(BertConfig(**SIZES, num_labels=labels))
        if near is not None:
            held = near.state_dict()
            for name, tensor in model.state_dict().items():
                if name in held and name.startswith(PREFIX):
                    tensor.copy_(held[name] + 0.1 * torch.randn_like(tensor))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model


def load(folder):
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def encoder(folder):
    return {name: tensor for name, tensor in load(folder).items() if name.startswith(PREFIX)}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for name, tensor in expected.items()
    )


@pytest.fixture(scope="module", params=[(torch.float32, "5GB"), (torch.bfloat16, "2KB")], ids=["whole", "bf16-shards"])
def three(request, tmp_path_factory):
    """A base and two models near it, of 3 and 4 labels; in one file each, or in bfloat16 and many shards."""
    dtype, shard = request.param
    folder = tmp_path_factory.mktemp("three")
    base = save(folder / "base", 0, dtype=dtype, shard=shard)
    near = BertForSequenceClassification(base.config)
    near.load_state_dict(base.state_dict())
    for seed, (name, labels) in enumerate((("a", 3), ("b", 4)), 1):
        save(folder / name, seed, labels, dtype=dtype, near=near, shard=shard)
        information = {key: tensor.float() ** 2 for key, tensor in encoder(folder / name).items()}
        save_file(information, folder / f"{name}.fisher.safetensors")
    assert (len(list((folder / "base").glob("*.safetensors"))) > 5) == (shard != "5GB")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """As `three`, in one file each, with a tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    base = save(folder / "base", 0)
    tiny.tokenizer().save_pretrained(folder / "base")
    save(folder / "a", 1, 3, near=base)
    save(folder / "b", 2, 4, near=base)
    return folder


@pytest.fixture
def copy(plain, tmp_path):
    """A copy of `plain` to spoil."""
    shutil.copytree(plain, tmp_path / "in")
    return tmp_path / "in"


def merge(folder, out, rule="task_arithmetic", models=("a", "b"), **how):
    return merge_checkpoints(rule, folder / "base", [folder / name for name in models], out, **how)


# rule -> (options, models, the same in memory of a base, its models and their Fishers)
RULES = {
    "average": ({"weights": [1, 3]}, 2, lambda b, m, f: average(m, [1, 3])),
    "dare": ({"density": 0.4, "seed": 5}, 1, lambda b, m, f: dare(b, m[0], 0.4, seed=5)),
    "fisher": ({"weights": [2, 1]}, 2, lambda b, m, f: fisher(m, f, [2, 1])),
    "sfa": ({"beta": 0.3}, 1, lambda b, m, f: sfa(m[0], b, 0.3)),
    "task_arithmetic": ({"scale": 0.4, "weights": [1, -2]}, 2, lambda b, m, f: task_arithmetic(b, m, 0.4, [1, -2])),
    "ties": ({"density": 0.3, "scale": 1.5}, 2, lambda b, m, f: ties(b, m, 0.3, 1.5)),
    "ties tensor sum": (
        {"density": 0.3, "scope": "tensor", "merge": "sum"}, 2,
        lambda b, m, f: ties(b, m, 0.3, scope="tensor", merge="sum"),
    ),
    "wise_ft": ({"alpha": 0.7}, 1, lambda b, m, f: wise_ft(b, m[0], 0.7)),
}  # fmt: skip


# --- the result ---------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1 << 20, 50])
@pytest.mark.parametrize("case", RULES)
def test_the_result_is_that_of_memory_bit_for_bit_in_any_slices(three, tmp_path, monkeypatch, case, entries):
    monkeypatch.setattr(slicing, "ENTRIES", entries)
    options, count, in_memory = RULES[case]
    rule, names = case.split()[0], ["a", "b"][:count]
    fishers = [three / f"{name}.fisher.safetensors" for name in names]
    out = merge(three, tmp_path / "out", rule, names, options=options, fishers=fishers if rule == "fisher" else ())
    expected = in_memory(encoder(three / "base"), [encoder(three / n) for n in names], [load_file(f) for f in fishers])
    assert same(encoder(out), expected)
    head = {name: tensor for name, tensor in load(three / "base").items() if not name.startswith(PREFIX)}
    assert same({name: tensor for name, tensor in load(out).items() if not name.startswith(PREFIX)}, head)
    assert not same(encoder(out), encoder(three / "base"))


@pytest.mark.parametrize("entries", [1 << 20, 50])
def test_dare_before_a_rule_is_dare_then_the_rule(three, tmp_path, monkeypatch, entries):
    monkeypatch.setattr(slicing, "ENTRIES", entries)
    out = merge(three, tmp_path / "out", "ties", options={"density": 0.5}, dare={"density": 0.6, "seed": 9})
    base = encoder(three / "base")
    sparse = [dare(base, encoder(three / name), 0.6, seed=9 + number) for number, name in enumerate("ab")]
    assert same(encoder(out), ties(base, sparse, 0.5))


def test_ties_keeps_the_exact_share_though_it_only_ever_sees_slices(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(slicing, "ENTRIES", 40)
    out = merge(plain, tmp_path / "out", "ties", ["a"], options={"density": 0.25})
    before, after = encoder(plain / "base"), encoder(out)
    size = sum(tensor.numel() for tensor in before.values())
    moved = sum(int((after[name] != before[name]).sum()) for name in before)
    # A kept direction may be too small for its weight in float32; none is added.
    assert 0 <= round(0.25 * size) - moved <= 2


def test_shards_and_index_are_read_back_by_transformers(plain, tmp_path):
    out = merge(plain, tmp_path / "out", max_shard_size="8KB")
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load(out).values())
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert same(dict(model.state_dict()), load(out))
    assert AutoTokenizer.from_pretrained(out)("red dog")["input_ids"]


def test_each_task_keeps_its_head_beside_the_merged_encoder(plain, tmp_path):
    out = merge(plain, tmp_path / "out", heads="each", max_shard_size="8KB")
    merged = encoder(merge(plain, tmp_path / "one"))
    assert not list(out.glob("*.safetensors"))
    for place, (name, labels) in enumerate((("a", 3), ("b", 4))):
        folder = out / f"task-{place}"
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()) and model.config.num_labels == labels
        own = {key: tensor for key, tensor in load(plain / name).items() if not key.startswith(PREFIX)}
        assert same(dict(model.state_dict()), {**merged, **own})
        assert (folder / "tokenizer.json").is_file() and (folder / "README.md").is_file()
    first, second = (sorted((out / f"task-{n}").glob("encoder*.safetensors")) for n in (0, 1))
    assert [file.stat().st_ino for file in first] == [file.stat().st_ino for file in second], "one copy on the disk"


def test_a_file_system_without_links_gets_copies(plain, tmp_path, monkeypatch):
    def none(*args, **how):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    linked = merge(plain, tmp_path / "linked", heads="each")
    monkeypatch.setattr(os, "link", none)
    out = merge(plain, tmp_path / "out", heads="each")
    files = [out / f"task-{n}" / "encoder.safetensors" for n in (0, 1)]
    assert files[0].stat().st_ino != files[1].stat().st_ino
    assert same(load(out / "task-1"), load(linked / "task-1"))


def test_heads_of_one_task_are_merged_when_asked(plain, tmp_path):
    for name in ("x", "y"):
        save(tmp_path / name, len(name) + ord(name), 2)
    out = merge_checkpoints(
        "average", tmp_path / "x", [tmp_path / "x", tmp_path / "y"], tmp_path / "out", heads="merge"
    )
    assert same(load(out), average([load(tmp_path / "x"), load(tmp_path / "y")]))


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_base_without_the_prefix_or_with_another_head_goes_with_classifiers(tmp_path, kind):
    base = save(tmp_path / "base", 0, kind=kind)
    save(tmp_path / "a", 1, 3)
    if kind is BertForMaskedLM:  # which has no pooler: the classifier's is its own then
        how = {"head_modules": ["bert.pooler"]}
        with pytest.raises(MergeError, match=r"a: has bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight, which"):
            merge(tmp_path, tmp_path / "out", models=["a"])
    else:
        how = {}
    out = merge(tmp_path, tmp_path / "out", models=["a"], options={"scale": 1.0}, **how)
    assert load(out).keys() == load(tmp_path / "base").keys()
    each = merge(tmp_path, tmp_path / "each", models=["a"], options={"scale": 1.0}, heads="each", **how)
    model, info = AutoModelForSequenceClassification.from_pretrained(each / "task-0", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(dict(model.state_dict()), load(tmp_path / "a"), rtol=0, atol=1e-6)
    assert base.config.model_type == "bert"


def test_a_checkpoint_of_2018_is_the_same_base(copy, tmp_path):
    """Old names of norms, and position numbers that libraries saved then."""
    expected = load(merge(copy, tmp_path / "new"))

    def renamed(tensors, *pairs):
        for new, old in pairs:
            tensors = {name.replace(f"LayerNorm.{new}", f"LayerNorm.{old}"): t for name, t in tensors.items()}
        return tensors

    old = renamed(load(copy / "base"), ("weight", "gamma"), ("bias", "beta"))
    save_file({**old, POSITIONS: torch.arange(16)}, copy / "base" / "model.safetensors")
    found = load(merge(copy, tmp_path / "out"))
    assert found.pop(POSITIONS).tolist() == list(range(16))
    assert found.keys() == old.keys() != expected.keys()
    assert same(renamed(found, ("gamma", "weight"), ("beta", "bias")), expected)


def test_the_card_names_rule_weights_and_sources_and_no_path(plain, tmp_path):
    out = merge(plain, tmp_path / "out", options={"scale": 0.25, "weights": [1, -0.5]})
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and {"merge", "hf_cl"} <= set(card.data.tags)
    for text in ("task_arithmetic", "scale: `0.25`", "| model | a | 1 |", "| model | b | -0.5 |", "| base | base |"):
        assert text in card.text.replace("&#95;", "_"), text
    assert str(plain) not in str(card) + (out / "merge.json").read_text()


def test_the_bar_counts_every_pass_over_the_entries(plain, tmp_path, capsys):
    merge(plain, tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    merge(plain, tmp_path / "out", "ties", progress=True)
    size = sum(tensor.numel() for tensor in encoder(plain / "base").values())
    last = capsys.readouterr().err.rpartition("ties: 100%")[2]  # what follows depends on bars that others left open
    assert f"{4 * size / 1000:.1f}k/" in last


# --- files --------------------------------------------------------------------------------------


def test_the_writers_bytes_are_the_librarys(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "é": torch.arange(4), "none": torch.zeros(0, 3),
               "one": torch.tensor(2.5)}  # fmt: skip
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    with ShardWriter(tmp_path, specs(tensors), name="ours") as writer:
        for name, tensor in reversed(tensors.items()):
            for start, box in reversed(list(boxes(tensor.shape, 4))):
                writer.write(name, start, tensor[box].reshape(-1) if box else tensor)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0), (4, 7), (2, 3, 4), (1, 30), (30, 1), (2, 1, 9)])
@pytest.mark.parametrize("entries", [1, 4, 6, 100])
def test_boxes_cut_a_tensor_into_runs_in_storage_order(shape, entries):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    runs = [(start, tensor[box].reshape(-1)) for start, box in boxes(shape, entries)]
    assert all(len(run) <= entries and (not len(run) or run[0] == start) for start, run in runs)
    assert torch.cat([run for _, run in runs] or [tensor.reshape(-1)]).tolist() == list(range(tensor.numel()))


# --- memory -------------------------------------------------------------------------------------

ROWS, COLUMNS = 3072, 1024
LARGEST = 4 * ROWS * COLUMNS


@pytest.mark.slow
def test_memory_stays_under_four_times_the_largest_tensor_whatever_the_size(plain, tmp_path):
    """Six tensors of 12 MB, three checkpoints in three shards each."""
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        (tmp_path / name).mkdir()
        for shard in range(3):
            part = {f"t{shard}{n}": torch.randn(ROWS, COLUMNS, generator=generator) for n in range(2)}
            save_file(part, tmp_path / name / f"model-{shard + 1:05d}-of-00003.safetensors")
        weight_map = {f"t{s}{n}": f"model-{s + 1:05d}-of-00003.safetensors" for s in range(3) for n in range(2)}
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ways = [["disk", "ties", {}], ["disk", "task_arithmetic", {}], ["disk", "average", {}],
            ["memory", "ties", {"density": 0.2}]]  # fmt: skip
    command = [sys.executable, Path(__file__).with_name("merge_watch.py"), json.dumps(ways), plain, tmp_path]
    done = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *ours, control = json.loads(done.stdout.strip().splitlines()[-1])
    shutil.rmtree(tmp_path)
    assert max(ours) < 4 * LARGEST, ours
    assert control > 12 * LARGEST, "the control: whole state dicts take far more, and the watcher sees it"


# --- whole or not at all ------------------------------------------------------------------------


def refused(folder, out, match, error=MergeError, **how):
    """Assert a refusal that leaves nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=match):
        merge(folder, out, **how)
    assert sorted(out.parent.iterdir()) == before


def test_a_disk_that_fills_up_leaves_nothing(plain, tmp_path, monkeypatch):
    real, room = writing.ShardWriter._put, []

    def full(*args):
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room.pop()
        real(*args)

    monkeypatch.setattr(writing.ShardWriter, "_put", staticmethod(full))
    size = len(load(plain / "base"))  # at the first, in the middle, and at the last, which nothing comes after
    for heads, runs in (("base", 0), ("base", 20), ("base", size - 1), ("each", 20)):
        room[:] = [1] * runs
        refused(
            plain, tmp_path / "out", r"No space left on device.*Nothing was written.*make room", OSError, heads=heads
        )


def test_a_disk_without_room_is_refused_with_both_numbers_before_any_work(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1234))
    monkeypatch.setattr(writing.ShardWriter, "__init__", lambda *a, **k: pytest.fail("work was begun"))
    refused(plain, tmp_path / "out", r"saving needs [\d,]+ bytes, 1,234 are free")


def test_ctrl_c_leaves_nothing(plain, tmp_path, monkeypatch):
    def stop(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.ShardWriter, "write", stop)
    refused(plain, tmp_path / "out", None, KeyboardInterrupt)


def test_what_a_killed_merge_left_goes_with_the_next_and_a_living_one_is_let_be(plain, tmp_path):
    dead, living = tmp_path / f".out.{'0' * 16}.tmp", tmp_path / f".out.{'1' * 16}.tmp"
    other = tmp_path / f".outside.{'0' * 16}.tmp"
    for place in (dead, living, other):
        place.mkdir()
    held = os.open(living, os.O_RDONLY)
    placing.fcntl.flock(held, placing.fcntl.LOCK_EX)
    merge(plain, tmp_path / "out")
    os.close(held)
    assert (dead.exists(), living.exists(), other.exists()) == (False, True, True)


def test_only_an_earlier_merge_is_ever_replaced_and_only_when_asked(plain, tmp_path):
    out = tmp_path / "out"
    merge(plain, out)
    first = (out / "model.safetensors").read_bytes()
    refused(plain, out, "holds a merged model already.*--overwrite")
    merge(plain, out, "average", overwrite=True)
    assert (out / "model.safetensors").read_bytes() != first
    assert [place.name for place in tmp_path.iterdir()] == ["out"]
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(MergeError, match="holds NaN"):
        spoilt = shutil.copytree(plain, tmp_path.parent / f"{tmp_path.name} spoilt")
        change(spoilt / "a", lambda t: t["bert.encoder.layer.1.output.dense.bias"].fill_(torch.nan))
        merge(spoilt, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before, "the old one is there until the new one is whole"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        refused(plain, tmp_path / "mine", "exists, and no merge has written it", overwrite=overwrite)
    refused(tmp_path, out, "a merged model already", models=["out"])
    shutil.copytree(plain / "base", out / "base")
    with pytest.raises(MergeError, match="lies there, which is to be merged"):
        merge_checkpoints("average", plain / "base", [out], out, overwrite=True)


# --- bad input ----------------------------------------------------------------------------------


def change(folder, work):
    tensors = load(folder)
    work(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def settings(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


LAYER = "bert.encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda a: change(a, lambda t: t.pop(LAYER)), f"a: lacks {LAYER}, which .*base has"),
        (lambda a: change(a, lambda t: t.update({"bert.x": torch.ones(1)})), "a: has bert.x, which .*base lacks"),
        (lambda a: change(a, lambda t: t.update({LAYER: torch.ones(3, 16)})), r"a: .* has shape \[3, 16\], in .*base"),
        (lambda a: change(a, lambda t: t[LAYER][1].fill_(torch.nan)), r"a: bert.encoder.* holds NaN or infinity"),
        (lambda a: change(a, lambda t: t[LAYER][1].fill_(torch.inf)), r"a: bert.encoder.* holds NaN or infinity"),
        (lambda a: change(a, lambda t: t.update({LAYER: t[LAYER].to(torch.int8)})), r"a: .* is of torch.int8, in"),
        (lambda a: change(a, lambda t: t.update({LAYER: t[LAYER].to(torch.float8_e4m3fn)})), "F8_E4M3, a quantised"),
        (lambda a: settings(a, quantization_config={"bits": 4}), "a: is quantised, as its config.json says"),
        (lambda a: settings(a, model_type="roberta"), "a: is of type roberta, .*base of bert"),
        (lambda a: (a / "config.json").write_text("{"), "config.json: is no JSON"),
        (lambda a: (a / "model.safetensors").rename(a / "pytorch_model.bin"), "a: has only pytorch_model.bin"),
        (lambda a: (a / "model.safetensors").rename(a / "zero_pp_rank_0_mp_rank_00_model_states.pt"), "by rank"),
        (lambda a: (a / "model.safetensors").rename(a / "__0_0.distcp"), "sharded by rank.*merge-weights"),
        (lambda a: (a / "model.safetensors").unlink(), "a: has no model.safetensors and no"),
        (lambda a: os.truncate(a / "model.safetensors", 5000), "is no whole safetensors file"),
        (lambda a: (a / "model.safetensors").write_bytes(b"\x80\x04 pickle"), "is no whole safetensors file"),
        (lambda a: shutil.rmtree(a), r"a': is no folder here, and no repository"),
    ],
    ids=["missing", "extra", "shape", "nan", "inf", "int8", "float8", "quantised", "type", "json", "pickle",
         "deepspeed", "fsdp", "empty", "cut", "garbage", "gone"],
)  # fmt: skip
def test_a_source_that_cannot_be_merged_is_refused_by_name(copy, tmp_path, spoil, match):
    spoil(copy / "a")
    refused(copy, tmp_path / "out", match)


def index_of(a, weight_map):
    (a / "model.safetensors").rename(a / "part.safetensors")
    (a / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        (
            {"x": "../base/model.safetensors"},
            r"names the shard \.\./base/model\.safetensors, which is not in its folder",
        ),
        ({"x": "config.json"}, "names the shard config.json, which is not"),
        ({"x": 3}, "has no `weight_map` of names"),
        ([], "has no `weight_map` of names"),
        ({"x": "part.safetensors"}, "is in only one of the index and the shards"),
    ],
)
def test_an_index_leads_nowhere_but_to_the_shards_beside_it(copy, tmp_path, weight_map, match):
    index_of(copy / "a", weight_map)
    refused(copy, tmp_path / "out", match)


def test_other_words_are_another_base(copy, tmp_path):
    tiny.tokenizer().save_pretrained(copy / "a")
    merge(copy, tmp_path / "first")
    file = copy / "a" / "tokenizer.json"
    file.write_text(file.read_text().replace('"red"', '"ruby"'))
    refused(copy, tmp_path / "out", "a: has another vocabulary than .*base, so it was trained from another base")


def test_heads_that_cannot_be_kept_or_merged_are_refused(copy, tmp_path):
    refused(copy, tmp_path / "out", r"b: has 4 labels \(LABEL_0, .*a has 3 .*--heads each", heads="merge")
    settings(copy / "b", id2label={"0": "no", "1": "yes"})
    refused(copy, tmp_path / "out", r"b: its configuration names 2 labels, and no tensor of its head", heads="each")
    save(copy / "b", 3, kind=BertModel)
    refused(copy, tmp_path / "out", "b: has no head to keep", heads="each")


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"rule": "tise"}, "there is no 'tise'. Did you mean 'ties'"),
        ({"rule": "../config"}, "there is no"),
        ({"rule": "greedy"}, "for Python only.*Known: average, dare"),
        ({"options": {"densty": 0.2}, "rule": "ties"}, "ties: unknown key 'densty'. Did you mean 'density'"),
        ({"options": {"density": 1.5}, "rule": "ties"}, "ties.density: expected a number above 0 and at most 1"),
        (
            {"options": {"alpha": 1.5}, "rule": "wise_ft", "models": ["a"]},
            "wise_ft.alpha: expected a number",
        ),
        ({"options": {"alpha": 0.5}, "rule": "wise_ft"}, "wise_ft: takes one model, found 2"),
        ({"options": {"weights": [1]}}, "1 for 2 models"),
        ({"options": {"scale": float("nan")}}, "expected a finite number"),
        ({"models": []}, "takes at least one model"),
        ({"heads": "every"}, "heads: 'every' is not one of"),
        ({"rule": "fisher"}, "0 Fisher files for 2 models"),
        ({"fishers": ["x"]}, "takes no|no Fisher files"),
        ({"dare": {"density": 0}}, "dare.density"),
        ({"dare": {"density": 0.5}, "rule": "dare", "models": ["a"]}, "would drop twice"),
        ({"max_shard_size": "huge"}, "max_shard_size: "),
    ],
)
def test_an_option_out_of_range_is_refused(plain, tmp_path, how, match):
    refused(plain, tmp_path / "out", match, ConfigError, **how)


def test_a_result_that_overflows_is_refused_and_leaves_nothing(three, tmp_path):
    refused(three, tmp_path / "out", "exceed what torch", options={"scale": 3e38, "weights": [1e30, 1]})


def test_a_fisher_file_of_another_model_is_refused(three, tmp_path):
    file = tmp_path / "f.safetensors"
    (tmp_path / "to").mkdir()
    information = load_file(three / "a.fisher.safetensors")
    for work, match in (
        (lambda t: t.pop(LAYER), f"lacks {LAYER}"),
        (lambda t: t.update({LAYER: torch.ones(2, 2)}), r"has shape \[2, 2\]"),
        (lambda t: t.update({LAYER: -torch.ones(16, 32)}), "holds negative numbers"),
    ):
        spoilt = dict(information)
        work(spoilt)
        save_file(spoilt, file)
        refused(three, tmp_path / "to" / "out", match, rule="fisher", models=["a"], fishers=[file])
    refused(three, tmp_path / "to" / "out", "is no file", rule="fisher", models=["a"], fishers=[tmp_path / "none"])


# --- adapters -----------------------------------------------------------------------------------


@pytest.fixture
def adapters(plain, tmp_path):
    """Two LoRA adapters of one base, of other ranks, with heads of 2 and 3 labels."""
    for seed, (name, labels, rank) in enumerate((("p", 2, 2), ("q", 3, 3)), 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = BertForSequenceClassification.from_pretrained(
                plain / "base", num_labels=labels, ignore_mismatched_sizes=True
            )
            wrapped = get_peft_model(
                model, LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=4, target_modules=["query", "value"])
            )
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(parameter, std=0.1)
        wrapped.save_pretrained(tmp_path / "in" / name)
    return tmp_path / "in"


def merge_adapters(folder, out, base=None, **how):
    return merge_checkpoints("lora_arithmetic", base, [folder / "p", folder / "q"], out, **how)


def test_merged_adapters_load_in_peft_and_update_by_the_sum(plain, adapters, tmp_path):
    out = merge_adapters(adapters, tmp_path / "out", plain / "base", options={"scale": 0.5, "weights": [1, -1]})

    def update(folder):
        base = BertModel.from_pretrained(plain / "base")
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        loaded = BertForSequenceClassification.from_pretrained(plain / "base")
        labels = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
        if labels:  # only the encoder's change is looked at
            loaded.classifier = torch.nn.Linear(16, len(load_file(folder / "adapter_model.safetensors")[HEAD]))
        after = PeftModel.from_pretrained(loaded, folder).merge_and_unload().bert.state_dict()
        return {name: after[name] - before[name] for name in before}

    p, q, merged = update(adapters / "p"), update(adapters / "q"), update(out)
    expected = {name: 0.5 * (p[name] - q[name]) for name in p}
    assert any(tensor.abs().max() > 1e-3 for tensor in expected.values())
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    assert ModelCard.load(out / "README.md").data.library_name == "peft"


HEAD = "base_model.model.classifier.bias"


def test_each_adapter_keeps_its_head(plain, adapters, tmp_path):
    out, one = merge_adapters(adapters, tmp_path / "out", heads="each"), merge_adapters(adapters, tmp_path / "one")
    for place, name in enumerate(("p", "q")):
        found = load_file(out / f"task-{place}" / "adapter_model.safetensors")
        own = load_file(adapters / name / "adapter_model.safetensors")
        assert torch.equal(found[HEAD], own[HEAD])
        assert same(loras(found), loras(load_file(one / "adapter_model.safetensors")))


def loras(tensors):
    return {name: tensor for name, tensor in tensors.items() if "lora_" in name}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "q: is a PEFT adapter of type IA3"),
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"query": 5}}, "rank_pattern="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"bias": "all"}, "bias='all'"),
        ({"r": 0}, "r=0 and lora_alpha=4"),
        ({"base_model_name_or_path": "other/base"}, "q: is an adapter of other/base, .*p of "),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(adapters, tmp_path, changes, match):
    file = adapters / "q" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(MergeError, match=match):
        merge_adapters(adapters, tmp_path / "out")
    assert [place.name for place in tmp_path.iterdir()] == ["in"]


# --- the Hub and the command line ---------------------------------------------------------------


def test_a_hub_id_comes_from_the_clients_cache_and_its_commit_is_named(plain, tmp_path, monkeypatch):
    commit = "0123456789abcdef" * 2 + "01234567"
    repo = tmp_path / "cache" / "models--me--base"
    shutil.copytree(plain / "base", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    out = merge_checkpoints("average", "me/base", [plain / "a"], tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == ["me/base"] and commit[:12] in card.text
    with pytest.raises(MergeError, match="me/other: "):
        merge_checkpoints("average", "me/other", [plain / "a"], tmp_path / "second")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["cache", "out"]


def test_a_base_that_a_package_carries_comes_from_there(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "packaged", {"me/base": str(plain / "base")}.get)
    out = merge_checkpoints("task_arithmetic", "me/base", [plain / "a"], tmp_path / "out")
    assert same(load(out), load(merge(plain, tmp_path / "again", models=["a"])))
    assert json.loads((out / "merge.json").read_text())["base"]["name"] == "me/base"


def hf_cl(*words):
    return CliRunner().invoke(app, ["merge", *map(str, words)])


def test_the_command_merges_as_the_function_does(plain, tmp_path):
    sources = ["--base", plain / "base", "--model", plain / "a", "--model", plain / "b"]
    options = ["--density", "0.3", "--scale", "2", "--weights", "1,0.5", "--dare", "0.9", "--seed", "4"]
    done = hf_cl("ties", *sources, "--out", tmp_path / "cli", *options, "--heads", "each", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["rule"] == "ties" and [Path(f).name for f in said["folders"]] == ["task-0", "task-1"]
    how = {"options": {"density": 0.3, "scale": 2.0, "weights": [1, 0.5]}, "dare": {"density": 0.9, "seed": 4}}
    merge(plain, tmp_path / "python", "ties", heads="each", **how)
    assert same(load(tmp_path / "cli" / "task-1"), load(tmp_path / "python" / "task-1"))


def test_the_command_takes_negative_numbers(plain, tmp_path):
    words = ["--base", plain / "base", "--model", plain / "a", "--out", tmp_path / "cli", "--weights", "-1"]
    assert hf_cl("task_arithmetic", *words, "--scale", "-0.5").exit_code == 0
    merge(plain, tmp_path / "python", models=["a"], options={"scale": 0.5})
    assert same(load(tmp_path / "cli"), load(tmp_path / "python"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ties", "--alpha", "0.5"], "ties: unknown key 'alpha'"),
        (["ties", "--weights", "1;2"], "--weights: '1;2' is no list of numbers"),
        (["ties", "--density", "7"], "ties.density: expected a number"),
        (["none"], "there is no 'none'"),
    ],
)
def test_the_command_says_on_one_line_what_is_wrong(plain, tmp_path, words, said):
    done = hf_cl(*words, "--base", plain / "base", "--model", plain / "a", "--out", tmp_path / "out")
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_lets_its_files_go(plain):
    with open_checkpoint("base", plain / "base") as opened:
        assert opened.read(LAYER).shape == (16, 32)
