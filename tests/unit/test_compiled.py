"""The loops in C against the formulas in float64, and against the plain torch that runs where there is no compiler."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.utils.flop_counter
from torch import Tensor, nn
from torch.nn.functional import silu

from slimtune.kernels import compiled, int8
from slimtune.kernels.attention import attention
from slimtune.kernels.dispatch import (
    decode_lattice,
    decode_tiles,
    dequantize_affine,
    dequantize_codebook,
    encode_trellis,
)
from slimtune.kernels.rows import gated_silu, rms_norm, rotary
from slimtune.linalg import lattice, trellis
from slimtune.linalg.hadamard import matrix, small_factors
from slimtune.linalg.packing import pack
from slimtune.quant import QUANTIZERS, rotated

needed = pytest.mark.skipif(compiled.library() is None, reason="no C compiler")
HALVES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL | None:
    """The loops as they are compiled where nothing is known of the processor."""
    compiler, path = shutil.which("cc") or shutil.which("gcc"), tmp_path_factory.mktemp("portable") / "loops.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_PROCESSOR", compiled._PROCESSOR[-2:])
        return ctypes.CDLL(str(path)) if compiler and not compiled._compile(compiler, path) else None


@pytest.fixture(params=[(1, False), (3, False), (1, True)], ids=["1", "3", "portable"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, portable: ctypes.CDLL | None) -> None:
    """One thread, and more than divide the rows; and the loops of any processor."""
    monkeypatch.setattr(compiled, "FEW", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param[0])
    if request.param[1] and portable is not None:
        monkeypatch.setattr(compiled, "library", lambda: portable)


def close(got: Tensor, wanted: Tensor) -> None:
    """Within a rounding of the dtype of `got`."""
    exact = wanted.to(torch.float64)
    room = 2**-8 if got.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(got.to(torch.float64), exact, rtol=room, atol=room * float(exact.detach().abs().mean()))


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zeros", ["none", "whole", "any"])
@pytest.mark.parametrize(("dtype", "scales"), [*product(HALVES, HALVES)])
def test_weights_are_decoded_to_the_same_bits(
    bits: int, zeros: str, dtype: torch.dtype, scales: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for columns, group in [(64, 32), (50, 16), (7, 7), (1, 8), (129, 64), (300, 300)]:
        groups = -(-columns // group)
        q = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
        scale = torch.rand(5, groups).to(scales)
        zero = None if zeros == "none" else torch.randint(0, 2**bits, (5, groups), dtype=torch.uint8)
        zero = (torch.randn(5, groups) * 3).to(torch.bfloat16) if zeros == "any" else zero
        index = torch.arange(columns) // group
        z = torch.full((5, columns), 2.0 ** (bits - 1)) if zero is None else zero.float()[:, index]
        wanted = ((q.float() - z) * scale.float()[:, index]).to(dtype)
        work = torch.float32 if zeros == "any" or scales == torch.float32 else dtype
        given = {"bits": bits, "group_size": group, "in_features": columns, "dtype": dtype, "work": work}
        real = compiled.decode_affine
        monkeypatch.setattr(
            compiled, "decode_affine", lambda *args, real=real, **rest: taken.append(real(*args, **rest))
        )
        dequantize_affine(pack(q, bits), scale, zero, **given)
        assert torch.equal(taken[-1], wanted)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "library", lambda: None)
            assert torch.equal(dequantize_affine(pack(q, bits), scale, zero, **given), wanted)
        monkeypatch.setattr(compiled, "decode_affine", real)
    assert len(taken) == 6


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", HALVES)
def test_codebooks_are_decoded_to_the_same_bits(bits: int, dtype: torch.dtype) -> None:
    levels = torch.randn(2**bits).tolist()
    for columns, group in [(64, 32), (50, 16), (7, 7), (1, 8), (129, 64)]:
        q, scale = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8), torch.rand(5, -(-columns // group))
        wanted = torch.tensor(levels)[q.int()] * scale[:, torch.arange(columns) // group]
        given = {"levels": levels, "group_size": group, "in_features": columns, "dtype": dtype}
        assert torch.equal(compiled.decode_codebook(pack(q, bits), scale, **given), wanted.to(dtype))
        assert torch.equal(dequantize_codebook(pack(q, bits), scale, **given), wanted.to(dtype))


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 37), (1, 1), (3, 200)])
def test_norms_and_gates_are_the_formulas(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, y, up = (torch.randn(shape).mul(4).to(dtype) for _ in range(3))
    gain = torch.rand(shape[-1])
    wide, other = (t.double().requires_grad_() for t in (x, y))
    half, value = x.clone().requires_grad_(), y.clone().requires_grad_()
    for got, wanted, of, exact in [
        (
            rms_norm(half, gain, 0.1),
            nn.functional.rms_norm(wide, shape[-1:], gain.double(), 0.1),
            [half],
            [wide],
        ),
        (gated_silu(half, value), silu(wide) * other, [half, value], [wide, other]),
    ]:
        close(got, wanted)
        truth = torch.autograd.grad(wanted, exact, up.double())
        for mine, theirs in zip(torch.autograd.grad(got, of, up), truth, strict=True):
            close(mine, theirs)


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 12), (37, 74), (20, 100), (48, 7), (17, 192)])
def test_transforms_are_the_matrices(dtype: torch.dtype, rows: int, columns: int) -> None:
    x = torch.randn(rows, columns)
    turned = x.clone()
    compiled.turn_rows_(turned, small_factors(columns))
    close(turned, x.double() @ matrix(columns).T)
    keep, left = max(1, rows - 3), max(1, columns - 2)
    down, across = torch.randn(keep), torch.randn(left)
    got = compiled.turn_columns(x, [factor.T for factor in small_factors(rows)], down, across, dtype)
    wanted = (matrix(rows).T @ x.double())[:keep, :left] * down.double()[:, None] * across.double()
    assert got.dtype == dtype
    close(got, wanted)


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 16, 35])
def test_walks_are_as_near_as_the_references(bits: int, count: int) -> None:
    x = torch.randn(count, 256) * torch.tensor([1.0, 0.0, 9.0])[torch.arange(count) % 3, None]
    encoder = trellis.Encoder(bits)
    codes, exact = encode_trellis(x, encoder), x.double()
    mine, reference = (trellis.decode(found, bits, torch.float64) for found in (codes, encoder(exact)))
    far = [(found - exact).square().sum(1) for found in (mine, reference)]
    torch.testing.assert_close(far[0], far[1], rtol=1e-5, atol=1e-5)
    same = codes == encoder(exact)
    assert float(same[0::3].float().mean()) > 0.99  # of zeros, many walks are equally near


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_points_are_decoded_to_the_same_bits(bits: int) -> None:
    count = 1 << 16 if bits == 2 else 5000
    first = torch.arange(count) if bits == 2 else torch.randint(0, 1 << 16, (count,))
    codes = torch.stack([first & 255, first >> 8, *torch.randint(0, 256, (bits - 2, count))], 1).to(torch.uint8)
    wanted = lattice.decode(codes, torch.float32)
    assert torch.equal(compiled.decode_lattice(codes, bits), wanted)
    assert torch.equal(decode_lattice(codes.view(8, -1, bits), torch.float32), wanted.view(8, -1, 8))


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_walks_are_decoded_to_the_same_bits(bits: int) -> None:
    codes = torch.randint(0, 256, (5, 7 * 32 * bits), dtype=torch.uint8)
    wanted = torch.empty(80, 112)
    for i, j in product(range(5), range(7)):
        walk = codes[i, j * 32 * bits : (j + 1) * 32 * bits]
        tile = trellis.decode(walk[None], bits, torch.float32).view(16, 16)
        wanted[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] = tile
    assert torch.equal(compiled.decode_tiles(codes, trellis.numbers(bits, torch.float32, codes.device), bits), wanted)
    assert torch.equal(decode_tiles(codes, bits, torch.float32), wanted)
    assert torch.equal(decode_tiles(codes, bits, torch.float64).float(), wanted)


@needed
@pytest.mark.parametrize("method", ["quip", "trellis"])
@pytest.mark.parametrize("shape", [(50, 72), (24, 100)])
def test_rotated_weights_are_those_of_plain_torch(
    method: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = QUANTIZERS[method](bits=2)(torch.randn(shape), {"hessian": torch.eye(shape[1])})
    monkeypatch.setattr(rotated, "PIECE", 20 * shape[1])  # several pieces
    found = []
    for library in (compiled.library, lambda: None):
        monkeypatch.setattr(compiled, "library", library)
        found.append(weight.dequantize(torch.float32))
        close(weight.dequantize(torch.bfloat16), found[0])
    exact = weight.dequantize(torch.float64)
    assert not torch.equal(*found)  # both ways were taken
    for each in found:
        torch.testing.assert_close(each.double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


@needed
@pytest.mark.parametrize("dtype", HALVES)
def test_gates_at_their_ends(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e30, -200.0, -90.0, -88.0, 0.0, 88.0, 90.0, 200.0, 1e30], dtype=dtype)
    got = compiled.gated(x, torch.ones_like(x))
    close(got, silu(x.double()))
    wide = x.double().requires_grad_()
    slope = torch.autograd.grad(silu(wide).sum(), wide)[0]
    for_gate, _ = compiled.gated_backward(x, torch.ones_like(x), torch.ones_like(x))
    torch.testing.assert_close(for_gate.double(), slope, rtol=2**-8, atol=2e-5)  # 1.8e-35 of -1e30
    assert got.isfinite().all()
    broken = torch.full((2, 20), torch.nan, dtype=dtype)
    assert compiled.gated(broken, broken).isnan().all()
    assert compiled.norm(broken, torch.ones(20), 0.1)[0].isnan().all()
    assert compiled.cross_entropy_(broken, torch.tensor([3, 4]), slope=True).isnan().all() and broken.isnan().all()


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch", [1, 3])
def test_rope_is_the_formula(dtype: torch.dtype, batch: int) -> None:
    x = torch.randn(3, 7, 2, 10).to(dtype).transpose(1, 2).requires_grad_()
    cosine, sine = torch.randn(2, batch, 7, 10).to(dtype)  # whose halves differ, as no model's do
    wide = x.detach().double().requires_grad_()
    half = torch.cat([-wide[..., 5:], wide[..., :5]], -1)
    wanted = wide * cosine.double().unsqueeze(1) + half * sine.double().unsqueeze(1)
    got, up = rotary(x, cosine, sine), torch.randn(wanted.shape).to(dtype)
    close(got, wanted)
    close(torch.autograd.grad(got, x, up)[0], torch.autograd.grad(wanted, wide, up.double())[0])


@needed
@pytest.mark.usefixtures("threads")
def test_probabilities_and_slopes_are_the_formulas() -> None:
    scores, level = torch.randn(2, 3, 4, 9).mul(5), torch.randn(2, 3, 4)
    hidden = torch.ones(4, 9, dtype=torch.bool).triu(6)  # queries 5 to 8 of 9 keys
    for causal in (False, True):
        wanted = (scores.double() * 0.3 - level.double().unsqueeze(-1)).exp()
        wanted = wanted.masked_fill(hidden, 0) if causal else wanted
        got = scores.clone().view(2, 12, 9)
        compiled.probabilities_(got, level, 0.3, queries=4, start=5, causal=causal)
        close(got.view_as(wanted), wanted)
        grad = torch.randn(2, 3, 4, 9)
        expected = (grad.double() - level.double().unsqueeze(-1)) * got.view_as(grad).double()
        compiled.slopes_(grad, got, level)
        close(grad, expected)
    hidden_away = torch.tensor([[0.0, -torch.inf, -1e5]])
    compiled.probabilities_(hidden_away, torch.zeros(1), 1.0, queries=1, start=0, causal=False)
    assert hidden_away.tolist() == [[1.0, 0.0, 0.0]]


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_is_the_formula(causal: bool) -> None:
    scores = torch.randn(2, 3, 4, 9).mul(50)  # exp of some is more than float32 holds
    scores[0, 0, 1, :8], scores[1, 2, 3] = -torch.inf, -torch.inf
    wide = scores.double() * 1.5
    wide = wide.masked_fill(torch.ones(4, 9, dtype=torch.bool).triu(6), -torch.inf) if causal else wide
    got = scores.clone()
    level = compiled.softmax_(got, 1.5, queries=4, start=5, causal=causal)
    close(got, wide.softmax(-1).nan_to_num(0))
    sees = wide.isfinite().any(-1)
    close(level[sees], wide.logsumexp(-1)[sees])
    assert bool((level[~sees] == torch.inf).all()) and int((~sees).sum()) == 1 + causal
    for row in ([0.0, torch.nan, 1.0], [-torch.inf, -torch.nan, -torch.inf]):
        poor = torch.tensor([row])
        assert bool(compiled.softmax_(poor, 1.0, queries=1, start=0, causal=False).isnan().all())
        assert bool(poor.isnan().all())


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", ["none", "one of all", "each head"])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_of_few_queries_is_the_formula(dtype: torch.dtype, mask: str, queries: int) -> None:
    q, k, v = (torch.randn(2, heads, n, 20).to(dtype) for heads, n in ((6, queries), (2, 11), (2, 11)))
    seen = (
        None
        if mask == "none"
        else torch.rand(2 if mask == "each head" else 1, 6 if mask == "each head" else 1, queries, 11) < 0.5
    )
    if seen is not None:
        seen[..., -1, :] = False  # the last query sees nothing
    wide = (t.double().repeat_interleave(3, 1) for t in (k, v))
    got = compiled.attend(q, k.mT.contiguous().mT, v, seen, 0.7)
    wanted = nn.functional.scaled_dot_product_attention(q.double(), *wide, attn_mask=seen, scale=0.7).nan_to_num(0)
    close(got, wanted)
    assert seen is None or not got[:, :, -1].any()
    v[1, 1, 4] = torch.nan  # of one key of the last three heads
    poor = compiled.attend(q, k, v, None, 0.7).isnan()
    assert bool(poor[1, 3:].all()) and not poor[0].any() and not poor[1, :3].any()


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("slope", [False, True])
def test_cross_entropy_is_the_formula(dtype: torch.dtype, slope: bool) -> None:
    logits, labels = torch.randn(5, 301).mul(20).to(dtype), torch.randint(0, 301, (5,))
    logits[1, 7] = -torch.inf
    before = logits.clone()
    wide = logits.double().requires_grad_()
    wanted = nn.functional.cross_entropy(wide, labels, reduction="none")
    close(compiled.cross_entropy_(logits, labels, slope=slope), wanted)
    with pytest.raises(IndexError, match="from 301"):
        compiled.cross_entropy_(logits, torch.full((5,), 301), slope=slope)
    if slope:
        torch.testing.assert_close(logits.double(), torch.autograd.grad(wanted.sum(), wide)[0], rtol=2**-8, atol=2e-6)
    else:
        assert torch.equal(logits, before)


@needed
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(5, 37), (1, 1), (3, 128)])
def test_rounding_is_that_of_plain_torch(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randn(shape).mul(3).to(dtype)
    x[0] = x[0].abs()
    low, high = compiled.ends(x)
    assert torch.equal(low, x.float().amin(1, keepdim=True).clamp(max=0))
    assert torch.equal(high, x.float().amax(1, keepdim=True).clamp(min=0))
    for symmetric in (False, True):

        def grid(low: Tensor, high: Tensor, symmetric: bool = symmetric) -> tuple[Tensor, Tensor]:
            scale = (torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15).clamp(min=1e-9)
            return scale, torch.full_like(scale, 8.0) if symmetric else (-low / scale).round()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "library", lambda: None)
            wanted = int8.round_tokens(x, 4, grid, symmetric=symmetric)
        got = int8.round_tokens(x, 4, grid, symmetric=symmetric)
        assert torch.equal(got.codes, wanted.codes) and torch.equal(got.scale, wanted.scale)
        assert got.zero is wanted.zero is None or torch.equal(got.zero, wanted.zero)
    product, sums, out = torch.randn(shape), torch.randn(shape[1]), torch.empty(shape, dtype=dtype)
    compiled.rescale(product, high, low, sums, out)
    close(out, (product.double() - low.double() * sums.double()) * high.double())
    compiled.rescale(product, high, None, sums, out)
    close(out, product.double() * high.double())


@needed
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_is_no_work(shape: tuple[int, int]) -> None:
    x = torch.empty(shape)
    assert compiled.gated(x, x).shape == shape
    assert compiled.norm(x, torch.empty(shape[1]), 0.1)[0].shape == shape
    assert [len(end) for end in compiled.ends(x)] == [shape[0]] * 2
    assert compiled.softmax_(x.clone(), 1.0, queries=1, start=0, causal=False).shape == shape[:1]


@needed
def test_no_keys_are_attended_to() -> None:
    q, none = torch.randn(1, 2, 1, 4), torch.empty(1, 2, 0, 4)
    assert compiled.attend(q, none, none, None, 0.5).tolist() == torch.zeros(1, 2, 1, 4).tolist()


@needed
def test_gradients_are_left_to_torch() -> None:
    x = torch.randn(3, 4)
    assert compiled.fits(x, None)
    assert not compiled.fits(x.double()) and not compiled.fits(x.half()) and not compiled.fits(x.to("meta"))
    assert not compiled.fits(x.clone().requires_grad_())
    scale = torch.rand(3, 1).requires_grad_()
    some = {"bits": 4, "group_size": 8, "in_features": 8, "work": torch.float32, "dtype": torch.float32}
    dequantize_affine(pack(torch.ones(3, 8, dtype=torch.uint8), 4), scale, None, **some).sum().backward()
    assert scale.grad is not None and scale.grad.tolist() == [[-56.0]] * 3  # eight times 1 - 8


@needed
def test_other_defaults_change_nothing() -> None:
    weight = QUANTIZERS["trellis"](bits=2)(torch.randn(50, 72), {"hessian": torch.eye(72)})
    codes = pack(torch.ones(3, 8, dtype=torch.uint8), 4)
    some = {"bits": 4, "group_size": 8, "in_features": 8, "work": torch.float32, "dtype": torch.float32}
    wanted = weight.dequantize(torch.float32), dequantize_affine(codes, torch.ones(3, 1), None, **some)
    try:
        for default in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            assert torch.equal(weight.dequantize(torch.float32), wanted[0])
    finally:
        torch.set_default_dtype(torch.float32)
    scale = torch.ones(3, 1)
    with torch.device("meta"):
        assert torch.equal(dequantize_affine(codes, scale, None, **some), wanted[1])
    with torch.utils.flop_counter.FlopCounterMode(display=False):  # some mode that looks at every operation
        assert not compiled.fits(scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and warns of what it makes constant
        traced = torch.jit.trace(lambda s: dequantize_affine(codes, s, None, **some), scale)
    assert torch.equal(traced(scale), wanted[1])


@needed
def test_gradients_within_autocast() -> None:
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    wanted = torch.autograd.grad(attention(q, k, v, causal=True).square().sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(attention(q, k, v, causal=True).square().sum(), (q, k, v))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@needed
def test_no_second_derivative_is_an_error() -> None:
    gate, value = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (first,) = torch.autograd.grad(gated_silu(gate, value).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@needed
def test_labels_of_other_integers() -> None:
    logits, labels = torch.randn(4, 9), torch.tensor([0, 8, 3, 1])
    wanted = nn.functional.cross_entropy(logits, labels, reduction="none")
    close(compiled.cross_entropy_(logits, labels.int(), slope=False), wanted)


@needed
def test_tensors_that_c_cannot_read_are_refused() -> None:
    with pytest.raises(ValueError, match="strides"):
        compiled.turn_rows_(torch.randn(4, 6).T, small_factors(4))


ASK = "from slimtune.kernels import compiled; print(compiled.library() is not None)"


def asked(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a fresh process says of the library, with a cache of its own."""
    given = {**os.environ, "SLIMTUNE_CACHE": str(tmp_path / "cache"), **environment}
    return subprocess.run([sys.executable, "-c", ASK], env=given, capture_output=True, text=True, check=True)


