"""A training step of ours beside that of LLaMA-Factory's reward-model stage, on the same conversations.

    python benchmarks/llama_factory.py PYTHON [--quick] [--json FILE] [--work harmless alpaca] [--quantization none nf4]

PYTHON belongs to an environment of its own, since LLaMA-Factory wants other versions of transformers, peft and TRL:

    python3 -m venv factory && factory/bin/pip install llamafactory==0.9.5 bitsandbytes==0.50.2
    python benchmarks/llama_factory.py factory/bin/python

Both train rank-16 adapters on every linear layer of SmolLM2-135M, in bfloat16 where the CPU has units for it and float32
where not, without checkpointing, on the same pairs in the same order and the same template; ours first and last,
LLaMA-Factory with batches of 1, 2 and 4 between. Its head starts at random and it computes logits over the vocabulary, so
losses cannot be compared. Seconds are those of optimizer steps, and tokens, padding included, those of the same steps; the
first of each turn is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from training import FILES, Contest, make_trees

from lora_rm.console import plain_errors, show_table
from lora_rm.data.batches import training_order
from lora_rm.model.quantization import dtype_name

CHILD = """\
import json, sys, time
from llamafactory.data.collator import PairwiseDataCollatorWithPadding as Collator
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback

seconds, tokens, collate = [], [], Collator.__call__

class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()
    def on_step_end(self, *_, **__):
        seconds.append(time.perf_counter() - self.started)

def counted(self, rows):
    batch = collate(self, rows)
    tokens.append(batch["input_ids"].numel())
    return batch

Collator.__call__ = counted
run_exp(json.load(open(sys.argv[1])), [Clock()])
rows_a_step = len(tokens) // len(seconds)
json.dump({"seconds": seconds[1:], "tokens": sum(tokens[rows_a_step:])}, open(sys.argv[2], "w"))
"""


def main() -> None:
    """Times both and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", help="of the environment that has llamafactory")
    parser.add_argument("--quick", action="store_true", help="2 steps of 2 pairs on 4 layers")
    parser.add_argument("--json", type=Path, help="write the table as a list of rows")
    parser.add_argument("--work", nargs="+", choices=list(FILES), default=["harmless"], help="files of pairs")
    parser.add_argument("--quantization", nargs="+", choices=["none", "nf4"], default=["none"])
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first is not counted")
    wanted = parser.parse_args()
    per_step, layers, steps = (2, 4, 2) if wanted.quick else (4, None, wanted.steps)
    rows: list[dict[str, Any]] = []
    for quantization in wanted.quantization:
        with Contest(quantization, layers) as contest:
            for work in wanted.work:
                rows += compare(contest, wanted.python, work, per_step, steps)
    show_table(
        f"Optimizer steps of {per_step} pairs beside LLaMA-Factory, {dtype_name(contest.dtype)}, {len(contest.ours.layers)} layers",
        ["data", "base", "batch", "pairs/s", "tokens", "its pairs/s", "its tokens", "times"],
        [
            [r["work"], r["quantization"], r["batch"], f"{r['pairs_per_second']:.2f}", r["tokens"],
             f"{r['its_pairs_per_second']:.2f}", r["its_tokens"], f"{r['ratio']:.2f}"]
            for r in rows
        ],
    )  # fmt: skip
    if wanted.json:
        wanted.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def compare(contest: Contest, python: str, work: str, per_step: int, steps: int) -> list[dict[str, Any]]:
    """A row for every batch size of LLaMA-Factory."""
    chat = contest.ours.chat
    trees = make_trees(work, per_step * steps, chat)
    order = [n for step in training_order(len(trees), steps, per_step, 0) for n in step]
    folder = Path(contest.scratch.name)
    pairs = [as_sharegpt(chat, trees[number].conversations()) for number in order]
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "system": "system"}
    described = {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": described}), encoding="utf-8")
    _, seconds, tokens = contest.train_ours(trees, per_step, steps)
    theirs = {
        batch: run_theirs(contest, python, folder, per_step, batch)
        for batch in (1, 2, 4)
        if per_step % batch == 0
    }
    _, more, _ = contest.train_ours(trees, per_step, steps)
    own = statistics.median(seconds + more)
    return [
        {
            "work": work, "quantization": contest.quantization, "batch": batch, "pairs_per_second": per_step / own,
            "tokens": tokens, "its_pairs_per_second": per_step / statistics.median(found["seconds"]),
            "its_tokens": found["tokens"], "ratio": statistics.median(found["seconds"]) / own,
        }
        for batch, found in theirs.items()
    ]  # fmt: skip


def run_theirs(contest: Contest, python: str, folder: Path, per_step: int, batch: int) -> dict[str, Any]:
    """Seconds and tokens of every step but the first."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        settings = {
            "model_name_or_path": str(contest.base.path), "stage": "rm", "do_train": True, "finetuning_type": "lora",
            "lora_target": "all", "lora_rank": 16, "lora_alpha": 32, "dataset": "pairs", "dataset_dir": str(folder),
            "template": "chatml", "cutoff_len": 2048, "overwrite_cache": True, "output_dir": output, "use_cpu": True,
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": per_step // batch,
            "learning_rate": 1e-4, "num_train_epochs": 1.0, "lr_scheduler_type": "constant", "save_strategy": "no",
            "report_to": "none", "logging_steps": 1, "disable_gradient_checkpointing": True, "disable_shuffling": True,
            "overwrite_output_dir": True, "preprocessing_num_workers": 1, "bf16": contest.dtype == torch.bfloat16,
        }  # fmt: skip
        if contest.quantization == "nf4":
            settings |= {"quantization_bit": 4, "quantization_method": "bnb"}
        names = [Path(output, name) for name in ("child.py", "settings.json", "found.json")]
        names[0].write_text(CHILD, encoding="utf-8")
        names[1].write_text(json.dumps(settings), encoding="utf-8")
        environment = {**os.environ, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python, *map(str, names)], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"LLaMA-Factory failed; the end of what it printed:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(names[2].read_text())
        return found


def as_sharegpt(chat: Any, conversations: list[list[int]]) -> dict[str, Any]:
    """Two rendered conversations as LLaMA-Factory wants a pair; it renders them in the same template, ChatML."""
    chosen, rejected = (read_chatml(chat, ids) for ids in conversations)
    system = chosen.pop(0)["value"] if chosen[0]["from"] == "system" else ""
    return {"system": system, "conversations": chosen[:-1], "chosen": chosen[-1], "rejected": rejected[-1]}


def read_chatml(chat: Any, ids: list[int]) -> list[dict[str, str]]:
    """The messages of a conversation."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    messages = []
    for part in chat.tokenizer.decode(ids).split("<|im_start|>")[1:]:
        role, _, text = part.partition("\n")
        messages.append({"from": names[role], "value": text.removesuffix("\n").removesuffix("<|im_end|>")})
    return messages


if __name__ == "__main__":
    with plain_errors():
        main()
