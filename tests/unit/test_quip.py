"""QuIP#, against the textbook's loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.errors import RecipeError, ShapeError
from slimtune.linalg.hadamard import matrix
from slimtune.linalg.hessian import inverse_cholesky
from slimtune.linalg.lattice import decode, encode, points
from slimtune.quant.lattice import unpack_codes
from slimtune.quant.quip import Quip, block_ldlq


def hessian_of(columns: int) -> Tensor:
    x = torch.randn(2 * columns, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    return x.T @ x / len(x)


def ldlq(w: Tensor, h: Tensor, bits: int) -> Tensor:
    """Block LDLQ as it is written, `H = L D Lᵀ` with identity blocks on the diagonal of `L`, in reverse columns."""
    n = len(h)
    c = torch.linalg.cholesky(h.flip(0, 1))
    inverse = torch.zeros_like(c)
    for k in range(0, n, 8):
        inverse[k : k + 8, k : k + 8] = torch.linalg.inv(c[k : k + 8, k : k + 8])
    lower, w = c @ inverse, w.flip(1)
    done = torch.zeros_like(w)
    for k in range(n - 8, -1, -8):
        here, after = slice(k, k + 8), slice(k + 8, n)
        target = w[:, here] + (w[:, after] - done[:, after]) @ lower[after, here]
        done[:, here] = decode(encode(target.flip(1), bits), w.dtype).flip(1)
    return done.flip(1)


@pytest.mark.parametrize("columns", [8, 64, 136, 304])
@pytest.mark.parametrize("bits", [2, 4])
def test_block_ldlq_is_the_textbook(columns: int, bits: int) -> None:
    w, h = torch.randn(5, columns, dtype=torch.float64), hessian_of(columns)
    upper, damp = inverse_cholesky(h)
    codes = block_ldlq(w, upper, lambda x: encode(x, bits))
    h.diagonal().add_(damp * h.diagonal().mean())
    torch.testing.assert_close(decode(codes, w.dtype).flatten(1), ldlq(w, h, bits))


@pytest.mark.parametrize("shape", [(5, 37), (12, 8), (37, 100), (1, 3)])
def test_dequantize_is_the_formula(shape: tuple[int, int]) -> None:
    q = Quip(2)(torch.randn(shape), {"hessian": hessian_of(shape[1])})
    c = points()[unpack_codes(q.tensors["codes"], 2)[..., 0].long()].flatten(1)
    turned = (matrix(shape[0]).T @ c @ matrix(c.shape[1]))[:, : shape[1]]
    wanted = q.tensors["sign_out"].double()[:, None] * turned * q.tensors["sign_in"].double()
    torch.testing.assert_close(q.dequantize(torch.float64), wanted)


@pytest.mark.parametrize("bits", [2, 4])
def test_an_uncorrelated_hessian_leaves_the_nearest_points(bits: int) -> None:
    w = torch.randn(40, 64, dtype=torch.float64)
    q = Quip(bits)(w, {"hessian": 3 * torch.eye(64)})
    out, into = q.tensors["sign_out"].double(), q.tensors["sign_in"].double()
    turned = matrix(40) @ (w / out[:, None] * into) @ matrix(64).T
    codes = encode(turned.view(-1, 8), bits).view(40, 8, -1)
    assert torch.equal(unpack_codes(q.tensors["codes"], bits), codes)
    assert float((q.dequantize() - w).square().mean()) < {2: 0.12, 4: 0.011}[bits]


def test_seeds_and_shapes() -> None:
    w, h = torch.randn(8, 16), hessian_of(16)
    assert not torch.equal(Quip(seed=1)(w, {"hessian": h}).dequantize(), Quip(seed=2)(w, {"hessian": h}).dequantize())
    with pytest.raises(ShapeError, match="does not fit"):
        Quip()(w, {"hessian": h[:8, :8]})
    with pytest.raises(RecipeError, match="damp_percent out of range"):
        Quip(damp_percent=0.0)
