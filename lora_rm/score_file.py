"""Rewards of conversations in files, a line each; a call that was interrupted goes on."""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from lora_rm.console import say
from lora_rm.data.files import BadRow, Row
from lora_rm.data.formats import parse_conversations
from lora_rm.errors import ConfigError, DataError, first_line, storing
from lora_rm.score import Scorer, load_reward_model

NUM_TOGETHER = 64
"""Lines that are scored together. A call that goes on makes the same groups, so that rewards are the same bits."""

SAME_REWARD = 0.1
"""Largest change of a reward, as a share of the rewards' spread, that another machine's rounding may explain."""

FEW = 8
"""Of fewer rewards the spread says little; a share of the reward itself is allowed, or of 1."""


Line: TypeAlias = str | Row | BadRow
"""A line of JSON, or a row that `read_rows` has read."""


def score_lines(
    path: str,
    lines: Iterable[Line],
    name: str,
    done: Sequence[str] = (),
    *,
    together: int = NUM_TOGETHER,
    device: str = "auto",
    compute_dtype: str = "auto",
) -> Iterator[str]:
    """Adds a reward to every conversation, and gives it as a line of JSON.

    Args:
        path: Of the model.
        lines: Conversations; empty lines are passed over. What one has as `reward` (`rewards` of several responses)
            is replaced.
        name: Of the file, for messages.
        done: What an earlier call gave for the first conversations. They are not scored again, but for the last ones,
            which tell whether the model is still the same.
        together: Lines that are scored together.
        device: As in `load_reward_model`.
        compute_dtype: As in `load_reward_model`.

    Raises:
        DataError: If a line is no conversation, or is not the one that was scored earlier, or had another reward; with
            its number.
    """
    scorer = load_reward_model(path, device=device, compute_dtype=compute_dtype)
    placed = (
        (f"{name} line {number}" if isinstance(line, str) else line.source, line)
        for number, line in enumerate(lines, start=1)
        if not isinstance(line, str) or line.strip()
    )
    allowed = _allowed_change(done)
    num_read = 0
    while group := list(islice(placed, together)):
        said = [_conversations(scorer, line, place) for place, line in group]
        earlier = [json.loads(text) for text in done[num_read : num_read + len(group)]]
        num_read += len(group)
        for (place, _), (values, key, _), known in zip(group, said, earlier, strict=False):
            if key not in known or {**known, key: None} != {**values, key: None}:
                raise DataError(
                    f"{place}: is not the conversation that was scored earlier. Give the same file again, or "
                    "begin a new --out."
                )
        if num_read < len(done):
            continue
        rows = [ids for _, _, own in said for ids in own]
        groups = [place for (place, _), (_, _, own) in zip(group, said, strict=True) for _ in own]
        try:
            rewards = iter(scorer.score_ids(rows, groups))
        except (IndexError, RuntimeError) as error:
            raise DataError(
                f"{group[0][0]} to {group[-1][0]}: cannot be scored ({first_line(error)}). The longest "
                f"has {max(map(len, rows))} tokens: the model, or the memory, may be made for fewer."
            ) from None
        for number, ((place, _), (values, key, own)) in enumerate(zip(group, said, strict=True)):
            found = [next(rewards) for _ in own]
            if number >= len(earlier):
                yield json.dumps({**values, key: found if key == "rewards" else found[0]}, ensure_ascii=False)
                continue
            known = earlier[number][key] if key == "rewards" else [earlier[number][key]]
            if any(abs(a - b) > allowed(b) for a, b in zip(known, found, strict=True)):
                raise DataError(
                    f"{place}: had the reward {known} and has {found} now, so another model was used. Give that "
                    "one, or begin a new --out."
                )
    if num_read < len(done):
        raise DataError(
            f"{name}: has {num_read} conversations, and {len(done)} were scored earlier. Give the same file again."
        )


