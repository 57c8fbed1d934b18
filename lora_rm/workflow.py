"""What the commands and the recipes do, each step one function."""

import gc
import importlib.util
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lora_rm import processes
from lora_rm.checkpoint import CONTENTS, RunFolder, newest_checkpoint
from lora_rm.combine import combine
from lora_rm.config import LossSettings, Settings, with_whole_paths
from lora_rm.console import say, show_facts
from lora_rm.data.split import Data, check_sources, load_data, read_side
from lora_rm.data.tokens import read_template
from lora_rm.errors import ConfigError, DataError, LoraRmError, MergeError, ModelError, storing
from lora_rm.evaluate import Evaluation, bag_of_words_baseline, evaluate
from lora_rm.export.gguf import export_gguf
from lora_rm.export.huggingface import check_login, export_huggingface, push
from lora_rm.export.onnx import export_onnx
from lora_rm.export.proof import public_record, read_parity
from lora_rm.export.torch_export import export_torch_export
from lora_rm.export.vllm import export_vllm
from lora_rm.export.vllm_lora import export_vllm_lora
from lora_rm.merge import check_mergeable, is_unverified, merge
from lora_rm.model.adapter import WEIGHTS
from lora_rm.model.base import (
    BaseModel,
    cache_folder,
    check_shape,
    file_sha256,
    find_config,
    is_hub_id,
    read_json,
)
from lora_rm.model.checkpointing import Mode
from lora_rm.model.classifier import check_length, longest_conversation, read_config
from lora_rm.model.quantization import code_hashes, dtype_name
from lora_rm.model.record import MERGE_RECORD, RECORD, check_files, move_base, read_record
from lora_rm.model.reward_model import RewardModel
from lora_rm.plan import Plan, fit
from lora_rm.score import Scorer, load_reward_model
from lora_rm.train import train
from lora_rm.unfinished import write_atomically
from lora_rm.verify import verify

NUM_CANARIES = 32
"""Held-out answers kept with the adapter, with their rewards: what every later form of the model is held to."""


def train_run(settings: Settings, *, resume: bool = False, allow: bool = False) -> RunFolder:
    """Trains and evaluates; leaves a run folder with an adapter.

    Args:
        settings: Of the run.
        resume: Go on from the newest whole checkpoint.
        allow: As in `RunFolder.create`.

    Raises:
        LoraRmError: If a setting, the data or the model cannot be used, or training was stopped.
    """
    processes.join(settings.model.device)
    if resume:
        RunFolder(Path(settings.output_dir)).settings()  # raises if there is no run
    checkpoints = RunFolder(Path(settings.output_dir)).checkpoints
    goes_on = (
        resume and settings.adapter.start_from is not None and newest_checkpoint(checkpoints)[0] is not None
    )
    check_start(_goes_on(settings) if goes_on else settings)
    settings, planned = fit(settings)
    run = RunFolder.create(settings, resume, allow=allow)
    settings = _goes_on(settings) if goes_on else settings
    model = open_model(settings, planned)
    data = read_data(settings, model, run)
    if resume and processes.gather(_is_finished(run))[0]:
        say(f"{run.path}: is already finished. Next: lora-rm merge {run.path}")
        return run
    evaluate_before(model, data, settings, run)
    train(model, data, settings, run, resume=resume)
    evaluate_after(model, data, settings, run)
    save_adapter(model, data, settings, run)
    processes.wait()  # torchrun ends all if one that left early aborts on its way out, while the first one still writes
    say(f"The adapter lies in {run.adapter}. Next: lora-rm merge {run.path}")
    return run


def _goes_on(settings: Settings) -> Settings:
    """Settings of a run that has a checkpoint, which holds what an adapter to start from gave: that may be gone."""
    return replace(settings, adapter=replace(settings.adapter, start_from=None))


