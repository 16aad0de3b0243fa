"""compressed-tensors folders, read config group by config group: each has a format, a scheme and its own inputs.

`pack-quantized` has the bitstream that slimtune stores; `int-quantized` has a signed byte a code, whatever its bits,
`float-quantized` a float8 number, and `naive-quantized` is either of these two. A folder may mix them all. A scale may
belong to rows and columns together: it is then repeated for each row, as slimtune's layouts have them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimtune.errors import FormatError
from slimtune.export.packed import WHERE, Decoded, check_tensor, group_width, qtensor, require_tensors, scales_of
from slimtune.linalg.levels import FLOAT8
from slimtune.linalg.packing import octets, pack, row_bytes, unpack
from slimtune.quant.activation import Activations
from slimtune.quant.base import QTensor
from slimtune.quant.layouts import Codebook

GROUPED = {"weight_scale", "weight_zero_point"}
TENSORS = {
    "pack-quantized": GROUPED | {"weight_packed", "weight_shape", "weight_g_idx"},
    "int-quantized": GROUPED | {"weight"},
    "float-quantized": {"weight", "weight_scale"},
}
"""The tensors that a layer of each format may have."""

INPUTS = {"input_scale", "input_zero_point"}
"""And those where the range of its input is static."""

NAIVE = {"int": "int-quantized", "float": "float-quantized"}


@dataclass(frozen=True)
class Group:
    """What a config group says of its layers; a scale belongs to `rows` and `columns` (-1: all of them)."""

    format: str
    bits: int
    rows: int
    columns: int
    symmetric: bool
    inputs: Activations | None


def is_readable(facts: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` of compressed-tensors names a format that is read here, for whatever layers."""
    groups = facts.get("config_groups")
    told = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    return not {*TENSORS, "naive-quantized"}.isdisjoint({str(known.get("format")) for known in (facts, *told)})


