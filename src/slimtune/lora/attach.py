"""LoRA through PEFT, on dense and quantized linears alike (LoRA: arXiv 2106.09685).

PEFT learns about `QuantLinear` by its own extension point, so the adapter that is trained is PEFT's, and so is the
file: `PeftModel.from_pretrained` loads it on the original 16-bit model without slimtune.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from slimtune.arch import ModelMap, bind
from slimtune.errors import FormatError, RecipeError, nearest
from slimtune.lora.fused import fused_lora
from slimtune.lora.inits import INITS
from slimtune.quant.blackbox import FROZEN, BlackBox, adopt_
from slimtune.quant.linear import QuantLinear

LoraLayer = PeftLoraLinear
"""PEFT's LoRA layer around a linear, dense or quantized."""


class LoraQuantLinear(PeftLoraLinear):
    """PEFT's LoRA layer around a `QuantLinear` or `BlackBox`. It saves as PEFT's own; it cannot merge into codes.

    With one plain adapter, base and adapter run as one function (`slimtune.lora.fused`) in the dtype of the input. All
    else (dropout in training, several adapters, DoRA and other variants) runs as in PEFT.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` is `[..., in_features]`; returns `[..., out_features]`."""
        base, active = self.get_base_layer(), self.active_adapters
        if (
            len(active) != 1
            or active[0] not in self.lora_A
            or args
            or kwargs
            or self.disable_adapters
            or self.merged
            or self.lora_variant
            or self.lora_bias[active[0]]
            or not isinstance(base, FROZEN)
            or (self.training and not isinstance(self.lora_dropout[active[0]], nn.Identity))
        ):
            return super().forward(x, *args, **kwargs)
        name = active[0]
        a, b = (
            self.lora_A.get_submodule(name).get_parameter("weight"),
            self.lora_B.get_submodule(name).get_parameter("weight"),
        )
        return fused_lora(x, base, a, b, self.scaling[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Packed codes cannot take a low-rank update: merge with `slimtune.merge`, which makes the base dense first."""
        if isinstance(self.get_base_layer(), FROZEN):
            raise RecipeError(
                "an adapter cannot be merged into packed weights",
                remedy="use slimtune.merge (or the recipe step merge: {}), which writes a dense 16-bit model",
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


def add_lora(
    model: nn.Module,
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    init: str = "default",
    base_name: str = "",
    seed: int = 0,
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
        base_name: what `adapter_config.json` calls the base: the original model, whose users can load the adapter.
        seed: of the random factors.

    Raises `RecipeError` when a target matches no linear, the model has an adapter already, or `init` asks for what
    quantization lost and no target was quantized so that it is known.
    """
    if isinstance(model, PeftModel):
        raise RecipeError("the model has an adapter already", remedy="merge it before adding another")
    if r < 1:
        raise RecipeError("r out of range", got=r, wanted="a positive number")
    adopt_(model)
    modelmap = bind(model)
    config = LoraConfig(
        r=r,
        lora_alpha=cast(int, lora_alpha),
        lora_dropout=lora_dropout,
        target_modules=resolve_targets(modelmap, model, target_modules),
        use_rslora=use_rslora,
        init_lora_weights=cast(Any, INITS[init].peft),
        task_type="SEQ_2_SEQ_LM" if cast(Any, model).config.is_encoder_decoder else "CAUSAL_LM",
    )
    if INITS[init].start is not None and not any(layer.start for layer in _quantized(model)):
        raise RecipeError(
            "nothing is known of what quantization lost",
            where="init",
            got=init,
            remedy="quantize in the same recipe, or with slimtune.quantize(..., residual_rank=r)",
        )
    _know_quantized(config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        wrapped = cast(PeftModel, get_peft_model(cast(Any, model), config))
    if INITS[init].start is not None:
        _start_(wrapped)
    for layer in _quantized(wrapped):
        layer.start = None
    if base_name:  # PEFT puts the folder that the model was loaded from
        wrapped.peft_config["default"].base_model_name_or_path = base_name
    return wrapped


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> PeftModel:
    """`model` with the stock PEFT adapter in `folder`. Raises `FormatError` when it is not one, or does not fit."""
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise FormatError(
            "not an adapter folder", where=str(folder), wanted="adapter_config.json and adapter_model.safetensors"
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
        name = config.base_model_name_or_path
        _know_quantized(config)
        adopt_(model)
        with _quiet():
            wrapped = PeftModel.from_pretrained(cast(Any, model), str(folder), config=config, is_trainable=trainable)
    except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
        raise FormatError("the adapter does not fit the model", where=str(folder), got=str(error)[:300]) from error
    wrapped.peft_config["default"].base_model_name_or_path = name
    return wrapped


def resolve_targets(modelmap: ModelMap, model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The linears that `targets` names, as the shortest list PEFT understands.

    That is the last components of their names where those name nothing else in the model, full names otherwise (LLaVA's
    vision tower uses the same words as its language model).
    """
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
    last = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    named = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in last}
    return last if named == set(chosen) else sorted(set(chosen))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings about a layer type it has just been told of, and about transformers' newer names."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Unsupported layer type .*(QuantLinear|BlackBox)", category=UserWarning
        )
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def _quantized(model: nn.Module) -> list[QuantLinear]:
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


def _know_quantized(config: LoraConfig) -> None:
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
