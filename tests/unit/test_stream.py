"""A folder rotated from file to file: the bits of the rotation in memory, with one block of weights at a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import slimtune
from pico import PICO, VOCAB_SIZE, can_balance, logits, pico_inputs, pico_model, pico_tokenizer, save_pico
from slimtune.arch import bind
from slimtune.arch.weights import Checkpoint
from slimtune.errors import FormatError, RecipeError
from slimtune.export import stream
from slimtune.export.load import load
from slimtune.export.native import write_model
from slimtune.export.stream import rotate_folder
from slimtune.recipe.plan import plan
from slimtune.recipe.run import run
from slimtune.recipe.schema import Rotate, recipe_from
from slimtune.recipe.shell import recipe_of
from slimtune.recipe.steps import Session
from slimtune.rotate.fuse import rotate_
from slimtune.rotate.options import Rotation
from slimtune.rotate.record import fingerprint, rotation_of


def held(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return checkpoint.read(checkpoint.files)


@pytest.mark.parametrize(
    "options",
    [{"online": ("r3", "r4")}, {"kind": "learned", "steps": 2}, {"online": ("inputs",), "balance": True}],
    ids=str,
)
@pytest.mark.parametrize("family", PICO)
def test_every_family_gets_the_bits_of_the_rotation_in_memory(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_pico(tmp_path / "pico", family)
    balanced = "balance" in options and can_balance(family, options["online"])
    rotation = Rotation(**{**options, "balance": balanced}, seed=3)
    tokens = torch.randint(6, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(3))
    facts = rotate_folder(load(str(folder), lazy=True), tmp_path / "out", rotation, tokens=tokens)
    wanted = load(str(folder))
    same = rotate_(wanted.model, bind(wanted.model), rotation, tokens=tokens)
    write_model(wanted.model, wanted.tokenizer, tmp_path / "memory")
    read = load(str(tmp_path / "out")).model
    assert {k: v for k, v in facts.to_dict().items() if k not in ("seconds", "logit_error")} == {
        k: v for k, v in same.to_dict().items() if k not in ("seconds", "logit_error")
    }
    ours, theirs = held(tmp_path / "out"), held(tmp_path / "memory")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    inputs = pico_inputs(read)
    assert torch.equal(logits(read, inputs), logits(wanted.model, inputs))
    assert fingerprint(rotation_of(read)) == fingerprint(rotation_of(wanted.model))  # type: ignore[arg-type]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= len(bind(read).blocks) + 1


def test_no_more_than_one_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_pico(tmp_path / "pico", num_hidden_layers=4)
    source = load(str(folder), lazy=True)
    seen: set[int] = set()
    turn_, real = stream.turn_, nn.Linear.forward

    def loaded(model: nn.Module) -> int:
        blocks = [model.get_submodule(block.name) for block in bind(model).blocks]
        return sum(not p.is_meta for block in blocks for p in block.parameters() if p.ndim == 2)

    def spy(model: nn.Module, *args: Any) -> None:
        turn_(model, *args)
        seen.add(loaded(model))

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        seen.add(loaded(source.model))
        return real(self, x)

    monkeypatch.setattr(stream, "turn_", spy)
    monkeypatch.setattr(nn.Linear, "forward", forward)
    rotate_folder(source, tmp_path / "out", Rotation())
    assert seen == {0, 7}
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_what_was_written_is_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_pico(tmp_path / "pico")
    real = stream.save_file

    def spoil(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        real({k: t * 1.01 if k.endswith("1.mlp.up_proj.weight") else t for k, t in state.items()}, path, metadata)

    monkeypatch.setattr(stream, "save_file", spoil)
    with pytest.raises(FormatError, match="does not compute what the model computed"):
        rotate_folder(load(str(folder), lazy=True), tmp_path / "out", Rotation())
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_in_memory_or_rotated_is_refused(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "pico")
    with pytest.raises(RecipeError, match="block by block"):
        rotate_folder(load(str(folder)), tmp_path / "out", Rotation())
    rotate_folder(load(str(folder), lazy=True), tmp_path / "out", Rotation())
    with pytest.raises(RecipeError, match="rotated already"):
        rotate_folder(load(str(tmp_path / "out"), lazy=True), tmp_path / "again", Rotation())


def test_sixteen_bits_and_a_sharded_source(tmp_path: Path) -> None:
    model = pico_model("qwen3", dtype=torch.bfloat16)
    (tmp_path / "pico").mkdir()
    write_model(model, pico_tokenizer(), tmp_path / "pico", shard="20KB")
    rotate_folder(load(str(tmp_path / "pico"), dtype="bfloat16", lazy=True), tmp_path / "out", Rotation())
    rotate_(model, bind(model), Rotation())
    got = load(str(tmp_path / "out"), dtype="bfloat16").model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in model.state_dict().items())
    assert {t.dtype for file in (tmp_path / "out").glob("*.safetensors") for t in load_file(file).values()} == {
        torch.bfloat16,
        torch.float64,
    }


def test_a_run_streams_and_goes_on_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_pico(tmp_path / "pico", "llama-tied")
    (tmp_path / "text.txt").write_text("What is it? It is this, and not that. " * 60)
    source = {"path": str(tmp_path / "text.txt"), "samples": 4, "length": 16}
    quantize = {"quantize": {"method": "optq", "bits": 4, "group_size": 8}}
    reports, models = {}, {}
    whole = Session.whole
    read: list[bool] = []
    monkeypatch.setattr(
        Session, "whole", lambda self: (read.append(self.loaded.materialise is not None), whole(self))[1]
    )
    for streams in (True, False):
        facts = {"model": str(folder), "data": {"calibration": source}}
        steps = [{"rotate": {"online": ["r4"], "stream": streams}}, quantize]
        reports[streams] = run(recipe_from({**facts, "steps": steps}), tmp_path / str(streams))
        models[streams] = load(str(tmp_path / str(streams) / "model")).model
        assert not any(read)  # no step put everything in memory at once
    assert all(torch.equal(models[True].state_dict()[k], v) for k, v in models[False].state_dict().items())
    for report in reports.values():
        for key in ("seconds", "logit_error"):
            del report["steps"][0]["facts"][key]
    streamed, other = (reports[s]["steps"][0]["facts"] for s in (True, False))
    assert streamed == other


def test_a_run_learns_from_what_there_is(tmp_path: Path) -> None:
    """Of so few windows that all are looked at, those are learnt from, streaming or not."""
    folder, text = save_pico(tmp_path / "pico", "llama-tied"), tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "What is it? It is this, and not that. " * 3}) + "\n")
    data = {"calibration": {"path": str(text), "samples": 4, "length": 64}}
    hashes = []
    for streams in (True, False):
        steps = [{"rotate": {"online": ["inputs"], "balance": True, "stream": streams}}]
        report = run(recipe_from({"model": str(folder), "data": data, "steps": steps}), tmp_path / str(streams))
        hashes.append(report["steps"][0]["facts"]["sha256"])
    assert hashes[0] == hashes[1]


def test_only_a_first_step_streams(tmp_path: Path) -> None:
    steps = [{"prune": {"importance": "magnitude"}}, {"rotate": {"stream": True}}]
    with pytest.raises(RecipeError, match="in a folder streams"):
        plan(recipe_from({"model": str(save_pico(tmp_path / "pico")), "steps": steps}))


def test_a_plan_knows_that_one_block_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**8))  # what the process holds moves on its own
    monkeypatch.setattr("slimtune.recipe.plan.psutil.Process", lambda: now)
    folder = save_pico(tmp_path / "pico", num_hidden_layers=6, intermediate_size=4096)
    whole, streamed = (
        plan(recipe_from({"model": str(folder), "steps": [{"rotate": {"stream": streams}}]})).steps[0].memory_bytes
        for streams in (False, True)
    )
    ports = bind(load(str(folder)).model).linears
    assert whole - streamed == 4 * sum(port.in_features * port.out_features for port in ports) * 5 // 6


def test_from_python_and_the_command_line(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "pico")
    facts = slimtune.rotate_folder(str(folder), tmp_path / "out", seed=4)
    assert facts.seed == 4 and rotation_of(slimtune.load(str(tmp_path / "out"))[0]) is not None
    [step] = recipe_of(str(folder), ("rotate",), ["--stream", "--seed", "4"], "rotate").steps
    assert isinstance(step, Rotate) and step.stream
