"""Rotations that are learnt: R1 and R2 by descent on the kurtosis of what they turn.

A random Hadamard transform makes every token look like a Gaussian; one that has seen the model's activations makes them
flatter than that, and so easier to quantize. The loss is the kurtosis of the channels of a token (KurTail, arXiv
2503.01483). The rotation is `H Q(Z)`, with `H` the random one it starts from and `Q(Z)` the orthogonal factor of a free
matrix, so that any optimiser stays on the manifold (as in DartQuant, arXiv 2511.04063). No weight takes part, and of
the activations a few hundred tokens of each layer do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap, Space
from slimtune.calib.watch import BATCH_SIZE, watch
from slimtune.rotate.basis import RESIDUAL, Basis
from slimtune.rotate.turn import Turn, orthogonal

ROWS = 512
"""Tokens that are kept of what a linear reads."""

BATCH = 2048
"""Tokens in a step of the descent."""

RATE = 0.01
"""Adam's, falling to zero (measured: 0.003 is a few per cent worse)."""


@torch.no_grad()
def learn(
    model: nn.Module,
    modelmap: ModelMap,
    basis: Basis,
    tokens: Tensor,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The matrices of `basis` (`Basis.learned`) for a model that is not rotated yet.

    Args:
        model: the model, in its original basis.
        modelmap: its map.
        basis: where it is to go; its turns are what is started from, `basis.rotation.steps` how long is learnt.
        tokens: calibration windows `[samples, length]`.
        progress: called with (learnt turns, all turns).
    """
    stream, heads = _activations(model, modelmap, basis, tokens)
    tasks: dict[str, tuple[Turn, Tensor]] = {}
    if basis.residual:
        tasks[RESIDUAL] = basis.residual_turn, torch.cat(stream)[:, None]
    for number in range(basis.attentions):
        # Query heads that share their values are further tokens of one turn.
        parts = heads[number].unflatten(-1, (basis.kv_heads, -1, basis.head_dim))
        tasks[f"values.{number}"] = basis.values_turn(number), parts.transpose(1, 2).flatten(0, 1)
    learned = {}
    for done, (name, (turn, x)) in enumerate(tasks.items(), start=1):
        learned[name] = _descend(turn, x, basis.rotation.steps, basis.rotation.seed)
        if progress is not None:
            progress(done, len(tasks))
    return {name: matrix[0] if name == RESIDUAL else matrix for name, matrix in learned.items()}


def _activations(
    model: nn.Module, modelmap: ModelMap, basis: Basis, tokens: Tensor
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Tokens of what reads the residual stream in each block, gains taken out; and of what reads each attention."""
    rows = max(ROWS // len(tokens.split(BATCH_SIZE)), 1)
    generator = torch.Generator().manual_seed(basis.rotation.seed)
    gains = {name: basis.gains[norm.name] for norm in modelmap.norms if norm.name in basis.gains for name in norm.feeds}
    stream: list[Tensor] = []
    heads: dict[int, list[Tensor]] = {number: [] for number in range(basis.attentions)}

    def take(kept: list[Tensor], gain: Tensor | None, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        x = x[torch.randperm(len(x), generator=generator)[:rows]]
        kept.append(x if gain is None else torch.where(gain == 0, 0, x / gain).float())

    taken = [
        (stage[0].name, partial(take, stream, gains.get(stage[0].name)))
        for block in modelmap.blocks
        for stage in block.stages
        if stage[0].reads is Space.RESIDUAL
    ]
    taken += [(each.output.name, partial(take, heads[i], None)) for i, each in enumerate(modelmap.attentions)]
    watch(model, tokens, taken)
    return stream, {number: torch.cat(kept) for number, kept in heads.items()}


def _descend(turn: Turn, x: Tensor, steps: int, seed: int) -> Tensor:
    """The matrices `[heads, n, n]`, float64, that make `x` `[tokens, heads, n]` flattest, from those of `turn` on."""
    n = turn.width
    eye = torch.eye(n, dtype=torch.float64, device=x.device).repeat(1, turn.heads)
    start = turn(eye).unflatten(-1, (turn.heads, n)).transpose(0, 1)  # rows of each head's matrix
    size = x.square().mean(-1, keepdim=True).sqrt()
    x = torch.einsum("thn,hnm->thm", x / size.clamp(min=1e-12), start.float())
    free = torch.eye(n, device=x.device).repeat(turn.heads, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            batch = x[torch.randint(len(x), (BATCH,), generator=generator)]
            loss = torch.einsum("thn,hnm->thm", batch, orthogonal(free)).pow(4).mean()  # of unit variance: the kurtosis
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    learned: Tensor = start @ orthogonal(free.detach().double())
    return learned
