"""What a recipe will do and what it will take, from the model's configuration alone.

Nothing is loaded: the model is built on the `meta` device. The memory model below is what the steps hold at their peak,
term by term; `docs/LOG.md` has the measurements behind its constants.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import psutil
import torch

from slimtune.arch import ModelMap, Space, bind
from slimtune.calib.loss import CHUNK
from slimtune.calib.rows import DataSource
from slimtune.errors import RecipeError, SlimtuneError
from slimtune.evaluate.inference import require_positions
from slimtune.export import exporter_of
from slimtune.export.decilm import require_described
from slimtune.export.gguf_facts import Naming
from slimtune.export.gguf_widths import Widths
from slimtune.export.load import DTYPES, empty_model, model_config
from slimtune.export.vllm import require_names
from slimtune.kernels.precision import bfloat16_units
from slimtune.lora.start import parts
from slimtune.prune.collect import BATCH, GRADIENTS
from slimtune.prune.surgery import prune_
from slimtune.recipe.adapters import excess_rank, ports_of
from slimtune.recipe.gradients import require_sketch, sketch_file, wants_data, wants_residual
from slimtune.recipe.legality import State, check_order
from slimtune.recipe.packed import DECODING, check_later, check_packable, held, layers_of, start_of
from slimtune.recipe.pruning import biased, importance_of, needs_data, pending, rehearse
from slimtune.recipe.schema import Evaluate, Export, Lora, Prune, Quantize, Recipe, Rotate, Step, Train, to_dict
from slimtune.recipe.sources import check_sources
from slimtune.recipe.treatments import Treatments, check_patterns, whole_rows
from slimtune.train.optimizers import require_tools

NO_TEXT = "add data: {calibration: {builtin: pydocs}}, or a file (--calibration FILE)"
RUNTIME_BYTES = 90_000_000
"""What the matrix libraries set up at the first product, beyond what the imports take (measured)."""

ACTIVATIONS_PER_HIDDEN, ACTIVATIONS_PER_FFN = 19, 5
"""Floats a decoder block keeps for its backward pass per token: multiples of the hidden and of the FFN width."""

CALIBRATION_BATCH = 4
"""Windows that run through a block together."""

DEFAULT_SAMPLES = 128


@dataclass(frozen=True)
class StepPlan:
    """A step, the memory it needs at its peak (whole process, bytes) and its arithmetic (floating-point operations)."""

    step: str
    memory_bytes: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """A resolved recipe with what it takes."""

    recipe: Recipe
    parameters: int
    steps: tuple[StepPlan, ...]
    memory_bytes: int
    available_bytes: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json` and `report.json`."""
        return {
            "recipe": to_dict(self.recipe),
            "parameters": self.parameters,
            "steps": [asdict(step) for step in self.steps],
            "memory_bytes": self.memory_bytes,
            "available_bytes": self.available_bytes,
            "warnings": list(self.warnings),
        }


def calibration_source(recipe: Recipe) -> DataSource:
    """The text a quantizer looks at: `data.calibration`, or else the training data."""
    data = recipe.data
    if data.calibration is not None:
        return data.calibration
    assert data.train is not None, "resolve has checked it"
    return replace(data.train, samples=None)


