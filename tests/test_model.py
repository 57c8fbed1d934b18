"""Loading, the head's contract, saving and opening again."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import classifier, make_base, make_model, make_tokenizer, renew_hash, saved, shake
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lora_rm.config import AdapterSettings, ModelSettings
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.errors import ModelError
from lora_rm.model.base import BUILTIN, BaseModel, check_shape, find_base
from lora_rm.model.classifier import check_length, read_config
from lora_rm.model.device import pick_compute_dtype, pick_device, segments_grow
from lora_rm.model.quantization import Quantization, code_hashes, quantized_layers
from lora_rm.model.reward_model import RewardModel
from lora_rm.score import Scorer, load_reward_model


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_the_head_has_one_logit_in_float32_and_is_trained(base, quantization):
    model = make_model(base, quantization=quantization)
    assert model.head.shape == (1, 64)
    assert model.head.dtype == torch.float32
    assert model.head.requires_grad
    assert len(quantized_layers(model)) == (0 if quantization == "none" else 21)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for name, p in model.named_parameters() if name in trained} == {torch.float32}
    count = model.trainable()
    assert count.head == 64
    assert count.adapter == sum(
        4 * (m.in_features + m.out_features)
        for n, m in model.classifier.named_modules()
        if hasattr(m, "lora_A")
    )


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_gradients_reach_every_matrix(base, trees, quantization):
    model = shake(make_model(base, quantization=quantization))
    model.train()
    model.rewards(model.batch(trees[:4])).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


def test_the_head_starts_at_its_standard_deviation_or_at_zero(base):
    head = make_model(base, seed=3).head
    assert float(head.std()) == pytest.approx((64 + 1) ** -0.5, rel=0.3)
    assert torch.equal(head, make_model(base, seed=3).head)
    assert not torch.equal(head, make_model(base, seed=4).head)
    assert float(make_model(base, head_init="zero").head.abs().max()) == 0


def test_no_gradient_is_computed_below_the_first_adapted_layer(base, trees):
    model = make_model(base, adapter=AdapterSettings(rank=4, alpha=12.0, layers_to_transform=(2,)))
    adapted = {
        name.split(".layers.")[1].split(".")[0] for name, p in model.named_parameters() if "lora_A" in name
    }
    assert adapted == {"2"}
    assert model.trainable().adapter > 0
    seen = {}
    for number, layer in enumerate(model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, x, number=number: seen.update({number: x[0].requires_grad})
        )
    model.train()
    model.rewards(model.batch(trees[:2])).sum().backward()
    assert seen == {0: False, 1: False, 2: True}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 96), (70, 64), (96, 5)])
def test_a_round_trip_by_pieces_is_that_of_bitsandbytes(monkeypatch, shape, double):
    import bitsandbytes.functional as functional

    from lora_rm.model import quantization

    monkeypatch.setattr(quantization, "PIECE", 1024)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    values, found = Quantization(kind="nf4", double=double, load_dtype=torch.bfloat16).round_trip(weight)
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    assert torch.equal(values, functional.dequantize_4bit(codes, state))
    assert found == quantization._hash_4bit(codes, state)


def test_the_codes_rebuilt_from_the_checkpoint_are_those_of_the_model(base):
    model = make_model(base)
    hashes = code_hashes(model.classifier)
    tensors = load_file(base / "model.safetensors")
    assert len(hashes) == 21
    for name, found in hashes.items():
        values, rebuilt = Quantization(kind="nf4", double=True, load_dtype=torch.bfloat16).round_trip(
            tensors[f"{name}.weight"]
        )
        assert rebuilt == found, name
        assert values.dtype == torch.bfloat16
        halves, _ = Quantization(kind="nf4", double=True, load_dtype=torch.float16).round_trip(
            tensors[f"{name}.weight"]
        )
        assert not torch.equal(halves.float(), values.float())  # so the load type must be remembered


@pytest.mark.parametrize(("kind", "name"), [("nf4", "_quantize_weight"), ("int8", "_quantize_8bit")])
def test_every_layer_is_quantised_alike_on_every_device(base, monkeypatch, kind, name):
    """On a CPU the codes would not tell: bitsandbytes' own are the same there."""
    from lora_rm.model import quantization

    real, seen = getattr(quantization, name), []
    monkeypatch.setattr(
        quantization, name, lambda weight, **more: seen.append(weight.shape) or real(weight, **more)
    )
    assert len(quantized_layers(make_model(base, quantization=kind))) == len(seen) == 21


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_every_type_use_the_same_weights(base, dtype):
    """bitsandbytes' own products do not; see ExactLinear4bit."""
    import bitsandbytes.functional as functional

    model = make_model(base)
    model.set_compute_dtype(dtype)
    layer = next(iter(quantized_layers(model).values()))
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert weight.dtype == torch.bfloat16
    x = torch.eye(64, requires_grad=True)  # picks single values of the weight, so that nothing is rounded
    y = layer(x)
    assert torch.equal(y, weight.float().T)
    y[:, 3].sum().backward()
    assert torch.equal(x.grad, weight.float()[3].expand(64, -1))


