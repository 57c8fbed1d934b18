"""Rewards before and after the merge, each side opened from the disk in a process of its own.

The contract are the canaries of `lora_rm.json` and held-out answers, as token ids. The same ids go through
the adapter on the quantised base and through the merged model, in float32 on both sides: through this library
and through plain transformers padded on the right, padded on the left and one by one. The trained head on the
base without adapter shows how far a model is that lost its adapter.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from lora_rm.config import MergeSettings, ModelSettings, VerifySettings
from lora_rm.console import say, show_table
from lora_rm.data.batches import pad_rows
from lora_rm.data.tokens import ChatTokenizer, TokenTree
from lora_rm.errors import MergeError
from lora_rm.merge import OVERFLOWING, MergePlan, check_weights
from lora_rm.model.base import BaseModel, check_shape, read_json
from lora_rm.model.classifier import has_absolute_positions
from lora_rm.model.elementwise import give_back_rotary
from lora_rm.model.record import CANARIES, MERGE_RECORD, RECORD, read_record
from lora_rm.model.reward_model import RewardModel
from lora_rm.model.tensor_files import tensors_by_name
from lora_rm.unfinished import write_atomically

REQUANTIZED = "loaded in NF4 again"
"""A way of scoring a merged model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """How far rewards are from those expected."""

    mean: float
    """Mean absolute change, as a share of the spread of the expected rewards."""

    largest: float
    """Largest absolute change, as a share of the spread."""

    kendall_tau: float
    """Rank correlation over all pairs of answers, ties counted (tau-b, Kendall 1945)."""

    pair_flips: int
    """Pairs of answers to one prompt whose order changed, out of `num_pairs`: decisions that changed."""

    num_pairs: int

    order_flips: int
    """The same over all pairs, also of answers to different prompts, out of `num_orders`."""

    num_orders: int


def change_cells(change: Mapping[str, Any], digits: int = 3) -> list[str]:
    """Mean, largest and flipped pairs of a `Change` that was written down, for a table."""
    shares = [f"{change[key]:.{digits}%}" for key in ("mean", "largest")]
    return [*shares, f"{change['pair_flips']} of {change['num_pairs']}"]


def measure_change(
    expected: Sequence[float],
    found: Sequence[float],
    prompts: Sequence[object] | None = None,
    spread: float | None = None,
) -> Change:
    """Compares two lists of rewards of the same answers.

    Args:
        expected: Rewards before.
        found: Rewards after, in the same order.
        prompts: Which prompt each answers; None: all the same one.
        spread: What changes are shares of; None: the standard deviation of `expected`.
    """
    count = len(expected)
    spread = spread or standard_deviation(expected) or 1.0
    changes = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    flips = agreeing = own_flips = own_pairs = 0
    ties = [0, 0]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    for i, j in pairs:
        before, after = expected[i] - expected[j], found[i] - found[j]
        ties[0] += before == 0
        ties[1] += after == 0
        flips += before * after < 0
        agreeing += before * after > 0
        if prompts is None or prompts[i] == prompts[j]:
            own_pairs += 1
            own_flips += before * after < 0
    scale = math.sqrt((len(pairs) - ties[0]) * (len(pairs) - ties[1]))
    return Change(
        mean=sum(changes) / count / spread,
        largest=max(changes) / spread if all(map(math.isfinite, changes)) else math.inf,
        kendall_tau=(agreeing - flips) / scale if scale else 1.0,
        pair_flips=own_flips,
        num_pairs=own_pairs,
        order_flips=flips,
        num_orders=len(pairs),
    )


