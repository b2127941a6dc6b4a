import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cl.errors import ConfigError, RunError
from hf_cl.masks.coding import decode, encode

ATTENTION = 589_824  # one 768 x 768 linear layer


def independent(size: int, density: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < density


masks = st.builds(
    independent,
    size=st.integers(0, 5000),
    density=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.99, 1.0]) | st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32 - 1),
)


def uneven(rows: int, length: int, density: float, shape: float, seed: int) -> np.ndarray:
    """A mask of `rows` rows, each with a rate of its own: gamma of the given shape around the density."""
    generator = np.random.default_rng(seed)
    rates = density * generator.gamma(shape, 1 / shape, (rows, 1))
    return generator.random((rows, length)) < rates


matrices = st.builds(
    uneven,
    rows=st.integers(1, 150),
    length=st.integers(1, 150),
    density=st.sampled_from([0.005, 0.01, 0.05, 0.2, 0.4]),
    shape=st.sampled_from([0.3, 1.0, 4.0, 1000.0]),
    seed=st.integers(0, 2**32 - 1),
)


def bound(size: int, kept: int) -> float:
    """Bytes that independent entries with this share kept need: the Shannon bound."""
    share = kept / size
    return -size * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8


def exactly(size: int, density: float, seed: int = 0) -> np.ndarray:
    mask = np.zeros(size, dtype=np.bool_)
    mask[np.random.default_rng(seed).choice(size, size=round(density * size), replace=False)] = True
    return mask


def accepts_only_what_encode_writes(data: bytes, size: int, row: int | None = None) -> None:
    try:
        mask = decode(data, size, row)
    except RunError:
        return
    assert mask.shape == (size,) and mask.dtype == np.bool_
    assert encode(mask, row if data[0] >> 6 == 3 else None) == data


@settings(deadline=None)
@given(masks)
def test_a_mask_comes_back_as_it_was(mask):
    data = encode(mask)
    back = decode(data, mask.size)
    assert back.dtype == np.bool_ and np.array_equal(back, mask)
    assert len(data) <= 1 + (mask.size + 7) // 8


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_short_masks_come_back_as_they_were(bits):
    mask = np.array(bits, dtype=np.bool_)
    assert decode(encode(mask), mask.size).tolist() == bits


@pytest.mark.parametrize(
    ("mask", "data"),
    [
        (np.zeros(0, dtype=np.bool_), b"\x00"),
        (np.zeros(1, dtype=np.bool_), b"\x40\x00"),
        (np.ones(1, dtype=np.bool_), b"\x80\x00"),
        (np.zeros(10**6, dtype=np.bool_), b"\x40\x00"),
        (np.ones(10**6, dtype=np.bool_), b"\x80\x00"),
        (np.eye(4, dtype=np.bool_), b"\x00\x84\x21"),
        # Entries 5 and 38 of 100, gaps 5 and 32, k = 3: remainders 101 000, quotients 0 and 4 as 1 00001.
        (np.isin(np.arange(100), [5, 38]), b"\x43\x02\xa0\x84"),
        (~np.isin(np.arange(100), [5, 38]), b"\x83\x02\xa0\x84"),
    ],
)
def test_the_bytes_are_pinned(mask, data):
    assert encode(mask) == data
    assert np.array_equal(decode(data, mask.size), mask.reshape(-1))


def test_a_long_count_and_gaps_are_pinned():
    # 200 gaps of 19: count c8 01; k = 3 and 4 tie, the smaller wins; remainders 011, quotients 2 as 001.
    mask = np.arange(4000) % 20 == 19
    assert encode(mask) == b"\x43\xc8\x01" + b"\x6d\xb6\xdb" * 25 + b"\x24\x92\x49" * 25


@pytest.mark.parametrize("density", [0.005, 0.01, 0.02, 0.05, 0.1])
def test_the_bytes_stay_within_five_percent_of_the_shannon_bound(density):
    mask = exactly(ATTENTION, density)
    assert len(encode(mask)) <= 1.05 * bound(ATTENTION, mask.sum())
    assert len(encode(~mask)) <= 1.05 * bound(ATTENTION, mask.sum())
    assert np.array_equal(decode(encode(mask), ATTENTION), mask)


def test_a_dense_mask_never_costs_more_than_its_bits_and_one_byte():
    mask = independent(ATTENTION, 0.5, seed=0)
    assert len(encode(mask)) == 1 + ATTENTION // 8


