"""The card of a bank in a repository: its metadata, what stands in it, what is escaped, and that its code runs."""

import ast
import html
import re

import banks
import hub_server
import pytest
import tiny
import yaml
from huggingface_hub import ModelCard

from hf_cl import MaskBank
from hf_cl.errors import BankError
from hf_cl.storage.bank_card import END, START, bank_card, base_of, shown
from hf_cl.storage.manifest import MANIFEST

hub = hub_server.hub
REPO = "alice/bank"
EVIL = [
    "a | b | c",
    "`code` *bold* _em_ ~~no~~ # head",
    "<script>alert(1)</script>",
    "<!-- hf_cl bank: end -->",
    "[link](https://evil.example)",
    "www.evil.example and me@evil.example",
    "![x](https://evil.example/x.png)",
    "&#60;script&#62; &lt;",
    "two\nlines\r\n---\nlicense: mit",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "zero\u200bwidth",
    "\ud800 alone",
    "quote ' and \" and \\ and \\n",
    '"""',
    "```\nend of code",
    "{{ template }} {% raw %} $math$",
    "key: value",
    "- item",
    "? a",
    "!!python/object:os.system",
    "&anchor *alias",
    "1e3",
    "0x1f",
    "null",
    "yes",
    "~",
    "2026-01-01",
    "größe 大きさ 😀",
    "x" * 10_000,
]


def card_of(hub, repo=REPO):
    return hub.repo(repo)["README.md"].decode()


