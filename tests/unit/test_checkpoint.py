"""Checkpoints of training: whole, free of pickles, and refused when they are of something else."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pico import pico_model, pico_tokenizer
from slimtune import add_lora
from slimtune.calib.formats import normalise
from slimtune.errors import FormatError, RecipeError
from slimtune.train import checkpoint
from slimtune.train.checkpoint import decode, encode, last_checkpoint
from slimtune.train.data import Collator, tokenize
from slimtune.train.loop import finetune
from slimtune.train.options import TrainOptions

EXAMPLES = tokenize(normalise([{"prompt": "a", "completion": "bcd"}] * 6), pico_tokenizer(), 64)[0]

scalars = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
values = st.recursive(
    scalars | st.integers(0, 5).map(torch.arange) | st.lists(st.integers(0, 2**32 - 1)).map(np.array),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and a.tolist() == b.tolist()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@given(values)
def test_decode_undoes_encode_through_json(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    assert equal(decode(json.loads(json.dumps(encode(value, tensors, "x"))), tensors), value)


def test_keys_that_look_alike_keep_their_tensors() -> None:
    value = {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1), 0: torch.ones(2), "0": torch.zeros(2)}
    tensors: dict[str, Tensor] = {}
    assert equal(decode(json.loads(json.dumps(encode(value, tensors, "x"))), tensors), value)


def trained(folder: Path, model: nn.Module | None = None, **arguments: Any) -> None:
    fields = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2}
    finetune(
        model or add_lora(pico_model("llama"), r=2), EXAMPLES, Collator(0), TrainOptions(**fields), checkpoints=folder,
        **arguments,
    )  # fmt: skip


def test_a_checkpoint_is_three_files_and_the_last_two_are_kept(tmp_path: Path) -> None:
    trained(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        f"checkpoint-{step}/{name}"
        for step in (4, 6)
        for name in ("state.json", "state.safetensors", "trainer_state.json")
    ]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "absent") is None
    (tmp_path / ".checkpoint-4.partial").mkdir()
    assert last_checkpoint(tmp_path) is None


def damage(folder: Path, name: str, content: bytes) -> None:
    for path in folder.glob(f"checkpoint-*/{name}"):
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 100])
def test_a_damaged_checkpoint_is_a_format_error(tmp_path: Path, name: str, content: bytes) -> None:
    trained(tmp_path)
    for state in tmp_path.glob("checkpoint-*/trainer_state.json"):
        state.write_text(state.read_text().replace('"max_steps": 6', '"max_steps": 8'))  # not finished yet
    damage(tmp_path, name, content)
    with pytest.raises(FormatError, match=r"checkpoint is damaged\n  where:  .*checkpoint-6"):
        trained(tmp_path, resume=True)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(FormatError, match="of another model or adapter"):
        trained(tmp_path, add_lora(pico_model("llama"), r=3), resume=True)


def test_a_full_disk_is_one_message_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save_file

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RecipeError, match="the disk is full"):
        trained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    draw()
    tensors: dict[str, Tensor] = {}
    kept = json.loads(json.dumps(encode(checkpoint._random_state(), tensors, "random")))
    wanted = draw()
    draw()
    checkpoint._restore_random_state(decode(kept, tensors))
    assert draw() == wanted
