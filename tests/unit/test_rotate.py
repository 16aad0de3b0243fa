"""A rotated model computes what the model computed, in every family, and more exactly the more digits there are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pico import PICO, VOCAB_SIZE, logits, pico_inputs, pico_model
from slimtune.arch import bind
from slimtune.calib.outliers import outliers
from slimtune.errors import CalibrationError, FormatError
from slimtune.rotate import fuse
from slimtune.rotate.basis import Change
from slimtune.rotate.fuse import RotateFacts, rotate_
from slimtune.rotate.options import Rotation
from slimtune.rotate.record import rotation_of
from slimtune.rotate.turn import Turn, hadamard_turn, level, orthogonal_turn

PLAIN = Rotation()
KINDS = ("hadamard", "orthogonal")
every_pico = pytest.mark.parametrize("family", PICO)


class Exact(TorchFunctionMode):
    """Where a model asks for float32 (norms, softmax) it gets float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wide = [torch.float64 if arg is torch.float32 else arg for arg in args]
        named = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*wide, **named)


def difference(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def rotated(
    family: str, dtype: torch.dtype = torch.float64, rotation: Rotation = PLAIN, **overrides: Any
) -> tuple[float, RotateFacts]:
    """How far a rotation takes the logits of a pico model (with images, where it sees) from what they were."""
    model = pico_model(family, dtype=dtype, **overrides)
    inputs = pico_inputs(model)
    with Exact() if dtype == torch.float64 else nullcontext():
        before = logits(model, inputs)
        facts = rotate_(model, bind(model), rotation)
        return difference(logits(model, inputs), before), facts


@every_pico
@pytest.mark.parametrize("online", [(), ("r4", "heads"), ("inputs", "r4")])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same_in_float64(family: str, kind: str, online: tuple[str, ...]) -> None:
    error, facts = rotated(family, rotation=Rotation(kind=kind, seed=3, online=online))
    assert error < 1e-10
    assert facts.logit_error < 1e-10


@every_pico
def test_the_error_shrinks_with_the_digits(family: str) -> None:
    errors = [rotated(family, dtype)[0] for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    assert errors[0] > 100 * errors[1] > 100 * 100 * errors[2]
    assert errors[1] < 1e-5


def test_the_residual_stream_is_rotated_where_nothing_stands_in_the_way() -> None:
    said = {family: rotated(family, torch.float32)[1].residual for family in PICO}
    held = {family: reason for family, reason in said.items() if reason != "rotated"}
    assert set(held) == {"gemma2", "gemma3", "opt-post"}
    assert "no linear follows" in held["gemma2"]
    assert "stands in the residual stream" in held["opt-post"]


def test_an_even_gain_after_a_writer_is_no_obstacle() -> None:
    model = pico_model("gemma2", dtype=torch.float64)
    for norm in bind(model).norms:
        if norm.follows:
            model.get_submodule(norm.name).weight.data.fill_(0.5)
    inputs = pico_inputs(model)
    with Exact():
        before = logits(model, inputs)
        facts = rotate_(model, bind(model), Rotation())
        assert facts.residual == "rotated" and facts.untied == ("lm_head",)
        assert difference(logits(model, inputs), before) < 1e-10


@pytest.mark.parametrize("family", ["llama-tied", "opt", "t5"])
def test_a_tie_stays_where_the_head_has_no_gain_to_take_in(family: str) -> None:
    model = pico_model(family, dtype=torch.float64)
    modelmap = bind(model)
    for norm in modelmap.norms:
        if set(norm.feeds) & {port.name for port in modelmap.ports if port.tied_to}:
            model.get_submodule(norm.name).weight.data.fill_(1.0)
    inputs = pico_inputs(model)
    with Exact():
        before = logits(model, inputs)
        facts = rotate_(model, modelmap, Rotation())
        assert difference(logits(model, inputs), before) < 1e-10
    assert facts.untied == () and facts.residual == "rotated"
    assert [port.tied_to for port in bind(model).ports] == [port.tied_to for port in modelmap.ports]


def test_the_stream_and_the_values_are_really_turned() -> None:
    model, plain = pico_model(), pico_model()
    modelmap = bind(model)
    rotate_(model, modelmap, Rotation(seed=1))
    for port in modelmap.ports:
        was, now = plain.get_submodule(port.name).weight, model.get_submodule(port.name).weight
        assert difference(now, was) > 0.5, port.name
    gram = [m.get_submodule("model.embed_tokens").weight.detach().double() for m in (plain, model)]
    torch.testing.assert_close(gram[1] @ gram[1].T, gram[0] @ gram[0].T, rtol=1e-4, atol=1e-4)
    assert all(bool((model.get_submodule(norm.name).weight == 1).all()) for norm in modelmap.norms)


@pytest.mark.parametrize("family", ["llama-biased", "phi3", "t5"])
def test_weights_turn_in_pieces_as_they_turn_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for piece in (1 << 22, 100, 1):
        monkeypatch.setattr(fuse, "PIECE", piece)
        model = pico_model(family, dtype=torch.float64)
        rotate_(model, bind(model), Rotation(online=("r4", "heads")))
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-12, atol=1e-12)


def test_seeds_and_kinds_give_other_rotations() -> None:
    hashes = [rotated("llama", torch.float32, Rotation(kind, seed))[1].sha256 for kind in KINDS for seed in (0, 1)]
    assert len(set(hashes)) == 4
    assert rotated("llama", torch.float32)[1].sha256 == hashes[0]


def test_every_attention_and_every_head_turns_otherwise() -> None:
    model = pico_model()
    rotate_(model, bind(model), Rotation())
    basis = rotation_of(model)
    assert basis is not None
    signs = [basis.values_turn(number).signs[head].tolist() for number in range(2) for head in range(2)]
    assert len({tuple(row) for row in signs}) == 4


def test_a_rotation_that_changes_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(change: Change, x: Tensor, *, inverse: bool = False) -> Tensor:
        return x

    monkeypatch.setattr(Change, "read", wrong)
    with pytest.raises(FormatError, match="does not compute what the model computed") as caught:
        rotated("llama", torch.float32)
    assert caught.value.facts["wanted"] == "at most 0.0001 in float32"


@pytest.mark.parametrize("width", [12, 23, 36])
@pytest.mark.parametrize("make", [hadamard_turn, orthogonal_turn])
def test_a_turn_is_orthogonal_and_a_level_one_keeps_ones(make: Callable[..., Turn], width: int) -> None:
    turn = make(width, generator=torch.Generator().manual_seed(4))
    eye = torch.eye(width, dtype=torch.float64)
    for one in (turn, level(turn)):
        matrix = one(eye)
        torch.testing.assert_close(matrix @ matrix.T, eye)
        torch.testing.assert_close(one(matrix, inverse=True), eye)
    ones = torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(level(turn)(ones), ones)
    assert difference(turn(ones), ones) > 0.1


def test_heads_turn_each_on_their_own_and_share_their_key_value_heads_turn() -> None:
    turn = orthogonal_turn(6, heads=2, generator=torch.Generator().manual_seed(4))
    x = torch.randn(3, 24, dtype=torch.float64)
    got = turn.repeated(2)(x)
    for head in range(4):
        part = slice(6 * head, 6 * head + 6)
        torch.testing.assert_close(got[:, part], x[:, part] @ turn.matrix[head // 2])


LEARNED = Rotation("learned", steps=20)


def windows(samples: int = 5, length: int = 12) -> Tensor:
    return torch.randint(6, VOCAB_SIZE, (samples, length), generator=torch.Generator().manual_seed(3))


@every_pico
def test_a_learned_rotation_is_a_rotation(family: str) -> None:
    model = pico_model(family, dtype=torch.float64)
    inputs = pico_inputs(model)
    with Exact():
        before = logits(model, inputs)
    facts = rotate_(model, bind(model), LEARNED, tokens=windows())
    with Exact():
        assert difference(logits(model, inputs), before) < 1e-10
    basis = rotation_of(model)
    assert basis is not None and len(basis.learned) == basis.attentions + basis.residual
    assert facts.kind == "learned"


def test_learning_flattens_what_it_saw_and_its_like() -> None:
    """Two channels of the stream stand out in every token; the kurtosis of what the blocks read says how much."""
    kurtosis = {}
    for rotation in (Rotation(), Rotation("learned", steps=60)):
        model = pico_model("llama", hidden_size=48)
        model.get_submodule("model.embed_tokens").weight.data[:, :2] += 6
        rotate_(model, bind(model), rotation, tokens=windows(24))
        found = outliers(model, bind(model), windows(30)[24:])
        kurtosis[rotation.kind] = sum(one.kurtosis for one in found.values()) / len(found)
    assert kurtosis["learned"] < 0.95 * kurtosis["hadamard"]


def test_learning_is_deterministic_and_needs_data() -> None:
    hashes = []
    for _ in range(2):
        model = pico_model("phi3")
        state = torch.get_rng_state()
        hashes.append(rotate_(model, bind(model), LEARNED, tokens=windows()).sha256)
        assert torch.equal(torch.get_rng_state(), state)
    assert hashes[0] == hashes[1]
    with pytest.raises(CalibrationError, match="needs calibration data"):
        rotated("llama", rotation=LEARNED)
