r"""Any row of preference data -> `Preference`.

The columns of a row say which format it has; the first line of the table that fits is taken.

columns                                        format                           kind
conversations, chosen, rejected                ShareGPT as LLaMA-Factory has    pair
                                               it
prompt, chosen, rejected                       lists of messages may repeat     pair
                                               the prompt (UltraFeedback)
chosen, rejected (lists of messages)           two whole conversations          pair
chosen, rejected (texts, "\n\nHuman: ...")     raw Anthropic HH                 pair
prompt, responses, scores or ranks             K answers; a high score and a    pair if K = 2, ranking
                                               low rank are good                if K > 2, rating if 1
context or prompt, completions (each with      NeMo-RL; a low rank is good      pair if K = 2, ranking
  rank and completion)                                                          if K > 2
prompt, answers (each with rank and answer)    Nectar; rank 1 is the best       the same
prompt or context, response1, response2, and   HelpSteer: -3..3, below 0 the    pair
  overall_preference or preference_strength    first is better; the margin
prompt or context, response1, response2,       a soft label: how likely the     pair
  probability                                  first is better
prompt or context, response1, response2, and   PKU-SafeRLHF (0, 1); arena's     pair
  better_response_id or winner                 model_a, model_b or tie
conversation_a, conversation_b, winner         two whole conversations of an    pair
                                               arena
prompt, chosen, rejected (lists of texts,      RewardBench 2: each chosen one   ranking
  or a text and a list)                        is better than each rejected
prompt, response or completion, and            one answer and its number        rating
  rating, score or label

An answer is a text or a list of messages, a prompt likewise. A list may repeat the prompt, and so may HH text; any
other text is the answer as it stands. A prompt may be HH text too, with "\n\nAssistant:" at its end. `response_a` and `response_b` are other
names of `response1` and `response2`, and so are `response_1` and `response_2`, `response_0` and `response_1`;
`question`, `instruction` (with `input`) and `query` of a text `prompt`. ms-swift's `rejected_response`, beside `response`
or `messages`, and `rejected_messages`, beside `messages`, are read as `rejected`. A message is
{role, content} or {from, value}; its content may be a list of texts, which are joined. `tool_calls`,
`tool_call_id`, `name`, `reasoning_content` and `thinking` reach the chat template, other keys do not. Rows with images, videos or
sounds are refused.

Any row may also have `system` (a text, put before the prompt), `tools` (a list or its JSON), `subset`
(a text); a pair also `margin` (0 or more), `tie` (true: probability 0.5), `probability` (that `chosen`,
or the first response, is better) and, beside `chosen`, `score_chosen` and `score_rejected` (their
difference is the margin, none is a tie; `chosen_score`, `chosen_rating` and `chosen-rating` are other names, and so
for `rejected`). `history` is a list of [user, assistant] texts before the prompt. Other columns and nulls are ignored.
"""

import math
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import Any, Literal

from lora_rm.data.conversations import (
    QUESTIONS,
    as_repeated,
    check_ends_with_assistant,
    is_hh,
    read_answer,
    read_conversation,
    read_hh,
    read_prompt,
    read_repeating,
    repeat_prompt,
    split_conversations,
    with_system,
)
from lora_rm.data.fields import (
    Fields,
    RowError,
    check_no_media,
    check_number,
    listed,
    missing,
    read_boolean,
    read_list,
    read_number,
    read_optional_text,
    read_tools,
    require,
    shown,
    wrong_type,
)
from lora_rm.data.files import BadRow, Row, read_rows
from lora_rm.data.preference import Messages, Preference
from lora_rm.errors import DataError

__all__ = ["BadRow", "Row", "RowError", "parse_conversations", "parse_row", "read_preferences", "read_rows"]

TWO_RESPONSES = (
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
    ("response_0", "response_1"),
)
WINNERS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}
"""What an arena calls the outcome, and how likely the first answer is the better."""

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
MAX_BAD_START = 10_000
"""A source is given up after so many bad rows, if fewer than one in `MIN_GOOD` was good: it is another kind of file."""

MIN_GOOD = 100

MAX_ANSWERS = 1000
"""Answers to one prompt; a ranking is compared by pairs, so its cost grows with the square."""

