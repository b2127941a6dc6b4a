"""The report: only what is comparable stands together, figures are right, and names of data are never markup."""

import base64
import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_cl.cli import app
from hf_cl.errors import ConfigError, RunError
from hf_cl.report import write_report
from hf_cl.report.axes import accuracy_axis, styles, undominated
from hf_cl.report.groups import _student, along_the_stream, estimate, group
from hf_cl.report.paired import Difference, difference, rival
from hf_cl.report.read import read_results
from hf_cl.report.words import duration, number, safe, size
from hf_cl.results import bits_of

HOSTILE = '<script>alert("x")</script>&\u202e$a^\x1b\ud800\n'


def result(seed=0, accuracy=0.9, loss=0.1, tasks=("pets", "weather"), **changes):
    """Return a results.json: each task is learned to `accuracy`, and loses `loss` with each later one."""
    count = len(tasks)
    rows = [[max(0.0, accuracy - loss * (i - j)) if j <= i else None for j in range(count)] for i in range(count)]
    return {
        "stream": "tiny",
        "method": {"name": "supsup", "options": {"density": 0.1, "scale": 1.0}},
        "model": "base",
        "seed": seed,
        "tasks": list(tasks),
        "training": {"num_train_epochs": 3, "learning_rate": 0.001, "seed": seed},
        "max_length": 8,
        "split": "test",
        "accuracy_matrix": rows,
        "bytes_per_task": dict.fromkeys(tasks, 1000),
        "head_bytes_per_task": dict.fromkeys(tasks, 100),
        "bytes_shared": 0,
        "facts": {name: {"capacity_used": 0.1 * place} for place, name in enumerate(tasks, start=1)},
        "exact": loss == 0,
        "seconds": {"training": 3.0, "by_task": dict.fromkeys(tasks, 1.5)},
        "tuning": None,
        "versions": {"torch": "2.13.0"},
        **changes,
    }


def write(folder, *contents):
    folder.mkdir(parents=True, exist_ok=True)
    for place, content in enumerate(contents):
        (folder / f"{place:02d}.json").write_text(json.dumps(content))
    return folder


def grouped(tmp_path, *contents):
    return group(read_results([write(tmp_path / "results", *contents)]))


