"""A mask as few bytes: the gaps between its rare entries, each in a Golomb-Rice code.

One head byte (mode * 64 + k), then

    BITMAP  the entries as bits
    ONES    the gaps before each kept entry
    ZEROS   the gaps before each entry left out (masks denser than one half)

A gap g is a quotient g >> k and a remainder of k bits. The two stand in streams of their own, so that
both directions are array operations: a varint of how many gaps, the remainders at fixed width, the
quotients in unary (q zeros, then a one). Bits run from the high end of a byte; each stream is filled
up to a byte with zeros. What follows the last gap needs no code: the size is known to the reader.

Invariant: one mask, one encoding, never longer than the bitmap. `decode` refuses every other, so equal
bytes mean equal masks, and what it allocates is bounded by `size`, whatever the data claim.

Source: Golomb, "Run-length encodings", 1966; Rice and Plaunt, 1971.
"""

from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from hf_cl.errors import ConfigError, RunError

Bits = NDArray[np.bool_]
Ints = NDArray[np.int64]

BITMAP, ONES, ZEROS = 0, 1, 2


def encode(mask: Bits) -> bytes:
    """Return the mask's one encoding: within 5 % of the Shannon bound for independent entries.

    Args:
        mask: Booleans of any shape, read in C order. The shape is not stored.

    Raises:
        ConfigError: The mask is not boolean.
    """
    if mask.dtype != np.bool_:
        raise ConfigError(f"A mask must be boolean, found {mask.dtype}. Pass `mask != 0` to mean that.")
    flat = mask.reshape(-1)
    mode, gaps = _rare(flat)
    k, quotients = _parameter(gaps)
    if _bitmap_length(flat.size) < _gaps_length(gaps.size, k, quotients):
        return bytes([BITMAP]) + np.packbits(flat).tobytes()
    return bytes([mode << 6 | k]) + _varint(gaps.size) + _pack_remainders(gaps, k) + _pack_unary(gaps >> k)


def decode(data: bytes, size: int) -> Bits:
    """Return the mask, 1-D with `size` entries, whose encoding is `data`.

    Raises:
        RunError: `data` is not the encoding of a mask of this size: cut short, too long, or altered.
    """
    if size < 0 or not 0 < len(data) <= _bitmap_length(size):
        _refuse(f"{len(data)} bytes for {size} entries")
    mode, k = data[0] >> 6, data[0] & 63
    if mode == BITMAP:
        return _decode_bitmap(data, k, size)
    if mode > ZEROS:
        _refuse(f"mode {mode} is none of 0, 1, 2")
    count, start = _read_varint(data)
    if 2 * count > size or (mode == ZEROS and 2 * count == size):
        _refuse(f"{count} rare entries of {size} in mode {mode}: more than half")
    if k > size.bit_length():
        _refuse(f"remainders of {k} bits for {size} entries")
    middle = start + _whole_bytes(count * k)
    if middle > len(data):
        _refuse(f"{len(data)} bytes where {count} remainders of {k} bits end at byte {middle}")
    quotients = _unpack_unary(data[middle:], count)
    if int(quotients.sum()) << k >= max(size, 1):
        _refuse(f"the gaps reach beyond {size} entries")
    gaps = (quotients << k) + _unpack_remainders(data[start:middle], count, k)
    return _from_gaps(gaps, mode, k, size)


def _rare(flat: Bits) -> tuple[int, Ints]:
    """The mode of the rarer value, and the gap before each of its entries."""
    mode = ONES if 2 * np.count_nonzero(flat) <= flat.size else ZEROS
    positions = np.flatnonzero(flat if mode == ONES else ~flat).astype(np.int64, copy=False)
    return mode, np.diff(positions, prepend=-1) - 1


def _from_gaps(gaps: Ints, mode: int, k: int, size: int) -> Bits:
    positions = np.cumsum(gaps + 1) - 1
    # A sum beyond int64 shows as a negative position first: no single gap is near that range.
    if gaps.size and (positions.min() < 0 or positions.max() >= size):
        _refuse(f"an entry lies beyond the last of {size}")
    best, quotients = _parameter(gaps)
    if k != best or _bitmap_length(size) < _gaps_length(gaps.size, k, quotients):
        _refuse(f"{k} remainder bits, though another form is shorter: not written by `encode`")
    mask = np.full(size, mode == ZEROS)
    mask[positions] = mode == ONES
    return mask


def _decode_bitmap(data: bytes, k: int, size: int) -> Bits:
    if k or len(data) != _bitmap_length(size):
        _refuse(f"{len(data)} bytes and k = {k} for a bitmap of {size} entries")
    mask = np.unpackbits(np.frombuffer(data, np.uint8, offset=1)).astype(np.bool_)
    if mask[size:].any():
        _refuse("padding bits are set")
    mask = mask[:size].copy()
    _, gaps = _rare(mask)
    if _bitmap_length(size) >= _gaps_length(gaps.size, *_parameter(gaps)):
        _refuse("a bitmap, though gaps are no longer: not written by `encode`")
    return mask


def _parameter(gaps: Ints) -> tuple[int, int]:
    """The smallest k with the fewest bits, and the sum of the quotients it leaves.

    Each further bit of remainder saves less than the one before: the first that saves nothing ends it.
    """
    k, quotients = 0, int(gaps.sum())
    while True:
        fewer = int((gaps >> (k + 1)).sum())
        if quotients - fewer <= gaps.size:
            return k, quotients
        k, quotients = k + 1, fewer


def _whole_bytes(bits: int) -> int:
    return (bits + 7) // 8


def _bitmap_length(size: int) -> int:
    return 1 + _whole_bytes(size)


def _gaps_length(count: int, k: int, quotients: int) -> int:
    return 1 + len(_varint(count)) + _whole_bytes(count * k) + _whole_bytes(count + quotients)


def _pack_remainders(gaps: Ints, k: int) -> bytes:
    bits = np.empty((gaps.size, k), np.uint8)
    for column in range(k):
        bits[:, column] = gaps >> (k - 1 - column) & 1
    return np.packbits(bits).tobytes()


def _unpack_remainders(data: bytes, count: int, k: int) -> Ints:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[count * k :].any():
        _refuse("padding bits are set")
    remainders = np.zeros(count, np.int64)
    for column in range(k):
        remainders = remainders << 1 | bits[column : count * k : k]
    return remainders


def _pack_unary(quotients: Ints) -> bytes:
    ends = np.cumsum(quotients + 1) - 1
    bits = np.zeros(int(ends[-1]) + 1 if ends.size else 0, np.bool_)
    bits[ends] = True
    return np.packbits(bits).tobytes()


def _unpack_unary(data: bytes, count: int) -> Ints:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    found = int(np.count_nonzero(bits))
    if found != count:
        _refuse(f"{found} entries where {count} are announced")
    ends = np.flatnonzero(bits).astype(np.int64, copy=False)
    used = int(ends[-1]) + 1 if count else 0
    if _whole_bytes(used) != len(data):
        _refuse(f"{len(data) - _whole_bytes(used)} bytes too many")
    return np.diff(ends, prepend=-1) - 1


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have the high bit set."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _read_varint(data: bytes) -> tuple[int, int]:
    """The count that stands behind the head byte, and where the next part begins."""
    count = 0
    for place, byte in enumerate(data[1:10]):
        count |= (byte & 127) << 7 * place
        if byte < 128:
            if not byte and place:
                break
            return count, place + 2
    _refuse("the count of entries is no varint")


def _refuse(found: str) -> NoReturn:
    raise RunError(f"Mask bytes: {found}. The file is damaged or was altered; fetch or train it again.")
