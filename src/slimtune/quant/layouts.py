"""Layouts: how packed tensors become a weight again.

A quantizer chooses codes; a layout says how they are stored and decoded. Many quantizers share one layout, and nothing
but the layout is needed to run, train, save or export a quantized layer, so a new quantizer in an old layout needs no
kernel. A layout is a frozen dataclass of plain numbers: it is saved in the model's `config.json` and is all that is
needed to allocate the tensors before loading them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from slimtune.errors import FormatError, RecipeError
from slimtune.kernels.reference import dequantize_affine
from slimtune.linalg.packing import row_bytes, unpack
from slimtune.tables import Table

SCALES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What the scales of a group can be stored in."""


class Layout(Protocol):
    """What a layout offers. All tensors have dim 0 = out_features, so that a row slice is a valid smaller weight."""

    tag: ClassVar[str]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""

    @property
    def in_features(self) -> int:
        """Columns of the weight."""

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every stored tensor."""

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`."""


@dataclass(frozen=True)
class Affine:
    """Integer codes on a uniform grid per group of input features: `W = (code - zero) * scale`.

    Scales are bfloat16, so that loading a model in bfloat16, float16 or float32, or sharding it under a mixed-precision
    policy, never changes a weight; quantizers fit the codes to the rounded scale. A layer that others quantized keeps
    the `scale_dtype` it came with. Zero points are integers (`symmetric` grids store none and mean `2**(bits - 1)`), as
    GPTQ and compressed-tensors files need them. Raises `FormatError` on an unknown `scale_dtype`.

    Example:
        >>> layout = Affine(out_features=8, in_features=100, bits=3, group_size=64)
        >>> layout.groups, layout.tensors()["codes"]
        (2, ((8, 40), torch.uint8))
    """

    tag: ClassVar[str] = "affine"

    out_features: int
    in_features: int
    bits: int
    group_size: int
    symmetric: bool = False
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _check_scales(self.scale_dtype)

    @property
    def groups(self) -> int:
        """Groups in a row; the last one is shorter where `group_size` does not divide `in_features`."""
        return -(-self.in_features // self.group_size)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every stored tensor."""
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((self.out_features, row_bytes(self.in_features, self.bits)), torch.uint8),
            "scale": ((self.out_features, self.groups), SCALES[self.scale_dtype]),
        }
        if not self.symmetric:
            stored["zero"] = ((self.out_features, self.groups), torch.uint8)
        return stored

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`."""
        return dequantize_affine(
            tensors["codes"],
            tensors["scale"],
            None if self.symmetric else tensors["zero"],
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            dtype=_exact(dtype, self.scale_dtype),
        ).to(dtype)


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

    out_features: int
    in_features: int
    bits: int
    groups: int
    symmetric: bool = False
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _check_scales(self.scale_dtype)

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
        wide, group = _exact(dtype, self.scale_dtype), tensors["group"]
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


def _check_scales(dtype: str) -> None:
    if dtype not in SCALES:
        raise FormatError("unknown dtype of scales", where="scale_dtype", got=dtype, wanted=sorted(SCALES))


def _exact(dtype: torch.dtype, scale_dtype: str) -> torch.dtype:
    """The dtype to decode in, so that a weight is rounded to `dtype` once: neither 16-bit dtype holds the other."""
    scale = SCALES[scale_dtype]
    return dtype if scale == torch.bfloat16 else torch.promote_types(dtype, scale)


LAYOUTS: Table[type[Layout]] = Table("slimtune.layouts", {"affine": Affine, "scattered": Scattered})
"""Every layout by its tag. A third party's quantizer with a layout of its own registers it beside itself."""


def layout_to_dict(layout: Layout) -> dict[str, Any]:
    """Plain numbers for `config.json`: the tag and every field but the shape, which the model's own config knows."""
    fields = asdict(layout)  # type: ignore[call-overload]
    return {"layout": layout.tag, **{k: v for k, v in fields.items() if k not in ("out_features", "in_features")}}


def layout_from_dict(facts: Mapping[str, Any], out_features: int, in_features: int) -> Layout:
    """The layout that `layout_to_dict` described, for a weight of this shape. Raises `FormatError` on anything else."""
    fields = dict(facts)
    try:
        make: Callable[..., Layout] = LAYOUTS[fields.pop("layout", "")]
        return make(out_features=out_features, in_features=in_features, **fields)
    except (TypeError, RecipeError) as error:
        raise FormatError("a quantized layer has an unknown layout", got=dict(facts), wanted=sorted(LAYOUTS)) from error
