"""The proof in the open, on tiny data sets: cut, learned, verified, spoilt, resumed, and judged."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from hf_cl import MaskBank
from hf_cl.cli import app
from hf_cl.errors import ConfigError, DataError
from hf_cl.ownership.digest import task_digest
from hf_cl.packing.shelf import open_entry
from hf_cl.storage.bank_folder import FolderReader
from hf_cl.storage.run_folder import RunFolder

pytest_plugins = ["tiny"]
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "prove.py"
SIZES = {"train": 160, "validation": 28, "test": 80}
SEVEN = tuple("abcdefg")


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Make the scripts importable, as they are to one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of three data sets, one of seven labels."""
    folder = tmp_path_factory.mktemp("data")
    for name, labels in {"food": None, "pets": None, "seven": SEVEN}.items():
        tiny.write_task(folder, name, labels, SIZES)
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def prove(data, base_folder, monkeypatch):
    """Prove in this process, where everything has been imported already; return the exit code and the ledger."""
    import prove as script
    from proof import answers, shell, steps
    from proof.ledger import Settings

    class Here(shell.Shell):
        def run(self, command, *, given="", tell=lambda line: None, fine=0):
            if command[0] == "hf-cl":
                result = CliRunner().invoke(app, command[1:])
                assert result.exit_code in (0, fine), (result.output, result.exception)
                for line in result.stderr.splitlines():
                    tell(line)
                return result.exit_code, result.stdout
            return 0, json.dumps(getattr(answers, command[1])(json.loads(given)))

    def run(out, tasks=3, every=2, methods=("exssnet",), **changes):
        settings = Settings(tasks, every, methods, str(changes.get("model", base_folder)), changes.get("seed", 0), 1)
        code = script.prove(settings, out, Here)
        return code, json.loads((out / "prove.json").read_text())

    monkeypatch.setenv("HF_CL_DATA", str(data))
    monkeypatch.setattr(steps, "DENSITY", 0.1)
    monkeypatch.setattr(steps, "TRAINING", {**steps.TRAINING, "num_train_epochs": 1})
    monkeypatch.setattr(
        "hf_cl.train_stream.verify_in_fresh_process",
        lambda run: json.loads(CliRunner().invoke(app, ["verify", str(run), "--json"]).stdout),
    )
    return run


def promises(found, method="exssnet"):
    return {one["promise"].split(",")[0]: one["held"] for one in found["promises"][method]}


# --- cutting -------------------------------------------------------------------------------------------


def rows(folder, split="train"):
    return [json.loads(line) for line in Path(folder, f"{split}.jsonl").read_text().splitlines()]


def test_tasks_are_disjoint_in_rows_or_labels_and_the_same_for_a_seed(data, tmp_path):
    from proof.tasks import ROWS, cut

    made = cut(data, 6, tmp_path / "a")
    assert sorted(task["name"] for task in made[:4]) == [
        "food part 1", "pets part 1", "seven labels 1-4 part 1", "seven labels 5-7 part 1"
    ]  # fmt: skip
    assert {task["name"] for task in made[4:]} == {"food part 2", "pets part 2"}
    for task in made:
        assert {split: len(rows(task["dataset"], split)) for split in ROWS} == ROWS
    for name in ("food", "pets"):
        left = rows(data / name)
        for task in made:
            if task["name"].startswith(name):
                for row in rows(task["dataset"]):
                    left.remove(row)  # as often as it is in the data, and no more
    again, other = cut(data, 6, tmp_path / "b"), cut(data, 6, tmp_path / "c", seed=1)
    shas = [[task["sha256"] for task in tasks] for tasks in (made, again, other)]
    assert shas[0] == shas[1] != shas[2]


def test_labels_keep_their_names_and_more_tasks_than_there_are_is_an_error(data, tmp_path):
    from proof.tasks import cut

    made = {task["name"]: Path(task["dataset"]) for task in cut(data, 4, tmp_path)}
    assert json.loads((made["seven labels 5-7 part 1"] / "labels.json").read_text()) == ["e", "f", "g"]
    with pytest.raises(DataError, match="its 3 data sets give 6 tasks of 104 rows each, 7 were asked for"):
        cut(data, 7, tmp_path)


