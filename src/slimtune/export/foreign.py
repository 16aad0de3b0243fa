"""Packed weights that others wrote, read as ours: GPTQ (v1 and v2), AWQ, and compressed-tensors `pack-quantized` and
`float-quantized`.

The last stores float8 numbers, the others affine codes, most as the bitstream that slimtune stores, transposed or not,
so a layer becomes a `QTensor` without one code being fitted anew. What a file says that is not understood is refused by
name: guessing decodes to noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from slimtune.arch.weights import Checkpoint
from slimtune.errors import FormatError
from slimtune.linalg.levels import FLOAT8
from slimtune.linalg.packing import octets, pack, row_bytes, unpack
from slimtune.quant.activation import Activations
from slimtune.quant.base import QTensor
from slimtune.quant.layouts import Affine, Codebook, Layout
from slimtune.quant.scattered import SCALES, Scattered

WIDTHS = (2, 3, 4, 8)
WHERE = "config.json, quantization_config"

Scheme = tuple[int, int, bool]
"""Bits, group size (-1: a whole row), and whether the grid is symmetric; of float8, the rows and columns that share a
scale (-1: all), and True."""


class PackedFormat(Protocol):
    """One format of packed linears, made from a folder's `quantization_config`; making it refuses what is unknown.

    Every packed linear has a tensor called `marker`; `tensors` are all that it may have beside its bias.
    """

    marker: ClassVar[str]
    tensors: ClassVar[frozenset[str]]

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """Check the facts. Raises `FormatError`."""

    def decode(self, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> QTensor:
        """The weight of the linear called `name`. Raises `FormatError`."""

    def rounding(self, name: str) -> Activations | None:
        """How the linear called `name`, decoded before, rounds its input."""


def packed_format(facts: Mapping[str, Any]) -> PackedFormat | None:
    """The format that a `quantization_config` speaks of, or None where it is none of those read here."""
    method = facts.get("quant_method")
    if method == "gptq":
        return Gptq(facts)
    if method == "awq":
        return Awq(facts)
    kind = {"pack-quantized": PackQuantized, "float-quantized": FloatQuantized}.get(str(facts.get("format")))
    return kind(facts) if kind is not None and method == "compressed-tensors" else None


def read_layers(
    checkpoint: Checkpoint, format: PackedFormat, model: nn.Module, rename: Callable[[str], str]
) -> tuple[dict[str, tuple[QTensor, Activations | None]], set[str]]:
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
        weight = format.decode(owner, tensors, linears[name].out_features, linears[name].in_features)
        layers[name] = weight, format.rounding(owner)
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

    def decode(self, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> QTensor:
        """The weight of the linear called `name`; its codes are as stored."""
        _require(name, tensors, {"qweight", "qzeros", "scales"})
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
        _check(name, tensors["qweight"], (in_features * bits // 32, out_features), torch.int32)
        _check(name, tensors["scales"], (max(1, groups), out_features), None)
        _check(name, tensors["qzeros"], (groups, row_bytes(out_features, bits) // 4), torch.int32)
        words = tensors["qzeros"] + less_one(bits) if self.less_one and bits != 3 else tensors["qzeros"]
        zero = unpack(octets(words), bits, out_features).T
        if self.less_one and bits == 3:
            zero = (zero + 1) & 7
        if "g_idx" in tensors:
            _check(name, tensors["g_idx"], (in_features,), torch.int32)
            group = tensors["g_idx"]
        else:
            group = torch.arange(in_features, dtype=torch.int32) // _width(self.group_size, in_features)
        codes = octets(tensors["qweight"].T)
        return _qtensor(name, codes, tensors["scales"].T, zero, group, bits)

    def rounding(self, name: str) -> None:
        """Inputs are left alone."""


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

    def decode(self, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> QTensor:
        """The weight of the linear called `name`; its codes are in another order, and otherwise as stored."""
        _require(name, tensors, set(self.tensors))
        size = _width(self.group_size, in_features)
        groups = -(-in_features // size)
        _check(name, tensors["qweight"], (in_features, row_bytes(out_features, 4) // 4), torch.int32)
        _check(name, tensors["qzeros"], (groups, row_bytes(out_features, 4) // 4), torch.int32)
        _check(name, tensors["scales"], (groups, out_features), None)
        codes, zero = (_in_order(tensors[leaf], out_features) for leaf in ("qweight", "qzeros"))
        group = torch.arange(in_features, dtype=torch.int32) // size
        return _qtensor(name, pack(codes.T, 4), tensors["scales"].T, zero.T, group, 4)

    def rounding(self, name: str) -> None:
        """Inputs are left alone."""


def _in_order(words: Tensor, length: int) -> Tensor:
    """The codes of AWQ's words: the n-th nibble of a word is feature 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    stored = unpack(octets(words), 4, 8 * words.shape[1]).unflatten(-1, (-1, 2, 4))
    return stored.transpose(-1, -2).flatten(-3)[:, :length]


