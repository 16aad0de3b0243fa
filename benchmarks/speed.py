"""How fast 4, 3 and 2 bits read and write on one core: slimtune beside stock transformers and other tools.

SmolLM2-135M, 512 tokens read at once, then 32 written one by one, each arm in a process of its own, in turns; the best
of its turns counts, in tokens a CPU second. slimtune's arms are those of `slimtune generate` (`quant/decoding.py`),
with codes by rounding to nearest, groups of 64, in bfloat16; W8A8 with one scale a row and a token. Peers run in
environments of their own (`peers/README.md`), at 4 bits; llama.cpp on a q4_0 file that slimtune wrote, GPTQModel on a
GPTQ folder of ours.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --work DIR --peer bitsandbytes=PYTHON --peer llama.cpp=PYTHON
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import slimtune
from slimtune.evaluate.inference import inference
from slimtune.export.load import locate
from slimtune.quant.decoding import decoding
from slimtune.recipe.run import environment

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from speed_arm import best, of_torch

RESULT = Path(__file__).parent / "results" / "speed.json"
ARM = Path(__file__).parent / "peers" / "speed_arm.py"
GROUPS = {"bits": 4, "group_size": 64}
OURS: dict[str, dict[str, Any]] = {
    "slimtune 4": {"method": "rtn", **GROUPS},
    "slimtune 3": {"method": "rtn", **GROUPS, "bits": 3},
    "slimtune 2": {"method": "rtn", **GROUPS, "bits": 2},
    "slimtune nf4": {"method": "nf4"},
    "slimtune W8A8": {"method": "rtn", "bits": 8, "group_size": -1, "sym": True, "activations": {"bits": 8}},
}
FILES = {"llama.cpp": ("gguf", "q4_0"), "gptqmodel": ("gptq", "")}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One of slimtune's arms, here."""
    torch.set_num_threads(1)
    options = dict(OURS[arguments.arm])
    model, _ = slimtune.load(arguments.model, dtype="bfloat16")
    model = slimtune.quantize(model, options.pop("method"), **options)
    with inference(model), decoding(model):
        return best(of_torch(model), arguments.repeats)


def commands(arguments: argparse.Namespace, folder: str) -> Iterator[tuple[str, list[str]]]:
    """Every arm's name, and how to run it."""
    given = ["--repeats", str(arguments.repeats)]
    for tool in ("stock-float32", "stock-bfloat16"):
        yield tool, [sys.executable, "-W", "ignore", str(ARM), "--tool", tool, "--model", folder, *given]
    for arm in OURS:
        yield arm, [sys.executable, "-W", "ignore", __file__, "--model", folder, "--arm", arm, *given]
    for peer in arguments.peer:
        tool, _, python = peer.partition("=")
        model = folder if tool not in FILES else str(written(arguments, *FILES[tool]))
        yield tool, [python, "-W", "ignore", str(ARM), "--tool", tool, "--model", model, *given]


def written(arguments: argparse.Namespace, format: str, quantization: str) -> Path:
    """The model at 4 bits as another tool reads it."""
    folder = arguments.work / format
    if not folder.exists():
        model, tokenizer = slimtune.load(arguments.model)
        if format == "gptq":
            model = slimtune.quantize(model, "rtn", **GROUPS)
        slimtune.export(model, tokenizer, format, folder, quantization=quantization)
    return next(folder.glob("*.gguf"), folder)


def main() -> None:
    """Run every arm in turn, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path, help="where files for other tools are kept")
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON: bitsandbytes, gptqmodel, llama.cpp")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arm", choices=OURS, help="run this one here and print its facts")
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(run(arguments)))
        return
    rows = []
    for turn in range(arguments.rounds):
        for arm, command in commands(arguments, str(locate(arguments.model)[0])):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"round": turn, "arm": arm, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    RESULT.write_text(json.dumps({"environment": environment(), "seed": 0, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
