"""An adapter's factors in another basis: those trained on a rotated model, for the original one, and back.

With `x' = read(x)` at a linear's input and `y' = write(y)` at its output, an update `B' A'` of the rotated weight is
the update `B A` of the original one with `A' = read(A)` (norm gains included) and `B' = write(B)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimtune.arch import ModelMap
from slimtune.errors import FormatError
from slimtune.rotate.basis import Basis, changes

PREFIX = "base_model.model."
FACTOR_A, FACTOR_B = ".lora_A.weight", ".lora_B.weight"


def converted(
    factors: Mapping[str, Tensor], modelmap: ModelMap, basis: Basis, *, inverse: bool = False
) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter (`adapter_model.safetensors`), brought from the original basis to `basis`, or the
    other way with `inverse`, in float64 and rounded once.

    Raises `FormatError` where the adapter has something else than low-rank factors of linears, or does not fit.
    """
    turned = changes(modelmap, basis)
    result = {}
    for key, tensor in factors.items():
        name = key.removeprefix(PREFIX)
        port = name.removesuffix(FACTOR_A).removesuffix(FACTOR_B)
        if port == name or port not in turned or modelmap[port].kind != "linear":
            raise FormatError("only LoRA factors of linears can change their basis", where=key)
        wide = modelmap[port].in_features if name.endswith(FACTOR_A) else modelmap[port].out_features
        if tensor.dim() != 2 or tensor.shape[1 if name.endswith(FACTOR_A) else 0] != wide:
            raise FormatError("the adapter does not fit the model", where=key, got=list(tensor.shape), wanted=wide)
        side = turned[port].read if name.endswith(FACTOR_A) else turned[port].write
        result[key] = side(tensor.to(torch.float64), inverse=inverse).to(tensor.dtype).contiguous()
    return result