ACCEPTED = (
    "prompt + chosen + rejected; chosen + rejected (whole conversations or HH text); "
    "conversations + chosen + rejected; prompt + response1 + response2 + overall_preference, probability or winner; "
    "context + completions; prompt + answers with ranks; prompt + responses + scores or ranks; prompt + response + rating"
)


def read_preferences(
    source: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["raise", "skip"] = "raise",
) -> tuple[list[Preference], Counter[str]]:
    """Reads the preferences of files, a saved dataset or a dataset on the Hub, in their order.

    Args:
        source: As for `read_rows`.
        split: Which split of a saved or Hub dataset; a file has none.
        columns: As for `read_rows`.
        on_bad_row: Whether the first bad row ends the reading, or bad rows are left out and counted.

    Returns:
        The preferences, and how many rows were left out for which reason.

    Raises:
        RowError: At the first bad row, if `on_bad_row` is "raise".
        DataError: If the source cannot be read, or none of its rows can be used.
    """
    preferences: list[Preference] = []
    dropped: Counter[str] = Counter()
    num_bad = 0
    for row in read_rows(source, split=split, columns=columns):
        try:
            preferences.append(to_preference(row))
        except RowError as error:
            if on_bad_row == "raise":
                advice = "Mend the row, or leave such rows out with --data.on-bad-row skip."
                raise RowError(error.reason, f"{error} {advice}") from None
            dropped[error.reason] += 1
            num_bad += 1
            if num_bad >= MAX_BAD_START and len(preferences) * MIN_GOOD < num_bad:
                raise DataError(
                    f"{source} has {len(preferences):,} rows that can be used among its first "
                    f"{num_bad + len(preferences):,} ({_counts(dropped)}). Read it with --data.on-bad-row raise."
                ) from None
    if not preferences:
        raise DataError(
            f"{source} has no row that can be used ({_counts(dropped)}). Read it with --data.on-bad-row raise."
        )
    return preferences, dropped


def _counts(dropped: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.most_common())


def to_preference(row: Row | BadRow) -> Preference:
    """What `read_rows` yields as a preference.

    Raises:
        RowError: If the row cannot be read, or is none.
    """
    if isinstance(row, BadRow):
        raise RowError(row.reason, f"{row.source}: {row.message}")
    return parse_row(row.values, row.source)


def parse_row(values: Mapping[str, Any], source: str) -> Preference:
    """Makes a preference of one row, whichever format of the module's table it has.

    Raises:
        RowError: If the row fits no format or breaks a rule; the message begins with `source`.
    """
    try:
        return _parse(_known(values), source)
    except RowError as error:
        raise RowError(error.reason, f"{source}: {error}") from None


def parse_conversations(values: Mapping[str, Any]) -> tuple[tuple[Messages, ...], tuple[dict[str, Any], ...]]:
    """Reads what is to be scored as training reads it: `messages`, or `prompt` and `response` or `responses`.

    Returns:
        The conversations, and the tools that are shown to the model.

    Raises:
        RowError: If the row is none of these or breaks a rule.
    """
    row = _known(values)
    if len(row.keys() & {"messages", "response", "responses"}) != 1:
        message = f"exactly one of messages, response and responses is needed (found: {listed(row)})."
        raise RowError("unknown format", message)
    if "messages" in row:
        return (with_system(read_conversation(row["messages"], "messages"), row),), read_tools(row)
    if "response" in row:
        answers = [read_answer(row["response"], "response")]
    else:
        answers = [read_answer(item, f"responses[{n}]") for n, item in enumerate(read_list(row, "responses"))]
    prompt = with_system(read_prompt(row, "prompt"), row)
    return tuple(prompt + answer for answer in answers), read_tools(row)


def _known(values: Mapping[str, Any]) -> Fields:
    """The columns that hold something, all of it text."""
    check_no_media(values)
    if values.get("chat_template_kwargs"):
        message = (
            "field 'chat_template_kwargs' sets the chat template for one row. Every row is rendered alike: empty the "
            "field, and put what it asks for in the .jinja file of data.chat_template."
        )
        raise RowError("own template settings", message)
    return {name: value for name, value in values.items() if value is not None}


