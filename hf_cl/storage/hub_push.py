"""Pushing a bank to a repository of the Hub: one commit upon the head it was made for, or none.

One commit adds what is new, deletes what is stale, and names the head as its parent: so it lands whole or not at all,
and of two that are made for one head, one does.

What the request for the commit ends with, unless it is a success, tells nothing about the commit: the answer to one
that landed may be lost, and to repeat that one looks like a conflict. So the history since the head decides, and
nothing else.
"""

import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_cl.errors import BankConflictError, BankCorruptError, BankError, ConfigError
from hf_cl.storage.bank_card import README, bank_card, base_of
from hf_cl.storage.bank_folder import Reader
from hf_cl.storage.hub import COMMIT, HubPlace
from hf_cl.storage.hub_head import Branch, Head
from hf_cl.storage.hub_requests import FAILURES, WAITS, passes, patiently, pause, refusal, root, status_of
from hf_cl.storage.manifest import FILE, MANIFEST, FileEntry, Manifest

MOST_README = 1024 * 1024
AT_ONCE = 20
"""Files that are in memory and uploaded together, before the one commit that names them all."""


def push_bank(
    repo_id: str,
    manifest: Manifest,
    read: Reader,
    *,
    base_id: str | None = None,
    token: "str | bool | None" = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> CommitInfo:
    """Make a repository hold a bank, by one commit or none.

    Args:
        repo_id: The repository; it is made if it is not there.
        manifest: The bank.
        read: Gives the bytes of its files.
        base_id: Hub id of the base, for the card, where the manifest has none.
        token: As for `huggingface_hub`.
        private: Whether a repository that is made is private.
        revision: The branch; it is made if it is not there. None is the main one.
        create_pr: Open a pull request instead.
        commit_message: Of the commit; None says how many tasks.

    Returns:
        The commit that holds the bank: the new one, or the head where the repository holds this very bank already.

    Raises:
        BankConflictError: The repository holds a bank that this one has not grown from.
        BankCorruptError: A file of this bank is not what its manifest says; nothing is pushed.
        BankError: The Hub refuses it, or cannot be reached; the message says whether the commit is there.
        ConfigError: `repo_id`, `revision` or `base_id` is none.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(
            f"repo_id: {repo_id!r} is no repository's name ({error}). Give one as 'name/bank'."
        ) from error
    if revision is not None and COMMIT.fullmatch(revision):
        raise ConfigError(f"revision: {revision} is a commit, which cannot be pushed to. Give a branch.")
    base = base_of(manifest, base_id)
    bank_card(manifest, repo_id, base)  # what no card can say is refused before the Hub hears of it
    api = HfApi(token=token, library_name="hf_cl")
    repo_id = _make(api, repo_id, private, revision, create_pr)
    count = len(manifest.tasks)
    message = commit_message or f"Push a bank of {count} task{'' if count == 1 else 's'}"
    with TemporaryDirectory() as cache:  # what the repository holds is never read from a cache that may be spoilt
        branch = Branch(api, HubPlace(repo_id, token, cache), revision)
        return _Push(branch, manifest, read, base, create_pr, message).run()


def _make(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> str:
    """Make a repository and its branch if they are not there; return its full name."""
    try:
        full = patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if revision is not None and not revision.startswith("refs/"):
            try:
                patiently(lambda: api.create_branch(full, branch=revision, exist_ok=True))
            except FAILURES as error:
                if not (create_pr and status_of(error) == 403):  # who may only propose cannot make branches
                    raise
    except FAILURES as error:
        if status_of(error) == 401:
            raise BankError(
                f"{repo_id}: the Hub wants a token that it knows (401). Log in with `hf auth login`, or give token=."
            ) from error
        raise refusal(error, repo_id, revision) from error
    return str(full)


@dataclass(frozen=True)
class _Plan:
    """What a commit is to do: files of the bank to add, texts by their names, names to delete."""

    entries: list[FileEntry]
    texts: dict[str, bytes]
    stale: list[str]

    def __bool__(self) -> bool:
        return bool(self.entries or self.texts or self.stale)


@dataclass
class _Push:
    """One bank on its way to one branch.

    `tried` are the heads that a commit was sent for: none but these can be our commit's parent. `pulls` are the pull
    requests that were there before.
    """

    branch: Branch
    manifest: Manifest
    read: Reader
    base: str
    create_pr: bool
    message: str
    tried: list[str] = field(default_factory=list)
    pulls: set[str] | None = None

    @property
    def repo_id(self) -> str:
        """The repository."""
        return self.branch.place.repo_id

    def run(self) -> CommitInfo:
        """Push, patiently; see `push_bank`."""
        for wait in (*WAITS, None):
            try:
                return self.turn()
            except BankError:
                raise
            except FAILURES as error:
                problem: Exception = error
            if wait is None or not _passes(problem):
                break
            pause(wait, problem)
        return self.last_look(problem)

    def turn(self) -> CommitInfo:
        """Return the commit that holds the bank, made now or by an earlier turn."""
        if self.create_pr and self.pulls is None:
            self.pulls = set(self.branch.pull_requests())
        landed = self.landed()
        if landed is not None:
            return landed
        head = self.branch.head()
        plan = self.plan(head)
        return self.commit(head, plan) if plan else self.info(head.commit)

    def last_look(self, problem: Exception) -> CommitInfo:
        """Return the commit if it is there after all; else say why not, and whether that is certain."""
        why = str(refusal(problem, self.repo_id, self.branch.revision))
        try:
            landed = patiently(self.landed)
            if landed is not None:
                return landed
            if self.tried:
                self.branch.require(patiently(self.branch.head), self.manifest)
        except BankConflictError:
            raise
        except FAILURES as error:
            raise BankError(
                f"{why} Whether the commit is there could not be learned either ({type(error).__name__}). Push again: "
                f"a bank that is there already is not pushed twice."
            ) from problem
        raise BankError(f"{why} The bank is not there: {self.repo_id} holds what it held.") from problem

    # --- what is to be done ----------------------------------------------------------------------------

    def plan(self, head: Head) -> _Plan:
        """Return what is to be done to make the head hold this bank.

        Raises:
            BankConflictError: It holds another.
        """
        self.branch.require(head, self.manifest)
        lacking = [entry for entry in self.manifest.files if not self.is_held(head, entry)]
        if head.bank is not None and head.bank.digest == self.manifest.digest:
            return _Plan(lacking, {} if README in head.files else {README: self.card(head)}, [])
        named = {entry.name for entry in self.manifest.files}
        stale = sorted(name for name in head.files if FILE.fullmatch(name) and name not in named)
        return _Plan(lacking, {MANIFEST: self.manifest.to_bytes(), README: self.card(head)}, stale)

    def is_held(self, head: Head, entry: FileEntry) -> bool:
        """Return whether the head holds a file."""
        found = head.holds(entry)
        if isinstance(found, bool):
            return found
        return found == hashlib.sha1(b"blob %d\0" % entry.bytes + self.bytes_of(entry)).hexdigest()

    def card(self, head: Head) -> bytes:
        """Return the README, with what its owner has written in it."""
        held = None
        if README in head.files:
            held = self.branch.place.download(README, head.commit, MOST_README).read_bytes()
        return bank_card(self.manifest, self.repo_id, self.base, held).encode()

    def bytes_of(self, entry: FileEntry) -> bytes:
        """Return the bytes of a file of this bank.

        Raises:
            BankCorruptError: They are not what the manifest says.
        """
        data = self.read(entry)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BankCorruptError(f"{entry.name}: is not what its bank says. It is not pushed; restore a copy.")
        return data

    # --- the commit ------------------------------------------------------------------------------------

    def commit(self, head: Head, plan: _Plan) -> CommitInfo:
        """Carry out a plan upon a head."""
        where: dict[str, Any] = {
            "repo_id": self.repo_id,
            "revision": self.branch.revision,
            "create_pr": self.create_pr,
        }
        operations: list[Any] = [CommitOperationDelete(name, is_folder=False) for name in plan.stale]
        names = [*plan.texts, *(entry.name for entry in plan.entries)]
        entries = {entry.name: entry for entry in plan.entries}
        for start in range(0, len(names), AT_ONCE):
            adds = [
                CommitOperationAdd(name, plan.texts[name] if name in plan.texts else self.bytes_of(entries[name]))
                for name in names[start : start + AT_ONCE]
            ]
            # What is uploaded leaves the memory; the first few stay, since the client looks into the card once more.
            # A .gitignore in the repository must not make it skip any.
            self.branch.api.preupload_lfs_files(
                **where, additions=adds, free_memory=start > 0, gitignore_content="# a bank is whole\n"
            )
            operations += adds
        # One commit, however many files: `upload_folder` was measured to commit batches of 250 of which only the first
        # names its parent, and left 250 new and 350 old files on main where the second failed.
        self.tried.append(head.commit)
        info: CommitInfo = self.branch.api.create_commit(
            **where,
            operations=operations,
            commit_message=self.message,
            commit_description=self.description,
            parent_commit=head.commit,
        )
        return info

    def landed(self) -> CommitInfo | None:
        """Return our commit if one was sent and is there: upon a head it was sent for, holding this bank."""
        if self.tried and self.create_pr:
            new = {ref: at for ref, at in self.branch.pull_requests().items() if ref not in (self.pulls or ())}
            found = [self.info(at, ref) for ref, at in new.items() if self.branch.is_at(self.manifest.digest, at)]
            return found[0] if found else None
        for commit, parent in itertools.pairwise(self.branch.history() if self.tried else ()):
            if parent in self.tried and self.branch.is_at(self.manifest.digest, commit):
                return self.info(commit)
            if parent == self.tried[0]:
                break
        return None

    @property
    def description(self) -> str:
        """What the commit says below its message."""
        return f"digest: {self.manifest.digest}"

    def info(self, commit: str, ref: str | None = None) -> CommitInfo:
        """Return what the client would say of a commit, where its answer was lost or nothing was to do."""
        page = f"{self.branch.api.endpoint}/{self.repo_id}"
        return CommitInfo(
            commit_url=f"{page}/commit/{commit}",
            commit_message=self.message,
            commit_description=self.description,
            oid=commit,
            pr_url=None if ref is None else f"{page}/discussions/{Path(ref).name}",
        )


def _passes(error: Exception) -> bool:
    """Return whether a push may succeed if it is begun again from the head."""
    found = root(error)
    # 409 and 412: somebody was faster. RuntimeError: hf_xet's, for all that may happen to an upload.
    return passes(found) or status_of(found) in (409, 412) or isinstance(found, RuntimeError)
