"""Preference files of every format and type, good and bad."""

import codecs
import csv
import gzip
import json
import math
import pickle
from collections import Counter
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest
from conftest import SHARED, assistant, user
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_rm.console import console
from lora_rm.data import files
from lora_rm.data.files import check_one_split, find_files, tell_left_out
from lora_rm.data.formats import BadRow, Row, RowError, parse_row, read_preferences, read_rows
from lora_rm.data.preference import Preference
from lora_rm.errors import DataError

PAIR = {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}


def system(content):
    return {"role": "system", "content": content}


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_one(path, *rows):
    preferences, dropped = read_preferences(write_lines(path, *rows))
    assert len(preferences) == 1
    assert not dropped
    return preferences[0]


# One hand-written file per format.


def test_explicit_prompt_of_texts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5", "system": "Be brief.", '
        '"margin": 2, "subset": "math", "tools": "[{\\"name\\": \\"add\\"}]", "unknown": [1]}\n'
    )
    preferences, _ = read_preferences(str(path))
    assert preferences == [
        Preference(
            prompt=(system("Be brief."), user("What is 2 + 2?")),
            answers=((assistant("4"),), (assistant("5"),)),
            margin=2.0,
            tools=({"name": "add"},),
            subset="math",
            source=f"{path} line 1",
        )
    ]


def test_explicit_prompt_of_messages(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}], "refusal": None}
    row = {
        "prompt": [system("s"), user("a"), assistant("b"), user("c")],
        "chosen": [call, {"role": "tool", "content": "", "id": 7}, assistant("4")],
        "rejected": [{**assistant("5"), "thinking": "hm"}],
    }
    preference = read_one(tmp_path / "pairs.jsonl", row)
    assert preference.prompt == (system("s"), user("a"), assistant("b"), user("c"))
    assert preference.answers == (
        (
            {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]},
            {"role": "tool", "content": ""},
            assistant("4"),
        ),
        ({**assistant("5"), "thinking": "hm"},),
    )


def test_what_templates_read_of_a_message_is_kept_and_arguments_are_objects():
    def call(arguments):
        return {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}

    result = {"role": "tool", "content": "4", "name": "add", "tool_call_id": "1"}
    prompt = [user("q"), {"role": "assistant", "tool_calls": [call('{"a": 2}'), call("")]}, result]
    chosen = {**assistant("4"), "reasoning_content": "2 + 2", "refusal": "no"}
    preference = parse_row({"prompt": prompt, "chosen": [chosen], "rejected": "5"}, "here")
    assert preference.prompt[1]["tool_calls"] == [call({"a": 2}), call({})]
    assert preference.prompt[2] == result
    assert preference.answers[0] == ({**assistant("4"), "reasoning_content": "2 + 2"},)


def test_sharegpt_calls_are_tool_calls():
    calls = '[{"name": "now", "arguments": "{}"}, {"name": "add", "arguments": {"a": 1}}]'
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": calls}]
    row = {"conversations": [*turns, {"from": "observation", "value": "4"}], "chosen": "a", "rejected": "b"}
    message = parse_row(row, "here").prompt[1]
    assert message["content"] == ""
    assert [c["function"] for c in message["tool_calls"]] == [
        {"name": "now", "arguments": {}},
        {"name": "add", "arguments": {"a": 1}},
    ]


def test_two_whole_conversations(tmp_path):
    start = [user("a"), assistant("b"), user("c")]
    row = {"chosen": [*start, assistant("good")], "rejected": [*start, assistant("bad")]}
    preference = read_one(tmp_path / "pairs.jsonl", row)
    assert preference.prompt == tuple(start)
    assert preference.answers == ((assistant("good"),), (assistant("bad"),))


def test_the_prompt_leaves_an_answer_and_does_not_end_with_the_assistant():
    longer = {
        "chosen": [user("a"), assistant("b")],
        "rejected": [user("a"), assistant("b"), user("c"), assistant("d")],
    }
    preference = parse_row(longer, "here")
    assert preference.prompt == (user("a"),)
    assert preference.answers[1] == (assistant("b"), user("c"), assistant("d"))

    same_start = {
        "chosen": [user("a"), assistant("b"), assistant("c")],
        "rejected": [user("a"), assistant("b"), assistant("d")],
    }
    assert parse_row(same_start, "here").prompt == (user("a"),)


def test_white_space_around_a_question_makes_no_other_prompt():
    row = {
        "chosen": [system("s"), user("q "), assistant("a")],
        "rejected": [system("s "), user("q"), assistant("b")],
    }
    preference = parse_row(row, "here")
    assert preference.prompt == (system("s"), user("q "))
    assert preference.answers == ((assistant("a"),), (assistant("b"),))


