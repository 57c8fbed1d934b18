"""What only a CUDA device can show; skipped where there is none."""

import gc
import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
from conftest import make_base, make_model, shake
from safetensors.torch import load_file, save_file

from lora_rm.checkpoint import RunFolder
from lora_rm.config import ModelSettings, check_settings
from lora_rm.data.batches import TreePlan, build_batch
from lora_rm.data.tokens import TokenTree
from lora_rm.model.cuda_kernels import kernels_for
from lora_rm.model.elementwise import _turned as turned_by_torch
from lora_rm.model.quantization import Quantization, code_hashes
from lora_rm.model.reward_model import RewardModel
from lora_rm.model.tree_attention import time_cores, tree_attention
from lora_rm.plan import calibrate, plan
from lora_rm.train import build_optimizer, train
from lora_rm.workflow import merge_run, open_model, read_data, train_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def some_trees(count: int = 6) -> list[TokenTree]:
    """Trees of which all begin with the same 20 tokens."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 90, (length,), generator=generator).tolist()

    start = ids(20)
    return [TokenTree(start + ids(20 + 7 * n), (ids(30 + n), ids(50 - 3 * n), ids(9))) for n in range(count)]


def attended(plan: TreePlan, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients of the attention."""
    own = [x.detach().clone().requires_grad_() for x in inputs]
    output, _ = tree_attention(torch.nn.Module(), own[0], own[1], own[2], None, tree_plan=plan)
    output.float().square().sum().backward()
    return output.detach().float(), [x.grad.float() for x in own]


@pytest.mark.parametrize("core", ["answers", "gathered", "varlen"])
@pytest.mark.parametrize("window", [None, 16])
def test_every_core_gives_the_attention_of_float32(core, window):
    batch = build_batch(some_trees(), "shared", core)
    plan = batch.to(torch.device("cuda")).plan
    generator = torch.Generator(device="cuda").manual_seed(0)
    tokens = batch.input_ids.numel()
    inputs = [
        torch.randn(1, heads, tokens, 64, device="cuda", generator=generator).bfloat16()
        for heads in (8, 2, 2)
    ]
    exact = build_batch(some_trees()).to(torch.device("cuda")).plan
    own = [x.float() for x in inputs]
    wanted, _ = tree_attention(torch.nn.Module(), *own, None, tree_plan=exact, sliding_window=window)
    found, _ = tree_attention(torch.nn.Module(), *inputs, None, tree_plan=plan, sliding_window=window)
    assert float((found.float() - wanted).abs().max() / wanted.abs().max()) < 2e-2
    if window is None:
        _, gradients = attended(plan, inputs)
        _, expected = attended(exact, own)
        for one, other in zip(gradients, expected, strict=True):
            assert float((one - other).abs().max() / other.abs().max()) < 3e-2


def test_compiled_kernels_give_the_bits_of_torch():
    """Of an activation, its two gradients, and positions forward and back, in both orders of heads and tokens."""
    generator = torch.Generator("cuda").manual_seed(0)

    def values(*shape):
        return 2 * torch.randn(shape, generator=generator, device="cuda").bfloat16()

    gate, up, gradient = (values(1, 517, 1024) for _ in range(3))
    kernels = kernels_for(gate, up)
    assert torch.equal(kernels.gated(gate, up), torch.nn.functional.silu(gate) * up)
    open_gate = gate.clone().requires_grad_()
    activated = torch.nn.functional.silu(open_gate)
    (of_gate,) = torch.autograd.grad(activated, open_gate, gradient * up)
    found = kernels.gated_backward(gradient, gate, up)
    assert torch.equal(found[0], of_gate)
    assert torch.equal(found[1], activated.detach() * gradient)
    cos, sin = values(1, 1, 517, 64), values(1, 1, 517, 64)
    low, high = sin.chunk(2, dim=-1)
    tokens_first = values(1, 517, 8, 64).transpose(1, 2)
    for x in (tokens_first, tokens_first.contiguous()):
        y = kernels.turned(x, cos, sin, back=False)
        assert torch.equal(y, turned_by_torch(x, cos, low.neg(), high))
        assert y.stride() == x.stride()
        assert torch.equal(kernels.turned(x, cos, sin, back=True), turned_by_torch(x, cos, high, low.neg()))


