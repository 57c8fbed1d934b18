"""A `.pt2` file that torch alone opens, without transformers and without this library."""

from functools import partial
from pathlib import Path

import torch

from lora_rm.console import say
from lora_rm.export.graph import RewardGraph, batches, load_graph, noise_floor, trace
from lora_rm.export.proof import (
    checked_dtype,
    copy_tokenizer,
    export_folder,
    prove,
    usage_page,
    write_parity,
)
from lora_rm.verify import score_in_fresh_process

FILE = "model.pt2"

DTYPES = ("float32", "float16", "bfloat16")


def export_torch_export(
    merged: Path,
    out: Path,
    *,
    overwrite: bool = False,
    dtype: str = "float32",
) -> Path:
    """Traces a merged and verified model with `torch.export` and checks the file in a process of its own.

    Args:
        merged: Folder with `parity.json`, as `verify` leaves it.
        out: Folder to make: `model.pt2`, the tokenizer's files, `parity.json`, and a README with the call.
        overwrite: Replace an earlier export.
        dtype: Of weights and products; the head stays float32.

    Raises:
        ConfigError: If there is no such type.
        MergeError: If the model was not verified, `out` exists, the model cannot be traced, or the file gives
            other rewards.
    """
    dtype = checked_dtype("torch-export", dtype, DTYPES)
    with export_folder(merged, out, "torch-export", overwrite=overwrite, dtype=dtype) as (unfinished, parity):
        folder, graph = unfinished.path, load_graph(merged)
        noise = noise_floor(graph, parity)
        store_as(graph, getattr(torch, dtype))
        unfinished.once(FILE, partial(_write, graph))
        del graph
        copy_tokenizer(merged, folder)
        (folder / "README.md").write_text(usage_page(USAGE, parity), encoding="utf-8")
        kinds = batches([answer["ids"] for answer in parity["answers"]])
        request = {"file": str((folder / FILE).resolve()), "batches": kinds}
        found = score_in_fresh_process(f"{out / FILE} in torch", PROGRAM, request)
        proved = prove(
            out,
            parity,
            found,
            target="torch-export",
            runtime="torch.export file",
            dtype=dtype,
            noise=noise,
            rounded=[] if dtype == "float32" else list(kinds),
        )
        write_parity(folder, proved)
    return out


def store_as(graph: RewardGraph, dtype: torch.dtype) -> None:
    """Rounds the weights of the backbone, whose products are in that type then, and no buffer.

    Rotary frequencies of 16 bits would be off by whole turns a few thousand tokens on.
    """
    for parameter in graph.backbone.parameters():
        parameter.data = parameter.data.to(dtype)


def _write(graph: RewardGraph, file: Path) -> None:
    """A model as a .pt2 file."""
    program = trace(graph)
    say(f"Writing {FILE} ...")
    torch.export.save(program, file)


PROGRAM = """\
import json, sys
sys.modules["transformers"] = sys.modules["lora_rm"] = None  # the file needs torch alone
import torch
request = json.load(open(sys.argv[1], encoding="utf-8"))
rewards = torch.export.load(request["file"]).module()
with torch.inference_mode():
    json.dump({
        way: [
            reward
            for batch in kind
            for reward in rewards(*(torch.tensor(batch[name]) for name in ("input_ids", "attention_mask"))).tolist()
        ]
        for way, kind in request["batches"].items()
    }, open(sys.argv[2], "w"))
"""
"""Scores batches with nothing but torch."""

USAGE = """\
# Reward model, as a torch.export program

`model.pt2` needs torch alone. Inputs: `input_ids` and `attention_mask`, int64, any batch and length, padded on
either side. Output: the raw rewards, float32. Measured against the trained adapter: `parity.json`.

```python
import json, tokenizers, torch
texts = [answer["text"] for answer in json.load(open("parity.json", "rb"))["answers"][:8]]
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json"); tokenizer.enable_padding()
reward = torch.export.load("model.pt2").module()
batch = tokenizer.encode_batch(texts)
print(reward(torch.tensor([one.ids for one in batch]), torch.tensor([one.attention_mask for one in batch])).tolist())
```

A text of your own: `transformers.AutoTokenizer.from_pretrained(".").apply_chat_template(messages, tokenize=False)`{bos}.
"""
"""README of an export."""
