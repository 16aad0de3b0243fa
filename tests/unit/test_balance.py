"""Channels are balanced: the least that rounding can cost by scales alone, exactly, and the same model as before."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import slimtune
from pico import PICO, VOCAB_SIZE, can_balance, logits, pico_inputs, pico_model
from slimtune.arch import Space, bind
from slimtune.errors import CalibrationError, RecipeError
from slimtune.rotate import online
from slimtune.rotate.balance import scales
from slimtune.rotate.basis import changes
from slimtune.rotate.fuse import rotate_
from slimtune.rotate.online import OnlineTransform
from slimtune.rotate.options import Rotation
from slimtune.rotate.record import rotation_of
from slimtune.rotate.turn import hadamard_turn

BALANCED = Rotation(online=("inputs", "r4", "heads"), balance=True)
WINDOWS = torch.randint(6, VOCAB_SIZE, (5, 12), generator=torch.Generator().manual_seed(3))


def cost(scale: Tensor, inputs: Tensor, weights: Tensor) -> float:
    """What rounding costs after a turn: that of the inputs grows with their size, times the weights, and so back."""
    return float((scale.square() * inputs).sum() * (weights / scale.square()).sum())


def test_no_scale_costs_less() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.rand(2, 33, dtype=torch.float64, generator=generator) + 0.01
    best = scales(inputs, weights)
    assert cost(best, inputs, weights) == pytest.approx(float((inputs * weights).sqrt().sum().square()))
    assert float(best.log().mean()) == pytest.approx(0)
    for _ in range(20):
        other = best * (0.1 * torch.randn(33, dtype=torch.float64, generator=generator)).exp()
        assert cost(other, inputs, weights) > cost(best, inputs, weights)


def test_channels_that_calibration_did_not_see_stay_within_bounds() -> None:
    found = scales(torch.tensor([0.0, 1.0, 1.0]).double(), torch.tensor([1.0, 0.0, 1.0]).double())
    assert bool(found.isfinite().all()) and 0.05 < float(found.min()) < float(found.max()) < 20
    assert torch.equal(scales(torch.zeros(4).double(), torch.zeros(4).double()), torch.ones(4).double())


@pytest.mark.parametrize("family", [name for name in PICO if can_balance(name, BALANCED.online)])
def test_the_model_is_what_it_was_in_other_scales(family: str) -> None:
    model = pico_model(family, dtype=torch.float64)
    modelmap, before = bind(model), logits(model, pico_inputs(model))
    ties = [port.tied_to for port in modelmap.ports]
    plain = copy.deepcopy(model)
    facts = rotate_(model, modelmap, BALANCED, tokens=WINDOWS)
    torch.testing.assert_close(logits(model, pico_inputs(model)), before, rtol=1e-5, atol=1e-5)
    basis = rotation_of(model)
    assert basis is not None and "as it is" in facts.residual and facts.untied == ()
    assert [port.tied_to for port in bind(model).ports] == ties
    assert facts.balanced == len(basis.gains) + len(basis.scales)
    moved = [name for name, gain in basis.gains.items() if not bool((gain == 1).all())]
    assert moved
    assert bool(basis.scales) == any(block.gated for block in modelmap.blocks)
    for name in moved:
        was, now = (m.get_submodule(name).weight.detach() for m in (plain, model))
        one = int(next(norm for norm in modelmap.norms if norm.name == name).kind == "rms_plus_one")
        torch.testing.assert_close((now + one) * basis.gains[name], was + one)


def test_a_balanced_model_loses_less_to_rounding() -> None:
    """Channels of very different size, read by weights of very different size: 4 bits in weights and inputs."""
    lost = {}
    arms = {"r1": {}, "inputs": {"online": ["inputs"]}, "both": {"online": ["inputs"], "balance": True}}
    for name, options in arms.items():
        model = pico_model("llama", hidden_size=64, intermediate_size=96)
        generator = torch.Generator().manual_seed(1)
        for norm in bind(model).norms:
            spread = (1.5 * torch.randn(64, generator=generator)).exp()
            model.get_submodule(norm.name).weight.data.mul_(spread)
            for feed in norm.feeds:
                model.get_submodule(feed).weight.data.div_(spread)
        dense = logits(model, {"input_ids": WINDOWS})
        model = slimtune.rotate(model, calibration=WINDOWS, **options)
        slimtune.quantize(model, "rtn", bits=4, group_size=-1, activations={"bits": 4})
        lost[name] = float((logits(model, {"input_ids": WINDOWS}) - dense).norm())
    assert lost["both"] < 0.8 * lost["inputs"]
    assert lost["both"] < 0.8 * lost["r1"]


def test_inputs_that_are_shared_turn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    def counted(self: OnlineTransform, x: Tensor) -> Tensor:
        turns.append(x.shape[-1])
        return x

    model = pico_model("llama")
    rotate_(model, bind(model), Rotation(online=("inputs",)))
    monkeypatch.setattr(OnlineTransform, "_turned", counted)
    for _ in range(2):
        logits(model, pico_inputs(model))
    blocks = len(bind(model).blocks)
    assert len(turns) == 2 * 2 * blocks  # before an attention, and before a feed-forward layer
    hooks = [
        hook for m in model.modules() for hook in m._forward_pre_hooks.values() if isinstance(hook, OnlineTransform)
    ]
    assert {hook.readers for hook in hooks} == {2, 3} and online._held.turned is None


def two_readers() -> tuple[OnlineTransform, nn.Linear, nn.Linear]:
    first, second = (nn.Linear(8, 8, bias=False) for _ in range(2))
    hook = OnlineTransform(hadamard_turn(8, generator=torch.Generator().manual_seed(0)), 2)
    for layer in (first, second):
        layer.register_forward_pre_hook(hook)
    return hook, first, second


def test_what_is_held_is_of_the_same_tensor_as_it_is_now() -> None:
    hook, first, second = two_readers()
    x, other = torch.randn(2, 3, 8)

    def right(got: Tensor, layer: nn.Linear, x: Tensor) -> bool:
        return torch.allclose(got, hook.turn(x) @ layer.weight.T, atol=1e-6)

    assert right(first(x), first, x) and right(second(other), second, other)
    assert right(first(x), first, x) and right(copy.deepcopy(second)(x), second, x)
    first(x)
    x.mul_(2)
    assert right(second(x), second, x)
    y = torch.randn(3, 8, requires_grad=True)
    for layer in (first, second):
        layer.weight.requires_grad_(False)
    with torch.no_grad():
        first(y)
    assert second(y).requires_grad
    with torch.inference_mode():
        z = torch.randn(3, 8)
        assert right(first(z), first, z)
        z.mul_(2)
        assert right(second(z), second, z)


def test_threads_do_not_read_each_others_inputs() -> None:
    model = pico_model("llama")
    rotate_(model, bind(model), Rotation(online=("inputs",)))
    inputs = [{"input_ids": torch.full((1, 3 + n), 7 + n)} for n in range(3)]
    wanted = [logits(model, each) for each in inputs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda n: logits(model, inputs[n % 3]), range(200)))
    finally:
        sys.setswitchinterval(interval)
    for n, got in enumerate(found):
        assert torch.equal(got, wanted[n % 3])


def test_it_compiles_as_one_graph() -> None:
    model = pico_model("llama")
    rotate_(model, bind(model), Rotation(online=("inputs",)))
    block = model.get_submodule(f"{bind(model).blocks[0].name}.mlp")
    x = torch.randn(2, 5, bind(model).sizes[Space.RESIDUAL])
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, block(x))


def test_gradients_of_shared_inputs_are_those_of_one_turn_each() -> None:
    found: list[Tensor] = []
    for shared in (True, False):
        model = pico_model("llama", dtype=torch.float64)
        rotate_(model, bind(model), Rotation(online=("inputs",)))
        for hook in [h for m in model.modules() for h in m._forward_pre_hooks.values()] if not shared else []:
            hook.readers = 1
        model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
        found.append(model.get_submodule("model.embed_tokens").weight.grad)
    torch.testing.assert_close(found[0], found[1])


def test_nothing_to_calibrate_on_is_an_error_and_so_is_another_engine() -> None:
    model, ungated = pico_model("llama"), pico_model("opt")
    with pytest.raises(CalibrationError, match="balance needs calibration data"):
        rotate_(model, bind(model), BALANCED)
    assert rotation_of(model) is None
    with pytest.raises(RecipeError, match="nothing of this model can be balanced") as caught:
        rotate_(ungated, bind(ungated), Rotation(balance=True), tokens=WINDOWS)
    assert "inputs" in caught.value.facts["remedy"] and rotation_of(ungated) is None
    with pytest.raises(RecipeError, match="no such online transform"):
        Rotation(online=("input",))


def test_a_change_of_scales_has_an_inverse() -> None:
    model = pico_model("llama", dtype=torch.float64)
    rotate_(model, bind(model), BALANCED, tokens=WINDOWS)
    basis = rotation_of(model)
    assert basis is not None
    for name, change in changes(bind(model), basis).items():
        port = bind(model)[name]
        x = torch.randn(port.out_features, 3, dtype=torch.float64)
        torch.testing.assert_close(change.write(change.write(x), inverse=True), x)
        assert change.moves == (not torch.equal(change.write(x), x))
