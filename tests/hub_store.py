"""What the stand-in Hub stores and says: repositories, requests, answers, faults. See `hub_server`."""

import hashlib
import json
import re
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath

LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".h5", ".npy", ".npz", ".parquet", ".pkl", ".pt", ".safetensors", ".zip")


# --- what is stored -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether git holds it or a pointer to it."""

    data: bytes
    lfs: bool = False
    xet: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @property
    def oid(self) -> str:
        """The id git gives to what it holds."""
        held = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    def listing(self, path: str) -> dict:
        """The file as an entry of a tree."""
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry | ({"xetHash": self.xet} if self.xet else {})


@dataclass(frozen=True)
class Commit:
    """A whole tree, and where it came from."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """Commits by their id, and the names that point at them: main, other branches, refs/pr/N."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, Blob] = field(default_factory=dict)
    uploaded: dict[str, dict[int, bytes]] = field(default_factory=dict)  # parts by oid, not verified yet

    @property
    def page(self) -> str:
        return ("" if self.kind == "model" else f"{self.kind}s/") + self.name

    def at(self, revision: str) -> Commit:
        commit = self.commits.get(self.refs.get(revision, revision))
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def add_commit(self, ref: str, parent: str | None, files: dict[str, Blob], title: str, message: str, author: str):
        """Point `ref` at a new commit: the only place where a ref moves."""
        number = len(self.commits)
        date = datetime(2026, 1, 1) + timedelta(seconds=number)
        tree = sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(repr((self.page, number, parent, tree, title, message, author)).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, message, author, f"{date.isoformat()}.000Z", files)
        self.refs[ref] = sha
        return self.commits[sha]


@dataclass(frozen=True)
class User:
    """Who holds a token, and whether the token may write."""

    name: str
    role: str = "write"


def listing(files: dict[str, Blob]) -> list[dict]:
    """All entries of a tree in the order of their paths: files, and the folders above them."""
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    entries = [blob.listing(path) for path, blob in files.items()]
    for folder in folders:
        held = sorted((path, blob.oid) for path, blob in files.items() if path.startswith(f"{folder}/"))
        oid = hashlib.sha1(repr(held).encode()).hexdigest()
        entries.append({"type": "directory", "path": folder, "oid": oid, "size": 0})
    return sorted(entries, key=lambda entry: entry["path"])


def read_xet(store: Path, sha256: str) -> dict[str, Blob]:
    """Find a file by its sha256 in hf_xet's local store, which keeps it in chunks under a hash of another kind.

    A shard is a row of records of 48 bytes: a header, then for each file its hash, flags and number of segments, then
    the segments, as many checks where the top flag says so, and its sha256; a hash of ones ends the files. Hashes are
    written as four little-endian words.
    """
    import hf_xet

    def written(record: bytes) -> str:
        return b"".join(record[at : at + 8][::-1] for at in range(0, 32, 8)).hex()

    for shard in store.rglob("shards/*.mdb"):
        data, at = shard.read_bytes(), 48
        while data[at : at + 32] != b"\xff" * 32:
            flags, segments = struct.unpack_from("<II", data, at + 32)
            end = at + 48 * (1 + segments * (1 + (flags >> 31)))
            if written(data[end : end + 32]) == sha256:
                with tempfile.TemporaryDirectory() as folder:
                    place, xet = Path(folder) / "file", written(data[at : at + 32])
                    session = hf_xet.XetSession()
                    with session.new_file_download_group(f"local://{store}", "xet", 4102444800) as group:
                        group.start_download_file(hf_xet.XetFileInfo(xet, None), str(place))
                    return {sha256: Blob(place.read_bytes(), lfs=True, xet=xet)}
            at = end + 48
    return {}


# --- what is said -------------------------------------------------------------------------------


@dataclass
class Call:
    """One request: what was asked, by whom, where, and the status it got (None: no answer was sent)."""

    method: str
    path: str  # as sent: still quoted, without the query
    query: dict[str, str]
    origin: str  # "hub" or "cdn"
    headers: dict[str, str] = field(repr=False)  # names in lower case
    body: bytes = field(repr=False)
    status: int | None = None

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    def json(self):
        try:
            return json.loads(self.body)
        except ValueError:
            raise Refusal(400, "Invalid JSON") from None


@dataclass(frozen=True)
class Reply:
    """An answer; `sent` is how much of the body gets through before the connection breaks."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    sent: int | None = None


class Refusal(Exception):
    """An answer that is an error, in the headers and the body that the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = as_json({"error": message}, status, headers)


@dataclass
class Fault:
    """What goes wrong, for which requests, after `skip` of them, `times` times (None: for ever)."""

    method: str = ".*"
    path: str = ""
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: str | None = None  # "before" or "after" the request took effect
    truncate: int | None = None  # bytes of the body that get through; its length is announced in full
    flip: int | None = None  # the byte of the body whose lowest bit is flipped
    do: Callable[[], object] | None = None  # called before the answer: a rival, a deletion
    skip: int = 0
    times: int | None = 1
    hits: int = 0

    def takes(self, call: Call) -> bool:
        if not re.fullmatch(self.method, call.method) or not re.search(self.path, call.path) or self.times == 0:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times = None if self.times is None else self.times - 1
        self.hits += 1
        return True

    def spoil(self, reply: Reply) -> Reply:
        if self.flip is not None and reply.body:
            body = bytearray(reply.body)
            body[self.flip] ^= 1
            reply = replace(reply, body=bytes(body))
        return replace(reply, sent=self.truncate)


def as_json(data, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(data).encode(), {"Content-Type": "application/json"} | (headers or {}))


def as_range(call: Call, data: bytes, headers: dict[str, str]) -> Reply:
    """Answer with the bytes that `Range` asks for, or with all."""
    headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", call.headers.get("range", ""))
    if asked is None:
        return Reply(200, data, headers)
    first, last, tail = asked.groups()
    start = int(first) if first else max(len(data) - int(tail), 0)
    stop = min(int(last) + 1, len(data)) if last else len(data)
    if start >= stop:
        raise Refusal(416, "The range specified is invalid", **{"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})
