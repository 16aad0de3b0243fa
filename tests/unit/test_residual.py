"""Adapters that start from what quantization lost: `base + s·BA` is nearer to the weight, or is the weight."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune
from pico import logits, pico_inputs, pico_model
from slimtune.arch import bind
from slimtune.errors import RecipeError
from slimtune.lora.attach import LoraQuantLinear, add_lora, base_of
from slimtune.lora.inits import INITS, residual
from slimtune.lora.merge import merge
from slimtune.quant import QuantLinear
from slimtune.quant.apply import QuantizedLayer, all_linear, quantize_
from slimtune.quant.base import Quantizer
from slimtune.quant.hqq import Hqq
from slimtune.quant.nf4 import Nf4
from slimtune.quant.optq import Optq
from slimtune.quant.rtn import Rtn
from slimtune.recipe.blocks import FolderStore

METHODS: list[Quantizer] = [Rtn(bits=2, group_size=12), Nf4(block_size=12), Hqq(3, 12), Optq(bits=2, group_size=12)]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
TOKENS = torch.arange(60).view(5, 12)


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def quantized(method: Quantizer, rank: int, family: str = "llama", **options: Any) -> Any:
    """A pico model whose layers remember what `method` lost, as well as `rank` allows."""
    model = pico_model(family)
    start = lambda weight, base, stats: residual(weight, base, rank, stats)  # noqa: E731
    tokens = TOKENS if method.needs else None
    quantize_(model, bind(model), all_linear(method), tokens=tokens, start=start, **options)
    return model


@pytest.mark.parametrize("method", [Rtn(bits=2, group_size=12), Nf4(block_size=12), Hqq(2, 12)], ids=str)
def test_calibration_weighs_what_any_method_lost(method: Quantizer) -> None:
    """With tokens, outputs are nearer than those of the plain SVD, and the codes are the same."""
    wanted = logits(pico_model(), pico_inputs(pico_model()))
    found = []
    for tokens in (None, torch.arange(6, 246).view(20, 12)):
        model = pico_model()
        start = lambda weight, base, stats: residual(weight, base, 3, stats)  # noqa: E731
        seen: dict[str, Tensor] = {}
        quantize_(model, bind(model), all_linear(method), tokens=tokens, start=start)
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear):
                seen |= {f"{name}.{key}": tensor for key, tensor in layer.qtensor.tensors.items()}
        wrapped = add_lora(model, r=3, lora_alpha=3, init="residual")
        found.append((seen, float((logits(wrapped, pico_inputs(wrapped)) - wanted).square().mean())))
    (plain, plain_error), (weighed, weighed_error) = found
    assert all(torch.equal(plain[name], weighed[name]) for name in plain)
    assert weighed_error < 0.97 * plain_error


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What each adapted linear multiplies with: base and adapter."""
    return {
        name: layer.get_base_layer().dequantize() + layer.get_delta_weight("default").detach()
        for name, layer in base_of(model).named_modules()
        if isinstance(layer, LoraQuantLinear)
    }


@each_method
@pytest.mark.parametrize(("alpha", "use_rslora"), [(6, False), (32, True)])
def test_a_full_rank_gives_the_weight_back(method: Quantizer, alpha: float, use_rslora: bool) -> None:
    dense = pico_model("llama")
    model = add_lora(quantized(method, 64), r=64, lora_alpha=alpha, use_rslora=use_rslora, init="residual")
    found = weights(model)
    assert len(found) == 14
    for name, weight in found.items():
        torch.testing.assert_close(weight, dense.get_parameter(f"{name}.weight").detach(), rtol=0, atol=2e-6)
    inputs = pico_inputs(dense)
    torch.testing.assert_close(logits(model, inputs), logits(dense, inputs), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(merge(model), inputs), logits(dense, inputs), rtol=0, atol=1e-4)


@each_method
def test_a_low_rank_comes_nearer_to_the_weight_and_the_lower_of_two_ranks_counts(method: Quantizer) -> None:
    dense = pico_model("llama")
    errors = []
    for kept, r in ((1, 1), (4, 1), (4, 4), (4, 8)):
        packed = quantized(method, kept)
        plain = {n: m.dequantize() for n, m in packed.named_modules() if isinstance(m, QuantLinear)}
        exact = {name: dense.get_parameter(f"{name}.weight").detach() for name in plain}
        model = add_lora(packed, r=r, init="residual")
        found = weights(model)
        errors.append(sum(float((found[name] - exact[name]).square().sum()) for name in plain))
    without = sum(float((plain[name] - exact[name]).square().sum()) for name in plain)
    if method.needs:  # weighted by the inputs: it is not this error that is least
        assert errors[1] != errors[0]
    else:
        assert without > errors[0] > errors[2]
        assert errors[1] == pytest.approx(errors[0], rel=1e-5)
    assert errors[3] == pytest.approx(errors[2], rel=1e-5)