@pytest.mark.parametrize("unlike", ["type", "start", "width", "device"])
def test_other_tensors_are_not_for_the_kernels(unlike):
    x = torch.zeros(64, 32, device="cuda", dtype=torch.bfloat16)
    assert kernels_for(x) is not None
    others = {"type": x.half(), "start": x.flatten()[1:33], "width": x[:, :24], "device": x.cpu()}
    assert kernels_for(others[unlike]) is None


def test_the_fastest_core_is_found_in_two_seconds():
    """Timed, since every start on a GPU waits for it: a core that needs a second more is a fault of its own."""
    torch.zeros(1, device="cuda")  # the device's own start is not the check's
    started = time.perf_counter()
    with torch.no_grad():  # as scoring calls it
        seconds = time_cores(torch.device("cuda"), torch.bfloat16, 32, 8, 128)
    assert seconds.keys() == {"answers", "gathered", "varlen"}
    assert time.perf_counter() - started < 2.0


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_gradients_in_nf4_equal_separate_conversations(tmp_path, mode):
    base = make_base(tmp_path / "llama", "llama")
    model = shake(make_model(base, device="cuda"))
    model.set_checkpointing([mode] * len(model.layers))
    model.train()
    trees = some_trees(3)
    found = []
    for batching in ("shared", "padded"):
        model.set_batching(batching)
        model.zero_grad()
        model.rewards(model.batch(trees)).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert float((gradient - found[1][name]).abs().max() / gradient.abs().max()) < 1e-3, name


@pytest.mark.parametrize("core", ["answers", "gathered", "varlen"])
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_pass_waits_for_the_device_nowhere(tmp_path, core, mode):
    """What is read of a step is read once, after its forward pass."""
    base = make_base(tmp_path / "llama", "llama")
    model = make_model(base, device="cuda")
    model.set_compute_dtype(torch.bfloat16)
    model.set_checkpointing([mode] * len(model.layers))
    model.set_core(core)
    batch = model.batch(some_trees())
    model.train().rewards(batch).sum().backward()  # masks and whatever else is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.rewards(batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_planned_peak_is_what_the_device_measures(tmp_path, mode, monkeypatch):
    monkeypatch.setenv("LORA_RM_CACHE", str(tmp_path / "cache"))
    calibrate("cuda")
    shape = {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 4096,
    }  # fmt: skip
    base = make_base(tmp_path / "llama", "llama", **shape)
    settings = check_settings(
        {"model": {"base": str(base)}, "train": {"checkpointing": mode, "tokens_per_microbatch": 8192}}
    )
    planned = plan(settings)
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    others = torch.cuda.memory_allocated()  # what tests before have left
    model = make_model(base, device="cuda", adapter=settings.adapter)
    model.set_compute_dtype(torch.bfloat16)
    model.set_core("varlen")  # as planned; beside another program on the card another one can look faster
    model.set_checkpointing([mode] * 8)
    model.train()
    optimizer = build_optimizer(model, settings)
    batch = model.batch([TokenTree([5 + n] * 400, ([6] * 56, [7] * 56)) for n in range(16)])
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        model.rewards(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    # without the allocator's slack, which is no tensor's
    expected = planned.lasting - planned.machine.context + planned.peaks[mode].at(batch.input_ids.numel())
    assert torch.cuda.max_memory_allocated() - others == pytest.approx(expected, rel=0.05)


WIDE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip


def run_settings(base, folder, **train):
    """Short runs in bfloat16, with dropout and prompts that are shared."""
    return check_settings(
        {
            "output_dir": str(folder),
            "model": {"base": str(base), "device": "cuda"},
            # rank 64: bitsandbytes pages tensors of 100,000 values and more
            "adapter": {"rank": 64, "alpha": 128, "dropout": 0.1},
            "data": {"train": "builtin:checkable", "max_train": 256, "max_eval": 20},
            "train": {
                "preferences_per_step": 64, "tokens_per_microbatch": 8192, "checkpointing": "none", "max_steps": 4,
                "save_every_steps": 2, "learning_rate": 1e-3, **train,
            },
        }
    )  # fmt: skip


def trained(settings, core=None, *, resume=False):
    """The adapter of a run, what it says of its steps, and its progress."""
    run, model = RunFolder.create(settings, resume), open_model(settings)
    if core:
        model.set_core(core)
    progress = train(model, read_data(settings, model, run), settings, run, resume=resume)
    steps = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    weights = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return weights, steps, progress


def assert_same_bits(one, other):
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize(
    ("core", "optimizer"),
    [("answers", "adamw"), ("gathered", "adamw"), ("varlen", "adamw"), ("varlen", "paged_adamw_8bit")],
)
def test_a_resumed_run_gives_the_same_bits(tmp_path, core, optimizer):
    base = make_base(tmp_path / "llama", "llama", **WIDE)
    more = {"tokens_per_microbatch": 2048, "checkpointing": "selective", "optimizer": optimizer}
    straight, _, progress = trained(run_settings(base, tmp_path / "straight", **more), core)
    assert progress.core == core
    settings = run_settings(base, tmp_path / "run", **more)
    again, steps, _ = trained(settings, core)
    assert_same_bits(straight, again)
    # as a run that was killed in its last step leaves it
    lines = RunFolder.create(settings, resume=True).metrics.read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:3]))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004", ignore_errors=True)
    resumed, more_steps, _ = trained(settings, resume=True)
    assert_same_bits(straight, resumed)
    assert [step["loss"] for step in more_steps] == [step["loss"] for step in steps]


