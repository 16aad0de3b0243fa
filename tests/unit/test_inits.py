"""Where factors start: the formulas of the papers in float64, and what an adapter made of them does to a model."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from safetensors.torch import load_file
from torch import Tensor, nn

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer, save_pico
from slimtune.arch import bind
from slimtune.errors import RecipeError
from slimtune.linalg.sketch import exact, overlap
from slimtune.lora.attach import LIVE, adapted, add_lora, load_adapter, save_adapter, sketch_targets
from slimtune.lora.inits import DIRECTIONS, INITS, Knobs, Place, corda, leading_a, lora_ga, lora_one, olora, pissa
from slimtune.lora.merge import merge
from slimtune.lora.options import SKETCHING, InitName, LoraOptions
from slimtune.lora.ranks import allocate
from slimtune.lora.start import StartFact
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn
from slimtune.recipe.starts import starts_section

OFFSET = [name for name, init in INITS.items() if init.offset]
STARTED = [name for name, init in INITS.items() if init.factors]
each_offset = pytest.mark.parametrize("init", OFFSET)
each_started = pytest.mark.parametrize("init", STARTED)


def place(rank: int = 3, out: int = 20, width: int = 14, scaling: float = 2.5) -> tuple[Place, Tensor]:
    """A layer with a random weight, and its whole gradient."""
    weight, g = (torch.randn(out, width, dtype=torch.float64) for _ in range(2))
    return Place(weight, exact(g, 2 * rank), rank, scaling), g


def vectors(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U`, `S` and `Vᵀ` of numpy's SVD: signs are arbitrary."""
    return torch.linalg.svd(g, full_matrices=False)


def same_columns(a: Tensor, b: Tensor) -> None:
    """Equal up to the signs of columns."""
    torch.testing.assert_close(a * (a * b).sum(0).sign(), b)


# LoRA-GA by the tables of the paper's code: columns of U for B, rows of Vᵀ for A


@pytest.mark.parametrize(
    ("direction", "of_b", "of_a"),
    [
        ("ArB2r", slice(3, 6), slice(0, 3)),
        ("A2rBr", slice(0, 3), slice(3, 6)),
        ("ArBr", slice(0, 6, 2), slice(1, 6, 2)),
    ],
)
def test_lora_ga_takes_the_papers_directions(direction: str, of_b: slice, of_a: slice) -> None:
    layer, g = place()
    u, _, vh = vectors(g)
    a, b = lora_ga(layer, Knobs(direction=direction, scale="unit"))
    same_columns(b, u[:, of_b])
    same_columns(a.T, vh[of_a].T)


def test_lora_gas_random_directions_are_disjoint_and_of_the_first_2r() -> None:
    layer, g = place()
    u, _, vh = vectors(g)
    a, b = lora_ga(layer._replace(seed=5), Knobs(direction="random", scale="unit"))
    at_b, at_a = ((u[:, :6].T @ b).abs().argmax(0), (vh[:6] @ a.T).abs().argmax(0))
    assert sorted([*at_b.tolist(), *at_a.tolist()]) == list(range(6))
    same_columns(b, u[:, at_b])
    again = lora_ga(layer._replace(seed=5), Knobs(direction="random", scale="unit"))
    assert torch.equal(a, again.a)


@pytest.mark.parametrize("gamma", [0.0, 16.0, 64.0])
def test_lora_gas_scales_are_the_papers(gamma: float) -> None:
    layer, _ = place()
    unit = lora_ga(layer, Knobs(scale="unit"))
    torch.testing.assert_close(unit.b.T @ unit.b, torch.eye(3, dtype=torch.float64))
    sizes = {
        "stable": 20**0.25 / (gamma or 16) ** 0.5,
        "gd": 1 / 2.5,
        "weight-svd": float((torch.linalg.svdvals(layer.weight)[:3] / 2.5).sqrt().mean()),
    }
    for scale, size in sizes.items():
        a, b = lora_ga(layer, Knobs(scale=scale, gamma=gamma))
        torch.testing.assert_close(a, size * unit.a)
        torch.testing.assert_close(b, size * unit.b)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", [0.02, 0.5])
