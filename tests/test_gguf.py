"""GGUF: every tensor is read back, and readers that know nothing of this library's writer give the same rewards."""

import ctypes
import hashlib
import importlib.util
import json
import shutil
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from conftest import FAMILIES, SHAPE, make_base, make_merged, make_tokenizer, parity_of
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig

from lora_rm.data.tokens import ChatTokenizer
from lora_rm.errors import ConfigError, MergeError, ModelError
from lora_rm.export import gguf as module
from lora_rm.export import proof
from lora_rm.export.gguf import (
    FILE,
    Source,
    check_tensors,
    check_tokenizer,
    export_gguf,
    write,
)
from lora_rm.export.gguf_model import ALLOW_SPECIAL, HEAD, SMALL_BATCH, GGUFModel, read_chat, read_fields


@pytest.fixture(scope="module")
def merged(base, held_out, tmp_path_factory):
    return make_merged(tmp_path_factory.mktemp("gguf") / "merged", base, held_out)


def rewards_by_transformers(file, rows):
    """Rewards by what transformers reads from the file alone."""
    from transformers import AutoModelForCausalLM, GgufConfig

    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, quantization_config=unpacked
    ).eval()
    head = torch.tensor(gguf.GGUFReader(file).fields[HEAD].contents())
    with torch.inference_mode():
        return [float(model.model(torch.tensor([ids])).last_hidden_state[0, -1] @ head) for ids in rows]


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_an_export_is_proven_in_a_fresh_process(merged, tmp_path, dtype):
    out = export_gguf(merged, tmp_path / "out", dtype=dtype)
    parity = parity_of(out)
    change = parity["changes"][module.TRANSFORMERS]
    assert parity["passed"]
    assert change["num_answers"] == 12
    if dtype == "float32":
        assert change["against_merged"] < 1e-5
    else:
        assert 1e-4 < change["mean"] < 0.1  # a type that rounds nothing was not written
    assert sorted(file.name for file in out.iterdir()) == ["README.md", FILE, "parity.json"]
    page = (out / "README.md").read_text()
    assert "as the chat template writes it, less the BOS, which the tokenizer adds, with pooling" in page
    without = parity | {"merge": parity["merge"] | {"adds_bos": False}}
    assert "as the chat template writes it, with pooling" in proof.usage_page(module.USAGE, without)
    with pytest.raises(MergeError, match="exists already"):
        export_gguf(merged, out)


