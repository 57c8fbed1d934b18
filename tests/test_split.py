"""Both sides of the data: disjoint, limited, counted."""

import dataclasses
import json

import pytest

from lora_rm.config import DataSettings
from lora_rm.data.checkable import checkable_preferences
from lora_rm.data.split import Side, check_sources, load_data, read_side, split_by_prompt
from lora_rm.data.tokens import TokenTree
from lora_rm.doctor.preferences import read_sides
from lora_rm.errors import DataError


def row(prompt, chosen="yes it is", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def repeated(tmp_path):
    """Forty rows about ten prompts, those of a prompt far apart."""
    return write(tmp_path / "train.jsonl", [row(f"Question {n % 10}?", f"answer {n}") for n in range(40)])


def load(chat, train, **more):
    return load_data(DataSettings(train=train, num_workers=1, **more), chat)


def prompts(side):
    return {preference.prompt[-1]["content"] for preference in side.preferences}


def texts(side):
    return [preference.answers[0][0]["content"] for preference in side.preferences]


def check_counts(data):
    """Every row read is kept, or counted once under a reason."""
    for name, side in (("train", data.train), ("eval", data.eval)):
        counts = {reason: n for reason, n in data.report[name].items() if not reason.startswith("of which")}
        cut = sum(number for reason, number in counts.items() if reason.startswith("prompt cut"))
        read, kept = counts.pop("rows read"), counts.pop("kept")
        assert read == kept + sum(counts.values()) - cut
        assert kept == len(side.preferences) == len(side.trees)


# Disjoint sides.


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.99])
def test_train_and_eval_share_no_prompt(chat, repeated, share):
    data = load(chat, repeated, eval_share=share)
    assert not prompts(data.train) & prompts(data.eval)
    assert len(prompts(data.eval)) == min(max(1, round(10 * share)), 9)
    assert sorted(texts(data.train) + texts(data.eval)) == sorted(f"answer {n}" for n in range(40))
    assert data.report["train"]["held out for evaluation"] == data.report["eval"]["rows read"]
    check_counts(data)


def test_the_split_depends_on_the_seed_alone(chat, repeated):
    settings = DataSettings(train=repeated, eval_share=0.3)
    sides = [prompts(load_data(settings, chat, seed=seed).eval) for seed in (0, 0, 1, 2, 3)]
    assert sides[0] == sides[1]
    assert any(side != sides[0] for side in sides[2:])


def test_the_split_does_not_depend_on_the_order_of_rows():
    preferences, _ = checkable_preferences(60, 0)
    held_out = split_by_prompt(preferences, 0.2, 0)[1]
    again = split_by_prompt(preferences[::-1], 0.2, 0)[1]
    assert len(held_out) == 12
    assert again == held_out[::-1]


@pytest.mark.parametrize("added", [1, 50])
def test_what_was_trained_on_is_trained_on_when_data_grow(added):
    """One more row must not shuffle all others to other sides."""
    preferences, _ = checkable_preferences(500, 0)
    few, many = preferences[:-added], preferences
    before, after = ({p.prompt_key for p in split_by_prompt(rows, 0.2, 0)[1]} for rows in (few, many))
    known = {p.prompt_key for p in few}
    num_moved = len((before ^ after) & known)
    assert num_moved <= max(1, 0.1 * added)


def test_a_home_of_nobody_cannot_be_looked_up(chat):
    with pytest.raises(DataError, match="'~nobody-of-this-name/a.jsonl' cannot be looked up"):
        load(chat, "~nobody-of-this-name/a.jsonl")


def test_data_with_a_single_prompt_needs_other_data_to_evaluate_on(chat, tmp_path):
    train = write(tmp_path / "train.jsonl", [row("Question?", f"answer {n}") for n in range(20)])
    with pytest.raises(DataError, match=r"All 20 rows of data.train have the same prompt.*Give data.eval"):
        load(chat, train)
    held_out = write(tmp_path / "eval.jsonl", [row("Another?")])
    assert len(load(chat, train, eval=held_out).train.trees) == 20


