"""Inputs of a linear in few bits: the reference that everything else (integer kernels, exports) is held against.

A token, or a group of its features, is put on a uniform grid of its own: `x ≈ (q - zero) * scale` with whole `q` and
`zero` in `[0, 2**bits)`. The grid is that of weights (`slimtune.quant.grid`), but its scale is not rounded: it is made
anew for every token and never stored. compressed-tensors, and so transformers and vLLM, use the same grid. Rounding is
half to even. Where the `type` is float, `q` is a number of float8 (e4m3fn), 448 the greatest, and there is no zero
point. What comes back is a float again ("fake quantization"), so every device and dtype can run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimtune.errors import FormatError, RecipeError
from slimtune.linalg.levels import FLOAT8, float8

RATIOS = tuple(1.0 - 0.05 * i for i in range(13))
"""Fractions of the range that a search tries: 1 down to 0.4."""


@dataclass(frozen=True)
class Activations:
    """How the input of a linear is rounded: per token by default, its range found while the model runs.

    Calling it rounds. Gradients pass straight through, clipped values included: their range moves with them.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, -2.0, 7.5]])
        >>> Activations(bits=4)(x)
        tensor([[ 0.,  1., -2.,  7.]])
        >>> Activations(bits=4, sym=False)(x)[0, 3] > 7.4
        tensor(True)
    """

    bits: int = field(default=8, metadata={"help": "bits of an activation: 2 to 8; 16 leaves it alone"})
    type: Literal["int", "float"] = field(default="int", metadata={"help": "whole numbers, or float8 of 8 bits"})
    sym: bool = field(default=True, metadata={"help": "symmetric grid without zero points"})
    clip_ratio: float = field(default=1.0, metadata={"help": "fraction of the range that the grid spans"})
    search: bool = field(default=False, metadata={"help": "find each layer's clip_ratio on the calibration text"})
    group_size: int = field(default=-1, metadata={"help": "features that share a scale; -1: all of a token"})
    static: bool = field(default=False, metadata={"help": "one range a layer, found on the calibration text"})
    low: float = field(default=0.0, metadata={"help": "least value, where static; found by calibration"})
    high: float = field(default=0.0, metadata={"help": "greatest value, where static; found by calibration"})

    def __post_init__(self) -> None:
        if self.bits not in (*range(2, 9), 16):
            raise RecipeError("bits out of range", where="bits", got=self.bits, wanted="2 to 8, or 16 for none")
        float8s = self.type == "float" and self.bits in (8, 16) and self.sym
        if self.type != "int" and not float8s:
            got = f"{self.type}, bits: {self.bits}, sym: {str(self.sym).lower()}"
            wanted, remedy = "float, bits: 8, sym: true", "use type: int for other bits or zero points"
            raise RecipeError("float inputs are float8", where="type", got=got, wanted=wanted, remedy=remedy)
        if not 0 < self.clip_ratio <= 1:
            raise RecipeError(
                "clip_ratio out of range", where="clip_ratio", got=self.clip_ratio, wanted="above 0, to 1"
            )
        if self.group_size != -1 and self.group_size < 1:
            raise RecipeError(
                "group_size out of range", where="group_size", got=self.group_size, wanted="-1, or above 0"
            )
        if self.static and self.group_size != -1:
            raise RecipeError("a static range has no groups", where="group_size", got=self.group_size, wanted=-1)
        if not -float("inf") < self.low <= 0 <= self.high < float("inf"):
            raise RecipeError("a range goes from below zero to above", where="low, high", got=(self.low, self.high))

    @property
    def calibrated(self) -> bool:
        """Whether calibration has something to find: a clip ratio or a range."""
        return self.search or (self.static and self.low == self.high == 0)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (float `[..., in_features]`) on its grid, in its dtype."""
        return cast(Tensor, _StraightThrough.apply(x, self))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[..., groups, size]`, scales and zero points `[..., groups, 1]` of `x`, all floats.

        Computed in float32, or float64 where `x` is. A shorter last group is filled up with zeros.
        """
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        size = x.shape[-1] if self.group_size == -1 else min(self.group_size, x.shape[-1])
        parts = pad(work, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
        low, high = parts.aminmax(dim=-1, keepdim=True)
        scale, zero = self.grid(low.clamp_(max=0), high.clamp_(min=0))
        if self.type == "float":
            return float8(parts / scale).to(work.dtype), scale, zero
        return (parts / scale).round_().add_(zero).clamp_(0, 2**self.bits - 1), scale, zero

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of values between `low` (at most 0) and `high` (at least 0); static ones are of the
        range that was found."""
        dtype = low.dtype
        if self.static:  # in float64: a scale that others stored is then found again to the last bit
            low, high = (torch.full_like(low, end, dtype=torch.float64) for end in (self.low, self.high))
        if self.sym:
            high = torch.maximum(-low, high)
            low = -high
        low, high = low * self.clip_ratio, high * self.clip_ratio
        scale = (high - low) / (2 * FLOAT8 if self.type == "float" else 2**self.bits - 1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a token of zeros: any scale is exact
        middle = 0 if self.type == "float" else 2 ** (self.bits - 1)
        zero = torch.full_like(scale, middle) if self.sym else (-low / scale).round_()
        return scale.to(dtype), zero.to(dtype)


class _StraightThrough(torch.autograd.Function):
    """Rounds forward; backward it was never there (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activations: Activations) -> Tensor:
        if activations.bits == 16:
            return x.view_as(x)
        codes, scale, zero = activations.codes(x)
        return codes.sub_(zero).mul_(scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*grads, None)


SEARCHED = 512
"""Tokens of a micro-batch that a search looks at, at most: a ratio depends on what tokens have in common."""


class Search:
    """Finds what `activations` leave to calibration: update it with all tokens, then take the `result`.

    The clip ratio is that of the least squared error, of `RATIOS` times the one given. A static range takes all that
    was seen; where its ratio is searched as well, the search sees the range of the micro-batch.
    """

    def __init__(self, activations: Activations) -> None:
        self._activations = activations
        ratios = RATIOS if activations.search else (1.0,)
        self._tried = [replace(activations, search=False, clip_ratio=activations.clip_ratio * r) for r in ratios]
        self._errors = [0.0] * len(self._tried)
        self._low = self._high = 0.0

    def update(self, x: Tensor) -> None:
        """Add tokens, `[..., in_features]`."""
        low, high = (float(end) for end in x.aminmax())
        self._low, self._high = min(self._low, low), max(self._high, high)
        if not self._activations.search:
            return
        tokens = x.flatten(0, -2)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0), device="cpu")
        chosen = order[:SEARCHED].to(x.device)
        exact = tokens[chosen].to(torch.promote_types(x.dtype, torch.float32))
        weight = len(tokens) / max(1, len(chosen))
        for number, tried in enumerate(self._tried):
            at = replace(tried, low=min(low, 0.0), high=max(high, 0.0)) if tried.static else tried
            self._errors[number] += weight * float((at(exact) - exact).square_().sum(dtype=torch.float64))

    def result(self) -> Activations:
        """The same activations with nothing left to find."""
        found = self._tried[self._errors.index(min(self._errors))]
        return replace(found, low=self._low, high=self._high) if found.static else found


def activations_to_dict(activations: Activations) -> dict[str, Any]:
    """Plain values for `config.json`: what is not as it is by default, and the bits."""
    default = Activations(activations.bits)
    values = asdict(activations)
    return {key: value for key, value in values.items() if key == "bits" or value != getattr(default, key)}


def activations_from_dict(facts: object, where: str) -> Activations:
    """What `activations_to_dict` described. Raises `FormatError` on anything else."""
    try:
        if not isinstance(facts, Mapping):
            raise TypeError(facts)
        return Activations(**facts)
    except (TypeError, RecipeError) as error:
        raise FormatError("a layer rounds its inputs in an unknown way", where=where, got=str(facts)[:200]) from error
