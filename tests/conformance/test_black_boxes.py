"""What every linear that others quantized must be: a base that trains, saves a stock adapter, and merges.

The packages are looked for, never needed: layers of two kinds that nobody wrote stand for all, and bitsandbytes', HQQ's
and torchao's join where they are installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pico import logits, pico_inputs, pico_model, pico_tokenizer
from slimtune.arch import bind
from slimtune.cli import _guarded, app
from slimtune.errors import FormatError, RecipeError
from slimtune.export import Source, export
from slimtune.export.load import load, read_model
from slimtune.export.native import write_model
from slimtune.lora.attach import add_lora, base_of, load_adapter, plain
from slimtune.lora.merge import merge
from slimtune.quant.blackbox import BlackBox, adopt_
from slimtune.quant.size import model_size

NAME = "owner/base"
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
"""Widths that every package packs."""

Make = Callable[[nn.Linear], nn.Module]


class Bytes(nn.Module):
    """A linear of nobody's: a byte a weight, in a buffer, and its own way back."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def dequantize(self) -> Tensor:
        return self.packed * self.scale

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("a black box asks for the weight and for nothing else")


class Halved(Tensor):
    """A tensor that decodes itself, as quanto's and torchao's do."""

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor) / 2


def of_halves(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter((2 * linear.weight.detach()).as_subclass(Halved), requires_grad=False)
    return linear


def of_bitsandbytes(kind: str) -> Make:
    def make(linear: nn.Linear) -> nn.Module:
        nn_modules = pytest.importorskip("bitsandbytes").nn
        biased = linear.bias is not None
        shape = (linear.in_features, linear.out_features)
        if kind == "int8":
            packed = nn_modules.Linear8bitLt(*shape, bias=biased, has_fp16_weights=False)
            packed.weight = nn_modules.Int8Params(linear.weight.data, requires_grad=False)
        else:
            packed = nn_modules.Linear4bit(*shape, bias=biased, quant_type=kind, compute_dtype=torch.float32)
            packed.weight = nn_modules.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind)
        packed.bias = linear.bias
        return packed.to("cpu")  # which packs

    return make


def of_hqq(linear: nn.Linear) -> nn.Module:
    core = pytest.importorskip("hqq.core.quantize")
    settings = core.BaseQuantizeConfig(nbits=3, group_size=64)
    return core.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")