class PackQuantized:
    """compressed-tensors `pack-quantized` in dense words (0.17 and later; 2, 4 and 8 bits of any version)."""

    marker: ClassVar[str] = "weight_packed"
    tensors: ClassVar[frozenset[str]] = frozenset(
        {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
    )

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.schemes: list[tuple[list[str], tuple[Scheme, Activations | None]]] = []
        self.found: dict[str, Activations] = {}
        try:
            unread = [key for key in ("kv_cache_scheme", "transform_config") if facts.get(key)]
            if (facts.get("sparsity_config") or {}).get("format", "dense") != "dense":
                unread.append("sparsity_config")
            for group in facts["config_groups"].values():
                self.schemes.append((list(group["targets"]), (self.scheme(group), _rounding(group))))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            got = str(facts.get("config_groups"))[:200]
            raise FormatError("the compressed-tensors configuration is malformed", where=WHERE, got=got) from error
        if unread:
            raise FormatError("compressed-tensors with more than packed weights", where=WHERE, got=", ".join(unread))

    def scheme(self, group: Mapping[str, Any]) -> Scheme:
        """What a config group says of weights. Raises `FormatError` where it says more than whole numbers in groups."""
        weights: Mapping[str, Any] = group["weights"]
        bits, strategy, symmetric = int(weights["num_bits"]), weights["strategy"], weights["symmetric"]
        size = int(weights["group_size"]) if strategy == "group" else -1
        faults = {
            "format": group.get("format", "pack-quantized") != "pack-quantized",
            "output_activations": group.get("output_activations"),
            "type": weights.get("type", "int") != "int",
            "num_bits": not 1 <= bits <= 8,
            "strategy": strategy not in ("group", "channel"),
            "group_size": strategy == "group" and size < 1,
            "symmetric": not isinstance(symmetric, bool),
        }
        _refuse(group, faults, "integer codes of 1 to 8 bits in groups or channels")
        return bits, size, symmetric

    def decode(self, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> QTensor:
        """The weight of the linear called `name`; its codes are as stored."""
        bits, size, symmetric = self._group_of(name)[0]
        _require(name, tensors, {"weight_packed", "weight_scale"} | (set() if symmetric else {"weight_zero_point"}))
        size = _width(size, in_features)
        groups = -(-in_features // size)
        _check(name, tensors["weight_packed"], (out_features, row_bytes(in_features, bits) // 4), torch.int32)
        _check(name, tensors["weight_scale"], (out_features, groups), None)
        shape = tensors.get("weight_shape", torch.tensor([out_features, in_features])).tolist()
        if shape != [out_features, in_features]:
            wanted = [out_features, in_features]
            raise FormatError("a packed layer has another shape", where=name, got=shape, wanted=wanted)
        zero = torch.full((out_features, groups), 2 ** (bits - 1), dtype=torch.uint8)
        if not symmetric:
            words = tensors["weight_zero_point"]
            _check(name, words, (row_bytes(out_features, bits) // 4, groups), torch.int32)
            zero = unpack(octets(words.T), bits, out_features).T
        group = tensors.get("weight_g_idx", torch.arange(in_features, dtype=torch.int32) // size)
        _check(name, group, (in_features,), torch.int32)
        return _qtensor(name, octets(tensors["weight_packed"]), tensors["weight_scale"], zero, group, bits)

    def rounding(self, name: str) -> Activations | None:
        """How the linear called `name` rounds its input."""
        return self._group_of(name)[1]

    def _group_of(self, name: str) -> tuple[Scheme, Activations | None]:
        for matches in (_names, _is_class):  # a name says more than a class
            for targets, scheme in self.schemes:
                if any(matches(name, target) for target in targets):
                    return scheme
        raise FormatError("no group of the configuration has this packed layer", where=WHERE, got=name)


class FloatQuantized(PackQuantized):
    """compressed-tensors `float-quantized`: float8 weights, with a scale for each row, group, block, or for all."""

    marker: ClassVar[str] = "weight_scale"
    tensors: ClassVar[frozenset[str]] = frozenset({"weight", "weight_scale", "input_scale"})

    def scheme(self, group: Mapping[str, Any]) -> Scheme:
        """The rows and columns of a weight that share a scale. Raises `FormatError` where it is not float8."""
        weights: Mapping[str, Any] = group["weights"]
        strategy, block = weights["strategy"], weights.get("block_structure") or (0, 0)
        sizes = {"tensor": (-1, -1), "channel": (1, -1), "group": (1, weights.get("group_size") or 0), "block": block}
        rows, columns = (int(size) for size in sizes.get(strategy, (0, 0)))
        faults = {
            "format": group.get("format") not in (None, "float-quantized"),
            "output_activations": group.get("output_activations"),
            "type": weights["type"] != "float",
            "num_bits": weights["num_bits"] != 8,
            "strategy": not rows or not columns or min(rows, columns) < -1,
            "symmetric": weights.get("symmetric", True) is not True,
        }
        _refuse(group, faults, "float8 weights with a scale for each channel, group, block or tensor")
        return rows, columns, True

    def decode(self, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> QTensor:
        """The weight of the linear called `name`; its codes are as stored, and a scale is repeated for its rows."""
        rows, columns, _ = self._group_of(name)[0]
        _require(name, tensors, {"weight", "weight_scale"})
        if (rounding := self._group_of(name)[1]) is not None and rounding.static:
            _require(name, tensors, {"input_scale"})
            end = FLOAT8 * float(_scales(name, tensors["input_scale"])[1].max())
            self.found[name] = replace(rounding, low=-end, high=end)
        weight, scale = tensors["weight"], tensors["weight_scale"]
        _check(name, weight, (out_features, in_features), torch.float8_e4m3fn)
        rows, size = _width(rows, out_features), _width(columns, in_features)
        counts = -(-out_features // rows), -(-in_features // size)
        scale = scale.reshape(1, 1) if scale.numel() == 1 else scale
        _check(name, scale, counts, None)
        codes = weight.view(torch.uint8)
        if bool(((codes & 127) == 127).any()):
            raise FormatError("a packed layer has weights that are not finite", where=name)
        dtype, scale = _scales(name, scale.repeat_interleave(rows, 0)[:out_features])
        layout = Codebook(out_features, in_features, "e4m3fn", size, scale_dtype=dtype)
        return QTensor({"codes": pack(codes, 8), "scale": scale}, layout)

    def rounding(self, name: str) -> Activations | None:
        """How the linear called `name`, decoded before, rounds its input: a static range is in its tensors."""
        return self.found.get(name, super().rounding(name))


def _refuse(group: Mapping[str, Any], faults: Mapping[str, Any], wanted: str) -> None:
    """Raise `FormatError` where a config group has faults, by the names of its fields."""
    unknown = [key for key, fault in faults.items() if fault]
    if unknown:
        raise FormatError(
            "compressed-tensors weights of an unknown kind",
            where=WHERE,
            got=", ".join(f"{key}: {group.get(key, group['weights'].get(key))}" for key in unknown)[:200],
            wanted=f"{wanted}, and outputs left alone",
        )


def _rounding(group: Mapping[str, Any]) -> Activations | None:
    """How a config group rounds inputs. Raises `FormatError` where that is not dynamic per token, or in float8."""
    facts = group.get("input_activations")
    if not facts:
        return None
    bits, kind, symmetric = facts["num_bits"], facts.get("type", "int"), facts.get("symmetric", True)
    how, size = (facts.get("strategy"), facts.get("dynamic")), facts.get("group_size")
    known = how == ("token", True) and isinstance(symmetric, bool) and bits in range(2, 9) and kind == "int"
    static = how == ("tensor", False) and group["weights"].get("type") == "float"
    if kind == "float" and bits == 8 and symmetric is True:
        known = static or how == ("token", True) or (how == ("group", True) and isinstance(size, int) and size > 0)
    if not known or facts.get("scale_dtype"):
        raise FormatError(
            "compressed-tensors rounds inputs in an unknown way",
            where=WHERE,
            got=f"input_activations: {dict(facts)}"[:200],
            wanted="dynamic integers of 2 to 8 bits per token, or float8 per token, group or tensor",
        )
    return Activations(bits, kind, symmetric, group_size=size if how[0] == "group" else -1, static=static)


def _names(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _is_class(name: str, target: str) -> bool:
    return target == "Linear"


def _qtensor(name: str, codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int) -> QTensor:
    """The narrowest layout that says the same; `scale` and `zero` are `[out, groups]`, `group` `[in]`."""
    (rows, groups), columns = scale.shape, len(group)
    dtype, scale = _scales(name, scale)
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    tensors = {"codes": codes, "scale": scale, "zero": zero.contiguous(), "group": group}
    size = max(1, int((group == 0).sum()))
    layout: Layout
    if -(-columns // size) == groups and torch.equal(group, torch.arange(columns, dtype=torch.int32) // size):
        layout = Affine(rows, columns, bits, size, symmetric, scale_dtype=dtype)
    else:
        layout = Scattered(rows, columns, bits, groups, symmetric, scale_dtype=dtype)
        layout.check(group, name)
    return QTensor({leaf: tensors[leaf] for leaf in layout.tensors()}, layout)


def _scales(name: str, scale: Tensor) -> tuple[str, Tensor]:
    """The first dtype that holds all scales, by its name, and the scales in it."""
    if not bool(scale.isfinite().all()):
        raise FormatError("a packed layer has scales that are not finite", where=name)
    dtype = next((key for key, kind in SCALES.items() if exact(scale, kind)), "")
    if not dtype:
        raise FormatError("a packed layer has scales of an unknown dtype", where=name, got=str(scale.dtype))
    return dtype, scale.to(SCALES[dtype]).contiguous()


def exact(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value of `tensor` is one of `dtype`."""
    return torch.equal(tensor.to(dtype).to(torch.float64), tensor.to(torch.float64))


def _width(group_size: Any, in_features: int) -> int:
    return in_features if group_size == -1 else max(1, min(int(group_size), in_features))


def _require(name: str, tensors: Mapping[str, Tensor], wanted: set[str]) -> None:
    missing = sorted(wanted - set(tensors))
    if missing:
        raise FormatError("a packed layer lacks tensors", where=name, got=sorted(tensors), wanted=missing)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Raise `FormatError` unless `tensor` has this shape, and this dtype (a float, where it is None)."""
    kind = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if tuple(tensor.shape) != shape or not kind:
        raise FormatError(
            "a packed layer has a wrong tensor",
            where=name,
            got=f"{tensor.dtype} {list(tensor.shape)}",
            wanted=f"{dtype or 'floats'} {list(shape)}",
        )
