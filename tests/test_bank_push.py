"""A push makes a repository hold a bank, by one commit or none, and says which: under faults and rivals too."""

import os
import random

import banks
import hub_server
import pytest
from banks import REPO, at, commits_of
from huggingface_hub import HfApi

from hf_cl import MaskBank
from hf_cl.errors import BankConflictError, BankCorruptError, BankError, ConfigError
from hf_cl.storage.manifest import MANIFEST

hub, waits = hub_server.hub, hub_server.waits
pytestmark = pytest.mark.usefixtures("waits")
COMMIT = r"/commit/main$"
ROUTES = {
    "create": ("POST", "/api/repos/create"),
    "head": ("GET", f"/api/models/{REPO}$"),
    "ask for the manifest": ("HEAD", f"/resolve/.*/{MANIFEST}"),
    "read the manifest": ("GET", f"/resolve/.*/{MANIFEST}"),
    "read the card": ("GET", "/resolve/.*/README.md"),
    "card": ("POST", "/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", ""),
    "verify": ("POST", "/objects/verify"),
    "commit": ("POST", COMMIT),
}
FAULTS = {
    "500": {"status": 500},
    "503": {"status": 503},
    "429": {"status": 429, "headers": {"Retry-After": "7"}},
    "drop": {"drop": "before"},
    "drop-after": {"drop": "after"},
    "slow": {"delay": 0.05},
    "half": {"truncate": 5},
}


@pytest.fixture
def old():
    return banks.bank("pets", "weather")


@pytest.fixture
def new(old):
    return banks.bank("food", before=old)


# --- what is pushed -----------------------------------------------------------------------------


def test_a_push_makes_the_repository_and_one_commit(hub, new):
    info = new.push_to_hub(REPO, commit_message="First", private=True)
    assert (info.oid, info.commit_message, info.pr_url) == (hub.head(REPO), "First", None)
    assert set(hub.repo(REPO)) == {".gitattributes", "README.md", MANIFEST, *(file.name for file in new.manifest.files)}
    assert (at(hub), len(hub.history(REPO)), hub.repos["model", REPO].private) == (new.manifest, 2, True)
    assert hub.history(REPO)[0].message == f"digest: {new.digest}"


def test_a_short_name_is_the_users_own(hub, new):
    assert new.push_to_hub("bank").repo_url.repo_id == REPO and at(hub) == new.manifest


def test_a_bank_pushed_again_makes_no_commit_and_uploads_nothing(hub, new):
    first = new.push_to_hub(REPO)
    hub.log.clear()
    again = new.push_to_hub(REPO)
    assert (again.oid, again.commit_url) == (first.oid, first.commit_url)
    assert not hub.calls("PUT") and not hub.calls("POST", "/commit/|/preupload/") and len(hub.history(REPO)) == 2


def test_a_grown_bank_uploads_what_is_new_only(hub, old, new):
    old.push_to_hub(REPO)
    hub.log.clear()
    new.push_to_hub(REPO)
    assert at(hub) == new.manifest and len(hub.calls("PUT")) == 1


def test_what_a_smaller_bank_does_not_name_is_deleted_in_the_same_commit_and_nothing_else(hub, new):
    whole = banks.bank("cars", "birds", before=new)
    whole.push_to_hub(REPO)
    hub.commit(REPO, {"notes.txt": b"mine", "model.safetensors": b"mine", "deep/task.safetensors": b"mine"})
    less = banks.dropped(whole, "weather")
    less.push_to_hub(REPO)
    assert at(hub) == less.manifest and len(hub.history(REPO)) == 4
    assert {"notes.txt", "model.safetensors", "deep/task.safetensors"} < set(hub.repo(REPO))


