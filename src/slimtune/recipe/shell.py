"""Verbs that are not a whole recipe: one step from the shell, and looking at a finished model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from slimtune.arch import bind
from slimtune.calib.formats import normalise, render_messages, uses_template
from slimtune.errors import FormatError, RecipeError, SlimtuneError, nearest
from slimtune.evaluate.generate import GREEDY, Pace, Sampling, write_reply
from slimtune.evaluate.inference import require_vocabulary
from slimtune.export import ADAPTERS, Manifest, Source, export, exporter_of, require_free
from slimtune.export.load import BUNDLED, Loaded, load
from slimtune.files import require_place
from slimtune.lora.attach import has_adapter, load_adapter
from slimtune.quant import QUANTIZERS
from slimtune.recipe.adapters import base_name, belongs
from slimtune.recipe.document import parse, parse_for
from slimtune.recipe.legality import State, after, dtype_after, require, state_of
from slimtune.recipe.schema import STEPS, Data, Evaluate, Export, Quantize, Recipe, recipe_from, step_from
from slimtune.recipe.steps import Session, run_step

TOP = ("seed", "dtype")


def recipe_of(model: str, steps: Sequence[str], arguments: Sequence[str], name: str) -> Recipe:
    """The recipe of a verb: its steps with `--key value` arguments, each given to the step that has the key.

    `--train`, `--eval` and `--calibration` name data, `--seed` and `--dtype` are the recipe's own.
    """
    facts: dict[str, Any] = {"model": model, "name": name, "data": {}, "steps": [{step: {}} for step in steps]}
    sources = [f.name for f in fields(Data)]
    pairs = _pairs(arguments)
    own = _method_keys(pairs.get("method", [Quantize.method])[-1]) if "quantize" in steps else []
    for key, texts in pairs.items():
        text = texts[-1]
        owners = [step for step in steps if key in _keys(step)] or ["quantize"] * (key in own)
        if key in TOP:
            facts[key] = parse_for([key], text, f"--{key}")
        elif key in sources and not owners:
            facts["data"][key] = parse_for(["data", key], text, f"--{key}")
        elif owners:
            values = [parse_for([owners[0], key], each, f"--{key}") for each in texts]
            value = (
                values[0] if len(values) == 1 else [one for v in values for one in (v if isinstance(v, list) else [v])]
            )
            facts["steps"][list(steps).index(owners[0])][owners[0]][key] = value
        else:
            known = (*TOP, *sources, *(k for step in steps for k in _keys(step)), *own)
            names = {k.replace("_", "-") for k in known}
            wrong = key.replace("_", "-")
            raise RecipeError("unknown option", got=f"--{wrong}", remedy=nearest(wrong, names).replace("'", "'--", 1))
    return recipe_from(facts, name=name)


def open_model(name: str, *, dtype: str = "", adapter: Path | None = None) -> tuple[Loaded, nn.Module]:
    """A model by name, or the model and adapter of a run folder (then `dtype` is the run's, unless given)."""
    run = Path(name)
    held = _held_by(run)
    base = str(run / "model") if (run / "model").is_dir() or not held else held[0].model  # the one it began with
    loaded = load(base if held else name, dtype=dtype or (dtype_after(*held) if held else "float32"))
    if held:
        original = held[0].model
        loaded.name = BUNDLED[original][2] if original in BUNDLED else original
        adapter = adapter or (run / "adapter" if (run / "adapter").is_dir() else None)
    return loaded, load_adapter(loaded.model, adapter) if adapter else loaded.model


def evaluate_model(
    model: str,
    *,
    perplexity: Sequence[str] = (),
    tasks: Sequence[str] = (),
    length: int = 512,
    max_tokens: int = -1,
    limit: int = -1,
    num_fewshot: int = -1,
    speed: bool = False,
    dtype: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The metrics of a model, as `report.json` has them. A text is `file` or `name=file`."""
    texts: dict[str, str] = {}
    for name, path in map(_named, perplexity):
        if name in texts:
            got, other = f"{name}: {texts[name]} and {path}", f"{Path(path).parent.name or 'other'}-{name}={path}"
            raise RecipeError(
                "two texts of one name", where="--perplexity", got=got, remedy=f"give one: --perplexity {other}"
            )
        texts[name] = path
    counts = {"length": length, "max_tokens": max_tokens, "limit": limit, "num_fewshot": num_fewshot}
    facts = {"perplexity": texts, "tasks": list(tasks), "speed": speed, **counts}
    step = cast(Evaluate, step_from("evaluate", facts, ""))
    loaded, opened = open_model(model, dtype=dtype)
    recipe = Recipe(model=model, steps=(step,))
    session = Session(recipe, loaded, opened, say)
    run_step(session, step, 0)
    return {"model": model, "metrics": session.metrics}


def export_model(
    source: str,
    format: str,
    output: Path,
    *,
    dtype: str = "",
    quantization: str = "",
    rank: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """Export a model or a run's model and adapter."""
    exporter_of(format, quantization, rank)  # what is unknown is refused before anything is loaded
    require_free(output, source, overwrite)
    require_place(output, folder=True)
    loaded, model = open_model(source, dtype=dtype)
    name, note, known = loaded.name, "", State()
    if held := _held_by(Path(source)):
        known = replace(after(held[0].steps[: held[1]]), ramp=False)  # a ramp to come does not matter to its model
        note = belongs(*held) if has_adapter(model) else ""
        name = base_name(*held, Path(source), name) if format in ADAPTERS else name
    require(Export(format, quantization, rank), state_of(model, known), where=f"--format {format}")
    return export(Source(model, loaded.tokenizer, name, loaded.model.dtype, note), format, output, quantization, rank)


def generate_text(
    model: str,
    prompt: str,
    *,
    adapter: Path | None = None,
    max_new_tokens: int = 128,
    raw: bool = False,
    sampling: Sampling = GREEDY,
    dtype: str = "",
    write: Callable[[str], None],
) -> Pace:
    """Answer `prompt`, piece by piece to `write`; returns how long it took.

    The prompt is put into the model's chat template where it has one, unless it is wanted `raw`: then it is continued
    as it stands.
    """
    loaded, opened = open_model(model, dtype=dtype, adapter=adapter)
    bind(opened)  # refuses what slimtune does not know, before generating
    [conversation] = normalise([{"prompt": prompt, "completion": ""}])
    chat = not raw and uses_template(conversation, loaded.tokenizer)
    if chat:
        prompt = render_messages([{"role": "user", "content": prompt}], loaded.tokenizer, open_reply=True)
    tokens = loaded.tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    if tokens["input_ids"].shape[1] == 0:
        raise RecipeError("there is nothing to continue", where="prompt", remedy="write at least one word")
    require_vocabulary(loaded.model, tokens["input_ids"], "prompt")
    inputs = cast(Mapping[str, Tensor], tokens)
    return write_reply(cast(Any, opened), loaded.tokenizer, inputs, max_new_tokens, sampling, write)


def _keys(step: str) -> list[str]:
    return [f.name for f in fields(STEPS[step]) if f.name != "options"]


def _method_keys(method: str) -> list[str]:
    """The fields of a quantizer, which are options of `quantize` too."""
    return [f.name for f in fields(cast(Any, QUANTIZERS[method]))]


def _pairs(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The values of each option. Raises `RecipeError` for a second one where only one can be."""
    pairs: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise RecipeError("an option begins with --", got=key, remedy="the model comes first, then its options")
        name, sign, value = key[2:].partition("=")
        if not sign:
            value = "true" if not rest or rest[0].startswith("--") else rest.pop(0)
        pairs.setdefault(name.replace("-", "_"), []).append(value)
    lists = {f.name for step in STEPS.values() for f in fields(step) if "tuple" in str(f.type)}
    for name, values in pairs.items():
        if len(values) > 1 and name not in lists:
            raise RecipeError("an option stands twice", got=f"--{name.replace('_', '-')} {' and '.join(values)}")
    return pairs


def _named(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    return (name, path) if sign else (Path(text).name.split(".")[0], text)


def _held_by(run: Path) -> tuple[Recipe, int] | None:
    """The recipe of the run folder `run`, and how many of its steps are done; None where it is no run. Raises
    `FormatError` where its files are damaged."""
    path, state = run / "recipe.yaml", run / "checkpoints" / "state.json"
    if not path.is_file() or (run / "config.json").is_file():
        return None
    if not (run / "model").is_dir() and not (run / "adapter").is_dir():
        remedy = "finish it: slimtune run RECIPE --output RUN --resume"
        raise RecipeError("the run was not finished, and has left no model yet", where=str(run), remedy=remedy)
    try:
        recipe = recipe_from(parse(path.read_text(encoding="utf-8")))
        done = len(json.loads(state.read_text(encoding="utf-8"))["steps"]) if state.is_file() else len(recipe.steps)
    except (SlimtuneError, ValueError, KeyError, TypeError) as error:
        raise FormatError("the run's recipe is damaged", where=str(path), got=str(error)[:300]) from error
    return recipe, done
