"""Adapters on dense and quantized models: where they go, what they train, and what is left when they are merged."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pico import PICO, logits, pico_inputs, pico_model
from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError
from slimtune.lora.attach import LoraQuantLinear, add_lora, base_of, has_adapter, load_adapter, plain, save_adapter
from slimtune.lora.merge import merge
from slimtune.lora.options import LoraOptions
from slimtune.quant import QuantLinear
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn

every_pico = pytest.mark.parametrize("family", PICO)
FAMILIES = ["llama-biased", "gemma2", "phi3", "opt", "t5"]
each_family = pytest.mark.parametrize("family", FAMILIES)
each_base = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> Iterator[None]:
    """`quantize_` collects garbage after every block; there is no need to go through all imported modules each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def base(family: str, quantized: bool, dtype: torch.dtype = torch.float32) -> Any:
    model = pico_model(family, dtype=dtype)
    if quantized:
        quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=12)))
    return model


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in base_of(model).named_modules() if isinstance(module, BaseTunerLayer)}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def train_(model: nn.Module) -> None:
    """Stands for training: every factor takes a value that is not zero."""
    generator = torch.Generator().manual_seed(7)
    for factor in trainable(model).values():
        factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))


@every_pico
@each_base
def test_all_linear_is_every_linear_of_the_blocks(family: str, quantized: bool) -> None:
    model = base(family, quantized)
    linears = {port.name for port in bind(model).linears}
    wrapped = add_lora(model, r=3, lora_alpha=6)
    assert adapted(wrapped) == linears
    factors = trainable(wrapped)
    assert len(factors) == 2 * len(linears)
    assert all(("lora_A" in name or "lora_B" in name) and p.dtype == torch.float32 for name, p in factors.items())
    for name in linears:
        layer: Any = base_of(wrapped).get_submodule(name)
        assert isinstance(layer.get_base_layer(), QuantLinear if quantized else nn.Linear)
        assert isinstance(layer, LoraQuantLinear) == quantized
        assert layer.lora_A["default"].weight.shape == (3, layer.in_features)
        assert layer.lora_B["default"].weight.shape == (layer.out_features, 3)
        assert layer.scaling["default"] == 2.0
    assert bind(wrapped) == bind(pico_model(family))


@every_pico
@each_base
def test_a_fresh_adapter_changes_nothing(family: str, quantized: bool) -> None:
    model = base(family, quantized)
    inputs = pico_inputs(model)
    before = logits(model, inputs)
    rng = torch.get_rng_state()
    wrapped = add_lora(model, r=3, seed=5)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(logits(wrapped, inputs), before)
    assert all(bool(p.any()) == ("lora_A" in name) for name, p in trainable(wrapped).items())


@each_base
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_float32_on_any_base(quantized: bool, dtype: torch.dtype) -> None:
    wrapped = add_lora(base("llama", quantized, dtype), r=3)
    assert {p.dtype for p in trainable(wrapped).values()} == {torch.float32}
    frozen = {name: p.dtype for name, p in wrapped.named_parameters() if not p.requires_grad}
    assert set(frozen.values()) == ({dtype, torch.uint8, torch.bfloat16} if quantized else {dtype})
    train_(wrapped)
    loss = wrapped(**pico_inputs(base_of(wrapped))).logits.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trainable(wrapped).values())


@each_family
def test_gradients_on_a_quantized_base_are_those_on_its_decoded_twin(family: str) -> None:
    model = base(family, quantized=True)
    dense = pico_model(family)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            dense.get_parameter(f"{name}.weight").data = module.dequantize()
    gradients = []
    for subject in (model, dense):
        wrapped = add_lora(subject, r=3)
        train_(wrapped)
        wrapped(**pico_inputs(subject)).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in trainable(wrapped).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and bool(gradient.any())
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_seed_and_init_say_how_the_factors_start() -> None:
    def factors(**options: Any) -> dict[str, Tensor]:
        return trainable(add_lora(pico_model("llama"), r=3, **options))

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in a)

    assert same(factors(seed=1), factors(seed=1))
    assert not same(factors(seed=1), factors(seed=2))
    kaiming, gaussian = (factors(init=init) for init in ("default", "gaussian"))
    assert not same(kaiming, gaussian)
    assert not any(bool(p.any()) for name, p in gaussian.items() if "lora_B" in name)


@each_family
@each_base
def test_merging_keeps_what_base_and_adapter_compute(family: str, quantized: bool) -> None:
    model = base(family, quantized)
    inputs = pico_inputs(model)
    before = logits(model, inputs)
    wrapped = add_lora(model, r=3, lora_alpha=6)
    train_(wrapped)
    with_adapter = logits(wrapped, inputs)
    assert not torch.allclose(with_adapter, before, atol=1e-2)
    weights = {
        name: (layer.dequantize() if quantized else layer.weight.detach().clone())  # type: ignore[operator, union-attr]
        for name, layer in plain(wrapped).items()
        if name in adapted(wrapped)
    }
    updates = {
        name: 2.0 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
        for name, layer in base_of(wrapped).named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    merged: Any = merge(wrapped)
    torch.testing.assert_close(logits(merged, inputs), with_adapter, rtol=1e-4, atol=1e-4)
    assert not has_adapter(merged) and not adapted(merged)
    assert not any(isinstance(module, QuantLinear) for module in merged.modules())
    for name, update in updates.items():
        torch.testing.assert_close(merged.get_parameter(f"{name}.weight").detach(), weights[name] + update)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in merged.parameters())
    assert bind(merged) == bind(pico_model(family))