def test_a_type_that_loses_the_adapter_is_refused(merged, tmp_path, monkeypatch):
    parity = parity_of(merged)
    parity["without_adapter"]["mean"] = 0.05  # a small delta: the base alone gives nearly the same rewards
    monkeypatch.setattr(proof, "read_parity", lambda _: parity)
    with pytest.raises(MergeError, match=r"Q4_0.*The adapter was lost.*Choose a type with more bits"):
        export_gguf(merged, tmp_path / "out", dtype="Q4_0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families(family, held_out, tmp_path):
    # transformers reads no head size for qwen3 and takes 128
    more = {"head_dim": 128} if family == "qwen3" else {}
    merged = make_merged(tmp_path / "merged", make_base(tmp_path / "base", family, **more), held_out)
    file = tmp_path / FILE
    source = Source(merged)
    write(source, file, "float32")
    assert check_tensors(source, file, "float32")
    answers = parity_of(merged)["answers"]
    found = rewards_by_transformers(file, [answer["ids"] for answer in answers])
    assert found == pytest.approx([answer["merged"] for answer in answers], abs=1e-4)


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("phi3", {}, r"is a phi3; --to gguf can write llama, mistral, qwen2"),
        ("mistral", {"sliding_window": 8}, r"ends after 8 tokens"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act is gelu"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, r"scaled by yarn, which --to gguf does not write for qwen2"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(family, more, message):
    config = AutoConfig.for_model(family, **(SHAPE | FAMILIES[family] | more))
    with pytest.raises(MergeError, match=message):
        module._architecture(config)


def test_unknown_types_are_refused(merged, tmp_path):
    with pytest.raises(ConfigError, match=r"'Q2_K'; --to gguf can write float32, float16, Q8_0"):
        export_gguf(merged, tmp_path / "out", dtype="Q2_K")


def test_a_reader_that_misses_something_is_not_asked(merged, tmp_path, monkeypatch):
    source, parity = Source(merged), parity_of(merged)
    source.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MergeError, match=r"does not read position scaling.*pip install llama-cpp-python"):
        module._score(source, tmp_path / FILE, parity)


@pytest.fixture(scope="module")
def written(merged, tmp_path_factory):
    """Source and file, in float16."""
    file = tmp_path_factory.mktemp("written") / FILE
    source = Source(merged)
    write(source, file, "float16")
    return source, file


def test_read_back_finds_every_fault(written, tmp_path):
    source, file = written
    check_tensors(source, file, "float16")
    reader = gguf.GGUFReader(file)
    places = {tensor.name: int(tensor.data_offset) for tensor in reader.tensors}
    content = file.read_bytes()
    for name in ("blk.1.attn_q.weight", "output_norm.weight", "token_embd.weight"):
        broken = bytearray(content)
        broken[places[name] + 5] ^= 0x40
        (tmp_path / "broken.gguf").write_bytes(broken)
        with pytest.raises(MergeError, match=f"{name} is not the merged weight"):
            check_tensors(source, tmp_path / "broken.gguf", "float16")
    source.head[3] += 1e-6
    with pytest.raises(MergeError, match="score head"):
        check_tensors(source, file, "float16")
    source.head[3] -= 1e-6


def test_metadata(written):
    source, file = written
    fields = gguf.GGUFReader(file).fields

    def value(key):
        return fields[key].contents()

    assert value("llama.pooling_type") == gguf.PoolingType.LAST
    assert value("llama.rope.dimension_count") == 16
    assert value("llama.attention.head_count_kv") == 2
    assert value("general.file_type") == gguf.LlamaFileType.MOSTLY_F16
    chat = source.chat
    assert value("tokenizer.ggml.tokens")[:3] == ["<unk>", "<s>", "</s>"]
    assert value("tokenizer.ggml.token_type")[:7] == [3, 3, 3, 3, 3, 3, 1]
    assert value("tokenizer.ggml.model") == "gpt2"
    assert value("tokenizer.ggml.pre") == "gpt-2"
    assert " ".join(json.loads(chat.tokenizer.backend_tokenizer.to_str())["model"]["merges"][0]) == value(
        "tokenizer.ggml.merges"
    )[0]  # fmt: skip
    assert value("tokenizer.ggml.bos_token_id") == 1
    assert value("tokenizer.ggml.padding_token_id") == chat.pad_id != value("tokenizer.ggml.eos_token_id")
    assert value("tokenizer.ggml.add_bos_token") is True
    assert value("tokenizer.chat_template") == chat.tokenizer.chat_template
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.0.ffn_down.weight"] == "F16"


def test_special_tokens_that_messages_may_write_stay_so(merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "merged")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_rm_allow_special_tokens": True}))
    said = ({"role": "user", "content": "a</s>b"}, {"role": "assistant", "content": "c"})
    found = []
    for source in (merged, folder):
        write(Source(source), tmp_path / FILE, "float32")
        found += read_chat(read_fields(tmp_path / FILE)).ids([(said, ())])
        assert found[-1] == ChatTokenizer.load(source).ids([(said, ())])[0]
    assert found[0] != found[1]


def test_the_tokenizer_comes_back_whole(written, merged, monkeypatch):
    source, file = written
    parity = parity_of(merged)
    check_tokenizer(source.chat, file, parity)
    own = read_chat(read_fields(file))
    talk = [({"role": "user", "content": "12345 äö\n"}, {"role": "assistant", "content": "it's  fine"})]
    assert own.ids([(talk[0], ())]) == source.chat.ids([(talk[0], ())])
    monkeypatch.setattr(module, "read_chat", lambda _: own)
    for name, value in {"adds_bos": False, "allow_special_tokens": True}.items():
        with monkeypatch.context() as patch:
            patch.setattr(own, name, value)
            with pytest.raises(MergeError, match="other token ids"):
                check_tokenizer(source.chat, file, parity)


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


@pytest.mark.parametrize(
    ("steps", "ignores", "name"),
    [
        ([byte_level(True)], False, "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, byte_level(True)], False, "smollm"),
        ([split(module.WORDS % "{1,3}"), byte_level(False)], True, "llama-bpe"),
        ([split(module.WORDS % "{1,3}"), byte_level(False)], False, "dbrx"),
        ([split(module.WORDS % ""), byte_level(False)], False, "qwen2"),
    ],
)
def test_pre_tokenizers_have_llama_cpps_names(steps, ignores, name, tmp_path):
    whole = {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {"type": "BPE", "ignore_merges": ignores},
    }
    assert module._pre_tokenizer(whole, tmp_path) == name
    steps[0] = split("[a-z]+")
    with pytest.raises(MergeError, match=r"text split by Split.*has no name in llama.cpp"):
        module._pre_tokenizer(whole, tmp_path)


def test_qwens_own_tokenizer_is_recognised(tmp_path):
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
    assert module._pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()), tmp_path) == "qwen2"


