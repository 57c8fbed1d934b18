"""One base for many adapters: the base that adapters were trained on, dequantised, and an adapter beside it.

A vLLM server that holds the base once serves every adapter trained on it, each under its own name. The base must be
the one that training saw: NF4 and back, not the original weights (on those the rewards are another model's).
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch

from lora_rm.checkpoint import RunFolder
from lora_rm.config import MergeSettings
from lora_rm.console import say
from lora_rm.errors import MergeError
from lora_rm.export.proof import export_folder, prove, write_parity
from lora_rm.export.vllm import check_servable, serve_command
from lora_rm.merge import OVERFLOWING, merge
from lora_rm.model.adapter import WEIGHTS
from lora_rm.model.base import read_json
from lora_rm.model.record import read_record, write_record
from lora_rm.model.tensor_files import load_tensors, save_tensors
from lora_rm.verify import score_in_fresh_process

CONFIG = "adapter_config.json"

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 takes for --max-lora-rank."""


def export_vllm_lora(
    merged: Path, out: Path, *, run: RunFolder | None = None, overwrite: bool = False
) -> Path:
    """Writes `base/` (dequantised, with a head of zeros) and `adapter/`, and proves them together through PEFT.

    Args:
        merged: The run's merged and verified model: its `parity.json` holds the expected rewards.
        out: Folder to make.
        run: Whose adapter it is.
        overwrite: Replace an earlier export.

    Raises:
        MergeError: If there is no run, the model was not verified, the adapter holds something that vLLM does not
            apply, `out` exists, or base and adapter together give other rewards.
    """
    if run is None:
        raise MergeError(
            f"{merged}: --to vllm-lora needs the adapter. Give the run folder, not the merged model."
        )
    max_rank = check_adapter(run.adapter)
    adapter = run.adapter
    with export_folder(merged, out, "vllm-lora", overwrite=overwrite) as (unfinished, parity):
        folder, base = unfinished.path, unfinished.path / "base"
        unfinished.once("base", lambda made: write_base(adapter, made))
        check_servable(base, parity)
        config = read_json(base / "config.json")
        _copy_adapter(adapter, folder / "adapter")
        from lora_rm.export.graph import load_graph, noise_floor

        noise = noise_floor(load_graph(merged), parity)
        kind = read_record(adapter)["quantization"]["kind"]
        way = "PEFT, adapter on the dequantised base"
        request = {"folder": str(folder.resolve()), "rows": [answer["ids"] for answer in parity["answers"]]}
        found = score_in_fresh_process(f"{out} in PEFT", PROGRAM, request)
        # the unmerged adapter is to give what it gave in training, and not what the merge rounded it to
        unmerged = [answer | {"merged": answer["reward"]} for answer in parity["answers"]]
        proved = prove(
            out,
            parity | {"answers": unmerged},
            {way: found},
            target="vllm-lora",
            runtime="unmerged adapter",
            dtype=str(config["dtype"]),
            noise=noise,
            # what is dequantised from 8 bit are float32 values; all others fit the 16 bits that they had
            rounded=[way] if kind == "int8" else [],
        )
        write_parity(folder, proved)
        command = serve_command("./base", config, *lora_words(max_rank, "adapter"))
        (folder / "README.md").write_text(USAGE.format(command=command), encoding="utf-8")
    command = serve_command(f"{out}/base", config, *lora_words(max_rank, f"{out}/adapter"))
    say(f"Serve it, in an environment with vLLM, with:\n  {command}")
    return out


def lora_words(max_rank: int, adapter: str) -> list[str]:
    """What the command of a server with an adapter, by the name `reward`, says beside that of its base."""
    return ["--enable-lora", "--max-lora-rank", str(max_rank), "--lora-modules", f"reward={adapter}"]


def check_adapter(adapter: Path) -> int:
    """Checks that vLLM applies all that an adapter holds; returns the least --max-lora-rank.

    Raises:
        MergeError: If not; with the reason.
    """
    config = read_json(adapter / CONFIG)
    reasons = []
    if config.get("use_dora"):
        reasons.append("it was trained with DoRA, whose magnitudes vLLM does not apply")
    if config.get("lora_bias") or config.get("bias", "none") != "none":
        reasons.append("it trains biases, which vLLM does not apply")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > RANKS[-1]:
        reasons.append(f"its rank is {rank}, vLLM takes up to {RANKS[-1]}")
    if reasons:
        raise MergeError(
            f"{adapter}: cannot be served unmerged: {'; '.join(reasons)}. Use --to vllm, which serves the merged model."
        )
    return next(allowed for allowed in RANKS if allowed >= rank)


def write_base(adapter: Path, folder: Path) -> None:
    """The base as training saw it: the merge of an adapter whose updates and head are zero.

    Head: vLLM draws a head anew where a checkpoint has none, and requests that name no adapter would get noise;
    with zeros they get 0.
    """
    with tempfile.TemporaryDirectory() as scratch:
        silent = Path(scratch, "adapter")
        shutil.copytree(adapter, silent)
        tensors = load_tensors(silent / WEIGHTS)
        gone = (".lora_B.weight", ".score.weight")
        zeroed = {name: torch.zeros_like(t) if name.endswith(gone) else t for name, t in tensors.items()}
        save_tensors(zeroed, silent / WEIGHTS)
        record = read_record(adapter)
        write_record(silent, record)
        # without updates bfloat16 holds all that was read in it (not what int8 made of it), where auto would take float32
        is_exact = record["load_dtype"] == "bfloat16" and record["quantization"]["kind"] != "int8"
        is_exact = is_exact and record.get("model_type") in OVERFLOWING
        merge(silent, folder, MergeSettings(base="auto", dtype="bfloat16" if is_exact else "auto"))


def _copy_adapter(adapter: Path, folder: Path) -> None:
    """Matrices, head and settings, with the base beside it: on the original weights rewards would be others."""
    folder.mkdir()
    shutil.copy(adapter / WEIGHTS, folder)
    config = read_json(adapter / CONFIG) | {"base_model_name_or_path": "../base"}
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


PROGRAM = """\
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
request = json.load(open(sys.argv[1], encoding="utf-8"))
base = AutoModelForSequenceClassification.from_pretrained(request["folder"] + "/base", dtype=torch.float32)
model = PeftModel.from_pretrained(base, request["folder"] + "/adapter").eval()
with torch.inference_mode():
    rewards = [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in request["rows"]]
json.dump(rewards, open(sys.argv[2], "w"))
"""
"""Scores token ids with transformers and PEFT alone."""

USAGE = """\
# Reward model, as an adapter on its base

`base` is the base model as training saw it (dequantised), with a head of zeros; `adapter` holds the LoRA matrices and
the score head. Measured against the trained adapter: `parity.json`. In this folder:

```bash
{command}
curl localhost:8000/classify -H 'Content-Type: application/json' \\
  -d '{{"model": "reward", "messages": [{{"role": "user", "content": "2 + 2?"}}, {{"role": "assistant", "content": "4"}}]}}'
```

The reward is `data[0].probs[0]`; a request that names no adapter gets 0. Further adapters trained on the same quantised
base are served beside it with their own heads: `--max-loras 2 --lora-modules reward=adapter other=OTHER/adapter`, with
`--max-lora-rank` of the largest rank among them.
"""
"""README of an export."""
