"""The proof that llama.cpp computes from slimtune's GGUF files what transformers computes from the model.

Runs in slimtune's environment and calls `llama_cpp_arm.py` with the python of an environment with llama-cpp-python:

    python llama_cpp_reads_slimtune.py --model smollm2-135m --peer peers/llama/bin/python --output OUT.json

For each export: greedy tokens of llama.cpp beside those of transformers (float32, on the weights as the file holds
them, read back by slimtune), the largest difference of the logits after the prompts, and llama.cpp's tokens of a few
texts beside the tokenizer's. llama.cpp rounds activations, to float16 or in blocks to 8 bits, so a tie may fall the
other way: how many tokens agree before the first that does not, and how close the two best logits were there, stands
beside.

Pico models of every family (`--pico tests`) are compared by logits alone: their greedy tokens mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

import slimtune
from slimtune.arch import bind
from slimtune.export import Source, export
from slimtune.export.gguf import GgufExporter
from slimtune.export.load import load
from slimtune.lora.attach import add_lora
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn

PEER = Path(__file__).with_name("llama_cpp_arm.py")
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "def fibonacci(n):",
)
TEXTS = (
    *PROMPTS,
    "<|im_start|>user\nCafé  2024, 31 % off:\n\n\tÜber 1,234.5 — 東京 🙂<|im_end|>\n",
    "  \n don't we'LL x= 12345;",
)
NEW_TOKENS, CONTEXT = 32, 256
FAMILIES = ("llama", "llama-tied", "llama-biased", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peer", type=Path, required=True, help="python of an environment with llama-cpp-python")
    parser.add_argument("--pico", type=Path, help="slimtune's tests folder: its pico models are compared as well")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    found = {name: version(name) for name in ("slimtune", "torch", "transformers", "gguf")}
    found["llama-cpp-python"] = subprocess.run(
        [args.peer, "-c", "from importlib.metadata import version; print(version('llama-cpp-python'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        pico = families(args, Path(scratch)) if args.pico else []
        rows: list[dict[str, Any]] = []
        for row in smollm2(args, Path(scratch)):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
            facts = {"model": args.model, "new_tokens": NEW_TOKENS, "versions": found, "rows": rows, "pico": pico}
            args.output.write_text(json.dumps(facts, indent=2) + "\n")


def smollm2(args: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """The model as it is in several types, packed in 4 and 3 bits, and with an adapter."""
    loaded = load(args.model)
    source = Source(loaded.model, loaded.tokenizer, loaded.name)
    for kind in ("f16", "q8_0", "q4_0"):
        export(source, "gguf", scratch / kind, kind)
        yield {"export": kind, **compared(args, source, scratch / kind)}
    adapted = Source(stirred(add_lora(loaded.model, r=8, base_name=loaded.name)), loaded.tokenizer, loaded.name)
    export(adapted, "gguf-lora", scratch / "lora")
    row = compared(args, adapted, scratch / "f16", scratch / "lora" / "adapter.gguf")
    yield {"export": "adapter on f16", **row}
    for fields in (
        {"bits": 4, "group_size": 64, "sym": True},
        {"bits": 4, "group_size": 64},
        {"bits": 3, "group_size": 32},
    ):
        fresh = load(args.model)
        quantize_(fresh.model, bind(fresh.model), all_linear(Rtn(**fields)))
        packed = Source(fresh.model, fresh.tokenizer, fresh.name)
        folder = scratch / "packed-{bits}-{group_size}-{sym}".format(**{"sym": False, **fields})
        types = export(packed, "gguf", folder).facts["types"]
        yield {"export": "packed", **fields, "types": types, **compared(args, packed, folder)}


def stirred(model: nn.Module) -> nn.Module:
    """The adapted model with factors that change what it says."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def compared(args: argparse.Namespace, source: Source, folder: Path, adapter: Path | None = None) -> dict[str, Any]:
    """llama.cpp's reading of the file in `folder` beside the model that slimtune reads from it."""
    tokenizer: Any = source.tokenizer
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in PROMPTS
    ]
    job = {"prompts": prompts, "texts": TEXTS, "new_tokens": NEW_TOKENS, "context": CONTEXT}
    theirs = peer(args, folder, job, adapter)
    model: Any = source.model if adapter else GgufExporter().read_back(source, folder)
    agree, gaps, differences = [], [], []
    for prompt, reply, logits in zip(prompts, theirs["replies"], theirs["logits"], strict=True):
        scores = continued(model, prompt, reply)
        differences.append(float((scores[0] - torch.tensor(logits)).abs().max()))
        same = [int(row.argmax()) == token for row, token in zip(scores, reply, strict=False)]
        agree.append(same.index(False) if False in same else len(reply))
        if agree[-1] < len(reply):
            best = scores[agree[-1]]
            gaps.append(round(float(best.max() - best[reply[agree[-1]]]), 4))
    own = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    return {
        "greedy_tokens_that_agree": agree,
        "of": NEW_TOKENS,
        "logit_gap_where_they_part": gaps,
        "max_logit_difference": round(max(differences), 4),
        "texts_tokenized_alike": sum(mine == other for mine, other in zip(own, theirs["tokens"], strict=True)),
        "texts": len(TEXTS),
    }


