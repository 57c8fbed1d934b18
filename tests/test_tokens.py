"""Text to token ids: BOS, padding, lengths, the common prompt, cache and workers."""

import dataclasses
import json

import pytest
from conftest import CHAT, assistant, make_tokenizer, trained_tokenizer, user
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_rm.data import tokens
from lora_rm.data.preference import Preference
from lora_rm.data.tokens import ChatTokenizer, TokenTree, common_length, tokenize
from lora_rm.errors import DataError, ModelError

BOS, EOS, USER, ASSISTANT = 1, 2, 3, 4
BARE = CHAT.removeprefix("{{ bos_token }}")
"""The template of the tiny tokenizers without the BOS."""


def make_preference(prompt, *answers, **more):
    return Preference(prompt=(user(prompt),), answers=tuple((assistant(text),) for text in answers), **more)


def make_chat(template=CHAT, *, adds_bos=True, **special):
    tokenizer = make_tokenizer()
    if not adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


def encode(chat, text):
    """Ids of a text without any special token."""
    return chat.tokenizer(text, add_special_tokens=False).input_ids


def one(chat, preference, max_length=512, **options):
    """The tree of one preference and what was counted."""
    (tree,), counts = tokenize([preference], chat, max_length=max_length, **options)
    return tree, dict(counts)


# BOS and template.


@pytest.mark.parametrize(
    ("template", "adds_bos", "start"),
    [(CHAT, True, [BOS]), (CHAT, False, [BOS]), (BARE, True, [BOS]), (BARE, False, [])],
    ids=["both", "template", "tokenizer", "neither"],
)
def test_a_conversation_has_one_bos_where_there_is_one(template, adds_bos, start):
    chat = make_chat(template, adds_bos=adds_bos)
    assert chat.adds_bos == adds_bos
    expected = [*start, USER, *encode(chat, "2 + 2?"), EOS, ASSISTANT, *encode(chat, "4"), EOS]
    assert chat.ids([((user("2 + 2?"), assistant("4")), ())]) == [expected]


@pytest.mark.parametrize("text", ["a b", "<s>a b", "<s><s>a b", "<s><s><s>a b"])
def test_a_text_that_begins_with_the_bos_gets_no_second(text):
    rest = text.replace("<s>", "")
    for adds_bos in (True, False):
        chat = make_chat(adds_bos=adds_bos)
        start = [BOS] if adds_bos or text != rest else []
        assert chat.text_ids([text]) == [start + encode(chat, rest)]


def test_a_tokenizer_without_template_is_refused_with_the_choices():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template.*plain.*\.jinja"):
        ChatTokenizer(tokenizer)


def test_of_several_templates_the_default_one_is_taken(tmp_path):
    named = {"default": CHAT, "tool_use": "{{ tools }}" + CHAT}
    tokenizer = make_tokenizer()
    tokenizer.chat_template = named
    tokenizer.save_pretrained(tmp_path / "files")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "list")
    config = json.loads((tmp_path / "list" / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    (tmp_path / "list" / "tokenizer_config.json").write_text(json.dumps(config))
    expected = make_chat()
    for chat in (make_chat(named), *(ChatTokenizer.load(tmp_path / name) for name in ("files", "list"))):
        assert (chat.template_hash, chat.identity()) == (expected.template_hash, expected.identity())
        chat.save(tmp_path / "saved")
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == CHAT
    with pytest.raises(ModelError, match="no chat template"):
        make_chat({"tool_use": CHAT})


def test_the_plain_template_writes_lines_and_an_eos_after_every_answer():
    chat = ChatTokenizer(make_tokenizer(), "plain")
    messages = (
        {"role": "system", "content": "Be brief."},
        user("Hi"),
        assistant("Hello"),
        user("Bye"),
        assistant("So long"),
    )
    text = "Be brief.\n\nHuman: Hi\n\nAssistant: Hello</s>\n\nHuman: Bye\n\nAssistant: So long</s>"
    assert chat.render(messages) == "<s>" + text
    assert chat.ids([(messages, ())]) == [[BOS, *encode(chat, text)]]
    assert encode(chat, text)[-1] == EOS


def test_a_template_may_come_from_a_file_and_is_saved_with_the_tokenizer(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}")
    chat = ChatTokenizer(make_tokenizer(), str(file))
    assert chat.render((user("a"), assistant("b"))) == "<s>[a]</s>[b]</s>"
    chat.save(tmp_path / "saved")
    again = ChatTokenizer.load(tmp_path / "saved")
    assert (again.identity(), again.template_hash, again.pad_id) == (
        chat.identity(),
        chat.template_hash,
        chat.pad_id,
    )
    with pytest.raises(ModelError, match=r"absent\.jinja, which cannot be read.*tokenizer, plain"):
        ChatTokenizer(make_tokenizer(), str(tmp_path / "absent.jinja"))


def test_a_broken_template_is_a_mistake_of_the_model(tmp_path):
    file = tmp_path / "broken.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}")
    with pytest.raises(ModelError, match="template"):
        ChatTokenizer(make_tokenizer(), str(file))


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="tokenizer cannot be opened"):
        ChatTokenizer.load(tmp_path)


