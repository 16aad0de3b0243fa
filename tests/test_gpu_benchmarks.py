"""The scripts for GPUs run, at a tiny size on a CPU, and say in one line that there is no GPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(request.param)


def one_arm(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    script.main(["--device", "cpu", *arguments])
    facts: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return facts


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu_kernels", "gpu_65b_step", "gpu_train_step"], indirect=True)
def test_without_a_gpu_there_is_one_message(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no GPU that PyTorch can use"):
        script.main([])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("script", ["gpu_kernels"], indirect=True)
def test_kernels_are_compared(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "TINY", ((9, 24),))
    script.main(["--device", "cpu", "--output", str(tmp_path / "out.json")])
    facts = json.loads((tmp_path / "out.json").read_text())
    assert {(row["layout"], row["bits"]) for row in facts["decoding"]} == {
        (layout, bits) for layout in ("affine", "e8p", "trellis") for bits in (2, 3, 4)
    }
    assert all(row["decode"]["equal"] and row["weight"]["equal"] for row in facts["decoding"])
    assert all(row["error"] < 0.005 for row in facts["products"]) and len(facts["products"]) == 9
    dispatch: Any = script.dispatch
    real = dispatch.decode_lattice
    monkeypatch.setattr(
        dispatch, "decode_lattice", lambda c, dtype: real(c, dtype) * (1 + dispatch.triton_runs(c.device))
    )
    with pytest.raises(SystemExit, match="3 of 9 weights differ"):
        script.main(["--device", "cpu"])


@pytest.mark.parametrize("layout", ["affine", "e8p", "trellis"])
@pytest.mark.parametrize("script", ["gpu_65b_step"], indirect=True)
def test_a_step_on_random_codes(script: ModuleType, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = one_arm(script, capsys, "--arm", "ours", "--layout", layout, "--tokens", "24", "--steps", "2")
    assert facts["losses"][1] < facts["losses"][0] < 6.5 and facts["largest_gradient"] > 0


@pytest.mark.parametrize("script", ["gpu_65b_step"], indirect=True)
def test_random_codes_have_the_shapes_of_65b(script: ModuleType) -> None:
    config = script.config_of("LLaMA-65B", 2048, tiny=False)
    from slimtune.arch import bind
    from slimtune.export.load import empty_model

    model = empty_model(config)
    assert sum(p.numel() for p in model.parameters()) == 65_285_660_672
    assert len(bind(model).linears) == 80 * 7


@pytest.mark.parametrize("arm", ["peft bfloat16", "affine 3", "trellis 2"])
@pytest.mark.parametrize("script", ["gpu_train_step"], indirect=True)
def test_every_arm_trains(script: ModuleType, arm: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = one_arm(script, capsys, "--arm", arm, "--batch", "1", "--length", "16", "--steps", "3")
    assert facts["losses"][2] < facts["losses"][0] < 6.5 and facts["step_seconds"] > 0
