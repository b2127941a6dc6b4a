import pytest
from datasets import Dataset
from transformers import ByT5Tokenizer

from hf_cl.data import TaskSpec, collator, load_task, task_from_datasets, tokenise
from hf_cl.errors import ConfigError

from .conftest import word_tokenizer


def local(folder, **options):
    return load_task(TaskSpec(name="pets", dataset=str(folder), **options))


def files(splits):
    return {split: [file["filename"] for file in rows.cache_files] for split, rows in splits.items()}


def test_rows_become_token_ids_cut_at_the_length_and_not_padded(tokenizer):
    data = Dataset.from_dict({"text": ["one", "one two three four five"], "label": ["a", "b"]})
    task = task_from_datasets("pets", {"train": data, "validation": data, "test": data})
    splits = tokenise(task, tokenizer, 5)
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"][:] == {
        "input_ids": [[2, 8, 3], [2, 8, 9, 10, 3]],
        "token_type_ids": [[0, 0, 0], [0, 0, 0, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 1, 1, 1]],
        "labels": [0, 1],
    }


def test_the_second_text_of_a_pair_has_its_own_type(folder, tokenizer):
    row = tokenise(local(folder(pair=True)), tokenizer, 16)["test"][0]
    assert row["input_ids"] == [2, 5, 1, 3, 7, 1, 3]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_a_tokenizer_without_types_gives_none(folder, tokenizer):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert set(tokenise(local(folder()), tokenizer, 8)["test"].column_names) == {
        "input_ids",
        "attention_mask",
        "labels",
    }


def test_a_second_call_finds_the_first_ones_files(folder, tokenizer):
    path = folder()
    first = files(tokenise(local(path, max_train=6), tokenizer, 8))
    assert all(len(names) == 1 for names in first.values())
    assert files(tokenise(local(path, max_train=6), tokenizer, 8)) == first
    assert files(tokenise(local(path, max_train=6), word_tokenizer(), 8)) == first


def test_padding_and_truncation_of_the_tokenizer_do_not_change_the_files(folder, tokenizer):
    task = local(folder())
    first = files(tokenise(task, tokenizer, 8))
    tokenizer(["one two", "one"], padding="max_length", max_length=4, truncation=True)
    assert files(tokenise(task, tokenizer, 8)) == first


def test_the_second_call_does_not_tokenise(folder, tokenizer, monkeypatch):
    task = local(folder())
    first = tokenise(task, tokenizer, 8)
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *texts, **more: pytest.fail("tokenised again"))
    assert tokenise(task, tokenizer, 8)["train"][:] == first["train"][:]


def test_another_length_tokenizer_side_label_or_row_gives_other_files(folder, tokenizer):
    path = folder()
    left = word_tokenizer()
    left.truncation_side = "left"
    made = [
        files(tokenise(local(path), tokenizer, 8)),
        files(tokenise(local(path), tokenizer, 9)),
        files(tokenise(local(path), word_tokenizer("train test"), 8)),
        files(tokenise(local(path), left, 8)),
        files(tokenise(local(path, labels=("b", "a")), tokenizer, 8)),
        files(tokenise(local(path, max_train=6, max_validation=1, max_test=2), tokenizer, 8)),
    ]
    for split in ("train", "validation", "test"):
        names = [name for one in made for name in one[split]]
        assert len(set(names)) == len(made) - (split == "validation" and names[0] == names[-1])


def test_a_slow_tokenizer_is_cached_too(folder):
    path = folder()
    first = files(tokenise(local(path), ByT5Tokenizer(), 8))
    assert files(tokenise(local(path), ByT5Tokenizer(), 8)) == first
    assert files(tokenise(local(path), ByT5Tokenizer(extra_ids=5), 8)) != first


def test_a_batch_is_padded_to_its_longest_row(tokenizer):
    data = Dataset.from_dict({"text": ["one", "one two three"], "label": ["a", "b"]})
    task = task_from_datasets("pets", {"train": data, "validation": data, "test": data})
    batch = collator(tokenizer)(list(tokenise(task, tokenizer, 32)["train"]))
    assert batch["input_ids"].tolist() == [[2, 8, 3, 0, 0], [2, 8, 9, 10, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]


def test_a_tokenizer_without_padding_is_refused(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match=r"has no padding token.*Set `tokenizer.pad_token"):
        collator(tokenizer)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (2, "`max_length` is 2, but 2 special tokens and a token of each text need 3. Raise it"),
        (65, "`max_length` is 65, .*takes 64 tokens. Lower it"),
    ],
)
def test_a_length_without_room_for_a_text_or_above_the_model_is_refused(folder, tokenizer, length, message):
    with pytest.raises(ConfigError, match=message):
        tokenise(local(folder()), tokenizer, length)
