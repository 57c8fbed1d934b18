"""What SECURITY.md promises: no file runs code, nothing is written elsewhere, no secret is written at all."""

import ast
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

from lora_rm import load_reward_model
from lora_rm.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from lora_rm.cli import main
from lora_rm.config import DataSettings, Settings, check_settings, dump_settings
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.errors import ConfigError, DataError, LoraRmError, ModelError, redacted
from lora_rm.export.huggingface import model_card
from lora_rm.merge import merge
from lora_rm.model.base import BaseModel, find_base
from lora_rm.model.classifier import read_config
from lora_rm.model.reward_model import RewardModel
from lora_rm.workflow import train_run

PACKAGE = Path(__file__).parents[2] / "lora_rm"
SECRETS = {"HF_TOKEN": "hf_notARealTokenButLongEnough", "WANDB_API_KEY": "0123456789abcdef0123", "DB_PASSWORD": "correct-horse"}  # fmt: skip


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


UNPICKLED: list[str] = []
"""Names that any unpickler looked up since the test began."""

sys.addaudithook(lambda event, args: UNPICKLED.append(str(args)) if event == "pickle.find_class" else None)


@pytest.fixture
def trap(tmp_path):
    """Writes a booby-trapped file; at the end of the test nothing in one was executed or even looked up."""
    sentinel = tmp_path / "executed"

    def plant(file):
        torch.save({"weight": Trap(sentinel)}, file)
        return file

    UNPICKLED.clear()
    yield plant
    assert not sentinel.exists(), "a booby-trapped file was executed"
    assert not [name for name in UNPICKLED if "pathlib" in name], "a booby-trapped file was unpickled"


@pytest.fixture
def copied(base, tmp_path):
    """A copy of the tiny base."""
    return Path(shutil.copytree(base, tmp_path / "copied"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A saved adapter of the tiny base."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model = make_model(base, quantization="none")
    model.save(folder, model.describe({}))
    return folder


# Weights that run code.


def test_the_trap_springs(tmp_path):
    sentinel = tmp_path / "executed"
    torch.save(Trap(sentinel), tmp_path / "a.bin")
    UNPICKLED.clear()
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert sentinel.exists()
    assert any("pathlib" in name for name in UNPICKLED)


def test_a_base_of_pickles_is_refused(copied, trap):
    (copied / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        trap(copied / name)
    with pytest.raises(ModelError, match="may run code when opened.*Convert it to safetensors"):
        RewardModel.load(str(copied))


def test_pickles_beside_safetensors_are_not_opened(copied, trap):
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"):
        trap(copied / name)
    assert make_model(copied, quantization="none").head.shape == (1, 64)


def test_a_pickle_called_safetensors_is_refused(copied, trap, adapter, tmp_path):
    trap(copied / "model.safetensors")
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        make_model(copied, quantization="none")
    own = shutil.copytree(adapter, tmp_path / "adapter")
    trap(own / "adapter_model.safetensors")
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        load_reward_model(own)
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        merge(own, tmp_path / "merged")


def test_an_index_that_names_a_pickle_is_refused(copied, trap):
    trap(copied / "evil.bin")
    write_index(copied, "evil.bin")
    with pytest.raises(ModelError, match=r"index\.json: names 'evil\.bin'"):
        RewardModel.load(str(copied))


def test_an_adapter_of_pickles_is_refused(adapter, trap, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "adapter")
    trap(own / "adapter_model.bin")
    load_reward_model(own)  # the safetensors beside it are read
    (own / "adapter_model.safetensors").unlink()
    for opened in (lambda: load_reward_model(own), lambda: merge(own, tmp_path / "merged")):
        with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
            opened()


def test_checkpoints_are_written_and_read_without_pickle(trap, tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    folder = tmp_path / "step-000001"
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    save_checkpoint(folder, **parts, progress={"step": 1})
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    for file in folder.glob("*.safetensors"):
        load_file(file)
    UNPICKLED.clear()
    assert newest_checkpoint(tmp_path)[0] == folder
    load_checkpoint(folder, **parts)
    assert not UNPICKLED
    for name in ("optimizer.safetensors", "optimizer.pt", "optimizer.bin"):
        trap(folder / name)
    found, passed_over = newest_checkpoint(tmp_path)
    assert found is None
    assert "optimizer.safetensors is damaged" in passed_over[0]
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        load_checkpoint(folder, **parts)


def test_the_audit_covers_pickle_itself(tmp_path):
    UNPICKLED.clear()
    pickle.loads(pickle.dumps(Path))
    assert UNPICKLED


# Code of the model's own.


def write_code(folder, sentinel):
    """A folder whose files ask for evil.py."""
    code = f"from pathlib import Path\nPath({str(sentinel)!r}).touch()\nclass Evil: ...\n"
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py"):
        (folder / name).write_text(code)
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "evil.Evil")
    for name, values in {
        "config.json": {"auto_map": auto_map},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    }.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_code_beside_a_known_model_is_ignored_and_not_passed_on(copied, tmp_path):
    sentinel = tmp_path / "executed"
    write_code(copied, sentinel)
    model = make_model(copied, quantization="none")
    model.save(tmp_path / "adapter", model.describe({}))
    merge(tmp_path / "adapter", tmp_path / "merged")
    load_reward_model(tmp_path / "merged")
    assert not sentinel.exists()
    for folder in ("adapter", "merged"):
        for file in (tmp_path / folder).glob("*.json"):
            assert "evil" not in file.read_text().replace(str(copied), ""), file
        assert not list((tmp_path / folder).glob("*.py"))


def test_a_model_that_needs_its_own_code_is_refused(copied, tmp_path):
    sentinel = tmp_path / "executed"
    write_code(copied, sentinel)
    file = copied / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "evil"}))
    with pytest.raises(ModelError, match="code of its own.*never run"):
        read_config(BaseModel(name="evil", path=copied))
    with pytest.raises(ModelError):
        make_model(copied, quantization="none")
    assert not sentinel.exists()


