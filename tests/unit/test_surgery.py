"""Cutting units out of models of every family: what is left computes what the masked model computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pico import PICO, logits, pico_inputs, pico_model
from slimtune.arch import ModelMap, bind
from slimtune.errors import RecipeError, ShapeError
from slimtune.lora.attach import add_lora, base_of
from slimtune.prune.groups import Axis, Kept, axes, block_parameters, parameters, possible
from slimtune.prune.importance import Magnitude
from slimtune.prune.probe import Probe
from slimtune.prune.surgery import PrunePlan, prune_
from slimtune.prune.weights import shares
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.quip import Quip
from slimtune.quant.rtn import Rtn

every_pico = pytest.mark.parametrize("name", PICO)


def some(found: Sequence[Axis]) -> Kept:
    """About half of the units of every axis, not the first ones, evenly in buckets."""
    kept = {}
    for axis in found:
        run = axis.units // axis.buckets
        mine = [run - 1 - 2 * i for i in range((run + 1) // 2)] if run > 1 else [0]
        kept[axis.name] = tuple(sorted(b * run + u for b in range(axis.buckets) for u in mine))
    return kept


def targets_of(modelmap: ModelMap) -> tuple[Any, ...]:
    return tuple(kind for kind in possible(modelmap) if kind in ("kv", "ffn"))


def masked_logits(model: Any, modelmap: ModelMap, found: Sequence[Axis], kept: Kept) -> torch.Tensor:
    with Probe(base_of(model), modelmap, found, Magnitude()) as probe:
        for name, units in kept.items():
            probe.keep(name, units)
        return logits(model, pico_inputs(base_of(model)))


@every_pico
def test_sliced_is_masked(name: str) -> None:
    model = pico_model(name, dtype=torch.float64)
    modelmap = bind(model)
    found = axes(modelmap, targets_of(modelmap))
    kept = some(found)
    dense = logits(model, pico_inputs(model))
    wanted = masked_logits(model, modelmap, found, kept)
    facts = prune_(model, modelmap, PrunePlan(found, kept))
    assert (wanted - dense).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, pico_inputs(model)), wanted, rtol=1e-9, atol=1e-9)
    again = bind(model)  # no dangling dimension: every size is the configuration's
    assert parameters(again, "model") == facts.parameters_after < facts.parameters_before


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen3", "phi3", "gemma3"])
def test_query_heads_go_evenly_inside_their_groups(name: str) -> None:
    model = pico_model(name, dtype=torch.float64)
    modelmap = bind(model)
    found = axes(modelmap, ("heads",))
    assert {axis.buckets for axis in found} == {2}
    kept = {axis.name: (1, 2) for axis in found}
    wanted = masked_logits(model, modelmap, found, kept)
    prune_(model, modelmap, PrunePlan(found, kept))
    torch.testing.assert_close(logits(model, pico_inputs(model)), wanted, rtol=1e-9, atol=1e-9)
    assert (bind(model).heads, bind(model).kv_heads) == (2, 2)


@every_pico
def test_parameters_are_counted_as_they_are(name: str) -> None:
    model = pico_model(name)
    modelmap = bind(model)
    for block in modelmap.blocks:
        module = model.get_submodule(block.name)
        bias = sum(p.numel() for n, p in module.named_parameters() if "relative_attention_bias" in n)
        assert block_parameters(modelmap, block.index) == sum(p.numel() for p in module.parameters()) - bias
    if name != "llava":
        assert parameters(modelmap, "model") == sum(p.numel() for p in model.parameters())


def test_a_group_names_the_slices_that_go_together() -> None:
    modelmap = bind(pico_model("llama-biased"))
    kv, ffn = axes(modelmap)[:2]
    group = kv.group(1)
    rows = {s.port.rpartition(".")[2]: (s.dim, s.indices) for s in group.slices}
    assert rows["q_proj"] == (0, tuple(range(24, 48))) and rows["o_proj"] == (1, tuple(range(24, 48)))
    assert rows["k_proj"] == rows["v_proj"] == (0, tuple(range(12, 24)))
    assert group.parameters == 24 * 33 + 2 * 12 * 33 + 24 * 32
    assert ffn.group(3).parameters == 2 * 33 + 32


def test_fused_projections_are_cut_in_each_of_their_parts() -> None:
    kv = axes(bind(pico_model("phi3")))[0]
    ports = [(s.port.rpartition(".")[2], s.indices[0], len(s.indices)) for s in kv.group(0).slices]
    assert ports == [("qkv_proj", 0, 24), ("qkv_proj", 48, 12), ("qkv_proj", 72, 12), ("o_proj", 0, 24)]


def test_layers_that_share_position_biases_lose_the_same_heads() -> None:
    found = axes(bind(pico_model("t5")), ("kv",))
    assert [axis.blocks for axis in found] == [(0, 1), (2, 3), (2,), (3,)]
    assert sum(part.port.endswith("relative_attention_bias") for axis in found for part in axis.parts) == 2


def deep(name: str, **changes: Any) -> Any:
    """A pico model of four layers (in each stack)."""
    count = {"num_layers": 4, "num_decoder_layers": 4} if name.startswith("t5") else {"num_hidden_layers": 4}
    return pico_model(name, **count, **changes)


def skip(_: Any, args: Any, output: Any) -> Any:
    return args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])


@every_pico
def test_whole_layers_go(name: str, tmp_path: Path) -> None:
    model = deep(name, dtype=torch.float64)
    modelmap = bind(model)
    found = axes(modelmap, ("layers",))
    inputs = pico_inputs(model)
    skipped = [model.get_submodule(f"{axis.name}.{i}") for axis in found for i in (0, 2)]
    handles = [block.register_forward_hook(skip) for block in skipped]
    wanted = logits(model, inputs)
    for handle in handles:
        handle.remove()
    assert (logits(model, inputs) - wanted).abs().max() > 1e-3
    facts = prune_(model, modelmap, PrunePlan(found, {axis.name: (1, 3) for axis in found}))
    torch.testing.assert_close(logits(model, inputs), wanted)
    again = bind(model)
    assert len(again.blocks) == 2 * len(found) and parameters(again, "model") == facts.parameters_after
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(stock, inputs), wanted)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    cached, plain = (stock.generate(inputs["input_ids"], use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("group", [8, -1])
def test_whole_layers_of_packed_weights_go(group: int) -> None:
    model = deep("llama")
    quantize_(model, bind(model), all_linear(Rtn(bits=3, group_size=group)))
    modelmap = bind(model)
    found = axes(modelmap, ("layers",))
    handle = model.get_submodule("model.layers.1").register_forward_hook(skip)
    wanted = logits(model, pico_inputs(model))
    handle.remove()
    facts = prune_(model, modelmap, PrunePlan(found, {found[0].name: (0, 2, 3)}))
    assert facts.requantized == () and facts.removed_ratio == 0.25
    torch.testing.assert_close(logits(model, pico_inputs(model)), wanted)


@every_pico
def test_sub_layers_that_go_leave_zeros(name: str) -> None:
    model = pico_model(name, dtype=torch.float64)
    modelmap = bind(model)
    found = axes(modelmap, ("sublayers",))
    assert {axis.kind for axis in found} == {"kv", "ffn"} and all(axis.whole for axis in found)
    kept = {axis.name: () if number in (0, 3) else tuple(range(axis.units)) for number, axis in enumerate(found)}
    wanted = masked_logits(model, modelmap, found, kept)
    facts = prune_(model, modelmap, PrunePlan(found, kept))
    torch.testing.assert_close(logits(model, pico_inputs(model)), wanted, rtol=1e-9, atol=1e-9)
    assert facts.padded and facts.parameters_after == facts.parameters_before == parameters(bind(model), "model")
    assert [fact.real for fact in facts.axes].count(0) == 2


def test_adapters_and_the_state_of_their_optimizer_go_along() -> None:
    model = add_lora(pico_model("llama", dtype=torch.float64), r=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    base = base_of(model)
    tokens = pico_inputs(base)["input_ids"]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    modelmap = bind(model)
    found = axes(modelmap)
    kept = some(found)
    wanted = masked_logits(model, modelmap, found, kept)
    prune_(base, modelmap, PrunePlan(found, kept), optimizer=optimizer)
    torch.testing.assert_close(logits(model, pico_inputs(base)), wanted, rtol=1e-9, atol=1e-9)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    down = next(m for n, m in model.named_modules() if n.endswith("down_proj"))
    assert (down.in_features, down.lora_A["default"].weight.shape) == (20, (3, 20))


def dora(model: Any) -> Any:
    """`model` with an adapter of PEFT's DoRA on all linears, as training leaves one."""
    linears = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules=sorted(linears - {"lm_head"}), use_dora=True))
    for name, parameter in wrapped.named_parameters():
        if "lora_magnitude_vector" in name:
            nn.init.uniform_(parameter, 0.2, 2)
        elif parameter.requires_grad:
            nn.init.normal_(parameter)
    return wrapped


