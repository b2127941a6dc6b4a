import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cl.errors import ConfigError
from hf_cl.masks.select import TOLERANCE, kept_count, refresh_masks, topk_mask

ATTENTION = 589_824  # one 768 x 768 linear layer
SIZES = (1, 7, 64, 300, 5_000, 65_536, 70_001)  # the last one is large enough to be sampled
DENSITIES = (0.005, 0.02, 0.1, 0.5, 0.95)


def by_sorting(scores: torch.Tensor, count: int, magnitude: bool) -> list[int]:
    """The kept positions by a stable sort of Python numbers."""
    values = [abs(value) if magnitude else value for value in scores.flatten().tolist()]
    return sorted(sorted(range(len(values)), key=lambda place: -values[place])[:count])


def kept(mask: torch.Tensor) -> list[int]:
    return mask.flatten().nonzero().squeeze(1).tolist()


def empty_masks(scores: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(score, dtype=torch.bool) for score in scores]


def unset(layers: int) -> torch.Tensor:
    return torch.full((layers,), math.nan)


def within_budget(masks: list[torch.Tensor], counts: list[int]) -> bool:
    return all(abs(int(mask.sum()) - count) <= TOLERANCE * count for mask, count in zip(masks, counts, strict=True))


@pytest.mark.parametrize(
    ("size", "density", "count"),
    [
        (10, 0.1, 1),
        (10, 0.5, 5),
        (9, 0.5, 5),  # half rounds up
        (11, 0.5, 6),
        (10, 0.9, 9),  # the papers' float formula keeps 10
        (5, 0.8, 4),  # and here 5
        (100, 0.1, 10),
        (ATTENTION, 0.1, 58_982),  # and here 58,983
        (ATTENTION, 0.005, 2_949),
        (2_359_296, 0.02, 47_186),
        (100, 0.005, 1),  # exactly half of one
        (1000, 0.0005, 1),
        (10, 0.25, 3),  # 2.5, not to even
        (10, 0.15, 2),
        (100, 0.285, 29),  # 28.5, a float product gives 28.499999999999996
        (10, 1e-9, 1),
        (1, 0.5, 1),
        (1, 0.01, 1),
        (7, 1, 7),
        (7, 1.0, 7),
        (ATTENTION, 1.0, ATTENTION),
        (3, 0.9999999, 3),
    ],
)
def test_a_density_keeps_this_many(size, density, count):
    assert kept_count(size, density) == count


