"""Rotating a model in place, through its map: norm gains folded, R1 and R2 into the weights, R4 into the model.

What is done is exact: the model computes the same logits, and a run that finds otherwise is an error. In particular
embeddings are **not** centred, which is an invariance for LayerNorm and not for RMSNorm; where LayerNorms read the
stream, R1 leaves a vector of equal entries alone instead, so that they subtract the same mean as before.

Sources: SliceGPT (arXiv 2401.15024) for the invariance, QuaRot (2404.00456) and SpinQuant (2405.16406) for R1 to R4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimtune.arch import ModelMap, Norm, Port, Space
from slimtune.calib.capture import image_inputs, model_inputs
from slimtune.errors import CalibrationError, FormatError, RecipeError, ShapeError
from slimtune.rotate.balance import balance
from slimtune.rotate.basis import Basis, Change, changes, online
from slimtune.rotate.learn import learn
from slimtune.rotate.online import attach_online_
from slimtune.rotate.options import Rotation
from slimtune.rotate.record import fingerprint, mark_, rotation_of

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}
"""The largest difference of logits, relative to their size, that rounding to a dtype explains (norms are computed in
float32 by most models, whatever their dtype)."""

PROBE = (4, 32)
"""Windows, and tokens in each, on which logits are compared."""

PIECE = 1 << 22
"""Numbers of a weight that turn at once: a vocabulary in float64 would be the largest tensor, and turns make copies."""


@dataclass(frozen=True)
class RotateFacts:
    """What `rotate_` did to a model. `residual` and `values` say `rotated`, or why not; `norms` are those of which a
    gain was folded, or a part of it, `balanced` the places whose channels were scaled; `logit_error` is relative."""

    kind: str
    seed: int
    online: tuple[str, ...]
    sha256: str
    residual: str
    values: str
    norms: int
    balanced: int
    untied: tuple[str, ...]
    logit_error: float
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain values for `report.json`."""
        return asdict(self)


