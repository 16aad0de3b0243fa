"""The loops of `compiled.c`, which the C compiler of the user's machine compiles on first use, in about two seconds.

What they compute is written in plain torch elsewhere and runs so where there is no compiler: codes are decoded to the
same bits, everything else (weights turned back from a rotated basis, too) is within rounding. One pass over memory
instead of several is what they gain: measured on one core, 1536 x 576 to bfloat16, 0.17, 0.31 and 0.18 ns a weight of
4, 3 and 2 bits where look-ups take 0.70, 0.97 and 0.52. `SLIMTUNE_COMPILED=0` turns them off.

The library is kept in the user's cache folder, under a name made of the source, the compiler and the processor.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from slimtune.files import cache_folder
from slimtune.linalg import lattice

SOURCE = Path(__file__).with_suffix(".c")
WANTED = "SLIMTUNE_COMPILED"
"""The environment variable that turns them off, by `0`."""

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
"""What the C code calls a dtype."""

FEW = 1 << 15
"""Numbers up to which one thread does the work."""

_USUAL = ("-O3", "-std=c11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_PLAIN = "-mno-mmx"
"""On x86 without AVX, GCC 12 goes through MMX registers and leaves them so, after which other libraries' x87
instructions give NaN."""

_PROCESSOR = (
    ("-march=native", "-mprefer-vector-width=512", _PLAIN),
    ("-march=native", _PLAIN),
    ("-mcpu=native",),
    (_PLAIN,),
    (),
)
_THREADS = ("-fopenmp", "-fopenmp-simd")


@cache
def library() -> ctypes.CDLL | None:
    """The loops, or `None` where they are turned off, or no compiler is found, or it fails (then with a warning)."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if os.environ.get(WANTED) == "0" or compiler is None or sys.platform == "win32":
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    facts = SOURCE.read_bytes(), version, repr((_USUAL, _PROCESSOR, _THREADS, torch.cpu.get_capabilities())).encode()
    name, said = f"compiled-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:16]}.so", ""
    for folder in (_cache, _own_folder):  # a library in the cache may not load: cut off, or of another system
        try:
            path = folder() / name
            said = "" if path.exists() else _compile(compiler, path)
            if not said:
                return ctypes.CDLL(str(path))
        except (OSError, RuntimeError) as error:  # a cache that cannot be written, or no home to have one in
            said = str(error)
    warnings.warn(f"slimtune's C loops do not compile and run in plain torch: {said}", RuntimeWarning, stacklevel=2)
    return None


def _cache() -> Path:
    path = cache_folder()
    path.mkdir(parents=True, exist_ok=True)
    return path


