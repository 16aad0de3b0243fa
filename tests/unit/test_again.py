"""Merging that stays in few bits: what a layer was in, it is in again, as well as its layout allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune
from pico import logits, pico_inputs, pico_model
from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError
from slimtune.linalg.levels import LEVELS
from slimtune.linalg.packing import pack, unpack
from slimtune.lora.attach import add_lora, plain
from slimtune.lora.merge import merge_packed
from slimtune.quant.again import LARGEST, UPDATE, _codebook, _next, judged, requantize
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.base import QTensor, relative_error
from slimtune.quant.hqq import Hqq
from slimtune.quant.layouts import Affine, Codebook
from slimtune.quant.linear import QuantLinear
from slimtune.quant.nf4 import Nf4
from slimtune.quant.optq import codes_on_grid
from slimtune.quant.quip import Quip
from slimtune.quant.rtn import Rtn
from slimtune.quant.scattered import Scattered
from slimtune.quant.trellis import Trellis

METHODS: dict[str, Any] = {
    "rtn": Rtn(bits=3, group_size=16),
    "symmetric": Rtn(bits=4, group_size=16, sym=True),
    "ragged": Rtn(bits=2, group_size=24),
    "hqq": Hqq(bits=2, group_size=16),
    "nf4": Nf4(block_size=16),
    "quip": Quip(bits=2),
    "trellis": Trellis(bits=2),
}


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a change of rank one that matters, and the Hessian of inputs that are far from white."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 64, generator=g) @ torch.randn(64, 64, generator=g)
    change = torch.randn(48, 1, generator=g) @ torch.randn(1, 64, generator=g)
    return torch.randn(48, 64, generator=g), 0.3 * change, x.T @ x / 400


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("calibrated", [True, False])
def test_layout_stays_and_nothing_is_worse_than_the_old_codes(name: str, calibrated: bool) -> None:
    weight, change, hessian = problem()
    old = METHODS[name](weight, {"hessian": hessian})
    used = hessian if calibrated else None
    target = old.dequantize() + change
    new = requantize(old, target, used)
    assert new.layout == old.layout
    assert relative_error(target, new.dequantize(), used) < 0.8 * relative_error(target, old.dequantize(), used)


@pytest.mark.parametrize("name", METHODS)
def test_weight_that_did_not_change_keeps_its_codes(name: str) -> None:
    weight, _, hessian = problem()
    old = METHODS[name](weight, {"hessian": hessian})
    assert requantize(old, old.dequantize(), hessian) is old


def test_small_change_keeps_the_codes_where_that_is_better() -> None:
    weight, change, hessian = problem()
    old = Quip(bits=2)(weight, {"hessian": hessian})
    target = old.dequantize() + 1e-3 * change
    fresh = Quip(bits=2)(target, {"hessian": hessian})
    assert relative_error(target, fresh.dequantize(), hessian) > 1e-3
    assert requantize(old, target, hessian) is old


def share_of(new: QTensor, old: QTensor, change: Tensor, hessian: Tensor) -> float:
    """How much of a change arrived, in the Hessian's metric; float64."""
    added, change, hessian = (t.double() for t in (new.dequantize() - old.dequantize(), change, hessian))
    return float((added @ hessian * change).sum() / (change @ hessian * change).sum())


