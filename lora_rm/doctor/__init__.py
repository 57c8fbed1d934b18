"""What is wrong with a machine, a data file, a model or a run, and what to do about it.

Every check is one function that looks at one thing and returns a `Finding`. `examine` sees what it was given and
runs the checks that apply; nothing is written but caches.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from lora_rm.checkpoint import RunFolder
from lora_rm.config import DataSettings, Settings
from lora_rm.console import console, say
from lora_rm.data.checkable import checkable_preferences
from lora_rm.data.files import HUB_ID, SAVED, SUFFIXES, find_files
from lora_rm.data.preference import Preference
from lora_rm.data.split import BUILTIN
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.doctor.finding import AGAIN, NUM_SCORED, Finding, Kind, attempt, judge, unchecked
from lora_rm.doctor.machine import (
    check_bfloat16,
    check_bitsandbytes,
    check_disk,
    check_fit,
    check_gpu,
    check_memory,
    check_versions,
    free_memory,
)
from lora_rm.doctor.preferences import (
    check_conflicts,
    check_disjoint,
    check_duplicates,
    check_length,
    check_length_bias,
    check_rows,
    check_ties,
    check_words,
    read_sides,
)
from lora_rm.doctor.rewards import (
    check_head,
    check_padding,
    check_remembered,
    check_swap,
    padded_rewards,
    remembered_rewards,
    stored_head,
)
from lora_rm.doctor.run import check_course, check_evaluation, check_merge
from lora_rm.doctor.template import check_prefix, template_findings
from lora_rm.doctor.training import training_findings, usable_trees
from lora_rm.errors import ConfigError, DataError, LoraRmError, ModelError, storing
from lora_rm.metrics import read_metrics
from lora_rm.model import base as bases
from lora_rm.model.adapter import WEIGHTS
from lora_rm.model.base import cache_folder, find_base, find_config, is_hub_id
from lora_rm.model.device import pick_device
from lora_rm.model.record import RECORD
from lora_rm.score import export_target, load_reward_model
from lora_rm.verify import score_rows


def doctor(source: str | None, settings: Settings, file: Path | None = None) -> list[Finding]:
    """Examines, shows the findings, and writes them to a JSON file if one is named."""
    kind = kind_of(source)
    name = "this machine" if source is None else f"{source} ({kind})"
    say(f"Checking {name} ...")
    findings: list[Finding] = []
    try:
        findings.extend(examine(source, settings))
    except Exception as error:  # what was found before is shown all the same
        if not findings:
            raise
        findings.append(attempt("all other checks", _raise, error))
    show(f"Doctor: {name}", findings)
    if file is not None:
        values = {"subject": source or "machine", "kind": kind, "findings": [asdict(f) for f in findings]}
        with storing(file):
            file.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    return findings


def _raise(error: Exception) -> Finding:
    raise error


def examine(source: str | None, settings: Settings) -> Iterator[Finding]:
    """The findings about whatever the source is; see `kind_of`.

    Args:
        source: None for this machine.
        settings: Of the run, or what to assume: length limit, template, base model, device.
    """
    kind = kind_of(source)
    if kind == "machine":
        return examine_machine(settings)
    assert source is not None
    if kind == "data":
        return examine_data(dataclasses.replace(settings.data, train=source), settings)
    if kind == "base":
        return examine_base(
            dataclasses.replace(settings, model=dataclasses.replace(settings.model, base=source))
        )
    if kind == "run":
        return examine_run(RunFolder.open(source), settings)
    return examine_saved(Path(source), settings)


def kind_of(source: str | None) -> Kind:
    """What a path or name stands for.

    Raises:
        ConfigError: If it is nothing that can be checked.
    """
    if source is None:
        return "machine"
    path = Path(source).expanduser()
    if RunFolder.find(path):
        return "run"
    if (path / RECORD).is_file() or (path / "adapter_config.json").is_file():
        return "adapter"
    if (path / "config.json").is_file():
        return "base" if stored_head(path) is None else "merged"
    is_saved_data = any((path / name).is_file() for name in SAVED)
    is_part = ":" in source and HUB_ID.fullmatch(source)  # of a hub data set; models have none
    is_named = source.lower().endswith(SUFFIXES) and not path.is_dir()
    if source == BUILTIN or is_saved_data or is_part or is_named:
        return "data"
    if source == bases.BUILTIN or path.suffix == ".gguf" or is_hub_id(source):
        return "base"
    target = export_target(path)
    if target:
        raise ConfigError(
            f"{source}: is an export to {target}, which the doctor does not open; its README.md tells what does. Give the run "
            "or the merged model that it was made from."
        )
    with suppress(DataError):
        if find_files(source):  # in a folder, or of a pattern
            return "data"
    raise ConfigError(
        f"{source}: is no run, adapter, merged model, base model or data file. Give the folder of one, a file that ends "
        f"with {', '.join(SUFFIXES)}, a hub id like org/model, or nothing at all to check this machine."
    )


def examine_machine(settings: Settings) -> Iterator[Finding]:
    """Versions, device, bitsandbytes, bfloat16, disk and memory."""
    yield attempt("versions", check_versions)
    yield attempt("GPU", check_gpu)
    try:
        device = pick_device(settings.model.device)
    except ModelError as error:
        yield judge("device", str(error), "Set model.device to auto or cpu.", fault=True)
        return
    yield attempt("bitsandbytes", check_bitsandbytes, device)
    yield attempt("bfloat16", check_bfloat16, device, settings.model.compute_dtype)
    for folder in dict.fromkeys((Path(settings.output_dir).absolute(), cache_folder().absolute())):
        yield attempt("disk", check_disk, folder)
    yield attempt("memory", lambda: check_memory(free_memory(device), device.type))
    if settings.model.base:
        yield attempt("memory for the model", check_fit, settings)


def examine_data(wanted: DataSettings, settings: Settings) -> Generator[Finding, None, list[Preference]]:
    """Rows, copies, contradictions, lengths, ties and the split; with a base model also its tokens.

    Returns:
        The training side; empty if the data cannot be read.
    """
    try:
        train_side, eval_side, bad = read_sides(wanted, settings.seed)
    except LoraRmError as error:
        yield judge("rows", str(error), AGAIN, fault=True)
        return []
    everything = [*train_side, *eval_side]
    yield attempt("rows", check_rows, len(everything), bad, wanted)
    if not everything:
        return []
    yield attempt("copies", check_duplicates, everything)
    yield attempt("contradictions", check_conflicts, everything)
    yield attempt("ties", check_ties, everything)
    yield attempt("length of the better answer", check_length_bias, everything)
    yield attempt("words of the better answer", check_words, train_side, eval_side)
    yield attempt("train and eval apart", check_disjoint, train_side, eval_side, wanted)
    names = ("length limit", "template on these rows")
    if not settings.model.base:
        for name in names:
            yield unchecked(name, "needs the tokenizer of a model", "Add --model.base MODEL.")
        return train_side
    try:
        folder = find_config(settings.model.base, settings.model.revision, tokenizer=True).path
        chat = ChatTokenizer.load(folder, wanted)
    except LoraRmError as error:
        yield judge("tokenizer", str(error), "Give another --model.base.", fault=True)
        return train_side
    yield attempt(names[0], check_length, everything, chat, wanted)
    yield attempt(names[1], check_prefix, chat, everything)
    return train_side


def examine_base(settings: Settings) -> Iterator[Finding]:
    """Template, memory, and a small training: does everything move, and can sixteen pairs be learnt."""
    try:
        base = find_base(settings.model.base, settings.model.revision)
        chat = ChatTokenizer.load(base.path, settings.data)
    except LoraRmError as error:
        yield judge("base model", str(error), AGAIN, fault=True)
        return
    samples = checkable_preferences(400, 100)[0]
    yield from template_findings(chat, samples)
    fit = attempt("memory for the model", check_fit, settings)
    yield fit
    names = ("score head", "padding", "swapped labels", "head moves", "values move", "16 pairs learnt")
    if fit.status == "fault":
        yield from (unchecked(name, "the model does not fit") for name in names)
        return
    trees = usable_trees(samples, chat, settings.data)
    yield from training_findings(settings, base, trees)


def examine_saved(folder: Path, settings: Settings, own: Sequence[Preference] = ()) -> Iterator[Finding]:
    """Head, template, padding and rewards of an adapter or a merged model.

    Args:
        folder: Of either.
        settings: Device and type of products.
        own: Preferences to score; none, or none that say which answer is better: those of the built-in set.
    """
    is_adapter = kind_of(str(folder)) == "adapter"
    head = attempt("score head", lambda: check_head(stored_head(folder)))
    yield head
    names = ("template", "padding", "swapped labels", "rewards as saved")
    if head.status == "fault":
        yield from (unchecked(name, "there is no usable score head") for name in names)
        return
    try:
        model = load_reward_model(
            folder, device=settings.model.device, compute_dtype=settings.model.compute_dtype
        ).model
    except (LoraRmError, torch.OutOfMemoryError, OSError, ValueError, KeyError, RuntimeError) as error:
        remedy = "Do what the message says. If a file is damaged, copy the folder again or save it anew."
        yield judge("opens", str(error)[:600], remedy, fault=True)
        return
    built_in = checkable_preferences(400, 100)[1]
    yield from template_findings(model.chat, list(own) or built_in)
    trees = usable_trees(own, model.chat, settings.data) or usable_trees(
        built_in, model.chat, settings.data
    )  # ratings alone
    rows = [ids for tree in trees[:8] for ids in tree.conversations()]
    if is_adapter:
        yield attempt("padding", lambda: check_padding(padded_rewards(model, rows)))
    else:
        yield attempt("padding", lambda: check_padding(score_rows(folder, rows, "merged")))
    yield attempt("swapped labels", check_swap, model, trees[:NUM_SCORED])
    yield attempt(
        "rewards as saved",
        lambda: check_remembered(*remembered_rewards(folder, model), settings.verify.max_change),
    )


def examine_run(run: RunFolder, settings: Settings) -> Iterator[Finding]:
    """The run's data, its course, what training changed, its adapter, and whether its pairs can be learnt."""
    own = yield from examine_data(settings.data, settings)
    yield attempt("course of training", lambda: check_course(read_metrics(run.metrics)))
    yield attempt("evaluation", lambda: check_evaluation(run.read_json("eval.json")))
    yield attempt("merge", lambda: check_merge(run.read_json("merged/parity.json")))
    if not (run.adapter / WEIGHTS).is_file():
        yield judge(
            "adapter",
            f"{run.path} holds no adapter: training did not reach its end",
            f"Go on with `lora-rm train {run.config} --resume`.",
            fault=True,
        )
        return
    yield from examine_saved(run.adapter, settings, own)
    try:
        base = find_base(settings.model.base, settings.model.revision)
        chat = ChatTokenizer.load(base.path, settings.data)
    except LoraRmError:  # the adapter, which needs it too, was found at fault above
        return
    if own:
        trees = usable_trees(own, chat, settings.data)
        yield from training_findings(settings, base, trees, run.adapter)


def show(title: str, findings: Sequence[Finding]) -> None:
    """Prints the findings as a table, and their sum as a line."""
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    styles = {"ok": "green", "warning": "yellow", "fault": "bold red", "unchecked": "dim"}
    table.add_column("check")
    table.add_column("", no_wrap=True)
    table.add_column("what was found, and what to do", overflow="fold")
    for finding in findings:
        text = finding.found + (f"\n-> {finding.remedy}" if finding.remedy else "")
        table.add_row(finding.check, Text(finding.status, styles[finding.status]), text)
    console.print(table)
    count = Counter(finding.status for finding in findings)
    words = [
        f"{count[status]} {status if count[status] == 1 or status == 'ok' else status + 's'}"
        for status in ("ok", "warning", "fault")
    ]
    left = f", {count['unchecked']} not made" if count["unchecked"] else ""
    say(f"{len(findings)} checks: {', '.join(words)}{left}.")
