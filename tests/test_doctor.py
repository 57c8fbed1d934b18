"""Every check of the doctor passes a clean case and finds a fault that was planted."""

import dataclasses
import importlib.metadata
import inspect
import json
import math
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import assistant, make_model, make_tokenizer, renew_hash, shake, user
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from lora_rm import doctor
from lora_rm.checkpoint import RunFolder
from lora_rm.cli import main
from lora_rm.config import DataSettings, MergeSettings, ModelSettings, Settings
from lora_rm.data.formats import read_preferences
from lora_rm.data.preference import Preference
from lora_rm.data.split import BUILTIN
from lora_rm.data.tokens import PLAIN_TEMPLATE, ChatTokenizer
from lora_rm.doctor.finding import judge
from lora_rm.doctor.preferences import check_duplicates
from lora_rm.errors import ConfigError, DataError, Interrupted, ModelError
from lora_rm.merge import merge
from lora_rm.model.adapter import WEIGHTS
from lora_rm.model.base import find_config
from lora_rm.model.checkpointing import MODES
from lora_rm.model.memory import Held
from lora_rm.model.record import HEAD_KEY, RECORD
from lora_rm.model.reward_model import RewardModel
from lora_rm.plan import GIB, UNMEASURED, Peak, Plan
from lora_rm.score import load_reward_model
from lora_rm.verify import score_rows, verify
from lora_rm.workflow import export_run, train_run

CPU = torch.device("cpu")


def is_clean(finding):
    assert finding.status == "ok", finding
    assert finding.found
    assert finding.remedy == ""
    return True


def is_found(finding, *words, status="fault"):
    """Whether it was found, with the numbers or words expected, and with something to do."""
    assert finding.status == status, finding
    for word in words:
        assert word in finding.found + " " + finding.remedy, (word, finding)
    assert len(finding.remedy) > 10, finding
    return True


def test_every_check_has_a_clean_case_and_a_planted_fault():
    parts = [
        part for _, part in inspect.getmembers(doctor, inspect.ismodule) if doctor.__name__ in part.__name__
    ]
    checks = {
        name
        for part in parts
        for name, check in inspect.getmembers(part, inspect.isfunction)
        if name.startswith("check_") and check.__module__ == part.__name__
    }
    tests = set(vars(sys.modules[__name__]))
    for name in checks:
        assert {f"test_{name}_passes", f"test_{name}_finds"} <= tests, name
    assert len(checks) >= 25


# The machine.


def test_check_versions_passes():
    assert is_clean(doctor.machine.check_versions())
    assert any(text.startswith("torch>=") for text in doctor.machine.own_requirements())
    assert is_clean(doctor.machine.check_versions(["torch>=1.0", "absent-library>=1; extra == 'gguf'"]))


def test_check_versions_finds():
    found = doctor.machine.check_versions(["torch>=999", "absent-library>=1.5", "pyyaml>=6.0"])
    assert is_found(found, f"torch is {torch.__version__}", "absent-library is missing")
    assert found.remedy == 'pip install "torch>=999" "absent-library>=1.5"'
    assert found.value == 2


def test_check_gpu_passes():
    assert is_clean(doctor.machine.check_gpu(num_usable=0, has_driver=False))


def test_check_gpu_finds():
    assert is_found(doctor.machine.check_gpu(num_usable=0, has_driver=True), "finds no GPU", "CUDA build")


def test_check_bitsandbytes_passes():
    found = doctor.machine.check_bitsandbytes(CPU)
    assert is_clean(found)
    assert 0.08 < found.value < 0.11


def test_check_bitsandbytes_finds(monkeypatch):
    real = doctor.machine.bnb_functional.dequantize_4bit
    with monkeypatch.context() as patch:  # what a repacked weight gives: values in another order
        patch.setattr(doctor.machine.bnb_functional, "dequantize_4bit", lambda *a, **k: real(*a, **k).flip(0))
        assert is_found(
            doctor.machine.check_bitsandbytes(CPU), "changes a weight by 1", "python -m bitsandbytes"
        )

    def fails(*arguments, **more):
        raise RuntimeError("no kernel image is available\nsecond line")

    with monkeypatch.context() as patch:
        patch.setattr(doctor.machine.bnb.nn.Params4bit, "_quantize", fails)
        assert is_found(
            doctor.machine.check_bitsandbytes(CPU), "no kernel image is available", "quantization none"
        )
    with monkeypatch.context() as patch:  # gradients that do not reach what lies below
        patch.setattr("lora_rm.model.quantization._ExactProduct.backward", lambda ctx, gradient: (None, None))
        assert is_found(doctor.machine.check_bitsandbytes(CPU), "gradients by inf")


def test_check_bfloat16_passes():
    slow = {torch.float32: 1.0, torch.bfloat16: 3.0}
    assert is_clean(doctor.machine.check_bfloat16(CPU, "float32", slow))
    assert is_clean(doctor.machine.check_bfloat16(CPU, "bfloat16", {torch.float32: 1.0, torch.bfloat16: 0.4}))
    assert doctor.machine.check_bfloat16(CPU).value > 0


def test_check_bfloat16_finds():
    slow = {torch.float32: 1.0, torch.bfloat16: 3.0}
    found = doctor.machine.check_bfloat16(CPU, "bfloat16", slow)
    assert is_found(found, "3.0 times as slow", "--model.compute-dtype float32", status="warning")
    fast = {torch.float32: 1.0, torch.bfloat16: 0.25}
    found = doctor.machine.check_bfloat16(CPU, "float32", fast)
    assert is_found(found, "4.0 times as fast", "--model.compute-dtype bfloat16", status="warning")


