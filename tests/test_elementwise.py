"""Norms, gated activations and rotary positions in fewer passes are those of transformers, forward and backward."""

import sys

import pytest
import torch
from conftest import FAMILIES, compiles, make_base, make_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3 import modeling_phi3

from lora_rm.model import cpu_kernels, elementwise
from lora_rm.model.cpu_kernels import CpuKernels
from lora_rm.model.cuda_kernels import _NoKernels, _nvrtc, kernels_for, without_launches
from lora_rm.model.elementwise import FusedNorm, GatedMLP, _is_plain_rotation, fuse_elementwise

EXACT = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest difference, as a share of the largest value: both round to bfloat16, at other places."""


def rotate_one_operation_at_a_time(q, k, cos, sin):
    """As transformers 5.23 writes it, whatever stands in its modules now."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return tuple(x * cos + modeling_llama.rotate_half(x) * sin for x in (q, k))


def assert_alike(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= EXACT[dtype] * float(other.abs().max())


@pytest.fixture(params=["float32", "bfloat16 by torch", pytest.param("bfloat16 compiled", marks=compiles)])
def dtype(request, monkeypatch):
    """Of a test, in bfloat16 with and without the compiled kernels of a CPU."""
    if "by torch" in request.param:
        monkeypatch.setattr(cpu_kernels, "_kernels", lambda: None)
    elif "compiled" in request.param:
        assert cpu_kernels._kernels() is not None
    return getattr(torch, request.param.split()[0])


@pytest.mark.parametrize("kind", [modeling_llama.LlamaRMSNorm, Olmo2RMSNorm, modeling_phi3.Phi3RMSNorm])
def test_a_norm_and_its_gradient_are_those_of_transformers(kind, dtype, monkeypatch):
    monkeypatch.setattr(elementwise, "AT_ONCE", 200)  # four of the ten tokens
    torch.manual_seed(0)
    norm = kind(48, eps=1e-2).requires_grad_(False).to(dtype)
    norm.weight.normal_()
    x, seen = torch.randn(2, 5, 48).to(dtype) * 3, torch.randn(2, 5, 48).to(dtype)

    def run():
        own = x.clone().requires_grad_()
        y = norm(own)
        (y * seen).float().sum().backward()
        return y.detach(), own.grad

    expected = run()
    fuse_elementwise(torch.nn.Sequential(norm))
    assert isinstance(norm, FusedNorm)
    assert isinstance(norm, kind)
    assert_alike(run(), expected, dtype)


def test_of_a_norm_its_input_and_a_number_a_token_wait_for_the_backward_pass():
    norm = modeling_llama.LlamaRMSNorm(64).requires_grad_(False)
    fuse_elementwise(torch.nn.Sequential(norm))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        norm(torch.randn(7, 64, requires_grad=True))
    assert sorted(kept) == [7, 64, 7 * 64]


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_a_gated_mlp_and_its_gradients_are_those_of_transformers(act, dtype):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=48, num_attention_heads=2, hidden_act=act)
    mlp = modeling_llama.LlamaMLP(config).to(dtype)
    x, seen = torch.randn(2, 5, 16).to(dtype) * 3, torch.randn(2, 5, 16).to(dtype)

    def run():
        mlp.zero_grad()
        own = x.clone().requires_grad_()
        y = mlp(own)
        (y * seen).float().sum().backward()
        return [y.detach(), own.grad, *(weight.grad for weight in mlp.parameters())]

    expected = run()
    fuse_elementwise(torch.nn.Sequential(mlp))
    assert isinstance(mlp, GatedMLP)
    assert_alike(run(), expected, dtype)


