"""Weights as ggml stores them: blocks of 32 numbers of a row that share a scale.

A packed affine weight whose groups are whole blocks, and whose scales float16 holds, is stored without being rounded
again, in the smallest type that holds its numbers: `code - zero` is a whole number, and that is what these types store.

| Type | A number of a block | Bytes |
|---|---|---|
| `Q4_0` | `(q - 8) d`, `q` of 4 bits | 18 |
| `Q4_1` | `q d + m`, `q` of 4 bits | 20 |
| `Q5_0` | `(q - 16) d`, `q` of 5 bits | 22 |
| `Q8_0` | `q d`, `q` of 8 bits | 34 |

`d` and `m` are float16.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimtune.export.packed import exact
from slimtune.linalg.packing import unpack
from slimtune.quant.layouts import Affine
from slimtune.quant.linear import QuantLinear

BLOCK = 32
Array = NDArray[Any]


def encode(weight: Tensor, kind: str) -> Array:
    """The bytes (or floats) of `weight`, float32 `[..., in]`, in the ggml type called `kind`; what it cannot hold
    becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return gguf.quantize(np.ascontiguousarray(weight.numpy()), gguf.GGMLQuantizationType[kind])


def decode(data: Array, kind: str) -> Tensor:
    """The float32 weight that `encode` made."""
    return torch.from_numpy(np.array(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]), dtype=np.float32))


def packed(layer: QuantLinear) -> tuple[str, Array] | None:
    """The type and the bytes that decode to the very weight of `layer`; None where there are none.

    Example:
        >>> from slimtune.quant.rtn import Rtn
        >>> weight = torch.randn(4, 64)
        >>> layer = QuantLinear.from_linear(torch.nn.Linear(64, 4), Rtn(bits=3, group_size=32)(weight, {}))
        >>> kind, data = packed(layer)
        >>> kind, torch.equal(decode(data, kind), layer.dequantize(torch.float32))
        ('Q4_0', True)
    """
    layout, tensors = layer.layout, layer.qtensor.tensors
    if not isinstance(layout, Affine) or layout.float_zero or layout.in_features % BLOCK:
        return None
    if layout.groups > 1 and layout.group_size % BLOCK:
        return None
    if not exact(tensors["scale"], torch.float16):
        return None
    blocks = layout.in_features // BLOCK
    each = -(-layout.group_size // BLOCK)
    scale = tensors["scale"].float().repeat_interleave(each, 1)[:, :blocks]
    half = torch.full_like(tensors["scale"], 2 ** (layout.bits - 1), dtype=torch.uint8)
    zero = tensors.get("zero", half).to(torch.int16).repeat_interleave(each, 1)[:, :blocks]
    codes = unpack(tensors["codes"], layout.bits, layout.in_features).to(torch.int16).unflatten(1, (blocks, BLOCK))
    number = codes - zero[:, :, None]
    low, high = int(number.min()), int(number.max())
    if low >= -8 and high <= 7:
        return "Q4_0", _joined(_half(scale), _nibbles(number + 8))
    least = -zero * scale
    if layout.bits <= 4 and exact(least, torch.float16):
        return "Q4_1", _joined(_half(scale), _half(least), _nibbles(codes))
    if low >= -16 and high <= 15:
        return "Q5_0", _joined(_half(scale), _fifth(number + 16), _nibbles((number + 16) & 15))
    if low >= -128 and high <= 127:
        return "Q8_0", _joined(_half(scale), number.to(torch.int8).numpy().view(np.uint8))
    return None


def slack(weight: Tensor, kind: str) -> Tensor:
    """How far rounding to `kind` may move each number of `weight` (float32 `[..., in]`): half a step, or a whole one
    where the largest number of a block may be cut."""
    if kind == "F32":
        return torch.zeros_like(weight)
    if kind in ("F16", "BF16"):
        info = torch.finfo(torch.float16 if kind == "F16" else torch.bfloat16)
        return weight.abs() * info.eps + info.smallest_normal * info.eps
    blocks = weight.unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    spread = blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)
    # The rounding of d and m to float16 comes on top.
    step = {"Q8_0": largest / 127, "Q5_0": 2 * largest / 16, "Q4_0": 2 * largest / 8, "Q4_1": spread / 15}[kind]
    return (0.502 * step + 2**-10 * largest).expand_as(blocks).flatten(-2)


def _half(numbers: Tensor) -> Array:
    """`[rows, blocks]` as bytes of float16, `[rows, blocks, 2]`."""
    return numbers.to(torch.float16).numpy()[..., None].view(np.uint8)


def _nibbles(numbers: Tensor) -> Array:
    """Numbers of 4 bits, `[rows, blocks, 32]`: byte `i` holds number `i`, and number `i + 16` above it."""
    low, high = numbers.to(torch.uint8).split(BLOCK // 2, -1)
    return (low | (high << 4)).numpy()


def _fifth(numbers: Tensor) -> Array:
    """The fifth bits of numbers, `[rows, blocks, 32]`, as 4 bytes."""
    return np.packbits((numbers >> 4).to(torch.uint8).numpy(), axis=-1, bitorder="little")


def _joined(*parts: Array) -> Array:
    rows = np.concatenate(parts, -1)
    return np.ascontiguousarray(rows.reshape(len(rows), -1))
