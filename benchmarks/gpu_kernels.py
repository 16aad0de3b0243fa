"""Triton's kernels on a GPU: are they equal to plain torch, and how long do both take?

    python benchmarks/gpu_kernels.py

Decoding: affine weights of 2, 3 and 4 bits, E8P and trellis codes, in shapes of LLaMA-7B and odd ones; weights must be
equal to the last bit. `decode` is codes to numbers, `weight` a whole layer, transforms of rotated layouts included.
Products: 1, 4 and 16 rows times a packed affine weight, beside decoding and multiplying, and beside a dense bfloat16
product; errors are relative to float32. Integers: 1, 16 and 512 tokens rounded to 8 or 4 bits, times weights of as
many (W8A8, W4A8, W4A4), beside the reference, which rounds and multiplies in floats, and a dense bfloat16 product.
Transforms: 1, 16 and 2,048 vectors, turned online; errors are relative to float64. Leaves with status 1 where a weight
differs.

With `--device cpu` Triton interprets the kernels at a tiny size; times mean nothing then. Its interpreter cuts bfloat16
off, so equality is asked of float16.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, and torch may do that

import torch
from card import OPTIONS, chosen, microseconds, options, random_codes, write
from torch import Tensor, nn

from slimtune.kernels import dispatch
from slimtune.kernels.reference import apply_grid_
from slimtune.linalg.packing import unpack
from slimtune.quant.activation import Activations
from slimtune.quant.base import QTensor
from slimtune.quant.layouts import LAYOUTS, Affine
from slimtune.quant.linear import QuantLinear

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1000, 1504), (333, 720))
TINY = ((33, 72),)
TOKENS = (1, 4, 16)
INTEGERS = ((8, 8), (4, 8), (4, 4))
ROUNDED = (1, 16, 512)
WIDTHS, TURNED = (4096, 8192, 11008, 14336, 28672), (1, 16, 2048)


@contextmanager
def triton(wanted: bool) -> Iterator[None]:
    """With Triton's kernels, or without."""
    os.environ[dispatch.WANTED] = "1" if wanted else "0"
    try:
        yield
    finally:
        del os.environ[dispatch.WANTED]


def both(work: Callable[[], Tensor], device: torch.device) -> dict[str, Any]:
    """What plain torch and Triton make of it: whether they are equal, and the microseconds of each."""
    found: dict[str, Any] = {}
    made: dict[str, Tensor] = {}
    for name in ("torch", "triton"):
        with triton(name == "triton"):
            made[name] = work()
            found[f"{name}_us"] = microseconds(work, device)
    off = (made["triton"].double() - made["torch"].double()).abs().max()
    return {**found, "max_difference": float(off), "equal": bool(torch.equal(made["torch"], made["triton"]))}


def weights(layout: str, bits: int, shape: tuple[int, int], device: torch.device) -> QTensor:
    """A layer of random codes."""
    out, into = shape
    made: Any = LAYOUTS[layout]
    kind = made(out_features=out, in_features=into, bits=bits, **OPTIONS[layout])
    return QTensor(random_codes(kind, device, torch.Generator(device).manual_seed(bits)), kind)


