"""TRL's RewardTrainer and this library on the same tiny models: equal losses, and the numbers where they differ.

What TRL gives is printed and not asserted: a later version may well mend it.
"""

import json

import pytest
import torch
from conftest import make_base, make_model
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from lora_rm.checkpoint import RunFolder
from lora_rm.config import AdapterSettings, DataSettings, check_settings
from lora_rm.data.batches import training_order
from lora_rm.data.split import Data, Side, load_data
from lora_rm.data.tokens import ChatTokenizer, tokenize
from lora_rm.errors import DataError
from lora_rm.evaluate import evaluate
from lora_rm.model.elementwise import give_back_rotary
from lora_rm.model.reward_model import RewardModel
from lora_rm.train import train

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("fresh_accelerator")

ADAPTER = AdapterSettings(rank=4, alpha=12.0)
NUM_STEPS = 20
PER_STEP = 8


@pytest.fixture(scope="module")
def float_base(tmp_path_factory):
    """A tiny Llama in float32."""
    return make_base(tmp_path_factory.mktemp("float") / "llama", dtype=torch.float32)


def rows_of(preferences):
    """Preferences as TRL wants them: three lists of messages."""
    return Dataset.from_list(
        [
            {"prompt": list(p.prompt), "chosen": list(p.answers[0]), "rejected": list(p.answers[1])}
            for p in preferences
        ]
    )


def trl_settings(folder, **values):
    """Everything of a run on a CPU that is not under test."""
    plain = {
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": PER_STEP,
        "train_sampling_strategy": "sequential",
    }
    return trl.RewardConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{**plain, **values},
    )


def peft_config():
    return LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=12.0, target_modules="all-linear")


