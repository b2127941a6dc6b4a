"""Bytes a task of a bank's masks: WSN's words of several tasks under a Huffman code, beside ours, one task a file.

WSN puts up to seven tasks' masks into one word an entry (task 0 in the lowest bit) and codes the words by Huffman. Its
size here counts the code book (a length in one byte for each possible word) and is compared with the entropy of the
words, with packed bits, and with this package's codes. A group of one task cannot go below a bit an entry: it is the
words of many tasks that Huffman gains on. What it gives up is a file a task: to read one, all of its group are decoded,
and a task learned later changes the words of the earlier ones.
One JSON line a bank.
run: python scripts/bench_packing.py RUN [RUN ...]
"""

import heapq
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GROUP = 7
"""Tasks in a word, at most: the paper's."""
Words = np.ndarray


def words_of(masks: Sequence[np.ndarray]) -> Words:
    """Return one word an entry, uint8: bit t is task t's."""
    assert 0 < len(masks) <= GROUP
    words = np.zeros(masks[0].size, np.uint8)
    for task, mask in enumerate(masks):
        words |= mask.reshape(-1).astype(np.uint8) << task
    return words


def masks_of(words: Words, tasks: int) -> list[np.ndarray]:
    """Return the flat masks of a group's words."""
    return [(words >> task & 1).astype(np.bool_) for task in range(tasks)]


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Return Huffman's code length of each word by its count; 0 where a word does not occur, 1 where it is alone."""
    used = np.flatnonzero(counts)
    lengths = np.zeros(counts.size, np.int64)
    if used.size == 1:
        lengths[used] = 1
        return lengths
    heap = [(int(counts[word]), int(word), [int(word)]) for word in used]
    heapq.heapify(heap)
    while len(heap) > 1:
        (one, first, left), (other, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (one + other, first, left + right))
    return lengths


def codes_of(lengths: np.ndarray) -> dict[int, str]:
    """Return the canonical code of each word, as a string of bits: the lengths alone say it."""
    codes, code, last = {}, 0, 0
    for word in sorted(np.flatnonzero(lengths), key=lambda word: (lengths[word], word)):
        code <<= int(lengths[word]) - last
        last = int(lengths[word])
        codes[int(word)] = format(code, f"0{last}b")
        code += 1
    return codes


def encode(words: Words, tasks: int) -> bytes:
    """Return the code book, a byte a word, and the codes, filled up to a byte."""
    lengths = code_lengths(np.bincount(words, minlength=1 << tasks))
    codes = codes_of(lengths)
    ends = np.cumsum(lengths[words])
    bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    for word, code in codes.items():
        starts = ends[words == word] - len(code)
        for place, bit in enumerate(code):
            if bit == "1":
                bits[starts + place] = 1
    return bytes(lengths.astype(np.uint8)) + np.packbits(bits).tobytes()


def decode(data: bytes, size: int, tasks: int) -> Words:
    """Return the words; one after another, for tests: a bank's size is measured, not its speed."""
    book = {code: word for word, code in codes_of(np.frombuffer(data[: 1 << tasks], np.uint8).astype(np.int64)).items()}
    bits, found, held = iter(np.unpackbits(np.frombuffer(data[1 << tasks :], np.uint8))), [], ""
    while len(found) < size:
        held += str(next(bits))
        if held in book:
            found.append(book[held])
            held = ""
    return np.array(found, np.uint8)


def entropy_bytes(words: Words) -> float:
    """Return the bytes that as many independent words of these shares need."""
    share = np.bincount(words) / max(1, words.size)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum() * words.size / 8)


def measure(tasks: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
    """Return bytes a task for masks given task by task, layer by layer."""
    from hf_cl.masks.coding import encode as ours

    flat = [np.concatenate([mask.reshape(-1) for mask in masks]) for masks in tasks]
    count, groups = len(flat), [flat[at : at + GROUP] for at in range(0, len(flat), GROUP)]
    words = [(words_of(group), len(group)) for group in groups]
    return {
        "tasks": count,
        "entries": flat[0].size,
        "density": round(float(np.mean([mask.mean() for mask in flat])), 5),
        "union": round(float(np.logical_or.reduce(flat).mean()), 5),
        "ours": round(sum(len(ours(mask, mask.shape[1])) for masks in tasks for mask in masks) / count),
        "words_huffman": round(sum(len(encode(*group)) for group in words) / count),
        "words_entropy": round(sum(entropy_bytes(group) for group, _ in words) / count),
        "packed_bits": -(-flat[0].size // 8),
    }


def learned(run: str) -> Iterator[list[np.ndarray]]:
    """Yield each task's masks out of a run's bank."""
    from hf_cl import MaskBank
    from hf_cl.packing.shelf import open_entry
    from hf_cl.storage.bank_folder import FolderReader

    folder = Path(run) / "bank"
    manifest = MaskBank.from_pretrained(folder).manifest
    for task in manifest.tasks:
        parts = open_entry(task, FolderReader(folder)).parts(manifest.store)
        yield [part.mask.numpy() for part in parts]


if __name__ == "__main__":
    for run in sys.argv[1:]:
        print(json.dumps({"run": Path(run).name} | measure(list(learned(run)))), flush=True)
