"""What is wrong with a machine, a data file, a model or a run, and what to do about it.

Every check is one function that looks at one thing and returns a `Finding`. `examine` sees what it was given and
runs the checks that apply; nothing is written but caches.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open

from lora_rm.checkpoint import RunFolder
from lora_rm.config import DataSettings, Settings
from lora_rm.console import console, say
from lora_rm.data.checkable import checkable_preferences
from lora_rm.data.files import SUFFIXES, BadRow, read_rows
from lora_rm.data.formats import RowError, parse_row
from lora_rm.data.preference import Messages, Preference
from lora_rm.data.split import BUILTIN, Data, Side, split_by_prompt
from lora_rm.data.tokens import ChatTokenizer, TokenTree, common_length, tokenize
from lora_rm.errors import ConfigError, Interrupted, LoraRmError, ModelError
from lora_rm.evaluate import evaluate, ordered_pairs, wilson_interval
from lora_rm.model import base as bases
from lora_rm.model.adapter import WEIGHTS
from lora_rm.model.base import BaseModel, cache_folder, find_base, find_config
from lora_rm.model.quantization import make_exact
from lora_rm.model.reward_model import HEAD_KEY, RECORD, RewardModel, pick_compute_dtype, pick_device
from lora_rm.plan import GIB, Plan, plan, remedies
from lora_rm.score import Scorer, load_reward_model
from lora_rm.train import train
from lora_rm.verify import measure_change, score_rows, standard_deviation

Status = Literal["ok", "warning", "fault", "unchecked"]
Kind = Literal["machine", "data", "base", "adapter", "merged", "run"]

NUM_PAIRS = 16
"""Pairs that a sound training learns by heart."""

NUM_SCORED = 64
"""Preferences scored both ways round."""

ASK, REPLY = "Kumquat?", "Persimmon."
"""A question and an answer that no chat template has in its own words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a check found."""

    check: str
    status: Status
    """ok; warning: works, but may not be what is wanted; fault: mend it first; unchecked: and why."""

    found: str
    remedy: str = ""
    """What to do; empty if nothing."""

    value: float | None = None
    """The number that decided."""


def judge(
    check: str, found: str, remedy: str, *, fault: bool, warning: bool = False, value: float | None = None
) -> Finding:
    """A finding whose remedy is told only if something is wrong."""
    status: Status = "fault" if fault else "warning" if warning else "ok"
    value = None if value is None or not math.isfinite(value) else float(value)
    return Finding(
        check=check, status=status, found=found, remedy="" if status == "ok" else remedy, value=value
    )


def attempt(check: str, function: Callable[..., Finding], *arguments: Any) -> Finding:
    """A check's finding; a check that cannot be made is a fault with the reason."""
    try:
        return function(*arguments)
    except Interrupted:
        raise KeyboardInterrupt from None
    except torch.OutOfMemoryError:
        found = "the device has too little memory for this check"
        remedy = "Close other programs that use the device; `lora-rm plan` says what the model needs."
    except LoraRmError as error:
        found, remedy = str(error), "Do what the message says, then run the doctor again."
    except Exception as error:  # a doctor that ends with a traceback helps nobody
        found = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
        remedy = "This is not foreseen. The file may be damaged: make or fetch it again; if it stays, report this line."
    return Finding(check=check, status="fault", found=found, remedy=remedy)


def unchecked(check: str, why: str, remedy: str = "") -> Finding:
    """A check that was not made."""
    return Finding(check=check, status="unchecked", found=why, remedy=remedy)


# -- what is examined -------------------------------------------------------------------------------------


