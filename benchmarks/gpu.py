"""Training steps on one GPU: ours, packed without sharing, and padded as TRL pads; random weights in real shapes.

    python benchmarks/gpu.py [--quick] [--json FILE] [--model llama3.1-8b qwen3-32b] [--tokens 4096 8192]

The weights are drawn on the device and go straight into NF4 with double quantisation, so nothing is downloaded.
Needs torch, transformers, peft, bitsandbytes, accelerate and this package. Pairs have the lengths of HH (medians of
144 prompt and 67 answer tokens). Model-FLOP utilisation counts 4 N per token computed (2 N forward, 2 N backward
through frozen weights; N: parameters of the linear layers), recomputation not counted.
"""

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from lora_rm.config import Settings
from lora_rm.console import say, show_table
from lora_rm.data.batches import Batching, microbatches, num_tokens
from lora_rm.data.tokens import TokenTree
from lora_rm.model.checkpointing import MODES, Mode
from lora_rm.model.memory import empty_model, fill
from lora_rm.model.reward_model import RewardModel

MODELS: dict[str, dict[str, Any]] = {
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
    "H100": 989e12,
    "A100": 312e12,
    "4090": 165e12,
    "3090": 71e12,
    "L40": 181e12,
    "5090": 210e12,
}
"""Dense bfloat16 FLOP/s with float32 accumulation, from the makers' data sheets."""


def main() -> None:
    """Times every way and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, under a minute, on a CPU too")
    parser.add_argument("--json", type=Path, help="write the table as a list of rows")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama3.1-8b", "qwen3-32b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192], help="tokens of a microbatch")
    parser.add_argument("--repeats", type=int, default=5)
    wanted = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((value for key, value in PEAK.items() if key in name), math.nan)
    rows: list[dict[str, Any]] = []
    for shape in ["tiny"] if wanted.quick else wanted.model:
        model = random_model(MODELS[shape], device)
        for tokens in [1024] if wanted.quick else wanted.tokens:
            pairs = make_pairs(tokens, MODELS[shape]["vocab_size"])
            ways: list[tuple[str, Batching, Mode]] = [
                *((f"shared, {mode}", "shared", mode) for mode in MODES),
                ("packed, none", "packed", "none"),
                ("padded (TRL at its best)", "padded", "none"),
                ("padded, full (TRL's defaults)", "padded", "full"),
            ]
            for title, batching, mode in ways:
                row = {"device": name, "model": shape, "tokens_per_microbatch": tokens, "way": title}
                row |= measure(model, pairs, tokens, batching, mode, wanted.repeats, peak)
                rows.append(row)
                show(rows)
                if wanted.json:
                    wanted.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        del model


def show(rows: list[dict[str, Any]]) -> None:
    """Prints what is known so far."""
    show_table(
        f"QLoRA reward-model steps on {rows[0]['device']}",
        ["model", "tokens", "way", "pairs/s", "tokens/s", "MFU", "peak GiB", "kernels"],
        [
            [
                row["model"], row["tokens_per_microbatch"], row["way"], _number(row.get("pairs_per_second"), ".2f"),
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
    return model


def make_pairs(tokens: int, vocabulary: int) -> list[TokenTree]:
    """Pairs of HH's lengths that fill a shared row of so many tokens."""
    generator = random.Random(tokens)

    def ids(median: int) -> list[int]:
        length = max(4, round(median * math.exp(generator.gauss(0, 0.6))))
        return [generator.randrange(vocabulary) for _ in range(min(length, tokens // 4))]

    pairs: list[TokenTree] = []
    while True:
        pair = TokenTree(ids(144), (ids(67), ids(67)))
        if num_tokens([*pairs, pair], "shared") > tokens:
            return pairs
        pairs.append(pair)


def measure(
    model: RewardModel,
    pairs: list[TokenTree],
    tokens: int,
    batching: Batching,
    mode: Mode,
    repeats: int,
    peak: float,
) -> dict[str, Any]:
    """Seconds, memory and kernels of an optimizer step over the pairs, in one way."""
    model.set_batching(batching)
    model.set_checkpointing([mode] * len(model.layers))
    model.train()
    # padded as TRL pads: eight pairs in random order
    rows = (
        [pairs[start : start + 8] for start in range(0, len(pairs), 8)]
        if batching == "padded"
        else microbatches(pairs, tokens, batching)
    )
    batches = [model.batch(row) for row in rows]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    on_gpu = model.device.type == "cuda"

    def step() -> None:
        for batch in batches:
            rewards = model.rewards(batch).view(-1, 2)
            (-F.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum() / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        step()
        step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(repeats):
            _wait(on_gpu)
            started = time.perf_counter()
            step()
            _wait(on_gpu)
            seconds.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    used = statistics.median(seconds)
    computed = sum(batch.input_ids.numel() for batch in batches)
    found: dict[str, Any] = {
        "pairs": len(pairs), "seconds": used, "computed_tokens": computed, "pairs_per_second": len(pairs) / used,
        "tokens_per_second": computed / used, "core": model._core() if batching != "padded" else "sdpa",
        "mfu": 4 * linear_parameters(model) * computed / used / peak,
    }  # fmt: skip
    if on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["kernels"] = kernels(step)
    return found


def linear_parameters(model: RewardModel) -> int:
    """Parameters of the decoder's frozen linear layers."""
    return sum(
        module.in_features * module.out_features
        for module in model.classifier.modules()
        if isinstance(module, bnb.nn.Linear4bit)
    )


def kernels(step: Any) -> str:
    """The share of GPU time that each kind of kernel takes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kinds = {
        "products": ("gemm", "cutlass", "nvjet"),
        "attention": ("flash", "fmha", "attention"),
        "4-bit": ("quantize", "4bit"),
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
