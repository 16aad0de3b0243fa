"""What a transformer is: families described as data, and the map that binds one to a model.

Rotation, pruning, quantization and adapters know a model through its `ModelMap` alone. The names of modules stand
nowhere else.
"""

from slimtune.arch.bind import Attention, Block, ModelMap, Norm, Port, bind, family_of
from slimtune.arch.families import FAMILIES
from slimtune.arch.spec import FamilySpec, NormSpec, PortSpec, Space, StackSpec, Widths

__all__ = [
    "FAMILIES",
    "Attention",
    "Block",
    "FamilySpec",
    "ModelMap",
    "Norm",
    "NormSpec",
    "Port",
    "PortSpec",
    "Space",
    "StackSpec",
    "Widths",
    "bind",
    "family_of",
]
