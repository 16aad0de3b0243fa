"""What messages call things where options were typed: `--bits`, not `steps[0].quantize.bits`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from slimtune.errors import SlimtuneError
from slimtune.quant import QUANTIZERS
from slimtune.recipe.schema import STEPS, Data, Quantize

NOUNS = {
    "quantizer": "method",
    "exporter": "format",
    "calibration": "calibration",
    "dtype": "dtype",
    "scales": "scales",
}
"""The option that a word of a message is about, where that says no place. `train` is one for what is learnt from."""

RECIPE = "; more than one step is a recipe (slimtune run)"


@dataclass(frozen=True)
class Options:
    """The options of a verb: its `keys`, as a recipe spells them, which belong to the `steps` it does."""

    verb: str
    steps: tuple[str, ...]
    keys: frozenset[str]

    def renamed(self, error: SlimtuneError) -> SlimtuneError:
        """The same error, told to somebody who typed options."""
        where, facts = str(error.facts["where"]), dict(error.facts)
        facts["where"] = self.place(where, error.what)
        step = re.fullmatch(r"steps\[\d+\]\.\w+", where)  # as a whole, which `got` then says in a recipe's words
        for key in ("got", "wanted", "remedy") if step else ("wanted", "remedy"):
            facts[key] = self.text(facts[key]) if isinstance(facts[key], str) else facts[key]
        if re.search(r"\bput .+ (before|after)\b|\bkeep one \w+ step\b", str(facts["remedy"])):
            facts["remedy"] += RECIPE
        return type(error)(error.what, **facts)

    def line(self, line: str) -> str:
        """A line of progress: a warning in the words of the command line, anything else as it is."""
        return (
            re.sub(r"steps\[\d+\]\.\w+", f"slimtune {self.verb}", self.text(line)) if "warning: " in line[:9] else line
        )

    def place(self, where: str, what: str) -> str:
        """The option that stands for a place in a recipe; the verb, where it is a step as a whole.

        >>> options = Options("quantize", ("quantize",), frozenset({"bits", "group_size", "calibration"}))
        >>> options.place("steps[0].quantize, bits", ""), options.place("data.calibration.path", "")
        ('--bits', '--calibration.path')
        >>> options.place("steps[0].quantize", "group_size out of range"), options.place("bits.jsonl, line 3", "")
        ('--group-size', 'bits.jsonl, line 3')
        """
        owners = "|".join(map(re.escape, self.steps)) or "$"
        path = re.sub(
            rf"^(?:(?:steps\[\d+\]\.)?(?:{owners})(?:\.|, |$)(?:(?:{owners})\.)?|data\.|perplexity: )", "", where
        )
        key = re.match(r"\w*", path)[0]  # type: ignore[index]  # it may be empty
        if key in self.keys and (path != where or path == key):
            return _option(key) + path[len(key) :]
        if path:
            return where
        words = re.findall(r"\w+", what)
        named = [word for word in words[:1] if word in self.keys] + [NOUNS[word] for word in words if word in NOUNS]
        named += [word for word in words[-2:] if word == "train"]
        return next((_option(key) for key in named if key in self.keys), f"slimtune {self.verb}" if where else "")

    def text(self, text: str) -> str:
        """Advice in a recipe's words, in those of the command line.

        >>> options = Options("prune", ("prune",), frozenset({"importance", "multiple_of", "ratio", "calibration"}))
        >>> options.text("lower ratio or multiple_of, or use importance: magnitude")
        'lower --ratio or --multiple-of, or use --importance magnitude'
        """
        mine, long = (
            "|".join(map(re.escape, sorted(keys))) or "$" for keys in (self.keys, {k for k in self.keys if "_" in k})
        )
        text = re.sub(r"add data: \{(\w+): .*?\}\},? or (?:a file )?\(?--\w+ FILE\)?", r"add --\1 FILE", text)
        text = re.sub(r"\bdata\.(\w+)\.(\w+)", r"\2 of --\1", text)
        text = re.sub(
            rf"(?<![-\w{{'])(?<!one )({mine}): (\[[^\]]*\]|[\w.-]+)", lambda m: f"{_option(m[1])} {m[2]}", text
        )
        text = re.sub(rf"\b(lower|add|leave out) ({mine})\b", lambda m: f"{m[1]} {_option(m[2])}", text)
        return re.sub(rf"(?<![-\w'])({long})\b", lambda m: _option(m[1]), text)


def options_of(verb: str, steps: Sequence[str], arguments: Sequence[str]) -> Options:
    """The options of a verb that does `steps` of a recipe, with what was typed."""
    keys = {"seed", "dtype", *(f.name for f in fields(Data))}
    keys |= {f.name for step in steps for f in fields(STEPS[step])}
    if Quantize.name in steps:
        keys |= {f.name for f in fields(QUANTIZERS[Quantize.method])}  # type: ignore[arg-type]  # each is a dataclass
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")} - {""}
    return Options(verb, tuple(steps), frozenset(keys | typed))


@contextmanager
def speaking(options: Options) -> Iterator[None]:
    """Within the block, errors are told to somebody who typed `options`."""
    try:
        yield
    except SlimtuneError as error:
        raise options.renamed(error) from error


def typed(verb: str, keys: Iterable[str]) -> Options:
    """The options of a verb that is no step of a recipe but `evaluate`, by the names that its function has for them."""
    return Options(verb, (verb,), frozenset(keys))


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"
