"""Products with a packed weight in pieces equal those with the whole weight."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from slimtune.quant import QTensor, products
from slimtune.quant.hqq import Hqq
from slimtune.quant.linear import QuantLinear
from slimtune.quant.nf4 import Nf4
from slimtune.quant.products import times, times_transposed
from slimtune.quant.quip import Quip
from slimtune.quant.rotated import Lattice
from slimtune.quant.rtn import Rtn
from slimtune.quant.trellis import Trellis

METHODS = {
    "2 bits": Rtn(bits=2, group_size=-1),
    "3 bits": Rtn(bits=3, group_size=20),
    "4 bits symmetric": Rtn(bits=4, group_size=20, sym=True),
    "hqq": Hqq(bits=4, group_size=20),
    "nf4": Nf4(block_size=20),
    "quip": Quip(bits=2),
    "trellis": Trellis(bits=3),
}
ROTATED = ("quip", "trellis")


def weight(method: str, rows: int = 13, columns: int = 40) -> QTensor:
    w = torch.randn(rows, columns)
    stats: Mapping[str, Tensor] = {"hessian": torch.eye(columns)} if method in ROTATED else {}
    return METHODS[method](w, stats)


@pytest.fixture(params=[40, 100, 300, 519])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces of one row, of two, of seven and six, and of twelve and one."""
    monkeypatch.setattr(products, "PIECE", request.param)
    return int(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_pieces_equal_the_whole(method: str, piece: int) -> None:
    q = weight(method)
    w = q.dequantize(torch.float64)
    x, grad = torch.randn(5, 40, dtype=torch.float64), torch.randn(5, 13, dtype=torch.float64)
    torch.testing.assert_close(times_transposed(x, q.layout, q.tensors), x @ w.T)
    torch.testing.assert_close(times(grad, q.layout, q.tensors), grad @ w)


def test_only_rows_that_stand_alone_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PIECE", 100)
    counts = {}
    for method in METHODS:
        q, seen = weight(method), []
        real = type(q.layout).dequantize
        monkeypatch.setattr(
            type(q.layout), "dequantize", lambda self, *a, real=real, seen=seen: (seen.append(1), real(self, *a))[1]
        )
        times_transposed(torch.randn(2, 40), q.layout, q.tensors)
        monkeypatch.setattr(type(q.layout), "dequantize", real)
        counts[method] = len(seen)
    assert counts == {method: 0 if method in ROTATED else 7 for method in METHODS}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(13, 40), (48, 100), (130, 72)])
@pytest.mark.parametrize("method", ROTATED)
def test_turning_vectors_is_turning_the_weight(
    method: str, size: tuple[int, int], dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = weight(method, *size)
    x, grad, other = torch.randn(3, size[1]).to(dtype), torch.randn(3, size[0]).to(dtype), torch.randn(3, size[1])
    w, room = q.dequantize(torch.float64), 2e-2 if dtype == torch.bfloat16 else 1e-5
    ways = []
    for pays in (True, False):
        monkeypatch.setattr(products, "_turning_pays", lambda *_, pays=pays: pays)
        onto = other.to(dtype, copy=True)
        found = [times_transposed(x, q.layout, q.tensors), times(grad, q.layout, q.tensors)]
        ways.append([*found, times(grad, q.layout, q.tensors, onto=onto)])
        assert ways[-1][-1] is onto and {y.dtype for y in ways[-1]} == {dtype}
        for y, exact in zip(
            ways[-1], [x.double() @ w.T, grad.double() @ w, grad.double() @ w + other.to(dtype).double()], strict=True
        ):
            assert float((y.double() - exact).norm() / exact.norm()) < room
    assert not all(torch.equal(one, two) for one, two in zip(*ways, strict=True)) or dtype == torch.bfloat16


@pytest.mark.parametrize("method", ROTATED)
def test_float16_holds_what_its_numbers_hold(method: str) -> None:
    q = weight(method, 64, 64)
    x, grad = torch.zeros(1, 64, dtype=torch.float16), torch.full((1, 64), 1e-6, dtype=torch.float16)
    x[0, 5] = 20_000
    w = q.dequantize(torch.float64)
    q.tensors["sign_out"].mul_(2**-6)
    w = w * 2**-6
    for got, exact in (
        (times_transposed(x, q.layout, q.tensors), x.double() @ w.T),
        (times(grad * 64, q.layout, q.tensors), grad.double() @ w * 64),
    ):
        assert float((got.double() - exact).norm() / exact.norm()) < 0.01


def test_vectors_are_turned_where_they_are_few() -> None:
    layout = weight("quip", 64, 64).layout
    assert isinstance(layout, Lattice)
    assert [products._turning_pays(torch.empty(n, 64), layout) for n in (1, 15, 16, 100)] == [True, True, False, False]


def test_autocast_does_not_reach_the_turning() -> None:
    q, x = weight("trellis", 64, 64), torch.randn(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = products._into_basis(x, q.layout, q.tensors)  # type: ignore[arg-type]
    assert torch.equal(turned, products._into_basis(x, q.layout, q.tensors))  # type: ignore[arg-type]


def test_pieces_are_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    q, grad = Rtn(bits=4, group_size=32)(torch.randn(512, 64), {}), torch.randn(3, 512).bfloat16()
    exact = grad.double() @ q.dequantize(torch.float64)
    whole = (times(grad, q.layout, q.tensors).double() - exact).norm()
    monkeypatch.setattr(products, "PIECE", 64)
    rows = (times(grad, q.layout, q.tensors).double() - exact).norm()
    assert rows <= 2 * whole  # added up in bfloat16 it is eight times as far away


@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40), (40,)])
def test_a_layer_gives_the_same_gradient(shape: tuple[int, ...], piece: int) -> None:
    linear = torch.nn.Linear(40, 13)
    layer = QuantLinear.from_linear(linear, METHODS["4 bits symmetric"](linear.weight.detach(), {}))
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    upstream = torch.randn_like(y)
    w = layer.dequantize(torch.float64)
    torch.testing.assert_close(y, x @ w.T + linear.bias.double())
    torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], upstream @ w)
