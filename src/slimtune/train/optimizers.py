"""Optimizers that know what an adapter is. All others are transformers' own, by its names.

LoRA-GA starts with factors of one size on both sides; the usual start has B = 0 and a fixed size of A. What a step of a
given rate does depends on that, except under the Riemannian preconditioner, LoRA-RITE and LoRA-Pro, for which only the
product counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.optimizers.riemannian import create_riemannian_optimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from slimtune.errors import BackendMissing, RecipeError, nearest
from slimtune.lora.attach import adapted
from slimtune.train.options import TrainOptions
from slimtune.train.pairs import LoraPro, LoraRite

RATIO = 16.0
"""LoRA+: how much faster B learns than A (arXiv 2402.12354 finds 16 for language models)."""

DAMPING = 1e-2
"""Riemannian: what is added to `A Aᵀ` and `Bᵀ B` before they are inverted (PEFT's default)."""


def lora_plus(model: Any, options: TrainOptions) -> Optimizer:
    """AdamW with a higher rate for B (LoRA+, arXiv 2402.12354)."""
    rate, decay = options.learning_rate, options.weight_decay
    return create_loraplus_optimizer(
        model, AdamW, lr=rate, loraplus_lr_ratio=RATIO, loraplus_weight_decay=decay, loraplus_lr_embedding=rate
    )


def lora_fa(model: Any, options: TrainOptions) -> Optimizer:
    """B alone, by the gradient that is nearest to the full one (LoRA-FA, arXiv 2308.03303); A stays where it starts."""
    config = model.peft_config["default"]
    made = create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=options.learning_rate, weight_decay=options.weight_decay
    )
    return LoraFa(cast(Any, made.param_groups))


class LoraFa(LoraFAOptimizer):
    """PEFT's, whose state goes along when a layer is cut: that of a pair lies under the name of its layer."""

    def cut_(self, parameter: Tensor, dim: int, indices: Tensor) -> None:
        """Keep these rows of the moments of B, where `parameter` is one; of A there are none."""
        for group in self.param_groups:
            for name, one in zip(group["names"], group["params"], strict=True):
                layer, factor, _ = name.partition("lora_B")
                state = cast(Any, self.state).get(f"{layer}lora", {}) if one is parameter and factor else {}
                for key in {"exp_avg_B", "exp_avg_sq_B"} & state.keys():
                    state[key] = state[key].index_select(dim, indices)


def riemannian(model: Any, options: TrainOptions) -> Optimizer:
    """AdamW on gradients preconditioned by the other factor (arXiv 2402.02347): the size of each does not matter."""
    rate, decay = options.learning_rate, options.weight_decay
    return create_riemannian_optimizer(model, AdamW, lr=rate, reg=DAMPING, weight_decay=decay)


def lora_rite(model: Any, options: TrainOptions) -> Optimizer:
    """Adaptive steps that do not depend on how the product is shared (LoRA-RITE, arXiv 2410.20625)."""
    return LoraRite(_pairs(model), options.learning_rate, options.weight_decay)


def lora_pro(model: Any, options: TrainOptions) -> Optimizer:
    """AdamW on an equivalent gradient of the whole weight (LoRA-Pro, arXiv 2407.18242): rates of full fine-tuning."""
    return LoraPro(_pairs(model), options.learning_rate, options.weight_decay)


def _pairs(model: PeftModel) -> list[tuple[Tensor, Tensor, float]]:
    """What trains of A and of B in each layer, and the scaling of their product."""
    found = []
    for layer in adapted(model).values():
        (name,) = layer.active_adapters
        (a,), (b,) = (list(factors[name].parameters()) for factors in (layer.lora_A, layer.lora_B))
        found.append((a, b, float(layer.scaling[name])))
    others = {id(p) for p in model.parameters() if p.requires_grad} - {id(p) for pair in found for p in pair[:2]}
    if others:
        raise RecipeError(
            "this optimizer trains factors alone", where="optim", remedy="use optim: lora-plus, or leave out scales"
        )
    return found


OPTIMIZERS: dict[str, Callable[[Any, TrainOptions], Optimizer]] = {
    "lora-plus": lora_plus,
    "lora-fa": lora_fa,
    "riemannian": riemannian,
    "lora-rite": lora_rite,
    "lora-pro": lora_pro,
}
"""Those that need an adapter, by their recipe names."""


def own_optimizer(model: nn.Module, options: TrainOptions) -> Optimizer | None:
    """The optimizer that `optim` names where it is one of these; `None` where it is transformers' own.

    LoRA-FA freezes A. Raises `RecipeError` where there is no adapter, and what `require_tools` raises.
    """
    require_tools(options)
    if options.optim not in OPTIMIZERS:
        return None
    if not isinstance(model, PeftModel):
        raise RecipeError(
            "this optimizer trains adapters", where="optim", got=options.optim, remedy="put a lora step before train"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise RecipeError(
            "this optimizer runs in one process", where="optim", got=options.optim, remedy="use optim: adamw_torch"
        )
    return OPTIMIZERS[options.optim](model, options)


def require_tools(options: TrainOptions) -> None:
    """Raise `RecipeError` for an optimizer or a tracker that nobody knows, `BackendMissing` for one that is not
    installed."""
    ours, optim = [*OPTIMIZERS, "adamw_torch"], options.optim
    if optim not in (*ours, *(str(name.value) for name in OptimizerNames)):
        raise RecipeError("unknown optimizer", where="optim", got=optim, remedy=nearest(optim, ours))
    if optim not in OPTIMIZERS:
        try:
            Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=optim, use_cpu=True))  # looks for its package
        except (ImportError, ValueError) as error:
            remedy = f"install what it needs, or use optim: {TrainOptions.optim}"
            raise BackendMissing("the optimizer is not installed", where="optim", got=error, remedy=remedy) from error
    known, tracker = ["none", *INTEGRATION_TO_CALLBACK], options.report_to
    if tracker not in ("all", *known):
        raise RecipeError("unknown tracker", where="report_to", got=tracker, remedy=nearest(tracker, known))
    if tracker in ("none", "all"):
        return
    try:
        INTEGRATION_TO_CALLBACK[tracker]()  # which looks for its package
    except (ImportError, RuntimeError) as error:
        remedy = f"install {tracker}, or use report_to: none"
        raise BackendMissing("the tracker is not installed", where="report_to", got=error, remedy=remedy) from error
