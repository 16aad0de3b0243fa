"""Training: what moves and what must not, exact resumption, an honest log, and a stop when the loss is no number."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pico import pico_model, pico_tokenizer
from slimtune import add_lora, quantize
from slimtune.calib.formats import normalise
from slimtune.errors import FormatError, RecipeError, TrainingDiverged
from slimtune.lora.attach import plain
from slimtune.train.callbacks import StepLog
from slimtune.train.data import Collator, Example, pack, padding_id, tokenize, tokenize_seq2seq
from slimtune.train.loop import _CountingTrainer, finetune, heldout_loss
from slimtune.train.options import TrainOptions

TOKENIZER = pico_tokenizer()
COLLATOR = Collator(padding_id(TOKENIZER))
ROWS = [{"prompt": f"{a} and {b}?", "completion": "is " * (b + 1) + str(a + b)} for a in range(4) for b in range(4)]
EXAMPLES = tokenize(normalise(ROWS), TOKENIZER, 96)[0]


def options(**changes: Any) -> TrainOptions:
    fields = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 2}
    return TrainOptions(**{**fields, **changes})


def adapted(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """A 4-bit pico Llama with an adapter on it."""
    model = quantize(pico_model("llama", seed), "rtn", bits=4, group_size=16)
    return add_lora(model, r=4, lora_dropout=dropout, seed=seed)


def train(model: nn.Module, **arguments: Any) -> Any:
    chosen = {key: arguments.pop(key) for key in list(arguments) if key in TrainOptions.__dataclass_fields__}
    return finetune(model, arguments.pop("examples", EXAMPLES), COLLATOR, options(**chosen), **arguments)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


class Killed(BaseException):
    """What nothing catches."""


def test_only_the_adapter_moves_and_the_loss_falls() -> None:
    model = adapted()
    frozen = {f"{path}.{leaf}": t.clone() for path, m in plain(model).items() for leaf, t in m.state_dict().items()
              if "lora" not in leaf}  # fmt: skip
    before = tensors(model)
    facts = train(model, max_steps=12, held_out=EXAMPLES)
    after = tensors(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name}
    for path, module in plain(model).items():
        for leaf, tensor in module.state_dict().items():
            if "lora" not in leaf:
                assert torch.equal(tensor, frozen[f"{path}.{leaf}"]), path
    assert facts.eval_loss_after < 0.8 * facts.eval_loss_before
    assert (facts.steps, facts.trainable_parameters) == (12, sum(v.numel() for k, v in before.items() if "lora_" in k))
    assert not model.training


@pytest.mark.parametrize("killed_in", [3, 4, 6, 8])
def test_resumed_is_uninterrupted_bit_for_bit(killed_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, gradient accumulation, several epochs, and checkpoints that are no multiple of the log's steps."""
    chosen = {"max_steps": 9, "gradient_accumulation_steps": 2, "save_steps": 2, "logging_steps": 5, "eval_steps": 3}
    whole, real, calls = adapted(dropout=0.2), _CountingTrainer.training_step, [0]
    wanted = train(whole, **chosen, log=tmp_path / "whole.jsonl", checkpoints=tmp_path / "whole", held_out=EXAMPLES[:3])

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 * killed_in:  # in the second of the two forward passes
            raise Killed
        return real(self, *args, **kwargs)

    arguments = {"log": tmp_path / "log.jsonl", "checkpoints": tmp_path / "run", "held_out": EXAMPLES[:3]}
    with monkeypatch.context() as patch:
        patch.setattr(_CountingTrainer, "training_step", step)
        with pytest.raises(Killed):
            train(adapted(dropout=0.2), **chosen, **arguments)
    torch.manual_seed(99)
    model = adapted(dropout=0.2)
    got = train(model, **chosen, **arguments, resume=True)
    assert same(tensors(model), tensors(whole))
    assert (got.tokens, got.first_loss, got.last_loss, got.eval_loss_after) == (
        wanted.tokens, wanted.first_loss, wanted.last_loss, wanted.eval_loss_after
    )  # fmt: skip
    exact = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
    resumed, lines = (
        [{key: line.get(key) for key in exact} for line in read(tmp_path / f"{name}.jsonl")]
        for name in ("log", "whole")
    )
    assert resumed == lines
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 6, 8, 9, 9]


