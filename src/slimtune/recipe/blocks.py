"""Finished blocks of a quantize step on disk, so that hours of calibration survive an interruption."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimtune.arch import Block
from slimtune.errors import FormatError
from slimtune.files import whole_file
from slimtune.linalg.lowrank import Factors
from slimtune.quant.activation import activations_from_dict, activations_to_dict
from slimtune.quant.apply import QuantizedLayer
from slimtune.quant.base import QTensor
from slimtune.quant.layouts import layout_from_dict, layout_to_dict

META = "layers"
START = ":start"


class FolderStore:
    """One safetensors file per block, written whole; its metadata says how each layer is stored and what it lost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, block: Block, layers: list[QuantizedLayer]) -> None:
        """Keep a finished block."""
        facts = {
            layer.name: {
                "layout": layout_to_dict(layer.weight.layout),
                "shape": [layer.weight.layout.out_features, layer.weight.layout.in_features],
                "error": layer.error,
            }
            | ({"activations": activations_to_dict(layer.activations)} if layer.activations is not None else {})
            for layer in layers
        }
        tensors = {f"{layer.name}:{key}": t.cpu() for layer in layers for key, t in layer.weight.tensors.items()}
        for layer in layers:
            if layer.start is not None:
                tensors |= {f"{layer.name}{START}:{key}": t.cpu() for key, t in layer.start._asdict().items()}
        with whole_file(self._path(block)) as partial:
            save_file(tensors, partial, metadata={META: json.dumps(facts)})

    def load(self, block: Block) -> list[QuantizedLayer] | None:
        """The layers of a block that was finished before, `None` where it was not."""
        path = self._path(block)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[META])
            tensors: dict[str, dict[str, Tensor]] = {}
            for key, tensor in load_file(path).items():
                layer, _, name = key.rpartition(":")
                tensors.setdefault(layer, {})[name] = tensor
            return [
                QuantizedLayer(
                    name,
                    QTensor(tensors[name], layout_from_dict(f["layout"], *f["shape"])),
                    f["error"],
                    Factors(**tensors[name + START]) if name + START in tensors else None,
                    activations_from_dict(f["activations"], name) if "activations" in f else None,
                )
                for name, f in facts.items()
            ]
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise FormatError("a kept block is damaged", where=str(path), remedy="delete it and resume") from error

    def _path(self, block: Block) -> Path:
        return self.folder / f"{block.name}.safetensors"
