"""Exports: each is opened again by what its users open it with, and gives the rewards it promised or is refused."""

import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    FAMILIES,
    classifier,
    killed_in_verification,
    make_base,
    make_merged,
    notes_of,
    parity_of,
    written,
)
from huggingface_hub import ModelCard

from lora_rm.cli import main
from lora_rm.config import check_settings
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.errors import ConfigError, MergeError, ModelError
from lora_rm.export import TARGETS, graph, huggingface, onnx, proof
from lora_rm.export.graph import load_graph
from lora_rm.export.huggingface import hub_id, inherited_license, model_card
from lora_rm.export.onnx import export_onnx
from lora_rm.export.proof import need, prove, read_parity
from lora_rm.export.torch_export import export_torch_export, store_as
from lora_rm.model.elementwise import AT_ONCE
from lora_rm.unfinished import unfinished_folder
from lora_rm.verify import score_in_fresh_process
from lora_rm.workflow import EXPORTS, WITH_DTYPE, export_run


@pytest.fixture(scope="module")
def merged(base, held_out, tmp_path_factory):
    """A folder as merge and verify leave it, with 24 answers to 12 prompts."""
    return make_merged(tmp_path_factory.mktemp("export") / "merged", base, held_out, num_prompts=12)


def run_snippet(folder, *blocked, number=0):
    """Runs a call that an export's README shows, as it stands, where some packages cannot be imported."""
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(snippets[number].splitlines()) <= 7
    return run_code(snippets[number], folder, *blocked)


def run_code(code, folder, *blocked):
    """What Python code prints in a folder, where some packages cannot be imported."""
    program = "".join(["import sys\n", *(f"sys.modules[{name!r}] = None\n" for name in blocked), code])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_own_text(folder):
    """What a README says of making a text, against the token ids of this library."""
    (call, note) = re.findall(
        r"A text of your own: `(transformers.*)`(.*)\.\n", (folder / "README.md").read_text()
    )[0]
    assert note == ", less the BOS, which the tokenizer adds"
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    code = f"import json, transformers\nmessages = {messages!r}\nprint(json.dumps({call}))"
    chat = ChatTokenizer.load(folder)
    text = run_code(code, folder).removeprefix(chat.tokenizer.bos_token)
    (ids,) = chat.ids([(tuple(messages), ())])
    assert chat.tokenizer(text).input_ids == list(ids)


def tells_a_path(file):
    """Whether a file names a folder of this machine."""
    content = file.read_bytes()
    return any(
        str(Path(module.__file__).parent).encode() in content for module in (graph, torch, transformers)
    )


EXPORT = (
    "from lora_rm.cli import main; main(['export', sys.argv[1], '--to', sys.argv[2], '--out', sys.argv[3]])"
)

WAYS = [
    "one by one",
    "padded right, 8 together",
    "padded left, 8 together",
    "padded on both sides, 3 together",
]


def test_onnx_gives_the_rewards_at_every_shape_and_from_text_without_torch(merged, tmp_path, capsys):
    """The first attempt is killed in its verification; the second does not write the graph again."""
    import onnxruntime

    killed_in_verification(EXPORT, merged, "onnx", tmp_path / "onnx")
    finished = notes_of(tmp_path / "onnx")
    assert finished.keys() == {"model.onnx"}
    out = export_onnx(merged, tmp_path / "onnx")
    assert "Going on with an interrupted export" in capsys.readouterr().out
    assert written(out / "model.onnx") == finished["model.onnx"]
    assert {file.name for file in out.iterdir()} == {
        "model.onnx", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "lora_rm_merge.json",
        "parity.json", "README.md",
    }  # fmt: skip
    parity, expected = parity_of(out), parity_of(merged)
    assert parity["passed"]
    assert list(parity["changes"]) == WAYS
    assert parity["changes"]["one by one"]["num_answers"] == 24
    assert all(change["against_merged"] < 1e-4 for change in parity["changes"].values())
    assert 0 < parity["noise"] < 1e-5
    assert [a["exported"] for a in parity["answers"]] == pytest.approx(
        [a["reward"] for a in expected["answers"]], abs=1e-4
    )
    session = onnxruntime.InferenceSession(out / "model.onnx")
    kinds = [(i.name, i.shape, i.type) for i in session.get_inputs()]
    assert kinds == [(name, ["batch", "length"], "tensor(int64)") for name in ("input_ids", "attention_mask")]
    (reward,) = session.get_outputs()
    assert (reward.name, reward.shape, reward.type) == ("rewards", ["batch"], "tensor(float)")
    assert not tells_a_path(out / "model.onnx")
    found = run_snippet(out, "torch", "transformers", "lora_rm")
    assert found == pytest.approx([a["reward"] for a in expected["answers"][:8]], abs=1e-4)
    check_own_text(out)


