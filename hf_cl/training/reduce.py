"""What the ranks send each other at a step: the gradients of what trains in this phase, and nothing else.

DDP reduces every parameter that requires a gradient, so in the weight phase the scores' zeros, and in the mask phase
the values'. The scores are as many as the masked weights: all but a few percent of what a weight step would send.

Source: PyTorch DDP communication hooks, arXiv 2006.15704 (DDP); dividing before the sum is DDP's own order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hf_cl.training.method import Method


class Reduction:
    """Sums gradients over the ranks, without those of parameters that rest.

    Attributes:
        sent: Bytes that a rank has given to be reduced in each step so far.
    """

    def __init__(self, method: Method) -> None:
        """Take the method, which knows what rests."""
        self.method = method
        self.sent: list[int] = []

    def reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Reduce one bucket: DDP's communication hook."""
        del state
        buffer = bucket.buffer()
        resting = {id(parameter) for parameter in self.method.resting()}
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        moving = [gradient for parameter, gradient in pairs if id(parameter) not in resting]
        whole = len(moving) == len(bucket.parameters())
        # A bucket that rests altogether sends one number: DDP waits for every bucket's future.
        flat = buffer if whole else torch.cat([part.flatten() for part in moving]) if moving else buffer[:1].clone()
        flat.div_(dist.get_world_size())
        self.sent[-1] += flat.numel() * flat.element_size()

        def back(future: Any) -> Tensor:
            summed = future.value()[0]
            if not whole and moving:
                parts = summed.split([part.numel() for part in moving])
                for part, found in zip(moving, parts, strict=True):
                    part.copy_(found.view_as(part))
            return buffer

        return dist.all_reduce(flat, async_op=True).get_future().then(back)


def reducing(trainer_class: type[Trainer], reduction: Reduction) -> type[Trainer]:
    """Return a Trainer's class whose DDP reduces gradients by `reduction`."""

    class ReducingTrainer(trainer_class):
        """Hands the hook to DDP at its first step: before, there is no DDP."""

        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            if isinstance(model, DistributedDataParallel):
                if not reduction.sent:
                    model.register_comm_hook(None, reduction.reduce)
                if not reduction.sent or self.accelerator.sync_gradients:
                    reduction.sent.append(0)
            return super().training_step(model, *args, **kwargs)

    return ReducingTrainer