def _is_finished(run: RunFolder) -> bool:
    """Whether all that training leaves is there, whole."""
    try:
        check_files(run.adapter, read_record(run.adapter))
        return "after" in (run.read_json("eval.json") or {}) and run.read_json("held_out.json") is not None
    except (LoraRmError, OSError):  # to be written anew
        return False


def check_start(settings: Settings) -> None:
    """Looks for what else would be missed only when a base of many gigabytes is fetched and loaded.

    Raises:
        LoraRmError: If a local file of the data or the chat template, the adapter to start from, or the package of a tracker
            is missing.
    """
    # accelerate would warn and track nothing; the packages are called like the trackers
    missing = [name for name in settings.train.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"train.trackers asks for {' and '.join(missing)}, not installed here. Run `pip install {' '.join(missing)}`, or leave "
            "the setting out."
        )
    check_sources(settings.data)
    _check_not_replaced(settings)
    if settings.adapter.start_from is not None:
        start = run_adapter(Path(settings.adapter.start_from))
        read_record(start)
        if settings.data.eval is None:
            say(
                f"What is held out here may have been trained on by {start}: with another seed or data.eval_share, and with other rows a few "
                "at the border, prompts are split otherwise. Give data.eval a file that neither was trained on, or the accuracy may be that of training."
            )
    if settings.data.chat_template not in ("tokenizer", "plain"):
        read_template(settings.data.chat_template)


def open_model(settings: Settings, planned: Plan | None = None) -> RewardModel:
    """Loads the base, adds adapter and head, picks how batches are computed, and says what is trained.

    Args:
        settings: Of the run.
        planned: What `lora_rm.plan.fit` found; decides what `train.checkpointing` auto keeps.

    Raises:
        LoraRmError: If the base or the adapter cannot be used, or the adapter trains what could not be merged.
    """
    say(f"Loading {settings.model.base or 'the base model'} ({settings.model.quantization}) ...")
    model = RewardModel.load(
        settings.model.base,
        settings=settings.model,
        adapter=settings.adapter,
        data=settings.data,
        seed=settings.seed,
        sharded=settings.train.sharding == "full" and processes.count() > 1,
    )
    check_length(model.classifier.config, settings.data.max_length, "A conversation of data.max_length")
    positions = getattr(model.classifier.config.get_text_config(), "max_position_embeddings", None)
    if positions and settings.data.max_length > positions:
        say(
            f"data.max_length is {settings.data.max_length}, and the base was made for {positions} tokens: what it makes of longer "
            "conversations is not known, and servers may refuse them."
        )
    check_mergeable(model)
    wanted = settings.train.checkpointing
    # unplanned: the way that is nearly as fast as keeping all where the device has enough to do, for half of the memory
    mode: Mode = "selective" if wanted == "auto" else wanted
    model.set_checkpointing(planned.layer_modes if planned else [mode] * len(model.layers))
    model.choose_batching(settings.train.batching)
    if len(set(processes.gather(model.batching))) > 1:
        raise ModelError(
            f"The processes compute batches in different ways ({model.batching} here). Use machines of one kind, or set "
            "train.batching to one that all can do."
        )
    experts = [
        p for n, p in model.named_parameters() if ".experts." in n and p.is_floating_point() and p.dim() == 3
    ]
    if experts and settings.model.quantization != "none":
        size = sum(p.nbytes for p in experts) / 2**30
        say(
            f"{size:.1f} GiB of experts stay in {dtype_name(experts[0].dtype)}: bitsandbytes quantises linear layers only."
        )
    count = model.trainable()
    say(
        f"{count.total:,} parameters, of which trained: {count.adapter:,} in the adapter, {count.head:,} in the head. "
        f"Batches {model.batching}, products in {dtype_name(model.compute_dtype)} on {model.device}."
    )
    return model


