"""Fast kernels give the reference's bits, and those of the formula."""

from __future__ import annotations

import pytest
import torch

from slimtune.kernels import cpu, dispatch
from slimtune.kernels.precision import fast_matmul
from slimtune.kernels.reference import apply_grid_
from slimtune.linalg.packing import pack, unpack

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
each_width = pytest.mark.parametrize("columns", [1, 31, 37, 64, 100, 192])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@each_width
@each_dtype
def test_unpacking_equals_the_reference(bits: int, columns: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    packed = pack(codes, bits)
    before = packed.clone()
    got = dispatch.unpack_as(packed, bits, columns, dtype)
    assert torch.equal(got, unpack(packed, bits, columns).to(dtype)) and got.dtype == dtype
    assert torch.equal(got, codes.to(dtype))
    got.fill_(-1)  # it is nobody else's, and no table's
    assert torch.equal(packed, before) and torch.equal(
        dispatch.unpack_as(packed, bits, columns, dtype), codes.to(dtype)
    )


@each_width
@each_dtype
@pytest.mark.parametrize("zeros", ["none", "whole", "float"])
def test_a_grid_is_applied_as_the_formula_says(columns: int, dtype: torch.dtype, zeros: str) -> None:
    codes, groups = torch.randint(0, 8, (5, columns)).to(dtype), -(-columns // 32)
    zero = {"none": None, "whole": torch.randint(0, 8, (5, groups)).byte(), "float": torch.rand(5, groups)}[zeros]
    scale = torch.rand(5, groups).bfloat16()
    kept = scale.clone()
    group = torch.arange(columns) // 32
    middle = 4 if zero is None else zero.to(dtype)[:, group]
    wanted = (codes - middle) * scale.to(dtype)[:, group]
    assert torch.equal(apply_grid_(codes, scale, zero, bits=3, group_size=32), wanted)
    assert torch.equal(scale, kept)


def test_half_precision_on_a_cpu_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = cpu.unpack_half
    monkeypatch.setattr(dispatch, "unpack_half", lambda *args: seen.append(args[1]) or plain(*args))
    for bits in (2, 3, 4, 8):
        packed = pack(torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8), bits)
        for dtype in (torch.float32, torch.bfloat16):
            dispatch.unpack_as(packed, bits, 64, dtype)
    assert seen == [2, 3, 4]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("columns", "group"), [(128, 64), (96, 32), (64, 64), (60, 20), (65, 13), (100, 64)])
@pytest.mark.parametrize("highest", ["none", "grid", "one above", "beyond"])
def test_zero_points_come_off_in_the_look_up(
    bits: int, columns: int, group: int, highest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch.compiled, "library", lambda: None)
    codes, groups = torch.randint(0, 2**bits, (7, columns), dtype=torch.uint8), -(-columns // group)
    top = {"none": 1, "grid": 2**bits, "one above": 2**bits + 1, "beyond": 40}[highest]
    zero = torch.randint(0, top, (7, groups), dtype=torch.uint8)
    zero[0] = top - 1
    scale = torch.rand(7, groups).bfloat16()
    for dtype in (torch.bfloat16, torch.float16):
        for some in (None,) if highest == "none" else (zero,):
            wanted = apply_grid_(codes.to(dtype), scale, some, bits=bits, group_size=group)
            got = dispatch.dequantize_affine(
                pack(codes, bits),
                scale,
                some,
                bits=bits,
                group_size=group,
                in_features=columns,
                work=dtype,
                dtype=dtype,
            )
            assert torch.equal(got, wanted)


def test_precision_is_restored_by_the_last_of_several_blocks() -> None:
    before = torch.get_float32_matmul_precision()
    one, other = fast_matmul(), fast_matmul()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "medium"
    other.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(KeyError), fast_matmul():
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_newer_settings_of_precision_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", pytest.fail)
    with fast_matmul():
        pass
