"""How fast a model reads a prompt and writes after it, as one arm of `speed.py`.

Runs in the environment of the tool it names, and needs nothing of slimtune:

    python speed_arm.py --tool bitsandbytes --model DIR          # also stock-float32, stock-bfloat16, hqq, gptqmodel
    python speed_arm.py --tool llama.cpp --model FILE.gguf

and prints CPU seconds on one thread as one line of JSON: of 512 tokens read at once, and of 32 written one by one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

PROMPT, NEW = 512, 32
Clocks = tuple[float, float]


def of_torch(model: Any) -> Callable[[], Clocks]:
    """A turn of a model of transformers: the seconds of the prompt, and of the rest."""
    import torch

    tokens = torch.randint(0, 40_000, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def turn() -> Clocks:
        with torch.no_grad():
            start = time.process_time()
            out = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
            middle = time.process_time()
            for _ in range(NEW):
                token = out.logits[:, -1:].argmax(-1)
                cache = {name: out[name] for name in ("cache", "past_key_values") if name in out}
                out = model(input_ids=token, **cache, use_cache=True)
            out.logits[:, -1:].argmax(-1).item()
        return middle - start, time.process_time() - middle

    return turn


def of_llama_cpp(path: str) -> Callable[[], Clocks]:
    """A turn of llama.cpp."""
    import llama_cpp.llama_cpp as library
    import numpy as np
    from llama_cpp import Llama
    from llama_cpp_arm import with_field

    defaults = library.llama_model_default_params
    library.llama_model_default_params = lambda: with_field(defaults(), "use_extra_bufts", False)  # see llama_cpp_arm
    model = Llama(path, n_ctx=PROMPT + NEW + 8, n_batch=PROMPT, n_threads=1, n_threads_batch=1, verbose=False)
    tokens = np.random.default_rng(0).integers(0, 40_000, PROMPT).tolist()

    def turn() -> Clocks:
        model.reset()
        start = time.process_time()
        model.eval(tokens)
        middle = time.process_time()
        for _ in range(NEW):
            model.eval([int(np.argmax(np.ctypeslib.as_array(model._ctx.get_logits(), (model.n_vocab(),))))])
        return middle - start, time.process_time() - middle

    return turn


def loaded(tool: str, folder: str) -> Any:
    """A model of transformers, at 4 bits by the tool's defaults and groups of 64, in bfloat16 elsewhere."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig

    config: Any = None
    if tool == "bitsandbytes":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    elif tool == "hqq":
        config = HqqConfig(nbits=4, group_size=64)
    torch.set_num_threads(1)
    if tool == "gptqmodel":
        from gptqmodel import GPTQModel

        return GPTQModel.load(folder, device="cpu", dtype=torch.bfloat16).model.eval()
    dtype = torch.float32 if tool == "stock-float32" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu" if config else None, quantization_config=config
    ).eval()


def best(turn: Callable[[], Clocks], repeats: int) -> dict[str, float]:
    """Tokens a CPU second of the best turn but the first."""
    clocks = [turn() for _ in range(repeats + 1)][1:]
    prefill, decode = (min(column) for column in zip(*clocks, strict=True))
    return {"prefill_tokens_per_cpu_second": PROMPT / prefill, "decode_tokens_per_cpu_second": NEW / decode}


def main() -> None:
    """Load, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    turn = of_llama_cpp(args.model) if args.tool == "llama.cpp" else of_torch(loaded(args.tool, args.model))
    package = {"llama.cpp": "llama-cpp-python"}.get(args.tool, args.tool)
    versions = {} if args.tool.startswith("stock") else {package: version(package)}
    print(json.dumps({"versions": versions, **best(turn, args.repeats)}))


if __name__ == "__main__":
    main()
