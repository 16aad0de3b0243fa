"""Packed weights that others wrote, read as ours: GPTQ (v1 and v2), AWQ, and compressed-tensors (`config_groups.py`).

They store affine codes, most as the bitstream that slimtune stores, transposed or not, or float8 numbers, so a layer
becomes a `QTensor` without one code being fitted anew. What a file says that is not understood is refused by name:
guessing decodes to noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from slimtune.arch.weights import Checkpoint
from slimtune.errors import FormatError
from slimtune.export.config_groups import CompressedTensors, is_readable
from slimtune.export.packed import WHERE, Decoded, check_tensor, group_width, qtensor, require_tensors
from slimtune.linalg.packing import octets, pack, row_bytes, unpack

WIDTHS = (2, 3, 4, 8)
Scheme = tuple[int, int, bool]
"""Bits, group size (-1: a whole row), and whether the grid is symmetric."""


class PackedFormat(Protocol):
    """One format of packed linears, made from a folder's `quantization_config`; making it refuses what is unknown.

    Every packed linear has a tensor called `marker`; `tensors` are all that it may have beside its bias.
    """

    marker: ClassVar[str]
    tensors: ClassVar[frozenset[str]]

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """Check the facts. Raises `FormatError`."""

    def decode(self, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> Decoded:
        """The weight of the linear that the model calls `name`, and how it rounds its input. Raises `FormatError`."""


ONLINE = ".R4_input.weight"
"""How the tensors end that an online transform of compressed-tensors has beside a layer's."""


def packed_format(facts: Mapping[str, Any], *, rotated: bool = False) -> PackedFormat | None:
    """The format that a `quantization_config` speaks of, or None where it is none of those read here. Where the model
    is `rotated` by slimtune, its own files say which transforms run online, and not the format."""
    facts = {key: value for key, value in facts.items() if key != "transform_config" or not rotated}
    method = facts.get("quant_method")
    if method == "gptq":
        return Gptq(facts)
    if method == "awq":
        return Awq(facts)
    return CompressedTensors(facts) if method == "compressed-tensors" and is_readable(facts) else None


def read_layers(
    checkpoint: Checkpoint, format: PackedFormat, model: nn.Module, rename: Callable[[str], str]
) -> tuple[dict[str, Decoded], set[str]]:
    """Every packed linear of `checkpoint` by its name in `model`, and how it rounds its input; and the names of the
    tensors that they came from.

    `model` lends the shapes and may be on `meta`. `rename` turns a tensor's name in the file into that in the model.

    Raises `FormatError` where there is none, or one is not a linear of the model, lacks a tensor or has one too many.
    """
    held: dict[str, set[str]] = {}
    for key in checkpoint.files:
        owner, _, leaf = key.rpartition(".")
        held.setdefault(owner, set()).add(leaf)
    packed = {owner: leaves - {"bias"} for owner, leaves in held.items() if (format.tensors - {"weight"}) & leaves}
    if not packed:
        raise FormatError("the model folder has no packed weights", where=str(checkpoint.folder), wanted=format.marker)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {}
    for owner, leaves in packed.items():
        name = rename(f"{owner}.weight").removesuffix(".weight")
        if name not in linears:
            raise FormatError("a packed layer is not a linear of the model", where=WHERE, got=owner)
        if leaves - format.tensors:
            raise FormatError("a packed layer has tensors that are unknown", where=owner, got=sorted(leaves))
        tensors = {leaf: t for leaf in leaves for t in checkpoint.read([f"{owner}.{leaf}"]).values()}
        layers[name] = format.decode(name, tensors, linears[name].out_features, linears[name].in_features)
    return layers, {f"{owner}.{leaf}" for owner, leaves in packed.items() for leaf in leaves}


