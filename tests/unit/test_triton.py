"""The GPU kernels equal the reference, for odd shapes: run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from slimtune.errors import BackendMissing
from slimtune.kernels import dispatch
from slimtune.kernels.reference import apply_grid_
from slimtune.linalg import hadamard, lattice, trellis
from slimtune.linalg.packing import pack
from slimtune.quant import QUANTIZERS
from slimtune.quant.activation import Activations
from slimtune.quant.decoding import decoding
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn
from slimtune.rotate.turn import hadamard_turn

triton = pytest.importorskip("slimtune.kernels.triton") if importlib.util.find_spec("triton") else None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(33, 100, 32), (64, 128, 128), (5, 7, 3), (70, 65, 64)]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.WANTED, "1")


def affine(bits: int, out: int, features: int, group: int, sym: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    groups = -(-features // group)
    codes = torch.randint(0, 2**bits, (out, features), dtype=torch.uint8, device=DEVICE)
    zero = torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8, device=DEVICE)
    return codes, torch.randn(out, groups, device=DEVICE).to(torch.bfloat16), None if sym else zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("out", "features", "group"), SHAPES)
@pytest.mark.parametrize("sym", [False, True])
def test_affine_weights(bits: int, out: int, features: int, group: int, sym: bool) -> None:
    codes, scale, zero = affine(bits, out, features, group, sym)
    wanted = apply_grid_(codes.double(), scale, zero, bits=bits, group_size=group)
    assert dispatch.triton_runs(DEVICE)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = dispatch.dequantize_affine(
            pack(codes, bits), scale, zero, bits=bits, group_size=group, in_features=features, work=dtype, dtype=dtype
        )
        assert found.dtype == dtype
        if dtype == torch.bfloat16 and DEVICE.type == "cpu":  # Triton's interpreter cuts bfloat16 off, a GPU rounds
            torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, wanted.to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("out", "features", "group"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_affine_products(bits: int, out: int, features: int, group: int, rows: int) -> None:
    codes, scale, zero = affine(bits, out, features, group, False)
    x = torch.randn(rows, features, device=DEVICE)
    wanted = x.double() @ apply_grid_(codes.double(), scale, zero, bits=bits, group_size=group).T
    found = dispatch.affine_product(x, codes=pack(codes, bits), scale=scale, zero=zero, bits=bits, group_size=group)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lattice_and_trellis_codes(bits: int) -> None:
    codes = torch.randint(0, 256, (3, 101, bits), dtype=torch.uint8, device=DEVICE)
    assert torch.equal(dispatch.decode_lattice(codes, torch.float32), lattice.decode(codes, torch.float32))
    codes = torch.randint(0, 256, (7, 32 * bits), dtype=torch.uint8, device=DEVICE)
    assert torch.equal(dispatch.decode_trellis(codes, bits, torch.float32), trellis.decode(codes, bits, torch.float32))


@pytest.mark.parametrize("name", sorted(set(QUANTIZERS) - {"signs"}))
def test_a_layer_is_the_same_with_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = QUANTIZERS[name]()
    linear = torch.nn.Linear(64, 48)
    stats = {"hessian": torch.eye(64)} if method.needs else {}
    layer = QuantLinear.from_linear(linear, method(linear.weight.detach(), stats)).to(DEVICE)
    x = torch.randn(5, 64, device=DEVICE, requires_grad=True)
    with_triton = torch.autograd.grad(layer(x).square().sum(), x)[0]
    monkeypatch.setenv(dispatch.WANTED, "0")
    without = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.testing.assert_close(with_triton, without)


TOKENS = [
    Activations(8),
    Activations(4, sym=False),
    Activations(6, clip_ratio=0.7),
    Activations(8, sym=False, clip_ratio=0.4),
    Activations(3, sym=False, static=True, low=-1.5, high=2.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", TOKENS, ids=str)
def test_rounded_tokens_are_the_references(kind: Activations, dtype: torch.dtype) -> None:
    for shape in ((1, 5), (7, 1024), (3, 2500)):
        x = (3 * torch.randn(shape, device=DEVICE)).to(dtype)
        x[-1] = 0
        found, scale, zero = dispatch.round_tokens(x, kind.bits, kind.grid, symmetric=kind.sym)
        codes, wanted, middle = (part.flatten(1) for part in kind.codes(x))
        assert torch.equal(found.to(torch.float32), codes - 2 ** (kind.bits - 1))
        assert torch.equal(scale, wanted)
        assert zero is None if kind.sym else torch.equal(zero, middle - 2 ** (kind.bits - 1))


@pytest.mark.parametrize("kind", TOKENS[:2], ids=str)
@pytest.mark.parametrize(("out", "features", "count"), [(33, 100, 1), (64, 128, 17), (5, 7, 3), (70, 65, 70)])
def test_products_in_integers(kind: Activations, out: int, features: int, count: int) -> None:
    x = torch.randn(count, features, device=DEVICE)
    rounded = kind(x).double()
    tokens = dispatch.round_tokens(x, kind.bits, kind.grid, symmetric=kind.sym)
    for bits, sym in ((2, False), (3, False), (4, True), (7, False), (8, True)):
        codes, scale, zero = affine(bits, out, features, features, sym)
        wanted = rounded @ apply_grid_(codes.double(), scale, zero, bits=bits, group_size=features).T
        grid = {"codes": pack(codes, bits), "scale": scale, "zero": zero}
        found = dispatch.integer_product(tokens, **grid, bits=bits, dtype=torch.float32)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", TOKENS, ids=str)
@pytest.mark.parametrize("sym", [False, True])
def test_a_layer_with_rounded_inputs_runs_in_integers(
    kind: Activations, sym: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = torch.nn.Linear(100, 33)
    weight = Rtn(bits=4, group_size=-1, sym=sym)(linear.weight.detach(), {})
    layer = QuantLinear.from_linear(linear, weight, kind).to(DEVICE)
    asked: list[int] = []
    product = dispatch.integer_product
    monkeypatch.setattr(dispatch, "integer_product", lambda *a, **k: (asked.append(1), product(*a, **k))[1])
    for shape in ((2, 9, 100), (0, 100)):
        x = torch.randn(shape, device=DEVICE)
        with torch.no_grad():
            with_triton = layer(x)
            with dispatch.reference():
                torch.testing.assert_close(with_triton, layer(x))
    assert len(asked) == 2
    layer(x.requires_grad_())  # a gradient is that of the reference
    assert len(asked) == 2


@pytest.mark.parametrize("width", [74, 130, 576, 14336, 28672])
@pytest.mark.parametrize("inverse", [False, True])
def test_transforms(width: int, inverse: bool) -> None:
    """Two factors and three, of Hadamard and of Hartley, padded and not; and their gradient, which is the inverse."""
    for dtype, error in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
        x = (5 * torch.randn(2, 3, width, device=DEVICE)).to(dtype).requires_grad_()
        found = dispatch.transform(x, inverse=inverse)
        wanted = hadamard.transform(x.detach().double(), inverse=inverse)
        assert found.dtype == dtype and "_Transform" in str(found.grad_fn)
        assert float((found.detach() - wanted).norm() / wanted.norm()) < error
        (back,) = torch.autograd.grad(found, x, found)
        assert float((back - x.detach()).norm() / x.detach().norm()) < 2 * error
    assert triton.transform(torch.randn(0, width, device=DEVICE), inverse=inverse).shape == (0, width)


def test_tiles_of_transforms_stay_below_what_small_gpus_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound counts both operands of both products; a smaller one takes smaller tiles, or none: plain torch."""
    for a in (16, 32, 64, 128):
        for b in (16, 32, 64, 128, 256, 512):
            height, depth, inner = tile = triton.turning_tile(a, b)
            assert max(height, depth) <= a and inner <= b and min(tile) >= 16
            held = height * depth + depth * inner + height * inner + inner * b
            assert tile.shared_bytes(b) == 4 * held < 2**16
    assert triton.turning_tile(128, 1024) is None
    x = torch.randn(3, 448 * 64, device=DEVICE)
    monkeypatch.setattr(triton, "SHARED", 2**15)
    triton._sides.cache_clear()  # what was chosen by the other bound
    assert triton.transform(x, inverse=False) is None
    assert torch.equal(dispatch.transform(x), hadamard.transform(x))
    assert triton.transform(x[:, :576], inverse=False) is not None
    triton._sides.cache_clear()


