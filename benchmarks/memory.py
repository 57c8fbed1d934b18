"""What fits: common models on common cards, planned from the shapes in their public config.json.

    python benchmarks/memory.py [--quick] [--json FILE] [--gpu 8GiB 12GiB 16GiB 24GiB]

NF4 with double quantisation, rank 16 on every linear layer, AdamW in float32, conversations of at most 1024 tokens.
A cell is the longest row in tokens (`train.tokens_per_microbatch`) with checkpointing selective / full; "-" where not
even one pair of the longest conversations fits. Context, allocator and cuBLAS are assumed (0.5 GiB, 15 %, 64 MiB).
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_rm.config import check_settings
from lora_rm.console import plain_errors, show_table
from lora_rm.plan import plan, read_memory

SHAPES: dict[str, tuple[str, int, int, int, int, int, int, int, bool]] = {
    # model type, hidden, intermediate, layers, heads, key-value heads, head size, vocabulary, tied embeddings
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "Qwen3-14B": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
    "Mistral-Small-24B": ("mistral", 5120, 32768, 40, 32, 8, 128, 131072, False),
    "Qwen3-32B": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False),
}
NAMES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def main() -> None:
    """Plans every model for every card and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two models")
    parser.add_argument("--json", type=Path, help="write the table as a list of rows")
    parser.add_argument("--gpu", nargs="+", default=["8GiB", "12GiB", "16GiB", "24GiB"])
    wanted = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ["Llama-3.2-3B", "Llama-3.1-8B"] if wanted.quick else SHAPES:
            folder = Path(scratch, name)
            folder.mkdir()
            kind, *numbers = SHAPES[name]
            values = dict(zip(NAMES, numbers, strict=True)) | {"model_type": kind, "sliding_window": None}
            (folder / "config.json").write_text(json.dumps(values))
            settings = check_settings({"model": {"base": str(folder)}, "train": {"checkpointing": "full"}})
            planned = plan(settings, read_memory(wanted.gpu[-1]), gpu=True)
            row: dict[str, Any] = {"model": name, "held_gib": planned.lasting / 2**30}
            for card in wanted.gpu:
                on_card = replace(planned, memory=read_memory(card))
                row[card] = {mode: on_card.largest(mode) for mode in ("selective", "full")}
            rows.append(row)
            if wanted.json:
                wanted.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    least = planned.longest_pair
    show_table(
        "Longest row in tokens, checkpointing selective / full",
        ["model", "held GiB", *wanted.gpu],
        [
            [
                row["model"],
                f"{row['held_gib']:.1f}",
                *(
                    " / ".join(f"{n:,}" if n >= least else "-" for n in row[card].values())
                    for card in wanted.gpu
                ),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    with plain_errors():
        main()