def test_a_conversation_that_the_template_refuses_is_named():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT
    )
    with pytest.raises(DataError, match=r"\['system', 'user'\]: no system turn.*chat_template"):
        make_chat(template).render(({"role": "system", "content": "a"}, user("b")))


@pytest.mark.parametrize(
    ("call", "day"),
    [
        ("strftime_now('%Y-%m-%d')", "2024-07-26"),  # gpt-oss, Mistral Small
        ('strftime_now( "%d %B %Y" )', "26 July 2024"),  # SmolLM3
        ("strftime_now(form)", "26 Jul 2024"),
    ],
)
def test_a_template_takes_the_same_day_for_today_every_day(call, day, tmp_path):
    template = (
        "{{ bos_token }}\n{% set form = '%d %b %Y %H:%M:%S.%f' %}{% if strftime_now is defined %}{{ "
        + call
        + " }}{% endif %}"
    )
    chat = make_chat(template + BARE)
    messages = (user("a"), assistant("b"))
    assert chat.render(messages) == f"<s>\n{day}<|user|>a</s><|assistant|>b</s>"
    chat.save(tmp_path)
    for again in (ChatTokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        text = getattr(again, "tokenizer", again).apply_chat_template(messages, tokenize=False)
        assert text == chat.render(messages)
    assert ChatTokenizer.load(tmp_path).template_hash == chat.template_hash


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_row_that_the_template_refuses_is_named_or_dropped(tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(tokens, "PARALLEL_FROM", 3)
    chat, good = make_chat(NO_SYSTEM), make_preference("a", "b", "c", source="pairs.jsonl line 1")
    with_system = ({"role": "system", "content": "s"}, *good.prompt)
    refused = dataclasses.replace(good, prompt=with_system, source="pairs.jsonl line 2")
    for _ in range(2):  # the second time out of the cache
        options = {"max_length": 512, "num_workers": num_workers, "cache": tmp_path}
        with pytest.raises(
            DataError, match=r"pairs.jsonl line 2: the chat template refuses .*no system turn"
        ):
            tokenize([good, refused], chat, **options)
        (first, second), counts = tokenize([good, refused], chat, on_bad_row="skip", **options)
        assert first.conversations() == one(chat, good)[0].conversations()
        assert second is None
        assert counts == {"dropped: refused by the chat template": 1}


TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
CALLS = CHAT.replace("{{ eos_token }}", "{{ (m.tool_calls or []) | tojson }}{{ eos_token }}")


@pytest.mark.parametrize(
    ("template", "left_out"),
    [(CHAT, "tools"), (TOOLS + CHAT, "tool calls"), (CALLS, "tools"), (TOOLS + CALLS, "")],
)
def test_tools_and_calls_that_the_template_leaves_out_are_refused(template, left_out):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
    }
    conversation = ((user("q"), call, {"role": "tool", "content": "4"}, assistant("4")), [{"name": "add"}])
    chat = make_chat(template)
    assert chat.ids([(conversation[0][:1], ())])
    if left_out:
        with pytest.raises(DataError, match=f"the chat template prints no {left_out}, and"):
            chat.ids([conversation])
    else:
        (row,) = chat.ids([conversation])
        assert chat.tokenizer.decode(row).count("add") == 2


# Padding.


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({}, "<unk>"),  # pad = EOS: another special token
        ({"additional_special_tokens": ["<a>", "<my_pad>", "<b>"]}, "<my_pad>"),  # one that is named so
        ({"pad_token": "<fill>"}, "<fill>"),  # a pad token of its own stays
    ],
)
def test_the_padding_token_ends_no_conversation(special, expected):
    chat = make_chat(**special)
    assert chat.tokenizer.pad_token == expected
    assert chat.pad_id == chat.tokenizer.convert_tokens_to_ids(expected)
    assert chat.pad_id not in (BOS, EOS, chat.ids([((user("a"), assistant("b")), ())])[0][-1])
    assert chat.tokenizer.padding_side == "right"