def doctor(source: str | None, settings: Settings, file: Path | None = None) -> list[Finding]:
    """Examines, shows the findings, and writes them to a JSON file if one is named."""
    kind = kind_of(source)
    name = "this machine" if source is None else f"{source} ({kind})"
    say(f"Checking {name} ...")
    findings = list(examine(source, settings))
    show(f"Doctor: {name}", findings)
    if file is not None:
        values = {"subject": source or "machine", "kind": kind, "findings": [asdict(f) for f in findings]}
        file.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    return findings


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
    if (path / "config.yaml").is_file():
        return "run"
    if (path / RECORD).is_file() or (path / "adapter_config.json").is_file():
        return "adapter"
    if (path / "config.json").is_file():
        return "base" if stored_head(path) is None else "merged"
    is_saved_data = any(
        (path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")
    )
    if source == BUILTIN or is_saved_data or (source.lower().endswith(SUFFIXES) and not path.is_dir()):
        return "data"
    is_hub_id = not path.exists() and source.count("/") == 1 and source[0] not in "./~"
    if source == bases.BUILTIN or path.suffix == ".gguf" or is_hub_id:
        return "base"
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
        yield Finding(
            check="device", status="fault", found=str(error), remedy="Set model.device to auto or cpu."
        )
        return
    yield attempt("bitsandbytes", check_bitsandbytes, device)
    yield attempt("bfloat16", check_bfloat16, device, settings.model.compute_dtype)
    for folder in dict.fromkeys((Path(settings.output_dir).absolute(), cache_folder().absolute())):
        yield attempt("disk", check_disk, folder)
    yield attempt("memory", check_memory, free_memory(device), device.type)
    if settings.model.base:
        yield attempt("memory for the model", check_fit, settings)


def examine_data(wanted: DataSettings, settings: Settings) -> Iterator[Finding]:
    """Rows, copies, contradictions, lengths, ties and the split; with a base model also its tokens."""
    try:
        train_side, eval_side, bad = read_sides(wanted, settings.seed)
    except LoraRmError as error:
        remedy = "Do what the message says, then run the doctor again."
        yield Finding(check="rows", status="fault", found=str(error), remedy=remedy)
        return
    everything = [*train_side, *eval_side]
    yield attempt("rows", check_rows, len(everything), bad, wanted)
    if not everything:
        return
    yield attempt("copies", check_duplicates, everything)
    yield attempt("contradictions", check_conflicts, everything)
    yield attempt("ties", check_ties, everything)
    yield attempt("length of the better answer", check_length_bias, everything)
    yield attempt("train and eval apart", check_disjoint, train_side, eval_side, wanted)
    names = ("length limit", "template on these rows")
    if not settings.model.base:
        for name in names:
            yield unchecked(name, "needs the tokenizer of a model", "Add --model.base MODEL.")
        return
    try:
        folder = find_config(settings.model.base, settings.model.revision).path
        chat = ChatTokenizer.load(folder, wanted.chat_template)
    except LoraRmError as error:
        yield Finding(
            check="tokenizer", status="fault", found=str(error), remedy="Give another --model.base."
        )
        return
    yield attempt(names[0], check_length, everything, chat, wanted)
    yield attempt(names[1], check_prefix, chat, everything)


def examine_base(settings: Settings) -> Iterator[Finding]:
    """Template, memory, and a small training: does everything move, and can sixteen pairs be learnt."""
    try:
        base = find_base(settings.model.base, settings.model.revision)
        chat = ChatTokenizer.load(base.path, settings.data.chat_template)
    except LoraRmError as error:
        remedy = "Do what the message says, then run the doctor again."
        yield Finding(check="base model", status="fault", found=str(error), remedy=remedy)
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
        own: Preferences to score; none: those of the built-in set.
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
        yield Finding(check="opens", status="fault", found=str(error)[:600], remedy=remedy)
        return
    samples = list(own) or checkable_preferences(400, 100)[1]
    yield from template_findings(model.chat, samples)
    trees = usable_trees(samples, model.chat, settings.data)
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
    yield from examine_data(settings.data, settings)
    yield attempt("course of training", lambda: check_course(read_metrics(run)))
    yield attempt("evaluation", lambda: check_evaluation(run.read_json("eval.json")))
    yield attempt("merge", lambda: check_merge(run.read_json("parity.json")))
    if not (run.adapter / WEIGHTS).is_file():
        yield judge(
            "adapter",
            f"{run.path} holds no adapter: training did not reach its end",
            f"Go on with `lora-rm train {run.config} --resume`.",
            fault=True,
        )
        return
    try:
        own, _, _ = read_sides(settings.data, settings.seed)
        base = find_base(settings.model.base, settings.model.revision)
    except LoraRmError:  # the data was found at fault above
        own = []
        base = None
    yield from examine_saved(run.adapter, settings, own)
    if base is not None:
        trees = usable_trees(own, ChatTokenizer.load(base.path, settings.data.chat_template), settings.data)
        yield from training_findings(settings, base, trees, run.adapter)


def show(title: str, findings: Sequence[Finding]) -> None:
    """Prints the findings as a table, and their sum as a line."""
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    styles = {"ok": "green", "warning": "yellow", "fault": "bold red", "unchecked": "dim"}
    table.add_column("check")
    table.add_column("", no_wrap=True)
    table.add_column("what was found, and what to do", overflow="fold")
    for finding in findings:
        style = styles[finding.status]
        text = finding.found + (f"\n-> {finding.remedy}" if finding.remedy else "")
        table.add_row(_plain(finding.check), f"[{style}]{finding.status}[/{style}]", _plain(text))
    console.print(table)
    count = Counter(finding.status for finding in findings)
    words = [
        f"{count[status]} {status if count[status] == 1 or status == 'ok' else status + 's'}"
        for status in ("ok", "warning", "fault")
    ]
    left = f", {count['unchecked']} not made" if count["unchecked"] else ""
    say(f"{len(findings)} checks: {', '.join(words)}{left}.")


def _plain(text: str) -> str:
    """Text that rich shows as it is."""
    return text.replace("[", r"\[")


# -- the machine ------------------------------------------------------------------------------------------


def check_versions(requirements: Sequence[str] | None = None) -> Finding:
    """Whether the libraries are there in the versions needed.

    Args:
        requirements: Like `torch>=2.11`; None: those of this package.
    """
    from packaging.requirements import Requirement

    wrong, seen = [], []
    for text in own_requirements() if requirements is None else requirements:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        seen.append(f"{needed.name} {version}")
        if version == "missing" or not needed.specifier.contains(version, prereleases=True):
            wrong.append((f"{needed.name} is {version}, needed: {needed.specifier}", text))
    command = " ".join(f'"{text}"' for _, text in wrong)
    found = "; ".join(sentence for sentence, _ in wrong) or ", ".join(seen)
    return judge("versions", found, f"pip install {command}", fault=bool(wrong), value=len(wrong))


def own_requirements() -> list[str]:
    """The libraries that this package needs, out of its metadata or, in a checkout, of pyproject.toml."""
    try:
        return importlib.metadata.requires("lora_rm") or []
    except importlib.metadata.PackageNotFoundError:
        text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
        return tomllib.loads(text)["project"]["dependencies"]


def check_gpu(num_usable: int | None = None, has_driver: bool | None = None) -> Finding:
    """Whether torch can use the GPU that is there.

    Args:
        num_usable: CUDA devices that torch finds; None: ask it.
        has_driver: Whether an NVIDIA driver runs; None: look.
    """
    if num_usable is None:
        num_usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if has_driver is None:
        has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if num_usable and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(num_usable)]
        found = f"{num_usable} usable by torch {torch.__version__}: {', '.join(names)}"
    elif has_driver:
        found = f"an NVIDIA driver is there, but torch {torch.__version__} finds no GPU, so all would run on the CPU"
    else:
        found = f"none; everything runs on the CPU with {torch.get_num_threads()} threads, which suits models up to about 1B"
    remedy = (
        "If the version of torch ends with +cpu, install a CUDA build (pytorch.org, Get started). Else run `nvidia-smi`: "
        "if it fails, the driver or the container's access to the GPU is what to mend."
    )
    return judge("GPU", found, remedy, fault=has_driver and not num_usable, value=num_usable)