def test_a_finished_training_is_not_trained_further(tmp_path: Path) -> None:
    model, again = adapted(), adapted()
    train(model, save_steps=2, checkpoints=tmp_path)
    facts = train(again, save_steps=2, checkpoints=tmp_path, resume=True)
    assert same(tensors(model), tensors(again))
    assert facts.steps == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_the_seed_decides_the_order_and_the_dropout() -> None:
    runs = []
    for seed in (0, 0, 1):
        model = adapted(dropout=0.2)
        train(model, seed=seed)
        runs.append(tensors(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_diverging_training_stops_with_a_message(tmp_path: Path, logging_steps: int) -> None:
    """Also where nothing but the last step is logged."""
    with pytest.raises(TrainingDiverged, match=r"not a finite number(.|\n)*learning_rate") as caught:
        train(adapted(), learning_rate=1e30, max_grad_norm=0.0, warmup_ratio=0.0, logging_steps=logging_steps,
              max_steps=8, log=tmp_path / "log.jsonl")  # fmt: skip
    assert caught.value.exit_status == 1
    assert all(math.isfinite(line["loss"]) for line in read(tmp_path / "log.jsonl"))


def test_a_held_out_loss_that_is_no_number_stops_too() -> None:
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(3e38)  # finite, as weights must be
    with pytest.raises(TrainingDiverged, match="held-out loss"):
        train(model, held_out=EXAMPLES)


def test_the_log_has_its_fields_and_progress_hears_every_line(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    log = tmp_path / "log.jsonl"
    train(adapted(), max_steps=5, number=3, log=log, held_out=EXAMPLES, eval_steps=2, progress=heard.append)
    lines = read(log)
    assert lines == heard
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        (0, True), (1, False), (2, True), (2, False), (4, True), (4, False), (5, False), (5, True)
    ]  # fmt: skip
    fields = {"train", "step", "steps", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
              "peak_rss_bytes", "seconds_left"}  # fmt: skip
    for line in lines:
        assert line["train"] == 3
        if "eval_loss" not in line:
            assert set(line) == fields
            assert line["steps"] == 5 and line["peak_rss_bytes"] > 10**7 and line["tokens_per_second"] > 0
    assert [line["seconds_left"] > 0 for line in lines if "loss" in line] == [True, True, True, False]


def test_a_second_training_appends_to_the_log_of_the_first(tmp_path: Path) -> None:
    model, log = adapted(), tmp_path / "log.jsonl"
    train(model, number=0, log=log)
    first = log.read_text()
    train(model, number=1, log=log)
    assert log.read_text().startswith(first)
    assert {line["train"] for line in read(log)} == {0, 1}
    lines = StepLog(log, 1)
    lines.resume_at(1)
    assert [(line["train"], line["step"]) for line in read(log)] == [(0, 1), (0, 2), (0, 4), (1, 1)]


def test_packed_rows_have_the_loss_of_their_examples() -> None:
    model = pico_model("llama")
    rows = pack(EXAMPLES, 96)
    assert len(rows) < len(EXAMPLES)
    single = heldout_loss(model, EXAMPLES, COLLATOR, 4)
    assert heldout_loss(model, rows, COLLATOR, 3) == pytest.approx(single, rel=1e-5)
    model = adapted()
    facts = train(model, examples=rows, max_steps=8, held_out=rows)
    assert facts.eval_loss_after < facts.eval_loss_before


def test_gradient_checkpointing_changes_memory_and_not_the_result() -> None:
    plainly, sparingly = adapted(dropout=0.1), adapted(dropout=0.1)
    train(plainly)
    train(sparingly, gradient_checkpointing=True)
    wanted = tensors(plainly)
    for name, tensor in tensors(sparingly).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama-tied", "opt"])
def test_a_dense_model_trains_whole(family: str) -> None:
    model = pico_model(family)
    before, cache = tensors(model), model.config.use_cache
    facts = train(model, learning_rate=1e-3, max_steps=8, held_out=EXAMPLES)
    assert facts.eval_loss_after < facts.eval_loss_before
    assert facts.trainable_parameters == sum(p.numel() for p in model.parameters())
    still = {name for name, tensor in tensors(model).items() if torch.equal(tensor, before[name])}
    assert still <= {name for name in before if name.endswith("k_proj.bias")}  # softmax does not see a key's bias
    assert model.config.use_cache is cache


def test_an_encoder_decoder_trains() -> None:
    examples = tokenize_seq2seq(normalise(ROWS), TOKENIZER, 64)[0]
    model = add_lora(pico_model("t5"), r=4)
    facts = train(model, examples=examples, max_steps=12, held_out=examples)
    assert facts.eval_loss_after < 0.9 * facts.eval_loss_before


def test_bfloat16_autocast_ends_with_the_training() -> None:
    model = adapted()
    facts = train(model, bf16=True, held_out=EXAMPLES, max_steps=8)
    assert facts.eval_loss_after < facts.eval_loss_before
    seen: list[torch.dtype] = []
    handle = model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    heldout_loss(model, EXAMPLES[:1], COLLATOR, 1)
    handle.remove()
    assert seen == [torch.float32]


def test_nothing_to_train_is_said() -> None:
    model = pico_model("llama").requires_grad_(False)
    with pytest.raises(RecipeError, match=r"nothing in the model is trainable(.|\n)*lora step"):
        train(model)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_held_out_loss_is_a_mean_over_tokens(batch_size: int) -> None:
    model = pico_model("llama").train()
    state = torch.get_rng_state()
    total, count = 0.0, 0
    for example in EXAMPLES:
        scores = model(torch.tensor([example.input_ids])).logits[0, :-1].double().log_softmax(-1)
        for position, label in enumerate(example.labels[1:]):
            if label != -100:
                total, count = total - scores[position, label].item(), count + 1
    assert heldout_loss(model, EXAMPLES, COLLATOR, batch_size) == pytest.approx(total / count, rel=1e-5)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_counted_tokens_leave_padding_out() -> None:
    short, long = Example([5, 6, 7], [-100, 6, 7]), Example([5, 6, 7, 8, 9], [-100, 6, 7, 8, 9])
    assert train(adapted(), examples=[short, long], max_steps=3).tokens == 3 * (3 + 5)


def test_weights_that_are_not_finite_are_named_and_no_learning_rate_is_blamed() -> None:
    model = pico_model("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[3, 4] = torch.inf
    with pytest.raises(FormatError, match="a weight is not finite") as caught:
        train(add_lora(model, r=2))
    assert "lm_head.weight" in caught.value.facts["where"]
