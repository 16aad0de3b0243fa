"""Textbook versions of what slimtune computes: slow, obviously right, and written from the papers, not from the code.

Everything is float64 and as explicit as the paper is: one bit, one column, one row at a time. Grids are the one place
where a convention must be shared to compare codes exactly: scales are rounded to bfloat16 before anything is rounded
to them, and a search for the least error keeps the first of equals.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Row = np.ndarray  # [n], float64
Matrix = np.ndarray  # [rows, n], float64


def bitstream(codes: Sequence[int], bits: int) -> bytes:
    """The codes written one after another, least significant bit first, padded to whole 32-bit words."""
    number = sum(code << (bits * j) for j, code in enumerate(codes))
    words = (len(codes) * bits + 31) // 32
    return number.to_bytes(4 * words, "little")


def gptq_words(codes: Sequence[int], bits: int) -> list[int]:
    """One output's codes as the 32-bit words of a GPTQ checkpoint's `qweight` column, as AutoGPTQ packs them."""
    if bits != 3:
        per_word = 32 // bits
        words = [codes[i : i + per_word] for i in range(0, len(codes), per_word)]
        return [sum(code << (bits * j) for j, code in enumerate(word)) for word in words]
    words = []
    for i in range(0, len(codes), 32):  # 32 codes in three words: the 11th and the 22nd lie across two of them
        c = codes[i : i + 32]
        words.append(sum(c[j] << (3 * j) for j in range(10)) | (c[10] & 0b011) << 30)
        words.append(c[10] >> 2 | sum(c[11 + j] << (3 * j + 1) for j in range(10)) | (c[21] & 0b001) << 31)
        words.append(c[21] >> 1 | sum(c[22 + j] << (3 * j + 2) for j in range(10)))
    return words


def bfloat16(x: float) -> float:
    """`x` as float32, and then to the nearest bfloat16, ties to even."""
    (word,) = struct.unpack("<I", struct.pack("<f", x))
    word += 0x7FFF + (word >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", word & 0xFFFF0000))[0]


class Levels(NamedTuple):
    """The levels of one group of one row: `(0 - zero) * scale ... (2**bits - 1 - zero) * scale`."""

    scale: float
    zero: int
    bits: int

    def code(self, w: Row) -> Row:
        return np.clip(np.rint(w / self.scale + self.zero), 0, 2**self.bits - 1)

    def value(self, code: Row) -> Row:
        return (code - self.zero) * self.scale


def spanning(low: float, high: float, bits: int, symmetric: bool) -> Levels:
    scale = bfloat16((high - low) / (2**bits - 1)) or 1.0
    zero = 2 ** (bits - 1) if symmetric else min(max(round(-low / scale), 0), 2**bits - 1)
    return Levels(scale, zero, bits)


def ends(w: Row, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        return -float(np.abs(w).max()), float(np.abs(w).max())
    return min(float(w.min()), 0.0), max(float(w.max()), 0.0)


def minmax_levels(w: Row, bits: int, symmetric: bool, importance: Row) -> Levels:
    """Levels from the least to the greatest weight, zero among them; symmetric ones span the greatest magnitude."""
    return spanning(*ends(w, symmetric), bits, symmetric)


def mse_levels(w: Row, bits: int, symmetric: bool, importance: Row) -> Levels:
    """Of the min-max ranges shrunk by 0, 2.5 %, 5 %, ... 67.5 %, the one with the least weighted squared error."""
    low, high = ends(w, symmetric)
    candidates = [spanning(low * s, high * s, bits, symmetric) for s in (1.0 - 0.025 * i for i in range(28))]
    return min(candidates, key=lambda levels: float((importance * (levels.value(levels.code(w)) - w) ** 2).sum()))


FITS: dict[str, Callable[[Row, int, bool, Row], Levels]] = {"minmax": minmax_levels, "mse": mse_levels}


class Quantized(NamedTuple):
    """Codes `[rows, n]`, and scales and zero points `[rows, groups]`."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def rtn(w: Matrix, bits: int, group_size: int, symmetric: bool, grid: str) -> Quantized:
    """Every weight to the nearest level of its group."""
    groups = split(w.shape[1], group_size)
    codes = np.zeros(w.shape)
    levels = [[FITS[grid](row[g], bits, symmetric, np.ones(len(g))) for g in groups] for row in w]
    for r, row in enumerate(w):
        for k, g in enumerate(groups):
            codes[r, g] = levels[r][k].code(row[g])
    return _stored(codes, levels)


def gptq(
    w: Matrix, hessian: Matrix, bits: int, group_size: int, symmetric: bool, grid: str, damp: float, act_order: bool
) -> Quantized:
    """Optimal Brain Quantization in one order for all rows, by its definition (arXiv 2210.17323, equations 2 and 3).

    Quantize one column; spread its error over all others through the inverse Hessian; remove the column from the
    inverse by Gaussian elimination. With `act_order` the columns with the largest diagonal go first, on levels fitted
    beforehand; without, a group's levels are fitted when its first column's turn has come.
    """
    w, importance = w.copy(), np.diag(hessian).copy()
    n = w.shape[1]
    inverse = np.linalg.inv(hessian + damp * importance.mean() * np.eye(n))
    groups = split(n, group_size)
    group_of = {int(j): k for k, g in enumerate(groups) for j in g}
    levels: list[list[Levels]] = [[] for _ in w]

    def fit(k: int) -> None:
        for r, row in enumerate(w):
            levels[r].append(FITS[grid](row[groups[k]], bits, symmetric, importance[groups[k]]))

    if act_order:
        for k in range(len(groups)):
            fit(k)
    codes = np.zeros(w.shape)
    for j in sorted(range(n), key=lambda j: -importance[j]) if act_order else range(n):
        if not act_order and j == groups[group_of[j]][0]:
            fit(group_of[j])
        for r in range(len(w)):
            level = levels[r][group_of[j]]
            codes[r, j] = level.code(w[r, j])
            error = w[r, j] - level.value(codes[r, j])
            w[r] -= error * inverse[j] / inverse[j, j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0.0  # what elimination leaves there in exact arithmetic
    return _stored(codes, levels)


def split(n: int, group_size: int) -> list[np.ndarray]:
    """The columns of each group, left to right; the last group may be shorter, and -1 is one group."""
    size = n if group_size == -1 else group_size
    return [np.arange(start, min(start + size, n)) for start in range(0, n, size)]


def _stored(codes: np.ndarray, levels: list[list[Levels]]) -> Quantized:
    scale = np.array([[level.scale for level in row] for row in levels])
    zero = np.array([[level.zero for level in row] for row in levels])
    return Quantized(codes.astype(int), scale, zero)


def affine(quantized: Quantized, group_size: int) -> Matrix:
    """`W[o, i] = (code[o, i] - zero[o, g(i)]) * scale[o, g(i)]`."""
    w = np.zeros(quantized.codes.shape)
    for k, g in enumerate(split(w.shape[1], group_size)):
        w[:, g] = (quantized.codes[:, g] - quantized.zero[:, [k]]) * quantized.scale[:, [k]]
    return w
