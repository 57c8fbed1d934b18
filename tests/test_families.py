"""What single families of models need: the length of their positions, a window told by the mask alone, other layouts."""

from dataclasses import replace

import pytest
import torch
from conftest import (
    SHAPE,
    assert_same_gradients,
    gradients,
    make_base,
    make_model,
    make_tokenizer,
    separate,
    shake,
    some_trees,
)
from transformers import AutoConfig, AutoModelForCausalLM

from lora_rm.config import AdapterSettings, ModelSettings
from lora_rm.data.tokens import TokenTree
from lora_rm.errors import ModelError
from lora_rm.model.base import BaseModel
from lora_rm.model.reward_model import RewardModel
from lora_rm.workflow import open_model

QUERIES_AND_VALUES = AdapterSettings(rank=2, alpha=6.0, target_modules=("q_proj", "v_proj"))

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [float(i) for i in range(2, 10)],
    "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def of_family(folder, family, **more):
    """A tiny random base of any family."""
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(family, **{"vocab_size": len(tokenizer), **SHAPE, **more})
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def unquantised(folder, **more):
    return make_model(folder, quantization="none", load_dtype="float32", **more)


@pytest.mark.parametrize(
    ("family", "more", "named"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, "rotary positions change"),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}, "rotary positions change"),
        ("gpt2", {"n_positions": 16}, "no positions beyond"),
    ],
)  # fmt: skip
def test_a_conversation_longer_than_the_positions_is_refused_before_it_gives_a_number(
    tmp_path, settings, family, more, named
):
    base = make_base(tmp_path / family, family, dtype=torch.float32, **more)
    model = unquantised(base)
    assert model.batching == "shared"
    assert len(model.score([TokenTree([3] * 8, ([4] * 8, [5] * 4))])[0]) == 2
    with pytest.raises(ModelError, match=f"17 tokens long; this model takes at most 16: .*{named}"):
        model.score([TokenTree([3] * 8, ([4] * 9, [5] * 4))])
    wanted = replace(
        settings,
        model=replace(settings.model, base=str(base)),
        data=replace(settings.data, max_length=17),
    )
    with pytest.raises(
        ModelError, match=r"data.max_length is 17 tokens long.*data.max_length 16 leaves such out"
    ):
        open_model(wanted)


@pytest.mark.parametrize("window", [16, None])
def test_a_window_that_only_the_mask_knows_is_not_shared(tmp_path, capsys, window):
    """PhiMoE builds a mask with its window and tells the attention nothing; the check's conversations are shorter."""
    base = of_family(tmp_path / "base", "phimoe", num_local_experts=4, sliding_window=window)
    model = shake(unquantised(base, adapter=QUERIES_AND_VALUES))
    assert model.batching == ("padded" if window else "shared")
    assert ("0 of 3 layers tell the attention of their sliding window" in capsys.readouterr().out) == bool(
        window
    )
    model.eval()
    long = [TokenTree([5, 6, 7], ([8] * 30, [9] * 25))]
    with torch.no_grad():
        torch.testing.assert_close(
            model.rewards(model.batch(long)), separate(model, long), rtol=1e-4, atol=1e-5
        )


def test_layers_that_lie_deeper_are_found(tmp_path):
    base = of_family(tmp_path / "base", "opt", ffn_dim=96, word_embed_proj_dim=64)
    model = shake(unquantised(base))
    assert model.batching == "shared"
    trees = some_trees(model.classifier.config.vocab_size)
    model.eval()
    found = gradients(model, model.rewards(model.batch(trees)))
    assert_same_gradients(found, gradients(model, separate(model, trees)))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_experts_with_biases_are_recomputed(tmp_path, mode):
    base = of_family(tmp_path / "base", "gpt_oss", num_local_experts=4, sliding_window=8)
    model = shake(unquantised(base, adapter=QUERIES_AND_VALUES)).train()
    trees = some_trees(model.classifier.config.vocab_size)
    found = []
    for each in ("none", mode):
        model.set_checkpointing([each] * len(model.layers))
        found.append(gradients(model, model.rewards(model.batch(trees))))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_layers_that_cannot_be_recomputed_are_named(tmp_path):
    base = of_family(tmp_path / "base", "openai-gpt", n_embd=64, n_layer=3, n_head=4)
    model = unquantised(base)
    model.set_checkpointing(["none"] * 3)
    with pytest.raises(ModelError, match=r"checkpointing full: .* cannot compute a Block again"):
        model.set_checkpointing(["full"] * 3)


def test_a_router_that_cannot_be_adapted_is_named(tmp_path):
    base = of_family(tmp_path / "base", "phimoe", num_local_experts=4, sliding_window=None)
    with pytest.raises(ModelError, match=r"--adapter.target-modules q_proj v_proj"):
        unquantised(base)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_dora_starts_at_the_rewards_of_the_base(tmp_path, family, quantization):
    base = BaseModel(name="base", path=make_base(tmp_path / family, family))
    settings = ModelSettings(quantization=quantization, compute_dtype="bfloat16")
    rewards = []
    for adapter in (None, AdapterSettings(rank=4, alpha=12.0, use_dora=True)):
        model = RewardModel.load(base, settings=settings, adapter=adapter)
        with model.precise():
            scored = model.score(some_trees(model.classifier.config.vocab_size))
        rewards.append(torch.tensor([reward for answers in scored for reward in answers]))
    torch.testing.assert_close(rewards[0], rewards[1], rtol=1e-5, atol=1e-5)


def test_dropout_of_the_base_is_off_in_training(tmp_path):
    base = make_base(
        tmp_path / "gpt2", "gpt2", dtype=torch.float32, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5
    )
    model = unquantised(base).train()
    trees = some_trees(model.classifier.config.vocab_size)
    assert torch.equal(model.rewards(model.batch(trees)), model.rewards(model.batch(trees)))


def test_experts_in_16_bits_and_lengths_that_the_base_was_not_made_for_are_told(tmp_path, settings, capsys):
    more = {"num_local_experts": 4, "sliding_window": 8, "max_position_embeddings": 64}
    base = of_family(tmp_path / "base", "gpt_oss", **more)
    for length, is_told in ((64, False), (65, True)):
        wanted = replace(
            settings,
            model=replace(settings.model, base=str(base)),
            adapter=QUERIES_AND_VALUES,
            data=replace(settings.data, max_length=length),
        )
        model = open_model(wanted)
        said = capsys.readouterr().out
        assert ("data.max_length is 65, and the base was made for 64 tokens" in said) == is_told
        assert "GiB of experts stay in float32" in said
    assert sum(p.dim() == 3 for p in model.parameters()) == 2 * SHAPE["num_hidden_layers"]
