"""One GGUF file with backbone, head and tokenizer; `gguf_model.py` scores with it on llama.cpp.

llama.cpp knows a pooling type `rank` with a tensor `cls.output`, but it ends no reward model's way: the Llama
loader refuses a file with that tensor ("wrong number of tensors"), and on Qwen3 a softmax follows, which of one
logit is 1 for every text (src/models/qwen3.cpp, src/llama-graph.cpp). So the file is a plain decoder whose pooling
type is LAST, and the head lies in its metadata, as `lora_rm.score.weight`: reward = head . embedding of the last
token, without a sigmoid and without normalising. The tokenizer lies there too, whole, as
`tokenizer.huggingface.json`: token ids come from it and never from llama.cpp's own tokenizer.
"""

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_rm.console import say
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.errors import MergeError
from lora_rm.export.gguf_model import ALLOW_SPECIAL, HEAD, read_chat, read_fields
from lora_rm.export.proof import (
    checked_dtype,
    export_folder,
    need,
    prove,
    usage_page,
    write_parity,
)
from lora_rm.model.tensor_files import StoredTensor, tensors_by_name
from lora_rm.verify import PACKAGE, score_in_fresh_process

FILE = "model.gguf"

DTYPES = ("float32", "float16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What the gguf package can write. Norms and biases stay float32, and so does the head."""

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2"}
"""transformers' model types that are written, and llama.cpp's names for them."""

INTERLEAVED = ("llama", "mistral")
"""Families whose rotary pairs llama.cpp expects side by side: rows of queries and keys are reordered."""

TRANSFORMERS_READS = ("llama", "mistral", "qwen2", "qwen3")
"""Families that transformers opens from GGUF."""

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How GPT-4, Llama 3 and Qwen split text; they differ in how many digits stand together."""


def export_gguf(
    merged: Path,
    out: Path,
    *,
    overwrite: bool = False,
    dtype: str = "float16",
) -> Path:
    """Writes a merged and verified model as GGUF, reads every tensor back, and compares rewards.

    Rewards come from llama.cpp where `llama-cpp-python` is installed, and from transformers' own GGUF reader where
    it knows all that the model needs; one of the two must be at hand.

    Args:
        merged: Folder with `parity.json`, as `verify` leaves it.
        out: Folder to make: `model.gguf`, `parity.json`, and a README with the call.
        overwrite: Replace an earlier export.
        dtype: One of `DTYPES`. What a type costs is measured; one that loses the adapter is refused.

    Raises:
        ConfigError: If there is no such type, or the package `gguf` is missing.
        MergeError: If the model was not verified, `out` exists, the family or its tokenizer cannot be written, or
            the file gives other rewards.
    """
    dtype = checked_dtype("gguf", dtype, DTYPES)
    need("gguf", "gguf")
    with export_folder(merged, out, "gguf", overwrite=overwrite, dtype=dtype) as (unfinished, parity):
        folder, source = unfinished.path, Source(merged)
        say(f"Writing {FILE} and reading every tensor back ...")
        unfinished.once(FILE, lambda file: write(source, file, dtype))
        is_exact = check_tensors(source, folder / FILE, dtype)
        check_tokenizer(source.chat, folder / FILE, parity)
        (folder / "README.md").write_text(usage_page(USAGE, parity), encoding="utf-8")
        from lora_rm.export.graph import load_graph, noise_floor

        noise = noise_floor(load_graph(merged), parity)
        found = _score(source, folder / FILE, parity)
        proved = prove(
            out,
            parity,
            found,
            target="gguf",
            runtime="GGUF file",
            dtype=dtype,
            noise=noise,
            # llama.cpp rounds activations to the type of the weights; transformers computes in float32
            rounded=[way for way in found if way != TRANSFORMERS or not is_exact],
        )
        write_parity(folder, proved)
    return out


# -- what is written -----------------------------------------------------------------------------------------


class Source:
    """A merged folder as the writer needs it.

    Raises:
        MergeError: If llama.cpp, or this writer, does not know something that the model needs.
    """

    def __init__(self, merged: Path) -> None:
        """Args: merged, a folder of `lora-rm merge`."""
        from transformers import AutoConfig

        self.folder = merged
        self.config = AutoConfig.from_pretrained(merged, trust_remote_code=False)
        self.arch = _architecture(self.config)
        self.chat = ChatTokenizer.load(merged)
        self.tensors = tensors_by_name(sorted(merged.glob("*.safetensors")))
        self.head: Any = self.tensors.pop("score.weight").read().float().flatten().numpy()
        self.names = self._names()

    @property
    def head_size(self) -> int:
        """Numbers of an attention head."""
        own = getattr(self.config, "head_dim", None)
        return own or self.config.hidden_size // self.config.num_attention_heads

    def _names(self) -> dict[str, str]:
        """llama.cpp's name of every stored tensor."""
        import gguf

        number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[self.arch]
        names = gguf.get_tensor_name_map(number, self.config.num_hidden_layers)
        found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in self.tensors}
        missing = sorted(name for name, own in found.items() if own is None)
        if missing:
            raise MergeError(
                f"{self.folder}: llama.cpp's {self.arch} has no place for {', '.join(missing[:3])}. Use --to "
                "huggingface, vllm or onnx."
            )
        return found

    def array(self, tensor: StoredTensor) -> Any:
        """A tensor's float32 values in llama.cpp's order of rows."""
        heads = self._interleaved_heads(tensor.name)
        values = tensor.read().float().numpy()
        return values if heads is None else _halves_to_pairs(values, heads)

    def _interleaved_heads(self, name: str) -> int | None:
        if self.config.model_type not in INTERLEAVED:
            return None
        part = name.rsplit(".", 2)[-2]
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        return heads.get(part)


