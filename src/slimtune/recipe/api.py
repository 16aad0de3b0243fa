"""The Python face of slimtune: what a recipe can do, these functions can, on a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimtune.arch import bind
from slimtune.calib.data import calibration_tokens
from slimtune.calib.gradients import Batch, GradientSketch
from slimtune.calib.rows import DataSource as DataSource
from slimtune.calib.rows import read_rows
from slimtune.errors import RecipeError, ShapeError, nearest
from slimtune.evaluate.inference import require_vocabulary
from slimtune.export import ADAPTERS, Manifest, Source, require_free
from slimtune.export import export as write_export
from slimtune.export.load import DTYPES, Loaded
from slimtune.export.load import load as load_model
from slimtune.export.peft import rotate_adapter as turn_adapter
from slimtune.export.stream import rotate_folder as write_rotated
from slimtune.hub import round_cache_
from slimtune.lora.attach import base_of, quantized
from slimtune.lora.inits import INITS, WORDS, residual
from slimtune.lora.merge import merge as merge_adapter
from slimtune.lora.options import LoraOptions
from slimtune.quant.apply import QuantizeFacts, quantize_
from slimtune.recipe import schema
from slimtune.recipe.document import amount, read_recipe
from slimtune.recipe.gradients import (
    attach_adapter,
    gradient_batches,
    gradients_of,
    require_sketch,
    searches,
    sketch_file,
    wants_gradients,
    wants_residual,
)
from slimtune.recipe.legality import State, after, note_, require, state_of
from slimtune.recipe.merging import merge_low_bit
from slimtune.recipe.plan import DEFAULT_SAMPLES, Plan
from slimtune.recipe.plan import plan as make_plan
from slimtune.recipe.pruning import importance_of, prune_now, rehearse
from slimtune.recipe.run import run as run_recipe
from slimtune.recipe.schema import Lora, Quantize, Recipe, Step, build, recipe_from, step_from
from slimtune.recipe.steps import LEARNED_WINDOWS, Session, run_step
from slimtune.recipe.training import examples_of, train_now, within_positions
from slimtune.recipe.treatments import Treatments, check_patterns
from slimtune.rotate.fuse import RotateFacts, rotate_
from slimtune.rotate.online import attach_online_
from slimtune.rotate.options import Rotation
from slimtune.rotate.record import JSON as ROTATION
from slimtune.train.data import Collator, Example, padding_id
from slimtune.train.loop import TrainFacts
from slimtune.train.options import TrainOptions

Text = DataSource | str | Path | Mapping[str, Any]
"""A data source: a file, or the fields of one."""

Calibration = Text | Tensor | None


def load(model: str | Path, dtype: str | torch.dtype = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, by hub id, folder, `.gguf` file or bundled name."""
    loaded = load_model(str(model), dtype=_named_dtype(dtype))
    return loaded.model, loaded.tokenizer


def rotate(
    model: nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration = None,
    facts: Callable[[RotateFacts], None] = lambda _: None,
    **options: Any,
) -> nn.Module:
    """`model` (changed in place) in another basis, with the same outputs; `options` are the fields of `rotate`.

    `calibration`, as in `quantize`, is what a learned rotation learns from, and one that balances.
    """
    rotation = build(Rotation, options, "rotate")
    _require(schema.Rotate(), model)
    tokens = _windows(model, calibration, tokenizer, LEARNED_WINDOWS, rotation.seed)
    facts(rotate_(model, bind(base_of(model)), rotation, tokens=tokens))
    return model


def rotate_folder(
    model: str,
    output: str | Path,
    *,
    dtype: str = "float32",
    calibration: Calibration = None,
    overwrite: bool = False,
    **options: Any,
) -> RotateFacts:
    """`rotate` from the folder `model` to the folder `output`, with one block of weights in memory. Where `overwrite`,
    the folder of a rotated model is replaced; any other that is not empty is refused."""
    require_free(Path(output), model, overwrite, mark=ROTATION)
    rotation, loaded = build(Rotation, options, "rotate"), load_model(model, dtype=dtype, lazy=True)
    _require(schema.Rotate(), loaded.model)
    tokens = _windows(loaded.model, calibration, loaded.tokenizer, LEARNED_WINDOWS, rotation.seed)
    return write_rotated(loaded, Path(output), rotation, tokens=tokens)


