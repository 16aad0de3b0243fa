"""Quantizing a model block by block: the statistics are those of full forward passes, and nothing else is changed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from pico import PICO, VOCAB_SIZE, logits, pico_inputs, pico_model, pico_tokenizer
from slimtune.arch import Block, ModelMap, Port, bind
from slimtune.calib import capture
from slimtune.calib.capture import calibration_stream, model_inputs
from slimtune.errors import CalibrationError, FormatError, RecipeError, ShapeError
from slimtune.export.load import load
from slimtune.quant import QTensor, Quantizer, QuantLinear
from slimtune.quant.apply import QuantizedLayer, QuantizeFacts, all_linear, dequantize_, quantize_
from slimtune.quant.layouts import Affine
from slimtune.quant.optq import Optq
from slimtune.quant.rtn import Rtn

every_pico = pytest.mark.parametrize("family", PICO)
FAMILIES = ["llama-biased", "gemma2", "phi3", "opt", "t5"]  # one of each kind of block
ROUND = Rtn(bits=2, group_size=12, grid="minmax")


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> Iterator[None]:
    """`quantize_` collects garbage after every block; there is no need to go through all imported modules each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def exact_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration in full float32, where the hardware would round the inputs of its products."""
    monkeypatch.setattr(capture, "bfloat16_units", lambda _: False)
    monkeypatch.setattr(capture, "fast_matmul", nullcontext)


@dataclass(frozen=True)
class Recorder:
    """Rounds to nearest, coarsely, and keeps the Hessians it was given (by the bytes of the weight)."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    seen: list[Tensor] = field(default_factory=list, compare=False)

    def __call__(self, weight: Tensor, stats: Mapping[str, Tensor]) -> QTensor:
        self.seen.append(stats["hessian"])
        return ROUND(weight, {})


@dataclass(frozen=True)
class Breaking:
    """A quantizer that fails at its `after`-th layer, having worked until then."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    after: int
    calls: list[int] = field(default_factory=list, compare=False)

    def __call__(self, weight: Tensor, stats: Mapping[str, Tensor]) -> QTensor:
        self.calls.append(1)
        if len(self.calls) == self.after:
            raise KeyboardInterrupt
        return ROUND(weight, {})


class Folder:
    """A block store in memory."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[QuantizedLayer]] = {}
        self.loaded: list[str] = []

    def load(self, block: Block) -> list[QuantizedLayer] | None:
        if block.name in self.blocks:
            self.loaded.append(block.name)
        return self.blocks.get(block.name)

    def save(self, block: Block, layers: list[QuantizedLayer]) -> None:
        self.blocks[block.name] = list(layers)


def windows(samples: int = 5, length: int = 12) -> Tensor:
    return torch.randint(6, VOCAB_SIZE, (samples, length), generator=torch.Generator().manual_seed(3))


def quantize(model: nn.Module, method: Quantizer, **options: Any) -> QuantizeFacts:
    ignore = options.pop("ignore", ())
    return quantize_(model, bind(model), all_linear(method, ignore), tokens=windows(), **options)


def packed(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": getattr(module, key)
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for key in module.names
    }


def input_moment(model: nn.Module, layer: str) -> Tensor:
    """`XᵀX / n` of what reaches a layer, float64, by one plain forward pass of the whole model."""
    rows: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        model(**model_inputs(model, windows()))
    hook.remove()
    x = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows]).double()
    return x.T @ x / len(x)


def truly_sequential(model: nn.Module, modelmap: ModelMap) -> dict[str, Tensor]:
    """The oracle: layer by layer, a full forward pass each, everything before it rounded already. Rounds `model`."""
    moments: dict[str, Tensor] = {}
    for block in modelmap.blocks:
        for stage in block.stages:
            moments |= {port.name: input_moment(model, port.name) for port in stage}
            for port in stage:
                weight: Any = model.get_submodule(port.name).weight
                weight.data = ROUND(weight.data, {}).dequantize()
    return moments


