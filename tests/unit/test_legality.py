"""Which orders of steps are accepted, and that every other one is refused with its reason."""

from dataclasses import replace
from typing import Any

import pytest

from slimtune.errors import RecipeError
from slimtune.recipe.legality import State, check_order
from slimtune.recipe.schema import Recipe, recipe_from

DATA = {"train": {"path": "a.jsonl"}}
SPEED = {"evaluate": {"speed": True}}
R4 = {"rotate": {"online": ["r4"]}}
RESIDUAL = {"lora": {"init": "residual"}}
GA, BOTH = ({"lora": {"init": "lora-ga", "init_residual": kept}} for kept in (False, True))
PADDED, RAMPED = (
    {"prune": {"widths": "allocated", "schedule": s, "importance": "gate"}} for s in ("one-shot", "cubic")
)
QUERIES = {"lora": {"target_modules": ["q_proj"]}}
NARROW = ({"export": {"format": "decilm"}}, {"export": {"format": "gguf-deci"}})
PEFT, PACKED, DENSE = ({"export": {"format": f}} for f in ("peft", "compressed-tensors", "safetensors"))
ADAPTER = {"export": {"format": "gguf-lora"}}


def recipe(*steps: Any, data: dict[str, Any] = DATA) -> Recipe:
    return recipe_from({"model": "m", "data": data, "steps": list(steps)})


@pytest.mark.parametrize(
    "steps",
    [
        (SPEED,),
        ("train",),
        ("train", "quantize"),
        ("quantize", "lora", "train", SPEED, PEFT),
        ("lora", "train", "merge", "quantize", PACKED),
        ({"quantize": {"activations": {"bits": 8}}}, PACKED, "lora", "train", "merge", DENSE),
        ("quantize", PACKED, "lora", "train", PEFT, "merge", DENSE),
        ("quantize", "lora", "train", "merge", "quantize", "lora", "train", PEFT),
        ("lora", "train", "train", PEFT),
        ("quantize", SPEED, RESIDUAL, "train", PEFT),
        ("lora", "train", "merge", "train"),
        (GA, "train", PEFT),
        ("quantize", BOTH, "train", PEFT),
        (DENSE,),
        ("rotate", "quantize", "lora", "train", PEFT, PACKED),
        (R4, "lora", "train", PEFT),
        ("lora", "train", "merge", "rotate", "quantize"),
        ("lora", "train", "merge", PADDED, *NARROW),
        ("lora", RAMPED, "train", *NARROW),
        (PADDED, QUERIES, "train", *NARROW),
        (PADDED, "lora", "train", "merge", PADDED, *NARROW),
        (QUERIES, PADDED, "train", *NARROW),
        (PADDED, "lora", "train", DENSE),
        ("train", "lora", "train", PEFT, ADAPTER, SPEED),
        ("lora", "train", PEFT, ADAPTER, "merge", "lora", "train", PEFT, "train"),
        ("rotate", "lora", "train", PEFT, "merge", DENSE),
        ("rotate", "prune", "quantize", "lora", "train"),
        ("rotate", "lora", RAMPED, "train", "merge", *NARROW),
        ("prune", R4, "quantize"),
        (R4, {"prune": {"targets": ["kv"]}}, {"prune": {"targets": ["layers"]}}),
        (R4, {"prune": {"targets": ["sublayers"], "widths": "allocated"}}),
        ({"rotate": {"online": ["heads", "r3"]}}, {"prune": {"targets": ["ffn"]}}),
    ],
)
def test_an_order_that_can_work_is_accepted(steps: tuple[Any, ...]) -> None:
    assert len(check_order(recipe(*steps))) == len(steps)


