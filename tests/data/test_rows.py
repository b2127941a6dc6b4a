import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_cl.data.rows import carve, share_out, stratified

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0)


@given(COUNTS, st.data())
def test_shares_sum_to_the_size_and_never_exceed_a_class(counts, data):
    size = data.draw(st.integers(0, sum(counts)))
    shares = share_out(np.array(counts), size)
    assert int(shares.sum()) == size
    assert all(0 <= share <= count for share, count in zip(shares, counts, strict=True))


@given(COUNTS, st.data())
def test_every_class_gets_a_row_where_the_size_allows_it(counts, data):
    classes = sum(count > 0 for count in counts)
    size = data.draw(st.integers(classes, sum(counts)))
    shares = share_out(np.array(counts), size)
    assert all(share >= 1 for share, count in zip(shares, counts, strict=True) if count)


def test_shares_are_proportional_and_ties_go_to_the_lower_class():
    assert share_out(np.array([60, 30, 10]), 10).tolist() == [6, 3, 1]
    assert share_out(np.array([5, 5, 5]), 4).tolist() == [2, 1, 1]
    assert share_out(np.array([98, 1, 1]), 5).tolist() == [3, 1, 1]


def test_one_seed_always_gives_the_same_rows_and_another_seed_others():
    labels = np.arange(200) % 4
    first = stratified(labels, 20, (0, 0))
    assert first.tolist() == stratified(labels, 20, (0, 0)).tolist()
    assert first.tolist() != stratified(labels, 20, (1, 0)).tolist()
    assert first.tolist() == sorted(set(first.tolist()))
    assert np.bincount(labels[first]).tolist() == [5, 5, 5, 5]


def test_a_size_above_the_rows_takes_all_of_them_in_order():
    assert stratified(np.array([1, 0, 1]), 9, (0, 0)).tolist() == [0, 1, 2]
    assert stratified(np.array([1, 0, 1]), None, (0, 0)).tolist() == [0, 1, 2]


def test_carving_parts_all_rows_into_nine_and_one_tenth_of_each_class():
    labels = np.arange(100) % 2
    large, small = carve(labels, (0, 1))
    assert sorted([*large.tolist(), *small.tolist()]) == list(range(100))
    assert np.bincount(labels[small]).tolist() == [5, 5]


def test_carving_leaves_the_only_row_of_a_class_where_it_is():
    large, small = carve(np.array([0, 0, 1]), (0, 1))
    assert 2 in large.tolist()
    assert len(small) == 1
    assert carve(np.array([0, 1]), (0, 1))[1].tolist() == []
