"""Black boxes: a linear that others quantized is a frozen base like ours, if it can hand out its weight.

That is what ModuLoRA (arXiv 2309.16119) means by modular: training needs nothing of a quantizer but the dense weight,
once in forward and once in backward. A layer hands it out by a `dequantize()` of its own (HQQ's does), its weight does
(quanto's and torchao's are tensors that can), or a row of `DECODERS` knows how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from slimtune.arch.bind import LinearLike
from slimtune.errors import FormatError
from slimtune.quant.autograd import DequantizingMatmul
from slimtune.quant.layouts import Layout
from slimtune.quant.linear import QuantLinear
from slimtune.tables import Table

Decoder = Callable[[nn.Module], Tensor]
"""A layer's weight, any float dtype, `[out_features, in_features]`."""


def _bitsandbytes_4bit(module: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = module.weight
    state = weight.quant_state or cast(Any, module).quant_state  # the weight's is lost where the module was sharded
    return cast(Tensor, dequantize_4bit(weight.data, state))


def _bitsandbytes_8bit(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    scales = weight.SCB if weight.SCB is not None else cast(Any, module).state.SCB  # a forward pass moves them there
    return cast(Tensor, weight.data.float() * (scales.float().view(-1, 1) / 127))


def _gptqmodel(module: nn.Module) -> Tensor:
    return cast(Tensor, cast(Any, module).dequantize_weight()).T


DECODERS: Table[Decoder] = Table(
    "slimtune.decoders",
    {
        "bitsandbytes.nn.modules.Linear4bit": _bitsandbytes_4bit,
        "bitsandbytes.nn.modules.Linear8bitLt": _bitsandbytes_8bit,
        "gptqmodel.nn_modules.qlinear.torch.TorchLinear": _gptqmodel,
    },
)
"""How to get the weight of layers that have no `dequantize()`, by the full name of their class or a base of it."""


class BlackBox(nn.Module):
    """`y = x Wᵀ + b` around a frozen layer of somebody else's, which is asked for `W` in forward and again in backward.

    Nothing is saved between the two, neither the weight nor the input. Runs in the dtype of its input, or autocast's.
    `decode` gives the layer's weight.

    Example:
        >>> class Halves(nn.Module):
        ...     in_features, out_features = 3, 2
        ...     def dequantize(self):
        ...         return torch.full((2, 3), 0.5)
        >>> box = BlackBox(Halves(), Halves.dequantize)
        >>> box(torch.ones(1, 3))
        tensor([[1.5000, 1.5000]])
    """

    names: tuple[str, ...] = ()
    keep: ClassVar[bool] = False
    activations: ClassVar[None] = None  # what the layer does to its input, it does itself

    def __init__(self, inner: nn.Module, decode: Decoder) -> None:
        super().__init__()
        face = cast(LinearLike, inner)
        self.in_features, self.out_features = int(face.in_features), int(face.out_features)
        self.inner = inner.requires_grad_(False)
        self._decode = decode
        bias = getattr(inner, "bias", None)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False) if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` is `[..., in_features]`; returns `[..., out_features]` in the dtype of `x`, or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = DequantizingMatmul.apply(x, self.layout, self.names)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the layer computes with, `dtype [out_features, in_features]`.

        Raises `FormatError` when the layer hands out something else.
        """
        weight = self._decode(self.inner)
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise FormatError(
                "a quantized layer hands out a weight of another shape",
                where=type(self.inner).__name__,
                got=list(weight.shape),
                wanted=[self.out_features, self.in_features],
            )
        return weight.to(dtype)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A dense, frozen twin in `dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear.train(self.training)

    @property
    def layout(self) -> Layout:
        """A layout without tensors: what the product asks for the weight."""
        return _Asked(self)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that the layer saves, its bias aside."""
        held = [
            tensor for key, tensor in self.inner.state_dict().items() if key != "bias" and isinstance(tensor, Tensor)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def weight(self) -> Tensor:
        """Nothing, on the layer's device: for code that asks a linear where it is (see `QuantLinear.weight`)."""
        held = [*self.inner.parameters(), *self.inner.buffers()]
        return torch.empty(0, dtype=torch.int8, device=held[0].device if held else None)


class _Asked:
    tag: ClassVar[str] = "black-box"
    rowwise: ClassVar[bool] = False

    def __init__(self, box: BlackBox) -> None:
        self._box = box
        self.in_features, self.out_features = box.in_features, box.out_features

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {}

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return self._box.dequantize(dtype)


FROZEN = (QuantLinear, BlackBox)
"""The linears whose weight is stored in few bits: each has `names`, `dequantize` and `to_linear`."""


def adopt_(model: nn.Module) -> int:
    """Put a `BlackBox` around every linear of `model` that others quantized, in place; returns how many there are.

    Raises `FormatError` naming the layers that are no dense linears and hand out no weight.
    """
    found: dict[str, tuple[nn.Module, Decoder]] = {}
    deaf: list[str] = []
    inside: tuple[str, ...] = ()
    known = frozenset(DECODERS)  # looked up once: a table reads the metadata of every installed package
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, FROZEN):
            inside += (f"{name}.",)
        elif isinstance(cast(object, module), LinearLike):
            decode = _decoder(module, known)
            if decode is not None:
                found[name] = module, decode
                inside += (f"{name}.",)
            elif not _is_dense(module):
                deaf.append(f"{name}: {_class_name(type(module))}")
    if deaf:
        raise FormatError(
            "layers in an unknown quantization hand out no weight",
            got="\n          ".join(deaf[:5]),
            wanted="layers with a dequantize() method",
            remedy="a package can add the way to a layer's weight: entry points of the group slimtune.decoders",
        )
    for name, (module, decode) in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, BlackBox(module, decode).train(module.training))
    return len(found)


def _decoder(module: nn.Module, known: frozenset[str]) -> Decoder | None:
    """How `module` hands out its weight; None where it need not or cannot."""
    for kind in type(module).__mro__:
        if _class_name(kind) in known:
            return DECODERS[_class_name(kind)]
    if callable(getattr(type(module), "dequantize", None)):
        return lambda layer: cast(Tensor, cast(Any, layer).dequantize())
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
        return lambda layer: cast(Tensor, layer.weight).dequantize()
    return None


def _is_dense(module: nn.Module) -> bool:
    """Whether a linear has a weight of floats, or has nothing packed: it may be no linear after all."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2:
        return True
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return all(tensor.is_floating_point() for tensor in own)


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
