"""Rewards for users: the prompt is computed once, and what every way of asking gives."""

import contextlib
import csv
import datetime
import gzip
import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import make_base

from lora_rm import load_reward_model, reward_function
from lora_rm.cli import main
from lora_rm.data.files import SUFFIXES
from lora_rm.errors import ConfigError, DataError, ModelError
from lora_rm.merge import merge
from lora_rm.model.reward_model import RewardModel
from lora_rm.score_file import score_file, score_lines
from lora_rm.workflow import trained_length

QUESTIONS = ["Repeat exactly: Anna sold a red bag to Ben", "Which of these comes first: pear or apple?"]
ANSWERS = ["Anna sold a red bag.", "Apple.", "I don't know.", "Apple."]


@pytest.fixture(scope="module")
def scorer(adapter):
    return load_reward_model(adapter, compute_dtype="float32")


@pytest.fixture
def computed(monkeypatch):
    """Tokens of every row that is computed."""
    tokens, real = [], RewardModel.rewards
    monkeypatch.setattr(
        RewardModel,
        "rewards",
        lambda self, batch: tokens.append(batch.input_ids.numel()) or real(self, batch),
    )
    return tokens


def test_conversations_of_a_group_share_their_start_and_keep_their_rewards(scorer, computed):
    pairs = [(question, answer) for answer in ANSWERS for question in QUESTIONS]
    rows = scorer.ids(
        [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in pairs]
    )
    alone = scorer.score_ids(rows)
    without = sum(computed)
    computed.clear()
    assert scorer.score_ids(rows, ["a", "b"] * 4) == pytest.approx(alone, abs=1e-5)
    # a prompt once and not four times, and the answer that is given twice once
    assert sum(computed) < 0.5 * without
    computed.clear()
    assert scorer.score_ids(rows, ["a", ""] * 4) == pytest.approx(alone, abs=1e-5)
    assert 0.5 * without < sum(computed) < without
    with pytest.raises(ValueError, match="zip"):
        scorer.score_ids(rows, ["a"])