def verify(
    adapter: Path,
    merged: Path,
    settings: VerifySettings | None = None,
    *,
    held_out: Sequence[dict[str, Any]] = (),
    device: str = "auto",
) -> dict[str, Any]:
    """Checks weights, then rewards; writes `parity.json` into the merged folder.

    A merge into another base than that of training is another model: its weights must be right, and how far its
    rewards are from those of training is measured and said.

    Args:
        adapter: Folder of the trained adapter.
        merged: Folder that `merge` wrote.
        settings: How much rewards may change.
        held_out: A run's held-out answers, to be compared beside the canaries: ids, and the number of the prompt.
        device: As in `model.device`.

    Returns:
        What `parity.json` holds: spread, changes by way of scoring, and texts with their expected rewards.

    Raises:
        MergeError: If the weights are wrong, the trained adapter no longer gives its canaries' rewards, or the
            merged model's rewards changed by more than allowed.
    """
    settings = settings or VerifySettings()
    merge_record = read_json(merged / MERGE_RECORD)
    check_shape(merged / MERGE_RECORD, merge_record, {"base_weights": str, "dtype": str})
    plan = MergePlan(adapter, MergeSettings(base=merge_record["base_weights"], dtype=merge_record["dtype"]))
    rounding = max(check_weights(plan, merged).values(), default=0.0)
    say(f"The weights are those of the merge; storing them took at most {rounding:.2%} of a tensor's update.")
    canaries = _read_canaries(adapter)
    answers = [*canaries, *held_out[: settings.num_answers]]
    rows = [answer["ids"] for answer in answers]
    prompts = [answer["prompt"] for answer in answers]
    scored = score_folder(adapter, rows, "adapter", device, base=plan.base.path)
    before, untrained = scored["library"], scored["without adapter"]
    after = score_folder(merged, rows, "merged", device)
    if plan.mode == "requantizable":
        after |= score_folder(merged, rows, "requantized", device)
    remembered = measure_change([canary["reward"] for canary in canaries], before[: len(canaries)])
    changes = {way: measure_change(before, rewards, prompts) for way, rewards in after.items()}
    chat = ChatTokenizer.load(adapter)  # adapters had no texts before 2026-11-27
    fault = _fault(
        remembered,
        changes if plan.is_trained_model else {},
        settings,
        merge_record,
        overflows=plan.config.model_type in OVERFLOWING,
    )
    parity = {
        "passed": not fault,
        "is_trained_model": plan.is_trained_model,
        "merge": merge_record,
        "worst_rounding": rounding,
        "spread": standard_deviation(before),
        "num_answers": len(rows),
        "canaries_against_training": asdict(remembered),
        "changes": {way: asdict(change) for way, change in changes.items()},
        "without_adapter": asdict(measure_change(before, untrained, prompts)),
        "allowed": asdict(settings),
        "answers": [
            {
                "text": answer.get("text") or chat.decoded(answer["ids"]),
                "ids": answer["ids"],
                "prompt": answer["prompt"],
                "reward": reward,
                "merged": merged_reward,
                "without_adapter": bare,
            }
            for answer, reward, merged_reward, bare in zip(
                answers, before, after["library"], untrained, strict=True
            )
        ],
    }
    write_atomically(merged / "parity.json", json.dumps(parity, indent=1, ensure_ascii=False))
    _show_changes(parity)
    if fault:
        raise MergeError(fault)
    if not plan.is_trained_model:
        change = changes[REQUANTIZED if plan.mode == "requantizable" else "library"]
        say(
            f"This is another model than the trained one: its rewards{' in 4 bit' * (plan.mode == 'requantizable')} "
            f"differ by {change.mean:.1%} of the spread on average, and {change.pair_flips} of {change.num_pairs} "
            "pairs are decided otherwise. Evaluate it before you use it (lora-rm eval)."
        )
    return parity


def _read_canaries(adapter: Path) -> list[dict[str, Any]]:
    """Answers in an adapter's record with the rewards that it gave them.

    Raises:
        MergeError: If there are none.
    """
    canaries: list[dict[str, Any]] | None = read_record(adapter).get("canaries")
    if not canaries:
        raise MergeError(
            f"{adapter}: its lora_rm.json holds no canaries to compare rewards with. Train it with `lora-rm train`, which saves "
            "some, or merge it without a proof: lora_rm.merge.merge in Python."
        )
    check_shape(adapter / RECORD, canaries, CANARIES, "canaries")
    return canaries


def _show_changes(parity: Mapping[str, Any]) -> None:
    """Prints what a merge did to rewards, by way of scoring."""
    show_table(
        f"Change of {parity['num_answers']} rewards by the merge, in shares of their spread ({parity['spread']:.3f})",
        ["scored by", "mean", "largest", "pairs flipped", "any two answers", "tau"],
        [
            [
                way,
                *change_cells(change),
                f"{change['order_flips']} of {change['num_orders']}",
                f"{change['kendall_tau']:.4f}",
            ]
            for way, change in parity["changes"].items()
        ],
    )