def _parse(row: Fields, source: str) -> Preference:
    if row.keys() & {"rejected_response", "rejected_messages"}:
        row = _from_swift(row)
    if "chosen" in row or "rejected" in row:
        fields = _parse_chosen_rejected(row)
    elif "responses" in row:
        fields = _parse_responses(row)
    elif "completions" in row:
        fields = _parse_completions(row, "completions", "completion")
    elif "conversation_a" in row or "conversation_b" in row:
        fields = _parse_arena(row)
    elif any(name in row for names in TWO_RESPONSES for name in names):
        fields = _parse_two_responses(row)
    elif "response" in row or "completion" in row:
        fields = _parse_rating(row)
    elif "answers" in row:
        fields = _parse_completions(row, "answers", "answer")
    else:
        raise RowError(
            "unknown format",
            f"no format has the columns {listed(row)}. Accepted: {ACCEPTED}; rename the columns.",
        )
    fields["prompt"] = with_system(fields["prompt"], row)
    if len(fields["answers"]) > MAX_ANSWERS:
        message = f"{len(fields['answers'])} answers. Allowed: {MAX_ANSWERS} to one prompt; split the row."
        raise RowError("too many answers", message)
    if any(first == second for first, second in combinations(fields["answers"], 2)):
        message = "two answers are identical. Answers that are compared must differ; remove the row."
        raise RowError("identical answers", message)
    return Preference(
        **fields, tools=read_tools(row), subset=read_optional_text(row, "subset"), source=source
    )


# The formats. Each returns the fields of a Preference that it knows.


def _parse_chosen_rejected(row: Fields) -> dict[str, Any]:
    require(row, "chosen")
    require(row, "rejected")
    sides = {
        name: [row[name]] if isinstance(row[name], str) else row[name] for name in ("chosen", "rejected")
    }
    if all(map(_is_texts, sides.values())) and any(sides[name] is row[name] for name in sides):
        return _two_lists({**row, **sides})
    prompt, answers = _chosen_rejected_messages(row)
    advantage, probability = 0.0, 1.0
    scores = next((names for names in SCORES if row.keys() >= set(names)), None)
    if scores:
        advantage = read_number(row, scores[0]) - read_number(row, scores[1])
        if advantage < 0:
            message = f"{scores[0]} is below {scores[1]}. It is above, or equal for a tie; swap the answers."
            raise RowError("chosen scored below rejected", message)
        probability = 1.0 if advantage > 0 else 0.5
    return _pair(row, prompt, answers, probability, _margin(row, default=advantage))


def _chosen_rejected_messages(row: Fields) -> tuple[Messages, tuple[Messages, ...]]:
    is_texts = isinstance(row["chosen"], str) and isinstance(row["rejected"], str)
    if row.keys() & ({"prompt", "conversations", *QUESTIONS} if is_texts else {"prompt", "conversations"}):
        prompt = read_prompt(row, "conversations", "prompt")
        chosen, rejected = (read_repeating(row[name], name) for name in ("chosen", "rejected"))
        is_repeated = any(answer[0]["role"] != "assistant" for answer in (chosen, rejected))
    else:
        prompt, is_repeated = (), True
        if is_texts:
            if not (is_hh(row["chosen"]) and is_hh(row["rejected"])):
                require(row, "prompt")
            chosen, rejected = (read_hh(row[name], name) for name in ("chosen", "rejected"))
        else:
            chosen, rejected = (read_conversation(row[name], name) for name in ("chosen", "rejected"))
    check_ends_with_assistant(chosen, "chosen")
    check_ends_with_assistant(rejected, "rejected")
    if not is_repeated:
        return prompt, (chosen, rejected)
    if not prompt and all(message["role"] == "assistant" for message in chosen + rejected):
        require(row, "prompt")  # two answers without a prompt, not two whole conversations
    if prompt:
        prompt = as_repeated(prompt, (chosen, rejected))
        chosen, rejected = repeat_prompt(prompt, chosen), repeat_prompt(prompt, rejected)
    return split_conversations(chosen, rejected)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)