def test_one_answer_may_repeat_the_prompt_and_the_other_not(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": [user("q"), assistant("b")]}
    preference = read_one(tmp_path / "pairs.jsonl", row)
    assert preference.prompt == (user("q"),)
    assert preference.answers == ((assistant("a"),), (assistant("b"),))


@pytest.mark.parametrize(
    ("scores", "probability", "margin"), [((8.5, 7.0), 1.0, 1.5), ((6.0, 6.0), 0.5, 0.0)]
)
def test_ultrafeedback(tmp_path, scores, probability, margin):
    row = {
        "prompt": "why?",
        "prompt_id": "1",
        "chosen": [user("why? "), assistant("because")],
        "rejected": [user("why? "), assistant("no")],
        "messages": [user("why?"), assistant("because")],
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }
    preference = read_one(tmp_path / "uf.jsonl", row)
    assert preference.prompt == (user("why? "),)
    assert preference.answers == ((assistant("because"),), (assistant("no"),))
    assert (preference.probability, preference.margin) == (probability, margin)


@pytest.mark.parametrize(
    "names", ["chosen_score rejected_score", "chosen_rating rejected_rating", "chosen-rating rejected-rating"]
)
def test_other_names_of_the_two_scores(tmp_path, names):
    chosen, rejected = names.split()
    assert parse_row(UF | {chosen: 5, rejected: 3.5}, "here").margin == 1.5
    assert parse_row(UF | {chosen: 5, rejected: 5}, "here").is_tie
    with pytest.raises(RowError, match=f"{chosen} is below {rejected}"):
        parse_row(UF | {chosen: 1, rejected: 2}, "here")
    csv_bytes(
        ["prompt", "chosen", "rejected", chosen, rejected], [["q", "a", "b", "5", "3"]], tmp_path / "a.csv"
    )
    assert read_preferences(str(tmp_path / "a.csv"))[0][0].margin == 2.0


def test_history_stands_before_the_prompt(tmp_path):
    history = [["a", "b"], ["c", "d"]]
    turns = (user("a"), assistant("b"), user("c"), assistant("d"))
    question = user(PAIR["prompt"])
    preference = parse_row(PAIR | {"history": history, "system": "s"}, "here")
    assert preference.prompt == (system("s"), *turns, question)
    in_prompt = parse_row(PAIR | {"history": history, "prompt": [system("s"), question]}, "here")
    assert in_prompt.prompt == preference.prompt
    for nothing in ([], None, ""):
        assert parse_row(PAIR | {"history": nothing}, "here").prompt == (question,)
    row = ["q", "a", "b", json.dumps(history)]
    csv_bytes(["prompt", "chosen", "rejected", "history"], [row], tmp_path / "a.csv")
    assert read_preferences(str(tmp_path / "a.csv"))[0][0].prompt == (*turns, user("q"))


def test_hh_text(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHere to help.\n\nHuman: Bye\n\nAssistant:"
    row = {"chosen": start + " Goodbye!", "rejected": start + " Human: what?\n"}
    preference = read_one(tmp_path / "hh.jsonl", row)
    assert preference.prompt == (user("Hi"), assistant("Hello.\n\nHere to help."), user("Bye"))
    assert preference.answers == ((assistant("Goodbye!"),), (assistant("Human: what?"),))


@pytest.mark.parametrize("end", ["", "\n\nAssistant:", "\n\nAssistant: \n"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_hh_text_as_prompt(end, is_whole):
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye"
    chosen, rejected = (
        f"{start}\n\nAssistant: {text}" if is_whole else f" {text}" for text in ("Goodbye!", "No.")
    )
    preference = parse_row({"prompt": start + end, "chosen": chosen, "rejected": rejected}, "here")
    assert preference.prompt == (user("Hi"), assistant("Hello."), user("Bye"))
    assert [answer[0]["content"].strip() for answer in preference.answers] == ["Goodbye!", "No."]


def test_a_text_answer_that_begins_like_the_prompt_is_the_answer_as_it_stands():
    preference = parse_row({"prompt": "Hello", "chosen": "Hello there", "rejected": "Hello\nyou"}, "here")
    assert preference.answers == ((assistant("Hello there"),), (assistant("Hello\nyou"),))


def test_sharegpt(tmp_path):
    row = {
        "conversations": [
            {"from": "human", "value": "time?"},
            {"from": "function_call", "value": '{"name": "now"}'},
            {"from": "observation", "value": "12:00"},
        ],
        "chosen": {"from": "gpt", "value": "Noon."},
        "rejected": {"from": "gpt", "value": "Late."},
        "system": "",
        "tools": '[{"name": "now"}]',
    }
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([row]))
    [preference], _ = read_preferences(str(path))
    assert [message["role"] for message in preference.prompt] == ["user", "assistant", "tool"]
    assert preference.answers == ((assistant("Noon."),), (assistant("Late."),))
    assert preference.tools == ({"name": "now"},)


@pytest.mark.parametrize(
    ("strength", "first", "probability", "margin"),
    [(-2, "one", 1.0, 2.0), (-3, "one", 1.0, 3.0), (3, "two", 1.0, 3.0), (0, "one", 0.5, 0.0)],
)
@pytest.mark.parametrize(
    "names",
    [
        ("context", "response1", "response2", "overall_preference"),
        ("prompt", "response_1", "response_2", "preference_strength"),
    ],
)
def test_helpsteer(tmp_path, names, strength, first, probability, margin):
    row = dict(zip(names, ([user("q")], "one", "two", strength), strict=True))
    preference = read_one(tmp_path / "helpsteer.jsonl", row)
    assert preference.prompt == (user("q"),)
    assert preference.answers[0] == (assistant(first),)
    assert (preference.probability, preference.margin) == (probability, margin)


@pytest.mark.parametrize(("given_probability", "first", "probability"), [(0.7, "a", 0.7), (0.25, "b", 0.75)])
def test_soft_labels(tmp_path, given_probability, first, probability):
    responses = {"prompt": "q", "response_a": "a", "response_b": "b", "probability": given_probability}
    chosen = {"prompt": "q", "chosen": "a", "rejected": "b", "probability": given_probability}
    for row in (responses, chosen):
        preference = read_one(tmp_path / "soft.jsonl", row)
        assert preference.answers[0] == (assistant(first),)
        assert preference.probability == pytest.approx(probability)


def test_ties():
    tie = parse_row(PAIR | {"tie": True, "margin": 1.0}, "here")
    assert tie.is_tie
    assert tie.margin == 0.0
    assert not parse_row(PAIR | {"tie": False}, "here").is_tie
    assert parse_row({"prompt": "q", "response1": "a", "response2": "b", "tie": True}, "here").is_tie


def test_nemo(tmp_path):
    def row(*ranks):
        completions = [
            {"rank": rank, "completion": [assistant(f"r{rank}-{i}")]} for i, rank in enumerate(ranks)
        ]
        return {"context": [user("q")], "completions": completions}

    pair = read_one(tmp_path / "nemo.jsonl", row(1, 0))
    assert pair.kind == "pair"
    assert pair.answers == ((assistant("r0-1"),), (assistant("r1-0"),))
    assert pair.margin == 0.0
    assert read_one(tmp_path / "nemo.jsonl", row(0, 0)).is_tie
    ranking = read_one(tmp_path / "nemo.jsonl", row(2, 0, 1))
    assert (ranking.kind, ranking.scores) == ("ranking", (-2.0, 0.0, -1.0))


def test_nectar(tmp_path):
    answers = [{"answer": f"r{rank}", "model": "m", "rank": rank} for rank in (2, 1, 3)]
    ranking = read_one(
        tmp_path / "a.jsonl", {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": answers, "turns": 1}
    )
    assert (ranking.kind, ranking.scores, ranking.prompt) == ("ranking", (-2.0, -1.0, -3.0), (user("q"),))
    assert ranking.answers[1] == (assistant("r1"),)
    pair = read_one(tmp_path / "b.jsonl", {"prompt": "q", "answers": answers[:2]})
    assert (pair.kind, pair.answers[0]) == ("pair", (assistant("r1"),))
    with pytest.raises(RowError, match=r"'answers\[0\]\.answer' is missing \(found: completion, rank\)"):
        parse_row({"prompt": "q", "answers": [{"completion": "a", "rank": 1}]}, "here")
    rating = {
        "prompt": "q",
        "response": "a",
        "rating": 1,
        "answers": ["b"],
    }  # beside another format it is ignored
    assert parse_row(rating, "here").kind == "rating"


def test_scored_responses(tmp_path):
    path = tmp_path / "lists.jsonl"
    row = {"prompt": "q", "responses": ["a", [assistant("b")], "c"], "scores": [1, 3, 3]}
    ranking = read_one(path, row)
    assert ranking.kind == "ranking"
    assert ranking.answers == ((assistant("a"),), (assistant("b"),), (assistant("c"),))
    assert ranking.scores == (1.0, 3.0, 3.0)
    pair = read_one(path, {"prompt": "q", "responses": ["a", "b"], "scores": [1.0, 3.5]})
    assert (pair.kind, pair.answers[0], pair.margin) == ("pair", (assistant("b"),), 2.5)
    assert read_one(path, {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}).is_tie
    pair = read_one(path, {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]})
    assert (pair.answers[0], pair.margin) == ((assistant("a"),), 0.0)
    both = read_one(path, {"prompt": "q", "responses": ["a", "b"], "scores": [1, 3], "ranks": [2, 1]})
    assert (both.answers[0], both.margin) == ((assistant("b"),), 2.0)
    rating = read_one(path, {"prompt": "q", "responses": ["a"], "scores": [0.25]})
    assert (rating.kind, rating.scores) == ("rating", (0.25,))


@pytest.mark.parametrize(
    ("answer", "score"), [("response", "rating"), ("completion", "score"), ("response", "label")]
)
def test_rating(tmp_path, answer, score):
    preference = read_one(tmp_path / "ratings.jsonl", {"prompt": "q", answer: "a", score: 4})
    assert preference.kind == "rating"
    assert preference.answers == ((assistant("a"),),)
    assert preference.scores == (4.0,)


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    preference = parse_row(
        PAIR | {"images": [], "prompt": [user(parts)], "chosen": [assistant(parts)]}, "here"
    )
    assert preference.prompt == (user("42"),)
    assert preference.answers[0] == (assistant("42"),)


@pytest.mark.parametrize(
    ("more", "first", "probability"),
    [
        ({"response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}, "a", 1.0),
        ({"response_0": "a", "response_1": "b", "better_response_id": 1}, "b", 1.0),
        ({"response_a": "a", "response_b": "b", "winner": "model_b"}, "b", 1.0),
        ({"response_a": "a", "response_b": "b", "winner": "tie"}, "a", 0.5),
        ({"conversation_a": [user("q"), assistant("a")], "conversation_b": [user("q"), assistant("b")], "winner": "model_b"}, "b", 1.0),
        ({"query": "q", "prompt": None, "response": "a", "rejected_response": "b"}, "a", 1.0),
        ({"messages": [user("q"), assistant("a")], "rejected_response": "b"}, "a", 1.0),
        ({"prompt": None, "messages": [user("q"), assistant("a")], "rejected_messages": [user("q"), assistant("b")]}, "a", 1.0),
        ({"question": "q", "prompt": None, "chosen": "a", "rejected": "b"}, "a", 1.0),
        ({"instruction": "q", "input": "", "prompt": None, "chosen": "a", "rejected": "b"}, "a", 1.0),
    ],
)  # fmt: skip
def test_pairs_of_other_tools_and_data_sets(more, first, probability):
    preference = parse_row({"prompt": "q"} | more, "here")
    assert preference.prompt == (user("q"),)
    assert preference.answers[0] == (assistant(first),)
    assert (preference.kind, preference.probability, preference.margin) == ("pair", probability, 0.0)


def test_an_instruction_goes_on_with_its_input():
    row = {"instruction": "Add.", "input": "2, 2", "response": "4", "rating": 1}
    assert parse_row(row, "here").prompt == (user("Add.\n2, 2"),)


def test_a_question_beside_whole_conversations_is_ignored():
    assert parse_row(UF | {"prompt": None, "question": 7}, "here").prompt == (user("q"),)


def test_lists_of_chosen_and_rejected_texts_are_a_ranking():
    row = {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"], "subset": "Focus"}
    preference = parse_row(row, "here")
    assert (preference.kind, preference.scores) == ("ranking", (1.0, 0.0, 0.0))
    assert preference.answers == ((assistant("a"),), (assistant("b"),), (assistant("c"),))
    assert parse_row({**row, "chosen": "a"}, "here") == preference
    pair = parse_row({**row, "rejected": ["b"]}, "here")  # as from plain texts: by how much is not said
    assert (pair.kind, pair.probability, pair.margin) == ("pair", 1.0, 0.0)


# Every type of source.

MIXED = [
    PAIR | {"margin": 0.5, "subset": "math"},
    {"prompt": [user("a\u2028b\nc")], "chosen": [assistant("é")], "rejected": [assistant("f")], "tie": True},
]


def check_mixed(source, where, **options):
    preferences, dropped = read_preferences(str(source), **options)
    assert not dropped
    expected = [parse_row(row, f"{source} {place}") for row, place in zip(MIXED, where, strict=True)]
    assert preferences == expected


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_lines(tmp_path, suffix, bom):
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in MIXED]
    content = bom + lines[0] + b"\r\n\n  \n" + lines[1]
    path = tmp_path / f"pairs.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    check_mixed(path, ["line 1", "line 4"])


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("content", [MIXED, {"data": MIXED}])
def test_json(tmp_path, suffix, content):
    encoded = json.dumps(content, indent=1).encode()
    path = tmp_path / f"pairs.json{suffix}"
    path.write_bytes(gzip.compress(encoded) if suffix else encoded)
    check_mixed(path, ["row 1", "row 2"])


def csv_bytes(columns, rows, path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_csv(tmp_path, suffix):
    columns = ["prompt", "chosen", "rejected", "margin", "subset", "tie"]
    rows = [
        ["What is 2 + 2?", "4", "5", "0.5", "math", ""],
        [json.dumps([user("a\u2028b\nc")]), '[{"role": "assistant", "content": "é"}]', "f", "", "", "True"],
    ]
    content = b"\xef\xbb\xbf" + csv_bytes(columns, rows, tmp_path / "plain.csv")
    path = tmp_path / f"pairs.csv{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    check_mixed(path, ["line 2", "line 3"])


@pytest.mark.parametrize("size", [3, 4, 5, 7, 16, 64])
def test_rows_do_not_depend_on_the_blocks_they_are_read_in(tmp_path, monkeypatch, size):
    cells = [
        ["q\u2028é🙂" + "\ufeff" * 7, 'one\rtwo\n\n\r\nlines, "quoted"\n', "c"],
        ["", "", ""],
        ["x" * 70, "b\x85", "é\n"],
    ]
    names = ["prompt", "chosen", "rejected"]
    sources = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.csv.gz")]
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in cells]
    packed = codecs.BOM_UTF8 + "\r\n\n".join([*lines, "[1]", "{broken", "[2]"]).encode()
    table = csv_bytes(names, cells, tmp_path / "table") + b'"a"b,1\n\xff,2,\xc3\n1,2,"no end\n'
    for path, content in zip(
        sources, (packed, gzip.compress(packed), table, gzip.compress(table)), strict=True
    ):
        path.write_bytes(content)
    expected = [list(read_rows(str(path))) for path in sources]
    assert [len(rows) for rows in expected] == [6, 6, 5, 5]
    assert [row.values for row in expected[0][:3]] == [dict(zip(names, row, strict=True)) for row in cells]
    assert [list(row.values.values()) for row in expected[2][:2]] == [cells[0], cells[2]]
    assert expected[2][1].source.endswith(
        f" line {2 + 1 + 4 + 1}"
    )  # four of the first row's lines end in a cell
    monkeypatch.setattr(files, "BLOCK", size)
    assert [list(read_rows(str(path))) for path in sources] == expected


@pytest.mark.parametrize("size", [4, 20])
def test_a_line_beyond_the_longest_is_named(tmp_path, monkeypatch, size):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 20)
    monkeypatch.setattr(files, "BLOCK", size)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + b"9" * 19 + b"\n{}")
    assert len(list(read_rows(str(path)))) == 3
    path.write_bytes(b'{"a": 1}\n\n' + b"9" * 20 + b"\n{}")
    with pytest.raises(DataError, match="line 3: is longer than"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_json_file_that_is_too_large_to_be_read_as_a_whole_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(files, "BLOCK", 100)
    content = codecs.BOM_UTF8 + json.dumps([PAIR] * 20).encode()
    path = tmp_path / f"pairs.json{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", len(content) - 3)
    assert len(read_preferences(str(path))[0]) == 20
    monkeypatch.setattr(files, "MAX_JSON_BYTES", len(content) - 4)
    with pytest.raises(DataError, match=r"pairs\.json.*is larger than .*Write it as \.jsonl"):
        read_preferences(str(path))


def test_rows_of_an_archive_are_limited_by_its_bytes_and_those_of_a_plain_file_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ALWAYS_ROWS", 50)
    text = b"prompt,chosen,rejected\n" + b"a,b,c\n" * 20_000
    plain, packed = tmp_path / "pairs.csv", tmp_path / "pairs.csv.gz"
    plain.write_bytes(text)
    packed.write_bytes(gzip.compress(text))
    allowed = packed.stat().st_size // files.MIN_PACKED_ROW
    assert 50 < allowed < 20_000
    assert len(read_preferences(str(plain))[0]) == 20_000
    with pytest.raises(DataError, match=f"pairs.csv.gz: .*more than {allowed:,} rows.*give the plain file"):
        read_preferences(str(packed))
    assert len(list(islice(read_rows(str(packed)), allowed))) == allowed
    table = pyarrow.table({name: [name] * 20_000 for name in ("prompt", "chosen", "rejected")})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=r"pairs.parquet: .*more than [\d,]+ rows"):
        read_preferences(str(tmp_path / "pairs.parquet"))


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.csv.gz", "pairs.json.gz"])
def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "BLOCK", 1000)
    monkeypatch.setattr(files, "ALWAYS_UNPACKED", 5000)
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"[" * 200_000))
    with pytest.raises(
        DataError, match=f"{name}: .*unpack to more than 100 times as many.*plain .jsonl file"
    ):
        read_preferences(str(path), on_bad_row="skip")


