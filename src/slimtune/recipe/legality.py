"""Which orders of steps can work. A refused recipe says why before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from slimtune.errors import RecipeError
from slimtune.export import ADAPTERS
from slimtune.hub import cache_bits
from slimtune.lora.attach import base_of, has_adapter, plain
from slimtune.lora.inits import INITS, WORDS
from slimtune.lora.pooled import NO_GROUPS
from slimtune.lora.start import parts
from slimtune.quant.blackbox import FROZEN
from slimtune.quant.linear import QuantLinear
from slimtune.recipe.gradients import sketch_file, wants_data
from slimtune.recipe.schema import Evaluate, Export, Lora, Merge, Prune, Quantize, Recipe, Rotate, Step, Train
from slimtune.recipe.treatments import Treatments
from slimtune.rotate.options import FOLDED
from slimtune.rotate.record import rotation_of

DENSE = ("decilm", "gguf", "gguf-deci", "safetensors")
"""Formats of the whole model that know no rounding of inputs."""

NO_ROWS = "add data: {train: {path: FILE}}, or --train FILE"
HEADS = "heads", "all heads of an attention"
MIXED = {"ffn": ("r4", "all channels of a feed-forward layer"), "kv": HEADS, "heads": HEADS}
"""Units that an online transform mixes. R1 and R2 mix none: a channel is a row and a column in any basis of the stream,
and R2 stays inside a head. Layers, and all of a sub-layer, go in any basis."""

NOTE = "slimtune_past"
"""The attribute of a model in memory that says what was done to it and cannot be seen."""


@dataclass(frozen=True)
class State:
    """What is known of the model between two steps."""

    quantized: bool = False
    adapter: bool = False
    rotated: bool = False
    online: tuple[str, ...] = ()  # those that other engines would have to run
    leaves: bool = False  # whether an engine does
    residual: bool = False  # whether it is known what quantization lost
    pruned: bool = False  # whether units were cut off the base
    changed: bool = False  # whether the base was trained, or took an adapter in
    ramp: bool = False  # whether the next train step prunes
    rounded: bool = False  # whether linears round their inputs
    cache: bool = False  # whether attention rounds keys and values
    zeros: bool = False  # whether zeros stand for pruned units
    woken: bool = False  # whether those have been trained
    narrow: bool = False  # whether the last adapter is on some linears alone
    rank: int = 0  # the rank of its files, where that is known
    pooled: bool = False  # whether it goes into zero points, where the bits are kept
    fractions: bool = False  # whether zero points are known to be no whole numbers

    @property
    def own(self) -> bool:
        """Whether an adapter's base is no longer the original model, but the one that these steps made."""
        return self.pruned or self.changed


def check_order(recipe: Recipe, start: State = State()) -> list[State]:
    """The state before each step. Raises `RecipeError` at the first step that cannot work where it stands."""
    states, state = [], start
    for number, step in enumerate(recipe.steps):
        states.append(state)
        later, train = recipe.steps[number + 1 :], recipe.data.train is not None
        require(step, state, first=number == 0, later=later, train=train, where=f"steps[{number}].{step.name}")
        state = _after(step, state)
    return states


def require(
    step: Step, state: State, *, first: bool = True, later: Sequence[Step] = (), train: bool = True, where: str = ""
) -> None:
    """Raise `RecipeError` where `step` cannot work on a model in `state`: as the first or not, with or without training
    data, and with `later` steps after it."""
    reason = _objection(step, state, first, train) or _pruning(step, state, later) or _leaving(step, state, later)
    if reason:
        what, remedy = reason
        raise RecipeError(what, where=where or step.name, remedy=remedy)


def after(steps: Sequence[Step], state: State = State()) -> State:
    """What is known of a model in `state` when `steps` have been done."""
    for step in steps:
        state = _after(step, state)
    return state


def dtype_after(recipe: Recipe, done: int) -> str:
    """The dtype of dense weights after the first `done` steps: the recipe's, or the last merge's."""
    merges = [step for step in recipe.steps[:done] if isinstance(step, Merge)]
    return (merges[-1].dtype if merges else "") or recipe.dtype


def state_of(model: nn.Module, known: State = State()) -> State:
    """What is known of `model`: what can be seen of it, and of its past what `known` says, or a note of `note_`."""
    base, basis = base_of(model), rotation_of(model)
    packed = [module for module in plain(model).values() if isinstance(module, FROZEN)]
    ours = [module for module in packed if isinstance(module, QuantLinear)]
    return replace(
        known,
        quantized=bool(packed),
        adapter=has_adapter(model),
        rotated=basis is not None,
        online=tuple(name for name in basis.rotation.online if name in FOLDED) if basis is not None else (),
        leaves=basis is not None and basis.rotation.leaves,
        residual=any(layer.start is not None for layer in ours),
        rounded=any(layer.activations is not None for layer in ours),
        cache=cache_bits(base) < 16,
        **base.__dict__.get(NOTE, {}),
    )


