"""A reward model in a GGUF file, computed by llama.cpp on token ids of the tokenizer that lies in the file."""

import ctypes
import functools
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_rm import processes
from lora_rm.data.tokens import ChatTokenizer, TokenTree
from lora_rm.errors import ModelError
from lora_rm.export.proof import need

HEAD = "lora_rm.score.weight"
"""Metadata key of the head, (H,) float32."""

ALLOW_SPECIAL = "lora_rm.allow_special_tokens"
"""Metadata key of `data.allow_special_tokens`."""

SMALL_BATCH = 512
"""Tokens that llama.cpp computes at once."""


def read_fields(file: Path) -> Mapping[str, Any]:
    """The metadata of a file.

    Raises:
        ModelError: If it is no GGUF file with a reward head.
    """
    from gguf import GGUFReader

    try:
        fields: Mapping[str, Any] = GGUFReader(file).fields
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{file}: cannot be read as GGUF ({error}).") from None
    arch = fields["general.architecture"].contents() if "general.architecture" in fields else None
    needed = (
        HEAD,
        "general.architecture",
        ALLOW_SPECIAL,
        "tokenizer.huggingface.json",
        "tokenizer.chat_template",
    )
    sizes = (f"{arch}.embedding_length", f"{arch}.context_length")
    missing = [name for name in (*needed, *sizes) if name not in fields]
    if missing:
        raise ModelError(
            f"{file}: holds no {missing[0]}: it is no reward model of lora_rm. Make one with `lora-rm export RUN --to gguf`."
        )
    size = int(fields[sizes[0]].contents())
    if len(fields[HEAD].contents()) != size:  # llama.cpp's buffer has as many values as the model is wide
        raise ModelError(
            f"{file}: its score head has {len(fields[HEAD].contents())} values, the model {size}. Export it again."
        )
    return fields


