"""Numbers of a training run: metrics.jsonl, a display or plain lines, and trackers."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_rm.console import console, say
from lora_rm.data.tokens import TokenTree
from lora_rm.errors import storing
from lora_rm.evaluate import PairCount, ordered_pairs, without_nan
from lora_rm.processes import IS_FIRST


class StepSums:
    """Sums over the microbatches of one step."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.num_preferences = 0
        self.num_tokens = 0
        self.pairs = PairCount()
        self.margins = 0.0
        self.rewards: list[float] = []

    def add(
        self, trees: Sequence[TokenTree], losses: torch.Tensor, rewards: list[float], tokens: int
    ) -> None:
        """Adds a microbatch: its N losses, R rewards and tokens computed."""
        self.loss += float(losses.sum())
        self.num_preferences += len(trees)
        self.num_tokens += tokens
        self.rewards += rewards
        start = 0
        for tree in trees:
            own = rewards[start : start + len(tree.answer_ids)]
            start += len(own)
            for better, worse in ordered_pairs(tree):
                difference = own[better] - own[worse]
                self.margins += difference
                self.pairs += PairCount.of(difference)

    def to_json(self) -> dict[str, float | None]:
        """Means over the step; null where there is nothing to take a mean of."""
        rewards = torch.tensor(self.rewards, dtype=torch.float64)
        values = {
            "loss": self.loss / max(1, self.num_preferences),
            "accuracy": self.pairs.accuracy,
            "margin": self.margins / self.pairs.num_pairs if self.pairs.num_pairs else math.nan,
            "reward_mean": float(rewards.mean()),
            "reward_spread": float(rewards.std(correction=0)),
        }
        return without_nan(values)


def sum_steps(parts: Sequence[StepSums]) -> StepSums:
    """The sums of one step over all processes."""
    whole = parts[0]
    for part in parts[1:]:
        whole.loss += part.loss
        whole.num_preferences += part.num_preferences
        whole.num_tokens += part.num_tokens
        whole.pairs += part.pairs
        whole.margins += part.margins
        whole.rewards += part.rewards
    return whole


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl but those that cannot be read or have no step: a kill can leave half of one."""
    lines: list[dict[str, Any]] = []
    if not file.is_file():
        return lines
    for line in file.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("step"), int):
                lines.append(found)
    return lines


class MetricsLog:
    """Writes one JSON object a step, and shows it."""

    def __init__(
        self, file: Path, num_steps: int, *, first_step: int = 0, every: int = 1, accelerator: Any = None
    ) -> None:
        """Opens the file for appending; what is in it stays.

        A run that goes on from a checkpoint repeats the steps after it, and with the same numbers: their lines are
        there already and are not written again. Half a line at the end, left by a kill, goes.

        Args:
            file: metrics.jsonl.
            num_steps: Optimizer steps of the whole run.
            first_step: Steps done before.
            every: Steps between shown lines; every step is written.
            accelerator: Whose trackers get the numbers too.
        """
        self.num_steps = num_steps
        self.every = every
        self.accelerator = accelerator
        self.start = time.monotonic()
        self.first_step = first_step
        if not IS_FIRST:
            file = Path(os.devnull)
        self.file = file
        with storing(file):
            self.stream = file.open("a+b", buffering=0)
            self.stream.seek(0)
            lines = self.stream.readlines()
            if lines and not lines[-1].endswith(b"\n"):
                self.stream.truncate(self.stream.tell() - len(lines.pop()))
        self.written = {(line["step"], "eval" in line) for line in read_metrics(file)}
        self.bar: Progress | None = None

    @contextmanager
    def display(self) -> Iterator[None]:
        """A live progress line on a terminal; elsewhere plain lines, printed by `step`."""
        try:
            if not console.is_terminal:
                yield
                return
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            with Progress(*columns, console=console) as self.bar:
                self.task = self.bar.add_task("", total=self.num_steps, completed=self.first_step)
                yield
        finally:
            self.bar = None
            self.stream.close()

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Writes and shows the numbers of a training step."""
        self._write({"step": step, **values})
        shown = f"loss {_short(values['loss'])}  accuracy {_short(values['accuracy'])}  margin {_short(values['margin'])}"
        shown += f"  reward {_short(values['reward_mean'])} ± {_short(values['reward_spread'])}"
        shown += f"  grad {_short(values['grad_norm'])}  lr {values['learning_rate']:.1e}  {values['tokens_per_second']:.0f} tok/s"
        if "memory_gib" in values:
            shown += f"  {values['memory_gib']:.1f} GiB"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=shown)
        elif step % self.every == 0 or step == self.num_steps:
            left = (time.monotonic() - self.start) / max(1, step - self.first_step) * (self.num_steps - step)
            say(f"step {step}/{self.num_steps}  {shown}  {left:.0f} s left")

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Writes the numbers of an evaluation; its line has `eval` instead of training numbers."""
        self._write({"step": step, "eval": without_nan(values)})

    def flush(self) -> None:
        """Waits until all lines are on the disk: a checkpoint that outlives them could not bring them back."""
        with storing(self.file):
            os.fsync(self.stream.fileno())

    def _write(self, values: dict[str, Any]) -> None:
        key = (values["step"], "eval" in values)
        if key in self.written:
            return
        self.written.add(key)
        with storing(self.file):
            line = memoryview((json.dumps(values) + "\n").encode())
            while line:
                line = line[self.stream.write(line) :]
        if self.accelerator is not None and self.accelerator.trackers:
            flat = {f"eval/{k}": v for k, v in values["eval"].items()} if "eval" in values else values
            numbers = {k: v for k, v in flat.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log(numbers, step=values["step"])


def memory_gib(device: torch.device) -> float:
    """Peak memory of the device's tensors, or of the process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
