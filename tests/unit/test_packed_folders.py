"""compressed-tensors folders read as packed layers: ours, those of its own library, and hostile ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.utils.match import match_targets
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pico import logits, pico_inputs, pico_model, pico_tokenizer
from slimtune.arch import Port, Space, bind
from slimtune.errors import FormatError
from slimtune.export import Source, export
from slimtune.export.config_groups import CompressedTensors
from slimtune.export.foreign import packed_format
from slimtune.export.load import load, read_model
from slimtune.export.native import settle_
from slimtune.quant.apply import Choose, all_linear, quantize_
from slimtune.quant.layouts import Affine
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn
from slimtune.quant.scattered import Scattered


def rtn(**fields: Any) -> Rtn:
    return Rtn(**{"bits": 4, "group_size": 8, "sym": True, "grid": "minmax", **fields})


def quantized(family: str = "llama", choose: Choose | None = None) -> PreTrainedModel:
    model = pico_model(family)
    quantize_(model, bind(model), choose or all_linear(rtn()))
    settle_(model)
    return model


def written(model: PreTrainedModel, folder: Path) -> Path:
    export(Source(model, pico_tokenizer(), "owner/base"), "compressed-tensors", folder)
    return folder


def differing(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert got.keys() == wanted.keys()
    return [k for k in wanted if got[k].dtype != wanted[k].dtype or not torch.equal(got[k], wanted[k])]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "phi3", "opt", "t5", "llava"])
@pytest.mark.parametrize("fields", [{"bits": 3, "sym": False}, {"bits": 2, "group_size": -1}], ids=["groups", "rows"])
def test_our_own_export_goes_round_bit_for_bit(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(family, all_linear(rtn(**fields)))
    read = load(str(written(model, tmp_path / "out"))).model
    assert differing(read.state_dict(), model.state_dict()) == []
    inputs = pico_inputs(model)
    assert torch.equal(logits(read, inputs), logits(model, inputs))


def test_several_schemes_go_round(tmp_path: Path) -> None:
    def choose(port: Port) -> Rtn | str:
        if port.block is None:
            return "outside the blocks"
        return rtn(bits=3, group_size=-1) if Space.FFN in (port.reads, *port.writes) else rtn(bits=4)

    model = quantized("llama", choose)
    read = load(str(written(model, tmp_path / "out"))).model
    assert {m.layout.bits for m in read.modules() if isinstance(m, QuantLinear)} == {3, 4}  # type: ignore[attr-defined]
    assert differing(read.state_dict(), model.state_dict()) == []


# --- layers that the library of the format packed ---


def facts(bits: int, sym: bool, group_size: int = -1, targets: tuple[str, ...] = ("Linear",)) -> dict[str, Any]:
    strategy = {"strategy": "channel", "group_size": None} if group_size == -1 else {"strategy": "group"}
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "group_size": group_size, **strategy}
    group = {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "sparsity_config": {},
        "transform_config": {},
        "kv_cache_scheme": None,
    }


def theirs(bits: int, sym: bool, group_size: int, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that the library packs, and the weight that it decodes."""
    rows, columns = shape
    groups = 1 if group_size == -1 else columns // group_size
    scale = torch.rand(rows, groups).to(torch.float16) * 0.1 + 0.01
    low = 2 ** (bits - 1)
    zero = (
        torch.zeros(rows, groups, dtype=torch.int8) if sym else torch.randint(-low, low, (rows, groups)).to(torch.int8)
    )
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=sym, group_size=group_size)
    )
    state = {"weight": torch.randn(shape, dtype=torch.float16), "weight_scale": scale, "weight_zero_point": zero}
    packed = PackedQuantizationCompressor.compress(state, scheme)
    return packed, PackedQuantizationCompressor.decompress(packed, scheme)["weight"]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [8, -1])
@pytest.mark.parametrize("shape", [(10, 24), (16, 40), (33, 72)])
def test_reads_what_its_library_packs(bits: int, sym: bool, group_size: int, shape: tuple[int, int]) -> None:
    packed, wanted = theirs(bits, sym, group_size, shape)
    weight = CompressedTensors(facts(bits, sym, group_size)).decode("q", packed, *shape)[0]
    assert torch.equal(weight.dequantize(torch.float16), wanted)
    assert isinstance(weight.layout, Affine) and weight.layout.scale_dtype == "float16"
    assert weight.layout.symmetric or not sym


