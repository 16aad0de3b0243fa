"""Adapters on their way out: cut to a lower rank, and in the basis of the original model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer
from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError
from slimtune.export import Source, export, exporter_of
from slimtune.export.ggml import decode
from slimtune.export.gguf_facts import Naming
from slimtune.export.native import settle_
from slimtune.export.peft import TENSORS
from slimtune.lora.attach import LIVE, adapted
from slimtune.lora.cut import Update, cut, cut_all, updates
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn
from slimtune.recipe.starts import cut_section
from slimtune.rotate.fuse import rotate_
from slimtune.rotate.options import Rotation


def of(model: nn.Module) -> Source:
    return Source(model, pico_tokenizer(), "owner/base")


def started(*, rotated: bool = False, **options: Any) -> Any:
    """An adapter that is frozen in part, and whose every tensor has moved."""
    tokens = pico_inputs(pico_model("llama"), batch=6, length=20)["input_ids"]
    base: Any = options.pop("model", None) or pico_model("llama")
    if rotated:
        rotate_(base, bind(base), Rotation())
    model: Any = slimtune.add_lora(base, **{"r": 3, "init": "lora-ga", "tokens": tokens, **options})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def stock(folder: Path, family: str = "llama") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of transformers' newer names
        return PeftModel.from_pretrained(pico_model(family), str(folder)).eval()


@pytest.mark.parametrize(("out", "width", "inner"), [(9, 7, 4), (5, 12, 8), (12, 5, 8)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_cutting_is_the_truncated_svd(out: int, width: int, inner: int, rank: int) -> None:
    whole = Update("layer", torch.randn(inner, width).double(), torch.randn(out, inner).double(), 2.5)
    dense = 2.5 * whole.b @ whole.a
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    kept = cut(whole, rank)
    torch.testing.assert_close(2.5 * kept.b @ kept.a, best)
    assert len(kept.a) == min(rank, out, width, inner)
    assert whole.size == pytest.approx(float(dense.norm()))
    _, lost = cut_all([whole], rank)
    assert lost.error == pytest.approx(float((dense - best).norm() / dense.norm()), abs=1e-12) == lost.layers[0][2]


def test_an_adapter_that_learnt_nothing_loses_nothing() -> None:
    kept, lost = cut_all([Update("layer", torch.randn(4, 6), torch.zeros(5, 4), 1.0)], 2)
    assert lost.error == 0 and not bool((kept[0].b @ kept[0].a).any())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"ranks": "gradient"}])
@pytest.mark.parametrize("rank", [2, 3, 6])
def test_a_cut_file_is_a_stock_one_and_states_its_error(options: dict[str, Any], rank: int, tmp_path: Path) -> None:
    model = started(**options)
    manifest = export(of(model), "peft", tmp_path / "out", rank=rank)
    found, lost, whole = stock(tmp_path / "out"), 0.0, 0.0
    errors = {row["name"]: row["error"] for row in manifest.facts["cut"]}
    for name, layer in adapted(model).items():
        mine, theirs = (each.get_delta_weight("default").detach().double() for each in (layer, adapted(found)[name]))
        best = torch.linalg.svdvals(mine)
        wanted = float(best[rank:].norm() / best.norm())
        assert float((mine - theirs).norm() / mine.norm()) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        assert errors[name] == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        lost, whole = lost + float((mine - theirs).square().sum()), whole + float(mine.square().sum())
    assert manifest.facts["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3, abs=1e-5)
    assert (manifest.facts["error"] > 0.01) == (rank < 6 or "ranks" in options)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == rank and max(config["rank_pattern"].values(), default=rank) <= rank
    assert not (tmp_path / "out" / LIVE).exists()
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"up to {manifest.max_logit_difference:.3g} away" in readme
    assert f"cut to rank {rank}" in readme and all(name in readme for name in errors)
    page = str(cut_section(3, manifest.facts))
    assert f"rank {rank}" in page and (max(errors, key=lambda name: errors[name]) in page)


@torch.no_grad()
def one_scaling(folder: Path, base: nn.Module) -> nn.Module:
    """`base` with the adapter in `folder` added as an engine does that knows one rank and one scaling, as vLLM's
    PEFTHelper: buffers of `r`, and `lora_alpha / r` (or its root) for every layer, whatever else the file says."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / TENSORS)
    r, alpha = config["r"], config["lora_alpha"]
    scaling = alpha / r**0.5 if config["use_rslora"] else alpha / r
    for key, a in tensors.items():
        name, found, _ = key.removeprefix("base_model.model.").partition(".lora_A")
        if found:
            b = tensors[key.replace("lora_A", "lora_B")]
            assert a.shape[0] == b.shape[1] == r
            base.get_submodule(name).weight.data += scaling * (b @ a)  # type: ignore[union-attr, operator]
    return base


