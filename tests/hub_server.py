"""A stand-in for the Hugging Face Hub: in memory, over real HTTP, for the unmodified huggingface_hub 2.4.0.

Each answer is made under one lock, so a commit is there whole or not at all. Two origins are served, as by the Hub:
the API on 127.0.0.1 and the "CDN" on localhost and another port. The CDN wants a signed URL and refuses a token, as S3.

    hub = hub_server.hub  # the fixture, in a test module or in conftest.py

    def test_a_push_survives_a_busy_hub(hub):
        hub.create("alice/bank")
        hub.fail("POST", "/preupload/", status=503, times=2)  # also: drop, delay, truncate, flip, headers, do
        HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/bank")
        assert hub.repo("alice/bank")["a"] == b"1"
        assert [call.status for call in hub.calls("POST", "/preupload/")] == [503, 503, 200]

`hub` points the client in this process at the server (see `_this_process`); `hub.python(code)` runs a fresh one, whose
environment is set before the import. Not like the real Hub: see "Not served" at the end of this docstring.

Not served: `expand=true`, merging pull requests, discussions, tags, .gitignore, the redirect of small files to
/api/resolve-cache, the check of the card at the commit, security scans, rate limits, quotas, organizations, LFS locks.
"""

import base64
import binascii
import contextlib
import datetime
import functools
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
STALE_PARENT = "A commit has happened since. Please refresh and try again."  # asserted in huggingface_hub's own tests
LOCAL = "127.0.0.1,localhost"  # for NO_PROXY
FOREIGN = re.compile("hf_|hugging|transformers_|.*_proxy$", re.IGNORECASE)  # variables that must not reach the client
LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".h5", ".npy", ".npz", ".parquet", ".pkl", ".pt", ".safetensors", ".zip")
NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>model|dataset|space)s/{NAME}"
PAGE = rf"/(?:(?P<kind>dataset|space)s/)?{NAME}"  # a model's page has no prefix
REVISION = r"(?P<revision>[^/]+)"  # quoted, so refs%2Fpr%2F1 is one segment
NO_PAUSES = """import huggingface_hub.file_download as _download, huggingface_hub.utils._http as _http, time as _time
from types import SimpleNamespace as _Clock
_http.time = _download.time = _Clock(**vars(_time) | {"sleep": lambda seconds: None})
"""
ROUTES: list[tuple[str, list[str], re.Pattern[str], Callable[..., "Reply"]]] = []


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
        date = datetime.datetime(2026, 1, 1) + datetime.timedelta(seconds=number)
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


def route(methods: str, pattern: str, origin: str = "hub"):
    """Answer such requests by this method; the groups of the pattern are its arguments, unquoted."""

    def add(function):
        ROUTES.append((origin, methods.split(), re.compile(pattern), function))
        return function

    return add


# --- the server ---------------------------------------------------------------------------------


