"""Plans: pure, complete, and refusing by name what cannot work."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pico import pico_config, save_pico
from slimtune import load, quantize
from slimtune.arch.weights import Checkpoint
from slimtune.errors import BackendMissing, CalibrationError, FormatError, RecipeError, UnknownArchitecture
from slimtune.export.native import write_model
from slimtune.recipe.plan import Plan, plan
from slimtune.recipe.schema import Quantize, recipe_from
from slimtune.recipe.terminal import plan_text
from slimtune.train import optimizers

PYDOCS = {"builtin": "pydocs"}
QUANTIZE = {"quantize": {"bits": 4, "group_size": 8}}
SPEED = {"evaluate": {"speed": True}}


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with nothing to load: the configuration alone."""
    folder = tmp_path_factory.mktemp("llama")
    pico_config("llama").save_pretrained(folder)
    return folder


def planned(model: Path | str, *steps: Any, memory: int | None = None, **top: Any) -> Plan:
    facts = {"model": str(model), "data": {"train": PYDOCS}, "steps": list(steps), **top}
    return plan(recipe_from(facts), memory=memory)


def test_a_plan_needs_the_configuration_alone(config_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a plan loads no weights")

    monkeypatch.setattr(Checkpoint, "__init__", loaded)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    state = torch.get_rng_state()
    before = sorted(config_only.iterdir())
    made = planned(config_only, SPEED, QUANTIZE, "lora", "train", "merge", {"export": {"format": "safetensors"}})
    assert [step.step for step in made.steps] == ["evaluate", "quantize", "lora", "train", "merge", "export"]
    assert all(step.memory_bytes > 0 for step in made.steps)
    assert made.memory_bytes == max(step.memory_bytes for step in made.steps)
    assert made.parameters > 10_000
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(config_only.iterdir()) == before


def test_the_resolved_recipe_has_every_field_of_the_method(config_only: Path) -> None:
    made = planned(config_only, QUANTIZE)
    assert made.to_dict()["recipe"]["steps"] == [
        {
            "quantize": {
                "method": "optq", "bits": 4, "group_size": 8, "sym": False, "grid": "mse", "desc_act": True,
                "damp_percent": 0.01, "refine": None, "gptaq": 0.0, "ignore": [],
            }
        }
    ]  # fmt: skip
    json.dumps(made.to_dict(), allow_nan=False)
    assert plan(made.recipe).recipe == made.recipe


@pytest.mark.parametrize(
    ("step", "where", "said"),
    [
        ({"quantize": {"method": "optk"}}, "steps[0].quantize.method", "did you mean 'optq'"),
        ({"quantize": {"bit": 4}}, "steps[0].quantize", "did you mean 'bits'"),
        ({"quantize": {"options": {"bits": 4}}}, "steps[0].quantize", "unknown key"),
        ({"quantize": {"bits": 7}}, "steps[0].quantize, bits", "bits out of range"),
        ({"quantize": {"bits": True}}, "steps[0].quantize.bits", "integer"),
        ({"quantize": {"group_size": 0}}, "steps[0].quantize, group_size", "group_size out of range"),
        ({"quantize": {"group_size": 28}}, "steps[0].quantize.group_size", "divides no layer's width"),
        ({"quantize": {"grid": "mes"}}, "steps[0].quantize.grid", "'mse' or 'minmax'"),
        ({"quantize": {"ignore": ["*"], "group_size": 8}}, "steps[0].quantize.ignore", "nothing left to quantize"),
        ({"quantize": {"ignore": ["down_prj"]}}, "steps[0].quantize.ignore", "did you mean 'down_proj'"),
        ({"quantize": {"ignore": "*.9.*"}}, "steps[0].quantize.ignore", "got:    *.9.*"),
        ({"export": {"format": "pefd"}}, "steps[0].export", "did you mean 'peft'"),
        (
            {"evaluate": {"perplexity": {"p": PYDOCS}, "length": 257}},
            "steps[0].evaluate.length",
            "more tokens than the model has positions",
        ),
        ({"lora": {"target_modules": ["q_prj"]}}, "target_modules", "did you mean 'q_proj'"),
        ({"lora": {"target_modules": "no_such.*"}}, "", "matches no linear"),
    ],
)
def test_a_step_that_cannot_work_is_refused_by_name(
    config_only: Path, step: dict[str, Any], where: str, said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(config_only, step)
    assert said in str(caught.value)
    assert caught.value.facts["where"].endswith(where)


@pytest.mark.parametrize(
    ("step", "error", "parts"),
    [
        ({"train": {"report_to": "tensorbord"}}, RecipeError, ["unknown tracker", "report_to", "'tensorboard'"]),
        ({"train": {"report_to": "absent"}}, BackendMissing, ["not installed", "report_to", "no absent", "none"]),
        ({"train": {"optim": "galore_adamw"}}, BackendMissing, ["optimizer is not installed", "optim", "galore_torch"]),
        ({"train": {"optim": "lora-pus"}}, RecipeError, ["unknown optimizer", "optim", "did you mean 'lora-plus'"]),
        ({"evaluate": {"tasks": ["arc_easy"]}}, BackendMissing, ["lm-eval", "tasks", "slimtune[eval]"]),
    ],
)
def test_what_is_unknown_or_not_installed_is_said_before_anything_runs(
    config_only: Path, monkeypatch: pytest.MonkeyPatch, step: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    def absent() -> None:
        raise RuntimeError("there is no absent")

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(optimizers.INTEGRATION_TO_CALLBACK, "absent", absent)
    with pytest.raises(error) as caught:
        planned(config_only, "lora", step)
    for part in (*parts, "steps[1]."):
        assert part in str(caught.value)


def test_a_group_size_is_refused_only_where_it_divides_nothing(config_only: Path) -> None:
    planned(config_only, {"quantize": {"group_size": 40}})  # the widest rows of this model
    planned(config_only, {"quantize": {"group_size": -1}})


def test_what_is_left_alone_in_any_case_may_be_ignored(config_only: Path) -> None:
    planned(config_only, {"quantize": {"ignore": ["lm_head", "embed_tokens", "*.0.*"], "group_size": 8}})


@pytest.mark.parametrize(("method", "key"), [("rtn", "group_size"), ("optq", "group_size"), ("nf4", "block_size")])
@pytest.mark.parametrize("width", [49, 10**12])
def test_a_group_wider_than_every_row_is_the_row_and_is_told(
    config_only: Path, method: str, key: str, width: int
) -> None:
    made = planned(config_only, {"quantize": {"method": method, key: width}}, {"export": {"format": "safetensors"}})
    assert cast(Quantize, made.recipe.steps[0]).options[key] == -1
    assert [warning for warning in made.warnings if f"steps[0].quantize.{key}" in warning and f"{width:,}" in warning]
    row = planned(config_only, {"quantize": {"method": method, key: -1}}, {"export": {"format": "safetensors"}})
    assert (row.recipe, row.warnings) == (made.recipe, ())
    planned(config_only, {"quantize": {"method": method, "layers": {"q_proj": {key: width}}, key: 8}})


@pytest.mark.parametrize(("method", "fault"), [("nf4", "'codebook'"), ("quip", "'e8p'"), ("hqq", "not whole numbers")])
def test_what_compressed_tensors_cannot_hold_is_said_before_anything_runs(
    config_only: Path, method: str, fault: str
) -> None:
    step = {"quantize": {"method": method}}
    planned(config_only, step, {"export": {"format": "safetensors"}})
    with pytest.raises(RecipeError, match=rf"cannot hold what this method makes(.|\n)*{method}: (.|\n)*{fault}"):
        planned(config_only, step, {"export": {"format": "compressed-tensors"}})


def test_calibration_text_is_asked_for_when_a_method_needs_it(config_only: Path) -> None:
    with pytest.raises(RecipeError, match=r"optq needs calibration text(.|\n)*pydocs(.|\n)*rtn"):
        planned(config_only, QUANTIZE, data={})
    planned(config_only, {"quantize": {"method": "rtn", "group_size": 8}}, data={})


@pytest.mark.parametrize("key", ["train", "eval", "calibration"])
def test_a_missing_file_is_found_before_anything_runs(config_only: Path, tmp_path: Path, key: str) -> None:
    (tmp_path / "alpaca.jsonl").touch()
    with pytest.raises(CalibrationError, match=r"did you mean 'alpaca\.jsonl'"):
        planned(config_only, SPEED, data={key: str(tmp_path / "alpacca.jsonl")})


def test_a_missing_text_of_an_evaluation_is_found_too(config_only: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such data file"):
        planned(config_only, {"evaluate": {"perplexity": {"w": str(tmp_path / "wiki.txt.gz")}}})


def test_an_encoder_decoder_is_told_what_does_not_fit_it(tmp_path: Path) -> None:
    pico_config("t5").save_pretrained(tmp_path)
    planned(tmp_path, "lora", "train")
    with pytest.raises(RecipeError, match=r"perplexity is a measure of decoders(.|\n)*steps\[0\]\.evaluate"):
        planned(tmp_path, {"evaluate": {"perplexity": {"p": PYDOCS}, "length": 64}})
    with pytest.raises(RecipeError, match="does not train on packed rows"):
        planned(tmp_path, "lora", {"train": {"packing": True}})


def test_a_quantized_model_is_known_as_one(tmp_path: Path) -> None:
    model, tokenizer = load(str(save_pico(tmp_path / "dense")))
    (tmp_path / "small").mkdir()
    write_model(quantize(model, "rtn", group_size=8), tokenizer, tmp_path / "small")
    planned(tmp_path / "small", {"export": {"format": "compressed-tensors"}}, "lora", "train")
    with pytest.raises(RecipeError, match="quantized already"):
        planned(tmp_path / "small", QUANTIZE)
    with pytest.raises(RecipeError, match="packed weights do not train"):
        planned(tmp_path / "small", "train")


def test_a_folder_without_a_model_and_an_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no config\.json"):
        planned(tmp_path, SPEED)
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 16}')
    with pytest.raises(UnknownArchitecture, match="mamba"):
        planned(tmp_path, SPEED)
    (tmp_path / "config.json").write_text('{"model_type": "perceptron-9000"}')
    with pytest.raises(UnknownArchitecture, match="perceptron-9000"):
        planned(tmp_path, SPEED)


@pytest.mark.parametrize(
    ("step", "data", "knob"),
    [
        ({"train": {"per_device_train_batch_size": 512, "max_length": 4096}}, {}, "gradient_checkpointing"),
        (
            {"train": {"per_device_train_batch_size": 512, "max_length": 4096, "gradient_checkpointing": True}},
            {},
            "per_device_train_batch_size or max_length",
        ),
        (QUANTIZE, {"calibration": {**PYDOCS, "samples": 2**20}}, "data.calibration.samples"),
        ({"evaluate": {"perplexity": {"p": PYDOCS}, "length": 256}}, {}, "lower length"),
        ("merge", {}, "bfloat16"),
    ],
)
def test_too_little_memory_is_a_warning_that_names_the_knob(
    config_only: Path, step: Any, data: dict[str, Any], knob: str
) -> None:
    steps = ["lora", step] if step == "merge" else [step]
    made = planned(config_only, *steps, memory=10**6, data={"train": PYDOCS, **data})
    assert len(made.warnings) == 1
    assert knob in made.warnings[0]
    assert made.available_bytes == 10**6
    assert "warning" in plan_text(made)


def test_enough_memory_is_no_warning(config_only: Path) -> None:
    made = planned(config_only, QUANTIZE, memory=10**15)
    assert made.warnings == ()
    assert "warning" not in plan_text(made)


def test_a_rotation_takes_the_recipes_seed_unless_it_has_its_own(config_only: Path) -> None:
    made = planned(config_only, "rotate", seed=5)
    given = {"kind": "hadamard", "seed": 5, "steps": 100, "online": [], "block_size": 0}
    assert made.to_dict()["recipe"]["steps"] == [{"rotate": {**given, "balance": False, "stream": False}}]
    assert planned(config_only, {"rotate": {"seed": 7}}, seed=5).to_dict()["recipe"]["steps"][0]["rotate"]["seed"] == 7


def test_a_rotation_of_a_tied_model_makes_it_larger(tmp_path: Path) -> None:
    pico_config("llama-tied", vocab_size=1_000_000).save_pretrained(tmp_path)
    made = planned(tmp_path, "lora", "merge", "rotate", "lora")
    assert made.steps[3].memory_bytes - made.steps[0].memory_bytes > 0.9 * 32 * 4 * 1_000_000


def test_a_rotated_model_is_known_as_one(config_only: Path, tmp_path: Path) -> None:
    config = pico_config("llama")
    config.slimtune_rotation = {"sha256": "0", "online": ["r4"]}
    config.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="rotated already"):
        planned(tmp_path, "rotate")
    with pytest.raises(RecipeError, match="no other engine"):
        planned(tmp_path, {"export": {"format": "safetensors"}})


def test_the_estimate_knows_what_costs_memory(config_only: Path) -> None:
    def bytes_of(**train: Any) -> int:
        return planned(config_only, "lora", {"train": {"max_length": 2048, **train}}).steps[-1].memory_bytes

    large = bytes_of(per_device_train_batch_size=64)
    assert large > bytes_of(per_device_train_batch_size=32)
    assert large > bytes_of(per_device_train_batch_size=64, gradient_checkpointing=True)


@pytest.mark.parametrize("layout", ["affine", "trellis"])
def test_plan_of_a_packed_65b_needs_its_configuration_alone_and_adds_up(layout: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}
    names = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
    modules = [
        f"model.layers.{block}.{part}.{name}_proj" for block in range(80) for part in names for name in names[part]
    ]
    facts = {"layout": layout, "bits": 2, "modules": modules} | ({"group_size": 64} if layout == "affine" else {})
    quantization = {"quant_method": "slimtune", "version": 1, "groups": [facts]}
    config = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False, **shape}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    train = {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 2048, "gradient_checkpointing": True}
    made = planned(tmp_path, {"lora": {"r": 8}}, {"train": train}, dtype="bfloat16", memory=24 * 2**30)
    linears = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    lora, step = (step.memory_bytes / 2**30 for step in made.steps)
    packed = linears * (2 + (0.375 if layout == "affine" else 0)) / 8 / 2**30  # 15.1 GiB at 2.00 bits
    doors, block = 80 * 2048 * 8192 * 2 / 2**30, 2048 * 2 * (19 * 8192 + 5 * 22016) / 2**30
    decoding = {"affine": 4, "trellis": 7}[layout] * 8192 * 22016 / 2**30
    factors = 8 * 80 * (4 * 2 * 8192 + 3 * (8192 + 22016)) / 2**30
    assert packed + 0.98 + 4 * factors < lora < packed + 0.98 + 4 * factors + 3  # and the process itself
    logits = 3 * 256 * 32000 * 4 / 2**30  # of a chunk, not of the text
    assert step - lora == pytest.approx(doors + block + decoding + logits + 12 * factors, abs=0.05)


def test_lora_pro_holds_moments_of_whole_weights(config_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))  # the process itself grows between two plans
    monkeypatch.setattr("slimtune.recipe.plan.psutil.Process", lambda: nothing)
    usual, pro = (planned(config_only, "lora", {"train": {"optim": name}}) for name in ("adamw_torch", "lora-pro"))
    weights = 2 * (32 * 48 * 2 + 32 * 24 * 2 + 3 * 32 * 40)  # of the linears in two blocks
    largest = 32 * 48
    assert pro.steps[1].memory_bytes - usual.steps[1].memory_bytes == 8 * weights + 16 * largest