@every_pico
@pytest.mark.usefixtures("exact_matmul")
def test_every_layer_sees_what_the_quantized_layers_before_it_produce(family: str) -> None:
    model = pico_model(family)
    dense, modelmap = copy.deepcopy(model), bind(model)
    wanted = truly_sequential(dense, modelmap)
    recorder = Recorder()
    facts = quantize(model, recorder, batch_size=2)
    names = [layer.name for layer in facts.layers]
    assert names == [port.name for port in modelmap.linears] == list(wanted)
    for name, got in zip(names, recorder.seen, strict=True):
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(got.double(), wanted[name], rtol=1e-4, atol=1e-5 * scale)
    inputs = pico_inputs(model)
    torch.testing.assert_close(logits(model, inputs), logits(dense, inputs), rtol=1e-5, atol=1e-5)


def inputs_of(model: nn.Module, layer: str) -> Tensor:
    """What reaches a layer, float64 `[tokens, features]`, by one plain forward pass of the whole model."""
    rows: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        model(**model_inputs(model, windows()))
    hook.remove()
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows]).double()


@dataclass(frozen=True)
class Drifting(Recorder):
    """Keeps the drifts it was given."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "drift"})

    def __call__(self, weight: Tensor, stats: Mapping[str, Tensor]) -> QTensor:
        self.seen.append(stats["drift"])
        return ROUND(weight, {})


@every_pico
@pytest.mark.usefixtures("exact_matmul")
def test_drift_is_what_the_dense_model_would_have_had_there(family: str) -> None:
    """The oracle: two whole models, one dense, one rounded layer by layer, and a forward pass of both each time."""
    model = pico_model(family)
    dense, rounded, modelmap = copy.deepcopy(model), copy.deepcopy(model), bind(model)
    wanted: dict[str, Tensor] = {}
    for block in modelmap.blocks:
        for stage in block.stages:
            z, x = inputs_of(dense, stage[0].name), inputs_of(rounded, stage[0].name)
            for port in stage:
                weight: Any = rounded.get_submodule(port.name).weight
                drift = (z - x).T @ x / len(x)
                wanted[port.name] = drift
                weight.data = ROUND(weight.data, {}).dequantize()
    recorder = Drifting()
    facts = quantize(model, recorder, batch_size=2)
    assert [layer.name for layer in facts.layers] == list(wanted)
    moved = 0.0
    for drift, seen in zip(wanted.values(), recorder.seen, strict=True):
        torch.testing.assert_close(seen.double(), drift, rtol=1e-3, atol=1e-4 * float(drift.abs().max()) + 1e-6)
        moved = max(moved, float(drift.abs().max()))
    assert moved > 1e-3  # later layers of a rounded model get other inputs


def test_interrupted_asymmetric_work_resumes_to_the_same_bits() -> None:
    method = Optq(bits=3, group_size=12, gptaq=0.5)
    whole, again, store = pico_model("llama"), pico_model("llama"), Folder()
    quantize(whole, method, store=store)
    assert packed(whole).keys() != set()
    quantize(again, method, store=store)  # every block from the store
    partly = Folder()
    partly.blocks = dict(list(store.blocks.items())[:1])
    third = pico_model("llama")
    quantize(third, method, store=partly)
    for model in (again, third):
        assert all(torch.equal(packed(model)[name], tensor) for name, tensor in packed(whole).items())


def test_the_order_matters_to_the_oracle() -> None:
    """Statistics of the unquantized model are far from the ones above: the test would see the difference."""
    model = pico_model("llama")
    modelmap = bind(model)
    plain = {port.name: input_moment(model, port.name) for port in modelmap.linears}
    wanted = truly_sequential(model, modelmap)
    for name in list(wanted)[:3]:  # nothing stands before these
        assert torch.equal(plain[name], wanted[name])
    far = [float((plain[name] - wanted[name]).norm() / wanted[name].norm()) for name in list(wanted)[3:]]
    assert min(far) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("exact_matmul")
def test_batch_size_is_no_matter(family: str) -> None:
    seen = []
    for batch_size in (1, 3, 5, 64):
        recorder = Recorder()
        quantize(pico_model(family), recorder, batch_size=batch_size)
        seen.append(recorder.seen)
    for others in seen[1:]:
        for one, other in zip(seen[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_a_quantizer_computes_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration may round the inputs of its products; the method it serves must give what it gives anywhere."""
    precisions = []

    def watch(self: Rtn, weight: Tensor, stats: Mapping[str, Tensor], plain: Any = Optq.__call__) -> QTensor:
        precisions.append(torch.get_float32_matmul_precision())
        return plain(self, weight, stats)

    monkeypatch.setattr(Optq, "__call__", watch)
    quantize(pico_model("llama"), Optq(group_size=12, grid="minmax"))
    assert set(precisions) == {torch.get_float32_matmul_precision()} == {"highest"}


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_model_is_the_dense_one_with_decoded_weights(family: str, dtype: torch.dtype) -> None:
    model = pico_model(family, dtype=dtype)
    dense = copy.deepcopy(model)
    quantize(model, Optq(bits=4, group_size=12, grid="minmax"))
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight: Any = dense.get_submodule(name).weight
            weight.data = module.dequantize(dtype)
    inputs = pico_inputs(model)
    torch.testing.assert_close(logits(model, inputs), logits(dense, inputs))
    count = sum(isinstance(module, QuantLinear) for module in model.modules())
    assert dequantize_(model, dtype) == count == len(bind(model).linears)
    assert not packed(model)
    torch.testing.assert_close(logits(model, inputs), logits(dense, inputs))