def _check_not_replaced(settings: Settings) -> None:
    """Raises if what the run is made from lies in what it removes."""
    folder, whole = Path(settings.output_dir).resolve(), with_whole_paths(settings)
    sources = {
        "model.base": whole.model.base,
        "adapter.start_from": whole.adapter.start_from,
        "data.train": whole.data.train,
        "data.eval": whole.data.eval,
        "data.chat_template": whole.data.chat_template,
    }
    for key, value in sources.items():
        if not value:
            continue
        try:
            inside = Path(value).resolve().relative_to(folder).parts
        except (OSError, ValueError, RuntimeError):  # it lies elsewhere, or is the name of no file
            continue
        if not inside or inside[0] in CONTENTS:
            raise ConfigError(
                f"{key} is {value}, which lies in output_dir, and a new run empties that first. Choose another output_dir."
            )


def read_data(settings: Settings, model: RewardModel, run: RunFolder) -> Data:
    """Reads both sides of the data and writes what became of every row to `data.json`.

    A run that is overwritten is gone thereafter.

    Raises:
        ConfigError: If the run was begun with other data or another base.
    """
    data = load_data(settings.data, model.chat, seed=settings.seed, cache=cache_folder())
    model.check_ids([*data.train.trees, *data.eval.trees])
    if next(_answers(model, data), None) is None:
        raise DataError(
            "Every held-out answer holds the name of a special token, so no merged model could be compared by texts. "
            "Give a data.eval without such names, or set data.allow_special_tokens True."
        )
    inputs = {
        "data.train": data.train.sha256,
        "data.eval": data.eval.sha256,
        **{f"model.base {name}": found for name, found in model.base.file_hashes().items()},
    }
    if settings.adapter.start_from is not None:
        inputs["adapter.start_from"] = file_sha256(run_adapter(Path(settings.adapter.start_from)) / WEIGHTS)
    run.begin()
    known = run.read_json("inputs.json") or inputs
    if settings.adapter.start_from is None:  # `_goes_on`
        known.pop("adapter.start_from", None)
    changed = sorted(name for name in known.keys() | inputs.keys() if known.get(name) != inputs.get(name))
    if changed:
        raise ConfigError(
            f"{run.path}: was begun with other inputs than are there now ({', '.join(changed)}). Put them back as they were, "
            "or begin a new run in another output_dir."
        )
    run.write_json("inputs.json", inputs)
    run.write_json("data.json", data.report)
    data.show()
    _tell_unused_loss(settings, data)
    return data


def _tell_unused_loss(settings: Settings, data: Data) -> None:
    """Says which settings of the loss are of pairs, where there are other rows."""
    loss, default = settings.loss, LossSettings()
    changed = [
        f"loss.{name} {getattr(loss, name)}"
        for name in ("pair", "use_margin", "label_smoothing")
        if getattr(loss, name) != getattr(default, name)
    ]
    kinds = [preference.kind for preference in data.train.preferences]
    others = [f"{kinds.count(kind)} {kind}s" for kind in ("ranking", "rating") if kind in kinds]
    if changed and others:
        say(
            f"{' and '.join(changed)}: of pairs alone. The {' and '.join(others)} are trained on without (rankings by Plackett-Luce, "
            "ratings by squared error)."
        )


def evaluate_before(model: RewardModel, data: Data, settings: Settings, run: RunFolder) -> dict[str, Any]:
    """Evaluates the untrained model, once a run, beside what shortcuts reach."""
    known = run.read_json("eval.json")
    if known:
        return known["before"]
    before = _evaluate("before training", model, data, settings)
    if processes.IS_FIRST:
        words = bag_of_words_baseline(data.train.preferences, data.eval.preferences)
        values = {"before": before.to_json(), "bag_of_words_baseline": words if words == words else None}
        run.write_json("eval.json", values)
    return before.to_json()


def evaluate_after(model: RewardModel, data: Data, settings: Settings, run: RunFolder) -> Evaluation:
    """Evaluates the trained model on the held-out side and adds it to `eval.json`."""
    after = _evaluate("after training", model, data, settings)
    run.write_json("eval.json", {**(run.read_json("eval.json") or {}), "after": after.to_json()})
    return after


