"""The folder for vLLM: what vLLM would make of each fault is known, so each is refused; vLLM itself is not installed."""

import json
import shutil

import bitsandbytes
import pytest
import torch
import transformers
from conftest import (
    killed_in_verification,
    make_base,
    make_merged,
    make_model,
    notes_of,
    parity_of,
    shake,
    written,
)
from safetensors.torch import load_file, save_file

from lora_rm.errors import MergeError
from lora_rm.export.vllm import KNOWN, check_servable, export_vllm, serve_command
from lora_rm.export.vllm_lora import check_adapter, export_vllm_lora, write_base
from lora_rm.model.quantization import code_hashes
from lora_rm.model.reward_model import RewardModel
from lora_rm.score import Scorer


@pytest.fixture(scope="module")
def merged(base, held_out, tmp_path_factory):
    return make_merged(tmp_path_factory.mktemp("vllm") / "merged", base, held_out)


def test_a_good_folder_and_its_command(merged, tmp_path):
    out = export_vllm(merged, tmp_path / "my model")
    assert parity_of(out)["target"] == "vllm"
    command = "vllm serve './my model' --runner pooling --convert classify --dtype float32"
    assert command in (out / "README.md").read_text()  # vLLM would compute a float32 model in float16
    check_servable(out, parity_of(out))


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


