"""What a LoRA training step costs: slimtune at 4, 3 and 2 bits beside PEFT on the unquantized model, and peers.

SmolLM2-135M, r=16 on all linears of the blocks, 4 sequences of 256 tokens, AdamW, no checkpointing, one thread; or with
`--shape 1b` a random Llama of 16 layers, 2048 and 8192 wide, and one sequence. Every arm runs in a process of its own,
in turns; CPU seconds are the least over all steps but the first, memory is the peak of resident memory while stepping.

    python benchmarks/train_step.py --model DIR
    python benchmarks/train_step.py --model DIR --checkpointing --peer bitsandbytes=/path/to/its/python

`slimtune-torch` is without the loops in C; `e8p` and `trellis` are the layouts of `quip` and `trellis` at 2 bits, with
random codes. Peers run in environments of their own (`peers/README.md`); `--gptq` names a folder of the model in GPTQ's
format.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from slimtune.arch import bind
from slimtune.calib.loss import chunked_loss
from slimtune.export.load import locate
from slimtune.kernels import compiled
from slimtune.lora.attach import add_lora, base_of
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.base import QTensor
from slimtune.quant.layouts import layout_from_dict
from slimtune.quant.rtn import Rtn
from slimtune.train.options import TrainOptions
from slimtune.train.scope import for_training

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from train_step_arm import TOOLS, take_steps

PEERS = Path(__file__).parent / "peers"
ARMS = ("peft float32", "peft bfloat16", "slimtune 4", "slimtune 3", "slimtune 2", "slimtune e8p", "slimtune trellis")
ARMS += ("slimtune-torch 4",)
RESULTS = Path(__file__).parent / "results"
SHAPES = {"smollm2-135m": 4, "1b": 1}
"""Sequences of 256 tokens in a step."""


@dataclass(frozen=True)
class AnyCodes:
    """Codes of a layout of 2 bits that stand for nothing, at the weight's size: what a step costs does not depend on
    them, and finding good ones takes minutes."""

    layout: str
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, weight: Tensor, stats: Any) -> QTensor:
        """Quantize `weight`."""
        layout = layout_from_dict({"layout": self.layout, "bits": 2}, *weight.shape)
        made = {name: torch.ones(shape, dtype=kind) for name, (shape, kind) in layout.tensors().items()}
        made["codes"].random_(256)
        made["sign_out"] *= float(weight.std())
        return QTensor(made, layout)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Take the steps of one arm and say what they cost."""
    torch.set_num_threads(1)
    tool, setting = arguments.arm.split()
    dtype = torch.float32 if setting == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    names = sorted({port.name.rsplit(".", 1)[-1] for port in bind(model).linears})
    some: dict[str, Any] = {"rows": SHAPES[arguments.shape], "length": 256, "steps": arguments.steps}
    some["checkpointing"] = arguments.checkpointing
    if tool == "peft":
        peft = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names))
        return {"arm": arguments.arm, **take_steps(peft, **some)}
    if tool == "slimtune-torch":
        os.environ[compiled.WANTED] = "0"
    quantizer = Rtn(bits=int(setting), group_size=64) if setting.isdigit() else AnyCodes(setting)
    quantize_(model, bind(model), all_linear(quantizer))
    wrapped = add_lora(model, r=16, lora_alpha=32)
    options = TrainOptions(gradient_checkpointing=arguments.checkpointing, keep_decoded=arguments.keep_decoded)
    with for_training(wrapped, options):  # as slimtune.train does
        facts = take_steps(wrapped, **some, around=partial(chunked_loss, base_of(wrapped)))
    return {"arm": arguments.arm, "keep_decoded": arguments.keep_decoded, **facts}


def commands(arguments: argparse.Namespace, folder: str) -> Iterator[list[str]]:
    """How to run every arm once."""
    given = ["--steps", str(arguments.steps), *["--checkpointing"] * arguments.checkpointing]
    for arm in arguments.arms:
        if not (arm == "peft float32" and arguments.shape == "1b"):
            own = ["--shape", arguments.shape, "--keep-decoded", str(arguments.keep_decoded), "--arm", arm]
            yield [sys.executable, "-W", "ignore", __file__, "--model", folder, *own, *given]
    for peer in arguments.peer:
        tool, _, python = peer.partition("=")
        for bits in (4, 3, 2) if tool == "hqq" else (4,):
            model = arguments.gptq if tool == "gptqmodel" else folder
            own = ["--tool", tool, "--bits", str(bits), "--rows", str(SHAPES[arguments.shape])]
            yield [python, "-W", "ignore", str(PEERS / "train_step_arm.py"), "--model", model, *own, *given]


@contextmanager
def model_folder(arguments: argparse.Namespace) -> Iterator[str]:
    """The folder of the model; a random one is made for the block."""
    if arguments.shape != "1b":
        yield str(locate(arguments.model)[0])
        return
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32_000,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        yield folder


def main() -> None:
    """Run every arm in turn, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--keep-decoded", type=int, default=0, help="megabytes of decoded weights slimtune may keep")
    parser.add_argument("--peer", action="append", default=[], help=f"NAME=PYTHON, NAME one of {', '.join(TOOLS)}")
    parser.add_argument("--gptq", default="", help="the model's folder in GPTQ's format, for gptqmodel")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--arm", choices=ARMS, help="run this one here and print its facts")
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(run(arguments)))
        return
    rows = []
    with model_folder(arguments) as folder:
        for repeat in range(arguments.repeats):
            for command in commands(arguments, folder):
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                facts = json.loads(done.stdout.splitlines()[-1])
                rows.append({"repeat": repeat, **facts})
                cost = f"{facts['step_cpu_seconds']:.2f} CPU s a step, {facts['peak_rss_bytes'] / 1e9:.2f} GB"
                print(f"{facts['arm']:15} {cost}", flush=True)
    name = "train_step" + "_1b" * (arguments.shape == "1b") + "_checkpointing" * arguments.checkpointing
    name += f"_kept_{arguments.keep_decoded}" * (arguments.keep_decoded > 0)
    RESULTS.mkdir(exist_ok=True)
    from slimtune.recipe.run import environment  # with a trainer, whose memory no arm should count

    facts = {"environment": environment(), "seed": 0, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