def test_check_disk_passes(tmp_path):
    assert is_clean(doctor.machine.check_disk(tmp_path / "not" / "there", needed=1.0))
    assert list(tmp_path.iterdir()) == []


def test_check_disk_finds(tmp_path, monkeypatch):
    assert is_found(
        doctor.machine.check_disk(tmp_path, needed=1e18), "GiB free for", "Free 9", status="warning"
    )
    assert is_found(
        doctor.machine.check_disk(Path("/proc/lora_rm")), "/proc cannot be written to", "--output-dir"
    )
    monkeypatch.setattr(
        doctor.machine.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0.3 * GIB})
    )
    assert is_found(doctor.machine.check_disk(tmp_path), "0.3 GiB free", "Free 19.7 GiB")


def test_check_memory_passes():
    assert is_clean(doctor.machine.check_memory(16 * GIB))
    assert 0.05 * GIB < doctor.machine.free_memory(CPU) < 2**50


def test_check_memory_finds():
    assert is_found(doctor.machine.check_memory(1.5 * GIB), "1.5 GiB free", "Close other programs")
    assert is_found(doctor.machine.check_memory(4 * GIB), "4.0 GiB free", status="warning")


@pytest.fixture(scope="module")
def planned(base, tmp_path_factory):
    """What planning a tiny model gives, in round numbers: tracing it takes half a minute."""
    held = Held(
        quantized=2e5, frozen=6e5, trained=4e5, largest_linear=5e4, largest_frozen=3e4, num_weights=5e5, num_linear=4e5
    )  # fmt: skip
    return Plan(
        settings=doctor_settings(base, tmp_path_factory.mktemp("never")),
        machine=UNMEASURED["cpu"],
        memory=64 * GIB,
        held=held,
        peaks={mode: Peak(((1e5, 5e3),)) for mode in MODES},
        batching="shared",
        compute_bytes=4,
        held_bytes=4,
        num_layers=3,
    )


def test_check_fit_passes(planned):
    assert is_clean(doctor.machine.check_fit(planned.settings, planned, 64 * GIB))


def test_check_fit_finds(planned):
    small = dataclasses.replace(planned, memory=2**20)
    found = doctor.machine.check_fit(planned.settings, small, 64 * GIB)
    assert is_found(found, "0.0 GiB are there", "What would help: ")
    found = doctor.machine.check_fit(planned.settings, planned, 1.0)
    assert is_found(found, "0.0 free", "Close other programs", status="warning")


# Data.


def pair(prompt="p", better="the good answer", worse="a bad answer", **more):
    def said(role, text):
        return ({"role": role, "content": text},)

    return Preference(
        prompt=said("user", prompt), answers=(said("assistant", better), said("assistant", worse)), **more
    )


def rating(score, prompt="p", answer="a"):
    return Preference(
        prompt=({"role": "user", "content": prompt},),
        answers=(({"role": "assistant", "content": answer},),),
        kind="rating",
        scores=(score,),
    )


def write_rows(file, rows):
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(file)


def row(number, **more):
    """Of two answers that are equally long."""
    return {"prompt": f"question {number}", "chosen": f"yes {number}", "rejected": f"not {number}", **more}


def test_check_rows_passes(tmp_path):
    wanted = DataSettings(train=write_rows(tmp_path / "a.jsonl", [row(n) for n in range(20)]))
    train, held_out, bad = doctor.preferences.read_sides(wanted)
    assert (len(train), len(held_out), bad) == (18, 2, [])
    assert is_clean(doctor.preferences.check_rows(20, bad, wanted))


def test_check_rows_finds(tmp_path):
    rows = [*(row(n) for n in range(37)), "{broken\n", {"prompt": "a"}, row(40, chosen="")]
    wanted = DataSettings(train=write_rows(tmp_path / "a.jsonl", rows))
    train, held_out, bad = doctor.preferences.read_sides(wanted)
    assert len(train) + len(held_out) == 37
    found = doctor.preferences.check_rows(37, bad, wanted)
    assert is_found(found, "3 (7.5%) cannot", "broken JSON: 1", "line 38", "--data.on-bad-row skip")
    skipping = dataclasses.replace(wanted, on_bad_row="skip")
    assert is_found(
        doctor.preferences.check_rows(37, bad, skipping), "3 (7.5%)", "left out", status="warning"
    )
    strict = dataclasses.replace(skipping, max_dropped_share=0.05)
    assert is_found(doctor.preferences.check_rows(37, bad, strict), "3 (7.5%)")
    assert is_found(doctor.preferences.check_rows(0, bad, skipping), "0 rows can be used")


def test_check_duplicates_passes(preferences):
    assert is_clean(doctor.preferences.check_duplicates(preferences[0]))
    assert is_clean(
        doctor.preferences.check_duplicates([pair(), pair(worse="other"), pair(margin=1.0, prompt="q")])
    )


def test_check_duplicates_finds(preferences):
    alike = [pair(better="x", source="line 1"), pair(source="line 2"), pair(source="line 3")]
    assert is_found(doctor.preferences.check_duplicates(alike), "first: line 2")
    rows = [*preferences[0], preferences[0][7]]
    found = doctor.preferences.check_duplicates(rows)
    assert is_found(found, f"1 of {len(rows)} rows", "stands 2 times", status="warning")
    assert is_found(
        doctor.preferences.check_duplicates([pair()] * 3), "2 of 3 rows (66.7%)", "stands 3 times", "Remove"
    )


def test_check_conflicts_passes(preferences):
    assert is_clean(doctor.preferences.check_conflicts(preferences[0]))
    tie = pair(better="a bad answer", worse="the good answer", probability=0.5)
    assert is_clean(doctor.preferences.check_conflicts([pair(), tie, rating(1.0), rating(2.0, answer="b")]))


