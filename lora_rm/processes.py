"""One process a GPU: which one writes, and what is summed over all of them.

`torchrun` and `accelerate launch` start the same program several times and say by environment variables who is
who. Each process computes its share of a step's rows; gradients are summed once a step, so the step is that of
one process with all rows. The first process alone prints and writes.
"""

import os
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")

RANK = int(os.environ.get("RANK", "0"))
"""Number of this process over all machines."""

COUNT = int(os.environ.get("WORLD_SIZE", "1"))
"""Processes over all machines."""

LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
"""Number of this process on its machine, which is the number of its GPU."""

IS_FIRST = RANK == 0
"""Whether this process prints and writes."""


def join(device: str) -> None:
    """Meets the other processes, if there are any.

    Args:
        device: `model.device`; gloo carries the sums between CPUs, NCCL between GPUs.
    """
    import torch
    import torch.distributed as dist

    if COUNT == 1 or dist.is_initialized():
        return
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if not on_cpu:
        torch.cuda.set_device(LOCAL_RANK)
    dist.init_process_group("gloo" if on_cpu else "cpu:gloo,cuda:nccl")


def wait() -> None:
    """Returns when every process has come here."""
    if COUNT > 1:
        import torch.distributed as dist

        dist.barrier()


def gather(value: T) -> list[T]:
    """The values of all processes, by rank; plain Python values."""
    if COUNT == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * COUNT
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: Iterable[Any]) -> None:
    """Sums every parameter's gradient over all processes, in one message; a missing one counts as zero."""
    if COUNT == 1:
        return
    import torch
    import torch.distributed as dist

    trained = list(parameters)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in trained])
    dist.all_reduce(flat)
    sizes = [parameter.numel() for parameter in trained]
    for parameter, part in zip(trained, flat.split(sizes), strict=True):
        parameter.grad.copy_(part.view_as(parameter))