def test_a_bank_is_pushed_from_memory_from_its_folder_and_from_another_repository(hub, new, tmp_path):
    new.push_to_hub(REPO)
    MaskBank.from_pretrained(new.save_pretrained(tmp_path / "bank")).push_to_hub("alice/folder")
    hub.log.clear()
    pulled = MaskBank.from_pretrained(REPO)
    pulled.push_to_hub("alice/copy")
    assert at(hub, repo="alice/folder") == at(hub, repo="alice/copy") == new.manifest
    files = [call for call in hub.calls("GET", "/cdn/")]
    assert len(files) == 3, "each file is downloaded once"


def test_a_lock_and_files_that_the_manifest_does_not_name_are_not_pushed(hub, new, tmp_path):
    folder = new.save_pretrained(tmp_path / "bank")
    (folder / "notes.txt").write_text("mine")
    assert (folder / ".lock").exists()
    MaskBank.from_pretrained(folder).push_to_hub(REPO)
    assert not {".lock", "notes.txt"} & set(hub.repo(REPO)) and at(hub) == new.manifest


def test_a_gitignore_in_the_repository_hides_no_file_of_a_bank(hub, new):
    hub.create(REPO)
    hub.commit(REPO, {".gitignore": b"*.safetensors\n*.json\n"})
    new.push_to_hub(REPO)
    assert at(hub) == new.manifest


def test_what_is_missing_or_damaged_in_the_repository_is_repaired(hub, new):
    new.push_to_hub(REPO)
    names = [file.name for file in new.manifest.files]
    hub.commit(REPO, {names[0]: None, names[1]: b"other", "README.md": None})
    new.push_to_hub(REPO)
    assert at(hub) == new.manifest and "README.md" in hub.repo(REPO)


def test_many_tasks_are_one_commit(hub):
    many = banks.bank(*(f"task {number}" for number in range(45)))
    many.push_to_hub(REPO)
    assert at(hub) == many.manifest and len(hub.calls("POST", COMMIT)) == 1
    assert max(len(call.json()["files"]) for call in hub.calls("POST", "/preupload/")) <= 20


@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_however_the_hub_keeps_files_they_are_the_same_bytes(hub, old, new, mode):
    hub.upload_mode = mode
    old.push_to_hub(REPO)
    new.push_to_hub(REPO)
    assert at(hub) == new.manifest
    hub.log.clear()
    assert new.push_to_hub(REPO).oid == hub.head(REPO) and not hub.calls("POST", "/commit/")
    assert MaskBank.from_pretrained(REPO).digest == new.digest


def test_a_damaged_bank_is_not_pushed(hub, new, tmp_path):
    folder = new.save_pretrained(tmp_path / "bank")
    file = folder / new.manifest.files[1].name
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(BankCorruptError, match="It is not pushed"):
        MaskBank.from_pretrained(folder).push_to_hub(REPO)
    assert at(hub) is None


# --- whose place a bank may take ----------------------------------------------------------------


def test_a_repository_without_a_bank_is_taken(hub, new):
    hub.create(REPO)
    hub.commit(REPO, {"config.json": b"{}"})
    new.push_to_hub(REPO)
    assert at(hub) == new.manifest and hub.repo(REPO)["config.json"] == b"{}"


def test_another_bank_is_not_replaced(hub, new):
    rival = banks.bank("pets", content="of somebody else")
    rival.push_to_hub(REPO)
    with pytest.raises(BankConflictError, match="extend it") as caught:
        new.push_to_hub(REPO)
    said = str(caught.value)
    assert hub.head(REPO)[:12] in said and rival.digest[:12] in said and new.digest[:12] in said
    assert at(hub) == rival.manifest


def test_an_older_bank_does_not_replace_the_one_that_has_grown_from_it(hub, old, new):
    new.push_to_hub(REPO)
    with pytest.raises(BankConflictError, match="is an older one"):
        old.push_to_hub(REPO)
    shrunk = banks.dropped(new, "weather")
    shrunk.push_to_hub(REPO)
    with pytest.raises(BankConflictError):
        new.push_to_hub(REPO)  # it holds more, and is older all the same
    assert at(hub) == shrunk.manifest


