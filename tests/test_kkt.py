import pytest
import torch
from torch import Tensor

from hf_cl.masks.select import topk_mask
from hf_cl.starts.kkt import MOST_CANDIDATES, choose, knn_accuracy, nearest_tasks, scores_from_mask

CLASSES, TEXTS, WIDTH = 4, 240, 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_of(seed: int = 0, count: int = TEXTS, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (count,), generator=seeded(seed))


def clusters(labels: Tensor, distance: float, seed: int = 1) -> Tensor:
    """Features whose classes lie `distance` apart in units of their spread."""
    centres = torch.eye(WIDTH)[labels % WIDTH] * distance
    return centres + torch.randn(len(labels), WIDTH, generator=seeded(seed))


def choice_among(features: dict[int | None, Tensor], labels: Tensor, k: int = 10, classes: int = CLASSES):
    tasks = [task for task in features if task is not None]
    return choose(features.__getitem__, labels, tasks, classes=classes, k=k, generator=seeded())


# --- candidates ---------------------------------------------------------------------------------


def test_candidates_are_the_nearest_means_and_at_most_three():
    means = {task: torch.tensor([float(place), 0.0]) for task, place in enumerate([9, 1, 5, 2, 8, 3, 7, 4, 6, 0, 10])}
    assert nearest_tasks(torch.zeros(2), means) == [9, 1, 3]
    assert len(means) > MOST_CANDIDATES == 3
    assert nearest_tasks(torch.tensor([10.0, 0.0]), means, most=2) == [10, 0]


def test_equal_distances_go_to_the_smaller_number_whatever_the_order():
    means = {5: torch.tensor([1.0]), 2: torch.tensor([-1.0]), 3: torch.tensor([1.0])}
    assert nearest_tasks(torch.zeros(1), means, most=2) == [2, 3]
    assert nearest_tasks(torch.zeros(1), dict(reversed(means.items())), most=2) == [2, 3]


def test_a_first_task_has_no_candidates():
    assert nearest_tasks(torch.zeros(2), {}) == []
    labels = labels_of()
    assert choice_among({None: clusters(labels, 3.0)}, labels).source is None


# --- the vote -----------------------------------------------------------------------------------


def test_separate_classes_are_all_recognised_and_only_a_third_is_asked():
    labels = labels_of()
    assert knn_accuracy(clusters(labels, 100.0), labels, 10, seeded()) == 1.0
    accuracy = knn_accuracy(clusters(labels, 1.0), labels, 10, seeded())
    assert accuracy * int(TEXTS * 0.34) == pytest.approx(round(accuracy * 81))


def test_random_labels_are_recognised_as_often_as_chance_has_it():
    found = [knn_accuracy(clusters(labels_of(), 3.0), labels_of(seed), 10, seeded()) for seed in range(1, 21)]
    # 20 times 81 texts at chance .25: a standard deviation of .0108; four of them.
    assert abs(sum(found) / len(found) - 1 / CLASSES) < 4 * 0.0108


def test_ties_of_the_vote_go_to_the_smallest_label():
    # Everything lies in one place: three known texts with the labels 2, 1, 0 vote once each.
    features, labels = torch.zeros(9, 2), torch.tensor([2, 1, 0] * 3)
    split = torch.randperm(9, generator=seeded())
    asked, known = split[:3], split[3:]
    assert labels[known].bincount().tolist() != [6]
    accuracy = knn_accuracy(features, labels, 3, seeded())
    near = torch.cdist(features[asked], features[known]).topk(3, largest=False).indices
    by_hand = [
        min(sorted(row), key=lambda label, row=row: (-row.count(label), label)) for row in labels[known][near].tolist()
    ]
    assert accuracy == sum(a == b for a, b in zip(by_hand, labels[asked].tolist(), strict=True)) / 3