def test_an_archive_of_short_rows_that_differ_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ALWAYS_ROWS", 50)
    lines = [f"Is {n} even?,{('yes', 'no')[n % 2]},{('no', 'yes')[n % 2]}\n" for n in range(20_000)]
    path = tmp_path / "pairs.csv.gz"
    path.write_bytes(gzip.compress(("prompt,chosen,rejected\n" + "".join(lines)).encode()))
    assert len(read_preferences(str(path))[0]) == 20_000


def test_csv_lines_numbers_and_texts_that_look_like_json(tmp_path):
    long = "x" * 200_000
    rows = [["[1, 2]", "two\nlines", '{"a": 1}', "1"], [], ["q", long, "b", "2"]]
    path = tmp_path / "pairs.csv"
    csv_bytes(["prompt", "chosen", "rejected", "margin"], rows, path)
    preferences, _ = read_preferences(str(path))
    assert preferences[0].prompt == (user("[1, 2]"),)
    assert preferences[0].answers == ((assistant("two\nlines"),), (assistant('{"a": 1}'),))
    assert [p.source for p in preferences] == [f"{path} line 2", f"{path} line 5"]
    assert preferences[1].answers[0][0]["content"] == long

    csv_bytes(["prompt", "responses", "scores"], [["q", '["a", "b"]', "[1, 2]"]], path)
    assert read_preferences(str(path))[0][0].margin == 1.0


