"""Many who push and read one repository at a time, and pushes that are killed: one winner, no mixture, no torn bank."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import banks
import hub_server
import pytest
from banks import REPO, at, commits_of

from hf_cl import MaskBank
from hf_cl.errors import BankConflictError
from hf_cl.storage import hub_requests

hub = hub_server.hub


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(hub_requests, "sleep", lambda seconds: None)


# --- many at once -------------------------------------------------------------------------------


def race(hub, number, pushers=8):
    repo, start = f"alice/race{number}", threading.Barrier(pushers)
    if number % 2:
        hub.create(repo)  # else they also race for making it
    rivals = [banks.bank(f"task {place}", content=number) for place in range(pushers)]

    def push(bank):
        start.wait()
        try:
            return bank.push_to_hub(repo).oid
        except BankConflictError:
            return None

    with ThreadPoolExecutor(pushers) as pool:
        said = list(pool.map(push, rivals))
    winners = [bank for bank, oid in zip(rivals, said, strict=True) if oid is not None]
    assert len(winners) == 1 and at(hub, repo=repo) == winners[0].manifest and len(hub.history(repo)) == 2


def test_of_eight_pushers_one_wins_and_the_others_are_told(hub):
    for number in range(4):
        race(hub, number)


@pytest.mark.slow
def test_of_eight_pushers_one_wins_in_each_of_100_races(hub):
    for number in range(100):
        race(hub, number)


def read_while_pushed(hub, pushes):
    """Push bank after bank while others read; return how many were read whole."""
    bank, done, read = banks.bank("task 0"), threading.Event(), []
    bank.push_to_hub(REPO)

    def reader(number):
        while not done.is_set():
            # Its own cache each time, or one that it shares with its earlier reads.
            opened = MaskBank.from_pretrained(REPO, cache_dir=hub.home / f"{number}{len(read) if number else ''}")
            for file in opened.manifest.files:
                assert len(opened._bytes(file)) == file.bytes
            read.append(opened.digest)

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(reader, number) for number in range(2)]
        try:
            for number in range(1, pushes):
                bank = banks.bank(f"task {number}", before=bank)
                bank.push_to_hub(REPO)
                if number % 5 == 0:
                    bank = banks.dropped(bank, f"task {number - 1}")
                    bank.push_to_hub(REPO)
        finally:
            done.set()
        for future in readers:
            future.result()
    assert at(hub) == bank.manifest
    return read


def test_a_reader_during_pushes_never_mixes_two_banks(hub):
    assert len(set(read_while_pushed(hub, 12))) > 2


@pytest.mark.slow
def test_a_reader_during_100_pushes_never_mixes_two_banks(hub):
    assert len(set(read_while_pushed(hub, 100))) > 20


# --- killed -------------------------------------------------------------------------------------

PUSHER = """
import os, sys
sys.path.insert(0, "tests")
import banks
from hf_cl.storage.hub import HubPlace, open_repo
from hf_cl.storage.hub_push import push_bank
for line in sys.stdin:
    child = os.fork()
    if not child:
        before = open_repo(HubPlace(line.strip()))
        manifest, blobs = banks.parts("food", before=before.manifest)
        print("ready", os.getpid(), flush=True)
        push_bank(line.strip(), manifest, lambda entry: blobs[entry.name])
        os._exit(0)
    os.waitpid(child, 0)
    print("done", flush=True)
"""


def killed(hub, times):
    """Kill a push at random points, as often; return how often it had landed."""
    command = [sys.executable, "-c", PUSHER]
    choose, landed = random.Random(0), 0
    env = hub.environment(HF_HUB_DISABLE_PROGRESS_BARS="1")
    with subprocess.Popen(command, env=env, cwd=hub_server.ROOT, stdin=-1, stdout=-1, text=True) as pusher:
        for number in range(times):
            repo = f"alice/killed{number}"
            old = banks.bank("pets", content=number)
            old.push_to_hub(repo)
            new = banks.bank("food", before=old)
            pusher.stdin.write(f"{repo}\n")
            pusher.stdin.flush()
            child = int(pusher.stdout.readline().split()[1])
            time.sleep(choose.random() * 0.1)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            assert pusher.stdout.readline() == "done\n"
            held = at(hub, repo=repo)
            assert held in (old.manifest, new.manifest)
            landed += held == new.manifest
            uploaded = new.manifest.files[1].sha256 in hub.repos["model", repo].lfs
            sent = len(hub.calls("PUT", repo))
            new.push_to_hub(repo)
            assert at(hub, repo=repo) == new.manifest and len(commits_of(hub, new, repo)) == 1
            assert len(hub.calls("PUT", repo)) - sent == (not uploaded), "what is there is not sent again"
        pusher.stdin.close()
    return landed


@pytest.mark.parametrize("times", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_push_that_is_killed_leaves_the_old_bank_or_the_new_one_and_is_pushed_again(hub, times):
    assert killed(hub, times) < times
