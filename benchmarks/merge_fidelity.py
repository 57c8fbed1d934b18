"""What every way of merging does to the rewards of a trained run.

    python benchmarks/merge_fidelity.py runs/quickstart [--quick] [--json FILE]

Held-out answers are scored by the adapter on its 4-bit base and by each merged model, in float32 on both
sides. Errors are shares of the spread (standard deviation) of the rewards; flips are pairs of answers,
to one prompt or to any two, whose order changed.
"""

import argparse
import gc
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from lora_rm.checkpoint import RunFolder
from lora_rm.config import MergeSettings, ModelSettings
from lora_rm.console import plain_errors, say, show_table
from lora_rm.merge import merge
from lora_rm.model.base import BaseModel
from lora_rm.model.reward_model import RewardModel
from lora_rm.score import Scorer
from lora_rm.verify import change_cells, measure_change


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder with a trained adapter")
    parser.add_argument("--quick", action="store_true", help="24 answers instead of all")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    run = RunFolder.open(options.run)
    record = json.loads((run.adapter / "lora_rm.json").read_text())
    known = [*record["canaries"], *run.read_json("held_out.json")]
    known = known[:24] if options.quick else known
    answers, prompts = [answer["ids"] for answer in known], [answer["prompt"] for answer in known]

    trained = RewardModel.load_adapter(run.adapter, compute_dtype="float32")
    expected = score(trained, answers)
    rows = []
    for name, found in ways(run, trained, answers).items():
        say(f"{name} ...")
        rows.append({"what is written": name, **asdict(measure_change(expected, found(), prompts))})
        gc.collect()
    show_table(
        f"{len(answers)} answers of {run.path}",
        ["what is written", "mean error", "largest", "pairs flipped", "any two answers"],
        [
            [
                row["what is written"],
                *change_cells(row, 2),
                f"{row['order_flips']} of {row['num_orders']}",
            ]
            for row in rows
        ],
    )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


def ways(
    run: RunFolder, trained: RewardModel, answers: list[list[int]]
) -> dict[str, Callable[[], list[float]]]:
    """Every way of merging, by name, as a function that gives the answers' rewards."""

    def merged(base: str, dtype: str, again: str = "none") -> list[float]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "merged")
            merge(run.adapter, folder, MergeSettings(base=base, dtype=dtype))  # type: ignore[arg-type]
            if again == "none":
                return score(RewardModel.load_merged(folder, compute_dtype="float32"), answers)
            settings = ModelSettings(quantization="nf4", compute_dtype="float32")
            return score(RewardModel.load(BaseModel(name="merged", path=folder), settings=settings), answers)

    def peft_in_4bit() -> list[float]:
        model = RewardModel.load_adapter(run.adapter, compute_dtype="float32")
        head = model.head.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.model = model.model.merge_and_unload()
        model.classifier.score.weight.data = head
        return score(model, answers)

    def no_adapter() -> list[float]:
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        return score(trained, answers)

    return {
        "dequantised NF4 + update, float32": lambda: merged("dequantized", "float32"),
        "dequantised NF4 + update, float16 (default)": lambda: merged("dequantized", "float16"),
        "dequantised NF4 + update, bfloat16 stochastic": lambda: merged("dequantized", "bfloat16"),
        "dequantised NF4 + update, bfloat16 nearest": lambda: merged("dequantized", "bfloat16_nearest"),
        "original base + update, float32": lambda: merged("original", "float32"),
        "original base + update, float16, loaded in NF4 again": lambda: merged("original", "float16", "nf4"),
        "dequantised NF4 + update, float16, loaded in NF4 again": lambda: merged(
            "dequantized", "float16", "nf4"
        ),
        "PEFT merge_and_unload on the 4-bit model": peft_in_4bit,
        "no adapter, trained head": no_adapter,
    }


def score(model: RewardModel, answers: list[list[int]]) -> list[float]:
    """Rewards in float32."""
    model.choose_batching()
    with model.precise():
        return Scorer(model.eval()).score_ids(answers)


if __name__ == "__main__":
    with plain_errors():
        main()
