"""Training and evaluation preferences out of files: checked, split by prompt, tokenised, and counted."""

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_rm.config import DataSettings
from lora_rm.console import show_table
from lora_rm.data.checkable import checkable_preferences
from lora_rm.data.files import check_columns, check_one_split, tell_left_out
from lora_rm.data.formats import read_preferences
from lora_rm.data.preference import Preference
from lora_rm.data.tokens import ChatTokenizer, TokenTree, tokenize
from lora_rm.errors import DataError

BUILTIN = "builtin:checkable"
"""The project's own preference set; see `lora_rm.data.checkable`."""


@dataclass(frozen=True, slots=True)
class Side:
    """Preferences of one side of the split, with their tokens, in one order."""

    preferences: list[Preference]
    trees: list[TokenTree]

    @property
    def sha256(self) -> str:
        """Of all that training and evaluation read of it."""
        digest = hashlib.sha256()
        for tree in self.trees:
            for row in (tree.prompt_ids, *tree.answer_ids):
                digest.update(array("q", [len(row), *row]).tobytes())
            digest.update(repr((tree.kind, tree.probability, tree.margin, tree.scores, tree.group)).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Data:
    """Both sides, which share no prompt, and what became of every row."""

    train: Side
    eval: Side
    report: dict[str, dict[str, int]] = field(default_factory=dict)
    """By side: rows read, kept, and dropped or cut by reason; and of the kept ones how many are no plain pairs."""

    def show(self) -> None:
        """Prints the report."""
        reasons = list(
            dict.fromkeys(reason for counts in self.report.values() for reason, n in counts.items() if n)
        )
        rows = [[reason, *(counts.get(reason, 0) for counts in self.report.values())] for reason in reasons]
        show_table("Preferences", ["", *self.report], rows)


def check_sources(settings: DataSettings) -> None:
    """Looks whether the files are there, which costs nothing; whether the Hub has a data set is found when it is read.

    Raises:
        DataError: If `data.train` is not set, a file is missing, or `data.columns` has a name that is not read.
    """
    _check_set(settings.train, "data.train")
    check_columns(settings.columns)
    for source in (settings.train, settings.eval):
        if source and source != BUILTIN:
            check_one_split(source)


def load_data(
    settings: DataSettings, chat: ChatTokenizer, *, seed: int = 0, cache: Path | None = None
) -> Data:
    """Reads, splits and tokenises.

    Prompts found on both sides are removed from training. The training rows are never evaluated on.

    Args:
        settings: Sources, limits and policies.
        chat: Tokenizer and template.
        seed: Of the split and of the choice under `max_train` and `max_eval`.
        cache: Folder for token ids.

    Raises:
        DataError: If a row is bad (with `on_bad_row` raise), a side is empty, or more than
            `max_dropped_share` of the rows was dropped.
    """
    train_counts: Counter[str] = Counter()
    eval_counts: Counter[str] = Counter()
    counts = {"data.train": train_counts, "data.eval": eval_counts}
    train, held_out = both_sides(
        settings, seed, lambda source, split, key: _read(source, split, settings, counts[key], key)
    )
    train_counts.setdefault("rows read", len(train))
    eval_counts.setdefault("rows read", len(held_out))
    if settings.eval is None and settings.train != BUILTIN:
        train_counts["held out for evaluation"] = len(held_out)
    held_out_prompts = {preference.prompt_key for preference in held_out}
    disjoint = [preference for preference in train if preference.prompt_key not in held_out_prompts]
    train_counts["dropped: prompt is in the evaluation data"] = len(train) - len(disjoint)
    sides = {
        "train": _side(disjoint, chat, settings, settings.max_train, seed, train_counts, cache),
        "eval": _side(held_out, chat, settings, settings.max_eval, seed, eval_counts, cache),
    }
    report = {"train": dict(train_counts), "eval": dict(eval_counts)}
    for name, side in sides.items():
        _check(side, name, report[name], settings)
    return Data(sides["train"], sides["eval"], report)


def read_side(
    settings: DataSettings, chat: ChatTokenizer, *, seed: int = 0, cache: Path | None = None
) -> Side:
    """Reads and tokenises `data.eval` alone, to evaluate a model that is trained already.

    Raises:
        DataError: As `load_data`.
    """
    counts: Counter[str] = Counter()
    preferences = _read(settings.eval or "", settings.eval_split, settings, counts, "data.eval")
    side = _side(preferences, chat, settings, settings.max_eval, seed, counts, cache)
    Data(side, side, {"eval": dict(counts)}).show()
    _check(side, "eval", counts, settings)
    return side


def both_sides(
    settings: DataSettings, seed: int, read: Callable[[str, str, str], list[Preference]]
) -> tuple[list[Preference], list[Preference]]:
    """The preferences to train on and to evaluate on, before what both have is taken out.

    Args:
        settings: Sources and splits.
        seed: Of the split.
        read: Gives the preferences of a source and split, named by its setting.
    """
    held_out: list[Preference] | None = None
    if settings.train == BUILTIN:
        train, held_out = checkable_preferences()
    else:
        train = read(settings.train, settings.train_split, "data.train")
    if settings.eval == BUILTIN:
        held_out = checkable_preferences()[1]
    elif settings.eval is not None:
        held_out = read(settings.eval, settings.eval_split, "data.eval")
    return (train, held_out) if held_out is not None else split_by_prompt(train, settings.eval_share, seed)


def split_by_prompt(
    preferences: Sequence[Preference], eval_share: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Holds out all rows of a share of the prompts, at least one prompt on each side if there are two.

    The prompts with the lowest hashes of seed and prompt: of data that has grown by some prompts, those that were held out still are,
    but for a few at the border, so that a second run does not evaluate on what the first was trained on.

    Raises:
        DataError: If all rows have the same prompt.
    """
    prompts = {preference.prompt_key for preference in preferences}
    if len(prompts) == 1 and len(preferences) > 1:
        raise DataError(
            f"All {len(preferences)} rows of data.train have the same prompt, and a prompt is held out with all its rows, so none can "
            "be. Give data.eval, with other prompts."
        )
    num_eval = min(max(1, round(len(prompts) * eval_share)), len(prompts) - 1)
    in_order = sorted(prompts, key=lambda key: hashlib.sha256(f"{seed} split {key}".encode()).digest())
    chosen = set(in_order[:num_eval])
    train = [preference for preference in preferences if preference.prompt_key not in chosen]
    return train, [preference for preference in preferences if preference.prompt_key in chosen]


def _check_set(source: str, key: str) -> None:
    if not source:
        raise DataError(
            f"{key} is not set. Give a file, a folder or pattern of files, a datasets folder, a hub data set, or {BUILTIN}."
        )


def _read(
    source: str, split: str, settings: DataSettings, counts: Counter[str], key: str
) -> list[Preference]:
    _check_set(source, key)
    if source == BUILTIN:
        preferences = checkable_preferences()[1]
        counts["rows read"] += len(preferences)
        return preferences
    check_one_split(source)
    tell_left_out(source)
    preferences, dropped = read_preferences(
        source, split=split, columns=settings.columns, on_bad_row=settings.on_bad_row
    )
    counts["rows read"] += len(preferences) + sum(dropped.values())
    for reason, number in dropped.items():
        counts[f"dropped: {reason}"] += number
    return preferences


def _side(
    preferences: list[Preference],
    chat: ChatTokenizer,
    settings: DataSettings,
    limit: int,
    seed: int,
    counts: Counter[str],
    cache: Path | None,
) -> Side:
    trees, reasons = tokenize(
        preferences,
        chat,
        max_length=settings.max_length,
        length_policy=settings.length_policy,
        on_bad_row=settings.on_bad_row,
        num_workers=settings.num_workers,
        cache=cache,
    )
    counts.update(reasons)
    kept = [(p, tree) for p, tree in zip(preferences, trees, strict=True) if tree is not None]
    if limit and limit < len(kept):  # after the dropping, so that the number asked for is the number got
        counts["left out by the limit"] = len(kept) - limit
        chosen = sorted(random.Random(f"{seed} limit").sample(range(len(kept)), limit))
        kept = [kept[number] for number in chosen]
    counts["kept"] = len(kept)
    for preference, _ in kept:
        counts.update(_traits(preference))
    return Side([p for p, _ in kept], [tree for _, tree in kept])


def _traits(preference: Preference) -> list[str]:
    """What decides how a row is trained on, for the report."""
    traits = {
        "of which ties": preference.is_tie,
        "of which rankings of more than two answers": preference.kind == "ranking",
        "of which ratings": preference.kind == "rating",
        # TRL uses a margin wherever there is one
        "of which with a margin (unused if loss.use_margin is False)": preference.margin > 0,
    }
    return [trait for trait, applies in traits.items() if applies]


def _check(side: Side, name: str, counts: Mapping[str, int], settings: DataSettings) -> None:
    allowed = settings.max_dropped_share
    dropped = {reason: number for reason, number in counts.items() if reason.startswith("dropped") and number}
    total = sum(dropped.values()) + counts["kept"] + counts.get("left out by the limit", 0)
    share = sum(dropped.values()) / max(1, total)
    if share > allowed:
        raise DataError(
            f"{share:.0%} of the {name} rows were dropped ({dropped}); data.max_dropped_share allows {allowed:.0%}. "
            "Mend the data, raise data.max_length, set data.length_policy truncate_prompt, or raise the share."
        )
    if not side.trees:
        raise DataError(
            f"No {name} preferences are left (rows: {dict(counts)}). "
            "Give more data, raise data.max_length, or change data.eval_share."
        )