def test_responses_of_a_line_and_completions_of_a_prompt_share_it(scorer, computed, monkeypatch):
    for module in ("score", "score_file"):
        monkeypatch.setattr(f"lora_rm.{module}.load_reward_model", lambda *_, **__: scorer)
    lines = [json.dumps({"prompt": question, "responses": ANSWERS}) for question in QUESTIONS]
    found = [reward for line in score_lines("", lines, "lines") for reward in json.loads(line)["rewards"]]
    shared = sum(computed)
    computed.clear()
    prompts = [question for question in QUESTIONS for _ in ANSWERS]
    assert reward_function("")(prompts, ANSWERS * 2) == pytest.approx(found, abs=1e-5)
    assert sum(computed) == shared
    computed.clear()
    alone = [scorer.score(question, [answer])[0] for question in QUESTIONS for answer in ANSWERS]
    assert found == pytest.approx(alone, abs=1e-5)
    assert shared < 0.5 * sum(computed)
    computed.clear()
    assert scorer.score(QUESTIONS[0], ANSWERS) == pytest.approx(alone[:4], abs=1e-5)
    assert sum(computed) < 0.6 * shared


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "merged"
    merge(adapter, folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """What the hub gives: folders by id; and what it was asked for."""
    folders, asked = {}, []

    def download(name, **_):
        asked.append(name)
        return str(folders[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return folders, asked


ROWS = [
    {"prompt": question, "responses": ANSWERS, "source": f"line {number}"}
    for number, question in enumerate([*QUESTIONS, "Name a fruit."])
]


def write_rows(file, rows):
    """Rows in a file of the kind that its name tells."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file
    lines = json.dumps(rows)
    if {".jsonl", ".ndjson"} & set(file.suffixes):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
    if ".csv" in file.suffixes:
        cells = io.StringIO()
        writer = csv.DictWriter(cells, rows[0])
        writer.writeheader()
        writer.writerows(
            {key: v if isinstance(v, str) else json.dumps(v) for key, v in row.items()} for row in rows
        )
        lines = cells.getvalue()
    file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())
    return file


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_file_that_training_reads_is_scored_and_gone_on_with(
    suffix, scorer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("lora_rm.score_file.load_reward_model", lambda *_, **__: scorer)
    file, out = write_rows(tmp_path / f"rows{suffix}", ROWS), tmp_path / "out.jsonl"
    assert main(["score", "model", str(file)]) == 0
    text = capsys.readouterr().out
    found = [json.loads(line) for line in text.splitlines()]
    assert [{**row, "rewards": None} for row in found] == [{**row, "rewards": None} for row in ROWS]
    for row in found:
        assert row["rewards"] == pytest.approx(scorer.score(row["prompt"], ANSWERS), abs=1e-5)
    out.write_text(text[: text.index("line 1")])  # killed in the middle of the second line
    assert main(["score", "model", str(file), "--out", str(out), "--resume"]) == 0
    assert out.read_text() == text
    write_rows(file, [ROWS[0], {**ROWS[1], "prompt": ""}])
    with pytest.raises(SystemExit):
        main(["score", "model", str(file)])
    places = {
        ".csv": "line 3",
        ".parquet": "row 2",
        ".jsonl": "line 2",
        ".ndjson": "line 2",
        ".json": "row 2",
    }
    place = places[suffix.removesuffix(".gz")]
    assert (
        f"DataError: {file} {place}: is no conversation (field 'prompt' is empty" in capsys.readouterr().err
    )


def test_what_no_line_of_json_can_hold_and_rows_that_cannot_be_read_are_named(
    scorer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("lora_rm.score_file.load_reward_model", lambda *_, **__: scorer)
    dates = write_rows(tmp_path / "dates.parquet", [{**ROWS[0], "day": datetime.date(2024, 7, 26)}])
    cells = tmp_path / "cells.csv"
    cells.write_text("prompt,response\na,b\nc\n")
    for file, said in (
        (
            dates,
            "dates.parquet row 1: is no conversation (Object of type date is not JSON serializable). Write",
        ),
        (cells, "cells.csv line 3: 1 cells, but the first line names 2 columns"),
        (tmp_path / "absent.csv", "absent.csv: no such file. Check the path"),
    ):
        with pytest.raises(SystemExit):
            main(["score", "model", str(file)])
        assert said in capsys.readouterr().err


def test_score_computes_where_it_is_told_and_else_as_the_run_does(adapter, scorer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("lora_rm.score_file.load_reward_model", lambda _, **how: asked.append(how) or scorer)
    run = shutil.copytree(adapter, tmp_path / "run")
    (run / "config.yaml").write_text("model: {device: cpu, compute_dtype: float32}\n")
    lines = str(write_rows(tmp_path / "lines.jsonl", ROWS))
    flags = ["--model.device", "cuda:1", "--model.compute_dtype=bfloat16"]
    for model, more in (
        (adapter, []),
        (run, []),
        (run, flags),
        (adapter, [*flags, "--out", str(tmp_path / "out")]),
    ):
        assert main(["score", str(model), lines, *more]) == 0
    assert [(how["device"], how["compute_dtype"]) for how in asked] == [
        ("auto", "auto"), ("cpu", "float32"), ("cuda:1", "bfloat16"), ("cuda:1", "bfloat16"),
    ]  # fmt: skip


def test_a_reward_model_of_the_hub_opens_by_its_id(merged, scorer, hub, tmp_path, monkeypatch, capsys):
    folders, asked = hub
    folders["someone/rm"] = merged
    monkeypatch.chdir(tmp_path)  # no such folder here
    expected = load_reward_model(merged).score(QUESTIONS[0], ANSWERS)
    assert load_reward_model("someone/rm").score(QUESTIONS[0], ANSWERS) == expected
    assert reward_function("someone/rm")(QUESTIONS[:1] * 4, ANSWERS) == pytest.approx(expected, abs=1e-5)
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": QUESTIONS[0], "responses": ANSWERS}))
    pair = {"prompt": QUESTIONS[0], "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    capsys.readouterr()
    assert main(["score", "someone/rm", "lines.jsonl"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line)["rewards"] == pytest.approx(expected, abs=1e-5)
    assert main(["eval", "someone/rm", "--data.eval", "pairs.jsonl", "--json", "eval.json"]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["reward_mean"] == pytest.approx(sum(expected[:2]) / 2, abs=1e-5)
    assert set(asked) == {"someone/rm"}


def test_what_the_hub_does_not_give_or_was_never_trained_is_refused(base, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub[0]["someone/base"] = base
    with pytest.raises(
        ModelError, match="has no score.weight. It is no reward model; a fresh head would be random"
    ):
        load_reward_model("someone/base")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"someone/rm cannot be fetched from the hub .*Check the id .* local folder"
    ):
        load_reward_model("someone/rm")  # the tests are offline
    with pytest.raises(ModelError, match="absent: is no run, .* or the id of a reward model on the hub"):
        load_reward_model("absent")


def test_eval_cuts_conversations_as_the_training_of_the_model_did(
    base, adapter, merged, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        "lora_rm.workflow.evaluate_model", lambda _, settings, file: asked.append(settings.data)
    )

    def length_of(path, *flags):
        assert main(["eval", str(path), "--data.eval", "x.jsonl", *flags]) == 0
        return asked[-1].max_length, asked[-1].length_policy

    own = shutil.copytree(adapter, tmp_path / "adapter")
    record = json.loads((own / "lora_rm.json").read_text())
    record["length_policy"] = {"max_length": 40, "policy": "truncate_prompt"}
    (own / "lora_rm.json").write_text(json.dumps(record))
    merge(own, tmp_path / "merged")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").touch()
    parity = {"merge": json.loads((tmp_path / "merged" / "lora_rm_merge.json").read_text())}
    (tmp_path / "gguf" / "parity.json").write_text(json.dumps(parity))
    for path in ("adapter", "merged", "gguf", "gguf/model.gguf"):
        assert length_of(tmp_path / path) == (40, "truncate_prompt"), path
    flags = ["--data.max-length", "50"], ["--data.length-policy=drop"]
    assert length_of(own, *flags[0]) == (50, "truncate_prompt")
    assert length_of(own, *flags[0], *flags[1]) == (50, "drop")
    # of a run its settings, whatever lies beside them; without record all that the model takes
    (own / "config.yaml").write_text("data: {max_length: 60}\n")
    assert length_of(own) == (60, "drop")
    assert length_of(adapter) == (1024, "drop")
    assert length_of(merged) == (2**31 - 1, "drop")
    assert length_of(merged, *flags[0]) == (50, "drop")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "merged"))
    assert length_of("someone/rm") == (40, "truncate_prompt")
    learned = make_base(tmp_path / "gpt2", "gpt2")
    assert length_of(learned) == (512, "drop")
    record = tmp_path / "merged" / "lora_rm_merge.json"
    for damage, said in (("[]", r" is '\[\]'"), ('{"max_length": 8}', ".policy is missing")):
        record.write_text(f'{{"length_policy": {damage}}}')
        with pytest.raises(ModelError, match=f"lora_rm_merge.json: length_policy{said}, which no run wrote"):
            trained_length(tmp_path / "merged")


def test_reward_functions_are_told_apart_by_their_names(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_rm.score.load_reward_model", lambda *_, **__: scorer)
    monkeypatch.chdir(tmp_path)
    for path, name in (
        ("runs/safe", "safe"), ("runs/safe/adapter/", "safe"), ("runs/safe/merged", "safe"), ("someone/rm", "rm"),
        ("runs/safe/export/huggingface", "safe"), ("runs/safe/export/gguf/model.gguf", "safe"), (".", tmp_path.name),
        ("small.gguf", "small.gguf"),
    ):  # fmt: skip
        assert reward_function(path).__name__ == name
        assert reward_function(Path(path), name="mine").__name__ == "mine"


def test_rendered_texts_get_the_rewards_of_their_conversations(scorer):
    messages = [
        ({"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": answer})
        for answer in ANSWERS
    ]
    expected = scorer.score_conversations(messages)
    texts = [scorer.model.chat.render(one) for one in messages]
    assert texts[0].startswith("<s><|user|>")
    assert scorer.score_texts(texts) == pytest.approx(expected, abs=1e-5)
    assert scorer.score_texts([text.removeprefix("<s>") for text in texts]) == pytest.approx(
        expected, abs=1e-5
    )
    assert scorer.score_texts([]) == []
    for bad, said in (
        (texts[0], "'texts' is '<s>"),
        (None, "'texts' is null"),
        (["a", 1], r"'texts\[1\]' is 1"),
        ([""], "is empty"),
    ):
        with pytest.raises(DataError, match=said):
            scorer.score_texts(bad)


def test_the_best_answer_comes_first(scorer):
    rewards = scorer.score(QUESTIONS[0], ANSWERS)
    ranked = [rewards[number] for number in scorer.rank(QUESTIONS[0], ANSWERS)]
    assert ranked == sorted(rewards, reverse=True)
    assert ranked[0] > ranked[-1] + 0.01
    assert sorted(scorer.rank(QUESTIONS[0], ANSWERS)) == [0, 1, 2, 3]
    assert scorer.best_of(QUESTIONS[0], ANSWERS) == ANSWERS[rewards.index(max(rewards))]


def test_more_conversations_than_are_packed_at_once_get_their_own_rewards(scorer):
    rows = [[1, 7 + number % 300, 9 + number // 300, 2] for number in range(600)]
    found = scorer.score_ids(rows)
    assert len(found) == 600
    for number in (0, 299, 300, 511, 512, 513, 599):
        assert found[number] == pytest.approx(scorer.score_ids([rows[number]])[0], abs=1e-5), number
    assert len({round(reward, 4) for reward in found}) > 300


def test_rewards_near_zero_may_differ_by_rounding_when_scoring_goes_on(adapter, monkeypatch):
    lines = [json.dumps({"prompt": f"{n}?", "response": "a"}) for n in range(2)]
    monkeypatch.setattr("lora_rm.score.Scorer.score_ids", lambda self, rows, groups: [0.01] * len(rows))
    done = [json.dumps({**json.loads(lines[0]), "reward": 0.05})]
    assert len(list(score_lines(str(adapter), lines, "lines", done))) == 1


@pytest.mark.parametrize(("change", "is_same"), [(0.01, True), (0.06, False)])
def test_ratings_of_another_model_are_told_by_their_spread(adapter, monkeypatch, change, is_same):
    """Between 0 and 1 a tenth of 1 is much. What else a row has by that name is its own."""
    row = {"response": "a", "rewards": [50.0, None]}
    lines = [json.dumps({"prompt": f"{n}?", **row}) for n in range(12)]
    ratings = [n / 10 for n in range(10)]
    monkeypatch.setattr(
        "lora_rm.score.Scorer.score_ids", lambda self, rows, groups: [0.8, 0.9, 0.5, 0.5][-len(rows) :]
    )
    done = [
        json.dumps({**json.loads(line), "reward": rating + change})
        for line, rating in zip(lines, ratings, strict=False)
    ]
    going_on = score_lines(str(adapter), lines, "lines", done, together=4)
    if is_same:
        assert len(list(going_on)) == 2
        return
    with pytest.raises(DataError, match="another model was used"):
        list(going_on)


def test_rewards_that_are_all_alike_may_differ_by_rounding(adapter, monkeypatch):
    lines = [json.dumps({"prompt": f"{n}?", "response": "a"}) for n in range(12)]
    monkeypatch.setattr("lora_rm.score.Scorer.score_ids", lambda self, rows, groups: [0.015] * len(rows))
    done = [json.dumps({**json.loads(line), "reward": 0.01}) for line in lines[:10]]
    assert len(list(score_lines(str(adapter), lines, "lines", done))) == 2


def test_a_file_that_became_shorter_is_not_gone_on_with(adapter):
    lines = [json.dumps({"prompt": f"{n}?", "response": "a"}) for n in range(2)]
    done = list(score_lines(str(adapter), lines, "lines"))
    with pytest.raises(DataError, match="lines: has 1 conversations, and 2 were scored earlier"):
        list(score_lines(str(adapter), lines[:1], "lines", done))


def test_an_input_that_holds_rewards_is_not_taken_for_what_was_scored_of_it(adapter, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "2?", "response": "a", "reward": 1.0}) + "\n")
    with own.open() as lines, pytest.raises(ConfigError, match="holds lines that are no rewards"):
        score_file(str(adapter), lines, str(own), own, resume=True)


def test_rewards_that_are_not_finite_are_an_error(adapter, monkeypatch):
    scorer = load_reward_model(adapter)
    monkeypatch.setattr(scorer.model, "score", lambda trees: [[float("nan")]] * len(trees))
    with pytest.raises(ModelError, match="not finite"):
        scorer.score("q", ["a"])


def test_an_id_without_an_embedding_is_refused(adapter):
    with pytest.raises(ModelError, match="embeddings"):
        load_reward_model(adapter).score_ids([[1, 5, 100000]])


def test_who_asks_line_by_line_is_answered_line_by_line(adapter, monkeypatch, capsys):
    answers = []

    class Caller(contextlib.nullcontext):
        def __enter__(self):
            return self

        def __iter__(self):
            for number in range(3):
                yield json.dumps({"prompt": f"{number}?", "response": "a"}) + "\n"
                answers.append(json.loads(capsys.readouterr().out))

    monkeypatch.setattr("sys.stdin", Caller())
    main(["score", str(adapter)])
    assert [answer["prompt"] for answer in answers] == ["0?", "1?", "2?"]
