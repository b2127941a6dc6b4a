"""Task arithmetic of LoRA adapters of one base, exactly: ranks are concatenated.

    sum_t c_t B_t A_t  =  [c_1 B_1 | c_2 B_2 | ...] [A_1 ; A_2 ; ...],   c_t = scale w_t scaling_t

The result is a LoRA of the summed rank and scaling 1 (lora_alpha = r). PEFT's `add_weighted_adapter` with
`combination_type="cat"` does the same; its `linear` scales and adds A and B apart, which brings in cross terms
B_s A_t, and its `svd` cuts the rank again.

Source: Editing models with task arithmetic, arXiv 2212.04089; Chitale et al., arXiv 2311.02428, for LoRA.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_cl.config import option, read
from hf_cl.errors import ConfigError, MergeError, shown
from hf_cl.merging._check import Spec, Tensors, listed, require_finite, require_models, require_weights, specs
from hf_cl.merging._rule import require_fits

PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
"""Parts of PEFT's names: A's rows and B's columns are ranks."""


@dataclass(frozen=True)
class Options:
    """Options of `lora_arithmetic`."""

    scale: float = option(1.0, help="Factor of the sum; negative to unlearn.")
    weights: tuple[float, ...] = option((), help="One an adapter, may be negative. None: all 1.")


def lora_arithmetic(
    adapters: Sequence[Tensors],
    scalings: Sequence[float],
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Return one LoRA whose update is the weighted sum of the adapters' updates.

    Args:
        adapters: At least one; the LoRA tensors of each under PEFT's names (`...lora_A.weight`, `...lora_B.weight`),
            all of the same layers; ranks may differ.
        scalings: What each adapter's B A is multiplied by: lora_alpha / r (or / sqrt(r) for rsLoRA).
        scale: Factor of the sum; any finite number.
        weights: One an adapter; any finite numbers. None: all 1.

    Returns:
        New tensors in the dtypes of the first adapter, to be used with scaling 1.

    Raises:
        MergeError: An adapter has other layers or sizes, something beside LoRA's A and B, NaN or infinity.
        ConfigError: A coefficient is not finite, or there is no adapter.

    Example:
        >>> import torch
        >>> first = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(3, 1)}
        >>> merged = lora_arithmetic([first, first], scalings=[2.0, 1.0], scale=0.5)
        >>> merged["q.lora_B.weight"] @ merged["q.lora_A.weight"]
        tensor([[1.5000, 1.5000],
                [1.5000, 1.5000],
                [1.5000, 1.5000]])
    """
    options = read(Options, {"scale": scale, "weights": tuple(weights or ())}, "lora_arithmetic")
    factors = coefficients(options, scalings, len(adapters))
    labels = [f"adapter {number}" for number in range(len(adapters))]
    merged_specs([(label, specs(adapter)) for label, adapter in zip(labels, adapters, strict=True)])
    for label, adapter in zip(labels, adapters, strict=True):
        for name, tensor in adapter.items():
            require_finite(label, name, tensor.detach())
    return {name: concatenated(name, [adapter[name] for adapter in adapters], factors) for name in adapters[0]}


def coefficients(options: Options, scalings: Sequence[float], adapters: int) -> list[float]:
    """Return the factor of each adapter's B.

    Raises:
        ConfigError: There are not as many scalings as adapters, or a factor is not finite.
    """
    require_models(adapters, "lora_arithmetic")
    if len(scalings) != adapters:
        raise ConfigError(f"lora_arithmetic: {len(scalings)} scalings for {adapters} adapters. Give one each.")
    weights = require_weights(options.weights, adapters, "lora_arithmetic", signed=True)
    factors = [options.scale * weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
    return require_weights(factors, adapters, "lora_arithmetic: scale x weight x scaling", signed=True)


def concatenated(name: str, parts: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Return the tensor of the merged adapter under a name, in the dtype and on the device of the first part.

    Raises:
        MergeError: The result does not fit that dtype.
    """
    dtype, device = parts[0].dtype, parts[0].device
    axis = _axis(name)
    moved = [part.detach().to(device=device, dtype=torch.promote_types(dtype, torch.float32)) for part in parts]
    if axis == 1:
        moved = [part * factor for part, factor in zip(moved, factors, strict=True)]
    made = torch.cat(moved, axis).to(dtype)
    require_fits(name, made)
    return made


def merged_specs(adapters: Sequence[tuple[str, dict[str, Spec]]]) -> dict[str, Spec]:
    """Return what each tensor of the merged adapter will be.

    Raises:
        MergeError: The adapters do not fit each other.
    """
    (first, reference), *others = adapters
    for label, tensors in adapters:
        if strange := [name for name in sorted(tensors) if not is_lora(name) or not tensors[name].merges]:
            raise MergeError(
                f"{label}: {listed(strange)} is not one of LoRA's A and B. Leave heads and other saved modules out; "
                f"DoRA and trained biases cannot be merged exactly."
            )
    for label, tensors in others:
        if different := sorted(set(tensors) ^ set(reference)):
            raise MergeError(
                f"{label}: {listed(different)} is in only one of it and {first}. Merge adapters of the same layers."
            )
    made = {}
    for name, spec in reference.items():
        made[name] = Spec(tuple(_shape(name, [(label, found[name].shape) for label, found in adapters])), spec.dtype)
    for label, tensors in adapters:
        for low, high in _pairs(tensors):
            if tensors[low].shape[0] != tensors[high].shape[1]:
                raise MergeError(f"{label}: {shown(low)} and {shown(high)} have different ranks. The file is damaged.")
    return made


def _shape(name: str, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> list[int]:
    axis = _axis(name)
    (first, expected), *others = shapes
    for label, shape in shapes:
        if len(shape) < 2 or [*shape[:axis], *shape[axis + 1 :]] != [*expected[:axis], *expected[axis + 1 :]]:
            raise MergeError(
                f"{label}: {shown(name)} has shape {list(shape)}, which does not go with {list(expected)} in {first}: "
                f"only the rank may differ. It is an adapter of another base."
            )
    made = list(expected)
    made[axis] += sum(shape[axis] for _, shape in others)
    return made


def is_lora(name: str) -> bool:
    """Return whether a tensor is one of LoRA's A and B, by its name."""
    return any(part in name.split(".") for pair in PAIRS for part in pair)


def _axis(name: str) -> int:
    """Return the axis of the rank: rows of A, columns of B."""
    return 0 if any(low in name.split(".") for low, _ in PAIRS) else 1


def _pairs(tensors: Sequence[str] | dict[str, Spec]) -> Iterator[tuple[str, str]]:
    for name in tensors:
        for low, high in PAIRS:
            if low in name.split("."):
                partner = ".".join(high if part == low else part for part in name.split("."))
                if partner not in tensors:
                    raise MergeError(f"{shown(name)} has no {shown(partner)} beside it. The adapter is incomplete.")
                yield name, partner