def test_an_evaluation_does_not_spoil_the_weights_for_training(base, trees):
    """bitsandbytes repacks in the first forward pass without gradients on some CPUs."""
    model = make_model(base)
    before = code_hashes(model.classifier)
    model.score(trees[:3])
    assert code_hashes(model.classifier) == before


def test_a_saved_adapter_opens_with_the_same_rewards_under_another_seed(base, tmp_path, trees):
    model = shake(make_model(base))
    expected = model.score(trees[:5])
    adapter = saved(model, tmp_path / "adapter")
    torch.manual_seed(1234)
    opened = load_reward_model(adapter, compute_dtype="float32").model
    assert opened.score(trees[:5]) == expected
    assert torch.equal(opened.head, model.head)
    record = json.loads((adapter / "lora_rm.json").read_text())
    assert record["num_labels"] == 1
    assert set(record["base"]["files"]) == {"config.json", "model.safetensors"}
    assert len(record["quantization"]["codes"]) == 21
    assert record["tokens"]["pad_id"] != record["tokens"]["eos_id"]
    assert sorted(path.name for path in adapter.iterdir() if path.suffix in (".md", ".bin", ".pt")) == []


def test_a_base_with_two_logits_is_refused(tmp_path):
    make_base(tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="one logit"):
        make_model(tmp_path / "base", quantization="none")


