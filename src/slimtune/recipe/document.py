"""Recipes as files: YAML in, with `key=value` overrides, and the resolved recipe out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from slimtune.calib.rows import DataSource
from slimtune.errors import RecipeError, nearest
from slimtune.recipe.schema import STEPS, Recipe, recipe_from, to_dict

PLAIN = (str, tuple[str, ...], DataSource, type(None))  # what a text of the shell may be without being read as YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with three repairs: `1e-4` is a number, as in YAML 1.2, a key that stands twice is an error, and of
    merged mappings the first counts, which PyYAML 6.0.4 forgets."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.merging: list[yaml.MappingNode] = []

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """`<<` looked into: what stands beside it counts more than what is merged."""
        own, merged = [], []
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                own.append((key, value))
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode) or source in self.merging:
                    raise yaml.MarkedYAMLError(problem="'<<' takes other mappings", problem_mark=source.start_mark)
                self.merging.append(node)
                self.flatten_mapping(source)
                self.merging.pop()
                merged.append(source.value)
        pairs = [pair for source in reversed(merged) for pair in source] + own
        names = [(key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key for key, _ in pairs]
        node.value = list(dict(zip(names, pairs, strict=True)).values())

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The node of a mapping, before any `<<` is looked into."""
        node = super().compose_mapping_node(anchor)
        for number, (key, _) in enumerate(node.value):
            if any(key.value == other.value for other, _ in node.value[:number]):
                raise yaml.MarkedYAMLError(problem=f"a second key '{key.value}'", problem_mark=key.start_mark)
        return node


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
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, ", ".join(filter(None, (error.context, error.problem)))
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError("not valid YAML", where=", ".join(filter(None, (where, place))), got=problem) from error
    except yaml.YAMLError as error:
        raise RecipeError("not valid YAML", where=where, got=" ".join(str(error).split())) from error


def parse_for(keys: Sequence[str], text: str, where: str) -> Any:
    """The value of a recipe's field `keys` from the shell. A string, a path or names are the text as it stands, unless
    it is in brackets, braces or quotes; everything else is YAML."""
    hint: Any = Recipe
    for key in keys[2:] if keys[0] == "steps" else keys:
        owner = next(filter(is_dataclass, (hint, *get_args(hint))), None)
        inner = get_type_hints(owner) | (STEPS if owner is Recipe else {}) if owner else {}
        hint = get_args(hint)[1] if get_origin(hint) is dict else inner.get(key)
    kinds = (hint,) if hint in PLAIN else () if get_origin(hint) is dict else get_args(hint)
    plain = kinds and all(kind in PLAIN or isinstance(kind, str) for kind in kinds)
    nothing = type(None) in kinds and text in ("", "~", "null")
    if plain and not nothing and text[:1] + text[-1:] not in ("[]", "{}", "''", '""'):
        return text
    return parse(text, where)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key=value` overrides: `seed=1`, `data.train.path=x.jsonl`, `quantize.bits=3`
    (every step of that name) or `steps.0.quantize.bits=3`.

    Paths in it are relative to the current folder, or else to the recipe's own; a sketch that is in neither is to be
    written beside the recipe, where runs from any folder find it.
    """
    if not path.is_file():
        raise RecipeError("there is no such recipe", where=str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError("a recipe is a text file in UTF-8", where=f"{path}, byte {error.start}") from error
    facts = parse(text, str(path))
    if not isinstance(facts, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=str(path), got=type(facts).__name__)
    if isinstance(steps := facts.get("steps"), list):  # a step without keys may be its name alone
        facts["steps"] = [{step: {}} if isinstance(step, str) else step for step in steps]
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise RecipeError("an override is key=value", got=override)
        valid = [f.name for f in fields(Recipe)] + [str(name) for step in _steps(facts) for name in step]
        first = key.split(".")[0]
        if first not in valid:
            raise RecipeError("an unknown key or step", where=override, got=first, remedy=nearest(first, set(valid)))
        _set(facts, key.split("."), parse_for(key.split("."), value, override), override)
    settle(facts, path.parent)
    return recipe_from(facts, name=path.stem)


def write_recipe(recipe: Recipe) -> str:
    """YAML text of a recipe with every default written out; `read_recipe` reads it back as the same recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True, width=120)


def _set(facts: Any, keys: list[str], value: Any, override: str) -> None:
    named = [step for step in _steps(facts) if keys[0] in step]
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


def _steps(facts: object) -> list[dict[str, Any]]:
    """The steps that are mappings already; what else stands there is refused later, where it can be named."""
    steps = _mapping(facts).get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def settle(facts: object, folder: Path, *, whole: bool = False) -> None:
    """Make names of a model, data, sketches and tasks say where they are if they lie in `folder` and not in the current
    one, or where `whole`, by whole paths, if they lie in `folder`. A sketch that is in neither is to be in `folder`."""

    def place(owner: Any, key: Any, *, made: bool = False) -> None:
        source = owner[key] if isinstance(owner, list) else owner.get(key)
        if isinstance(source, dict) and "path" in source:
            place(source, "path")
        elif isinstance(source, str) and source and (whole or not Path(source).expanduser().exists()):
            path = folder / Path(source).expanduser()
            owner[key] = str(path.resolve() if whole else path) if made or path.exists() else source

    place(_mapping(facts), "model")
    for step in _steps(facts):
        place(_mapping(step.get("lora")), "init_sketch", made=True)
    evaluations = [_mapping(step.get("evaluate")) for step in _steps(facts)]
    texts = [_mapping(step.get(key)) for step in evaluations for key in ("perplexity", "accuracy", "rouge")]
    for owner in (_mapping(_mapping(facts).get("data")), *texts):
        for key in owner:
            place(owner, key)
    for step in evaluations:
        place(step, "tasks")  # one name, or several
        for number in range(len(step["tasks"]) if isinstance(step.get("tasks"), list) else 0):
            place(step["tasks"], number)


def amount(text: str, where: str = "memory") -> int:
    """Bytes of `24GB`, `512MB` or `1GiB`. Raises `RecipeError` for anything else.

    >>> amount("24GB"), amount("1 KiB")
    (24000000000, 1024)
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    number = text.strip().upper()
    unit = next((u for u in sorted(units, key=len, reverse=True) if number.endswith(u)), "")
    try:
        amount = float(number.removesuffix(unit)) * units.get(unit, 1)
        if not 0 < amount < float("inf"):
            raise ValueError(text)
        return int(amount)
    except ValueError as error:
        raise RecipeError("not an amount of memory", where=where, got=text, wanted="like 24GB or 512MB") from error