def rotate_adapter(model: nn.Module, adapter: str | Path, output: str | Path, *, overwrite: bool = False) -> None:
    """The PEFT adapter in the folder `adapter`, trained on the original model, for the rotated `model`: written to the
    folder `output`, where it does what it did there. The way back is `export(model, tokenizer, "peft", output)`.

    Raises `RecipeError` where `model` is not rotated, or `output` is taken (`overwrite` replaces what this wrote
    before), `FormatError` where the adapter does not fit or is a rotated model's already.

    Example:
        >>> import slimtune, tempfile
        >>> from peft import PeftModel
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = slimtune.add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=4, **shape)), r=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/mine")
        ...     rotated = slimtune.rotate(model.unload())
        ...     slimtune.rotate_adapter(rotated, f"{folder}/mine", f"{folder}/turned")
        ...     PeftModel.from_pretrained(rotated, f"{folder}/turned").peft_config["default"].r
        2
    """
    require_free(Path(output), str(adapter), overwrite, mark=ROTATION)
    turn_adapter(model, Path(adapter), Path(output))


def quantize(
    model: nn.Module,
    method: str = "optq",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration = None,
    ignore: str | Sequence[str] = (),
    activations: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    kv_cache: Mapping[str, Any] | None = None,
    seed: int = 0,
    residual_rank: int = 0,
    facts: Callable[[QuantizeFacts], None] = lambda _: None,
    **options: Any,
) -> nn.Module:
    """`model` (changed in place) with the linears of its blocks quantized by `method`, whose fields are `options`.

    `activations`, as `{"bits": 8}`, rounds their inputs; `layers` has other fields for some of them, by name or
    pattern: `{"*.layers.0.*": {"bits": 8}}`. `kv_cache`, as `{"bits": 8}`, rounds keys and values. `calibration` is
    token windows `[samples, length]`, or a data source or file (then `tokenizer` is needed). `seed` is of the windows,
    and of a method's random signs where its own is -1. With a `residual_rank`, `add_lora(model, init="residual")` may
    follow, up to that `r`. `facts` is called with what was done to each layer.
    """
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    step = Quantize(method, ignored, dict(activations or {}), dict(layers or {}), dict(kv_cache or {}), options)
    _require(step, model)
    step = Treatments(step, method).resolved(seed)
    treatments, modelmap = Treatments(step, method), bind(model)
    check_patterns(step, modelmap, method)
    if step.kv_cache:
        round_cache_(cast(PreTrainedModel, model), treatments.cache.bits)
    tokens = _windows(model, calibration, tokenizer, DEFAULT_SAMPLES, seed)
    start = (lambda weight, base, stats: residual(weight, base, residual_rank, stats)) if residual_rank > 0 else None
    rounds = treatments.rounds
    facts(quantize_(model, modelmap, treatments.choose, activations=rounds, tokens=tokens, start=start))
    attach_online_(model)
    return model


def prune(
    model: nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration = None,
    seed: int = 0,
    facts: Callable[[dict[str, Any]], None] = lambda _: None,
    **options: Any,
) -> nn.Module:
    """`model` (changed in place) with fewer channels, heads or layers; `options` are the fields of the recipe's `prune`
    step, which acts at once here.

    `calibration` and `tokenizer` are those of `quantize`. `facts` is called with what was cut.
    """
    chosen = build(schema.Prune, options, "prune")
    if chosen.ramped:
        got, remedy = chosen.schedule, "use slimtune.finetune(..., prune=...), or one-shot"
        raise RecipeError("a ramp acts along training", where="prune.schedule", got=got, remedy=remedy)
    _require(chosen, model)
    facts(prune_now(model, chosen, _windows(model, calibration, tokenizer, DEFAULT_SAMPLES, seed), seed=seed))
    note_(model, chosen)
    return model


