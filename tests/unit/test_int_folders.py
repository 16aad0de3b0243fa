"""Integer folders of compressed-tensors that others wrote: bytes for codes, a format for each group, static inputs."""

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

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer, save_pico, two_steps
from slimtune.arch import bind
from slimtune.cli import _guarded, app
from slimtune.errors import FormatError
from slimtune.export.config_groups import CompressedTensors
from slimtune.export.load import load, read_config, read_model
from slimtune.export.native import write_model
from slimtune.kernels.dispatch import reference
from slimtune.lora.attach import add_lora, plain
from slimtune.quant.activation import Activations
from slimtune.quant.layouts import Affine
from slimtune.quant.linear import QuantLinear
from slimtune.recipe.packed import held

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

Facts = dict[str, Any]
STRATEGIES: dict[str, Facts] = {
    "channel": {"strategy": "channel"},
    "tensor": {"strategy": "tensor"},
    "group": {"strategy": "group", "group_size": 8},
    "block": {"strategy": "block", "block_structure": [16, 8]},
}
TOKEN: Facts = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INPUTS: dict[str, Facts | None] = {
    "none": None,
    "token": TOKEN,
    "token of 4 bits with zero points": {**TOKEN, "num_bits": 4, "symmetric": False},
    "group": {**TOKEN, "strategy": "group", "group_size": 4},
    "static": {**TOKEN, "strategy": "tensor", "dynamic": False},
    "static with zero points": {**TOKEN, "strategy": "tensor", "dynamic": False, "symmetric": False},
}


