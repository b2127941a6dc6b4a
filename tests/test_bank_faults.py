"""Whatever happens to a bank's folder, it loads as a bank that was saved, whole, or is refused; whoever made it."""

import ast
import contextlib
import copy
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata
import unittest.mock
from collections import namedtuple
from pathlib import Path

import bank_faults
import numpy as np
import pytest
import tiny
import torch
from bank_faults import DIED, LOST, WON, Calls, Nursery, end, fails_at, fork, held, path_of, read_whole, small, staged
from peft import LoraConfig, get_peft_model
from torch.ao.quantization import quantize_dynamic
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)
from typer.testing import CliRunner

from hf_cl import MaskBank
from hf_cl.cli import app
from hf_cl.errors import BankConflictError, BankCorruptError, BankError, BaseMismatchError, ConfigError, HfClError
from hf_cl.masks.bitstream import varint
from hf_cl.masks.coding import decode, encode
from hf_cl.packing import opened as unpacking
from hf_cl.storage import bank_folder, disk
from hf_cl.storage.bank_folder import read_file, read_manifest, task_blob, tensors_of
from hf_cl.storage.manifest import FILE, FileEntry

pytest_plugins = ["tiny"]
NAMES = ("pets", "weather", "food")
Usage = namedtuple("Usage", "total used free")


def learn(base_folder, place, method, names, **options):
    learner = tiny.learner(base_folder, tiny.options(method, **options), place / "out")
    for name in names:
        learner.learn(tiny.task(name))
    return MaskBank.from_learner(learner, base_id="someone/tiny")


@pytest.fixture(scope="module")
def learned(base_folder, tmp_path_factory):
    """A bank of three tasks that trained values."""
    return learn(base_folder, tmp_path_factory.mktemp("learned"), "exssnet", NAMES)


@pytest.fixture(scope="module")
def shelf(learned, base_folder, tmp_path_factory):
    """Folders by what they hold: that bank, the same without its first task, a mask alone, and values in int8."""
    place = tmp_path_factory.mktemp("shelf")
    masks = learn(base_folder, place, "supsup", NAMES[:1])
    int8 = learn(base_folder, place / "second", "exssnet", NAMES[:2], values_dtype="int8")
    banks = {"plain": learned, "dropped": learned.drop("pets"), "masks": masks, "int8": int8}
    return {name: bank.save_pretrained(place / name) for name, bank in banks.items()}


@pytest.fixture(scope="module")
def base(base_folder):
    """The base, unwrapped; each test leaves it so."""
    return tiny.fresh(base_folder).model


@pytest.fixture(scope="module")
def banks(learned):
    """Five small banks; no file of one is another's."""
    return [small(learned.manifest, tag) for tag in range(5)]


@pytest.fixture(scope="module")
def nursery(banks, tmp_path_factory):
    """Forks savers of these banks."""
    made = Nursery(banks, tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture
def quick(tmp_path):
    """A folder in memory where there is such: a killed process leaves the same there, and a sync takes no time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


@pytest.fixture
def place(quick, banks):
    """A folder that holds the first of them."""
    banks[0].save(quick / "bank", None)
    return quick / "bank"


@pytest.fixture
def no_lock(monkeypatch):
    """A file system whose locks hold nobody."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- a saver dies (S1) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True], ids=["an empty folder", "a bank"])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_saver_that_dies_at_any_call_leaves_a_whole_bank_and_nothing_after_the_next_save(
    banks, nursery, quick, begun, done
):
    old, new, third = banks[:3]
    before, seen, rubbish = old.digest if begun else None, [], 0
    for number in range(1, 200):
        folder = quick / str(number)
        if begun:
            old.save(folder, None)
        status = nursery.save(folder, 1, before, number, done)
        found = read_whole(folder) if (folder / "bank.json").exists() else None
        seen.append(found)
        rubbish += folder.exists() and bool(staged(folder))
        third.save(folder, found)
        assert (read_whole(folder), files_of(folder).keys()) == (third.digest, third.names)
        if status == WON:
            break
        assert status == DIED
    assert status == WON and number > 30 and rubbish > 10, "the test no longer sees the calls"
    switch = seen.index(new.digest)
    assert set(seen[:switch]) == {before} and set(seen[switch:]) == {new.digest}


def test_two_hundred_random_kills_mix_nothing(banks, nursery, quick):
    folder, known, torn, seen = quick / "bank", {bank.digest: bank for bank in banks}, 0, set()
    banks[0].save(folder, None)
    chance = random.Random(0)
    for _ in range(200):
        turns = chance.sample(range(len(banks)), len(banks))
        nursery.kill(nursery.loop(folder, turns), chance.uniform(0, 0.01))
        found = read_whole(folder)
        seen.add(found)
        if files_of(folder).keys() != known[found].names:
            torn, following = torn + 1, banks[turns[0]]
            following.save(folder, found)
            assert (read_whole(folder), files_of(folder).keys()) == (following.digest, following.names)
    assert seen == set(known) and torn > 5, "the kills came too early or too late to tell anything"


# --- a call fails (S2, S3) ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["no space", "input or output"])
@pytest.mark.parametrize("begun", [False, True], ids=["an empty folder", "a bank"])
def test_a_save_whose_call_fails_raises_before_the_switch_and_never_after(banks, quick, caplog, code, begun):
    old, new = banks[:2]
    before, errors = old.digest if begun else None, []
    for number in range(1, 200):
        folder = quick / str(number)
        if begun:
            old.save(folder, None)
        caplog.clear()
        try:
            with fails_at(number, code) as calls:
                new.save(folder, before)
        except (OSError, BankError) as error:
            errors.append(error)
            assert held(folder) == before and (before is None or read_whole(folder) == before)
            assert not folder.exists() or not staged(folder)
        else:
            assert read_whole(folder) == new.digest
            assert len(caplog.records) == (
                1 if files_of(folder).keys() != new.names or "power cut" in caplog.text else 0
            )
        if calls.count < number:
            break
    assert calls.count < number and len(errors) > 20, "the test no longer sees the calls"
    assert all(str(quick) in str(error) for error in errors)
    assert sum(isinstance(error, OSError) and error.errno == code for error in errors) > 15


@pytest.mark.parametrize(("call", "of"), [("write", "task-00001"), ("fsync", "task-00001"), ("write", "bank.json")])
def test_a_full_disk_is_told_with_the_file_and_the_bytes_it_needed(banks, place, monkeypatch, call, of):
    new = banks[1]
    sizes = {name: len(data) for name, data in new.blobs.items()} | {"bank.json": len(new.manifest.to_bytes())}
    (name,) = (name for name in sizes if name.startswith(of))
    reached = []

    def fail(number, made, args):
        path = str(path_of(args[0])) if made == "fsync" else str(args[0]) if args else ""
        if made == call and f".{name}." in path:
            reached.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Calls(fail), pytest.raises(OSError, match="Make room") as error:
        new.save(place, banks[0].digest)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(place / name))
    assert f"{sizes[name]:,} bytes" in str(error.value) and len(reached) == 1
    assert read_whole(place) == banks[0].digest and not staged(place)


def test_what_fails_after_the_switch_is_a_warning_and_the_next_save_tidies_up(banks, place, caplog):
    old, new = banks[:2]

    def fail(number, name, args):
        if name == "unlink" and Path(args[0]).name in old.blobs:
            raise OSError(errno.EIO, "the disk has gone")

    with Calls(fail), caplog.at_level(logging.WARNING):
        new.save(place, old.digest)
    assert "saved, but leftovers are still there (" in caplog.text and str(place) in caplog.text
    assert read_whole(place) == new.digest and files_of(place).keys() == new.names | old.names
    new.save(place, new.digest)
    assert files_of(place).keys() == new.names