def with_the_weights_of(model, base, pad_id):
    """A transformers classifier under PEFT, built without this library, with a model's trainable values."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = pad_id
    peft_model = get_peft_model(plain, peft_config())
    values = {name: p.detach().clone() for name, p in model.model.named_parameters() if p.requires_grad}
    wanted = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert wanted == values.keys()
    missing, unexpected = peft_model.load_state_dict(values, strict=False)
    assert not unexpected
    assert not wanted & set(missing)
    return peft_model


def run_settings(base, folder, **train_values):
    return check_settings(
        {
            "output_dir": str(folder),
            "model": {"base": str(base), "compute_dtype": "float32"},
            "data": {"train": "builtin:checkable"},
            "train": {
                "preferences_per_step": PER_STEP,
                "checkpointing": "none",
                "save_every_steps": 0,
                **train_values,
            },
        }
    )


def our_losses(model, preferences, trees, settings):
    """Trains and gives the losses of the steps."""
    run = RunFolder.create(settings)
    train(model, Data(Side(list(preferences), list(trees)), Side([], [])), settings, run)
    return [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]


def test_losses_of_20_steps_equal_those_of_trl(float_base, preferences, tmp_path, show):
    wanted = {"max_steps": NUM_STEPS, "num_epochs": 4.0, "learning_rate": 3e-3, "warmup_share": 0.0}
    chosen = preferences[0][:40]
    chat = ChatTokenizer.load(float_base)
    trees, counts = tokenize(chosen, chat, max_length=512)
    assert not counts
    start = make_model(float_base, quantization="none", load_dtype="float32", seed=3)
    peft_model = with_the_weights_of(start, float_base, chat.pad_id)
    order = training_order(len(chosen), NUM_STEPS, PER_STEP, seed=0)
    rows = rows_of([chosen[number] for step in order for number in step])
    trainer = trl.RewardTrainer(
        model=peft_model,
        args=trl_settings(
            tmp_path / "trl",
            learning_rate=wanted["learning_rate"],
            num_train_epochs=1,
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            disable_dropout=True,
            max_length=512,
        ),
        train_dataset=rows,
        processing_class=chat.tokenizer,
    )
    first = next(training_order(len(chosen), NUM_STEPS, PER_STEP, seed=0))
    for position, number in enumerate(first):
        row = trainer.train_dataset[position]
        assert [row["chosen_ids"], row["rejected_ids"]] == trees[number].conversations()
    give_back_rotary()
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(expected) == NUM_STEPS
    assert max(expected) - min(expected) > 0.1  # a flat curve would show nothing
    for name, tokens in (("one microbatch a step", 100_000), ("microbatches of 64 tokens", 64)):
        model = make_model(float_base, quantization="none", load_dtype="float32", seed=3)
        settings = run_settings(float_base, tmp_path / f"run{tokens}", tokens_per_microbatch=tokens, **wanted)
        losses = our_losses(model, chosen, trees, settings)
        difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        show(
            f"loss of 20 steps ({model.batching}, {name}): TRL {expected[0]:.4f} -> {expected[-1]:.4f}, "
            f"lora_rm {losses[0]:.4f} -> {losses[-1]:.4f}, largest difference {difference:.1e}"
        )
        assert model.batching == "shared"
        assert difference < 1e-4
    for name, parameter in model.model.named_parameters():
        if parameter.requires_grad:
            other = peft_model.get_parameter(name)
            assert float((parameter - other).detach().abs().max()) < 1e-3, name


def test_m1_training_with_peft_by_default(base, preferences, tmp_path, monkeypatch, show):
    settings = run_settings(base, tmp_path / "run", max_steps=2)
    model = RewardModel.load(str(base), settings=settings.model, adapter=settings.adapter)
    model.choose_batching()
    trees, _ = tokenize(preferences[0][:16], model.chat, max_length=512)
    count = model.trainable()
    losses = our_losses(model, preferences[0][:16], trees, settings)
    assert len(losses) == 2
    assert count.adapter > 0
    assert count.head == 64
    from trl.scripts import reward

    data = DatasetDict(train=rows_of(preferences[0][:16]))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **more: data)
    words = ["--model_name_or_path", str(base), "--dataset_name", "pairs", "--use_peft"]
    words += ["--output_dir", str(tmp_path / "trl"), "--use_cpu", "True", "--report_to", "none"]
    words += ["--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "True"]
    try:
        reward.main(*reward.make_parser().parse_args_and_config(words))
        found = "trains"
    except Exception as error:  # whatever it is, it is the peer's
        found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    show(
        f"M1 two steps with LoRA by default: lora_rm trains ({count.adapter:,} adapter values); TRL: {found}"
    )


def unchanged_shares(before, parameters):
    """Share of values that are bit for bit as before, of all lora_A and of the head."""
    shares = {}
    for kind in ("lora_A", "score"):
        pairs = [(before[name], p.detach()) for name, p in parameters.items() if kind in name]
        assert pairs
        same = sum(int((old == new).sum()) for old, new in pairs)
        shares[kind] = same / sum(old.numel() for old, _ in pairs)
    return shares


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_m2_small_steps_are_not_lost(base, preferences, tmp_path, show):
    rate, steps = 1e-5, 40
    chosen = preferences[0]
    model = make_model(base, quantization="nf4")
    trees, _ = tokenize(chosen, model.chat, max_length=512)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    settings = run_settings(
        base,
        tmp_path / "run",
        max_steps=steps,
        num_epochs=9.0,
        learning_rate=rate,
        schedule="constant",
        warmup_share=0.0,
    )
    our_losses(model, chosen, trees, settings)
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    ours = unchanged_shares(before, trained(model))
    tokenizer = ChatTokenizer.load(base).tokenizer
    trainer = trl.RewardTrainer(
        model=str(base),
        args=trl_settings(
            tmp_path / "trl",
            bf16=True,
            learning_rate=rate,
            max_steps=steps,
            lr_scheduler_type="constant",
            model_init_kwargs={"dtype": torch.bfloat16, "device_map": "cpu"},
        ),
        train_dataset=rows_of(chosen),
        processing_class=tokenizer,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        peft_config=peft_config(),
    )
    before = {name: p.detach().clone() for name, p in trained(trainer.model).items()}
    give_back_rotary()
    trainer.train()
    assert trainer.state.global_step == steps
    theirs = unchanged_shares(before, trained(trainer.model))
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in trained(trainer.model).values()})
    show(
        f"M2 values unchanged after 40 AdamW steps at 1e-5 on NF4: lora_A lora_rm {ours['lora_A']:.2%}, "
        f"TRL {theirs['lora_A']:.1%}; head lora_rm {ours['score']:.2%}, TRL {theirs['score']:.1%} "
        f"(lora_rm float32 masters, TRL {' and '.join(dtypes)} masters)"
    )
    assert ours["lora_A"] < 0.01
    assert ours["score"] < 0.01


def test_m4_accuracy_counts_pairs_and_not_batches(float_base, preferences, tmp_path, show):
    model = make_model(float_base, quantization="none", load_dtype="float32")
    trees, _ = tokenize(preferences[0], model.chat, max_length=512)
    rewards = model.score(trees)
    right = [number for number, (better, worse) in enumerate(rewards) if better > worse]
    wrong = [number for number, (better, worse) in enumerate(rewards) if better < worse]
    five = [*right[:2], *wrong[:2], right[2]]
    truth = 3 / 5
    for tokens in (16, 256, 4096):
        found = evaluate(model, [trees[number] for number in five], tokens_per_microbatch=tokens)
        assert found.pairs.num_pairs == 5
        assert found.pairs.accuracy == truth
    rows = rows_of([preferences[0][number] for number in five])
    trainer = trl.RewardTrainer(
        model=with_the_weights_of(model, float_base, model.chat.pad_id),
        args=trl_settings(tmp_path / "trl", per_device_eval_batch_size=4),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=model.chat.tokenizer,
    )
    give_back_rotary()
    theirs = trainer.evaluate()["eval_accuracy"]
    show(
        f"M4 accuracy of 5 pairs at batch 4: truth {truth:.3f}, lora_rm {found.pairs.accuracy:.3f}, TRL {theirs:.3f}"
    )


def prepared_by_trl(base, rows, folder, **settings):
    """TRL's training data after tokenising and filtering."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = trl.RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(base, num_labels=1),
        args=trl_settings(folder, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return trainer


def test_m13_text_that_has_a_bos_gets_no_second_one(base, chat, preferences, tmp_path, show):
    texts = [
        [chat.render(preference.prompt + answer) for answer in preference.answers]
        for preference in preferences[0][:8]
    ]
    assert all(text.startswith("<s>") for pair in texts for text in pair)
    own = [chat.text_ids(pair) for pair in texts]
    assert own == [chat.ids([(p.prompt + answer, ()) for answer in p.answers]) for p in preferences[0][:8]]
    assert own == [tree.conversations() for tree in tokenize(preferences[0][:8], chat, max_length=512)[0]]
    ours = {ids.count(1) for pair in own for ids in pair}
    bare = chat.text_ids([text.removeprefix("<s>") for pair in texts for text in pair])
    assert bare == [ids for pair in own for ids in pair]
    trainer = prepared_by_trl(base, [{"chosen": a, "rejected": b} for a, b in texts], tmp_path / "trl")
    theirs = {row["chosen_ids"].count(1) for row in trainer.train_dataset}
    show(f"M13 BOS tokens of a text that has one: lora_rm {sorted(ours)}, TRL {sorted(theirs)}")
    assert ours == {1}


def test_m13_dropped_pairs_are_counted(base, chat, tmp_path, show):
    rows = [
        {"prompt": f"Question {n}?", "chosen": "yes " * (2 + 200 * (n % 4 == 0)), "rejected": f"no {n}"}
        for n in range(40)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    wanted = {"train": str(file), "eval_share": 0.25, "num_workers": 1}
    data = load_data(DataSettings(**wanted, max_length=64, max_dropped_share=1.0), chat)
    counted = sum(side.get("dropped: longer than 64 tokens", 0) for side in data.report.values())
    kept = sum(side["kept"] for side in data.report.values())
    assert (counted, kept) == (10, 30)
    with pytest.raises(DataError, match=r"% of the \w+ rows were dropped .*raise data.max_length"):
        load_data(DataSettings(**wanted, max_length=64), chat)  # a quarter, of which a tenth is allowed
    with pytest.raises(DataError, match="100% of the train rows were dropped") as all_gone:
        load_data(DataSettings(**wanted, max_length=8), chat)
    with pytest.raises(DataError, match="No train preferences are left"):
        load_data(DataSettings(**wanted, max_length=8, max_dropped_share=1.0), chat)
    kept_by_trl = len(prepared_by_trl(base, rows, tmp_path / "trl", max_length=64).train_dataset)
    try:
        prepared_by_trl(base, rows, tmp_path / "trl", max_length=8).train()
        found = "trains on nothing"
    except Exception as error:  # whatever it is, it is the peer's
        found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    show(f"M13 of 40 pairs 10 too long: lora_rm keeps {kept} and reports {counted}, TRL keeps {kept_by_trl}")
    show(f"M13 all too long: lora_rm {str(all_gone.value).split('.')[0]!r}; TRL {found!r}")
