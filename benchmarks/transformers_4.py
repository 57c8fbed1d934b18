"""Rewards of a run's merged model in transformers 4, which wrote rotary positions and tokenizers in other words than 5.

    python benchmarks/transformers_4.py RUN [--packages DIR] [--quick] [--json FILE]

Installs transformers 4.57.3 and what belongs to it into DIR, beside which torch and the rest stay those of this
environment, and scores the texts of the merge's parity.json there, by the pipeline, in float32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from lora_rm.checkpoint import RunFolder
from lora_rm.console import plain_errors, show_table
from lora_rm.verify import change_cells, measure_change

PACKAGES = ("transformers==4.57.3", "tokenizers==0.22.2", "huggingface-hub==0.36.2")

PROGRAM = """\
import json, sys
import transformers
from transformers import pipeline
folder, texts, answer = sys.argv[1:]
reward = pipeline("text-classification", model=folder, dtype="float32")
found = [one["score"] for one in reward(json.load(open(texts, encoding="utf-8")))]
json.dump([transformers.__version__, found], open(answer, "w"))
"""


def main() -> None:
    """Installs, scores, compares, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder with a merged model")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="made if need be, and kept")
    parser.add_argument("--quick", action="store_true", help="16 answers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args()
    merged = RunFolder.open(options.run).merged
    parity = json.loads((merged / "parity.json").read_text(encoding="utf-8"))
    answers = parity["answers"][: 16 if options.quick else None]
    with tempfile.TemporaryDirectory() as scratch:
        packages = (options.packages or Path(scratch, "packages")).absolute()
        if not (packages / "transformers").is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
            subprocess.run([*pip, *PACKAGES], check=True)
        texts, found = Path(scratch, "texts.json"), Path(scratch, "found.json")
        texts.write_text(json.dumps([answer["text"] for answer in answers]), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(merged.absolute()), str(texts), str(found)],
            env={**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"},
            check=True,
        )
        version, rewards = json.loads(found.read_text(encoding="utf-8"))
    prompts = [answer["prompt"] for answer in answers]
    rows = []
    for against, key in (("the trained adapter", "reward"), ("the merged model in transformers 5", "merged")):
        change = measure_change([answer[key] for answer in answers], rewards, prompts, parity["spread"])
        rows.append({"transformers": version, "against": against, "answers": len(answers)} | asdict(change))
    show_table(
        f"{merged} in transformers {version}, by texts, shares of the spread {parity['spread']:.3f}",
        ["against", "answers", "mean", "largest", "pairs flipped"],
        [[row["against"], row["answers"], *change_cells(row, 4)] for row in rows],
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    with plain_errors():
        main()