def resolve(recipe: Recipe) -> Recipe:
    """The same recipe with every field of every method written out; its methods, formats and files exist."""
    steps: list[Step] = []
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Quantize):
            treatments = Treatments(step, f"steps[{number}].quantize")
            if treatments.need_data and recipe.data.calibration is None and recipe.data.train is None:
                raise RecipeError(
                    f"{step.method} needs calibration text",
                    where=f"steps[{number}].quantize",
                    remedy=f"{NO_TEXT}, or use method: rtn",
                )
            step = treatments.resolved(recipe.seed)
        if isinstance(step, Rotate) and step.seed == -1:
            step = replace(step, seed=recipe.seed)
        if isinstance(step, Prune):
            importance_of(step, f"steps[{number}].prune")
            if needs_data(step) and recipe.data.calibration is None and recipe.data.train is None:
                wants = "refit" if step.refit else "bias" if step.bias else ""
                got = f"{wants}: true" if wants else f"importance: {step.importance}"
                remedy = f"{NO_TEXT}, or " + (f"leave out {wants}" if wants else "use importance: magnitude")
                where = f"steps[{number}].prune"
                raise RecipeError("pruning needs calibration text", where=where, got=got, remedy=remedy)
        try:
            if isinstance(step, Export):
                exporter_of(step.format, step.quantization, step.rank)
            if isinstance(step, Train):
                require_tools(step)
        except SlimtuneError as error:
            raise error.within(f"steps[{number}].{step.name}") from error
        steps.append(step)
    return replace(recipe, steps=tuple(steps))


def plan(recipe: Recipe, *, memory: int | None = None) -> Plan:
    """Resolve `recipe`, refuse what cannot work, and estimate each step.

    `memory` is what the machine may use, in bytes; by default what is available now. Raises `RecipeError` as `resolve`
    does, and when a step does not fit the model: a perplexity of an encoder-decoder, a group size that divides nothing,
    a LoRA target that names nothing.
    """
    check_sources(recipe)
    recipe = resolve(recipe)
    config = model_config(recipe.model)
    states = check_order(recipe, start_of(config))
    model = empty_model(config, DTYPES[recipe.dtype])
    modelmap = bind(model)
    recipe, warnings = whole_rows(recipe, modelmap)
    check_later(layers_of(config, modelmap), recipe, -1, model, modelmap)
    shape = whole = replace(_Shape.of(model, modelmap, recipe), **held(config, modelmap))
    baseline = psutil.Process().memory_info().rss + RUNTIME_BYTES
    steps, adapted = [], None
    for number, (step, state) in enumerate(zip(recipe.steps, states, strict=True)):
        where = f"steps[{number}].{step.name}"
        if isinstance(step, Quantize):
            facts = _check_quantize(step, modelmap, where)
            lora = next((s for s in recipe.steps[number + 1 :] if isinstance(s, Lora)), None)
            weighed = recipe.data.calibration is not None and lora is not None and wants_residual(lora)
            shape = replace(shape, **facts | {"needs_data": facts["needs_data"] or weighed})
        if isinstance(step, Lora):
            ports = ports_of(step, model, modelmap)
            adapted = [p.name for p in ports]
            rank = step.r * parts(step.init, step.init_residual)
            shape = replace(shape, adapter=sum(rank * (p.in_features + p.out_features) for p in ports))
            warnings += excess_rank(step.r, ports, where)
            require_sketch(step, None if state.pruned else modelmap, where)  # what is cut, scores will say
        _check_fit(step, number, recipe, model, modelmap, where)
        taken, flops = shape.demand(step, state, recipe)
        if isinstance(step, Rotate) and shape.tied and step.folds:  # the head becomes a weight of its own
            shape = replace(shape, tied=False, parameters=shape.parameters + shape.vocabulary * shape.hidden)
        steps.append(StepPlan(step.name, baseline + taken, flops))
        cut = step if isinstance(step, Prune) else pending(recipe.steps, number) if isinstance(step, Train) else None
        if cut is not None:
            modelmap, _ = biased(model, cut, where)
            rehearsed = rehearse(cut, modelmap, where, adapted if step is cut else None)
            if step is not cut or not cut.ramped:
                prune_(model, modelmap, rehearsed)
                modelmap = bind(model)
                shape = shape.after(_Shape.of(model, modelmap, recipe))
    peak = max(step.memory_bytes for step in steps)
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    available = free if memory is None else memory
    warnings += [_too_much(recipe, steps, available)] if peak > available else []
    return Plan(recipe, whole.parameters, tuple(steps), peak, available, tuple(warnings))