def of_torchao(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    return linear


MAKERS: dict[str, Make] = {
    "bytes": Bytes,
    "a tensor that decodes itself": of_halves,
    "bitsandbytes nf4": of_bitsandbytes("nf4"),
    "bitsandbytes int8": of_bitsandbytes("int8"),
    "hqq": of_hqq,
    "torchao int8": of_torchao,
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def foreign(make: Make, family: str = "llama") -> PreTrainedModel:
    """A pico model whose blocks another package has quantized."""
    model = pico_model(family, **WIDE)
    for port in bind(model).linears:
        parent, _, leaf = port.name.rpartition(".")
        owner: Any = model.get_submodule(parent)
        setattr(owner, leaf, make(owner.get_submodule(leaf)))
    return model


def dense_twin(model: nn.Module) -> PreTrainedModel:
    """A dense model with the weights that the boxes of `model` hand out."""
    twin = pico_model("llama", **WIDE)
    with torch.no_grad():
        for name, module in plain(model).items():
            if isinstance(module, BlackBox):
                linear: Any = twin.get_submodule(name)
                linear.weight.copy_(module.dequantize())
    return twin


def boxes(model: nn.Module) -> list[BlackBox]:
    return [module for module in plain(model).values() if isinstance(module, BlackBox)]


def trained(model: nn.Module, inputs: dict[str, Tensor], steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@every_maker
def test_weight_is_near_the_original_and_the_product_is_with_it(make: Make) -> None:
    model = pico_model("llama", **WIDE)
    linear: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    original = linear.weight.detach().clone()
    holder = nn.Sequential(make(linear))
    assert adopt_(holder) == 1 and adopt_(holder) == 0
    box: Any = holder[0]
    weight = box.dequantize()
    assert weight.dtype == torch.float32 and weight.shape == original.shape
    assert float((weight - original).norm() / original.norm()) < 0.25
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(3, 5, original.shape[1], dtype=dtype, requires_grad=True)
        y = box(x)
        assert y.dtype == dtype and y.grad_fn.saved_tensors == ()  # neither the weight nor the input
        assert torch.equal(y, x @ weight.to(dtype).T)
        upstream = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, upstream)
        assert torch.equal(grad, upstream @ weight.to(dtype))


@every_maker
def test_trains_saves_a_stock_adapter_and_merges(make: Make, tmp_path: Path) -> None:
    model = foreign(make)
    tuned = add_lora(model, r=2, base_name=NAME)
    assert len(boxes(tuned)) == 14
    inputs = pico_inputs(model)
    twin = dense_twin(tuned)
    close = {"rtol": 0, "atol": 1e-4 * float(logits(twin, inputs).abs().max())}
    torch.testing.assert_close(logits(tuned.eval(), inputs), logits(twin, inputs), **close)  # type: ignore[arg-type]
    losses = trained(tuned, inputs)
    assert losses[-1] < 0.9 * losses[0]
    manifest = export(Source(tuned, pico_tokenizer(), NAME), "peft", tmp_path / "peft")
    assert manifest.max_logit_difference == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == NAME
    stock = PeftModel.from_pretrained(twin, str(tmp_path / "peft"))  # PEFT's own, on a dense model
    wanted = logits(stock, inputs)
    torch.testing.assert_close(logits(tuned, inputs), wanted, **close)  # type: ignore[arg-type]
    again = load_adapter(foreign(make), tmp_path / "peft")
    assert len(boxes(again)) == 14
    assert torch.equal(logits(again.eval(), inputs), logits(tuned, inputs))
    export(Source(tuned, pico_tokenizer(), NAME), "safetensors", tmp_path / "dense")
    torch.testing.assert_close(logits(read_model(tmp_path / "dense", torch.float32), inputs), wanted, **close)  # type: ignore[arg-type]
    merged = merge(tuned)
    assert not any(isinstance(module, BlackBox) for module in merged.modules())
    torch.testing.assert_close(logits(merged, inputs), wanted, **close)  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_folder_of_bitsandbytes_trains_from_the_command_line(fields: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pico_model("llama", **WIDE).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(**fields)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, device_map="cpu")
    packed.save_pretrained(tmp_path / "packed")
    pico_tokenizer().save_pretrained(tmp_path / "packed")
    loaded = load(str(tmp_path / "packed"))
    assert len(boxes(loaded.model)) == 14
    inputs = pico_inputs(loaded.model)
    wanted = logits(dense_twin(loaded.model), inputs)
    torch.testing.assert_close(logits(loaded.model, inputs), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    rows = [{"prompt": f"What is {a}?", "completion": f"It is {a}."} for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune = ["--train", tmp_path / "rows.jsonl", "--max-steps", 2, "--max-length", 32, "-o", tmp_path / "run"]
    for arguments in (
        ["finetune", tmp_path / "packed", *tune],
        ["export", tmp_path / "run", "--format", "safetensors", "-o", tmp_path / "merged"],
    ):
        assert _guarded(lambda a=arguments: app([str(argument) for argument in a], standalone_mode=True)) == 0  # type: ignore[misc]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_biases_stay() -> None:
    model = foreign(Bytes, "llama-biased")
    adopt_(model)
    dense = pico_model("llama-biased", **WIDE)
    inputs = pico_inputs(model)
    wanted = logits(dense, inputs)
    assert float((logits(model, inputs) - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    box: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    assert torch.equal(box.bias, dense.get_submodule("model.layers.0.mlp.up_proj").bias)
    assert torch.equal(box.to_linear(torch.float32).bias, box.bias)


def test_the_map_and_the_size_see_linears() -> None:
    dense, model = pico_model("llama", **WIDE), foreign(Bytes)
    adopt_(model)
    assert bind(model).linears == bind(dense).linears
    names = frozenset(port.name for port in bind(model).linears)
    size, whole = model_size(plain(model), names), model_size(plain(dense), names)
    assert size.parameters == whole.parameters
    assert size.bits_per_weight == 8 and whole.bits_per_weight == 32
    assert whole.bytes - size.bytes == 3 * sum(p.in_features * p.out_features for p in bind(dense).linears)


def test_a_dense_model_is_left_alone() -> None:
    model = pico_model("llava")
    before = {name: type(module) for name, module in model.named_modules()}
    assert adopt_(model) == 0
    assert {name: type(module) for name, module in model.named_modules()} == before


class Deaf(nn.Module):
    """A packed linear that cannot say what its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 64, 128
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


def test_layers_that_hand_out_no_weight_are_named() -> None:
    model = foreign(Bytes)
    mlp: Any = model.get_submodule("model.layers.1.mlp")
    mlp.up_proj = Deaf()
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj: .*Deaf") as caught:
        add_lora(model, r=2)
    assert "slimtune.decoders" in str(caught.value)
    assert not boxes(model)


def test_a_weight_of_another_shape_is_refused() -> None:
    layer = Bytes(nn.Linear(8, 4))
    layer.in_features = 9
    box = BlackBox(layer, Bytes.dequantize)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="another shape"):
        box(torch.ones(1, 9))


def test_a_merge_into_the_box_is_refused(tmp_path: Path) -> None:
    tuned = add_lora(foreign(Bytes), r=2)
    with pytest.raises(RecipeError, match="packed weights"):
        tuned.merge_and_unload()
    with pytest.raises(RecipeError, match="their folder is not known"):
        write_model(base_of(tuned), None, tmp_path)  # type: ignore[arg-type]
