"""What a mask's code weighs and how fast it goes, beside other coders of the same masks, one core.

Bytes are shares of the Shannon bound of independent entries at the mask's density; speeds are millions of entries a
second, the best of several runs. One JSON line a mask and coder. `rows` is ours where the caller says how long a row
is, `flat` is ours without; `golomb` is a plain Golomb-Rice code of the gaps; `ans` is constriction's coder of each
entry at the mask's density. zstandard and constriction are left out where they are not installed. With the folder of
a run (or any number of them), the learned masks of its bank are measured too, a line a task.
run: python scripts/bench_coding.py [RUN ...]
"""

import importlib.util
import json
import lzma
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_cl.masks.coding import decode, encode

SHAPES = [(384, 384), (768, 768)]
DENSITIES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.385, 0.5]


class Coder(NamedTuple):
    """Bytes from a 2-D mask, and the mask from these bytes and its shape."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, tuple[int, int], float], np.ndarray]


def unpacked(bits: bytes, shape: tuple[int, int]) -> np.ndarray:
    """Return the mask of packed bits."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=math.prod(shape)).view(np.bool_).reshape(shape)


def golomb_k(density: float) -> int:
    """Return the remainder's bits for gaps at this density (Kiely, 2004)."""
    return max(0, math.ceil(math.log2(math.log((5**0.5 - 1) / 2) / math.log1p(-density)))) if density < 0.38 else 0


def golomb_encode(mask: np.ndarray) -> bytes:
    """Return eight bytes of count, remainders and quotients."""
    places = np.flatnonzero(mask)
    gaps, k = np.diff(places, prepend=-1) - 1, golomb_k(places.size / mask.size)
    low = (gaps[:, None] >> np.arange(k) & 1).astype(np.uint8)
    unary = np.zeros(int((gaps >> k).sum()) + gaps.size, np.uint8)
    unary[np.cumsum((gaps >> k) + 1) - 1] = 1
    return places.size.to_bytes(8, "little") + np.packbits(low).tobytes() + np.packbits(unary).tobytes()


def golomb_decode(data: bytes, shape: tuple[int, int], density: float) -> np.ndarray:
    """Return the mask."""
    count, k = int.from_bytes(data[:8], "little"), golomb_k(density)
    middle = 8 + -(-count * k // 8)
    low = np.unpackbits(np.frombuffer(data[8:middle], np.uint8), count=count * k).reshape(count, k)
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(data[middle:], np.uint8)))
    gaps = (np.diff(ends, prepend=-1) - 1 << k) + (low.astype(np.int64) << np.arange(k)).sum(1)
    mask = np.zeros(math.prod(shape), np.bool_)
    mask[np.cumsum(gaps + 1) - 1] = True
    return mask.reshape(shape)


def coders() -> dict[str, Coder]:
    """Return the coders that this machine has."""
    found = {
        "rows": Coder(lambda m: encode(m, m.shape[1]), lambda d, s, _: decode(d, math.prod(s), s[1]).reshape(s)),
        "flat": Coder(encode, lambda d, s, _: decode(d, math.prod(s)).reshape(s)),
        "golomb": Coder(golomb_encode, golomb_decode),
        "lzma": Coder(
            lambda m: lzma.compress(np.packbits(m).tobytes(), preset=6), lambda d, s, _: unpacked(lzma.decompress(d), s)
        ),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        packer, reader = zstandard.ZstdCompressor(19), zstandard.ZstdDecompressor()
        found["zstd"] = Coder(
            lambda m: packer.compress(np.packbits(m).tobytes()), lambda d, s, _: unpacked(reader.decompress(d), s)
        )
    if importlib.util.find_spec("constriction"):
        found["ans"] = ans()
    return found


def ans() -> Coder:
    """Return constriction's coder, each entry kept with the mask's density."""
    import constriction

    model, stack = constriction.stream.model, constriction.stream.stack

    def encode_ans(mask: np.ndarray) -> bytes:
        coder = stack.AnsCoder()
        coder.encode_reverse(mask.reshape(-1).astype(np.int32), model.Bernoulli(float(mask.mean()), perfect=False))
        return coder.get_compressed().tobytes()

    def decode_ans(data: bytes, shape: tuple[int, int], density: float) -> np.ndarray:
        coder = stack.AnsCoder(np.frombuffer(data, np.uint32))
        return coder.decode(model.Bernoulli(density, perfect=False), math.prod(shape)).astype(np.bool_).reshape(shape)

    return Coder(encode_ans, decode_ans)


def bound(mask: np.ndarray) -> float:
    """Return the bytes that as many independent entries at the mask's density need."""
    share = mask.mean()
    return -mask.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8


def seconds(call: Callable[[], Any], budget: float = 0.25) -> float:
    """Return the shortest of the runs that fit the budget, three at least."""
    best, begin, runs = math.inf, time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - begin < budget:
        start = time.perf_counter()
        call()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def measure(masks: list[np.ndarray], coder: Coder) -> dict[str, Any]:
    """Return bytes, their share of the bound, and both speeds, for masks taken together."""
    entries, codes = sum(mask.size for mask in masks), [coder.encode(mask) for mask in masks]
    parts = [(code, mask.shape, float(mask.mean())) for code, mask in zip(codes, masks, strict=True)]
    assert all(np.array_equal(coder.decode(*part), mask) for part, mask in zip(parts, masks, strict=True))
    coding = seconds(lambda: [coder.encode(mask) for mask in masks])
    reading = seconds(lambda: [coder.decode(*part) for part in parts])
    size = sum(len(code) for code in codes)
    return {
        "bytes": size,
        "of_bound": round(size / sum(bound(mask) for mask in masks), 4),
        "encode_M_s": round(entries / coding / 1e6, 1),
        "decode_M_s": round(entries / reading / 1e6, 1),
    }


def learned(run: str) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield each task's masks out of a run's bank."""
    from hf_cl import MaskBank
    from hf_cl.packing.shelf import open_entry
    from hf_cl.storage.bank_folder import FolderReader

    folder = Path(run) / "bank"
    manifest = MaskBank.from_pretrained(folder).manifest
    for task in manifest.tasks:
        parts = open_entry(task, FolderReader(folder)).parts(manifest.store)
        yield f"{Path(run).name} {task.index}", [part.mask.numpy() for part in parts]


def independent() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield masks of each shape and density, entries drawn without regard to each other."""
    for rows, length in SHAPES:
        for density in DENSITIES:
            mask = np.zeros(rows * length, np.bool_)
            mask[np.random.default_rng(0).choice(mask.size, round(density * mask.size), replace=False)] = True
            yield f"{rows}x{length} {density}", [mask.reshape(rows, length)]


if __name__ == "__main__":
    known = coders()
    for source in (independent(), *map(learned, sys.argv[1:])):
        for name, found in source:
            for title, coder in known.items():
                print(json.dumps({"mask": name, "coder": title} | measure(found, coder)), flush=True)