def test_nothing_is_swept_while_a_power_cut_could_bring_the_old_bank_back(banks, place, caplog):
    old, new, switched = *banks[:2], []

    def fail(number, name, args):
        if name == "replace" and Path(args[1]).name == "bank.json":
            switched.append(number)
        elif name == "fsync" and switched:
            raise OSError(errno.EIO, "the disk has gone")

    with Calls(fail), caplog.at_level(logging.WARNING):
        new.save(place, old.digest)
    assert "saved, but a power cut now may bring the bank before it back" in caplog.text
    assert read_whole(place) == new.digest and old.names <= files_of(place).keys()


# --- a power cut (S4) -----------------------------------------------------------------------------------------


def cut_banks(files, events, folder):
    """Return what the folders that a cut can leave load as (None: no bank, False: refused), by events before it."""
    found, known = {}, {}
    for number, left in bank_faults.power_cuts(files, events):
        key = hash(frozenset(left.items()))
        if key not in known:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name, data in left.items():
                (folder / name).write_bytes(data)
            try:
                known[key] = read_whole(folder) if "bank.json" in left else None
            except BankError:
                known[key] = False
        found.setdefault(number, set()).add(known[key])
    return found


def test_after_a_power_cut_at_any_moment_the_old_bank_or_the_new_one_loads(banks, place, quick):
    old, new = banks[:2]
    files = files_of(place)
    found = cut_banks(files, bank_faults.record(place, lambda: new.save(place, old.digest)), quick / "left")
    assert set.union(*found.values()) == {old.digest, new.digest}
    assert (found[0], found[max(found)]) == ({old.digest}, {new.digest})


def test_after_a_power_cut_in_a_first_save_there_is_no_bank_or_all_of_it(banks, quick):
    folder = quick / "bank"
    folder.mkdir()
    events = bank_faults.record(folder, lambda: banks[0].save(folder, None))
    found = cut_banks({}, events, quick / "left")
    assert set.union(*found.values()) == {None, banks[0].digest} and found[max(found)] == {banks[0].digest}


def test_a_file_that_was_there_but_not_on_the_disk_is_synced_before_it_is_named(banks, place, quick):
    old, new = banks[:2]
    files = files_of(place)

    def copies_and_saves():
        for name, data in new.blobs.items():
            with (place / name).open("wb") as file:  # as `cp` does: never synced
                file.write(data)
        new.save(place, old.digest)

    found = cut_banks(files, bank_faults.record(place, copies_and_saves), quick / "left")
    assert set.union(*found.values()) == {old.digest, new.digest}


@pytest.mark.parametrize("lost", ["files", "folder"])
def test_the_power_cuts_would_tell_a_sync_that_is_missing(banks, place, quick, lost):
    old, new = banks[:2]
    files = files_of(place)
    events = bank_faults.record(place, lambda: new.save(place, old.digest))
    events = [event for event in events if event[0] != "sync" or (event[1] == ".") != (lost == "folder")]
    assert False in set.union(*cut_banks(files, events, quick / "left").values())


def test_a_new_folder_is_on_the_disk_with_its_parents(banks, quick):
    synced = []

    def before(number, name, args):
        if name == "fsync":
            synced.append(str(path_of(args[0])))

    with Calls(before):
        banks[0].save(quick / "a" / "b", None)
    assert {str(quick), str(quick / "a"), str(quick / "a" / "b")} <= set(synced)


# --- several savers (S6) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("locks", [True, False], ids=["a lock that holds", "a lock that lies"])
def test_of_processes_that_save_at_once_one_wins_and_the_others_are_told(banks, nursery, quick, locks):
    folder, expected = quick / "bank", None
    for turn in range(50):
        if turn % 5 == 0:
            shutil.rmtree(folder, ignore_errors=True)
            expected = None
        racers = [number for number, bank in enumerate(banks) if bank.digest != expected][: 2 + turn % 3]
        ends = nursery.race(folder, racers, expected, locks=locks)
        assert sorted(ends) == [WON] + [LOST] * (len(racers) - 1)
        expected = read_whole(folder)
        assert expected == banks[racers[ends.index(WON)]].digest


def test_a_whole_save_at_any_call_of_another_leaves_one_winner_without_a_lock(banks, quick, no_lock):
    old, new, rival = banks[:3]
    wins = set()
    for number in range(1, 200):
        folder, told = quick / str(number), []
        old.save(folder, None)

        def rivals(now, name, args, number=number, folder=folder, told=told):
            if now == number and not told:
                told.append("begun")
                told[0] = save(rival, folder, old.digest)

        with Calls(rivals) as calls:
            ended = save(new, folder, old.digest)
        if calls.count < number:
            break
        assert sorted([ended, *told]) == [WON, LOST]
        assert read_whole(folder) == (new if ended == WON else rival).digest
        wins.add(ended)
    assert wins == {WON, LOST} and number > 30


def save(bank, folder, expected):
    try:
        bank.save(folder, expected)
    except BankConflictError:
        return LOST
    return WON


def test_a_saver_that_died_with_its_manifest_staged_is_not_waited_for(banks, place, no_lock):
    old, new, third = banks[:3]

    def dies():
        def before(number, name, args):
            if name == "replace" and Path(args[1]).name == "bank.json":
                os._exit(DIED)

        with Calls(before):
            new.save(place, old.digest)

    assert end(fork(dies)) == DIED and [name for name in staged(place) if name.startswith(".bank.json.")]
    third.save(place, old.digest)
    assert files_of(place).keys() == third.names


def test_two_savers_that_remove_each_others_manifest_try_again(banks, place, no_lock, monkeypatch):
    plain, turns = disk.rename, []

    def rename(temporary, path):
        if path.name == "bank.json" and len(turns) < 5:
            turns.append(temporary.name)
            temporary.unlink()
        plain(temporary, path)

    monkeypatch.setattr(disk, "rename", rename)
    banks[1].save(place, banks[0].digest)
    assert len(set(turns)) == 5 and read_whole(place) == banks[1].digest


def test_who_is_always_in_the_way_is_told_in_the_end(banks, place, monkeypatch):
    monkeypatch.setattr(bank_folder, "swap", lambda *_: False)
    monkeypatch.setattr(bank_folder.time, "sleep", lambda _: None)
    with pytest.raises(BankConflictError, match="extend"):
        banks[1].save(place, banks[0].digest)
    assert read_whole(place) == banks[0].digest


def test_saving_what_is_there_already_is_no_conflict(banks, place):
    banks[0].save(place, None)
    assert files_of(place).keys() == banks[0].names


