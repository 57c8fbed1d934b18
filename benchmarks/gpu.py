"""Training steps on one GPU, ours beside TRL's, and the planner beside the device: random weights in real shapes.

    python benchmarks/gpu.py [--quick] [--json FILE] [--model llama3.1-8b qwen3-32b] [--tokens 4096 8192]
    python benchmarks/gpu.py --caps 8 12 16 24

The weights are drawn on the device and go straight into NF4 with double quantisation, so nothing is downloaded.
Needs torch, transformers, peft, bitsandbytes, accelerate and this package; where TRL is installed, its own trainer
runs too. A step has 64 pairs (`--pairs`) of HH's lengths (medians of 144 prompt and 67 answer tokens); it builds its batches,
clips the gradient and reads the rewards, as in training. Model-FLOP utilisation counts
4 N per token computed (2 N forward, 2 N backward through frozen weights; N: parameters of the linear layers), recomputation
not counted, nor what the last layer is spared where only the answers' ends are read.

With `--caps` the allocator gets no more than so many GiB, the planner is asked for the longest row, and a step of that
row is taken: what was planned stands beside what the device counted.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear4bit as PeftLinear4bit
from transformers import AutoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from lora_rm.config import Settings, check_settings
from lora_rm.console import say, show_table
from lora_rm.data.batches import Batching, TreeBatch, build_batch, microbatches, num_tokens, prefetched
from lora_rm.data.tokens import TokenTree
from lora_rm.errors import first_line
from lora_rm.evaluate import without_nan
from lora_rm.model.adapted_linear import AdaptedLinear4bit
from lora_rm.model.checkpointing import MODES, Mode
from lora_rm.model.device import is_out_of_memory, pick_device
from lora_rm.model.elementwise import FusedNorm, GatedMLP, fuse_elementwise, give_back_rotary
from lora_rm.model.memory import empty_model, fill
from lora_rm.model.reward_model import RewardModel
from lora_rm.plan import GIB, Plan, calibrate, plan
from lora_rm.train import build_optimizer

MODELS: dict[str, dict[str, Any]] = {
    "llama3.2-3b": {
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "qwen3-32b": {
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
    },
}  # fmt: skip

PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "4090": 165e12,
    "3090": 71e12,
    "L40S": 362e12,
    "L40": 181e12,
    "5090": 210e12,
}
"""Dense bfloat16 FLOP/s with float32 accumulation, from the makers' data sheets; of two names that fit, the first."""


CAPPED = {8: ["llama3.2-3b"], 12: ["llama3.1-8b"], 16: ["llama3.1-8b"], 24: ["llama3.1-8b"]}
"""Models that are planned for a card of so many GiB."""


TOLD = ("cap_gib", "mode", "tokens_per_microbatch", "way", "seconds", "counted_gib", "error")
"""What is printed of a row as soon as it is known."""


