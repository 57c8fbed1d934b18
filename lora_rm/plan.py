"""Will it fit: memory and time of a run, from config.json alone, before any weight is fetched.

The bytes of a training step are counted by `model.memory`. They are linear in layers and in tokens, so two small
numbers of layers and two lengths of the row give a 32B model in seconds.

Quantities are bytes unless a name says otherwise.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lora_rm import processes
from lora_rm.checkpoint import RunFolder
from lora_rm.config import ModelSettings, Settings, with_whole_paths
from lora_rm.console import say, show_facts, show_table
from lora_rm.data.batches import Batching, num_tokens
from lora_rm.data.split import load_data
from lora_rm.data.tokens import ChatTokenizer, TokenTree
from lora_rm.errors import ConfigError, LoraRmError, ModelError, first_line
from lora_rm.merge import STORED, rounding_of
from lora_rm.metrics import read_metrics
from lora_rm.model.base import cache_folder, find_config
from lora_rm.model.checkpointing import MODES, Mode
from lora_rm.model.classifier import check_length, read_config, wanted_quantization
from lora_rm.model.device import host_memory, pick_compute_dtype, pick_device, segments_grow
from lora_rm.model.memory import (
    Held,
    LiveBytes,
    empty_model,
    fill,
    layer_counts,
    likely_batching,
    one_pair,
    plain_positions,
    rows_to_trace,
    run_step,
    trace,
    trace_without_data,
)
from lora_rm.model.quantization import DTYPES
from lora_rm.train import count_steps, rows_of_steps
from lora_rm.unfinished import write_atomically

GIB = 2**30

UNITS = {"GiB": GIB, "GB": 10**9, "MiB": 2**20, "MB": 10**6}

IMPORTS = 0.3 * GIB
"""Anonymous memory of torch and an adapter in a merge, measured with 7B shapes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a device takes beside tensors, and how fast it is; `calibrate` measures it."""

    kind: str
    """cuda or cpu."""

    context: float
    """Memory that no tensor can use: driver, kernels, other programs."""

    slack: float
    """Memory that the allocator takes for a step over the bytes of its tensors."""

    flops: float | None = None
    """Useful operations a second of a step in NF4."""

    workspace: float = 0.0
    """Memory of the allocator that the libraries keep; cuBLAS takes some for each thread that multiplies."""

    is_measured: bool = False


UNMEASURED = {
    # published: context 0.3 to 0.6 GB. Of an H200 with caps of 8 to 24 GiB: slack 1.01 to 1.05 where segments grow, else
    # up to 1.17; workspace 32 MiB forward and 32 backward
    "cuda": Machine(
        kind="cuda", context=0.5 * GIB, slack=1.06 if segments_grow() else 1.15, workspace=64 * 2**20
    ),
    "cpu": Machine(kind="cpu", context=0.0, slack=1.0),
}


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak of what a step takes beside what is held, over the tokens of its row: the highest of some lines.

    A step peaks either where the largest weight is dequantised or where one more activation lives, so the slope
    grows at about as many tokens as the model is wide.
    """

    lines: tuple[tuple[float, float], ...]
    """Bytes of no tokens, and bytes a token."""

    def at(self, tokens: float) -> float:
        """The peak of a row of so many tokens."""
        return max(fixed + slope * tokens for fixed, slope in self.lines)

    def tokens(self, room: float) -> int:
        """The tokens of the longest row that takes no more; 0 if none does."""
        return max(0, math.floor(min((room - fixed) / slope for fixed, slope in self.lines)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory of a run's training step."""

    settings: Settings
    machine: Machine
    memory: float
    """What the device has."""

    held: Held
    peaks: Mapping[Mode, Peak]
    """Activations and workspace by way of checkpointing, without slack."""

    batching: Batching
    compute_bytes: int
    """Of a value in matrix products."""

    held_bytes: int
    """Of a value of embeddings and norms."""

    num_layers: int
    """Of the decoder."""

    merged_bytes: int = 2
    """Of a value in the merged model."""

    @property
    def mode(self) -> Mode:
        """The way of checkpointing that is set, or else the fastest that fits."""
        wanted = self.settings.train.checkpointing
        fitting = [mode for mode in MODES if self.fits(mode)]
        return (fitting or [MODES[-1]])[0] if wanted == "auto" else wanted

    @property
    def longest_pair(self) -> int:
        """Tokens of two answers with the longest conversations and no common prompt; no row can be cut below."""
        return 2 * self.settings.data.max_length

    @property
    def row(self) -> int:
        """Tokens of the longest row of a run of pairs."""
        return max(self.settings.train.row, self.longest_pair)

    @property
    def optimizer(self) -> float:
        """Moments of AdamW: two float32 values a trained parameter, or two of 8 bits."""
        return self.held.trained * (2.0 if self.settings.train.optimizer == "adamw" else 0.5)

    @property
    def lasting(self) -> float:
        """Whatever does not depend on the row."""
        held, machine = self.held, self.machine
        both = 2 * held.trained  # parameters and gradients
        return held.quantized + held.frozen + both + self.optimizer + machine.context + machine.workspace

    @property
    def checks(self) -> float:
        """Peak while rewards are computed in float32, at the start and at the end, without optimizer.

        What is not quantised is then held in float32; the largest tensor for a moment in both types.
        """
        held = self.held
        wide = held.frozen * 4 / self.held_bytes
        step = max(self.held_bytes * held.largest_frozen * (self.held_bytes < 4), 6.0 * held.largest_linear)
        machine = self.machine
        return (
            held.quantized + wide + held.trained + step * machine.slack + machine.context + machine.workspace
        )

    @property
    def workspace(self) -> float:
        """The largest weight, dequantised for a product; a part of the step."""
        if self.settings.model.quantization == "none":
            return 0.0
        return self.held.largest_linear * self.compute_bytes

    def needed(self, mode: Mode, tokens: int) -> float:
        """Peak with a row of so many tokens."""
        return max(self.lasting + self.peaks[mode].at(tokens) * self.machine.slack, self.checks)

    def largest(self, mode: Mode) -> int:
        """Tokens of the longest row that fits; 0 if none does."""
        room = (self.memory - self.lasting) / self.machine.slack
        return self.peaks[mode].tokens(room) if self.checks <= self.memory else 0

    def fits(self, mode: Mode) -> bool:
        """Whether a run with these settings fits."""
        return self.needed(mode, self.row) <= self.memory

    @property
    def open_row(self) -> int:
        """What `tokens_per_microbatch` auto stands for: what fits, up to 16,384 or the longest pair; 0 if that does not fit."""
        largest = self.largest(self.mode)
        return max(self.longest_pair, min(16384, largest)) if largest >= self.longest_pair else 0

    @property
    def is_fitting(self) -> bool:
        """Whether the run fits, with rows that shrink where `tokens_per_microbatch` is auto."""
        is_open = self.settings.train.tokens_per_microbatch == "auto"
        return self.open_row > 0 if is_open else self.fits(self.mode)

    def with_row(self, tokens: int) -> "Plan":
        """The same with rows of so many tokens."""
        train = replace(self.settings.train, tokens_per_microbatch=tokens)
        return replace(self, settings=replace(self.settings, train=train))

    @property
    def settled(self) -> "Plan":
        """The same with a number for a `tokens_per_microbatch` of auto, if there is one that fits."""
        is_open = self.settings.train.tokens_per_microbatch == "auto" and self.is_fitting
        return self.with_row(self.open_row) if is_open else self

    @property
    def layer_modes(self) -> list[Mode]:
        """What each layer keeps: with `auto` the fastest mix of two ways that fits.

        Peaks are linear in the layers of each way. The upper layers keep more: the backward pass frees them first.
        """
        mode, total = self.mode, self.num_layers
        faster = MODES[MODES.index(mode) - 1]
        if self.settings.train.checkpointing != "auto" or mode == MODES[0] or not self.fits(mode):
            return [mode] * total
        least, most = self.needed(mode, self.row), self.needed(faster, self.row)
        num_faster = min(total, max(0, math.floor(total * (self.memory - least) / (most - least))))
        return [mode] * (total - num_faster) + [faster] * num_faster


def plan(settings: Settings, memory: float | None = None, *, gpu: bool = False) -> Plan:
    """Plans the memory of a run.

    Args:
        settings: Of the run; `model.base` is found as for training, but config.json is all that is read.
        memory: Of the device; None: that of the device here.
        gpu: For a CUDA card, which need not be here; what `calibrate` found is of the one that is.

    Raises:
        ModelError: If there is no such model, or its step cannot be traced.
    """
    device = torch.device("cuda") if gpu else pick_device(settings.model.device)
    on_gpu = device.type == "cuda"
    config = read_config(find_config(settings.model.base, settings.model.revision))
    wanted = settings.model.compute_dtype
    compute_dtype = torch.bfloat16 if gpu and wanted == "auto" else pick_compute_dtype(wanted, device)
    plain_positions(config.get_text_config())
    chosen = settings.train.batching
    batching: Batching = likely_batching(config, settings, compute_dtype) if chosen == "auto" else chosen
    low, high = layer_counts(config, settings)
    rows = rows_to_trace(config, settings, batching)
    num_layers = config.get_text_config().num_hidden_layers
    share = (num_layers - low) / (high - low) if high > low else 0.0
    peaks = {}
    for mode in MODES:
        small, points = trace_without_data(
            config, settings, mode, compute_dtype, batching, low, rows, on_gpu=on_gpu
        )
        big, more = small, points
        if high > low:
            big, more = trace_without_data(
                config, settings, mode, compute_dtype, batching, high, rows, on_gpu=on_gpu
            )
        held = small.toward(big, share)
        whole = [(n, few + share * (many - few)) for (n, few), (_, many) in zip(points, more, strict=True)]
        lines = []
        for (short, at_short), (long, at_long) in zip(whole[0::2], whole[1::2], strict=True):
            slope = (at_long - at_short) / (long - short)
            lines.append((at_short - slope * short, slope))
        peaks[mode] = Peak(tuple(lines))
    held_bytes = 4 if compute_dtype == torch.float32 else DTYPES[settings.model.load_dtype].itemsize
    if settings.train.sharding == "full" and processes.count() > 1:
        double = settings.model.double_quantization
        held = held.sharded(processes.count(), num_layers, double=double, held_bytes=held_bytes)
    return Plan(
        settings=settings,
        machine=UNMEASURED["cuda"] if gpu else machine_here(device),
        memory=_memory_here(device) if memory is None else memory,
        held=held,
        peaks=peaks,
        batching=batching,
        compute_bytes=compute_dtype.itemsize,
        held_bytes=held_bytes,
        num_layers=num_layers,
        merged_bytes=STORED[
            rounding_of(settings.merge.dtype, wanted_quantization(settings.model), config.model_type)
        ].itemsize,
    )


def _memory_here(device: torch.device) -> float:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device) + machine_here(device).context
        return min(float(total), free + own)  # other programs, a desktop for one, keep theirs
    return host_memory()[0] / processes.LOCAL_COUNT


def read_memory(text: str) -> float:
    """Bytes of a text like 24GiB; a number alone is GiB.

    Raises:
        ConfigError: If it is something else.
    """
    number, unit = next(
        ((text.removesuffix(u), size) for u, size in UNITS.items() if text.endswith(u)), (text, GIB)
    )
    try:
        value = float(number) * unit
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(
            f"--gpu is {text!r}; allowed: memory above 0 like {', '.join(f'24{u}' for u in UNITS)}."
        )
    return value


# -- what training asks -----------------------------------------------------------------------------------


def fit(settings: Settings) -> tuple[Settings, Plan | None]:
    """Plans a run on the device that is here, and fills in a `tokens_per_microbatch` of auto.

    On a CPU nothing is planned if neither `checkpointing` nor `tokens_per_microbatch` is auto: memory is seldom
    what is short there. Several processes agree on the rows that fit the smallest of their devices.

    Returns:
        The settings, and the plan; None where nothing was planned, or nothing can be known.

    Raises:
        ConfigError: If the run does not fit: how much it needs, and what would make it fit.
        ModelError: If there is no such base or device, or the base takes no conversations of `data.max_length`.
    """
    train = settings.train
    asked = "auto" in (train.checkpointing, train.tokens_per_microbatch)
    device = pick_device(settings.model.device)
    config = read_config(find_config(settings.model.base, settings.model.revision))
    check_length(
        config, settings.data.max_length, "A conversation of data.max_length"
    )  # before weights are fetched
    if not asked and device.type == "cpu":
        return settings, None
    is_open = train.tokens_per_microbatch == "auto"
    try:
        planned = plan(settings)
    except ModelError as error:
        say(f"The memory of this run cannot be planned: {error}")
        return settings, None
    everyone = processes.gather((planned.is_fitting, planned.open_row if is_open else train.row))
    if not all(fits for fits, _ in everyone):
        raise ConfigError(_does_not_fit(planned, planned.longest_pair if is_open else planned.row))
    if is_open:
        planned = planned.with_row(min(tokens for _, tokens in everyone))
    say(f"Planned: {_fits(planned)}")
    return planned.settings, planned


def _fits(planned: Plan) -> str:
    modes = planned.layer_modes
    kept = ", ".join(f"{mode} in {modes.count(mode)} layers" for mode in MODES if mode in modes)
    return (
        f"{_gib(planned.needed(planned.mode, planned.row))} of {_gib(planned.memory)} GiB with rows of "
        f"{planned.settings.train.row} tokens; checkpointing {kept}."
    )


def _does_not_fit(planned: Plan, tokens: int) -> str:
    needed, mode = planned.needed(planned.mode, tokens), planned.mode
    return (
        f"Training {planned.settings.model.base} needs {_gib(needed)} GiB with rows of {tokens} tokens and "
        f"checkpointing {mode}; {_gib(planned.memory)} GiB are there. What would help: {'; '.join(remedies(planned))}."
    )


def remedies(planned: Plan) -> list[str]:
    """What would make a run fit, the mildest first; what changes the result comes last."""
    settings, found = planned.settings, []
    for mode in MODES[MODES.index(planned.mode) :]:
        largest = planned.largest(mode)
        if largest >= planned.longest_pair:
            with_mode = "" if mode == planned.mode else f"train.checkpointing {mode} with "
            tokens = min(largest, settings.train.row)
            found.append(f"{with_mode}train.tokens_per_microbatch {tokens}")
    if found:
        return found
    longest = planned.largest(MODES[-1]) // 2
    if longest >= 64:
        found.append(
            f"train.checkpointing {MODES[-1]} with data.max_length {longest} and train.tokens_per_microbatch {2 * longest}"
        )
    held, now = planned.held, settings.model.quantization
    if now != "nf4":
        stored = held.quantized + held.frozen - (held.num_weights - held.num_linear) * planned.held_bytes
        found.append(
            f"model.quantization nf4 (weights of {_gib(held.num_linear * 4.127 / 8)} instead of {_gib(stored)} GiB)"
        )
    if settings.adapter.rank > 8:
        saved = (2 * held.trained + planned.optimizer) * (1 - 8 / settings.adapter.rank)
        found.append(f"adapter.rank 8 (frees {_gib(saved)} GiB)")
    smallest = planned.needed(MODES[-1], planned.longest_pair)
    return [*found, f"a device with {math.ceil(smallest / GIB)} GiB"]


# -- time, merge and the page -----------------------------------------------------------------------------


def tokens_per_second(planned: Plan) -> tuple[float, str] | None:
    """Tokens a second in training, and where the number comes from; None if nothing was measured."""
    run = RunFolder(Path(planned.settings.output_dir))
    file = run.metrics
    # a run of another model says nothing
    is_same = False
    with suppress(ConfigError):  # no run, or a file that cannot be read
        is_same = file.is_file() and run.settings().model == with_whole_paths(planned.settings).model
    if is_same:
        speeds = [line["tokens_per_second"] for line in read_metrics(file) if "tokens_per_second" in line]
        if speeds:
            return statistics.median(speeds), f"measured in {file}"
    if planned.machine.flops is None:
        return None
    # forward 2 operations a weight and token, backward 2 (frozen weights have no gradient), recomputing 2
    passes = 6 if planned.mode == "full" else 4
    return planned.machine.flops / (passes * planned.held.num_linear), "calibrated"


def _computed_tokens(row: Sequence[TokenTree], batching: Batching) -> int:
    """Tokens of a row, those that pad it among them."""
    if batching != "padded":
        return num_tokens(row, batching)
    lengths = [len(ids) for preference in row for ids in preference.conversations()]
    return len(lengths) * max(lengths)


def _time(planned: Plan) -> str:
    speed = tokens_per_second(planned)
    if speed is None:
        return "not known; `lora-rm plan --calibrate` on that machine, or a few steps of training, tell"
    text = f"{speed[0]:,.0f} tokens a second ({speed[1]})"
    settings = planned.settings
    if not settings.data.train:
        return f"{text}; give --data.train for the time of a run"
    try:
        folder = find_config(settings.model.base, settings.model.revision, tokenizer=True).path
        chat = ChatTokenizer.load(folder, settings.data)
        data = load_data(settings.data, chat, seed=settings.seed, cache=cache_folder())
    except (LoraRmError, OSError, ValueError) as error:
        return f"{text}; the data cannot be counted ({first_line(error)})"
    trees = data.train.trees
    num_steps = count_steps(len(trees), settings)
    steps = rows_of_steps(trees, settings, num_steps, planned.batching, settings.train.row)
    total = sum(_computed_tokens(row, planned.batching) for rows in steps for row in rows)
    return f"{total / speed[0] / 3600:.2f} hours of steps for {total:,.0f} tokens, at {text}; evaluations come on top"


def show_plan(planned: Plan) -> bool:
    """Prints the plan: memory by part, ways of checkpointing, time, and what the merge needs.

    Returns:
        Whether it fits.
    """
    fits, planned = planned.is_fitting, planned.settled
    held, settings, mode = planned.held, planned.settings, planned.mode
    step = planned.peaks[mode].at(planned.row)
    parts = {
        f"weights in {settings.model.quantization}" if held.quantized else "": held.quantized,
        "embeddings, norms" if held.quantized else "weights": held.frozen,
        "adapter and head": held.trained,
        "gradients": held.trained,
        f"moments of {settings.train.optimizer}": planned.optimizer,
        "dequantised weight": planned.workspace,
        f"activations of {planned.row} tokens": max(0.0, step - planned.workspace),
        "allocator": step * (planned.machine.slack - 1),
        "context and cuBLAS": planned.machine.context + planned.machine.workspace,
    }
    rows = [(name, _gib(value)) for name, value in parts.items() if name]
    total = planned.lasting + step * planned.machine.slack
    where = f"{planned.machine.kind}, {_gib(planned.memory)} GiB"
    show_table(
        f"{settings.model.base} on {where}, checkpointing {mode}",
        ("part", "GiB"),
        [*rows, ("training step", _gib(total)), ("float32 checks before and after", _gib(planned.checks))],
    )
    show_table(
        "Ways of checkpointing",
        ("checkpointing", "MB a token", "GiB", "largest row (tokens)", "fits"),
        [
            (
                name,
                f"{(peak.at(planned.row + 1) - peak.at(planned.row)) / 1e6:.2f}",
                _gib(planned.needed(name, planned.row)),
                f"{planned.largest(name):,}",
                "yes" if planned.fits(name) else "no",
            )
            for name, peak in planned.peaks.items()
        ]
        + [
            (
                "auto",
                "mixed",
                "what there is",
                f"{planned.largest(MODES[-1]):,}",
                "yes" if planned.fits(MODES[-1]) else "no",
            )
        ],
    )
    trained = settings.model.quantization != "none"
    show_facts(
        "Beside it",
        {
            "training time": _time(planned),
            "merge": f"{_gib(planned.merged_bytes * held.num_weights)} GiB of disk, {_gib(6 * held.largest_linear + IMPORTS)} GiB of memory; its "
            f"proof opens {_gib(4 * held.num_weights)} GiB in float32, shared out over GPU, memory and disk",
            "trained": f"{held.trained / 4:,.0f} of {held.num_weights + held.trained / 4:,.0f} parameters"
            + (", the rest frozen in " + settings.model.quantization if trained else ""),
            "context, allocator": "measured here"
            if planned.machine.is_measured
            else "assumed; on that machine --calibrate measures, and --gpu is left out",
        },
    )
    say(f"It fits: {_fits(planned)}" if fits else "It does not fit. " + _does_not_fit(planned, planned.row))
    return fits


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


# -- calibration ------------------------------------------------------------------------------------------


def calibrate(name: str = "auto") -> Machine:
    """Runs small real steps on this machine and keeps what they take beside the traced bytes.

    Args:
        name: As in `model.device`.

    Raises:
        ModelError: If there is no such device.
    """
    device = pick_device(name)
    is_cuda = device.type == "cuda"
    width = 2048 if is_cuda else 512
    shape = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4 if is_cuda else 2, "vocab_size": 1024,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 128, "num_labels": 1,
    }  # fmt: skip
    config = AutoConfig.for_model("llama", **shape)
    dtype = pick_compute_dtype("auto", device)
    settings = Settings(model=ModelSettings(base="calibration"))
    rows = [[one_pair(tokens)] for tokens in ((4096, 8192) if is_cuda else (1024, 2048))]
    _, traced = trace_without_data(
        config, settings, "none", dtype, "shared", shape["num_hidden_layers"], rows, on_gpu=is_cuda
    )
    model = empty_model(config, settings, "none", dtype, "shared")
    fill(model, device)
    context, slack, flops, workspace = 0.0, 1.0, 0.0, 0.0
    if is_cuda:
        torch._C._cuda_clearCublasWorkspaces()  # those of earlier work in this process
        before = torch.cuda.memory_allocated(device)
        trace(model, rows[:1], settings)  # the first step loads kernels
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        workspace = float(torch.cuda.memory_allocated(device) - before - gradients)
        torch.cuda.empty_cache()
    for row, (tokens, expected) in zip(rows, traced, strict=True):
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run_step(model, row, settings)
            slack = max(slack, (torch.cuda.max_memory_reserved(device) - before) / expected)
            free, total = torch.cuda.mem_get_info(device)
            context = float(total - free - torch.cuda.memory_reserved(device))
            torch.cuda.synchronize(device)
        else:
            (_, ((_, found),)) = trace(model, [row], settings)
            slack = found / expected
        started = time.monotonic()
        run_step(model, row, settings)
        if is_cuda:
            torch.cuda.synchronize(device)
        flops = 4 * LiveBytes().hold(model).num_linear * tokens / (time.monotonic() - started)
    values = {"context": context, "slack": slack, "flops": flops, "workspace": workspace}
    machine = Machine(kind=device.type, is_measured=True, **values)
    file = _calibration_file()
    known = _calibrations() | {_device_key(device): values}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(known, indent=1))
    say(
        f"{_device_key(device)}: context {_gib(context + workspace)} GiB, allocator {slack:.3f} times the traced bytes, "
        f"{flops / 1e12:.3g} TFLOP/s of a step in NF4. Kept in {file}."
    )
    return machine


def machine_here(device: torch.device) -> Machine:
    """What `calibrate` has found for a device, or what is assumed of its kind."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return UNMEASURED["cuda"]
    with suppress(LookupError, TypeError):  # never measured, or by another version
        return Machine(kind=device.type, is_measured=True, **_calibrations()[_device_key(device)])
    return UNMEASURED[device.type]


def _calibration_file() -> Path:
    return cache_folder() / "calibration.json"


def _calibrations() -> dict[str, Any]:
    """What was measured, by device and torch version; nothing if the file cannot be read."""
    with suppress(OSError, ValueError):
        known = json.loads(_calibration_file().read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    return {}


def _device_key(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"
    return f"{name}, torch {torch.__version__}"