def test_two_that_grew_from_one_bank_do_not_replace_each_other(hub, old):
    old.push_to_hub(REPO)
    first, second = (banks.bank(name, before=MaskBank.from_pretrained(REPO)) for name in ("food", "cars"))
    first.push_to_hub(REPO)
    with pytest.raises(BankConflictError, match="has not grown from it"):
        second.push_to_hub(REPO)
    banks.bank("cars", before=MaskBank.from_pretrained(REPO)).push_to_hub(REPO)  # the way out
    assert [task.name for task in at(hub).tasks] == ["pets", "weather", "food", "cars"]


def test_a_grown_bank_that_was_saved_in_between_still_replaces_its_ancestor(hub, old, tmp_path):
    old.push_to_hub(REPO)
    grown = banks.bank("food", before=banks.bank("cars", before=MaskBank.from_pretrained(REPO)))
    MaskBank.from_pretrained(grown.save_pretrained(tmp_path / "bank")).push_to_hub(REPO)
    assert at(hub) == grown.manifest


def test_a_manifest_that_cannot_be_read_is_nobodys_to_replace(hub, new):
    hub.create(REPO)
    hub.commit(REPO, {MANIFEST: b'{"format": "of next year"}'})
    with pytest.raises(BankConflictError, match="cannot be read"):
        new.push_to_hub(REPO)
    assert len(hub.history(REPO)) == 2


# --- branches and pull requests -----------------------------------------------------------------


def test_a_branch_is_made_and_pushed_to(hub, old, new):
    old.push_to_hub(REPO)
    info = new.push_to_hub(REPO, revision="v/2")
    assert (at(hub), at(hub, "v/2"), info.oid) == (old.manifest, new.manifest, hub.history(REPO, "v/2")[0].sha)
    assert MaskBank.from_pretrained(REPO, revision="v/2").digest == new.digest
    with pytest.raises(ConfigError, match="Give a branch"):
        new.push_to_hub(REPO, revision=info.oid)


@pytest.mark.parametrize("fault", ["", "500", "drop", "drop-after"])
def test_a_pull_request_is_opened_once(hub, old, new, fault):
    old.push_to_hub(REPO)
    bob = hub.add_user("bob")
    if fault:
        hub.fail("POST", COMMIT, **FAULTS[fault])
    info = new.push_to_hub(REPO, token=bob, create_pr=True)
    assert (at(hub), at(hub, "refs/pr/1")) == (old.manifest, new.manifest)
    assert (info.pr_num, info.pr_revision, info.oid) == (1, "refs/pr/1", hub.repos["model", REPO].refs["refs/pr/1"])
    assert "refs/pr/2" not in hub.repos["model", REPO].refs
    with pytest.raises(BankConflictError):
        banks.bank("pets", content="other").push_to_hub(REPO, token=bob, create_pr=True)


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("route", ROUTES)
def test_one_fault_at_any_request_is_survived_by_one_commit(hub, old, new, waits, route, fault):
    old.push_to_hub(REPO)
    failing = hub.fail(*ROUTES[route], **FAULTS[fault])
    info = new.push_to_hub(REPO)
    assert failing.hits == 1 and commits_of(hub, new) == [info.oid] == [hub.head(REPO)]
    if fault == "429" and route != "ask for the manifest":  # which the client asks twice by itself
        assert max([*waits, *hub.waits]) >= 7, "Retry-After is waited for"


def test_a_fault_while_a_branch_is_made_is_survived(hub, old, new):
    old.push_to_hub(REPO)
    hub.fail("POST", "/branch/", drop="after")
    new.push_to_hub(REPO, revision="next")
    assert at(hub, "next") == new.manifest


