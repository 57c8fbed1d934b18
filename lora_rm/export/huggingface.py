"""A folder that `AutoModelForSequenceClassification` and `pipeline("text-classification")` open as it is."""

from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lora_rm.checkpoint import RunFolder
from lora_rm.errors import ConfigError, MergeError, first_line
from lora_rm.export.proof import (
    NUM_PADDED,
    TOLERANCE,
    copy_public,
    export_folder,
    hub_id,
    prove,
    write_parity,
)
from lora_rm.verify import change_cells, measure_change, score_in_fresh_process

ANOTHER_MODEL = (
    "**This is not the model that was trained**: the adapter was merged into weights that it had not seen in training, "
    "which changes rewards as the table below tells."
)
"""Sentence of the card of a merge whose base is not that of training."""


def export_huggingface(
    merged: Path,
    out: Path,
    *,
    run: RunFolder | None = None,
    overwrite: bool = False,
    target: str = "huggingface",
    usage: str = "",
) -> Path:
    """Copies a merged and verified model, adds a model card, and checks it through the pipeline.

    Args:
        merged: Folder with `parity.json`, as `verify` leaves it.
        out: Folder to make.
        run: Whose evaluation and settings the card tells.
        overwrite: Replace an earlier export.
        target: As the command names it.
        usage: What the card says beside the model's own.

    Raises:
        MergeError: If the model was not verified, `out` exists, or the pipeline gives other rewards.
    """
    with export_folder(merged, out, target, overwrite=overwrite) as (unfinished, parity):
        folder = unfinished.path
        for file in sorted(merged.iterdir()):
            if file.name == "parity.json":  # the export's own is written below
                continue
            unfinished.once(file.name, partial(_link_or_copy, file))
        proved = check_pipeline(folder, parity, target=target, out=out, run=run)
        write_parity(folder, proved)
        card = model_card(parity | {"changes": parity["changes"] | proved["changes"]}, run, out.name)
        (folder / "README.md").write_text(card + usage, encoding="utf-8")
    return out


def check_pipeline(
    folder: Path,
    parity: dict[str, Any],
    *,
    target: str = "huggingface",
    out: Path | None = None,
    run: RunFolder | None = None,
) -> dict[str, Any]:
    """Scores texts through the transformers pipeline in a fresh process, in float32 and as it opens by itself.

    Args:
        folder: To open.
        parity: Of the merged model (`read_parity`).
        target: As the command names it.
        out: What messages call the folder; None: as it is.
        run: Whose model it is, for messages.

    Returns:
        What the export's `parity.json` is to hold.

    Raises:
        MergeError: If a reward differs by more than allowed, or weights are drawn anew.
    """
    stored = parity["merge"]["dtype"].removesuffix("_nearest")  # that is how it was rounded
    request = {
        "folder": str(folder.resolve()),
        "texts": [answer["text"] for answer in parity["answers"][:NUM_PADDED]],
        # of 16 bits only some: float16 products take a CPU seven times as long as float32
        "stored": {} if stored == "float32" else {stored: NUM_PADDED // 2},
    }
    out = out or folder
    found = score_in_fresh_process(f"{out} and the transformers pipeline", PIPELINE, request)
    alone, together = found["float32"], found["float32, padded"]
    return prove(
        out,
        parity,
        {f"pipeline in {way}": rewards for way, rewards in found.items()},
        target=target,
        runtime="transformers pipeline",
        dtype=stored,
        noise=measure_change(alone, together, spread=parity["spread"] or 1.0).largest,
        rounded=[f"pipeline in {stored}"] if stored != "float32" else [],
        # an adapter that learnt little does less than 16-bit products round; float32 shows that it is there
        rounding=TOLERANCE,
        remedy=f"Store it in float32: lora-rm merge {run.path if run else 'RUN'} --merge.dtype float32 --merge.overwrite True",
    )


PIPELINE = """\
import gc, json, sys, torch
from transformers import pipeline
request, found = json.load(open(sys.argv[1], encoding="utf-8")), {}
for dtype, count in {"float32": None, **request["stored"]}.items():
    reward = None  # the one before
    gc.collect()
    torch.cuda.empty_cache()
    # on the GPU, in memory, and what fits neither in a folder that goes with this program
    more = {"device_map": "auto", "model_kwargs": {"offload_folder": "offloaded"}}
    reward = pipeline("text-classification", model=request["folder"], dtype=dtype, **more)
    found[dtype] = [one["score"] for one in reward(request["texts"][:count])]
    if dtype == "float32":
        found["float32, padded"] = [one["score"] for one in reward(request["texts"], batch_size=8)]
json.dump(found, open(sys.argv[2], "w"))
"""
"""A user's own call, for the texts of `parity.json`."""


def check_login() -> None:
    """Asks the hub who is logged in, before an export is written that could not be uploaded.

    Raises:
        ConfigError: If nobody is, or the hub cannot be asked.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # of the hub's client, of Python, and of an HTTP library
        raise ConfigError(
            f"--push uploads to the hub, which does not tell who you are ({first_line(error)}). Log in with `hf auth login`, "
            "see to the network, or leave --push out."
        ) from None


OTHER_WEIGHTS = (
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "adapter_model.*", "adapter_config.json",
)  # fmt: skip
"""Files that transformers would open instead of those uploaded, or on top of them, if an earlier upload has left them."""


def push(folder: Path, repository: str) -> str:
    """Uploads an export to the hub, into a private repository where there is none yet; returns its address.

    Weights for transformers take the place of those that are there, which stay in the repository's history.

    Raises:
        MergeError: If the hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        replaced = None
        if any(folder.glob("model*.safetensors")):
            there = [name for name in api.list_repo_files(repository) if "/" not in name]
            replaced = [name for name in there if any(fnmatch(name, kind) for kind in OTHER_WEIGHTS)]
        address = api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=[".*"], delete_patterns=replaced
        )
        return str(address)
    except Exception as error:  # of the hub's client, of Python, and of an HTTP library
        raise MergeError(
            f"{repository}: the hub refused the upload ({error}). Check `hf auth login`."
        ) from None