def test_a_conversation_that_ends_with_the_padding_token_is_refused():
    chat = make_chat(CHAT.replace("{{ eos_token }}", ""), pad_token="<fill>")
    chat.allow_special_tokens = True
    with pytest.raises(DataError, match=r"pairs line 3: .*padding token '<fill>'"):
        tokenize([make_preference("a", "b", "c<fill>", source="pairs line 3")], chat, max_length=512)


# Trees.


def test_a_tree_is_the_common_start_and_each_answers_rest():
    chat = make_chat()
    preference = make_preference("2 + 2?", "4", "5", margin=2.0, subset="sums")
    tree, counts = one(chat, preference)
    prompt = [BOS, USER, *encode(chat, "2 + 2?"), EOS, ASSISTANT]
    assert tree == TokenTree(
        prompt,
        ([*encode(chat, "4"), EOS], [*encode(chat, "5"), EOS]),
        margin=2.0,
        subset="sums",
        group=preference.prompt_key,
    )
    assert counts == {}


def test_what_the_answers_have_in_common_belongs_to_the_prompt():
    chat = make_chat()
    tree, _ = one(chat, make_preference("Go?", "yes it is", "yes it is not"))
    first, second = ([*encode(chat, text), EOS] for text in ("yes it is", "yes it is not"))
    shared = common_length([first, second])
    assert shared >= 3
    assert tree.prompt_ids[-shared:] == first[:shared]
    assert tree.answer_ids == (first[shared:], second[shared:])
    assert all(tree.answer_ids)


def test_an_answer_that_begins_another_keeps_its_last_token():
    chat = make_chat("{% for m in messages %}{{ m.content }}{% endfor %}")
    shorter, longer = chat.text_ids(["a x", "a x y"])
    assert longer[: len(shorter)] == shorter
    tree, _ = one(chat, make_preference("a", " x", " x y"))
    assert tree.answer_ids == (shorter[-1:], longer[len(shorter) - 1 :])


def test_rankings_of_three_and_ratings_of_one():
    chat = make_chat()
    prompt = [BOS, USER, *encode(chat, "2 + 2?"), EOS, ASSISTANT]
    ranking = make_preference("2 + 2?", "4", "3", "999", kind="ranking", scores=(3.0, 1.0, 0.0))
    tree, _ = one(chat, ranking)
    assert tree.prompt_ids == prompt
    assert tree.answer_ids == tuple([*encode(chat, text), EOS] for text in ("4", "3", "999"))
    assert (tree.kind, tree.scores) == ("ranking", (3.0, 1.0, 0.0))
    tree, _ = one(chat, make_preference("2 + 2?", "4", kind="rating", scores=(7.0,)))
    assert tree.conversations() == [[*prompt, *encode(chat, "4"), EOS]]
    assert (tree.kind, tree.scores) == ("rating", (7.0,))


def test_answers_that_are_the_same_tokens_are_dropped_and_counted():
    chat = make_chat(CHAT.replace("m['content']", "m['content'] | trim"))
    same, good = make_preference("a", "4", "4 "), make_preference("a", "4", "5 ")
    trees, counts = tokenize([same, good, same], chat, max_length=512)
    assert [tree is None for tree in trees] == [True, False, True]
    assert counts == {"dropped: answers identical as tokens": 2}


@pytest.mark.parametrize(
    ("rows", "length"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 2), ([[1], [2]], 0), ([[5, 6]], 2)],
)
def test_common_length(rows, length):
    assert common_length(rows) == length


# Lengths.

LONG = make_preference("one two three four five six seven eight", "9 is nine", "3 is three, and more")


