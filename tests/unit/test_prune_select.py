"""Which units stay, how much that removes, and fitting what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pico import PICO, logits, pico_inputs, pico_model
from slimtune.arch import bind
from slimtune.errors import RecipeError
from slimtune.lora.attach import add_lora, base_of
from slimtune.prune.collect import collect
from slimtune.prune.groups import Axis, axes, parameters
from slimtune.prune.importance import Magnitude, Wanda
from slimtune.prune.latency import latency
from slimtune.prune.options import PruneOptions
from slimtune.prune.refit import fitted, refit_
from slimtune.prune.schedule import ratio_at
from slimtune.prune.select import chunks, select
from slimtune.prune.surgery import PrunePlan, prune_
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn

TOKENS = torch.randint(6, 262, (6, 24), generator=torch.Generator().manual_seed(5))


def scored(model: Any, targets: Any = ("kv", "ffn")) -> Any:
    modelmap = bind(model)
    found = axes(modelmap, targets)
    return modelmap, found, collect(model, modelmap, found, Magnitude())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "phi3", "opt", "t5", "gemma2"])
@pytest.mark.parametrize("of", ["blocks", "model"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("allocated", [False, True])
def test_the_ratio_is_met_within_a_unit(name: str, of: Any, ratio: float, allocated: bool) -> None:
    if of == "model" and ratio == 0.5:
        ratio = 0.3  # the embeddings of a pico model are half of it
    if name == "opt":
        ratio /= 2  # its heads stay
    model = pico_model(name)
    modelmap, found, scores = scored(model, ("ffn",) if name == "opt" else ("kv", "ffn"))
    whole = parameters(modelmap, of)
    kept = select(modelmap, found, scores, ratio * whole, step=2, allocated=allocated)
    gone = sum(a.parameters * (a.units - len(kept[a.name])) for a in found)
    unit = max(2 * a.parameters if a.kind == "ffn" else a.parameters for a in found)
    fine = 2 * sum(a.parameters for a in found if a.kind == "ffn")
    assert abs(gone - ratio * whole) <= (unit if allocated else fine)
    assert all(len(kept[a.name]) % 2 == 0 for a in found if a.kind == "ffn")
    if not allocated:
        assert len({len(kept[a.name]) for a in found if a.kind == "ffn"}) == 1


def test_the_cheapest_units_go_first() -> None:
    modelmap, found, scores = scored(pico_model("llama"), ("ffn",))
    kept = select(modelmap, found, scores, 0.3 * parameters(modelmap, "blocks"), step=1)
    for axis in found:
        stays = set(kept[axis.name])
        goes = set(range(axis.units)) - stays
        assert max(scores[axis.name][u] for u in goes) <= min(scores[axis.name][u] for u in stays)
        assert goes


def test_allocated_widths_follow_score_per_parameter() -> None:
    modelmap, found, scores = scored(pico_model("llama"), ("ffn",))
    scores[found[0].name] *= 1000  # the first block matters more
    remove = 0.15 * parameters(modelmap, "blocks")
    kept = select(modelmap, found, scores, remove, step=1, allocated=True, additive=True)
    assert len(kept[found[0].name]) == found[0].units > len(kept[found[1].name])


@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_sub_layers_go_as_a_whole_the_cheapest_first(name: str) -> None:
    modelmap, found, scores = scored(pico_model(name), ("sublayers",))
    remove = sum(axis.parameters * axis.units for axis in found[:2])
    for number, axis in enumerate(found):
        scores[axis.name] = torch.full((axis.units,), float(number + 1)) / axis.units * axis.parameters * axis.units
    kept = select(modelmap, found, scores, remove, allocated=True, additive=True)
    assert [len(kept[axis.name]) for axis in found] == [0, 0, *(axis.units for axis in found[2:])]


@pytest.mark.parametrize(("ratio", "layers"), [(0.26, 6), (0.5, 4), (0.74, 2)])
def test_whole_layers_meet_the_ratio_within_a_layer(ratio: float, layers: int) -> None:
    modelmap, found, scores = scored(pico_model("llama", num_hidden_layers=8), ("layers",))
    scores[found[0].name] = torch.tensor([5.0, 1.0, 7.0, 2.0, 8.0, 3.0, 6.0, 4.0])
    kept = select(modelmap, found, scores, ratio * parameters(modelmap, "blocks"))[found[0].name]
    assert len(kept) == layers and set(kept) >= {4, 2}


def test_scores_are_weighed_against_the_time_that_units_take() -> None:
    modelmap, found, scores = scored(pico_model("llama"))
    for axis in found:
        scores[axis.name] = torch.full((axis.units,), float(axis.parameters), dtype=torch.float64)  # alike a parameter
    remove = 0.3 * parameters(modelmap, "blocks")
    rest = (found[1].units, 100.0)
    heads, channels = {"kv": [(2, 1000.0)], "ffn": [rest]}, {"kv": [(2, 1.0)], "ffn": [(40, 99_999.0)]}
    for allocated in (False, True):
        options: Any = {"step": 1, "additive": True, "allocated": allocated}
        slow = select(modelmap, found, scores, remove, latency=heads, **options)
        fast = select(modelmap, found, scores, remove, latency=channels, **options)
        kv = [axis.name for axis in found if axis.kind == "kv"]
        assert sum(len(slow[name]) for name in kv) < sum(len(fast[name]) for name in kv)


def test_a_run_saves_what_it_takes_at_the_width_that_it_leaves() -> None:
    axis = Axis("o", "ffn", (0,), 8, (), 10)
    times = {"ffn": [(2, 10.0), (4, 20.0), (8, 60.0)]}
    assert [chunk.saves for chunk in chunks(axis, torch.arange(8.0), 2, times)] == [20.0, 20.0, 10.0, 10.0]
    assert [chunk.saves for chunk in chunks(axis, torch.arange(8.0), 4)] == [40.0, 40.0]


@pytest.mark.parametrize("name", [*PICO, "packed", "lora"])
def test_blocks_are_timed_at_a_few_widths_and_left_alone(name: str) -> None:
    model: Any = pico_model(name if name in PICO else "llama")
    if name == "packed":
        quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=8)))
    model = add_lora(model, r=2) if name == "lora" else model
    base, modelmap = base_of(model), bind(model)
    found = axes(modelmap, ("ffn",) if name.startswith("opt") else ("kv", "ffn"))
    before = {key: value.clone() for key, value in base.state_dict().items()}
    config = base.config.to_dict()
    times = latency(base, modelmap, found)
    assert times.keys() == {axis.kind for axis in found}
    for axis in found:
        widths = [width for width, _ in times[axis.kind]]
        assert widths == sorted(set(widths)) and widths[-1] == axis.units
        assert [time for _, time in times[axis.kind]] == sorted(time for _, time in times[axis.kind])
        assert times[axis.kind][0][1] > 0
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert base.config.to_dict() == config and bind(model) == modelmap


def test_query_heads_go_one_of_each_group() -> None:
    modelmap, found, scores = scored(pico_model("llama"), ("heads",))
    assert [chunk.units for chunk in chunks(found[0], torch.tensor([3.0, 1.0, 2.0, 5.0]))] == [(1, 2), (0, 3)]
    kept = select(modelmap, found, scores, found[0].parameters * 4, step=1)
    assert all(len(units) == 2 and units[0] < 2 <= units[1] for units in kept.values())


def test_heads_stay_in_numbers_that_the_configuration_can_hold() -> None:
    model = pico_model("gemma2", num_attention_heads=8, num_key_value_heads=8)  # 32 wide: 8, 4, 2 or 1
    modelmap, found, scores = scored(model, ("kv",))
    kept = select(modelmap, found, scores, found[0].parameters * 2 * 3)
    assert {len(units) for units in kept.values()} == {4}


def test_too_much_and_too_little_are_refused() -> None:
    modelmap, found, scores = scored(pico_model("llama"))
    with pytest.raises(RecipeError, match="cannot be pruned") as caught:
        select(modelmap, found, scores, 0.99 * parameters(modelmap, "blocks"))
    assert "something of every sub-layer stays" in caught.value.facts["wanted"]
    with pytest.raises(RecipeError, match="nothing would be pruned"):
        select(modelmap, found, scores, 10.0)


def test_the_ramp_is_the_cubic_of_the_paper() -> None:
    options = PruneOptions(ratio=0.5, schedule="cubic", warmup=0.1, cooldown=0.2)
    assert [ratio_at(options, step, 100) for step in (0, 10, 80, 100)] == [0, 0, 0.5, 0.5]
    for step in (20, 45, 70):
        p = (step - 10) / 70
        assert ratio_at(options, step, 100) == pytest.approx(0.5 - 0.5 * (1 - p) ** 3)
    linear = PruneOptions(ratio=0.4, schedule="linear", warmup=0.0, cooldown=0.0)
    assert [ratio_at(linear, step, 8) for step in (0, 2, 4, 8)] == pytest.approx([0, 0.1, 0.2, 0.4])


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 1.0},
        {"targets": ("kv", "heads")},
        {"targets": ("layers", "ffn")},
        {"targets": ("up",)},
        {"multiple_of": 0},
        {"every": 0},
        {"warmup": 0.6, "cooldown": 0.4},
        {"refit": True, "targets": ("layers",)},
        {"targets": ("layers",), "schedule": "linear"},
        {"targets": ("layers",), "per": "microsecond"},
        {"targets": ("sublayers",)},
        {"targets": ("sublayers", "ffn"), "widths": "allocated"},
        {"targets": ("sublayers",), "widths": "allocated", "refit": True},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        PruneOptions(**wrong)


def test_refitting_is_least_squares() -> None:
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(50, 6)) @ generator.normal(size=(6, 6)), generator.normal(size=(3, 6))
    kept = [0, 3, 5]
    wanted = np.linalg.lstsq(x[:, kept], x @ w.T, rcond=None)[0].T
    hessian = torch.tensor(x.T @ x / 50)
    got = fitted(torch.tensor(w), hessian, torch.tensor(kept), damp=0.0)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-3)
    still = fitted(torch.tensor(w), hessian, torch.tensor(kept), damp=1e9)  # no step away from what was there
    np.testing.assert_allclose(still.numpy(), w[:, kept], rtol=1e-6)


def test_a_feature_that_is_always_zero_is_no_trouble() -> None:
    hessian = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    assert torch.equal(fitted(torch.ones(2, 3), hessian, torch.tensor([1, 2])), torch.ones(2, 2).double())


@pytest.mark.parametrize("name", ["llama", "llama-biased", "opt", "t5-gated", "phi3"])
def test_refitting_brings_the_outputs_nearer(name: str) -> None:
    def off(refit: bool) -> float:
        model = pico_model(name)
        modelmap = bind(model)
        found = axes(modelmap, ("ffn",))
        scores = collect(model, modelmap, found, Wanda(), TOKENS)
        kept = select(modelmap, found, scores, 0.25 * parameters(modelmap, "blocks"), step=2)
        inputs = pico_inputs(model, batch=4, length=20)
        dense, plan = logits(model, inputs), PrunePlan(found, kept)
        if refit:
            lost = refit_(model, modelmap, plan, TOKENS)
            assert lost.keys() == {part.port for a in found for part in a.readers}
            assert all(0 < share < 1 for share in lost.values())
        prune_(model, modelmap, plan)
        return float((logits(model, inputs) - dense).square().mean())

    assert off(refit=True) < 0.9 * off(refit=False)


def test_only_plain_linears_are_fitted() -> None:
    model = add_lora(pico_model("llama"), r=2)
    modelmap = bind(model)
    found = axes(modelmap, ("ffn",))
    plan = PrunePlan(found, {axis.name: tuple(range(8)) for axis in found})
    with pytest.raises(RecipeError, match="only a plain linear can be fitted"):
        refit_(base_of(model), modelmap, plan, TOKENS)