def test_prompts_of_both_files_leave_training_and_are_counted(chat, tmp_path):
    train = write(tmp_path / "train.jsonl", [row(f"Question {n % 5}?", f"answer {n}") for n in range(20)])
    held_out = write(tmp_path / "eval.jsonl", [row("Question 3?"), row("Question 9?")])
    data = load(chat, train, eval=held_out, max_dropped_share=0.2)
    assert prompts(data.train) == {f"Question {n}?" for n in (0, 1, 2, 4)}
    assert prompts(data.eval) == {"Question 3?", "Question 9?"}
    assert data.report["train"]["dropped: prompt is in the evaluation data"] == 4
    check_counts(data)
    with pytest.raises(DataError, match="20% of the train rows were dropped"):
        load(chat, train, eval=held_out, max_dropped_share=0.19)


def test_the_built_in_set_has_sides_of_its_own(chat):
    data = load(chat, "builtin:checkable", max_train=30, max_eval=15)
    train, held_out = checkable_preferences()
    assert {p.prompt_key for p in data.train.preferences} <= {p.prompt_key for p in train}
    assert {p.prompt_key for p in data.eval.preferences} <= {p.prompt_key for p in held_out}
    assert (len(data.train.trees), len(data.eval.trees)) == (30, 15)
    assert data.report["train"]["left out by the limit"] == len(train) - 30
    check_counts(data)


# Limits.


def test_limits_take_rows_at_random_and_leave_the_other_side_alone(chat, repeated):
    whole = load(chat, repeated, eval_share=0.3)
    data = load(chat, repeated, eval_share=0.3, max_train=8, max_eval=5)
    assert len(set(texts(data.train))) == 8
    assert len(set(texts(data.eval))) == 5
    assert set(texts(data.train)) < set(texts(whole.train))
    assert texts(data.train) != texts(whole.train)[:8]
    assert prompts(data.eval) <= prompts(whole.eval)
    assert data.report["train"]["left out by the limit"] == 20
    assert data.report["eval"]["left out by the limit"] == 7
    check_counts(data)
    assert texts(load(chat, repeated, eval_share=0.3, max_train=8).train) == texts(data.train)
    assert texts(load(chat, repeated, eval_share=0.3, max_train=999).train) == texts(whole.train)


def test_trees_and_preferences_stay_side_by_side(chat, tmp_path):
    rows = [row(f"Question {n}?", f"answer {n}", "much " * 80 if n % 4 == 0 else "no") for n in range(20)]
    data = load(chat, write(tmp_path / "t.jsonl", rows), max_length=60, max_dropped_share=0.5)
    for side in (data.train, data.eval):
        for preference, tree in zip(side.preferences, side.trees, strict=True):
            text = chat.tokenizer.decode(tree.conversations()[0])
            assert preference.answers[0][0]["content"] + "</s>" in text
    assert sum(side["dropped: longer than 60 tokens"] for side in data.report.values() if len(side) > 2) == 5
    check_counts(data)


def test_which_rows_a_limit_takes_depends_on_the_seed(chat, repeated, tmp_path):
    held_out = write(tmp_path / "eval.jsonl", [row(f"Else {n}?", f"other {n}") for n in range(40)])
    settings = DataSettings(train=repeated, eval=held_out, max_train=9, max_eval=9, num_workers=1)
    whole = [load_data(settings, chat, seed=seed) for seed in (1, 1, 2)]
    alone = [read_side(settings, chat, seed=seed) for seed in (1, 1, 2)]
    for sides in ([data.train for data in whole], [data.eval for data in whole], alone):
        first, again, other = map(texts, sides)
        assert first == again != other


# Where the sides come from.


def test_the_sides_of_a_folder_are_its_splits(chat, tmp_path):
    import datasets

    names = ("train", "test", "dev")
    splits = {name: datasets.Dataset.from_list([row(f"{name} {n}?") for n in range(4)]) for name in names}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    folder = str(tmp_path / "splits")
    for train, held_out, chosen in (
        ("train", "test", {}),
        ("test", "dev", {"train_split": "test", "eval_split": "dev"}),
    ):
        data = load(chat, folder, eval=folder, **chosen)
        alone = read_side(DataSettings(eval=folder, num_workers=1, **chosen), chat)
        assert prompts(data.train) == {f"{train} {n}?" for n in range(4)}
        assert prompts(data.eval) == prompts(alone) == {f"{held_out} {n}?" for n in range(4)}


def test_both_files_may_call_columns_otherwise(chat, tmp_path):
    rows = [{"prompt": f"Question {n}?", "good": f"answer {n}", "rejected": "no"} for n in range(6)]
    train, held_out = write(tmp_path / "train.jsonl", rows[:4]), write(tmp_path / "eval.jsonl", rows[4:])
    data = load(chat, train, eval=held_out, columns={"chosen": "good"})
    assert texts(data.train) + texts(data.eval) == [f"answer {n}" for n in range(6)]
    wanted = DataSettings(train=train, eval=held_out, columns={"chosen": "good"})
    assert [len(side) for side in read_sides(wanted)] == [4, 2, 0]


