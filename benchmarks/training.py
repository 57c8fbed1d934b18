"""A training step of ours beside the step of TRL's RewardTrainer, on the same model, data, order and precision.

    python benchmarks/training.py [--quick] [--json FILE] [--work hh uf ...] [--quantization nf4 none]
    python benchmarks/training.py --checkpointing [--work hh uf ...] [--quantization nf4 none]
    python benchmarks/training.py --growth growth.svg

Both train the same adapter on SmolLM2-135M from the same start, in one process, turn by turn: ours, TRL as it comes
(gradient checkpointing), and TRL at its best (no checkpointing, the fastest of `--batches`). Every variant's losses are
compared with ours before a ratio is printed. In bfloat16 both also train in float32, where their losses must agree, and
ours may then be no further from float32 than twice the furthest of TRL's variants, or 0.05. Seconds and tokens are those of
whole optimizer steps, the first of each turn left out. Peak memory is that of the process' anonymous pages in a turn, above
those at its start. Token ids are random for the generated shapes, whose lengths are log-normal; `alpaca` and `harmless` are
real files of ../shared/data.

Shapes (medians of prompt and answer, in tokens): hh 144 / 67, tldr 334 / 31, long 589 / 137, uf 117 / 302; `lists`
has 8 answers of 67 tokens to one prompt of 144, compared in all 28 pairs.

`--checkpointing` times our step alone, turn by turn with every mode of `train.checkpointing`, whose losses must be equal to
the bit.

`--growth` times our step alone: milliseconds a token over the tokens of a row, and over the length of a conversation.
It draws with matplotlib: `pip install matplotlib`.
"""

import argparse
import ctypes
import gc
import json
import math
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainerCallback

from lora_rm.checkpoint import RunFolder
from lora_rm.config import AdapterSettings, DataSettings, ModelSettings, Settings, check_settings
from lora_rm.console import plain_errors, say, show_table
from lora_rm.data.batches import training_order
from lora_rm.data.split import Data, Side, read_side
from lora_rm.data.tokens import TokenTree
from lora_rm.model.base import BUILTIN, find_base
from lora_rm.model.checkpointing import Mode
from lora_rm.model.elementwise import fuse_elementwise, give_back_rotary
from lora_rm.model.quantization import Quantization, dtype_name
from lora_rm.model.reward_model import RewardModel
from lora_rm.train import train

SHARED = Path(__file__).parents[2] / "shared" / "data"
SHAPES = {"hh": (144, 67), "tldr": (334, 31), "long": (589, 137), "uf": (117, 302)}
FILES = {"alpaca": "alpaca_pairs_train.jsonl.gz", "harmless": "hh_harmless_test.jsonl.gz"}
WORK = [*SHAPES, "lists", *FILES]
ADAPTER = AdapterSettings(rank=16, alpha=32.0)


