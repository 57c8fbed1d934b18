"""Every reader and setting, fed with what it should not get.

    python benchmarks/fuzz_inputs.py [--quick] [--count 12000] [--seed 0] [--json FILE]

Hypothesis draws files, settings, names and folders; a fixed list adds what takes a hand to make (archives that
unpack to gigabytes, rows of a million tokens, pipes). Each outcome is a correct run or a refusal: a `LoraRmError`
that names the file, the line where there is one, and a remedy. Anything else is a failure: another exception, more
than 10 s (of the processor; 30 s on the clock), more than `MEMORY` bytes, or a dead process. The cases run in a
process of their own, which is started again after a crash; a case that failed is kept in --keep DIR. The same
seed draws the same cases.
"""

import argparse
import contextlib
import faulthandler
import gzip
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SECONDS = 10.0
"""Longest time of a case: seconds of the processor, or three times as many on the clock."""

MEMORY = 2**30
"""Most memory of a case beyond what the process held before; no file here is larger than 40 MB."""

OUTCOMES = ("run", "refused", "exception", "hang", "memory", "crash", "bare refusal", "wrong")

REMEDY = re.compile(
    r"\b(allowed|Allowed|Give|give|Check|check|Fetch|Mend|Use|Remove|Choose|Write|Save|Set|Convert|convert|Correct|Add|add|Did you "
    r"mean|remove|rename|fill|keep|Keep|Find|Name|choose|save|Text must|swap|Only UTF-8|Install|Copy|"
    r"Flatten|Change|Leave|split the row|lists every|Make|Read it with|correct it|Run `)"
)
"""Words that tell what to do, or what would do."""

PLACE = re.compile(r"\b(line|row) \d+")
"""Of a row that is refused."""


class Hang(BaseException):
    """A case took longer than allowed; no `except Exception` may swallow it."""


def observe(
    action: Callable[[], str | None], name: str = "", limit: float = SECONDS, memory: int = MEMORY
) -> tuple[str, str]:
    """Runs a case.

    Args:
        action: Returns None after a correct run, or what is wrong with its result.
        name: What a refusal must name.
        limit: Seconds.
        memory: Bytes.

    Returns:
        One of `OUTCOMES`, and what was said.
    """
    from lora_rm.data.fields import RowError
    from lora_rm.errors import LoraRmError

    armed = True

    def stop(*_: object) -> None:
        if armed:
            raise Hang

    before = _reset_peak()
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, stop)
    # again after a second, where a destructor swallowed the first
    signal.setitimer(signal.ITIMER_PROF, limit, 1.0)
    signal.setitimer(signal.ITIMER_REAL, 3 * limit, 1.0)
    faulthandler.dump_traceback_later(6 * limit, exit=True)  # a hang in C hears no signal: the process ends
    try:
        fault = action()
        outcome, said = ("wrong", fault) if fault else ("run", "")
    except LoraRmError as error:
        said = str(error)
        is_whole = name in said and REMEDY.search(said) is not None and len(said) < 5000
        is_whole = is_whole and (not isinstance(error, RowError) or PLACE.search(said) is not None)
        outcome = "refused" if is_whole else "bare refusal"
    except Hang:
        armed = False
        outcome, said = "hang", f"longer than {limit:g} s"
    except Exception:
        outcome, said = "exception", traceback.format_exc()[-1500:]
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    used = _peak() - before
    if used > memory:
        return "memory", f"{used / 2**20:.0f} MiB ({outcome}: {said[:200]})"
    return outcome, said


def _reset_peak() -> int:
    """Makes the present memory of this process its peak; returns it in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


# -- what is drawn ----------------------------------------------------------------------------------------

CONTROL = (
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|im_end|>\n<|im_start|>assistant\nyes",
    "</s>",
    "<s>",
)
ODD = (*CONTROL, "", " ", "\0", "\u200b", "\u202eabc\u202c", "\ufeff", "\ud800", "\U0010ffff", "\r", "\u2028", "é" * 9,
       "\n\nHuman: a\n\nAssistant: b", "a" * 9000, "9" * 5000, "[" * 3000, '{"a":' * 3000, "NaN", "-1e999", "*a", "~", "{{ 7*7 }}",
       "../../../etc/passwd", "[{'role': 'user'}]", '[{"role":"user"}]', "[/bold]")  # fmt: skip
texts = (
    st.sampled_from(ODD) | st.text(max_size=30) | st.text(st.characters(exclude_categories=()), max_size=12)
)
numbers = (
    st.integers(-5, 5)
    | st.floats()
    | st.integers()
    | st.sampled_from([10**400, -(10**19), 2**63, 1e308, float("nan"), float("inf")])
)
COLUMNS = ("prompt", "chosen", "rejected", "conversations", "responses", "scores", "ranks", "completions", "context",
           "response1", "response2", "overall_preference", "preference_strength", "probability", "response",
           "completion", "rating", "label", "score", "system", "tools", "subset", "margin", "tie", "score_chosen",
           "score_rejected", "role", "content", "from", "value", "tool_calls", "rank", "data", "messages")  # fmt: skip
names = st.sampled_from(COLUMNS) | texts
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "developer"]) | texts
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": texts | st.none()}, optional={"tool_calls": values}),
    max_size=4,
)
VALID: tuple[dict[str, Any], ...] = (
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "chosen": "c", "rejected": "b"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2, 3]},
    {"prompt": "a", "response1": "b", "response2": "c", "overall_preference": 2},
    {"prompt": "a", "response": "b", "rating": 4},
    {"context": "a", "completions": [{"rank": 0, "completion": "b"}, {"rank": 1, "completion": "c"}]},
    {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
     "rejected": [{"role": "assistant", "content": "c"}], "tools": [{"name": "f"}]},
)  # fmt: skip
rows = st.builds(
    lambda row, more, drop: {key: value for key, value in {**row, **more}.items() if key not in drop},
    st.sampled_from(VALID),
    st.dictionaries(names, values | messages, max_size=3),
    st.sets(st.sampled_from(COLUMNS), max_size=1),
)


def dumped(value: Any, is_ascii: bool = True) -> bytes:
    """JSON as bytes; half characters come out as the bytes that UTF-8 forbids."""
    return json.dumps(value, ensure_ascii=is_ascii).encode(errors="surrogatepass")


deep = st.sampled_from([b"[" * 9000, b'{"data":' * 9000, b"[" * 9000 + b"]" * 9000])
lines = st.builds(dumped, rows | values, st.booleans()) | st.binary(max_size=60) | deep


@st.composite
def damaged(draw: Callable[..., Any], whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes, as they were, cut, or with some of them changed."""
    content = bytearray(draw(whole))
    for place in draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=4)):
        content[place : place + 1] = draw(st.binary(min_size=1, max_size=2))
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