def test_an_empty_cell_of_a_list_is_as_if_not_there(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,response1,response2,overall_preference,responses,scores,tools\nq,a,b,2,,, \n")
    [preference], _ = read_preferences(str(path))
    assert preference.answers == ((assistant("b"),), (assistant("a"),))


def test_parquet(tmp_path):
    path = tmp_path / "pairs.parquet"
    columns = {
        "prompt": [[user("q"), assistant("a"), user("r")], [user("q")]],
        "chosen": [[assistant("b")], [{"role": "assistant", "tool_calls": [{"name": "add"}]}]],
        "rejected": [[assistant("c")], [assistant("d")]],
        "margin": [0.5, None],
        "subset": ["math", None],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    preferences, _ = read_preferences(str(path))
    assert [(p.margin, p.subset, p.source) for p in preferences] == [
        (0.5, "math", f"{path} row 1"),
        (0.0, "", f"{path} row 2"),
    ]
    assert preferences[0].prompt == (user("q"), assistant("a"), user("r"))
    assert preferences[0].answers == ((assistant("b"),), (assistant("c"),))
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert preferences[1].answers == ((called,), (assistant("d"),))

    bad = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": bad, "chosen": ["a", "a"], "rejected": ["b", "b"]})
    pyarrow.parquet.write_table(table, path)
    good, wrong = read_rows(str(path))
    assert isinstance(good, Row)
    assert (wrong.source, wrong.reason) == (f"{path} row 2", "not UTF-8")


def test_saved_dataset(tmp_path):
    import datasets

    train, test = (datasets.Dataset.from_list([PAIR | {"subset": name}]) for name in ("train", "test"))
    train.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "splits")

    [preference], _ = read_preferences(str(tmp_path / "single"), split="anything")
    assert preference.source == f"{tmp_path / 'single'} row 1"
    [preference], _ = read_preferences(str(tmp_path / "splits"), split="test")
    assert preference.subset == "test"
    with pytest.raises(
        DataError, match=r"has no split 'dev'\. It has: train, test\. Set one with --data\.train-split"
    ):
        read_preferences(str(tmp_path / "splits"), split="dev")
    (tmp_path / "single" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="is not a folder written by"):
        read_preferences(str(tmp_path / "single"))


@pytest.fixture
def parts(tmp_path):
    """Files of three types with a row each, beside what is none."""
    folder = tmp_path / "data"
    (folder / "sub.csv").mkdir(parents=True)
    for name in ("README.md", ".c.jsonl"):
        (folder / name).write_text("no row")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR | {"subset": "b"}).encode()))
    (folder / "a.csv").write_text("prompt,chosen,rejected,subset\nq,yes,no,a\n")
    write_lines(folder / "c.jsonl", PAIR | {"subset": "c"}, PAIR)
    return folder


def test_files_of_a_folder_are_read_in_sorted_order(parts):
    preferences, _ = read_preferences(str(parts))
    assert [preference.subset for preference in preferences] == ["a", "b", "c", ""]
    places = ["a.csv line 2", "b.jsonl.gz line 1", "c.jsonl line 1", "c.jsonl line 2"]
    assert [preference.source for preference in preferences] == [f"{parts}/{place}" for place in places]
    write_lines(parts / "d.jsonl", PAIR, {"prompt": "q"})
    with pytest.raises(DataError, match=r"data/d\.jsonl line 2: no format"):
        read_preferences(str(parts))


