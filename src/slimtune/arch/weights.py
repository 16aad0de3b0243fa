"""The weights of a model on disk: a Hugging Face folder of safetensors, read a few tensors at a time.

Only safetensors are read, never pickles. Everything that can be wrong with such a folder is found when it is opened,
before anything is allocated.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slimtune.errors import FormatError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class Checkpoint:
    """The tensors of a model folder, by name: the one in the file (`stored`), or what `rename` makes of it.

    Raises `FormatError` when the folder has no safetensors, when a shard is missing, truncated or not safetensors at
    all, or when the index names a tensor that its shard does not hold.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] = str) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.stored: dict[str, str] = {}
        if (folder / INDEX).is_file():
            shards = _index(folder / INDEX)
        elif (folder / SINGLE).is_file():
            shards = {SINGLE: None}
        else:
            pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
            raise FormatError(
                "the model folder has no safetensors weights",
                where=str(folder),
                got=", ".join(pickles) or "no weight file",
                wanted=f"{SINGLE} or {INDEX}",
                remedy="pickles can run code and are not read: convert them with save_pretrained" if pickles else "",
            )
        for shard, promised in shards.items():
            held = _names(folder / shard)
            missing = sorted(set(promised or ()) - set(held))
            if missing:
                raise FormatError("the weight index names tensors its file lacks", where=shard, got=missing[:5])
            names = {rename(key): key for key in (held if promised is None else promised)}
            self.files.update(dict.fromkeys(names, folder / shard))
            self.stored.update(names)

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies of the named tensors; floating-point ones are converted to `dtype` where it is given."""
        tensors: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise FormatError("a weight is missing", where=str(self.folder), wanted=name)
            by_file.setdefault(self.files[name], []).append(name)
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as shard:
                for name in wanted:
                    tensor = shard.get_tensor(self.stored[name])
                    convert = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    tensors[name] = tensor.to(convert, copy=True)  # a view would keep the whole file mapped
        return tensors

    def materialise_(self, module: nn.Module, prefix: str, dtype: torch.dtype, skip: tuple[str, ...] = ()) -> None:
        """Load every parameter and buffer of `module` (called `prefix` in the model) that is still on `meta`.

        Tensors called one of `skip`, or below a module of that name, are left alone.
        """
        dot = f"{prefix}." if prefix else ""
        owners = [
            (owner, leaf, f"{dot}{path}.{leaf}" if path else f"{dot}{leaf}", tensor)
            for path, owner in module.named_modules()
            for leaf, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
            if tensor.device.type == "meta"
        ]
        owners = [row for row in owners if not any(row[2] == s or row[2].startswith(f"{s}.") for s in skip)]
        for owner, leaf, name, old in owners:
            loaded = self.read([name], dtype)  # one at a time: a file is mapped only while a tensor is copied
            if loaded[name].shape != old.shape:
                raise FormatError(
                    "a weight has the wrong shape", where=name, got=list(loaded[name].shape), wanted=list(old.shape)
                )
            if isinstance(old, nn.Parameter):
                setattr(owner, leaf, nn.Parameter(loaded[name], requires_grad=old.requires_grad))
            else:
                setattr(owner, leaf, loaded[name])


def require_finite(model: nn.Module, prefix: str = "") -> None:
    """Raise `FormatError` at the first parameter in memory of `model` (called `prefix` in a larger one) with a value
    that is no finite number. Weights that others packed (tensors of types of their own, float8) are not looked at."""
    for name, parameter in model.named_parameters(prefix):
        tensor = parameter.detach()
        plain = type(parameter) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.itemsize > 1
        if tensor.is_meta or not plain or not tensor.numel():
            continue
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):  # one pass, and no copy
            raise FormatError("a weight is not finite", where=name, remedy="get the model's files again")


def require_logits(model: nn.Module, logits: Tensor) -> None:
    """Raise `FormatError` where `logits` that `model` computed are no numbers; it names the weight, where one is so."""
    if not math.isfinite(logits.max()):
        require_finite(model)
        raise FormatError(
            "the model's logits are not finite", got=float(logits.max()), remedy="use dtype: float32 or bfloat16"
        )


def _index(path: Path) -> dict[str, list[str] | None]:
    try:
        shard_of: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str] | None] = {}
        for name, shard in shard_of.items():
            if Path(shard).name != shard:
                raise FormatError("the weight index points outside its folder", where=str(path), got=shard)
            names = shards.setdefault(shard, [])
            assert names is not None
            names.append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError("the weight index is malformed", where=str(path), wanted="JSON with a weight_map") from error
    return shards


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise FormatError("a weight file is missing", where=str(path))
    try:
        with safe_open(path, framework="pt") as shard:
            return list(shard.keys())
    except (SafetensorError, struct.error, OSError, ValueError) as error:
        raise FormatError(
            "a weight file is truncated or not safetensors",
            where=str(path),
            got=f"{path.stat().st_size} bytes: {error}",
        ) from error