def test_a_file_system_without_locks_is_saved_to(banks, place, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    banks[1].save(place, banks[0].digest)
    assert read_whole(place) == banks[1].digest


def test_a_saver_waits_for_one_that_holds_the_lock(banks, nursery, place):
    with (place / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        saver = nursery.ask("save", str(place), 1, banks[0].digest, 0, False)
        time.sleep(0.3)
        assert files_of(place).keys() == banks[0].names
    assert nursery.ask("end", saver) == WON and read_whole(place) == banks[1].digest


def test_a_manifest_that_is_replaced_between_a_look_and_the_reading_is_read(banks, place, monkeypatch):
    longer = small(banks[0].manifest, 200).manifest
    plain = bank_folder.read_file

    def read(path, size):
        (place / "new").write_bytes(longer.to_bytes())
        (place / "new").replace(path)
        return plain(path, size)

    monkeypatch.setattr(bank_folder, "read_file", read)
    assert len(longer.to_bytes()) > len(banks[0].manifest.to_bytes())
    assert read_manifest(place).digest == longer.digest


def test_a_reader_between_two_saves_sees_one_of_the_banks(banks, nursery, place):
    saver, seen = nursery.loop(place, [0, 1, 2, 3, 4]), []
    try:
        while len(seen) < 300 or (len(set(seen)) < 2 and len(seen) < 20_000):
            seen.append(read_manifest(place).digest)
    finally:
        nursery.kill(saver, 0)
    assert len(set(seen)) > 1 and set(seen) <= {bank.digest for bank in banks}


# --- places that cannot be written (S7, S9) -------------------------------------------------------------------


def test_a_read_only_bank_loads_and_saving_there_says_where_and_what_to_do(banks, place):
    (place / ".lock").unlink()
    parents = [parent for parent in place.parents if parent.owner() != "root" or os.getuid() == 0]
    modes = {folder: folder.stat().st_mode for folder in parents}

    def as_anybody():
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)
        assert read_whole(place) == banks[0].digest
        for bank in banks[:2]:
            with pytest.raises(PermissionError, match=r"Choose a folder that can be written.*\.lock"):
                bank.save(place, banks[0].digest)
        with pytest.raises(PermissionError, match="within"):
            banks[0].save(place / "within", None)
        return WON

    try:
        for folder in parents:
            folder.chmod(modes[folder] | 0o055)
        place.chmod(0o555)
        assert end(fork(as_anybody)) == WON
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)
        place.chmod(0o755)


@pytest.mark.parametrize("name", ["x" * 300, "file/bank"])
def test_a_place_that_no_folder_can_have_is_named(banks, tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=name[:20]):
        banks[0].save(tmp_path / name, None)


def test_a_disk_with_less_than_twice_the_room_is_refused_before_a_byte_is_written(banks, place, monkeypatch):
    size = sum(map(len, banks[1].blobs.values()))
    before = files_of(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(size * 9, size * 7, size * 3 // 2))
    with pytest.raises(BankError, match=f"saving needs {2 * size:,} bytes, {size * 3 // 2:,} are free. Make room"):
        banks[1].save(place, banks[0].digest)
    assert files_of(place) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(size * 9, size * 7, size * 2))
    banks[1].save(place, banks[0].digest)
    assert read_whole(place) == banks[1].digest


# --- damaged bytes (S5) ---------------------------------------------------------------------------------------

MUTATIONS = {
    "flip": lambda data, at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
    "truncate": lambda data, at: data[:at],
    "append": lambda data, at: data + bytes([at % 256]) * (at % 7 + 1),
    "zero": lambda data, at: data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :],
    "swap": lambda data, at: data[:at] + data[at : at + 2][::-1] + data[at + 2 :],
    "duplicate": lambda data, at: data[:at] + data[at : at + 16] * 2 + data[at + 16 :],
    "shift": lambda data, at: data[at:] + data[:at],
}


def spoil(kind, folder, turns):
    """Damage one file after another; return how many were refused, and how many were left as they were."""
    whole, chance, refused, same = files_of(folder), random.Random(kind), 0, 0
    names = sorted(name for name in whole if name != ".lock")
    for turn in range(turns):
        name = names[turn % len(names)]
        # Every second one in the first bytes, where headers and digests are.
        at = chance.randrange(len(whole[name]) if turn % 2 else 200)
        spoilt = MUTATIONS[kind](whole[name], at)
        (folder / name).write_bytes(spoilt)
        if spoilt == whole[name]:
            same += 1
            read_whole(folder)
        else:
            with pytest.raises(BankCorruptError, match=name):
                read_whole(folder)
            refused += 1
        (folder / name).write_bytes(whole[name])
    return refused, same


@pytest.mark.parametrize("kind", MUTATIONS)
def test_no_damaged_file_of_a_bank_is_loaded(shelf, quick, kind):
    refused, same = spoil(kind, shutil.copytree(shelf["dropped"], quick / "bank"), 300)
    assert refused + same == 300 and refused > 200
    assert read_whole(quick / "bank") == read_manifest(shelf["dropped"]).digest


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTATIONS)
def test_no_damaged_file_of_a_bank_is_loaded_in_two_thousand(shelf, quick, kind):
    refused, same = spoil(kind, shutil.copytree(shelf["dropped"], quick / "bank"), 2_000)
    assert refused + same == 2_000 and refused > 1_800


def test_what_a_damaged_bank_says_names_the_file_and_both_digests(shelf, quick):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    entry = read_manifest(folder).tasks[0].file
    (folder / entry.name).write_bytes(bytes(entry.bytes))
    found = hashlib.sha256(bytes(entry.bytes)).hexdigest()
    with pytest.raises(BankCorruptError, match=f"{entry.name}.*{found[:16]}.*{entry.sha256[:16]}.*Fetch it again"):
        MaskBank.from_pretrained(folder).verify()


def test_a_damaged_file_is_not_saved_on(shelf, quick):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    opened, entry = MaskBank.from_pretrained(folder), read_manifest(folder).tasks[1].file
    (folder / entry.name).write_bytes(bytes(entry.bytes))
    with pytest.raises(BankCorruptError, match=entry.name):
        opened.save_pretrained(quick / "copy")
    assert not (quick / "copy" / "bank.json").exists()


# --- code and paths of an attacker (H1, H2, H13) --------------------------------------------------------------

EVIL = b"cos\nsystem\n(S'touch %s'\ntR."


ROOTS = [
    "../../x", "/etc/passwd", "C:\\x", "..\\..\\x", "\\\\host\\share", "CON", "nul.txt", "~", "~root", ".", "..", "a/b",
    "a\x00b", "\x00", "-rf", "--output-dir=/", "$(id)", "`id`", "%s%n", "{0}", "${HOME}", "*", "bank.json", ".lock",
    "task-00000-0123456789abcdef.safetensors", "README.md", "adapter_model.safetensors", "weight", "base_layer",
    "task0", "hfcl_values", "default", "task1", "__class__", "__init__", "import os", "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>", "[a](javascript:1)", "| a | b |", "---", "# a", "a: b", "&a *a", "\x1b[31mred",
    "a\nb", "!!python/object:os.system", "\x1b]0;title\x07", "a\r\nb", "a\tb", "\u202egnp.exe", "\u2066a\u2069",
    "a\u200bb", "\ufeffa", "\U000e0041", "p\u0435ts", "\uff50\uff45\uff54\uff53", "\ud800", "\udfff", "e\u0301",
    "\u1e9b\u0323", "x" * 10_000, "é" * 300, "💥", "null", "true", "0", "1e9",
]  # fmt: skip
PIECES = ["../", "/", "\\", "\x00", ".", "\x1b", "~", "a", "é", "\u202e", "%2e", ":"]


def hostile_names():
    """Return two hundred names that no file, module, terminal or page should be trusted with; none equals another."""
    chance = random.Random(0)
    found = {unicodedata.normalize("NFC", name).casefold(): name for name in ROOTS}
    while len(found) < 200:
        name = "".join(chance.choices(PIECES, k=4))
        found.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
    return [*found.values()]


