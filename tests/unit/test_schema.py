"""What a recipe may say: every misspelling named, every value checked, plain values and back."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.calib.rows import DataSource
from slimtune.errors import CalibrationError, RecipeError, SlimtuneError
from slimtune.recipe.schema import Evaluate, Lora, Quantize, Rotate, Train, build, recipe_from, step_from, to_dict

SPEED = {"evaluate": {"speed": True}}


def facts_with(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "steps": [SPEED], **changes}


@pytest.mark.parametrize(
    ("facts", "where", "remedy"),
    [
        (facts_with(sed=1), "the recipe", "'seed'"),
        (facts_with(data={"trian": "x"}), "data", "'train'"),
        (facts_with(data={"train": {"paht": "x"}}), "data.train", "'path'"),
        (facts_with(steps=["quantise"]), "steps[0]", "'quantize'"),
        (facts_with(steps=[SPEED, {"lora": {"lora_alhpa": 1}}]), "steps[1].lora", "'lora_alpha'"),
        (facts_with(steps=[{"train": {"learning-rate": 1}}]), "steps[0].train", "'learning_rate'"),
        (facts_with(steps=[{"evaluate": {"perplexty": {}}}]), "steps[0].evaluate", "'perplexity'"),
        (
            facts_with(steps=[{"evaluate": {"perplexity": {"w": {"bultin": "pydocs"}}}}]),
            "steps[0].evaluate.perplexity.w",
            "'builtin'",
        ),
        (facts_with(steps=[{"export": {"fromat": "peft"}}]), "steps[0].export", "'format'"),
        (facts_with(zzz=1), "the recipe", "use one of: data, dtype, model, name, seed, steps"),
    ],
)
def test_an_unknown_name_is_told_with_its_place_and_the_nearest_valid_one(
    facts: dict[str, Any], where: str, remedy: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from(facts)
    assert caught.value.facts["where"] == where
    assert remedy in caught.value.facts["remedy"]


@pytest.mark.parametrize(
    ("facts", "where", "got", "wanted"),
    [
        (facts_with(seed="many"), "seed", "'many'", "integer"),
        (facts_with(seed=True), "seed", "True", "integer"),
        (facts_with(seed=1.5), "seed", "1.5", "integer"),
        (facts_with(model=3), "model", "3", "string"),
        (facts_with(dtype="float33"), "dtype", "'float33'", "'float32', 'bfloat16' or 'float16'"),
        (facts_with(steps=[{"lora": {"r": True}}]), "steps[0].lora.r", "True", "integer"),
        (facts_with(steps=[{"lora": {"target_modules": 3}}]), "steps[0].lora.target_modules", "3", "string or a list"),
        (facts_with(steps=[{"train": {"learning_rate": "fast"}}]), "steps[0].train.learning_rate", "'fast'", "number"),
        (facts_with(steps=[{"train": {"packing": "perhaps"}}]), "steps[0].train.packing", "'perhaps'", "boolean"),
        (facts_with(steps=[{"evaluate": {"tasks": 3}}]), "steps[0].evaluate.tasks", "3", "a list"),
    ],
)
def test_a_wrong_type_names_the_key_the_value_and_what_was_wanted(
    facts: dict[str, Any], where: str, got: str, wanted: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from(facts)
    assert (caught.value.facts["where"], caught.value.facts["got"]) == (where, got)
    assert wanted in caught.value.facts["wanted"]


@pytest.mark.parametrize(
    ("step", "field", "value"),
    [
        ("train", "learning_rate", 0),
        ("train", "learning_rate", float("nan")),
        ("train", "save_steps", 0),
        ("train", "max_steps", 0),
        ("train", "max_steps", -2),
        ("train", "max_length", 1),
        ("train", "warmup_ratio", 1),
        ("train", "weight_decay", -0.1),
        ("train", "max_grad_norm", float("inf")),
        ("evaluate", "length", 1),
        ("evaluate", "max_tokens", 0),
        ("evaluate", "limit", -2),
        ("evaluate", "num_fewshot", -2),
        ("rotate", "seed", -2),
        ("rotate", "steps", 0),
        ("lora", "r", 0),
        ("lora", "lora_alpha", 0),
        ("lora", "lora_alpha", float("nan")),
        ("lora", "lora_alpha", float("inf")),
        ("merge", "tolerance", float("inf")),
        ("prune", "warmup", float("nan")),
        ("prune", "cooldown", float("nan")),
        ("lora", "lora_dropout", 1),
    ],
)
def test_a_value_out_of_range_names_its_step(step: str, field: str, value: float) -> None:
    with pytest.raises(RecipeError, match=rf"{field} out of range\n  where:  steps\[0\]\.{step}.*\n  got:    {value}"):
        recipe_from(facts_with(steps=[{step: {field: value}}]))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_cannot_take_is_refused(seed: int) -> None:
    with pytest.raises(RecipeError, match="seed out of range"):
        recipe_from(facts_with(seed=seed))


@pytest.mark.parametrize("steps", [None, [], 3, "quantize", {"quantize": {}}])
def test_steps_are_a_list_with_something_in_it(steps: object) -> None:
    with pytest.raises(RecipeError, match="the recipe has no steps"):
        recipe_from({"model": "m", "steps": steps})


@pytest.mark.parametrize("step", [3, {}, {"quantize": {}, "lora": {}}, {"lora": 3}, {"lora": []}, {1: 2}, [["lora"]]])
def test_a_step_is_one_name_with_keys_and_values(step: object) -> None:
    with pytest.raises(RecipeError, match=r"steps\[1\]"):
        recipe_from(facts_with(steps=[SPEED, step]))


@pytest.mark.parametrize("facts", [None, 3, "text", [1]])
def test_a_recipe_is_a_mapping(facts: object) -> None:
    with pytest.raises(RecipeError, match="expected keys and values"):
        recipe_from(facts)


def test_a_recipe_without_a_model_says_so() -> None:
    with pytest.raises(RecipeError, match=r"a key is missing(.|\n)*wanted: model"):
        recipe_from({"steps": [SPEED]})


def test_a_data_source_is_named_by_its_key() -> None:
    with pytest.raises(RecipeError, match=r"either a path or a built-in(.|\n)*data\.eval"):
        recipe_from(facts_with(data={"eval": {"path": "x", "builtin": "pydocs"}}))
    with pytest.raises(CalibrationError, match=r"data\.train\n(.|\n)*did you mean 'pydocs'"):
        recipe_from(facts_with(data={"train": {"builtin": "pydoc"}}))


def test_values_are_coerced_where_nothing_is_lost() -> None:
    recipe = recipe_from(
        facts_with(
            seed="3",
            data={"train": "a.jsonl"},
            steps=[
                "merge",
                {"lora": None},
                {"train": {"learning_rate": "1e-4", "max_steps": 5.0}},
                {"evaluate": {"perplexity": {"w": "w.txt"}, "tasks": "arc_easy"}},
                {"quantize": {"ignore": "lm_head", "bits": 3}},
            ],
        )
    )
    _, lora, train, evaluate, quantize = recipe.steps
    assert recipe.seed == 3
    assert recipe.data.train == DataSource(path="a.jsonl")
    assert lora == Lora()
    assert isinstance(train, Train) and (train.learning_rate, train.max_steps) == (1e-4, 5)
    assert isinstance(train.max_steps, int)
    assert isinstance(evaluate, Evaluate) and evaluate.tasks == ("arc_easy",)
    assert evaluate.perplexity == {"w": DataSource(path="w.txt")}
    assert quantize == Quantize(ignore=("lm_head",), options={"bits": 3})


def test_an_error_of_a_dataclass_keeps_its_class_and_gains_its_place() -> None:
    with pytest.raises(SlimtuneError) as caught:
        step_from("lora", {"r": -1}, "")
    assert type(caught.value) is RecipeError
    assert caught.value.facts["where"] == "lora"


positive = st.integers(1, 1000)
texts = st.text("abcdefgh-_./", min_size=1, max_size=12)
sources = st.one_of(
    st.builds(DataSource, path=texts, samples=st.none() | positive, length=st.integers(2, 4096)),
    st.builds(DataSource, builtin=st.just("pydocs"), split=st.sampled_from(["train", "test"])),
)
steps = st.one_of(
    st.builds(Quantize, method=texts, ignore=st.tuples(texts), options=st.fixed_dictionaries({"bits": positive})),
    st.builds(Rotate, kind=st.sampled_from(["hadamard", "orthogonal"]), online=st.sampled_from([(), ("r4",)])),
    st.builds(Lora, r=positive, lora_alpha=st.floats(0.1, 99), target_modules=texts | st.tuples(texts, texts)),
    st.builds(Train, max_steps=positive, learning_rate=st.floats(1e-9, 1e3), packing=st.booleans()),
    st.builds(Evaluate, perplexity=st.dictionaries(texts, sources, max_size=2), tasks=st.tuples(texts)),
)


@given(steps)
def test_a_step_survives_plain_values(step: Any) -> None:
    ((name, values),) = to_dict(step).items()
    assert step_from(name, values, "") == step


@given(st.dictionaries(texts, st.integers() | st.text() | st.none() | st.lists(st.integers()), max_size=4))
def test_whatever_the_keys_the_answer_is_a_value_or_one_of_our_errors(values: dict[str, Any]) -> None:
    for cls in (Train, Lora, Evaluate, DataSource):
        with suppress(SlimtuneError):
            assert isinstance(build(cls, values, "place"), cls)
