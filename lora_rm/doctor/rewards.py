"""Checks of a model that is there: its score head, padding, and the rewards it gave when it was saved."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lora_rm.data.batches import pad_rows
from lora_rm.data.tokens import TokenTree
from lora_rm.doctor.finding import Finding, judge, unchecked
from lora_rm.evaluate import evaluate, ordered_pairs
from lora_rm.model import base as bases
from lora_rm.model.adapter import WEIGHTS
from lora_rm.model.classifier import has_absolute_positions
from lora_rm.model.quantization import dtype_name
from lora_rm.model.record import HEAD_KEY, RECORD, read_record
from lora_rm.model.reward_model import RewardModel
from lora_rm.model.tensor_files import find_tensor
from lora_rm.score import Scorer
from lora_rm.verify import measure_change, standard_deviation

PADDING_TOLERANCE = 1e-3
"""Largest change of a reward by padding, as a share of the spread of rewards."""


def stored_head(folder: Path) -> torch.Tensor | None:
    """The score head as the files of an adapter or a model hold it, or None."""
    adapter = folder / WEIGHTS
    if adapter.is_file():
        return find_tensor([adapter], HEAD_KEY)
    return find_tensor(sorted(folder.glob("*.safetensors")), "score.weight")


def check_head(head: torch.Tensor | None) -> Finding:
    """One logit, floating point, finite, not zero; float32, or rewards are rounded."""
    again = "Train again with lora-rm, or copy the folder again: the head cannot be recovered from the other weights."
    if head is None:
        found = "there is no score head in the files; a program that opens them draws a random one"
        return judge("score head", found, again, fault=True, value=0)
    dtype = dtype_name(head.dtype)
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
        try:
            ways["padded right"] = _pooled(model, rows)
            if not has_absolute_positions(model.classifier.config):
                ways["padded left"] = _pooled(model, rows, left=1.0)
            ways["one by one"] = [_pooled(model, [row])[0] for row in rows]
        finally:
            model.set_batching(batching)
    return ways


@torch.no_grad()
def _pooled(model: RewardModel, rows: Sequence[Sequence[int]], left: float = 0.0) -> list[float]:
    """Rewards where transformers pools them: at the last token that is not the configured pad id."""
    pad = model.classifier.config.get_text_config().pad_token_id
    ids, mask = (torch.tensor(part, device=model.device) for part in pad_rows(rows, pad, left=left))
    logits = model.classifier(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, 0].float().tolist()


def check_padding(ways: Mapping[str, Sequence[float]]) -> Finding:
    """Whether the reward is read at the same token, padded on the right, on the left, or not at all.

    Args:
        ways: Rewards of the same conversations by way of scoring; the first is compared with.
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
    return judge("padding", found, remedy, fault=not worst <= PADDING_TOLERANCE, value=worst)


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
    if (folder / RECORD).is_file():
        answers = [(answer["ids"], answer["reward"]) for answer in read_record(folder).get("canaries", [])]
    else:
        parity = bases.read_json(folder / "parity.json") if (folder / "parity.json").is_file() else {}
        stored = parity.get("answers", [])
        # of a merge, or of an export, which scored some of its answers
        keys = ("merged", "exported")
        answers = [(answer["ids"], answer[key]) for answer in stored for key in keys if key in answer]
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