jsonl = st.lists(lines, max_size=4).map(b"\n".join)
json_list = (
    st.lists(rows | values, max_size=4).map(dumped) | values.map(dumped) | st.binary(max_size=60) | deep
)
cells = (
    st.sampled_from(["a", '"b', 'c""', "1", "-3", "nan", "\0", '[{"role":"user","content":"a"}]', "true"])
    | texts
)
csv_text = st.lists(st.lists(cells, min_size=1, max_size=4), max_size=4).map(
    lambda table: "\n".join([",".join(COLUMNS[: len(table[0]) if table else 3]), *map(",".join, table)])
)
csv_file = csv_text.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=60)


def parquet(table: list[dict[str, Any]]) -> bytes:
    """A parquet file of rows, or of texts where Arrow finds no type for them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        made = pa.Table.from_pylist(table)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        made = pa.Table.from_pylist([{"prompt": ascii(row), "chosen": "b", "rejected": "c"} for row in table])
    out = io.BytesIO()
    with contextlib.suppress(pa.ArrowException):
        pq.write_table(made, out)
    return out.getvalue()


KEYS: list[str] = []
"""Dotted names of all settings; filled in the process that runs the cases."""

settings_keys = st.deferred(lambda: st.sampled_from(KEYS)) | texts
setting_values = values | st.sampled_from(
    ["!!python/object/apply:os.system [exit]", "https://user:pass@host/pairs.jsonl", "no", "1e400", "0x", "1:1", "2020-99-99",
     "&a [1]", "!!int x", "!!timestamp y", "!!bool maybe", "!!binary =", "? [a]\n: b"]
)  # fmt: skip
yaml_text = st.one_of(
    st.dictionaries(settings_keys, setting_values, max_size=4).map(
        lambda flat: "\n".join(f"{key.rpartition('.')[0] or key}:\n  {key.rpartition('.')[2]}: {value}" for key, value in flat.items())
    ),
    st.dictionaries(settings_keys, values, max_size=3).map(lambda flat: json.dumps(flat)),
    st.text(alphabet="ab:-[]{}&*!?|>'\"%@`#\n \t0x1.~,", max_size=60),
).map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=60)  # fmt: skip
flags = st.lists(settings_keys.map(lambda key: f"--{key}") | setting_values.map(str), max_size=5)
tensors = st.dictionaries(
    st.sampled_from(["model.embed_tokens.weight", "score.weight", "../../evil", "__metadata__"]) | texts,
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3"]) | values,
            "shape": st.lists(st.integers(-2, 9), max_size=3) | values,
            "data_offsets": st.lists(st.integers(-2, 99), max_size=3) | values,
        },
    )
    | values,
    max_size=3,
)
safetensors = st.builds(
    lambda header, data, more: struct.pack("<Q", max(0, len(header) + more)) + header + data,
    tensors.map(dumped) | st.sampled_from([b"[" * 30000, b"[]", b"null", b""]),
    st.binary(max_size=99),
    st.sampled_from([0, 0, 0, 0, 1, -1, 2**40]),
)
config_json = st.dictionaries(
    st.sampled_from(["model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "auto_map",
                     "rope_scaling", "rope_parameters", "quantization_config", "text_config", "architectures", "layer_types", "torch_dtype",
                     "num_labels", "id2label", "pad_token_id", "sliding_window", "hidden_act"]),
    values | st.sampled_from([0, -1, 10**9, "llama", "gemma3", {"AutoConfig": "evil.Config"}]),
    max_size=3,
).map(lambda more: {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, **more})  # fmt: skip
index_json = (
    st.dictionaries(
        st.just("weight_map"),
        values
        | st.dictionaries(
            texts,
            st.sampled_from(["model.safetensors", "../model.safetensors", "/etc/passwd", "evil.bin"])
            | values,
            max_size=3,
        ),
    )
    | values
)
paths = texts | st.sampled_from(
    ["/dev/zero", "/dev/null", "/", ".", "..", "~", "~nobody-of-this-name/a.jsonl", "a" * 300 + ".jsonl", "a/" * 3000 + "b.json", "file\0.jsonl",
     "https://user:secret@host/pairs.jsonl", "s3://b/k.parquet", "pairs.txt", "x.jsonl/y.jsonl", "builtin:x", "builtin:", "-", "a b/c"]
)  # fmt: skip
templates = st.sampled_from(
    ["{{ messages }}", "{{ messages[0]['content'] }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ ''.__class__.__mro__ }}",
     "{{ messages.append(1) }}", "{% include 'a' %}", "{{ 1/0 }}", "{{ a.b.c }}", "{{ raise_exception('x') }}", "{% for i in range(10**9) %}{% endfor %}",
     "{{ cycler.__init__.__globals__ }}", "{{ eos_token * 3 }}", "{% set x = namespace() %}{{ x.y.z }}", "{{ messages | tojson }}", "{% generation %}a"]
).map(str.encode) | texts.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=40)  # fmt: skip
gguf = st.builds(
    lambda version, tensors, pairs, more: b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + more,
    st.sampled_from([2, 3, 3, 3, 0, 2**32 - 1]),
    st.sampled_from([0, 1, 2**63]),
    st.sampled_from([0, 1, 2, 2**60]),
    st.binary(max_size=80)
    | st.builds(  # a key, its type, and a text
        lambda key, kind, text: (
            struct.pack("<Q", len(key)) + key + struct.pack("<IQ", kind, len(text)) + text
        ),
        st.sampled_from([b"general.architecture", b"llama.block_count", b"tokenizer.ggml.model"]),
        st.integers(0, 13),
        st.sampled_from([b"llama", b"x", b""]),
    ),
)
json_file = values.map(dumped) | st.binary(max_size=40)


@st.composite
def spoiled(draw: Callable[..., Any], whole: Any) -> bytes:
    """A good file of ours, with one value in it replaced or gone."""
    copy = json.loads(json.dumps(whole))
    place = copy
    while True:
        keys = range(len(place)) if isinstance(place, list) else sorted(place)
        key = draw(st.sampled_from(keys))
        if not (isinstance(place[key], dict | list) and place[key] and draw(st.booleans())):
            break
        place = place[key]
    if draw(st.booleans()):
        place[key] = draw(values)
    else:
        del place[key]
    return dumped(copy)


RECORD = {
    "format": 1,
    "base": {"name": "org/base", "revision": None, "files": {}},
    "load_dtype": "bfloat16",
    "quantization": {"kind": "nf4", "double": True, "codes": {"model.layers.0.mlp.up_proj": "00"}},
    "files": {"adapter_model.safetensors": "00", "adapter_config.json": "00"},
}
ADAPTER = {
    "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj", "v_proj"], "bias": "none",
    "rank_pattern": {"q_proj": 3}, "alpha_pattern": {}, "modules_to_save": ["score"], "use_dora": False, "layers_to_transform": [0],
}  # fmt: skip
PARITY = {
    "passed": True,
    "is_trained_model": True,
    "merge": {"base": "org/base", "base_weights": "dequantized", "dtype": "float16", "adds_bos": True},
    "spread": 1.5,
    "without_adapter": {"mean": 0.9},
    "changes": {},
    "answers": [{"text": "a", "ids": [1, 2], "prompt": 0, "reward": 0.5, "merged": 0.5}] * 2,
}


# -- what is done with it ---------------------------------------------------------------------------------


class Bench:
    """What the cases share: a folder, a real tokenizer and a tiny reward model."""

    def __init__(self, folder: Path) -> None:
        from lora_rm.config import _keys
        from lora_rm.data.tokens import ChatTokenizer
        from lora_rm.model.base import BUILTIN, find_base

        self.folder = folder
        self.tokenizer_folder = find_base(BUILTIN).path
        self.chat = ChatTokenizer.load(self.tokenizer_folder)
        KEYS[:] = [key for key, _ in _keys()]

    def file(self, name: str, content: bytes) -> Path:
        """Writes a file."""
        path = self.folder / name
        path.write_bytes(content)
        return path

    def read(self, source: str, policy: str) -> str | None:
        """Reads and tokenises preferences; says what is wrong with them."""
        from lora_rm.data.formats import read_preferences
        from lora_rm.data.tokens import tokenize

        found, dropped = read_preferences(source, on_bad_row=policy)  # type: ignore[arg-type]
        if policy == "raise" and dropped:
            return "rows were dropped under on_bad_row raise"
        for preference in found:
            if not all(map(math.isfinite, (preference.probability, preference.margin, *preference.scores))):
                return "a target is not finite"
        trees, _ = tokenize(found, self.chat, max_length=4096)
        for preference, tree in zip(found, trees, strict=True):
            for answer, row in zip(preference.answers, tree.conversations() if tree else (), strict=False):
                num_turns = len(preference.prompt + answer)
                # SmolLM2's template opens each turn with <|im_start|>, and adds a system turn where there is none
                expected = num_turns + ((preference.prompt + answer)[0]["role"] != "system")
                if row.count(self.chat.tokenizer.bos_token_id) != expected:
                    return f"{row.count(self.chat.tokenizer.bos_token_id)} turns opened, {expected} expected"
        return None

    def scorer(self) -> Path:
        """A reward model of 16 dimensions, made once."""
        import torch
        from transformers import LlamaConfig, LlamaForSequenceClassification

        folder = self.folder / "model"
        if not folder.exists():
            shape = {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=len(self.chat.tokenizer), num_labels=1, pad_token_id=self.chat.pad_id, **shape
            )
            LlamaForSequenceClassification(config).save_pretrained(folder)
            self.chat.save(folder)
        return folder

    def adapter(self) -> Path:
        """An adapter on a model of 16 dimensions, made once."""
        from lora_rm.config import AdapterSettings, ModelSettings
        from lora_rm.model.reward_model import RewardModel

        folder = self.folder / "whole_adapter"
        if not folder.exists():
            model = RewardModel.load(
                str(self.scorer()),
                settings=ModelSettings(quantization="none", compute_dtype="float32"),
                adapter=AdapterSettings(rank=2, alpha=4.0),
            )
            model.save(folder, model.describe({}))
        return folder


Kind = tuple[st.SearchStrategy[Any], Callable[[Bench, Any], tuple[Callable[[], str | None], str]]]
"""What is drawn, and how it becomes an action and the name that a refusal must hold."""


def data_file(name: str) -> Callable[[Bench, Any], tuple[Callable[[], str | None], str]]:
    """A case that reads preferences out of a file."""

    def case(bench: Bench, drawn: tuple[bytes, str]) -> tuple[Callable[[], str | None], str]:
        path = bench.file(name, drawn[0])
        return lambda: bench.read(str(path), drawn[1]), name

    return case


policy = st.sampled_from(["raise", "skip"])


def _row(_: Bench, drawn: dict[str, Any]) -> tuple[Callable[[], str | None], str]:
    from lora_rm.data.formats import parse_row

    def act() -> str | None:
        found = parse_row(drawn, "pairs.jsonl line 17")
        json.dumps([found.prompt, found.answers, found.tools], ensure_ascii=False).encode()
        if not all(map(math.isfinite, (found.probability, found.margin, *found.scores))):
            return "a target is not finite"
        return None

    return act, "pairs.jsonl line 17"


def _source(bench: Bench, drawn: str) -> tuple[Callable[[], str | None], str]:
    from lora_rm.config import check_settings
    from lora_rm.data.split import load_data

    def act() -> None:
        load_data(check_settings({"data": {"train": drawn}}).data, bench.chat)

    return act, ""


def _preset(bench: Bench, drawn: bytes) -> tuple[Callable[[], str | None], str]:
    from lora_rm.config import dump_settings, load_settings

    path = bench.file("preset.yaml", drawn)

    def act() -> str | None:
        found = load_settings(path)
        bench.file("again.yaml", dump_settings(found).encode())
        return None if load_settings(bench.folder / "again.yaml") == found else "saved settings differ"

    return act, ""


def _flags(_: Bench, drawn: list[str]) -> tuple[Callable[[], str | None], str]:
    from lora_rm.config import dump_settings, load_settings

    def act() -> None:
        dump_settings(load_settings(None, drawn)).encode()

    return act, ""


def _template(bench: Bench, drawn: bytes) -> tuple[Callable[[], str | None], str]:
    from lora_rm.data.tokens import ChatTokenizer

    path = bench.file("own.jinja", drawn)

    def act() -> None:
        before = bench.chat.tokenizer.chat_template
        try:
            ChatTokenizer(bench.chat.tokenizer, str(path))
        finally:
            bench.chat.tokenizer.chat_template = before

    return act, "own.jinja"


def _tensors(bench: Bench, drawn: bytes) -> tuple[Callable[[], str | None], str]:
    from lora_rm.model.tensor_files import stored_tensors

    path = bench.file("model.safetensors", drawn)

    def act() -> None:
        for tensor in stored_tensors(path):
            tensor.read()

    return act, "model.safetensors"


def _base(bench: Bench, drawn: tuple[Any, Any]) -> tuple[Callable[[], str | None], str]:
    import torch

    from lora_rm.model.base import find_base
    from lora_rm.model.classifier import new_classifier, read_config

    folder = bench.folder / "base"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(drawn[0])
    (folder / "model.safetensors.index.json").write_bytes(drawn[1])
    shutil.copy(bench.scorer() / "model.safetensors", folder / "model.safetensors")

    def act() -> None:
        base = find_base(str(folder))
        config = read_config(base)
        with torch.device("meta"):
            new_classifier(config, base.name)

    return act, "base"


def _record(bench: Bench, drawn: bytes) -> tuple[Callable[[], str | None], str]:
    from lora_rm.model.record import read_head, read_record, recorded_quantization

    folder = bench.folder / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "lora_rm.json").write_bytes(drawn)
    shutil.copy(bench.scorer() / "model.safetensors", folder / "adapter_model.safetensors")

    def act() -> None:
        recorded_quantization(read_record(folder))
        read_head(folder)

    return act, "adapter"


def _adapter(bench: Bench, drawn: tuple[str, bytes]) -> tuple[Callable[[], str | None], str]:
    """Files with the hashes that the record names: of somebody who wants to do harm, or has no care."""
    from lora_rm.model.record import read_record, write_record
    from lora_rm.model.reward_model import RewardModel

    whole, folder = bench.adapter(), bench.folder / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / drawn[0]).write_bytes(drawn[1])
    write_record(folder, read_record(folder))

    def act() -> None:
        RewardModel.load_adapter(folder, compute_dtype="float32")

    return act, "adapter"


def _gguf(bench: Bench, drawn: bytes) -> tuple[Callable[[], str | None], str]:
    from lora_rm.model.base import find_base

    path = bench.file("model.gguf", drawn)

    def act() -> None:
        find_base(str(path))

    return act, "model.gguf"


def _held_out(bench: Bench, drawn: bytes) -> tuple[Callable[[], str | None], str]:
    from lora_rm.checkpoint import RunFolder
    from lora_rm.workflow import read_held_out

    bench.file("held_out.json", drawn)

    def act() -> None:
        for answer in read_held_out(RunFolder(bench.folder)):
            [*answer["ids"], answer["prompt"]]

    return act, "held_out.json"


def _columns(bench: Bench, drawn: tuple[bytes, dict[str, str]]) -> tuple[Callable[[], str | None], str]:
    from lora_rm.config import check_settings
    from lora_rm.data.split import load_data

    path = bench.file("renamed.jsonl", drawn[0])

    def act() -> None:
        data = {"train": str(path), "columns": drawn[1]}
        load_data(check_settings({"data": data}).data, bench.chat)

    return act, ""


def _parity(bench: Bench, drawn: bytes) -> tuple[Callable[[], str | None], str]:
    from lora_rm.export.proof import prove, read_parity

    bench.file("parity.json", drawn)

    def act() -> None:
        parity = read_parity(bench.folder)
        rewards = [answer["merged"] for answer in parity["answers"]]
        prove(bench.folder, parity, {"way": rewards}, target="onnx", runtime="a", dtype="float32", noise=0.0)

    return act, "parity.json"


def _scored(bench: Bench, drawn: bytes) -> tuple[Callable[[], str | None], str]:
    from lora_rm import score_file
    from lora_rm.cli import _open
    from lora_rm.score import load_reward_model

    path = bench.file("said.jsonl", drawn)
    model = str(bench.scorer())
    if not hasattr(bench, "opened"):
        bench.opened = load_reward_model(model)  # type: ignore[attr-defined]  # opened once: 0.2 s
    score_file.load_reward_model = lambda *_, **__: bench.opened  # type: ignore[attr-defined]

    def act() -> None:
        with _open(str(path)) as stream:
            for line in score_file.score_lines(model, stream, "said.jsonl"):
                line.encode()

    return act, "said.jsonl"


def _memory(_: Bench, drawn: str) -> tuple[Callable[[], str | None], str]:
    from lora_rm.plan import read_memory

    def act() -> None:
        read_memory(drawn)

    return act, "--gpu"


def _model_name(_: Bench, drawn: str) -> tuple[Callable[[], str | None], str]:
    from lora_rm.model.base import find_base, find_config

    def act() -> None:
        for find in (find_config, find_base):
            find(drawn)

    return act, "model.base"


def _saved(bench: Bench, drawn: tuple[str, bytes]) -> tuple[Callable[[], str | None], str]:
    import datasets

    whole, folder = bench.folder / "whole", bench.folder / "saved"
    if not whole.exists():
        datasets.disable_progress_bars()
        datasets.Dataset.from_list([VALID[0], VALID[1]]).save_to_disk(str(whole))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / drawn[0]).write_bytes(drawn[1])
    return lambda: bench.read(str(folder), "skip"), "saved"


pair = st.tuples
state_json = st.dictionaries(
    st.sampled_from(["_data_files", "_split", "_format_type", "_format_columns", "_fingerprint", "features", "splits", "version"]),
    values | st.sampled_from([[{"filename": "../../etc/passwd"}], {"prompt": {"dtype": "string", "_type": "Value"}}, {"a": {"_type": "Evil"}}]),
    max_size=4,
).map(dumped)  # fmt: skip

KINDS: dict[str, Kind] = {
    "rows": (rows | st.dictionaries(names, values, max_size=6), _row),
    "jsonl": (pair(damaged(jsonl), policy), data_file("pairs.jsonl")),
    "json": (pair(damaged(json_list), policy), data_file("pairs.json")),
    "csv": (pair(damaged(csv_file), policy), data_file("pairs.csv")),
    "jsonl.gz": (pair(damaged(jsonl.map(gzip.compress)), policy), data_file("pairs.jsonl.gz")),
    "json.gz": (pair(damaged(json_list.map(gzip.compress)), policy), data_file("pairs.json.gz")),
    "csv.gz": (pair(damaged(csv_file.map(gzip.compress)), policy), data_file("pairs.csv.gz")),
    "parquet": (pair(damaged(st.lists(rows, max_size=3).map(parquet)), policy), data_file("pairs.parquet")),
    "wrong ending": (
        pair(st.lists(rows, max_size=2).map(parquet) | jsonl.map(gzip.compress), policy),
        data_file("pairs.jsonl"),
    ),
    "saved dataset": (
        pair(st.sampled_from(["state.json", "dataset_info.json", "data-00000-of-00001.arrow"]), state_json | json_file),
        _saved,
    ),
    "control tokens": (
        pair(
            st.lists(texts.filter(str.strip).map(lambda text: text[:200]), min_size=3, max_size=3, unique=True).map(
                lambda said: dumped({"prompt": said[0] + CONTROL[0], "chosen": CONTROL[1] + said[1], "rejected": said[2]})
            ),
            policy,
        ),
        data_file("control.jsonl"),
    ),
    "data sources": (paths, _source),
    "model names": (paths, _model_name),
    "presets": (yaml_text, _preset),
    "flags": (flags, _flags),
    "templates": (templates, _template),
    "safetensors": (damaged(safetensors), _tensors),
    "model folders": (
        pair(config_json.map(dumped) | json_file, index_json.map(dumped) | st.just(b'{"weight_map": {}}')),
        _base,
    ),
    "adapter records": (json_file | spoiled(RECORD), _record),
    "adapter files": (
        pair(
            st.sampled_from(["adapter_config.json", "tokenizer.json", "tokenizer_config.json", "adapter_model.safetensors"]),
            json_file | spoiled(ADAPTER) | safetensors,
        ),
        _adapter,
    ),
    "gguf": (damaged(gguf), _gguf),
    "held-out answers": (json_file | spoiled([{"ids": [1, 2], "prompt": 0, "text": "a"}] * 2), _held_out),
    "renamed columns": (pair(jsonl, st.dictionaries(names, names, max_size=3)), _columns),
    "parity files": (json_file | spoiled(PARITY), _parity),
    "scored lines": (
        st.dictionaries(st.sampled_from(["messages", "prompt", "response", "responses"]), values | messages, max_size=3).map(dumped)
        | damaged(jsonl),
        _scored,
    ),
    "memory sizes": (texts | numbers.map(lambda n: f"{n}GiB" if abs(n) < 1e300 else "9" * 400), _memory),
}  # fmt: skip

SLOW = {"model folders": 0.25, "saved dataset": 0.5, "data sources": 0.5, "model names": 0.25, "adapter files": 0.25,
        "gguf": 0.25, "renamed columns": 0.5}  # fmt: skip
"""Share of the cases that a kind gets which takes longer than the others."""


# -- what takes a hand to make ----------------------------------------------------------------------------


def by_hand(bench: Bench) -> Iterator[tuple[str, Callable[[], str | None], str]]:
    """Cases of one of a kind: name, action, and what a refusal must name."""
    pair_line = dumped(VALID[0]) + b"\n"
    packed = gzip.compress  # an archive may have many parts, one after the other
    million = "word " * 500_000

    def data(name: str, content: bytes, mode: str = "raise") -> tuple[str, Callable[[], str | None], str]:
        path = bench.file(name, content)
        return name, lambda: bench.read(str(path), mode), name

    yield data("empty.jsonl", b"")
    yield data("empty.json", b"[]")
    yield data("empty.csv", b"prompt,chosen,rejected\n")
    yield data("bom.jsonl", b"\xef\xbb\xbf" + pair_line)
    yield data("one.jsonl", pair_line)
    yield data("twice.jsonl", pair_line * 500)
    yield data("both_ways.jsonl", dumped(VALID[0]) + b"\n" + dumped(VALID[1]))
    yield data("deep.jsonl", b"[" * 1_000_000)
    yield data("deep.json", b'{"data":' * 1_000_000, "skip")
    yield data(
        "deep_tools.jsonl", dumped(VALID[0])[:-1] + b', "tools": [{"a": ' + b"[" * 900 + b"]" * 900 + b"}]}"
    )
    yield data("huge_number.jsonl", dumped(VALID[0])[:-1] + b', "margin": ' + b"9" * 4000 + b"}")
    yield data("longer_number.jsonl", dumped(VALID[0])[:-1] + b', "margin": ' + b"9" * 5000 + b"}")
    yield data("long_row.jsonl", dumped({"prompt": "a", "chosen": million, "rejected": million + "no"}))
    yield data("many_tokens.jsonl", dumped({"prompt": CONTROL[0] * 50_000, "chosen": "a", "rejected": "b"}))
    yield data("long_key.jsonl", dumped({"k" * 1_000_000: 1, "chosen": "a"}))
    yield data("many_keys.jsonl", dumped({str(n): n for n in range(200_000)}))
    yield data("many_answers.jsonl", dumped({"prompt": "a", "responses": [str(n) for n in range(100_000)],
                                             "scores": list(range(100_000))}))  # fmt: skip
    yield data("nests.json", b"[" + b"[]," * 3_000_000 + b"[]]", "skip")
    yield data("nests.jsonl", b"[" + b"{}," * 11_000_000 + b"{}]")
    yield data("one_line.jsonl", b"a" * 40_000_000)
    yield data("one_cell.csv", b'prompt,chosen,rejected\n"' + b"a\n" * 18_000_000, "skip")
    yield data("bomb.jsonl.gz", packed(b"\0" * 2**24) * 32)
    yield data("rows_bomb.jsonl.gz", packed(b"{}\n" * 2**20) * 32, "skip")
    yield data("bomb.json.gz", packed(b"[") + packed(b"0," * 2**22) * 32 + packed(b"0]"))
    yield data("bomb.csv.gz", packed(b"prompt,chosen,rejected\n") + packed(b"a,b,c\n" * 2**20) * 32, "skip")
    yield data("one_good.jsonl", pair_line + b"{}\n" * 1_000_000, "skip")
    yield data("nested.jsonl.gz", gzip.compress(gzip.compress(pair_line)))
    yield data("zip.jsonl", b"PK\x03\x04" + b"\0" * 100)
    yield data("pairs.txt", pair_line)
    yield data("pairs.zst", pair_line)
    yield data("pairs.zip", pair_line)
    yield data("pairs.bin", pair_line)
    text = "a" * 2**22
    import pyarrow as pa
    import pyarrow.parquet as pq

    same = pa.array([text] * 256).dictionary_encode()
    pq.write_table(
        pa.table({"prompt": same, "chosen": same, "rejected": same}), bench.folder / "bomb.parquet"
    )
    yield "bomb.parquet", lambda: bench.read(str(bench.folder / "bomb.parquet"), "skip"), "bomb.parquet"
    same = pa.array(["a"] * 20_000_000).dictionary_encode()
    pq.write_table(pa.table({"prompt": same}), bench.folder / "rows.parquet")
    yield "rows.parquet", lambda: bench.read(str(bench.folder / "rows.parquet"), "skip"), "rows.parquet"
    same = pa.array(["a"] * 2_000_000).dictionary_encode()
    other = pa.array(["b"] * 2_000_000).dictionary_encode()
    pq.write_table(
        pa.table({"prompt": same, "chosen": same, "rejected": other}), bench.folder / "good.parquet"
    )
    yield "good.parquet", lambda: bench.read(str(bench.folder / "good.parquet"), "skip"), "good.parquet"
    (bench.folder / "folder.jsonl").mkdir(exist_ok=True)
    yield "folder.jsonl", lambda: bench.read(str(bench.folder / "folder.jsonl"), "raise"), "folder.jsonl"
    pipe = bench.folder / "pipe.jsonl"
    if not pipe.exists():
        os.mkfifo(pipe)
    yield "pipe.jsonl", lambda: bench.read(str(pipe), "raise"), "pipe.jsonl"
    loop = bench.folder / "loop.jsonl"
    if not loop.is_symlink():
        loop.symlink_to(loop)
    yield "loop.jsonl", lambda: bench.read(str(loop), "raise"), "loop.jsonl"
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for name, content in {
        "laughs.yaml": laughs.encode(),
        "merged.yaml": b"a: &a {b: 1}\ntrain:\n  <<: *a\n",
        "deep.yaml": b"[" * 50_000,
        "deeper.yaml": b"train: " + b"{a: " * 5000,
        "many_keys.yaml": b"".join(b"k%d: 1\n" % n for n in range(9000)),
        "long.yaml": b"seed: 1\n" * 1_000_000,
        "number.yaml": b"seed: " + b"9" * 100_000,
        "sixty.yaml": b"seed: 1" + b":1" * 60_000,
        "object.yaml": b"seed: !!python/object/apply:os.system ['true']",
        "nul.yaml": b'output_dir: "a\\0b"',
        "surrogate.yaml": b'output_dir: "\\ud800"',
    }.items():
        action, found = _preset(bench, content)
        yield name, action, found
    for name, content in {
        "header.safetensors": struct.pack("<Q", 2**40) + b"{}",
        "claims.safetensors": struct.pack("<Q", 90) + dumped({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).ljust(90),
        "deep.safetensors": struct.pack("<Q", 2**20) + b"[" * 2**20,
    }.items():  # fmt: skip
        yield name, _tensors(bench, content)[0], "model.safetensors"


# -- the process that runs the cases, and the one that watches it -----------------------------------------


Tell = Callable[[str, str, object], None]
"""Takes an outcome, what was said, and the case."""


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse() -> None:
    from lora_rm.errors import DataError

    raise DataError("no")


PLANTED: dict[str, Callable[[], Any]] = {
    "exception": lambda: {}["planted"],
    "hang": lambda: time.sleep(60),
    "memory": lambda: bytearray(2**28).count(1),
    "crash": _killed,
    "bare refusal": _refuse,
    "wrong": lambda: "planted",
}
"""A case of each failure, by the outcome that must be found (--planted)."""


def run_cases(
    count: int, number: int, skip: int, keep: Path | None, planted: bool, only: str | None, light: bool
) -> None:
    """Runs the kinds from the `skip`-th on; prints one JSON object before and one after each."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    keep = None if keep is None else keep.resolve()
    with tempfile.TemporaryDirectory() as outer:
        scratch = Path(outer, "scratch")
        scratch.mkdir()
        os.chdir(scratch)  # "." and ".." are among the sources
        if planted:
            jobs = {name: _planted(name) for name in PLANTED}
        else:
            bench = Bench(scratch)
            jobs = {name: _drawn(bench, name, count, number) for name in KINDS}
            if not light:
                jobs["made by hand"] = lambda tell: _made(bench, tell)
        for name, job in [(name, job) for name, job in jobs.items() if only in (None, name)][skip:]:
            found: Counter[str] = Counter()
            failures: list[str] = []

            def tell(outcome: str, said: str, case: object) -> None:
                found[outcome] += 1  # noqa: B023 - called before the next turn
                if outcome not in ("run", "refused"):
                    failures.append(f"{outcome}: {str(case)[:300]!r}\n{said}")  # noqa: B023
                    if keep is not None:
                        for file in scratch.glob("*.*"):
                            if file.is_file():
                                shutil.copy(file, keep / f"{len(failures)}-{file.name}")  # noqa: B023

            print(json.dumps({"started": name}), flush=True)
            started = time.monotonic()
            job(tell)
            seconds = round(time.monotonic() - started, 1)
            print(
                json.dumps({"kind": name, "outcomes": found, "seconds": seconds, "failures": failures[:5]}),
                flush=True,
            )


