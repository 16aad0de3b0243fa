"""What every quantizer must do, whoever wrote it: each row of `QUANTIZERS` is run through all of this."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from slimtune.calib.stats import STATISTICS
from slimtune.errors import FormatError, RecipeError
from slimtune.linalg.packing import unpack
from slimtune.quant import QUANTIZERS, QTensor
from slimtune.quant.layouts import LAYOUTS, Affine, layout_from_dict, layout_to_dict
from slimtune.quant.rtn import Rtn

each = pytest.mark.parametrize("name", list(QUANTIZERS))
each_shape = pytest.mark.parametrize("columns", [37, 64, 100, 192])
SETTINGS: list[dict[str, Any]] = [
    {},
    {"bits": 2},
    {"bits": 3, "group_size": 48},
    {"bits": 8, "group_size": -1},
    {"bits": 6},
    {"block_size": 24},
]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def quantizer(name: str, **setting: Any) -> Any:
    """The quantizer with those of the settings that it has; a test of settings it has none of is not for it."""
    if setting.get("group_size") == -1 and not has_groups(name):
        setting = {key: value for key, value in setting.items() if key != "group_size"}  # whole rows are all it has
    known = {field.name for field in fields(QUANTIZERS[name])}  # type: ignore[arg-type]
    if not setting.keys() <= known:
        pytest.skip(f"{name} has no {', '.join(setting.keys() - known)}")
    if "bits" in setting and setting["bits"] not in QUANTIZERS[name].widths:  # type: ignore[attr-defined]
        pytest.skip(f"{name} has no width of {setting['bits']} bits")
    return QUANTIZERS[name](**setting)


def has_groups(name: str) -> bool:
    return "group_size" in {field.name for field in fields(QUANTIZERS[name])}  # type: ignore[arg-type]


def weight_of(columns: int, rows: int = 12) -> Tensor:
    return torch.randn(rows, columns) * 0.05 + 0.01


def stats_of(columns: int) -> dict[str, Tensor]:
    """Every statistic there is, of correlated inputs."""
    x = torch.randn(400, columns) + 2 * torch.randn(400, 4) @ torch.randn(4, columns)
    stats = {}
    for name, make in STATISTICS.items():
        statistic = make(columns, x.device)
        statistic.update(x, x)
        stats[name] = statistic.result()
    return stats


def loss(q: QTensor, w: Tensor, hessian: Tensor | None) -> float:
    off = q.dequantize(torch.float64) - w.double()
    return float(((off if hessian is None else off @ hessian.double()) * off).sum())


def equal(a: QTensor, b: QTensor) -> bool:
    same = a.layout == b.layout and a.tensors.keys() == b.tensors.keys()
    return same and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@each
def test_is_a_frozen_dataclass_that_says_what_it_needs(name: str) -> None:
    method = quantizer(name)
    assert is_dataclass(method)
    assert method.needs <= STATISTICS.keys()
    assert method == QUANTIZERS[name]() and hash(method) == hash(QUANTIZERS[name]())
    for field in fields(method):
        assert field.metadata["help"]
        with pytest.raises(FrozenInstanceError):
            setattr(method, field.name, getattr(method, field.name))


@each
@each_shape
@each_setting
def test_is_pure_and_deterministic(name: str, columns: int, setting: dict[str, Any]) -> None:
    method, w, stats = quantizer(name, **setting), weight_of(columns), stats_of(columns)
    before = w.clone(), {key: value.clone() for key, value in stats.items()}
    first = method(w, stats)
    state = torch.get_rng_state()
    torch.randn(3)
    second = method(w, stats)
    assert not torch.equal(state, torch.get_rng_state())
    assert equal(first, second)
    assert torch.equal(w, before[0])
    assert stats.keys() == before[1].keys() and all(torch.equal(stats[key], before[1][key]) for key in stats)
    owned = {t.untyped_storage().data_ptr() for t in first.tensors.values()}
    assert w.untyped_storage().data_ptr() not in owned


@each
@each_shape
@each_setting
def test_result_is_a_valid_weight_of_its_layout(name: str, columns: int, setting: dict[str, Any]) -> None:
    w = weight_of(columns)
    q = quantizer(name, **setting)(w, stats_of(columns))
    layout = q.layout
    assert (layout.out_features, layout.in_features) == w.shape
    assert LAYOUTS[layout.tag] is type(layout)
    assert layout_from_dict(layout_to_dict(layout), *w.shape) == layout
    for tensor in q.tensors.values():
        assert tensor.shape[0] == len(w) or not layout.rowwise
        assert tensor.is_contiguous() and not tensor.requires_grad
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        dense = q.dequantize(dtype)
        assert dense.dtype == dtype and dense.shape == w.shape
        torch.testing.assert_close(
            dense.double(), q.dequantize(torch.float64), rtol=2 * torch.finfo(dtype).eps, atol=1e-5
        )
    stored = sum(t.numel() * t.element_size() for t in q.tensors.values())
    assert q.bytes == stored and q.bits_per_weight == 8 * stored / w.numel()


@each
@each_shape
@each_setting
def test_rows_of_the_stored_tensors_are_rows_of_the_weight(name: str, columns: int, setting: dict[str, Any]) -> None:
    """What sharding along dim 0 relies on."""
    q = quantizer(name, **setting)(weight_of(columns), stats_of(columns))
    if not q.layout.rowwise:
        pytest.skip(f"{q.layout.tag} stores no rows of the weight")
    half = layout_from_dict(layout_to_dict(q.layout), 5, columns)
    rows = QTensor({key: tensor[3:8] for key, tensor in q.tensors.items()}, half)
    assert torch.equal(rows.dequantize(), q.dequantize()[3:8])


@each
@each_setting
def test_codes_are_in_range_and_all_levels_are_used(name: str, setting: dict[str, Any]) -> None:
    q = quantizer(name, **setting)(weight_of(192, rows=64), stats_of(192))
    if not isinstance(q.layout, Affine):
        pytest.skip("not an affine layout")
    codes = unpack(q.tensors["codes"], q.layout.bits, 192)
    assert int(codes.max()) <= 2**q.layout.bits - 1
    assert len(codes.unique()) > 0.9 * 2**q.layout.bits
    assert bool((q.tensors["scale"] > 0).all())
    if not q.layout.symmetric:
        assert int(q.tensors["zero"].max()) <= 2**q.layout.bits - 1


@each
@each_shape
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_is_no_worse_than_rounding_in_the_metric_it_optimises(
    name: str, columns: int, bits: int, group_size: int
) -> None:
    method, w, stats = quantizer(name, bits=bits, group_size=group_size), weight_of(columns), stats_of(columns)
    hessian = stats["hessian"] if "hessian" in method.needs else None
    plain = Rtn(bits=bits, group_size=group_size, grid="minmax")(w, {})
    assert loss(method(w, stats), w, hessian) <= loss(plain, w, hessian)


@each
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [64, -1])
def test_a_weight_takes_its_bits_and_its_share_of_scale_and_zero_point(name: str, bits: int, group_size: int) -> None:
    q = quantizer(name, bits=bits, group_size=group_size)(weight_of(256), stats_of(256))
    if not isinstance(q.layout, Affine):
        pytest.skip("not an affine layout")
    # Scales are bfloat16; zero points are bytes, or bfloat16 where they are no whole numbers.
    share = 16 + (16 if q.layout.float_zero else 8)
    assert q.bits_per_weight == bits + share / (group_size if group_size > 0 else 256)


@each
def test_symmetric_grids_take_no_zero_points(name: str) -> None:
    q = quantizer(name, bits=4, group_size=64, sym=True)(weight_of(256), stats_of(256))
    assert q.bits_per_weight == 4 + 16 / 64


@each
@pytest.mark.parametrize(
    "setting", [{"bits": 7}, {"bits": 0}, {"bits": 16}, {"bits": -4}, {"group_size": 0}, {"group_size": -2}], ids=str
)
def test_settings_out_of_range_are_refused(name: str, setting: dict[str, int]) -> None:
    if not setting.keys() <= {field.name for field in fields(QUANTIZERS[name])}:  # type: ignore[arg-type]
        pytest.skip(f"{name} has no {', '.join(setting)}")
    with pytest.raises(RecipeError, match="out of range") as caught:
        QUANTIZERS[name](**setting)
    (key, value), message = *setting.items(), str(caught.value)
    assert key in message and str(value) in message and "wanted:" in message


@each
@each_setting
@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 1e-30, 3e4])
def test_constant_rows_stay_what_they_are(name: str, setting: dict[str, Any], value: float) -> None:
    w = weight_of(100)
    w[2:4] = value
    q = quantizer(name, **setting)(w, stats_of(100))
    dense = q.dequantize()
    assert bool(torch.isfinite(dense).all())
    if value == 0:
        assert not bool(dense[2:4].any())
    if not q.layout.rowwise:
        return  # its errors are spread over all rows
    # A constant is a level of its own grid, up to the rounding of the scale and of the zero point.
    torch.testing.assert_close(dense[2:4].mean(), w[2:4].mean(), rtol=0.01, atol=1e-30)


@each
@each_setting
def test_an_all_zero_weight_stays_zero(name: str, setting: dict[str, Any]) -> None:
    q = quantizer(name, **setting)(torch.zeros(4, 100), stats_of(100))
    assert not bool(q.dequantize().any())


@each
@each_setting
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_what_they_say(name: str, setting: dict[str, Any], dtype: torch.dtype) -> None:
    method, w, stats = quantizer(name, **setting), weight_of(100).to(dtype), stats_of(100)
    assert equal(method(w, stats), method(w.float(), stats))


@each
def test_a_weight_that_is_a_transposed_view_is_the_weight(name: str) -> None:
    w, stats = weight_of(64), stats_of(64)
    assert equal(quantizer(name)(w.T.contiguous().T, stats), quantizer(name)(w, stats))


@each
def test_a_broken_result_cannot_exist(name: str) -> None:
    q = quantizer(name)(weight_of(64), stats_of(64))
    for key, tensor in q.tensors.items():
        for wrong in (tensor[:-1], tensor.to(torch.float64), tensor.unsqueeze(0)):
            with pytest.raises(FormatError, match="wrong tensor") as caught:
                QTensor({**q.tensors, key: wrong}, q.layout)
            assert key in str(caught.value)
        with pytest.raises(FormatError, match="wrong tensors"):
            QTensor({k: t for k, t in q.tensors.items() if k != key}, q.layout)
    with pytest.raises(FormatError, match="wrong tensors"):
        QTensor({**q.tensors, "extra": torch.zeros(1)}, q.layout)


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if "gptaq" in {f.name for f in fields(QUANTIZERS[name])}])
def test_making_up_for_drift_brings_outputs_nearer_to_the_dense_ones(name: str) -> None:
    z, w = torch.randn(400, 64) @ torch.randn(64, 64) / 8, weight_of(64)
    x = z + 0.3 * torch.randn(400, 64)
    stats = {"hessian": x.T @ x / 400, "drift": (z - x).T @ x / 400}
    plain, made_up = quantizer(name), quantizer(name, gptaq=1.0)
    assert (plain.needs, made_up.needs) == (frozenset({"hessian"}), frozenset({"hessian", "drift"}))
    off = [float((z @ w.T - x @ m(w, stats).dequantize().T).square().sum()) for m in (plain, made_up)]
    assert off[1] < off[0]
    with pytest.raises(RecipeError, match="gptaq out of range"):
        quantizer(name, gptaq=1.5)