def test_the_shape_and_the_strides_do_not_matter():
    mask = independent(600, 0.05, seed=1).reshape(20, 30)
    turned = mask.T
    assert encode(mask) == encode(mask.reshape(-1))
    assert np.array_equal(decode(encode(turned), 600).reshape(30, 20), turned)
    assert decode(encode(turned), 600).flags.writeable


def test_encoding_leaves_the_mask_as_it_was():
    mask = independent(600, 0.7, seed=1)
    before = mask.copy()
    encode(mask)
    assert np.array_equal(mask, before)


def test_what_is_not_boolean_is_refused():
    with pytest.raises(ConfigError, match="found uint8"):
        encode(np.zeros(4, dtype=np.uint8))


@settings(deadline=None, max_examples=400)
@given(masks, st.data())
def test_altered_bytes_are_refused_or_are_another_masks_encoding(mask, data):
    altered = bytearray(encode(mask))
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    accepts_only_what_encode_writes(bytes(altered), mask.size)


@settings(deadline=None, max_examples=400)
@given(st.binary(max_size=60), st.integers(0, 400))
def test_arbitrary_bytes_are_refused_or_are_a_masks_encoding(data, size):
    accepts_only_what_encode_writes(data, size)


@settings(deadline=None)
@given(masks, st.integers(0, 6000))
def test_a_wrong_size_is_refused_or_gives_that_size(mask, size):
    accepts_only_what_encode_writes(encode(mask), size)


@settings(deadline=None)
@given(masks, st.binary(min_size=1, max_size=4))
def test_cut_and_lengthened_bytes_are_refused(mask, tail):
    data = encode(mask)
    with pytest.raises(RunError):
        decode(data[:-1], mask.size)
    with pytest.raises(RunError):
        decode(data + tail, mask.size)


HUGE = b"\xff" * 8 + b"\x7f"


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        (b"", 0, "0 bytes for 0 entries"),
        (b"\x40\x00", -1, "for -1 entries"),
        (b"\xc0\x00", 100, "mode 3"),
        (b"\x00\x84\x22", 15, None),
        (b"\x00\x84\x21", 15, "padding bits"),
        (b"\x00\x84", 16, "2 bytes and k = 0"),
        (b"\x01\x84\x21", 16, "k = 1"),
        (b"\x00" + bytes(13), 100, "a bitmap, though gaps"),
        (b"\x40", 100, "no varint"),
        (b"\x40\x80", 100, "no varint"),
        (b"\x40\x80\x00", 100, "no varint"),
        (b"\x40" + HUGE, 100, "more than half"),
        (b"\x40" + b"\xff" * 10, 100, "no varint"),
        (b"\x80\x04\xf0", 8, None),
        (b"\x7f\x02\xa0\x84", 100, "remainders of 63 bits"),
        (b"\x46\x28\xa0\x84", 100, "40 remainders of 6 bits end at byte 32"),
        (b"\x43\x02\xa0\xc4", 100, "3 entries where 2"),
        (b"\x43\x02\xa0\x80", 100, "1 entries where 2"),
        (b"\x43\x02\xa0\x84\x00", 100, "1 bytes too many"),
        (b"\x43\x02\xa1\x84", 100, "padding bits"),
        (b"\x43\x02\xa0\x84", 39, None),
        (b"\x43\x02\xa0\x84", 38, "beyond the last of 38"),
        (b"\x43\x02\xa0\x84", 30, "beyond 30 entries"),
        (b"\x42\x02\x40\x41", 100, "another form is shorter"),
    ],
)
def test_hostile_bytes_are_refused_with_what_was_found(data, size, message):
    if message is None:
        accepts_only_what_encode_writes(data, size)
        return
    with pytest.raises(RunError, match=message):
        decode(data, size)


# --- by rows ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(matrices, st.booleans())
def test_a_mask_coded_by_rows_comes_back_as_it_was(mask, turned):
    mask = mask.T if turned else mask
    data = encode(mask, mask.shape[1])
    back = decode(data, mask.size, mask.shape[1])
    assert back.dtype == np.bool_ and back.flags.writeable
    assert np.array_equal(back.reshape(mask.shape), mask)
    assert len(data) <= len(encode(mask))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (5, 1), (1, 5), (64, 64), (3, 1000), (1000, 3)])
