"""Recipes as files: YAML in, with `key=value` overrides, and the resolved recipe out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import RecipeError
from slimtune.recipe.schema import Recipe, recipe_from, to_dict


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with one repair: `1e-4` is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^[-+]?\.\d+$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


def parse(text: str, where: str = "") -> Any:
    """Plain values from YAML text. Raises `RecipeError` with the line.

    >>> parse("{learning_rate: 1e-4, bits: 3, path: a.b}")
    {'learning_rate': 0.0001, 'bits': 3, 'path': 'a.b'}
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader with one more number format
    except yaml.YAMLError as error:
        raise RecipeError("not valid YAML", where=where, got=str(error).replace("\n", " ")[:300]) from error


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key=value` overrides: `seed=1`, `data.train.path=x.jsonl`, `quantize.bits=3`
    (every step of that name) or `steps.0.quantize.bits=3`.

    Paths in it are relative to the current folder, or else to the recipe's own.
    """
    if not path.is_file():
        raise RecipeError("there is no such recipe", where=str(path))
    facts = parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(facts, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=str(path), got=type(facts).__name__)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise RecipeError("an override is key=value", got=override)
        _set(facts, key.split("."), parse(value, override), override)
    _anchor(facts.get("data"), path.parent)
    for step in facts.get("steps") or ():
        if isinstance(step, dict) and isinstance(step.get("evaluate"), dict):
            _anchor(step["evaluate"].get("perplexity"), path.parent)
    return recipe_from(facts, name=path.stem)


def write_recipe(recipe: Recipe) -> str:
    """YAML text of a recipe with every default written out; `read_recipe` reads it back as the same recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def _set(facts: Any, keys: list[str], value: Any, override: str) -> None:
    steps = facts.get("steps") or [] if isinstance(facts, dict) else []
    named = [step for step in steps if isinstance(step, dict) and keys[0] in step]
    if named and len(keys) > 1:
        for step in named:
            step[keys[0]] = step[keys[0]] or {}
            _set(step[keys[0]], keys[1:], value, override)
        return
    for key in keys[:-1]:
        if isinstance(facts, list):
            if not key.isdigit() or int(key) >= len(facts):
                raise RecipeError("the recipe has no such step", got=override, wanted=f"a number below {len(facts)}")
            facts = facts[int(key)]
        elif isinstance(facts, dict):
            if facts.get(key) is None:
                facts[key] = {}
            facts = facts[key]
        else:
            raise RecipeError("an override goes into something that has no keys", got=override)
    if not isinstance(facts, dict):
        raise RecipeError("an override goes into something that has no keys", got=override)
    facts[keys[-1]] = value


def _anchor(sources: object, folder: Path) -> None:
    """Make paths that exist beside the recipe, but not in the current folder, say so."""
    if not isinstance(sources, dict):
        return
    for key, source in sources.items():
        if isinstance(source, str) and not Path(source).exists() and (folder / source).exists():
            sources[key] = str(folder / source)
        elif isinstance(source, dict) and isinstance(source.get("path"), str):
            path = source["path"]
            if not Path(path).exists() and (folder / path).exists():
                source["path"] = str(folder / path)
