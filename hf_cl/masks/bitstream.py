"""Numbers as bits, the high bit first: counts, fields of known widths, and which cells of a segment are set.

A segment is a few words of 16 cells. With `count` cells set it is one of C(cells, count), and its number among these
is written in as many bits as that takes: all, or all but one, of the next whole number (truncated binary).

Invariant: nothing is read beyond the end, and every number in range has one form. What fills up the last byte is
zeros. All is done for all segments at once, word by word.

Source: Cover, "Enumerative source encoding", 1973; truncated binary as in Golomb, "Run-length encodings", 1966.
"""

import math
from functools import lru_cache
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from hf_cl.errors import RunError

Bits = NDArray[np.bool_]
Ints = NDArray[np.int64]
Octets = NDArray[np.uint8]
"""Bytes, or bits one an element."""
Words = NDArray[np.uint16]

WORD = 16
_HALF = 32


def refuse(found: str) -> NoReturn:
    """Raise the one error of bytes that are no mask's encoding: what was found, and the way out."""
    raise RunError(f"Mask bytes: {found}. The file is damaged or was altered; fetch or train it again.")


# --- counts and fields --------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have the high bit set."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    """Return the count that stands at byte `start`, below 2**63, and where the next part begins.

    Raises:
        RunError: No count, or one written longer than it must be.
    """
    count = 0
    for place, byte in enumerate(data[start : start + 9]):
        count |= (byte & 127) << 7 * place
        if byte < 128:
            if not byte and place:
                break
            return count, start + place + 1
    refuse("the count of entries is no varint")


def to_bits(values: Ints, widths: Ints) -> Octets:
    """Return the lowest `widths` bits of each value, one after the other, one an element."""
    shifts = np.repeat(np.cumsum(widths), widths)
    shifts -= np.arange(1, shifts.size + 1)
    return (np.repeat(values, widths) >> shifts & 1).astype(np.uint8)


class Reader:
    """Fields of bits out of bytes, each at its own place; it keeps no position."""

    def __init__(self, data: bytes) -> None:
        self.size = 8 * len(data)
        # One 64-bit number at every byte, so that any 57 bits stand within one of them.
        self._windows: NDArray[np.uint64] = np.ndarray((len(data) + 1,), ">u8", data + bytes(8), strides=(1,))

    def fields(self, start: int, widths: Ints) -> tuple[Ints, int]:
        """Return the numbers of `widths` bits, at most 63, one after the other from bit `start`; and where they end.

        Raises:
            RunError: They end beyond the last bit.
        """
        ends = start + np.cumsum(widths)
        end = int(ends[-1]) if ends.size else start
        if end > self.size:
            refuse(f"{self.size} bits where at least {end} are announced")
        starts = ends - widths
        if not (widths > _HALF).any():
            return self._short(starts, widths), end
        high = np.maximum(widths - _HALF, 0)
        low = widths - high
        return self._short(starts, high) << low | self._short(starts + high, low), end

    def _short(self, starts: Ints, widths: Ints) -> Ints:
        windows = self._windows[starts >> 3].astype(np.uint64)
        # The last shift in two steps: a field may be empty, and a shift by 64 is undefined.
        cut = windows << (starts & 7).astype(np.uint64) >> (63 - widths).astype(np.uint64) >> np.uint64(1)
        return cut.astype(np.int64)


# --- which cells of a segment are set -----------------------------------------------------------------


def population(words: Words) -> Ints:
    """Return how many cells each segment has set, for words of shape segments x words."""
    return _words().populations[words].sum(1)


def subsets_to_bits(words: Words, counts: Ints) -> Octets:
    """Return which of the segments with its count each is: the whole bits of all, then the last bits of some.

    Args:
        words: Segments x words, 1 to 4 of them.
        counts: Their population.
    """
    ways, known, left = _ways(words.shape[1]), _words(), counts.copy()
    number = np.zeros(counts.size, np.int64)
    for word, (fewer, behind) in zip(words.T, ways.steps, strict=True):
        own = known.populations[word]
        number += fewer[own, left]
        left -= own
        number += known.number[word] * behind[left]
    short = ways.short[counts]
    long = number >= short
    number = np.where(long, number + short, number)
    return np.concatenate([to_bits(number >> long, ways.width[counts]), (number[long] & 1).astype(np.uint8)])


def bits_to_subsets(bits: Octets, counts: Ints, words: int) -> tuple[Words, int]:
    """Return the segments, of shape segments x words, with these counts; and how many bits told them.

    Raises:
        RunError: There are too few bits.
    """
    ways, known, left = _ways(words), _words(), counts.copy()
    short = ways.short[counts]
    number, used = Reader(np.packbits(bits).tobytes()).fields(0, ways.width[counts])
    long = np.flatnonzero(number >= short)
    last = bits[used : used + long.size]
    if last.size != long.size:
        refuse(f"{bits.size} bits where {used + long.size} are needed")
    number[long] = 2 * number[long] + last - short[long]
    segments = np.empty((counts.size, words), np.uint16)
    for place, (fewer, behind) in enumerate(ways.steps):
        own = np.zeros(counts.size, np.int64)
        for half in (16, 8, 4, 2, 1):
            own += half * (fewer[own + half, left] <= number)
        number -= fewer[own, left]
        left -= own
        mine = number // behind[left]
        number -= mine * behind[left]
        segments[:, place] = known.rising[known.first[own] + mine]
    return segments, used + long.size


class _Words(NamedTuple):
    """The words, by how many cells they have set."""

    rising: Words
    """The fewest first, then by size."""
    first: Ints
    """[set]: the place of the first with so many."""
    populations: Ints
    """[word]: how many are set."""
    number: Ints
    """[word]: its place among those with as many."""


@lru_cache(maxsize=1)
def _words() -> _Words:
    count = np.unpackbits(np.arange(1 << WORD).astype(">u2").view(np.uint8)).reshape(-1, WORD).sum(1, dtype=np.int64)
    words = np.argsort(count, kind="stable")
    first = np.searchsorted(count[words], np.arange(WORD + 1))
    number = np.empty_like(words)
    number[words] = np.arange(words.size)
    return _Words(words.astype(np.uint16), first, count, number - first[count])


class _Ways(NamedTuple):
    """How many segments of some words there are, by how many cells they have set."""

    steps: tuple[tuple[Ints, Ints], ...]
    """For each word: segments [own, left] with `left` set from here on, fewer than `own` of them in this word; and
    the ways [left] to have `left` set behind it."""
    width: Ints
    """[count]: the whole bits that a number takes at least."""
    short: Ints
    """[count]: how many numbers take no bit more."""


@lru_cache(maxsize=4)
def _ways(words: int) -> _Ways:
    cells, steps = WORD * words, []
    for rest in range(cells - WORD, -1, -WORD):
        behind = [math.comb(rest, left) for left in range(cells + 1)]
        fewer = [[0] * (cells + 1)]
        for own in range(WORD):
            here = [math.comb(WORD, own) * ways for ways in [0] * own + behind]
            fewer.append([before + ways for before, ways in zip(fewer[-1], here, strict=False)])
        # A word never holds more; the search by halves asks all the same.
        fewer += [[2**63 - 1] * (cells + 1)] * (WORD - 1)
        # A count that does not occur must not divide by zero.
        steps.append((np.array(fewer, np.int64), np.maximum(behind, 1)))
    ways = [math.comb(cells, count) for count in range(cells + 1)]
    width = [number.bit_length() - 1 for number in ways]
    short = [(2 << bits) - number for number, bits in zip(ways, width, strict=True)]
    return _Ways(tuple(steps), np.array(width), np.array(short))
