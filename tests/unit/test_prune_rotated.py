"""Pruning in another basis: R1 and R2 mix no unit with another, and what is left knows the basis it is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import slimtune
from pico import VOCAB_SIZE, logits, pico_inputs, pico_model, pico_tokenizer, save_pico, with_noise
from slimtune.arch import ModelMap, bind
from slimtune.export import Source, export
from slimtune.export.load import load
from slimtune.export.native import write_model
from slimtune.lora.attach import base_of
from slimtune.prune import IMPORTANCES
from slimtune.prune.collect import collect
from slimtune.prune.groups import Axis, Kept, axes, possible
from slimtune.prune.importance import Magnitude
from slimtune.prune.probe import Probe
from slimtune.prune.surgery import PrunePlan, prune_
from slimtune.recipe.run import run
from slimtune.recipe.schema import recipe_from
from slimtune.recipe.shell import open_model
from slimtune.rotate.fuse import rotate_
from slimtune.rotate.options import Rotation
from slimtune.rotate.record import fingerprint, rotation_of

FAMILIES = ("llama", "qwen2", "gemma2", "phi3", "opt", "t5", "llava")
WINDOWS = torch.randint(6, VOCAB_SIZE, (3, 16), generator=torch.Generator().manual_seed(3))


def turned(family: str, deep: bool = False, **options: Any) -> Any:
    """A rotated pico model in float64; `deep`: of four layers (in each stack)."""
    model = original(family, deep)
    rotate_(model, bind(model), Rotation(**options), tokens=WINDOWS)
    return model


def original(family: str, deep: bool = False) -> Any:
    count = {"num_layers": 4, "num_decoder_layers": 4} if family.startswith("t5") else {"num_hidden_layers": 4}
    return pico_model(family, dtype=torch.float64, **(count if deep else {}))


def some(found: tuple[Axis, ...]) -> Kept:
    """About half of the units, other ones of each axis."""
    return {axis.name: tuple(range((number + 1) % 2, axis.units, 2)) for number, axis in enumerate(found)}


def masked_logits(model: Any, modelmap: ModelMap, found: tuple[Axis, ...], kept: Kept) -> Tensor:
    with Probe(model, modelmap, found, Magnitude()) as probe:
        for name, units in kept.items():
            probe.keep(name, units)
        return logits(model, pico_inputs(model))


def cut(model: Any, targets: Any) -> Any:
    """`model` with about half of its units."""
    modelmap = bind(model)
    found = axes(modelmap, targets)
    prune_(model, modelmap, PrunePlan(found, some(found)))
    return model


def fits_the_original(model: Any, plain: Any, folder: Path) -> None:
    """The adapter of `model` leaves its basis, and does on `plain`, cut alike and never turned, what it did there."""
    wrapped, inputs = with_noise(model), pico_inputs(model)
    export(Source(wrapped, pico_tokenizer(), "original", torch.float64), "peft", folder)
    there = PeftModel.from_pretrained(plain, str(folder), autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(logits(there, inputs), logits(wrapped, inputs), rtol=1e-5, atol=1e-5)
    wrapped.unload()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {"kind": "hadamard"}) for family in FAMILIES),
        ("llama", {"kind": "orthogonal"}),
        ("qwen2", {"kind": "learned"}),
        ("t5", {"kind": "learned"}),
        ("qwen2", {"balance": True}),
        ("llama", {"balance": True, "online": ("inputs",)}),
    ],
)
def test_sliced_is_masked_and_its_basis_is_sliced_along(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = turned(family, **options, steps=2, seed=7)
    modelmap = bind(model)
    targets: Any = [name for name in possible(modelmap) if name in ("kv", "ffn")]
    found = axes(modelmap, targets)
    wanted, whole = masked_logits(model, modelmap, found, some(found)), rotation_of(model)
    cut(model, targets)
    torch.testing.assert_close(logits(model, pico_inputs(model)), wanted, rtol=1e-9, atol=1e-9)
    basis = rotation_of(model)
    assert basis is not None and whole is not None and basis.attentions == whole.attentions
    same = "kv" not in targets and not whole.scales
    assert (fingerprint(basis) == fingerprint(whole)) == same
    write_model(model, pico_tokenizer(), tmp_path)
    back = load(str(tmp_path)).model.double()
    again = rotation_of(back)
    assert again is not None and fingerprint(again) == fingerprint(basis)
    torch.testing.assert_close(logits(back, pico_inputs(model)), wanted, rtol=1e-4, atol=1e-4)
    fits_the_original(back, cut(original(family), targets), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((f, {}) for f in FAMILIES),
        ("qwen2", {"online": ("r4", "heads")}),
        ("qwen2", {"online": ("inputs",), "balance": True}),
    ],
)
def test_whole_layers_go_in_any_basis(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, plain = turned(family, deep=True, **options), original(family, deep=True)
    cut(plain, ("layers",))
    cut(model, ("layers",))
    wanted = logits(plain, pico_inputs(model))
    torch.testing.assert_close(logits(model, pico_inputs(model)), wanted, rtol=1e-5, atol=1e-5)
    write_model(model, pico_tokenizer(), tmp_path)
    back = load(str(tmp_path)).model.double()
    torch.testing.assert_close(logits(back, pico_inputs(model)), wanted, rtol=1e-4, atol=1e-4)
    fits_the_original(back, plain, tmp_path / "adapter")


def test_a_basis_that_was_sliced_is_sliced_again(tmp_path: Path) -> None:
    model, plain = turned("llama", deep=True), original("llama", deep=True)
    for targets in (("layers",), ("kv",), ("ffn",), ("heads",), ("layers",)):
        cut(plain, targets)
        cut(model, targets)
    basis = rotation_of(model)
    assert basis is not None and basis.kept == ((3, (0,)),)  # first layers 1 and 3 stayed, in 3 head 0, then 3 alone
    torch.testing.assert_close(
        logits(model, pico_inputs(model)), logits(plain, pico_inputs(model)), rtol=1e-4, atol=1e-5
    )
    fits_the_original(model, plain, tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt"])
def test_scores_of_channels_are_the_same_in_both_bases(family: str) -> None:
    """Those by the length of rows and columns, or by what channels are worth. A gain that is folded makes rows of
    another length (the one that they really have): here all are one. Wanda's sums of absolute columns are no length."""
    model = original(family)
    for norm in bind(model).norms:
        if norm.feeds:
            nn.init.constant_(model.get_submodule(norm.name).weight, 0.0 if norm.kind == "rms_plus_one" else 1.0)
    found = axes(bind(model), ("ffn",))

    def scores() -> list[dict[str, Tensor]]:
        names = ("magnitude", "flap", "gate", "gate-fisher")
        return [collect(model, bind(model), found, IMPORTANCES[name](), WINDOWS) for name in names]

    before = scores()
    rotate_(model, bind(model), Rotation())
    for was, now in zip(before, scores(), strict=True):
        for name, score in was.items():  # RMS norms compute in float32
            torch.testing.assert_close(now[name], score, rtol=1e-4, atol=1e-6 * float(score.max()))


