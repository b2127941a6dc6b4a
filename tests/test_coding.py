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


def accepts_only_what_encode_writes(data: bytes, size: int) -> None:
    try:
        mask = decode(data, size)
    except RunError:
        return
    assert mask.shape == (size,) and mask.dtype == np.bool_
    assert encode(mask) == data


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
    kept = round(density * ATTENTION)
    mask = np.zeros(ATTENTION, dtype=np.bool_)
    mask[np.random.default_rng(0).choice(ATTENTION, size=kept, replace=False)] = True
    bound = -ATTENTION * (density * np.log2(density) + (1 - density) * np.log2(1 - density)) / 8
    assert len(encode(mask)) <= 1.05 * bound
    assert len(encode(~mask)) <= 1.05 * bound
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
