"""Conversations: prompts and answers out of texts, message lists, ShareGPT and HH transcripts."""

import re
from collections.abc import Sequence
from typing import Any, cast

from lora_rm.data.fields import (
    Fields,
    RowError,
    check_no_media,
    check_objects,
    check_text,
    empty,
    missing,
    parse_json,
    read_content,
    read_list,
    read_optional_text,
    read_tool_calls,
    require,
    shown,
    wrong_type,
)
from lora_rm.data.preference import REASONING, Message, Messages

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
}
QUESTIONS = ("question", "instruction", "query")
"""Other names of the prompt, where the answers are texts; alpaca's `instruction` goes on with its `input`."""

KEPT = ("tool_call_id", "name", *REASONING)
"""Keys of a message, all texts, that chat templates read beside role, content and tool calls."""

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_prompt(row: Fields, *names: str) -> Messages:
    """Reads the prompt from the first column of `names`, or of `QUESTIONS`, that is there.

    A text is one user message, or a transcript.
    """
    name = next((name for name in (*names, *QUESTIONS) if name in row), names[0])
    require(row, name)
    value = row[name]
    if name == "instruction" and read_optional_text(row, "input"):
        value = f"{check_text(value, name)}\n{row['input']}"
    if isinstance(value, str) and is_hh(value):
        prompt = read_hh(value.rstrip().removesuffix("\n\nAssistant:"), name)
    else:
        prompt = read_messages(value, name, "user")
    if prompt[-1]["role"] == "assistant":
        message = f"field '{name}' ends with a message from the assistant. It ends before the answer; cut it."
        raise RowError("wrong roles", message)
    start = 1 if prompt[0]["role"] == "system" else 0
    return prompt[:start] + _read_history(row) + prompt[start:]


def _read_history(row: Fields) -> Messages:
    """The turns before the prompt: LLaMA-Factory's and ms-swift's column of [user, assistant] pairs."""
    turns: list[Message] = []
    for index, pair in enumerate(read_list(row, "history") if row.get("history") else ()):
        field = f"history[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong_type(field, pair, "a pair [user, assistant] of texts")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": check_text(text, field)})
    return tuple(turns)


def read_answer(value: Any, field: str) -> Messages:
    """Reads an answer that does not repeat the prompt; a text is one assistant message."""
    answer = read_messages(value, field, "assistant")
    check_ends_with_assistant(answer, field)
    if answer[0]["role"] != "assistant":
        message = (
            f"field '{field}' starts with the role '{answer[0]['role']}'. "
            "An answer starts with the assistant; move what comes before it to the prompt."
        )
        raise RowError("wrong roles", message)
    return answer


def read_repeating(value: Any, field: str) -> Messages:
    """Reads an answer that may repeat the prompt: a list of messages or a transcript; other texts do not repeat it."""
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        return read_hh(value, field)
    return read_messages(value, field, "assistant")


def read_conversation(value: Any, field: str) -> Messages:
    """Reads a whole conversation, which a text cannot be."""
    if isinstance(value, str):
        raise wrong_type(field, value, "a list of messages, for it is a whole conversation")
    conversation = read_messages(value, field, "assistant")
    check_ends_with_assistant(conversation, field)
    return conversation


def check_ends_with_assistant(answer: Messages, field: str) -> None:
    """Raises if somebody else has the last word."""
    if answer[-1]["role"] != "assistant":
        message = (
            f"field '{field}' ends with the role '{answer[-1]['role']}'. "
            "The last message must be the assistant's; cut or complete it."
        )
        raise RowError("wrong roles", message)


def as_repeated(prompt: Messages, answers: Sequence[Messages]) -> Messages:
    """The prompt as the first answer that repeats it writes it: a prompt column is often stripped."""
    for answer in answers:
        if answer[0]["role"] != "assistant" and _repeats(answer, prompt):
            start = _prompt_start(answer, prompt)
            return answer[start : start + len(prompt)]
    return prompt


def repeat_prompt(prompt: Messages, answer: Messages) -> Messages:
    """Makes a whole conversation of an answer; one that repeats the prompt gets the prompt's own white space."""
    if answer[0]["role"] == "assistant":
        return prompt + answer
    if not _repeats(answer, prompt):
        message = (
            f"an answer starts with the role '{answer[0]['role']}' and other messages than the prompt. "
            "It either repeats the prompt or starts with the assistant; correct one of the two."
        )
        raise RowError("different prompt", message)
    start = _prompt_start(answer, prompt)
    return answer[:start] + prompt + answer[start + len(prompt) :]


def split_conversations(chosen: Messages, rejected: Messages) -> tuple[Messages, tuple[Messages, Messages]]:
    """Splits two conversations into the prompt that they share and the two answers.

    The prompt is the longest common prefix that leaves a message of each and does not end with the
    assistant: two answers may begin with the same turn.

    Raises:
        RowError: If they share no more than a system message, or go on with other questions: different prompts.
    """
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and _is_same(chosen[length], rejected[length]):
        length += 1
    while length and chosen[length - 1]["role"] == "assistant":
        length -= 1
    if all(message["role"] == "system" for message in chosen[:length]) or any(
        answer[length]["role"] != "assistant" for answer in (chosen, rejected)
    ):
        message = (
            f"the two conversations begin with different messages ({chosen[length]['content'][:40]!r} and "
            f"{rejected[length]['content'][:40]!r}). Both must answer one prompt; correct one of the two."
        )
        raise RowError("different prompt", message)
    return chosen[:length], (chosen[length:], rejected[length:])