def test_too_little_memory_halves_the_rows_and_changes_nothing_else(tmp_path):
    """On the device itself, against a run that had half the rows from the start."""
    base = make_base(tmp_path / "llama", "llama", **WIDE)

    def measured(tokens, name):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = trained(run_settings(base, tmp_path / name, tokens_per_microbatch=tokens), "varlen")
        return torch.cuda.max_memory_allocated(), found

    much, (_, _, unlimited) = measured(4096, "unlimited")
    little, (wanted, _, _) = measured(2048, "little")
    assert unlimited.row == 0
    assert much > 1.4 * little
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((much + little) / 2 / total)
    try:
        _, (found, steps, progress) = measured(4096, "capped")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert progress.row == 2048
    assert [step["tokens_per_microbatch"] for step in steps] == [2048] * 4
    assert_same_bits(wanted, found)


def test_float16_products_train_with_a_loss_scale(tmp_path):
    """As on cards without bfloat16; the adapter goes where that of bfloat16 goes."""
    base = make_base(tmp_path / "llama", "llama", **WIDE)
    found = {}
    for dtype in ("float16", "bfloat16"):
        settings = run_settings(base, tmp_path / dtype, tokens_per_microbatch=2048)
        found[dtype] = trained(replace(settings, model=replace(settings.model, compute_dtype=dtype)))
    assert found["float16"][2].scaler["scale"] > 1.0
    assert not found["bfloat16"][2].scaler
    # later ones are a step apart where the first scale was too high
    losses = [steps[0]["loss"] for _, steps, _ in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_has_the_codes_that_a_merge_makes_on_a_cpu(tmp_path, kind):
    """bitsandbytes' kernels round otherwise on each; a weight of zeros among them."""
    base = make_base(tmp_path / "llama", "llama", **WIDE)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:4] = 0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    hashes = [
        code_hashes(
            RewardModel.load(str(base), settings=ModelSettings(quantization=kind, device=device)).classifier
        )
        for device in ("cuda", "cpu")
    ]
    assert hashes[0] == hashes[1]
    for name, found in hashes[0].items():
        stored = Quantization(kind=kind, double=True, load_dtype=torch.bfloat16).round_trip(
            tensors[f"{name}.weight"]
        )
        assert stored[1] == found


def test_padded_rows_train(tmp_path):
    base = make_base(tmp_path / "llama", "llama", **WIDE)
    settings = run_settings(base, tmp_path / "run", tokens_per_microbatch=2048)
    trained(replace(settings, train=replace(settings.train, batching="padded")))


def test_a_merge_is_proven_on_the_device(tmp_path):
    base = make_base(tmp_path / "llama", "llama", **WIDE)
    run = train_run(run_settings(base, tmp_path / "run", tokens_per_microbatch=2048))
    merge_run(run.path, run.settings())
    assert run.read_json("parity.json")["passed"]