def main() -> None:
    """Times every way and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, under a minute, on a CPU too")
    parser.add_argument("--json", type=Path, help="write the table as a list of rows")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama3.1-8b", "qwen3-32b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192], help="tokens of a microbatch")
    parser.add_argument(
        "--ways", nargs="+", choices=["ours", "padded", "trl"], default=["ours", "padded", "trl"]
    )
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[4, 8, 16], help="pairs of a batch of TRL's way"
    )
    parser.add_argument("--pairs", type=int, default=64, help="pairs of a step (default: 64)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--caps",
        nargs="*",
        type=int,
        choices=CAPPED,
        help="GiB of cards whose plans are compared, instead of steps",
    )
    wanted = parser.parse_args()
    device = pick_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append({"device": name, **without_nan(row)})
        say(f"{row['model']}: " + ", ".join(str(value) for key, value in row.items() if key in TOLD))
        if wanted.json:
            wanted.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")

    if wanted.caps is not None:
        for row in compare_plans(wanted.caps or list(CAPPED), device):
            keep(row)
        show_plans(rows)
        return
    peak = next((value for key, value in PEAK.items() if key in name), math.nan)
    for shape in ["tiny"] if wanted.quick else wanted.model:
        model = random_model(MODELS[shape], device)
        pairs = make_pairs(8 if wanted.quick else wanted.pairs, MODELS[shape]["vocab_size"])
        sizes = [size for size in wanted.batches if len(pairs) % size == 0]
        for tokens in [1024] if wanted.quick else wanted.tokens:
            if "ours" in wanted.ways:
                for title, found in our_ways(model, pairs, tokens, wanted.repeats, peak):
                    keep({"model": shape, "tokens_per_microbatch": tokens, "way": title, **found})
        if "padded" in wanted.ways:
            for title, found in padded_ways(model, pairs, sizes, wanted.repeats, peak):
                keep({"model": shape, "way": title, **found})
        if "trl" in wanted.ways and importlib.util.find_spec("trl"):
            for title, found in trl_ways(model, pairs, sizes, wanted.repeats, peak):
                keep({"model": shape, "way": title, **found})
        del model
        gc.collect()
    show(rows)


def our_ways(
    model: RewardModel, pairs: list[TokenTree], tokens: int, repeats: int, peak: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Our ways of a step, in rows of so many tokens."""
    for mode in MODES:
        rows = microbatches(pairs, tokens, "shared")
        yield f"shared, {mode}", measure(model, rows, "shared", mode, repeats, peak)
    yield (
        "packed, none",
        measure(model, microbatches(pairs, tokens, "packed"), "packed", "none", repeats, peak),
    )


