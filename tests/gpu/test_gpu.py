"""What only a CUDA device can show; skipped where there is none."""

import pytest
import torch
from conftest import make_base, make_model, shake

from lora_rm.config import check_settings
from lora_rm.data.batches import TreePlan, build_batch
from lora_rm.data.tokens import TokenTree
from lora_rm.model.tree_attention import time_cores, tree_attention
from lora_rm.plan import calibrate, plan
from lora_rm.train import build_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def some_trees(count: int = 6) -> list[TokenTree]:
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 90, (length,), generator=generator).tolist()

    return [TokenTree(ids(40 + 7 * n), (ids(30 + n), ids(50 - 3 * n), ids(9))) for n in range(count)]


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
    plan = batch.plan.to(torch.device("cuda"))
    generator = torch.Generator(device="cuda").manual_seed(0)
    tokens = batch.input_ids.numel()
    inputs = [
        torch.randn(1, heads, tokens, 64, device="cuda", generator=generator).bfloat16()
        for heads in (8, 2, 2)
    ]
    exact = build_batch(some_trees()).plan.to(torch.device("cuda"))
    own = [x.float() for x in inputs]
    wanted, _ = tree_attention(torch.nn.Module(), *own, None, tree_plan=exact, sliding_window=window)
    found, _ = tree_attention(torch.nn.Module(), *inputs, None, tree_plan=plan, sliding_window=window)
    assert float((found.float() - wanted).abs().max() / wanted.abs().max()) < 2e-2
    if window is None:
        _, gradients = attended(plan, inputs)
        _, expected = attended(exact, own)
        for one, other in zip(gradients, expected, strict=True):
            assert float((one - other).abs().max() / other.abs().max()) < 3e-2


def test_the_fastest_core_is_found_in_two_seconds():
    import time

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


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_planned_peak_is_what_the_device_measures(tmp_path, mode, monkeypatch):
    monkeypatch.setenv("LORA_RM_CACHE", str(tmp_path / "cache"))
    calibrate("cuda")
    shape = {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096,
    }  # fmt: skip
    base = make_base(tmp_path / "llama", "llama", **shape)
    settings = check_settings(
        {"model": {"base": str(base)}, "train": {"checkpointing": mode, "tokens_per_microbatch": 4096}}
    )
    planned = plan(settings)
    model = make_model(base, device="cuda", adapter=settings.adapter)
    model.set_compute_dtype(torch.bfloat16)
    model.set_checkpointing([mode] * 12)
    model.train()
    optimizer = build_optimizer(model, settings)
    batch = model.batch([TokenTree([5] * 400, ([6] * 56, [7] * 56)) for _ in range(8)])
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        model.rewards(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = planned.needed(mode, 4096) - planned.machine.context
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.05)
