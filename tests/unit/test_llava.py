"""A model with images goes through a whole recipe, and its images with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pico import logits, pico_inputs, pico_model, save_pico
from slimtune.arch import bind
from slimtune.errors import FormatError
from slimtune.export.load import load, read_model
from slimtune.recipe.run import run
from slimtune.recipe.schema import recipe_from
from slimtune.rotate import fuse
from slimtune.rotate.fuse import rotate_
from slimtune.rotate.options import Rotation


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_rotated_trained_rounded_and_exported_with_its_images(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f"{i + 1}."}) + "\n" for i in range(12)))
    base = save_pico(tmp_path / "base", "llava")
    inputs = pico_inputs(pico_model("llava"))
    wanted = logits(load(str(base)).model, inputs)
    facts = {
        "model": str(base),
        "data": {"train": {"path": str(rows)}, "calibration": {"path": str(rows), "samples": 2, "length": 24}},
        "steps": [
            "rotate",
            {"lora": {"r": 2}},
            {
                "train": {
                    "max_steps": 2,
                    "max_length": 24,
                    "learning_rate": 1e-6,
                    "fake_quant": {"weights": 8, "activations": 8},
                }
            },
            "merge",
            {"export": {"format": "safetensors"}},
            {
                "quantize": {
                    "method": "rtn",
                    "bits": 8,
                    "group_size": -1,
                    "sym": True,
                    "activations": {"bits": 8},
                }
            },
            {"export": {"format": "compressed-tensors"}},
        ],
    }
    report = run(recipe_from(facts), tmp_path / "run")
    assert report["steps"][0]["facts"]["residual"] == "rotated"
    dense = load(str(tmp_path / "run" / "export" / "safetensors")).model
    assert relative(logits(dense, inputs), wanted) < 1e-3  # hardly trained
    packed = load(str(tmp_path / "run" / "model")).model
    assert relative(logits(packed, inputs), wanted) < 2e-2
    there = read_model(tmp_path / "run" / "export" / "compressed-tensors", torch.float32)  # as transformers does
    assert relative(logits(there, inputs), logits(packed, inputs)) < 1e-2
    text = {"input_ids": inputs["input_ids"]}
    assert relative(logits(dense, text), wanted) > 2e-2  # the image is seen


def test_the_gate_of_a_rotation_sees_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what the projector writes is not turned along, text alone would not show it."""
    model: Any = pico_model("llava")
    turn = fuse._turn_

    def forgetful(module: Any, port: Any, change: Any) -> None:
        if "projector" not in port.name:
            turn(module, port, change)

    monkeypatch.setattr(fuse, "_turn_", forgetful)
    with pytest.raises(FormatError, match="does not compute what the model computed"):
        rotate_(model, bind(model), Rotation())
