"""The run folder: what lies where, checkpoints that are whole or not there, and the way back from one.

RUN/
config.yaml        the settings, resolved, with whole paths; runs again as a preset
data.json          rows kept, dropped and cut, by reason
metrics.jsonl      one line a step
inputs.json        SHA-256 of the base and of both sides of the data: a run goes on with no others
checkpoints/       step-000100/ ..., best-000080/: everything the next step depends on
adapter/           LoRA matrices, score head, tokenizer, lora_rm.json
eval.json          held-out accuracy before and after training
held_out.json      token ids of held-out answers that verification scores
merged/            the merged model: a transformers folder
parity.json        rewards before and after the merge
export/            one folder a target
summary.json       the numbers of the last table
lora_rm/           what trackers write, if there are any
"""

import contextlib
import importlib.metadata
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_rm.config import Settings, dump_settings, flat, load_settings, with_whole_paths
from lora_rm.console import say
from lora_rm.errors import ConfigError, ModelError, storing
from lora_rm.model.base import file_sha256
from lora_rm.model.record import RECORD
from lora_rm.model.tensor_files import load_tensors, save_tensors
from lora_rm.processes import IS_FIRST, wait
from lora_rm.unfinished import has_lock, write_atomically

HARMLESS = (
    "train.log_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.trackers",
    "train.max_skipped_steps",
    "model.base",
    "data.train",
    "data.eval",
    "merge",
    "verify",
)
"""Settings and sections that do not change what is trained: they may differ at resume, if that is allowed.

Base and data may lie elsewhere now; what they hold is compared by hashes (inputs.json) whatever they are called.
"""

CONTENTS = (
    "config.yaml", "data.json", "metrics.jsonl", "inputs.json", "checkpoints", "adapter", "eval.json", "held_out.json",
    "merged", "parity.json", "export", "summary.json", "lora_rm",
)  # fmt: skip
"""What a run makes; nothing else in its folder is ever removed."""

_REPLACED: dict[str, Settings] = {}
"""Run folders whose earlier run lies there until `begin`, and the settings of the run in its place."""

