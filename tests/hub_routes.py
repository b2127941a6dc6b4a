"""The routes of the stand-in Hub, one function each. See `hub_server`.

Each is called under the Hub's lock with the Hub, the request, and the groups of its pattern.
"""

import base64
import binascii
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote

from hub_store import Blob, Call, Refusal, Reply, Repo, as_json, as_range, listing, read_xet

STALE_PARENT = "A commit has happened since. Please refresh and try again."  # asserted in huggingface_hub's own tests
NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>model|dataset|space)s/{NAME}"
PAGE = rf"/(?:(?P<kind>dataset|space)s/)?{NAME}"  # a model's page has no prefix
REVISION = r"(?P<revision>[^/]+)"  # quoted, so refs%2Fpr%2F1 is one segment
ROUTES: list[tuple[str, list[str], re.Pattern[str], Callable[..., Reply]]] = []
Hub = Any  # of hub_server, which imports this module


def route(methods: str, pattern: str, origin: str = "hub"):
    """Answer such requests by this method; the groups of the pattern are its arguments, unquoted."""

    def add(function):
        ROUTES.append((origin, methods.split(), re.compile(pattern), function))
        return function

    return add


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, call: Call) -> Reply:
    user = hub.user(call)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    auth = {"auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}}
    return as_json(auth | {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": []})


@route("POST", "/api/repos/create")
def create_repo(hub: Hub, call: Call) -> Reply:
    user, asked = hub.user(call), call.json()
    kind = asked.get("type") or "model"
    name = f"{asked.get('organization') or (user.name if user else '')}/{asked['name']}"
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    if user.role != "write" or not name.startswith(f"{user.name}/"):
        raise Refusal(403, f"You don't have the rights to create a {kind} under this namespace")
    status, known = 409, {"error": f"You already created this {kind} repo"}
    if (kind, name) not in hub.repos:
        status, known = 200, {}
        hub.create(name, kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
    return as_json(known | {"url": f"{hub.endpoint}/{hub.repos[kind, name].page}", "name": name}, status)


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: Hub, call: Call) -> Reply:
    asked, user = call.json(), hub.user(call)
    name = f"{asked.get('organization') or (user.name if user else '')}/{asked['name']}"
    repo = hub.find(call, asked.get("type"), name, write=True)
    del hub.repos[repo.kind, name]
    return Reply()


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, call: Call) -> Reply:
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
def info(hub: Hub, call: Call, kind: str, name: str, revision: str | None) -> Reply:
    repo = hub.find(call, kind, name)
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
def tree(hub: Hub, call: Call, kind: str, name: str, revision: str, path: str | None) -> Reply:
    commit = hub.find(call, kind, name).at(revision)
    inside = f"{path.rstrip('/')}/" if path else ""
    entries = [entry for entry in listing(commit.files) if entry["path"].startswith(inside)]
    if inside and not entries:
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
    if call.query.get("recursive", "false").lower() != "true":
        entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(inside)]
    return hub.paged(call, entries)


@route("POST", rf"{API}/paths-info/{REVISION}")
def paths_info(hub: Hub, call: Call, kind: str, name: str, revision: str) -> Reply:
    files = hub.find(call, kind, name).at(revision).files
    asked = {path.rstrip("/") for path in parse_qs(call.body.decode()).get("paths", [])}
    return as_json([entry for entry in listing(files) if entry["path"] in asked])


@route("GET", rf"{API}/refs")
def list_refs(hub: Hub, call: Call, kind: str, name: str) -> Reply:
    branches, pulls = [], []
    for ref, sha in hub.find(call, kind, name).refs.items():
        pull = ref.startswith("refs/pr/")
        entry = {"name": ref, "ref": ref if pull else f"refs/heads/{ref}", "targetCommit": sha}
        (pulls if pull else branches).append(entry)
    asked = {"pullRequests": pulls} if call.query.get("include_prs") else {}
    return as_json({"branches": branches, "converts": [], "tags": []} | asked)


@route("GET", rf"{API}/commits/{REVISION}")
def list_commits(hub: Hub, call: Call, kind: str, name: str, revision: str) -> Reply:
    repo = hub.find(call, kind, name)
    shown = []
    for commit in hub.history(name, revision, repo.kind):
        about = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
        shown.append(about | {"authors": [{"user": commit.author}]})
    return hub.paged(call, shown)


@route("POST DELETE", rf"{API}/branch/(?P<branch>[^/]+)")
def branch(hub: Hub, call: Call, kind: str, name: str, branch: str) -> Reply:
    repo = hub.find(call, kind, name, write=True)
    if call.method == "DELETE":
        repo.at(branch)
        del repo.refs[branch]
        return Reply()
    if branch in repo.refs or branch.startswith("refs/"):
        raise Refusal(409 if branch in repo.refs else 400, f"Reference already exists or is invalid: {branch}")
    repo.refs[branch] = repo.at(call.json().get("startingPoint", "main") if call.body else "main").sha
    return Reply()


@route("POST", rf"{API}/preupload/{REVISION}")
def preupload(hub: Hub, call: Call, kind: str, name: str, revision: str) -> Reply:
    there, answers, body = hub.find(call, kind, name, write=True).at(revision).files, [], call.json()
    held = there[".gitignore"].data.decode() if ".gitignore" in there else ""
    ignored = [line for line in body.get("gitIgnore", held).splitlines() if line and not line.startswith("#")]
    for asked in body["files"]:
        path, blob = asked["path"], there.get(asked["path"])
        lfs = hub.is_lfs(path, asked["size"], base64.b64decode(asked["sample"]))
        ignore = any(fnmatch.fnmatch(path, line) for line in ignored)  # git's own rules are richer
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignore}
        answers.append(answer | ({"oid": blob.sha256 if blob.lfs else blob.oid} if blob else {}))
    return as_json({"files": answers})


