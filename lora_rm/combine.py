"""Several adapters on one base -> one adapter whose update and head are their weighted sum."""

import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from lora_rm.errors import MergeError, storing
from lora_rm.merge import read_updates, target_of
from lora_rm.model.adapter import WEIGHTS
from lora_rm.model.record import (
    HEAD_KEY,
    RECORD,
    check_files,
    read_adapter_config,
    read_head,
    read_record,
    recorded_base,
    write_record,
)
from lora_rm.model.tensor_files import save_tensors
from lora_rm.unfinished import unfinished_folder


def combine(adapters: Sequence[Path], weights: Sequence[float], folder: Path) -> None:
    """Writes one adapter whose update and head are the weighted sums of those of several on the same base.

    With weights that sum to 1 this averages reward models (Ramé et al. 2024, arXiv 2401.12187). Nothing is
    rounded: A matrices are stacked, and B matrices, times weight and scale, side by side. Its canaries come
    without rewards, for no training gave them any.

    Args:
        adapters: Folders written by `RewardModel.save`.
        weights: One for each.
        folder: To make; an earlier combined adapter is replaced, and nothing else.

    Raises:
        MergeError: If they do not share a base, its quantisation and the tokenizer, one is a DoRA or has
            trained biases, or something else lies in `folder`.
    """
    folder = Path(os.path.realpath(folder))  # a link stays, and what it points to is replaced
    if len(weights) != len(adapters) or not all(math.isfinite(weight) and weight for weight in weights):
        raise MergeError(
            f"There are {len(adapters)} adapters and the weights {list(weights)}. Give one number each, not 0."
        )
    records = [read_record(adapter) for adapter in adapters]
    is_combined = (folder / RECORD).is_file() and "combined" in read_record(folder)
    if folder.exists() and (not is_combined or folder in map(Path.resolve, adapters)):
        raise MergeError(
            f"{folder}: exists, and is no combined adapter or one of those to combine. Move it, or choose another --out."
        )
    for adapter, record in zip(adapters, records, strict=True):
        check_files(adapter, record)
    for part in ("base", "load_dtype", "quantization", "tokens"):
        for adapter, record in zip(adapters, records, strict=True):
            if record.get(part) != records[0].get(part):
                raise MergeError(
                    f"{adapter}: its {part} is not that of {adapters[0]}. Only adapters trained on the same base, "
                    "quantised in the same way, with the same tokenizer can be combined."
                )
    modules = target_of(recorded_base(adapters[0]))[1]
    stacked: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        updates, biases = read_updates(adapter, modules)
        if biases:
            raise MergeError(
                f"{adapter}: has trained biases, which replace the base's; it cannot be combined."
            )
        for name, update in updates.items():
            if update.magnitude is not None:
                raise MergeError(
                    f"{adapter}: is a DoRA, whose update is no sum of two matrices; it cannot be combined."
                )
            a, b = stacked.setdefault(name.removesuffix(".weight"), ([], []))
            a.append(update.a.read().float())
            b.append(update.b.read().float() * (weight * update.scale))
    heads = [weight * read_head(adapter) for adapter, weight in zip(adapters, weights, strict=True)]
    tensors = {HEAD_KEY: torch.stack(heads).sum(0)}
    for name, (a, b) in stacked.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat(a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.cat(b, dim=1)
    ranks = {name: sum(len(matrix) for matrix in a) for name, (a, _) in stacked.items()}
    with unfinished_folder(folder, None, "combination") as made, storing(folder):
        _write_combined(made.path, adapters[0], records, weights, tensors, ranks)


def _write_combined(
    folder: Path,
    first: Path,
    records: Sequence[dict[str, Any]],
    weights: Sequence[float],
    tensors: dict[str, torch.Tensor],
    ranks: dict[str, int],
) -> None:
    """Writes the adapter that `combine` found; the record comes last."""
    rank = max(ranks.values())
    others = {f"^{re.escape(name)}": own for name, own in sorted(ranks.items()) if own != rank}
    shutil.copytree(first, folder, dirs_exist_ok=True)
    (folder / RECORD).unlink()
    (folder / "adapter_config.json").unlink()
    LoraConfig(
        task_type="SEQ_CLS",
        base_model_name_or_path=read_adapter_config(first).base_model_name_or_path,
        r=rank,
        lora_alpha=rank,  # the scales are in B
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(ranks),
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_tensors(tensors, folder / WEIGHTS)
    combined = {
        "canaries": [{**canary, "reward": None} for canary in records[0]["canaries"]],
        "combined": [
            {"adapter_sha256": record["files"][WEIGHTS], "weight": weight}
            for record, weight in zip(records, weights, strict=True)
        ],
    }
    write_record(folder, records[0] | combined)
