"""The one record that every data format is read into."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict


class Message(TypedDict):
    """One turn of a conversation, in the form that chat templates take."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    thinking: NotRequired[str]


REASONING = ("reasoning_content", "thinking")
"""Keys of a message that hold what was thought before it was said."""

Messages: TypeAlias = tuple[Message, ...]
Kind: TypeAlias = Literal["pair", "ranking", "rating"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """A prompt, K answers to it, and what is known about which is better.

    kind     K   target
    pair     2   `probability` that answers[0] is the better one, and an optional `margin`
    ranking  >2  `scores`, one an answer, higher is better, equal scores are ties
    rating   1   `scores`, one number to be predicted
    """

    prompt: Messages
    """The turns before the answer; empty when a bare text is rated."""

    answers: tuple[Messages, ...]
    """K answers, each of one turn or more; of a pair the preferred one comes first."""

    kind: Kind = "pair"
    """What the target is: a pair, a ranking or a rating."""

    probability: float = 1.0
    """Of a pair: the probability, from 0.5 (a tie) to 1 (certain), that answers[0] is the better."""

    margin: float = 0.0
    """Of a pair: by how much answers[0] is the better, in units of the data; 0 if unknown."""

    scores: tuple[float, ...] = ()
    """Of a ranking or a rating: one score an answer."""

    tools: tuple[dict[str, Any], ...] = ()
    """Tool definitions that the chat template shows to the model."""

    subset: str = ""
    """Name of the group that the row is reported under at evaluation."""

    source: str = ""
    """Where the row came from, for messages: file and line."""

    @property
    def is_tie(self) -> bool:
        """Whether this is a pair whose answers are equally good."""
        return self.kind == "pair" and self.probability == 0.5

    @property
    def prompt_key(self) -> str:
        """A hash of prompt and tools: rows that share it never stand on both sides of a split."""
        text = json.dumps([self.prompt, self.tools], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()
