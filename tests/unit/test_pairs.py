"""Optimizers of pairs, against their papers' formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimtune.train.pairs import BETAS, LoraPro, LoraRite, Pair, nearest_moves, settled

OUT, WIDTH, RANK, SCALING = 9, 7, 3, 1.5


def factors(rank: int = RANK) -> Pair:
    return Pair(torch.randn(rank, WIDTH).double(), torch.randn(OUT, rank).double())


def gradients(pair: Pair, g: Tensor) -> Pair:
    """Of a loss whose gradient at the whole weight is `g`, by the chain rule."""
    return Pair(SCALING * pair.b.T @ g, SCALING * g @ pair.a.T)


def effect(pair: Pair) -> Tensor:
    """The matrix that takes `vec(Mᵃ), vec(Mᵇ)` (rows one after the other) to `vec(s (B Mᵃ + Mᵇ A))`."""
    of_a = torch.kron(pair.b, torch.eye(WIDTH).double())
    of_b = torch.kron(torch.eye(OUT).double(), pair.a.T.contiguous())
    return SCALING * torch.cat([of_a, of_b], 1)


def flat(pair: Pair) -> Tensor:
    return torch.cat([pair.a.flatten(), pair.b.flatten()])


def apart(vector: Tensor, rank: int = RANK) -> Pair:
    return Pair(vector[: rank * WIDTH].view(rank, WIDTH), vector[rank * WIDTH :].view(OUT, rank))


def test_the_moves_have_the_effect_nearest_to_the_gradient() -> None:
    pair, g = factors(), torch.randn(OUT, WIDTH).double()
    k = effect(pair)
    best = k @ torch.linalg.pinv(k) @ g.flatten()
    torch.testing.assert_close(k @ flat(nearest_moves(pair, gradients(pair, g), SCALING)), best, rtol=0, atol=1e-6)


def test_the_term_x_keeps_the_effect_and_is_nearest_to_the_factors_gradients() -> None:
    pair, g = factors(), torch.randn(OUT, WIDTH).double()
    k, own = effect(pair), gradients(pair, g)
    moves = nearest_moves(pair, own, SCALING)
    found = settled(pair, moves)
    torch.testing.assert_close(k @ flat(found), k @ flat(moves), rtol=0, atol=1e-6)
    nearest = flat(own) + torch.linalg.pinv(k) @ (g.flatten() - k @ flat(own))
    torch.testing.assert_close(flat(found), nearest, rtol=0, atol=1e-6)
    assert not torch.allclose(flat(moves), nearest, atol=1e-2)  # X matters


def run(kind: Any, pair: Pair, steps: list[Tensor], **options: Any) -> list[Pair]:
    """The factors after each step down these gradients of the whole weight."""
    a, b = (t.clone().requires_grad_() for t in pair)
    optimizer = kind([(a, b, SCALING)], **{"lr": 0.1, "weight_decay": 0.0, **options})
    seen = []
    for g in steps:
        a.grad, b.grad = gradients(Pair(a.detach(), b.detach()), g)
        optimizer.step()
        seen.append(Pair(a.detach().clone(), b.detach().clone()))
    return seen


def some_gradients(count: int = 5) -> list[Tensor]:
    return [torch.randn(OUT, WIDTH).double() for _ in range(count)]


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_lora_pro_is_adam_on_the_equivalent_gradient(decay: float) -> None:
    """The textbook: least squares for every projection, torch's own Adam on a whole matrix."""
    pair, steps = factors(), some_gradients()
    weight = torch.zeros(OUT, WIDTH).double().requires_grad_()
    adam = torch.optim.Adam([weight], lr=1.0, betas=BETAS)
    wanted, now = [], pair
    for g in steps:
        k = effect(now)
        inverse = torch.linalg.pinv(k)
        weight.grad = (k @ inverse @ g.flatten()).view(OUT, WIDTH)
        before = weight.detach().clone()
        adam.step()
        down = before - weight.detach()
        own = flat(gradients(now, down))
        moves = apart(own + inverse @ (down.flatten() - k @ own))
        now = Pair(*((1 - 0.1 * decay) * t - 0.1 * move for t, move in zip(now, moves, strict=True)))
        wanted.append(now)
    for mine, theirs in zip(run(LoraPro, pair, steps, weight_decay=decay), wanted, strict=True):
        torch.testing.assert_close(mine.a, theirs.a, rtol=0, atol=1e-5)
        torch.testing.assert_close(mine.b, theirs.b, rtol=0, atol=1e-5)