def test_what_of_a_folder_is_not_read_is_told(parts, capsys, monkeypatch):
    monkeypatch.setattr(console, "quiet", False)
    (parts / "more").mkdir()
    (parts / "notes.txt").write_text("")
    write_lines(parts / "d.ndjson", PAIR)
    assert len(read_preferences(str(parts))[0]) == 5
    tell_left_out(str(parts))
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "files a.csv, b.jsonl.gz, c.jsonl, d.ndjson are read; not read: more/, notes.txt, sub.csv/." in told
    )


@pytest.mark.parametrize(
    ("names", "is_read"),
    [
        (["train-00.jsonl", "test-00.jsonl"], False),
        (["pairs_train.jsonl", "pairs.validation.jsonl"], False),
        (["train-00.jsonl", "train-01.jsonl", "contest.jsonl"], True),
        (["dev.jsonl", "valid.jsonl"], True),
        (["pairsTrain.jsonl", "pairsTest.jsonl"], False),
        (["training.jsonl", "holdout.jsonl"], False),
        (["train_test.jsonl", "train.jsonl"], True),
    ],
)
def test_a_folder_of_both_sides_is_not_trained_on_as_a_whole(tmp_path, names, is_read):
    for name in names:
        write_lines(tmp_path / name, PAIR)
    if is_read:
        check_one_split(str(tmp_path))
        return
    with pytest.raises(DataError, match=r"files of several splits.*train: .*like '.*/\*train\*'"):
        check_one_split(str(tmp_path))
    check_one_split(f"{tmp_path}/*rain*")


def test_a_folder_without_files_says_what_it_holds(parts):
    for name in ("a.csv", "b.jsonl.gz", "c.jsonl"):
        (parts / name).unlink()
    with pytest.raises(
        DataError, match=r"folder without preference files \(found: \.c\.jsonl, README\.md, sub\.csv\)"
    ):
        read_preferences(str(parts))


def test_files_of_a_pattern(parts, monkeypatch):
    for pattern, subsets in (
        ("*.jsonl*", ["b", "c", ""]),
        ("[ab].*", ["a", "b"]),
        ("../*/c.jsonl", ["c", ""]),
    ):
        preferences, _ = read_preferences(f"{parts}/{pattern}")
        assert [preference.subset for preference in preferences] == subsets
    monkeypatch.chdir(parts)
    assert read_preferences("**/c.*")[0][0].source == "c.jsonl line 1"
    with pytest.raises(DataError, match=r"d\*\.jsonl: no such file"):
        read_preferences("d*.jsonl")
    with pytest.raises(DataError, match=r"README\.md has an unknown type"):
        read_preferences("[abR]*")
    with pytest.raises(DataError, match=r"sub\.csv is no regular file"):
        read_preferences("*.csv")
    (parts / "[c].jsonl").write_text(json.dumps(PAIR | {"subset": "a file of that very name"}))
    assert [preference.subset for preference in read_preferences("[c].jsonl")[0]] == [
        "a file of that very name"
    ]


def test_hub_dataset(monkeypatch):
    import datasets

    def load_dataset(name, **options):
        assert (name, options) == ("someone/pairs", {"split": "test"})
        return datasets.Dataset.from_list([PAIR])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [preference], _ = read_preferences("someone/pairs", split="test")
    assert preference.source == "someone/pairs test row 1"

    def refuse(name, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"someone/pairs is no local file.*no network"):
        read_preferences("someone/pairs")


# Columns that are called otherwise.


OTHER = {"query": "q", "winner": "yes", "loser": "no", "delta": 1.5}
NAMES = {"prompt": "query", "chosen": "winner", "rejected": "loser", "margin": "delta"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "saved"])
def test_columns_may_be_called_otherwise(tmp_path, name):
    import datasets

    rows = [OTHER, OTHER | {"delta": None}]
    data = datasets.Dataset.from_list(rows)
    writers = {
        "a.jsonl": data.to_json,
        "a.csv": data.to_csv,
        "a.parquet": data.to_parquet,
        "saved": data.save_to_disk,
    }
    writers[name](tmp_path / name)
    source = str(tmp_path / name)
    first, second = read_preferences(source, columns=NAMES)[0]
    assert (first.prompt, first.answers) == ((user("q"),), ((assistant("yes"),), (assistant("no"),)))
    assert (first.margin, second.margin) == (1.5, 0.0)  # a null is as if not there
    with pytest.raises(RowError, match=r"(line|row) \d: column 'reply', which data\.columns reads as 'chosen', is missing "
                       r"\(found: query, winner, loser, delta\)"):  # fmt: skip
        read_preferences(source, columns={"chosen": "reply"})
    with pytest.raises(DataError, match=r"data\.columns has 'choosen'.*Did you mean chosen\?"):
        read_preferences(source, columns={"choosen": "winner"})


def test_columns_may_be_swapped_and_hide_what_is_called_like_them(tmp_path):
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    path = write_lines(tmp_path / "a.jsonl", PAIR | {"margin": 7, "gap": 2})
    [preference], _ = read_preferences(path, columns=swapped | {"margin": "gap"})
    assert preference.answers == ((assistant("5"),), (assistant("4"),))
    assert preference.margin == 2.0
    bad = write_lines(tmp_path / "b.jsonl", OTHER, OTHER | {"delta": "?"}, {"query": "q"})
    _, dropped = read_preferences(bad, columns=NAMES, on_bad_row="skip")
    assert dropped == {"wrong type": 1, "missing field": 1}


def test_messages_in_a_csv_column_that_is_called_otherwise(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["q", "good", "bad"], [json.dumps([user("hi")]), "yes", "no"]])
    [preference], _ = read_preferences(
        str(path), columns={"prompt": "q", "chosen": "good", "rejected": "bad"}
    )
    assert preference.prompt == (user("hi"),)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in which datasets looks for org/name before it asks the hub."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "org" / "name"
    for part in ("first", "second"):
        (folder / part).mkdir(parents=True)
        write_lines(folder / part / "train.jsonl", PAIR | {"subset": part})
    return folder


def test_a_folder_of_a_hub_dataset(hub):
    for part in ("first", "second"):
        [preference], _ = read_preferences(f"org/name:{part}")
        assert (preference.subset, preference.source) == (part, f"org/name:{part} train row 1")
    with pytest.raises(
        DataError, match=r"Unknown split \"test\".*\['train'\]\. Set one with --data\.train-split"
    ):
        read_preferences("org/name:first", split="test")
    with pytest.raises(
        DataError, match=r"BuilderConfig 'third' not found.*colon, as in --data\.train org/name:NAME"
    ):
        read_preferences("org/name:third")