@given(size=st.integers(1, 10**9), thousandths=st.integers(1, 1000))
def test_the_kept_count_is_rounded_half_up_in_integers(size, thousandths):
    assert kept_count(size, thousandths / 1000) == max(1, (2 * thousandths * size + 1000) // 2000)


@given(size=st.integers(1, 10**7), density=st.floats(0, 1, exclude_min=True))
def test_a_layer_keeps_at_least_one_entry_and_at_most_all(size, density):
    assert 1 <= kept_count(size, density) <= size


@pytest.mark.parametrize("density", [0, 0.0, -1, -0.1, 1.01, 2, math.nan, math.inf, -math.inf])
def test_a_density_that_is_no_share_is_refused(density):
    with pytest.raises(ConfigError, match=r"density: expected a share in \(0, 1\]"):
        kept_count(100, density)


@settings(deadline=None)
@given(
    scores=st.lists(st.integers(-3, 3), min_size=1, max_size=60),
    share=st.floats(0, 1),
    magnitude=st.booleans(),
)
def test_the_top_k_are_exact_and_ties_go_to_the_first(scores, share, magnitude):
    scores = torch.tensor(scores, dtype=torch.float32)
    count = max(1, round(share * scores.numel()))
    mask = topk_mask(scores, count, magnitude=magnitude)
    assert mask.dtype == torch.bool
    assert kept(mask) == by_sorting(scores, count, magnitude)


def test_magnitude_ranks_by_the_absolute_score():
    scores = torch.tensor([[-4.0, 1.0], [3.0, -2.0]])
    assert topk_mask(scores, 2).tolist() == [[False, True], [True, False]]
    assert topk_mask(scores, 2, magnitude=True).tolist() == [[True, False], [True, False]]


def test_zeros_of_both_signs_are_ties():
    assert topk_mask(torch.tensor([0.0, -0.0, 0.0, -0.0]), 2).tolist() == [True, True, False, False]


def test_a_selection_changes_no_score():
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    topk_mask(scores, 3, magnitude=True)
    refresh_masks([scores], empty_masks([scores]), unset(1), [3], magnitude=True)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("density", DENSITIES)
def test_every_layer_keeps_to_its_budget_at_every_step(density, magnitude):
    generator = torch.Generator().manual_seed(0)
    # Signed scores begin far below one step, magnitudes at +-1/sqrt(fan_in): as a new task's do.
    scores = [torch.randn(size, generator=generator) * 1e-4 for size in SIZES]
    if magnitude:
        scores = [torch.rand(size, generator=generator) / 14 - 1 / 28 for size in SIZES]
    counts = [kept_count(size, density) for size in SIZES]
    masks, thresholds = empty_masks(scores), unset(len(SIZES))
    # Adam's step is the rate times something in -1 to 1: a direction an entry keeps, and noise.
    drift = [torch.rand(size, generator=generator) * 2 - 1 for size in SIZES]
    noise = [[torch.randn(size, generator=generator) * 0.5 for size in SIZES] for _ in range(5)]
    for step in range(200):
        refresh_masks(scores, masks, thresholds, counts, magnitude=magnitude)
        assert within_budget(masks, counts), f"step {step}: {[int(mask.sum()) for mask in masks]} for {counts}"
        for score, steady, loud in zip(scores, drift, noise[step % 5], strict=True):
            score.add_((steady + loud).clamp_(-1, 1), alpha=1e-3 * (1 - step / 200))


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("density", DENSITIES)
def test_an_unset_threshold_selects_what_sorting_selects(density, magnitude):
    generator = torch.Generator().manual_seed(1)
    # Distinct scores: a permutation of as many steps, half of them negative, no two of one magnitude.
    scores = [(torch.randperm(size, generator=generator) - 0.3 * size).float() + 0.25 for size in SIZES]
    counts = [kept_count(size, density) for size in SIZES]
    masks, thresholds = empty_masks(scores), unset(len(SIZES))
    assert refresh_masks(scores, masks, thresholds, counts, magnitude=magnitude) == len(SIZES)
    for score, mask, count in zip(scores, masks, counts, strict=True):
        assert torch.equal(mask, topk_mask(score, count, magnitude=magnitude))
    assert not thresholds.isnan().any()
    assert refresh_masks(scores, masks, thresholds, counts, magnitude=magnitude) == 0


def test_an_unset_threshold_selects_exactly_between_ties_too():
    scores = torch.cat([torch.arange(97) + 1.0, torch.zeros(903)])  # three of the hundred are among ties
    mask, thresholds = torch.zeros(1000, dtype=torch.bool), unset(1)
    refresh_masks([scores], [mask], thresholds, [100])
    assert int(mask.sum()) == 100 and bool(mask[:100].all())


@settings(deadline=None)
@given(
    layers=st.lists(st.lists(st.integers(-2, 2), min_size=1, max_size=50), min_size=1, max_size=4),
    density=st.floats(0, 1, exclude_min=True),
    magnitude=st.booleans(),
)
def test_ties_never_take_a_layer_out_of_its_budget(layers, density, magnitude):
    scores = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    counts = [kept_count(score.numel(), density) for score in scores]
    masks, thresholds = empty_masks(scores), unset(len(scores))
    for _ in range(2):
        refresh_masks(scores, masks, thresholds, counts, magnitude=magnitude)
        assert within_budget(masks, counts)


@pytest.mark.parametrize("size", [3, 1000, 70_001])
@pytest.mark.parametrize("density", [0.005, 0.1, 0.95, 1.0])
def test_scores_that_are_all_alike_keep_the_first_entries(size, density):
    scores, count = torch.zeros(size), kept_count(size, density)
    masks, thresholds = empty_masks([scores]), unset(1)
    for _ in range(3):
        refresh_masks([scores], masks, thresholds, [count])
        assert kept(masks[0]) == list(range(count))


@pytest.mark.parametrize("order", ["rising", "falling", "striped"])
def test_a_large_layer_in_an_order_that_fools_the_sample_is_exact(order):
    # The sample takes every 19th entry; "striped" puts all large scores between those.
    size, count = 19 * 4096, 400
    scores = torch.arange(size, dtype=torch.float32)
    if order == "falling":
        scores = scores.flip(0)
    if order == "striped":
        scores = scores.where(torch.arange(size) % 19 != 0, scores - size)
    masks, thresholds = empty_masks([scores]), unset(1)
    refresh_masks([scores], masks, thresholds, [count])
    assert torch.equal(masks[0], topk_mask(scores, count))


def test_a_sample_above_all_that_is_wanted_falls_back_to_the_whole_layer():
    # Every sampled entry ties at the top, so nothing exceeds the sample's bound.
    size, count = 19 * 4096, 3000
    scores = torch.from_numpy(np.random.default_rng(0).permutation(size).astype(np.float32))
    scores[::19] = size
    masks, thresholds = empty_masks([scores]), unset(1)
    refresh_masks([scores], masks, thresholds, [count])
    assert within_budget(masks, [count])
    assert bool((masks[0] == topk_mask(scores, count)).all())


def test_a_full_layer_stays_full_and_is_renewed_once():
    scores = [torch.randn(50, generator=torch.Generator().manual_seed(0))]
    masks, thresholds = empty_masks(scores), unset(1)
    assert [refresh_masks(scores, masks, thresholds, [50]) for _ in range(3)] == [1, 0, 0]
    assert masks[0].all() and thresholds.tolist() == [-math.inf]


def test_scores_that_move_little_renew_no_threshold():
    generator = torch.Generator().manual_seed(2)
    scores = [torch.randn(size, generator=generator) for size in (50_000, 100_000)]
    counts = [kept_count(score.numel(), 0.02) for score in scores]
    masks, thresholds = empty_masks(scores), unset(2)
    renewed = []
    for _ in range(200):
        renewed.append(refresh_masks(scores, masks, thresholds, counts))
        for score in scores:
            score.add_(torch.randn(score.shape, generator=generator), alpha=1e-3)
    # A walk of 200 steps of .001 moves a score by .014; 5 % of the kept lie within .021 of the threshold.
    assert renewed[0] == 2 and sum(renewed[1:]) == 0


def test_a_threshold_is_renewed_once_for_each_five_percent_that_cross_it():
    scores = torch.randn(50_000, generator=torch.Generator().manual_seed(3))
    masks, thresholds, count = empty_masks([scores]), unset(1), 1_000
    start, renewed = scores.clone(), 0
    for step in range(201):
        scores.copy_(start + step * 1e-3)
        renewed += refresh_masks([scores], masks, thresholds, [count])
    # All rise by .2 together. Each 5 % more above the old threshold renews it; a renewal can only lower
    # the count to the budget, so there are at most (all that cross) / (5 % of the budget), and the first.
    highest = start.sort(descending=True).values
    crossing = int((start + 0.2 > highest[count]).sum()) - count
    assert 1 < renewed <= 1 + crossing / (TOLERANCE * count)


def test_only_the_layer_that_left_its_budget_is_renewed():
    generator = torch.Generator().manual_seed(4)
    scores = [torch.randn(1000, generator=generator) for _ in range(3)]
    masks, thresholds, counts = empty_masks(scores), unset(3), [100, 100, 100]
    refresh_masks(scores, masks, thresholds, counts)
    before = thresholds.clone()
    scores[1].add_(1.0)
    assert refresh_masks(scores, masks, thresholds, counts) == 1
    assert (thresholds != before).tolist() == [False, True, False]
