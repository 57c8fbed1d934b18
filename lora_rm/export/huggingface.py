"""A folder that `AutoModelForSequenceClassification` and `pipeline("text-classification")` open as it is."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lora_rm.checkpoint import RunFolder
from lora_rm.console import say
from lora_rm.errors import MergeError

TOLERANCE = 0.02
"""Largest difference of a reward through the pipeline, as a share of the spread."""


def export_huggingface(
    merged: Path, out: Path, *, run: RunFolder | None = None, overwrite: bool = False
) -> Path:
    """Copies a merged and verified model, adds a model card, and checks it through the pipeline.

    Args:
        merged: Folder with `parity.json`, as `verify` leaves it.
        out: Folder to make.
        run: Whose evaluation and settings the card tells.
        overwrite: Replace an earlier export.

    Raises:
        MergeError: If the model was not verified, `out` exists, or the pipeline gives other rewards.
    """
    if not (merged / "parity.json").is_file():
        raise MergeError(
            f"{merged}: has no parity.json, so its rewards were never compared. Run `lora-rm merge` first."
        )
    if out.exists() and not overwrite:
        raise MergeError(f"{out}: exists already. Remove it, choose another --out, or use --overwrite.")
    parity = json.loads((merged / "parity.json").read_text(encoding="utf-8"))
    if not parity["passed"]:
        raise MergeError(
            f"{merged}: its rewards changed by more than was allowed. Merge again with other settings."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        for file in merged.iterdir():
            _link_or_copy(file, partial / file.name)
        (partial / "README.md").write_text(model_card(parity, run), encoding="utf-8")
        check_pipeline(partial, parity)
        partial.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def check_pipeline(folder: Path, parity: dict[str, Any], num_answers: int = 16) -> float:
    """Scores texts through the transformers pipeline in a fresh process; returns the largest difference.

    Raises:
        MergeError: If a reward differs by more than `TOLERANCE` of the spread, or a warning is printed.
    """
    answers = parity["answers"][:num_answers]
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as texts:
        json.dump([answer["text"] for answer in answers], texts)
        texts.flush()
        done = subprocess.run(
            [sys.executable, "-c", PIPELINE, str(folder.resolve()), texts.name],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        raise MergeError(f"{folder}: the transformers pipeline cannot open it: {done.stderr[-1500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "newly initialized" in done.stderr:
        raise MergeError(
            f"{folder}: transformers drew new weights when it opened the export: {done.stderr[-1500:]}"
        )
    largest = max(abs(a["merged"] - b) for a, b in zip(answers, found, strict=True)) / (
        parity["spread"] or 1.0
    )
    if not largest <= TOLERANCE:
        raise MergeError(
            f"{folder}: the pipeline's rewards differ by {largest:.2%} of the spread (allowed: {TOLERANCE:.0%})."
        )
    say(f"The transformers pipeline gives the same rewards (largest difference {largest:.3%} of the spread).")
    return largest


PIPELINE = """\
import json, sys, torch
from transformers import pipeline
reward = pipeline("text-classification", model=sys.argv[1], dtype=torch.float32, device="cpu")
texts = json.load(open(sys.argv[2], encoding="utf-8"))
print(json.dumps([found["score"] for found in reward(texts)]))
"""


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Uploads an export to the hub; returns its address.

    Raises:
        MergeError: If the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=[".*"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise MergeError(
            f"{repository}: the hub refused the upload ({error}). Check `hf auth login`."
        ) from None


def model_card(parity: dict[str, Any], run: RunFolder | None) -> str:
    """The README of an export; every number in it is read from the run's files."""
    merge = parity["merge"]
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "lora_rm"],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", merge["base"]) and not Path(merge["base"]).exists():
        header |= {"base_model": merge["base"], "base_model_relation": "finetune"}
    lines = ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", "", "# Reward model", ""]
    # the pipeline's tokenizer adds a BOS; one that the template wrote would be the second
    bos = ["text = text.removeprefix(reward.tokenizer.bos_token)"] if merge["adds_bos"] else []
    lines += [
        f"Trained with LoRA on `{Path(merge['base']).name if '/' in merge['base'] and 'base_model' not in header else merge['base']}`, "
        f"merged into its {merge['base_weights']} weights and stored as {merge['dtype']}. One logit: the raw reward.",
        "",
        "```python",
        "from transformers import pipeline",
        'reward = pipeline("text-classification", model=PATH)',
        "text = reward.tokenizer.apply_chat_template(messages, tokenize=False)  # ends with the answer",
        *bos,
        'reward(text)[0]["score"]',
        "```",
        "",
    ]
    evaluation = run.read_json("eval.json") if run else None
    if evaluation:
        after, before = evaluation["after"], evaluation["before"]
        low, high = after["interval"]
        lines += [
            "| held-out pairs | before | after | 95 % interval | longer answer |",
            "|---|---|---|---|---|",
            f"| {after['pairs']['num_pairs']} | {before['pairs']['accuracy']:.3f} | {after['pairs']['accuracy']:.3f} "
            f"| {low:.3f} to {high:.3f} | {after['length_baseline']:.3f} |",
            "",
        ]
    lines += [
        f"Rewards of {parity['num_answers']} answers against the trained adapter, as shares of their spread "
        f"({parity['spread']:.3f}); texts and rewards are in `parity.json`:",
        "",
        "| way | mean change | largest | pairs flipped |",
        "|---|---|---|---|",
    ]
    for way, change in parity["changes"].items():
        flips = f"{change['pair_flips']} of {change['num_pairs']}"
        lines.append(f"| {way} | {change['mean']:.3%} | {change['largest']:.3%} | {flips} |")
    return "\n".join(lines) + "\n"


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link for weights where the disk allows it: an 8B model is 16 GB; a copy otherwise."""
    if source.suffix == ".safetensors":
        try:
            target.hardlink_to(source)
            return
        except OSError:
            pass
    shutil.copy(source, target)
