"""How large a model is: parameters it stands for, bytes it takes, bits a weight of its blocks takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import nn

from slimtune.quant.blackbox import BlackBox
from slimtune.quant.linear import QuantLinear


@dataclass(frozen=True)
class Size:
    """`parameters` as the dense model would have them, tied ones once; `bytes` as stored in memory, quantized or not;
    `bits_per_weight` stored bits, scales and zero points included, per weight of the linears inside the blocks."""

    parameters: int
    bytes: int
    bits_per_weight: float

    def to_dict(self) -> dict[str, object]:
        """Plain values for `report.json`."""
        return asdict(self)


def model_size(modules: Mapping[str, nn.Module], linears: frozenset[str]) -> Size:
    """The size of a model given as its modules by name (`slimtune.lora.attach.plain`), without any adapter.

    `linears` names the linears inside the blocks (`ModelMap.linears`).
    """
    seen: set[int] = set()
    parameters = size = weights = weight_bytes = 0
    for name, module in modules.items():
        for tensor in module.parameters(recurse=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                size += tensor.numel() * tensor.element_size()
                parameters += tensor.numel()
        if isinstance(module, QuantLinear):
            packed = module.qtensor
            count = module.out_features * module.in_features
            parameters += count - sum(t.numel() for t in packed.tensors.values())
            stored = packed.bytes
        elif isinstance(module, BlackBox):
            count, stored = module.out_features * module.in_features, module.bytes
            parameters += count
            size += stored
        elif isinstance(module, nn.Linear):
            count, stored = module.weight.numel(), module.weight.numel() * module.weight.element_size()
        else:
            continue
        if name in linears:
            weights += count
            weight_bytes += stored
    return Size(parameters, size, 8 * weight_bytes / weights if weights else 0.0)