def test_the_automatic_scale_hits_its_target(direction: str, target: float) -> None:
    layer, _ = place()
    a, b = lora_ga(layer, Knobs(direction=direction, target=target))
    assert float(2.5 * (b @ a).norm() / layer.weight.norm()) == pytest.approx(target)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_first_step_of_descent_is_the_best_of_rank_2r(direction: str) -> None:
    """The theorem of the paper: `G AᵀA + B Bᵀ G` is as near to a multiple of `G` as rank 2r allows, for equal sizes."""
    layer, g = place(rank=2)
    a, b = lora_ga(layer, Knobs(direction=direction, scale="unit"))
    step = g @ a.T @ a + b @ b.T @ g
    best = vectors(g)[1][:4].square().sum().sqrt()
    torch.testing.assert_close((step * g).sum() / step.norm(), best)


def test_lora_ga_does_not_see_the_scale_of_the_loss() -> None:
    layer, g = place()
    eighth = layer._replace(triples=exact(g / 8, 6))
    for mine, theirs in zip(lora_ga(layer, Knobs()), lora_ga(eighth, Knobs()), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("gamma", [0.0, 32.0])
def test_lora_one_is_a_normalised_step_down_the_gradient(gamma: float) -> None:
    layer, g = place()
    a, b = lora_one(layer, Knobs(gamma=gamma))
    u, s, vh = vectors(g)
    wanted = -(u[:, :3] * s[:3]) @ vh[:3] / (s[0] * (gamma or 128))
    torch.testing.assert_close(b @ a, wanted)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_gradient_a_reads_the_leading_directions() -> None:
    layer, g = place()
    a, b = leading_a(layer, Knobs())
    same_columns(a.T, vectors(g)[2][:3].T)
    assert b.shape == (20, 3) and not bool(b.any())


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_starts_from_the_weight_are_pefts(name: str, rank: int) -> None:
    weight = torch.randn(20, 14)
    holder = nn.Sequential(nn.Linear(14, 20, bias=False))
    holder[0].weight.data = weight.clone()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights=name)  # type: ignore[arg-type]
    theirs: Any = next(iter(adapted(get_peft_model(holder, config)).values()))  # type: ignore[arg-type]
    a, b = {"pissa": pissa, "olora": olora}[name](Place(weight, None, rank, 2.0), Knobs())
    torch.testing.assert_close(b @ a, theirs.get_delta_weight("default").detach() / 2, rtol=0, atol=1e-5)
    same_columns(b, theirs.lora_B["default"].weight.detach())
    torch.testing.assert_close(weight - 2 * b @ a, theirs.get_base_layer().weight.detach(), rtol=0, atol=1e-5)


def test_corda_needs_no_inverse() -> None:
    """The paper's own formula, `B = U √S` and `A = √S Vᵀ C⁻¹`, in float64; and both factors of one size."""
    weight, x = torch.randn(20, 14, dtype=torch.float64), torch.randn(50, 14, dtype=torch.float64)
    moment = x.T @ x
    u, s, vh = vectors(weight @ moment)
    a, b = corda(Place(weight, exact(weight @ moment, 6), 3, 2.5), Knobs())
    torch.testing.assert_close(2.5 * b @ a, (u[:, :3] * s[:3]) @ vh[:3] @ torch.linalg.inv(moment))
    same_columns(b / b.norm(dim=0), u[:, :3])
    torch.testing.assert_close(b.norm(dim=0) / b.norm(dim=0)[0], (s[:3] / s[0]).sqrt())
    assert float(a.norm()) == pytest.approx(float(b.norm()))


