"""Affine weights as others store them: scales that are not bfloat16, and groups whose features lie scattered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slimtune.errors import FormatError
from slimtune.linalg.packing import row_bytes, unpack

SCALES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What the scales of a group can be stored in."""


def check_scales(dtype: str, name: str = "scale_dtype") -> None:
    """Raise `FormatError` unless `dtype`, a field called `name`, is one of `SCALES`."""
    if dtype not in SCALES:
        raise FormatError("unknown dtype of scales", where=name, got=dtype, wanted=sorted(SCALES))


def one_rounding(dtype: torch.dtype, scale_dtype: str) -> torch.dtype:
    """The dtype to decode in, so that a weight is rounded to `dtype` once: neither 16-bit dtype holds the other.

    >>> one_rounding(torch.bfloat16, "float16"), one_rounding(torch.float16, "float16")
    (torch.float32, torch.float16)
    """
    scale = SCALES[scale_dtype]
    return dtype if scale == torch.bfloat16 else torch.promote_types(dtype, scale)


@dataclass(frozen=True)
class Scattered:
    """The affine grid where the input features of a group do not lie side by side: GPTQ's act-order.

    `group[i]` says which group feature `i` is in. It belongs to columns: a slice of rows takes it whole. No quantizer
    of slimtune makes this layout, and no exporter takes it; files of others have it.

    Example:
        >>> layout = Scattered(out_features=8, in_features=100, bits=3, groups=2, scale_dtype="float16")
        >>> layout.tensors()["group"], layout.tensors()["scale"]
        (((100,), torch.int32), ((8, 2), torch.float16))
    """

    tag: ClassVar[str] = "scattered"
    rowwise: ClassVar[bool] = False

    out_features: int
    in_features: int
    bits: int
    groups: int
    symmetric: bool = False
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_scales(self.scale_dtype)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every stored tensor."""
        stored = {
            "codes": ((self.out_features, row_bytes(self.in_features, self.bits)), torch.uint8),
            "scale": ((self.out_features, self.groups), SCALES[self.scale_dtype]),
            "group": ((self.in_features,), torch.int32),
        }
        if not self.symmetric:
            stored["zero"] = ((self.out_features, self.groups), torch.uint8)
        return stored

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`."""
        wide, group = one_rounding(dtype, self.scale_dtype), tensors["group"]
        q = unpack(tensors["codes"], self.bits, self.in_features).to(wide)
        zero = 2 ** (self.bits - 1) if self.symmetric else tensors["zero"].to(wide).index_select(1, group)
        return ((q - zero) * tensors["scale"].to(wide).index_select(1, group)).to(dtype)

    def check(self, group: Tensor, where: str) -> None:
        """Raise `FormatError` where a feature is in no group: decoding would read past the scales."""
        if not 0 <= int(group.min()) <= int(group.max()) < self.groups:
            raise FormatError(
                "input features are in no group",
                where=where,
                got=f"groups {int(group.min())} to {int(group.max())}",
                wanted=f"groups 0 to {self.groups - 1}",
            )
