"""What a recipe may say. Every value is a frozen dataclass; its fields are the YAML keys and the command line's
options.

No torch is imported here. The fields of a quantizer are those of its own dataclass and are checked when the recipe is
resolved, see `slimtune.recipe.treatments`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from slimtune.calib.rows import DataSource
from slimtune.errors import RecipeError, SlimtuneError, nearest
from slimtune.lora.options import FakeQuant, LoraOptions
from slimtune.prune.options import PruneOptions
from slimtune.rotate.options import Rotation
from slimtune.train.options import TrainOptions

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Where text comes from."""

    train: DataSource | None = field(default=None, metadata={"help": "what train steps learn"})
    eval: DataSource | None = field(default=None, metadata={"help": "held-out rows, for the loss before and after"})
    calibration: DataSource | None = field(default=None, metadata={"help": "text quantizers look at; default: train"})


@dataclass(frozen=True)
class Quantize:
    """Weights to few bits, and the inputs of linears where `activations` says so. Every other key is a field of the
    method (`slimtune list quantizers`)."""

    name: ClassVar[str] = "quantize"

    method: str = field(default="optq", metadata={"help": "a name from `slimtune list quantizers`"})
    ignore: tuple[str, ...] = field(default=(), metadata={"help": "layers to leave alone, * wildcards allowed"})
    activations: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "how inputs are rounded, {bits: 8}; default: not at all"}
    )
    layers: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "other fields for some layers: {NAME: {bits: 8}}, * wildcards allowed"}
    )
    kv_cache: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "how keys and values are rounded, {bits: 8}; default: not at all"}
    )
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "the method's own fields"})


@dataclass(frozen=True)
class Rotate(Rotation):
    """A change of basis that leaves the outputs alone and spreads activations evenly."""

    name: ClassVar[str] = "rotate"
    least_seed: ClassVar[int] = -1

    seed: int = field(default=-1, metadata={"help": "of the random signs or matrix; -1: the recipe's"})
    stream: bool = field(default=False, metadata={"help": "from file to file, with one block of weights in memory"})

    @property
    def rotation(self) -> Rotation:
        """Which rotation."""
        return Rotation(**{f.name: getattr(self, f.name) for f in fields(Rotation)})


@dataclass(frozen=True)
class Prune(PruneOptions):
    """Fewer channels, heads or layers: at once, or along the train step that follows."""

    name: ClassVar[str] = "prune"


@dataclass(frozen=True)
class Lora(LoraOptions):
    """A fresh LoRA adapter on the model as it is."""

    name: ClassVar[str] = "lora"


@dataclass(frozen=True)
class Train(TrainOptions):
    """Fine-tuning on `data.train`."""

    name: ClassVar[str] = "train"


@dataclass(frozen=True)
class Merge:
    """The adapter folded into dense weights, or into the packed ones where `keep_bits`."""

    name: ClassVar[str] = "merge"

    dtype: Literal["", "float32", "bfloat16", "float16"] = field(default="", metadata={"help": "default: the recipe's"})
    keep_bits: bool = field(default=False, metadata={"help": "quantize the sums again, each as its layer was"})
    tolerance: float = field(
        default=0.05, metadata={"help": "keep_bits: the share by which perplexity on the calibration text may rise"}
    )
    force: bool = field(default=False, metadata={"help": "keep_bits: go on above the tolerance"})

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise RecipeError("tolerance out of range", got=self.tolerance, wanted="0 or more")
        if self.keep_bits and self.dtype:
            raise RecipeError("packed weights have no dtype", where="dtype", got=self.dtype, remedy="leave it out")


