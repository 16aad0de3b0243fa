"""GPTQ folders, written and read: against a packer written from the format's description, and from hostile folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pico import logits, pico_inputs, pico_model, pico_tokenizer
from slimtune.arch import Port, bind
from slimtune.cli import _guarded, app
from slimtune.errors import FormatError, RecipeError
from slimtune.export import Source, export
from slimtune.export.foreign import Gptq
from slimtune.export.gptq import packed_layer, require_expressible
from slimtune.export.load import load
from slimtune.export.native import settle_, write_model
from slimtune.lora.attach import add_lora, base_of
from slimtune.quant.apply import Choose, all_linear, quantize_
from slimtune.quant.base import QTensor
from slimtune.quant.layouts import Affine
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn
from slimtune.quant.scattered import Scattered

NAME = "owner/base"
SIZES: dict[str, dict[str, int]] = {"t5": {"d_ff": 64, "d_kv": 16}, "opt": {"ffn_dim": 64}}
WIDE = {"intermediate_size": 64, "head_dim": 16}
"""Widths that are multiples of 32, as rows and columns of GPTQ codes must be."""


# --- the format, word by word ---


def stream(values: list[int], bits: int) -> list[int]:
    """The unsigned 32-bit words of a little-endian bitstream of `values`."""
    whole = sum(value << (number * bits) for number, value in enumerate(values))
    return [(whole >> shift) & 0xFFFFFFFF for shift in range(0, len(values) * bits, 32)]


def int32(rows: list[list[int]]) -> Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32).copy())


def textbook(codes: Tensor, zero: Tensor, scale: Tensor, group: Tensor, bits: int, kind: str) -> dict[str, Tensor]:
    """GPTQ's tensors of codes `[out, in]` and of zero points and scales `[out, groups]`."""
    columns = [stream(row, bits) for row in codes.tolist()]
    zeros = [stream(row, bits) for row in zero.T.tolist()]
    if kind == "gptq" and bits == 3:
        zeros = [stream([(z - 1) % 8 for z in row], 3) for row in zero.T.tolist()]
    elif kind == "gptq":  # as GPTQModel does it: 0x1111... off every word, borrows included
        ones = sum(1 << shift for shift in range(0, 32, bits))
        zeros = [[(word - ones) % 2**32 for word in row] for row in zeros]
    return {
        "qweight": int32(columns).T.contiguous(),
        "qzeros": int32(zeros),
        "scales": scale.to(torch.float16).T.contiguous(),
        "g_idx": group.to(torch.int32),
    }


def config(bits: int = 4, group_size: int = 16, kind: str = "gptq", **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": kind, **more}


OUT, IN, GROUPS = 32, 64, 4
ORDERS = {"in order": torch.arange(IN) // 16, "act-order": torch.randperm(IN, generator=torch.Generator()) // 16}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reads_what_a_textbook_wrote(bits: int, sym: bool, kind: str, order: str) -> None:
    codes = torch.randint(2**bits, (OUT, IN))
    zero = torch.full((OUT, GROUPS), 2 ** (bits - 1)) if sym else torch.randint(2**bits, (OUT, GROUPS))
    assert sym or (zero == 0).any() or bits == 8
    scale, group = torch.rand(OUT, GROUPS).to(torch.float16), ORDERS[order]
    wanted = (codes - zero[:, group]).double() * scale[:, group].double()
    weight = Gptq(config(bits, kind=kind)).decode("q", textbook(codes, zero, scale, group, bits, kind), OUT, IN)[0]
    assert torch.equal(weight.dequantize(torch.float64), wanted)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(weight.dequantize(dtype), wanted.to(dtype))  # rounded once
    if order == "in order":
        assert weight.layout == Affine(OUT, IN, bits, 16, sym, scale_dtype="float16")
    else:
        assert weight.layout == Scattered(OUT, IN, bits, GROUPS, sym, "float16")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
def test_writes_what_a_textbook_writes(bits: int, sym: bool) -> None:
    linear = torch.nn.Linear(IN, OUT, bias=False)
    weight = Rtn(bits=bits, group_size=16, sym=sym, grid="minmax")(torch.randn(OUT, IN), {})
    layer = QuantLinear.from_linear(linear, weight)
    codes = torch.from_numpy(np.unpackbits(weight.tensors["codes"].numpy(), axis=1, bitorder="little"))
    codes = (codes[:, : IN * bits].view(OUT, IN, bits).long() << torch.arange(bits)).sum(-1)
    zero = weight.tensors["zero"].long() if not sym else torch.full((OUT, GROUPS), 2 ** (bits - 1))
    for kind in ("gptq", "gptq_v2") if sym else ("gptq_v2",):
        wanted = textbook(codes, zero, weight.tensors["scale"], ORDERS["in order"], bits, kind)
        got = packed_layer(layer, torch.float32, less_one=kind == "gptq")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[leaf], wanted[leaf]) and got[leaf].is_contiguous() for leaf in wanted)


