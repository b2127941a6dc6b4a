"""A mask's code: its bytes against the entropy bound, and how fast it goes, one core, beside other coders.

Measured: one mask of a square layer of each model's width, entries kept independently of each other, from a seed.
Ours is the code that a bank stores masks with (it knows how long a row is) and, as `flat`, the one it stores owners
with.

Against: the bound, plain Golomb-Rice codes of the gaps, lzma and zstandard on packed bits, and constriction's ANS
coder of each entry at the mask's density; zstandard and constriction where they are installed. Each code is decoded
and compared before it counts. All coders take turns.

Floor: independent entries at density p need H(p) = -p log2 p - (1 - p) log2(1 - p) bits each, whoever codes them; the
bound is n H(p) / 8 bytes. (Coding their exact number apart would save less than 10 bits a mask, and is paid by
storing it.) Learned masks have structure, and go below this bound; docs/results.md has them. Decoding writes a byte
an entry at least, so its floor is a copy's rate: thousands of millions of entries a second. Each kept entry costs a
step of a coder besides, some nanoseconds, so p times that is the floor at larger densities.
"""

import importlib.util
import lzma
import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from hf_cl.bench._measure import against, quartiles, turns
from hf_cl.bench._models import SIZES
from hf_cl.bench._row import Mark, Row, Settings, Tell
from hf_cl.errors import HfClError
from hf_cl.masks.coding import decode, encode

DENSITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.385, 0.5)
MARKED = (0.005, 0.1)
"""The densities that the marks are for, the first and the last one."""
OURS, FLAT = "rows", "flat"
TURNS, BLOCK = 7, 0.03
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Coder(NamedTuple):
    """Bytes from a 2-D mask, and the mask from these bytes, its shape and its density."""

    encode: Callable[[Mask], bytes]
    decode: Callable[[bytes, tuple[int, int], float], Mask]


def run(settings: Settings, tell: Tell) -> Iterator[Row]:
    """Yield bytes and rates by width and density, each against each other coder."""
    known = coders()
    for size in settings.models():
        width = SIZES[size]["hidden_size"]
        for density in DENSITIES[3:4] if settings.quick else DENSITIES:
            tell(f"{width} x {width}, density {density:g}: {', '.join(known)}")
            mask = independent(width, density)
            under = {"model": size, "shape": [width, width], "density": density}
            codes = {name: coded(name, coder, mask) for name, coder in known.items()}
            yield from _bytes(under, codes, bound(mask))
            yield from _rates(under, known, codes, mask, settings)


def _bytes(under: dict[str, Any], codes: dict[str, bytes], least: float) -> Iterator[Row]:
    floor, size = f"{least:,.0f} bytes: independent entries at this density", len(codes[OURS])
    for name in (OURS, FLAT):
        mark = Mark(1.02) if name == OURS and _marked(under) else None
        own = len(codes[name])
        yield Row(
            "coding", "bytes", {**under, "coder": name}, own, "bytes", floor, "entropy bound", least, own / least,
            mark=mark,
        )  # fmt: skip
    for name, code in codes.items():
        if name != OURS:
            other = len(code)
            yield Row("coding", "bytes", {**under, "coder": OURS}, size, "bytes", floor, name, other, size / other)


def _rates(
    under: dict[str, Any], known: dict[str, Coder], codes: dict[str, bytes], mask: Mask, settings: Settings
) -> Iterator[Row]:
    shape, share = (mask.shape[0], mask.shape[1]), float(mask.mean())
    count, block = (2, 0.0) if settings.quick else (TURNS, BLOCK)
    encoding = turns({name: partial(coder.encode, mask) for name, coder in known.items()}, count, block=block)
    decoders = {name: partial(coder.decode, codes[name], shape, share) for name, coder in known.items()}
    decoding = turns(decoders, count, block=block)
    settled, unit = {**under, "coder": OURS}, "million entries/s"
    floor = "a byte written an entry, at a copy's rate"

    def rates(seconds: list[float]) -> list[float]:
        return [mask.size / second / 1e6 for second in seconds]

    own = rates(decoding[OURS])
    mark = Mark(100.0, ">=", "value") if _marked(under) else None
    yield Row("coding", "decode", settled, median(own), unit, floor, quartiles=quartiles(own), mark=mark)
    for what, taken, least in (("encode", encoding, "none derived"), ("decode", decoding, floor)):
        for name in known:
            if name != OURS:
                mine, theirs = rates(taken[OURS]), rates(taken[name])
                compared = against(mine, theirs)
                yield Row("coding", what, settled, median(mine), unit, least, name, median(theirs), **compared)