def add_lora(
    model: nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train: DataSource | str | None = None,
    tokens: Tensor | None = None,
    gradients: GradientSketch | None = None,
    seed: int = 0,
    base_name: str = "",
    facts: Callable[[dict[str, Any]], None] = lambda _: None,
    **options: Any,
) -> nn.Module:
    """`model` in a `PeftModel` with fresh factors; `options` are the fields of the recipe's `lora` step.

    Where factors start from gradients (or inputs, or outputs), those are of `train` (rows, for which `tokenizer` is
    needed), of `tokens` `[samples, length]`, or of a sketch (`gradients`, or the file `init_sketch`). `facts` is called
    with how each layer started.
    """
    chosen = build(Lora, options, "lora")
    _require(chosen, model)
    _check_starts(model, chosen)
    batches: list[Batch] = []
    file = sketch_file(chosen)
    known = gradients is not None or (file is not None and file.exists())
    if wants_gradients(chosen) and (not known or (searches(chosen) and not (tokens is None and train is None))):
        batches = _batches(model, chosen, tokenizer, train, tokens, seed)
    if wants_gradients(chosen) and gradients is None:
        gradients = gradients_of(model, batches, chosen, seed=seed, file=file)
    wrapped, found = attach_adapter(model, chosen, gradients, batches, base_name=base_name, seed=seed)
    facts(found)
    return wrapped


def sketch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train: DataSource | str | None = None,
    *,
    tokens: Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> GradientSketch:
    """The gradients of `model` (left as it is) on `train` or `tokens`, as `add_lora` takes them; `options` are the
    fields of the recipe's `lora` step, with `init: lora-ga`.

    It serves `add_lora(..., gradients=...)`, and saved (`save(path)`) `lora: {init_sketch: path}`: every init that
    looks at the same, any `r` up to this one and the targets among these. Raises `RecipeError` for an init that looks
    at nothing.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> found = sketch(model, tokens=torch.arange(40).view(4, 10), r=2)
        >>> found.of, found.directions, found.tokens
        ('gradient', 4, 36)
    """
    chosen = build(Lora, {"init": "lora-ga", **options}, "lora")
    if not wants_gradients(chosen):
        raise RecipeError("this init looks at nothing", where="lora.init", got=chosen.init, remedy="leave it out")
    file = sketch_file(chosen)
    require_sketch(chosen, bind(base_of(model)), "lora")
    batches = _batches(model, chosen, tokenizer, train, tokens, seed) if file is None or not file.exists() else []
    return gradients_of(model, batches, chosen, seed=seed, file=file)


def _check_starts(model: nn.Module, chosen: Lora) -> None:
    """Raise `RecipeError` where a layer knows less of what it lost than a rank that `chosen` gives it."""
    for layer in quantized(model) if wants_residual(chosen) else ():
        if layer.start is not None and len(layer.start.a) < min(chosen.r, layer.in_features, layer.out_features):
            what, most = "what quantization lost is known to a lower rank", f"at most {len(layer.start.a)}"
            remedy = f"use slimtune.quantize(..., residual_rank={chosen.r})"
            raise RecipeError(what, where="lora.r", got=chosen.r, wanted=most, remedy=remedy)


def _batches(
    model: nn.Module,
    chosen: LoraOptions,
    tokenizer: PreTrainedTokenizerBase | None,
    train: DataSource | str | None,
    tokens: Tensor | None,
    seed: int,
) -> list[Batch]:
    usual = TrainOptions()
    if tokens is not None:
        examples: Sequence[Example] = [Example(row, row) for row in cast(Tensor, _windows(model, tokens)).tolist()]
        return gradient_batches(examples, Collator(0), chosen, usual.per_device_train_batch_size, seed)
    if train is None or tokenizer is None:
        raise RecipeError(
            f"the adapter starts from {WORDS[INITS[chosen.init].of]}",
            got=chosen.init,
            remedy="pass train= and tokenizer=, or tokens=",
        )
    source = _source(train)
    examples = examples_of(model, tokenizer, source, usual)[0]
    collator = Collator(padding_id(tokenizer))
    return gradient_batches(examples, collator, chosen, usual.per_device_train_batch_size, seed, str(source))