def test_a_rank_that_no_update_can_have_is_a_warning(config_only: Path) -> None:
    assert planned(config_only, {"lora": {"r": 4}}, memory=2**50).warnings == ()
    [warning] = planned(config_only, {"lora": {"r": 100_000}}, memory=2**50).warnings
    assert "steps[0].lora: rank 100,000 is above the smaller width of model.layers.0." in warning


def test_a_rank_that_a_format_lacks_is_refused_by_the_plan(config_only: Path) -> None:
    with pytest.raises(RecipeError, match="takes no rank"):
        planned(config_only, "lora", {"export": {"format": "gguf", "rank": 4}})


def test_a_plan_knows_whose_blocks_may_differ_in_width(config_only: Path, tmp_path: Path) -> None:
    planned(config_only, {"export": {"format": "gguf-deci"}}, {"export": {"format": "decilm"}})
    pico_config("qwen3").save_pretrained(tmp_path)
    with pytest.raises(UnknownArchitecture, match="decilm cannot say"):
        planned(tmp_path, {"export": {"format": "decilm"}})
    with pytest.raises(UnknownArchitecture, match="all blocks of this kind of model alike"):
        planned(tmp_path, {"export": {"format": "gguf-deci"}})


def test_a_format_holds_what_is_packed_when_it_is_written(config_only: Path) -> None:
    """Not what was packed and merged before."""
    eight = {"quantize": {"method": "rtn", "bits": 8, "group_size": -1, "sym": True, "activations": {"bits": 8}}}
    first = {"quantize": {"method": "nf4"}}
    train, export = {"train": {"max_steps": 1}}, {"export": {"format": "compressed-tensors"}}
    planned(config_only, first, {"lora": {}}, train, {"merge": {}}, eight, export)
    with pytest.raises(RecipeError, match="cannot hold what this method makes"):
        planned(config_only, first, {"lora": {}}, train, export)


