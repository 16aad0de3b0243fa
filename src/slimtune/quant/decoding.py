"""Packed layers made ready for a few tokens at a time, as when a model writes.

Decoding a whole weight for one token costs far more than the token's product. Affine weights of up to 4 bits are laid
out for PyTorch's int4 product, which takes them as they are; any other weight is decoded once and kept in bfloat16,
where memory allows. Both are copies beside the stored tensors, made at the start and dropped at the end. Where there is
no memory for them, loops in C multiply what is stored. Measured on one core, 8192 x 2048, nanoseconds a weight: int4
0.03, bfloat16 0.10, loops 0.09 to 0.12 (affine, nf4), 0.23 to 0.43 (lattice), 0.27 (trellis).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import psutil
import torch
from torch import Tensor, nn

from slimtune.kernels.cpu import int4_weight
from slimtune.kernels.dispatch import affine_product, triton_runs
from slimtune.linalg.packing import unpack
from slimtune.quant.base import QTensor
from slimtune.quant.layouts import Affine
from slimtune.quant.linear import QuantLinear
from slimtune.quant.products import Product, multiplier

SPARE = 0.5
"""Of the memory that is available, how much kept weights may take."""


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """Within the block, packed linears of `model` run a few rows at a time from prepared copies, in bfloat16.

    That is on a CPU. On a GPU nothing is copied: affine weights are multiplied packed, by Triton where it is wanted.

    Without gradients only, and for up to `slimtune.quant.linear.FEW` rows; all else runs as ever. Layers for which
    there is no memory run by the loops of `slimtune.quant.products.multiplier`, and those without loops stay as they
    are.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    budget = SPARE * psutil.virtual_memory().available
    try:
        with torch.no_grad():
            for layer in layers:
                layer.small = _packed(layer.qtensor)
                size = 2 * layer.in_features * layer.out_features
                if layer.small is None and layer.weight.device.type == "cpu" and size < budget:
                    layer.small, budget = Kept(layer.dequantize(torch.bfloat16)), budget - size
                layer.small = layer.small or multiplier(layer.qtensor)
        yield
    finally:
        for layer in layers:
            layer.small = None


@contextmanager
def kept_weights(scopes: Iterable[Sequence[QuantLinear]], budget: int) -> Iterator[None]:
    """Within the block, layers with an adapter keep the weight that forward decoded until their gradient is taken.

    Args:
        scopes: layers whose weights are held at the same time; the first ones of each for which there is room do.
        budget: bytes, of weights in 16 bits.
    """
    chosen: list[QuantLinear] = []
    for scope in scopes:
        left = budget
        for layer in scope:
            left -= 2 * layer.in_features * layer.out_features
            if left >= 0:
                chosen.append(layer)
    try:
        for layer in chosen:
            layer.keep = True
        yield
    finally:
        for layer in chosen:
            layer.keep = False


class Kept:
    """A weight that was decoded once: `bfloat16 [out, in]`."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """`x Wᵀ` in the dtype of `x`, computed in bfloat16: `[..., in]` to `[..., out]`."""
        return (x.to(torch.bfloat16) @ self.weight.T).to(x.dtype)


def _packed(weight: QTensor) -> Product | None:
    """A product with the packed weight, where its device has one for it."""
    layout, codes = weight.layout, weight.tensors["codes"]
    if not isinstance(layout, Affine):
        return None
    scale, zero = weight.tensors["scale"], weight.tensors.get("zero")
    group = layout.in_features if layout.groups == 1 else layout.group_size
    if triton_runs(codes.device):
        return partial(affine_product, codes=codes, scale=scale, zero=zero, bits=layout.bits, group_size=group)
    if layout.bits > 4:
        return None
    return int4_weight(unpack(codes, layout.bits, layout.in_features), scale, zero, bits=layout.bits, group_size=group)
