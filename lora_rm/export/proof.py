"""What every export owes: a verified merge to start from, a folder that is whole, and rewards that came back.

The contract is the merge's `parity.json`: token ids in, rewards out. An export that only rewrites the merged
weights must give the merged model's rewards but for the noise of float32 sums, which is measured on the
machine that exports. One that rounds them once more may cost what it costs, which is printed and written down,
until the adapter is lost in it.
"""

import importlib.util
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_rm.console import say, show_table
from lora_rm.data.files import SUFFIXES
from lora_rm.errors import ConfigError, MergeError
from lora_rm.merge import check_replaceable
from lora_rm.model.base import check_shape, read_json
from lora_rm.model.record import MERGE_RECORD
from lora_rm.unfinished import UnfinishedFolder, unfinished_folder
from lora_rm.verify import change_cells, measure_change

TOLERANCE = 0.02
"""Largest difference of a reward by an exact export, as a share of the spread, whatever the noise is."""

NOISE_FACTOR = 10.0
"""An exact export may differ by so many times the noise floor: ONNX Runtime was seen at twice the floor
(SmolLM2-135M, 1.8e-5 against 9.7e-6 of the spread)."""

LEAST_ALLOWED = 1e-4
"""Smallest bound, as a share of the spread: two sums can agree by luck, and a floor of 0 would forbid all."""

LOST = 0.25
"""An export whose mean error is above this share of the distance to the model without adapter has lost it."""

NUM_PADDED = 16
"""Answers that are also scored in padded batches; all of them are scored one by one."""


SHAPE = {
    "passed": bool,
    "is_trained_model": bool,
    "merge": {"base": str, "base_weights": str, "dtype": str, "adds_bos": bool},
    "spread": float | int,
    "without_adapter": {"mean": float | int},
    "changes": dict,
    "answers": [{"text": str, "ids": [int], "prompt": int, "reward": float | int, "merged": float | int}],
}
"""What is read of the `parity.json` of a merged model."""


def need(target: str, *packages: str) -> None:
    """Asks for the packages of an extra before any work is done.

    Raises:
        ConfigError: If one is not installed; with the command that installs it.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{target} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Run in the folder of lora_rm's source: pip install '.[{target}]'"
        )


def checked_dtype(target: str, dtype: str, known: Sequence[str]) -> str:
    """A type that a target can write, by its own name whatever its case.

    Raises:
        ConfigError: If it cannot write that type.
    """
    names = {name.lower(): name for name in known}
    if dtype.lower() not in names:
        raise ConfigError(f"--dtype is {dtype!r}; --to {target} can write {', '.join(known)}.")
    return names[dtype.lower()]


def read_parity(merged: Path) -> dict[str, Any]:
    """The expected rewards of a merged model.

    Raises:
        MergeError: If its rewards were not compared with the adapter's, or changed by too much.
    """
    file = merged / "parity.json"
    if not file.is_file():
        raise MergeError(
            f"{merged}: has no parity.json, so its rewards were never compared. Run `lora-rm merge` first."
        )
    parity = read_json(file)
    if parity.get("passed") is False:
        raise MergeError(
            f"{merged}: its rewards changed by more than was allowed. `lora-rm merge RUN --merge.overwrite True` merges again; if that "
            "fails its message says what to change."
        )
    check_shape(file, parity, SHAPE)
    return parity


@contextmanager
def export_folder(
    merged: Path, out: Path, target: str, *, overwrite: bool, dtype: str = ""
) -> Iterator[tuple[UnfinishedFolder, dict[str, Any]]]:
    """The folder that an export is written into, and the rewards that it must give.

    An export that was interrupted goes on: the steps that it had finished (`UnfinishedFolder.once`) are not done
    again, unless the merged model or the type is another.

    Raises:
        MergeError: If `out` exists and is not to be replaced, or the merged model was not verified.
    """
    if out.exists() and not overwrite:
        raise MergeError(f"{out}: exists already. Remove it, choose another --out, or use --overwrite.")
    check_replaceable(out, merged)
    parity = read_parity(merged)
    stats = {file.name: file.stat() for file in sorted(merged.iterdir())}
    identity = {
        "version": 1,  # of the writing
        "target": target,
        "dtype": dtype,
        "merged": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }
    with unfinished_folder(out, identity, "export") as folder:
        yield folder, parity


def copy_public(file: Path, target: Path) -> None:
    """Copies a file of a merged model; in the record of the merge no folder of this machine is named."""
    if file.name == MERGE_RECORD:
        target.write_text(json.dumps(public_record(read_json(file)), indent=1), encoding="utf-8")
    else:
        shutil.copy(file, target)


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a merge with the base's hub id, or else its last name."""
    base = str(record.get("base"))
    return {**record, "base": hub_id(base) or Path(base).name}