def test_check_conflicts_finds(preferences):
    turned = pair(better="a bad answer", worse="the good answer", source="line 2")
    found = doctor.preferences.check_conflicts([pair(source="line 1"), turned])
    assert is_found(found, "1 of 1 comparisons (100.0%)", "line 1 and line 2", "Decide which")
    many = [pair(prompt=str(n)) for n in range(500)]
    found = doctor.preferences.check_conflicts([*many, pair(), turned])
    assert is_found(found, "1 of 501 comparisons (0.2%)", status="warning")
    others = [pair(better="x", source="line 0"), pair(source="line 1"), pair(better="y", source="line 2")]
    found = doctor.preferences.check_conflicts([*others, dataclasses.replace(turned, source="line 3")])
    assert is_found(found, "for example: line 1 and line 3")
    good, bad, other = (({"role": "assistant", "content": text},) for text in ("good", "bad", "other"))
    ranking = Preference(prompt=pair().prompt, answers=(good, other, bad), kind="ranking", scores=(3, 2, 1))
    found = doctor.preferences.check_conflicts([ranking, pair(better="bad", worse="good")])
    assert is_found(found, "1 of 3 comparisons")
    assert is_found(doctor.preferences.check_conflicts([rating(1.0), rating(2.0)]), "1 of 1 comparisons")


def test_check_ties_passes(preferences):
    assert is_clean(doctor.preferences.check_ties(preferences[0]))
    assert is_clean(doctor.preferences.check_ties([rating(1.0), rating(2.0)]))


def test_check_ties_finds():
    tie = pair(probability=0.5)
    assert is_found(doctor.preferences.check_ties([tie, pair()]), "1 of 2 rows (50.0%)", status="warning")
    assert is_found(doctor.preferences.check_ties([tie] * 4), "4 of 4 rows", "labels were read rightly")
    same = [rating(5.0, prompt=str(n)) for n in range(3)]
    assert is_found(doctor.preferences.check_ties(same), "all 3 ratings are 5, so none is better")


def test_check_length_bias_passes(preferences):
    assert is_clean(doctor.preferences.check_length_bias(preferences[0]))
    assert is_clean(doctor.preferences.check_length_bias([pair()] * 2))  # two pairs prove nothing
    assert doctor.preferences.check_length_bias([rating(1.0)]).status == "unchecked"


def test_check_length_bias_finds():
    long, short = pair(better="x" * 9, worse="x"), pair(better="x", worse="x" * 9)
    found = doctor.preferences.check_length_bias([long] * 90 + [short] * 10)
    assert is_found(found, "'the longer answer wins' is right on 90.0% of 100 pairs")
    found = doctor.preferences.check_length_bias([short] * 90 + [long] * 10)
    assert is_found(found, "'the shorter answer wins' is right on 90.0%")
    assert found.value == pytest.approx(0.1)
    found = doctor.preferences.check_length_bias([long] * 70 + [short] * 30)
    assert is_found(found, "70.0%", status="warning")


def test_check_words_passes(preferences):
    assert is_clean(doctor.preferences.check_words(*preferences))
    few = [pair(prompt=str(n)) for n in range(10)]
    assert is_clean(doctor.preferences.check_words(few[2:], few[:2]))  # two pairs prove nothing
    assert doctor.preferences.check_words([rating(1.0)], [rating(2.0)]).status == "unchecked"


def test_check_words_finds(preferences):
    def begun(p):
        better, worse = p.answers
        (first, *rest) = better
        return dataclasses.replace(
            p, answers=(({**first, "content": "Sure! " + first["content"]}, *rest), worse)
        )

    train, held_out = ([begun(p) for p in side] for side in preferences)
    found = doctor.preferences.check_words(train, held_out)
    assert is_found(found, f"of {len(held_out)} held-out pairs", "share a greeting", status="warning")
    assert found.value > 0.9


def test_check_disjoint_passes(preferences):
    assert is_clean(doctor.preferences.check_disjoint(*preferences, DataSettings()))
    assert is_clean(
        doctor.preferences.check_disjoint(
            *doctor.preferences.read_sides(DataSettings(train=BUILTIN))[:2], DataSettings()
        )
    )


def test_check_disjoint_finds(preferences):
    train, held_out = preferences
    shouted = dataclasses.replace(
        held_out[0], prompt=tuple({**m, "content": f" {m['content'].upper()}\n"} for m in held_out[0].prompt)
    )
    found = doctor.preferences.check_disjoint([*train, shouted], held_out, DataSettings())
    assert is_found(found, "0 of 61 training rows", "1 one that differs", "Remove these rows")
    found = doctor.preferences.check_disjoint([*train, held_out[0]], held_out, DataSettings())
    assert is_found(found, "1 of 61 training rows", status="warning")
    found = doctor.preferences.check_disjoint(train, [*held_out, *train[:20]], DataSettings())
    assert is_found(found, "20 of 60 training rows")
    found = doctor.preferences.check_disjoint([pair(), pair(worse="other")], [], DataSettings())
    assert is_found(found, "too few prompts to hold any out: 1 in 2 rows", "--data.eval FILE")
    found = doctor.preferences.check_disjoint(train, [], DataSettings(eval="b.jsonl"))
    assert is_found(found, "no row of b.jsonl can be used")


def test_check_length_passes(preferences, chat):
    found = doctor.preferences.check_length(preferences[0], chat, DataSettings(max_length=512))
    assert is_clean(found)
    assert found.value == 0