def rounded_once(old: QTensor, target: Tensor, hessian: Tensor) -> QTensor:
    """The target on the grid that is there, by error feedback alone."""
    if isinstance(old.layout, Codebook):
        return _codebook(old, target, hessian)
    zero, scale = (old.tensors[name].float() for name in ("zero", "scale"))
    bits = old.layout.bits
    codes = codes_on_grid(target, hessian, scale, zero, torch.arange(64) // 16, bits)
    return QTensor({**old.tensors, "codes": pack(codes.to(torch.uint8), bits)}, old.layout)


@pytest.mark.parametrize(
    "method", [Rtn(bits=3, group_size=16), Rtn(bits=4, group_size=16), Nf4(block_size=16)], ids=str
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_change_smaller_than_a_step_arrives_whole_on_average(method: Any, calibrated: bool) -> None:
    weight, change, hessian = problem()
    used = hessian if calibrated else torch.eye(64)
    old = method(weight, {})
    change = 0.1 * change  # up to 0.3; the steps are some 0.5 and 0.25
    target = old.dequantize() + change
    once = share_of(rounded_once(old, target, used), old, change, used)
    assert once < 0.7, "error feedback loses much of it, or this shows nothing"
    new = requantize(old, target, hessian if calibrated else None)
    assert 0.85 < share_of(new, old, change, used) < 1.15


@pytest.mark.parametrize("calibrated", [True, False])
def test_what_a_way_costs(calibrated: bool) -> None:
    weight, change, hessian = (t.double() for t in problem(2))
    metric = hessian if calibrated else torch.eye(64, dtype=torch.float64)
    old = Rtn(bits=4, group_size=16)(weight, {})
    way = Rtn(bits=3, group_size=16)(weight + change, {})
    before = old.dequantize(torch.float64)
    found = judged(way, before, change, hessian if calibrated else None)
    added = way.dequantize(torch.float64) - before
    energy = torch.trace(change @ metric @ change.T)
    share = torch.trace(added @ metric @ change.T) / energy
    noise = added - share * change
    assert torch.trace(noise @ metric @ change.T).abs() < 1e-9 * energy
    assert found.share == pytest.approx(float(share))
    assert found.cost == pytest.approx(
        float(torch.trace(noise @ metric @ noise.T) / energy + UPDATE * (1 - share) ** 2)
    )
    assert judged(old, before, change, hessian).cost == UPDATE


def test_how_much_to_enlarge_a_change() -> None:
    assert _next([], 4) == 1
    assert _next([(1, 0.2)], 4) == 2, "shares rise late"
    assert _next([(1, 0.2)], 2) == pytest.approx(5) and _next([(1, 0.01)], 2) == LARGEST
    assert _next([(1, 0.2), (2, 1.4)], 4) == pytest.approx(5 / 3)
    assert _next([(1, 0.7), (2, 1.9), (1.25, 1.30)], 4) == pytest.approx(0.875), "back, and back again"
    assert _next([(1, 1.9)], 4) == pytest.approx(1 / 1.9)
    assert _next([(1, 0.7), (2, 1.9), (1.25, 1.95)], 4) is None, "no slope to follow"
    assert _next([(1, 1.03)], 4) is None and _next([(1, 0.2), (2, 0.99)], 4) is None
    assert _next([(1, 0.2), (2, 0.5)], 2) is None and _next([(1, 0.0), (2, 0.0)], 4) is None


def test_a_group_of_zeros_feeds_its_true_error_back() -> None:
    weight, _, hessian = problem()
    weight[:, 16:32] = 0
    change = torch.zeros_like(weight)
    change[:, 16:32] = 0.1  # which the group cannot hold: it decodes to 0 whatever its codes
    old = Nf4(block_size=16, double_quant=False)(weight, {})
    made = _codebook(old, weight + change, hessian).dequantize()
    assert torch.equal(made[:, 16:32], torch.zeros(48, 16))
    blind = _codebook(old, weight + change, None).dequantize()
    assert relative_error(weight + change, made, hessian) < relative_error(weight + change, blind, hessian)


def textbook(w: Tensor, h: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int) -> Tensor:
    """OPTQ as in the paper's algorithm 1, by rows and by inverting what is left after each column; float64."""
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    w, codes = w.clone(), torch.empty_like(w)
    left = order.tolist()
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        j = left[0]
        q = (w[:, j] / scale[:, group[j]] + zero[:, group[j]]).round().clamp(0, 2**bits - 1)
        codes[:, j] = q
        off = (w[:, j] - (q - zero[:, group[j]]) * scale[:, group[j]]) / inverse[0, 0]
        w[:, left] -= off[:, None] * inverse[0]
        left = left[1:]
    return codes


def test_codes_on_a_grid_are_those_of_the_textbook() -> None:
    weight, _, hessian = (t.double() for t in problem(1))
    g = torch.Generator().manual_seed(3)
    group = torch.randint(0, 5, (64,), generator=g)  # scattered, and of different sizes
    scale = 0.5 + torch.rand(48, 5, generator=g, dtype=torch.float64)
    zero = 3 * torch.rand(48, 5, generator=g, dtype=torch.float64)
    got = codes_on_grid(weight, hessian, scale, zero, group, 2)
    assert torch.equal(got, textbook(weight, hessian, scale, zero, group, 2))


def test_codes_of_levels_are_those_of_the_textbook() -> None:
    weight, _, hessian = (t.double() for t in problem(1))
    old = Nf4(block_size=16)(weight, {})
    levels = torch.tensor(LEVELS["nf4"], dtype=torch.float64)
    scale = old.layout.scales(old.tensors, torch.float64).repeat_interleave(16, 1)  # type: ignore[attr-defined]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    w, wanted = weight.clone(), torch.empty(48, 64, dtype=torch.int64)
    for place, j in enumerate(order.tolist()):
        left = order[place:]
        inverse = torch.linalg.inv(damped[left][:, left])
        wanted[:, j] = (w[:, j, None] / scale[:, j, None] - levels).abs().argmin(1)
        off = (w[:, j] - levels[wanted[:, j]] * scale[:, j]) / inverse[0, 0]
        w[:, left] -= off[:, None] * inverse[0]
    got = _codebook(old, weight, hessian)
    assert torch.equal(unpack(got.tensors["codes"], 4, 64).long(), wanted)
    assert all(torch.equal(got.tensors[name], old.tensors[name]) for name in ("scale", "step", "offset"))


def test_grid_of_scattered_groups_is_kept() -> None:
    weight, change, hessian = problem()
    affine = Rtn(bits=4, group_size=16)(weight, {})
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    group = (torch.arange(64) // 16)[order].to(torch.int32)
    layout = Scattered(48, 64, 4, 4)
    old = QTensor({**affine.tensors, "group": group}, layout)
    new = requantize(old, old.dequantize() + 0.1 * change, hessian)
    assert new.layout == layout and new is not old
    assert all(torch.equal(new.tensors[name], old.tensors[name]) for name in ("scale", "zero", "group"))


def test_files_of_others_keep_the_grid_they_came_with() -> None:
    weight, change, hessian = problem()
    made = Rtn(bits=4, group_size=16)(weight, {})
    layout = Affine(48, 64, 4, 16, scale_dtype="float16")
    old = QTensor({**made.tensors, "scale": made.tensors["scale"].half()}, layout)
    new = requantize(old, old.dequantize() + 0.1 * change, hessian)
    assert new.layout == layout and torch.equal(new.tensors["scale"], old.tensors["scale"])
    assert not torch.equal(unpack(new.tensors["codes"], 4, 64), unpack(old.tensors["codes"], 4, 64))


def test_unknown_layouts_are_refused() -> None:
    class Odd(Affine):
        tag = "odd"

    old = Rtn(bits=4, group_size=16)(torch.randn(4, 32), {})
    with pytest.raises(FormatError, match="cannot be made again"):
        requantize(QTensor(old.tensors, Odd(4, 32, 4, 16)), torch.randn(4, 32), None)


# --- whole models ---


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, size: float = 0.1) -> Any:
    model = pico_model(family, dtype=dtype)
    quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=8), ignore=("*.1.mlp.*",)))
    wrapped = add_lora(model, r=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


TOKENS = torch.randint(6, 262, (6, 24), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", ["llama", "qwen2", "t5"])
@pytest.mark.parametrize("tokens", [TOKENS, None], ids=["calibrated", "blind"])
def test_merged_model_is_packed_and_computes_nearly_the_same(family: str, tokens: Tensor | None) -> None:
    model = adapted(family)
    layouts = {name: m.layout for name, m in plain(model).items() if isinstance(m, QuantLinear)}
    inputs = pico_inputs(model.get_base_model())
    wanted = logits(model, inputs)
    with model.disable_adapter():
        without = logits(model, inputs)
    merged, facts = merge_packed(model, tokens=tokens)
    assert {name: m.layout for name, m in merged.named_modules() if isinstance(m, QuantLinear)} == layouts
    assert {layer.name for layer in facts.layers} == set(layouts)
    assert not any("lora" in name for name, _ in merged.named_modules())
    off = float((logits(merged, inputs) - wanted).square().mean())
    assert off < 0.5 * float((without - wanted).square().mean())


def test_dense_layers_are_merged_in_the_dtype_they_had() -> None:
    merged, _ = merge_packed(adapted("qwen2", dtype=torch.bfloat16), tokens=TOKENS)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16, torch.uint8}
    assert isinstance(merged.get_submodule("model.layers.1.mlp.up_proj"), nn.Linear)


def test_cost_is_told_and_refused_above_the_tolerance() -> None:
    told: list[dict[str, Any]] = []
    slimtune.merge(adapted(), keep_bits=True, calibration=TOKENS, tolerance=1.0, facts=told.append)
    [facts] = told
    assert facts["cost"] == pytest.approx(facts["perplexity_after"] / facts["perplexity_before"] - 1)
    assert len(facts["layers"]) == 11 and all(0 <= layer["error"] < 0.1 for layer in facts["layers"])
    with pytest.raises(RecipeError, match="loses too much"):
        slimtune.merge(adapted(), keep_bits=True, tolerance=1e-9)
    slimtune.merge(adapted(), keep_bits=True, tolerance=1e-9, force=True, facts=told.append)
    assert "perplexity_before" not in told[1] and told[1]["cost"] > 1e-9


def test_an_encoder_decoder_is_measured_on_its_weights() -> None:
    told: list[dict[str, Any]] = []
    slimtune.merge(adapted("t5"), keep_bits=True, calibration=TOKENS, tolerance=1.0, facts=told.append)
    assert "perplexity_before" not in told[0] and 0 < told[0]["cost"] < 0.1


def test_dense_models_have_no_bits_to_keep() -> None:
    with pytest.raises(RecipeError, match="no packed weights"):
        merge_packed(add_lora(pico_model("llama"), r=2))
    with pytest.raises(RecipeError, match="no adapter"):
        merge_packed(pico_model("llama"))
