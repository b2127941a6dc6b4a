"""Reading a bank out of a repository of the Hub: one commit, whose files are fetched when they are read.

A revision is resolved once, by the request for `bank.json`; every other file is asked for at that commit, by a name
that the checked manifest gives. So a reader between two pushes never mixes two banks, and nothing is asked of another
repository. The client checks a download's size and no more: what differs from the manifest's sha256, in its cache or on
the way, is fetched once again and then refused.

The endpoint (`HF_ENDPOINT`) is trusted; a repository is not.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_cl.errors import BankCorruptError, BankError, ConfigError
from hf_cl.storage.hub_requests import FAILURES, patiently, refusal
from hf_cl.storage.manifest import MANIFEST, MOST_BYTES, FileEntry, Manifest

COMMIT = re.compile(r"[0-9a-f]{40}")
logger = logging.getLogger(__name__)


# --- where a bank is ----------------------------------------------------------------------------------


def is_repo(path_or_repo_id: "str | Path", revision: str | None = None) -> bool:
    """Return whether a bank's place is a repository of the Hub, and not a folder of this machine.

    A folder that exists is a folder; a `Path` always is.

    Raises:
        ConfigError: It can be neither, or a folder is given with a revision, which only a repository has.
    """
    text = str(path_or_repo_id)
    if isinstance(path_or_repo_id, Path) or (text and Path(text).is_dir()):
        if revision is not None:
            raise ConfigError(f"revision: {text} is a folder here, which has none. Leave it out, or move the folder.")
        return False
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ConfigError(
            f"{text!r}: is no folder here, and no repository of the Hub is called so ({error}). Give the folder of a "
            f"bank, or a repository as in 'name/bank'."
        ) from error
    return True


@dataclass(frozen=True)
class HubPlace:
    """A repository, and how it is asked: the options of `huggingface_hub.hf_hub_download` by their names there."""

    repo_id: str
    token: "str | bool | None" = field(default=None, repr=False)
    cache_dir: "str | Path | None" = None
    local_files_only: bool = False

    @property
    def offline(self) -> bool:
        """Whether the Hub must not be asked."""
        return self.local_files_only or constants.HF_HUB_OFFLINE

    def fetch(self, name: str, revision: str | None, most: int, *, force: bool = False) -> Path:
        """Return where a file lies in the cache, as `download` does, with patience and in plain words.

        Raises:
            BankError: It cannot be had; the message says why, and the way out.
        """
        try:
            return patiently(lambda: self.download(name, revision, most, force=force))
        except BankError:
            raise
        except LocalEntryNotFoundError as error:
            raise self.lacks([name], error.__cause__) from error
        except FAILURES as error:
            raise refusal(error, self.repo_id, revision, name) from error

    def download(self, name: str, revision: str | None, most: int, *, force: bool = False) -> Path:
        """Return where a file lies in the cache; it is downloaded if it is not there.

        Args:
            name: The file, as the checked manifest names it.
            revision: Branch, tag or commit; None is the main branch.
            most: Bytes it may have: a larger one is not even begun.
            force: Download it although it is there.

        Raises:
            Exception: What the client raises.
            BankCorruptError: It is larger.
        """
        options: dict[str, Any] = {
            "repo_id": self.repo_id,
            "filename": name,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
            "library_name": "hf_cl",
        }
        about = hf_hub_download(**options, revision=revision, dry_run=True)
        if not about.is_cached and about.file_size is not None and about.file_size > most:
            raise BankCorruptError(
                f"{self.repo_id}: {name} has {about.file_size:,} bytes there, expected at most {most:,}. It is not "
                f"downloaded; do not use this bank."
            )
        # At the commit that this resolved to: the client asks for a branch twice, and takes the second answer for what
        # the first one was about, though a push may have fallen between.
        file = Path(hf_hub_download(**options, revision=about.commit_hash, force_download=force))
        if revision != about.commit_hash:
            _remember(file, revision or constants.DEFAULT_REVISION, about.commit_hash)
        return file

    def missing(self, names: Sequence[str], commit: str) -> list[str]:
        """Return which of a commit's files are not in the cache."""
        found = {name: try_to_load_from_cache(self.repo_id, name, self.cache_dir, commit) for name in names}
        return [name for name, path in found.items() if not isinstance(path, str)]

    def lacks(self, names: Sequence[str], cause: BaseException | None = None) -> BankError:
        """Return what to say of files that are not in the cache and cannot be asked for."""
        if isinstance(cause, Exception) and not self.offline:
            return refusal(cause, self.repo_id, None, names[0])
        return BankError(
            f"{self.repo_id}: the cache lacks {', '.join(names)}, and the Hub is not asked (HF_HUB_OFFLINE or "
            f"local_files_only). Read the bank once with the Hub at hand, or give the cache_dir that holds it."
        )


