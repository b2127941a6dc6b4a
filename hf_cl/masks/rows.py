"""A mask whose rows differ, below what independent entries would need.

Which weights matter is uneven: some rows of a learned mask hold many entries, others none. So a row is read in
segments of up to 64 entries, and each segment's count is coded by what the row held before it. How many are kept
in a row is Poisson with a rate of its own, the rates follow a gamma distribution: given `seen` entries in `t`
segments, the next count is negative binomial with shape A + seen and mean (A + seen) / (B + t). Here B is A over
the mask's mean count, and A is fitted to the variance of the rows' counts. Every row has one coder (rANS), so all
rows are coded at once, a segment at a time. Which of the segments with this count it is, is a number, written in
as many bits as it needs.

    head byte (3 * 64 + 32 if by columns + shape), byte (64 * log2 of the rows a coder takes + top count - 1),
    varint of the entries kept, then bits: each coder's state, what the coders read, the numbers of the segments

A coder costs almost nothing: it starts from bits of the segments' numbers, and the reader takes these from the
state it ends in. The state holds 17 bits, the first always set, and gives off bits one by one.

Invariant: one mask, one encoding. Probabilities are integers, found by sums, products, quotients and square roots
of doubles, which are the same on every machine; no logarithm, power or sum in an unknown order is used.

Source: gamma-Poisson counts: Greenwood and Yule, 1920; rANS: Duda, arXiv 1311.2540; numbers of subsets: Cover,
"Enumerative source encoding", 1973; numbers in a range: truncated binary, as in Golomb, 1966.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_cl.masks.bitstream import Bits, Ints, Reader, read_varint, refuse, to_bits, varint

Octets = NDArray[np.uint8]
Words = NDArray[np.uint16]

ROWS = 3
_LANE_BITS, _SHARE_BITS = 16, 12
_STATE, _WHOLE = 1 << _LANE_BITS, 1 << _SHARE_BITS
# Shape of the rates' distribution, in quarters: 1/2, 3/4, 1, 3/2, ... The last means rows of one rate.
_SHAPES = [step << power for power in range(16) for step in (2, 3)]


class Plan(NamedTuple):
    """What the head says of a mask."""

    by_columns: bool
    """Whether the mask is turned: its columns are the rows below."""
    shape: int
    """A's place among the shapes."""
    share: int
    """A coder takes 2**share rows."""
    top: int
    """The largest count of a segment."""
    kept: int
    """Entries kept in the mask."""

    def head(self) -> bytes:
        """The bytes before the bits."""
        first, second = ROWS << 6 | self.by_columns << 5 | self.shape, self.share << 6 | self.top - 1
        return bytes([first, second]) + varint(self.kept)


