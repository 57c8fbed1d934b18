"""A base that is sharded over processes computes what the whole base computes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import back_to, launched, make_base, numbers, with_values
from torch.distributed.tensor import DTensor

from lora_rm import processes
from lora_rm.checkpoint import RunFolder
from lora_rm.config import AdapterSettings, ConfigError, LossSettings, ModelSettings, check_settings
from lora_rm.data.batches import Batching, microbatches, shares_of_rows
from lora_rm.data.checkable import checkable_preferences
from lora_rm.data.tokens import tokenize
from lora_rm.losses import preference_losses
from lora_rm.model import quantization
from lora_rm.model.base import BaseModel
from lora_rm.model.checkpointing import Mode
from lora_rm.model.memory import LiveBytes
from lora_rm.model.quantization import code_hashes
from lora_rm.model.reward_model import RewardModel
from lora_rm.workflow import merge_run, train_run

CASES = {
    ("llama", "nf4", "float32"): [("none", "shared"), ("selective", "shared"), ("full", "padded")],
    ("llama", "nf4", "bfloat16"): [("selective", "shared")],
    ("llama", "none", "float32"): [("none", "packed"), ("full", "shared")],
    ("llama", "none", "bfloat16"): [("selective", "shared")],
    ("gemma2", "nf4", "float32"): [("selective", "shared")],
    ("gemma3_text", "none", "float32"): [("selective", "shared")],
    ("gpt2", "nf4", "float32"): [("selective", "shared")],
    ("gpt_oss", "nf4", "float32"): [("selective", "padded")],
}
"""Family, quantisation and type of products of a model: ways of checkpointing and batching it is run with."""
MORE = {"gpt2": {"n_layer": 4}, "gpt_oss": {"num_local_experts": 4, "num_hidden_layers": 4}}


def build(base: str, quantization: str, dtype: str, *, sharded: bool) -> RewardModel:
    model = RewardModel.load(
        BaseModel(name=base, path=Path(base)),
        settings=ModelSettings(quantization=quantization, compute_dtype=dtype, device="cpu"),
        adapter=AdapterSettings(rank=4, alpha=12.0),
        sharded=sharded,
    )
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # B = 0 would hide most of the gradients
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def step(model: RewardModel, trees, *, alone: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step over rows that the processes have unequal numbers of."""
    count = 1 if alone else processes.count()
    rows = microbatches(trees, 400, model.batching, count)
    shares = shares_of_rows(rows, model.batching, count)
    own = shares[processes.rank() if count > 1 else 0]
    loss = 0.0
    for row in own:
        batch = model.batch(row)
        losses = preference_losses(model.rewards(batch), batch.preferences, LossSettings())
        losses.sum().backward()
        loss += float(losses.detach().sum())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not alone:
        model.idle(max(map(len, shares)) - len(own))
        processes.sum_gradients(trained.values())
        loss = sum(processes.gather(loss))
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    return loss, gradients


def held_bytes(model: RewardModel) -> int:
    """Bytes of the base's frozen matrices that this process holds."""
    matrices = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1]
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in matrices]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}.values())


class RealBytes(LiveBytes):
    """Live bytes without tensors that have no memory of their own."""

    def see(self, *tensors: torch.Tensor) -> int:
        real = (t for t in tensors if t.device.type != "meta" and not isinstance(t, DTensor))
        return super().see(*real)


class Gathered:
    """Watches the whole weights that the layers see, and how many layers have theirs at once."""

    def __init__(self, model: RewardModel) -> None:
        self.storages: dict[int, dict[int, torch.UntypedStorage]] = {}
        self.most = 0
        self.handles: list[Any] = []
        for number, layer in enumerate(model.layers):
            for part in layer.modules():
                if isinstance(getattr(part, "weight", None), DTensor):
                    note = partial(self.note, number)
                    self.handles += [
                        part.register_forward_pre_hook(note),
                        part.register_full_backward_hook(note),
                    ]

    def note(self, number: int, part: torch.nn.Module, *_: object) -> None:
        assert not isinstance(part.weight, DTensor)
        storage = part.weight.untyped_storage()
        self.storages.setdefault(number, {})[storage._cdata] = storage
        self.most = max(self.most, sum(self.bytes(own) > 0 for own in self.storages.values()))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @staticmethod
    def bytes(storages: dict[int, torch.UntypedStorage]) -> int:
        return sum(storage.nbytes() for storage in storages.values())

    @property
    def left(self) -> int:
        return sum(self.bytes(own) for own in self.storages.values())


def compare(
    whole: RewardModel, sharded: RewardModel, trees, mode: Mode, batching: Batching
) -> dict[str, Any]:
    """A step and a scoring by both models."""
    for model in (whole, sharded):
        model.choose_batching(batching)
        model.set_checkpointing([mode] * len(model.layers))
    expected, expected_gradients = step(whole, trees, alone=True)
    loss, gradients = step(sharded, trees, alone=False)
    gathered = Gathered(sharded)
    again, _ = step(sharded, trees, alone=False)
    gathered.remove()
    with whole.precise(), sharded.precise():
        scores = whole.score(trees, 300), sharded.score(trees, 300, together=True)
    count = processes.count()
    rows = [microbatches(trees, budget, batching, count) for budget in (400, 300)]
    return {
        "loads": [[len(share) for share in shares_of_rows(own, batching, count)] for own in rows],
        "loss": [expected, loss, again],
        "gradients": max(float((gradients[n] - g).norm() / g.norm()) for n, g in expected_gradients.items()),
        "score": max(abs(a - b) for x, y in zip(*scores, strict=True) for a, b in zip(x, y, strict=True)),
        "bytes": processes.gather([held_bytes(whole), held_bytes(sharded)]),
        "gathered": [len(gathered.storages), gathered.most, gathered.left],
        "total": [whole.trainable().total, sharded.trainable().total],
        "codes": code_hashes(whole.classifier) == code_hashes(sharded.classifier),
    }


