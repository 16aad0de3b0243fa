"""Pooled adapters: equal within groups while they train, and exact in the zero points when they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from pico import logits, pico_inputs, pico_model
from slimtune.arch import bind
from slimtune.errors import RecipeError
from slimtune.lora.attach import adapted, add_lora, load_adapter, save_adapter
from slimtune.lora.merge import merge_packed
from slimtune.lora.options import LoraOptions
from slimtune.lora.pooled import fold, group_means, pooled_factor, spread
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.hqq import Hqq
from slimtune.quant.linear import QuantLinear
from slimtune.quant.nf4 import Nf4
from slimtune.quant.rtn import Rtn

TOKENS = torch.randint(6, 262, (4, 16), generator=torch.Generator().manual_seed(2))
METHODS: dict[str, Any] = {
    "rtn": Rtn(bits=3, group_size=8),
    "symmetric": Rtn(bits=4, group_size=16, sym=True),
    "ragged": Rtn(bits=2, group_size=24),
    "rows": Rtn(bits=4, group_size=-1),
    "hqq": Hqq(bits=2, group_size=8),
}


def quantized(method: Any, family: str = "llama") -> Any:
    model = pico_model(family)
    quantize_(model, bind(model), all_linear(method))
    return model


def trained(method: Any, family: str = "llama", steps: int = 3, **options: Any) -> Any:
    """A pooled adapter after a few steps of AdamW with weight decay and clipped gradients."""
    model = add_lora(quantized(method, family), r=2, pooled=True, **options).train()
    train_(model, steps)
    return model.eval()


def train_(model: Any, steps: int) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def group_of(layer: Any) -> int:
    base = layer.get_base_layer()
    return min(base.layout.group_size, base.in_features)


@pytest.mark.parametrize("name", METHODS)
def test_factor_stays_equal_within_groups_and_learns(name: str) -> None:
    model = trained(METHODS[name])
    fresh = add_lora(quantized(METHODS[name]), r=2, pooled=True)
    for path, layer in adapted(model).items():
        a = layer.lora_A["default"].weight.detach()
        assert torch.equal(a, spread(a[:, :: group_of(layer)], group_of(layer), a.shape[1]))
        assert not torch.equal(a, adapted(fresh)[path].lora_A["default"].weight)
        assert pooled_factor(a, group_of(layer)) is not None


def test_gradient_is_that_of_one_number_for_each_group() -> None:
    model = add_lora(quantized(METHODS["ragged"]), r=2, pooled=True)
    layer = adapted(model)["model.layers.0.mlp.down_proj"]  # 40 features: groups of 24 and 16
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
    a, b, size = layer.lora_A["default"].weight, layer.lora_B["default"].weight.detach(), 24
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    layer(x).square().sum().backward()
    pooled = group_means(a.detach(), size).requires_grad_()
    whole = layer.get_base_layer()(x) + layer.scaling["default"] * x @ spread(pooled, size, 40).T @ b.T
    whole.square().sum().backward()
    assert a.grad is not None and pooled.grad is not None
    members = torch.tensor([24.0, 16.0])
    torch.testing.assert_close(a.grad, spread(pooled.grad / members, size, 40), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merged_logits_are_those_of_base_and_adapter(name: str, family: str) -> None:
    model = trained(METHODS[name], family)
    inputs = pico_inputs(model.get_base_model())
    wanted = logits(model, inputs)
    with model.disable_adapter():
        assert float((logits(model, inputs) - wanted).abs().max()) > 1e-2
    codes = {path: layer.get_base_layer().codes.clone() for path, layer in adapted(model).items()}
    merged, facts = merge_packed(model, tokens=TOKENS)
    torch.testing.assert_close(logits(merged, inputs), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert all(layer.error == 0 for layer in facts.layers)
    for path, kept in codes.items():
        layer: Any = merged.get_submodule(path)
        assert isinstance(layer, QuantLinear) and torch.equal(layer.codes, kept)
        assert layer.layout.float_zero and layer.zero.dtype == torch.float32  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", METHODS)
def test_folding_is_exact_to_rounding(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = METHODS[name](torch.randn(6, 40, generator=generator), {})
    update = torch.randn(6, base.layout.groups, generator=generator)
    folded = fold(base, update)
    assert folded is not None
    wanted = base.dequantize(torch.float64) + spread(update.double(), base.layout.group_size, 40)
    assert float((folded.dequantize(torch.float64) - wanted).abs().max()) < 4e-6 * float(wanted.abs().max())


def test_scale_of_zero_cannot_be_moved() -> None:
    base = Rtn(bits=4, group_size=8)(torch.randn(2, 16), {})
    base.tensors["scale"][0, 0] = 0
    assert fold(base, torch.ones(2, 2)) is None


def test_adapter_is_a_stock_one_on_the_original_model_and_goes_on_pooled(tmp_path: Path) -> None:
    model = trained(METHODS["rtn"])
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(pico_model("llama"), str(tmp_path))
    name = "base_model.model.model.layers.0.mlp.up_proj"
    update = stock.get_submodule(name).get_delta_weight("default")  # type: ignore[operator]
    torch.testing.assert_close(update, model.get_submodule(name).get_delta_weight("default"))
    again = load_adapter(quantized(METHODS["rtn"]), tmp_path, trainable=True).train()
    train_(again, 2)
    for layer in adapted(again).values():
        assert pooled_factor(layer.lora_A["default"].weight.detach(), group_of(layer)) is not None


def test_plain_adapters_are_not_touched() -> None:
    plain = add_lora(quantized(METHODS["rtn"]), r=2)
    for layer in adapted(plain).values():
        assert pooled_factor(layer.lora_A["default"].weight.detach(), group_of(layer)) is None


def test_what_cannot_be_pooled_is_refused() -> None:
    with pytest.raises(RecipeError, match="groups to pool"):
        add_lora(pico_model("llama"), r=2, pooled=True)
    with pytest.raises(RecipeError, match="groups to pool"):
        add_lora(quantized(Nf4(block_size=8)), r=2, pooled=True)
    with pytest.raises(RecipeError, match="starts from zero"):
        LoraOptions(pooled=True, init="pissa")


def test_means_are_of_groups() -> None:
    x = torch.arange(10.0).view(2, 5)
    got: Tensor = group_means(x, 2)
    assert torch.equal(got, torch.tensor([[0.5, 2.5, 4.0], [5.5, 7.5, 9.0]]))