def test_act_order_is_read() -> None:
    packed, _ = theirs(4, False, 8, (16, 32))
    plain = CompressedTensors(facts(4, False, 8)).decode("q", packed, 16, 32)[0]
    order = torch.randperm(32)
    packed["weight_g_idx"] = (torch.arange(32) // 8).to(torch.int32)[order]
    mixed = CompressedTensors(facts(4, False, 8)).decode("q", packed, 16, 32)[0]
    assert isinstance(mixed.layout, Scattered)
    codes = plain.dequantize(torch.float64) / plain.tensors["scale"].double().repeat_interleave(8, 1)
    codes += plain.tensors["zero"].repeat_interleave(8, 1)
    group = packed["weight_g_idx"].long()
    wanted = (codes - plain.tensors["zero"][:, group]) * plain.tensors["scale"][:, group].double()
    torch.testing.assert_close(mixed.dequantize(torch.float64), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("targets", "bits"),
    [(("Linear",), 8), (("a.b",), 8), (("re:a[.].*",), 8), (("re:b",), 4), (("a",), 4), (("c", "re:.*b"), 8)],
)
def test_a_name_or_a_pattern_says_more_than_a_class(targets: tuple[str, ...], bits: int) -> None:
    both = facts(4, True)
    both["config_groups"]["group_1"] = facts(8, True, -1, targets)["config_groups"]["group_0"]
    schemes = {target: width for width, names in ((4, ("Linear",)), (8, targets)) for target in names}
    assert schemes[match_targets("a.b", torch.nn.Linear(1, 1), schemes)[0]] == bits  # as its library has it
    packed, wanted = theirs(bits, True, -1, (4, 32))
    assert torch.equal(CompressedTensors(both).decode("a.b", packed, 4, 32)[0].dequantize(torch.float16), wanted)


# --- hostile folders ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(quantized("llama", all_linear(rtn(sym=False))), tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


Break = Callable[[Path], None]
LAYER = "model.layers.1.mlp.up_proj"


def edit(change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], object]) -> Break:
    """Change the configuration, its first group, or the weights of that."""

    def act(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        quantization = whole["quantization_config"]
        group = quantization["config_groups"]["group_0"]
        change(quantization, group, group["weights"])
        (folder / "config.json").write_text(json.dumps(whole))

    return act


def tensor(leaf: str, change: Callable[[Tensor], Tensor | None]) -> Break:
    def act(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        new = change(tensors.pop(f"{LAYER}.{leaf}"))
        if new is not None:
            tensors[f"{LAYER}.{leaf}"] = new.contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return act


HOSTILE: dict[str, tuple[Break, str]] = {
    "rotated": (edit(lambda q, g, w: q.update(transform_config={"x": 1})), "transform_config"),
    "sparse": (edit(lambda q, g, w: q.update(sparsity_config={"format": "sparse-24"})), "sparsity_config"),
    "a quantized cache": (edit(lambda q, g, w: q.update(kv_cache_scheme={"num_bits": 8})), "kv_cache_scheme"),
    "no groups": (edit(lambda q, g, w: q.pop("config_groups")), "malformed"),
    "groups a list": (edit(lambda q, g, w: q.update(config_groups=[1])), "malformed"),
    "no targets": (edit(lambda q, g, w: g.pop("targets")), "malformed"),
    "no weights": (edit(lambda q, g, w: g.update(weights=None)), "malformed"),
    "bits a word": (edit(lambda q, g, w: w.update(num_bits="four")), "malformed"),
    "9 bits": (edit(lambda q, g, w: w.update(num_bits=9)), "num_bits: 9"),
    "floats": (edit(lambda q, g, w: w.update(type="float")), "type: float"),
    "blocks": (edit(lambda q, g, w: w.update(strategy="block")), "strategy: block"),
    "no group size": (edit(lambda q, g, w: w.update(group_size=0)), "group_size: 0"),
    "symmetric a word": (edit(lambda q, g, w: w.update(symmetric="yes")), "symmetric: yes"),
    "another format": (edit(lambda q, g, w: g.update(format="int-quantized")), "unknown in int-quantized"),
    "activations": (edit(lambda q, g, w: g.update(input_activations={"num_bits": 8})), "input_activations"),
    "no group for a layer": (edit(lambda q, g, w: g.update(targets=["re:lm_head"])), "no group"),
    "other bits": (edit(lambda q, g, w: w.update(num_bits=8)), "a wrong tensor"),
    "other groups": (edit(lambda q, g, w: w.update(group_size=4)), "a wrong tensor"),
    "no scale": (tensor("weight_scale", lambda t: None), "lacks tensors"),
    "no zero points": (tensor("weight_zero_point", lambda t: None), "lacks tensors"),
    "codes cut": (tensor("weight_packed", lambda t: t[:, :-1]), "a wrong tensor"),
    "codes wide": (tensor("weight_packed", lambda t: t.to(torch.int64)), "a wrong tensor"),
    "zero points cut": (tensor("weight_zero_point", lambda t: t[:-1]), "a wrong tensor"),
    "scales not finite": (tensor("weight_scale", lambda t: t * float("nan")), "not finite"),
    "another shape": (tensor("weight_shape", lambda t: t + 1), "another shape"),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_broken_folder_is_one_clear_error(case: str, copy: Path) -> None:
    breaks, text = HOSTILE[case]
    breaks(copy)
    with pytest.raises(FormatError) as caught:
        load(str(copy))
    assert text in str(caught.value)


@pytest.mark.parametrize("format", ["nvfp4-pack-quantized", "mixed-precision", "dense", None])
def test_formats_that_are_not_packed_are_left_to_transformers(format: str | None) -> None:
    told = {**facts(4, True), "format": format}
    assert packed_format(told) is None
    told["config_groups"]["group_0"]["format"] = "pack-quantized"  # a group says more than the folder
    assert isinstance(packed_format(told), CompressedTensors)


def test_what_transformers_reads_is_what_we_read(folder: Path) -> None:
    model = load(str(folder)).model
    inputs = pico_inputs(model)
    wanted = logits(read_model(folder, torch.float32), inputs)
    torch.testing.assert_close(logits(model, inputs), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
