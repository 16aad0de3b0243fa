"""`QuantLinear` and its autograd function: what they compute, what they keep, and what they survive."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slimtune.quant import QTensor, QuantLinear
from slimtune.quant.activation import Activations
from slimtune.quant.rtn import Rtn

IN, OUT = 100, 12
METHODS = {
    "4 bits": Rtn(bits=4, group_size=32),
    "3 bits sym": Rtn(bits=3, group_size=25, sym=True),
    "2 bits": Rtn(bits=2, group_size=-1),
    "8 bits": Rtn(bits=8, group_size=50),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_bias = pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def layer(method: Rtn = METHODS["4 bits"], bias: bool = False) -> QuantLinear:
    linear = nn.Linear(IN, OUT, bias=bias)
    return QuantLinear.from_linear(linear, method(linear.weight.detach(), {}))


def tensors(q: QuantLinear) -> dict[str, Tensor]:
    return {name: getattr(q, name) for name in q.names}


def results(module: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient to the input of a loss that is not linear."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@each_method
@each_bias
def test_forward_is_the_product_with_the_decoded_weight(method: Rtn, bias: bool) -> None:
    q, x = layer(method, bias), torch.randn(2, 7, IN)
    wanted = x @ q.dequantize().T + (q.bias if bias else 0)
    assert torch.equal(q(x), wanted)
    assert torch.equal(q.to_linear(torch.float32)(x), nn.functional.linear(x, q.dequantize(), q.bias))


@each_method
@each_bias
def test_gradient_to_the_input_is_that_of_the_decoded_weight(method: Rtn, bias: bool) -> None:
    q, x = layer(method, bias).double(), torch.randn(3, IN, dtype=torch.float64)
    dense = nn.Linear(IN, OUT, bias=bias).double().requires_grad_(False)
    dense.weight.copy_(q.dequantize(torch.float64))
    if bias:
        dense.bias.copy_(q.bias)
    for got, wanted in zip(results(q, x), results(dense, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(q, x[:2].clone().requires_grad_())


@each_dtype
@each_bias
def test_runs_in_the_dtype_of_its_input(dtype: torch.dtype, bias: bool) -> None:
    q, x = layer(bias=bias), torch.randn(5, IN)
    y, gradient = results(q, x.to(dtype))
    assert y.dtype == gradient.dtype == dtype
    exact_y, exact_gradient = results(q, x)
    for got, wanted in ((y, exact_y), (gradient, exact_gradient)):
        torch.testing.assert_close(got.float(), wanted, rtol=0.03, atol=0.03 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_bias
def test_autocast_says_the_dtype(dtype: torch.dtype, bias: bool) -> None:
    q, x = layer(bias=bias), torch.randn(5, IN, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = q(x)
    assert y.dtype == dtype
    assert torch.equal(y, q(x.to(dtype)))
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(5, IN), rtol=0.02, atol=0.02)


@each_dtype
@each_bias
def test_backward_keeps_nothing_but_the_packed_tensors(dtype: torch.dtype, bias: bool) -> None:
    q = layer(bias=bias)
    packed = {p.untyped_storage().data_ptr() for p in tensors(q).values()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(64, IN, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = q(x)
    assert len(saved) == len(q.names)
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} == packed
    y.sum().backward()
    assert x.grad is not None


def test_codes_get_no_gradient() -> None:
    q = layer(bias=True)
    results(q, torch.randn(3, IN))
    assert all(p.grad is None and not p.requires_grad for p in q.parameters())


@each_bias
def test_an_input_without_gradient_makes_no_graph(bias: bool) -> None:
    assert not layer(bias=bias)(torch.randn(3, IN)).requires_grad


class Stack(nn.Module):
    """A small network of two quantized layers with something to train between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.factor, self.second = layer(bias=True), nn.Linear(OUT, IN), layer(METHODS["3 bits sym"])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.factor(self.first(x))))


def of_stack(stack: Stack, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    stack.zero_grad()
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(1))
    return *results(run, x), *(p.grad.clone() for p in stack.factor.parameters() if p.grad is not None)


def test_checkpointing_changes_nothing() -> None:
    stack = Stack()
    wanted = of_stack(stack, stack)
    got = of_stack(stack, lambda x: checkpoint(stack, x, use_reentrant=False))
    assert len(got) == len(wanted) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# Dynamo itself makes an instance of an autograd function while it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_as_one_graph() -> None:
    stack = Stack()
    wanted = of_stack(stack, stack)
    torch._dynamo.reset()
    got = of_stack(stack, torch.compile(stack, fullgraph=True, backend="aot_eager"))
    assert len(got) == len(wanted) == 4
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "to": lambda m: m.to(torch.float16),
    "to cpu": lambda m: m.to("cpu", torch.bfloat16),
    "there and back": lambda m: m.half().float().bfloat16().float(),
}