def _two_lists(row: Fields) -> dict[str, Any]:
    """Every chosen text is better than every rejected one."""
    answers: list[Messages] = []
    ranks: list[float] = []
    for name, rank in (("chosen", -1.0), ("rejected", 0.0)):  # as scores 1 and 0
        answers += [read_answer(text, f"{name}[{index}]") for index, text in enumerate(row[name])]
        ranks += [rank] * len(row[name])
    return _ranked(row, read_prompt(row, "prompt"), tuple(answers), ranks)


def _from_swift(row: Fields) -> Fields:
    """ms-swift's ways of naming the rejected answer, or the whole rejected conversation, as chosen and rejected."""
    if "rejected_messages" in row:
        require(row, "messages")
        return {**row, "chosen": row["messages"], "rejected": row["rejected_messages"]}
    if "messages" in row:
        *prompt, chosen = read_list(row, "messages")
        return {**row, "prompt": prompt, "chosen": [chosen], "rejected": row["rejected_response"]}
    require(row, "response")
    return {**row, "chosen": row["response"], "rejected": row["rejected_response"]}


def _parse_arena(row: Fields) -> dict[str, Any]:
    for name in ("conversation_a", "conversation_b", "winner"):
        require(row, name)
    both = [read_conversation(row[name], name) for name in ("conversation_a", "conversation_b")]
    return _pair(row, *split_conversations(*both), _first_wins(row), 0.0)


def _first_wins(row: Fields) -> float:
    """The probability that the first answer is the better, by `winner` or `better_response_id`."""
    name, known = ("winner", WINNERS) if "winner" in row else ("better_response_id", {"0": 1.0, "1": 0.0})
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value) not in known:
        message = f"field '{name}' is {shown(value)}. Allowed: {', '.join(known)}; correct it."
        raise RowError("out of range", message)
    return known[str(value)]


def _parse_responses(row: Fields) -> dict[str, Any]:
    name = "ranks" if "ranks" in row and "scores" not in row else "scores"
    require(row, name)
    responses = read_list(row, "responses")
    answers = tuple(read_answer(item, f"responses[{index}]") for index, item in enumerate(responses))
    numbers = [check_number(item, f"{name}[{index}]") for index, item in enumerate(read_list(row, name))]
    if len(numbers) != len(answers):
        message = (
            f"{len(answers)} responses, but {len(numbers)} {name}. Each response has one; add or remove."
        )
        raise RowError("wrong length", message)
    prompt = read_prompt(row, "prompt")
    if name == "ranks":
        return _ranked(row, prompt, answers, numbers)
    if len(answers) == 1:
        return {"prompt": prompt, "answers": answers, "kind": "rating", "scores": tuple(numbers)}
    return _scored(row, prompt, answers, numbers)


def _parse_completions(row: Fields, name: str, text: str) -> dict[str, Any]:
    """Ranked answers: `name` is the column, `text` the key of the answer in each of its objects."""
    answers: list[Messages] = []
    ranks: list[float] = []
    for index, item in enumerate(read_list(row, name)):
        field = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise wrong_type(field, item, f"an object with 'rank' and '{text}'")
        if "response" in item and "overall_score" in item:
            message = "the original UltraFeedback has several scores an answer. Write responses and scores, or take its binarized form."
            raise RowError("unknown format", message)
        for key in ("rank", text):
            if item.get(key) is None:
                raise missing(f"{field}.{key}", item)
        answers.append(read_answer(item[text], f"{field}.{text}"))
        ranks.append(check_number(item["rank"], f"{field}.rank"))
    return _ranked(row, read_prompt(row, "context", "prompt"), tuple(answers), ranks)


def _parse_two_responses(row: Fields) -> dict[str, Any]:
    if "winner_model_a" in row:
        message = "LMSYS's arena of 55k rows has JSON lists of turns as texts. Write conversation_a, conversation_b, winner."
        raise RowError("unknown format", message)
    names = next(
        (names for names in TWO_RESPONSES if row.keys() >= set(names)),
        next(names for names in TWO_RESPONSES if any(name in row for name in names)),
    )
    for name in names:
        require(row, name)
    answers = tuple(read_answer(row[name], name) for name in names)
    prompt = read_prompt(row, "prompt", "context")
    if "winner" in row or "better_response_id" in row:
        return _pair(row, prompt, answers, _first_wins(row), 0.0)
    strength_name = "preference_strength" if "preference_strength" in row else "overall_preference"
    if strength_name in row:
        strength = read_number(row, strength_name)
        if strength not in range(-3, 4):
            message = (
                f"field '{strength_name}' is {strength:g}. Allowed: a whole number from -3 to 3; correct it."
            )
            raise RowError("out of range", message)
        return _pair(row, prompt, answers, _better(0.0, strength), -strength)
    if "probability" not in row and not read_boolean(row, "tie"):
        require(row, strength_name)
    return _pair(row, prompt, answers, 0.5, 0.0)