def decoder(weight: QTensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Codes to numbers, without what a rotated layout does afterwards."""
    layout, codes = weight.layout, weight.tensors["codes"]
    if layout.tag == "e8p":
        return lambda: dispatch.decode_lattice(codes.view(layout.out_features, -1, layout.bits), dtype)  # type: ignore[attr-defined]
    if layout.tag == "trellis":
        bits: int = layout.bits  # type: ignore[attr-defined]
        return lambda: dispatch.decode_trellis(codes.reshape(-1, 32 * bits), bits, dtype)
    return lambda: weight.dequantize(dtype)


def decoding(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[dict[str, Any]]:
    """Every layout, width and shape."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float16,)
    rows = []
    for shape in shapes:
        for layout in OPTIONS:
            for bits in (2, 3, 4):
                weight = weights(layout, bits, shape, device)
                for dtype in dtypes:
                    # The numbers of rotated layouts are decoded in float32, whatever they become.
                    wide = dtype if layout == "affine" else torch.float32
                    facts = {"decode": both(decoder(weight, wide), device)}
                    facts["weight"] = both(lambda w=weight, d=dtype: w.dequantize(d), device)  # type: ignore[misc]
                    name = str(dtype).removeprefix("torch.")
                    rows.append({"layout": layout, "bits": bits, "shape": list(shape), "dtype": name, **facts})
                    print(layout, bits, shape, name, facts["decode"], flush=True)
    return rows


def products(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[dict[str, Any]]:
    """A few rows times a packed affine weight."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    rows = []
    for shape in shapes:
        for bits in (2, 3, 4):
            weight = weights("affine", bits, shape, device)
            layout, tensors = weight.layout, weight.tensors
            assert isinstance(layout, Affine)
            size = layout.group_size
            codes = unpack(tensors["codes"], bits, shape[1]).double()
            exact = apply_grid_(codes, tensors["scale"], tensors["zero"], bits=bits, group_size=size)
            dense = weight.dequantize(dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, shape[1], device=device, dtype=dtype)
                packed = {name: tensors[name] for name in ("codes", "scale", "zero")}

                def fused(x: Tensor = x, packed: dict[str, Tensor] = packed, b: int = bits, s: int = size) -> Tensor:
                    return dispatch.affine_product(x, **packed, bits=b, group_size=s)

                def decoded(x: Tensor = x, weight: QTensor = weight) -> Tensor:
                    return x @ weight.dequantize(x.dtype).T

                wanted = x.double() @ exact.T
                with triton(True):
                    error = float((fused().double() - wanted).norm() / wanted.norm())
                    facts = {"fused_us": microseconds(fused, device), "decoded_us": microseconds(decoded, device)}
                facts["dense_us"] = microseconds(lambda x=x, w=dense: x @ w.T, device)  # type: ignore[misc]
                least = float((x @ dense.T - wanted).norm() / wanted.norm())
                rows.append({"bits": bits, "shape": list(shape), "tokens": tokens, "error": error, **facts})
                rows[-1]["error_of_dense"] = least
                print(shape, bits, tokens, rows[-1], flush=True)
    return rows


@torch.no_grad()
def integers(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[dict[str, Any]]:
    """Rounded tokens times a packed weight with one scale a row, rounding included: an input that was written to is
    rounded again (`add_` is in all three times)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    rows = []
    for out, into in shapes:
        for bits, activations in INTEGERS:
            kind = Affine(out_features=out, in_features=into, bits=bits, group_size=into, symmetric=True)
            tensors = random_codes(kind, device, torch.Generator(device).manual_seed(bits))
            with torch.device(device):
                linear = nn.Linear(into, out, bias=False, dtype=dtype)
            layer = QuantLinear.from_linear(linear, QTensor(tensors, kind), Activations(activations))
            for tokens in ROUNDED if device.type == "cuda" else (3,):
                x = torch.randn(tokens, into, device=device, dtype=dtype)
                with triton(True), dispatch.reference():
                    wanted = layer(x)
                    facts = {"reference_us": microseconds(lambda x=x, w=layer: w(x.add_(0)), device)}  # type: ignore[misc]
                with triton(True):
                    error = float((layer(x).double() - wanted.double()).norm() / wanted.double().norm())
                    facts["integers_us"] = microseconds(lambda x=x, w=layer: w(x.add_(0)), device)  # type: ignore[misc]
                facts["dense_us"] = microseconds(lambda x=x, w=linear: w(x.add_(0)), device)  # type: ignore[misc]
                named = {"bits": bits, "activations": activations, "shape": [out, into], "tokens": tokens}
                rows.append({**named, "error": error, **facts})
                print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def transforms(widths: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """Vectors turned by the Hadamard transform of their width."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    rows = []
    for width in widths:
        for count in TURNED if device.type == "cuda" else (3,):
            x = torch.randn(count, width, device=device, dtype=dtype)
            facts = both(lambda x=x: dispatch.transform(x), device)  # type: ignore[misc]
            wanted = dispatch.transform(x.double())
            with triton(True):
                facts["error"] = float((dispatch.transform(x) - wanted).norm() / wanted.norm())
            rows.append({"width": width, "vectors": count, **facts})
            print(rows[-1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases, and write the JSON result."""
    args = options(__doc__ or "").parse_args(arguments)
    device = chosen(args.device)
    shapes = SHAPES if device.type == "cuda" else TINY
    facts = {"decoding": decoding(shapes, device), "products": products(shapes, device)}
    facts["integers"] = integers(shapes, device)
    facts["transforms"] = transforms(WIDTHS if device.type == "cuda" else (576,), device)
    write("kernels", device, args.output, facts)
    wrong = [row for row in facts["decoding"] if not (row["decode"]["equal"] and row["weight"]["equal"])]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(facts['decoding'])} weights differ; the first: {wrong[0]}")


if __name__ == "__main__":
    main()
