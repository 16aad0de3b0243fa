"""Rotating a model folder with one block of it in memory: the weights go from file to file.

What is computed is what `rotate_` computes, by the same functions in the same order, so the bits are the same. The gate
is the same too: logits of the whole model on the same probe, before, and after from the files as they were written. A
forward pass needs one block at a time as well, and so do looking at activations and learning from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from slimtune.arch import ModelMap, bind
from slimtune.arch.weights import INDEX
from slimtune.calib.ondemand import empty_
from slimtune.errors import RecipeError
from slimtune.export.base import own_state, stock_config
from slimtune.export.load import DTYPES, Loaded, load
from slimtune.files import whole_folder, write_json
from slimtune.rotate.fuse import RotateFacts, Rotating, begin_, compared, finish_, probe, turn_
from slimtune.rotate.options import Rotation
from slimtune.rotate.record import write_rotation


def rotate_folder(
    source: Loaded,
    output: Path,
    rotation: Rotation,
    *,
    tokens: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, all: None,
) -> RotateFacts:
    """Write `source`, rotated, to the folder `output` (whole, or not at all), one file for each block.

    Args:
        source: a model loaded lazily. It is used up: nothing of it is in memory afterwards.
        output: where the folder goes.
        rotation: which rotation.
        tokens: windows `[samples, length]` to learn from, where the rotation is learned or balances.
        progress: called with (finished parts, all parts): the blocks, and what stands outside them.

    Raises `RecipeError` where the model was not loaded lazily, and whatever `rotate_` raises.
    """
    start = time.perf_counter()
    model, modelmap = source.model, bind(source.model)
    if source.materialise is None:
        raise RecipeError(
            "the weights of this model cannot be read block by block",
            where=source.name,
            remedy="rotate it in memory: leave out stream",
        )
    for norm in modelmap.norms:
        source.materialise(model.get_submodule(norm.name), norm.name)
    with source.blocks_on_demand():
        before = probe(model, modelmap)
        plan = begin_(model, modelmap, rotation, tokens=tokens, lazy=True)
    dtype = next(name for name, kind in DTYPES.items() if kind == model.dtype)
    with whole_folder(output) as partial:
        _write(source, plan, partial, progress)
        written = load(str(partial), dtype=dtype, lazy=True)
        with written.blocks_on_demand():
            error = compared(probe(written.model, modelmap), before, modelmap.family)
    return plan.facts(error, time.perf_counter() - start)


def _write(source: Loaded, plan: Rotating, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Turn and write part after part, each under the names that its weights have in the files of `source`."""
    model, modelmap = source.model, bind(source.model)
    assert source.materialise is not None and source.checkpoint is not None, "the caller has checked it"
    parts, index, size = modelmap.parts, dict[str, str](), 0
    for number, block in enumerate(parts, start=1):
        if block is not None:
            name = modelmap.blocks[block].name
            source.materialise(model.get_submodule(name), name)
        turn_(model, modelmap, plan, block)
        modules = _modules(model, modelmap, block)
        state = {f"{name}.{leaf}": tensor for name, m in modules.items() for leaf, tensor in own_state(m).items()}
        stored = {
            source.checkpoint.stored.get(n, n): t for n, t in state.items() if n not in model.all_tied_weights_keys
        }
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(stored, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(stored, file))
        size += sum(tensor.nbytes for tensor in stored.values())
        del state, stored
        empty_(
            (module, leaf) for module in modules.values() for leaf, _ in list(module.named_parameters(recurse=False))
        )
        progress(number, len(parts))
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})
    finish_(model, plan)
    config = stock_config(deepcopy(model.config))
    config.dtype, config.architectures = model.dtype, [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    write_rotation(plan.basis, folder)


def _modules(model: nn.Module, modelmap: ModelMap, block: int | None) -> dict[str, nn.Module]:
    """The modules of one part of `model`, by name."""
    roots = tuple(f"{each.name}." for each in modelmap.blocks)
    if block is not None:
        return {name: m for name, m in model.named_modules() if f"{name}.".startswith(roots[block])}
    return {name: m for name, m in model.named_modules() if not f"{name}.".startswith(roots)}
