"""Banks of a few hundred bytes that no model has learned: all that a repository or a folder sees of one is right.

PYTEST_DONT_REWRITE: it asserts nothing.
"""

import hashlib
from dataclasses import replace
from itertools import pairwise

import torch

from hf_cl.storage.bank_folder import task_blob
from hf_cl.storage.manifest import FILE, MANIFEST, BaseEntry, Manifest, StoreEntry, TaskEntry

BASE, REPO = "someone/tiny", "alice/bank"
STORE = {
    "compose": "delta",
    "seed": 0,
    "scale": 1.0,
    "layers": ["a.b"],
    "scales": {"a.b": 1.0},
    "shapes": {"a.b": [2, 2]},
    "targets": ["b"],
    "exclude": [],
    "head": ["classifier"],
    "train_norms": False,
}


def entry(index, name, content=None, **changes):
    """Return a task's record and its file's bytes, which `content` decides."""
    seed = int(hashlib.sha256(repr((name, content)).encode()).hexdigest()[:8], 16)
    tensors = {"masks": torch.randint(255, (40,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)}
    file, data = task_blob(f"task-{index:05d}", tensors)
    values = {
        "index": index,
        "name": name,
        "labels": ["good", "bad"],
        "problem_type": "single_label_classification",
        "density": 0.1,
        "values_dtype": "bfloat16",
        "trains": "claimed",
        "head_of": None,
        "inherits": [],
        "parts": {},
        "probe": "0" * 64,
        "environment": {},
        "source": "memory",
        "method": {"name": "exssnet", "options": {}},
        "start": None,
        "metrics": {"accuracy": 0.5},
        "sizes": {"masks": 40},
        "file": file,
    }
    return TaskEntry(**{**values, **changes}), data


def parts(*names, before=None, content=None, base_id=BASE, **changes):
    """Return a manifest with tasks of these names, on top of those of `before`, and the bytes of the new files.

    `content` tells one bank from another; `changes` are those of each new task's record.
    """
    held = before.tasks if before is not None else []
    start = before.next_index if before is not None else 0
    made = [entry(start + place, name, content, **changes) for place, name in enumerate(names)]
    manifest = Manifest(
        generation=(before.generation if before is not None else -1) + len(made),
        base=BaseEntry(base_id, None, "float32", "f" * 64, "e" * 64),
        store=StoreEntry(**STORE),
        tasks=[*held, *(task for task, _ in made)],
        tombstones=[],
        shared=None,
        next_index=start + len(made),
        grown_from=[*before.grown_from, before.digest] if before is not None else [],
    )
    return Manifest.from_bytes(manifest.to_bytes()), {task.file.name: data for task, data in made}


def bank(*names, before=None, **options):
    """Return a bank of tasks of these names, or `before` grown by them; for the options see `parts`."""
    from hf_cl import MaskBank  # brings transformers: tests in processes of their own do without

    manifest, blobs = parts(*names, before=before.manifest if before is not None else None, **options)
    if before is None:
        return MaskBank(manifest, blobs=blobs)
    return MaskBank(manifest, read=before._bytes, blobs=blobs)


def dropped(whole, name):
    """Return a bank without one of its tasks."""
    from hf_cl import MaskBank

    tasks = [task for task in whole.manifest.tasks if task.name != name]
    grown_from = [*whole.manifest.grown_from, whole.digest]
    generation = whole.manifest.generation + 1
    manifest = replace(whole.manifest, tasks=tasks, generation=generation, grown_from=grown_from)
    return MaskBank(manifest, read=whole._bytes)


def found_in(files):
    """Return the bank that a repository's files are, None where they hold none.

    Raises:
        AssertionError: They are torn: a file is missing, stale or damaged.
    """
    if MANIFEST not in files:
        return None
    manifest = Manifest.from_bytes(files[MANIFEST])
    held = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if FILE.fullmatch(name)}
    if held != {file.name: file.sha256 for file in manifest.files}:
        raise AssertionError(f"torn: {sorted(held)} where {manifest.files} are expected")
    return manifest


def at(hub, revision="main", repo=REPO):
    """The bank that a revision holds; it is torn if this raises."""
    return found_in(hub.repo(repo, revision))


def commits_of(hub, bank, repo=REPO):
    """The commits that made main hold a bank, newest first."""
    held = [(commit.sha, at(hub, commit.sha, repo)) for commit in hub.history(repo)]
    mine = [sha for sha, found in held if found is not None and found.digest == bank.digest]
    trees = [{path: blob.oid for path, blob in commit.files.items()} for commit in hub.history(repo)]
    if any(tree == before for tree, before in pairwise(trees)):
        raise AssertionError("a commit that changes nothing")
    return mine
