"""The frozen base shared out over the processes: each keeps a part of every weight (FSDP2).

A decoder layer's weights are gathered when its turn comes, forward and backward, and dropped after it. The 4-bit
codes travel as they are, packed in uint8; adapter, head and norms stay whole in every process and are summed by
`processes.sum_gradients`. Since the gathers must meet, every process makes the same passes in the same order.

torch's `fully_shard` (2.13) carries uint8 weights that are frozen. It gives back plain tensors, without
bitsandbytes' `quant_state` (bitsandbytes issue 1945, open with 0.50.2); `ExactLinear4bit` takes it from the layer.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import torch
import transformers.modeling_utils
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_rm import processes

Load = Callable[[dict[str, Any]], Any]
"""Loads a classifier by a `device_map`; what the map puts on meta is not read."""


class Shell:
    """A base whose decoder layers have no weights yet: small enough to be wrapped with an adapter first."""

    def __init__(self, load: Load, device: torch.device) -> None:
        """Loads all but the layers.

        Args:
            load: Of the base.
            device: Of this process.
        """
        self._load = load
        self._device = device
        self._path = _layers_path(load({"": "meta"}))
        with _not_dispatched():
            self.model = load({"": device, self._path: "meta"})
        self._layers = list(self.model.get_submodule(self._path))
        # the adapter will stand around these modules; they stay the same
        self._parts = [dict(layer.named_modules()) for layer in self._layers]
        for module in self.model.get_submodule(self._path).modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = _without_memory(parameter, device)

    def fill(self, held: torch.dtype) -> None:
        """Loads one layer after another, keeps this process' part of it, and lets the rest go.

        Args:
            held: Type of the weights that are not quantised.
        """
        mesh = init_device_mesh(self._device.type, (processes.count(),), mesh_dim_names=("fsdp",))
        backbone = getattr(self.model, self.model.base_model_prefix)
        for module in backbone.modules():
            if isinstance(module, nn.Embedding):
                _share_out(module, mesh, held)
        for number, (layer, parts) in enumerate(zip(self._layers, self._parts, strict=True)):
            name = f"{self._path}.{number}"
            with _not_dispatched():
                loaded = self._load({"": "meta", name: self._device}).get_submodule(name)
            for place, module in loaded.named_modules():
                module.requires_grad_(False)
                parts[place]._parameters.update(module._parameters)
                parts[place]._buffers.update(module._buffers)
                if isinstance(module, bnb.nn.Linear4bit):
                    parts[place].quant_state = module.weight.quant_state
                    module.weight.module = None
                # a model refers to itself: without this its weights would stay until Python looks for such circles
                module._parameters.clear()
            _share_out(layer, mesh, held)
        # the root gathers nothing itself; it lets the layers fetch the next one's weights ahead
        fully_shard(backbone, mesh=mesh, ignored_params=set(backbone.parameters()))


def set_gathered_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Sets the type in which layers see their sharded weights that are not quantised; the parts stay as they are."""
    for module in model.modules():
        if hasattr(module, "gathered_dtype"):
            module.gathered_dtype = dtype  # type: ignore[assignment]


def _share_out(module: nn.Module, mesh: Any, held: torch.dtype) -> None:
    """Shards the frozen matrices of a module; vectors are small and stay whole."""
    ignored = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad or parameter.dim() < 2:
                ignored.add(parameter)
            elif parameter.is_floating_point():
                parameter.data = parameter.data.to(held)
                _cast_when_gathered(part, name, held)
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)


def _cast_when_gathered(module: Any, name: str, held: torch.dtype) -> None:
    """Lets a module see a weight in `gathered_dtype`.

    `RewardModel.precise` computes in float32 for a while, without gradients. torch has no way to change the type of
    weights that are sharded already, and products of two types fail.
    """
    module.gathered_dtype = held
    before: list[Any] = []

    def enter(*_: Any) -> None:
        weight = module._parameters[name]
        if weight.dtype != module.gathered_dtype:
            before.append(weight)
            module._parameters[name] = nn.Parameter(weight.to(module.gathered_dtype), requires_grad=False)

    def leave(*_: Any) -> None:
        if before:
            module._parameters[name] = before.pop()

    module.register_forward_pre_hook(enter)  # after the gathering of an embedding, which is a hook of its own
    module.register_forward_hook(leave, prepend=True)


def _layers_path(model: Any) -> str:
    """Name of the list of decoder layers."""
    count = model.config.get_text_config().num_hidden_layers
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    return next((name for name in lists if "language_model" in name), next(iter(lists)))


def _without_memory(parameter: Any, device: torch.device) -> nn.Parameter:
    """A parameter of the same kind, type and shape that takes no memory, for PEFT to look at."""
    if isinstance(parameter, bnb.nn.Params4bit):
        codes = torch.empty(1, dtype=torch.uint8, device=device).expand(parameter.shape)
        return bnb.nn.Params4bit(
            codes, **{**parameter.__dict__, "requires_grad": False, "bnb_quantized": True}
        )
    return nn.Parameter(torch.empty(1, dtype=parameter.dtype, device=device).expand(parameter.shape), False)


@contextlib.contextmanager
def _not_dispatched() -> Iterator[None]:
    """Loads a model with parts on meta: transformers 5.23 gives it hooks that copy between devices and fails."""
    module: Any = transformers.modeling_utils
    before = module.accelerate_dispatch
    module.accelerate_dispatch = lambda *_: None
    try:
        yield
    finally:
        module.accelerate_dispatch = before
