"""What transformers, PEFT and bitsandbytes do with a reward model when left to themselves, beside this library.

What they give is printed and not asserted, but where our own files must give our rewards in them.
"""

import ast
import json
import shutil
from random import Random

import bitsandbytes as bnb
import pytest
import torch
from conftest import make_base, make_model, saved, shake
from peft import AutoPeftModelForSequenceClassification, PeftModel
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    pipeline,
)

from lora_rm import load_reward_model
from lora_rm.config import MergeSettings
from lora_rm.data.batches import pad_rows
from lora_rm.data.tokens import TokenTree
from lora_rm.export.huggingface import model_card
from lora_rm.merge import merge
from lora_rm.model.elementwise import give_back_rotary
from lora_rm.model.reward_model import RewardModel
from lora_rm.score import Scorer
from lora_rm.verify import measure_change

EOS = 2
"""Of the tiny tokenizers, which is their padding token too."""


def random_rows(count, seed=3):
    """Conversations of random tokens, each with a BOS and an EOS of its own."""
    draw = Random(seed)
    return [[1, *(draw.randrange(6, 300) for _ in range(draw.randrange(4, 40))), EOS] for _ in range(count)]


ROWS = random_rows(40)


def exact_rewards(model, rows=ROWS):
    model.eval()
    with model.precise():
        return Scorer(model).score_ids(rows)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """An adapter after NF4 training, and its rewards of ROWS."""
    folder = tmp_path_factory.mktemp("trained")
    model = shake(make_model(base))
    return saved(model, folder / "adapter", ROWS), exact_rewards(model)


@pytest.fixture(scope="module")
def merged(trained):
    """The same adapter merged, and the rewards of the merged weights through this library."""
    folder = trained[0].with_name("merged")
    merge(trained[0], folder)
    model = RewardModel.load_merged(folder, compute_dtype="float32")
    model.choose_batching()
    return folder, exact_rewards(model)


@torch.inference_mode()
def plain_rewards(model, rows, pad, *, left=False, alone=False):
    """Rewards through a transformers or PEFT classifier, in one padded batch or one by one."""
    give_back_rotary()
    if alone:
        return [plain_rewards(model, [ids], pad)[0] for ids in rows]
    ids, mask = (torch.tensor(part) for part in pad_rows(rows, pad, left=left))
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits
    assert logits.shape == (len(rows), 1)
    return logits[:, 0].float().tolist()


def largest(expected, found):
    return max(abs(a - b) for a, b in zip(expected, found, strict=True))


def plain_classifier(folder, **more):
    return AutoModelForSequenceClassification.from_pretrained(folder, **{"dtype": torch.float32, **more})


def described(head):
    return f"{type(head).__name__} {str(head.weight.dtype).removeprefix('torch.')} {list(head.weight.shape)}"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_m7_the_head_is_never_quantised(tmp_path, family, show):
    base = make_base(tmp_path / "base", family)
    for quantization in ("nf4", "int8"):
        model = make_model(base, quantization=quantization)
        heads = [model.classifier.score.original_module, model.classifier.score.modules_to_save["default"]]
        for head in heads:
            assert type(head) is nn.Linear
            assert head.weight.dtype == torch.float32
            assert head.weight.shape == (1, 64)
        assert model.head is heads[1].weight
    model = make_model(base)
    adapter = saved(shake(model), tmp_path / "adapter", ROWS)
    reopened = RewardModel.load_adapter(adapter, compute_dtype="float32")
    assert reopened.head.dtype == torch.float32
    assert torch.equal(reopened.head, model.head)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"]
    )
    theirs = plain_classifier(base, num_labels=1, quantization_config=config, dtype=torch.bfloat16).score
    show(
        f"M7 head of a {family} in NF4: lora_rm {described(reopened.classifier.score.modules_to_save['default'])}, "
        f"transformers with a skip list of the user's {described(theirs)}"
    )


