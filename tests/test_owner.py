import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_cl.errors import OwnershipError
from hf_cl.masks.overlap import overlap_share
from hf_cl.ownership.owner import FOREIGN, FREE, MOST_TASKS, all_free, claim, free_share

SIZE = 12
streams = st.lists(st.lists(st.booleans(), min_size=SIZE, max_size=SIZE), min_size=1, max_size=6).map(
    lambda masks: [torch.tensor(mask).view(3, 4) for mask in masks]
)


def cells(*marks: str) -> list[torch.Tensor]:
    return [torch.tensor([mark == "1" for mark in row]) for row in marks]


def owners(masks: list[torch.Tensor]) -> list[torch.Tensor]:
    """The owner map before the first task and after each."""
    maps = [all_free(tuple(masks[0].shape))]
    for task, mask in enumerate(masks):
        maps.append(claim(maps[-1], mask, task))
    return maps


def test_a_new_map_has_no_owner():
    owner = all_free((2, 3))
    assert owner.dtype == torch.int16 and owner.tolist() == [[FREE] * 3] * 2
    assert free_share(owner) == 1.0


def test_a_claim_never_takes_what_another_task_owns():
    first = claim(all_free((1, 3)), torch.tensor([[True, True, False]]), 0)
    second = claim(first, torch.tensor([[False, True, True]]), 1)
    assert second.tolist() == [[0, 0, 1]]


@given(streams)
def test_an_owned_entry_keeps_its_owner_for_ever(masks):
    maps = owners(masks)
    for before, after in itertools.pairwise(maps):
        assert torch.equal(after[before != FREE], before[before != FREE])


@given(streams)
def test_the_owner_is_the_first_task_whose_mask_holds_the_entry(masks):
    expected = [next((task for task, mask in enumerate(masks) if mask.view(-1)[entry]), FREE) for entry in range(SIZE)]
    assert owners(masks)[-1].view(-1).tolist() == expected


@given(streams)
def test_what_tasks_may_train_is_disjoint_and_together_all_their_masks(masks):
    last = owners(masks)[-1]
    trainable = torch.stack([last == task for task in range(len(masks))])
    assert int(trainable.sum(dim=0).max()) <= 1
    assert torch.equal(trainable.any(dim=0), torch.stack(masks).any(dim=0))


@given(streams)
def test_a_task_claims_the_entries_of_its_mask_that_were_free(masks):
    maps = owners(masks)
    for task, mask in enumerate(masks):
        assert torch.equal(maps[task + 1] == task, mask & (maps[task] == FREE))


@given(streams)
def test_a_claim_changes_nothing_it_is_given(masks):
    owner = all_free((3, 4))
    for task, mask in enumerate(masks):
        before, mask_before = owner.clone(), mask.clone()
        after = claim(owner, mask, task)
        assert torch.equal(owner, before) and torch.equal(mask, mask_before)
        assert after.dtype == torch.int16 and after.data_ptr() != owner.data_ptr()
        owner = after


@given(streams)
def test_the_free_share_never_grows(masks):
    shares = [free_share(owner) for owner in owners(masks)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == int((~torch.stack(masks).any(dim=0)).sum()) / SIZE


@given(streams)
def test_claiming_twice_claims_nothing_more(masks):
    owner = owners(masks)[-1]
    for task, mask in enumerate(masks):
        assert torch.equal(claim(owner, mask, task), owner)


def test_sparse_overlap_of_three_small_masks():
    masks = cells("1100", "0110", "1011")
    shares, union = [], torch.zeros(4, dtype=torch.bool)
    for mask in masks:
        shares.append(overlap_share(mask, union))
        union = union | mask
    assert shares == [0.0, 0.5, 2 / 3]
    assert owners(masks)[-1].tolist() == [0, 0, 1, 2]


def test_an_empty_mask_overlaps_with_nothing():
    empty, full = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    assert overlap_share(empty, full) == 0.0 and overlap_share(full, empty) == 0.0 and overlap_share(full, full) == 1.0


def test_a_first_task_of_density_one_leaves_nothing_free():
    full = torch.ones(3, 4, dtype=torch.bool)
    owner = claim(all_free((3, 4)), full, 0)
    assert free_share(owner) == 0.0
    assert not bool((claim(owner, full, 1) == 1).any())


def test_an_entry_of_a_task_that_is_not_loaded_is_not_free():
    owner = torch.tensor([FOREIGN, FREE], dtype=torch.int16)
    assert claim(owner, torch.tensor([True, True]), 5).tolist() == [FOREIGN, 5]
    assert free_share(owner) == 0.5


@pytest.mark.parametrize("task", [FREE, FOREIGN, MOST_TASKS + 1, 70_000])
def test_a_number_that_the_map_cannot_hold_is_refused(task):
    with pytest.raises(OwnershipError, match=f"task number {task}: an owner map holds 0 to 32767"):
        claim(all_free((2,)), torch.tensor([True, False]), task)


@pytest.mark.parametrize("task", [0, MOST_TASKS])
def test_the_first_and_the_last_number_fit(task):
    assert claim(all_free((2,)), torch.tensor([True, False]), task).tolist() == [task, FREE]
