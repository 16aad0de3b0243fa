"""Some rows and columns of a packed weight that cannot be cut as they lie: rounded again by the method they are of."""

import pytest
import torch
from torch import Tensor

from pico import logits, pico_inputs, pico_model
from slimtune.arch import bind
from slimtune.prune.groups import axes
from slimtune.prune.surgery import PrunePlan, prune_
from slimtune.quant import QUANTIZERS, QTensor, QuantLinear
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.fp8 import Fp8
from slimtune.quant.hqq import Hqq
from slimtune.quant.layouts import Affine, Codebook
from slimtune.quant.nf4 import Nf4
from slimtune.quant.rtn import Rtn
from slimtune.quant.select import select


def off(weight: QTensor, wanted: Tensor) -> float:
    return float((weight.dequantize() - wanted).square().sum() / wanted.square().sum())


def by(method: str, bits: int, weight: Tensor) -> QTensor:
    """Quantized without calibration."""
    return QUANTIZERS[method](bits=bits)(weight, {"hessian": torch.eye(weight.shape[1])})  # type: ignore[call-arg]


@pytest.mark.parametrize("method", ["quip", "trellis"])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(96, None), (None, 75), (37, 144)])
def test_a_turned_weight_stays_in_its_layout(method: str, bits: int, rows: int | None, columns: int | None) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(128, 192) * torch.rand(128, 1) * (1 + 3 * (torch.arange(192) % 11 == 0))
    q = by(method, bits, weight)
    kept = [None if n is None else torch.randperm(size)[:n].sort().values for n, size in ((rows, 128), (columns, 192))]
    smaller, reason = select(q, *kept)
    wanted = q.dequantize()
    wanted = wanted if kept[0] is None else wanted[kept[0]]
    wanted = wanted if kept[1] is None else wanted[:, kept[1]]
    assert smaller.layout == type(q.layout)(*wanted.shape, bits) and f"rounded again to {bits} bits" in reason
    assert off(smaller, wanted) < 1.3 * off(by(method, bits, wanted), wanted)
    # What rounding to the nearest in groups of 64 loses, with room for one draw of the weights.
    assert off(smaller, wanted) < 0.6 * off(Rtn(bits=bits)(wanted, {}), wanted)


@pytest.mark.parametrize("method", ["quip", "trellis"])
def test_a_pruned_model_keeps_its_layouts_and_names_what_was_rounded(method: str) -> None:
    model = pico_model("llama")
    modelmap = bind(model)
    quantize_(model, modelmap, all_linear(QUANTIZERS[method](bits=2)), tokens=torch.randint(6, 262, (2, 16)))
    found = axes(modelmap, ("ffn",))
    kept = {axis.name: tuple(range(0, axis.units, 2)) for axis in found}
    facts = prune_(model, modelmap, PrunePlan(found, kept))
    assert {fact.name for fact in facts.requantized} == {part.port for axis in found for part in axis.parts}
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert {layer.layout.tag for layer in layers} == {{"quip": "e8p", "trellis": "trellis"}[method]}
    assert torch.isfinite(logits(model, pico_inputs(model))).all()


@pytest.mark.parametrize("method", [Nf4(block_size=16), Fp8(group_size=16), Hqq(bits=3, group_size=16)])
def test_broken_groups_are_made_anew_by_their_method(method: Nf4 | Fp8 | Hqq) -> None:
    q = method(torch.randn(8, 64), {})
    columns = torch.arange(0, 64, 3)
    smaller, reason = select(q, None, columns)
    wanted = method(q.dequantize()[:, columns].contiguous(), {})
    assert isinstance(q.layout, Affine | Codebook) and smaller.layout == wanted.layout and "groups of 16" in reason
    assert torch.equal(smaller.dequantize(), wanted.dequantize())