@pytest.mark.parametrize(
    "method", [Rtn(bits=3, group_size=12), Optq(bits=3, group_size=12, grid="minmax")], ids=["rtn", "optq"]
)
def test_facts_say_what_was_done(method: Quantizer) -> None:
    model = pico_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modelmap = bind(model)
    recorded: list[Tensor] = []
    if method.needs:
        twin = pico_model("llama")
        stream_map = bind(twin)
        with calibration_stream(twin, stream_map, windows()) as stream:
            stream.enter(stream_map.blocks[0])
            recorded.append(stream.collect(stream_map.blocks[0], 0, ["hessian"])["hessian"])
    progress: list[tuple[int, int]] = []
    facts = quantize(model, method, progress=lambda *numbers: progress.append(numbers))
    assert progress == [(1, 2), (2, 2)]
    stored = sum(t.numel() * t.element_size() for t in packed(model).values())
    weights = sum(port.in_features * port.out_features for port in modelmap.linears)
    assert facts.bytes == stored and facts.bits_per_weight == pytest.approx(8 * stored / weights)
    for port, layer in zip(modelmap.linears, facts.layers, strict=True):
        module: Any = model.get_submodule(port.name)
        assert (layer.name, layer.shape) == (port.name, (port.out_features, port.in_features))
        assert layer.bits == module.qtensor.bits_per_weight
        assert 0 < layer.error < 0.2
    first = facts.layers[0]
    w = before[f"{first.name}.weight"].double()
    off = model.get_submodule(first.name).dequantize().double() - w  # type: ignore[operator]
    h = recorded[0].double() if recorded else torch.eye(w.shape[1], dtype=torch.float64)
    assert first.error == pytest.approx(float(((off @ h) * off).sum() / ((w @ h) * w).sum()), rel=1e-3)
    assert facts.to_dict()["bits_per_weight"] == facts.bits_per_weight


def reasons(facts: QuantizeFacts) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in facts.skipped}


@every_pico
def test_every_linear_and_embedding_is_quantized_or_has_a_reason(family: str) -> None:
    model = pico_model(family)
    names = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    facts = quantize_(model, bind(model), all_linear(ROUND))
    done = {layer.name for layer in facts.layers}
    assert done | set(reasons(facts)) == names
    assert not done & set(reasons(facts))
    assert all(reasons(facts).values())
    assert {name for name, m in model.named_modules() if isinstance(m, QuantLinear)} == done


def test_reasons_are_told_apart() -> None:
    assert reasons(quantize_(pico_model("llama"), bind(pico_model("llama")), all_linear(ROUND))) == {
        "model.embed_tokens": "an embedding, not a linear",
        "lm_head": "outside the decoder and encoder blocks",
    }
    tied = pico_model("llama-tied")
    assert reasons(quantize(tied, ROUND))["lm_head"] == "tied to model.embed_tokens"
    ignored = reasons(quantize(pico_model("llama"), ROUND, ignore=("down_proj", "*.0.*.q_proj")))
    assert ignored["model.layers.1.mlp.down_proj"] == "ignored by 'down_proj'"
    assert ignored["model.layers.0.self_attn.q_proj"] == "ignored by '*.0.*.q_proj'"
    assert len(ignored) == 2 + 3
    assert not any(
        "language_model" in name and "embed" not in name for name in reasons(quantize(pico_model("llava"), ROUND))
    )


