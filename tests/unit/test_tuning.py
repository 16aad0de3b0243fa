"""Scales and signs that train: their gradients, what is stored in the end, and going on where a run stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slimtune
from pico import logits, pico_inputs, pico_model, save_pico
from slimtune.arch import bind
from slimtune.errors import RecipeError
from slimtune.export.load import load
from slimtune.linalg.packing import unpack
from slimtune.lora.attach import add_lora, load_adapter
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.base import QTensor
from slimtune.quant.hqq import Hqq
from slimtune.quant.layouts import Affine
from slimtune.quant.linear import QuantLinear
from slimtune.quant.nf4 import Nf4
from slimtune.quant.quip import Quip
from slimtune.quant.rtn import Rtn
from slimtune.quant.scattered import Scattered
from slimtune.quant.trellis import Trellis
from slimtune.quant.tuning import TunedMatmul, settle_tuning_, tunable, tune_
from slimtune.recipe.run import run
from slimtune.recipe.schema import recipe_from
from slimtune.train.data import Collator, Example
from slimtune.train.loop import finetune
from slimtune.train.options import TrainOptions

METHODS: dict[str, Any] = {
    "affine": Rtn(bits=3, group_size=8),
    "ragged": Rtn(bits=2, group_size=10, sym=True),
    "hqq": Hqq(bits=2, group_size=8),
    "nf4": Nf4(block_size=8, double_quant=False),
    "quip": Quip(bits=2),
    "trellis": Trellis(bits=2),
}
OPTIONS = TrainOptions(
    max_steps=4, per_device_train_batch_size=2, learning_rate=0.02, weight_decay=0.1, scales=True, save_steps=2
)


def packed(name: str, rows: int = 6, columns: int = 28) -> QTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    if name == "scattered":
        made = Rtn(bits=4, group_size=7)(weight, {})
        group = (torch.arange(columns) * 5 % 4).to(torch.int32)
        return QTensor({**made.tensors, "group": group}, Scattered(rows, columns, 4, 4))
    made: QTensor = METHODS[name](weight, {"hessian": torch.eye(columns)})
    return made


@pytest.mark.parametrize("name", [*METHODS, "scattered"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    weight = packed(name)
    layout, names, tuned = weight.layout, tuple(weight.tensors), tunable(weight.layout)
    assert tuned
    x = torch.randn(2, 3, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    leaves = {n: weight.tensors[n].double().requires_grad_() for n in tuned}

    def product(x: Tensor, *changed: Tensor) -> Tensor:
        held = {**weight.tensors, **dict(zip(tuned, changed, strict=True))}
        y: Tensor = TunedMatmul.apply(x, layout, names, tuned, *(held[n] for n in names))
        return y

    assert torch.autograd.gradcheck(product, (x, *leaves.values()), eps=1e-6, atol=1e-5)


def test_gradient_of_a_scale_is_the_sum_over_its_group() -> None:
    weight = packed("affine")
    layout = weight.layout
    assert isinstance(layout, Affine)
    x = torch.randn(5, 28, generator=torch.Generator().manual_seed(1))
    scale = weight.tensors["scale"].float().requires_grad_()
    held = {**weight.tensors, "scale": scale}
    TunedMatmul.apply(x, layout, tuple(held), ("scale",), *held.values()).square().sum().backward()
    to_weight = 2 * (x @ weight.dequantize().T).T @ x
    zero = weight.tensors["zero"].float().repeat_interleave(8, 1)[:, :28]
    parts = (to_weight * (unpack(weight.tensors["codes"], 3, 28).float() - zero)).split(8, 1)
    torch.testing.assert_close(scale.grad, torch.stack([part.sum(1) for part in parts], 1), rtol=1e-4, atol=1e-3)


def model_of(name: str) -> Any:
    model = pico_model("llama")
    quantize_(model, bind(model), all_linear(METHODS[name]), tokens=torch.randint(6, 262, (4, 16)))
    return model


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(6, 262, (12,), generator=generator).tolist() for _ in range(8)]
    return [Example(row, row) for row in rows]


def stored(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{leaf}": getattr(module, leaf).detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for leaf in module.names
    }


def trained(name: str, **changes: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = add_lora(model_of(name), r=2)
    before = stored(model)
    facts = finetune(model, examples(), Collator(0), replace(OPTIONS, **changes))
    return model, facts, before


@pytest.mark.parametrize("name", ["affine", "ragged", "nf4", "quip"])
def test_scales_and_signs_move_and_nothing_else_does(name: str) -> None:
    model, facts, before = trained(name)
    after = stored(model)
    moved = {path.rsplit(".", 1)[1] for path in before if not torch.equal(before[path], after[path])}
    layer = next(m for m in model.modules() if isinstance(m, QuantLinear))
    assert moved == set(tunable(layer.layout))
    assert all(after[path].dtype == before[path].dtype for path in before)
    assert facts.scales_moved > 0.01 and facts.last_loss < facts.first_loss
    assert not any("tuning" in key for key in model.state_dict())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_what_is_stored_computes_what_was_trained() -> None:
    torch.manual_seed(0)
    model = add_lora(model_of("affine"), r=2)
    assert tune_(model) == sum(t.numel() for path, t in stored(model).items() if path.endswith("scale"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".tuning." in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
    inputs = pico_inputs(model.get_base_model())
    wanted = logits(model, inputs)
    assert 0.05 < settle_tuning_(model) <= 0.1
    torch.testing.assert_close(logits(model, inputs), wanted, rtol=0, atol=1e-5)


def test_dense_models_have_no_scales_and_plain_training_leaves_them() -> None:
    with pytest.raises(RecipeError, match="no scales"):
        finetune(add_lora(pico_model("llama"), r=2), examples(), Collator(0), OPTIONS)
    nested = slimtune.quantize(pico_model("llama"), "nf4")
    with pytest.raises(RecipeError, match=r"no scales(.|\n)*quantize with double_quant: false"):
        finetune(add_lora(nested, r=2), examples(), Collator(0), OPTIONS)
    model, facts, before = trained("affine", scales=False)
    assert facts.scales_moved is None
    assert [path for path, tensor in stored(model).items() if not torch.equal(tensor, before[path])] == []


# --- whole runs ---


def recipe_in(folder: Path, **train: Any) -> Any:
    rows = [{"prompt": f"What is {a} and {b}?", "completion": f"It is {a + b}."} for a in range(4) for b in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_pico(folder / "base")
    step = {"max_steps": 4, "max_length": 64, "learning_rate": 0.02, "scales": True, "save_steps": 2, **train}
    steps = [{"quantize": {"method": "rtn", "bits": 3, "group_size": 8}}, {"lora": {"r": 2}}, {"train": step}]
    data = {"train": {"path": str(folder / "sums.jsonl")}}
    steps.append({"export": {"format": "peft"}})
    return recipe_from({"model": str(folder / "base"), "data": data, "steps": steps})


def test_run_writes_the_base_that_was_trained_and_says_so(tmp_path: Path) -> None:
    report = run(recipe_in(tmp_path), tmp_path / "run")
    assert report["steps"][2]["facts"]["scales_moved"] > 0.01
    for place in ("adapter", "export/peft"):
        assert "belongs to the model" in (tmp_path / "run" / place / "README.md").read_text()
    run(recipe_in(tmp_path, scales=False), tmp_path / "plain")
    own, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "plain"))
    moved = {name.rsplit(".", 1)[1] for name in own if not torch.equal(own[name], other[name])}
    assert moved == {"scale"}
    assert not (tmp_path / "plain" / "adapter" / "README.md").exists()
    model = load_adapter(load(str(tmp_path / "run" / "model")).model, tmp_path / "run" / "adapter")
    assert any(isinstance(module, QuantLinear) for module in model.modules())


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    run(recipe, tmp_path / "whole")

    class Stop(Exception):
        pass

    def say(text: str) -> None:
        if "step 3/4" in text:
            raise Stop

    cut = recipe_in(tmp_path, logging_steps=1)
    with pytest.raises(Stop):
        run(cut, tmp_path / "cut", say=say)
    run(cut, tmp_path / "cut", resume=True)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        whole, resumed = load_file(tmp_path / "whole" / file), load_file(tmp_path / "cut" / file)
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
