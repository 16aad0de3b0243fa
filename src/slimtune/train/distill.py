"""Learning from the model's own unpruned self: the same weights with all gates open and adapters off.

No second model is held, and no logits of the whole batch: the head runs inside the divergence, a few tokens at a time,
for the teacher and the student together. (Where a model does more than its head to get its logits, or has an encoder,
the logits themselves are compared, as many as there are.) Or the teacher is asked once, before training
(`train/teacher.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from slimtune.calib.loss import CHUNK, has_plain_head
from slimtune.lora.attach import base_of
from slimtune.train.pruning import Ramp
from slimtune.train.teacher import Top, head_of, learnt_of, logits_of


class _HeadDivergence(torch.autograd.Function):
    """Sum of `KL(softmax(teacher Wᵀ + b) || softmax(student Wᵀ + b))`; a gradient to the student alone."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        to_student = torch.empty_like(student)
        for start in range(0, len(student), CHUNK):
            rows = slice(start, start + CHUNK)
            log_p, log_q = (log_softmax(logits_of(h[rows], weight, bias), -1, dtype=wide) for h in (teacher, student))
            p = log_p.exp()
            total = total + (p * (log_p - log_q)).sum()
            _back(log_q.exp_().sub_(p).to(student.dtype), weight, to_student[rows])
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
        ctx: Any,
        student: Tensor,
        index: Tensor,
        log_p: Tensor,
        rest: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        to_student = torch.empty_like(student)
        for start in range(0, len(student), CHUNK):
            rows = slice(start, start + CHUNK)
            at, log_top, log_rest = index[rows], log_p[rows].to(wide), rest[rows].to(wide)
            log_q = log_softmax(logits_of(student[rows], weight, bias), -1, dtype=wide)
            top_q = log_q.gather(1, at)
            off = log_rest - log_q.scatter(1, at, -torch.inf).logsumexp(1)
            off = off.where(log_rest > -torch.inf, -torch.inf)  # where the likeliest are all, there is no rest
            p = log_top.exp()
            total = total + (p * (log_top - top_q)).sum() + (log_rest.exp() * off.clamp(min=-1e30)).sum()
            grad = log_q.exp_().mul_(1 - off.exp().unsqueeze(1))  # others: q less the rest, shared out as q has it
            _back(grad.scatter_(1, at, top_q.exp() - p).to(student.dtype), weight, to_student[rows])
        ctx.save_for_backward(to_student)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (to_student,) = ctx.saved_tensors
        return to_student * grads[0].to(to_student.dtype), None, None, None, None, None


def _back(grad: Tensor, weight: Tensor | None, out: Tensor) -> None:
    """The gradient of what the head (`weight`, if any) reads, given that of its outputs."""
    if weight is None:
        out.copy_(grad)
    else:
        torch.mm(grad, weight, out=out)


def top_divergence(student: Tensor, teacher: Top, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """`head_divergence` where of the teacher's predictions the likeliest are known, and what is left together: never
    more than the whole divergence, and the same where the likeliest are all."""
    return cast(Tensor, _TopDivergence.apply(student, *teacher, None if weight is None else weight.detach(), bias))


def head_divergence(student: Tensor, teacher: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """The sum over tokens, in nats, of the divergence of the student's predictions from the teacher's.

    Args:
        student: hidden states at the head's input, `[tokens, features]`.
        teacher: the same of the teacher.
        weight: the head, `[vocabulary, features]`, frozen; None where `student` and `teacher` are logits.
        bias: `[vocabulary]`.

    Example:
        >>> student, teacher, head = torch.randn(6, 8), torch.randn(6, 8), torch.randn(20, 8)
        >>> p, q = ((h @ head.T).log_softmax(-1) for h in (teacher, student))
        >>> wanted = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
        >>> bool(torch.allclose(head_divergence(student, teacher, head), wanted, rtol=1e-4))
        True
    """
    frozen = None if weight is None else weight.detach()
    return cast(Tensor, _HeadDivergence.apply(student, teacher.detach(), frozen, bias))


@torch.no_grad()
def unpruned(model: PeftModel, ramp: Ramp, inputs: dict[str, Any]) -> Tensor:
    """What the unpruned model hands to its head, `[batch, length, features]`, or its logits (`head_of` says which)."""
    training = model.training
    model.eval()
    with ramp.unpruned(), model.disable_adapter():
        hidden = _hidden(model, base_of(model), inputs)
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
    hidden = _hidden(model, base, inputs)
    learnt = (learnt_of(base, inputs["labels"]).reshape(-1)).nonzero().squeeze(1)
    weight, bias = head_of(base, hidden.dtype)
    student = hidden.reshape(-1, hidden.shape[-1])[learnt]
    if isinstance(teacher, Top):
        total = top_divergence(student, teacher, weight, bias)
    else:
        total = head_divergence(student, teacher.reshape(-1, teacher.shape[-1])[learnt].to(hidden.dtype), weight, bias)
    return total / (max(len(learnt), 1) if num_items_in_batch is None else num_items_in_batch)


def _hidden(model: nn.Module, base: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the head of a model reads, or, where its logits are not simply what the head makes, the logits."""
    if cast(Any, base).config.is_encoder_decoder:  # its decoder reads the labels
        return cast(Tensor, model(**inputs, use_cache=False).logits)
    with _bare_head(base) if has_plain_head(base) else nullcontext():
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