def _own_folder() -> Path:
    """A folder for this process alone."""
    path = Path(tempfile.mkdtemp(prefix="slimtune-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _compile(compiler: str, path: Path) -> str:
    """Write the library, for this very processor and with threads where the compiler can; else what it said last."""
    said = ""
    with tempfile.TemporaryDirectory(prefix=".compiled-", dir=path.parent) as scratch:
        for processor, threads in product(_PROCESSOR, _THREADS):
            made = Path(scratch) / path.name
            command = [compiler, *_USUAL, *processor, threads, str(SOURCE), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(made, path)
                return ""
            said = done.stderr.strip()[-400:] or f"{compiler}: status {done.returncode}"
    return said


def fits(*tensors: Tensor | None) -> bool:
    """Whether the loops take these tensors: on a CPU, float32 or bfloat16 (or bytes), and no gradient to be taken.

    Within an `autograd.Function` none is. False where there is no library.
    """
    return (
        all(
            t is None or (t.device.type == "cpu" and t.dtype in KINDS and type(t) in (Tensor, torch.nn.Parameter))
            for t in tensors
        )
        and not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())
        and torch._C._get_tracing_state() is None
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        and library() is not None
    )


def _run(name: str, work: int, *arguments: Tensor | float | None) -> None:
    """Call a loop that works on `work` numbers; tensors live until it returns. Raises `ValueError` on one that is not
    contiguous, or not on a CPU."""
    given: list[int | float | None] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if not (argument.is_cpu and argument.is_contiguous()):
                raise ValueError(f"{name}: a tensor on {argument.device}, strides {argument.stride()}")
            given.append(argument.data_ptr())
        else:
            given.append(argument)
    function = getattr(library(), name)
    if function.argtypes is None:  # the first call: a place takes the same kind of argument in all
        kinds = {float: ctypes.c_float, int: ctypes.c_int64}
        function.argtypes = [kinds.get(type(argument), ctypes.c_void_p) for argument in arguments] + [ctypes.c_int64]
        function.restype = None
    function(*given, torch.get_num_threads() if work > FEW else 1)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _width(levels: Sequence[float]) -> int:
    """Bits of the index of a level."""
    return (len(levels) - 1).bit_length()


def decode_affine(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """`W[o, i] = (q[o, i] - zero[o, g]) * scale[o, g]`, float32 or bfloat16 `[out, in_features]`.

    Packed `codes` uint8 `[out, bytes]`; `scale` and `zero` `[out, groups]`, `None` meaning `2**(bits - 1)`.
    """
    codes, scale, zero = codes.contiguous(), scale.contiguous(), _contiguous(zero)
    weight = torch.empty(len(codes), in_features, dtype=dtype, device="cpu")
    zeros = zero, 0 if zero is None else KINDS[zero.dtype]
    sizes = len(codes), in_features, bits, group_size
    scales = scale, KINDS[scale.dtype]
    _run("decode_affine", weight.numel(), codes, codes.shape[1], *scales, *zeros, *sizes, weight, KINDS[dtype])
    return weight


def decode_codebook(
    codes: Tensor, scale: Tensor, *, levels: Sequence[float], group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """`W[o, i] = levels[q[o, i]] * scale[o, g]`, float32 or bfloat16 `[out, in_features]`, computed in float32.

    Packed `codes` uint8 `[out, bytes]`, as wide as the index of a level; `scale` `[out, groups]`.
    """
    codes, scale, bits = codes.contiguous(), scale.float().contiguous(), _width(levels)
    weight = torch.empty(len(codes), in_features, dtype=dtype, device="cpu")
    table, sizes = torch.tensor(levels, dtype=torch.float32, device="cpu"), (len(codes), in_features, bits, group_size)
    _run("decode_codebook", weight.numel(), codes, codes.shape[1], scale, table, *sizes, weight, KINDS[dtype])
    return weight


def decode_tiles(codes: Tensor, numbers: Tensor, bits: int) -> Tensor:
    """Closed walks that are 16 x 16 tiles, uint8 `[down, across * 32 * bits]`, to float32 `[16 down, 16 across]`;
    `numbers`, float32 `[4096]`, are those of states."""
    codes, down, across = codes.contiguous(), len(codes), codes.shape[1] // (32 * bits)
    out = torch.empty(16 * down, 16 * across, dtype=torch.float32, device="cpu")
    _run("decode_trellis", out.numel(), codes, numbers.contiguous(), down, across, bits, out)
    return out


def decode_lattice(codes: Tensor, bits: int) -> Tensor:
    """Points of E8P, and of what is added to them: uint8 `[..., bits]` to float32 `[..., 8]`."""
    codes, points = codes.contiguous(), codes.numel() // bits
    out = torch.empty(*codes.shape[:-1], lattice.WIDTH, dtype=torch.float32, device="cpu")
    _run("decode_lattice", out.numel(), codes, *lattice.compact(bits), points, 1, bits, out)
    return out


def encode_trellis(x: Tensor, numbers: Tensor, bits: int) -> Tensor:
    """Symbols, uint8 `[n, 256]`, of closed walks near the sequences `x` (float32 `[n, 256]`): as
    `slimtune.linalg.trellis.closed`, 2, 3 or 4 bits a symbol. `numbers`, float32 `[4096]`, are those of states."""
    x, symbols = x.contiguous(), torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    _run("encode_trellis", x.numel() * len(numbers), x, numbers.contiguous(), len(x), bits, symbols)
    return symbols


def multiply_affine(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """`x Wᵀ` of the weight of `decode_affine`, a row of which is decoded at a time: float32 `[tokens, in]` to
    `[tokens, out]`."""
    x, codes, scale, zero = x.contiguous(), codes.contiguous(), scale.contiguous(), _contiguous(zero)
    y, sizes = x.new_empty(len(x), len(codes)), (len(codes), x.shape[1], bits, group_size)
    grid = scale, KINDS[scale.dtype], zero, 0 if zero is None else KINDS[zero.dtype]
    _run("multiply_affine", len(codes) * x.shape[1], x, len(x), codes, codes.shape[1], *grid, *sizes, y)
    return y


def multiply_codebook(x: Tensor, codes: Tensor, scale: Tensor, *, levels: Sequence[float], group_size: int) -> Tensor:
    """The same with the weight of `decode_codebook`."""
    x, codes, scale, bits = x.contiguous(), codes.contiguous(), scale.float().contiguous(), _width(levels)
    y, sizes = x.new_empty(len(x), len(codes)), (len(codes), x.shape[1], bits, group_size)
    table = torch.tensor(levels, dtype=torch.float32, device="cpu")
    _run("multiply_codebook", len(codes) * x.shape[1], x, len(x), codes, codes.shape[1], scale, table, *sizes, y)
    return y


def multiply_trellis(x: Tensor, codes: Tensor, numbers: Tensor, bits: int) -> Tensor:
    """The same with a weight of 16 x 16 walks, `codes` `[out / 16, in / 16 * 32 * bits]`."""
    x, codes, (down, across) = x.contiguous(), codes.contiguous(), (len(codes), x.shape[1] // 16)
    y = x.new_empty(len(x), 16 * down)
    _run("multiply_trellis", y.shape[1] * x.shape[1], x, len(x), codes, numbers.contiguous(), down, across, bits, y)
    return y


def multiply_lattice(x: Tensor, codes: Tensor, bits: int) -> Tensor:
    """The same with a weight of lattice points, `codes` `[out, in / 8 * bits]`."""
    x, codes, points = x.contiguous(), codes.contiguous(), x.shape[1] // lattice.WIDTH
    y = x.new_empty(len(x), len(codes))
    tables = lattice.compact(bits)
    _run("multiply_lattice", len(codes) * x.shape[1], x, len(x), codes, *tables, len(codes), points, bits, y)
    return y


def turn_rows_(x: Tensor, matrices: Sequence[Tensor]) -> None:
    """Multiply every row of `x`, contiguous float32 `[rows, n]`, by a Kronecker product of matrices, in place."""
    rows, n = x.shape
    _run("transform", x.numel(), x, 1, n, n, rows, *_orders(matrices), x, 1, n, n, None, None, 0)


def turn_columns(x: Tensor, matrices: Sequence[Tensor], down: Tensor, across: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of every column of `x`, float32 `[n, columns]`, and of that `len(down)` rows and `len(across)` columns,
    times these: `dtype [rows, columns]`."""
    x, down, across = x.contiguous(), down.contiguous(), across.contiguous()
    y = torch.empty(len(down), len(across), dtype=dtype, device="cpu")
    sizes = len(across), 1, len(down), down, across, KINDS[dtype]
    _run("transform", x.numel(), x, x.shape[1], 1, len(x), len(across), *_orders(matrices), y, *sizes)
    return y


def _orders(matrices: Sequence[Tensor]) -> tuple[int, Tensor, Tensor]:
    """How many matrices, their orders, and all their numbers."""
    numbers = torch.cat([matrix.to(torch.float32).flatten() for matrix in matrices])
    return len(matrices), torch.tensor([len(matrix) for matrix in matrices], device="cpu"), numbers


def norm(x: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`x gain / rms(x)` over the last dimension, and `1 / rms(x)`, float32 `[..., 1]`; `gain` is float32."""
    x, gain = x.contiguous(), gain.contiguous()
    y, inverse = torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device="cpu")
    sizes = inverse.numel(), x.shape[-1]
    _run("norm", x.numel(), x, gain, float(epsilon), *sizes, y, inverse, KINDS[x.dtype])
    return y, inverse


def norm_backward(x: Tensor, gain: Tensor, inverse: Tensor, up: Tensor) -> Tensor:
    """The gradient to `x`, of the gradient `up` to `y`."""
    x, gain, up = x.contiguous(), gain.contiguous(), up.contiguous()
    to_x, sizes = torch.empty_like(x), (inverse.numel(), x.shape[-1])
    _run("norm_backward", x.numel(), x, gain, inverse, up, *sizes, to_x, KINDS[x.dtype])
    return to_x


def gated(gate: Tensor, value: Tensor) -> Tensor:
    """`silu(gate) * value`, of one dtype."""
    gate, value = gate.contiguous(), value.contiguous()
    y, sizes = torch.empty_like(gate), (gate.numel() // max(1, gate.shape[-1]), gate.shape[-1])
    _run("gated", gate.numel(), gate, value, *sizes, y, KINDS[gate.dtype])
    return y


def gated_backward(gate: Tensor, value: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients to both, of the gradient `up` to their product."""
    gate, value, up = gate.contiguous(), value.contiguous(), up.contiguous()
    to_gate, to_value = torch.empty_like(gate), torch.empty_like(value)
    sizes = gate.numel() // max(1, gate.shape[-1]), gate.shape[-1]
    _run("gated_backward", gate.numel(), gate, value, up, *sizes, to_gate, to_value, KINDS[gate.dtype])
    return to_gate, to_value


def turn(x: Tensor, cosine: Tensor, sine: Tensor, *, back: bool = False) -> Tensor:
    """RoPE of `x` `[..., heads, width]` by tables `[..., width]`, or its transpose: the gradient."""
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    y, sizes = torch.empty_like(x), (cosine.numel() // x.shape[-1], x.shape[-2], x.shape[-1])
    _run("turn", x.numel(), x, cosine, sine, int(back), *sizes, y, KINDS[x.dtype])
    return y


def probabilities_(scores: Tensor, level: Tensor, scale: float, *, queries: int, start: int, causal: bool) -> None:
    """Scores, float32 `[..., keys]`, become `exp(scale * score - level)`; where `causal`, 0 for keys behind a query.

    `level` has a number a row. Rows are runs of `queries` queries, the first of which stands at `start`.
    """
    sizes = level.numel(), scores.shape[-1], queries, start
    _run("probabilities", scores.numel(), scores, level.contiguous(), float(scale), *sizes, int(causal))


def softmax_(scores: Tensor, scale: float, *, queries: int, start: int, causal: bool) -> Tensor:
    """Scores, float32 `[..., keys]`, become `softmax(scale * score)` (scale > 0); their log-sum-exp, `[...]`.

    Rows and `causal` are as above. A row of nothing but minus infinity becomes 0, its log-sum-exp infinity.
    """
    level = torch.empty(scores.shape[:-1], dtype=torch.float32, device="cpu")
    sizes = level.numel(), scores.shape[-1], queries, start
    _run("softmax", scores.numel(), scores, level, float(scale), *sizes, int(causal))
    return level


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale q kᵀ) v` of few queries: `q` `[batch, heads, queries, width]`, `k` and `v` `[batch, key-value
    heads, keys, width]`; `mask` is what may be seen, bool, and expands to `[batch, heads, queries, keys]`.

    A query that sees nothing gets 0.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    y, (keys, width) = torch.empty_like(q), k.shape[2:]
    seen = None if mask is None else mask.expand(*q.shape[:-1], keys).contiguous().view(torch.uint8)
    sizes = q.numel() // width, q.shape[1] // k.shape[1] * q.shape[2], keys, width
    _run("attend", q.numel() * keys, q, k, v, seen, float(scale), *sizes, y, KINDS[q.dtype])
    return y


def slopes_(grad: Tensor, probability: Tensor, less: Tensor) -> None:
    """Gradients to probabilities become gradients to their scores, `(grad - less) * probability`: float32 `[..., n]`
    and, `less`, a number a row."""
    _run("slopes", grad.numel(), grad, probability, less.contiguous(), less.numel(), grad.shape[-1])


def cross_entropy_(logits: Tensor, labels: Tensor, *, slope: bool) -> Tensor:
    """`-log softmax(logits)[label]` of each row of `[n, vocabulary]`; logits become its gradient where `slope`.

    Raises `IndexError` on a label outside the vocabulary.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise IndexError(f"labels from {int(labels.min())} to {int(labels.max())}, {logits.shape[1]} logits")
    loss, labels = torch.empty(len(logits), dtype=torch.float32, device="cpu"), labels.to(torch.int64)
    _run(
        "cross_entropy",
        logits.numel(),
        logits,
        labels.contiguous(),
        *logits.shape,
        loss,
        int(slope),
        KINDS[logits.dtype],
    )
    return loss


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The least value of each row of `[n, width]` or 0, and the greatest or 0: float32 `[n, 1]`."""
    x = x.contiguous()
    low, high = (torch.empty(len(x), 1, dtype=torch.float32, device="cpu") for _ in range(2))
    _run("ends", x.numel(), x, *x.shape, low, high, KINDS[x.dtype])
    return low, high


def round_rows(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes of the rows of `x` `[n, width]`, uint8, around 128; `scale` and `zero` are float32 `[n, 1]`."""
    x, codes = x.contiguous(), torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    grid = scale.contiguous(), None if zero is None else zero.contiguous()
    _run("round_rows", x.numel(), x, *grid, *x.shape, float(2 ** (bits - 1)), codes, KINDS[x.dtype])
    return codes


def rescale(product: Tensor, scale: Tensor, zero: Tensor | None, sums: Tensor, out: Tensor) -> None:
    """`(product - zero * sums) * scale` into `out` `[n, width]`; `scale` and `zero` are `[n, 1]`, `sums` `[width]`."""
    rows = scale.contiguous(), None if zero is None else zero.contiguous(), sums.contiguous()
    _run("rescale", product.numel(), product, *rows, *product.shape, out, KINDS[out.dtype])
