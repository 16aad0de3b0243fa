"""The prune step in whole recipes: at once, along training, killed and resumed, and loaded by stock transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import kl_div

import slimtune
from pico import logits, pico_inputs, pico_model, pico_tokenizer, save_pico
from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError
from slimtune.export.base import stock_config
from slimtune.export.load import load
from slimtune.lora.attach import add_lora, base_of
from slimtune.prune.options import PruneOptions
from slimtune.prune.refit import fitted
from slimtune.prune.weights import base_layer
from slimtune.recipe.plan import plan
from slimtune.recipe.pruning import pending, read_record
from slimtune.recipe.run import run
from slimtune.recipe.schema import Recipe, recipe_from
from slimtune.recipe.shell import open_model
from slimtune.train.checkpoint import CheckpointingTrainer, decode, encode
from slimtune.train.data import Collator, Example
from slimtune.train.distill import distilled_loss, head_divergence, top_divergence, unpruned
from slimtune.train.loop import finetune
from slimtune.train.options import TrainOptions
from slimtune.train.pruning import Ramp
from slimtune.train.teacher import Teacher, top, visited, write_teacher

WINDOWS = torch.randint(6, 262, (4, 24), generator=torch.Generator().manual_seed(1))
ROWS = [{"prompt": f"What is {i}?", "completion": f"{i} is {'odd' if i % 2 else 'even'}."} for i in range(40)]
TRAIN = {"max_steps": 12, "max_length": 48, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
RAMP = {"ratio": 0.4, "schedule": "cubic", "every": 2, "cooldown": 0.4, "importance": "gate", "multiple_of": 2}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {"train": {"path": str(path)}, "calibration": {"path": str(path), "samples": 3, "length": 32}}


def recipe(model: Path, data: dict[str, Any], *steps: Any) -> Recipe:
    return recipe_from({"model": str(model), "data": data, "steps": list(steps)})


class Killed(BaseException):
    """What nothing catches."""


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "slimtune" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = torch.tensor([[7, 9, 30, 200, 31, 8]])
torch.save({"logits": model(tokens).logits.detach(), "type": model.config.model_type}, sys.argv[2])
"""


