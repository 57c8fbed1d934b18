"""The one place where text becomes token ids; training, evaluation and scoring all come here.

A conversation is rendered by the chat template and tokenised without further special tokens; then it gets
exactly one BOS if the tokenizer is one that adds a BOS. The reward is read at its last token.

A template that prints the day it is used on (Llama 3.2, Mistral Small) always prints 26 July 2024: rewards stay.

What a message says is text: `<|im_end|>` written inside it does not end the turn, unless
`data.allow_special_tokens` says so. Only the template writes control tokens.
"""

import hashlib
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lora_rm import processes
from lora_rm.config import DataSettings
from lora_rm.console import progress, say
from lora_rm.data.preference import REASONING, Kind, Messages, Preference
from lora_rm.errors import DataError, ModelError

Conversation: TypeAlias = tuple[Messages, Sequence[dict[str, Any]]]
"""Messages, and the tools shown to the model."""

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'Human: ' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}{{ 'Assistant: ' + message['content'] + eos_token + '\\n\\n' if not loop.last else 'Assistant: ' + message['content'] + eos_token }}
{%- else -%}{{ message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}"""
"""Template for base models that have none: Human and Assistant lines, an EOS after every answer."""

TODAY = datetime(2024, 7, 26)
"""The day that templates take for today: what Llama 3.2's prints where it is given none."""

DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])([\w %.,:/-]*)\1\s*\)""", re.ASCII)

ALLOW_SPECIAL = "lora_rm_allow_special_tokens"
"""Entry of tokenizer_config.json that takes `data.allow_special_tokens` along with adapter, merge and export."""

ANOTHER = "another data.chat_template (in training; a trained model keeps its own)"
"""What many errors advise."""

STAND_IN = "controltoken"
"""A word that passes through any template, and tells what the template does with what stands there."""

PARALLEL_FROM = 5000
"""Conversations from which on further processes pay: each takes about 4 s to start."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A preference as token ids: what all its conversations begin with, and each one's own rest."""

    prompt_ids: list[int]
    """Longest common start of the K conversations, at most all but the last token of the shortest."""

    answer_ids: tuple[list[int], ...]
    """Each conversation's own tokens, at least one."""

    kind: Kind = "pair"
    probability: float = 1.0
    margin: float = 0.0
    scores: tuple[float, ...] = ()
    subset: str = ""
    group: str = ""
    """Preferences of one group answer the same prompt and are computed as one tree; "": a group of its own."""

    @classmethod
    def of_conversation(cls, ids: Sequence[int], group: str = "") -> "TokenTree":
        """A whole conversation to be scored: its last token, where the reward is read, stands for the answer."""
        return cls(list(ids[:-1]), (list(ids[-1:]),), kind="rating", scores=(0.0,), group=group)

    def conversations(self) -> list[list[int]]:
        """The K whole conversations."""
        return [self.prompt_ids + answer for answer in self.answer_ids]


