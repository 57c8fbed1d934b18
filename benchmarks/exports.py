"""What every export does to the rewards of a trained run: runtime x type, each through the real command.

    python benchmarks/exports.py runs/quickstart [--quick] [--json FILE]

Runs `lora-rm export RUN --to TARGET --dtype TYPE` into a scratch folder and prints what its own `parity.json` holds, or
why it was refused. Beside them: the transformers pipeline on all answers, with products in every type, and OpenVINO
where it is installed.
Errors are those of the rewards against the trained adapter, as shares of their spread; rows without
`llama-cpp-python` say so. vLLM's own numbers are those of vllm_parity.py.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_rm.checkpoint import RunFolder
from lora_rm.console import plain_errors, say, show_table
from lora_rm.export.huggingface import PIPELINE
from lora_rm.export.onnx import FILE
from lora_rm.verify import change_cells, measure_change, score_in_fresh_process

EXPORTS = (
    ("huggingface", None),
    ("onnx", "float32"),
    ("onnx", "int8"),
    ("torch-export", "float32"),
    ("gguf", "float16"),
    ("gguf", "Q8_0"),
    ("gguf", "Q5_1"),
    ("gguf", "Q5_0"),
    ("gguf", "Q4_1"),
    ("gguf", "Q4_0"),
    ("gguf", "float32"),
    ("vllm-lora", None),
    ("vllm", None),
    ("torch-export", "float16"),
    ("torch-export", "bfloat16"),
)
"""Targets and types."""

OPENVINO = """\
import json, sys
import openvino
request = json.load(open(sys.argv[1], encoding="utf-8"))
model = openvino.Core().compile_model(request["file"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
json.dump([float(model([[ids], [[1] * len(ids)]])[0][0]) for ids in request["rows"]], open(sys.argv[2], "w"))
"""
"""Scores token ids by the ONNX file."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder with a merged model")
    parser.add_argument("--quick", action="store_true", help="huggingface alone: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    run = RunFolder.open(options.run)
    merged: dict[str, Any] = json.loads((run.merged / "parity.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for target, dtype in EXPORTS[:1] if options.quick else EXPORTS:
            out = Path(scratch, target, dtype or "default")
            out.parent.mkdir(exist_ok=True)
            rows += export(run, out, target, dtype)
            if (target, dtype) == ("onnx", "float32") and importlib.util.find_spec("openvino"):
                rows.append(in_openvino(out, merged))
            if options.json:  # after every row: all of them take most of an hour
                options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        if not options.quick:
            rows += in_pipelines(Path(scratch, "huggingface", "default"), merged)
    rows.append({"export": "no adapter", **merged["without_adapter"]})
    show_table(
        f"{merged['num_answers']} answers of {run.path}, spread {merged['spread']:.3f}; the merge itself: "
        f"{merged['changes']['library']['mean']:.3%}",
        ["export", "answers", "mean", "largest", "flipped", "to merged", "MB"],
        [[", ".join(filter(None, (row["export"], row.get("scored")))), *cells(row)] for row in rows],
    )
    for row in rows:
        if "refused" in row:
            say(f"{row['export']}: {row['refused']}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def cells(row: dict[str, Any]) -> Iterator[str]:
    """What the table says of a row behind its first column."""
    yield row.get("num_answers", "")
    if "mean" not in row:
        yield from ("refused", "", "", "", "")
        return
    yield from change_cells(row)
    yield f"{row['against_merged']:.1e}" if "against_merged" in row else ""
    yield f"{row['MB']:.0f}" if "MB" in row else ""


def export(run: RunFolder, out: Path, target: str, dtype: str | None) -> list[dict[str, Any]]:
    """The rows of one command: one for each way in which it scored all answers, or its first way."""
    name = f"{target} {dtype}" if dtype else target
    say(f"{name} ...")
    words = [
        "export",
        str(run.path),
        "--to",
        target,
        "--out",
        str(out),
        *(["--dtype", dtype] if dtype else []),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lora_rm.cli", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        # the error, in its one line; what it wrapped or printed before is not wanted
        last = done.stderr.strip().splitlines()[-1]
        if not last.startswith(("MergeError:", "ConfigError:")):
            raise SystemExit(done.stderr)
        return [{"export": name, "refused": last.replace(str(out), "DIR")}]
    parity = json.loads((out / "parity.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    rows = [
        {"export": name, "scored": way, "MB": size, **change} for way, change in parity["changes"].items()
    ]
    return [row for row in rows if row["num_answers"] == parity["num_answers"]] or rows[:1]


def compare(name: str, way: str, merged: dict[str, Any], found: list[float]) -> dict[str, Any]:
    """The row of rewards of all answers."""
    answers, spread = merged["answers"], merged["spread"]
    change = measure_change([a["reward"] for a in answers], found, [a["prompt"] for a in answers], spread)
    error = measure_change([a["merged"] for a in answers], found, spread=spread).largest
    counted = {"num_answers": len(answers), "against_merged": error}
    return {"export": name, "scored": way, **asdict(change), **counted}


def in_pipelines(out: Path, merged: dict[str, Any]) -> list[dict[str, Any]]:
    """All answers in the transformers pipeline, with products in every type; the command scores some of them."""
    texts, kinds = [answer["text"] for answer in merged["answers"]], ("float16", "bfloat16")
    request = {"folder": str(out.resolve()), "texts": texts, "stored": dict.fromkeys(kinds, len(texts))}
    found = score_in_fresh_process(f"{out} and the transformers pipeline", PIPELINE, request)
    return [
        compare("huggingface", f"pipeline in {kind}", merged, found[kind]) for kind in ("float32", *kinds)
    ]


def in_openvino(out: Path, merged: dict[str, Any]) -> dict[str, Any]:
    """The ONNX file in OpenVINO."""
    request = {"file": str((out / FILE).resolve()), "rows": [answer["ids"] for answer in merged["answers"]]}
    found = score_in_fresh_process(f"{out} in OpenVINO", OPENVINO, request)
    return compare("onnx float32", "OpenVINO", merged, found)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with plain_errors():
        main()