def test_drop_leaves_out_what_is_longer_and_nothing_else():
    chat = make_chat()
    whole, _ = one(chat, LONG)
    length = max(map(len, whole.conversations()))
    assert one(chat, LONG, length) == (whole, {})
    assert one(chat, LONG, length - 1) == (None, {f"dropped: longer than {length - 1} tokens": 1})


@pytest.mark.parametrize("template", [CHAT, BARE], ids=["bos", "no bos"])
def test_truncate_prompt_keeps_the_bos_the_end_of_the_prompt_and_whole_answers(template):
    chat = make_chat(template, adds_bos=False)
    whole, _ = one(chat, LONG)
    first = len([BOS]) if template == CHAT else 0
    start, prompt = whole.prompt_ids[:first], whole.prompt_ids[first:]
    assert start == [BOS][:first]
    length = max(map(len, whole.conversations()))
    for cut in range(1, len(prompt) - 1):  # its last token already opens the answer
        tree, counts = one(chat, LONG, length - cut, length_policy="truncate_prompt")
        assert tree.prompt_ids == start + prompt[cut:]
        assert tree.answer_ids == whole.answer_ids
        assert all(answer[-1] == EOS for answer in tree.answer_ids)
        assert max(map(len, tree.conversations())) == length - cut
        assert counts == {f"prompt cut to fit {length - cut} tokens": 1}
    short = length - len(prompt)  # no token of the prompt would be left
    found = one(chat, LONG, short, length_policy="truncate_prompt")
    assert found == (None, {f"dropped: longer than {short} tokens": 1})


def test_truncate_prompt_leaves_a_short_one_alone():
    chat = make_chat()
    assert one(chat, LONG, 512, length_policy="truncate_prompt") == one(chat, LONG, 512)


def test_truncate_prompt_never_cuts_what_answers_have_in_common():
    chat = make_chat()
    start = "The answer to this question is, as far as anyone can tell, "
    preference = make_preference("Why?", start + "yes", start + "no")
    prompt = [BOS, USER, *encode(chat, "Why?"), EOS, ASSISTANT]
    whole, _ = one(chat, preference)
    excess = len(prompt) + 4
    assert len(whole.prompt_ids) > excess + 4
    length = max(map(len, whole.conversations())) - excess
    tree, counts = one(chat, preference, length, length_policy="truncate_prompt")
    assert tree is None, f"an answer was cut: {chat.tokenizer.decode(tree.conversations()[0])}"
    assert counts == {f"dropped: longer than {length} tokens": 1}


def test_truncate_prompt_never_cuts_a_single_answer():
    chat = make_chat()
    rating = make_preference("one two three", "four five six seven", kind="rating", scores=(1.0,))
    prompt = len([BOS, USER, *encode(chat, "one two three"), EOS])
    (row,) = one(chat, rating)[0].conversations()
    for cut in range(1, len(row) - 2):
        tree, _ = one(chat, rating, len(row) - cut, length_policy="truncate_prompt")
        assert (tree is None) == (1 + cut >= prompt)
        if tree is not None:
            assert tree.conversations() == [[BOS, *row[1 + cut :]]]


def test_line_breaks_and_reasoning_marks_are_text_though_they_are_added_tokens():
    """As in Gemma, whose runs of line breaks are added tokens that are not special; its template trims messages.

    And as in EXAONE 4, whose template writes empty reasoning before earlier answers, and leaves out that of a message.
    """
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\n", "\n\n", "<think>", "</think>", "<|turn|>"])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{% if not loop.last %}<think>\n\n</think>{% endif %}"
        "{{ m.content.split('</think>')[-1] | trim }}</s>\n{% endfor %}"
    )
    chat = ChatTokenizer(tokenizer)
    talk = (
        user("a\nb\n\nc"),
        assistant("<think>so it is</think>42\n\n"),
        user("\n1\n<think>2"),
        assistant("3"),
    )
    text = tokenizer.apply_chat_template(list(talk), tokenize=False)
    assert "so it is" not in text
    assert chat.ids([(talk, ())]) == [tokenizer(text, add_special_tokens=False).input_ids]
    (turn,) = tokenizer("<|turn|>", add_special_tokens=False).input_ids
    assert chat.ids([((user("<|turn|>"), assistant("3")), ())])[0].count(turn) == 2  # what the template wrote