def one_row(model: Any) -> dict[str, Tensor]:
    tokens = pico_inputs(model, batch=1, length=64, seed=4)["input_ids"]
    return {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_starts_from_inputs_are_pefts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model, from the same tokens: the directions of EVA, and the products of CorDA."""
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # PEFT wants a decorator of attrs, and does not require it
    from peft.tuners.lora.corda import preprocess_corda

    for init in ("eva", "corda"):
        model, theirs = pico_model(family), pico_model(family)
        names = sorted({port.name.rsplit(".", 1)[-1] for port in bind(model).linears})
        how: Any = {"eva": {"eva_config": EvaConfig(rho=1.0)}, "corda": {"corda_config": CordaConfig()}}[init]
        config = LoraConfig(r=3, lora_alpha=6, target_modules=names, init_lora_weights=init, **how)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if init == "corda":
                preprocess_corda(theirs, config, lambda to=theirs: to(**one_row(to)))
            wrapped: Any = get_peft_model(theirs, config)
            if init == "eva":
                initialize_lora_eva_weights(wrapped, [one_row(theirs)], show_progress_bar=False)
        sketch = sketch_targets(model, [one_row(model)], directions=40, of=INITS[init].of)
        mine: Any = add_lora(model, r=3, lora_alpha=6, init=init, gradients=sketch)
        for name, layer in adapted(mine).items():
            other = adapted(wrapped)[name]
            a, b = other.lora_A["default"].weight.detach(), other.lora_B["default"].weight.detach()
            if init == "eva":
                own = layer.lora_A["default"].weight.detach()
                assert float((own @ a.T).diagonal().abs().min()) > 0.95, name  # theirs is an iteration, cut short
                assert not bool(b.any()) and not bool(layer.lora_B["default"].weight.any())
            else:
                own = layer.lora_B["default"].live.detach() @ layer.lora_A["default"].live.detach()
                assert float((own - b @ a).norm()) < 2e-2 * float(own.norm()), name  # it inverts C in float32


def test_a_sketch_of_something_else_is_refused() -> None:
    model = pico_model("llama")
    for init, of, says in (("corda", "inputs", "starts from outputs"), ("lora-ga", "outputs", "starts from gradients")):
        sketch = sketch_targets(model, batches(model), directions=6, of=of)  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match=says):
            add_lora(model, r=3, init=init, gradients=sketch)
    with pytest.raises(RecipeError, match="does not look at gradients"):
        LoraOptions(init="corda", ranks="gradient")


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (8, 8)])
@pytest.mark.parametrize("rank", [3, 5, 8])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_rank_beyond_half_the_width_is_completed(shape: tuple[int, int], rank: int, direction: str) -> None:
    g = torch.randn(*shape, dtype=torch.float64)
    layer = Place(torch.randn(*shape, dtype=torch.float64), exact(g, 2 * rank), rank, 1.0)
    a, b = lora_ga(layer, Knobs(direction=direction, scale="unit"))
    torch.testing.assert_close(a @ a.T, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(b.T @ b, torch.eye(rank, dtype=torch.float64))


@each_started
def test_a_rank_beyond_the_width_has_its_shape_and_no_dead_pair(init: str) -> None:
    g, weight = torch.randn(6, 30), torch.randn(6, 30)
    make = INITS[init].factors
    assert make is not None
    a, b = make(Place(weight, exact(g, 18), 9, 1.0), Knobs())
    assert a.shape == (9, 30) and b.shape == (6, 9)
    assert bool(a.isfinite().all()) and bool(b.isfinite().all())
    assert bool(a.any(1).all())  # a row of A and a column of B that are both zero would never learn


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"direction": "ArB3r"}, "ArBr"),
        ({"scale": "stabel"}, "stable"),
        ({"target": 0.0}, "above 0"),
        ({"gamma": -1.0}, "above 0"),
    ],
)
def test_unknown_directions_and_scales_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Knobs(**wrong)
    with pytest.raises(RecipeError):
        slimtune.add_lora(pico_model("llama"), init="lora-ga", **{f"init_{key}": value for key, value in wrong.items()})


# On a model


def batches(model: Any) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(3):
        batch = dict(pico_inputs(model, seed=seed))
        batch["labels"] = batch.get("decoder_input_ids", batch["input_ids"]).clone()
        made.append(batch)
    return made


def started(init: str, family: str = "llama", **options: Any) -> tuple[Any, list[StartFact]]:
    model = options.pop("model", None) or pico_model(family)
    facts: list[StartFact] = []
    gradients = sketch_targets(model, batches(model), directions=16, of=INITS[init].of)
    return add_lora(model, init=init, gradients=gradients, facts=facts.extend, **{"r": 3, **options}), facts


def train_(model: nn.Module, steps: int = 3) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for batch in batches(model)[:steps]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@each_started
@pytest.mark.parametrize(("family", "use_rslora"), [("llama-biased", True), ("phi3", False), ("t5", False)])
def test_the_file_is_right_on_the_original_base(init: str, family: str, use_rslora: bool, tmp_path: Path) -> None:
    """In plain PEFT, after training: whatever the init, the base is not changed and the adapter is whole."""
    model, _ = started(init, family, use_rslora=use_rslora, lora_alpha=5)
    inputs = pico_inputs(model, seed=9)
    before, original = logits(model, inputs), logits(pico_model(family), inputs)
    if init != "lora-one":
        torch.testing.assert_close(before, original, rtol=0, atol=2e-5)
    train_(model)
    after = logits(model, inputs)
    assert not torch.allclose(after, before, atol=1e-3)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of transformers' newer names
        stock: Any = PeftModel.from_pretrained(pico_model(family), str(tmp_path))
    torch.testing.assert_close(logits(stock, inputs), after, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), original)
    torch.testing.assert_close(logits(merge(model), inputs), after, rtol=0, atol=5e-5)


@each_offset
def test_only_the_start_is_frozen_and_an_adapter_read_again_trains_as_before(init: str, tmp_path: Path) -> None:
    model, _ = started(init)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 28 and all(name.endswith(".live") for name in names)
    whole = {name: t.clone() for name, t in model.state_dict().items() if "lora_" in name}
    assert all(name.endswith("default.weight") and 6 in t.shape for name, t in whole.items())
    save_adapter(model, tmp_path)
    again = load_adapter(pico_model("llama"), tmp_path, trainable=True)
    train_(model)
    train_(again)
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(tensor, again.state_dict()[name]), name
            kept = tensor[3:] if "lora_A" in name else tensor[:, 3:]
            assert torch.equal(kept, whole[name][3:] if "lora_A" in name else whole[name][:, 3:]), name
            assert not torch.equal(tensor, whole[name])
    assert (tmp_path / LIVE).is_file()


def test_a_plain_adapter_has_no_note_and_a_wrong_note_is_refused(tmp_path: Path) -> None:
    save_adapter(started("gradient-a")[0], tmp_path)
    assert not (tmp_path / LIVE).exists()
    (tmp_path / LIVE).write_text('{"live_rank": {"model.nowhere": 2}}')
    with pytest.raises(slimtune.errors.FormatError, match="does not fit"):
        load_adapter(pico_model("llama"), tmp_path, trainable=True)


@each_offset
def test_a_second_adapter_stands_on_the_original_base(init: str) -> None:
    model, _ = started(init)
    inputs = pico_inputs(model, seed=9)
    train_(model)
    trained, original = logits(model, inputs), logits(pico_model("llama"), inputs)
    model.add_adapter("other", LoraConfig(r=2, target_modules=sorted(model.peft_config["default"].target_modules)))
    model.set_adapter("other")
    assert torch.equal(logits(model, inputs), original)  # a fresh one changes nothing
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, inputs), trained, rtol=0, atol=1e-6)
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad} == {"live"}
    model.delete_adapter("other")
    train_(model, 1)


@each_started
def test_a_quantized_base_starts_like_a_dense_one(init: str, tmp_path: Path) -> None:
    packed: Any = pico_model("llama")
    quantize_(packed, bind(packed), all_linear(Rtn(bits=4, group_size=12)))
    bare = copy.deepcopy(packed)
    model, facts = started(init, model=packed)
    inputs = pico_inputs(bare, seed=9)
    if init != "lora-one":
        torch.testing.assert_close(logits(model, inputs), logits(bare, inputs), rtol=0, atol=2e-5)
    assert len(facts) == 14 and all(fact.note == "" for fact in facts)
    train_(model)
    save_adapter(model, tmp_path)
    read = load_adapter(bare, tmp_path)
    torch.testing.assert_close(logits(read, inputs), logits(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["default", "lora-ga", "gradient-a"])
def test_what_quantization_lost_is_given_back_as_well(init: str) -> None:
    dense = pico_model("llama")
    packed: Any = slimtune.quantize(pico_model("llama"), "rtn", bits=2, group_size=12, residual_rank=64)
    model, _ = started(init, model=packed, r=32, keep_residual=True)
    inputs = pico_inputs(dense, seed=9)
    torch.testing.assert_close(logits(model, inputs), logits(dense, inputs), rtol=0, atol=2e-3)
    layer: Any = next(iter(adapted(model).values()))
    assert len(layer.lora_A["default"].weight) == 32 * (3 if init == "lora-ga" else 2)
    assert len(layer.lora_A["default"].live) == 32


def test_gradients_are_taken_where_training_will_start() -> None:
    """With the residual kept, at the weights with it: for a full rank, those of the dense model."""
    dense = pico_model("llama")
    packed: Any = slimtune.quantize(pico_model("llama"), "rtn", bits=2, group_size=12, residual_rank=64)
    wanted, with_it, without = (
        sketch_targets(model, batches(dense), directions=2, passes=4, keep_residual=kept)
        for model, kept in ((dense, False), (packed, True), (packed, False))
    )

    def likeness(found: Any) -> float:
        pairs = [(layer.triples.v, wanted.layers[name].triples.v) for name, layer in found.layers.items()]
        return sum(overlap(a, b) for a, b in pairs) / len(pairs)

    assert likeness(with_it) > 0.98 > likeness(without) + 0.05


def test_facts_say_what_was_done() -> None:
    _, facts = started("lora-ga", r=20)
    assert {fact.name for fact in facts} == {port.name for port in bind(pico_model("llama")).linears}
    assert all(fact.rank == 20 and fact.ratio == pytest.approx(0.2, rel=1e-3) for fact in facts)
    assert all("directions of 40: completed" in fact.note for fact in facts)
    assert all(0 < (fact.energy or 0) <= 1 and fact.overlap is not None for fact in facts)


def test_a_layer_without_a_gradient_starts_as_default() -> None:
    model = pico_model("llama")
    gradients = sketch_targets(model, batches(model), directions=8, target_modules=["q" + "_proj"])
    facts: list[StartFact] = []
    wrapped = add_lora(model, r=2, init="lora-ga", gradients=gradients, facts=facts.extend)
    noted = [fact.name for fact in facts if "no gradient" in fact.note]
    assert len(noted) == 12
    inputs = pico_inputs(model)
    torch.testing.assert_close(logits(wrapped, inputs), logits(pico_model("llama"), inputs), rtol=0, atol=1e-5)
    layer: Any = adapted(wrapped)[noted[0]]
    assert bool(layer.lora_A["default"].live.any()) and not bool(layer.lora_B["default"].live.any())


def test_gradients_are_asked_for() -> None:
    with pytest.raises(RecipeError, match="starts from gradients"):
        add_lora(pico_model("llama"), init="lora-ga")
    with pytest.raises(RecipeError, match="unknown init"):
        add_lora(pico_model("llama"), init="lora_ga")
    assert get_args(InitName) == tuple(INITS)


# Ranks


def test_ranks_keep_the_budget_and_capture_more() -> None:
    model = pico_model("llama")
    gradients = sketch_targets(model, batches(model), directions=8)
    cost = {port.name: port.in_features + port.out_features for port in bind(model).linears}
    ranks = allocate(gradients, 4, cost)
    budget, spent = 4 * sum(cost.values()), sum(ranks[name] * cost[name] for name in cost)
    assert budget - max(cost.values()) < spent <= budget
    assert set(ranks.values()) <= set(range(2, 9)) and len(set(ranks.values())) > 2

    def energy(chosen: dict[str, int]) -> float:
        return sum(float(layer.triples.s[: chosen[n]].square().sum()) for n, layer in gradients.layers.items())

    assert energy(ranks) > energy(dict.fromkeys(ranks, 4))


def test_eva_gives_ranks_to_the_layers_whose_inputs_vary_along_more() -> None:
    """The shares of variance are those of the whole spectra, taken by hand, whatever the size of a layer's inputs."""
    model: Any = pico_model("llama", num_hidden_layers=3)
    tokens = pico_inputs(model, batch=6, length=20)["input_ids"]
    ports = {port.name: port for port in bind(model).linears}
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        return lambda _, args: seen.update({name: args[0].flatten(0, 1).double()})

    for name in ports:
        model.get_submodule(name).register_forward_pre_hook(see(name))
    with torch.no_grad():
        model(input_ids=tokens)
    steps: list[tuple[float, int, str, int]] = []
    for name, x in seen.items():
        values = torch.linalg.svdvals(x - x.mean(0)).square()
        shares = (values / values.sum()).tolist()
        cost = ports[name].in_features + ports[name].out_features
        steps += [(shares[rank] / cost, cost, name, rank) for rank in range(2, 8)]
    budget = left = 2 * sum(port.in_features + port.out_features for port in ports.values())
    best = 0.0
    for each, cost, *_ in sorted(steps, reverse=True):
        if cost <= left:
            best, left = best + each * cost, left - cost
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"r": 4, "init": "eva", "ranks": "gradient", "tokens": tokens, "init_passes": 4}
    slimtune.add_lora(pico_model("llama", num_hidden_layers=3), facts=found.update, **options)
    taken = [(each * cost, cost) for each, cost, name, rank in steps if rank < found["ranks"][name]]
    assert sum(cost for _, cost in taken) <= budget and len(set(found["ranks"].values())) > 2
    assert sum(each for each, _ in taken) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("init", ["default", "lora-ga", "eva"])