def check_bitsandbytes(device: torch.device) -> Finding:
    """Whether a 4-bit layer holds its weight, multiplies by it, and lets gradients through.

    NF4 changes a normal weight by 9 to 10 % (root mean square).
    """
    remedy = (
        "Run `python -m bitsandbytes` to see which library it found, then `pip install --force-reinstall bitsandbytes`. "
        "Until then train with --model.quantization none."
    )
    version = importlib.metadata.version("bitsandbytes")
    try:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(256, 256, generator=generator, dtype=torch.float32)
        layer: Any = bnb.nn.Linear4bit(
            256, 256, bias=False, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32
        )
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        layer = layer.to(device)
        make_exact(layer)
        inputs = torch.randn(8, 256, generator=generator).to(device)
        with torch.no_grad():
            outputs = layer(inputs).cpu()
        stored = bnb_functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()
        loss = float((stored - weight).norm() / weight.norm())
        product = float((outputs - inputs.cpu() @ stored.T).norm() / outputs.norm())
        inputs.requires_grad_()
        layer(inputs).sum().backward()
        slope = math.inf if inputs.grad is None else _relative(inputs.grad.cpu()[0], stored.sum(0))
    except Exception as error:  # whatever a library without its kernels raises
        found = f"{version} does not work on {device}: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
        return judge("bitsandbytes", found, remedy, fault=True)
    found = (
        f"{version} on {device}: 4-bit storage changes a weight by {loss:.1%} (sound: about 9 %), products are off by "
        f"{product:.1e} and gradients by {slope:.1e}"
    )
    sound = 0.05 < loss < 0.15 and product < 0.01 and slope < 0.01
    return judge("bitsandbytes", found, remedy, fault=not sound, value=loss)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_bfloat16(
    device: torch.device, wanted: str = "auto", seconds: Mapping[torch.dtype, float] | None = None
) -> Finding:
    """Whether the type of matrix products that training would use is the fast one here.

    Args:
        device: Where.
        wanted: As in `model.compute_dtype`.
        seconds: Of one product by type; None: measure.
    """
    seconds = seconds or {dtype: time_product(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    chosen = pick_compute_dtype(wanted, device)
    name = str(chosen).removeprefix("torch.")
    times = seconds[torch.bfloat16] / seconds[torch.float32]
    speed = f"{1 / times:.1f} times as fast as" if times < 1 else f"{times:.1f} times as slow as"
    found = f"products run in {name} (model.compute_dtype {wanted}); here bfloat16 is {speed} float32"
    is_slow = (chosen == torch.bfloat16 and times > 1.2) or (chosen == torch.float32 and times < 0.6)
    other = "float32" if chosen == torch.bfloat16 else "bfloat16"
    return judge(
        "bfloat16", found, f"Set --model.compute-dtype {other}.", fault=False, warning=is_slow, value=times
    )


def time_product(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one matrix product; the fastest of five."""
    size = 4096 if device.type == "cuda" else 384
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    found = []
    for _ in range(6):
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def check_disk(folder: Path, needed: float = 20 * GIB) -> Finding:
    """Whether a folder can be written to and has room.

    Args:
        folder: May not be there yet.
        needed: Bytes wanted; a merged 8B model takes 16 GB.
    """
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return judge(
            "disk",
            f"{there} cannot be written to ({error.strerror})",
            "Change its permissions, or give another folder: --output-dir, or the environment's LORA_RM_CACHE.",
            fault=True,
        )
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.1f} GiB free for {folder}"
    remedy = (
        f"Free {max(0.0, needed - free) / GIB:.1f} GiB, or give a folder on another disk (--output-dir; LORA_RM_CACHE). "
        "A checkpoint takes 12 bytes a trained value, a merged model 2 bytes a parameter: 16 GB for 8B."
    )
    return judge("disk", found, remedy, fault=free < GIB, warning=free < needed, value=free / GIB)


def free_memory(device: torch.device) -> float:
    """Bytes that a process can still have: of a GPU, or of the machine within its container's limit."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        groups = Path("/sys/fs/cgroup")
        limit = groups.joinpath("memory.max").read_text(encoding="utf-8").strip()
        used = groups.joinpath("memory.current").read_text(encoding="utf-8")
        return free if limit == "max" else min(free, float(limit) - float(used))
    except (OSError, StopIteration):  # not Linux, or no limits
        return free


def check_memory(free: float, where: str = "cpu") -> Finding:
    """Whether anything at all can be trained in this memory.

    The built-in 135M model takes 1.4 GiB on a CPU, an 8B model in 4 bits about 8 GiB on a GPU.
    """
    least = 2.0
    found = f"{free / GIB:.1f} GiB free ({where})"
    remedy = (
        "Close other programs that use it, or raise the container's limit; `lora-rm plan MODEL` says what a model needs. "
        f"Below {least:.0f} GiB not even the smallest model trains, 8 GiB are for 8B in 4 bits."
    )
    return judge("memory", found, remedy, fault=free < least * GIB, warning=free < 8 * GIB, value=free / GIB)


def check_fit(settings: Settings, planned: Plan | None = None, free: float | None = None) -> Finding:
    """Whether the training of a model fits into the memory that is there and free.

    Args:
        settings: Of the run.
        planned: None: plan it.
        free: Bytes; None: what is free here.
    """
    planned = planned or plan(settings)
    free = free_memory(pick_device(settings.model.device)) if free is None else free
    needed = planned.needed(planned.mode, planned.row)
    found = (
        f"training takes {needed / GIB:.2f} GiB with rows of {planned.row} tokens and checkpointing {planned.mode}; "
        f"{planned.memory / GIB:.1f} GiB are there, {free / GIB:.1f} free"
    )
    # a number of auto shrinks until it fits
    is_open = settings.train.tokens_per_microbatch == "auto"
    largest = planned.largest(planned.mode)
    fits = largest >= planned.longest_pair if is_open else planned.fits(planned.mode)
    if fits:
        remedy = f"Close other programs: {needed / GIB:.1f} GiB must be free."
    else:
        remedy = "What would help: " + "; ".join(remedies(planned)) + "."
    return judge(
        "memory for the model", found, remedy, fault=not fits, warning=needed > free, value=needed / GIB
    )


# -- data -------------------------------------------------------------------------------------------------


def read_sides(
    wanted: DataSettings, seed: int = 0
) -> tuple[list[Preference], list[Preference], list[RowError]]:
    """Both sides as training would split them, nothing dropped, and the rows that cannot be read.

    Raises:
        DataError: If a source cannot be read at all.
    """
    bad: list[RowError] = []

    def read(source: str, split: str, side: int) -> list[Preference]:
        if source == BUILTIN:
            return checkable_preferences()[side]
        found = []
        for row in read_rows(source, split=split):
            try:
                if isinstance(row, BadRow):
                    raise RowError(row.reason, f"{row.source}: {row.message}")
                found.append(parse_row(row.values, row.source))
            except RowError as error:
                bad.append(error)
        return found

    train_side = read(wanted.train, wanted.train_split, 0)
    if wanted.eval is not None:
        return train_side, read(wanted.eval, wanted.eval_split, 1), bad
    if wanted.train == BUILTIN:
        return train_side, checkable_preferences()[1], bad
    return *split_by_prompt(train_side, wanted.eval_share, seed), bad


def check_rows(num_good: int, bad: Sequence[RowError], wanted: DataSettings) -> Finding:
    """Whether every row can be read."""
    share = len(bad) / max(1, num_good + len(bad))
    found = f"{num_good} rows can be used"
    if bad:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in Counter(e.reason for e in bad).most_common(5))
        found += f", {len(bad)} ({share:.1%}) cannot ({reasons}). The first: {bad[0]}"
    stops = wanted.on_bad_row == "raise" or share > wanted.max_dropped_share or not num_good
    remedy = "Mend or remove the rows." + (
        " Training stops at the first of them unless --data.on-bad-row skip is set."
        if wanted.on_bad_row == "raise"
        else " They are left out of training."
    )
    return judge(
        "rows", found, remedy, fault=bool((bad and stops) or not num_good), warning=bool(bad), value=share
    )


def check_duplicates(preferences: Sequence[Preference]) -> Finding:
    """Rows that stand there more than once."""
    count = Counter((p.prompt_key, tuple(map(_key, p.answers)), p.probability, p.scores) for p in preferences)
    copies = len(preferences) - len(count)
    share = copies / len(preferences)
    found = f"{copies} of {len(preferences)} rows ({share:.1%}) are copies of another"
    if copies:
        key = count.most_common(1)[0]
        first = next(p for p in preferences if p.prompt_key == key[0][0])
        found += f"; the most frequent stands {key[1]} times (first: {first.source or 'no source'})"
    remedy = (
        "Remove the copies: each is trained on, and counted in the accuracy, as often as it stands there."
    )
    return judge("copies", found, remedy, fault=share > 0.1, warning=copies > 0, value=share)


def check_conflicts(preferences: Sequence[Preference]) -> Finding:
    """The same two answers to the same prompt, each once the better one; or one answer rated differently."""
    orders: set[tuple[str, str, str]] = set()
    ratings: dict[tuple[str, str], set[float]] = {}
    for p in preferences:
        keys = [_key(answer) for answer in p.answers]
        for better, worse in decided(p):
            orders.add((p.prompt_key, keys[better], keys[worse]))
        if p.kind == "rating":
            ratings.setdefault((p.prompt_key, keys[0]), set()).add(p.scores[0])
    both = {order for order in orders if (order[0], order[2], order[1]) in orders}
    conflicts = len(both) // 2 + sum(len(scores) > 1 for scores in ratings.values())
    share = conflicts / max(1, len(orders) - len(both) // 2 + len(ratings))
    found = f"{conflicts} of {len(orders) - len(both) // 2 + len(ratings)} comparisons ({share:.1%}) stand there both ways round"
    if both:
        prompt = min(both)[0]
        sources = [p.source for p in preferences if p.prompt_key == prompt and p.source]
        found += f" (for example: {' and '.join(sources[:2])})" if sources else ""
    remedy = (
        "Decide which way round is right and remove the other row, or write both as one row with `tie` or `probability`: "
        "nobody can get both right, so they cap the accuracy."
    )
    return judge("contradictions", found, remedy, fault=share > 0.01, warning=conflicts > 0, value=share)


def check_ties(preferences: Sequence[Preference]) -> Finding:
    """Pairs without a better answer, which teach little and are left out of the accuracy."""
    ties = sum(p.is_tie for p in preferences)
    share = ties / len(preferences)
    comparisons = sum(p.kind != "rating" for p in preferences)
    found = f"{ties} of {len(preferences)} rows ({share:.1%}) are ties"
    remedy = (
        "Ties are left out of the accuracy, and with loss.pair bradley_terry they only pull both rewards together. Look "
        "whether the labels were read rightly; rao_kupper and davidson give ties a probability of their own."
    )
    return judge(
        "ties",
        found,
        remedy,
        fault=bool(comparisons) and ties == comparisons,
        warning=share > 0.3,
        value=share,
    )


def check_length_bias(preferences: Sequence[Preference]) -> Finding:
    """How often the longer answer is the better one, in characters; half is what chance gives."""
    right, total = 0.0, 0
    for p in preferences:
        sizes = [sum(len(message["content"]) for message in answer) for answer in p.answers]
        for better, worse in decided(p):
            total += 1
            right += 0.5 if sizes[better] == sizes[worse] else float(sizes[better] > sizes[worse])
    if not total:
        return unchecked("length of the better answer", "no row says which of two answers is better")
    accuracy = right / total
    low, high = wilson_interval(right, total)
    best = max(accuracy, 1 - accuracy)
    rule = "longer" if accuracy >= 0.5 else "shorter"
    found = f"'the {rule} answer wins' is right on {best:.1%} of {total} pairs"
    remedy = (
        f"A model can reach {best:.0%} by counting words, so only what is above that is worth something. Compare with "
        "'longer answer wins' in the evaluation, and add pairs in which the better answer is not the "
        f"{rule} one."
    )
    is_sure = not low <= 0.5 <= high
    return judge(
        "length of the better answer",
        found,
        remedy,
        fault=is_sure and best > 0.8,
        warning=is_sure and best > 0.6,
        value=accuracy,
    )


def check_disjoint(
    train_side: Sequence[Preference], eval_side: Sequence[Preference], wanted: DataSettings
) -> Finding:
    """Whether prompts of the evaluation are trained on; also those that differ in case or spaces only.

    Training leaves rows with the very same prompt out by itself, and refuses if they are too many.
    """
    exact, near = {p.prompt_key for p in eval_side}, {_squeezed(p) for p in eval_side}
    same = [p for p in train_side if p.prompt_key in exact]
    alike = [p for p in train_side if p.prompt_key not in exact and _squeezed(p) in near]
    share = (len(same) + len(alike)) / max(1, len(train_side))
    found = (
        f"{len(same)} of {len(train_side)} training rows have a prompt of the {len(eval_side)} evaluation rows, "
        f"{len(alike)} one that differs from such a prompt in case or spaces only"
    )
    if same or alike:
        found += f" (first: {(alike or same)[0].source or 'no source'})"
    remedy = (
        "Remove these rows from one side. The accuracy on prompts that were trained on says nothing about new ones. "
        "(Rows with the very same prompt are left out of training by themselves; the others are not.)"
    )
    too_many = len(same) / max(1, len(train_side)) > wanted.max_dropped_share
    is_leak = len(alike) > 0.01 * len(eval_side)
    return judge(
        "train and eval apart",
        found,
        remedy,
        fault=too_many or is_leak or not eval_side,
        warning=bool(same or alike),
        value=share,
    )


def check_length(preferences: Sequence[Preference], chat: ChatTokenizer, wanted: DataSettings) -> Finding:
    """How many rows are longer than `data.max_length`, and are dropped or cut."""
    trees, _ = tokenize(preferences, chat, max_length=10**9, cache=cache_folder())
    lengths = sorted(max(map(len, tree.conversations())) for tree in trees if tree is not None)
    _, counts = tokenize(
        preferences,
        chat,
        max_length=wanted.max_length,
        length_policy=wanted.length_policy,
        cache=cache_folder(),
    )
    dropped = sum(n for reason, n in counts.items() if reason.startswith("dropped")) / len(preferences)
    lost = sum(counts.values()) / len(preferences)
    typical, long, longest = (
        (lengths[int(q * (len(lengths) - 1))] for q in (0.5, 0.99, 1.0)) if lengths else (0, 0, 0)
    )
    found = f"conversations have {typical} tokens (median), {long} (99 %), {longest} (longest); the limit is {wanted.max_length}"
    if counts:
        found += "; " + ", ".join(f"{reason}: {n} of {len(preferences)}" for reason, n in counts.items())
    advice = []
    if longest > wanted.max_length:
        nearly = f", {long} nearly all" if long > wanted.max_length else ""
        advice.append(f"--data.max-length {longest} keeps all{nearly}, at the price of memory.")
        if wanted.length_policy == "drop":
            advice.append(
                "--data.length-policy truncate_prompt cuts the start of long prompts instead of dropping the row."
            )
    if any("identical" in reason for reason in counts):
        advice.append("Remove rows whose answers are identical as tokens: there is nothing to choose.")
    remedy = " ".join(advice)
    return judge(
        "length limit", found, remedy, fault=dropped > wanted.max_dropped_share, warning=lost > 0, value=lost
    )


def decided(preference: Preference) -> list[tuple[int, int]]:
    """Indices (better, worse) of answers whose order a row tells."""
    p = preference
    return ordered_pairs(TokenTree([], (), p.kind, p.probability, p.margin, p.scores))


def _key(answer: Messages) -> str:
    return json.dumps(answer, sort_keys=True)


def _squeezed(preference: Preference) -> str:
    """The prompt without regard to case and spaces."""
    return " ".join(" ".join(m["content"] for m in preference.prompt).casefold().split())


# -- template and tokens ----------------------------------------------------------------------------------


def template_findings(chat: ChatTokenizer, preferences: Sequence[Preference]) -> Iterator[Finding]:
    """All checks of a tokenizer and its chat template."""
    yield attempt("template", check_template, chat)
    yield attempt("BOS", check_bos, chat)
    yield attempt("generation prompt", check_generation_prompt, chat)
    yield attempt("end of answer", check_end, chat)
    yield attempt("prompt is a prefix", check_prefix, chat, preferences)


def rendered_parts(chat: ChatTokenizer) -> tuple[str, str, str]:
    """What the template writes before a question, between it and its answer, and after the answer.

    Raises:
        ModelError: If question or answer is not in the text.
    """
    text = chat.render(({"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY}))
    before, found, rest = text.partition(ASK)
    between, found_too, after = rest.partition(REPLY)
    if not found or not found_too:
        raise ModelError(
            f"the chat template does not show {'the answer' if found else 'the question'} as it is (rendered: {text!r}). "
            "Choose another --data.chat-template."
        )
    return before, between, after


def check_template(chat: ChatTokenizer) -> Finding:
    """Whether question and answer are in the rendered text, in this order."""
    remedy = (
        "Set --data.chat-template plain, or the path of a .jinja file that writes every message's content."
    )
    try:
        before, between, after = rendered_parts(chat)
    except LoraRmError as error:
        return judge("template", str(error), remedy, fault=True)
    found = f"a conversation reads {before + '(question)' + between + '(answer)' + after!r}"
    return judge("template", found, remedy, fault=False)


def check_bos(chat: ChatTokenizer) -> Finding:
    """Whether a conversation begins with one BOS if the tokenizer adds one, never with two."""
    before, _, _ = rendered_parts(chat)
    own = _leading_bos(chat, chat.text_ids([before])[0]) if before or chat.adds_bos else 0
    plain = _leading_bos(chat, chat.tokenizer(before).input_ids)
    expected = "one" if chat.adds_bos else "none or one"
    found = f"{own} at the start of a conversation (right: {expected})"
    if plain > 1 and own == 1:
        found += (
            ". Mind: the template writes a BOS and the tokenizer adds another, so other programs that tokenise rendered text "
            "need add_special_tokens=False; here the second is removed"
        )
    remedy = (
        "Write the BOS once in the template, at its very start and followed by no space, or leave it to the tokenizer. "
        "A second BOS changed about 1 % of the decisions in published benchmarks."
    )
    return judge("BOS", found, remedy, fault=own > 1 or (chat.adds_bos and own < 1), value=own)


def _leading_bos(chat: ChatTokenizer, ids: Sequence[int]) -> int:
    """BOS tokens before the first word; some families begin every later turn with one too."""
    count = 0
    for number in ids:
        if number == chat.tokenizer.bos_token_id:
            count += 1
        elif chat.tokenizer.decode([number]).strip():
            break
    return count


def check_generation_prompt(chat: ChatTokenizer) -> Finding:
    """Whether the template opens another answer after the last one, so that the reward is read there."""
    _, between, after = rendered_parts(chat)
    question = [{"role": "user", "content": ASK}]
    texts = [
        chat.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=wanted)
        for wanted in (True, False)
    ]
    prompt = texts[0].removeprefix(texts[1]) if texts[0] != texts[1] else ""
    words = between
    for special in (chat.tokenizer.eos_token, chat.tokenizer.bos_token):
        words = words.replace(special or "\0", "")
    repeats = bool(words.strip()) and after == between
    is_open = repeats or (bool(prompt) and after.endswith(prompt))
    found = f"after the answer stands {after!r}"
    found += ", the start of another answer" if is_open else ", which opens no other answer"
    remedy = (
        "Put the generation prompt of the template into {% if add_generation_prompt %} ... {% endif %}: as it is, the reward "
        "is read after the header of an answer that does not exist."
    )
    return judge("generation prompt", found, remedy, fault=is_open)


def check_end(chat: ChatTokenizer) -> Finding:
    """Whether a special token says that the answer is over; else an answer cut short looks complete."""
    _, _, after = rendered_parts(chat)
    added = chat.tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special} | set(chat.tokenizer.all_special_ids)
    ids = chat.tokenizer(after, add_special_tokens=False).input_ids
    marks = [chat.tokenizer.convert_ids_to_tokens(number) for number in ids if number in special]
    found = f"the answer is followed by {after!r}" if after else "nothing follows the answer"
    found += f", with the end mark {marks[0]}" if marks else ", with no end mark"
    remedy = (
        "End the template with the tokenizer's EOS ({{ eos_token }}) after the last answer. Without it the reward is read at "
        "the last word, and an answer that was cut short cannot be told from a whole one."
    )
    return judge("end of answer", found, remedy, fault=not after.strip(), warning=not marks, value=len(marks))


def check_prefix(chat: ChatTokenizer, preferences: Sequence[Preference]) -> Finding:
    """Whether a conversation's tokens begin with those of its prompt.

    Up to two tokens may differ at the border, where words are joined. What is not common is computed for every
    answer anew and cannot be cut.
    """
    sample = [p for p in preferences if p.prompt]
    sample = random.Random(0).sample(sample, min(200, len(sample)))
    if not sample:
        return unchecked("prompt is a prefix", "no row has a prompt")
    prompts = chat.ids([(p.prompt, p.tools) for p in sample])
    wholes = chat.ids([(p.prompt + p.answers[0], p.tools) for p in sample])
    lost = [
        len(prompt) - common_length([prompt, whole]) for prompt, whole in zip(prompts, wholes, strict=True)
    ]
    changed = sum(number > 2 for number in lost)
    share = changed / len(sample)
    kept = 1 - sum(lost) / sum(map(len, prompts))
    found = f"{changed} of {len(sample)} prompts are written differently once an answer follows; {kept:.1%} of their tokens stay"
    remedy = (
        "The template's first part changes with what follows it. Rewards stay right, but prompts cannot be shared between "
        "answers or cut. Choose a --data.chat-template that writes each message by itself."
    )
    return judge("prompt is a prefix", found, remedy, fault=False, warning=share > 0.01, value=share)


# -- the model --------------------------------------------------------------------------------------------


def stored_head(folder: Path) -> torch.Tensor | None:
    """The score head as the files of an adapter or a model hold it, or None."""
    adapter = folder / WEIGHTS
    files = [(adapter, HEAD_KEY)] if adapter.is_file() else []
    files += [(file, "score.weight") for file in sorted(folder.glob("*.safetensors")) if not files]
    for file, name in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 - not a dict
                    return tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: is damaged ({error}). Copy it again, or make it anew.") from None
    return None


def check_head(head: torch.Tensor | None) -> Finding:
    """One logit, floating point, finite, not zero; float32, or rewards are rounded."""
    again = "Train again with lora-rm, or copy the folder again: the head cannot be recovered from the other weights."
    if head is None:
        found = "there is no score head in the files; a program that opens them draws a random one"
        return judge("score head", found, again, fault=True, value=0)
    dtype = str(head.dtype).removeprefix("torch.")
    if not head.is_floating_point():
        found = f"it is stored as {dtype} of shape {list(head.shape)}: it was quantised"
        return judge("score head", found, f"Leave the head out of the quantisation. {again}", fault=True)
    if head.dim() != 2 or head.shape[0] != 1:
        found = f"its shape is {list(head.shape)}: {head.shape[0]} logits where a reward model has one"
        remedy = "Load the model with num_labels=1 before training it as a reward model."
        return judge("score head", found, remedy, fault=True, value=head.shape[0])
    broken = int((~torch.isfinite(head)).sum())
    if broken:
        found = f"{broken} of its {head.numel()} values are NaN or infinite"
        remedy = f"Training diverged: lower --train.learning-rate. {again}"
        return judge("score head", found, remedy, fault=True, value=broken)
    if not head.any():
        return judge(
            "score head",
            "all its values are 0, so every reward is 0",
            f"It was never trained. {again}",
            fault=True,
        )
    found = f"one logit over {head.shape[1]} values in {dtype}, finite, norm {float(head.detach().float().norm()):.3f}"
    remedy = (
        "It works, but 16 bits round rewards: in bfloat16 they are 1/16 apart from 8 on, and close answers become ties. "
        "Store score.weight in float32."
    )
    return judge("score head", found, remedy, fault=False, warning=head.dtype.itemsize < 4, value=1)


def padded_rewards(model: RewardModel, rows: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """Rewards of whole conversations in float32 by this library and by transformers' own pooling."""
    batching = model.batching
    with model.precise():
        ways = {"library": Scorer(model.eval()).score_ids(rows)}
        model.set_batching("padded")
        config = model.classifier.config.get_text_config()
        try:
            ways["padded right"] = _pooled(model, rows, "right")
            if hasattr(config, "rope_parameters"):  # absolute positions cannot be padded left
                ways["padded left"] = _pooled(model, rows, "left")
            ways["one by one"] = [_pooled(model, [row], "right")[0] for row in rows]
        finally:
            model.set_batching(batching)
    return ways


@torch.no_grad()
def _pooled(model: RewardModel, rows: Sequence[Sequence[int]], side: str) -> list[float]:
    """Rewards where transformers pools them: at the last token that is not the configured pad id."""
    pad = model.classifier.config.get_text_config().pad_token_id
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        blank = longest - len(row)
        ids.append([*row, *[pad] * blank] if side == "right" else [*[pad] * blank, *row])
        mask.append([1] * len(row) + [0] * blank if side == "right" else [0] * blank + [1] * len(row))
    given = torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)
    logits = model.classifier(input_ids=given[0], attention_mask=given[1], use_cache=False).logits
    return logits[:, 0].float().tolist()


def check_padding(ways: Mapping[str, Sequence[float]], tolerance: float = 1e-3) -> Finding:
    """Whether the reward is read at the same token, padded on the right, on the left, or not at all.

    Args:
        ways: Rewards of the same conversations by way of scoring; the first is compared with.
        tolerance: Largest difference allowed, as a share of the spread of rewards.
    """
    (_, expected), *others = ways.items()
    spread = standard_deviation(expected) or 1.0
    changes = {name: measure_change(expected, found).largest for name, found in others}
    worst = max(changes.values())
    text = ", ".join(f"{name} {change:.2%}" for name, change in changes.items())
    found = f"largest change of {len(expected)} rewards, in shares of their spread {spread:.3f}: {text}"
    remedy = (
        "The pad token is a token that conversations end with, or the attention mask is not used. Set pad_token_id in "
        "config.json to a special token that ends no conversation (lora-rm merge does)."
    )
    return judge("padding", found, remedy, fault=not worst <= tolerance, value=worst)


def check_swap(model: RewardModel, trees: Sequence[TokenTree]) -> Finding:
    """Whether the accuracy on swapped labels is one minus the accuracy.

    It is not if a reward depends on where its answer stands in the row, or on the answers beside it.
    """
    trees = [tree for tree in trees if ordered_pairs(tree)]
    if not trees:
        return unchecked("swapped labels", "no row says which of two answers is better")
    with model.precise():
        right, wrong = (
            evaluate(model, side).pairs.accuracy for side in (trees, [swapped(tree) for tree in trees])
        )
    found = f"accuracy {right:.1%}, with swapped labels {wrong:.1%}, together {right + wrong:.1%}"
    remedy = (
        "A reward depends on the place of its answer. Set --train.batching padded; if that mends it, the model's attention "
        "does not take several answers in a row: please report it with the model's name."
    )
    return judge("swapped labels", found, remedy, fault=abs(right + wrong - 1) > 1e-6, value=right + wrong)


def swapped(tree: TokenTree) -> TokenTree:
    """A preference whose worse answers are called the better ones, in the opposite order."""
    scores = tuple(-score for score in reversed(tree.scores))
    return dataclasses.replace(tree, answer_ids=tree.answer_ids[::-1], scores=scores)


def remembered_rewards(folder: Path, model: RewardModel) -> tuple[list[float], list[float]]:
    """The rewards that a folder says its model gives, and those it gives, in float32.

    Raises:
        ModelError: If it has none.
    """
    if model.record:
        answers = [(answer["ids"], answer["reward"]) for answer in model.record.get("canaries", [])]
    else:
        parity = bases.read_json(folder / "parity.json") if (folder / "parity.json").is_file() else {}
        stored: Any = parity.get("answers", [])
        answers = [(answer["ids"], answer["merged"]) for answer in stored]
    if not answers:
        return [], []
    with model.precise():
        return [reward for _, reward in answers], Scorer(model).score_ids([ids for ids, _ in answers])


def check_remembered(expected: Sequence[float], found: Sequence[float], allowed: float = 0.02) -> Finding:
    """Whether a saved model still gives the rewards that were saved with it.

    Args:
        expected: As saved.
        found: Now.
        allowed: Largest change, as a share of the spread.
    """
    if not expected:
        return unchecked(
            "rewards as saved", "no rewards were saved with it", "lora-rm saves some with every model."
        )
    change = measure_change(expected, found)
    text = f"{len(expected)} rewards differ from those saved by {change.largest:.2%} of their spread at most"
    remedy = (
        "Adapter, base or libraries are not those it was saved with. Compare versions and the base's revision; copy the "
        "folder again if it was copied."
    )
    return judge("rewards as saved", text, remedy, fault=not change.largest <= allowed, value=change.largest)


# -- a small training -------------------------------------------------------------------------------------


def usable_trees(
    preferences: Sequence[Preference], chat: ChatTokenizer, wanted: DataSettings
) -> list[TokenTree]:
    """Preferences with a better answer, one a prompt, the shortest first; out of at most a thousand."""
    chosen = {p.prompt_key: p for p in preferences[:1000] if decided(p)}
    trees, _ = tokenize(list(chosen.values()), chat, max_length=wanted.max_length)
    found = [tree for tree in trees if tree is not None]
    return sorted(found, key=lambda tree: len(tree.prompt_ids) + sum(map(len, tree.answer_ids)))


def training_findings(
    settings: Settings, base: BaseModel, trees: Sequence[TokenTree], adapter: Path | None = None
) -> Iterator[Finding]:
    """What a training does to a fresh model, and that it can learn sixteen pairs.

    Args:
        settings: Of the run.
        base: To train on.
        trees: The first of them are learnt.
        adapter: Of a finished run with these settings: what it changed is judged instead of five new steps.
    """
    names = ("head moves", "values move", "16 pairs learnt")
    if not trees:
        yield from (unchecked(name, "no row says which of two answers is better") for name in names)
        return
    try:
        model = RewardModel.load(
            base,
            settings=settings.model,
            adapter=settings.adapter,
            chat_template=settings.data.chat_template,
            seed=settings.seed,
        )
        model.choose_batching(settings.train.batching)
    except (LoraRmError, torch.OutOfMemoryError, OSError, ValueError, KeyError, RuntimeError) as error:
        remedy = "Do what the message says, then run the doctor again."
        yield Finding(check="opens", status="fault", found=str(error)[:600], remedy=remedy)
        return
    if adapter is None:
        yield attempt("score head", check_head, model.head.detach())
        rows = [ids for tree in trees[:8] for ids in tree.conversations()]
        yield attempt("padding", lambda: check_padding(padded_rewards(model, rows)))
        yield attempt("swapped labels", check_swap, model, trees[:NUM_SCORED])
    few = list(trees[:NUM_PAIRS])
    before = trained_values(model)
    if adapter is not None and settings.adapter.init in ("pissa", "olora", "eva"):
        yield unchecked("values move", f"adapter.init {settings.adapter.init} has no start to compare with")
    else:
        if adapter is not None:
            after = saved_values(adapter)
        else:
            say(f"Training 5 steps on {len(few)} pairs at the learning rate of the settings ...")
            take_steps(model, few, settings, 5)
            after = trained_values(model)
        rate = settings.train.learning_rate
        yield attempt("head moves", check_head_moves, before, after)
        yield attempt("values move", check_values_move, before, after, rate)
    yield attempt("16 pairs learnt", check_overfit, model, few, settings)


def take_steps(
    model: RewardModel,
    trees: Sequence[TokenTree],
    settings: Settings,
    num_steps: int,
    rate: float | None = None,
) -> None:
    """Trains by the real training loop, at one learning rate, on all preferences a step.

    Args:
        model: Trained in place.
        trees: Few.
        settings: Of the run.
        num_steps: To be taken.
        rate: Learning rate; None: that of the settings.
    """
    row = settings.train.tokens_per_microbatch
    wanted = dataclasses.replace(
        settings.train,
        num_epochs=float(num_steps),
        max_steps=num_steps,
        preferences_per_step=len(trees),
        tokens_per_microbatch=4096 if row == "auto" else row,
        learning_rate=rate or settings.train.learning_rate,
        schedule="constant",
        warmup_share=0.0,
        eval_every_steps=0,
        early_stopping=0,
        save_every_steps=0,
        trackers=(),
    )
    side = Side([], list(trees))
    with tempfile.TemporaryDirectory() as scratch, _silence():
        train(model, Data(side, side), dataclasses.replace(settings, train=wanted), RunFolder(Path(scratch)))


@contextmanager
def _silence() -> Iterator[None]:
    before = console.quiet
    console.quiet = True
    try:
        yield
    finally:
        console.quiet = before


def trained_values(model: RewardModel) -> dict[str, torch.Tensor]:
    """A copy of every trained tensor by its name in an adapter's file."""
    return {
        name.removeprefix("model.").replace(".default", "").replace(".modules_to_save", ""): p.detach()
        .cpu()
        .clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def saved_values(adapter: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an adapter's file."""
    with safe_open(adapter / WEIGHTS, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict


def check_head_moves(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Finding:
    """Whether training changes the score head."""
    if HEAD_KEY not in before or HEAD_KEY not in after:
        found = "the head is not trained at all"
        moved = 0.0
    else:
        start, end = before[HEAD_KEY].float(), after[HEAD_KEY].float()
        moved = float((end - start).norm() / start.norm().clamp_min(1e-12))
        found = f"training changed the head by {moved:.3%} of its norm"
    remedy = (
        "The head is frozen, or not among the optimizer's parameters: with PEFT it takes task_type SEQ_CLS, or "
        "modules_to_save=['score']. Rewards of a head that never moved are a random direction."
    )
    return judge("head moves", found, remedy, fault=not moved > 0, value=moved)


def check_values_move(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], rate: float
) -> Finding:
    """The share of trained values that are the same bit for bit after training.

    With bfloat16 masters a step smaller than half a unit in the last place is rounded away: at a learning rate of
    1e-5, 96 % of lora_A had not moved after 40 steps in another library.
    """
    names = [name for name in before if name in after and before[name].shape == after[name].shape]
    total = sum(before[name].numel() for name in names)
    if not total:
        found = "the trained tensors are not those that the settings make"
        return judge(
            "values move", found, "Was the adapter made with other settings? Train again.", fault=True
        )
    still = sum(int((before[name].to(after[name].dtype) == after[name]).sum()) for name in names)
    share = still / total
    kinds = sorted({str(after[name].dtype).removeprefix("torch.") for name in names})
    found = f"{share:.1%} of {total:,} trained values ({', '.join(kinds)}) are exactly what they were, at a learning rate of {rate:g}"
    remedy = (
        "Hold trained values in float32 (lora-rm does by itself; do not cast the model). If they are in float32, the "
        "gradient does not reach them: lower layers may be cut off by checkpointing or a frozen embedding."
    )
    return judge("values move", found, remedy, fault=share > 0.25, warning=share > 0.05, value=share)


def check_overfit(
    model: RewardModel, trees: Sequence[TokenTree], settings: Settings, num_rounds: int = 8
) -> Finding:
    """Whether sixteen pairs can be learnt by heart; what cannot learn sixteen learns nothing from many."""
    rate = max(settings.train.learning_rate, 1e-3)
    say(f"Learning {len(trees)} pairs by heart ...")
    num_steps = 0
    for _ in range(num_rounds):
        take_steps(model, trees, settings, 5, rate)
        num_steps += 5
        found = evaluate(model, trees, settings.loss)
        if found.pairs.accuracy == 1.0:
            break
    accuracy = found.pairs.accuracy
    text = (
        f"{accuracy:.1%} of {found.pairs.num_pairs} pairs are in the right order after {num_steps} steps at {rate:g} (loss "
        f"{found.loss:.3f})"
    )
    remedy = (
        "Look at the faults above first: a head or adapter that does not move, contradictions, answers identical after "
        "cutting. If there are none, try --adapter.rank 16 and --model.compute-dtype float32."
    )
    return judge("16 pairs learnt", text, remedy, fault=accuracy != 1.0, value=accuracy)


# -- a run ------------------------------------------------------------------------------------------------


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of a run's metrics; a last one that is not whole is left out."""
    if not run.metrics.is_file():
        return []
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def check_course(lines: Sequence[Mapping[str, Any]]) -> Finding:
    """Whether the loss fell, and no step was skipped."""
    steps = [line for line in lines if "loss" in line]
    if not steps:
        return unchecked("course of training", "no step was taken")
    losses = [line["loss"] if line["loss"] is not None else math.inf for line in steps]
    tenth = max(1, len(losses) // 10)
    first, last = statistics.mean(losses[:tenth]), statistics.mean(losses[-tenth:])
    skipped = max(line.get("num_skipped", 0) for line in steps)
    found = f"{len(steps)} steps, loss {first:.3f} in the first tenth and {last:.3f} in the last; {skipped} steps skipped"
    remedy = (
        "A loss that does not fall: raise or lower --train.learning-rate by a factor of 3, and look at the data checks. "
        "Skipped steps had a loss or gradient that was not finite: lower the learning rate."
    )
    falls = math.isfinite(last) and (last < first or len(steps) < 10)
    return judge("course of training", found, remedy, fault=not falls, warning=skipped > 0, value=last)


def check_evaluation(evaluation: Mapping[str, Any] | None) -> Finding:
    """Whether the held-out accuracy is above chance and above what length or single words give."""
    if not evaluation or "after" not in evaluation:
        return unchecked("evaluation", "the run was not evaluated", "`lora-rm eval RUN` does it.")
    after = evaluation["after"]
    accuracy, (low, high) = after["pairs"]["accuracy"], after["interval"]
    if accuracy is None:
        return unchecked("evaluation", "no held-out row says which of two answers is better")
    longer, words = after["length_baseline"], evaluation.get("bag_of_words_baseline")
    shortcut = max(longer, 1 - longer, words or 0.0)
    found = (
        f"{accuracy:.1%} of {after['pairs']['num_pairs']} held-out pairs are right (95 % interval {low:.1%} to {high:.1%}); "
        f"length or single words alone reach {shortcut:.1%}"
    )
    remedy = (
        "An interval that reaches down to 50 % or to a shortcut proves nothing. More held-out pairs make it narrower, more "
        "training pairs or steps the model better; look at the data checks for contradictions and length."
    )
    return judge("evaluation", found, remedy, fault=low <= 0.5, warning=low <= shortcut, value=accuracy)


def check_merge(parity: Mapping[str, Any] | None) -> Finding:
    """Whether the merged model was proven to give the same rewards."""
    if not parity:
        return unchecked("merge", "not merged yet", "`lora-rm merge RUN` does it, and measures the rewards.")
    largest = max(change["largest"] for change in parity["changes"].values())
    flips = parity["changes"]["library"]["pair_flips"]
    found = f"the merge changed {parity['num_answers']} rewards by {largest:.2%} of their spread at most and flipped {flips} pairs"
    remedy = "Merge again with --merge.base dequantized --merge.dtype float16 --merge.overwrite True."
    return judge("merge", found, remedy, fault=not parity["passed"], warning=flips > 0, value=largest)
