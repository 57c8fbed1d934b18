"""Time and memory of a merge, beside `cp` of the same files.

    python benchmarks/merge.py [--gigabytes 2] [--quick] [--json FILE]

Makes a random sharded checkpoint in the shapes of Llama-2-7B (fewer layers) with a rank-16 adapter on every
linear layer, and merges it with and without the NF4 round trip, each in a process of its own. Memory is the
peak of anonymous pages (RssAnon), read every 5 ms, less what the process holds after its imports.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

from lora_rm.config import MergeSettings
from lora_rm.console import plain_errors, show_table
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.merge import merge
from lora_rm.model.base import BUILTIN, BaseModel, find_base
from lora_rm.model.quantization import Quantization
from lora_rm.model.reward_model import HEAD_KEY, RECORD

HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Shapes (out, in) of a decoder layer's linear layers: 405 MB a layer in bfloat16."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default: 2)")
    parser.add_argument("--quick", action="store_true", help="0.7 GB")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    num_layers = max(1, round(((0.7 if options.quick else options.gigabytes) - 0.27) / 0.405))
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = Path(scratch)
        size = make_checkpoint(folder / "base", num_layers)
        started = time.monotonic()
        shutil.copytree(folder / "base", folder / "copy")
        subprocess.run(["sync", "-f", folder], check=True)
        rows: list[dict[str, Any]] = [{"what": "cp", "seconds": time.monotonic() - started, "peak MB": 0.0}]
        shutil.rmtree(folder / "copy")
        for kind, base, name in (
            ("none", "original", "merge, no round trip"),
            ("nf4", "dequantized", "merge, NF4 round trip"),
        ):
            make_adapter(folder / kind, folder / "base", num_layers, kind)
            command = [
                sys.executable,
                __file__,
                "--child",
                str(folder / kind),
                str(folder / "out"),
                base,
                str(folder / "base"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"what": name, **json.loads(done.stdout.splitlines()[-1])})
            shutil.rmtree(folder / "out")
    for row in rows:
        row |= {"GB": size / 1e9, "times cp": row["seconds"] / rows[0]["seconds"]}
    show_table(
        f"{size / 1e9:.2f} GB in 7B shapes, {num_layers} layers",
        ["what", "seconds", "times cp", "peak MB above imports"],
        [[r["what"], f"{r['seconds']:.1f}", f"{r['times cp']:.2f}", f"{r['peak MB']:.0f}"] for r in rows],
    )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


def measure(adapter: str, out: str, base: str, base_folder: str) -> dict[str, float]:
    """Merges in this process; seconds, and the peak of anonymous memory above that after the imports, in MB."""
    before = peak = anonymous_mb()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    settings = MergeSettings(base=base, dtype="float16")  # type: ignore[arg-type]
    merge(Path(adapter), Path(out), settings, base=BaseModel(name="random", path=Path(base_folder)))
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    return {"seconds": seconds, "peak MB": peak - before}


def anonymous_mb() -> float:
    """Anonymous memory of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


def make_checkpoint(folder: Path, num_layers: int) -> int:
    """Writes a random bfloat16 checkpoint, a file a layer; returns its size in bytes."""
    folder.mkdir()
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, vocab_size=VOCABULARY, num_hidden_layers=num_layers,
        num_attention_heads=32, num_key_value_heads=32, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    rest = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": random(HIDDEN)}
    save_file(rest, folder / "model-00000.safetensors", {"format": "pt"})
    for layer in range(num_layers):
        tensors = {f"model.layers.{layer}.{name}.weight": random(*shape) for name, shape in LINEAR.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = random(HIDDEN)
        save_file(tensors, folder / f"model-{layer + 1:05d}.safetensors", {"format": "pt"})
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def make_adapter(folder: Path, base: Path, num_layers: int, kind: str) -> None:
    """Writes a random rank-16 adapter with the record that training would leave."""
    from safetensors import safe_open

    tensors = {HEAD_KEY: torch.randn(1, HIDDEN)}
    codes = {}
    quantization = Quantization(kind=kind, double=True, load_dtype=torch.bfloat16)  # type: ignore[arg-type]
    for layer in range(num_layers):
        with safe_open(base / f"model-{layer + 1:05d}.safetensors", "pt") as stored:
            for name, (rows, columns) in LINEAR.items():
                full = f"model.layers.{layer}.{name}"
                tensors[f"base_model.model.{full}.lora_A.weight"] = torch.randn(16, columns) / 64
                tensors[f"base_model.model.{full}.lora_B.weight"] = torch.randn(rows, 16) * 1e-3
                if kind == "nf4":
                    codes[full] = quantization.round_trip(stored.get_tensor(f"{full}.weight"))[1]
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=sorted({n.split(".")[1] for n in LINEAR})
    ).save_pretrained(str(folder))
    ChatTokenizer.load(find_base(BUILTIN).path).save(folder)
    record = {
        "format": 1,
        "base": {"name": "random", "revision": None},
        "load_dtype": "bfloat16",
        "quantization": {"kind": kind, "double": True, "codes": codes},
    }
    (folder / RECORD).write_text(json.dumps(record))


if __name__ == "__main__":
    with plain_errors():
        main()
