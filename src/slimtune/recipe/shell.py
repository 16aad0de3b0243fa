"""Verbs that are not a whole recipe: one step from the shell, and looking at a finished model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from slimtune.arch import bind
from slimtune.calib.formats import normalise, render_messages, uses_template
from slimtune.errors import FormatError, RecipeError, nearest
from slimtune.evaluate.generate import GREEDY, Pace, Sampling, write_reply
from slimtune.evaluate.inference import require_vocabulary
from slimtune.export import Manifest, Source, export, exporter_of
from slimtune.export.gguf import ADAPTER_FILE, MODEL_FILE
from slimtune.export.load import BUNDLED, Loaded, load
from slimtune.files import require_place
from slimtune.lora.attach import load_adapter
from slimtune.quant import QUANTIZERS
from slimtune.recipe.document import parse, parse_for
from slimtune.recipe.schema import STEPS, Data, Evaluate, Quantize, Recipe, recipe_from, step_from
from slimtune.recipe.steps import Session, run_step

TOP = ("seed", "dtype")


def recipe_of(model: str, steps: Sequence[str], arguments: Sequence[str], name: str) -> Recipe:
    """The recipe of a verb: its steps with `--key value` arguments, each given to the step that has the key.

    `--train`, `--eval` and `--calibration` name data, `--seed` and `--dtype` are the recipe's own.
    """
    facts: dict[str, Any] = {"model": model, "name": name, "data": {}, "steps": [{step: {}} for step in steps]}
    sources = [f.name for f in fields(Data)]
    pairs = _pairs(arguments)
    own = _method_keys(pairs.get("method", Quantize.method)) if "quantize" in steps else []
    for key, text in pairs.items():
        owners = [step for step in steps if key in _keys(step)] or ["quantize"] * (key in own)
        if key in TOP:
            facts[key] = parse_for([key], text, f"--{key}")
        elif key in sources and not owners:
            facts["data"][key] = parse_for(["data", key], text, f"--{key}")
        elif owners:
            value = parse_for([owners[0], key], text, f"--{key}")
            facts["steps"][list(steps).index(owners[0])][owners[0]][key] = value
        else:
            names = [k.replace("_", "-") for k in (*TOP, *sources, *(k for step in steps for k in _keys(step)), *own)]
            wrong = key.replace("_", "-")
            raise RecipeError("unknown option", got=f"--{wrong}", remedy=nearest(wrong, names).replace("'", "'--", 1))
    return recipe_from(facts, name=name)


def open_model(name: str, *, dtype: str = "", adapter: Path | None = None) -> tuple[Loaded, nn.Module]:
    """A model by name, or the model and adapter of a run folder (then `dtype` is the run's, unless given)."""
    run = Path(name)
    facts = _run_facts(run) if _is_run(run) else {}
    loaded = load(str(run / "model") if facts else name, dtype=dtype or str(facts.get("dtype", "float32")))
    if facts:
        loaded.name = BUNDLED[facts["model"]][2] if facts["model"] in BUNDLED else str(facts["model"])
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
    texts = dict(_named(text) for text in perplexity)
    step = cast(
        Evaluate,
        step_from(
            "evaluate",
            {
                "perplexity": texts,
                "tasks": list(tasks),
                "length": length,
                "max_tokens": max_tokens,
                "limit": limit,
                "num_fewshot": num_fewshot,
                "speed": speed,
            },
            "",
        ),
    )
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
    _check_export_folder(source, output, overwrite)
    require_place(output, folder=True)
    loaded, model = open_model(source, dtype=dtype)
    return export(Source(model, loaded.tokenizer, loaded.name, loaded.model.dtype), format, output, quantization, rank)


def _check_export_folder(source: str, output: Path, overwrite: bool) -> None:
    """Refuse a folder that an export must not replace: what is there is lost with it."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    ours = (output / "README.md").is_file() and any(
        (output / name).is_file() for name in ("config.json", "adapter_config.json", MODEL_FILE, ADAPTER_FILE)
    )
    if not ours:
        raise RecipeError(
            "the output is not empty and not an export", where=str(output), remedy="choose another --output"
        )
    if Path(source).expanduser().resolve().is_relative_to(output.resolve()):
        raise RecipeError("an export cannot replace its source", where=str(output), remedy="choose another --output")
    if not overwrite:
        raise RecipeError("the output folder is not empty", where=str(output), remedy="--overwrite replaces it")


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


def _pairs(arguments: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise RecipeError("an option begins with --", got=key, remedy="the model comes first, then its options")
        name, sign, value = key[2:].partition("=")
        if not sign:
            value = "true" if not rest or rest[0].startswith("--") else rest.pop(0)
        pairs[name.replace("-", "_")] = value
    return pairs


def _named(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    return (name, path) if sign else (Path(text).name.split(".")[0], text)


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() and (folder / "model").is_dir()


def _run_facts(run: Path) -> dict[str, Any]:
    facts = parse((run / "recipe.yaml").read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or "model" not in facts:
        raise FormatError("the run's recipe is damaged", where=str(run / "recipe.yaml"))
    return facts
