"""Linears that multiply float8: weight and input are both rounded to it, with one scale a row and one a token.

Only in inference (no gradients), in bfloat16, on GPUs with units for it; elsewhere the reference decodes and multiplies.
On a CPU PyTorch's product of float8 is far slower than that (one core, 512 tokens, 1536 x 576: 21 ms, decoded 2), but it
is the same call: tests make it there, and no GPU has run it yet.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimtune.kernels.dispatch import float8_wanted
from slimtune.linalg.levels import float8
from slimtune.quant.activation import Activations
from slimtune.quant.layouts import Codebook, Layout

MULTIPLE = 16
"""What both sizes of a weight must be a multiple of on a GPU."""


def in_float8(x: Tensor, activations: Activations, layout: Layout) -> bool:
    """Whether a layer with this layout multiplies `x` in float8."""
    return (
        activations.type == "float"
        and float8_wanted(x)
        and isinstance(layout, Codebook)
        and layout.is_float8
        and layout.groups == 1
        and (activations.group_size == -1 or activations.group_size >= layout.in_features)
        and layout.in_features % MULTIPLE == layout.out_features % MULTIPLE == 0
    )


def float8_product(x: Tensor, activations: Activations, layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """`x Wᵀ` in the dtype of `x`, bfloat16 `[..., in_features]`, where `in_float8`; sums are in float32."""
    codes, scale, _ = activations.codes(x.reshape(-1, x.shape[-1]))
    y: Tensor = torch._scaled_mm(
        float8(codes.squeeze(1)),
        tensors["codes"].view(torch.float8_e4m3fn).T,
        scale_a=scale.squeeze(1),
        scale_b=tensors["scale"].to(torch.float32).T,
        out_dtype=x.dtype,
    )
    return y.view(*x.shape[:-1], layout.out_features)
