"""Merging against a dense merge in float64, for everything an adapter can hold."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from conftest import (
    FAMILIES,
    ROWS,
    SHAPE,
    make_base,
    make_model,
    make_tokenizer,
    renew_hash,
    saved,
    shake,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)
from transformers.pytorch_utils import Conv1D

import lora_rm.merge as merge_module
import lora_rm.verify as verify_module
from lora_rm import unfinished
from lora_rm.cli import main
from lora_rm.combine import combine
from lora_rm.config import AdapterSettings, MergeSettings, VerifySettings, check_settings
from lora_rm.errors import MergeError, ModelError, StorageError
from lora_rm.merge import (
    MergePlan,
    Update,
    Workers,
    _check_space,
    _DoesNotFit,
    _stored,
    _write_tensor,
    check_mergeable,
    check_weights,
    is_unverified,
    merge,
)
from lora_rm.model import quantization
from lora_rm.model.quantization import Quantization, codes_8bit
from lora_rm.model.record import MERGE_RECORD, RECORD, move_base
from lora_rm.model.reward_model import RewardModel
from lora_rm.model.tensor_files import TensorWriter, stored_tensors
from lora_rm.score import Scorer
from lora_rm.verify import REQUANTIZED, verify
from lora_rm.workflow import combine_runs, open_model


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


def test_tied_embeddings_are_written_once_and_the_language_head_not_at_all(tmp_path):
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    model = shake(make_model(base))
    merge(saved(model, tmp_path / "adapter"), tmp_path / "merged", MergeSettings(dtype="float32"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert [name for name in written if "embed" in name or "head" in name] == ["model.embed_tokens.weight"]
    rows = [[1, 5, 9, 7, 3], [1, 8, 4, 2]]
    opened = RewardModel.load_merged(tmp_path / "merged", compute_dtype="float32")
    expected = Scorer(model.eval()).score_ids(rows)
    assert Scorer(opened).score_ids(rows) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_merge_after_8_bit_training_adds_to_the_8_bit_values(tmp_path, family):
    model = shake(make_model(make_base(tmp_path / "base", family), quantization="int8"))
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


STORED = {
    "as usual": ("lora", torch.bfloat16, {"bnb_4bit_use_double_quant": True}),
    "float16": ("dora", torch.float16, {"bnb_4bit_use_double_quant": True}),
    "as for sharding": ("patterns", torch.bfloat16, {"bnb_4bit_quant_storage": torch.bfloat16}),
    "fp4": ("two targets", torch.float32, {"bnb_4bit_quant_type": "fp4"}),
}


@pytest.mark.parametrize("kind", STORED)
def test_a_base_that_is_stored_in_4_bit(tmp_path, kind):
    adapter, dtype, values = STORED[kind]
    config = BitsAndBytesConfig(**{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | values)
    original = make_base(tmp_path / "original", dtype=dtype)
    stored = AutoModelForCausalLM.from_pretrained(original, quantization_config=config, dtype=dtype)
    stored.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    model = shake(make_model(tmp_path / "base", adapter=ADAPTERS[adapter]))
    adapter = saved(model, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", MergeSettings(dtype="float32"))
    written = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        written |= load_file(file)
    for name, tensor in dense_merge(model).items():
        assert float((written[name].double() - tensor).abs().max()) < 1e-6, name
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    expected = Scorer(model.eval()).score_ids(ROWS)
    merged = RewardModel.load_merged(tmp_path / "merged", compute_dtype="float32").eval()
    assert Scorer(merged).score_ids(ROWS) == pytest.approx(expected, abs=2e-4)
    with pytest.raises(MergeError, match="has no other values; --merge.base original needs"):
        merge(adapter, tmp_path / "other", MergeSettings(base="original"))
    if kind == "as usual":
        codes = next(file for file in (tmp_path / "base").glob("*.safetensors")
                     if "model.layers.1.mlp.up_proj.weight" in load_file(file))  # fmt: skip
        tensors = load_file(codes)
        tensors["model.layers.1.mlp.up_proj.weight"][5] ^= 16
        save_file(tensors, codes, {"format": "pt"})
        with pytest.raises(MergeError, match=r"up_proj.*codes are not those"):
            merge(adapter, tmp_path / "changed")
        with pytest.raises(ModelError, match="is stored in 4 bit. Set model.quantization nf4"):
            make_model(tmp_path / "base", quantization="none")
        with pytest.raises(ModelError, match="in 16 or 32 bits, which adapter.init loftq"):
            make_model(tmp_path / "base", adapter=AdapterSettings(rank=4, init="loftq"))


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
    assert report.dtype == ({True: "float32", False: "float16"}[overflows] if dtype == "auto" else dtype)
    assert report.num_updated == sum("lora_A" in name for name, _ in model.named_parameters())
    torch.manual_seed(99)
    canaries = json.loads((adapter / "lora_rm.json").read_text())["canaries"]
    expected = torch.tensor([canary["reward"] for canary in canaries])
    assert float(expected.std()) > 1e-3
    for opened in (
        RewardModel.load_adapter(adapter, compute_dtype="float32"),
        RewardModel.load_merged(tmp_path / "merged", compute_dtype="float32"),
    ):
        opened.choose_batching()
        found = torch.tensor(Scorer(opened).score_ids([canary["ids"] for canary in canaries]))
        allowed = {"float16": 1e-2, "float32": 2e-4}[report.dtype]  # float16 keeps 2^-11 of every weight
        assert float((found - expected).abs().max() / expected.std()) < allowed
    check_weights(MergePlan(adapter, MergeSettings(dtype=report.dtype)), tmp_path / "merged")


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_trained_biases_replace_those_of_the_base(tmp_path, family):
    model = shake(make_model(make_base(tmp_path / "base", family)))
    adapter = saved(model, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"bias": "lora_only"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    file, kind = adapter / "adapter_model.safetensors", "h.1.attn.c_attn" if family == "gpt2" else "q_proj"
    biases = {  # under PEFT's names
        f"base_model.model.{name.replace('.bias', '.base_layer.bias')}": torch.randn(tensor.shape)
        .bfloat16()
        .float()
        for name, tensor in AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base"
        ).named_parameters()
        if name.endswith(f"{kind}.bias")
    }
    assert biases
    save_file(load_file(file) | biases, file, {"format": "pt"})
    renew_hash(adapter)
    merge(adapter, tmp_path / "merged", MergeSettings(dtype="float32"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in biases.items():
        own = name.removeprefix("base_model.model.").replace("base_layer.", "")
        assert torch.equal(written[own], tensor), own
    for name, tensor in dense_merge(model).items():
        found = written[name].double()
        assert float(((found.T if family == "gpt2" else found) - tensor).abs().max()) < 1e-6, name
    by_peft = RewardModel.load_adapter(adapter, compute_dtype="float32").eval()
    merged = RewardModel.load_merged(tmp_path / "merged", compute_dtype="float32").eval()
    assert Scorer(merged).score_ids(ROWS) == pytest.approx(Scorer(by_peft).score_ids(ROWS), abs=1e-5)
    assert Scorer(merged).score_ids(ROWS) != pytest.approx(Scorer(model.eval()).score_ids(ROWS), abs=1e-2)
    check_weights(MergePlan(adapter, MergeSettings(dtype="float32")), tmp_path / "merged")
    with pytest.raises(MergeError, match="has trained biases"):
        combine([adapter, adapter], (0.5, 0.5), tmp_path / "combined")
    save_file(load_file(file) | {next(iter(biases)): torch.ones(7)}, file, {"format": "pt"})
    renew_hash(adapter)
    with pytest.raises(MergeError, match="the adapter's \\[7\\]"):
        merge(adapter, tmp_path / "wrong")


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
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_rounding_is_measured_per_tensor(base, tmp_path, dtype, highest, kind):
    model = shake(make_model(base, adapter=ADAPTERS[kind]))
    adapter = saved(model, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", MergeSettings(dtype=dtype))
    found = check_weights(MergePlan(adapter, MergeSettings(dtype=dtype)), tmp_path / "merged")
    assert max(found.values()) < highest
    assert (max(found.values()) > 1e-5) == (dtype != "float32")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    dense = dense_merge(model)
    assert found.keys() == dense.keys()
    for name, exact in dense.items():
        error, update = (written[name].double() - exact).norm(), (exact - training_weight(model, name)).norm()
        assert found[name] == pytest.approx(float(error / update), rel=1e-2, abs=1e-5), name


def test_stochastic_rounding_is_seeded_and_keeps_small_updates_on_average(base, tmp_path):
    """Where an update is below a quarter of a step, nearest rounding keeps nothing of it."""
    model = shake(make_model(base), size=1e-4)
    adapter = saved(model, tmp_path / "adapter")
    for name, dtype in (("first", "bfloat16"), ("second", "bfloat16"), ("nearest", "bfloat16_nearest")):
        merge(adapter, tmp_path / name, MergeSettings(dtype=dtype))
    files = {name: tmp_path / name / "model.safetensors" for name in ("first", "second", "nearest")}
    assert files["first"].read_bytes() == files["second"].read_bytes()
    stored = {name: load_file(file) for name, file in files.items()}
    small: dict[str, list[torch.Tensor]] = {"update": [], "first": [], "nearest": []}
    for name, exact in dense_merge(model).items():
        weight = training_weight(model, name)
        update, step = exact - weight, 2.0 ** (weight.abs().log2().floor() - 7)
        chosen = update.abs() < step / 4
        small["update"].append(update[chosen])
        for way in ("first", "nearest"):
            small[way].append((stored[way][name].double() - weight)[chosen])
    update, first, nearest = (torch.cat(parts) for parts in small.values())
    assert len(update) > 50_000
    slope = float(first @ update / (update @ update))
    assert slope == pytest.approx(1, abs=0.1)
    assert not nearest.any()


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
    assert merge(adapter, tmp_path / "merged").dtype == "float32"
    assert "too large for float16: storing float32 instead" in capsys.readouterr().out
    with pytest.raises(MergeError, match=r"does not fit float16. Use --merge.dtype float32\.$"):
        merge(adapter, tmp_path / "other", MergeSettings(dtype="float16"))
    assert [path.name for path in tmp_path.iterdir() if "other" in path.name] == []


@pytest.mark.parametrize("scale", [2.0**-100, 1e-3, 1.0, 2.0**100])
def test_counting_bounds_gives_the_codes_of_bitsandbytes_for_every_bfloat16(scale):
    """All 65,280 finite values, in blocks whose largest has each of the 128 mantissas."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[torch.isfinite(values)]
    largest = (1 + torch.arange(128) / 128).mul(scale).bfloat16()
    # every value from 2^-7 of the largest up to it, and every value at all once
    for begin in range(0, 128, 32):
        few = largest[begin : begin + 32, None]
        near = values[(values.abs() <= 2 * scale) & (values.abs() >= scale / 128)]
        blocks = near[: len(near) // 63 * 63].view(1, -1, 63).expand(32, -1, -1)
        blocks = blocks.clamp(-few[:, :, None], few[:, :, None])
        blocks = torch.cat([blocks, few[:, None].expand(-1, blocks.shape[1], 1)], dim=2).reshape(-1)
        check_codes(blocks)
    check_codes(values)


def check_codes(values):
    packed, state = bnb_functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    found, constants = quantization._count_bounds(values)
    assert torch.equal(found, packed.view(-1))
    assert torch.equal(constants, state.absmax)


def test_a_gpu_finds_the_codes_that_a_cpu_finds():
    """Its binary search, run here: also where a value is a bound, or lies on either side of one by a bit, and in blocks of zeros."""
    bounds = torch.from_numpy(quantization.NF4_BOUNDS[:, 0])
    near = torch.cat(
        [
            bounds,
            *(torch.nextafter(bounds, bounds + sign) for sign in (1, -1)),
            torch.tensor([1.0, -1.0, 0.0]),
        ]
    )
    random = torch.randn(64 * 20, generator=torch.Generator().manual_seed(1))
    values = torch.cat([near.repeat(4), torch.zeros(64 * 2), random])
    values = values[: len(values) // 64 * 64]
    packed, constants = quantization._count_bounds(values)
    scaled = (values.view(-1, 64) * constants.clamp(min=1e-38).reciprocal()[:, None]).view(-1)
    assert int((constants == 0).sum()) >= 1
    assert torch.equal(quantization._search_bounds(scaled), packed)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_do_not_depend_on_the_number_of_threads(kind):
    """The mean of these 131,072 constants in float32 does."""
    weight = torch.zeros(4096, 2048)
    weight.view(-1, 64)[:, 0] = 1 + torch.rand(2**17, generator=torch.Generator().manual_seed(1))
    before, hashes = torch.get_num_threads(), set()
    try:
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            hashes.add(Quantization(kind=kind, double=True, load_dtype=torch.float32).round_trip(weight)[1])
    finally:
        torch.set_num_threads(before)
    assert len(hashes) == 1


@pytest.mark.parametrize("shape", [(64, 96), (70, 64), (3, 5)])
def test_a_base_is_loaded_with_the_codes_of_bitsandbytes(shape):
    """On a CPU; `quantized_alike` is what makes a GPU's the same. Nothing of it stays."""
    theirs = bnb_functional.quantize_4bit, bnb_functional.int8_vectorwise_quant
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    for double in (True, False):
        made = []
        for loading in (contextlib.nullcontext, quantization.quantized_alike):
            with loading():
                made.append(
                    bitsandbytes.nn.Params4bit(weight, quant_type="nf4", compress_statistics=double).to("cpu")
                )
        one, other = made
        assert torch.equal(one.data, other.data)
        assert quantization._hash_4bit(one.data, one.quant_state) == quantization._hash_4bit(
            other.data, other.quant_state
        )
        assert one.quant_state.as_dict().keys() == other.quant_state.as_dict().keys()
        assert torch.equal(*(bnb_functional.dequantize_4bit(each.data, each.quant_state) for each in made))
    with quantization.quantized_alike():
        codes, scales, _ = bnb_functional.int8_vectorwise_quant(weight.half())
    expected = theirs[1](weight.half())
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])
    assert (bnb_functional.quantize_4bit, bnb_functional.int8_vectorwise_quant) == theirs


