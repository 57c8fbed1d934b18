"""Bytes of a training step, counted on tensors that have no data.

Nothing here is a formula for activations: the real step (transformers, PEFT, bitsandbytes, tree attention, loss,
backward) runs under `FakeTensorMode`, and the bytes of the storages that live at once are counted.

Quantities are bytes unless a name says otherwise.
"""

import contextlib
import copy
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from peft.tuners.lora import dora
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from lora_rm.config import Settings
from lora_rm.data.batches import Batching
from lora_rm.data.tokens import ChatTokenizer, TokenTree
from lora_rm.errors import ModelError, first_line
from lora_rm.losses import preference_losses
from lora_rm.model.base import BaseModel
from lora_rm.model.checkpointing import Mode
from lora_rm.model.classifier import make_trainable, new_classifier, wanted_quantization
from lora_rm.model.cpu_kernels import without_runs
from lora_rm.model.cuda_kernels import without_launches
from lora_rm.model.quantization import codes_8bit, quantized_layers
from lora_rm.model.reward_model import RewardModel, cores_of_cpu


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What a model holds before and after a step."""

    quantized: float = 0.0
    """Codes and constants of the quantised layers."""

    frozen: float = 0.0
    """Embeddings, norms and whatever else is not quantised."""

    trained: float = 0.0
    """Adapter and head, float32; their gradients take as much again."""

    num_weights: float = 0.0
    """Parameters of the base (a count)."""

    num_linear: float = 0.0
    """Those of them that are multiplied with every token (a count)."""

    largest_linear: float = 0.0
    """Values of the largest quantised or adapted weight (a count)."""

    largest_frozen: float = 0.0
    """Values of the largest weight that is not quantised (a count)."""

    def toward(self, other: "Held", share: float) -> "Held":
        """The point on the line from this one (share 0) through the other (share 1)."""
        ours, theirs = ({name: getattr(x, name) for name in Held.__slots__} for x in (self, other))
        return Held(**{name: ours[name] + share * (theirs[name] - ours[name]) for name in ours})

    def sharded(self, count: int, num_layers: int, *, double: bool, held_bytes: int) -> "Held":
        """What one of `count` processes holds of a base that `sharding` shares out, with what it gathers at once.

        NF4's block constants stay whole. While a layer computes, the next one is fetched into a buffer and copied out of
        it: three layers at most. The embeddings, gathered in the same way, are there twice.

        Args:
            count: Processes.
            num_layers: Of the decoder.
            double: Whether the block constants are quantised too.
            held_bytes: Of a value that is not quantised.
        """
        constants = self.quantized * (0.127 / 4.127 if double else 0.5 / 4.5)
        largest = self.largest_frozen * held_bytes
        gathered = max(3 * (self.quantized + self.frozen - largest) / num_layers, 2 * largest)
        shared = self.quantized - constants
        own = {"quantized": constants + shared / count, "frozen": self.frozen / count + gathered}
        return replace(self, **own)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that live at once, each once, with or without data."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def see(self, *tensors: torch.Tensor) -> int:
        """Counts tensors that are not counted yet until they go; returns how many bytes are new."""
        before = self.now
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self.now += size
                self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))  # type: ignore[misc]
        self.peak = max(self.peak, self.now)
        return self.now - before

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts what it returns."""
        del types
        if func is torch.ops.bitsandbytes.gemm_4bit.default:  # dequantises inside, where no tensor shows
            self.peak = max(self.peak, self.now + math.prod(args[2]) * args[0].element_size())
        if "_varlen_attn_backward" in str(func):  # a private operator of torch's, whose name may change
            query, key, value = args[1:4]
            self.peak = max(self.peak, self.now + _flash_workspace(query, key, value))
        result = func(*args, **(kwargs or {}))
        self.see(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
        return result

    def hold(self, model: RewardModel) -> Held:
        """Counts a model's own tensors and gradients, by part."""
        layers: dict[str, Any] = dict(quantized_layers(model.classifier))
        quantized = sum(self.see(*_stored(layer)) for layer in layers.values())
        trained = [p for p in model.parameters() if p.requires_grad]
        trained_bytes = self.see(*trained)
        codes = {id(layer.weight) for layer in layers.values()}
        frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in codes]
        self.see(*(p.grad for p in trained if p.grad is not None))
        counts = [layer.out_features * layer.in_features for layer in layers.values()]
        if not layers:
            kinds = (nn.Linear, Conv1D)
            named = [(n, m.weight) for n, m in model.backbone.named_modules() if isinstance(m, kinds)]
            counts = [weight.numel() for name, weight in named if "lora_" not in name]
        return Held(
            quantized=quantized,
            frozen=self.see(*frozen, *model.buffers()),
            trained=trained_bytes,
            num_weights=sum(counts) * bool(layers) + sum(p.numel() for p in frozen),
            num_linear=sum(counts),
            largest_linear=max(counts),
            largest_frozen=max(p.numel() for p in frozen),
        )


