"""llama.cpp's side of `llama_cpp_reads_slimtune.py`: load a GGUF file, generate greedily, and score the prompt.

Runs in an environment with llama-cpp-python and numpy:

    python llama_cpp_arm.py JOB.json

`JOB.json` names `model`, perhaps `adapter`, `prompts` (lists of token ids), `texts` (to be tokenized), `new_tokens`,
and `out`, the JSON file to write: `replies`, `logits` (of each prompt's last token), `tokens` (of the texts).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as library
import numpy as np
from llama_cpp import Llama


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    # Weights stay as they are in the file: repacked ones use AMX, and crash where a machine has it but may not use it.
    defaults = library.llama_model_default_params
    library.llama_model_default_params = lambda: with_field(defaults(), "use_extra_bufts", False)
    model = Llama(
        job["model"],
        lora_path=job.get("adapter"),
        n_ctx=job["context"],
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
    )
    found = [answer(model, prompt, job["new_tokens"]) for prompt in job["prompts"]]
    facts: dict[str, Any] = {
        "replies": [reply for reply, _ in found],
        "logits": [logits for _, logits in found],
        "tokens": [model.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]],
    }
    Path(job["out"]).write_text(json.dumps(facts))


def with_field(params: Any, name: str, value: object) -> Any:
    setattr(params, name, value)
    return params


def answer(model: Llama, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The greedy continuation, and the logits after the prompt."""
    model.reset()
    model.eval(prompt)
    logits = np.array(model.scores[model.n_tokens - 1], dtype=np.float64)
    reply: list[int] = []
    for _ in range(new_tokens):
        token = int(np.argmax(model.scores[model.n_tokens - 1]))
        reply.append(token)
        model.eval([token])
    return reply, [round(float(value), 5) for value in logits]


if __name__ == "__main__":
    main()
