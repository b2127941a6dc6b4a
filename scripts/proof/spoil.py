"""What verifying must find: one bit of the first task's mask in a bank's folder, changed in two ways."""

import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load

from hf_cl.masks.coding import decode, encode
from hf_cl.storage.bank_folder import FolderReader, read_manifest, task_blob, write_bank
from hf_cl.training.masked import join_codes


def flip_in_file(folder: Path) -> None:
    """Change one bit of the coded masks in the first task's file, as a bad disk would."""
    file = folder / read_manifest(folder).tasks[0].file.name
    data = bytearray(file.read_bytes())
    begins = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:begins])["masks"]["data_offsets"]
    data[begins + (begin + end) // 2] ^= 1
    file.write_bytes(data)


def flip_in_mask(folder: Path) -> None:
    """Take one entry out of the first task's mask and make all checksums of files fit, as on purpose."""
    manifest, read = read_manifest(folder), FolderReader(folder)
    task, path = manifest.tasks[0], manifest.store.layers[0]
    tensors, (height, width) = load(read(task.file)), manifest.store.shapes[path]
    codes, lengths = tensors["masks"].numpy().tobytes(), tensors["mask_lengths"].tolist()
    mask = decode(codes[: lengths[0]], height * width, width).copy()
    mask[mask.nonzero()[0][0]] = False
    first = encode(mask, width)
    tensors["masks"], _ = join_codes([first, codes[lengths[0] :]])
    tensors["mask_lengths"][0] = len(first)
    stem = task.file.name.rpartition("-")[0]
    file, data = task_blob(stem, tensors)
    forged = replace(manifest, tasks=[replace(task, file=file), *manifest.tasks[1:]])
    write_bank(folder, forged, lambda entry: data if entry == file else read(entry), expected=manifest.digest)


WAYS = {"a bit of the file": flip_in_file, "a bit of the mask, checksums made to fit": flip_in_mask}