@route("POST", rf"{API}/commit/{REVISION}")
def commit_route(hub: Hub, call: Call, kind: str, name: str, revision: str) -> Reply:
    repo = hub.find(call, kind, name, write=True)
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
        apply(hub, repo, files, operation["key"], operation["value"])
    about = header["summary"], header.get("description", ""), hub.users[call.token].name
    commit = repo.add_commit(revision, head.sha, files, *about)
    page = f"{hub.endpoint}/{repo.page}"
    pull = {"pullRequestUrl": f"{page}/discussions/{number}"} if new_pull else {}
    oid = {"commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
    return as_json({"success": True, "hookOutput": ""} | oid | pull)


def apply(hub: Hub, repo: Repo, files: dict[str, Blob], key: str, value: dict) -> None:
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
        if value["oid"] not in repo.lfs and hub.xet is not None:
            repo.lfs |= read_xet(hub.xet, value["oid"])
        if value["oid"] not in repo.lfs:
            raise Refusal(400, f"The LFS object {value['oid']} of {path} was not uploaded")
        files[path] = repo.lfs[value["oid"]]
    else:
        raise Refusal(400, f"Unknown operation: {key}")


@route("GET HEAD", rf"{PAGE}/resolve/{REVISION}/(?P<path>.+)")
def resolve(hub: Hub, call: Call, kind: str | None, name: str, revision: str, path: str) -> Reply:
    repo = hub.find(call, kind, name)
    commit = repo.at(revision)
    blob, headers = commit.files.get(path), {"X-Repo-Commit": commit.sha}
    if blob is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
    if not blob.lfs:
        return as_range(call, blob.data, headers | {"ETag": f'"{blob.oid}"'})
    place = hub.signed(hub.cdn, f"/cdn/{repo.kind}s/{name}/{blob.sha256}/{quote(PurePosixPath(path).name)}")
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data)), "Location": place}
    if blob.xet:
        refresh = f"{hub.endpoint}/api/{repo.kind}s/{name}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": blob.xet, "X-Xet-Refresh-Route": refresh}
    return Reply(302, b"", headers)