# What other programs make of the saved tokenizer.


@pytest.mark.parametrize("template", ["plain", "tokenizer"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_programs_that_render_with_the_template_get_the_ids_of_training(template, adds_bos):
    """TRL and vLLM's chat requests render first, and then add no BOS."""
    tokenizer = make_chat(adds_bos=adds_bos).tokenizer
    chat = ChatTokenizer(tokenizer, template)
    talk = (user("a"), assistant("b"), user("c"), assistant("d"))
    text = chat.tokenizer.apply_chat_template(list(talk), tokenize=False)
    (row,) = chat.ids([(talk, ())])
    assert chat.tokenizer(text, add_special_tokens=False).input_ids == row


def test_an_eos_that_a_tokenizer_adds_to_every_text_is_taken_off(tmp_path):
    """`add_eos_token`: a plain call would read the reward at another token than training."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.init_kwargs["add_eos_token"] = True
    assert tokenizer("a").input_ids[-1] == EOS
    chat = ChatTokenizer(tokenizer)
    talk = (user("a"), assistant("b"))
    assert chat.ids([(talk, ())]) == make_chat().ids([(talk, ())])
    chat.save(tmp_path)
    for again in (chat.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert again("a").input_ids == [BOS, *encode(chat, "a")]


def test_a_padding_token_is_no_word_that_texts_hold(tmp_path):
    """Of a tokenizer with one special token, as GPT-2's; saved, a named pad token becomes a special one."""
    state = json.loads(trained_tokenizer())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "</s>"]
    state["post_processor"] = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="</s>", eos_token="</s>"
    )
    chat = ChatTokenizer(tokenizer, "plain")
    assert chat.tokenizer.pad_token.startswith("Ġ")
    chat.save(tmp_path)
    again = ChatTokenizer.load(tmp_path)
    assert again.pad_id == chat.pad_id
    word = chat.tokenizer.pad_token.removeprefix("Ġ")
    for text in ("Hi!!", "a != b", f"a {word}{word} {word}", "".join(map(chr, range(33, 127)))):
        talk = ((user(text), assistant(text)), ())
        rows = [one.ids([talk])[0] for one in (chat, again)]
        assert rows[0] == rows[1], text
        assert again.plain_text(talk, rows[0]) is not None


def test_the_text_of_a_conversation_is_that_which_gives_its_ids():
    """SentencePiece puts a space before a text: decoded, the ids are not the text that was tokenised."""
    backend = Tokenizer.from_str(trained_tokenizer())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    )
    chat = ChatTokenizer(tokenizer)
    talk = ((user("a b"), assistant("c"), user("d"), assistant("e f")), ())
    (row,) = chat.ids([talk])
    decoded = chat.tokenizer.decode(row[1:], clean_up_tokenization_spaces=False)
    assert chat.tokenizer(decoded).input_ids != row  # else this would show nothing
    assert chat.tokenizer(chat.plain_text(talk, row)).input_ids == row


def test_a_bos_that_would_change_other_tokens_is_not_written(tmp_path):
    """Llama 2's tokenizer puts a space before a text, and none after a BOS: no text gives these ids in a plain call."""
    backend = Tokenizer.from_str(trained_tokenizer())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = template
    chat = ChatTokenizer(tokenizer)
    assert chat.tokenizer.chat_template == template
    talk = ((user("a b"), assistant("c")), ())
    (row,) = chat.ids([talk])
    with_bos = "{{ bos_token }}" + template
    tokenizer.chat_template = with_bos
    other = ChatTokenizer(tokenizer)
    assert other.ids([talk]) != [row]  # else this would show nothing
    for one in (chat, other):
        text = one.plain_text(talk, one.ids([talk])[0])
        assert "user a b</s>assistant c</s>" in text
    assert (
        other.plain_text(
            ((user("a</s>"), assistant("c")), ()), other.ids([((user("a</s>"), assistant("c")), ())])[0]
        )
        is None
    )


