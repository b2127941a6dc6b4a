"""Write a safetensors checkpoint as a stream: the headers first, then values in any order, each to its place.

The safetensors library writes a file from tensors that are all in memory. Here the sizes are known and the values are
not yet, so the header, which the format fixes (its length in 8 bytes, JSON padded to 8, then the data), is written by
hand, in the library's own order of tensors: the same tensors give the library's bytes.

A thread of its own writes while the next values are computed: filling the page cache takes as long as the arithmetic.

Source: the format as documented by safetensors.
"""

import json
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from torch import uint8 as byte

from hf_cl.checkpoints.reader import DTYPE_NAMES
from hf_cl.merging._check import Spec

AHEAD = 2
"""Runs of values that may wait to be written."""


def size(spec: Spec) -> int:
    """Return the bytes of a tensor's values."""
    return math.prod(spec.shape) * spec.dtype.itemsize


class ShardWriter:
    """New safetensors files that are being filled; use it as a context, which leaves them whole and on the disk."""

    def __init__(
        self, folder: Path, specs: Mapping[str, Spec], *, name: str = "model", most: int | str = "5GB"
    ) -> None:
        """Make the files and write their headers.

        Args:
            folder: Where; it holds no file of those names.
            specs: Every tensor, by its name.
            name: What the files' names begin with.
            most: Bytes of a shard, as a number or as in `5GB`; a larger tensor gets a shard of its own.
        """
        # The library wants the order of names to be that of the shards.
        split = split_state_dict_into_shards_factory(
            {name: specs[name] for name in sorted(specs)},
            get_storage_size=size,
            filename_pattern=f"{name}{{suffix}}.safetensors",
            max_shard_size=most,
        )
        self.folder, self.specs = folder, specs
        self.weight_map: dict[str, str] = split.tensor_to_filename
        self._files: dict[str, IO[bytes]] = {}
        self._place: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, "shard-writer")
        self._waiting: deque[Future[None]] = deque()
        try:
            for file, names in split.filename_to_tensors.items():
                self._begin(file, names)
        except BaseException:
            self._close()
            raise

    def _begin(self, file: str, names: list[str]) -> None:
        opened = self._files[file] = (self.folder / file).open("xb")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide numbers first, so that every tensor begins at a multiple of its numbers' width.
        for name in sorted(names, key=lambda name: (-self.specs[name].dtype.itemsize, name)):
            spec, start = self.specs[name], end
            end += size(spec)
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]
            }  # fmt: skip
            self._place[name] = start
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        opened.write(len(text).to_bytes(8, "little") + text)
        first = opened.tell()
        opened.truncate(first + end)
        for name in names:
            self._place[name] += first

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write values of a tensor, soon.

        Args:
            name: The tensor.
            start: Flat index of the first value.
            values: A run of values in storage order, of the tensor's dtype; nobody may change them after this.

        Raises:
            OSError: These or earlier values could not be written.
        """
        spec, file = self.specs[name], self._files[self.weight_map[name]]
        assert values.dtype == spec.dtype and start + values.numel() <= math.prod(spec.shape)
        place = self._place[name] + start * spec.dtype.itemsize
        self._waiting.append(self._thread.submit(self._put, file, place, values))
        if len(self._waiting) > AHEAD:
            self._waiting.popleft().result()

    @staticmethod
    def _put(file: IO[bytes], place: int, values: Tensor) -> None:
        if file.tell() != place:
            file.seek(place)
        if values.numel():
            file.write(values.contiguous().reshape(-1).view(byte).numpy().data)

    @property
    def files(self) -> list[str]:
        """Names of the files."""
        return list(self._files)

    def _close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            while error is None and self._waiting:
                self._waiting.popleft().result()
            for file in self._files.values() if error is None else ():
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._close()


def index(writers: Sequence[ShardWriter]) -> bytes:
    """Return the index of a checkpoint whose tensors several writers have written."""
    weight_map = {name: file for writer in writers for name, file in writer.weight_map.items()}
    total = sum(size(spec) for writer in writers for spec in writer.specs.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()