def test_a_layer_without_g_idx_has_groups_of_the_configured_size() -> None:
    codes, zero = torch.randint(16, (OUT, IN)), torch.randint(16, (OUT, GROUPS))
    tensors = textbook(codes, zero, torch.rand(OUT, GROUPS), ORDERS["in order"], 4, "gptq")
    with_index = Gptq(config()).decode("q", tensors, OUT, IN)[0]
    del tensors["g_idx"]
    without = Gptq(config()).decode("q", tensors, OUT, IN)[0]
    assert without.layout == with_index.layout
    assert torch.equal(without.dequantize(), with_index.dequantize())
    tensors["qzeros"], tensors["scales"] = tensors["qzeros"][:1], tensors["scales"][:1]
    assert Gptq(config(group_size=-1)).decode("q", tensors, OUT, IN)[0].layout == Affine(
        OUT, IN, 4, IN, scale_dtype="float16"
    )


def test_scales_that_bfloat16_holds_are_bfloat16() -> None:
    scale = torch.rand(OUT, GROUPS).to(torch.bfloat16)
    tensors = textbook(torch.ones(OUT, IN).long(), torch.full((OUT, GROUPS), 8), scale, ORDERS["in order"], 4, "gptq")
    weight = Gptq(config()).decode("q", tensors, OUT, IN)[0]
    assert weight.layout == Affine(OUT, IN, 4, 16, symmetric=True)
    assert torch.equal(weight.tensors["scale"], scale)


# --- whole folders ---


def rtn(**fields: Any) -> Rtn:
    return Rtn(**{"bits": 4, "group_size": 8, "sym": True, "grid": "minmax", **fields})


def quantized(family: str = "llama", choose: Choose | None = None) -> PreTrainedModel:
    model = pico_model(family, **SIZES.get(family, WIDE))
    quantize_(model, bind(model), choose or all_linear(rtn()))
    settle_(model)
    return model


def of(model: torch.nn.Module) -> Source:
    return Source(model, pico_tokenizer(), NAME)


