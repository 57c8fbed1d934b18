"""Time and memory of a merge, beside `cp` of the same files and PEFT's way.

    python benchmarks/merge.py [--gigabytes 4] [--shape 7B | 70B] [--quick] [--no-peft] [--json FILE]

Makes a random sharded checkpoint in the shapes of Llama-2-7B or Llama-3-70B (fewer layers, whole embedding) with
a rank-16 adapter on every linear layer, and merges it without and with the NF4 round trip, each in a process of
its own and after a `cp` of the same files. All times include bringing the files to the disk; all files lie in
the page cache when they are read. PEFT's way: load in bfloat16, `merge_and_unload`, save; it adds to the
original base, so it stands beside the merge without the round trip. Memory is the peak of anonymous pages
(RssAnon), read every 5 ms, less what the process holds after its imports. Processor seconds, of all threads and of
the system for them, tell the work where other programs share the machine.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig

from lora_rm.config import MergeSettings
from lora_rm.console import plain_errors, show_table
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.merge import merge
from lora_rm.model.base import BUILTIN, find_base
from lora_rm.model.quantization import Quantization
from lora_rm.model.record import HEAD_KEY, write_record

SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256, "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
"""A layer in bfloat16 is 0.40 GB and 1.71 GB, the embedding 0.26 GB and 2.10 GB."""

SIZES = {"8B": 15.0, "32B": 64.0, "70B": 139.0}
"""Gigabytes of bfloat16 backbones (Llama-3.1-8B, Qwen3-32B, Llama-3-70B) that the estimates are for."""


def linear_layers(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of a decoder layer's linear layers."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint (default: 4)")
    parser.add_argument("--shape", choices=list(SHAPES), default="7B", help="of layers and embedding")
    parser.add_argument("--quick", action="store_true", help="0.7 GB")
    parser.add_argument("--no-peft", action="store_true", help="leave out PEFT's way")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    shape = SHAPES[options.shape]
    linear = linear_layers(shape)
    largest = max(rows * columns for rows, columns in linear.values()) * 2 / 1e6
    layer = sum(rows * columns for rows, columns in linear.values()) * 2e-9
    rest = (0.7 if options.quick else options.gigabytes) - shape["vocab_size"] * shape["hidden_size"] * 2e-9
    num_layers = max(1, round(rest / layer))
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = Path(scratch)
        size = make_checkpoint(folder / "base", shape, num_layers)
        rows: list[dict[str, Any]] = []
        for what, kind, way in (
            ("merge, no round trip", "none", "original"),
            ("merge, NF4 round trip", "nf4", "dequantized"),
            ("PEFT: load, merge_and_unload, save", "none", "peft"),
        ):
            if way == "peft" and options.no_peft:
                continue
            if not (folder / kind).exists():
                make_adapter(folder / kind, folder / "base", linear, num_layers, kind)
            if way != "peft":
                rows.append({"what": "cp", **copy(folder / "base", folder / "copy")})
            subprocess.run(["sync"], check=True)
            command = [sys.executable, __file__, "--child", *map(str, (folder / kind, folder / "out", way, folder / "base"))]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append({"what": what, **json.loads(done.stdout.splitlines()[-1])})
            shutil.rmtree(folder / "out")
    copying = statistics.mean(row["seconds"] for row in rows if row["what"] == "cp")
    for row in rows:
        row |= {"GB": size / 1e9, "times cp": row["seconds"] / copying, "largest adapted MB": largest}
        row["estimated minutes"] = {
            name: row["seconds"] / size * 1e9 * gigabytes / 60 for name, gigabytes in SIZES.items()
        }
    show_table(
        f"{size / 1e9:.2f} GB in {options.shape} shapes, {num_layers} layers, {torch.get_num_threads()} threads; "
        f"largest adapted tensor {largest:.0f} MB",
        [
            "what",
            "seconds",
            "of a processor",
            "times cp",
            "peak MB above imports",
            *(f"{name}, min" for name in SIZES),
        ],
        [
            [
                r["what"],
                f"{r['seconds']:.1f}",
                f"{r['processor seconds']:.1f}",
                f"{r['times cp']:.2f}",
                f"{r['peak MB']:.0f}",
                *(f"{minutes:.1f}" for minutes in r["estimated minutes"].values()),
            ]
            for r in rows
        ],
    )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


def copy(source: Path, target: Path) -> dict[str, float]:
    """What `cp -r` and bringing the copy to the disk take."""
    subprocess.run(["sync"], check=True)
    started, used = time.monotonic(), processor_seconds(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *target.iterdir()], check=True)
    seconds = time.monotonic() - started
    used = processor_seconds(resource.RUSAGE_CHILDREN) - used
    shutil.rmtree(target)
    return {"seconds": seconds, "processor seconds": used, "peak MB": 0.0}


def processor_seconds(whose: int) -> float:
    """Of this process or of those that it started and that have ended."""
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def measure(adapter: str, out: str, way: str, base_folder: str) -> dict[str, float]:
    """Merges in this process; seconds, and the peak of anonymous memory above that after the imports, in MB."""
    before = peak = anonymous_mb()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, used = time.monotonic(), processor_seconds(resource.RUSAGE_SELF)
    try:
        if way == "peft":
            merge_with_peft(adapter, out, base_folder)
        else:
            settings = MergeSettings(base=way, dtype="float16")  # type: ignore[arg-type]
            merge(Path(adapter), Path(out), settings)
        seconds = time.monotonic() - started
        used = processor_seconds(resource.RUSAGE_SELF) - used
    finally:
        done.set()
        watcher.join()
    return {"seconds": seconds, "processor seconds": used, "peak MB": peak - before}


def anonymous_mb() -> float:
    """Anonymous memory of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


