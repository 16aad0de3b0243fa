"""One training step of a 65B model in 24 GB, on a GPU: random 2-bit codes of its shapes, LoRA r=8, 2,048 tokens.

    python benchmarks/gpu_65b_step.py

The process may allocate 24 GB of the card and no more. The model is made on it, packed tensor by packed tensor; then a
step as `slimtune run` takes it: forward with checkpointing, the loss a chunk of tokens at a time, backward, AdamW on
factors in float32. `--layout` says how the codes are stored. Beside it, where bitsandbytes is installed, the same step
of PEFT on LLaMA-7B in NF4, under the same cap. Each arm is a process of its own.

With `--device cpu` the models have two small blocks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from card import OPTIONS, chosen, options, packed_by_bitsandbytes, peak_bytes, random_model, settle, write
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig

from slimtune.arch import bind
from slimtune.calib.loss import chunked_loss
from slimtune.lora.attach import add_lora, base_of
from slimtune.quant.size import model_size

CAP = 24 * 10**9
MODELS: dict[str, dict[str, int]] = {
    "LLaMA-65B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
    "LLaMA-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}


def config_of(name: str, tokens: int, *, tiny: bool) -> Any:
    """The configuration of a model, or of a tiny one of its family."""
    shape = TINY if tiny else MODELS[name]
    positions = {"max_position_embeddings": tokens, "vocab_size": 320 if tiny else 32000}
    return AutoConfig.for_model("llama", **shape, **positions, num_key_value_heads=shape["num_attention_heads"])


def packed(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Ours: codes of 2 bits and an adapter on every linear of the blocks."""
    config = config_of(args.model, args.tokens, tiny=device.type == "cpu")
    return add_lora(random_model(config, args.layout, args.bits, device), r=args.r)


def peer(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """PEFT on bitsandbytes' NF4: each linear is quantized on its way, so that nothing dense stays."""
    config = config_of("LLaMA-7B", args.tokens, tiny=device.type == "cpu")
    model = random_model(config, "affine", 2, device)
    names = sorted({port.name.rpartition(".")[2] for port in bind(model).linears})
    packed_by_bitsandbytes(model, device)
    return get_peft_model(model, LoraConfig(r=args.r, lora_alpha=32, target_modules=names))  # type: ignore[arg-type]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The steps of one arm; the first one is not counted for time."""
    device = chosen(args.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap / total), device)
        torch.cuda.reset_peak_memory_stats(device)
    model: Any = (packed if args.arm == "ours" else peer)(args, device)
    base = base_of(model)
    modules = dict(base.named_modules())
    built = peak_bytes(device)
    model.train()
    base.config.use_cache = False  # type: ignore[union-attr]
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(base.config.vocab_size, (1, args.tokens), generator=generator).to(device)  # type: ignore[union-attr]
    seconds, losses = [], []
    for _ in range(args.steps):
        settle(device)
        start = time.perf_counter()
        if args.arm == "ours":
            with chunked_loss(base):
                loss = model(input_ids=tokens, labels=tokens).loss
        else:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        moved = max(float(p.grad.abs().max()) for p in trained if p.grad is not None)
        optimizer.zero_grad(set_to_none=True)
        settle(device)
        seconds.append(round(time.perf_counter() - start, 3))
        losses.append(round(float(loss.detach()), 4))
    best = min(seconds[1:] or seconds)
    facts = model_size(modules, frozenset(port.name for port in bind(model).linears)).to_dict()
    return {
        "arm": args.arm,
        "model": args.model if args.arm == "ours" else "LLaMA-7B",
        "layout": args.layout if args.arm == "ours" else "bitsandbytes NF4",
        "tokens": args.tokens,
        "r": args.r,
        "trainable": sum(p.numel() for p in trained),
        "largest_gradient": moved,
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": round(args.tokens / best, 2),
        "cap_bytes": args.cap if device.type == "cuda" else None,
        "bytes_when_built": built,
        "peak_bytes": peak_bytes(device),
        "parameters": facts["parameters"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the arms, each in a process of its own, and write the JSON result."""
    parser = options(__doc__ or "")
    parser.add_argument("--arm", choices=("ours", "peer"), help="run this one here, and print its facts")
    parser.add_argument("--model", choices=MODELS, default="LLaMA-65B")
    parser.add_argument("--layout", choices=OPTIONS, default="e8p")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cap", type=int, default=CAP, help="bytes of the card that may be allocated")
    given = list(arguments if arguments is not None else sys.argv[1:])
    args = parser.parse_args(given)
    if args.arm:
        print(json.dumps(measure(args)))
        return
    device, rows = chosen(args.device), list[dict[str, Any]]()
    for arm in ("ours", "peer"):
        if arm == "peer" and importlib.util.find_spec("bitsandbytes") is None:
            rows.append({"arm": arm, "missing": "bitsandbytes"})
            continue
        done = subprocess.run([sys.executable, __file__, *given, "--arm", arm], capture_output=True, text=True)
        failed = {"arm": arm, "failed": done.stderr.strip().splitlines()[-1:]}
        rows.append(failed if done.returncode else json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    write("65b_step", device, args.output, {"rows": rows})
    if "failed" in rows[0]:
        sys.exit(f"the step did not run: {rows[0]['failed']}")


if __name__ == "__main__":
    main()