def stock_logits(folder: Path, scratch: Path) -> tuple[Tensor, str]:
    """What transformers computes in a process that never heard of slimtune."""
    command = [sys.executable, "-W", "error", "-c", STOCK, str(folder), str(scratch)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    facts = torch.load(scratch, weights_only=True)
    return facts["logits"], facts["type"]


@pytest.mark.parametrize(("heads", "ratio", "kept", "wanted"), [(8, 0.2, 6, "mistral"), (4, 0.3, 2, "llama")])
def test_a_pruned_model_loads_in_stock_transformers(
    heads: int, ratio: float, kept: int, wanted: str, data: Any, tmp_path: Path
) -> None:
    model = save_pico(tmp_path / "pico", "llama-tied", num_attention_heads=heads, num_key_value_heads=heads)
    step = {"prune": {"ratio": ratio, "importance": "magnitude", "targets": ["kv"]}}
    report = run(recipe(model, data, step), tmp_path / "run")
    facts = report["steps"][0]["facts"]
    mine = load(str(tmp_path / "run" / "model")).model
    assert {axis["kept"] for axis in facts["axes"]} == {kept}
    got, kind = stock_logits(tmp_path / "run" / "model", tmp_path / "logits.pt")
    assert kind == wanted
    pruned: Any = slimtune.prune(load(str(model)).model, **step["prune"])  # in memory: never written, still a Llama
    assert pruned.config.model_type == "llama"
    torch.testing.assert_close(got, logits(pruned, {"input_ids": torch.tensor([[7, 9, 30, 200, 31, 8]])}))
    assert sum(p.numel() for p in mine.parameters()) == facts["parameters_after"]
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert sum(t.numel() for t in saved.values()) == facts["parameters_after"]


def test_the_record_says_what_was_kept_of_what(data: Any, tmp_path: Path) -> None:
    model = save_pico(tmp_path / "pico", "llama")
    steps = [{"prune": {"ratio": 0.2, "importance": "wanda", "targets": "ffn", "refit": True}},
             {"prune": {"ratio": 0.2, "importance": "random", "targets": "ffn", "multiple_of": 2}}]  # fmt: skip
    report = run(recipe(model, data, *steps), tmp_path / "run")
    record = read_record(tmp_path / "run" / "model")
    assert record is not None
    assert record["base_parameters"] == report["steps"][0]["facts"]["parameters_before"]
    assert record["parameters"] == report["model"]["parameters"] == report["steps"][1]["facts"]["parameters_after"]
    first, second = record["prunings"]
    assert [axis["units"] for axis in first["axes"]] == [40, 40]
    assert [axis["units"] for axis in second["axes"]] == [len(axis["kept"]) for axis in first["axes"]]
    last = {"prune": {"ratio": 0.1, "importance": "magnitude", "targets": "ffn", "multiple_of": 2}}
    again = run(recipe(tmp_path / "run" / "model", data, last), tmp_path / "again")
    third = read_record(tmp_path / "again" / "model")
    assert third is not None and len(third["prunings"]) == 3 and third["base"] == record["base"]
    assert again["model"]["parameters"] == third["parameters"]
    (tmp_path / "run" / "model" / "pruning.json").write_text("{}")
    with pytest.raises(FormatError, match="damaged"):
        read_record(tmp_path / "run" / "model")


def test_pruned_weights_are_those_of_the_base_that_the_record_names(data: Any, tmp_path: Path) -> None:
    model = save_pico(tmp_path / "pico", "llama")
    run(recipe(model, data, {"prune": {"ratio": 0.3, "importance": "gate-fisher"}}), tmp_path / "run")
    before, after = (load_file(f / "model.safetensors") for f in (model, tmp_path / "run" / "model"))
    record = read_record(tmp_path / "run" / "model")
    assert record is not None
    for axis in record["prunings"][0]["axes"]:
        size = before[f"{axis['name']}.weight"].shape[1] // axis["units"]
        columns = [u * size + i for u in axis["kept"] for i in range(size)]
        assert torch.equal(after[f"{axis['name']}.weight"], before[f"{axis['name']}.weight"][:, columns])


@pytest.mark.parametrize("distill", [False, True])
def test_a_ramp_prunes_along_training_and_the_result_is_what_was_trained(
    distill: bool, data: Any, tmp_path: Path
) -> None:
    model = save_pico(tmp_path / "pico", "llama", num_attention_heads=8, num_key_value_heads=4)
    steps = [{"lora": {"r": 4}}, {"prune": RAMP}, {"train": {**TRAIN, "distill": distill}}, "merge"]
    report = run(recipe(model, {**data, "eval": data["train"]}, *steps), tmp_path / "run")
    facts = report["steps"][2]["facts"]["prune"]
    assert facts["losses"].keys() == {"0", *facts["history"]} and len(set(facts["losses"].values())) > 3
    for name, grows in (("bytes", False), ("cache_bytes_per_token", False), ("decode_tokens_per_second", None)):
        before, after = (facts["cost"][when][name] for when in ("before", "after"))
        assert before > 0 < after and (grows is None or after < before)
    assert facts["removed_ratio"] == pytest.approx(0.4, abs=0.03)
    shares = list(facts["history"].values())
    assert shares == sorted(shares) and shares[0] < shares[-1] == facts["removed_ratio"] and len(shares) > 2
    assert report["model"]["parameters"] == facts["parameters_after"]
    assert not (tmp_path / "run" / "adapter").exists()
    assert read_record(tmp_path / "run" / "model") is not None


@pytest.mark.parametrize(  # with gates half closed, after the cut, and where the cut comes last
    ("killed_in", "changes"),
    [
        (5, {"importance": "random"}),
        (10, {}),
        (10, {"importance": "lora"}),
        (12, {"distill": True}),
        (10, {"distill": True, "distill_top_k": 5}),
        (10, {"refit": True}),
        (8, {"refit": True, "distill": True}),
        (10, {"init": "lora-ga", "optim": "lora-rite"}),
    ],
)
def test_resumed_across_a_surgery_is_uninterrupted_bit_for_bit(
    killed_in: int, changes: dict[str, Any], data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = dict(changes)
    learnt = {key: changes.pop(key) for key in ("distill", "distill_top_k", "optim") if key in changes}
    lora = {"r": 3, "init": changes.pop("init", "default")}
    model = save_pico(tmp_path / "pico", "llama", num_attention_heads=8, num_key_value_heads=4)
    train = {**TRAIN, **learnt}
    made = recipe(model, data, {"lora": lora}, {"prune": {**RAMP, **changes}}, {"train": train})
    run(made, tmp_path / "whole")
    kill = CheckpointingTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == killed_in:
            raise Killed
        return kill(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointingTrainer, "training_step", dying)
        with pytest.raises(Killed):
            run(made, tmp_path / "cut")
    run(made, tmp_path / "cut", resume=True)
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (load_file(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    records = [(tmp_path / folder / "model" / "pruning.json").read_text() for folder in ("whole", "cut")]
    assert records[0] == records[1]


def test_a_run_goes_on_after_pruning(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned to a width Llama's configuration refuses, with an adapter on it: killed in the step after, and resumed."""
    model = save_pico(tmp_path / "pico", "llama", num_attention_heads=8, num_key_value_heads=8)
    prune = {"prune": {"ratio": 0.2, "importance": "magnitude", "targets": "kv"}}
    steps = [{"lora": {"r": 2}}, {"train": TRAIN}, prune, {"train": {**TRAIN, "max_steps": 2}}, "merge"]
    made = recipe(model, data, *steps)
    run(made, tmp_path / "whole")
    from slimtune.recipe import steps as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "merge", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(made, tmp_path / "cut")
    run(made, tmp_path / "cut", resume=True)
    a, b = (load_file(tmp_path / folder / "model" / "model.safetensors") for folder in ("whole", "cut"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key])
    config = json.loads((tmp_path / "cut" / "model" / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"], config["head_dim"]) == ("mistral", 6, 12)
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_the_teacher_is_the_model_without_gates_and_adapters(family: str) -> None:
    """Gemma 2 caps its logits; in T5 a label is predicted where it stands."""
    two_sided = family == "t5"
    inputs = {"input_ids": WINDOWS, "labels": WINDOWS}
    asked = inputs if two_sided else {"input_ids": WINDOWS}
    plain = pico_model(family)
    wanted = plain(**asked).logits.detach()
    model = add_lora(pico_model(family), r=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ramp = Ramp(model, PruneOptions(**{**RAMP, "targets": ("ffn",)}))
    for axis in ramp.probe.axes:
        ramp.probe.keep(axis, range(8))
    base: Any = base_of(model)
    hidden = unpruned(model, ramp, inputs)
    torch.testing.assert_close(base.get_output_embeddings()(hidden) if family == "llama" else hidden, wanted)
    student = model(**asked).logits
    assert (student - wanted).abs().max() > 1e-2
    labels = WINDOWS.clone()
    labels[:, :5] = -100
    inputs["labels"] = labels
    if two_sided:  # what its decoder reads are the labels
        hidden = unpruned(model, ramp, inputs)
        wanted, student = plain(**inputs).logits.detach(), model(**inputs).logits
    loss = distilled_loss(model, base, hidden, inputs)
    rows = slice(5, None) if two_sided else slice(4, -1)
    p, q = (x[:, rows].log_softmax(-1).flatten(0, 1) for x in (wanted, student))
    oracle = kl_div(q, p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, oracle)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    wanted_grads = torch.autograd.grad(oracle, trained)
    for got, expected in zip(torch.autograd.grad(loss, trained), wanted_grads, strict=True):
        assert (got - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_what_the_teacher_said_stands_for_it(family: str, tmp_path: Path) -> None:
    """Rows in any order, of different lengths: the kept predictions are those of the tokens they are asked for."""
    model = add_lora(pico_model(family), r=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ramp = Ramp(model, PruneOptions(**{**RAMP, "targets": ("ffn",)}))
    rows = [list(range(7, 9 + n)) for n in (5, 9, 3, 12)]
    examples = [Example(ids, [-100, -100, *ids[2:]]) for ids in rows]
    ask: Any = partial(unpruned, model, ramp)
    write_teacher(tmp_path / "teacher", model, ask, examples, Collator(0), 262, 3)
    asked = [3, 0, 2]
    batch = Collator(0)([examples[row] for row in asked])
    base = base_of(model)
    said = Teacher(tmp_path / "teacher", base, examples, 262).of(asked, torch.device("cpu"))
    wanted = distilled_loss(model, base, unpruned(model, ramp, batch), batch)
    got = distilled_loss(model, base, said, batch)
    torch.testing.assert_close(got, wanted)
    write_teacher(tmp_path / "few", model, ask, examples, Collator(0), 7, 2)
    kept = Teacher(tmp_path / "few", base, examples, 7)
    fewer = distilled_loss(model, base, kept.of(asked, torch.device("cpu")), batch)
    assert 0 < fewer.item() < wanted.item()
    with pytest.raises(FormatError, match="of other data"):
        Teacher(tmp_path / "few", base, examples[:2], 7)
    (tmp_path / "few").write_bytes(b"no")
    with pytest.raises(FormatError, match="damaged"):
        Teacher(tmp_path / "few", base, examples, 7)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_divergence_from_the_likeliest_is_that_of_the_coarser_distributions(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    student, hidden, head = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (300, 300, 20))
    bias = torch.randn(20, generator=generator, dtype=torch.float64)
    student.requires_grad_(True)
    got = top_divergence(student, top(hidden, head, bias, k), head, bias)
    p, q = ((h @ head.T + bias).softmax(-1) for h in (hidden, student))
    order = p.argsort(descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    if k < 20:
        p, q = (torch.cat([x[:, :k], x[:, k:].sum(1, keepdim=True)], 1) for x in (p, q))
    oracle = (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(got, oracle)
    wanted = torch.autograd.grad(oracle, student)[0]
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], wanted)
    if k == 20:
        whole = head_divergence(student, hidden, head, bias)
        torch.testing.assert_close(got, whole)


def test_only_what_training_looks_at_is_asked_about() -> None:
    examples = [Example([i, i], [i, i]) for i in range(20)]
    few = visited(examples, TrainOptions(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2), 1)
    assert len(few) == 12 == len({example.input_ids[0] for example in few})
    assert visited(examples, TrainOptions(max_steps=30), 1) is visited(examples, TrainOptions(), 1) is examples


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("family", ["gemma2", "t5"])
def test_who_does_more_than_a_head_learns_from_itself_too(family: str, top_k: int) -> None:
    """At first there is nothing to learn: no gate is closed, and the adapter is zero."""
    model = add_lora(pico_model(family), r=2)
    rows = [list(range(7, 9 + n)) for n in (5, 9, 3, 12, 8, 6)]
    examples = [Example(ids, [-100, -100, *ids[2:]]) for ids in rows]
    options = TrainOptions(max_steps=6, distill=True, distill_top_k=top_k, learning_rate=1e-3)
    ramp = PruneOptions(**{**RAMP, "ratio": 0.1, "targets": ("ffn",)})
    before = sum(parameter.numel() for parameter in base_of(model).parameters())
    facts = finetune(model, examples, Collator(0), options, prune=ramp)
    assert facts.first_loss == pytest.approx(0, abs=1e-5) and facts.last_loss is not None
    assert 0 < facts.last_loss < 1 and facts.prune is not None
    assert sum(parameter.numel() for parameter in base_of(model).parameters()) < before


@pytest.mark.parametrize("name", ["llama", "llama-biased", "phi3"])
def test_a_ramp_fits_what_it_keeps_from_the_weights_of_the_beginning(name: str) -> None:
    model = add_lora(pico_model(name), r=2)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = {"input_ids": WINDOWS, "labels": WINDOWS}
    options = PruneOptions(**{**RAMP, "importance": "wanda", "refit": True, "targets": ("ffn",)})
    ramp = Ramp(model, options, windows=WINDOWS)
    teacher = unpruned(model, ramp, inputs)
    reader: Any = base_layer(base_of(model).get_submodule(next(iter(ramp.probe.axes))))
    before = reader.weight.detach().clone()
    seen: list[Tensor] = []
    handle = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(**inputs)
    handle.remove()
    ramp.on_pre_optimizer_step(*[None] * 3)  # type: ignore[arg-type]
    whole = [logits(model, {"input_ids": WINDOWS})]
    ramp._choose(0.1, final=False)
    ramp._choose(0.3, final=False)
    kept = torch.tensor(ramp.kept[next(iter(ramp.probe.axes))])
    x = seen[0].flatten(0, -2).double()
    if reader.bias is not None:
        x = x - x.mean(0)
    wanted = fitted(before, x.T @ x / len(x), kept)
    torch.testing.assert_close(
        reader.weight[:, kept].double(), wanted, rtol=2e-2, atol=8e-3
    )  # bfloat16 products, where there are units
    assert (wanted - before[:, kept]).abs().max() > 5e-2
    gone = [u for u in range(before.shape[1]) if u not in set(kept.tolist())]
    assert gone and torch.equal(reader.weight[:, gone], before[:, gone])
    torch.testing.assert_close(unpruned(model, ramp, inputs), teacher)
    with_fit = logits(model, {"input_ids": WINDOWS})
    with ramp.unpruned():
        torch.testing.assert_close(logits(model, {"input_ids": WINDOWS}), whole[0])
    ramp._put(ramp._first)
    without = logits(model, {"input_ids": WINDOWS})
    assert (with_fit - whole[0]).square().mean() < 0.9 * (without - whole[0]).square().mean()


def test_a_ramp_that_goes_on_keeps_the_times_it_measured() -> None:
    options = PruneOptions(**{**RAMP, "per": "microsecond"})
    first, second = (Ramp(add_lora(pico_model("llama"), r=2), options) for _ in range(2))
    assert first.times and first.times.keys() == {"kv", "ffn"}
    first.times["ffn"][0] = (1, 123.0)
    state = decode(json.loads(json.dumps(encode(first.state(), held := {}, ""))), held)
    second.restore_(state)
    assert second.times == first.times


def test_units_behind_a_closed_gate_can_come_back() -> None:
    model = add_lora(pico_model("llama"), r=2)
    ramp = Ramp(model, PruneOptions(**{**RAMP, "targets": ("ffn",)}))
    name = next(iter(ramp.probe.axes))
    ramp.probe.keep(name, range(20))
    out = model(input_ids=WINDOWS, labels=WINDOWS)
    out.loss.backward()
    scores = ramp.probe.take()[name]
    assert float(scores[20:].min()) > 0


def test_python_prunes_like_a_recipe() -> None:
    model, facts = pico_model("qwen2"), []
    before = logits(model, pico_inputs(model))
    same = slimtune.prune(
        model, ratio=0.25, importance="wanda", calibration=WINDOWS, multiple_of=4, refit=True, facts=facts.append
    )
    assert same is model and facts[0]["removed_ratio"] == pytest.approx(0.25, abs=0.05)
    assert bind(model) and not torch.equal(logits(model, pico_inputs(model)), before)
    with pytest.raises(RecipeError, match="acts along training"):
        slimtune.prune(model, ratio=0.2, schedule="cubic")
    with pytest.raises(RecipeError, match="importance"):
        slimtune.prune(model, ratio=0.2, importance="wonda")


def test_python_prunes_along_training_like_a_recipe(data: Any, tmp_path: Path) -> None:
    ramp = {**RAMP, "importance": "lora", "refit": True}
    train = {**TRAIN, "max_steps": 4, "distill": True}
    model = save_pico(tmp_path / "pico", "llama")
    report = run(recipe(model, data, {"lora": {"r": 2}}, {"prune": ramp}, {"train": train}), tmp_path / "run")
    mine = slimtune.add_lora(load(str(model)).model, r=2)
    found: list[Any] = []
    source = slimtune.DataSource(**data["train"])
    calibration = slimtune.DataSource(**data["calibration"])
    options: Any = {"prune": ramp, "calibration": calibration, "facts": found.append, **train}
    assert slimtune.finetune(mine, pico_tokenizer(), source, **options) is mine
    record: Any = read_record(tmp_path / "run" / "model")
    assert {axis["name"]: axis["kept"] for axis in record["prunings"][0]["axes"]} == found[0].prune["kept"]
    assert found[0].last_loss == report["steps"][2]["facts"]["last_loss"]
    assert found[0].prune["cost"]["after"]["bytes"] == report["steps"][2]["facts"]["prune"]["cost"]["after"]["bytes"]
    theirs = open_model(str(tmp_path / "run"))[1]
    assert torch.equal(logits(mine, pico_inputs(base_of(mine))), logits(theirs, pico_inputs(base_of(mine))))
    with pytest.raises(RecipeError, match="fits the pruned model alone"):
        slimtune.export(mine, pico_tokenizer(), "peft", tmp_path / "out")


def test_python_refuses_a_ramp_that_a_recipe_refuses(data: Any) -> None:
    wrapped, source = slimtune.add_lora(pico_model(), r=2), data["train"]["path"]
    for model, ramp, what in (
        (wrapped, {"ratio": 0.2}, "pruning at once needs no training"),
        (wrapped, {**RAMP, "importance": "loss-change"}, "which a ramp cannot do at every step"),
        (wrapped, {**RAMP, "ratio": 0.99}, "this much cannot be pruned"),
        (pico_model(), RAMP, "along the training of an adapter"),
    ):
        with pytest.raises(RecipeError, match=what):
            slimtune.finetune(model, pico_tokenizer(), source, prune=ramp, **TRAIN)


def test_allocated_widths_are_padded_and_the_record_says_so(data: Any, tmp_path: Path) -> None:
    model = save_pico(tmp_path / "pico", "llama")
    step = {
        "prune": {"ratio": 0.2, "importance": "gate-fisher", "widths": "allocated", "targets": "ffn", "multiple_of": 1}
    }
    report = run(recipe(model, data, step), tmp_path / "run")
    facts = report["steps"][0]["facts"]
    assert facts["padded"] and len({axis["real"] for axis in facts["axes"]}) == 2
    assert len({axis["kept"] for axis in facts["axes"]}) == 1
    record = read_record(tmp_path / "run" / "model")
    assert record is not None and record["prunings"][0]["padded"]
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for axis in facts["axes"]:
        silent = (saved[f"{axis['name']}.weight"] == 0).all(0)
        assert int(silent.sum()) == axis["kept"] - axis["real"]


@pytest.mark.parametrize(
    ("steps", "where", "what"),
    [
        (({"prune": {"ratio": 0.97}},), "steps[0].prune, ratio", "cannot be pruned"),
        (({"prune": {"ratio": 0.001}},), "steps[0].prune, ratio", "nothing would be pruned"),
        (({"prune": {"importance": "wonda"}},), "steps[0].prune.importance", "unknown importance"),
        (({"prune": {"importance": "lora"}},), "steps[0].prune", "adapter's gradients"),
        (({"prune": {"importance": "influence"}},), "steps[0].prune.targets", "only whole layers"),
        (("lora", {"prune": {**RAMP, "importance": "loss-change"}}, "train"), "steps[1].prune.importance", "a ramp"),
        (({"prune": RAMP}, "train"), "steps[0].prune", "along the training of an adapter"),
        (("lora", {"prune": RAMP}), "steps[1].prune", "no training to prune along"),
        (("lora", {"prune": RAMP}, "merge", "train"), "steps[2].merge", "pruned by the next train step"),
        (("lora", {"prune": {"refit": True}}), "steps[1].prune", "cannot be fitted"),
        (({"quantize": {"method": "rtn", "group_size": 8}}, {"prune": {"refit": True}}), "steps[1].prune", "fitted"),
        (
            ({"quantize": {"method": "rtn", "group_size": 8}}, "lora", {"prune": {**RAMP, "refit": True}}, "train"),
            "steps[2].prune",
            "packed weights cannot be fitted",
        ),
        (
            ({"quantize": {"method": "rtn", "group_size": 8}}, {"prune": {"widths": "allocated"}}),
            "steps[1].prune",
            "padded with zeros",
        ),
        (("lora", {"train": {"distill": True}}), "steps[1].train", "no unpruned model"),
        (
            ({"quantize": {"method": "rtn"}}, "lora", {"prune": RAMP}, {"train": {"scales": True}}),
            "steps[3].train",
            "lose the scales",
        ),
        (
            ("lora", {"prune": RAMP}, {"train": {"distill": True, "distill_top_k": 300}}),
            "steps[2].train.distill_top_k",
            "fewer logits",
        ),
        (("lora", {"prune": RAMP}, "train", {"export": {"format": "peft"}}), "steps[3].export", "pruned model alone"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    steps: Any, where: str, what: str, data: Any, tmp_path: Path
) -> None:
    model = save_pico(tmp_path / "pico", "llama")
    with pytest.raises(RecipeError, match=what) as caught:
        plan(recipe(model, data, *steps))
    assert caught.value.facts["where"] == where


def test_whole_layers_go_after_quantizing_and_the_run_goes_on(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_pico(tmp_path / "pico", "llama", num_hidden_layers=4)
    prune = {"prune": {"ratio": 0.5, "importance": "influence", "targets": "layers"}}
    made = recipe(model, data, {"quantize": {"method": "rtn", "group_size": 8}}, prune, "lora", {"train": TRAIN})
    report = run(made, tmp_path / "whole")
    assert report["steps"][1]["facts"]["removed_ratio"] == 0.5 and not report["steps"][1]["facts"]["requantized"]
    record = read_record(tmp_path / "whole" / "model")
    assert record is not None
    [axis] = record["prunings"][0]["axes"]
    assert (axis["name"], axis["kind"], axis["units"], len(axis["kept"])) == ("model.layers", "layers", 4, 2)
    from slimtune.recipe import training as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "finetune", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(made, tmp_path / "cut")
    run(made, tmp_path / "cut", resume=True)
    a, b = (load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors") for folder in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("schedule", ["one-shot", "cubic"])
def test_sub_layers_that_go_are_zeros_in_an_ordinary_model(schedule: str, data: Any, tmp_path: Path) -> None:
    model = save_pico(tmp_path / "pico", "qwen2")
    prune = {**RAMP, "targets": "sublayers", "widths": "allocated", "schedule": schedule, "ratio": 0.3}
    report = run(recipe(model, data, "lora", {"prune": prune}, {"train": TRAIN}, "merge"), tmp_path / "run")
    facts = report["steps"][1 if schedule == "one-shot" else 2]["facts"]
    facts = facts.get("prune") or facts
    assert facts["padded"] and {axis["kept"] == axis["units"] for axis in facts["axes"]} == {True}
    gone = [axis["name"] for axis in facts["axes"] if axis["real"] == 0]
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert gone and all(float(saved[f"{name}.weight"].abs().max()) == 0 for name in gone)


def test_a_model_without_prunable_heads_says_what_it_can_lose(data: Any, tmp_path: Path) -> None:
    model = save_pico(tmp_path / "pico", "opt")
    with pytest.raises(RecipeError, match="no prunable groups") as caught:
        plan(recipe(model, data, "prune"))
    assert caught.value.facts["wanted"] == "opt can lose: ffn, layers"


def test_the_plan_knows_the_smaller_model(data: Any, tmp_path: Path) -> None:
    model = save_pico(tmp_path / "pico", "llama")
    speed = {"evaluate": {"speed": True}}
    made = plan(recipe(model, data, speed, {"prune": {"ratio": 0.5}}, speed))
    assert made.steps[2].memory_bytes < made.steps[0].memory_bytes
    assert made.steps[1].flops > 0
    ramped = plan(recipe(model, data, "lora", speed, {"prune": RAMP}, "train", speed))
    assert ramped.steps[4].memory_bytes < ramped.steps[1].memory_bytes


def test_the_pending_ramp_is_that_of_the_next_train_step() -> None:
    steps = recipe_from({"model": "m", "steps": ["lora", {"prune": RAMP}, "train", "train", {"prune": {}}]}).steps
    assert pending(steps, 2) is steps[1] and pending(steps, 3) is None and pending(steps, 5) is None


def test_a_configuration_transformers_takes_is_left_alone() -> None:
    config = pico_model("llama").config
    assert stock_config(config) is config
    config.num_attention_heads = config.num_key_value_heads = 3
    made = stock_config(config)
    assert (made.model_type, made.num_attention_heads, made.head_dim, made.hidden_size) == ("mistral", 3, 12, 32)
    gemma = pico_model("gemma2").config
    gemma.num_attention_heads = 3
    with pytest.raises(FormatError, match="refuses this number of heads"):
        stock_config(gemma)


def test_the_tokenizer_goes_along(data: Any, tmp_path: Path) -> None:
    model = save_pico(tmp_path / "pico", "llama")
    run(recipe(model, data, {"prune": {"ratio": 0.3, "importance": "flap"}}), tmp_path / "run")
    assert load(str(tmp_path / "run" / "model")).tokenizer("x").input_ids == pico_tokenizer()("x").input_ids