def test_openvino_gives_the_rewards_of_the_onnx_file(merged, tmp_path):
    pytest.importorskip("openvino")
    out, answers = export_onnx(merged, tmp_path / "onnx"), parity_of(merged)["answers"][:8]
    found = run_snippet(out, "torch", "transformers", "lora_rm", "onnxruntime", number=1)
    assert found == pytest.approx([answer["reward"] for answer in answers], abs=1e-4)


def test_mlx_gives_the_rewards_of_the_export(merged, tmp_path):
    pytest.importorskip("mlx_lm")
    out, answers = tmp_path / "huggingface", parity_of(merged)["answers"][:8]
    assert main(["export", str(merged), "--to", "huggingface", "--out", str(out)]) == 0
    text = (Path(__file__).parents[1] / "recipes/mlx.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = run_code(code, out)
    assert found == pytest.approx([answer["reward"] for answer in answers], abs=1e-4)


def test_a_fresh_process_answers_by_file_and_its_failure_is_told():
    request = {"number": 3}
    program = """
import json, sys
print("progress")
json.dump(json.load(open(sys.argv[1]))["number"] + 1, open(sys.argv[2], "w"))
"""
    assert score_in_fresh_process("x", program, request) == 4
    with pytest.raises(
        MergeError, match=r"(?s)^x: cannot be opened and scored in a fresh process: .*KeyError: 'other'"
    ):
        score_in_fresh_process("x", program.replace("number", "other"), request)
    with pytest.raises(MergeError, match="^x: new weights were drawn when it was opened"):
        score_in_fresh_process("x", program + "print('newly initialized', file=sys.stderr)", request)


def phases(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.endswith(" ...")]


def test_onnx_int8_costs_what_it_says_and_may_lie_in_two_files(merged, tmp_path, monkeypatch, capsys):
    import onnx as library

    monkeypatch.setattr(onnx, "ONE_FILE_BYTES", 0)
    out = export_onnx(merged, tmp_path / "int8", dtype="int8")
    assert phases(capsys) == [
        "Opening the merged model in float32 ...",
        "Measuring the noise of float32 ...",
        "Tracing the model ...",
        "Writing model.onnx ...",
        "Quantising its linear layers ...",
        f"Scoring in a fresh process: {out / 'model.onnx'} in ONNX Runtime ...",
    ]
    parity = parity_of(out)
    assert parity["dtype"] == "int8"
    for change in parity["changes"].values():
        assert 1e-4 < change["mean"] < 0.2  # it costs, and not the adapter
    model = library.load(out / "model.onnx", load_external_data=False)
    layers = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(layers) == 3 * 7  # every linear layer, and the head is none of them
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert stored["backbone.embed_tokens.weight"].data_type == library.TensorProto.FLOAT
    assert stored["head"].data_type == library.TensorProto.FLOAT
    weights = sum(math.prod(tensor.dims) for tensor in stored.values() if "MatMul" not in tensor.name)
    assert (out / "model.onnx.data").stat().st_size > weights
    assert len(list(out.glob("model*"))) == 2
    with pytest.raises(ConfigError, match="--dtype is 'int3'; --to onnx can write float32, int8"):
        export_onnx(merged, tmp_path / "int3", dtype="int3")


def test_torch_export_needs_torch_alone(merged, tmp_path, capsys, monkeypatch):
    """The first attempt is killed in its verification; the second does not write the program again.

    Python files where the command is called are not run.
    """
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "torch.py").write_text("open('run', 'w').close()")
    out = tmp_path / "pt2"
    killed_in_verification(EXPORT, merged, "torch-export", out)
    monkeypatch.chdir(tmp_path / "here")
    finished = notes_of(out)
    assert finished.keys() == {"model.pt2"}
    assert main(["export", str(merged), "--to", "torch-export", "--out", str(out)]) == 0
    assert "Going on with an interrupted export" in capsys.readouterr().out
    assert written(out / "model.pt2") == finished["model.pt2"]
    parity, expected = parity_of(out), parity_of(merged)
    assert parity["target"] == "torch-export"
    assert not (tmp_path / "here" / "run").exists()
    assert list(parity["changes"]) == WAYS
    assert all(change["against_merged"] < 1e-4 for change in parity["changes"].values())
    with zipfile.ZipFile(out / "model.pt2") as archive:
        archive.extractall(tmp_path / "parts")
    parts = [file for file in (tmp_path / "parts").rglob("*") if file.is_file()]
    assert len(parts) > 5
    assert not [file.name for file in parts if tells_a_path(file)]
    found = run_snippet(out, "transformers", "lora_rm")
    assert found == pytest.approx([a["reward"] for a in expected["answers"][:8]], abs=1e-4)
    check_own_text(out)
    with pytest.raises(MergeError, match="exists already"):
        export_torch_export(merged, out)


