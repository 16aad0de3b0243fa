"""The proof that slimtune and GPTQModel read each other's GPTQ folders, weight for weight.

Runs in slimtune's environment and calls `gptqmodel_folders.py` with the python of GPTQModel's:

    python gptq_both_ways.py --model smollm2-135m --peer peers/gptq/bin/python --tokens tokens.safetensors \\
        --output OUT.json

Ours to theirs: slimtune quantizes and exports, GPTQModel loads. Theirs to ours: GPTQModel quantizes a few blocks of the
model and saves, slimtune loads, and trains an adapter on it. What is compared is each weight as GPTQModel decodes it,
float16, with the same weight as slimtune decodes it in float16: the largest difference must be 0. Logits are
GPTQModel's in float16 beside slimtune's in float32; how far slimtune's own in float16 are from those stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimtune.arch import bind
from slimtune.export import Source, export
from slimtune.export.load import Loaded, load
from slimtune.export.native import settle_, write_model
from slimtune.lora.attach import add_lora
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn

PEER = Path(__file__).with_name("gptqmodel_folders.py")
OURS: tuple[dict[str, Any], ...] = (
    {"bits": 2, "group_size": 32},
    {"bits": 3, "group_size": 64, "sym": True},
    {"bits": 3, "group_size": 64},
    {"bits": 4, "group_size": 64, "sym": True},
    {"bits": 4, "group_size": -1},
    {"bits": 8, "group_size": 64},
)
THEIRS = (
    "--bits 2 --group-size 16",
    "--bits 3 --group-size 64 --format gptq_v2",
    "--bits 3 --group-size 64",
    "--bits 4 --group-size 64 --symmetric",
    "--bits 4 --group-size 64 --act-order",
    "--bits 8 --group-size 32 --symmetric --act-order",
)
BLOCKS = 3
"""Blocks of the model that GPTQModel quantizes: what is proven is the format, not the model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peer", type=Path, required=True, help="python of an environment with GPTQModel")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    tokens = load_file(args.tokens)["tokens"]
    with tempfile.TemporaryDirectory() as scratch:
        rows = [ours(args, fields, tokens, Path(scratch) / f"ours{i}") for i, fields in enumerate(OURS)]
        small = shortened(args.model, Path(scratch) / "small")
        rows += [theirs(args, small, options, tokens, Path(scratch) / f"theirs{i}") for i, options in enumerate(THEIRS)]
    found = {name: version(name) for name in ("slimtune", "torch", "transformers")}
    found["gptqmodel"] = subprocess.run(
        [args.peer, "-c", "from importlib.metadata import version; print(version('gptqmodel'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    args.output.write_text(json.dumps({"model": args.model, "versions": found, "rows": rows}, indent=2) + "\n")
    if any(row["max_weight_difference"] for row in rows):
        sys.exit("a weight differs")


def ours(args: argparse.Namespace, fields: dict[str, Any], tokens: Tensor, folder: Path) -> dict[str, Any]:
    """slimtune writes, GPTQModel reads."""
    loaded = load(args.model)
    quantize_(loaded.model, bind(loaded.model), all_linear(Rtn(**fields)))
    settle_(loaded.model)
    export(Source(loaded.model, loaded.tokenizer, loaded.name), "gptq", folder)
    return {"written_by": "slimtune", **fields, **compared(args, loaded.model, folder, tokens)}


def theirs(args: argparse.Namespace, model: Path, options: str, tokens: Tensor, folder: Path) -> dict[str, Any]:
    """GPTQModel writes, slimtune reads, and trains an adapter for a few steps."""
    peer(args, "write", model, folder, *options.split())
    loaded = load(str(folder))
    row = {"written_by": "gptqmodel", "options": options, **compared(args, loaded.model, folder, tokens)}
    return {**row, "losses": losses(loaded, tokens)}


def compared(args: argparse.Namespace, model: nn.Module, folder: Path, tokens: Tensor) -> dict[str, Any]:
    """What GPTQModel decodes and computes from `folder`, beside `model`."""
    dump = folder.with_suffix(".read")
    peer(args, "read", folder, dump)
    read = load_file(dump)
    scores = read.pop("logits")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if layers.keys() != read.keys():
        sys.exit(f"other layers are packed: {sorted(layers.keys() ^ read.keys())}")
    with torch.no_grad():
        mine = model(tokens[:1]).logits
        half = load(str(folder), dtype="float16").model(tokens[:1]).logits.float()
    facts = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {
        "checkpoint_format": facts["checkpoint_format"],
        "layers": len(layers),
        "layouts": sorted({f"{m.layout.tag}, {m.layout.scale_dtype}" for m in layers.values()}),  # type: ignore[attr-defined]
        "max_weight_difference": max(
            float((layer.dequantize(torch.float16) - read[name]).abs().max()) for name, layer in layers.items()
        ),
        "max_logit_difference": round(float((mine - scores).abs().max()), 4),
        "max_logit_difference_of_float16": round(float((mine - half).abs().max()), 4),
        "same_top_token": round(float((mine.argmax(-1) == scores.argmax(-1)).float().mean()), 4),
    }


def losses(loaded: Loaded, tokens: Tensor, steps: int = 5) -> list[float]:
    """The loss of a few training steps on one window."""
    model = add_lora(loaded.model, r=8).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    found = []
    for _ in range(steps):
        loss = model(tokens[:1], labels=tokens[:1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(round(float(loss.detach()), 4))
    return found


def shortened(name: str, folder: Path) -> Path:
    """The first blocks of the model, as a folder."""
    loaded = load(name)
    body: Any = loaded.model.get_decoder()
    body.layers = body.layers[:BLOCKS]
    loaded.model.config.num_hidden_layers = BLOCKS
    if getattr(loaded.model.config, "layer_types", None):
        loaded.model.config.layer_types = loaded.model.config.layer_types[:BLOCKS]
    folder.mkdir()
    write_model(loaded.model, loaded.tokenizer, folder)
    return folder


def peer(args: argparse.Namespace, act: str, folder: Path, out: Path, *options: str) -> None:
    """Run GPTQModel's side."""
    command = [str(args.peer), str(PEER), act, str(folder), str(args.tokens), str(out), *options]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # it has packages of its own
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-3000:])


if __name__ == "__main__":
    main()