@route("POST", rf"{PAGE}\.git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, call: Call, kind: str | None, name: str) -> Reply:
    asked = call.json()
    repo = hub.find(call, kind, name, write="ref" in asked)  # without: for a pull request, open to all
    store, objects = f"{repo.kind}s/{name}", []
    for wanted in asked["objects"]:
        oid, size, header, upload = wanted["oid"], wanted["size"], {}, hub.signed
        href = upload(hub.cdn, f"/cdn/{store}/{oid}/parts/1")
        if size > hub.part_size and "multipart" in asked["transfers"]:
            parts = range(1, -(-size // hub.part_size) + 1)
            header = {str(part): upload(hub.cdn, f"/cdn/{store}/{oid}/parts/{part}") for part in parts}
            header["chunk_size"] = str(hub.part_size)
            href = upload(hub.endpoint, f"/api/complete/{store}/{oid}")
        verify = {"href": f"{hub.endpoint}/{repo.page}.git/info/lfs/objects/verify"}
        actions = {"actions": {"upload": {"href": href, "header": header}, "verify": verify}}
        objects.append({"oid": oid, "size": size} | ({} if oid in repo.lfs else actions))
    return as_json({"transfer": "basic", "objects": objects})


@route("PUT", rf"/cdn/(?P<kind>model|dataset|space)s/{NAME}/(?P<oid>\w+)/parts/(?P<part>\d+)", origin="cdn")
def lfs_put(hub: Hub, call: Call, kind: str, name: str, oid: str, part: str) -> Reply:
    hub.find_signed(call, kind, name).uploaded.setdefault(oid, {})[int(part)] = call.body
    return Reply(200, b"", {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("POST", rf"/api/complete/(?P<kind>model|dataset|space)s/{NAME}/(?P<oid>\w+)")
def lfs_complete(hub: Hub, call: Call, kind: str, name: str, oid: str) -> Reply:
    parts = hub.find_signed(call, kind, name).uploaded.get(oid, {})
    etags = {part: f'"{hashlib.md5(data).hexdigest()}"' for part, data in parts.items()}
    if {part["partNumber"]: part["etag"] for part in call.json()["parts"]} != etags:
        raise Refusal(400, "The parts are not the ones that were uploaded")
    return as_json({"success": True})


@route("POST", rf"{PAGE}\.git/info/lfs/objects/verify")
def lfs_verify(hub: Hub, call: Call, kind: str | None, name: str) -> Reply:
    repo, asked = hub.find(call, kind, name), call.json()
    if asked["oid"] in repo.lfs:  # the answer to an earlier request was lost
        return as_json({"success": True})
    blob = Blob(b"".join(data for _, data in sorted(repo.uploaded.pop(asked["oid"], {}).items())), lfs=True)
    if (blob.sha256, len(blob.data)) != (asked["oid"], asked["size"]):
        raise Refusal(422, f"The content of {asked['oid']} does not have this size and sha256")
    repo.lfs[blob.sha256] = blob
    return as_json({"success": True})


@route("GET HEAD", rf"/cdn/(?P<kind>model|dataset|space)s/{NAME}/(?P<oid>\w+)/(?P<file>[^/]+)", origin="cdn")
def download(hub: Hub, call: Call, kind: str, name: str, oid: str, file: str) -> Reply:
    return as_range(call, hub.find_signed(call, kind, name).lfs[oid].data, {"ETag": f'"{oid}"'})


@route("GET", rf"{API}/xet-(?P<right>read|write)-token/{REVISION}")
def xet_token(hub: Hub, call: Call, kind: str, name: str, right: str, revision: str) -> Reply:
    hub.find(call, kind, name, write=right == "write")
    if hub.xet is None:
        raise Refusal(404, "Xet is off here")
    place, ends = f"local://{hub.xet}", 4102444800
    headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(ends)}
    return as_json({"accessToken": "xet", "exp": ends, "casUrl": place}, headers=headers)