def polar(m: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u @ vh, vh.T @ s.diag() @ vh


def root(m: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    return vectors @ (values.clamp(min=0).sqrt() + 1e-8).reciprocal().diag() @ vectors.T


class TextbookSide:
    """Algorithm 1 of LoRA-RITE for one factor, in the paper's polar bases; the code takes any orthonormal ones."""

    def __init__(self) -> None:
        self.time, self.mean, self.square, self.escaped, self.basis = 0, 0.0, 0.0, 0.0, None

    def down(self, g: Tensor, other: Tensor) -> Tensor:
        basis, size = polar(other)
        first, second = (beta * (1 - beta**self.time) / (1 - beta ** (self.time + 1)) for beta in BETAS)
        turn = torch.eye(RANK).double() if self.basis is None else basis.T @ self.basis
        bare = g @ basis
        turned = turn @ self.square @ turn.T if self.time else torch.zeros(RANK, RANK).double()
        before = self.square if self.time else turned
        old, new = torch.linalg.eigvalsh(before), torch.linalg.eigvalsh(turned)
        lost = max(0.0, min(float((old - new).max()), float(torch.trace(before) - torch.trace(turned))))
        self.escaped = second * (self.escaped + lost)
        self.square = second * turned + (1 - second) * bare.T @ bare / len(bare)
        scaled = bare @ root(self.square + self.escaped * torch.eye(RANK))
        self.mean = first * (self.mean @ turn.T if self.time else 0.0) + (1 - first) * scaled
        self.basis, self.time = basis, self.time + 1
        return self.mean @ torch.linalg.inv(size).T


def test_lora_rite_is_the_papers_algorithm() -> None:
    pair, steps = factors(), some_gradients()
    of_a, of_b, now = TextbookSide(), TextbookSide(), pair
    for g, mine in zip(steps, run(LoraRite, pair, steps), strict=True):
        down_b, down_a = of_b.down(SCALING * g, now.a.T), of_a.down(SCALING * g.T, now.b)
        now = Pair(now.a - 0.1 * down_a.T, now.b - 0.1 * down_b)
        torch.testing.assert_close(mine.a, now.a, rtol=0, atol=1e-6)
        torch.testing.assert_close(mine.b, now.b, rtol=0, atol=1e-6)
    assert of_a.escaped > 1e-4  # the bases did turn


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_lora_rite_does_not_see_how_the_product_is_shared(decay: float) -> None:
    """`A -> R⁻¹ A, B -> B R`, far from orthogonal: the same products at every step, and not so under Adam."""
    pair, steps = factors(), some_gradients()
    mix = torch.randn(RANK, RANK).double() @ torch.tensor([0.01, 1.0, 30.0]).double().diag()
    other = Pair(torch.linalg.inv(mix) @ pair.a, pair.b @ mix)
    for mine, theirs in zip(*(run(LoraRite, p, steps, weight_decay=decay) for p in (pair, other)), strict=True):
        torch.testing.assert_close(mine.b @ mine.a, theirs.b @ theirs.a, rtol=1e-5, atol=1e-6)

    def adam(pairs: Any, lr: float, weight_decay: float) -> Any:
        return torch.optim.AdamW([t for pair in pairs for t in pair[:2]], lr=lr, weight_decay=weight_decay)

    last = [run(adam, p, steps)[-1] for p in (pair, other)]
    assert not torch.allclose(last[0].b @ last[0].a, last[1].b @ last[1].a, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", [LoraPro, LoraRite])
@pytest.mark.parametrize("rank", [RANK, WIDTH + 1])
def test_the_usual_start_and_ranks_beyond_the_width_stay_finite(kind: Any, rank: int) -> None:
    pair = Pair(factors(rank).a, torch.zeros(OUT, rank).double())
    seen = run(kind, pair, some_gradients(), lr=1e-3)
    assert torch.equal(seen[0].a, pair.a) and bool(seen[0].b.any())  # B alone moves first: A has no gradient
    assert all(bool(t.isfinite().all()) for each in seen for t in each)
    assert all(float((now.b @ now.a).norm()) < 1 for now in seen)


def cut_(optimizer: Any, a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> None:
    """As pruning does it: each parameter, then what is held of it."""
    for parameter, dim, kept in ((a, 1, columns), (b, 0, rows)):
        parameter.data, parameter.grad = parameter.data.index_select(dim, kept), None
        optimizer.cut_(parameter, dim, kept)


def cut_midway(
    kind: Any, pair: Pair, steps: list[Tensor], rows: Tensor, columns: Tensor
) -> tuple[Any, Any, list[Pair]]:
    """Steps, a cut, and the same steps again on what is left; the states around the cut."""
    a, b = (t.clone().requires_grad_() for t in pair)
    optimizer = kind([(a, b, SCALING)], lr=0.1, weight_decay=0.0)
    states, seen = [], []
    for number, g in enumerate([*steps, *(g[rows][:, columns] for g in steps)]):
        if number == len(steps):
            for _ in range(2):
                states.append(
                    [{key: held.clone() for key, held in optimizer.state[factor].items()} for factor in (a, b)]
                )
                if len(states) == 1:
                    cut_(optimizer, a, b, rows, columns)
        a.grad, b.grad = gradients(Pair(a.detach(), b.detach()), g)
        optimizer.step()
        seen.append(Pair(a.detach().clone(), b.detach().clone()))
    return *states, seen


ROWS, COLUMNS = torch.tensor([0, 3, 4, 7, 8]), torch.tensor([1, 2, 4, 6])


def test_a_cut_leaves_of_lora_pros_moments_those_of_the_weights_that_stay() -> None:
    (before, _), (after, _), _ = cut_midway(LoraPro, factors(), some_gradients(3), ROWS, COLUMNS)
    for key in ("mean", "square"):
        assert torch.equal(after[key], before[key][ROWS][:, COLUMNS])


def test_a_cut_leaves_of_lora_rites_moments_those_of_the_features_that_stay() -> None:
    before, after, _ = cut_midway(LoraRite, factors(), some_gradients(3), ROWS, COLUMNS)
    for old, new, own, other in zip(before, after, (COLUMNS, ROWS), (ROWS, COLUMNS), strict=True):
        first, last = ((held["mean"] @ held["basis"].T) for held in (old, new))
        torch.testing.assert_close(last, first[own][:, other])
        first, last = ((held["basis"] @ held["square"] @ held["basis"].T) for held in (old, new))
        torch.testing.assert_close(last, first[other][:, other])
        torch.testing.assert_close(new["basis"].T @ new["basis"], torch.eye(RANK).double())


def test_lora_rite_does_not_see_a_sharing_across_a_cut_either() -> None:
    pair, steps = factors(), some_gradients(3)
    mix = torch.randn(RANK, RANK).double() @ torch.tensor([0.01, 1.0, 30.0]).double().diag()
    other = Pair(torch.linalg.inv(mix) @ pair.a, pair.b @ mix)
    mine, theirs = (cut_midway(LoraRite, each, steps, ROWS, COLUMNS)[2] for each in (pair, other))
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.b @ one.a, two.b @ two.a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [LoraPro, LoraRite])
def test_fewer_features_than_the_rank_may_stay(kind: Any) -> None:
    *_, seen = cut_midway(kind, factors(), some_gradients(3), ROWS[:2], COLUMNS[:1])
    assert seen[-1].a.shape == (RANK, 1) and all(bool(t.isfinite().all()) for t in seen[-1])