@each_base
def test_merging_rounds_once(quantized: bool) -> None:
    model = base("llama", quantized, torch.bfloat16)
    wrapped = add_lora(model, r=3, lora_alpha=6)
    train_(wrapped)
    name = "model.layers.1.mlp.down_proj"
    layer: Any = base_of(wrapped).get_submodule(name)
    inner = layer.get_base_layer()
    exact = inner.dequantize() if quantized else inner.weight.detach().float()
    exact = exact + 2.0 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    merged = merge(copy.deepcopy(wrapped))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(merged.get_parameter(f"{name}.weight"), exact.bfloat16())
    wide = merge(wrapped, torch.float32)
    torch.testing.assert_close(wide.get_parameter(f"{name}.weight").detach(), exact)


def test_packed_codes_do_not_take_an_update() -> None:
    wrapped = add_lora(base("llama", quantized=True), r=3)
    codes = {name: p.clone() for name, p in wrapped.named_parameters() if name.endswith("codes")}
    layer: Any = next(module for module in wrapped.modules() if isinstance(module, LoraQuantLinear))
    for merging in (layer.merge, wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(RecipeError, match="packed weights") as caught:
            merging()
        assert "slimtune.merge" in str(caught.value)
    assert codes and all(torch.equal(wrapped.get_parameter(name), p) for name, p in codes.items())


def test_llava_is_adapted_in_its_language_model_alone() -> None:
    model = base("llava", quantized=False)
    wrapped = add_lora(model, r=3)
    assert adapted(wrapped) and all("language_model" in name for name in adapted(wrapped))
    assert len(adapted(wrapped)) == 14


@each_base
@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 2),
        (("q_proj", "down_proj"), 4),
        (["model.layers.1.mlp.up_proj"], 1),
        (["mlp.up_proj", "q_proj"], 4),
        (["q_proj", "q_proj"], 2),
        (["lm_head"], 1),
        (r".*\.0\..*_proj", 7),
        (r".*\.(q|k)_proj", 4),
    ],
    ids=str,
)
def test_targets_may_be_names_or_a_pattern(targets: Any, count: int, quantized: bool) -> None:
    wrapped = add_lora(base("llama", quantized), r=3, target_modules=targets)
    assert len(adapted(wrapped)) == count
    assert len(trainable(wrapped)) == 2 * count


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_prj"], "did you mean 'q_proj'?"),
        (["q_proj", "gate"], "gate"),
        (["embed_tokens"], "embed_tokens"),
        (["proj"], "proj"),
        ("q_proj", "matches no linear"),
        ("(", "not a regular expression"),
        ([], "target_modules"),
    ],
    ids=str,
)
def test_targets_that_name_nothing_are_refused(targets: Any, says: str) -> None:
    model = pico_model("llama")
    with pytest.raises(RecipeError) as caught:
        add_lora(model, target_modules=targets)
    assert says in str(caught.value)
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())


def test_one_adapter_at_a_time() -> None:
    wrapped = add_lora(pico_model("llama"), r=3)
    with pytest.raises(RecipeError, match="has an adapter already"):
        add_lora(wrapped, r=3)
    with pytest.raises(RecipeError, match="no adapter to merge"):
        merge(pico_model("llama"))


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"r": -1}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}, {"lora_alpha": 0}], ids=str
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="out of range"):
        LoraOptions(**options)


def test_rank_zero_is_refused() -> None:
    with pytest.raises(RecipeError, match="r out of range"):
        add_lora(pico_model("llama"), r=0)


@each_base
def test_an_adapter_is_a_stock_one_and_goes_round(tmp_path: Path, quantized: bool) -> None:
    model = base("llama", quantized)
    wrapped = add_lora(model, r=3, lora_alpha=6, base_name="someone/original", use_rslora=True)
    train_(wrapped)
    inputs = pico_inputs(model)
    wanted = logits(wrapped, inputs)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    again = load_adapter(base("llama", quantized), tmp_path)
    assert torch.equal(logits(again, inputs), wanted)
    assert not trainable(again)
    assert again.peft_config["default"].base_model_name_or_path == "someone/original"
    tuned = load_adapter(base("llama", quantized), tmp_path, trainable=True)
    assert trainable(tuned).keys() == trainable(wrapped).keys()
    stock: Any = PeftModel.from_pretrained(pico_model("llama"), str(tmp_path))
    updates = {
        name: stock.get_submodule(f"base_model.model.{name}").get_delta_weight("default") for name in adapted(wrapped)
    }
    for name, update in updates.items():
        layer: Any = base_of(wrapped).get_submodule(name)
        torch.testing.assert_close(update, layer.get_delta_weight("default").detach())


def test_an_adapters_file_is_the_same_in_every_process(tmp_path: Path) -> None:
    wrapped = add_lora(pico_model("llama"), r=2, base_name="someone/original")
    wrapped.peft_config["default"].target_modules = ["v_proj", "k_proj", "up_proj", "q_proj"]
    save_adapter(wrapped, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "q_proj", "up_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "someone/original"
    save_adapter(wrapped, tmp_path, "another/base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "another/base"


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not an adapter folder"):
        load_adapter(pico_model("llama"), tmp_path)
    add_lora(pico_model("llama"), r=3).save_pretrained(str(tmp_path))
    with pytest.raises(FormatError, match="does not fit"):
        load_adapter(pico_model("llama", hidden_size=48), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match="does not fit"):
        load_adapter(pico_model("llama"), tmp_path)