def test_torch_export_in_bfloat16_says_what_it_costs(merged, tmp_path, capsys):
    parity = parity_of(export_torch_export(merged, tmp_path / "pt2", dtype="bfloat16"))
    assert {"Tracing the model ...", "Writing model.pt2 ..."} <= set(phases(capsys))
    assert parity["dtype"] == "bfloat16"
    assert 1e-4 < parity["changes"]["one by one"]["mean"] < 0.2


def test_rotary_frequencies_of_an_export_in_16_bits_stay_whole(merged):
    """Rounded to bfloat16, positions some hundred tokens on would be off by whole turns; the proof's answers are short."""
    long = torch.arange(400)[None] % 300 + 10
    made = load_graph(merged)
    with torch.inference_mode():
        exact = made(long, torch.ones_like(long)).item()
        store_as(made, torch.bfloat16)
        rounded = made(long, torch.ones_like(long)).item()
    assert {p.dtype for p in made.backbone.parameters()} == {torch.bfloat16}
    assert [b.dtype for name, b in made.backbone.named_buffers() if "inv_freq" in name] == [torch.float32] * 2
    assert rounded == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_pools_by_the_mask(family, tmp_path):
    model = classifier(make_base(tmp_path, family, dtype=torch.float32))
    if family == "gemma2":
        model.set_attn_implementation("eager")
    made = graph.RewardGraph(getattr(model, model.base_model_prefix), model.score.weight)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (1, 9, 21, 13, 2)]
    with torch.no_grad():
        expected = [float(model(input_ids=torch.tensor([row])).logits) for row in rows]
    assert max(expected) - min(expected) > 0.1
    for way, batches in graph.batches(rows).items():
        with torch.no_grad():
            found = [
                reward for batch in batches for reward in made(*map(torch.tensor, batch.values())).tolist()
            ]
        assert found == pytest.approx(expected, abs=1e-4), way


def test_a_graph_takes_more_tokens_than_a_norm_takes_at_once(merged):
    """The example that is traced is short, and a loop over blocks of tokens would be unrolled for its one block."""
    made = graph.load_graph(merged)
    program = graph.trace(made)
    hidden = made.head.shape[1]
    shape = AT_ONCE // hidden // 250 + 1, 250  # a little more
    ids = torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(2))
    assert ids.numel() * hidden > AT_ONCE
    with torch.no_grad():
        torch.testing.assert_close(
            program.module()(ids, torch.ones_like(ids)), made(ids, torch.ones_like(ids))
        )
    kinds = [str(node.target) for node in program.graph.nodes]
    assert sum("rms_norm" in kind for kind in kinds) >= 5
    assert not any("split" in kind for kind in kinds)


def test_what_cannot_be_traced_is_said_plainly():
    class Reading(torch.nn.Module):
        def forward(self, input_ids, **_):
            if input_ids.sum() > 3:
                return SimpleNamespace(last_hidden_state=input_ids[..., None].float())
            return None

    with pytest.raises(MergeError, match="Reading cannot be written as one graph"):
        graph.trace(graph.RewardGraph(Reading(), torch.ones(1, 1)))


PARITY = {
    "merge": {"dtype": "float16"},
    "is_trained_model": False,
    "spread": 2.0,
    "without_adapter": {"mean": 0.4},
    "answers": [
        {"text": "", "ids": [1], "prompt": 0, "reward": reward, "merged": reward + 0.01}
        for reward in (-2.0, 0.0, 2.0, 4.0)
    ],
}


