"""What lies beside an adapter: its record `lora_rm.json`, and the score head in its file of weights."""

import json
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict

from lora_rm.errors import ModelError, first_line
from lora_rm.model.adapter import WEIGHTS
from lora_rm.model.base import BaseModel, check_shape, file_sha256, find_base, read_json
from lora_rm.model.quantization import DTYPES, Quantization, Storage, code_hashes, dtype_name
from lora_rm.model.tensor_files import load_tensors
from lora_rm.unfinished import write_atomically

RECORD = "lora_rm.json"
"""File beside the adapter that holds what adapter_config.json does not: see `RewardModel.save`."""

MERGE_RECORD = "lora_rm_merge.json"
"""File in a merged folder that says what was merged into what, and how."""

SHAPE = {
    "base": {"name": str, "revision": str | None, "files": dict},
    "load_dtype": str,
    "quantization": {"kind": str, "double": bool, "codes": dict},
    "files": {WEIGHTS: str, "adapter_config.json": str},
}
"""What is read of the record."""

CANARIES = [{"ids": [int], "prompt": int, "reward": float | int}]
"""Of these answers the adapter gave these rewards."""

HEAD_KEY = "base_model.model.score.weight"
"""Name of the head in PEFT's adapter file."""


def is_merged(folder: Path) -> bool:
    """Whether a folder holds dequantised weights with an update, which is lost when they are quantised again."""
    record = folder / MERGE_RECORD
    return record.is_file() and read_json(record).get("base_weights") == "dequantized"


def read_record(folder: Path) -> dict[str, Any]:
    """Reads `lora_rm.json`.

    Raises:
        ModelError: If it is missing or was written by a newer version.
    """
    if not (folder / RECORD).is_file():
        raise ModelError(
            f"{folder}: has no {RECORD}, so it is no adapter that lora_rm saved. Adapters of other tools lack what a proof needs; "
            "train it with `lora-rm train`, or merge it with PEFT."
        )
    record = read_json(folder / RECORD)
    if record.get("format") != 1:
        raise ModelError(
            f"{folder / RECORD}: format {record.get('format')} is unknown. Install a newer lora_rm."
        )
    check_shape(folder / RECORD, record, SHAPE)
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes `lora_rm.json`, with the SHA-256 of every file that lies beside it by now.

    It comes last: an adapter that has one is whole.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and RECORD not in file.name)
    record = {**record, "files": {file.name: file_sha256(file) for file in files}}
    write_atomically(folder / RECORD, json.dumps(record, indent=1))