def _flash_workspace(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """What flash attention's backward pass holds beside its arguments (mha_varlen_bwd of FlashAttention 2).

    The gradients, those of keys and values for each query head where heads share them, and that of the queries in float32
    first. For sums in one order that is there two or three times where a row has so few answers that they leave
    multiprocessors idle: at most 7 % of a step (a single pair of 16,384 tokens, an 8B model, `full`), left to the slack.
    """
    groups = query.shape[1] // key.shape[1]
    shared = groups * (key.nbytes + value.nbytes) if groups > 1 else 0
    return 4 * query.numel() + shared + query.nbytes + key.nbytes + value.nbytes


def _stored(layer: Any) -> list[torch.Tensor]:
    """Every tensor in which a quantised layer keeps its weight."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return list(codes_8bit(layer))
    state = layer.weight.quant_state
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [layer.weight, state.absmax, state.code, *nested]


def empty_model(
    config: Any, settings: Settings, mode: Mode, compute_dtype: torch.dtype, batching: Batching
) -> RewardModel:
    """The reward model of a run with its layers as training wraps them, on torch's meta device."""
    quantization = wanted_quantization(settings.model)
    with torch.device("meta"):
        model = new_classifier(config, settings.model.base, quantization.load_dtype)
    stored_as = quantization.config(compute_dtype)
    if stored_as is not None:
        AutoHfQuantizer.from_config(stored_as).preprocess_model(model, device_map=None)
        setattr(model, f"is_loaded_in_{4 if quantization.kind == 'nf4' else 8}bit", True)
    model.score.weight.data = model.score.weight.data.float()
    adapter = replace(settings.adapter, init="default")  # where the matrices start takes no memory in a step
    made = RewardModel(
        make_trainable(model, adapter),
        chat=cast("ChatTokenizer", None),
        base=cast("BaseModel", None),
        quantization=quantization,
        compute_dtype=compute_dtype,
    )
    made.wrap_layers()
    made.set_batching(batching)
    made.set_checkpointing([mode] * len(made.layers))
    if batching != "padded":
        made.spare_last_layer()
    return made.train()


def fill(model: RewardModel, device: torch.device) -> None:
    """Gives an empty model tensors: small random weights, or without data under `FakeTensorMode`."""
    quantization = model.quantization
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new: Any
            if name == "weight" and isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
                shape = (module.out_features, module.in_features)
                if isinstance(module, bnb.nn.Linear4bit):
                    values = torch.empty(shape, dtype=quantization.load_dtype, device=device).normal_(
                        std=0.02
                    )
                    codes, state = bnb_functional.quantize_4bit(
                        values, blocksize=64, compress_statistics=quantization.double, quant_type="nf4"
                    )
                    new = nn.Parameter(codes, requires_grad=False)
                    new.quant_state = state
                else:
                    new = nn.Parameter(
                        torch.ones(shape, dtype=torch.int8, device=device), requires_grad=False
                    )
                    new.CB, new.SCB = new.data, torch.ones(shape[0], device=device)
            else:
                values = torch.empty(old.shape, dtype=old.dtype, device=device).normal_(std=0.02)
                new = nn.Parameter(values, requires_grad=old.requires_grad)
            setattr(module, name, new)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.ones(buffer.shape, dtype=buffer.dtype, device=device))