def test_where_bitsandbytes_rounds_otherwise_it_does_so_itself(monkeypatch):
    quantization._rounds_as_bitsandbytes.cache_clear()
    assert quantization._rounds_as_bitsandbytes()
    quantization._rounds_as_bitsandbytes.cache_clear()
    real = bnb_functional.dequantize_4bit
    monkeypatch.setattr(bnb_functional, "dequantize_4bit", lambda codes, state: real(codes, state) * 1.01)
    assert not quantization._rounds_as_bitsandbytes()
    quantization._rounds_as_bitsandbytes.cache_clear()


@pytest.mark.parametrize(("dtype", "cut"), [(torch.bfloat16, 16), (torch.float16, 13)])
def test_values_are_rounded_as_bitsandbytes_rounds_them(dtype, cut):
    """Also those halfway between two of the type, of which -1 and 1 times such a constant are thousands."""
    random = torch.Generator().manual_seed(0)
    codes = quantization.Codes4bit((1024, 1024), double=False)
    codes.packed = torch.randint(0, 256, codes.packed.shape, generator=random, dtype=torch.uint8)
    bits = torch.rand(codes.constants.shape, generator=random).view(torch.int32)
    codes.constants = (bits >> cut << cut | 2 ** (cut - 1)).view(torch.float32)
    state = bnb_functional.QuantState(
        codes.constants, torch.Size((1024, 1024)), blocksize=64, quant_type="nf4", dtype=dtype
    )
    exact = codes.dequantize(0, 1024, torch.float32)
    assert int((exact.view(torch.int32) % 2**cut == 2 ** (cut - 1)).sum()) > 50_000
    assert torch.equal(codes.dequantize(0, 1024, dtype), bnb_functional.dequantize_4bit(codes.packed, state))
    assert not torch.equal(exact, exact.to(dtype).float())


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    columns=st.sampled_from([5, 64, 96, 128]),
    rank=st.integers(1, 9),
    transposed=st.booleans(),
    dora=st.booleans(),
    double=st.booleans(),
    piece=st.sampled_from([64, 500, 2**17]),
    mode=st.sampled_from(["dequantized", "original"]),
    dtype=st.sampled_from(["float16", "float32", "bfloat16", "bfloat16_nearest"]),
)
def test_any_piece_of_any_shape_is_the_dense_merge_in_float64(
    tmp_path, monkeypatch, rows, columns, rank, transposed, dora, double, piece, mode, dtype
):
    """One weight through the writer, with every size of piece, against matrices in float64."""
    monkeypatch.setattr(merge_module, "PIECE", piece)
    monkeypatch.setattr(merge_module, "QUANTIZED_PIECE", max(64, piece // 2))
    random = torch.Generator().manual_seed(rows * columns + rank)

    def draw(*shape):
        return torch.randn(shape, generator=random)

    weight, a, b, magnitude = (
        draw(rows, columns).bfloat16(),
        draw(rank, columns),
        draw(rows, rank),
        draw(rows),
    )
    stored = {"w.weight": weight.T.contiguous() if transposed else weight, "n": draw(333).bfloat16()}
    save_file(stored, tmp_path / "base.safetensors")
    save_file({"a": a, "b": b, "m": magnitude}, tmp_path / "adapter.safetensors")
    base, adapter = (
        {tensor.name: tensor for tensor in stored_tensors(tmp_path / f"{file}.safetensors")}
        for file in ("base", "adapter")
    )
    plan = object.__new__(MergePlan)
    plan.quantization = quantization.Quantization(kind="nf4", double=double, load_dtype=torch.bfloat16)
    values, found = plan.quantization.round_trip(weight)
    plan.record = {"quantization": {"codes": {"w": found}}}
    plan.mode, plan.rounding, plan.transposed = mode, dtype, {"w.weight": transposed}
    plan.stored_as = {"w.weight": "w", "n": "n"}
    update = Update(adapter["a"], adapter["b"], 0.3, adapter["m"] if dora else None, transposed)
    plan.updates = {"w.weight": update}
    writer = TensorWriter(
        tmp_path / "out", {"n": (plan.dtype, (333,)), "w": (plan.dtype, base["w.weight"].shape)}
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    with Workers() as workers:
        _write_tensor(plan, "w.weight", base["w.weight"], writer, workers)
        _write_tensor(plan, "n", base["n"], writer, workers)
    torch.set_num_threads(threads)
    writer.close()
    written = load_file(tmp_path / "out")
    exact = (values if mode == "dequantized" else weight).double() + 0.3 * (b.double() @ a.double())
    if dora:
        exact = exact * (magnitude.double() / exact.norm(dim=1))[:, None]
    error = ((written["w"].T if transposed else written["w"]).double() - exact).abs()
    step = {"float16": 2**-11, "float32": 0, "bfloat16": 2**-7, "bfloat16_nearest": 2**-8}[dtype]
    assert (error <= step * exact.abs() + 2**-25 + 2e-6 * (exact.abs().max() + 1)).all()
    assert torch.equal(written["n"], stored["n"].to(plan.dtype))


@st.composite
def runs(draw):
    """A family, and settings of quantisation and adapter that fit together: all that a LoRA made here can hold."""
    family = draw(st.sampled_from(["llama", "qwen2", "gemma2", "gpt2"]))
    quantization = draw(st.sampled_from(["nf4", "none"]))
    starts = {"nf4": ["default", "orthogonal", "loftq"], "none": ["default", "gaussian", "pissa", "olora"]}
    init = draw(st.sampled_from(starts[quantization]))
    if family == "gpt2" and init in ("olora", "loftq"):
        init = "default"  # refused there
    layers = (
        ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "up_proj", "down_proj"]
    )
    ranks = st.sampled_from([2, 4, 6]) if init == "orthogonal" else st.integers(1, 9)
    alphas = st.floats(0.5, 40.0)
    targets = draw(
        st.just(("all-linear",)) | st.lists(st.sampled_from(layers), min_size=1, unique=True).map(tuple)
    )
    adapted = layers if targets == ("all-linear",) else list(targets)
    chosen = draw(st.sampled_from([(), (1,), (0, 2)]))
    # a pattern that picks no layer with an adapter is refused
    some = st.sampled_from([*adapted, *([] if chosen == (0, 2) else [rf".*\.1\..*{adapted[0]}"])])
    adapter = {
        "rank": draw(ranks),
        "alpha": draw(alphas),
        "rank_pattern": draw(st.dictionaries(some, ranks, max_size=2)),
        "alpha_pattern": draw(st.dictionaries(some, alphas, max_size=2)),
        "target_modules": targets,
        "layers_to_transform": chosen,
        "use_rslora": draw(st.booleans()),
        "use_dora": init in ("default", "gaussian", "orthogonal") and draw(st.booleans()),
        "init": init,
    }
    model = {"quantization": quantization, "load_dtype": "bfloat16" if quantization == "nf4" else "float32"}
    check_settings(
        {"output_dir": "run", "model": {"base": "b", **model}, "adapter": adapter, "data": {"train": "d"}}
    )
    return family, model, adapter


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases of several families, each made once."""
    folder = tmp_path_factory.mktemp("families")
    return cache(lambda family: make_base(folder / family, family))


LARGE_START = (
    "llama",
    {"quantization": "none", "load_dtype": "float32"},
    {"rank": 1, "alpha": 34.0, "target_modules": ("all-linear",), "init": "olora"},
)
"""A start that takes ten times the base's largest values out of it."""


@settings(max_examples=25, deadline=None)
@given(run=runs(), shaken=st.integers(0, 9))
@example(run=LARGE_START, shaken=0)
def test_any_adapter_that_settings_can_make_is_the_dense_merge_in_float64(
    bases, tmp_path_factory, run, shaken
):
    family, model_settings, adapter_settings = run
    folder = tmp_path_factory.mktemp("merge")
    model = make_model(bases(family), adapter=AdapterSettings(**adapter_settings), **model_settings)
    adapter = saved(shake(model, seed=shaken), folder / "adapter")
    merge(adapter, folder / "merged", MergeSettings(dtype="float32"))
    written = load_file(folder / "merged" / "model.safetensors")
    expected = dense_merge(model)
    assert expected
    for name, tensor in expected.items():
        found = written[name].double()
        error = (found.T if family == "gpt2" else found) - tensor
        below = model.classifier.get_submodule(name.removesuffix(".weight")).get_base_layer().weight
        # PiSSA and OLoRA leave W - scale B0 A0 below, rounded to float32 at a size that can be many times W's
        largest = max(float(x.abs().max()) for x in (tensor, below) if x.is_floating_point())
        assert float(error.abs().max()) < 1e-6 * max(1.0, largest), name
    check_weights(MergePlan(adapter, MergeSettings(dtype="float32")), folder / "merged")
    shutil.rmtree(folder)


def test_two_merges_give_the_same_bytes(tmp_path):
    base = make_base(tmp_path / "base", shards=True)
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    threads = torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        merge(adapter, tmp_path / f"merged{number}")
    torch.set_num_threads(threads)
    assert contents(tmp_path / "merged1") == contents(tmp_path / "merged3")


def contents(folder):
    """Names and bytes of all files, hidden ones too."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_killed_merge_goes_on_at_the_last_whole_shard(tmp_path):
    """Real processes, ended by SIGKILL after every second shard, in the middle of writing, and at random moments."""
    base = make_base(tmp_path / "base", shards=True)
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "undisturbed")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, script, adapter, tmp_path / "merged"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    resumed = [int(words) for words in re.findall(r"interrupted merge: (\d+) of its files", done.stdout)]
    assert {1, 3} <= set(resumed)
    assert resumed == sorted(resumed)  # nothing that was whole is written again
    assert contents(tmp_path / "merged") == contents(tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".merged*"))


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import lora_rm.merge as module
torch.set_num_threads(1)
finish, write = module.UnfinishedFolder.finish, module.TensorWriter.write

def run(shards=None, writes=None, seconds=None):
    child = os.fork()  # before any thread exists
    if child == 0:
        count = {"shards": 0, "writes": 0}
        def die(kind, limit):
            count[kind] += 1
            if count[kind] == limit:
                os.kill(os.getpid(), signal.SIGKILL)
        def counted_finish(self, *args):
            finish(self, *args)
            die("shards", shards)
        def counted_write(self, *args):
            write(self, *args)
            die("writes", writes)
        module.UnfinishedFolder.finish, module.TensorWriter.write = counted_finish, counted_write
        module.merge(Path(sys.argv[1]), Path(sys.argv[2]))
        sys.stdout.flush()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert run(shards=1) == -9
assert run(shards=2) == -9
assert run(writes=5) == -9
for seed in range(3):
    if not Path(sys.argv[2]).exists():
        run(seconds=random.Random(seed).uniform(0, 0.4))
if not Path(sys.argv[2]).exists():
    assert run() == 0
"""


def test_what_an_other_merge_left_is_not_taken_over(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    partial = tmp_path / ".merged.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"of another adapter")
    (partial / "progress.json").write_text('{"identity": {}, "finished": {"model.safetensors": {}}}')
    merge(adapter, tmp_path / "merged")
    merge(adapter, tmp_path / "again")
    assert contents(tmp_path / "merged") == contents(tmp_path / "again")


def test_a_merge_of_anything_else_has_another_identity(tmp_path):
    """Else its interrupted shards would be taken over."""
    base = make_base(tmp_path / "base")
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")

    def identity(**settings):
        return json.dumps(MergePlan(adapter, MergeSettings(**settings)).identity())

    found = [identity()]
    assert identity() == found[0]
    found += [identity(dtype="float32"), identity(dtype="bfloat16"), identity(dtype="bfloat16_nearest")]
    found += [identity(base="original"), identity(base="requantizable")]
    weights = base / "model.safetensors"
    weights.touch()
    found.append(identity())
    for file in ("adapter_config.json", "lora_rm.json"):
        (adapter / file).write_text((adapter / file).read_text() + " ")
        if file != "lora_rm.json":
            renew_hash(adapter)
        found.append(identity())
    other = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in other.items()}, adapter / "adapter_model.safetensors")
    renew_hash(adapter)
    found.append(identity())
    assert len(set(found)) == len(found)
    (adapters,) = {tuple(json.loads(text)["adapter"]) for text in found}
    assert adapters == ("adapter_model.safetensors", "adapter_config.json", "lora_rm.json")
    assert len({json.loads(text)["adapter"]["adapter_model.safetensors"] for text in found}) == 2


def test_two_merges_into_one_folder_and_a_full_disk_are_refused(base, tmp_path, monkeypatch):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    partial = tmp_path / ".merged.partial"
    partial.mkdir()
    with (
        unfinished._only_one(partial, ""),
        pytest.raises(MergeError, match="another process is writing this merge"),
    ):
        merge(adapter, tmp_path / "merged")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(StorageError, match="GB more, and 0.0 GB are free"):
        merge(adapter, tmp_path / "merged")


def test_no_room_is_asked_for_shards_that_are_written(base, tmp_path, monkeypatch):
    plan = MergePlan(saved(shake(make_model(base)), tmp_path / "adapter"), MergeSettings())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    _check_space(plan, tmp_path / "merged", SimpleNamespace(path=tmp_path, finished=plan.shards))
    with pytest.raises(StorageError):
        _check_space(plan, tmp_path / "merged", SimpleNamespace(path=tmp_path, finished={}))


def test_fused_experts_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "mixtral", {"num_local_experts": 4, "sliding_window": None})
    base = make_base(tmp_path / "base", "mixtral")
    adapter = AdapterSettings(rank=4, alpha=12.0, target_modules=("q_proj", "v_proj"))
    model = shake(make_model(base, quantization="none", adapter=adapter))
    with pytest.raises(MergeError, match="experts.*cannot be merged yet"):
        merge(saved(model, tmp_path / "adapter"), tmp_path / "merged")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_what_could_not_be_merged_is_told_before_it_is_trained(tmp_path, monkeypatch, capsys, family):
    more = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    monkeypatch.setitem(FAMILIES, family, {**more, "sliding_window": None})
    values = {
        "output_dir": str(tmp_path / "run"),
        "model": {"base": str(make_base(tmp_path / "base", family)), "compute_dtype": "float32"},
    }
    with pytest.raises(
        MergeError, match=r"experts.*: is adapted, but.*Experts are fused.*target-modules q_proj"
    ):
        open_model(check_settings(values))
    assert "not merged" not in capsys.readouterr().out
    open_model(check_settings({**values, "adapter": {"target_modules": ["q_proj", "v_proj"]}}))
    said = " ".join(capsys.readouterr().out.split())
    assert "can be scored, but not merged or exported" in said
    assert "experts.down_proj" in said


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_check_before_training_has_nothing_to_say_of_what_can_be_merged(
    tmp_path, capsys, family, quantization
):
    model = make_model(make_base(tmp_path / "base", family, shards=True), quantization=quantization)
    capsys.readouterr()
    check_mergeable(model)
    assert not capsys.readouterr().out


