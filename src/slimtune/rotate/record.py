"""The rotation is kept: with the model in memory, with its folder on disk, and as a hash with every adapter.

A model whose basis is unknown cannot take an adapter of another basis, or give one away. So a rotated model carries its
`Basis` as a submodule without parameters, `config.json` carries its hash, and its folder holds `rotation.json` and
`rotation.safetensors`, from which the basis is made again (`docs/formats.md`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimtune.arch import ModelMap
from slimtune.errors import FormatError, SlimtuneError
from slimtune.files import write_json
from slimtune.rotate.basis import Basis
from slimtune.rotate.options import Rotation

JSON, TENSORS = "rotation.json", "rotation.safetensors"
KEY = "slimtune_rotation"
"""The submodule that marks a rotated model, and the key of its `config.json` that says so."""

VERSION = 1
GAIN, SCALE = "gain.", "scale."


class Mark(nn.Module):
    """A rotated model's note of its basis. It computes nothing and has no state to save."""

    def __init__(self, basis: Basis) -> None:
        super().__init__()
        self.basis = basis

    def follow_(
        self, model: nn.Module, modelmap: ModelMap, rows: Mapping[str, Collection[int]], blocks: Collection[int]
    ) -> None:
        """Note the basis of `model` when no more than these rows of ports and these blocks are left of it."""
        mark_(model, self.basis.cut(modelmap, rows, blocks))


def mark_(model: nn.Module, basis: Basis) -> None:
    """Note that `model` (a Hugging Face model) lives in `basis`."""
    model.add_module(KEY, Mark(basis))
    noted = {"sha256": fingerprint(basis), "online": list(basis.rotation.online)}
    cast(Any, model).config.slimtune_rotation = noted | (
        {"block_size": block} if (block := basis.rotation.block_size) else {}
    )


def rotation_of(model: nn.Module) -> Basis | None:
    """The basis of a rotated model (plain, quantized or with an adapter); None for a model that is not rotated."""
    return next((module.basis for module in model.modules() if isinstance(module, Mark)), None)


