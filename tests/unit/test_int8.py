"""Integer products: the codes of the reference, sums that are exact, results within float rounding, any shape."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimtune.kernels import int8
from slimtune.kernels.dispatch import integers_wanted, reference
from slimtune.quant.activation import Activations
from slimtune.quant.integer import in_integers
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn

needs_units = pytest.mark.skipif(not int8.fast(), reason="no integer units")
ROUNDINGS = {
    "8": Activations(8),
    "4": Activations(4),
    "8 asymmetric": Activations(8, sym=False),
    "4 asymmetric clipped": Activations(4, sym=False, clip_ratio=0.8),
    "8 static": Activations(8, static=True, low=-2.0, high=3.0),
    "8 static asymmetric": Activations(8, static=True, low=-2.0, high=3.0, sym=False),
}
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def layer(rounding: Activations, outputs: int = 24, inputs: int = 40, **method: Any) -> QuantLinear:
    linear = nn.Linear(inputs, outputs)
    method = {"bits": 8, "group_size": -1, "sym": True, **method}
    return QuantLinear.from_linear(linear, Rtn(**method)(linear.weight.detach(), {}), rounding)


@each_rounding
@each_dtype
def test_codes_are_the_references(rounding: Activations, dtype: torch.dtype) -> None:
    x = (torch.randn(300, 2000) + 0.3).to(dtype)  # more than is rounded at once
    x[7] = 0
    codes, scale, zero = (part.squeeze(1) for part in rounding.codes(x))
    got = int8.round_tokens(x, rounding.bits, rounding.grid, symmetric=rounding.sym)
    middle = 2 ** (rounding.bits - 1)
    assert torch.equal(got.codes.float() - int8.MIDDLE, codes - middle)
    assert torch.equal(got.scale, scale.expand_as(got.scale))
    assert (got.zero is None) == rounding.sym
    if got.zero is not None:
        assert torch.equal(got.zero, (zero - middle).expand_as(got.zero))


@needs_units
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 40, 24), (3, 37, 5), (17, 1, 1), (64, 576, 192)])
@pytest.mark.parametrize("piece", [1, 100, 1 << 21])
def test_sums_are_exact_in_any_shape(
    monkeypatch: pytest.MonkeyPatch, tokens: int, inputs: int, outputs: int, piece: int
) -> None:
    monkeypatch.setattr(int8, "PIECE", piece)
    q = torch.randint(256, (tokens, inputs), dtype=torch.uint8)
    c = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    s, v, z = torch.rand(tokens, 1) + 0.1, torch.rand(outputs) + 0.1, torch.randint(-128, 128, (tokens, 1)).float()
    for zero in (None, z):
        got = int8.multiply(int8.Tokens(q, s, zero), int8.weight(c, v), torch.float32)
        centred = q.double() - 128 - (0 if zero is None else zero.double())
        wanted = s.double() * (centred @ c.double().T) * v.double()
        # Rounding of the scaled sum, and of the zero point's share, which may be larger than their difference.
        bound = 8 * torch.finfo(torch.float32).eps * (s * v * 128 * 128 * inputs).double()
        assert bool(((got.double() - wanted).abs() <= bound).all())


@needs_units
@each_rounding
@each_dtype
@pytest.mark.parametrize("method", [{}, {"bits": 4}, {"bits": 4, "sym": False}, {"bits": 6, "sym": False}], ids=str)
def test_a_layer_computes_what_the_reference_computes(
    rounding: Activations, dtype: torch.dtype, method: dict[str, Any]
) -> None:
    q, x = layer(rounding, **method), torch.randn(2, 25, 40).to(dtype)
    with torch.no_grad():
        assert in_integers(x, rounding, q.layout)
        got = q(x)
        with reference():
            assert not in_integers(x, rounding, q.layout)
            near = q(x)
        exact = rounding(x.float()) @ q.dequantize().T + q.bias
    assert got.dtype == near.dtype == dtype
    # Ours is rounded once, to `dtype`; the reference rounds weight and input to it as well.
    size = (rounding(x.float()).abs() @ q.dequantize().abs().T + q.bias.abs()).max()
    eps = torch.finfo(dtype).eps
    assert float((got.float() - exact).abs().max()) <= 2 * eps * float(exact.abs().max()) + 1e-6 * float(size)
    torch.testing.assert_close(got, near, rtol=4 * eps, atol=4 * eps * float(size))


@needs_units
@pytest.mark.parametrize(
    ("rounding", "method"),
    [
        (Activations(8, group_size=8), {}),
        (Activations(8), {"group_size": 8}),
        (Activations(8), {"sym": False}),
    ],
    ids=["groups of inputs", "groups of weights", "8 bits with zero points"],
)
def test_what_integers_cannot_say_the_reference_computes(rounding: Activations, method: dict[str, Any]) -> None:
    q, x = layer(rounding, **method), torch.randn(3, 40)
    with torch.no_grad():
        assert not in_integers(x, rounding, q.layout)
        assert torch.equal(q(x), rounding(x) @ q.dequantize().T + q.bias)


@needs_units
def test_only_inference_on_a_cpu_is_in_integers() -> None:
    x = torch.randn(3, 40)
    assert not integers_wanted(x)
    with torch.no_grad():
        assert integers_wanted(x) and not integers_wanted(x.double()) and not integers_wanted(x.to("meta"))


@needs_units
def test_a_weight_that_is_written_to_is_packed_again() -> None:
    q, other = layer(Activations(8)), layer(Activations(8))
    x = torch.randn(5, 40)
    with torch.no_grad():
        before = q(x)
        q.scale.copy_(other.scale)
        assert not torch.equal(before, between := q(x))
        q.codes.copy_(other.codes)
        q.bias.copy_(other.bias)
        assert not torch.equal(between, q(x))
        assert not torch.equal(before, q(x)) and torch.equal(q(x), other(x))


@needs_units
def test_an_input_that_is_written_to_is_rounded_again() -> None:
    q, x = layer(Activations(8)), torch.randn(5, 40)
    with torch.no_grad():
        first = q(x)
        x.mul_(-1)
        assert torch.equal(q(x), layer_of(q)(x)) and not torch.equal(first, q(x))
    with torch.inference_mode():
        y = torch.randn(5, 40)
        first = q(y)
        y.mul_(-1)
        assert not torch.equal(first, q(y))


def layer_of(q: QuantLinear) -> Any:
    """The same layer, on a copy of its input."""
    return lambda x: q(x.clone())


@needs_units
def test_projections_of_one_input_round_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    real = int8.round_tokens
    monkeypatch.setattr(int8, "round_tokens", lambda x, *a, **k: (calls.append(x), real(x, *a, **k))[1])
    x = torch.randn(5, 40)
    with torch.no_grad():
        for q in (layer(Activations(8)), layer(Activations(8)), layer(Activations(4))):
            q(x)
    assert len(calls) == 2


ELDER = """
import time, torch
from slimtune.kernels import int8

codes, tokens = torch.ones(576, 576, dtype=torch.int8), torch.full((512, 576), 130, dtype=torch.uint8)
weight, rounded = int8.weight(codes, torch.ones(576)), int8.Tokens(tokens, torch.ones(512, 1), None)
int8.multiply(rounded, weight, torch.float32)
start = time.process_time()
assert torch.equal(int8.multiply(rounded, weight, torch.float32), torch.full((512, 576), 2.0 * 576))
assert time.process_time() - start < 0.1
"""


@needs_units
def test_processors_without_amx_have_a_fast_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    subprocess.run([sys.executable, "-c", ELDER], check=True)
