"""Gradients sketched in the backward pass, against autograd's own."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import gradient_process
from pico import PICO, logits, pico_inputs, pico_model
from slimtune.arch import bind
from slimtune.calib.gradients import Batch, GradientSketch, learnt_tokens, model_loss, sketch_gradients
from slimtune.errors import CalibrationError, FormatError, RecipeError
from slimtune.linalg.sketch import exact
from slimtune.lora.attach import add_lora, sketch_targets
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn

NAME = "model.layers.1.mlp.gate" + "_proj"


def batches(model: Any, count: int = 4) -> list[Batch]:
    """Batches of different lengths, some of their tokens not learnt."""
    made: list[Batch] = []
    for seed in range(count):
        batch: dict[str, Tensor] = dict(pico_inputs(model, length=9 + seed, seed=seed))
        batch["labels"] = batch.get("decoder_input_ids", batch["input_ids"]).clone()
        batch["labels"][0, :3] = -100
        made.append(batch)
    return made


def linears(model: Any) -> dict[str, nn.Module]:
    return {port.name: model.get_submodule(port.name) for port in bind(model).linears}


def true_gradients(model: Any, data: list[Batch], dense: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Of the mean loss over all learnt tokens, by autograd through the weights."""
    model = copy.deepcopy(model)
    weights = {name: module.weight.requires_grad_() for name, module in linears(model).items()}
    total = sum(learnt_tokens(model, batch) for batch in data)
    loss = sum(model_loss(model, batch) * learnt_tokens(model, batch) for batch in data) / total
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def errors(found: GradientSketch, wanted: dict[str, Tensor]) -> list[float]:
    """How far `U S Vᵀ` is from the gradient, relative to it."""
    return [
        float(((t.u * t.s) @ t.v.T - wanted[name]).norm() / wanted[name].norm())
        for name, t in ((name, layer.triples) for name, layer in found.layers.items())
    ]