def proved(tmp_path, shift, *, noise=1e-6, rounded=(), distance=0.4, **more):
    found = {"alone": [a["merged"] + shift for a in PARITY["answers"]]}
    parity = PARITY | {"without_adapter": {"mean": distance}}
    return prove(
        tmp_path, parity, found, target="x", runtime="X", dtype="int8", noise=noise, rounded=rounded, **more
    )


def test_an_exact_export_may_differ_by_the_noise_of_this_machine(tmp_path):
    found = proved(tmp_path, 1e-4)
    assert found["is_trained_model"] is False  # who downloads the export is told what the merge was
    change = found["changes"]["alone"]
    assert change["against_merged"] == pytest.approx(5e-5)
    assert change["mean"] == pytest.approx(0.0101 / 2)  # against the trained adapter, merge included
    with pytest.raises(MergeError, match=r"the X's rewards differ by up to 0.05% .*allowed: 0.010%; noise"):
        proved(tmp_path, 1e-3)
    assert proved(tmp_path, 1e-3, noise=1e-4)["passed"]
    with pytest.raises(MergeError, match="allowed: 2.000%"):  # a broken reference is no noise
        proved(tmp_path, 0.05, noise=1.0)


def test_a_rounded_export_may_cost_something_but_not_the_adapter(tmp_path):
    assert proved(tmp_path, 0.18, rounded=["alone"])["changes"]["alone"]["mean"] == pytest.approx(0.095)
    for shift in (0.22, math.nan, math.inf):
        with pytest.raises(
            MergeError, match=r"The adapter was lost: .*, that of the model without adapter 40.00%"
        ):
            proved(tmp_path, shift, rounded=["alone"])
    with pytest.raises(MergeError, match="The adapter was lost"):
        proved(tmp_path, math.nan)


def test_an_adapter_that_learnt_little_is_not_lost_in_the_rounding_of_products(merged, tmp_path, monkeypatch):
    little = {"distance": 0.0135, "rounded": ["alone"]}
    with pytest.raises(MergeError, match="The adapter was lost: .* Choose a type with more bits"):
        proved(tmp_path, 0.0126, **little)
    found = proved(tmp_path, 0.0126, **little, rounding=0.02)
    assert found["allowed"]["mean"] == 0.02
    with pytest.raises(MergeError, match="The adapter was lost: .* Do this"):
        proved(tmp_path, 0.05, **little, rounding=0.02, remedy="Do this.")
    with pytest.raises(
        MergeError, match="The adapter was lost"
    ):  # in float32 nothing is allowed for rounding
        proved(tmp_path, 0.0126, distance=0.0135, rounding=0.02)
    # the same through the pipeline, whose float16 rows are moved by more and more
    parity = parity_of(merged)
    parity["merge"]["dtype"] = "float16"
    parity["without_adapter"]["mean"] = 0.0135
    folder = shutil.copytree(merged, tmp_path / "merged")
    (folder / "parity.json").write_text(json.dumps(parity))
    rewards = [answer["merged"] for answer in parity["answers"][:16]]

    def scored(shift):
        moved = [reward + shift * parity["spread"] for reward in rewards[:8]]
        ways = {"float32": rewards, "float32, padded": rewards, "float16": moved}
        monkeypatch.setattr(huggingface, "score_in_fresh_process", lambda *_: ways)

    scored(0.0063)
    out = export_run(folder, out=tmp_path / "out")
    assert parity_of(out)["changes"]["pipeline in float16"]["against_merged"] == pytest.approx(0.0063)
    scored(0.03)
    out = tmp_path / "other"
    command = "lora-rm merge RUN --merge.dtype float32 --merge.overwrite True"
    with pytest.raises(MergeError, match=f"^{out}: .*The adapter was lost.*{command}$"):
        export_run(folder, out=out)


