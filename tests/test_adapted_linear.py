"""Base and update as one product give what PEFT's two give, values and gradients."""

import pytest
import torch
from conftest import make_base, make_model, shake
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit as LoraLinear4bit

from lora_rm.config import AdapterSettings
from lora_rm.model.adapted_linear import AdaptedLinear, AdaptedLinear4bit, _AdaptedProduct
from lora_rm.model.adapter import lora_layers


def an_adapted_layer(tmp_path, quantization, name="q_proj", **adapter):
    """Of Qwen2, whose query projection has a bias and whose MLP has none; alpha is not the rank."""
    base = make_base(tmp_path / "base", "qwen2", dtype=torch.float32)
    model = make_model(
        base, quantization=quantization, adapter=AdapterSettings(rank=4, alpha=12.0, **adapter)
    )
    shake(model).train()
    return next(layer for found, layer in lora_layers(model) if found.endswith(name))


def outputs(forward, layer, x, dtype):
    """Of a call under autocast to `dtype`: y, and the gradients toward x, A and B."""
    trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = forward(x)
    weights = torch.linspace(-1.0, 1.0, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad((y.float() * weights).sum(), [x, *trained])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["q_proj", "up_proj"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_one_product_gives_what_peft_gives(tmp_path, quantization, name, dtype):
    layer = an_adapted_layer(tmp_path, quantization, name)
    base = layer.get_base_layer()
    base.compute_dtype = dtype
    assert (base.bias is not None) == (name == "q_proj")
    peft, own = (LoraLinear4bit, AdaptedLinear4bit) if quantization == "nf4" else (LoraLinear, AdaptedLinear)
    assert type(layer) is own
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected = outputs(lambda x: peft.forward(layer, x), layer, x, dtype)
    found = outputs(layer, layer, x, dtype)
    assert found[0].dtype == expected[0].dtype
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        assert float((one - other).abs().max()) <= 4 * torch.finfo(dtype).eps * scale


def test_what_is_no_plain_lora_stays_with_peft(tmp_path, monkeypatch):
    drops, dora, plain = (
        an_adapted_layer(tmp_path / str(number), "none", **adapter)
        for number, adapter in enumerate(({"dropout": 0.5}, {"use_dora": True}, {}))
    )

    def refuse(*_):
        raise AssertionError("computed as one product")

    monkeypatch.setattr(_AdaptedProduct, "apply", refuse)
    x = torch.randn(1, 3, plain.in_features)
    drops(x), dora(x)
    for layer in (plain, drops.eval()):  # nothing is dropped in an evaluation
        with pytest.raises(AssertionError, match="one product"):
            layer(x)


def test_inputs_that_need_no_gradient_get_none(tmp_path):
    """The first adapted layer's input: its product with the weight is spared."""
    layer = an_adapted_layer(tmp_path, "nf4")
    base = layer.get_base_layer()
    x = torch.randn(4, layer.in_features)
    y = layer(x)
    base.weight = None  # the backward pass may not look at it
    y.sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().max() > 0