def test_heads_are_weighed_as_before_by_their_gates() -> None:
    scores = []
    for model in (original("llama"), turned("llama")):
        found = axes(bind(model), ("kv",))
        scores.append(collect(model, bind(model), found, IMPORTANCES["gate"](), WINDOWS))
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score, rtol=1e-4, atol=1e-7)


def test_a_configuration_in_other_words_still_says_that_the_model_is_rotated(tmp_path: Path) -> None:
    model: Any = pico_model("llama", num_attention_heads=8, num_key_value_heads=8)
    slimtune.rotate(model)
    slimtune.prune(model, ratio=0.2, importance="magnitude", targets=("kv",))
    write_model(model, pico_tokenizer(), tmp_path)
    back = load(str(tmp_path)).model
    assert back.config.model_type == "mistral"
    assert rotation_of(back) is not None


@pytest.mark.parametrize("ramped", [False, True])
def test_a_run_rotates_prunes_and_quantizes(ramped: bool, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f"{i + 1}."}) + "\n" for i in range(20)))
    prune = {
        "prune": {"ratio": 0.3, "importance": "gate", "multiple_of": 2, "schedule": "cubic" if ramped else "one-shot"}
    }
    quantize = {"quantize": {"method": "rtn", "bits": 8, "group_size": -1}}
    train = {"train": {"max_steps": 4, "max_length": 32}}
    facts = {
        "model": str(save_pico(tmp_path / "base", "qwen2")),
        "data": {"train": {"path": str(rows)}, "calibration": {"path": str(rows), "samples": 3, "length": 32}},
        "steps": [
            "rotate",
            *([] if ramped else [prune, quantize]),
            {"lora": {"r": 2}},
            *([{"prune": {**prune["prune"], "every": 1}}] if ramped else []),
            train,
        ],
    }
    report = run(recipe_from(facts), tmp_path / "run")
    _, model = open_model(str(tmp_path / "run"))
    basis = rotation_of(model)
    assert basis is not None and basis.kept != ()
    assert fingerprint(basis) != report["steps"][0]["facts"]["sha256"]
    note = json.loads((tmp_path / "run" / "adapter" / "rotation.json").read_text())
    assert note["sha256"] == fingerprint(basis)
    assert bind(model).kv_heads < 2 or base_of(model).config.intermediate_size < 40
