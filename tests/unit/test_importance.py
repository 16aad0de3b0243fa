"""Scores of units against textbook versions: autograd's own weight gradients, finite differences, removal itself."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pico import PICO, VOCAB_SIZE, pico_model
from slimtune.arch import bind
from slimtune.errors import CalibrationError
from slimtune.lora.attach import add_lora, base_of
from slimtune.prune import IMPORTANCES, weights
from slimtune.prune.collect import collect
from slimtune.prune.groups import Axis, axes
from slimtune.prune.importance import (
    Flap,
    Gate,
    GateFisher,
    Influence,
    Lora,
    LoraSquared,
    LossChange,
    Magnitude,
    Random,
    Wanda,
    WeightTaylor,
)
from slimtune.prune.surgery import PrunePlan, prune_
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn

TOKENS = torch.randint(6, VOCAB_SIZE, (4, 12), generator=torch.Generator().manual_seed(3))


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    out = model(input_ids=tokens).logits
    return cross_entropy(out[:, :-1].reshape(-1, VOCAB_SIZE), tokens[:, 1:].reshape(-1))


def weight_grads(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """dL/dW of every weight, by autograd, the whole at once."""
    model.requires_grad_(True)
    model.zero_grad()
    loss_of(model, tokens).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def of_unit(weights: dict[str, Tensor], axis: Axis, unit: int) -> list[Tensor]:
    """The entries of a group, part by part."""
    found = []
    for piece in axis.group(unit).slices:
        weight = weights[f"{piece.port}.weight"]
        found.append(weight[list(piece.indices)] if piece.dim == 0 else weight[:, list(piece.indices)])
    return found


@pytest.mark.parametrize("name", ["llama", "llama-biased", "phi3", "gemma3", "opt"])
def test_a_gates_gradient_is_the_readers_columns_against_their_gradient(name: str) -> None:
    model = pico_model(name, dtype=torch.float64)
    modelmap = bind(model)
    found = axes(modelmap, ("ffn",) if name == "opt" else ("kv", "ffn"))
    scores = collect(model, modelmap, found, Gate(), TOKENS, batch_size=1)
    grads, weights = weight_grads(model, TOKENS), held(model)
    for axis in found:
        wanted = torch.stack([
            (of_unit(grads, axis, u)[-1] * of_unit(weights, axis, u)[-1]).sum() for u in range(axis.units)
        ]).detach().abs()  # fmt: skip
        torch.testing.assert_close(scores[axis.name], wanted, rtol=2e-5, atol=1e-8)  # theirs: norms in float32


def test_a_gates_gradient_is_the_change_of_the_loss_when_it_closes_a_little() -> None:
    model = pico_model("llama", dtype=torch.float64)
    modelmap = bind(model)
    found = axes(modelmap)
    scores = collect(model, modelmap, found, Gate(), TOKENS)
    step = 1e-2  # norms compute in float32 even here
    for axis in (found[0], found[3]):
        for unit in (0, axis.units - 1):
            loss = []
            for sign in (1, -1):
                gates = torch.ones(axis.units, dtype=torch.float64)
                gates[unit] += sign * step
                wide = gates.repeat_interleave(axis.readers[0].size)
                handle = model.get_submodule(axis.name).register_forward_pre_hook(
                    lambda _, args, wide=wide: (args[0] * wide, *args[1:])
                )
                with torch.no_grad():
                    loss.append(float(loss_of(model, TOKENS)))
                handle.remove()
            slope = (loss[0] - loss[1]) / (2 * step)
            assert abs(slope) == pytest.approx(float(scores[axis.name][unit]), rel=0.02, abs=2e-5)


def test_gate_fisher_is_half_the_mean_square_over_sequences() -> None:
    model = pico_model("llama", dtype=torch.float64)
    modelmap = bind(model)
    found = axes(modelmap)
    scores = collect(model, modelmap, found, GateFisher(), TOKENS, batch_size=3)  # a last batch of one
    each = [weight_grads(model, TOKENS[i : i + 1]) for i in range(len(TOKENS))]
    weights = held(model)
    for axis in found:
        for unit in (0, axis.units - 1):
            column = of_unit(weights, axis, unit)[-1]
            squares = [float((of_unit(g, axis, unit)[-1] * column).sum()) ** 2 for g in each]
            assert float(scores[axis.name][unit]) == pytest.approx(sum(squares) / len(squares) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2"])
def test_weight_taylor_is_the_sum_of_weight_times_gradient(name: str) -> None:
    model = pico_model(name, dtype=torch.float64)
    modelmap = bind(model)
    found = axes(modelmap)
    scores = collect(model, modelmap, found, WeightTaylor(), TOKENS, batch_size=4)
    grads, weights = weight_grads(model, TOKENS), held(model)
    for axis in found:
        wanted = [
            sum(
                float((g * w).abs().sum())
                for g, w in zip(of_unit(grads, axis, u), of_unit(weights, axis, u), strict=True)
            )
            for u in range(axis.units)
        ]
        expected = torch.tensor(wanted, dtype=torch.float64) * len(TOKENS)  # a sum over windows of means
        torch.testing.assert_close(scores[axis.name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("squared", [False, True])
def test_lora_is_the_papers_formula(squared: bool) -> None:
    model = add_lora(pico_model("llama", dtype=torch.float64), r=3, lora_alpha=6)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    base, modelmap = base_of(model), bind(model)
    found = axes(modelmap, ("ffn",))
    scores = collect(base, modelmap, found, LoraSquared() if squared else Lora(), TOKENS, batch_size=4)
    loss_of(base, TOKENS).backward()
    for axis in found:
        total = torch.zeros(axis.units, dtype=torch.float64)
        for part in axis.parts:
            layer: Any = base.get_submodule(part.port)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            ga, gb = a.grad * len(TOKENS), b.grad * len(TOKENS)
            estimate = gb @ a + b @ ga - gb @ ga
            product = (estimate * (layer.base_layer.weight + 2.0 * b @ a)).detach()
            entries = product.square() if squared else product.abs()
            total += entries.sum(1 - part.dim)
        torch.testing.assert_close(scores[axis.name], total, rtol=2e-5, atol=1e-8)  # theirs: norms in float32
    assert all(p.grad is not None for n, p in base.named_parameters() if "lora_" in n)  # as it was before


@pytest.mark.parametrize("importance", [Wanda(), Flap()])
def test_forward_measures_are_those_of_the_readers_whole_input(importance: Any) -> None:
    model = pico_model("llama", dtype=torch.float64)
    modelmap = bind(model)
    found = axes(modelmap)
    scores = collect(model, modelmap, found, importance, TOKENS, batch_size=3)
    for axis in found:
        inputs: list[Tensor] = []
        module: Any = model.get_submodule(axis.name)
        handle = module.register_forward_pre_hook(lambda _, args, held=inputs: held.append(args[0]))
        with torch.no_grad():
            loss_of(model, TOKENS)
        handle.remove()
        x, w = inputs[0].reshape(-1, inputs[0].shape[-1]), module.weight.detach()
        if isinstance(importance, Wanda):
            columns = (w.abs() * x.norm(dim=0) / len(x) ** 0.5).sum(0)
        else:
            columns = x.var(0, correction=0) * w.norm(dim=0) ** 2
        torch.testing.assert_close(scores[axis.name], columns.view(axis.units, -1).sum(1))


def test_magnitude_and_chance_need_no_data() -> None:
    model = pico_model("llama", dtype=torch.float64)
    modelmap = bind(model)
    found, weights = axes(modelmap), held(model)
    scores = collect(model, modelmap, found, Magnitude())
    for axis in found:
        assert float(scores[axis.name][1]) == pytest.approx(
            sum(float(w.square().sum()) for w in of_unit(weights, axis, 1))
        )
    first, same, other = (collect(model, modelmap, found, Random(), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[a.name], same[a.name]) for a in found)
    assert not torch.equal(first[found[1].name], other[found[1].name])


def test_gates_see_through_packed_weights() -> None:
    """The gates of a packed model are those of the dense model that it stands for."""
    packed = pico_model("llama")
    modelmap = bind(packed)
    quantize_(packed, modelmap, all_linear(Rtn(bits=4, group_size=8)))
    dense = pico_model("llama")
    for port in modelmap.linears:
        layer: Any = packed.get_submodule(port.name)
        dense.get_submodule(port.name).weight.data.copy_(layer.dequantize())  # type: ignore[union-attr, operator]
    found = axes(modelmap)
    for importance in (Gate(), WeightTaylor(), Wanda()):
        got = collect(packed, modelmap, found, importance, TOKENS)
        wanted = collect(dense, modelmap, found, importance, TOKENS)
        for axis in found:
            torch.testing.assert_close(got[axis.name], wanted[axis.name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", PICO)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_scores_every_family_and_leaves_it_alone(importance: str, name: str) -> None:
    model: Any = pico_model(name)
    if importance.startswith("lora"):
        model = add_lora(model, r=2)
    base, modelmap = base_of(model), bind(model)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in base.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    kinds: Any = ("ffn",) if name.startswith("opt") else ("kv", "ffn")
    found = axes(modelmap, {"influence": ("layers",), "loss-change": ("sublayers",)}.get(importance, kinds))
    scores = collect(base, modelmap, found, IMPORTANCES[importance](), TOKENS, normalise="module")
    assert scores.keys() == {axis.name for axis in found}
    for axis in found:
        assert scores[axis.name].shape == (axis.units,) and float(scores[axis.name].abs().max()) > 0
        assert importance == "loss-change" or float(scores[axis.name].min()) >= 0
    for n, p in base.named_parameters():
        assert torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] and p.grad is None, n
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())


@pytest.mark.parametrize("importance", ["lora", "weight-taylor", "flap", "wanda", "magnitude", "random"])
def test_scores_are_the_same_however_few_units_are_looked_at_together(
    importance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_lora(pico_model("phi3", dtype=torch.float64), r=2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    base, modelmap = base_of(model), bind(model)
    wanted = collect(base, modelmap, axes(modelmap), IMPORTANCES[importance](), TOKENS)
    monkeypatch.setattr(weights, "ENTRIES", 100)
    assert len(list(weights.runs(axes(modelmap, ("ffn",))[0].readers[0], 40, 32))) == 14
    got = collect(base, modelmap, axes(modelmap), IMPORTANCES[importance](), TOKENS)
    for name, scores in wanted.items():
        torch.testing.assert_close(got[name], scores)


def test_no_weight_gets_a_gradient_from_gates() -> None:
    model = pico_model("llama")
    modelmap = bind(model)
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.append(name))
    collect(model, modelmap, axes(modelmap), Gate(), TOKENS)
    assert seen == []


def test_whole_layers_get_the_scores_of_what_is_in_them() -> None:
    model = pico_model("llama", num_hidden_layers=3)
    modelmap = bind(model)
    inner = collect(model, modelmap, axes(modelmap), GateFisher(), TOKENS)
    layers = collect(model, modelmap, axes(modelmap, ("layers",)), GateFisher(), TOKENS)
    wanted = [sum(float(inner[a.name].sum()) for a in axes(modelmap) if a.blocks == (b,)) for b in range(3)]
    assert layers["model.layers"].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt-post", "t5"])
def test_influence_is_one_minus_the_cosine_of_what_a_block_reads_and_makes(name: str) -> None:
    model: Any = pico_model(name)
    modelmap = bind(model)
    found = axes(modelmap, ("layers",))
    scores = collect(model, modelmap, found, Influence(), TOKENS, batch_size=3)
    half = TOKENS.shape[1] // 2
    inputs = {"input_ids": TOKENS}
    if name == "t5":
        inputs = {"input_ids": TOKENS[:, :half], "decoder_input_ids": TOKENS[:, half : 2 * half]}
    read: dict[str, Tensor] = {}
    for axis in found:
        for unit in range(axis.units):
            model.get_submodule(f"{axis.name}.{unit}").register_forward_hook(
                lambda _, args, out, key=f"{axis.name}.{unit}": read.update({
                    key: args[0], key + "+": out if isinstance(out, Tensor) else out[0]
                })
            )  # fmt: skip
    with torch.no_grad():
        model(**inputs)
    for axis in found:
        for unit in range(axis.units):
            x, y = (read[f"{axis.name}.{unit}{end}"].double() for end in ("", "+"))
            cosine = (x * y).sum(-1) / x.square().sum(-1).sqrt() / y.square().sum(-1).sqrt()
            assert float(scores[axis.name][unit]) == pytest.approx(1 - float(cosine.mean()), abs=1e-5)


def test_the_change_of_the_loss_is_that_of_the_model_without_the_unit() -> None:
    model = pico_model("llama", num_hidden_layers=3)
    modelmap = bind(model)
    with torch.no_grad():
        dense = float(loss_of(model, TOKENS))
    for targets in (("layers",), ("sublayers",), ("kv",)):
        found = axes(modelmap, targets)
        got = collect(model, modelmap, found, LossChange(), TOKENS, batch_size=3)
        axis = found[-1]
        for unit in (0, axis.units - 1):
            smaller = pico_model("llama", num_hidden_layers=3)
            stays = [u for u in range(axis.units) if u != unit and not axis.whole]
            kept = {a.name: tuple(range(a.units)) for a in found} | {axis.name: tuple(stays)}
            prune_(smaller, bind(smaller), PrunePlan(found, kept))
            with torch.no_grad():
                wanted = (float(loss_of(smaller, TOKENS)) - dense) / (axis.units if axis.whole else 1)
            assert float(got[axis.name][unit]) == pytest.approx(wanted, abs=3e-6)  # losses of 5 have steps of 5e-7


def test_only_whole_layers_have_an_influence() -> None:
    model = pico_model("llama")
    with pytest.raises(CalibrationError, match="only whole layers"):
        collect(model, bind(model), axes(bind(model)), Influence(), TOKENS)


def test_scores_of_each_weight_or_sub_layer_can_be_brought_to_length_one() -> None:
    model = pico_model("llama", dtype=torch.float64)
    modelmap = bind(model)
    [axis, *_] = found = axes(modelmap, ("ffn",))
    weights = held(model)
    parts = [[of_unit(weights, axis, u)[i].square().sum() for u in range(axis.units)] for i in range(3)]
    wanted = sum(torch.stack(p) / torch.stack(p).norm() for p in parts)
    got = collect(model, modelmap, found, Magnitude(), normalise="module")
    torch.testing.assert_close(got[axis.name], wanted.detach())
    assert float(collect(model, modelmap, found, Magnitude(), normalise="axis")[axis.name].norm()) == pytest.approx(1)


def test_data_that_is_missing_or_broken_is_refused() -> None:
    model = pico_model("llama")
    modelmap = bind(model)
    with pytest.raises(CalibrationError, match="needs calibration data"):
        collect(model, modelmap, axes(modelmap), Wanda())
    model.get_submodule(modelmap.linears[-1].name).weight.data[0, 0] = float("nan")  # type: ignore[union-attr, index, operator]
    with pytest.raises(CalibrationError, match="not finite"):
        collect(model, modelmap, axes(modelmap), Wanda(), TOKENS)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_every_importance_says_what_it_is(name: str) -> None:
    kind = IMPORTANCES[name]
    assert kind.__doc__ and all(f.metadata.get("help") for f in fields(kind))  # type: ignore[arg-type]
