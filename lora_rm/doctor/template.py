"""Checks of a chat template and of the tokens it gives."""

import random
from collections.abc import Iterator, Sequence

from lora_rm.data.preference import Preference
from lora_rm.data.tokens import ChatTokenizer, common_length
from lora_rm.doctor.finding import Finding, attempt, judge, unchecked
from lora_rm.errors import LoraRmError, ModelError

ASK, REPLY = "Kumquat?", "Persimmon."
"""A question and an answer that no chat template has in its own words."""


def template_findings(chat: ChatTokenizer, preferences: Sequence[Preference]) -> Iterator[Finding]:
    """All checks of a tokenizer and its chat template."""
    yield attempt("template", check_template, chat)
    yield attempt("BOS", check_bos, chat)
    yield attempt("generation prompt", check_generation_prompt, chat)
    yield attempt("end of answer", check_end, chat)
    yield attempt("prompt is a prefix", check_prefix, chat, preferences)


def rendered_parts(chat: ChatTokenizer) -> tuple[str, str, str]:
    """What the template writes before a question, between it and its answer, and after the answer.

    Raises:
        ModelError: If question or answer is not in the text.
    """
    text = chat.render(({"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY}))
    before, found, rest = text.partition(ASK)
    between, found_too, after = rest.partition(REPLY)
    if not found or not found_too:
        raise ModelError(
            f"the chat template does not show {'the answer' if found else 'the question'} as it is (rendered: {text!r}). "
            "Choose another --data.chat-template."
        )
    return before, between, after


def check_template(chat: ChatTokenizer) -> Finding:
    """Whether question and answer are in the rendered text, in this order."""
    remedy = (
        "Set --data.chat-template plain, or the path of a .jinja file that writes every message's content."
    )
    try:
        before, between, after = rendered_parts(chat)
    except LoraRmError as error:
        return judge("template", str(error), remedy, fault=True)
    found = f"a conversation reads {before + '(question)' + between + '(answer)' + after!r}"
    return judge("template", found, remedy, fault=False)


def check_bos(chat: ChatTokenizer) -> Finding:
    """Whether a conversation begins with one BOS if the tokenizer adds one, never with two."""
    before, _, _ = rendered_parts(chat)
    own = _leading_bos(chat, chat.text_ids([before])[0]) if before or chat.adds_bos else 0
    plain = _leading_bos(chat, chat.tokenizer(before).input_ids)
    expected = "one" if chat.adds_bos else "none or one"
    found = f"{own} at the start of a conversation (right: {expected})"
    if plain > 1 and own == 1:
        found += (
            ". Mind: the template writes a BOS and the tokenizer adds another, so other programs that tokenise rendered text "
            "need add_special_tokens=False; here the second is removed"
        )
    remedy = (
        "Write the BOS once in the template, at its very start and followed by no space, or leave it to the tokenizer. "
        "A second BOS changed about 1 % of the decisions in published benchmarks."
    )
    return judge("BOS", found, remedy, fault=own > 1 or (chat.adds_bos and own < 1), value=own)


def _leading_bos(chat: ChatTokenizer, ids: Sequence[int]) -> int:
    """BOS tokens before the first word; some families begin every later turn with one too."""
    count = 0
    for number in ids:
        if number == chat.tokenizer.bos_token_id:
            count += 1
        elif chat.tokenizer.decode([number]).strip():
            break
    return count


def check_generation_prompt(chat: ChatTokenizer) -> Finding:
    """Whether the template opens another answer after the last one, so that the reward is read there."""
    _, between, after = rendered_parts(chat)
    question = [{"role": "user", "content": ASK}]
    texts = [
        chat.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=wanted)
        for wanted in (True, False)
    ]
    prompt = texts[0].removeprefix(texts[1]) if texts[0] != texts[1] else ""
    words = between
    for special in (chat.tokenizer.eos_token, chat.tokenizer.bos_token):
        words = words.replace(special or "\0", "")
    repeats = bool(words.strip()) and after == between
    is_open = repeats or (bool(prompt) and after.endswith(prompt))
    found = f"after the answer stands {after!r}"
    found += ", the start of another answer" if is_open else ", which opens no other answer"
    remedy = (
        "Put the generation prompt of the template into {% if add_generation_prompt %} ... {% endif %}: as it is, the reward "
        "is read after the header of an answer that does not exist."
    )
    return judge("generation prompt", found, remedy, fault=is_open)


def check_end(chat: ChatTokenizer) -> Finding:
    """Whether a special token says that the answer is over; else an answer cut short looks complete."""
    _, _, after = rendered_parts(chat)
    added = chat.tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special} | set(chat.tokenizer.all_special_ids)
    ids = chat.tokenizer(after, add_special_tokens=False).input_ids
    marks = [chat.tokenizer.convert_ids_to_tokens(number) for number in ids if number in special]
    found = f"the answer is followed by {after!r}" if after else "nothing follows the answer"
    found += f", with the end mark {marks[0]}" if marks else ", with no end mark"
    remedy = (
        "End the template with the tokenizer's EOS ({{ eos_token }}) after the last answer. Without it the reward is read at "
        "the last word, and an answer that was cut short cannot be told from a whole one."
    )
    return judge("end of answer", found, remedy, fault=not after.strip(), warning=not marks, value=len(marks))


def check_prefix(chat: ChatTokenizer, preferences: Sequence[Preference]) -> Finding:
    """Whether a conversation's tokens begin with those of its prompt.

    Up to two tokens may differ at the border, where words are joined. What is not common is computed for every
    answer anew and cannot be cut.
    """
    sample = [p for p in preferences if p.prompt]
    sample = random.Random(0).sample(sample, min(200, len(sample)))
    if not sample:
        return unchecked("prompt is a prefix", "no row has a prompt")
    prompts = chat.ids([(p.prompt, p.tools) for p in sample])
    wholes = chat.ids([(p.prompt + p.answers[0], p.tools) for p in sample])
    lost = [
        len(prompt) - common_length([prompt, whole]) for prompt, whole in zip(prompts, wholes, strict=True)
    ]
    changed = sum(number > 2 for number in lost)
    share = changed / len(sample)
    kept = 1 - sum(lost) / sum(map(len, prompts))
    found = f"{changed} of {len(sample)} prompts are written differently once an answer follows; {kept:.1%} of their tokens stay"
    remedy = (
        "The template's first part changes with what follows it. Rewards stay right, but prompts cannot be shared between "
        "answers or cut. Choose a --data.chat-template that writes each message by itself."
    )
    return judge("prompt is a prefix", found, remedy, fault=False, warning=share > 0.01, value=share)