def test_a_configuration_of_a_hub_dataset(hub):
    configs = [
        {"config_name": f"the-{part}", "data_files": f"{part}/*.jsonl"} for part in ("first", "second")
    ]
    (hub / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for part in ("first", "second"):
        [preference], _ = read_preferences(f"org/name:the-{part}")
        assert preference.subset == part
    [preference], _ = read_preferences("org/name:second")
    assert preference.subset == "second"
    with pytest.raises(DataError, match=r"'third' not found\. Available: \['the-first', 'the-second'\]"):
        read_preferences("org/name:third")
    with pytest.raises(DataError, match=r"Unknown split"):  # of a configuration: no folder is looked for
        read_preferences("org/name:the-first", split="test")


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (  # the texts are those of datasets 5.2: builder.py, arrow_reader.py, packaged_modules/cache/cache.py
            "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample of usage:\n\t`load",
            r"missing\. Please pick one among the available configs: \['a', 'b'\]\. Write a configuration.*someone/pairs:NAME\.$",
        ),
        (
            f"Config name is missing.\nPlease pick one among the available configs: {[f'c{n}' for n in range(999)]}",
            r"\['c0', 'c1',.{600,800} \.\.\. Write a configuration",
        ),
        (
            "There are multiple 'someone/pairs' configurations in the cache: a, b\nPlease specify which",
            r"in the cache: a, b Please specify which\. Write a configuration",
        ),
        (
            "Unknown split \"train\". Should be one of ['train_prefs', 'test_prefs'].",
            r"\['train_prefs', 'test_prefs'\]\. Set one with --data\.train-split",
        ),
        ("", r"'train': ValueError\. Check the name, the split and the network\."),
    ],
)  # fmt: skip
def test_what_a_hub_dataset_lacks_is_named_with_what_it_has(monkeypatch, raised, words):
    import datasets

    def refuse(name, **options):
        raise ValueError(raised)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=words):
        read_preferences("someone/pairs")


