"""Every export format: what is written loads in the engines it is for, and the source stays as it was."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pico import logits, pico_inputs, pico_model, pico_tokenizer
from slimtune.arch import Port, Space, bind
from slimtune.errors import BackendMissing, FormatError, RecipeError, SlimtuneError
from slimtune.export import EXPORTERS, Source, export
from slimtune.export.base import probe_logits
from slimtune.export.compressed_tensors import Scheme, packed_layer, schemes_of
from slimtune.export.load import read_model
from slimtune.export.native import settle_
from slimtune.linalg.packing import unpack
from slimtune.lora.attach import add_lora, base_of
from slimtune.quant.apply import Choose, all_linear, quantize_
from slimtune.quant.layouts import Affine
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn

NAME = "owner/base"
FAMILIES = ["llama", "qwen2", "gemma3", "phi3", "t5", "llava"]
FORMATS = ["compressed-tensors", "peft", "safetensors"]


def rtn(**fields: Any) -> Rtn:
    return Rtn(**{"bits": 4, "group_size": 8, "sym": True, "grid": "minmax", **fields})


def quantized(
    family: str = "llama", choose: Choose | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A quantized pico model that transformers takes for one, as after a quantize step."""
    model = pico_model(family, dtype=dtype)
    quantize_(model, bind(model), choose or all_linear(rtn()))
    settle_(model)
    return model


def adapted(model: PreTrainedModel) -> nn.Module:
    """`model` with an adapter that does something."""
    wrapped = add_lora(model, r=2, base_name=NAME)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Source:
    return Source(model, pico_tokenizer(), NAME, dtype)