@pytest.mark.parametrize("kept", ["none", "one", "last", "all"])
def test_the_smallest_and_plainest_masks_come_back_as_they_were(shape, kept):
    mask = np.zeros(shape, dtype=np.bool_)
    if mask.size:
        mask.reshape(-1)[{"none": slice(0), "one": 0, "last": -1, "all": slice(None)}[kept]] = True
    back = decode(encode(mask, shape[1]), mask.size, shape[1])
    assert np.array_equal(back.reshape(shape), mask)


# 1 % kept, the rows' rates gamma of this shape: a coder told the gamma would need 0.980, 0.989, 0.962, 0.889 and
# 0.659 of the bound, by the likelihood of these masks.
@pytest.mark.parametrize(
    ("length", "shape", "most"),
    [(384, 1.5, 0.986), (1536, 4.0, 0.993), (1536, 1.5, 0.966), (1536, 0.5, 0.893), (1536, 0.1, 0.672)],
)
@pytest.mark.parametrize("turned", [False, True])
def test_uneven_rows_or_columns_cost_less_than_independent_entries(length, shape, most, turned):
    mask = uneven(384, length, 0.01, shape, seed=0)
    mask = mask.T if turned else mask
    data = encode(mask, mask.shape[1])
    assert len(data) <= most * bound(mask.size, mask.sum())
    assert np.array_equal(decode(data, mask.size, mask.shape[1]).reshape(mask.shape), mask)


@pytest.mark.parametrize(("rows", "row"), [(768, 768), (1536, 384), (384, 1536)])
@pytest.mark.parametrize("density", [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.385, 0.45, 0.5])
def test_independent_entries_stay_near_the_shannon_bound(rows, row, density):
    mask = exactly(ATTENTION, density)
    limit = bound(ATTENTION, mask.sum())
    by_rows, flat = encode(mask, row), encode(mask)
    assert len(flat) <= (1.02 if 0.005 <= density <= 0.1 else 1.05) * limit
    assert len(by_rows) <= (1.01 if 0.002 <= density <= 0.385 else 1.03) * limit
    assert np.array_equal(decode(by_rows, ATTENTION, row), mask)


ROWS_CODE = bytes.fromhex("c09b62bfff708e13c1552533e4a59b0597c278f69c1ed36fff61990f273d9239ac6dca")


def test_the_bytes_by_rows_are_pinned():
    i, j = np.mgrid[:32, :48]
    mask = (i % 8 == 0) & ((j**3 + i * j) % 7 < 3)
    assert encode(mask, 48) == ROWS_CODE
    assert np.array_equal(decode(ROWS_CODE, mask.size, 48), mask.reshape(-1))
    # Turned, it is the same but for one bit of the head.
    assert encode(mask.T, 32) == bytes([ROWS_CODE[0] | 32]) + ROWS_CODE[1:]


def test_the_bytes_of_two_segments_a_row_are_pinned():
    i, j = np.mgrid[:16, :96]
    data = encode((i % 5 == 0) & ((j**3 + i * j) % 7 < 3), 96).hex()
    assert data[:50] == "c01bd0014ffa307cc1d7d27a21a1ffeef456b24f318d139c2f"
    assert data[50:] == "fb2257f45d22c420e16f4d0f247a18aaf661399cd3ef1c7a71b44d1433b3f0c1e8"


@settings(deadline=None, max_examples=400)
@given(matrices, st.data())
def test_altered_bytes_by_rows_are_refused_or_are_another_masks_encoding(mask, data):
    row = mask.shape[1]
    altered = bytearray(encode(mask, row))
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    accepts_only_what_encode_writes(bytes(altered), mask.size, row)


def mutated(data: bytes, generator: np.random.Generator) -> bytes:
    """The bytes with one bit turned, a byte of the head replaced, an end cut off or added, or a part moved."""
    out = bytearray(data)
    at = int(generator.integers(len(out)))
    match int(generator.integers(5)):
        case 0:
            out[at] ^= 1 << int(generator.integers(8))
        case 1:
            out[at % 6 % len(out)] = int(generator.integers(256))
        case 2:
            out = out[:at]
        case 3:
            out += generator.bytes(int(generator.integers(1, 20)))
        case _:
            out = out[at:] + out[:at]
    return bytes(out)


