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
from slimtune.kernels.dispatch import dequantize_affine, dequantize_codebook
from slimtune.linalg.levels import LEVELS
from slimtune.linalg.packing import row_bytes
from slimtune.quant.rotated import Lattice, Trellis
from slimtune.quant.scattered import SCALES, Scattered, check_scales, one_rounding
from slimtune.tables import Table

NEST = 256
"""Scales of a row that share an offset and a step, where scales are quantized too."""


class Layout(Protocol):
    """What a layout offers.

    `rowwise` says that all tensors have dim 0 = out_features and a slice of their rows is a valid smaller weight. A
    layout in a rotated basis, whose every stored row is a part of every row of the weight, is not.
    """

    tag: ClassVar[str]
    rowwise: ClassVar[bool]

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
    GPTQ and compressed-tensors files need them; or, where `float_zero`, any number of `zero_dtype`. Raises
    `FormatError` on a symmetric grid with `float_zero`, and on an unknown dtype.

    Example:
        >>> layout = Affine(out_features=8, in_features=100, bits=3, group_size=64)
        >>> layout.groups, layout.tensors()["codes"]
        (2, ((8, 40), torch.uint8))
    """

    tag: ClassVar[str] = "affine"
    rowwise: ClassVar[bool] = True

    out_features: int
    in_features: int
    bits: int
    group_size: int
    symmetric: bool = False
    float_zero: bool = False
    scale_dtype: str = "bfloat16"
    zero_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_scales(self.scale_dtype)
        check_scales(self.zero_dtype, "zero_dtype")
        if self.symmetric and self.float_zero:
            raise FormatError("a symmetric grid has no zero points", where="float_zero", got=True, wanted=False)

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
            kind = SCALES[self.zero_dtype] if self.float_zero else torch.uint8
            stored["zero"] = ((self.out_features, self.groups), kind)
        return stored

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`, rounded once."""
        # A code less its zero point is exact in half precision where both are whole.
        least = torch.float32 if self.float_zero else dtype
        return dequantize_affine(
            tensors["codes"],
            tensors["scale"],
            None if self.symmetric else tensors["zero"],
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            work=torch.promote_types(one_rounding(dtype, self.scale_dtype), least),
            dtype=dtype,
        )


@dataclass(frozen=True)
class Codebook:
    """Codes of levels that need not be evenly spaced: `W = levels[code] * scale`, one scale per group of features.

    Scales are bfloat16 (or others' `scale_dtype`), or where they are `nested`, quantized too: `scale[o, g] = offset[o,
    h] + code[o, g] * step[o, h]` with 8-bit codes, and a bfloat16 offset and step for each run `h` of up to 256 scales
    of a row. `levels` is a name in `slimtune.linalg.levels.LEVELS`; raises `FormatError` on another, or another dtype.

    Example:
        >>> layout = Codebook(out_features=8, in_features=100, levels="nf4", group_size=64, nested=True)
        >>> layout.bits, layout.groups, layout.tensors()["scale"]
        (4, 2, ((8, 2), torch.uint8))
    """

    tag: ClassVar[str] = "codebook"
    rowwise: ClassVar[bool] = True

    out_features: int
    in_features: int
    levels: str
    group_size: int
    nested: bool = False
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_scales(self.scale_dtype)
        if self.levels not in LEVELS:
            raise FormatError("unknown levels", where="levels", got=self.levels, wanted=sorted(LEVELS))

    @property
    def is_float8(self) -> bool:
        """Whether a code is a float8 number, and a scale a number too."""
        return self.levels == "e4m3fn" and not self.nested

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(LEVELS[self.levels]) - 1).bit_length()

    @property
    def groups(self) -> int:
        """Groups in a row; the last one is shorter where `group_size` does not divide `in_features`."""
        return -(-self.in_features // self.group_size)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every stored tensor."""
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((self.out_features, row_bytes(self.in_features, self.bits)), torch.uint8),
            "scale": ((self.out_features, self.groups), torch.uint8 if self.nested else SCALES[self.scale_dtype]),
        }
        if self.nested:
            runs = self.out_features, -(-self.groups // NEST)
            stored["step"] = stored["offset"] = runs, torch.bfloat16
        return stored

    def scales(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The scales as decoded, `dtype [out_features, groups]`."""
        scale = tensors["scale"].to(dtype)
        if not self.nested:
            return scale
        step, offset = (
            tensors[name].to(dtype).repeat_interleave(NEST, 1)[:, : self.groups] for name in ("step", "offset")
        )
        return scale * step + offset

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight, `dtype [out_features, in_features]`, rounded once."""
        # bfloat16 holds all numbers of float8, and rounds a product with one once.
        half = self.is_float8 and dtype == SCALES[self.scale_dtype] == torch.bfloat16
        return dequantize_codebook(
            tensors["codes"],
            self.scales(tensors, dtype if half else torch.promote_types(dtype, torch.float32)),
            levels=LEVELS[self.levels],
            group_size=self.group_size,
            in_features=self.in_features,
            dtype=dtype,
        )


LAYOUTS: Table[type[Layout]] = Table(
    "slimtune.layouts",
    {"affine": Affine, "codebook": Codebook, "e8p": Lattice, "trellis": Trellis, "scattered": Scattered},
)
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
