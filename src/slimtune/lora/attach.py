"""LoRA through PEFT, on dense and quantized linears alike (LoRA: arXiv 2106.09685).

PEFT learns about `QuantLinear` by its own extension point, so the adapter that is trained is PEFT's, and so is the
file: `PeftModel.from_pretrained` loads it on the original 16-bit model without slimtune.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from slimtune.arch import ModelMap, bind
from slimtune.calib.cpu import cpu_kernels
from slimtune.calib.gradients import Batch, GradientSketch, sketch_gradients
from slimtune.calib.loss import chunked_loss
from slimtune.calib.sums import Kind
from slimtune.errors import FormatError, RecipeError, nearest
from slimtune.files import write_json
from slimtune.linalg.lowrank import Factors
from slimtune.lora.fused import Adapted, SideBySide, fused_lora
from slimtune.lora.inits import INITS, PLAIN, WORDS, Knobs
from slimtune.lora.pooled import NO_GROUPS, pool_
from slimtune.lora.start import StartFact, live_ranks, parts, split_layer_, start_, total_alpha
from slimtune.quant.blackbox import FROZEN, BlackBox, adopt_
from slimtune.quant.linear import QuantLinear
from slimtune.rotate.online import attach_online_
from slimtune.rotate.record import fingerprint, require_basis, rotation_of, write_hash

LIVE = "slimtune_lora.json"
"""Beside an adapter that is frozen in part: the rank that trains, of each layer: first rows of A and columns of B."""

LoraLayer = PeftLoraLinear
"""PEFT's LoRA layer around a linear, dense or quantized."""


