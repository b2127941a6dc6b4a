"""The processes of one job: who this one is, what all of them hold, and who writes.

accelerate starts the process group, from the variables that `torchrun` and `accelerate launch` set; this asks it.
In one process nothing is sent, and every function here gives its answer at once.

Invariant: all ranks call the same functions of this file in the same order. Inside `on_first` rank 0 is alone, so
what it calls there sends nothing.

Source: torch.distributed; a rank's failure as everybody's is docs/launching.md, "What ends a job".
"""

import os
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hf_cl.errors import RankError

T = TypeVar("T")
TIMEOUT = 600
"""Seconds after which a rank that answers no more ends the job; `ddp_timeout` of the training arguments sets it."""
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_",
            "TORCH_NCCL_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "OMPI_", "PMI_")  # fmt: skip
"""How the names of the variables begin that make a process a rank."""
_alone: ContextVar[bool] = ContextVar("alone", default=False)


def join(*, cpu: bool, timeout: float = TIMEOUT) -> None:
    """Start the process group, if this process was launched as one of several and there is none yet.

    `TrainingArguments` would start it too, but drops `ddp_timeout` on a CPU.

    Args:
        cpu: Whether the ranks compute on the CPU.
        timeout: Seconds that a rank waits for another.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=cpu, timeout=timedelta(seconds=timeout))


def rank() -> int:
    """Return this process's number; the first, and the only one where there is one, is 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Return how many processes there are; 1 for rank 0 inside `on_first`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone.get() else 1


def broadcast(value: T) -> T:
    """Return rank 0's value on all ranks."""
    if world() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def gather(value: T) -> list[T]:
    """Return all ranks' values, in their order, on all ranks."""
    if world() == 1:
        return [value]
    held: list[Any] = [None] * world()
    dist.all_gather_object(held, value)
    return held


def any_rank(flags: list[bool], device: torch.device | None = None) -> list[bool]:
    """Return, for each flag, whether it is set on any rank; cheap enough for every step.

    Args:
        flags: This rank's.
        device: Where the model computes; NCCL reduces nothing else.
    """
    if world() == 1:
        return flags
    found = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def on_first(work: Callable[[], T]) -> T:
    """Do something on rank 0 alone, and give what it returns to all ranks.

    Raises:
        RankError: It failed on rank 0, on the other ranks; rank 0 raises what was raised.
    """
    if world() == 1:
        return work()
    if rank() != 0:
        done, value = None, None
        while done is None:  # rank 0 still works
            done, value = broadcast((done, value))
        if not done:
            raise RankError(f"rank {rank()} stops, because rank 0 failed: {value}")
        return value
    token = _alone.set(True)
    try:
        found = work()
    except BaseException as error:
        _alone.reset(token)
        broadcast((False, f"{type(error).__name__}: {error}"))
        raise
    _alone.reset(token)
    broadcast((True, found))
    return found


def beat() -> None:
    """Tell ranks that wait for `on_first` that it still works: called now and then, it may take longer than TIMEOUT."""
    if _alone.get():
        dist.broadcast_object_list([(None, None)], src=0)


def require_equal(digests: Mapping[str, str], when: str) -> None:
    """Compare named digests with those of all ranks; on a difference every rank raises the same error.

    Args:
        digests: Names of tensors or options, and what stands for their content.
        when: The moment, for the error, as in "at step 40".

    Raises:
        RankError: It names the first rank and tensor that differ from rank 0's.
    """
    everybody = gather(dict(digests))
    first = everybody[0]
    for number, theirs in enumerate(everybody):
        different = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if different:
            more = f" and {len(different) - 1} more" if len(different) > 1 else ""
            raise RankError(
                f"rank {number} differs from rank 0 {when}: {different[0]}{more}. All ranks stop; finished tasks are "
                f"untouched. Look for memory errors, for code that acts on one rank alone, and for other data or "
                f"versions on one machine."
            )


def environment() -> dict[str, str]:
    """Return this process's environment without what makes it a rank, for a child that is none."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}


def leave(code: int) -> None:
    """End this process at once, if it is one of several.

    Tearing gloo's threads down ends a good part of all processes by SIGABRT after everything was right, and the
    launcher would call the job failed; nothing is left to do here, all files are written and synced.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        if code == 0:
            dist.barrier()  # rank 0 keeps the ranks' common store: it must not be gone while another still asks
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
