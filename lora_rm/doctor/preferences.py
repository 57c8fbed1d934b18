"""Checks of preferences: rows, copies, contradictions, ties, lengths, the split."""

import json
import math
from collections import Counter
from collections.abc import Sequence

from lora_rm.config import DataSettings
from lora_rm.data.files import read_rows
from lora_rm.data.formats import RowError, to_preference
from lora_rm.data.preference import Messages, Preference
from lora_rm.data.split import both_sides
from lora_rm.data.tokens import ChatTokenizer, tokenize
from lora_rm.doctor.finding import Finding, judge, unchecked
from lora_rm.evaluate import bag_of_words_baseline, ordered_pairs, wilson_interval
from lora_rm.model.base import cache_folder


def read_sides(
    wanted: DataSettings, seed: int = 0
) -> tuple[list[Preference], list[Preference], list[RowError]]:
    """Both sides as training would split them, nothing dropped, and the rows that cannot be read.

    Raises:
        DataError: If a source cannot be read at all.
    """
    bad: list[RowError] = []

    def read(source: str, split: str, _: str) -> list[Preference]:
        found = []
        for row in read_rows(source, split=split, columns=wanted.columns):
            try:
                found.append(to_preference(row))
            except RowError as error:
                bad.append(error)
        return found

    train_side, eval_side = both_sides(wanted, seed, read)
    return train_side, eval_side, bad


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
    keys = [(p.prompt_key, tuple(map(_key, p.answers)), p.probability, p.scores) for p in preferences]
    count = Counter(keys)
    copies = len(preferences) - len(count)
    share = copies / len(preferences)
    found = f"{copies} of {len(preferences)} rows ({share:.1%}) are copies of another"
    if copies:
        key, times = count.most_common(1)[0]
        found += f"; the most frequent stands {times} times (first: {preferences[keys.index(key)].source or 'no source'})"
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
        for better, worse in ordered_pairs(p):
            orders.add((p.prompt_key, keys[better], keys[worse]))
        if p.kind == "rating":
            ratings.setdefault((p.prompt_key, keys[0]), set()).add(p.scores[0])
    both = {order for order in orders if (order[0], order[2], order[1]) in orders}
    conflicts = len(both) // 2 + sum(len(scores) > 1 for scores in ratings.values())
    share = conflicts / max(1, len(orders) - len(both) // 2 + len(ratings))
    found = f"{conflicts} of {len(orders) - len(both) // 2 + len(ratings)} comparisons ({share:.1%}) stand there both ways round"
    if both:
        prompt, *answers = min(both)
        sources = [
            p.source
            for p in preferences
            if p.prompt_key == prompt and p.source and set(answers) <= {_key(answer) for answer in p.answers}
        ]
        found += f" (for example: {' and '.join(sources[:2])})" if sources else ""
    remedy = (
        "Decide which way round is right and remove the other row, or write both as one row with `tie` or `probability`: "
        "nobody can get both right, so they cap the accuracy."
    )
    return judge("contradictions", found, remedy, fault=share > 0.01, warning=conflicts > 0, value=share)


def check_ties(preferences: Sequence[Preference]) -> Finding:
    """Pairs without a better answer, which teach little and are left out of the accuracy; ratings that are all one."""
    ratings = [p.scores[0] for p in preferences if p.kind == "rating"]
    if len(ratings) > 1 and len(set(ratings)) == 1:
        found = f"all {len(ratings)} ratings are {ratings[0]:g}, so none is better than another"
        return judge("ties", found, "Look whether the column of the ratings was read rightly.", fault=True)
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
        for better, worse in ordered_pairs(p):
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


def check_words(train_side: Sequence[Preference], eval_side: Sequence[Preference]) -> Finding:
    """Whether single words of the answers, say one that every better answer begins with, tell the better one."""
    accuracy = bag_of_words_baseline(train_side, eval_side)
    if math.isnan(accuracy):
        return unchecked("words of the better answer", "no held-out pair says which of two answers is better")
    num_pairs = sum(p.kind == "pair" and not p.is_tie for p in eval_side)
    low, _ = wilson_interval(accuracy * num_pairs, num_pairs)
    found = f"counts of words, without the prompt, are right on {accuracy:.1%} of {num_pairs} held-out pairs"
    remedy = (
        "A model can learn these words instead of what is good. Look whether one side's answers share a greeting, a mark or a "
        "style, and remove it or add pairs without it."
    )
    return judge(
        "words of the better answer",
        found,
        remedy,
        fault=False,
        warning=low > 0.5 and accuracy > 0.8,
        value=accuracy,
    )


def check_disjoint(
    train_side: Sequence[Preference], eval_side: Sequence[Preference], wanted: DataSettings
) -> Finding:
    """Whether prompts of the evaluation are trained on; also those that differ in case or spaces only.

    Training leaves rows with the very same prompt out by itself, and refuses if they are too many.
    """
    if not eval_side:
        num_prompts = len({p.prompt_key for p in train_side})
        found = (
            f"no row of {wanted.eval} can be used, so there is nothing to evaluate on"
            if wanted.eval
            else f"there are too few prompts to hold any out: {num_prompts} in {len(train_side)} rows"
        )
        remedy = "Add rows with other prompts, or give preferences to evaluate on: --data.eval FILE."
        return judge("train and eval apart", found, remedy, fault=True, value=0)
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
        fault=too_many or is_leak,
        warning=bool(same or alike),
        value=share,
    )


def check_length(preferences: Sequence[Preference], chat: ChatTokenizer, wanted: DataSettings) -> Finding:
    """How many rows are longer than `data.max_length`, and are dropped or cut."""
    trees, _ = tokenize(
        preferences, chat, max_length=10**9, on_bad_row=wanted.on_bad_row, cache=cache_folder()
    )
    lengths = sorted(max(map(len, tree.conversations())) for tree in trees if tree is not None)
    _, counts = tokenize(
        preferences,
        chat,
        max_length=wanted.max_length,
        length_policy=wanted.length_policy,
        on_bad_row=wanted.on_bad_row,
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
    if any("refused" in reason for reason in counts):
        advice.append("--data.on-bad-row raise names the first row that the chat template refuses, and why.")
    remedy = " ".join(advice)
    return judge(
        "length limit", found, remedy, fault=dropped > wanted.max_dropped_share, warning=lost > 0, value=lost
    )


def _key(answer: Messages) -> str:
    return json.dumps(answer, sort_keys=True)


def _squeezed(preference: Preference) -> str:
    """The prompt without regard to case and spaces."""
    return " ".join(" ".join(m["content"] for m in preference.prompt).casefold().split())
