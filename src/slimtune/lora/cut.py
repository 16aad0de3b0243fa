"""An adapter of a lower rank: of each layer's whole update, frozen parts and all, the best that the rank allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError
from slimtune.linalg.lowrank import balanced
from slimtune.lora.attach import adapted
from slimtune.lora.basis import FACTOR_A, FACTOR_B, PREFIX, converted
from slimtune.rotate.record import rotation_of


class Update(NamedTuple):
    """What an adapter adds to the layer `name`: `scaling * b @ a`, with `a` `[r, in]` and `b` `[out, r]`."""

    name: str
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def size(self) -> float:
        """Its Frobenius norm."""
        a, b = balanced(self.a.double(), self.b.double())
        return abs(self.scaling) * float((b.norm(dim=0) * a.norm(dim=1)).norm())

    def minus(self, other: Update) -> Update:
        """The difference of two updates of one layer."""
        share = other.scaling / self.scaling
        return self._replace(a=torch.cat([self.a, other.a]), b=torch.cat([self.b, -share * other.b], 1))


def updates(model: nn.Module) -> list[Update]:
    """What the active adapter of `model` adds to each layer of the original model, in whose basis it is, float32.

    Raises `FormatError` where it is more than low-rank factors of linears.
    """
    found = []
    for name, layer in adapted(model).items():
        for adapter in layer.active_adapters:
            if layer.lora_variant.get(adapter) or adapter not in layer.lora_A or layer.lora_bias[adapter]:
                raise FormatError("only plain LoRA factors can be written so", where=name)
            a, b = (factors[adapter].weight.detach().float() for factors in (layer.lora_A, layer.lora_B))
            found.append(Update(name, a, b, float(layer.scaling[adapter])))
    basis = rotation_of(model)
    if basis is None:
        return found
    factors = {PREFIX + u.name + leaf: t for u in found for leaf, t in ((FACTOR_A, u.a), (FACTOR_B, u.b))}
    turned = converted(factors, bind(model), basis, inverse=True)
    return [u._replace(a=turned[PREFIX + u.name + FACTOR_A], b=turned[PREFIX + u.name + FACTOR_B]) for u in found]


@dataclass(frozen=True)
class Cut:
    """What cutting lost: `‖ΔW - ΔW_r‖ / ‖ΔW‖` of each layer (name, rank, error), and of all layers together."""

    rank: int
    layers: tuple[tuple[str, int, float], ...]
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `report.json`."""
        keys = ("name", "rank", "error")
        return {
            "rank": self.rank,
            "error": self.error,
            "cut": [dict(zip(keys, row, strict=True)) for row in self.layers],
        }

    @property
    def note(self) -> str:
        """The same for a README."""
        rows = "".join(f"| {name} | {rank} | {error:.3g} |\n" for name, rank, error in self.layers)
        return (
            f"\nThis adapter was cut to rank {self.rank}. Of the whole update of the weights {self.error:.3g} is lost"
            " (the norm of what is missing beside that of the update); layer by layer:\n\n"
            f"| layer | rank | lost |\n|---|---|---|\n{rows}"
        )


def cut(update: Update, rank: int) -> Update:
    """The nearest update of at most `rank` (Eckart and Young, 1936), its factors balanced, by their thin parts alone.

    >>> whole = Update("layer", torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2.0)
    >>> round(whole.minus(cut(whole, 2)).size, 4), cut(whole, 1).a.shape
    (2.0, torch.Size([1, 3]))
    """
    a, b = (t.to(update.a.dtype) for t in balanced(update.a.double(), update.b.double()))
    return update._replace(a=a[:rank].contiguous(), b=b[:, :rank].contiguous())


def require_rank(updates: Sequence[Update], rank: int) -> None:
    """Raise `RecipeError` where no update has as many as `rank`: there is nothing to cut."""
    most = max(len(update.a) for update in updates)
    if rank > most:
        what, remedy = "the adapter's rank is lower already", "leave it out: the adapter is written whole"
        raise RecipeError(what, where="rank", got=rank, wanted=f"at most {most}", remedy=remedy)


def cut_all(updates: Sequence[Update], rank: int) -> tuple[list[Update], Cut]:
    """Every update cut to `rank`, and what that lost."""
    kept = [cut(update, rank) for update in updates]
    lost = [whole.minus(rest).size for whole, rest in zip(updates, kept, strict=True)]
    sizes = [whole.size for whole in updates]
    errors = [gone / size if size else 0.0 for gone, size in zip(lost, sizes, strict=True)]
    rows = tuple((u.name, len(u.a), error) for u, error in zip(kept, errors, strict=True))
    total = sum(size**2 for size in sizes)
    return kept, Cut(rank, rows, (sum(gone**2 for gone in lost) / total) ** 0.5 if total else 0.0)
