"""Checks that train: does everything move, and can sixteen pairs be learnt."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_rm.checkpoint import RunFolder
from lora_rm.config import DataSettings, Settings
from lora_rm.console import console, say
from lora_rm.data.preference import Preference
from lora_rm.data.split import Data, Side
from lora_rm.data.tokens import ChatTokenizer, TokenTree, tokenize
from lora_rm.doctor.finding import AGAIN, NUM_PAIRS, NUM_SCORED, Finding, attempt, judge, unchecked
from lora_rm.doctor.rewards import check_head, check_padding, check_swap, padded_rewards
from lora_rm.errors import LoraRmError
from lora_rm.evaluate import evaluate, ordered_pairs
from lora_rm.model.adapter import WEIGHTS
from lora_rm.model.base import BaseModel
from lora_rm.model.quantization import dtype_name
from lora_rm.model.record import HEAD_KEY
from lora_rm.model.reward_model import RewardModel
from lora_rm.model.tensor_files import load_tensors
from lora_rm.train import train


def usable_trees(
    preferences: Sequence[Preference], chat: ChatTokenizer, wanted: DataSettings
) -> list[TokenTree]:
    """Preferences with a better answer, one a prompt, the shortest first; out of at most a thousand."""
    chosen = {p.prompt_key: p for p in preferences[:1000] if ordered_pairs(p)}
    trees, _ = tokenize(
        list(chosen.values()),
        chat,
        max_length=wanted.max_length,
        length_policy=wanted.length_policy,
        on_bad_row=wanted.on_bad_row,
    )
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
            adapter=dataclasses.replace(settings.adapter, start_from=None) if adapter else settings.adapter,
            data=settings.data,
            seed=settings.seed,
        )
        model.choose_batching(settings.train.batching)
    except (LoraRmError, torch.OutOfMemoryError, OSError, ValueError, KeyError, RuntimeError) as error:
        yield judge("opens", str(error)[:600], AGAIN, fault=True)
        return
    if adapter is None:
        yield attempt("score head", check_head, model.head.detach())
        rows = [ids for tree in trees[:8] for ids in tree.conversations()]
        yield attempt("padding", lambda: check_padding(padded_rewards(model, rows)))
        yield attempt("swapped labels", check_swap, model, trees[:NUM_SCORED])
    few = list(trees[:NUM_PAIRS])
    before = trained_values(model)
    start = settings.adapter
    if adapter is not None and (start.init in ("pissa", "olora", "eva") or start.start_from is not None):
        how = "adapter.start_from" if start.start_from else f"adapter.init {start.init}"
        yield unchecked("values move", f"{how} has no start to compare with")
    else:
        if adapter is not None:
            after = load_tensors(adapter / WEIGHTS)
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
    wanted = dataclasses.replace(
        settings.train,
        num_epochs=float(num_steps),
        max_steps=num_steps,
        preferences_per_step=len(trees),
        tokens_per_microbatch=settings.train.row,
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
    kinds = sorted({dtype_name(after[name].dtype) for name in names})
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
    # eva would start the matrices anew in each round
    settings = dataclasses.replace(settings, adapter=dataclasses.replace(settings.adapter, init="default"))
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
        "cutting. If there are none, try a larger --adapter.rank and --model.compute-dtype float32."
    )
    return judge("16 pairs learnt", text, remedy, fault=accuracy != 1.0, value=accuracy)
