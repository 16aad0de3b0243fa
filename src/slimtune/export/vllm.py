"""A compressed-tensors folder with R4 in it: for vLLM, which turns inputs online, and for no other engine.

`transform_config` names the layers whose input is turned by blocks, and each has the block beside its weight, of ±1 and
not normalised. The weights have its inverse. (The form is that of llm-compressor's SpinQuant modifier;
compressed-tensors, `transform/`; read there and in vLLM's source, not run by vLLM.) transformers reads such a folder
without a word and leaves the transform out, so it is read back here by what the files say.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from slimtune.arch import Space, bind
from slimtune.arch.weights import Checkpoint
from slimtune.errors import FormatError, RecipeError
from slimtune.export.base import Source
from slimtune.export.compressed_tensors import CompressedTensorsExporter
from slimtune.export.foreign import ONLINE
from slimtune.kernels.dispatch import transform
from slimtune.linalg.hadamard import hadamard
from slimtune.lora.attach import base_of, has_adapter
from slimtune.rotate.online import detach_online_
from slimtune.rotate.record import rotation_of

NAME = "R4"
LEAF = ONLINE.removeprefix(".")
NESTED = "model.language_model."
"""What the names of a language model begin with inside a multimodal one, in transformers."""


class VllmExporter(CompressedTensorsExporter):
    """A packed Hugging Face folder for vLLM, whose last feed-forward linears turn their inputs online (R4)."""

    loads_in: ClassVar[str] = (
        "A packed model for vLLM, made from `{name}`, in a compressed-tensors format with an online transform"
        " (`transform_config`): inputs of the last linear of each feed-forward layer are turned, block by block.\n\n"
        "- vLLM: `vllm serve FOLDER`, without tensor parallelism (vLLM runs no online transform with it)\n"
        "- **not transformers**: it loads the folder without an error, leaves the transform out, and computes something"
        " else\n"
        "- slimtune: the folder is a model\n"
    )

    def transforms(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration of R4, and its block for each layer. Raises `RecipeError` where that is not what `model`
        does online, or where it has an adapter, which vLLM gives the input before the transform."""
        basis = rotation_of(model)
        if basis is None or not basis.rotation.leaves:
            raise RecipeError(
                "vllm runs one kind of online transform: r4 in blocks",
                got="no rotation" if basis is None else f"online: {', '.join(basis.rotation.online) or 'nothing'}",
                remedy="rotate with online: [r4] and block_size: 128, or export compressed-tensors",
            )
        if has_adapter(model):
            raise RecipeError("vllm gives an adapter other inputs than it was trained on", remedy="merge it first")
        require_names(model)
        names = [port.name for port in bind(base_of(model)).ports if port.reads is Space.FFN]
        targets = [_target(name) for name in names]
        block = hadamard(basis.rotation.block_size).to(torch.float32)
        sides = (("input", False), ("weight_input", True))
        scheme = {
            "type": "hadamard",
            "head_dim": basis.rotation.block_size,
            "precision": "torch.float32",
            "randomize": False,
            "requires_grad": False,
            "apply": [{"targets": targets, "location": side, "inverse": back, "ignore": []} for side, back in sides],
        }
        return {"transform_config": {"config_groups": {NAME: scheme}}}, {f"{n}.{LEAF}": block.clone() for n in names}

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """What transformers loads, with the inputs turned that `config.json` names, by the blocks in the file."""
        model = super().read_back(source, folder)
        detach_online_(model)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        scheme = config["quantization_config"]["transform_config"]["config_groups"][NAME]
        blocks = Checkpoint(folder)
        stored = {key.removesuffix(ONLINE): key for key in blocks.files if key.endswith(ONLINE)}
        for target in next(side["targets"] for side in scheme["apply"] if side["location"] == "input"):
            key = next((stored[name] for name in stored if _names(target, name)), f"{target}.{LEAF}")
            for name, module in [pair for pair in model.named_modules() if _names(target, pair[0])]:
                block = blocks.read([key])[key]
                module.register_forward_pre_hook(_turned(block, name), prepend=True)
        return model


def require_names(model: nn.Module) -> None:
    """Raise `RecipeError` for a family whose layers have other names in a file than in memory, unless its language
    model's are known: those that vLLM asks `transform_config` for are its own."""
    base = base_of(model)
    names = [port.name for port in bind(base).ports if port.reads is Space.FFN]
    if "text_config" in vars(cast(Any, base).config) and not all(name.startswith(NESTED) for name in names):
        kind = type(base).__name__
        raise RecipeError("vllm has not been written for this family", got=kind, remedy="rotate with online: []")


def _target(name: str) -> str:
    """What `transform_config` calls a layer: its name, and in the language model of a multimodal one a pattern, since
    `model.language_model.layers` of transformers is `language_model.model.layers` to vLLM and in files."""
    if not name.startswith(NESTED):
        return name
    return rf"re:(model\.)?language_model\.(model\.)?{re.escape(name.removeprefix(NESTED))}$"


def _names(target: str, name: str) -> bool:
    """Whether a layer is meant by a target, as compressed-tensors reads one."""
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name


def _turned(block: Tensor, where: str) -> Any:
    """The hook that turns an input by `block`: in the arithmetic of the model that was written, where a sum in another
    order would move some of the inputs that are rounded next to the other side. Raises `FormatError` for a block that
    is not the one for that."""
    if not torch.equal(block, hadamard(len(block)).to(block.dtype)):
        raise FormatError("the block of an online transform is not Sylvester's", where=where)

    def turn(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        return (transform(x.unflatten(-1, (-1, len(block)))).flatten(-2), *rest)

    return turn