class Page(HTMLParser):
    """A page's elements, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def compared():
    """Return runs of five methods on one stream in no order, and one of another stream."""
    tuning = {"split": "validation", "tasks": ["pets", "weather"], "chosen": {"method.learning_rate": 3e-3}}
    tuning["trials"] = [{"options": {"method.learning_rate": 3e-3}, "validation_accuracy": 0.9733}]
    lora = {"name": "lora", "options": {"r": 8, "learning_rate": 3e-3}}
    tuned = result(accuracy=0.9573, loss=0, method=lora, tuning=tuning, versions={"torch": "2.13.0+cpu"})
    tuned["bytes_per_task"] = dict.fromkeys(tuned["tasks"], 672_936)
    finetune = result(accuracy=0.9633, loss=0.4291, method={"name": "finetune", "options": {}}, bytes_shared=90_873_048)
    others = [result(loss=0, method={"name": name, "options": {}}) for name in ("exssnet", "supsup", "ssnet")]
    elsewhere = result(loss=0, method={"name": "exssnet", "options": {}}, stream="another", max_length=32)
    return [finetune, *others, tuned, elsewhere]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of five methods, another stream and a hostile run, made by the command line."""
    place = tmp_path_factory.mktemp("report")
    options = {"name": HOSTILE, "options": {HOSTILE: HOSTILE}}
    tuning = {"split": HOSTILE, "tasks": [HOSTILE], "chosen": {f"method.{HOSTILE}": HOSTILE}}
    tuning["trials"] = [{"options": tuning["chosen"], "validation_accuracy": None}]
    odd = result(tasks=(HOSTILE, "数据"), stream=HOSTILE, method=options, model=HOSTILE, tuning=tuning)
    odd |= {"versions": {HOSTILE: HOSTILE}, "training": {HOSTILE: HOSTILE}, "split": HOSTILE}
    odd["most_rows"] = {HOSTILE: {HOSTILE: HOSTILE}}
    write(place / "odd", odd)
    write(place / "runs", *compared())
    command = ["report", str(place / "runs"), str(place / "odd"), "--out", str(place / "page.html"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return place / "page.html", json.loads(done.stdout)


# --- the page ----------------------------------------------------------------------------------------------


def test_bytes_that_only_the_next_task_needs_have_a_column_where_there_are_any(tmp_path):
    without, carrying = result(), result(method={"name": "replay", "options": {}}, bytes_carried=2_500_000)
    (tmp_path / "a.json").write_text(json.dumps(without))
    write_report([tmp_path / "a.json"], tmp_path / "one.html")
    assert "carried</th>" not in (tmp_path / "one.html").read_text()
    (tmp_path / "b.json").write_text(json.dumps(carrying))
    write_report([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "two.html")
    page = (tmp_path / "two.html").read_text()
    assert "carried</th>" in page and size(2.5e6) in page
    (tmp_path / "b.json").write_text(json.dumps({**carrying, "bytes_carried": "2 MB"}))
    with pytest.raises(RunError, match="bytes_carried"):
        read_results([tmp_path / "b.json"])


def test_the_page_is_one_file_that_asks_for_nothing(page):
    text = page[0].read_text("utf-8")
    seen = Page(text)
    assert {tag for tag, _ in seen.elements}.isdisjoint({"script", "link", "iframe", "object", "form", "base"})
    assert all(image["src"].startswith("data:image/png;base64,") for image in seen.all("img"))
    assert all(link["href"].startswith("#g") for link in seen.all("a"))
    assert not re.search(r"url\(|@import|http://|https://", text)
    assert any("default-src 'none'" in meta.get("content", "") for meta in seen.all("meta"))


def test_every_picture_is_embedded_lies_beside_it_and_says_what_it_shows(page):
    out, said = page
    files = {file.read_bytes() for file in Path(said["pictures"]).iterdir()}
    images = Page(out.read_text("utf-8")).all("img")
    assert {base64.b64decode(image["src"].partition(",")[2]) for image in images} == files
    assert len(images) == 3 * 5 + 7  # accuracy, cost, stream, capacity, time of each section; a matrix each series
    assert all(len(image["alt"]) > 20 for image in images)
    assert any("lora: accuracy 0.9573, forgetting 0.0000" in image["alt"] for image in images)


def test_names_are_text_wherever_they_stand(page):
    text = page[0].read_text("utf-8")
    seen = Page(text)
    assert "\u202e" not in text
    shown = "".join(seen.texts)
    assert shown.count('<script>alert("x")</script>& $a^   ') > 10
    for _, attributes in seen.elements:
        assert not any(name.startswith("on") for name in attributes)
    assert all(re.fullmatch(r"\d\d-[\w-]+\.png", file.name) for file in Path(page[1]["pictures"]).iterdir())


def test_the_figures_are_those_of_the_results(page):
    shown = " ".join("".join(Page(page[0].read_text("utf-8")).texts).split())
    for text in ("0.9573", "0.4291", "0 (exactly)", "672.9\u00a0kB", "90.9\u00a0MB"):
        assert text.replace("\u00a0", " ") in shown
    assert "learning_rate 0.003: 0.9733" in shown and "validation rows of pets, weather" in shown
    assert "torch 2.13.0+cpu" in shown and "at most 32 tokens" in shown


def test_what_was_compared_is_said(page):
    groups = {part["stream"]: part["series"] for part in page[1]["groups"]}
    assert list(groups["tiny"]) == ["supsup", "exssnet", "ssnet", "lora", "finetune"]
    assert groups["another"] == {"exssnet": 1}


def test_equal_runs_give_equal_bytes(tmp_path):
    runs = write(tmp_path / "runs", result(0), result(1, accuracy=0.92), result(2, loss=0.0))
    for name in ("a", "b"):
        write_report([runs], tmp_path / name / "page.html")
    assert (tmp_path / "a" / "page.html").read_bytes() == (tmp_path / "b" / "page.html").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        result(tasks=("alone",)),
        result(tasks=[f"task {place} of many with a long name" for place in range(20)], loss=0.0),
        result(accuracy_matrix=[[None, None], [None, None]]),
        result(accuracy_matrix=[[1.0, 0.5], [1.0, 1.0]], facts={}, seconds={}, bytes_shared=10**12),
        result(bytes_per_task={"pets": 0, "weather": 0}, head_bytes_per_task={"pets": 0, "weather": 0}),
        result(accuracy_matrix=[[0.0, None], [0.0, 0.0]], exact=False),
    ],
)  # fmt: skip
def test_odd_runs_are_drawn_too(tmp_path, content):
    write_report([write(tmp_path / "runs", content)], tmp_path / "page.html")
    assert Page((tmp_path / "page.html").read_text("utf-8")).all("img")


def test_many_series_of_a_method_are_told_apart(tmp_path):
    many = [result(method={"name": "supsup", "options": {"density": 0.01 * place}}) for place in range(1, 13)]
    (part,) = write_report([write(tmp_path / "runs", *many)], tmp_path / "page.html")
    assert [series.label for series in part.series][:2] == ["supsup (density 0.01)", "supsup (density 0.02)"]
    assert len(set(styles([part]).values())) == 12


def test_validation_rows_are_named_as_such(tmp_path):
    write_report([write(tmp_path / "runs", result(split="validation"))], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "validation rows" in text and "no final figures" in text


def test_a_page_is_an_html_file_and_a_missing_matplotlib_is_named_before_anything_is_written(tmp_path, monkeypatch):
    runs = write(tmp_path / "runs", result())
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        write_report([runs], tmp_path / "notes.md")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r'pip install "hf-cl\[plots\]"'):
        write_report([runs], tmp_path / "page.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]


def test_asking_for_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from hf_cl.cli import app;"
        "done = [CliRunner().invoke(app, [verb, '--help']).exit_code for verb in ('report', 'sweep')];"
        "print(done, [name for name in ('torch', 'transformers', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[0, 0] []\n"


# --- finding results ---------------------------------------------------------------------------------------


def test_a_run_a_file_and_a_folder_are_found_and_a_copy_counts_once(tmp_path):
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "results.json").write_text(json.dumps(result()))
    (run / "run.json").write_text("{}")
    write(tmp_path / "runs" / "copies", result(), result(1), {"not": "a result"})
    (tmp_path / "runs" / "broken.json").write_text("{")
    for paths in ([run], [run / "results.json"], [run, run, run / "results.json"]):
        assert [found.source for found in read_results(paths)] in (["first/results.json"], ["results.json"])
    found = read_results([tmp_path / "runs", run])
    assert [one.source for one in found] == ["runs/copies/00.json", "runs/copies/01.json"]


def spoilt(key, value):
    content = result()
    if value is None:
        del content[key]
    else:
        content[key] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "expected a mapping, found list"),
        (spoilt("versions", None), "it has no 'versions'"),
        (spoilt("seed", "0"), "'seed' is str, expected int"),
        (spoilt("accuracy_matrix", [[0.5, None]]), "1 of 2 tasks are measured"),
        (spoilt("accuracy_matrix", [[2.0, None], [0.5, 0.5]]), "not an accuracy in"),
        (spoilt("tasks", [1, 2]), "'tasks'"),
        (spoilt("tasks", [[], []]), "cannot be read"),
        (spoilt("method", {"name": "x"}), "'method'"),
        (spoilt("bytes_per_task", {"pets": 1}), "'bytes_per_task'"),
        (spoilt("bytes_per_task", {"pets": 1, "weather": "<b>"}), "'bytes_per_task'"),
        (spoilt("facts", {"pets": {"capacity_used": "all"}}), "'facts'"),
        (spoilt("seconds", {"by_task": {"pets": "1"}}), "'seconds'"),
        (spoilt("tuning", {"trials": [{}]}), "'tuning'"),
        (spoilt("tuning", {"trials": {}}), "'tuning'"),
        (spoilt("tuning", {"tasks": 3}), "'tuning'"),
        (spoilt("tuning", {"trials": [{"options": {}, "validation_accuracy": "<b>"}]}), "'tuning'"),
        (spoilt("most_rows", {"pets": 3}), "'most_rows'"),
    ],
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunError, match=rf"results\.json.*{message}"):
        read_results([tmp_path])