class CompressedTensors:
    """A folder of compressed-tensors, by its `quantization_config`; packed words are dense (0.17 and later; 2, 4 and 8
    bits of any version)."""

    marker: ClassVar[str] = "weight_scale"
    tensors: ClassVar[frozenset[str]] = frozenset(INPUTS.union(*TENSORS.values()))

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.groups: dict[str, Group] = {}
        try:
            unread = [key for key in ("kv_cache_scheme", "transform_config") if facts.get(key)]
            if (facts.get("sparsity_config") or {}).get("format", "dense") != "dense":
                unread.append("sparsity_config")
            for group in facts["config_groups"].values():
                self.groups |= dict.fromkeys(group["targets"], _group(group, facts.get("format")))
            self.ignore = list(facts.get("ignore") or ())
            for target in (*self.groups, *self.ignore):
                re.compile(target.removeprefix("re:"))
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            got = str(facts.get("config_groups"))[:200]
            raise FormatError("the compressed-tensors configuration is malformed", where=WHERE, got=got) from error
        if unread:
            raise FormatError("compressed-tensors with more than packed weights", where=WHERE, got=", ".join(unread))

    def decode(self, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> Decoded:
        """The weight of the linear called `name`, its codes as stored, and how it rounds its input."""
        group = self._group_of(name)
        static = group.inputs is not None and group.inputs.static
        if unknown := tensors.keys() - TENSORS[group.format] - (INPUTS if static else set()):
            what = f"a packed layer has tensors that are unknown in {group.format}"
            raise FormatError(what, where=name, got=sorted(unknown), wanted=sorted(TENSORS[group.format]))
        weight = DECODERS[group.format](group, name, tensors, out_features, in_features)
        return weight, _in_range(group.inputs, name, tensors) if group.inputs is not None else None

    def _group_of(self, name: str) -> Group:
        """The group of a layer by the first target that matches, in the library's order: names say more than patterns,
        and these more than a class."""
        if not any(_matches(name, target) for target in self.ignore):
            for target in sorted(self.groups, key=lambda target: (target == "Linear", "re:" in target, target)):
                if _matches(name, target):
                    return self.groups[target]
        raise FormatError("no group of the configuration has this packed layer", where=WHERE, got=name)


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in (name, "Linear")


def _group(group: Mapping[str, Any], format: Any) -> Group:
    """What a config group says, in a folder of this `format`. Raises `FormatError` where it says more than is read."""
    weights: Mapping[str, Any] = group["weights"]
    kind, format = weights.get("type", "int"), group.get("format") or format
    format = NAIVE.get(kind) if format == "naive-quantized" else format
    bits, strategy, symmetric = int(weights["num_bits"]), weights["strategy"], weights.get("symmetric", True)
    sizes = {"channel": (1, -1), "group": (1, weights.get("group_size") or 0)}
    if format != "pack-quantized":
        sizes |= {"tensor": (-1, -1), "block": weights.get("block_structure") or (0, 0)}
    rows, columns = (int(size) for size in sizes.get(strategy, (0, 0)))
    float8 = format == "float-quantized"
    faults = {
        "format": format not in TENSORS,
        "output_activations": group.get("output_activations"),
        "type": kind != ("float" if float8 else "int"),
        "num_bits": bits != 8 if float8 else not 1 <= bits <= 8,
        "strategy": strategy not in sizes or (strategy == "block" and min(rows, columns) < 1),
        "group_size": strategy == "group" and columns < 1,
        "symmetric": symmetric is not True if float8 else not isinstance(symmetric, bool),
        "actorder": format != "pack-quantized" and weights.get("actorder") in ("group", "dynamic", True),
    }
    if unknown := [key for key, fault in faults.items() if fault]:
        said = {**weights, **group, "format": format}
        raise FormatError(
            "compressed-tensors weights of an unknown kind",
            where=WHERE,
            got=", ".join(f"{key}: {said.get(key)}" for key in unknown)[:200],
            wanted="integer codes of 1 to 8 bits or float8, a scale for each channel or group (where a weight is a "
            "byte, for each tensor or block, too), and outputs left alone",
        )
    return Group(format, bits, rows, columns, symmetric, _rounding(group.get("input_activations")))


def _rounding(facts: Mapping[str, Any] | None) -> Activations | None:
    """How `input_activations` rounds; a static range is in a layer's tensors. Raises `FormatError` on the unknown."""
    if not facts:
        return None
    bits, kind, symmetric = facts["num_bits"], facts.get("type", "int"), facts.get("symmetric", True)
    how = facts.get("strategy"), facts.get("dynamic", False)
    size = int(facts.get("group_size") or 0) if how[0] == "group" else -1
    known = how in (("token", True), ("tensor", False)) or (how == ("group", True) and size > 0)
    whole = kind == "int" and bits in range(2, 9) and isinstance(symmetric, bool)
    if not known or not (whole or (kind == "float" and bits == 8 and symmetric is True)) or facts.get("scale_dtype"):
        raise FormatError(
            "compressed-tensors rounds inputs in an unknown way",
            where=WHERE,
            got=f"input_activations: {dict(facts)}"[:200],
            wanted="integers of 2 to 8 bits or float8: dynamic per token or group, or static per tensor",
        )
    return Activations(bits, kind, symmetric, group_size=size, static=not how[1])


def _in_range(inputs: Activations, name: str, tensors: Mapping[str, Tensor]) -> Activations:
    """`inputs` of the linear called `name`, with the range that its tensors say, where that is static."""
    if not inputs.static:
        return inputs
    require_tensors(name, tensors, INPUTS if not inputs.sym else {"input_scale"})
    check_tensor(name, tensors["input_scale"].reshape(-1), (1,), None)
    scale = float(scales_of(name, tensors["input_scale"])[1])
    if scale <= 0:
        raise FormatError("the range of a layer's input is empty", where=name, got=f"input_scale: {scale}")
    if inputs.type == "float":
        return replace(inputs, low=-FLOAT8 * scale, high=FLOAT8 * scale)
    levels = 2**inputs.bits
    zero = _unsigned(name, tensors.get("input_zero_point"), (1,), inputs.bits, inputs.sym)
    below = (levels - 1) / 2 if inputs.sym else int(zero)  # steps of the grid below 0
    return replace(inputs, low=-below * scale, high=(levels - 1 - below) * scale)


def _unsigned(name: str, stored: Tensor | None, shape: tuple[int, ...], bits: int, symmetric: bool = False) -> Tensor:
    """int8 numbers of `bits` bits as uint8 of this shape, the least as 0; zeros where there are none.

    Raises `FormatError` where one does not fit its bits, or is not 0 in spite of a grid that is `symmetric`.
    """
    half = 2 ** (bits - 1)
    if stored is None:
        return torch.full(shape, half, dtype=torch.uint8)
    stored = stored.reshape(shape) if stored.numel() == 1 else stored
    check_tensor(name, stored, shape, torch.int8)
    least, most = (0, 0) if symmetric else (-half, half - 1)
    if stored.numel() and not least <= int(stored.min()) <= int(stored.max()) <= most:
        got, wanted = f"{int(stored.min())} to {int(stored.max())}", f"{least} to {most}"
        raise FormatError("a packed layer has codes or zero points out of range", where=name, got=got, wanted=wanted)
    return (stored.to(torch.int16) + half).to(torch.uint8)


def _packed(group: Group, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> QTensor:
    required = {"weight_packed", "weight_scale"}
    require_tensors(name, tensors, required if group.symmetric else required | {"weight_zero_point"})
    bits, size = group.bits, group_width(group.columns, in_features)
    groups = -(-in_features // size)
    check_tensor(name, tensors["weight_packed"], (out_features, row_bytes(in_features, bits) // 4), torch.int32)
    check_tensor(name, tensors["weight_scale"], (out_features, groups), None)
    shape = tensors.get("weight_shape", torch.tensor([out_features, in_features])).tolist()
    if shape != [out_features, in_features]:
        wanted = [out_features, in_features]
        raise FormatError("a packed layer has another shape", where=name, got=shape, wanted=wanted)
    zero = torch.full((out_features, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not group.symmetric:
        words = tensors["weight_zero_point"]
        check_tensor(name, words, (row_bytes(out_features, bits) // 4, groups), torch.int32)
        zero = unpack(octets(words.T), bits, out_features).T
    order = tensors.get("weight_g_idx", torch.arange(in_features, dtype=torch.int32) // size)
    check_tensor(name, order, (in_features,), torch.int32)
    return qtensor(name, octets(tensors["weight_packed"]), tensors["weight_scale"], zero, order, bits)


def _bytes(group: Group, name: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> QTensor:
    required = {"weight", "weight_scale"}
    require_tensors(name, tensors, required if group.symmetric else required | {"weight_zero_point"})
    rows, size = group_width(group.rows, out_features), group_width(group.columns, in_features)
    counts = -(-out_features // rows), -(-in_features // size)
    scale = tensors["weight_scale"]
    scale = scale.reshape(1, 1) if scale.numel() == 1 else scale
    check_tensor(name, scale, counts, None)
    scale = scale.repeat_interleave(rows, 0)[:out_features]
    if group.format == "float-quantized":
        check_tensor(name, tensors["weight"], (out_features, in_features), torch.float8_e4m3fn)
        return _float8(name, tensors["weight"], scale, size)
    codes = _unsigned(name, tensors["weight"], (out_features, in_features), group.bits)
    zero = _unsigned(name, tensors.get("weight_zero_point"), counts, group.bits, group.symmetric)
    zero = zero.repeat_interleave(rows, 0)[:out_features]
    order = torch.arange(in_features, dtype=torch.int32) // size
    return qtensor(name, pack(codes, group.bits), scale, zero, order, group.bits)


def _float8(name: str, weight: Tensor, scale: Tensor, size: int) -> QTensor:
    """`weight` `[out, in]` with a scale for each row and `size` columns."""
    codes = weight.view(torch.uint8)
    if bool(((codes & 127) == 127).any()):
        raise FormatError("a packed layer has weights that are not finite", where=name)
    dtype, scale = scales_of(name, scale)
    layout = Codebook(codes.shape[0], codes.shape[1], "e4m3fn", size, scale_dtype=dtype)
    return QTensor({"codes": pack(codes, 8), "scale": scale}, layout)


DECODERS: dict[str, Callable[[Group, str, Mapping[str, Tensor], int, int], QTensor]] = {
    "pack-quantized": _packed,
    "int-quantized": _bytes,
    "float-quantized": _bytes,
}
