"""What a LoRA training step costs: slimtune at 4, 3 and 2 bits beside PEFT on the unquantized model.

SmolLM2-135M, r=16 on all linears of the blocks, 4 sequences of 256 tokens, AdamW, no checkpointing, one thread. Every
arm runs in a process of its own, in turns; CPU seconds are the least over all steps but the first, memory is the peak
of resident memory while stepping.

    python benchmarks/train_step.py --model DIR
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from slimtune.arch import bind
from slimtune.export.load import locate
from slimtune.lora.attach import add_lora, base_of
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn
from slimtune.recipe.run import environment
from slimtune.train.loss import chunked_loss

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from gptqmodel_arm import Meter

ARMS = ("peft float32", "peft bfloat16", "slimtune 4", "slimtune 3", "slimtune 2")
RESULT = Path(__file__).parent / "results" / "train_step.json"


def run(model_folder: str, arm: str, steps: int) -> dict[str, Any]:
    """Take steps and say what they cost."""
    torch.set_num_threads(1)
    tool, setting = arm.split()
    dtype = torch.float32 if setting == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    names = sorted({port.name.rsplit(".", 1)[-1] for port in bind(model).linears})
    if tool == "slimtune":
        quantize_(model, bind(model), all_linear(Rtn(bits=int(setting), group_size=64)))
        wrapped: Any = add_lora(model, r=16, lora_alpha=32)
    else:
        wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names))
    wrapped.train()
    tokens = torch.randint(0, 40_000, (4, 256), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-4)
    seconds, losses = [], []
    with Meter() as meter:
        for _ in range(steps):
            start = time.process_time()
            if tool == "slimtune":  # as slimtune.train does
                with chunked_loss(base_of(wrapped)):
                    loss = wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss
            else:
                loss = wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(round(time.process_time() - start, 3))
            losses.append(round(float(loss.detach()), 4))
    return {"arm": arm, "cpu_seconds": min(seconds[1:]), "steps": seconds, "losses": losses, **meter.facts()}


def main() -> None:
    """Run every arm in turn, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--arm", choices=ARMS, help="run this one here and print its facts")
    arguments = parser.parse_args()
    folder = str(locate(arguments.model)[0])
    if arguments.arm:
        print(json.dumps(run(folder, arguments.arm, arguments.steps)))
        return
    rows = []
    for repeat in range(arguments.repeats):
        for arm in ARMS:
            command = [sys.executable, "-W", "ignore", __file__, "--model", folder, "--arm", arm]
            done = subprocess.run(
                [*command, "--steps", str(arguments.steps)], check=True, capture_output=True, text=True
            )
            facts = json.loads(done.stdout.splitlines()[-1])
            rows.append({"repeat": repeat, **facts})
            print(
                f"{arm:14} {facts['cpu_seconds']:.2f} CPU s a step, {facts['peak_rss_bytes'] / 1e9:.2f} GB", flush=True
            )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"environment": environment(), "seed": 0, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
