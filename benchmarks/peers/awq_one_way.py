"""The proof that slimtune reads AWQ folders as transformers and GPTQModel do, weight for weight.

Runs in slimtune's environment and calls itself with the python of GPTQModel's, where the folder is packed by GPTQModel
and loaded by transformers:

    python awq_one_way.py --model DIR --peer peers/gptq/bin/python --output ../results/awq_one_way.json

The first blocks of the model, rounded to nearest with zero points. What is compared is each weight as GPTQModel decodes
it, float16, with the same weight as slimtune decodes it in float16: the largest difference must be 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from safetensors.torch import load_file, save_file

BLOCKS = 3
TOKENS = torch.arange(3, 67)[None]


def pack(model: Path, folder: Path, group_size: int) -> None:
    """In GPTQModel's environment: the dense `model`, packed into an AWQ `folder`, and what is decoded from it."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, num_hidden_layers=BLOCKS)
    state = {name: tensor.half() for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    for name, linear in dense.model.named_modules(prefix="model"):
        if isinstance(linear, torch.nn.Linear):
            rows, columns = linear.weight.shape
            size = columns if group_size == -1 else group_size
            groups = linear.weight.data.view(rows, -1, size)
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scale = ((high - low) / 15).half().float()
            zero = (-low / scale).round().clamp(0, 15)
            codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15) - zero[..., None]
            linear.weight.data = (codes * scale[..., None]).view(rows, columns)
            packed = AwqTorchLinear(4, size, False, False, columns, rows)
            packed.pack(linear, scale, zero)
            del state[f"{name}.weight"]
            state.update({f"{name}.{leaf}": getattr(packed, leaf) for leaf in ("qweight", "qzeros", "scales")})
    facts = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    dense.config.quantization_config = {**facts, "modules_to_not_convert": ["lm_head"]}
    dense.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    found: dict[str, torch.Tensor] = {"logits": read(TOKENS).logits.detach().float()}
    kinds = set()
    for name, module in read.named_modules():
        if isinstance(getattr(module, "qweight", None), torch.Tensor):
            kinds.add(type(module).__name__)
            held = load_file(folder / "model.safetensors")
            tensors = [held[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales")]
            found[name] = dequantize_gemm(*tensors, 4, module.group_size).T.contiguous()
    save_file(found, folder / "read", {"kernels": ", ".join(sorted(kinds))})


def compared(folder: Path) -> dict[str, Any]:
    """In slimtune's environment: what it decodes and computes, beside what was decoded and computed there."""
    from safetensors import safe_open

    from slimtune.export.load import load
    from slimtune.quant.linear import QuantLinear

    read = load_file(folder / "read")
    with safe_open(folder / "read", "pt") as file:
        kernels = file.metadata()["kernels"]
    scores, model = read.pop("logits"), load(str(folder), dtype="float32").model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if layers.keys() != read.keys():
        sys.exit(f"other layers are packed: {sorted(layers.keys() ^ read.keys())}")
    worst = max(float((layers[name].dequantize(torch.float16) - read[name]).abs().max()) for name in read)
    with torch.no_grad():
        mine = model(TOKENS).logits
    return {
        "layers": len(layers),
        "read_by_transformers_as": kernels,
        "max_weight_difference": worst,
        "max_logit_difference": round(float((mine - scores).abs().max()), 4),
        "largest_logit": round(float(mine.abs().max()), 4),
    }


def main() -> None:
    """Pack there, compare here, and write the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="python of an environment with GPTQModel")
    parser.add_argument("--output", type=Path, required=True, help="the JSON result; there, the folder")
    parser.add_argument("--group-size", type=int, help="given there")
    args = parser.parse_args()
    if args.peer is None:
        pack(args.model, args.output, args.group_size)
        return
    rows = []
    for size in (64, 32, -1):
        with tempfile.TemporaryDirectory() as scratch:
            command = [args.peer, __file__, "--model", args.model, "--output", scratch, "--group-size", str(size)]
            subprocess.run(command, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
            rows.append({"group_size": size, **compared(Path(scratch))})
        print(rows[-1])
    args.output.write_text(json.dumps({"blocks": BLOCKS, "rows": rows}, indent=2) + "\n")
    if any(row["max_weight_difference"] for row in rows):
        sys.exit("a weight differs")


if __name__ == "__main__":
    main()