@pytest.mark.parametrize("route", ["create", "head", "preupload", "batch", "upload", "commit"])
def test_a_hub_that_stays_down_is_given_up_and_nothing_is_there(hub, old, new, route):
    old.push_to_hub(REPO)
    hub.fail(*ROUTES[route], status=503, times=None)
    with pytest.raises(BankError, match="busy and answered 503") as caught:
        new.push_to_hub(REPO)
    told = {"create": None, "head": "is not there"}.get(route, "The bank is not there")
    assert told is None or told in str(caught.value)
    assert at(hub) == old.manifest
    hub.heal()
    assert commits_of(hub, new) == [] and new.push_to_hub(REPO).oid == hub.head(REPO)


def test_a_push_whose_end_cannot_be_learned_says_so(hub, old, new):
    old.push_to_hub(REPO)
    hub.fail("POST", COMMIT, drop="after")
    hub.fail("GET", "/commits/", status=500, times=None)
    with pytest.raises(BankError, match="could not be learned"):
        new.push_to_hub(REPO)
    hub.heal()
    assert new.push_to_hub(REPO).oid == hub.head(REPO) and len(commits_of(hub, new)) == 1


def test_a_commit_that_landed_is_reported_though_a_rival_has_replaced_it_since(hub, old, new):
    old.push_to_hub(REPO)
    later = banks.bank("cars", before=new)
    files = {MANIFEST: later.manifest.to_bytes(), **later._blobs}
    hub.fail("POST", COMMIT, drop="after")
    hub.fail("GET", "/commits/", do=lambda: hub.commit(REPO, files))
    info = new.push_to_hub(REPO)
    assert at(hub) == later.manifest and commits_of(hub, new) == [info.oid] and info.oid != hub.head(REPO)


def test_a_rival_who_is_faster_wins(hub, old, new):
    old.push_to_hub(REPO)
    rival = banks.bank("cars", before=old)
    files = {MANIFEST: rival.manifest.to_bytes(), **rival._blobs}
    hub.fail("POST", COMMIT, do=lambda: hub.commit(REPO, files))
    with pytest.raises(BankConflictError, match="has not grown from it"):
        new.push_to_hub(REPO)
    assert at(hub) == rival.manifest and not commits_of(hub, new)


def test_a_commit_that_touches_no_bank_is_built_upon(hub, old, new):
    old.push_to_hub(REPO)
    hub.fail("POST", COMMIT, do=lambda: hub.commit(REPO, {"notes.txt": b"mine"}))
    new.push_to_hub(REPO)
    assert at(hub) == new.manifest and hub.repo(REPO)["notes.txt"] == b"mine"


def spoil(hub, repo, choose, rivals):
    """Let some requests of a push fail, or find that a rival was faster."""
    own = {"history": ("GET", "/commits/"), "head": ("GET", f"/api/models/{repo}$")}
    for _ in range(choose.randint(0, 4)):
        route = choose.choice([*ROUTES, "commit", "commit", "history"])
        what = {"skip": choose.randint(0, 1), "times": choose.choice([1, 1, 2, 9]), "do": choose.choice(rivals)}
        hub.fail(*(own.get(route) or ROUTES[route]), **choose.choice([{}, *FAULTS.values()]), **what)