def save_adapter(model: RewardModel, data: Data, settings: Settings, run: RunFolder) -> None:
    """Writes the adapter with its canaries, and the held-out answers that `verify` scores beside them.

    Every process calls it, for a sharded base computes with all of them; the first one writes.
    """
    answers = list(islice(_answers(model, data), NUM_CANARIES + max(settings.verify.num_answers, 64)))
    canaries = answers[:NUM_CANARIES]
    model.eval()
    with model.precise():
        rewards = Scorer(model).score_ids([canary["ids"] for canary in canaries])
    record = model.describe(code_hashes(model.classifier))
    record["canaries"] = [
        {**canary, "reward": reward} for canary, reward in zip(canaries, rewards, strict=True)
    ]
    record["settings"] = run.config.read_text(encoding="utf-8")
    record["length_policy"] = {"max_length": settings.data.max_length, "policy": settings.data.length_policy}
    if processes.IS_FIRST:
        with storing(run.adapter):
            model.save(run.adapter, record)
    run.write_json("held_out.json", answers[NUM_CANARIES:])


def _answers(model: RewardModel, data: Data) -> Iterator[dict[str, Any]]:
    """Held-out answers that other programs can be given as texts, with the number of their prompt."""
    for number, (preference, tree) in enumerate(zip(data.eval.preferences, data.eval.trees, strict=True)):
        for answer, ids in zip(preference.answers, tree.conversations(), strict=True):
            text = model.chat.plain_text((preference.prompt + answer, preference.tools), ids)
            if text is not None:
                yield {"ids": ids, "prompt": number, "text": text}


def combine_runs(
    paths: Sequence[Path], weights: Sequence[float], folder: Path, *, base: str | None = None
) -> Path:
    """Combines the adapters of several runs (or adapter folders) with weights; `merge_run` takes the result.

    Args:
        paths: Of the runs.
        weights: One for each.
        folder: To make.
        base: Where their base lies now, if not where it lay.

    Raises:
        MergeError: If they cannot be combined.
        ModelError: If `base` is another one than theirs.
    """
    adapters = [run_adapter(path) for path in paths]
    if base is not None:
        for adapter in adapters:
            move_base(adapter, base)
    combine(adapters, weights, folder)
    model = RewardModel.load_adapter(folder, compute_dtype="float32")
    model.choose_batching()
    record = read_record(folder)
    rewards = Scorer(model.eval()).score_ids([canary["ids"] for canary in record["canaries"]])
    for canary, reward in zip(record["canaries"], rewards, strict=True):
        canary["reward"] = reward
    write_atomically(folder / RECORD, json.dumps(record, indent=1))
    say(f"The combined adapter lies in {folder}.")
    return folder


def run_adapter(path: Path) -> Path:
    """The adapter of a run, or the folder itself.

    Raises:
        ConfigError: If there is no such folder.
    """
    _check_folder(path)
    run = RunFolder.find(path)
    return run.trained() if run else path


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(
            f"{path}: there is no such folder. Check the path; it is looked up from {Path.cwd()}."
        )


def read_held_out(run: RunFolder) -> list[dict[str, Any]]:
    """Held-out answers of a run, as token ids and text with the number of their prompt; none if there is no such file.

    Raises:
        LoraRmError: If the file is damaged.
    """
    answers: list[dict[str, Any]] = run.read_json("held_out.json") or []
    if answers:
        check_shape(run.path / "held_out.json", answers, [{"ids": [int], "prompt": int}])
    return answers