def test_adapters_combined_with_weights_are_the_weighted_sum(base, tmp_path):
    """Other ranks, scales and layers on both sides; the combined adapter also opens as any adapter does."""
    kinds = (ADAPTERS["patterns"], AdapterSettings(rank=3, alpha=5.0, use_rslora=True, target_modules=("q_proj", "down_proj")))  # fmt: skip
    models = [
        shake(make_model(base, adapter=kind), seed=number) for number, kind in enumerate(kinds, start=1)
    ]
    adapters = [saved(model, tmp_path / f"adapter{number}") for number, model in enumerate(models)]
    combined = combine_runs(adapters, (0.7, -0.4), tmp_path / "combined")
    merge(combined, tmp_path / "merged", MergeSettings(dtype="float32"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    dense = [dense_merge(model) for model in models]
    assert dense[0].keys() > dense[1].keys()
    for name, first in dense[0].items():
        weight = training_weight(models[0], name)
        expected = weight + 0.7 * (first - weight)
        if name in dense[1]:
            expected -= 0.4 * (dense[1][name] - weight)
        assert float((written[name].double() - expected).abs().max()) < 1e-6, name
    assert torch.allclose(written["score.weight"], 0.7 * models[0].head - 0.4 * models[1].head, atol=1e-7)
    canaries = json.loads((combined / "lora_rm.json").read_text())["canaries"]
    opened = RewardModel.load_merged(tmp_path / "merged", compute_dtype="float32")
    opened.choose_batching()
    found = Scorer(opened).score_ids([canary["ids"] for canary in canaries])
    assert found == pytest.approx([canary["reward"] for canary in canaries], abs=1e-4)


def training_weight(model, name):
    """The dequantised weight of an adapted layer, in float64."""
    weight = model.classifier.get_submodule(name.removesuffix(".weight")).get_base_layer().weight
    return bnb_functional.dequantize_4bit(weight.data, weight.quant_state).double()


def test_adapters_that_cannot_be_combined_are_refused(base, tmp_path):
    kinds = {"nf4": {}, "none": {"quantization": "none"}, "dora": {"adapter": ADAPTERS["dora"]}}
    lora, plain, dora = (
        saved(shake(make_model(base, **kind)), tmp_path / name) for name, kind in kinds.items()
    )
    with pytest.raises(MergeError, match="its quantization is not that of"):
        combine([lora, plain], (0.5, 0.5), tmp_path / "combined")
    with pytest.raises(MergeError, match="is a DoRA"):
        combine([lora, dora], (0.5, 0.5), tmp_path / "combined")
    with pytest.raises(MergeError, match="one number each"):
        combine([lora, dora], (0.5, 0.0), tmp_path / "combined")
    assert not (tmp_path / "combined").exists()


def test_combining_replaces_nothing_but_a_combined_adapter(base, tmp_path):
    """The command writes beside --out, where somebody's own adapter may lie; a link to another disk stays one."""
    lora = saved(shake(make_model(base)), tmp_path / "lora")
    before = contents(lora)
    (tmp_path / "mine").mkdir()
    for folder in (lora, tmp_path / "mine"):
        with pytest.raises(MergeError, match="exists, and is no combined adapter"):
            combine([lora, lora], (0.5, 0.5), folder)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "combined")
    for weights in ((0.5, 0.5), (1.0, -0.5)):
        combine([lora, lora], weights, link)
    assert link.is_symlink()
    assert [row["weight"] for row in json.loads((link / "lora_rm.json").read_text())["combined"]] == [
        1.0,
        -0.5,
    ]
    with pytest.raises(MergeError, match="one of those to combine"):
        combine([link, lora], (0.5, 0.5), tmp_path / "combined")
    assert contents(lora) == before


def test_a_combination_that_was_interrupted_is_not_there(base, tmp_path, monkeypatch):
    lora = saved(shake(make_model(base)), tmp_path / "lora")
    with monkeypatch.context() as patch:
        patch.setattr(
            "lora_rm.combine.save_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "no space"))
        )
        with pytest.raises(StorageError, match="combined: cannot be written"):
            combine([lora, lora], (0.5, 0.5), tmp_path / "combined")
    assert not (tmp_path / "combined").exists()
    combine([lora, lora], (0.5, 0.5), tmp_path / "combined")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["combined", "lora"]


def test_another_model_is_measured_and_not_called_wrong(base, tmp_path, capsys, scored_here):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", MergeSettings(base="requantizable"))
    parity = verify(adapter, tmp_path / "merged")
    assert parity["passed"]
    assert not parity["is_trained_model"]
    assert parity["changes"].keys() > {"library", REQUANTIZED}
    assert parity["changes"]["library"]["mean"] > 0.005
    assert "another model than the trained one: its rewards in 4 bit differ by" in capsys.readouterr().out
    assert scored_here == ["auto"] * 3


def test_refuses_to_overwrite_and_replaces_when_told(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    (tmp_path / ".merged.v2.partial").mkdir()  # of another merge
    merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".merged.v2.partial", "adapter", "merged"]
    with pytest.raises(MergeError, match="exists already"):
        merge(adapter, tmp_path / "merged")
    merge(adapter, tmp_path / "merged", MergeSettings(overwrite=True))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "run" / "parity.json").write_text("{}")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    for out in (adapter, base, tmp_path / "run", tmp_path / "thesis", tmp_path):
        before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
        with pytest.raises(MergeError, match="is not replaced"):
            merge(adapter, out, MergeSettings(overwrite=True))
        assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    for out in (tmp_path / "thesis.tex", tmp_path / "parity.json"):
        out.write_text("mine")
        with pytest.raises(MergeError, match="is not replaced"):
            merge(adapter, out, MergeSettings(overwrite=True))
        assert out.read_text() == "mine"
        assert not out.with_name(f".{out.name}.partial").exists()