# --- the whole proof -----------------------------------------------------------------------------------


def test_a_proof_holds_goes_on_and_sees_one_bit(prove, tmp_path, capsys):
    code, found = prove(tmp_path)
    said = capsys.readouterr().out
    assert "exssnet: task 3 of 3: " in said and "forgetting so far 0;" in said
    assert promises(found) == {
        "after every 2 tasks": True,
        "and so are its probe logits": True,
        "reloaded from the last bank": True,
        "exported": False,  # hf_cl is in this very process, and that is seen
        "one changed bit of a copy is found": True,
        "texts without a task id are answered: measured": None,
    }
    assert (code, found["held"]) == (1, False) and "NOT ALL PROMISES HELD" in said
    held = found["methods"]["exssnet"]
    assert [check["tasks"] for check in held["checks"]] == [2, 3]
    assert [one["same_logits"] for one in held["exported"].values()] == [True] * 3
    assert {one["exit_code"] for one in held["controls"].values()} == {1} and len(held["controls"]) == 2
    commits = {
        task["name"]: task_digest(task["parts"])
        for number in ("00", "01")
        for task in RunFolder.open(tmp_path / "exssnet" / number).tasks
    }
    assert held["commits"] == commits and list(commits) == [task["name"] for task in found["tasks"]]

    # Again: what is there is verified first, and found as it was.
    _, again = prove(tmp_path)
    assert promises(again) == promises(found) and "task 3 of 3" not in capsys.readouterr().out
    # One bit under the right checksums, in the very bank: the digests of the ledger tell.
    spoil(tmp_path / "exssnet" / "01" / "bank")
    code, spoilt = prove(tmp_path)
    assert code == 1 and promises(spoilt)["after every 2 tasks"] is False
    assert found["tasks"][0]["name"] in spoilt["methods"]["exssnet"]["checks"][-1]["moved"]
    assert "MOVED" in capsys.readouterr().out


def spoil(bank):
    from proof.spoil import flip_in_mask

    flip_in_mask(bank)


def test_each_way_to_spoil_changes_one_bit_of_the_first_tasks_mask(prove, tmp_path):
    from proof.spoil import flip_in_file, flip_in_mask

    prove(tmp_path, tasks=1, methods=("supsup",))
    bank = tmp_path / "supsup" / "00" / "bank"
    file, was = next(bank.glob("task-*")), kept(bank)
    data = file.read_bytes()
    flip_in_file(bank)
    assert sum((a ^ b).bit_count() for a, b in zip(data, file.read_bytes(), strict=True)) == 1
    file.write_bytes(data)
    flip_in_mask(bank)
    assert kept(bank) == was - 1 > 0  # and so the bank can be read: its checksums fit


def kept(folder):
    """Return the entries in the masks of a bank's first task."""
    bank = MaskBank.from_pretrained(folder)
    task = open_entry(bank.manifest.tasks[0], FolderReader(folder))
    return sum(int(part.mask.sum()) for part in task.parts(bank.manifest.store))


def test_a_proof_goes_on_with_its_own_settings_and_data_alone(prove, data, tmp_path, monkeypatch):
    from proof.ledger import Ledger, Settings
    from proof.shell import Shell

    settings = Settings(3, 2, ("supsup",), "base", 0, 1)
    Ledger(tmp_path / "prove.json", settings).put()
    with pytest.raises(ConfigError, match="Choose another --output-dir"):
        Ledger(tmp_path / "prove.json", Settings(4, 2, ("supsup",), "base", 0, 1))
    shell = Shell(tmp_path, 1)
    with pytest.raises(ConfigError, match="another proof is at work here"):
        Shell(tmp_path, 1)
    shell.close()
    Shell(tmp_path, 1).close()


def test_what_was_not_verified_when_it_was_due_does_not_hold():
    from proof.ledger import Settings, judge

    check = {"tasks": 10, "exact": True, "same_logits": True, "moved": []}
    settings = Settings(12, 10, ("supsup",), "base", 0, 1)

    def first(*checks):
        return [one["held"] for one in judge({"checks": checks}, settings)[:2]]

    assert first(check) == [False, False]
    assert first(check, {**check, "tasks": 12}) == [True, True]
    assert first(check, {**check, "tasks": 12, "exact": False}) == [False, True]
    assert first({**check, "same_logits": False}, {**check, "tasks": 12}) == [True, False]


