"""A model in a rotated basis is computed, trained, written, read and exported like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pico import VOCAB_SIZE, logits, pico_inputs, pico_model, pico_tokenizer, two_steps
from slimtune.arch import bind
from slimtune.errors import FormatError
from slimtune.export import export
from slimtune.export.base import Source
from slimtune.export.native import config_of, write_model
from slimtune.lora.attach import add_lora, base_of
from slimtune.quant import QUANTIZERS, QuantLinear
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.size import model_size

METHODS = ["quip", "trellis"]


def quantized(name: str, **fields: Any) -> Any:
    model = pico_model("llama")
    tokens = torch.randint(6, VOCAB_SIZE, (4, 12))
    quantize_(model, bind(model), all_linear(QUANTIZERS[name](**fields)), tokens=tokens)
    return model


def layers_of(model: Any) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_written_and_read(name: str, bits: int, tmp_path: Path) -> None:
    model = quantized(name, bits=bits)
    inputs = pico_inputs(model)
    (group,) = config_of(model).groups
    tag = {"quip": "e8p", "trellis": "trellis"}[name]
    assert group["layout"] == tag and group["bits"] == bits and len(group["modules"]) == len(layers_of(model)) == 14
    write_model(model, pico_tokenizer(), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(layers_of(again)) == 14
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for one, other in zip(layers_of(half), layers_of(model), strict=True):
        assert torch.equal(one.dequantize(), other.dequantize())
    size = model_size(dict(model.named_modules()), frozenset())
    assert size.parameters == sum(p.numel() for p in pico_model("llama").parameters())


@pytest.mark.parametrize("name", METHODS)
def test_it_is_trained_and_exported(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    wrapped = add_lora(model, r=3)
    inputs = pico_inputs(model)
    before = [p.detach().clone() for layer in layers_of(wrapped) for p in layer.parameters()]
    losses = two_steps(wrapped, inputs)
    assert losses[1] < losses[0]
    after = [p for layer in layers_of(wrapped) for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    source = Source(wrapped, pico_tokenizer(), "someone/original")
    for format in ("safetensors", "peft"):
        assert export(source, format, tmp_path / format).max_logit_difference < 1e-3
    with pytest.raises(FormatError, match="neither affine"):
        export(Source(base_of(wrapped), pico_tokenizer(), "someone/original"), "compressed-tensors", tmp_path / "ct")


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_of_the_input_is_exact(name: str) -> None:
    layer = layers_of(quantized(name))[0].double()
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, layer.out_features, dtype=torch.float64)
    (layer(x) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, upstream @ layer.dequantize(torch.float64))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", METHODS)
def test_it_compiles_as_one_graph(name: str) -> None:
    linear = torch.nn.Linear(24, 40, bias=False)
    method: Any = QUANTIZERS[name](bits=3)
    layer = QuantLinear.from_linear(linear, method(linear.weight.detach(), {"hessian": torch.eye(24)}))
    x = torch.randn(5, 24, requires_grad=True)
    wanted = layer(x)
    torch._dynamo.reset()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, wanted)
    slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, wanted)]
    torch.testing.assert_close(*slopes)
