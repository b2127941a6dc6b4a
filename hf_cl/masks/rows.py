"""A mask whose rows, or columns, differ: below what as many independent entries would need.

Which weights matter is uneven: some rows of a learned mask keep many entries, others none. So a row is read in
segments of up to 64 entries, and each segment's count is coded by what the row kept before it. With a rate of its
own for each row, drawn from a gamma distribution, and `seen` entries in `t` segments, the next count is negative
binomial of shape A + seen and mean (A + seen) / (B + t). B is A over the mask's mean count; A is fitted to the
variance of the rows' counts. Every row has a coder (rANS), so all rows are coded at once, a segment at a time.
Then follows which of the segments with its count each one is, as a number.

    byte 3 * 64 + 32 if turned + place of A, byte 64 * share + top count - 1, varint of the entries kept, then bits:
    each coder's state, what the coders read, the segments' numbers as far as no coder holds them

A coder costs a fifteenth of a bit: it starts from 16 bits of the segments' numbers, which the reader takes from the
state it ends in. A state has 17 bits, the first always set, and gives off bits one by one.

Invariant: one mask, one encoding. Shares of counts are integers, found by sums, products, quotients and square roots
of doubles in a fixed order, which are the same on every machine; logarithms and powers are not.

Source: gamma-Poisson counts: Greenwood and Yule, 1920; rANS: Duda, arXiv 1311.2540.
"""

import math
from typing import NamedTuple

import numpy as np

from hf_cl.masks.bitstream import (
    WORD,
    Bits,
    Ints,
    Octets,
    Reader,
    Words,
    bits_to_subsets,
    population,
    read_varint,
    refuse,
    subsets_to_bits,
    to_bits,
    varint,
)

ROWS = 3
"""The mode in the head byte."""

_STATE_BITS, _SHARE_BITS = 16, 12
_WHOLE = 1 << _SHARE_BITS
# What A may be, in quarters: 1/2, 3/4, 1, 3/2, ... The last means that all rows are alike.
_SHAPES = [step << power for power in range(16) for step in (2, 3)]
# Segments after one another that cost no time worth counting, however few rows there are beside.
_FEW_STEPS = 16


class Head(NamedTuple):
    """What stands before the bits."""

    turned: bool
    """Whether rows here are the mask's columns."""
    shape: int
    """A's place among the shapes."""
    share: int
    """A coder takes 2**share rows, 1 to 4."""
    top: int
    """The largest count of a segment, 1 to 64."""
    kept: int
    """Entries kept in the mask."""

    def to_bytes(self) -> bytes:
        """The head as it is stored."""
        first, second = ROWS << 6 | self.turned << 5 | self.shape, self.share << 6 | self.top - 1
        return bytes([first, second]) + varint(self.kept)


