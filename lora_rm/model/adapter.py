"""The LoRA adapter: its configuration, where its matrices start, and the form it is saved in."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb_functional
import torch
from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_rm.config import AdapterSettings
from lora_rm.errors import ModelError
from lora_rm.model.base import BaseModel
from lora_rm.model.quantization import hash_tensors
from lora_rm.model.tensor_files import load_tensors, save_tensors, tensors_by_name

WEIGHTS = "adapter_model.safetensors"


def lora_config(settings: AdapterSettings, backbone: nn.Module) -> LoraConfig:
    """The PEFT configuration; the task type makes PEFT train and save the head."""
    targets: Any = list(settings.target_modules)
    if targets == ["all-linear"] and settings.layers_to_transform:  # PEFT wants names here, not all-linear
        kinds = (nn.Linear, Conv1D)
        targets = sorted(
            {name.rpartition(".")[2] for name, m in backbone.named_modules() if isinstance(m, kinds)}
        )
    with_images = hasattr(backbone, "language_model")
    own: dict[str, Any] = {"default": True, "orthogonal": True, "loftq": True}  # the last two: set below
    return LoraConfig(
        task_type="SEQ_CLS",
        # of a model with images only the decoder is adapted: text gives the rest no gradient
        exclude_modules=r"(?!.*\blanguage_model\.).*" if with_images else None,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        layers_to_transform=list(settings.layers_to_transform) or None,
        # sorted: where two patterns fit a layer PEFT takes the first, and it sorts them when it saves (0.21.2),
        # so an unsorted order would give other scales after a reload
        rank_pattern=dict(sorted(settings.rank_pattern.items())),
        alpha_pattern=dict(sorted(settings.alpha_pattern.items())),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=own.get(settings.init, settings.init),
        # rho 1: every layer keeps the rank it was given, so a checkpoint's shapes do not depend on the data
        eva_config=EvaConfig(rho=1.0) if settings.init == "eva" else None,
    )


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers with their names in the plain model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            yield name.removeprefix("base_model.model."), module


def start_matrices(model: PeftModel, settings: AdapterSettings, base: BaseModel) -> "ChangedBase | None":
    """Gives a new adapter the start of `adapter.init`, where PEFT gives none or not an exact one.

    Args:
        model: With the adapter in it.
        settings: Of the adapter.
        base: Below it.

    Returns:
        What the start took out of the base, if anything.

    Raises:
        ModelError: If the base's weights are not those that this start takes.
    """
    if settings.init in ("olora", "loftq"):
        check_stored_by_rows(model, settings.init)
    if settings.use_dora:
        start_magnitudes(model)
    if settings.init == "orthogonal":
        start_orthogonal(model)
    elif settings.init == "loftq":
        start_from_residual(model, base)
    return ChangedBase(model) if settings.init in ("pissa", "olora") else None


def check_stored_by_rows(model: PeftModel, init: str) -> None:
    """Raises if an adapted layer stores its weight as (in, out), which olora and loftq do not take.

    Raises:
        ModelError: Naming the layer. A square weight would give another start without an error (GPT-2).
    """
    for name, layer in lora_layers(model):
        base = layer.get_base_layer()
        if isinstance(base, Conv1D) or getattr(base, "source_cls", None) is Conv1D:
            raise ModelError(
                f"adapter.init is {init}, which takes weights for (out, in), but {name} stores its own as (in, out). "
                "Use adapter.init default."
            )


def start_orthogonal(model: PeftModel) -> None:
    """Starts A and B at random values whose product is zero although neither is.

    The rows of one orthogonal matrix are shared out between both
    (datta0.github.io/posts/rethink-lora-init). PEFT 0.21 makes them in the base's type: with bfloat16 the
    product is not zero, with 4-bit weights they are uint8.
    """
    for _, layer in lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        half = a.shape[0] // 2
        rows = torch.linalg.qr(torch.randn(2 * half, 2 * half)).Q
        a.data.copy_((torch.randn(a.shape[1], half) @ rows[0::2]).T / 10)
        b.data.copy_(torch.randn(b.shape[0], half) @ rows[1::2] / 10)


def start_magnitudes(model: PeftModel) -> None:
    """Starts DoRA's magnitudes at the norms of the base's rows, so that training starts at the base's rewards.

    Liu et al. 2024 (arXiv 2402.09353), eq. 5. PEFT 0.21 rounds them to the base's type: 1 % of the spread of rewards.
    """
    for _, layer in lora_layers(model):
        weight = dequantize_module_weight(layer.get_base_layer()).float()
        norms = torch.linalg.norm(weight, dim=0 if layer.fan_in_fan_out else 1)
        layer.lora_magnitude_vector["default"].weight.data.copy_(norms)


def start_from_residual(model: PeftModel, base: BaseModel) -> None:
    """Starts every pair of matrices at the best approximation of what 4-bit storage lost of its weight.

    LoftQ, Li et al. 2023 (arXiv 2310.08659), alg. 1 with one step: the codes stay those of the base, and
    scale B A is the rank-r part of W - dequantised(W), by singular values. A rank above the smaller side of a
    weight leaves the rest at the default start.

    Raises:
        ModelError: If a weight is not in the base's files under its name.
    """
    stored = tensors_by_name(base.weight_files)
    prefix = f"{model.get_base_model().base_model_prefix}."
    for name, layer in lora_layers(model):
        weight = layer.get_base_layer().weight
        source = stored.get(f"{name}.weight") or stored.get(f"{name.removeprefix(prefix)}.weight")
        if source is None or math.prod(source.shape) != math.prod(weight.quant_state.shape):  # codes
            raise ModelError(
                f"{base.name}: its files hold no {name}.weight in 16 or 32 bits, which adapter.init loftq compares with the 4-bit "
                "values. Use adapter.init default."
            )
        seen = bnb_functional.dequantize_4bit(weight.data, weight.quant_state).float()
        residual = source.read().to(seen) - seen
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        rank, roots = min(layer.r["default"], len(values)), values.sqrt()
        layer.lora_A["default"].weight.data[:rank] = roots[:rank, None] * right[:rank]
        layer.lora_B["default"].weight.data[:, :rank] = (
            left[:, :rank] * roots[:rank] / layer.scaling["default"]
        )


def start_from_activations(model: PeftModel, rewards: Any, batches: Sequence[Any]) -> None:
    """Starts every A at the main directions of its layer's inputs over the training data; B stays zero.

    EVA, Paischer et al. 2024 (arXiv 2410.07170), without moving ranks between layers; PEFT's own.

    Args:
        model: With `adapter.init` eva.
        rewards: Called with each batch; its activations are looked at.
        batches: Gone through until the directions stand still.
    """
    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda _, batch: rewards(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        gather_distributed_inputs=False,  # every process looks at the same batches
        show_progress_bar=False,
    )


class ChangedBase:
    """What an initialisation took out of the base: PiSSA and OLoRA leave W - scale B0 A0 there.

    Saved, the adapter becomes one of twice the rank on the base as it was, with the same sum (Meng et al. 2024,
    arXiv 2404.02948, appendix C):  scale (B A - B0 A0) = scale [B, -B0] [A; A0].
    """

    def __init__(self, model: PeftModel) -> None:
        self.matrices = {
            name: (
                layer.lora_A["default"].weight.detach().clone(),
                layer.lora_B["default"].weight.detach().clone(),
            )
            for name, layer in lora_layers(model)
        }

    @property
    def sha256(self) -> str:
        """Of all matrices: a run goes on only from the start it was begun with."""
        return hash_tensors(*(matrix for pair in self.matrices.values() for matrix in pair))

    def convert(self, folder: Path) -> None:
        """Rewrites a saved adapter to one of twice the rank that fits the unchanged base."""
        tensors = load_tensors(folder / WEIGHTS)
        for name, (a, b) in self.matrices.items():
            key_a, key_b = (f"base_model.model.{name}.lora_{kind}.weight" for kind in "AB")
            tensors[key_a] = torch.cat([tensors[key_a], a.cpu()], dim=0)
            tensors[key_b] = torch.cat([tensors[key_b], -b.cpu()], dim=1)
        save_tensors(tensors, folder / WEIGHTS)
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["r"] *= 2
        config["rank_pattern"] = {key: 2 * rank for key, rank in config["rank_pattern"].items()}
        growth = math.sqrt(2) if config["use_rslora"] else 2.0  # the scale stays as it was
        config["lora_alpha"] *= growth
        config["alpha_pattern"] = {key: growth * alpha for key, alpha in config["alpha_pattern"].items()}
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