@dataclass(frozen=True)
class Evaluate:
    """Measuring the model as it is."""

    name: ClassVar[str] = "evaluate"

    perplexity: dict[str, DataSource] = field(
        default_factory=dict, metadata={"help": "a name for each text file, or {builtin: pydocs}"}
    )
    accuracy: dict[str, DataSource] = field(
        default_factory=dict, metadata={"help": "a name for each file of prompts with one of a few replies"}
    )
    rouge: dict[str, DataSource] = field(
        default_factory=dict, metadata={"help": "a name for each file of prompts with replies to compare with"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "tokens of a reply that is compared"})
    length: int = field(default=512, metadata={"help": "tokens of a perplexity window"})
    max_tokens: int = field(default=-1, metadata={"help": "tokens of a text to use; -1: all of it"})
    tasks: tuple[str, ...] = field(
        default=(),
        metadata={"help": "lm-eval task names, files of multiple-choice rows, or lm-eval YAML files over local data"},
    )
    limit: int = field(default=-1, metadata={"help": "items of a task or file; -1: all"})
    num_fewshot: int = field(default=-1, metadata={"help": "examples before each item of a task; -1: the task's own"})
    speed: bool = field(default=False, metadata={"help": "measure prefill and decode tokens per second"})

    def __post_init__(self) -> None:
        for name, least in (("num_fewshot", 0), ("length", 2), ("max_tokens", 2), ("limit", 1), ("max_new_tokens", 1)):
            value, optional = getattr(self, name), getattr(Evaluate, name) == -1
            if value < least and not (optional and value == -1):
                wanted = f"at least {least}" + ", or -1" * optional
                raise RecipeError(f"{name} out of range", got=value, wanted=wanted)

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """What is read to measure."""
        return *self.perplexity.values(), *self.accuracy.values(), *self.rouge.values()


@dataclass(frozen=True)
class Export:
    """A copy of the result in a format other engines load."""

    name: ClassVar[str] = "export"

    format: str = field(default="safetensors", metadata={"help": "a name from `slimtune list exporters`"})
    quantization: str = field(
        default="", metadata={"help": "gguf(-deci): f32, f16 (default), bf16, q8_0, q4_0 or q4_1"}
    )
    rank: int = field(default=0, metadata={"help": "peft, gguf-lora: cut to this rank, the loss stated; 0: whole"})

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise RecipeError("rank out of range", got=self.rank, wanted="1 or more, or 0 for the whole adapter")


Step = Prune | Rotate | Quantize | Lora | Train | Merge | Evaluate | Export
STEPS: dict[str, type[Step]] = {
    step.name: step for step in (Prune, Rotate, Quantize, Lora, Train, Merge, Evaluate, Export)
}
"""Every step by its key in a recipe."""


@dataclass(frozen=True)
class Recipe:
    """A model, data, and the steps from one to the other."""

    model: str = field(metadata={"help": "a hub id, a folder, a .gguf file, or a bundled name"})
    steps: tuple[Step, ...] = field(metadata={"help": "what to do, in this order"})
    name: str = field(default="recipe", metadata={"help": "the run folder's name; default: the file's"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "of dense weights"})
    data: Data = field(default_factory=Data, metadata={"help": "train, eval and calibration"})

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise RecipeError("seed out of range", got=self.seed, wanted="0 to 4294967295")


def recipe_from(facts: object, *, name: str = "recipe") -> Recipe:
    """The recipe that plain YAML values describe. Raises `RecipeError` naming the key, the value and what was
    wanted."""
    top = dict(_mapping(facts, "the recipe"))
    steps = top.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RecipeError("the recipe has no steps", where="steps", got=steps, wanted="a list with at least one step")
    top["steps"] = []
    top.setdefault("name", name)
    _known(top, [f.name for f in fields(Recipe)], "the recipe")
    data = dict(_mapping(top.pop("data", None) or {}, "data"))
    _known(data, [f.name for f in fields(Data)], "data")
    sources = {key: _source(value, f"data.{key}") for key, value in data.items() if value is not None}
    header = build(Recipe, {**top, "steps": ()}, "")
    return replace(header, data=Data(**sources), steps=tuple(_step(step, i) for i, step in enumerate(steps)))


def step_from(name: str, facts: Mapping[str, Any], where: str) -> Step:
    """One step from its plain values."""
    if name not in STEPS:
        raise RecipeError("unknown step", where=where, got=name, remedy=nearest(name, STEPS))
    where = f"{where}.{name}" if where else name
    for key in ("perplexity", "accuracy", "rouge") if name == Evaluate.name else ():
        if isinstance(texts := facts.get(key), Mapping):
            facts = {**facts, key: {k: _source(v, f"{where}.{key}.{k}") for k, v in texts.items()}}
    if name == Train.name and facts.get("fake_quant") is not None:
        facts = {**facts, "fake_quant": build(FakeQuant, facts["fake_quant"], f"{where}.fake_quant")}
    if name != Quantize.name:
        return build(STEPS[name], facts, where)
    own = {f.name for f in fields(Quantize)} - {"options"}
    options = {k: v for k, v in facts.items() if k not in own}
    return build(Quantize, {**{k: v for k, v in facts.items() if k in own}, "options": options}, where)