@pytest.mark.parametrize("name", ["llama-biased", "phi3", "t5"])
@pytest.mark.parametrize("even", [True, False])
def test_magnitudes_of_dora_go_along_and_keep_their_share_of_what_is_left(name: str, even: bool) -> None:
    """Of rows that go, their magnitudes; of rows that lose columns, as much as they lose of their length."""
    base = pico_model(name, dtype=torch.float64)
    modelmap = bind(base)
    model = dora(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**pico_inputs(base)).logits.square().mean().backward()
    optimizer.step()
    found = axes(modelmap, targets_of(modelmap))
    kept = some(found)
    if not even:  # zeros stand for what one block loses more
        kept[found[-1].name] = tuple(range(found[-1].units))
    wanted = masked_logits(model, modelmap, found, kept)
    facts = prune_(base, modelmap, PrunePlan(found, kept), optimizer=optimizer)
    assert facts.padded is not even
    torch.testing.assert_close(logits(model, pico_inputs(base)), wanted, rtol=1e-9, atol=1e-9)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
    model(**pico_inputs(base)).logits.square().mean().backward()
    optimizer.step()


def test_scores_see_the_weights_that_dora_computes_with() -> None:
    model = dora(base := pico_model("llama", dtype=torch.float64))
    axis = axes(bind(base), ("ffn",))[0]
    for part in axis.parts:
        module: Any = base.get_submodule(part.port)
        eye = torch.eye(module.in_features, dtype=torch.float64)
        weight = module(eye).T.detach()
        wanted = (weight if part.dim == 0 else weight.T)[list(part.indices(range(axis.units)))]
        found = torch.cat([share.flatten(0, 1) for _, share, _ in shares(module, part, axis.units)])
        torch.testing.assert_close(found, wanted)
    assert model.peft_config