def test_a_value_too_large_for_float16_is_refused(written, tmp_path):
    source, _ = written
    tensors = source.tensors
    array = source.array

    class Large(Source):
        def __init__(self):
            self.__dict__ = source.__dict__

        def array(self, tensor):
            return array(tensor) * (1e6 if tensor.name.endswith("1.mlp.up_proj.weight") else 1)

    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.up_proj\.weight: .* does not fit float16"):
        write(Large(), tmp_path / FILE, "float16")
    assert tensors is source.tensors


def test_llama_3_positions():
    """Factors against the formula of Llama 3.1 as llama.cpp's converter writes it."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    source = Source.__new__(Source)
    source.config = AutoConfig.for_model("llama", **SHAPE, rope_parameters=rope)
    factors = module._rope_factors(source)
    expected = []
    for number in range(8):
        wave = 2 * np.pi * 5e5 ** (2 * number / 16)
        smooth = (64 / wave - 1) / 3
        inside = 1 / ((1 - smooth) / 8 + smooth)
        expected.append(1.0 if wave < 16 else 8.0 if wave > 64 else inside)
    assert factors.tolist() == pytest.approx(expected, rel=1e-5)
    assert len({round(factor, 3) for factor in expected}) == 3  # below, between and above


def test_files_that_are_no_reward_model(tmp_path, base):
    (tmp_path / "x.gguf").write_bytes(b"GGUFnot really")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        read_fields(tmp_path / "x.gguf")
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"no lora_rm.score.weight.*--to gguf"):
        read_fields(tmp_path / "y.gguf")


def test_a_head_that_is_longer_than_the_model_is_wide_is_refused(tmp_path):
    """It would be multiplied with what lies behind llama.cpp's buffer."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_embedding_length(64)
    writer.add_context_length(64)
    writer.add_array(HEAD, [1.0] * 65)
    writer.add_bool(ALLOW_SPECIAL, False)
    writer.add_string("tokenizer.huggingface.json", "{}")
    writer.add_chat_template("x")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"score head has 65 values, the model 64. Export it again"):
        read_fields(tmp_path / "x.gguf")


