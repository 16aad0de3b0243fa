"""GPTQModel's GPTQ as one arm of the weight-quantization benchmark.

Runs in GPTQModel's own virtual environment (see README.md beside this file), never in slimtune's:

    python gptqmodel_arm.py --model DIR --tokens tokens.safetensors --bits 4 --group-size 64 --samples 32 --output OUT

quantizes every decoder-block linear of the float32 model DIR and writes OUT as a plain float32 Hugging Face folder that
holds the *dequantized* weights, so that one evaluator scores every arm, beside OUT/result.json with what it cost.
The weights are read back from GPTQModel's own checkpoint through its own TorchLinear, so they are what it would serve.

`Meter`, `write_folder`, `share_unquantized_` and `largest_difference` know nothing of GPTQModel; hqq_arm.py uses them
too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default on two cores is 1, which its own loader refuses
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling 210 dequantizers costs minutes and changes no number

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Weights = dict[str, torch.Tensor]


class Meter:
    """What the body of a `with` costs this process: CPU and wall seconds, and the peak of resident memory in bytes.

    CPU seconds are user and system time of all threads and of the children waited for. The peak is of the body alone:
    the kernel's high-water mark is reset on entry (Linux: /proc/self/clear_refs), so what lay in memory before and was
    still needed counts, and what importing and loading had already given back does not.
    """

    def __enter__(self) -> Meter:
        gc.collect()
        self.peak_before = _peak_rss()
        Path("/proc/self/clear_refs").write_text("5")
        self.rss_before = _peak_rss()
        self._cpu, self._wall = _cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_seconds = time.perf_counter() - self._wall
        self.cpu_seconds = _cpu_seconds() - self._cpu
        self.peak_rss = _peak_rss()

    def facts(self) -> dict[str, float | int]:
        """The readings as they stand in result.json."""
        return {
            "cpu_seconds": round(self.cpu_seconds, 2),
            "wall_seconds": round(self.wall_seconds, 2),
            "peak_rss_bytes": self.peak_rss,
            "rss_before_bytes": self.rss_before,
            "process_peak_rss_bytes": max(self.peak_before, self.peak_rss),
        }


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_rss() -> int:
    # Not ru_maxrss: a child inherits that from the parent that started it, so a large driver would stand for its arms.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def write_folder(source: Path, weights: Weights, target: Path) -> torch.nn.Module:
    """Write `source` with `weights` (linear's name -> (out, in)) put in as a float32 folder; return that model.

    Raises:
        KeyError, RuntimeError: a name or shape the model does not have.
        ValueError: a decoder-block linear without a weight.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name}
    if linears.keys() != weights.keys():
        raise ValueError(f"quantized and decoder-block linears differ: {sorted(linears.keys() ^ weights.keys())}")
    with torch.no_grad():
        for name, weight in weights.items():
            linears[name].weight.copy_(weight)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


def share_unquantized_(peer: torch.nn.Module, written: torch.nn.Module, weights: Weights) -> None:
    """Give `peer` the float32 tensors and buffers that `written` has outside the linears named in `weights`."""
    for name, module in written.named_modules():
        if name not in weights:
            ours = peer.get_submodule(name)
            ours._parameters.update(module._parameters)
            ours._buffers.update(module._buffers)


@torch.inference_mode()
def largest_difference(peer: torch.nn.Module, written: torch.nn.Module, tokens: torch.Tensor) -> float:
    """The largest absolute difference of two models' logits for `tokens` (batch, length)."""
    return (peer(tokens).logits.float() - written(tokens).logits).abs().max().item()


def main() -> None:
    """Quantize, write the folder, then result.json."""
    args = _arguments()
    tokens = load_file(args.tokens)["tokens"][: args.samples]
    with tempfile.TemporaryDirectory() as scratch:
        config, cost = _quantize(args, tokens, Path(scratch))
        peer = _served(Path(scratch))
        weights, stored_bits = _dequantized(peer)
        written = write_folder(args.model, weights, args.output)
        half = largest_difference(peer, written, tokens[:1, :64])
        share_unquantized_(peer, written, weights)
        single = largest_difference(peer, written, tokens[:1, :64])
    result = {
        "method": "gptqmodel",
        "versions": {name: version(name) for name in ("gptqmodel", "torch", "transformers")},
        "bits": args.bits,
        "group_size": args.group_size,
        **config,
        "samples": len(tokens),
        "length": tokens.shape[1],
        **cost,
        "effective_bits": args.bits + (16 + (0 if args.symmetric else args.bits)) / args.group_size,
        "stored_bits": stored_bits,
        "max_logit_difference": {"float16": half, "float32": single},
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--act-order", action="store_true", help="full act-order in place of the group-aware one")
    parser.add_argument("--mse", type=float, default=0.0, help="exponent of the clipping search; 0 is off")
    parser.add_argument("--damp", type=float, default=None, help="dampening; GPTQModel's default if left out")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the model calibrated")
    parser.add_argument("--offload", action="store_true", help="keep the model on disk while quantizing")
    return parser.parse_args()


def _quantize(args: argparse.Namespace, tokens: torch.Tensor, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quantize into a GPTQModel checkpoint at `folder`; return the settings used and the cost of quantizing."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=args.bits,
        group_size=args.group_size,
        sym=args.symmetric,
        desc_act=args.act_order,
        act_group_aware=not args.act_order,
        mse=args.mse,
        damp_percent=args.damp,
        device="cpu",
        offload_to_disk=args.offload,
    )
    model = GPTQModel.load(str(args.model), config, dtype=getattr(torch, args.dtype))
    calibration = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    with Meter() as meter:
        model.quantize(calibration, batch_size=1)
    model.save(str(folder))
    settings = {
        "symmetric": config.sym,
        "act_order": config.desc_act,
        "act_group_aware": config.act_group_aware,
        "static_groups": config.static_groups,
        "mse": config.mse,
        "damp_percent": config.damp_percent,
        "calibration_dtype": args.dtype,
        "offload_to_disk": args.offload,
    }
    return settings, meter.facts()


def _served(folder: Path) -> torch.nn.Module:
    """GPTQModel's checkpoint at `folder` as it runs it on a CPU: float16, TorchLinear."""
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model.eval()


def _dequantized(peer: torch.nn.Module) -> tuple[Weights, float]:
    """Every TorchLinear's weight (out, in), and the bits a weight takes in the checkpoint, g_idx left out."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    linears = {name: m for name, m in peer.named_modules() if isinstance(m, TorchLinear)}
    weights = {name: m.dequantize_weight().T.detach().float() for name, m in linears.items()}
    stored = sum(t.numel() * t.element_size() for m in linears.values() for t in (m.qweight, m.qzeros, m.scales))
    for name, linear in linears.items():  # the linear itself, fed unit vectors, gives its weight back
        unit = torch.eye(linear.in_features, dtype=linear.scales.dtype)
        if not torch.equal(linear(unit).T.float(), weights[name]):
            raise ValueError(f"{name}: TorchLinear does not compute with its dequantized weight")
    return weights, 8 * stored / sum(w.numel() for w in weights.values())


if __name__ == "__main__":
    main()
