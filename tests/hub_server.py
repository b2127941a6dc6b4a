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

Not served: `expand=true`, merging pull requests, discussions, tags, the redirect of small files to
/api/resolve-cache, the check of the card at the commit, security scans, rate limits, quotas, organizations, LFS locks.
"""

import contextlib
import functools
import hashlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import pytest
from hub_routes import ROUTES, STALE_PARENT
from hub_store import LFS_SUFFIXES, Blob, Call, Commit, Fault, Refusal, Reply, Repo, User, as_json

__all__ = ["STALE_PARENT", "Hub", "hub", "serve"]
ROOT = Path(__file__).parents[1]
LOCAL = "127.0.0.1,localhost"  # for NO_PROXY
FOREIGN = re.compile("hf_|hugging|transformers_|.*_proxy$", re.IGNORECASE)  # variables that must not reach the client
NO_PAUSES = """import huggingface_hub.file_download as _download, huggingface_hub.utils._http as _http, time as _time
from types import SimpleNamespace as _Clock
_http.time = _download.time = _Clock(**vars(_time) | {"sleep": lambda seconds: None})
"""


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
def waits(monkeypatch):
    """Pauses between requests take no time; their lengths are kept. A module that asks the Hub uses it always."""
    from hf_cl.storage import hub_requests

    found: list[float] = []
    monkeypatch.setattr(hub_requests, "sleep", found.append)
    return found


@pytest.fixture
def hub(tmp_path):
    """A Hub of this test alone."""
    with serve(tmp_path / "hub") as server:
        yield server