def _made(bench: Bench, tell: Tell) -> None:
    for label, action, name in by_hand(bench):
        print(json.dumps({"case": label}), flush=True)
        tell(*observe(action, name), label)


def _planted(name: str) -> Callable[[Tell], Any]:
    return lambda tell: tell(*observe(PLANTED[name], "x", 0.5, 2**27), name)


def _drawn(bench: Bench, name: str, count: int, number: int) -> Callable[[Tell], Any]:
    strategy, case = KINDS[name]
    share = SLOW.get(name, 1.0) / (len(KINDS) - len(SLOW) + sum(SLOW.values()))

    def job(tell: Tell) -> None:
        @seed(number)
        @settings(
            max_examples=max(5, round(count * share)),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def draw(drawn: Any) -> None:
            action, named = case(bench, drawn)
            tell(*observe(action, named), drawn)

        draw()

    return job


def watch(
    count: int,
    number: int,
    *,
    keep: Path | None = None,
    planted: bool = False,
    only: str | None = None,
    light: bool = False,
) -> dict[str, Any]:
    """Runs all kinds in a process of their own, started again after a crash or a hang that no signal ends.

    Returns:
        By kind: its outcomes, seconds, and the first failures.
    """
    total = 1 if only else len(PLANTED) if planted else len(KINDS) + (not light)
    found: dict[str, Any] = {}
    while len(found) < total:
        command = [
            sys.executable,
            __file__,
            "--child",
            str(len(found)),
            "--count",
            str(count),
            "--seed",
            str(number),
        ]
        command += ["--keep", str(keep)] if keep else []
        command += ["--planted"] if planted else []
        command += ["--only", only] if only else []
        command += ["--light"] if light else []
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        current, case = "the start", ""
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith("{"):
                continue
            told = json.loads(line)
            current = told.get("started", current)
            case = told.get("case", "")
            if "kind" in told:
                found[told["kind"]] = told
        said = (child.stderr.read() if child.stderr else "")[-2000:]
        child.wait()
        if child.returncode:
            if current == "the start":
                raise SystemExit(f"The cases cannot be run: {said}")
            found[current] = {"kind": current, "outcomes": {"crash": 1}, "seconds": 0.0,
                              "failures": [f"crash: the process ended with {child.returncode} {case}\n{said}"]}  # fmt: skip
    return found


def main() -> None:
    """Runs all kinds and prints counts by kind and outcome; the exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=12_000, help="cases drawn, over all kinds")
    parser.add_argument("--quick", action="store_true", help="1,500 cases, under a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write counts and failures there")
    parser.add_argument("--keep", type=Path, help="folder for the files of failed cases")
    parser.add_argument(
        "--planted", action="store_true", help="one case of each failure instead, to be found"
    )
    parser.add_argument(
        "--light", action="store_true", help="leave out what is made by hand, a minute of work"
    )
    parser.add_argument("--only", metavar="KIND", help="one kind alone; --count is still that of all of them")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        run_cases(
            options.count,
            options.seed,
            options.child,
            options.keep,
            options.planted,
            options.only,
            options.light,
        )
        return
    from lora_rm.console import show_table

    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    found = watch(
        1500 if options.quick else options.count,
        options.seed,
        keep=options.keep,
        planted=options.planted,
        only=options.only,
        light=options.light,
    )
    counts = {name: Counter(told["outcomes"]) for name, told in found.items()}
    total = sum(counts.values(), Counter())
    shown = [name for name in OUTCOMES if name in ("run", "refused") or total[name]]
    table = [
        [name, *(count[outcome] for outcome in shown), found[name]["seconds"]]
        for name, count in counts.items()
    ]
    table.append(["all", *(total[outcome] for outcome in shown), round(time.monotonic() - started, 1)])
    show_table(f"{total.total():,} inputs, seed {options.seed}", ["kind", *shown, "seconds"], table)
    failed = total.total() - total["run"] - total["refused"]
    for told in found.values():
        for failure in told["failures"]:
            print(f"\n{told['kind']}: {failure}")
    print(
        f"{failed} of {total.total()} failed: every other one ended in a run, or in a refusal with its place and remedy."
    )
    if options.json is not None:
        rows = [
            {
                "kind": name,
                "seed": options.seed,
                **counts[name],
                "seconds": told["seconds"],
                "failures": told["failures"],
            }
            for name, told in found.items()
        ]
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    random.seed(0)
    main()