def test_check_length_finds(preferences, chat):
    prefs = preferences[0]
    long = pair(prompt="word " * 600)
    found = doctor.preferences.check_length([*prefs, long], chat, DataSettings(max_length=512))
    assert is_found(found, "dropped: longer than 512 tokens: 1 of 61", status="warning")
    cut = DataSettings(max_length=512, length_policy="truncate_prompt")
    assert is_found(
        doctor.preferences.check_length([*prefs, long], chat, cut), "prompt cut", status="warning"
    )
    found = doctor.preferences.check_length(prefs, chat, DataSettings(max_length=16))
    assert is_found(found, "60 of 60", "--data.max-length", "truncate_prompt")
    refusing = ChatTokenizer(make_tokenizer())
    refusing.tokenizer.chat_template = (
        "{% if 'word' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
        + refusing.tokenizer.chat_template
    )
    skipping = DataSettings(max_length=512, on_bad_row="skip")
    found = doctor.preferences.check_length([*prefs, long], refusing, skipping)
    assert is_found(found, "dropped: refused by the chat template: 1 of 61", status="warning")
    same = pair(better="x", worse="x ")  # a template that strips makes them one
    stripping = ChatTokenizer(make_tokenizer())
    stripping.tokenizer.chat_template = stripping.tokenizer.chat_template.replace(
        "m['content']", "m['content'] | trim"
    )
    found = doctor.preferences.check_length([same, pair()], stripping, DataSettings())
    assert is_found(found, "answers identical as tokens: 1 of 2", "Remove rows")
    assert "max-length" not in found.remedy


# Template.

TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"


def templated(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


def test_check_template_passes(chat):
    assert is_clean(doctor.template.check_template(chat))
    assert is_clean(doctor.template.check_template(templated(PLAIN_TEMPLATE)))


def test_check_template_finds():
    deaf = TURNS.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'user' %}")
    assert is_found(
        doctor.template.check_template(templated(deaf)), "does not show the question", "--data.chat-template"
    )
    shouting = TURNS.replace(
        "m['content']", "(m['content'] | upper if m['role'] == 'assistant' else m['content'])"
    )
    assert is_found(doctor.template.check_template(templated(shouting)), "does not show the answer")