@needed
def test_it_is_compiled_once(tmp_path: Path) -> None:
    assert asked(tmp_path).stdout.strip() == "True"
    (library,) = (tmp_path / "cache").iterdir()
    stamp = library.stat().st_mtime_ns
    assert asked(tmp_path).stdout.strip() == "True"
    assert library.stat().st_mtime_ns == stamp


@needed
def test_a_library_that_does_not_load_is_made_again(tmp_path: Path) -> None:
    asked(tmp_path)
    (library,) = (tmp_path / "cache").iterdir()
    library.write_bytes(b"")
    done = asked(tmp_path)
    assert done.stdout.strip() == "True" and not done.stderr
    blocked = tmp_path / "file"
    blocked.write_text("in the way of the cache")
    done = asked(tmp_path, SLIMTUNE_CACHE=str(blocked))
    assert done.stdout.strip() == "True" and not done.stderr


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    done = asked(tmp_path, SLIMTUNE_COMPILED="0")
    assert done.stdout.strip() == "False" and not done.stderr and not (tmp_path / "cache").exists()


def test_no_compiler_is_no_error(tmp_path: Path) -> None:
    done = asked(tmp_path, PATH=str(tmp_path))
    assert done.stdout.strip() == "False" and not done.stderr


def test_a_compiler_that_fails_is_a_warning(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho the disk is made of cheese >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    done = asked(tmp_path, PATH=f"{tmp_path}:/bin")
    assert done.stdout.strip() == "False"
    assert "run in plain torch" in done.stderr and "made of cheese" in done.stderr
    assert not list((tmp_path / "cache").iterdir())