def test_a_single_file_of_any_name_can_be_opened(tmp_path, scored_here):
    base = make_base(tmp_path / "base")
    name = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / name)
    weights = dict.fromkeys(load_file(base / name), name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", MergeSettings(dtype="float32"))
    assert verify(adapter, tmp_path / "merged")["passed"]


def test_float16_weights_are_scored_in_float32_as_they_are_stored(base, tmp_path):
    """In half of the memory, with the rewards of weights that lie there in float32."""
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged")
    model = RewardModel.load_merged(tmp_path / "merged", compute_dtype="float32")
    layer = model.backbone.layers[0].mlp.up_proj
    assert (type(layer), layer.weight.dtype) == (quantization.StoredLinear, torch.float16)
    model.choose_batching()
    assert model.batching == "shared"
    found = Scorer(model.eval()).score_ids(ROWS)
    with tempfile.TemporaryDirectory() as scratch:
        plain = verify_module.open_plain(tmp_path / "merged", scratch)
        # most layers in a file, as those of a large model would be
        parted = verify_module.open_plain(tmp_path / "merged", scratch, {"cpu": "300KB"})
        assert set(parted.hf_device_map.values()) == {"cpu", "disk"}
        with torch.no_grad():
            for opened in (plain, parted):
                rewards = [float(opened(input_ids=torch.tensor([ids])).logits) for ids in ROWS]
                assert found == pytest.approx(rewards, abs=1e-5)


def test_gemma_in_bfloat16_is_scored_as_transformers_does(tmp_path):
    """The factor of its embeddings, a root of the width, is no bfloat16 value."""
    base = make_base(tmp_path / "base", "gemma3_text", hidden_size=48)
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", MergeSettings(dtype="bfloat16"))
    found = verify_module.score_rows(tmp_path / "merged", ROWS, "merged")
    assert found["library"] == pytest.approx(found["transformers, one by one"], abs=1e-5)
    assert len({round(reward, 3) for reward in found["library"]}) == 3


@pytest.mark.parametrize("kind", ["nf4", "none"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_a_base_that_changed_since_training_is_found(tmp_path, kind, name):
    changed = make_base(tmp_path / "base")
    adapter = saved(shake(make_model(changed, quantization=kind)), tmp_path / "adapter")
    RewardModel.load_adapter(adapter)
    tensors = load_file(changed / "model.safetensors")
    tensors[name].view(-1)[3] += 1.0
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"was trained on {changed}, whose model.safetensors is not that"):
        RewardModel.load_adapter(adapter)
    if kind == "nf4" and "up_proj" in name:
        with pytest.raises(MergeError, match="up_proj.*codes are not those"):
            merge(adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_a_machine_that_quantises_otherwise_is_found(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    record = json.loads((adapter / "lora_rm.json").read_text())
    record["quantization"]["codes"]["model.layers.1.mlp.up_proj"] = "00"
    (adapter / "lora_rm.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"1 of \d+ quantised layers.*not those it was.*up_proj"):
        RewardModel.load_adapter(adapter)


def test_a_base_that_moved_is_named_once(tmp_path, monkeypatch, capsys):
    old = make_base(tmp_path / "cluster", shards=True)
    model = shake(make_model(old))
    adapters = [str(saved(model, tmp_path / name)) for name in ("first", "second")]
    rows = [[1, 5, 9, 7, 3], [1, 8, 4, 2]]
    expected = Scorer(model.eval()).score_ids(rows)
    new = old.rename(tmp_path / "here")

    def status(*words):
        try:
            return main(["merge", *words])
        except SystemExit as end:
            return end.code

    assert status(adapters[0]) == 1
    error = capsys.readouterr().err
    assert f"there is no folder {old}" in error
    assert "`lora-rm merge RUN --model.base FOLDER`" in error
    for opened in (
        RewardModel.load_adapter,
        lambda folder: combine([folder, folder], (0.5, 0.5), tmp_path / "x"),
    ):
        with pytest.raises(ModelError, match="there is no folder .*lora-rm merge RUN --model.base FOLDER"):
            opened(Path(adapters[0]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_rm.workflow.verify", lambda *_, **__: {})
    assert status(adapters[0], "--model.base", "here") == 0
    assert json.loads((tmp_path / "first-merged" / MERGE_RECORD).read_text())["base"] == str(new)
    opened = RewardModel.load_adapter(
        Path(adapters[0]), compute_dtype="float32"
    ).eval()  # with no word of the base
    assert Scorer(opened).score_ids(rows) == pytest.approx(expected, abs=1e-5)
    # of several runs all are told, and the first knows already
    assert status(*adapters[:1], "--with", adapters[1], "--out", "both", "--model.base", "here") == 0
    assert json.loads((tmp_path / "both" / MERGE_RECORD).read_text())["base"] == str(new)


@pytest.mark.parametrize("damage", ["weights", "config", "a shard more"])
def test_another_base_than_that_of_training_is_not_taken_for_it(tmp_path, damage):
    base = make_base(tmp_path / "base", shards=True)
    adapter = saved(make_model(base), tmp_path / "adapter")
    other = shutil.copytree(base, tmp_path / "other")
    shards = sorted(other.glob("*.safetensors"))
    if damage == "a shard more":
        index = json.loads((other / "model.safetensors.index.json").read_text())
        index["weight_map"]["more"] = "more.safetensors"
        (other / "model.safetensors.index.json").write_text(json.dumps(index))
        shutil.copy(shards[0], other / "more.safetensors")
    else:
        changed = shards[1] if damage == "weights" else other / "config.json"
        changed.write_bytes(changed.read_bytes() + b" ")
    name = {"weights": shards[1].name, "config": "config.json", "a shard more": "more.safetensors"}[damage]
    before = (adapter / "lora_rm.json").read_bytes()
    with pytest.raises(
        ModelError, match=f"{adapter}: was trained on .*, whose {name} is not that of {other}"
    ):
        move_base(adapter, str(other))
    assert (adapter / "lora_rm.json").read_bytes() == before


def test_an_adapter_without_head_or_with_two_logits_is_refused(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("base_model.model.score.weight")
    save_file(tensors, file)
    renew_hash(adapter)
    with pytest.raises(ModelError, match="no score head"):
        merge(adapter, tmp_path / "merged")
    save_file({**tensors, "base_model.model.score.weight": head.repeat(2, 1)}, file)
    renew_hash(adapter)
    with pytest.raises(ModelError, match="one logit"):
        merge(adapter, tmp_path / "merged")


def test_an_adapter_that_cannot_be_proven_names_a_way_on(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    record = json.loads((adapter / "lora_rm.json").read_text())
    del record["canaries"]
    (adapter / "lora_rm.json").write_text(json.dumps(record))
    merge(adapter, tmp_path / "merged")
    with pytest.raises(
        MergeError, match=r"no canaries.*`lora-rm train`.* without a proof: lora_rm.merge.merge in Python"
    ):
        verify(adapter, tmp_path / "merged")
    (adapter / "lora_rm.json").unlink()  # as PEFT saves it
    with pytest.raises(
        ModelError, match="no adapter that lora_rm saved.*`lora-rm train`, or merge it with PEFT"
    ):
        merge(adapter, tmp_path / "other")


@pytest.mark.parametrize("found", [None, 7])
def test_an_adapter_whose_weights_have_no_hash_is_refused(base, tmp_path, found):
    adapter = saved(make_model(base), tmp_path / "adapter")
    record = json.loads((adapter / "lora_rm.json").read_text()) | {
        "files": {"adapter_model.safetensors": found}
    }
    (adapter / "lora_rm.json").write_text(json.dumps(record))
    for opened in (RewardModel.load_adapter, lambda folder: merge(folder, tmp_path / "merged")):
        with pytest.raises(
            ModelError, match="lora_rm.json: files.adapter_model.safetensors is (missing|'7')"
        ):
            opened(adapter)


def test_every_tensor_of_the_adapter_must_be_used(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {**tensors, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}, file
    )
    renew_hash(adapter)
    with pytest.raises(MergeError, match="fits no weight"):
        merge(adapter, tmp_path / "merged")
    save_file({**tensors, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}, file)
    renew_hash(adapter)
    with pytest.raises(MergeError, match="cannot be merged"):
        merge(adapter, tmp_path / "merged")
    save_file(tensors | {"base_model.model.model.layers.0.mlp.up_proj.lora_B.bias": torch.ones(96)}, file)
    renew_hash(adapter)
    with pytest.raises(MergeError, match="up_proj.lora_B.bias, which cannot be merged.*lora_bias"):
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
        check_weights(MergePlan(adapter, MergeSettings(dtype="float16")), tmp_path / "merged")


LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "rope", "expected"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            "phi3",
            {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
            {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        ),
        (
            "phi3",
            LONGROPE
            | {
                "rope_type": "longrope",
                "rope_theta": 5e5,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 64,
            },
            {
                "rope_theta": 5e5,
                "partial_rotary_factor": 1.0,
                "rope_scaling": LONGROPE | {"type": "longrope"},
            },
        ),
        ("llama", LLAMA3 | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
            },
            {
                "rope_theta": 2e6,
                "rope_local_base_freq": 3e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
)
def test_rotary_positions_are_told_in_the_words_of_transformers_4_too(tmp_path, family, rope, expected):
    """Which takes 10,000 for a `rope_theta` that it does not find, without a word."""
    base = make_base(tmp_path / "base", family, rope_parameters=rope)
    merge(saved(shake(make_model(base)), tmp_path / "adapter"), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    names = {"rope_theta", "rope_local_base_freq", "rope_scaling", "partial_rotary_factor"} & config.keys()
    assert {name: config[name] for name in names} == expected
    read = [AutoConfig.from_pretrained(tmp_path / name).rope_parameters for name in ("base", "merged")]
    read[1].pop("type", None)  # what version 4 calls rope_type, and asks for with longrope
    assert read[0] == read[1]


def test_the_report_lies_in_the_folder(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged")
    report = json.loads((tmp_path / "merged" / MERGE_RECORD).read_text())
    assert (report["base_weights"], report["dtype"]) == ("dequantized", "float16")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["problem_type"] == "regression"
    assert config["id2label"] == {"0": "LABEL_0"}
    assert config["pad_token_id"] not in (2, None)
    assert oct((tmp_path / "merged" / "model.safetensors").stat().st_mode)[-3:] == "644"
    assert oct((tmp_path / "merged").stat().st_mode)[-3:] == "755"


def test_stochastic_rounding_to_bfloat16_has_no_bias():
    exact = torch.full((2**16,), 1 + 2**-9)  # a quarter of a step above 1
    mean = _stored(exact, "bfloat16", "a").double().mean()
    assert float(mean - 1) == pytest.approx(2**-9, rel=0.05)


def test_the_index_of_a_merge_says_how_large_it_is(tmp_path):
    base = make_base(tmp_path / "base", shards=True)
    merge(saved(shake(make_model(base)), tmp_path / "adapter"), tmp_path / "merged")
    shards = [load_file(file) for file in (tmp_path / "merged").glob("*.safetensors")]
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in shard.values())


def test_weights_three_float16_steps_off_are_not_the_merged_ones(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name].float() * (1 + 3 * 2**-10)).half()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match="not the merged weight"):
        check_weights(MergePlan(adapter, MergeSettings()), tmp_path / "merged")


def test_an_interrupted_merge_is_not_taken_for_one_into_another_base(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", MergeSettings(dtype="float32"))
    assert is_unverified(adapter, tmp_path / "merged", MergeSettings(dtype="float32"))
    assert not is_unverified(adapter, tmp_path / "merged", MergeSettings(dtype="float32", base="original"))


@pytest.mark.parametrize("value", [math.nan, 65520.0])
def test_what_float16_cannot_hold_is_not_written(base, tmp_path, monkeypatch, value):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    plan = MergePlan(adapter, MergeSettings(dtype="float16"))
    name = "model.layers.1.mlp.up_proj.weight"
    monkeypatch.setattr(plan, "keeps", lambda *_: False)
    monkeypatch.setattr(plan, "visit", lambda name, tensor, use, workers: use(0, torch.tensor([value])))
    with pytest.raises(_DoesNotFit):
        _write_tensor(plan, name, None, None, None)


def test_a_proof_takes_as_many_held_out_answers_as_are_wanted(base, tmp_path, scored_here):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", MergeSettings(dtype="float32"))
    held_out = [{"ids": ids, "prompt": 1} for ids in ([1, 9, 3], [1, 7, 2], [1, 6, 4])]
    parity = verify_module.verify(
        adapter, tmp_path / "merged", VerifySettings(num_answers=2), held_out=held_out
    )
    assert parity["num_answers"] == len(ROWS) + 2


def test_a_damaged_adapter_is_not_combined(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match="is not the file that was saved"):
        combine([adapter, adapter], (0.5, 0.5), tmp_path / "combined")


@pytest.mark.parametrize(("part", "value"), [("load_dtype", "float16"), ("tokens", {"adds_bos": False})])
def test_adapters_of_another_type_or_other_ids_are_not_combined(base, tmp_path, part, value):
    one = saved(shake(make_model(base)), tmp_path / "one")
    other = shutil.copytree(one, tmp_path / "other")
    record = json.loads((other / RECORD).read_text())
    (other / RECORD).write_text(json.dumps({**record, part: value}))
    with pytest.raises(MergeError, match=f"its {part} is not that of"):
        combine([one, other], (0.5, 0.5), tmp_path / "combined")
