"""WikiText-2 perplexity of SmolLM2-135M at 4, 3 and 2 bits: slimtune's quantizers beside GPTQModel and HQQ.

Every arm quantizes the same float32 model with the same calibration windows (C4, 512 tokens each) in a process of its
own, and writes back plain float32 weights; one evaluator then scores all of them: token perplexity over windows of 512
on the first 120,000 tokens of the raw test split. The peers run in their own virtual environments (peers/README.md),
with their defaults and with the options that serve them best at few bits (GPTQModel's searched clipping, HQQ's groups
along the other axis); an arm whose environment is missing is left out and named.

    python benchmarks/quantize_smollm2.py --calibration c4.jsonl.gz --text wiki.test.raw.gz --peers DIR --work DIR

`--timing` measures instead the cost of 4 bits with 128 windows, slimtune and GPTQModel one after the other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from slimtune.calib.data import calibration_tokens, text_tokens
from slimtune.calib.rows import DataSource, read_rows, read_text
from slimtune.evaluate.perplexity import perplexity
from slimtune.export.load import load, locate
from slimtune.kernels.precision import fast_forward
from slimtune.quant import QUANTIZERS
from slimtune.recipe.run import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def arms(peers: Path | None, methods: Sequence[str], bits: int, group: int) -> dict[str, tuple[str, str, list[str]]]:
    """Name to (interpreter, script, further arguments), of what there is at this width and group."""
    ours = str(HERE / "slimtune_arm.py")
    found: dict[str, tuple[str, str, list[str]]] = {}
    for method in methods:
        names, kind = {field.name for field in fields(QUANTIZERS[method])}, QUANTIZERS[method]
        grouped = bool(names & {"group_size", "block_size"}) or group == 64  # without groups: once
        if grouped and bits in (kind.widths if "bits" in names else (4,)):
            found[f"slimtune {method}"] = (sys.executable, ours, ["--method", method])
    for name, folder, script, more in (
        ("GPTQModel", "gptq", "gptqmodel_arm.py", []),
        ("GPTQModel mse", "gptq", "gptqmodel_arm.py", ["--mse", "2.4"]),
        ("HQQ", "hqq", "hqq_arm.py", ["--axis", "1"]),
        ("HQQ axis 0", "hqq", "hqq_arm.py", ["--axis", "0"]),
    ):
        python = (peers or Path()) / folder / "bin" / "python"
        if peers is None or not python.exists():
            print(f"left out: {name} (no environment at {python})")
        else:
            found[name] = (str(python), str(HERE / "peers" / script), more)
    return found


def run_arm(arm: tuple[str, str, list[str]], out: Path, arguments: list[str]) -> dict[str, Any]:
    """Run an arm, unless its folder has a result already."""
    python, script, more = arm
    if not (out / "result.json").is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [python, script, *more, "--output", str(out), *arguments]
        with (out.parent / f"{out.name}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    facts: dict[str, Any] = json.loads((out / "result.json").read_text())
    return {k: v for k, v in facts.items() if k not in ("arguments",)}


def score(folder: str, tokens: torch.Tensor, work: Path, key: str) -> float:
    """Perplexity of a plain folder, kept beside it once measured."""
    kept = work / f"{key}.{len(tokens)}.ppl.json"
    if not kept.is_file():
        with fast_forward(torch.device("cpu"), torch.float32):  # the same for every arm; float32 moves it by 0.1 %
            value = perplexity(load(folder).model, tokens, length=512).value
        kept.write_text(json.dumps(value))
    return float(json.loads(kept.read_text()))


def main() -> None:
    """Run what was asked and write benchmarks/results/*.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="", help="rows of text; default: the built-in pydocs")
    parser.add_argument("--windows", type=Path, default=None, help="safetensors with the windows, instead")
    parser.add_argument("--text", default="", help="a raw text to score; default: pydocs' held-out part")
    parser.add_argument("--peers", type=Path, default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-quantize"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--methods", nargs="+", default=["optq", "quip", "rtn"], help="slimtune's")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--timing", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    folder = str(locate(arguments.model)[0])
    loaded = load(folder)
    source = DataSource(path=arguments.calibration) if arguments.calibration else DataSource(builtin="pydocs")
    samples = 128 if arguments.timing else arguments.samples
    if arguments.windows:
        windows = load_file(arguments.windows)["tokens"][:samples].contiguous()
    else:
        windows = calibration_tokens(read_rows(source), loaded.tokenizer, samples, 512, seed=0)
    arguments.work.mkdir(parents=True, exist_ok=True)
    path = arguments.work / f"tokens{samples}.safetensors"
    save_file({"tokens": windows}, path)
    common = ["--model", folder, "--tokens", str(path), "--samples", str(samples)]
    header = {
        "environment": environment(),
        "model": Path(arguments.model).name,
        "seed": 0,
        "calibration": Path(str(source)).name,
    }
    if arguments.timing:
        _timing(arguments, common, header)
        return
    text = read_text(arguments.text) if arguments.text else "\n".join(map(str, read_rows(DataSource(builtin="pydocs"))))
    tokens = text_tokens(text, loaded.tokenizer)[: arguments.tokens]
    rows = [{"arm": "16 bit", "bits": 16, "perplexity": score(folder, tokens, arguments.work, "16bit")}]
    del loaded
    for bits in arguments.bits:
        for group in arguments.groups:
            for name, arm in arms(arguments.peers, arguments.methods, bits, group).items():
                key = f"{name.replace(' ', '-').lower()}-b{bits}-g{group}"
                facts = run_arm(arm, arguments.work / key, [*common, "--bits", str(bits), "--group-size", str(group)])
                value = score(str(arguments.work / key), tokens, arguments.work, key)
                rows.append({"arm": name, "perplexity": value, **facts})
                print(f"{name:14} {bits} bit g{group}: {value:,.2f}  ({facts['cpu_seconds']:.0f} CPU s)", flush=True)
                _write(
                    f"quantize_smollm2_{len(tokens)}.json",
                    {
                        **header,
                        "text": Path(arguments.text).name,
                        "length": 512,
                        "tokens": len(tokens),
                        "samples": samples,
                        "rows": rows,
                    },
                )


def _timing(arguments: argparse.Namespace, common: list[str], header: dict[str, Any]) -> None:
    rows = []
    for repeat in range(arguments.repeats):
        for name, arm in arms(arguments.peers, ["optq"], 4, 128).items():
            if name in ("slimtune optq", "GPTQModel"):
                out = arguments.work / f"timing-{name.replace(' ', '-').lower()}-{repeat}"
                facts = run_arm(arm, out, [*common, "--bits", "4", "--group-size", "128"])
                rows.append({"arm": name, "repeat": repeat, **facts})
                peak = facts["peak_rss_bytes"] / 1e6
                print(f"{name:14} {facts['cpu_seconds']:.0f} CPU s, {peak:.0f} MB", flush=True)
                _write("quantize_timing.json", {**header, "bits": 4, "group_size": 128, "rows": rows})


def _write(name: str, facts: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
