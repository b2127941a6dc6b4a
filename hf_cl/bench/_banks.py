"""Banks of random masks, whose codes are as long as codes get: nothing in them can be guessed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_cl import MaskConfig
from hf_cl.bench._models import DENSITY, LABELS, TARGETS, plain, tokenizer
from hf_cl.layers.base import Base
from hf_cl.packing.grow import grow
from hf_cl.packing.shelf import BankShelf
from hf_cl.proof import probe_digest
from hf_cl.storage.bank_folder import FolderReader, Reader, write_bank
from hf_cl.storage.manifest import FileEntry
from hf_cl.training.masked import MaskedMethod, adapter_of


def make_bank(size: str, count: int, folder: Path) -> None:
    """Write a bank of `count` tasks; finished ones are left on disk, so memory stays flat while it grows."""
    base = Base(plain(size), tokenizer(), "random", ("classifier",))
    method = MaskedMethod(base, MaskConfig(density=DENSITY, scale=1.5, target_modules=TARGETS))
    records: list[dict[str, Any]] = []
    manifest = None
    for index in range(count):
        labels = [f"label {number}" for number in range(LABELS)]
        method.begin(index, tuple(labels))
        generator = torch.Generator().manual_seed(index)
        for layer in method.tuner.mask_layers():
            layer.hfcl_scores[adapter_of(index)].data.normal_(generator=generator)
        method.tuner.commit(adapter_of(index))
        method.activate(index)
        parts, probe = method.parts(index), probe_digest(method.model)
        records.append({
            "index": index, "name": f"task {index}", "labels": labels, "source": "memory:random", "facts": {},
            "parts": parts, "probe": probe, "metrics": {},
        })  # fmt: skip
        held = manifest.digest if manifest is not None else None
        manifest, files = grow(method, records, {"name": "supsup", "options": {}}, base, before=manifest)
        read = FolderReader(folder)
        write_bank(folder, manifest, _either(files, read), expected=held)
        method.keep_on(BankShelf(manifest, read))


def _either(new: Mapping[str, bytes], held: Reader) -> Reader:
    def read(entry: FileEntry) -> bytes:
        return new[entry.name] if entry.name in new else held(entry)

    return read