def test_a_merge_without_proof_is_not_exported(merged, tmp_path):
    for target in ("onnx", "torch-export", "huggingface"):
        with pytest.raises(MergeError, match="holds no merged model"):
            export_run(tmp_path, to=target)
    parity = parity_of(merged)
    for key, value, message in (
        ("passed", False, "changed by more than was allowed"),
        ("without_adapter", None, "without_adapter is missing"),
    ):
        own = {name: v for name, v in parity.items() if name != key} | (
            {key: value} if value is False else {}
        )
        (tmp_path / "parity.json").write_text(json.dumps(own))
        with pytest.raises((MergeError, ModelError), match=message):
            read_parity(tmp_path)


def test_a_missing_extra_is_named_with_its_command(merged, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name)
    )
    with pytest.raises(
        ConfigError, match=r"needs onnx and onnxscript and onnxruntime.*source: pip install '\.\[onnx\]'"
    ):
        export_onnx(merged, tmp_path / "out")
    need("torch-export", "torch")


def test_a_target_says_what_it_can_write(merged, tmp_path):
    assert tuple(EXPORTS) == TARGETS == ("huggingface", "vllm", "vllm-lora", "gguf", "onnx", "torch-export")
    for target, export in EXPORTS.items():
        takes = inspect.signature(export).parameters.keys() & {"run", "dtype"}
        assert takes == ({"dtype"} if target in WITH_DTYPE else {"run"}), target
    with pytest.raises(ConfigError, match="--to is 'floppy'; allowed: huggingface, vllm"):
        export_run(merged, to="floppy")
    with pytest.raises(ConfigError, match=r"--dtype is 'float16', but --to huggingface .*--merge.dtype"):
        export_run(merged, out=tmp_path / "x", dtype="float16")
    with pytest.raises(ConfigError, match="--to torch-export can write float32, float16, bfloat16"):
        export_run(merged, to="torch-export", out=tmp_path / "x", dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_an_export_of_anything_else_has_another_identity(merged, tmp_path, monkeypatch):
    """Else the files of an interrupted one would be taken over."""
    found = []

    @contextmanager
    def note(out, identity, what):
        found.append(json.dumps(identity))
        yield

    monkeypatch.setattr(proof, "unfinished_folder", note)
    own = shutil.copytree(merged, tmp_path / "merged")

    def export(target, dtype):
        with proof.export_folder(own, tmp_path / "out", target, overwrite=False, dtype=dtype):
            pass

    export("gguf", "float16")
    export("gguf", "float16")
    assert found.pop() == found[0]
    export("gguf", "Q8_0")
    export("onnx", "float16")
    for file in ("model.safetensors", "tokenizer.json", "parity.json"):
        (own / file).touch()
        export("gguf", "float16")
    (own / "more").write_text("")
    export("gguf", "float16")
    assert len(set(found)) == len(found) == 7


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    out, written = tmp_path / "out", []

    def write(file):
        file.write_text(file.name)
        written.append(file.name)

    def make(identity, *names, error=None):
        with unfinished_folder(out, identity, "export") as folder:
            for name in names:
                folder.once(name, write)
            (folder.path / "half").write_text("of it")
            if error:
                raise error
            assert folder.path != out.resolve()
        (out / "half").unlink()

    with pytest.raises(ModelError):
        make(1, "a", error=ModelError("would happen again"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        make(1, "a", error=KeyboardInterrupt())
    assert not out.exists()
    make(1, "a", "b")
    assert written == ["a", "a", "b"]  # what was finished before the interruption is not written again
    assert sorted(file.name for file in out.iterdir()) == ["a", "b"]
    assert (out / "a").stat().st_mode & 0o777 == 0o644
    with pytest.raises(KeyboardInterrupt):
        make(1, "c", error=KeyboardInterrupt())
    assert (out / "b").is_file()  # what was there stays until its successor is whole
    make(2, "c")  # of another model: begun again
    assert written == ["a", "a", "b", "c", "c"]
    assert [file.name for file in out.iterdir()] == ["c"]
    with pytest.raises(KeyboardInterrupt):
        make(2, "d", error=KeyboardInterrupt())
    (tmp_path / ".out.partial" / "d").write_text("spoilt")
    make(2, "d")
    assert (out / "d").read_text() == "d"


def test_a_killed_export_goes_on_with_the_same_bytes(merged, tmp_path):
    """SIGKILL after the first file, and in the verification; what was finished is not written again."""
    program = tmp_path / "export.py"
    program.write_text(KILLED_EXPORT)
    words = [sys.executable, program, merged, tmp_path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Going on with an interrupted export") == 4  # twice each
    for to in ("huggingface", "gguf"):
        whole, killed = tmp_path / f"{to}-whole", tmp_path / f"{to}-other"
        names = {file.name for file in whole.iterdir()}
        assert names == {file.name for file in killed.iterdir()} > {"parity.json", "README.md"}
        for name in names:
            assert (killed / name).read_bytes().replace(b"-other", b"-whole") == (
                whole / name
            ).read_bytes(), name
    assert not list(tmp_path.glob(".*partial"))


KILLED_EXPORT = """
import os, signal, sys
from pathlib import Path
import torch
from conftest import notes_of, score_here, written
from lora_rm.export import gguf, huggingface
from lora_rm.unfinished import UnfinishedFolder
from lora_rm.workflow import export_run

torch.set_num_threads(1)
merged, folder = map(Path, sys.argv[1:])

def die(*_, **__):
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)

def run(to, name, where=None):
    child = os.fork()  # before any thread exists
    if child == 0:
        finish = UnfinishedFolder.finish
        if where == "file":
            UnfinishedFolder.finish = lambda self, *files: (finish(self, *files), die())
        for module in (gguf, huggingface):
            module.score_in_fresh_process = die if where == "verification" else score_here
        export_run(merged, to=to, out=folder / f"{to}-{name}")
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for to in ("huggingface", "gguf"):
    assert run(to, "whole") == 0
    assert run(to, "other", "file") == -9
    first = notes_of(folder / f"{to}-other")
    assert len(first) == 1
    assert run(to, "other", "verification") == -9
    most = notes_of(folder / f"{to}-other")
    assert first.items() <= most.items()
    assert run(to, "other") == 0
    for file, was in most.items():
        assert written(folder / f"{to}-other" / file) == was, file
"""


# -- the card of a hub model ------------------------------------------------------------------------------


def test_the_licence_is_the_bases_own_or_absent(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    assert inherited_license(str(base)) == {}
    card = base / "README.md"
    for text, expected in (
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\ntags: [a]\n---\n# A\n",
         {"license": "other", "license_name": "own", "license_link": "LICENSE"}),
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlanguage: en\n---\nLicense: MIT\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("# No header\nlicense: mit\n", {}),
    ):  # fmt: skip
        card.write_text(text)
        assert inherited_license(str(base)) == expected
    assert inherited_license("builtin:smollm2-135m") == {}
    assert inherited_license("nobody/has-this") == {}


def test_a_base_has_a_hub_id_or_none(tmp_path):
    assert hub_id("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert hub_id("/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/1a2b") == "Qwen/Qwen3-0.6B"
    for name in (str(tmp_path), "builtin:smollm2-135m", "models/mine.gguf/x", "./mine", "../a", "~/mine"):
        assert hub_id(name) is None, name


def test_the_card_reads_back_as_the_hubs_metadata(merged, tmp_path):
    evaluation = {
        "after": {
            "pairs": {"num_pairs": 8, "accuracy": 0.875},
            "interval": [0.5, 0.97],
            "length_baseline": 0.5,
        },
        "before": {"pairs": {"accuracy": 0.5}},
    }
    settings = check_settings({"data": {"train": "org/preferences"}})
    run = SimpleNamespace(read_json=lambda name: evaluation, settings=lambda: settings)
    parity = parity_of(merged) | {"merge": parity_of(merged)["merge"] | {"base": "Qwen/Qwen3-8B"}}
    data = ModelCard(model_card(parity, run, "mine")).data
    assert (data.base_model, data.base_model_relation, data.license) == ("Qwen/Qwen3-8B", "finetune", None)
    assert (data.pipeline_tag, data.library_name) == ("text-classification", "transformers")
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_split) == ("org/preferences", "train")
    assert (result.task_type, result.metric_type, result.metric_value) == (
        "text-classification",
        "accuracy",
        0.875,
    )
    assert data.model_name == "mine"
    settings = check_settings({"data": {"train": "org/preferences:part"}})
    (result,) = ModelCard(model_card(parity, run, "mine")).data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
        "org/preferences",
        "part",
        "train",
    )
    settings = check_settings({"data": {"train": "builtin:checkable", "eval": "/home/me/secret.jsonl"}})
    card = model_card(parity, run, "mine")
    assert "secret" not in card
    assert ModelCard(card).data.eval_results[0].dataset_type == "private"