def main() -> None:
    """Times every kind of data in every form of storage and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="4 layers and two kinds of data: under a minute")
    parser.add_argument("--json", type=Path, help="write the table as a list of rows")
    parser.add_argument("--work", nargs="+", choices=WORK, default=None, help="kinds of data")
    parser.add_argument("--quantization", nargs="+", choices=["nf4", "none"], default=["nf4", "none"])
    parser.add_argument(
        "--layers", type=int, default=None, help="layers of the model that are used; default: all 30"
    )
    parser.add_argument(
        "--pairs", type=int, default=None, help="pairs of an optimizer step; default: 8, quick 2"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=None,
        help="optimizer steps of a turn; the first is not counted; default: 3, quick 2",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=1,
        help="turns of each, one after another, since a machine changes within minutes; default: 1, ours 2",
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        type=int,
        default=[1, 2, 4, 8],
        help="sizes of TRL's batches without checkpointing, of which the fastest counts",
    )
    parser.add_argument(
        "--compute-dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="type of the products",
    )
    parser.add_argument("--checkpointing", action="store_true", help="our step alone, with every mode")
    parser.add_argument(
        "--growth",
        type=Path,
        metavar="FILE.svg",
        help="time a token as rows and conversations grow, as a plot",
    )
    wanted = parser.parse_args()
    if wanted.growth:
        rows = growth(wanted.layers, wanted.compute_dtype)
        plot_growth(rows, wanted.growth)
        if wanted.json:
            wanted.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        return
    steps = wanted.steps or (2 if wanted.quick else 3)
    work = wanted.work or (
        ["hh", "uf"] if wanted.quick else [name for name in WORK if SHARED.is_dir() or name not in FILES]
    )
    layers = wanted.layers or (4 if wanted.quick else None)
    rows = []
    for quantization in ["nf4"] if wanted.quick else wanted.quantization:
        with Contest(quantization, layers, wanted.compute_dtype) as contest:
            for name in work:
                pairs = 28 if name == "lists" else wanted.pairs or (2 if wanted.quick else 8)
                if wanted.checkpointing:
                    rows += contest.run_modes(name, pairs, steps)
                    show_modes(rows)
                else:
                    rows.append(contest.run(name, pairs, steps, wanted.batches, wanted.turns))
                    show(rows)
                if wanted.json:
                    wanted.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def show(rows: list[dict[str, Any]]) -> None:
    """Prints what is known so far."""
    show_table(
        f"Optimizer steps, {rows[0]['layers']} layers, {rows[0]['dtype']}, {torch.get_num_threads()} CPU threads, "
        f"beside TRL {trl.__version__} with its defaults and at its best",
        ["data", "base", "pairs/s", "tokens, TRL's", "MB, TRL's", "defaults", "best", "loss off", "bf16, TRL's"],
        [
            [
                row["work"], row["quantization"], f"{row['pairs_per_second']:.2f}",
                f"{row['tokens']} {row['trl_tokens']}", f"{row['peak_mb']} {row['trl_peak_mb']}",
                f"{row['ratio_defaults']:.2f}", f"{row['ratio_best']:.2f}", f"{row['loss_difference']:.0e}",
                f"{row['rounding']:.3f} {row['trl_rounding']:.3f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def show_modes(rows: list[dict[str, Any]]) -> None:
    """Prints what is known of the modes so far."""
    show_table(
        f"Our optimizer steps, {rows[0]['layers']} layers, {rows[0]['dtype']}, {torch.get_num_threads()} CPU threads, by mode of "
        "train.checkpointing",
        ["data", "base", "mode", "seconds", "x none", "peak MB"],
        [
            [row["work"], row["quantization"], row["mode"], f"{row['seconds']:.2f}", f"{row['ratio_none']:.2f}", row["peak_mb"]]
            for row in rows
        ],
    )  # fmt: skip


class Contest:
    """Our model and TRL's, with the same weights."""

    def __init__(self, quantization: str, layers: int | None, compute_dtype: str = "auto") -> None:
        self.base = find_base(BUILTIN)
        self.scratch = tempfile.TemporaryDirectory()
        if layers:
            self.base = replace(
                self.base, path=_shortened(self.base.path, Path(self.scratch.name, "base"), layers)
            )
        self.quantization = quantization
        self.ours = RewardModel.load(
            self.base,
            settings=ModelSettings(quantization=quantization, compute_dtype=compute_dtype),
            adapter=ADAPTER,
            seed=1,
        )
        self.ours.choose_batching()
        self.dtype = self.ours.compute_dtype
        self.theirs: dict[torch.dtype, Any] = {}
        self.start = {name: p.detach().clone() for name, p in trained(self.ours.model)}

    def _load_theirs(self, dtype: torch.dtype) -> Any:
        stored = Quantization(kind=self.quantization, double=True, load_dtype=torch.bfloat16)
        plain = AutoModelForSequenceClassification.from_pretrained(
            self.base.path, num_labels=1, dtype=dtype, quantization_config=stored.config(dtype)
        )
        plain.config.pad_token_id = self.ours.chat.pad_id
        return get_peft_model(
            plain, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear")
        )

    def __enter__(self) -> "Contest":
        return self

    def __exit__(self, *_: object) -> None:
        self.scratch.cleanup()

    def run(self, name: str, per_step: int, steps: int, sizes: list[int], turns: int) -> dict[str, Any]:
        """One row of the table; `sizes` are those of TRL's batches at its best, ours has a turn more than TRL."""
        trees = make_trees(name, per_step * steps, self.ours.chat)
        batches = [size for size in sizes if per_step % size == 0]
        if not batches:
            raise SystemExit(f"{name}: none of the batches {sizes} divides a step of {per_step} pairs")
        for dtype in {self.dtype, torch.float32} - self.theirs.keys():
            self.theirs[dtype] = self._load_theirs(dtype)  # before memory is watched
        found: dict[Any, list[float]] = {}
        losses_of, padded, peaks = {}, {}, {}
        variants = ["defaults", *batches]
        for variant in [*["ours", *variants] * turns, "ours"]:
            say(f"{name}, {self.quantization}: {variant if variant == 'ours' else f'TRL {variant}'} ...")
            with peak_memory() as peak:
                if variant == "ours":
                    losses, seconds, tokens = self.train_ours(trees, per_step, steps)
                else:
                    size = min(8, per_step) if variant == "defaults" else variant
                    size = next(s for s in range(size, 0, -1) if per_step % s == 0)
                    losses, seconds, padded[variant] = self._train_theirs(
                        trees, per_step, steps, size, checkpointing=variant == "defaults"
                    )
            assert losses_of.setdefault(variant, losses) == losses
            found.setdefault(variant, []).extend(seconds)
            # of the first turn: later the allocator has pages of turns before
            peaks.setdefault(variant, peak[0])
        losses = losses_of.pop("ours")
        exact, others = losses, list(losses_of.values())
        if self.dtype != torch.float32:
            say(f"{name}, {self.quantization}: both in float32 ...")
            with self.ours.precise():
                exact, _, _ = self.train_ours(trees, per_step, steps)
            others = [self._train_theirs(trees, per_step, steps, batches[0], dtype=torch.float32)[0]]
        difference = max(_distance(exact, other) for other in others)
        rounding = _distance(losses, exact)
        trl_rounding = max(_distance(other, others[0]) for other in losses_of.values())
        if difference > (1e-4 if self.quantization == "none" else 0.05):
            raise SystemExit(f"{name}: losses differ by {difference:.2e}; no ratio would mean anything")
        if rounding > max(0.05, 2 * trl_rounding):
            raise SystemExit(
                f"{name}: bfloat16 moves our losses by {rounding:.2e} and TRL's by {trl_rounding:.2e}; no ratio would mean anything"
            )
        own = statistics.median(found["ours"])
        best = min(batches, key=lambda size: statistics.median(found[size]))
        return {
            "work": name, "quantization": self.quantization, "dtype": dtype_name(self.dtype),
            "layers": len(self.ours.layers), "pairs_per_step": per_step, "steps": steps - 1,
            "pairs_per_second": per_step / own, "tokens": tokens, "trl_tokens": padded[best],
            "ratio_defaults": statistics.median(found["defaults"]) / own,
            "ratio_best": statistics.median(found[best]) / own, "best_batch": best,
            "loss_difference": difference, "rounding": rounding, "trl_rounding": trl_rounding, "seconds": own, "peak_mb": round(peaks["ours"]),
            "trl_peak_mb": round(peaks[best]), "trl_defaults_peak_mb": round(peaks["defaults"]),
        }  # fmt: skip

    def run_modes(self, name: str, per_step: int, steps: int) -> list[dict[str, Any]]:
        """A row for every mode of checkpointing, all of the same steps."""
        trees = make_trees(name, per_step * steps, self.ours.chat)
        modes: tuple[Mode, ...] = ("none", "selective", "full")
        seconds: dict[Mode, list[float]] = {mode: [] for mode in modes}
        peaks: dict[Mode, float] = {}
        losses = []
        for mode in modes * 2:  # the machine may change meanwhile
            say(f"{name}, {self.quantization}: {mode} ...")
            with peak_memory() as peak:
                found, taken, _ = self.train_ours(trees, per_step, steps, mode)
            losses.append(found)
            seconds[mode] += taken
            peaks[mode] = peak[0]
        if any(found != losses[0] for found in losses):
            raise SystemExit(f"{name}: modes differ in their losses: {losses}")
        median = {mode: statistics.median(seconds[mode]) for mode in modes}
        return [
            {
                "work": name, "quantization": self.quantization, "dtype": dtype_name(self.dtype),
                "layers": len(self.ours.layers), "pairs_per_step": per_step, "steps": steps - 1, "mode": mode,
                "seconds": median[mode], "ratio_none": median[mode] / median["none"], "peak_mb": round(peaks[mode]),
            }
            for mode in modes
        ]  # fmt: skip

    def train_ours(
        self, trees: list[TokenTree], per_step: int, steps: int, checkpointing: Mode = "none"
    ) -> tuple[list[float], list[float], int]:
        """Our losses of every step, and the seconds and tokens of all but the first."""
        put(self.start, self.ours.model)
        self.ours.set_checkpointing([checkpointing] * len(self.ours.layers))
        settings = run_settings(Path(self.scratch.name) / f"run{time.monotonic_ns()}", per_step, steps)
        run = RunFolder.create(settings)
        train(self.ours, Data(Side([], trees), Side([], [])), settings, run)
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        return (
            [x["loss"] for x in lines],
            [x["seconds"] for x in lines[1:]],
            sum(x["num_tokens"] for x in lines[1:]),
        )

    def _train_theirs(
        self,
        trees: list[TokenTree],
        per_step: int,
        steps: int,
        size: int,
        *,
        checkpointing: bool = False,
        dtype: torch.dtype | None = None,
    ) -> tuple[list[float], list[float], int]:
        dtype = dtype or self.dtype
        model = self.theirs[dtype]
        order = training_order(len(trees), steps, per_step, 0, [tree.group for tree in trees])
        rows = [trees[number].conversations() for step in order for number in step]
        clock = Clock()
        args = trl.RewardConfig(
            output_dir=self.scratch.name, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            bf16=dtype == torch.bfloat16, gradient_checkpointing=checkpointing, logging_steps=1, max_length=None,
            lr_scheduler_type="constant", learning_rate=1e-4, per_device_train_batch_size=size, max_grad_norm=1.0,
            gradient_accumulation_steps=per_step // size, train_sampling_strategy="sequential", num_train_epochs=1,
        )  # fmt: skip
        trainer = trl.RewardTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([{"chosen_ids": a, "rejected_ids": b} for a, b in rows]),
            processing_class=self.ours.chat.tokenizer,
            callbacks=[clock],
        )
        collate = trainer.data_collator
        tokens = []

        def counted(examples: list[dict[str, Any]]) -> Any:
            batch = collate(examples)
            tokens.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counted
        for _, parameter in trained(model):
            parameter.data = (
                parameter.data.float()
            )  # TRL makes them bfloat16 on 4-bit bases: the same precision here
        put(self.start, model)
        silence(trainer)
        give_back_rotary()  # the one part of our step that other models of the family would get
        trainer.train()
        fuse_elementwise(self.ours.model)
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()  # which only checkpointing needs
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, clock.seconds[1:], sum(tokens[per_step // size :])


def _distance(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Anonymous memory of the process at its highest, above that at the start, in MB; known at the end."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the turn before has freed

    def anonymous() -> float:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024 / 1e6

    before, found, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            found[0] = max(found[0], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def growth(layers: int | None, compute_dtype: str) -> list[dict[str, Any]]:
    """Milliseconds a token of a forward and a backward pass, as rows and as conversations grow."""
    rows = []
    with Contest("nf4", layers, compute_dtype) as contest:
        generator = random.Random(0)

        def pair(length: int) -> TokenTree:
            prompt, answer = [
                [generator.randrange(1000, 40000) for _ in range(n)] for n in (2 * length // 3, length // 3)
            ]
            return TokenTree(prompt, (answer, answer[::-1]))

        work = [("tokens of a row", n * 256, [pair(192) for _ in range(n)]) for n in (1, 2, 4, 8, 16)]
        work += [
            ("tokens of a conversation", n, [pair(n) for _ in range(3072 // n)])
            for n in (96, 192, 384, 768, 1536, 3072)
        ]
        for what, size, trees in work:
            taken = []
            for _ in range(3):
                contest.ours.zero_grad()
                started = time.perf_counter()
                batch = contest.ours.batch(trees)
                contest.ours.rewards(batch).sum().backward()
                taken.append(time.perf_counter() - started)
            tokens = batch.input_ids.numel()
            rows.append(
                {"over": what, "size": size, "tokens": tokens, "ms_per_token": 1e3 * min(taken) / tokens}
            )
            say(f"{what}: {size} ({tokens} in the row): {rows[-1]['ms_per_token']:.2f} ms a token")
    return rows


def plot_growth(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws both curves."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axis, over in zip(axes, ("tokens of a row", "tokens of a conversation"), strict=True):
        points = [(row["size"], row["ms_per_token"]) for row in rows if row["over"] == over]
        axis.plot(*zip(*points, strict=True), "o-")
        axis.set(xlabel=over, xscale="log", ylim=0)
        axis.set_xticks([size for size, _ in points], [str(size) for size, _ in points])
        axis.minorticks_off()
    axes[0].set_ylabel("ms a token")
    figure.tight_layout()
    figure.savefig(file)


class Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops."""
        self.seconds.append(time.perf_counter() - self.started)


def silence(trainer: Any) -> None:
    """Keeps the trainer from printing its own lines."""
    trainer.callback_handler.callbacks = [
        callback
        for callback in trainer.callback_handler.callbacks
        if "Printer" not in type(callback).__name__
    ]


def make_trees(name: str, count: int, chat: Any) -> list[TokenTree]:
    """Pairs of one kind of data, as token ids."""
    if name in FILES:
        settings = DataSettings(
            eval=str(SHARED / FILES[name]),
            max_eval=count,
            max_length=1024,
            max_dropped_share=1.0,
            on_bad_row="skip",
        )
        return read_side(settings, chat, seed=0).trees
    generator = random.Random(f"{name} {count}")

    def ids(median: int) -> list[int]:
        length = min(1024, max(4, round(median * math.exp(generator.gauss(0, 0.6)))))
        return [generator.randrange(1000, 40000) for _ in range(length)]

    if name == "lists":
        return [
            replace(tree, group=f"list {number}")
            for number in range(count // 28)
            for tree in _all_pairs(ids(144), [ids(67) for _ in range(8)])
        ]
    prompt, answer = SHAPES[name]
    return [TokenTree(ids(prompt), (ids(answer), ids(answer))) for _ in range(count)]


def _all_pairs(prompt: list[int], answers: list[list[int]]) -> list[TokenTree]:
    return [TokenTree(prompt, pair) for pair in combinations(answers, 2)]


def run_settings(folder: Path, per_step: int, steps: int) -> Settings:
    """Settings of our side that match TRL's."""
    return check_settings(
        {
            "output_dir": str(folder),
            "model": {"base": BUILTIN},
            "data": {"train": "builtin:checkable"},
            "train": {
                "preferences_per_step": per_step, "max_steps": steps, "schedule": "constant", "warmup_share": 0.0,
                "learning_rate": 1e-4, "checkpointing": "none", "save_every_steps": 0, "log_every_steps": 1000,
            },
        }
    )  # fmt: skip


def trained(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and values of what is trained."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def put(values: dict[str, torch.Tensor], model: Any) -> None:
    """Gives a model the start that every turn has."""
    own = dict(trained(model))
    assert own.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])


def _shortened(folder: Path, target: Path, layers: int) -> Path:
    """A copy of a model that has its first layers only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


if __name__ == "__main__":
    with plain_errors():
        main()