class Grid(NamedTuple):
    """`rows` rows of `length` entries, each cut into `across` segments of `words` words; the last may end in zeros."""

    rows: int
    length: int
    across: int
    words: int

    @classmethod
    def of(cls, size: int, row: int, turned: bool) -> "Grid":
        """The grid of a mask of `size` entries in rows of `row`, or of its columns if turned."""
        rows, length = (row, size // row) if turned else (size // row, row)
        words = -(-length // WORD)
        across = -(-words // 4)
        return cls(rows, length, across, -(-words // across))

    def coders(self, share: int) -> int:
        """How many coders there are where each takes 2**share rows."""
        return -(-self.rows >> share)

    def is_quick(self, share: int) -> bool:
        """Whether the coders side by side are many against the steps after one another."""
        return self.across << share <= max(_FEW_STEPS, self.coders(share))

    def share(self, bits: int) -> int | None:
        """The least share whose coders can all start from `bits` bits; None where there is none, or it is slow."""
        found = next((share for share in range(3) if self.coders(share) * _STATE_BITS <= bits), None)
        return found if found is not None and self.is_quick(found) else None


def suits(kept: int, size: int) -> bool:
    """Whether a mask with `kept` of `size` entries may be coded by rows; denser ones are their bits, or nearly so."""
    return 0 < 5 * kept <= 2 * size


def encode_rows(flat: Bits, row: int) -> bytes | None:
    """Return the encoding of a mask, or None where too few entries are kept to start the coders, or rows are few.

    Args:
        flat: Booleans, 1-D; their number is a multiple of `row`, and how many are set `suits`.
        row: Entries in a row.
    """
    turned, shape = _structure(flat, row)
    grid = Grid.of(flat.size, row, turned)
    words = _cut(flat, row, grid, turned)
    counts = population(words)
    numbers = subsets_to_bits(words[counts > 0], counts[counts > 0])
    share = grid.share(numbers.size)
    if share is None:
        return None
    head = Head(turned, shape, share, int(counts.max()), int(counts.sum()))
    coders = grid.coders(share)
    start = np.packbits(numbers[: coders * _STATE_BITS]).view(">u2").astype(np.int64)
    states, coded = _encode_counts(counts.reshape(grid.rows, grid.across), start | 1 << _STATE_BITS, head)
    bits = [to_bits(states, np.full(coders, _STATE_BITS)), coded, numbers[coders * _STATE_BITS :]]
    return head.to_bytes() + np.packbits(np.concatenate(bits)).tobytes()


def decode_rows(data: bytes, size: int, row: int) -> Bits:
    """Return the mask, 1-D with `size` entries in rows of `row`, for which `encode_rows` returns `data`.

    Raises:
        RunError: There is no such mask.
    """
    head, begin = _read_head(data, size)
    grid = Grid.of(size, row, head.turned)
    if head.top > WORD * grid.words or not grid.is_quick(head.share):
        refuse(f"counts to {head.top}, {1 << head.share} rows a coder, for {grid.rows} rows of {grid.length} entries")
    reader, coders = Reader(data[begin:]), grid.coders(head.share)
    states, place = reader.fields(0, np.full(coders, _STATE_BITS))
    counts, states, place = _decode_counts(reader, place, states | 1 << _STATE_BITS, grid, head)
    kept, top = int(counts.sum()), int(counts.max())
    if (kept, top) != (head.kept, head.top):
        refuse(f"{kept} entries, to {top} a segment, where {head.kept}, to {head.top}, are announced")
    rest = np.unpackbits(np.frombuffer(data, np.uint8, offset=begin))[place:]
    numbers = np.concatenate([to_bits(states, np.full(coders, _STATE_BITS)), rest])
    words = np.zeros((counts.size, grid.words), np.uint16)
    words[counts > 0], used = bits_to_subsets(numbers, counts[counts > 0], grid.words)
    if numbers.size - used > 7 or numbers[used:].any():
        refuse(f"{numbers.size - used} bits too many, or padding bits are set")
    flat = _join(words, grid, head.turned)
    if (*_structure(flat, row), grid.share(used)) != head[:3]:
        refuse(f"turned, shape and share of {tuple(map(int, head[:3]))}: not written by `encode`")
    return flat


# --- head and segments --------------------------------------------------------------------------------


def _read_head(data: bytes, size: int) -> tuple[Head, int]:
    kept, begin = read_varint(data, 2)
    if not suits(kept, size):
        refuse(f"{kept} entries of {size} by rows: none, or too many for that form")
    return Head(bool(data[0] & 32), data[0] & 31, data[1] >> 6, (data[1] & 63) + 1, kept), begin


def _structure(flat: Bits, row: int) -> tuple[bool, int]:
    """Whether to turn the mask, and the place of the shape that fits.

    Counts of n rows, `kept` in all, vary beyond a Poisson's by excess / n**2: A is kept**2 / excess, and the bits
    saved grow as excess**2 / n. In whole numbers, so that no machine decides otherwise.
    """
    places, rows = np.flatnonzero(flat), flat.size // row
    own = places // row
    across, down = _excess(np.bincount(own, minlength=rows)), _excess(np.bincount(places - own * row, minlength=row))
    turned = down**2 * rows > across**2 * row
    fits = [shape * (down if turned else across) <= 4 * places.size**2 for shape in _SHAPES]
    return turned, max(sum(fits), 1) - 1


def _excess(counts: Ints) -> int:
    kept = int(counts.sum())
    return max(counts.size * int((counts * counts).sum()) - kept**2 - counts.size * kept, 0)


def _cut(flat: Bits, row: int, grid: Grid, turned: bool) -> Words:
    """The mask's segments, of shape segments x words."""
    mask = flat.reshape(-1, row)
    packed = np.packbits(np.ascontiguousarray(mask.T) if turned else mask, axis=1)
    missing = 2 * grid.across * grid.words - packed.shape[1]
    if missing:
        packed = np.pad(packed, ((0, 0), (0, missing)))
    return packed.view(">u2").astype(np.uint16).reshape(-1, grid.words)


def _join(words: Words, grid: Grid, turned: bool) -> Bits:
    packed = words.astype(">u2").view(np.uint8).reshape(grid.rows, -1)
    bits = np.unpackbits(packed, axis=1).view(np.bool_)
    if bits[:, grid.length :].any():
        refuse(f"entries beyond the last of a row of {grid.length}")
    mask = bits[:, : grid.length]
    return (mask.T if turned else mask).reshape(-1).copy()


# --- counts of segments -------------------------------------------------------------------------------


def _encode_counts(counts: Ints, states: Ints, head: Head) -> tuple[Ints, Octets]:
    """The states a reader starts from and the bits it reads, for counts of shape rows x segments.

    rANS runs backwards: from the last count, and from `states`, in which the reader is to end.
    """
    rows, across = counts.shape
    start, share = _shares(counts, head)
    given, widths, states = [], [], states.copy()
    for first in reversed(range(0, rows, states.size)):
        state = states[: rows - first].copy()
        for t in reversed(range(across)):
            mine = share[first : first + states.size, t]
            width = _SHARE_BITS + 1 - _bit_length(mine)
            width -= state >> width < mine << _STATE_BITS - _SHARE_BITS
            given.append(state)
            widths.append(width)
            state = state >> width
            state = (state // mine << _SHARE_BITS) + state % mine + start[first : first + states.size, t]
        states[: state.size] = state
    return states, to_bits(np.concatenate(given[::-1]), np.concatenate(widths[::-1]))


def _decode_counts(reader: Reader, place: int, states: Ints, grid: Grid, head: Head) -> tuple[Ints, Ints, int]:
    """The counts, one a segment; the states the coders end in; and the bit behind the last read."""
    counts = np.empty((grid.rows, grid.across), np.int64)
    for first in range(0, grid.rows, states.size):
        mine = counts[first : first + states.size]
        state, seen = states[: len(mine)], np.zeros(len(mine), np.int64)
        for t in range(grid.across):
            table, context = _table(seen, t, counts.size, head)
            slot = context * _WHOLE + (state & _WHOLE - 1)
            at = np.searchsorted(table, slot, side="right") - 1
            state = (table[at + 1] - table[at]) * (state >> _SHARE_BITS) + slot - table[at]
            width = _STATE_BITS + 1 - _bit_length(state)
            bits, place = reader.fields(place, width)
            state = state << width | bits
            mine[:, t] = at - context * (head.top + 1)
            seen += mine[:, t]
        states[: len(mine)] = state
    return counts.reshape(-1), states, place


def _shares(counts: Ints, head: Head) -> tuple[Ints, Ints]:
    """Where each count's share begins and how wide it is, of _WHOLE; both of the shape of `counts`."""
    start, share, seen = np.empty_like(counts), np.empty_like(counts), np.zeros(len(counts), np.int64)
    for t in range(counts.shape[1]):
        table, context = _table(seen, t, counts.size, head)
        at = context * (head.top + 1) + counts[:, t]
        start[:, t], share[:, t] = table[at] - context * _WHOLE, table[at + 1] - table[at]
        seen += counts[:, t]
    return start, share


def _table(seen: Ints, t: int, segments: int, head: Head) -> tuple[Ints, Ints]:
    """The shares of counts 0..top in segment `t` of rows that kept `seen` entries before.

    Returns:
        Where each share begins, and where the last ends: context after context, _WHOLE wide each; and every row's
        context.
    """
    occurs = np.bincount(seen) > 0
    values, context = np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[seen]
    shape = _SHAPES[head.shape] / 4
    rate = shape * segments / head.kept + t
    stay = rate / (rate + 1)
    none = np.multiply.accumulate(np.append(_power(stay, _SHAPES[head.shape]), np.full(occurs.size - 1, stay)))
    step = np.arange(head.top)
    ratios = (shape + values[:, None] + step) / (step + 1) * (1 - stay)
    chances = np.multiply.accumulate(np.concatenate([none[values, None], ratios], axis=1), axis=1)
    sums = np.add.accumulate(chances, axis=1)
    # One of the whole goes to each count first, so that every count can be coded.
    ends = (sums / sums[:, -1:] * (_WHOLE - head.top - 1)).astype(np.int64) + np.arange(1, head.top + 2)
    return np.append(0, ends + _WHOLE * np.arange(values.size)[:, None]), context


def _power(base: float, quarters: int) -> float:
    """`base` to the power of quarters / 4, by squares and roots alone."""
    result, square = 1.0, math.sqrt(math.sqrt(base))
    while quarters:
        result, square, quarters = result * square if quarters & 1 else result, square * square, quarters >> 1
    return result


def _bit_length(numbers: Ints) -> Ints:
    return np.frexp(numbers)[1].astype(np.int64)
