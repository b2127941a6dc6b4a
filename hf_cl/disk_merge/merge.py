"""Merge checkpoints that may be larger than memory: slices in, slices out, all or nothing on disk.

What is merged is the encoder; heads are the base's, or each task's own, or merged like all else if they are of one
task. The result is, bit for bit, what the rule's function gives on the same tensors in memory.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from hf_cl import plugins
from hf_cl.checkpoints.reader import INDEX, Checkpoint, open_checkpoint, open_file
from hf_cl.checkpoints.writer import ShardWriter, index, size
from hf_cl.config import did_you_mean, read
from hf_cl.disk_merge.adapters import merge_adapters
from hf_cl.disk_merge.card import record, write_card
from hf_cl.disk_merge.carry import copy_tokenizer, require_one_tokenizer, write_config
from hf_cl.disk_merge.fetch import fetch
from hf_cl.disk_merge.match import (
    Opened,
    opened_as,
    prefix_of,
    require_heads,
    require_one_base,
    require_one_kind,
    require_one_labelling,
)
from hf_cl.disk_merge.place import require_apart, require_place
from hf_cl.disk_merge.sources import OnDisk, copied, fisher_names
from hf_cl.errors import ConfigError, MergeError
from hf_cl.merging._check import Spec
from hf_cl.merging._rule import Rule, SurveyRule, require_fits, run
from hf_cl.merging.dare import Drop
from hf_cl.merging.dare import Options as DareOptions
from hf_cl.storage.disk import require_room
from hf_cl.storage.new_folder import new_folder

HEADS = ("base", "each", "merge")
ADAPTERS = "lora_arithmetic"
"""The one rule that merges adapters, not checkpoints."""


def merge_checkpoints(
    rule: str,
    base: str | Path | None,
    models: Sequence[str | Path],
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    fishers: Sequence[str | Path] = (),
    dare: Mapping[str, Any] | None = None,
    heads: str = "base",
    head_modules: Sequence[str] = (),
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Merge checkpoints on disk into a new folder.

    Args:
        rule: Name of a rule: `average`, `dare`, `fisher`, `lora_arithmetic`, `sfa`, `task_arithmetic`, `ties`,
            `wise_ft`. For `sfa` the base is the anchor; `lora_arithmetic` takes adapter folders and needs no base.
        base: What the models were trained from, a folder or a Hub id. It gives dtypes, integers and names.
        models: The models, folders or Hub ids, safetensors.
        out: The folder to write.
        options: Options of the rule by name, as its file's `Options` lists them.
        fishers: For `fisher`: a safetensors file a model.
        dare: Options of `dare` (`density`, `seed`), to make each model sparse before the rule; model number i, from
            0, gets seed + i.
        heads: `base` writes the base's head, `each` one whole checkpoint a model, with its own head, in
            `task-0`, `task-1`, ...; their encoder's files are hard links to one. `merge` merges heads too.
        head_modules: Further layers that are each task's own, as in `bert.pooler`.
        max_shard_size: Bytes of a shard, as in `5GB`.
        overwrite: Replace an earlier merge at `out`; anything else there is refused still.
        progress: Show a bar on stderr.

    Returns:
        `out`.

    Raises:
        ConfigError: There is no such rule, or an option is unknown or out of range.
        MergeError: The sources do not fit or cannot be read, `out` is taken or its disk too full. Nothing is written.
        OSError: The disk is full or refuses; nothing is left.

    Peak memory, above that of the imports, is some tens of MB at most, whatever the size of the checkpoints.
    """
    place = Path(out)
    module = rule_module(rule)
    chosen = read(module.Options, dict(options or {}), rule)
    if heads not in HEADS:
        raise ConfigError(f"heads: {heads!r} is not one of {', '.join(HEADS)}.{did_you_mean(heads, HEADS)}")
    require_place(place, overwrite=overwrite)
    if rule == ADAPTERS:
        if fishers or dare is not None or heads == "merge" or head_modules:
            raise ConfigError(f"{rule}: takes no Fishers, no `dare`, no `head_modules`, and heads `base` or `each`.")
        return merge_adapters(base, models, place, options=chosen, heads=heads)
    if base is None:
        raise ConfigError(f"{rule}: needs a base. Give the folder or the Hub id of what the models were trained from.")
    made, drops = module.build(chosen, len(models)), _drops(rule, dare, len(models))
    _require_fishers(rule, fishers, len(models))
    sources = [fetch(where) for where in (base, *models)]
    require_apart(place, sources)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(source.name, source.folder)) for source in sources]
        first, *others = matched(opened, heads, head_modules)
        information = [_fisher(stack, Path(file), first) for file in fishers]
        bar = stack.enter_context(tqdm(unit="entry", unit_scale=True, desc=rule, disable=not progress))
        merged = OnDisk(first, others, information, drops, takes_base=made.takes_base, tell=bar.update)
        bar.total = _passes(made) * sum(merged.counts().values())
        stack.enter_context(_one_thread())
        require_room(place, _bytes(heads, first, others), MergeError)
        found = record(rule, {**_plain(chosen), **_dare(dare)}, sources[0], sources[1:], heads)
        with new_folder(place) as scratch:
            if heads == "each":
                _write_each(scratch, made, merged, max_shard_size, found)
            else:
                _write_one(scratch, made, merged, max_shard_size, found)
    return place


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: slices fit a cache, and threads that meet at each operation wait more than work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def disk_rules() -> tuple[str, ...]:
    """Return the names of the rules that merge files."""
    return tuple(name for name in plugins.available("merging") if _merges_files(plugins.load("merging", name)))