@each_method
@pytest.mark.parametrize("move", MOVES)
def test_casting_the_model_changes_no_packed_bit(method: Rtn, move: str) -> None:
    model = nn.Sequential(layer(method, bias=True), nn.Linear(OUT, 3))
    q: Any = model[0]
    before = {name: tensor.detach().clone() for name, tensor in tensors(q).items()}
    other = MOVES[move](model)[1].weight.dtype
    assert q.bias.dtype == other
    for name, tensor in tensors(q).items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        assert isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    assert set(dict(q.named_parameters())) == {*q.names, "bias"}


def test_packed_tensors_are_frozen_contiguous_parameters() -> None:
    q = layer(bias=True)
    assert {name: (p.dtype, tuple(p.shape)) for name, p in q.named_parameters()} == {
        "codes": (torch.uint8, (OUT, 52)),
        "scale": (torch.bfloat16, (OUT, 4)),
        "zero": (torch.uint8, (OUT, 4)),
        "bias": (torch.float32, (OUT,)),
    }
    assert not list(q.buffers())
    assert all(p.is_contiguous() and not p.requires_grad for p in q.parameters())


@each_method
@each_bias
def test_state_dict_goes_round(method: Rtn, bias: bool) -> None:
    q = layer(method, bias)
    state = q.state_dict()
    assert set(state) == {*q.names, *(["bias"] if bias else [])}
    other = QuantLinear(q.layout, bias)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.dequantize(), q.dequantize())
    empty = QuantLinear(q.layout, bias, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(state, strict=True, assign=True)
    x = torch.randn(2, IN)
    assert torch.equal(empty(x), q(x))


def test_a_copy_is_independent() -> None:
    q = layer()
    twin = copy.deepcopy(q)
    with torch.no_grad():
        twin.codes.zero_()
    assert int(q.codes.max()) > 0
    assert twin.layout == q.layout


@each_dtype
def test_what_takes_the_place_of_a_linear_keeps_its_bias_and_mode(dtype: torch.dtype) -> None:
    linear = nn.Linear(IN, OUT).to(dtype).eval()
    q = QuantLinear.from_linear(linear, METHODS["4 bits"](linear.weight.detach(), {}))
    assert not q.training and layer().training
    assert q.bias is not None and q.bias.dtype == dtype and torch.equal(q.bias, linear.bias)
    assert q.bias.data_ptr() == linear.bias.data_ptr()
    dense = q.to_linear(torch.float32)
    assert not dense.training
    assert torch.equal(dense.weight, q.dequantize()) and torch.equal(dense.bias, linear.bias.float())
    assert not any(p.requires_grad for p in (*q.parameters(), *dense.parameters()))


def test_weight_is_a_view_that_says_device_and_no_float() -> None:
    q = layer()
    assert q.weight.dtype == torch.int8 and q.weight.data_ptr() == q.codes.data_ptr()
    assert "weight" not in q.state_dict()
    assert "bits=4" in repr(q) and f"in_features={IN}" in repr(q)


@dataclass(frozen=True)
class Signs:
    """A layout that slimtune does not have: a sign for every weight and a magnitude for every row."""

    tag: ClassVar[str] = "signs"
    rowwise: ClassVar[bool] = True
    out_features: int
    in_features: int

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "sign": ((self.out_features, self.in_features), torch.int8),
            "size": ((self.out_features, 1), torch.float64),
        }

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return tensors["sign"].to(dtype) * tensors["size"].to(dtype)


def test_serves_any_layout() -> None:
    linear = nn.Linear(IN, OUT)
    w = linear.weight.detach()
    weight = QTensor({"sign": w.sign().to(torch.int8), "size": w.double().abs().mean(1, keepdim=True)}, Signs(OUT, IN))
    q = QuantLinear.from_linear(linear, weight).half()
    assert q.names == ("sign", "size") and q.size.dtype == torch.float64
    x = torch.randn(2, IN, dtype=torch.float64)
    assert torch.autograd.gradcheck(q, x.requires_grad_())
    dense = w.double().sign() * w.double().abs().mean(1, keepdim=True)
    torch.testing.assert_close(q(x), x @ dense.T + linear.bias.half().double())


@pytest.mark.parametrize("activations", [None, Activations(8), Activations(8, group_size=32)], ids=str)
def test_no_tokens_are_no_error(activations: Activations | None) -> None:
    linear = torch.nn.Linear(64, 33)
    layer = QuantLinear.from_linear(linear, Rtn(bits=4, group_size=-1)(linear.weight.detach(), {}), activations)
    x = torch.randn(2, 0, 64, requires_grad=True)
    layer(x).sum().backward()
    with torch.no_grad():
        assert layer(x).shape == (2, 0, 33)
    assert x.grad is not None and x.grad.shape == x.shape
