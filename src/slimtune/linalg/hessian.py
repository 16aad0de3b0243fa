"""Second moments of a layer's inputs, and the triangular factor that GPTQ walks along.

The proxy Hessian of a linear layer is `H = XᵀX / n` over the calibration tokens at its input (the loss
`|X(W - Ŵ)ᵀ|²` is a quadratic with that matrix, one row of `W` at a time).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.errors import CalibrationError, ShapeError


class SecondMoment:
    """A streaming `XᵀX / n`: summed in float32, one `[features, features]` matrix in memory.

    Only the upper block triangle is computed (the matrix is symmetric) and mirrored once, when it is asked for.

    Example:
        >>> x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
        >>> moment = SecondMoment(4)
        >>> moment.update(x[:3]); moment.update(x[3:])
        >>> torch.allclose(moment.result(), x.T @ x / 10, atol=1e-6)
        True
    """

    def __init__(self, features: int, *, device: torch.device | str = "cpu", tile: int = 384) -> None:
        self.features = features
        self.count = 0
        self._tile = tile
        self._sum = torch.zeros(features, features, device=device)

    def update(self, x: Tensor) -> None:
        """Add tokens: `x` is `[..., features]`."""
        if x.shape[-1] != self.features:
            raise ShapeError("calibration input has the wrong width", got=x.shape[-1], wanted=self.features)
        x = x.reshape(-1, self.features).to(torch.float32)
        self.count += x.shape[0]
        for start in range(0, self.features, self._tile):
            stop = min(start + self._tile, self.features)
            self._sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def result(self) -> Tensor:
        """`XᵀX / n`, float32 `[features, features]`, symmetric. Raises `CalibrationError` when no token was seen."""
        if not self.count:
            raise CalibrationError("no calibration token reached a layer", remedy="give the step some calibration data")
        whole = self._sum / self.count
        for start in range(0, self.features, self._tile):
            stop = min(start + self._tile, self.features)
            corner = whole[start:stop, start:stop]
            corner.copy_(torch.triu(corner) + torch.triu(corner, 1).T)
            whole[stop:, start:stop] = whole[start:stop, stop:].T
        return whole


class CrossMoment:
    """A streaming `DᵀX / n`: how what is missing from inputs (`D`) goes with what they are (`X`). Summed in float32.

    Example:
        >>> x, d = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(0)).unbind()
        >>> moment = CrossMoment(4)
        >>> moment.update(x[:3], d[:3]); moment.update(x[3:], d[3:])
        >>> torch.allclose(moment.result(), d.T @ x / 10, atol=1e-6)
        True
    """

    def __init__(self, features: int, *, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.count = 0
        self._sum = torch.zeros(features, features, device=device)

    def update(self, x: Tensor, missing: Tensor) -> None:
        """Add tokens: both are `[..., features]`."""
        if not x.shape[-1] == missing.shape[-1] == self.features:
            raise ShapeError("calibration input has the wrong width", got=x.shape[-1], wanted=self.features)
        x = x.reshape(-1, self.features).to(torch.float32)
        self.count += x.shape[0]
        self._sum.addmm_(missing.reshape(-1, self.features).to(torch.float32).T, x)

    def result(self) -> Tensor:
        """`DᵀX / n`, float32 `[features, features]`. Raises `CalibrationError` when no token was seen."""
        if not self.count:
            raise CalibrationError("no calibration token reached a layer", remedy="give the step some calibration data")
        return self._sum / self.count


def aligned(weight: Tensor, hessian: Tensor, drift: Tensor, share: float = 1.0, damp: float = 0.01) -> Tensor:
    """The weight that on the inputs a layer gets does most nearly what `weight` did on those it should have got.

    `|Z Wᵀ - X W'ᵀ|²` over calibration inputs `Z` of the dense model and `X` of the one quantized so far is least for
    `W' = W + W C H⁻¹` with `H = XᵀX` and the drift `C = (Z - X)ᵀX`. A quantizer that minimises `|X (W' - Ŵ)ᵀ|²` then
    minimises `|Z Wᵀ - X Ŵᵀ|²`, which differs by a constant. That is the asymmetric calibration of GPTAQ (arXiv
    2504.02692), whose correction of every column is this one, taken at once.

    Args:
        weight: float `[out, in]`. The result is float64 where this is and float32 otherwise: the correction of a
            half-precision weight may be less than a step of its mantissa.
        hessian: `H / n`, `[in, in]`.
        drift: `C / n`, `[in, in]`.
        share: of the correction; less than 1 where few tokens would be fitted too well.
        damp: dampening, a fraction of the Hessian's mean diagonal.
    """
    upper, _ = inverse_cholesky(hessian, damp)
    moved = (weight.to(torch.float64) @ drift.to(torch.float64)) @ upper.T @ upper
    return (weight + share * moved).to(torch.promote_types(weight.dtype, torch.float32))


def inverse_cholesky(hessian: Tensor, damp: float = 0.01, attempts: int = 6) -> tuple[Tensor, float]:
    """The upper `U` with `UᵀU = (H + d·mean(diag H)·I)⁻¹`, in float64, and the `d` that was needed.

    `damp` is the first `d`; it is multiplied by ten whenever the factorisation fails or is not finite, up to `attempts`
    times. Source: GPTQ (arXiv 2210.17323), step 3, "Cholesky reformulation".

    Raises `CalibrationError` when `hessian` is not finite or no damping makes it positive definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(
            "the calibration statistics of a layer are not finite",
            remedy="use dtype: float32, or check the calibration data and the model for NaN",
        )
    # With features in reverse, H = LLᵀ; in order again, L is an upper R with H = RRᵀ: U is the inverse of R.
    h = hessian.flip(0, 1).to(torch.float64)
    mean = float(h.diagonal().mean())
    added = 0.0
    for attempt in range(attempts):
        d = damp * 10.0**attempt
        h.diagonal().add_((d - added) * mean)
        added = d
        lower, failed = torch.linalg.cholesky_ex(h)
        if int(failed) == 0:
            del h
            _invert_lower_(lower)
            upper = lower.flip(0, 1)
            if bool(torch.isfinite(upper).all()):
                return upper, d
            h = hessian.flip(0, 1).to(torch.float64)
            added = 0.0
    raise CalibrationError(
        "the calibration statistics of a layer are not positive definite",
        got=f"Cholesky failed up to a damping of {damp * 10.0 ** (attempts - 1):g} of the mean diagonal",
        remedy="use more calibration samples or a larger damp_percent",
    )


def _invert_lower_(lower: Tensor, leaf: int = 128) -> None:
    """Replace a lower triangular matrix by its inverse, with a quarter of its size beside it and not two copies."""
    n = len(lower)
    if n <= leaf:
        unit = torch.eye(n, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
        return
    half = n // 2
    first, corner, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower_(first, leaf)
    _invert_lower_(second, leaf)
    corner.copy_((second @ corner) @ first).neg_()
