"""Tiny models, tokenizers and preferences, made offline, and what tests of several files do with them."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes test at a time; their threads would spin
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in the tests may reach for the network

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lora_rm import verify
from lora_rm.config import AdapterSettings, ModelSettings, check_settings, save_settings
from lora_rm.data.checkable import checkable_preferences
from lora_rm.data.split import Data, Side
from lora_rm.data.tokens import ChatTokenizer, TokenTree, tokenize
from lora_rm.export import huggingface
from lora_rm.merge import check_mergeable
from lora_rm.model.base import BaseModel
from lora_rm.model.cpu_library import find_compiler, has_instructions
from lora_rm.model.elementwise import give_back_rotary
from lora_rm.model.quantization import code_hashes
from lora_rm.model.record import write_record
from lora_rm.model.reward_model import RewardModel
from lora_rm.score import Scorer, load_reward_model

SHARED = Path(__file__).parents[2] / "shared" / "data"
"""Real preference data, where a checkout has it beside it."""

compiles = pytest.mark.skipif(
    not (has_instructions() and find_compiler()), reason="needs a CPU with AVX512-BF16 and a C compiler"
)
"""For tests of what is compiled for a CPU."""

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


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that one process is not left alone with such a file at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


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


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


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
        **FAMILIES.get(family, {}),
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


def some_trees(vocabulary: int) -> list[TokenTree]:
    """Trees of 3, 2 and 1 answers, prompts of 9, 1 and 4 tokens; longer than the windows of 8, the last by one."""
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    return [
        TokenTree(ids(9), (ids(4), ids(7), ids(1)), kind="ranking", scores=(3.0, 2.0, 1.0)),
        TokenTree(ids(1), (ids(12), ids(3))),
        TokenTree(ids(4), (ids(5),), kind="rating", scores=(0.5,)),
    ]


def separate(model, trees):
    """Rewards of every conversation alone, unpadded, through the model's own attention and its own head."""
    model.set_batching("padded")
    rewards = []
    for tree in trees:
        for ids in tree.conversations():
            input_ids = torch.tensor([ids], device=model.device)
            hidden = model.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
            rewards.append(hidden[0, -1].float() @ model.head[0])
    return torch.stack(rewards)