def test_the_built_in_set_can_be_one_side_of_two(chat, repeated):
    data = load(chat, "builtin:checkable", eval=repeated, max_train=5)
    assert prompts(data.eval) == {f"Question {n}?" for n in range(10)}
    data = load(chat, repeated, eval="builtin:checkable", max_eval=5)
    held_out = {preference.prompt_key for preference in checkable_preferences()[1]}
    assert {preference.prompt_key for preference in data.eval.preferences} <= held_out


@pytest.mark.parametrize("train", ["builtin:checkable", "own"])
@pytest.mark.parametrize("held_out", [None, "builtin:checkable", "own"])
def test_the_doctor_looks_at_the_sides_that_training_reads(chat, repeated, tmp_path, train, held_out):
    own = write(tmp_path / "eval.jsonl", [row(f"Question {n}?") for n in (3, 14)])
    source = {"builtin:checkable": "builtin:checkable", None: None}
    wanted = DataSettings(train=source.get(train, repeated), eval=source.get(held_out, own), num_workers=1)
    data = load_data(wanted, chat, seed=3)
    train_side, eval_side, bad = read_sides(wanted, seed=3)
    assert not bad
    keys = [{p.prompt_key for p in side} for side in (train_side, eval_side)]
    trained, evaluated = ({p.prompt_key for p in side.preferences} for side in (data.train, data.eval))
    assert (trained, evaluated) == (keys[0] - keys[1], keys[1])
    assert data.report["eval"]["rows read"] == len(eval_side)
    for_evaluation = data.report["train"].get("held out for evaluation", 0)
    assert data.report["train"]["rows read"] - for_evaluation == len(train_side)
    assert (for_evaluation > 0) == (train == "own" and held_out is None)


def test_the_hash_of_a_side_covers_all_that_is_read_of_it():
    tree = TokenTree([1, 2], ([3], [4, 5]), scores=(1.0, 0.0), subset="a")
    changes = [
        {"prompt_ids": [1]},
        {"answer_ids": ([3], [4, 6])},
        {"prompt_ids": [1], "answer_ids": ([2, 3], [4, 5])},  # the same ids in other rows
        {"kind": "ranking"},
        {"probability": 0.75},
        {"margin": 0.5},
        {"scores": (1.0, 0.5)},
        {"group": "b"},
    ]
    hashes = [Side([], [dataclasses.replace(tree, **change)]).sha256 for change in [{}, *changes]]
    assert len(set(hashes)) == len(hashes)
    assert Side([], [dataclasses.replace(tree)]).sha256 == hashes[0]
    two = [Side([], trees).sha256 for trees in ([tree, tree], [tree], [])]
    assert len(set(two)) == 3


# What is dropped.


def test_every_reason_is_counted_once(chat, tmp_path):
    rows = [row(f"Question {n}?", f"answer {n}") for n in range(20)]
    rows[2]["rejected"] = rows[2]["chosen"]
    del rows[5]["rejected"]
    del rows[6]["rejected"]
    rows[9]["chosen"] = "much " * 80
    rows[11]["prompt"] = "so " * 60
    train = write(tmp_path / "train.jsonl", rows)
    held_out = write(
        tmp_path / "eval.jsonl", [row("Question 1?"), row("Else?"), {"prompt": "Half a row", "chosen": "yes"}]
    )
    policies = {"on_bad_row": "skip", "length_policy": "truncate_prompt", "max_dropped_share": 0.5}
    data = load(chat, train, eval=held_out, max_length=60, **policies)
    assert data.report["train"] == {
        "rows read": 20,
        "dropped: identical answers": 1,
        "dropped: missing field": 2,
        "dropped: prompt is in the evaluation data": 1,
        "dropped: longer than 60 tokens": 1,
        "prompt cut to fit 60 tokens": 1,
        "kept": 15,
    }
    assert data.report["eval"] == {"rows read": 3, "dropped: missing field": 1, "kept": 2}
    check_counts(data)


