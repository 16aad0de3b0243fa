"""Trellis-coded quantization: 256 numbers as one closed walk through 4,096 states, 2, 3 or 4 bits a step.

A sequence of 256 numbers is stored as 256 symbols of `bits` bits, a ring of bits. The 12 bits that begin at symbol `t`
(little-endian, around the end) are state `t`, and number `t` is its entry in a table of 4,096 normal quantiles.
Neighbouring states share all but `bits` bits, so decoding needs no history, and encoding is a shortest path: Viterbi's
algorithm over all states. Source: QTIP (arXiv 2406.11235), sections 3.1 ("bitshift trellis") and 3.3 (tail-biting).

How states lie in memory: the `12 / bits` symbols of a state are the axes of a cube, symbol `u` on axis `u mod 12/bits`.
A step drops the oldest symbol and takes in a new one *on the same axis*, so it is a minimum over that axis, then a
broadcast along it, and nothing moves. Sequences are the last, contiguous dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from slimtune.linalg.constant import constant
from slimtune.linalg.packing import pack

LENGTH = 12
"""Bits of a state."""

STEPS = 256
"""Numbers of a sequence."""

SEAM = 64
"""Steps around the seam that are walked first, to find where the ring closes."""

_THREE = (2620, 459, 3713, 3010, 3460, 1988, 4095, 2002, 1548, 843, 3849, 1812)
MASKS = {2: (1069, 3957, 2534, 173, 2802, 1999, 571, 1838, 252, 104, 2257, 1154), 3: _THREE, 4: _THREE}
"""The disorder of the table. A random one has distortions of about 0.0712, 0.0190 and 0.0053 on normal numbers; these
have 0.0698, 0.0179 and 0.0046. Found among 300 random invertible maps that send the states which one state leads to,
and those which lead to one, to different halves, quarters, ... of the numbers, by then flipping bits while that helped.
"""

SPREAD = {2: 0.98, 3: 0.95, 4: 0.92}
"""What normal numbers of variance 1 are multiplied by before they are encoded: the best in steps of 0.02."""

LANES, CHUNK, TOGETHER = 16, 48, 192
"""Sequences come in multiples of the first (what products like), take a step together up to the second (the costs of
their states stay in a cache), and are traced back together up to the third (a megabyte of minima each)."""

FAR = 1e30
"""The cost of a state that a walk may not start in."""


@lru_cache(maxsize=4)
def table(bits: int) -> Tensor:
    """The number of every state, float64 `[4096]`: the quantiles of the normal distribution, in disorder.

    Bit `i` of a quantile's rank is the parity of the state's bits under `MASKS[bits][i]`: a linear map over two
    elements, and a permutation.

    >>> values = table(2)
    >>> abs(float(values.mean())) < 1e-12, round(float(values.square().mean()), 3)
    (True, 1.0)
    """
    state = torch.arange(1 << LENGTH, device="cpu")
    rank = torch.zeros(1 << LENGTH, dtype=torch.float64, device="cpu")
    for i, mask in enumerate(MASKS[bits]):
        parity = state & mask
        for shift in (8, 4, 2, 1):
            parity = parity ^ parity >> shift
        rank += (parity & 1) << i
    return math.sqrt(2) * torch.erfinv(2 * (rank + 0.5) / (1 << LENGTH) - 1)


@dataclass(frozen=True)
class Trellis:
    """Index tables of a trellis whose state `s` stands for `numbers[s]`: two or more symbols, each one of `fan`.

    A state is a cube of `order` axes, and step `t` (phase `p = t mod order`) takes the minimum over axis `p`. Place `r`
    of that minimum comes from `fan` states, one for each symbol `j` that is dropped: `number[p, j, r]` is the number of
    that state, `before[p, j, r]` its place in the minimum that the step before has taken. `slopes[p]` (`[states, 2]`,
    states as they lie in the cube) times `[x, 1]` is the cost of a state for `x`, less `x²`.
    """

    order: int
    fan: int
    number: Tensor
    before: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, numbers: Tensor, bits: int) -> Trellis:
        """The trellis with the numbers `[2**length]`; `bits` divides `length`."""
        order, fan, device = (len(numbers).bit_length() - 1) // bits, 1 << bits, numbers.device
        cube = [fan] * order
        places = torch.arange(len(numbers) // fan, device=device).view(cube[1:])
        number, before, slopes = [], [], []
        for phase in range(order):
            # Axis a holds the symbol that is (a - phase) mod order steps away: those bits of the state.
            axes = [torch.arange(fan, device=device) << bits * ((a - phase) % order) for a in range(order)]
            values = numbers[sum(torch.meshgrid(axes, indexing="ij"))]
            label = places.unsqueeze((phase - 1) % order).expand(cube)
            number.append(values.movedim(phase, 0).flatten(1))
            before.append(label.movedim(phase, 0).flatten(1))
            slopes.append(torch.stack([-2 * values.flatten(), values.flatten().square()], 1))
        return cls(order, fan, torch.stack(number), torch.stack(before), torch.stack(slopes))


def viterbi(
    x: Tensor, trellis: Trellis, overlap: Tensor | None = None, *, width: int = 0, room: Tensor | None = None
) -> Tensor:
    """The symbols of the walks whose numbers are nearest to sequences.

    Args:
        x: `[steps, sequences]`.
        trellis: what can be walked.
        overlap: `[order - 1, sequences]`: the symbols that a walk must begin with, and have again after its last step.
        width: sequences that take a step together, a divisor of all; all of them by default.
        room: memory for the minima of every step, `steps * sequences * states / fan` numbers or more.

    Returns int64 `[steps, sequences]`: of the state of every step, the symbol that the next step drops.
    """
    steps, count = x.shape
    order, fan = trellis.order, trellis.fan
    states, width = trellis.slopes.shape[1], width or count
    shape = (count // width, steps, states // fan, width)
    minima = (x.new_empty(math.prod(shape)) if room is None else room[: math.prod(shape)]).view(shape)
    sides = torch.stack([x, torch.ones_like(x)], 1)
    cost = x.new_empty(states, width)
    phases = [_phase(cost, fan, phase) for phase in range(order)]
    slopes = trellis.slopes.unbind()
    for chunk, kept in enumerate(minima):
        part = slice(chunk * width, (chunk + 1) * width)
        if overlap is None:
            cost.zero_()
        else:
            column = torch.arange(width, device=x.device)
            cost.fill_(FAR).view(-1, fan, width)[_place(overlap[:, part], fan), :, column] = 0
        for t, (side, best) in enumerate(zip(sides[:, :, part].unbind(), kept.unbind(), strict=True)):
            cube, halves = phases[t % order]
            best = best.view(len(cube), 1, -1)
            cost.addmm_(slopes[t % order], side)
            for one, other, into in halves:
                torch.minimum(one, other, out=best if into is None else into)
            cube.copy_(best.expand_as(cube))
    return _trace(x, trellis, minima, overlap)


def _phase(cost: Tensor, fan: int, phase: int) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor | None]]]:
    """The costs as a cube with axis `phase` in the middle, and the operands of the minimum over it, half by half: each
    is one vectorised pass. The last has no result of its own."""
    cube = whole = cost.view(fan**phase, fan, -1)
    halves: list[tuple[Tensor, Tensor, Tensor | None]] = []
    while (half := whole.shape[1] // 2) > 1:
        into = torch.empty_like(whole[:, :half], memory_format=torch.contiguous_format)
        halves.append((whole[:, :half], whole[:, half:], into))
        whole = into
    return cube, [*halves, (whole[:, :1], whole[:, 1:], None)]


def _trace(x: Tensor, trellis: Trellis, minima: Tensor, overlap: Tensor | None) -> Tensor:
    """Backwards along the minima: of the states that a minimum may have come from, the one of least cost again."""
    steps, count = x.shape
    order, (_, _, places, width) = trellis.order, minima.shape
    column = torch.arange(count, device=x.device)
    first = column // width * (steps * places * width) + column % width
    offsets = first + torch.arange(-1, steps - 1, device=x.device)[:, None] * (places * width)
    last = (steps - 1) % order
    if overlap is None:
        place = minima[:, -1].argmin(1).flatten()
    else:
        place = _place(overlap[[(axis - last - 1) % order for axis in range(order) if axis != last]], trellis.fan)
    numbers, befores = trellis.number.unbind(), trellis.before.unbind()
    symbols = torch.empty(steps, count, dtype=torch.int64, device=x.device)
    rows = zip(range(steps), x.unbind(), symbols.unbind(), offsets.unbind(), strict=True)
    for t, here, symbol, offset in reversed(list(rows)):
        cost = numbers[t % order].index_select(1, place).sub_(here).square_()
        before = befores[t % order].index_select(1, place)
        if t:
            cost += minima.take(torch.add(offset, before, alpha=width))
        torch.argmin(cost, 0, out=symbol)
        place = before.take(torch.add(column, symbol, alpha=count))
    if overlap is not None:
        symbols[0] = overlap[0]
    return symbols


def _place(symbols: Tensor, fan: int) -> Tensor:
    """The place of a cube's corner with these symbols on its axes (`[axes, n]`)."""
    place = torch.zeros_like(symbols[0])
    for symbol in symbols:
        place = place * fan + symbol
    return place


