"""Linears that multiply float8: weight and input are both rounded to it, with one scale a row and one a token.

Only in inference, in bfloat16, on GPUs with units for it; elsewhere the reference decodes and multiplies. On a CPU
PyTorch's product of float8 is far slower than that (one core, 512 tokens, 1536 x 576: 21 ms; decoding, 2), but it is
the same call: tests make it there. No GPU has run it yet.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimtune.kernels.dispatch import float8_wanted
from slimtune.linalg.levels import float8
from slimtune.quant.activation import Activations
from slimtune.quant.layouts import Codebook, Layout


def in_float8(x: Tensor, activations: Activations, layout: Layout) -> bool:
    """Whether a layer with this layout multiplies `x` in float8; GPUs want sizes of whole sixteens."""
    whole = layout.in_features % 16 == layout.out_features % 16 == 0
    rows = isinstance(layout, Codebook) and layout.is_float8 and layout.groups == 1
    tokens = activations.type == "float" and (activations.group_size == -1 or activations.group_size >= x.shape[-1])
    return whole and rows and tokens and float8_wanted(x)


def float8_product(x: Tensor, activations: Activations, layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """`x Wᵀ` in the dtype of `x` (`[..., in_features]`), where `in_float8`; sums are in float32."""
    codes, scale, _ = activations.codes(x.reshape(-1, x.shape[-1]))
    rows, weight = float8(codes.squeeze(1)), tensors["codes"].view(torch.float8_e4m3fn).T
    scales = scale.squeeze(1), tensors["scale"].to(torch.float32).T
    y = torch._scaled_mm(rows, weight, *scales, out_dtype=x.dtype)
    return y.view(*x.shape[:-1], layout.out_features)