class ChatTokenizer:
    """A tokenizer with its chat template, its BOS rule and a padding id that is safe for a reward model."""

    def __init__(self, tokenizer: Any, template: str = "tokenizer") -> None:
        """Args: tokenizer of transformers; template as in `data.chat_template`.

        Raises:
            ModelError: If the tokenizer has no template and none was chosen, or the template fails.
        """
        self.tokenizer = tokenizer
        tokenizer.init_kwargs.pop("auto_map", None)  # code that is never run, and must not be passed on
        if template == "plain":
            tokenizer.chat_template = PLAIN_TEMPLATE
        elif template != "tokenizer":
            tokenizer.chat_template = read_template(template)
        if isinstance(tokenizer.chat_template, dict):  # several, by name: one decides all rewards
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        if not tokenizer.chat_template:
            raise ModelError(
                "The tokenizer has no chat template, and how a conversation is written decides the rewards. "
                "Set data.chat_template to plain (Human/Assistant lines) or to the path of a .jinja file."
            )
        tokenizer.chat_template = _without_clock(tokenizer.chat_template)
        _end_texts_bare(tokenizer)
        bos = tokenizer.bos_token_id
        self.adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
        sample: Messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        if self.adds_bos:
            self._write_bos(sample)
        self._control = self._control_tokens(sample)
        names = sorted(self._control, key=len, reverse=True)  # the longest wins, as in the tokenizer
        self._control_pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._as_text: dict[str, list[int]] = {}
        try:
            self.end_id = self.ids([(sample, ())])[0][-1]
        except DataError as error:
            raise ModelError(f"data.chat_template is {template}: {error}") from None
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self._safe_pad_id())
        tokenizer.padding_side = "right"

    @classmethod
    def load(cls, folder: Path, data: DataSettings | None = None) -> "ChatTokenizer":
        """Opens the tokenizer of a model folder.

        Args:
            folder: Of the model.
            data: Whose template and special tokens hold; None: those that were saved.

        Raises:
            ModelError: If the folder has no tokenizer that transformers can open.
        """
        from transformers import AutoTokenizer

        try:
            # mistral-common, where it is installed, has no chat template
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)
        except Exception as error:  # of any kind: the tokenizers library raises bare `Exception`
            raise ModelError(
                f"{folder}: its tokenizer cannot be opened ({str(error)[:500]}). Fetch the folder again."
            ) from None
        if data is None:
            return cls(tokenizer)
        chat = cls(tokenizer, data.chat_template)
        chat.allow_special_tokens = data.allow_special_tokens
        return chat

    @property
    def pad_id(self) -> int:
        """Token id for padding; no conversation ends with it, so it cannot move the pooled position."""
        return self.tokenizer.pad_token_id

    @property
    def template_hash(self) -> str:
        """SHA-256 of the chat template."""
        return hashlib.sha256(self.tokenizer.chat_template.encode()).hexdigest()

    @property
    def allow_special_tokens(self) -> bool:
        """Whether special tokens written inside a message become control tokens; saved with the tokenizer."""
        return self.tokenizer.init_kwargs.get(ALLOW_SPECIAL) is True

    @allow_special_tokens.setter
    def allow_special_tokens(self, allow: bool) -> None:
        """Takes the setting over; it is written with the tokenizer."""
        self.tokenizer.init_kwargs.pop(ALLOW_SPECIAL, None)
        if allow:
            self.tokenizer.init_kwargs[ALLOW_SPECIAL] = True

    def identity(self) -> str:
        """A hash of all that decides how text becomes ids: vocabulary, merges, template, BOS and special tokens.

        Which token is the EOS, or any other that templates print by its role, the vocabulary does not tell.
        """
        parts = (
            self.tokenizer.backend_tokenizer.to_str(),
            self.tokenizer.chat_template,
            json.dumps(self.tokenizer.special_tokens_map, sort_keys=True),
            str(self.adds_bos),
            str(self.allow_special_tokens),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def render(self, messages: Messages, tools: Sequence[dict[str, Any]] = ()) -> str:
        """The text of a conversation, with its special tokens.

        Raises:
            DataError: If the template refuses the conversation.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False
            )
        except Exception as error:  # a template is a program: 1/0, a missing key, range(10**9)
            raise DataError(
                f"the chat template refuses a conversation of roles {[m['role'] for m in messages]}: {error}. "
                f"Change the conversation, or choose {ANOTHER}."
            ) from None

    def ids(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Token ids of whole conversations, each with its tools; exactly one BOS where there is one.

        Raises:
            DataError: If the template refuses a conversation, or leaves out its tools or tool calls.
        """
        for messages, tools in conversations:
            self._check_tools(messages, tools)
        rendered = [self._render_as_text(messages, tools) for messages, tools in conversations]
        rows = self.text_ids([text for text, _ in rendered])
        if not all(rows):
            raise DataError(
                "the chat template makes no tokens of a conversation, so there is none to read a reward at. "
                f"Choose {ANOTHER}."
            )
        return [
            self._ids_as_text(text, spans) if spans else row
            for (text, spans), row in zip(rendered, rows, strict=True)
        ]

    def _check_tools(self, messages: Messages, tools: Sequence[dict[str, Any]]) -> None:
        """Raises if the text is the same without the tools, or without the tool calls: answers would look alike."""
        others: list[tuple[str, Conversation]] = [("tools", (messages, ()))] if tools else []
        if any("tool_calls" in message for message in messages):
            bare: list[Any] = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages]
            others.append(("tool calls", (tuple(bare), tools)))
        for name, other in others:
            try:
                is_left_out = self.render(*other) == self.render(messages, tools)
            except (
                DataError
            ):  # what cannot do without them reads them; if it refuses both, that is said later
                continue
            if is_left_out:
                raise DataError(
                    f"the chat template prints no {name}, and a conversation has some. Choose {ANOTHER}, one "
                    "that prints them, or leave such rows out."
                )

    def prints(
        self, messages: Messages, tools: Sequence[dict[str, Any]], place: int, key: str, value: str
    ) -> bool:
        """Whether the template prints the word `STAND_IN` where a message has this value; True if it refuses it."""
        changed: list[Any] = [*messages]
        changed[place] = {**messages[place], key: value}
        try:
            return STAND_IN in self.render(tuple(changed), tools)
        except DataError:
            return True

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that are rendered already; their special tokens count, whoever wrote them."""
        if not texts:
            return []
        return [self._one_bos(row) for row in self.tokenizer(list(texts), add_special_tokens=False).input_ids]

    def _one_bos(self, row: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        while bos is not None and row[:2] == [bos, bos]:
            row = row[1:]
        return [bos, *row] if self.adds_bos and row[:1] != [bos] else row

    def _write_bos(self, sample: Messages) -> None:
        """Lets the template write the BOS: programs that render with it (TRL, vLLM's chat requests) then add none themselves.

        Not where that would change other tokens: some tokenizers put a space before a text, and none after a BOS.
        """
        bos, number = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        system: Messages = ({"role": "system", "content": "a"},)
        for talk in (sample, sample * 2, system + sample):
            with suppress(DataError):
                text = self.render(talk)
                bare, whole = self.tokenizer([text, bos + text], add_special_tokens=False).input_ids
                if text.startswith(bos) or whole != [number, *bare]:
                    return
        self.tokenizer.chat_template = "{{ bos_token }}" + self.tokenizer.chat_template

    def _control_tokens(self, sample: Messages) -> dict[str, int]:
        """The tokens that only the template may write: special ones, and others that it puts between turns.

        Of the others, what DeepSeek writes before a user's turn is one. `<think>` is none, which answers hold and templates
        look for, nor are Gemma's tokens of line breaks, which are text.
        """
        added = self.tokenizer.added_tokens_decoder
        try:
            between = set(self.text_ids([self.render((*sample, sample[0]))])[0])
        except DataError:  # a template of two turns
            between = set()
        between = {
            n for n in between if n in added and added[n].content.strip() not in ("", "<think>", "</think>")
        }
        return {token.content: n for n, token in added.items() if token.special or n in between}

    def _render_as_text(
        self, messages: Messages, tools: Sequence[dict[str, Any]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where in it a message, not the template, wrote a control token."""
        if self.allow_special_tokens or not _holds(self._control_pattern, (messages, tools)):
            return self.render(messages, tools), []
        # a stand-in in letters and digits passes through any template, and tells what it did to the message
        stand_in = STAND_IN
        while _holds(re.compile(stand_in), (messages, tools)):
            stand_in += "x"
        names = list(self._control)

        def replace(found: re.Match[str]) -> str:
            return f"{stand_in}{names.index(found[0])}z"

        text = self.render(*(_replaced(self._control_pattern, replace, part) for part in (messages, tools)))
        parts = re.split(f"{stand_in}(\\d+)z", text)
        parts[1::2] = [names[int(number)] for number in parts[1::2]]
        ends = list(accumulate(map(len, parts)))
        return "".join(parts), list(zip(ends[:-1:2], ends[1::2], strict=True))

    def _ids_as_text(self, text: str, spans: list[tuple[int, int]]) -> list[int]:
        """Token ids of a rendered text whose `spans` (start, end) hold no control tokens, only their names."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = set(self._control.values())
        row: list[int] = []
        last = 0
        for number, (start, end) in zip(found.input_ids, found.offset_mapping, strict=True):
            while last < len(spans) - 1 and spans[last][1] <= start:
                last += 1
            if number in ids and start < spans[last][1] and spans[last][0] < end:
                row += self._name_ids(text[start:end])
            else:
                row.append(number)
        return self._one_bos(row)

    def _name_ids(self, name: str) -> list[int]:
        """Token ids of the characters of a control token's name.

        Raises:
            DataError: If the tokenizer has no tokens for them.
        """
        if name not in self._as_text:
            ids = set(self._control.values()) - {self.tokenizer.unk_token_id}
            opener = next(iter(self._control))
            # cut in two it is no name any more; after a control token no tokenizer puts a space before a word
            for cut in range(1, len(name)):
                starts = [opener + part for part in (name[:cut], name[cut:])]
                row = [
                    n for part in self.tokenizer(starts, add_special_tokens=False).input_ids for n in part[1:]
                ]
                if not ids.intersection(row):
                    self._as_text[name] = row
                    break
            else:
                raise DataError(
                    f"a message holds the special token {name!r}, which this tokenizer cannot write as text. Remove "
                    "it from the message, or set data.allow_special_tokens True if it is meant as a control token."
                )
        return self._as_text[name]

    def plain_text(self, conversation: Conversation, ids: Sequence[int]) -> str | None:
        """The text from which a plain tokenizer call, which adds the BOS that it always adds, makes a conversation's ids.

        If there is none, the decoded text, which has the same control tokens: some tokenizers put a space before a text and
        none after a BOS. None where a message holds the name of a control token: other programs cannot tell it from the token.
        """
        tokenizer, own = self.tokenizer, list(ids)
        start = tokenizer.bos_token if self.adds_bos else ""
        decoded = self.decoded(own)  # of a conversation whose prompt was cut there is no other
        for text in (self.render(*conversation), decoded):
            while start and text.startswith(start):
                text = text.removeprefix(start)
            if tokenizer(text).input_ids == own:
                return text
        control = set(self._control.values())
        again = self.text_ids([decoded])[0]
        return decoded if [n for n in again if n in control] == [n for n in own if n in control] else None

    def decoded(self, ids: list[int]) -> str:
        """The text of token ids, without the BOS if a plain tokenizer call adds it."""
        return self.tokenizer.decode(ids[1:] if self.adds_bos else ids, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        """Writes tokenizer and template so that `AutoTokenizer.from_pretrained(folder)` opens them.

        In the words of transformers 4, which version 5 reads too, while version 4 fails on those of 5.
        """
        self.tokenizer.save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            # without them version 4 gives GPT-2 token types, which it adds to its embeddings
            config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")

    def _safe_pad_id(self) -> int:
        """The tokenizer's own pad id if nothing ends with it, else a special token that nothing ends with.

        Where there is no such token, the longest of the words with a space before them: as a pad token it becomes a
        special one, which texts would hold if it were "!" (the first of GPT-2's), but not with the vocabulary's sign for a
        space.

        `*ForSequenceClassification` pools at the last token that is not the pad id, so with pad = EOS it reads
        the token before a final EOS (transformers 5.23, modeling_layers.py).
        """
        tokenizer = self.tokenizer
        ends = {self.end_id, tokenizer.eos_token_id}
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
            return tokenizer.pad_token_id
        added = sorted(tokenizer.added_tokens_decoder.items())
        special = [number for number, token in added if token.special and number not in ends]
        named = [number for number, token in added if number in special and "pad" in token.content.lower()]
        others = [number for number in special if number != tokenizer.bos_token_id]
        if special:
            return (named + others + special)[0]
        # the signs of byte-level vocabularies and of SentencePiece's
        signs = ("\u0120", "\u2581")
        words = [(len(word), word, n) for word, n in tokenizer.get_vocab().items() if word.startswith(signs)]
        longest = [n for _, _, n in sorted(words, reverse=True) if n not in ends][:1]
        anything = [n for n in range(len(ends) + 1) if n not in ends]
        return (longest + anything)[0]


CACHE_VERSION = 1
"""To be raised when the code gives a text other ids: kept ones are then not read."""


def tokenize(
    preferences: Sequence[Preference],
    chat: ChatTokenizer,
    *,
    max_length: int,
    length_policy: Literal["drop", "truncate_prompt"] = "drop",
    on_bad_row: Literal["raise", "skip"] = "raise",
    num_workers: int = 1,
    cache: Path | None = None,
) -> tuple[list[TokenTree | None], Counter[str]]:
    """Turns preferences into trees of token ids.

    Args:
        preferences: Any kinds mixed.
        chat: Tokenizer and template.
        max_length: Longest conversation, in tokens.
        length_policy: `drop`, or `truncate_prompt`, which keeps the BOS, the end of the prompt and whole answers.
        on_bad_row: Whether a conversation that the template refuses is an error, or dropped.
        num_workers: Processes; 0: as many as cores. Short lists are done in this process.
        cache: Folder in which token ids are kept under a hash of texts, tokenizer and template.

    Returns:
        One tree a preference, None where it was dropped, and how many were dropped or truncated, by reason.

    Raises:
        DataError: If a conversation ends with the padding id, or the template refuses one (with `on_bad_row` raise).
    """
    ids = _all_ids(preferences, chat, num_workers, cache)
    _tell_left_out(preferences, chat)
    counts: Counter[str] = Counter()
    trees: list[TokenTree | None] = []
    for preference, rows in zip(preferences, ids, strict=True):
        if any(row[-1:] == [chat.pad_id] for row in rows):
            raise DataError(
                f"{preference.source}: its conversation ends with the padding token "
                f"{chat.tokenizer.pad_token!r}, so other programs would read the reward at another token. "
                "End the chat template with the EOS token."
            )
        try:
            if not all(rows):
                rows = chat.ids(
                    [(preference.prompt + answer, preference.tools) for answer in preference.answers]
                )
            tree, reason = _tree(preference, rows, chat, max_length, length_policy)
        except DataError as error:
            if on_bad_row == "raise":
                raise DataError(f"{preference.source}: {error}") from None
            tree, reason = None, "dropped: refused by the chat template"
        trees.append(tree)
        if reason:
            counts[reason] += 1
    return trees, counts


def _tell_left_out(preferences: Sequence[Preference], chat: ChatTokenizer) -> None:
    """Says what the template leaves out: system or tool messages with some, the reasoning of answers with others.

    As that of DeepSeek-R1's distilled models does, or gpt-oss's with all system messages but the first.
    """
    examples: dict[str, tuple[Conversation, int, str, str]] = {}
    counts: Counter[str] = Counter()
    for preference in preferences:
        own: dict[str, tuple[Conversation, int, str, str]] = {}
        for answer in preference.answers:
            messages = preference.prompt + answer
            conversation, last, text = (
                (messages, preference.tools),
                len(messages) - 1,
                messages[-1]["content"],
            )
            for place, message in enumerate(messages):
                if message["content"] and "tool_calls" not in message:  # beside calls some print no content
                    what = (
                        f"{message['role']} messages {'after the first message' if place else 'at the start'}"
                    )
                    own[what] = conversation, place, "content", STAND_IN
            for key in REASONING:
                if messages[-1].get(key):
                    own[f"the answers' {key}"] = conversation, last, key, STAND_IN
            if "</think>" in text:
                thought = f"<think>\n{STAND_IN}\n</think>{text.rpartition('</think>')[2]}"
                own["what answers hold in <think>"] = conversation, last, "content", thought
        counts.update(own.keys())
        examples = own | examples
    for what, ((messages, tools), place, key, value) in examples.items():
        if not chat.prints(messages, tools, place, key, value):
            say(
                f"The chat template leaves out {what} ({counts[what]} preferences): the rewards will know nothing of it. "
                "If they should, choose another data.chat_template, which prints it."
            )


def _tree(
    preference: Preference, rows: list[list[int]], chat: ChatTokenizer, max_length: int, length_policy: str
) -> tuple[TokenTree | None, str]:
    """The tree of one preference, or None; and why it was dropped or cut, if it was."""
    reason = ""
    if len(set(map(tuple, rows))) < len(rows):
        return None, "dropped: answers identical as tokens"
    excess = max(map(len, rows)) - max_length
    too_long = f"dropped: longer than {max_length} tokens"
    if excess > 0 and length_policy == "drop":
        return None, too_long
    # the prompt itself: where there is one answer, or where it may have to be cut
    prompt = 0
    if len(rows) == 1 or excess > 0:
        prompt = min(common_length([rows[0], _prompt_ids(preference, chat)]), min(map(len, rows)) - 1)
    shared = min(common_length(rows), min(map(len, rows)) - 1) if len(rows) > 1 else prompt
    if excess > 0:
        # the BOS stays; at least one prompt token beside it must be left to make sense of the answer
        first = 1 if rows[0][:1] == [chat.tokenizer.bos_token_id] else 0
        # answers may begin alike: what they share beyond the prompt must not be cut
        if first + excess >= min(shared, prompt):
            return None, too_long
        rows = [row[:first] + row[first + excess :] for row in rows]
        shared -= excess
        reason = f"prompt cut to fit {max_length} tokens"
    tree = TokenTree(
        rows[0][:shared],
        tuple(row[shared:] for row in rows),
        preference.kind,
        preference.probability,
        preference.margin,
        preference.scores,
        preference.subset,
        preference.prompt_key if preference.prompt else "",
    )
    return tree, reason


def _prompt_ids(preference: Preference, chat: ChatTokenizer) -> list[int]:
    """The prompt alone: as far as a single conversation begins with it, it may be cut."""
    return chat.ids([(preference.prompt, preference.tools)])[0] if preference.prompt else []


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many ids the rows have in common at their start; compares slices, a millionth id takes no loop."""
    low, high = 0, min(map(len, rows))
    while low < high:
        middle = (low + high + 1) // 2
        if all(list(row[low:middle]) == list(rows[0][low:middle]) for row in rows[1:]):
            low = middle
        else:
            high = middle - 1
    return low


def _all_ids(
    preferences: Sequence[Preference], chat: ChatTokenizer, num_workers: int, cache: Path | None
) -> list[list[list[int]]]:
    """The ids of every conversation of every preference, out of the cache if they are there; [] where refused."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    conversations: list[Conversation] = [
        (p.prompt + answer, p.tools) for p in preferences for answer in p.answers
    ]
    file = None
    if cache is not None:
        text = json.dumps([CACHE_VERSION, chat.identity(), conversations], ensure_ascii=True)
        file = cache / "tokens" / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    flat: list[list[int]] | None = None
    if file is not None and file.is_file():
        try:
            stored = load_file(file)
            parts = np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])
            flat = list(_interned((part.tolist() for part in parts), {}))
        except (OSError, SafetensorError, KeyError) as error:
            say(f"{file}: is damaged ({error}); the texts are tokenised again.")
    if flat is None or len(flat) != len(conversations):
        flat = _tokenize_all(conversations, chat, num_workers)
        if file is not None and flat:
            partial = file.with_suffix(f".{os.getpid()}.partial")
            ids = np.fromiter(chain.from_iterable(flat), dtype=np.int32)
            lengths = np.array([len(row) for row in flat], dtype=np.int64)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                save_file({"ids": ids, "lengths": lengths}, partial)
                partial.replace(file)
            except (OSError, SafetensorError) as error:
                say(f"{file}: token ids are not kept for the next time ({error}).")
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
    rows = iter(flat)
    return [[next(rows) for _ in preference.answers] for preference in preferences]


def _tokenize_all(
    conversations: list[Conversation], chat: ChatTokenizer, num_workers: int
) -> list[list[int]]:
    chunks = [conversations[start : start + 256] for start in range(0, len(conversations), 256)]
    workers = num_workers or processes.num_cores()
    flat: list[list[int]] = []
    known: dict[int, int] = {}
    with progress("tokenising", len(conversations)) as advance:
        if workers == 1 or len(conversations) < PARALLEL_FROM:
            for chunk in chunks:
                flat += _interned(_ids_if_rendered(chat, chunk), known)
                advance(len(chunk))
            return flat
        # spawn, not fork: a forked child would inherit torch's and the tokenizer's threads in unknown states
        context = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                for rows in pool.map(partial(_ids_if_rendered, chat), chunks):
                    flat += _interned(rows, known)
                    advance(len(rows))
        except BrokenProcessPool:
            raise DataError(
                f"One of {workers} processes that tokenise has died. Most often the machine's memory is full: close other "
                "programs, or set data.num_workers 1. Or they were started by a script that does its work when it is "
                "imported: put it under `if __name__ == '__main__':`. Nothing was written."
            ) from None
    return flat


def _interned(rows: Iterable[list[int]], known: dict[int, int]) -> Iterator[list[int]]:
    """The rows with one object for each id: Python's take 8 bytes a token then, and 36 otherwise."""
    return ([known.setdefault(number, number) for number in row] for row in rows)


def _ids_if_rendered(chat: ChatTokenizer, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Token ids of conversations; none of one that the template refuses, for which the caller asks alone."""
    try:
        return chat.ids(conversations)
    except DataError:
        if len(conversations) == 1:
            return [[]]
    return [row for one in conversations for row in _ids_if_rendered(chat, [one])]


def _holds(pattern: re.Pattern[str], value: Any) -> bool:
    """Whether a text anywhere in nested lists and objects has a match."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, dict):
        return any(_holds(pattern, item) for pair in value.items() for item in pair)
    return isinstance(value, list | tuple) and any(_holds(pattern, item) for item in value)


def _replaced(pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], value: Any) -> Any:
    """Nested lists and objects with every match replaced in all of their texts."""
    if isinstance(value, str):
        return pattern.sub(replace, value)
    if isinstance(value, dict):
        return {
            _replaced(pattern, replace, k): _replaced(pattern, replace, item) for k, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_replaced(pattern, replace, item) for item in value]
    return value


def _end_texts_bare(tokenizer: Any) -> None:
    """Keeps a tokenizer from ending every text with an EOS of its own, as `add_eos_token` makes it.

    The template alone says how a conversation ends, and plain calls of other programs must give the same. What comes
    after a text otherwise than by a `TemplateProcessing`, as in BERT's tokenizers, stays.
    """
    if tokenizer("a").input_ids[-1:] == tokenizer("a", add_special_tokens=False).input_ids[-1:]:
        return
    tokenizer.init_kwargs.pop("add_eos_token", None)  # by which it would be made so again when it is opened
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    processor = state["post_processor"]
    for part in (processor, *processor.get("processors", ())):
        if part["type"] == "TemplateProcessing":
            while part["single"] and "Sequence" not in part["single"][-1]:
                part["single"].pop()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = type(backend).from_str(json.dumps(state)).post_processor


def _without_clock(template: str) -> str:
    """The template with `TODAY` for today: each `strftime_now("%d %b %Y")` becomes the text that it gives."""
    template = DATE_CALL.sub(lambda call: f"{call[1]}{TODAY.strftime(call[2])}{call[1]}", template)
    if "strftime_now(" in template and "macro strftime_now(" not in template:  # its format is no literal
        # templates are read with trim_blocks: the line break after the block goes
        return f"{{% macro strftime_now(format) %}}{TODAY:%d %b %Y}{{% endmacro %}}\n" + template
    return template


def read_template(path: str) -> str:
    """The text of a .jinja file.

    Raises:
        ModelError: If it cannot be read.
    """
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            raise OSError("it is no file")
        with file.open(encoding="utf-8") as stream:
            text = stream.read(2**20)  # the longest template so far has 20,000 characters
        if not text:
            raise ValueError("it is empty")
        return text
    except (OSError, ValueError) as error:
        raise ModelError(
            f"data.chat_template is {path}, which cannot be read ({error}). Allowed: tokenizer, plain, or a .jinja file."
        ) from None
