"""Biases for the readers of what is cut, so that the mean of what goes can stay (FLAP, arXiv 2312.11983).

A stock configuration gives biases to all linears of a sub-layer or to none, so the others get zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn

from slimtune.arch import ModelMap
from slimtune.errors import RecipeError
from slimtune.prune.groups import Axis

PLACES = {"kv": "attention_bias", "heads": "attention_bias", "ffn": "mlp_bias"}
"""The field of a configuration that gives a sub-layer's linears biases, by the kind of its axis."""


def give_biases_(model: nn.Module, modelmap: ModelMap, axes: Sequence[Axis]) -> int:
    """Give biases of zero to the sub-layers of `axes` whose readers have none, and say so in the configuration.

    `model` is a Hugging Face model without its `PeftModel`. Returns the number of new parameters. Raises `RecipeError`,
    with the model left as it was, where the configuration has no place for them or a layer is no plain linear.
    """
    config, wanted = cast(Any, model).config.get_text_config(), set()
    linears: dict[str, nn.Linear] = {}
    for axis in axes:
        bare = [part.port for part in axis.readers if not modelmap[part.port].bias]
        place = PLACES.get(axis.kind, "")
        if bare and (getattr(config, place, None) is not False or not _placed(model, place, bare[0])):
            raise RecipeError(
                "the model's configuration has no place for a bias",
                where=bare[0],
                got=config.model_type,
                wanted=f"one with {place}, as Llama's" if place else "targets kv, heads or ffn",
                remedy="leave bias out; refit needs none",
            )
        for owner in {name.rpartition(".")[0] for name in bare}:
            wanted.add(place)
            for port in modelmap.linears:
                if port.name.rpartition(".")[0] == owner and not port.bias:
                    linears[port.name] = _plain(model.get_submodule(port.name), port.name)
    for linear in linears.values():
        zeros = torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
        linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)
    for place in wanted:
        setattr(config, place, True)
    return sum(linear.out_features for linear in linears.values())


def _placed(model: nn.Module, place: str, name: str) -> bool:
    """Whether a model of this kind, told so by its configuration, has this bias: a file may have keys that mean nothing
    to its model."""
    config = deepcopy(cast(Any, model).config)
    setattr(config.get_text_config(), place, True)
    with torch.device("meta"):
        made = type(model)(config)
    return f"{name}.bias" in dict(made.named_parameters())


def _plain(module: nn.Module, name: str) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        got, remedy = type(module).__name__, "prune before quantize and lora, or leave bias out"
        raise RecipeError("only a plain linear is given a bias", where=name, got=got, remedy=remedy)
    return module
