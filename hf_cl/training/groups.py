"""Parameter groups by role, each with a learning rate of its own and a schedule in every phase it trains in.

    role     trains in       weight decay
    scores   mask phase      0
    values   weight phase    the arguments'
    head     both            the arguments', not on biases and norms

Each phase warms up and decays by itself. One `LambdaLR` holds a lambda a group, so a plain Trainer
takes the pair as `optimizers=`, and the callback can put the same into an optimizer that is made already.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, TrainingArguments, get_scheduler

from hf_cl.errors import ConfigError

Lambda = Callable[[int], float]
Spans = Sequence[tuple[int, int]]
ROLES = ("scores", "values", "head")
"""Every masked parameter has one of these; `encoder` and `lora` are the yardsticks' (one phase)."""


def role_of(name: str) -> str:
    """Return the role of a parameter of a masked model by its name."""
    return "scores" if ".hfcl_scores." in name else "values" if ".hfcl_values." in name else "head"


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    rates: Mapping[str, float],
    weight_decay: float,
    role: Callable[[str], str] = role_of,
) -> list[dict[str, Any]]:
    """Sort trainable parameters into optimizer groups.

    Args:
        parameters: Names and parameters; those that require no gradient are left out.
        rates: Learning rate of each role.
        weight_decay: For matrices and values; scores, biases and norms get none.
        role: Gives a parameter's role by its name.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `role`, in a fixed order; none is empty.
    """
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            kind = role(name)
            plain = kind == "scores" or (parameter.ndim < 2 and kind != "values")
            groups.setdefault((kind, 0.0 if plain else weight_decay), []).append(parameter)
    # The head first: the Trainer logs the first group's rate, and the head trains in both phases.
    return [
        {"params": params, "lr": rates[kind], "weight_decay": decay, "role": kind}
        for (kind, decay), params in sorted(groups.items(), key=lambda item: item[0][0] != "head")
    ]


def schedule(args: TrainingArguments, spans: Spans) -> Lambda:
    """Return the factor of a learning rate by step: the arguments' schedule anew in each span, 0 outside.

    Args:
        args: Give the kind of schedule and its warm-up.
        spans: Half-open ranges of optimizer steps.

    Raises:
        ConfigError: The kind of schedule is no function of the step alone.
    """
    curves = [(start, stop, _curve(args, stop - start)) for start, stop in spans]

    def factor(step: int) -> float:
        for start, stop, curve in curves:
            if start <= step < stop:
                return curve(step - start)
        return 0.0

    return factor


def _curve(args: TrainingArguments, steps: int) -> Lambda:
    """Return one phase's factor by its own step, as transformers makes it for a whole training of that length."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = min(args.get_warmup_steps(steps), steps)
    made = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        warmup,
        steps,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
    )
    if not isinstance(made, torch.optim.lr_scheduler.LambdaLR):
        kind = SchedulerType(args.lr_scheduler_type).value
        raise ConfigError(
            f"lr_scheduler_type: {kind} depends on more than the step, so phases "
            f"cannot each have their own. Use linear, cosine, constant or constant_with_warmup."
        )
    curve: Lambda = made.lr_lambdas[0]
    return curve


def require_unstepped(optimizer: Any) -> None:
    """Refuse an optimizer that holds state.

    Raises:
        ConfigError: It has stepped before.
    """
    # Adagrad has sums, and a step of 0, when it is made.
    if any(float(held.get("step", 1)) for held in getattr(optimizer, "optimizer", optimizer).state.values()):
        raise ConfigError("optimizer: it has stepped before. Give each task a new Trainer (or a new optimizer).")


def set_groups(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    """Put `groups` in place of an optimizer's groups; other options keep the optimizer's defaults.

    Raises:
        ConfigError: The optimizer holds state already: moments of other parameters would be mixed up.
    """
    require_unstepped(optimizer)
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.param_groups.clear()
    for group in groups:
        inner.add_param_group(dict(group))


def set_schedule(optimizer: Any, scheduler: Any, lambdas: Mapping[str, Lambda]) -> None:
    """Put one lambda a group into a `LambdaLR`, by the group's role, and the first factor into the groups.

    Raises:
        ConfigError: The scheduler is no `LambdaLR`.
    """
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise ConfigError(
            f"lr_scheduler: expected a LambdaLR, found {type(scheduler).__name__}. "
            f"Let the Trainer make it (lr_scheduler_type linear, cosine or constant)."
        )
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    scheduler.lr_lambdas = [lambdas[group["role"]] for group in groups]
    scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = base
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]