def merge_with_peft(adapter: str, out: str, base: str) -> None:
    """The way of PEFT's documentation, brought to the disk."""
    warnings.simplefilter("ignore")
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(out)
    subprocess.run(["sync", *Path(out).iterdir()], check=True)


def make_checkpoint(folder: Path, shape: dict[str, int], num_layers: int) -> int:
    """Writes a random bfloat16 checkpoint, a file a layer; returns its size in bytes."""
    folder.mkdir()
    LlamaConfig(
        num_hidden_layers=num_layers, architectures=["LlamaForCausalLM"], dtype="bfloat16", **shape
    ).save_pretrained(folder)
    # drawing every value anew takes longer than all merges
    drawn = torch.empty(2**26 + 12345, dtype=torch.bfloat16).normal_(0, 0.02)

    def random(*sizes: int) -> torch.Tensor:
        count = torch.Size(sizes).numel()
        return drawn.repeat(-(-count // len(drawn)))[:count].view(sizes)

    hidden = shape["hidden_size"]
    rest = {
        "model.embed_tokens.weight": random(shape["vocab_size"], hidden),
        "model.norm.weight": random(hidden),
    }
    save_file(rest, folder / "model-00000.safetensors", {"format": "pt"})
    index = dict.fromkeys(rest, "model-00000.safetensors")
    del rest
    for layer in range(num_layers):
        tensors = {
            f"model.layers.{layer}.{name}.weight": random(*sizes)
            for name, sizes in linear_layers(shape).items()
        }
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = random(hidden)
        save_file(tensors, folder / f"model-{layer + 1:05d}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(tensors, f"model-{layer + 1:05d}.safetensors")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    values = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))  # what transformers opens it by
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def make_adapter(
    folder: Path, base: Path, linear: dict[str, tuple[int, int]], num_layers: int, kind: str
) -> None:
    """Writes a random rank-16 adapter with the record that training would leave."""
    from safetensors import safe_open

    tensors = {HEAD_KEY: torch.randn(1, linear["self_attn.q_proj"][1])}
    codes = {}
    quantization = Quantization(kind=kind, double=True, load_dtype=torch.bfloat16)  # type: ignore[arg-type]
    for layer in range(num_layers):
        with safe_open(base / f"model-{layer + 1:05d}.safetensors", "pt") as stored:
            for name, (rows, columns) in linear.items():
                full = f"model.layers.{layer}.{name}"
                tensors[f"base_model.model.{full}.lora_A.weight"] = torch.randn(16, columns) / 64
                tensors[f"base_model.model.{full}.lora_B.weight"] = torch.randn(rows, 16) * 1e-3
                if kind == "nf4":
                    codes[full] = quantization.round_trip(stored.get_tensor(f"{full}.weight"))[1]
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=sorted({n.split(".")[1] for n in linear})
    ).save_pretrained(str(folder))
    ChatTokenizer.load(find_base(BUILTIN).path).save(folder)
    record = {
        "format": 1,
        "base": {"name": str(base), "revision": None, "files": {}},
        "load_dtype": "bfloat16",
        "quantization": {"kind": kind, "double": True, "codes": codes},
    }
    write_record(folder, record)


if __name__ == "__main__":
    with plain_errors():
        main()