def test_more_neighbours_than_a_third_are_cut_to_a_third():
    labels = labels_of(count=30, classes=2)
    features = clusters(labels, 1.0)
    accuracies = {k: knn_accuracy(features, labels, k, seeded()) for k in (1, 10, 11, 20, 10_000)}
    assert accuracies[10] == accuracies[11] == accuracies[20] == accuracies[10_000]
    # A vote of all 20 known texts would give every asked text one label.
    split = torch.randperm(30, generator=seeded())
    everyone = labels[split[10:]].mode().values
    assert accuracies[10_000] > (labels[split[:10]] == everyone).float().mean().item()


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_a_handful_of_texts_is_enough_to_ask(count):
    accuracy = knn_accuracy(torch.randn(count, 3, generator=seeded()), torch.arange(count) % 2, 10, seeded())
    assert 0.0 <= accuracy <= 1.0


def test_more_texts_than_a_block_give_the_same_accuracy(monkeypatch):
    labels = labels_of()
    features = clusters(labels, 1.0)
    whole = knn_accuracy(features, labels, 5, seeded())
    monkeypatch.setattr("hf_cl.starts.kkt._BLOCK", 7)
    assert knn_accuracy(features, labels, 5, seeded()) == whole


# --- the choice ---------------------------------------------------------------------------------


def test_a_task_of_the_same_data_is_chosen():
    labels = labels_of()
    features = {None: clusters(labels, 1.0), 0: clusters(labels_of(5), 6.0), 1: clusters(labels, 6.0)}
    features[2] = clusters(labels, 2.0)
    choice = choice_among(features, labels)
    assert choice.source == 1
    assert choice.accuracies[1] > choice.accuracies[2] > choice.base > choice.chance == 1 / CLASSES


def test_the_bare_base_keeps_a_task_fresh_when_it_sees_the_task_better():
    labels = labels_of()
    choice = choice_among({None: clusters(labels, 6.0), 0: clusters(labels, 2.0)}, labels)
    assert choice.source is None
    assert choice.base > choice.accuracies[0] > 2 * choice.chance


def test_an_equal_to_the_bare_base_is_no_source():
    labels = labels_of()
    features = clusters(labels, 2.0)
    choice = choice_among({None: features, 0: features * 2, 1: features.clone()}, labels)
    assert choice.source is None and set(choice.accuracies.values()) == {choice.base}


