"""Which layer gets what from a quantize step, from the recipe to the finished model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import slimtune
from pico import logits, pico_inputs, pico_model, save_pico
from slimtune.arch import bind
from slimtune.calib.rows import BUILTINS
from slimtune.errors import FormatError, RecipeError
from slimtune.export import Source, export
from slimtune.quant.activation import Activations
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn
from slimtune.recipe.blocks import FolderStore
from slimtune.recipe.document import write_recipe
from slimtune.recipe.plan import plan, resolve
from slimtune.recipe.run import run
from slimtune.recipe.schema import Quantize, recipe_from, step_from, to_dict
from slimtune.recipe.shell import recipe_of
from slimtune.recipe.treatments import Treatments

MIXED: dict[str, Any] = {
    "method": "rtn",
    "bits": 4,
    "group_size": 8,
    "activations": {"bits": 4},
    "layers": {
        "*.mlp.*": {"bits": 6},
        "down_proj": {"activations": {"bits": 8}},
        "*.1.mlp.up_proj": {"group_size": 20},
    },
}


def step(**facts: Any) -> Quantize:
    made = step_from("quantize", {**MIXED, **facts}, "")
    assert isinstance(made, Quantize)
    return made


def test_later_patterns_have_the_last_word_and_the_rest_stays() -> None:
    treatments = Treatments(step())
    plain, down, up = (
        treatments.of(f"model.layers.1.{name}") for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj")
    )
    assert (plain.method, plain.activations) == (Rtn(4, 8), Activations(4))
    assert (down.method, down.activations) == (Rtn(6, 8), Activations(8))
    assert (up.method, up.activations) == (Rtn(6, 20), Activations(4))


def test_sixteen_bits_are_no_rounding_and_no_key_is_none_either() -> None:
    assert Treatments(step(layers={"q_proj": {"activations": {"bits": 16}}})).of("x.q_proj").activations is None
    assert Treatments(step(activations={}, layers={})).default.activations is None


@pytest.mark.parametrize(
    ("facts", "where"),
    [
        ({"activations": {"bit": 4}}, "quantize.activations"),
        ({"activations": {"bits": 1}}, "quantize.activations"),
        ({"layers": {"q_proj": {"bit": 4}}}, "layers['q_proj']"),
        ({"layers": {"q_proj": 4}}, "layers['q_proj']"),
        ({"layers": {"q_proj": {"activations": 4}}}, "layers['q_proj'].activations"),
        ({"layers": {"q_proj": {"activations": {"sym": 3}}}}, "layers['q_proj'].activations"),
    ],
)
def test_what_is_wrong_is_named(facts: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Treatments(step(**facts))
    assert where in str(caught.value)


def test_plain_values_and_back() -> None:
    assert step_from("quantize", to_dict(step())["quantize"], "") == step()


def recipe(model: Path | str, *steps: Any) -> Any:
    return recipe_from({"model": str(model), "data": {"train": {"builtin": "pydocs"}}, "steps": list(steps)})


def test_a_resolved_recipe_has_every_field_of_the_rounding(tmp_path: Path) -> None:
    made = resolve(recipe(save_pico(tmp_path), {"quantize": MIXED}))
    facts = yaml.safe_load(write_recipe(made))["steps"][0]["quantize"]
    assert facts["activations"]["clip_ratio"] == 1.0 and facts["layers"] == MIXED["layers"]
    assert resolve(recipe_from(yaml.safe_load(write_recipe(made)))) == made


def test_a_pattern_that_names_nothing_is_refused_by_the_plan(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no layer has such a name"):
        plan(recipe(save_pico(tmp_path), {"quantize": {**MIXED, "layers": {"gate": {"bits": 8}}}}))


def test_the_plan_counts_the_bits_of_each_layer(tmp_path: Path) -> None:
    model = save_pico(tmp_path)
    four, mixed = (
        plan(recipe(model, {"quantize": {**MIXED, "layers": layers}}, {"evaluate": {"speed": True}}))
        for layers in ({}, {"*.mlp.*": {"bits": 8}})
    )
    assert four.steps[1].memory_bytes < mixed.steps[1].memory_bytes


def test_data_is_asked_for_where_a_range_is_searched(tmp_path: Path) -> None:
    facts = {"model": str(save_pico(tmp_path)), "steps": [{"quantize": {**MIXED, "activations": {"search": True}}}]}
    with pytest.raises(RecipeError, match="calibration text"):
        plan(recipe_from(facts))


@pytest.mark.parametrize("format", ["safetensors", "gptq"])
def test_a_format_that_cannot_say_so_is_refused(format: str, tmp_path: Path) -> None:
    later = {"export": {"format": format}}
    with pytest.raises(RecipeError, match="inputs are rounded"):
        plan(recipe(save_pico(tmp_path / "pico"), {"quantize": MIXED}, later))
    model, tokenizer = slimtune.load(str(tmp_path / "pico"))
    slimtune.quantize(model, **MIXED)
    with pytest.raises(FormatError, match="inputs are rounded"):
        export(Source(model, tokenizer, "pico"), format, tmp_path / "out")


def test_python_takes_the_same(tmp_path: Path) -> None:
    model = pico_model()
    slimtune.quantize(model, **MIXED)
    treatments = Treatments(step())
    for port in bind(model).linears:
        layer = model.get_submodule(port.name)
        assert isinstance(layer, QuantLinear)
        assert layer.activations == treatments.of(port.name).activations
        assert layer.layout.bits == treatments.of(port.name).options["bits"]  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="no layer has such a name"):
        slimtune.quantize(pico_model(), "rtn", layers={"nothing": {}})


def test_a_run_says_what_it_did_and_leaves_a_model_that_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = BUILTINS["pydocs"]
    monkeypatch.setitem(BUILTINS, "pydocs", lambda split: rows(split)[:150])
    model = save_pico(tmp_path / "pico")
    facts = {**MIXED, "method": "optq", "activations": {"bits": 2, "search": True}, "kv_cache": {"bits": 4}}
    measured = {
        "evaluate": {"perplexity": {"pydocs": {"builtin": "pydocs", "split": "test"}}, "max_tokens": 200, "length": 50}
    }
    made = recipe_from(
        {
            "model": str(model),
            "data": {"calibration": {"builtin": "pydocs", "samples": 4, "length": 32}},
            "steps": [{"quantize": facts}, measured],
        }
    )
    report = run(made, tmp_path / "run")
    layers = {layer["name"]: layer for layer in report["steps"][0]["facts"]["layers"]}
    assert layers["model.layers.0.mlp.down_proj"]["activations"] == 8
    assert layers["model.layers.0.self_attn.q_proj"]["activations"] == 2
    assert min(layer["clip_ratio"] for layer in layers.values()) < 1
    assert config_of_run(tmp_path / "run")["kv_cache"] == {"bits": 4}
    assert "with inputs at 2" in (tmp_path / "run" / "report.html").read_text()
    assert {group["activations"]["bits"] for group in config_of_run(tmp_path / "run")["groups"]} == {2, 8}
    opened, tokenizer = slimtune.load(str(tmp_path / "run" / "model"))
    again = slimtune.evaluate(opened, tokenizer, **measured["evaluate"])
    assert again[0]["value"] == pytest.approx(report["metrics"][0]["value"], rel=1e-6)


def config_of_run(folder: Path) -> Any:
    return json.loads((folder / "model" / "config.json").read_text())["quantization_config"]


def test_a_kept_block_keeps_how_its_layers_round(tmp_path: Path) -> None:
    rounding = Activations(bits=4, clip_ratio=0.9)
    model, store = pico_model(), FolderStore(tmp_path)
    block = bind(model).blocks[0]
    options: dict[str, Any] = {"activations": lambda _: rounding, "store": store}
    quantize_(model, bind(model), all_linear(Rtn()), **options)
    kept = store.load(block)
    assert kept and all(layer.activations == rounding for layer in kept)
    again = pico_model()
    quantize_(again, bind(again), all_linear(Rtn()), activations=lambda _: None, store=store)
    assert torch.equal(logits(again, pico_inputs(again)), logits(model, pico_inputs(model)))


@pytest.mark.parametrize("method", ["quip", "trellis"])
def test_signs_take_the_recipes_seed_unless_they_have_their_own(method: str) -> None:
    def seeds(**facts: Any) -> tuple[int, Any]:
        top = {"model": "m", "seed": 5, "data": {"train": {"builtin": "pydocs"}}}
        [made] = resolve(recipe_from({**top, "steps": [{"quantize": {"method": method, **facts}}]})).steps
        assert isinstance(made, Quantize)
        return made.options["seed"], Treatments(made).of("a.q_proj").options["seed"]

    assert seeds() == seeds(seed=-1) == seeds(layers={"q_proj": {"seed": -1}}) == (5, 5)
    assert seeds(seed=7) == (7, 7)
    assert seeds(seed=0, layers={"q_proj": {"seed": -1}}) == (0, 5)
    assert seeds(layers={"q_proj": {"seed": 3}}) == (5, 3)


def test_python_hands_its_seed_on() -> None:
    def signs(**facts: Any) -> torch.Tensor:
        model, tokens = pico_model(), torch.arange(64).view(2, 32)
        slimtune.quantize(model, "quip", calibration=tokens, **facts)
        layer = model.get_submodule("model.layers.0.mlp.down_proj")
        assert isinstance(layer, QuantLinear)
        return layer.qtensor.tensors["sign_in"]

    assert torch.equal(signs(), signs(seed=0)) and not torch.equal(signs(seed=4), signs())


@pytest.mark.parametrize("method", ["quip", "trellis"])
def test_a_seed_from_the_shell_is_that_of_the_signs(method: str) -> None:
    made = recipe_of(
        "m", ("quantize",), ["--method", method, "--seed", "4", "--train", "{builtin: pydocs}"], "quantize"
    )
    [step] = resolve(made).steps
    assert isinstance(step, Quantize) and step.options["seed"] == made.seed == 4
    with pytest.raises(RecipeError) as caught:
        recipe_of("m", ("quantize",), ["--method", method, "--zzz", "4"], "quantize")
    names = str(caught.value.facts["remedy"]).removeprefix("use one of: ").split(", ")
    assert "seed" in names and len(names) == len(set(names))