def test_what_is_learnt_from_is_looked_through_before_anything_runs(config_only: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    steps = [{"lora": {}}, {"train": {"max_steps": 1}}]
    with pytest.raises(CalibrationError, match="rows in no known format"):
        planned(config_only, *steps, data={"train": {"path": str(tmp_path / "rows.jsonl")}})


def test_rows_that_are_not_used_are_not_looked_at(config_only: Path, tmp_path: Path) -> None:
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in [good] * 4 + [bad]))
    source = {"path": str(tmp_path / "rows.jsonl"), "samples": 4}
    planned(config_only, {"lora": {}}, {"train": {"max_steps": 1}}, data={"train": source})
    with pytest.raises(CalibrationError, match="a row does not fit"):
        planned(config_only, {"lora": {}}, {"train": {"max_steps": 1}}, data={"train": {**source, "samples": 5}})


def test_what_a_residual_is_weighed_by_is_in_the_estimate(config_only: Path) -> None:
    steps = [{"quantize": {"method": "rtn", "group_size": 8}}, {"lora": {"init": "residual"}}]
    data = {"train": PYDOCS}
    alone = planned(config_only, *steps, data=data).steps[0]
    weighed = planned(config_only, *steps, data={**data, "calibration": PYDOCS}).steps[0]
    assert (weighed.flops or 0) > (alone.flops or 0)


def test_a_task_that_is_none_is_found_before_anything_runs(config_only: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    steps = [{"lora": {}}, {"train": {"max_steps": 1}}]
    for name in ("nosuch.jsonl", "arc_eazy"):
        with pytest.raises(RecipeError, match=f"named '{name}'"):
            planned(config_only, *steps, {"evaluate": {"tasks": [name]}})
    planned(config_only, *steps, {"evaluate": {"tasks": ["arc_easy"]}})


def test_an_adapter_that_sees_no_pruned_unit_is_told_before_anything_runs(config_only: Path) -> None:
    prune = {"prune": {"ratio": 0.2, "importance": "lora", "multiple_of": 4}}
    with pytest.raises(RecipeError, match=r"no adapter is here(?s:.)*mlp"):
        planned(config_only, {"lora": {"target_modules": ["q_proj"]}}, prune)
    planned(config_only, {"lora": {}}, prune)
