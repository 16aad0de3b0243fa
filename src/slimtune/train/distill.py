"""Learning from the model's own unpruned self: the same weights with all gates open and adapters off.

No second model is held, and no logits of the whole batch: the head runs inside the divergence, a few tokens at a time,
for the teacher and the student together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad

from slimtune.errors import RecipeError
from slimtune.lora.attach import base_of
from slimtune.train.loss import CHUNK, has_plain_head
from slimtune.train.pruning import Ramp


class _HeadDivergence(torch.autograd.Function):
    """Sum of `KL(softmax(teacher Wᵀ + b) || softmax(student Wᵀ + b))`; a gradient to the student alone."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        to_student = torch.empty_like(student)
        for start in range(0, len(student), CHUNK):
            rows = slice(start, start + CHUNK)
            log_p, log_q = (
                log_softmax(torch.nn.functional.linear(h[rows], weight, bias), -1, dtype=wide)
                for h in (teacher, student)
            )
            p = log_p.exp()
            total = total + (p * (log_p - log_q)).sum()
            torch.mm(log_q.exp_().sub_(p).to(student.dtype), weight, out=to_student[rows])
        ctx.save_for_backward(to_student)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (to_student,) = ctx.saved_tensors
        return to_student * grads[0].to(to_student.dtype), None, None, None


def head_divergence(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum over tokens, in nats, of the divergence of the student's predictions from the teacher's.

    Args:
        student: hidden states at the head's input, `[tokens, features]`.
        teacher: the same of the teacher.
        weight: the head, `[vocabulary, features]`, frozen.
        bias: `[vocabulary]`.

    Example:
        >>> student, teacher, head = torch.randn(6, 8), torch.randn(6, 8), torch.randn(20, 8)
        >>> p, q = ((h @ head.T).log_softmax(-1) for h in (teacher, student))
        >>> wanted = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
        >>> bool(torch.allclose(head_divergence(student, teacher, head), wanted, rtol=1e-4))
        True
    """
    return cast(Tensor, _HeadDivergence.apply(student, teacher.detach(), weight.detach(), bias))


def require_plain_head(base: nn.Module) -> None:
    """Raise `RecipeError` where the logits of a model are not simply its head's outputs."""
    if not has_plain_head(base):
        raise RecipeError(
            "this model's logits are not its head's outputs, which distillation needs",
            where="train.distill",
            got=type(base).__name__,
            remedy="set distill: false",
        )


@torch.no_grad()
def unpruned(model: PeftModel, ramp: Ramp, inputs: dict[str, Any]) -> Tensor:
    """What the unpruned model hands to its head, `[batch, length, features]`."""
    training = model.training
    model.eval()
    with ramp.probe.opened(), model.disable_adapter(), _bare_head(base_of(model)):
        hidden = _hidden(model, inputs)
    model.train(training)
    return hidden


def distilled_loss(
    model: nn.Module,
    base: nn.Module,
    teacher: Tensor,
    inputs: dict[str, Any],
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The mean divergence from the teacher over the tokens that are learnt, nats a token.

    `base` is the Hugging Face model inside `model`; `teacher` is what `unpruned` returned. `num_items_in_batch` is the
    number of learnt tokens of the whole optimizer step, where a batch is a part of one.
    """
    with _bare_head(base):
        hidden = _hidden(model, inputs)
    following = pad(inputs["labels"], (0, 1), value=-100)[..., 1:]
    learnt = (following.reshape(-1) >= 0).nonzero().squeeze(1)
    head: Any = cast(Any, base).get_output_embeddings()
    dtype = hidden.dtype
    weight = head.weight.to(dtype)
    bias = None if head.bias is None else head.bias.to(dtype)
    student, wanted = (h.reshape(-1, h.shape[-1])[learnt].to(dtype) for h in (hidden, teacher))
    total = head_divergence(student, wanted, weight, bias)
    return total / (max(len(learnt), 1) if num_items_in_batch is None else num_items_in_batch)


def _hidden(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What a model with a bare head hands to it."""
    return cast(Tensor, model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits)


@contextmanager
def _bare_head(base: nn.Module) -> Iterator[None]:
    """Within the block the model's logits are its head's inputs."""
    head: Any = cast(Any, base).get_output_embeddings()
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
