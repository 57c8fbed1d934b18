"""The main job on a tiny model, end to end: train, merge, verify, export, score; and the checks that must fail."""

import dataclasses
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED, changed, make_merged, parity_of, written
from safetensors.torch import load_file, save_file

from lora_rm import load_reward_model
from lora_rm.checkpoint import RunFolder
from lora_rm.cli import main
from lora_rm.config import VerifySettings, dump_settings, load_settings
from lora_rm.data.split import load_data
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.errors import ConfigError, DataError, LoraRmError, MergeError, ModelError
from lora_rm.evaluate import bag_of_words_baseline
from lora_rm.evaluate import summarize as summarize_rewards
from lora_rm.export.huggingface import check_pipeline, export_huggingface, model_card, push
from lora_rm.export.proof import public_record
from lora_rm.model.record import RECORD
from lora_rm.score_file import score_lines
from lora_rm.verify import Change, measure_change, verify
from lora_rm.verify import _fault as fault_of
from lora_rm.workflow import (
    _is_exported,
    evaluate_model,
    export_run,
    merge_run,
    open_model,
    read_data,
    read_held_out,
    summarize,
    train_run,
)

ROOT = Path(__file__).parents[1]
SECRET = "hf_notARealTokenButLongEnough"


@pytest.fixture(scope="module")
def job(base, tmp_path_factory):
    """A run that went all the way."""
    from lora_rm.config import check_settings

    settings = check_settings(
        {
            "output_dir": str(tmp_path_factory.mktemp("job") / "run"),
            "seed": 3,  # not the default: a step that forgets it is found
            "model": {"base": str(base), "compute_dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 12},
            "data": {"train": "builtin:checkable", "max_train": 64, "max_eval": 60},
            "train": {"preferences_per_step": 8, "tokens_per_microbatch": 1024, "learning_rate": 3e-3, "checkpointing": "none"},
        }
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_TOKEN", SECRET)
        run = train_run(settings)
        merge_run(run.path, settings)
        export_run(run.path)
        summarize(run, 0.0)
    return run


def test_no_file_of_the_run_or_its_export_holds_a_secret_of_the_environment(job):
    files = [file for file in job.path.rglob("*") if file.is_file()]
    assert {"README.md", "parity.json", "config.yaml", "lora_rm.json"} <= {file.name for file in files}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


def test_a_second_round_of_training_starts_where_the_first_ended(job, tmp_path, capsys, scored_here):
    settings = job.settings()
    first = job.read_json("eval.json")["after"]
    shutil.copytree(job.adapter, tmp_path / "first")
    second = changed(
        settings,
        output_dir=str(tmp_path / "second"),
        adapter={"start_from": str(tmp_path / "first")},
        train={"max_steps": 2},
    )
    run = train_run(second)
    assert f"may have been trained on by {tmp_path}/first" in capsys.readouterr().out
    found = run.read_json("eval.json")
    assert found["before"]["loss"] == pytest.approx(first["loss"], abs=1e-6)
    assert found["after"]["loss"] != found["before"]["loss"]
    assert run.read_json("inputs.json")["adapter.start_from"]
    with pytest.raises(ConfigError, match="there is no such folder"):
        train_run(
            changed(
                second, output_dir=str(tmp_path / "third"), adapter={"start_from": str(tmp_path / "none")}
            )
        )
    assert not (tmp_path / "third").exists()
    shutil.rmtree(tmp_path / "first")  # it may be gone when the second goes on, which has a checkpoint
    (run.adapter / "lora_rm.json").unlink()
    assert train_run(second, resume=True).path == run.path
    merge_run(run.path, second)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(ConfigError, match="there is no such folder"):
        train_run(second, resume=True)
    for more in ({"adapter": {"start_from": str(run.path)}}, {"model": {"base": str(run.merged)}}):
        with pytest.raises(ConfigError, match="lies in output_dir, and a new run empties that first"):
            train_run(changed(settings, output_dir=str(run.path), overwrite=True, **more))
    assert (run.adapter / "lora_rm.json").is_file()


@pytest.mark.parametrize("name", ["~nobody-of-this-name/base", "/a\0b", "x" * 5000])
def test_names_of_no_file_are_refused_where_they_are_opened(settings, name):
    for more in ({"model": {"base": name}}, {"data": {"chat_template": name}}):
        with pytest.raises(LoraRmError):
            train_run(changed(settings, **more))
    assert not Path(settings.output_dir).exists()


def test_what_of_the_loss_is_not_for_rankings_is_told(settings, tmp_path, capsys):
    """Three answers have no label that could be the wrong way round, and no one margin."""
    rows = [{"prompt": f"{n}?", "responses": ["a", "b", "c"], "scores": [3, 2, 1]} for n in range(20)]
    pairs = [{"prompt": f"Say {n}.", "chosen": "a", "rejected": "b"} for n in range(20)]
    file = tmp_path / "rows.jsonl"
    told = "loss.use_margin True and loss.label_smoothing 0.1: of pairs alone. The 18 rankings are trained on without"
    for content, is_told in ((rows, True), (pairs, False)):
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
        own = changed(
            settings,
            output_dir=str(tmp_path / f"run{is_told}"),
            data={"train": str(file)},
            loss={"use_margin": True, "label_smoothing": 0.1},
        )
        read_data(own, open_model(own), RunFolder.create(own))
        assert (told in capsys.readouterr().out) == is_told


def test_a_token_without_embedding_in_the_data_is_named(job, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    tokenizer = ChatTokenizer.load(base).tokenizer
    tokenizer.add_tokens(["rememberthis"])
    tokenizer.save_pretrained(folder)
    row = {"prompt": "What was it?", "chosen": "rememberthis", "rejected": "no"}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({**row, "prompt": f"What was {n}?"}) + "\n" for n in range(20)))
    own = changed(
        job.settings(),
        output_dir=str(tmp_path / "run"),
        model={"base": str(folder)},
        data={"train": str(file)},
    )
    with pytest.raises(ModelError, match="'rememberthis' has the id 400, but the model has 400 embeddings"):
        train_run(own)


def test_the_run_folder_holds_everything(job):
    names = {path.name for path in job.path.iterdir()}
    assert names == {
        "config.yaml", "inputs.json", "data.json", "metrics.jsonl", "checkpoints", "adapter", "eval.json", "held_out.json", "merged",
        "parity.json", "export", "summary.json",
    }  # fmt: skip
    summary = job.read_json("summary.json")
    assert set(summary) >= {
        "accuracy_before", "accuracy_after", "accuracy_interval", "length_baseline", "num_pairs_train",
        "num_pairs_eval", "merge_mean_change", "merge_max_change", "pair_flips", "seconds",
    }  # fmt: skip
    assert summary["num_pairs_train"] == 64
    assert summary["num_pairs_eval"] == 60
    assert summary["merge_mean_change"] < 0.005
    assert summary["merge_max_change"] < 0.02
    before, after = (job.read_json("eval.json")[when]["pairs"]["accuracy"] for when in ("before", "after"))
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (before, after)
    assert before != after


def test_the_run_evaluated_the_data_of_its_seed_and_its_baselines(job):
    settings = job.settings()
    data = load_data(settings.data, ChatTokenizer.load(job.adapter), seed=settings.seed)
    assert data.report == job.read_json("data.json")
    evaluation = job.read_json("eval.json")
    words = bag_of_words_baseline(data.train.preferences, data.eval.preferences)
    assert evaluation["bag_of_words_baseline"] == words
    lengths = summarize_rewards(data.eval.trees, [[0.0, 0.0]] * 60, settings.loss).length_baseline
    assert evaluation["before"]["length_baseline"] == evaluation["after"]["length_baseline"] == lengths


def test_the_merged_rewards_are_the_adapters_in_every_way_of_scoring(job):
    parity = json.loads((job.merged / "parity.json").read_text())
    assert parity["num_answers"] == 96  # 32 canaries and 64 others
    assert set(parity["changes"]) == {
        "library", "transformers, padded right", "transformers, padded left", "transformers, one by one",
    }  # fmt: skip
    assert parity["canaries_against_training"]["largest"] < 1e-4
    for way, change in parity["changes"].items():
        assert change["largest"] < 0.02, way
        assert (change["pair_flips"], change["num_pairs"]) == (0, 48), way
        assert change["kendall_tau"] > 0.99, way


def test_the_proof_tells_how_far_the_model_without_adapter_is(job):
    from peft import PeftModel

    parity = json.loads((job.merged / "parity.json").read_text())
    model = load_reward_model(job.adapter, compute_dtype="float32")
    rows = [answer["ids"] for answer in parity["answers"][:6]]
    expected = model.score_ids(rows)
    head = model.model.head.detach().clone()
    assert isinstance(model.model.model, PeftModel)
    for name, parameter in model.model.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert torch.equal(model.model.head, head)  # the trained head stays: what is lost is the adapter
    bare = model.score_ids(rows)
    assert [answer["reward"] for answer in parity["answers"][:6]] == pytest.approx(expected, abs=1e-4)
    assert [answer["without_adapter"] for answer in parity["answers"][:6]] == pytest.approx(bare, abs=1e-4)
    distances = [abs(a["reward"] - a["without_adapter"]) for a in parity["answers"]]
    assert parity["without_adapter"]["mean"] == pytest.approx(sum(distances) / 96 / parity["spread"])
    assert parity["without_adapter"]["mean"] > 0.1


def test_the_pipeline_of_the_export_gives_the_rewards_of_parity_json(job):
    from transformers import pipeline

    folder = job.exports / "huggingface"
    parity = json.loads((folder / "parity.json").read_text())
    reward = pipeline("text-classification", model=str(folder))
    for answer in parity["answers"][:5]:
        assert reward(answer["text"])[0]["score"] == pytest.approx(
            answer["reward"], abs=0.02 * parity["spread"]
        )
        ids = reward.tokenizer(answer["text"]).input_ids
        assert ids == answer["ids"]


def test_the_export_opens_without_argument_and_without_warning(job):
    code = "import sys; from transformers import AutoModelForSequenceClassification as M; m = M.from_pretrained(sys.argv[1]); assert m.num_labels == 1"
    done = subprocess.run(
        [sys.executable, "-c", code, job.exports / "huggingface"], capture_output=True, text=True, check=True
    )
    said = [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert said == []


def test_the_model_card_tells_the_numbers_of_the_run(job):
    card = (job.exports / "huggingface" / "README.md").read_text()
    evaluation, parity = job.read_json("eval.json"), job.read_json("parity.json")
    assert f"{evaluation['after']['pairs']['accuracy']:.3f}" in card
    assert f"{parity['changes']['library']['mean']:.3%}" in card
    assert "license" not in card  # never guessed
    assert "| pipeline in float16 |" in card
    assert str(job.path) not in card


def test_the_snippet_of_the_model_card_runs_as_pasted(job):
    folder = job.exports / "huggingface"
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    (expected,) = load_reward_model(folder, compute_dtype="float32").score("2 + 2?", ["4"])
    spread = job.read_json("parity.json")["spread"]
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, abs=0.02 * spread)


@pytest.mark.parametrize("form", ["run", "adapter", "merged", "export"])
def test_every_form_opens_in_one_call_with_the_same_rewards(job, form):
    path = {
        "run": job.path,
        "adapter": job.adapter,
        "merged": job.merged,
        "export": job.exports / "huggingface",
    }[form]
    scorer = load_reward_model(path, compute_dtype="float32")
    prompt, answers = (
        "Repeat exactly: Anna sold a red bag",
        ["Anna sold a red bag", "Ben sold a red bag", "no"],
    )
    rewards = scorer.score(prompt, answers)
    expected = load_reward_model(job.adapter, compute_dtype="float32").score(prompt, answers)
    assert rewards == pytest.approx(expected, abs=0.02 * job.read_json("parity.json")["spread"])
    assert scorer.best_of(prompt, answers) == answers[rewards.index(max(rewards))]


def test_lines_are_scored_and_bad_lines_named(job):
    lines = [
        '{"prompt": "a", "response": "b"}',
        "",
        '{"prompt": "a", "responses": ["b", "c"], "id": 7}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    ]
    found = [json.loads(line) for line in score_lines(str(job.adapter), lines, "x.jsonl")]
    assert found[0]["reward"] == pytest.approx(found[2]["reward"], abs=1e-5)
    assert found[1]["rewards"][0] == pytest.approx(found[0]["reward"], abs=1e-5)
    assert found[1]["id"] == 7
    with pytest.raises(DataError, match="x.jsonl line 2: is no conversation"):
        list(score_lines(str(job.adapter), [lines[0], '{"text": 1}'], "x.jsonl"))
    pair = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
    with pytest.raises(
        DataError, match=r"line 1: is no conversation \(it is a preference pair: .*`lora-rm eval MODEL"
    ):
        list(score_lines(str(job.adapter), [pair], "x.jsonl"))
    with pytest.raises(DataError, match="line 1: is no conversation .responses is no list"):
        list(score_lines(str(job.adapter), ['{"prompt": "a", "responses": "Paris"}'], "x.jsonl"))


def test_lines_are_read_as_training_reads_them(job):
    user, answer, system = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
    plain = {"prompt": "u", "response": "a"}
    rows = [plain, plain | {"system": "s"}, {"messages": [system, user, answer]}]
    rows.append({"messages": [user, answer], "system": "s", "tools": []})
    lines = list(map(json.dumps, rows))
    rewards = [json.loads(line)["reward"] for line in score_lines(str(job.adapter), lines, "x.jsonl")]
    assert rewards[2:] == pytest.approx(rewards[1:2] * 2, abs=1e-5)
    assert rewards[0] != pytest.approx(rewards[1], abs=1e-3)
    bad_rows = {
        "exactly one of messages, response and responses": plain | {"responses": ["c"]},
        "'messages.1..role' is 'bot'": {"messages": [user, {"role": "bot", "content": "b"}]},
        "'messages.0..content' is a list": {"messages": [{"role": "user", "content": [{"type": "text"}]}, answer]},
        "'response' is empty": plain | {"response": ""},
        "'prompt' is missing": {"prompt": None, "response": "b"},
        "'responses.1.' is null": {"prompt": "a", "responses": ["b", None]},
        "'messages' ends with the role 'user'": {"messages": [user]},
        "'tools' is a list": plain | {"tools": ["add"]},
        "it is no object": ["a"],
    }  # fmt: skip
    for message, row in bad_rows.items():
        with pytest.raises(DataError, match=rf"x.jsonl line 1: is no conversation \(.*({message})"):
            list(score_lines(str(job.adapter), [json.dumps(row)], "x.jsonl"))
    scorer = load_reward_model(job.adapter)
    for bad, message in (
        (lambda: scorer.score("a", "Paris"), "'answers' is 'Paris'"),
        (lambda: scorer.score("a", None), "'answers' is null"),
        (lambda: scorer.score("a", {"b": 1}), "'answers' is an object"),
        (lambda: scorer.score("a", [None]), r"'answers\[0\]' is null"),
        (lambda: scorer.score([{"content": "a"}], ["b"]), r"'prompt\[0\].role' is missing"),
        (lambda: scorer.score_conversations([[user]]), "ends with the role 'user'"),
        (lambda: scorer.score_conversations(["a"]), "for it is a whole conversation"),
        (lambda: scorer.score("a", ["b"], tools=["add"]), "'tools' is a list"),
    ):
        with pytest.raises(DataError, match=message):
            bad()


def test_an_evaluation_of_the_run_repeats_the_number(job):
    found = evaluate_model(job.path, job.settings())
    assert found.pairs.accuracy == job.read_json("eval.json")["after"]["pairs"]["accuracy"]
    assert found.reward_mean == pytest.approx(job.read_json("eval.json")["after"]["reward_mean"], rel=1e-5)
    with pytest.raises(ConfigError, match="data.eval is not set"):
        evaluate_model(job.merged, job.settings())
    other = changed(job.settings(), data={"max_train": 63})  # as if rows had been added since
    with pytest.raises(ConfigError, match="does not give the training side .* give --data.eval"):
        evaluate_model(job.path, other)


def test_the_commands_evaluate_and_score(job, tmp_path, capsys):
    assert main(["eval", str(job.path), "--json", str(tmp_path / "eval.json")]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["pairs"] == job.read_json("eval.json")["after"]["pairs"]
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a", "responses": ["b", "c"]}\n')
    capsys.readouterr()
    assert main(["score", str(job.adapter), str(tmp_path / "lines.jsonl")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    rewards = load_reward_model(job.adapter).score("a", ["b", "c"])
    assert json.loads(line)["rewards"] == pytest.approx(rewards, rel=1e-5)


def test_an_export_names_no_folder_of_this_machine(job):
    folder = job.exports / "huggingface"
    for name in ("lora_rm_merge.json", "parity.json", "README.md"):
        assert str(Path(job.settings().model.base).parent) not in (folder / name).read_text(), name
    assert (
        json.loads((folder / "lora_rm_merge.json").read_text())["base"]
        == Path(job.settings().model.base).name
    )


def test_a_merge_into_the_original_base_is_exported_as_what_it_is(job, tmp_path, scored_here):
    settings = changed(job.settings(), merge={"base": "original"})
    merged = merge_run(shutil.copytree(job.adapter, tmp_path / "mine"), settings)
    file = merged / "parity.json"
    parity = json.loads(file.read_text())
    # further from the trained adapter than the model without one is, which says nothing about the export
    parity["answers"] = [{**answer, "reward": answer["merged"] + 9.0} for answer in parity["answers"]]
    file.write_text(json.dumps(parity))
    out = export_run(merged)
    assert "not the model that was trained" in (out / "README.md").read_text()


@pytest.mark.parametrize("damage", ["{", "[]", '{"passed": true}'])
def test_a_damaged_parity_is_named(job, tmp_path, damage):
    merged = shutil.copytree(job.merged, tmp_path / "merged")
    (merged / "parity.json").write_text(damage)
    with pytest.raises(
        ModelError, match="parity.json: (cannot be read|holds no JSON|is_trained_model is missing)"
    ):
        export_run(merged)


@pytest.mark.parametrize(
    "text", ["[", "{}x", '{"a": 1}', '[{"ids": [1, 2]}]', '[{"ids": "12", "prompt": 0}]']
)
def test_damaged_held_out_answers_are_named_before_anything_is_merged(job, tmp_path, text):
    run = shutil.copytree(
        job.path, tmp_path / "run", ignore=shutil.ignore_patterns("merged", "export", "checkpoints")
    )
    (run / "held_out.json").write_text(text)
    with pytest.raises((ConfigError, ModelError), match=f"{run}/held_out.json: .*(copy|Copy)"):
        merge_run(run, job.settings())
    assert not (run / "merged").exists()


def test_a_run_of_ratings_is_exported(job, tmp_path, scored_here):
    run = RunFolder(shutil.copytree(job.path, tmp_path / "run"))
    evaluation = run.read_json("eval.json")
    for when in ("before", "after"):  # as evaluations without decided pairs are written
        evaluation[when] |= {
            "length_baseline": None,
            "pairs": {**evaluation[when]["pairs"], "accuracy": None},
        }
    run.write_json("eval.json", evaluation)
    card = (export_run(run.path, out=tmp_path / "export") / "README.md").read_text()
    assert "held-out pairs" not in card
    assert "model-index" not in card


def test_the_card_of_another_model_has_no_accuracy_of_the_adapter(job):
    parity = parity_of(job.merged)
    for is_trained_model in (True, False):
        card = model_card({**parity, "is_trained_model": is_trained_model}, job)
        assert ("held-out pairs" in card) == ("model-index" in card) == is_trained_model


def test_what_is_no_export_is_not_overwritten(job, tmp_path):
    for out in (job.path, job.merged, job.adapter):
        with pytest.raises(MergeError, match="is not replaced"):
            export_run(job.path, out=out, overwrite=True)
    assert job.read_json("parity.json")


class Hub:
    """In the place of `huggingface_hub.HfApi`: notes what it is asked."""

    def __init__(self, asked, refuses=(), there=()):
        self.asked = asked
        self.refuses = refuses
        self.there = there

    def __call__(self):
        return self

    def __getattr__(self, name):
        def call(*words, **named):
            self.asked.append((name, words, named))
            if name in self.refuses:
                raise OSError("Token is required")
            return self.there if name == "list_repo_files" else "https://hub/someone/model"

        return call


def test_an_export_is_uploaded_when_told(job, tmp_path, capsys, monkeypatch):
    out, asked = tmp_path / "mine", []
    words = ["export", str(job.path), "--out", str(out), "--push", "someone/model"]
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(asked, refuses=["whoami"]))
    with pytest.raises(SystemExit, match="1"):
        main(words)
    assert (
        "does not tell who you are (Token is required). Log in with `hf auth login`"
        in capsys.readouterr().err
    )
    assert not out.exists()  # told before the work is done
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(asked, refuses=["upload_folder"]))
    with pytest.raises(SystemExit, match="1"):
        main(words)
    assert "someone/model: the hub refused the upload (Token is required)" in capsys.readouterr().err
    # it lies there whole: the next call uploads it, and neither writes nor proves it anew
    before = {file.name: written(file) for file in out.iterdir()}
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(asked))
    asked.clear()
    monkeypatch.setattr("lora_rm.verify.subprocess.run", lambda *_, **__: pytest.fail("proven anew"))
    assert main(words) == 0
    assert "Uploaded to https://hub/someone/model." in capsys.readouterr().out
    assert {file.name: written(file) for file in out.iterdir()} == before
    assert asked == [
        ("whoami", (), {}),
        ("create_repo", ("someone/model",), {"private": True, "exist_ok": True}),
        ("list_repo_files", ("someone/model",), {}),
        (
            "upload_folder",
            (),
            {
                "repo_id": "someone/model", "folder_path": out, "ignore_patterns": [".*"],
                "delete_patterns": [],
            },
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("has_weights", [True, False])
def test_weights_of_an_earlier_upload_are_replaced_and_nothing_else(tmp_path, monkeypatch, has_weights):
    """A whole model.safetensors would be opened before the shards of a new one, an adapter on top of it."""
    weights = [
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "pytorch_model.bin",
        "adapter_config.json",
    ]
    others = [
        "README.md",
        "config.json",
        "model.gguf",
        "models/other.safetensors",
        "model_onnx/a.safetensors",
    ]
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(asked, there=[*others, *weights]))
    (tmp_path / ("model-00001-of-00002.safetensors" if has_weights else "model.gguf")).write_text("")
    push(tmp_path, "someone/model")
    patterns = asked[-1][2]["delete_patterns"]
    assert patterns == (weights if has_weights else None)


def test_an_export_of_something_else_is_not_uploaded_in_its_place(job, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub([]))
    out = job.exports / "huggingface"
    with pytest.raises(MergeError, match="exists already"):
        export_run(job.path, to="vllm", out=out, push_to="someone/model")
    other = shutil.copytree(job.merged, tmp_path / "merged")
    parity = json.loads((other / "parity.json").read_text())
    parity["merge"]["adapter_sha256"] = "of another training"
    (other / "parity.json").write_text(json.dumps(parity))
    with pytest.raises(MergeError, match="exists already"):
        export_run(other, out=out, push_to="someone/model")
    with pytest.raises(MergeError, match="exists already"):
        export_run(job.path, out=out)


def test_a_lone_adapter_is_merged_beside_itself(job, tmp_path):
    shutil.copytree(job.adapter, tmp_path / "mine")
    (tmp_path / "mine-merged").mkdir()
    with pytest.raises(MergeError, match="/mine-merged: exists already"):
        merge_run(tmp_path / "mine", job.settings())


def test_a_merge_into_another_folder_is_not_the_runs(job, tmp_path, monkeypatch, capsys):
    """What is exported next, and whose numbers lie in the run."""
    out, before = tmp_path / "other", (job.path / "parity.json").read_bytes()
    monkeypatch.setattr("lora_rm.workflow.merge", lambda *_: SimpleNamespace(num_updated=1, num_tensors=1, base_weights="", dtype=""))  # fmt: skip
    monkeypatch.setattr("lora_rm.workflow.verify", lambda *_, **__: {"passed": True, "other": True})
    assert merge_run(job.path, job.settings(), out=out) == out
    assert f"Next: lora-rm export {out} --to huggingface" in " ".join(capsys.readouterr().out.split())
    assert (job.path / "parity.json").read_bytes() == before
    run = RunFolder(shutil.copytree(job.path, tmp_path / "run"))
    for own in (None, run.path / ".." / "run" / "merged"):
        assert merge_run(run.path, job.settings(), out=own) == run.path
        assert f"Next: lora-rm export {run.path} --to huggingface" in " ".join(
            capsys.readouterr().out.split()
        )
    assert run.read_json("parity.json") == {"passed": True, "other": True}


def test_a_merge_killed_in_its_verification_is_verified_and_not_written_again(job, tmp_path, scored_here):
    program = """
import os, signal, sys
from pathlib import Path
import lora_rm.verify as verify
from lora_rm.checkpoint import RunFolder
from lora_rm.workflow import merge_run

verify.score_folder = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
merge_run(Path(sys.argv[1]), RunFolder(Path(sys.argv[2])).settings())
"""
    shutil.copytree(job.adapter, tmp_path / "mine")
    words = [sys.executable, "-c", program, str(tmp_path / "mine"), str(job.path)]
    assert subprocess.run(words, check=False).returncode == -9
    merged, settings = tmp_path / "mine-merged", job.settings()
    before = {file.name: file.stat().st_ino for file in merged.iterdir()}
    assert "parity.json" not in before
    other = dataclasses.replace(settings, merge=dataclasses.replace(settings.merge, dtype="float32"))
    with pytest.raises(MergeError, match="exists already"):
        merge_run(tmp_path / "mine", other)
    merge_run(tmp_path / "mine", settings)
    after = {file.name: file.stat().st_ino for file in merged.iterdir()}
    assert after == before | {"parity.json": after["parity.json"]}
    for name in before:
        assert (merged / name).read_bytes() == (job.merged / name).read_bytes(), name
    with pytest.raises(MergeError, match="exists already"):
        merge_run(tmp_path / "mine", settings)


@pytest.mark.parametrize(
    ("mean", "largest", "fault"),
    [
        (0.005, 0.02, ""),
        (0.006, 0.01, "0.60% of their spread"),
        (0.004, 0.021, "2.10% at most"),
        (math.nan, math.inf, "inf"),
    ],
)
def test_both_the_mean_and_the_largest_change_are_limited(mean, largest, fault):
    none = measure_change([0.0, 1.0], [0.0, 1.0])
    changes = {"library": none, "one by one": dataclasses.replace(none, mean=mean, largest=largest)}
    record = {"base_weights": "dequantized", "dtype": "float16"}
    found = fault_of(none, changes, VerifySettings(), record, overflows=False)
    assert fault in found
    assert bool(found) == bool(fault)


@pytest.mark.parametrize(
    ("dtype", "overflows", "finer"),
    [
        ("bfloat16", False, "float16"),
        ("bfloat16_nearest", False, "float16"),
        ("bfloat16", True, "float32"),
        ("float16", False, "float32"),
        ("float32", True, None),
    ],
)
def test_a_merge_that_changed_rewards_names_settings_that_help(dtype, overflows, finer):
    none = measure_change([0.0, 1.0], [0.0, 1.0])
    record = {"base_weights": "dequantized", "dtype": dtype}

    def fault(settings, **change):
        return fault_of(
            none, {"library": dataclasses.replace(none, **change)}, settings, record, overflows=overflows
        )

    found = fault(VerifySettings(), mean=0.0118, largest=0.0508)
    again = f"Merge again with --merge.dtype {finer} --merge.overwrite True"
    assert (again in found) == (finer is not None)
    assert ("Merge again" in found) == (finer is not None)
    # the settings that it names let the same merge pass, and replace what lies there
    (flags,) = re.findall(r"allow more: (--verify.* --merge.overwrite True)\.$", found)
    settings = load_settings(None, flags.split())
    assert settings.merge.overwrite
    assert settings.verify == VerifySettings(max_change=0.06, max_mean_change=0.012)
    assert fault(settings.verify, mean=0.0118, largest=0.0508) == ""
    assert "--verify.max-change 0.02 --verify.max-mean-change 0.012 " in fault(VerifySettings(), mean=0.0118)
    assert "--verify" not in fault(VerifySettings(), mean=math.nan, largest=math.inf)


def test_verify_fails_when_rewards_changed_and_nothing_is_exported(job, tmp_path, scored_here):
    broken = tmp_path / "merged"
    shutil.copytree(job.merged, broken)
    strict = VerifySettings(max_change=1.0, max_mean_change=0.0, num_answers=5)
    with pytest.raises(MergeError, match="Merging changed rewards by"):
        verify(job.adapter, broken, strict, held_out=job.read_json("held_out.json"))
    parity = json.loads((broken / "parity.json").read_text())
    assert (parity["passed"], parity["num_answers"]) == (False, 32 + 5)
    with pytest.raises(MergeError, match="changed by more than was allowed"):
        export_huggingface(broken, tmp_path / "export")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] += 0.05
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match="not the merged weight"):
        verify(job.adapter, broken)


def test_verify_fails_when_the_adapter_is_not_the_trained_one(job, tmp_path, scored_here):
    adapter = tmp_path / "adapter"
    shutil.copytree(job.adapter, adapter)
    record = json.loads((adapter / "lora_rm.json").read_text())
    texts = [canary.pop("text") for canary in record["canaries"]]  # adapters had none at first
    for number, canary in enumerate(record["canaries"]):
        canary["reward"] += 0.3 * (number % 2)
    (adapter / "lora_rm.json").write_text(json.dumps(record))
    merged = tmp_path / "merged"  # a copy: verify leaves its verdict there
    shutil.copytree(job.merged, merged)
    with pytest.raises(MergeError, match="canaries moved"):
        verify(adapter, merged)
    parity = json.loads((merged / "parity.json").read_text())
    assert [answer["text"] for answer in parity["answers"]] == texts


def test_an_export_with_other_rewards_is_refused(job, tmp_path):
    merged = tmp_path / "merged"
    shutil.copytree(job.merged, merged)
    config = json.loads((merged / "config.json").read_text())
    del config["problem_type"]
    (merged / "config.json").write_text(json.dumps(config))
    parity = json.loads((merged / "parity.json").read_text())
    with pytest.raises(MergeError, match="pipeline's rewards differ"):
        export_huggingface(merged, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    changes = check_pipeline(job.merged, parity)["changes"]
    assert set(changes) == {"pipeline in float32", "pipeline in float32, padded", "pipeline in float16"}
    assert all(change["largest"] < 0.02 for change in changes.values())


def test_an_export_needs_a_verified_merge(job, tmp_path):
    with pytest.raises(MergeError, match="exists already"):
        export_run(job.path)
    (tmp_path / "merged").mkdir()
    with pytest.raises(MergeError, match="no parity.json"):
        export_huggingface(tmp_path / "merged", tmp_path / "out")
    with pytest.raises(MergeError, match="holds no merged model"):
        export_run(tmp_path)


@pytest.mark.slow
def test_the_benchmark_of_merging_prints_every_way(job, tmp_path, monkeypatch, capsys):
    words = ["merge_fidelity.py", str(job.path), "--quick", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "benchmarks/merge_fidelity.py"), run_name="__main__")
    rows = {row["what is written"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert len(rows) == 9
    assert rows["dequantised NF4 + update, float16 (default)"]["mean"] < 0.005
    assert rows["dequantised NF4 + update, float32"]["mean"] < 1e-4
    assert rows["PEFT merge_and_unload on the 4-bit model"]["mean"] > 0.02


@pytest.mark.slow
def test_a_merge_needs_little_memory(tmp_path, monkeypatch):
    """0.7 GB of random weights in 7B shapes; above the imports at most three times the largest adapted tensor."""
    command = [
        sys.executable,
        ROOT / "benchmarks/merge.py",
        "--quick",
        "--no-peft",
        "--json",
        tmp_path / "rows.json",
    ]
    subprocess.run(
        command, check=True, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    merges = [row for row in rows if row["what"] in ("merge, no round trip", "merge, NF4 round trip")]
    assert len(merges) == 2
    assert all(0 < row["peak MB"] < 3 * row["largest adapted MB"] < 300 for row in merges), rows


def test_measure_change_by_hand():
    change = measure_change([0.0, 1.0, 2.0, 3.0], [0.0, 2.5, 2.0, 3.0])
    spread = 1.25**0.5
    assert change == Change(
        mean=1.5 / 4 / spread,
        largest=1.5 / spread,
        kendall_tau=4 / 6,
        pair_flips=1,
        num_pairs=6,
        order_flips=1,
        num_orders=6,
    )
    own = measure_change([0.0, 1.0, 2.0, 3.0], [0.0, 2.5, 2.0, 3.0], ["a", "a", "b", "b"])
    assert (own.pair_flips, own.num_pairs, own.order_flips, own.num_orders) == (0, 2, 1, 6)
    assert measure_change([0.0, 1.0], [0.0, float("nan")]).largest == float("inf")
    assert measure_change([0.0, 1.0, 1.0], [0.0, 1.0, 1.0]).kendall_tau == 1.0
    assert measure_change([0.0, 1.0, 1.0], [0.0, 1.0, 2.0]).kendall_tau == pytest.approx(2 / 6**0.5)
    assert measure_change([1.0, 1.0], [1.0, 1.5]).largest == 0.5


def test_the_saved_settings_run_again_as_a_preset(job):
    assert dump_settings(load_settings(job.config)) == job.config.read_text()


def test_real_rows_of_every_kind_train(settings, tmp_path):
    """K = 8 lists, and human pairs with several turns, on real data."""
    if not SHARED.is_dir():
        pytest.skip("the real preference data is not beside this checkout")
    for name in ("alpaca_lists_test.jsonl.gz", "hh_harmless_test.jsonl.gz"):
        own = changed(
            settings,
            output_dir=str(tmp_path / name),
            data={
                "train": str(SHARED / name),
                "on_bad_row": "skip",
                "max_train": 6,
                "max_eval": 4,
                "max_length": 2000,
                "max_dropped_share": 1.0,
            },
            train={"max_steps": 1, "tokens_per_microbatch": 8192, "preferences_per_step": 4},
        )
        run = train_run(own)
        assert RunFolder.open(run.path).read_json("eval.json")["after"]["pairs"]["num_pairs"] > 0


def test_rewards_after_8_bit_training_are_those_of_the_merged_model(settings, scored_here):
    settings = changed(settings, model={"quantization": "int8"})
    run = train_run(settings)
    merge_run(run.path, settings)
    parity = json.loads((run.merged / "parity.json").read_text())
    assert parity["passed"]
    assert max(change["largest"] for change in parity["changes"].values()) < 0.01


def test_a_small_proof_at_training_does_not_limit_later_ones(settings):
    run = train_run(changed(settings, verify={"num_answers": 1}, train={"max_steps": 1}))
    assert len(read_held_out(run)) == 48


def test_canaries_are_rewards_in_float32_whatever_was_trained_in(settings):
    own = changed(settings, model={"compute_dtype": "bfloat16"}, train={"max_steps": 2})
    run = train_run(own)
    canaries = json.loads((run.adapter / RECORD).read_text())["canaries"]
    found = load_reward_model(run.adapter, compute_dtype="float32").score_ids([c["ids"] for c in canaries])
    assert found == pytest.approx([c["reward"] for c in canaries], rel=1e-5, abs=1e-5)


def test_an_export_in_another_type_is_not_the_one_that_is_wanted(base, held_out, tmp_path):
    merged = make_merged(tmp_path / "merged", base, held_out)
    made = {
        "passed": True, "target": "onnx", "dtype": "float32", "merge": public_record(parity_of(merged)["merge"]),
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "parity.json").write_text(json.dumps(made))
    assert _is_exported(merged, tmp_path / "out", "onnx", None)
    assert not _is_exported(merged, tmp_path / "out", "onnx", "int8")
