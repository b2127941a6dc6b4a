"""`MaskConfig`: what one task's masked adapter is, in PEFT's terms."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from hf_cl.config import did_you_mean
from hf_cl.errors import ConfigError, OwnershipError
from hf_cl.layers.heads import PROBLEMS
from hf_cl.layers.targets import missing_parameters
from hf_cl.masks.compose import COMPOSES
from hf_cl.masks.select import kept_count
from hf_cl.masks.values import DTYPES
from hf_cl.tuner.card import write_cards
from hf_cl.tuner.peft_type import extend_peft_type

MASK = extend_peft_type("HFCL")
RANKS = ("signed", "magnitude")
TRAINS = ("nothing", "claimed", "mask")
HEADS = ("own", "shared")
WEIGHTS = "adapter_model.safetensors"
SENSELESS = {
    "modules_to_save": "the head is this method's own layer, one a task; name its layers as `head_modules`",
    "target_parameters": "masks cut the weights of linears; name those as `target_modules`",
    "rank_pattern": "a mask has no rank; its size is `density`",
    "alpha_pattern": "a mask has no rank; its magnitude is `scale`",
    "r": "a mask has no rank; its size is `density`",
    "lora_alpha": "a mask has no rank; its magnitude is `scale`",
    "bias": "biases stay the base's own; `train_norms` gives each task its own norms",
}
"""Options of other PEFT methods, and what takes their place here."""


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
    scale: float | None = field(
        default=1.0, metadata={"help": "Magnitude of V's start, in standard deviations of W0; none: by the density."}
    )
    scales: dict[str, float] | None = field(
        default=None, metadata={"help": "Each layer's magnitude as computed once; filled in, and kept."}
    )
    rank: str = field(default="signed", metadata={"help": "signed or magnitude: what of a score ranks."})
    trains: str = field(
        default="nothing",
        metadata={"help": "nothing, claimed (ExSSNeT) or mask (SSNet): the values that train."},
    )
    joint: bool = field(
        default=False, metadata={"help": "Train scores and values in the same steps (WSN); trains is then claimed."}
    )
    free_topk: bool = field(default=False, metadata={"help": "Take the whole budget from free entries."})
    threshold: float | None = field(
        default=None,
        metadata={"help": "Keep what scores above this, however many that is (Piggyback); none: `density` counts."},
    )
    first_score: float = field(default=0.0, metadata={"help": "With a threshold: every score's start."})
    values_dtype: str = field(default="bfloat16", metadata={"help": "What trained values are rounded to at commit."})
    train_norms: bool = field(default=False, metadata={"help": "Give the task its own copies of the norms."})
    seed: int = field(default=0, metadata={"help": "Seed of the store's signs, scores and heads."})
    task_index: int | None = field(default=None, metadata={"help": "The task's number; none: the next one."})
    problem_type: str | None = field(
        default=None,
        metadata={"help": "single_label_classification, multi_label_classification or regression; none: by labels."},
    )
    head: str = field(
        default="own",
        metadata={
            "help": "own, or shared: the first task's head, frozen once that is finished; labels must be the same."
        },
    )
    head_of: int | None = field(default=None, metadata={"help": "Number of the task whose head is shared; filled in."})
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "sha256 of the base the task was learned on; filled in when it is saved."}
    )
    tensors_digest: str | None = field(
        default=None, metadata={"help": "sha256 of the tensors saved beside this config; filled in when it is saved."}
    )

    arrives: ClassVar[bool] = False
    """Whether the adapter is of a finished task, which is installed right after it was added."""
    from_load: ClassVar[bool] = False
    """Whether PEFT read it to load an adapter into a model, and has not loaded it yet."""
    from_file: ClassVar[bool] = False
    """Whether it was read from a folder, and nothing was loaded from there yet."""
    saved_as: ClassVar[str | None] = None
    """The adapter's name when it was saved last; PEFT tells the config where it is saved, and not under which name."""

    def __new__(cls, *args: object, **options: object) -> "MaskConfig":
        """Refuse options that other PEFT methods have and this one has not.

        Raises:
            ConfigError: Names the option and what to use.
        """
        for name in options:
            if name in SENSELESS:
                raise ConfigError(f"{name}: makes no sense for a mask: {SENSELESS[name]}.")
            if name not in cls.__dataclass_fields__:
                known = [field for field in cls.__dataclass_fields__ if field != "peft_version"]
                raise ConfigError(f"{name}: is no option of MaskConfig.{did_you_mean(name, known)}")
        return super().__new__(cls)

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
            ("problem_type", (None, *PROBLEMS)),
            ("head", HEADS),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(filter(None, known))}.")
        self._require_that_they_agree()
        if self.scale is not None and not self.scale > 0:
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

    def _require_that_they_agree(self) -> None:
        """Refuse ways to train that exclude each other."""
        if self.free_topk and self.trains != "claimed":
            raise ConfigError(f"free_topk: asks for free entries to train, but trains is {self.trains!r}.")
        if self.joint and self.trains != "claimed":
            raise ConfigError(f"joint: trains values with the mask, but trains is {self.trains!r}. Use 'claimed'.")
        if self.threshold is not None and (self.trains != "nothing" or self.rank != "signed" or self.density != 1):
            raise ConfigError(
                f"threshold: keeps any number of signed scores and trains nothing else; found density {self.density}, "
                f"rank {self.rank!r}, trains {self.trains!r}. Use density 1, rank 'signed', trains 'nothing'."
            )

    @classmethod
    def from_loading_info(cls, info: Mapping[str, Iterable[object]], **options: Any) -> "MaskConfig":
        """Return a config whose head is what `from_pretrained(..., output_loading_info=True)` calls missing.

        Args:
            info: The second value that `from_pretrained` returns.
            options: Any other option.
        """
        return cls(missing_modules=missing_parameters(info), **options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "MaskConfig":
        """Read a saved adapter's options; see `peft.PeftConfig.from_pretrained`.

        Raises:
            OwnershipError: The tensors beside it cannot be read, which PEFT would find out after adding the adapter.
        """
        made: MaskConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        # A config that was saved alone names no tensors, and needs none.
        if folder.is_dir() and (made.tensors_digest is not None or (folder / WEIGHTS).exists()):
            try:
                with safe_open(folder / WEIGHTS, "pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise OwnershipError(
                    f"{folder / WEIGHTS}: cannot be read ({error}). Load it as it was saved."
                ) from error
        # PEFT asks so where it is about to load the tensors, too.
        made.__dict__.update(from_load="ephemeral_gpu_offload" in kwargs, from_file=True)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values; what is a set is written in order, so equal adapters have equal files."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and a card that says how to load the folder."""
        super().save_pretrained(save_directory, **kwargs)
        self.tensors_digest = None  # of the file; what is in memory moves on
        if self.saved_as is not None:
            write_cards(self, Path(save_directory), self.saved_as)

    @property
    def one_phase(self) -> bool:
        """Whether the mask trains to the last step: alone, or together with its values."""
        return self.trains == "nothing" or self.joint

    @property
    def problem(self) -> str:
        """The kind of loss: as given, else regression for one label and one of several classes for more."""
        return self.problem_type or (PROBLEMS[2] if self.num_labels == 1 else PROBLEMS[0])

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, `LABEL_<n>` where none were given."""
        count = self.num_labels or 0
        return tuple((self.id2label or {}).get(index, f"LABEL_{index}") for index in range(count))