def model_card(parity: dict[str, Any], run: RunFolder | None, name: str = "reward-model") -> str:
    """The README of an export; every number in it is read from the run's files.

    Args:
        parity: Rewards before and after, as `verify` wrote them.
        run: Whose evaluation the card tells.
        name: Of the model, in the hub's table of evaluation results.
    """
    merge = parity["merge"]
    # a merge into another base was not evaluated: the run's numbers are those of the adapter
    is_evaluated = parity.get("is_trained_model", True)
    evaluation = run.read_json("eval.json") if run and is_evaluated else None
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "lora_rm"],
    }
    base = hub_id(merge["base"])
    if base is not None:
        header |= {"base_model": base, "base_model_relation": "finetune"}
    header |= inherited_license(merge["base"], run.settings().model.revision if run else None)
    before, after = (_of_pairs(evaluation, when) for when in ("before", "after"))
    if run is not None and after:
        header["model-index"] = evaluation_results(run, after, name)
    lines = ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", "", "# Reward model", ""]
    # the pipeline's tokenizer adds a BOS; one that the template wrote would be the second
    bos = ["text = text.removeprefix(reward.tokenizer.bos_token)"] if merge["adds_bos"] else []
    lines += [
        f"Trained with LoRA on `{base or Path(merge['base']).name}`, "
        f"merged into its {merge['base_weights']} weights and stored as {merge['dtype']}. One logit: the raw reward.",
        *([] if is_evaluated else ["", ANOTHER_MODEL]),
        "",
        "```python",
        "from transformers import pipeline",
        'reward = pipeline("text-classification", model=".")  # this folder: its path, or its name on the hub',
        '# on a CPU dtype="float32" is faster, and closer',
        'messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]',
        "text = reward.tokenizer.apply_chat_template(messages, tokenize=False)  # ends with the answer",
        *bos,
        'print(reward(text)[0]["score"])',
        "```",
        "",
    ]
    if before and after:
        low, high = after["interval"]
        lines += [
            "| held-out pairs | before | after | 95 % interval | longer answer |",
            "|---|---|---|---|---|",
            f"| {after['pairs']['num_pairs']} | {before['pairs']['accuracy']:.3f} | {after['pairs']['accuracy']:.3f} "
            f"| {low:.3f} to {high:.3f} | {after['length_baseline']:.3f} |",
            "",
        ]
    lines += [
        f"Rewards against the trained adapter, as shares of the spread of {parity['num_answers']} rewards "
        f"({parity['spread']:.3f}); texts and rewards are in `parity.json`:",
        "",
        "| way | answers | mean change | largest | pairs flipped |",
        "|---|---|---|---|---|",
    ]
    for way, change in parity["changes"].items():
        cells = [way, str(change.get("num_answers", parity["num_answers"])), *change_cells(change)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _of_pairs(evaluation: dict[str, Any] | None, when: str) -> dict[str, Any] | None:
    """An evaluation of a run, if it counted decided pairs: of ratings and ties there are none."""
    found = (evaluation or {}).get(when)
    return found if found and found["pairs"]["accuracy"] is not None else None


def inherited_license(base: str, revision: str | None = None) -> dict[str, str]:
    """Licence fields of a base model's own card; nothing where it has none, for a licence is never guessed.

    Args:
        base: Its name, as the merge recorded it. The README.md in its folder is read, or that in the hub's cache.
        revision: Of a hub model.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.repocard import metadata_load

    card, name = Path(base).expanduser() / "README.md", hub_id(base)
    if not card.is_file() and name:
        found = try_to_load_from_cache(name, "README.md", revision=revision)
        card = Path(found) if isinstance(found, str) else card
    try:
        header = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    fields = ("license", "license_name", "license_link")
    return {field: header[field] for field in fields if header and isinstance(header.get(field), str)}


def evaluation_results(run: RunFolder, after: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Held-out accuracy in the form that the hub's model pages read (model-index).

    The hub's newer `.eval_results/` files can name only data sets that are registered there as benchmarks.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    data = run.settings().data
    source, split = (data.eval, data.eval_split) if data.eval else (data.train, data.train_split)
    # of a file not even the name is told: the path is private
    is_builtin = source.startswith("builtin:")
    source, _, part = (source, "", "") if is_builtin else source.partition(":")
    known = hub_id(source) or is_builtin
    result = EvalResult(
        task_type="text-classification",
        task_name="Reward modelling: the preferred answer of a pair gets the higher reward",
        dataset_type=source if known else "private",
        dataset_name=f"{source if known else 'preferences'}, {'evaluation' if data.eval else 'held-out'} pairs",
        dataset_config=part if hub_id(source) and part else None,
        dataset_split=split if hub_id(source) else None,
        metric_type="accuracy",
        metric_name=f"Pair accuracy, {after['pairs']['num_pairs']} pairs",
        metric_value=round(after["pairs"]["accuracy"], 4),
    )
    index: list[dict[str, Any]] = eval_results_to_model_index(name, [result])
    return index


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link for weights where the disk allows it: an 8B model is 16 GB; a copy otherwise."""
    if source.suffix == ".safetensors":
        try:
            target.hardlink_to(source)
            return
        except OSError:
            pass
    copy_public(source, target)