def build(cls: type[T], facts: object, where: str) -> T:
    """A `cls` (a dataclass) from plain values, checked and coerced. Unknown keys name the nearest valid one."""
    values = _mapping(facts, where)
    valid = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    _known(values, valid, where)
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if missing:
        raise RecipeError("a key is missing", where=where or "the recipe", wanted=", ".join(missing))
    hints = get_type_hints(cls)
    try:
        built = TypeAdapter(cls).validate_python({k: _literal(v, hints[k]) for k, v in values.items()})
    except SlimtuneError as error:  # raised by the dataclass itself, which does not know where it stands
        raise error.within(where) from error
    except ValidationError as error:
        raise _misfit(error, values, where) from error
    for name in valid:
        if isinstance(value := getattr(built, name), float) and not math.isfinite(value):
            place = ".".join(filter(None, (where, name)))
            raise RecipeError(f"{name} out of range", where=place, got=value, wanted="a finite number")
    return built


def to_dict(value: Any) -> Any:
    """Plain values of a recipe or a part of it, every default included: what `recipe.yaml` holds."""
    if isinstance(value, Recipe):
        return {f.name: to_dict(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Quantize):
        extra = {"activations": to_dict(value.activations), "layers": to_dict(value.layers), "kv_cache": value.kv_cache}
        facts = {"method": value.method, **to_dict(value.options), "ignore": list(value.ignore)}
        return {value.name: facts | {key: values for key, values in extra.items() if values}}
    if isinstance(value, tuple(STEPS.values())):
        return {cast(Step, value).name: {f.name: to_dict(getattr(value, f.name)) for f in fields(cast(Step, value))}}
    if is_dataclass(value) and not isinstance(value, type):
        pairs = {f.name: to_dict(getattr(value, f.name)) for f in fields(value)}
        return {k: v for k, v in pairs.items() if v not in (None, "", {})}
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return value


def _step(facts: object, number: int) -> Step:
    where = f"steps[{number}]"
    if isinstance(facts, str):
        facts = {facts: {}}
    pair = _mapping(facts, where)
    if len(pair) != 1:
        raise RecipeError("a step has one key, its name", where=where, got=", ".join(map(str, pair)) or "nothing")
    ((name, values),) = pair.items()
    return step_from(str(name), _mapping(values if values is not None else {}, f"{where}.{name}"), where)


def _source(value: object, where: str) -> DataSource:
    if isinstance(value, DataSource):
        return value
    return build(DataSource, {"path": value} if isinstance(value, str) else value, where)


def _known(values: Mapping[str, Any], valid: list[str], where: str) -> None:
    for key in values:
        if key not in valid:
            raise RecipeError("unknown key", where=where or "the recipe", got=key, remedy=nearest(str(key), valid))


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError("expected keys and values", where=where, got=repr(value)[:80])
    return value


def _literal(value: object, wanted: Any) -> object:
    """`value` with what pydantic would misread set right: one name is a list of one, and `true` is no number."""
    if wanted == tuple[str, ...] and isinstance(value, str):
        return [value]
    return str(value).lower() if isinstance(value, bool) and wanted in (int, float) else value


def _misfit(error: ValidationError, values: Mapping[str, Any], where: str) -> RecipeError:
    """What pydantic says of the first value that does not fit; of a union, everything that would."""
    key = str(error.errors()[0]["loc"][0])
    facts = [fact for fact in error.errors() if str(fact["loc"][0]) == key]
    wanted = [fact["msg"].removeprefix("Input should be ").replace("valid tuple", "list") for fact in facts]
    return RecipeError(
        "a value is not what it should be",
        where=".".join(part for part in (where, key) if part),
        got=f"{values[key]!r:.200}",
        wanted=" or ".join(dict.fromkeys(wanted)),
    )
