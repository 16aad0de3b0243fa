"""NormalFloat4 against the published levels and a version written out one block at a time."""

import numpy as np
import pytest
import torch

from oracles import bfloat16, split
from slimtune.errors import FormatError, RecipeError
from slimtune.kernels.reference import dequantize_codebook
from slimtune.linalg.levels import LEVELS
from slimtune.linalg.packing import pack, unpack
from slimtune.quant.layouts import Codebook, layout_from_dict
from slimtune.quant.nf4 import Nf4, nest
from slimtune.quant.select import select

NF4 = torch.tensor(LEVELS["nf4"])


def textbook_scales(magnitudes: list[float], double_quant: bool) -> list[float]:
    """The scales of a row as stored: in bfloat16, or in 8 bits between the least and the greatest of a run of 256."""
    if not double_quant:
        return [bfloat16(m) for m in magnitudes]
    stored: list[float] = []
    for start in range(0, len(magnitudes), 256):
        run = magnitudes[start : start + 256]
        offset = bfloat16(min(run))
        step = bfloat16(max(0.0, (max(run) - offset) / 255))
        stored += [offset + (min(max(round((m - offset) / step), 0), 255) * step if step else 0.0) for m in run]
    return stored


def textbook(row: np.ndarray, size: int, double_quant: bool) -> np.ndarray:
    """One row: blocks by their greatest magnitude, every weight to the nearest level."""
    groups = split(len(row), size)
    scales = textbook_scales([float(np.abs(row[g]).max()) for g in groups], double_quant)
    value = np.zeros(len(row))
    for g, scale in zip(groups, scales, strict=True):
        for j in g:
            value[j] = min((level * scale for level in NF4.tolist()), key=lambda v, w=row[j]: abs(v - w))
    return value


def test_levels_are_those_of_their_construction() -> None:
    """As bitsandbytes makes them: quantiles in float64 of float32 probabilities, divided in float32."""
    above, below = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, n)[:-1].double()).float() for n in (9, 8))
    levels = torch.cat([-below, torch.zeros(1), above]).sort().values
    torch.testing.assert_close(levels / levels.max(), NF4, rtol=0, atol=1e-7)
    # The paper's table (appendix E), in thousandths.
    published = "-1000 -696 -525 -395 -284 -185 -91 0 80 161 246 338 441 563 723 1000"
    assert [round(1000 * level) for level in NF4.tolist()] == [int(level) for level in published.split()]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("columns", "size"), [(96, 32), (75, 32), (40, 64), (50, -1), (1203, 4)])
def test_equals_the_textbook(columns: int, size: int, double_quant: bool) -> None:
    w = torch.randn(4, columns, dtype=torch.float64) * torch.rand(4, columns, dtype=torch.float64)
    got = Nf4(size, double_quant)(w, {}).dequantize(torch.float64).numpy()
    for r, row in enumerate(w.numpy()):
        np.testing.assert_allclose(got[r], textbook(row, size, double_quant), rtol=1e-12, atol=0)


def test_a_weight_takes_four_bits_and_its_share_of_two_kinds_of_scales() -> None:
    assert Nf4()(torch.randn(8, 256), {}).bits_per_weight == 4 + 8 / 64 + 2 * 16 / 256
    assert Nf4(block_size=128)(torch.randn(8, 4096), {}).bits_per_weight == 4 + 8 / 128 + 2 * 16 / 4096
    assert Nf4()(torch.randn(1, 2 * 64 * 256), {}).bits_per_weight == 4 + 8 / 64 + 32 / (64 * 256)
    assert Nf4(double_quant=False)(torch.randn(8, 256), {}).bits_per_weight == 4 + 16 / 64


def test_scales_in_8_bits_lose_little() -> None:
    w = torch.randn(64, 640)
    nested, plain = ((Nf4(double_quant=d)(w, {}).dequantize() - w).square().sum() for d in (True, False))
    assert abs(float(nested / plain) - 1) < 2e-3


def test_nested_scales_are_half_a_step_off_at_most() -> None:
    scale = torch.rand(3, 600) + torch.tensor([[0.0], [1.0], [1e-6]])
    scale[1, 300:] *= 100  # in a run of its own from 512 on
    layout, tensors = Codebook(3, 600, "nf4", 1, nested=True), nest(scale)
    off = (layout.scales(tensors, torch.float32) - scale).abs()
    spread = torch.stack([part.amax(1) - part.amin(1) for part in scale.split(256, 1)], 1)
    # Half a step, and the roundings of offset and range to bfloat16.
    bound = spread / 510 + (2**-8) * scale.split(256, 1)[0].amin(1, keepdim=True) + spread * 2**-8
    assert bool((off <= bound.repeat_interleave(256, 1)[:, :600] + 2**-8 * scale.amin(1, keepdim=True)).all())


def test_every_level_is_used_and_reached() -> None:
    q = Nf4()(torch.randn(64, 192), {})
    assert len(unpack(q.tensors["codes"], 4, 192).unique()) == 16
    levels = NF4.repeat(3, 4) * torch.tensor([[0.5], [2.0], [2.0**-15]])
    assert torch.equal(Nf4(block_size=16)(levels, {}).dequantize(), levels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [128, 100])
def test_decoding_rounds_once(dtype: torch.dtype, columns: int) -> None:
    q = Nf4()(torch.randn(8, columns), {})
    assert torch.equal(q.dequantize(dtype), q.dequantize(torch.float32).to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "size"), [(64, 16), (60, 20), (37, 16)])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_code_of_any_width_is_looked_up(bits: int, columns: int, size: int, wide: torch.dtype) -> None:
    codes = torch.randint(0, 2**bits, (5, columns))
    levels, scale = torch.randn(2**bits, dtype=wide), torch.rand(5, -(-columns // size), dtype=wide)
    packed = pack(codes.to(torch.uint8), bits)
    got = dequantize_codebook(packed, scale, levels=levels.tolist(), group_size=size, in_features=columns, dtype=wide)
    assert torch.equal(got, levels[codes] * scale[:, torch.arange(columns) // size]) and got.is_contiguous()


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


@pytest.mark.parametrize("double_quant", [True, False])
def test_groups_of_nested_scales_are_not_cut_out_of_their_run(double_quant: bool) -> None:
    w = torch.randn(4, 2 * 300, generator=torch.Generator().manual_seed(0))
    w[:, :512] *= 10  # the first run of scales
    q = Nf4(block_size=2, double_quant=double_quant)(w, {})
    columns = torch.arange(40, 600)
    smaller, reason = select(q, None, columns)
    off = (smaller.dequantize() - q.dequantize()[:, columns]).abs().max()
    assert bool(reason) == double_quant and off < (5 if double_quant else 1e-6)
    some, reason = select(q, None, torch.arange(600))
    assert not reason and torch.equal(some.dequantize(), q.dequantize())