def test_of_a_gated_mlp_gate_and_up_wait_for_the_backward_pass():
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    mlp = modeling_llama.LlamaMLP(config).requires_grad_(False)
    fuse_elementwise(torch.nn.Sequential(mlp))
    weights, kept = {weight.data_ptr() for weight in mlp.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(torch.randn(7, 16, requires_grad=True))
    assert [t.numel() for t in kept if t.data_ptr() not in weights] == [7 * 24, 7 * 24]


def test_what_is_another_function_is_left_alone():
    gemma, trained = Gemma2RMSNorm(16), modeling_llama.LlamaRMSNorm(16)
    bare, x = torch.nn.RMSNorm(16, eps=1e-5, elementwise_affine=False), torch.randn(3, 16)
    expected = bare(x)
    fuse_elementwise(torch.nn.Sequential(gemma, trained, bare))
    assert torch.equal(bare(x), expected)  # has no weight, as in DiffLlama
    assert type(gemma) is Gemma2RMSNorm  # multiplies by 1 + weight
    trained(torch.randn(3, 16)).sum().backward()
    assert trained.weight.grad is not None  # a norm that is trained gets its gradient
    half = trained.requires_grad_(False)(torch.randn(3, 16).bfloat16())
    assert half.dtype == torch.float32  # as transformers' with a weight of a wider type
    assert not _is_plain_rotation(modeling_phi3.apply_rotary_pos_emb)  # turns parts of heads too


def test_rotary_positions_and_their_gradient_are_those_of_transformers(dtype):
    torch.manual_seed(0)
    angles = torch.randn(1, 5, 24) * 9
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(dtype) for f in (torch.cos, torch.sin))
    sin[..., 24:] *= 1.5  # scaled positions need not be alike in both halves
    heads = [torch.randn(1, 5, count, 48).to(dtype).transpose(1, 2) for count in (4, 2)]  # as projections lie

    def run(function):
        q, k = (x.clone().requires_grad_() for x in heads)
        turned = function(q, k, cos, sin)
        (turned[0].float().square().sum() + turned[1].float().pow(3).sum()).backward()
        return [*(x.detach() for x in turned), q.grad, k.grad]

    assert_alike(run(elementwise.apply_rotary_pos_emb), run(rotate_one_operation_at_a_time), dtype)


def test_positions_in_float32_turn_bfloat16_heads_as_in_transformers():
    cos, sin = torch.randn(2, 1, 3, 8)
    q, k = torch.randn(1, 4, 3, 8).bfloat16(), torch.randn(1, 2, 3, 8).bfloat16()
    found = elementwise.apply_rotary_pos_emb(q, k, cos, sin)
    assert_alike(found, rotate_one_operation_at_a_time(q, k, cos, sin), torch.float32)


def test_transformers_gets_its_own_function_back(tmp_path):
    make_model(make_base(tmp_path / "llama"))
    assert modeling_llama.apply_rotary_pos_emb is elementwise.apply_rotary_pos_emb
    elementwise.give_back_rotary()
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_get_them(tmp_path, family):
    model = make_model(make_base(tmp_path / family, family))
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    fused = [m for m in norms if isinstance(m, FusedNorm)]
    assert len(fused) == (0 if family.startswith("gemma") else len(norms))
    home = sys.modules[type(model.layers[0]).__module__]
    rotate = getattr(home, "apply_rotary_pos_emb", None)
    assert (rotate is elementwise.apply_rotary_pos_emb) == (family not in ("phi3", "gpt2"))


def test_what_is_planned_for_a_gpu_has_the_tensors_of_its_kernels():
    """The planner counts them on a CPU; nothing is computed in them, and outside of planning nobody gets them."""
    gate, up, gradient = torch.randn(3, 1, 24, 64).bfloat16()
    heads = torch.randn(1, 24, 4, 16).bfloat16().transpose(1, 2)
    cos, sin = torch.randn(2, 1, 1, 24, 16).bfloat16()
    assert kernels_for(gate, up) is None
    with without_launches():
        kernels = kernels_for(gate, up)
        assert kernels_for(gate, up.float()) is None
    assert kernels_for(gate, up) is None
    assert kernels.gated(gate, up).shape == gate.shape
    assert [x.shape for x in kernels.gated_backward(gradient, gate, up)] == [gate.shape, up.shape]
    turned = kernels.turned(heads, cos, sin, back=False)
    assert (turned.shape, turned.stride()) == (heads.shape, heads.stride())


