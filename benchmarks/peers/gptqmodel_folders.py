"""GPTQModel's side of the proof that slimtune and it read each other's folders (`gptq_both_ways.py` is the other).

Runs in GPTQModel's own virtual environment (see README.md beside this file), never in slimtune's:

    python gptqmodel_folders.py read FOLDER TOKENS OUT        its weights and logits of a GPTQ folder, to OUT
    python gptqmodel_folders.py write MODEL TOKENS OUT ...    quantize the dense MODEL into the GPTQ folder OUT

TOKENS is a safetensors file with `tokens`, int64 `[samples, length]`. `read` writes the weights as its TorchLinear
decodes them, float16 `[out, in]`, under the linear's name, and the logits of the first sample as `logits`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores is 1, which its own loader refuses
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from safetensors.torch import load_file, save_file


def read(folder: Path, tokens: torch.Tensor, out: Path) -> None:
    """Load `folder` as GPTQModel does on a CPU; write what it decodes and computes."""
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model.eval()
    found = {
        name: module.dequantize_weight().T.detach().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, TorchLinear)
    }
    with torch.inference_mode():
        found["logits"] = model(tokens[:1]).logits.float().clone()
    save_file(found, out)


def write(args: argparse.Namespace, tokens: torch.Tensor) -> None:
    """Quantize with GPTQModel and let it save."""
    config = QuantizeConfig(
        bits=args.bits,
        group_size=args.group_size,
        sym=args.symmetric,
        desc_act=args.act_order,
        act_group_aware=False if args.act_order else None,
        format=args.format,
        device="cpu",
        offload_to_disk=False,
    )
    model = GPTQModel.load(str(args.folder), config, dtype=torch.float32)
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens], batch_size=1)
    model.save(str(args.out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("act", choices=("read", "write"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--format", default="gptq", choices=("gptq", "gptq_v2"))
    args = parser.parse_args()
    tokens = load_file(args.tokens)["tokens"]
    if args.act == "read":
        read(args.folder, tokens, args.out)
    else:
        write(args, tokens)


if __name__ == "__main__":
    main()
