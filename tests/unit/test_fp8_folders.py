"""Float8 folders of compressed-tensors: ours as transformers loads them, its own as packed bases, hostile ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer, save_pico, two_steps
from slimtune.arch import bind
from slimtune.cli import _guarded, app
from slimtune.errors import FormatError, RecipeError
from slimtune.export import Source, export
from slimtune.export.config_groups import CompressedTensors
from slimtune.export.load import load, read_config, read_model
from slimtune.export.native import write_model
from slimtune.kernels.dispatch import reference
from slimtune.lora.attach import add_lora, plain
from slimtune.quant.linear import QuantLinear
from slimtune.quant.size import model_size
from slimtune.recipe.packed import held
from slimtune.recipe.plan import plan
from slimtune.recipe.schema import recipe_from

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

FLOAT = {"bits": 8, "type": "float"}


def written(folder: Path, family: str = "llama", method: str = "fp8", **options: Any) -> Any:
    model = slimtune.quantize(pico_model(family), method, **options)
    export(Source(model, pico_tokenizer(), "pico"), "compressed-tensors", folder)
    return model


def packed(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in plain(model).items() if isinstance(module, QuantLinear)}


# --- ours ---

CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "weights": ("fp8", {}, {"float-quantized"}),
    "weights and inputs": ("fp8", {"activations": FLOAT}, {"float-quantized"}),
    "groups": ("fp8", {"group_size": 8, "activations": FLOAT}, {"float-quantized"}),
    "static inputs": ("fp8", {"activations": {**FLOAT, "static": True, "high": 3.0}}, {"float-quantized"}),
    "some inputs": ("fp8", {"layers": {"down_proj": {"activations": FLOAT}}}, {"float-quantized"}),
    "W4A8, float inputs": ("rtn", {"bits": 4, "group_size": 8, "sym": True, "activations": FLOAT}, {"pack-quantized"}),
    "W8A8, float inputs": ("rtn", {"bits": 8, "group_size": -1, "sym": True, "activations": FLOAT}, {"pack-quantized"}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_has_the_same_weights_and_logits(case: str, tmp_path: Path) -> None:
    method, options, formats = CASES[case]
    model = written(tmp_path / "out", method=method, **options)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = pico_inputs(model)
    with reference():
        wanted = logits(model, inputs)
        assert torch.equal(logits(read, inputs), wanted)
    for name, layer in packed(model).items():
        assert torch.equal(read.get_submodule(name).weight, layer.dequantize())
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {group["format"] for group in facts["config_groups"].values()} == formats == {facts["format"]}
    back = load(str(tmp_path / "out")).model
    assert packed(back).keys() == packed(model).keys()
    with reference():
        assert torch.equal(logits(back, inputs), wanted)
    if "activations" in options:  # the comparison notices whether inputs are rounded
        for layer in packed(model).values():
            assert layer.activations is not None and layer.activations.type == "float"
            layer.activations = None
        assert not torch.allclose(logits(model, inputs), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["llama-biased", "phi3"])
def test_other_families_are_read_back(family: str, tmp_path: Path) -> None:
    written(tmp_path / "out", family, activations=FLOAT)  # which compares
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    codes = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(codes) == len(packed(load(str(tmp_path / "out")).model)) > 0
    assert all(tensors[f"{name}_scale"].shape == (len(tensors[name]), 1) for name in codes)


def test_an_adapter_lies_beside(tmp_path: Path) -> None:
    tuned = add_lora(slimtune.quantize(pico_model("llama"), "fp8", activations=FLOAT), r=2)
    two_steps(tuned, pico_inputs(tuned))
    export(Source(tuned, pico_tokenizer(), "pico"), "compressed-tensors", tmp_path / "out")  # which compares
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("change", [{"clip_ratio": 0.9}, {"group_size": 8}], ids=str)
def test_inputs_that_the_format_cannot_say_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot hold") as caught:
        written(tmp_path / "out", activations={**FLOAT, **change})
    assert next(iter(change)) in str(caught.value)


def test_gguf_is_rounded_to_what_was_asked_and_gptq_refused(tmp_path: Path) -> None:
    model = slimtune.quantize(pico_model("llama", hidden_size=64, intermediate_size=96), "fp8")
    source = Source(model, pico_tokenizer(), "pico")
    with pytest.raises(FormatError, match="GPTQ cannot hold these layers") as caught:
        export(source, "gptq", tmp_path / "gptq")
    assert "'codebook', not affine" in str(caught.value) and not (tmp_path / "gptq").exists()
    steps = [{"quantize": {"method": "fp8"}}, {"export": {"format": "gptq"}}]
    with pytest.raises(RecipeError, match="gptq cannot hold what this method makes"):
        plan(recipe_from({"model": str(save_pico(tmp_path / "pico")), "steps": steps}))
    rounding = slimtune.quantize(pico_model("llama"), "fp8", activations=FLOAT)
    for format in ("gptq", "safetensors", "gguf"):
        with pytest.raises(FormatError, match="cannot say that inputs are rounded"):
            export(Source(rounding, pico_tokenizer(), "pico"), format, tmp_path / "no")
    dense = export(source, "safetensors", tmp_path / "dense")
    assert dense.max_logit_difference < 1e-5
    assert torch.equal(
        load_file(tmp_path / "dense" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"],
        packed(model)["model.layers.0.mlp.up_proj"].dequantize(),
    )


# --- theirs ---

TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
GROUP = {**TOKEN, "strategy": "group", "group_size": 8}
STATIC = {**TOKEN, "strategy": "tensor", "dynamic": False}
WEIGHTS: dict[str, dict[str, Any]] = {
    "channel": {"strategy": "channel"},
    "tensor": {"strategy": "tensor"},
    "group": {"strategy": "group", "group_size": 8},
    "block": {"strategy": "block", "block_structure": [16, 8]},
    "ragged block": {"strategy": "block", "block_structure": [24, 40]},
}


def theirs(weight: Tensor, how: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that the library stores, and the weight that it decodes."""
    rows, columns = weight.shape
    high, wide = {
        "channel": (1, columns),
        "tensor": (rows, columns),
        "group": (1, how.get("group_size")),
        "block": how.get("block_structure"),
    }[how["strategy"]]
    parts = pad(weight, (0, -columns % wide, 0, -rows % high)).unflatten(0, (-1, high)).unflatten(2, (-1, wide))
    scale = (parts.abs().amax((1, 3)) / 448).to(dtype)
    scale = scale.reshape(1) if how["strategy"] == "tensor" else scale
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, **how)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = FloatQuantizationCompressor.compress({"weight": weight.to(dtype), "weight_scale": scale}, scheme)
    return stored, FloatQuantizationCompressor.decompress(stored, scheme)["weight"]