def test_a_predicate_gives_layers_different_methods() -> None:
    model = pico_model("llama")

    def choose(port: Port) -> Quantizer | str:
        if port.block is None:
            return "not in a block"
        return Rtn(bits=8) if port.stage == 3 else Optq(bits=2, group_size=12, grid="minmax")

    facts = quantize_(model, bind(model), choose, tokens=windows())
    bits = {layer.name.rsplit(".", 1)[-1]: model.get_submodule(layer.name).layout.bits for layer in facts.layers}
    assert set(bits.values()) == {2, 8} and bits["down_proj"] == 8


def mixed_modes(model: nn.Module) -> nn.Module:
    """Some modules training and some not, and some parameters frozen."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 != 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [ROUND, Recorder()], ids=["without data", "with data"])
def test_everything_else_stays_as_it_was(family: str, method: Quantizer) -> None:
    model = mixed_modes(pico_model(family))
    names = [name for name, _ in model.named_modules()]
    before, modules, flags = (
        modes(model),
        dict(model.named_modules()),
        {n: p.requires_grad for n, p in model.named_parameters()},
    )
    tensors = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    rng, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    facts = quantize(model, method)
    assert [name for name, _ in model.named_modules()] == names
    assert modes(model) == before
    done = {layer.name for layer in facts.layers}
    for name, module in model.named_modules():
        assert (module is modules[name]) != (name in done)
        assert not module._forward_hooks and not module._forward_pre_hooks
    packed_names = set(packed(model))
    for name, parameter in model.named_parameters():
        if name in packed_names:
            assert not parameter.requires_grad
        elif name.rsplit(".", 1)[0] not in done:
            assert parameter is tensors[name][0]
            assert torch.equal(parameter, tensors[name][1]) and parameter.requires_grad == flags[name]
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("after", [1, 3, 9])
def test_the_model_is_whole_after_a_failure(family: str, after: int) -> None:
    model = mixed_modes(pico_model(family))
    names = [name for name, _ in model.named_modules()]
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    kinds = [[type(block) for block in stack] for stack in blocks]
    before, precision = modes(model), torch.get_float32_matmul_precision()
    with pytest.raises(KeyboardInterrupt):
        quantize(model, Breaking(after))
    assert [name for name, _ in model.named_modules()] == names
    assert [[type(block) for block in stack] for stack in blocks] == kinds
    assert modes(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.get_float32_matmul_precision() == precision and torch.is_grad_enabled()
    assert bool(torch.isfinite(logits(model.eval(), pico_inputs(model))).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interrupted_work_resumes_to_the_same_bits(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Affine.dequantize

    def decode(self: Affine, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """A layout may decode worse in half precision; a resumed run must not compute with that where no other did."""
        weight = plain(self, tensors, dtype)
        return weight if dtype == torch.float32 else 1.25 * weight

    monkeypatch.setattr(Affine, "dequantize", decode)
    method = Optq(bits=3, group_size=12, grid="minmax")
    whole = pico_model(family, dtype=dtype)
    quantize(whole, method)
    wanted = packed(whole)
    blocks = bind(whole).blocks
    for done in range(1, len(blocks) + 1):
        store = Folder()
        first = pico_model(family, dtype=dtype)
        quantize(first, method, store=store)
        store.blocks = {block.name: store.blocks[block.name] for block in blocks[:done]}
        resumed = pico_model(family, dtype=dtype)
        facts = quantize(resumed, method, store=store)
        assert store.loaded == [block.name for block in blocks[:done]]
        assert list(store.blocks) == [block.name for block in blocks]
        got = packed(resumed)
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)
        assert [layer.name for layer in facts.layers] == [port.name for port in bind(whole).linears]
        assert all(layer.error >= 0 for layer in facts.layers)


def test_blocks_are_materialised_one_by_one() -> None:
    model = pico_model("llama")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = copy.deepcopy(model)
    quantize(wanted, Optq(group_size=12, grid="minmax"))
    blocks = [model.get_submodule(block.name) for block in bind(model).blocks]
    for block in blocks:
        block.to("meta")
    on_meta: list[list[bool]] = []

    def materialise(module: nn.Module, name: str) -> None:
        on_meta.append([next(block.parameters()).is_meta for block in blocks])
        module.to_empty(device="cpu")
        for key, parameter in module.named_parameters():
            parameter.data.copy_(weights[f"{name}.{key}"])

    quantize(model, Optq(group_size=12, grid="minmax"), materialise=materialise)
    assert on_meta == [[True, True], [True, True], [True, True], [False, True]]  # they are looked at first, and left
    got, expected = packed(model), packed(wanted)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("method", [ROUND, Optq(bits=2, group_size=12)], ids=["without data", "with data"])
def test_nothing_is_written_where_weights_lie(method: Quantizer) -> None:
    """They may be pages of a file that is mapped: a page that is written to becomes memory, and stays."""
    model = pico_model("llama")
    before = {name: (p.data, p.detach().clone()) for name, p in model.named_parameters()}
    quantize_(model, bind(model), all_linear(method), tokens=torch.randint(VOCAB_SIZE, (2, 8)))
    assert all(torch.equal(theirs, copied) for theirs, copied in before.values())
    assert any(isinstance(module, QuantLinear) for module in model.modules())


def test_tokens_are_asked_for_only_where_needed() -> None:
    model = pico_model("llama")
    with pytest.raises(CalibrationError, match="needs calibration data") as caught:
        quantize_(model, bind(model), all_linear(Optq()))
    assert "hessian" in str(caught.value)
    quantize_(model, bind(model), all_linear(Rtn(group_size=12)))


def test_nothing_to_quantize_is_an_error() -> None:
    model = pico_model("llama")
    with pytest.raises(RecipeError, match="nothing to quantize") as caught:
        quantize(model, ROUND, ignore=("*",))
    assert "ignored by '*'" in str(caught.value)


@pytest.mark.parametrize("token", [VOCAB_SIZE, 10**6, -1])
def test_a_token_outside_the_vocabulary_is_an_error(token: int) -> None:
    model, tokens = pico_model("llama"), windows()
    tokens[2, 3] = token
    with pytest.raises(CalibrationError, match="not in the model's vocabulary") as caught:
        quantize_(model, bind(model), all_linear(Recorder()), tokens=tokens)
    assert str(token) in str(caught.value)


@pytest.mark.parametrize("method", [ROUND, Recorder()], ids=["without data", "with data"])
def test_a_quantized_model_is_not_quantized_again(method: Quantizer) -> None:
    model = pico_model("llama")
    quantize(model, ROUND)
    before = {name: tensor.clone() for name, tensor in packed(model).items()}
    with pytest.raises(ShapeError, match="only a plain linear can be quantized") as caught:
        quantize(model, method)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value) and "QuantLinear" in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in packed(model).items())


@pytest.mark.parametrize("method", [ROUND, Recorder()], ids=["without data", "with data"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(method: Quantizer, bad: float) -> None:
    model = pico_model("llama")
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.get_parameter(f"{name}.weight")[3, 4] = bad
    with pytest.raises(FormatError, match="not finite") as caught:
        quantize(model, method)
    assert caught.value.facts["where"] == f"{name}.weight"


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_weight_that_keeps_its_bits_must_be_finite_too(name: str, lazy: bool, tmp_path: Path) -> None:
    """It is found before anything is quantized."""
    model: Any = pico_model("llama")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = torch.inf
    model.save_pretrained(tmp_path)
    pico_tokenizer().save_pretrained(tmp_path)
    loaded = load(str(tmp_path), lazy=lazy)
    materialise, done = loaded.materialise, []
    with pytest.raises(FormatError, match="a weight is not finite") as caught:
        quantize_(
            loaded.model, bind(loaded.model), all_linear(ROUND), materialise=materialise,
            progress=lambda *facts: done.append(facts),
        )  # fmt: skip
    assert caught.value.facts["where"] == name and not done
    first = loaded.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert first.is_meta == lazy


def test_an_input_that_is_not_finite_is_named() -> None:
    model = pico_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.input_layernorm.weight")[0] = 3e38  # which is finite
    with pytest.raises(CalibrationError, match="not finite") as caught:
        quantize(model, Optq(group_size=12, grid="minmax"))
    assert "model.layers.1.self_attn.q_proj" in str(caught.value)
