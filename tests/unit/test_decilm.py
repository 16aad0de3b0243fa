"""The `decilm` export: blocks of different widths without zeros, as vLLM and transformers read them.

vLLM is no dependency: `served` below is written from its `nemotron_nas.py`, shapes and order of sums alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

from pico import logits, pico_inputs, pico_model, pico_tokenizer, save_pico, silence_
from slimtune.arch import bind
from slimtune.cli import _guarded, app
from slimtune.errors import FormatError, RecipeError, UnknownArchitecture
from slimtune.export import Source, export
from slimtune.export.decilm import CODE
from slimtune.export.load import load
from slimtune.lora.attach import add_lora
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.rtn import Rtn
from slimtune.recipe.legality import check_order
from slimtune.recipe.schema import recipe_from

FAMILIES = ["llama", "llama-tied", "llama-biased", "mistral", "qwen2"]


def of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Source:
    return Source(model, pico_tokenizer(), "owner/base", dtype)


CASES: dict[str, tuple[tuple[int, int], dict[int, list[int]], dict[int, list[int]], list[int], list[int]]] = {
    # heads and key-value heads of the model, silent query heads and channels; key-value heads and channels in the file
    "nothing": ((4, 2), {}, {}, [2, 2, 2], [41, 41, 41]),
    "odd widths": ((4, 2), {}, {0: [3, 40], 1: [0], 2: list(range(1, 41, 2))}, [2, 2, 2], [39, 40, 21]),
    "a group": ((4, 2), {1: [0, 1], 2: [2, 3]}, {}, [2, 1, 1], [41, 41, 41]),
    "half a group": ((4, 2), {1: [1]}, {}, [2, 2, 2], [41, 41, 41]),
    "three groups of four": ((8, 4), {1: [2, 3], 2: [0, 1, 4, 5]}, {}, [4, 4, 2], [41, 41, 41]),
    "two groups of three": ((6, 3), {0: [0, 1], 1: [0, 1, 2, 3]}, {}, [2, 1, 3], [41, 41, 41]),
    "a head with its own keys": ((6, 6), {1: [0, 4], 2: [1, 2, 3]}, {}, [6, 6, 3], [41, 41, 41]),
    "no attention": ((4, 2), {1: [0, 1, 2, 3]}, {1: [7]}, [2, 0, 2], [41, 40, 41]),
    "no feed-forward layer": ((4, 2), {1: [2, 3]}, {0: list(range(41)), 2: list(range(41))}, [2, 1, 2], [0, 41, 0]),
    "nothing left of a block": ((4, 2), {1: [0, 1, 2, 3]}, {1: list(range(41))}, [2, 0, 2], [41, 0, 41]),
    "the first attention": ((4, 2), {0: [0, 1, 2, 3], 2: [0, 1, 2, 3]}, {}, [1, 2, 0], [41, 41, 41]),
}


def model_of(family: str, case: str) -> tuple[Any, list[int], list[int]]:
    """A model with zeros, and the widths that its file must have."""
    (heads, groups), silent, channels, kv_heads, ffn = CASES[case]
    sizes = {"hidden_size": 24, "num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": 41}
    model = pico_model(family, num_hidden_layers=3, **sizes)
    silence_(model, silent, channels)
    if family == "llama-biased":  # what a sub-layer adds at all events keeps it
        kv_heads, ffn = ([max(width, 1) for width in widths] for widths in (kv_heads, ffn))
    return model, kv_heads, ffn


def served(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of the folder by vLLM's rules: the configuration alone says the shape of every parameter, which the tensor
    of that name must have; none may be left over."""
    config = json.loads((folder / "config.json").read_text())
    tensors, hidden = load_file(folder / "model.safetensors"), config["hidden_size"]
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    # vLLM takes `get_total_num_kv_heads` from the first block with an attention, and refuses a model without any.
    assert not config["block_configs"][0]["attention"]["no_op"]
    heads, width, eps = config["num_attention_heads"], config["head_dim"], config["rms_norm_eps"]

    def take(name: str, *shape: int) -> Tensor:
        found = tensors.pop(name)
        assert found.shape == shape, name
        return found

    def project(x: Tensor, name: str, rows: int, biased: bool) -> Tensor:
        weight = take(f"{name}.weight", rows, x.shape[-1])
        return linear(x, weight, take(f"{name}.bias", rows) if biased else None)

    def norm(x: Tensor, residual: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        assert residual is not None, "vLLM's norm would return one tensor here, where two are unpacked"
        total = x + residual
        scaled = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
        return scaled * take(f"{name}.weight", hidden), total

    def turned(x: Tensor) -> Tensor:
        frequency = config["rope_parameters"]["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
        angle = torch.arange(x.shape[-2])[:, None] * torch.cat([frequency, frequency])
        a, b = x.chunk(2, -1)
        return x * angle.cos().to(x.dtype) + torch.cat([-b, a], -1) * angle.sin().to(x.dtype)

    length = tokens.shape[1]
    past = torch.arange(length)[:, None] - torch.arange(length)
    seen = (past >= 0) & (past < (config["sliding_window"] or length))
    table = take("model.embed_tokens.weight", config["vocab_size"], hidden)
    x, residual = embedding(tokens, table), None
    for i, block in enumerate(config["block_configs"]):
        name, attention, ffn = f"model.layers.{i}", block["attention"], block["ffn"]
        if not attention["no_op"]:
            groups = heads // attention["n_heads_in_group"]
            residual = torch.zeros_like(x) if residual is None else residual
            x, residual = norm(x, residual, f"{name}.input_layernorm")
            sizes = (("q", heads), ("k", groups), ("v", groups))
            q, k, v = (
                project(x, f"{name}.self_attn.{n}_proj", size * width, config["qkv_bias"])
                .unflatten(-1, (size, width))
                .transpose(1, 2)
                for n, size in sizes
            )
            k, v = (t.repeat_interleave(heads // groups, 1) for t in (turned(k), v))
            mixed = scaled_dot_product_attention(turned(q), k, v, attn_mask=seen).transpose(1, 2).flatten(2)
            x = project(mixed, f"{name}.self_attn.o_proj", hidden, config["attention_bias"])
        if not ffn["no_op"]:
            assert "ffn_mult" not in ffn, "vLLM would round this one to 256"
            x, residual = norm(x, residual, f"{name}.post_attention_layernorm")
            size, biased = ffn["intermediate_size"], config["mlp_bias"]
            gate, up = (project(x, f"{name}.mlp.{n}_proj", size, biased) for n in ("gate", "up"))
            x = project(silu(gate) * up, f"{name}.mlp.down_proj", hidden, biased)
    x, _ = norm(x, residual, "model.norm")
    head = table if config["tie_word_embeddings"] else take("lm_head.weight", config["vocab_size"], hidden)
    assert not tensors, sorted(tensors)
    return linear(x, head)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_what_vllm_would_load_computes_what_the_model_computes(family: str, case: str, tmp_path: Path) -> None:
    model, kv_heads, ffn = model_of(family, case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    manifest = export(of(model), "decilm", tmp_path / "out")
    assert manifest.facts == {"kv_heads": kv_heads, "ffn": ffn}
    assert {name for name in manifest.files if name.endswith((".py", ".pyc"))} == {f"{name}.py" for name in CODE}
    assert manifest.max_logit_difference <= 1e-5
    tokens = pico_inputs(model)["input_ids"]
    torch.testing.assert_close(
        served(tmp_path / "out", tokens), logits(model, {"input_ids": tokens}), rtol=0, atol=1e-5
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


READER = """
import sys
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoModelForCausalLM
folder, results, attention = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation=attention).eval()
tokens = load_file(results)["tokens"]
with torch.no_grad():
    logits = model(tokens).logits
fixed = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
replies = [model.generate(tokens, use_cache=cache, **fixed) for cache in (True, False)]
static = model.generate(tokens, cache_implementation="static", disable_compile=True, **fixed)
beams = model.generate(tokens, num_beams=2, **fixed)
model.save_pretrained(folder + "-again")
assert not {"slimtune", "vllm"} & set(sys.modules)
found = {"logits": logits, "cached": replies[0], "whole": replies[1], "static": static, "beams": beams}
save_file({key: value.contiguous() for key, value in found.items()}, results)
"""


@pytest.mark.parametrize(
    ("family", "case", "attention"),
    [
        ("llama-biased", "odd widths", "sdpa"),
        ("mistral", "two groups of three", "eager"),
        ("qwen2", "no attention", "sdpa"),
        ("llama-tied", "the first attention", "eager"),
    ],
)
def test_transformers_loads_the_folder_with_its_code_and_nothing_else(
    family: str, case: str, attention: str, tmp_path: Path
) -> None:
    model, _, _ = model_of(family, case)
    export(of(model), "decilm", tmp_path / "out")
    tokens, results = pico_inputs(model)["input_ids"], tmp_path / "results.safetensors"
    save_file({"tokens": tokens}, results)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READER, str(tmp_path / "out"), str(results), attention]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = load_file(results)
    torch.testing.assert_close(found["logits"], logits(model, {"input_ids": tokens}), rtol=0, atol=1e-5)
    fixed = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    wanted = model.generate(tokens, **fixed)  # type: ignore[operator]
    assert all(torch.equal(found[name], wanted) for name in ("cached", "whole", "static"))
    assert torch.equal(found["beams"], model.generate(tokens, num_beams=2, **fixed))  # type: ignore[operator]
    again = {path.name for path in Path(f"{tmp_path}/out-again").iterdir()}
    assert {"configuration_decilm.py", "modeling_decilm.py", "model.safetensors"} <= again


def test_packed_weights_and_adapters_are_merged_as_in_safetensors(tmp_path: Path) -> None:
    base = pico_model("llama")
    silence_(base, {}, {1: [4, 5]})
    quantize_(base, bind(base), all_linear(Rtn(bits=4, group_size=8, sym=True)))
    model = add_lora(base, r=2, base_name="owner/base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "layers.0" in name:
                parameter.normal_()
    manifest = export(of(model), "decilm", tmp_path / "out")
    assert manifest.facts["ffn"] == [40, 38] and manifest.max_logit_difference <= 1e-4
    export(of(model), "safetensors", tmp_path / "dense")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    assert whole.keys() == cut.keys()
    same = {name for name in whole if torch.equal(whole[name], cut[name])}
    assert whole.keys() - same == {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}


def test_sixteen_bits_are_said(tmp_path: Path) -> None:
    model, _, _ = model_of("llama", "odd widths")
    export(of(model, torch.bfloat16), "decilm", tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_block_configs_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitecture, match="this kind of model") as caught:
        export(of(pico_model("qwen3")), "decilm", tmp_path / "out")
    assert caught.value.facts["remedy"] == "export safetensors, zeros included" and caught.value.exit_status == 2
    with pytest.raises(FormatError, match="one activation"):
        export(of(pico_model("llama", hidden_act="gelu")), "decilm", tmp_path / "out")
    windows: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(FormatError, match="which blocks have a window"):
        export(of(pico_model("qwen2", **windows)), "decilm", tmp_path / "out")
    rounded = pico_model("llama")
    quantize_(rounded, bind(rounded), all_linear(Rtn(bits=8, group_size=-1, sym=True)))
    rounded.model.layers[0].mlp.up_proj.activations = nn.Identity()  # type: ignore[union-attr, index]
    with pytest.raises(FormatError, match="inputs are rounded"):
        export(of(rounded), "decilm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("before", "what"),
    [
        ({"rotate": {"online": ["r4"]}}, "online transform"),
        ({"quantize": {"activations": {"bits": 8}}}, "inputs are rounded"),
        ({"quantize": {"kv_cache": {"bits": 8}}}, "cache is rounded"),
    ],
)
def test_a_recipe_that_cannot_be_exported_so_is_refused(before: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        check_order(recipe_from({"model": "m", "steps": [before, {"export": {"format": "decilm"}}]}))


def test_the_command_line_prunes_exports_and_runs_no_code(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    model = save_pico(tmp_path / "base", num_hidden_layers=3)
    options = ["--ratio", "0.3", "--importance", "random", "--widths", "allocated", "--targets", "ffn"]
    options += ["--multiple_of", "1"]
    commands = (
        ["prune", model, *options, "-o", tmp_path / "pruned"],
        ["export", tmp_path / "pruned", "--format", "decilm", "-o", tmp_path / "out"],
    )
    for command in commands:
        status = _guarded(lambda a=command: app(list(map(str, a)), standalone_mode=True))
        assert status == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len({block["ffn"]["intermediate_size"] for block in config["block_configs"]}) > 1
    pruned = load(str(tmp_path / "pruned" / "model")).model
    inputs = {"input_ids": pico_inputs(pruned)["input_ids"]}
    torch.testing.assert_close(served(tmp_path / "out", inputs["input_ids"]), logits(pruned, inputs), rtol=0, atol=1e-5)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "--trust-remote-code" in readme and "modeling_decilm.py" in readme
    assert str(tmp_path) not in json.dumps(config)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask whether to run the code
    with pytest.raises(UnknownArchitecture, match="does not know this kind") as caught:
        load(str(tmp_path / "out"))
    assert "code of their own are not run" in str(caught.value)