def test_a_path_without_a_finished_run_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="holds no finished run"):
        read_results([tmp_path])
    done = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert done.exit_code == 2 and "no such file or folder" in done.stderr


# --- grouping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"split": "validation"}, "validation rows"),
        ({"max_length": 16}, "max_length 16"),
        ({"training": {"num_train_epochs": 5, "learning_rate": 0.001}}, "num_train_epochs 5"),
        ({"training": {"num_train_epochs": 3, "learning_rate": 0.001, "max_steps": 7}}, "max_steps 7"),
        ({"model": "another"}, "model another"),
        ({"tasks": ["weather", "pets"]}, "other tasks"),
        ({"most_rows": {"pets": {"max_train": 5}}}, "other numbers of rows"),
    ],
)
def test_runs_under_other_conditions_stand_apart(tmp_path, changes, differs):
    first, other = grouped(tmp_path, result(0), result(1), result(2, **changes))
    assert (first.differs, len(first.runs)) == ("", 2)
    assert (other.differs, len(other.runs)) == (differs, 1)


def test_what_changes_no_figure_parts_nobody(tmp_path):
    other = result(1, training={"num_train_epochs": 3.0, "learning_rate": 1e-3, "seed": 1, "disable_tqdm": True})
    old = result(2)
    del old["split"]
    (part,) = grouped(tmp_path, result(0), other, old)
    (series,) = part.series
    assert (series.label, series.seeds) == ("supsup", [0, 1, 2])


