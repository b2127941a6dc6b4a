import struct
import sys

import pytest

from hf_cl.errors import ConfigError
from hf_cl.metrics import AccuracyMatrix
from hf_cl.plots import accuracy_heatmap


def lower(count: int) -> AccuracyMatrix:
    """A stream of `count` tasks, each evaluated from when it was learned on, each losing a little."""
    names = [f"task_number_{number}_of_many_tasks" for number in range(count)]
    rows = [[0.9 - 0.02 * (i - j) if j <= i else None for j in range(count)] for i in range(count)]
    return AccuracyMatrix.from_list(names, rows)


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_picture_is_a_png_that_grows_with_the_tasks_and_is_the_same_each_time(tmp_path, count):
    path = tmp_path / "first.png"
    assert accuracy_heatmap(lower(count), path, "A stream") == path
    width, height = png_size(path.read_bytes())
    assert 500 + 80 * count < width < 800 + 140 * count
    assert 300 + 60 * count < height < 500 + 120 * count
    again = accuracy_heatmap(lower(count), tmp_path / "again.png", "A stream")
    assert again.read_bytes() == path.read_bytes()


def test_an_unfinished_stream_without_a_single_value_can_be_drawn(tmp_path):
    matrix = AccuracyMatrix.from_list(["a", "b", "c"], [[None, None, None]])
    assert accuracy_heatmap(matrix, tmp_path / "empty.png", "Nothing yet").is_file()


def test_dollar_signs_are_text_not_mathematics(tmp_path):
    matrix = AccuracyMatrix.from_list(["a$^", "b$_"], [[0.5, None], [0.5, 1.0]])
    assert accuracy_heatmap(matrix, tmp_path / "text.png", "For $5^ or $_").is_file()


def test_the_title_and_the_values_are_in_the_picture(tmp_path):
    one = accuracy_heatmap(lower(2), tmp_path / "one.png", "One").read_bytes()
    assert accuracy_heatmap(lower(2), tmp_path / "two.png", "Two").read_bytes() != one
    other = AccuracyMatrix.from_list(lower(2).names, [[0.9, None], [0.87, 0.9]])
    assert accuracy_heatmap(other, tmp_path / "other.png", "One").read_bytes() != one


def test_no_learned_task_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least one learned task"):
        accuracy_heatmap(AccuracyMatrix(["a"]), tmp_path / "none.png", "None")


def test_a_missing_matplotlib_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r'pip install "hf-cl\[plots\]"'):
        accuracy_heatmap(lower(2), tmp_path / "none.png", "None")


def test_the_callers_settings_stay_as_they_are(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams.copy())
    accuracy_heatmap(lower(2), tmp_path / "two.png", "Two")
    assert dict(matplotlib.rcParams.copy()) == before
