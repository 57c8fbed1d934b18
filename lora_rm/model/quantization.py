"""What quantisation does to a weight: its codes, their hash, and the values that training really saw."""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import numpy as np
import torch

from lora_rm.errors import ModelError
from lora_rm.model.tensor_files import StoredTensor

PIECE = 2**17
"""Values of a weight that are quantised at once: half a MiB in float32, so that they stay in the cache."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype | None) -> str:
    """A type's name as settings and files spell it."""
    return str(dtype).removeprefix("torch.")


Storage: TypeAlias = Literal["nf4", "int8", "none"]
"""How the weights of linear layers are stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How the frozen linear layers are stored."""

    kind: Storage
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
        codes = self.codes(tuple(weight.shape))
        whole = 1 if self.by_rows(weight.shape) else 64  # so many rows end with a block
        rows = max(1, PIECE // (whole * weight.shape[1])) * whole
        for start in range(0, len(weight), rows):
            codes.quantize(start, weight[start : start + rows])
        codes.finish()
        # dequantised whole: with rows that are no multiple of 64, bitsandbytes 0.50.2 gives other values on a CPU
        # for another shape, and those that training saw are the ones wanted
        return codes.dequantize(0, len(weight), weight.dtype), codes.sha256()

    def codes(self, shape: tuple[int, ...]) -> "Codes4bit | Codes8bit":
        """Room for the codes of one weight of this shape, to be made a piece at a time."""
        return Codes4bit(shape, double=self.double) if self.kind == "nf4" else Codes8bit(shape)

    def by_rows(self, shape: Sequence[int]) -> bool:
        """Whether any rows of such a weight can be quantised and dequantised without the others."""
        return self.kind != "nf4" or shape[1] % 64 == 0


class Codes4bit:
    """The NF4 codes of one weight, made and read some rows at a time, by several threads if need be.

    Blocks of 64 values do not depend on each other; only their constants are quantised over the whole tensor
    (Dettmers et al. 2023, arXiv 2305.14314, section 3). So: `quantize` all rows, `finish`, then `dequantize`.

    Args:
        shape: Of the weight.
        double: Whether the block constants are quantised too.
    """

    def __init__(self, shape: tuple[int, ...], *, double: bool) -> None:
        self.columns = shape[1]
        self.double = double
        self.packed = torch.empty(-(-math.prod(shape) // 2), dtype=torch.uint8)
        """Two codes a byte, the first in the upper half."""
        self.constants = torch.empty(-(-math.prod(shape) // 64))
        """Largest absolute value of each block, float32; after `finish` as training saw it."""
        self.hashed: tuple[torch.Tensor, ...] = ()

    def quantize(self, row: int, values: torch.Tensor) -> None:
        """Makes the codes of the rows from `row`, which begins a block."""
        packed, constants = quantize_4bit(values.reshape(-1))
        start = row * self.columns
        self.packed[start // 2 : start // 2 + len(packed)] = packed
        self.constants[start // 64 : start // 64 + len(constants)] = constants

    def finish(self) -> None:
        """Quantises the constants."""
        self.hashed = (self.packed, self.constants)
        if self.double:
            nested, state, offset = _quantize_constants(self.constants)
            self.hashed = (self.packed, nested, state.absmax, offset)
            self.constants = bnb_functional.dequantize_blockwise(nested, state) + offset

    def sha256(self) -> str:
        """The hash that `code_hashes` takes of the live layer; 0.4 ns a value on a CPU with SHA instructions."""
        return hash_tensors(*self.hashed)

    def dequantize(self, row: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """The values of rows that begin with a block, (num_rows, columns)."""
        start, stop = row * self.columns, (row + num_rows) * self.columns
        return _dequantize_4bit(
            self.packed[start // 2 : -(-stop // 2)],
            self.constants[start // 64 : -(-stop // 64)],
            torch.Size((num_rows, self.columns)),
            # its products are in float32 whatever the type, but its rounding takes longer than torch's (0.9 and 0.2 ns)
            torch.float32 if _rounds_as_bitsandbytes() else dtype,
        ).to(dtype)


class Codes8bit:
    """The 8-bit codes of one weight, with the interface of `Codes4bit`; its rows do not depend on each other."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.packed = torch.empty(shape, dtype=torch.int8)
        self.scales = torch.empty(shape[0])

    def quantize(self, row: int, values: torch.Tensor) -> None:
        """Makes the codes of the rows from `row`."""
        rows = slice(row, row + len(values))
        self.packed[rows], self.scales[rows], _ = _quantize_8bit(values.to(torch.float16))

    def finish(self) -> None:
        """Nothing is left to do."""

    def sha256(self) -> str:
        """The hash that `code_hashes` takes of the live layer."""
        return hash_tensors(self.packed, self.scales)

    def dequantize(self, row: int, num_rows: int, dtype: torch.dtype) -> torch.Tensor:  # noqa: ARG002
        """The values of some rows, in float32 whatever `dtype`, as in the 8-bit product."""
        rows = slice(row, row + num_rows)
        return self.packed[rows].float() * (self.scales[rows, None] / 127.0)


_theirs = bnb_functional.quantize_4bit
_NF4 = bnb_functional.get_4bit_type("nf4", device="cpu").numpy()
NF4_BOUNDS = ((_NF4[1:] + _NF4[:-1]) / 2)[:, None]
"""Between two neighbouring values of NF4, float32 (15, 1): a code is the number of bounds below the value."""


@contextlib.contextmanager
def quantized_alike() -> Iterator[None]:
    """Lets bitsandbytes quantise what is loaded meanwhile by the functions here, which give the same bits on every device.

    Its own kernels do not: on a GPU they divide approximately and add up in another order than on a CPU, so a base that
    was trained there could not be made again by a merge elsewhere. On a CPU the bits are bitsandbytes' own, but for the last of
    the offset of a weight of more than 2 million values.
    """
    before = bnb_functional.quantize_4bit, bnb_functional.int8_vectorwise_quant
    bnb_functional.quantize_4bit, bnb_functional.int8_vectorwise_quant = _quantize_weight, _quantize_8bit
    try:
        yield
    finally:
        bnb_functional.quantize_4bit, bnb_functional.int8_vectorwise_quant = before


def _quantize_weight(
    weight: torch.Tensor, *, compress_statistics: bool, **settings: Any
) -> tuple[torch.Tensor, bnb_functional.QuantState]:
    """What `bitsandbytes.functional.quantize_4bit` gives for the settings of `Quantization.config`."""
    assert settings == {"blocksize": 64, "quant_type": "nf4", "quant_storage": torch.uint8}, settings
    flat = weight.reshape(-1)
    # a GPU makes three numbers of 4 bytes of each value
    size = PIECE if weight.device.type == "cpu" else 2**24
    parts = [quantize_4bit(flat[start : start + size]) for start in range(0, len(flat), size)]
    packed, constants = (torch.cat(part) for part in zip(*parts, strict=True))
    state = bnb_functional.QuantState(
        absmax=constants,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=64,
        code=bnb_functional.get_4bit_type("nf4", device=weight.device),
        quant_type="nf4",
    )
    if compress_statistics:
        state.absmax, state.state2, state.offset = _quantize_constants(constants.cpu())
        state.nested = True
        state.to(weight.device)
    return packed.view(-1, 1), state


def _quantize_constants(
    constants: torch.Tensor,
) -> tuple[torch.Tensor, bnb_functional.QuantState, torch.Tensor]:
    """Codes of the constants of a whole weight, their own constants, and their mean; on a CPU, whatever the device."""
    # a sum in float32 depends on the number of threads from 32,768 values on
    offset = constants.double().mean().float()
    nested, state = bnb_functional.quantize_blockwise(constants - offset, blocksize=256)
    return nested, state, offset


def _quantize_8bit(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """What `bitsandbytes.functional.int8_vectorwise_quant` gives of float16 values on a CPU."""
    scales = values.abs().amax(1).float()
    return (values * (127.0 / scales[:, None])).round().to(torch.int8), scales, None


def quantize_4bit(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NF4 codes of flat values, two a byte, and the float32 constants of their blocks of 64.

    The bits of bitsandbytes' `quantize_4bit` on a CPU, whose binary search takes 30 ns a value there.
    """
    if values.numel() % 64:  # the last block is shorter
        packed, state = _theirs(values.cpu(), blocksize=64, quant_type="nf4")
        return packed.view(-1).to(values.device), state.absmax.to(values.device)
    return _count_bounds(values)


def _count_bounds(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """On a CPU 3 ns a value: in numpy, for torch 2.13 compares floats to bytes one value at a time.

    All bounds in one call: every call of numpy's gives up Python's lock, and threads wait for it in turn.
    """
    blocks = values.to(torch.float32, copy=True).view(-1, 64)
    constants = blocks.abs().amax(1)
    scaled = blocks.mul_(constants.clamp(min=1e-38).reciprocal_()[:, None]).view(-1)
    if scaled.device.type != "cpu":
        return _search_bounds(scaled), constants
    codes = np.empty(scaled.shape, np.uint8)
    found: Any = scaled.numpy()
    for start in range(0, len(found), 2**16):  # 1 MiB of comparisons
        above = np.greater(found[start : start + 2**16], NF4_BOUNDS)
        np.add.reduce(above.view(np.uint8), axis=0, out=codes[start : start + 2**16])
    pairs = codes.view("<u2")  # second * 256 + first; times 4097, the bits 8 to 15 are first * 16 + second
    pairs *= 4097
    pairs >>= 8
    return torch.from_numpy(pairs.astype(np.uint8)), constants


def _search_bounds(scaled: torch.Tensor) -> torch.Tensor:
    """The same codes by a binary search, which a GPU is fast at."""
    bounds = torch.from_numpy(NF4_BOUNDS[:, 0]).to(scaled.device)
    codes = torch.bucketize(scaled, bounds, out_int32=True).view(-1, 2)
    return (codes[:, 0] * 16 + codes[:, 1]).to(torch.uint8)


def _dequantize_4bit(
    packed: torch.Tensor, constants: torch.Tensor, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    state = bnb_functional.QuantState(
        absmax=constants, shape=shape, code=None, blocksize=64, quant_type="nf4", dtype=dtype
    )
    return bnb_functional.dequantize_4bit(packed, state)


@functools.cache
def _rounds_as_bitsandbytes() -> bool:
    """Whether torch rounds values as bitsandbytes does, seen with constants halfway between two bfloat16 values."""
    packed, constants = _count_bounds(torch.randn(2**14, generator=torch.Generator().manual_seed(0)))
    halfway = (constants.view(torch.int32) | 0x8000).view(torch.float32)
    exact, rounded = (
        _dequantize_4bit(packed, halfway, torch.Size([2**14]), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    return torch.equal(exact.bfloat16(), rounded)


@dataclass(frozen=True, slots=True)
class StoredCodes(StoredTensor):
    """A weight that a checkpoint holds as bitsandbytes' 4-bit codes; `dtype` and `shape` are those of its values."""

    parts: tuple[StoredTensor, ...]
    """The codes, and the constants by the names that bitsandbytes gives them; they may lie in several files."""

    @property
    def num_bytes(self) -> int:
        """Of the codes in the file."""
        return math.prod(self.parts[0].shape) * self.parts[0].dtype.itemsize

    def dequantize(self) -> tuple[torch.Tensor, str]:
        """The values that a model which opens the checkpoint computes with, and the hash of the codes."""
        packed = self.parts[0].read().view(torch.uint8)
        state = bnb_functional.QuantState.from_dict(
            {part.name: part.read() for part in self.parts[1:]}, torch.device("cpu")
        )
        return bnb_functional.dequantize_4bit(packed, state), _hash_4bit(packed, state)


def stored_codes(tensors: Sequence[StoredTensor]) -> dict[str, StoredCodes]:
    """The weights among a checkpoint's tensors that are stored in 4 bit, by name."""
    named = {tensor.name: tensor for tensor in tensors}
    found = {}
    for tensor in tensors:
        name, is_state, _ = tensor.name.partition(".quant_state.bitsandbytes__")
        if not is_state:
            continue
        codes, settings = named[name], json.loads(bytes(tensor.read().tolist()))
        shape, dtype = tuple(settings["shape"]), DTYPES[settings["dtype"]]
        parts = (codes, *(one for key, one in named.items() if key.startswith(f"{name}.")))
        found[name] = StoredCodes(name, codes.file, dtype, shape, codes.start, parts)
    return found


def is_stored_in_4_bit(config: Any) -> bool:
    """Whether the weights of a model lie in its files as bitsandbytes' 4-bit codes; of no other kind either.

    Raises:
        ModelError: If they are quantised in another way.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("quant_method") == "bitsandbytes" and values.get("load_in_4bit"):
        return True
    raise ModelError(
        f"The base is stored quantised by {values.get('quant_method')}; known are 16- and 32-bit weights and "
        "bitsandbytes' 4-bit codes. Give the original model."
    )


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
            hashes[name] = hash_tensors(*codes_8bit(module))
    return hashes


class ExactLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc] # bitsandbytes has no types
    """A 4-bit layer that has one set of weights, whatever the type of its products.

    bitsandbytes 0.50.2 dequantises to the type of the input in the forward pass and to the load type in the
    backward pass. In another type (float32; float16 where the base was loaded in bfloat16) the two differ by the
    rounding to the load type, in 79 % of the values, so the model that was trained would not be the one that is merged and
    served. Here both passes use the values rounded to the load type.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X W^T + bias."""
        weight, state, dtype = self.weight, quant_state(self), self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # for few rows bitsandbytes' kernels round code, scale and product one after the other: other weights again
        if dtype == state.dtype != torch.float32 and x.numel() > 32 * x.shape[-1]:
            return bnb.matmul_4bit(x.to(dtype), weight, bias=bias, quant_state=state).to(x.dtype)
        y = _ExactProduct.apply(x.to(dtype), dense_weight(self))
        return (y if bias is None else y + bias).to(x.dtype)


class ExactLinear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """An 8-bit layer whose products with one token do not depend on the others, or on the type of the products.

    LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339) rounds the inputs to 8 bits too, but for columns in which any
    token of the row has an outlier. So a reward depends on its neighbours (94 % of the spread on SmolLM2-135M) and no
    merged model has the same ones. Here the weights alone are in 8 bits.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X W^T + bias."""
        dtype = autocast_dtype(x, torch.float32)
        y = _ExactProduct.apply(x.to(dtype), dense_weight(self))
        return (y if self.bias is None else y + self.bias.to(dtype)).to(x.dtype)


def autocast_dtype(x: torch.Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The type autocast computes products in where the tensor lies, or `otherwise` if it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise


class StoredLinear(torch.nn.Linear):
    """A frozen layer that keeps its 16-bit weight, which becomes float32 when a float32 product needs it.

    The values are the same, in half of the memory: an 8B model is scored in float32 on a 24 GB card.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X W^T + bias."""
        in_16_bit = torch.is_autocast_enabled(x.device.type)
        return torch.nn.functional.linear(x, self.weight if in_16_bit else self.weight.to(x.dtype), self.bias)


def keep_stored(model: torch.nn.Module) -> None:
    """Turns every plain 16-bit linear layer into a `StoredLinear`."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype != torch.float32:
            module.__class__ = StoredLinear


class _ExactProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Callable[[torch.dtype], torch.Tensor]) -> torch.Tensor:
        ctx.weight = weight
        return x @ weight(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.weight(gradient.dtype), None


def dense_weight(layer: Any) -> Callable[[torch.dtype], torch.Tensor]:
    """A function that gives the weight a linear layer has now, (out, in), in the type asked for.

    Of a sharded base the tensor is there whenever the layer computes, forward and backward.
    """
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear8bitLt):
        codes, scales = codes_8bit(layer)
        return lambda dtype: (codes * (scales / 127.0)[:, None]).to(dtype)
    if not isinstance(layer, bnb.nn.Linear4bit):
        return weight.to
    state = quant_state(layer)
    return lambda dtype: bnb_functional.dequantize_4bit(weight.data, state).to(dtype)


def _whole(weight: Any) -> torch.Tensor:
    """The codes; those of a sharded weight are gathered, for which every process must call this."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight.data


def make_exact(model: torch.nn.Module) -> None:
    """Turns quantised layers into exact ones, and stops bitsandbytes from repacking those of 4 bits in place.

    On CPUs with AVX512-BF16 the first forward pass without gradients repacks (bitsandbytes 0.50.2,
    Linear4bit.forward). After it dequantisation returns garbage and gradients through the base are None with
    only a warning.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.__class__ = ExactLinear4bit
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, bnb.nn.Linear8bitLt):
            module.__class__ = ExactLinear8bit


def codes_8bit(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) int8 and row scales (out,) of an 8-bit layer; a forward pass of bitsandbytes' moves them."""
    if module.state.CB is not None:
        return module.state.CB, module.state.SCB
    return (module.weight.data if module.weight.CB is None else module.weight.CB), module.weight.SCB


def _hash_4bit(codes: torch.Tensor, state: Any) -> str:
    if state.nested:
        return hash_tensors(codes, state.absmax, state.state2.absmax, state.offset)
    return hash_tensors(codes, state.absmax)


def hash_tensors(*tensors: torch.Tensor) -> str:
    """SHA-256 of the bytes of tensors, one after another."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(array)
    return digest.hexdigest()