def test_check_bos_passes(chat):
    found = doctor.template.check_bos(chat)
    assert is_clean(found)
    assert found.value == 1
    assert "add_special_tokens=False" in found.found  # template and tokenizer both write one
    # families whose BOS begins every turn, as SmolLM2's <|im_start|>
    turns = templated(
        "{% for m in messages %}{{ bos_token }}{{ m['role'] }} {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    assert is_clean(doctor.template.check_bos(turns))
    system = templated("{{ bos_token }}system You help.{{ eos_token }}" + turns.tokenizer.chat_template)
    assert is_clean(doctor.template.check_bos(system))


def test_check_bos_finds(monkeypatch):
    found = doctor.template.check_bos(templated("{{ bos_token }} {{ bos_token }}" + TURNS))
    assert is_found(found, "2 at the start", "followed by no space")
    chat = templated("{{ bos_token }}" + TURNS)
    monkeypatch.setattr(chat, "text_ids", lambda texts: [chat.tokenizer(text).input_ids for text in texts])
    assert is_found(doctor.template.check_bos(chat), "2 at the start")
    chat = templated(TURNS)
    chat.tokenizer.chat_template = TURNS  # without the BOS that was put before it
    monkeypatch.setattr(
        chat, "text_ids", lambda texts: chat.tokenizer(list(texts), add_special_tokens=False).input_ids
    )
    assert is_found(doctor.template.check_bos(chat), "0 at the start of a conversation (right: one)")


def test_check_generation_prompt_passes(chat):
    for sound in (chat, templated(TURNS), templated(PLAIN_TEMPLATE)):
        assert is_clean(doctor.template.check_generation_prompt(sound))


def test_check_generation_prompt_finds():
    found = doctor.template.check_generation_prompt(templated(TURNS + "<|assistant|>"))
    assert is_found(
        found, "'</s><|assistant|>', the start of another answer", "{% if add_generation_prompt %}"
    )
    silent = (
        TURNS
        + "{% if add_generation_prompt or messages[-1]['role'] == 'assistant' %}<|assistant|>{% endif %}"
    )
    assert is_found(doctor.template.check_generation_prompt(templated(silent)), "the start of another answer")


def test_check_end_passes(chat):
    for sound in (chat, templated(TURNS), templated(PLAIN_TEMPLATE), templated(TURNS + "\n")):
        assert is_clean(doctor.template.check_end(sound))


def test_check_end_finds():
    bare = templated(TURNS.replace("{{ eos_token }}", ""))
    assert is_found(
        doctor.template.check_end(bare), "nothing follows the answer, with no end mark", "{{ eos_token }}"
    )
    words = templated(TURNS.replace("{{ eos_token }}", " (end)"))
    assert is_found(doctor.template.check_end(words), "' (end)', with no end mark", status="warning")


def test_check_prefix_passes(chat, preferences):
    assert is_clean(doctor.template.check_prefix(chat, preferences[0]))
    bare = Preference(prompt=(), answers=pair().answers)
    assert doctor.template.check_prefix(chat, [bare]).status == "unchecked"


def test_check_prefix_finds(preferences):
    counting = templated("{{ messages | length }} turns: " + TURNS)
    found = doctor.template.check_prefix(counting, preferences[0])
    assert is_found(found, "60 of 60 prompts are written differently", "cannot be shared", status="warning")


# The model.


@pytest.fixture(scope="module")
def fresh(base):
    return make_model(base)


@pytest.fixture(scope="module")
def few(trees):
    return sorted(trees, key=lambda tree: len(tree.prompt_ids))[: doctor.finding.NUM_PAIRS]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A short run that reached its end, with its adapter merged."""
    settings = doctor_settings(base, tmp_path_factory.mktemp("doctor") / "run")
    run = train_run(settings)
    merge(run.adapter, run.merged, MergeSettings())
    return run


def doctor_settings(base, folder):
    from lora_rm.config import check_settings

    return check_settings(
        {
            "output_dir": str(folder),
            "model": {"base": str(base), "compute_dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 12},
            "data": {"train": "builtin:checkable", "max_train": 32, "max_eval": 24},
            "train": {"preferences_per_step": 8, "tokens_per_microbatch": 1024, "learning_rate": 3e-3, "checkpointing": "none"},
        }
    )  # fmt: skip


def test_check_head_passes(fresh, run):
    assert is_clean(doctor.rewards.check_head(fresh.head))
    assert is_clean(doctor.rewards.check_head(doctor.rewards.stored_head(run.adapter)))
    assert is_clean(doctor.rewards.check_head(doctor.rewards.stored_head(run.merged)))


def test_check_head_finds(base, run, tmp_path):
    import bitsandbytes.functional as functional

    assert is_found(doctor.rewards.check_head(doctor.rewards.stored_head(base)), "there is no score head")
    head = torch.randn(1, 64)
    codes, _ = functional.quantize_4bit(head, quant_type="nf4")
    assert is_found(doctor.rewards.check_head(codes), "uint8", "it was quantised")
    assert is_found(doctor.rewards.check_head(torch.randn(2, 64)), "2 logits", "num_labels=1")
    broken = head.clone()
    broken[0, 5:8] = math.nan
    assert is_found(doctor.rewards.check_head(broken), "3 of its 64 values are NaN", "learning-rate")
    assert is_found(doctor.rewards.check_head(torch.zeros(1, 64)), "every reward is 0")
    assert is_found(doctor.rewards.check_head(head.bfloat16()), "bfloat16", "float32", status="warning")
    tensors = load_file(run.adapter / WEIGHTS)
    for name, planted in (("two", torch.randn(2, 64)), ("none", None)):
        folder = tmp_path / name
        folder.mkdir()
        kept = {key: value for key, value in tensors.items() if key != HEAD_KEY}
        save_file(kept if planted is None else {**kept, HEAD_KEY: planted}, folder / WEIGHTS)
        assert doctor.rewards.check_head(doctor.rewards.stored_head(folder)).status == "fault"


def conversations(trees):
    return [ids for tree in trees[:6] for ids in tree.conversations()]


def test_check_padding_passes(fresh, run, few):
    ways = doctor.rewards.padded_rewards(fresh, conversations(few))
    assert set(ways) == {"library", "padded right", "padded left", "one by one"}
    assert is_clean(doctor.rewards.check_padding(ways))
    assert fresh.batching == "shared"
    assert is_clean(doctor.rewards.check_padding(score_rows(run.merged, conversations(few), "merged")))


def test_check_padding_finds(base, run, few, tmp_path):
    model = make_model(base)
    model.classifier.config.pad_token_id = model.chat.end_id  # pad = EOS, the trap of many tokenizers
    found = doctor.rewards.check_padding(doctor.rewards.padded_rewards(model, conversations(few)))
    assert is_found(found, "padded right", "pad_token_id in config.json")
    assert found.value > 0.1
    for file in run.merged.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((run.merged / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": model.chat.end_id}))
    assert is_found(doctor.rewards.check_padding(score_rows(tmp_path, conversations(few), "merged")))
    assert is_found(
        doctor.rewards.check_padding({"library": [1.0, 2.0], "padded left": [1.0, math.nan]}), "inf"
    )


def test_check_swap_passes(fresh, few):
    found = doctor.rewards.check_swap(fresh, few)
    assert is_clean(found)
    assert found.value == pytest.approx(1.0)
    ranking = dataclasses.replace(few[0], kind="ranking", scores=(2.0, 1.0))
    assert is_clean(doctor.rewards.check_swap(fresh, [ranking, *few[1:]]))


def test_check_swap_finds(base, few):
    model = make_model(base)
    real = model.rewards
    model.rewards = lambda batch: (
        real(batch) + torch.arange(len(batch.score_index)) % 2
    )  # a place that counts
    assert is_found(doctor.rewards.check_swap(model, few), "together", "--train.batching padded")


def test_check_swap_finds_answers_that_see_each_other(base, few):
    model = shake(make_model(base))
    model.backbone.set_attn_implementation("sdpa")  # a packed row taken for one text
    assert is_found(doctor.rewards.check_swap(model, few))


def test_check_remembered_passes(run):
    model = load_reward_model(run.adapter).model
    expected, found = doctor.rewards.remembered_rewards(run.adapter, model)
    assert len(found) == 32
    assert is_clean(doctor.rewards.check_remembered(expected, found))
    assert (
        doctor.rewards.check_remembered(
            *doctor.rewards.remembered_rewards(run.merged, make_merged(run))
        ).status
        == "unchecked"
    )


def make_merged(run):
    return load_reward_model(run.merged).model


def test_check_remembered_finds(run):
    model = shake(RewardModel.load_adapter(run.adapter).requires_grad_(False))
    expected, found = doctor.rewards.remembered_rewards(run.adapter, model)
    assert is_clean(
        doctor.rewards.check_remembered(expected, found)
    )  # nothing is trained, so nothing was shaken
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1.5
    expected, found = doctor.rewards.remembered_rewards(run.adapter, model)
    assert is_found(doctor.rewards.check_remembered(expected, found), "of their spread", "base's revision")
    assert is_found(doctor.rewards.check_remembered([1.0, 2.0], [math.nan, 2.0]))


# A small training.


def test_check_head_moves_passes(trained):
    assert is_clean(doctor.training.check_head_moves(*trained))


@pytest.fixture(scope="module")
def trained(base, few, tmp_path_factory):
    """Trained values before and after five steps."""
    model = make_model(base)
    before = doctor.training.trained_values(model)
    doctor.training.take_steps(
        model, few, doctor_settings(base, tmp_path_factory.mktemp("never")), 5, rate=1e-5
    )
    return before, doctor.training.trained_values(model)


def test_check_head_moves_finds(base, few, settings, trained):
    model = make_model(base)
    model.head.requires_grad_(False)
    before = doctor.training.trained_values(model)
    doctor.training.take_steps(model, few, settings, 2)
    found = doctor.training.check_head_moves(before, doctor.training.trained_values(model))
    assert is_found(found, "not trained at all", "SEQ_CLS")
    assert is_found(doctor.training.check_head_moves(trained[0], trained[0]), "0.000% of its norm")


def test_check_values_move_passes(trained):
    found = doctor.training.check_values_move(*trained, 1e-5)
    assert is_clean(found)
    assert found.value < 0.01


def test_check_values_move_finds(base, few, settings, trained):
    model = make_model(base)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # what some trainers do to every trained value of a 4-bit model
            parameter.data = parameter.data.bfloat16()
    before = doctor.training.trained_values(model)
    doctor.training.take_steps(model, few, settings, 5, rate=1e-5)
    found = doctor.training.check_values_move(before, doctor.training.trained_values(model), 1e-5)
    assert is_found(found, "bfloat16", "learning rate of 1e-05", "float32")
    assert is_found(
        doctor.training.check_values_move({"other": torch.ones(2)}, trained[1], 1e-5), "are not those"
    )


def test_check_overfit_passes(base, few, settings):
    found = doctor.training.check_overfit(make_model(base), few, settings)
    assert is_clean(found)
    assert found.value == 1.0


def test_check_overfit_finds(base, few, settings):
    both = [tree for one in few[:4] for tree in (one, doctor.rewards.swapped(one))]
    found = doctor.training.check_overfit(make_model(base), both, settings, num_rounds=1)
    assert is_found(found, "50.0% of 8 pairs", "contradictions")


# A run.


def lines(losses, skipped=0):
    return [{"step": n, "loss": loss, "num_skipped": skipped} for n, loss in enumerate(losses, 1)]


def test_check_course_passes():
    falling = lines([0.7 - 0.02 * n for n in range(20)])
    assert is_clean(doctor.run.check_course([*falling, {"step": 20, "eval": {}}]))
    assert is_clean(doctor.run.check_course(lines([0.6, 0.7])))  # two steps prove nothing
    assert doctor.run.check_course([]).status == "unchecked"


def test_check_course_finds():
    assert is_found(
        doctor.run.check_course(lines([0.69] * 30)), "0.690 in the first tenth and 0.690", "learning-rate"
    )
    assert is_found(doctor.run.check_course(lines([0.5] * 18 + [None, None])), "inf in the last")
    falling = lines([0.7 - 0.02 * n for n in range(20)], skipped=3)
    assert is_found(doctor.run.check_course(falling), "3 steps skipped", status="warning")


def evaluation(accuracy, low, high, longer=0.5, words=None):
    after = {
        "pairs": {"accuracy": accuracy, "num_pairs": 240},
        "interval": [low, high],
        "length_baseline": longer,
    }
    return {"after": after, "bag_of_words_baseline": words}


def test_check_evaluation_passes():
    assert is_clean(doctor.run.check_evaluation(evaluation(0.85, 0.8, 0.89)))
    unfinished = doctor.run.check_evaluation({"before": {}})
    assert (unfinished.status, "lora-rm train RUN/config.yaml --resume" in unfinished.remedy) == (
        "unchecked",
        True,
    )
    assert doctor.run.check_evaluation(None).status == "unchecked"
    assert doctor.run.check_evaluation(evaluation(None, 0.0, 1.0)).status == "unchecked"


def test_check_evaluation_finds():
    assert is_found(
        doctor.run.check_evaluation(evaluation(0.52, 0.46, 0.58)), "46.0% to 58.0%", "proves nothing"
    )
    for shortcut in ({"longer": 0.7}, {"longer": 0.3}, {"words": 0.7}):
        found = doctor.run.check_evaluation(evaluation(0.72, 0.66, 0.77, **shortcut))
        assert is_found(found, "reach 70.0%", status="warning")


def parity(passed=True, flips=0, largest=0.003):
    return {
        "passed": passed,
        "is_trained_model": True,
        "num_answers": 96,
        "changes": {"library": {"largest": largest, "pair_flips": flips}},
    }


def test_check_merge_passes():
    assert is_clean(doctor.run.check_merge(parity()))
    assert doctor.run.check_merge(None).status == "unchecked"


def test_check_merge_finds():
    found = doctor.run.check_merge(parity(passed=False, largest=0.62))
    assert is_found(found, "62.00%", "`lora-rm merge RUN --merge.overwrite True`; if that fails its message")
    found = doctor.run.check_merge(parity(flips=2))
    assert is_found(found, "flipped 2 pairs", "--merge.dtype float32", status="warning")
    found = doctor.run.check_merge(parity(flips=7) | {"is_trained_model": False})
    assert is_found(
        found, "flipped 7 pairs", "not trained on: `lora-rm merge RUN --merge.base auto", status="warning"
    )


def test_a_merge_that_failed_after_one_that_passed_is_told(run, tmp_path):
    """A merge that fails leaves the run's own parity.json as the one before it wrote it."""
    copy = tmp_path / "run"
    (copy / "merged").mkdir(parents=True)
    (copy / "config.yaml").write_text(run.config.read_text())
    (copy / "parity.json").write_text(json.dumps(parity()))
    assert examined(copy, RunFolder(copy).settings())["merge"].status == "unchecked"
    (copy / "merged" / "parity.json").write_text(json.dumps(parity(passed=False, largest=0.62)))
    assert is_found(examined(copy, RunFolder(copy).settings())["merge"], "62.00%")


# What is examined, and the command.


def test_the_doctor_sees_what_a_path_is(base, run, tmp_path):
    assert doctor.kind_of(None) == "machine"
    assert doctor.kind_of(str(base)) == "base"
    assert doctor.kind_of(str(run.path)) == "run"
    assert doctor.kind_of(str(run.adapter)) == "adapter"
    assert doctor.kind_of(str(run.merged)) == "merged"
    for name in ("pairs.jsonl", "pairs.JSON.gz", "a/b.parquet", "builtin:checkable"):
        assert doctor.kind_of(name) == "data"
    for name in ("Qwen/Qwen3-8B", "builtin:smollm2-135m", "model.gguf"):
        assert doctor.kind_of(name) == "base"
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.csv").write_text("a\n")
    for name in (f"{tmp_path}/files", f"{tmp_path}/files/a*", "Anthropic/hh-rlhf:harmless-base"):
        assert doctor.kind_of(name) == "data"
    (tmp_path / "state.json").write_text("{}")
    assert doctor.kind_of(str(tmp_path)) == "data"
    for name in (str(tmp_path.parent), "absent", "./absent/folder"):
        with pytest.raises(ConfigError, match="is no run, adapter, merged model, base model or data file"):
            doctor.kind_of(name)


def examined(path, settings):
    return {
        finding.check: finding for finding in doctor.examine(None if path is None else str(path), settings)
    }


def test_a_sound_run_is_free_of_faults(run):
    findings = examined(run.path, run.settings())
    faults = [f for f in findings.values() if f.status == "fault" and f.check != "evaluation"]
    assert faults == []  # a run of four steps on a random model proves nothing on held-out pairs
    assert {
        "rows",
        "score head",
        "BOS",
        "padding",
        "rewards as saved",
        "values move",
        "16 pairs learnt",
    } <= set(findings)
    assert findings["values move"].value < 0.01
    assert findings["head moves"].value > 0


def test_a_run_whose_adapter_never_moved_is_found(run, base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        doctor.training,
        "check_overfit",
        lambda *arguments: doctor.finding.unchecked("16 pairs learnt", "slow"),
    )
    copy = tmp_path / "run"
    (copy / "adapter").mkdir(parents=True)
    for file in run.adapter.iterdir():
        (copy / "adapter" / file.name).write_bytes(file.read_bytes())
    start = {
        name: value.contiguous() for name, value in doctor.training.trained_values(make_model(base)).items()
    }
    assert start.keys() == load_file(run.adapter / WEIGHTS).keys()
    save_file(start, copy / "adapter" / WEIGHTS)
    renew_hash(copy / "adapter")
    (copy / "config.yaml").write_text(run.config.read_text())
    findings = examined(copy, RunFolder(copy).settings())
    assert is_found(findings["head moves"], "0.000%")
    assert is_found(findings["values move"], "100.0% of")
    assert is_found(findings["rewards as saved"], "32 rewards")


def test_an_unfinished_run_and_a_broken_head_are_told(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.yaml").write_text(run.config.read_text())
    findings = examined(copy, RunFolder(copy).settings())
    assert is_found(findings["adapter"], "did not reach its end", "--resume")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in run.adapter.iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    tensors = load_file(adapter / WEIGHTS)
    del tensors[HEAD_KEY]
    save_file(tensors, adapter / WEIGHTS)
    findings = examined(adapter, Settings())
    assert is_found(findings["score head"], "there is no score head")
    assert findings["padding"].status == "unchecked"
    (adapter / WEIGHTS).write_bytes(b"not safetensors")
    assert is_found(examined(adapter, Settings())["score head"], "is damaged")
    (adapter / WEIGHTS).write_bytes((run.adapter / WEIGHTS).read_bytes())
    (adapter / RECORD).unlink()
    assert is_found(
        examined(adapter, Settings())["opens"], "is no run, adapter, merged model or export of lora_rm"
    )


def test_a_sound_base_and_a_merged_model_are_free_of_faults(base, run, planned, monkeypatch):
    monkeypatch.setattr(doctor.machine, "plan", lambda settings: planned)
    monkeypatch.setattr(doctor.machine, "free_memory", lambda device: 64 * GIB)
    settings = dataclasses.replace(run.settings(), data=DataSettings())
    findings = examined(base, settings)
    assert [f for f in findings.values() if f.status != "ok"] == []
    assert {
        "template",
        "memory for the model",
        "score head",
        "padding",
        "swapped labels",
        "head moves",
    } <= set(findings)
    assert findings["16 pairs learnt"].value == 1.0
    findings = examined(run.merged, settings)
    assert [f.check for f in findings.values() if f.status != "ok"] == [
        "rewards as saved"
    ]  # made without a proof
    assert "padded left" in findings["padding"].found


def test_every_export_is_checked_or_named(run, tmp_path, scored_here):
    verify(run.adapter, shutil.copytree(run.merged, tmp_path / "merged"))
    for to in ("huggingface", "vllm"):
        out = export_run(tmp_path / "merged", to=to, out=tmp_path / to)
        findings = examined(out, dataclasses.replace(run.settings(), data=DataSettings()))
        assert [f for f in findings.values() if f.status != "ok"] == []
        assert "16 rewards" in findings["rewards as saved"].found
    for to in ("onnx", "torch-export", "vllm-lora", "gguf"):
        folder = tmp_path / to
        folder.mkdir()
        (folder / "parity.json").write_text(json.dumps({"passed": True, "target": to, "answers": []}))
        with pytest.raises(
            ConfigError, match=f"is an export to {to}, which the doctor does not open; its README"
        ):
            doctor.kind_of(str(folder))
        with pytest.raises(ModelError, match=f"is an export to {to}, which other programs open"):
            load_reward_model(folder)


def test_a_model_that_does_not_fit_is_not_trained(base, planned, monkeypatch):
    monkeypatch.setattr(doctor.machine, "plan", lambda settings: dataclasses.replace(planned, memory=2**20))
    findings = examined(base, Settings(model=ModelSettings(compute_dtype="float32")))
    assert is_found(findings["memory for the model"], "0.0 GiB are there")
    assert findings["16 pairs learnt"].status == "unchecked"


def test_what_was_found_before_an_error_is_shown(monkeypatch, capsys):
    def examine(*_):
        yield judge("first", "is fine", "", fault=False)
        raise ModelError("the tokenizer is damaged")

    monkeypatch.setattr(doctor, "examine", examine)
    first, last = doctor.doctor(None, Settings())
    assert (first.status, last.status, last.found) == ("ok", "fault", "the tokenizer is damaged")
    assert "is fine" in capsys.readouterr().out


def test_ctrl_c_is_no_finding(monkeypatch):
    def examine(*_):
        yield judge("first", "is fine", "", fault=False)
        raise Interrupted("stopped at step 3")

    monkeypatch.setattr(doctor, "examine", examine)
    with pytest.raises(KeyboardInterrupt):
        doctor.doctor(None, Settings())


def test_the_needed_libraries_are_known_in_a_checkout_that_is_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert any(text.startswith("torch>=") for text in doctor.machine.own_requirements())


def test_a_run_of_ratings_is_checked_with_built_in_pairs(run, tmp_path):
    file = tmp_path / "ratings.jsonl"
    rows = [{"prompt": f"Question {n}?", "response": f"Answer {n}.", "rating": n / 40} for n in range(40)]
    file.write_text("".join(json.dumps(values) + "\n" for values in rows))
    own, _ = read_preferences(str(file))
    findings = {f.check: f for f in doctor.examine_saved(run.adapter, run.settings(), own)}
    assert findings["padding"].status == "ok"
    assert findings["swapped labels"].status == "ok"


def test_the_tokenizer_of_a_hub_model_is_fetched_where_rows_are_counted(base, tmp_path, monkeypatch):
    """The hub stands for itself here: it gives the files asked for, out of a local folder."""

    def fetch(name, *, revision, allow_patterns, ignore_patterns):
        names = filter_repo_objects(
            [f.name for f in base.iterdir()], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in names:
            shutil.copy(base / file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_config("org/model").path == tmp_path
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    file = tmp_path.parent / f"{tmp_path.name}.jsonl"
    settings = Settings(model=ModelSettings(base="org/model"))
    findings = examined(write_rows(file, [row(n) for n in range(20)]), settings)
    assert findings["length limit"].status == "ok"
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_check_that_breaks_is_a_finding():
    def breaks(message):
        raise KeyError(message)

    found = doctor.finding.attempt("name", breaks, "gone")
    assert is_found(found, "KeyError: 'gone'")

    def refuses():
        raise DataError("a.jsonl line 3: is bad.")

    assert is_found(doctor.finding.attempt("name", refuses), "a.jsonl line 3: is bad.")


def test_the_command_shows_writes_and_ends_with_1_on_a_fault(tmp_path, capsys, monkeypatch, base):
    monkeypatch.setattr(doctor.console, "width", 200)
    file, out = tmp_path / "a.jsonl", tmp_path / "out.json"
    words = ["doctor", write_rows(file, [row(n) for n in range(20)]), "--json", str(out)]
    assert main(words) == 0
    page = capsys.readouterr().out
    assert "0 faults, 2 not made" in page
    assert "Add --model.base MODEL." in page
    write_rows(file, [*(row(n) for n in range(20)), row(1), "{broken\n"])
    with pytest.raises(SystemExit) as end:
        main([*words, "--model.base", str(base)])
    assert end.value.code == 1
    page = capsys.readouterr().out
    assert "[" not in page.replace(str(file), "")  # no markup, no backslash before a bracket
    assert "broken JSON: 1" in page
    assert "1 warning, 1 fault." in page
    written = json.loads(out.read_text())
    assert (written["kind"], written["subject"]) == ("data", str(file))
    by_name = {finding["check"]: finding for finding in written["findings"]}
    assert (by_name["rows"]["status"], by_name["copies"]["status"]) == ("fault", "warning")
    assert by_name["length limit"]["status"] == "ok"
    assert set(by_name["rows"]) == {"check", "status", "found", "remedy", "value"}


def test_the_command_without_path_checks_the_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("not: ours")
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--model.device", "cuda:99"])
    assert end.value.code == 1
    page = capsys.readouterr().out
    assert "this machine" in page
    assert "cuda:99" in page
    # a sound machine, whatever this one is
    monkeypatch.setattr(doctor, "check_gpu", lambda: doctor.machine.check_gpu(num_usable=0, has_driver=False))
    monkeypatch.setattr(doctor, "free_memory", lambda device: 64 * GIB)
    monkeypatch.setattr(
        doctor.machine.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 64 * GIB})
    )
    assert main(["doctor", "--output-dir", str(tmp_path / "runs")]) == 0


def test_ratings_that_contradict_each_other_are_no_copies():
    rows = [
        Preference(prompt=(user("q"),), answers=((assistant("a"),),), kind="rating", scores=(score,))
        for score in (1.0, 2.0)
    ]
    assert check_duplicates(rows).value == 0
