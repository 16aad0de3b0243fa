"""Training as rounded: the layer after merging and rounding, gradients straight through, nothing left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer
from slimtune import add_lora, quantize
from slimtune.arch import bind
from slimtune.calib.formats import normalise
from slimtune.errors import RecipeError
from slimtune.lora.options import FakeQuant
from slimtune.lora.rounded import rounded_lora
from slimtune.prune.groups import axes
from slimtune.prune.surgery import PrunePlan, prune_
from slimtune.quant.activation import Activations
from slimtune.quant.rtn import Rtn
from slimtune.recipe.legality import check_order
from slimtune.recipe.schema import recipe_from, step_from, to_dict
from slimtune.train.checkpoint import CheckpointingTrainer
from slimtune.train.data import Collator, padding_id, tokenize
from slimtune.train.loop import finetune
from slimtune.train.options import TrainOptions

TOKENIZER = pico_tokenizer()
ROWS = [{"prompt": f"{a} and {b}?", "completion": "is " * (b + 1) + str(a + b)} for a in range(4) for b in range(4)]
EXAMPLES = tokenize(normalise(ROWS), TOKENIZER, 96)[0]


def adapted(packed: bool = False, family: str = "llama") -> Any:
    """A pico model with an adapter whose update is not nothing."""
    model = pico_model(family)
    model = add_lora(quantize(model, "rtn", bits=4, group_size=16) if packed else model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return model


def first(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def merged(layer: Any) -> Tensor:
    base = layer.get_base_layer()
    weight = base.weight if isinstance(base, nn.Linear) else base.dequantize()
    return (
        weight + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    ).detach()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("size", [-1, 12], ids=["rows", "ragged groups"])
@pytest.mark.parametrize("sym", [True, False])
def test_a_layer_computes_what_it_will_after_merging_and_rounding(packed: bool, size: int, sym: bool) -> None:
    layer, x = first(model := adapted(packed)), torch.randn(2, 5, 32)
    options = FakeQuant(4, 4, group_size=size, sym=sym, activations_sym=sym)
    with rounded_lora(model, options):
        got = layer(x)
    # The fraction of the range is that of the frozen weight: with no update, this is round-to-nearest to the last bit.
    weight = Rtn(4, size, sym)(merged(layer), {}).dequantize()
    close = torch.isclose(got, Activations(4, sym=sym)(x) @ weight.T, rtol=0.2, atol=0.2)
    assert close.float().mean() > 0.95
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    with rounded_lora(model, options):
        weight = Rtn(4, size, sym)(merged(layer), {}).dequantize()
        torch.testing.assert_close(layer(x), Activations(4, sym=sym)(x) @ weight.T)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("size", [-1, 12], ids=["rows", "ragged groups"])
def test_a_layer_that_is_cut_has_the_grids_of_what_is_left(packed: bool, size: int) -> None:
    model = adapted(packed)
    base = model.get_base_model()
    layer, found = base.model.layers[0].mlp.down_proj, axes(bind(base), ("ffn",))
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    with rounded_lora(model, FakeQuant(4, 4, group_size=size)):
        layer(torch.randn(3, 40))
        prune_(base, bind(base), PrunePlan(found, {axis.name: tuple(range(3, 37, 2)) for axis in found}))
        x = torch.randn(3, 17)
        got = layer(x)
    weight = Rtn(4, size, FakeQuant().sym)(merged(layer), {}).dequantize()
    torch.testing.assert_close(got, Activations(4)(x) @ weight.T)


def test_sixteen_bits_are_the_layer_itself() -> None:
    layer, x = first(model := adapted()), torch.randn(3, 32)
    plain = layer(x)
    with rounded_lora(model, FakeQuant(weights=16, activations=16)):
        torch.testing.assert_close(layer(x), plain)
    with rounded_lora(model, FakeQuant(weights=16, activations=4)):
        torch.testing.assert_close(layer(x), Activations(4)(x) @ merged(layer).T)
    with rounded_lora(model, FakeQuant(weights=16, activations=4, clip_ratio=0.7)):
        torch.testing.assert_close(layer(x), Activations(4, clip_ratio=0.7)(x) @ merged(layer).T)


def test_gradients_pass_straight_through() -> None:
    layer, x = first(model := adapted()), torch.randn(7, 32, requires_grad=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    grad = torch.randn(7, 48)
    with rounded_lora(model, FakeQuant(4, 4)):
        layer(x).backward(grad)
    to_weight = layer.scaling["default"] * grad.T @ Activations(4)(x.detach())
    torch.testing.assert_close(b.grad, to_weight @ a.detach().T)
    torch.testing.assert_close(a.grad, b.detach().T @ to_weight)
    # Through the rounded weight, which is not the merged one but near it.
    assert x.grad is not None and nn.functional.cosine_similarity(x.grad, grad @ merged(layer), dim=1).min() > 0.9
    assert not torch.allclose(x.grad, grad @ merged(layer), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_left_behind(packed: bool) -> None:
    model = adapted(packed)
    inputs = pico_inputs(model.base_model.model)
    before = logits(model, inputs)
    with rounded_lora(model, FakeQuant(3, 3)):
        assert not torch.allclose(logits(model, inputs), before, atol=1e-3)
    assert torch.equal(logits(model, inputs), before)
    with pytest.raises(KeyError), rounded_lora(model, FakeQuant(3, 3)):
        raise KeyError
    assert torch.equal(logits(model, inputs), before)


def test_the_switch_is_for_training_alone() -> None:
    layer, x = first(model := adapted()), torch.randn(3, 32)
    plain = layer(x)
    with rounded_lora(model, FakeQuant(3, 3)) as switch:
        switch.on = False
        assert torch.equal(layer.train()(x), plain)
        assert not torch.allclose(layer.eval()(x), plain, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_with_adapters_off_the_base_is_what_it_was(training: bool) -> None:
    """As a teacher without gates and adapters wants it."""
    model = adapted().train(training)
    inputs, plain = pico_inputs(model), logits(pico_model("llama"), pico_inputs(model))
    with rounded_lora(model, FakeQuant(weights=4, activations=4)), model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), plain)


def test_what_cannot_be_one_weight_is_refused() -> None:
    with pytest.raises(RecipeError, match="adapter trains"), rounded_lora(pico_model(), FakeQuant()):
        pass
    dropped = add_lora(pico_model(), r=4, lora_dropout=0.1)
    with pytest.raises(RecipeError, match="without dropout"), rounded_lora(dropped, FakeQuant()):
        pass


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": 1},
        {"activations": 9},
        {"group_size": 0},
        {"warmup_steps": -1},
        {"clip_ratio": 0.0},
        {"clip_ratio": 1.5},
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="out of range"):
        FakeQuant(**fields)


def train(model: Any, rounding: FakeQuant | None, **arguments: Any) -> dict[str, Tensor]:
    options = TrainOptions(
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=2,
        save_steps=1,
        fake_quant=rounding,
    )
    finetune(model, EXAMPLES, Collator(padding_id(TOKENIZER)), options, **arguments)
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "lora" in name}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_before_the_warm_up_is_over_nothing_is_rounded() -> None:
    plain = train(adapted(), None)
    assert same(train(adapted(), FakeQuant(warmup_steps=4)), plain)
    later, sooner = (train(adapted(), FakeQuant(warmup_steps=steps)) for steps in (3, 0))
    assert not same(later, plain) and not same(sooner, later)


class Killed(BaseException):
    """What nothing catches."""


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounding = FakeQuant(4, 4, warmup_steps=1)
    wanted = train(adapted(), rounding)
    step, calls = CheckpointingTrainer.training_step, []

    def dying(self: Any, *arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return step(self, *arguments, **more)

    monkeypatch.setattr(CheckpointingTrainer, "training_step", dying)
    with pytest.raises(Killed):
        train(adapted(), rounding, checkpoints=tmp_path)
    assert same(train(adapted(), rounding, checkpoints=tmp_path, resume=True), wanted)


def test_training_as_rounded_loses_less_when_rounded() -> None:
    losses = {}
    for name, rounding in (("plain", None), ("rounded", FakeQuant(3, 4))):
        model = add_lora(pico_model(), r=8)
        options = TrainOptions(max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2, fake_quant=rounding)
        finetune(model, EXAMPLES, Collator(padding_id(TOKENIZER)), options)
        dense = slimtune.merge(model)
        slimtune.quantize(dense, "rtn", bits=3, group_size=-1, sym=True, activations={"bits": 4})
        with torch.no_grad():
            batch = Collator(padding_id(TOKENIZER))(EXAMPLES)
            losses[name] = float(dense(**batch).loss)
    assert losses["rounded"] < losses["plain"]


def test_a_recipe_says_so_and_needs_an_adapter() -> None:
    facts = {"fake_quant": {"weights": 4, "activations": 8, "warmup_steps": 3}}
    step = step_from("train", facts, "")
    assert step.fake_quant == FakeQuant(4, 8, warmup_steps=3)  # type: ignore[union-attr]
    assert step_from("train", to_dict(step)["train"], "") == step
    with pytest.raises(RecipeError, match="unknown key") as caught:
        step_from("train", {"fake_quant": {"weight": 4}}, "")
    assert "train.fake_quant" in str(caught.value)
    data = {"train": {"path": "a.jsonl"}}
    with pytest.raises(RecipeError, match="adapter trains"):
        check_order(recipe_from({"model": "m", "data": data, "steps": [{"train": facts}]}))
    check_order(recipe_from({"model": "m", "data": data, "steps": ["lora", {"train": facts}]}))
