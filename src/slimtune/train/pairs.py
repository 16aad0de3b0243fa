"""Optimizers that move the two factors of an update together: what counts is the product, not how it is shared.

Both see a layer as `ΔW = s B A`, with `A` `[r, in]` and `B` `[out, r]`, and its gradients `s Bᵀ G` and `s G Aᵀ`, where
`G` is the gradient of the whole weight, which nobody has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

BETAS = 0.9, 0.999
EPSILON = 1e-8
"""AdamW's; and what is added to `Bᵀ B` and `A Aᵀ` before they are inverted, as in LoRA-Pro's own code."""


class Pair(NamedTuple):
    """Something for A, `[r, in]`, and for B, `[out, r]`."""

    a: Tensor
    b: Tensor


class _Pairs(ABC, Optimizer):
    """One group of parameters for each pair of factors, with the scaling of their product."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor, float]], lr: float, weight_decay: float) -> None:
        groups: list[dict[str, Any]] = [{"params": [a, b], "scaling": scaling} for a, b, scaling in pairs]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every pair by its gradients."""
        assert closure is None, "nothing here evaluates the loss again"
        for group in self.param_groups:
            a, b = group["params"]
            if a.grad is None or b.grad is None:
                continue
            wide = torch.promote_types(a.dtype, torch.float32)
            factors, grads = Pair(a.to(wide), b.to(wide)), Pair(a.grad.to(wide), b.grad.to(wide))
            down = self.direction(factors, grads, group)
            for factor, way in zip((a, b), down, strict=True):
                factor.mul_(1 - group["lr"] * group["weight_decay"]).sub_(way.to(factor.dtype), alpha=group["lr"])

    @abstractmethod
    def direction(self, factors: Pair, grads: Pair, group: dict[str, Any]) -> Pair:
        """What to subtract from the factors, times the rate; keeps its own state."""

    @torch.no_grad()
    def cut_(self, parameter: Tensor, dim: int, indices: Tensor) -> None:
        """Keep these features of the state of the pair that `parameter` is of: read (`dim` 1, an A) or written (0, a
        B)."""
        for group in self.param_groups:
            if any(parameter is factor for factor in group["params"]):
                self.keep_(group, dim, indices)

    @abstractmethod
    def keep_(self, group: dict[str, Any], dim: int, indices: Tensor) -> None:
        """Keep these features of the state of a pair, along `dim` of its product."""


# LoRA-Pro


def nearest_moves(factors: Pair, grads: Pair, scaling: float) -> Pair:
    """The moves of A and B whose effect on the weight, `s (B Mᵃ + Mᵇ A)`, is nearest to `G` (LoRA-Pro, theorem 2.1).

    `Mᵃ = (BᵀB)⁻¹ gᵃ / s²` and `Mᵇ = (I - B (BᵀB)⁻¹ Bᵀ) gᵇ (AAᵀ)⁻¹ / s²`: one of many, see `settled`.
    """
    a, b = factors
    to_a = _inverse(b.T @ b) @ grads.a
    to_b = grads.b - b @ (_inverse(b.T @ b) @ (b.T @ grads.b))
    return Pair(to_a / scaling**2, to_b @ _inverse(a @ a.T) / scaling**2)


def settled(factors: Pair, moves: Pair) -> Pair:
    """Of all moves with the effect of `moves`, `Mᵃ + X A` and `Mᵇ - B X`, those nearest to the factors' own gradients.

    `X` solves `BᵀB X + X AAᵀ = -Mᵃ Aᵀ` (LoRA-Pro, theorem 2.3), here by the eigenvectors of both Gram matrices.
    """
    a, b = factors
    (left, u), (right, v) = (torch.linalg.eigh(gram.double()) for gram in (b.T @ b, a @ a.T))
    target = u.T @ -(moves.a @ a.T).double() @ v
    x = (u @ (target / (left[:, None] + right).clamp(min=EPSILON)) @ v.T).to(a.dtype)
    return Pair(moves.a + x @ a, moves.b - b @ x)


def _inverse(gram: Tensor) -> Tensor:
    damped = gram.double() + EPSILON * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return torch.linalg.inv(damped).to(gram.dtype)


class LoraPro(_Pairs):
    """AdamW on the nearest thing to the gradient of the whole weight, brought back to the factors (arXiv 2407.18242).

    Both moments are of the size of the weight, as in the paper: 8 bytes for each number that full fine-tuning would
    train, which is what Adam takes there.
    """

    def direction(self, factors: Pair, grads: Pair, group: dict[str, Any]) -> Pair:
        """The paper's algorithm 2: the equivalent gradient, Adam's step for it, and the moves nearest to that."""
        (a, b), scaling, state = factors, group["scaling"], self.state[group["params"][0]]
        moves = nearest_moves(factors, grads, scaling)
        whole = scaling * (b @ moves.a + moves.b @ a)
        if not state:
            state |= {"step": torch.zeros(()), "mean": torch.zeros_like(whole), "square": torch.zeros_like(whole)}
        state["step"] += 1
        count = float(state["step"])
        state["mean"].lerp_(whole, 1 - BETAS[0])
        state["square"].mul_(BETAS[1]).addcmul_(whole, whole, value=1 - BETAS[1])
        root = (state["square"] / (1 - BETAS[1] ** count)).sqrt_().add_(EPSILON)
        wanted = (state["mean"] / (1 - BETAS[0] ** count)).div_(root)
        moves = nearest_moves(factors, Pair(scaling * b.T @ wanted, scaling * wanted @ a.T), scaling)
        return settled(factors, moves)

    def keep_(self, group: dict[str, Any], dim: int, indices: Tensor) -> None:
        """Both moments are of the product: they lose its rows or columns."""
        state = self.state[group["params"][0]]
        for key in {"mean", "square"} & state.keys():
            state[key] = state[key].index_select(dim, indices)


# LoRA-RITE


class LoraRite(_Pairs):
    """Adaptive steps that do not see how a product is shared between its factors (LoRA-RITE, arXiv 2410.20625).

    `A -> R⁻¹ A, B -> B R` changes what a step does to A and to B, and not what it does to `B A`. The moments are kept
    in an orthonormal basis of the other factor, and turn with it: `r` numbers a feature, and `r²`.
    """

    def direction(self, factors: Pair, grads: Pair, group: dict[str, Any]) -> Pair:
        """The paper's algorithm 1, for each factor in the basis of the other; features lie along the rows."""
        (a, b), (of_a, of_b) = factors, group["params"]
        down_b = self._side(grads.b, a.T, self.state[of_b])
        down_a = self._side(grads.a.T, b, self.state[of_a])
        return Pair(down_a.T, down_b)

    def _side(self, grad: Tensor, other: Tensor, state: dict[str, Any]) -> Tensor:
        """What to subtract from a factor `[n, r]` with this gradient, where the `other` is `[m, r]`."""
        basis, corner = torch.linalg.qr(other.double())  # column by column in memory, which a checkpoint would not keep
        basis, inverse = basis.to(grad.dtype).contiguous(), torch.linalg.pinv(corner).to(grad.dtype)
        if not state:
            known = basis.shape[1]  # the rank, or fewer where the other factor is narrower
            state |= {"step": torch.zeros(()), "mean": grad.new_zeros(len(grad), known), "basis": basis.clone()}
            state |= {"square": grad.new_zeros(known, known), "escaped": grad.new_zeros(())}
        first, second = (_decay(beta, float(state["step"])) for beta in BETAS)
        state["step"] += 1
        turn = basis.T @ state["basis"]
        bare = grad @ inverse  # the unmagnified gradient: `G` in the basis of the other factor
        turned = turn @ state["square"] @ turn.T
        escaped = second * (state["escaped"] + _escaped(state["square"], turned))
        square = second * turned + (1 - second) * (bare.T @ bare) / len(bare)
        scaled = bare @ _inverse_root(square, float(escaped))
        mean = first * state["mean"] @ turn.T + (1 - first) * scaled
        for key, value in (("mean", mean), ("square", square), ("escaped", escaped), ("basis", basis)):
            state[key].copy_(value)
        return mean @ inverse.T

    def keep_(self, group: dict[str, Any], dim: int, indices: Tensor) -> None:
        """The features go, and what is left of the other factor's basis is made orthonormal again, with the moments in
        it: `M Qᵀ` and `Q S Qᵀ` lose columns and rows. `S` is a mean over the own features, and stays."""
        own, other = (self.state[factor] for factor in (group["params"] if dim else reversed(group["params"])))
        if own:
            own["mean"] = own["mean"].index_select(0, indices)
        if other:
            dtype = other["basis"].dtype
            basis, corner = torch.linalg.qr(other["basis"].index_select(0, indices).double())
            corner = corner.to(dtype)
            other["basis"], other["mean"] = basis.to(dtype).contiguous(), other["mean"] @ corner.T
            other["square"] = corner @ other["square"] @ corner.T


def _decay(beta: float, done: float) -> float:
    """A decay whose running means need no correction (Adafactor, arXiv 1804.04235, section 7.1)."""
    return beta * (1 - beta**done) / (1 - beta ** (done + 1))


def _escaped(before: Tensor, after: Tensor) -> Tensor:
    """What a second moment lost when it was projected onto a new basis: the least of two bounds."""
    (old, new) = (torch.linalg.eigvalsh(t.double()) for t in (before, after))
    return torch.minimum((old - new).max(), old.sum() - new.sum()).clamp(min=0).to(before.dtype)


def _inverse_root(square: Tensor, escaped: float) -> Tensor:
    values, vectors = torch.linalg.eigh(square.double())
    root = ((values.clamp(min=0) + escaped).sqrt() + EPSILON).reciprocal()
    return ((vectors * root) @ vectors.T).to(square.dtype)