def _check_fit(step: Step, number: int, recipe: Recipe, model: Any, modelmap: ModelMap, where: str) -> None:
    """Raise `RecipeError` where a step asks for what this model, or a later step, cannot have."""
    two_sided = model.config.is_encoder_decoder
    match step:
        case Evaluate() if step.perplexity and two_sided:
            raise RecipeError(
                "perplexity is a measure of decoders", where=where, got=f"{modelmap.family} is an encoder-decoder"
            )
        case Evaluate() if step.perplexity:
            require_positions(model, step.length, f"{where}.length")
        case Train() if step.packing and two_sided:
            raise RecipeError(
                "an encoder-decoder does not train on packed rows", where=where, remedy="leave out packing: true"
            )
        case Train() if step.distill_top_k > modelmap.sizes[Space.VOCAB]:
            wanted = f"at most the vocabulary, {modelmap.sizes[Space.VOCAB]:,}"
            raise RecipeError(
                "the teacher has fewer logits", where=f"{where}.distill_top_k", got=step.distill_top_k, wanted=wanted
            )
        case Export(format="gguf" | "gguf-deci" | "gguf-lora"):
            Naming(model, Widths() if step.format == "gguf-deci" else None).require_computed()
        case Export(format="decilm"):
            require_described(model)
        case Export(format="vllm"):
            require_names(model)
        case Quantize():
            check_packable(step, recipe, number, model, modelmap)


def _check_quantize(step: Quantize, modelmap: ModelMap, where: str) -> dict[str, Any]:
    treatments = Treatments(step, where)
    check_patterns(step, modelmap, where)
    ports = {p: treatments.of(p.name) for p in modelmap.ports if not isinstance(treatments.choose(p), str)}
    if not ports:
        raise RecipeError("there is nothing left to quantize", where=f"{where}.ignore", got=list(step.ignore))
    groups = {port: treatment.group for port, treatment in ports.items()}
    if all(0 < group < port.in_features and port.in_features % group for port, group in groups.items()):
        widths = sorted({port.in_features for port in ports})
        divisors = [g for g in (32, 64, 128, 256) if all(w % g == 0 for w in widths)]
        raise RecipeError(
            "the group size divides no layer's width",
            where=f"{where}.group_size",
            got=treatments.default.group,
            wanted=f"a divisor of {', '.join(map(str, widths))}",
            remedy=f"use {' or '.join(map(str, divisors)) or '-1 (whole rows)'}",
        )
    sizes = {port: port.in_features * port.out_features for port in ports}
    stored = {treatment: treatment.stored_bits() for treatment in set(ports.values())}
    bits = sum(stored[ports[port]] * size for port, size in sizes.items()) / sum(sizes.values())
    tags = {treatment.sample().layout.tag for treatment in stored}
    decoding = max(DECODING.get(tag, 0) for tag in tags)
    return {"bits": bits, "needs_data": treatments.need_data, "decoding": decoding}