def rule_module(rule: str) -> ModuleType:
    """Return the file of a rule that merges files.

    Raises:
        ConfigError: There is no such rule, or it takes what no file can give.
    """
    module = plugins.load("merging", rule)
    if not _merges_files(module):
        raise ConfigError(
            f"{rule}: takes a function of yours, so it is for Python only: hf_cl.merging.{rule}. "
            f"Known: {', '.join(disk_rules())}."
        )
    return module


def _merges_files(module: ModuleType) -> bool:
    return "Options" in vars(module)


def matched(opened: Sequence[Checkpoint], heads: str, head_modules: Sequence[str]) -> list[Opened]:
    """Return the base and the models with their tensors' names told apart, after every check that reads no values.

    Raises:
        MergeError: They are not of one base, or their heads are not what `heads` asks for.
    """
    require_one_kind(opened)
    prefix = prefix_of(opened[0].config)
    merged = heads == "merge"
    base = opened_as(opened[0], prefix, head_modules, merge_heads=merged)
    found = [base, *(opened_as(one, prefix, head_modules, merge_heads=merged, base=base) for one in opened[1:])]
    if merged:
        require_one_labelling(opened[1:])
    require_one_base(found[0], found[1:])
    require_one_tokenizer(opened)
    if heads == "each":
        require_heads(found[1:])
    if not any(found[0].checkpoint.specs[name].merges for name in found[0].names.shared.values()):
        raise MergeError(f"{opened[0].label}: has no weights to merge. Give the checkpoint of an encoder.")
    return found


def _fisher(stack: contextlib.ExitStack, file: Path, base: Opened) -> Opened:
    opened = stack.enter_context(open_file(str(file), file))
    return Opened(opened, fisher_names(opened, base), base.prefix)


def _drops(rule: str, dare: Mapping[str, Any] | None, models: int) -> list[Drop]:
    if dare is None:
        return []
    if rule == "dare":
        raise ConfigError("dare: `dare` before the rule `dare` would drop twice. Leave one of them out.")
    chosen = read(DareOptions, dict(dare), "dare")
    return [Drop(chosen.density, chosen.seed + number) for number in range(models)]


