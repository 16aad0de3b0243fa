"""Half-quadratic quantization against the loop of its authors, one group of one row at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oracles import Levels, bfloat16, minmax_levels, split
from slimtune.errors import FormatError
from slimtune.export.compressed_tensors import schemes_of
from slimtune.quant.hqq import Hqq
from slimtune.quant.layouts import Affine, layout_from_dict
from slimtune.quant.linear import QuantLinear


def better(w: np.ndarray, *grids: Levels) -> Levels:
    """The grid of least squared error, the first of equals."""
    return min(grids, key=lambda levels: float(((levels.value(levels.code(w)) - w) ** 2).sum()))


def published(w: np.ndarray, bits: int) -> np.ndarray:
    """One group: 20 rounds with p = 0.7, beta = 10, kappa = 1.01; only the zero point is fitted."""
    plain = minmax_levels(w, bits, False, np.ones(len(w)))
    zero, beta = -min(w.min(), 0.0) / plain.scale, 10.0
    for _ in range(20):
        q = np.clip(np.rint(w / plain.scale + zero), 0, 2**bits - 1)
        off = w - (q - zero) * plain.scale
        error = [np.sign(x) * max(abs(x) - abs(x) ** (0.7 - 1) / beta, 0.0) if x else 0.0 for x in off]
        zero = float(np.mean(q - (w - np.array(error)) / plain.scale))
        beta *= 1.01
    levels = better(w, plain, plain._replace(zero=bfloat16(zero)))
    return levels.value(levels.code(w))


def fitted(w: np.ndarray, bits: int) -> np.ndarray:
    """One group: from six ranges, five times the line through codes and weights; the best as stored."""
    best = minmax_levels(w, bits, False, np.ones(len(w)))
    middle, half = (w.max() + w.min()) / 2, (w.max() - w.min()) / 2
    for part in (1.0, 0.93, 0.86, 0.79, 0.72, 0.65):
        scale, least = 2 * half * part / (2**bits - 1), middle - half * part
        for _ in range(6):
            stored = Levels(bfloat16(scale), -least / bfloat16(scale), bits)
            stored = stored._replace(zero=bfloat16(float(np.mean(stored.code(w) - w / stored.scale))))
            best = better(w, best, stored)
            codes = Levels(scale, -least / scale, bits).code(w)
            scale, least = np.polyfit(codes, w, 1)
    return best.value(best.code(w))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("spread", [0.05, 2.0, 40.0])
@pytest.mark.parametrize(("scale", "textbook"), [("minmax", published), ("fitted", fitted)])
def test_equals_the_textbook_with_three_groups(scale: Any, textbook: Any, bits: int, spread: float) -> None:
    w = torch.randn(5, 40, dtype=torch.float64) * spread + 0.2 * spread  # large ones are shrunk, not cut
    got = Hqq(bits, 16, scale)(w, {}).dequantize(torch.float64).numpy()
    for r, row in enumerate(w.numpy()):
        for group in split(40, 16):
            np.testing.assert_allclose(got[r, group], textbook(row[group], bits), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.65), (3, 0.9), (4, 0.97)])
def test_fitted_scales_lose_less_of_normal_weights(bits: int, share: float) -> None:
    w = torch.randn(64, 256)
    fitted, minmax = ((Hqq(bits, scale=s)(w, {}).dequantize() - w).square().sum() for s in ("fitted", "minmax"))
    assert float(fitted) < share * float(minmax)


def test_zero_points_are_no_whole_numbers_and_decoding_rounds_once() -> None:
    q = Hqq()(torch.randn(8, 100), {})
    assert q.tensors["zero"].dtype == torch.bfloat16 and bool((q.tensors["zero"] % 1 != 0).any())
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize(torch.float32).to(torch.bfloat16))


def test_folders_without_the_field_have_whole_zero_points() -> None:
    old = {"layout": "affine", "bits": 4, "group_size": 64, "symmetric": False}
    assert layout_from_dict(old, 8, 64).tensors()["zero"] == ((8, 1), torch.uint8)
    with pytest.raises(FormatError, match="no zero points"):
        Affine(8, 64, 4, 64, symmetric=True, float_zero=True)


def test_compressed_tensors_refuses_them_by_name() -> None:
    linear = nn.Linear(64, 8)
    layer = QuantLinear.from_linear(linear, Hqq()(linear.weight.detach(), {}))
    with pytest.raises(FormatError, match="not whole numbers") as caught:
        schemes_of({"layers.0.up": layer})
    assert "layers.0.up" in str(caught.value) and "rtn" in str(caught.value)