@dataclass(frozen=True)
class _Shape:
    """The sizes that decide memory and arithmetic."""

    hidden: int
    ffn: int
    vocabulary: int
    blocks: int
    parameters: int
    weights: int  # of the linears in the blocks
    largest: int  # weights of the largest linear
    widest: int  # its input width
    dense_bytes: int  # per dense parameter
    tied: bool
    bits: float = 16
    whole_logits: bool = False  # the loss of most models never holds more than a chunk of them
    needs_data: bool = False
    decoding: int = 0  # bytes a weight of the layer that is decoded, where more than twice the result
    adapter: int = 0

    @classmethod
    def of(cls, model: torch.nn.Module, modelmap: ModelMap, recipe: Recipe) -> _Shape:
        ports, config = modelmap.linears, cast(Any, model).config
        return cls(
            hidden=modelmap.sizes[Space.RESIDUAL],
            ffn=max(max(p.in_features, p.out_features) for p in ports),
            vocabulary=modelmap.sizes[Space.VOCAB],
            blocks=len(modelmap.blocks),
            parameters=sum(p.numel() for p in model.parameters()),
            weights=sum(p.in_features * p.out_features for p in ports),
            largest=max(p.in_features * p.out_features for p in ports),
            widest=max(p.in_features for p in ports),
            dense_bytes=DTYPES[recipe.dtype].itemsize,
            tied=any(p.tied_to is not None for p in modelmap.ports),
            whole_logits=bool(config.is_encoder_decoder or getattr(config, "final_logit_softcapping", None)),
        )

    def after(self, smaller: _Shape) -> _Shape:
        """This shape when the model has become `smaller`."""
        adapter = self.adapter * smaller.weights // self.weights
        return replace(smaller, bits=self.bits, needs_data=self.needs_data, adapter=adapter)

    def resident(self, quantized: bool) -> int:
        """Bytes of the model itself between steps."""
        rest = (self.parameters - self.weights) * self.dense_bytes
        return rest + int(self.weights * (self.bits / 8 if quantized else self.dense_bytes)) + 4 * self.adapter

    def demand(self, step: object, state: State, recipe: Recipe) -> tuple[int, int]:
        """Bytes beyond the process's baseline at the peak of `step`, and its floating-point operations."""
        match step:
            case Prune():
                return self._prune(step, state, recipe)
            case Quantize():
                return self._quantize(recipe, whole=recipe.steps[0] is not step)
            case Train():
                return self._train(step, state, recipe)
            case Evaluate():
                logits = step.length * self.vocabulary * 4
                work = self.resident(state.quantized) + 2 * logits + self._block(step.length, 4)
                tokens = step.max_tokens if step.max_tokens > 0 else 0
                return work + 4 * self.largest, 2 * self.parameters * tokens * len(step.perplexity)
            case Lora() if wants_data(step, sketch_file(step)):
                later = (s for s in recipe.steps[recipe.steps.index(step) :] if isinstance(s, Train))
                train = next(later, Train())
                sums = 4 * 8 * self.adapter  # two sketches, each a few times as wide as the adapter
                batch = replace(train, max_steps=max(1, step.init_passes * abs(step.init_tokens) // train.max_length))
                held, flops = self._train(batch, State(state.quantized, adapter=True), recipe)
                return held + sums, flops
            case Lora():
                return self.resident(state.quantized), 0
            case Rotate():
                head = self.vocabulary * self.hidden * self.dense_bytes if self.tied and step.folds else 0
                probe = 3 * 128 * self.vocabulary * 8  # logits before and after, compared in float64
                held = self.resident(False)
                if step.stream:  # what stands outside the blocks, and one block
                    held -= (self.weights - self.weights // max(self.blocks, 1)) * self.dense_bytes
                return held + head + max(24 * self.largest, probe), 0
        return self.resident(False) + 4 * self.largest, 0

    def _quantize(self, recipe: Recipe, *, whole: bool) -> tuple[int, int]:
        rest = (self.parameters - self.weights) * self.dense_bytes
        # Packed layers replace what an earlier step has loaded; a first step never loads more than one dense block.
        packed = self.weights * self.dense_bytes if whole else int(self.weights * self.bits / 8)
        block = self.weights // max(self.blocks, 1) * self.dense_bytes
        if not self.needs_data:
            return rest + packed + block + 12 * self.largest, 0
        source = calibration_source(recipe)
        samples, length = source.samples or DEFAULT_SAMPLES, source.length
        tokens = samples * length
        # The hidden states of all tokens at the door of a block, and after the part of it that is settled.
        width = 2 if bfloat16_units(torch.device("cpu")) else self.dense_bytes
        cached = 2 * tokens * self.hidden * width
        batch = min(samples, CALIBRATION_BATCH) * length
        inside = max(self._block(batch, self.dense_bytes), self.widest**2 * 8 * 4)
        flops = tokens * (2 * 2 * self.weights + self.blocks * (3 * self.hidden**2 + self.ffn**2))
        return rest + packed + block + cached + inside, flops

    def _prune(self, step: Prune, state: State, recipe: Recipe) -> tuple[int, int]:
        held = self.resident(state.quantized) + 8 * self.largest
        if step.ramped or not needs_data(step):
            return held, 0
        source = calibration_source(recipe)
        tokens = (source.samples or DEFAULT_SAMPLES) * source.length
        needs = importance_of(step).needs
        backward = bool(GRADIENTS & needs)
        batch = BATCH * source.length
        work = self._block(batch, self.dense_bytes) * (self.blocks if backward else 1)
        work += (3 if backward else 1) * batch * self.vocabulary * 4
        if step.refit or step.bias:
            work = max(work, 2 * tokens * self.hidden * self.dense_bytes + self.widest**2 * 8 * 4)
        whole = {"layers", "sublayers"} & set(step.targets)
        passes = self.blocks * (2 if whole else self.ffn) if "loss_change" in needs else 1
        return held + work, passes * tokens * self.parameters * (4 if backward else 2) * (
            2 if step.refit or step.bias else 1
        )

    def _train(self, step: Train, state: State, recipe: Recipe) -> tuple[int, int]:
        tokens = step.per_device_train_batch_size * step.max_length
        trained = self.adapter if state.adapter else self.parameters
        width = 2 if step.bf16 else self.dense_bytes
        kept = self._block(tokens, width) * (1 if step.gradient_checkpointing else self.blocks)
        if step.gradient_checkpointing:
            kept += self.blocks * tokens * self.hidden * width
        rows = tokens if self.whole_logits else min(tokens, CHUNK)
        copies = 3  # and where whole logits are compared with a teacher's, those of its and of what is learnt
        if step.distill and self.whole_logits:
            copies = 6 if step.distill_top_k else 8
        logits = copies * rows * self.vocabulary * 4
        optimizer = trained * (4 + 8)
        if step.optim == "lora-pro":  # moments of whole weights, and a step of the largest
            optimizer += 8 * self.weights + 16 * self.largest
        passes = (6 if step.gradient_checkpointing else 4) + 2 * step.distill
        workspace = max(2 * width, self.decoding) * self.largest if state.quantized else 0
        workspace += max(step.max_steps, 1) * step.gradient_accumulation_steps * tokens * step.distill_top_k * 12
        if state.quantized:
            workspace += min(step.keep_decoded * 10**6, width * self.weights)
        if step.scales:  # a weight's gradient, and for each scale a factor, its gradient and moments
            workspace += 4 * self.largest + self.weights // 64 * 16
        flops = (
            max(step.max_steps, 1)
            * step.gradient_accumulation_steps
            * tokens
            * (passes * self.parameters + 6 * trained)
        )
        return self.resident(state.quantized) + kept + logits + optimizer + workspace, flops

    def _block(self, tokens: int, width: int) -> int:
        return tokens * width * (ACTIVATIONS_PER_HIDDEN * self.hidden + ACTIVATIONS_PER_FFN * self.ffn)


def _too_much(recipe: Recipe, steps: list[StepPlan], available: int) -> str:
    worst = max(steps, key=lambda step: step.memory_bytes)
    knobs = {
        "train": "lower per_device_train_batch_size or max_length, or set gradient_checkpointing: true",
        "quantize": "lower data.calibration.samples",
        "evaluate": "lower length",
    }
    if worst.step == "train" and any(isinstance(s, Train) and s.gradient_checkpointing for s in recipe.steps):
        knobs["train"] = "lower per_device_train_batch_size or max_length"
    return (
        f"the {worst.step} step needs about {worst.memory_bytes / 1e9:.1f} GB, of {available / 1e9:.1f} GB available: "
        + knobs.get(worst.step, "use dtype: bfloat16, or a smaller model")
    )
