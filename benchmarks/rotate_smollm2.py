"""What a rotation does to SmolLM2-135M: is it exact, what does it cost, and how much more even are activations.

For each kind of rotation, folded alone and with the online transforms: CPU seconds, how far the logits move, perplexity
of the first tokens of WikiText-2 before and after; and of the input of every linear, by kind, the kurtosis and the
error of rounding it to 4 bits (per token, symmetric, no clipping). Then perplexity where every linear of the blocks
reads 4-bit activations, with 16-bit and with 4-bit weights (per output channel, symmetric, round to nearest).

    python benchmarks/rotate_smollm2.py --model DIR --text wiki.test.raw.gz --calibration c4_sample.jsonl.gz
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimtune
from slimtune.arch import ModelMap, bind
from slimtune.calib.data import calibration_tokens, text_tokens
from slimtune.calib.outliers import outliers
from slimtune.calib.rows import DataSource, read_rows, read_text
from slimtune.evaluate.perplexity import perplexity
from slimtune.recipe.run import environment
from slimtune.rotate.fuse import rotate_
from slimtune.rotate.options import Rotation

RESULT = Path(__file__).parent / "results" / "rotate_smollm2.json"
ONLINE = ((), ("r4",), ("r4", "heads"))
SEEDS = (0, 1, 2)
TOKENS, LENGTH = 3072, 512
LEVELS = 7  # of 4 bits, symmetric


def rounded(x: Tensor) -> Tensor:
    """`x` in 4 bits, one scale a token."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LEVELS
    return (x / scale).round().clamp(-LEVELS - 1, LEVELS) * scale


@contextmanager
def reading(model: nn.Module, modelmap: ModelMap, hook: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Every linear of the blocks reads what `hook` makes of its name and its input."""
    handles = [
        model.get_submodule(port.name).register_forward_pre_hook(lambda _, args, n=port.name: (hook(n, args[0]),))
        for port in modelmap.linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_errors(model: Any, modelmap: ModelMap, tokens: Tensor) -> dict[str, float]:
    """Squared error of 4-bit inputs relative to their square, a mean over tokens, for each linear."""
    sums: dict[str, list[float]] = defaultdict(list)

    def measure(name: str, x: Tensor) -> Tensor:
        sums[name].append(float(((rounded(x) - x).square().sum(-1) / x.square().sum(-1)).mean()))
        return x

    with reading(model, modelmap, measure):
        for window in tokens.split(2):
            model.base_model(window, use_cache=False)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def by_kind(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """Mean and largest over the blocks."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        kinds[name.rsplit(".", 1)[-1]].append(value)
    return {k: {"mean": round(sum(v) / len(v), 5), "largest": round(max(v), 5)} for k, v in kinds.items()}


def measured(model: Any, text: Tensor, look: Tensor) -> dict[str, Any]:
    """The activations of a model, and its perplexities with 4-bit ones; its weights are rounded by this."""
    modelmap = bind(model)
    found = {name: one.kurtosis for name, one in outliers(model, modelmap, look).items()}
    facts: dict[str, Any] = {
        "perplexity": perplexity(model, text, length=LENGTH).value,
        "kurtosis": by_kind(found),
        "largest_kurtosis": max(found.values()),
        "input_error_4_bits": by_kind(input_errors(model, modelmap, look)),
    }
    with reading(model, modelmap, lambda _, x: rounded(x)):
        facts["perplexity_w16a4"] = perplexity(model, text, length=LENGTH).value
    slimtune.quantize(model, "rtn", bits=4, group_size=-1, sym=True)
    with reading(model, modelmap, lambda _, x: rounded(x)):
        facts["perplexity_w4a4"] = perplexity(model, text, length=LENGTH).value
    return facts


def main() -> None:
    """Every kind of rotation with every set of online transforms, and several seeds of the random ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True, help="WikiText-2's test text")
    parser.add_argument("--calibration", required=True, help="what learned rotations learn from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = slimtune.load(arguments.model)
    text = text_tokens(read_text(arguments.text), tokenizer)
    look, text = text[TOKENS : TOKENS + 2 * LENGTH].view(2, LENGTH), text[:TOKENS]
    rows = read_rows(DataSource(path=arguments.calibration))
    learnt = calibration_tokens(rows, tokenizer, 16, LENGTH, 0, "calibration")
    with torch.no_grad():
        wanted = model(look, use_cache=False).logits
    results = [{"kind": "none", **measured(model, text, look)}]
    print(json.dumps(results[0]), flush=True)
    arms = [(kind, 0, online) for online in (ONLINE[0], ONLINE[2], ONLINE[1]) for kind in ("hadamard", "learned")]
    arms += [("orthogonal", 0, ONLINE[2])]
    arms += [(kind, seed, ONLINE[2]) for seed in SEEDS[1:] for kind in ("hadamard", "learned")]
    for kind, seed, online in arms:
        model, _ = slimtune.load(arguments.model)
        start = time.process_time()
        facts = rotate_(model, bind(model), Rotation(kind=kind, seed=seed, online=online), tokens=learnt)
        spent = time.process_time() - start
        with torch.no_grad():
            logits = model(look, use_cache=False).logits
        results.append(
            {
                "kind": kind,
                "seed": seed,
                "online": online,
                "cpu_seconds": round(spent, 2),
                "logit_error": facts.logit_error,
                "logit_error_on_text": float((logits - wanted).norm() / wanted.norm()),
                **measured(model, text, look),
            }
        )
        print(json.dumps({k: v for k, v in results[-1].items() if not isinstance(v, dict)}), flush=True)
        facts_of = {"environment": environment(), "tokens": TOKENS, "length": LENGTH, "results": results}
        RESULT.write_text(json.dumps(facts_of, indent=1) + "\n")


if __name__ == "__main__":
    main()