def _fault(
    remembered: Change,
    changes: dict[str, Change],
    settings: VerifySettings,
    merge_record: dict[str, Any],
    *,
    overflows: bool,
) -> str:
    """What is wrong with the rewards, or nothing; `overflows` says that float16 is no remedy for this family."""
    if remembered.largest > settings.max_change:
        return (
            f"The adapter's canaries moved by {remembered.largest:.2%} of the spread since training "
            f"(allowed: {settings.max_change:.2%}). Adapter or base on the disk are not what was trained."
        )
    for way, change in changes.items():
        # written so that NaN fails too
        if not (change.largest <= settings.max_change and change.mean <= settings.max_mean_change):
            return (
                f"Merging changed rewards by {change.mean:.2%} of their spread on average and {change.largest:.2%} at "
                f"most ({way}; base: {merge_record['base_weights']}, stored as {merge_record['dtype']}; allowed: "
                f"{settings.max_mean_change:.2%} and {settings.max_change:.2%}). {_remedy(merge_record['dtype'], change, settings, overflows)}"
            )
    return ""


def _remedy(dtype: str, change: Change, settings: VerifySettings, overflows: bool) -> str:
    finer = "float16" if dtype.startswith("bfloat16") and not overflows else "float32"
    again = "" if dtype == "float32" else f"Merge again with --merge.dtype {finer} --merge.overwrite True"
    if not math.isfinite(change.largest):
        return f"{again}." if again else "No setting mends that: train again."
    largest = max(settings.max_change, math.ceil(change.largest * 100) / 100)
    mean = max(settings.max_mean_change, math.ceil(change.mean * 1000) / 1000)
    more = f"--verify.max-change {largest:g} --verify.max-mean-change {mean:g} --merge.overwrite True"
    if again:
        return f"{again}, or allow more: {more}."
    return f"If that is little, for few answers, or answers alike, make a small spread, allow more: {more}."


def score_folder(
    folder: Path, rows: Sequence[Sequence[int]], kind: str, device: str = "auto", *, base: Path | None = None
) -> dict[str, list[float]]:
    """Rewards of token-id lists by a folder's model, opened from the disk by a new interpreter.

    Args:
        folder: Of an adapter or a merged model.
        rows: Whole conversations.
        kind: `adapter`, which also scores the trained head on the base without adapter; `merged`, which also
            scores through plain transformers; or `requantized`, which loads a merged model in NF4.
        device: As in `model.device`.
        base: Folder of the adapter's base.

    Raises:
        MergeError: If the process fails; with what it said.
    """
    request = {
        "package": PACKAGE,
        "folder": str(folder.resolve()),
        "rows": list(rows),
        "kind": kind,
        "base": None if base is None else str(base.resolve()),
    }
    return score_in_fresh_process(f"{len(rows)} answers by {folder}", PROGRAM, request, device)


PACKAGE = str(Path(__file__).parents[1])
"""Where a fresh process finds this very library, wherever it works."""

PROGRAM = """\
import json, sys
request = json.load(open(sys.argv[1], encoding="utf-8"))
sys.path.insert(0, request.pop("package"))
from pathlib import Path
from lora_rm.verify import score_rows
json.dump(score_rows(Path(request.pop("folder")), **request), open(sys.argv[2], "w"))
"""
"""Scores token ids by every way that applies to a folder."""


