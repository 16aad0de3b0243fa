"""Pruning along the training of every adapter and under every optimizer: the cut, the steps after it, resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer
from slimtune.arch import bind
from slimtune.calib.formats import normalise
from slimtune.errors import RecipeError
from slimtune.lora.attach import adapted, base_of, load_adapter, plain
from slimtune.lora.options import FakeQuant
from slimtune.prune.groups import axes
from slimtune.prune.importance import Magnitude
from slimtune.prune.options import PruneOptions
from slimtune.prune.probe import Probe
from slimtune.prune.state import cut_state_
from slimtune.prune.surgery import PrunePlan, prune_
from slimtune.prune.weights import shares
from slimtune.quant.linear import QuantLinear
from slimtune.train.checkpoint import CheckpointingTrainer
from slimtune.train.data import Collator, padding_id, tokenize
from slimtune.train.loop import TrainFacts, finetune
from slimtune.train.optimizers import OPTIMIZERS, own_optimizer
from slimtune.train.options import TrainOptions

TOKENIZER = pico_tokenizer()
ROWS = [{"prompt": f"{a} and {b}?", "completion": f"is {a + b}"} for a in range(3) for b in range(4)]
EXAMPLES = tokenize(normalise(ROWS), TOKENIZER, 96)[0]
TOKENS = pico_inputs(pico_model("llama"), batch=4, length=20)["input_ids"]
RAMP = {"ratio": 0.4, "schedule": "cubic", "every": 1, "cooldown": 0.5, "importance": "gate", "multiple_of": 2}
MOVED = ("lora-ga", "pissa", "olora", "corda")


def adapter(init: str = "default", bits: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A pico Llama with an adapter that has learnt something."""
    model: Any = pico_model("llama", dtype=dtype)
    if bits:
        model = slimtune.quantize(model, "rtn", bits=bits, group_size=4)
    model = slimtune.add_lora(model, r=3, init=init, tokens=TOKENS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def train(
    model: Any, optim: str = "adamw_torch", fake: FakeQuant | None = None, importance: str = "gate", **changes: Any
) -> TrainFacts:
    """Four steps, cut after the second."""
    known = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
    options = TrainOptions(
        **{**known, "optim": optim, "fake_quant": fake, "save_steps": changes.pop("save_steps", 100)}
    )
    ramp = PruneOptions(**{**RAMP, "importance": importance})
    return finetune(model, EXAMPLES, Collator(padding_id(TOKENIZER)), options, prune=ramp, **changes)


def masked_and_cut(model: Any, **changes: Any) -> tuple[Tensor, Tensor]:
    """The logits with gates closed, and those when what is behind them is gone."""
    base, inputs = base_of(model), pico_inputs(base_of(model))
    modelmap = bind(base)
    found = axes(modelmap, ("kv", "ffn"))
    narrow = {"ffn": tuple(range(4, 40, 2)), "kv": (1,)}
    kept = {axis.name: narrow[axis.kind] for axis in found} | changes
    with Probe(base, modelmap, found, Magnitude()) as probe:
        for name, units in kept.items():
            probe.keep(name, units)
        masked = logits(model, inputs)
    prune_(base, modelmap, PrunePlan(found, kept))
    return masked, logits(model, inputs)


@pytest.mark.parametrize("init", MOVED)
def test_sliced_is_masked_where_a_part_of_the_adapter_is_frozen(init: str) -> None:
    model = adapter(init, dtype=torch.float64)
    masked, cut = masked_and_cut(model)
    torch.testing.assert_close(cut, masked, rtol=1e-9, atol=1e-9)
    down = next(layer for name, layer in adapted(model).items() if name.endswith("down_proj"))
    factor = down.lora_A["default"]
    assert (down.in_features, factor.live.shape, factor.frozen.shape) == (18, (3, 18), (3, 18))


def test_what_quantization_lost_and_rounded_inputs_are_cut_too() -> None:
    model = pico_model("llama")
    rounding = {"bits": 8}
    slimtune.quantize(model, "rtn", bits=3, group_size=-1, activations=rounding, residual_rank=3, calibration=TOKENS)
    wrapped = slimtune.add_lora(model, r=3, init="pissa", init_residual=True)
    masked, cut = masked_and_cut(wrapped)
    torch.testing.assert_close(cut, masked, rtol=1e-4, atol=1e-4)


def test_what_stands_for_pruned_units_is_silent_in_the_frozen_part_too() -> None:
    model = adapter("lora-ga", dtype=torch.float64)
    masked, cut = masked_and_cut(model, **{"model.layers.0.mlp.down_proj": (0, 4, 7, 9)})
    torch.testing.assert_close(cut, masked, rtol=1e-9, atol=1e-9)


def test_the_frozen_part_has_no_gradient_and_is_part_of_the_weight() -> None:
    """LoRAPrune's estimate and the weight, of a layer's input channels, against the whole factors."""
    model = adapter("lora-ga", dtype=torch.float64)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    axis = next(axis for axis in axes(bind(base_of(model)), ("ffn",)))
    (part,) = axis.readers
    layer = adapted(model)[part.port]
    a, b = (factors["default"] for factors in (layer.lora_A, layer.lora_B))
    said = b.live.grad @ a.live + b.live @ a.live.grad - b.live.grad @ a.live.grad
    whole = layer.get_base_layer().weight + layer.scaling["default"] * b.weight @ a.weight
    found = list(shares(layer, part, axis.units))
    torch.testing.assert_close(torch.cat([weight for _, weight, _ in found]).squeeze(1), whole.T.detach())
    torch.testing.assert_close(torch.cat([x for *_, x in found if x is not None]).squeeze(1), said.T.detach())


@pytest.mark.parametrize("importance", ["lora", "gate"])
def test_an_adapter_that_is_frozen_in_part_is_pruned_at_once(importance: str) -> None:
    pruned = slimtune.prune(adapter("pissa"), ratio=0.3, importance=importance, calibration=TOKENS, multiple_of=2)
    assert logits(pruned, pico_inputs(base_of(pruned))).isfinite().all()


def test_gradients_of_weights_are_seen_through_any_adapter() -> None:
    packed, dense = adapter(bits=8), adapter()
    layers = plain(dense)
    for name, layer in plain(packed).items():
        if isinstance(layer, QuantLinear):
            cast(Any, layers[name]).weight.data = layer.dequantize(torch.float32)
    kept: list[Any] = []
    for model in (packed, dense):
        options: dict[str, Any] = {"ratio": 0.3, "importance": "weight-taylor", "multiple_of": 4}
        slimtune.prune(model, **options, calibration=TOKENS, facts=lambda facts: kept.append(facts["kept"]))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "o_proj"]])