class ByTorch(_NoKernels):
    """The kernels as torch's operations, the first gradient off by a share."""

    def __init__(self, off=0.0):
        self.off = off

    def gated(self, gate, up):
        return torch.nn.functional.silu(gate) * up

    def gated_backward(self, gradient, gate, up):
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate * (1 + self.off), torch.nn.functional.silu(gate) * gradient

    def turned(self, x, cos, sin, *, back):
        low, high = sin.chunk(2, dim=-1)
        return elementwise._turned(x, cos, *((high, low.neg()) if back else (low.neg(), high)))


@compiles
@pytest.mark.parametrize("name", ["gated", "gated_backward", "norm", "norm_backward", "turned"])
def test_kernels_of_a_cpu_that_give_other_values_are_not_used(name, monkeypatch, capsys):
    def off(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        first = found[0] if isinstance(found, tuple) else found
        first[-1] *= 1.02
        return found

    real = getattr(CpuKernels, name)
    monkeypatch.setattr(CpuKernels, name, off)
    assert cpu_kernels._kernels.__wrapped__() is None
    assert "Norms, activations and positions are computed by torch" in capsys.readouterr().out


@compiles
def test_kernels_of_a_cpu_hide_nothing_that_is_no_number():
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 300.0, -300.0]).bfloat16()
    gate = torch.cat((values, torch.zeros(11, dtype=torch.bfloat16))).expand(2, 16)
    up, gradient = torch.full((2, 2, 16), 3.0).bfloat16()
    kernels = cpu_kernels._kernels()
    found = [kernels.gated(gate, up), *kernels.gated_backward(gradient, gate, up)]
    expected = [
        torch.nn.functional.silu(gate) * up,
        torch.ops.aten.silu_backward(gradient * up, gate),
        torch.nn.functional.silu(gate) * gradient,
    ]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())
        torch.testing.assert_close(one[:, 3:], other[:, 3:])
    for number in range(3):
        x = torch.ones(4, 32).bfloat16()
        x[1, 7] = values[number]
        y, _ = kernels.norm(x, torch.ones(32).bfloat16(), 1e-6)
        assert not y[1].isfinite().all()
        assert y[0].isfinite().all()


@compiles
def test_kernels_of_a_cpu_take_only_what_they_compute():
    x = torch.randn(3, 32).bfloat16()
    assert isinstance(cpu_kernels.kernels_for(x, x), CpuKernels)
    for other in (x.float(), x[:, :24], x[:0], x.to("meta"), x.as_subclass(Other)):
        assert cpu_kernels.kernels_for(x, other) is None


@compiles
def test_what_is_planned_for_a_cpu_has_the_tensors_of_its_kernels_and_what_is_traced_has_torchs():
    with FakeTensorMode():
        x, angles = torch.empty(1, 4, 24, 64).bfloat16(), torch.empty(1, 1, 24, 64).bfloat16()
        assert cpu_kernels.kernels_for(x, x) is None
        with cpu_kernels.without_runs():
            kernels = cpu_kernels.kernels_for(x, x)
            assert kernels.gated(x, x).shape == x.shape
            assert [y.shape for y in kernels.norm(x, x[0, 0, 0], 1e-6)] == [x.shape, (1, 4, 24, 1)]
            assert kernels.turned(x, angles, angles, back=False).shape == x.shape
        assert cpu_kernels.kernels_for(x, x) is None


class Other(torch.Tensor):
    """A tensor of another class, such as one that is sharded."""


def test_kernels_are_checked_wherever_they_are_first_asked_for():
    """Also in a layer that is checkpointed, whose recomputation must save what the first pass saved."""

    def layer(x, check):
        if check:
            ByTorch()._check(torch.device("cpu"))
        return x.sin().sin()

    x = torch.ones(3, requires_grad=True)
    first = iter([True, False])
    checkpoint(lambda x: layer(x, next(first)), x, use_reentrant=False).sum().backward()
    with torch.inference_mode():
        ByTorch()._check(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="other values than torch"):
        ByTorch(off=0.1)._check(torch.device("cpu"))


def test_no_cuda_toolkit_is_needed_to_compile(monkeypatch):
    """torch asks for the folder of its headers, which nothing here includes."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(OSError, match="CUDA_HOME"):
        cpp_extension.include_paths("cuda")
    with _nvrtc():
        assert cpp_extension.include_paths("cuda")
    assert cpp_extension.CUDA_HOME is None
