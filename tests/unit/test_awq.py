"""AWQ folders, read: against a packer written from the format's description, and from hostile folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer
from slimtune.errors import FormatError
from slimtune.export.foreign import Awq
from slimtune.export.load import load
from slimtune.lora.attach import save_adapter
from slimtune.quant.layouts import Affine
from slimtune.quant.linear import QuantLinear

WIDE = {"intermediate_size": 64, "head_dim": 16}
OUT, IN, GROUP = 24, 64, 16


def words(rows: Tensor) -> Tensor:
    """int32 `[n, m / 8]` of codes `[n, m]`: of eight codes, the n-th nibble from below is the one of this number."""
    packed = []
    for row in rows.tolist():
        eights = [row[start : start + 8] for start in range(0, len(row), 8)]
        packed.append([sum(e[f] << (4 * n) for n, f in enumerate((0, 2, 4, 6, 1, 3, 5, 7))) for e in eights])
    return torch.from_numpy(np.array(packed, dtype=np.uint32).view(np.int32).copy())


def textbook(codes: Tensor, zero: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """AWQ's tensors of codes `[out, in]` and of zero points and scales `[out, groups]`."""
    scales = scale.to(torch.float16).T.contiguous()
    return {"qweight": words(codes.T), "qzeros": words(zero.T), "scales": scales}


def config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm", **more}


@pytest.mark.parametrize("group_size", [16, 32, 128, -1])
def test_reads_what_a_textbook_wrote(group_size: int) -> None:
    size = min(group_size, IN) if group_size > 0 else IN
    codes, zero = torch.randint(16, (OUT, IN)), torch.randint(16, (OUT, IN // size))
    scale = torch.rand(OUT, IN // size).to(torch.float16)
    wanted = (codes - zero.repeat_interleave(size, 1)).double() * scale.double().repeat_interleave(size, 1)
    weight = Awq(config(group_size=group_size)).decode("q", textbook(codes, zero, scale), OUT, IN)[0]
    assert weight.layout == Affine(OUT, IN, 4, size, scale_dtype="float16")
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(weight.dequantize(dtype), wanted.to(dtype))  # rounded once


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A pico Llama as another program would have written it, and its dense weights."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    model = pico_model("llama-biased", **WIDE)
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    state, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    dense = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows, columns = module.weight.shape
            codes = torch.randint(16, (rows, columns), generator=generator)
            zero = torch.randint(16, (rows, columns // GROUP), generator=generator)
            scale = (0.02 * torch.rand(rows, columns // GROUP, generator=generator) + 0.01).to(torch.float16)
            del state[f"{name}.weight"]
            state.update({f"{name}.{leaf}": tensor for leaf, tensor in textbook(codes, zero, scale).items()})
            wide = (part.repeat_interleave(GROUP, 1) for part in (zero, scale.float()))
            dense[name] = (codes - next(wide)) * next(wide)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((folder / "config.json").read_text())
    facts["quantization_config"] = config(modules_to_not_convert=["lm_head"])
    (folder / "config.json").write_text(json.dumps(facts))
    return folder, dense


def test_a_folder_stays_packed_trains_and_gives_a_stock_adapter(
    foreign: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, dense = foreign
    model, tokenizer = slimtune.load(str(folder))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert layers.keys() == dense.keys() and tokenizer is not None
    plain = pico_model("llama-biased", **WIDE)
    for name, weight in dense.items():
        assert torch.equal(layers[name].dequantize(torch.float32), weight)
        plain.get_submodule(name).weight.data = weight.clone()  # type: ignore[union-attr]
    inputs = pico_inputs(model)
    torch.testing.assert_close(logits(model, inputs), logits(plain, inputs))
    tuned = slimtune.add_lora(model, r=2)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    save_adapter(tuned, tmp_path)  # type: ignore[arg-type]
    from peft import PeftModel

    there = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    torch.testing.assert_close(logits(there, inputs), logits(tuned.eval(), inputs), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert not torch.allclose(logits(tuned, inputs), logits(load(str(folder)).model, inputs), atol=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"bits": 8}, {"version": "gemv"}, {"version": None, "format": "marlin"}, {"zero_point": False}], ids=str
)
def test_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="unknown kind of AWQ checkpoint"):
        Awq(config(**change))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("qzeros"), "lacks tensors"),
        (lambda t: t.update(qweight=t["qweight"].T.contiguous()), "wrong tensor"),
        (lambda t: t.update(scales=t["scales"][:-1]), "wrong tensor"),
        (lambda t: t.update(scales=t["scales"] / 0), "not finite"),
    ],
)
def test_a_hostile_layer_is_refused(spoil: Callable[[dict[str, Tensor]], None], message: str) -> None:
    tensors = textbook(torch.randint(16, (OUT, IN)), torch.randint(16, (OUT, 4)), torch.rand(OUT, 4) + 0.1)
    spoil(tensors)
    with pytest.raises(FormatError, match=message):
        Awq(config()).decode("q", tensors, OUT, IN)