def quantization_in(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert facts == json.loads((folder / "quantize_config.json").read_text())
    return facts


def differing(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert got.keys() == wanted.keys()
    return [k for k in wanted if got[k].dtype != wanted[k].dtype or not torch.equal(got[k], wanted[k])]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biased", "gemma3", "phi3", "opt", "t5", "llava"])
@pytest.mark.parametrize("fields", [{"bits": 2, "sym": False}, {"bits": 4}], ids=["2 bits", "4 bits symmetric"])
def test_folder_goes_round_bit_for_bit(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(family, all_linear(rtn(**fields)))
    manifest = export(of(model), "gptq", tmp_path / "out")
    assert manifest.max_logit_difference == 0
    read = load(str(tmp_path / "out")).model
    assert not read.training
    assert differing(read.state_dict(), model.state_dict()) == []
    inputs = pico_inputs(model)
    assert torch.equal(logits(read, inputs), logits(model, inputs))
    assert NAME in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
def test_zero_points_are_written_as_v2_and_symmetric_grids_as_v1(sym: bool, tmp_path: Path) -> None:
    export(of(quantized("llama", all_linear(rtn(sym=sym)))), "gptq", tmp_path / "out")
    facts = quantization_in(tmp_path / "out")
    assert facts["checkpoint_format"] == ("gptq" if sym else "gptq_v2")
    assert facts["sym"] is sym and facts["desc_act"] is False
    assert (facts["bits"], facts["group_size"], "dynamic" in facts) == (4, 8, False)


def test_layers_that_differ_are_named(tmp_path: Path) -> None:
    def choose(port: Port) -> Rtn | str:
        if port.name == "model.layers.0.self_attn.q_proj":
            return "as an example"
        return rtn(bits=8, sym=False) if port.name.endswith("layers.1.mlp.up_proj") else all_linear(rtn())(port)  # type: ignore[return-value]

    export(of(quantized("llama", choose)), "gptq", tmp_path / "out")
    facts = quantization_in(tmp_path / "out")
    assert (facts["bits"], facts["group_size"], facts["sym"], facts["lm_head"]) == (4, 8, True, False)
    assert facts["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 8, "group_size": 8, "sym": False},
        r"-:^model\.layers\.0\.self_attn\.q_proj$": {},
    }
    read = load(str(tmp_path / "out")).model
    assert sum(isinstance(module, QuantLinear) for module in read.modules()) == 13


def test_adapter_lies_beside_and_the_source_is_as_it_was(tmp_path: Path) -> None:
    model = add_lora(quantized(), r=2, base_name=NAME).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = base_of(model).config.to_dict()  # type: ignore[union-attr, operator]
    assert export(of(model), "gptq", tmp_path / "out").max_logit_difference == 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert differing(model.state_dict(), state) == []
    assert base_of(model).config.to_dict() == settings  # type: ignore[union-attr, operator]


def test_a_weight_that_reads_back_otherwise_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    def half(layer: QuantLinear, dtype: torch.dtype, *, less_one: bool) -> dict[str, Tensor]:
        tensors = packed_layer(layer, dtype, less_one=less_one)
        return {**tensors, "scales": tensors["scales"] * 1.001}

    monkeypatch.setattr("slimtune.export.gptq.packed_layer", half)
    with pytest.raises(FormatError, match="does not read back"):
        export(of(quantized()), "gptq", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def replaced(layout: Affine | Scattered, scale: float = 1.0) -> PreTrainedModel:
    """A model with one packed layer of this layout."""
    model = quantized()
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout.tensors().items()}
    tensors["scale"].fill_(scale)
    linear = torch.nn.Linear(layout.in_features, layout.out_features, bias=False)
    block: Any = model.get_submodule("model.layers.1.mlp")
    block.up_proj = QuantLinear.from_linear(linear, QTensor(tensors, layout))
    return model


@pytest.mark.parametrize(
    ("layout", "scale", "reason"),
    [
        (Scattered(64, 32, 4, 4), 1.0, "its layout is 'scattered', not affine"),
        (Affine(64, 32, 4, 8, float_zero=True), 1.0, "its zero points are not whole numbers"),
        (Affine(64, 32, 5, 8), 1.0, "5 bits"),
        (Affine(64, 32, 4, 24), 1.0, "groups of 24 do not divide 32 input features"),
        (Affine(33, 32, 4, 8), 1.0, "33 codes of 4 bits do not fill 32-bit words"),
        (Affine(64, 28, 3, 28), 1.0, "28 codes of 3 bits do not fill 32-bit words"),
        (Affine(64, 32, 4, 8), 1e-8, "float16 cannot hold"),
        (Affine(64, 32, 4, 8), 1e5, "float16 cannot hold"),
        (Affine(64, 32, 4, 8, scale_dtype="float32"), 0.1, "float16 cannot hold"),
    ],
)
def test_layers_the_format_cannot_hold_are_named(layout: Affine | Scattered, scale: float, reason: str) -> None:
    model = replaced(layout, scale)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    with pytest.raises(FormatError) as caught:
        require_expressible(layers)
    assert f"model.layers.1.mlp.up_proj: {reason}" in str(caught.value).replace("it has scales that ", "")
    assert str(caught.value).count("model.layers") == 1


def test_a_plain_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no packed weights"):
        export(of(pico_model("llama")), "gptq", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- folders of others ---


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama as another program would have written it: float16 scales, act-order in one layer, v1."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    model = pico_model("llama", **WIDE)
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    state, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows, columns = module.weight.shape
            group = torch.arange(columns) // 8
            if name.endswith("0.mlp.up_proj"):
                group = group[torch.randperm(columns, generator=generator)]
            codes = torch.randint(16, (rows, columns), generator=generator)
            zero = torch.randint(16, (rows, columns // 8), generator=generator)
            scale = 0.02 * torch.rand(rows, columns // 8, generator=generator) + 0.01
            packed = textbook(codes, zero, scale, group, 4, "gptq")
            del state[f"{name}.weight"]
            state.update({f"{name}.{leaf}": tensor for leaf, tensor in packed.items()})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((folder / "config.json").read_text())
    facts["quantization_config"] = config(4, 8, desc_act=True, sym=False, dynamic={"-:.*lm_head": {}})
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def copy(foreign: Path, tmp_path: Path) -> Path:
    shutil.copytree(foreign, tmp_path / "model")
    return tmp_path / "model"


def test_a_foreign_folder_trains_and_is_saved_as_ours(foreign: Path, tmp_path: Path) -> None:
    loaded = load(str(foreign), dtype="float32")
    model = loaded.model
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14
    assert {m.layout.scale_dtype for m in layers.values()} == {"float16"}  # type: ignore[attr-defined]
    scattered = [name for name, m in layers.items() if isinstance(m.layout, Scattered)]
    assert scattered == ["model.layers.0.mlp.up_proj"]
    write_model(model, loaded.tokenizer, tmp_path)
    again = load(str(tmp_path)).model
    assert differing(again.state_dict(), model.state_dict()) == []
    inputs = pico_inputs(model)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    tuned = add_lora(model, r=2).train()
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [p.grad for name, p in tuned.named_parameters() if "lora_B" in name]
    assert len(grads) == 14
    assert all(grad is not None and grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)


def test_every_verb_takes_a_foreign_folder(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"What is {a}?", "completion": f"It is {a}."} for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("It is what it is. " * 30)
    recipe = f"model: {foreign}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\nsteps:\n  - lora: {{r: 2}}\n"
    (tmp_path / "r.yaml").write_text(recipe + "  - train: {max_steps: 2, max_length: 32}\n")
    tune = ["finetune", foreign, "--train", tmp_path / "rows.jsonl", "--max-steps", 2, "--max-length", 32, "--r", 2]
    for arguments in (
        ["plan", tmp_path / "r.yaml"],
        [*tune, "-o", tmp_path / "run"],
        ["evaluate", foreign, "--perplexity", tmp_path / "text.txt", "--length", 32],
        ["generate", foreign, "--prompt", "It", "--adapter", tmp_path / "run" / "adapter", "--max-new-tokens", 2],
        ["export", tmp_path / "run", "--format", "safetensors", "-o", tmp_path / "merged"],
    ):
        status = _guarded(lambda a=arguments: app([str(argument) for argument in a], standalone_mode=True))  # type: ignore[misc]
        assert status == 0, (arguments, capsys.readouterr().err)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_keep_their_dtype_whatever_the_model_has(foreign: Path, dtype: str) -> None:
    wanted = load(str(foreign)).model
    got = load(str(foreign), dtype=dtype).model
    name = "model.layers.1.mlp.up_proj"
    a: Any = got.get_submodule(name)
    b: Any = wanted.get_submodule(name)
    assert a.scale.dtype == torch.float16 and torch.equal(a.scale, b.scale)
    assert str(got.get_input_embeddings().weight.dtype) == f"torch.{dtype}"


Break = Callable[[Path], None]
LAYER = "model.layers.1.mlp.up_proj"


def edit(**facts: Any) -> Break:
    def change(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        quantization = {**whole["quantization_config"], **facts}
        whole["quantization_config"] = {key: value for key, value in quantization.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(whole))

    return change


def tensor(leaf: str, change: Callable[[Tensor], Tensor | None], layer: str = LAYER) -> Break:
    def act(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        new = change(tensors.pop(f"{layer}.{leaf}"))
        if new is not None:
            tensors[f"{layer}.{leaf}"] = new.contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return act


def renamed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"): t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def extra(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, f"{LAYER}.perm": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})


def dense(folder: Path) -> None:
    tensors = {k: t for k, t in load_file(folder / "model.safetensors").items() if t.dtype == torch.float32}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


HOSTILE: dict[str, tuple[Break, str]] = {
    "marlin": (edit(checkpoint_format="marlin"), "unknown kind of GPTQ checkpoint"),
    "marlin flag": (edit(is_marlin_format=True), "unknown kind of GPTQ checkpoint"),
    "planar": (edit(checkpoint_format="gptq_p"), "got:    gptq_p"),
    "other words": (edit(pack_dtype="int16"), "unknown words"),
    "5 bits": (edit(bits=5), "unknown width"),
    "bits a word": (edit(bits="four"), "unknown width"),
    "no bits": (edit(bits=...), "malformed"),
    "bits a list": (edit(bits=[4]), "malformed"),
    "no group size": (edit(group_size=...), "malformed"),
    "group size a word": (edit(group_size="many"), "malformed"),
    "dynamic not a mapping": (edit(dynamic=[1]), "malformed"),
    "other bits": (edit(bits=8), "codes of [8] bits"),
    "no such method": (edit(quant_method="nonesuch"), "got:    nonesuch"),
    "truncated": (cut, "truncated or not safetensors"),
    "no packed weights": (dense, "no packed weights"),
    "a layer that is not there": (renamed, "model.layers.7.mlp.up_proj"),
    "a tensor too many": (extra, "perm"),
    "no scales": (tensor("scales", lambda t: None), "lacks tensors"),
    "no codes": (tensor("qweight", lambda t: None), "lacks tensors"),
    "no zero points": (tensor("qzeros", lambda t: None), "lacks tensors"),
    "codes cut": (tensor("qweight", lambda t: t[:-1]), "a wrong tensor"),
    "codes narrow": (tensor("qweight", lambda t: t[:, :-1]), "a wrong tensor"),
    "codes flat": (tensor("qweight", lambda t: t.flatten()), "a wrong tensor"),
    "codes wide": (tensor("qweight", lambda t: t.to(torch.int64)), "a wrong tensor"),
    "scales cut": (tensor("scales", lambda t: t[:-1]), "a wrong tensor"),
    "scales gone": (tensor("scales", lambda t: t[:0]), "a wrong tensor"),
    "scales whole": (tensor("scales", lambda t: t.to(torch.int32)), "a wrong tensor"),
    "scales not finite": (tensor("scales", lambda t: t * float("inf")), "not finite"),
    "zero points cut": (tensor("qzeros", lambda t: t[:, :-1]), "a wrong tensor"),
    "groups too few": (tensor("g_idx", lambda t: t[:-1]), "a wrong tensor"),
    "groups of bytes": (tensor("g_idx", lambda t: t.to(torch.uint8)), "a wrong tensor"),
    "a group too high": (tensor("g_idx", lambda t: t + 1), "in no group"),
    "a group below": (tensor("g_idx", lambda t: t - 1), "in no group"),
    "a norm lost": (tensor("weight", lambda t: None, "model.norm"), "lacks weights"),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_broken_folder_is_one_clear_error(case: str, copy: Path) -> None:
    breaks, text = HOSTILE[case]
    breaks(copy)
    with pytest.raises(FormatError) as caught:
        load(str(copy))
    assert text in str(caught.value)


def test_groups_and_scales_of_our_own_folder_are_checked(foreign: Path, tmp_path: Path) -> None:
    loaded = load(str(foreign))
    write_model(loaded.model, loaded.tokenizer, tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.group"
    save_file({**good, name: good[name] + 1}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="in no group"):
        load(str(tmp_path))
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["quantization_config"]["groups"][0]["scale_dtype"] = "float8"
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(FormatError, match="unknown dtype of scales"):
        load(str(tmp_path))