def merge_run(path: Path, settings: Settings, *, out: Path | None = None, base: str | None = None) -> Path:
    """Merges a run's adapter, or the adapter in a folder of its own, and verifies the rewards.

    Args:
        path: Of the run, or of the adapter.
        settings: How it is merged and verified.
        out: Folder to make; None: `RUN/merged`, or beside the adapter.
        base: Where its base lies now, if not where it lay; the adapter's record will say so from then on.

    Returns:
        The run folder, or the merged folder where that is not the run's own: what `export_run` takes.

    Raises:
        ConfigError: If there is no such folder.
        ModelError: If `base` is another one than that of the adapter.
        MergeError: If it cannot be merged, or rewards changed by more than allowed.
    """
    run = RunFolder.find(path)
    adapter = run_adapter(path)
    if run:
        run.lock()
    read_record(adapter)
    held_out = read_held_out(run) if run else []
    if base is not None:
        move_base(adapter, base)
    if out is None:
        out = run.merged if run else Path(f"{path.resolve()}-merged")
    if is_unverified(adapter, out, settings.merge):
        say(f"{out}: was merged by a call that was interrupted while it verified the rewards.")
    else:
        report = merge(adapter, out, settings.merge)
        say(
            f"{report.num_updated} of {report.num_tensors} tensors updated ({report.base_weights} base, {report.dtype})."
        )
    gc.collect()
    torch.cuda.empty_cache()  # what training in this process kept for itself
    parity = verify(adapter, out, settings.verify, held_out=held_out, device=settings.model.device)
    made = out
    if run and out.resolve() == run.merged.resolve():
        run.write_json("parity.json", {key: value for key, value in parity.items() if key != "answers"})
        made = path
    say(f"The merged model lies in {out}. Next: lora-rm export {made} --to huggingface")
    return made


EXPORTS: dict[str, Callable[..., Path]] = {
    "huggingface": export_huggingface,
    "vllm": export_vllm,
    "vllm-lora": export_vllm_lora,
    "gguf": export_gguf,
    "onnx": export_onnx,
    "torch-export": export_torch_export,
}
"""What writes each target. Those that write weights anew take their type, all others the run that their pages tell of."""

WITH_DTYPE = {"gguf": "float16", "onnx": "float32", "torch-export": "float32"}
"""Targets that write weights anew, and the types they write where none is chosen."""


def export_run(
    path: Path,
    *,
    to: str = "huggingface",
    out: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    push_to: str | None = None,
) -> Path:
    """Exports a run's merged model, or a merged folder.

    Args:
        path: Run folder, or a merged folder.
        to: One of `EXPORTS`.
        out: Folder to make; None: `RUN/export/TARGET`.
        dtype: How weights are stored, where the target lets one choose; None: its default.
        overwrite: Replace an earlier export.
        push_to: Hub repository to upload to. An export of this model that is there already is not made anew for it.

    Raises:
        ConfigError: If there is no such folder or target, it does not let one choose the type, a package of its extra is
            missing, or `push_to` is given and nobody is logged in to the hub.
        MergeError: If there is no merged and verified model, or the export gives other rewards.
    """
    if to not in EXPORTS:
        raise ConfigError(f"--to is {to!r}; allowed: {', '.join(EXPORTS)}.")
    _check_folder(path)
    run = RunFolder.find(path)
    merged = run.merged if run else path
    if run:
        run.lock()
    if not (merged / "config.json").is_file():
        raise MergeError(f"{path}: holds no merged model. Run `lora-rm merge {path}` first.")
    if out is None:
        out = run.exports / to if run else Path(f"{path.resolve()}-{to}")
    if dtype is not None and to not in WITH_DTYPE:
        raise ConfigError(
            f"--dtype is {dtype!r}, but --to {to} writes weights as the merge stored them. Merge again with "
            "--merge.dtype TYPE --merge.overwrite True."
        )
    if push_to:
        check_login()
    if not (push_to and not overwrite and _is_exported(merged, out, to, dtype)):
        more = {"run": run} if to not in WITH_DTYPE else {} if dtype is None else {"dtype": dtype}
        EXPORTS[to](merged, out, overwrite=overwrite, **more)
    say(f"The export lies in {out}.")
    if push_to:
        say(f"Uploaded to {push(out, push_to)}.")
    return out


