"""The folder that vLLM serves, checked against what vLLM needs to give the raw reward.

vLLM is not imported: it lives in an environment of its own (its transformers is older than ours). What is checked
here is what it was seen to do with a folder that lacks something; `benchmarks/vllm_parity.py` installs it, serves
the folder and compares rewards.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_rm.checkpoint import RunFolder
from lora_rm.console import say
from lora_rm.errors import MergeError
from lora_rm.export.huggingface import export_huggingface
from lora_rm.export.proof import read_parity
from lora_rm.model.base import read_json
from lora_rm.model.tensor_files import tensors_by_name

KNOWN = (
    "Bloom", "Exaone4", "Falcon", "GPT2", "GPTBigCode", "GPTJ", "GPTNeoX", "Gemma", "Gemma2", "Gemma3", "Glm", "Glm4",
    "GptOss", "Llama", "Ministral3", "Mistral", "Mixtral", "Nemotron", "Olmo", "Olmo2", "Olmo3", "Persimmon", "Phi",
    "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Qwen3Next", "Qwen3_5", "SeedOss", "SmolLM3", "StableLm",
    "Starcoder2",
)  # fmt: skip
"""Families of `*ForSequenceClassification` that vLLM 0.32 computes with code of its own (its registry.py). Others
fall to its Transformers backend, which was not compared."""

NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""Model types that vLLM 0.32 refuses in float16 (its config/model.py)."""


def export_vllm(merged: Path, out: Path, *, run: RunFolder | None = None, overwrite: bool = False) -> Path:
    """Makes the same folder as `export_huggingface`, checks what vLLM needs, and prints the command that serves it.

    Args:
        merged: Folder with `parity.json`, as `verify` leaves it.
        out: Folder to make.
        run: Whose evaluation and settings the card tells.
        overwrite: Replace an earlier export.

    Raises:
        MergeError: If the model was not verified, vLLM would refuse it or give other numbers than rewards, `out`
            exists, or the transformers pipeline gives other rewards.
    """
    check_servable(merged, read_parity(merged))
    config = read_json(merged / "config.json")
    usage = USAGE.format(command=serve_command(f"./{out.name}", config))
    export_huggingface(merged, out, run=run, overwrite=overwrite, target="vllm", usage=usage)
    say(f"Serve it, in an environment with vLLM, with:\n  {serve_command(str(out), config)}")
    return out


def check_servable(folder: Path, parity: Mapping[str, Any]) -> None:
    """Checks a folder against what vLLM needs for raw rewards of one logit.

    Args:
        folder: A merged model.
        parity: Its rewards, whose texts must not end with the pad token.

    Raises:
        MergeError: With everything that is wrong, and what vLLM would make of it.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config") or config
    architectures = config.get("architectures") or ["none"]
    family = str(architectures[0]).removesuffix("ForSequenceClassification")
    stored = tensors_by_name(sorted(folder.glob("*.safetensors")))
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    pad = text.get("pad_token_id")
    faults = []
    if family == architectures[0] or len(architectures) != 1:
        faults.append(
            f"config.json's architectures are {architectures}; without ...ForSequenceClassification vLLM makes no "
            "score head"
        )
    elif family not in KNOWN:
        faults.append(
            f"vLLM has no code of its own for {architectures[0]}, and its general code was not compared"
        )
    if shapes.get("score.weight") != (1, text.get("hidden_size") or text.get("n_embd")):
        faults.append(
            f"score.weight is {shapes.get('score.weight', 'missing')}; vLLM serves noise where the head is missing"
        )
    if config.get("problem_type") != "regression":
        faults.append(
            f"config.json's problem_type is {config.get('problem_type')}; unless it is regression vLLM returns "
            "sigmoid(reward)"
        )
    labels: Any = config.get("id2label") or {}
    if len(labels) != 1:
        faults.append(f"config.json names {len(labels)} labels; one logit has one")
    if pad is None or any(answer["ids"][-1] == pad for answer in parity["answers"]):
        faults.append(
            f"config.json's pad_token_id is {pad}; it must be set and end no conversation, or transformers reads "
            "the reward at another token than vLLM"
        )
    if config.get("quantization_config"):
        faults.append("config.json has a quantization_config; export merged 16- or 32-bit weights")
    if config.get("dtype") == "float16" and config.get("model_type") in NO_FLOAT16:
        faults.append(
            f"it is stored as float16, which vLLM refuses for {config['model_type']}; merge again with --merge.dtype "
            "float32 --merge.overwrite True"
        )
    if not _has_template(folder):
        faults.append("its tokenizer has no chat template, which requests with messages need")
    if faults:
        raise MergeError(f"{folder}: cannot be served by vLLM as it is: {'; '.join(faults)}.")


def serve_command(folder: str, config: Mapping[str, Any], *more: str) -> str:
    """The command that serves a folder; the type is always named, since vLLM makes float16 out of float32."""
    words = [
        "vllm",
        "serve",
        folder,
        "--runner",
        "pooling",
        "--convert",
        "classify",
        "--dtype",
        str(config["dtype"]),
    ]
    return shlex.join([*words, *more])


def _has_template(folder: Path) -> bool:
    if any(folder.glob("chat_template*")):
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))


USAGE = """
## Serving with vLLM

In the folder that holds this one (for a copy from the hub, its name there in place of the path):

```bash
{command}
curl localhost:8000/classify -H 'Content-Type: application/json' \\
  -d '{{"messages": [{{"role": "user", "content": "2 + 2?"}}, {{"role": "assistant", "content": "4"}}]}}'
```

The reward is `data[0].probs[0]`: no sigmoid is applied. `/classify` also takes `"input"`: token ids, or texts as
`parity.json` holds them; `/pooling` gives the same number with `"task": "classify"`.
"""
"""What an export's README says beside the model card."""