def read_chat(fields: Mapping[str, Any]) -> ChatTokenizer:
    """The tokenizer that lies in a file's metadata."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(fields["tokenizer.huggingface.json"].contents())
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            special[f"{name}_token"] = backend.id_to_token(field.contents())
    template = fields["tokenizer.chat_template"].contents()
    chat = ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special))
    chat.allow_special_tokens = bool(fields[ALLOW_SPECIAL].contents())
    return chat


@functools.cache
def _said() -> tuple[deque[str], Any]:
    """What llama.cpp said last, for error messages, instead of hundreds of printed lines; and what takes it down.

    It is one for all models and stays: llama.cpp calls it whichever model is at work.
    """
    import llama_cpp

    lines: deque[str] = deque(maxlen=20)

    def remember(level: int, text: bytes, _: Any) -> None:
        if level >= 3:  # warnings and errors
            lines.append(text.decode(errors="replace"))

    callback = llama_cpp.llama_log_callback(remember)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return lines, callback


class GGUFModel:
    """A reward model that llama.cpp computes; `lora_rm.load_reward_model("x.gguf")` opens it.

    `chat` is the tokenizer. Keys and values are kept in float32: in llama.cpp's default, float16, they alone
    cost about as much as all other rounding of a float16 file.
    """

    def __init__(self, file: Path, *, device: str = "auto") -> None:
        """Opens a file; `device` cpu keeps all layers off the GPU.

        Raises:
            ConfigError: If `llama-cpp-python` or `gguf` is missing.
            ModelError: If it is no GGUF file with a reward head, or llama.cpp refuses it.
        """
        need("gguf", "gguf", "llama_cpp")
        import llama_cpp

        fields = read_fields(file)
        self.file = file
        self.chat = read_chat(fields)
        self.head = np.array(fields[HEAD].contents(), np.float64)
        arch = fields["general.architecture"].contents()
        self.max_length = int(fields[f"{arch}.context_length"].contents())
        self._api: Any = llama_cpp
        self._log, _ = _said()
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0 if device == "cpu" else -1
        self._model: Any = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        if not self._model:
            raise ModelError(f"{file}: llama.cpp cannot open it: {''.join(self._log)[-800:]}")
        self._context: Any = None
        self._length = 0
        self._held: list[int] = []

    def score(self, trees: Sequence[TokenTree], *_: Any, **__: Any) -> list[list[float]]:
        """Rewards of every tree's answers; what two conversations in a row begin with is computed once."""
        return [[self.reward(ids) for ids in tree.conversations()] for tree in trees]

    def reward(self, ids: Sequence[int]) -> float:
        """The reward of one whole conversation.

        Raises:
            ModelError: If it is longer than the model's context, or llama.cpp fails.
        """
        if len(ids) > self.max_length:
            raise ModelError(
                f"{self.file}: a conversation has {len(ids)} tokens, the model takes {self.max_length}. Shorten it."
            )
        self._make_room(len(ids))
        # the last token is always computed again: its output is what is wanted
        pairs = zip(self._held, ids[:-1], strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self._held), len(ids) - 1))
        memory = self._api.llama_get_memory(self._context)
        if not self._api.llama_memory_seq_rm(memory, 0, same, -1):
            self._api.llama_memory_clear(memory, True)
            same = 0
        # no output but the last token's is asked for: each would be multiplied with the whole vocabulary
        self._api.llama_set_embeddings(self._context, False)
        for start in range(same, len(ids) - 1, SMALL_BATCH):
            self._decode(ids[start : min(start + SMALL_BATCH, len(ids) - 1)], start, wanted=False)
        self._api.llama_set_embeddings(self._context, True)
        self._decode(ids[-1:], len(ids) - 1, wanted=True)
        self._held = list(ids)
        hidden = self._api.llama_get_embeddings_ith(self._context, -1)
        return float(np.ctypeslib.as_array(hidden, (len(self.head),)).astype(np.float64) @ self.head)

    def runtime_ids(self, text: str) -> list[int]:
        """Token ids of a rendered text by llama.cpp's own tokenizer, with the BOS that it adds itself."""
        raw = text.encode()
        room = (self._api.llama_token * (len(raw) + 8))()
        vocabulary = self._api.llama_model_get_vocab(self._model)
        count = self._api.llama_tokenize(vocabulary, raw, len(raw), room, len(room), True, True)
        return list(room[: max(count, 0)])

    def _decode(self, ids: Sequence[int], start: int, *, wanted: bool) -> None:
        batch = self._api.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for number, token in enumerate(ids):
                batch.token[number] = token
                batch.pos[number] = start + number
                batch.n_seq_id[number] = 1
                batch.seq_id[number][0] = 0
                batch.logits[number] = wanted
            self._held = self._held[:start]
            status = self._api.llama_decode(self._context, batch)
        finally:
            self._api.llama_batch_free(batch)
        if status:
            self._held = []
            raise ModelError(
                f"{self.file}: llama.cpp failed with {status} at token {start}: {''.join(self._log)[-800:]}"
            )

    def _make_room(self, length: int) -> None:
        """Makes the context as long as the longest conversation so far needs."""
        if length <= self._length:
            return
        if self._context:
            self._api.llama_free(self._context)
        self._length = min(self.max_length, -(-length // SMALL_BATCH) * SMALL_BATCH)
        settings = self._api.llama_context_default_params()
        settings.n_ctx = self._length
        settings.n_batch = settings.n_ubatch = SMALL_BATCH
        settings.n_threads = settings.n_threads_batch = _num_threads()
        settings.embeddings = True
        settings.pooling_type = (
            self._api.LLAMA_POOLING_TYPE_NONE
        )  # so that outputs can be asked for one by one
        settings.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.type_k = settings.type_v = self._api.GGML_TYPE_F32
        self._held = []
        self._context = self._api.llama_init_from_model(self._model, settings)
        if not self._context:
            self._length = 0
            raise ModelError(f"{self.file}: llama.cpp makes no context: {''.join(self._log)[-800:]}")

    def __del__(self) -> None:
        """Frees what llama.cpp holds."""
        if getattr(self, "_context", None):
            self._api.llama_free(self._context)
        if getattr(self, "_model", None):
            self._api.llama_model_free(self._model)


def _num_threads() -> int:
    """As many as OMP_NUM_THREADS says, else as this process has cores."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) else processes.num_cores()