def facts(how: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **how}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def checkpoint(folder: Path, how: dict[str, Any], inputs: dict[str, Any] | None) -> Path:
    """A folder as llm-compressor writes it, its layers compressed by the library."""
    save_pico(folder)
    tensors = load_file(folder / "model.safetensors")
    for port in bind(pico_model("llama")).linears:
        stored, _ = theirs(tensors.pop(f"{port.name}.weight"), how, torch.float32)
        tensors.update({f"{port.name}.{leaf}": tensor.contiguous() for leaf, tensor in stored.items()})
        if inputs is not None and not inputs["dynamic"]:
            tensors[f"{port.name}.input_scale"] = torch.tensor([0.02])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": facts(how, inputs)}))
    return folder


@pytest.mark.parametrize("strategy", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(10, 24), (33, 72)])
def test_reads_what_its_library_stores(strategy: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    stored, wanted = theirs(torch.randn(shape), WEIGHTS[strategy], dtype)
    weight = CompressedTensors(facts(WEIGHTS[strategy])).decode("q", stored, *shape)[0]
    assert torch.equal(weight.dequantize(dtype), wanted)
    assert 8 < weight.bits_per_weight < 8 + 32 / 8 + 1


@pytest.mark.parametrize(
    ("strategy", "inputs"),
    [("channel", TOKEN), ("tensor", STATIC), ("block", GROUP), ("group", None), ("ragged block", TOKEN)],
    ids=["channel", "tensor", "block", "group", "ragged"],
)
def test_its_folder_is_a_packed_base_that_trains(strategy: str, inputs: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "theirs", WEIGHTS[strategy], inputs)
    model = load(str(folder)).model
    names = frozenset(port.name for port in bind(model).linears)
    assert packed(model).keys() == names
    assert model_size(plain(model), names).bits_per_weight < 8 + 32 / 8 + 1
    assert held(read_config(folder), bind(model)) == {"bits": 8}
    batch = pico_inputs(model)
    wanted = logits(model, batch)
    torch.testing.assert_close(logits(read_model(folder, torch.float32), batch), wanted, rtol=0, atol=1e-5)
    before = {name: layer.qtensor.tensors["codes"].clone() for name, layer in packed(model).items()}
    tuned = add_lora(model, r=2)
    losses = two_steps(tuned, batch)
    assert losses[1] < losses[0]
    assert all(torch.equal(before[name], layer.qtensor.tensors["codes"]) for name, layer in packed(tuned).items())
    write_model(load(str(folder)).model, pico_tokenizer(), (tmp_path / "ours").mkdir() or tmp_path / "ours")
    assert torch.equal(logits(load(str(tmp_path / "ours")).model, batch), wanted)


def test_every_verb_takes_such_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "theirs", WEIGHTS["channel"], TOKEN)
    rows = [{"prompt": f"What is {a}?", "completion": f"It is {a}."} for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("It is what it is. " * 30)
    recipe = f"model: {folder}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\nsteps:\n  - lora: {{r: 2}}\n"
    (tmp_path / "r.yaml").write_text(recipe + "  - train: {max_steps: 2, max_length: 32}\n")
    tune = ["finetune", folder, "--train", tmp_path / "rows.jsonl", "--max-steps", 2, "--max-length", 32, "--r", 2]
    for arguments in (
        ["plan", tmp_path / "r.yaml"],
        [*tune, "-o", tmp_path / "run"],
        ["evaluate", folder, "--perplexity", tmp_path / "text.txt", "--length", 32],
        ["generate", folder, "--prompt", "It", "--adapter", tmp_path / "run" / "adapter", "--max-new-tokens", 2],
        ["export", tmp_path / "run", "--format", "compressed-tensors", "-o", tmp_path / "packed"],
    ):
        status = _guarded(lambda a=arguments: app([str(argument) for argument in a], standalone_mode=True))  # type: ignore[misc]
        assert status == 0, (arguments, capsys.readouterr().err)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


# --- hostile folders ---

LAYER = "model.layers.1.mlp.up_proj"
Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("theirs") / "model", WEIGHTS["block"], STATIC)


