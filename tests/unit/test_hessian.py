"""Second moments and the factor of their inverse, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.calib.stats import STATISTICS
from slimtune.errors import CalibrationError, ShapeError
from slimtune.linalg.hessian import CrossMoment, SecondMoment, aligned, inverse_cholesky


def correlated(samples: int, features: int) -> Tensor:
    """Inputs with a mean, and with features that depend on one another."""
    return torch.randn(samples, features) @ torch.randn(features, features) / features**0.5 + 0.3


def damped(h: Tensor, damp: float) -> Tensor:
    h = h.double()
    return h + torch.diag(torch.full((len(h),), damp * float(h.diagonal().mean()), dtype=torch.float64))


def damped_inverse(h: Tensor, damp: float) -> Tensor:
    return torch.linalg.inv(damped(h, damp))


@pytest.mark.parametrize(("features", "tile"), [(1, 384), (37, 16), (37, 37), (100, 99), (64, 32), (130, 384), (7, 1)])
def test_streamed_moment_is_the_moment_of_all_tokens(features: int, tile: int) -> None:
    x = correlated(203, features)
    moment = SecondMoment(features, tile=tile)
    for part in x.split([1, 99, 3, 100]):
        moment.update(part)
    result = moment.result()
    wanted = x.double().T @ x.double() / len(x)
    assert result.dtype == torch.float32 and result.shape == (features, features)
    assert moment.count == 203
    assert torch.equal(result, result.T)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_tokens_may_come_in_any_shape_and_dtype() -> None:
    x = correlated(24, 10).to(torch.bfloat16)
    moment = SecondMoment(10)
    moment.update(x.view(2, 3, 4, 10))
    wanted = x.double().T @ x.double() / 24
    torch.testing.assert_close(moment.result().double(), wanted, rtol=1e-5, atol=1e-5)


def test_result_can_be_asked_for_in_between() -> None:
    x = correlated(50, 6)
    moment = SecondMoment(6, tile=4)
    moment.update(x[:20])
    before = moment.result()
    moment.update(x[20:])
    torch.testing.assert_close(before, x[:20].T @ x[:20] / 20)
    torch.testing.assert_close(moment.result(), x.T @ x / 50)


def test_hessian_is_a_statistic() -> None:
    x = correlated(9, 5)
    statistic = STATISTICS["hessian"](5, torch.device("cpu"))
    statistic.update(x, x)
    torch.testing.assert_close(statistic.result(), x.T @ x / 9)


def test_moment_of_nothing_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no calibration token"):
        SecondMoment(4).result()


def test_tokens_of_another_width_are_an_error() -> None:
    with pytest.raises(ShapeError, match="wrong width"):
        SecondMoment(4).update(torch.zeros(2, 5))


@pytest.mark.parametrize("features", [1, 5, 48, 131, 300])
@pytest.mark.parametrize("damp", [0.01, 0.3])
def test_factor_gives_the_damped_inverse(features: int, damp: float) -> None:
    x = correlated(4 * features, features).double()
    h = x.T @ x / len(x)
    upper, used = inverse_cholesky(h, damp)
    wanted = damped_inverse(h, damp)
    assert used == damp
    assert upper.dtype == torch.float64
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    torch.testing.assert_close(upper.T @ upper, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


def test_rows_of_the_factor_are_those_of_the_inverses_of_what_is_left() -> None:
    """GPTQ's reformulation: row j of the factor is the first row of `(H[j:, j:])⁻¹`, divided by a square root."""
    x = correlated(60, 9).double()
    h = x.T @ x / 60
    upper, _ = inverse_cholesky(h, 0.02)
    for j in range(9):
        left = torch.linalg.inv(damped(h, 0.02)[j:, j:])
        torch.testing.assert_close(upper[j, j:], left[0] / left[0, 0].sqrt())


def test_damping_grows_until_the_matrix_is_positive_definite() -> None:
    h = torch.diag(torch.tensor([1.0, 1.0, -0.05]))  # mean 0.65: a damping of 0.01 leaves -0.0435, one of 0.1 0.015
    upper, used = inverse_cholesky(h, 0.01)
    assert used == pytest.approx(0.1)
    torch.testing.assert_close(upper.T @ upper, damped_inverse(h, 0.1))


def test_a_singular_matrix_is_damped_as_much_as_it_needs() -> None:
    h = torch.ones(6, 6)
    upper, used = inverse_cholesky(h, 1e-17)
    assert 1e-17 < used < 1e-11
    assert bool(torch.isfinite(upper).all())


def test_attempts_are_counted() -> None:
    h = torch.diag(torch.tensor([1.0, 1.0, -0.05]))
    assert inverse_cholesky(h, 0.01, attempts=2)[1] == pytest.approx(0.1)
    with pytest.raises(CalibrationError, match="not positive definite") as caught:
        inverse_cholesky(h, 0.01, attempts=1)
    assert "damp_percent" in str(caught.value) and "0.01" in str(caught.value)


@pytest.mark.parametrize("h", [-torch.eye(3), torch.zeros(3, 3)], ids=["negative", "zero"])
def test_a_matrix_that_no_damping_mends_is_an_error(h: Tensor) -> None:
    with pytest.raises(CalibrationError, match="not positive definite"):
        inverse_cholesky(h)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_moment_that_is_not_finite_is_an_error(bad: float) -> None:
    h = torch.eye(4)
    h[1, 2] = bad
    with pytest.raises(CalibrationError, match="not finite"):
        inverse_cholesky(h)


def test_cross_moment_is_that_of_all_tokens() -> None:
    x, missing = correlated(203, 37), correlated(203, 37)
    moment = CrossMoment(37)
    for a, b in zip(x.split([1, 99, 103]), missing.split([1, 99, 103]), strict=True):
        moment.update(a, b)
    torch.testing.assert_close(moment.result().double(), missing.double().T @ x.double() / 203, rtol=1e-5, atol=1e-5)
    with pytest.raises(ShapeError, match="wrong width"):
        moment.update(x[:, :5], missing[:, :5])
    with pytest.raises(CalibrationError, match="no calibration token"):
        CrossMoment(3).result()


def test_aligned_is_the_least_squares_weight() -> None:
    z, weight = correlated(300, 20).double(), torch.randn(7, 20, dtype=torch.float64)
    x = z + 0.3 * correlated(300, 20).double()
    h, drift = x.T @ x / 300, (z - x).T @ x / 300
    wanted = torch.linalg.lstsq(x, z @ weight.T).solution.T
    torch.testing.assert_close(aligned(weight, h, drift, damp=1e-12), wanted)
    off = lambda w: float((z @ weight.T - x @ w.T).square().sum())  # noqa: E731
    assert off(aligned(weight, h, drift)) < 0.9 * off(weight)
    assert torch.equal(aligned(weight, h, torch.zeros_like(h)), weight)
    half = aligned(weight, h, drift, share=0.5)
    torch.testing.assert_close(2 * half - weight, aligned(weight, h, drift))


def test_aligned_keeps_what_a_half_precision_weight_has_no_room_for() -> None:
    x, weight = correlated(300, 20), torch.randn(7, 20).to(torch.bfloat16)
    h, drift = x.T @ x / 300, 1e-3 * correlated(20, 20)
    assert torch.equal(aligned(weight, h, drift), aligned(weight.float(), h, drift))