def sides(how: Facts, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    strategy = how["strategy"]
    if strategy == "block":
        return tuple(how["block_structure"])  # type: ignore[return-value]
    return {"channel": (1, columns), "tensor": (rows, columns), "group": (1, how.get("group_size", 0))}[strategy]


def grid(weight: Tensor, how: Facts, bits: int, sym: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales, and int8 zero points, as an observer of least and greatest values finds them."""
    rows, columns = weight.shape
    high, wide = sides(how, rows, columns)
    parts = pad(weight, (0, -columns % wide, 0, -rows % high)).unflatten(0, (-1, high)).unflatten(2, (-1, wide))
    low, top = parts.amin((1, 3)).clamp(max=0), parts.amax((1, 3)).clamp(min=0)
    if sym:
        scale, zero = 2 * torch.maximum(-low, top) / (2**bits - 1), torch.zeros_like(low)
    else:
        scale = (top - low) / (2**bits - 1)
        zero = (-(2 ** (bits - 1)) - low / scale).round()
    scale, zero = scale.clamp(min=1e-6).to(dtype), zero.to(torch.int8)
    return (scale.reshape(1), zero.reshape(1)) if how["strategy"] == "tensor" else (scale, zero)


def scheme(how: Facts, bits: int, sym: bool, inputs: Facts | None = None, format: str = "int-quantized") -> Facts:
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "dynamic": False, **how}
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": format}


def config(*groups: Facts, format: str = "int-quantized", ignore: tuple[str, ...] = ("lm_head",)) -> Facts:
    named = {f"group_{number}": {"output_activations": None, **group} for number, group in enumerate(groups)}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": named,
        "ignore": list(ignore),
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }


def stored(weight: Tensor, group: Facts, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a layer as the library stores them."""
    weights = group["weights"]
    scale, zero = grid(weight, weights, weights["num_bits"], weights["symmetric"], dtype)
    args = QuantizationArgs(**weights)
    state = {"weight": weight.to(dtype), "weight_scale": scale, "weight_zero_point": zero}
    tensors = IntQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    inputs = group["input_activations"]
    if inputs is not None and not inputs["dynamic"]:
        # Scales that a range in float32 does not give back: 255 steps of them are rounded.
        tensors["input_scale"] = torch.tensor([0.0237 if inputs["symmetric"] else 0.0195])
        if not inputs["symmetric"]:
            tensors["input_zero_point"] = torch.tensor([-23], dtype=torch.int8)
    return {leaf: tensor.contiguous() for leaf, tensor in tensors.items()}


def oracle(tensors: dict[str, Tensor], how: Facts) -> Tensor:
    """The weight, float64, number by number."""
    weight, scale = tensors["weight"], tensors["weight_scale"].reshape(-1)
    zero = tensors.get("weight_zero_point", torch.zeros(1, dtype=torch.int8)).reshape(-1)
    rows, columns = weight.shape
    high, wide = sides(how, rows, columns)
    across = -(-columns // wide)
    wanted = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            place = row // high * across + column // wide
            code = int(weight[row, column]) - int(zero[place % len(zero)])
            wanted[row, column] = code * float(scale[place])
    return wanted


# --- layers that the library of the format stored ---


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.bfloat16), (8, torch.float32), (4, torch.float16)], ids=str)
@pytest.mark.parametrize("shape", [(10, 24), (33, 32)])
def test_reads_what_its_library_stores(
    strategy: str, sym: bool, bits: int, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    group = scheme(STRATEGIES[strategy], bits, sym)
    tensors = stored(torch.randn(shape) + 0.3, group, dtype)
    weight, inputs = CompressedTensors(config(group)).decode("q", tensors, *shape)
    assert inputs is None and isinstance(weight.layout, Affine)
    assert (weight.layout.bits, weight.layout.symmetric) == (bits, sym)
    assert torch.equal(weight.dequantize(torch.float64), oracle(tensors, STRATEGIES[strategy]))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_rounded_as_it_says(kind: str, dtype: torch.dtype) -> None:
    group = scheme(STRATEGIES["channel"], 8, True, INPUTS[kind])
    tensors = stored(torch.randn(6, 12), group)
    if "input_scale" in tensors:
        tensors["input_scale"] = tensors["input_scale"].to(dtype)
    found = CompressedTensors(config(group)).decode("q", tensors, 6, 12)[1]
    if INPUTS[kind] is None:
        assert found is None
        return
    assert found is not None
    x = 3 * torch.randn(5, 12)
    bits, size = found.bits, found.group_size if found.group_size > 0 else 12
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    wanted = torch.empty(5, 12)
    for token in range(5):
        for start in range(0, 12, size):
            part = x[token, start : start + size]
            low, high = part.min().clamp(max=0), part.max().clamp(min=0)
            if found.static:
                scale, zero = tensors["input_scale"].float(), tensors.get("input_zero_point", torch.zeros(1))
            elif found.sym:
                scale, zero = torch.maximum(-low, high) / ((most - least) / 2), torch.zeros(1)
            else:
                scale = (high - low) / (most - least)
                zero = (least - low / scale).round()
            wanted[token, start : start + size] = ((part / scale).round() + zero).clamp(least, most).sub(zero) * scale
    assert torch.equal(found(x), wanted)


# --- folders ---


def checkpoint(folder: Path, *groups: Facts, ignore: tuple[str, ...] = ("lm_head",), **options: Any) -> Path:
    """A folder as llm-compressor writes it: each layer in the first group whose first target is a part of its name."""
    save_pico(folder)
    tensors = load_file(folder / "model.safetensors")
    for port in bind(pico_model("llama")).linears:
        if any(word.strip("re:.*$") in port.name for word in ignore):
            continue
        named = (g for g in groups if g["targets"] == ["Linear"] or g["targets"][0].strip("re:.*$") in port.name)
        weight = tensors.pop(f"{port.name}.weight")
        tensors.update({f"{port.name}.{leaf}": tensor for leaf, tensor in stored(weight, next(named)).items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((folder / "config.json").read_text())
    facts = config(*groups, ignore=ignore, **options)
    (folder / "config.json").write_text(json.dumps({**whole, "quantization_config": facts}))
    return folder


def packed(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in plain(model).items() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("kind", INPUTS)
def test_its_folder_is_a_packed_base_that_trains(kind: str, tmp_path: Path) -> None:
    group = scheme(STRATEGIES["channel"], 8, True, INPUTS[kind])
    if kind != "none":  # where the folder's own format says enough, as in older ones
        group["format"] = None
    folder = checkpoint(tmp_path / "theirs", group, ignore=("lm_head", "re:.*down_proj$"))
    model = load(str(folder)).model
    tensors = load_file(folder / "model.safetensors")
    assert packed(model).keys() == {p.name for p in bind(model).linears if "down_proj" not in p.name}
    for name, layer in packed(model).items():
        mine = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("weight", "weight_scale")}
        assert torch.equal(layer.dequantize(torch.float64), oracle(mine, STRATEGIES["channel"]))
    assert held(read_config(folder), bind(model)) == {"bits": 8}
    batch = pico_inputs(model)
    with reference():
        wanted = logits(model, batch)
        torch.testing.assert_close(logits(read_model(folder, torch.float32), batch), wanted, rtol=0, atol=1e-5)
    if kind != "none":  # the comparison notices whether inputs are rounded
        bare = load(str(folder)).model
        for layer in packed(bare).values():
            layer.activations = None
        assert not torch.allclose(logits(bare, batch), wanted, rtol=0, atol=1e-4)
    write_model(model, pico_tokenizer(), (tmp_path / "ours").mkdir() or tmp_path / "ours")
    with reference():
        assert torch.equal(logits(load(str(tmp_path / "ours")).model, batch), wanted)
    losses = two_steps(add_lora(model, r=2), batch)
    assert losses[1] < losses[0]


def mixed(folder: Path) -> Path:
    """One format, width and rounding of inputs in a group, another in the next; classes, patterns and names."""
    down = scheme(STRATEGIES["tensor"], 8, True, INPUTS["static"])
    values = scheme(STRATEGIES["group"], 4, False, INPUTS["token of 4 bits with zero points"], "naive-quantized")
    rest = scheme(STRATEGIES["channel"], 8, True, TOKEN)
    return checkpoint(
        folder,
        {**down, "targets": ["re:.*down_proj$"]},
        {**values, "targets": ["re:.*v_proj"]},
        rest,
        format="mixed-precision",
    )


def test_groups_of_several_formats_and_inputs(tmp_path: Path) -> None:
    model = load(str(mixed(tmp_path / "theirs"))).model
    layers = packed(model)
    at = "model.layers.1."
    end = 127.5 * float(torch.tensor(0.0237))
    assert layers[f"{at}mlp.down_proj"].activations == Activations(8, static=True, low=-end, high=end)
    assert layers[f"{at}self_attn.v_proj"].activations == Activations(4, sym=False)
    assert layers[f"{at}self_attn.q_proj"].activations == Activations(8)
    layouts = {name: layer.layout for name, layer in layers.items()}
    assert layouts[f"{at}mlp.down_proj"] == Affine(32, 40, 8, 40, True, scale_dtype="float32")
    assert layouts[f"{at}self_attn.v_proj"] == Affine(24, 32, 4, 8, scale_dtype="float32")
    assert layouts[f"{at}self_attn.q_proj"] == Affine(48, 32, 8, 32, True, scale_dtype="float32")


def test_every_verb_takes_such_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = mixed(tmp_path / "theirs")
    rows = [{"prompt": f"What is {a}?", "completion": f"It is {a}."} for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("It is what it is. " * 30)
    start = f"model: {folder}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\nsteps:\n  - lora: {{r: 2}}\n"
    (tmp_path / "r.yaml").write_text(
        start + "  - train: {max_steps: 2, max_length: 32}\n  - merge: {keep_bits: true}\n"
    )
    tune = ["finetune", folder, "--train", tmp_path / "rows.jsonl", "--max-steps", 2, "--max-length", 32, "--r", 2]
    for arguments in (
        ["plan", tmp_path / "r.yaml"],
        ["run", tmp_path / "r.yaml", "-o", tmp_path / "kept"],
        [*tune, "-o", tmp_path / "run"],
        ["evaluate", folder, "--perplexity", tmp_path / "text.txt", "--length", 32],
        ["generate", folder, "--prompt", "It", "--adapter", tmp_path / "run" / "adapter", "--max-new-tokens", 2],
        ["export", tmp_path / "run", "--format", "peft", "-o", tmp_path / "peft"],
    ):
        status = _guarded(lambda a=arguments: app([str(argument) for argument in a], standalone_mode=True))  # type: ignore[misc]
        assert status == 0, (arguments, capsys.readouterr().err)
    layers, kept = packed(load(str(folder)).model), packed(load(str(tmp_path / "kept" / "model")).model)
    assert {n: (m.layout, m.activations) for n, m in kept.items()} == {
        n: (m.layout, m.activations) for n, m in layers.items()
    }
    assert any(not torch.equal(m.codes, layers[name].codes) for name, m in kept.items())  # type: ignore[arg-type]


def test_what_is_left_of_a_layer_rounds_its_input_as_before(tmp_path: Path) -> None:
    model = load(str(mixed(tmp_path / "theirs"))).model
    before = {name: (layer.activations, layer.in_features) for name, layer in packed(model).items()}
    cut = packed(slimtune.prune(model, ratio=0.2, importance="magnitude"))
    assert any(layer.in_features < before[name][1] for name, layer in cut.items())
    assert {name: layer.activations for name, layer in cut.items()} == {
        n: rounding for n, (rounding, _) in before.items()
    }


def test_such_a_folder_is_exported_again(tmp_path: Path) -> None:
    group = scheme(STRATEGIES["tensor"], 8, True, TOKEN)
    model, tokenizer = slimtune.load(str(checkpoint(tmp_path / "theirs", group)))
    slimtune.export(model, tokenizer, "compressed-tensors", tmp_path / "again")  # which compares
    again, _ = slimtune.load(str(tmp_path / "again"))
    assert torch.equal(logits(again, pico_inputs(model)), logits(model, pico_inputs(model)))


# --- hostile folders ---

LAYER = "model.layers.1.mlp.up_proj"
Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    group = scheme(STRATEGIES["channel"], 4, False, INPUTS["static with zero points"])
    return checkpoint(tmp_path_factory.mktemp("theirs") / "model", group)


def edit(change: Callable[[Facts, Facts, Facts], object]) -> Break:
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
        new = change(tensors.pop(f"{LAYER}.{leaf}", torch.zeros(0)))
        if new is not None:
            tensors[f"{LAYER}.{leaf}"] = new.contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return act


def bare(folder: Path) -> None:
    for leaf in ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point"):
        tensor(leaf, lambda t: None)(folder)


HOSTILE: dict[str, tuple[Break, str]] = {
    "act-order": (edit(lambda q, g, w: w.update(actorder="group")), "actorder: group"),
    "an order": (tensor("weight_g_idx", lambda t: torch.zeros(32, dtype=torch.int32)), "weight_g_idx"),
    "outputs": (edit(lambda q, g, w: g.update(output_activations={"num_bits": 8})), "output_activations"),
    "another strategy": (edit(lambda q, g, w: w.update(strategy="attn_head")), "strategy: attn_head"),
    "a block of nothing": (edit(lambda q, g, w: w.update(strategy="block")), "strategy: block"),
    "groups of nothing": (edit(lambda q, g, w: w.update(strategy="group")), "group_size: None"),
    "9 bits": (edit(lambda q, g, w: w.update(num_bits=9)), "num_bits: 9"),
    "floats": (edit(lambda q, g, w: w.update(type="float")), "type: float"),
    "another format": (edit(lambda q, g, w: g.update(format="nvfp4-pack-quantized")), "format: nvfp4"),
    "naive words": (edit(lambda q, g, w: (g.update(format="naive-quantized"), w.update(type="hex"))), "type: hex"),
    "packed words": (edit(lambda q, g, w: g.update(format="pack-quantized")), "unknown in pack-quantized"),
    "a pattern that is none": (edit(lambda q, g, w: g.update(targets=["re:("])), "malformed"),
    "a layer that is ignored": (edit(lambda q, g, w: q.update(ignore=["re:.*up_proj"])), "no group"),
    "a preset": (edit(lambda q, g, w: q.update(config_groups={"W8A8": ["Linear"]})), "malformed"),
    "codes that do not fit": (tensor("weight", lambda t: t + 8), "out of range"),
    "zero points that do not fit": (tensor("weight_zero_point", lambda t: t - 9), "out of range"),
    "zero points of a symmetric grid": (edit(lambda q, g, w: w.update(symmetric=True)), "out of range"),
    "no zero points": (tensor("weight_zero_point", lambda t: None), "lacks tensors"),
    "other zero points": (tensor("weight_zero_point", lambda t: t.int()), "a wrong tensor"),
    "no scale": (tensor("weight_scale", lambda t: None), "lacks tensors"),
    "a scale too few": (tensor("weight_scale", lambda t: t[1:]), "a wrong tensor"),
    "scales not finite": (tensor("weight_scale", lambda t: t * float("nan")), "not finite"),
    "a dense weight": (tensor("weight", lambda t: t.float()), "a wrong tensor"),
    "no scale at all": (bare, "a weight of 8 bits has no scale"),
    "no scale of inputs": (tensor("input_scale", lambda t: None), "lacks tensors"),
    "no zero point of inputs": (tensor("input_zero_point", lambda t: None), "lacks tensors"),
    "two scales of inputs": (tensor("input_scale", lambda t: t.repeat(2)), "a wrong tensor"),
    "an empty range": (tensor("input_scale", lambda t: t * 0), "is empty"),
    "a range for inputs of each token": (
        edit(lambda q, g, w: g["input_activations"].update(strategy="token", dynamic=True)),
        "input_scale",
    ),
    "a range a channel": (edit(lambda q, g, w: g["input_activations"].update(strategy="channel")), "unknown way"),
    "a range of each batch": (edit(lambda q, g, w: g["input_activations"].update(dynamic=True)), "unknown way"),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_broken_folder_is_one_clear_error(case: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    assert packed(load(str(folder)).model)
    breaks, text = HOSTILE[case]
    breaks(tmp_path / "model")
    with pytest.raises(FormatError) as caught:
        load(str(tmp_path / "model"))
    assert text in str(caught.value)
