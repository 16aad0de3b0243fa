"""Float8: weights and inputs against a version written out number by number, and everything a layer does with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slimtune.quant.float8
from oracles import bfloat16, split
from pico import logits, pico_inputs, pico_model, save_pico
from slimtune.arch import bind
from slimtune.cli import _guarded, app
from slimtune.errors import FormatError, RecipeError
from slimtune.kernels.dispatch import float8_wanted, reference
from slimtune.linalg.levels import LEVELS, float8
from slimtune.linalg.packing import unpack
from slimtune.lora.attach import plain
from slimtune.quant.activation import Activations, activations_from_dict, activations_to_dict
from slimtune.quant.again import requantize
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.base import QTensor
from slimtune.quant.float8 import float8_product, in_float8
from slimtune.quant.fp8 import Fp8
from slimtune.quant.integer import in_integers
from slimtune.quant.layouts import Codebook, layout_from_dict, layout_to_dict
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn
from slimtune.quant.select import select
from slimtune.quant.size import model_size
from slimtune.recipe.treatments import Treatment

FLOAT = Activations(8, "float")
SHAPES = [(96, 32), (75, 32), (40, 64), (50, -1), (37, 4)]


def number(code: int) -> float:
    """A byte of e4m3fn by its bits: bias 7, subnormals, no infinities (OCP 8-bit floating point, 1.0, table 1)."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (2.0**-6 * (mantissa / 8) if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


POSITIVE = [number(code) for code in range(127)]  # ascending


def nearest(x: float) -> float:
    """The nearest number, half to the even code; beyond the greatest, the greatest."""
    code = min(range(127), key=lambda c: (abs(POSITIVE[c] - abs(x)), c % 2))
    return float(np.copysign(POSITIVE[code], x))


def textbook(row: np.ndarray, size: int) -> np.ndarray:
    value = np.zeros(len(row))
    for group in split(len(row), size):
        scale = bfloat16(float(np.abs(row[group]).max()) / 448) or 1.0
        value[group] = [nearest(w / scale) * scale for w in row[group]]
    return value


def layer(weight: Tensor, activations: Activations | None = None, **fields: Any) -> QuantLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    return QuantLinear.from_linear(linear, Fp8(**fields)(weight, {}), activations)


def test_numbers_are_those_of_the_format() -> None:
    assert len(LEVELS["e4m3fn"]) == 256 and sorted(POSITIVE) == POSITIVE and POSITIVE[-1] == 448
    np.testing.assert_array_equal(np.array(LEVELS["e4m3fn"]), np.array([number(code) for code in range(256)]))
    assert np.signbit(LEVELS["e4m3fn"][128])


@pytest.mark.parametrize(("columns", "size"), SHAPES)
def test_weights_equal_the_textbook(columns: int, size: int) -> None:
    w = torch.randn(4, columns, dtype=torch.float64) * torch.randn(4, columns, dtype=torch.float64).exp().square()
    got = Fp8(size)(w, {})
    for r, row in enumerate(w.numpy()):
        np.testing.assert_array_equal(got.dequantize(torch.float64)[r].numpy(), textbook(row, size))
    assert torch.equal(got.tensors["codes"], Fp8(size)(w.float(), {}).tensors["codes"])
    assert got.bits_per_weight == 8 * got.bytes / w.numel()


