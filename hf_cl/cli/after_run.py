"""What `train` says at the end: the figures, what each task cost, the proof, and what to do next."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_cl.cli import show
from hf_cl.metrics import AccuracyMatrix

HOW = "digests and probe logits recomputed from the saved files in a fresh process"
FIGURES = {
    "average accuracy": "average_accuracy",
    "learning accuracy": "learning_accuracy",
    "forgetting": "forgetting",
    "backward transfer": "backward_transfer",
}


def report(out: Console, run: Path, found: Mapping[str, Any]) -> None:
    """Print the content of a finished run's `results.json`.

    Args:
        out: Where to.
        run: The run folder.
        found: The content of its `results.json`.
    """
    out.print()
    _figures(out, found)
    out.print()
    out.print(_costs(found))
    _capacity(out, found)
    out.print(_proof(found))
    out.print(f"exact: {'yes' if found['exact'] else 'no'} ({HOW})", soft_wrap=True)
    out.print()
    _places(out, run)


def _figures(out: Console, found: Mapping[str, Any]) -> None:
    matrix = AccuracyMatrix.from_list(found["tasks"], found["accuracy_matrix"])
    split = found.get("split", "test").capitalize()
    out.print(show.plain(f"{split} accuracy on every task after every task"), style="bold")
    for line in matrix.to_text().split("\n"):
        out.print(show.plain(line), soft_wrap=True)
    out.print()
    for name, key in FIGURES.items():
        out.print(f"{name:<18} {show.figure(found[key], exact=found['exact'])}")
    out.print(f"{'time':<18} {show.seconds(found['seconds'].get('total'))}")


def _costs(found: Mapping[str, Any]) -> Table:
    """Return what each task adds to the base; a column that no task has is left out."""
    sources = {name: kkt_source(found["facts"][name], found["tasks"]) for name in found["tasks"]}
    rows = []
    for name in found["tasks"]:
        facts = found["facts"][name]
        row = [name, show.size(found["bytes_per_task"][name]), show.size(found["head_bytes_per_task"][name])]
        row += [show.count(facts.get("trainable")), show.share(facts.get("overlap"))]
        rows.append([*row, sources[name] or "-"] if any(sources.values()) else row)
    columns = ["task", "mask and values", "head", "claimed or trained cells", "overlap"]
    return show.table("What each task costs", [*columns, *(["KKT start"] if any(sources.values()) else [])], rows)


def _capacity(out: Console, found: Mapping[str, Any]) -> None:
    if found["bytes_shared"]:
        out.print(f"shared by all tasks: {show.size(found['bytes_shared'])}")
    if found.get("bytes_carried"):
        out.print(f"kept for the next task alone: {show.size(found['bytes_carried'])}")
    if found["capacity_used"] is not None:
        out.print(f"capacity used: {show.share(found['capacity_used'])} of the store has an owner")


def _proof(found: Mapping[str, Any]) -> Table:
    before, after = found["owned_digest_before"], found["owned_digest_after"]
    return proof_table([(name, before[name], after[name], before[name] != after[name]) for name in found["tasks"]])


def proof_table(rows: list[tuple[str, str, str | None, bool]]) -> Table:
    """Return a table of digests: task, digest at its commit, digest now, whether anything moved."""
    return show.table(
        "Digest of all that a task's forward reads",
        ["task", "at its commit", "now", ""],
        [(name, show.short(old), show.short(new), "MOVED" if moved else "unchanged") for name, old, new, moved in rows],
    )


def kkt_source(facts: Mapping[str, Any], names: list[str]) -> str | None:
    """Return the task that KKT started a task from, `fresh` where it chose none, None where it was not asked."""
    if "kkt" not in facts:
        return None
    source = facts["kkt"].get("source")
    if source is None:
        return "fresh"
    return names[source] if isinstance(source, int) and 0 <= source < len(names) else str(source)


def _places(out: Console, run: Path) -> None:
    places = {"": "run folder", "bank": "mask bank", "results.json": "results", "accuracy.png": "picture"}
    for file, what in places.items():
        if (run / file).exists():
            out.print(f"{what:<11} {show.plain(run / file)}", soft_wrap=True)
    place = shlex.quote(str(run))
    out.print(f"Next: hf-cl verify {place}   or: hf-cl inspect {place}   or: hf-cl eval {place}", soft_wrap=True)
