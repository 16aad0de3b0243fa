"""What fits in 24 GB: LLaMA-65B and Llama-2-70B at 2 bits, planned from their configurations alone.

    python plan_65b.py --output results/plan_65b.json

No weight is loaded: a folder with a `config.json` is enough for `slimtune plan`. Beside each plan stands the sum made
here from the shapes, term by term, without slimtune: packed weights, embedding and head in bfloat16, factors in float32
with gradient and Adam's moments, hidden states at the doors of the blocks, one block's activations, the loss's chunk of
logits, and the layer that is being decoded. What a process takes before it does anything (`process`) is in neither sum;
a CUDA context takes about as much.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from slimtune.arch import bind
from slimtune.export.load import empty_model, read_config
from slimtune.quant.layouts import LAYOUTS, layout_to_dict
from slimtune.recipe.packed import DECODING
from slimtune.recipe.plan import RUNTIME_BYTES, plan
from slimtune.recipe.schema import recipe_from

SHARED = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
MODELS = {
    "LLaMA-65B": {"intermediate_size": 22016, "num_key_value_heads": 64},
    "Llama-2-70B": {"intermediate_size": 28672, "num_key_value_heads": 8},
}
LAYOUTS_AT_2_BITS: dict[str, dict[str, Any]] = {"affine": {"group_size": 64}, "e8p": {}, "trellis": {}}
LENGTHS, RANKS = (128, 512, 2048, 4096, 8192), (8, 16)
GB, GIB = 10**9, 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in MODELS:
            for layout in LAYOUTS_AT_2_BITS:
                folder = Path(scratch) / f"{name}-{layout}"
                folder.mkdir()
                ports = write_config(folder, name, layout)
                for rank in RANKS:
                    rows += [row(folder, name, layout, ports, rank, length) for length in LENGTHS]
    found = {"slimtune": version("slimtune"), "torch": torch.__version__}
    args.output.write_text(json.dumps({"versions": found, "card_bytes": 24 * GIB, "rows": rows}, indent=2) + "\n")


def write_config(folder: Path, name: str, layout: str) -> list[tuple[int, int]]:
    """`config.json` of the quantized model; returns the shapes of the linears in the blocks."""
    config = {**SHARED, **MODELS[name]}
    (folder / "config.json").write_text(json.dumps(config))
    ports = bind(empty_model(read_config(folder))).linears
    groups: dict[str, dict[str, Any]] = {}
    for port in ports:
        fields = {"out_features": port.out_features, "in_features": port.in_features, "bits": 2}
        facts = layout_to_dict(LAYOUTS[layout](**fields, **LAYOUTS_AT_2_BITS[layout]))
        groups.setdefault(json.dumps(facts), {**facts, "modules": []})["modules"].append(port.name)
    quantization = {"quant_method": "slimtune", "version": 1, "groups": list(groups.values())}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return [(port.out_features, port.in_features) for port in ports]


def row(folder: Path, name: str, layout: str, ports: list[tuple[int, int]], rank: int, length: int) -> dict[str, Any]:
    """The plan of one training step, and the same by hand."""
    train = {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": length, "gradient_checkpointing": True}
    recipe = recipe_from(
        {
            "model": str(folder),
            "dtype": "bfloat16",
            "data": {"train": {"builtin": "pydocs"}},
            "steps": [{"lora": {"r": rank}}, {"train": train}],
        }
    )
    process = psutil.Process().memory_info().rss + RUNTIME_BYTES
    planned = plan(recipe, memory=24 * GIB).steps[-1].memory_bytes - process
    parts = by_hand(name, layout, ports, rank, length)
    total = sum(parts.values())
    return {
        "model": name,
        "layout": layout,
        "r": rank,
        "tokens": length,
        "planned_gib": round(planned / GIB, 2),
        "by_hand_gib": round(total / GIB, 2),
        "parts_gib": {part: round(size / GIB, 2) for part, size in parts.items()},
        "fits_24_gib_with_a_context": planned + GIB // 2 <= 23.3 * GIB,
    }


def by_hand(name: str, layout: str, ports: list[tuple[int, int]], rank: int, length: int) -> dict[str, float]:
    """Bytes of each thing that is held at the peak of a step with gradient checkpointing."""
    hidden, ffn, blocks, words = 8192, MODELS[name]["intermediate_size"], 80, 32000
    weights = sum(out * inside for out, inside in ports)
    factors = rank * sum(out + inside for out, inside in ports)
    extra = {"affine": weights / 64 * 3, "e8p": 0, "trellis": 0}[layout]  # a scale of 2 bytes and a zero point of 1
    extra += 0 if layout == "affine" else sum(2 * (out + inside) for out, inside in ports)
    norms = (2 * blocks + 1) * hidden * 2
    largest = max(out * inside for out, inside in ports)
    return {
        "packed": weights / 4 + extra,
        "embedding_and_head": 2 * words * hidden * 2 + norms,
        "adapter": factors * 16,
        "doors": blocks * length * hidden * 2,
        "block": length * 2 * (19 * hidden + 5 * ffn),
        "logits": 3 * min(length, 256) * words * 4,
        "decoding": max(4, DECODING.get(layout, 0)) * largest,
    }


if __name__ == "__main__":
    main()
