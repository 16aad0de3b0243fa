"""Plans and tables as text for a terminal."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from slimtune.arch import FAMILIES
from slimtune.errors import RecipeError, nearest
from slimtune.export import EXPORTERS
from slimtune.export.load import BUNDLED
from slimtune.lora.inits import INITS
from slimtune.prune import IMPORTANCES
from slimtune.quant import QUANTIZERS
from slimtune.recipe.plan import Plan

Row = dict[str, Any]


def plan_text(plan: Plan) -> str:
    """The steps with what they take, and whether it fits."""
    lines = [f"{plan.parameters:,} parameters", "", f"{'step':12}{'peak memory':>14}{'arithmetic':>16}"]
    lines += [
        f"{step.step:12}{step.memory_bytes / 1e9:>11.2f} GB"
        + (f"{step.flops / 1e12:>9.1f} TFLOP" if step.flops else f"{'-':>15}")
        for step in plan.steps
    ]
    lines += ["", f"at most {plan.memory_bytes / 1e9:.2f} GB; {plan.available_bytes / 1e9:.1f} GB are available"]
    return "\n".join(lines + [f"warning: {warning}" for warning in plan.warnings])


def listing(what: str) -> list[Row]:
    """The rows of a table: `models`, `quantizers`, `inits`, `importances`, `families` or `exporters`."""
    tables = {
        "models": lambda: [{"name": name, "hub": hub, "package": pkg} for name, (pkg, _, hub) in BUNDLED.items()],
        "quantizers": lambda: [_method(name, QUANTIZERS[name]) for name in QUANTIZERS],
        "inits": lambda: [{"name": name, "what": init.what} for name, init in INITS.items()],
        "importances": lambda: [_method(name, IMPORTANCES[name]) for name in IMPORTANCES],
        "families": lambda: [{"name": name, "model_types": list(FAMILIES[name].model_types)} for name in FAMILIES],
        "exporters": lambda: [{"name": name, "what": _first_line(EXPORTERS[name])} for name in EXPORTERS],
    }
    if what not in tables:
        raise RecipeError("there is no such list", got=what, remedy=nearest(what, tables))
    return tables[what]()


def listing_text(rows: list[Row]) -> str:
    """The same for a person: a name a line, its facts indented."""
    lines, width = [], 2 + max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        facts = {k: v for k, v in row.items() if k not in ("name", "fields")}
        lines.append(f"{row['name']:{width}}" + ", ".join(_cell(v) for v in facts.values()))
        lines += [f"    {f['name']:16}{_cell(f['default']):10}{f['help']}" for f in row.get("fields", ())]
    return "\n".join(lines)


def _method(name: str, method: Any) -> Row:
    assert is_dataclass(method)
    return {
        "name": name,
        "what": _first_line(method),
        "fields": [{"name": f.name, "default": f.default, "help": f.metadata.get("help", "")} for f in fields(method)],
    }


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
