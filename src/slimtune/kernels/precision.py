"""How exactly float32 matrix products must be computed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()
_inside: list[str] = []
"""The precision before the first of the blocks that are open, in any thread, then one entry for each of them."""


def _relaxed() -> str:
    """The precision that was; "" where PyTorch's newer settings are in use, which the older do not mix with: then it is
    the user's."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""
    torch.set_float32_matmul_precision("medium")
    return before


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Within the block, float32 products may round their *inputs* to bfloat16 (or TF32) and still add in float32.

    Calibration does not need more: a Gram matrix of rounded inputs is still a Gram matrix. Measured on one core with
    AMX: 310 to 540 GFLOP/s instead of 60 to 180. Where the hardware has no such unit, nothing changes.
    """
    with _LOCK:
        if not _inside:
            _inside.append(_relaxed())
        _inside.append("")
    try:
        yield
    finally:
        with _LOCK:
            _inside.pop()
            if len(_inside) == 1 and (before := _inside.pop()):
                torch.set_float32_matmul_precision(before)


@contextmanager
def fast_forward(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within the block, a forward pass of a float32 model may use bfloat16 products and attention, where the hardware
    has units for them; a model of another `dtype` computes as it is.

    Norms and the residual stream stay in the model's own dtype. For calibration: measured on SmolLM2-135M with AMX,
    quantizing three blocks took 8.1 CPU seconds instead of 9.9, and perplexity afterwards did not rise (`docs/LOG.md`).
    Where the hardware has no such unit, nothing changes.
    """
    with (
        fast_matmul(),
        torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32 and bfloat16_units(device)),
    ):
        yield


def bfloat16_units(device: torch.device) -> bool:
    """Whether bfloat16 products are native, hence faster than float32, on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Without a native unit (and on other devices) bfloat16 is emulated and slower than float32.
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
