"""A packed linear and its adapter as one function, against the two of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pico import PICO, pico_inputs, pico_model
from slimtune.arch import bind
from slimtune.calib.cpu import cpu_kernels
from slimtune.kernels import compiled
from slimtune.kernels.rows import gated_silu, rms_norm
from slimtune.lora import attach, fused
from slimtune.lora.attach import LoraQuantLinear, add_lora
from slimtune.lora.fused import Adapted
from slimtune.quant.activation import Activations
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.decoding import kept_weights
from slimtune.quant.layouts import Affine
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn


def layer(columns: int = 40, rows: int = 12, bias: bool = False, bits: int = 4) -> QuantLinear:
    linear = nn.Linear(columns, rows, bias=bias)
    return QuantLinear.from_linear(linear, Rtn(bits=bits, group_size=16)(linear.weight.detach(), {}))


def fused_lora(x: Tensor, base: QuantLinear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return fused.fused_lora(x, [Adapted(base, a, b, scaling)])[0]


def factors(r: int, columns: int = 40, rows: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(r, columns, dtype=dtype).requires_grad_(), torch.randn(rows, r, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_the_formula(bits: int, shape: tuple[int, ...], bias: bool) -> None:
    base, (a, b) = layer(bias=bias, bits=bits), factors(3)
    x = torch.randn(*shape, 40, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(*shape, 12, dtype=torch.float64)
    w = base.dequantize(torch.float64)
    wanted = x @ w.T + 0.7 * (x @ a.T) @ b.T + (0 if base.bias is None else base.bias.double())
    truth = torch.autograd.grad(wanted, (x, a, b), upstream)
    got = fused_lora(x, base, a, b, 0.7)
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(torch.autograd.grad(got, (x, a, b), upstream), truth, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradcheck() -> None:
    base, (a, b) = layer(), factors(2)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: fused_lora(t[0], base, t[1], t[2], 1.3), (x, a, b))


def test_only_the_input_and_thin_tensors_are_saved() -> None:
    base, (a, b) = layer(400, 300), factors(2, 400, 300, torch.float32)
    x = torch.randn(50, 400, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (x, a, b, *base.parameters())}
    new: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            new.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused_lora(x, base, a, b, 1.0)
    assert new == [50 * 2 * 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_meet_float32_factors(dtype: torch.dtype) -> None:
    base, (a, b) = layer(), factors(3, dtype=torch.float32)
    x = torch.randn(4, 40).to(dtype).requires_grad_()
    y = fused_lora(x, base, a, b, 0.5)
    y.float().square().sum().backward()
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    wanted = x.float() @ base.dequantize().T + 0.5 * (x.float() @ a.T) @ b.T
    torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.2)
    assert a.grad is not None and a.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_lora(x.float(), base, a, b, 0.5).dtype == torch.bfloat16


def peft_model(dropout: float = 0.0) -> tuple[Any, dict[str, Tensor]]:
    model: Any = pico_model("llama")
    quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=8)))
    wrapped = add_lora(model, r=2, lora_dropout=dropout)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return wrapped, pico_inputs(model)


def outputs(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = model(**inputs, labels=inputs.get("decoder_input_ids", inputs["input_ids"])).loss
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def test_a_model_computes_what_peft_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = peft_model()
    calls = []

    def counted(*args: Any) -> tuple[Tensor, ...]:
        calls.append(1)
        return fused.fused_lora(*args)

    monkeypatch.setattr(attach, "fused_lora", counted)
    loss, grads = outputs(model, inputs)
    assert len(calls) == sum(isinstance(m, LoraQuantLinear) for m in model.modules()) > 5
    monkeypatch.setattr(LoraQuantLinear, "forward", attach.PeftLoraLinear.forward)
    wanted, theirs = outputs(model, inputs)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for mine, other in zip(grads, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_what_is_not_plain_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(attach, "fused_lora", never)
    model, inputs = peft_model(dropout=0.5)
    model.train()
    outputs(model, inputs)
    with model.disable_adapter():
        plain = model(**inputs).logits
    with pytest.raises(AssertionError):
        model.eval()(**inputs)
    bare: Any = pico_model("llama")
    quantize_(bare, bind(bare), all_linear(Rtn(bits=4, group_size=8)))
    torch.testing.assert_close(bare(**inputs).logits, plain)


def test_a_kept_weight_gives_the_same_gradients() -> None:
    model, inputs = peft_model()
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    wanted = outputs(model, inputs)
    size = 2 * layers[0].in_features * layers[0].out_features
    with kept_weights([layers], size):
        assert [layer.keep for layer in layers].count(True) == 1
    decoded: list[int] = []
    real = Affine.dequantize
    for budget, again in ((0, len(layers) - 3), (10**9, 0)):  # nobody asks for the gradient to the first three's input
        decoded.clear()
        with kept_weights([layers], budget), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Affine, "dequantize", lambda *args: (decoded.append(1), real(*args))[1])
            got = outputs(model, inputs)
        assert len(decoded) == len(layers) + again
        assert torch.equal(got[0], wanted[0])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got[1], wanted[1], strict=True))
    assert not any(layer.keep for layer in layers)


def test_linears_side_by_side_are_each_alone() -> None:
    torch.manual_seed(0)
    rows, ranks = (12, 5, 7), (3, 2, 4)
    bases = [layer(rows=n, bias=n == 5, bits=bits) for n, bits in zip(rows, (4, 3, 2), strict=True)]
    bases[1].keep = True
    bases[2].activations = Activations(bits=8)
    pairs = [factors(r, rows=n) for r, n in zip(ranks, rows, strict=True)]
    x = torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True)
    upstream = [torch.randn(2, 3, n, dtype=torch.float64) for n in rows]
    inputs = [x, *(factor for pair in pairs for factor in pair)]
    alone = [fused_lora(x, base, a, b, 0.5 + i) for i, (base, (a, b)) in enumerate(zip(bases, pairs, strict=True))]
    readers = [Adapted(base, a, b, 0.5 + i) for i, (base, (a, b)) in enumerate(zip(bases, pairs, strict=True))]
    together = fused.fused_lora(x, readers)
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, theirs)
    wanted = torch.autograd.grad(alone, inputs, upstream, retain_graph=True)
    for mine, theirs in zip(torch.autograd.grad(together, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    some = fused.fused_lora(x, readers)  # where one is not used, its factors get no gradient
    found = torch.autograd.grad(some[::2], inputs, upstream[::2], allow_unused=True)
    wanted = torch.autograd.grad(alone[::2], inputs, upstream[::2], allow_unused=True)
    assert [grad is None for grad in found] == [False, False, False, True, True, False, False]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine is None or theirs is None or torch.allclose(mine, theirs)


@pytest.mark.parametrize("family", [name for name in PICO if name not in ("llava",)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_the_same_side_by_side(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = pico_model(family)
    quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=8)))
    wrapped: Any = add_lora(model, r=2)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    inputs = pico_inputs(model)
    wanted = outputs(wrapped, inputs)
    calls: list[int] = []
    real = fused._PackedLora.apply
    monkeypatch.setattr(fused._PackedLora, "apply", lambda *args: (calls.append(len(args[1])), real(*args))[1])
    with attach.side_by_side(wrapped):
        got = outputs(wrapped, inputs)
    with attach.side_by_side(wrapped), cpu_kernels(model):
        remade = outputs(wrapped, inputs)
    stages = [stage for block in bind(model).blocks for stage in block.stages]
    assert sorted(calls[: len(calls) // 2]) == sorted(calls[len(calls) // 2 :])
    assert sorted(calls[: len(calls) // 2]) == sorted([len(stage) for stage in stages] * (1 + checkpointing))
    torch.testing.assert_close(got[0], wanted[0])
    for mine, again, theirs in zip(got[1], remade[1], wanted[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again, theirs, rtol=1e-4, atol=1e-5)
    assert not any(getattr(module, "side_by_side", None) for module in wrapped.modules())


def test_layers_that_read_different_tensors_part() -> None:
    model, _ = peft_model()
    layers = [m for m in model.modules() if isinstance(m, LoraQuantLinear)][:2]
    group = fused.SideBySide(layers)
    assert layers[0].in_features == layers[1].in_features
    x, other = torch.randn(3, layers[0].in_features), torch.randn(3, layers[0].in_features)
    wanted = [layers[0](x), layers[1](x), layers[1](other)]
    for each in layers:
        each.side_by_side = group
    assert torch.allclose(layers[0](x), wanted[0], 1e-4) and torch.allclose(layers[1](x), wanted[1], 1e-4)
    assert torch.allclose(layers[0](x), wanted[0], 1e-4) and torch.equal(layers[1](other), wanted[2])
    assert group.output(layers[0], x) is None  # from then on each for itself
    with torch.no_grad():
        assert fused.SideBySide(layers).output(layers[0], x) is None


def test_nothing_is_held_between_steps() -> None:
    model, inputs = peft_model()
    with attach.side_by_side(model):
        groups = {id(g): g for m in model.modules() if (g := getattr(m, "side_by_side", None)) is not None}
        outputs(model, inputs)
        assert groups and all(group._x is None and not group._ready for group in groups.values())


@pytest.mark.parametrize("kind", ["norm", "gate"])
@pytest.mark.parametrize("loops", [True, False])
def test_what_a_norm_or_a_gate_made_is_made_again(kind: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not loops:
        monkeypatch.setattr(compiled, "library", lambda: None)
    elif compiled.library() is None:
        pytest.skip("no compiler")
    base, (a, b) = layer(400, 300), factors(2, 400, 300, torch.float32)
    first, second = (torch.randn(64, 400, requires_grad=True) for _ in range(2))

    def made() -> Tensor:
        return rms_norm(first, second.detach()[0], 1e-6) if kind == "norm" else gated_silu(first, second)

    def upstream(x: Tensor) -> tuple[list[Tensor], int]:
        before: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: before.add(t.data_ptr()) or t, lambda t: t):
            y = fused_lora(x, base, a, b, 0.5)
        wide = x.data_ptr() in before
        leaves = (first, a, b) if kind == "norm" else (first, second, a, b)
        return list(torch.autograd.grad(y.square().sum(), leaves)), wide

    plain, kept = upstream(made().view(64, 400))  # a view is not what was marked
    again, held = upstream(made())
    assert kept and held is (kind == "gate" and not loops)  # without the loops, a gate is PyTorch's own
    for mine, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_an_input_changed_since_it_was_made_is_kept() -> None:
    base, (a, b) = layer(), factors(2, dtype=torch.float32)
    x = torch.randn(3, 40, requires_grad=True)
    normed = rms_norm(x, torch.ones(40), 1e-6)
    normed.mul_(2)
    got = torch.autograd.grad(fused_lora(normed, base, a, b, 1.0).sum(), a)[0]
    wanted = torch.autograd.grad(((2 * rms_norm(x, torch.ones(40), 1e-6)) @ a.T @ b.T).sum(), a)[0]
    torch.testing.assert_close(got, wanted)
