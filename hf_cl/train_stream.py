"""The whole way as one function: tasks -> tokens -> masked model -> ownership -> run folder -> results."""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_cl import plugins, ranks
from hf_cl.bank import MaskBank
from hf_cl.config import read
from hf_cl.data import Task, TaskSpec, load_task, measured_on, read_stream, spec_values
from hf_cl.errors import ConfigError, RunError, StoppedError
from hf_cl.from_recipe import build_learner
from hf_cl.layers.base import lasting
from hf_cl.learner import ContinualLearner
from hf_cl.recipe import Checked, data_dir
from hf_cl.results import results
from hf_cl.runs import verify_in_fresh_process
from hf_cl.storage.bank_folder import read_manifest
from hf_cl.storage.disk import json_bytes, write_atomic
from hf_cl.storage.manifest import MANIFEST
from hf_cl.storage.run_folder import BANK, RESULTS, RunFolder
from hf_cl.storage.run_folder import MANIFEST as MANIFEST_OF_RUN
from hf_cl.training.evaluation import ComputeMetrics
from hf_cl.training.keeping import Keeping
from hf_cl.training.stop import StopRequest, listening
from hf_cl.tuning import Progress, tune

logger = logging.getLogger(__name__)
FREE = {f"training.{key}" for key in ("ddp_backend", "ddp_timeout", "save_steps", "save_strategy")}
"""What may change when a run goes on: it decides nothing that is learned."""
SEEN_WITHIN = 60
"""Seconds within which a network file system shows a new file to other machines."""


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
        resume: Go on with a run that is there, in the middle of a task where it was interrupted in one.
        overwrite: Replace a run that is there.
        from_bank: A bank's folder or Hub id to go on from; its tasks come along into the run's bank.
        split: Which rows are measured: `test`, or `validation` while options are still being chosen.
        compute_metrics: Your own metrics, recorded beside ours.
        progress: Told a line after each thing that takes long.

    Raises:
        HfClError: Bad input, before any training; or a task's training failed, with earlier tasks kept.
        StoppedError: SIGTERM or SIGUSR1 asked for it; all is saved, also of a task in its middle.
    """
    began = time.perf_counter()
    ranks.join(
        cpu=bool(recipe.training.get("use_cpu")), timeout=float(recipe.training.get("ddp_timeout") or ranks.TIMEOUT)
    )
    progress = progress if ranks.rank() == 0 else _silent
    specs = read_stream(recipe.stream, data_dir=data_dir(), root=recipe.root)
    tasks = [measured_on(load_task(spec, recipe.root), split) for spec in specs]
    folder, done = ranks.on_first(lambda: _place(output_dir, recipe, specs, split, resume, overwrite))
    if done is not None:
        progress(f"{output_dir} is finished: {len(specs)} tasks. Nothing to do.")
        return done
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
    _require_shared(folder)
    with listening() as request:
        _learn(folder, learner, tasks, request, progress)
    if not all(record["name"] in learner.correct for record in learner.learned):
        learner.evaluate()  # resumed after its last task
    return ranks.on_first(lambda: _finish(folder, learner, tuning, spent, began))


def _silent(line: str) -> None:
    """Say nothing: rank 0 says it."""


def _place(
    path: Path, recipe: Checked, specs: Sequence[TaskSpec], split: str, resume: bool, overwrite: bool
) -> tuple[RunFolder | None, dict[str, Any] | None]:
    """Return the run to go on with, if there is one, and its results, if it is finished."""
    folder = _existing(path, recipe, specs, split) if resume else None
    if folder is None:
        RunFolder.require_place(path, overwrite=overwrite)
    elif (path / RESULTS).is_file():
        return folder, json.loads((path / RESULTS).read_text("utf-8"))
    return folder, None


def _learn(
    folder: RunFolder, learner: ContinualLearner, tasks: Sequence[Task], request: StopRequest, progress: Progress
) -> None:
    """Learn the tasks that the run has not finished.

    Raises:
        StoppedError: A signal asked for it; what was learned is saved.
    """
    keeping = Keeping(folder.states, request, tell=progress)
    for task in tasks[len(folder.tasks) :]:
        if ranks.any_rank([request.signal is not None], learner.args.device)[0]:
            raise StoppedError(f"stopped before task {task.name!r}. Go on with the same command and --resume.")
        record = learner.learn(task, keeping)
        learner.add_to(folder)
        ranks.on_first(folder.states.clear)
        progress(_line(len(folder.tasks), len(tasks), record))


def _require_shared(folder: RunFolder) -> None:
    """Refuse a run folder that not all ranks see: they read finished tasks there.

    Raises:
        RankError: A rank sees another folder than rank 0.
    """
    file, waited = folder.path / MANIFEST_OF_RUN, 0
    while ranks.rank() > 0 and not file.is_file() and waited < SEEN_WITHIN:
        time.sleep(1)
        waited += 1
    held = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "missing"
    ranks.require_equal({f"{file}, which must lie where all machines see it": held}, "before training")


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
    """Verify the run in a process of its own, and write what was found."""
    verdict = verify_in_fresh_process(folder.path)
    trained = sum(record["seconds"] for record in learner.learned)
    spent = {**seconds, "training": trained, "total": time.perf_counter() - began}
    spent = {name: round(value, 1) for name, value in spent.items()}
    spent["by_task"] = {record["name"]: record["seconds"] for record in learner.learned}
    found = results(folder.manifest, learner.matrix, learner.correct, verdict, spent, tuning, _shared(folder))
    _plot(folder, learner)
    write_atomic(folder.path / RESULTS, json_bytes(found))
    return found


def _shared(folder: RunFolder) -> int:
    """Return the bytes of a run's bank that are no task's own: its manifest, and what routers know."""
    manifest = folder.path / BANK / MANIFEST
    if not manifest.is_file():
        return 0
    held = read_manifest(folder.path / BANK).shared
    routing = sum(task["bytes"].get("routing", 0) for task in folder.tasks)
    return manifest.stat().st_size + (held.bytes if held is not None else 0) + routing


def _plot(folder: RunFolder, learner: ContinualLearner) -> None:
    """Draw the matrix where matplotlib is installed; without it the figures are in `results.json` all the same."""
    from hf_cl.plots import accuracy_heatmap

    title = f"{folder.manifest['stream']}, {learner.method_name}"
    with contextlib.suppress(ConfigError):
        accuracy_heatmap(learner.matrix, folder.path / "accuracy.png", title)


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
    if RunFolder.is_free(path):
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
    different += _unlike("training", theirs.get("training") or {}, recipe.training, {*tuned, *FREE})
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
    free = {key: value for key, value in recipe.training.items() if f"training.{key}" in FREE}
    return replace(recipe, options=options, training={**folder.manifest["training"], **free})


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