def test_units_that_no_adapter_sees_are_not_pruned_by_its_gradients(targets: list[str]) -> None:
    model: Any = slimtune.add_lora(pico_model("llama"), r=2, target_modules=targets)
    with pytest.raises(RecipeError, match="no adapter is here"):
        slimtune.prune(model, ratio=0.3, importance="lora", calibration=TOKENS, multiple_of=2)
    pruned = slimtune.prune(
        model, ratio=0.1, importance="lora", targets=("kv",), of="model", calibration=TOKENS, multiple_of=1
    )
    assert logits(pruned, pico_inputs(base_of(pruned))).isfinite().all()


ROUNDED = FakeQuant(4, 8, group_size=16)


@pytest.mark.parametrize(
    ("init", "optim", "fake", "bits"),
    [
        *((init, "adamw_torch", None, 0) for init in MOVED),
        *(("lora-ga", optim, None, 0) for optim in (*OPTIMIZERS, "adafactor")),
        ("default", "lora-fa", None, 0),
        ("default", "adamw_torch", ROUNDED, 0),
        ("pissa", "lora-rite", ROUNDED, 4),
    ],
)
def test_training_goes_on_after_the_cut(init: str, optim: str, fake: FakeQuant | None, bits: int) -> None:
    model = adapter(init, bits)
    facts = train(model, optim, fake)
    assert facts.prune is not None and max(map(int, cast(Any, facts.prune)["history"])) == 2 and facts.steps == 4
    assert facts.last_loss is not None and facts.first_loss is not None
    assert torch.tensor(facts.last_loss).isfinite() and facts.last_loss < facts.first_loss + 1
    assert base_of(model).get_submodule("model.layers.0.mlp.down_proj").in_features < 40


@pytest.mark.parametrize(("bits", "fake"), [(4, None), (0, ROUNDED)])
def test_weight_gradients_of_packed_and_rounded_layers(bits: int, fake: FakeQuant | None) -> None:
    facts = train(adapter(bits=bits), fake=fake, importance="weight-taylor")
    assert facts.prune is not None


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize(
    ("init", "optim", "fake", "bits"), [("lora-ga", "lora-rite", ROUNDED, 4), ("pissa", "lora-fa", None, 0)]
)
def test_resumed_after_the_cut_is_uninterrupted_bit_for_bit(
    init: str, optim: str, fake: FakeQuant | None, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"save_steps": 1, "checkpoints": tmp_path}
    train(wanted := adapter(init, bits), optim, fake)
    step = CheckpointingTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointingTrainer, "training_step", dying)
        with pytest.raises(Killed):
            train(adapter(init, bits), optim, fake, **kept)
    train(model := adapter(init, bits), optim, fake, **kept, resume=True)
    (a, b) = (dict(each.state_dict()) for each in (wanted, model))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_was_trained_is_what_is_merged_and_exported(tmp_path: Path) -> None:
    model = adapter("lora-ga")
    facts: Any = train(model).prune
    inputs = pico_inputs(base_of(model))
    wanted = logits(model, inputs)
    slimtune.export(model, TOKENIZER, "peft", tmp_path / "peft", name="pruned")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 6
    base = pico_model("llama")
    prune_(base, modelmap := bind(base), PrunePlan(axes(modelmap), {k: tuple(v) for k, v in facts["kept"].items()}))
    torch.testing.assert_close(logits(load_adapter(base, tmp_path / "peft"), inputs), wanted)
    torch.testing.assert_close(logits(slimtune.merge(model), inputs), wanted, rtol=1e-4, atol=1e-5)


def test_the_moments_of_lora_fa_lose_the_rows_that_b_does() -> None:
    model = adapter("lora-ga")
    optimizer = own_optimizer(model, TrainOptions(optim="lora-fa"))
    assert optimizer is not None
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    held = {str(name): state["exp_avg_B"] for name, state in optimizer.state.items()}
    base = base_of(model)
    found = axes(modelmap := bind(base), ("ffn",))
    prune_(base, modelmap, PrunePlan(found, {axis.name: (3, 5, 8, 11) for axis in found}), optimizer=optimizer)
    for name, before in held.items():
        rows = [3, 5, 8, 11] if "up_proj" in name or "gate_proj" in name else list(range(len(before)))
        assert torch.equal(optimizer.state[cast(Any, name)]["exp_avg_B"], before[rows])


def test_state_of_another_form_begins_anew() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 3))
    adafactor, whole = torch.optim.Adafactor([weight], lr=0.1), weight.shape
    for width in (3, 2):
        weight.grad = torch.ones(4, width)
        adafactor.step()
        assert int(adafactor.state[weight]["step"]) == 1
        weight.data, weight.grad = weight.data[:, :2], None
        cut_state_(adafactor, weight, whole, 1, torch.tensor([0, 1]))