@pytest.mark.parametrize(
    ("steps", "where", "what", "remedy"),
    [
        ((PADDED, "lora", "train", NARROW[0]), "steps[3].export", "woke the units", "schedule: cubic"),
        ((PADDED, "train", NARROW[1]), "steps[2].export", "woke the units", "schedule: cubic"),
        (("lora", RAMPED, "train", "train", NARROW[0]), "steps[4].export", "woke the units", "safetensors"),
        (
            ("prune", "lora", ADAPTER),
            "steps[2].export",
            "fits the pruned model alone",
            "merge: {} before, and export gguf",
        ),
        (("lora", RAMPED, "train", ADAPTER), "steps[3].export", "fits the pruned model alone", "export gguf"),
        (("train", "lora", PEFT, "merge"), "steps[2].export", "which a later step changes", "export safetensors"),
        (("lora", "merge", "lora", PEFT, "prune"), "steps[3].export", "which a later step changes", "merge: {}"),
        (("rotate", "lora", "merge", "lora", PEFT), "steps[4].export", "rotated basis alone", "export safetensors"),
        (("rotate", "train", "lora", ADAPTER), "steps[3].export", "rotated basis alone", "export gguf"),
        (
            ({"lora": {"r": 4}}, {"export": {"format": "peft", "rank": 5}}),
            "steps[1].export",
            "rank 5 is above the adapter's, 4",
            "leave out rank",
        ),
        (
            ({"lora": {"r": 4, "init": "lora-ga"}}, {"export": {"format": "gguf-lora", "rank": 9}}),
            "steps[1].export",
            "rank 9 is above the adapter's, 8",
            "leave out rank",
        ),
        (("quantize", "quantize"), "steps[1].quantize", "quantized already", "merge"),
        (("lora", "quantize"), "steps[1].quantize", "with an adapter cannot be quantized", "merge: {} before quantize"),
        ((RESIDUAL,), "steps[0].lora", "what quantization lost", "a quantize step before"),
        ((BOTH,), "steps[0].lora", "what quantization lost", "a quantize step before"),
        (
            ("quantize", {"lora": {"init": "residual", "init_residual": True}}),
            "steps[1].lora",
            "lost already",
            "leave out",
        ),
        (("quantize", "lora", "merge", RESIDUAL), "steps[3].lora", "what quantization lost", "a quantize step before"),
        (("lora", SPEED, "lora"), "steps[2].lora", "has an adapter already", "merge"),
        (("quantize", "train"), "steps[1].train", "packed weights do not train", "lora step before"),
        (("merge",), "steps[0].merge", "no adapter to merge", "after lora"),
        (("quantize", "lora", "train", "merge", "merge"), "steps[4].merge", "no adapter to merge", "after lora"),
        ((PEFT,), "steps[0].export", "no adapter to export", "after lora"),
        (("lora", "train", "merge", PEFT), "steps[3].export", "no adapter to export", "before merge"),
        ((PACKED,), "steps[0].export", "no packed weights", "quantize step before"),
        (("quantize", "lora", "train", "merge", PACKED), "steps[4].export", "no packed weights", "quantize"),
        (({"quantize": {"activations": {"bits": 8}}}, DENSE), "steps[1].export", "inputs are rounded", "model folder"),
        (({"quantize": {"kv_cache": {"bits": 8}}}, PACKED), "steps[1].export", "cache is rounded", "model folder"),
        (("evaluate",), "steps[0].evaluate", "nothing to measure", "speed: true"),
        (("rotate", SPEED, "rotate"), "steps[2].rotate", "rotated already", "adds nothing"),
        (("rotate", "lora", "merge", "rotate"), "steps[3].rotate", "rotated already", "one rotate step"),
        (("quantize", "rotate"), "steps[1].rotate", "packed weights cannot be rotated", "before quantize"),
        (("lora", "rotate"), "steps[1].rotate", "with an adapter cannot be rotated", "before lora"),
        ((R4, "prune"), "steps[1].prune", "r4 mixes all channels", "leave ffn out of targets"),
        ((R4, "lora", RAMPED, "train"), "steps[2].prune", "r4 mixes all channels", "rotate without r4"),
        (({"rotate": {"online": ["heads"]}}, "prune"), "steps[1].prune", "heads mixes all heads", "put prune before"),
        ((R4, "quantize", PACKED), "steps[2].export", "no other engine runs the online transform r4", "online: []"),
        ((R4, "lora", "merge", DENSE), "steps[3].export", "no other engine runs", "the run's own model folder"),
    ],
)
def test_an_order_that_cannot_work_is_refused_with_the_reason(
    steps: tuple[Any, ...], where: str, what: str, remedy: str
) -> None:
    with pytest.raises(RecipeError, match=what) as caught:
        check_order(recipe(*steps))
    assert caught.value.facts["where"] == where
    assert remedy in caught.value.facts["remedy"]


def test_training_without_data_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to train on"):
        check_order(recipe("lora", "train", data={}))


@pytest.mark.parametrize(
    ("step", "of"),
    [
        (GA, "gradients"),
        ({"lora": {"ranks": "gradient"}}, "gradients"),
        ({"lora": {"init": "gradient-a"}}, "gradients"),
        ({"lora": {"init": "eva"}}, "inputs"),
        ({"lora": {"init": "corda"}}, "outputs"),
    ],
)
def test_gradients_of_nothing_are_refused(step: dict[str, Any], of: str) -> None:
    with pytest.raises(RecipeError, match=f"nothing to take {of} of"):
        check_order(recipe(step, data={}))


def test_an_adapter_leaves_online_transforms_on_its_way_out() -> None:
    check_order(recipe(R4, "lora", PEFT, {"export": {"format": "gguf-lora", "rank": 4}}))


def test_the_state_is_the_one_before_each_step() -> None:
    states = check_order(recipe("quantize", "lora", "merge", SPEED))
    packed = State(quantized=True, residual=True)
    assert states == [State(), packed, replace(packed, adapter=True, rank=16), State(changed=True, rank=16)]


def test_a_model_that_is_rotated_to_begin_with_is_not_rotated_again() -> None:
    with pytest.raises(RecipeError, match="rotated already"):
        check_order(recipe("rotate"), State(rotated=True))
    with pytest.raises(RecipeError, match="no other engine"):
        check_order(recipe(DENSE), State(rotated=True, online=("heads",)))


def test_a_model_that_is_quantized_to_begin_with_is_not_quantized_again() -> None:
    assert check_order(recipe(PACKED), State(quantized=True)) == [State(quantized=True)]
    with pytest.raises(RecipeError, match="quantized already"):
        check_order(recipe("quantize"), State(quantized=True))
    with pytest.raises(RecipeError, match="what quantization lost"):
        check_order(recipe(RESIDUAL), State(quantized=True))
