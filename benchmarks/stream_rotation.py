"""What rotating a folder takes in memory and in CPU seconds, whole and streamed: a random 1B-shape Llama in bfloat16.

    python benchmarks/stream_rotation.py --tokenizer DIR

The folder (2.5 GB, tied embeddings) is made in a scratch place and removed, and so are the rotated ones (3.0 GB each).
Each arm is a process of its own; what it had resident before it loaded anything stands beside its peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from slimtune.kernels.memory import PeakMemory

RESULT = Path(__file__).parent / "results" / "stream_rotation.json"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def make(folder: Path, tokenizer: Path, blocks: int) -> None:
    """A random model, written by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**LLAMA, "num_hidden_layers": blocks})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(1, 0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def arm(name: str, folder: Path, output: Path) -> dict[str, float | str]:
    """One way of rotating; runs in a process of its own."""
    import slimtune
    from slimtune.export.native import write_model

    before, memory = psutil.Process().memory_info().rss, PeakMemory()
    memory.restart()
    start, cpu = time.perf_counter(), time.process_time()
    if name == "streamed":
        error = slimtune.rotate_folder(str(folder), output, dtype="bfloat16").logit_error
    else:
        model, tokenizer = slimtune.load(str(folder), dtype="bfloat16")
        found = []
        slimtune.rotate(model, facts=found.append)
        output.mkdir()
        write_model(model, tokenizer, output)
        error = found[0].logit_error
    return {
        "arm": name,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "rss_before_gb": round(before / 1e9, 2),
        "peak_rss_gb": round(memory.resident / 1e9, 2),
        "logit_error": error,
    }


def main() -> None:
    """Make the model, run both arms, compare what they wrote, and write the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model folder to take the tokenizer from")
    parser.add_argument("--scratch", type=Path, help="where there is room for 9 GB")
    parser.add_argument("--blocks", type=int, default=LLAMA["num_hidden_layers"])
    parser.add_argument("--arm", nargs=3, metavar=("NAME", "FOLDER", "OUTPUT"), help="used by the script itself")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(arm(args.arm[0], Path(args.arm[1]), Path(args.arm[2]))))
        return
    from slimtune.arch.weights import Checkpoint
    from slimtune.recipe.run import environment

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch) / "model"
        make(folder, args.tokenizer, args.blocks)
        rows = []
        for name in ("streamed", "whole"):
            command = [sys.executable, __file__, "--tokenizer", args.tokenizer, "--arm", name, folder]
            done = subprocess.run([*command, Path(scratch) / name], capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
        ours, theirs = (Checkpoint(Path(scratch) / name) for name in ("streamed", "whole"))
        same = ours.files.keys() == theirs.files.keys() and all(
            torch.equal(ours.read([name])[name], theirs.read([name])[name]) for name in theirs.files
        )
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shape = {**LLAMA, "num_hidden_layers": args.blocks}
    facts = {"environment": environment(), "model": shape, "bytes": size, "same_bits": same, "rows": rows}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    print("same bits:", same)


if __name__ == "__main__":
    main()