@torch.no_grad()
def continued(model: Any, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """transformers' logits before each token of `reply`: what agrees with its own greedy choice is its own reply."""
    scores: torch.Tensor = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 :].float()
    return scores


def families(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Pico models of every family, in float32: logits beside transformers'."""
    sys.path.insert(0, str(args.pico))
    pico: Any = importlib.import_module("pico")
    rows = []
    cases: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in FAMILIES]
    cases += [("llama", {"multiple_of": 1, "ratio": 0.5})]
    cases += [("llama", {"targets": ["sublayers"], "ratio": ratio}) for ratio in (0.2, 0.4, 0.7)]
    for family, pruned in cases:
        format = "gguf-deci" if pruned else "gguf"
        width = {"head_dim": 8} if family in ("qwen2", "phi3") else {}  # llama.cpp fixes it there
        model = pico.pico_model(family, vocab_size=pico.VOCAB_SIZE + 1, **width)
        if pruned:
            slimtune.prune(model, importance="random", widths="allocated", **pruned)
        folder = scratch / f"pico-{len(rows)}"
        made = export(Source(model, merging(pico.pico_tokenizer()), "pico"), format, folder, "f32")
        prompt = pico.pico_inputs(model, batch=1, length=4 if family == "mistral" else 12)["input_ids"][0].tolist()
        theirs = peer(args, folder, {"prompts": [prompt], "texts": [], "new_tokens": 0, "context": 16}, None)
        with torch.no_grad():
            wanted = model(torch.tensor([prompt])).logits[0, -1]
        difference = float((torch.tensor(theirs["logits"][0]) - wanted).abs().max())
        rows.append(
            {
                "family": family,
                "format": format,
                **{key: made.facts[key] for key in ("heads", "kv_heads", "ffn") if key in made.facts},
                "max_logit_difference": round(difference, 5),
                "largest": round(float(wanted.abs().max()), 3),
            }
        )
    return rows


def merging(tokenizer: Any) -> Any:
    """A pico tokenizer with one merge: llama.cpp reads none without."""
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    facts["model"]["vocab"]["ab"] = len(tokenizer)
    facts["model"]["merges"] = [["a", "b"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def peer(args: argparse.Namespace, folder: Path, job: dict[str, Any], adapter: Path | None) -> dict[str, Any]:
    """Run llama.cpp's side."""
    place, out = folder.with_suffix(".job.json"), folder.with_suffix(".out.json")
    job = {
        **job,
        "model": str(folder / "model.gguf"),
        "out": str(out),
        **({"adapter": str(adapter)} if adapter else {}),
    }
    place.write_text(json.dumps(job))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(args.peer), str(PEER), str(place)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        sys.exit(f"{folder.name}: llama.cpp's side ended with {done.returncode}\n{done.stderr[-3000:]}")
    facts: dict[str, Any] = json.loads(out.read_text())
    return facts


if __name__ == "__main__":
    main()
