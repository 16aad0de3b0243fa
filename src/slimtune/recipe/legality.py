"""Which orders of steps can work. A refused recipe says why before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slimtune.errors import RecipeError
from slimtune.lora.inits import INITS
from slimtune.recipe.schema import Evaluate, Export, Lora, Merge, Quantize, Recipe, Step, Train


@dataclass(frozen=True)
class State:
    """What is known of the model between two steps."""

    quantized: bool = False
    adapter: bool = False
    residual: bool = False  # whether it is known what quantization lost
    rounded: bool = False  # whether linears round their inputs
    cache: bool = False  # whether attention rounds keys and values


def check_order(recipe: Recipe, start: State = State()) -> list[State]:
    """The state before each step. Raises `RecipeError` at the first step that cannot work where it stands."""
    states, state = [], start
    for number, step in enumerate(recipe.steps):
        states.append(state)
        reason = _objection(step, state, recipe)
        if reason:
            what, remedy = reason
            raise RecipeError(what, where=f"steps[{number}].{step.name}", remedy=remedy)
        state = _after(step, state)
    return states


def _objection(step: Step, state: State, recipe: Recipe) -> tuple[str, str] | None:
    match step:
        case Quantize() if state.quantized:
            return "the model is quantized already", "keep one quantize step, or merge: {} before the second"
        case Quantize() if state.adapter:
            return "a model with an adapter cannot be quantized", "put merge: {} before quantize, or quantize first"
        case Lora() if state.adapter:
            return "the model has an adapter already", "put merge: {} before the second lora step"
        case Lora() if INITS[step.init].start is not None and not state.residual:
            return "nothing is known of what quantization lost", "put a quantize step before it, in this recipe"
        case Train() if recipe.data.train is None:
            return "there is nothing to train on", "add data: {train: {path: FILE}}"
        case Train() if state.quantized and not state.adapter:
            return "packed weights do not train", "put a lora step before train"
        case Train() if step.fake_quant is not None and not state.adapter:
            return "fake_quant rounds what an adapter trains", "put a lora step before train"
        case Merge() if not state.adapter:
            return "there is no adapter to merge", "put merge after lora and train"
        case Export(format="peft") if not state.adapter:
            return "there is no adapter to export", "put export: {format: peft} after lora, before merge"
        case Export(format="compressed-tensors" | "gptq") if not state.quantized:
            return "there are no packed weights to export", "put a quantize step before, or export safetensors"
        case Export(format="gptq" | "safetensors" | "compressed-tensors") if state.cache:
            return "this format cannot say that the cache is rounded", "use the model folder"
        case Export(format="gptq" | "safetensors") if state.rounded:
            return (
                "this format cannot say that inputs are rounded",
                "export compressed-tensors, or use the model folder",
            )
        case Evaluate() if not (step.perplexity or step.tasks or step.speed):
            return "evaluate has nothing to measure", "give it perplexity, tasks or speed: true"
    return None


def _after(step: Step, state: State) -> State:
    match step:
        case Quantize():
            rounded = bool(step.activations or any("activations" in fields for fields in step.layers.values()))
            return replace(state, quantized=True, residual=True, rounded=rounded, cache=bool(step.kv_cache))
        case Lora():
            return replace(state, adapter=True)
        case Merge():
            return State()
    return state
