"""Optimizers of adapters: what each moves, and exact resumption under each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers.riemannian import create_riemannian_optimizer
from torch import Tensor

from pico import pico_inputs, pico_model, pico_tokenizer
from slimtune import add_lora
from slimtune.calib.formats import normalise
from slimtune.errors import RecipeError
from slimtune.train.data import Collator, padding_id, tokenize
from slimtune.train.loop import _CountingTrainer, finetune
from slimtune.train.optimizers import OPTIMIZERS, RATIO, own_optimizer
from slimtune.train.options import TrainOptions

TOKENIZER = pico_tokenizer()
COLLATOR = Collator(padding_id(TOKENIZER))
ROWS = [{"prompt": f"{a} and {b}?", "completion": f"is {a + b}"} for a in range(4) for b in range(4)]
EXAMPLES = tokenize(normalise(ROWS), TOKENIZER, 96)[0]
each = pytest.mark.parametrize("optim", OPTIMIZERS)


def adapted(init: str = "default") -> Any:
    tokens = pico_inputs(pico_model("llama"), batch=4, length=20)["input_ids"]
    return add_lora(pico_model("llama"), r=3, init=init, tokens=tokens)


def options(optim: str, **changes: Any) -> TrainOptions:
    fields = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1}
    return TrainOptions(**{**fields, "optim": optim, **changes})


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Killed(BaseException):
    """What nothing catches."""


@each
@pytest.mark.parametrize("init", ["default", "lora-ga"])
def test_it_learns_and_resumes_bit_for_bit(
    optim: str, init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real, calls = adapted(init), _CountingTrainer.training_step, [0]
    before = tensors(whole)
    flags = [p.requires_grad for p in whole.parameters()]
    chosen = options(optim, save_steps=2, weight_decay=0.1)
    facts = finetune(whole, EXAMPLES, COLLATOR, chosen, held_out=EXAMPLES, checkpoints=tmp_path / "whole")
    assert facts.eval_loss_after is not None and facts.eval_loss_before is not None
    assert facts.eval_loss_after < facts.eval_loss_before
    assert [p.requires_grad for p in whole.parameters()] == flags
    moved = {name for name, tensor in tensors(whole).items() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert any("lora_A" in name for name in moved) == (optim != "lora-fa")

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_CountingTrainer, "training_step", step)
        with pytest.raises(Killed):
            finetune(adapted(init), EXAMPLES, COLLATOR, chosen, checkpoints=tmp_path / "run")
    model = adapted(init)
    finetune(model, EXAMPLES, COLLATOR, chosen, checkpoints=tmp_path / "run", resume=True)
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(model).items())


def test_lora_plus_is_faster_on_b() -> None:
    found = own_optimizer(adapted(), options("lora-plus"))
    assert found is not None
    rates = sorted({group["lr"] for group in found.param_groups if group["params"]})
    assert rates == pytest.approx([3e-3, RATIO * 3e-3])


def test_the_riemannian_step_does_not_see_how_the_product_is_shared() -> None:
    """Plain gradient descent does: `(10 A) (B / 10)` would move otherwise."""
    moved = []
    for share in (1.0, 10.0):
        model = adapted("lora-ga")
        layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        with torch.no_grad():
            a.live.mul_(share)
            b.live.div_(share)
        before = (b.live @ a.live).detach().clone()
        optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2, reg=1e-9)
        model(**pico_inputs(model), labels=pico_inputs(model)["input_ids"]).loss.backward()
        optimizer.step()
        moved.append((b.live @ a.live).detach() - before)
    torch.testing.assert_close(moved[0], moved[1], rtol=0.05, atol=1e-3 * float(moved[0].abs().max()))


@pytest.mark.parametrize("optim", ["lora-rite", "lora-pro"])
def test_optimizers_of_pairs_refuse_what_is_no_pair(optim: str) -> None:
    model = adapted()
    next(p for p in model.parameters() if not p.requires_grad).requires_grad_(True)
    with pytest.raises(RecipeError, match="factors alone"):
        own_optimizer(model, options(optim))


def test_unknown_names_and_models_without_an_adapter_are_refused() -> None:
    with pytest.raises(RecipeError, match="lora-plus"):
        own_optimizer(adapted(), options("lora-pluss"))
    for optim in OPTIMIZERS:
        with pytest.raises(RecipeError, match="trains adapters"):
            own_optimizer(pico_model("llama"), options(optim))
    assert own_optimizer(pico_model("llama"), options("adamw_torch")) is None