def _is_exported(merged: Path, out: Path, to: str, dtype: str | None) -> bool:
    """Whether `out` is an export of this merged model, which has its name only when it is whole and proven."""
    if not (out / "parity.json").is_file():
        return False
    made = read_json(out / "parity.json")
    is_same = made.get("passed") is True and made.get("merge") == public_record(read_parity(merged)["merge"])
    is_stored_so = to not in WITH_DTYPE or str(made.get("dtype")).lower() == (dtype or WITH_DTYPE[to]).lower()
    return is_same and made.get("target") == to and is_stored_so


def trained_length(path: Path) -> dict[str, Any]:
    """What a saved model's record tells of `data.max_length` and `data.length_policy` in its training.

    Of a model without record, from the hub or of another program, no conversation is left out that it takes.

    Args:
        path: As in `load_reward_model`; of a run nothing is told, for its own settings do.

    Raises:
        ModelError: If a file is damaged, or the hub does not give it.
    """
    if RunFolder.find(path):
        return {}
    folder = path.parent if path.is_file() else path  # a .gguf lies beside its record
    if is_hub_id(str(path)):
        folder = find_config(str(path), tokenizer=True).path
    for file in (folder / RECORD, folder / MERGE_RECORD, folder / "parity.json"):
        record: Any = read_json(file) if file.is_file() else {}
        if file.name == "parity.json":  # a .gguf has no other
            record = record.get("merge")
        policy = record.get("length_policy") if isinstance(record, dict) else None
        if policy is not None:
            check_shape(file, policy, {"max_length": int, "policy": str}, "length_policy")
            return {"max_length": policy["max_length"], "length_policy": policy["policy"]}
    if not (folder / "config.json").is_file():
        return {}
    longest = longest_conversation(read_config(BaseModel(name=str(path), path=folder)))
    return {"max_length": longest[0] if longest else 2**31 - 1}  # the largest that is allowed


def evaluate_model(path: Path, settings: Settings, file: Path | None = None) -> Evaluation:
    """Evaluates any saved model on `data.eval`, or on the held-out side of its own run.

    Args:
        path: As in `load_reward_model`.
        settings: Whose `data` says what to evaluate on.
        file: Write the numbers there too, as JSON.

    Raises:
        ConfigError: If there is nothing to evaluate on.
        ModelError: If there is no such model.
    """
    run = RunFolder.find(path) if settings.data.eval is None else None
    if settings.data.eval is None and run is None:
        raise ConfigError(
            f"data.eval is not set, and {path} is no run folder, whose held-out side would be taken. Give the preferences to "
            "evaluate on: --data.eval FILE, or check the path."
        )
    scorer = load_reward_model(path, device=settings.model.device, compute_dtype=settings.model.compute_dtype)
    chat = scorer.model.chat
    if run:
        data = load_data(settings.data, chat, seed=settings.seed, cache=cache_folder())
        if data.train.sha256 != (run.read_json("inputs.json") or {}).get("data.train"):
            raise ConfigError(
                f"{settings.data.train}: does not give the training side that {path} was trained on, so what is held out now "
                "may have been trained on then. Put the file and the data settings back, or give --data.eval FILE."
            )
        side = data.eval
    else:
        side = read_side(settings.data, chat, seed=settings.seed, cache=cache_folder())
    found = evaluate(scorer.model, side.trees, settings.loss, settings.train.row)
    _show("evaluation", found)
    if file is not None:
        with storing(file):
            file.write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    return found