@pytest.mark.parametrize("family", PICO)
def test_with_all_directions_it_is_the_gradient(family: str) -> None:
    model = pico_model(family)
    data = batches(model)
    found = sketch_gradients(model, linears(model), data, directions=64)
    wanted = true_gradients(model, data)
    assert found.layers.keys() == wanted.keys()
    assert max(errors(found, wanted)) < 3e-3  # T5's are as small as 1e-7
    for name, layer in found.layers.items():
        assert layer.norm == pytest.approx(float(wanted[name].norm()), rel=1e-3)
        assert layer.energy == pytest.approx(1, abs=1e-5)
    assert found.tokens == sum(learnt_tokens(model, batch) for batch in data)


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_a_pass_more_is_nearer_to_the_svd(passes: int) -> None:
    model = pico_model("llama")
    data = batches(model)
    wanted = true_gradients(model, data)
    found = sketch_gradients(model, linears(model), data, directions=2, passes=passes)
    shares = []
    for name, layer in found.layers.items():
        u, _, v = layer.triples
        torch.testing.assert_close(u.T @ u, torch.eye(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(v.T @ v, torch.eye(2), rtol=0, atol=1e-5)
        best = exact(wanted[name], 2).s.square().sum()
        shares.append(float((u.T @ wanted[name] @ v).square().sum() / best))
    assert min(shares) > {1: 0.1, 2: 0.7, 3: 0.9, 4: 0.97}[passes]
    assert sum(shares) / len(shares) > {1: 0.7, 2: 0.93, 3: 0.98, 4: 0.995}[passes]


def moments(model: Any, data: list[Batch], of: str) -> dict[str, Tensor]:
    """The covariance of what each linear reads, or its weight times the damped second moment, in float64, by hooks."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears(model)}
    encoders = {name for name in seen if name.startswith("encoder") or ".EncDecAttention.k" in name}
    encoders |= {name for name in seen if ".EncDecAttention.v" in name}
    for batch in data:
        learnt = batch["labels"] >= 0

        def keep(name: str, mask: Tensor) -> Any:
            return lambda _, args: seen[name].append(args[0].detach().double().view(*mask.shape, -1)[mask])

        everything = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        handles = [
            module.register_forward_pre_hook(keep(name, everything if name in encoders else learnt))
            for name, module in linears(model).items()
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    found = {}
    total = sum(learnt_tokens(model, batch) for batch in data)
    for name, module in linears(model).items():
        x = torch.cat(seen[name])
        if of == "inputs":
            found[name] = (x - x.mean(0)).T @ (x - x.mean(0)) / total
        else:
            c = x.T @ x / total
            found[name] = module.weight.detach().double() @ (c + 0.01 * c.diagonal().mean() * torch.eye(len(c)))
    return found


@pytest.mark.parametrize("of", ["inputs", "outputs"])
@pytest.mark.parametrize("family", ["llama-biased", "opt", "t5"])
def test_moments_are_those_of_learnt_tokens(family: str, of: Any) -> None:
    model = pico_model(family)
    data = batches(model)
    for batch in data:  # so that the two sides of an encoder-decoder differ in length
        if "decoder_input_ids" in batch:
            batch["decoder_input_ids"], batch["labels"] = (
                batch[k][:, :6].contiguous() for k in ("decoder_input_ids", "labels")
            )
    for directions, passes, bound in ((64, 1, 1e-2), (6, 4, 1.0)):  # float32, and means far from zero
        found = sketch_targets(model, data, directions=directions, of=of, passes=passes)
        wanted = {name: g.float() for name, g in moments(model, data, of).items()}
        assert (found.of, found.layers.keys()) == (of, wanted.keys())
        assert max(errors(found, wanted)) < bound
        for name, layer in found.layers.items():
            best = exact(wanted[name].double(), 6).s.float()
            torch.testing.assert_close(layer.triples.s[:6], best, rtol=2e-2, atol=1e-4 * float(best[0]))
            trace = float(wanted[name].trace()) if of == "inputs" else 0.0
            assert layer.variance == pytest.approx(trace, rel=1e-3)  # float32, and means far from zero


def test_no_weight_gets_a_gradient_and_the_model_is_as_it_was() -> None:
    model = pico_model("opt", attention_dropout=0.3, dropout=0.3).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    next(iter(linears(model).values())).weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    asked: list[bool] = []

    def loss(_: nn.Module, batch: Batch) -> Tensor:
        asked.extend(p.requires_grad for p in model.parameters())
        return model_loss(model, batch)

    first = sketch_gradients(model, linears(model), batches(model), directions=4, loss=loss)
    again = sketch_gradients(model, linears(model), batches(model), directions=4)
    assert not any(asked) and len(asked) == 4 * len(flags)
    assert [p.requires_grad for p in model.parameters()] == flags and not all(flags)
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    for name, layer in first.layers.items():  # dropout is off: twice the same, bit for bit
        assert all(torch.equal(a, b) for a, b in zip(layer.triples, again.layers[name].triples, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_may_recompute_their_activations(reentrant: bool) -> None:
    model: Any = pico_model("llama")
    data = batches(model)
    plain = sketch_gradients(model, linears(model), data, directions=64)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    runs: list[int] = []
    block = model.get_submodule(bind(model).blocks[0].name)
    handle = block.self_attn.register_forward_hook(lambda *_: runs.append(1))
    found = sketch_gradients(model, linears(model), data, directions=64)
    handle.remove()
    assert len(runs) == 2 * len(data)  # it did recompute
    assert not any(module.training for module in model.modules())
    wanted = {name: (layer.triples.u * layer.triples.s) @ layer.triples.v.T for name, layer in plain.layers.items()}
    assert max(errors(found, wanted)) < 1e-5


def test_a_quantized_base_has_the_gradient_of_its_dense_twin() -> None:
    model = pico_model("llama")
    quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=12)))
    twin = copy.deepcopy(model)
    for name, module in linears(twin).items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, module.to_linear(torch.float32))
    data = batches(model)
    found = sketch_gradients(model, linears(model), data, directions=64)
    assert all(isinstance(module, QuantLinear) for module in linears(model).values())
    assert max(errors(found, true_gradients(twin, data))) < 1e-3


def test_under_an_adapter_it_is_the_gradient_at_the_sum() -> None:
    model = pico_model("llama")
    data = batches(model)
    wrapped = add_lora(copy.deepcopy(model), r=2, seed=1)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    found = sketch_targets(wrapped, data, directions=64)
    assert all(p.requires_grad == ("lora_" in name) for name, p in wrapped.named_parameters())
    summed = wrapped.merge_and_unload()
    assert max(errors(found, true_gradients(summed, data))) < 1e-3


def test_batches_add_up_however_they_are_cut() -> None:
    model = pico_model("llama")
    data = batches(model)
    pieces = [{key: value[i : i + 1] for key, value in batch.items()} for batch in data for i in range(2)]
    whole = sketch_gradients(model, linears(model), data, directions=4)
    cut = sketch_gradients(model, linears(model), pieces, directions=4)
    assert (whole.tokens, whole.loss) == (cut.tokens, pytest.approx(cut.loss))
    for name, layer in whole.layers.items():
        assert layer.norm == pytest.approx(cut.layers[name].norm, rel=1e-4)
        torch.testing.assert_close(layer.triples.s, cut.layers[name].triples.s, rtol=1e-3, atol=1e-7)


def scaled(factor: int) -> Any:
    return lambda model, batch: factor * model_loss(model, batch)


def test_a_loss_scaled_by_a_number_scales_the_gradient_alone() -> None:
    model = pico_model("llama")
    one, eight = (sketch_gradients(model, linears(model), batches(model), directions=3, loss=scaled(k)) for k in (1, 8))
    for name, layer in one.layers.items():
        other = eight.layers[name]
        torch.testing.assert_close(other.triples.s, 8 * layer.triples.s, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(other.triples.v, layer.triples.v, rtol=0, atol=1e-3)


def test_halves_of_one_kind_overlap_and_halves_of_two_do_not() -> None:
    model = pico_model("llama")
    data = batches(model, 2)
    alike = sketch_gradients(model, linears(model), [data[0]] * 4, directions=4)
    apart = sketch_gradients(model, linears(model), data, directions=4)
    for name, layer in alike.layers.items():
        other = apart.layers[name].overlap
        assert layer.overlap == pytest.approx(1, abs=1e-3) and other is not None and other < 0.98
    assert sketch_gradients(model, linears(model), data[:1], directions=4).layers[NAME].overlap is None


def test_estimation_stops_when_more_data_changes_nothing() -> None:
    model = pico_model("llama")
    data = batches(model, 1) * 40
    found = sketch_gradients(model, linears(model), data, directions=4, tolerance=0.01)
    assert (found.stable, found.batches) == (True, 8)
    assert found.tokens == 8 * learnt_tokens(model, data[0])
    everything = sketch_gradients(model, linears(model), data[:6], directions=4, tolerance=0.0)
    assert (everything.stable, everything.batches) == (False, 6)


def test_a_sketch_is_saved_and_serves_a_smaller_rank(tmp_path: Path) -> None:
    model = pico_model("llama")
    found = sketch_gradients(model, linears(model), batches(model), directions=8)
    found.save(tmp_path / "gradients.safetensors")
    read = GradientSketch.load(tmp_path / "gradients.safetensors")
    assert (read.tokens, read.loss, read.directions, read.unreached) == (found.tokens, found.loss, 8, ())
    for name, layer in found.layers.items():
        other = read.layers[name]
        assert dataclasses.replace(layer, triples=other.triples) == other
        assert all(torch.equal(a, b) for a, b in zip(layer.triples, other.triples, strict=True))
    for r in (1, 3):
        wrapped = add_lora(pico_model("llama"), r=r, init="lora-ga", gradients=read)
        assert torch.allclose(logits(wrapped, pico_inputs(model)), logits(model, pico_inputs(model)), atol=1e-5)
    (tmp_path / "gradients.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(FormatError, match="not a sketch"):
        GradientSketch.load(tmp_path / "gradients.safetensors")


def test_a_layer_that_no_gradient_reaches_is_named() -> None:
    model = pico_model("llama")
    layers = {**linears(model), "spare": nn.Linear(8, 8)}
    found = sketch_gradients(model, layers, batches(model), directions=4)
    assert found.unreached == ("spare",)
    assert found.layers["spare"].energy == 0


@pytest.mark.parametrize("where", ["weight", "loss"])
def test_a_number_that_is_none_is_named_by_layer_and_batch(where: str) -> None:
    model: Any = pico_model("llama").train()
    data = batches(model)
    layer = model.get_submodule(NAME)

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (torch.nan if args[0].shape[1] == 11 else 1)  # the third batch

    handle = layer.register_forward_hook(poison) if where == "weight" else None
    loss = (
        (lambda m, b: model_loss(m, b) * (torch.inf if b["labels"].shape[1] == 11 else 1))
        if where == "loss"
        else model_loss
    )
    with pytest.raises(CalibrationError, match="not a finite number") as caught:
        sketch_gradients(model, linears(model), data, directions=4, loss=loss)
    assert "batch 3" in str(caught.value)
    assert where == "loss" or NAME in str(caught.value)
    if handle is not None:
        handle.remove()
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters()) and all(module.training for module in model.modules())


def test_nothing_to_look_at_is_refused() -> None:
    model = pico_model("llama")
    with pytest.raises(CalibrationError, match="no layer"):
        sketch_gradients(model, {}, batches(model), directions=4)
    with pytest.raises(CalibrationError, match="no batch"):
        sketch_gradients(model, linears(model), [], directions=4)
    silent = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches(model)]
    with pytest.raises(CalibrationError):
        sketch_gradients(model, linears(model), silent, directions=4)
    with pytest.raises(RecipeError, match="no linear"):
        sketch_targets(model, batches(model), directions=4, target_modules=["nothing"])


def test_a_merged_adapter_is_refused() -> None:
    model = add_lora(pico_model("llama"), r=2)
    model.merge_adapter()
    with pytest.raises(RecipeError, match="merged into the base"):
        sketch_targets(model, batches(pico_model("llama")), directions=4)
    assert any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules())


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    script = Path(gradient_process.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    for passes in (1, 3):
        first, second = (GradientSketch.load(tmp_path / f"{rank}-{passes}") for rank in (0, 1))
        alone = gradient_process.sketch(gradient_process.batches(), passes)
        assert first.tokens == second.tokens == alone.tokens
        for name, layer in alone.layers.items():
            mine, theirs = first.layers[name].triples, second.layers[name].triples
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
            torch.testing.assert_close(mine.s, layer.triples.s, rtol=1e-4, atol=1e-8)
            torch.testing.assert_close(mine.v[:, 0], layer.triples.v[:, 0], rtol=0, atol=1e-4)
