"""Replay: sequential fine-tuning that goes on seeing one or two percent of the earlier tasks' texts.

Of each task a seeded share of the training rows, drawn alike from all labels, is kept as tokens and mixed into every
later task's rows; a kept row trains its own task's head. The memory is in the run folder, and its bytes are counted
(`bytes_carried`). Later tasks take more steps, by the rows that are replayed.

Source: experience replay as in the literature's text streams: MBPA++, arXiv 1906.01076; 2 % in MIGU, arXiv 2406.17245.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_cl.config import option
from hf_cl.data.rows import stratified
from hf_cl.errors import ConfigError, RunError
from hf_cl.layers.base import Base
from hf_cl.training.method import Settled, Tensors
from hf_cl.training.mixed_way import MixedWay
from hf_cl.training.whole_encoder import Rates, SharedEncoder

TOKENS = ("input_ids", "token_type_ids")


@dataclass(frozen=True)
class Options(Rates):
    """Options of `replay`."""

    share: float = option(0.02, help="Share of a task's training rows that is kept.", above=0, most=1)
    open_heads: bool = option(True, help="Train earlier heads on by their rows; else the rows train the encoder alone.")


def build(base: Base, options: Options, seed: int, settled: Settled | None = None) -> SharedEncoder:
    """Wrap a base to learn a stream by fine-tuning with replay."""
    return SharedEncoder(base, options, seed, _Replay(options, seed))


class _Replay(MixedWay):
    def __init__(self, options: Options, seed: int) -> None:
        super().__init__()
        self.share, self.open_heads, self.seed = options.share, options.open_heads, seed
        self.memory: dict[int, Tensors] = {}

    def keep(self, index: int, rows: Dataset) -> None:
        """Keep a share of the rows as tokens."""
        size = floor(self.share * len(rows) + 0.5)
        if size == 0:
            raise ConfigError(
                f"replay.share: {self.share} of {len(rows)} training rows is none. Raise it to {0.5 / len(rows):.2g}."
            )
        chosen = rows.select(stratified(np.array(rows["labels"]), size, (self.seed, index)))
        flat = {
            name: torch.tensor([token for row in chosen[name] for token in row], dtype=torch.int32)
            for name in TOKENS
            if name in chosen.column_names
        }
        lengths = torch.tensor([len(row) for row in chosen["input_ids"]], dtype=torch.int32)
        self.memory[index] = {**flat, "lengths": lengths, "labels": torch.tensor(chosen["labels"], dtype=torch.int32)}

    def earlier(self, index: int, like: Dataset) -> list[Dataset]:
        """Return the memory of each earlier task."""
        return [_rows(self.memory[earlier], like) for earlier in range(index)]

    def forget(self, index: int) -> None:
        """Forget a task's memory."""
        self.memory.pop(index, None)

    def facts(self, index: int) -> dict[str, Any]:
        """Return how many rows are kept, and how many earlier ones the task was mixed with."""
        kept = [len(self.memory[task]["labels"]) for task in range(index + 1)]
        return {"kept_rows": kept[-1], "replayed_rows": sum(kept[:-1])}

    def carried(self, index: int) -> dict[str, Tensors]:
        """Return a task's memory."""
        return {"memory": self.memory[index]}

    def restore_carried(self, method: SharedEncoder, index: int, carried: Mapping[str, Tensors]) -> None:
        """Take back a task's memory."""
        memory = carried.get("memory", {})
        if not {"input_ids", "lengths", "labels"} <= set(memory):
            raise RunError(f"task {index}: the rows kept of it are not there. Restore the run whole, or run again.")
        self.memory[index] = memory


def _rows(memory: Tensors, like: Dataset) -> Dataset:
    """Return kept rows as a data set of the same columns and types as another."""
    lengths = memory["lengths"].tolist()
    columns = {name: [part.tolist() for part in memory[name].split(lengths)] for name in TOKENS if name in memory}
    columns["attention_mask"] = [[1] * length for length in lengths]
    return Dataset.from_dict({**columns, "labels": memory["labels"].tolist()}, features=like.features)
