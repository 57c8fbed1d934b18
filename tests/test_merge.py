"""Merging against a dense merge in float64, for everything an adapter can hold."""

import json
import math

import pytest
import torch
from conftest import FAMILIES, SHAPE, make_base, make_model, make_tokenizer, shake
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig
from transformers.pytorch_utils import Conv1D

from lora_rm.config import AdapterSettings, MergeSettings
from lora_rm.errors import MergeError, ModelError
from lora_rm.merge import RECORD, Plan, check_weights, merge
from lora_rm.model.quantization import code_hashes, codes_8bit
from lora_rm.model.reward_model import RewardModel
from lora_rm.score import Scorer


def saved(model, folder):
    """Saves the adapter of a model with canaries of its own."""
    model.eval()
    record = model.describe(code_hashes(model.classifier))
    rows = [[1, 5, 9, 7, 3], [1, 8, 4, 2], [1, 30, 31, 32, 33, 34, 2]]
    with model.precise():
        rewards = Scorer(model).score_ids(rows)
    record["canaries"] = [
        {"ids": ids, "prompt": 0, "reward": reward} for ids, reward in zip(rows, rewards, strict=True)
    ]
    model.save(folder, record)
    return folder


def dense_merge(model):
    """The merged weights by hand, (out, in) in float64, from the live PEFT modules."""
    merged = {}
    for name, module in model.classifier.named_modules():
        if not hasattr(module, "lora_A") or not module.lora_A:
            continue
        base = module.get_base_layer()
        state = getattr(base.weight, "quant_state", None)
        if state is None:
            weight = base.weight.data.double()
        else:
            import bitsandbytes.functional as functional

            weight = functional.dequantize_4bit(base.weight.data, state).double()
        a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
        delta = module.scaling["default"] * (b @ a)
        total = (weight.T if isinstance(base, Conv1D) else weight) + delta
        if module.lora_magnitude_vector:
            magnitude = module.lora_magnitude_vector["default"].weight.double()
            total = (magnitude / total.norm(dim=1))[:, None] * total
        merged[f"{name}.weight"] = total.detach()
    return merged


ADAPTERS = {
    "lora": AdapterSettings(rank=4, alpha=12.0),
    "rslora": AdapterSettings(rank=4, alpha=3.0, use_rslora=True),
    "dora": AdapterSettings(rank=4, alpha=12.0, use_dora=True),
    "patterns": AdapterSettings(
        rank=4,
        alpha=12.0,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7},
        alpha_pattern={"v_proj": 5.0, "^model.layers.2.*": 9.0},
    ),
    "two targets": AdapterSettings(rank=4, alpha=12.0, target_modules=("q_proj", "down_proj")),
}


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_weights_equal_the_dense_merge(tmp_path, kind, shards):
    base = make_base(tmp_path / "base", shards=shards)
    model = shake(make_model(base, adapter=ADAPTERS[kind]))
    merge(saved(model, tmp_path / "adapter"), tmp_path / "merged", MergeSettings(dtype="float32"))
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert (len(files) > 3) == shards
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = dense_merge(model)
    assert len(expected) == sum("lora_A" in name for name, _ in model.named_parameters())
    for name, tensor in expected.items():
        assert written[name].dtype == torch.float32
        assert float((written[name].double() - tensor).abs().max()) < 1e-6, name
    assert torch.equal(written["score.weight"], model.head.detach())