def note_(model: nn.Module, *steps: Step) -> None:
    """Note on `model` what `steps` did to it that cannot be seen: with that it is no longer what it was loaded as."""
    state, base = after(steps, state_of(model)), base_of(model)
    base.__dict__[NOTE] = {"pruned": state.pruned, "changed": state.changed}


def _objection(step: Step, state: State, first: bool, train: bool) -> tuple[str, str] | None:
    match step:
        case Rotate() if state.rotated:
            return "the model is rotated already", "keep one rotate step: a second rotation adds nothing"
        case Rotate(stream=True) if not first:
            return "only a model that is in a folder streams", "put rotate first, or leave out stream"
        case Rotate() if state.quantized:
            return "packed weights cannot be rotated", "put rotate before quantize"
        case Rotate() if state.adapter:
            return "a model with an adapter cannot be rotated", "put rotate before lora, or merge: {} before rotate"
        case Quantize() if state.quantized:
            return "the model is quantized already", "keep one quantize step, or merge: {} before the second"
        case Quantize() if state.adapter:
            return "a model with an adapter cannot be quantized", "put merge: {} before quantize, or quantize first"
        case Lora() if state.adapter:
            return "the model has an adapter already", "put merge: {} before the second lora step"
        case Lora() if (INITS[step.init].start is not None or step.init_residual) and not state.residual:
            return "nothing is known of what quantization lost", "put a quantize step before it, in this recipe"
        case Lora() if INITS[step.init].start is not None and step.init_residual:
            return "this init gives back what quantization lost already", "leave out init_residual: true"
        case Lora(pooled=True) if not state.quantized:
            return NO_GROUPS
        case Lora() if wants_data(step, sketch_file(step)) and not train:
            return (
                f"there is nothing to take {WORDS[INITS[step.init].of]} of",
                "add data: {train: {path: FILE}}, or --train FILE",
            )
        case Train() if not train:
            return "there is nothing to train on", NO_ROWS
        case Train(scales=True) if not state.quantized:
            return "there are no scales to train", "put a quantize step before, or leave out scales"
        case Train() if state.quantized and not state.adapter:
            return "packed weights do not train", "put a lora step before train"
        case Train() if step.fake_quant is not None and not state.adapter:
            return "fake_quant rounds what an adapter trains", "put a lora step before train"
        case Merge() if not state.adapter:
            return "there is no adapter to merge", "put merge after lora and train"
        case Merge(keep_bits=True) if not state.quantized:
            return "there are no packed weights to merge into", "leave out keep_bits, or quantize before lora"
        case Export():
            return _no_way_out(step, state)
        case Evaluate() if not (step.sources or step.tasks or step.speed):
            return "evaluate has nothing to measure", "give it perplexity, accuracy, rouge, tasks or speed: true"
    return None


def _no_way_out(step: Export, state: State) -> tuple[str, str] | None:
    """What stands against an export of the model as it is."""
    match step.format:
        case _ if step.format in ADAPTERS and not state.adapter:
            return "there is no adapter to export", f"put export: {{format: {step.format}}} after lora, before merge"
        case _ if step.rank > state.rank > 0:
            return f"rank {step.rank} is above the adapter's, {state.rank}", "leave out rank: it is written whole"
        case "compressed-tensors" | "gptq" | "vllm" if not state.quantized:
            return "there are no packed weights to export", "put a quantize step before, or export safetensors"
        case "compressed-tensors" | "gptq" | "vllm" if state.fractions:
            return (
                "zero points are no whole numbers, which this format needs: a pooled adapter, or hqq, leaves such",
                "export before merge, or safetensors, or use the model folder",
            )
        case "vllm" if not state.leaves:
            return (
                "vllm runs one kind of online transform, r4 in blocks, and the model has none or others",
                "rotate with online: [r4] and block_size: 128"
                + ("" if state.online else ", or export compressed-tensors"),
            )
        case "vllm" if state.adapter:
            return "vllm gives an adapter other inputs than it was trained on", "merge it with keep_bits first"
        case _ if state.online and step.format in ("compressed-tensors", "gptq", *DENSE):
            return (
                f"no other engine runs the online transform {', '.join(state.online)}: it would load another model",
                "rotate with online: [], or keep the run's own model folder; r4 in blocks can leave as vllm",
            )
        case _ if state.cache and step.format in ("compressed-tensors", "gptq", "vllm", *DENSE):
            return "this format cannot say that the cache is rounded", "use the model folder"
        case _ if state.rounded and step.format in ("gptq", *DENSE):
            return (
                "this format cannot say that inputs are rounded",
                "export compressed-tensors, or use the model folder",
            )
    return None


