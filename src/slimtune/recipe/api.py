"""The Python face of slimtune: what a recipe can do, these functions can, on a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimtune.arch import bind
from slimtune.calib.data import calibration_tokens
from slimtune.calib.rows import DataSource as DataSource
from slimtune.calib.rows import read_rows
from slimtune.errors import RecipeError
from slimtune.export import Manifest, Source
from slimtune.export import export as write_export
from slimtune.export.load import DTYPES, Loaded
from slimtune.export.load import load as load_model
from slimtune.hub import round_cache_
from slimtune.lora.attach import add_lora as attach
from slimtune.lora.attach import base_of
from slimtune.lora.inits import residual
from slimtune.lora.merge import merge as merge_adapter
from slimtune.lora.options import LoraOptions
from slimtune.quant.apply import QuantizeFacts, quantize_
from slimtune.recipe.document import read_recipe
from slimtune.recipe.plan import DEFAULT_SAMPLES, Plan
from slimtune.recipe.plan import plan as make_plan
from slimtune.recipe.run import run as run_recipe
from slimtune.recipe.schema import Quantize, Recipe, build, recipe_from, step_from
from slimtune.recipe.steps import Session, examples_of, run_step
from slimtune.recipe.treatments import Treatments, check_patterns
from slimtune.train.data import Collator, padding_id
from slimtune.train.loop import TrainFacts
from slimtune.train.loop import finetune as train_model
from slimtune.train.options import TrainOptions


def load(model: str, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, by hub id, folder, `.gguf` file or bundled name."""
    loaded = load_model(model, dtype=dtype)
    return loaded.model, loaded.tokenizer


def quantize(
    model: nn.Module,
    method: str = "optq",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: DataSource | str | Tensor | None = None,
    ignore: Sequence[str] = (),
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
    token windows `[samples, length]`, or a data source or file (then `tokenizer` is needed). With a
    `residual_rank`, `add_lora(model, init="residual")` may follow, up to that `r`. `facts` is called with what was
    done to each layer.
    """
    step = Quantize(method, tuple(ignore), dict(activations or {}), dict(layers or {}), dict(kv_cache or {}), options)
    treatments, modelmap = Treatments(step, method), bind(model)
    check_patterns(step, [port.name for port in modelmap.linears], method)
    if step.kv_cache:
        round_cache_(cast(PreTrainedModel, model), treatments.cache.bits)
    tokens = calibration if isinstance(calibration, Tensor) else None
    if isinstance(calibration, DataSource | str):
        source = _source(calibration)
        if tokenizer is None:
            raise RecipeError("calibration text needs the model's tokenizer", remedy="pass tokenizer=")
        samples = source.samples or DEFAULT_SAMPLES
        tokens = calibration_tokens(read_rows(source), tokenizer, samples, source.length, seed, str(source))
    start = (lambda weight, base, stats: residual(weight, base, residual_rank, stats)) if residual_rank > 0 else None
    rounds = treatments.rounds
    facts(quantize_(model, modelmap, treatments.choose, activations=rounds, tokens=tokens, start=start))
    return model


def add_lora(model: nn.Module, *, seed: int = 0, base_name: str = "", **options: Any) -> nn.Module:
    """`model` in a `PeftModel` with fresh factors; `options` are the fields of the recipe's `lora` step."""
    chosen = build(LoraOptions, options, "lora")
    return attach(
        model,
        r=chosen.r,
        lora_alpha=chosen.lora_alpha,
        lora_dropout=chosen.lora_dropout,
        target_modules=chosen.target_modules,
        use_rslora=chosen.use_rslora,
        init=chosen.init,
        base_name=base_name,
        seed=seed,
    )


def finetune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: DataSource | str,
    *,
    eval: DataSource | str | None = None,
    seed: int = 0,
    facts: Callable[[TrainFacts], None] = lambda _: None,
    **options: Any,
) -> nn.Module:
    """`model` trained in place on `train`; `options` are the fields of the recipe's `train` step."""
    chosen = build(TrainOptions, options, "train")
    examples = examples_of(model, tokenizer, _source(train), chosen)[0]
    held_out = examples_of(model, tokenizer, _source(eval), chosen)[0] if eval is not None else ()
    facts(train_model(model, examples, Collator(padding_id(tokenizer)), chosen, held_out=held_out, seed=seed))
    return model


def merge(model: nn.Module, dtype: str = "") -> nn.Module:
    """The dense model with its adapter folded in. `model` is consumed."""
    return merge_adapter(model, DTYPES[dtype] if dtype else None)


def evaluate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[dict[str, Any]]:
    """Metrics of `model`; `options` are the fields of the recipe's `evaluate` step."""
    step = step_from("evaluate", options, "")
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
    dtype: str = "float32",
) -> Manifest:
    """Write `model` as `format` into the folder `output`, read it back and compare."""
    public = name or str(cast(Any, base_of(model)).name_or_path)
    return write_export(Source(model, tokenizer, public, DTYPES[dtype]), format, Path(output))


def plan(recipe: Recipe | dict[str, Any] | str | Path, *, memory: int | None = None) -> Plan:
    """What a recipe (an object, plain values, or a file) will do and take."""
    return make_plan(_recipe(recipe), memory=memory)


def run(
    recipe: Recipe | dict[str, Any] | str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a recipe into the folder `output`; returns the report."""
    return run_recipe(_recipe(recipe), Path(output), resume=resume, overwrite=overwrite, say=say)


def _source(source: DataSource | str) -> DataSource:
    return DataSource(path=source) if isinstance(source, str) else source


def _recipe(recipe: Recipe | dict[str, Any] | str | Path) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return recipe_from(recipe) if isinstance(recipe, dict) else read_recipe(Path(recipe))