def test_codes_are_torchs_own_cast() -> None:
    q = Fp8()(w := torch.randn(64, 512), {})
    cast = (w.double() / q.tensors["scale"].double()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(q.tensors["codes"], cast.view(torch.uint8))
    assert q.bits_per_weight == 8 + 16 / 512


def test_every_number_comes_back_to_the_last_bit() -> None:
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    w = torch.tensor(LEVELS["e4m3fn"])[codes.int()] * torch.tensor([[1.0], [2.0**-20], [2.0**30]])
    q = Fp8()(w, {})
    assert torch.equal(unpack(q.tensors["codes"], 8, 254), codes.expand(3, -1))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(q.dequantize(dtype), w.to(dtype))


def test_what_is_larger_than_all_becomes_the_largest() -> None:
    x = torch.tensor([448.0, 449, 463, 465, 1e30, float("inf"), -1e9])
    assert float8(x).tolist() == [448.0] * 6 + [-448.0]
    rounded_down = [m for m in torch.linspace(1, 2, 500).tolist() if bfloat16(m / 448) < m / 448]
    w = torch.tensor(rounded_down).unsqueeze(1) * torch.tensor([[1.0, -1.0, 0.3]])
    assert len(rounded_down) > 100 and float((w / Fp8()(w, {}).tensors["scale"].float()).max()) > 448.5
    assert torch.equal(Fp8()(w, {}).tensors["codes"][:, :2], torch.tensor([[126, 254]]).expand(len(w), 2).byte())


def test_rows_of_zeros_and_of_nearly_nothing() -> None:
    w = torch.zeros(4, 24)
    w[2], w[3, 5] = torch.randn(24), 1e-42
    q = Fp8(group_size=8)(w, {})
    assert (
        not q.dequantize()[:2].any() and bool(q.dequantize().isfinite().all()) and bool((q.tensors["scale"] > 0).all())
    )
    assert float((q.dequantize() - w).abs().max()) < 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model: Any = pico_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(FormatError, match=r"not finite") as caught:
        quantize_(model, bind(model), all_linear(Fp8()))
    assert "layers.1.mlp" in str(caught.value)


@pytest.mark.parametrize("columns", [37, 64])
def test_half_precision_is_rounded_once(columns: int) -> None:
    q = Fp8(group_size=16)(torch.randn(33, columns) * 1e-4, {})
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(q.dequantize(dtype), q.dequantize(torch.float32).to(dtype))
    assert torch.equal(q.dequantize().double(), q.dequantize(torch.float64))


def test_the_layout_is_said_by_its_fields() -> None:
    layout = Fp8()(torch.randn(3, 40), {}).layout
    facts = {"layout": "codebook", "levels": "e4m3fn", "group_size": 40, "nested": False, "scale_dtype": "bfloat16"}
    assert layout_to_dict(layout) == facts and layout_from_dict(facts, 3, 40) == layout
    with pytest.raises(FormatError, match="unknown dtype of scales"):
        Codebook(3, 40, "e4m3fn", 40, scale_dtype="int8")
    with pytest.raises(RecipeError, match="group_size out of range"):
        Fp8(group_size=0)


# --- a layer ---


@pytest.mark.parametrize("size", [-1, 16])
def test_gradient_is_that_of_the_decoded_weight(size: int) -> None:
    q = layer(torch.randn(20, 40, dtype=torch.float64), group_size=size)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(q, x)
    q.activations = FLOAT
    y, upstream = q(x), torch.randn(3, 20, dtype=torch.float64)
    dense = q.dequantize(torch.float64)
    torch.testing.assert_close(y - q.bias, FLOAT(x) @ dense.T)
    (grad,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(grad, upstream @ dense)  # straight through the rounding
    half = x.detach().bfloat16().requires_grad_()
    (low,) = torch.autograd.grad(q(half), half, upstream.bfloat16())
    torch.testing.assert_close(low.double(), upstream @ dense, rtol=0.05, atol=0.3)


def test_the_product_in_float8_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's call for GPUs, made on the CPU; that it is called where it is wanted; and where it is."""
    q, x = layer(torch.randn(48, 64), FLOAT), torch.randn(2, 7, 64).bfloat16()
    x[0, 3] = 0
    exact = FLOAT(x.float()).double() @ q.dequantize(torch.float64).T  # near a tie, float64 rounds otherwise
    got = float8_product(x, FLOAT, q.layout, q.qtensor.tensors)
    assert got.dtype == x.dtype and got.shape == exact.shape
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-4 * float(exact.abs().max()))
    with torch.no_grad():
        assert not float8_wanted(x) and not in_float8(x, FLOAT, q.layout)  # a CPU
        plain_result = q(x)
        monkeypatch.setattr(slimtune.quant.float8, "float8_wanted", lambda _: True)
        assert torch.equal(q(x), got + q.bias.bfloat16())
        torch.testing.assert_close(q(x), plain_result, rtol=0.02, atol=0.02 * float(exact.abs().max()))
    refused = [
        (Activations(8), q.layout),
        (Activations(8, "float", group_size=32), q.layout),
        (FLOAT, layer(torch.randn(48, 64), group_size=32).layout),
        (FLOAT, layer(torch.randn(40, 64)).layout),
        (FLOAT, layer(torch.randn(48, 72)).layout),
        (FLOAT, Rtn(bits=8, group_size=-1, sym=True)(torch.randn(48, 64), {}).layout),
    ]
    assert in_float8(x, FLOAT, q.layout) and not any(in_float8(x, how, layout) for how, layout in refused)


def test_a_change_comes_back_into_the_same_layout() -> None:
    old = Fp8(group_size=16)(torch.randn(12, 40), {})
    change = 0.05 * torch.randn(12, 40)
    hessian = torch.eye(40) + 0.1
    theirs = QTensor(
        {**old.tensors, "scale": old.tensors["scale"].float() * 1.001},
        Codebook(12, 40, "e4m3fn", 16, scale_dtype="float32"),  # others' scales stay
    )
    for before in (old, theirs):
        for metric in (None, hessian):
            wanted = before.dequantize() + change
            new = requantize(before, wanted, metric)
            assert new.layout == before.layout
            assert float((new.dequantize() - wanted).norm()) < 0.7 * float(change.norm())
            assert not (new.tensors["codes"] & 127 == 127).any()
    assert torch.equal(requantize(theirs, theirs.dequantize() + change, None).tensors["scale"], theirs.tensors["scale"])


def test_rows_and_columns_are_cut_exactly() -> None:
    q, rows, columns = Fp8()(torch.randn(12, 40), {}), torch.tensor([1, 5, 6]), torch.arange(3, 40, 2)
    smaller, reason = select(q, rows, columns)
    assert reason == "" and smaller.layout == Codebook(3, 19, "e4m3fn", 19)
    assert torch.equal(smaller.dequantize(), q.dequantize()[rows][:, columns])


def test_size_and_plan_count_it() -> None:
    model = pico_model("llama")
    names = frozenset(port.name for port in bind(model).linears)
    whole = model_size(plain(model), names)
    facts = quantize_(model, bind(model), all_linear(Fp8()))
    size = model_size(plain(model), names)
    assert size.parameters == whole.parameters
    assert size.bits_per_weight == facts.bits_per_weight and 8 < size.bits_per_weight < 8 + 16 / 32
    assert Treatment(Fp8(), FLOAT).stored_bits() == 8 + 16 / 4096
    assert Treatment(Fp8(group_size=128), None).stored_bits() == 8 + 16 / 128


# --- inputs ---


@pytest.mark.parametrize("size", [-1, 16])
def test_inputs_equal_the_textbook(size: int) -> None:
    x = torch.randn(5, 40, dtype=torch.float64) * torch.randn(5, 40, dtype=torch.float64).exp()
    x[2] = 0
    got = Activations(8, "float", group_size=size)(x)
    for token, row in zip(got.numpy(), x.numpy(), strict=True):
        for group in split(40, size):
            scale = float(np.abs(row[group]).max()) / 448 or 1.0
            np.testing.assert_allclose(token[group], [nearest(v / scale) * scale for v in row[group]], rtol=1e-15)


def test_a_clipped_or_static_range_saturates() -> None:
    x = torch.tensor([[1.0, -0.25, 7.0, 100.0]])
    static = Activations(8, "float", static=True, low=-7.0, high=7.0)
    assert static(x).tolist() == [[1.0, -0.25, 7.0, 7.0]]
    assert Activations(8, "float", clip_ratio=0.07)(x)[0, 3] == pytest.approx(7)
    codes, scale, zero = FLOAT.codes(torch.randn(9, 33).bfloat16())
    assert codes.shape == (9, 1, 33) and codes.dtype == scale.dtype == torch.float32
    assert not zero.any() and float(codes.abs().amax()) == 448


def test_float_inputs_never_go_to_integer_units() -> None:
    affine = Rtn(bits=8, group_size=-1, sym=True)(torch.randn(48, 64), {}).layout
    with torch.no_grad():
        assert not in_integers(torch.randn(2, 64), FLOAT, affine)


def test_the_type_is_written_and_read() -> None:
    assert activations_to_dict(FLOAT) == {"bits": 8, "type": "float"}
    assert activations_from_dict({"bits": 8, "type": "float"}, "x") == FLOAT
    with pytest.raises(FormatError, match="unknown way"):
        activations_from_dict({"bits": 8, "type": "complex"}, "x")


@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 7}, {"sym": False}], ids=str)
def test_other_floats_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="float inputs are float8") as caught:
        Activations(**{"bits": 8, "type": "float", **fields})
    assert "type: int" in str(caught.value)


