"""A recipe for every combination of some values, so that a default is chosen by measuring.

    SWEEP/sweep.json                                 what was asked for and found so far; replaced after every run
    SWEEP/density=0.01_scale=1.5-seed0-<digest>/     a run folder, as `hf-cl train` leaves it

Invariant: what is chosen by its figures has not seen test rows. Runs are measured on validation rows unless the caller
asks for the final figures. A run's folder is found by the digest of its settings, the split and the seed among them, so
a sweep may be stopped, asked for again and widened, and no finished run is repeated.
"""

import json
import logging
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_cl.errors import BaseModelError, ConfigError, DataError, OwnershipError, RunError, TrainingError
from hf_cl.storage.disk import json_bytes, write_atomic
from hf_cl.storage.run_folder import RESULTS
from hf_cl.sweep_plan import Plan, Trial
from hf_cl.train_stream import run_stream
from hf_cl.tuning import Progress

logger = logging.getLogger(__name__)

FORMAT = 1
SWEEP = "sweep.json"
REFUSED = (ConfigError, DataError, OwnershipError, BaseModelError)
"""What is wrong with one combination; anything else (a full disk, say) stops the sweep, which can go on later."""


def sweep(asked: Plan, folder: Path, progress: Progress = logger.info) -> dict[str, Any]:
    """Run what is not finished yet, and return the content of `sweep.json`.

    A combination that diverges or is refused is recorded as such, and the sweep goes on. One that diverged would
    diverge again and is not repeated; one that was refused is tried again, as its data may be there by now.

    Args:
        asked: The sweep.
        folder: Where its runs and `sweep.json` lie; the same folder again goes on.
        progress: Told a line before and after each run, and what the run itself says.

    Raises:
        RunError: The folder is another thing's, or holds an unreadable `sweep.json`.
        HfClError: Something that is no fault of one combination.
    """
    records = _earlier(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for trial in asked.trials:
        record = records.setdefault(trial.digest, {"folder": _place(folder, trial).name, "state": "waiting"})
        record |= {"settings": trial.settings, "seed": trial.seed, "split": asked.split}
    write_atomic(folder / SWEEP, json_bytes(_content(asked, records)))
    for number, trial in enumerate(asked.trials, start=1):
        record, place = records[trial.digest], f"[{number}/{len(asked.trials)}]"
        progress(f"{place} {trial.title}")
        if record["state"] != "diverged":
            record |= _run(trial, folder / record["folder"], asked.split, progress)
        progress(f"{place} {_said(record)}")
        write_atomic(folder / SWEEP, json_bytes(_content(asked, records)))
    return _content(asked, records)


def _earlier(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what an earlier call recorded, by digest.

    Raises:
        RunError: The folder holds something, and no readable `sweep.json` of ours.
    """
    file = folder / SWEEP
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(not _is_trial(entry) for entry in folder.iterdir())):
            raise RunError(f"{folder}: exists and is no sweep. Choose another --output-dir.")
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
        records = (
            {record["digest"]: dict(record) for record in content["runs"]} if content["format"] == FORMAT else None
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: cannot be read ({error!r}). Remove it: finished runs beside it are kept.") from error
    if records is None:
        raise RunError(f"{file}: is of another format than {FORMAT}. Choose another --output-dir.")
    for record in records.values():
        if not _is_trial(folder / str(record.get("folder"))) or record["folder"] != Path(record["folder"]).name:
            raise RunError(f"{file}: {record.get('folder')!r} is no run of a sweep. Remove the file: runs are kept.")
    return records


def _is_trial(path: Path) -> bool:
    # `.sweep.json.tmp` is what a process leaves that is killed while it writes.
    return re.search(r"-seed\d+-[0-9a-f]{12}$", path.name) is not None or path.name == f".{SWEEP}.tmp"


def _place(folder: Path, trial: Trial) -> Path:
    """Return a run's folder: the one that is there under its digest, whatever it is called, or a new one."""
    return next((path for path in sorted(folder.glob(f"*-{trial.digest}"))), folder / trial.name)


def _run(trial: Trial, place: Path, split: str, progress: Progress) -> dict[str, Any]:
    """Run a trial, or go on with it; return what is recorded of it."""
    if (place / RESULTS).is_file():
        progress("    finished before")
    try:
        found = run_stream(trial.recipe, place, resume=True, split=split, progress=lambda line: progress(f"    {line}"))
    except TrainingError as error:
        return {"state": "diverged", "error": str(error)}
    except REFUSED as error:
        return {"state": "refused", "error": str(error)}
    return {"state": "finished", "error": None, **_figures(found)}


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("average_accuracy", "learning_accuracy", "forgetting", "exact", "bytes_shared", "capacity_used")
    return {
        **{key: found[key] for key in kept},
        "method": found["method"]["name"],
        "bytes_per_task": statistics.fmean(found["bytes_per_task"].values()),
        "head_bytes_per_task": statistics.fmean(found["head_bytes_per_task"].values()),
        "seconds_per_task": statistics.fmean(found["seconds"]["by_task"].values()),
    }


def _said(record: Mapping[str, Any]) -> str:
    if record["state"] == "finished":
        return f"average accuracy {record['average_accuracy']:.4f}"
    return f"{record['state']}: {record['error']}"


def _content(asked: Plan, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of `sweep.json`; runs of earlier, other questions to the same folder stay in it."""
    return {
        "format": FORMAT,
        "recipe": asked.recipe,
        "split": asked.split,
        "values": asked.values,
        "fixed": asked.fixed,
        "seeds": list(asked.seeds),
        "combinations": _combinations(asked, records),
        "runs": [{"digest": digest, **record} for digest, record in records.items()],
    }


def _combinations(asked: Plan, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was found of each combination, best first; one that did not finish with every seed stands behind.

    Args:
        asked: The sweep.
        records: What is recorded of each run, by digest.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for trial in asked.trials:
        record = records.get(trial.digest, {"settings": trial.settings, "state": "waiting"})
        groups.setdefault(json.dumps(trial.settings, sort_keys=True), []).append(record)
    found = [_summary(group) for group in groups.values()]
    # Of equal ones the cheaper stands first.
    return sorted(
        found,
        key=lambda row: (
            row["finished"] < row["seeds"],
            -(row["average_accuracy"] or 0.0),
            row["bytes_per_task"] or 0.0,
        ),
    )


def _summary(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [record for record in group if record["state"] == "finished"]
    accuracies = [record["average_accuracy"] for record in done]

    def mean(key: str) -> float | None:
        values = [record[key] for record in done if record[key] is not None]
        return statistics.fmean(values) if values else None

    return {
        "settings": group[0]["settings"],
        "seeds": len(group),
        "finished": len(done),
        "states": sorted({record["state"] for record in group}),
        "errors": sorted({record["error"] for record in group if record.get("error")}),
        "average_accuracy": mean("average_accuracy"),
        # The sample's standard deviation: how far one more seed is likely to fall, not how sure the mean is.
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "forgetting": mean("forgetting"),
        "exact": all(record["exact"] for record in done) if done else None,
        "bytes_per_task": mean("bytes_per_task"),
        "head_bytes_per_task": mean("head_bytes_per_task"),
        "bytes_shared": mean("bytes_shared"),
        "seconds_per_task": mean("seconds_per_task"),
    }


def require_finished(content: Mapping[str, Any]) -> None:
    """Refuse a sweep of which no run finished; there is nothing to compare.

    Raises:
        RunError: No run finished; it gives the first one's reason.
    """
    reasons = [error for row in content["combinations"] for error in row["errors"]]
    if reasons and not any(row["finished"] for row in content["combinations"]):
        raise RunError(f"no combination finished. The first: {reasons[0]}")