def read_adapter_config(folder: Path) -> LoraConfig:
    """LoRA's configuration, out of adapter_config.json.

    Raises:
        ModelError: If it is none.
    """
    read_json(folder / "adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"describes {config.peft_type}, not LoRA")
        return config
    except Exception as error:  # of any kind: PEFT checks little of what such a file says
        raise ModelError(
            f"{folder / 'adapter_config.json'}: is no configuration that PEFT knows ({first_line(error)}). Copy the folder again."
        ) from None


def recorded_base(folder: Path) -> BaseModel:
    """The base that an adapter was trained on.

    Raises:
        ModelError: If it is not where its record says; with the command that tells it another place.
    """
    base = read_record(folder)["base"]
    try:
        return find_base(base["name"], base["revision"])
    except ModelError as error:
        raise ModelError(
            f"{folder}: its base is not found. {error} Where the base lies elsewhere now: `lora-rm merge RUN --model.base FOLDER`."
        ) from None


def move_base(folder: Path, name: str) -> None:
    """Notes where the base of an adapter lies now.

    Args:
        folder: Of the adapter.
        name: As in `find_base`.

    Raises:
        ModelError: If there is no model, or another one than the adapter was trained on.
        StorageError: If the record cannot be written.
    """
    record = read_record(folder)
    known = record["base"]
    base = find_base(name, known["revision"])
    if base.name == known["name"]:
        return
    check_base(folder, record, base)
    record["base"] = {**known, "name": base.name, "revision": base.revision}
    write_atomically(folder / RECORD, json.dumps(record, indent=1))


def check_base(folder: Path, record: dict[str, Any], base: BaseModel) -> None:
    """Compares the files of a base with those that an adapter was trained on, which the same commit on the hub has.

    Raises:
        ModelError: If they differ: embeddings, norms and an unquantised base have no codes that would tell.
    """
    known = record["base"]
    if base.revision is not None and base.revision == known["revision"]:
        return
    hashes = base.file_hashes()
    changed = sorted(
        name for name in known["files"].keys() | hashes.keys() if known["files"].get(name) != hashes.get(name)
    )
    if changed:
        raise ModelError(
            f"{folder}: was trained on {known['name']}, whose {changed[0]} is not that of {base.name} (SHA-256). Its update fits no "
            "other weights: give an unchanged copy of that base as model.base (`lora-rm merge RUN --model.base FOLDER` for a run)."
        )


def check_files(folder: Path, record: dict[str, Any]) -> None:
    """Compares an adapter's files with those that were saved: weights, settings, tokenizer, chat template.

    Raises:
        ModelError: If one differs or is missing; nothing else would tell of a flipped bit in a matrix, or of another alpha.
    """
    for name, saved in record["files"].items():
        file = folder / Path(name).name
        if not file.is_file():
            fault = f"{folder}: has no {name[:80]}"
        elif file_sha256(file) != saved:
            fault = f"{file}: is not the file that was saved (its SHA-256 differs from that in {RECORD})"
        else:
            continue
        raise ModelError(
            f"{fault}. Copy the folder again; in a run, `lora-rm train RUN/config.yaml --resume` writes it anew."
        )


def recorded_quantization(record: dict[str, Any]) -> Quantization:
    """How the base was quantised when the adapter was trained."""
    stored = record["quantization"]
    if stored["kind"] not in get_args(Storage) or record["load_dtype"] not in DTYPES:
        raise ModelError(
            f"{RECORD}: the base was quantised as {stored['kind']!r} and read as {record['load_dtype']!r}, which this lora_rm does "
            "not know. Install a newer one, or copy the adapter again."
        )
    return Quantization(kind=stored["kind"], double=stored["double"], load_dtype=DTYPES[record["load_dtype"]])


def read_head(folder: Path) -> torch.Tensor:
    """The head in an adapter's file, (1, H) float32.

    Raises:
        ModelError: If there is none, or it has not one logit.
    """
    tensors = load_tensors(folder / WEIGHTS)
    if HEAD_KEY not in tensors:
        raise ModelError(
            f"{folder}: the adapter has no score head ({len(tensors)} tensors, none named {HEAD_KEY}). "
            "It was not trained as a reward model; rewards from a fresh head would be random. Give an adapter of a run."
        )
    return one_logit(tensors[HEAD_KEY], folder)


def one_logit(head: torch.Tensor, folder: Path) -> torch.Tensor:
    """A stored head in float32.

    Raises:
        ModelError: If it has not one logit.
    """
    if head.dim() != 2 or head.shape[0] != 1:
        raise ModelError(
            f"{folder}: its score head has shape {list(head.shape)}; a reward model has one logit: [1, hidden]."
        )
    return head.float()


def check_codes(model: Any, record: dict[str, Any], folder: Path, base: BaseModel) -> None:
    """Compares the codes of a quantised base with those the adapter was trained on.

    Args:
        model: The base, loaded.
        record: Of the adapter.
        folder: Of the adapter, for the message.
        base: What was loaded, for the message.

    Raises:
        ModelError: If they differ.
    """
    expected: dict[str, str] = record["quantization"]["codes"]
    if not expected:
        return
    found = code_hashes(model)
    changed = [name for name, value in expected.items() if found.get(name) != value]
    if changed:
        raise ModelError(
            f"{folder}: {len(changed)} of {len(expected)} quantised layers of {base.name} are not those it was "
            f"trained on (first: {changed[0]}). The base has changed since, or this machine quantises differently."
        )


def start_from_saved(
    model: PeftModel, folder: Path, base: BaseModel, quantization: Quantization
) -> dict[str, Any]:
    """Gives a new adapter and head the values of a saved one, and returns its record.

    Args:
        model: With an adapter of the same shape.
        folder: Of the saved adapter, or of its run.
        base: Below the new one; must be the files that the saved one was trained on.
        quantization: Of the base; must be that of the saved one.

    Raises:
        ModelError: If base, storage or shape differ, or the file is damaged.
    """
    folder = folder / "adapter" if (folder / "config.yaml").is_file() else folder
    record = read_record(folder)
    check_files(folder, record)
    read_head(folder)  # raises without one
    check_base(folder, record, base)
    if recorded_quantization(record) != quantization:
        stored, wanted = (
            f"quantization {q.kind}, double_quantization {q.double}, load_dtype {dtype_name(q.load_dtype)}"
            for q in (recorded_quantization(record), quantization)
        )
        raise ModelError(
            f"adapter.start_from: {folder} was trained with model.{stored}; this run has {wanted}. Its update fits no other weights: "
            "give the same."
        )
    own, saved = model.peft_config["default"].to_dict(), read_json(folder / "adapter_config.json")
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    if changed := [
        f"{name} is {own[name]}, there {saved.get(name)}" for name in names if own[name] != saved.get(name)
    ]:
        raise ModelError(
            f"adapter.start_from: {folder} has another shape ({'; '.join(changed)}). Give the same adapter.* settings."
        )
    found = set_peft_model_state_dict(model, load_tensors(folder / WEIGHTS))
    apart = [*found.unexpected_keys, *(name for name in found.missing_keys if "lora_" in name)]
    if apart:
        raise ModelError(
            f"adapter.start_from: {folder} adapts other layers ({len(apart)} differ, first: {apart[0]}). Give the same "
            "adapter.target_modules and adapter.layers_to_transform."
        )
    return record