def test_a_template_cannot_reach_out(tmp_path, base):
    sentinel = tmp_path / "executed"
    file = tmp_path / "evil.jinja"
    for expression in (
        f"''.__class__.__mro__[1].__subclasses__()[104].load_module('os').system('touch {sentinel}')",
        f"cycler.__init__.__globals__.os.system('touch {sentinel}')",
        f"lipsum.__globals__['os'].system('touch {sentinel}')",
    ):
        file.write_text("{{ " + expression + " }}{% for m in messages %}{{ m.content }}{% endfor %}")
        with pytest.raises(ModelError, match="template"):
            ChatTokenizer.load(base, DataSettings(chat_template=str(file)))
        assert not sentinel.exists()


def trusting(source):
    """Calls that let transformers ask whether to run code."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        ast.unparse(call)
        for call in calls
        if ast.unparse(call.func).startswith("Auto")
        and ast.unparse(call.func).endswith(".from_pretrained")
        and not any(
            word.arg == "trust_remote_code" and ast.unparse(word.value) == "False" for word in call.keywords
        )
    ]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_transformers_is_never_allowed_to_run_code(file):
    assert trusting(file.read_text(encoding="utf-8")) == [], "say trust_remote_code=False"


def test_a_call_that_would_ask_is_found():
    assert trusting("x = AutoConfig.from_pretrained(a)")
    assert trusting("AutoModel.from_pretrained(a, trust_remote_code=True)")
    assert not trusting("AutoModel.from_pretrained(a, trust_remote_code=False)\nPeftModel.from_pretrained(a)")


# Names that lead elsewhere.


def write_index(folder, name):
    names = dict.fromkeys(
        load_file(folder / "model.safetensors") if (folder / "model.safetensors").is_file() else ["a"], name
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", "a/../../outside.safetensors", "..\\outside.safetensors",
                                  "a\0.safetensors", "..", "", 5, None, ["a"]])  # fmt: skip
def test_an_index_that_leads_out_of_its_folder_is_refused(copied, name):
    write_index(copied, name)
    with pytest.raises(ModelError, match=r"index\.json: (names|has no)"):
        find_base(str(copied))


def everything(folder):
    """All files under a folder with their contents."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_merge_writes_into_its_folder_alone(copied, tmp_path):
    model = make_model(copied, quantization="none")
    model.save(tmp_path / "adapter", model.describe({}))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.safetensors").write_bytes(b"precious")
    # a link out of the folder of the base is read, as the hub's own cache is made of them, and never written through
    (copied / "model.safetensors").rename(outside / "weights")
    (copied / "model.safetensors").symlink_to(outside / "weights")
    before = everything(tmp_path)
    merge(tmp_path / "adapter", tmp_path / "merged")
    after = everything(tmp_path)
    changed = [path for path, content in after.items() if before.get(path) != content]
    assert changed
    assert {path.parts[0] for path in changed} == {"merged"}
    assert not (tmp_path / "merged" / "model.safetensors").is_symlink()