def edit(change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], object]) -> Break:
    """Change the configuration, its first group, or the weights of that."""

    def act(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        group = whole["quantization_config"]["config_groups"]["group_0"]
        change(whole["quantization_config"], group, group["weights"])
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


def bare(folder: Path) -> None:
    tensor("weight_scale", lambda t: None)(folder)
    tensor("input_scale", lambda t: None)(folder)


def not_a_number(t: Tensor) -> Tensor:
    t.view(torch.uint8)[3, 4] = 255
    return t


HOSTILE: dict[str, tuple[Break, str]] = {
    "a quantized cache": (edit(lambda q, g, w: q.update(kv_cache_scheme={"num_bits": 8})), "kv_cache_scheme"),
    "no groups": (edit(lambda q, g, w: q.pop("config_groups")), "malformed"),
    "no strategy": (edit(lambda q, g, w: w.pop("strategy")), "malformed"),
    "whole numbers": (edit(lambda q, g, w: w.update(type="int")), "type: int"),
    "4 bits": (edit(lambda q, g, w: w.update(num_bits=4)), "num_bits: 4"),
    "zero points": (edit(lambda q, g, w: w.update(symmetric=False)), "symmetric: False"),
    "another strategy": (edit(lambda q, g, w: w.update(strategy="attn_head")), "strategy: attn_head"),
    "no block": (edit(lambda q, g, w: w.update(block_structure=None)), "strategy: block"),
    "half a block": (edit(lambda q, g, w: w.update(block_structure=[16])), "malformed"),
    "a block of nothing": (edit(lambda q, g, w: w.update(block_structure=[16, 0])), "strategy: block"),
    "another format": (edit(lambda q, g, w: g.update(format="mxfp8-quantized")), "format: mxfp8"),
    "outputs": (edit(lambda q, g, w: g.update(output_activations={"num_bits": 8})), "output_activations"),
    "inputs of 4 bits": (edit(lambda q, g, w: g["input_activations"].update(num_bits=4)), "unknown way"),
    "inputs in groups of 0": (
        edit(lambda q, g, w: g["input_activations"].update(strategy="group", dynamic=True, group_size=0)),
        "unknown way",
    ),
    "other blocks": (edit(lambda q, g, w: w.update(block_structure=[8, 8])), "a wrong tensor"),
    "no group for a layer": (edit(lambda q, g, w: g.update(targets=["re:lm_head"])), "no group"),
    "no scale": (tensor("weight_scale", lambda t: None), "lacks tensors"),
    "no scale at all": (bare, "a weight of 8 bits has no scale"),
    "no scale of inputs": (tensor("input_scale", lambda t: None), "lacks tensors"),
    "a scale of inputs without end": (tensor("input_scale", lambda t: t / 0), "not finite"),
    "no weight": (tensor("weight", lambda t: None), "lacks tensors"),
    "a weight cut": (tensor("weight", lambda t: t[:-1]), "a wrong tensor"),
    "a dense weight": (tensor("weight", lambda t: t.float()), "a wrong tensor"),
    "other floats": (tensor("weight", lambda t: t.float().to(torch.float8_e5m2)), "a wrong tensor"),
    "no numbers": (tensor("weight", not_a_number), "not finite"),
    "scales not finite": (tensor("weight_scale", lambda t: t * float("nan")), "not finite"),
    "whole scales": (tensor("weight_scale", lambda t: t.int()), "a wrong tensor"),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_broken_folder_is_one_clear_error(case: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    breaks, text = HOSTILE[case]
    breaks(tmp_path / "model")
    with pytest.raises(FormatError) as caught:
        load(str(tmp_path / "model"))
    assert text in str(caught.value)