@torch.no_grad()
def rotate_(
    model: nn.Module,
    modelmap: ModelMap,
    rotation: Rotation,
    *,
    tokens: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RotateFacts:
    """Rotate `model` in place, one weight at a time in float64.

    Args:
        model: a dense Hugging Face model with all its weights in memory, without an adapter.
        modelmap: its map, from `bind`.
        rotation: which rotation.
        tokens: windows `[samples, length]` to learn from, where the rotation is learned or balances.
        progress: called with (finished parts, all parts): the blocks, and what stands outside them.

    Raises `RecipeError` when the model is rotated already, when it is quantized or has an adapter, and when nothing of
    it can be rotated; `CalibrationError` when there is nothing to learn from; `FormatError` when its logits are not
    what they were (it must not be used then).
    """
    start = time.perf_counter()
    _require_plain(model, modelmap, lazy=False)
    before = probe(model, modelmap)
    plan = begin_(model, modelmap, rotation, tokens=tokens)
    for number, block in enumerate(modelmap.parts, start=1):
        turn_(model, modelmap, plan, block)
        if progress is not None:
            progress(number, len(modelmap.parts))
    finish_(model, plan)
    return plan.facts(compared(probe(model, modelmap), before, modelmap.family), time.perf_counter() - start)


@dataclass(frozen=True)
class Rotating:
    """A rotation on its way through a model, block by block: where it goes, and what of it stays as it is."""

    basis: Basis
    turned: Mapping[str, Change]
    obstacle: str
    untied: tuple[str, ...]

    def facts(self, logit_error: float, seconds: float) -> RotateFacts:
        """What was done."""
        rotation = self.basis.rotation
        return RotateFacts(
            **{name: getattr(rotation, name) for name in ("kind", "seed", "online")},
            sha256=fingerprint(self.basis),
            residual=self.obstacle or ("rotated" if self.basis.residual else "as it is: what reads it turns online"),
            values="rotated" if self.basis.attentions else "this model has none",
            norms=len(self.basis.gains),
            balanced=self.basis.balanced,
            untied=self.untied,
            logit_error=logit_error,
            seconds=seconds,
        )


@torch.no_grad()
def begin_(
    model: nn.Module,
    modelmap: ModelMap,
    rotation: Rotation,
    *,
    tokens: Tensor | None = None,
    lazy: bool = False,
) -> Rotating:
    """Decide everything that `rotation` will do to `model`, and untie what it must; errors are those of `rotate_`.

    Norms and all that stands outside the blocks must be in memory, the rest too unless `lazy`.
    """
    _require_plain(model, modelmap, lazy=lazy)
    gains = {norm.name: gain for norm in modelmap.norms if (gain := _gain(model, norm)) is not None}
    obstacle = _obstacle(model, modelmap, gains) if rotation.folds else ""
    folded = rotation.folds and not obstacle
    basis = _basis(modelmap, rotation, gains if folded else {}, residual=folded)
    if obstacle and not basis.attentions:
        raise RecipeError("nothing of this model can be rotated", got=obstacle)
    for port in modelmap.ports:
        online(basis, port)  # a block size that divides nothing is refused before anything is learned
    if rotation.calibrated and tokens is None:
        what, remedy = ("balance", "leave it out") if rotation.balance else ("a learned rotation", "use kind: hadamard")
        raise CalibrationError(f"{what} needs calibration data", remedy=f"or {remedy}")
    if rotation.kind == "learned":
        basis = replace(basis, learned=learn(model, modelmap, basis, cast(Tensor, tokens)))
    if rotation.balance:
        basis = balance(model, modelmap, basis, cast(Tensor, tokens))
        if not basis.balanced:
            remedy = "add online: [inputs]" if rotation.folds else "leave out balance"
            raise RecipeError("nothing of this model can be balanced", where="balance", remedy=remedy)
    turned = changes(modelmap, basis)
    return Rotating(basis, turned, obstacle, tuple(_untie_(model, modelmap, turned)))


@torch.no_grad()
def turn_(model: nn.Module, modelmap: ModelMap, plan: Rotating, block: int | None) -> None:
    """Turn the weights of one block of `model`, or of what stands outside the blocks (None), all of them in memory."""
    for port in modelmap.ports:
        if port.block == block and (port.tied_to is None or port.name in plan.untied):
            _turn_(model.get_submodule(port.name), port, plan.turned[port.name])
    for norm in modelmap.norms:
        if norm.block == block and norm.feeds and (plan.basis.residual or norm.name in plan.basis.gains):
            _plain_(model.get_submodule(norm.name), norm, plan.basis)


def finish_(model: nn.Module, plan: Rotating) -> None:
    """Mark `model`, whose weights are all turned, and put the online transforms in."""
    mark_(model, plan.basis)
    attach_online_(model)


def compared(after: Tensor, before: Tensor, where: str) -> float:
    """How far logits moved, relative to their size. Raises `FormatError` where rounding does not explain it."""
    error, limit = _difference(after, before), TOLERANCE[before.dtype]
    if not error <= limit:
        raise FormatError(
            "the rotated model does not compute what the model computed",
            where=where,
            got=f"logits differ by {error:.3g}, relative to their size",
            wanted=f"at most {limit:g} in {str(before.dtype).removeprefix('torch.')}",
        )
    return error


def _basis(modelmap: ModelMap, rotation: Rotation, gains: dict[str, Tensor], *, residual: bool) -> Basis:
    """The basis that `rotation` takes the model to. Of its gains those are folded that are not all one."""
    feeding = {norm.name for norm in modelmap.norms if norm.feeds}
    return Basis(
        rotation,
        width=modelmap.sizes[Space.RESIDUAL],
        kv_heads=modelmap.kv_heads,
        head_dim=modelmap.head_dim,
        attentions=len(modelmap.attentions),
        residual=residual,
        level=any(norm.kind == "layer" for norm in modelmap.norms),
        gains={name: gain for name, gain in gains.items() if name in feeding and not bool((gain == 1).all())},
    )


def _require_plain(model: nn.Module, modelmap: ModelMap, *, lazy: bool) -> None:
    """Raise `RecipeError` unless every port is a plain module, and `ShapeError` unless loaded (`lazy`: or not yet)."""
    if rotation_of(model) is not None:
        raise RecipeError("the model is rotated already", remedy="a second rotation adds nothing: keep the first")
    modules = dict(model.named_modules(remove_duplicate=False))
    for port in modelmap.ports:
        module = modules.get(port.name)
        if not isinstance(module, nn.Linear | nn.Embedding) or not module.weight.is_floating_point():
            raise RecipeError(
                "only plain weights can be rotated",
                where=port.name,
                got=type(module).__name__ if module is not None else "a model with an adapter",
                remedy="rotate before quantize and before lora, or merge: {} first",
            )
        if module.weight.is_meta and not lazy:
            raise ShapeError("a weight is not loaded", where=port.name)


def _gain(model: nn.Module, norm: Norm) -> Tensor | None:
    """What a norm multiplies by, in float64; None where it has no weight."""
    weight = dict(model.get_submodule(norm.name).named_parameters(recurse=False)).get("weight")
    if weight is None:
        return None
    return weight.double() + (norm.kind == "rms_plus_one")


def _obstacle(model: nn.Module, modelmap: ModelMap, gains: dict[str, Tensor]) -> str:
    """Why the residual stream cannot be rotated; empty where it can."""
    for norm in modelmap.norms:
        writes = modelmap[norm.follows].writes if norm.follows else ()
        gain = gains.get(norm.name)
        even = gain is None or bool((gain == gain[0]).all())
        if not norm.feeds and not norm.follows:
            return f"{norm.name} stands in the residual stream, and its gain and bias in no linear"
        bias = _bias(model.get_submodule(norm.name))
        if Space.RESIDUAL in writes and not (even and bias is None):
            return f"{norm.name} scales channels of what is added to the residual stream, and no linear follows it"
        if norm.feeds and bias is not None and gain is not None and bool((bias[gain == 0] != 0).any()):
            return f"{norm.name} has a bias where its gain is zero"
    return ""


def _bias(module: nn.Module) -> nn.Parameter | None:
    return dict(module.named_parameters(recurse=False)).get("bias")


def _untie_(model: nn.Module, modelmap: ModelMap, turned: Mapping[str, Change]) -> list[str]:
    """Give each tied port that changes otherwise than its owner a weight of its own; returns their names.

    A head behind a norm with gains takes them in, and the embedding does not. A tie that holds stays.
    """
    untied = []
    for port in modelmap.ports:
        if port.tied_to is None or turned[port.name].gain is None:
            continue
        module = cast(nn.Linear, model.get_submodule(port.name))
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)
        untied.append(port.name)
    if untied:
        plain = cast(Any, model)
        for name in untied:
            plain.all_tied_weights_keys.pop(f"{name}.weight", None)
        if not plain.all_tied_weights_keys:
            for config in (plain.config, plain.config.get_text_config(decoder=True)):
                config.tie_word_embeddings = False
    return untied


