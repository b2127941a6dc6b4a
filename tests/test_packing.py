"""WSN's packing of several tasks' masks, as scripts/bench_packing.py measures it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "scripts" / "bench_packing.py"


@pytest.fixture(scope="module")
def packing():
    spec = importlib.util.spec_from_file_location("bench_packing", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(tasks, size=300, density=0.2):
    return [np.random.default_rng(task).random(size) < density for task in range(tasks)]


def test_the_first_task_is_the_lowest_bit(packing):
    masks = [np.array([1, 0], np.bool_), np.array([1, 1], np.bool_)]
    assert packing.words_of(masks).tolist() == [3, 2]
    assert packing.words_of(masks[::-1]).tolist() == [3, 1]


@pytest.mark.parametrize("tasks", range(1, 8))
def test_words_and_codes_give_the_masks_back(packing, tasks):
    masks = drawn(tasks)
    words = packing.words_of(masks)
    data = packing.encode(words, tasks)
    again = packing.decode(data, words.size, tasks)
    assert np.array_equal(again, words)
    assert all(map(np.array_equal, packing.masks_of(again, tasks), masks))


def test_one_word_alone_has_a_code_of_one_bit(packing):
    words = np.full(20, 5, np.uint8)
    data = packing.encode(words, 3)
    assert len(data) == 8 + 3
    assert np.array_equal(packing.decode(data, 20, 3), words)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5])
def test_the_mean_length_is_within_a_bit_of_the_entropy(packing, density):
    words = packing.words_of(drawn(7, 20000, density))
    lengths = packing.code_lengths(np.bincount(words, minlength=128))
    assert sum(2.0**-length for length in lengths if length) == 1, "Kraft"
    mean, entropy = lengths[words].mean(), packing.entropy_bytes(words) * 8 / words.size
    assert entropy <= mean < entropy + 1


def test_sizes_count_the_book_and_more_than_seven_tasks_make_groups(packing):
    masks = drawn(9, 64 * 64)
    found = packing.measure([[mask.reshape(64, 64)] for mask in masks])
    sizes = [len(packing.encode(packing.words_of(group), len(group))) for group in (masks[:7], masks[7:])]
    assert found["words_huffman"] == round(sum(sizes) / 9)
    assert sizes[0] > 128
    assert found["packed_bits"] == 512
    assert found["tasks"] == 9