@pytest.mark.parametrize("group", [8, 20, -1, 40])
def test_packed_weights_are_cut_exactly_where_whole_groups_go(group: int) -> None:
    model = pico_model("llama")
    modelmap = bind(model)
    quantize_(model, modelmap, all_linear(Rtn(bits=4, group_size=group)))
    found = axes(modelmap, ("ffn",))
    kept = {axis.name: tuple(range(8, 16)) + tuple(range(24, 40)) for axis in found}
    wanted = masked_logits(model, modelmap, found, kept)
    facts = prune_(model, modelmap, PrunePlan(found, kept))
    off = (logits(model, pico_inputs(model)) - wanted).abs().max()
    if group == 20:
        assert [fact.reason.split(" of")[0] for fact in facts.requantized] == ["groups"] * 2
        assert 1e-3 < off < 3
    else:
        assert facts.requantized == () and off < 1e-5
        layout = model.get_submodule("model.layers.0.mlp.down_proj").layout
        assert layout.group_size == (8 if group == 8 else 24)  # as docs/formats.md says: no more than the row has
    assert bind(model).sizes[modelmap[found[0].name].reads] == 24


def test_weights_in_a_turned_basis_are_rounded_again_and_it_says_so() -> None:
    model = pico_model("llama")
    modelmap = bind(model)
    quantize_(model, modelmap, all_linear(Quip(bits=2)), tokens=torch.randint(6, 262, (2, 16)))
    found = axes(modelmap, ("ffn",))
    facts = prune_(model, modelmap, PrunePlan(found, some(found)))
    assert len(facts.requantized) == 6
    assert all("mixes rows and columns" in fact.reason for fact in facts.requantized)
    assert torch.isfinite(logits(model, pico_inputs(model))).all()


def test_unequal_blocks_are_padded_with_zeros_and_it_says_so() -> None:
    model = pico_model("llama-biased", dtype=torch.float64)
    modelmap = bind(model)
    found = axes(modelmap)
    kept = {found[0].name: (0,), found[1].name: tuple(range(8)), found[2].name: (0, 1), found[3].name: tuple(range(24))}
    wanted = masked_logits(model, modelmap, found, kept)
    facts = prune_(model, modelmap, PrunePlan(found, kept))
    torch.testing.assert_close(logits(model, pico_inputs(model)), wanted, rtol=1e-9, atol=1e-9)
    assert facts.padded
    assert [(fact.kept, fact.real) for fact in facts.axes] == [(2, 1), (24, 8), (2, 2), (24, 24)]


def test_packed_weights_cannot_be_padded() -> None:
    model = pico_model("llama")
    modelmap = bind(model)
    quantize_(model, modelmap, all_linear(Rtn(bits=4, group_size=8)))
    first, second = axes(modelmap, ("ffn",))
    kept = {first.name: tuple(range(8)), second.name: tuple(range(16))}
    with pytest.raises(RecipeError, match="padded with zeros"):
        prune_(model, modelmap, PrunePlan((first, second), kept))


def test_a_layer_that_is_no_linear_is_refused() -> None:
    model = pico_model("llama")
    modelmap = bind(model)
    found = axes(modelmap, ("ffn",))
    parent, _, leaf = found[0].name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    with pytest.raises(ShapeError, match="cannot be pruned"):
        prune_(model, modelmap, PrunePlan(found, some(found)))


def test_a_family_whose_heads_have_no_width_of_their_own_keeps_them() -> None:
    with pytest.raises(RecipeError, match="no prunable groups") as caught:
        axes(bind(pico_model("opt")), ("kv", "ffn"))
    assert "ffn" in caught.value.facts["wanted"] and caught.value.facts["got"] == "kv"
