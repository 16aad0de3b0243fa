"""NormalFloat4 against the published levels and a version written out one block at a time."""

import numpy as np
import pytest
import torch

from oracles import bfloat16, split
from slimtune.errors import FormatError, RecipeError
from slimtune.linalg.levels import LEVELS, normal_float
from slimtune.linalg.packing import unpack
from slimtune.quant.layouts import Codebook, layout_from_dict
from slimtune.quant.nf4 import Nf4

# The appendix of arXiv 2305.14314, seven decimals.
PUBLISHED = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


def textbook(row: np.ndarray, size: int) -> np.ndarray:
    """One row: blocks by their greatest magnitude, magnitudes in 8 bits, every weight to the nearest level."""
    groups = split(len(row), size)
    magnitudes = [float(np.abs(row[g]).max()) for g in groups]
    offset = bfloat16(min(magnitudes))
    step = bfloat16(max(0.0, (max(magnitudes) - offset) / 255))
    value = np.zeros(len(row))
    for g, magnitude in zip(groups, magnitudes, strict=True):
        scale = offset + (min(max(round((magnitude - offset) / step), 0), 255) * step if step else 0)
        for j in g:
            value[j] = min((level * scale for level in PUBLISHED), key=lambda v, w=row[j]: abs(v - w))
    return value


def test_levels_are_the_published_ones() -> None:
    np.testing.assert_allclose(LEVELS["nf4"], PUBLISHED, rtol=0, atol=2e-7)
    assert LEVELS["nf4"] == normal_float(4) == tuple(sorted(LEVELS["nf4"])) and LEVELS["nf4"][7] == 0


@pytest.mark.parametrize(("columns", "size"), [(96, 32), (75, 32), (40, 64), (50, -1)])
def test_equals_the_textbook(columns: int, size: int) -> None:
    w = torch.randn(6, columns, dtype=torch.float64) * torch.rand(6, columns, dtype=torch.float64)
    got = Nf4(block_size=size)(w, {}).dequantize(torch.float64).numpy()
    for r, row in enumerate(w.numpy()):
        np.testing.assert_allclose(got[r], textbook(row, size), rtol=1e-5, atol=1e-6)


def test_a_weight_takes_four_bits_and_its_share_of_two_kinds_of_scales() -> None:
    assert Nf4()(torch.randn(8, 256), {}).bits_per_weight == 4 + 8 / 64 + 2 * 16 / 256
    assert Nf4(block_size=128)(torch.randn(8, 4096), {}).bits_per_weight == 4 + 8 / 128 + 2 * 16 / 4096


def test_every_level_is_used_and_reached() -> None:
    q = Nf4()(torch.randn(64, 192), {})
    assert len(unpack(q.tensors["codes"], 4, 192).unique()) == 16
    levels = torch.tensor(PUBLISHED).repeat(3, 4) * torch.tensor([[0.5], [2.0], [3e-5]])
    torch.testing.assert_close(Nf4(block_size=16)(levels, {}).dequantize(), levels, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [128, 100])
def test_decoding_rounds_once(dtype: torch.dtype, columns: int) -> None:
    q = Nf4()(torch.randn(8, columns), {})
    assert torch.equal(q.dequantize(dtype), q.dequantize(torch.float32).to(dtype))


def test_a_block_of_zeros_beside_others_stays_zero() -> None:
    w = torch.randn(4, 128)
    w[:, 64:] = 0
    dense = Nf4()(w, {}).dequantize()
    assert not bool(dense[:, 64:].any()) and bool(dense[:, :64].any())


@pytest.mark.parametrize("size", [0, -2])
def test_block_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(RecipeError, match="block_size out of range") as caught:
        Nf4(block_size=size)
    assert str(size) in str(caught.value)


def test_unknown_levels_are_refused() -> None:
    assert layout_from_dict({"layout": "codebook", "levels": "nf4", "group_size": 64}, 2, 64).tag == "codebook"
    with pytest.raises(FormatError, match="unknown levels") as caught:
        Codebook(2, 64, "nf5", 64)
    assert "nf5" in str(caught.value) and "nf4" in str(caught.value)
