"""The evenness of a linear's input, against numpy on inputs caught by one plain forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pico import PICO, VOCAB_SIZE, pico_model
from slimtune.arch import bind
from slimtune.calib.capture import model_inputs
from slimtune.calib.outliers import BINS, outliers


def windows(samples: int = 5, length: int = 12) -> Tensor:
    return torch.randint(6, VOCAB_SIZE, (samples, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", PICO)
def test_every_linear_is_measured_as_numpy_would(family: str) -> None:
    model = pico_model(family).train()
    modelmap = bind(model)
    found = outliers(model, modelmap, windows(), batch_size=2)
    assert set(found) == {port.name for port in modelmap.linears}
    assert model.training
    name = modelmap.linears[-1].name
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(**model_inputs(model, windows()))
    handle.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1]).double().numpy()
    off = x - x.mean(1, keepdims=True)
    kurtosis = ((off**4).mean(1) / (off**2).mean(1) ** 2).mean()
    peaks = np.abs(x).max(0)
    assert found[name].kurtosis == pytest.approx(kurtosis, rel=1e-4)
    assert found[name].channels == pytest.approx(tuple(peaks), rel=1e-3)
    assert found[name].peak == pytest.approx(peaks.max() / np.sort(peaks)[(len(peaks) - 1) // 2], rel=1e-3)


def test_many_channels_are_kept_as_the_largest_of_runs() -> None:
    model = pico_model("llama", intermediate_size=300)
    found = outliers(model, bind(model), windows())
    wide = [one for one in found.values() if len(one.channels) == BINS]
    assert len(wide) == 2
    assert all(len(one.channels) in (32, 48, BINS) for one in found.values())
