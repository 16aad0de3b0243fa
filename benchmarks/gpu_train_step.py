"""What a LoRA training step costs on a GPU: slimtune at 4, 3 and 2 bits beside PEFT in bfloat16 and on bitsandbytes.

    python benchmarks/gpu_train_step.py

A random Llama of 1B shapes (16 blocks, 2048/8192), r=16 on all linears of the blocks, 4 sequences of 512 tokens,
AdamW, no checkpointing. Every arm is a process of its own, in turns; `--triton` has slimtune's arms run with
`SLIMTUNE_TRITON=1` as well. Seconds are the least over all steps but the first two, memory is what was allocated at
most while stepping. With `--device cpu` the model has two small blocks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from card import chosen, options, packed_by_bitsandbytes, peak_bytes, random_model, settle, write
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from slimtune.arch import bind
from slimtune.calib.loss import chunked_loss
from slimtune.kernels import dispatch
from slimtune.lora.attach import add_lora, base_of

LLAMA = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
ARMS = ("peft bfloat16", "peft nf4", "affine 4", "affine 3", "affine 2", "e8p 2", "trellis 2")


def model_of(arm: str, device: torch.device, tokens: int) -> Any:
    """The model of an arm with its adapter."""
    kind, _, setting = arm.removesuffix(" triton").partition(" ")
    tiny = device.type == "cpu"
    sizes = {**(TINY if tiny else LLAMA), "vocab_size": 320 if tiny else 32000, "max_position_embeddings": tokens}
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=sizes["num_attention_heads"] // 4)
    if kind != "peft":
        return add_lora(random_model(config, kind, int(setting), device), r=16)
    model = random_model(config, None, 16, device)
    names = sorted({port.name.rpartition(".")[2] for port in bind(model).linears})
    if setting == "nf4":
        packed_by_bitsandbytes(model, device)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names))  # type: ignore[arg-type]


def measure(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """The steps of one arm."""
    device = chosen(args.device)
    if arm.endswith(" triton"):
        os.environ[dispatch.WANTED] = "1"
    model = model_of(arm, device, args.length).train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    generator, base = torch.Generator().manual_seed(0), base_of(model)
    words = base.config.vocab_size  # type: ignore[union-attr]
    tokens = torch.randint(words, (args.batch, args.length), generator=generator).to(device)
    seconds, losses = [], []
    for _ in range(args.steps):
        settle(device)
        start = time.perf_counter()
        if arm.startswith("peft"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        else:  # as slimtune.train does
            with chunked_loss(base):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        settle(device)
        seconds.append(round(time.perf_counter() - start, 4))
        losses.append(round(float(loss.detach()), 4))
    memory = {"model_bytes": held, "peak_bytes": peak_bytes(device)}
    return {"arm": arm, "step_seconds": min(seconds[2:] or seconds), "steps": seconds, "losses": losses, **memory}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every arm in turn, and write the JSON result."""
    parser = options(__doc__ or "")
    parser.add_argument("--arm", help="run this one here, and print its facts")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--triton", action="store_true", help="slimtune's arms with its kernels too")
    given = list(arguments if arguments is not None else sys.argv[1:])
    args = parser.parse_args(given)
    if args.arm:
        print(json.dumps(measure(args.arm, args)))
        return
    device, rows = chosen(args.device), list[dict[str, Any]]()
    arms = [*ARMS, *(f"{arm} triton" for arm in ARMS if args.triton and not arm.startswith("peft"))]
    if importlib.util.find_spec("bitsandbytes") is None:
        arms.remove("peft nf4")
        rows.append({"arm": "peft nf4", "missing": "bitsandbytes"})
    for repeat in range(args.repeats):
        for arm in arms:
            command = [sys.executable, __file__, *given, "--arm", arm]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"repeat": repeat, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    write("train_step", device, args.output, {"batch": args.batch, "length": args.length, "rows": rows})


if __name__ == "__main__":
    main()