@pytest.fixture(scope="module")
def watched(shelf, base_folder, tmp_path_factory):
    """What an audit hook saw while banks of an attacker were opened, attached, verified and saved; what was refused."""
    place = tmp_path_factory.mktemp("watched")
    hostile, out = shutil.copytree(shelf["plain"], place / "hostile"), place / "out"
    out.mkdir()
    evil = EVIL % str(out / "pwned").encode()
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pkl", "model.pt", "data.joblib", "training_args.bin"):
        (hostile / name).write_bytes(evil)
    code = f"import pathlib\npathlib.Path({str(out / 'pwned')!r}).touch()\n"
    for name in (
        "modeling_evil.py",
        "__init__.py",
        "conftest.py",
        "sitecustomize.py",
        "sklearn.py",
        "kernels.py",
        "x.pth",
    ):
        (hostile / name).write_text(code)
    auto = {"AutoModel": "modeling_evil.Evil", "AutoModelForSequenceClassification": "modeling_evil.Evil"}
    config = {"auto_map": auto, "trust_remote_code": True, "_attn_implementation_internal": "evil/kernel"}
    (hostile / "config.json").write_text(json.dumps({"model_type": "bert", **config}))
    (hostile / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "auto_mapping": {"parent_library": "x"}})
    )
    (hostile / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ x }}", "vocab_file": "/etc/passwd"})
    )
    bank_faults.sign(hostile, lambda body: body["base"].update(id="evil/base", revision="main"))
    (out / "names.json").write_text(json.dumps(hostile_names()))
    program = Path(bank_faults.__file__).with_name("bank_watch.py")
    done = subprocess.run(
        [sys.executable, program, base_folder, shelf["masks"], shelf["plain"], hostile, out],
        capture_output=True, text=True, check=True, cwd=hostile,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1]), out


def test_a_folder_full_of_code_is_opened_without_any_of_it(watched):
    found, out = watched
    assert found["refused"]["hostile"] is False
    assert found["events"] == [] and not (out / "pwned").exists()


RUNS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jinja2", "runpy", "code", "imp"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "np.load", "numpy.load", "pd.read_pickle"}
BY_NAME = {"__init__.py", "plugins.py"}
"""Where modules are imported by a name: one of a table, and one that is checked to be a file of the package."""


def what_runs(tree):
    """Yield what in a module could run, or import, what it was given as data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if name.partition(".")[0] in RUNS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.endswith("import_module"):
                yield name
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "trust_remote_code") and ast.unparse(keyword.value) != "False":
                    yield ast.unparse(keyword)


def test_nothing_in_the_package_could_run_what_it_reads():
    package = Path(bank_folder.__file__).parents[1]
    files = [(str(file.relative_to(package)), ast.parse(file.read_text("utf-8"))) for file in package.rglob("*.py")]
    found = {(name, what) for name, tree in files for what in what_runs(tree)}
    assert found == {(name, "importlib.import_module") for name in BY_NAME}


def test_what_would_run_is_seen():
    code = "import pickle\nfrom joblib import load\ntorch.load(x)\neval(x)\nf(trust_remote_code=y)\nx.eval()"
    found = ["pickle", "joblib", "torch.load", "eval", "trust_remote_code=y"]
    assert [*what_runs(ast.parse(code))] == found


def test_two_hundred_hostile_names_are_labels_and_no_paths(watched):
    found, out = watched
    assert found["refused"] == {"hostile": False, **{str(turn): False for turn in range(0, 200, 40)}}
    assert found["events"] == []
    names = [task.name for turn in range(0, 200, 40) for task in read_manifest(out / str(turn)).tasks]
    assert names == hostile_names()
    files = {file.name for turn in range(0, 200, 40) for file in (out / str(turn)).iterdir()}
    assert all(FILE.fullmatch(name) or name in ("bank.json", ".lock") for name in files)


@pytest.mark.parametrize("name", ["", " ", "\t\n", "\u3000"])
def test_a_name_of_nothing_is_refused(shelf, quick, name):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    bank_faults.sign(folder, lambda body: body["tasks"][0].update(name=name))
    with pytest.raises(BankCorruptError, match="without a name"):
        MaskBank.from_pretrained(folder)


# --- banks that are too large (H3) ----------------------------------------------------------------------------


def header(entries, data=b"", size=None):
    """Return a safetensors file with any header: a text, or a dict of tensors."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def tensor(dtype="U8", shape=(1,), offsets=(0, 1)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BODIES = {
    "lists 200,000 deep": lambda: b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "objects 200,000 deep": lambda: b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "lists that never end": lambda: b'{"a":' + b"[" * 10**6,
    "a million tasks": lambda: b'{"tasks":[' + b",".join([b"{}"] * 10**6) + b"]}",
    "a million labels": lambda: b'{"labels":[' + b",".join(b'"%d"' % at for at in range(10**6)) + b"]}",
    "five million lists": lambda: b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
    "eight million numbers": lambda: b'{"a":[' + b"1," * 8_000_000 + b"1]}",
    "a million keys": lambda: b"{" + b",".join(b'"%d":1' % at for at in range(10**6)) + b"}",
    "a number of a million digits": lambda: b'{"a":' + b"9" * 10**6 + b"}",
    "a fraction of a million digits": lambda: b'{"a":0.' + b"9" * 10**6 + b"}",
    "an exponent beyond all": lambda: b'{"a":1e999999999}',
    "a text of four million": lambda: b'{"a":"' + b"x" * 4_000_000 + b'"}',
    "a key of four million": lambda: b'{"' + b"x" * 4_000_000 + b'":1}',
    "half a million escapes": lambda: b'{"a":"' + rb"\u0000" * 500_000 + b'"}',
    "not UTF-8": lambda: b'{"a":"\xff\xfe"}',
    "a byte order mark": lambda: b'\xef\xbb\xbf{"a":1}',
    "NaN": lambda: b'{"a":NaN}',
    "Infinity": lambda: b'{"a":-Infinity}',
    "only white space": lambda: b"{" + b" " * 10**6 + b"}",
    "a list": lambda: b"[1]",
    "nothing": lambda: b"{}",
}
VALUES = {
    "a next number of 10^18": lambda body: body.update(next_index=10**18),
    "a number of 10^12": lambda body: body["tasks"][2].update(index=10**12),
    "a file of 10^15 bytes": lambda body: body["tasks"][0]["file"].update(bytes=10**15),
    "a file of -1 bytes": lambda body: body["tasks"][0]["file"].update(bytes=-1),
    "a layer of 10^18 entries": lambda body: body["store"]["shapes"].update(
        {body["store"]["layers"][0]: [10**9, 10**9]}
    ),
    "a layer of no entries": lambda body: body["store"]["shapes"].update({body["store"]["layers"][0]: [0, 16]}),
    "a layer of three axes": lambda body: body["store"]["shapes"].update({body["store"]["layers"][0]: [1, 16, 16]}),
}
EMPTY = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
FILES = {
    "a header of 2^63 bytes": lambda: header({}, size=2**63),
    "a header of 2^40 bytes": lambda: header({}, size=2**40),
    "a header of 100 MB in 1 kB": lambda: header({}, bytes(1000), size=10**8),
    "a header of a megabyte": lambda: header({"x" * 10**6: tensor()}, b"1"),
    "900,000 tensors": lambda: header(b"{" + b",".join(EMPTY % at for at in range(900_000)) + b"}"),
    "a header 100,000 deep": lambda: header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a header of small lists": lambda: header(b'{"a":[' + b"[]," * 80_000 + b"[]]}"),
    "a header that is no object": lambda: header(b"[1]"),
    "a header that is nothing": lambda: header(b""),
    "a header with a key twice": lambda: header(b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2), b"1"),
    "metadata": lambda: header({"__metadata__": {"a": "b"}, "masks": tensor()}, b"1"),
    "a shape beyond 64 bits": lambda: header({"a": tensor(shape=[2**40, 2**40])}, b"1"),
    "an empty shape beyond 64 bits": lambda: header({"a": tensor(shape=[2**40, 0, 2**40], offsets=(0, 0))}),
    "a shape of 2^70": lambda: header({"a": tensor(shape=[2**70])}, b"1"),
    "a shape below nothing": lambda: header({"a": tensor(shape=[-1])}, b"1"),
    "a shape that is a text": lambda: header({"a": tensor() | {"shape": "1"}}, b"1"),
    "80,000 axes": lambda: header({"a": tensor(shape=[1] * 80_000)}, b"1"),
    "offsets beyond the file": lambda: header({"a": tensor(shape=[10**9], offsets=(0, 10**9))}, b"1"),
    "offsets that fall": lambda: header({"a": tensor(offsets=(1, 0))}, b"1"),
    "offsets below nothing": lambda: header({"a": tensor(offsets=(-1, 0))}, b"1"),
    "two tensors of the same bytes": lambda: header({"a": tensor(), "b": tensor()}, b"1"),
    "bytes of no tensor": lambda: header({"a": tensor()}, b"12"),
    "a tensor without a shape": lambda: header({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"1"),
    "a tensor that is a number": lambda: header({"a": 1}, b"1"),
    "a file of seven bytes": lambda: b"1234567",
}


