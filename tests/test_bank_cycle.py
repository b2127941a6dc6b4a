"""The whole life of a bank over the Hub, each step in a process of its own that knows only what the last one left."""

import json

import hub_server
import pytest

pytest_plugins = ["tiny"]
hub = hub_server.hub
REPO = "alice/bank"
START = """
import json, sys; sys.path.insert(0, "tests")
from pathlib import Path
import tiny
from hf_cl import MaskBank
BASE, PLACE = Path({base!r}), Path({place!r})

def answers(bank):
    model, found = bank.attach(tiny.fresh(BASE).model), {{}}
    for name in bank.tasks:
        bank.activate(model, name)
        found[name] = tiny.logits(model).tolist()
    return found

def tell(bank, **more):
    proved = bank.verify(tiny.fresh(BASE).model)
    assert all(not task["moved"] and task["same_logits"] for task in proved), proved
    print(json.dumps({{"tasks": bank.tasks, "digest": bank.digest, "logits": answers(bank), **more}}))
"""
LEARN = """
learner = tiny.learner(BASE, tiny.options({method!r}), PLACE / "out")
for name in ("pets", "weather"):
    learner.learn(tiny.task(name))
bank = MaskBank.from_learner(learner, base_id="someone/tiny")
bank.push_to_hub("alice/bank")
tell(bank)
"""
EXTEND = """
bank = MaskBank.from_pretrained("alice/bank")
learner = bank.extend(tiny.fresh(BASE), None, None, tiny.arguments(PLACE / "out"), max_length=8)
learner.learn(tiny.task("food"))
grown = MaskBank.from_learner(learner)
grown.save_pretrained(PLACE / "grown")
MaskBank.from_pretrained(PLACE / "grown").push_to_hub("alice/bank")
tell(MaskBank.from_pretrained("alice/bank"))
"""
DROP = """
bank = MaskBank.from_pretrained("alice/bank").drop("weather")
bank.save_pretrained(PLACE / "dropped")
MaskBank.from_pretrained(PLACE / "dropped").push_to_hub("alice/bank")
tell(MaskBank.from_pretrained("alice/bank"))
"""
LOOK = """
tell(MaskBank.from_pretrained("alice/bank", revision={commit!r}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supsup", "exssnet"])
def test_a_bank_is_pushed_pulled_verified_extended_and_pushed_again(hub, base_folder, tmp_path, method):
    def step(code, **values):
        start = START.format(base=str(base_folder), place=str(tmp_path))
        return json.loads(hub.python(start + code.format(**values)).stdout.splitlines()[-1])

    learned = step(LEARN, method=method)
    first = hub.head(REPO)
    grown = step(EXTEND)
    assert grown["tasks"] == ["pets", "weather", "food"]
    assert {name: grown["logits"][name] for name in learned["tasks"]} == learned["logits"]
    left = step(DROP)
    assert left["tasks"] == ["pets", "food"]
    assert left["logits"] == {name: grown["logits"][name] for name in left["tasks"]}
    assert step(LOOK, commit=first) == learned
    assert len({first, hub.head(REPO)}) == 2