def test_what_is_no_plain_pair_is_counted(chat, tmp_path, capsys):
    more = [
        {"margin": 2.0},
        {"margin": 0},
        {"tie": True, "margin": 1.0},
        {"chosen": ["a"], "rejected": ["b", "c"]},
    ]
    rows = [row(f"Question {n}?") | columns for n, columns in enumerate(more)]
    rows.append({"prompt": "Rated?", "response": "yes", "rating": 3})
    train, held_out = write(tmp_path / "train.jsonl", rows), write(tmp_path / "eval.jsonl", [row("Else?")])
    data = load(chat, train, eval=held_out)
    margin = "of which with a margin (unused if loss.use_margin is False)"
    assert data.report["train"] == {
        "rows read": 5,
        "dropped: prompt is in the evaluation data": 0,
        "kept": 5,
        margin: 1,
        "of which ties": 1,
        "of which rankings of more than two answers": 1,
        "of which ratings": 1,
    }
    assert data.report["eval"] == {"rows read": 1, "kept": 1}
    check_counts(data)
    data.show()
    assert "of which ties" in capsys.readouterr().out
    limited = load(chat, train, eval=held_out, max_train=1).report[
        "train"
    ]  # what a limit leaves out is not trained on
    assert limited["kept"] == 1
    assert sum(number for reason, number in limited.items() if reason.startswith("of which")) <= 1


def test_more_dropped_than_allowed_is_an_error_that_says_why(chat, tmp_path):
    rows = [row(f"Question {n}?", "much " * 80 if n < 3 else "yes") for n in range(20)]
    train = write(tmp_path / "train.jsonl", rows)
    held_out = write(tmp_path / "eval.jsonl", [row("Else?")])
    with pytest.raises(DataError, match=r"15% of the train rows.*longer than 60.*allows 10%.*max_length"):
        load(chat, train, eval=held_out, max_length=60)
    limits = {"max_length": 60, "max_dropped_share": 0.15}
    assert len(load(chat, train, eval=held_out, **limits).train.trees) == 17
    assert len(load(chat, train, eval=held_out, max_train=2, **limits).train.trees) == 2
    with pytest.raises(DataError, match="100% of the eval rows"):
        load(chat, held_out.replace("eval", "train"), eval=write(tmp_path / "e.jsonl", rows[:1]), max_length=60,
             max_dropped_share=0.5)  # fmt: skip


def test_a_bad_row_stops_the_run_unless_told_otherwise(chat, tmp_path):
    rows = [row(f"Question {n}?") for n in range(20)]
    del rows[4]["chosen"]
    train = write(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"train\.jsonl line 5"):
        load(chat, train)
    data = load(chat, train, on_bad_row="skip")
    assert len(data.train.trees) + len(data.eval.trees) == 19
    check_counts(data)


def test_missing_settings_and_files_are_named(chat, tmp_path):
    with pytest.raises(DataError, match=r"data\.train is not set.*builtin:checkable"):
        load(chat, "")
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        load(chat, str(tmp_path / "absent.jsonl"))


def test_files_are_looked_for_before_anything_is_read(tmp_path):
    write(tmp_path / "a.jsonl", [row("Question?")])
    for source in (tmp_path, tmp_path / "*.jsonl", "org/name:part"):
        check_sources(DataSettings(train=str(source), eval=str(source)))
    for source, words in (("b*.jsonl", "no such file"), ("sub", "without preference files")):
        (tmp_path / "sub").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=words):
            check_sources(DataSettings(train=str(tmp_path), eval=str(tmp_path / source)))
    with pytest.raises(DataError, match="data.columns has 'promt'.*Did you mean prompt"):
        check_sources(DataSettings(train=str(tmp_path), columns={"promt": "query"}))


def test_the_evaluation_data_can_be_read_alone(chat, tmp_path, capsys):
    held_out = write(tmp_path / "eval.jsonl", [row(f"Question {n}?", f"answer {n}") for n in range(6)])
    side = read_side(DataSettings(eval=held_out, max_eval=4), chat)
    assert len(set(texts(side))) == len(side.trees) == 4
    assert set(texts(side)) <= {f"answer {n}" for n in range(6)}
    with pytest.raises(DataError, match="100% of the eval rows"):
        read_side(DataSettings(eval=held_out, max_length=8), chat)


def test_the_report_is_shown_as_a_table(chat, repeated, capsys):
    load(chat, repeated).show()
    page = capsys.readouterr().out
    for word in ("train", "eval", "rows read", "kept", "40", "36"):
        assert word in page
