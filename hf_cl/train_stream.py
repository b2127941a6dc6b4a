"""The whole way as one function: tasks -> tokens -> masked model -> ownership -> run folder -> results."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_cl import plugins
from hf_cl.bank import MaskBank
from hf_cl.config import read
from hf_cl.data import TaskSpec, load_task, measured_on, read_stream, spec_values
from hf_cl.errors import ConfigError, RunError
from hf_cl.from_recipe import build_learner
from hf_cl.layers.base import lasting
from hf_cl.learner import ContinualLearner
from hf_cl.recipe import Checked, data_dir
from hf_cl.results import results
from hf_cl.storage.disk import json_bytes, write_atomic
from hf_cl.storage.manifest import MANIFEST
from hf_cl.storage.run_folder import BANK, RESULTS, RunFolder
from hf_cl.training.evaluation import ComputeMetrics
from hf_cl.tuning import Progress, tune

logger = logging.getLogger(__name__)


def run_stream(
    recipe: Checked,
    output_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    from_bank: "str | Path | None" = None,
    split: str = "test",
    compute_metrics: ComputeMetrics | None = None,
    progress: Progress = logger.info,
) -> dict[str, Any]:
    """Learn a recipe's stream into a run folder and return the content of its `results.json`.

    Args:
        recipe: A checked recipe.
        output_dir: The run folder.
        resume: Go on after the last finished task of a run that is there.
        overwrite: Replace a run that is there.
        from_bank: A bank's folder or Hub id to go on from; its tasks come along into the run's bank.
        split: Which rows are measured: `test`, or `validation` while options are still being chosen.
        compute_metrics: Your own metrics, recorded beside ours.
        progress: Told a line after each thing that takes long.

    Raises:
        HfClError: Bad input, before any training; or a task's training failed, with earlier tasks kept.
    """
    began = time.perf_counter()
    specs = read_stream(recipe.stream, data_dir=data_dir(), root=recipe.root)
    tasks = [measured_on(load_task(spec, recipe.root), split) for spec in specs]
    folder = _existing(output_dir, recipe, specs, split) if resume else None
    if folder is not None and (output_dir / RESULTS).is_file():
        progress(f"{output_dir} is finished: {len(specs)} tasks. Nothing to do.")
        done: dict[str, Any] = json.loads((output_dir / RESULTS).read_text("utf-8"))
        return done
    if folder is None:
        RunFolder.require_place(output_dir, overwrite=overwrite)
    bank = MaskBank.from_pretrained(from_bank) if from_bank is not None else None
    tuning = folder.manifest.get("tuning") if folder is not None else None
    started = time.perf_counter()
    if recipe.tuning and folder is None:
        if bank is not None:  # what cannot go on from it is refused before hours of trials
            bank.hand_to(build_learner(recipe, output_dir, compute_metrics))
        recipe, tuning = tune(recipe, tasks, progress)
    elif folder is not None:
        recipe = _chosen(recipe, folder)
    spent = {"tuning": time.perf_counter() - started} if recipe.tuning else {}
    learner = build_learner(recipe, output_dir, compute_metrics)
    progress(f"{recipe.method} on {recipe.model.name}; each task has its own {', '.join(learner.base.head)}")
    if folder is None:
        header = {**_header(recipe, specs, learner, tuning), "split": split}
        folder = _begin(output_dir, header, learner, bank, overwrite=overwrite)
    else:
        _go_on(folder, learner, bank)
        for task in tasks[: len(folder.tasks)]:
            learner.remember(task)
    for task in tasks[len(folder.tasks) :]:
        record = learner.learn(task)
        learner.add_to(folder)
        progress(_line(len(folder.tasks), len(tasks), record))
    return _finish(folder, learner, tuning, spent, began)


def _begin(
    path: Path, header: Mapping[str, Any], learner: ContinualLearner, bank: MaskBank | None, *, overwrite: bool
) -> RunFolder:
    """Make the run folder; with a bank to go on from, its copy there."""
    if bank is not None:
        bank.hand_to(learner)
    source = {"from_bank": bank.digest if bank is not None else None, "from_tasks": len(learner.tasks)}
    folder = RunFolder.create(path, {**header, **source}, overwrite=overwrite)
    if bank is not None:
        learner.save_bank(folder.path / BANK)
    return folder


def _go_on(folder: RunFolder, learner: ContinualLearner, bank: MaskBank | None) -> None:
    """Take over what a run has finished; a bank whose copying was interrupted is copied now.

    Raises:
        RunError: It was learned on another base, went on from another bank, or needs its bank again.
    """
    _require_base(folder, learner)
    _require_bank(folder, bank)
    learner.restore(folder)
    if bank is not None and learner.bank is None:
        bank.hand_to(learner)
        learner.save_bank(folder.path / BANK)


def _finish(
    folder: RunFolder,
    learner: ContinualLearner,
    tuning: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    began: float,
) -> dict[str, Any]:
    if not all(record["name"] in learner.correct for record in learner.learned):
        learner.evaluate()  # resumed after its last task
    verdict = verify_in_fresh_process(folder.path)
    trained = sum(record["seconds"] for record in learner.learned)
    spent = {**seconds, "training": trained, "total": time.perf_counter() - began}
    spent = {name: round(value, 1) for name, value in spent.items()}
    spent["by_task"] = {record["name"]: record["seconds"] for record in learner.learned}
    manifest = folder.path / BANK / MANIFEST
    shared = manifest.stat().st_size if manifest.is_file() else 0
    found = results(folder.manifest, learner.matrix, learner.correct, verdict, spent, tuning, shared)
    _plot(folder, learner)
    write_atomic(folder.path / RESULTS, json_bytes(found))
    return found


def _plot(folder: RunFolder, learner: ContinualLearner) -> None:
    """Draw the matrix where matplotlib is installed; without it the figures are in `results.json` all the same."""
    from hf_cl.plots import accuracy_heatmap

    title = f"{folder.manifest['stream']}, {learner.method_name}"
    with contextlib.suppress(ConfigError):
        accuracy_heatmap(learner.matrix, folder.path / "accuracy.png", title)


def verify_in_fresh_process(path: Path) -> dict[str, Any]:
    """Return what `hf-cl verify --json` says of a run folder in a process that knows only its files.

    Raises:
        RunError: The process gave no verdict.
    """
    command = [sys.executable, "-m", "hf_cl", "verify", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    try:
        verdict: dict[str, Any] = json.loads(done.stdout)
        verdict["tasks"], verdict["exact"], verdict["same_logits"]
    except (ValueError, KeyError) as error:
        raise RunError(f"{path}: verifying in a fresh process failed: {done.stderr.strip()[-800:]}") from error
    return verdict


def _header(
    recipe: Checked, specs: Sequence[TaskSpec], learner: ContinualLearner, tuning: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        **learner.header(),
        "stream": stream_name(recipe.stream),
        "stream_tasks": [spec_values(spec) for spec in specs],
        "training": recipe.training,
        "tuning": tuning,
    }


def stream_name(stream: Any) -> str:
    """Return a stream's name, `custom` where the recipe lists its tasks."""
    if isinstance(stream, str):
        return stream
    return str(stream.get("name", "custom")) if isinstance(stream, Mapping) else "custom"