class Grid(NamedTuple):
    """A mask cut into segments: `rows` rows of `across` segments of `words` times 16 entries; the last may end in zeros."""

    rows: int
    length: int
    across: int
    words: int

    @classmethod
    def of(cls, size: int, row: int, by_columns: bool) -> "Grid":
        """The grid of a mask of `size` entries in rows of `row`, turned if `by_columns`."""
        rows, length = (row, size // row) if by_columns else (size // row, row)
        words = -(-length // 16)
        across = -(-words // 4)
        return cls(rows, length, across, -(-words // across))

    def lanes(self, share: int) -> int:
        """How many coders there are where each takes 2**share rows."""
        return -(-self.rows >> share)

    def is_quick(self, share: int) -> bool:
        """Whether coders side by side are many enough against the steps that follow one another."""
        return self.across << share <= max(16, self.lanes(share))

    def share(self, bits: int) -> int | None:
        """The least share whose coders can all start from `bits` bits, or None where that would be slow."""
        for share in range(4):
            if self.lanes(share) * _LANE_BITS <= bits:
                return share if self.is_quick(share) else None
        return None


def encode_rows(flat: Bits, row: int) -> bytes | None:
    """Return the encoding of a mask in rows of `row` entries, or None where too few are kept to start the coders.

    Args:
        flat: Booleans, 1-D, at least one of them set; the size is a multiple of `row`.
        row: Entries in a row.
    """
    by_columns, shape = _structure(flat, row)
    grid = Grid.of(flat.size, row, by_columns)
    words = _cut(flat, row, grid, by_columns)
    counts = _singles().count[words].sum(1)
    numbers = _number_bits(words[counts > 0], counts[counts > 0])
    share = grid.share(numbers.size)
    if share is None:
        return None
    plan = Plan(by_columns, shape, share, int(counts.max()), int(counts.sum()))
    lanes = grid.lanes(share)
    first = np.packbits(numbers[: lanes * _LANE_BITS]).view(">u2").astype(np.int64)
    states, coded = _encode_counts(counts.reshape(grid.rows, grid.across), first | _STATE, plan)
    bits = [to_bits(states, np.full(lanes, _LANE_BITS)), coded, numbers[lanes * _LANE_BITS :]]
    return plan.head() + np.packbits(np.concatenate(bits)).tobytes()


def decode_rows(data: bytes, size: int, row: int) -> Bits:
    """Return the mask, 1-D with `size` entries in rows of `row`, for which `encode_rows` writes `data`.

    Raises:
        RunError: `data` is no such encoding.
    """
    plan, start = _read_head(data, size)
    grid = Grid.of(size, row, plan.by_columns)
    lanes = grid.lanes(plan.share)
    if plan.top > 16 * grid.words or not grid.is_quick(plan.share):
        refuse(f"counts to {plan.top}, {1 << plan.share} rows a coder, for {grid.rows} rows of {grid.length} entries")
    reader = Reader(data[start:])
    states, place = reader.fields(0, np.full(lanes, _LANE_BITS))
    counts, states, place = _decode_counts(reader, place, states | _STATE, grid, plan)
    if (int(counts.sum()), int(counts.max())) != (plan.kept, plan.top):
        refuse(f"{int(counts.sum())} entries, to {int(counts.max())}, where {plan.kept}, to {plan.top}, are announced")
    rest = np.unpackbits(np.frombuffer(data, np.uint8, offset=start))[place:]
    numbers = np.concatenate([to_bits(states, np.full(lanes, _LANE_BITS)), rest])
    words, used = _from_number_bits(numbers, counts, grid.words)
    if numbers.size - used > 7 or numbers[used:].any():
        refuse(f"{numbers.size - used} bits too many, or padding bits are set")
    flat = _join(words, grid, plan.by_columns)
    if (*_structure(flat, row), grid.share(used)) != plan[:3]:
        refuse(f"a head of {plan}: not written by `encode`")
    return flat


# --- head and segments --------------------------------------------------------------------------------


def _read_head(data: bytes, size: int) -> tuple[Plan, int]:
    if len(data) < 3:
        refuse(f"{len(data)} bytes, shorter than any head")
    kept, start = read_varint(data, 2)
    if not 0 < 2 * kept <= size:
        refuse(f"{kept} entries of {size}: none, or more than half")
    return Plan(bool(data[0] & 32), data[0] & 31, data[1] >> 6, (data[1] & 63) + 1, kept), start


def _structure(flat: Bits, row: int) -> tuple[bool, int]:
    """Whether columns differ more than rows, and the place of the shape that their counts' variance means.

    With counts c of n rows, K in all: the variance beyond a Poisson's is excess / n**2, the shape is
    K**2 / excess, and the bits saved grow as excess**2 / n. All in integers.
    """
    places = np.flatnonzero(flat)
    kept, rows = places.size, flat.size // row
    across, down = (
        _excess(np.bincount(found), length) for found, length in ((places // row, rows), (places % row, row))
    )
    by_columns = down**2 * rows > across**2 * row
    excess = down if by_columns else across
    fitting = sum(shape * excess <= 4 * kept**2 for shape in _SHAPES)
    return by_columns, max(fitting, 1) - 1


def _excess(counts: Ints, length: int) -> int:
    kept = int(counts.sum())
    return max(length * int((counts * counts).sum()) - kept**2 - length * kept, 0)


def _cut(flat: Bits, row: int, grid: Grid, by_columns: bool) -> Words:
    """The segments' words, a row a segment."""
    mask = flat.reshape(-1, row)
    packed = np.packbits(np.ascontiguousarray(mask.T) if by_columns else mask, axis=1)
    missing = 2 * grid.across * grid.words - packed.shape[1]
    if missing:
        packed = np.pad(packed, ((0, 0), (0, missing)))
    return packed.view(">u2").astype(np.uint16).reshape(-1, grid.words)


def _join(words: Words, grid: Grid, by_columns: bool) -> Bits:
    packed = words.astype(">u2").view(np.uint8).reshape(grid.rows, -1)
    bits = np.unpackbits(packed, axis=1).view(np.bool_)
    if bits[:, grid.length :].any():
        refuse(f"entries beyond the last of a row of {grid.length}")
    mask = bits[:, : grid.length]
    return np.ascontiguousarray(mask.T if by_columns else mask).reshape(-1)


# --- counts of segments -------------------------------------------------------------------------------


def _encode_counts(counts: Ints, states: Ints, plan: Plan) -> tuple[Ints, Octets]:
    """The states a reader starts from, and the bits it reads, for counts of shape rows x segments.

    rANS works backwards: the last count first, from the states in which the reader is to end.
    """
    rows, across = counts.shape
    seen, start, share = np.zeros(rows, np.int64), np.empty_like(counts), np.empty_like(counts)
    for t in range(across):
        table, context = _table(seen, t, rows * across, plan)
        at = context * (plan.top + 1) + counts[:, t]
        start[:, t], share[:, t] = table[at] - context * _WHOLE, table[at + 1] - table[at]
        seen += counts[:, t]
    given, widths, states = [], [], states.copy()
    for first in reversed(range(0, rows, states.size)):
        for t in reversed(range(across)):
            part = slice(first, first + states.size)
            state, mine = states[: rows - first], share[part, t]
            width = _SHARE_BITS + 1 - _bit_length(mine)
            width -= state >> width < mine << _LANE_BITS - _SHARE_BITS
            given.append(state & (1 << width) - 1)
            widths.append(width)
            state = state >> width
            states[: state.size] = (state // mine << _SHARE_BITS) + state % mine + start[part, t]
    return states, to_bits(*(np.concatenate(found[::-1]) for found in (given, widths)))


def _decode_counts(reader: Reader, place: int, states: Ints, grid: Grid, plan: Plan) -> tuple[Ints, Ints, int]:
    """The segments' counts, the states the coders end in, and the bit behind the last read."""
    counts, lanes = np.empty((grid.rows, grid.across), np.int64), states.size
    for first in range(0, grid.rows, lanes):
        mine = counts[first : first + lanes]
        state, seen = states[: len(mine)], np.zeros(len(mine), np.int64)
        for t in range(grid.across):
            table, context = _table(seen, t, counts.size, plan)
            slot = context * _WHOLE + (state & _WHOLE - 1)
            at = np.searchsorted(table, slot, side="right") - 1
            state = (table[at + 1] - table[at]) * (state >> _SHARE_BITS) + slot - table[at]
            width = _LANE_BITS + 1 - _bit_length(state)
            bits, place = reader.fields(place, width)
            state = state << width | bits
            mine[:, t] = at - context * (plan.top + 1)
            seen += mine[:, t]
        states[: len(mine)] = state
    return counts.reshape(-1), states, place


def _table(seen: Ints, t: int, segments: int, plan: Plan) -> tuple[Ints, Ints]:
    """Shares of each count 0..top after `t` segments, and each row's place among the contexts.

    Returns:
        Where each count's share begins, context by context, each _WHOLE wide; and the rows' contexts.
    """
    found = np.bincount(seen) > 0
    values, context = np.flatnonzero(found), (np.cumsum(found) - 1)[seen]
    shape = _SHAPES[plan.shape] / 4
    rate = shape * segments / plan.kept + t
    stay = rate / (rate + 1)
    none = np.multiply.accumulate(np.full(found.size, stay))[values] / stay * _power(stay, _SHAPES[plan.shape])
    step = np.arange(plan.top)
    ratios = (shape + values[:, None] + step) / (step + 1) * (1 - stay)
    chances = np.multiply.accumulate(np.concatenate([none[:, None], ratios], axis=1), axis=1)
    sums = np.add.accumulate(chances, axis=1)
    # Each count keeps at least one share, so that any mask can be written.
    ends = (sums / sums[:, -1:] * (_WHOLE - plan.top - 1)).astype(np.int64) + np.arange(1, plan.top + 2)
    return np.append(0, ends + _WHOLE * np.arange(values.size)[:, None]), context


def _power(base: float, quarters: int) -> float:
    """`base` to the power of quarters / 4, by squares and roots alone."""
    result, base = 1.0, math.sqrt(math.sqrt(base))
    while quarters:
        result, base, quarters = result * base if quarters & 1 else result, base * base, quarters >> 1
    return result


def _bit_length(numbers: Ints) -> Ints:
    return np.frexp(numbers)[1].astype(np.int64)


# --- numbers of segments ------------------------------------------------------------------------------


def _number_bits(words: Words, counts: Ints) -> Octets:
    """Which of the segments with as many entries each is, as bits: first the full bits of all, then the rest."""
    tables, single, left = _subsets(words.shape[1]), _singles(), counts.copy()
    number = np.zeros(counts.size, np.int64)
    for word, (less, ways) in zip(words.T, tables.steps, strict=True):
        own = single.count[word]
        number += less[own, left]
        left -= own
        number += single.number[word] * ways[left]
    width, short = tables.width[counts], tables.short[counts]
    long = number >= short
    number = np.where(long, number + short, number)
    return np.concatenate([to_bits(number >> long, width), (number[long] & 1).astype(np.uint8)])


def _from_number_bits(bits: Octets, counts: Ints, words: int) -> tuple[Words, int]:
    """The segments' words, a row a segment, and how many bits they took."""
    tables, single, busy = _subsets(words), _singles(), np.flatnonzero(counts)
    left = counts[busy]
    short = tables.short[left]
    number, used = Reader(np.packbits(bits).tobytes()).fields(0, tables.width[left])
    long = np.flatnonzero(number >= short)
    more = bits[used : used + long.size]
    if more.size != long.size:
        refuse(f"{bits.size} bits where {used + long.size} are needed")
    number[long] = 2 * number[long] + more - short[long]
    result = np.zeros((counts.size, words), np.uint16)
    for place, (less, ways) in enumerate(tables.steps):
        own = np.zeros(left.size, np.int64)
        for half in (16, 8, 4, 2, 1):
            own += half * (less[own + half, left] <= number)
        number -= less[own, left]
        left -= own
        many = ways[left]
        mine = number // many
        number -= mine * many
        result[busy, place] = single.words[single.first[own] + mine]
    return result, used + long.size


class Singles(NamedTuple):
    """The words of 16 bits, by how many are set."""

    words: Words
    """Fewest first, then by size."""
    first: Ints
    """[count]: the place of the first with this many."""
    count: Ints
    """[word]: how many bits are set."""
    number: Ints
    """[word]: its place among those with as many."""


@lru_cache(maxsize=1)
def _singles() -> Singles:
    count = np.unpackbits(np.arange(1 << 16).astype(">u2").view(np.uint8)).reshape(-1, 16).sum(1, dtype=np.int64)
    words = np.argsort(count, kind="stable")
    first = np.searchsorted(count[words], np.arange(17))
    number = np.empty_like(words)
    number[words] = np.arange(words.size)
    return Singles(words.astype(np.uint16), first, count, number - first[count])


class Subsets(NamedTuple):
    """Numbers of segments of some words, by how many entries they hold."""

    steps: tuple[tuple[Ints, Ints], ...]
    """For each word: segments [own, left] with `left` entries from here on and fewer than `own` in this word; and
    how many ways [left] the words behind it hold `left` entries."""
    width: Ints
    """[count]: the whole bits a number takes at least."""
    short: Ints
    """[count]: how many numbers take no bit more."""


@lru_cache(maxsize=4)
def _subsets(words: int) -> Subsets:
    most = 16 * words
    steps = []
    for rest in range(most - 16, -1, -16):
        ways = [math.comb(rest, left) for left in range(most + 1)]
        less = [[0] * (most + 1)]
        for own in range(16):
            here = [math.comb(16, own) * number for number in [0] * own + ways]
            less.append([before + number for before, number in zip(less[-1], here, strict=False)])
        # More than 16 never stand in a word; a search by halves may ask all the same.
        less += [[2**63 - 1] * (most + 1)] * 15
        steps.append((np.array(less), np.maximum(ways, 1)))
    ways = [math.comb(most, count) for count in range(most + 1)]
    width = [number.bit_length() - 1 for number in ways]
    short = [(2 << bits) - number for number, bits in zip(ways, width, strict=True)]
    return Subsets(tuple(steps), np.array(width), np.array(short))