@pytest.mark.parametrize("name", ["pairs.jsonl", "data/pairs.csv.gz", "./pairs", "a/b/c", "builtin:pairs"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(DataError, match="no such file"):
        read_preferences(name)


# What is wrong with a whole file.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.jsonl", b"", "holds no rows"),
        ("pairs.jsonl", b"\n \n", "holds no rows"),
        ("pairs.json", b"", "holds no rows"),
        ("pairs.json", b"[]", "holds no rows"),
        ("pairs.csv", b"prompt,chosen,rejected\n", "holds no rows"),
        ("pairs.json", b'{"a": 1}\n{"a": 2}', r"Extra data.*\.jsonl"),
        ("pairs.json", b'{"rows": []}', "is not a list of rows"),
        ("pairs.json", b'["\xff"]', "0xff at position 2 is not UTF-8"),
        ("pairs.csv", b"a,a\n1,2\n", "two columns have the same name"),
        ("pairs.csv", b'"a"b,c\n1,2\n', "line 1: broken CSV"),
        ("pairs.txt", b"hello", r"unknown type. Allowed: \.jsonl"),
        ("pairs.jsonl.gz", b"hello", "cannot be read to its end"),
        ("pairs.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "cannot be read to its end"),
        ("pairs.parquet", b"hello", "cannot be read to its end"),
    ],
)
def test_bad_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_preferences(str(path), on_bad_row="skip")
    assert str(path) in str(caught.value)


# What is wrong with a row.

BAD_LINES = [
    ("broken JSON", b'{"prompt": "a"', "broken JSON"),
    ("broken JSON", b'{"prompt": ' + b"[" * 100_000 + b"}", "broken JSON"),
    ("not UTF-8", b'{"prompt": "\xff"}', "byte 0xff at position 12 is not UTF-8"),
    ("wrong type", b'["a"]', "the row is a list"),
    ("wrong type", b"null", "the row is null"),
    ("not valid text", b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "lone surrogate"),
    ("not a number", b'{"prompt": "q", "chosen": "a", "rejected": "b", "margin": NaN}', "'margin' is nan"),
    ("not a number", b'{"prompt": "q", "response": "a", "rating": 1e999}', "'rating' is inf"),
    ("not a number", b'{"prompt": "q", "response": "a", "rating": true}', "'rating' is True"),
]
LISTS = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}
TWO = {"prompt": "q", "response1": "a", "response2": "b"}
UF = {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
BAD_ROWS = [
    (
        "missing field",
        {"prompt": "q", "chosen": "a", "response": "b"},
        "field 'rejected' is missing (found: prompt, chosen, response).",
    ),
    ("missing field", PAIR | {"chosen": None}, "'chosen' is missing (found: prompt, rejected)"),
    ("missing field", {"chosen": "a", "rejected": "b"}, "'prompt' is missing"),
    ("missing field", {"chosen": [assistant("a")], "rejected": [assistant("b")]}, "'prompt' is missing"),
    (
        "missing field",
        PAIR | {"chosen": [{"role": "assistant"}]},
        "'chosen[0].content' is missing (found: role)",
    ),
    ("missing field", PAIR | {"chosen": [{"content": "a"}]}, "'chosen[0].role' is missing"),
    ("missing field", {"prompt": "q", "responses": ["a", "b"]}, "'scores' is missing"),
    ("missing field", TWO, "'overall_preference' is missing"),
    ("missing field", {"prompt": "q", "response": "a"}, "'rating' is missing"),
    (
        "missing field",
        {"context": "q", "completions": [{"rank": 0}]},
        "'completions[0].completion' is missing",
    ),
    (
        "unknown format",
        {"instruction": "q", "output": "a"},
        "columns instruction, output. Accepted: prompt + chosen",
    ),
    ("unknown format", {}, "columns nothing"),
    ("empty field", PAIR | {"rejected": " \n"}, "'rejected' is empty"),
    ("empty field", PAIR | {"prompt": []}, "'prompt' is empty"),
    ("empty field", PAIR | {"prompt": [user("")]}, "'prompt[0].content' is empty"),
    (
        "empty field",
        {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "'chosen[1]'",
    ),
    ("empty field", LISTS | {"responses": [], "scores": [1]}, "'responses' is empty"),
    ("wrong type", PAIR | {"chosen": 4}, "'chosen' is 4"),
    ("wrong type", PAIR | {"chosen": [4]}, "'chosen[0]' is 4"),
    ("wrong type", PAIR | {"chosen": [assistant([{"type": "text"}])]}, "'chosen[0].content' is a list"),
    ("wrong type", PAIR | {"margin": "0.5"}, "'margin' is '0.5'"),
    ("wrong type", PAIR | {"tie": 1}, "'tie' is 1"),
    ("wrong type", PAIR | {"subset": 1}, "'subset' is 1"),
    ("wrong type", PAIR | {"tools": ["add"]}, "'tools' is a list"),
    ("wrong type", LISTS | {"responses": "a"}, "'responses' is 'a'"),
    ("wrong type", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": [assistant("b")]}, "'chosen' is"),
    ("broken JSON", PAIR | {"tools": "[{"}, "'tools' is no JSON"),
    ("wrong roles", PAIR | {"chosen": [{"role": "bot", "content": "a"}]}, "'chosen[0].role' is 'bot'"),
    ("wrong roles", PAIR | {"chosen": [assistant("a"), user("b")]}, "'chosen' ends with the role 'user'"),
    (
        "wrong roles",
        PAIR | {"prompt": [user("a"), assistant("b")]},
        "'prompt' ends with a message from the assistant",
    ),
    (
        "wrong roles",
        LISTS | {"responses": [[user("a"), assistant("b")], "b", "c"]},
        "'responses[0]' starts with",
    ),
    ("wrong roles", PAIR | {"system": "a", "prompt": [system("b"), user("c")]}, "'system' is there"),
    (
        "wrong roles",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"},
        "'rejected' ends with the role 'user'",
    ),
    ("different prompt", UF | {"prompt": "other"}, "an answer starts with the role 'user'"),
    (
        "different prompt",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "the two conversations begin with different messages",
    ),
    (
        "different prompt",
        UF | {"chosen": [system("s"), user("q"), assistant("a")]},
        "the two conversations begin with different messages",
    ),
    (
        "different prompt",
        {
            "chosen": [system("s"), user("q"), assistant("a")],
            "rejected": [system("s"), user("r"), assistant("b")],
        },
        "begin with different messages ('q' and 'r')",
    ),
    (
        "different prompt",
        {"chosen": [user("q"), user("r"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        "begin with different messages ('r' and 'b')",
    ),
    (
        "different prompt",
        {
            "prompt": [system("s")],
            "chosen": [system("s"), user("q"), assistant("a")],
            "rejected": [system("s"), user("r"), assistant("b")],
        },
        "begin with different messages ('q' and 'r')",
    ),
    (
        "different prompt",
        {"prompt": "\n\nHuman: r", "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"},
        "an answer starts with the role 'user'",
    ),
    ("wrong roles", PAIR | {"prompt": "\n\nHuman: a\n\nAssistant: b"}, "'prompt' ends with a message from"),
    (
        "broken JSON",
        PAIR
        | {"chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "'chosen[0].tool_calls[0].function.arguments' is no JSON",
    ),
    (
        "broken JSON",
        PAIR | {"chosen": [{"from": "function_call", "value": "add(1)"}]},
        "'chosen[0].value' is no JSON",
    ),
    (
        "missing field",
        PAIR | {"chosen": [{"from": "function_call", "value": "{}"}]},
        "'chosen[0].value.name' is",
    ),
    ("wrong type", PAIR | {"chosen": [{**assistant("a"), "name": 7}]}, "'chosen[0].name' is 7"),
    ("own template settings", PAIR | {"chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs' sets"),
    ("wrong type", PAIR | {"history": "so far"}, "'history' is 'so far'"),
    ("wrong type", PAIR | {"history": [["a"]]}, "'history[0]' is a list"),
    ("empty field", PAIR | {"history": [["a", ""]]}, "'history[0]' is empty"),
    (
        "out of range",
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2},
        "Allowed: 0, 1",
    ),
    (
        "out of range",
        {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"},
        "Allowed: model_a, model_b",
    ),
    ("unknown format", {"prompt": "q", "response_a": "a", "response_b": "b", "winner_model_a": 1}, "LMSYS"),
    (
        "unknown format",
        {"instruction": "q", "completions": [{"response": "a", "overall_score": 7}]},
        "the original UltraFeedback",
    ),
    ("not a number", {"prompt": "q", "completion": "a", "label": True}, "as for KTO"),
    ("not text", PAIR | {"images": ["a.png"]}, "field 'images' is no text"),
    ("not text", PAIR | {"video": "a.mp4"}, "field 'video' is no text"),
    ("not text", PAIR | {"prompt": [{**user("q"), "images": ["a.png"]}]}, "'prompt[0].images' is no text"),
    (
        "not text",
        PAIR | {"prompt": [user([{"type": "image"}, {"type": "text", "text": "q"}])]},
        "'prompt[0].content[0]' is no text",
    ),
    ("empty field", PAIR | {"prompt": [user([])]}, "'prompt[0].content' is empty"),
    ("not a number", LISTS | {"scores": [1, 2, 10**400]}, "'scores[2]' is a huge number"),
    ("not valid text", PAIR | {"tools": [{"name": "\ud800"}]}, "'tools' has half a character"),
    ("identical answers", PAIR | {"rejected": "4"}, "two answers are identical"),
    ("identical answers", PAIR | {"rejected": "4", "tie": True}, "two answers are identical"),
    ("identical answers", LISTS | {"responses": ["a", "b", "a"]}, "two answers are identical"),
    ("no preference", LISTS | {"scores": [1, 1, 1]}, "all 3 answers are equally good"),
    ("no preference", {"prompt": "q", "responses": ["a"], "ranks": [0]}, "one answer and its rank"),
    ("wrong length", LISTS | {"scores": [1, 2]}, "3 responses, but 2 scores"),
    ("out of range", PAIR | {"margin": -1}, "the margin is -1"),
    ("out of range", PAIR | {"probability": 1.5}, "'probability' is 1.5"),
    ("out of range", TWO | {"overall_preference": 4}, "'overall_preference' is 4"),
    ("out of range", TWO | {"overall_preference": 0.5}, "'overall_preference' is 0.5"),
    ("out of range", UF | {"score_chosen": 1e308, "score_rejected": -1e308}, "the margin is inf"),
    ("chosen scored below rejected", UF | {"score_chosen": 1, "score_rejected": 2}, "score_chosen is below"),
    ("contradiction", PAIR | {"margin": 1, "probability": 0.2}, "the probability 0.2"),
]


def check_bad_line(path, content, line, reason, words):
    path.write_bytes(content)
    with pytest.raises(RowError) as caught:
        read_preferences(str(path))
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"{path} line {line}: ")
    assert words in str(caught.value)
    assert "--data.on-bad-row skip" in str(caught.value)
    str(caught.value).encode()
    preferences, dropped = read_preferences(str(path), on_bad_row="skip")
    assert len(preferences) == 2
    assert dropped == Counter({reason: 1})


@pytest.mark.parametrize(("reason", "line", "words"), BAD_LINES)
def test_bad_line(tmp_path, reason, line, words):
    good = json.dumps(PAIR).encode()
    check_bad_line(tmp_path / "pairs.jsonl", good + b"\n\n" + line + b"\n" + good, 3, reason, words)


@pytest.mark.parametrize(("reason", "row", "words"), BAD_ROWS)
def test_bad_row(tmp_path, reason, row, words):
    good = json.dumps(PAIR).encode()
    content = good + b"\n\n" + json.dumps(row).encode() + b"\n" + good
    check_bad_line(tmp_path / "pairs.jsonl", content, 3, reason, words)


@pytest.mark.parametrize(
    ("reason", "line", "words"),
    [
        ("wrong number of cells", b"q,a", "2 cells, but the first line names 4 columns"),
        ("broken CSV", b'"q"x,a,b,1', "broken CSV"),
        ("not UTF-8", b"q,\xff,b,1", "not UTF-8"),
        (
            "broken JSON",
            b"q,\"[{'role': 'assistant', 'content': 'a'}]\",b,1",
            "'chosen' is in Python's notation",
        ),
        ("empty field", b"q,,b,1", "'chosen' is empty"),
        ("wrong type", b"q,a,b,much", "'margin' is 'much'"),
        ("not a number", b"q,a,b,nan", "'margin' is nan"),
    ],
)
def test_bad_csv_line(tmp_path, reason, line, words):
    content = b'prompt,chosen,rejected,margin\n"two\nlines",a,b,1\n' + line + b"\nq,a,b,\n"
    check_bad_line(tmp_path / "pairs.csv", content, 4, reason, words)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 10**400])
def test_a_number_that_is_not_finite_is_no_target(number):
    with pytest.raises(RowError, match=r"line 1: field 'rating' is .*Allowed: a finite number"):
        parse_row({"prompt": "a", "response": "b", "rating": number}, "line 1")
    with pytest.raises(RowError, match=r"line 1: field 'scores\[1\]' is .*Allowed: a finite number"):
        parse_row({"prompt": "a", "responses": ["b", "c"], "scores": [1, number]}, "line 1")


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(RowError) as caught:
        parse_row(PAIR | {"tie": "y" * 5000}, "here")
    assert "'tie' is 'yyyy" in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_error_of_a_row_is_short_and_without_secrets_as_any_other(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_notARealTokenButLongEnough")
    error = RowError("a few words", f"hf_notARealTokenButLongEnough {'x' * 9000} the end")
    assert (error.reason, len(str(error))) == ("a few words", 3505)
    assert str(error).startswith("[HF_TOKEN] xxx")
    assert str(error).endswith("the end")


def test_tools_nested_too_deep_are_a_bad_row():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RowError, match="'tools' is no JSON"):
        parse_row(PAIR | {"tools": [{"name": deep}]}, "here")


def test_blank_texts_and_half_a_pair_of_scores_are_as_if_not_there():
    blank = PAIR | {"subset": " ", "tools": " \n", "system": " ", "score_chosen": 7}
    assert parse_row(blank, "here") == parse_row(PAIR, "here")


def test_rows_come_in_order_with_bad_ones_in_their_place(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"a": 1}\nx\n{"a": 2}\n')
    rows = list(read_rows(str(path)))
    assert rows[0] == Row(values={"a": 1}, source=f"{path} line 1")
    assert isinstance(rows[1], BadRow)
    assert (rows[1].source, rows[1].reason) == (f"{path} line 2", "broken JSON")
    assert rows[2] == Row(values={"a": 2}, source=f"{path} line 3")


def test_skipping_counts_by_reason(tmp_path):
    rows = [PAIR, {"a": 1}, PAIR | {"chosen": ""}, {"b": 1}, PAIR]
    preferences, dropped = read_preferences(write_lines(tmp_path / "a.jsonl", *rows), on_bad_row="skip")
    assert len(preferences) == 2
    assert dropped == {"unknown format": 2, "empty field": 1}
    with pytest.raises(
        DataError,
        match=r"no row that can be used \(unknown format: 1\)\. Read it with --data\.on-bad-row raise\.",
    ):
        read_preferences(write_lines(tmp_path / "b.jsonl", {"a": 1}), on_bad_row="skip")


def test_a_file_with_hardly_a_good_row_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_rm.data.formats.MAX_BAD_START", 50)
    bad = {"question": "a"}
    file = write_lines(tmp_path / "pairs.jsonl", PAIR, *[bad] * 200)
    with pytest.raises(
        DataError,
        match=r"1 rows that can be used among its first 102 \(unknown format: 101\).*--data\.on-bad-row raise",
    ):
        read_preferences(file, on_bad_row="skip")
    file = write_lines(tmp_path / "pairs.jsonl", PAIR, PAIR, PAIR, *[bad] * 200, PAIR)
    assert len(read_preferences(file, on_bad_row="skip")[0]) == 4


# Real data.


@pytest.mark.parametrize(
    ("name", "kind", "num_good", "dropped"),
    [
        ("alpaca_pairs_train.jsonl.gz", "pair", 2613, {}),
        ("alpaca_pairs_test.jsonl.gz", "pair", 538, {}),
        # All eight scores are 0 or all are 1: nothing to learn from.
        ("alpaca_lists_train.jsonl.gz", "ranking", 605, {"no preference": 40}),
        ("alpaca_lists_test.jsonl.gz", "ranking", 147, {"no preference": 13}),
        # Four chosen answers, on lines 87, 517, 926 and 1104, are empty.
        ("hh_harmless_test.jsonl.gz", "pair", 2308, {"empty field": 4}),
        ("llamafactory_dpo_en_demo.json", "pair", 300, {}),
    ],
)
def test_real_data(name, kind, num_good, dropped):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    preferences, counts = read_preferences(str(path), on_bad_row="skip")
    assert len(preferences) == num_good
    assert counts == dropped
    for preference in preferences:
        assert preference.kind == kind
        assert preference.prompt[-1]["role"] == "user"
        assert all(answer[0]["role"] == answer[-1]["role"] == "assistant" for answer in preference.answers)


# Anything at all.

TEXTS = st.text(max_size=6) | st.sampled_from(["q", "\n\nHuman: a\n\nAssistant: b", "[]", "\ud800", ""])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "bot"]) | SCALARS
MESSAGE_DICTS = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLES,
        "content": SCALARS,
        "from": ROLES,
        "value": SCALARS,
        "tool_calls": st.lists(SCALARS),
    },
)
COMPLETIONS = st.fixed_dictionaries(
    {}, optional={"rank": SCALARS, "completion": st.lists(MESSAGE_DICTS, max_size=2)}
)
VALUES = st.recursive(
    SCALARS | MESSAGE_DICTS | COMPLETIONS | st.lists(MESSAGE_DICTS, max_size=4),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXTS, children, max_size=2),
    max_leaves=8,
)
COLUMNS = sorted(
    {name for _, row, _ in BAD_ROWS for name in row} | {"conversations", "preference_strength", "ranks"}
)