def _architecture(config: Any) -> str:
    """llama.cpp's name of the family; what it would compute differently is refused."""
    family = config.model_type
    if family not in FAMILIES:
        raise MergeError(
            f"The model is a {family}; --to gguf can write {', '.join(FAMILIES)}. Use --to huggingface, vllm or onnx."
        )
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "llama3") or (rope == "llama3" and family not in INTERLEAVED):
        raise MergeError(
            f"The model's positions are scaled by {rope}, which --to gguf does not write for {family} (it writes "
            "default and linear, and llama3 for Llama). Use --to huggingface or vllm."
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise MergeError(
            f"The model's attention ends after {window} tokens (sliding_window), which llama.cpp's "
            f"{FAMILIES[family]} does not do. Use --to huggingface or vllm."
        )
    if config.hidden_act != "silu":
        raise MergeError(
            f"The model's hidden_act is {config.hidden_act}; llama.cpp's {FAMILIES[family]} computes silu. Use --to "
            "huggingface or vllm."
        )
    return FAMILIES[family]


def _halves_to_pairs(rows: Any, heads: int) -> Any:
    """Reorders each head's rows (0, 1, ... | n/2, ...) to (0, n/2, 1, n/2 + 1, ...)."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def write(source: Source, file: Path, dtype: str) -> None:
    """Writes the file tensor by tensor: in memory lies one tensor at a time.

    Raises:
        MergeError: If a value does not fit float16.
    """
    import gguf

    writer = gguf.GGUFWriter(file, source.arch)
    _add_settings(writer, source, dtype)
    _add_tokenizer(writer, source)
    writer.add_array(HEAD, source.head.tolist())
    writer.add_bool(ALLOW_SPECIAL, source.chat.allow_special_tokens)
    kinds = {name: _kind(tensor, dtype) for name, tensor in source.tensors.items()}
    for name, tensor in source.tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name])
        size = np.dtype(np.uint8)
        writer.add_tensor_info(source.names[name], shape, size, math.prod(shape), raw_dtype=kinds[name])
    factors = _rope_factors(source)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in source.tensors.items():
        values = source.array(tensor)
        with np.errstate(over="ignore"):
            packed = gguf.quants.quantize(values, kinds[name])
        if kinds[name] == gguf.GGMLQuantizationType.F16 and not np.isfinite(packed).all():
            raise MergeError(
                f"{name}: a value of {np.abs(values).max():.4g} does not fit float16. Use --dtype float32 or Q8_0."
            )
        writer.write_tensor_data(packed.view(np.uint8))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()


def _kind(tensor: StoredTensor, dtype: str) -> Any:
    """How a tensor is stored: vectors in float32, rows that no block fits in float16, as llama.cpp does it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[{"float32": "F32", "float16": "F16"}.get(dtype, dtype)]
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    return kind if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _add_settings(writer: Any, source: Source, dtype: str) -> None:
    import gguf

    config, rope = source.config, source.config.rope_parameters
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("reward model")
    writer.add_description(f"Reward = {HEAD} . embedding of the last token, not normalised.")
    writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(dtype)))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(source.head_size)
    writer.add_value_length(source.head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(source.head_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_pooling_type(gguf.PoolingType.LAST)


def _file_type(dtype: str) -> str:
    return {"float32": "ALL_F32", "float16": "MOSTLY_F16"}.get(dtype, f"MOSTLY_{dtype}")


def _rope_factors(source: Source) -> Any:
    """By what Llama 3.1 divides each frequency, (head size / 2,) float32; None for other models."""
    rope = source.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = ROPE_INIT_FUNCTIONS["llama3"](source.config, torch.device("cpu"))[0].double()
    size = source.head_size
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled).float().numpy()


def _add_tokenizer(writer: Any, source: Source) -> None:
    """The tokenizer twice: in llama.cpp's terms, for other programs, and whole."""
    from gguf import TokenType

    chat = source.chat
    whole = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    model, count = whole["model"], source.config.vocab_size
    named: dict[int, str] = {number: token for token, number in chat.tokenizer.get_vocab().items()}
    if max(named) >= count:
        raise MergeError(
            f"{source.folder}: the tokenizer knows token {max(named)}, the embeddings end at {count - 1}. "
            "Use --to huggingface."
        )
    added = {token["id"]: token["special"] for token in whole["added_tokens"]}
    types = []
    for number in range(count):
        token = named.setdefault(number, f"[PAD{number}]")
        kind = TokenType.NORMAL
        if number in added:
            kind = TokenType.CONTROL if added[number] else TokenType.USER_DEFINED
        elif token == f"[PAD{number}]":
            kind = TokenType.UNUSED
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        types.append(int(kind))
    if model.get("byte_fallback"):
        # SentencePiece: llama.cpp joins the pair with the highest score, which here is the one learnt first
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(number) for number in range(count)])
        writer.add_add_space_prefix(_adds_space(whole))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(whole, source.folder))
        pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        writer.add_token_merges(list(pairs))
    writer.add_token_list([named[number] for number in range(count)])
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(chat.tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(chat.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat.tokenizer.chat_template)
    writer.add_string("tokenizer.huggingface.json", json.dumps(whole, ensure_ascii=False))


def _adds_space(whole: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    text = json.dumps([whole["normalizer"], whole["pre_tokenizer"]])
    return '"Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text


def _pre_tokenizer(whole: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text before it joins bytes.

    Raises:
        MergeError: If it is a kind of tokenizer, or a way to split, that has no name here.
    """
    step = whole["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    seen = []
    for one in steps:
        detail = {
            "Split": lambda one: one["pattern"].get("Regex"),
            "Digits": lambda one: one["individual_digits"],
            "ByteLevel": lambda one: (one["use_regex"], one["add_prefix_space"]),
        }.get(one.get("type", ""), lambda _: None)
        seen.append((one.get("type", ""), detail(one)))
    words = {
        (WORDS % "{1,3}", True): "llama-bpe",
        (WORDS % "{1,3}", False): "dbrx",  # the same words, and merges also where a word is a token
        (WORDS % "", False): "qwen2",
    }
    known = {
        (("ByteLevel", (True, False)),): "gpt-2",
        (("Digits", True), ("ByteLevel", (True, False))): "smollm",
    } | {
        (("Split", pattern), ("ByteLevel", (False, False))): name
        for (pattern, ignores), name in words.items()
        if ignores == bool(whole["model"].get("ignore_merges"))
    }
    if whole["model"]["type"] != "BPE" or tuple(seen) not in known:
        raise MergeError(
            f"{folder}: its tokenizer ({whole['model']['type']}, text split by "
            f"{' and '.join(name for name, _ in seen)}) has no name in llama.cpp that --to gguf knows. Use --to "
            "huggingface, vllm or onnx."
        )
    return known[tuple(seen)]


# -- proof ---------------------------------------------------------------------------------------------------

TRANSFORMERS, LLAMA_CPP = "transformers, from the GGUF file", "llama.cpp"


def check_tensors(source: Source, file: Path, dtype: str) -> bool:
    """Compares every tensor of the file with the merged one.

    Returns:
        Whether all values came back unchanged.

    Raises:
        MergeError: If a tensor is missing, left over, or further away than its type's rounding explains.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    expected = {source.names[name]: tensor for name, tensor in source.tensors.items()}
    differing = stored.keys() ^ {*expected, *({"rope_freqs.weight"} & stored.keys())}
    if differing:
        raise MergeError(f"{file}: tensors missing or left over: {sorted(differing)[:5]}.")
    head = np.array(reader.fields[HEAD].contents(), np.float32)
    if not np.array_equal(head, source.head):
        raise MergeError(f"{file}: its score head is not the trained one.")
    # largest error as a share of a block's largest value: half a step, with room for the rounding of the scale; a
    # scale below 6e-5 is a float16 with fewer bits, off by up to 2^-25, and is multiplied by up to 127
    allowed = {"Q8_0": 1 / 220, "Q5_1": 1 / 15, "Q5_0": 1 / 15, "Q4_1": 1 / 7, "Q4_0": 1 / 7}
    is_exact = True
    for name, tensor in expected.items():
        packed = stored[name]
        exact = source.array(tensor)
        found = dequantize(packed.data, packed.tensor_type).reshape(exact.shape)
        error = np.abs(found - exact)
        kind = packed.tensor_type.name
        if kind in ("F32", "F16"):
            step = 0.0 if kind == "F32" else 2**-11
            bound = step * np.abs(exact) + (2**-25 if step else 0.0)
        else:
            blocks = np.abs(exact).reshape(-1, 32).max(1, keepdims=True)
            bound = np.broadcast_to(allowed[kind] * blocks + 2**-18, (blocks.size, 32)).reshape(exact.shape)
        if not (error <= bound).all():  # NaN fails too
            raise MergeError(f"{file}: {name} is not the merged weight.")
        is_exact = is_exact and not error.any()
    say(f"{len(expected)} tensors read back ({dtype}{', every value unchanged' if is_exact else ''}).")
    return is_exact


def check_tokenizer(chat: ChatTokenizer, file: Path, parity: Mapping[str, Any]) -> None:
    """Compares token ids of all texts by the file's tokenizer with those of the merged folder's.

    Raises:
        MergeError: If a text gets other ids, or the template, the BOS rule or the padding changed.
    """
    own = read_chat(read_fields(file))
    texts = [answer["text"] for answer in parity["answers"]]
    rules = ("template_hash", "adds_bos", "pad_id", "allow_special_tokens")
    if own.text_ids(texts) != chat.text_ids(texts) or any(getattr(own, r) != getattr(chat, r) for r in rules):
        raise MergeError(
            f"{file}: the tokenizer that was written gives other token ids. Use --to huggingface."
        )


def _score(source: Source, file: Path, parity: Mapping[str, Any]) -> dict[str, list[float]]:
    """Rewards by every reader that is at hand, each in a fresh process."""
    rows = [answer["ids"] for answer in parity["answers"]]
    request = {
        "file": str(file.resolve()),
        "rows": rows,
        "texts": [answer["text"] for answer in parity["answers"]],
        "package": PACKAGE,
    }
    found = {}
    if importlib.util.find_spec("llama_cpp") is not None:
        scored = score_in_fresh_process(f"{file.name} in llama.cpp", LLAMA_CPP_PROGRAM, request)
        found[LLAMA_CPP] = scored["rewards"]
        same = sum(a == b for a, b in zip(scored["ids"], rows, strict=True))
        say(f"llama.cpp's own tokenizer gives the same ids for {same} of {len(rows)} texts.")
    unread = _unread(source)
    if not unread:
        found[TRANSFORMERS] = score_in_fresh_process(f"{file.name} in transformers", PROGRAM, request)
    if not found:
        raise MergeError(
            f"{source.folder}: transformers does not read {unread} from GGUF, so the rewards can only be proven in "
            "llama.cpp. Run: pip install llama-cpp-python"
        )
    return found


def _unread(source: Source) -> str:
    """What transformers' GGUF reader would not see, or nothing."""
    config = source.config
    if config.model_type not in TRANSFORMERS_READS:
        return f"the family {config.model_type}"
    if config.rope_parameters["rope_type"] != "default":
        return f"position scaling ({config.rope_parameters['rope_type']})"
    if source.arch == "qwen2" and source.head_size * config.num_attention_heads != config.hidden_size:
        return "the size of attention heads"
    if source.arch == "qwen3" and source.head_size != 128:
        return "the size of attention heads"
    if any(name.endswith("_proj.bias") for name in source.tensors) and source.arch != "qwen2":
        return "biases"
    return ""


PROGRAM = f"""\
import json, sys, torch
from pathlib import Path
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, GgufConfig
request = json.load(open(sys.argv[1], encoding="utf-8"))
file = Path(request["file"])
head = torch.tensor(GGUFReader(file).fields["{HEAD}"].contents())
unpacked = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(
    str(file.parent), gguf_file=file.name, dtype=torch.float32, quantization_config=unpacked
).eval()
with torch.inference_mode():
    rewards = [
        float(model.model(torch.tensor([ids])).last_hidden_state[0, -1].float() @ head) for ids in request["rows"]
    ]
json.dump(rewards, open(sys.argv[2], "w"))
"""
"""Scores token ids with transformers, which reads settings and weights from the GGUF file alone."""

LLAMA_CPP_PROGRAM = """\
import json, sys
request = json.load(open(sys.argv[1], encoding="utf-8"))
sys.path.insert(0, request["package"])
from lora_rm.score import load_reward_model
scorer = load_reward_model(request["file"], device="cpu")
found = {"rewards": scorer.score_ids(request["rows"]), "ids": [scorer.model.runtime_ids(text) for text in request["texts"]]}
json.dump(found, open(sys.argv[2], "w"))
"""
"""Scores token ids with the scorer that users get."""


USAGE = f"""\
# Reward model, as a GGUF file

`{FILE}` holds backbone, score head and tokenizer. After `pip install '.[gguf]'` in the folder of
lora_rm's source:

```python
from lora_rm import load_reward_model
reward = load_reward_model("{FILE}")
rewards = reward.score("What is 2 + 2?", ["4", "Paris"])
```

Other programs on llama.cpp: embed a conversation as the chat template writes it{{bos}}, with pooling `last`
and without normalising (`llama-server --embedding --pooling last`, `"embd_normalize": -1`); the reward is the dot product
of the embedding with the metadata array `{HEAD}`. Texts, and rewards measured against the trained adapter:
`parity.json`.
"""
"""README of an export."""