def _allowed_change(done: Sequence[str]) -> Callable[[float], float]:
    """How far a reward may be from what it was, by that reward."""
    rewards: list[float] = []
    for line in done:
        values = json.loads(line)
        found = values.get("rewards") if _name(values) == "rewards" else [values.get("reward")]
        rewards += [x for x in found if isinstance(x, float)] if isinstance(found, list) else []
    if len(rewards) < FEW:
        return lambda reward: SAME_REWARD * max(1.0, abs(reward))
    spread = statistics.pstdev(rewards)
    # answers that are all alike have hardly a spread; bfloat16 keeps 8 bits
    return lambda reward: max(SAME_REWARD * spread, 0.01 * max(1.0, abs(reward)))


def _name(values: Mapping[str, Any]) -> str:
    """What a line's reward is called; rewards where there are several responses."""
    return "rewards" if values.get("responses") is not None else "reward"


def _conversations(scorer: Scorer, line: Line, place: str) -> tuple[dict[str, Any], str, list[list[int]]]:
    """A line's values without the reward, the name that the reward will have, and the token ids of what is scored."""
    if isinstance(line, BadRow):
        raise DataError(f"{place}: {line.message}")
    try:
        values = json.loads(line if isinstance(line, str) else json.dumps(line.values))
        json.dumps(values, ensure_ascii=False).encode()  # lone surrogates are refused
        if not isinstance(values, dict):
            raise DataError("it is no object")
        key = _name(values)
        if key == "rewards" and not isinstance(values["responses"], list):
            raise DataError("responses is no list")
        if {"chosen", "rejected"} <= values.keys() and not values.keys() & {
            "messages",
            "response",
            "responses",
        }:
            raise DataError(
                "it is a preference pair: evaluate those with `lora-rm eval MODEL --data.eval FILE`"
            )
        conversations, tools = parse_conversations(values)
        values.pop(key, None)
        return values, key, scorer.ids(conversations, tools)
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: a Parquet column of dates
        raise DataError(
            f"{place}: is no conversation ({error}). Write "
            '{"messages": [...]}, {"prompt": ..., "response": ...} or {"prompt": ..., "responses": [...]}.'
        ) from None


def score_file(
    path: str, lines: Iterable[Line], name: str, out: Path, *, resume: bool = False, **how: Any
) -> int:
    """Writes conversations with their rewards to a file; what a killed call had written is not scored again.

    Args:
        path: As in `score_lines`.
        lines: As in `score_lines`.
        name: As in `score_lines`.
        out: File to make, of one JSON object a line.
        resume: Go on with a file that was not finished.
        how: Device and type, as in `score_lines`.

    Returns:
        Lines in the file.

    Raises:
        ConfigError: If the file is there and `resume` does not say to go on with it, or something else wrote it.
        DataError: As `score_lines`.
        StorageError: If it cannot be written.
    """
    if out.exists() and not resume:
        raise ConfigError(f"{out}: exists already. Go on with --resume, remove it, or choose another --out.")
    with storing(out):
        raw = out.read_bytes().splitlines(keepends=True) if out.exists() else []
    whole = [line for line in raw if line.endswith(b"\n")]
    try:
        done = [line.decode() for line in whole]
        is_own = all(json.loads(line).keys() & {"reward", "rewards"} for line in done)
    except (ValueError, AttributeError):
        is_own = False
    if len(whole) < len(raw):
        with suppress(ValueError):  # a line that a kill cut off is no JSON
            json.loads(raw[-1])
            is_own = False
        is_own = is_own and raw[-1].startswith(b"{")
    if not is_own or (out.exists() and Path(name).exists() and out.samefile(name)):
        raise ConfigError(f"{out}: holds lines that are no rewards of this command. Choose another --out.")
    if len(whole) < len(raw):  # half a line of a call that was killed
        with storing(out):
            os.truncate(out, sum(map(len, whole)))
    if done:
        say(f"Going on after {len(done)} conversations.")
    count = len(done)
    with storing(out), out.open("a", encoding="utf-8") as stream:
        for line in score_lines(path, lines, name, done, **how):
            stream.write(line + "\n")
            stream.flush()
            count += 1
    return count
