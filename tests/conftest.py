"""Tiny models, tokenizers and preferences, made offline."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes test at a time; their threads would spin
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in the tests may reach for the network

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_rm import verify
from lora_rm.config import AdapterSettings, ModelSettings, check_settings
from lora_rm.data.checkable import checkable_preferences
from lora_rm.data.tokens import ChatTokenizer, tokenize
from lora_rm.export import huggingface
from lora_rm.model.base import BaseModel
from lora_rm.model.elementwise import give_back_rotary
from lora_rm.model.quantization import code_hashes
from lora_rm.model.record import write_record
from lora_rm.model.reward_model import RewardModel

SHARED = Path(__file__).parents[2] / "shared" / "data"
"""Real preference data, where a checkout has it beside it."""

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Template of the tiny tokenizers: it writes the BOS itself and ends with the EOS."""

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
"""Every number is chosen so that a mix-up of two sizes cannot pass."""

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 24, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 24, "sliding_window": 8},
    "phi3": {},
    "olmo2": {},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 96,
        "n_positions": 512,
    },
}
"""Families the tree attention is tested with, and what their tiny configs need."""


@cache
def trained_tokenizer() -> str:
    """The byte-level BPE of the tiny tokenizers, which adds a BOS, as JSON."""
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    train, _ = checkable_preferences(60, 15)
    tokenizer.train_from_iterator(
        (m["content"] for p in train for answer in p.answers for m in p.prompt + answer), trainer
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds a BOS, with pad = EOS, the trap of many real ones."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_tokenizer()),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=CHAT,
    )


def make_base(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, shards: bool = False, **more
) -> Path:
    """A tiny random base model with its tokenizer."""
    tokenizer = make_tokenizer()
    shape = {} if family == "gpt2" else SHAPE
    values = {
        "vocab_size": len(tokenizer),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **shape,
        **FAMILIES[family],
        **more,
    }
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    for parameter in model.parameters():  # the default start is so small that every reward would be alike
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.12)
        elif parameter.dim() == 1:  # and so plain that a bias or a norm's weight that is lost would not show
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny Llama in bfloat16."""
    return make_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def chat(base) -> ChatTokenizer:
    return ChatTokenizer.load(base)


@pytest.fixture(scope="session")
def preferences():
    """Training and held-out preferences of the built-in set."""
    return checkable_preferences(60, 30)


@pytest.fixture(scope="session")
def trees(chat, preferences):
    """Token trees of the training preferences."""
    return tokenize(preferences[0], chat, max_length=512)[0]


@pytest.fixture(scope="session")
def held_out(chat, preferences):
    return tokenize(preferences[1], chat, max_length=512)[0]


def make_model(
    base: Path,
    *,
    quantization: str = "nf4",
    seed: int = 0,
    adapter: AdapterSettings | None = None,
    **settings,
) -> RewardModel:
    """A reward model with rank 4 and alpha 12: with alpha = rank a forgotten scale would be invisible."""
    model = RewardModel.load(
        BaseModel(name=str(base), path=Path(base)),
        settings=ModelSettings(quantization=quantization, compute_dtype="float32", **settings),
        adapter=adapter or AdapterSettings(rank=4, alpha=12.0),
        seed=seed,
    )
    model.choose_batching()
    return model


def shake(model: RewardModel, seed: int = 11, size: float = 0.02) -> RewardModel:
    """Gives every trained tensor values far from their start, as training would: B = 0 hides every mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.2 * parameter.std() if "magnitude" in name else size
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.device) * scale)
    return model


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A saved adapter whose rewards are far from each other."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model = shake(make_model(base), size=0.1)
    model.save(folder, model.describe(code_hashes(model.classifier)))
    return folder


@pytest.fixture
def settings(base, tmp_path):
    """Settings of a short run on the tiny base."""
    return check_settings(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"base": str(base), "compute_dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 12},
            "data": {"train": "builtin:checkable", "max_train": 48, "max_eval": 40},
            "train": {
                "preferences_per_step": 8,
                "tokens_per_microbatch": 512,
                "learning_rate": 1e-3,
                "checkpointing": "none",
            },
        }
    )


@pytest.fixture
def show(capsys):
    """Prints a line past pytest's capture."""

    def print_line(line):
        with capsys.disabled():
            print(f"\n{line}")  # noqa: T201

    return print_line


@pytest.fixture
def scored_here(monkeypatch):
    """What a merge and an export for transformers score in fresh processes is scored in this one.

    Gives the devices that were asked for. A fresh process imports for 5 s; that rewards do not depend on this one's
    state, test_workflow.py shows.
    """
    devices = []

    def score(what, program, request, device="auto"):
        devices.append(device)
        with tempfile.TemporaryDirectory() as scratch, monkeypatch.context() as patch:
            file, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
            file.write_text(json.dumps(request), encoding="utf-8")
            patch.setattr(sys, "argv", ["-c", str(file), str(answer)])
            patch.setattr(sys, "path", [*sys.path])
            patch.chdir(scratch)
            give_back_rotary()
            exec(program, {"__name__": "__main__"})
            return json.loads(answer.read_text(encoding="utf-8"))

    for module in (verify, huggingface):
        monkeypatch.setattr(module, "score_in_fresh_process", score)
    return devices


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Token caches of the tests stay out of the user's."""
    if "LORA_RM_CACHE" not in os.environ:
        real = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora_rm" / "models"
        folder = tmp_path_factory.mktemp("cache")
        real.mkdir(parents=True, exist_ok=True)
        (folder / "models").symlink_to(real)  # converting the built-in model takes 20 s: once is enough
        os.environ["LORA_RM_CACHE"] = str(folder)


def renew_hash(adapter):
    """Lets an adapter be opened whose files a test has changed on purpose."""
    write_record(adapter, json.loads((adapter / "lora_rm.json").read_text()))


def killed_in_verification(program: str, *words) -> None:
    """Runs a program that exports and is killed with SIGKILL when all is written and nothing is verified."""
    die = "import os, signal, subprocess\n"
    die += "subprocess.run = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
    command = [sys.executable, "-c", "import sys\n" + die + program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def notes_of(out):
    """What an interrupted export to `out` has finished: its files, and what would tell that they were written again."""
    partial = out.with_name(f".{out.name}.partial")
    notes = json.loads((partial / "progress.json").read_text())
    names = [name for files in notes["finished"].values() for name in files]
    return {name: written(partial / name) for name in names}


def written(file):
    """Which file it is, and when it was written."""
    return file.stat().st_ino, file.stat().st_mtime_ns