def _require_fishers(rule: str, fishers: Sequence[str | Path], models: int) -> None:
    wanted = models if rule == "fisher" else 0
    if len(fishers) != wanted:
        what = "one Fisher file a model, in their order" if wanted else "no Fisher files"
        raise ConfigError(f"{rule}: {len(fishers)} Fisher files for {models} models. Give {what}.")


def _plain(options: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}


def _dare(dare: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if dare is None else {"dare": vars(read(DareOptions, dict(dare), "dare"))}


def _passes(rule: Rule) -> int:
    return 1 + (rule.surveys if isinstance(rule, SurveyRule) else 0)


def _bytes(heads: str, base: Opened, models: Sequence[Opened]) -> int:
    """Return the bytes of all tensors that will be written."""

    def of(opened: Opened, names: Iterable[str]) -> int:
        return sum(size(opened.checkpoint.specs[name]) for name in names)

    kept = models if heads == "each" else [base]
    return of(base, base.names.shared.values()) + sum(of(opened, opened.names.head) for opened in kept)


# --- writing ------------------------------------------------------------------------------------------


def _write_one(folder: Path, rule: Rule, sources: OnDisk, most: int | str, found: Mapping[str, Any]) -> None:
    """Write a checkpoint that is the base's but for what was merged."""
    base = sources.base
    with _shards(folder, base.checkpoint.specs, "model", most) as writer:
        _pour(writer, rule, sources, base.names.shared)
        for name, start, values in copied(base.checkpoint, base.names.head):
            writer.write(name, start, values)
    if len(writer.files) > 1:
        (folder / INDEX).write_bytes(index((writer,)))
    _dress(folder, base.checkpoint.config, sources)
    write_card(folder, found, library="transformers")


def _write_each(folder: Path, rule: Rule, sources: OnDisk, most: int | str, found: Mapping[str, Any]) -> None:
    """Write a checkpoint a model: the merged encoder, on the disk once, and the model's own head."""
    folders = [f"task-{number}" for number in range(len(sources.models))]
    first = folder / folders[0]
    first.mkdir()
    called = sources.models[0].names.shared
    names = {name: called.get(name, name) for name in sources.specs}
    with _shards(first, {names[name]: spec for name, spec in sources.specs.items()}, "encoder", most) as encoder:
        _pour(encoder, rule, sources, names)
    for place, model in zip(folders, sources.models, strict=True):
        task = folder / place
        task.mkdir(exist_ok=True)
        for file in encoder.files if task != first else ():
            _link(first / file, task / file)
        specs = {name: model.checkpoint.specs[name] for name in model.names.head}
        with _shards(task, specs, "head", most) as head:
            for name, start, values in copied(model.checkpoint, model.names.head):
                head.write(name, start, values)
        (task / INDEX).write_bytes(index((encoder, head)))
        _dress(task, model.checkpoint.config, sources)
        write_card(task, found, library="transformers", folders=folders)
    write_card(folder, found, library="transformers", folders=folders)


def _shards(folder: Path, specs: Mapping[str, Spec], name: str, most: int | str) -> ShardWriter:
    try:
        return ShardWriter(folder, specs, name=name, most=most)
    except ValueError as error:
        raise ConfigError(f"max_shard_size: {error}") from error


def _pour(writer: ShardWriter, rule: Rule, sources: OnDisk, names: Mapping[str, str]) -> None:
    for piece, merged in run(rule, sources):
        values = merged.to(sources.specs[piece.name].dtype)
        require_fits(piece.name, values)
        writer.write(names[piece.name], piece.start, values)
    for name, start, values in sources.integers():
        writer.write(names[name], start, values)


def _link(file: Path, other: Path) -> None:
    """Give a file a second name; a copy where the file system has no links."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def _dress(folder: Path, config: Mapping[str, Any], sources: OnDisk) -> None:
    """Write the configuration and the tokenizer beside the weights."""
    dtype = next(spec.dtype for spec in sources.specs.values() if spec.merges)
    write_config(folder, config, dtype)
    copy_tokenizer(folder, [opened.checkpoint.folder for opened in (sources.base, *sources.models)])