def refused_with_little(nursery, folder, match=""):
    kind, what, seconds = nursery.limited(folder)
    assert kind in ("BankCorruptError", "BankError"), (kind, what)
    assert seconds < 1 and (str(folder) in what or match in what)


@pytest.mark.parametrize("case", [*BODIES, *VALUES])
def test_a_manifest_that_asks_for_too_much_is_refused_in_a_second_and_50_megabytes(shelf, nursery, quick, case):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    if case in VALUES:
        bank_faults.sign(folder, VALUES[case])
    else:
        bank_faults.write_signed(folder, BODIES[case]())
    refused_with_little(nursery, folder)


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_asks_for_too_much_is_refused_in_a_second_and_50_megabytes(shelf, nursery, quick, case):
    folder, data = shutil.copytree(shelf["plain"], quick / "bank"), FILES[case]()
    bank_faults.sign(folder, lambda body: bank_faults.set_file(folder, body["tasks"][0], data))
    refused_with_little(nursery, folder, match="task-00000-")


@pytest.mark.parametrize("size", [17 * 2**20, 10**13])
def test_a_manifest_larger_than_any_is_not_read(shelf, nursery, quick, size):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    os.truncate(folder / "bank.json", size)
    refused_with_little(nursery, folder)


def test_a_file_that_does_not_fit_into_memory_is_told_so(shelf, nursery, quick):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    entry = read_manifest(folder).tasks[0].file
    os.truncate(folder / entry.name, 10**11)
    bank_faults.sign(folder, lambda body: body["tasks"][0]["file"].update(bytes=10**11))
    kind, what, seconds = nursery.limited(folder)
    assert kind == "BankError" and "100,000,000,000 bytes do not fit into memory" in what and seconds < 1


def test_a_plain_bank_is_read_within_the_same_limits(shelf, nursery):
    assert nursery.limited(shelf["plain"])[0] == ""


# --- what a file says against what it is (H4, H5) -------------------------------------------------------------


class Forger:
    """The body of a manifest and the tensors of its files, taken apart to be made wrong."""

    def __init__(self, body, tensors, chance):
        self.body, self.tensors, self.chance = body, tensors, chance
        self.number = chance.randrange(len(tensors))
        self.shapes = [body["store"]["shapes"][path] for path in body["store"]["layers"]]

    @property
    def file(self):
        return self.tensors[self.number]

    def codes(self, what):
        data, ends = self.file[what].numpy().tobytes(), itertools.accumulate(self.file[LENGTHS[what]].tolist())
        edges = [0, *ends]
        return [data[a:b] for a, b in itertools.pairwise(edges)]

    def put(self, what, codes):
        self.file[what] = torch.frombuffer(bytearray(b"".join(codes)), dtype=torch.uint8)
        self.file[LENGTHS[what]] = torch.tensor([len(code) for code in codes], dtype=torch.int32)

    def recode(self, what, change):
        """Replace the code of one layer: `change` is given the code, the layer's shape and what it owns."""
        codes, layer = self.codes(what), self.chance.randrange(len(self.shapes))
        codes[layer] = change(codes[layer], *self.shapes[layer])
        self.put(what, codes)

    def owned(self):
        """Return, layer by layer, which entries of its mask the task owns."""
        masks = [decode(code, h * w, w) for code, (h, w) in zip(self.codes("masks"), self.shapes, strict=True)]
        return [decode(code, int(mask.sum())) for code, mask in zip(self.codes("owned"), masks, strict=True)]

    def own(self, value):
        """Claim an entry too many, or one too few, with its value."""
        owned = self.owned()
        layer = self.chance.choice([place for place, own in enumerate(owned) if (own != value).any()])
        own = owned[layer]
        own[self.chance.choice(np.flatnonzero(own != value))] = value
        self.recode_at("owned", layer, encode(own))
        values = self.file["values"]
        self.file["values"] = torch.cat([values, values[:1]]) if value else values[:-1].clone()

    def recode_at(self, what, layer, code):
        codes = self.codes(what)
        codes[layer] = code
        self.put(what, codes)

    def cast(self, name, *dtypes):
        self.file[name] = self.file[name].to(self.chance.choice(dtypes))

    def reshape(self, name, *shapes):
        self.file[name] = self.file[name].reshape(self.chance.choice(shapes)).contiguous()


LENGTHS = {"masks": "mask_lengths", "owned": "owned_lengths"}
STORED = ("masks", "mask_lengths", "owned", "owned_lengths", "values", "probe")
HEAD = ("head.classifier.weight", "head.classifier.bias")
FOREIGN = ("scores", "head.", "head.x", "head.classifier.weight2", "value_scales", "kkt", "", "../x", "a\0b",
           "head.bert.embeddings.word_embeddings.weight", "head.bert.pooler.dense.weight")  # fmt: skip
HUGE = [
    bytes([mode << 6 | k]) + varint(count) + tail
    for mode, k in ((1, 0), (1, 63), (2, 8), (3, 0))
    for count in (2**60, 2**31, 2**20)
    for tail in (b"", b"\0" * 8)
]


def twice(f, what):
    codes = f.codes(what)
    f.put(what, [*codes, codes[0]])


def exchange(f):
    codes = f.codes("masks")
    sizes = [math.prod(shape) for shape in f.shapes]
    other = f.chance.choice([place for place, size in enumerate(sizes) if size != sizes[0]])
    codes[0], codes[other] = codes[other], codes[0]
    f.put("masks", codes)


def beyond(f, code, height, width):
    wide = np.zeros(height * width + 64, bool)
    wide[[3, height * width + f.chance.randrange(60)]] = True
    return encode(wide)


def too_many(f, code, height, width):
    full = np.zeros(height * width, bool)
    full[: int(height * width * 0.3) + 2 + f.chance.randrange(20)] = True
    return encode(full, width)


def negative(f):
    lengths = f.file["mask_lengths"].clone()
    lengths[0] += lengths[1] + 5
    lengths[1] = -5
    f.file["mask_lengths"] = lengths


def another_task(f):
    other = {0: 2, 1: 2, 2: 0}[f.number]
    f.tensors[f.number] = dict(f.tensors[other])


def without_layer(f):
    path = f.body["store"]["layers"].pop(f.chance.randrange(len(f.shapes)))
    del f.body["store"]["scales"][path], f.body["store"]["shapes"][path]


def two_layers_exchanged(f):
    a, b = f.chance.sample(range(len(f.shapes)), 2)
    layers = f.body["store"]["layers"]
    layers[a], layers[b] = layers[b], layers[a]