def closed(x: Tensor, trellis: Trellis, *, width: int = 0, room: Tensor | None = None) -> Tensor:
    """Symbols, int64 `[steps, sequences]`, of closed walks near the sequences `[steps, sequences]`.

    Two shortest paths: a free one through the steps on both sides of the seam, which says what the symbols at the seam
    should be, then the best of all walks that begin and end with those. (Nearly the best closed walk; that one would
    take as many paths as there are overlaps.)
    """
    side = min(SEAM, len(x)) // 2
    seam = viterbi(torch.cat([x[-side:], x[:side]]), trellis, width=width, room=room)
    return viterbi(x, trellis, seam[side : side + trellis.order - 1], width=width, room=room)


class Encoder:
    """Turns sequences of normal numbers of variance 1 into codes. It keeps its working memory for the next call.

    >>> x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    >>> codes = Encoder(bits=4)(x)
    >>> codes.shape, bool((decode(codes, 4, x.dtype) - x).square().mean() < 0.01)
    (torch.Size([2, 128]), True)
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._room = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` is `[sequences, 256]`, the result uint8 `[sequences, 32 * bits]`."""
        trellis = _trellis(self.bits, x.dtype, x.device)
        made = [self._encode(part, trellis) for part in x.split(TOGETHER)]
        return pack(torch.cat(made).to(torch.uint8), self.bits)

    def _encode(self, x: Tensor, trellis: Trellis) -> Tensor:
        chunks = -(-len(x) // CHUNK)
        width = -(-len(x) // (chunks * LANES)) * LANES
        steps = torch.nn.functional.pad(x.T * SPREAD[self.bits], (0, chunks * width - len(x)))
        need = STEPS * chunks * width << LENGTH - self.bits
        if len(self._room) < need or self._room.dtype != x.dtype or self._room.device != x.device:
            self._room = x.new_empty(need)
        return closed(steps, trellis, width=width, room=self._room)[:, : len(x)].T


def decode(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers of codes: uint8 `[n, 32 * bits]` to `dtype [n, 256]`."""
    octets, group = (bits, 8) if bits == 3 else (1, 8 // bits)  # the fewest whole bytes that hold whole symbols
    reach = -(-(LENGTH + bits * (group - 1)) // 8)  # bytes that the states of a group are in
    wide = torch.int32 if reach < 4 else torch.int64
    ring = torch.cat([codes, codes[:, : reach - 1]], 1).to(wide)
    words = ring[:, : codes.shape[1] : octets].clone()
    for i in range(1, reach):
        words |= ring[:, i : i + codes.shape[1] : octets] << 8 * i
    shifts = torch.arange(0, group * bits, bits, dtype=wide, device=codes.device)
    states = (words.unsqueeze(-1) >> shifts) & ((1 << LENGTH) - 1)
    return numbers(bits, dtype, codes.device).index_select(0, states.flatten()).view(len(codes), STEPS)


@lru_cache(maxsize=16)
def _trellis(bits: int, dtype: torch.dtype, device: torch.device) -> Trellis:
    with torch.inference_mode(False):
        return Trellis.of(table(bits).to(device, dtype), bits)


@constant
def numbers(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What every state stands for, `dtype [4096]`: the table, spread back."""
    with torch.inference_mode(False):
        return (table(bits) / SPREAD[bits]).to(device=device, dtype=dtype)
