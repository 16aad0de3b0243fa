"""Learning from the model's own unpruned self: the same weights with all gates open and adapters off.

No second model is held, and no logits of the whole batch: the head runs inside the divergence, a few tokens at a time,
for the teacher and the student together. Or the teacher is asked once, before training (`train/teacher.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad

from slimtune.calib.loss import CHUNK, has_plain_head
from slimtune.errors import RecipeError
from slimtune.lora.attach import base_of
from slimtune.train.pruning import Ramp
from slimtune.train.teacher import Top


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


class _TopDivergence(torch.autograd.Function):
    """Sum of `KL(p || q)` over the teacher's likeliest tokens and all others as one, `q` the student's head's."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, index: Tensor, log_p: Tensor, rest: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        to_student = torch.empty_like(student)
        for start in range(0, len(student), CHUNK):
            rows = slice(start, start + CHUNK)
            at, log_top, log_rest = index[rows], log_p[rows].to(wide), rest[rows].to(wide)
            log_q = log_softmax(torch.nn.functional.linear(student[rows], weight, bias), -1, dtype=wide)
            top_q = log_q.gather(1, at)
            off = log_rest - log_q.scatter(1, at, -torch.inf).logsumexp(1)
            off = off.where(log_rest > -torch.inf, -torch.inf)  # where the likeliest are all, there is no rest
            p = log_top.exp()
            total = total + (p * (log_top - top_q)).sum() + (log_rest.exp() * off.clamp(min=-1e30)).sum()
            grad = log_q.exp_().mul_(1 - off.exp().unsqueeze(1))  # others: q less the rest, shared out as q has it
            torch.mm(grad.scatter_(1, at, top_q.exp() - p).to(student.dtype), weight, out=to_student[rows])
        ctx.save_for_backward(to_student)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (to_student,) = ctx.saved_tensors
        return to_student * grads[0].to(to_student.dtype), None, None, None, None, None


def top_divergence(student: Tensor, teacher: Top, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`head_divergence` where of the teacher's predictions the likeliest are known, and what is left together: never
    more than the whole divergence, and the same where the likeliest are all."""
    return cast(Tensor, _TopDivergence.apply(student, *teacher, weight.detach(), bias))


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
    with ramp.unpruned(), model.disable_adapter(), _bare_head(base_of(model)):
        hidden = _hidden(model, inputs)
    model.train(training)
    return hidden


def distilled_loss(
    model: nn.Module,
    base: nn.Module,
    teacher: Tensor | Top,
    inputs: dict[str, Any],
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The mean divergence from the teacher over the tokens that are learnt, nats a token.

    `base` is the Hugging Face model inside `model`; `teacher` is what `unpruned` returned, or what was kept
    of its predictions for the learnt tokens. `num_items_in_batch` is the
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
    student = hidden.reshape(-1, hidden.shape[-1])[learnt]
    if isinstance(teacher, Top):
        total = top_divergence(student, teacher, weight, bias)
    else:
        total = head_divergence(student, teacher.reshape(-1, teacher.shape[-1])[learnt].to(dtype), weight, bias)
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
