"""The GPU kernels compile for GPUs, which needs none: what Triton's interpreter lets pass, its compiler may refuse."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILING = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from slimtune.kernels import triton as kernels
from slimtune.linalg import lattice, trellis

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8"}
CPU, found = torch.device("cpu"), []

def compiled(self, *args, grid, warmup, **options):
    signature, constants = {}, {}
    for number, (parameter, value) in enumerate(zip(self.params, args, strict=True)):
        if parameter.is_constexpr:
            constants[number,] = value
        kind = TYPES.get(getattr(value, "dtype", None))
        number = "fp32" if isinstance(value, float) else "i32"
        signature[parameter.name] = "constexpr" if parameter.is_constexpr else f"*{kind}" if kind else number
    source = ASTSource(self, signature, constants)
    done = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    found.append([self.__name__, done.metadata.shared])

JITFunction.run = compiled
ends = lambda low, high: (torch.ones_like(low), torch.zeros_like(low))
codes, scale, zero = torch.zeros(33, 50, dtype=torch.uint8), torch.ones(33, 4).bfloat16(), torch.zeros(33, 4).byte()
for dtype, bits, some in ((torch.float32, 3, zero), (torch.float16, 4, None), (torch.bfloat16, 2, zero)):
    x, one = torch.zeros(3, 100, dtype=dtype), None if some is None else some[:, :1].contiguous()
    kernels.dequantize_affine(codes, scale, some, bits=bits, group_size=32, in_features=100, dtype=dtype)
    kernels.affine_product(x, codes, scale, some, bits=bits, group_size=32)
    kernels.round_tokens(x, bits, ends, symmetric=some is None)
    for tokens in (3, 70):
        shift = None if some is None else torch.zeros(tokens, 1)
        whole = torch.zeros(tokens, 100, dtype=torch.int8), torch.ones(tokens, 1), shift
        kernels.integer_product(*whole, codes, scale[:, :1].contiguous(), one, bits=bits, dtype=dtype)
    kernels.decode_lattice(torch.zeros(5, bits, dtype=torch.uint8), *lattice.tables(bits, dtype, CPU))
    kernels.decode_trellis(torch.zeros(5, 32 * bits, dtype=torch.uint8), trellis.numbers(bits, dtype, CPU), bits)
    for width in (576, 5632, 28672):
        kernels.transform(torch.zeros(3, width, dtype=dtype), inverse=False)
print(json.dumps(found))
"""


def compiled(capability: int, cache: Path) -> list[tuple[str, int]]:
    """Every kernel that was compiled, and the bytes of shared memory that it takes."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", COMPILING, str(capability)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [(name, shared) for name, shared in json.loads(done.stdout)]


def has_compiler() -> bool:
    return (
        importlib.util.find_spec("triton") is not None
        and importlib.util.find_spec("triton.backends.nvidia") is not None
    )


@pytest.mark.skipif(not has_compiler(), reason="needs Triton with its compiler for NVIDIA GPUs")
def test_every_kernel_compiles_and_stays_below_what_small_gpus_share(tmp_path: Path) -> None:
    found = compiled(80, tmp_path)
    assert max(shared for _, shared in found) < 2**16
    names = {name for name, _ in found}
    assert names == {"_dequantize", "_product", "_ends", "_round", "_integers", "_turn", "_lattice", "_trellis"}