def scenario(hub, seed):
    """Push once under faults and rivals; return what was said, having judged it."""
    choose, repo = random.Random(seed), f"alice/bank{seed}"
    old = banks.bank("pets", content=seed)
    old.push_to_hub(repo)
    new, rival = (banks.bank(name, before=old) for name in ("food", "cars"))
    grown = banks.bank("birds", before=new)

    def commit(bank):
        hub.commit(repo, {MANIFEST: bank.manifest.to_bytes(), **bank._blobs})

    def overtake():
        held = at(hub, repo=repo)
        if held.digest == new.digest:
            commit(grown)
        elif held.digest == old.digest:
            commit(rival)

    rivals = [lambda: None, lambda: None, overtake, lambda: hub.commit(repo, {"notes.txt": os.urandom(4)})]
    spoil(hub, repo, choose, rivals)
    said, info = "ok", None
    try:
        info = new.push_to_hub(repo)
    except BankConflictError:
        said = "conflict"
    except BankError as error:
        said = "unknown" if "could not be learned" in str(error) else "not there"
    hub.heal()
    mine = commits_of(hub, new, repo)  # raises where any commit is torn or empty
    assert len(mine) <= 2, (seed, "a duplicate")
    if said == "ok":
        assert info.oid in mine, (seed, "said it is there")
    elif said != "unknown":
        assert not mine, (seed, f"said {said}")
    if said == "conflict":
        assert at(hub, repo=repo).digest == rival.digest, (seed, "no rival")
    # The owner's own notes between are commits too, which hold the bank they found: count those that brought it.
    brought = [sha for sha in mine if at(hub, hub.repos["model", repo].commits[sha].parent, repo).digest != new.digest]
    assert len(brought) == (1 if mine else 0), (seed, "a duplicate")
    return said


def test_pushes_under_random_faults_and_rivals_are_never_torn_doubled_or_misreported(hub):
    said = [scenario(hub, seed) for seed in range(30)]
    assert {"ok", "conflict"} <= set(said)


@pytest.mark.slow
def test_300_pushes_under_random_faults_and_rivals(hub):
    said = [scenario(hub, seed) for seed in range(1000, 1300)]
    counts = {what: said.count(what) for what in sorted(set(said))}
    assert counts["ok"] > 150 and counts["conflict"] > 10, counts


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "../bank", "alice/..", "-bank", "alice/bank.git", "al ice/bank", "x" * 97]
)
def test_what_is_no_repository_is_refused_before_the_hub_hears_of_it(hub, new, name):
    with pytest.raises(ConfigError, match="repo_id"):
        new.push_to_hub(name)
    assert not hub.log


def test_a_base_without_an_id_is_asked_for(hub):
    local = banks.bank("pets", base_id=None)
    with pytest.raises(BankError, match="base_id=") as caught:
        local.push_to_hub(REPO)
    assert "from_learner" in str(caught.value) and not hub.log
    local.push_to_hub(REPO, base_id="google-bert/bert-base-uncased")
    assert b"base_model: google-bert/bert-base-uncased" in hub.repo(REPO)["README.md"]
    assert at(hub) == local.manifest, "the card alone carries it"
    with pytest.raises(BankError, match="Leave base_id out"):
        banks.bank("pets").push_to_hub(REPO, base_id="google-bert/bert-base-uncased")
    with pytest.raises(ConfigError, match="base_id"):
        local.push_to_hub(REPO, base_id="/home/me/bert")


def test_a_card_that_the_hub_refuses_pushes_nothing(hub, new):
    hub.fail("POST", "/api/validate-yaml", status=400)
    with pytest.raises(BankError, match="The bank is not there"):
        new.push_to_hub(REPO)
    assert at(hub) is None


def test_who_may_not_push_is_told_so(hub, new):
    hub.create("bob/bank")
    cases = {
        "no token": ({"token": False}, REPO, "wants a token"),
        "a bad token": ({"token": "hf_bad"}, REPO, "wants a token"),
        "a token for reading": ({"token": hub.add_user("alice", "read")}, REPO, "does not allow it"),
        "another's name": ({}, "bob/new", "does not allow it"),
        "another's repository": ({}, "bob/bank", "does not allow it"),
    }
    for case, (options, repo, said) in cases.items():
        with pytest.raises(BankError, match=said) as caught:
            new.push_to_hub(repo, **options)
        assert "hf_" not in str(caught.value).replace("hf_cl", ""), case
    assert at(hub, repo="bob/bank") is None


def test_offline_nothing_is_pushed(hub, new, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BankError, match="offline"):
        new.push_to_hub(REPO)
    assert not hub.log and HfApi().endpoint == hub.endpoint