class FakeLlama:
    """What the scorer asks of llama.cpp: a memory of tokens by position, and outputs that tell all tokens before."""

    LLAMA_POOLING_TYPE_NONE = LLAMA_FLASH_ATTN_TYPE_DISABLED = GGML_TYPE_F32 = 0
    llama_context_default_params = SimpleNamespace
    llama_free = llama_model_free = llama_batch_free = lambda *_: None

    def __init__(self, *, forgets_parts=True):
        self.forgets_parts = forgets_parts
        self.fails = False
        self.num_decoded = 0

    def llama_init_from_model(self, model, settings):
        self.room, self.tokens = settings.n_ctx, {}
        return "context"

    def llama_get_memory(self, context):
        return "memory"

    def llama_memory_clear(self, memory, and_data):
        self.tokens = {}

    def llama_memory_seq_rm(self, memory, sequence, start, end):
        if self.forgets_parts:
            self.tokens = {position: token for position, token in self.tokens.items() if position < start}
        return self.forgets_parts

    def llama_set_embeddings(self, context, wanted):
        self.gives_outputs = wanted

    def llama_batch_init(self, count, *_):
        lists = {name: [None] * count for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(**lists, seq_id=[[None] for _ in range(count)])

    def llama_decode(self, context, batch):
        places = list(range(len(self.tokens), len(self.tokens) + batch.n_tokens))
        if self.fails or batch.pos != places or places[-1] >= self.room or batch.n_tokens > SMALL_BATCH:
            self.tokens = {}
            return -1
        self.tokens |= zip(batch.pos, batch.token, strict=True)
        self.num_decoded += batch.n_tokens
        self.output = list(self.tokens.values()) if batch.logits[-1] and self.gives_outputs else None
        return 0

    def llama_get_embeddings_ith(self, context, number):
        digest = hashlib.sha256(str(self.output).encode()).digest()
        return ctypes.cast((ctypes.c_float * 4)(*digest[:4]), ctypes.POINTER(ctypes.c_float))


def scorer_on(api):
    """A scorer of a file that is not there."""
    model = object.__new__(GGUFModel)
    model.file, model.head, model.max_length = "a.gguf", np.array([1.0, -2.0, 3.0, 0.5]), 2000
    model._api, model._model, model._context, model._length, model._held, model._log = api, 1, None, 0, [], []
    return model


ROW = [int(token) for token in np.random.default_rng(4).integers(3, 300, 700)]
"""More tokens than llama.cpp gets at once."""


def test_rewards_of_a_row_do_not_depend_on_the_rows_before():
    rows = [
        ROW[:40],
        ROW[:40],
        ROW[:25],  # a start of the one before
        ROW[:60],
        [*ROW[:30], 999, *ROW[31:60]],
        [*ROW[:59], 999],
        ROW[5:9],
        ROW[:1],
        ROW,  # makes a longer context, which holds nothing yet
        ROW[: SMALL_BATCH + 1],
        [*ROW[:600], 999],
        ROW[:40],
    ]
    expected = [scorer_on(FakeLlama()).reward(ids) for ids in rows]
    assert len(set(expected)) == len(rows) - 2
    for forgets_parts in (True, False):
        model = scorer_on(FakeLlama(forgets_parts=forgets_parts))
        assert [model.reward(ids) for ids in rows] == expected


def test_what_two_rows_begin_with_is_computed_once():
    model = scorer_on(FakeLlama())
    counts = []
    for ids in (ROW[:40], ROW[:40], ROW[:60], [*ROW[:30], 999, *ROW[31:60]], ROW[:20]):
        before = model._api.num_decoded
        model.reward(ids)
        counts.append(model._api.num_decoded - before)
    assert counts == [40, 1, 20, 30, 1]  # the last token's output is what is wanted


def test_a_row_that_failed_leaves_nothing_to_build_on():
    model = scorer_on(FakeLlama())
    expected = model.reward(ROW[:40])
    model._api.fails = True
    with pytest.raises(ModelError, match="llama.cpp failed with -1 at token 30"):
        model.reward([*ROW[:30], 999])
    model._api.fails = False
    assert model.reward(ROW[:40]) == expected
    with pytest.raises(ModelError, match="a conversation has 2001 tokens, the model takes 2000"):
        model.reward([1] * 2001)


def metadata(tokenizer, folder):
    """What is written about a tokenizer, by the name of gguf's method."""
    found = {}

    class Writer:
        def __getattr__(self, name):
            return lambda *values: found.__setitem__(name, values)

    source = SimpleNamespace(
        chat=ChatTokenizer(tokenizer), folder=folder, config=SimpleNamespace(vocab_size=len(tokenizer))
    )
    module._add_tokenizer(Writer(), source)
    return found


def test_a_bos_is_asked_for_where_the_tokenizer_adds_one(tmp_path):
    tokenizer = make_tokenizer()
    assert metadata(tokenizer, tmp_path)["add_add_bos_token"] == (True,)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert metadata(tokenizer, tmp_path)["add_add_bos_token"] == (False,)


def test_added_tokens_that_are_not_special_are_not_hidden(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    types = metadata(tokenizer, tmp_path)["add_token_types"][0]
    assert types[tokenizer.convert_tokens_to_ids("<tool>")] == gguf.TokenType.USER_DEFINED


def test_llama_cpp_joins_first_what_a_sentencepiece_tokenizer_learnt_first(tmp_path):
    """It takes the pair of the highest score; SentencePiece numbers its pieces in the order in which they were learnt."""
    tokenizer = make_tokenizer()
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["model"]["byte_fallback"] = True
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(whole))
    found = metadata(tokenizer, tmp_path)
    assert found["add_tokenizer_model"] == ("llama",)
    scores = found["add_token_scores"][0]
    assert scores == sorted(set(scores), reverse=True)
