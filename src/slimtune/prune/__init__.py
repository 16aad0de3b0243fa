"""Fewer channels, heads and layers: groups from the map, importances, a schedule, and surgery."""

from slimtune.prune.importance import (
    Flap,
    Gate,
    GateFisher,
    Importance,
    Influence,
    Lora,
    LoraSquared,
    LossChange,
    Magnitude,
    Random,
    Wanda,
    WeightTaylor,
)
from slimtune.tables import Table

IMPORTANCES: Table[type[Importance]] = Table(
    "slimtune.importances",
    {
        "lora": Lora,
        "lora-squared": LoraSquared,
        "gate": Gate,
        "gate-fisher": GateFisher,
        "weight-taylor": WeightTaylor,
        "flap": Flap,
        "wanda": Wanda,
        "magnitude": Magnitude,
        "influence": Influence,
        "loss-change": LossChange,
        "random": Random,
    },
)
"""Every importance by its recipe name. Adding one: a class in `importance.py`, and a row here."""

__all__ = ["IMPORTANCES", "Importance"]
