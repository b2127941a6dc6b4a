"""Numbers as bits, the high bit first: counts of any size, and fields whose widths the reader knows.

Invariant: nothing is read beyond the end. Bits behind the last number fill up a byte and are zeros.
"""

from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from hf_cl.errors import RunError

Bits = NDArray[np.bool_]
Ints = NDArray[np.int64]

_HALF = 32


class Reader:
    """Fields out of bytes, each at its own place. Not to be altered; keeps no position."""

    def __init__(self, data: bytes):
        self.size = 8 * len(data)
        # One 64-bit number at every byte, so that any 57 bits stand in one of them.
        self._windows = np.ndarray((len(data) + 1,), ">u8", data + bytes(8), strides=(1,))

    def fields(self, start: int, widths: Ints) -> tuple[Ints, int]:
        """The numbers of `widths` bits, at most 64 each, one after the other from bit `start`; where they end.

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
        wide = self._windows[starts >> 3].astype(np.uint64)
        # In two steps: a shift by 64 is undefined, and a field may be empty.
        shifted = wide << (starts & 7).astype(np.uint64) >> (63 - widths).astype(np.uint64) >> np.uint64(1)
        return shifted.astype(np.int64)


def to_bits(values: Ints, widths: Ints) -> NDArray[np.uint8]:
    """The lowest `widths` bits of each value, one after the other, each a uint8 of 0 or 1."""
    ends = np.cumsum(widths)
    shifts = np.repeat(ends, widths)
    shifts -= np.arange(1, shifts.size + 1)
    return (np.repeat(values, widths) >> shifts & 1).astype(np.uint8)


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have the high bit set."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def read_varint(data: bytes, start: int) -> tuple[int, int]:
    """The count that stands at byte `start`, below 2**63, and where the next part begins.

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


def refuse(found: str) -> NoReturn:
    """Raise the one error of bytes that are no mask's encoding: what was found, and the way out."""
    raise RunError(f"Mask bytes: {found}. The file is damaged or was altered; fetch or train it again.")