def test_a_candidate_below_chance_is_no_source_though_it_beats_the_base():
    labels = torch.arange(TEXTS) % 2
    # Each text lies on a twin of the other class; a candidate tells a quarter of them apart.
    twins = torch.arange(TEXTS).div(2, rounding_mode="floor").float().mul(10)[:, None].expand(TEXTS, WIDTH)
    better = twins.clone()
    better[: TEXTS // 4] = (1e4 * (1 + labels[: TEXTS // 4]))[:, None].float()
    choice = choice_among({None: twins, 0: better}, labels, k=1, classes=2)
    assert choice.base < choice.accuracies[0] < choice.chance and choice.source is None


def test_random_labels_start_fresh():
    # Three unrelated candidates, labels that mean nothing: whatever beats the base does so by luck.
    fresh = 0
    for seed in range(20):
        features = {
            task: torch.randn(TEXTS, WIDTH, generator=seeded(100 * seed + (task or 0))) for task in (None, 1, 2, 3)
        }
        fresh += choice_among(features, labels_of(seed + 50)).source is None
    assert fresh >= 18


def test_equal_candidates_go_to_the_smallest_number_whatever_the_order():
    labels = labels_of()
    features = {None: clusters(labels, 0.5), 7: clusters(labels, 6.0), 4: clusters(labels, 6.0)}
    assert choice_among(features, labels).source == 4
    assert choice_among(dict(reversed(features.items())), labels).source == 4


def test_every_candidate_is_asked_on_the_same_split_and_a_choice_repeats():
    labels = labels_of()
    one = clusters(labels, 1.5)
    choice = choice_among({None: one, 0: one, 1: one, 2: one}, labels)
    assert set(choice.accuracies.values()) == {choice.base}
    assert choice == choice_among({None: one, 0: one, 1: one, 2: one}, labels)


def test_the_recorded_accuracies_are_those_of_the_vote():
    labels = labels_of()
    features = {None: clusters(labels, 1.0), 3: clusters(labels, 2.0)}
    choice = choice_among(features, labels, k=5)
    assert choice.base == knn_accuracy(features[None], labels, 5, seeded())
    assert choice.accuracies == {3: knn_accuracy(features[3], labels, 5, seeded())}


def test_asking_changes_no_feature_and_no_label():
    labels = labels_of()
    features = {None: clusters(labels, 1.0), 0: clusters(labels, 3.0)}
    before = {task: tensor.clone() for task, tensor in features.items()} | {"labels": labels.clone()}
    choice_among(features, labels)
    assert all(torch.equal(tensor, before[task]) for task, tensor in features.items())
    assert torch.equal(labels, before["labels"])


# --- the start ----------------------------------------------------------------------------------


def fresh_scores(magnitude: bool) -> Tensor:
    scores = torch.randn(40, 50, generator=seeded(2)) * 1e-4
    return (torch.rand(40, 50, generator=seeded(2)) * 2 - 1) / 50**0.5 if magnitude else scores


@pytest.mark.parametrize("margin", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("magnitude", [False, True])
def test_the_first_mask_is_the_sources(magnitude, margin):
    fresh = fresh_scores(magnitude)
    source = topk_mask(torch.randn(40, 50, generator=seeded(3)), 100)
    scores = scores_from_mask(fresh, source, margin, magnitude=magnitude)
    assert torch.equal(topk_mask(scores, 100, magnitude=magnitude), source)


@pytest.mark.parametrize("magnitude", [False, True])
def test_a_kept_score_stands_at_least_a_margin_above_all_others(magnitude):
    fresh, margin = fresh_scores(magnitude), 1e-3
    source = topk_mask(torch.randn(40, 50, generator=seeded(3)), 100)
    scores = scores_from_mask(fresh, source, margin, magnitude=magnitude)
    rank = scores.abs() if magnitude else scores
    # One unit in the last place of float32 for the sum that was rounded.
    assert rank[source].min() - rank[~source].max() >= margin * (1 - 1e-4)


def test_scores_of_equal_value_and_zeros_of_both_signs_start_at_the_sources_mask():
    source = torch.tensor([False, True, False, True])
    for fresh in (torch.zeros(4), torch.tensor([0.0, -0.0, 0.5, -0.5])):
        for magnitude in (False, True):
            scores = scores_from_mask(fresh, source, 1e-3, magnitude=magnitude)
            assert torch.equal(topk_mask(scores, 2, magnitude=magnitude), source)


@pytest.mark.parametrize("magnitude", [False, True])
def test_an_entry_outside_the_mask_keeps_its_fresh_score_and_inputs_stay(magnitude):
    fresh = fresh_scores(magnitude)
    source = topk_mask(torch.randn(40, 50, generator=seeded(3)), 100)
    before, source_before = fresh.clone(), source.clone()
    scores = scores_from_mask(fresh, source, 1e-3, magnitude=magnitude)
    assert torch.equal(scores[~source], fresh[~source])
    assert torch.equal(fresh, before) and torch.equal(source, source_before)


@pytest.mark.parametrize(("magnitude", "steps"), [(False, 4), (True, 200)])
def test_the_margin_is_small_enough_to_move(magnitude, steps):
    # An Adam step moves a score by the rate at most, and the margin here is one step. Every kept score goes
    # down and every other one up; signed scores lie within one step of 0, magnitudes within .14.
    rate, source = 1e-3, topk_mask(torch.randn(40, 50, generator=seeded(3)), 100)
    scores = scores_from_mask(fresh_scores(magnitude), source, rate, magnitude=magnitude)
    direction = torch.where(source, -1.0, 1.0) * (scores.sign() if magnitude else 1.0)
    moved = topk_mask(scores + steps * rate * direction, 100, magnitude=magnitude)
    assert not bool((moved & source).any())