def test_the_outputs_are_nearer_where_the_statistics_are_used() -> None:
    """Of the first layers, whose inputs are what calibration saw, whatever is quantized after them."""
    dense, seen = pico_model("llama"), []
    name = "model.layers.0.self_attn.q_proj"
    handle = dense.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        dense(TOKENS)
    handle.remove()
    x = torch.cat([t.reshape(-1, t.shape[-1]) for t in seen])
    weight = dense.get_parameter(f"{name}.weight").detach()
    packed = quantized(Optq(bits=2, group_size=12), 3)
    base = packed.get_submodule(name).dequantize()
    even = residual(weight, base, 3, {})
    best = weights(add_lora(packed, r=3, init="residual"))[name]

    def lost(w: Tensor) -> float:
        return float((x @ (w - weight).T).square().sum())

    assert lost(best) < lost(base + even.b @ even.a) < lost(base)


def test_gradients_reach_both_factors() -> None:
    model = add_lora(quantized(Rtn(bits=2, group_size=12), 4), r=4, init="residual")
    model(**pico_inputs(base_of(model))).logits.square().mean().backward()
    factors = [p for p in model.parameters() if p.requires_grad]
    assert len(factors) == 28
    for p in factors:
        assert p.grad is not None and bool(p.grad.any())


def test_a_lower_rank_than_asked_leaves_the_rest_as_a_fresh_adapter() -> None:
    model = add_lora(quantized(Rtn(bits=2, group_size=12), 2), r=5, init="residual")
    for layer in model.modules():
        if isinstance(layer, LoraQuantLinear):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert bool(a.any(1).all()) and bool(b[:, :2].any()) and not bool(b[:, 2:].any())


def test_what_was_kept_is_let_go() -> None:
    for init in (name for name, how in INITS.items() if not how.directions):
        model = add_lora(quantized(Rtn(), 2), r=2, init=init)
        assert all(m.start is None for m in model.modules() if isinstance(m, QuantLinear))


def test_layers_that_are_not_quantized_start_as_always() -> None:
    model = pico_model("llama")
    start = lambda weight, base, stats: residual(weight, base, 2, stats)  # noqa: E731
    quantize_(model, bind(model), all_linear(Rtn(bits=2, group_size=12), ["q_proj"]), start=start)
    wrapped = add_lora(model, r=2, init="residual")
    zeros = {n.split(".")[-4] for n, p in wrapped.named_parameters() if "lora_B" in n and not bool(p.any())}
    assert zeros == {"q_proj"}


@pytest.mark.parametrize("packed", [False, True])
def test_without_a_residual_it_is_refused(packed: bool) -> None:
    model = pico_model("llama")
    if packed:
        quantize_(model, bind(model), all_linear(Rtn()))
    with pytest.raises(RecipeError, match="what quantization lost") as caught:
        add_lora(model, r=2, init="residual")
    assert "residual_rank" in str(caught.value)
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point()) or packed


@each_method
def test_a_kept_block_keeps_where_the_adapter_starts(method: Quantizer, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    first = quantized(method, 3, store=store)
    again = quantized(Rtn(), 1, store=store)  # every block is found: this method and this rank play no part
    for name, layer in first.named_modules():
        if isinstance(layer, QuantLinear):
            other: Any = again.get_submodule(name)
            assert layer.start is not None and other.start is not None
            assert torch.equal(layer.start.a, other.start.a) and torch.equal(layer.start.b, other.start.b)
    kept = store.load(bind(first).blocks[0])
    assert kept is not None and all(isinstance(layer, QuantizedLayer) and layer.start for layer in kept)


def test_python_does_it_too() -> None:
    model: Any = slimtune.quantize(pico_model("llama"), "nf4", block_size=12, residual_rank=4)
    inputs = pico_inputs(model)
    before, dense = logits(copy.deepcopy(model), inputs), logits(pico_model("llama"), inputs)
    after = logits(slimtune.add_lora(model, r=4, init="residual"), inputs)
    assert float((after - dense).square().sum()) < 0.8 * float((before - dense).square().sum())
    plain: Any = slimtune.quantize(pico_model("llama"), "nf4", block_size=12)
    assert all(m.start is None for m in plain.modules() if isinstance(m, QuantLinear))