def test_two_thousand_mutations_are_refused_or_decode_to_the_declared_size():
    generator = np.random.default_rng(0)
    forms = set()
    for turn in range(2000):
        rows, row = (int(number) for number in generator.integers(1, 120, 2))
        density, shape = (float(generator.choice(found)) for found in ([0.01, 0.05, 0.2, 0.6], [0.3, 1.0, 50.0]))
        mask = uneven(rows, row, density, shape, seed=turn)
        data = encode(mask, row)
        forms.add(data[0] >> 6)
        accepts_only_what_encode_writes(mutated(data, generator), mask.size, row if turn % 8 else None)
    assert forms == {0, 1, 2, 3}


@settings(deadline=None, max_examples=400)
@given(st.binary(max_size=300), st.integers(1, 60), st.integers(1, 60), st.integers(0, 63), st.integers(0, 191))
def test_arbitrary_bytes_by_rows_are_refused_or_are_a_masks_encoding(tail, rows, row, shape, second):
    accepts_only_what_encode_writes(bytes([192 | shape, second]) + tail, rows * row, row)


@pytest.mark.parametrize("head", [b"\xc0\x3f\x01", b"\xdf\x3f\xd0\x86\x0e", b"\xe0\x7f\xd0\x86\x0e"])
@pytest.mark.parametrize("length", [40, 3_000, 70_000])
def test_what_hostile_bytes_take_is_bounded_by_the_declared_size(head, length):
    data = head + np.random.default_rng(1).bytes(length)
    decode(encode(exactly(ATTENTION, 0.1), 768), ATTENTION, 768)  # so that tables kept for good are not counted
    tracemalloc.start()
    try:
        with pytest.raises(RunError):
            decode(data, ATTENTION, 768)
        assert tracemalloc.get_traced_memory()[1] < 20 * ATTENTION
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "row", "message"),
    [
        (ROWS_CODE, None, "mode 3 is none of 0, 1, 2, and the other needs the length of a row"),
        (ROWS_CODE[:1], 48, "no varint"),
        (ROWS_CODE[:2] + b"\x00" + ROWS_CODE[3:], 48, "0 entries of 1536 by rows"),
        (ROWS_CODE[:2] + b"\xe7\x04" + ROWS_CODE[3:], 48, "615 entries of 1536 by rows"),
        (ROWS_CODE[:1] + b"\xbf" + ROWS_CODE[2:], 48, "counts to 64, 4 rows a coder, for 32 rows of 48"),
        (ROWS_CODE, 1536, "4 rows a coder, for 1 rows of 1536"),
        (ROWS_CODE, 1, "counts to 28"),
        (ROWS_CODE[:12], 48, "72 bits where at least 128"),
        (ROWS_CODE[:-1], 48, "bits where"),
        (ROWS_CODE + b"\x00", 48, "bits too many"),
        (ROWS_CODE[:-1] + b"\xcb", 48, "padding bits"),
        (ROWS_CODE[:2] + b"\x61" + ROWS_CODE[3:], 48, "97, to 28, are announced"),
        (b"\xe0" + ROWS_CODE[1:], 32, None),
        (b"\xc1" + ROWS_CODE[1:], 48, None),
        (ROWS_CODE, 96, None),
    ],
)
def test_hostile_bytes_by_rows_are_refused_with_what_was_found(data, row, message):
    if message is None:
        accepts_only_what_encode_writes(data, 1536, row)
        return
    with pytest.raises(RunError, match=message):
        decode(data, 1536, row)


def test_a_flat_encoding_is_read_whether_or_not_a_row_is_given():
    mask = uneven(384, 384, 0.01, 1.0, seed=0)
    assert encode(mask, 384)[0] >> 6 == 3 and encode(mask)[0] >> 6 == 1
    assert np.array_equal(decode(encode(mask), mask.size, 384), decode(encode(mask, 384), mask.size, 384))


@pytest.mark.parametrize("row", [0, -4, 3, 17])
def test_rows_that_do_not_make_up_the_mask_are_refused(row):
    with pytest.raises(ConfigError, match=f"Rows of {row} do not make up 16 entries"):
        encode(np.zeros(16, dtype=np.bool_), row)
    with pytest.raises(ConfigError, match=f"Rows of {row} do not make up 16 entries"):
        decode(b"\x40\x00", 16, row)