NONSENSE: dict[str, tuple[str, list[str]]] = {
    "integers below float8": ("{method: fp8, activations: {bits: 8}}", ["activations", "type: float"]),
    "four bits below float8": ("{method: fp8, activations: {bits: 4}}", ["bits: 4", "type: float"]),
    "floats of four bits": ("{method: fp8, activations: {bits: 4, type: float}}", ["float8", "type: int"]),
    "another type": ("{method: fp8, activations: {type: bfloat}}", ["type", "bfloat"]),
    "bits": ("{method: fp8, bits: 4}", ["bits"]),
    "a layer": ("{method: fp8, layers: {down_proj: {activations: {bits: 8}}}}", ["down_proj", "type: float"]),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_one_message(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step, said = NONSENSE[case]
    (tmp_path / "r.yaml").write_text(f"model: {save_pico(tmp_path / 'base')}\nsteps:\n  - quantize: {step}\n")
    assert _guarded(lambda: app(["plan", str(tmp_path / "r.yaml")], standalone_mode=True)) == 2
    err = capsys.readouterr().err
    assert err.count("slimtune: ") == 1 and "Traceback" not in err and all(word in err for word in said), err


def test_one_recipe_from_weights_to_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"What is {a}?", "completion": f"It is {a}."} for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("It is what it is. " * 30)
    (tmp_path / "r.yaml").write_text(
        f"model: {save_pico(tmp_path / 'base')}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\nsteps:\n"
        "  - quantize: {method: fp8, activations: {bits: 8, type: float}, layers: {o_proj: {activations: {bits: 16}}}}"
        f"\n  - evaluate: {{perplexity: {{text: {tmp_path / 'text.txt'}}}, length: 32}}\n"
        "  - lora: {r: 2}\n  - train: {max_steps: 3, max_length: 32, learning_rate: 0.01}\n"
        "  - merge: {keep_bits: true}\n  - export: {format: compressed-tensors}\n"
    )
    run = ["run", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "run")]
    assert _guarded(lambda: app(run, standalone_mode=True)) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    quantized, trained = report["steps"][0]["facts"], report["steps"][3]["facts"]
    inputs = {fact["name"].rsplit(".", 1)[-1]: fact["activations"] for fact in quantized["layers"]}
    assert inputs["down_proj"] == 8 and inputs["o_proj"] == 16 and 8 < report["model"]["bits_per_weight"] < 8.6
    assert trained["last_loss"] < trained["first_loss"]
    assert report["steps"][5]["facts"]["max_logit_difference"] == 0
    told = json.loads((tmp_path / "run" / "export" / "compressed-tensors" / "config.json").read_text())
    assert told["quantization_config"]["format"] == "float-quantized"
    read, _ = slimtune.load(str(tmp_path / "run" / "model"))
    again, _ = slimtune.load(str(tmp_path / "run" / "export" / "compressed-tensors"))
    with reference():
        assert torch.equal(logits(read, pico_inputs(read)), logits(again, pico_inputs(read)))