def finetune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: DataSource | str,
    *,
    eval: DataSource | str | None = None,
    prune: Mapping[str, Any] | None = None,
    calibration: Calibration = None,
    seed: int = 0,
    facts: Callable[[TrainFacts], None] = lambda _: None,
    **options: Any,
) -> nn.Module:
    """`model` trained in place on `train`; `options` are the fields of the recipe's `train` step.

    With `prune`, the fields of a `prune` step whose `schedule` is a ramp, units go while an adapter learns (`distill`
    then learns from the unpruned model); `facts` are told what was cut, as `prune`. Where the ramp is to `refit`, it
    does so on `calibration`, as in `quantize`, or on `train`. Raises `RecipeError` where a recipe would.

    Example:
        >>> import slimtune, tempfile
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "one": 1, "and": 2, "two": 3}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?", pad_token="?")
        >>> shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = slimtune.add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=4, **shape)), r=2)
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as text:
        ...     written = text.write("one and two and one and two\\n" * 8), text.flush()
        ...     ramp = {"schedule": "cubic", "ratio": 0.3, "targets": ["ffn"], "importance": "gate", "every": 1}
        ...     model = slimtune.finetune(model, tokenizer, text.name, prune=ramp, distill=True, max_steps=4)
        >>> model.config.intermediate_size
        8
    """
    chosen = build(schema.Train, options, "train")
    ramp = None if prune is None else build(schema.Prune, dict(prune), "prune")
    if ramp is not None and not ramp.ramped:
        what, remedy = "pruning at once needs no training", "use slimtune.prune before, or schedule: cubic"
        raise RecipeError(what, where="prune.schedule", got=ramp.schedule, remedy=remedy)
    steps: list[Step] = [chosen] if ramp is None else [ramp, chosen]
    _require(steps[0], model, later=steps[1:])
    if ramp is not None:
        importance_of(ramp)
        rehearse(ramp, bind(model), "prune")
    examples = examples_of(model, tokenizer, _source(train), chosen)[0]
    held_out = examples_of(model, tokenizer, _source(eval), chosen)[0] if eval is not None else ()
    source: Calibration = train if calibration is None else calibration
    windows = _windows(model, source, tokenizer, DEFAULT_SAMPLES, seed) if ramp is not None and ramp.refit else None
    facts(train_now(model, tokenizer, examples, chosen, held_out=held_out, ramp=ramp, windows=windows, seed=seed))
    note_(model, *steps)
    return model


def merge(
    model: nn.Module,
    dtype: str = "",
    *,
    keep_bits: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration = None,
    tolerance: float = 0.05,
    force: bool = False,
    facts: Callable[[dict[str, Any]], None] = lambda _: None,
) -> nn.Module:
    """The dense model with its adapter folded in, or where `keep_bits` the packed one. `model` is consumed.

    With `keep_bits`, `calibration` and `tokenizer` are those of `quantize`; what is lost is refused above `tolerance`
    unless `force`, and given to `facts`.
    """
    step = build(schema.Merge, {"dtype": dtype, "keep_bits": keep_bits, "tolerance": tolerance}, "merge")
    _require(step, model)
    note_(model, step)  # its base is what comes back
    if not keep_bits:
        return merge_adapter(model, DTYPES[dtype] if dtype else None)
    tokens = _windows(model, calibration, tokenizer, DEFAULT_SAMPLES)
    merged, lost = merge_low_bit(model, tokens, tolerance=tolerance, force=force)
    facts(lost)
    return merged