def test_options_that_tuning_chose_are_one_series_and_others_are_not(tmp_path):
    def tuned(seed, scale, rate):
        content = result(seed, tuning={"chosen": {"method.scale": scale, "training.learning_rate": rate}, "trials": []})
        content["method"]["options"]["scale"] = scale
        content["training"]["learning_rate"] = rate
        return content

    denser = tuned(0, 1.0, 0.1)
    denser["method"]["options"]["density"] = 0.2
    parts = grouped(tmp_path, tuned(0, 1.0, 0.1), tuned(1, 2.0, 0.2), denser, result(0))
    assert [[(series.label, len(series.runs)) for series in part.series] for part in parts] == [
        [("supsup (density 0.1)", 2), ("supsup (density 0.2)", 1)],
        [("supsup", 1)],
    ]


def test_two_runs_with_one_seed_are_one_seed(tmp_path):
    again = copy.deepcopy(result(0, accuracy=0.8, loss=0.0))
    (part,) = grouped(tmp_path, result(0, accuracy=0.9, loss=0.0), again, result(1, accuracy=0.95, loss=0.0))
    found = part.series[0].estimate(lambda run: run.matrix.average_accuracy)
    assert found.values == pytest.approx((0.85, 0.95)) and found.half is None


def test_an_interval_is_students_and_needs_three_seeds():
    assert (estimate([0.5]).spread, estimate([0.5]).half) == (None, None)
    assert estimate([0.5, 0.7]).spread == pytest.approx(0.1414, abs=1e-4)
    assert estimate([0.5, 0.7]).half is None
    assert estimate([0.5, 0.6, 0.7]).half == pytest.approx(4.303 * 0.1 / 3**0.5)
    # Quantiles of Student's t as tables give them.
    assert [round(_student(degrees), 2) for degrees in (2, 9, 15, 16, 30, 100)] == [4.30, 2.26, 2.13, 2.12, 2.04, 1.98]


def test_the_line_along_the_stream_is_over_tasks_seen(tmp_path):
    (part,) = grouped(tmp_path, result(tasks=("a", "b", "c")))
    assert along_the_stream(part.runs[0]) == pytest.approx([0.9, 0.85, 0.8])


def test_a_series_is_exact_only_if_every_run_is(tmp_path):
    (part,) = grouped(tmp_path, result(0, loss=0.0), result(1, loss=0.0), result(2))
    assert part.series[0].exact == "2 of 3"


# --- small parts -------------------------------------------------------------------------------------------


def test_the_frontier_is_what_nothing_beats_for_fewer_bytes():
    assert undominated([(3, 0.9), (1, 0.5), (2, 0.4), (1, 0.6), (4, 0.9)]) == [(1, 0.6), (3, 0.9)]


@pytest.mark.parametrize(
    ("values", "wider"), [((0.95, 0.97), False), ((0.5, 0.97), True), ((0.0, 1.0), True), ((1.0,), False)]
)
@pytest.mark.parametrize("side", ["x", "y"])
def test_an_axis_of_accuracy_holds_all_its_values(values, wider, side):
    from hf_cl.plots import new_figure

    axes = new_figure(4, 4).subplots()
    assert accuracy_axis(axes, values, side) is wider
    low, high = getattr(axes, f"get_{side}lim")()
    assert low < min(values) and high > max(values)
    assert all(tick <= 1.0 for tick in getattr(axes, f"get_{side}ticks")())


def test_figures_are_written_for_people():
    assert [number(value) for value in (0.5, -0.25, -0.0, -1e-9, None)] == [
        "0.5000",
        "\u22120.2500",
        "0.0000",
        "0.0000",
        "\u2013",
    ]
    assert [number(value, exact=True) for value in (0.0, 1e-9)] == ["0 (exactly)", "0.0000"]
    assert [size(value) for value in (0, 999, 107_264, 5.3e6, None)] == [
        "0\u00a0B",
        "999\u00a0B",
        "107.3\u00a0kB",
        "5.3\u00a0MB",
        "\u2013",
    ]
    assert [duration(value) for value in (3.21, 125, 8000, None)] == [
        "3.2\u00a0s",
        "2\u00a0min",
        "2.2\u00a0h",
        "\u2013",
    ]
    assert safe("<b>\n\u202e") == "&lt;b&gt;  "
    assert safe("<" * 200).count("&lt;") == 200 + 79


