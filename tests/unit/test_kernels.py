"""Fast kernels give the reference's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slimtune.kernels import cpu, dispatch, reference
from slimtune.linalg.packing import pack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 31, 37, 64, 100, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zeros", ["none", "whole", "float"])
def test_dequantizing_equals_the_reference(bits: int, columns: int, dtype: torch.dtype, zeros: str) -> None:
    codes, groups = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8), -(-columns // 32)
    zero = {"none": None, "whole": torch.randint(0, 2**bits, (5, groups)).byte(), "float": torch.rand(5, groups)}[zeros]
    scale = torch.rand(5, groups).bfloat16()
    facts: dict[str, Any] = {"bits": bits, "group_size": 32, "in_features": columns, "dtype": dtype}
    packed = pack(codes, bits)
    before = packed.clone(), scale.clone()
    got = dispatch.dequantize_affine(packed, scale, zero, **facts)
    assert torch.equal(got, reference.dequantize_affine(packed, scale, zero, **facts))
    group = torch.arange(columns) // 32
    wide = torch.float32 if zeros == "float" else dtype
    middle = 2 ** (bits - 1) if zero is None else zero.to(wide)[:, group]
    assert torch.equal(got, ((codes.to(wide) - middle) * scale.to(wide)[:, group]).to(dtype))
    assert torch.equal(packed, before[0]) and torch.equal(scale, before[1])


def test_half_precision_on_a_cpu_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = cpu.unpack_half
    monkeypatch.setattr(dispatch, "unpack_half", lambda *args: seen.append(args[1]) or plain(*args))
    for bits in (2, 3, 4, 8):
        packed = pack(torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8), bits)
        for dtype in (torch.float32, torch.bfloat16):
            dispatch.dequantize_affine(
                packed, torch.ones(5, 2), None, bits=bits, group_size=32, in_features=64, dtype=dtype
            )
    assert seen == [2, 3, 4]
