"""What a branch of a repository holds now, and whether a bank may take its place.

It may where there is none, where the bank there is this very one, and where this one has grown from it: a manifest
names the banks before it. So no task of anybody is lost.

Nothing here is patient: what the client raises is passed on, for the push to begin again.
"""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi

from hf_cl.errors import BankConflictError, BankCorruptError
from hf_cl.storage.hub import HubPlace, manifest_in
from hf_cl.storage.hub_requests import FAILURES, status_of
from hf_cl.storage.manifest import MANIFEST, MOST_BYTES, FileEntry, Manifest


@dataclass(frozen=True)
class Head:
    """A branch at one commit: what the Hub says of each file by its name, and the bank."""

    commit: str
    files: dict[str, Any]
    bank: Manifest | None

    def holds(self, entry: FileEntry) -> bool | str:
        """Return whether a file is there with this content; its git id where only that is known.

        Somebody may have put another file under that name.
        """
        file = self.files.get(entry.name)
        if file is None or file.size != entry.bytes:
            return False
        return str(file.blob_id) if file.lfs is None else bool(file.lfs.sha256 == entry.sha256)


@dataclass(frozen=True)
class Branch:
    """A branch of a repository, asked anew at each call."""

    api: HfApi
    place: HubPlace
    revision: str | None

    def head(self) -> Head:
        """Return what it holds now."""
        about = self.api.model_info(self.place.repo_id, revision=self.revision, files_metadata=True)
        files = {file.rfilename: file for file in about.siblings or ()}
        return Head(str(about.sha), files, self.bank_at(str(about.sha)) if MANIFEST in files else None)

    def bank_at(self, commit: str) -> Manifest:
        """Return the manifest at a commit.

        Raises:
            BankConflictError: There is one that cannot be read.
        """
        repo_id = self.place.repo_id
        for force in (False, True):
            try:
                return manifest_in(self.place.download(MANIFEST, commit, MOST_BYTES, force=force), repo_id)
            except BankCorruptError as error:
                problem = error
        raise BankConflictError(
            f"{repo_id}: its head {commit[:12]} holds a {MANIFEST} that is not replaced, since it cannot be read "
            f"({problem}) Delete it there if it is nobody's, or choose another repository."
        ) from problem

    def is_at(self, digest: str, commit: str) -> bool:
        """Return whether a commit holds the bank of a digest."""
        try:
            return self.bank_at(commit).digest == digest
        except BankConflictError:
            return False
        except FAILURES as error:
            if status_of(error) == 404:
                return False
            raise

    def history(self) -> list[str]:
        """Return its commits, newest first."""
        return [commit.commit_id for commit in self.api.list_repo_commits(self.place.repo_id, revision=self.revision)]

    def pull_requests(self) -> dict[str, str]:
        """Return the commits of the repository's pull requests, by their refs."""
        refs = self.api.list_repo_refs(self.place.repo_id, include_pull_requests=True)
        return {pull.ref: pull.target_commit for pull in refs.pull_requests or ()}

    def require(self, head: Head, new: Manifest) -> None:
        """Refuse to put a bank in the place of one that it has not grown from.

        Args:
            head: What the branch holds.
            new: The bank.

        Raises:
            BankConflictError: The head holds another.
        """
        held = head.bank
        if held is None or new.may_replace(held.digest):
            return
        what = "is an older one" if held.may_replace(new.digest) else "has not grown from it"
        raise BankConflictError(
            f"{self.place.repo_id}: its head {head.commit[:12]} holds the bank {held.digest[:12]} ({len(held.tasks)} "
            f"tasks, generation {held.generation}), and {new.digest[:12]} ({len(new.tasks)} tasks, generation "
            f"{new.generation}) {what}. Pull that one (MaskBank.from_pretrained), extend it, and push; or choose "
            f"another repository."
        )
