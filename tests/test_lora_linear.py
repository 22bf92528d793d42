"""The fused LoRA layer computes what PEFT's does, and steps aside where it would not."""

import copy

import pytest
import torch
from conftest import make_model
from peft.tuners import lora
from test_engine import load

from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.methods.lora_linear import fused


def pair(bias=True, **options):
    """A fused layer and PEFT's own with the same weights."""
    torch.manual_seed(0)
    config = lora.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
    theirs = lora.Linear(torch.nn.Linear(12, 20, bias=bias), "default", config, r=4, lora_alpha=8)
    theirs.base_layer.requires_grad_(False)
    ours = copy.deepcopy(theirs)
    ours.__class__ = fused(type(ours))
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 12), (7, 12)])
def test_values_and_gradients_are_pefts(shape, bias):
    ours, theirs = pair(bias)
    x = torch.randn(shape)
    results = []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_()
        y = layer(given)
        y.square().sum().backward()
        results.append([y.detach(), given.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert len(results[0]) == 4
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_are_right_in_double_precision():
    ours, _ = pair()
    ours.double()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    inputs = (x, ours.lora_A["default"].weight, ours.lora_B["default"].weight)
    assert ours._is_plain(x)
    assert torch.autograd.gradcheck(lambda x, a, b: ours(x), inputs)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.merge(),
        lambda layer: layer.base_layer.requires_grad_(True),
        lambda layer: layer.lora_dropout.update({"default": torch.nn.Dropout(0.5)}),
        lambda layer: layer.base_layer.to(torch.bfloat16),
    ],
    ids=["off", "merged", "trained base", "dropout", "mixed precision"],
)
def test_it_steps_aside(change):
    ours, theirs = pair()
    x = torch.randn(3, 12)
    for layer in (ours, theirs):
        change(layer)
    x = x.to(ours.base_layer.weight.dtype)
    assert not ours._is_plain(x)
    torch.manual_seed(1)
    expected = theirs(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours(x), expected)


def test_a_method_fuses_every_layer_and_merges_as_before(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    method = Lora(LoraOptions(r=2))
    model = method.apply(load(folder), "CAUSAL_LM").eval()
    layers = [m for m in model.modules() if isinstance(m, lora.Linear)]
    assert layers and all(type(m) is fused(lora.Linear) for m in layers)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.normal_(std=0.1)
    ids = torch.tensor([[5, 6, 7, 8]])
    tuned = model(ids).logits.detach()
    with method.without(model):
        torch.testing.assert_close(model(ids).logits, load(folder).eval()(ids).logits)
    torch.testing.assert_close(method.merge(model)(ids).logits, tuned, rtol=1e-4, atol=1e-5)
