"""An ONNX file that gives rewards with onnxruntime, tokenizers and numpy: no torch, no transformers."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from lora_rm.console import say
from lora_rm.errors import MergeError
from lora_rm.export.graph import RewardGraph, batches, load_graph, noise_floor, trace
from lora_rm.export.proof import (
    checked_dtype,
    copy_tokenizer,
    export_folder,
    need,
    prove,
    usage_page,
    write_parity,
)
from lora_rm.verify import score_in_fresh_process

FILE = "model.onnx"

DTYPES = ("float32", "int8")

BLOCK = 32
"""Weights of a column that share a scale and a zero point in int8: 1.3 bytes a weight."""

ONE_FILE_BYTES = 1_900_000_000
"""Above it weights lie in `model.onnx.data`: protobuf, which an ONNX file is, ends at 2 GiB."""


def export_onnx(
    merged: Path,
    out: Path,
    *,
    overwrite: bool = False,
    dtype: str = "float32",
) -> Path:
    """Writes a merged and verified model as ONNX and checks it in ONNX Runtime, in a process without torch.

    Args:
        merged: Folder with `parity.json`, as `verify` leaves it.
        out: Folder to make: `model.onnx`, the tokenizer's files, `parity.json`, and a README with the call.
        overwrite: Replace an earlier export.
        dtype: float32, or int8: the weights of all linear layers in 8 bit, products with 8-bit activations; head,
            norms and embeddings stay float32. What that costs is measured.

    Raises:
        ConfigError: If a package of the extra `onnx` is missing, or there is no such type.
        MergeError: If the model was not verified, `out` exists, the model cannot be traced, or the file gives
            other rewards.
    """
    dtype = checked_dtype("onnx", dtype, DTYPES)
    need("onnx", "onnx", "onnxscript", "onnxruntime")
    with export_folder(merged, out, "onnx", overwrite=overwrite, dtype=dtype) as (unfinished, parity):
        folder, graph = unfinished.path, load_graph(merged)
        noise = noise_floor(graph, parity)
        unfinished.once(FILE, partial(_write, graph, dtype))
        del graph
        copy_tokenizer(merged, folder)
        (folder / "README.md").write_text(usage_page(USAGE, parity), encoding="utf-8")
        answers = parity["answers"]
        kinds = batches([answer["ids"] for answer in answers])
        request = {
            "folder": str(folder.resolve()),
            "file": FILE,
            "batches": kinds,
            "texts": [answer["text"] for answer in answers],
        }
        found = score_in_fresh_process(f"{out / FILE} in ONNX Runtime", PROGRAM, request)
        changed = [a["text"] for a, ids in zip(answers, found["ids"], strict=True) if a["ids"] != ids]
        if changed:
            raise MergeError(
                f"{merged / 'tokenizer.json'}: gives other token ids for {len(changed)} of {len(answers)} texts when "
                f"it is read by tokenizers alone (first: {changed[0][:80]!r}). Export --to huggingface instead."
            )
        proved = prove(
            out,
            parity,
            found["rewards"],
            target="onnx",
            runtime="ONNX Runtime",
            dtype=dtype,
            noise=noise,
            rounded=[] if dtype == "float32" else list(kinds),
        )
        write_parity(folder, proved)
    return out


def _write(graph: RewardGraph, dtype: str, file: Path) -> None:
    """A model as an ONNX file."""
    program, num_bytes = trace(graph), sum(p.nbytes for p in graph.parameters())
    say(f"Writing {FILE} ...")
    axes = {0: "batch", 1: "length"}
    with _quiet():
        torch.onnx.export(
            program,
            (),
            file,
            input_names=["input_ids", "attention_mask"],
            output_names=["rewards"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},  # names of what the trace left free
            dynamo=True,
            verbose=False,
            external_data=num_bytes > ONE_FILE_BYTES,
        )
    if dtype == "int8":
        say("Quantising its linear layers ...")
        _quantize(file)


def _quantize(file: Path) -> None:
    """Replaces the linear layers of an ONNX file by ones with 8-bit weights.

    ONNX Runtime's own `quantize_dynamic` gives each activation tensor one scale for all its channels, which the
    outliers of language models do not survive: SmolLM2-135M's rewards changed by 118 % of their spread on average,
    more than by leaving the adapter out; with blocks of 32, by 6.5 % (11 % without zero points).
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with _quiet():
        # level 4: products with activations in 8 bit, by blocks too; level 0 gained little and took five times as long
        quantizer = MatMulNBitsQuantizer(
            onnx.load(file), bits=8, block_size=BLOCK, is_symmetric=False, accuracy_level=4
        )
        quantizer.process()
        for old in file.parent.glob(f"{file.name}*"):
            old.unlink()
        model = quantizer.model.model
        size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
        onnx.save(model, file, save_as_external_data=size > ONE_FILE_BYTES, location=f"{file.name}.data")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch.onnx and onnxruntime, which log a line a node."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


PROGRAM = """\
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["lora_rm"] = None  # none of them is needed
import numpy, onnxruntime, tokenizers
request = json.load(open(sys.argv[1], encoding="utf-8"))
tokenizer = tokenizers.Tokenizer.from_file(request["folder"] + "/tokenizer.json")
session = onnxruntime.InferenceSession(request["folder"] + "/" + request["file"])
json.dump({
    "ids": [tokenizer.encode(text).ids for text in request["texts"]],
    "rewards": {
        way: [
            reward
            for batch in kind
            for reward in session.run(["rewards"], {n: numpy.array(v, "int64") for n, v in batch.items()})[0].tolist()
        ]
        for way, kind in request["batches"].items()
    },
}, open(sys.argv[2], "w"))
"""
"""Tokenizes texts and scores batches without torch."""

USAGE = """\
# Reward model, as ONNX

Needs `pip install onnxruntime tokenizers numpy`, no torch. Inputs: `input_ids` and `attention_mask`, int64, any
batch and length, padded on either side. Output: the raw rewards, float32. Measured against the trained adapter:
`parity.json`.

```python
import json, numpy, onnxruntime, tokenizers
texts = [answer["text"] for answer in json.load(open("parity.json", "rb"))["answers"][:8]]
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json"); tokenizer.enable_padding()
session = onnxruntime.InferenceSession("model.onnx")
batch = tokenizer.encode_batch(texts)
inputs = {"input_ids": [one.ids for one in batch], "attention_mask": [one.attention_mask for one in batch]}
print(session.run(["rewards"], {name: numpy.array(rows, "int64") for name, rows in inputs.items()})[0].tolist())
```

A text of your own: `transformers.AutoTokenizer.from_pretrained(".").apply_chat_template(messages, tokenize=False)`{bos}.

In OpenVINO (`pip install openvino tokenizers`); without the hint it computes in 16 bits where the processor can:

```python
import json, openvino, tokenizers
texts = [answer["text"] for answer in json.load(open("parity.json", "rb"))["answers"][:8]]
tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json"); tokenizer.enable_padding()
model = openvino.Core().compile_model("model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
batch = tokenizer.encode_batch(texts)
print(model([[one.ids for one in batch], [one.attention_mask for one in batch]])[0].tolist())
```
"""
"""README of an export."""
