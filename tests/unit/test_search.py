"""The size of a start that changes the model: the bottom of a valley, and no worse than no start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.pico import pico_inputs, pico_model

from slimtune.calib.gradients import model_loss
from slimtune.lora.options import LoraOptions
from slimtune.lora.search import line_search
from slimtune.recipe.gradients import attach_adapter, gradients_of, search_start_


@pytest.mark.parametrize("bottom", [0.004, 0.3, 0.8, 1.0, 3.1, 40.0])
def test_the_bottom_of_a_valley_within_a_factor(bottom: float) -> None:
    found = line_search(lambda size: (math.log2(max(size, 1e-9)) - math.log2(bottom)) ** 2, most=20)
    assert bottom / 2 <= found.size <= bottom * 2
    assert found.after == min((math.log2(2.0**n) - math.log2(bottom)) ** 2 for n in range(-12, 12))


def test_no_step_where_none_is_downhill() -> None:
    found = line_search(lambda size: 1.0 + size)
    assert (found.size, found.before, found.after) == (0.0, 1.0, 1.0)
    assert line_search(lambda size: math.nan if size > 0.1 else 1.0 - size).size == 2**-4


def test_lora_one_lowers_the_loss_before_its_first_step() -> None:
    model: Any = pico_model("llama").double()
    batches = [{"input_ids": ids, "labels": ids} for ids in (pico_inputs(model, seed=n)["input_ids"] for n in range(3))]
    before = sum(model_loss(model, batch).item() for batch in batches) / 3
    options = LoraOptions(r=4, init="lora-one")
    gradients = gradients_of(model, batches, options)
    wrapped, facts = attach_adapter(model, options, gradients, batches)
    after = sum(model_loss(wrapped, batch).item() for batch in batches) / 3
    assert facts["search"]["before"] == pytest.approx(before, rel=1e-5)
    assert facts["search"]["after"] == pytest.approx(after, rel=1e-5)
    assert after < before
    layer: Any = next(m for m in wrapped.modules() if hasattr(m, "lora_B"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert facts["layers"][0]["ratio"] == pytest.approx(
        (layer.scaling["default"] * (b @ a).norm() / layer.base_layer.weight.norm()).item(), rel=1e-4
    )
    again = search_start_(wrapped, batches)
    assert again.size in (0.5, 1.0, 2.0)  # what is at the bottom stays there


def test_a_size_that_is_given_is_kept() -> None:
    model: Any = pico_model("llama")
    inputs = pico_inputs(model, seed=1)["input_ids"]
    batches = [{"input_ids": inputs, "labels": inputs}]
    options = LoraOptions(r=4, init="lora-one", init_gamma=256.0)
    _, facts = attach_adapter(model, options, gradients_of(model, batches, options), batches)
    assert "search" not in facts
    assert torch.is_grad_enabled()
