"""HQQ as one arm of the weight-quantization benchmark.

Runs in HQQ's own virtual environment (see README.md beside this file), never in slimtune's:

    python hqq_arm.py --model DIR --bits 4 --group-size 64 --output OUT

quantizes every decoder-block linear of the float32 model DIR and writes OUT as a plain float32 Hugging Face folder that
holds the *dequantized* weights, so that one evaluator scores every arm, beside OUT/result.json with what it cost.
HQQ reads no calibration text: `--tokens` and `--samples` are taken so that one driver calls every arm alike, and the
tokens only feed the check that HQQ's own model computes what the folder does.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gptqmodel_arm import Meter, Weights, largest_difference, share_unquantized_, write_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantize, write the folder, then result.json."""
    args = _arguments()
    peer, config, cost = _quantized(args)
    weights, stored_bits = _dequantized(peer)
    written = write_folder(args.model, weights, args.output)
    tokens = load_file(args.tokens)["tokens"][:1, :64]
    half = largest_difference(peer, written, tokens)
    share_unquantized_(peer, written, weights)
    for linear in _linears(peer).values():  # float32 around the quantized weights, which stay as they are stored
        linear.forward = lambda x, linear=linear: x @ linear.dequantize().float().T
    single = largest_difference(peer, written, tokens)
    result = {
        "method": "hqq",
        "versions": {name: version(name) for name in ("hqq", "torch", "transformers")},
        "bits": args.bits,
        "group_size": args.group_size,
        **config,
        "samples": 0,
        **cost,
        "effective_bits": args.bits + 32 / args.group_size,
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
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--axis", type=int, default=1, choices=(0, 1), help="1 groups along the inputs, 0 the outputs")
    parser.add_argument("--round-zero", action=argparse.BooleanOptionalAction, default=None, help="HQQ: at 4 bits only")
    return parser.parse_args()


def _quantized(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Any], dict[str, Any]]:
    """HQQ's own model (float16, its default), the settings used and the cost of quantizing."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    config = BaseQuantizeConfig(nbits=args.bits, group_size=args.group_size, axis=args.axis)
    params = config["weight_quant_params"]
    if args.round_zero is not None:
        params["round_zero"] = args.round_zero
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    with Meter() as meter:
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
    settings = {"symmetric": False, "act_order": False, **{k: params[k] for k in ("axis", "optimize", "round_zero")}}
    return model, settings, meter.facts()


def _linears(peer: torch.nn.Module) -> dict[str, Any]:
    from hqq.core.quantize import HQQLinear

    return {name: m for name, m in peer.named_modules() if isinstance(m, HQQLinear)}


def _dequantized(peer: torch.nn.Module) -> tuple[Weights, float]:
    """Every HQQLinear's weight (out, in), and the bits a weight takes as HQQ packs it."""
    linears = _linears(peer)
    weights = {name: m.dequantize().detach().float() for name, m in linears.items()}
    parts = [t for m in linears.values() for t in (m.W_q, m.meta["scale"], m.meta["zero"])]
    stored = sum(t.numel() * t.element_size() for t in parts)
    for name, linear in linears.items():  # the linear itself, fed unit vectors, gives its weight back
        unit = torch.eye(linear.in_features, dtype=linear.compute_dtype)
        if not torch.equal(linear(unit).T.float(), weights[name]):
            raise ValueError(f"{name}: HQQLinear does not compute with its dequantized weight")
    return weights, 8 * stored / sum(w.numel() for w in weights.values())


if __name__ == "__main__":
    main()
