"""Linears that multiply whole numbers, where weight and input are both in at most 8 bits.

Only in inference (no gradients), on CPUs with units for it and by Triton's kernels, for affine weights with one scale a
row and inputs with one scale a token. On CPUs it is faster than decoding the weight and multiplying floats at any count
of tokens; elsewhere, and for weights or inputs in groups, the reference computes. The integers are those that the
reference rounds to; sums of them are exact, so the result is within float rounding of it.
`slimtune.kernels.dispatch.reference` turns it off.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from slimtune.kernels import dispatch, int8
from slimtune.kernels.dispatch import integers_wanted, triton_runs
from slimtune.linalg.packing import unpack
from slimtune.quant.activation import Activations
from slimtune.quant.layouts import Affine, Layout


def in_integers(x: Tensor, activations: Activations, layout: Layout) -> bool:
    """Whether a layer with this layout multiplies `x` in integers."""
    return (
        integers_wanted(x)
        and isinstance(layout, Affine)
        and layout.groups == 1
        and not layout.float_zero
        and (layout.symmetric or layout.bits < 8)  # or codes less their zero points would not fit into 8 bits
        and activations.bits <= 8
        and activations.type == "int"
        and (activations.group_size == -1 or activations.group_size >= layout.in_features)
    )


def integer_product(x: Tensor, activations: Activations, layout: Affine, tensors: Mapping[str, Tensor]) -> Tensor:
    """`x Wᵀ` in the dtype of `x` (`[..., in_features]`), where `in_integers`."""
    rounding = partial(_tokens, x, activations)
    tokens = int8.same_tokens(x, activations, rounding)
    shape = *x.shape[:-1], layout.out_features
    if triton_runs(x.device):
        codes, scale, zero = tensors["codes"], tensors["scale"], tensors.get("zero")
        y = dispatch.integer_product(tokens, codes=codes, scale=scale, zero=zero, bits=layout.bits, dtype=x.dtype)
        return y.view(shape)
    weight = int8.kept_weight(list(tensors.values()), partial(_weight, layout, tensors))
    return int8.multiply(tokens, weight, x.dtype).view(shape)


def _tokens(x: Tensor, activations: Activations) -> int8.Tokens:
    flat = x.reshape(-1, x.shape[-1])
    return dispatch.round_tokens(flat, activations.bits, activations.grid, symmetric=activations.sym)


def _weight(layout: Affine, tensors: Mapping[str, Tensor]) -> int8.Weight:
    codes = unpack(tensors["codes"], layout.bits, layout.in_features).to(torch.int16)
    codes -= 2 ** (layout.bits - 1) if layout.symmetric else tensors["zero"].to(torch.int16)
    return int8.weight(codes.to(torch.int8), tensors["scale"].squeeze(1))
