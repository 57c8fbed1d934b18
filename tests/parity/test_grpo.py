"""TRL's GRPOTrainer with a reward model of this library as its reward function."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_rm import load_reward_model, reward_function
from lora_rm.errors import DataError

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_two_steps_of_grpo_are_led_by_the_rewards(base, adapter, tmp_path):
    reward, calls = reward_function(adapter, compute_dtype="float32"), []

    def recorded(prompts, completions, **columns):
        found = reward(prompts=prompts, completions=completions, **columns)
        calls.append((prompts, completions, columns, found))
        return found

    questions = ["What is 2 + 2?", "Name a colour."] * 2
    prompts = [[{"role": "user", "content": question}] for question in questions]
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        max_steps=2, logging_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        learning_rate=1e-2, gradient_checkpointing=False, seed=3,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = policy.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=recorded,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts, "source": ["a", "b", "c", "d"]}),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    assert len(calls) == 2
    logged = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    scorer = load_reward_model(adapter, compute_dtype="float32")
    for (prompts, completions, columns, found), mean in zip(calls, logged, strict=True):
        assert {"completion_ids", "source", "trainer_state"} <= columns.keys()
        assert all(type(value) is float for value in found)
        own = [scorer.score(*pair)[0] for pair in zip(prompts, [[c] for c in completions], strict=True)]
        assert found == pytest.approx(own, abs=1e-5)
        assert mean == pytest.approx(sum(found) / 4, abs=1e-5)
        assert max(found) - min(found) > 1e-3
    assert not torch.equal(policy.model.layers[0].mlp.up_proj.weight, before)


def test_both_forms_of_a_prompt_are_the_same_conversation(adapter):
    reward = reward_function(adapter, compute_dtype="float32")
    texts = reward(["Hi", "Hi"], ["Hello", "Go away"])
    messages = reward(
        [[{"role": "user", "content": "Hi"}]] * 2,
        [[{"role": "assistant", "content": text}] for text in ("Hello", "Go away")],
        completion_ids=[[1], [2]],
    )
    assert texts == pytest.approx(messages, abs=1e-6)
    assert texts[0] != pytest.approx(texts[1], abs=1e-3)
    with pytest.raises(ValueError, match="zip"):
        reward(["Hi"], [])


def test_a_completion_that_was_cut_after_a_tool_has_no_reward(adapter):
    """TRL's GRPOTrainer with tools gives such ones, and takes None for no reward."""
    reward = reward_function(adapter, compute_dtype="float32")
    cut = [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "42"}]
    found = reward(["Hi", "Hi", "Hi"], [cut, "Hello", []])
    assert found[0] is found[2] is None
    assert found[1:2] == pytest.approx(reward(["Hi"], ["Hello"]), abs=1e-6)
    assert reward(["Hi"], [cut]) == [None]


def test_tools_come_from_their_column(adapter):
    reward = reward_function(adapter, compute_dtype="float32")
    with pytest.raises(DataError, match="the chat template prints no tools"):
        reward(["Hi"] * 2, ["Hello"] * 2, tools=[None, [{"name": "add"}]])
    assert reward(["Hi"], ["Hello"], tools=["[]"]) == pytest.approx(reward(["Hi"], ["Hello"]), abs=1e-6)