VIOLATIONS = {
    "a stored tensor is missing": lambda f: f.file.pop(f.chance.choice(STORED)),
    "a part of the head is missing": lambda f: f.file.pop(f.chance.choice(HEAD)),
    "a tensor that no task has": lambda f: f.file.update({f.chance.choice(FOREIGN): torch.zeros(3)}),
    "scales where the values have none": lambda f: f.file.update(value_scales=torch.zeros(0)),
    "a mask too many": lambda f: twice(f, "masks"),
    "owners of a layer too many": lambda f: twice(f, "owned"),
    "a mask too few": lambda f: f.put("masks", f.codes("masks")[:-1]),
    "owners of a layer too few": lambda f: f.put("owned", f.codes("owned")[1:]),
    "masks of other layers": exchange,
    "lengths below nothing": negative,
    "lengths that are a table": lambda f: f.reshape("mask_lengths", (1, -1), (-1, 1)),
    "one length": lambda f: f.file.update(mask_lengths=f.file["mask_lengths"].sum().to(torch.int32)),
    "lengths of another sum": lambda f: f.file["mask_lengths"].add_(f.chance.choice([-1, 1, 2**20])),
    "lengths that are fractions": lambda f: f.cast("mask_lengths", torch.float32, torch.bfloat16),
    "codes of another type": lambda f: f.cast("masks", torch.int8, torch.int32, torch.float32),
    "a mask's code cut short": lambda f: f.recode("masks", lambda code, *_: code[:-1]),
    "a mask's code with a byte more": lambda f: f.recode("masks", lambda code, *_: code + b"\0"),
    "a code of nothing": lambda f: f.recode("masks", lambda code, *_: b""),
    "bits set in the padding": lambda f: f.recode_at("masks", 0, SPARSE[:-1] + bytes([SPARSE[-1] | 1])),
    "an entry beyond the last": lambda f: f.recode("masks", functools.partial(beyond, f)),
    "more entries than the density": lambda f: f.recode("masks", functools.partial(too_many, f)),
    "counts beyond all memory": lambda f: f.recode("masks", lambda *_: f.chance.choice(HUGE)),
    "owners with counts beyond all memory": lambda f: f.recode("owned", lambda *_: f.chance.choice(HUGE)),
    "an entry claimed that an earlier task owns": lambda f: (
        setattr(f, "number", f.chance.choice([1, 2])) or f.own(True)
    ),
    "a free entry that is not claimed": lambda f: f.own(False),
    "values too many": lambda f: f.file.update(values=torch.cat([f.file["values"], f.file["values"][:3]])),
    "values too few": lambda f: f.file.update(values=f.file["values"][f.chance.choice([1, 7, 10**6]) :].clone()),
    "values of another type": lambda f: f.cast("values", torch.float32, torch.int8, torch.int32, torch.uint8),
    "values that are a table": lambda f: f.reshape("values", (-1, 1)),
    "one value": lambda f: f.file.update(values=f.file["values"][0].clone()),
    "a head under another name": lambda f: f.file.update({f.chance.choice(FOREIGN): f.file.pop(f.chance.choice(HEAD))}),
    "a head of other rows": lambda f: f.file.update({HEAD[0]: f.file[HEAD[0]][1:].clone()}),
    "a head turned around": lambda f: f.reshape(HEAD[0], (16, -1), (1, -1), (-1,)),
    "a head of another type": lambda f: f.cast(
        f.chance.choice(HEAD), torch.bfloat16, torch.int32, torch.int8, torch.uint8
    ),
    "a probe of other rows": lambda f: f.file.update(probe=f.file["probe"][1:].clone()),
    "a probe of another type": lambda f: f.cast("probe", torch.bfloat16, torch.int32),
    "a mean feature of another width": lambda f: f.file.update(
        {"kkt.mean": torch.zeros(f.chance.choice([0, 1, 15, 17]))}
    ),
    "another task's file": another_task,
    "a layer that is not masked": without_layer,
    "layers in another order": two_layers_exchanged,
    "a task that trained nothing after all": lambda f: f.body["tasks"][f.number].update(trains="nothing"),
    "a density below what is kept": lambda f: f.body["tasks"][f.number].update(density=f.chance.uniform(0.01, 0.25)),
    "values that would be of another type": lambda f: f.body["tasks"][f.number].update(values_dtype="float32"),
    "a task left out of what is inherited": lambda f: f.body["tasks"][2].update(inherits=[]),
    "a scale below nothing": lambda f: f.body["store"].update(scale=f.chance.choice([-1.0, 0.0])),
    "no head": lambda f: f.body["store"].update(head=[]),
}
ONLY_DIGESTS = ("a task left out of what is inherited",)
SPARSE = encode(np.arange(256) == 3)


def answers(folder, base, tasks=None):
    """Return what each task of a bank answers, attached together or as named."""
    opened, found = MaskBank.from_pretrained(folder), {}
    model = opened.attach(base, tasks)
    try:
        for name in tasks or opened.tasks:
            opened.activate(model, name)
            found[name] = tiny.logits(model)
    finally:
        model.unload()
    return found


class Equal(dict):
    """Digests that are whatever they are compared with: an attacker's, who has computed them anew."""

    def __getitem__(self, key):
        return unittest.mock.ANY


def attacker(patch):
    """Let no digest of a task's content tell: the rest must."""
    patch.setattr(unpacking, "task_digests", lambda *_: Equal())


@pytest.mark.parametrize("case", VIOLATIONS)
def test_what_no_bank_can_say_is_refused_though_its_digests_are_right(shelf, base, quick, monkeypatch, case):
    chance = random.Random(case)
    for turn in range(6):
        if turn == 1 and case not in ONLY_DIGESTS:
            attacker(monkeypatch)
        folder = shutil.copytree(shelf["plain"], quick / str(turn))
        bank_faults.forge(folder, lambda body, tensors: VIOLATIONS[case](Forger(body, tensors, chance)))
        with pytest.raises(BankError):
            if turn > 1:  # five times as fast as attaching, which two of them do in any case
                MaskBank.from_pretrained(folder).verify()
            answers(folder, base)
            answers(folder, base, ["food"])
    assert not hasattr(base, "peft_config")


SCALES = {
    "no scales": lambda f: f.file.pop("value_scales"),
    "a scale too many": lambda f: f.file.update(value_scales=torch.cat([f.file["value_scales"]] * 2)),
    "a scale too few": lambda f: f.file.update(value_scales=f.file["value_scales"][1:].clone()),
    "scales that are a table": lambda f: f.reshape("value_scales", (-1, 1)),
    "scales of another type": lambda f: f.cast("value_scales", torch.float32, torch.int32),
    "scales below nothing": lambda f: f.file["value_scales"].neg_(),
    "values of bfloat16": lambda f: f.cast("values", torch.bfloat16),
}


@pytest.mark.parametrize("case", SCALES)
def test_scales_that_are_not_those_of_the_values_are_refused(shelf, base, quick, monkeypatch, case):
    attacker(monkeypatch)
    chance = random.Random(case)
    for turn in range(3):
        folder = shutil.copytree(shelf["int8"], quick / str(turn))
        bank_faults.forge(folder, lambda body, tensors: SCALES[case](Forger(body, tensors, chance)))
        with pytest.raises(BankError):
            answers(folder, base)