def _turn_(module: nn.Module, port: Port, change: Change) -> None:
    if not change:
        return
    weight = cast(nn.Parameter, module.weight)
    pieces = weight.data.split(max(PIECE // weight.shape[1], 1))
    if port.kind == "embedding":
        for rows in pieces:
            rows.copy_(change.write(rows.double().T).T)
        return
    if change.moves:
        wide, rows_at_once = torch.empty_like(weight, dtype=torch.float64), len(pieces[0])
        for read, rows in zip(wide.split(rows_at_once), pieces, strict=True):
            read.copy_(change.read(rows.double()))
        step = max(PIECE // weight.shape[0], 1)
        for turned, columns in zip(wide.split(step, 1), weight.data.split(step, 1), strict=True):
            columns.copy_(change.write(turned))
    else:
        for rows in pieces:
            rows.copy_(change.read(rows.double()))
    bias = _bias(module)
    if bias is not None:
        bias.copy_(change.write(bias.double()))


def _plain_(module: nn.Module, norm: Norm, basis: Basis) -> None:
    """Take what is folded of its gain out of a norm that feeds linears; a bias is divided by it, turned, and stays."""
    parameters = dict(module.named_parameters(recurse=False))
    bias, gain = parameters.get("bias"), basis.gains.get(norm.name)
    if bias is not None:
        moved = bias.double() if gain is None else torch.where(bias == 0, 0, bias.double() / gain)
        bias.copy_(basis.residual_turn(moved) if basis.residual else moved)
    if gain is not None:
        one = int(norm.kind == "rms_plus_one")
        weight = parameters["weight"].double() + one
        parameters["weight"].copy_(torch.where(gain == 0, 1, weight / gain) - one)


@torch.no_grad()
def probe(model: nn.Module, modelmap: ModelMap) -> Tensor:
    """Logits on random tokens, always the same ones, and where the model takes images on one of them behind an image:
    `[tokens, vocabulary]`."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(modelmap.sizes[Space.VOCAB], PROBE, generator=generator)
    training = model.training
    model.eval()
    inputs = (model_inputs(model, tokens), image_inputs(model, tokens[:1]))
    logits: list[Tensor] = [model(**each, use_cache=False).logits.flatten(0, 1) for each in inputs if each is not None]
    model.train(training)
    return torch.cat(logits)


def _difference(got: Tensor, wanted: Tensor) -> float:
    """`|got - wanted| / |wanted|`."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm())