def gradients(model, rewards):
    weights = torch.linspace(-1.0, 2.0, len(rewards), device=rewards.device)
    model.zero_grad()
    (rewards * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # 1e-5 of the largest entry: single entries near zero are sums that cancel
        distance = float((found[name] - gradient).abs().max() / gradient.abs().max())
        assert distance < 1e-5, f"{name}: {distance:.1e}"


ROWS = [[1, 5, 9, 7, 3], [1, 8, 4, 2], [1, 30, 31, 32, 33, 34, 2]]
"""Conversations as token ids."""


def saved(model, folder, rows=ROWS):
    """Saves the adapter of a model with canaries of its own."""
    check_mergeable(model)
    model.eval()
    record = model.describe(code_hashes(model.classifier))
    with model.precise():
        rewards = Scorer(model).score_ids(rows)
    record["canaries"] = [
        {"ids": ids, "prompt": 0, "text": model.chat.tokenizer.decode(ids[1:]), "reward": reward}
        for ids, reward in zip(rows, rewards, strict=True)
    ]
    model.save(folder, record)
    return folder


def changed(settings, **sections):
    """Settings with some values replaced, section by section."""
    values = asdict(settings)
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return check_settings(values)


def with_values(settings, folder, **train_values):
    """Settings of a run in this folder on the CPU, with some values of training replaced."""
    return changed(settings, output_dir=str(folder), model={"device": "cpu"}, train=train_values)


def data_of(trees):
    return Data(Side([], trees), Side([], trees[:4]))


def launched(
    settings, folder, count: int, *words: str, program=("-m", "lora_rm.cli", "train"), launcher="torchrun"
):
    """Trains in so many processes, the way a user starts them; what the first machine's launcher gave."""
    preset = folder / f"{count}.yaml"
    save_settings(settings, preset)
    torchrun = ["-m", "torch.distributed.run"]
    commands = [[*torchrun, "--standalone", f"--nproc-per-node={count}"]]
    if launcher == "accelerate":
        accelerate = "-m accelerate.commands.launch --multi_gpu --num_machines=1"
        commands = [[*accelerate.split(), f"--num_processes={count}"]]
    elif launcher == "torchrun on two machines":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = f"localhost:{free.getsockname()[1]}"
        nodes = f"--nnodes=2 --nproc-per-node={count // 2} --rdzv-backend=c10d --rdzv-endpoint={place}"
        commands = [[*torchrun, *nodes.split(), f"--node-rank={node}"] for node in (0, 1)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *command, *program, str(preset), *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for command in commands
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert {process.returncode for process in started[1:]} <= {0}, said[1:]
    return subprocess.CompletedProcess(commands[0], started[0].returncode, *said[0])


def numbers(folder):
    """Training lines and evaluation lines of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval" not in line], [line for line in lines if "eval" in line]


def back_to(run, step):
    """Leaves a run as a kill after this step would: no later checkpoint, no numbers, no adapter."""
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run / "adapter")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def rewrite_manifest(checkpoint):
    """Lets a checkpoint be read whose files a test has changed on purpose."""
    manifest = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in checkpoint.iterdir()
        if file.name != "manifest.json"
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def renew_hash(adapter):
    """Lets an adapter be opened whose files a test has changed on purpose."""
    write_record(adapter, json.loads((adapter / "lora_rm.json").read_text()))


def classifier(base):
    """A reward model with a random head on a tiny base, as transformers opens it."""
    config = AutoConfig.from_pretrained(base)
    config.num_labels, config.problem_type = 1, "regression"
    config.pad_token_id = ChatTokenizer.load(base).pad_id
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return model.eval()


def make_merged(folder, base, held_out, num_prompts=6):
    """A folder as merge and verify leave it, with two answers to every prompt."""
    classifier(base).save_pretrained(folder)
    chat = ChatTokenizer.load(base)
    chat.save(folder)
    record = {"base": str(base), "base_weights": "dequantized", "dtype": "float32", "adds_bos": True}
    (folder / "lora_rm_merge.json").write_text(json.dumps(record))
    answers = [
        {"text": chat.tokenizer.decode(ids[1:]), "ids": ids, "prompt": number}
        for number, tree in enumerate(held_out[:num_prompts])
        for ids in tree.conversations()
    ]
    rewards = load_reward_model(folder, compute_dtype="float32").score_ids([a["ids"] for a in answers])
    for answer, reward in zip(answers, rewards, strict=True):
        answer |= {"reward": reward, "merged": reward}
    parity = {
        "passed": True,
        "is_trained_model": True,
        "merge": record,
        "spread": verify.standard_deviation(rewards),
        "num_answers": len(answers),
        "changes": {},
        "without_adapter": {"mean": 0.8},
        "answers": answers,
    }
    (folder / "parity.json").write_text(json.dumps(parity))
    return folder


def parity_of(folder):
    return json.loads((folder / "parity.json").read_text())


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
def fresh_accelerator():
    """Accelerate keeps its state for the whole process and refuses another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def show(capsys):
    """Prints a line past pytest's capture."""

    def print_line(line):
        with capsys.disabled():
            print(f"\n{line}")  # noqa: T201

    return print_line


def score_here(what, program, request, device="auto"):
    """What `score_in_fresh_process` gives, without its 5 s of imports."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        file, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
        file.write_text(json.dumps(request), encoding="utf-8")
        patch.setattr(sys, "argv", ["-c", str(file), str(answer)])
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(scratch)
        give_back_rotary()
        exec(program, {"__name__": "__main__"})
        return json.loads(answer.read_text(encoding="utf-8"))


@pytest.fixture
def scored_here(monkeypatch):
    """What a merge and an export for transformers score in fresh processes is scored in this one.

    Gives the devices that were asked for. That rewards do not depend on this one's state, test_workflow.py shows.
    """
    devices = []

    def score(what, program, request, device="auto"):
        devices.append(device)
        return score_here(what, program, request)

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