def one_pair(tokens: int, answer: int = 32, number: int = 0) -> TokenTree:
    """A pair of so many tokens in all, two answers among them; pairs of other numbers share nothing with it."""
    answer = min(answer, tokens // 4)
    return TokenTree([number] * (tokens - 2 * answer), ([1] * answer, [2] * answer))


def rows_to_trace(config: Any, settings: Settings, batching: Batching) -> list[list[TokenTree]]:
    """Rows in pairs, one of them shorter and one longer than the model is wide: see `plan.Peak`.

    Where attention takes memory that grows with the square of the conversation (soft-capped scores, masks of a
    sliding window, padded rows), they hold pairs of the longest conversations, two thirds of them prompt;
    elsewhere a single pair stands for all, which is traced soonest.
    """
    text = config.get_text_config()
    width: int = text.hidden_size
    longest = settings.data.max_length
    window = getattr(text, "sliding_window", None) or longest
    if batching != "padded" and window >= longest and not getattr(text, "attn_logit_softcapping", None):
        lengths = (max(256, width // 4), max(512, width // 2), 2 * width, 4 * width)
        return [[one_pair(length)] for length in (lengths if width >= 1024 else (1024, 2048))]
    answer = longest // 3
    size = longest + answer
    over = math.ceil(1.5 * width / size)
    counts = (1, 2, over, 2 * over) if over > 2 else (over, 3 * over)
    num_lengths = 1 + answer // 8  # several, as in data: a mask is made for every length
    return [
        [one_pair(size - number % num_lengths, answer, number) for number in range(count)] for count in counts
    ]


def run_step(model: RewardModel, trees: Sequence[TokenTree], settings: Settings) -> int:
    """One microbatch as `train` computes it, gradients added up; returns its tokens.

    Raises:
        NotImplementedError: If the model does not compute rows of trees.
    """
    batch = model.batch(list(trees))
    rewards = model.rewards(batch)
    if batch.plan is not None and not batch.plan.calls:
        raise NotImplementedError("no layer uses the tree attention")
    losses = preference_losses(rewards, trees, settings.loss)
    (losses.sum() / len(trees)).backward()
    return batch.input_ids.numel()


def trace(
    model: RewardModel, rows: Sequence[Sequence[TokenTree]], settings: Settings
) -> tuple[Held, list[tuple[int, int]]]:
    """What a model holds, and for each row its tokens and the peak of a step beside what is held."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    points = []
    for trees in rows:
        live = LiveBytes()
        held = live.hold(model)
        start = live.now
        with live:
            tokens = run_step(model, trees, settings)
        points.append((tokens, live.peak - start))
    return held, points


def trace_without_data(
    config: Any,
    settings: Settings,
    mode: Mode,
    compute_dtype: torch.dtype,
    batching: Batching,
    num_layers: int,
    rows: Sequence[Sequence[TokenTree]],
    *,
    on_gpu: bool,
) -> tuple[Held, list[tuple[int, int]]]:
    """Traces a model of that configuration with so many layers, without data.

    The tensors lie on a CPU even for a GPU, which need not be here. PEFT asks whether autocast is on for CUDA, and if not copies every input to float32.

    Raises:
        ModelError: If the step depends on values.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    if settings.adapter.use_dora and settings.model.quantization == "int8":
        raise ModelError(
            "adapter.use_dora is true with model.quantization int8: bitsandbytes looks at real codes there, so its memory "
            "cannot be planned. Plan with --adapter.use-dora false; DoRA takes more."
        )
    try:
        with _dense_weights_of_dora():
            model = empty_model(config, settings, mode, compute_dtype, batching)
        core = "varlen" if on_gpu else cores_of_cpu(config, compute_dtype)[0]
        in_16_bits = on_gpu and compute_dtype != torch.float32
        with (
            _dense_weights_of_dora(),
            _no_data(autocast_on_gpu=in_16_bits),
            without_launches() if on_gpu else without_runs(),
        ):
            fill(model, torch.device("cpu"))
            if compute_dtype != torch.float32:
                model.set_core(core)
            return trace(model, rows, settings)
    except ModelError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{settings.model.base}: a training step of {config.model_type} with {batching} batches cannot be "
            f"traced without weights ({first_line(error, 160)}). Nothing is known about its memory; "
            "train a few steps and look at memory_gib in metrics.jsonl."
        ) from None


@contextlib.contextmanager
def _dense_weights_of_dora() -> Iterator[None]:
    """DoRA's dense weights of 4-bit layers as tensors of their size; PEFT reads them out of bitsandbytes' own class."""

    def dense(layer: Any) -> torch.Tensor:
        if not isinstance(layer, bnb.nn.Linear4bit):
            return dequantize_module_weight(layer)
        state = getattr(layer.weight, "quant_state", None)
        if state is None:  # on the meta device
            return layer.weight.new_empty(layer.out_features, layer.in_features, dtype=torch.float32)
        return bnb_functional.dequantize_4bit(layer.weight.data, state)

    before = dora.dequantize_module_weight, dora.deepcopy
    dora.dequantize_module_weight, dora.deepcopy = dense, lambda layer: layer  # no copy of codes without data
    try:
        yield
    finally:
        dora.dequantize_module_weight, dora.deepcopy = before


@contextlib.contextmanager
def _no_data(*, autocast_on_gpu: bool) -> Iterator[None]:
    # bitsandbytes makes its table of 8-bit values at first use and keeps it: it must be a real one
    bnb_functional.quantize_4bit(torch.zeros(64, 64), compress_statistics=True, quant_type="nf4")
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", autocast_on_gpu)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def likely_batching(config: Any, settings: Settings, compute_dtype: torch.dtype) -> Batching:
    """Shared rows, unless the layers do not use the tree attention; whether they are exact only values tell."""
    num_layers, row = layer_counts(config, settings)[0], [[one_pair(64)]]
    try:
        trace_without_data(config, settings, "none", compute_dtype, "shared", num_layers, row, on_gpu=False)
    except ModelError:
        return "padded"
    return "shared"


def layer_counts(config: Any, settings: Settings) -> tuple[int, int]:
    """Two small numbers of layers that stand for all, a period of kinds of layers apart; at least 3 and 4.

    Fewer would not do: the first layer computes no gradient of its input, and the last one only the answers' ends;
    the peak lies in one between. Where layers differ without a period, or the adapter is told their numbers, it is
    all of them twice.
    """
    text = config.get_text_config()
    total: int = text.num_hidden_layers
    kinds = list(getattr(text, "layer_types", None) or ["same"] * total)
    period = next(
        p for p in range(1, total + 1) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False))
    )
    few = max(3, period + 1)
    adapter = settings.adapter
    unlike = getattr(text, "first_k_dense_replace", None)  # DeepSeek's first layers have no experts
    numbered = adapter.layers_to_transform or adapter.rank_pattern or unlike
    return (total, total) if numbered or few + period >= total else (few, few + period)


def plain_positions(text: Any) -> None:
    """Takes plain rotary positions where the model chooses by the longest one, which only real values tell."""
    found = getattr(text, "rope_parameters", None) or {}
    for values in [found, *found.values()]:
        if isinstance(values, dict) and values.get("rope_type") in ("dynamic", "longrope"):
            values["rope_type"] = "default"