def _existing(path: Path, recipe: Checked, specs: Sequence[TaskSpec], split: str) -> RunFolder | None:
    """Return the run to go on with, None where there is none yet.

    Raises:
        RunError: It is another run than the recipe's.
    """
    if not path.exists():
        return None
    folder = RunFolder.open(path)
    theirs, tuned = folder.manifest, set(recipe.tuning)
    ours = {"model": lasting(recipe.model.name), "max_length": recipe.max_length}
    different = [name for name, value in ours.items() if theirs.get(name) != value]
    different += ["split"] if split != theirs.get("split", "test") else []
    if _what(theirs.get("stream_tasks") or []) != _what([spec_values(spec) for spec in specs]):
        different.append("stream")
    if theirs["method"]["name"] != recipe.method:
        different.append("method")
    else:
        ours = json.loads(json.dumps(asdict(recipe.options)))  # as a manifest has them: a tuple is a list there
        different += _unlike("method", theirs["method"]["options"], ours, tuned)
    different += _unlike("training", theirs.get("training") or {}, recipe.training, tuned)
    if different:
        raise RunError(
            f"{path}: is a run with another {', '.join(different)}. Resume it with the recipe it was started with, or "
            f"choose another --output-dir."
        )
    return folder


def _unlike(block: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], tuned: set[str]) -> list[str]:
    """Return the dotted keys that differ, but for those that tuning chose."""
    keys = sorted({*theirs, *ours})
    return [f"{block}.{key}" for key in keys if theirs.get(key) != ours.get(key) and f"{block}.{key}" not in tuned]


def _what(specs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what tasks are, wherever their files lie now."""
    return [{key: value for key, value in spec.items() if key not in ("dataset", "data_files")} for spec in specs]


def _chosen(recipe: Checked, folder: RunFolder) -> Checked:
    """Return the recipe with the options a resumed run was tuned to."""
    module = plugins.load("methods", recipe.method)
    options = read(module.Options, folder.manifest["method"]["options"], "run.method")
    return replace(recipe, options=options, training=folder.manifest["training"])


def _require_base(folder: RunFolder, learner: ContinualLearner) -> None:
    if learner.method.fingerprint != folder.manifest["fingerprint"]:
        raise RunError(f"{folder.path}: was learned on another {folder.manifest['model']}. Use the same revision.")


def _require_bank(folder: RunFolder, bank: MaskBank | None) -> None:
    """Refuse to resume with another bank than the run went on from, or without it where it was not copied yet."""
    digest = folder.manifest.get("from_bank")
    if bank is not None and bank.digest != digest:
        raise RunError(
            f"{folder.path}: went on from {'the bank ' + digest[:12] if digest else 'no bank'}, and {bank.digest[:12]} "
            f"was given. Resume it with the same --from-bank, or choose another --output-dir."
        )
    if bank is None and digest and not (folder.path / BANK / MANIFEST).exists():
        raise RunError(f"{folder.path}: stopped before it had copied the bank {digest[:12]}. Give --from-bank again.")


def _line(done: int, of: int, record: Mapping[str, Any]) -> str:
    own = record["metrics"][record["name"]]
    return f"[{done}/{of}] {record['name']}: accuracy {own['accuracy']:.4f}, {record['seconds']:.0f} s"