def test_a_parity_file_of_somebody_else_names_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parity = {
        "answers": [], "spread": 1.0, "num_answers": 1, "changes": {},
        "merge": {"base": "../../../etc/passwd", "base_weights": "original", "dtype": "float32", "adds_bos": False},
    }  # fmt: skip
    card = model_card(parity, None)
    assert "Trained with LoRA on `passwd`" in card
    assert "../" not in card
    assert list(tmp_path.iterdir()) == []


# Secrets.


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_or_printed(settings, secrets, capfd):
    values = json.loads(
        json.dumps(
            {
                "output_dir": settings.output_dir,
                "model": {"base": settings.model.base, "compute_dtype": "float32"},
            }
        )
    )
    run = train_run(check_settings(values | {
        "adapter": {"rank": 4, "alpha": 12},
        "data": {"train": "builtin:checkable", "max_train": 16, "max_eval": 24},
        "train": {"preferences_per_step": 8, "tokens_per_microbatch": 512, "learning_rate": 1e-3, "checkpointing": "none",
                  "save_every_steps": 1, "trackers": ["tensorboard"]},
    }))  # fmt: skip
    written = everything(run.path)
    assert {path.name for path in written} >= {"config.yaml", "metrics.jsonl", "lora_rm.json", "state.json"}
    for path, content in written.items():
        for value in SECRETS.values():
            assert value.encode() not in content, path
    printed = "".join(capfd.readouterr())
    assert not any(value in printed for value in SECRETS.values())


@pytest.mark.parametrize("key", ["data.train", "data.eval", "model.base", "output_dir", "model.revision"])
def test_a_setting_that_holds_a_secret_is_refused_before_anything_is_written(
    key, secrets, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for value, secret in (
        ("https://somebody:hunter22@host/pairs.jsonl", "hunter22"),
        ("https://host/pairs.jsonl?X-Amz-Signature=abcdef123", "abcdef123"),
        (f"x{SECRETS['HF_TOKEN']}y", SECRETS["HF_TOKEN"]),
    ):
        with pytest.raises(SystemExit):
            main(["train", f"--{key}", value])
        printed = "".join(capsys.readouterr())
        assert "ConfigError" in printed
        assert secret not in printed
    assert list(tmp_path.iterdir()) == []


def test_errors_and_settings_made_by_hand_are_redacted(secrets):
    words = f"no answer from https://me:pass@word@host/a?token=1 with {SECRETS['HF_TOKEN']}, https://host/b"
    for kind in (LoraRmError, ConfigError, DataError):
        assert str(kind(words)) == "no answer from https://***@host/a?*** with [HF_TOKEN], https://host/b"
    assert "hunter" not in dump_settings(
        Settings(data=DataSettings(train="https://me:hunter22@host/x.jsonl"))
    )
    assert redacted("a@b ://") == "a@b ://"


def test_short_and_harmless_variables_stay(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    assert redacted("a parallelism") == "a parallelism"
    assert os.environ["MY_TOKEN"] == "a"
