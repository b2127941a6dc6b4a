import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cl.masks.signs import sign_tensor

QUERY = "encoder.layer.0.attention.self.query"
DENSE = "encoder.layer.11.output.dense"
# Computed once by `by_hand` below. A bank stores a seed in place of these signs: they may never change.
FIRST_SIGNS = {
    (0, QUERY): [1, -1, -1, 1, 1, -1, -1, -1, -1, -1, 1, -1, -1, 1, 1, 1],
    (2**31, DENSE): [-1, 1, -1, -1, 1, -1, -1, -1, 1, 1, -1, 1, 1, -1, 1, 1],
}


def by_hand(seed: int, path: str, size: int) -> list[int]:
    """The hash as its docstring says it, in Python integers."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "little")
    signs = []
    for entry in range(size):
        state = (key + (entry // 64 + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
        signs.append(1 if state >> (entry % 64) & 1 else -1)
    return signs


@pytest.mark.parametrize(("seed", "path"), FIRST_SIGNS)
def test_the_first_signs_are_these_literals(seed, path):
    assert sign_tensor(seed, path, (4, 4)).flatten().tolist() == FIRST_SIGNS[seed, path]
    assert by_hand(seed, path, 16) == FIRST_SIGNS[seed, path]


@pytest.mark.parametrize(("seed", "path", "shape"), [(0, QUERY, (13, 11)), (2**31, DENSE, (3, 64))])
def test_signs_follow_the_documented_hash(seed, path, shape):
    signs = sign_tensor(seed, path, shape)
    assert signs.dtype == torch.float32 and tuple(signs.shape) == shape
    assert signs.flatten().tolist() == by_hand(seed, path, shape[0] * shape[1])


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(-(2**40), 2**64), path=st.text(alphabet="a.:7é", max_size=12), size=st.integers(0, 200))
def test_any_seed_and_path_follow_the_documented_hash(seed, path, size):
    assert sign_tensor(seed, path, (size,)).tolist() == by_hand(seed, path, size)


def test_signs_are_plus_and_minus_one_in_equal_parts():
    signs = sign_tensor(0, QUERY, (256, 256))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    # The mean of 65,536 fair signs has a standard deviation of 1/256; four of them.
    assert abs(signs.mean().item()) < 4 / 256


def test_rows_and_columns_are_balanced_too():
    signs = sign_tensor(0, QUERY, (256, 256))
    # 512 means of 256 fair signs, each with a standard deviation of 1/16; five of them hold with p > .999.
    assert signs.mean(dim=0).abs().max() < 5 / 16 and signs.mean(dim=1).abs().max() < 5 / 16


@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (7, 9), (5, 3, 4)])
def test_a_sign_depends_on_the_flat_index_alone(shape):
    long, short = sign_tensor(3, QUERY, (40, 40)).flatten(), sign_tensor(3, QUERY, shape).flatten()
    assert torch.equal(short, long[: short.numel()])


@pytest.mark.parametrize(("seed", "path"), [(1, QUERY), (10, QUERY), (0, DENSE), (0, QUERY + " "), (0, ":" + QUERY)])
def test_another_seed_or_path_gives_other_signs(seed, path):
    ours, other = sign_tensor(0, QUERY, (128, 128)), sign_tensor(seed, path, (128, 128))
    # Independent signs agree on half of 16,384 entries with a standard deviation of 1/256; four of them.
    assert abs((ours == other).float().mean().item() - 0.5) < 4 / 256


def test_calls_share_no_state():
    first = sign_tensor(0, QUERY, (8, 8))
    sign_tensor(1, DENSE, (100, 3))
    first_again = sign_tensor(0, QUERY, (8, 8))
    assert torch.equal(first, first_again) and first.data_ptr() != first_again.data_ptr()


def test_the_global_generator_neither_moves_nor_matters():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    signs = sign_tensor(0, QUERY, (8, 8))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(sign_tensor(0, QUERY, (8, 8)), signs)