def test_m8_padding_cannot_move_the_pooled_token(merged, show):
    folder, expected = merged
    model = plain_classifier(folder)
    pad = model.config.pad_token_id
    assert pad not in (None, EOS)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == pad
    spread = torch.tensor(expected).std().item()
    ways = {
        "right-padded": plain_rewards(model, ROWS, pad),
        "left-padded": plain_rewards(model, ROWS, pad, left=True),
        "unpadded": plain_rewards(model, ROWS, pad, alone=True),
    }
    model.config.pad_token_id = EOS
    broken = plain_rewards(model, ROWS, EOS)
    before_the_end = plain_rewards(model, [ids[:-1] for ids in ROWS], EOS)
    moved = sum(abs(a - b) < 1e-4 for a, b in zip(broken, before_the_end, strict=True))
    differences = ", ".join(f"{way} {largest(expected, found) / spread:.4%}" for way, found in ways.items())
    show(
        f"M8 largest change of reward in plain transformers, as a share of the spread: lora_rm's folder {differences}; "
        f"with pad = EOS {largest(expected, broken) / spread:.0%} ({moved} of {len(ROWS)} read before the EOS)"
    )
    for way, found in ways.items():
        assert largest(expected, found) < 1e-4, way


def test_m9_the_pipeline_gives_the_reward_itself(merged, tmp_path, show):
    folder, expected = merged
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["<|user|>2 + 2?</s><|assistant|>4</s>", "<|user|>2 + 2?</s><|assistant|>no idea at all</s>"]
    model = RewardModel.load_merged(folder, compute_dtype="float32")
    expected = Scorer(model).score_ids([tokenizer(text).input_ids for text in texts])
    bare = shutil.copytree(folder, tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    assert config.pop("problem_type") == "regression"
    (bare / "config.json").write_text(json.dumps(config))
    give_back_rotary()
    ours, theirs = (
        [found["score"] for found in pipeline("text-classification", str(path), dtype=torch.float32)(texts)]
        for path in (folder, bare)
    )
    sigmoid = torch.sigmoid(torch.tensor(expected)).tolist()
    show(
        f"M9 pipeline on rewards {expected[0]:.4f}, {expected[1]:.4f}: lora_rm's folder {ours[0]:.4f}, {ours[1]:.4f}; "
        f"without problem_type {theirs[0]:.4f}, {theirs[1]:.4f} (sigmoid {sigmoid[0]:.4f}, {sigmoid[1]:.4f})"
    )
    assert largest(expected, ours) < 1e-4


def test_m9_the_code_of_the_model_card_gives_the_reward(merged, preferences, show, monkeypatch):
    folder, _ = merged
    monkeypatch.chdir(folder)  # the card says "."
    messages = list(preferences[0][0].prompt + preferences[0][0].answers[0])
    expected = load_reward_model(folder, compute_dtype="float32").score_conversations([messages])[0]
    record = json.loads((folder / "lora_rm_merge.json").read_text())
    card = model_card({"merge": record, "num_answers": 0, "spread": 1.0, "changes": {}}, None)
    code = ast.parse(card.split("```python\n")[1].split("```")[0])
    (example,) = [part for part in code.body if ast.unparse(part).startswith("messages = ")]
    example.value = ast.parse(repr(messages), mode="eval").body
    give_back_rotary()
    names = {"print": lambda reward: names.update(printed=reward)}
    exec(compile(code, "card", "exec"), names)
    found = names["printed"]
    show(f"M9 the model card's own code: lora_rm {expected:.4f}, the pipeline {found:.4f}")
    assert abs(found - expected) < 0.01  # the pipeline computes in float16, the type of the file


def test_m10_a_saved_adapter_opens(tmp_path, show):
    base = make_base(tmp_path / "base", dtype=torch.float32)
    model = shake(make_model(base, quantization="none", load_dtype="float32"))
    adapter, expected = saved(model, tmp_path / "adapter", ROWS), exact_rewards(model)
    ours = load_reward_model(adapter, compute_dtype="float32").score_ids(ROWS)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    torch.manual_seed(123)  # a head drawn anew must show
    plain = plain_classifier(base, num_labels=1)
    plain.config.pad_token_id = tokenizer.pad_token_id
    opened = PeftModel.from_pretrained(plain, adapter)
    theirs = plain_rewards(opened, ROWS, tokenizer.pad_token_id)
    loads = {
        "AutoPeftModelForSequenceClassification": lambda: (
            AutoPeftModelForSequenceClassification.from_pretrained(adapter)
        ),
        "PeftModel on AutoModelForSequenceClassification(base)": lambda: PeftModel.from_pretrained(
            plain_classifier(base), adapter
        ),
        "AutoModelForSequenceClassification(adapter)": lambda: plain_classifier(adapter),
    }
    failed = []
    for name, load in loads.items():
        try:
            load()
        except Exception as error:  # whatever it is, it is the peer's
            failed.append(f"{name}: {type(error).__name__}")
    show(
        f"M10 the adapter's rewards: lora_rm without an argument {largest(expected, ours):.1e} off, "
        f"PEFT with num_labels=1 {largest(expected, theirs):.1e} off, without it {len(failed)} of {len(loads)} loads fail"
    )
    assert max(map(abs, expected)) > 0.1
    assert largest(expected, ours) < 1e-5
    assert largest(expected, theirs) < 1e-5


def test_m11_the_merge_keeps_the_rewards(base, trained, merged, show):
    adapter, expected = trained
    in_4bit = RewardModel.load_adapter(adapter, compute_dtype="float32")
    assert measure_change(expected, exact_rewards(in_4bit)).mean < 1e-5
    pad = in_4bit.chat.pad_id
    inside = in_4bit.model.merge_and_unload()
    for module in inside.modules():  # else bitsandbytes repacks the merged codes on some CPUs
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    plain = plain_classifier(base, num_labels=1)
    plain.config.pad_token_id = pad
    original = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    changes = {
        "lora_rm (dequantised, float16)": measure_change(expected, merged[1]),
        "into the original base": measure_change(expected, plain_rewards(original, ROWS, pad)),
        "PEFT inside 4-bit": measure_change(expected, plain_rewards(inside, ROWS, pad)),
    }
    assert json.loads((merged[0] / "lora_rm_merge.json").read_text())["dtype"] == "float16"
    found = ", ".join(
        f"{name} {change.mean:.2%} ({change.pair_flips} of {change.num_pairs} pairs flipped)"
        for name, change in changes.items()
    )
    show(f"M11 mean change of reward by the merge, as a share of the spread: {found}")
    ours, theirs, _ = changes.values()
    assert ours.mean < 0.005
    assert ours.mean < theirs.mean


def test_m11_merging_into_the_original_base_is_what_we_say_it_is(base, trained, tmp_path):
    adapter, _ = trained
    merge(adapter, tmp_path / "merged", MergeSettings(base="original", dtype="float32"))
    ours = exact_rewards(RewardModel.load_merged(tmp_path / "merged", compute_dtype="float32"))
    plain = plain_classifier(base, num_labels=1)
    plain.config.pad_token_id = pad = AutoTokenizer.from_pretrained(adapter).pad_token_id
    theirs = plain_rewards(PeftModel.from_pretrained(plain, adapter).merge_and_unload(), ROWS, pad)
    assert largest(ours, theirs) < 1e-4


def test_m12_rewards_are_float32_when_products_are_bfloat16(base, merged, show):
    rows = random_rows(64, seed=5)
    model = shake(make_model(base)).eval()
    model.set_compute_dtype(torch.bfloat16)
    model.choose_batching()
    trees = [TokenTree.of_conversation(ids) for ids in rows]
    with torch.no_grad():
        rewards = model.rewards(model.batch(trees))
    assert model.compute_dtype == torch.bfloat16
    assert rewards.dtype == torch.float32
    ours = load_reward_model(merged[0], compute_dtype="bfloat16").score_ids(rows)
    plain = plain_classifier(merged[0], dtype=torch.bfloat16)
    theirs = plain_rewards(plain, rows, plain.config.pad_token_id)
    low, high = min(map(abs, ours)), max(map(abs, ours))
    show(
        f"M12 distinct rewards of 64 answers in bfloat16 (|r| {low:.2f} to {high:.2f}): lora_rm {len(set(ours))}, "
        f"transformers {len(set(theirs))}"
    )
    assert len(set(rewards.tolist())) == 64
    assert len(set(ours)) == 64