def _pruning(step: Step, state: State, later: Sequence[Step]) -> tuple[str, str] | None:
    """What stands against pruning here, or against `step` because of it."""
    if state.ramp and not isinstance(step, Train | Evaluate):
        return "the model is to be pruned by the next train step", "put train right after a prune step with a ramp"
    match step:
        case Prune() if mixed := [name for name in step.targets if name in MIXED and MIXED[name][0] in state.online]:
            transform, units = MIXED[mixed[0]]
            return (
                f"the online transform {transform} mixes {units}: none can go alone",
                f"put prune before rotate, rotate without {transform}, or leave {mixed[0]} out of targets",
            )
        case Prune() if step.importance.startswith("lora") and not state.adapter:
            return "this importance looks at an adapter's gradients", "put a lora step before prune"
        case Prune() if step.ramped and not state.adapter:
            return "a model is pruned along the training of an adapter", "put a lora step before prune"
        case Prune() if step.ramped and not any(isinstance(s, Train) for s in later):
            return "there is no training to prune along", "put a train step after it, or use schedule: one-shot"
        case Prune() if (step.refit or step.bias) and (state.quantized or (state.adapter and not step.ramped)):
            held = "packed weights" if state.quantized else "weights under an adapter"
            return f"{held} cannot be fitted", "put prune before quantize and lora, or leave out refit and bias"
        case Prune() if step.widths == "allocated" and state.quantized:
            return "packed weights cannot be padded with zeros", "use widths: uniform, or put prune before quantize"
        case Train(scales=True) if state.ramp:
            return (
                "the cut would lose the scales that were trained before it",
                "leave out scales, or prune at once (schedule: one-shot) before train",
            )
        case Train() if step.distill and not state.ramp:
            return "there is no unpruned model to learn from", "put a prune step with schedule: cubic before train"
        case Export(format="decilm" | "gguf-deci") if state.woken:
            return (
                "training woke the units that pruning had padded with zeros: none is left to leave out",
                "prune along the training (schedule: cubic), or after it; or export safetensors",
            )
    return None


def _leaving(step: Step, state: State, later: Sequence[Step]) -> tuple[str, str] | None:
    """What stands against giving away the adapter alone, because of the model that it is for."""
    if not isinstance(step, Export) or step.format not in ADAPTERS or not state.own:
        return None
    whole = f"put merge: {{}} before, and export {'safetensors' if step.format == 'peft' else 'gguf'}"
    if state.pruned:
        return "the adapter fits the pruned model alone", whole
    if state.rotated:
        return "the adapter's base was trained or merged, and is kept in its rotated basis alone", whole
    if any(isinstance(s, Prune | Merge) or (isinstance(s, Train) and s.scales) for s in later):
        return "the adapter's base is the run's own model, which a later step changes", f"{whole}; or end here"
    return None


def _after(step: Step, state: State) -> State:
    match step:
        case Rotate():
            online = tuple(name for name in step.online if name in FOLDED)
            return replace(state, rotated=True, online=online, leaves=step.leaves)
        case Prune():
            zeros = state.zeros or step.widths == "allocated"
            woken = state.woken and step.widths != "allocated"  # it pads anew; a ramp does so once all is trained
            return replace(state, ramp=step.ramped, pruned=state.pruned or not step.ramped, zeros=zeros, woken=woken)
        case Train():
            woken = state.woken or (state.zeros and not state.ramp and not (state.adapter and state.narrow))
            changed = state.changed or not state.adapter
            return replace(state, ramp=False, pruned=state.pruned or state.ramp, changed=changed, woken=woken)
        case Quantize():
            treatments = Treatments(step)
            rounded = any(treatment.activations is not None for treatment in treatments.all)
            return replace(state, quantized=True, residual=True, rounded=rounded, cache=treatments.cache.bits < 16)
        case Lora():
            rank = step.r * parts(step.init, step.init_residual) if step.ranks == "uniform" else 0
            narrow = step.target_modules != "all-linear"
            return replace(state, adapter=True, narrow=narrow, rank=rank, pooled=step.pooled)
        case Merge(keep_bits=True):
            fractions = state.fractions or state.pooled
            return replace(state, adapter=False, residual=False, changed=True, fractions=fractions)
        case Merge():
            state = replace(state, quantized=False, rounded=False, cache=False, fractions=False)
            return replace(state, adapter=False, residual=False, changed=True)
    return state
