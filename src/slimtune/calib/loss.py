"""The loss of a language model without its logits: a few tokens' at a time, and none for tokens that are not learnt.

The logits of a batch are the largest tensors of a training step: tokens times vocabulary, in the model's dtype, again
in float32, and again for the gradient. Here the head runs inside the loss, over `CHUNK` tokens at a time, and the
gradient to the hidden states is taken at once, while the chunk's probabilities are there. (The idea is Liger Kernel's
fused linear cross-entropy, arXiv 2410.10989.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad

from slimtune.kernels import compiled

CHUNK = 256
"""Tokens whose logits are held at once."""

CACHED = 8
"""Tokens whose probabilities a CPU works on at once: few enough to stay in its cache. Measured on one core, 1,020
tokens of 49,152 words, 576 features: 277 ms where whole chunks take 433, and the products alone 201."""


class _HeadCrossEntropy(torch.autograd.Function):
    """Sum of `-log softmax(hidden Wᵀ + b)[label]`; gradients to everything but the labels."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = hidden[rows] @ weight.T
            if bias is not None:
                logits += bias
            if compiled.fits(logits):
                total = total + compiled.cross_entropy_(logits, labels[rows], slope=any(ctx.needs_input_grad)).sum()
            else:
                at = CACHED if hidden.device.type == "cpu" else CHUNK
                for some, label in zip(logits.split(at), labels[rows].unsqueeze(1).split(at), strict=True):
                    log_p = log_softmax(some.to(wide), -1)
                    total = total - log_p.gather(1, label).sum()
                    if any(ctx.needs_input_grad):  # that of the sum: softmax minus one at the label
                        one = torch.full_like(label, -1, dtype=wide)
                        some.copy_(log_p.exp_().scatter_add_(1, label, one))
            if not any(ctx.needs_input_grad):
                continue
            grad = logits
            if to_hidden is not None:
                torch.mm(grad, weight, out=to_hidden[rows])
            if to_weight is not None:
                to_weight += grad.T @ hidden[rows]
            if to_bias is not None:
                to_bias += grad.sum(0)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        to_hidden, to_weight, to_bias = ctx.saved_tensors
        return (
            None if to_hidden is None else to_hidden * grad.to(to_hidden.dtype),
            None if to_weight is None else (to_weight * grad).to(ctx.dtypes[0]),
            None if to_bias is None else (to_bias * grad).to(ctx.dtypes[1]),
            None,
        )


def head_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sum, in nats, of the cross-entropies of `softmax(hidden Wᵀ + b)` at the labels.

    Args:
        hidden: `[tokens, features]`.
        weight: the head, `[vocabulary, features]`, of the dtype of `hidden`.
        labels: int64 `[tokens]`; tokens with a negative label (-100) are left out.
        bias: `[vocabulary]`.

    Example:
        >>> hidden, head, labels = torch.randn(6, 8), torch.randn(20, 8), torch.tensor([3, -100, 19, 0, -100, 7])
        >>> wanted = torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="sum")
        >>> bool(torch.allclose(head_cross_entropy(hidden, head, labels), wanted))
        True
    """
    learnt = (labels >= 0).nonzero().squeeze(1)
    if len(learnt) < len(labels):
        hidden, labels = hidden[learnt], labels[learnt]
    if not torch.is_grad_enabled():  # a function is asked for gradients by its inputs alone
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return cast(Tensor, _HeadCrossEntropy.apply(hidden, weight, bias, labels))


def has_plain_head(model: nn.Module) -> bool:
    """Whether `model` is a causal language model whose logits are its head's outputs, and the head a plain linear."""
    hf = cast(Any, model)
    config = hf.config.get_text_config()
    odd = [getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    return not hf.config.is_encoder_decoder and type(hf.get_output_embeddings()) is nn.Linear and not any(odd)


@contextmanager
def chunked_loss(model: nn.Module) -> Iterator[bool]:
    """Within the block, `model(..., labels=...)` computes its loss by `head_cross_entropy`, and returns no true logits.

    For a causal language model (a Hugging Face model, not its `PeftModel`) whose logits are its head's outputs; on any
    other (an encoder-decoder, a model that caps or scales its logits, a head that is not a plain linear) it does
    nothing. Yields whether it applies.
    """
    hf = cast(Any, model)
    head: Any = hf.get_output_embeddings()
    if not has_plain_head(model):
        yield False
        return

    def loss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        **_: object,
    ) -> Tensor:
        following = pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
        hidden = logits.reshape(-1, logits.shape[-1])
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        total = head_cross_entropy(hidden, head.weight.to(hidden.dtype), following, bias)
        count = (following >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        return total / count

    usual = vars(hf).get("_loss_function")  # where transformers keeps one that was set
    head.forward = lambda hidden: hidden
    hf.loss_function = loss
    try:
        yield True
    finally:
        del head.forward
        if usual is None:
            del hf._loss_function
        else:
            hf.loss_function = usual
