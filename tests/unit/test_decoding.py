"""Packed layers prepared for a few rows: the same products, from copies that come and go."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from tests.pico import pico_model
from torch import nn

from slimtune.arch import bind
from slimtune.kernels import compiled
from slimtune.kernels.cpu import Int4Weight, int4_weight
from slimtune.lora.attach import add_lora
from slimtune.quant import QUANTIZERS
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.base import QTensor
from slimtune.quant.decoding import Kept, decoding
from slimtune.quant.layouts import Affine
from slimtune.quant.linear import FEW, QuantLinear
from slimtune.quant.products import multiplier
from slimtune.quant.rtn import Rtn


def packed(out: int, features: int, method: object, *, bias: bool = False, scale: float = 1) -> QuantLinear:
    torch.manual_seed(0)
    linear = nn.Linear(features, out, bias=bias)
    linear.weight.data.mul_(scale)
    weight = method(linear.weight.detach(), {})  # type: ignore[operator]
    return QuantLinear.from_linear(linear, weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, -1])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_int4_product_is_that_of_the_decoded_weight(bits: int, group_size: int, sym: bool, rows: int) -> None:
    features = 192 if group_size == 96 else 384
    layer = packed(48, features, Rtn(bits=bits, group_size=group_size, sym=sym), bias=True)
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(1))
    wanted = layer(x)
    with decoding(layer), torch.no_grad():
        assert isinstance(layer.small, Int4Weight)
        found = layer(x)
    assert found.dtype == x.dtype
    assert float((found - wanted).norm() / wanted.norm()) < 2**-7


def test_it_is_exact_where_bfloat16_is() -> None:
    g = torch.Generator().manual_seed(0)
    codes, zero = torch.randint(0, 16, (32, 128), generator=g), torch.randint(0, 16, (32, 2), generator=g)
    scale = 2.0 ** torch.randint(-3, 3, (32, 2), generator=g)
    product = int4_weight(codes, scale, zero, bits=4, group_size=64)
    assert product is not None
    x = torch.zeros(3, 128)
    x[range(3), [0, 70, 127]] = 1.0  # one weight at a time
    weight = (codes - zero.repeat_interleave(64, 1)) * scale.repeat_interleave(64, 1)
    assert torch.equal(product(x), weight[:, [0, 70, 127]].T)


@pytest.mark.parametrize(
    ("out", "features", "group_size"), [(40, 128, 64), (48, 100, 32), (48, 96, 16)], ids=["rows", "ragged", "group"]
)
def test_what_the_int4_product_does_not_take_is_kept_decoded(out: int, features: int, group_size: int) -> None:
    layer = packed(out, features, Rtn(bits=4, group_size=group_size))
    x = torch.randn(2, features)
    with decoding(layer), torch.no_grad():
        assert isinstance(layer.small, Kept)
        torch.testing.assert_close(layer(x), layer.dequantize().mm(x.T).T, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", sorted(set(QUANTIZERS) - {"signs"}))
def test_every_quantizer_can_be_prepared(name: str) -> None:
    method = QUANTIZERS[name]()
    layer = packed(32, 64, lambda w, _: method(w, {"hessian": torch.eye(64)} if method.needs else {}))
    x = torch.randn(1, 64)
    wanted = layer(x)
    with decoding(layer), torch.no_grad():
        assert float((layer(x) - wanted).norm() / wanted.norm()) < 2**-6


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", sorted(set(QUANTIZERS) - {"signs"}))
@pytest.mark.parametrize(("out", "features"), [(48, 64), (37, 100), (8, 8), (130, 264)])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_by_loops_are_those_of_the_decoded_weight(
    name: str, bits: int, out: int, features: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = QUANTIZERS[name]
    known = {f.name for f in fields(method)}
    wanted = {"bits": bits} if "bits" in known and bits in getattr(method, "widths", (bits,)) else {}
    made = method(**wanted)
    layer = packed(out, features, lambda w, _: made(w, {"hessian": torch.eye(features)} if made.needs else {}))
    product = multiplier(layer.qtensor)
    if compiled.library() is None:
        assert product is None
        return
    assert product is not None
    monkeypatch.setattr(compiled, "FEW", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for shape in [(1, features), (2, 3, features), (0, features)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        exact = x.double() @ layer.dequantize(torch.float64).T
        torch.testing.assert_close(product(x).double(), exact, rtol=1e-5, atol=1e-5)
        half = product(x.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16
        rounded = x.to(torch.bfloat16).double() @ layer.dequantize(torch.float64).T
        torch.testing.assert_close(half.double(), rounded, rtol=2**-8, atol=1e-5)


@pytest.mark.skipif(compiled.library() is None, reason="no C compiler")
@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize("zeros", ["whole", "any"])
def test_loops_take_what_others_store(scales: str, zeros: str) -> None:
    torch.manual_seed(0)
    layout = Affine(9, 70, 3, 32, float_zero=zeros == "any", scale_dtype=scales, zero_dtype="float16")
    stored = {
        name: torch.randint(0, 8, shape, dtype=kind) if kind == torch.uint8 else torch.rand(shape).to(kind)
        for name, (shape, kind) in layout.tensors().items()
    }
    weight, x = QTensor(stored, layout), torch.randn(2, 70)
    product = multiplier(weight)
    assert product is not None
    torch.testing.assert_close(
        product(x).double(), x.double() @ weight.dequantize(torch.float64).T, rtol=1e-5, atol=1e-4
    )


@pytest.mark.skipif(compiled.library() is None, reason="no C compiler")
@pytest.mark.parametrize("name", ["nf4", "quip", "trellis", "hqq"])
def test_weights_stay_packed_without_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.quant.decoding.SPARE", 0.0)
    method = QUANTIZERS[name]()
    layer = packed(40, 100, lambda w, _: method(w, {"hessian": torch.eye(100)} if method.needs else {}), bias=True)
    x = torch.randn(3, 100)
    wanted = layer(x)
    with decoding(layer), torch.no_grad():
        assert layer.small is not None and not isinstance(layer.small, Kept | Int4Weight)
        monkeypatch.setattr(QTensor, "dequantize", lambda *_: pytest.fail("decoded"))
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_nothing_is_prepared_without_memory_and_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.quant.decoding.SPARE", 0.0)
    monkeypatch.setattr(compiled, "library", lambda: None)
    layer = packed(40, 128, Rtn(bits=4, group_size=64))
    with decoding(layer):
        assert layer.small is None


def test_many_rows_and_gradients_take_the_exact_way() -> None:
    layer = packed(32, 64, Rtn(bits=4, group_size=64))
    x = torch.randn(FEW + 1, 64)
    wanted = layer(x)
    with decoding(layer):
        with torch.no_grad():
            assert torch.equal(layer(x), wanted)
        assert torch.equal(layer(x[:1]), layer(x[:1].clone())) and torch.equal(layer(x)[:1], wanted[:1])
        one = x[:1].clone().requires_grad_()
        layer(one).sum().backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(one.grad, layer.dequantize().sum(0, keepdim=True))


def test_the_copies_go_even_after_an_error() -> None:
    layer = packed(32, 64, Rtn(bits=4, group_size=64))
    with pytest.raises(ZeroDivisionError), decoding(layer):
        raise ZeroDivisionError
    assert layer.small is None


def test_an_adapter_is_added_to_the_prepared_product() -> None:
    model = pico_model("llama")
    quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=32)))
    wrapped = add_lora(model, r=4, init="gaussian")
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(6)[None] % 8
    with torch.no_grad():
        wanted = wrapped(input_ids=ids).logits
        with decoding(wrapped):
            found = wrapped(input_ids=ids).logits
        with wrapped.disable_adapter():
            without = wrapped(input_ids=ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.03 < float((without - wanted).norm() / wanted.norm())