class Hub:
    """The stand-in: its state, its routes, and what a test asks of it."""

    def __init__(self, home: Path) -> None:
        self.home = home  # where clients keep their caches
        home.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.log: list[Call] = []
        self.waits: list[float] = []  # seconds the client in this process would have slept
        self.bugs: list[str] = []  # tracebacks of this server
        self.faults: list[Fault] = []
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.upload_mode: str | None = None  # "regular" or "lfs" for every file, None: by its name, size and content
        self.lfs_over, self.part_size, self.page_size = 10 << 20, 64 << 20, 1000
        self.xet: Path | None = None  # a folder for hf_xet's own store: files go there once it is set
        self.token = self.add_user("alice")
        self.servers = [Server(self, "hub"), Server(self, "cdn")]
        self.endpoint = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.cdn = f"http://localhost:{self.servers[1].server_port}"

    def close(self) -> None:
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    # What a test asks.

    def add_user(self, name: str, role: str = "write") -> str:
        """Let in another user, or another token of one, and return the token."""
        token = f"hf_{name}{role}{hashlib.sha1(f'{name} {role}'.encode()).hexdigest()[:12]}"
        self.users[token] = User(name, role)
        return token

    def create(self, name: str, kind: str = "model", private: bool = False, gated: bool = False) -> Repo:
        """Make a repository that holds `.gitattributes`, as each new one does."""
        lines = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo = self.repos[kind, name] = Repo(kind, name, private, gated)
        repo.add_commit("main", None, {".gitattributes": Blob(lines.encode())}, "initial commit", "", "system")
        return repo

    def commit(self, name: str, files: dict[str, bytes | None], title: str = "By hand", kind: str = "model") -> str:
        """Commit to main past the client: a rival, or content that no client would send. None deletes."""
        with self.lock:
            repo = self.repos[kind, name]
            tree = dict(repo.at("main").files)
            for path, data in files.items():
                tree.pop(path, None)
                if data is not None:
                    tree[path] = Blob(data, lfs=self.is_lfs(path, len(data), data[:512]))
                    repo.lfs |= {tree[path].sha256: tree[path]} if tree[path].lfs else {}
            return repo.add_commit("main", repo.refs["main"], tree, title, "", "rival").sha

    def repo(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files at a revision, `.gitattributes` included."""
        with self.lock:
            return {path: blob.data for path, blob in self.repos[kind, name].at(revision).files.items()}

    def head(self, name: str, kind: str = "model") -> str:
        return self.repos[kind, name].refs["main"]

    def history(self, name: str, revision: str = "main", kind: str = "model") -> list[Commit]:
        """The commits of a revision, newest first."""
        repo = self.repos[kind, name]
        commits = [repo.at(revision)]
        while commits[-1].parent:
            commits.append(repo.commits[commits[-1].parent])
        return commits

    def calls(self, method: str = ".*", path: str = "") -> list[Call]:
        """The requests so far whose method and path match these patterns."""
        return [call for call in list(self.log) if re.fullmatch(method, call.method) and re.search(path, call.path)]

    def fail(self, method: str = ".*", path: str = "", **what) -> Fault:
        """Let requests fail whose method and path match these patterns: see `Fault`. The oldest fault goes first."""
        self.faults.append(Fault(method, path, **what))
        return self.faults[-1]

    def heal(self) -> None:
        self.faults.clear()

    def environment(self, home: Path | None = None, **changes: str) -> dict[str, str]:
        """The environment of a process whose client talks to this server alone, with a cache of its own."""
        home = home or Path(tempfile.mkdtemp(prefix="home", dir=self.home))
        home.mkdir(parents=True, exist_ok=True)
        # Else the first request of a process asks for this list.
        (home / ".agent_harnesses.json").write_text('{"standardEnvVars": [], "harnesses": {}}', "utf-8")
        kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": LOCAL}
        return kept | ours | changes

    def python(self, code: str, home: Path | None = None, check: bool = True, **changes: str):
        """Run code in a fresh interpreter at the root of this project; the client's pauses take no time there."""
        command = [sys.executable, "-c", NO_PAUSES + code]
        env = self.environment(home, **changes)
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    # What a client asks.

    def handle(self, call: Call) -> Reply | None:
        """Answer, or not: None is a connection that breaks without a word."""
        with self.lock:
            self.log.append(call)
            fault = next((fault for fault in self.faults if fault.takes(call)), Fault())
        if fault.do is not None:
            fault.do()
        self.closing.wait(fault.delay)
        if fault.drop == "before":
            return None
        if fault.status is not None:
            reply = as_json({"error": "Injected fault"}, fault.status, fault.headers)
        else:
            reply = self.answer(call)
        if fault.drop is not None:
            return None
        call.status = reply.status
        return fault.spoil(reply)

    def answer(self, call: Call) -> Reply:
        for origin, methods, pattern, function in ROUTES:
            found = pattern.fullmatch(call.path)
            if found and origin == call.origin and call.method in methods:
                groups = {key: unquote(value) if value else value for key, value in found.groupdict().items()}
                try:
                    with self.lock:
                        return function(self, call, **groups)
                except Refusal as refusal:
                    return refusal.reply
                except Exception:
                    self.bugs.append(traceback.format_exc())
                    return as_json({"error": "Internal Error: a bug of the stand-in"}, 500)
        return as_json({"error": "The stand-in has no such route"}, 404)

    def user(self, call: Call) -> User | None:
        if call.token and call.token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.users.get(call.token or "")

    def find(self, call: Call, kind: str | None, name: str, write: bool = False) -> Repo:
        """The repository, if the caller may see it, and change it where `write`; a pull request is open to all."""
        user, repo = self.user(call), self.repos.get((kind or "model", name))
        owns = user is not None and user.name == name.split("/")[0]
        if repo is None or (repo.private and not owns) or (write and user is None):
            if user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not (owns and user.role == "write") and "create_pr" not in call.query:
            raise Refusal(403, f"You don't have the rights to write to {name}")
        if repo.gated and not owns and "/resolve/" in call.path:
            raise Refusal(403 if user else 401, f"Access to model {name} is restricted.", "GatedRepo")
        return repo

    def is_lfs(self, path: str, size: int, sample: bytes) -> bool:
        if self.upload_mode is not None:
            return self.upload_mode == "lfs"
        return path.endswith(LFS_SUFFIXES) or size > self.lfs_over or b"\0" in sample

    def paged(self, call: Call, items: list) -> Reply:
        start = int(call.query.get("cursor", 0))
        stop = start + self.page_size
        following = f"{self.endpoint}{call.path}?{urlencode(call.query | {'cursor': stop})}"
        return as_json(items[start:stop], headers={"Link": f'<{following}>; rel="next"'} if stop < len(items) else {})

    def signed(self, origin: str, path: str) -> str:
        return f"{origin}{path}?signature={hashlib.sha1(f'stand-in {path}'.encode()).hexdigest()}"

    def find_signed(self, call: Call, kind: str, name: str) -> Repo:
        if call.token:
            raise Refusal(400, "Only one auth mechanism allowed: a token was sent with a signed URL")
        if not self.signed("", call.path).endswith(call.query.get("signature", "none")):
            raise Refusal(403, "SignatureDoesNotMatch")
        if (kind, name) not in self.repos:
            raise Refusal(404, "NoSuchKey")
        return self.repos[kind, name]

    @route("GET", "/api/whoami-v2")
    def whoami(self, call: Call) -> Reply:
        user = self.user(call)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        auth = {"auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}}
        return as_json(auth | {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": []})

    @route("POST", "/api/repos/create")
    def create_repo(self, call: Call) -> Reply:
        user, asked = self.user(call), call.json()
        kind = asked.get("type") or "model"
        name = f"{asked.get('organization') or (user.name if user else '')}/{asked['name']}"
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user.role != "write" or not name.startswith(f"{user.name}/"):
            raise Refusal(403, f"You don't have the rights to create a {kind} under this namespace")
        status, known = 409, {"error": f"You already created this {kind} repo"}
        if (kind, name) not in self.repos:
            status, known = 200, {}
            self.create(name, kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return as_json(known | {"url": f"{self.endpoint}/{self.repos[kind, name].page}", "name": name}, status)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, call: Call) -> Reply:
        asked, user = call.json(), self.user(call)
        name = f"{asked.get('organization') or (user.name if user else '')}/{asked['name']}"
        repo = self.find(call, asked.get("type"), name, write=True)
        del self.repos[repo.kind, name]
        return Reply()

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call) -> Reply:
        import yaml  # not of the standard library, but huggingface_hub needs it too

        found = re.match(r"---\r?\n(.*?)\r?\n---", call.json()["content"], re.DOTALL)
        if found is None:
            return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            errors = [] if isinstance(yaml.safe_load(found[1]), dict) else [{"message": "metadata is not a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    @route("GET", rf"{API}(?:/revision/{REVISION})?")
    def info(self, call: Call, kind: str, name: str, revision: str | None) -> Reply:
        repo = self.find(call, kind, name)
        commit = repo.at(revision or "main")
        files = []
        for path, blob in sorted(commit.files.items()):
            lfs = {"lfs": {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}}
            more = {"size": len(blob.data), "blobId": blob.oid} | (lfs if blob.lfs else {})
            files.append({"rfilename": path} | (more if call.query.get("blobs") else {}))
        flags = {"private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False}
        about = {"_id": commit.sha[:24], "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit.sha}
        dates = {"lastModified": commit.date, "createdAt": "2026-01-01T00:00:00.000Z"}
        return as_json(about | dates | flags | {"downloads": 0, "likes": 0, "tags": [], "siblings": files})

    @route("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.+))?")
    def tree(self, call: Call, kind: str, name: str, revision: str, path: str | None) -> Reply:
        commit = self.find(call, kind, name).at(revision)
        inside = f"{path.rstrip('/')}/" if path else ""
        entries = [entry for entry in listing(commit.files) if entry["path"].startswith(inside)]
        if inside and not entries:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        if call.query.get("recursive", "false").lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(inside)]
        return self.paged(call, entries)

    @route("POST", rf"{API}/paths-info/{REVISION}")
    def paths_info(self, call: Call, kind: str, name: str, revision: str) -> Reply:
        files = self.find(call, kind, name).at(revision).files
        asked = {path.rstrip("/") for path in parse_qs(call.body.decode()).get("paths", [])}
        return as_json([entry for entry in listing(files) if entry["path"] in asked])

    @route("GET", rf"{API}/refs")
    def list_refs(self, call: Call, kind: str, name: str) -> Reply:
        branches, pulls = [], []
        for ref, sha in self.find(call, kind, name).refs.items():
            pull = ref.startswith("refs/pr/")
            entry = {"name": ref, "ref": ref if pull else f"refs/heads/{ref}", "targetCommit": sha}
            (pulls if pull else branches).append(entry)
        asked = {"pullRequests": pulls} if call.query.get("include_prs") else {}
        return as_json({"branches": branches, "converts": [], "tags": []} | asked)

    @route("GET", rf"{API}/commits/{REVISION}")
    def list_commits(self, call: Call, kind: str, name: str, revision: str) -> Reply:
        repo = self.find(call, kind, name)
        shown = []
        for commit in self.history(name, revision, repo.kind):
            about = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
            shown.append(about | {"authors": [{"user": commit.author}]})
        return self.paged(call, shown)

    @route("POST DELETE", rf"{API}/branch/(?P<branch>[^/]+)")
    def branch(self, call: Call, kind: str, name: str, branch: str) -> Reply:
        repo = self.find(call, kind, name, write=True)
        if call.method == "DELETE":
            repo.at(branch)
            del repo.refs[branch]
            return Reply()
        if branch in repo.refs or branch.startswith("refs/"):
            raise Refusal(409 if branch in repo.refs else 400, f"Reference already exists or is invalid: {branch}")
        repo.refs[branch] = repo.at(call.json().get("startingPoint", "main") if call.body else "main").sha
        return Reply()

    @route("POST", rf"{API}/preupload/{REVISION}")
    def preupload(self, call: Call, kind: str, name: str, revision: str) -> Reply:
        there, answers = self.find(call, kind, name, write=True).at(revision).files, []
        for asked in call.json()["files"]:
            path, blob = asked["path"], there.get(asked["path"])
            lfs = self.is_lfs(path, asked["size"], base64.b64decode(asked["sample"]))
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": blob.sha256 if blob.lfs else blob.oid} if blob else {}))
        return as_json({"files": answers})

    @route("POST", rf"{API}/commit/{REVISION}")
    def commit_route(self, call: Call, kind: str, name: str, revision: str) -> Reply:
        repo = self.find(call, kind, name, write=True)
        try:
            header, *operations = [json.loads(line) for line in call.body.splitlines()]
            header = header["value"]
        except (ValueError, TypeError, KeyError):
            raise Refusal(400, "The body is no list of JSON lines that starts with a header") from None
        head, parent, new_pull = repo.at(revision), header.get("parentCommit"), "create_pr" in call.query
        if revision not in repo.refs:
            raise Refusal(400, f"{revision} is no branch")
        if new_pull:
            number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
            head, revision = repo.at(parent or revision), f"refs/pr/{number}"
        elif parent and not head.sha.startswith(parent):
            raise Refusal(412, STALE_PARENT)
        files = dict(head.files)
        for operation in operations:
            self.apply(repo, files, operation["key"], operation["value"])
        about = header["summary"], header.get("description", ""), self.users[call.token].name
        commit = repo.add_commit(revision, head.sha, files, *about)
        page = f"{self.endpoint}/{repo.page}"
        pull = {"pullRequestUrl": f"{page}/discussions/{number}"} if new_pull else {}
        oid = {"commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
        return as_json({"success": True, "hookOutput": ""} | oid | pull)

    def apply(self, repo: Repo, files: dict[str, Blob], key: str, value: dict) -> None:
        """Carry out one line of a commit, in the order of the lines."""
        path = value["path"].rstrip("/")
        inside = [other for other in files if other == path or other.startswith(f"{path}/")]
        if not path or path.startswith("/") or {"..", ".", ".git", ""} & set(path.split("/")):
            raise Refusal(400, f"Invalid path: {path!r}")
        if key in ("deletedFile", "deletedFolder"):
            gone = [path] if key == "deletedFile" and path in files else inside if key == "deletedFolder" else []
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for other in gone:
                del files[other]
        elif key == "file":
            try:
                files[path] = Blob(base64.b64decode(value["content"], validate=True))
            except binascii.Error:
                raise Refusal(400, f"{path} is not base64") from None
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs and self.xet is not None:
                repo.lfs |= read_xet(self.xet, value["oid"])
            if value["oid"] not in repo.lfs:
                raise Refusal(400, f"The LFS object {value['oid']} of {path} was not uploaded")
            files[path] = repo.lfs[value["oid"]]
        else:
            raise Refusal(400, f"Unknown operation: {key}")

    @route("GET HEAD", rf"{PAGE}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, call: Call, kind: str | None, name: str, revision: str, path: str) -> Reply:
        repo = self.find(call, kind, name)
        commit = repo.at(revision)
        blob, headers = commit.files.get(path), {"X-Repo-Commit": commit.sha}
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        if not blob.lfs:
            return as_range(call, blob.data, headers | {"ETag": f'"{blob.oid}"'})
        place = self.signed(self.cdn, f"/cdn/{repo.kind}s/{name}/{blob.sha256}/{quote(PurePosixPath(path).name)}")
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data)), "Location": place}
        if blob.xet:
            refresh = f"{self.endpoint}/api/{repo.kind}s/{name}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": blob.xet, "X-Xet-Refresh-Route": refresh}
        return Reply(302, b"", headers)

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/batch")
    def lfs_batch(self, call: Call, kind: str | None, name: str) -> Reply:
        asked = call.json()
        repo = self.find(call, kind, name, write="ref" in asked)  # without: for a pull request, open to all
        store, objects = f"{repo.kind}s/{name}", []
        for wanted in asked["objects"]:
            oid, size, header, upload = wanted["oid"], wanted["size"], {}, self.signed
            href = upload(self.cdn, f"/cdn/{store}/{oid}/parts/1")
            if size > self.part_size and "multipart" in asked["transfers"]:
                parts = range(1, -(-size // self.part_size) + 1)
                header = {str(part): upload(self.cdn, f"/cdn/{store}/{oid}/parts/{part}") for part in parts}
                header["chunk_size"] = str(self.part_size)
                href = upload(self.endpoint, f"/api/complete/{store}/{oid}")
            verify = {"href": f"{self.endpoint}/{repo.page}.git/info/lfs/objects/verify"}
            actions = {"actions": {"upload": {"href": href, "header": header}, "verify": verify}}
            objects.append({"oid": oid, "size": size} | ({} if oid in repo.lfs else actions))
        return as_json({"transfer": "basic", "objects": objects})

    @route("PUT", rf"/cdn/(?P<kind>model|dataset|space)s/{NAME}/(?P<oid>\w+)/parts/(?P<part>\d+)", origin="cdn")
    def lfs_put(self, call: Call, kind: str, name: str, oid: str, part: str) -> Reply:
        self.find_signed(call, kind, name).uploaded.setdefault(oid, {})[int(part)] = call.body
        return Reply(200, b"", {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})

    @route("POST", rf"/api/complete/(?P<kind>model|dataset|space)s/{NAME}/(?P<oid>\w+)")
    def lfs_complete(self, call: Call, kind: str, name: str, oid: str) -> Reply:
        parts = self.find_signed(call, kind, name).uploaded.get(oid, {})
        etags = {part: f'"{hashlib.md5(data).hexdigest()}"' for part, data in parts.items()}
        if {part["partNumber"]: part["etag"] for part in call.json()["parts"]} != etags:
            raise Refusal(400, "The parts are not the ones that were uploaded")
        return as_json({"success": True})

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/verify")
    def lfs_verify(self, call: Call, kind: str | None, name: str) -> Reply:
        repo, asked = self.find(call, kind, name), call.json()
        blob = Blob(b"".join(data for _, data in sorted(repo.uploaded.pop(asked["oid"], {}).items())), lfs=True)
        if (blob.sha256, len(blob.data)) != (asked["oid"], asked["size"]):
            raise Refusal(422, f"The content of {asked['oid']} does not have this size and sha256")
        repo.lfs[blob.sha256] = blob
        return as_json({"success": True})

    @route("GET HEAD", rf"/cdn/(?P<kind>model|dataset|space)s/{NAME}/(?P<oid>\w+)/(?P<file>[^/]+)", origin="cdn")
    def download(self, call: Call, kind: str, name: str, oid: str, file: str) -> Reply:
        return as_range(call, self.find_signed(call, kind, name).lfs[oid].data, {"ETag": f'"{oid}"'})

    @route("GET", rf"{API}/xet-(?P<right>read|write)-token/{REVISION}")
    def xet_token(self, call: Call, kind: str, name: str, right: str, revision: str) -> Reply:
        self.find(call, kind, name, write=right == "write")
        if self.xet is None:
            raise Refusal(404, "Xet is off here")
        place, ends = f"local://{self.xet}", 4102444800
        headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(ends)}
        return as_json({"accessToken": "xet", "exp": ends, "casUrl": place}, headers=headers)


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


# --- HTTP ---------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Reads a request whole, also where a fault is the answer: else the next one on this connection is garbled."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    disable_nagle_algorithm = True

    def answer(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        headers = {key.lower(): value for key, value in self.headers.items()}
        call = Call(self.command, url.path, query, self.server.origin, headers, self.read_body())
        reply = self.server.hub.handle(call)
        if reply is not None:
            self.send_response(reply.status)
            for key, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else reply.body[: reply.sent])
            self.wfile.flush()
        if reply is None or reply.sent is not None:
            self.close_connection = True
            with contextlib.suppress(OSError):  # the client was faster
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *args: object) -> None:
        """Say nothing: `Hub.log` holds it."""


class Server(ThreadingHTTPServer):
    """One origin of a hub, from now until it is shut down."""

    request_queue_size = 128
    daemon_threads, block_on_close = True, False

    def __init__(self, hub: Hub, origin: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.origin = hub, origin
        threading.Thread(target=functools.partial(self.serve_forever, poll_interval=0.01), daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client hung up
            self.hub.bugs.append(traceback.format_exc())


# --- for tests ----------------------------------------------------------------------------------


def _this_process(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    """Point the client in this process at the server, as if the environment had been set before its import.

    The client reads most constants at each call, from the module; these do not suffice: `_HUB_ORIGINS` (who may see the
    token), the endpoint of the HfApi behind `huggingface_hub.create_repo` and its like, the HfApi that transformers
    keeps, the list of agents (asked for once a process), the shared HTTP session. HF_TOKEN is read at each call. Both
    modules that sleep get a clock of their own: to patch `time.sleep` itself would hurry everything else, too.
    """
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _detect_agent, _http

    for name in filter(FOREIGN.match, list(os.environ)):
        patch.delenv(name)
    patch.setenv("NO_PROXY", LOCAL)
    patch.setenv("HF_TOKEN", hub.token)
    home = hub.home / "home"
    patch.setenv("HF_HOME", str(home))  # for the log of hf_xet alone, which `read_xet` may open
    values = {"ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
    values |= {"HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"}
    values |= {"HF_TOKEN_PATH": str(home / "token"), "HF_STORED_TOKENS_PATH": str(home / "stored_tokens")}
    values |= {"HUGGINGFACE_HUB_CACHE": str(home / "hub"), "HF_ASSETS_CACHE": str(home / "assets")}
    values |= {"HF_XET_CACHE": str(home / "xet"), "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    values |= {"HF_HUB_DISABLE_TELEMETRY": True, "HF_URL_HOSTS": constants.HF_URL_HOSTS | {"127.0.0.1"}}
    for name, value in values.items():
        patch.setattr(constants, name, value)
    patch.setattr(_http, "_HUB_ORIGINS", frozenset({_http._url_origin(hub.endpoint)}))
    patch.setattr(hf_api.api, "endpoint", hub.endpoint)
    patch.setattr(_detect_agent, "_registry", _detect_agent._EMPTY_REGISTRY)
    if "transformers.utils.hub" in sys.modules:
        patch.setattr(sys.modules["transformers.utils.hub"], "_hf_api", huggingface_hub.HfApi(endpoint=hub.endpoint))
    for module in (_http, file_download):
        patch.setattr(module, "time", SimpleNamespace(**vars(time) | {"sleep": hub.waits.append}))


@contextlib.contextmanager
def serve(home: Path):
    """A server and, while it runs, this process's client pointed at it."""
    from huggingface_hub import close_session

    server = Hub(home)
    try:
        with pytest.MonkeyPatch.context() as patch:
            close_session()  # a session of another test may hold connections, or a proxy
            _this_process(server, patch)
            yield server
    finally:
        close_session()
        server.close()
    assert not server.bugs, server.bugs[0]


@pytest.fixture
def hub(tmp_path):
    """A Hub of this test alone."""
    with serve(tmp_path / "hub") as server:
        yield server