def _marked(under: dict[str, Any]) -> bool:
    return bool(MARKED[0] <= under["density"] <= MARKED[1])


def independent(width: int, density: float) -> Mask:
    """Return a square mask whose entries know nothing of each other, with exactly its density's share kept."""
    mask = np.zeros(width * width, np.bool_)
    mask[np.random.default_rng(0).choice(mask.size, round(density * mask.size), replace=False)] = True
    return mask.reshape(width, width)


def bound(mask: Mask) -> float:
    """Return the bytes that as many independent entries at the mask's density need."""
    share = float(mask.mean())
    if share in (0.0, 1.0):
        return 0.0
    return -mask.size * (share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 8


def coded(name: str, coder: Coder, mask: Mask) -> bytes:
    """Return a coder's bytes for a mask.

    Raises:
        HfClError: What it decodes is not what it coded.
    """
    code, shape, share = coder.encode(mask), (mask.shape[0], mask.shape[1]), float(mask.mean())
    if not np.array_equal(coder.decode(code, shape, share), mask):
        raise HfClError(f"coding: {name} decodes another mask than it coded, at density {share:g}.")
    return code


def coders() -> dict[str, Coder]:
    """Return the coders that this machine has, ours first."""
    found = {
        OURS: Coder(lambda m: encode(m, m.shape[1]), lambda d, s, _: decode(d, math.prod(s), s[1]).reshape(s)),
        FLAT: Coder(encode, lambda d, s, _: decode(d, math.prod(s)).reshape(s)),
        "golomb": Coder(_golomb_encode, _golomb_decode),
        "lzma": Coder(
            lambda m: lzma.compress(np.packbits(m).tobytes(), preset=6),
            lambda d, s, _: _unpacked(lzma.decompress(d), s),
        ),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        packer, reader = zstandard.ZstdCompressor(19), zstandard.ZstdDecompressor()
        found["zstandard"] = Coder(
            lambda m: packer.compress(np.packbits(m).tobytes()), lambda d, s, _: _unpacked(reader.decompress(d), s)
        )
    if importlib.util.find_spec("constriction"):
        found["constriction"] = _ans()
    return found


def _unpacked(bits: bytes, shape: tuple[int, int]) -> Mask:
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=math.prod(shape)).view(np.bool_).reshape(shape)


def _golomb_k(density: float) -> int:
    """Return the remainder's bits for gaps at this density (Kiely, 2004)."""
    return max(0, math.ceil(math.log2(math.log((5**0.5 - 1) / 2) / math.log1p(-density)))) if density < 0.38 else 0


def _golomb_encode(mask: Mask) -> bytes:
    """Return eight bytes of count, remainders and quotients."""
    places = np.flatnonzero(mask)
    gaps, k = np.diff(places, prepend=-1) - 1, _golomb_k(places.size / mask.size)
    low = (gaps[:, None] >> np.arange(k) & 1).astype(np.uint8)
    unary = np.zeros(int((gaps >> k).sum()) + gaps.size, np.uint8)
    unary[np.cumsum((gaps >> k) + 1) - 1] = 1
    return places.size.to_bytes(8, "little") + np.packbits(low).tobytes() + np.packbits(unary).tobytes()


def _golomb_decode(data: bytes, shape: tuple[int, int], density: float) -> Mask:
    count, k = int.from_bytes(data[:8], "little"), _golomb_k(density)
    middle = 8 + -(-count * k // 8)
    low = np.unpackbits(np.frombuffer(data[8:middle], np.uint8), count=count * k).reshape(count, k)
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(data[middle:], np.uint8)))
    gaps = (np.diff(ends, prepend=-1) - 1 << k) + (low.astype(np.int64) << np.arange(k)).sum(1)
    mask = np.zeros(math.prod(shape), np.bool_)
    mask[np.cumsum(gaps + 1) - 1] = True
    return mask.reshape(shape)


def _ans() -> Coder:
    """Return constriction's coder, each entry kept with the mask's density."""
    import constriction

    model, stack = constriction.stream.model, constriction.stream.stack

    def encode_ans(mask: Mask) -> bytes:
        coder = stack.AnsCoder()
        coder.encode_reverse(mask.reshape(-1).astype(np.int32), model.Bernoulli(float(mask.mean()), perfect=False))
        data: bytes = coder.get_compressed().tobytes()
        return data

    def decode_ans(data: bytes, shape: tuple[int, int], density: float) -> Mask:
        coder = stack.AnsCoder(np.frombuffer(data, np.uint32))
        found = coder.decode(model.Bernoulli(density, perfect=False), math.prod(shape))
        mask: Mask = found.astype(np.bool_).reshape(shape)
        return mask

    return Coder(encode_ans, decode_ans)
