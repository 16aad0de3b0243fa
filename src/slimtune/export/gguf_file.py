"""What a GGUF file claims, checked before anything believes it.

The `gguf` package reads a file by following the numbers in it, and a hostile one sends it round for ever. This walks
the header once, by the length of the file, and allocates nothing that the file does not hold.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from slimtune.errors import FormatError

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The type numbers of GGUF that have one size, as `struct` calls them."""
KINDS = {kind.value for kind in GGMLQuantizationType}
ALIGNMENT = 32


@dataclass(frozen=True)
class Header:
    """The plain values of a file (arrays are passed over), and its tensors: ggml's type and shape, rows first."""

    values: dict[str, bool | int | float | str] = field(default_factory=dict)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """What `general.architecture` says."""
        return str(self.values.get("general.architecture", ""))


def read_header(path: Path) -> Header:
    """The header of the GGUF file `path`. Raises `FormatError` when it is none, or speaks of what the file lacks."""
    with path.open("rb") as file:
        reader = _Reader(file, path)
        if reader.take(4) != MAGIC:
            raise FormatError("not a GGUF file", where=str(path), wanted="a file that begins with GGUF")
        version = reader.number("I")
        if version not in VERSIONS:
            raise FormatError("unknown version of GGUF", where=str(path), got=version, wanted=VERSIONS)
        tensors, pairs = int(reader.number("Q")), int(reader.number("Q"))
        header = Header()
        for _ in range(pairs):
            key = reader.text()
            value = reader.value(int(reader.number("I")))
            if value is not None:
                header.values[key] = value
        ends = [reader.tensor(header) for _ in range(tensors)]
        alignment = int(header.values.get("general.alignment", ALIGNMENT))
        if alignment < 1:
            raise reader.broken("an alignment that is none", alignment)
        start = -(-file.tell() // alignment) * alignment
        if ends and start + max(ends) > reader.size:
            raise reader.broken("tensors beyond the end of the file", f"{reader.size:,} bytes")
    if not header.architecture:
        raise FormatError("the GGUF file does not name its architecture", where=str(path))
    return header


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, os.fstat(file.fileno()).st_size

    def broken(self, what: str, got: object = "") -> FormatError:
        return FormatError(f"the GGUF file is damaged: {what}", where=str(self.path), got=got)

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise self.broken("it ends too soon", f"{self.size:,} bytes")
        return self.file.read(count)

    def number(self, kind: str) -> int | float | bool:
        values: tuple[int | float | bool, ...] = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return values[0]

    def text(self) -> str:
        try:
            return self.take(int(self.number("Q"))).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken("a name that is no text") from error

    def value(self, kind: int, depth: int = 0) -> bool | int | float | str | None:
        if kind == STRING:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY or depth > 1:
            raise self.broken("a value of unknown type", kind)
        inner, count = int(self.number("I")), int(self.number("Q"))
        if inner in NUMBERS:
            self.take(count * struct.calcsize(f"<{NUMBERS[inner]}"))
        else:
            for _ in range(count):  # each takes bytes of the file, so there is an end
                self.value(inner, depth + 1)
        return None

    def tensor(self, header: Header) -> int:
        """Read one tensor's entry into `header`; where its data end, from where all data begin."""
        name, dims = self.text(), int(self.number("I"))
        if name in header.tensors or not 1 <= dims <= 4:
            raise self.broken("a tensor that is there twice, or has no shape", name)
        shape = tuple(int(self.number("Q")) for _ in range(dims))  # columns first, as ggml counts
        kind, offset = int(self.number("I")), int(self.number("Q"))
        if kind not in KINDS:
            raise self.broken("a tensor of unknown type", f"{name}: {kind}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if shape[0] % block:
            raise self.broken("a row that is not made of whole blocks", name)
        header.tensors[name] = GGMLQuantizationType(kind).name, shape[::-1]
        return offset + prod(shape) // block * size