@pytest.mark.slow
@pytest.mark.parametrize("case", VIOLATIONS)
def test_seven_hundred_banks_that_say_what_none_can_are_refused(shelf, base, quick, monkeypatch, case):
    for turn in range(15):
        if turn == 20 and case not in ONLY_DIGESTS:
            attacker(monkeypatch)
        folder = shutil.copytree(shelf["plain"], quick / "bank", dirs_exist_ok=True)
        chance = random.Random(f"{case} {turn}")
        bank_faults.forge(folder, lambda body, tensors, chance=chance: VIOLATIONS[case](Forger(body, tensors, chance)))
        with pytest.raises(BankError):
            answers(folder, base)
            answers(folder, base, ["food"])


@pytest.mark.parametrize("place", ["masks", "owned", "values", "head.classifier.weight"])
def test_altered_content_is_refused_or_where_its_digests_are_right_proved_to_have_moved(
    shelf, base, quick, monkeypatch, place
):
    chance, whole = random.Random(place), answers(shelf["plain"], base)
    for _ in range(6):
        folder = shutil.copytree(shelf["plain"], quick / "bank", dirs_exist_ok=True)

        def alter(body, tensors):
            data = tensors[chance.randrange(3)][place].view(torch.uint8).view(-1)
            at = chance.randrange(len(data))
            data[at] ^= 1 << chance.randrange(8)

        bank_faults.forge(folder, alter)
        with pytest.raises(BankCorruptError):
            answers(folder, base)
        with monkeypatch.context() as patch:
            attacker(patch)
            try:
                found = answers(folder, base)
            except BankError:
                continue
        assert found.keys() == whole.keys()
        assert any(task["moved"] for task in MaskBank.from_pretrained(folder).verify(base))


def test_a_bank_of_few_bytes_cannot_make_the_proof_without_a_base_take_gigabytes(shelf, quick):
    folder = shutil.copytree(shelf["plain"], quick / "bank")

    def widen(body, tensors):
        body["store"]["shapes"][body["store"]["layers"][0]] = [2**15, 2**15]

    bank_faults.forge(folder, widen)

    def proves():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + 4 * bank_faults.MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(BankError):
            MaskBank.from_pretrained(folder).verify()
        return WON

    assert end(fork(proves)) == WON


# --- names and labels (H6, H7) --------------------------------------------------------------------------------

TWICE = [
    b'"generation":', b'"base":', b'"store":', b'"tasks":', b'"next_index":', b'"format":', b'"version":', b'"parts":',
    b'"fingerprint":', b'"compose":', b'"scales":', b'"name":', b'"labels":', b'"file":', b'"sha256":', b'"index":',
]  # fmt: skip
ALIKE = [
    ("pets", "Pets"), ("pets", "PETS"), ("straße", "STRASSE"), ("é", "e\u0301"), ("É", "e\u0301"), ("\u017f", "s"),
    ("\u212a", "k"), ("\u212b", "å"), ("ﬁ", "fi"), ("\u01f0", "J\u030c"), ("Σ", "ς"), ("한", "\u1112\u1161\u11ab"),
]  # fmt: skip


@pytest.mark.parametrize("key", TWICE, ids=bytes.decode)
def test_a_key_that_stands_twice_is_refused(shelf, quick, key):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    body = (folder / "bank.json").read_bytes()
    body = b"{" + body[body.index(b",") + 1 :]
    at = body.index(key)
    value, _ = json.JSONDecoder().raw_decode(body[at + len(key) :].decode())
    again = key + json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b","
    bank_faults.write_signed(folder, body[:at] + again + body[at:])
    with pytest.raises(BankCorruptError, match="a key stands twice"):
        MaskBank.from_pretrained(folder)


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_two_names_that_look_alike_are_refused(shelf, quick, one, other):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    bank_faults.sign(folder, lambda body: [body["tasks"][0].update(name=one), body["tasks"][2].update(name=other)])
    with pytest.raises(BankCorruptError, match="two tasks of one name"):
        MaskBank.from_pretrained(folder)


LABELS = [
    [], ["a"], ["a", "b", "c"], ["a"] * 2, ["a"] * 3, ["tame", "tame"], [""] * 2, None, "tame", 2, 2.0, True, {},
    {"0": "a", "1": "b"}, {"a": 0, "b": 1}, ["a", 1], ["a", None], ["a", True], ["a", ["b"]], ["a", {}], [0, 1],
    [["a", "b"]], ["a", "b", "b"], ["a", "b", ""], [str(at) for at in range(1000)], [None, None], [1.5, 2.5], [{}, {}],
    [[], []], ["tame", "wild", "tame", "wild"],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(LABELS)))
def test_labels_that_are_not_the_heads_are_refused(shelf, base, quick, number):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    bank_faults.sign(folder, lambda body: body["tasks"][0].update(labels=LABELS[number]))
    with pytest.raises(BankCorruptError):
        answers(folder, base)


RAW = [
    "\x1b[31mred\x1b[0m",
    "a\nb",
    "a\rb",
    "\x1b]0;title\x07",
    "\u202eevil",
    "\u2066a\u2069",
    "a\tb",
    "\x00",
    "\x9b31m",
    "\u2028",
]


def is_plain(text):
    return not [sign for sign in text if unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp") and sign != "\n"]


def hostile_text(shelf, quick):
    folder = shutil.copytree(shelf["plain"], quick / "bank")

    def write(body):
        for task, names in zip(body["tasks"], (RAW[:3], RAW[3:7], RAW[7:]), strict=True):
            task["name"], task["source"] = names[0], names[1]
            task["labels"] = [f"{label}{names[-1]}" for label in task["labels"]]

    bank_faults.sign(folder, write)
    return folder


def test_errors_show_no_control_characters_of_a_banks_names(shelf, base, quick):
    opened = MaskBank.from_pretrained(hostile_text(shelf, quick))
    for what in (lambda: opened.attach(base, ["cars"]), lambda: opened.attach(base, []), lambda: opened.drop("cars")):
        with pytest.raises(ConfigError) as error:
            what()
        assert is_plain(str(error.value))


def test_inspect_shows_no_control_characters_of_a_banks_names(shelf, quick):
    done = CliRunner().invoke(app, ["inspect", str(hostile_text(shelf, quick))])
    assert done.exit_code == 0 and "red" in done.output
    assert is_plain(done.output) and all(len(line) < 200 for line in done.output.splitlines())


# --- numbers and types (H8, H9) -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["values", "head.classifier.weight", "head.classifier.bias", "probe", "kkt.mean"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_with_the_tensors_name(shelf, base, quick, name, number):
    folder = shutil.copytree(shelf["plain"], quick / "bank")

    def spoil(_, tensors):
        tensors[1].setdefault(name, torch.zeros(16)).view(-1)[-1] = number

    bank_faults.forge(folder, spoil)
    with pytest.raises(BankCorruptError, match=f"weather.*{name}.*not finite"):
        answers(folder, base)


def test_the_smallest_numbers_and_both_zeros_come_back_bit_by_bit():
    single, brain = [0, 1, 2**23 - 1, -(2**31), 1 - 2**31], [0, 1, 2**7 - 1, -(2**15), 1 - 2**15]
    given = {
        "single": torch.tensor(single, dtype=torch.int32).view(torch.float32),
        "brain": torch.tensor(brain, dtype=torch.int16).view(torch.bfloat16),
    }
    assert all(float(numbers.float().abs().max()) < 1e-37 for numbers in given.values())
    entry, data = task_blob("shared", given)
    found = tensors_of(entry, data, "here")
    assert all(torch.equal(found[name].view(torch.uint8), given[name].view(torch.uint8)) for name in given)


KINDS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64, "f32": 32, "float32": 32, "": 8, "PICKLE": 8,
}  # fmt: skip
"""Every type of safetensors with its bits, and some that are none."""