def hub_id(base: str) -> str | None:
    """The hub id of a base model, where its name is one or its folder lies in the hub's cache."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{base}/")
    if cached:
        return "/".join(cached.groups())
    is_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and not Path(base).exists()
    return base if is_id and not base.lower().endswith(SUFFIXES) else None


def copy_tokenizer(merged: Path, folder: Path) -> None:
    """Puts tokenizer, chat template and the record of the merge beside an export."""
    for pattern in (
        "tokenizer*",
        "chat_template*",
        "special_tokens_map.json",
        "*.model",
        MERGE_RECORD,
    ):
        for file in merged.glob(pattern):
            copy_public(file, folder / file.name)


def usage_page(usage: str, parity: Mapping[str, Any]) -> str:
    """The README of an export: `{bos}` says what a text lacks of what the chat template writes, if anything."""
    return usage.replace(
        "{bos}", ", less the BOS, which the tokenizer adds" if parity["merge"]["adds_bos"] else ""
    )


def prove(
    folder: Path,
    parity: Mapping[str, Any],
    found: Mapping[str, Sequence[float]],
    *,
    target: str,
    runtime: str,
    dtype: str,
    noise: float,
    rounded: Collection[str] = (),
    rounding: float = 0.0,
    remedy: str = "Choose a type with more bits.",
) -> dict[str, Any]:
    """Compares the rewards that an export gave with those expected.

    Args:
        folder: Of the export, for messages.
        parity: Of the merged model (`read_parity`).
        found: By way of scoring the rewards of all answers of `parity`, or of the first ones.
        target: As the command names it.
        runtime: What scored, by the name that a user knows.
        dtype: How weights are stored.
        noise: Largest difference between two ways of summing the merged model's float32 rewards on this machine,
            as a share of the spread.
        rounded: Ways that compute with other weights or products than the merged model's in float32.
        rounding: Mean change, as a share of the spread, that these may have however little the adapter does: where
            another way computes the same weights in float32, that one would show a lost adapter.
        remedy: What to do where the adapter was lost by rounding.

    Returns:
        What the export's own `parity.json` is to hold; `write_parity` puts it there.

    Raises:
        MergeError: If rewards differ by more than allowed, or by so much that the adapter was lost.
    """
    answers, distance, spread = parity["answers"], parity["without_adapter"]["mean"], parity["spread"] or 1.0
    allowed = min(TOLERANCE, max(NOISE_FACTOR * noise, LEAST_ALLOWED))
    allowed_mean = max(LOST * distance, rounding)
    changes: dict[str, dict[str, Any]] = {}
    errors: dict[str, float] = {}
    """Mean changes of the merged model's rewards: one merged into another base is far from the trained adapter's own."""
    for way, rewards in found.items():
        first = answers[: len(rewards)]
        # shares of the spread of all answers, also where a way scored only the first of them
        measured = measure_change([a["reward"] for a in first], rewards, [a["prompt"] for a in first], spread)
        error = measure_change([a["merged"] for a in first], rewards, spread=spread)
        errors[way] = error.mean
        changes[way] = asdict(measured) | {"num_answers": len(first), "against_merged": error.largest}
    rows = [
        [way, change["num_answers"], *change_cells(change), f"{change['against_merged']:.1e}"]
        for way, change in changes.items()
    ]
    columns = ["scored", "answers", "mean", "largest", "flipped", "to merged"]
    show_table(
        f"{runtime}, {dtype}: change of the trained adapter's rewards, in shares of their spread ({spread:.3f})",
        columns,
        rows,
    )
    for way, change in changes.items():
        if change["against_merged"] <= allowed:  # as exact as float32 is, however little the adapter does
            continue
        # written so that NaN fails too
        is_lost = not errors[way] <= (allowed_mean if way in rounded else LOST * distance)
        if not is_lost and way in rounded:
            continue
        bound = "" if way in rounded else f" (allowed: {allowed:.3%}; noise of float32 here: {noise:.1e})"
        lost = (
            f" The adapter was lost: the mean change is {errors[way]:.2%}, that of the model without adapter "
            f"{distance:.2%}.{f' {remedy}' if way in rounded else ''}"
        )
        raise MergeError(
            f"{folder}: the {runtime}'s rewards differ by up to {change['against_merged']:.2%} of the spread from the "
            f"merged model's ({dtype}, {way}){bound}.{lost if is_lost else ''}"
        )
    say(f"The model without adapter changes them by {distance:.1%}; noise of float32 here: {noise:.1e}.")
    exported = next(iter(found.values()))
    return {
        "passed": True,
        "target": target,
        "runtime": runtime,
        "dtype": dtype,
        "merge": public_record(parity["merge"]),
        "is_trained_model": parity["is_trained_model"],
        "spread": parity["spread"],
        "num_answers": len(answers),
        "noise": noise,
        "allowed": {"against_merged": allowed, "mean": allowed_mean},
        "without_adapter": parity["without_adapter"],
        "changes": changes,
        "answers": [
            {key: answer[key] for key in ("text", "ids", "prompt", "reward")}
            | ({"exported": exported[number]} if number < len(exported) else {})
            for number, answer in enumerate(answers)
        ],
    }


def write_parity(folder: Path, proved: Mapping[str, Any]) -> None:
    """Puts what `prove` returned beside the export."""
    text = json.dumps(proved, indent=1, ensure_ascii=False)
    (folder / "parity.json").write_text(text, encoding="utf-8")