def test_a_prompt_repeated_with_other_white_space_is_the_prompt():
    row = {"prompt": "why?", "chosen": [assistant("a")], "rejected": [user(" why? "), assistant("b")]}
    preference = parse_row(row, "here")
    assert preference.prompt == (user(" why? "),)
    assert preference.answers == ((assistant("a"),), (assistant("b"),))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([row for _, row, _ in BAD_ROWS] + [PAIR, UF, TWO, LISTS]),
    st.dictionaries(st.sampled_from(COLUMNS) | TEXTS, VALUES, max_size=4),
)
def test_any_row_is_read_or_refused(start, values):
    for row in (values, start | values):
        try:
            preference = parse_row(row, "here")
        except DataError as error:
            str(error).encode()
        else:
            assert isinstance(preference, Preference)
            assert 0.5 <= preference.probability <= 1.0
            assert preference.margin >= 0.0
            assert all(answer and answer[-1]["role"] == "assistant" for answer in preference.answers)
            assert all(map(math.isfinite, (preference.margin, *preference.scores)))
            assert preference.prompt_key


def test_a_bad_row_crosses_to_another_process():
    error = RowError("broken JSON", "line 3: is broken.")
    again = pickle.loads(pickle.dumps(error))
    assert (again.reason, str(again)) == (error.reason, str(error))


def test_a_folder_of_files_may_have_a_description_of_its_own(tmp_path):
    """As LLaMA-Factory's has; what `save_to_disk` writes has a state.json too."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "dataset_info.json").write_text("[]")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert [file.name for file in find_files(str(tmp_path))] == ["pairs.jsonl"]