class LoraQuantLinear(PeftLoraLinear):
    """PEFT's LoRA layer around a `QuantLinear` or `BlackBox`. It saves as PEFT's own; it cannot merge into codes.

    With one plain adapter, base and adapter run as one function (`slimtune.lora.fused`) in the dtype of the input, in
    training together with the others that read it. All else (dropout in training, several adapters, DoRA and other
    variants, prepared layers) runs as in PEFT.
    """

    side_by_side: SideBySide | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` is `[..., in_features]`; returns `[..., out_features]`."""
        own = None if args or kwargs else self.plain_parts()
        if own is None:
            return super().forward(x, *args, **kwargs)
        together = self.side_by_side.output(self, x) if self.side_by_side is not None else None
        return fused_lora(x, [own])[0] if together is None else together

    def plain_parts(self) -> Adapted | None:
        """The packed base and its one plain adapter; `None` where there is more or less to do than with those."""
        base, active = self.get_base_layer(), self.active_adapters
        if (
            len(active) != 1
            or active[0] not in self.lora_A
            or self.disable_adapters
            or self.merged
            or self.lora_variant
            or self.lora_bias[active[0]]
            or not isinstance(base, FROZEN)
            or (isinstance(base, QuantLinear) and base.tuning is not None)
            or (isinstance(base, QuantLinear) and base.small is not None and not torch.is_grad_enabled())
            or (self.training and not isinstance(self.lora_dropout[active[0]], nn.Identity))
        ):
            return None
        name = active[0]
        a, b = (cast(nn.Linear, factors.get_submodule(name)).weight for factors in (self.lora_A, self.lora_B))
        return Adapted(base, a, b, self.scaling[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Packed codes cannot take a low-rank update: merge with `slimtune.merge`, which makes the base dense first."""
        if isinstance(self.get_base_layer(), FROZEN):
            raise RecipeError(
                "an adapter cannot be merged into packed weights",
                remedy="use slimtune.merge (or the recipe step merge: {}), which writes a dense 16-bit model",
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


@contextmanager
def side_by_side(model: nn.Module) -> Iterator[None]:
    """Within the block, adapted packed linears of `model` that read one input compute as one function.

    Not where processes share a model: there the weights of one linear may be at hand while another runs, and no more.
    """
    modules, together = adapted(model), []
    if not (dist.is_available() and dist.is_initialized()):
        for block in bind(model).blocks:
            stages = [[modules.get(port.name) for port in ports] for ports in block.stages]
            found = [[each for each in stage if type(each) is LoraQuantLinear] for stage in stages]
            together += [SideBySide(layers) for layers in found if len(layers) > 1]
    try:
        for group in together:
            for layer in group.layers:
                layer.side_by_side = group
        yield
    finally:
        for group in together:
            group.forget()
            for layer in group.layers:
                layer.side_by_side = None


def add_lora(
    model: nn.Module,
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    init: str = "default",
    knobs: Knobs = PLAIN,
    gradients: GradientSketch | None = None,
    ranks: Mapping[str, int] | None = None,
    keep_residual: bool = False,
    pooled: bool = False,
    base_name: str = "",
    seed: int = 0,
    facts: Callable[[list[StartFact]], None] = lambda _: None,
) -> PeftModel:
    """Wrap `model` (changed in place) in a `PeftModel` with fresh LoRA factors on the chosen linears.

    Args:
        model: a Hugging Face model, dense or quantized, by slimtune or by others, without an adapter.
        r: rank of the factors.
        lora_alpha: the update is scaled by `lora_alpha / r` (`/ sqrt(r)` with `use_rslora`).
        lora_dropout: dropout on the adapter's input.
        target_modules: `all-linear` (every linear inside the blocks), or names, or one regular expression.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        init: how the factors start: a name in `slimtune.lora.inits.INITS`.
        knobs: what can be chosen of it.
        gradients: of the targets, or their moments (`sketch_targets`), for an init that starts from them.
        ranks: other ranks than `r` for layers by name; the scaling of a layer follows its rank, as in PEFT.
        keep_residual: give back what quantization lost, as a frozen part of the adapter.
        pooled: one number of A for each quantization group (`slimtune.lora.pooled`).
        base_name: what `adapter_config.json` calls the base: the original model, whose users can load the adapter.
        seed: of the random factors.
        facts: called with how each layer started.

    The base is not changed. Where an init subtracts its start again, or the residual is kept, the adapter PEFT sees has
    two or three times the rank that trains, `lora_alpha` is raised so that the scaling stays, and the rest is frozen.

    Raises `RecipeError` when a target matches no linear, the model has an adapter already, or `init` asks for what
    quantization lost and no target was quantized so that it is known.
    """
    _check(model, r, init, gradients)
    adopt_(model)
    modelmap = bind(model)
    times = parts(init, keep_residual)
    others = {name: rank for name, rank in (ranks or {}).items() if rank != r}
    config = LoraConfig(
        r=times * r,
        lora_alpha=cast(int, total_alpha(lora_alpha, times, use_rslora)),
        lora_dropout=lora_dropout,
        target_modules=resolve_targets(modelmap, model, target_modules),
        rank_pattern={name: times * rank for name, rank in others.items()},
        use_rslora=use_rslora,
        init_lora_weights=cast(Any, INITS[init].peft),
        task_type="SEQ_2_SEQ_LM" if cast(Any, model).config.is_encoder_decoder else "CAUSAL_LM",
    )
    from_residual = INITS[init].start is not None or keep_residual
    if from_residual and not any(layer.start for layer in quantized(model)):
        raise RecipeError(
            "nothing is known of what quantization lost",
            where="init",
            got=init,
            remedy="quantize in the same recipe, or with slimtune.quantize(..., residual_rank=r)",
        )
    _knowquantized(config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        wrapped = cast(PeftModel, get_peft_model(cast(Any, model), config))
    if INITS[init].start is not None:
        _start_(wrapped)
    if INITS[init].factors is not None or keep_residual:
        facts(start_(adapted(wrapped), init, knobs, gradients=gradients, keep_residual=keep_residual, seed=seed))
    for layer in quantized(wrapped):
        layer.start = None
    if base_name:  # PEFT puts the folder that the model was loaded from
        wrapped.peft_config["default"].base_model_name_or_path = base_name
    if pooled and not pool_(adapted(wrapped), fresh=True):
        what, remedy = NO_GROUPS
        raise RecipeError(what, where="pooled", remedy=remedy)
    attach_online_(wrapped.get_base_model())
    return wrapped


def _check(model: nn.Module, r: int, init: str, gradients: GradientSketch | None) -> None:
    if isinstance(model, PeftModel):
        raise RecipeError("the model has an adapter already", remedy="merge it before adding another")
    if r < 1:
        raise RecipeError("r out of range", got=r, wanted="a positive number")
    if init not in INITS:
        raise RecipeError("unknown init", where="init", got=init, remedy=nearest(init, INITS))
    way = INITS[init]
    if way.directions and (gradients is None or gradients.of != way.of):
        raise RecipeError(
            f"this init starts from {WORDS[way.of]}",
            where="init",
            got=init if gradients is None else f"{init}, and a sketch of {WORDS[gradients.of]}",
            remedy="pass batches of tokens and labels",
        )


def sketch_targets(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    directions: int,
    of: Kind = "gradient",
    target_modules: str | Sequence[str] = "all-linear",
    keep_residual: bool = False,
    **options: Any,
) -> GradientSketch:
    """The sketched gradients, or moments (`calib.gradients`, whose `options` these are), of the linears an adapter
    would go to. Those of one stage share their inputs.

    With `keep_residual`, at the weights as the adapter will make them: with what quantization lost. Raises
    `RecipeError` when a target matches no linear, or an adapter is merged into the base.
    """
    merged = [name for name, layer in adapted(model).items() if layer.merged]
    if merged:
        raise RecipeError(
            "an adapter is merged into the base", where=merged[0], remedy="unmerge it, or unload it: merge_and_unload()"
        )
    adopt_(base_of(model))
    modelmap, modules = bind(model), plain(model)
    chosen = targets_of(modelmap, target_modules)
    first = _first_readers(modelmap, chosen) if of == "inputs" else {name: name for name in chosen}
    layers = {name: modules[name] for name in dict.fromkeys(first.values())}
    base = base_of(model)
    with ExitStack() as stack:
        stack.enter_context(cpu_kernels(base))
        if "loss" not in options and cast(Any, base).get_output_embeddings() not in layers.values():
            stack.enter_context(chunked_loss(base))
        for layer in layers.values():
            if keep_residual and isinstance(layer, QuantLinear) and layer.start is not None:
                stack.callback(layer.register_forward_hook(_adding(layer.start)).remove)
        found = sketch_gradients(base, layers, batches, directions=directions, of=of, **options)
    return replace(found, layers={name: found.layers[first[name]] for name in chosen}, basis=basis_of(model))


def basis_of(model: nn.Module) -> str:
    """The hash of the basis that `model` lives in; empty where it is not rotated."""
    basis = rotation_of(model)
    return fingerprint(basis) if basis is not None else ""


def _first_readers(modelmap: ModelMap, chosen: Sequence[str]) -> dict[str, str]:
    """For each of `chosen` the first of them that reads the same input."""
    stages = [[port.name for port in ports] for block in modelmap.blocks for ports in block.stages]
    stage_of = {name: number for number, names in enumerate(stages) for name in names}
    first: dict[object, str] = {}
    return {name: first.setdefault(stage_of.get(name, name), name) for name in chosen}


def _adding(factors: Factors) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    a, b = factors

    def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (args[0] @ a.T.to(args[0].dtype)) @ b.T.to(args[0].dtype)

    return add


def adapted(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers in `model`, by the names that the linears have without an adapter."""
    modules = base_of(model).named_modules()
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> PeftModel:
    """`model` with the stock PEFT adapter in `folder`.

    Raises `FormatError` when it is not one, does not fit, or was trained in another basis than the model's.
    """
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise FormatError(
            "not an adapter folder", where=str(folder), wanted="adapter_config.json and adapter_model.safetensors"
        )
    require_basis(model, folder)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        name = config.base_model_name_or_path
        _knowquantized(config)
        adopt_(model)
        with _quiet():
            wrapped = PeftModel.from_pretrained(cast(Any, model), str(folder), config=config, is_trainable=trainable)
    except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
        raise FormatError("the adapter does not fit the model", where=str(folder), got=str(error)[:300]) from error
    wrapped.peft_config["default"].base_model_name_or_path = name
    attach_online_(wrapped.get_base_model())
    if trainable:
        pool_(adapted(wrapped))
    if trainable and (folder / LIVE).is_file():
        _split_again_(wrapped, folder / LIVE)
    return wrapped


def save_adapter(model: PeftModel, folder: Path, base_name: str = "") -> None:
    """Write the active adapter to the existing `folder` as PEFT does, for the base called `base_name` if given; where a
    part of it is frozen, a note of what trains (`LIVE`); on a rotated model, the hash of the basis it was trained
    in."""
    # Only linears are adapted. Left to itself, PEFT asks the hub whether the vocabulary has grown.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT's order is a set's, another in each process
    write_json(path, {**config, "base_model_name_or_path": base_name or config["base_model_name_or_path"]})
    ranks = live_ranks(adapted(model))
    if ranks:
        write_json(folder / LIVE, {"live_rank": ranks})
    basis = rotation_of(model)
    if basis is not None:
        write_hash(basis, folder)


def _split_again_(model: nn.Module, note: Path) -> None:
    try:
        ranks: dict[str, int] = json.loads(note.read_text(encoding="utf-8"))["live_rank"]
        layers = adapted(model)
        for name, rank in ranks.items():
            split_layer_(layers[name], rank)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FormatError(
            "the note of what trains does not fit the adapter", where=str(note), got=str(error)
        ) from error


def resolve_targets(modelmap: ModelMap, model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The linears that `targets` names, as the shortest list PEFT understands.

    That is the last components of their names where those name nothing else in the model, full names otherwise (LLaVA's
    vision tower uses the same words as its language model).
    """
    chosen = targets_of(modelmap, targets)
    last = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    named = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in last}
    return last if named == set(chosen) else sorted(chosen)


def targets_of(modelmap: ModelMap, targets: str | Sequence[str]) -> list[str]:
    """The names of the linears that `targets` names. Raises `RecipeError` where it names none."""
    linears = [port.name for port in modelmap.ports if port.kind == "linear"]
    if targets == "all-linear":
        chosen = [port.name for port in modelmap.linears]
    elif isinstance(targets, str):
        try:
            chosen = [name for name in linears if re.fullmatch(targets, name)]
        except re.error as error:
            raise RecipeError("target_modules is not a regular expression", got=targets, wanted=str(error)) from error
        if not chosen:
            raise RecipeError("target_modules matches no linear", got=targets, remedy=f"linears are like {linears[0]}")
    else:
        chosen = []
        for target in targets:
            matched = [name for name in linears if name == target or name.endswith(f".{target}")]
            if not matched:
                words = {name.rsplit(".", 1)[-1] for name in linears}
                raise RecipeError(
                    "no linear has this name", where="target_modules", got=target, remedy=nearest(target, words)
                )
            chosen.extend(matched)
    if not chosen:
        raise RecipeError("there is nothing to adapt", where="target_modules", got=targets, wanted="a name or more")
    return list(dict.fromkeys(chosen))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings about a layer type it has just been told of, and about transformers' newer names."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Unsupported layer type .*(QuantLinear|BlackBox)", category=UserWarning
        )
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def quantized(model: nn.Module) -> list[QuantLinear]:
    """Its packed linears."""
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@torch.no_grad()
def _start_(model: nn.Module) -> None:
    """Give the factors of each quantized layer what was kept for them; where that has a lower rank, the rest of A stays
    as it is, and the rest of B zero."""
    for layer in model.modules():
        if isinstance(layer, LoraQuantLinear) and (start := cast(QuantLinear, layer.get_base_layer()).start):
            a, b = (cast(Tensor, factors["default"].weight) for factors in (layer.lora_A, layer.lora_B))
            rank, share = min(len(a), len(start.a)), layer.scaling["default"] ** -0.5
            a[:rank] = share * start.a[:rank]
            b[:, :rank] = share * start.b[:, :rank]


def _knowquantized(config: LoraConfig) -> None:
    config._register_custom_module(dict.fromkeys(FROZEN, LoraQuantLinear))


def has_adapter(model: nn.Module) -> bool:
    """Whether `model` is a `PeftModel`."""
    return isinstance(model, PeftModel)


def base_of(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a `PeftModel`, or `model` itself where there is no adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def plain(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the model without its adapter, by the names they have there.

    LoRA layers are looked through: `q_proj` is the base layer, and the factors are not listed. Nor is what is inside a
    black box.
    """
    modules: dict[str, nn.Module] = {}
    hidden: list[str] = []
    for name, module in base_of(model).named_modules():
        if any(name.startswith(prefix) for prefix in hidden):
            continue
        if isinstance(module, BaseTunerLayer):
            hidden.append(f"{name}.")
            modules[name] = module.get_base_layer()
        else:
            modules[name] = module
            if isinstance(module, BlackBox):
                hidden.append(f"{name}.")
    return modules