class Gptq:
    """GPTQ, the format of AutoGPTQ and GPTQModel: codes packed along rows and transposed, zero points along columns.

    v1 stores zero points less one. A layer's width and groups are told by its shapes and its `g_idx`, which say layer
    by layer what `bits`, `group_size` and `dynamic` say for all.
    """

    marker: ClassVar[str] = "qweight"
    tensors: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def __init__(self, facts: Mapping[str, Any]) -> None:
        kind = facts.get("checkpoint_format") or facts.get("format") or "gptq"
        if kind not in ("gptq", "gptq_v2") or facts.get("is_marlin_format"):
            raise FormatError("unknown kind of GPTQ checkpoint", where=WHERE, got=kind, wanted="gptq or gptq_v2")
        if facts.get("pack_dtype", "int32") != "int32":
            raise FormatError("GPTQ codes in unknown words", where=WHERE, got=facts["pack_dtype"], wanted="int32")
        dynamic = facts.get("dynamic") or {}
        try:
            widths = {facts["bits"], *(layer["bits"] for layer in dynamic.values() if layer and "bits" in layer)}
            self.group_size = int(facts["group_size"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError("the GPTQ configuration is malformed", where=WHERE, got=str(dict(facts))[:200]) from error
        if not widths <= set(WIDTHS):
            raise FormatError("unknown width of GPTQ codes", where=WHERE, got=sorted(map(str, widths)), wanted=WIDTHS)
        self.widths, self.less_one = widths, kind == "gptq"

    def decode(self, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> Decoded:
        """The weight of the linear called `name`; its codes are as stored."""
        require_tensors(name, tensors, {"qweight", "qzeros", "scales"})
        shape = tensors["qweight"].shape
        bits = next((b for b in self.widths if tuple(32 * n for n in shape[:1]) == (in_features * b,)), 0)
        if not bits:
            raise FormatError(
                "a packed layer has a wrong tensor",
                where=name,
                got=f"qweight {list(shape)}",
                wanted=f"a column of {in_features} codes of {sorted(self.widths)} bits",
            )
        groups = tensors["scales"].numel() // out_features
        check_tensor(name, tensors["qweight"], (in_features * bits // 32, out_features), torch.int32)
        check_tensor(name, tensors["scales"], (max(1, groups), out_features), None)
        check_tensor(name, tensors["qzeros"], (groups, row_bytes(out_features, bits) // 4), torch.int32)
        words = tensors["qzeros"] + less_one(bits) if self.less_one and bits != 3 else tensors["qzeros"]
        zero = unpack(octets(words), bits, out_features).T
        if self.less_one and bits == 3:
            zero = (zero + 1) & 7
        if "g_idx" in tensors:
            check_tensor(name, tensors["g_idx"], (in_features,), torch.int32)
            group = tensors["g_idx"]
        else:
            group = torch.arange(in_features, dtype=torch.int32) // group_width(self.group_size, in_features)
        codes = octets(tensors["qweight"].T)
        return qtensor(name, codes, tensors["scales"].T, zero, group, bits), None


def less_one(bits: int) -> int:
    """One in every field of a 32-bit word, for widths that divide it.

    GPTQModel makes v1 of v2 by subtracting it and v2 of v1 by adding it, borrows and carries included: a zero point of
    0 comes back only so. Three-bit fields cross words, and are counted one by one there and here.
    """
    return sum(1 << shift for shift in range(0, 32, bits))


class Awq:
    """AWQ in the packing called `gemm`, that of AutoAWQ: eight codes of 4 bits along the rows fill a word, even ones
    first, and zero points likewise. Activations were scaled into the weights before, so nothing else is to be known.
    """

    marker: ClassVar[str] = "qweight"
    tensors: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})

    def __init__(self, facts: Mapping[str, Any]) -> None:
        kind = str(facts.get("version") or facts.get("checkpoint_format") or facts.get("format") or "gemm").lower()
        found = {"version": kind, "bits": facts.get("bits", 4), "zero_point": facts.get("zero_point", True)}
        if list(found.values()) != ["gemm", 4, True] or type(facts.get("group_size", 128)) is not int:
            got = ", ".join(
                f"{key}: {value}" for key, value in {**found, "group_size": facts.get("group_size")}.items()
            )
            wanted = "version: gemm, 4 bits with zero points, a whole group_size"
            raise FormatError("unknown kind of AWQ checkpoint", where=WHERE, got=got[:200], wanted=wanted)
        self.group_size = int(facts.get("group_size", 128))

    def decode(self, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> Decoded:
        """The weight of the linear called `name`; its codes are in another order, and otherwise as stored."""
        require_tensors(name, tensors, set(self.tensors))
        size = group_width(self.group_size, in_features)
        groups = -(-in_features // size)
        check_tensor(name, tensors["qweight"], (in_features, row_bytes(out_features, 4) // 4), torch.int32)
        check_tensor(name, tensors["qzeros"], (groups, row_bytes(out_features, 4) // 4), torch.int32)
        check_tensor(name, tensors["scales"], (groups, out_features), None)
        codes, zero = (_in_order(tensors[leaf], out_features) for leaf in ("qweight", "qzeros"))
        group = torch.arange(in_features, dtype=torch.int32) // size
        return qtensor(name, pack(codes.T, 4), tensors["scales"].T, zero.T, group, 4), None


def _in_order(words: Tensor, length: int) -> Tensor:
    """The codes of AWQ's words: the n-th nibble of a word is feature 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    stored = unpack(octets(words), 4, 8 * words.shape[1]).unflatten(-1, (-1, 2, 4))
    return stored.transpose(-1, -2).flatten(-3)[:, :length]