def _remember(file: Path, revision: str, commit: str) -> None:
    """Note in the cache, as the client does where it resolves one, which commit a branch is: for reading it offline."""
    ref = file.parents[2] / "refs" / revision
    with contextlib.suppress(OSError):  # a cache that cannot be written
        if not ref.is_file() or ref.read_text("utf-8") != commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit, "utf-8")


# --- a bank at one commit -----------------------------------------------------------------------------


@dataclass(frozen=True)
class HubReader:
    """Reads a bank's files at one commit of a repository: a `Reader`."""

    place: HubPlace
    commit: str
    manifest: Manifest = field(repr=False)
    force_download: bool = False
    fetched: set[str] = field(default_factory=set, repr=False)

    def __call__(self, entry: FileEntry) -> bytes:
        """Return a file's bytes, whose sha256 is the manifest's.

        Raises:
            BankCorruptError: The repository holds something else under that name.
            BankError: It cannot be had.
        """
        self._require(entry)
        data = self._bytes(entry, force=self.force_download and entry.name not in self.fetched)
        if data is None and not self.place.offline:
            logger.info("%s: %s is damaged in the cache; fetching it again", self.place.repo_id, entry.name)
            data = self._bytes(entry, force=True)
        if data is None:
            raise BankCorruptError(
                f"{self.place.repo_id}@{self.commit[:12]}: {entry.name} is not what {MANIFEST} says, expected "
                f"{entry.bytes:,} bytes of sha256 {entry.sha256[:16]}.... Take another revision, or ask its owner to "
                f"push the bank again."
            )
        self.fetched.add(entry.name)
        return data

    def _require(self, entry: FileEntry) -> None:
        """Name every file that is missing, where the Hub cannot be asked for it."""
        if self.place.offline and self.place.missing([entry.name], self.commit):
            raise self.place.lacks(self.place.missing([file.name for file in self.manifest.files], self.commit))

    def _bytes(self, entry: FileEntry, *, force: bool) -> bytes | None:
        data = _read(self.place.fetch(entry.name, self.commit, entry.bytes, force=force), entry.bytes)
        return data if data is not None and hashlib.sha256(data).hexdigest() == entry.sha256 else None


def open_repo(place: HubPlace, revision: str | None = None, *, force_download: bool = False) -> HubReader:
    """Open a repository's bank at a revision; only its manifest is read.

    Raises:
        BankCorruptError: It holds no bank, or its manifest is damaged.
        BankError: It cannot be read; the message says why, and the way out.
    """
    file = place.fetch(MANIFEST, revision, MOST_BYTES, force=force_download)
    try:
        manifest = manifest_in(file, place.repo_id)
    except BankCorruptError:
        if place.offline or force_download:
            raise
        file = place.fetch(MANIFEST, revision, MOST_BYTES, force=True)
        manifest = manifest_in(file, place.repo_id)
    commit = file.parent.name  # the client keeps a commit's files in a folder of that name
    logger.info("%s: bank %s at commit %s", place.repo_id, manifest.digest, commit)
    return HubReader(place, commit, manifest, force_download)


def manifest_in(file: Path, repo_id: str) -> Manifest:
    """Return the manifest in a file of the cache.

    Raises:
        BankCorruptError: It is damaged.
    """
    where = f"{repo_id}@{file.parent.name[:12]}: {MANIFEST}"
    data = _read(file, None)
    if data is None:
        raise BankCorruptError(f"{where}: is larger than any manifest. Do not use this bank.")
    return Manifest.from_bytes(data, where)


def _read(file: Path, size: int | None) -> bytes | None:
    """Return a file's bytes if it has as many; None is any that a manifest may have."""
    try:
        with file.open("rb") as opened:
            data = opened.read((MOST_BYTES if size is None else size) + 1)
    except OSError as error:
        raise BankError(f"{file}: cannot be read ({error.strerror}). Give another cache_dir, or free it.") from error
    return data if (len(data) == size if size is not None else len(data) <= MOST_BYTES) else None
