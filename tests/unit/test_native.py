"""slimtune's own model folder, and what is read from folders that are broken or hostile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pico import PICO, logits, pico_inputs, pico_model, pico_tokenizer, save_pico
from slimtune.arch import bind
from slimtune.errors import FormatError, UnknownArchitecture
from slimtune.export.load import load, read_model
from slimtune.export.native import write_model
from slimtune.hub import SlimtuneConfig
from slimtune.lora.attach import add_lora
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn

NAME = "owner/base"


def quantized(family: str = "llama", **fields: Any) -> PreTrainedModel:
    model = pico_model(family)
    quantize_(model, bind(model), all_linear(Rtn(**{"bits": 3, "group_size": 16, "grid": "minmax", **fields})))
    return model


def packed(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{leaf}": getattr(module, leaf)
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for leaf in module.names
    }


def differing(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert got.keys() == wanted.keys()
    return [k for k in wanted if got[k].dtype != wanted[k].dtype or not torch.equal(got[k], wanted[k])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized pico Llama."""
    path = tmp_path_factory.mktemp("native") / "model"
    path.mkdir()
    write_model(quantized(), pico_tokenizer(), path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3", "opt", "t5", "llava"])
def test_folder_reads_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = quantized(family, sym=family == "qwen2")
    write_model(model, pico_tokenizer(), tmp_path)
    loaded = read_model(tmp_path, torch.float32)
    assert packed(model)
    assert differing(loaded.state_dict(), model.state_dict()) == []
    inputs = pico_inputs(model)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_tensors_keep_their_dtype_whatever_the_model_has(folder: Path, dtype: torch.dtype) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert loaded.get_input_embeddings().weight.dtype == dtype
    assert differing(packed(loaded), packed(quantized())) == []
    scales = {tensor.dtype for name, tensor in packed(loaded).items() if name.endswith(".scale")}
    assert scales == {torch.bfloat16}
    inputs = pico_inputs(loaded)
    assert logits(loaded, inputs).dtype == dtype
    got, wanted = logits(loaded, inputs), logits(quantized(), inputs)
    assert float((got - wanted).abs().max()) < 16 * torch.finfo(dtype).eps * float(wanted.abs().max())


def test_folder_is_read_after_importing_slimtune_alone(folder: Path) -> None:
    code = """
import sys, slimtune
assert "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(type(module).__name__ == "QuantLinear" for module in model.modules()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "14"), done.stderr


def test_adapter_on_the_model_is_not_written(folder: Path, tmp_path: Path) -> None:
    model = add_lora(quantized(), r=2, base_name=NAME)
    active = model.active_adapters
    write_model(model.get_base_model(), pico_tokenizer(), tmp_path)
    assert differing(load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")) == []
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert model.active_adapters == active


def test_dense_model_that_was_quantized_is_written_plain(tmp_path: Path) -> None:
    model = pico_model("llama")
    model.config.quantization_config = SlimtuneConfig()
    write_model(model, None, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert differing(read_model(tmp_path, torch.float32).state_dict(), model.state_dict()) == []


def test_shards_read_back(tmp_path: Path) -> None:
    model = quantized()
    write_model(model, pico_tokenizer(), tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert differing(load(str(tmp_path)).model.state_dict(), model.state_dict()) == []


@pytest.mark.parametrize("family", sorted(PICO))
def test_lazy_loading_equals_from_pretrained(family: str, tmp_path: Path) -> None:
    save_pico(tmp_path, family)
    wanted = read_model(tmp_path, torch.float32)
    loaded = load(str(tmp_path), lazy=True)
    blocks = [loaded.model.get_submodule(block.name) for block in bind(loaded.model).blocks]
    lazy = all(parameter.device.type == "meta" for block in blocks for parameter in block.parameters())
    assert lazy and loaded.materialise is not None
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [p for p in loaded.model.parameters() if id(p) not in inside]
    assert outside and not any(parameter.device.type == "meta" for parameter in outside)
    loaded.materialise_()
    got = loaded.model
    assert not got.training
    assert differing(got.state_dict(), wanted.state_dict()) == []
    assert differing(dict(got.named_buffers()), dict(wanted.named_buffers())) == []
    assert pointers(got) == pointers(wanted)
    inputs = pico_inputs(wanted)
    assert torch.equal(logits(got, inputs), logits(wanted, inputs))
    assert got.generation_config.to_dict() == wanted.generation_config.to_dict()


def pointers(model: nn.Module) -> list[list[str]]:
    """Which parameters are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def edit(**facts: Any) -> Callable[[Path], None]:
    """Change the `quantization_config`: its own keys, or those of its first group."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        quantization = config["quantization_config"]
        for key, value in facts.items():
            (quantization if key in quantization else quantization["groups"][0])[key] = value
        path.write_text(json.dumps(config))

    return change


def config_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


def index(weight_map: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    """Put an index before the one weight file."""

    def change(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": weight_map(names)})
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def tensor_lost(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.codes"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


HOSTILE: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no config": (no_config, FormatError, "no config.json"),
    "config not JSON": (config_text("{"), FormatError, "config.json is not JSON"),
    "config not an object": (config_text("[1]"), FormatError, "names no model_type"),
    "unknown type": (config_text('{"model_type": "nonesuch"}'), UnknownArchitecture, "got:    nonesuch"),
    "truncated": (truncated, FormatError, "truncated or not safetensors"),
    "not safetensors": (not_safetensors, FormatError, "truncated or not safetensors"),
    "pickles": (pickles_only, FormatError, "pytorch_model.bin"),
    "no weights": (no_weights, FormatError, "no weight file"),
    "a tensor lost": (tensor_lost, FormatError, "layers.1.mlp.up_proj.codes"),
    "no tokenizer": (no_tokenizer, FormatError, "no usable tokenizer"),
    "index outside": (
        index(lambda names: {**names, "x": "../x.safetensors"}),
        FormatError,
        "points outside its folder",
    ),
    "index absolute": (index(lambda names: {**names, "x": "/x.safetensors"}), FormatError, "points outside its folder"),
    "index to nothing": (index(lambda names: {**names, "x": "y.safetensors"}), FormatError, "a weight file is missing"),
    "index names absent": (index(lambda names: {**names, "xyz": "model.safetensors"}), FormatError, "xyz"),
    "index malformed": (index(lambda names: [1]), FormatError, "index is malformed"),
    "index of numbers": (index(lambda names: dict.fromkeys(names, 1)), FormatError, "index is malformed"),
    "version 99": (edit(version=99), FormatError, "unknown version"),
    "unknown layout": (edit(layout="nonesuch"), FormatError, "unknown layout"),
    "unknown field": (edit(colour="red"), FormatError, "unknown layout"),
    "absent layer": (edit(modules=["model.layers.7.mlp.up_proj"]), FormatError, "model.layers.7.mlp.up_proj"),
    "an embedding": (edit(modules=["model.embed_tokens"]), FormatError, "got:    Embedding"),
    "modules not a list": (edit(modules=3), FormatError, "malformed"),
    "groups not groups": (edit(groups=[3]), FormatError, "malformed"),
    "no group size": (edit(group_size=0), FormatError, "impossible layout"),
    "bits a word": (edit(bits="three"), FormatError, "impossible layout"),
    "bits negative": (edit(bits=-3), FormatError, "impossible layout"),
    "other bits": (edit(bits=4), FormatError, "cannot be loaded"),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
@pytest.mark.parametrize("lazy", [False, True])
def test_broken_folder_is_one_clear_error(case: str, lazy: bool, copy: Path) -> None:
    breaks, error, text = HOSTILE[case]
    breaks(copy)
    with pytest.raises(error) as caught:
        load(str(copy), lazy=lazy)
    assert text in str(caught.value)


def test_broken_dense_folder_is_an_error_when_lazy(tmp_path: Path) -> None:
    save_pico(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(str(tmp_path), lazy=True)
    with pytest.raises(FormatError, match="wrong shape"):
        loaded.materialise_()
    with pytest.raises(FormatError, match="wrong shape"):
        load(str(tmp_path))
