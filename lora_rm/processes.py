"""One process a GPU: which one writes, and what is summed over all of them.

`torchrun` and `accelerate launch` start the same program several times and say by environment variables who is
who. Each process computes its share of a step's rows; gradients are summed once a step, so the step is that of
one process with all rows. The first process alone prints and writes.
"""

import atexit
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from lora_rm.errors import ConfigError

T = TypeVar("T")

LAUNCHED = int(os.environ.get("WORLD_SIZE", "1"))
"""Processes that were started, over all machines; they work together after `join`."""

LOCAL_COUNT = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
"""Processes that were started on this machine."""

LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
"""Number of this process on its machine, which is the number of its GPU."""

IS_FIRST = (
    LAUNCHED == 1 or os.environ.get("RANK", "0") == "0"
)  # a job system may leave a RANK to a lone process
"""Whether this process prints and writes."""


def num_cores() -> int:
    """Processor cores that this process may use, shared with the others on this machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // LOCAL_COUNT)


def join(device: str) -> None:
    """Meets the other processes, if there are any.

    Args:
        device: `model.device`; gloo carries the sums between CPUs, NCCL between GPUs.

    Raises:
        ConfigError: If more processes were started than there are GPUs.
    """
    import torch
    import torch.distributed as dist

    if LAUNCHED == 1 or dist.is_initialized():
        return
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if not on_cpu:
        if torch.cuda.device_count() <= LOCAL_RANK:
            raise ConfigError(
                f"{LOCAL_COUNT} processes were started on this machine, and torch finds {torch.cuda.device_count()} GPUs. Start one "
                "process a GPU, or set model.device cpu."
            )
        torch.cuda.set_device(LOCAL_RANK)
    dist.init_process_group("gloo" if on_cpu else "cpu:gloo,cuda:nccl")
    atexit.register(_part)


def _part() -> None:
    """Ends the threads that carry messages: one that is still there when the process ends aborts it now and then."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """Processes that work together: 1 before `join`."""
    if LAUNCHED == 1:
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them."""
    if count() == 1:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def wait() -> None:
    """Returns when every process has come here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()


def gather(value: T) -> list[T]:
    """The values of all processes, by rank; plain Python values."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: Iterable[Any]) -> None:
    """Sums every parameter's gradient over all processes, in one message; a missing one counts as zero."""
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    trained = list(parameters)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    _in_one_message([parameter.grad for parameter in trained], dist.all_reduce)


def copy_from_first(tensors: Iterable[Any]) -> None:
    """Gives every process the values of the first one, in one message."""
    if count() == 1:
        return
    import torch.distributed as dist

    _in_one_message(list(tensors), lambda flat: dist.broadcast(flat, src=0))


def _in_one_message(tensors: list[Any], send: Callable[[Any], Any]) -> None:
    import torch

    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    send(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))