FAULTS = {
    "problem_type": (lambda f: change(f, problem_type=None), r"sigmoid\(reward\)"),
    "labels": (lambda f: change(f, id2label={"0": "bad", "1": "good"}), "names 2 labels"),
    "no classifier": (lambda f: change(f, architectures=["LlamaForCausalLM"]), "makes no score head"),
    "unknown": (lambda f: change(f, architectures=["DogeForSequenceClassification"]), "no code of its own for Doge"),
    "no pad": (lambda f: change(f, pad_token_id=None), "pad_token_id is None"),
    "pad ends": (lambda f: change(f, pad_token_id=2), "pad_token_id is 2"),
    "float16": (
        lambda f: change(f, dtype="float16", model_type="gemma2"),
        "refuses for gemma2; merge again with --merge.dtype float32 --merge.overwrite True",
    ),
    "quantised": (lambda f: change(f, quantization_config={"load_in_4bit": True}), "quantization_config"),
    "template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults(merged, tmp_path, name):
    folder = tmp_path / "broken"
    shutil.copytree(merged, folder)
    fault, message = FAULTS[name]
    fault(folder)
    with pytest.raises(MergeError, match=message):
        export_vllm(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lost_head_is_no_noise(merged, tmp_path):
    folder = tmp_path / "headless"
    shutil.copytree(merged, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "score.weight"},
              folder / "model.safetensors")  # fmt: skip
    with pytest.raises(MergeError, match="serves noise where the head is missing"):
        check_servable(folder, parity_of(merged))


def test_the_command_is_quoted():
    assert serve_command("a b", {"dtype": "bfloat16"}, "--enable-lora") == (
        "vllm serve 'a b' --runner pooling --convert classify --dtype bfloat16 --enable-lora"
    )


# -- one base, many adapters ---------------------------------------------------------------------------------


class Run:
    """Where a run's adapter lies."""

    def __init__(self, adapter):
        self.adapter = adapter


@pytest.fixture(scope="module")
def run(base, trees, tmp_path_factory):
    """An adapter on NF4, and a parity.json with its rewards."""
    folder = tmp_path_factory.mktemp("lora")
    model = shake(make_model(base))
    model.save(folder / "adapter", model.describe(code_hashes(model.classifier)) | {"canaries": []})
    return Run(folder / "adapter")


@pytest.fixture(scope="module")
def proven(run, base, held_out, tmp_path_factory):
    """A merged folder whose expected rewards are the adapter's."""
    folder = make_merged(tmp_path_factory.mktemp("proven") / "merged", base, held_out)
    parity = parity_of(folder)
    model = RewardModel.load_adapter(run.adapter, compute_dtype="float32")
    model.choose_batching()
    rewards = Scorer(model.eval()).score_ids([a["ids"] for a in parity["answers"]])
    for answer, reward in zip(parity["answers"], rewards, strict=True):
        answer["reward"] = reward
    (folder / "parity.json").write_text(json.dumps(parity))
    return folder


@pytest.fixture(scope="module")
def exported(run, proven, tmp_path_factory):
    return export_vllm_lora(proven, tmp_path_factory.mktemp("exported") / "out", run=run)


def test_base_and_adapter_give_the_trained_rewards(exported):
    out = exported
    found = parity_of(out)
    (way,) = found["changes"].values()
    assert way["largest"] < 1e-3
    assert not load_file(out / "base" / "model.safetensors")["score.weight"].any()
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base"
    assert "--max-lora-rank 8 --lora-modules reward=adapter" in (out / "README.md").read_text()


def test_the_base_is_the_dequantised_one(run, base, tmp_path):
    write_base(run.adapter, tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(stored[name].float(), original[name].float())
    layer = make_model(base).backbone.layers[1].mlp.up_proj.base_layer
    exact = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert torch.equal(stored[name].float(), exact)
    other = shake(make_model(base, seed=3), seed=4)
    other.save(tmp_path / "other", other.describe(code_hashes(other.classifier)) | {"canaries": []})
    write_base(tmp_path / "other", tmp_path / "base of other")
    weights = [tmp_path / name / "model.safetensors" for name in ("base", "base of other")]
    assert weights[0].read_bytes() == weights[1].read_bytes()  # one base serves both


def test_the_base_of_a_family_that_overflows_is_exact_in_16_bits(tmp_path):
    model = shake(make_model(make_base(tmp_path / "gemma", "gemma2")))
    model.save(tmp_path / "adapter", model.describe(code_hashes(model.classifier)) | {"canaries": []})
    write_base(tmp_path / "adapter", tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    layer = model.backbone.layers[1].mlp.up_proj.base_layer
    exact = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, exact)


def test_a_killed_export_goes_on_with_the_same_bytes(run, proven, exported, tmp_path):
    program = """
from types import SimpleNamespace
from pathlib import Path
from lora_rm.export.vllm_lora import export_vllm_lora
merged, adapter, out = map(Path, sys.argv[1:])
export_vllm_lora(merged, out, run=SimpleNamespace(adapter=adapter))
"""
    whole, killed = exported, tmp_path / "other"
    killed_in_verification(program, proven, run.adapter, killed)
    finished = notes_of(killed)
    assert "base/model.safetensors" in finished
    export_vllm_lora(proven, killed, run=run)
    for name, was in finished.items():
        assert written(killed / name) == was, name
    names = {file.relative_to(whole) for file in whole.rglob("*") if file.is_file()}
    assert names == {file.relative_to(killed) for file in killed.rglob("*") if file.is_file()}
    for name in names:
        assert (killed / name).read_bytes().replace(bytes(killed), bytes(whole)) == (
            whole / name
        ).read_bytes(), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "DoRA, whose magnitudes vLLM does not apply"),
        ({"lora_bias": True}, "trains biases"),
        ({"rank_pattern": {"q_proj": 1024}}, "rank is 1024, vLLM takes up to 512"),
    ],
)
def test_adapters_that_vllm_does_not_apply(tmp_path, values, message):
    config = {"r": 16, "bias": "none", "rank_pattern": {}} | values
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match=rf"{message}.*Use --to vllm, which serves the merged model"):
        check_adapter(tmp_path)


def test_an_adapter_needs_its_run(merged, tmp_path):
    with pytest.raises(MergeError, match="Give the run folder"):
        export_vllm_lora(merged, tmp_path / "out")


def test_families_that_vllm_knows_exist_in_transformers():
    assert [name for name in KNOWN if not hasattr(transformers, f"{name}ForSequenceClassification")] == []
