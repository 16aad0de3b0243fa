"""The chunked loss, against the loss of the model itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pico import PICO, pico_inputs, pico_model
from slimtune.calib import loss as module
from slimtune.calib.loss import chunked_loss, head_cross_entropy
from slimtune.lora.attach import add_lora

PLAIN = [family for family in PICO if family not in ("gemma2", "t5", "t5-gated")]


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_textbook_with_gradients(tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 8)
    made = [torch.randn(*shape, dtype=torch.float64) for shape in ((tokens, 5), (11, 5), (11,))]
    labels = torch.randint(0, 11, (tokens,))
    labels[1::3] = -100
    got, wanted = ([t.clone().requires_grad_() for t in made] for _ in range(2))
    value = head_cross_entropy(got[0], got[1], labels, got[2] if bias else None)
    truth = cross_entropy(wanted[0] @ wanted[1].T + (wanted[2] if bias else 0), labels, reduction="sum")
    (2.5 * value).backward()
    (2.5 * truth).backward()
    torch.testing.assert_close(value, truth)
    for mine, theirs in list(zip(got, wanted, strict=True))[: 3 if bias else 2]:
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_nothing_to_learn_is_no_loss() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    value = head_cross_entropy(hidden, torch.randn(6, 4), torch.full((3,), -100))
    value.backward()  # type: ignore[no-untyped-call]
    assert float(value.detach()) == 0 and hidden.grad is not None and not bool(hidden.grad.any())


def test_no_gradient_is_made_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.compiled, "library", lambda: None)
    made: list[int] = []
    plain = torch.Tensor.scatter_add_

    def counted(self: Tensor, *args: Any) -> Tensor:
        made.append(1)
        return plain(self, *args)

    monkeypatch.setattr(torch.Tensor, "scatter_add_", counted)
    hidden, head, labels = torch.randn(3, 4), torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 5])
    with torch.no_grad():
        value = head_cross_entropy(hidden, head, labels)
    assert not made
    head_cross_entropy(hidden, head, labels)
    assert made == [1]
    torch.testing.assert_close(value, cross_entropy(hidden @ head.detach().T, labels, reduction="sum"))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("items", [None, 30])
def test_a_model_learns_the_same(family: str, items: int | None) -> None:
    plain = pico_model(family).train()
    chunked = copy.deepcopy(plain)
    inputs = pico_inputs(plain)
    inputs = {**inputs, "labels": inputs["input_ids"].clone()}
    inputs["labels"][:, :3] = -100
    more: dict[str, Any] = {} if items is None else {"num_items_in_batch": items}
    wanted = plain(**inputs, **more).loss
    wanted.backward()
    with chunked_loss(chunked) as applies:
        assert applies
        got = chunked(**inputs, **more).loss
    got.backward()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(chunked), gradients(plain)
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)
    again = chunked(**inputs, **more)
    torch.testing.assert_close(again.loss, wanted)
    assert again.logits.shape[-1] == chunked.config.get_text_config().vocab_size


@pytest.mark.parametrize("family", ["gemma2", "t5"])
def test_a_model_whose_logits_are_not_its_heads_outputs_is_left_alone(family: str) -> None:
    model = pico_model(family)
    inputs = pico_inputs(model)
    inputs = {**inputs, "labels": inputs.get("decoder_input_ids", inputs["input_ids"])}
    wanted = model(**inputs).loss
    with chunked_loss(model) as applies:
        assert not applies
        assert torch.equal(model(**inputs).loss, wanted)


def test_all_is_put_back_after_a_failure() -> None:
    model: Any = pico_model("llama")
    before = vars(model).keys(), model.loss_function
    with pytest.raises(ZeroDivisionError), chunked_loss(model):
        raise ZeroDivisionError
    assert (vars(model).keys(), model.loss_function) == before
    assert "forward" not in vars(model.lm_head)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.compiled, "library", lambda: None)
    model = add_lora(pico_model("llama"), r=2).train()
    inputs = pico_inputs(model.get_base_model())
    monkeypatch.setattr(module, "CHUNK", 4)
    largest, vocabulary = [0], model.config.vocab_size
    plain = module.log_softmax

    def spied(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert logits.shape[1] == vocabulary
        largest[0] = max(largest[0], len(logits))
        return plain(logits, *args, **kwargs)

    monkeypatch.setattr(module, "log_softmax", spied)
    with chunked_loss(model.get_base_model()):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert largest == [4] and inputs["input_ids"].numel() > 8


@pytest.mark.skipif(module.compiled.library() is None, reason="no C compiler")
def test_a_loop_in_c_makes_what_is_asked_for_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    made: list[tuple[int, bool]] = []
    plain = module.compiled.cross_entropy_

    def spied(logits: Tensor, labels: Tensor, *, slope: bool) -> Tensor:
        made.append((len(logits), slope))
        return plain(logits, labels, slope=slope)

    monkeypatch.setattr(module.compiled, "cross_entropy_", spied)
    hidden, head, labels = torch.randn(6, 4), torch.randn(7, 4, requires_grad=True), torch.tensor([0, 1, 5, 6, 2, 2])
    with torch.no_grad():
        value = head_cross_entropy(hidden, head, labels)
    assert made == [(4, False), (2, False)]
    torch.testing.assert_close(value, cross_entropy(hidden @ head.detach().T, labels, reduction="sum"))
    found = torch.autograd.grad(head_cross_entropy(hidden, head, labels), head)
    wanted = torch.autograd.grad(cross_entropy(hidden @ head.T, labels, reduction="sum"), head)
    torch.testing.assert_close(found, wanted)
    assert made[2:] == [(4, True), (2, True)]
