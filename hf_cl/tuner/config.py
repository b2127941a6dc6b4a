"""`MaskConfig`: what one task's masked adapter is, in PEFT's terms."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from hf_cl.errors import ConfigError
from hf_cl.layers.targets import missing_parameters
from hf_cl.masks.compose import COMPOSES
from hf_cl.masks.select import kept_count
from hf_cl.tuner.peft_type import extend_peft_type

MASK = extend_peft_type("HFCL")
RANKS = ("signed", "magnitude")
TRAINS = ("nothing", "claimed", "mask")
DTYPES = ("float32", "bfloat16")


@dataclass
class MaskConfig(PeftConfig):
    """Configuration of one masked adapter: one task on a shared store.

    `seed`, `scale`, `compose`, `train_norms`, `target_modules`, `exclude_modules` and `head_modules` are the
    bank's: they are fixed by its first adapter, and a later adapter with others is refused. The rest is the task's.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from peft import get_peft_model
        >>> base = BertForSequenceClassification(BertConfig(
        ...     vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
        >>> model = get_peft_model(base, MaskConfig(num_labels=4, density=0.1), adapter_name="news")
        >>> model.config.num_labels
        4
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Suffixes of the linears to mask; none: the family's."}
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Names of linears to leave out."})
    head_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that are the task's own, the classifier last; none: found."}
    )
    missing_modules: list[str] | None = field(
        default=None, metadata={"help": "Parameters the base's checkpoint lacked; see `from_loading_info`."}
    )
    num_labels: int | None = field(default=None, metadata={"help": "Classes of the task; none: the base's."})
    id2label: dict[int, str] | None = field(default=None, metadata={"help": "Names of the classes."})
    density: float = field(default=0.01, metadata={"help": "Share of each layer's entries the task's mask keeps."})
    compose: str = field(default="delta", metadata={"help": "delta, prune or random: the form of A and V."})
    scale: float = field(default=1.0, metadata={"help": "Magnitude of V's start, in standard deviations of W0."})
    scales: dict[str, float] | None = field(
        default=None, metadata={"help": "Each layer's magnitude as computed once; filled in, and kept."}
    )
    rank: str = field(default="signed", metadata={"help": "signed or magnitude: what of a score ranks."})
    trains: str = field(
        default="nothing",
        metadata={"help": "nothing, claimed (ExSSNeT) or mask (SSNet): the values that train."},
    )
    free_topk: bool = field(default=False, metadata={"help": "Take the whole budget from free entries."})
    values_dtype: str = field(default="bfloat16", metadata={"help": "What trained values are rounded to at commit."})
    train_norms: bool = field(default=False, metadata={"help": "Give the task its own copies of the norms."})
    seed: int = field(default=0, metadata={"help": "Seed of the store's signs, scores and heads."})
    task_index: int | None = field(default=None, metadata={"help": "The task's number; none: the next one."})

    def __post_init__(self) -> None:
        """Check every option before any work is done.

        Raises:
            ConfigError: An option is outside its range.
        """
        super().__post_init__()
        self.peft_type = MASK
        kept_count(1, self.density)
        for name, known in (
            ("compose", COMPOSES),
            ("rank", RANKS),
            ("trains", TRAINS),
            ("values_dtype", DTYPES),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}.")
        if self.free_topk and self.trains != "claimed":
            raise ConfigError(f"free_topk: asks for free entries to train, but trains is {self.trains!r}.")
        if not self.scale > 0:
            raise ConfigError(f"scale: expected a number above 0, found {self.scale!r}.")
        if self.id2label is not None:
            # JSON has no integer keys.
            self.id2label = {int(index): str(label) for index, label in self.id2label.items()}
            if self.num_labels not in (None, len(self.id2label)):
                raise ConfigError(f"num_labels: {self.num_labels}, but id2label names {len(self.id2label)}.")
            self.num_labels = len(self.id2label)
        for name in ("target_modules", "exclude_modules", "head_modules"):
            value = getattr(self, name)
            if isinstance(value, set | tuple):
                setattr(self, name, sorted(value))

    @classmethod
    def from_loading_info(cls, info: Mapping[str, Iterable[object]], **options: Any) -> "MaskConfig":
        """Return a config whose head is what `from_pretrained(..., output_loading_info=True)` calls missing.

        Args:
            info: The second value that `from_pretrained` returns.
            options: Any other option.
        """
        return cls(missing_modules=missing_parameters(info), **options)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, `LABEL_<n>` where none were given."""
        count = self.num_labels or 0
        return tuple((self.id2label or {}).get(index, f"LABEL_{index}") for index in range(count))
