"""A mask in as few bytes as it needs: by rows where the caller says how long they are, or flat.

One head byte (mode * 64 + k), then

    BITMAP  the entries as bits
    ONES    the gaps before each kept entry
    ZEROS   the gaps before each entry left out (masks denser than one half)
    ROWS    see rows.py

A gap g is a quotient g >> k and a remainder of k bits: a Golomb-Rice code. The two stand in streams of their own, so
that both directions are array operations: a varint of how many gaps, the remainders at fixed width, the quotients in
unary (q zeros, then a one). Bits run from the high end of a byte; each stream is filled up to a byte with zeros. What
follows the last gap needs no code: the size is known to the reader.

Invariant: one mask, one encoding, never longer than the bitmap; with a row length one more, read only where it is
shorter. `decode` refuses every other, so equal bytes mean equal masks, and what it allocates is bounded by `size`,
whatever the data claim.

Source: Golomb, "Run-length encodings", 1966; Rice and Plaunt, 1971.
"""

import numpy as np

from hf_cl.errors import ConfigError
from hf_cl.masks.bitstream import Bits, Ints, read_varint, refuse, varint
from hf_cl.masks.rows import ROWS, decode_rows, encode_rows, suits

BITMAP, ONES, ZEROS = 0, 1, 2


def encode(mask: Bits, row: int | None = None) -> bytes:
    """Return the mask's one encoding: within 5 % of the Shannon bound for independent entries.

    Args:
        mask: Booleans of any shape, read in C order. The shape is not stored.
        row: Entries in a row, which must divide the mask's size. With it, masks with up to two fifths of their
            entries kept stay within 1 % where they have 1,000 of them, and go below that bound where rows or columns
            differ. None codes the mask flat: ten times as fast, and each entry alike.

    Raises:
        ConfigError: The mask is not boolean, or `row` does not divide its size.
    """
    if mask.dtype != np.bool_:
        raise ConfigError(f"A mask must be boolean, found {mask.dtype}. Pass `mask != 0` to mean that.")
    flat = mask.reshape(-1)
    _check_row(row, flat.size)
    mode, gaps = _rare(flat)
    k, quotients = _parameter(gaps)
    length = min(_bitmap_length(flat.size), _gaps_length(gaps.size, k, quotients))
    if row is not None and suits(int(np.count_nonzero(flat)), flat.size):
        data = encode_rows(flat, row)
        if data is not None and len(data) < length:
            return data
    if length < _gaps_length(gaps.size, k, quotients):
        return bytes([BITMAP]) + np.packbits(flat).tobytes()
    return bytes([mode << 6 | k]) + varint(gaps.size) + _pack_remainders(gaps, k) + _pack_unary(gaps >> k)


def decode(data: bytes, size: int, row: int | None = None) -> Bits:
    """Return the mask, 1-D with `size` entries, whose encoding, flat or with this `row`, is `data`.

    Args:
        data: What `encode` returned, or anything else.
        size: Entries of the mask, known from elsewhere: from the shape of the weight it belongs to.
        row: Entries in a row. A flat encoding needs none.

    Raises:
        RunError: `data` is not the encoding of such a mask: cut short, too long, altered, or of another `row`.
        ConfigError: `row` does not divide `size`.
    """
    if size < 0 or not 0 < len(data) <= _bitmap_length(size):
        refuse(f"{len(data)} bytes for {size} entries")
    _check_row(row, size)
    if data[0] >> 6 != ROWS:
        return _decode_flat(data, size)
    if row is None:
        refuse(f"mode {ROWS} is none of 0, 1, 2, and the other needs the length of a row")
    mask = decode_rows(data, size, row)
    _, gaps = _rare(mask)
    if len(data) >= min(_bitmap_length(size), _gaps_length(gaps.size, *_parameter(gaps))):
        refuse("rows, though a flat form is no longer: not written by `encode`")
    return mask


def _check_row(row: int | None, size: int) -> None:
    if row is not None and (row < 1 or size % row):
        raise ConfigError(f"Rows of {row} do not make up {size} entries. Pass the mask's last dimension.")


def _decode_flat(data: bytes, size: int) -> Bits:
    mode, k = data[0] >> 6, data[0] & 63
    if mode == BITMAP:
        return _decode_bitmap(data, k, size)
    count, start = read_varint(data, 1)
    if 2 * count > size or (mode == ZEROS and 2 * count == size):
        refuse(f"{count} rare entries of {size} in mode {mode}: more than half")
    if k > size.bit_length():
        refuse(f"remainders of {k} bits for {size} entries")
    middle = start + _whole_bytes(count * k)
    if middle > len(data):
        refuse(f"{len(data)} bytes where {count} remainders of {k} bits end at byte {middle}")
    quotients = _unpack_unary(data[middle:], count)
    if int(quotients.sum()) << k >= max(size, 1):
        refuse(f"the gaps reach beyond {size} entries")
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
        refuse(f"an entry lies beyond the last of {size}")
    best, quotients = _parameter(gaps)
    if k != best or _bitmap_length(size) < _gaps_length(gaps.size, k, quotients):
        refuse(f"{k} remainder bits, though another form is shorter: not written by `encode`")
    mask = np.full(size, mode == ZEROS)
    mask[positions] = mode == ONES
    return mask


def _decode_bitmap(data: bytes, k: int, size: int) -> Bits:
    if k or len(data) != _bitmap_length(size):
        refuse(f"{len(data)} bytes and k = {k} for a bitmap of {size} entries")
    mask = np.unpackbits(np.frombuffer(data, np.uint8, offset=1)).astype(np.bool_)
    if mask[size:].any():
        refuse("padding bits are set")
    mask = mask[:size].copy()
    _, gaps = _rare(mask)
    if _bitmap_length(size) >= _gaps_length(gaps.size, *_parameter(gaps)):
        refuse("a bitmap, though gaps are no longer: not written by `encode`")
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
    return 1 + len(varint(count)) + _whole_bytes(count * k) + _whole_bytes(count + quotients)


def _pack_remainders(gaps: Ints, k: int) -> bytes:
    bits = np.empty((gaps.size, k), np.uint8)
    for column in range(k):
        bits[:, column] = gaps >> (k - 1 - column) & 1
    return np.packbits(bits).tobytes()


def _unpack_remainders(data: bytes, count: int, k: int) -> Ints:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[count * k :].any():
        refuse("padding bits are set")
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
        refuse(f"{found} entries where {count} are announced")
    ends = np.flatnonzero(bits).astype(np.int64, copy=False)
    used = int(ends[-1]) + 1 if count else 0
    if _whole_bytes(used) != len(data):
        refuse(f"{len(data) - _whole_bytes(used)} bytes too many")
    return np.diff(ends, prepend=-1) - 1
