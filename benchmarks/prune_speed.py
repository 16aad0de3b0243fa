"""Is half the model twice as fast: SmolLM2-135M with half of its parameters gone, beside the dense one.

A recipe prunes the model (wanda, fitted), once by half of the blocks' parameters and once by half of all, and exports a
GGUF file. The result is loaded in fresh processes by `AutoModelForCausalLM`, which never import slimtune: its logits
are compared with those of the process that pruned it, and prefill and decode are timed in turns with the dense model's.
Then llama.cpp answers from the GGUF file, where `--peer` names its environment.

With `--shape 1b` the model is a random Llama of the 1B shape (16 layers, 2048 and 8192 wide, 32 heads on 8, SmolLM2's
tokens), pruned by magnitude, without a GGUF file: only its size matters.

    python benchmarks/prune_speed.py --calibration c4.jsonl.gz --work DIR --peer peers/llama/bin/python
    python benchmarks/prune_speed.py --shape 1b --work DIR --of blocks --output DIR/1b.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import slimtune
from slimtune.export.load import load
from slimtune.recipe.run import environment

RESULT = Path(__file__).parent / "results" / "prune_speed.json"
PEER = Path(__file__).parent / "peers" / "llama_cpp_arm.py"
PROMPT = "The most important thing about the sea is that"
STOCK = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert "slimtune" not in sys.modules
tokens = torch.randint(0, 40000, (1, 512), generator=torch.Generator().manual_seed(0))
facts = {"prefill": [], "decode": [], "prefill_cpu": [], "decode_cpu": []}
with torch.no_grad():
    logits = model(tokens[:, :64]).logits
    for turn in range(4):
        clocks = [(time.perf_counter(), time.process_time())]
        out = model(tokens, use_cache=True, logits_to_keep=1)
        clocks.append((time.perf_counter(), time.process_time()))
        for _ in range(32):
            token = out.logits[:, -1:].argmax(-1)
            cache = {name: out[name] for name in ("cache", "past_key_values") if name in out}
            out = model(token, **cache, use_cache=True)
        clocks.append((time.perf_counter(), time.process_time()))
        if turn:
            for name, count, a, b in (("prefill", 512, 0, 1), ("decode", 32, 1, 2)):
                facts[name].append(count / (clocks[b][0] - clocks[a][0]))
                facts[name + "_cpu"].append(count / (clocks[b][1] - clocks[a][1]))
torch.save(logits, sys.argv[2])
print(json.dumps(facts))
"""


def stock(folder: Path, scratch: Path, threads: int) -> tuple[dict[str, list[float]], torch.Tensor]:
    """Speeds and logits of a folder in a process that knows transformers alone."""
    command = [sys.executable, "-c", STOCK, str(folder), str(scratch), str(threads)]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    return json.loads(ran.stdout.splitlines()[-1]), torch.load(scratch, weights_only=True)


def size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def answer(peer: Path, gguf: Path, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """llama.cpp's greedy reply, and its logits after the prompt."""
    job, out = gguf.with_suffix(".job.json"), gguf.with_suffix(".out.json")
    facts = {"model": str(gguf), "prompts": [prompt], "texts": [], "new_tokens": 24, "context": 128, "out": str(out)}
    job.write_text(json.dumps(facts))
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([str(peer), str(PEER), str(job)], check=True, capture_output=True, env=environ)
    said = json.loads(out.read_text())
    return said["replies"][0], torch.tensor(said["logits"][0])


def billion(folder: Path, tokens: Any) -> None:
    """Write a random Llama of the 1B shape, which reads SmolLM2's tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)


def main() -> None:
    """Prune, load again, time in turns, and write the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=("smollm2-135m", "1b"), default="smollm2-135m")
    parser.add_argument("--calibration", default="", help="rows of text; default: the built-in pydocs")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--of", nargs="+", default=["blocks", "model"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", type=Path, help="python of an environment with llama-cpp-python")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    source = {"path": arguments.calibration} if arguments.calibration else {"builtin": "pydocs"}
    dense, large = arguments.work / "dense", arguments.shape == "1b"
    if not dense.is_dir():
        loaded = load(arguments.model)
        if large:
            billion(dense, loaded.tokenizer)
        else:
            loaded.model.save_pretrained(dense)
            loaded.tokenizer.save_pretrained(dense)
    rows = []
    for of in arguments.of:
        folder = arguments.work / f"pruned-{of}"
        prune = {
            "ratio": arguments.ratio,
            "of": of,
            "importance": "magnitude" if large else "wanda",
            "refit": not large,
        }
        # Not in float16: untrained after pruning, one token's logits move by 7 when weights are rounded to that.
        steps = [{"prune": prune}, *([] if large else [{"export": {"format": "gguf", "quantization": "f32"}}])]
        data = {"calibration": {**source, "samples": arguments.samples, "length": 512}}
        if not (folder / "report.json").is_file():
            slimtune.run({"model": str(dense), "seed": 0, "data": data, "steps": steps}, folder)
        rows.append({"of": of, **measured(arguments, dense, folder)})
        print(rows[-1], flush=True)
        head = {
            "environment": environment(),
            "model": "1B shape, random" if large else Path(arguments.model).name,
            "seed": 0,
        }
        facts = {**head, "ratio": arguments.ratio, "threads": arguments.threads, "rounds": arguments.rounds}
        arguments.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def measured(arguments: argparse.Namespace, dense: Path, folder: Path) -> dict[str, Any]:
    """Everything about one pruned model."""
    model: Any = load(str(folder / "model")).model
    tokens = torch.randint(0, 40_000, (1, 512), generator=torch.Generator().manual_seed(0))[:, :64]
    with torch.no_grad():
        own = model(tokens).logits
    speeds: dict[str, dict[str, list[float]]] = {"dense": {}, "pruned": {}}
    for _ in range(arguments.rounds):
        for name, place in (("dense", dense), ("pruned", folder / "model")):
            found, logits = stock(place, arguments.work / "logits.pt", arguments.threads)
            for key, values in found.items():
                speeds[name].setdefault(key, []).extend(values)
    config = json.loads((folder / "model" / "config.json").read_text())
    keys = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    row = {
        "removed_ratio": json.loads((folder / "report.json").read_text())["steps"][0]["facts"]["removed_ratio"],
        "config": {key: config[key] for key in keys},
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": {"dense": size(dense), "pruned": size(folder / "model")},
        "bytes_share": round(size(folder / "model") / size(dense), 4),
        "largest_logit_difference": float((logits - own).abs().max()),
        "tokens_per_second": {n: {k: round(median(v), 1) for k, v in s.items()} for n, s in speeds.items()},
    }
    both = row["tokens_per_second"]
    row["times_as_fast"] = {key: round(both["pruned"][key] / both["dense"][key], 3) for key in both["dense"]}
    if arguments.peer:
        tokenizer = load(str(folder / "model")).tokenizer
        prompt = tokenizer(PROMPT, add_special_tokens=False).input_ids
        stock_model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        reply, theirs = answer(arguments.peer, next((folder / "export").glob("*/*.gguf")), prompt)
        with torch.no_grad():
            scores = stock_model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 :]
        same = [int(line.argmax()) == token for line, token in zip(scores, reply, strict=False)]
        row["llama_cpp"] = {
            "said": tokenizer.decode(reply),
            "largest_logit_difference": round(float((scores[0] - theirs).abs().max()), 4),
            "greedy_tokens_that_agree": same.index(False) if False in same else len(reply),
            "of": len(reply),
        }
    return row


if __name__ == "__main__":
    main()