def test_a_merge_after_8_bit_training_adds_to_the_8_bit_values(base, tmp_path):
    model = shake(make_model(base, quantization="int8"))
    merge(saved(model, tmp_path / "adapter"), tmp_path / "merged", MergeSettings(dtype="float32"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for name, module in model.classifier.named_modules():
        if hasattr(module, "lora_A"):
            codes, scales = codes_8bit(module.get_base_layer())
            values = codes.double() * scales.double()[:, None] / 127
            delta = module.scaling["default"] * (
                module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
            )
            assert float((written[f"{name}.weight"].double() - values - delta).abs().max()) < 1e-6, name


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_base_in_float32_is_rounded_as_it_was_in_training(tmp_path, quantization):
    base = make_base(tmp_path / "base", dtype=torch.float32)
    adapter = AdapterSettings(rank=4, alpha=12.0, target_modules=("q_proj", "down_proj"))
    model = shake(make_model(base, quantization=quantization, adapter=adapter))
    merge(saved(model, tmp_path / "adapter"), tmp_path / "merged", MergeSettings(dtype="float32"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    embeddings = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(embeddings, embeddings.bfloat16().float())
    assert torch.equal(written["model.embed_tokens.weight"], embeddings.bfloat16().float())
    for name, tensor in dense_merge(model).items():
        assert float((written[name].double() - tensor).abs().max()) < 1e-6, name


def test_the_original_base_is_neither_quantised_nor_rounded(tmp_path, capsys):
    base = make_base(tmp_path / "base", dtype=torch.float32)
    model = shake(make_model(base))
    adapter = saved(model, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", MergeSettings(base="original", dtype="float32"))
    assert "this is another model" in capsys.readouterr().out
    before, written = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert torch.equal(written["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    for name, module in model.classifier.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            expected = before[f"{name}.weight"].double() + module.scaling["default"] * (b @ a)
            assert float((written[f"{name}.weight"].double() - expected).abs().max()) < 1e-6, name


@pytest.mark.parametrize("layers", [(), (1,)], ids=["all layers", "one layer"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_gpt2_stores_its_weights_transposed(tmp_path, quantization, layers):
    base = make_base(tmp_path / "base", "gpt2")
    adapter = AdapterSettings(rank=4, alpha=12.0, layers_to_transform=layers)
    model = shake(make_model(base, quantization=quantization, adapter=adapter))
    merge(saved(model, tmp_path / "adapter"), tmp_path / "merged", MergeSettings(dtype="float32"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in dense_merge(model).items():
        assert float((written[name].T.double() - tensor).abs().max()) < 1e-6, name


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "mistral", "qwen2", "gpt2"]
)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_merged_model_reloaded_under_another_seed_gives_the_rewards(tmp_path, family, dtype):
    model = shake(make_model(make_base(tmp_path / "base", family), seed=1))
    adapter = saved(model, tmp_path / "adapter")
    report = merge(adapter, tmp_path / "merged", MergeSettings(dtype=dtype))
    overflows = family in ("gemma2", "gemma3_text")
    assert report.dtype == ({True: "bfloat16", False: "float16"}[overflows] if dtype == "auto" else dtype)
    assert report.num_updated == sum("lora_A" in name for name, _ in model.named_parameters())
    torch.manual_seed(99)
    canaries = json.loads((adapter / "lora_rm.json").read_text())["canaries"]
    expected = torch.tensor([canary["reward"] for canary in canaries])
    assert float(expected.std()) > 1e-3
    for opened in (
        RewardModel.load_adapter(adapter),
        RewardModel.load_merged(tmp_path / "merged", compute_dtype="float32"),
    ):
        opened.choose_batching()
        found = torch.tensor(Scorer(opened).score_ids([canary["ids"] for canary in canaries]))
        # a bfloat16 store (Gemma) is rounded stochastically; float16 keeps 2^-11 of every weight
        allowed = {"bfloat16": 0.1, "float16": 1e-2, "float32": 2e-4}[report.dtype]
        assert float((found - expected).abs().max() / expected.std()) < allowed
    check_weights(Plan(adapter, MergeSettings(dtype=report.dtype)), tmp_path / "merged")


def test_gemma3_with_images_keeps_the_names_of_its_checkpoint(tmp_path):
    """transformers renames its tensors when it loads them; only the decoder is adapted."""
    tokenizer = make_tokenizer()
    config = Gemma3Config(
        text_config=Gemma3TextConfig(vocab_size=len(tokenizer), **{**SHAPE, **FAMILIES["gemma3_text"]}),
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        ),
        mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = shake(make_model(tmp_path / "base"))
    assert not [name for name, _ in model.named_parameters() if "lora_" in name and "vision" in name]
    adapter = saved(model, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", MergeSettings(dtype="float32"))
    names = set(load_file(tmp_path / "base" / "model.safetensors")) | {"score.weight"}
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == names - {"lm_head.weight"}
    opened = RewardModel.load_merged(tmp_path / "merged", compute_dtype="float32")
    canaries = json.loads((adapter / "lora_rm.json").read_text())["canaries"]
    found = Scorer(opened).score_ids([canary["ids"] for canary in canaries])
    assert found == pytest.approx([canary["reward"] for canary in canaries], abs=1e-4)


@pytest.mark.parametrize(
    ("dtype", "highest"), [("float32", 1e-4), ("float16", 0.2), ("bfloat16", 2.0), ("bfloat16_nearest", 2.0)]
)
def test_rounding_is_measured_per_tensor(base, tmp_path, dtype, highest):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    report = merge(adapter, tmp_path / "merged", MergeSettings(dtype=dtype))
    found = check_weights(Plan(adapter, MergeSettings(dtype=dtype)), tmp_path / "merged")
    assert found.keys() == report.rounding_error.keys()
    assert max(found.values()) < highest
    assert (max(found.values()) > 0) == (dtype != "float32")
    for name, share in found.items():
        assert math.isclose(share, report.rounding_error[name], rel_tol=1e-6)


def test_stochastic_rounding_is_seeded_and_right_on_average(base, tmp_path):
    adapter = saved(shake(make_model(base), size=0.002), tmp_path / "adapter")
    for number in (1, 2):
        merge(adapter, tmp_path / f"merged{number}", MergeSettings(dtype="bfloat16"))
    first, second = ((tmp_path / f"merged{number}" / "model.safetensors").read_bytes() for number in (1, 2))
    assert first == second
    merge(adapter, tmp_path / "exact", MergeSettings(dtype="float32"))
    merge(adapter, tmp_path / "nearest", MergeSettings(dtype="bfloat16_nearest"))
    exact, stochastic, nearest = (
        load_file(tmp_path / name / "model.safetensors") for name in ("exact", "merged1", "nearest")
    )
    base_weights = load_file(base / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"):
        bias = {
            key: abs(float((stored[name].float() - exact[name]).mean()))
            for key, stored in (("s", stochastic), ("n", nearest))
        }
        assert (
            bias["s"]
            < 4 * float(base_weights[name].float().abs().mean()) * 2**-8 / exact[name].numel() ** 0.5
        )


def test_a_value_too_large_for_float16_changes_the_storage_type(base, tmp_path, capsys):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 0 + 70000.0
    changed = tmp_path / "base"
    changed.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (changed / file.name).write_bytes(file.read_bytes())
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    adapter = saved(shake(make_model(changed)), tmp_path / "adapter")
    assert merge(adapter, tmp_path / "merged").dtype == "bfloat16"
    assert "too large for float16" in capsys.readouterr().out
    with pytest.raises(MergeError, match="does not fit float16"):
        merge(adapter, tmp_path / "other", MergeSettings(dtype="float16"))
    assert [path.name for path in tmp_path.iterdir() if "other" in path.name] == []


def test_refuses_to_overwrite_and_replaces_when_told(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    (tmp_path / ".merged.x.partial").mkdir()  # of a merge that was killed
    merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]
    with pytest.raises(MergeError, match="exists already"):
        merge(adapter, tmp_path / "merged")
    merge(adapter, tmp_path / "merged", MergeSettings(overwrite=True))


def test_a_base_that_changed_since_training_is_found(base, tmp_path):
    changed = make_base(tmp_path / "base")
    adapter = saved(shake(make_model(changed)), tmp_path / "adapter")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1.0
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match="up_proj.*codes are not those"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ModelError, match="not those it was trained on"):
        RewardModel.load_adapter(adapter)


def test_an_adapter_without_head_or_with_two_logits_is_refused(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("base_model.model.score.weight")
    save_file(tensors, file)
    with pytest.raises(ModelError, match="no score head"):
        merge(adapter, tmp_path / "merged")
    save_file({**tensors, "base_model.model.score.weight": head.repeat(2, 1)}, file)
    with pytest.raises(ModelError, match="one logit"):
        merge(adapter, tmp_path / "merged")


def test_every_tensor_of_the_adapter_must_be_used(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {**tensors, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}, file
    )
    with pytest.raises(MergeError, match="fits no weight"):
        merge(adapter, tmp_path / "merged")
    save_file({**tensors, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}, file)
    with pytest.raises(MergeError, match="cannot be merged"):
        merge(adapter, tmp_path / "merged")


@pytest.mark.parametrize("damage", ["missing", "left over", "changed", "nan", "head"])
def test_damage_to_the_merged_weights_is_found(base, tmp_path, damage):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_proj.weight"
    if damage == "missing":
        tensors.pop(name)
    elif damage == "left over":
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(2, 2)
    elif damage == "changed":
        tensors[name][2, 3] += 0.01
    elif damage == "nan":
        tensors[name][2, 3] = math.nan
    else:
        tensors["score.weight"] = tensors["score.weight"] * 1.001
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        MergeError,
        match={
            "missing": "missing.*k_proj",
            "left over": "left over.*layers.3",
            "changed": "not the merged",
            "nan": "NaN",
            "head": "head",
        }[damage],
    ):
        check_weights(Plan(adapter, MergeSettings(dtype="float16")), tmp_path / "merged")


def test_the_report_lies_in_the_folder(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged")
    report = json.loads((tmp_path / "merged" / RECORD).read_text())
    assert (report["base_weights"], report["dtype"]) == ("dequantized", "float16")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["problem_type"] == "regression"
    assert config["id2label"] == {"0": "LABEL_0"}
    assert config["pad_token_id"] not in (2, None)
    assert oct((tmp_path / "merged" / "model.safetensors").stat().st_mode)[-3:] == "644"
    assert oct((tmp_path / "merged").stat().st_mode)[-3:] == "755"