def _parse_rating(row: Fields) -> dict[str, Any]:
    answer_name = "response" if "response" in row else "completion"
    score_name = next((name for name in ("rating", "score", "label") if name in row), "rating")
    require(row, score_name)
    answer = read_answer(row[answer_name], answer_name)
    if score_name == "label" and isinstance(row["label"], bool):
        message = "field 'label' is true or false, as for KTO, which compares no answers. Write 1 or 0 to train on it as a rating."
        raise RowError("not a number", message)
    score = read_number(row, score_name)
    return {"prompt": read_prompt(row, "prompt"), "answers": (answer,), "kind": "rating", "scores": (score,)}


# The targets.


def _pair(
    row: Fields, prompt: Messages, answers: tuple[Messages, ...], probability: float, advantage: float
) -> dict[str, Any]:
    """A pair with the preferred answer first.

    `probability` and `advantage` say how likely and by how much the first of `answers` is better (below 0:
    worse). The columns `probability` and `tie` overrule the one, `margin` the size of the other.
    """
    if "probability" in row:
        probability = read_number(row, "probability")
    if read_boolean(row, "tie"):
        probability = 0.5
    if not 0.0 <= probability <= 1.0:
        message = f"field 'probability' is {probability:g}. Allowed: a number from 0 to 1; correct it."
        raise RowError("out of range", message)
    if advantage * (probability - 0.5) < 0.0:
        message = (
            f"the probability {probability:g} calls one answer the better, the margin or the scores call the "
            "other. They must agree; correct one of them."
        )
        raise RowError("contradiction", message)
    margin = _margin(row, default=abs(advantage))
    if probability < 0.5:
        answers, probability = answers[::-1], 1.0 - probability
    margin = 0.0 if probability == 0.5 else margin
    return {"prompt": prompt, "answers": answers, "probability": probability, "margin": margin}


def _scored(
    row: Fields, prompt: Messages, answers: tuple[Messages, ...], scores: list[float]
) -> dict[str, Any]:
    """A pair or a ranking; equal scores are ties."""
    if len(answers) == 2:
        return _pair(row, prompt, answers, _better(*scores), scores[0] - scores[1])
    if len(set(scores)) == 1:
        message = (
            f"all {len(scores)} answers are equally good. A ranking needs two that differ; remove the row."
        )
        raise RowError("no preference", message)
    return {"prompt": prompt, "answers": answers, "kind": "ranking", "scores": tuple(scores)}


def _ranked(
    row: Fields, prompt: Messages, answers: tuple[Messages, ...], ranks: list[float]
) -> dict[str, Any]:
    """A pair or a ranking from ranks, of which the lower is better."""
    if len(answers) == 1:
        message = "one answer and its rank. A rank needs an answer to compare with; a rating needs 'scores'."
        raise RowError("no preference", message)
    if len(answers) == 2:
        # Ranks say which answer is better, not by how much.
        return _pair(row, prompt, answers, _better(ranks[1], ranks[0]), 0.0)
    return _scored(row, prompt, answers, [0.0 - rank for rank in ranks])  # -rank would make -0.0 of 0


def _better(first: float, second: float) -> float:
    """The probability that the first answer is better, by two scores."""
    return 0.5 if first == second else float(first > second)


def _margin(row: Fields, *, default: float) -> float:
    margin = read_number(row, "margin") if "margin" in row else default
    if not 0.0 <= margin < math.inf:
        message = (
            f"the margin is {margin:g}. Allowed: a finite number, 0 or more; swap the answers if it is less."
        )
        raise RowError("out of range", message)
    return margin