def metadata(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def written(manifest, held=None):
    return bank_card(manifest, REPO, base_of(manifest, None), held)


# --- what it says -------------------------------------------------------------------------------


def test_the_metadata_says_what_the_hub_shows(hub):
    tasks = {"source": "nyu-mll/glue/mrpc", "metrics": {"accuracy": 0.75, "macro_f1": 0.5, "loss": 1e9}}
    bank = banks.bank("paraphrase", **tasks)
    bank = banks.bank("mine", before=bank, source="local:folder", metrics={"accuracy": 1})
    bank = banks.bank("own", before=bank, source="memory", metrics={"mcc": -0.5, "bad name": 1.0, "text": "high"})
    bank = banks.bank("news", before=bank, source="fancyzhx/ag_news", metrics={})
    bank.push_to_hub(REPO)
    data = metadata(card_of(hub))
    results = data.pop("model-index")
    assert data == {
        "library_name": "hf_cl",
        "base_model": banks.BASE,
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "tags": ["hf_cl", "continual-learning"],
        "datasets": ["fancyzhx/ag_news", "nyu-mll/glue"],
        "metrics": ["accuracy", "f1", "mcc"],
    }
    (index,) = results
    assert index["name"] == "bank"
    found = {
        (result["dataset"]["name"], result["dataset"]["type"], result["dataset"]["config"]): {
            metric["type"]: metric["value"] for metric in result["metrics"]
        }
        for result in index["results"]
    }
    assert found == {
        ("paraphrase", "nyu-mll/glue", "mrpc"): {"accuracy": 0.75, "f1": 0.5, "loss": 1e9},
        ("mine", "unknown", "task 1"): {"accuracy": 1},
        ("own", "unknown", "task 2"): {"mcc": -0.5},
    }


def test_two_tasks_of_one_data_set_have_a_result_each(hub):
    bank = banks.bank("first", "second", source="fancyzhx/ag_news")
    names = [result["dataset"]["name"] for result in metadata(written(bank.manifest))["model-index"][0]["results"]]
    assert names == ["first", "second"]


def test_a_bank_without_results_has_no_model_index(hub):
    data = metadata(written(banks.bank("pets", metrics={}).manifest))
    assert "model-index" not in data and "model_name" not in data and "metrics" not in data


def test_it_names_each_task_its_labels_its_size_and_the_digest_that_pins_it():
    labels = [f"label {number}" for number in range(20)]
    bank = banks.bank("pets", "weather", labels=labels)
    text = written(bank.manifest)
    for task in bank.manifest.tasks:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {task.name} |")]
        assert "label 0, label 1" in row and "(20 in all)" in row and f"| {task.file.bytes} |" in row
    assert f'expected_digest="{bank.digest}"' in text and "not who wrote it" in text
    assert "/tmp" not in text and "http" not in text


# --- what somebody chose ------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVIL, ids=range(len(EVIL)))
def test_no_name_means_anything_in_the_card(hub, name):
    bank = banks.bank(name, "plain", labels=[name, "other"], source=f"local:{name}")
    bank.push_to_hub(REPO)
    text = card_of(hub)
    plain = written(banks.bank("evil", "plain").manifest)
    assert not [char for char in text if not char.isprintable() and char != "\n"]
    assert set(metadata(text)) == set(metadata(plain)) and ModelCard(text).data.library_name == "hf_cl"
    named = metadata(text)["model-index"][0]["results"][0]["dataset"]["name"]
    assert isinstance(named, str) and len(named) < 90
    # The same lines as with a harmless name: it begins no block, ends none, and adds no cell.
    assert len(text.splitlines()) == len(plain.splitlines())
    assert text.count(START) == 1 and text[text.rindex(END) :] == f"{END}\n"
    row = text.splitlines()[plain.splitlines().index(next(line for line in plain.splitlines() if "| evil |" in line))]
    assert row.count("|") == 8 and not set("<>`*[]_~:@\\") & set(row)
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert ast.literal_eval(re.search(r"tasks=\[(.*)\]\)", code)[1]) == name
    assert MaskBank.from_pretrained(REPO).tasks == bank.tasks


def test_what_markdown_shows_is_the_name_itself():
    for name in EVIL[:8]:
        assert html.unescape(shown(name)) == name


# --- what the owner has written -----------------------------------------------------------------


def test_what_the_owner_has_written_is_kept(hub):
    first = banks.bank("pets")
    first.push_to_hub(REPO)
    mine = card_of(hub).replace(
        "library_name: hf_cl", "license: mit\nlanguage: [en, de]\ntags: [mine]\nlibrary_name: x", 1
    )
    mine = mine.replace("tags:\n- hf_cl\n- continual-learning\n", "", 1).replace(
        "# bank", "# My bank\n\nWhy I made it."
    )
    hub.commit(REPO, {"README.md": (mine + "\n## Thanks\n\nTo you.\n").encode()})
    banks.bank("food", before=first).push_to_hub(REPO)
    text = card_of(hub)
    data = metadata(text)
    assert (data["license"], data["language"], data["library_name"]) == ("mit", ["en", "de"], "hf_cl")
    assert data["tags"] == ["mine", "hf_cl", "continual-learning"]
    assert "Why I made it." in text and text.endswith("## Thanks\n\nTo you.\n")
    assert text.count(START) == text.count(END) == text.count("## Tasks") == 1 and "| food |" in text
    before = text
    banks.bank("cars", before=MaskBank.from_pretrained(REPO)).push_to_hub(REPO)
    assert card_of(hub).split(START)[0].split("---")[-1] == before.split(START)[0].split("---")[-1]


@pytest.mark.parametrize(
    "held", [b"", b"\n", b"Just text.", b"\xef\xbb\xbf---\nlicense: mit\n---\r\nText.", b"---\n---\n"]
)
def test_a_card_of_any_kind_is_added_to(hub, held):
    hub.create(REPO)
    hub.commit(REPO, {"README.md": held})
    banks.bank("pets").push_to_hub(REPO)
    text = card_of(hub)
    assert metadata(text)["library_name"] == "hf_cl" and text.count(START) == 1
    assert ("mit" in str(metadata(text))) == (b"mit" in held) and ("ext." in text.split(START)[0]) == (b"ext." in held)


@pytest.mark.parametrize(
    "held", [b"---\na: [\n---\n", b"---\n- a list\n---\n", b"\xff\xfe", b"---\nmodel-index: 3\n---\n"]
)
def test_a_card_that_cannot_be_read_is_not_overwritten(hub, held):
    hub.create(REPO)
    hub.commit(REPO, {"README.md": held})
    with pytest.raises(BankError, match="Correct or delete it"):
        banks.bank("pets").push_to_hub(REPO)
    assert hub.repo(REPO)["README.md"] == held and MANIFEST not in hub.repo(REPO)


# --- the whole way, in fresh processes ----------------------------------------------------------

LEARN = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
import tiny, torch
from safetensors.torch import save_file
from hf_cl import ContinualLearner, MaskBank
out = Path(sys.argv[1])
learner = ContinualLearner("alice/tiny", None, tiny.options("exssnet"), tiny.arguments(out), max_length=8)
logits = {}
for name in ("pets", "weather"):
    learner.learn(tiny.task(name))
for name in learner.tasks:
    learner.activate(name)
    logits[name] = tiny.logits(learner.model)
save_file(logits, out / "logits.safetensors")
print(MaskBank.from_learner(learner).push_to_hub("alice/bank").oid)
"""
ANSWER = """
import re, sys; sys.path.insert(0, "tests")
import tiny, torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from hf_cl import MaskBank
text = open(hf_hub_download("alice/bank", "README.md"), encoding="utf-8").read()
exec(re.search(r"```python\\n(.*?)\\n```", text, re.DOTALL)[1])
held = load_file(sys.argv[1] + "/logits.safetensors")
for name in bank.tasks:
    bank.activate(model, name)
    assert torch.equal(tiny.logits(model), held[name]), name
model.unload()
for task in bank.verify(base.model):
    assert not task["moved"] and task["same_logits"], task
"""


@pytest.fixture
def base_on_hub(hub, tmp_path):
    """A tiny base in a repository of its own."""
    hub.create("alice/tiny")
    hub.commit("alice/tiny", {file.name: file.read_bytes() for file in tiny.save_base(tmp_path / "tiny").iterdir()})
    return hub


@pytest.mark.slow
def test_what_one_process_learns_and_pushes_another_pulls_by_the_card_and_answers_with_the_same_bits(
    base_on_hub, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    pushed = base_on_hub.python(f"import sys; sys.argv.append({str(out)!r})\n{LEARN}").stdout.split()[-1]
    assert pushed == base_on_hub.head(REPO) and len(banks.found_in(base_on_hub.repo(REPO)).tasks) == 2
    assert "base_model: alice/tiny" in card_of(base_on_hub)
    done = base_on_hub.python(f"import sys; sys.argv.append({str(out)!r})\n{ANSWER}")
    (answer,) = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert answer["label"] in ("tame", "wild")
    assert base_on_hub.token not in done.stdout + done.stderr
