"""The folder for vLLM: what vLLM would make of each fault is known, so each is refused; vLLM itself is not installed."""

import json
import shutil

import pytest
import transformers
from safetensors.torch import load_file, save_file
from test_gguf import make_merged

from lora_rm.errors import MergeError
from lora_rm.export.vllm import KNOWN, check_servable, export_vllm, serve_command


@pytest.fixture(scope="module")
def merged(base, held_out, tmp_path_factory):
    return make_merged(tmp_path_factory.mktemp("vllm") / "merged", base, held_out)


def parity_of(folder):
    return json.loads((folder / "parity.json").read_text())


def test_a_good_folder_and_its_command(merged, tmp_path):
    out = export_vllm(merged, tmp_path / "my model")
    assert parity_of(out)["target"] == "vllm"
    command = "vllm serve 'my model' --runner pooling --convert classify --dtype float32"
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
        "refuses for gemma2; merge again with --merge.dtype bfloat16",
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


def test_families_that_vllm_knows_exist_in_transformers():
    assert [name for name in KNOWN if not hasattr(transformers, f"{name}ForSequenceClassification")] == []