def summarize(run: RunFolder, started: float) -> dict[str, Any]:
    """Writes `summary.json` out of the run's files and shows it as the last table.

    Args:
        run: With evaluation, merge and export done.
        started: `time.monotonic()` at the start of the job.
    """
    evaluation, parity, data = (
        run.read_json("eval.json"),
        run.read_json("parity.json"),
        run.read_json("data.json"),
    )
    before, after = evaluation["before"], evaluation["after"]
    change = parity["changes"]["library"]
    summary = {
        "accuracy_before": before["pairs"]["accuracy"],
        "accuracy_after": after["pairs"]["accuracy"],
        "accuracy_interval": after["interval"],
        "length_baseline": after["length_baseline"],
        "bag_of_words_baseline": evaluation["bag_of_words_baseline"],
        "rating_correlation": after.get("rating_correlation"),  # older runs have none
        "num_pairs_train": data["train"]["kept"],
        "num_pairs_eval": data["eval"]["kept"],
        "merge_mean_change": change["mean"],
        "merge_max_change": change["largest"],
        "pair_flips": change["pair_flips"],
        "num_pairs_compared": change["num_pairs"],
        "seconds": round(time.monotonic() - started, 1),
    }
    run.write_json("summary.json", summary)
    low, high = after["interval"]
    words = evaluation["bag_of_words_baseline"]
    export = run.exports / "huggingface"
    found: dict[str, object] = {}
    if after["pairs"]["num_pairs"]:
        found |= {
            "held-out accuracy": f"{_percent(before['pairs']['accuracy'])} -> {_percent(after['pairs']['accuracy'])}  "
            f"(95 % interval {_percent(low)} to {_percent(high)}, {after['pairs']['num_pairs']} pairs)",
            "longer answer wins": _percent(after["length_baseline"]),
            "bag of words": "-" if words is None else _percent(words),
        }
    correlations = [when.get("rating_correlation") for when in (before, after)]
    if correlations[1] is not None:
        found["correlation with the ratings"] = " -> ".join(
            "-" if r is None else f"{r:.3f}" for r in correlations
        )
    show_facts(
        "Reward model",
        {
            **found,
            "rewards before merge": f"{parity['num_answers']} answers, spread {parity['spread']:.3f}",
            "rewards after merge": f"changed by {change['mean']:.3%} of the spread on average, {change['largest']:.3%} at "
            f"most; {change['pair_flips']} of {change['num_pairs']} pairs flipped",
            "adapter": run.adapter,
            "merged model": run.merged,
            "export": export,
            "time": f"{summary['seconds']:.0f} s",
            "next": f"{_command()} score {export} conversations.jsonl",
        },
    )
    return summary


def _command() -> str:
    """How this shell calls `lora-rm`: by its path where the environment is not activated."""
    beside = Path(sys.executable).with_name("lora-rm")
    return "lora-rm" if shutil.which("lora-rm") or not beside.is_file() else str(beside)


def _evaluate(when: str, model: RewardModel, data: Data, settings: Settings) -> Evaluation:
    say(f"Evaluating {when} on {len(data.eval.trees)} held-out preferences ...")
    found = evaluate(model, data.eval.trees, settings.loss, settings.train.row)
    _show(when, found)
    return found


def _show(title: str, found: Evaluation) -> None:
    low, high = found.interval
    facts: dict[str, object] = {"preferences": found.num_preferences, "loss": f"{found.loss:.4f}"}
    if found.pairs.num_pairs:
        facts |= {
            "accuracy": f"{_percent(found.pairs.accuracy)} of {found.pairs.num_pairs} pairs [{_percent(low)}, {_percent(high)}]",
            "ties": found.pairs.num_ties,
            "longer answer wins": _percent(found.length_baseline),
            "calibration error": f"{found.calibration_error:.3f}",
        }
    if found.best.num_preferences:
        facts["best answer on top"] = (
            f"{_percent(found.best.accuracy)} of {found.best.num_preferences} rankings"
        )
    if not math.isnan(found.rating_correlation):
        facts["correlation with the ratings"] = f"{found.rating_correlation:.3f}"
    facts["reward"] = f"{found.reward_mean:.3f} ± {found.reward_spread:.3f}"
    for name, count in found.subsets.items():
        facts[f"  {name}"] = f"{_percent(count.accuracy)} of {count.num_pairs}"
    show_facts(title, facts)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