def evaluate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[dict[str, Any]]:
    """Metrics of `model`; `options` are the fields of the recipe's `evaluate` step."""
    step = step_from("evaluate", options, "")
    _require(step, model)
    loaded = Loaded(cast(PreTrainedModel, base_of(model)), tokenizer, "model")
    session = Session(Recipe(model="model", steps=(step,)), loaded, model, lambda _: None)
    run_step(session, step, 0)
    return session.metrics


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    format: str,
    output: str | Path,
    *,
    name: str = "",
    dtype: str | torch.dtype = "",
    quantization: str = "",
    rank: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """Write `model` as `format` into the folder `output`, read it back and compare; what is not packed is in `dtype`
    (that of the model, unless given), `quantization` is for `gguf`, and
    an adapter (`peft`, `gguf-lora`) is cut to `rank` where there is one, the loss among the manifest's facts. Where
    `overwrite`, an earlier export is replaced; any other folder that is not empty is refused."""
    loaded_from = str(cast(Any, base_of(model)).name_or_path)
    require_free(Path(output), loaded_from, overwrite)
    state = _require(schema.Export(format, quantization, rank), model)
    if state.changed and format in ADAPTERS and not name:
        what = "the adapter's base is not the model that was loaded: it was trained, or took an adapter in"
        remedy = "save that base and pass name=, which others load it by; or merge, and export safetensors"
        raise RecipeError(what, got=loaded_from, remedy=remedy)
    noted = model.peft_config["default"].base_model_name_or_path if isinstance(model, PeftModel) else ""
    public = name or noted or loaded_from
    kept = DTYPES[_named_dtype(dtype)] if dtype else cast(Any, base_of(model)).dtype
    return write_export(Source(model, tokenizer, public, kept), format, Path(output), quantization, rank)


def plan(recipe: Recipe | dict[str, Any] | str | Path, *, memory: int | str | None = None) -> Plan:
    """What a recipe (an object, plain values, or a file) will do and take; `memory` in bytes, or as "24GB"."""
    return make_plan(_recipe(recipe), memory=amount(memory) if isinstance(memory, str) else memory)


def run(
    recipe: Recipe | dict[str, Any] | str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a recipe into the folder `output`; returns the report."""
    return run_recipe(_recipe(recipe), Path(output).expanduser(), resume=resume, overwrite=overwrite, say=say)


def _require(step: Step, model: nn.Module, later: Sequence[Step] = ()) -> State:
    """The state of `model`, in which `step` and `later` ones can work, by the rules of recipes; raises `RecipeError`
    where they cannot."""
    bind(model)  # refuses what slimtune does not know
    state = state_of(model)
    known = replace(state, residual=True)  # `add_lora` says what to do where that is not known
    for number, each in enumerate((step, *later)):
        require(each, after((step, *later)[:number], known), first=number == 0, later=later[number:])
    return state


def _windows(
    model: nn.Module, calibration: Calibration, tokenizer: Any = None, samples: int = 0, seed: int = 0
) -> Tensor | None:
    """Token windows of calibration data, or those that it is; `samples` where the source does not say how many."""
    if calibration is None:
        return None
    tokens, where = calibration, "tokens"
    if not isinstance(tokens, Tensor):
        if tokenizer is None:
            raise RecipeError("calibration text needs the model's tokenizer", remedy="pass tokenizer=")
        source, where = _source(tokens), str(tokens)
        rows, length = read_rows(source), within_positions(model, source.length)
        tokens = calibration_tokens(rows, tokenizer, source.samples or samples, length, seed, where)
    if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise ShapeError("tokens are windows of whole numbers", got=got, wanted="int64 [samples, length]")
    require_vocabulary(cast(PreTrainedModel, base_of(model)), tokens, where)
    return tokens


def _source(source: Text) -> DataSource:
    if isinstance(source, Mapping):
        return build(DataSource, dict(source), "data")
    return DataSource(path=str(source)) if isinstance(source, str | Path) else source


def _named_dtype(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise RecipeError("unknown dtype", where="dtype", got=name, remedy=nearest(name, DTYPES))
    return name


def _recipe(recipe: Recipe | dict[str, Any] | str | Path) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return read_recipe(Path(recipe)) if isinstance(recipe, str | Path) else recipe_from(recipe)