# --- paired by row -----------------------------------------------------------------------------------------


def answered(bits):
    return {"rows": len(bits), "bits": np.packbits(np.array(bits, bool)).tobytes().hex()}


def two(tmp_path, ours, theirs, **changes):
    """Return the series of one task's answers, `supsup` and `lora`."""
    made = []
    for name, seeds in (("supsup", ours), ("lora", theirs)):
        for seed, bits in enumerate(seeds):
            method = {"name": name, "options": {}}
            made.append(result(seed, tasks=("pets",), method=method, correct={"pets": answered(bits)}, **changes))
    (part,) = grouped(tmp_path, *made)
    return part


def test_a_difference_is_that_of_the_means(tmp_path):
    part = two(tmp_path, [[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 0]])
    found = difference(part.series[0], rival(part))
    assert rival(part).method == "lora"
    assert (found.mean, found.seeds) == (0.125, 2)
    assert found.low <= found.mean <= found.high


def test_the_interval_is_that_of_the_mean_over_rows(tmp_path):
    """Against the normal approximation, which has no share in how the draws are made."""
    generator = np.random.default_rng(1)
    ours, theirs = generator.random(2000) < 0.9, generator.random(2000) < 0.8
    part = two(tmp_path, [ours], [theirs])
    found = difference(*part.series)
    gains = ours.astype(float) - theirs
    half = 1.959964 * gains.std() / len(gains) ** 0.5
    assert found.mean == pytest.approx(gains.mean(), abs=1e-12)
    # A quantile of 10,000 draws is off by about 2.7 % of the standard error.
    assert found.low == pytest.approx(gains.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gains.mean() + half, abs=0.1 * half)
    assert difference(*reversed(part.series)).mean == -found.mean


def test_equal_answers_are_no_difference_and_pairing_tells_what_means_do_not(tmp_path):
    same = two(tmp_path / "same", [[1, 0, 1, 1]], [[1, 0, 1, 1]])
    assert difference(*same.series) == Difference(0.0, 0.0, 0.0, 1)
    swapped = two(tmp_path / "swapped", [[1, 1, 0, 0] * 50], [[0, 0, 1, 1] * 50])
    found = difference(*swapped.series)
    assert found.mean == 0.0
    assert found.low < -0.1 < 0.1 < found.high


def test_runs_of_before_answers_were_kept_have_no_difference(tmp_path):
    (old,) = grouped(tmp_path / "old", result(method={"name": "lora", "options": {}}), result())
    assert difference(*old.series) is None


@pytest.mark.parametrize(
    "entry",
    [{}, {"rows": 9, "bits": "ff"}, {"rows": 8, "bits": "zz"}, {"rows": 0, "bits": ""}, {"rows": "x", "bits": "ff"}, 3],
)
def test_answers_that_are_none_are_refused(tmp_path, entry):
    made = result(tasks=("pets",), correct={"pets": entry})
    other = result(tasks=("pets",), method={"name": "lora", "options": {}}, correct={"pets": answered([1] * 8)})
    (part,) = grouped(tmp_path, made, other)
    with pytest.raises(RunError, match="`correct` of task 'pets'"):
        difference(*part.series)


def test_other_rows_are_refused(tmp_path):
    part = two(tmp_path, [[1, 0]], [[1, 0, 1]])
    with pytest.raises(RunError, match="on 2 rows in one run and on 3 in another"):
        difference(*part.series)


def test_what_a_run_writes_is_what_the_report_reads(tmp_path):
    bits = np.random.default_rng(0).random(13) < 0.5
    assert bits_of(bits) == answered(bits)
    part = two(tmp_path, [bits], [~bits])
    assert difference(*part.series).mean == pytest.approx((2 * bits.sum() - 13) / 13)


def test_the_page_says_the_difference(tmp_path):
    runs = []
    for name, accuracy, bits in (("supsup", 0.9, [1] * 20), ("lora", 0.5, [1, 0] * 10)):
        method = {"name": name, "options": {}}
        correct = {task: answered(bits) for task in ("pets", "weather")}
        runs.append(result(accuracy=accuracy, loss=0, method=method, correct=correct))
    write_report([write(tmp_path / "runs", *runs)], tmp_path / "page.html")
    shown = " ".join("".join(Page((tmp_path / "page.html").read_text("utf-8")).texts).split())
    assert "against lora, paired by test row" in shown
    assert "+50.00" in shown