_LOCKS: dict[str, int] = {}
"""Run folders that this process has locked, and the descriptors that hold the locks."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @classmethod
    def create(cls, settings: Settings, resume: bool = False, *, allow: bool = False) -> "RunFolder":
        """Makes the folder of a new run, or finds that of an interrupted one, and locks it.

        A run to be overwritten lies there until `begin`.

        Args:
            settings: Of the run.
            resume: Go on with the run that lies there.
            allow: Resume although settings of `HARMLESS` differ; the run then has the new ones.

        Raises:
            ConfigError: If a run lies there already and neither `resume` nor `overwrite` says what to do with
                it, if the settings to resume with would make it another run, or if another process works in it.
            StorageError: If the folder cannot be written.
        """
        run, settings = cls(Path(settings.output_dir)), with_whole_paths(settings)
        if not IS_FIRST:  # the first process decides, and fails for all
            wait()
            return run
        try:
            return cls._create(run, settings, resume, allow)
        finally:
            wait()

    @classmethod
    def _create(cls, run: "RunFolder", settings: Settings, resume: bool, allow: bool) -> "RunFolder":
        _REPLACED.pop(os.path.realpath(run.path), None)  # of one that could not begin
        if resume:
            _check_same(run, settings, allow)
            run.lock()
            # written in any case: a folder that became read-only is told before the base is loaded
            write_atomically(run.config, dump_settings(replace(settings, overwrite=False)))
            with storing(run.checkpoints):
                for stale in run.checkpoints.glob(".*"):
                    shutil.rmtree(stale)
            return run
        if run.config.exists():
            if run.is_begun() and not settings.overwrite:
                raise ConfigError(
                    f"{run.path}: a run lies here already. Choose another output_dir, go on with "
                    f"`lora-rm train {run.config} --resume`, or replace it with --overwrite True."
                )
            try:
                run.settings()
            except ConfigError as error:
                raise ConfigError(
                    f"{run.config}: is not overwritten, since it is damaged, or another program's ({error}). Choose another "
                    "output_dir, or remove the file yourself."
                ) from None
        elif run.path.is_dir() and any(not path.name.startswith(".") for path in run.path.iterdir()):
            raise ConfigError(f"{run.path}: is not empty and no run of lora_rm. Choose another output_dir.")
        run.lock()
        _REPLACED[os.path.realpath(run.path)] = settings
        if not (run.config.exists() and run.is_begun()):
            run._empty()
        return run

    def begin(self) -> None:
        """Removes the run that is to be overwritten: whatever could refuse the new one has not.

        Every process calls it.
        """
        wait()  # for those that still read data
        if IS_FIRST:
            self._empty()
        wait()

    def _empty(self) -> None:
        """Makes the folder that of a new run, once."""
        settings = _REPLACED.pop(os.path.realpath(self.path), None)
        if settings is None:
            return
        with storing(self.path):
            for path in self.path.iterdir():  # not the folder itself: it is what the lock holds
                if path.name in CONTENTS or (path.name.startswith(".") and path.suffix == ".partial"):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        # an order to overwrite is for once: who runs the file again by mistake loses nothing
        write_atomically(self.config, dump_settings(replace(settings, overwrite=False)))

    def lock(self) -> None:
        """Keeps other processes from writing into this run until this process ends, however it ends.

        Raises:
            ConfigError: If another process writes into it; naming that process.
        """
        key = os.path.realpath(self.path)
        if key in _LOCKS:
            return
        with storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
        if not has_lock(descriptor):
            other = _lock_owner(descriptor)
            os.close(descriptor)
            raise ConfigError(
                f"{self.path}: {other} works in this run folder. Wait until it ends, stop it, or choose another output_dir."
            )
        _LOCKS[key] = descriptor

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """The folder of an earlier run.

        Raises:
            ConfigError: If it is none.
        """
        run = cls.find(Path(path))
        if run is None:
            raise ConfigError(
                f"{path}: is no run folder (it has no config.yaml). Give the output_dir of a run."
            )
        return run

    @classmethod
    def find(cls, path: Path) -> "RunFolder | None":
        """The run that a folder is, or None if it is something else."""
        run = cls(path)
        return run if run.config.is_file() else None

    def is_begun(self) -> bool:
        """Whether anything would be lost if another run began here; a start that failed leaves settings and counts."""
        for path in (self.metrics, self.checkpoints, self.adapter, self.merged, self.exports):
            if any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size:
                return True
        with contextlib.suppress(ConfigError):  # another program's file
            # a preset that somebody wrote by hand would be lost too
            return dump_settings(self.settings()) != self.config.read_text(encoding="utf-8")
        return True

    def trained(self) -> Path:
        """The adapter of a run that is over.

        Raises:
            ModelError: If training did not reach its end.
        """
        if not (self.adapter / RECORD).is_file():
            raise ModelError(
                f"{self.path}: holds no adapter yet: its training did not reach the end. Go on with "
                f"`lora-rm train {self.config} --resume`."
            )
        return self.adapter

    def settings(self) -> Settings:
        """The settings the run was started with.

        Raises:
            ConfigError: If there is no run, or its file cannot be read.
        """
        if not self.config.is_file():
            raise ConfigError(f"{self.path}: there is no run to resume. Start one without --resume.")
        return load_settings(self.config)

    config = property(lambda self: self.path / "config.yaml")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    checkpoints = property(lambda self: self.path / "checkpoints")
    adapter = property(lambda self: self.path / "adapter")
    merged = property(lambda self: self.path / "merged")
    exports = property(lambda self: self.path / "export")

    def write_json(self, name: str, values: Any) -> Path:
        """Writes a JSON file into the folder, whole or not at all."""
        file = self.path / name
        if not IS_FIRST:
            return file
        write_atomically(file, json.dumps(values, indent=1, ensure_ascii=False))
        return file

    def read_json(self, name: str) -> Any:
        """A JSON file of the folder, or None if there is none.

        Raises:
            ConfigError: If it is damaged.
        """
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except ValueError as error:
            raise ConfigError(f"{file}: is damaged ({error}). Make it anew, or copy the run again.") from None


def _check_same(run: RunFolder, settings: Settings, allow: bool) -> None:
    """Refuses to go on with settings that would make another run of it."""
    earlier, now = (flat(values) for values in (with_whole_paths(run.settings()), settings))
    for values in (earlier, now):
        for name in ("overwrite", "output_dir"):  # say nothing about the run, whose folder may have moved
            values.pop(name)
    differing = sorted(name for name in now if now[name] != earlier[name])
    serious = [n for n in differing if n not in HARMLESS and n.partition(".")[0] not in HARMLESS]
    if not differing or (allow and not serious):
        return
    changes = "; ".join(f"{name} was {earlier[name]!r}, is {now[name]!r}" for name in serious or differing)
    remedy = (
        "They would make another run of it: choose another output_dir for that"
        if serious
        else "They do not change what is trained: add --resume.allow"
    )
    raise ConfigError(
        f"{run.config}: settings differ from those of the run to be resumed ({changes}). {remedy}, or go on with what was "
        f"set: `lora-rm train {run.config} --resume`."
    )


def _lock_owner(descriptor: int) -> str:
    """The process that has locked an open folder, in words; Linux lists them."""
    with contextlib.suppress(OSError, ValueError):
        inode = str(os.fstat(descriptor).st_ino)
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                words = Path(f"/proc/{fields[4]}/cmdline").read_text(encoding="utf-8").split("\0")
                return f"process {fields[4]} ({' '.join(' '.join(words).split())[:80]})"
    return "another process"


def save_checkpoint(
    folder: Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    progress: dict[str, Any],
) -> None:
    """Writes everything that the next step depends on, then moves it into place.

    Tensors go to safetensors and the rest to JSON, so nothing is unpickled at resume. `manifest.json` holds
    the SHA-256 of the others.

    Args:
        folder: Where the checkpoint will lie; an older one there is replaced.
        model: Its trainable parameters are stored, in float32.
        optimizer: Its moments are stored bit for bit.
        scheduler: Of the learning rate.
        progress: Plain values: step, best loss, counts.

    Raises:
        StorageError: If the disk is full; the checkpoints that are there stay whole.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with storing(folder):
            partial.mkdir(parents=True)
            _write_checkpoint(partial, model, optimizer, scheduler, progress)
            for file in [*partial.iterdir(), partial]:
                _flush(file)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            _flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    progress: dict[str, Any],
) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    weights = {name: p.detach().cpu().contiguous() for name, p in trainable(model)}
    save_tensors(weights, folder / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            name = f"{names[id(parameter)]}/{key}"
            if isinstance(value, torch.Tensor):
                tensors[name] = value.detach().cpu().contiguous()
            else:
                plain[name] = value
    save_tensors(tensors, folder / "optimizer.safetensors")
    save_tensors(_random_tensors(), folder / "random.safetensors")
    state = {
        "progress": progress,
        "optimizer": plain,
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"},
        "random": _random_plain(),
        "versions": _versions(),
    }
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    manifest = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def load_checkpoint(
    folder: Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, Any]:
    """Puts model, optimizer, schedule and random states back; returns the progress.

    Raises:
        ModelError: If the checkpoint belongs to a model with other trainable parameters, or is damaged.
    """
    load_weights(folder, model)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    by_name = dict(trainable(model))
    optimizer.state.clear()
    for name, value in [*load_tensors(folder / "optimizer.safetensors").items(), *state["optimizer"].items()]:
        parameter_name, key = name.rsplit("/", 1)
        parameter = by_name[parameter_name]
        if isinstance(value, torch.Tensor):  # the step too: fused AdamW counts on the device
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
    scheduler.load_state_dict({**scheduler.state_dict(), **state["scheduler"]})
    for group, rate in zip(optimizer.param_groups, state["scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    _restore_random(load_tensors(folder / "random.safetensors"), state["random"])
    return state["progress"]


def changed_versions(folder: Path) -> list[str]:
    """Libraries that are not what they were when a checkpoint was saved, in words."""
    known = json.loads((folder / "state.json").read_text(encoding="utf-8")).get("versions", {})
    now = _versions()
    return [
        f"{name} was {known[name]}, is {now[name]}" for name in now if known.get(name, now[name]) != now[name]
    ]


def _versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")
    }


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Puts the trainable parameters of a checkpoint back.

    Raises:
        ModelError: If they are not those of this model.
    """
    stored = load_tensors(folder / "model.safetensors")
    own = dict(trainable(model))
    if stored.keys() != own.keys() or any(stored[name].shape != own[name].shape for name in own):
        raise ModelError(
            f"{folder}: its parameters are not those of this model. Was the adapter changed since?"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a sentence about each newer one that was passed over."""
    passed_over: list[str] = []
    for candidate in reversed(_by_number(folder, "step")):
        fault = find_fault(candidate) or _fault_of_best(candidate)
        if not fault:
            return candidate, passed_over
        passed_over.append(f"{candidate.name} was passed over: {fault}.")
    return None, passed_over


def set_aside(folder: Path, chosen: Path | None) -> None:
    """Renames checkpoints newer than the chosen one, which were passed over: they must not be kept in whole ones' place.

    Raises:
        StorageError: If they cannot be renamed.
    """
    for checkpoint in _by_number(folder, "step"):
        if chosen is None or _number(checkpoint) > _number(chosen):
            aside = checkpoint.with_name(f"unusable-{checkpoint.name}")
            with storing(aside):
                if aside.exists():
                    shutil.rmtree(aside)
                checkpoint.rename(aside)


def _by_number(folder: Path, kind: str) -> list[Path]:
    """Checkpoints of a kind, step or best, oldest first; other names, as of a user's copy, are none."""
    found = [path for path in folder.glob(f"{kind}-*") if re.fullmatch(rf"{kind}-[0-9]{{6,}}", path.name)]
    return sorted(found, key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def remove_old(folder: Path, keep: int, best_step: int) -> None:
    """Removes all but the newest checkpoints, the best one, and those that a kept one calls the best."""
    newest = _by_number(folder, "step")
    wanted = {best_step}
    for checkpoint in newest[-keep:]:
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: no run goes on from it
            wanted.add(_best_step(checkpoint))
    best = [path for path in _by_number(folder, "best") if _number(path) not in wanted]
    for old in [*newest[:-keep], *best]:
        # out of the way at once: what is half removed must not look like a damaged checkpoint
        try:
            removed = old.rename(old.with_name(f".{old.name}.removed"))
            shutil.rmtree(removed)
        except OSError as error:  # no reason to stop: what is new is saved
            say(f"{old}: cannot be removed ({error.strerror or error}); training goes on.")


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and values of the parameters that are trained."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _best_step(checkpoint: Path) -> int:
    """The step that a checkpoint calls the best, 0 if none was evaluated until then."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return state["progress"].get("best_step", 0)


def _fault_of_best(checkpoint: Path) -> str:
    """Why the state that a whole checkpoint calls the best could not be put back, or nothing; it may be that state itself."""
    step = _best_step(checkpoint)
    if step in (0, _number(checkpoint)):
        return ""
    best = checkpoint.with_name(f"best-{step:06d}")
    fault = find_fault(best)
    return fault and f"the state it calls the best, {best.name}, cannot be put back, since {fault}"


def find_fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            return "its manifest is no list of files"
        for name, expected in manifest.items():
            if Path(name).name != name or not (checkpoint / name).is_file():
                return f"{name[:80]} is missing or no file of its own"
            if file_sha256(checkpoint / name) != expected:
                return f"{name} is damaged"
    except (OSError, ValueError) as error:
        return f"its manifest or a file in it cannot be read ({error})"
    return ""


def _flush(path: Path) -> None:
    """Waits until a file's or folder's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_tensors() -> dict[str, torch.Tensor]:
    states = {"torch": torch.get_rng_state()}
    for number in range(torch.cuda.device_count()):
        states[f"cuda.{number}"] = torch.cuda.get_rng_state(number)
    states["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # type: ignore[index]
    return states


def _random_plain() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, _, position, has_gauss, cached = np.random.get_state()
    return {"python": [version, list(internal), gauss], "numpy": [name, position, has_gauss, cached]}


def _restore_random(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    for number in range(torch.cuda.device_count()):
        if f"cuda.{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{number}"], number)
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    name, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
