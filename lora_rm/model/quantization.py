"""What quantisation does to a weight: its codes, their hash, and the values that training really saw."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch

PIECE = 2**20
"""Values of a weight that are quantised at once in a round trip; a multiple of the block size of 64."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How the frozen linear layers are stored."""

    kind: Literal["nf4", "int8", "none"]
    double: bool
    """Of NF4: whether the block constants are quantised too."""

    load_dtype: torch.dtype
    """Type the weights are read in before they are quantised; float16 changes 5.7 % of the values."""

    def config(self, compute_dtype: torch.dtype) -> Any:
        """The matching `transformers.BitsAndBytesConfig`, or None.

        `llm_int8_skip_modules` stays unset: any list of one's own replaces transformers' default and the
        score head becomes a 4-bit layer (seen with transformers 5.23).
        """
        from transformers import BitsAndBytesConfig

        if self.kind == "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=self.double,
                bnb_4bit_compute_dtype=compute_dtype,
            )
        if self.kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return None

    def round_trip(self, weight: torch.Tensor) -> tuple[torch.Tensor, str]:
        """Quantises a weight as loading it for training does, and back.

        Args:
            weight: The whole matrix as the checkpoint holds it; the nested offset is a mean over the tensor,
                so rows cannot be done one by one.

        Returns:
            The values that training saw, in `load_dtype` (float32 for int8), and the hash of the codes.
        """
        weight = weight.to(self.load_dtype)
        if self.kind == "nf4":
            return self._round_trip_4bit(weight)
        codes, scales, _ = bnb_functional.int8_vectorwise_quant(weight.to(torch.float16))
        return codes.float() * (scales.float()[:, None] / 127.0), _hash_tensors(codes, scales)

    def _round_trip_4bit(self, weight: torch.Tensor) -> tuple[torch.Tensor, str]:
        """`quantize_4bit` and `dequantize_4bit` of the whole tensor, bit for bit, quantised a piece at a time.

        bitsandbytes' own takes 14 bytes of scratch a value on a CPU (630 MB for 11008 x 4096). The blocks of 64
        do not depend on each other; only their constants are quantised over the whole tensor.
        """
        pieces = weight.reshape(-1).split(PIECE)
        quantized = [
            bnb_functional.quantize_4bit(piece, blocksize=64, compress_statistics=False, quant_type="nf4")
            for piece in pieces
        ]
        constants = torch.cat([state.absmax for _, state in quantized])
        table = quantized[0][1].code
        hashed = [torch.cat([codes for codes, _ in quantized]), constants]
        if self.double:
            offset = constants.mean()
            nested, state = bnb_functional.quantize_blockwise(constants - offset, blocksize=256)
            hashed = [hashed[0], nested, state.absmax, offset]
            constants = bnb_functional.dequantize_blockwise(nested, state) + offset
        # dequantised whole: with rows that are no multiple of 64, bitsandbytes 0.50.2 gives other values on a CPU
        # for another shape, and those that training saw are the ones wanted
        whole = bnb_functional.QuantState(
            absmax=constants,
            shape=weight.shape,
            code=table,
            blocksize=64,
            quant_type="nf4",
            dtype=weight.dtype,
        )
        return bnb_functional.dequantize_4bit(hashed[0], whole), _hash_tensors(*hashed)


def quantized_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The model's quantised linear layers by name."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {
        name.removesuffix(".base_layer"): module  # PEFT's name for the layer inside a LoRA layer
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def quant_state(layer: Any) -> Any:
    """Constants of a 4-bit layer; a weight that was sharded over processes has lost its own."""
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


def code_hashes(model: torch.nn.Module) -> dict[str, str]:
    """A hash of the codes and constants of every quantised layer, by layer name.

    If the base is sharded over processes, every one of them must call this.

    The merge rebuilds the codes from the checkpoint and compares: a base that has changed since training, or
    a machine that quantises differently, is found before anything is written.
    """
    hashes = {}
    for name, module in quantized_layers(model).items():
        weight: Any = module.weight
        if isinstance(module, bnb.nn.Linear4bit):
            hashes[name] = _hash_4bit(_whole(weight), quant_state(module))
        else:
            hashes[name] = _hash_tensors(*codes_8bit(module))
    return hashes


class ExactLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc] # bitsandbytes has no types
    """A 4-bit layer that has one set of weights, whatever the type of its products.

    bitsandbytes 0.50.2 dequantises to the type of the input in the forward pass and to the load type in the
    backward pass. In float32 the two differ by the rounding to bfloat16, so a model trained in float32 would
    not be the one that is merged and served. Here both passes use the values rounded to the load type.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X W^T + bias."""
        weight, state, dtype = self.weight, quant_state(self), self.compute_dtype
        if dtype != torch.float32:
            bias = None if self.bias is None else self.bias.to(dtype)
            return bnb.matmul_4bit(x.to(dtype), weight, bias=bias, quant_state=state).to(x.dtype)
        y = _ExactProduct.apply(x.float(), weight, state)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class _ExactProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, state: Any) -> torch.Tensor:
        ctx.weight, ctx.state = weight, state
        return x @ _dequantized(weight, state).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ _dequantized(ctx.weight, ctx.state), None, None


def _whole(weight: Any) -> torch.Tensor:
    """The codes; those of a sharded weight are gathered, for which every process must call this."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight.data


def _dequantized(weight: Any, state: Any) -> torch.Tensor:
    return bnb_functional.dequantize_4bit(weight.data, state).float()


def make_exact(model: torch.nn.Module) -> None:
    """Turns every 4-bit layer into an `ExactLinear4bit` and stops bitsandbytes from repacking it in place.

    On CPUs with AVX512-BF16 the first forward pass without gradients repacks (bitsandbytes 0.50.2,
    Linear4bit.forward). After it dequantisation returns garbage and gradients through the base are None with
    only a warning.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.__class__ = ExactLinear4bit
            module.support_avx512bf16_for_cpu = False


def codes_8bit(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) int8 and row scales (out,) of an 8-bit layer; the first forward pass moves them."""
    if module.state.CB is not None:
        return module.state.CB, module.state.SCB
    return (module.weight.data if module.weight.CB is None else module.weight.CB), module.weight.SCB


def _hash_4bit(codes: torch.Tensor, state: Any) -> str:
    if state.nested:
        return _hash_tensors(codes, state.absmax, state.state2.absmax, state.offset)
    return _hash_tensors(codes, state.absmax)


def _hash_tensors(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(array)
    return digest.hexdigest()
