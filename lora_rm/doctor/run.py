"""Checks of what a run wrote down: its course, its evaluation, its merge."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lora_rm.doctor.finding import Finding, judge, unchecked


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
        return unchecked(
            "evaluation",
            "training did not reach its end",
            "`lora-rm train RUN/config.yaml --resume` ends with it.",
        )
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
        return unchecked("merge", "not merged and verified yet", "`lora-rm merge RUN` does both.")
    largest = max(change["largest"] for change in parity["changes"].values())
    flips = parity["changes"]["library"]["pair_flips"]
    found = f"the merge changed {parity['num_answers']} rewards by {largest:.2%} of their spread at most and flipped {flips} pairs"
    remedy = (
        "Pairs that flip were nearly equal; `lora-rm merge RUN --merge.dtype float32 --merge.overwrite True` comes closest."
        if parity["passed"]
        else "`lora-rm merge RUN --merge.overwrite True`; if that fails its message says what to change."
    )
    if parity["passed"] and not parity["is_trained_model"]:
        remedy = (
            "It was merged into weights it was not trained on: `lora-rm merge RUN --merge.base auto --merge.overwrite True` gives the "
            "trained model."
        )
    return judge("merge", found, remedy, fault=not parity["passed"], warning=flips > 0, value=largest)