@pytest.mark.parametrize("init", ["default", "lora-ga"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_an_engine_of_one_rank_and_scaling_adds_the_same(
    init: str, use_rslora: bool, rotated: bool, tmp_path: Path
) -> None:
    model: Any = started(init=init, ranks="gradient", use_rslora=use_rslora, rotated=rotated)
    inputs = pico_inputs(model)
    ranks = {layer.r["default"] for layer in adapted(model).values()}
    assert len(ranks) > 1
    wanted = logits(model, inputs)
    manifest = export(of(model), "peft", tmp_path / "out")
    assert manifest.max_logit_difference < 1e-4
    got: Any = one_scaling(tmp_path / "out", pico_model("llama"))
    # float32 sums in another order, logits of about 10; of a rotated model, in another basis
    for found in (got, stock(tmp_path / "out")):
        torch.testing.assert_close(logits(found, inputs), wanted, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == max(ranks)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_the_adapter_beside_a_packed_folder_has_one_rank_too(format: str, tmp_path: Path) -> None:
    base: Any = pico_model("llama")
    quantize_(base, bind(base), all_linear(Rtn(bits=4, group_size=8, sym=True)))
    settle_(base)
    model: Any = started(init="default", ranks="gradient", model=base)
    dense, inputs = pico_model("llama"), pico_inputs(model)
    for name, layer in adapted(model).items():
        dense.get_submodule(name).weight.data = layer.get_base_layer().dequantize()  # type: ignore[union-attr]
    manifest = export(of(model), format, tmp_path / "out")
    assert manifest.max_logit_difference < 1e-4
    got: Any = one_scaling(tmp_path / "out" / "adapter", dense)
    torch.testing.assert_close(logits(got, inputs), logits(model, inputs), rtol=0, atol=1e-4)
    assert "the adapter's rank is" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("r", "says"), [(3, "rank 8`"), (9, "rank 32`"), (300, "none above 512")])
def test_the_readme_names_the_rank_that_a_server_needs(r: int, says: str, tmp_path: Path) -> None:
    """Of an adapter that is frozen in part it is the rank of the whole."""
    model = slimtune.add_lora(pico_model("llama"), r=r, init="pissa", target_modules=".*layers.0.*")
    export(of(model), "peft", tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"its rank is {2 * r}: vLLM" in readme and says in readme
    export(of(model), "peft", tmp_path / "cut", rank=2)
    assert "its rank is 2: vLLM needs `--max-lora-rank 8`" in (tmp_path / "cut" / "README.md").read_text()


def test_the_model_is_as_it_was_and_a_wrong_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = started()
    inputs = pico_inputs(model)
    before, state = logits(model, inputs), {name: t.clone() for name, t in model.state_dict().items()}
    export(of(model), "peft", tmp_path / "out", rank=2)
    assert torch.equal(logits(model, inputs), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    real = slimtune.export.peft._replace  # type: ignore[attr-defined]

    def spoilt(folder: Path, kept: list[Update], rank: int) -> None:
        real(folder, [kept[0]._replace(b=1.01 * kept[0].b), *kept[1:]], rank)

    monkeypatch.setattr("slimtune.export.peft._replace", spoilt)
    with pytest.raises(FormatError, match="does not read back"):
        export(of(model), "peft", tmp_path / "spoilt", rank=2)
    assert not (tmp_path / "spoilt").exists() and model.active_adapters == ["default"]


@pytest.mark.parametrize("format", ["peft", "gguf-lora"])
def test_a_rank_above_the_adapters_is_refused(format: str, tmp_path: Path) -> None:
    model = slimtune.add_lora(pico_model("llama"), r=3)
    with pytest.raises(RecipeError, match="rank is lower already") as caught:
        export(of(model), format, tmp_path / "out", rank=4)
    assert caught.value.facts["wanted"] == "at most 3" and not (tmp_path / "out").exists()
    export(of(model), format, tmp_path / "out", rank=3)


def test_formats_without_a_rank_refuse_one() -> None:
    for name in ("safetensors", "gguf", "compressed-tensors", "gptq"):
        with pytest.raises(RecipeError, match="takes no rank"):
            exporter_of(name, rank=4)
    with pytest.raises(RecipeError, match="rank out of range"):
        slimtune.plan({"model": "smollm2-135m", "steps": [{"lora": {}}, {"export": {"format": "peft", "rank": -1}}]})


# The other way out, and rotated models


def gguf_updates(folder: Path, model: Any) -> dict[str, Tensor]:
    """What `adapter.gguf` adds to each weight, in the order of the model's own rows, as llama.cpp computes it."""
    reader, naming = gguf.GGUFReader(folder / "adapter.gguf"), Naming(model)
    read = {t.name: decode(t.data, t.tensor_type.name) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    found = {}
    for port in bind(model).linears:
        tensor = naming.name(f"{port.name}.weight")
        a, b = read[f"{tensor}.lora_a"], read[f"{tensor}.lora_b"]
        b = naming.restored(f"{port.name}.weight", b, b.shape)
        found[port.name] = (alpha / len(a) if alpha else 1.0) * b @ a
    return found


@pytest.mark.parametrize("rank", [0, 2])
def test_both_ways_out_add_the_same(rank: int, tmp_path: Path) -> None:
    model = started()
    export(of(model), "peft", tmp_path / "peft", rank=rank)
    export(of(model), "gguf-lora", tmp_path / "gguf", rank=rank)
    theirs = adapted(stock(tmp_path / "peft"))
    for name, update in gguf_updates(tmp_path / "gguf", model).items():
        torch.testing.assert_close(update, theirs[name].get_delta_weight("default").detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("online", [(), ("r4", "heads")])
@pytest.mark.parametrize("rank", [0, 2])
def test_adapters_leave_a_rotation_on_either_way(online: Any, rank: int, tmp_path: Path) -> None:
    model: Any = pico_model("llama")
    rotate_(model, bind(model), Rotation(online=online))
    tokens = pico_inputs(model, batch=6, length=20)["input_ids"]
    wrapped: Any = slimtune.add_lora(model, r=3, init="lora-ga", tokens=tokens)
    for layer in adapted(wrapped).values():
        layer.lora_B["default"].live.data += 0.1 * torch.randn_like(layer.lora_B["default"].live)
    wrapped.eval()
    inputs = pico_inputs(model)
    wanted = logits(wrapped, inputs)
    manifest = export(of(wrapped), "gguf-lora", tmp_path / "gguf", rank=rank)
    export(of(wrapped), "peft", tmp_path / "peft", rank=rank)
    found = gguf_updates(tmp_path / "gguf", wrapped)
    original: Any = pico_model("llama")
    for name, update in found.items():
        original.get_submodule(name).weight.data += update
    there = logits(stock(tmp_path / "peft"), inputs)
    torch.testing.assert_close(logits(original, inputs), there, rtol=0, atol=1e-4)
    if not rank:
        torch.testing.assert_close(there, wanted, rtol=0, atol=1e-4)
    else:  # what is stated is the loss in the original basis, where the file is used
        exact = {u.name: u.scaling * u.b @ u.a for u in updates(wrapped)}
        for row in manifest.facts["cut"]:
            gone = (exact[row["name"]] - found[row["name"]]).norm() / exact[row["name"]].norm()
            assert row["error"] == pytest.approx(float(gone), rel=1e-3)
    assert "rotated its model" in (tmp_path / "gguf" / "README.md").read_text()