def main(bases: str, out: str) -> None:
    """What every process runs: each case whole and sharded, one after another."""
    processes.join("cpu")
    quantization.PIECE = 1024  # small beside a layer, as it is beside those of real models
    found = {}
    for (family, kind, dtype), ways in CASES.items():
        models = []
        for flag in (False, True):
            with RealBytes() as loading:
                models.append(build(f"{bases}/{family}", kind, dtype, sharded=flag))
        trees = tokenize(checkable_preferences(15, 2)[0], models[0].chat, max_length=512)[0]
        for mode, batching in ways:
            case = compare(*models, trees, mode, batching)
            found[f"{family} {kind} {dtype} {mode} {batching}"] = {
                **case,
                "loading": loading.peak - loading.now,
            }
    if processes.IS_FIRST:
        Path(out).write_text(json.dumps(found))
    processes.wait()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes found, by case."""
    folder = tmp_path_factory.mktemp("sharding")
    for family in {family for family, *_ in CASES}:
        make_base(folder / family, family, **MORE.get(family, {"num_hidden_layers": 4}))
    words = [
        "--standalone",
        "--nproc-per-node=2",
        str(Path(__file__)),
        str(folder),
        str(folder / "found.json"),
    ]
    done = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, errors = done.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        done.terminate()  # killed, it would leave processes behind that wait for each other
        done.communicate()
        raise
    assert done.returncode == 0, errors[-3000:]
    return json.loads((folder / "found.json").read_text())


each_case = pytest.mark.parametrize(
    "case", [" ".join((*model, *way)) for model, ways in CASES.items() for way in ways]
)


@each_case
def test_a_sharded_base_gives_the_losses_gradients_and_rewards_of_the_whole_one(found, case):
    expected, loss, again = found[case]["loss"]
    assert loss == pytest.approx(expected, rel=1e-6)
    assert again == loss
    assert found[case]["gradients"] < (1e-6 if "float32" in case else 1e-2)
    assert found[case]["score"] < 1e-5
    assert found[case]["codes"]
    assert found[case]["total"][0] == found[case]["total"][1]


def test_some_processes_have_fewer_rows_than_others(found):
    """Else nothing would show that gathers meet all the same, in training and in scoring."""
    training, scoring = zip(*(case["loads"] for case in found.values()), strict=True)
    assert any(len(set(loads)) > 1 for loads in training)
    assert any(len(set(loads)) > 1 for loads in scoring)


@each_case
def test_every_process_holds_its_part_and_at_most_one_layer_more(found, case):
    for whole, part in found[case]["bytes"]:
        assert 0.49 * whole < part < 0.51 * whole
    layers, most, left = found[case]["gathered"]
    assert (layers, most, left) == (4, 1, 0)
    # a layer is a fifth of this base; its largest weight is there for a moment before it is quantised
    assert found[case]["loading"] < 0.35 * found[case]["bytes"][0][0]


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_one_process_and_merges(settings, tmp_path, scored_here):
    """Steps 3 and 4 in two processes, then again in one; the merge checks the codes and the canaries."""
    more = {"max_steps": 4, "eval_every_steps": 4, "save_every_steps": 2, "tokens_per_microbatch": 300}
    wanted = with_values(settings, tmp_path / "run", **more, sharding="full")
    done = launched(wanted, tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    run = RunFolder.open(tmp_path / "run")
    lines, evaluations = numbers(run.path)
    record = json.loads((run.adapter / "lora_rm.json").read_text())
    back_to(run.path, 2)
    train_run(run.settings(), resume=True)
    again, evaluations_again = numbers(run.path)
    assert [line["step"] for line in again] == [1, 2, 3, 4]
    for name, tolerance in {"loss": 1e-5, "grad_norm": 1e-4}.items():
        assert [line[name] for line in again] == pytest.approx([line[name] for line in lines], rel=tolerance)
    assert evaluations_again[-1]["eval"] == pytest.approx(evaluations[-1]["eval"], rel=1e-4)
    record_again = json.loads((run.adapter / "lora_rm.json").read_text())
    assert record_again["quantization"] == record["quantization"]
    rewards = [[canary["reward"] for canary in known["canaries"]] for known in (record, record_again)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4)
    merge_run(run.path, wanted)
    assert scored_here == ["cpu"] * 2
    assert json.loads((run.path / "parity.json").read_text())["changes"]["library"]["pair_flips"] == 0


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("model", {"quantization": "int8"}, "model.quantization int8"),
        ("adapter", {"use_dora": True}, "adapter.use_dora"),
        ("adapter", {"init": "loftq"}, "adapter.init loftq"),
    ],
)
def test_what_needs_whole_weights_is_refused(section, values, named):
    with pytest.raises(ConfigError, match=named):
        check_settings({"train": {"sharding": "full"}, section: values})


if __name__ == "__main__":
    main(*sys.argv[1:])