def test_the_saved_tokenizer_speaks_as_transformers_4_does(tmp_path):
    """Version 4 knows neither the class of 5 nor its list of further special tokens."""
    chat = make_chat(additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    chat.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert "extra_special_tokens" not in config
    assert ChatTokenizer.load(tmp_path).identity() == chat.identity()


# What a template leaves out.


def said_of(chat, messages, capsys):
    """What is said when three such conversations are tokenised."""
    *prompt, answer = messages
    rating = Preference(prompt=tuple(prompt), answers=((answer,),), kind="rating", scores=(1.0,))
    tokenize([rating] * 3, chat, max_length=512)
    return capsys.readouterr().out


@pytest.mark.parametrize("role", ["system", "tool"])
def test_messages_that_the_template_leaves_out_are_told(role, capsys):
    chat = make_chat(
        CHAT.replace("for m in messages", "for m in messages if m.role in ('user', 'assistant')")
    )
    for content, is_told in (("x", True), ("", False)):
        talk = user("a"), {"role": role, "content": content}, assistant("b")
        told = f"leaves out {role} messages after the first message (3 preferences)"
        assert (told in said_of(chat, talk, capsys)) == is_told
        assert not said_of(make_chat(), talk, capsys)


def test_a_system_message_that_is_printed_only_at_the_start_is_told_later(capsys):
    """As by the template of gpt-oss."""
    only_first = "{% if m.role != 'system' or loop.first %}{{ m['content'] }}{% endif %}"
    chat = make_chat(CHAT.replace("{{ m['content'] }}", only_first))
    system = {"role": "system", "content": "x"}
    assert not said_of(chat, (system, user("a"), assistant("b")), capsys)
    told = "leaves out system messages after the first message (3 preferences)"
    assert told in said_of(chat, (system, system, user("a"), assistant("b")), capsys)


@pytest.mark.parametrize(
    ("answer", "printed", "told"),
    [
        (
            {"content": "<think>so</think>b"},
            "m.content.split('</think>')[-1]",
            "what answers hold in <think>",
        ),
        ({"content": "<think>so</think>b"}, "m.content", None),
        ({"content": "b", "reasoning_content": "so"}, "m.content", "the answers' reasoning_content"),
        ({"content": "b", "reasoning_content": "so"}, "m.reasoning_content ~ m.content", None),
    ],
)
def test_reasoning_that_the_template_leaves_out_is_told(answer, printed, told, capsys):
    chat = make_chat("{% for m in messages %}{{ " + printed + " }}{{ eos_token }}{% endfor %}")
    said = said_of(chat, (user("a"), {"role": "assistant", **answer}), capsys)
    assert f"leaves out {told} (3 preferences)" in said if told else not said


def test_equal_ids_are_one_object(chat, preferences, tmp_path):
    """Python's integers above 256 take 28 bytes each."""
    for _ in range(2):  # tokenised, and out of the cache
        trees, _ = tokenize(preferences[0], chat, max_length=512, cache=tmp_path)
        objects = {id(n) for tree in trees for row in tree.conversations() for n in row}
        values = {n for tree in trees for row in tree.conversations() for n in row}
        assert max(values) > 256
        assert len(objects) == len(values)


# Cache and workers.

PAIRS = [
    make_preference(
        f"What is {n} + {n}?" + "</s>" * (n % 10 == 9),
        "<s>" * (n % 10 == 9) + str(2 * n),
        f"{n} or so",
        subset="sums",
        source=str(n),
    )
    for n in range(300)
]
"""Messages of every tenth hold names of control tokens, which are text in them."""


def test_each_thing_that_decides_the_ids_changes_the_key_of_the_cache():
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"

    def chat(change=lambda tokenizer: None, template=template):
        tokenizer = make_tokenizer()
        change(tokenizer)
        tokenizer.chat_template = template
        return ChatTokenizer(tokenizer)

    def other_eos(tokenizer):
        tokenizer.eos_token = "<|user|>"  # in the vocabulary as it is

    def other_bos(tokenizer):
        tokenizer.bos_token = "<|system|>"

    def other_post_processor(tokenizer):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A <s>", special_tokens=[("<s>", 1)]
        )

    def bare(tokenizer):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])

    said = [((user("a"), assistant("b")), ())]
    assert chat().identity() == chat().identity()
    assert chat(template=template + " ").identity() != chat().identity()
    assert chat(other_eos).ids(said) != chat().ids(said)
    assert chat(other_eos).identity() != chat().identity()
    # both add no BOS of their own, so that neither `adds_bos` nor the ids tell them apart
    assert chat(other_post_processor).identity() != chat(bare).identity()
    assert chat(lambda t: (bare(t), other_bos(t))).identity() != chat(bare).identity()


