"""A CUDA device made of the CPU's memory, for machines without one.

    python -m pytest -n 0 -p tests.gpu.simulated tests/gpu

It refuses what a device refuses: tensors that lie elsewhere, waiting where nothing may wait, more memory than there is.
Kernels are the CPU's, so that theirs (flash attention's, bitsandbytes'), their rounding and their time are not shown.
Needs g++ and ninja; compiles for a minute, once.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes  # noqa: F401 - before there seems to be a device, whose library it would look for
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import varlen
from torch.utils import cpp_extension

TOTAL = 24 * 2**30
"""Bytes of the device."""

SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip

NOT_SHOWN = {
    "test_the_fastest_core_is_found_in_two_seconds": "measures time",
    "test_the_planned_peak_is_what_the_device_measures": "takes minutes on a CPU",
    "test_compiled_kernels_give_the_bits_of_torch": "kernels are compiled for a card",
    "test_other_tensors_are_not_for_the_kernels": "kernels are compiled for a card",
    "[varlen-paged_adamw_8bit]": "bitsandbytes' optimizer is CUDA's alone",
}

device = cpp_extension.load("simulated_cuda", [str(Path(__file__).with_suffix(".cpp"))], extra_cflags=["-O1"])


def pytest_configure() -> None:
    """Measures no time."""
    from lora_rm.model import reward_model

    reward_model.time_cores = fixed_times


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Takes small models, and leaves out what cannot be shown."""
    for item in items:
        for name, reason in NOT_SHOWN.items():
            if name in item.name:
                item.add_marker(pytest.mark.skip(reason=f"simulated device: {reason}"))
        item.module.WIDE.update(SMALL)


CUDA: dict[str, Callable[..., Any]] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_bf16_supported": lambda **_: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "get_device_capability": lambda _=None: (9, 0),
    "get_device_name": lambda _=None: "simulated",
    "get_device_properties": lambda _=None: SimpleNamespace(total_memory=TOTAL),
    "synchronize": lambda _=None: None,
    "empty_cache": lambda: None,
    "memory_allocated": lambda _=None: device.live(),
    "memory_reserved": lambda _=None: device.live(),
    "max_memory_allocated": lambda _=None: device.peak(),
    "max_memory_reserved": lambda _=None: device.peak(),
    "reset_peak_memory_stats": lambda _=None: device.reset_peak(),
    "mem_get_info": lambda _=None: (TOTAL - device.live(), TOTAL),
    "set_per_process_memory_fraction": lambda share: device.set_limit(int(share * TOTAL)),
    "set_sync_debug_mode": lambda mode: device.set_may_wait(mode != "error"),
    # there is one source of random numbers, the CPU's
    "get_rng_state": lambda _=None: torch.get_rng_state(),
    "set_rng_state": lambda state, _=None: torch.set_rng_state(state),
    "manual_seed_all": lambda _: None,
}


class Generator(torch.Generator):
    """One of a CPU, whatever is asked for."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        del device
        return super().__new__(torch.Generator)


def fixed_times(_: torch.device, dtype: torch.dtype, *__: int) -> dict[str, float]:
    """Of the cores, as if measured: flash attention, which takes no float32, is the fastest."""
    return {"answers": 3.0, "gathered": 2.0} | ({} if dtype == torch.float32 else {"varlen": 1.0})


real_varlen_attn = varlen.varlen_attn


@functools.wraps(real_varlen_attn)
def varlen_attn(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> torch.Tensor:
    """Refuses what flash attention refuses, and computes every answer by itself."""
    if isinstance(query, FakeTensor):
        return real_varlen_attn(query, key, value, *rest, **more)
    if query.dtype not in (torch.bfloat16, torch.float16) or not query.dtype == key.dtype == value.dtype:
        raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
    query_starts, key_starts, most_queries, most_keys = rest
    with may_wait():
        starts = query_starts.tolist(), key_starts.tolist()
    assert query_starts.is_cuda
    assert key_starts.is_cuda
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert [part[-1] for part in starts] == [len(query), len(key)]
    assert max(b - a for a, b in pairwise(starts[0])) <= most_queries
    assert max(b - a for a, b in pairwise(starts[1])) <= most_keys
    assert more["enable_gqa"] or query.shape[1] == key.shape[1]
    return _Varlen.apply(query, key, value, starts, more["scale"], more["window_size"][0])


class _Varlen(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values and the output."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        inputs, ctx.rest = args[:3], args[3:]
        with may_wait():
            output = _on_a_cpu(*(x.cpu() for x in inputs), *ctx.rest).to("cuda")
        ctx.save_for_backward(*inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with may_wait(), torch.enable_grad():
            inputs = [x.cpu().detach().requires_grad_() for x in ctx.saved_tensors[:3]]
            output = _on_a_cpu(*inputs, *ctx.rest)
            found = torch.autograd.grad(output, inputs, gradient.cpu())
            return (*(x.to("cuda") for x in found), None, None, None)


def _on_a_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Any, scale: float, window: int
) -> torch.Tensor:
    outputs = []
    for (first, end), (first_key, end_key) in zip(*map(pairwise, starts), strict=True):
        place = torch.arange(end - first)[:, None] + (end_key - first_key) - (end - first)
        seen = torch.arange(end_key - first_key)
        mask = (seen <= place) & ((seen >= place - window) if window >= 0 else True)
        parts = query[first:end], key[first_key:end_key], value[first_key:end_key]
        own = (x.transpose(0, 1)[None] for x in parts)
        output = F.scaled_dot_product_attention(*own, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@contextmanager
def may_wait() -> Iterator[None]:
    """For what the simulation does itself."""
    before = device.set_may_wait(True)
    try:
        yield
    finally:
        device.set_may_wait(before)


# now, and not in pytest_configure: conftest.py comes before it, and the package asks for CUDA's functions
for name, function in CUDA.items():
    setattr(torch.cuda, name, function)
torch.Tensor.pin_memory = lambda self: self
torch.Generator = Generator
varlen.varlen_attn = varlen_attn
