"""What rotating a folder takes in memory and in CPU seconds, whole and streamed: a random Llama in bfloat16.

    python benchmarks/stream_rotation.py --tokenizer DIR [--shape 7b]

The folder (1b: 2.5 GB, tied embeddings; 7b: 13.5 GB) is made in a scratch place, a block at a time, and removed, and so
are the rotated ones. The 7b shape is streamed only. Each arm is a process of its own; what it had resident before it
loaded anything stands beside its peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from slimtune.kernels.memory import PeakMemory

RESULT = Path(__file__).parent / "results" / "stream_rotation.json"
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
ARMS = {"1b": ("streamed", "whole"), "7b": ("streamed",)}


def make(folder: Path, tokenizer: Path, shape: dict[str, Any]) -> None:
    """A random model, as transformers would write it, of one file a block."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**shape, "max_position_embeddings": 2048})
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        block = name.split(".")[2] if ".layers." in name else "rest"
        if name not in tied:
            files.setdefault(f"model-{block}.safetensors", {})[name] = tensor.shape
    for file, shapes in files.items():
        made = {name: torch.empty(size, dtype=torch.bfloat16) for name, size in shapes.items()}
        for tensor in made.values():
            tensor.normal_(*((0, 0.02) if tensor.ndim == 2 else (1, 0.1)))
        save_file(made, folder / file, {"format": "pt"})
    places = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


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
    parser.add_argument("--scratch", type=Path, help="where there is room for 9 GB (7b: 27)")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--blocks", type=int, help="fewer, for a trial")
    parser.add_argument("--arm", nargs=3, metavar=("NAME", "FOLDER", "OUTPUT"), help="used by the script itself")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(arm(args.arm[0], Path(args.arm[1]), Path(args.arm[2]))))
        return
    from slimtune.arch.weights import Checkpoint
    from slimtune.recipe.run import environment

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch) / "model"
        shape = SHAPES[args.shape]
        if args.blocks:
            shape["num_hidden_layers"] = args.blocks
        make(folder, args.tokenizer, shape)
        rows = []
        for name in ARMS[args.shape]:
            command = [sys.executable, __file__, "--tokenizer", args.tokenizer, "--arm", name, folder]
            done = subprocess.run([*command, Path(scratch) / name], capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        facts = {"environment": environment(), "model": shape, "bytes": size, "rows": rows}
        if len(rows) == 2:
            ours, theirs = (Checkpoint(Path(scratch) / name) for name in ARMS[args.shape])
            facts["same_bits"] = ours.files.keys() == theirs.files.keys() and all(
                torch.equal(ours.read([name])[name], theirs.read([name])[name]) for name in theirs.files
            )
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**before, args.shape: facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