def score_in_fresh_process(what: str, program: str, request: dict[str, Any], device: str = "auto") -> Any:
    """Runs a program that opens a model from the disk; returns the JSON that it wrote.

    Args:
        what: Names the model and its runtime, for messages.
        program: Python; reads the request from the file `sys.argv[1]`, and writes its answer into `sys.argv[2]`.
        request: To be written as JSON.
        device: As in `model.device`.

    Raises:
        MergeError: If it fails, or weights are drawn anew; with what it said.
    """
    say(f"Scoring in a fresh process: {what} ...")
    with tempfile.TemporaryDirectory() as scratch:
        file, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
        file.write_text(json.dumps(request), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", program, str(file), str(answer)],
            stderr=subprocess.PIPE,  # standard output stays: it shows the progress
            text=True,
            check=False,
            cwd=scratch,  # Python files that lie where the command is called are not run
            env={**os.environ, "HF_HUB_OFFLINE": "1", **_only(device)},
        )
        if done.returncode:
            raise MergeError(f"{what}: cannot be opened and scored in a fresh process: {done.stderr[-1500:]}")
        if "newly initialized" in done.stderr:
            raise MergeError(f"{what}: new weights were drawn when it was opened: {done.stderr[-1500:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _only(device: str) -> dict[str, str]:
    """The environment in which a device is the only GPU."""
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    if not device.startswith("cuda:"):
        return {}
    number = device.removeprefix("cuda:")
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": known.split(",")[int(number)] if known else number}


def score_rows(
    folder: Path, rows: list[list[int]], kind: str, base: str | None = None
) -> dict[str, list[float]]:
    """Every way of scoring that applies, in float32; arguments as in `score_folder`."""
    if kind == "adapter":
        model = RewardModel.load_adapter(folder, compute_dtype="float32", base=base)
    elif kind == "requantized":
        settings = ModelSettings(quantization="nf4", compute_dtype="float32")
        model = RewardModel.load(BaseModel(name=str(folder), path=folder), settings=settings)
    else:
        model = RewardModel.load_merged(folder, device=_device_for(folder), compute_dtype="float32")
    model.choose_batching()
    trees = [TokenTree.of_conversation(ids) for ids in rows]
    ways = {"library": [rewards[0] for rewards in model.score(trees)]}
    if kind == "adapter":
        with model.model.disable_adapter():  # not the head: `rewards` reads the trained one itself
            ways["without adapter"] = [rewards[0] for rewards in model.score(trees)]
        return ways
    if kind == "requantized":
        return {REQUANTIZED: ways["library"]}
    del model
    give_back_rotary()
    return ways | _score_plainly(folder, rows)


def _device_for(folder: Path) -> str:
    """The GPU if a merged model fits it as it is stored, with a quarter for everything else; else the CPU."""
    # embeddings, experts and norms are held in float32
    size = sum(
        tensor.num_bytes * (1 if len(tensor.shape) == 2 and "embed" not in tensor.name else 2)
        for tensor in tensors_by_name(folder.glob("*.safetensors")).values()
    )
    is_small = torch.cuda.is_available() and 1.25 * size < torch.cuda.mem_get_info()[0]
    return "auto" if is_small else "cpu"


def _score_plainly(folder: Path, rows: list[list[int]]) -> dict[str, list[float]]:
    """By plain transformers, padded and alone."""
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as scratch:
        plain = open_plain(folder, scratch)
        places = set(getattr(plain, "hf_device_map", {}).values())
        device = plain.device if len(places) < 2 else "cpu"  # accelerate moves what each layer needs
        pad = plain.config.get_text_config().pad_token_id

        @torch.inference_mode()
        def padded(group: list[list[int]], left: float = 0.0) -> list[float]:
            ids, mask = (torch.tensor(part, device=device) for part in pad_rows(group, pad, left=left))
            logits = plain(input_ids=ids, attention_mask=mask).logits
            assert logits.shape[1] == 1
            return logits[:, 0].tolist()

        groups: list[list[list[int]]] = [[]]
        for ids in rows:  # on a 24 GB card 8 x 2048 tokens of an 8B model in float32 would not fit
            if groups[-1] and (len(groups[-1]) + 1) * max(map(len, [*groups[-1], ids])) > 4096:
                groups.append([])
            groups[-1].append(ids)
        ways = {"transformers, padded right": [reward for group in groups for reward in padded(group)]}
        if not has_absolute_positions(plain.config):
            ways["transformers, padded left"] = [reward for group in groups for reward in padded(group, 1.0)]
        ways["transformers, one by one"] = [padded([ids])[0] for ids in rows]
        return ways


def open_plain(folder: Path, scratch: str, max_memory: dict[Any, Any] | None = None) -> Any:
    """A merged model in plain transformers, in float32: on the GPU, in memory, and the rest in a folder.

    Args:
        folder: Of the model.
        scratch: For the rest; an 8B model has 32 GB in float32.
        max_memory: Of every device, as accelerate takes it; None: what there is.
    """
    return AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        device_map="auto",
        max_memory=max_memory,
        offload_folder=scratch,
    ).eval()


def standard_deviation(values: Sequence[float]) -> float:
    """Of a population."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