def test_the_cache_gives_what_was_computed_and_misses_what_changed(tmp_path, monkeypatch):
    chat = make_chat()
    some = PAIRS[:5]
    fresh = tokenize(some, chat, max_length=512)
    assert tokenize(some, chat, max_length=512, cache=tmp_path) == fresh

    with monkeypatch.context() as patch:
        patch.setattr(ChatTokenizer, "text_ids", None)  # a hit tokenises nothing
        assert tokenize(some, chat, max_length=512, cache=tmp_path) == fresh

    changed = [*some[:4], make_preference("What is 4 + 4?", "8", "4 or so!")]
    other = make_chat(BARE, adds_bos=False)
    for preferences, chat_used in ((changed, chat), (some[:4], chat), (some, other)):
        expected = tokenize(preferences, chat_used, max_length=512)
        assert tokenize(preferences, chat_used, max_length=512, cache=tmp_path) == expected
        assert expected != fresh
    assert len(list((tmp_path / "tokens").iterdir())) == 4


def test_a_cache_that_is_damaged_or_cannot_be_written_stops_nothing(tmp_path, capsys):
    chat, some = make_chat(), PAIRS[:5]
    fresh = tokenize(some, chat, max_length=512)
    (tmp_path / "tokens").write_text("no folder")
    assert tokenize(some, chat, max_length=512, cache=tmp_path) == fresh
    assert "token ids are not kept" in capsys.readouterr().out
    (tmp_path / "tokens").unlink()
    assert tokenize(some, chat, max_length=512, cache=tmp_path) == fresh
    (file,) = (tmp_path / "tokens").iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert tokenize(some, chat, max_length=512, cache=tmp_path) == fresh
    assert "is damaged" in capsys.readouterr().out


def test_the_cache_knows_no_lengths_and_no_targets(tmp_path):
    chat = make_chat()
    tokenize(PAIRS[:5], chat, max_length=512, cache=tmp_path)
    assert tokenize(PAIRS[:5], chat, max_length=8, cache=tmp_path)[0] == [None] * 5
    tied = make_preference("What is 0 + 0?", "0", "0 or so", probability=0.5)
    (tree, *_), _ = tokenize([tied, *PAIRS[1:5]], chat, max_length=512, cache=tmp_path)
    assert tree.probability == 0.5
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_no_preferences_are_no_trees(tmp_path):
    assert tokenize([], make_chat(), max_length=512, cache=tmp_path) == ([], {})


@pytest.mark.slow
def test_two_workers_give_what_one_gives(monkeypatch):
    chat = make_chat()
    alone = tokenize(PAIRS, chat, max_length=512, num_workers=1)
    monkeypatch.setattr(tokens, "PARALLEL_FROM", 10)  # 600 conversations are three chunks
    with monkeypatch.context() as patch:
        patch.setattr(ChatTokenizer, "text_ids", None)  # nothing is tokenised in this process
        assert tokenize(PAIRS, chat, max_length=512, num_workers=2) == alone


def test_ratings_without_a_prompt_are_no_group(chat):
    bare = Preference(prompt=(), answers=((assistant("a"),),), kind="rating", scores=(1.0,))
    assert tokenize([bare], chat, max_length=64)[0][0].group == ""


def test_cached_ids_are_those_of_the_same_tools(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    own, found = ChatTokenizer(tokenizer), []
    for name in ("f", "g"):
        pair = Preference(
            prompt=(user("q"),), answers=((assistant("a"),), (assistant("b"),)), tools=({"name": name},)
        )
        found += tokenize([pair], own, max_length=512, cache=tmp_path)[0]
    assert found[0].prompt_ids != found[1].prompt_ids


def test_ids_of_an_earlier_version_are_not_read(chat, preferences, tmp_path, monkeypatch):
    for version in (1, 2, 2):
        monkeypatch.setattr(tokens, "CACHE_VERSION", version)
        tokenize(preferences[0], chat, max_length=512, cache=tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