def test_an_adapter_of_many_ranks_is_a_stock_one(init: str, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    tokens = pico_inputs(pico_model("llama"), batch=6, length=20)["input_ids"]
    model: Any = slimtune.add_lora(
        pico_model("llama"), r=3, init=init, ranks="gradient", tokens=tokens, use_rslora=True, facts=found.update
    )
    times = 2 if init == "lora-ga" else 1
    for name, layer in adapted(model).items():
        rank = found["ranks"][name]
        assert layer.r["default"] == times * rank
        assert layer.scaling["default"] == pytest.approx(32 / rank**0.5)
    assert len(set(found["ranks"].values())) > 1
    train_(model)
    save_adapter(model, tmp_path)
    inputs = pico_inputs(model, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock: Any = PeftModel.from_pretrained(pico_model("llama"), str(tmp_path))
    torch.testing.assert_close(logits(stock, inputs), logits(model, inputs), rtol=0, atol=1e-5)
    read = load_adapter(pico_model("llama"), tmp_path, trainable=True)
    assert sum(p.numel() for p in read.parameters() if p.requires_grad) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_options_refuse_what_makes_no_sense() -> None:
    for wrong in (
        {"init_tokens": 0},
        {"init_passes": 0},
        {"init_target": -1.0},
        {"init_gamma": -2.0},
        {"init_tolerance": -0.1},
    ):
        with pytest.raises(RecipeError, match="out of range"):
            LoraOptions(**wrong)
    with pytest.raises(RecipeError, match="sees no overlap"):
        LoraOptions(init_tolerance=0.1, init_passes=2)


@pytest.mark.parametrize(("tolerance", "batches"), [(0.0, 10), (1.0, 8)])
def test_looking_at_gradients_ends_when_the_overlap_is_stable(tolerance: float, batches: int) -> None:
    found: dict[str, Any] = {}
    tokens = pico_inputs(pico_model("llama"), batch=40, length=20)["input_ids"]
    model = pico_model("llama")
    slimtune.add_lora(model, init="lora-ga", r=2, tokens=tokens, init_tolerance=tolerance, facts=found.update)
    assert found["gradients"]["batches"] == batches  # of four rows each; the first look is after 4, the next after 8
    assert found["gradients"]["stable"] == (tolerance > 0)
    section = starts_section(0, found)
    assert ("the overlap was stable" in str(section)) == (tolerance > 0)


def test_less_data_than_asked_is_refused_and_the_model_left_alone() -> None:
    model: Any = pico_model("llama")
    tokens = pico_inputs(model, batch=6, length=20)["input_ids"]
    with pytest.raises(slimtune.errors.CalibrationError, match="shorter than") as caught:
        slimtune.add_lora(model, init="lora-ga", tokens=tokens, init_tokens=1000)
    assert "114" in str(caught.value).replace(",", "") or "120" in str(caught.value)
    assert not adapted(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(RecipeError, match="pass train="):
        slimtune.add_lora(model, init="lora-ga")


# Sketches in files


def sums(folder: Path) -> str:
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a} + 1?", "completion": f"{a + 1}."}) + "\n" for a in range(12)))
    return str(path)


def factors(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items()) and len(one) == len(other) > 0


@pytest.mark.parametrize("options", [{"init": "lora-ga"}, {"init": "lora-one"}, {"init": "eva"}, {"ranks": "gradient"}])
def test_a_file_gives_the_factors_that_gradients_give(options: dict[str, Any], tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    tokens = pico_inputs(pico_model("llama"), batch=6, length=20)["input_ids"]
    searched = {"tokens": tokens} if options.get("init") == "lora-one" else {}  # the size is searched on data
    file = str(tmp_path / "kept" / "sketch.safetensors")

    def start(**more: Any) -> dict[str, Tensor]:
        return factors(slimtune.add_lora(pico_model("llama"), r=3, facts=found.append, **options, **more))

    wanted = start(tokens=tokens)
    assert same(start(tokens=tokens, init_sketch=file), wanted)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["sketch.safetensors"]
    assert same(start(init_sketch=file, **searched), wanted)
    assert found[0] == found[1] == found[2]


def test_a_sketch_serves_other_inits_smaller_ranks_and_fewer_targets(tmp_path: Path, monkeypatch: Any) -> None:
    model, file = pico_model("llama"), tmp_path / "sketch.safetensors"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = slimtune.sketch(model, pico_tokenizer(), sums(tmp_path), r=4)
    assert same(dict(model.state_dict()), before) and whole.directions == 8 and not file.exists()
    whole.save(file)
    monkeypatch.setattr("slimtune.recipe.gradients.sketch_targets", lambda *_, **__: pytest.fail("looked again"))
    for options in ({"r": 2}, {"r": 8, "init": "lora-one", "init_gamma": 128}, {"r": 4, "ranks": "gradient"}):
        r, found = options["r"], {"init": "gradient-a", **options}
        got = adapted(slimtune.add_lora(pico_model("llama"), init_sketch=str(file), **found))
        for name, layer in got.items():
            v, rows = whole.layers[name].triples.v, layer.lora_A["default"].weight
            assert overlap(v[:, : len(rows)], torch.linalg.qr(rows.detach().T).Q) == pytest.approx(1, abs=1e-5), (
                name,
                r,
            )
    one = next(iter(whole.layers))
    narrow = slimtune.add_lora(pico_model("llama"), r=2, ranks="gradient", init_sketch=str(file), target_modules=one)
    assert narrow.get_submodule(f"base_model.model.{one}").r["default"] == 2  # the budget of one layer is its own


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"family": "llama-wide"}, "of another model"),
    "other names": ({"family": "opt"}, "lacks a layer"),
    "more directions": ({"r": 5}, "knows too few directions"),
    "ranks to choose from": ({"r": 4, "ranks": "gradient"}, "knows too few directions"),
    "inputs": ({"init": "eva"}, "of something else"),
    "no init for it": ({"init": "pissa"}, "looks at no sketch"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_sketch_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    """In memory, and in a recipe before its model is loaded."""
    options, says = MISFITS[case]
    options = {"init": "lora-ga", "r": 4, **options}
    file = tmp_path / "sketch.safetensors"
    slimtune.sketch(pico_model("llama"), tokens=pico_inputs(pico_model("llama"))["input_ids"], r=4).save(file)
    family = options.pop("family", "llama")
    wide = {"intermediate_size": 48} if family == "llama-wide" else {}
    model = pico_model(family.partition("-")[0], **wide)
    with pytest.raises(RecipeError, match=says):
        slimtune.add_lora(model, init_sketch=str(file), **options)
    assert not adapted(model)
    folder = save_pico(tmp_path / "base", family.partition("-")[0], **wide)
    with pytest.raises(RecipeError, match=says) as caught:
        slimtune.plan({"model": str(folder), "steps": [{"lora": {"init_sketch": str(file), **options}}]})
    assert "steps[0].lora" in caught.value.facts["where"]


def test_a_file_that_is_no_sketch_or_no_place_for_one_is_refused(tmp_path: Path) -> None:
    tokens = pico_inputs(pico_model("llama"))["input_ids"]
    (tmp_path / "note.txt").write_text("no sketch")
    with pytest.raises(slimtune.errors.FormatError, match="not a sketch"):
        slimtune.add_lora(pico_model("llama"), init="lora-ga", init_sketch=str(tmp_path / "note.txt"), tokens=tokens)
    for act in (slimtune.add_lora, slimtune.sketch):
        with pytest.raises(RecipeError, match="cannot be made"):
            act(pico_model("llama"), init="lora-ga", init_sketch=str(tmp_path / "note.txt" / "x"), tokens=tokens)
    with pytest.raises(RecipeError, match="looks at nothing"):
        slimtune.sketch(pico_model("llama"), tokens=tokens, init="pissa")
    assert tuple(name for name, init in INITS.items() if init.directions) == SKETCHING


def test_a_recipe_keeps_its_sketch_and_with_one_needs_no_data(tmp_path: Path, monkeypatch: Any) -> None:
    """Its file beside the recipe is found from any folder; `--overwrite` does not remove it from under the run."""
    model, rows = str(save_pico(tmp_path / "base")), sums(tmp_path)
    monkeypatch.setattr("slimtune.recipe.run.write_html", lambda _: None)
    lora = {"init": "lora-ga", "r": 2, "init_sketch": str(tmp_path / "sketch.safetensors")}
    recipe: dict[str, Any] = {"model": model, "data": {"train": rows}, "steps": [{"lora": lora}]}
    slimtune.run(recipe, tmp_path / "one")
    with pytest.raises(RecipeError, match="nothing to take gradients of"):
        slimtune.plan({"model": model, "steps": [{"lora": {**lora, "init_sketch": ""}}]})
    with pytest.raises(RecipeError, match="nothing to take gradients of"):
        slimtune.plan({"model": model, "steps": [{"lora": {**lora, "init": "lora-one"}}]})
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"model": model, "steps": [{"lora": {**lora, "init_sketch": "sketch.safetensors"}}]}))
    heard: list[str] = []
    slimtune.run(path, tmp_path / "two", say=heard.append)
    assert any("gradients from" in line for line in heard)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert same(one, two)
    inside = tmp_path / "two" / "sketch.safetensors"
    (tmp_path / "sketch.safetensors").rename(inside)
    recipe["steps"][0]["lora"] = {**lora, "init_sketch": str(inside)}
    with pytest.raises(RecipeError, match="reads from the run it would overwrite"):
        slimtune.run(recipe, tmp_path / "two", overwrite=True)
    assert inside.exists()