def padded_ways(
    model: RewardModel, pairs: list[TokenTree], sizes: list[int], repeats: int, peak: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What TRL computes, each batch as long as its longest conversation; in PEFT's own layers."""
    with peft_layers(model):
        ways: list[tuple[int, Mode]] = [*((size, "none") for size in sizes), (8, "full")]
        for size, mode in ways:
            for order, ordered in orders(pairs).items():
                rows = [ordered[start : start + size] for start in range(0, len(pairs), size)]
                title = f"padded, batches of {size} {order}, {mode}"
                yield title, measure(model, rows, "padded", mode, repeats, peak)


def trl_ways(
    model: RewardModel, pairs: list[TokenTree], sizes: list[int], repeats: int, peak: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """TRL's own trainer, without checkpointing and with its defaults.

    The model's 4-bit layers stay ours, whose products are bitsandbytes' own on a GPU.
    """
    with peft_layers(model):
        for size in sizes:
            for order, ordered in orders(pairs).items():
                found = measure_trl(model, ordered, size, repeats, peak, checkpointing=False)
                yield f"TRL, batches of {size} {order}", found
        yield "TRL's defaults (8, full)", measure_trl(model, pairs, 8, repeats, peak, checkpointing=True)


def orders(pairs: list[TokenTree]) -> dict[str, list[TokenTree]]:
    """The pairs as they come, and by length, which pads least and leaves the gradient of a step as it is."""
    longest = {id(pair): max(map(len, pair.conversations())) for pair in pairs}
    return {"in random order": pairs, "by length": sorted(pairs, key=lambda pair: longest[id(pair)])}


@contextmanager
def peft_layers(model: RewardModel) -> Iterator[None]:
    """Adapted layers, norms, activations and positions as PEFT and transformers compute them."""
    own = {
        module: type(module)
        for module in model.modules()
        if isinstance(module, AdaptedLinear4bit | FusedNorm | GatedMLP)
    }
    for module, kind in own.items():
        module.__class__ = PeftLinear4bit if kind is AdaptedLinear4bit else kind.__bases__[1]
    give_back_rotary()
    try:
        yield
    finally:
        for module, kind in own.items():
            module.__class__ = kind
        fuse_elementwise(model)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    show_table(
        f"QLoRA reward-model steps on {rows[0]['device']}",
        ["model", "tokens", "way", "pairs/s", "tokens/s", "MFU", "peak GiB", "kernels"],
        [
            [
                row["model"], row.get("tokens_per_microbatch", "-"), row["way"], _number(row.get("pairs_per_second"), ".2f"),
                _number(row.get("tokens_per_second"), ".0f"), _number(row.get("mfu"), ".0%"),
                _number(row.get("peak_gib"), ".1f"), row.get("kernels", row.get("error", "")),
            ]
            for row in rows
        ],
    )  # fmt: skip


def random_model(shape: dict[str, Any], device: torch.device) -> RewardModel:
    """A reward model with rank-16 adapters over random NF4 weights, drawn on the device."""
    values = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(shape["model_type"], **values, num_labels=1, pad_token_id=0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = empty_model(config, Settings(), "none", dtype, "shared")
    fill(model, device)
    # TRL's trainer asks it whether 4-bit weights can be trained on
    model.classifier.hf_quantizer = AutoHfQuantizer.from_config(model.quantization.config(dtype))
    return model


def make_pairs(count: int, vocabulary: int, seed: int = 0) -> list[TokenTree]:
    """Pairs of HH's lengths."""
    generator = random.Random(seed)

    def ids(median: int) -> list[int]:
        length = min(1024, max(4, round(median * math.exp(generator.gauss(0, 0.6)))))
        return [generator.randrange(vocabulary) for _ in range(length)]

    return [TokenTree(ids(144), (ids(67), ids(67))) for _ in range(count)]


def measure(
    model: RewardModel,
    rows: list[list[TokenTree]],
    batching: Batching,
    mode: Mode,
    repeats: int,
    peak: float,
) -> dict[str, Any]:
    """Seconds, memory and kernels of an optimizer step over the rows, in one way."""
    model.set_batching(batching)
    model.set_checkpointing([mode] * len(model.layers))
    model.train()
    num_pairs = sum(map(len, rows))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    on_gpu, core = model.device.type == "cuda", model.core

    def step() -> None:
        built = (build_batch(row, batching, core) for row in rows)
        for batch in prefetched(batch.pin() if on_gpu else batch for batch in built):
            rewards = model.rewards(batch.to(model.device))
            loss = -F.logsigmoid(rewards[0::2] - rewards[1::2]).sum() / num_pairs
            rewards.tolist()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        step()
        if on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(repeats):
            _wait(on_gpu)
            started = time.perf_counter()
            step()
            _wait(on_gpu)
            seconds.append(time.perf_counter() - started)
        memory = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    try:
        by_kernel = kernels(step) if on_gpu else ""
    except RuntimeError as error:  # the profiler takes memory too
        optimizer.zero_grad(set_to_none=True)
        by_kernel = first_line(error, 60)
    batches = [model.batch(row) for row in rows]
    used = statistics.median(seconds)
    computed = sum(batch.input_ids.numel() for batch in batches)
    found: dict[str, Any] = {
        "pairs": num_pairs, "rows": len(rows), "seconds": used, "computed_tokens": computed, "pairs_per_second": num_pairs / used,
        "tokens_per_second": computed / used, "core": core if batching != "padded" else "sdpa",
        "mfu": 4 * (linear_parameters(model) * computed - spared_products(model, batches)) / used / peak,
    }  # fmt: skip
    return found | {"peak_gib": memory, "kernels": by_kernel}


def measure_trl(
    model: RewardModel, pairs: list[TokenTree], size: int, repeats: int, peak: float, *, checkpointing: bool
) -> dict[str, Any]:
    """The same step in TRL's own RewardTrainer."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from training import Clock, silence
    from transformers import PreTrainedTokenizerFast

    model.set_batching("padded")
    model.set_checkpointing(["none"] * len(model.layers))
    trained = [p for p in model.parameters() if p.requires_grad]
    clock, on_gpu = Clock(), model.device.type == "cuda"
    per_step = len(pairs) // size
    with tempfile.TemporaryDirectory() as folder:
        args = trl.RewardConfig(
            output_dir=folder, report_to="none", save_strategy="no", disable_tqdm=True, bf16=on_gpu, use_cpu=not on_gpu,
            gradient_checkpointing=checkpointing, logging_steps=repeats + 1, max_length=None, learning_rate=1e-5,
            per_device_train_batch_size=size, gradient_accumulation_steps=per_step, num_train_epochs=1,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        rows = [pair.conversations() for _ in range(repeats + 1) for pair in pairs]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>", eos_token="<eos>"
        )
        trainer = trl.RewardTrainer(
            model=model.model, args=args, processing_class=tokenizer, callbacks=[clock],
            train_dataset=Dataset.from_list([{"chosen_ids": a, "rejected_ids": b} for a, b in rows]),
        )  # fmt: skip
        computed, collate = [], trainer.data_collator

        def counted(examples: list[dict[str, Any]]) -> Any:
            batch = collate(examples)
            computed.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counted
        silence(trainer)
        for parameter in trained:  # TRL makes them bfloat16 on 4-bit bases: the same precision here
            parameter.data = parameter.data.float()
        if on_gpu:
            gc.collect()  # earlier trainers hold their optimizers in circles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer.train()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {"error": "out of memory"}
        finally:
            model.classifier.gradient_checkpointing_disable()
            model.classifier.disable_input_require_grads()
            model.zero_grad(set_to_none=True)
    used, tokens = statistics.median(clock.seconds[1:]), sum(computed[per_step : 2 * per_step])
    return {
        "pairs": len(pairs), "seconds": used, "computed_tokens": tokens, "pairs_per_second": len(pairs) / used,
        "tokens_per_second": tokens / used, "mfu": 4 * linear_parameters(model) * tokens / used / peak,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
    }  # fmt: skip


# -- the planner ------------------------------------------------------------------------------------------


def compare_plans(caps: list[int], device: torch.device) -> Iterator[dict[str, Any]]:
    """Plans for cards of so many GiB, and what steps of the planned rows take when no more is there."""
    assert device.type == "cuda", "the device's own count is compared: this needs a CUDA device"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_RM_CACHE"] = folder  # calibrated anew
        machine = calibrate("cuda")
        for name in dict.fromkeys(name for cap in caps for name in CAPPED[cap]):
            base = Path(folder, name)
            base.mkdir()
            (base / "config.json").write_text(json.dumps(MODELS[name]))
            model, planned = random_model(MODELS[name], device), plan(plan_settings(base, "none", 1024))
            for cap in (cap for cap in caps if name in CAPPED[cap]):
                with capped(cap * GIB - machine.context, device):
                    for row in one_card(model, replace(planned, memory=cap * GIB)):
                        yield {"model": name, "cap_gib": cap, **row}
            del model
            gc.collect()
            torch.cuda.empty_cache()


def plan_settings(base: Path | str, mode: str, row: int) -> Settings:
    """Settings of a run whose memory is planned."""
    return check_settings(
        {
            "model": {"base": str(base)},
            "data": {"max_length": 512},
            "train": {"checkpointing": mode, "tokens_per_microbatch": row},
        }
    )


def one_card(model: RewardModel, planned: Plan) -> Iterator[dict[str, Any]]:
    """The longest rows of a card, in every way of checkpointing and mixed."""
    base = planned.settings.model.base
    longest = {mode: planned.largest(mode) for mode in MODES}
    # a row between those of two ways, so that layers are mixed
    between = next(
        (longest[a] + longest[b]) // 2 for a, b in pairwise(MODES) if b == "full" or longest[b] > 1024
    )
    for mode, row in [*longest.items(), ("auto", between)]:
        found: dict[str, Any] = {"mode": mode, "largest_row": row}
        if row < 1024:
            yield found | {"error": "planned not to fit"}
            continue
        planned = replace(planned, settings=plan_settings(base, mode, min(row, 16384)))
        pairs = make_pairs(400, 1024, seed=row)
        while num_tokens(pairs, "shared") > planned.row:
            pairs = pairs[: math.floor(len(pairs) * 0.98)]
        tokens = num_tokens(pairs, "shared")
        modes = planned.layer_modes
        shares = [modes.count(one) / len(modes) for one in MODES]
        step = sum(share * planned.peaks[one].at(tokens) for share, one in zip(shares, MODES, strict=True))
        found |= {
            "row": tokens, "layers": {one: modes.count(one) for one in MODES},
            "planned_gib": (planned.lasting - planned.machine.context + step) / GIB,
        }  # fmt: skip
        yield found | _taken(model, pairs, modes, planned.settings)


def _taken(
    model: RewardModel, pairs: list[TokenTree], modes: list[Mode], settings: Settings
) -> dict[str, Any]:
    """What the device counts of two steps."""
    model.set_batching("shared")
    model.set_checkpointing(modes)
    model.train()
    optimizer = build_optimizer(model, settings)
    gc.collect()
    torch.cuda.empty_cache()
    batch = model.batch(pairs)
    try:
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            model.rewards(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"error": f"out of memory: {error}"[:200]}
    finally:
        model.zero_grad(set_to_none=True)
    return {
        "counted_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


@contextmanager
def capped(size: float, device: torch.device) -> Iterator[None]:
    """Lets the allocator have so many bytes of the device."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(size / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def show_plans(rows: list[dict[str, Any]]) -> None:
    """Prints what was planned beside what was counted."""
    show_table(
        f"Planned rows on {rows[0]['device']}",
        ["model", "cap GiB", "checkpointing", "longest row", "taken", "planned GiB", "counted", "off", "reserved"],
        [
            [
                row["model"], row["cap_gib"], row["mode"], row["largest_row"], row.get("row", "-"),
                _number(row.get("planned_gib"), ".2f"), _number(row.get("counted_gib"), ".2f"),
                _number(row["planned_gib"] / row["counted_gib"] - 1 if "counted_gib" in row else None, "+.1%"),
                _number(row.get("reserved_gib"), ".2f") if "error" not in row else row["error"],
            ]
            for row in rows
        ],
    )  # fmt: skip


def spared_products(model: RewardModel, batches: list[TreeBatch]) -> int:
    """Weights times tokens that the last layer does not multiply: all but keys and values, at all but the answers' ends."""
    tokens = sum(b.input_ids.numel() - len(b.plan.ends) for b in batches if b.plan is not None)
    weights = sum(
        module.in_features * module.out_features
        for name, module in model.layers[-1].named_modules()
        if isinstance(module, bnb.nn.Linear4bit) and "k_proj" not in name and "v_proj" not in name
    )
    return weights * tokens


def linear_parameters(model: RewardModel) -> int:
    """Parameters of the decoder's frozen linear layers."""
    return sum(
        module.in_features * module.out_features
        for module in model.classifier.modules()
        if isinstance(module, bnb.nn.Linear4bit)
    )


def kernels(step: Callable[[], None]) -> str:
    """The share of GPU time that each kind of kernel takes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kinds = {
        "attention": ("flash", "fmha", "attention"),
        "4-bit": ("quantize", "4bit"),
        "products": ("gemm", "cutlass", "nvjet"),
    }
    shares = dict.fromkeys([*kinds, "other"], 0.0)
    for event in recorded.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "other")
        shares[kind] += event.device_time_total
    total = sum(shares.values()) or 1.0
    return ", ".join(f"{kind} {share / total:.0%}" for kind, share in shares.items())


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


if __name__ == "__main__":
    say("Nothing is downloaded; the weights are random.")
    main()
