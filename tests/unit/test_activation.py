"""Rounded inputs: equal to a textbook's, straight through backward, in layers and folders, and seen by calibration."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer
from slimtune.arch import bind
from slimtune.errors import CalibrationError, FormatError, RecipeError, SlimtuneError
from slimtune.export.native import write_model
from slimtune.kernels.dispatch import reference
from slimtune.lora.attach import add_lora
from slimtune.quant.activation import Activations, Search, activations_from_dict, activations_to_dict
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.base import QTensor, Stats
from slimtune.quant.linear import QuantLinear
from slimtune.quant.optq import Optq
from slimtune.quant.rtn import Rtn

CHANNEL = Rtn(bits=8, group_size=-1, sym=True)
FOUR = Activations(bits=4)


def textbook(x: np.ndarray, bits: int, symmetric: bool, clip: float, size: int) -> np.ndarray:
    """One token: every value to the nearest level of its group, by the definition of a uniform grid."""
    rounded = np.zeros_like(x)
    for start in range(0, len(x), size):
        part = x[start : start + size]
        low, high = min(part.min(), 0.0) * clip, max(part.max(), 0.0) * clip
        if symmetric:
            high = max(-low, high)
            low = -high
        scale = (high - low) / (2**bits - 1) or 1.0
        zero = 2 ** (bits - 1) if symmetric else np.rint(-low / scale)
        code = np.clip(np.rint(part / scale) + zero, 0, 2**bits - 1)
        rounded[start : start + size] = (code - zero) * scale
    return rounded


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("size", [-1, 16])
def test_equals_the_textbook(bits: int, sym: bool, clip: float, size: int) -> None:
    x = torch.randn(3, 5, 37, dtype=torch.float64) + 0.3
    got = Activations(bits=bits, sym=sym, clip_ratio=clip, group_size=size)(x)
    wanted = [textbook(row, bits, sym, clip, 37 if size == -1 else size) for row in x.view(-1, 37).numpy()]
    np.testing.assert_allclose(got.view(-1, 37).numpy(), np.array(wanted), rtol=1e-12, atol=1e-14)


def test_halves_go_to_even() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.5]])
    assert Activations(bits=8)(x).tolist() == [[0.0, 2.0, 2.0, 0.0, -2.0, 127.0]]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_dtype_and_the_levels_of_float64(sym: bool, dtype: torch.dtype) -> None:
    x = torch.randn(40, 64).to(dtype)
    got, exact = Activations(bits=4, sym=sym)(x), Activations(bits=4, sym=sym)(x.double())
    assert got.dtype == dtype
    # A value half-way between two levels may go to the other one in float32: the extreme of a symmetric grid is one.
    inner = x.abs() < x.abs().amax(1, keepdim=True)
    close = torch.isclose(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)[inner]
    assert close.float().mean() > 0.999


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([-1, 1, 3, 7]),
)
def test_is_never_off_by_more_than_a_level_and_finite(values: list[float], bits: int, sym: bool, size: int) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    got = Activations(bits=bits, sym=sym, group_size=size)(x)
    span = 2 * x.abs().max() if sym else x.max().clamp(min=0) - x.min().clamp(max=0)
    assert bool(torch.isfinite(got).all())
    assert bool(((got - x).abs() <= span / (2**bits - 1) + 1e-9).all())


def test_tokens_are_rounded_by_themselves_and_zeros_stay_zeros() -> None:
    x = torch.randn(4, 32)
    x[2] = 0
    round_ = Activations(bits=4)
    assert torch.equal(round_(x)[1], round_(x[1:2])[0])
    assert not bool(round_(x)[2].any())
    assert torch.equal(round_(x), round_(x.view(2, 2, 32)).view(4, 32))


def test_gradients_pass_straight_through() -> None:
    x = torch.randn(3, 16, requires_grad=True)
    grad = torch.randn(3, 16)
    Activations(bits=2, clip_ratio=0.5)(x).backward(grad)
    assert torch.equal(x.grad, grad)


def test_sixteen_bits_leave_alone() -> None:
    x = torch.randn(3, 16)
    assert torch.equal(Activations(bits=16)(x), x)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1},
        {"bits": 9},
        {"clip_ratio": 0.0},
        {"clip_ratio": 1.1},
        {"group_size": 0},
        {"static": True, "group_size": 8},
        {"low": 1.0},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        Activations(**fields)


def test_search_finds_the_ratio_of_least_error() -> None:
    x = torch.randn(200, 64, dtype=torch.float64) ** 3
    search = Search(Activations(bits=3, search=True))
    search.update(x[:100])
    search.update(x[100:])
    found = search.result()
    errors = {
        ratio: float((Activations(bits=3, clip_ratio=ratio)(x) - x).square().sum())
        for ratio in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, found.clip_ratio)
    }
    assert min(errors, key=lambda ratio: errors[ratio]) == found.clip_ratio < 1
    assert not found.search and not found.calibrated


def test_search_looks_at_some_tokens_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.quant.activation.SEARCHED", 10)
    seen = []
    real = Activations.__call__
    monkeypatch.setattr(Activations, "__call__", lambda self, x: (seen.append(len(x)), real(self, x))[1])
    x = torch.randn(5, 9, 64) ** 3
    search = Search(Activations(bits=3, search=True, static=True))
    search.update(x)
    search.update(x[:1])
    assert set(seen[: len(seen) // 2]) == {10} and set(seen[len(seen) // 2 :]) == {9}
    assert search.result().high == float(x.max())  # of all


def test_search_does_not_depend_on_the_size_of_its_batches() -> None:
    x = torch.randn(512, 16, 256)
    x[:, 0, 0] *= 6  # the first token of each sequence is not like the others
    found = set()
    for size in (8, 64, 512):
        search = Search(Activations(bits=4, search=True))
        for part in x.split(size):
            search.update(part)
        found.add(search.result().clip_ratio)
    assert len(found) == 1 and found.pop() < 1


def test_a_static_range_is_what_was_seen_and_clips_what_was_not() -> None:
    search = Search(Activations(bits=8, static=True, sym=False))
    search.update(torch.tensor([[-1.0, 2.0]]))
    search.update(torch.tensor([[0.5, 3.0]]))
    found = search.result()
    assert (found.low, found.high) == (-1.0, 3.0) and not found.calibrated
    assert found(torch.tensor([[-5.0, 9.0]])).tolist() == [pytest.approx([-1.0, 3.0], abs=0.02)]


def test_plain_values_and_back() -> None:
    for activations in (
        Activations(4),
        Activations(8, sym=False, clip_ratio=0.9),
        Activations(8, static=True, high=2.0),
    ):
        assert activations_from_dict(activations_to_dict(activations), "x") == activations
    assert activations_to_dict(Activations()) == {"bits": 8}
    for wrong in ({"bits": 4, "odd": 1}, {"bits": 99}, [], None):
        with pytest.raises(FormatError):
            activations_from_dict(wrong, "x")


def layer(activations: Activations | None, dtype: torch.dtype = torch.float32) -> QuantLinear:
    linear = nn.Linear(40, 12, dtype=dtype)
    return QuantLinear.from_linear(linear, CHANNEL(linear.weight.detach(), {}), activations)


def test_a_layer_rounds_its_input_before_the_product() -> None:
    q, x = layer(Activations(bits=4)), torch.randn(2, 3, 40)
    torch.testing.assert_close(q(x), nn.functional.linear(Activations(bits=4)(x), q.dequantize(), q.bias))
    assert not torch.allclose(q(x), nn.functional.linear(x, q.dequantize(), q.bias), atol=1e-3)
    assert "bits=4" in repr(q)


def test_a_layer_is_straight_through() -> None:
    q, x = layer(Activations(bits=4)), torch.randn(3, 40, requires_grad=True)
    grad = torch.randn(3, 12)
    q(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ q.dequantize())


def quantized(family: str = "llama", rounding: Activations | None = FOUR, **more: Any) -> Any:
    model = pico_model(family)
    quantize_(model, bind(model), all_linear(CHANNEL), activations=lambda _: rounding, **more)
    return model


@pytest.mark.parametrize("family", ["llama", "opt", "t5", "gemma2", "phi3"])
def test_a_folder_keeps_how_inputs_are_rounded(family: str, tmp_path: Path) -> None:
    model = quantized(family, Activations(bits=4, sym=False, clip_ratio=0.9))
    write_model(model, pico_tokenizer(), tmp_path)
    read, _ = slimtune.load(str(tmp_path))
    inputs = pico_inputs(model)
    assert torch.equal(logits(read, inputs), logits(model, inputs))
    assert not torch.equal(logits(quantized(family, None), inputs), logits(model, inputs))


def test_transformers_loads_such_a_folder(tmp_path: Path) -> None:
    model = quantized()
    write_model(model, pico_tokenizer(), tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(read, pico_inputs(model)), logits(model, pico_inputs(model)))


def test_a_folder_that_rounds_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    write_model(quantized(), pico_tokenizer(), tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert '"activations"' in config
    (tmp_path / "config.json").write_text(config.replace('"activations": {', '"activations": {"stochastic": true, '))
    with pytest.raises(SlimtuneError, match="unknown way"):
        slimtune.load(str(tmp_path))


def test_an_adapter_reads_what_comes_in_and_trains() -> None:
    model = add_lora(quantized(), r=4)
    wrapped = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        wrapped.lora_B["default"].weight.normal_()
    x = torch.randn(3, 32, requires_grad=True)
    low = x @ wrapped.lora_A["default"].weight.T @ wrapped.lora_B["default"].weight.T * wrapped.scaling["default"]
    torch.testing.assert_close(wrapped(x), wrapped.base_layer(x) + low)
    wrapped.lora_dropout["default"] = nn.Dropout(0.0)  # then PEFT's own forward runs
    torch.testing.assert_close(wrapped.train()(x), wrapped.eval()(x))
    wrapped(x).sum().backward()
    assert bool(x.grad.any()) and bool(wrapped.lora_A["default"].weight.grad.any())


class Recorder:
    """Rounds, and keeps the Hessians it was given."""

    needs = frozenset({"hessian"})

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
        self.seen.append(stats["hessian"])
        return CHANNEL(weight, stats)


def inputs_of(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """What the linears of the blocks multiply, in their order: inputs as rounded."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    ]
    with reference():  # near a tie, products of integers may round the next input otherwise
        logits(model, {"input_ids": tokens})
    for handle in handles:
        handle.remove()
    ports = [port.name for block in bind(model).blocks for stage in block.stages for port in stage]
    return [model.get_submodule(name).activations(seen[name]) for name in ports]  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_methods_see_the_inputs_that_the_finished_model_multiplies(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimtune.calib.capture.bfloat16_units", lambda _: False)
    monkeypatch.setattr("slimtune.calib.capture.fast_matmul", nullcontext)
    tokens = torch.randint(6, 262, (6, 20), generator=torch.Generator().manual_seed(1))
    model, method = pico_model(family), Recorder()
    quantize_(model, bind(model), all_linear(method), activations=lambda _: Activations(bits=4), tokens=tokens)
    for got, x in zip(method.seen, inputs_of(model, tokens), strict=True):
        flat = x.reshape(-1, x.shape[-1])
        torch.testing.assert_close(got, flat.T @ flat / len(flat), rtol=2e-3, atol=2e-3)


def test_layers_that_share_an_input_may_round_it_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.calib.capture.bfloat16_units", lambda _: False)
    monkeypatch.setattr("slimtune.calib.capture.fast_matmul", nullcontext)
    tokens = torch.randint(6, 262, (4, 16), generator=torch.Generator().manual_seed(1))
    model, method = pico_model(), Recorder()
    rounds = {"q_proj": Activations(bits=2), "k_proj": Activations(bits=8)}
    quantize_(
        model,
        bind(model),
        all_linear(method),
        activations=lambda port: rounds.get(port.name.rsplit(".", 1)[-1]),
        tokens=tokens,
    )
    first = method.seen[:3]
    assert not torch.allclose(first[0], first[1], rtol=0.01) and not torch.equal(first[1], first[2])
    torch.testing.assert_close(first[1], first[2], rtol=0.05, atol=0.05)


def test_what_calibration_finds_is_in_the_layers() -> None:
    tokens = torch.randint(6, 262, (4, 16))
    rounding = Activations(bits=3, search=True)
    facts = None
    model = pico_model()
    facts = quantize_(model, bind(model), all_linear(CHANNEL), activations=lambda _: rounding, tokens=tokens)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert all(m.activations is not None and not m.activations.calibrated for m in layers)
    assert {fact.activations for fact in facts.layers} == {3}
    assert min(fact.clip_ratio for fact in facts.layers) < 1
    with pytest.raises(CalibrationError, match="calibration"):
        quantized(rounding=rounding)


def test_hooks_are_gone_afterwards_whatever_happens() -> None:
    model = pico_model()

    class Broken(Recorder):
        def __call__(self, weight: Tensor, stats: Stats) -> QTensor:
            if len(self.seen) == 4:
                raise KeyError("broken")
            return super().__call__(weight, stats)

    with pytest.raises(KeyError, match="broken"):
        quantize_(
            model,
            bind(model),
            all_linear(Broken()),
            activations=lambda _: Activations(bits=4),
            tokens=torch.randint(6, 262, (2, 8)),
        )
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_optq_on_rounded_inputs_beats_optq_on_exact_ones() -> None:
    """Where inputs are coarse, a weight fitted to them loses less."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    w, rounding = torch.randn(16, 48, generator=generator), Activations(bits=3)
    rounded = rounding(x)
    method = Optq(bits=4, group_size=-1, sym=True)

    def loss(hessian: Tensor) -> float:
        off = method(w, {"hessian": hessian}).dequantize() - w
        return float((rounded @ off.T).square().sum())

    assert loss(rounded.T @ rounded / len(x)) < loss(x.T @ x / len(x))
