"""Reward models with QLoRA: train, merge, prove, export.

    from lora_rm import load_reward_model

    scorer = load_reward_model("runs/quickstart")
    scorer.score("What is 2 + 2?", ["4", "Paris"])

Names are imported when they are first used, so that `import lora_rm` costs no import of torch. Functions that are named
like their module (`lora_rm.train.train`, and of merge, verify and evaluate) are found there.
"""

import importlib
import logging
from typing import Any

__version__ = "0.1.0"

# on CPUs with bfloat16 it advises to install a package with which it fetches a kernel from the hub; that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "RewardModel": "lora_rm.model.reward_model",
    "RunFolder": "lora_rm.checkpoint",
    "Scorer": "lora_rm.score",
    "Settings": "lora_rm.config",
    "export_gguf": "lora_rm.export.gguf",
    "export_huggingface": "lora_rm.export.huggingface",
    "export_onnx": "lora_rm.export.onnx",
    "export_torch_export": "lora_rm.export.torch_export",
    "export_vllm": "lora_rm.export.vllm",
    "load_data": "lora_rm.data.split",
    "load_reward_model": "lora_rm.score",
    "load_settings": "lora_rm.config",
    "reward_function": "lora_rm.score",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_rm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