def test_training_goes_on_from_the_head_of_a_reward_model(tmp_path, capsys):
    make_base(tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.num_labels = 1
    earlier = AutoModelForSequenceClassification.from_config(config)
    earlier.save_pretrained(tmp_path / "base")
    model = make_model(tmp_path / "base", quantization="none")
    torch.testing.assert_close(model.head, earlier.score.weight.bfloat16().float())
    assert "reward model already" in capsys.readouterr().out


def test_a_merged_model_is_not_quantised_anew_without_a_word(tmp_path):
    """Dequantised NF4 with the update, in NF4 again, loses most of what was trained (benchmarks/merge_fidelity.py)."""
    folder = make_base(tmp_path / "base")
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_pretrained(folder, config=config).save_pretrained(folder)
    (folder / "lora_rm_merge.json").write_text('{"base_weights": "dequantized"}')
    with pytest.raises(ModelError, match="is a merged model of lora_rm.*adapter.start_from RUN"):
        make_model(folder)
    assert make_model(folder, quantization="none") is not None
    (folder / "lora_rm_merge.json").write_text('{"base_weights": "requantizable"}')  # made for it
    assert make_model(folder) is not None


@pytest.mark.parametrize(
    ("stored", "on_cpu"), [("float16", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_what_is_stored_finer_is_not_rounded_to_bfloat16_when_it_is_opened(
    base, tmp_path, monkeypatch, stored, on_cpu
):
    folder = tmp_path / "merged"
    config = AutoConfig.from_pretrained(base)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_pretrained(
        base, config=config, dtype=getattr(torch, stored)
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    monkeypatch.setattr("lora_rm.model.reward_model.pick_compute_dtype", lambda *_: torch.bfloat16)
    assert RewardModel.load_merged(folder, device="cpu").compute_dtype == getattr(torch, on_cpu)


@pytest.mark.parametrize("name", ["v_head.summary.weight", "value_head.weight"])
def test_a_head_of_another_name_is_not_lost(base, tmp_path, name):
    folder = shutil.copytree(base, tmp_path / "base")
    save_file({name: torch.ones(1, 64)}, folder / "value_head.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"holds a head named {name}.*Store it as score.weight"):
        make_model(folder)


def test_a_padding_token_without_embedding_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"'\[PAD\]' has the id 400, but the model has 400 embeddings"):
        make_model(folder)


def test_a_head_that_is_not_finite_is_refused(base, tmp_path):
    adapter = saved(shake(make_model(base)), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.score.weight"][0, 3] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    renew_hash(adapter)
    with pytest.raises(ModelError, match="NaN"):
        RewardModel.load_adapter(adapter)


def test_a_merged_folder_without_head_is_refused(base):
    with pytest.raises(ModelError, match="no score.weight"):
        RewardModel.load_merged(base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "model.base is not set"),
        ("builtin:gpt5", "The only built-in model"),
        ("no/such/folder/here", "there is no folder"),
        ("missing.gguf", "there is no file"),
        ("some-org/some-model", "cannot be fetched from the hub"),
        ("data/part-*", "there is no folder data/part-"),
    ],
)
def test_a_base_that_is_not_there_is_named(name, message):
    with pytest.raises(ModelError, match=message):
        find_base(name)


def test_a_device_that_is_not_there_is_named(base):
    with pytest.raises(ModelError, match="allowed: auto, cpu"):
        make_model(base, device="toaster")
    with pytest.raises(ModelError, match="CUDA devices here"):
        make_model(base, device="cuda:7")


@pytest.mark.parametrize("has_avx", [False, True])
@pytest.mark.parametrize("has_amx", [False, True])
def test_the_type_of_products_that_a_cpu_chooses(base, tmp_path, monkeypatch, has_avx, has_amx):
    """bfloat16 only where it has units for it; never for weights in float16, which that would round."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    fast = torch.bfloat16 if has_avx or has_amx else torch.float32
    assert pick_compute_dtype("auto", torch.device("cpu")) == fast
    for stored, expected in ((torch.float16, torch.float32), (torch.bfloat16, fast)):
        folder = tmp_path / str(stored)
        classifier(base).to(stored).save_pretrained(folder)
        ChatTokenizer.load(base).save(folder)
        model = RewardModel.load_merged(folder, device="cpu")
        assert model.compute_dtype == expected
        assert model.layers[0].mlp.up_proj.weight.dtype == stored


def test_bfloat16_products_keep_float32_rewards_and_head(base, trees):
    model = RewardModel.load(
        str(base),
        settings=ModelSettings(compute_dtype="bfloat16"),
        adapter=AdapterSettings(rank=4, alpha=12.0),
    )
    model.choose_batching()
    model.train()
    rewards = model.rewards(model.batch(trees[:6]))
    assert rewards.dtype == torch.float32
    rewards.sum().backward()
    assert model.head.grad.dtype == torch.float32
    with model.precise():
        assert model.compute_dtype == torch.float32
        exact = model.rewards(model.batch(trees[:6]))
    assert model.compute_dtype == torch.bfloat16
    assert 0 < float((rewards - exact).abs().max()) < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_score_of_an_answer_does_not_depend_on_its_neighbours(base, chat, quantization):
    """LLM.int8's own products do: one outlier changes how a column of the whole row is multiplied."""
    model = make_model(base, quantization=quantization)
    scorer = Scorer(model)
    model.backbone.embed_tokens.weight.data[chat.text_ids(["something"])[0][-1], 5] = 60.0
    rows = chat.text_ids(["<s>one two three", "<s>a", "<s>something else, much longer than the others are"])
    together = scorer.score_ids(rows)
    alone = [scorer.score_ids([row])[0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
def test_the_built_in_model_is_converted_once_and_speaks():
    base = find_base(BUILTIN)
    assert find_base(BUILTIN).path == base.path
    assert [file.name for file in base.weight_files] == ["model.safetensors"]
    scorer = Scorer(RewardModel.load(base, settings=ModelSettings(compute_dtype="float32")))
    assert scorer.model.trainable().total > 134_000_000
    assert scorer.model.choose_batching() == "shared"
    assert scorer.model.chat.pad_id != scorer.model.chat.tokenizer.eos_token_id
    assert len(scorer.score("What is 2 + 2?", ["4", "5"])) == 2


def test_the_tiny_tokenizer_has_the_trap_it_is_made_for():
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"a": [{"b": "x"}]}, r"a\[0\].b is 'x'"),
        ({"a": [{"b": 10**400}]}, r"a\[0\].b is"),
        ({"a": []}, r"a is '\[\]'"),
        ({}, "a is missing"),
        ({"a": {"b": 1}}, "a is"),
    ],
)
def test_a_file_of_another_shape_is_named_with_its_place(values, named):
    check_shape(Path("f.json"), {"a": [{"b": 1.5}, {"b": 2}]}, {"a": [{"b": float | int}]})
    with pytest.raises(ModelError, match=f"f.json: {named}"):
        check_shape(Path("f.json"), values, {"a": [{"b": float | int}]})


def test_only_the_files_that_transformers_loads_are_the_base(base, tmp_path):
    """An earlier state's shard, a variant and Mistral's consolidated file may lie beside them."""
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    expected = find_base(str(folder)).weight_files
    assert [file.name for file in expected] == ["model.safetensors"]
    stale = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    for name in ("consolidated.safetensors", "model-00001-of-00001.safetensors", "model.fp16.safetensors"):
        save_file(stale, folder / name, metadata={"format": "pt"})
    assert find_base(str(folder)).weight_files == expected
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(stale, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in find_base(str(folder)).weight_files] == ["model-00001-of-00002.safetensors"]
    model, plain = make_model(folder, quantization="none"), make_model(base, quantization="none")
    assert torch.equal(model.backbone.norm.weight, plain.backbone.norm.weight)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter_config.json"):
        find_base(str(folder))


def test_what_is_imported_says_nothing():
    """On CPUs with bfloat16 bitsandbytes advises to install a package, for a kernel that is not used here."""
    words = [sys.executable, "-c", "import lora_rm.model.reward_model"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_a_file_that_was_written_again_is_hashed_again(tmp_path):
    for text in ("{}", '{"a": 1}'):
        (tmp_path / "config.json").write_text(text)
        found = BaseModel(name="x", path=tmp_path).file_hashes()["config.json"]
        assert found == hashlib.sha256(text.encode()).hexdigest()


def test_a_conversation_may_be_as_long_as_the_positions_reach(tmp_path):
    config = read_config(BaseModel(name="b", path=make_base(tmp_path / "base", "gpt2")))
    check_length(config, 512, "It")
    with pytest.raises(ModelError, match="It is 513 tokens long"):
        check_length(config, 513, "It")


@pytest.mark.parametrize(
    ("variable", "system", "grow"),
    [
        (None, "6.8.0-generic", True),
        (None, "5.15.153.1-microsoft-standard-WSL2", False),
        ("PYTORCH_ALLOC_CONF", "6.8.0-generic", False),
        ("PYTORCH_CUDA_ALLOC_CONF", "6.8.0-generic", False),
    ],
)
def test_the_allocator_is_asked_for_segments_that_grow_unless_it_was_told(
    monkeypatch, variable, system, grow
):
    found = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    monkeypatch.setattr("platform.release", lambda: system)
    for name, value in {"device_count": 1, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:128")
    assert segments_grow() == grow
    assert pick_device("cuda").type == "cuda"
    assert found == ["expandable_segments:True"] * grow