@pytest.mark.parametrize("width", [48, 64, 2 * 1031])
def test_widths_without_a_kernel_turn_as_they_did(width: int) -> None:
    x = torch.randn(3, width, device=DEVICE)
    assert triton.transform(x, inverse=False) is None
    assert torch.equal(dispatch.transform(x), hadamard.transform(x))


def test_online_transforms_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = hadamard_turn(192, heads=2, generator=torch.Generator().manual_seed(0))
    x, asked, kernel = torch.randn(3, 384, device=DEVICE), [], triton.transform
    turn = turn.like(x)
    monkeypatch.setattr(triton, "transform", lambda x, **k: (asked.append(len(x)), kernel(x, **k))[1])
    found = turn(x)
    assert asked == [6]
    monkeypatch.setenv(dispatch.WANTED, "0")
    torch.testing.assert_close(found, turn(x))
    assert asked == [6]


def test_prepared_layers_multiply_packed() -> None:
    linear = torch.nn.Linear(64, 48)
    layer = QuantLinear.from_linear(linear, Rtn(bits=3, group_size=32)(linear.weight.detach(), {})).to(DEVICE)
    x = torch.randn(2, 3, 64, device=DEVICE)
    wanted = layer(x)
    with decoding(layer), torch.no_grad():
        assert layer.small is not None
        torch.testing.assert_close(layer(x), wanted)


def test_asking_for_it_without_having_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendMissing, match="Triton is not installed"):
        dispatch.triton_runs(torch.device("cpu"))
