"""What it takes to find out what matters: peak memory of every importance beside true weight gradients.

A random Llama of 1B shape (16 layers, 2048 wide, FFN 8192, 32 heads, 8 KV heads) in bfloat16, one window of 256 tokens,
and the same on a 4-bit base. Every arm is a process of its own: it builds the model, then does one thing, and the peak
of its resident memory is read while it does.

    weights        nothing
    lora-only      forward and backward of LoRA factors (r=8), as training does
    full           forward and backward to every weight of the blocks (bfloat16 gradients), as LLM-Pruner does on a GPU
    full-float32   the same with a float32 model, as LLM-Pruner does on a CPU
    others         collecting that importance, as one-shot pruning does

    python benchmarks/prune_memory.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slimtune.arch import bind
from slimtune.kernels.memory import release
from slimtune.lora.attach import add_lora, base_of
from slimtune.prune import IMPORTANCES
from slimtune.prune.collect import collect
from slimtune.prune.groups import axes
from slimtune.prune.removal import loss_of
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn
from slimtune.recipe.run import environment

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from gptqmodel_arm import Meter

FULL = ("full", "full-float32")
ARMS = ("weights", "lora-only", *FULL, "gate", "gate-fisher", "lora", "weight-taylor", "wanda")
RESULT = Path(__file__).parent / "results" / "prune_memory.json"


def model_of(layers: int, packed: bool, dtype: torch.dtype) -> Any:
    """The random model."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    model.tie_weights()
    rotary = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 8})).model
    model.model.rotary_emb = rotary.rotary_emb  # its buffers are computed, not loaded
    if packed:
        quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=64)))
    return model


def run(arm: str, layers: int, packed: bool, length: int) -> dict[str, Any]:
    """Build the model, do one thing, and say what that took."""
    torch.set_num_threads(1)
    model = model_of(layers, packed, torch.float32 if arm == "full-float32" else torch.bfloat16)
    if arm in ("lora-only", "lora"):
        model = add_lora(model, r=8)
    base, modelmap = base_of(model), bind(model)
    tokens = torch.randint(0, 32_000, (1, length), generator=torch.Generator().manual_seed(0))
    if arm not in ("lora-only", "lora"):
        names = {f"{port.name}.weight" for port in modelmap.linears if port.block is not None and arm in FULL}
        for name, parameter in base.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name in names)
    gradients = sum(p.numel() * p.element_size() for p in base.parameters() if p.requires_grad)
    release()
    with Meter() as meter:
        if arm in ("lora-only", *FULL):
            loss_of(base, tokens).backward()
        elif arm != "weights":
            collect(base, modelmap, axes(modelmap), IMPORTANCES[arm](), tokens, batch_size=1)
    return {"arm": arm, "packed": packed, "gradient_bytes": gradients, **meter.facts()}


def main() -> None:
    """Run every arm in a process of its own and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--arm", choices=ARMS, help="run this one here and print its facts")
    parser.add_argument("--packed", action="store_true", help="with --arm: on a 4-bit base")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(run(arguments.arm, arguments.layers, arguments.packed, arguments.length)))
        return
    rows: list[dict[str, Any]] = []
    for packed in (False, True):
        for arm in arguments.arms:
            if packed and arm in FULL:
                continue  # packed weights have no gradients
            command = [sys.executable, __file__, "--arm", arm, "--layers", str(arguments.layers)]
            command += ["--length", str(arguments.length), *(["--packed"] if packed else [])]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(ran.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            head = {"environment": environment(), "layers": arguments.layers, "length": arguments.length}
            arguments.output.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