def test_without_data_it_says_what_to_set(tmp_path, monkeypatch, capsys):
    import prove as script

    monkeypatch.setattr(sys, "argv", ["prove.py", "--output-dir", str(tmp_path / "out")])
    for value, found in (("", "is not set"), (str(tmp_path / "gone"), "is no folder")):
        monkeypatch.setenv("HF_CL_DATA", value)
        assert script.main() == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("prove: error: HF_CL_DATA: ")
        assert f"{found}. Set it to the folder of data sets" in said.err
    assert not (tmp_path / "out").exists()


# --- commands ------------------------------------------------------------------------------------------

WAITS = "import pathlib, sys, time\nplace = pathlib.Path(sys.argv[1])\n(place / 'begun').touch()\n"
WAITS += "while not (place / 'end').exists(): time.sleep(0.05)\n"


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """A command that waits until it is told to end."""
    from proof import shell

    (tmp_path / "waits.py").write_text(WAITS)
    (tmp_path / "fails.py").write_text(
        "import sys\nprint('out')\nprint('no such thing', file=sys.stderr)\nsys.exit(3)\n"
    )
    monkeypatch.setattr(shell, "HERE", tmp_path)
    return ["waits.py", str(tmp_path)]


def until(happens):
    for _ in range(1200):
        if happens():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within a minute")


def test_a_command_that_outlives_a_killed_proof_keeps_others_out(waiting, tmp_path):
    from proof.shell import Shell

    code = "import sys; from pathlib import Path; from proof import shell; shell.HERE = Path(sys.argv[2])\n"
    code += "shell.Shell(shell.HERE, 1).run(sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])}
    killed = subprocess.Popen([sys.executable, "-c", code, *waiting], env=env)
    until((tmp_path / "begun").exists)
    killed.kill()
    killed.wait()
    with pytest.raises(ConfigError, match="another proof is at work here"):
        Shell(tmp_path, 1)
    (tmp_path / "end").touch()

    def free():
        try:
            Shell(tmp_path, 1).close()
        except ConfigError:
            return False
        return True

    until(free)


def test_a_stopped_shell_ends_its_command_and_begins_none(waiting, tmp_path):
    from proof.shell import Failed, Shell, Stopped

    shell = Shell(tmp_path, 1)
    with pytest.raises(Failed, match=r"fails\.py: ended with 3\nno such thing"):
        shell.run(["fails.py"])
    assert shell.run(["fails.py"], fine=3) == (3, "out\n")
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(shell.run, waiting)
        until((tmp_path / "begun").exists)
        shell.stop()
        with pytest.raises(Stopped):
            run.result()
    with pytest.raises(Stopped):
        shell.run(waiting)
    shell.close()
    assert (tmp_path / "commands.txt").read_text().splitlines() == ["fails.py", "fails.py", f"waits.py {tmp_path}"]


# --- in processes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_proof_that_was_killed_goes_on_and_holds(data, base_folder, tmp_path):
    """As it is meant: every step a process of its own, both methods at once, killed in the middle."""
    env = {**os.environ, "HF_CL_DATA": str(data), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), "--tasks", "2", "--every", "1", "--model", str(base_folder)]
    command += ["--output-dir", str(tmp_path / "out")]
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert "task 1 of 2" in first.stdout.readline()
    first.send_signal(signal.SIGTERM)
    assert "the same command goes on" in first.stdout.read() and first.wait() == 75
    second = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert any("verified" in line for line in second.stdout)
    second.kill()
    second.wait()
    second.stdout.close()
    while (done := subprocess.run(command, env=env, capture_output=True, text=True)).returncode == 2:
        assert "another proof is at work here" in done.stderr  # a command of the killed one ends first
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "prove.json").read_text())
    for method in ("exssnet", "supsup"):
        assert [held for held in promises(found, method).values() if held is not None] == [True] * 5
    assert "All promises held." in done.stdout