def test_a_sketch_of_another_basis_is_refused_and_one_that_is_not_needed_ignored() -> None:
    tokens = torch.randint(6, 260, (4, 16), generator=torch.Generator().manual_seed(0))
    model = pico_model()
    found = slimtune.sketch(model, tokens=tokens, init="lora-ga", r=2)
    with pytest.raises(RecipeError, match="the sketch is of another basis"):
        slimtune.add_lora(slimtune.rotate(pico_model()), init="lora-ga", r=2, gradients=found)
    slimtune.add_lora(model, r=2, gradients=found)


def test_a_sketch_of_a_pruned_model_serves_the_run_that_took_it(tmp_path: Path) -> None:
    """Scores may divide the cut among channels and heads otherwise than a plan does that knows none."""
    model = pico_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 50
    model.save_pretrained(tmp_path / "m")
    pico_tokenizer().save_pretrained(tmp_path / "m")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{a}?", "completion": "{a + 1}."}}\n' for a in range(8)))
    prune = {"ratio": 0.25, "targets": ["ffn", "kv"], "importance": "magnitude"}
    lora = {"init": "lora-ga", "r": 2, "init_sketch": str(tmp_path / "sketch.safetensors")}
    recipe = {"model": str(tmp_path / "m"), "data": {"train": str(rows)}, "steps": [{"prune": prune}, {"lora": lora}]}
    slimtune.run(recipe, tmp_path / "one")
    slimtune.run(recipe, tmp_path / "two")