def config_in(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return facts


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an export could spoil."""
    base: Any = base_of(model)
    facts = {key: value for key, value in base.__dict__.items() if not key.startswith("_") and key != "training"}
    return {
        "config": base.config.to_dict(),
        "facts": facts,
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "adapters": (list(model.peft_config), model.active_adapters) if model is not base else None,  # type: ignore[operator]
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any], state: dict[str, Tensor], scores: Tensor) -> None:
    assert snapshot(model) == before
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert [name for name in state if not torch.equal(after[name], state[name])] == []
    assert torch.equal(probe_logits(model), scores)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_export_of_an_adapted_model_reads_back_and_leaves_it_as_it_was(
    format: str, family: str, tmp_path: Path
) -> None:
    model = adapted(quantized(family))
    scores = probe_logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = snapshot(model)
    manifest = export(of(model), format, tmp_path / "out")
    assert manifest.max_logit_difference <= 1e-5 * float(scores.abs().max())
    assert_unchanged(model, before, state, scores)
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(manifest.files) == written
    assert manifest.bytes == sum((tmp_path / "out" / file).stat().st_size for file in written)
    assert NAME in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("packed", [True, False])
def test_the_note_of_an_adapter_says_quantized_where_it_was(packed: bool, tmp_path: Path) -> None:
    export(of(adapted(quantized("llama") if packed else pico_model("llama"))), "peft", tmp_path / "out")
    assert ("as quantized" in (tmp_path / "out" / "README.md").read_text()) == packed


@pytest.mark.parametrize("format", ["compressed-tensors", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_export_in_sixteen_bits_says_so(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized("gemma3")
    export(of(model, dtype), format, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {dtype}
    assert "lm_head.weight" not in tensors  # it is the embedding
    assert config_in(tmp_path / "out")["dtype"] == str(dtype).removeprefix("torch.")
    assert model.config.dtype == torch.float32


def test_merged_model_is_dense_and_computes_base_plus_adapter(tmp_path: Path) -> None:
    model = adapted(quantized("qwen2"))
    inputs = pico_inputs(base_of(model))
    export(of(model), "safetensors", tmp_path / "out")
    merged = read_model(tmp_path / "out", torch.float32)
    assert "quantization_config" not in config_in(tmp_path / "out")
    assert not any(isinstance(module, QuantLinear) for module in merged.modules())
    assert merged.state_dict().keys() == pico_model("qwen2").state_dict().keys()
    assert_close(logits(merged, inputs), logits(model, inputs))
    with model.disable_adapter():  # type: ignore[operator]
        assert float((logits(merged, inputs) - logits(model, inputs)).abs().max()) > 0.01


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_dense_model_with_an_adapter_is_merged(tmp_path: Path) -> None:
    model = adapted(pico_model("llama-biased"))
    assert export(of(model), "safetensors", tmp_path / "out").max_logit_difference < 1e-4


# --- what others load: one process that never imports slimtune reads all of it ---

STRANGER = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
tokens = load_file(root / "tokens.safetensors")["input_ids"]
out = {}

def show(name, model):
    with torch.no_grad():
        out[name] = model.eval()(input_ids=tokens).logits

for folder in sorted(root.glob("packed-*")):
    model = AutoModelForCausalLM.from_pretrained(folder)
    show(folder.name, model)
    if (folder / "adapter").is_dir():
        show(folder.name + "+adapter", PeftModel.from_pretrained(model, folder / "adapter"))
original = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
tuned = PeftModel.from_pretrained(original, root / "peft")
show("peft", tuned)
for name, tensor in tuned.state_dict().items():
    if ".lora_" in name:
        out[name] = tensor.contiguous()
assert not any(name.split(".")[0] == "slimtune" for name in sys.modules)
save_file(out, root / "out.safetensors")
"""


def by_space(port: Port) -> Rtn | str:
    """The feed-forward layers in 3 bits, the rest in 4, in groups of other sizes."""
    if port.block is None:
        return "outside the blocks"
    return rtn(bits=3, group_size=-1) if Space.FFN in (port.reads, *port.writes) else rtn(bits=4)


CHOICES: dict[str, Choose] = {
    "packed-2-asymmetric": all_linear(rtn(bits=2, sym=False)),
    "packed-3-rows": all_linear(rtn(bits=3, group_size=-1)),
    "packed-8-some-dense": all_linear(rtn(bits=8, sym=False, group_size=-1), ignore=("*.0.*",)),
    "packed-mixed": by_space,
}


@dataclass
class World:
    """What the stranger was given, and what it computed."""

    root: Path
    tokens: Tensor
    wanted: dict[str, Tensor]
    got: dict[str, Tensor]
    tuned: nn.Module


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("world")
    tokens = pico_inputs(pico_model("llama"))["input_ids"]
    wanted = {}
    for name, choose in CHOICES.items():
        model = quantized("llama", choose)
        wanted[name] = logits(model, {"input_ids": tokens})
        if name != "packed-3-rows":  # with and without an adapter
            export_of: nn.Module = adapted(model)
            wanted[f"{name}+adapter"] = logits(export_of, {"input_ids": tokens})
        else:
            export_of = model
        export(of(export_of), "compressed-tensors", root / name)
    tuned = trained(root, tokens)
    save_file({"input_ids": tokens}, root / "tokens.safetensors")
    done = subprocess.run([sys.executable, "-c", STRANGER, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return World(root, tokens, wanted, load_file(root / "out.safetensors"), tuned)


def trained(root: Path, tokens: Tensor) -> nn.Module:
    """An adapter trained for a few steps on the quantized twin of a 16-bit base; both are written to `root`."""
    original = pico_model("llama", dtype=torch.bfloat16)
    original.save_pretrained(root / "base")
    model = read_model(root / "base", torch.float32)
    quantize_(model, bind(model), all_linear(rtn(bits=2, sym=False)))
    tuned = add_lora(model, r=2, base_name=NAME).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        tuned(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    export(of(tuned.eval()), "peft", root / "peft")
    return tuned


@pytest.mark.parametrize("name", [*CHOICES, *(f"{n}+adapter" for n in CHOICES if n != "packed-3-rows")])
def test_packed_folder_loads_without_slimtune(name: str, world: World) -> None:
    assert_close(world.got[name], world.wanted[name])


def test_adapter_trained_on_the_packed_base_loads_on_the_original_without_slimtune(world: World) -> None:
    tuned = world.tuned.state_dict()
    factors = {name: tensor for name, tensor in tuned.items() if ".lora_" in name}
    assert any(float(tensor.abs().max()) > 0 for name, tensor in factors.items() if "lora_B" in name)
    assert {name for name in world.got if ".lora_" in name} == set(factors)
    assert [name for name in factors if not torch.equal(world.got[name], factors[name])] == []
    model = read_model(world.root / "base", torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            key = f"base_model.model.{name}.lora_"
            if f"{key}A.default.weight" in factors:  # lora_alpha 32 / r 2
                module.weight += 16 * factors[f"{key}B.default.weight"] @ factors[f"{key}A.default.weight"]  # type: ignore[operator]
    assert_close(world.got["peft"], logits(model, {"input_ids": world.tokens}))
    assert json.loads((world.root / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == NAME


def test_one_scheme_is_written_for_every_engine_and_several_by_name(world: World) -> None:
    one = config_in(world.root / "packed-8-some-dense")["quantization_config"]
    assert (one["quant_method"], one["format"], one["quantization_status"]) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    assert [group["targets"] for group in one["config_groups"].values()] == [["Linear"]]
    assert len(one["ignore"]) == 8 and {"lm_head", "model.layers.0.mlp.up_proj"} < set(one["ignore"])
    mixed = config_in(world.root / "packed-mixed")["quantization_config"]
    assert mixed["ignore"] == ["lm_head"]
    groups = mixed["config_groups"].values()
    weights = {(group["weights"]["num_bits"], group["weights"]["group_size"]) for group in groups}
    assert len(groups) == 2 and weights == {(3, None), (4, 8)}
    names = [set(group["targets"]) for group in groups]
    assert len(set.union(*names)) == sum(len(group) for group in names) == 14


# --- compressed-tensors, bit for bit ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [8, -1])
@pytest.mark.parametrize("shape", [(10, 24), (1, 40), (33, 72)])
def test_packed_tensors_are_those_of_compressed_tensors(
    bits: int, sym: bool, group_size: int, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape) + 0.3
    layer = QuantLinear.from_linear(nn.Linear(*shape[::-1]), rtn(bits=bits, sym=sym, group_size=group_size)(weight, {}))
    ours = packed_layer(layer, torch.float32)
    codes = unpack(layer.qtensor.tensors["codes"], bits, shape[1])
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(ours["weight_packed"], pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(ours["weight_packed"], bits, torch.Size(shape)), signed)
    if not sym:
        zero = (layer.qtensor.tensors["zero"].to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(ours["weight_zero_point"], pack_to_int32(zero, bits, packed_dim=0))
    assert all(tensor.is_contiguous() for tensor in ours.values())
    args = QuantizationArgs(num_bits=bits, symmetric=sym, group_size=group_size)
    theirs = PackedQuantizationCompressor.decompress(ours, QuantizationScheme(targets=["Linear"], weights=args))
    assert torch.equal(theirs["weight"], layer.dequantize(torch.float32))


@dataclass(frozen=True)
class Raw:
    """A layout that is not affine."""

    tag: ClassVar[str] = "raw"
    out_features: int = 4
    in_features: int = 8

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight_values": ((self.out_features, self.in_features), torch.float32)}


def test_layers_the_format_cannot_hold_are_all_named(tmp_path: Path) -> None:
    model = quantized("llama", all_linear(rtn(group_size=16)))  # 40 features inside the MLP, 48 into o_proj
    block: Any = model.get_submodule("model.layers.1.self_attn")
    block.v_proj = QuantLinear(Raw())  # type: ignore[arg-type]
    with pytest.raises(FormatError) as caught:
        schemes_of({name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)})
    named = [line.split(":")[-2].strip() for line in str(caught.value).splitlines() if "model.layers" in line]
    assert named == ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    assert "its layout is 'raw', neither affine nor float8" in str(caught.value)
    assert "groups of 16 do not divide 40 input features" in str(caught.value)
    assert "32, 64 or -1" in str(caught.value)
    with pytest.raises(FormatError, match="down_proj"):
        export(of(quantized("llama", all_linear(rtn(group_size=16)))), "compressed-tensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_mixed_zero_points_are_refused(tmp_path: Path) -> None:
    def choose(port: Port) -> Rtn | str:
        method = by_space(port)
        return method if isinstance(method, str) else rtn(bits=method.bits, sym=False)

    with pytest.raises(FormatError, match="3 bits, group_size 8, zero points") as caught:
        export(of(quantized("llama", choose)), "compressed-tensors", tmp_path / "out")
    assert "model.layers.0.self_attn." in str(caught.value) and "and 3 more" in str(caught.value)
    assert "sym: true" in str(caught.value)


def test_rows_of_one_group_join_the_groups_of_their_size() -> None:
    def layers(*widths: tuple[int, int]) -> dict[str, QuantLinear]:
        return {str(n): QuantLinear(Affine(4, width, 4, group, True)) for n, (width, group) in enumerate(widths)}

    assert schemes_of(layers((16, 16), (32, 16))) == {Scheme(4, 16, True, None): ["0", "1"]}
    assert schemes_of(layers((16, 16), (24, 24))) == {Scheme(4, -1, True, None): ["0", "1"]}
    assert schemes_of(layers((16, 16), (32, 8))) == {Scheme(4, -1, True, None): ["0"], Scheme(4, 8, True, None): ["1"]}


@pytest.mark.parametrize("version", [None, "0.16.1"])
def test_without_the_reader_nothing_is_written(version: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    real = importlib.metadata.version

    def installed(name: str) -> str:
        if name != "compressed-tensors":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    source = of(quantized())
    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(BackendMissing, match=r"slimtune\[compressed\]"):
        export(source, "compressed-tensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "remedy"), [("compressed-tensors", "quantize step"), ("peft", "lora step")])
def test_formats_that_do_not_fit_a_plain_model_say_so(format: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=remedy):
        export(of(pico_model("llama")), format, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- when it goes wrong ---


def after_writing(format: str, act: Callable[[Path], None], monkeypatch: Any) -> None:
    """Let `act` happen inside the exporter, after everything is on disk."""
    exporter = EXPORTERS[format]
    write = exporter.write

    def write_and_act(self: Any, source: Source, folder: Path) -> None:
        write(self, source, folder)
        act(folder)

    monkeypatch.setattr(exporter, "write", write_and_act)


@pytest.mark.parametrize("format", FORMATS)
def test_full_disk_leaves_the_old_folder(format: str, tmp_path: Path, monkeypatch: Any) -> None:
    def no_space(folder: Path) -> None:
        assert any(folder.iterdir())
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("kept")
    after_writing(format, no_space, monkeypatch)
    model = adapted(quantized())
    scores, before = probe_logits(model), snapshot(model)
    with pytest.raises(RecipeError, match="the disk is full"):
        export(of(model), format, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old.txt"]
    assert snapshot(model) == before
    assert torch.equal(probe_logits(model), scores)


def spoil(name: str, tensor: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Change the first tensor whose name ends in `tensor` in the file `name`."""

    def act(folder: Path) -> None:
        tensors = load_file(folder / name)
        key = next(key for key in tensors if key.endswith(tensor))
        save_file({**tensors, key: change(tensors[key])}, folder / name, metadata={"format": "pt"})

    return act


ADAPTER = "adapter_model.safetensors"
SPOILT: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "one packed word": (
        "compressed-tensors",
        spoil("model.safetensors", "v_proj.weight_packed", lambda t: t ^ 8),
        "compute",
    ),
    "a packed tensor cut": (
        "compressed-tensors",
        spoil("model.safetensors", "v_proj.weight_scale", lambda t: t[:-1].clone()),
        "cannot be loaded",
    ),
    "adapter beside": (
        "compressed-tensors",
        spoil(f"adapter/{ADAPTER}", "up_proj.lora_B.weight", lambda t: t + 0.1),
        "compute",
    ),
    "adapter": ("peft", spoil(ADAPTER, "up_proj.lora_B.weight", lambda t: t + 0.1), "compute"),
    "not finite": ("peft", spoil(ADAPTER, "up_proj.lora_B.weight", lambda t: t / 0), "not finite"),
    "a weight": ("safetensors", spoil("model.safetensors", "up_proj.weight", lambda t: t + 0.01), "compute"),
    "NaN": ("safetensors", spoil("model.safetensors", "up_proj.weight", lambda t: t * torch.nan), "compute"),
}


@pytest.mark.parametrize("case", sorted(SPOILT))
def test_export_that_computes_something_else_is_refused(case: str, tmp_path: Path, monkeypatch: Any) -> None:
    format, act, text = SPOILT[case]
    after_writing(format, act, monkeypatch)
    model = adapted(quantized())
    scores, before = probe_logits(model), snapshot(model)
    with pytest.raises(SlimtuneError, match=text) as caught:
        export(of(model), format, tmp_path / "out")
    assert isinstance(caught.value, FormatError)
    assert list(tmp_path.iterdir()) == []
    assert snapshot(model) == before
    assert torch.equal(probe_logits(model), scores)


def test_a_model_that_computes_no_numbers_is_not_exported(tmp_path: Path) -> None:
    model = pico_model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = torch.nan
    with pytest.raises(FormatError, match="a weight is not finite") as caught:
        export(of(model), "safetensors", tmp_path / "out")
    assert caught.value.facts["where"] == "model.norm.weight" and not (tmp_path / "out").exists()