def fingerprint(basis: Basis) -> str:
    """The SHA-256 of all that makes a basis what it is, as hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(_facts(basis), sort_keys=True).encode())
    for name, tensor in sorted(_tensors(basis).items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_rotation(basis: Basis, folder: Path) -> None:
    """Write `rotation.json`, and `rotation.safetensors` where there are gains or learned matrices, to `folder`."""
    tensors = _tensors(basis)
    if tensors:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    write_json(
        folder / JSON, {"version": VERSION, **_facts(basis), "check": _check(basis), "sha256": fingerprint(basis)}
    )


def write_hash(basis: Basis, folder: Path) -> None:
    """Write the `rotation.json` of an adapter: the hash of the basis it was trained in."""
    write_json(folder / JSON, {"version": VERSION, "sha256": fingerprint(basis)})


def read_hash(folder: Path) -> str | None:
    """The hash in the `rotation.json` of `folder`; None where there is no such file."""
    return str(_read(folder / JSON)["sha256"]) if (folder / JSON).is_file() else None


def read_rotation(folder: Path, config: Any) -> Basis | None:
    """The basis of the model in `folder`, None where its `config` does not say that it is rotated.

    Raises `FormatError` when the file is missing or damaged, or describes another rotation than the configuration
    names, or one that this version of slimtune builds differently.
    """
    noted = config.__dict__.get(KEY)
    if noted is None:
        return None
    path = folder / JSON
    if not path.is_file():
        raise FormatError(
            "the model is rotated, and the file that says how is missing",
            where=str(folder),
            wanted=f"{JSON} with sha256 {_short(noted)}",
            remedy="copy it from where the model was made: without it no adapter can be loaded or exported",
        )
    facts = _read(path)
    try:
        basis = _basis(facts, _read_tensors(folder / TENSORS))
        same = all(abs(a - b) < 1e-4 for a, b in zip(facts["check"], _check(basis), strict=True))
    except (LookupError, TypeError, ValueError, RuntimeError, SlimtuneError) as error:
        raise FormatError("the file of a rotation is damaged", where=str(path), got=str(error)[:200]) from error
    if fingerprint(basis) != facts["sha256"]:
        remedy = f"copy {JSON} and {TENSORS} together from where the model was made"
        raise FormatError("the files of the rotation are not one rotation's", where=str(folder), remedy=remedy)
    if facts["sha256"] != noted.get("sha256"):
        raise FormatError(
            "the file of the model's rotation is another rotation's",
            where=str(path),
            got=_short(facts),
            wanted=_short(noted),
        )
    if not same:
        raise FormatError("this version of slimtune builds another rotation from the same seed", where=str(path))
    return basis


def require_basis(model: nn.Module, folder: Path) -> None:
    """Raise `FormatError` unless the adapter in `folder` was trained in the basis that `model` lives in."""
    basis, got = rotation_of(model), read_hash(folder)
    wanted = fingerprint(basis) if basis is not None else None
    if got == wanted:
        return
    remedies = {
        got is None: "turn it with slimtune.rotate_adapter(model, FOLDER, OUTPUT), or load it on the original model",
        wanted is None: "load it on the rotated model, or export it from there with format: peft",
    }
    raise FormatError(
        "the adapter was trained in another basis than the model's",
        where=str(folder),
        got=f"rotation {got[:12]}" if got else "no rotation",
        wanted=f"rotation {wanted[:12]}" if wanted else "no rotation",
        remedy=remedies.get(True, "load it on the model that it was trained on"),
    )


def _short(facts: Any) -> str:
    return str(facts.get("sha256"))[:12]


def _facts(basis: Basis) -> dict[str, Any]:
    sizes = ("width", "kv_heads", "head_dim", "attentions", "residual", "level")
    rotation = asdict(basis.rotation)
    for name in ("block_size", "balance"):
        if not rotation[name]:
            del rotation[name]  # as it was before there were such
    kept = {"kept": basis.kept} if basis.kept else {}  # its absence is what hashes of whole models are made of
    return {**rotation, "online": list(basis.rotation.online), **{name: getattr(basis, name) for name in sizes}, **kept}


def _tensors(basis: Basis) -> dict[str, Tensor]:
    scales = {SCALE + name: scale for name, scale in basis.scales.items()}
    return {**{GAIN + name: gain for name, gain in basis.gains.items()}, **scales, **basis.learned}


def _check(basis: Basis) -> list[float]:
    """A few numbers that another construction would give otherwise: where the first turns take a ramp."""
    turns = [basis.residual_turn] if basis.residual else [] if basis.rotation.folds else [basis.inputs_turn]
    turns += [basis.values_turn(0)] if basis.attentions else []
    ramps = [torch.linspace(1, 2, turn.heads * turn.width, dtype=torch.float64) for turn in turns]
    return [round(float(x), 8) for turn, ramp in zip(turns, ramps, strict=True) for x in turn(ramp)[:4]]


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError("the file of a rotation is not JSON", where=str(path), got=str(error)) from error
    if not isinstance(facts, dict) or facts.get("version") != VERSION or not isinstance(facts.get("sha256"), str):
        got = facts.get("version") if isinstance(facts, dict) else facts
        raise FormatError("not a rotation that slimtune wrote", where=str(path), got=f"version {got!r:.80}")
    return facts


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path) if path.is_file() else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError("a rotation's tensors are damaged", where=str(path), got=str(error)[:200]) from error


def _basis(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Basis:
    fields = {key: facts[key] for key in facts if key not in ("version", "check", "sha256")}
    own = set(asdict(Rotation()))
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items() if key in own}
    rotation = Rotation(**values)
    kept = tuple((number, tuple(heads)) for number, heads in fields.pop("kept", ()))
    return Basis(
        rotation,
        **{key: value for key, value in fields.items() if key not in own},
        kept=kept,
        gains={name.removeprefix(GAIN): t for name, t in tensors.items() if name.startswith(GAIN)},
        scales={name.removeprefix(SCALE): t for name, t in tensors.items() if name.startswith(SCALE)},
        learned={name: t for name, t in tensors.items() if not name.startswith((GAIN, SCALE))},
    )
