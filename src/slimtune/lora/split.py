"""A factor of an adapter that trains in part: `[A | A₀]` with `A₀` frozen.

An init that starts away from zero (LoRA-GA, PiSSA) subtracts its first product from the base, so that the model
computes what it did: `W x + s (B A - B₀ A₀) x`. Here the base is left alone, and what is subtracted is a part of the
adapter, `[B | -B₀] [A ; A₀]`. To PEFT it is one adapter of a higher rank: what it saves is right on the original base,
switching it off gives the original model, and merging adds the whole of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class PartlyFrozen(nn.Module):
    """A linear map without bias whose weight is `live` and, behind it along `dim`, `frozen`.

    Only `live` is a parameter; state dicts hold the whole as `weight`, as PEFT's own linears do.

    Example:
        >>> factor = PartlyFrozen(torch.ones(2, 3), torch.zeros(4, 3), dim=0)
        >>> factor.weight.shape, [name for name, _ in factor.named_parameters()], list(factor.state_dict())
        (torch.Size([6, 3]), ['live'], ['weight'])
    """

    bias = None

    def __init__(self, live: Tensor, frozen: Tensor, dim: int) -> None:
        super().__init__()
        self.live, self.dim = nn.Parameter(live.contiguous()), dim
        self.register_buffer("frozen", frozen.contiguous(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Both parts in one tensor; gradients reach the first."""
        return torch.cat([self.live, self.get_buffer("frozen").to(self.live.dtype)], self.dim)

    def forward(self, x: Tensor) -> Tensor:
        """`x` is `[..., in]`."""
        return nn.functional.linear(x, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        missing: list[str] = rest[2]
        whole = state_dict.get(f"{prefix}weight")
        if whole is None:
            missing.append(f"{prefix}weight")
            return
        live = self.live.shape[self.dim]
        with torch.no_grad():
            self.live.copy_(whole.narrow(self.dim, 0, live))
            frozen = self.get_buffer("frozen")
            frozen.copy_(whole.narrow(self.dim, live, frozen.shape[self.dim]))


def split(weight: Tensor, live: int, dim: int) -> PartlyFrozen:
    """The factor `weight` of which the first `live` rows (or columns) train."""
    rest = weight.shape[dim] - live
    return PartlyFrozen(weight.narrow(dim, 0, live).clone(), weight.narrow(dim, live, rest).clone(), dim)
