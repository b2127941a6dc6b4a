"""Read a safetensors checkpoint by slices: names, shapes and dtypes at once, values when they are asked for.

Files are mapped by the safetensors library, so a slice costs no memory of the process until it is computed with. Shards
are the files that lie in the folder; a name that an index gives is looked up among them and never made a path of.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_cl.errors import MergeError, shown
from hf_cl.merging._check import Spec

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = re.compile(r".*\.distcp|.*(^|[_.-])(mp_|dp_|tp_|pp_)?ranks?[_.-]?\d+.*|pytorch_model_fsdp.*|global_step\d+")
"""Names that FSDP, DeepSpeed and Megatron give to what one process holds of a model."""
Box = tuple[slice, ...]


class Checkpoint:
    """An open checkpoint; close it, or use it as a context.

    Attributes:
        label: What to call it in an error.
        folder: Where it lies.
        config: Its `config.json` (or `adapter_config.json`); empty where there is none.
        specs: Shape and dtype of every tensor, by its name in the files.
    """

    def __init__(self, label: str, folder: Path, files: Sequence[Path], config: Mapping[str, Any]) -> None:
        """Open the files; use `open_checkpoint`."""
        self.label, self.folder, self.config = label, folder, config
        self.specs: dict[str, Spec] = {}
        self._stack = contextlib.ExitStack()
        self._home: dict[str, Any] = {}
        try:
            for file in files:
                self._add(file)
        except BaseException:
            self.close()
            raise

    def _add(self, file: Path) -> None:
        try:
            opened = self._stack.enter_context(safe_open(file, "pt"))
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                if name in self.specs:
                    raise MergeError(f"{file}: {shown(name)} is in another shard too. Save the checkpoint again.")
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise MergeError(
                        f"{file}: {shown(name)} is of type {part.get_dtype()}, a quantised one. Merge the model as it "
                        f"was before that, in float32, bfloat16 or float16."
                    )
                self.specs[name], self._home[name] = Spec(tuple(part.get_shape()), dtype), opened
        except SafetensorError as error:
            raise MergeError(f"{file}: is no whole safetensors file ({error}). Fetch or save it again.") from error

    def read(self, name: str, box: Box = ()) -> Tensor:
        """Return the part of a tensor that a box holds; without one, all of it. It must not be written to."""
        opened = self._home[name]
        return opened.get_slice(name)[box] if box else opened.get_tensor(name)

    def close(self) -> None:
        """Let the files go."""
        self._stack.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoint(label: str, folder: Path, *, weights: str = WEIGHTS, config: str = CONFIG) -> Checkpoint:
    """Open the safetensors checkpoint in a folder.

    Args:
        label: What to call it in an error.
        folder: Where it lies.
        weights: Name of its file, where it is one; with `.index.json` behind, of its index.
        config: Name of its configuration.

    Raises:
        MergeError: There is none that can be read: pickle, quantised, sharded by rank, incomplete or damaged.
    """
    names = {file.name: file for file in folder.iterdir()}
    index = names.get(f"{weights}.index.json")
    if weights in names:
        files, listed = [names[weights]], None
    elif index is not None:
        listed = _listed(index)
        files = [_shard(index, names, shard) for shard in sorted(set(listed.values()))]
    else:
        raise _nothing(label, names)
    settings = _json(names[config]) if config in names else {}
    if settings.get("quantization_config"):
        raise MergeError(
            f"{label}: is quantised, as its {config} says. Merge the model as it was before that, in float32, bfloat16 "
            f"or float16."
        )
    opened = Checkpoint(label, folder, files, settings)
    if listed is not None and (different := sorted(set(listed) ^ set(opened.specs))):
        opened.close()
        raise MergeError(
            f"{index}: {shown(different[0])} is in only one of the index and the shards. Fetch or save the checkpoint "
            f"again."
        )
    return opened


def open_file(label: str, file: Path) -> Checkpoint:
    """Open a single safetensors file, as of a task's Fisher information.

    Raises:
        MergeError: It is none.
    """
    if not file.is_file():
        raise MergeError(f"{label}: {file} is no file. Give a safetensors file.")
    return Checkpoint(label, file.parent, [file], {})


def _listed(index: Path) -> dict[str, str]:
    listed = _json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise MergeError(f"{index}: has no `weight_map` of names. Fetch or save the checkpoint again.")
    return listed


def _shard(index: Path, names: Mapping[str, Path], shard: str) -> Path:
    if shard not in names or not shard.endswith(".safetensors"):
        raise MergeError(
            f"{index}: names the shard {shown(shard)}, which is not in its folder. Fetch the checkpoint again."
        )
    return names[shard]


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise MergeError(f"{file}: is no JSON ({error}). Fetch or save the checkpoint again.") from error
    if not isinstance(found, dict):
        raise MergeError(f"{file}: is no mapping. Fetch or save the checkpoint again.")
    return found


def _nothing(label: str, names: Mapping[str, Path]) -> MergeError:
    if ranks := sorted(name for name in names if _RANKS.fullmatch(name)):
        return MergeError(
            f"{label}: is sharded by rank ({shown(ranks[0])}). Gather it first, with `accelerate merge-weights` "
            f"(FSDP) or `zero_to_fp32.py` (DeepSpeed)."
        )
    if pickles := sorted(name for name in names if name.endswith((".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"))):
        return MergeError(
            f"{label}: has only {shown(pickles[0])}, a pickle, which runs code when it is read. Where you trust it, "
            f"load it and save it by `save_pretrained`, which writes safetensors."
        )
    return MergeError(f"{label}: has no {WEIGHTS} and no {INDEX}. Give a folder that `save_pretrained` wrote.")


def boxes(shape: Sequence[int], entries: int) -> Iterator[tuple[int, Box]]:
    """Yield boxes that cut a tensor into runs of at most `entries`, in storage order, each with its first flat index.

    A tensor without axes is one box without slices.
    """
    axis, inner = len(shape), 1
    while axis and inner * shape[axis - 1] <= entries:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield 0, tuple(slice(0, size) for size in shape)
        return
    rest = tuple(slice(0, size) for size in shape[axis:])
    step, start = max(1, entries // max(1, inner)), 0
    for lead in itertools.product(*(range(size) for size in shape[: axis - 1])):
        before = tuple(slice(place, place + 1) for place in lead)
        for first in range(0, shape[axis - 1], step):
            last = min(first + step, shape[axis - 1])
            yield start, (*before, slice(first, last), *rest)
            start += (last - first) * inner
