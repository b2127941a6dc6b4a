"""The options that masked methods share, declared once, and the adapter's config that they make."""

from dataclasses import dataclass, fields
from typing import Any

from hf_cl.config import option
from hf_cl.masks.compose import COMPOSES
from hf_cl.masks.values import DTYPES
from hf_cl.training.ownership_callback import DENSITY_WARMUP
from hf_cl.tuner import MaskConfig
from hf_cl.tuner.config import HEADS, RANKS

RATE = "_learning_rate"


@dataclass(frozen=True)
class ScoreOptions:
    """Options of every method that trains scores and a head."""

    scores_learning_rate: float = option(0.01, help="Peak learning rate of the scores.", above=0)
    head_learning_rate: float | None = option(
        None, help="Peak learning rate of the head; none: the training's.", above=0
    )
    train_norms: bool = option(False, help="Give every task its own copies of the norms.")
    head: str = option("own", help="A head a task, or the first task's, frozen, for all.", choices=HEADS)


@dataclass(frozen=True)
class MaskOptions(ScoreOptions):
    """Options of a method whose masks keep a share of each layer's entries."""

    density: float = option(0.005, help="Share of each layer's entries that a task's mask keeps.", above=0, most=1)
    compose: str = option("delta", help="Form of the store: delta, prune or random.", choices=COMPOSES)
    scale: float | None = option(
        None, help="Magnitude of the store's start, in deviations of the layer's weight; none: by the density.", above=0
    )
    rank: str = option("signed", help="What of a score ranks.", choices=RANKS)
    density_warmup: float = option(
        DENSITY_WARMUP,
        help="Share of the mask's steps in which a fresh one grows to its density.",
        least=0,
        most=1,
    )


@dataclass(frozen=True)
class ValueOptions(MaskOptions):
    """Options of a method that trains values, too."""

    values_learning_rate: float = option(0.001, help="Peak learning rate of the values.", above=0)
    values_dtype: str = option("bfloat16", help="What values are rounded to.", choices=DTYPES)


def mask_config(options: ScoreOptions, seed: int, **more: Any) -> MaskConfig:
    """Return the config of a method's adapters: the options that `MaskConfig` has, the seed, and `more`."""
    known = {field.name for field in fields(MaskConfig)}
    shared = {name: value for name, value in vars(options).items() if name in known}
    return MaskConfig(seed=seed, **shared | more)


def rates(options: ScoreOptions) -> dict[str, float | None]:
    """Return the learning rate of each role that trains (scores, head, values); None is the training's own."""
    return {name.removesuffix(RATE): rate for name, rate in vars(options).items() if name.endswith(RATE)}