def _is_same(first: Message, second: Message) -> bool:
    """Whether two turns are the same; only white space around an answer makes another of it."""
    if first["role"] == "assistant":
        return first == second
    return first | {"content": first["content"].strip()} == second | {"content": second["content"].strip()}


def _repeats(conversation: Messages, prompt: Messages) -> bool:
    """Whether the conversation starts with the prompt, after a system message that it may have."""
    start = _prompt_start(conversation, prompt)
    repeated = conversation[start : start + len(prompt)]
    # Not `==` of the messages: a prompt column is often stripped of white space, its first message not.
    return len(repeated) == len(prompt) and all(
        said["role"] == asked["role"] and said["content"].strip() == asked["content"].strip()
        for said, asked in zip(repeated, prompt, strict=True)
    )


def read_messages(value: Any, field: str, text_role: str, *, may_be_empty: bool = False) -> Messages:
    """Reads a text, one message, or a list of messages; `may_be_empty`: of blank texts too."""
    if isinstance(value, str):
        return ({"role": text_role, "content": check_text(value, field, may_be_empty=may_be_empty)},)
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list | tuple):
        raise wrong_type(field, value, "a text or a list of messages")
    if not items:
        raise empty(field)
    return tuple(_message(item, f"{field}[{index}]", may_be_empty) for index, item in enumerate(items))


def _message(value: Any, field: str, may_be_empty: bool) -> Message:
    """Reads {role, content} or ShareGPT's {from, value}; keeps tool calls and `KEPT`, drops other keys."""
    if not isinstance(value, dict):
        raise wrong_type(field, value, "a message with 'role' and 'content'")
    is_sharegpt = "from" in value and "role" not in value
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    roles = SHAREGPT_ROLES if is_sharegpt else {role: role for role in ROLES}
    role, content, tool_calls = (value.get(key) for key in (role_key, content_key, "tool_calls"))
    if role is None:
        raise missing(f"{field}.{role_key}", value)
    if not isinstance(role, str):
        raise wrong_type(f"{field}.{role_key}", role, "a text")
    if role not in roles:
        words = f"field '{field}.{role_key}' is {shown(role)}. Allowed: {', '.join(roles)}; rename it."
        raise RowError("wrong roles", words)
    check_no_media(value, field)
    if role == "function_call":
        content, tool_calls = "", _sharegpt_calls(content, f"{field}.{content_key}")
    if content is None and tool_calls:
        content = ""
    if content is None:
        raise missing(f"{field}.{content_key}", value)
    # A tool that prints nothing is no mistake.
    may_be_empty = may_be_empty or bool(tool_calls) or roles[role] == "tool"
    text = read_content(content, f"{field}.{content_key}", may_be_empty=may_be_empty)
    message: dict[str, Any] = {"role": roles[role], "content": text}
    if tool_calls:
        message["tool_calls"] = read_tool_calls(tool_calls, f"{field}.tool_calls")
    for key in KEPT:
        if value.get(key) is not None:
            message[key] = check_text(value[key], f"{field}.{key}", may_be_empty=True)
    return cast(Message, message)


def _sharegpt_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """The tool calls of a `function_call` turn, which is JSON: {name, arguments}, or a list of them."""
    found = parse_json(check_text(value, field), field, "{name, arguments} or a list of them, as JSON")
    calls = check_objects([found] if isinstance(found, dict) else found, field)
    for call in calls:
        if not isinstance(call.get("name"), str):
            raise missing(f"{field}.name", call)
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def is_hh(text: str) -> bool:
    """Whether a text is one of Anthropic's transcripts: "Human:" and "Assistant:" after blank lines."""
    return text.lstrip().startswith("Human:")


def read_hh(text: str, field: str) -> Messages:
    """Reads the turns of a transcript; white space around a turn belongs to the notation."""
    _, *parts = HH_TURN.split("\n\n" + text.strip())
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(
        {"role": HH_ROLES[speaker], "content": check_text(turn.strip(), f"{field}[{index}]")}
        for index, (speaker, turn) in enumerate(turns)
    )


def with_system(prompt: Messages, row: Fields) -> Messages:
    """Puts the `system` column before the prompt."""
    system = read_optional_text(row, "system")
    if not system or (prompt and prompt[0] == {"role": "system", "content": system}):
        return prompt
    if any(message["role"] == "system" for message in prompt):
        message = "field 'system' is there, and another system message in the prompt. Keep one of the two."
        raise RowError("wrong roles", message)
    return ({"role": "system", "content": system}, *prompt)


def _prompt_start(conversation: Messages, prompt: Messages) -> int:
    """Where a conversation repeats the prompt: after a system message that the prompt does not have."""
    return 1 if conversation[0]["role"] == "system" != prompt[0]["role"] else 0
