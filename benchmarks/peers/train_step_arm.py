"""A LoRA training step on a model that a peer quantized, as one arm of `train_step.py`.

Runs in the peer's own virtual environment (see README.md beside this file), never in slimtune's:

    python train_step_arm.py --model DIR --tool bitsandbytes --bits 4 --rows 4 --length 256 --steps 4

and prints what it cost as one line of JSON. `gptqmodel` takes a folder in GPTQ's format. `take_steps` knows no peer:
`train_step.py` uses it for slimtune and for PEFT on the unquantized model.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gptqmodel_arm import Meter
from transformers import AutoModelForCausalLM

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MADV_PAGEOUT = 21
TOOLS = ("bitsandbytes", "hqq", "gptqmodel")


def take_steps(
    model: Any,
    *,
    rows: int,
    length: int,
    steps: int,
    checkpointing: bool,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Take steps of AdamW with `model`, a PeftModel, and say what they cost.

    `around` is opened around each forward pass.
    """
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, 30_000, (rows, length), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    seconds, losses = [], []
    forget_loading()
    with Meter() as meter:
        for _ in range(steps):
            start = time.process_time()
            with around():
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(round(time.process_time() - start, 3))
            losses.append(round(float(loss.detach()), 4))
    return {"step_cpu_seconds": min(seconds[1:]), "steps": seconds, "losses": losses, **meter.facts()}


def forget_loading() -> None:
    """Give back what loading and quantizing left behind, which is not a step's: free memory, and pages of files."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)  # read again when needed


def _loaded(tool: str, folder: str, bits: int) -> Any:
    """The model in `folder`, in bfloat16 around linears of `bits` bits, by `tool`'s defaults and groups of 64."""
    from transformers import BitsAndBytesConfig, HqqConfig

    config: Any = None
    if tool == "bitsandbytes":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    elif tool == "hqq":
        config = HqqConfig(nbits=bits, group_size=64)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", quantization_config=config
    )


def main() -> None:
    """Load, put an adapter on, take steps, print."""
    from peft import LoraConfig, get_peft_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tool", choices=TOOLS, required=True)
    parser.add_argument("--bits", type=int, default=4)
    for name, default in (("rows", 4), ("length", 256), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = get_peft_model(
        _loaded(args.tool, args.model, args.bits), LoraConfig(r=16, lora_alpha=32, target_modules=NAMES)
    )
    facts = take_steps(model, rows=args.rows, length=args.length, steps=args.steps, checkpointing=args.checkpointing)
    versions = {name: version(name) for name in (args.tool, "torch", "transformers", "peft")}
    print(json.dumps({"arm": f"{args.tool} {args.bits}", "versions": versions, **facts}))


if __name__ == "__main__":
    main()