@pytest.mark.parametrize("kind", KINDS)
def test_types_that_no_bank_holds_are_refused_by_name(kind):
    data = header({"a": tensor(kind, [8], (0, KINDS[kind]))}, bytes(KINDS[kind]))
    entry = FileEntry("task-00000-x.safetensors", hashlib.sha256(data).hexdigest(), len(data))
    if kind in bank_folder.DTYPES:
        assert tensors_of(entry, data, "here")["a"].dtype == bank_folder.DTYPES[kind]
        return
    with pytest.raises(BankCorruptError, match=f"here: tensor 'a' is '{kind}'; a bank holds U8, I8, I32, F32, BF16"):
        tensors_of(entry, data, "here")


# --- other bases (H10) ----------------------------------------------------------------------------------------


def changed(base, change):
    other = copy.deepcopy(base)
    with torch.no_grad():
        change(other)
    return other


def one_bit(model):
    model.bert.encoder.layer[0].attention.self.query.weight.view(torch.int32)[0, 0] ^= 1


def other_size(base, **sizes):
    return BertForSequenceClassification(BertConfig(**(base.config.to_dict() | sizes)))


def distil(base):
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes))


BASES = {
    "another revision": lambda base: changed(base, lambda it: it.bert.embeddings.word_embeddings.weight.add_(1e-3)),
    "another fine-tune": lambda base: changed(base, lambda it: [weight.mul_(1.01) for weight in it.bert.parameters()]),
    "one bit of one weight": lambda base: changed(base, one_bit),
    "a bias": lambda base: changed(base, lambda it: it.bert.encoder.layer[1].output.dense.bias.add_(1)),
    "a larger vocabulary": lambda base: other_size(base, vocab_size=base.config.vocab_size + 1),
    "another precision": lambda base: copy.deepcopy(base).to(torch.bfloat16),
    "double precision": lambda base: copy.deepcopy(base).double(),
    "a layer less": lambda base: other_size(base, num_hidden_layers=1),
    "another width": lambda base: other_size(base, hidden_size=32),
    "another feed-forward width": lambda base: other_size(base, intermediate_size=64),
    "weights that were not loaded": lambda base: copy.deepcopy(base).to("meta"),
    "weights in eight bits": lambda base: quantize_dynamic(copy.deepcopy(base), {torch.nn.Linear}),
    "another family": distil,
    "another PEFT method": lambda base: get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["query"])),
}
MISMATCHES = list(BASES)[:10]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", BASES)
def test_another_base_is_refused_before_it_is_asked_and_left_as_it_was(shelf, base, case, monkeypatch):
    other, opened = BASES[case](base), MaskBank.from_pretrained(shelf["plain"])
    before = [(name, type(module)) for name, module in other.named_modules()]
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(BaseMismatchError if case in MISMATCHES else HfClError) as error:
        opened.attach(other)
    assert [(name, type(module)) for name, module in other.named_modules()] == before
    if case in MISMATCHES and "masks other layers" not in str(error.value):
        held = opened.manifest.base.fingerprint[:16]
        found = re.findall(r"\b[0-9a-f]{16}\b", str(error.value))
        assert held in found and len(set(found)) == 2


# --- what lies in the folder (H12) ----------------------------------------------------------------------------


def link(file, aside):
    file.rename(aside)
    file.symlink_to(aside)


def hard(file, aside):
    os.link(file, aside)


def pipe(file, aside):
    file.unlink()
    os.mkfifo(file)


def socket_there(file, aside):
    file.unlink()
    listening = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(file.parent)  # the path of a socket must be short
    try:
        listening.bind(file.name)
    finally:
        os.chdir(here)
        listening.close()


def device(file, aside):
    file.unlink()
    file.symlink_to("/dev/zero")


THINGS = {"symbolic link": link, "hard link": hard, "pipe": pipe, "socket": socket_there, "device": device}


@pytest.mark.parametrize("what", THINGS)
@pytest.mark.parametrize("which", ["bank.json", "a task's file"])
def test_what_is_not_simply_a_file_is_refused_at_once(shelf, quick, what, which):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    name = "bank.json" if which == "bank.json" else read_manifest(folder).tasks[0].file.name
    THINGS[what](folder / name, quick / "aside")
    begin = time.perf_counter()
    with pytest.raises(BankCorruptError, match=name):
        MaskBank.from_pretrained(folder).verify()
    assert time.perf_counter() - begin < 5  # a pipe would be waited for until somebody writes to it


def test_a_hard_link_is_made_a_file_of_its_own_by_the_next_save_and_never_written_through(banks, place, quick):
    name = banks[0].manifest.tasks[0].file.name
    os.link(place / name, quick / "aside")
    before = (quick / "aside").read_bytes()
    banks[0].save(place, banks[0].digest)
    assert read_whole(place) == banks[0].digest
    assert (quick / "aside").read_bytes() == before and (quick / "aside").stat().st_nlink == 1


@pytest.mark.parametrize("name", [".lock", ".bank.json.tmp", "..bank.json.0123456789abcdef.tmp", "task"])
def test_saving_follows_no_link_that_lies_in_the_folder(banks, place, quick, monkeypatch, name):
    (quick / "mine").write_text("mine")
    monkeypatch.setattr(disk.secrets, "token_hex", lambda _: "0123456789abcdef")
    name = (
        f".{banks[1].manifest.tasks[0].file.name}.0123456789abcdef.tmp" if name == "task" else name.replace("..", ".")
    )
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to(quick / "mine")
    with contextlib.suppress(OSError):
        banks[1].save(place, banks[0].digest)
    assert (quick / "mine").read_text() == "mine" and read_whole(place) in (banks[0].digest, banks[1].digest)


def test_a_link_under_a_temporary_name_is_removed_and_not_followed(quick):
    (quick / "mine").write_text("mine")
    (quick / ".run.json.tmp").symlink_to(quick / "mine")
    disk.write_atomic(quick / "run.json", b"new")
    assert files_of(quick) == {"mine": b"mine", "run.json": b"new"}


def test_a_file_that_is_replaced_while_it_is_read_is_refused_or_right(shelf, nursery, quick):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    entry = read_manifest(folder).tasks[0].file
    right = (folder / entry.name).read_bytes()
    plain = tensors_of(entry, right, "here")
    (quick / "right").write_bytes(right)
    (quick / "wrong").write_bytes(right[:-64] + bytes(64))
    (quick / "short").write_bytes(right[:-64])
    turns = [quick / name for name in ("wrong", "right", "short", "right")]
    swapper, seen = nursery.swap(folder / entry.name, turns), []
    try:
        while len(seen) < 200 or (len(set(seen)) < 2 and len(seen) < 20_000):
            try:
                found = tensors_of(entry, read_file(folder / entry.name, entry.bytes), "here")
            except BankCorruptError:
                seen.append(False)
                continue
            assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
            seen.append(True)
    finally:
        nursery.kill(swapper, 0)
    assert set(seen) == {True, False}


def test_a_manifest_that_is_replaced_while_it_is_read_is_one_of_the_two(shelf, nursery, quick):
    folder = shutil.copytree(shelf["plain"], quick / "bank")
    for name in ("plain", "dropped"):
        (quick / name).write_bytes((shelf[name] / "bank.json").read_bytes())
    swapper, seen = nursery.swap(folder / "bank.json", [quick / "plain", quick / "dropped"]), []
    try:
        while len(seen) < 200 or (len(set(seen)) < 2 and len(seen) < 20_000):
            seen.append(read_manifest(folder).digest)
    finally:
        nursery.kill(swapper, 0)
    assert set(seen) == {read_manifest(shelf[name]).digest for name in ("plain", "dropped")}
